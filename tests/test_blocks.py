"""The blocks of a DDPM: what each computes, that it sees the time, and that the study compares like with like."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_score_digits import write_idx

from ddpm import Diffusion
from experiments import blocks
from experiments.score_digits import Judge
from experiments.blocks import (ROWS, Attention, ConvNeXtBlock, GreyUNet, ResNetBlock, build_network,
                                count_parameters, make_measure, make_plan, match_width, measure_costs, summarise)

BLOCKS = {"resnet": ResNetBlock, "adagn": lambda *sizes: ResNetBlock(*sizes, adaptive=True), "convnext": ConvNeXtBlock}
SMALL = {"device": "cpu", "model.hidden_dim": 4, "model.emb_dim": 8, "diffusion.T": 20, "train.steps": 2,
         "train.batch_size": 4, "train.val_pairs": 4, "sample.steps": 2}


def randomised(net):
    """The network with every weight drawn from N(0, 0.1): none of its branches is zero any more."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


# -------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("in_ch, out_ch", [(8, 8), (8, 12)])
def test_a_block_begins_as_its_shortcut(block, in_ch, out_ch):
    """A new block gives x itself, or the 1x1 convolution of x where the channels change, whatever the time."""
    net, x = BLOCKS[block](in_ch, out_ch, 6), torch.randn(2, in_ch, 8, 16)
    expected = x if in_ch == out_ch else F.conv2d(x, net.shortcut.weight, net.shortcut.bias)
    assert torch.equal(net(x, torch.randn(2, 6)), expected)
    assert expected.shape == (2, out_ch, 8, 16)


@pytest.mark.parametrize("block, expected", [
    # norms 2 * 8 and 2 * 12; convolutions 8 to 12 and 12 to 12; time 6 to 12, or twice 12; shortcut 8 to 12
    ("resnet", 16 + 24 + (9 * 8 * 12 + 12) + (9 * 12 * 12 + 12) + (6 * 12 + 12) + (8 * 12 + 12)),
    ("adagn", 16 + 24 + (9 * 8 * 12 + 12) + (9 * 12 * 12 + 12) + (6 * 24 + 24) + (8 * 12 + 12)),
    # 49 weights and a bias for each of 8 channels; time 6 to 8; norm 2 * 8; 8 to 24 to 12; shortcut
    ("convnext", 8 * 50 + (6 * 8 + 8) + 16 + (8 * 24 + 24) + (24 * 12 + 12) + (8 * 12 + 12))])
def test_parameters_of_a_block(block, expected):
    """The parameters of a block are as many as counted by hand."""
    assert sum(p.numel() for p in BLOCKS[block](8, 12, 6).parameters()) == expected


@pytest.mark.parametrize("block", BLOCKS)
def test_each_block_sees_the_time(block):
    """Another time embedding of one image changes that image's output alone."""
    net, x, emb = randomised(BLOCKS[block](8, 8, 6)), torch.randn(2, 8, 8, 8), torch.randn(2, 6)
    other = torch.stack([emb[0], -emb[1]])
    before, after = net(x, emb), net(x, other)
    torch.testing.assert_close(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-3


def test_adagn_scales_and_shifts_the_norm():
    """Scale 2 and shift 3 give three times the normed features plus three; scale and shift 0 give the plain block."""
    net, x, emb = randomised(ResNetBlock(8, 8, 6, adaptive=True)), torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    net.norm2.reset_parameters()
    with torch.no_grad():
        net.time.weight.zero_()
        net.time.bias.copy_(torch.tensor([2.0] * 8 + [3.0] * 8))
        seen = []
        net.conv2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        net(x, emb)
        y = net.conv1(F.silu(net.norm1(x))).view(2, 4, 2 * 16)  # four groups of two channels
        normed = (y - y.mean(2, keepdim=True)) / (y.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(seen[0], F.silu(3 * normed.view(2, 8, 4, 4) + 3), rtol=1e-4, atol=1e-5)

        plain = ResNetBlock(8, 8, 6)
        for block in (net, plain):
            block.load_state_dict({key: value for key, value in net.state_dict().items() if "time" not in key}, False)
            torch.nn.init.zeros_(block.time.weight)
            torch.nn.init.zeros_(block.time.bias)
        torch.testing.assert_close(net(x, emb), plain(x, emb))


@pytest.mark.parametrize("block, reach", [("convnext", 3), ("resnet", 2)])
def test_receptive_field(block, reach):
    """ConvNeXt looks 3 pixels far, and so sees 7x7. (A ResNet block sees 5x5, and all pixels through its norms.)"""
    net, x = randomised(BLOCKS[block](4, 4, 6)).double(), torch.randn(1, 4, 15, 15).double().requires_grad_()
    if block == "resnet":
        net.norm1 = net.norm2 = torch.nn.Identity()
    net(x, torch.zeros(1, 6).double())[0, :, 7, 7].sum().backward()
    seen = x.grad.abs().amax(dim=(0, 1)) > 0
    expected = torch.zeros(15, 15, dtype=bool)
    expected[7 - reach: 8 + reach, 7 - reach: 8 + reach] = True
    assert torch.equal(seen, expected)


def test_attention_is_torchs_own():
    """What is added to x is the projection of torch's scaled_dot_product_attention, for images that are not square."""
    net, x = randomised(Attention(8)), torch.randn(2, 8, 4, 6)
    q, k, v = F.conv2d(F.group_norm(x, 4, net.norm.weight, net.norm.bias), net.qkv.weight, net.qkv.bias).split(8, dim=1)
    heads = [part.permute(0, 2, 3, 1).reshape(2, 1, 24, 8) for part in (q, k, v)]  # (B, heads, pixels, channels)
    y = F.scaled_dot_product_attention(*heads).reshape(2, 4, 6, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(net(x), x + F.conv2d(y, net.out.weight, net.out.bias))
    assert (net(x) - x).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("name", ROWS)
def test_each_network_sees_the_time(name):
    """A network takes images and times of any batch, begins with the prediction 0, and depends on x and on t."""
    net, x, t = build_network(*ROWS[name][:2], 8, 16), torch.randn(2, 1, 16, 24), torch.tensor([10, 900])
    assert torch.equal(net(x, t), torch.zeros(2, 1, 16, 24))
    randomised(net)
    assert (net(x, t) - net(x, t.flip(0))).abs().amax(dim=(1, 2, 3)).min() > 1e-5
    assert (net(x, t) - net(x.flip(0), t)).abs().amax(dim=(1, 2, 3)).min() > 1e-5


@pytest.mark.parametrize("attention", [True, False])
def test_parameters_of_the_network(attention):
    """The ResNet U-Net of width 8 has the parameters of ten blocks, five attentions, stem, time and head."""
    def block(a, b):
        return 2 * a + 9 * a * b + b + (16 * b + b) + 2 * b + 9 * b * b + b + (a * b + b) * (a != b)

    def attend(c):
        return 2 * c + (3 * c * c + 3 * c) + (c * c + c)

    down = block(8, 8) + block(8, 16) + block(16, 32) + block(32, 32)
    up = block(64, 32) + block(64, 32) + block(48, 16) + block(24, 8)
    rest = (9 * 8 + 8) + 2 * (16 * 16 + 16) + 2 * 8 + (9 * 8 + 1)
    expected = down + 2 * block(32, 32) + up + rest + 5 * attend(32) * attention
    assert count_parameters("resnet", attention, 8, 16) == expected


def test_our_own_unet_is_the_projects():
    """DoubleConv is UNet without masks: three grey channels in, the mean of three out."""
    net, x, t = randomised(GreyUNet(8, 16)), torch.randn(2, 1, 16, 16), torch.tensor([3, 500])
    torch.testing.assert_close(net(x, t)[:, 0], net.net(torch.cat([x, x, x], 1), t).mean(1))


@pytest.mark.parametrize("name, expected", [("DDPM", 16), ("AdaGN", 16), ("ConvNeXt", 25), ("no attention", 16),
                                            ("DoubleConv", 12)])
def test_widths_match_parameters(name, expected):
    """AdaGN (+8 %) and no attention (-11 %) keep their width; the others get DDPM's parameters to within 5 %."""
    block, attention = ROWS[name][:2]
    assert match_width(block, attention, 16, 128) == expected
    count, target = count_parameters(block, attention, expected, 128), count_parameters("resnet", True, 16, 128)
    assert count == pytest.approx(target, rel=0.05 if expected != 16 else 0.12)


def test_schedules_differ_in_one_row():
    """Every row but DoubleConv differs from DDPM in one thing."""
    for name, row in ROWS.items():
        assert sum(a != b for a, b in zip(row[:3], ROWS["DDPM"])) == {"DDPM": 0, "DoubleConv": 2}.get(name, 1)
        Diffusion(schedule=row[2])


# ----------------------------------------------------------------------------------------------------- the study


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command("--n", 3) runs the study on 120 squares of ten grey levels, in this process; it returns results.json."""
    folder, labels = tmp_path / "mnist", (np.arange(120) % 10).astype(np.uint8)
    images = np.zeros((120, 28, 28), np.uint8)
    images[:, 4:24, 4:24] = 25 * labels[:, None, None] + 5
    folder.mkdir()
    write_idx(folder / "t10k-images-idx3-ubyte.gz", images)
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", labels)

    def costs(networks, *_):  # ConvNeXt's steps take twice as long as the others
        return {network: 0.2 if network[0] == "convnext" else 0.1 for network in networks}

    def call(*options):
        settings = [f"--set={key}={value}" for key, value in SMALL.items()]
        arguments = ["--data", folder, "--out", tmp_path / "run", "--trainings", 1, "--n", 3, "--draws", 2]
        monkeypatch.setattr(sys, "argv", ["blocks", *map(str, [*arguments, *settings, *options])])
        blocks.main()
        return json.loads((tmp_path / "run" / "results.json").read_text())

    monkeypatch.setattr(blocks, "measure_costs", costs)
    return call


def test_the_study(command, tmp_path, monkeypatch, capsys):
    """Six rows in three tables hold what was drawn; what is done stays, FID is added; other settings are refused."""
    run = tmp_path / "run"
    first = command()
    assert first["plan"]["ConvNeXt"]["equal time"] == {"width": 4, "steps": 1, "cost": 0.2}
    samples = {path.name: path.stat().st_mtime_ns for path in (run / "samples").iterdir()}
    report = (run / "report.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["network", "---", *ROWS] * 3
    assert [row[-1] for row in rows[2:8]] == ["47.08", "49.30", "44.00", "46.54", "52.48", ""]
    point = first["points"]["ConvNeXt_w4_seed0_1"]
    mean = np.mean([draw["Frechet"] for draw in point["draws"]])
    cells = dict(zip(rows[0], rows[8 + 2 + 2]))  # of the second table's third network
    assert cells["steps"] == "1" and float(cells["Frechet"]) == pytest.approx(mean, rel=1e-2)
    assert np.load(run / "samples" / "ConvNeXt_w4_seed0_1.npy").shape == (6, 32, 32)
    assert np.load(run / "samples" / "DDPM_w4_seed0_1.npy").shape == (3, 32, 32)  # on the way: one set
    finer = [first["points"][f"{name}_w4_seed0_2_finer"]["draws"][0]["Frechet"] for name in ("DDPM", "cosine")]
    for value in finer:
        assert f"{value:.3g} with 10" in report
    plain = np.load(run / "samples" / "cosine_w4_seed0_2.npy")[:3]
    assert not np.array_equal(np.load(run / "samples" / "cosine_w4_seed0_2_finer.npy"), plain)
    assert Image.open(run / "digits.png").width > 7 * 96
    assert Image.open(run / "curves.png").width == 640

    with monkeypatch.context() as patched:
        patched.setattr(blocks, "load_inception", lambda *_: lambda images: images.flatten(1)[:, :200].float())
        second = command("--inception-weights", "file")
    report = (run / "report.md").read_text()
    assert "| FID |" in report and "FID" in capsys.readouterr().out
    assert command() == second  # without the weights
    assert (run / "report.md").read_text() == report
    for key, point in first["points"].items():
        for before, draw in zip(point.pop("draws"), second["points"][key].pop("draws")):
            assert draw["Frechet"] == before["Frechet"] and draw["FID"] >= 0
        assert second["points"][key] == point
    assert {path.name: path.stat().st_mtime_ns for path in (run / "samples").iterdir()} == samples
    with pytest.raises(SystemExit, match="choose another --out"):
        command("--n", 2)


def test_a_training_passes_through_its_points(command, tmp_path, monkeypatch):
    """Digits drawn on the way change nothing: a training without them gives the same ones, bit for bit.

    A second seed is added to the first. Digits of a point that its training has passed cannot be drawn any more.
    """
    run = tmp_path / "run"
    monkeypatch.setattr(blocks, "ROWS", {name: ROWS[name] for name in ("DDPM", "cosine")})
    first = command()
    before = np.load(run / "samples" / "cosine_w4_seed0_2.npy")
    for path in [*run.glob("cosine_w4_seed0*"), run / "samples" / "cosine_w4_seed0_2.npy"]:
        path.unlink()
    second = command("--trainings", 2)
    assert np.array_equal(np.load(run / "samples" / "cosine_w4_seed0_2.npy"), before)
    assert not np.array_equal(np.load(run / "samples" / "cosine_w4_seed1_2.npy"), before)
    finer = {key for key in first["points"] if "finer" in key}
    assert second["plan"] == first["plan"] and len(second["points"]) == 2 * len(first["points"]) - len(finer)
    assert second["points"] | first["points"] == second["points"]
    assert "2 training seed(s)" in (run / "report.md").read_text()
    (run / "samples" / "cosine_w4_seed0_1.npy").unlink()
    with pytest.raises(SystemExit, match="is past step 1"):
        command()


def test_settings_are_kept_from_the_start(command, tmp_path, monkeypatch):
    """Ctrl-C in the judge's training, and other settings are refused; weights of another recipe are, even then."""
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(blocks, "train_judge", interrupt)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            command()
    with pytest.raises(SystemExit, match="choose another --out"):
        command("--set=train.lr=0.5")
    monkeypatch.setattr(blocks, "make_plan", interrupt)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        command()
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(SystemExit, match="judge.pt: begun with another train"):
        command("--set=train.lr=0.5")


def test_the_judge_sees_contrast():
    """Digits have distance 0 to themselves, and more where they are half as bright or their ground is grey."""
    torch.manual_seed(0)
    digits = np.random.default_rng(0).integers(0, 2, (80, 32, 32)).astype(np.uint8) * 200
    measure = make_measure(Judge(), None, digits, torch.device("cpu"))
    assert measure(digits)["Frechet"] < 1e-6
    assert measure(digits // 2)["Frechet"] > 1e-3 and measure(digits // 2 + 100)["Frechet"] > 1e-3
    assert measure(digits, known=["Frechet"]) == {}


def test_spreads_are_of_trainings_and_of_draws():
    """Draws 1, 3 and 5, 9 have means 2 and 7, mean 4.5, and deviations of sqrt(2) and sqrt(8), 2.1 in the mean."""
    points = [{"draws": [{"Frechet": 1.0}, {"Frechet": 3.0}]}, {"draws": [{"Frechet": 5.0}, {"Frechet": 9.0}]}]
    assert list(summarise(points, "Frechet").values()) == ["4.5", "2; 7", "2.1"]
    del points[1]["draws"][0]["Frechet"]
    assert list(summarise(points, "Frechet").values()) == ["-"] * 3


def test_equal_time(monkeypatch):
    """Steps are those that fit into DDPM's time; what differs by less than 5 % is the network of equal steps."""
    costs = {"resnet": 0.1, "adagn": 0.104, "convnext": 0.125, "doubleconv": 0.09}
    monkeypatch.setattr(blocks, "measure_costs", lambda networks, *_: {net: costs[net[0]] for net in networks})
    cfg = blocks.load_config(preset="idd_lite", overrides=["model.hidden_dim=16", "train.steps=1000"])
    plan = make_plan(cfg, None, torch.device("cpu"))
    steps = {name: [run["steps"] for run in runs.values()] for name, runs in plan.items()}
    assert steps == {"DDPM": [1000] * 3, "AdaGN": [1000] * 3, "ConvNeXt": [1000, 800, 1000], "cosine": [1000] * 3,
                     "no attention": [1000] * 3, "DoubleConv": [1000, 1111, 1000]}


def test_costs_are_of_the_network(monkeypatch):
    """The plan gives each network the steps that its own measured seconds leave it, and one cost to equal networks."""
    monkeypatch.setattr(blocks, "ROWS", {name: ROWS[name] for name in ("DDPM", "ConvNeXt", "cosine")})
    monkeypatch.setattr(blocks, "measure_costs", partial(measure_costs, rounds=5))
    cfg = blocks.load_config(preset="idd_lite", overrides=[f"{key}={value}" for key, value in SMALL.items()])
    cfg["train"]["precision"] = "fp32"
    plan = make_plan(cfg, torch.zeros(2, 2, 32, 32, dtype=torch.uint8), torch.device("cpu"))
    base = plan["DDPM"]["equal steps"]["cost"]
    for runs in plan.values():
        expected = max(1, round(2 * base / runs["equal steps"]["cost"]))  # of 2 steps, so never within 5 %
        assert runs["equal time"]["steps"] == expected and 0 < runs["equal steps"]["cost"] < 5
    assert plan["cosine"] == plan["DDPM"]
