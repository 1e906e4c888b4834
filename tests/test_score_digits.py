"""Digits of a class that is asked for: MNIST's files, and that the table holds what was measured."""

import gzip
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import noise_like_seeds
from experiments import score_digits
from experiments.score_digits import Digits, Judge, WideResNet, compare_gradients, read_by, read_digits, read_idx

SMALL = {"device": "cpu", "model.hidden_dim": 4, "model.emb_dim": 8, "train.steps": 2, "train.batch_size": 4,
         "train.val_pairs": 4, "train.previews": 1}


def write_idx(path, array, compress=True):
    data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(data) if compress else data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """120 images whose label is the brightness of their square, in t10k's gzipped files."""
    folder, labels = tmp_path_factory.mktemp("mnist"), (np.arange(120) % 10).astype(np.uint8)
    images = np.zeros((120, 28, 28), np.uint8)
    images[:, 4:24, 4:24] = 25 * labels[:, None, None] + 5
    write_idx(folder / "t10k-images-idx3-ubyte.gz", images)
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", labels)
    return folder


def test_mnist_is_read(folder, tmp_path):
    """Images and labels are those that were written, gzipped or not, of both parts of MNIST."""
    images, labels = read_digits(folder)
    assert images.shape == (120, 28, 28) and images[7, 10, 10] == 180 and labels[7] == 7
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", images[:5], compress=False)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", labels[:5], compress=False)
    assert read_digits(tmp_path)[1].tolist() == [0, 1, 2, 3, 4] * 2
    planes = Digits(images, labels).planes
    assert planes.shape == (120, 2, 32, 32) and planes[7, 0, 12, 12] == 180 and (planes[7, 1] == 7).all()
    assert planes[:, 0, :2].sum() == 0  # the edge


def test_damaged_digits_are_refused(folder, tmp_path):
    """A file that is cut off or something else, and a folder without digits, are refused by name."""
    with pytest.raises(ValueError, match="no digits; expected"):
        read_digits(tmp_path)
    whole = (folder / "t10k-images-idx3-ubyte.gz").read_bytes()
    for name, data in (("cut.gz", whole[:-40]), ("text", b"hello there"), ("zip.gz", b"not gzip"), ("empty", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: not an IDX file"):
            read_idx(tmp_path / name)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((3, 28, 28), np.uint8), compress=False)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(2, np.uint8), compress=False)
    with pytest.raises(ValueError, match="expected N images"):
        read_digits(tmp_path)


def test_networks_have_the_shapes_that_they_say():
    """Guide and judge give ten logits; the features of the judge are 64, and what its last layer reads."""
    judge, digits = Judge().eval(), torch.rand(103, 1, 32, 32)
    assert WideResNet()(torch.rand(3, 2, 32, 32)).shape == judge(digits[:3]).shape == (3, 10)
    read_as, features = read_by(judge, digits)
    assert features.shape == (103, 64)
    torch.testing.assert_close(judge[-1](features.float()), judge(digits))
    assert torch.equal(judge(digits).argmax(1), read_as)


def test_gradients_are_compared_with_the_score(folder):
    """The score of a point is -x / sigma^2; of nearly even logits a x_k, the gradient has the norm a sqrt(0.9)."""
    digits = Digits(*read_digits(folder))
    rows = compare_gradients(lambda x, sigma: -x / sigma**2, lambda x, sigma: 1e-4 * x.flatten(1)[:, :10], digits, 10.0,
                             torch.device("cpu"))
    noise = noise_like_seeds(range(100), (1, 32, 32))()
    for row in rows:
        x = digits.planes[:100, :1] / 255 + row["sigma"] * noise
        assert row["score"] == pytest.approx(x.flatten(1).norm(dim=1).median().item() / row["sigma"] ** 2, rel=1e-3)
        assert row["gradient"] == pytest.approx(1e-4 * 0.9**0.5, rel=1e-2)
    assert [row["t"] for row in rows] == [0.1, 0.3, 0.5, 0.7, 0.9]


def test_the_study(folder, tmp_path, monkeypatch, capsys):
    """A row for each scale, of the same seeds; finished scales stay; other settings are refused."""
    def call(*options):
        settings = [f"--set={key}={value}" for key, value in SMALL.items()]
        arguments = ["--data", folder, "--run", tmp_path / "run", "--n", 2, "--steps", 3, *options, *settings]
        monkeypatch.setattr(sys, "argv", ["score_digits", *map(str, arguments)])
        score_digits.main()
        return json.loads((tmp_path / "run" / "results.json").read_text())["rows"]

    first = call("--scales", "0")
    before = (tmp_path / "run" / "samples_0.npy").stat().st_mtime_ns
    rows = call("--scales", "0,5")
    assert list(rows) == ["0", "5"] and rows["0"] == first["0"]
    assert (tmp_path / "run" / "samples_0.npy").stat().st_mtime_ns == before
    assert all(0 <= row["read as asked"] <= 1 for row in rows.values())
    samples = [np.load(tmp_path / "run" / f"samples_{scale}.npy") for scale in (0, 5)]
    assert samples[0].shape == (20, 32, 32) and not np.array_equal(*samples)
    assert Image.open(tmp_path / "run" / "digits.png").size[0] > 20 * 48
    printed = capsys.readouterr().out
    assert "72 digits for score and guide, 36 for the judge, 12 held out" in printed
    assert "| score / gradient |" in printed
    for option in ("--seed", "--minutes"):
        with pytest.raises(SystemExit, match=f"made with another {option[2:]}: choose another --run"):
            call(option, 9)
