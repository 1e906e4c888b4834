"""Several processes, as torchrun starts them, against one: gloo on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from checkpoint import load_checkpoint
from train import train


def torchrun(processes, config, *more):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "train.py",
                           "--config", config, *more], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def launch(cfg, tmp_path, processes, *more):
    """A run in so many processes; returns its checkpoint."""
    config = tmp_path / "distributed.yaml"
    config.write_text(yaml.safe_dump(cfg))
    done = torchrun(processes, config, *more)
    assert done.returncode == 0, done.stderr
    return load_checkpoint(Path(cfg["out"]) / "checkpoint.pt")


def close(a, b, atol):
    """The weights of two checkpoints, whose optimisers have the same state, agree."""
    for part in "model", "ema":
        assert a[part].keys() == b[part].keys()
        for key, value in a[part].items():
            assert type(b[part][key]) is torch.Tensor and torch.allclose(value, b[part][key], atol=atol), (part, key)
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    for i, moments in a["optimizer"]["state"].items():
        assert all(torch.allclose(value, b["optimizer"]["state"][i][key], atol=atol) for key, value in moments.items())


older = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has FSDP2 for GPUs only")


@pytest.mark.parametrize("fsdp", ["false", pytest.param("true", marks=older)])
def test_two_processes_train_what_one_would(tiny, tmp_path, fsdp):
    """A run on two devices would be another run, or its checkpoint would not go on with one.

    Equal up to the order of sums, which Adam's division by small gradients enlarges: hence a small learning rate.
    """
    more = {"train__lr": 1e-4, "train__steps": 4, "data__augment__p": 0.5}
    train(tiny("one", **more))
    one = load_checkpoint(Path(tiny("one")["out"]) / "checkpoint.pt")
    two = launch(tiny("two", **more, train__fsdp=fsdp), tmp_path, 2)
    close(one, two, atol=2e-6)
    assert torch.equal(one["rng"]["cpu"], two["rng"]["cpu"]) and two["step"] == 4
    log = (Path(tiny("two")["out"]) / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in log] == ["step", "2", "4"]  # one process writes it

    # from two processes to one, and from one to two
    more["train__steps"] = 8
    train(tiny("one", **more), resume=True)
    one = load_checkpoint(Path(tiny("one")["out"]) / "checkpoint.pt")
    if fsdp == "true":
        close(one, launch(tiny("two", **more, train__fsdp=fsdp), tmp_path, 2, "--resume"), atol=4e-6)
    else:
        train(tiny("two", **more), resume=True)
        close(one, load_checkpoint(Path(tiny("two")["out"]) / "checkpoint.pt"), atol=4e-6)
