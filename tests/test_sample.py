"""The command that makes pictures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CLASSES, flat_scene
from PIL import Image

import sample as sample_module
from checkpoint import load_checkpoint
from masks import Colorbook, save_mask
from train import train
from unet import UNet


@pytest.fixture(scope="session")
def checkpoint(flat_root, tmp_path_factory):
    """A checkpoint of 30 steps, not square, of which a picture is at least no noise."""
    from config import load_config
    out = tmp_path_factory.mktemp("run")
    settings = {"device": "cpu", "out": out, "data.root": flat_root, "data.size": [16, 24], "model.hidden_dim": 8,
                "model.emb_dim": 16, "train.steps": 30, "train.batch_size": 8, "sample.steps": 3, "sample.n": 2}
    train(load_config("config.yaml", "toy", [f"{k}={v}" for k, v in settings.items()]))
    return out / "checkpoint.pt"


@pytest.fixture
def make(checkpoint, tmp_path, monkeypatch):
    """make("--n", 1, ...) runs sample.py in this process and returns the output folder."""

    def call(*options, out="out", model=checkpoint):
        arguments = ["sample.py", "--out", tmp_path / out, *(("--checkpoint", model) if model else ()), *options]
        monkeypatch.setattr(sys, "argv", [str(a) for a in arguments])
        sample_module.main()
        return tmp_path / out

    return call


@pytest.fixture
def mask(tmp_path):
    ids = np.repeat(np.repeat(flat_scene(1, 32)[1], 2, axis=0), 3, axis=1)  # 64x96, the ratio of the network
    save_mask(ids, tmp_path / "scene.png", Colorbook(CLASSES))
    return tmp_path / "scene.png"


def pixels(path):
    return np.array(Image.open(path)).astype(int)


def test_names_metadata_and_sheet(make, mask, checkpoint):
    """A picture would not lead back to its mask, settings and seed."""
    out = make("--mask", mask, "--n", 3, "--seed", 7, "--guidance", 1.5)
    assert sorted(p.name for p in out.iterdir()) == [f"scene_w1.5_seed{s}.png" for s in (7, 8, 9)] + ["sheet.png"]
    picture = Image.open(out / "scene_w1.5_seed8.png")
    about = json.loads(picture.text["settings"])
    assert picture.size == (24, 16)
    assert about == {"mask": "scene", "mask_source": str(mask), "seed": 8, "guidance": 1.5, "guidance_interval": [],
                     "sampler": "dpm_solver", "steps": 3, "eta": 0.0, "precision": "fp32", "weights": "ema",
                     "checkpoint": str(checkpoint), "trained_steps": 30}
    assert Image.open(out / "sheet.png").size[0] >= 4 * 24  # mask and three pictures


def test_same_seed_same_picture_whatever_the_batch(make, mask):
    """A picture that somebody liked could not be made again."""
    alone = make("--mask", mask, "--n", 1, "--seed", 9, out="alone")
    among = make("--mask", mask, "--n", 5, "--seed", 7, "--batch-size", 3, out="among")
    assert np.abs(pixels(alone / "scene_w3_seed9.png") - pixels(among / "scene_w3_seed9.png")).max() <= 1
    assert np.abs(pixels(among / "scene_w3_seed8.png") - pixels(among / "scene_w3_seed9.png")).max() > 20


@pytest.fixture
def passes(monkeypatch):
    """The number of pictures in each call of the network."""
    sizes, real = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, *a, **k: sizes.append(len(x)) or real(self, x, *a, **k))
    return sizes


def same_pictures(a, b):
    """Two folders hold the same pictures, to a grey level of rounding."""
    names = sorted(path.name for path in a.glob("*.png"))
    assert names and names == sorted(path.name for path in b.glob("*.png"))
    return max(np.abs(pixels(a / name) - pixels(b / name)).max() for name in names) <= 1


def test_batches_are_equally_large(make, mask, passes):
    """17 pictures in batches of 16 would leave a batch of one, which keeps no device busy."""
    make("--mask", mask, "--n", 17, "--batch-size", 16, "--guidance", 1, "--steps", 1)
    assert passes == [9, 8]


def test_a_batch_spans_masks(make, mask, passes):
    """A folder of masks would be worked through one mask at a time."""
    (mask.parent / "masks").mkdir()
    for i in range(6):
        save_mask(flat_scene(i, 32)[1], mask.parent / "masks" / f"m{i}.png", Colorbook(CLASSES))
    make("--mask", mask.parent / "masks", "--n", 1, "--guidance", "1,2", "--steps", 1)
    assert passes == [6, 12]  # w = 1 is one pass, w = 2 two


def test_short_memory_makes_smaller_batches(make, mask, monkeypatch, capsys):
    """A batch that a GPU has no memory for would end the run, or cost the pictures that were to be in it."""
    expected, sizes, real = make("--mask", mask, "--n", 7, out="expected"), [], UNet.forward

    def small(self, x, *a, **k):
        sizes.append(len(x))
        if len(x) > 4 and len(sizes) > 1:  # guidance doubles the batch; and not in the first step
            raise torch.OutOfMemoryError("as CUDA says it")
        return real(self, x, *a, **k)

    monkeypatch.setattr(UNet, "forward", small)
    assert same_pictures(expected, make("--mask", mask, "--n", 7))
    assert sizes == [14, 14, 6] + 7 * 3 * [2]
    assert "out of memory with 3 pictures at a time: going on with 1" in "".join(capsys.readouterr())
    with pytest.raises(SystemExit, match="one picture of 16x24 does not fit.*sample.one_batch=false"):
        monkeypatch.setattr(UNet, "forward", lambda self, x, *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
        make("--mask", mask, "--n", 2)


def test_compiled_for_one_shape(make, mask, passes, monkeypatch):
    """The last batch would be compiled once more, for its own size, or its pictures would be others.

    Compiled here is without a code generator, which takes minutes.
    """
    expected, real, settings = make("--mask", mask, "--n", 5, "--batch-size", 2, out="expected"), UNet.compile, []
    monkeypatch.setattr(UNet, "compile", lambda self, **k: settings.append(k) or real(self, backend="eager", **k))
    passes.clear()
    assert same_pictures(expected, make("--mask", mask, "--n", 5, "--batch-size", 2, "--compile"))
    assert settings == [{"dynamic": False}] and set(passes) == {4} and len(passes) == 3 * 3


def test_compiling_that_fails_says_what_to_do(make, mask, monkeypatch):
    """Who has no C++ compiler would get a traceback of torch."""
    real = UNet.compile
    monkeypatch.setattr(UNet, "compile", lambda self, **k: real(self, backend=lambda *_: 1 / 0, **k))
    with pytest.raises(SystemExit, match="^error: with sample.compile: .*--no-compile"):
        make("--mask", mask, "--n", 1, "--compile")


def test_half_precision(make, mask):
    """bf16 would not reach the network, or make another picture: 3 grey levels of 255 in the mean, from 30 steps of training."""
    single, half = (make("--mask", mask, "--n", 1, *more, out=f"out{len(more)}") / "scene_w3_seed1.png"
                    for more in ((), ("--precision", "bf16")))
    difference = np.abs(pixels(single) - pixels(half))
    assert json.loads(Image.open(half).text["settings"])["precision"] == "bf16"
    assert 0 < difference.mean() < 3


def test_guidance_interval(make, mask, passes):
    """The interval of the command line or the config would not reach the sampler, or save nothing."""
    whole = make("--mask", mask, "--n", 1, "--steps", 20, out="whole")
    assert passes == 20 * [2]
    passes.clear()
    part = make("--mask", mask, "--n", 1, "--steps", 20, "--guidance-interval", 0.3, 3, out="part")
    assert set(passes[:3]) == set(passes[-1:]) == {1} and 3 < passes.count(2) < 15
    assert not same_pictures(whole, part)
    about = json.loads(Image.open(part / "scene_w3_seed1.png").text["settings"])
    assert about["guidance_interval"] == [0.3, 3.0]
    make("--mask", mask, "--n", 1, "--steps", 20, "--guidance-interval", out="none")
    assert same_pictures(whole, mask.parent / "none")


def test_checkpoints_from_before_a_setting(make, mask, checkpoint, tmp_path):
    """A checkpoint that is older than a setting would no longer make pictures."""
    state = load_checkpoint(checkpoint)
    for key in ("guidance_interval", "precision", "compile"):
        del state["config"]["sample"][key]
    torch.save(state, tmp_path / "old.pt")
    assert same_pictures(make("--mask", mask, out="old", model=tmp_path / "old.pt"), make("--mask", mask, out="new"))


def test_a_picture_that_cannot_be_written_is_an_error(make, mask):
    """Files are written beside the sampling, where an error, of a full disk for one, could get lost."""
    (mask.parent / "out" / "scene_w3_seed2.png").mkdir(parents=True)
    with pytest.raises(SystemExit, match="error: .*scene_w3_seed2.png"):
        make("--mask", mask, "--n", 3)


@pytest.mark.parametrize("sampler", ["plms", "ddim", "ddpm"])
def test_other_samplers(make, mask, sampler, monkeypatch):
    """--sampler would not reach the sampler, or ddpm would not walk all T steps."""
    calls, real = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, *a, **k: calls.append(0) or real(self, *a, **k))
    out = make("--mask", mask, "--n", 1, "--sampler", sampler, "--steps", 4, "--eta", 0.5, "--guidance", 1)
    about = json.loads(Image.open(out / "scene_w1_seed1.png").text["settings"])
    assert about["sampler"] == sampler and len(calls) == about["steps"] == {"plms": 4, "ddim": 4, "ddpm": 1000}[sampler]


def test_guidance_costs_what_it_says(make, mask, monkeypatch):
    """Guidance 1 would pay for a pass that it does not use, or the mask stem would run at every step."""
    passes, stems = [], []
    forward, stem = UNet.forward, UNet.mask_features
    monkeypatch.setattr(UNet, "forward", lambda self, x, *a, **k: passes.append(len(x)) or forward(self, x, *a, **k))
    monkeypatch.setattr(UNet, "mask_features", lambda self, m: stems.append(0) or stem(self, m))
    for guidance, settings, expected in ((1, [], [1] * 3), (2, [], [2] * 3), (2, ["--set", "sample.one_batch=false"], [1] * 6)):
        passes.clear(), stems.clear()
        make("--mask", mask, "--n", 1, "--guidance", guidance, "--steps", 3, *settings)
        assert passes == expected and len(stems) == 1


def test_guidance_grid(make, mask):
    """`--guidance 1,2,3,5` would not show the same seeds side by side."""
    out = make("--mask", mask, "--n", 2, "--guidance", "1,2,3,5")
    assert {p.name for p in out.iterdir()} == {f"scene_w{w}_seed{s}.png" for w in (1, 2, 3, 5) for s in (1, 2)} | {"sheet.png"}
    w, h = Image.open(out / "sheet.png").size
    assert w > 5 * 190 and h > 2 * 128  # mask and four guidances, two seeds


def test_folder_of_masks(make, mask):
    """A folder of masks could not be turned into a data set, or all its pictures would share one noise."""
    folder = mask.parent / "masks"
    folder.mkdir()
    for i in range(3):
        save_mask(flat_scene(i, 32)[1], folder / f"m{i}.png", Colorbook(CLASSES))
    out = make("--mask", folder, "--n", 2)
    assert {p.name for p in out.iterdir()} == {f"m{i}_w3_seed{1 + 2 * i + j}.png" for i in range(3) for j in range(2)} | {"sheet.png"}


def test_mask_of_another_size_is_fitted_and_said(make, tmp_path, capsys):
    """A mask from a paint program, of whatever size, would be refused or silently squeezed."""
    save_mask(flat_scene(1, 128)[1], tmp_path / "square.png", Colorbook(CLASSES))
    make("--mask", tmp_path / "square.png", "--n", 1)
    assert "128x128 resized to 16x24 after cropping its centre to that ratio" in capsys.readouterr().out


def test_mask_path_in_the_config(make, mask, tiny, checkpoint):
    """The thesis's way, the mask path in the YAML file, would not work."""
    cfg = tiny(sample__mask=mask, sample__n=1) | {"out": str(checkpoint.parent)}
    (mask.parent / "my.yaml").write_text(yaml.safe_dump(cfg))
    out = make("--config", mask.parent / "my.yaml", model=None)
    assert (out / "scene_w3_seed1.png").exists()


def test_unconditional(make):
    """The label drop would have trained an unconditional model that nobody can reach."""
    out = make("--unconditional", 3, "--seed", 5)
    assert sorted(p.name for p in out.iterdir()) == ["sheet.png"] + [f"unconditional_seed{s}.png" for s in (5, 6, 7)]


def test_ema_weights_are_the_default(make, mask, checkpoint, tmp_path):
    """Pictures would come from the noisy last weights instead of their average."""
    state = load_checkpoint(checkpoint)
    state["model"] = {k: torch.zeros_like(v) for k, v in state["model"].items()}  # raw weights: no prediction at all
    torch.save(state, tmp_path / "zero.pt")
    averaged, raw = (pixels(make("--mask", mask, "--n", 1, *flag, model=tmp_path / "zero.pt") / "scene_w3_seed1.png")
                     for flag in ((), ("--raw",)))
    expected = pixels(make("--mask", mask, "--n", 1) / "scene_w3_seed1.png")
    assert (averaged == expected).all() and (raw != expected).mean() > 0.5


@pytest.mark.parametrize("options, words", [
    (["--mask", "nowhere.png"], ["nowhere.png", "no such mask"]),
    (["--mask", "tests"], ["tests", "no masks in this folder"]),
    ([], ["--mask", "--unconditional"]),
    (["--mask", "colorbook.json"], ["colorbook.json"]),
    (["--unconditional", 0], ["--unconditional 0", "1 or more"]),
    (["--unconditional", 2, "--steps", 0], ["--steps", "0", "above 0"]),
    (["--unconditional", 2, "--steps", 2000], ["2000", "1..1000"]),
    (["--unconditional", 2, "--guidance-interval", 3, 1], ["--guidance-interval", "[3.0, 1.0]", "lowest, highest"]),
    (["--unconditional", 2, "--guidance-interval", 1], ["--guidance-interval", "[1.0]"]),
    (["--unconditional", 2, "--precision", "fp8"], ["--precision", "fp8", "bf16"]),
    (["--unconditional", 2, "--sampler", "euler"], ["euler", "dpm_solver"]),
    (["--unconditional", 2, "--guidance", "a,b"], ["a,b", "1,2,3,5"]),
    (["--unconditional", 2, "--checkpoint", "README.md"], ["README.md", "checkpoint"]),
])
def test_mistakes_are_messages(make, options, words, tmp_path):
    """A mistake would end in a traceback, or leave half of the pictures."""
    with pytest.raises(SystemExit) as stopped:
        make(*options)
    assert str(stopped.value.code).startswith("error: ") and all(word in stopped.value.code for word in words), stopped.value.code
    assert not list((tmp_path / "out").glob("*.png"))


def test_unknown_colour_in_a_mask_stops_before_any_picture(make, tmp_path):
    """A wrong mask among a thousand would be found after an hour of sampling."""
    (tmp_path / "masks").mkdir()
    save_mask(flat_scene(1, 32)[1], tmp_path / "masks" / "a.png", Colorbook(CLASSES))
    Image.new("RGB", (32, 32), (255, 0, 255)).save(tmp_path / "masks" / "b.png")
    with pytest.raises(SystemExit, match="b.png.*1024 pixels.*nearest class"):
        make("--mask", tmp_path / "masks")
    assert not (tmp_path / "out").exists()


def test_command_line(checkpoint, mask, tmp_path):
    """`python sample.py --mask ...` would not run."""
    done = subprocess.run([sys.executable, "sample.py", "--mask", mask, "--checkpoint", checkpoint, "--n", "1", "--out",
                           tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0 and Path(tmp_path / "out" / "sheet.png").exists(), done.stderr


def test_two_processes_make_the_pictures_of_one(make, checkpoint, mask, tmp_path):
    """`torchrun ... sample.py` would make other pictures than a plain run, twice the same, or a sheet with half of them."""
    arguments = ["--mask", mask, "--n=3", "--guidance", "1,2", "--device", "cpu"]
    alone = make(*arguments, out="alone")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", "sample.py", *arguments,
                           "--checkpoint", checkpoint, "--out", tmp_path / "shared"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert same_pictures(alone, tmp_path / "shared")  # the sheet too
    assert done.stdout.count("6 pictures in") == 1 and done.stdout.count("a mask in") == 1  # one of them speaks
    assert "3 pictures of 3 steps" in done.stderr  # and made half of them
