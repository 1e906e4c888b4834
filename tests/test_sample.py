"""sample.py through its command line: which settings, mask, weights and seed each image comes from."""

import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CLASSES, flat_scene
from PIL import Image

import config
import sample as sample_module
from checkpoint import load_checkpoint
from ddpm import Diffusion
from masks import Colorbook, save_mask
from train import train
from unet import UNet


@pytest.fixture(scope="session")
def checkpoint(flat_root, tmp_path_factory):
    """A checkpoint of 30 steps, not square."""
    out = tmp_path_factory.mktemp("run")
    settings = {"device": "cpu", "out": out, "data.root": flat_root, "data.size": [16, 24], "model.hidden_dim": 8,
                "model.emb_dim": 16, "train.steps": 30, "train.batch_size": 8, "sample.steps": 3, "sample.n": 2,
                "sample.precision": "fp32"}
    train(config.load_config("config.yaml", "toy", [f"{key}={value}" for key, value in settings.items()]))
    return out / "checkpoint.pt"


@pytest.fixture
def make(checkpoint, tmp_path, monkeypatch):
    """make("--n", 1, ...) runs sample.py in this process and returns the output folder."""

    def call(*options, out="out", model=checkpoint):
        named = [*(("--out", tmp_path / out) if out else ()), *(("--checkpoint", model) if model else ())]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, [*named, *options])])
        sample_module.main()
        return tmp_path / (out or ".")

    return call


@pytest.fixture
def mask(tmp_path):
    ids = np.repeat(np.repeat(flat_scene(1, 32)[1], 2, axis=0), 3, axis=1)  # 64x96, the ratio of the network
    save_mask(ids, tmp_path / "scene.png", Colorbook(CLASSES))
    return tmp_path / "scene.png"


@pytest.fixture
def folder(tmp_path):
    """Three masks of the network's size: all road, sky above road, and a car on an unlabelled ground."""
    layouts = {name: np.zeros((16, 24), np.uint8) for name in "abc"}
    layouts["b"][:10] = 1
    layouts["c"][:] = 255
    layouts["c"][4:12, 3:9] = 2
    (tmp_path / "masks").mkdir()
    for name, ids in layouts.items():
        save_mask(ids, tmp_path / "masks" / f"{name}.png", Colorbook(CLASSES))
    return tmp_path / "masks"


@pytest.fixture
def passes(monkeypatch):
    """The number of images in each call of the network."""
    sizes, real = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, *a, **k: sizes.append(len(x)) or real(self, x, *a, **k))
    return sizes


@pytest.fixture
def arrived(monkeypatch):
    """A dict for each batch: every argument that guided_eps, noise_like_seeds and sample were called with, by name."""
    batches, arguments = [], {}

    def spy(name):
        real = getattr(sample_module, name)

        def called(*args, **kwargs):
            bound = inspect.signature(real).bind(*args, **kwargs)
            bound.apply_defaults()
            arguments.update(bound.arguments)
            if name == "sample":
                half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
                batches.append(arguments | {"dtype": half})
                arguments.clear()
            return real(*args, **kwargs)

        monkeypatch.setattr(sample_module, name, called)

    for name in ("guided_eps", "noise_like_seeds", "sample"):
        spy(name)
    return batches


# the colour of each class at guidance 1, of images in [-1, 1]
COLORS = torch.tensor([[0.2, 0.0, 0.0], [0.0, 0.2, 0.0], [0.0, 0.0, 0.2], [-0.2, -0.2, 0.0]])


@pytest.fixture
def exact(monkeypatch):
    """A network that knows its image: COLORS of the mask, and grey where there is no mask or class."""
    diffusion = Diffusion(prediction="v")

    def forward(self, x, t, mask=None, *, features=None, keep=None):
        x0 = torch.zeros_like(x) if features is None else features
        a, s = diffusion.coefficients(t)
        return a * (x - a * x0) / s - s * x0

    monkeypatch.setattr(UNet, "mask_features", lambda self, mask: torch.einsum("bkhw,kc->bchw", mask, COLORS))
    monkeypatch.setattr(UNet, "forward", forward)


def exact_image(ids, w):
    """What the exact network paints of ids (H, W) under guidance w: (H, W, 3) in 0..255."""
    colors = np.vstack([COLORS.numpy(), np.zeros((252, 3))])
    return 127.5 + 127.5 * w * colors[ids]


def pixels(path):
    return np.array(Image.open(path)).astype(int)


def read_settings(path):
    return json.loads(Image.open(path).text["settings"])


def same_images(a, b):
    """Two folders hold the same images, to a grey level of rounding."""
    names = sorted(path.name for path in a.glob("*.png"))
    assert names and names == sorted(path.name for path in b.glob("*.png"))
    return max(np.abs(pixels(a / name) - pixels(b / name)).max() for name in names) <= 1


def changed_checkpoint(source, path, sample=(), **parts):
    """A copy of a checkpoint in which settings of the samples and whole parts are others."""
    state = load_checkpoint(source)
    state["config"]["sample"] |= dict(sample)
    torch.save({key: value for key, value in (state | parts).items() if key != "path"}, path)
    return path


# --------------------------------------------------------------------------------------- which settings arrive

TRAINED = {"n": 3, "sampler": "plms", "steps": 4, "eta": 0.25, "guidance": 1.75, "guidance_interval": [0.5, 40.0],
           "seed": 31, "batch_size": 2, "precision": "bf16"}  # no value is config.yaml's
FLAGS = ["--n", 4, "--sampler", "ddim", "--steps", 2, "--guidance", 1.25, "--seed", 77, "--batch-size", 3]
BY_FLAGS = {"n": 4, "sampler": "ddim", "steps": 2, "guidance": 1.25, "seed": 77, "batch_size": 3}
SETS = ["--set", "sample.eta=0.75", "--set", "sample.steps=5", "--set", "sample.guidance_interval=[0.3, 3]",
        "--set", "sample.precision=fp32", "--set", "sample.n=1"]
BY_SETS = {"eta": 0.75, "steps": 5, "guidance_interval": [0.3, 3], "precision": "fp32", "n": 1}
FILE = {"preset": "mine", "data": {"size": [32, 32]}, "model": {"hidden_dim": 64}, "train": {"precision": "fp16"},
        "sample": {"steps": 6, "eta": 0.125, "seed": 5},
        "presets": {"mine": {"sample": {"steps": 7, "n": 2}}, "other": {"sample": {"steps": 8, "sampler": "ddim"}}}}
BY_FILE = {"steps": 7, "eta": 0.125, "seed": 5, "n": 2}


@pytest.mark.parametrize("options, changes", [
    ([], {}),
    (["--set", "sample.eta=0.75"], {"eta": 0.75}),
    (["--set", "sample.guidance_interval=[]"], {"guidance_interval": []}),
    (SETS, BY_SETS),
    (FLAGS, BY_FLAGS),
    ([*SETS, *FLAGS], BY_SETS | BY_FLAGS),
    (["--config", FILE], BY_FILE),
    (["--config", FILE, "--preset", "other"], {"steps": 8, "eta": 0.125, "seed": 5, "sampler": "ddim"}),
    (["--config", FILE, *SETS], BY_FILE | BY_SETS),
    (["--config", FILE, *SETS, "--steps", 9], BY_FILE | BY_SETS | {"steps": 9}),
    (["--preset", "toy"], {"guidance": 3.0}),
    (["--preset", "idd_lite"], {}),
])
def test_only_what_is_given_changes_a_checkpoint(options, changes, make, mask, checkpoint, tmp_path, arrived):
    """Flags go over --set, that over a named file or preset, these over the checkpoint; an image records the result."""
    if FILE in options:
        (tmp_path / "my.yaml").write_text(yaml.safe_dump(FILE))
        options = [tmp_path / "my.yaml" if option is FILE else option for option in options]
    model = changed_checkpoint(checkpoint, tmp_path / "trained.pt", TRAINED)
    out = make("--mask", mask, *options, model=model)
    expected = TRAINED | changes
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[expected["precision"]]
    seeds = [expected["seed"] + i for i in range(expected["n"])]
    for batch in arrived:
        assert {key: batch[key] for key in ("sampler", "steps", "eta", "guidance")} == {
            key: expected[key] for key in ("sampler", "steps", "eta", "guidance")}
        assert list(batch["interval"] or []) == expected["guidance_interval"] and batch["dtype"] is dtype
        assert tuple(batch["shape"]) == (3, 16, 24)
    assert [seed for batch in arrived for seed in batch["seeds"]] == seeds
    assert len(arrived) == math.ceil(expected["n"] / expected["batch_size"])
    for seed in seeds:
        image = out / f"scene_w{expected['guidance']:g}_seed{seed}.png"
        recorded = read_settings(image)
        assert recorded["seed"] == seed and Image.open(image).size == (24, 16)
        for key in ("sampler", "steps", "eta", "guidance", "guidance_interval", "precision"):
            assert recorded[key] == expected[key], key


def test_all_that_an_image_records(make, mask, checkpoint):
    """An image leads back to its mask, settings, weights and seed."""
    out = make("--mask", mask, "--n", 3, "--seed", 7, "--guidance", 1.5)
    assert sorted(path.name for path in out.iterdir()) == [f"scene_w1.5_seed{s}.png" for s in (7, 8, 9)] + ["sheet.png"]
    recorded = read_settings(out / "scene_w1.5_seed8.png")
    expected = {"mask": "scene", "mask_source": str(mask), "seed": 8, "guidance": 1.5, "guidance_interval": [],
                "sampler": "dpm_solver", "steps": 3, "eta": 0.0, "precision": "fp32",
                "checkpoint": str(checkpoint), "trained_steps": 30}
    assert recorded.items() >= expected.items()


def test_out_is_a_setting(make, mask, tmp_path):
    """Without --out, the folder is the one of --set sample.out."""
    make("--mask", mask, "--n", 1, "--set", f"sample.out={tmp_path / 'by_set'}", out=None)
    assert (tmp_path / "by_set" / "scene_w3_seed1.png").exists()


@pytest.mark.parametrize("trained_with", ["", "gone.png"])
def test_the_mask_of_config_yaml(make, mask, checkpoint, tmp_path, monkeypatch, trained_with):
    """sample.mask in config.yaml is used without --config, as the error for a missing mask advises."""
    model = changed_checkpoint(checkpoint, tmp_path / "trained.pt", {"mask": trained_with, "n": 1})
    with pytest.raises(SystemExit, match="set sample.mask in the config" if not trained_with else "gone.png"):
        make(model=model)
    text = config.PROJECT.read_text()
    assert '  mask: ""' in text
    (tmp_path / "config.yaml").write_text(text.replace('  mask: ""', f"  mask: {mask}"))
    monkeypatch.setattr(config, "PROJECT", tmp_path / "config.yaml")
    assert (make(model=model) / "scene_w3_seed1.png").exists()


def test_the_mask_and_the_run_of_a_named_config(make, mask, tiny, checkpoint):
    """A file that is named by --config brings the mask, and the run whose checkpoint is used."""
    cfg = tiny(sample__mask=mask, sample__n=1) | {"out": str(checkpoint.parent)}
    (mask.parent / "my.yaml").write_text(yaml.safe_dump(cfg))
    out = make("--config", mask.parent / "my.yaml", model=None)
    assert read_settings(out / "scene_w3_seed1.png")["checkpoint"] == str(checkpoint)


def test_checkpoints_from_before_a_setting(make, mask, checkpoint, tmp_path):
    """A checkpoint that is older than a setting makes the same images."""
    state = load_checkpoint(checkpoint)
    for key in ("guidance_interval", "precision"):
        del state["config"]["sample"][key]
    old = changed_checkpoint(checkpoint, tmp_path / "old.pt", config=state["config"])
    assert same_images(make("--mask", mask, out="old", model=old), make("--mask", mask, out="new"))


def test_averaged_weights_are_the_default(make, mask, checkpoint, tmp_path):
    """Images come from the averaged weights, whatever the last ones are."""
    zeros = {key: torch.zeros_like(value) for key, value in load_checkpoint(checkpoint)["model"].items()}
    other = changed_checkpoint(checkpoint, tmp_path / "other.pt", model=zeros)  # the average is the same
    assert same_images(make("--mask", mask), make("--mask", mask, model=other, out="other"))


@pytest.mark.parametrize("instructions, precision, dtype", [
    ({}, "auto", torch.float32), ({"avx512_bf16": True}, "auto", torch.bfloat16),
    ({"avx512_bf16": True}, "fp32", torch.float32), ({}, "bf16", torch.bfloat16), ({}, "fp16", torch.float16)])
def test_precision(make, mask, arrived, capsys, monkeypatch, instructions, precision, dtype):
    """A network runs in the best precision of the device, or in the one asked for; fp16 on a CPU is advised against."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    exact, out = make("--mask", mask, "--n", 1, "--set", "sample.precision=fp32", out="exact"), make(
        "--mask", mask, "--n", 1, "--device", "cpu", "--set", f"sample.precision={precision}")
    assert arrived[-1]["dtype"] is dtype
    assert ("fp16 is slow on a CPU" in capsys.readouterr().out) == (dtype is torch.float16)
    difference = np.abs(pixels(exact / "scene_w3_seed1.png") - pixels(out / "scene_w3_seed1.png")).mean()
    assert difference == 0 if dtype is torch.float32 else 0 < difference < 3  # grey levels


def test_all_steps_of_ddpm(make, mask, checkpoint, tmp_path, passes):
    """--sampler ddpm walks all steps of the chain, whatever --steps says, and records their number."""
    cfg = load_checkpoint(checkpoint)["config"]
    cfg["diffusion"] |= {"T": 30, "beta_end": 0.3}
    model = changed_checkpoint(checkpoint, tmp_path / "short.pt", config=cfg)
    out = make("--mask", mask, "--n", 1, "--sampler", "ddpm", "--steps", 400, "--guidance", 1, model=model)
    assert read_settings(out / "scene_w1_seed1.png")["steps"] == len(passes) == 30


def test_guidance_costs_what_it_says(make, mask, passes, monkeypatch):
    """Guidance takes two passes in one batch, w = 1 and noise outside the interval one; the stem runs once."""
    stems, stem = [], UNet.mask_features
    monkeypatch.setattr(UNet, "mask_features", lambda self, m: stems.append(0) or stem(self, m))
    for w, interval, expected in ((1, "[]", [1] * 3), (2, "[]", [2] * 3), (2, "[0.3, 3]", [1, 1, 2])):
        passes.clear()
        stems.clear()
        make("--mask", mask, "--n", 1, "--guidance", w, "--steps", 3, "--set", f"sample.guidance_interval={interval}")
        assert passes == expected and len(stems) == 1


# ----------------------------------------------------------------------- which mask, guidance and seed is in a file


def test_each_image_is_of_its_own_mask_and_guidance(make, folder, exact):
    """Every image of a folder, in batches across masks, has the classes of its own mask at its own guidance."""
    out = make("--mask", folder, "--n", 2, "--guidance", "3,1,2", "--batch-size", 4, "--seed", 11)
    assert len(list(out.glob("*_seed*.png"))) == 3 * 3 * 2
    for i, stem in enumerate("abc"):
        ids = np.array(Image.open(folder / f"{stem}.png"))
        for w in (1, 2, 3):
            for seed in (11 + 2 * i, 12 + 2 * i):  # no two masks of a folder share a seed
                image = pixels(out / f"{stem}_w{w}_seed{seed}.png")
                assert np.abs(image - exact_image(ids, w)).max() <= 1, (stem, w, seed)


def test_no_mask_is_no_class(make, exact, arrived):
    """--unconditional makes what the network paints without a mask, from the seeds that were asked for."""
    out = make("--unconditional", 3, "--seed", 5, "--batch-size", 2)
    assert sorted(p.name for p in out.iterdir()) == ["sheet.png"] + [f"unconditional_seed{s}.png" for s in (5, 6, 7)]
    assert [seed for batch in arrived for seed in batch["seeds"]] == [5, 6, 7]
    for seed in (5, 6, 7):
        assert np.abs(pixels(out / f"unconditional_seed{seed}.png") - 127.5).max() <= 1
        assert read_settings(out / f"unconditional_seed{seed}.png")["mask"] is None


def test_a_network_without_masks(make, mask, checkpoint, tmp_path):
    """A network that was trained without masks makes images with --unconditional, and refuses a mask."""
    cfg, weights = load_checkpoint(checkpoint)["config"], UNet(0, 8, 16).state_dict()
    cfg["model"]["conditional"] = False
    model = changed_checkpoint(checkpoint, tmp_path / "unconditional.pt", config=cfg, model=weights, ema=weights)
    with pytest.raises(SystemExit, match="trained without masks.*--unconditional"):
        make("--mask", mask, model=model)
    assert (make("--unconditional", 1, model=model) / "unconditional_seed1.png").exists()


def test_masks_are_fitted(make, mask, tmp_path, exact, capsys):
    """A mask of another size is scaled to the network's, and cropped around its centre where the ratio is another.

    Classes that are lost by that are named.
    """
    out = make("--mask", mask, "--n", 1, "--guidance", 3)
    ids = np.array(Image.open(mask))[2::4, 2::4]  # 4x4 pixels of the mask are one of the image
    assert np.abs(pixels(out / "scene_w3_seed1.png") - exact_image(ids, 3)).max() <= 1
    printed = capsys.readouterr().out
    assert "of 64x96 (height x width) resized to 16x24" in printed and "lose a class" not in printed
    tall = np.repeat(np.array([0, 1, 2], np.uint8), 16)[:, None].repeat(24, axis=1)
    save_mask(tall, tmp_path / "tall.png", Colorbook(CLASSES))
    out = make("--mask", tmp_path / "tall.png", "--n", 1)
    assert np.abs(pixels(out / "tall_w3_seed1.png") - exact_image(tall[16:32], 3)).max() <= 1  # the middle, sky
    printed = capsys.readouterr().out
    assert "of 48x24 (height x width) resized to 16x24 after cropping the centre" in printed
    assert "1 mask(s) lose a class by that, cut off or too small: tall (road, car)\n" in printed


def test_same_seed_same_image_whatever_the_batch(make, mask):
    """The same seed gives the same image, alone or in a batch."""
    alone = make("--mask", mask, "--n", 1, "--seed", 9, out="alone")
    among = make("--mask", mask, "--n", 5, "--seed", 7, "--batch-size", 3, out="among")
    assert np.abs(pixels(alone / "scene_w3_seed9.png") - pixels(among / "scene_w3_seed9.png")).max() <= 1
    assert np.abs(pixels(among / "scene_w3_seed8.png") - pixels(among / "scene_w3_seed9.png")).max() > 20


@pytest.fixture
def sheets(monkeypatch):
    """The rows and titles of every sheet that is drawn, and the sheet."""
    drawn, real = [], sample_module.contact_sheet

    def contact_sheet(rows, titles=()):
        sheet = real(rows, titles)
        cells = [[np.asarray(cell).astype(int) for cell in row] for row in rows]
        drawn.append((cells, list(titles), np.asarray(sheet)))
        return sheet

    monkeypatch.setattr(sample_module, "contact_sheet", contact_sheet)
    return drawn


def shows_mask(cell, path):
    """Every class of the mask file has its colour in the cell, and what is unlabelled is not black."""
    ids = np.array(Image.open(path))
    labelled, colors = ids != 255, np.array(list(CLASSES.values()))
    return (cell[labelled] == colors[ids[labelled]]).all() and (cell[~labelled] > 0).all()


def test_columns_of_the_sheet_are_their_titles(make, folder, sheets):
    """Beside its mask, a cell holds the image of the guidance in its title and of the seed of its row."""
    out = make("--mask", folder, "--n", 2, "--guidance", "3,1,2")
    (rows, titles, sheet), = sheets
    assert titles[0] == "mask" and [title.split()[-1] for title in titles[1:]] == ["3", "1", "2"]
    assert len(rows) == 6 and (pixels(out / "sheet.png") == sheet).all()
    for r, row in enumerate(rows):
        stem, seed = "aabbcc"[r], 1 + r
        assert shows_mask(row[0], folder / f"{stem}.png") and len(row) == 4
        for title, cell in zip(titles[1:], row[1:]):
            assert (cell == pixels(out / f"{stem}_w{title.split()[-1]}_seed{seed}.png")).all(), (r, title)


def test_rows_of_the_sheet_are_masks(make, folder, sheets):
    """With one guidance, a row of the sheet is a mask and its images in the order of their seeds; without masks, 8."""
    out = make("--mask", folder, "--n", 2)
    for i, row in enumerate(sheets[0][0]):
        assert shows_mask(row[0], folder / f"{'abc'[i]}.png") and len(row) == 3
        for j, cell in enumerate(row[1:]):
            assert (cell == pixels(out / f"{'abc'[i]}_w3_seed{1 + 2 * i + j}.png")).all()
    out = make("--unconditional", 10, out="unconditional")
    cells = [cell for row in sheets[1][0] for cell in row]
    assert [len(row) for row in sheets[1][0]] == [8, 2]
    assert all((cell == pixels(out / f"unconditional_seed{1 + i}.png")).all() for i, cell in enumerate(cells))


# --------------------------------------------------------------------------------------------- batches and memory


def test_batches_are_equally_large(make, mask, passes):
    """17 images with a limit of 16 are batches of 9 and 8, not one of a single image."""
    make("--mask", mask, "--n", 17, "--batch-size", 16, "--guidance", 1, "--steps", 1)
    assert passes == [9, 8]


def test_a_batch_spans_masks(make, folder, passes):
    """The masks of a folder share a batch, guidances do not: w = 1 is one pass, w = 2 two."""
    make("--mask", folder, "--n", 2, "--guidance", "1,2", "--steps", 1)
    assert passes == [6, 12]


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                 RuntimeError("MPS backend out of memory (MPS allocated: 17 GB, max allowed: 18 GB)")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "mps"])
def test_short_memory_makes_smaller_batches(make, mask, monkeypatch, capsys, error):
    """A batch that the device has no memory for is halved, and its images are the same; a single one is an error."""
    expected, sizes, real = make("--mask", mask, "--n", 7, out="expected"), [], UNet.forward

    def small(self, x, *args, **options):
        sizes.append(len(x))
        if len(x) > 4 and len(sizes) > 1:  # guidance doubles the batch; and not in the first step
            raise error
        return real(self, x, *args, **options)

    def none(self, x, *args, **options):
        raise error

    monkeypatch.setattr(UNet, "forward", small)
    assert same_images(expected, make("--mask", mask, "--n", 7))
    assert sizes == [14, 14, 6] + 7 * 3 * [2]
    assert "out of memory with 3 images at a time: going on with 1" in "".join(capsys.readouterr())
    monkeypatch.setattr(UNet, "forward", none)
    with pytest.raises(SystemExit, match="one image of 16x24 does not fit.*--guidance 1"):
        make("--mask", mask, "--n", 2)


def test_other_errors_of_the_network_are_not_hidden(make, mask, monkeypatch):
    """An error that is not about memory is raised as it is."""
    monkeypatch.setattr(UNet, "forward", lambda *_, **__: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        make("--mask", mask, "--n", 2)


# ------------------------------------------------------------------------------------------- stopped and resumed


def test_resume_makes_what_is_missing_or_damaged(make, mask, arrived, capsys):
    """--resume leaves finished images as they are and makes those that are missing or cut off; the sheet has all."""
    expected = make("--mask", mask, "--n", 5, out="expected")
    out = make("--mask", mask, "--n", 5)
    (out / "scene_w3_seed2.png").unlink()
    cut = out / "scene_w3_seed4.png"
    cut.write_bytes(cut.read_bytes()[:-60])
    (out / "scene_w3_seed5.png").write_bytes(b"")
    (out / "sheet.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    arrived.clear()
    make("--mask", mask, "--n", 5, "--resume")
    assert [seed for batch in arrived for seed in batch["seeds"]] == [2, 4, 5]
    assert same_images(expected, out) and "2 of 5 images" in capsys.readouterr().out
    assert all((path.stat().st_mtime_ns == time) == (path.name[-5] in "13") for path, time in before.items())
    arrived.clear()
    make("--mask", f"{mask.parent}/./{mask.name}", "--n", 5, "--resume")  # the same mask
    assert not arrived and same_images(expected, out)
    make("--mask", mask, "--n", 5)
    assert len(arrived) == 1  # without --resume all are made


def test_resume_makes_anew_what_was_made_otherwise(make, mask, checkpoint, tmp_path, arrived):
    """An image of another mask of the same name, of other weights or of other settings is not taken for finished."""
    model = changed_checkpoint(checkpoint, tmp_path / "copy.pt")
    image, options = make("--mask", mask, "--n", 2, model=model) / "scene_w3_seed2.png", []
    for change in ("mask", "weights", "--sampler=plms", "--steps=2",
                   "--set=sample.guidance_interval=[0.3,3]", "--set=sample.precision=bf16"):  # one after the other
        before = pixels(image)
        if change == "mask":
            save_mask(np.full((64, 96), 2, np.uint8), mask, Colorbook(CLASSES))
        elif change == "weights":  # trained once more, for as many steps
            changed_checkpoint(checkpoint, model, ema=load_checkpoint(checkpoint)["model"])
        else:
            options.append(change)
        arrived.clear()
        make("--mask", mask, "--n", 2, "--resume", *options, model=model)
        assert [seed for batch in arrived for seed in batch["seeds"]] == [1, 2], change
        assert (pixels(image) != before).any(), change


@pytest.mark.parametrize("earlier", [True, False])
def test_ctrl_c_counts_the_images(make, mask, tmp_path, monkeypatch, capsys, earlier):
    """Ctrl-C ends with exit code 130 and the number of finished images, those of earlier settings not among them."""
    if earlier:
        make("--mask", mask, "--n", 7, "--steps", 2)
    batches, real = [], sample_module.sample

    def interrupted(*args, **options):
        batches.append(0)
        if len(batches) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(sample_module, "sample", interrupted)
    with pytest.raises(SystemExit) as stopped:
        make("--mask", mask, "--n", 7, "--batch-size", 2)
    assert stopped.value.code == 130
    text = capsys.readouterr().err
    assert f"4 of 7 images are in {tmp_path / 'out'}" in text and "--resume" in text and "Traceback" not in text


def test_images_of_others_are_not_replaced(make, mask, tmp_path):
    """An image without our settings stays as it is, and so does a folder of masks that is named as --out."""
    foreign = tmp_path / "out" / "scene_w3_seed2.png"
    foreign.parent.mkdir()
    Image.new("RGB", (5, 5), "red").save(foreign)
    before = foreign.read_bytes()
    with pytest.raises(SystemExit, match="error: .*scene_w3_seed2.png: an image that was not made here"):
        make("--mask", mask, "--n", 3)
    assert foreign.read_bytes() == before and list(foreign.parent.iterdir()) == [foreign]
    with pytest.raises(SystemExit, match="error: .*the masks are in it"):
        make("--mask", mask.parent, "--n", 1, "--out", mask.parent)


KILLED = """
import os, sys
from PIL import Image
import sample
saved, real = [], Image.Image.save

def save(self, file, *args, **options):
    saved.append(0)
    if len(saved) < 3:
        return real(self, file, *args, **options)
    file = file if hasattr(file, "write") else open(file, "wb")
    file.write(b"half of an image")
    file.flush()
    os._exit(9)

Image.Image.save = save
sample.main()
"""


def test_killed_and_resumed(make, mask, checkpoint, tmp_path, capsys):
    """Killed while writing, sample.py leaves complete images only; with --resume it makes the rest."""
    expected = make("--mask", mask, "--n", 5, out="expected")
    arguments = ["--mask", mask, "--checkpoint", checkpoint, "--n", "5", "--batch-size", "2", "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    complete = sorted((tmp_path / "out").glob("*.png"))
    assert [path.name for path in complete] == ["scene_w3_seed1.png", "scene_w3_seed2.png"]
    assert all(pixels(path).shape == (16, 24, 3) for path in complete)
    make(*arguments, "--resume")
    assert same_images(expected, tmp_path / "out") and "2 of 5 images" in capsys.readouterr().out


def test_a_full_disk(make, mask, tmp_path, monkeypatch):
    """An image that cannot be written is an error that names it, and leaves nothing of itself behind."""
    real = Image.Image.save

    def save(self, file, *args, **options):
        if self.size == (24, 16) and "seed" in str(getattr(file, "name", file)):
            raise OSError(28, "No space left on device")
        return real(self, file, *args, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(SystemExit, match=r"^error: .*scene_w3_seed1.png.*No space left on device.*--resume"):
        make("--mask", mask, "--n", 1)
    assert not list((tmp_path / "out").iterdir())


def test_a_name_that_is_taken(make, mask):
    """A folder that has the name of an image is an error that names it."""
    (mask.parent / "out" / "scene_w3_seed2.png").mkdir(parents=True)
    with pytest.raises(SystemExit, match="error: .*scene_w3_seed2.png"):
        make("--mask", mask, "--n", 3)


def test_two_processes_make_the_images_of_one(make, checkpoint, mask, tmp_path):
    """Two processes share the images that are left, make those of one process, and draw one sheet of all."""
    arguments = ["--mask", mask, "--n=3", "--guidance", "1,2", "--device", "cpu"]
    alone, shared = make(*arguments, out="alone"), tmp_path / "shared"
    shared.mkdir()
    finished = shared / "scene_w2_seed2.png"
    shutil.copy(alone / finished.name, finished)
    before = finished.stat().st_mtime_ns
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    done = subprocess.run([*torchrun, "sample.py", *arguments, "--resume", "--checkpoint", checkpoint, "--out", shared],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert same_images(alone, shared) and finished.stat().st_mtime_ns == before
    assert done.stdout.count("5 image(s) in") == 1 and done.stdout.count("1 mask(s) in") == 1  # one of them prints
    assert "3 images of 3 steps" in done.stderr  # its share of the five


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("options, words", [
    ([], ["--mask", "sample.mask", "--unconditional"]),
    (["--mask", "nowhere.png"], [str(Path("nowhere.png").absolute()), "no such mask"]),
    (["--mask", "tests"], ["tests", "no masks in this folder", ".png"]),
    (["--mask", "colorbook.json"], ["colorbook.json"]),
    (["--unconditional", 2, "--mask", "m.png"], ["--unconditional", "--mask"]),
    (["--unconditional", 2, "--guidance", 2], ["--unconditional", "--guidance"]),
    (["--unconditional", 0], ["--unconditional 0", "1 or more"]),
    (["--unconditional", 2, "--steps", 0], ["--steps", "0", "from 1"]),
    (["--unconditional", 2, "--steps", 2000], ["2000", "1..1000"]),
    (["--unconditional", 2, "--batch-size", 0], ["--batch-size", "0"]),
    (["--unconditional", 2, "--seed", -1], ["--seed", "-1"]),
    (["--unconditional", 2, "--sampler", "euler"], ["--sampler", "euler", "dpm_solver"]),
    (["--unconditional", 2, "--set", "sample.guidance_interval=[3,1]"], ["guidance_interval", "[3, 1]", "rising"]),
    (["--unconditional", 2, "--set", "sample.precision=fp8"], ["sample.precision", "fp8", "bf16"]),
    (["--unconditional", 2, "--set", "sample.stepps=3"], ["sample.stepps", "'sample.steps'"]),
    (["--unconditional", 2, "--set", "train.lr=0.1"], ["train.lr", "checkpoint", "sample.*"]),
    (["--unconditional", 2, "--set", "data.size=[8,8]"], ["data.size", "checkpoint", "sample.*"]),
    (["--mask", "m.png", "--guidance", "a,b"], ["--guidance", "a,b", "1,2,3,5"]),
    (["--mask", "m.png", "--guidance", "1,-2"], ["--guidance", "-2"]),
    (["--unconditional", 2, "--checkpoint", "README.md"], ["README.md", "checkpoint"]),
    (["--unconditional", 2, "--checkpoint", "tests"], ["tests: a folder", "checkpoint.pt"]),
    (["--unconditional", 2, "--checkpoint", "."], [".: a folder", "checkpoint.pt"]),
])
def test_mistakes_are_messages(make, options, words, tmp_path):
    """A mistake is one line that names it and what was expected, before any image."""
    with pytest.raises(SystemExit) as stopped:
        make(*options)
    message = stopped.value.code
    assert message.startswith("error: ") and all(word in message for word in words), message
    assert not list((tmp_path / "out").glob("*.png"))


def test_from_another_folder(make, mask, tmp_path, monkeypatch):
    """From another folder, the messages for a missing checkpoint or mask have the whole path that was looked at."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(SystemExit) as stopped:
        make("--mask", mask, model="runs/mine/checkpoint.pt")
    assert str(tmp_path / "elsewhere" / "runs" / "mine" / "checkpoint.pt") in stopped.value.code
    with pytest.raises(SystemExit) as stopped:
        make("--mask", mask.name)
    assert str(tmp_path / "elsewhere" / "scene.png") in stopped.value.code
    assert (make("--mask", f"../{mask.name}", "--n", 1) / "scene_w3_seed1.png").exists()


def test_a_bad_mask_stops_before_any_image(make, folder, checkpoint, tmp_path):
    """One wrong mask of a folder is named before sampling; its hint to the legend names the checkpoint's colours."""
    Image.new("RGB", (32, 32), (255, 0, 255)).save(folder / "d.png")
    with pytest.raises(SystemExit, match="d.png.*1024 pixels.*nearest class") as stopped:
        make("--mask", folder)
    assert f"masks.py --colorbook {checkpoint}" in stopped.value.code
    assert not (tmp_path / "out").exists()


def test_a_folder_of_a_data_set(make, flat_root):
    """For the folder above the masks, the message names the one that is meant."""
    with pytest.raises(SystemExit, match="no masks in this folder.*Do you mean .*masks"):
        make("--mask", flat_root / "test")


def test_a_mask_beyond_the_limit_of_pixels(make, tmp_path):
    """A mask of 100 million pixels is refused with the file and the limit."""
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    with pytest.raises(SystemExit, match=r"huge.png.*89,478,485 pixels"):
        make("--mask", tmp_path / "huge.png")


def test_repeated_guidances(make, mask, arrived):
    """A guidance that is given twice, in whatever spelling, is made once."""
    out = make("--mask", mask, "--n", 2, "--guidance", "2,2.0,1,2")
    assert [(batch["guidance"], batch["seeds"]) for batch in arrived] == [(2.0, [1, 2]), (1.0, [1, 2])]
    assert len(list(out.glob("*_seed*.png"))) == 4
