"""Settings: presets, files of one's own, --set, and what is refused."""

import re
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

import sample as sample_program
import train as train_program
from checkpoint import build
from config import SETTINGS, command, flatten, load_config
from train import train

PROJECT = yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8"))
BASE = flatten({key: value for key, value in PROJECT.items() if key != "presets"})


def refused(words, path=None, preset=None, overrides=()):
    """load_config() refuses with a ValueError in which all the words stand."""
    with pytest.raises(ValueError) as error:
        load_config(path, preset, overrides)
    assert all(word in str(error.value) for word in words), error.value


def differences(cfg, other):
    """The settings in which two configs differ, with the value of the first."""
    other = flatten(other)
    return {key: value for key, value in flatten(cfg).items() if value != other[key]}


@pytest.fixture
def write(tmp_path):
    """write(text) is the path of a config file that holds it."""
    path = tmp_path / "my.yaml"
    return lambda text: path.write_text(text, encoding="utf-8") and path


# ----------------------------------------------------------------------------------------------- config.yaml


def test_config_yaml_and_the_table_of_settings_have_the_same_keys():
    """Every setting that the programs know stands in config.yaml, and every one that stands there is known."""
    assert BASE.keys() == SETTINGS.keys()


def test_every_setting_says_why():
    """Every line of config.yaml with a value gives its reason."""
    common = Path("config.yaml").read_text(encoding="utf-8").split("presets:")[0]
    lines = [line for line in common.splitlines() if re.match(r"\s*\w+: *[^\s#]", line)]
    assert len(lines) == len(BASE)
    for line in lines:
        assert re.search(r"# .{5,}", line), line


DATA = {  # root, size, run folder, and steps and batch of the base, except for the toy (five minutes) and the thesis
    "toy": ("data/toy/prepared", [48, 48], "runs/toy", 1200, 4),
    "idd_lite": ("data/idd_lite/prepared", [64, 64], "runs/idd_lite", 6000, 16),
    "camvid": ("data/camvid/prepared", [48, 64], "runs/camvid", 6000, 16),
    "cityscapes": ("data/cityscapes/prepared", [128, 256], "runs/cityscapes", 6000, 16),
    "bdd100k": ("data/bdd100k/prepared", [128, 128], "runs/bdd100k", 142000, 64),
}


def test_these_are_all_presets():
    """The table of this file names every preset of the project."""
    assert PROJECT["presets"].keys() == DATA.keys()


@pytest.mark.parametrize("preset", DATA)
def test_presets_resolve(preset):
    """A preset gives a complete config: its own values over the base, and a run folder named after it."""
    cfg = load_config("config.yaml", preset)
    c, d = cfg["train"], cfg["data"]
    values = d["root"], d["size"], Path(cfg["out"]).as_posix(), c["steps"], c["batch_size"]
    assert values == DATA[preset]
    own = flatten(PROJECT["presets"][preset])
    assert flatten(cfg) == BASE | own | {"preset": "", "out": cfg["out"]}


def test_the_toy_is_the_default():
    """Without any argument the programs take the toy, whether config.yaml is named or not."""
    assert load_config() == load_config("config.yaml") == load_config("config.yaml", "toy")


def test_thesis_values():
    """The preset bdd100k is the thesis (S0 2.3.1, 4.2, 4.3.2) and the author's guidance."""
    cfg = load_config("config.yaml", "bdd100k")
    expected = {"diffusion.T": 1000, "diffusion.beta_start": 1e-4, "diffusion.beta_end": 0.02,
                "diffusion.schedule": "thesis", "diffusion.prediction": "eps", "train.lr": 3e-4, "train.warmup": 1,
                "train.beta2": 0.999, "train.batch_size": 64, "train.ema": 0.995, "train.label_drop": 0.1,
                "model.hidden_dim": 128, "model.emb_dim": 256, "model.attention": False, "data.size": [128, 128],
                "data.flip": 0.0, "data.augment.p": 0.0, "sample.guidance": 3.0}
    assert {key: flatten(cfg)[key] for key in expected} == expected
    assert cfg["train"]["steps"] * 64 / 7000 == pytest.approx(1300, abs=2)  # epochs
    assert cfg["train"]["hold"] >= cfg["train"]["steps"]  # the learning rate stays what it is
    model, _, _ = build(cfg, 19, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == 88_842_371


# ---------------------------------------------------------------------------------------------- your own data


@pytest.mark.parametrize("root, out", [
    ("my_streets", "runs/my_streets"), ("my_streets/prepared", "runs/my_streets"), ("/big/disk/a b", "runs/a b"),
    ("/big/disk/straße/prepared/", "runs/straße"), ("x/../y/prepared", "runs/y"), ("prepared_2", "runs/prepared_2")])
def test_own_data_train_with_the_base_values(root, out):
    """Data named without a preset get the base values, not the toy's, and a run folder of their own."""
    cfg = load_config(overrides=[f"data.root={root}"])
    assert flatten(cfg) == BASE | {"preset": "", "data.root": root, "out": str(Path(out))}
    assert load_config("config.yaml", overrides=[f"data.root={root}"]) == cfg


def test_the_run_folder_of_relative_data_is_below_runs(tmp_path, monkeypatch):
    """Data outside the current folder, or the current folder itself, give a run folder by their name, below runs."""
    (tmp_path / "city" / "code").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "city" / "code")
    for root, name in (".", "code"), ("..", "city"), ("../prepared", "city"), ("../../town", "town"):
        assert Path(load_config(overrides=[f"data.root={root}"])["out"]) == Path("runs", name)


def test_a_preset_that_is_asked_for_keeps_its_values_for_other_data(capsys):
    """--preset toy with another data.root trains the toy's recipe; without --preset that is printed and left out."""
    cfg = load_config("config.yaml", "toy", ["data.root=mine/prepared"])
    assert differences(cfg, load_config("config.yaml", "toy")) == {
        "data.root": "mine/prepared", "out": str(Path("runs/mine"))}
    assert "toy" not in capsys.readouterr().out
    load_config("config.yaml", overrides=["data.root=mine/prepared"])
    assert "--preset toy" in capsys.readouterr().out


def test_a_run_folder_that_is_given_stays():
    """`out` is derived from the data only where it is empty."""
    assert load_config("config.yaml", "toy", ["out=elsewhere/night 1"])["out"] == "elsewhere/night 1"
    assert load_config("config.yaml", "toy", ["out="])["out"] == str(Path("runs/toy"))


def test_cityscapes_trains_the_base_values():
    """The preset cityscapes is the base with its own data and size, not the toy's 1200 steps of 4."""
    cfg = load_config("config.yaml", "cityscapes")
    assert differences(cfg, load_config(overrides=["data.root=x"])).keys() == {"data.root", "data.size", "out"}


# ---------------------------------------------------------------------------------------------- files of one's own


def test_a_file_of_ones_own_needs_only_what_it_changes(write):
    """A partial file is laid over the project's values and names no preset by itself."""
    cfg = load_config(write("seed: 7\ndata: {root: my/prepared, augment: {crop: 0.5}}\ntrain:\n  lr: 1e-3\n"))
    assert flatten(cfg) == BASE | {"preset": "", "seed": 7, "data.root": "my/prepared", "data.augment.crop": 0.5,
                                   "train.lr": 0.001, "out": str(Path("runs/my"))}


def test_an_empty_part_is_refused_by_name(write):
    """A part whose lines are all commented out is named."""
    refused(["my.yaml", "'train'"], write("train:\n  # lr: 1\n"))


OWN = """
preset: night
seed: 1
train: {steps: 10, batch_size: 2}
presets:
  night: {train: {steps: 20}, data: {root: night/prepared}}
  camvid: {train: {steps: 30}}
"""


def test_presets_of_ones_own(write):
    """A file's preset is laid over the file's values; one with the name of a project's preset goes over both."""
    night = load_config(write(OWN))
    assert (night["seed"], night["train"]["steps"], night["train"]["batch_size"]) == (1, 20, 2)
    assert (night["data"]["size"], night["out"]) == ([64, 64], str(Path("runs/night")))
    camvid = load_config(write(OWN), "camvid")
    assert (camvid["seed"], camvid["train"]["steps"], camvid["data"]["size"]) == (1, 30, [48, 64])
    refused(["my.yaml", "'fog'", "night", "camvid", "toy"], write(OWN), "fog")


def test_a_file_may_name_a_preset_of_the_project(write):
    """The values of the file go over those of the project's preset that it names."""
    cfg = load_config(write("preset: camvid\ntrain: {steps: 77}\n"))
    assert differences(cfg, load_config("config.yaml", "camvid")) == {"train.steps": 77}
    other = load_config(write("preset: camvid\ntrain: {steps: 77}\n"), "idd_lite")
    assert differences(other, load_config("config.yaml", "idd_lite")) == {"train.steps": 77}


def test_a_copy_of_the_projects_file_gives_the_same(write):
    """A copy of config.yaml with one value changed differs in that value only, with and without a preset."""
    path = write(Path("config.yaml").read_text(encoding="utf-8").replace("emb_dim: 256", "emb_dim: 64"))
    for preset in None, "bdd100k":
        assert differences(load_config(path, preset), load_config("config.yaml", preset)) == {"model.emb_dim": 64}


def test_messages_name_file_and_preset(write):
    """A misspelt key in a preset of a file is found by the file, the preset and the nearest key."""
    refused(["my.yaml, preset mine", "train.stepz", "train.steps"],
            write("presets: {mine: {train: {stepz: 3}}}"), "mine")
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        load_config("none.yaml")


def test_the_config_of_a_run_loads_to_the_same_values(tiny):
    """config.yaml as a run saves it needs no preset and gives every value again."""
    cfg = tiny("straße 1", train__steps=1, train__lr=1e-5, train__grad_clip=1e9, data__val="val",
               sample__guidance_interval="[0.3, 3]", sample__mask="'masken/ä: 1.png'", seed=2**63 - 1)
    train(cfg)
    assert load_config(Path(cfg["out"]) / "config.yaml") == cfg
    assert cfg["sample"]["guidance_interval"] == [0.3, 3] and cfg["sample"]["mask"] == "masken/ä: 1.png"


# --------------------------------------------------------------------------------------------------- --set


def test_overrides_go_over_everything(write):
    """--set wins over file and preset, and of two the later one wins."""
    cfg = load_config(write(OWN), overrides=["train.steps=5", "train.batch_size=3", "train.steps=6"])
    assert (cfg["train"]["steps"], cfg["train"]["batch_size"], cfg["out"]) == (6, 3, str(Path("runs/night")))


@pytest.mark.parametrize("text, value", [
    ("train.lr=1e-4", 1e-4), ("train.lr=1", 1.0), ("train.lr=.5", 0.5), ("sample.guidance=1", 1.0),
    ("data.size=[32, 64]", [32, 64]), ("data.size=[32,64]", [32, 64]), ("model.attention=true", True),
    ("model.attention=False", False), ("out=a=b", "a=b"), ("out='5'", "5"), ("out=\"2024-01-01\"", "2024-01-01"),
    ("out=C:\\runs\\a", "C:\\runs\\a"), ("out=[half", "[half"), ("out=a: b: c", "a: b: c"), ("out=@x", "@x"),
    ("sample.mask=", ""), ("seed=9223372036854775807", 2**63 - 1), ("sample.guidance_interval=[]", []),
    ("sample.guidance_interval=[0.3, 3]", [0.3, 3]), ("device=cpu", "cpu")])
def test_overrides_are_read_as_yaml(text, value):
    """--set takes numbers, lists, flags, and texts that are no YAML, such as a path of Windows."""
    got = flatten(load_config(overrides=[text]))[text.split("=")[0]]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("override, words", [
    ("train.step=5", ["'train.step'", "train.steps"]),
    ("trian.steps=5", ["'trian.steps'", "train.steps"]),
    ("guidence=5", ["'guidence'", "sample.guidance"]),
    ("hidden=5", ["'hidden'", "model.hidden_dim"]),
    ("train.fsdp=true", ["'train.fsdp'", "nearest"]),
    ("data=5", ["'data'", "nearest"]),
    ("=5", ["nearest"]),
    ("train.steps", ["train.steps", "key.sub=value"]),
    ("preset=camvid", ["--preset"]),
    ("train.steps=many", ["train.steps", "many", "whole number"]),
    ("train.steps=1e3", ["train.steps", "1e3", "whole number"]),
    ("train.steps=1.0", ["train.steps", "1.0", "whole number"]),
    ("train.lr=.nan", ["train.lr", "nan"]),
    ("train.lr=fast", ["train.lr", "fast", "a number"]),
    ("model.attention=1", ["model.attention", "true or false"]),
    ("data.root=5", ["data.root", "in quotes"]),
    ("out=2024-01-01", ["out", "in quotes"]),
    ("sample.out=", ["sample.out", "not empty"]),
    ("data.size=[60, 64]", ["data.size", "60", "multiples of 8"]),
    ("data.size=64", ["data.size", "64", "[height, width]"]),
    ("diffusion.schedule=cosine", ["diffusion.schedule", "cosine", "thesis", "linear", "nichol"]),
])
def test_bad_overrides_are_refused(override, words):
    """A misspelt or impossible --set is refused with the text that was given, what was expected, or the nearest key."""
    refused([f"--set {override}", *words], overrides=[override])


LOW = {"seed": 0, "data.size": [8, 8], "data.flip": 0, "data.memory_gb": 0, "data.augment.p": 0,
       "data.augment.brightness": 0, "data.augment.hue": 0, "data.augment.rotate": 0, "data.augment.crop": 0.1,
       "model.hidden_dim": 2, "model.emb_dim": 2, "diffusion.T": 2, "train.steps": 1, "train.batch_size": 1,
       "train.accumulate": 1, "train.warmup": 1, "train.hold": 1, "train.beta2": 0, "train.label_drop": 0,
       "train.ema": 0, "train.log_every": 1, "train.previews": 1, "sample.n": 1, "sample.steps": 1, "sample.eta": 0,
       "sample.guidance": 0, "sample.guidance_interval": [], "sample.seed": 0, "sample.batch_size": 1}
HIGH = {"seed": 2**63 - 1, "data.size": [8, 8192], "data.flip": 1, "data.augment.p": 1, "data.augment.brightness": 1,
        "data.augment.hue": 0.5, "data.augment.rotate": 180, "data.augment.crop": 1, "diffusion.beta_end": 0.999,
        "train.grad_clip": 1e9, "train.beta2": 0.999, "train.label_drop": 1, "train.ema": 1, "sample.eta": 1,
        "sample.guidance_interval": [0, 0.5], "sample.seed": 2**63 - 1}
OUTSIDE = {"seed": [-1, 2**63], "data.size": [[0, 8], [8, 12], [-8, 8], [8, 8200], [8], [8, 8, 8]],
           "data.flip": [-0.01, 1.01], "data.memory_gb": [-1], "data.augment.p": [-0.01, 1.01],
           "data.augment.brightness": [-0.01, 1.01], "data.augment.hue": [-0.01, 0.51],
           "data.augment.rotate": [-1, 181], "data.augment.crop": [0, 1.01], "model.hidden_dim": [0],
           "model.emb_dim": [0], "diffusion.T": [1], "diffusion.beta_start": [0, -0.1], "diffusion.beta_end": [1, 0],
           "train.steps": [0, -1],
           "train.batch_size": [0, 10**9], "train.accumulate": [0], "train.lr": [0, -0.1, 100], "train.warmup": [0],
           "train.beta2": [-0.1, 1], "train.label_drop": [-0.01, 1.01], "train.ema": [-0.01, 1.01],
           "train.grad_clip": [0, -1], "train.save_every": [0], "sample.n": [0], "sample.eta": [-0.01, 1.01],
           "sample.guidance": [-0.1, 10**6], "sample.guidance_interval": [[2, 2], [3, 1], [-1, 2], [1], [0, 1, 2]],
           "sample.seed": [-1, 2**63], "sample.batch_size": [0]}


@pytest.mark.parametrize("ends", [LOW, HIGH], ids=["low", "high"])
def test_ends_of_ranges_are_allowed(ends):
    """The ends of every range are taken as they are given, all of them at once."""
    cfg = flatten(load_config(overrides=[f"{key}={value}" for key, value in ends.items()]))
    assert {key: cfg[key] for key in ends} == ends


@pytest.mark.parametrize("key", OUTSIDE)
def test_values_outside_of_ranges_are_refused(key):
    """What lies just outside of a range is refused with the value and what was expected."""
    for value in OUTSIDE[key]:
        refused([f"--set {key}={value}", str(value), "expected"], overrides=[f"{key}={value}"])


@pytest.mark.parametrize("key, names", {
    "device": "auto cuda mps cpu", "diffusion.schedule": "thesis linear nichol", "diffusion.prediction": "eps v",
    "train.precision": "fp32 fp16 bf16", "sample.precision": "auto fp32 fp16 bf16",
    "sample.sampler": "dpm_solver plms ddim ddpm"}.items())
def test_allowed_values(key, names):
    """A setting with a list of allowed values takes each of them and names all of them for another."""
    for name in names.split():
        assert flatten(load_config(overrides=[f"{key}={name}"]))[key] == name
    for other in "other", names.split()[0].upper(), "5":
        refused([key, other, *names.split()], overrides=[f"{key}={other}"])


def test_what_only_together_is_impossible_is_refused_before_the_data_are_read(tiny):
    """An odd width, or a schedule that rises the wrong way, ends in a message that names the numbers."""
    for settings, words in (
            ({"model__hidden_dim": 33}, "even.*33"), ({"model__emb_dim": 15}, "even.*15"),
            ({"diffusion__beta_start": 0.5, "diffusion__beta_end": 0.1}, "beta_start <= beta_end.*0.5.*0.1")):
        with pytest.raises(ValueError, match=words):
            train(tiny(**settings), dry_run=True)


# ------------------------------------------------------------------------------------- configs of checkpoints


def test_an_old_checkpoints_config_is_completed():
    """Settings that are newer than a checkpoint get the project's value, and those that are gone are left out."""
    cfg = load_config("config.yaml", "camvid", ["sample.steps=7", "train.lr=0.5"])
    del cfg["sample"]["guidance"], cfg["sample"]["eta"], cfg["train"]["hold"], cfg["data"]["augment"]
    cfg["train"]["fsdp"] = True
    cfg["painter"] = {"brush": 3}
    full = load_config(base=cfg)
    assert flatten(full).keys() == BASE.keys()
    expected = {"sample.guidance": 2.0, "sample.eta": 0.0, "train.hold": 400, "data.augment.crop": 0.8,
                "sample.steps": 7, "train.lr": 0.5, "data.size": [48, 64], "data.root": "data/camvid/prepared"}
    assert {key: flatten(full)[key] for key in expected} == expected


def test_a_value_of_a_checkpoint_that_cannot_be_is_refused():
    """The values of a checkpoint are checked like those of a file."""
    cfg = load_config("config.yaml", "toy")
    cfg["diffusion"]["T"] = "x"
    with pytest.raises(ValueError, match="config.*diffusion.T.*'x'"):
        load_config(base=cfg)


# -------------------------------------------------------------------------------------------------- programs


def fail(error):
    raise error


@pytest.mark.parametrize("error", [ValueError("a.png: bad"), FileNotFoundError("a.png: bad"), OSError("a.png: bad")])
def test_a_users_mistake_is_one_line(error):
    """ValueError and OSError end a program with `error: ...`, which Python prints on stderr with exit code 1."""
    with pytest.raises(SystemExit) as stopped:
        command(fail, error)
    assert stopped.value.code == "error: a.png: bad"


def test_a_mistake_of_ours_keeps_its_traceback():
    """Other errors are not hidden."""
    with pytest.raises(ZeroDivisionError):
        command(fail, ZeroDivisionError())


def test_a_finished_program_returns(capsys):
    """command() hands on the arguments and returns without an exit."""
    command(print, "a", "b")
    assert capsys.readouterr() == ("a b\n", "")


def test_ctrl_c_is_exit_code_130(capsys):
    """Ctrl-C ends in one line on stderr and exit code 130, with what the program has to tell."""
    for error, line in (KeyboardInterrupt(), "stopped by Ctrl-C"), (KeyboardInterrupt("3 of 4"), "Ctrl-C: 3 of 4"):
        with pytest.raises(SystemExit) as stopped:
            command(fail, error)
        out, err = capsys.readouterr()
        assert stopped.value.code == 130 and out == "" and err.strip().endswith(line) and err.strip().count("\n") == 0
    with pytest.raises(SystemExit) as stopped:
        command(signal.raise_signal, signal.SIGINT)
    assert stopped.value.code == 130


@pytest.mark.parametrize("program", [train_program, sample_program])
@pytest.mark.parametrize("words, message", [
    (["--config", "none.yaml"], "error: .*none.yaml"), (["--preset", "fog"], "error: .*'fog'.*toy"),
    (["--set", "sample.step=5"], "error: --set .*sample.steps"),
    (["--set", "seed=1", "--set", "seed"], "error: .*key.sub=value")])
def test_programs_refuse_wrong_settings(program, words, message, monkeypatch):
    """train.py and sample.py end in one line for a config, preset or --set that is wrong, and read no data before."""
    monkeypatch.setattr(sys, "argv", ["program.py", *words])
    with pytest.raises(SystemExit, match=message):
        program.main()


def test_train_takes_config_preset_and_set(monkeypatch):
    """--config, --preset and several --set of train.py reach the training."""
    configs = []
    monkeypatch.setattr(train_program, "train", lambda cfg, **more: configs.append((cfg, more)))
    words = "--config config.yaml --preset camvid --set train.steps=3 --set data.size=[8,16] --dry-run"
    monkeypatch.setattr(sys, "argv", ["train.py", *words.split()])
    train_program.main()
    (cfg, more), = configs
    assert differences(cfg, load_config("config.yaml", "camvid")) == {"train.steps": 3, "data.size": [8, 16]}
    assert more == {"dry_run": True}
