"""What the benchmarks count and compute, not how fast this machine is."""

import csv
import math
import re
import sys

import numpy as np
import pytest
import torch
from conftest import LOOKS
from PIL import Image

from benchmarks import held_out, ladder, speed, steps, timing
from checkpoint import load_checkpoint
from config import load_config
from dataset import Pairs
from ddpm import Diffusion, guided_eps
from train import train
from unet import UNet


@pytest.fixture
def command(monkeypatch):
    """command(module, "--n", 2, ...) runs the main() of a benchmark with these arguments."""

    def call(module, *options):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, options)])
        module.main()

    return call


@pytest.fixture(scope="module")
def run(flat_root, tmp_path_factory):
    """The folder of a short run on the flat scenes, T = 24, with unusual settings of sampling."""
    out = tmp_path_factory.mktemp("run")
    settings = {"device": "cpu", "out": out, "data.root": flat_root, "data.size": [16, 16], "model.hidden_dim": 8,
                "model.emb_dim": 16, "diffusion.T": 24, "diffusion.beta_end": 0.5, "train.batch_size": 8,
                "train.steps": 4, "train.val_every": 2, "train.save_every": 4, "train.preview_every": 2,
                "train.previews": 2, "train.log_every": 2, "sample.steps": 7, "sample.guidance": 2.5,
                "sample.sampler": "plms"}
    train(load_config("config.yaml", "toy", [f"{key}={value}" for key, value in settings.items()]))
    return out


# -------------------------------------------------------------------------------------------------- timing


def test_operations_of_the_thesis_size():
    """Operations are those derived by hand from the layers: 209.8 GFLOP forward, 628.6 for a training image."""
    forward, training = timing.count_flops(load_config("config.yaml", "bdd100k"), 19)
    assert forward == pytest.approx(209.8e9, rel=3e-4)
    assert training == pytest.approx(628.6e9, rel=3e-4)


def test_extrapolation():
    """Of 5 s to the end of the first step and 2 s for each other one, a chain of n takes 5 + 2 (n - 1)."""
    assert timing.extrapolate([5, 7, 9], 1000) == 5 + 999 * 2
    assert timing.extrapolate([5, 7, 9, 30], 4) == 5 + 3 * 2


@pytest.mark.parametrize("sampler, n", [("ddpm", 6), ("dpm_solver", 5)])
def test_extrapolated_and_full_runs_agree(monkeypatch, sampler, n):
    """Where a pass of the network takes 1 s and the stem 3, three timed steps give the time of the whole run."""
    model, diffusion, clock = UNet(4, 8, 16), Diffusion(T=6), [0.0]
    monkeypatch.setattr(timing, "now", lambda device: clock[0])
    model.image_stem.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 1))
    model.mask_stem.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 3))
    mask = torch.zeros(2, 4, 8, 8)
    for guidance in 1.0, 3.0:
        args = model, diffusion, mask, 2, (8, 8), sampler, n, guidance
        assert timing.sampling_seconds(*args, 3, "cpu") == 3 + n
        assert timing.sampling_seconds(*args, 1000, "cpu") == 3 + n


def test_peak_memory():
    """Two tensors of 1 MB alive together, a third later, and 4 kB held beside them: the peak is 2 MB and 4 kB."""
    held = torch.zeros(1000)

    def work():
        a, b = torch.ones(250_000), torch.ones(250_000)
        del a, b
        torch.ones(250_000)

    assert timing.peak_memory(work, [held], torch.device("cpu")) == 2_000_000 + 4000


def test_training_step_trains(tiny):
    """The step that is timed moves every weight once, whatever the micro-batches, and its EMA by 1 - train.ema."""
    cfg = tiny(train__ema=0.75, train__lr=0.01, train__accumulate=2, train__batch_size=4)
    torch.manual_seed(cfg["seed"])
    before = UNet(4, 8, 16)
    step, held = timing.training_step(cfg, 4, torch.device("cpu"))
    n = len(list(before.parameters()))
    assert len(held) == n + n + 3 * n  # network, EMA, and of each weight AdamW's two moments and its step
    for old, new, averaged in zip(before.parameters(), held[:n], held[n : 2 * n]):
        assert 0.002 < (new - old).abs().max() < 0.011
        torch.testing.assert_close(averaged, 0.75 * old + 0.25 * new)


def test_timing_tables(tiny, capsys):
    """The tables have the thesis's figures, a column for each kind of run, a row for each variant, and right shares."""
    cfg = tiny(diffusion__T=8, sample__steps=4, train__batch_size=4)
    rows, training = timing.timing(cfg, torch.device("cpu"), [1, 2], 3, ["fp32"], ["eager"], list(timing.LAYOUTS))
    printed = capsys.readouterr().out
    runs = [f"{name}, {way}" for name in ("ddpm 8", "dpm_solver 4") for way in ("w = 1", "w = 3", "no mask")]
    assert [list(row) for row in rows] == [["images", "thesis, mask", "thesis, no mask", *runs]] * 2
    assert "| 1 | 1:15 | 1:11 | " in printed and "| 2 | 1:35 | 1:31 | " in printed  # Table 2 of the thesis
    operations = timing.count_flops(cfg, 4)[1]
    assert [row["layout"] for row in training] == ["channels_last", "contiguous"]
    for row in training:
        share = row["images/s"] * operations / (1e12 * row["rate, TFLOP/s"])
        assert row["% of rate"] == pytest.approx(100 * share) and 0 < row["peak GiB"] < 1


def test_thesis_table():
    """Table 2 of the thesis has 21:12 and 20:47 for 64 images."""
    assert list(map(timing.minutes, timing.THESIS[64])) == ["21:12", "20:47"]


# --------------------------------------------------------------------------------------------------- speed


def test_race(monkeypatch):
    """A form that takes half as long has twice the speed, whatever the machine does meanwhile."""
    clock, slow = [0.0], [1, 1, 1, 10, 1]  # another process slows the third round
    turns = []

    def work(seconds):
        clock[0] += seconds * slow[min(len(turns) // 2, 4)]
        turns.append(seconds)

    monkeypatch.setattr(speed, "now", lambda device: clock[0])
    plain, fast = speed.race({"plain": lambda: work(4), "fast": lambda: work(2)}, 3, "cpu", per=2)
    assert (plain["speed"], fast["speed"], plain["ms"], fast["ms"]) == (1, 2, 2000, 1000)
    assert (fast["least"], fast["most"]) == (1000, 10000)


def test_passes():
    """Guidance takes two passes a step where the noise lies in its interval, one elsewhere, and the mask stem once."""
    diffusion = Diffusion()
    assert speed.count_passes(speed.plain_eps, diffusion, "dpm_solver", 5) == {"passes": 10, "mask stem": 5}

    def ours(*args):
        return guided_eps(*args, guidance=3.0, interval=speed.INTERVAL)

    abar = diffusion.alpha_bar
    inside = sum(0.3 < math.sqrt((1 - abar[t]) / abar[t]) <= 3 for t in [999, 799, 599, 399, 199])
    assert 0 < inside < 5
    assert speed.count_passes(ours, diffusion, "dpm_solver", 5) == {"passes": 5 + inside, "mask stem": 1}


def test_plain_guidance_computes_the_same():
    """The plain form that ours is compared with gives the same noise."""
    model, diffusion = UNet(speed.K, 8, 16), Diffusion()
    x, mask = torch.randn(2, 3, 8, 8), torch.rand(2, speed.K, 8, 8)
    with torch.no_grad():
        expected = guided_eps(model, diffusion, mask, speed.W)(x, 500)
        torch.testing.assert_close(speed.plain_eps(model, diffusion, mask)(x, 500), expected, atol=1e-4, rtol=1e-4)


def test_parts_of_speed(tiny, capsys):
    """Every part runs on a tiny network; pairs weigh 1.44 MB and 65.5 kB; checkpointing needs less memory."""
    cfg = tiny(diffusion__T=20, train__batch_size=4, sample__batch_size=2)
    tables = speed.speed(cfg, torch.device("cpu"), list(speed.PARTS), 1)
    plain, ours = tables["loader"][0]
    assert plain["MB per pair"] == pytest.approx(1.44, abs=0.01)
    assert ours["MB per pair"] == pytest.approx(0.0655, abs=1e-4)
    kept, borders = tables["checkpointing"][0]
    assert borders["peak GiB"] < kept["peak GiB"]
    assert 0 < sum(share for op, share in tables["groupnorm"][0][0].items() if op != "precision") <= 100
    assert "| form | ms | least | most | speed |" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- held_out and ladder


def test_held_out_follows_the_checkpoint(command, run, tmp_path, monkeypatch, capsys):
    """Sampler, steps and guidance are the checkpoint's, weights its EMA; a mask is compared with its own image."""
    settings, real_images = [], Pairs(load_checkpoint(run / "checkpoint.pt")["config"]["data"]["root"], "val", (16, 16))

    def perfect(eps_fn, noise, alpha_bar, *args):
        settings.append(args)
        return real_images.planes[: len(noise()), :3] / 127.5 - 1

    def guide(model, diffusion, mask, *args):
        settings.append((torch.equal(model.out.weight, ema["out.weight"]), *args))

    ema = load_checkpoint(run / "checkpoint.pt")["ema"]
    monkeypatch.setattr(held_out, "sample", perfect)
    monkeypatch.setattr(held_out, "guided_eps", guide)
    command(held_out, "--checkpoint", run / "checkpoint.pt", "--n", 99, "--out", tmp_path / "sheet.png", "--show-data")
    assert settings == [(True, 2.5, []), ("plms", 7, 0.0)]
    printed = capsys.readouterr().out
    assert "same mask 0.000" in printed and "in 10 of 10 (plms, 7 steps, guidance 2.5)" in printed
    assert re.search(r"step 4, val, 10 pairs, model: loss \d.\d+, error on eps \d.\d+\n", printed)
    assert "step 4, val, 10 pairs, ema: loss" in printed
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    found = {tuple(int(v) for v in color) for color in sheet.reshape(-1, 3)}
    assert {tuple(map(int, look)) for look in LOOKS[:2]} | {(128, 64, 128), (70, 130, 180)} <= found  # images and masks


def test_ladder_shows_every_preview(command, run, tmp_path, capsys):
    """Below mask and real image there is a strip for each preview, whose pixels are those of its generated images."""
    command(ladder, "--run", run, "--out", tmp_path / "ladder.png")
    drawn = np.array(Image.open(tmp_path / "ladder.png"))
    for i, name in enumerate(("0000002", "0000004")):
        sheet = np.array(Image.open(run / "previews" / f"{name}.png"))
        height = sheet.shape[0] // 3
        top = (2 + i) * (height + ladder.CAPTION) + ladder.CAPTION
        assert np.array_equal(drawn[top : top + height], sheet[2 * height : 3 * height])
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["| 2", "| 4"]
    command(ladder, "--run", run, "--out", tmp_path / "ladder.png", "--weights", run / "checkpoint.pt")
    drawn = np.array(Image.open(tmp_path / "ladder.png"))  # its own weights make the last preview once more
    assert len(drawn) == 5 * (height + ladder.CAPTION)
    assert np.array_equal(drawn[-height:], sheet[2 * height : 3 * height])


# --------------------------------------------------------------------------------------------------- steps


@pytest.fixture
def measure(command, run, tmp_path):
    """measure("--guidance", 3, ...) runs it on three masks; returns {(sampler, steps): row} and the folder."""

    def call(*options):
        out = tmp_path / "steps"
        command(steps, "--checkpoint", run / "checkpoint.pt", "--n", 3, "--steps", 2, 24, "--out", out, *options)
        with open(out / "steps.csv", newline="") as file:
            return {(row["sampler"], row["steps"]): row for row in csv.DictReader(file)}, out

    return call


def test_distances_and_passes(measure):
    """Distances are to DDIM's whole walk, which itself has 0; passes are those made: two per step with guidance."""
    rows, out = measure("--guidance", 3)
    assert len(rows) == 3 * 2 + 2 - 1 and float(rows["ddim", "24"]["distance"]) == 0
    distances = [float(rows[key]["distance"]) for key in (("other noise", "20"), ("ddim", "2"), ("plms", "24"))]
    assert distances == sorted(distances, reverse=True) and distances[-1] > 0
    assert [rows["ddim", k]["passes"] for k in ("2", "24")] == ["4.0", "48.0"]
    assert Image.open(out / "sheet.png").width > 4 * 128 and Image.open(out / "curve.png").height > 400
    rows, _ = measure("--guidance", 3, "--guidance-interval", 0.5, 2)
    assert 24 < float(rows["ddim", "24"]["passes"]) < 48


def test_the_judge_sees_images_and_masks_in_order(measure, monkeypatch):
    """A judge that knows the colours finds every class of the real images where their masks have it."""

    def by_color(images):
        distance = (images.permute(0, 2, 3, 1)[..., None, :].float() - torch.from_numpy(LOOKS).float()).square().sum(-1)
        return distance.argmin(-1).byte()

    monkeypatch.setattr(steps, "load_segmenter", lambda name, colorbook, device: by_color)
    rows, out = measure("--segmenter", "known")
    assert float(rows["real", ""]["mean_iou"]) == float(rows["real", ""]["pixel_accuracy"]) == 1
    assert all(0 <= float(row["mean_iou"]) <= 1 and 0 <= float(row["pixel_accuracy"]) <= 1 for row in rows.values())
    assert Image.open(out / "curve.png").width > 900


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("module, options, words", [
    (timing, ["--timed-steps", 2], "--timed-steps of 3 or more"),
    (timing, ["--images", 0], "--images of 1 or more"),
    (timing, ["--set", "train.batchsize=2"], "train.batch_size"),
    (speed, ["--rounds", 0], "expected 1 or more"),
    (steps, ["--steps", 25], "25: expected numbers in 1..24"),
    (steps, ["--steps", 2, "--guidance-interval", 2, 1], "2.0, 1.0"),
    (steps, ["--split", "nowhere"], ".*nowhere"),
    (held_out, ["--split", "nowhere"], ".*nowhere"),
    (ladder, ["--run", "nowhere"], "nowhere.*no preview sheets")])
def test_mistakes_are_one_line(command, run, tmp_path, module, options, words):
    """What is wrong on the command line is named before any work, and nothing is written."""
    if module in (steps, held_out):
        options = ["--checkpoint", run / "checkpoint.pt", "--out", tmp_path / "out", *options]
    with pytest.raises(SystemExit, match=f"error: .*{words}"):
        command(module, *options)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_is_one_line(command, monkeypatch, capsys):
    """Ctrl-C ends a benchmark with exit code 130 and one line instead of a traceback."""

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "speed", interrupted)
    with pytest.raises(SystemExit) as stopped:
        command(speed)
    assert stopped.value.code == 130 and len(capsys.readouterr().err.strip().splitlines()) == 1
