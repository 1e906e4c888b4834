"""experiments/lesson.py through its command line: which files it draws, and what is in them, for any checkpoint."""

import re
import sys

import numpy as np
import pytest
import torch
from conftest import CLASSES, flat_scene
from PIL import Image, ImageDraw

from checkpoint import build, save_checkpoint
from config import load_config
from experiments.lesson import main
from masks import Colorbook, save_mask

NAMES = ["schedules", "network", "forward", "reverse", "guidance", "samplers"]
SQUARE = {"data__size": [32, 32]}


@pytest.fixture
def draw(tmp_path, monkeypatch, capsys):
    """draw("--image", FILE, key=value, ...) runs the lesson on an untrained checkpoint of those settings.

    It returns the folder and what was printed.
    """

    def call(*options, **settings):
        values = {"data.size": [16, 24], "model.hidden_dim": 8, "model.emb_dim": 16, "diffusion.T": 12, "device": "cpu"}
        values |= {key.replace("__", "."): value for key, value in settings.items()}
        cfg = load_config("config.yaml", "toy", [f"{key}={value}" for key, value in values.items()])
        torch.manual_seed(0)
        weights = build(cfg, len(CLASSES), torch.device("cpu"))[0].state_dict()
        save_checkpoint(tmp_path / "checkpoint.pt", {"model": weights, "ema": weights, "config": cfg, "step": 0,
                                                     "colorbook": CLASSES})
        save_mask(flat_scene(1, 32)[1], tmp_path / "mask.png", Colorbook(CLASSES))
        given = "--checkpoint", tmp_path / "checkpoint.pt", "--mask", tmp_path / "mask.png", "--out", tmp_path / "out"
        monkeypatch.setattr(sys, "argv", ["lesson.py", *map(str, (*given, *options))])
        main()
        return tmp_path / "out", capsys.readouterr().out

    return call


def cells(path, rows, columns):
    """The 32x32 images of a drawn grid, (rows, columns, 32, 32, 3), which are shown 4 times as large."""
    drawn = np.asarray(Image.open(path).convert("RGB"))
    drawn = drawn[-132 * rows :, -132 * columns :].reshape(rows, 132, columns, 132, 3).transpose(0, 2, 1, 3, 4)
    return drawn[:, :, 0:128:4, 0:128:4]


@pytest.mark.parametrize("settings", [
    {"diffusion__prediction": "eps", "model__attention": True}, {"diffusion__prediction": "v", "diffusion__T": 2},
    {"diffusion__schedule": "nichol", "diffusion__T": 40, "sample__precision": "bf16", "data__size": [24, 16]},
], ids=str)
def test_every_kind_of_checkpoint_is_drawn(draw, settings):
    """Either prediction, any size, schedule, precision and T, with attention or without: all six images are written."""
    out, printed = draw(**settings)
    assert sorted(path.name for path in out.iterdir()) == sorted(f"lesson_{name}.png" for name in NAMES)
    assert "seeds 1, 2, 3" in printed and all(f"lesson_{name}.png" in printed for name in NAMES)


def test_no_mask_no_guidance(draw):
    """A network without a mask stem: the image of guidance is left out, and that is said."""
    out, printed = draw(model__conditional=False)
    assert {path.stem for path in out.iterdir()} == {f"lesson_{name}" for name in NAMES if name != "guidance"}
    assert "trained without masks" in printed
    assert "DDIM, 10 steps, 10 passes" in printed  # one a step: nothing to guide


def test_passes_and_distances(draw):
    """Guidance takes two passes a step; DDIM of all steps is at no distance from itself, and few steps are at some."""
    _, printed = draw(sample__guidance=2)
    found = {(name, int(steps)): (int(passes), float(distance)) for name, steps, passes, distance in re.findall(
        r"^(\S+), (\d+) steps, (\d+) passes, off by (\S+)$", printed, re.M)}
    assert {key: passes for key, (passes, _) in found.items()} == {
        ("DPM-Solver++", 5): 10, ("DPM-Solver++", 10): 20, ("DPM-Solver++", 12): 24, ("DDIM", 10): 20,
        ("DDIM", 12): 24, ("DDPM", 12): 24}
    assert found["DDIM", 12][1] == 0 < found["DPM-Solver++", 5][1]


def test_the_forward_process_goes_from_the_image_to_noise(draw, tmp_path):
    """The image that --image names stands at t = 0; at the last t there is noise that does not resemble it."""
    image = flat_scene(3, 32)[0]
    Image.fromarray(image).save(tmp_path / "photo.png")
    out, printed = draw("--image", tmp_path / "photo.png", **SQUARE, diffusion__T=60, diffusion__beta_end=0.5)
    first, *_, last = cells(out / "lesson_forward.png", 1, 7)[0].astype(int)
    assert np.abs(first - image).mean() < 3
    assert abs(np.corrcoef(last.ravel(), image.ravel())[0, 1]) < 0.1 and last.std() > 80
    assert "of the scene" not in printed


def test_the_reverse_process_ends_in_the_image_of_the_samplers(draw):
    """The last predicted x_0 is the image that DPM-Solver++ returns for that seed: the same pixels in both drawings."""
    out, _ = draw(**SQUARE, diffusion__T=20)
    reverse = cells(out / "lesson_reverse.png", 3, 7)
    twenty_steps = cells(out / "lesson_samplers.png", 3, 6)[0, 2]
    assert np.abs(reverse[2, 6].astype(int) - twenty_steps).max() <= 1  # batches of one and of three may round apart
    assert np.abs(reverse[2, 1].astype(int) - twenty_steps).max() > 1


def test_guidance_columns(draw):
    """The mask stands first, in the colours of its classes, and each weight changes the image."""
    out, _ = draw(**SQUARE)
    mask, *images = cells(out / "lesson_guidance.png", 3, 5)[1]
    assert {tuple(rgb) for rgb in mask.reshape(-1, 3).tolist()} <= set(map(tuple, CLASSES.values()))
    assert all((a != b).any() for a, b in zip(images, images[1:]))


def test_the_diagram_tells_the_shapes(draw, monkeypatch):
    """The texts of the diagram of a 16x24 network of width 8 have the shapes that are worked out by hand."""
    texts = []
    write = ImageDraw.ImageDraw.multiline_text

    def multiline_text(self, xy, text, *args, **options):
        texts.append(text)
        write(self, xy, text, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", multiline_text)
    draw(model__attention=True)
    shown = {text.split("\n")[0]: text.split("\n")[-1] for text in texts if "\n" in text}
    expected = {"mask": "4 x 16 x 24", "mask_stem": "8 x 16 x 24", "x_t": "3 x 16 x 24", "image_stem": "8 x 16 x 24",
                "x1": "8 x 16 x 24", "down1": "16 x 8 x 12", "down2": "32 x 4 x 6", "down3": "32 x 2 x 3",
                "bottleneck": "32 x 2 x 3", "up1": "16 x 4 x 6", "up2": "8 x 8 x 12", "up3": "8 x 16 x 24",
                "out": "3 x 16 x 24", "time_embedding": "16"}
    assert {name: shown[name] for name in expected} == expected
    assert sum("attention" in text for text in texts) == 2


def test_a_mask_of_other_classes_is_refused(draw):
    """The mask of the toy scenes does not fit four other classes: the message says what is wrong and what to do."""
    with pytest.raises(SystemExit, match="in no class of the colorbook.*masks.py --colorbook"):
        draw("--mask", "data/hand_drawn.png")
