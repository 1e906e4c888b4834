"""Several processes, on the CPU with gloo, against one."""

import csv
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

import train as train_module
from benchmarks.faults import same
from checkpoint import load_checkpoint
from config import command
from ddpm import Diffusion
from train import train

NEVER = {f"train__{name}_every": 999 for name in ("val", "preview", "save", "log")}  # but at the last step

# below the range that connections of other tests get theirs from, and other ones in each process of the tests
PORTS = itertools.count(20000 + os.getpid() % 100 * 100)


def process(rank, port, run, *args):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout = sys.stderr = open(os.devnull, "w")
    command(run, *args)


def in_two_processes(run, *args):
    """What torchrun does, without its start of many seconds: run(*args) as ranks 0 and 1. Returns their exit codes."""
    port = next(PORTS)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(rank, port, run, *args)) for rank in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(120)
        each.kill()  # one that hangs has no exit code of its own
    return [each.exitcode for each in processes]


def saved(cfg):
    return load_checkpoint(Path(cfg["out"]) / "checkpoint.pt")


def log(cfg):
    """The rows of the log without its times."""
    rows = list(csv.DictReader(open(Path(cfg["out"]) / "log.csv")))
    return [{key: float(row[key] or -1) for key in row if key not in ("seconds", "images_per_s")} for row in rows]


def assert_same_training(a, b):
    """The gradients that Adam remembers agree to rounding, and so do the weights, up to what Adam makes of rounding."""
    moments = [torch.cat([m["exp_avg"].flatten() for m in state["optimizer"]["state"].values()]) for state in (a, b)]
    assert (moments[1] - moments[0]).norm() < 1e-4 * moments[0].norm()
    for part in "model", "ema":
        assert a[part].keys() == b[part].keys()
        assert all(torch.allclose(a[part][key], b[part][key], atol=4e-6) for key in a[part])
    assert same(a["rng"], b["rng"]) and (a["step"], a["images"]) == (b["step"], b["images"])


def test_processes_and_micro_batches_train_what_one_batch_would(tiny):
    """2 processes of 1, 2 and 4 micro-batches have the gradients, weights and random state of one process and batch.

    The learning rate is small because Adam divides by small gradients, which enlarges the rounding of sums.
    """
    settings = {"train__lr": 1e-4, "train__steps": 4, "train__label_drop": 0.5, "data__augment__p": 0.5, **NEVER}
    train(tiny("one", **settings))
    for accumulate in 1, 2, 4:
        cfg = tiny(f"two{accumulate}", **settings, train__accumulate=accumulate)
        assert in_two_processes(train, cfg) == [0, 0]
        assert_same_training(saved(tiny("one")), saved(cfg))


def test_torchrun_trains_and_resumes_what_one_process_would(tiny, tmp_path):
    """`torchrun train.py`, from any folder, writes one log, of one process's numbers; one process goes on with it."""
    settings = {"train__lr": 1e-4, "train__save_every": 3, "train__val_every": 4, "train__preview_every": 99}
    for steps in 4, 8:
        train(tiny("one", **settings, train__steps=steps), resume=steps > 4)
    config = tmp_path / "my.yaml"
    config.write_text(yaml.safe_dump(tiny("two", **settings, train__steps=4)))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           train_module.__file__, "--config", config], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: python sample.py") == 1 and "parameters on 2 x cpu" in done.stdout
    train(tiny("two", **settings, train__steps=8), resume=True)
    assert_same_training(saved(tiny("one")), saved(tiny("two")))
    one, two = log(tiny("one")), log(tiny("two"))
    assert [row["step"] for row in two] == [2, 3, 4, 6, 8]
    for expected, row in zip(one, two):
        assert row == pytest.approx(expected, rel=1e-3)


def interrupted(cfg, number):
    """train(), where the second process gets the signal at its third step."""
    real, calls = Diffusion.loss, []

    def loss(self, *args):
        calls.append(0)
        if len(calls) == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), number)
        return real(self, *args)

    Diffusion.loss = loss
    train(cfg)


def test_a_signal_to_one_process_stops_all_after_the_step(tiny):
    """SIGTERM to the second process at step 3 stops both after it, saved; 2 processes go on to the same end."""
    settings = {"train__steps": 6, "train__lr": 1e-4, **NEVER}
    assert in_two_processes(interrupted, tiny("two", **settings), signal.SIGTERM) == [143, 143]
    assert saved(tiny("two"))["step"] == 3
    assert in_two_processes(train, tiny("two", **settings), True) == [0, 0]
    train(tiny("one", **settings))
    assert_same_training(saved(tiny("one")), saved(tiny("two")))


def test_a_fall_back_in_two_processes(tiny):
    """Both processes take the checkpoint before a damaged one, which is set aside once."""
    train(tiny(train__steps=6, train__save_every=3))
    path = Path(tiny()["out"]) / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert in_two_processes(train, tiny(train__steps=6), True) == [0, 0]
    assert saved(tiny())["step"] == 6 and path.with_name("checkpoint.pt.damaged").stat().st_size == 1000


def test_a_dry_run_of_two_processes_ends(tiny, tmp_path):
    """Where the toy scenes are missing no process of a dry run waits for the others; nothing is written."""
    cfg = tiny(data__root=tmp_path / "toy" / "prepared")
    assert in_two_processes(train, cfg, False, True) == [0, 0] and not list(tmp_path.iterdir())


def test_a_batch_that_cannot_be_shared_is_refused(tiny):
    """9 images for 2 processes end in an error of both, and nothing is written."""
    cfg = tiny(train__batch_size=9)
    assert in_two_processes(train, cfg) == [1, 1] and not Path(cfg["out"]).exists()


@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_processes_wait_for_days(tiny, monkeypatch, device, backend):
    """The group is told to wait for days, where torch's 10 minutes would end a first reading of large data."""
    received = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train_module, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)

    def group(*args, timeout):
        received.extend([*args, timeout])
        raise InterruptedError

    monkeypatch.setattr(dist, "init_process_group", group)
    with pytest.raises(InterruptedError):
        train(tiny(device=device))
    assert received[0] == backend and received[1] >= timedelta(days=1)
