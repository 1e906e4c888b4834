"""Colours of a street: palettes and their planes by hand, a network that learns to follow them, the program."""

import argparse
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import CLASSES
from PIL import Image

from checkpoint import build, save_checkpoint
from config import load_config
from data.common import write_dataset
from ddpm import Diffusion
from experiments import colour
from experiments.colour import class_means, condition_planes, drop_colours, lab_distances, parse_colour, set_colours
from experiments.segmenter import main as train_judge
from masks import Colorbook, one_hot, save_mask

BOOK = Colorbook(CLASSES)  # road, sky, car, person
SMALL = {"device": "cpu", "data.size": [8, 8], "model.hidden_dim": 8, "model.emb_dim": 8, "diffusion.T": 50,
         "diffusion.schedule": "nichol", "train.steps": 200, "train.batch_size": 16, "train.lr": 0.005,
         "train.warmup": 10, "train.val_every": 200, "train.preview_every": 200, "train.val_pairs": 4,
         "train.previews": 2, "train.precision": "fp32", "sample.precision": "fp32"}


def painted_scene(seed):
    """Sky above road, and a car, each in a colour of its own drawn at random: nothing but a palette can tell it."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((8, 8), np.uint8)
    ids[: rng.integers(3, 6)] = 1
    ids[5:, 2:5] = 2
    return rng.integers(20, 236, (4, 3)).astype(np.uint8)[ids], ids


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("painted") / "prepared"
    splits = {"train": range(400), "val": range(500, 506), "test": range(600, 606)}
    write_dataset(root, BOOK, {split: [(f"scene_{i}", lambda i=i: painted_scene(i)) for i in seeds]
                               for split, seeds in splits.items()})
    return root


def command(*options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["colour", *map(str, options)])
        colour.main()


@pytest.fixture(scope="module")
def study(root):
    """study(out, "--masks", 3, **{"train.steps": 3}) runs the study with small settings; the rows of its table."""

    def call(out, *options, **settings):
        chosen = SMALL | {"data.root": root} | settings
        command("--preset", "toy", "--out", out, *(f"--set={key}={value}" for key, value in chosen.items()), *options)
        rows = json.loads((out / "results.json").read_text())
        return {name: row["columns"] for name, row in rows.items()}

    return call


@pytest.fixture(scope="module")
def trained(study, tmp_path_factory):
    """The folder of a network of 200 steps, and the table of its study."""
    out = tmp_path_factory.mktemp("trained")
    return out, study(out, "--colour", "sky=200,120,60", "--guidance", "1", "--masks", 6, "--steps", 8)


def test_a_palette_is_the_mean_of_each_class():
    """Means are those of numpy over the pixels of a class; absent classes have none, and unlabelled counts nowhere."""
    rng = np.random.default_rng(0)
    image, ids = rng.random((2, 3, 6, 5)), rng.integers(0, 3, (2, 6, 5)).astype(np.uint8)
    ids[0, 0] = 255
    colours, given = class_means(torch.tensor(image), one_hot(torch.tensor(ids), 4).double())
    for b in range(2):
        for k in range(3):
            torch.testing.assert_close(colours[b, k], torch.tensor(image[b][:, ids[b] == k].mean(axis=1)))
    assert given.tolist() == [[True, True, True, False]] * 2


def test_black_differs_from_nothing():
    """Planes hold 0.5 for black, 1.5 for white, and 0 where no colour is given or the pixel is unlabelled."""
    mask = one_hot(torch.tensor([[[0, 1], [2, 255]]], dtype=torch.uint8), 4)
    colours, given = torch.full((1, 4, 3), -1.0), torch.tensor([[True, True, False, True]])
    colours[0, 1] = torch.tensor([1.0, 0.0, -1.0])
    planes = condition_planes(mask, colours, given)
    assert torch.equal(planes[:, :4], mask)
    assert planes[0, 4:].permute(1, 2, 0).tolist() == [[[0.5] * 3, [1.5, 1.0, 0.5]], [[0.0] * 3, [0.0] * 3]]


def test_colours_are_dropped_by_class_and_by_image():
    """A quarter of the images lose all colours, a quarter none, the rest some; none are added."""
    torch.manual_seed(0)
    given = torch.ones(4000, 40, dtype=torch.bool)
    given[:, ::2] = False
    kept = drop_colours(given)
    share = kept[:, 1::2].float().mean(dim=1)
    assert not kept[:, ::2].any()
    assert (share == 0).float().mean().item() == pytest.approx(0.25 + 0.5 / 21, abs=0.03)
    assert (share == 1).float().mean().item() == pytest.approx(0.25 + 0.5 / 21, abs=0.03)
    between = share[(share > 0) & (share < 1)]
    assert between.mean().item() == pytest.approx(0.5, abs=0.03) and between.std().item() > 0.2


def test_training_drops_colours_alone_and_with_the_mask(study, tmp_path, monkeypatch):
    """What the network is trained on: masks with and without colours, and a tenth without either."""
    seen = []

    def loss(self, model, x0, mask, t, eps, keep, original=Diffusion.loss):
        seen.append((mask[:, :4].any(dim=(1, 2, 3)), mask[:, 4:].any(dim=(1, 2, 3)), keep))
        return original(self, model, x0, mask, t, eps, keep)

    monkeypatch.setattr(Diffusion, "loss", loss)
    study(tmp_path, "--masks", 1, "--steps", 1, **{"train.steps": 10, "train.batch_size": 100, "model.hidden_dim": 2})
    has_mask, has_colour, keep = (torch.cat(parts).float().mean().item() for parts in zip(*seen))
    assert has_mask == 1 and keep == pytest.approx(0.9, abs=0.04)
    # a quarter has none, and of the half whose share s is drawn evenly the mean of (1 - s)^3, for three classes
    assert has_colour == pytest.approx(1 - 0.25 - 0.5 / 4, abs=0.05)


def test_distances_in_lab():
    """Black to white is 100, CIE-LAB of sRGB red is (53.2, 80.1, 67.2); small classes and those not asked are left out.
    """
    ids = np.zeros((1, 20, 20), np.uint8)
    ids[0, 10:], ids[0, 0, 0] = 1, 2
    images = np.zeros((1, 20, 20, 3), np.uint8)
    images[0, 10:] = 255, 0, 0
    mask, colours = one_hot(torch.from_numpy(ids), 4), torch.ones(1, 4, 3)

    def distance(*asked):
        return lab_distances(images, mask, colours, torch.tensor([[k in asked for k in range(4)]])).item()

    assert distance(0) == pytest.approx(100, abs=0.1)
    to_red = np.linalg.norm(np.array([100, 0, 0]) - [53.24, 80.09, 67.20])
    assert distance(1) == pytest.approx(to_red, abs=0.1)
    assert distance(0, 1, 2) == pytest.approx((100 + to_red) / 2, abs=0.1)
    assert np.isnan(distance(2)) and np.isnan(distance(3))


@pytest.mark.parametrize("text", ["car", "car=1,2", "=1,2,3", "car=1,2,256", "car=a,b,c", "car=1.5,2,3", "car=-1,2,3"])
def test_wrong_colours_are_refused(text):
    """A colour that is not three whole numbers of 0..255 is refused with what was expected."""
    with pytest.raises(argparse.ArgumentTypeError, match="expected CLASS=R,G,B"):
        parse_colour(text)


def test_colours_by_name():
    """A named colour goes over what the palette had; a name that is in no class is refused with the nearest one."""
    colours, given = torch.zeros(4, 3), torch.tensor([True, False, False, False])
    set_colours([parse_colour("car=255,0,51"), ("road", [0, 0, 0])], BOOK, colours, given)
    torch.testing.assert_close(colours, torch.tensor([[-1.0] * 3, [0.0] * 3, [1, -1, -0.6], [0.0] * 3]))
    assert given.tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match="'person', and there are road, sky"):
        set_colours([("persons", [0, 0, 0])], BOOK, colours, given)


def test_a_network_learns_to_follow_colours(trained):
    """After 200 small steps classes are nearer to a colour that is asked for than to one that is not."""
    rows = {name: {column: value.split()[0] for column, value in row.items() if isinstance(value, str)}
            for name, row in trained[1].items()}
    for name in ("own", "another image", "single"):
        row = rows[f"{name}, w = 1"]
        assert float(row["distance"]) < 0.8 * float(row["without colours"]), (name, row)
    assert float(rows["own, w = 1"]["real image"]) < 0.5 < 10 < float(rows["another image, w = 1"]["real image"])
    assert rows["none, w = 1"]["distance"] == "-"


def test_the_study(study, trained, root, tmp_path, monkeypatch, capsys):
    """A row for each guidance and source, a plain network among them, judged; nothing is made twice, more guidances can
    be added, and other settings are refused.
    """
    judge, out = tmp_path / "judge" / "checkpoint.pt", tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["segmenter", "--root", str(root), "--arch", "lraspp_mobilenet_v3_large",
                                      "--steps", "1", "--batch-size", "2", "--out", str(judge.parent)])
    train_judge()
    cfg = load_config(None, "toy", [f"{key}={value}" for key, value in (SMALL | {"data.root": root}).items()])
    torch.manual_seed(0)
    weights = build(cfg, 4, torch.device("cpu"))[0].state_dict()
    save_checkpoint(tmp_path / "plain.pt", {"ema": weights, "step": 0, "config": cfg, "colorbook": CLASSES})
    out.mkdir()
    shutil.copy(trained[0] / "colour.pt", out)
    options = ["--colour", "car=255,0,0", "--masks", 3, "--steps", 2, "--judge", judge,
               "--plain", tmp_path / "plain.pt"]
    study(out, *options, "--guidance", "1")
    rows = study(out, *options, "--guidance", "1,2")
    names = ("none", "own", "another image", "single", "plain")
    assert list(rows) == [f"{name}, w = {w}" for w in (1, 2) for name in names]
    assert all(0 <= float(row["pixel accuracy"].split()[0]) <= 1 for row in rows.values())
    files = {path: path.stat().st_mtime_ns for path in out.glob("images/*/*.png")}
    assert {path.name for path in files if path.parent.name == "own"} == {
        f"scene_{stem}_w{w}_seed{i}.png" for i, stem in ((1, 600), (2, 602), (3, 605)) for w in (1, 2)}
    assert len(files) == 2 * 5 * 3 and Image.open(out / "sheet.png").size[0] > 3 * 128
    assert study(out, *options, "--guidance", "1,2") == rows
    assert {path: path.stat().st_mtime_ns for path in files} == files
    printed = capsys.readouterr().out
    assert "| another image | 2 |" in printed
    assert "200 steps, " in printed and "plain.pt: 0 steps, " in printed and "does not compare" in printed
    settings = json.loads(Image.open(next(path for path in files if path.parent.name == "own")).text["settings"])
    assert settings["trained_steps"] == 200 and settings["colours"] == "own"
    for changed, words in ((["--seed", 9], "seed was 1, is 9"), (["--masks", 2], "masks was 3, is 2"),
                           (["--colour", "car=0,0,9"], "'single, w = 1' was made with other .* colours_crc32 was")):
        with pytest.raises(SystemExit, match=words):
            study(out, *options, *changed, "--guidance", "1")
    with pytest.raises(SystemExit, match="name a network with --checkpoint"):
        study(out, *options, "--like", "evening.png", "--like-mask", "evening_mask.png")
    weights = {"ema": weights, "step": 0, "config": cfg, "colorbook": dict(reversed(CLASSES.items()))}
    save_checkpoint(tmp_path / "plain.pt", weights)
    with pytest.raises(SystemExit, match="other classes or another size"):
        study(out, *options)


def test_the_difference_is_that_of_each_mask():
    """The column "closer by" has the mean difference of two distances, and the interval of that difference."""
    ids = np.zeros((3, 4, 4), np.uint8)
    mask, asked = one_hot(torch.from_numpy(ids), 4), torch.tensor([[True, False, False, False]] * 3)
    colours = torch.full((3, 4, 3), -1.0)  # black, so that distances are the lightness of greys
    grey = np.array([40, 120, 200], np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    columns = colour.distance_columns(grey, grey + 9, grey, mask, colours, asked)
    numbers = {name: [float(x) for x in text.replace("[", "").replace("]", "").replace(",", "").split()]
               for name, text in columns.items() if name != "masks"}
    assert columns["masks"] == 3 and columns["distance"] == columns["real image"]
    assert numbers["closer by"][0] == pytest.approx(numbers["without colours"][0] - numbers["distance"][0], abs=0.2)
    assert 3 < numbers["closer by"][1] <= numbers["closer by"][2] < 5  # the masks' own distances differ by 60


def test_images_of_colours(trained, root, tmp_path, capsys):
    """Images of a mask take the colours of another image, those of the command line before them, and carry them."""
    image, ids = painted_scene(601)
    Image.fromarray(image).save(tmp_path / "evening.png")
    save_mask(ids, tmp_path / "evening_mask.png", BOOK)
    drawing = ["--checkpoint", trained[0] / "colour.pt", "--mask", root / "test" / "masks" / "scene_600.png", "--n", 2,
               "--steps", 8, "--guidance", 1]
    like = ["--like", tmp_path / "evening.png", "--like-mask", tmp_path / "evening_mask.png", "--colour", "car=1,2,3"]
    command(*drawing, "--out", tmp_path / "none")
    command(*drawing, *like, "--out", tmp_path / "like")
    none, made = (Image.open(tmp_path / folder / "scene_600_w1_seed2.png") for folder in ("none", "like"))
    asked = {"road": image[ids == 0][0].tolist(), "sky": image[ids == 1][0].tolist(), "car": [1, 2, 3]}
    assert json.loads(made.text["settings"])["colours"] == asked and json.loads(none.text["settings"])["colours"] == {}
    new_ids = painted_scene(600)[1]
    for k, rgb in enumerate(asked.values()):
        errors = [np.abs(np.array(x)[new_ids == k].mean(axis=0) - rgb).mean() for x in (made, none)]
        assert errors[0] < errors[1], (k, errors)
    assert "car: asked for [1, 2, 3]" in capsys.readouterr().out
    command(*drawing, *like, "--out", tmp_path / "like")
    assert "2 images, 0 of them new" in capsys.readouterr().out
    for options, words in ((["--colour", "cars=1,2,3"], "the nearest is 'car'"),
                           (["--like", tmp_path / "evening.png"], "--like and --like-mask go together")):
        with pytest.raises(SystemExit, match=words):
            command(*drawing, *options)
    with pytest.raises(SystemExit, match="--checkpoint and --mask go together"):
        command("--checkpoint", trained[0] / "colour.pt")
