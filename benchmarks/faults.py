"""Stop a training again and again, and see that nothing is lost.

    python -m benchmarks.faults --kills 100

Trains a tiny network on toy scenes twice: once undisturbed, and once in pieces, each ended by a fault at a random
moment: SIGKILL, SIGTERM or Ctrl-C from outside, SIGKILL in the middle of writing a checkpoint or between the two
renames that put it in place, or a full disk (a limit on the size of files). After every fault a complete checkpoint
must load that is no older than the one before; at the end weights, optimiser and random states must be those of the
undisturbed run, bit for bit, and the log must have every row once. Needs fork and signals: Linux or macOS.
"""

import argparse
import csv
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from checkpoint import load_checkpoint
from config import command, load_config
from data.toy.prepare import prepare
from train import train

FAULTS = ("SIGKILL", "SIGTERM", "SIGINT", "half a checkpoint", "between renames", "full disk")


def make_config(folder, out, steps=40):
    """A run of a few seconds: 16x16 images, a checkpoint every 3 steps, a row of the log every 2."""
    if not (folder / "data").exists():
        prepare(folder / "data", train=12, val=4, test=0, size=(16, 16))
    settings = {"out": folder / out, "device": "cpu", "data.root": folder / "data", "data.size": [16, 16],
                "data.augment.p": 0.3, "model.hidden_dim": 8, "model.emb_dim": 16, "train.steps": steps,
                "train.log_every": 2, "train.save_every": 3, "train.val_every": 20, "train.val_pairs": 4,
                "train.preview_every": 20, "train.previews": 1}
    return load_config(preset="toy", overrides=[f"{key}={value}" for key, value in settings.items()])


def child(cfg, resume, fault, when):
    """A piece of the run, in a process of its own; faults from inside strike at its save number `when`, from 0 on."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)
    saves, real_save, real_replace = itertools.count(), torch.save, os.replace

    def save_half(state, file):
        if next(saves) == when:
            file.write(bytes(500_000))
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        real_save(state, file)

    def rename_one(source, target):  # *.previous has its name, the new checkpoint not yet
        if Path(target).name == "checkpoint.pt" and next(saves) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        real_replace(source, target)

    if fault == "half a checkpoint":
        torch.save = save_half
    elif fault == "between renames":
        os.replace = rename_one
    elif fault == "full disk":
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails with an OSError, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000 + 1_000_000 * when, resource.RLIM_INFINITY))
    command(train, cfg, resume)


def piece(cfg, resume, fault="", when=0, seconds=0.0):
    """Train until the fault strikes or the end; signals strike after `seconds`. Returns the exit code, 0 at the end."""
    process = multiprocessing.get_context("fork").Process(target=child, args=(cfg, resume, fault, when))
    process.start()
    if fault.startswith("SIG"):
        process.join(seconds)
        if process.is_alive():
            os.kill(process.pid, getattr(signal, fault))
    process.join(120)
    if process.is_alive():
        process.kill()
        raise RuntimeError(f"{fault}: the training hung")
    return process.exitcode


def same(a, b):
    """Whether nested dicts and lists of tensors are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def check(run, undisturbed):
    """RuntimeError unless a finished run is the undisturbed one, bit for bit, with every row of its log once."""
    a, b = load_checkpoint(undisturbed / "checkpoint.pt"), load_checkpoint(run / "checkpoint.pt")
    for key in "model", "ema", "optimizer", "scaler", "rng", "step", "images":
        if not same(a[key], b[key]):
            raise RuntimeError(f"{run}: {key} differs from the undisturbed run")
    expected, logged = ([int(row["step"]) for row in csv.DictReader(open(path / "log.csv"))]
                        for path in (undisturbed, run))
    if logged != sorted(set(logged)) or set(expected) - set(logged):  # a stop by a signal logs a row more
        raise RuntimeError(f"{run}: the log has the rows {logged}, expected {expected}")


def harass(folder, kills, seed=0, steps=40):
    """Returns {fault: how often it struck}. RuntimeError where anything was lost."""
    rng, struck, run, newest, started = random.Random(seed), Counter(), folder / "pieces", -1, time.monotonic()
    if piece(make_config(folder, "undisturbed", steps), False):
        raise RuntimeError("the undisturbed run failed")
    seconds, cfg = time.monotonic() - started, make_config(folder, "pieces", steps)
    while True:
        fault = rng.choice(FAULTS) if struck.total() < kills else ""
        if piece(cfg, run.exists(), fault, rng.randrange(4), rng.uniform(0, seconds)):
            if not fault:
                raise RuntimeError(f"{run}: the training failed without a fault")
            struck[fault] += 1
            if newest >= 0 or any((run / name).exists() for name in ("checkpoint.pt", "checkpoint.pt.previous")):
                step = load_checkpoint(run / "checkpoint.pt")["step"]
                if step < newest:
                    raise RuntimeError(f"{fault}: the checkpoint fell back from step {newest} to {step}")
                newest = step
            continue
        check(run, folder / "undisturbed")
        if not fault:
            return struck
        shutil.rmtree(run)  # the end came before enough faults: once more from the start
        newest = -1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="number of faults (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and their moments (default: %(default)s)")
    args, started = parser.parse_args(), time.monotonic()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        struck = harass(Path(folder), args.kills, args.seed)
    print(f"{struck.total()} faults in {time.monotonic() - started:.0f} s, nothing lost: "
          + ", ".join(f"{n} {fault}" for fault, n in struck.most_common()))


if __name__ == "__main__":
    command(main)
