"""The toy scenes."""

import numpy as np
import pytest

from data.toy import prepare as toy
from dataset import Pairs
from masks import Colorbook
from train import train

SCENES = [toy.scene([0, i], (48, 48)) for i in range(60)]


def test_a_seed_is_a_scene():
    """The same data could not be drawn again."""
    state = np.random.get_state()[1].copy()
    for seed in (3, [1, 2, 3]):
        (image, ids), (image2, ids2) = toy.scene(seed), toy.scene(seed)
        assert (image == image2).all() and (ids == ids2).all()
    assert (toy.scene(3)[0] != toy.scene(4)[0]).any() and (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("size", [(64, 64), (32, 64), (48, 40)])
def test_sizes(size):
    """A scene that is not square, or of another size, could not be drawn."""
    image, ids = toy.scene(0, size)
    assert image.shape == (*size, 3) and ids.shape == size and image.dtype == ids.dtype == np.uint8 and ids.max() < 19


def test_every_class_occurs():
    """A class that never occurs cannot be learnt, and a mask that uses it would give noise."""
    seen = np.mean([np.bincount(ids.ravel(), minlength=19) > 0 for _, ids in SCENES], axis=0)
    assert seen.min() > 0.05 and seen[[0, 10]].min() > 0.95, dict(zip(Colorbook.load("colorbook.json").names, seen))


def test_mask_and_light_both_matter():
    """A model could ignore the mask, or copy one colour per class, and still look good."""
    images = np.stack([image for image, _ in SCENES]) / 255
    ids = np.stack([ids for _, ids in SCENES])
    by_class = np.stack([images[ids == k].mean(axis=0) for k in range(19)])
    without, given_class = ((images - guess) ** 2 for guess in (images.mean(axis=(0, 1, 2)), by_class[ids]))
    assert given_class.mean() < 0.8 * without.mean()  # the mask tells much of the colour
    brightness = images.mean(axis=(1, 2, 3))
    assert brightness.std() > 0.1 and brightness.min() < 0.3 < 0.5 < brightness.max()  # but not whether it is night
    cars = [images[i][ids[i] == 13].mean(axis=0) for i in range(60) if (ids[i] == 13).sum() > 20]
    assert np.std(cars, axis=0).max() > 0.08  # nor the colour of a car


def test_training_draws_its_own_scenes(tiny, tmp_path, monkeypatch, capsys):
    """On a fresh clone `python train.py` would ask for data that nobody has prepared."""
    monkeypatch.setattr(toy, "scene", lambda seed, size: SCENES[seed[-1] % 60])
    cfg = tiny(data__root=tmp_path / "toy" / "prepared", train__steps=2)
    train(cfg)
    assert [len(Pairs(cfg["data"]["root"], split, (16, 16))) for split in ("train", "val", "test")] == [1000, 100, 100]


@pytest.mark.parametrize("wrong", [{"train": -1}, {"seed": -5}, {"size": (8, 8)}])
def test_mistakes_are_messages(tmp_path, wrong):
    """A wrong number would end in a traceback, or leave half a data set."""
    with pytest.raises(ValueError, match="must be 0 or more|at least 16x16"):
        toy.prepare(tmp_path / "prepared", **{"train": 1, "val": 0, "test": 0} | wrong)
    assert not (tmp_path / "prepared").exists()
