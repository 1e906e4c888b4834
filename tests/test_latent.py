"""Latent diffusion: the codebook by hand, attention beside torch's, SSIM beside scikit-image's, the program."""

import argparse
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import CLASSES
from PIL import Image
from skimage.metrics import structural_similarity

from data.common import write_dataset
from ddpm import Diffusion, guided_eps
from experiments import latent
from experiments.latent import Latents, draw_latent, latent_eps
from experiments.latent_nets import (Autoencoder, CrossAttention, LatentUNet, Patches, Quantizer, adversarial_losses,
                                     code_use, ssim, structure_loss)
from experiments.segmenter import main as train_judge
from experiments.training import read
from masks import Colorbook
from unet import UNet

SMALL = {"device": "cpu", "data.size": [32, 32], "model.hidden_dim": 4, "model.emb_dim": 8, "diffusion.T": 20,
         "train.steps": 3, "train.batch_size": 4, "train.val_every": 3, "train.val_pairs": 4, "train.previews": 2,
         "train.preview_every": 3, "train.precision": "fp32"}


def half_scene(seed):
    """Sky above road, in noisy colours."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((32, 32), np.uint8)
    ids[: rng.integers(8, 24)] = 1
    return (np.array([[60, 60, 60], [120, 190, 250]])[ids] + rng.integers(-20, 5, (32, 32, 3))).astype(np.uint8), ids


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("halves") / "prepared"
    splits = {"train": range(12), "val": range(20, 24), "test": range(30, 34)}
    write_dataset(root, Colorbook(CLASSES), {
        split: [(f"half_{i}", lambda i=i: half_scene(i)) for i in seeds] for split, seeds in splits.items()})
    return root


# ---------------------------------------------------------------------------------------------------- the codebook


def test_the_nearest_code_is_chosen():
    """Ids are those of the least Euclidean distance; the gradient passes through as if nothing had been done."""
    torch.manual_seed(0)
    quantizer = Quantizer(7, 3).eval()
    quantizer.codes.normal_()
    z = torch.randn(2, 3, 4, 5, requires_grad=True)
    codes, ids, commitment = quantizer(z)
    expected = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 3), quantizer.codes).argmin(dim=1).view(2, 4, 5)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(codes, quantizer.codes[ids].permute(0, 3, 1, 2))
    assert commitment.item() == pytest.approx((z - codes).square().mean().item())
    codes.backward(torch.arange(120.0).view(2, 3, 4, 5))
    assert torch.equal(z.grad, torch.arange(120.0).view(2, 3, 4, 5))


def test_codes_are_moving_averages():
    """One update of two codes, by hand: what chose each, weighted with 1 - decay."""
    quantizer = Quantizer(2, 1, decay=0.9)
    quantizer.codes.copy_(torch.tensor([[0.0], [10.0]]))
    quantizer.sums.copy_(quantizer.codes)
    quantizer.share.fill_(1.0)
    quantizer(torch.tensor([1.0, 2.0, 3.0, 12.0]).view(1, 1, 2, 2))
    # of four latents a fair share is two: 1, 2, 3 chose the first code, 12 the second
    shares = 0.9 + 0.1 * 3 / 2, 0.9 + 0.1 * 1 / 2
    sums = 0.1 * (1 + 2 + 3) / 2, 0.9 * 10 + 0.1 * 12 / 2
    torch.testing.assert_close(quantizer.codes.flatten(), torch.tensor([s / n for s, n in zip(sums, shares)]))


def test_codes_find_the_clusters_and_dead_ones_are_revived():
    """Codes that begin far from all latents come to life, and find clusters that plain averages never reach."""
    torch.manual_seed(0)
    centres = torch.randn(16, 3)

    def batch():
        return (centres[torch.randint(16, (256,))] + 0.01 * torch.randn(256, 3)).T.reshape(1, 3, 16, 16)

    distances = {}
    for name, revive_below in (("revived", 0.03), ("left alone", -1.0)):
        quantizer = Quantizer(32, 3, revive_below=revive_below)
        quantizer.codes.copy_(100 + torch.randn(32, 3))
        quantizer.sums.copy_(quantizer.codes)
        quantizer.share.fill_(1.0)
        for _ in range(800):
            quantizer(batch())
        _, ids, commitment = quantizer.eval()(batch())
        distances[name] = commitment.item(), code_use(ids, 32)[0]
    assert distances["revived"][0] < 0.2 * distances["left alone"][0]
    assert distances["revived"][1] > 0.8 and distances["left alone"][1] < 0.1


def test_a_quantizer_at_rest_stays_as_it_is():
    """In evaluation nothing moves, and the first call of a training takes the codes from the latents."""
    quantizer, z = Quantizer(4, 3), torch.randn(2, 3, 8, 8)
    quantizer.eval()(z)
    assert not quantizer.codes.any() and quantizer.revived == 0
    quantizer.train()(z)
    assert quantizer.revived == 4 and quantizer.codes.abs().sum(dim=1).min() > 0


def test_use_of_codes():
    """Two codes of eight, one three times as often: a quarter is used, and the perplexity is exp of their entropy."""
    used, perplexity = code_use(torch.tensor([[0, 5], [5, 5]]), 8)
    assert used == 0.25
    assert perplexity == pytest.approx(math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75))))


# -------------------------------------------------------------------------------------------------------- losses


def test_ssim_is_that_of_scikit_image():
    """The same number as scikit-image's with its Gaussian window, and 1 for equal images."""
    rng = np.random.default_rng(0)
    x = rng.random((24, 30, 3))
    y = np.clip(x + rng.normal(0, 0.2, x.shape), 0, 1)
    expected = structural_similarity(x, y, channel_axis=-1, gaussian_weights=True, sigma=1.5,
                                     use_sample_covariance=False, data_range=1.0)
    planes = [torch.tensor(image).permute(2, 0, 1)[None] for image in (x, y)]
    assert ssim(*planes).item() == pytest.approx(expected, abs=1e-6)
    assert structure_loss(planes[0], planes[0]).item() == pytest.approx(0, abs=1e-6)


def test_half_precision_neither_picks_other_codes_nor_changes_ssim():
    """Under autocast codes are the nearest in float32, and SSIM is that of float32."""
    torch.manual_seed(0)
    quantizer, z, x = Quantizer(500, 3).eval(), 10 + torch.randn(2, 3, 16, 16), torch.rand(1, 3, 32, 32)
    quantizer.codes.copy_(10 + torch.randn(500, 3))
    y = (x + 0.02 * torch.randn_like(x)).clamp(0, 1)
    expected = quantizer.nearest(z), ssim(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.nearest(z), expected[0]) and torch.equal(quantizer(z)[1], expected[0])
        torch.testing.assert_close(ssim(x, y), expected[1])


def test_structure_counts_blur_more_than_l1_does():
    """Of two errors of equal L1, blur costs more structure than a shift of brightness."""
    torch.manual_seed(0)
    x = torch.rand(1, 3, 48, 48) - 0.5
    blurred = nn.functional.avg_pool2d(x, 5, 1, 2)
    brighter = x + (x - blurred).abs().mean()
    assert structure_loss(x, blurred) > 2 * structure_loss(x, brighter)


def test_each_side_of_the_contest_gets_its_own_gradient():
    """The discriminator learns from its own loss alone, and the image from its own alone."""
    torch.manual_seed(0)
    patches, x, y = Patches(8), torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16, requires_grad=True)
    of_patches, not_fooled = adversarial_losses(patches, x, y)
    not_fooled.backward()
    assert y.grad.any() and all(weight.grad is None for weight in patches.parameters())
    y.grad = None
    of_patches.backward()
    assert y.grad is None and all(weight.grad is not None for weight in patches.parameters())
    real, made = patches(x), patches(y)
    assert of_patches.item() == pytest.approx(((1 - real).relu().mean() + (1 + made).relu().mean()).item(), rel=1e-5)
    assert not_fooled.item() == pytest.approx(-made.mean().item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------- the latent U-Net


@pytest.mark.parametrize("heads", [1, 4])
def test_cross_attention_is_torchs(heads):
    """With torch's own weights it gives what torch.nn.MultiheadAttention gives."""
    torch.manual_seed(0)
    ours, torchs = CrossAttention(8, 6, heads), nn.MultiheadAttention(8, heads, kdim=6, vdim=6, batch_first=True)
    with torch.no_grad():
        for layer, weight, bias in zip((ours.query, ours.key, ours.value),
                                       (torchs.q_proj_weight, torchs.k_proj_weight, torchs.v_proj_weight),
                                       torchs.in_proj_bias.normal_().chunk(3)):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        ours.out.load_state_dict(torchs.out_proj.state_dict())
        y, context = torch.randn(2, 9, 8), torch.randn(2, 5, 6)
        torch.testing.assert_close(ours.attend(y, context), torchs(y, context, context)[0])


def test_what_the_latent_network_is_told():
    """Mask and labels change the prediction, each by itself; dropped for an image, it is as if never given."""
    torch.manual_seed(0)
    net, x, t = LatentUNet(3, 4, 8), torch.randn(2, 3, 8, 8), torch.tensor([3, 7])
    shares = torch.zeros(2, 3, 8, 8)
    shares[0, 0], shares[1, 1, :4], shares[1, 2, 4:] = 1, 1, 1
    yes, no = torch.tensor([True, True]), torch.tensor([False, False])
    nothing, all_of_it = net(x, t), net(x, t, shares)
    torch.testing.assert_close(net(x, t, shares, keep=no), nothing)
    mixed = net(x, t, shares, keep=torch.tensor([True, False]))
    torch.testing.assert_close(mixed, torch.stack([all_of_it[0], nothing[1]]))
    labels = net(x, t, shares, keep_mask=no)
    assert (labels - nothing).abs().max() > 1e-4 and (labels - all_of_it).abs().max() > 1e-4
    torch.testing.assert_close(net(x, t, shares.flip(2), keep_mask=no), labels)  # the same classes elsewhere
    assert (net(x, t, shares.roll(1, 1), keep_mask=no) - labels).abs().max() > 1e-4
    torch.testing.assert_close(net(x, t, shares, keep=yes, keep_mask=yes), all_of_it)
    parameters = [sum(p.numel() for p in network.parameters()) for network in (net, UNet(3, 4, 8))]
    # labels; then per block of c channels: two norms, query, out and two linear layers (c + 1) c, key and value 9 c
    blocks = sum(2 * 2 * c + 4 * (c + 1) * c + 2 * 9 * c for c in (16, 8))
    assert parameters[0] - parameters[1] == 3 * 3 * 8 + blocks


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_guidance_of_latents_is_that_of_ddpm(guidance):
    """With blocks that pass everything on, guidance is ddpm.guided_eps() of the plain U-Net of the same weights."""
    torch.manual_seed(0)
    net, plain, diffusion = LatentUNet(3, 4, 8).eval(), UNet(3, 4, 8).eval(), Diffusion(T=20, prediction="v")
    net.attention1.forward = net.attention2.forward = lambda x: x
    plain.load_state_dict(net.state_dict(), strict=False)
    x, shares = torch.randn(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(latent_eps(net, diffusion, shares, guidance)(x, 11),
                               guided_eps(plain, diffusion, shares, guidance)(x, 11))


def test_latents_are_scaled_back_and_not_clipped():
    """A network that knows the latents gives back their images, also those far outside of [-1, 1]."""
    torch.manual_seed(0)
    autoencoder, diffusion = Autoencoder(8, 16), Diffusion(T=50, prediction="eps")
    z = 5 + 20 * torch.randn(2, 3, 8, 8)
    autoencoder.train().quantizer(z)
    autoencoder.eval()
    scale = {"mean": [5.0, 4.0, 6.0], "std": [20.0, 10.0, 30.0]}
    mean, std = (torch.tensor(scale[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    clean = (autoencoder.quantizer.lookup(autoencoder.quantizer.nearest(z)) - mean) / std
    assert clean.abs().max() > 1.5

    def oracle(x, t, *_, **__):
        a, s = diffusion.coefficients(t)
        return (x - a * clean) / s

    images = draw_latent(autoencoder, oracle, diffusion, scale, torch.zeros(2, 4, 32, 32), [1, 2], 1, 10)
    with torch.no_grad():
        expected = latent.to_uint8(autoencoder.decode(clean * std + mean))
    assert np.abs(images.astype(int) - expected).max() <= 1


# ------------------------------------------------------------------------------------------------------- the program


def command(*options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["latent", *map(str, options)])
        latent.main()


def test_latents_of_mirrored_images(root):
    """What is trained on: the latents of every image and of its mirror image, beside the shares of their classes."""
    pairs = latent.Pairs(root, "train", (32, 32))
    autoencoder = Autoencoder(8, 16).eval()
    planes = Latents(autoencoder, pairs, True, "fp32", torch.device("cpu")).planes
    assert planes.shape == (24, 7, 8, 8)
    x = pairs.planes[3:4, :3].flip(-1).float() / 127.5 - 1
    torch.testing.assert_close(planes[15, :3], autoencoder.encode(x)[0].detach(), rtol=1e-4, atol=1e-5)
    sky = (pairs.planes[3, 3] == 1).float().flip(-1)
    torch.testing.assert_close(planes[15, 4], sky.view(8, 4, 8, 4).mean(dim=(1, 3)))


def test_a_longer_budget_goes_on(root, tmp_path):
    """The autoencoder and the pixels' network of the longer budget are those of the shorter one, trained on."""
    cfg = latent.load_config(None, "toy", [f"{key}={value}" for key, value in (SMALL | {"data.root": root}).items()])
    args = argparse.Namespace(width=8, codes=16, adversarial=0, heads=2)
    train, val = (latent.Pairs(root, split, (32, 32)) for split in ("train", "val"))

    def budget(name, shorter, steps):
        cfg["train"]["steps"] = steps
        return latent.train_budget(cfg, args, train, val, tmp_path / name, shorter, torch.device("cpu"), 9)

    budget("short", None, 2)
    going_on, anew = budget("long", tmp_path / "short", 5), budget("anew", None, 5)
    for kind in ("autoencoder", "latent"):  # as if it had been trained in one go
        assert going_on[kind][1]["step"] == 5
        for name, weight in anew[kind][1]["ema"].items():
            assert torch.equal(going_on[kind][1]["ema"][name], weight), (kind, name)
    short, longer = read(tmp_path / "short" / "pixel.pt", "pixel"), going_on["pixel"][1]
    assert short["step"] < longer["step"] and short["log"] == longer["log"][: len(short["log"])]


def test_the_study(root, tmp_path, monkeypatch, capsys):
    """Three trainings for each budget, of which the third takes as long as the others, a row for each way, images by
    the latent network; nothing is done twice.
    """
    judge, run = tmp_path / "judge" / "checkpoint.pt", tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["segmenter", "--root", str(root), "--arch", "lraspp_mobilenet_v3_large",
                                      "--steps", "1", "--batch-size", "2", "--out", str(judge.parent)])
    train_judge()
    settings = [f"--set={key}={value}" for key, value in (SMALL | {"data.root": root}).items()]
    options = ["--preset", "toy", *settings, "--run", run, "--width", 8, "--codes", 16, "--masks", 3, "--steps", 2,
               "--judge", judge, "--adversarial", 0.5, "--minutes", "9,8"]
    monkeypatch.setattr(latent, "ADVERSARIAL_AFTER", 1)
    peaks = []
    monkeypatch.setattr(latent, "peak_memory", lambda work, *_: peaks.append(work()) or 2**20 * len(peaks))
    command(*options)
    rows = json.loads((run / "results.json").read_text())
    extra = ("latent, as long as pixels", "pixels, as long as latent", "latent, labels alone")
    expected = ["8 minutes, reconstruction", *(f"8 minutes, {way}, w = 1" for way in ("latent", "pixels"))]
    expected += ["9 minutes, reconstruction", *(f"9 minutes, {way}, w = 1" for way in ("latent", "pixels", *extra))]
    assert list(rows) == expected
    assert len(peaks) == 4  # once for each budget and network
    columns = {name: row["columns"] for name, row in rows.items()}
    assert columns["9 minutes, latent, w = 1"]["steps"] == 2
    longer = columns["9 minutes, latent, as long as pixels, w = 1"]
    ratio = columns["9 minutes, pixels, w = 1"]["s an image"] / columns["9 minutes, latent, w = 1"]["s an image"]
    assert longer["steps"] == min(20, max(1, round(2 * ratio)))
    assert longer["peak MiB"] == columns["9 minutes, latent, w = 1"]["peak MiB"]
    assert float(longer["nearest training image"].split()[0]) > 0
    for minutes in (8, 9):
        states = {kind: read(run / f"{minutes}_minutes" / f"{kind}.pt", kind)
                  for kind in ("autoencoder", "latent", "pixel")}
        assert [states[kind]["step"] for kind in ("autoencoder", "latent")] == [3, 3]
        assert states["autoencoder"]["model"]["age"] == 3 and "patches.0.weight" in states["autoencoder"]["ema"]
        assert states["pixel"]["seconds"] >= states["autoencoder"]["seconds"] + states["latent"]["seconds"] - 0.1
    scale, planes = states["latent"]["about"]["scale"], latent.Pairs(root, "train", (32, 32))
    autoencoder, _ = latent.load(run / "9_minutes", "autoencoder", Autoencoder, torch.device("cpu"))
    z = Latents(autoencoder, planes, True, "fp32", torch.device("cpu")).planes[:, :3]
    torch.testing.assert_close(z.std((0, 2, 3)), torch.tensor(scale["std"]), rtol=1e-3, atol=1e-5)
    printed = capsys.readouterr().out
    assert "| PSNR | SSIM | codes used | perplexity |" in printed and "% of 16 |" in printed
    assert "| steps a second |" in printed
    files = {path: path.stat().st_mtime_ns for path in run.glob("*/images/*/*.png")}
    assert len(files) == 7 * 3 and Image.open(run / "9_minutes" / "sheet.png").size[0] > 3 * 128
    command(*options)
    assert json.loads((run / "results.json").read_text()) == rows
    assert {path: path.stat().st_mtime_ns for path in files} == files and len(peaks) == 4
    with pytest.raises(SystemExit, match="seed was 1, is 5"):
        command(*options, "--seed", 5)

    command("--run", run / "9_minutes", "--mask", root / "test" / "masks" / "half_30.png", "--n", 2, "--steps", 2,
            "--guidance", 2, "--out", tmp_path / "out")
    image = Image.open(tmp_path / "out" / "half_30_w2_seed2.png")
    assert image.size == (32, 32) and json.loads(image.text["settings"])["trained_steps"] == 3
    with pytest.raises(SystemExit, match="name its folder with --run"):
        command("--mask", tmp_path)
    with pytest.raises(SystemExit, match="multiples of 32"):
        command(*options, "--set=data.size=[32,48]")
    with pytest.raises(SystemExit, match="delete latent.pt"):
        command(*options, "--set=train.steps=4")
