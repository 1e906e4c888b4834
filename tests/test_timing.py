"""The timing and benchmark experiments: what they count and compute, not how fast this machine is."""

import json
import math

import pytest
import torch

from benchmarks import speed as benchmark
from benchmarks import timing
from config import load_config
from ddpm import Diffusion, guided_eps
from unet import UNet


def test_operations_of_the_thesis_size():
    """Shares of the hardware's rate would be shares of something else: the figures were derived by hand from the layers."""
    forward, training = timing.count_flops(load_config("config.yaml", "bdd100k"), 19)
    assert forward == pytest.approx(209.8e9, rel=3e-4)
    assert training == pytest.approx(628.6e9, rel=3e-4)


def test_operations_of_one_convolution():
    """The counter would count something else than a multiplication and an addition per weight and pixel."""
    cfg = load_config("config.yaml", "toy", ["model.hidden_dim=8", "data.size=[8,16]"])
    with_mask, without = (timing.count_flops(cfg | {"model": cfg["model"] | {"conditional": c}}, 4)[0] for c in (True, False))
    assert with_mask - without == 2 * 8 * 16 * 9 * (4 * 8 + 8 * 8)  # the mask stem: 3x3 convolutions 4 to 8 and 8 to 8


def test_extrapolation():
    """A chain of which three steps were timed would be reported wrongly: 5 s to the end of the first, then 2 s each."""
    assert timing.extrapolate([5, 7, 9], 1000) == 5 + 999 * 2
    assert timing.extrapolate([5, 7, 9, 30], 4) == 5 + 3 * 2  # an interruption is no step


@pytest.mark.parametrize("sampler, steps", [("ddpm", 6), ("dpm_solver", 5)])
def test_extrapolated_and_full_runs(monkeypatch, sampler, steps):
    """What is extrapolated would differ from what is measured. The clock ticks once per call of the network, and 3 for the stem."""
    model, diffusion, clock = UNet(4, 8, 16), Diffusion(T=6), [0.0]
    monkeypatch.setattr(timing, "now", lambda device: clock[0])
    model.image_stem.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 1))
    model.mask_stem.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 3))
    mask = torch.zeros(2, 4, 8, 8)
    for guidance, one_batch, passes in ((1.0, True, 1), (3.0, True, 1), (3.0, False, 2)):
        args = model, diffusion, mask, 2, (8, 8), sampler, steps, guidance, one_batch
        assert timing.sampling_seconds(*args, 3, "cpu") == timing.sampling_seconds(*args, steps, "cpu") == 3 + steps * passes
        assert timing.sampling_seconds(*args, 1000, "cpu") == 3 + steps * passes


def test_peak_memory():
    """The memory column would be wrong: two tensors of 1 MB alive together, a third later, beside 4 kB that were there before."""
    held = torch.zeros(1000)

    def work():
        a, b = torch.ones(250_000), torch.ones(250_000)
        del a, b
        torch.ones(250_000)

    assert timing.peak_memory(work, [held], torch.device("cpu")) == 2_000_000 + 4000


def test_tables(tiny, tmp_path, capsys):
    """A row or column of the thesis's table would be missing, or the file would say something else than the screen."""
    cfg = tiny(diffusion__T=8, sample__steps=4)
    result = timing.timing(cfg, torch.device("cpu"), [1, 2], 3, False, ["fp32", "bf16"], ["eager"], ["channels_last", "contiguous"],
                           tmp_path / "timing.json")
    shown = capsys.readouterr().out
    assert json.loads((tmp_path / "timing.json").read_text()) == result
    runs = [f"{run}, {way}" for run in ("ddpm 8", "dpm_solver 4") for way in ("w = 1", "w = 3", "no mask")]
    assert [list(row) for row in result["sampling_seconds"]] == [["pictures", *runs]] * 2
    assert "| 1 | 1:15 | 1:11 | " in shown and "| 2 | 1:35 | 1:31 | " in shown and all(run in shown for run in runs)
    assert [(row["precision"], row["layout"]) for row in result["training"]] == [
        (p, layout) for p in ("fp32", "bf16") for layout in ("channels_last", "contiguous")]
    for row in result["training"]:
        rate = row["images/s"] * result["gflop_training_image"] / 1e3 / result["matrix_tflops"][row["precision"]]
        assert row["% of rate"] == pytest.approx(100 * rate) and 0 < row["peak GiB"] < 1 and not row["note"]


@pytest.mark.parametrize("module, words, message", [
    (timing, ["--timed-steps", "2"], "--timed-steps of 3 or more"), (timing, ["--pictures", "0"], "--pictures of 1 or more"),
    (timing, ["--set", "train.batchsize=2"], "train.batch_size"), (benchmark, ["--rounds", "0"], "expected 1 or more")])
def test_bad_input(monkeypatch, module, words, message):
    """A slip on the command line would end in a traceback, or after minutes."""
    monkeypatch.setattr("sys.argv", ["experiment", *words])
    with pytest.raises(SystemExit, match=message):
        module.main()


def test_thesis_table():
    """The thesis's times would be shown for another number of pictures: Table 2, 64 pictures, 21:12 and 20:47."""
    assert list(map(timing.minutes, timing.THESIS[64])) == ["21:12", "20:47"]
    assert list(map(timing.minutes, timing.THESIS[1])) == ["1:15", "1:11"]


def test_race(monkeypatch):
    """Ratios would be of something else: a form that takes half as long has twice the speed, whatever the machine does meanwhile."""
    clock, slow = [0.0], [1, 1, 1, 10, 1]  # another process slows the third round

    def work(seconds):
        clock[0] += seconds * slow[min(len(turns) // 2, 4)]
        turns.append(seconds)

    turns = []
    monkeypatch.setattr(benchmark, "now", lambda device: clock[0])
    plain, fast = benchmark.race({"plain": lambda: work(4), "fast": lambda: work(2)}, 3, "cpu", per=2, note={"fast": "x"})
    assert (plain["speed"], fast["speed"], plain["ms"], fast["ms"]) == (1, 2, 2000, 1000)
    assert (fast["least"], fast["most"], fast["note"], plain["note"]) == (1000, 10000, "x", None)


def test_passes():
    """The benchmark's table of passes would be wrong: two per step with guidance, and the mask stem once, not in every step."""
    diffusion = Diffusion()
    assert benchmark.count_passes(benchmark.plain_eps, diffusion, "dpm_solver", 5) == {"passes": 10, "mask stem": 5}

    def ours(*args):
        return guided_eps(*args, guidance=3.0, interval=benchmark.INTERVAL)

    abar, steps = diffusion.alpha_bar, [999, 799, 599, 399, 199]
    inside = sum(0.3 < math.sqrt((1 - abar[t]) / abar[t]) <= 3 for t in steps)
    assert 0 < inside < 5
    assert benchmark.count_passes(ours, diffusion, "dpm_solver", 5) == {"passes": 5 + inside, "mask stem": 1}


def test_plain_forms_compute_the_same():
    """A ratio would compare two different functions."""
    model, diffusion = UNet(benchmark.K, 8, 16), Diffusion()
    torch.nn.init.normal_(model.out.weight)
    x, mask = torch.randn(2, 3, 8, 8), torch.rand(2, benchmark.K, 8, 8)
    with torch.no_grad():
        expected = guided_eps(model, diffusion, mask, benchmark.W)(x, 500)
        torch.testing.assert_close(benchmark.plain_eps(model, diffusion, mask)(x, 500), expected, atol=1e-4, rtol=1e-4)
    for memory_format in timing.LAYOUTS.values():
        x = torch.randn(2, 6, 8, 8).contiguous(memory_format=memory_format)
        w, b = torch.randn(6), torch.randn(6)
        expected = torch.nn.functional.group_norm(x, 1, w, b)
        for way in (benchmark.native, benchmark.in_float32, benchmark.layer_norm, benchmark.var_mean):
            torch.testing.assert_close(way(x, w, b), expected, atol=1e-5, rtol=1e-5)


def test_parts(tiny, tmp_path, capsys):
    """A part of the benchmark would break without anybody noticing: all but the compiled one, on a tiny network."""
    parts = [part for part in benchmark.PARTS if part != "compiled"]
    result = benchmark.benchmark(tiny(diffusion__T=20), torch.device("cpu"), parts, 1, tmp_path / "benchmark.json")
    assert json.loads((tmp_path / "benchmark.json").read_text()) == result
    assert [row["form"] for row in result["layout"][0]] == [
        f"{p}, {layout}" for p in ("fp32", "bf16") for layout in ("contiguous", "channels_last")]
    thesis, ours = result["loader"][0]
    assert (thesis["MB per pair"], ours["MB per pair"]) == (pytest.approx(1.44, abs=0.01), pytest.approx(0.0655, abs=1e-4))
    kept, borders = result["checkpointing"][0]
    assert borders["peak GiB"] < kept["peak GiB"]
    assert "| form | ms | least | most | speed |" in capsys.readouterr().out
