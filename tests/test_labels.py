"""Letters that are asked for: the U-Net of labels, fonts, and that the table holds what was measured."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from config import load_config
from ddpm import Diffusion, guided_eps
from experiments import label_unet, labels
from experiments.label_unet import (Labelled, LabelUNet, LinearAttention, Reader, compare_features, draw_labels,
                                    linear_attention, share_with_interval, train_generator, with_interval)
from experiments.labels import read_fonts, render, share_out

SMALL = {"device": "cpu", "model.hidden_dim": 4, "model.emb_dim": 8, "diffusion.T": 10, "diffusion.beta_end": 0.9,
         "train.steps": 2, "train.batch_size": 4, "train.val_pairs": 4, "train.previews": 2, "sample.precision": "fp32"}


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    """Twelve fonts of twelve names, Pillow's own font under each, and two files that are no fonts of letters."""
    folder = tmp_path_factory.mktemp("fonts")
    data = ImageFont.load_default(10).font_bytes
    for i in range(12):
        name = f"{chr(65 + i)}ileron"
        renamed = data.replace("Aileron".encode("utf-16-be"), name.encode("utf-16-be"))
        (folder / f"{i}.ttf").write_bytes(renamed.replace(b"Aileron", name.encode()))
    (folder / "text.ttf").write_bytes(b"no font at all")
    (folder / "empty.otf").write_bytes(b"")
    return folder


@pytest.fixture
def model():
    """A small network with random last layer, for three labels and three channels."""
    torch.manual_seed(0)
    return LabelUNet(3, 3, 8, 16).eval()


# ------------------------------------------------------------------------------------------------------ networks


def quadratic(q, k, v):
    """The same attention by its n x n matrix of weights, each an inner product of two softmaxes, and that matrix."""
    rows = (q.exp() / q.exp().sum(-1, keepdim=True))
    columns = (k.exp() / k.exp().sum(-2, keepdim=True))
    weights = torch.einsum("bhic,bhjc->bhij", rows, columns)
    return torch.einsum("bhij,bhjd->bhid", weights, v), weights


def test_linear_attention_is_its_quadratic_form():
    """It equals the product with its n x n matrix, whose rows are weights: not negative, with the sum 1."""
    q, k, v = torch.randn(3, 2, 4, 30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, weights = quadratic(q, k, v)
    assert torch.allclose(linear_attention(q, k, v), expected, atol=1e-12)
    assert (weights >= 0).all() and torch.allclose(weights.sum(-1), torch.ones(2, 4, 30, dtype=torch.float64))


def test_linear_attention_is_linear():
    """A million positions, whose n x n matrix would have 4 TB, are attended to; equal values stay what they are."""
    q, k = torch.randn(2, 1, 1, 2**20, 2)
    out = linear_attention(q, k, torch.tensor([3.0, -1.0]).expand_as(q))
    assert torch.allclose(out, torch.tensor([3.0, -1.0]).expand_as(out), atol=1e-3)


def test_the_block_attends_over_all_positions_in_four_heads():
    """The block is x + W A V of the normalised x, by its own weights and the quadratic form, head by head."""
    block = LinearAttention(8)
    x = torch.randn(2, 8, 4, 6)
    y = torch.nn.functional.group_norm(x, 1, block.norm.weight, block.norm.bias)
    q, k, v = (torch.einsum("oc,bchw->bohw", part, y).flatten(2) for part in block.qkv.weight[:, :, 0, 0].split(8))
    heads = []
    for head in range(4):
        mine = slice(2 * head, 2 * head + 2)
        out, _ = quadratic(*(part[:, None, mine].transpose(2, 3) for part in (q, k, v)))
        heads.append(out[:, 0].transpose(1, 2))
    joined = torch.cat(heads, dim=1).view(2, 8, 4, 6)
    expected = x + torch.einsum("oc,bchw->bohw", block.out.weight[:, :, 0, 0], joined)
    assert torch.allclose(block(x), expected + block.out.bias.view(1, 8, 1, 1), atol=1e-5)


def test_four_downs_four_ups_and_attention_before_each(model):
    """Attention sees 32, 16, 8, 4 pixels a side on the way down, 2, 4, 8, 16 on the way up; parameters by hand."""
    sides = []
    for block in model.modules():
        if isinstance(block, LinearAttention):
            block.register_forward_hook(lambda block, inputs, out: sides.append(out.shape[2]))
    x = torch.randn(2, 3, 32, 32)
    assert model(x, torch.tensor([3, 9]), torch.tensor([0, 2])).shape == x.shape
    assert sides == [32, 16, 8, 4, 2, 4, 8, 16]

    def double_conv(a, b, mid=None):
        mid = mid or b
        return 9 * a * mid + 2 * mid + 9 * mid * b + 2 * b

    def attention(c):
        return 2 * c + 3 * c * c + c * c + c

    h, E = 8, 16
    widths = [h, 2 * h, 4 * h, 4 * h]
    count = 3 * E + E * E + E + double_conv(3, h) + double_conv(4 * h, 4 * h) + 3 * h + 3
    count += 2 * sum(map(attention, widths))
    for a, b in zip(widths, [2 * h, 4 * h, 4 * h, 4 * h]):
        count += double_conv(a, a) + double_conv(a, b) + E * b + b
    for a, b in zip(widths, [h, h, 2 * h, 4 * h]):
        count += double_conv(2 * a, 2 * a) + double_conv(2 * a, b, a) + E * b + b
    assert sum(p.numel() for p in model.parameters()) == count
    with pytest.raises(ValueError, match="multiple of 4"):
        LabelUNet(3, 3, 6, 16)


def test_the_label_is_added_to_the_time(model):
    """Each label has an image of its own; a dropped label, none, and one whose embedding is 0 are the zero-label."""
    x, t, asked = torch.randn(3, 3, 32, 32), torch.tensor([5, 5, 5]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        none, out = model(x, t), model(x, t, asked)
        kept = model(x, t, asked, keep=torch.tensor([True, False, True]))
        assert torch.allclose(kept[[0, 2]], out[[0, 2]], atol=1e-5) and torch.allclose(kept[1], none[1], atol=1e-5)
        assert all((out[i] - none[i]).abs().max() > 1e-3 for i in range(3))
        model.label.weight[1] = 0
        assert torch.allclose(model(x, t, asked)[1], none[1], atol=1e-5)
        # a label whose embedding is what another time differs by is that time
        model.label.weight[2] = (label_unet.time_embedding(torch.tensor([9]), 16)
                                 - label_unet.time_embedding(torch.tensor([5]), 16))[0]
        assert torch.allclose(model(x, t, asked)[2], model(x, torch.tensor([9, 9, 9]))[2], atol=1e-4)


@pytest.mark.parametrize("w", [0.0, 1.0, 5.0])
def test_guidance_of_labels(model, w):
    """guided_eps() gives eps_u + w (eps_c - eps_u) of two single passes."""
    diffusion, x = Diffusion(T=20, prediction="eps"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        t, asked = torch.tensor([7, 7]), torch.tensor([2, 0])
        conditional, unconditional = model(x, t, asked), model(x, t)
        found = guided_eps(model, diffusion, asked, w)(x, 7)
    assert torch.allclose(found, unconditional + w * (conditional - unconditional), atol=1e-4)


def train_on_black_and_white(file, **settings):
    """A generator of images that are black where their label is 0 and white where it is 1."""
    asked = np.arange(64) % 2
    pairs = Labelled(np.broadcast_to(255 * asked[:, None, None, None], (64, 16, 16, 1)).astype(np.uint8), asked)
    settings = SMALL | {"train.batch_size": 8, "train.lr": 0.01, "train.warmup": 10, "train.ema": 0.9,
                        "train.label_drop": 0.2} | settings
    cfg = load_config(preset="idd_lite", overrides=[f"{key}={value}" for key, value in settings.items()])
    return train_generator(cfg, pairs, pairs, 2, file, torch.device("cpu"))


def test_a_label_is_learnt(tmp_path, monkeypatch):
    """After 60 steps on black and on white images, samples are as dark as their label asks, at guidance 1 and 5."""
    monkeypatch.setattr(label_unet, "SIZE", 16)
    model, diffusion = train_on_black_and_white(tmp_path / "generator.pt", **{"train.steps": 60})
    wanted = torch.tensor([0, 1, 0, 1])
    for w in (1.0, 5.0):
        images, _ = draw_labels(model, diffusion, wanted, 1, w, steps=10)
        dark, light = images[::2].mean(), images[1::2].mean()
        assert dark < 80 and light > 175, (w, dark, light)
    again, _ = draw_labels(model, diffusion, wanted[2:], 3, 5.0, steps=10)
    assert np.abs(again.astype(int) - images[2:]).max() <= 1  # the seeds count on from image to image


def test_a_training_goes_on(tmp_path, monkeypatch):
    """Two steps and two more give the weights of four, bit for bit."""
    monkeypatch.setattr(label_unet, "SIZE", 16)
    whole, _ = train_on_black_and_white(tmp_path / "whole.pt", **{"train.steps": 4})
    for steps in (2, 4):
        resumed, _ = train_on_black_and_white(tmp_path / "parts.pt", **{"train.steps": steps})
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


# ------------------------------------------------------------------------------------------------------ measures


def test_features_are_compared_label_by_label():
    """Of points on a line: the Frechet distance is (difference of means)^2 + (difference of deviations)^2."""
    def spread(mean, deviation):  # n = 2: the sample deviation is that of two points so far apart
        return torch.tensor([[mean - deviation / math.sqrt(2)], [mean + deviation / math.sqrt(2)]], dtype=torch.float64)

    features, real = torch.cat([spread(0, 1), spread(10, 2)]), torch.cat([spread(3, 1), spread(10, 4)])
    found = compare_features(features, torch.tensor([0, 0, 1, 1]), real, torch.tensor([0, 0, 1, 1]))
    assert found["own"] == pytest.approx([9, 4]) and found["variety"] == pytest.approx([1, 0.25])
    mean, deviation = real.mean().item(), real.std().item()
    assert found["all"] == pytest.approx([mean**2 + (deviation - 1) ** 2, (mean - 10) ** 2 + (deviation - 2) ** 2])


def test_the_interval_of_a_mean():
    """90 ones of 100 are 0.9 +- 1.96 sqrt(0.9 0.1 / 99)."""
    assert with_interval([1] * 90 + [0] * 10) == f"0.9 ± {1.96 * math.sqrt(0.09 / 99):.2g}"


def test_the_interval_of_a_share():
    """Wilson's interval is where |p - share| = 1.96 sqrt(p (1 - p) / n), also where all or none are hits."""
    for hits, n in (90, 100), (52, 52), (0, 8):
        share, low, high = map(float, re.findall(r"[\d.]+", share_with_interval(torch.arange(n) < hits)))
        assert share == hits / n and (low, high) != (share, share)
        for end in {low, high} - {0.0, 1.0}:
            assert abs(end - share) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / n), rel=0.02)


def test_the_reader_reads_in_any_batch():
    """Logits are the last layer of the 32 features; 130 images come in two batches, in their order."""
    reader, images = Reader(1, 26).eval(), torch.rand(130, 1, 32, 32)
    logits, features = reader.read(images)
    assert features.shape == (130, 32) and torch.allclose(logits, reader.out(features.float()).double(), atol=1e-5)
    assert torch.allclose(logits[128:], reader(images[128:]).double(), atol=1e-5)


# --------------------------------------------------------------------------------------------------------- fonts


def test_letters_are_rendered(fonts):
    """A to Z fill 28 of 32 pixels in one direction, centred, and look like the font; the design is the first word."""
    design, letters = render(fonts / "1.ttf")
    assert design == "Bileron" and letters.shape == (26, 32, 32, 1) and letters.dtype == np.uint8
    inked = letters[..., 0] < 128
    sides = []
    for ink in inked:
        ys, xs = np.nonzero(ink)
        sides += [np.ptp(ys) + 1, np.ptp(xs) + 1]
        assert abs(ys.min() + ys.max() - 31) <= 2 and abs(xs.min() + xs.max() - 31) <= 2
    assert 27 <= max(sides) <= 28 and max(sides) == sides[2 * labels.LETTERS.index("W") + 1]
    o, i = letters[labels.LETTERS.index("O")], letters[labels.LETTERS.index("I")]
    assert o[16, 16] == 255 and o.min() < 60  # an O is open
    assert i[6:25, 15].max() < 128 and i[:, :12].min() == 255  # an I is a stroke


def test_unusable_fonts_are_left_out_and_too_few_refused(fonts, tmp_path, capsys):
    """Files that are no fonts are named; where fewer than ten designs are left, it is said where fonts come from."""
    assert len(read_fonts([fonts])) == 12
    assert "12 fonts of 12 designs; 2 without letters: empty.otf, text.ttf" in capsys.readouterr().out
    (tmp_path / "one.ttf").write_bytes((fonts / "0.ttf").read_bytes())
    with pytest.raises(ValueError, match="1 designs; expected 10 designs or more.*--fonts.*apt-get install"):
        read_fonts([tmp_path])


def test_designs_are_shared_out():
    """No design is in two parts; half of them are the generator's; the letter is the label."""
    designs = {f"d{i:02}": np.broadcast_to(np.arange(26)[:, None, None, None] + 30 * (i % 8), (i % 3 + 1, 26, 32, 32, 1)
                                           ).astype(np.uint8) for i in range(8)}
    parts = share_out(designs)
    seen = [set((part.planes[:, 0, 0, 0] // 30).tolist()) for part in parts]
    assert [len(names) for names in seen] == [4, 2, 2] and len(set.union(*seen)) == 8
    assert all(torch.equal(part.planes[:, 0, 5, 5] % 30, part.labels) for part in parts)
    assert sum(map(len, parts)) == 26 * sum(map(len, designs.values()))


# --------------------------------------------------------------------------------------------------------- study


def test_the_study(fonts, tmp_path, monkeypatch, capsys):
    """A row for each way, of the same seeds; a fifth of the labels is dropped; what is finished stays."""
    dropped, draw = set(), Diffusion.draw
    monkeypatch.setattr(labels, "render", lambda path: (  # the fonts differ in how high their letters stand
        render(path)[0], np.roll(render(path)[1], int(path.stem, 36) % 5, axis=1)))

    def call(*options):
        settings = [f"--set={key}={value}" for key, value in SMALL.items()]
        arguments = ["--fonts", fonts, "--run", tmp_path / "run", "--n", 3, "--ddpm-n", 2, *settings, *options]
        monkeypatch.setattr(sys, "argv", ["labels", *map(str, arguments)])
        labels.main()
        return json.loads((tmp_path / "run" / "results.json").read_text())["rows"]

    monkeypatch.setattr(Diffusion, "draw", lambda self, shape, drop, device: (dropped.add(drop), draw(
        self, shape, drop, device))[1])
    monkeypatch.setattr(labels, "PLMS_STEPS", 3)
    first = call("--guidance", "1")
    kept = tmp_path / "run" / "samples_PLMS_3_w_1.npy"
    before = kept.stat().st_mtime_ns
    rows = call("--guidance", "1,5")
    assert dropped == {0.2} and kept.stat().st_mtime_ns == before
    assert rows["PLMS 3, w = 1"] == first["PLMS 3, w = 1"]
    assert {"own fonts", "PLMS 3, w = 1", "PLMS 3, w = 5", "DDPM, w = 5"} <= set(rows)
    assert rows["PLMS 3, w = 5"]["n"] == 78 and rows["own fonts"]["s for 15"] == "-"
    assert Image.open(tmp_path / "run" / "letters.png").size == (26 * 68 + 4, 4 * 68 + 4)
    own = np.load(tmp_path / "run" / "samples_own_fonts.npy")
    assert any(np.array_equal(own[:26], np.roll(render(fonts / "0.ttf")[1], i, axis=1)) for i in range(5))
    printed = capsys.readouterr().out
    assert (tmp_path / "run" / "report.md").read_text(encoding="utf-8") in printed
    assert "156 letters for the generator, 78 for the reader, 78 held out" in printed and "| variety |" in printed
    assert re.search(r"\| PLMS 3, w = 5, fewer \| 52 \|.*\n\| DDPM, w = 5 \| 52 \|", printed)  # of the same seeds
    assert re.search(r"The reader reads 0[.\d]* \[[\d.]+, [\d.]+\] of the held-out letters", printed)
    monkeypatch.setattr(labels, "train_generator", None)  # the refusal comes before any training
    for name, changed in {"seed": ("--seed", 9), "minutes": ("--minutes", 3), "config.train.lr": (
            "--set", "train.lr=0.1")}.items():
        with pytest.raises(SystemExit, match=rf"results.json: made with another {name} \(was .*choose another --run"):
            call(*changed)
    with pytest.raises(SystemExit, match="needs 2 or more"):
        call("--ddpm-n", 1)
    with pytest.raises(SystemExit, match="compared with as many"):
        call("--ddpm-n", 4)
