"""A data set whose right answer is known: four classes, each of one colour, in random rectangles."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # images of 16x16 take longer to share out than to compute; torch reads it

import numpy as np
import pytest
import torch

from checkpoint import build, save_checkpoint
from config import load_config
from data.common import write_dataset
from ddpm import Diffusion
from masks import Colorbook
from unet import UNet

torch.cpu.get_capabilities = dict  # precision `auto` is fp32 in this process, on every CPU; `tiny` sets it for others

CLASSES = {"road": [128, 64, 128], "sky": [70, 130, 180], "car": [0, 0, 142], "person": [220, 20, 60]}
LOOKS = np.array([[60, 60, 60], [120, 190, 250], [220, 30, 30], [240, 220, 40]], np.uint8)  # of a class in the image


def flat_scene(seed, size=16):
    """image (size, size, 3) and ids (size, size): sky above road, and one rectangle of car or person."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((size, size), np.uint8)
    ids[: rng.integers(size // 4, 3 * size // 4)] = 1
    y, x = rng.integers(0, size // 2, 2)
    ids[y : y + size // 2, x : x + size // 3] = rng.integers(2, 4)
    return LOOKS[ids], ids


@pytest.fixture(scope="session")
def flat_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("flat") / "prepared"
    splits = {"train": range(50), "val": range(100, 110), "test": range(200, 205)}
    write_dataset(root, Colorbook(CLASSES), {
        split: [(f"flat_{i}", lambda i=i: flat_scene(i)) for i in seeds] for split, seeds in splits.items()})
    return root


@pytest.fixture
def tiny(flat_root, tmp_path):
    """tiny(out, key=value, ...) is the config of a run of a few seconds on that data; __ stands for the dot."""

    def make(out="run", **settings):
        values = {"device": "cpu", "out": tmp_path / out, "data.root": flat_root, "data.size": [16, 16],
                  "model.hidden_dim": 8, "model.emb_dim": 16, "train.batch_size": 8, "train.steps": 10,
                  "train.val_every": 5, "train.save_every": 5, "train.preview_every": 10,
                  "train.previews": 2, "train.log_every": 2, "train.precision": "fp32",
                  "sample.out": tmp_path / "out", "sample.steps": 4, "sample.precision": "fp32"}
        values |= {key.replace("__", "."): value for key, value in settings.items()}
        return load_config(None, "toy", [f"{key}={value}" for key, value in values.items()])

    return make


@pytest.fixture
def untrained(tiny, tmp_path):
    """untrained(key=value, ...) is the checkpoint of an untrained network of 16x24, to sample from."""

    def make(**settings):
        cfg, path = tiny(data__size=[16, 24], **settings), tmp_path / "untrained.pt"
        model, _, _ = build(cfg, len(CLASSES), torch.device("cpu"))
        save_checkpoint(path, {"ema": model.state_dict(), "step": 0, "config": cfg, "colorbook": CLASSES})
        return path

    return make


@pytest.fixture
def exact(monkeypatch):
    """A network that draws the LOOKS of its mask, to a grey level, and the mean of them without one."""
    diffusion, looks = Diffusion(prediction="v"), torch.from_numpy(LOOKS).float() / 127.5 - 1

    def forward(self, x, t, mask=None, *, features=None, keep=None):
        x0 = torch.zeros_like(x) if features is None else features
        a, s = diffusion.coefficients(t)
        return a * (x - a * x0) / s - s * x0

    monkeypatch.setattr(UNet, "mask_features", lambda self, mask: torch.einsum("bkhw,kc->bchw", mask, looks))
    monkeypatch.setattr(UNet, "forward", forward)
