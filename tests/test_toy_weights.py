"""The weights that come with the project: a fresh clone samples from them, and they obey the masks."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import sample
from checkpoint import load_checkpoint
from config import PROJECT, load_config
from data.toy.prepare import scene
from dataset import read_image
from masks import Colorbook, save_mask
from train import train

HELD_OUT = range(1000, 1012)  # of the scenes of the test split; those of train were learnt


@pytest.fixture(scope="module")
def segment():
    """A segmenter trained on a hundred drawn scenes for a few seconds: images (N, 64, 64, 3) to ids (N, 64, 64)."""
    images, ids = zip(*(scene([0, 0, i], (64, 64)) for i in range(100)))
    x, y = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255, torch.from_numpy(np.stack(ids)).long()
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, 1, 2, 2), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 4, 4), nn.ReLU(),
        nn.Conv2d(32, 19, 1), nn.Upsample(scale_factor=4, mode="bilinear"))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=150)
    for _ in range(150):
        chosen = torch.randint(len(x), (16,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    net.eval()
    return lambda images: net(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255).argmax(1)


@pytest.fixture
def fresh_clone(tmp_path, monkeypatch):
    """A folder in which nothing was trained, as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_classes_stand_where_the_mask_puts_them(fresh_clone, segment, monkeypatch, capsys):
    """Without a run, sample.py takes these weights and says so; what a segmenter sees in the images is their mask."""
    (fresh_clone / "masks").mkdir()
    real, ids = zip(*(scene([0, 2, i], (64, 64)) for i in HELD_OUT))
    for i, mask in zip(HELD_OUT, ids):
        save_mask(mask, fresh_clone / "masks" / f"{i}.png", Colorbook.load(PROJECT.with_name("colorbook.json")))
    monkeypatch.setattr(sys, "argv", ["sample.py", "--mask", "masks", "--n", "1", "--steps", "10"])
    sample.main()
    assert f"weights that come with the project, {sample.TOY_WEIGHTS}" in capsys.readouterr().out
    generated = [read_image(path) for path in sorted((fresh_clone / "out").glob("1*.png"))]
    assert len(generated) == len(HELD_OUT) and generated[0].shape == (64, 64, 3)

    truth = torch.from_numpy(np.stack(ids))

    def accuracy(images, truth):
        return (segment(images) == truth).float().mean().item()

    ceiling = accuracy(real, truth)
    assert accuracy(generated, truth) > 0.9 * ceiling > 0.5
    assert accuracy(generated, truth.roll(1, 0)) < 0.8 * ceiling


def test_the_weights_are_small_and_complete():
    """EMA weights of the preset's network in half precision, at most 12 MB, by this version's names."""
    assert sample.TOY_WEIGHTS.stat().st_size <= 12e6
    state = load_checkpoint(sample.TOY_WEIGHTS)
    assert {weights.dtype for weights in state["ema"].values()} == {torch.float16} and "model" not in state
    assert state["config"]["model"] == load_config(preset="toy")["model"] and state["step"] > 1000
    assert Colorbook(state["colorbook"]).classes == Colorbook.load(PROJECT.with_name("colorbook.json")).classes


def test_a_run_goes_before_them(tiny, fresh_clone, monkeypatch, capsys):
    """Once there is a run, its checkpoint is used; a run that has none yet is an error, not another picture."""
    train(tiny(train__steps=2) | {"out": "runs/toy"})
    Image.new("RGB", (16, 16), (128, 64, 128)).save("my.png")
    monkeypatch.setattr(sys, "argv", ["sample.py", "--mask", "my.png", "--n", "1"])
    sample.main()
    assert "weights that come" not in capsys.readouterr().out
    made = json.loads(Image.open("out/my_w3_seed1.png").text["settings"])
    assert made["checkpoint"] == "runs/toy/checkpoint.pt" and made["trained_steps"] == 2
    for path in fresh_clone.glob("runs/toy/checkpoint.pt*"):
        path.unlink()
    with pytest.raises(SystemExit, match="no such checkpoint"):
        sample.main()


@pytest.mark.parametrize("options", [["--preset", "idd_lite"], ["--checkpoint", "runs/toy/checkpoint.pt"]])
def test_they_stand_in_for_nothing_else(fresh_clone, options, monkeypatch):
    """A run of other data, or a checkpoint that is named, has to be there."""
    monkeypatch.setattr(sys, "argv", ["sample.py", "--mask", str(PROJECT.parent / "data" / "hand_drawn.png"), *options])
    with pytest.raises(SystemExit, match="no such checkpoint"):
        sample.main()


def test_they_are_not_resumed(tmp_path, tiny):
    """Training refuses to go on from them, by the names of what is missing."""
    cfg = tiny(train__steps=2)
    train(cfg)
    out = tmp_path / "run" / "checkpoint.pt"
    out.write_bytes(sample.TOY_WEIGHTS.read_bytes())
    with pytest.raises(ValueError, match="lacks model, optimizer.*not resumed"):
        train(cfg, resume=True)
