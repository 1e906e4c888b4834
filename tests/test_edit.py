"""Editing real images: what is kept, what is redrawn, how near it is to the right distribution, and what is refused."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import CLASSES, LOOKS, flat_scene
from PIL import Image

import sample as sample_module
from dataset import prepare_edit, put_back
from ddpm import Diffusion, keep_pixels, noise_like_seeds, predict_eps, predict_x0, sample
from experiments import seams
from masks import Colorbook, save_mask

ABAR = Diffusion().alpha_bar
WAYS = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("dpm_solver", 0.0), ("plms", 0.0)]  # samplers, and eta of ddim
ROAD, SKY, CAR, PERSON = range(4)


def noise_of(shape, seed=1):
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=g, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- keep_pixels


@pytest.mark.parametrize("schedule", ["thesis", "nichol"])
@pytest.mark.parametrize("sampler, eta", WAYS)
def test_kept_pixels_come_out(sampler, eta, schedule):
    """Whatever the network predicts, every sampler ends with the real image where it is kept, and elsewhere not."""
    abar = Diffusion(100, schedule, beta_end=0.2).alpha_bar
    image = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    keep = torch.ones(2, 1, 16, 24, dtype=torch.bool)
    keep[:, :, 4:9, 3:20] = False
    eps_fn = keep_pixels(lambda x, t: torch.sin(3 * x + t), image, keep, abar)
    for steps in (1, 7):
        x = sample(eps_fn, noise_like_seeds([1, 2], (3, 16, 24)), abar, sampler, steps, eta)
        keep3 = keep.expand_as(x)
        torch.testing.assert_close(x[keep3], image[keep3], atol=1e-3, rtol=0)  # rounding, where alpha_bar is tiny
        assert (x[~keep3] - image[~keep3]).abs().mean() > 0.1


def test_a_network_that_is_right_is_not_changed():
    """Where the network knows the image, what it predicts for the other pixels stays as it is."""
    image, x = torch.rand(1, 3, 16, 16).double() * 2 - 1, noise_of((1, 3, 16, 16))()
    keep = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    keep[..., :8] = True
    for t in (0, 500, 999):
        eps = predict_eps(x, image, ABAR[t].item())
        torch.testing.assert_close(keep_pixels(lambda x, t, eps=eps: eps, image, keep, ABAR)(x, t), eps)


def test_an_error_is_carried_over_the_border():
    """A network whose image is too dark by 0.4 is corrected by as much beside the border, and by less far from it."""
    image = torch.zeros(1, 3, 64, 64)
    keep = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    keep[..., 16:48, 16:48] = False
    x = noise_of((1, 3, 64, 64))().float()
    eps = predict_eps(x, image - 0.4, ABAR[500].item())
    x0 = predict_x0(x, keep_pixels(lambda x, t: eps, image, keep, ABAR)(x, 500), ABAR[500].item())
    row = x0[0, 0, 32, 8:33]  # from the kept side to the middle of the box
    torch.testing.assert_close(row[:8], torch.zeros(8), atol=1e-5, rtol=0)
    assert -0.1 < row[8] < 0 and (row[8:].diff() < 1e-5).all() and row[-1] < -0.3


class Field:
    """Grey images (1, n, n) from two Gaussians, dark and bright, whose neighbours are alike; all of it is known."""

    def __init__(self, n=10, reach=8.0, std=0.25, mean=0.35):
        places = np.stack(np.mgrid[:n, :n], -1).reshape(-1, 2)
        distance = np.linalg.norm(places[:, None] - places, axis=2)
        self.inverses, self.means = {}, torch.tensor([-mean, mean], dtype=torch.float64)
        self.cov = torch.from_numpy(std**2 * (0.98 * np.exp(-distance / reach) + 0.02 * np.eye(n * n)))

    def eps(self, x, t):
        """The noise that a perfect network predicts: -sqrt(1 - alpha_bar) times the gradient of log p_t."""
        abar = ABAR[t].item()
        if t not in self.inverses:
            self.inverses[t] = torch.linalg.inv(abar * self.cov + (1 - abar) * torch.eye(len(self.cov)))
        away = x.flatten(1)[:, None] - math.sqrt(abar) * self.means[:, None]  # (B, 2, n * n)
        pull = away @ self.inverses[t]
        share = (-0.5 * (pull * away).sum(2)).softmax(1)[:, :, None]
        return math.sqrt(1 - abar) * (share * pull).sum(1).view(x.shape)

    def given(self, known, values, k):
        """Mean and variance of the unknown pixels of the k-th Gaussian, given the known ones."""
        cross = self.cov[~known][:, known] @ torch.linalg.inv(self.cov[known][:, known])
        variance = (self.cov[~known][:, ~known] - cross @ self.cov[known][:, ~known]).diag()
        return self.means[k] + cross @ (values - self.means[k]), variance


@pytest.mark.parametrize("sampler, steps, eta, narrowest", [
    ("dpm_solver", 20, 0.0, 0.85), ("plms", 20, 0.0, 0.85), ("ddim", 20, 1.0, 0.65), ("ddim", 50, 1.0, 0.75)])
def test_the_conditional_of_a_known_distribution(sampler, steps, eta, narrowest):
    """Given the left half, the right one has nearly the mean and the spread that it must have.

    The mean is off by less than 0.3 deviations of the field, and by less than 0.6 of what replacement alone is.
    """
    field, B, errors = Field(), 300, {"ours": [], "replaced": []}
    left = torch.arange(10).repeat(10) < 5
    keep = left.view(1, 1, 10, 10)
    draw = torch.linalg.cholesky(field.cov) @ noise_of(100, seed=4)()
    for k in (0, 1):
        image = (field.means[k] + draw).view(1, 1, 10, 10).expand(B, -1, -1, -1)
        mean, variance = field.given(left, image[0].flatten()[left], k)

        def replaced(x, t, image=image):
            x0 = predict_x0(x, field.eps(x, t), ABAR[t].item())
            return predict_eps(x, torch.where(keep, image, x0), ABAR[t].item())

        for name, eps_fn in (("ours", keep_pixels(field.eps, image, keep, ABAR)), ("replaced", replaced)):
            x = sample(eps_fn, noise_of((B, 1, 10, 10)), ABAR, sampler, steps, eta).flatten(1)[:, ~left]
            errors[name].append(((x.mean(0) - mean).square().mean() / field.cov[0, 0]).sqrt().item())
            if name == "ours":
                assert narrowest < (x.var(0).mean() / variance.mean()).sqrt() < 1.1
    assert max(errors["ours"]) < 0.3 and sum(errors["ours"]) < 0.6 * sum(errors["replaced"]), errors


# ------------------------------------------------------------------------------------------------- the window


@pytest.mark.parametrize("shape, box, window", [
    ((16, 24), (4, 8, 5, 9), (0, 16, 0, 24)),        # the network's own size
    ((100, 200), (50, 54, 100, 108), (44, 60, 92, 116)),  # around the middle of the change
    ((100, 200), (0, 4, 196, 200), (0, 16, 176, 200)),    # moved inside at a corner
    ((100, 200), (40, 60, 90, 100), (30, 70, 65, 125)),   # larger: twice the change
    ((12, 200), (4, 8, 5, 9), (0, 12, 0, 24)),       # an image that is smaller than the network's
])
def test_the_window(shape, box, window):
    """The window has the network's size or twice the change's, lies around it and within the image."""
    changed = np.zeros(shape, bool)
    changed[box[0] : box[1], box[2] : box[3]] = True
    edit = prepare_edit(np.zeros((*shape, 3), np.uint8), np.zeros(shape, np.uint8), changed, (16, 24))
    rows, columns = edit["window"]
    assert (rows.start, rows.stop, columns.start, columns.stop) == window
    assert edit["real"].shape == (16, 24, 3) and edit["ids"].shape == (16, 24) and edit["keep"].shape == (1, 16, 24)


@pytest.mark.parametrize("shape, box", [((16, 24), (4, 8, 5, 9)), ((90, 130), (31, 35, 60, 66)),
                                        ((90, 130), (20, 57, 30, 90)), ((12, 20), (5, 7, 5, 9))])
def test_put_back(shape, box):
    """Pixels more than the margin away from the change keep every bit, and those of the change are what was drawn."""
    rng = np.random.default_rng(0)
    image, changed = rng.integers(0, 256, (*shape, 3), np.uint8), np.zeros(shape, bool)
    changed[box[0] : box[1], box[2] : box[3]] = True
    edit = prepare_edit(image, np.zeros(shape, np.uint8), changed, (16, 24))
    result = put_back(edit, np.full((16, 24, 3), 77, np.uint8))
    scale = max((part.stop - part.start) / side for part, side in zip(edit["window"], (16, 24)))
    far = math.ceil(3 * max(scale, 1))  # the margin of 1, and what resizing blurs
    near = np.zeros(shape, bool)
    near[max(0, box[0] - far) : box[1] + far, max(0, box[2] - far) : box[3] + far] = True
    assert (result[~near] == image[~near]).all() and (~near).mean() > 0.1
    assert (result[changed] == 77).mean() > 0.95 and np.abs(result[changed].astype(int) - 77).max() < 80


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def checkpoint(untrained):
    return untrained(sample__steps=3, sample__n=1, sample__guidance=2.0)


@pytest.fixture
def edit(checkpoint, tmp_path, monkeypatch):
    """edit("--image", ...) runs sample.py; returns the folder of the images."""

    def call(*options, out="out"):
        arguments = ["--checkpoint", checkpoint, "--device", "cpu", "--out", tmp_path / out, *options]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        sample_module.main()
        return tmp_path / out

    return call


def write(folder, size=(16, 24), new=CAR, box=(6, 10, 8, 14)):
    """A street in a prepared split, folder/images and folder/masks; its mask with a box of a new class, edited.png."""
    ids = np.resize(flat_scene(1)[1][:, :1], (size[0], 1)).repeat(size[1], axis=1)
    ids[: size[0] // 2], ids[size[0] // 2 :] = SKY, ROAD
    edited = ids.copy()
    edited[box[0] : box[1], box[2] : box[3]] = new
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    noise = np.random.default_rng(0).integers(-9, 10, (*size, 3))
    Image.fromarray((LOOKS[ids] + noise).clip(0, 255).astype(np.uint8)).save(folder / "images" / "street.png")
    save_mask(ids, folder / "masks" / "street.png", Colorbook(CLASSES))
    save_mask(edited, folder / "edited.png", Colorbook(CLASSES))
    return folder / "images" / "street.png", folder / "masks" / "street.png", folder / "edited.png"


def pixels(path):
    return np.array(Image.open(path)).astype(int)


@pytest.mark.parametrize("size, box", [((16, 24), (6, 10, 8, 14)), ((60, 100), (30, 36, 50, 60)),
                                       ((60, 100), (20, 44, 40, 76))])
@pytest.mark.parametrize("named", ["prepared", "image mask", "redraw"])
def test_only_what_changed_is_redrawn(edit, exact, tmp_path, capsys, size, box, named):
    """The new thing stands in its place, and all else has every bit of the real image, in images of any size."""
    image, mask, edited = write(tmp_path / "split", size, box=box)
    options = []
    if named != "prepared":
        image, mask = image.rename(tmp_path / "photo.png"), mask.rename(tmp_path / "photo_mask.png")
        options = ["--image-mask", mask]
    region = np.zeros(size, np.uint8)
    region[box[0] : box[1], box[2] : box[3]] = 255
    if named == "redraw":
        Image.fromarray(region).save(tmp_path / "region.png")
        options = ["--redraw", tmp_path / "region.png"]
    out = edit("--image", image, "--mask", edited, "--guidance", 1, *options)
    result, real = pixels(out / "edited_w1_seed1.png"), pixels(image)
    assert result.shape == real.shape and f"at row {0 if size == (16, 24) else ''}" in capsys.readouterr().out
    inner = np.zeros(size, bool)
    inner[box[0] + 1 : box[1] - 1, box[2] + 1 : box[3] - 1] = True
    assert np.abs(result[inner] - LOOKS[CAR]).max() < 40 and np.abs(result[inner] - real[inner]).mean() > 50
    far = 7  # of the margin in the largest window
    near = np.zeros(size, bool)
    near[max(0, box[0] - far) : box[1] + far, max(0, box[2] - far) : box[3] + far] = True
    assert (result[~near] == real[~near]).all() and (~near).any()


def test_settings_and_sheet(edit, exact, tmp_path):
    """The PNG names the image; the sheet shows the image, the new mask and the results at each guidance."""
    image, _, edited = write(tmp_path / "split", (40, 60))
    out = edit("--image", image, "--mask", edited, "--n", 2, "--guidance", "1,2", "--seed", 5)
    recorded = json.loads(Image.open(out / "edited_w2_seed6.png").text["settings"])
    assert recorded["image"] == str(image) and recorded["seed"] == 6 and recorded["mask_source"] == str(edited)
    sheet = pixels(out / "sheet.png")
    first = sheet[22 : 22 + 160, 4 : 4 + 240]  # 40x60, enlarged four times, below the titles
    assert (first[::4, ::4] == pixels(image)).all() and sheet.shape[1] == 4 * 244 + 4


def test_resume_sees_another_image_and_another_mask(edit, exact, tmp_path, monkeypatch):
    """--resume keeps what was made of the same image, mask and region, and nothing else."""
    image, mask, edited = write(tmp_path / "split")
    edit("--image", image, "--mask", edited)
    runs, real = [], sample_module.sample
    monkeypatch.setattr(sample_module, "sample", lambda *a, **k: runs.append(0) or real(*a, **k))
    edit("--image", image, "--mask", edited, "--resume")
    assert not runs
    Image.fromarray((pixels(image) // 2).astype(np.uint8)).save(image)
    edit("--image", image, "--mask", edited, "--resume")
    assert len(runs) == 1
    save_mask(np.full((16, 24), PERSON, np.uint8) * (np.arange(24) > 12), mask, Colorbook(CLASSES))
    edit("--image", image, "--mask", edited, "--resume")
    assert len(runs) == 2


def test_the_same_seed_whatever_the_batch(edit, tmp_path):
    """An edited image depends on its own seed alone, not on the batch."""
    image, _, edited = write(tmp_path / "split")
    one = edit("--image", image, "--mask", edited, "--n", 3, "--batch-size", 1, out="one")
    three = edit("--image", image, "--mask", edited, "--n", 3, out="three")
    for seed in (1, 2, 3):
        a, b = (pixels(folder / f"edited_w2_seed{seed}.png") for folder in (one, three))
        assert np.abs(a - b).max() <= 1 and (a != pixels(image)).any()


@pytest.mark.parametrize("case, words", [
    ("small mask", ["edited.png is 8x12", "street.png 16x24", "one size"]),
    ("small image mask", ["other.png is 8x12", "street.png 16x24"]),
    ("nothing new", ["street.png", "0%", "of another class"]),
    ("all new", ["100%", "some that are not"]),
    ("black region", ["region.png", "0%", "white"]),
    ("unknown colour", ["edited.png", "(255, 0, 255)", "untrained.pt"]),
    ("nobody tells", ["photo.png", "--image-mask", "--redraw"]),
    ("no image", ["--image"]),
    ("no such image", ["nowhere.png"]),
])
def test_mistakes_are_messages(edit, tmp_path, case, words):
    """A mistake is one line that says what was found and what to do, before anything is written."""
    image, mask, edited = write(tmp_path / "split")
    options, book = ["--image", image, "--mask", edited], Colorbook(CLASSES)
    if case == "small mask":
        save_mask(np.zeros((8, 12), np.uint8), edited, book)
    elif case == "small image mask":
        save_mask(np.zeros((8, 12), np.uint8), tmp_path / "other.png", book)
        options += ["--image-mask", tmp_path / "other.png"]
    elif case == "nothing new":
        options[3] = mask
    elif case == "all new":
        save_mask(np.full((16, 24), PERSON, np.uint8), edited, book)
    elif case == "black region":
        Image.new("L", (24, 16)).save(tmp_path / "region.png")
        options += ["--redraw", tmp_path / "region.png"]
    elif case == "unknown colour":
        Image.new("RGB", (24, 16), (255, 0, 255)).save(edited)
    elif case == "nobody tells":
        options[1] = image.rename(tmp_path / "photo.png")
    elif case == "no image":
        options = ["--mask", edited, "--image-mask", mask]
    elif case == "no such image":
        options[1] = tmp_path / "nowhere.png"
    with pytest.raises(SystemExit) as stopped:
        edit(*options)
    message = str(stopped.value.code)
    assert message.startswith("error: ") and all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------- experiments/seams.py


def test_the_measures_of_a_seam():
    """On a ramp of 0.1 a pixel whose hidden box is too bright by 0.4, distance, seam and inside are known."""
    keep = seams.hide_boxes(2, (18, 24))
    real = (torch.arange(24) / 10 - 1.2).expand(2, 3, 18, 24)
    result = seams.measure((real + 0.4 * ~keep)[None], real, keep)
    h, w = 6, 8
    across = (h * (0.1 + 0.4) + h * (0.4 - 0.1) + 2 * w * 0.4) / (2 * h * 0.1)  # left, right, above and below
    for name, expected in {"distance": 0.4 * 127.5, "of mean": 0.4 * 127.5, "seam": across, "inside": 1.0}.items():
        torch.testing.assert_close(result[name], torch.full((2,), expected), rtol=1e-4, atol=1e-4)


def test_seams_end_to_end(checkpoint, flat_root, tmp_path, monkeypatch, capsys):
    """The command measures every way, prints a row for each and draws the sheet."""
    arguments = ["--checkpoint", checkpoint, "--root", flat_root, "--images", 2, "--samples", 2, "--steps", 2, "--out",
                 tmp_path / "seams", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["seams", *map(str, arguments)])
    seams.main()
    results = json.loads((tmp_path / "seams" / "seams.json").read_text())
    assert len(results) == 6 and all(set(row) == {"distance", "of mean", "seam", "inside"} for row in results.values())
    assert "membrane, eta 1" in capsys.readouterr().out and (tmp_path / "seams" / "sheet.png").exists()
