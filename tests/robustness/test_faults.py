"""A training that is killed, starved or fed nonsense loses nothing that it had saved."""

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


def saved(cfg):
    return load_checkpoint(Path(cfg["out"]) / "checkpoint.pt")


@needs_fork
def test_random_faults_lose_nothing(tmp_path):
    """Six faults at random moments leave the weights of an undisturbed run (benchmarks.faults is the long form)."""
    assert harass(tmp_path, kills=6, seed=1, steps=20).total() == 6


@needs_fork
def test_every_fault_of_a_save(tmp_path):
    """After half a checkpoint, a kill between its renames and a full disk, a run goes on from the checkpoint before."""
    train(make_config(tmp_path, "undisturbed", steps=9))
    for fault, left in ("half a checkpoint", 3), ("between renames", 3), ("full disk", None):
        cfg = make_config(tmp_path, fault, steps=9)
        assert piece(cfg, False, fault, 1) == (1 if fault == "full disk" else -9)  # at its second save, or 1.2 MB
        path = tmp_path / fault / "checkpoint.pt"
        assert path.exists() == (fault == "half a checkpoint")
        if left:
            assert saved(cfg)["step"] == left
        assert path.with_name("checkpoint.pt.partial").exists() == (fault != "full disk")  # an error tidies up
        assert piece(cfg, True) == 0
        check(tmp_path / fault, tmp_path / "undisturbed")
        assert not path.with_name("checkpoint.pt.partial").exists()
    assert {"half a checkpoint", "between renames", "full disk"} == {name for name in FAULTS if "SIG" not in name}


def test_the_check_sees_a_difference(tmp_path):
    """A weight, a random state, the images seen or a row of the log that differ are found."""
    train(make_config(tmp_path, "a", steps=2))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path, state = tmp_path / "b" / "checkpoint.pt", saved(make_config(tmp_path, "a"))
    del state["path"]
    weight, random_state = state["ema"]["out.weight"] + 1e-7, state["rng"]["cpu"].flip(0)
    for key, value in (("ema", state["ema"] | {"out.weight": weight}), ("rng", {"cpu": random_state}), ("images", 9)):
        torch.save(state | {key: value}, path)
        with pytest.raises(RuntimeError, match=f"{key} differs"):
            check(path.parent, tmp_path / "a")
    torch.save(state, path)
    check(path.parent, tmp_path / "a")
    log = path.with_name("log.csv")
    log.write_text(log.read_text() + log.read_text().splitlines()[-1] + "\n")
    with pytest.raises(RuntimeError, match=r"rows \[2, 2\], expected \[2\]"):
        check(path.parent, tmp_path / "a")


def test_data_folder_that_is_gone(tiny, flat_root, tmp_path):
    """A resumed run whose data are not there says so, keeps its checkpoint, and goes on once they are back."""
    root = tmp_path / "moved"
    shutil.copytree(flat_root, root)
    settings = {"data__root": root, "train__preview_every": 99, "train__val_every": 99}
    train(tiny(**settings, train__steps=2))
    before = (Path(tiny()["out"]) / "checkpoint.pt").read_bytes()
    os.rename(root, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="moved.*Prepare one"):
        train(tiny(**settings, train__steps=3), resume=True)
    assert (Path(tiny()["out"]) / "checkpoint.pt").read_bytes() == before
    os.rename(tmp_path / "elsewhere", root)
    train(tiny(**settings, train__steps=3), resume=True)
    assert saved(tiny())["step"] == 3


def test_half_precision_that_always_overflows_stops(tiny, monkeypatch):
    """fp16 whose gradient overflows at every loss scale ends in a message, without a checkpoint."""
    real = Diffusion.loss
    monkeypatch.setattr(Diffusion, "loss", lambda self, *args: real(self, *args) * 1e30)  # finite; its gradient is not
    cfg = tiny(train__precision="fp16", train__steps=60, train__log_every=18, train__save_every=99, train__val_every=99)
    with pytest.raises(ValueError, match="step 18: the gradient overflows fp16"):  # 65536 / 2^18 is below 1
        train(cfg)
    assert not (Path(cfg["out"]) / "checkpoint.pt").exists()


def test_poisoned_image_stops_the_run(tiny, monkeypatch):
    """A batch of NaN ends the run with the last good state, from which it goes on as if there had been none."""
    real, calls = Diffusion.loss, []

    def loss(self, model, x0, *args):
        calls.append(0)
        return real(self, model, x0 * (math.nan if len(calls) == 6 else 1), *args)

    settings = {"train__save_every": 4, "train__val_every": 99, "train__preview_every": 99, "train__steps": 8}
    with monkeypatch.context() as patch:
        patch.setattr(Diffusion, "loss", loss)
        with pytest.raises(ValueError, match="step 6.*last good state"):
            train(tiny("poisoned", **settings))
    train(tiny("poisoned", **settings), resume=True)
    train(tiny("clean", **settings))
    check(Path(tiny("poisoned")["out"]), Path(tiny("clean")["out"]))
