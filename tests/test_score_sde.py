"""Score-based synthesis: samplers on a mixture whose score is known, guidance on a known posterior, the program."""

import csv
import json
import math
import os
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from ddpm import ddim, noise_like_seeds
from experiments import score_sde
from experiments.segmenter import main as train_judge
from experiments.training import fit, read
from experiments.ve_sde import (annealed_langevin, draw_samples, guided_score, largest_distance, log_likelihood,
                                network_score, noise_levels, predictor_corrector, probability_flow, scale_factor,
                                score_errors, see_through_noise, sigma_at, time_at)
from unet import UNet

MEANS, STDS, SHARES = torch.tensor([0.15, 0.65]), torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.7])
SHAPE, SMAX = (3, 8, 8), 10.0


def mixture_score(x, sigma):
    """The exact score of the noisy mixture sum_k SHARES_k N(MEANS_k, STDS_k^2 + sigma^2), every pixel alike."""
    pixels = x[0].numel()
    variance = STDS**2 + sigma**2
    from_mean = x[None] - MEANS.view(2, *[1] * x.dim())
    log_p = SHARES.log()[:, None] - (from_mean**2).flatten(2).sum(2) / (2 * variance[:, None])
    log_p = log_p - pixels / 2 * variance.log()[:, None]
    share = log_p.softmax(dim=0).view(2, -1, *[1] * (x.dim() - 1))
    return -(share * from_mean / variance.view(2, *[1] * x.dim())).sum(0)


def normal_noise(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(n, *SHAPE, generator=generator)


def check_mixture(x, share, mean=0.01, std=0.05):
    """Samples have the mixture's share of each mode and, within each, its mean and standard deviation per pixel."""
    x = x.flatten(1)
    second = x.mean(dim=1) > 0.35
    assert second.float().mean().item() == pytest.approx(SHARES[1].item(), abs=share)
    for k, mode in enumerate((x[~second], x[second])):
        assert mode.mean().item() == pytest.approx(MEANS[k].item(), abs=mean)
        assert mode.std().item() == pytest.approx(STDS[k].item(), rel=std)
        covariance = torch.cov(mode.T)
        off_diagonal = covariance - covariance.diag().diag()
        assert off_diagonal.mean().abs() < 0.05 * STDS[k] ** 2  # pixels are independent


@pytest.mark.parametrize("sampler, steps", [("pc", 200), ("heun", 40), ("euler", 200)])
def test_samplers_draw_the_mixture(sampler, steps):
    """From the exact score each sampler draws the mixture: shares, means, covariances."""
    check_mixture(draw_samples(mixture_score, normal_noise(400), SMAX, sampler, steps), share=0.08)


def test_langevin_draws_the_mixture():
    """Annealed Langevin dynamics draws the mixture too; steps at low noise are short, so that its spread comes late."""
    sigmas = noise_levels(SMAX, 50)
    check_mixture(annealed_langevin(mixture_score, normal_noise(400), sigmas, 0.2, repeats=8), share=0.08, std=0.15)


def test_predictor_alone_draws_the_mixture():
    """Without a corrector (snr 0) the predictor solves the reverse SDE."""
    check_mixture(predictor_corrector(mixture_score, normal_noise(400), noise_levels(SMAX, 200), snr=0), share=0.08)


def test_the_corrector_has_the_variance_that_it_should():
    """The corrector alone keeps N(0, 1); as printed in Algorithm 3 it has half of that variance."""
    noise, seen = normal_noise(100), []
    predictor_corrector(lambda x, sigma: 0.5 - x, noise, [1.0] * 300, 0.2, lambda sigma, x: seen.append(x))
    assert seen[-2].var().item() == pytest.approx(1, abs=0.06)
    printed = noise()
    for _ in range(300):
        z, s = noise(), -printed
        eps = (0.2 * z.flatten(1).norm(dim=1) / s.flatten(1).norm(dim=1)).view(-1, 1, 1, 1) ** 2
        printed = printed + 2 * eps * s + (2 * eps).sqrt() * z
    assert printed.var().item() == pytest.approx(0.5, abs=0.06)


def test_the_last_step_denoises():
    """Where the data are one image, Algorithm 2 finds it, and Algorithm 1 leaves the noise that its steps make."""
    sigmas, variance = noise_levels(SMAX, 50), SMAX**2
    found, noisy = (annealed_langevin(lambda x, sigma: (0.5 - x) / sigma**2, normal_noise(20), sigmas, 0.1, 3, denoise)
                    for denoise in (True, False))
    for sigma in sigmas:
        for _ in range(3):  # x - 0.5 is multiplied by 1 - 0.1 / 2 and gets noise of variance 0.1 sigma^2
            variance = 0.95**2 * variance + 0.1 * sigma**2
    assert (found - 0.5).abs().max() < 1e-5
    assert (noisy - 0.5).std().item() == pytest.approx(math.sqrt(variance), rel=0.05)


def test_the_predictor_corrector_leaves_no_noise():
    """Where the data are one image, it finds it; before the last step x has the noise of smin."""
    seen = {}
    x = draw_samples(lambda x, sigma: (0.5 - x) / sigma**2, normal_noise(20), SMAX, "pc", 300,
                     observe=lambda sigma, x: seen.update({sigma: x}))
    assert (x - 0.5).abs().max() < 1e-5
    assert len(seen) == 300 and min(seen) == 0
    assert (seen[sorted(seen)[1]] - 0.5).std().item() == pytest.approx(0.01, rel=0.1)


def test_probability_flow_by_euler_is_ddim():
    """In u = (2x - 1) / sqrt(1 + 4 sigma^2), alpha_bar = 1 / (1 + 4 sigma^2), ddim() walks the same trajectory."""
    sigmas, z = noise_levels(SMAX, 30), normal_noise(5)().double()
    alpha_bar = 1 / (1 + 4 * torch.tensor(sigmas[::-1], dtype=torch.float64) ** 2)
    ours, theirs = [], []

    def eps_fn(u, t):
        x = (u / alpha_bar[t].sqrt() + 1) / 2
        theirs.append(x)
        return -sigmas[30 - t] * mixture_score(x, sigmas[30 - t])

    last = ddim(eps_fn, (1 - alpha_bar[-1]).sqrt() * z, alpha_bar, steps=31, clip=False)
    probability_flow(mixture_score, lambda: z, sigmas, heun=False, observe=lambda sigma, x: ours.append(x))
    for x, expected in zip(ours, [*theirs[1:], (last + 1) / 2], strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-9)


def test_heun_is_of_second_order():
    """At equal calls of the score Heun ends far nearer to the truth than Euler, with twice the steps nearer still."""
    def end(steps, heun):
        return probability_flow(mixture_score, normal_noise(50), noise_levels(SMAX, steps), heun)

    exact = end(1000, True)
    error = {(steps, heun): (end(steps, heun) - exact).abs().mean().item()
             for steps, heun in ((60, False), (30, True), (60, True))}
    assert error[30, True] < error[60, False] / 3
    assert error[60, True] < error[30, True] / 2.5


@pytest.mark.parametrize("sampler", ["pc", "langevin", "heun"])
def test_an_image_depends_on_its_seed_alone(sampler):
    """An image is the same alone and in a batch."""
    together, alone = (draw_samples(mixture_score, noise_like_seeds(seeds, SHAPE), SMAX, sampler, 20)
                       for seeds in ([1, 2, 3], [2]))
    torch.testing.assert_close(together[1:2], alone)


# ----------------------------------------------------------------------------------------------------- guidance


def responsibilities(x, sigma):
    """The exact logits of the two modes, given a noisy x."""
    variance = STDS**2 + sigma**2
    squares = (x[None] - MEANS.view(2, *[1] * x.dim())).square().flatten(2).sum(2)
    log_p = SHARES.log()[:, None] - squares / (2 * variance[:, None]) - x[0].numel() / 2 * variance.log()[:, None]
    return log_p.T


def test_guidance_draws_from_the_posterior():
    """With the exact classifier at s = 1, every sample is of the mode that is asked for, and like it."""
    labels = torch.arange(200) % 2
    score_fn = guided_score(mixture_score, responsibilities, labels, lambda sigma: 1.0)
    x = draw_samples(score_fn, normal_noise(200), SMAX, "heun", 40).flatten(1)
    for k in (0, 1):
        mode = x[labels == k]
        assert mode.mean().item() == pytest.approx(MEANS[k].item(), abs=0.01)
        assert mode.std().item() == pytest.approx(STDS[k].item(), rel=0.05)
        assert (mode.mean(dim=1) - MEANS[k]).abs().max() < 0.1


def test_no_guidance_costs_nothing():
    """At s = 0 the classifier is not called, and the score is as it was."""
    x = normal_noise(3)()
    score_fn = guided_score(mixture_score, None, None, lambda sigma: 0.0)
    assert torch.equal(score_fn(x, 1.0), mixture_score(x, 1.0))


@pytest.mark.parametrize("t, expected", [(1, 0), (0.81, 0), (0.8, 2), (0.46, 2), (0.45, 2), (0.225, 0.5), (0, 0)])
def test_scale_factor(t, expected):
    """s(t) of 5.5 for s0 = 2, by hand."""
    assert scale_factor(t, 2.0) == pytest.approx(expected)


def test_log_likelihood_adds_up():
    """log p(y | x) is a sum over labelled pixels and images; even logits give -log K each."""
    ids = torch.tensor([[[0, 1], [2, 255]], [[255, 255], [255, 0]]])
    assert log_likelihood(torch.zeros(2, 3, 2, 2), ids).item() == pytest.approx(-4 * math.log(3))


# ----------------------------------------------------------------------------------------------------- networks


def test_sigma_of_t():
    """sigma grows from 0.01 to smax by equal factors, and time_at() finds t again."""
    assert [sigma_at(t, 100.0) for t in (0, 0.5, 1)] == pytest.approx([0.01, 1, 100])
    assert [time_at(sigma, 100.0) for sigma in (0.01, 0.1, 100)] == pytest.approx([0, 0.25, 1])


def test_smax():
    """The largest distance is that of numpy's over all pairs."""
    images = np.random.default_rng(0).integers(0, 256, (300, 3, 4, 4)).astype(np.uint8)
    rows = images.reshape(300, -1) / 255
    expected = max(np.linalg.norm(rows - row, axis=1).max() for row in rows)
    assert largest_distance(torch.from_numpy(images)) == pytest.approx(expected, abs=0.01)


class ExactNet:
    """What the U-Net would predict if every pixel were drawn from N(0.4, 0.2^2), from its scaled input."""

    def __init__(self, prediction):
        self.prediction, self.seen = prediction, []

    def __call__(self, u, t):
        self.seen.append(u)
        sigma = (0.01 * (SMAX / 0.01) ** (t / 1000)).view(-1, 1, 1, 1)
        abar = 1 / (1 + 4 * sigma**2)
        x = (u / abar.sqrt() + 1) / 2
        eps = sigma * (x - 0.4) / (sigma**2 + 0.04)
        v = abar.sqrt() * eps - (1 - abar).sqrt() * (2 * (x - sigma * eps) - 1)
        return eps if self.prediction == "eps" else v


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("sigma", [0.01, 0.3, SMAX])
def test_network_score(prediction, sigma):
    """A network that predicts noise or v gives the exact score, and sees [-1, 1] or N(0, 1)."""
    x = 0.4 + math.sqrt(0.04 + sigma**2) * normal_noise(200)()
    net = ExactNet(prediction)
    torch.testing.assert_close(network_score(net, SMAX, prediction)(x, sigma), (0.4 - x) / (0.04 + sigma**2),
                               rtol=1e-3, atol=1e-3)
    assert 0.3 < net.seen[0].std() < 1.05


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_score_errors(prediction):
    """The second error is sigma^2 |score + z / sigma|^2; the first is the error of what the network predicts."""
    x0, z, t = torch.rand(4, *SHAPE), normal_noise(4)(), torch.tensor([0.1, 0.4, 0.7, 1.0])
    sigma = sigma_at(t, SMAX).view(-1, 1, 1, 1)
    x = x0 + sigma * z
    score = (0.4 - x) / (0.04 + sigma**2)
    own, of_score = score_errors(ExactNet(prediction), x0, t, z, SMAX, prediction)
    torch.testing.assert_close(of_score, (sigma * score + z).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-5)
    abar = 1 / (1 + 4 * sigma**2)
    target = z if prediction == "eps" else abar.sqrt() * z - (1 - abar).sqrt() * (2 * x0 - 1)
    out = ExactNet(prediction)(abar.sqrt() * (2 * x - 1), 1000 * t)
    torch.testing.assert_close(own, (out - target).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-5)


def test_grey_images_have_one_channel():
    """The U-Net takes grey images, and predicts one channel of noise."""
    score = network_score(UNet(0, 4, 8), SMAX, "v")(torch.rand(2, 1, 16, 16), 0.5)
    assert score.shape == (2, 1, 16, 16)


def test_the_segmenter_sees_a_rescaled_image_and_the_noise():
    """Its input has minimum 0 and maximum 1 whatever the image's range was; its fourth channel is log sigma, or t."""
    seen, t = [], torch.tensor([0.0, 0.5])
    net = lambda x: seen.append(x) or x  # noqa: E731
    x = 50 * normal_noise(2)() - 7
    for encoding, codes in (("log sigma", [math.log(0.01), math.log(math.sqrt(0.01 * SMAX))]), ("t", [0, 0.5])):
        see_through_noise(net, x, t, SMAX, encoding)
        assert seen[-1].shape == (2, 4, 8, 8)
        assert torch.equal(seen[-1][:, :3].amin((1, 2, 3)), torch.zeros(2))
        torch.testing.assert_close(seen[-1][:, :3].amax((1, 2, 3)), torch.ones(2))
        torch.testing.assert_close(seen[-1][:, 3].mean((1, 2)), torch.tensor(codes).float())
    see_through_noise(net, 3 * x + 1, t, SMAX, "t")
    torch.testing.assert_close(seen[-1], seen[-2])


# ----------------------------------------------------------------------------------------------------- training


@pytest.fixture
def fit_line(tiny, tmp_path):
    """fit_line(out, steps) fits a line to noisy points and returns the net; hook(step) is called in every step."""
    def call(out, steps, hook=lambda step: None, about=(), **settings):
        torch.manual_seed(0)
        net, count = torch.nn.Linear(2, 1), []
        c = tiny(train__steps=steps, **settings)["train"]

        def loss(net, batch):
            count.append(0)
            hook(len(count))
            return (net(batch + 0.1 * torch.randn_like(batch)) - batch.sum(1, keepdim=True)).square().mean()

        def load_batches(start):
            while True:
                yield torch.randn(8, 2, generator=torch.Generator().manual_seed(start))
                start += 8

        return fit(net, loss, load_batches, c, tmp_path / out / "net.pt", torch.device("cpu"),
                   {"kind": "line", **dict(about)}, lambda net: {"val": net.weight.sum().item()})
    return call


def test_a_resumed_training_ends_with_the_same_weights(fit_line, tmp_path):
    """Stopped by a signal and gone on with, or lengthened, a training ends with the weights of an undisturbed one."""
    expected = fit_line("straight", 12).weight
    with pytest.raises(SystemExit) as stopped:
        fit_line("stopped", 12, lambda step: step == 3 and os.kill(os.getpid(), signal.SIGINT))
    assert stopped.value.code == 130
    assert torch.equal(fit_line("stopped", 12).weight, expected)
    fit_line("longer", 7)
    assert torch.equal(fit_line("longer", 12).weight, expected)
    (tmp_path / "longer" / "net.pt").unlink()  # as a crash between two renames leaves it
    assert torch.equal(fit_line("longer", 12).weight, expected)
    rows = list(csv.DictReader(open(tmp_path / "longer" / "net.csv")))
    assert [row["step"] for row in rows if row["val"]] == ["5", "7", "10", "12"]
    assert torch.equal(read(tmp_path / "longer" / "net.pt", "line")["ema"]["weight"], expected)


def test_what_cannot_be_resumed_is_refused(fit_line, tmp_path):
    """Another network, a damaged file and another kind are refused by name, and nothing is overwritten."""
    fit_line("run", 2)
    path = tmp_path / "run" / "net.pt"
    before = path.read_bytes()
    with pytest.raises(ValueError, match="begun with another width"):
        fit_line("run", 4, about={"width": 3})
    with pytest.raises(ValueError, match="expected one of kind score"):
        read(path, "score")
    with pytest.raises(ValueError, match="train.py alone"):
        fit_line("run", 4, train__accumulate=2)
    assert path.read_bytes() == before
    path.write_bytes(before[:-100])
    with pytest.raises(ValueError, match="net.pt: not a checkpoint of an experiment"):
        fit_line("run", 4)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read(tmp_path / "none.pt", "line")


# ---------------------------------------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def study(flat_root, tmp_path_factory):
    """study("train", ...) runs a command on small data, in this process; the folder of its run is study.run."""
    folder, patch = tmp_path_factory.mktemp("study"), pytest.MonkeyPatch()
    settings = {"device": "cpu", "data.root": flat_root, "data.size": "[16,24]", "model.hidden_dim": 4,
                "model.emb_dim": 8, "diffusion.T": 20, "train.steps": 3, "train.batch_size": 4, "train.val_pairs": 6,
                "train.val_every": 2, "train.previews": 2, "sample.steps": 2, "sample.precision": "fp32"}
    overrides = [f"--set={key}={value}" for key, value in settings.items()]

    def main_of(function, *arguments):
        patch.setattr(sys, "argv", ["program", *map(str, arguments)])
        function()

    def call(command, *arguments):
        configured = overrides if command not in ("sample", "evaluate") else ["--device=cpu", "--steps=3"]
        main_of(score_sde.main, command, *configured, "--run", call.run, *arguments)

    call.run, call.root, call.folder = folder / "run", flat_root, folder
    call.main_of, call.overrides = main_of, overrides
    patch.setattr(score_sde, "run_program", lambda name, *arguments: main_of(evaluate.main, *arguments))
    patch.setattr(evaluate, "load_inception", lambda *_: None)
    call("train")
    call("train-segmenter")
    yield call
    patch.undo()


def test_training_leaves_checkpoints_logs_and_previews(study, capsys):
    """Both trainings save what they were, what they logged, and a preview; a larger train.steps goes on."""
    score, segmenter = (read(study.run / f"{name}.pt", name)["about"] for name in ("score", "segmenter"))
    study("smax")
    assert f"smax {score['smax']}:" in capsys.readouterr().out
    assert score["smax"] == segmenter["smax"] and score["size"] == [16, 24]
    assert Image.open(study.run / "previews" / "score_0000003.png").size[0] > 256
    rows = list(csv.DictReader(open(study.run / "score.csv")))
    assert [row["step"] for row in rows if row["val_eps"]] == ["2", "3"]
    study("train", "--set=train.steps=4")
    assert read(study.run / "score.pt", "score")["step"] == 4


def test_encodings_are_measured_over_the_noise(study):
    """Each encoding has pixel accuracy and mean IoU at 41 noise levels from 0 to 0.8, of every held-out split."""
    study("train-segmenter", "--encoding", "t")
    levels = json.loads((study.run / "levels.json").read_text())
    assert set(levels) == {f"{split}, {code}" for split in ("val", "test") for code in ("log sigma", "t")}
    for rows in levels.values():
        assert [row["t"] for row in rows] == pytest.approx([0.02 * i for i in range(41)])
        assert all(0 <= row["mean IoU"] <= 1 and 0 <= row["pixel accuracy"] <= 1 for row in rows)
    assert (study.run / "levels_mean_IoU.png").exists() and (study.run / "levels_pixel_accuracy.png").exists()


def test_sampling_is_resumed_and_steered(study, capsys):
    """An image per mask, seed and s0, of the size of the training; the same command makes only what is missing."""
    out, masks = study.folder / "out", study.root / "test" / "masks"
    arguments = ["--mask", masks, "--n", 2, "--s0", "0,2000", "--out", out]
    study("sample", *arguments)
    files = {path: path.stat().st_mtime_ns for path in out.glob("flat_*.png")}
    assert len(files) == 5 * 2 * 2 and all(Image.open(path).size == (24, 16) for path in files)
    unsteered, steered = (np.array(Image.open(out / f"flat_200_w{s0}_seed1.png")).astype(int) for s0 in (0, 2000))
    assert np.abs(unsteered - steered).mean() > 0.1
    gone = out / "flat_202_w2000_seed6.png"
    before = gone.read_bytes()
    gone.unlink()
    study("sample", *arguments)
    assert gone.read_bytes() == before
    assert all(path.stat().st_mtime_ns == time for path, time in files.items() if path != gone)
    printed = capsys.readouterr().out
    assert "s0 = 0: " in printed and "an image, 5 network calls\n" in printed


def test_every_sampler_is_in_reach(study):
    """--sampler names each of the four."""
    for sampler in ("pc", "langevin", "heun", "euler"):
        out = study.folder / sampler
        study("sample", "--mask", study.root / "test" / "masks" / "flat_200.png", "--n", 1, "--s0", 1,
              "--sampler", sampler, "--out", out)
        assert (out / "flat_200_w1_seed1.png").exists()


@pytest.fixture(scope="module")
def evaluated(study):
    """The options of a small evaluation, whose networks are trained, and the rows of its results.json."""
    study.main_of(train.main, *study.overrides, f"--set=out={study.folder / 'ddpm'}")
    study.main_of(train_judge, "--root", study.root, "--arch", "lraspp_mobilenet_v3_large", "--steps", 1,
                  "--batch-size", 2, "--detail", "16x24", "--out", study.folder / "judge")
    options = ["--root", study.root, "--judge", study.folder / "judge" / "checkpoint.pt", "--masks", 4,
               "--val-masks", 3, "--s0", "1,4", "--ddpm", study.folder / "ddpm" / "checkpoint.pt"]
    study("evaluate", *options)
    return options, json.loads((study.run / "evaluation" / "results.json").read_text())


def test_s0_is_chosen_on_val(study, evaluated, monkeypatch):
    """A row for each s0 on val; on test, one of the s0 with the highest share of mean IoU there, and one of DDPM."""
    rows = evaluated[1]
    shares = {s0: float(rows[f"val, s0 = {s0}"]["columns"]["share of mean IoU"].split()[0]) for s0 in (1, 4)}
    best = max(shares, key=shares.get)
    assert list(rows) == ["val, s0 = 1", "val, s0 = 4", f"test, s0 = {best}", "test, DDPM"]
    for name, row in rows.items():
        split, method = name.split(", ")
        folder = study.run / "evaluation" / f"{split}_{method.replace(' = ', '_')}"
        n = {"val": 3, "test": 4}[split]
        assert row["settings"]["masks"] == n == len(list(folder.glob("*.png")))
        report = json.loads((folder.with_name(f"report_{folder.name}") / "report.json").read_text())
        assert report["n"] == f"{n} real, {n} generated"
        assert row["columns"]["SSIM"].startswith(f"{report['numbers']['SSIM']['value']:.3f} [")
        # three levels: both halves of pc at smax and at the one below 0.8, then the step to no noise
        steered = {"network calls": 2 + 2 + 1, "segmenter calls": 2}
        expected = {"network calls": 2 * 2, "segmenter calls": 0} if method == "DDPM" else steered
        assert {key: row["columns"][key] for key in expected} == expected
    assert (study.run / "evaluation" / "val.png").exists() and (study.run / "evaluation" / "test.png").exists()


def test_rows_stand_for_what_they_were_made_from(study, evaluated, capsys):
    """Finished rows stay, printed in a table; another sampler, number of masks, DDPM or score network is refused."""
    options, rows = evaluated
    file = study.run / "evaluation" / "results.json"
    study("evaluate", *options)
    assert json.loads(file.read_text()) == rows and "| test, DDPM | " in capsys.readouterr().out
    other = study.folder / "other_seed"
    study.main_of(train.main, *study.overrides, "--set=seed=1", f"--set=out={other}")
    for changed, words in ((["--snr", 0.2], "snr was 0.1, is 0.2"), (["--val-masks", 2], "masks was 3, is 2"),
                           (["--ddpm", other / "checkpoint.pt"], "weights_crc32 was")):
        with pytest.raises(SystemExit, match=words):
            study("evaluate", *options, *changed)
    study("train", "--set=train.steps=5")
    with pytest.raises(SystemExit, match="trained_steps was [34], is 5"):
        study("evaluate", *options)


def test_the_judge_is_opened_before_the_sampling(study):
    """A wrong --judge ends the evaluation before an image is made."""
    with pytest.raises(SystemExit, match="nowhere.pt: .*not a segmenter"):
        study("evaluate", "--root", study.root, "--judge", "nowhere.pt", "--s0", 77)
    assert not list(study.run.glob("evaluation/*77*"))


def test_costs_survive_a_judge_that_fails(study, evaluated, monkeypatch):
    """Seconds and calls of an image are kept where the judging fails after the sampling."""
    def fail(*_):
        raise ValueError("no judge today")

    options = [*evaluated[0], "--s0", 9, "--seed", 1]
    with monkeypatch.context() as patch:
        patch.setattr(score_sde, "run_program", fail)
        with pytest.raises(SystemExit, match="no judge today"):
            study("evaluate", *options)
    file = study.run / "evaluation" / "results.json"
    cost = json.loads(file.read_text())["val, s0 = 9"]["cost"]
    study("evaluate", *options)
    columns = json.loads(file.read_text())["val, s0 = 9"]["columns"]
    assert cost["s an image"] > 0 and columns | cost == columns


def test_ddpm_of_another_size_is_refused(study, evaluated):
    """DDPM is compared at one size and of the same classes only."""
    other = study.folder / "other_size"
    study.main_of(train.main, *study.overrides, "--set=data.size=[16,16]", f"--set=out={other}")
    with pytest.raises(SystemExit, match=r"its size is \[16, 16\], expected \[16, 24\]"):
        study("evaluate", *evaluated[0], "--ddpm", other / "checkpoint.pt")


def test_precisions_are_compared(study, capsys):
    """A row for each precision, with seconds, memory and loss of as many steps."""
    study("precision")
    printed = capsys.readouterr().out
    assert "| precision | steps | s a step | peak GiB | loss | val_loss | val_eps |" in printed
    assert "| fp32 | 3 |" in printed


def test_networks_that_do_not_belong_together_are_refused(study):
    """A segmenter of other noise than the score's is refused, and so is a run that was not trained."""
    other = study.folder / "other"
    other.mkdir()
    for name in ("score", "segmenter"):
        (other / f"{name}.pt").write_bytes((study.run / f"{name}.pt").read_bytes())
    state = torch.load(other / "segmenter.pt")
    state["about"]["smax"] += 1
    torch.save(state, other / "segmenter.pt")
    arguments = "--mask", study.root / "test" / "masks", "--out", study.folder / "none"
    with pytest.raises(SystemExit, match="trained with another smax"):
        study("sample", "--run", other, *arguments)
    with pytest.raises(SystemExit, match="no such checkpoint; train the score network first"):
        study("sample", "--run", study.folder / "nothing", *arguments)
