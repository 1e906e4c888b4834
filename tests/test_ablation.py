"""The study of parts: that each variant trains what it says, and that the table holds what was measured."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import evaluate
import sample
import train
from checkpoint import load_checkpoint
from config import flatten, load_config
from data.toy.prepare import prepare
from ddpm import Diffusion
from experiments import ablation
from experiments.segmenter import main as train_judge
from unet import UNet

SMALL = {"device": "cpu", "data.size": [16, 16], "model.hidden_dim": 4, "model.emb_dim": 8, "diffusion.T": 20,
         "train.steps": 2, "train.batch_size": 4, "train.val_every": 1, "train.previews": 1, "train.val_pairs": 2,
         "sample.steps": 2}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command("--only", "eps") runs the study in this process, on small data, with an untrained judge."""
    judge, root = tmp_path / "judge", tmp_path / "toy" / "prepared"
    prepare(root, 8, 3, 3, (16, 16))
    monkeypatch.setattr(sys, "argv", ["segmenter", "--root", str(root), "--arch", "lraspp_mobilenet_v3_large",
                                      "--steps", "1", "--batch-size", "2", "--out", str(judge)])
    train_judge()
    monkeypatch.setattr(evaluate, "load_inception", lambda *_: None)

    def run_here(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        {"sample.py": sample, "evaluate.py": evaluate}[name].main()

    monkeypatch.setattr(ablation, "run_program", run_here)
    settings = [f"--set={key}={value}" for key, value in (SMALL | {"data.root": root}).items()]

    def call(*options):
        arguments = ["--judge", judge / "checkpoint.pt", "--out", tmp_path / "out", *settings, *options]
        monkeypatch.setattr(sys, "argv", ["ablation", *map(str, arguments)])
        ablation.main()
        return json.loads((tmp_path / "out" / "results.json").read_text())

    return call


def test_the_table_is_what_was_measured(command, tmp_path, capsys):
    """A row has the figures of the variant's own log and reports; finished variants are kept, new ones added."""
    first = command("--only", "base")
    results = command("--only", "base", "drop 0.2", "--guidance", "1", "2")
    assert list(results) == ["base", "drop 0.2"] and results["base"] == first["base"]
    for name, result in results.items():
        run = tmp_path / "out" / name.replace(" ", "_")
        last = (run / "log.csv").read_text().splitlines()[-1].split(",")
        assert [result["val_eps"], result["val_eps_raw"]] == [float(cell) for cell in last[-2:]]
        for w in "12":
            report = json.loads((run / f"report_w{w}" / "report.json").read_text())["numbers"]
            assert result["guidance"][w] == {key: number["value"] for key, number in report.items()}
    assert load_checkpoint(tmp_path / "out" / "drop_0.2" / "checkpoint.pt")["config"]["train"]["label_drop"] == 0.2
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| drop 0.2 |")]
    share = results["drop 0.2"]["guidance"]["2"]["share of the ceiling: mean IoU"]
    assert f"| {share:.3f} |" in rows[-1] and (tmp_path / "out" / "variants.png").exists()


def test_equal_time(command, monkeypatch):
    """With --minutes a training ends when the time is over, saved, and the same command does not go on with it.

    Here a step takes a second, and the timer is asked after each.
    """
    clock, timers, real = [0.0], [], torch.optim.AdamW.step

    fields = "interval", "function", "args"

    class Timer(SimpleNamespace):
        def start(self):
            timers.append(self)

        def cancel(self):
            timers.clear()

    def step(*args, **kwargs):
        clock[0] += 1
        for timer in timers:
            if clock[0] >= timer.interval:
                timer.function(*timer.args)
        return real(*args, **kwargs)

    monkeypatch.setattr(ablation.threading, "Timer", lambda *args: Timer(**dict(zip(fields, args))))
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    first = command("--minutes", 1 / 20)["base"]
    assert first["steps"] == 3
    assert command("--minutes", 1 / 20)["base"] == first


@pytest.mark.parametrize("name", [name for name, change in ablation.VARIANTS.items() if isinstance(change, list)])
def test_a_variant_changes_one_setting(name):
    """Every variant of settings differs from the base in these settings alone, and all of them are known."""
    base, changed = (flatten(load_config(preset="idd_lite", overrides=[*more, "out=x"]))
                     for more in ([], ablation.VARIANTS[name]))
    assert {key for key in base if base[key] != changed[key]} <= {
        text.split("=")[0] for text in ablation.VARIANTS[name]}


def test_one_coin_per_batch():
    """The mask is dropped for all images of a batch or for none, as often as label_drop says."""
    torch.manual_seed(0)
    keeps = [ablation.drop_per_batch(Diffusion(), (8, 3, 2, 2), 0.3)[2] for _ in range(400)]
    assert all(len(keep.unique()) == 1 and keep.shape == (8,) for keep in keeps)
    assert 0.2 < sum(not keep[0] for keep in keeps) / 400 < 0.4


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_min_snr_weights_the_error_of_x0(prediction):
    """Each image counts with min(SNR, 5) times its squared error in x_0, whatever is predicted."""
    torch.manual_seed(0)
    d, t = Diffusion(prediction=prediction), torch.tensor([0, 200, 500, 900])
    x0, eps, out = torch.randn(3, 4, 3, 8, 8).double()
    a, s = (c.double() for c in d.coefficients(t))
    x = a * x0 + s * eps
    predicted = (x - s * out) / a if prediction == "eps" else a * x - s * out
    snr = (d.alpha_bar / (1 - d.alpha_bar))[t]
    expected = (snr.clamp(max=5) * (predicted - x0).square().mean(dim=(1, 2, 3))).mean()
    loss = ablation.min_snr_loss(d, lambda *_, **__: out.float(), x0.float(), None, t, eps.float())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)


def test_only_the_last_layer_stays_random(monkeypatch):
    """The variant leaves the last layer as it was drawn, and everything else is set to zero as ever."""
    monkeypatch.setattr(torch.nn.init, "zeros_", ablation.zeros_but_in_the_last_layer)
    model = UNet(4, 8, 16)
    torch.nn.init.zeros_(model.out.weight)
    torch.nn.init.zeros_(model.out.bias)
    assert model.out.weight.abs().min() > 0 and model.out.bias.abs().min() > 0
    assert not model.image_stem.net[1].bias.any()


@pytest.mark.parametrize("options, words", [
    (["--only", "nothing"], "no variant is called 'nothing'"),
    (["--judge", "nowhere.pt"], "no such judge")])
def test_mistakes(options, words, monkeypatch):
    """A variant that does not exist and a missing judge are one line, before anything is trained."""
    monkeypatch.setattr(sys, "argv", ["ablation", "--judge", __file__, *options])
    with pytest.raises(SystemExit, match=words):
        ablation.main()
