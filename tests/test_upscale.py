"""Four times larger: the condition, crops, tiles, the sampler with an exact network, each command, the study."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import CLASSES, LOOKS, flat_scene
from PIL import Image

from checkpoint import build, save_checkpoint
from config import load_config
from data.common import write_dataset
from ddpm import Diffusion, dpm_solver, noise_like_seeds
from experiments import upscale, upscale_study
from experiments.segmenter import main as train_judge
from masks import Colorbook, save_mask
from unet import UNet

DIFFUSION = Diffusion(prediction="v")
SMALL = ["model.hidden_dim=4", "model.emb_dim=8", "diffusion.T=20", "train.steps=2", "train.warmup=1",
         "train.lr=0.1", "train.val_every=1", "train.preview_every=2", "data.size=[32,64]"]

# --------------------------------------------------------------------------------------------------- the model


def smooth(B, H, W):
    """Planes (B, 4, H, W) uint8 of waves, each image another; its mask is class 1 where red is bright."""
    y, x = torch.meshgrid(torch.arange(H) / 8, torch.arange(W) / 8, indexing="ij")
    waves = torch.stack([torch.stack([torch.sin(x + i), torch.cos(y - i), torch.sin(x + y + i)]) for i in range(B)])
    images = (127.5 + 100 * waves).byte()
    return torch.cat([images, (images[:, :1] > 127).byte()], dim=1)


def test_the_filters_are_those_of_pillow():
    """shrink() and enlarge() are Pillow's bicubic filter, to a grey level."""
    image = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    small = upscale.shrink(torch.from_numpy(image).permute(2, 0, 1)[None])
    expected = Image.fromarray(image).resize((16, 8), Image.Resampling.BICUBIC)
    found = upscale.to_uint8(small)[0]
    assert np.abs(found.astype(int) - np.array(expected)).max() <= 1
    larger = Image.fromarray(found).resize((64, 32), Image.Resampling.BICUBIC)
    assert np.abs(upscale.to_uint8(upscale.enlarge(small))[0].astype(int) - np.array(larger)).max() <= 1


def test_crops_lie_on_their_condition(monkeypatch):
    """A crop, its enlarged small image and its mask show one place, another in each image."""
    monkeypatch.setattr(upscale, "HIGHEST", 1e-6)
    torch.manual_seed(0)
    planes = smooth(6, 48, 64)
    lacking, condition = upscale.cut_crops(planes, 3, (16, 24), 0.0, deviation=0.5)
    crops = condition[:, :3] + 0.5 * lacking
    assert crops.shape == (6, 3, 16, 24) and condition.shape == (6, 7, 16, 24)
    assert (crops - condition[:, :3]).abs().mean() < .03 < .2 < (crops[:-1] - condition[1:, :3]).abs().mean()
    assert (condition[:, 5] == (crops[:, 0] * 127.5 + 127.5 > 127.1)).all() and (condition[:, 4:].sum(dim=1) == 1).all()
    windows = planes[:, :3].float().unfold(2, 16, 1).unfold(3, 24, 1) / 127.5 - 1  # (B, 3, rows, columns, 16, 24)
    same = (windows - crops[:, :, None, None]).abs().amax(dim=(1, 4, 5)) < 1e-5
    places = [same[i].nonzero().tolist() for i in range(6)]
    assert len({str(place) for place in places}) == 6 and all(places)


def test_noise_is_told_and_masks_are_dropped():
    """The small image has noise of the deviation that the plane tells, and a dropped mask is zero everywhere.

    What is diffused has deviation 1 at every level.
    """
    torch.manual_seed(0)
    grey = torch.full((64, 4, 64, 64), 128, dtype=torch.uint8) * torch.tensor([1, 1, 1, 0]).view(4, 1, 1).byte()
    lacking, condition = upscale.cut_crops(grey, 3, (64, 64), 0.5, deviation=0.01)
    gain = upscale.enlarge(torch.randn(64, 3, 16, 16)).std()
    told = (condition[:, 3].mean(dim=(1, 2)) - 1) * upscale.HIGHEST
    assert told.min() < 0.2 * upscale.HIGHEST and told.max() > 0.8 * upscale.HIGHEST
    torch.testing.assert_close(condition[:, :3].std(dim=(1, 2, 3)), told * gain, rtol=.1, atol=2e-3)
    assert gain == pytest.approx(upscale.NOISE_GAIN, abs=.02)
    noisy = told > 0.04  # a flat image lacks nothing but the noise
    torch.testing.assert_close(lacking.std(dim=(1, 2, 3))[noisy], torch.ones(noisy.sum()), rtol=.1, atol=0)
    shares = condition[:, 4:].mean(dim=(1, 2, 3)) * 3
    assert set(shares.tolist()) == {0.0, 1.0} and .2 < shares.mean() < .8


def gaussian_eps(condition):
    """What a perfect network predicts where each pixel is Gaussian, about the first three planes, width the fourth."""

    def eps_fn(x, t):
        abar, mean, variance = DIFFUSION.alpha_bar[t].item(), condition[:, :3], condition[:, 3:4] ** 2
        return (1 - abar) ** .5 * (x - abar**.5 * mean) / (abar * variance + 1 - abar)

    return eps_fn


@pytest.mark.parametrize("shape, tile", [((32, 64), (16, 24)), ((40, 72), (40, 16)), ((16, 24), (64, 64)),
                                         ((72, 8), (16, 8))])
def test_tiles_of_a_known_denoiser(shape, tile):
    """With a denoiser of single pixels tiles change nothing, and no window is larger than a tile."""
    torch.manual_seed(0)
    condition = torch.rand(2, 4, *shape).double()
    sizes = []

    def make(part):
        sizes.append(tuple(part.shape[2:]))
        return gaussian_eps(part)

    x = noise_like_seeds([1, 2], (3, *shape))().double()
    whole = dpm_solver(gaussian_eps(condition), x, DIFFUSION.alpha_bar, 10, clip=False)
    tiled = dpm_solver(upscale.in_tiles(make, condition, tile), x, DIFFUSION.alpha_bar, 10, clip=False)
    torch.testing.assert_close(tiled, whole)
    assert set(sizes) == {tuple(map(min, zip(tile, shape)))} and whole.std() > .1


def test_tiles_leave_no_edges():
    """Where two windows disagree by 1, no two neighbouring pixels differ by more than a seventh."""
    values = iter(range(100))

    def make(part):
        value = next(values)
        return lambda x, t: torch.full_like(x, value)

    row = upscale.in_tiles(make, torch.zeros(1, 4, 32, 96), (32, 32))(torch.zeros(1, 3, 32, 96), 0)[0, 0, 0]
    assert row[0] == 0 and row[-1] == 3 and (row.diff() >= 0).all() and row.diff().max() < 1 / 7


@pytest.fixture
def exact(monkeypatch):
    """A network that knows the large image: the enlarged small one, 0.5 brighter where the mask has class 2."""

    def forward(self, x, t, mask=None, *, features=None, keep=None):
        level = (features[:, 3:4] - 1) * upscale.HIGHEST
        lacking = (features[:, 6:7] * 0.5 - level).expand_as(x) / (0.2**2 + (upscale.NOISE_GAIN * level) ** 2).sqrt()
        a, s = DIFFUSION.coefficients(t)
        return a * (x - a * lacking) / s - s * lacking

    monkeypatch.setattr(UNet, "mask_features", lambda self, mask: mask)
    monkeypatch.setattr(UNet, "forward", forward)


@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_an_exact_network(exact, tile):
    """upscale() gives the image that an exact network knows, of the small image, its mask and the noise level."""
    small = upscale.shrink(smooth(2, 32, 48)[:, :3]) * 0.4
    mask = torch.zeros(2, 3, 32, 48)
    mask[:, 2, 8:20, 10:30] = 1
    model = UNet(7, 4, 8)
    larger = upscale.upscale(model, DIFFUSION, 0.2, small, mask, 0.0, [1, 2], 5, tile)
    torch.testing.assert_close(larger, upscale.enlarge(small) + 0.5 * mask[:, 2:], atol=2e-3, rtol=0)
    noisy = upscale.upscale(model, DIFFUSION, 0.2, small, mask, upscale.HIGHEST / 2, [1, 2], 5, tile)
    noise = noisy - larger + upscale.HIGHEST / 2  # the exact network takes the level that it is told away
    assert .3 < (noise / (upscale.HIGHEST / 2)).std() < 1.2 and noise.mean().abs() < .02
    one = upscale.upscale(model, DIFFUSION, 0.2, small[1:], mask[1:], upscale.HIGHEST / 2, [2], 5, tile)
    torch.testing.assert_close(one, noisy[1:], atol=1e-4, rtol=0)  # an image depends on its own seed alone


# ------------------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory, flat_root):
    """A folder with an upscaler of two steps, an untrained network of 8x16, a judge, and a mask."""
    folder = tmp_path_factory.mktemp("upscale")
    with pytest.MonkeyPatch.context() as patch:
        call(patch, "--root", flat_root, "--run", folder / "run", settings=SMALL)
        words = ["--root", flat_root, "--arch", "lraspp_mobilenet_v3_large", "--steps", 1, "--batch-size", 2,
                 "--detail", "32x64", "--out", folder / "judge"]
        patch.setattr(sys, "argv", ["segmenter", *map(str, words)])
        train_judge()
    for name, classes in {"small": CLASSES, "other": {"sky": [0, 0, 255], "sea": [0, 0, 128]}}.items():
        cfg = load_config(overrides=["data.size=[8,16]", "model.hidden_dim=4", "model.emb_dim=8", "diffusion.T=20",
                                     "sample.steps=2", "sample.precision=fp32"])
        model = build(cfg, len(classes), torch.device("cpu"))[0]
        save_checkpoint(folder / f"{name}.pt", {"ema": model.state_dict(), "step": 0, "config": cfg,
                                                "colorbook": classes})
    (folder / "masks").mkdir()
    save_mask(flat_scene(3, 64)[1][:32], folder / "masks" / "street.png", Colorbook(CLASSES))
    return folder


def call(patch, *options, settings=()):
    """Run the command in this process, with settings of the training."""
    words = ["upscale", "--device", "cpu", *options, *[f"--set={setting}" for setting in settings]]
    patch.setattr(sys, "argv", [str(word) for word in words])
    upscale.main()


def pixels(path):
    return np.array(Image.open(path)).astype(int)


def test_from_a_mask_to_a_large_image(folder, tmp_path, monkeypatch):
    """--mask makes small images and large ones; --images with the same masks the same large ones; none comes twice."""
    options = ["--run", folder / "run", "--small", folder / "small.pt", "--steps", 2]
    call(monkeypatch, *options, "--mask", folder / "masks" / "street.png", "--n", 2, "--out", tmp_path / "out")
    files = sorted((tmp_path / "out").glob("street_w3_seed*.png"))
    assert [pixels(path).shape for path in files] == [(32, 64, 3)] * 2
    small = [pixels(tmp_path / "out" / "small" / path.name) for path in files]
    assert small[0].shape == (8, 16, 3) and (small[0] != small[1]).any()
    sheet = pixels(tmp_path / "out" / "sheet.png")
    assert sheet.shape[1] == 3 * (4 * 64 + 4) + 4  # enlarged to be seen
    shrunk = [pixels(path).reshape(8, 4, 16, 4, 3).mean(axis=(1, 3)) for path in files]
    alike = [[np.corrcoef(a.ravel(), b.ravel())[0, 1] for a in shrunk] for b in small]
    assert alike[0][0] > .5 and alike[1][1] > .5 and alike[0][0] > alike[0][1], alike

    for name, more in {"same": ["--mask", folder / "masks"], "without": [], "tiles": ["--tile", "16x16"]}.items():
        call(monkeypatch, *options, "--images", tmp_path / "out" / "small", "--out", tmp_path / name, *more)
    made = {name: pixels(tmp_path / name / files[0].name) for name in ("same", "without", "tiles")}
    assert (made["same"] == pixels(files[0])).all() and made["tiles"].shape == (32, 64, 3)
    assert (made["without"] != made["same"]).any() and (made["tiles"] != made["without"]).any()
    changed, kept = ((tmp_path / "without" / path.name).stat().st_mtime_ns for path in files)
    Image.new("RGB", (16, 8)).save(tmp_path / "out" / "small" / files[0].name)
    call(monkeypatch, *options, "--images", tmp_path / "out" / "small", "--out", tmp_path / "without")
    assert (tmp_path / "without" / files[0].name).stat().st_mtime_ns != changed
    assert (tmp_path / "without" / files[1].name).stat().st_mtime_ns == kept
    shutil.rmtree(tmp_path / "out" / "small")
    written = files[0].stat().st_mtime_ns
    call(monkeypatch, *options, "--mask", folder / "masks" / "street.png", "--n", 3, "--out", tmp_path / "out")
    assert files[0].stat().st_mtime_ns == written and len(list((tmp_path / "out").glob("street_*.png"))) == 3
    call(monkeypatch, *options, "--level", 0, "--mask", folder / "masks" / "street.png", "--out", tmp_path / "out")
    assert files[0].stat().st_mtime_ns != written


def test_the_study(folder, flat_root, tmp_path, monkeypatch, capsys):
    """A row for each way, its PSNR that of the files; finished rows stay; another setting is refused."""
    monkeypatch.setattr(upscale_study, "LEVELS", (0.0, 0.2))
    out = tmp_path / "study"

    def call_study(*options):
        words = ["upscale_study", "--root", flat_root, "--run", folder / "run", "--out", out, "--device", "cpu",
                 "--judge", folder / "judge" / "checkpoint.pt", "--steps", 2, "--count", 3, *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        upscale_study.main()

    call_study("--small", folder / "small.pt")
    file = out / "results.json"
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == ["real, bicubic", "real, Lanczos", "real, 1 step", "real, 2 steps", "real, 2 steps, no mask",
                          "real, 2 steps, in tiles", "cascade, bicubic", "cascade, noise 0", "cascade, noise 0.2"]
    masks = sorted((out / "masks").glob("*.png"))
    assert len(masks) == 3
    errors = []
    for path in masks:
        real = Image.open(flat_root / "test" / "images" / path.name).resize((64, 32), Image.Resampling.BICUBIC,
                                                                            box=(0, 4, 16, 12))
        small = real.resize((16, 8), Image.Resampling.BICUBIC)
        error = (np.array(small.resize((64, 32), Image.Resampling.BICUBIC)).astype(float) - np.array(real)) ** 2
        errors.append(10 * np.log10(255**2 / error.mean()))
    assert float(rows["real, bicubic"]["PSNR"].split()[0]) == pytest.approx(np.mean(errors), abs=.05)
    assert rows["cascade, noise 0"]["PSNR"] == "" and rows["cascade, noise 0"]["s an image"] > 0
    told = [pixels(out / f"real_2_steps{end}" / masks[0].name) for end in ("", "_no_mask")]
    assert (told[0] != told[1]).any()
    for kind, columns in (("real", 9), ("cascade", 6)):
        sheet = Image.open(out / f"{kind}.png")
        assert sheet.size == (columns * (4 * 64 + 4) + 4, 3 * (4 * 32 + 4) + 4 + 18)
    before = file.stat().st_mtime_ns
    call_study("--small", folder / "small.pt")
    assert file.stat().st_mtime_ns == before and "| real, 2 steps, in tiles |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="rename"):
        call_study("--small", tmp_path / "nowhere.pt")


@pytest.mark.parametrize("case, words", [
    (["--level", 0.3], "--level 0.3: expected 0 to 0.25"), (["--tile", "20x20"], "multiples of 8"),
    (["--set", "data.root=x"], "given as --root"),
    (["--run", "nowhere", "--images", "x"], "no such checkpoint"), (["--images", "odd"], "odd.png: 9x16"),
    (["--images", "odd", "--mask", "masks/street.png"], "no mask has a name"),
    (["--images", "odd", "--out", "odd"], "the small images are in it"),
    (["--mask", "masks/street.png", "--small", "other.pt"], "its classes are sky, sea")])
def test_mistakes(folder, tmp_path, monkeypatch, case, words):
    """A mistake is one line with the remedy."""
    (folder / "odd").mkdir(exist_ok=True)
    Image.new("RGB", (16, 9)).save(folder / "odd" / "odd.png")
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match=words):
        call(monkeypatch, "--run", folder / "run", "--out", tmp_path / "out", "--steps", 2, *case)


def test_it_learns_what_shrinking_erases(tmp_path, monkeypatch):
    """The edges of the mask, which the small image has lost, come back: after 60 steps better than by the filter."""
    def make(i):
        ids = flat_scene(i, 64)[1][:32]
        return LOOKS[ids], ids

    splits = {"train": range(40), "val": range(100, 104)}
    write_dataset(tmp_path / "data", Colorbook(CLASSES), {
        split: [(f"flat_{i}", lambda i=i: make(i)) for i in numbers] for split, numbers in splits.items()})
    call(monkeypatch, "--root", tmp_path / "data", "--run", tmp_path / "run", settings=[
        *SMALL, "diffusion.T=1000", "model.hidden_dim=8", "train.steps=60", "train.lr=0.002", "train.warmup=10",
        "train.val_every=60", "train.preview_every=60"])
    network, errors = upscale.Upscaler(tmp_path / "run", torch.device("cpu")), []
    for i in range(200, 204):
        image, ids = make(i)
        small = upscale.to_uint8(upscale.shrink(torch.from_numpy(image).permute(2, 0, 1)[None]))[0]
        ways = network(small, ids, 1, level=0.0, steps=1), upscale_study.by_filter(small, ids, 1, "bicubic")
        errors.append([np.square(made.astype(int) - image).mean() for made in ways])
    ours, filtered = np.mean(errors, axis=0)
    assert ours < 0.8 * filtered
    assert Image.open(tmp_path / "run" / "previews" / "upscale_0000060.png").size == (3 * (4 * 64 + 4) + 4, 550)
