"""Colours that are asked for: labels in RGB and LAB, lamps, and that the table holds what was measured."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import CLASSES, flat_scene
from PIL import Image

from data.common import write_dataset
from experiments import colour_labels
from experiments.colour_labels import (LAB, NAMES, RGB, count_mislabelled, label_distances, label_streets, mean_colours,
                                       nearest, under_lamps)
from masks import Colorbook

SMALL = {"device": "cpu", "model.hidden_dim": 4, "model.emb_dim": 8, "diffusion.T": 50, "diffusion.beta_end": 0.5,
         "data.size": [16, 16], "train.steps": 2, "train.batch_size": 4, "train.val_pairs": 4, "train.previews": 2,
         "sample.precision": "fp32"}
WHITE = 255 * 3**0.5  # the distance of white to black in RGB


def flat(*colours):
    """An image (32, 32, 3) of one colour each."""
    return np.stack([np.full((32, 32, 3), colour, np.uint8) for colour in colours])


def by_space(images):
    """The names of the labels in RGB, and in LAB."""
    rgb, lab = mean_colours(images)
    return [NAMES[k] for k in nearest(rgb, RGB)], [NAMES[k] for k in nearest(lab, LAB)]


def test_each_colour_has_its_own_label():
    """The eight colours are their own labels in both spaces; LAB of red and white are those of the standard."""
    assert by_space(flat(*RGB)) == (NAMES, NAMES)
    assert LAB[NAMES.index("red")] == pytest.approx([53.24, 80.09, 67.20], abs=0.02)
    assert LAB[NAMES.index("white")] == pytest.approx([100, 0, 0], abs=0.02)


def test_rgb_calls_grey_purple():
    """The seed's finding: middle greys, whose nearest colour in RGB is purple; in LAB they are white or black."""
    assert by_space(flat([128] * 3, [100] * 3, [150] * 3)) == (["purple"] * 3, ["white", "black", "white"])


def test_the_mean_in_lab_is_that_of_its_pixels():
    """Half black and half white is L = 50, where the LAB of the mean grey would be 53.6."""
    image = flat([0, 0, 0])
    image[0, 16:] = 255
    rgb, lab = mean_colours(image)
    assert rgb[0] == pytest.approx([127.5] * 3) and lab[0] == pytest.approx([50, 0, 0], abs=0.02)


def test_distances_to_the_label():
    """A flat image of its colour is at 0. Half white, half black: its pixels at half of white, and so is its mean."""
    images = np.concatenate([flat(*RGB), flat([0, 0, 0])])
    images[8, 16:] = 255
    found = label_distances(images, np.array([*range(8), NAMES.index("black")]))
    assert list(found) == ["pixels, RGB", "mean, RGB", "pixels, LAB", "mean, LAB"]
    for name, values in found.items():
        assert values[:8] == pytest.approx([0] * 8, abs=1e-9)
        assert values[8] == pytest.approx(WHITE / 2 if "RGB" in name else 50, abs=0.02)
    wrong = label_distances(images[8:], np.array([NAMES.index("white")]))
    grey = flat([127, 127, 127])  # the same mean in RGB, other pixels
    assert wrong["mean, RGB"] == pytest.approx([WHITE / 2]) and wrong["pixels, RGB"] == pytest.approx([WHITE / 2])
    assert label_distances(grey, np.array([6]))["pixels, LAB"][0] == pytest.approx(53.2, abs=0.1)


def test_lamps_light_a_street():
    """A lamp multiplies all pixels by one colour: black stays black, twice as light stays so; a seed gives one set."""
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[0, 8:16], image[0, 16:] = 4, 8
    lit, number = under_lamps(image, 3, lamps=300)
    again, _ = under_lamps(image, 3, lamps=300)
    assert np.array_equal(lit, again) and lit.shape == (300, 32, 32, 3) and (number == 0).all()
    bright = lit[:, 20, 0].astype(int)
    open_range = bright.max(axis=1) < 255  # not clipped
    assert lit[:, :8].max() == 0 and np.abs(2 * lit[open_range, 10, 0].astype(int) - bright[open_range]).max() <= 1
    assert bright.max(axis=1).min() < 20 and 0.2 < open_range.mean() < 0.6
    hues = {tuple(colour > 0.6 * colour.max()) for colour in bright[bright.max(axis=1) > 50]}
    assert {(True, True, True), (True, False, False), (False, True, False), (False, False, True)} <= hues
    _, number = under_lamps(np.concatenate([image, image]), 3, lamps=4)
    assert number.tolist() == [0] * 4 + [1] * 4


def test_wrong_labels_are_counted():
    """Greys under purple are the mistake of RGB, a light blue under purple that of LAB, and both are counted."""
    images = flat([128, 128, 128], [255, 255, 255], [130, 130, 130], [128, 150, 128], [0, 0, 255])
    (rgb, lab), kinds = count_mislabelled(images, "flat")
    assert (rgb["images"], lab["images"], rgb["n"]) == ("flat, by RGB", "flat, by LAB", 5)
    assert rgb["a colour for grey"] == "60.0%" and lab["a colour for grey"] == "0.0%"  # the green one is nearly grey
    assert rgb["purple"] == "60.0%" and lab["white"] == "80.0%" and rgb["blue"] == lab["blue"] == "20.0%"
    assert [(NAMES[a], NAMES[b], len(found)) for a, b, found in kinds] == [("purple", "white", 3)]
    assert np.array_equal(kinds[0][2], images[[0, 2, 3]])
    assert count_mislabelled(flat(*RGB), "pure")[1] == []
    (rgb, lab), _ = count_mislabelled(flat([110, 140, 110], [90, 120, 230]), "hues")
    assert rgb["another hue is nearer"] == "50.0%"  # a grey green, as purple
    assert lab["another hue is nearer"] == "50.0%"  # a light blue, as purple
    assert rgb["black or white for a colour"] == lab["black or white for a colour"] == "0.0%"
    (rgb, lab), _ = count_mislabelled(flat([100, 255, 255], [0, 90, 200], [10, 20, 30], [60, 60, 120]), "vivid")
    assert rgb["black or white for a colour"] == "25.0%"  # cyan, which none of the six is near


@pytest.mark.parametrize("space", ["rgb", "lab"])
def test_streets_are_labelled_evenly(space):
    """As many of each label; each street keeps its own mask, and has the label of its space."""
    images = np.stack([np.kron(flat_scene(i)[0], np.ones((2, 2, 1), np.uint8)) for i in range(30)])
    ids = np.arange(30, dtype=np.uint8)[:, None, None].repeat(32, 1).repeat(32, 2)
    streets = label_streets(images, ids, space, 0)
    counts = torch.bincount(streets.labels, minlength=8)
    assert counts.min() == counts.max() >= 10 and streets.planes.shape[1:] == (5, 32, 32)
    shown = streets.planes[:, :3].permute(0, 2, 3, 1).numpy()
    assert [NAMES[k] for k in streets.labels] == by_space(shown)[space == "lab"]
    unclipped = [i for i, street in enumerate(shown) if street.max() < 255]
    assert len(unclipped) > 20
    for i in unclipped:  # a lamp's colour times its own street
        street, plain = shown[i], images[streets.planes[i, 3, 0, 0]].astype(float)
        light = street.max(axis=(0, 1)) / plain.max(axis=(0, 1))
        assert np.abs(street - plain * light).max() <= 3
    with pytest.raises(ValueError, match="expected 10 or more. Take more streets"):
        label_streets(images[:1], ids[:1], space, 0)


def test_the_study(tmp_path, monkeypatch, capsys):
    """Wrong labels are counted and drawn; training images have their labels; a run keeps to its data."""
    root = tmp_path / "prepared"
    write_dataset(root, Colorbook(CLASSES), {split: [(f"flat_{i}", lambda i=i: flat_scene(i)) for i in seeds]
                                             for split, seeds in (("train", range(80)), ("val", range(100, 130)))})

    def call(*options):
        settings = [f"--set={key}={value}" for key, value in (SMALL | {"data.root": root}).items()]
        arguments = ["--run", tmp_path / "run", "--n", 3, *options, *settings]
        monkeypatch.setattr(sys, "argv", ["colour_labels", *map(str, arguments)])
        colour_labels.main()
        return json.loads((tmp_path / "run" / "results.json").read_text())["rows"]

    rows = call("--guidance", "1")
    assert list(rows) == ["training images", "w = 1"]
    assert rows["training images"]["labelled as asked"] == "1 [0.862, 1]" and rows["w = 1"]["n"] == 24
    assert float(rows["training images"]["mean, LAB"].split()[0]) < float(rows["w = 1"]["mean, LAB"].split()[0])
    own = np.load(tmp_path / "run" / "samples_training_images.npy")
    assert by_space(own)[1] == NAMES * 3
    printed = capsys.readouterr().out
    assert (tmp_path / "run" / "report.md").read_text(encoding="utf-8") in printed
    assert "| as they are, by RGB | 80 |" in printed and "streets for the generator" in printed
    assert Image.open(tmp_path / "run" / "colours.png").size == (16 * 68 + 4, 2 * 68 + 4)
    assert Image.open(tmp_path / "run" / "mislabelled.png").size[0] == 12 * 100 + 4
    assert "Of held-out streets the reader misplaces" in printed
    with monkeypatch.context() as patch:
        patch.setattr(colour_labels, "train_generator", None)  # the refusal comes before any training
        with pytest.raises(SystemExit, match="results.json: made with another minutes .*choose another --run"):
            call("--guidance", "1", "--minutes", "3")
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(SystemExit, match=r"generator.pt: begun with another data \(was .*: choose another folder"):
        call("--guidance", "1", "--space", "rgb")
