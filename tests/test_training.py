"""The training of the experiments: what stops, resumes and refuses it, that processes share it; files, programs."""

import csv
import json
import math
import os
import signal

import pytest
import torch
import torch.distributed as dist
from robustness.test_distributed import in_two_processes

from checkpoint import join_processes
from ddpm import Diffusion
from experiments import common
from experiments.common import choose_masks, read_report, run_program
from experiments.label_unet import LabelUNet
from experiments.training import fit, go_on_alone, read
from masks import Colorbook

CPU = torch.device("cpu")


@pytest.fixture
def fit_line(tiny, tmp_path):
    """fit_line(out, steps) fits a line to noisy points, returns the net; hook(step) may give a factor of the loss."""
    def call(out, steps, hook=lambda step: None, about=(), seed=0, validate=None, **settings):
        torch.manual_seed(seed)
        net, count = torch.nn.Linear(2, 1), []
        c = tiny(train__steps=steps, **settings)["train"]

        def loss(net, batch):
            count.append(0)
            factor = hook(len(count)) or 1
            return factor * (net(batch + 0.1 * torch.randn_like(batch)) - batch.sum(1, keepdim=True)).square().mean()

        def load_batches(start):
            while True:
                yield torch.randn(8, 2, generator=torch.Generator().manual_seed(start))
                start += 8

        return fit(net, loss, load_batches, c, tmp_path / out / "net.pt", CPU, {"kind": "line", **dict(about)},
                   validate or (lambda net: {"val": net.weight.sum().item()}))
    return call


def press_ctrl_c(*_):
    os.kill(os.getpid(), signal.SIGINT)
    return {}


# ------------------------------------------------------------------------------------------------------- one process


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to oneself there")
@pytest.mark.parametrize("during", ["the last step", "its validation"])
def test_ctrl_c_at_the_end_is_not_lost(fit_line, tmp_path, during):
    """Ctrl-C in the last step, or while its validation runs, ends the program; all is saved, and nothing is left."""
    hook = {"hook": lambda step: step == 4 and press_ctrl_c()}
    with pytest.raises(SystemExit) as stopped:
        fit_line("run", 4, **(hook if during == "the last step" else {"validate": press_ctrl_c}))
    assert stopped.value.code == 130 and read(tmp_path / "run" / "net.pt", "line")["step"] == 4
    assert torch.equal(fit_line("run", 4).weight, fit_line("other", 4).weight)


def test_no_checkpoint_without_a_look_at_the_loss(fit_line, tmp_path):
    """Weights that are NaN since step 4 are not saved at step 6, where no row of the log was asked for."""
    with pytest.raises(ValueError, match="step 6: loss or gradient is not finite"):
        fit_line("run", 9, lambda step: step == 4 and math.nan, train__save_every=3, train__log_every=100,
                 train__val_every=100)
    assert read(tmp_path / "run" / "net.pt", "line")["step"] == 3
    assert [row["step"] for row in csv.DictReader(open(tmp_path / "run" / "net.csv"))] == ["3"]


def test_a_training_is_resumed_with_its_own_settings_only(fit_line):
    """What would have trained other weights is refused by name and value, an order too; the rest may change."""
    classes = {"road": 1, "sky": 2}
    fit_line("run", 2, about={"classes": classes})
    for name, change in {"lr (was 0.002, is 0.1)": {"train__lr": 0.1}, "batch_size (was 8, is 16)":
                         {"train__batch_size": 16}, "seed (was 0, is 1)": {"seed": 1},
                         "label_drop (was 0.1, is 0.5)": {"train__label_drop": 0.5},
                         "classes (was {'road': 1, 'sky': 2}, is {'sky': 2, 'road': 1})":
                         {"about": {"classes": {"sky": 2, "road": 1}}}}.items():
        with pytest.raises(ValueError) as refused:
            fit_line("run", 4, **{"about": {"classes": classes}} | change)
        assert f"net.pt: begun with another {name}: choose another folder" in str(refused.value)
    with pytest.raises(ValueError, match="begun with another classes .*is None.: choose"):
        fit_line("run", 4)
    fit_line("run", 4, about={"classes": classes}, train__save_every=3, train__log_every=1, train__previews=5)


# -------------------------------------------------------------------------------------------------- several processes


def fit_labels(c, file, stop_at=0):
    """Train a small U-Net of labels; the second process gets SIGTERM at step `stop_at`; who goes on writes a file."""
    join_processes(CPU)
    torch.manual_seed(0)
    model, diffusion, steps = LabelUNet(3, 1, 4, 8), Diffusion(T=50), []

    def loss(net, batch):
        steps.append(0)
        if len(steps) == stop_at and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        x0, labels = batch
        drawn = diffusion.draw(x0.shape, c["label_drop"], CPU)
        error = diffusion.errors(net, x0, labels, *drawn)[0]
        return (error * labels).sum() / labels.sum()  # not the mean of what the processes would have by themselves

    def load_batches(start):
        while True:
            generator = torch.Generator().manual_seed(start)
            yield torch.rand(8, 1, 16, 16, generator=generator), torch.arange(8) % 3
            start += 8

    fit(model, loss, load_batches, c, file, CPU, {"kind": "labels"}, lambda net: {"val": 1.0})
    go_on_alone()
    with file.with_suffix(".alone").open("a") as alone:
        alone.write(f"{dist.is_initialized()} {os.environ.get('WORLD_SIZE')} ")


def test_two_processes_train_what_one_would(tiny, tmp_path):
    """Gradients, weights, losses and random numbers of one process with the whole batch; the first one goes on alone.

    The learning rate is small because Adam divides by small gradients, which enlarges the rounding of sums.
    """
    c = tiny(train__lr=1e-4, train__steps=4, train__label_drop=0.5)["train"]
    fit_labels(c, tmp_path / "one.pt")
    assert in_two_processes(fit_labels, c, tmp_path / "two.pt") == [0, 0]
    assert (tmp_path / "two.alone").read_text() == "False 1 "
    one, two = (read(tmp_path / f"{name}.pt", "labels") for name in ("one", "two"))
    first, second = (torch.cat([m["exp_avg"].flatten() for m in state["optimizer"]["state"].values()])
                     for state in (one, two))
    assert (second - first).norm() < 1e-4 * first.norm()
    for part in "model", "ema":
        assert all(torch.allclose(one[part][key], two[part][key], atol=4e-6) for key in one[part])
    assert torch.equal(one["rng"]["cpu"], two["rng"]["cpu"])
    for expected, row in zip(one["log"], two["log"], strict=True):
        assert {**row, "seconds": 0} == pytest.approx({**expected, "seconds": 0}, rel=1e-4)


def test_a_signal_to_one_process_stops_both(tiny, tmp_path):
    """SIGTERM to the second process in step 3 of 6 ends both after it, saved; they go on to the end."""
    c = tiny(train__lr=1e-4, train__steps=6)["train"]
    assert in_two_processes(fit_labels, c, tmp_path / "two.pt", 3) == [143, 143]
    assert read(tmp_path / "two.pt", "labels")["step"] == 3
    assert in_two_processes(fit_labels, c, tmp_path / "two.pt") == [0, 0]
    assert read(tmp_path / "two.pt", "labels")["step"] == 6


def test_a_batch_that_cannot_be_shared_is_refused(tiny, fit_line, tmp_path, monkeypatch):
    """9 images for 2 processes end both, and so do processes that never joined; nothing is written."""
    assert in_two_processes(fit_labels, tiny(train__batch_size=9)["train"], tmp_path / "two.pt") == [1, 1]
    assert not (tmp_path / "two.pt").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        fit_line("alone", 1)


# ------------------------------------------------------------------------------------------- what experiments share


def test_masks_are_chosen_whole(flat_root, tmp_path, monkeypatch):
    """Ctrl-C while masks are written leaves no folder that looks complete; masks of another n are refused."""
    split, folder, colorbook = flat_root / "test", tmp_path / "masks", Colorbook.load(flat_root / "colorbook.json")
    real, written = common.save_mask, []

    def save(*args):
        written.append(0)
        if len(written) == 2:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(common, "save_mask", save)
    with pytest.raises(KeyboardInterrupt):
        choose_masks(split, folder, colorbook, (16, 16), 3)
    assert sorted(choose_masks(split, folder, colorbook, (16, 16), 3)) == ["flat_200", "flat_202", "flat_204"]
    assert list(choose_masks(split, folder, colorbook, (16, 16), 3)) == ["flat_200", "flat_202", "flat_204"]
    assert len(written) == 2 + 3 and not list(tmp_path.glob("*.partial"))
    with pytest.raises(ValueError, match="masks: 3 masks, which are not the 5 that are asked for"):
        choose_masks(split, folder, colorbook, (16, 16), 99)


def test_a_report_without_a_value(tmp_path):
    """Numbers with an interval, without one, without a value (evaluate.py's null), and not there."""
    numbers = {"a": {"value": 0.5, "interval": [0.25, 0.75]}, "b": {"value": 2, "interval": None},
               "c": {"value": None, "interval": None}}
    (tmp_path / "report.json").write_text(json.dumps({"numbers": numbers}))
    assert read_report(tmp_path, {"A": "a", "B": "b", "C": "c", "D": "d"}) == {
        "A": "0.500 [0.250, 0.750]", "B": "2.000", "C": "nan", "D": "nan"}


def test_a_program_that_fails_is_named(tmp_path, monkeypatch):
    """Its last words are told; one that says nothing, as a killed one, is told by its exit code."""
    monkeypatch.setattr(common, "PROJECT", tmp_path / "config.yaml")
    (tmp_path / "loud.py").write_text("raise SystemExit('first\\nerror: no such file')")
    (tmp_path / "killed.py").write_text("import os; os._exit(9)")
    with pytest.raises(ValueError, match="loud.py --n 3 ended with 1: error: no such file"):
        run_program("loud.py", "--n", 3)
    with pytest.raises(ValueError, match="killed.py ended with 9: without a message"):
        run_program("killed.py")
