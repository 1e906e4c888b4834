"""A training that is killed, starved or fed nonsense loses nothing that it had saved."""

import csv
import math
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.faults import FAULTS, check, harass, make_config, piece
from checkpoint import load_checkpoint
from ddpm import Diffusion
from train import train

needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork and signals")


@needs_fork
def test_random_faults_lose_nothing(tmp_path):
    """Kills at random moments would cost work, or change what a run ends with (python -m benchmarks.faults is the long form)."""
    assert harass(tmp_path, kills=6, seed=1, steps=20).total() == 6


@needs_fork
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if not fault.startswith("SIG")])
def test_every_fault_of_a_save(tmp_path, fault):
    """A kill in the middle of a save, or a full disk, would leave no whole checkpoint behind."""
    class First:  # the fault strikes at the second save, renaming or 10 kB
        randrange = staticmethod(lambda n: 1)

    make = make_config(tmp_path, steps=12)
    train(make("whole"))
    assert piece(make("pieces"), False, fault, First, 0) != 0
    assert piece(make("pieces"), True, "", First, 0) == 0
    check(tmp_path / "pieces", tmp_path / "whole")


def test_torn_row_of_the_log_is_dropped(tiny):
    """A row that a kill cut short would be read as another step's, or stop every --resume."""
    train(tiny("torn", train__steps=5))
    log = Path(tiny("torn")["out"]) / "log.csv"
    with open(log, "a") as file:
        file.write("1")  # of step 10
    train(tiny("torn"), resume=True)
    assert [row["step"] for row in csv.DictReader(open(log))] == ["2", "4", "5", "6", "8", "10"]


def test_data_folder_that_is_gone(tiny, flat_root, tmp_path):
    """A run whose disk was not mounted would begin on nothing, or lose its checkpoint."""
    root = tmp_path / "moved"
    shutil.copytree(flat_root, root)
    train(tiny(train__steps=5, data__root=root))
    before = (Path(tiny()["out"]) / "checkpoint.pt").read_bytes()
    os.rename(root, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="moved.*no such folder"):
        train(tiny(data__root=root), resume=True)
    assert (Path(tiny()["out"]) / "checkpoint.pt").read_bytes() == before
    os.rename(tmp_path / "elsewhere", root)
    train(tiny(data__root=root), resume=True)


def test_half_precision_that_always_overflows_stops(tiny, monkeypatch):
    """fp16 would leave out every step in silence, for days."""
    real = Diffusion.loss
    monkeypatch.setattr(Diffusion, "loss", lambda self, *args: real(self, *args) * 1e30)  # finite; its gradient is not
    cfg = tiny(train__precision="fp16", train__steps=60, train__log_every=10, train__save_every=99, train__val_every=99)
    with pytest.raises(ValueError, match="step 20: the gradient overflows fp16"):  # 65536 / 2^20 is below 1
        train(cfg)
    assert not (Path(cfg["out"]) / "checkpoint.pt").exists()


def test_poisoned_picture_stops_the_run(tiny, monkeypatch):
    """One broken batch would turn all weights into NaN, and these be saved over the good ones."""
    real, calls = Diffusion.loss, []

    def loss(self, model, x0, *args):
        calls.append(0)
        return real(self, model, x0 * (math.nan if len(calls) == 8 else 1), *args)

    monkeypatch.setattr(Diffusion, "loss", loss)
    with pytest.raises(ValueError, match="step 8.*last good state"):
        train(tiny("poisoned"))
    monkeypatch.undo()
    train(tiny("poisoned"), resume=True)
    train(tiny("clean"))
    a, b = (load_checkpoint(Path(tiny(name)["out"]) / "checkpoint.pt") for name in ("poisoned", "clean"))
    assert a["step"] == 10 and all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
