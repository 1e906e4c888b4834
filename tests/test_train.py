"""Config, training, checkpoints."""

import copy
import csv
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import LOOKS, flat_scene
from PIL import Image

import train as train_module
from checkpoint import build, load_checkpoint, save_checkpoint
from config import SETTINGS, flatten, load_config
from dataset import Pairs, unpack
from ddpm import Diffusion, guided_eps, noise_like_seeds, sample
from masks import one_hot
from train import train, validate


def same(a, b):
    """Equality to the bit of nested dicts and lists of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


LEARNED = ("model", "ema", "optimizer", "scaler", "step", "rng")

# --------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("preset", ["toy", "bdd100k", "idd_lite", "camvid"])
def test_presets_are_complete(preset):
    """A preset that comes with the project would not load."""
    assert flatten(load_config("config.yaml", preset)).keys() == flatten(SETTINGS).keys()


def test_thesis_values():
    """The thesis-size preset would no longer be the thesis (S0 2.3.1, 4.3.2)."""
    cfg = flatten(load_config("config.yaml", "bdd100k"))
    expected = {"diffusion.T": 1000, "diffusion.beta_start": 1e-4, "diffusion.beta_end": 0.02, "diffusion.schedule": "thesis",
                "diffusion.prediction": "eps", "train.lr": 3e-4, "train.batch_size": 64, "train.ema": 0.995,
                "model.hidden_dim": 128, "model.emb_dim": 256, "data.size": [128, 128], "sample.guidance": 3.0}
    assert {key: cfg[key] for key in expected} == expected
    assert round(cfg["train.steps"] * 64 / 7000) == pytest.approx(1300, abs=2)  # epochs
    model, _, _ = build(load_config("config.yaml", "bdd100k"), 19, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == 88_842_371


def test_every_setting_says_why():
    """A reader would meet a setting without a reason."""
    common = Path("config.yaml").read_text().split("presets:")[0]
    for line in common.splitlines():
        if re.match(r"\s*\w+: *[^\s#]", line):
            assert "#" in line or line.split(":")[0].strip() in ("contrast", "saturation"), line


@pytest.mark.parametrize("override, words", [
    ("train.step=5", ["train.step", "train.steps"]),
    ("trian.steps=5", ["trian.steps", "train.steps"]),
    ("guidence=5", ["guidence", "sample.guidance"]),
    ("train.steps=many", ["train.steps", "many", "whole number"]),
    ("train.steps=0", ["train.steps", "0", "above 0"]),
    ("train.lr=.nan", ["train.lr", "nan"]),
    ("train.label_drop=1.5", ["train.label_drop", "1.5", "from 0 to 1"]),
    ("model.attention=1", ["model.attention", "true or false"]),
    ("data.size=[60, 64]", ["data.size", "60", "multiples of 8"]),
    ("diffusion.schedule=cosine", ["diffusion.schedule", "cosine", "thesis", "nichol"]),
    ("data=5", ["data", "nearest"]),
    ("train.steps", ["train.steps", "key.sub=value"]),
    ("preset=camvid", ["--preset"]),
])
def test_bad_settings_are_refused(override, words):
    """A misspelt or impossible setting would be ignored, or fail hours later."""
    with pytest.raises(ValueError) as error:
        load_config("config.yaml", overrides=[override])
    assert all(word in str(error.value) for word in words), error.value


def test_unknown_key_in_the_file_names_file_and_preset(tmp_path):
    """The message would not say where to look."""
    tree = yaml.safe_load(Path("config.yaml").read_text())
    tree["presets"]["toy"]["train"]["stepz"] = 3
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match="my.yaml, preset toy: .*train.stepz.*train.steps"):
        load_config(tmp_path / "my.yaml")
    del tree["presets"]["toy"]["train"]["stepz"], tree["train"]["lr"], tree["presets"]["toy"]["train"]["lr"]
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match="missing settings: train.lr"):
        load_config(tmp_path / "my.yaml")


@pytest.mark.parametrize("text", ["a: [1, 2", "- 1\n- 2", "", "presets: 5", "!!python/object/apply:os.system [exit]"])
def test_broken_yaml_is_a_message(tmp_path, text):
    """A broken file would end in a traceback, or run somebody else's code."""
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ValueError, match="my.yaml"):
        load_config(tmp_path / "my.yaml")
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        load_config(tmp_path / "none.yaml")


def test_overrides_go_over_presets_and_read_numbers():
    """--set would lose against the preset, or 1e-4, which YAML takes for a text, would be refused."""
    cfg = load_config("config.yaml", "idd_lite", ["train.lr=1e-4", "sample.guidance=1", "data.size=[32,64]", "out=x"])
    assert (cfg["train"]["lr"], cfg["sample"]["guidance"], cfg["data"]["size"], cfg["out"]) == (1e-4, 1.0, [32, 64], "x")
    assert cfg["train"]["batch_size"] == 16 and cfg["preset"] == "idd_lite"


# ------------------------------------------------------------------------------------------ a run, its files


def test_run_leaves_what_the_readme_names(tiny):
    """A run would lack its log, previews, checkpoint or config."""
    cfg = tiny()
    train(cfg)
    out = Path(cfg["out"])
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert [int(r["step"]) for r in rows] == [2, 4, 5, 6, 8, 10]
    assert all(math.isfinite(float(v)) for r in rows for v in r.values() if v)
    assert [r["step"] for r in rows if r["val_eps"]] == ["5", "10"]
    bins = [float(v) for k, v in rows[-1].items() if k.startswith("val_loss_t")]
    assert len(bins) == 4 and sum(bins) / 4 == pytest.approx(float(rows[-1]["val_loss"]), rel=0.2)  # 10 pairs: 2 or 3 a bin
    assert Image.open(out / "previews" / "0000010.png").size[0] > 2 * 128
    assert load_config(out / "config.yaml") == cfg
    state = load_checkpoint(out / "checkpoint.pt")
    assert state["step"] == 10 and state["epoch"] == pytest.approx(10 * 8 / 50) and list(state["colorbook"]) == [
        "road", "sky", "car", "person"]


def test_existing_run_is_not_overwritten(tiny, capsys):
    """A night's training would be lost to a second call."""
    cfg = tiny(train__steps=2)
    train(cfg)
    before = (Path(cfg["out"]) / "checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match="--resume"):
        train(cfg)
    assert (Path(cfg["out"]) / "checkpoint.pt").read_bytes() == before
    whole = load_checkpoint(Path(cfg["out"]) / "checkpoint.pt")
    (Path(cfg["out"]) / "checkpoint.pt").unlink()
    with pytest.raises(FileExistsError, match="--resume"):
        train(cfg)
    train(cfg, resume=True)  # a run that was stopped before its first checkpoint begins again
    assert "no checkpoint yet" in capsys.readouterr().out
    assert same(whole["model"], load_checkpoint(Path(cfg["out"]) / "checkpoint.pt")["model"])


def test_dry_run_writes_nothing(tiny, capsys):
    """Checking a config would leave a half-made run behind, or not say what it would cost."""
    cfg = tiny()
    train(cfg, dry_run=True)
    said = capsys.readouterr().out
    assert not Path(cfg["out"]).exists()
    assert "10 steps of 8 = 1.6 epochs" in said and re.search(r"[\d,]+ parameters", said)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume_is_bit_for_bit(tiny, precision):
    """A resumed run would drift away from the run that was never stopped."""
    more = {"train__precision": precision, "data__augment__p": 0.5, "train__batch_size": 7}
    train(tiny("whole", **more))
    train(tiny("parts", **more, train__steps=5))
    train(tiny("parts", **more), resume=True)
    whole, parts = (load_checkpoint(Path(tiny(name)["out"]) / "checkpoint.pt") for name in ("whole", "parts"))
    for key in LEARNED:
        assert same(whole[key], parts[key]), key
    logs = [list(csv.DictReader(open(Path(tiny(name)["out"]) / "log.csv"))) for name in ("whole", "parts")]
    assert [row["val_eps"] for row in logs[0] if row["step"] == "10"] == [row["val_eps"] for row in logs[1] if row["step"] == "10"]


def test_looking_does_not_change_the_run(tiny):
    """Validation and previews would disturb the random numbers of training."""
    train(tiny("often", train__val_every=1, train__preview_every=1))
    train(tiny("never", train__val_every=99, train__preview_every=99))
    often, never = (load_checkpoint(Path(tiny(name)["out"]) / "checkpoint.pt") for name in ("often", "never"))
    assert all(same(often[key], never[key]) for key in LEARNED)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_resume(tiny, number, monkeypatch):
    """Ctrl-C, or a cluster's SIGTERM, would lose the steps since the last checkpoint."""
    train(tiny("whole"))
    real, calls, before = Diffusion.loss, [], signal.getsignal(signal.SIGINT)

    def loss(self, *args):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return real(self, *args)

    monkeypatch.setattr(Diffusion, "loss", loss)
    with pytest.raises(SystemExit) as stopped:
        train(tiny("parts", train__save_every=99))
    path = Path(tiny("parts")["out"]) / "checkpoint.pt"
    assert stopped.value.code == 128 + number and load_checkpoint(path)["step"] == 3
    assert signal.getsignal(signal.SIGINT) is before
    train(tiny("parts"), resume=True)
    whole, parts = load_checkpoint(Path(tiny("whole")["out"]) / "checkpoint.pt"), load_checkpoint(path)
    assert all(same(whole[key], parts[key]) for key in LEARNED)


def test_rows_past_the_checkpoint_are_not_logged_twice(tiny):
    """After a crash the log would hold steps that were thrown away."""
    cfg = tiny("crashed", train__steps=5)
    train(cfg)
    log = Path(cfg["out"]) / "log.csv"
    log.write_text(log.read_text() + "6,1,1,1,1,1,,,,,,,\n")
    train(tiny("crashed"), resume=True)
    assert [row["step"] for row in csv.DictReader(open(log))] == ["2", "4", "5", "6", "8", "10"]


def test_resume_refuses_another_network(tiny):
    """Weights would be poured into a network that they do not fit."""
    train(tiny(train__steps=2))
    with pytest.raises(ValueError, match="model.hidden_dim was 8, is 16"):
        train(tiny(model__hidden_dim=16), resume=True)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        train(tiny("other"), resume=True)
    path = Path(tiny()["out"]) / "checkpoint.pt"
    state = load_checkpoint(path)
    state["colorbook"] = dict(reversed(state["colorbook"].items()))  # the same classes, but not the same ids
    save_checkpoint(path, state)
    with pytest.raises(ValueError, match="another colorbook"):
        train(tiny(), resume=True)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_non_finite_loss_keeps_the_last_good_checkpoint(tiny, monkeypatch, precision):
    """A run that diverged would save its broken weights over the good ones."""
    real, calls = Diffusion.loss, []

    def loss(self, *args):
        calls.append(0)
        return real(self, *args) * (math.nan if len(calls) > 7 else 1)

    monkeypatch.setattr(Diffusion, "loss", loss)
    cfg = tiny(train__precision=precision)
    with pytest.raises(ValueError, match="not finite.*last good"):
        train(cfg)
    state = load_checkpoint(Path(cfg["out"]) / "checkpoint.pt")
    assert state["step"] == 5 and all(w.isfinite().all() for w in state["model"].values())


def test_missing_data_names_the_remedy(tiny):
    """A newcomer would not learn how to prepare a data set."""
    with pytest.raises(ValueError, match="no such folder. Prepare"):
        train(tiny(data__root="/nowhere/prepared"))


# --------------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A full disk or a kill while saving would destroy the only checkpoint."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"good": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"good": 2})
    assert torch.load(path, weights_only=True) == {"good": 1}


@pytest.mark.parametrize("damage", ["truncated", "gone", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tiny, damage, capsys):
    """A broken disk or a stray rm would cost the whole run, and not only the steps since the last save."""
    train(tiny("whole"))
    path = Path(tiny("whole")["out"]) / "checkpoint.pt"
    whole = load_checkpoint(path)
    path.unlink() if damage == "gone" else os.truncate(path, 0 if damage == "empty" else path.stat().st_size // 2)
    train(tiny("whole"), resume=True)
    assert "used instead, step 5" in capsys.readouterr().out
    assert all(same(whole[key], load_checkpoint(path)[key]) for key in LEARNED)


def test_checkpoints_cannot_run_code(tmp_path):
    """A checkpoint from the internet could run anything."""

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'pwned'}",))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"model": Evil()}, tmp_path / "evil2.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save([1], tmp_path / "list.pt")
    for name in ("evil.pt", "evil2.pt", "text.pt", "list.pt"):
        with pytest.raises(ValueError, match=name):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


# ------------------------------------------------------------------------------------------------- learning


def test_ema_is_the_average_that_it_says(tiny, monkeypatch):
    """The averaged weights would lag behind, or average something else."""
    seen = []
    real = torch.amp.GradScaler.update
    models = []
    monkeypatch.setattr(train_module, "build", lambda *a, f=build: models.append(f(*a)) or models[-1])
    monkeypatch.setattr(torch.amp.GradScaler, "update", lambda self: (
        real(self), seen.append(models[0][0].out.weight.detach().clone()))[0])
    copies, real_copy = [], copy.deepcopy
    monkeypatch.setattr(copy, "deepcopy", lambda x: copies.append(real_copy(x)) or copies[-1])
    train(tiny(train__steps=6, train__ema=0.4))
    assert not any(p.requires_grad for p in copies[0].parameters())  # or every step would be remembered
    expected = torch.zeros_like(seen[0])  # which the last layer begins with
    for n, weight in enumerate(seen, start=1):
        decay = min(0.4, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(load_checkpoint(Path(tiny()["out"]) / "checkpoint.pt")["ema"]["out.weight"], expected, atol=1e-7)


def test_learning_rate_rises_and_falls(tiny, monkeypatch):
    """The learning rate would not warm up, not hold, or not fall with the root of the step."""
    rates, real = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (rates.append(self.param_groups[0]["lr"]), real(self, *a))[1])
    train(tiny(train__steps=9, train__lr=0.3, train__warmup=3, train__hold=4))
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3, *(0.3 * (4 / n) ** 0.5 for n in range(5, 10))])


@pytest.mark.parametrize("precision, bound", [("bf16", 0.05), ("fp16", 0.01)])
def test_half_precision_is_near_single(flat_root, tiny, precision, bound):
    """Half precision would train another network: its gradient is within the bound of float32's, in the Euclidean norm."""
    x0, mask = unpack(Pairs(flat_root, "train", (16, 16)).planes[:16], 4)
    gradients, losses = [], []
    for name in "fp32", precision:
        torch.manual_seed(0)
        model, diffusion, autocast = build(tiny(train__precision=name, model__hidden_dim=16), 4, torch.device("cpu"))
        with autocast():
            loss = diffusion.loss(model, x0, mask)
        (1024 * loss).backward()  # as GradScaler does
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=bound / 5)
    assert (gradients[1] - gradients[0]).norm() < bound * gradients[0].norm()


def test_accumulated_parts_make_the_same_step(tiny, monkeypatch):
    """Working through a batch in parts would make another step than the whole batch does."""
    def loss(self, model, x0, mask, *_):  # the same for a picture wherever it stands
        t = torch.arange(len(x0)) * 0 + 500
        return self.errors(model, x0, mask, t, x0.flip(-2), None)[0].mean()

    monkeypatch.setattr(Diffusion, "loss", loss)
    for parts in 1, 4:
        train(tiny(f"in{parts}", train__steps=3, train__accumulate=parts))
    a, b = (load_checkpoint(Path(tiny(f"in{parts}")["out"]) / "checkpoint.pt") for parts in (1, 4))
    assert all(torch.allclose(a["model"][key], b["model"][key], atol=1e-5) for key in a["model"])
    with pytest.raises(ValueError, match="multiple of 3"):
        train(tiny("in3", train__accumulate=3))


def test_activation_checkpointing_computes_the_same(tiny):
    """Saving memory would change the training."""
    for name, on in ("kept", "false"), ("again", "true"):
        train(tiny(name, train__steps=3, train__activation_checkpointing=on))
    a, b = (load_checkpoint(Path(tiny(name)["out"]) / "checkpoint.pt") for name in ("kept", "again"))
    assert all(same(a[key], b[key]) for key in LEARNED)


def test_validation_is_repeatable_and_reports_eps(flat_root):
    """Two validation losses could not be compared, or the error on eps would be another quantity."""
    diffusion, pairs = Diffusion(), Pairs(flat_root, "val", (16, 16))

    class Zero(torch.nn.Module):  # predicts 0, whose mean squared error on the noise is 1
        num_classes = 4

        def forward(self, x, t, mask, keep=None):
            return torch.zeros_like(x)

    autocast = lambda: torch.autocast("cpu", enabled=False)  # noqa: E731
    args = Zero(), diffusion, pairs, 10, 4, 4, torch.device("cpu"), autocast
    loss, bins, eps = validate(*args)
    assert validate(*args) == (loss, bins, eps) and eps == loss == pytest.approx(1, abs=0.05)
    assert validate(*args[:5], 3, *args[6:])[0] == pytest.approx(loss, abs=1e-6)  # whatever the batch


def test_unconditional_baseline_trains(tiny):
    """The thesis's baseline, a network without a mask stem, could not be trained."""
    cfg = tiny(model__conditional="false", train__steps=4, train__preview_every=4)
    train(cfg)
    state = load_checkpoint(Path(cfg["out"]) / "checkpoint.pt")
    assert not [key for key in state["model"] if "mask_stem" in key]


def test_a_trained_model_obeys_its_mask(tiny):
    """The whole path, data to picture, would not do what it is for."""
    never = {f"train__{name}_every": 999 for name in ("val", "preview", "save")}
    cfg = tiny(train__steps=160, train__lr=0.003, train__warmup=10, train__batch_size=16, model__hidden_dim=16, **never)
    train(cfg)
    state = load_checkpoint(Path(cfg["out"]) / "checkpoint.pt")
    model, diffusion, _ = build(cfg, 4, torch.device("cpu"))
    model.load_state_dict(state["ema"])
    truth = torch.stack([torch.from_numpy(flat_scene(seed)[1]) for seed in range(900, 908)])  # none of them trained on
    eps_fn = guided_eps(model, diffusion, one_hot(truth, 4), guidance=1.0)
    x = sample(eps_fn, noise_like_seeds(range(8), (3, 16, 16)), diffusion.alpha_bar, steps=10)
    looks = torch.from_numpy(LOOKS).float() / 127.5 - 1
    nearest = (x[:, None] - looks[None, :, :, None, None]).square().sum(2).argmin(1)
    assert (nearest == truth).float().mean() > 0.95


def test_command_line(tiny, tmp_path):
    """`python train.py --config ...` would not run, or a user's mistake would end in a traceback or exit code 0."""
    config = tmp_path / "my.yaml"
    config.write_text(yaml.safe_dump(tiny(train__steps=2)))
    good = subprocess.run([sys.executable, "train.py", "--config", config], capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    bad = subprocess.run([sys.executable, "train.py", "--config", config], capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stderr.startswith("error: ") and "--resume" in bad.stderr
