"""The experiment that measures quality against steps."""

import csv
import sys

import pytest
import torch
from conftest import LOOKS
from PIL import Image

from benchmarks import steps
from train import train


@pytest.fixture
def measure(tiny, tmp_path, monkeypatch):
    """measure("--n", 2, ...) runs it on a checkpoint with T = 24; returns {(sampler, steps): row} and the folder."""
    cfg = tiny(diffusion__T=24, diffusion__beta_end=0.5, train__steps=4)
    train(cfg)

    def call(*options):
        arguments = ["steps", "--checkpoint", f"{cfg['out']}/checkpoint.pt", "--n", 3, "--steps", 2, 24, "--out", tmp_path / "steps", *options]
        monkeypatch.setattr(sys, "argv", [str(a) for a in arguments])
        steps.main()
        with open(tmp_path / "steps" / "steps.csv", newline="") as file:
            return {(row["sampler"], row["steps"]): row for row in csv.DictReader(file)}, tmp_path / "steps"

    return call


def test_distances_and_passes(measure):
    """The table would compare with something else than DDIM's whole walk, or count passes that were not made."""
    rows, out = measure("--guidance", 3)
    assert len(rows) == 3 * 2 + 2 and float(rows["ddim", "24"]["distance"]) == 0
    assert float(rows["other noise", "20"]["distance"]) > float(rows["ddim", "2"]["distance"]) > float(rows["plms", "24"]["distance"]) > 0
    assert [rows["ddim", k]["passes"] for k in ("2", "24")] == ["4.0", "48.0"]  # guidance takes two
    assert Image.open(out / "sheet.png").width > 4 * 128 and Image.open(out / "curve.png").height > 400
    rows, _ = measure("--guidance", 3, "--guidance-interval", 0.5, 2)
    assert 24 < float(rows["ddim", "24"]["passes"]) < 48


def test_the_judge_sees_pictures_and_masks_in_order(measure, monkeypatch):
    """Its numbers would be those of other masks; here a judge that knows the colours finds every class of the real pictures."""
    evaluate = pytest.importorskip("evaluate")

    def by_color(images):
        far = (images.permute(0, 2, 3, 1)[..., None, :].float() - torch.from_numpy(LOOKS).float()).square().sum(-1)
        return far.argmin(-1).byte()

    monkeypatch.setattr(evaluate, "load_segmenter", lambda name, colorbook, device: (by_color, {k: k for k in range(4)}))
    rows, out = measure("--segmenter", "known")
    assert float(rows["real", ""]["mean_iou"]) == float(rows["real", ""]["pixel_accuracy"]) == 1
    assert all(0 <= float(row["mean_iou"]) <= float(row["pixel_accuracy"]) + 0.5 <= 1.5 for row in rows.values())
    assert Image.open(out / "curve.png").width > 900


@pytest.mark.parametrize("options, words", [
    (["--steps", 25], ["25", "1..24"]), (["--samplers", "euler"], ["euler", "plms"]), (["--guidance-interval", 2, 1], ["[2.0, 1.0]"]),
    (["--split", "nowhere"], ["nowhere", "no such folder"])])
def test_mistakes_are_messages(measure, options, words, tmp_path):
    """A mistake would show after the thousand steps of the reference."""
    with pytest.raises(SystemExit) as stopped:
        measure(*options)
    assert str(stopped.value.code).startswith("error: ") and all(word in stopped.value.code for word in words), stopped.value.code
    assert not (tmp_path / "steps").exists()
