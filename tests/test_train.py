"""Training: the loop, what a run leaves behind, and how it goes on, through train() and the command line."""

import csv
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import LOOKS, flat_scene
from PIL import Image

import checkpoint as checkpoint_module
import train as train_module
from benchmarks.faults import same
from checkpoint import build, load_checkpoint
from config import load_config
from dataset import Pairs, batches, to_uint8, unpack
from ddpm import Diffusion, guided_eps, noise_like_seeds, sample
from masks import Colorbook, one_hot
from train import train, validate
from unet import UNet

LEARNED = ("model", "ema", "optimizer", "scaler", "rng", "step", "images")
NEVER = {f"train__{name}_every": 999 for name in ("val", "preview", "save", "log")}  # but at the last step


def saved(cfg):
    return load_checkpoint(Path(cfg["out"]) / "checkpoint.pt")


def rows(cfg):
    return list(csv.DictReader(open(Path(cfg["out"]) / "log.csv")))


def files(folder):
    """{path: content and time of change} of all that is in a folder, but for the lock, which is taken to look."""
    return {path: path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.name != ".lock"}


def command_line(monkeypatch, *arguments):
    """`python train.py ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train_module.main()


def spy(monkeypatch, owner, name, before=lambda *args, **kwargs: None):
    """Call `before` with the arguments of every call of owner.name."""
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: (before(*args, **kwargs), real(*args, **kwargs))[1])


# ------------------------------------------------------------------------------------------------- the loop


def train_by_hand(root):
    """The training loop of the thesis, written without train.py: the network, its EMA and the optimiser."""
    pairs, diffusion = Pairs(root, "train", [24, 16]), Diffusion(50, "linear", 0.001, 0.1, "v")
    augment = {"p": 0.5, "brightness": 0.3, "contrast": 0, "saturation": 0.1, "hue": 0.1,
               "vertical_flip": True, "rotate": 20, "crop": 0.6}
    planes = batches(pairs, 6, 5, flip=0.9, augment=augment)
    torch.manual_seed(5)
    model = UNet(4, 8, 16).to(memory_format=torch.channels_last)
    torch.nn.init.zeros_(model.out.weight)
    torch.nn.init.zeros_(model.out.bias)
    ema = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.8), fused=True)
    for n in range(1, 10):
        optimizer.param_groups[0]["lr"] = [0.001, 0.002, 0.003, 0.003][n - 1] if n < 5 else 0.003 * math.sqrt(4 / n)
        t, eps, keep = torch.randint(50, (6,)), torch.randn(6, 3, 24, 16), torch.rand(6) >= 0.4
        x0, mask = unpack(next(planes), 4)
        optimizer.zero_grad()
        diffusion.loss(model, x0, mask, t, eps, keep).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.02)
        optimizer.step()
        decay = min(0.35, (1 + n) / (10 + n))  # grows to 0.35 in the first 4 steps
        for name, weight in model.named_parameters():
            ema[name].lerp_(weight.detach(), 1 - decay)
    return model.state_dict(), ema, optimizer.state_dict()


def test_a_run_equals_a_loop_written_by_hand(tiny, flat_root):
    """Every setting of the loop does what it says, bit for bit; "model" and "ema" of the checkpoint are these."""
    cfg = tiny(seed=5, train__steps=9, train__batch_size=6, train__lr=0.003, train__warmup=3, train__hold=4,
               train__beta2=0.8, train__grad_clip=0.02, train__label_drop=0.4, train__ema=0.35, data__size=[24, 16],
               data__flip=0.9, data__augment__p=0.5, data__augment__brightness=0.3, data__augment__contrast=0,
               data__augment__saturation=0.1, data__augment__hue=0.1, data__augment__vertical_flip="true",
               data__augment__rotate=20, data__augment__crop=0.6, diffusion__T=50, diffusion__schedule="linear",
               diffusion__beta_start=0.001, diffusion__beta_end=0.1, diffusion__prediction="v")
    train(cfg)
    model, ema, optimizer = train_by_hand(flat_root)
    state = saved(cfg)
    assert same(dict(state["model"]), dict(model)) and same(dict(state["ema"]), ema)
    assert same(state["optimizer"], optimizer) and not same(dict(model), ema)


def test_the_first_prediction_is_zero(tiny, monkeypatch):
    """Weight and bias of the last layer begin at 0, so the first output of the network is exactly 0."""
    outputs, real = [], UNet.forward

    def forward(self, *args, **kwargs):
        outputs.append(real(self, *args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(UNet, "forward", forward)
    train(tiny(train__steps=2, **NEVER))
    assert not outputs[0].any() and outputs[1].any()


def test_micro_batches_have_the_gradient_of_the_batch(tiny, monkeypatch):
    """Accumulating 2 or 4 micro-batches gives the gradient of the batch: they share its t, noise and label drops."""
    gradients = []
    spy(monkeypatch, torch.optim.AdamW, "step", lambda self, *_: gradients.append(
        torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]])))
    for accumulate in 1, 2, 4:
        train(tiny(f"in{accumulate}", train__steps=3, train__accumulate=accumulate, train__label_drop=0.5,
                   train__lr=1e-4, train__grad_clip=1e6, data__augment__p=0.5, **NEVER))
    for step in range(3):
        expected = gradients[step]
        for gradient in gradients[step + 3], gradients[step + 6]:
            assert (gradient - expected).norm() < 1e-4 * expected.norm()
    losses = [rows(tiny(f"in{accumulate}"))[0]["loss"] for accumulate in (1, 2, 4)]
    assert list(map(float, losses)) == pytest.approx([float(losses[0])] * 3, rel=1e-4)
    with pytest.raises(ValueError, match="multiple of 3"):
        train(tiny("in3", train__accumulate=3))


def test_fp16_clips_the_gradient_itself(tiny, capsys):
    """With a loss scale of 65536 the gradient norm that is logged, and the clipped one, are those of fp32."""
    norms = {}
    for precision in "fp32", "fp16":
        cfg = tiny(precision, train__precision=precision, train__steps=1, train__grad_clip=0.01)
        train(cfg)
        moments = saved(cfg)["optimizer"]["state"].values()  # after a step: (1 - beta1) times the clipped gradient
        norms[precision] = torch.cat([m["exp_avg"].flatten() for m in moments]).norm().item() / 0.1
        norms[precision, "logged"] = float(rows(cfg)[0]["grad_norm"])
    assert saved(cfg)["scaler"]["scale"] == 65536
    assert norms["fp32", "logged"] > 0.1 and norms["fp16", "logged"] == pytest.approx(norms["fp32", "logged"], rel=0.02)
    assert [norms["fp32"], norms["fp16"]] == pytest.approx([0.01, 0.01], rel=1e-3)
    assert "fp16 is slow on a CPU" in capsys.readouterr().out


@pytest.mark.parametrize("precision, bound", [("bf16", 0.05), ("fp16", 0.01)])
def test_half_precision_is_near_single(flat_root, tiny, precision, bound):
    """The gradient in half precision is within the bound of float32's, in the Euclidean norm."""
    x0, mask = unpack(Pairs(flat_root, "train", (16, 16)).planes[:16], 4)
    gradients, losses = [], []
    for name in "fp32", precision:
        torch.manual_seed(0)
        cfg = tiny(train__precision=name, model__hidden_dim=16)
        model, diffusion, autocast = build(cfg, 4, torch.device("cpu"))
        with autocast():
            loss = diffusion.loss(model, x0, mask, *diffusion.draw(x0.shape))
        (1024 * loss).backward()  # as GradScaler does
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=bound / 5)
    assert (gradients[1] - gradients[0]).norm() < bound * gradients[0].norm()


def test_activation_checkpointing_computes_the_same(tiny):
    """Computing activations again in the backward pass trains the same weights, bit for bit."""
    for name, on in ("kept", "false"), ("again", "true"):
        train(tiny(name, train__steps=3, train__activation_checkpointing=on, **NEVER))
    kept, again = saved(tiny("kept")), saved(tiny("again"))
    assert all(same(kept[key], again[key]) for key in LEARNED)


def test_unconditional_baseline_trains(tiny):
    """A network without a mask stem trains, validates, draws previews and goes on."""
    train(tiny(model__conditional="false", train__steps=3, train__val_every=1, train__preview_every=3))
    train(tiny(model__conditional="false", train__steps=4), resume=True)
    state = saved(tiny())
    assert state["step"] == 4 and not [key for key in state["model"] if "mask_stem" in key]


def test_a_trained_model_obeys_its_mask(tiny):
    """From data to image: 95 % of the pixels of samples have the look of their mask's class, on masks never seen."""
    cfg = tiny(train__steps=160, train__lr=0.003, train__warmup=10, train__batch_size=16, model__hidden_dim=16, **NEVER)
    train(cfg)
    model, diffusion, _ = build(cfg, 4, torch.device("cpu"))
    model.load_state_dict(saved(cfg)["ema"])
    truth = torch.stack([torch.from_numpy(flat_scene(seed)[1]) for seed in range(900, 908)])
    eps_fn = guided_eps(model, diffusion, one_hot(truth, 4), guidance=1.0)
    x = sample(eps_fn, noise_like_seeds(range(8), (3, 16, 16)), diffusion.alpha_bar, steps=10)
    looks = torch.from_numpy(LOOKS).float() / 127.5 - 1
    nearest = (x[:, None] - looks[None, :, :, None, None]).square().sum(2).argmin(1)
    assert (nearest == truth).float().mean() > 0.95


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_non_finite_loss_keeps_the_last_good_checkpoint(tiny, monkeypatch, precision):
    """A run that diverges stops, names the step, and leaves the weights that it saved before."""
    real, calls = Diffusion.loss, []

    def loss(self, *args):
        calls.append(0)
        return real(self, *args) * (math.nan if len(calls) > 7 else 1)

    monkeypatch.setattr(Diffusion, "loss", loss)
    cfg = tiny(train__precision=precision)
    with pytest.raises(ValueError, match="step 8.*not finite.*last good"):
        train(cfg)
    state = saved(cfg)
    assert state["step"] == 5 and all(w.isfinite().all() for w in state["model"].values())


# -------------------------------------------------------------------------------------- looking at the network


def test_looking_does_not_change_the_run(tiny):
    """Validation and previews leave the random numbers of training alone."""
    train(tiny("often", train__steps=6, train__val_every=1, train__preview_every=2))
    train(tiny("never", train__steps=6, **NEVER))
    often, never = saved(tiny("often")), saved(tiny("never"))
    assert all(same(often[key], never[key]) for key in LEARNED)


def test_intervals(tiny, monkeypatch):
    """Log, validation, previews and checkpoints keep intervals of their own, each with a row; all come at the end."""
    steps = []
    spy(monkeypatch, train_module, "save_checkpoint", lambda path, state: steps.append(state["step"]))
    cfg = tiny(train__steps=13, train__log_every=5, train__val_every=4, train__preview_every=6, train__save_every=3)
    train(cfg)
    assert steps == [3, 6, 9, 12, 13]
    assert [row["step"] for row in rows(cfg)] == ["3", "4", "5", "6", "8", "9", "10", "12", "13"]
    assert [row["step"] for row in rows(cfg) if row["val_loss"]] == ["4", "8", "12", "13"]
    previews = sorted(path.name for path in (Path(cfg["out"]) / "previews").iterdir())
    assert previews == ["0000006.png", "0000012.png", "0000013.png"]


def test_validation_and_previews_are_of_the_ema_and_the_right_split(tiny, flat_root, monkeypatch):
    """val_eps, val_loss and previews come from the EMA, val_eps_raw from the raw weights; all see data.val's masks."""
    masks, real = [], UNet.forward

    def forward(self, x, t, mask=None, **kwargs):
        if not torch.is_grad_enabled() and mask is not None:  # validation; a preview hands over features
            masks.append(mask)
        return real(self, x, t, mask, **kwargs)

    monkeypatch.setattr(UNet, "forward", forward)
    cfg = tiny(data__val="test", diffusion__T=30, train__lr=0.02, train__warmup=1, train__ema=0.5, train__steps=12,
               train__previews=3, train__batch_size=4, sample__guidance=2.5, **NEVER)
    train(cfg)
    pairs, state = Pairs(flat_root, "test", (16, 16)), saved(cfg)
    x0, expected_masks = unpack(pairs.planes, 4)
    assert torch.equal(torch.cat(masks), torch.cat([expected_masks, expected_masks]))  # for the EMA, then the raw ones

    model, diffusion, autocast = build(cfg, 4, torch.device("cpu"))
    errors, images = {}, {}
    for weights in "ema", "model":
        model.load_state_dict(state[weights])
        errors[weights] = validate(model, diffusion, pairs, 256, 4, torch.device("cpu"), autocast)
        for guidance in 2.5, 1.0:
            eps_fn = guided_eps(model, diffusion, expected_masks[[0, 2, 4]], guidance)
            x = sample(eps_fn, noise_like_seeds(range(3), (3, 16, 16)), diffusion.alpha_bar, "dpm_solver", 20)
            images[weights, guidance] = to_uint8(x)
    row = rows(cfg)[-1]
    expected = errors["ema"] | {"val_eps_raw": errors["model"]["val_eps"]}
    assert {key: float(row[key]) for key in expected} == pytest.approx(expected, rel=1e-4) and len(expected) == 7
    assert row["val_eps"] != row["val_eps_raw"] and row["val_eps"] != row["val_loss"]

    sheet = np.array(Image.open(Path(cfg["out"]) / "previews" / "0000012.png"))[4::, 4::]
    cells = [[sheet[132 * r : 132 * r + 128 : 8, 132 * c : 132 * c + 128 : 8] for c in range(3)] for r in range(3)]
    planes = pairs.planes[[0, 2, 4]].numpy()
    colours = np.array(list(pairs.colorbook.classes.values()), np.uint8)
    assert np.array_equal(cells[0], colours[planes[:, 3]])
    assert np.array_equal(cells[1], planes[:, :3].transpose(0, 2, 3, 1))
    assert np.array_equal(cells[2], images["ema", 2.5])
    assert not any(np.array_equal(cells[2], images[other]) for other in images if other != ("ema", 2.5))


class Rising(torch.nn.Module):
    """Predicts an eps that is 0, 1, 2, 3 in the four quarters of T = 1000: mean squared errors of 1, 2, 5, 10."""

    num_classes, seen = 4, ()

    def forward(self, x, t, mask, keep=None):
        self.seen += tuple(t.tolist())
        return torch.zeros_like(x) + (t // 250)[:, None, None, None]


def test_validation_by_quarters_of_t(flat_root):
    """Each quarter of t has its own mean, the same for any batch size and when repeated; a batch has all quarters."""
    def look(count, batch_size, model=None):
        autocast = lambda: torch.autocast("cpu", enabled=False)  # noqa: E731
        return validate(model or Rising(), Diffusion(), pairs, count, batch_size, torch.device("cpu"), autocast)

    pairs, model = Pairs(flat_root, "train", (16, 16)), Rising()
    found = look(48, 16, model)
    assert [{t // 250 for t in model.seen[i : i + 16]} for i in (0, 16, 32)] == [{0, 1, 2, 3}] * 3  # not image by image
    assert len(set(model.seen)) == 48 and min(model.seen) == 10 and max(model.seen) == 989
    assert [found[name] for name in train_module.QUARTERS] == pytest.approx([1, 2, 5, 10], rel=0.03)
    assert found["val_loss"] == found["val_eps"] == pytest.approx(4.5, rel=0.03)
    assert look(48, 16) == found
    assert look(48, 7)["val_loss"] == pytest.approx(found["val_loss"], abs=1e-5)
    quarters = [look(3, 16)[name] for name in train_module.QUARTERS]  # of t = 166, 500 and 833
    assert math.isnan(quarters[1]) and [quarters[i] for i in (0, 2, 3)] == pytest.approx([1, 5, 10], rel=0.2)


# ---------------------------------------------------------------------------------------------- files of a run


def test_run_leaves_what_the_readme_names(tiny):
    """A run leaves its log, previews, checkpoint and config, and all numbers in them are finite."""
    cfg = tiny()
    train(cfg)
    out, state = Path(cfg["out"]), saved(cfg)
    assert [row["step"] for row in rows(cfg)] == ["2", "4", "5", "6", "8", "10"]
    assert all(math.isfinite(float(value)) for row in rows(cfg) for value in row.values() if value)
    assert [row["epoch"] for row in rows(cfg)] == ["0.32", "0.64", "0.8", "0.96", "1.28", "1.6"]  # 8 of 50 a step
    assert (out / "previews" / "0000010.png").exists() and load_config(out / "config.yaml") == cfg
    assert (state["step"], state["images"], state["config"]) == (10, 80, cfg)
    assert list(state["colorbook"]) == ["road", "sky", "car", "person"]


def test_the_log_has_plain_lines_and_empty_cells(tiny):
    """Lines end in a line feed alone, and a quarter of t without a pair, of 3 in all, is an empty cell."""
    cfg = tiny(train__val_pairs=3)
    train(cfg)
    train(tiny(train__val_pairs=3, train__steps=12), resume=True)
    text = (Path(cfg["out"]) / "log.csv").read_bytes()
    assert b"\r" not in text and b"nan" not in text and text.endswith(b"\n")
    assert text.splitlines()[0] == (b"step,epoch,seconds,images_per_s,loss,grad_norm,val_loss,"
                                    b"val_loss_q1,val_loss_q2,val_loss_q3,val_loss_q4,val_eps,val_eps_raw")
    looked = [row for row in rows(cfg) if row["val_loss"]]
    assert [row["step"] for row in looked] == ["5", "10", "12"]
    assert all(row["val_loss_q2"] == "" and row["val_loss_q1"] and row["val_loss_q4"] for row in looked)


def test_images_per_s_is_of_training_alone(tiny, monkeypatch):
    """Where a step of 8 images takes 1 s, and validation, previews and saving 1000 s each, they are 8 a second."""
    clock = [0.0]
    monkeypatch.setattr(train_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    spy(monkeypatch, torch.optim.AdamW, "step", lambda *_: clock.append(clock.pop() + 1))
    for name in "validate", "preview", "save_checkpoint":
        spy(monkeypatch, train_module, name, lambda *_: clock.append(clock.pop() + 1000))
    train(tiny(train__steps=7, train__val_every=3, train__save_every=4, train__preview_every=5))
    assert [row["images_per_s"] for row in rows(tiny())] == ["8"] * 6  # steps 2 to 7
    assert [float(row["seconds"]) for row in rows(tiny())] == [2, 3, 2004, 3005, 4006, 6007]  # all that passed
    train(tiny(train__steps=9, train__val_every=9), resume=True)
    assert [row["images_per_s"] for row in rows(tiny())[6:]] == ["8"] * 2
    assert [float(row["seconds"]) for row in rows(tiny())[6:]] == [6008, 6009]  # without what came after its last row


def test_missing_data_names_the_remedy(tiny):
    """Data that do not exist, or are not named, end in a message that says how to get them."""
    with pytest.raises(ValueError, match="/nowhere/prepared.*Prepare one"):
        train(tiny(data__root="/nowhere/prepared"))
    with pytest.raises(ValueError, match="--set data.root=.*--preset"):
        train(tiny(data__root=""))


def occupied(out):
    out.mkdir()
    (out / "log.csv").write_text("step\n")
    return out


REFUSED = {  # what a run is refused for, before it reads data: how the folder is made so, and words of the message
    "an existing run": (lambda out, _: occupied(out), "not empty.*--resume"),
    "a full disk": (lambda out, monkeypatch: monkeypatch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6)), "0.0 GiB free.*--set out="),
    "a file in its place": (lambda out, _: out.write_text("mine"), "run.*cannot be written.*--set out="),
    "a folder below a file": (lambda out, _: out.parent.joinpath("file").write_text("mine"), "cannot be written"),
    "no permission": (lambda _, monkeypatch: monkeypatch.setattr(os, "access", lambda *_: False), "cannot be written"),
}


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_fail_later_is_refused_before_data_are_read(tiny, tmp_path, monkeypatch, reason, dry_run):
    """An existing run, a full disk and a folder that cannot be written end a run, dry or real, before data are read."""
    spoil, words = REFUSED[reason]
    cfg = tiny("file/run" if reason == "a folder below a file" else "run")
    spoil(tmp_path / "run", monkeypatch)
    before = files(tmp_path)
    monkeypatch.setattr(train_module, "Pairs", lambda *_: pytest.fail("data were read"))
    with pytest.raises((ValueError, OSError), match=words):
        train(cfg, dry_run=dry_run)
    assert files(tmp_path) == before


def test_dry_run_reads_all_and_writes_nothing(tiny, flat_root, tmp_path, capsys):
    """A dry run reports parameters and epochs, and finds a bad pair; nothing in any folder changes."""
    root = tmp_path / "data"
    shutil.copytree(flat_root, root)
    cfg, before = tiny(data__root=root, data__memory_gb=0), files(tmp_path)  # a run would write a map of its data
    train(cfg, dry_run=True)
    printed = capsys.readouterr().out
    assert files(tmp_path) == before
    assert "50 pairs, which is 1.6 epochs" in printed and "349,331 parameters" in printed
    (root / "train" / "images" / "flat_7.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="flat_7.png"):
        train(cfg, dry_run=True)


def test_dry_run_draws_no_toy_scenes(tiny, tmp_path, monkeypatch, capsys):
    """Toy scenes that are missing are named and not drawn; a real run draws them in the size of the config."""
    monkeypatch.setattr("data.toy.prepare.prepare", lambda root, size: pytest.fail(f"{root} drawn in {size}"))
    cfg = tiny(data__root=tmp_path / "toy" / "prepared", data__size=[16, 24])
    train(cfg, dry_run=True)
    assert not list(tmp_path.iterdir()) and str(tmp_path / "toy" / "prepared") in capsys.readouterr().out
    with pytest.raises(pytest.fail.Exception, match=r"toy/prepared drawn in \(16, 24\)"):
        train(cfg)


# ---------------------------------------------------------------------------------------------- stop and go on


def test_existing_run_is_not_overwritten(tiny, capsys):
    """A second call is refused, and so is one after the checkpoint was deleted; --resume begins such a run again."""
    cfg = tiny(train__steps=2)
    train(cfg)
    before, path = files(Path(cfg["out"])), Path(cfg["out"]) / "checkpoint.pt"
    with pytest.raises(FileExistsError, match="--resume"):
        train(cfg)
    assert files(Path(cfg["out"])) == before
    first = saved(cfg)
    path.unlink()
    with pytest.raises(FileExistsError, match="--resume"):
        train(cfg)
    train(cfg, resume=True)
    assert "no checkpoint yet" in capsys.readouterr().out
    assert same(first["model"], saved(cfg)["model"])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume_is_bit_for_bit(tiny, precision):
    """A run that is stopped and resumed in the middle of an epoch ends as one that never stopped."""
    settings = {"train__precision": precision, "data__augment__p": 0.5, "train__batch_size": 7, **NEVER}
    train(tiny("straight", **settings, train__steps=6))
    train(tiny("resumed", **settings, train__steps=3))
    train(tiny("resumed", **settings, train__steps=6), resume=True)
    straight, resumed = saved(tiny("straight")), saved(tiny("resumed"))
    for key in LEARNED:
        assert same(straight[key], resumed[key]), key
    assert straight["step"] == 6 and not same(straight["model"], straight["ema"])
    assert rows(tiny("straight"))[-1]["val_eps"] == rows(tiny("resumed"))[-1]["val_eps"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_resume(tiny, number, monkeypatch):
    """Ctrl-C and SIGTERM end the run after the step, saved; the next signal has its own handler; nothing is lost."""
    train(tiny("straight", **NEVER))
    calls, handlers, before = [], [], signal.getsignal(number)

    def stop(*_):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
            handlers.append(signal.getsignal(number))

    with monkeypatch.context() as patch:
        spy(patch, Diffusion, "loss", stop)
        with pytest.raises(SystemExit) as stopped:
            train(tiny("stopped", **NEVER))
    assert stopped.value.code == 128 + number and saved(tiny("stopped"))["step"] == len(calls) == 3
    assert handlers == [signal.SIG_DFL] and signal.getsignal(number) is before
    train(tiny("stopped", **NEVER), resume=True)
    straight, resumed = saved(tiny("straight")), saved(tiny("stopped"))
    assert all(same(straight[key], resumed[key]) for key in LEARNED)


def test_the_loaded_checkpoint_leaves_the_memory(tiny, monkeypatch):
    """While a resumed run trains, the weights of the checkpoint are held by the network alone."""
    train(tiny(train__steps=2, **NEVER))
    loaded, alive, real = [], [], checkpoint_module.load_checkpoint

    def load(path):
        state = real(path)
        loaded.extend(weakref.ref(state[key]["out.weight"]) for key in ("model", "ema"))
        return state

    monkeypatch.setattr(checkpoint_module, "load_checkpoint", load)
    spy(monkeypatch, Diffusion, "loss", lambda *_: alive.append([tensor() is not None for tensor in loaded]))
    train(tiny(train__steps=3, **NEVER), resume=True)
    assert alive == [[False, False]]


def test_rows_past_the_checkpoint_are_logged_once(tiny):
    """Rows after the checkpoint, whose steps are made again, and a row that was cut short leave the log."""
    cfg = tiny(train__steps=5)
    train(cfg)
    with open(Path(cfg["out"]) / "log.csv", "a") as file:
        file.write("6,1,1,1,1,1,,,,,,,\n1")  # the second one was to be step 10
    train(tiny(), resume=True)
    assert [row["step"] for row in rows(cfg)] == ["2", "4", "5", "6", "8", "10"]


def test_resume_refuses_another_task(tiny, flat_root, tmp_path):
    """Another network, diffusion or colorbook is refused by name, and the run's folder stays as it was."""
    train(tiny(train__steps=2))
    folder = Path(tiny()["out"])
    before = files(folder)
    for setting, words in (("model__hidden_dim=16", "model.hidden_dim was 8, is 16"),
                           ("diffusion__T=500", "diffusion.T was 1000, is 500"),
                           ("diffusion__prediction=eps", "diffusion.prediction was v, is eps")):
        key, value = setting.split("=")
        with pytest.raises(ValueError, match=words):
            train(tiny(**{key: value}), resume=True)
    root, colorbook = tmp_path / "renamed", Colorbook.load(flat_root / "colorbook.json")
    shutil.copytree(flat_root, root)
    Colorbook(dict(reversed(colorbook.classes.items()))).save(root / "colorbook.json")
    with pytest.raises(ValueError, match="another network or colorbook: class .*road.* was there, is .*person"):
        train(tiny(data__root=root), resume=True)
    assert files(folder) == before


def test_printed_commands_can_be_pasted(tiny, capsys):
    """The folder of a run is quoted where a command with it is printed."""
    cfg = tiny("my run", train__steps=2)
    train(cfg)
    assert f"--checkpoint '{cfg['out']}/checkpoint.pt'" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=f"--resume '{cfg['out']}'"):
        train(cfg)


@pytest.mark.parametrize("folder", ["..", "train", "nowhere"])
def test_a_wrong_root_is_explained(tiny, flat_root, folder):
    """A folder above, inside or beside a data set is refused as data.root, with what was expected and where."""
    root = Path(os.path.abspath(flat_root / folder))
    with pytest.raises(ValueError, match=f"data.root {root} is no prepared data set: expected colorbook.json"):
        train(tiny(data__root=root))


def test_optimiser_settings_change_on_resume(tiny):
    """Adam's beta2, which the checkpoint's optimiser brings along too, is that of the settings after --resume."""
    train(tiny(train__steps=2))
    train(tiny(train__beta2=0.5), resume=True)
    groups = load_checkpoint(Path(tiny()["out"]) / "checkpoint.pt")["optimizer"]["param_groups"]
    assert [tuple(group["betas"]) for group in groups] == [(0.9, 0.5)]


def hold(cfg):
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train(cfg)


def test_one_training_at_a_time_in_a_folder(tiny):
    """While a run trains a second one in its folder is refused; after SIGKILL the folder is free at once."""
    cfg = tiny(train__steps=10**6, train__save_every=2, train__preview_every=10**6, train__val_every=10**6)
    first = multiprocessing.get_context("fork").Process(target=hold, args=(cfg,), daemon=True)
    first.start()
    path, until = Path(cfg["out"]) / "checkpoint.pt", time.monotonic() + 60
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.05)
    with pytest.raises(OSError, match="another training"):
        train(tiny(train__steps=1), resume=True)  # one step: where it is not refused, it ends at once
    assert first.is_alive()
    first.kill()
    first.join()
    step = saved(cfg)["step"]
    train(tiny(train__steps=step + 1, **NEVER), resume=True)
    assert saved(cfg)["step"] == step + 1


# ---------------------------------------------------------------------------------------------- the command line


def test_resume_alone_goes_on_with_the_settings_of_the_run(tiny, tmp_path, monkeypatch, capsys):
    """`--resume RUN` needs nothing else; --set changes what it names, which is printed."""
    cfg = tiny("my run #2", train__steps=3, train__lr=0.0007, seed=9, data__flip=0.25, train__batch_size=5, **NEVER)
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(yaml.safe_dump(cfg | {"out": "my run #2"}))
    run = Path("my run #2")
    command_line(monkeypatch, "--config", "my.yaml")
    first = yaml.safe_load((run / "config.yaml").read_text())
    assert first == cfg | {"out": "my run #2"}

    before = files(run)
    command_line(monkeypatch, "--resume", "my run #2", "--set", "train.steps=5", "--dry-run")
    assert files(run) == before

    capsys.readouterr()
    command_line(monkeypatch, "--resume", "my run #2/", "--set", "train.steps=5", "--set", "data.size=[24,16]")
    printed = capsys.readouterr().out.splitlines()
    second = yaml.safe_load((run / "config.yaml").read_text())
    expected = first | {"train": first["train"] | {"steps": 5}, "data": first["data"] | {"size": [24, 16]}}
    assert second == expected == saved(second)["config"]
    assert [line for line in printed if line.startswith("resuming")] == [
        "resuming: data.size was [16, 16], is [24, 16]", "resuming: train.steps was 3, is 5"]

    command_line(monkeypatch, "--resume", "my run #2")
    assert "already" in capsys.readouterr().out
    assert yaml.safe_load((run / "config.yaml").read_text()) == second


@pytest.mark.parametrize("arguments, words", [
    (["--resume", "tpyo"], "tpyo.*no run to resume"),
    (["--resume", "run", "--config", "my.yaml"], "leave out --config and --preset"),
    (["--resume", "run", "--preset", "toy"], "leave out --config and --preset"),
    (["--resume", ""], "no run to resume"),
    (["--resume", "run", "--set", "out=other"], "--resume run.*leave out.*--set out"),
])
def test_resume_of_what_is_no_run(tiny, tmp_path, monkeypatch, arguments, words):
    """A folder that is no run, or two folders at once, are refused with a line that names them."""
    train(tiny(train__steps=2, **NEVER))
    shutil.copy("config.yaml", tmp_path)  # as where the project lies
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        command_line(monkeypatch, *arguments)
    assert files(tmp_path) == before


def test_another_batch_size_goes_on_within_the_epoch(tiny, flat_root, monkeypatch):
    """3 batches of 7, then 1 of 29, are every image of the epoch once; log and progress bar count images."""
    seen, bars, real = [], [], train_module.tqdm
    settings = {"data__flip": 0, **NEVER}
    train(tiny("other", **settings, train__steps=1, train__batch_size=50))

    def new_bar(*args, **kwargs):
        bars.append(real(*args, **kwargs))
        return bars[-1]

    monkeypatch.setattr(train_module, "tqdm", new_bar)
    spy(monkeypatch, train_module, "unpack", lambda planes, _: seen.extend(planes) if torch.is_grad_enabled() else None)
    train(tiny(**settings, train__steps=3, train__batch_size=7))
    train(tiny(**settings, train__steps=4, train__batch_size=29), resume=True)
    pairs = Pairs(flat_root, "train", (16, 16))
    assert sorted(planes.numpy().tobytes() for planes in seen) == sorted(
        planes.numpy().tobytes() for planes in pairs.planes)
    assert [row["epoch"] for row in rows(tiny())] == ["0.42", "1"]
    assert [(bar.initial, bar.n, bar.total, bar.unit) for bar in bars] == [(0, 21, 21, "img"), (21, 50, 50, "img")]
    assert saved(tiny())["images"] == 50


def test_command_line(tiny, tmp_path, monkeypatch, capsys):
    """Config, preset and --set reach the run, from any folder; a mistake of the user is one line and exit code 1."""
    config = tmp_path / "my.yaml"
    presets = {"mine": {"train": {"lr": 0.0123, "steps": 7}, "data": {"flip": 0.75}}}
    config.write_text(yaml.safe_dump(tiny(**NEVER) | {"presets": presets}))
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", config, "--preset", "mine", "--set", "train.steps=1", "--set", "data.flip=0.125"]
    command_line(monkeypatch, *arguments, "--dry-run")
    assert not (tmp_path / "run").exists()
    command_line(monkeypatch, *arguments)
    settings = load_config(tmp_path / "run" / "config.yaml")
    assert [settings["train"]["lr"], settings["train"]["steps"], settings["data"]["flip"]] == [0.0123, 1, 0.125]
    assert "next: python sample.py --checkpoint" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^error: .*--resume"):
        command_line(monkeypatch, *arguments)
