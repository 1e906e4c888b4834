"""Kill a training again and again, and see that nothing is lost.

    python -m benchmarks.faults --kills 100

Trains a tiny network on toy scenes twice: once undisturbed, and once in pieces, each ended by a fault at a random moment: SIGKILL,
SIGTERM or Ctrl-C from outside, SIGKILL in the middle of writing a checkpoint or between the renames that put it in place, a disk that
is full (a limit on the size of files). After every fault a whole checkpoint must load that is no older than the one before it; at
the end weights, optimiser and random states must be those of the undisturbed run, bit for bit, and the log must have every row
once. Needs fork and signals: Linux or macOS.
"""

import argparse
import contextlib
import csv
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import train as train_module
from checkpoint import load_checkpoint
from config import load_config
from data.toy.prepare import prepare
from train import train

FAULTS = ("SIGKILL", "SIGTERM", "SIGINT", "half a checkpoint", "between renames", "full disk")


def make_config(folder, steps=40):
    """A run of a few seconds: 16x16 pictures, a checkpoint every 3 steps, a row of the log every 2."""
    if not (folder / "data").exists():
        prepare(folder / "data", train=12, val=4, test=0, size=(16, 16))
    settings = {"device": "cpu", "data.root": folder / "data", "data.size": [16, 16], "model.hidden_dim": 8, "model.emb_dim": 16,
                "train.steps": steps, "train.log_every": 2, "train.save_every": 3, "train.val_every": 20, "train.val_pairs": 4,
                "train.preview_every": 20, "train.previews": 1, "data.augment.p": 0.3}
    return lambda out: load_config("config.yaml", "toy", [f"{k}={v}" for k, v in (settings | {"out": folder / out}).items()])


def child(cfg, resume, fault, when):
    """One piece of the run, in a process of its own; faults from inside strike at the `when`-th opportunity."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        torch.set_num_threads(1)
        left = [when]

        def strike(real, before):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    before(*args)
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            return call

        def write_half(state, file):
            state_bytes = open(cfg["out"] + "/checkpoint.pt", "rb").read() if os.path.exists(cfg["out"] + "/checkpoint.pt") else b"half"
            file.write(state_bytes[: len(state_bytes) // 2])
            file.flush()

        if fault == "half a checkpoint":
            train_module.torch.save = strike(torch.save, write_half)
        elif fault == "between renames":
            os.replace = strike(os.replace, lambda *_: None)
        elif fault == "full disk":
            import resource
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails with an OSError, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000 + 10_000 * when, resource.RLIM_INFINITY))
        try:
            train(cfg, resume=resume)
        except (ValueError, OSError):
            os._exit(1)
        except SystemExit as stopped:
            os._exit(stopped.code)


def piece(cfg, resume, fault, rng, seconds):
    """Run until the fault strikes or the training ends; the exit code (negative: the signal that killed it)."""
    process = multiprocessing.get_context("fork").Process(target=child, args=(cfg, resume, fault, rng.randrange(4)))
    process.start()
    if fault.startswith("SIG"):
        process.join(rng.uniform(0, seconds))
        if process.is_alive():
            os.kill(process.pid, getattr(signal, fault))
    process.join(120)
    if process.is_alive():
        process.kill()
        raise RuntimeError(f"{fault}: the training hung")
    return process.exitcode


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def harass(folder, kills, seed=0, steps=40):
    """Returns {fault: how often it struck}. RuntimeError where anything was lost."""
    rng, make, struck, newest = random.Random(seed), make_config(folder, steps), Counter(), -1
    started = time.monotonic()
    if piece(make("whole"), False, "", rng, 0):
        raise RuntimeError("the undisturbed run failed")
    seconds = time.monotonic() - started
    cfg, run, n = make("pieces"), folder / "pieces", 0
    while True:
        fault = rng.choice(FAULTS) if struck.total() < kills else ""
        code = piece(cfg, run.exists(), fault, rng, seconds)
        n += 1
        if code == 0 and struck.total() >= kills:
            break
        if code == 0:  # it got to its end before enough faults struck: once more from the start
            check(run, folder / "whole")
            os.rename(run, folder / f"done{n}")
            newest = -1
            continue
        struck[fault] += 1
        if (run / "checkpoint.pt").exists() or (run / "checkpoint.pt.previous").exists() or newest >= 0:
            step = load_checkpoint(run / "checkpoint.pt")["step"]
            if step < newest:
                raise RuntimeError(f"{fault}: the checkpoint fell from step {newest} back to {step}")
            newest = step
    check(run, folder / "whole")
    return struck


def check(run, whole):
    """RuntimeError unless the finished run is the undisturbed one, to the bit, with every row of its log once."""
    a, b = load_checkpoint(whole / "checkpoint.pt"), load_checkpoint(run / "checkpoint.pt")
    for key in "model", "ema", "optimizer", "scaler", "step", "rng":
        if not same(a[key], b[key]):
            raise RuntimeError(f"{run}: {key} differs from the undisturbed run")
    expected, found = ([int(row["step"]) for row in csv.DictReader(open(path / "log.csv"))] for path in (whole, run))
    if found != sorted(set(found)) or set(expected) - set(found):  # a stop by a signal logs a row more
        raise RuntimeError(f"{run}: the log has rows {found}, expected {expected}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        struck = harass(Path(folder), args.kills, args.seed)
    print(f"{struck.total()} faults in {time.monotonic() - started:.0f} s, nothing lost: "
          + ", ".join(f"{n} {fault}" for fault, n in struck.most_common()))


if __name__ == "__main__":
    main()
