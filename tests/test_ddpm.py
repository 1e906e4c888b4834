"""The diffusion against the papers' formulas, Bayes' rule by numbers, and mixtures of which everything is known."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn

from ddpm import (
    Diffusion,
    ddim,
    ddpm,
    dpm_solver,
    guided_eps,
    make_betas,
    noise_like_seeds,
    plms,
    predict_x0,
    sample,
    trailing_steps,
)
from unet import UNet

SHORT = torch.cumprod(1 - torch.linspace(0.01, 0.4, 12, dtype=torch.float64), 0)  # a chain of 12 big steps
SAMPLERS = {
    "ddpm": lambda eps_fn, x, abar, **o: ddpm(eps_fn, x, abar, lambda: torch.zeros_like(x), **o),
    "ddim": lambda eps_fn, x, abar, **o: ddim(eps_fn, x, abar, o.pop("steps", 5), **o),
    "dpm_solver": lambda eps_fn, x, abar, **o: dpm_solver(eps_fn, x, abar, o.pop("steps", 5), **o),
    "plms": lambda eps_fn, x, abar, **o: plms(eps_fn, x, abar, o.pop("steps", 5), **o),
}


WAYS = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("dpm_solver", 0.0), ("plms", 0.0)]  # samplers, and eta of ddim


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(shape, seed):
    """noise() in float64."""
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=g, dtype=torch.float64)


def knows(x0, alpha_bar):
    """The network that is never wrong: the noise between x and the image x0."""
    return lambda x, t: (x - alpha_bar[t].sqrt() * x0) / (1 - alpha_bar[t]).sqrt()


def bent(x, t):
    """Some network: a smooth function of x and t that is nobody's exact answer."""
    return 0.6 * torch.sin(2 * x + 0.3 * t) + 0.2


def trace(sampler, *args, **options):
    """What the sampler returns, and all that observe saw: a list of (t, x, eps, x0)."""
    seen = []
    return sampler(*args, observe=lambda *step: seen.append(step), **options), seen


# -------------------------------------------------------------------------------------------------- schedules


def test_thesis_schedule():
    """The schedule of the thesis is that of the code in its appendix, and ends at 4.0e-5."""
    s = np.linspace(0, 1, 1000)
    expected = (1e-4 + (0.02 - 1e-4) * (1 + np.cos(np.pi * s)) / 2)[::-1]
    np.testing.assert_allclose(make_betas("thesis", 1000).numpy(), expected, rtol=1e-10)
    assert f"{Diffusion().alpha_bar[-1]:.1e}" == "4.0e-05"


def test_linear_schedule():
    """The schedule of DDPM is a straight line, whose last alpha_bar is known to be 4.0358e-5."""
    np.testing.assert_allclose(make_betas("linear", 1000).numpy(), np.linspace(1e-4, 0.02, 1000), rtol=1e-10)
    assert Diffusion(schedule="linear").alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)


def test_nichol_schedule():
    """alpha_bar is f(t) / f(0) of Nichol and Dhariwal, equation 17, up to the clipped end."""
    T, s = 1000, 0.008
    abar = [math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2
            for t in range(T + 1)]
    betas = make_betas("nichol", T).numpy()
    np.testing.assert_allclose(betas, np.minimum(1 - np.divide(abar[1:], abar[:-1]), 0.999), rtol=1e-8)
    assert betas[-1] == 0.999
    np.testing.assert_allclose(Diffusion(T, "nichol").alpha_bar.numpy()[:-1], abar[1:-1], rtol=1e-8)


@pytest.mark.parametrize("schedule", ["thesis", "linear", "nichol"])
@pytest.mark.parametrize("T", [10, 1000])
def test_every_schedule_is_one(schedule, T):
    """A schedule is T variances in (0, 1), in float64, and alpha_bar falls from step to step."""
    betas, abar = make_betas(schedule, T), Diffusion(T, schedule).alpha_bar
    assert betas.dtype == abar.dtype == torch.float64 and betas.shape == abar.shape == (T,)
    assert (betas > 0).all() and (betas < 1).all() and (abar > 0).all() and (abar.diff() < 0).all()
    np.testing.assert_allclose(abar.numpy(), np.cumprod(1 - betas.numpy()), rtol=1e-12)


def test_beta_range_is_a_setting():
    """beta_start and beta_end of Diffusion are the ends of the schedule."""
    d = Diffusion(5, "linear", beta_start=0.1, beta_end=0.5)
    np.testing.assert_allclose(d.alpha_bar.numpy(), np.cumprod([0.9, 0.8, 0.7, 0.6, 0.5]))


@pytest.mark.parametrize("options, found", [
    ({"schedule": "cosine"}, "'cosine'.*thesis, linear or nichol"), ({"prediction": "x0"}, "'x0'.*eps or v")])
def test_unknown_names(options, found):
    """An unknown schedule or prediction is refused with the names there are."""
    with pytest.raises(ValueError, match=found):
        Diffusion(**options)


@pytest.mark.parametrize("options", [
    {"T": 4000}, {"T": 1000, "beta_end": 0.9}, {"T": 1000, "beta_start": 1e-17, "schedule": "linear"},
    {"beta_start": 0.02, "beta_end": 0.01}, {"beta_start": 0.0}, {"beta_end": 1.0}])
def test_schedules_that_are_none(options):
    """Betas that do not rise within (0, 1), or that leave no signal or no noise, are refused with the remedy."""
    with pytest.raises(ValueError, match="alpha_bar goes from .* to .*1e-12.*beta_end|0 < beta_start <= beta_end < 1"):
        Diffusion(**options)
    Diffusion(T=4000, schedule="nichol")  # the darkest end of those in use: 1.5e-10


def test_buffers_move():
    """.to(device) moves what training indexes, and a checkpoint does not store what the config can compute."""
    d = Diffusion()
    assert {name: b.dtype for name, b in d.named_buffers()} == {"signal": torch.float32, "sigma": torch.float32}
    np.testing.assert_allclose(d.signal.numpy(), d.alpha_bar.sqrt().numpy(), rtol=1e-7)
    np.testing.assert_allclose(d.sigma.numpy(), (1 - d.alpha_bar).sqrt().numpy(), rtol=1e-7)
    assert not d.state_dict() and not list(d.parameters())
    assert {b.device.type for b in d.to("meta").buffers()} == {"meta"}


# ------------------------------------------------------------------------------------------ the forward process


@pytest.mark.parametrize("schedule", ["thesis", "linear", "nichol"])
def test_q_sample_is_the_chain(schedule):
    """q(x_t | x_0) in closed form has the mean and variance of the chain, taken one step after the other."""
    d, mean, variance = Diffusion(100, schedule), 1.0, 0.0
    one, zero = torch.ones(1, 3, 2, 2, dtype=torch.float64), torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    for t, beta in enumerate(make_betas(schedule, 100).tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        when = torch.tensor([t])
        torch.testing.assert_close(d.q_sample(one, when, zero), one * mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(d.q_sample(zero, when, one), one * math.sqrt(variance), rtol=1e-6, atol=0)


def test_q_sample_has_a_time_per_image():
    """Every image of a batch is noised to its own t."""
    d, x0, eps, t = Diffusion(), randn(3, 3, 2, 2), randn(3, 3, 2, 2, seed=2), torch.tensor([0, 500, 999])
    for i in range(3):
        abar = d.alpha_bar[t[i]]
        expected = abar.sqrt() * x0[i] + (1 - abar).sqrt() * eps[i]
        torch.testing.assert_close(d.q_sample(x0, t, eps)[i], expected, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------- the loss


class Recorder(nn.Module):
    """A network that predicts `answer` and writes down what it was called with."""

    def __init__(self, answer=0.0):
        super().__init__()
        self.answer, self.calls, self.stem_runs = answer, [], 0

    def mask_features(self, mask):
        self.stem_runs += 1
        return mask.sum(dim=1, keepdim=True).expand(-1, 3, -1, -1)

    def forward(self, x, t, mask=None, *, features=None, keep=None):
        self.calls.append({"x": x, "t": t, "mask": mask, "features": features, "keep": keep})
        return torch.zeros_like(x) + self.answer


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_to_eps_undoes_the_prediction(prediction):
    """The noise that a prediction stands for is eps itself, or v solved for eps."""
    d, x0, eps, t = Diffusion(prediction=prediction), randn(3, 3, 2, 2), randn(3, 3, 2, 2, seed=2), [0, 500, 999]
    a, s = d.alpha_bar[t].sqrt().view(-1, 1, 1, 1), (1 - d.alpha_bar[t]).sqrt().view(-1, 1, 1, 1)
    out = eps if prediction == "eps" else a * eps - s * x0
    back = d.to_eps(out, a * x0 + s * eps, torch.tensor(t))
    torch.testing.assert_close(back.double(), eps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_errors_by_hand(prediction):
    """The errors are of what is predicted, and of the noise that follows: for v alpha_bar times the former."""
    d, x0, eps, t = Diffusion(prediction=prediction), randn(4, 3, 4, 4), randn(4, 3, 4, 4, seed=2), [0, 300, 700, 999]
    abar = d.alpha_bar[t].view(-1, 1, 1, 1)
    out = randn(4, 3, 4, 4, seed=3)
    own, of_noise = d.errors(Recorder(out), x0, None, torch.tensor(t), eps)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    target = eps if prediction == "eps" else abar.sqrt() * eps - (1 - abar).sqrt() * x0
    eps_hat = out if prediction == "eps" else (1 - abar).sqrt() * x_t + abar.sqrt() * out
    torch.testing.assert_close(own.double(), ((out - target) ** 2).mean((1, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of_noise.double(), ((eps_hat - eps) ** 2).mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
    ratio = torch.ones(4, dtype=torch.float64) if prediction == "eps" else abar.flatten()
    torch.testing.assert_close((of_noise / own).double(), ratio, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_loss_is_algorithm_1(prediction):
    """The loss is Algorithm 1 for the numbers it is given: the network sees x_t, t, the mask and which are kept."""
    d, x0, mask = Diffusion(prediction=prediction), randn(4, 3, 4, 4).clamp(-1, 1), torch.ones(4, 5, 4, 4)
    t, eps, keep = torch.tensor([0, 300, 700, 999]), randn(4, 3, 4, 4, seed=2), torch.tensor([True, False, True, True])
    model = Recorder(randn(4, 3, 4, 4, seed=3))
    loss = d.loss(model, x0, mask, t, eps, keep)
    (call,) = model.calls
    assert call["mask"] is mask and torch.equal(call["t"], t) and torch.equal(call["keep"], keep)
    abar = d.alpha_bar[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(call["x"], abar.sqrt() * x0 + (1 - abar).sqrt() * eps, rtol=1e-5, atol=1e-6)
    target = eps if prediction == "eps" else abar.sqrt() * eps - (1 - abar).sqrt() * x0
    torch.testing.assert_close(loss.double(), ((model.answer - target) ** 2).mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("T", [3, 10])
def test_draw(T):
    """t covers 0..T-1 evenly, both ends included; the noise is N(0, 1), every number of its own."""
    B = 20000
    torch.manual_seed(0)
    t, eps, keep = Diffusion(T=T, beta_end=0.3).draw((B, 3, 2, 1))
    assert t.shape == keep.shape == (B,) and eps.shape == (B, 3, 2, 1) and keep.dtype == torch.bool
    counts = t.bincount(minlength=T)
    assert len(counts) == T and ((counts - B / T).abs() < 5 * math.sqrt(B / T * (1 - 1 / T))).all()
    assert abs(eps.mean()) < 5 / math.sqrt(6 * B) and abs(eps.var() - 1) < 5 * math.sqrt(2 / (6 * B))
    assert eps.unique().numel() > 0.99 * eps.numel()
    rows = torch.stack([t.double(), eps[:, 0, 0, 0].double(), eps[:, 2, 1, 0].double(), keep.double()])
    assert (torch.corrcoef(rows) - torch.eye(4)).abs().max() < 5 / math.sqrt(B)  # independent of each other


@pytest.mark.parametrize("options, p", [({"label_drop": 0.0}, 0), ({"label_drop": 1.0}, 1), ({}, 0.1),
                                        ({"label_drop": 0.35}, 0.35)])
def test_labels_are_dropped_per_image(options, p):
    """Each image loses its mask by itself, with the probability that was given, or 0.1."""
    torch.manual_seed(0)
    dropped = (~Diffusion(T=10).draw((20000, 3, 1, 1), **options)[2]).double()
    assert abs(dropped.mean() - p) <= 5 * math.sqrt(p * (1 - p) / 20000)
    per_hundred = dropped.view(-1, 100).sum(1)  # binomial: no lumps of images either
    assert (per_hundred - 100 * p).square().mean().item() == pytest.approx(100 * p * (1 - p), rel=0.5)


def test_draw_is_on_the_device():
    """The numbers are those of the device's generator, on the device; the CPU is the one that is taken by default."""
    d, draws = Diffusion(T=10), []
    for options in ({}, {"device": "cpu"}, {"device": torch.device("cpu")}):
        torch.manual_seed(3)
        draws.append(d.draw((4, 3, 2, 2), **options))
    for other in draws[1:]:
        assert all(torch.equal(a, b) for a, b in zip(draws[0], other))
    assert {part.device.type for part in d.draw((4, 3, 2, 2), device="meta")} == {"meta"}


# --------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("guidance, masked, batches, conditional", [
    (1.0, True, [2], [True]), (0.0, True, [2], [False]), (3.0, False, [2], [False]), (3.0, True, [4], [True]),
    (0.5, True, [4], [True]),
])
def test_passes_per_step(guidance, masked, batches, conditional):
    """A step is one pass where that is enough, else one of twice the size; the mask stem runs once."""
    model, x = Recorder(), torch.zeros(2, 3, 8, 8)
    eps_fn = guided_eps(model, Diffusion(), torch.ones(2, 5, 8, 8) if masked else None, guidance)
    for t in (999, 4, 0):
        model.calls.clear()
        eps_fn(x, t)
        assert [len(call["x"]) for call in model.calls] == batches
        assert [call["features"] is not None for call in model.calls] == conditional
        assert all(call["t"].tolist() == [t] * len(call["x"]) and call["mask"] is None for call in model.calls)
    assert model.stem_runs == masked


def tiny_unet(seed=0, **options):
    torch.manual_seed(seed)
    return UNet(5, hidden_dim=4, emb_dim=8, **options)


def masks(B, seed=2, size=16):
    ids = torch.randint(5, (B, size, size), generator=torch.Generator().manual_seed(seed))
    return (ids[:, None] == torch.arange(5)[:, None, None]).float()


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
@torch.no_grad()
def test_guidance_formula(prediction, guidance):
    """The guided noise is eps_u + w (eps_c - eps_u), for both predictions."""
    model, d, mask, x, t = tiny_unet(), Diffusion(prediction=prediction), masks(2), randn(2, 3, 16, 16).float(), 700
    a, s = d.alpha_bar[t].sqrt().item(), (1 - d.alpha_bar[t]).sqrt().item()
    out_c, out_u = model(x, torch.tensor([t, t]), mask), model(x, torch.tensor([t, t]))
    assert not torch.allclose(out_c, out_u, atol=1e-2)
    eps_c, eps_u = (out if prediction == "eps" else s * x + a * out for out in (out_c, out_u))
    eps = guided_eps(model, d, mask, guidance)(x, t)
    torch.testing.assert_close(eps, eps_u + guidance * (eps_c - eps_u), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("w, inside", [(3.0, 2), (0.0, 1)])
@torch.no_grad()
def test_guidance_in_an_interval(w, inside):
    """From above the lower end up to the upper end of the interval, eps is the guided one, else the conditional one.

    The latter costs one pass; `inside` is what guidance costs.
    """
    model, d, mask, x, passes = tiny_unet(), Diffusion(), masks(1), randn(1, 3, 16, 16).float(), []
    level = ((1 - d.alpha_bar) / d.alpha_bar).sqrt().tolist()
    eps_fn = guided_eps(model, d, mask, w, interval=[level[200], level[600]])
    guided, conditional = guided_eps(model, d, mask, w), guided_eps(model, d, mask, 1.0)
    assert not torch.equal(guided(x, 0), conditional(x, 0))
    model.image_stem.register_forward_hook(lambda _, inputs, output: passes.append(len(output)))
    for t in (0, 200, 201, 600, 601, 999):
        passes.clear()
        eps = eps_fn(x, t)
        assert passes == [inside if t in (201, 600) else 1]
        assert torch.equal(eps, guided(x, t) if t in (201, 600) else conditional(x, t)), t


# ------------------------------------------------------------------------------------- samplers: single steps


@pytest.mark.parametrize("t", [1, 5, 11])
def test_posterior_against_bayes(t):
    """ddpm has the mean of q(x_{t-1} | x_t, x_0) by Bayes' rule on a grid, and DDIM at eta = 1 its variance too."""
    x0, x_t, abar = 0.4, 0.9, SHORT.tolist()
    alpha = abar[t] / abar[t - 1]
    grid = np.linspace(-8, 8, 200001)
    log_prior = -((grid - math.sqrt(abar[t - 1]) * x0) ** 2) / (2 * (1 - abar[t - 1]))
    log_likelihood = -((x_t - math.sqrt(alpha) * grid) ** 2) / (2 * (1 - alpha))
    p = np.exp(log_prior + log_likelihood)
    p /= p.sum()
    mean = (p * grid).sum()
    variance = (p * (grid - mean) ** 2).sum()

    x, chain = torch.full((1, 3, 1, 1), x_t, dtype=torch.float64), SHORT[: t + 1]  # a chain that ends at t starts at t
    eps_fn = knows(torch.full_like(x, x0), chain)

    def next_x(sampler, noise, **options):
        _, seen = trace(sampler, eps_fn, x, chain, noise=lambda: torch.full_like(x, noise), **options)
        assert [s[0] for s in seen[:2]] == [t, t - 1]
        return seen[1][1].flatten().tolist()

    assert next_x(ddpm, 0.0) == pytest.approx([mean] * 3, abs=1e-9)
    assert next_x(ddpm, 1.0) == pytest.approx([mean + math.sqrt(1 - alpha)] * 3, abs=1e-9)  # sigma^2 = beta
    everything = {"steps": t + 1, "eta": 1.0}
    assert next_x(ddim, 0.0, **everything) == pytest.approx([mean] * 3, abs=1e-9)
    assert next_x(ddim, 1.0, **everything) == pytest.approx([mean + math.sqrt(variance)] * 3, abs=1e-9)
    beta_tilde = (1 - abar[t - 1]) / (1 - abar[t]) * (1 - alpha)  # DDPM, equation 7
    assert variance == pytest.approx(beta_tilde, rel=1e-9)


def test_ddpm_is_algorithm_2():
    """ddpm is Algorithm 2 as printed, with the same noise: line 4 at every step, and z = 0 at the last."""
    betas = make_betas("linear", 12, 0.01, 0.4)
    alphas, x_T, shape = 1 - betas, randn(2, 3, 2, 2), (2, 3, 2, 2)
    abar, z = torch.cumprod(alphas, 0), gaussian(shape, 7)
    x = x_T
    for t in reversed(range(12)):
        x = (x - betas[t] / (1 - abar[t]).sqrt() * bent(x, t)) / alphas[t].sqrt()
        if t > 0:
            x = x + betas[t].sqrt() * z()
    torch.testing.assert_close(ddpm(bent, x_T, abar, gaussian(shape, 7), clip=False), x)


@pytest.mark.parametrize("steps", [2, 5, 12])
def test_dpm_solver_is_the_papers_algorithm_2(steps):
    """dpm_solver is Algorithm 2 of Lu et al., on steps uneven enough to tell r = h_{i-1} / h_i from its inverse."""
    ts = trailing_steps(12, steps)
    alpha, sigma = SHORT[ts].sqrt(), (1 - SHORT[ts]).sqrt()
    lam = (alpha / sigma).log()
    h = lam.diff()  # h[i] leads from step i to step i + 1
    x, predictions = randn(2, 3, 2, 2), []
    _, seen = trace(dpm_solver, bent, x, SHORT, steps, clip=False)
    for i, (t, state, _, _) in enumerate(seen):
        torch.testing.assert_close(state, x)
        predictions.append((x - sigma[i] * bent(x, t)) / alpha[i])
        if i < steps - 1:
            D = predictions[i]
            if i > 0:
                r = h[i - 1] / h[i]
                D = (1 + 1 / (2 * r)) * predictions[i] - 1 / (2 * r) * predictions[i - 1]
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * ((-h[i]).exp() - 1) * D


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 12])
def test_plms_is_the_papers(steps, clip):
    """plms is the transfer of Liu et al. along noises whose x_0 is clipped, those of its history too.

    The weights are those that integrate polynomials exactly, from 1 to 4 points.
    """
    x, predictions = 2 * randn(2, 3, 2, 2), []
    result, seen = trace(plms, bent, x, SHORT, steps, clip=clip)

    def clipped(eps, x, abar):
        x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
        return (x - abar.sqrt() * x0.clamp(-1, 1)) / (1 - abar).sqrt() if clip else eps

    ts = trailing_steps(12, steps)
    for (t, state, _, _), t_next in zip(seen, ts[1:] + [None]):
        torch.testing.assert_close(state, x)
        a, b = SHORT[t], SHORT[t_next] if t_next is not None else torch.tensor(1.0)
        predictions.insert(0, clipped(bent(x, t), x, a))
        n = min(4, len(predictions))
        points = np.vander(-np.arange(n), n, increasing=True).T  # at 0, -1, ... steps; row p: to the power p
        w = np.linalg.solve(points, 1 / (1 + np.arange(n)))      # the integral from 0 to 1 of the power p
        eps = clipped(sum(float(w[j]) * predictions[j] for j in range(n)), x, a)
        x = (b / a).sqrt() * x - (b - a) / (a.sqrt() * (((1 - b) * a).sqrt() + ((1 - a) * b).sqrt())) * eps
    torch.testing.assert_close(result, x)
    assert any((predict_x0(s[1], s[2], SHORT[s[0]].item(), clip=False).abs() > 1).any() for s in seen)


@pytest.mark.parametrize("sampler, options, draws", [
    (ddpm, {}, 11), (ddim, {"steps": 12, "eta": 1.0}, 11), (ddim, {"steps": 4, "eta": 0.5}, 3), (ddim, {"steps": 4}, 0),
])
def test_no_noise_at_the_last_step(sampler, options, draws):
    """The last step draws no noise: the image is the last x_0 predicted."""
    calls, x = [], randn(2, 3, 2, 2)
    result, seen = trace(sampler, bent, x, SHORT, noise=lambda: calls.append(1) or torch.ones_like(x), **options)
    assert len(calls) == draws
    torch.testing.assert_close(result, seen[-1][3])


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_with_eta_1_has_ddpms_mean(clip):
    """With all steps, eta = 1 and no noise drawn, DDIM walks the means of DDPM, with clipping too."""
    x = 2 * randn(2, 3, 2, 2)
    _, by_ddpm = trace(SAMPLERS["ddpm"], bent, x, SHORT, clip=clip)  # its noise is zero here
    _, by_ddim = trace(ddim, bent, x, SHORT, 12, eta=1.0, noise=lambda: torch.zeros_like(x), clip=clip)
    for a, b in zip(by_ddpm, by_ddim, strict=True):
        torch.testing.assert_close(a, b)
    assert any((predict_x0(s[1], s[2], SHORT[s[0]].item(), clip=False).abs() > 1).any() for s in by_ddpm)


@pytest.mark.parametrize("eta, noise", [(-0.1, True), (1.1, True), (0.5, False)])
def test_impossible_eta(eta, noise):
    """An eta outside 0..1, or above 0 without noise to draw from, is refused."""
    x = randn(2, 3, 2, 2)
    with pytest.raises(ValueError, match=f"eta must lie in 0..1.*{eta}"):
        ddim(bent, x, SHORT, 5, eta, noise=(lambda: x) if noise else None)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_true_noise_gives_back_the_image(sampler):
    """A network that knows the image gives that image, clipped or not."""
    abar, x0 = Diffusion(50).alpha_bar, randn(2, 3, 4, 4).clamp(-1, 1)
    x_T = abar[-1].sqrt() * x0 + (1 - abar[-1]).sqrt() * randn(2, 3, 4, 4, seed=2)
    for clip in (True, False):
        torch.testing.assert_close(SAMPLERS[sampler](knows(x0, abar), x_T, abar, clip=clip), x0)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver", "plms"])
def test_constant_noise_is_a_straight_path(sampler):
    """Under one noise all the way, every state is sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps of the same x_0."""
    abar, x0, eps = Diffusion(50).alpha_bar, randn(2, 3, 4, 4).clamp(-1, 1), randn(2, 3, 4, 4, seed=2)
    x_T = abar[-1].sqrt() * x0 + (1 - abar[-1]).sqrt() * eps
    _, seen = trace(SAMPLERS[sampler], lambda x, t: eps, x_T, abar)
    assert len(seen) == 5
    for t, x, _, _ in seen:
        torch.testing.assert_close(x, abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * eps)


# --------------------------------------------------------------------------------- samplers: the whole walk


def test_trailing_steps():
    """The steps start at T-1 and fall evenly to 0 or above, as many as were asked for."""
    assert trailing_steps(1000, 10) == list(range(999, 0, -100))
    assert trailing_steps(8, 8) == [7, 6, 5, 4, 3, 2, 1, 0] and trailing_steps(8, 1) == [7]
    for T in (1, 2, 7, 60, 1000):
        for steps in range(1, T + 1, 1 if T < 1000 else 7):
            ts = trailing_steps(T, steps)
            assert ts[0] == T - 1 and len(ts) == steps and ts[-1] >= 0 and all(a > b for a, b in zip(ts, ts[1:]))
            assert all(abs(a - b - T / steps) <= 1 for a, b in zip(ts, ts[1:]))


@pytest.mark.parametrize("steps", [0, -1, 13])
@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver", "plms"])
def test_impossible_steps(sampler, steps):
    """More steps than the chain has, or none, are refused with both numbers."""
    with pytest.raises(ValueError, match=rf"1\.\.12.*{steps}"):
        sample(bent, gaussian((1, 3, 1, 1), 0), SHORT, sampler, steps)


@pytest.mark.parametrize("sampler, steps", [
    ("ddpm", 12), ("ddim", 5), ("dpm_solver", 5), ("plms", 5), ("ddim", 1), ("dpm_solver", 1), ("plms", 1)])
def test_observe(sampler, steps):
    """observe sees every step as (t, x, eps, x_0), with x_0 inside the range of images."""
    x, asked = 2 * randn(2, 3, 2, 2), []
    result, seen = trace(SAMPLERS[sampler], lambda x, t: asked.append((t, x)) or bent(x, t), x, SHORT,
                         **({} if sampler == "ddpm" else {"steps": steps}))
    assert len(seen) == steps and [t for t, *_ in seen] == trailing_steps(12, steps) == [t for t, _ in asked]
    assert all(type(t) is int for t, *_ in seen) and seen[0][1] is x
    for (t, x_t, eps, x0), (_, x_asked) in zip(seen, asked):
        assert torch.equal(x_t, x_asked) and torch.equal(eps, bent(x_t, t))
        torch.testing.assert_close(x0, ((x_t - (1 - SHORT[t]).sqrt() * eps) / SHORT[t].sqrt()).clamp(-1, 1))
    assert any((x0.abs() == 1).any() for *_, x0 in seen)  # something was clipped
    if sampler != "plms" or steps == 1:  # whose last step too goes along a mean of predictions
        torch.testing.assert_close(result, seen[-1][3])
    if sampler == "dpm_solver":
        assert torch.equal(result, seen[-1][3])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sample_by_name(sampler):
    """sample() is the sampler of that name with the settings it was given, and hands observe on."""
    shape, seen = (2, 3, 2, 2), []
    noise = gaussian(shape, 5)
    expected = {
        "ddpm": lambda: ddpm(bent, noise(), SHORT, noise),
        "ddim": lambda: ddim(bent, noise(), SHORT, 5, 0.7, noise),
        "dpm_solver": lambda: dpm_solver(bent, noise(), SHORT, 5),
        "plms": lambda: plms(bent, noise(), SHORT, 5).clamp(-1, 1),
    }[sampler]()
    x = sample(bent, gaussian(shape, 5), SHORT, sampler, 5, eta=0.7, observe=lambda *step: seen.append(step))
    assert torch.equal(x, expected) and len(seen) == (12 if sampler == "ddpm" else 5)


def test_unknown_sampler():
    """An unknown sampler is refused with the names there are."""
    with pytest.raises(ValueError, match="'euler'.*dpm_solver, plms, ddim or ddpm"):
        sample(bent, gaussian((1, 3, 1, 1), 0), SHORT, "euler")


# ----------------------------------------------------------------------------- samplers: a mixture of Gaussians


class Mixture:
    """Images of one pixel from a mixture of Gaussians, of which the noise that a perfect network predicts is known.

    With density p_t of x_t, that is -sqrt(1 - alpha_bar) times the gradient of log p_t.
    """

    def __init__(self, weights, means, stds):
        self.weights, self.means, self.stds = (torch.tensor(a, dtype=torch.float64) for a in (weights, means, stds))

    def eps(self, x, abar):
        var = abar * self.stds**2 + 1 - abar                                           # (components,)
        away = x.flatten(1)[:, None] - math.sqrt(abar) * self.means                    # (B, components, 3)
        log_p = self.weights.log() - 1.5 * var.log() - away.square().sum(2) / (2 * var)
        share = log_p.softmax(1)[:, :, None]                                           # whose x is
        return math.sqrt(1 - abar) * (share * away / var[:, None]).sum(1).view(x.shape)


APART = Mixture([0.3, 0.7], [[-0.6, 0.4, 0.3], [0.5, -0.4, -0.4]], [0.2, 0.15])
BROAD = Mixture([0.5, 0.5], [[-0.5, 0.4, 0.3], [0.5, -0.2, -0.4]], [0.3, 0.3])


def test_mixture_is_the_posterior_mean():
    """The noise of this oracle gives E[x_0 | x_t] as an integral over x_0 does, channel by channel."""
    abar, x_t, grid = 0.3, 0.25, np.linspace(-4, 4, 80001)
    one = Mixture([0.4, 0.6], [[-0.5] * 3, [0.7] * 3], [0.2, 0.4])
    one.means[:, 1:], x = 0, torch.tensor([x_t, 0, 0], dtype=torch.float64).view(1, 3, 1, 1)
    p = 0
    for w, m, s in zip([0.4, 0.6], [-0.5, 0.7], [0.2, 0.4]):  # channels 1 and 2 are 0: they only weigh the components
        other = 1 / (abar * s**2 + 1 - abar)
        p = p + w * other / s * np.exp(-((grid - m) ** 2) / (2 * s**2))
    p = p * np.exp(-((x_t - math.sqrt(abar) * grid) ** 2) / (2 * (1 - abar)))
    mean = predict_x0(x, one.eps(x, abar), abar, clip=False)[0, 0].item()
    assert mean == pytest.approx((p * grid).sum() / p.sum(), abs=1e-6)


@pytest.mark.parametrize("sampler, images, options", [
    ("ddpm", 4000, {}), ("ddim", 4000, {"steps": 250}), ("ddim", 4000, {"steps": 500, "eta": 1.0}),
    ("dpm_solver", 4000, {"steps": 100}), ("plms", 4000, {"steps": 50})])
def test_samples_follow_the_mixture(sampler, images, options):
    """With a perfect network the images have the right shares, means and spreads: to 4.5 sigma, and 3 % of spread."""
    abar, noise = Diffusion().alpha_bar, gaussian((images, 3, 1, 1), 3)
    x = sample(lambda x, t: APART.eps(x, abar[t].item()), noise, abar, sampler, **options).flatten(1)
    near = (x[:, None] - APART.means).square().sum(2).argmin(1)
    for k, (weight, mean, std) in enumerate(zip(APART.weights, APART.means, APART.stds)):
        own = x[near == k]
        assert abs(len(own) / images - weight) < 4.5 * math.sqrt(0.21 / images)
        assert ((own.mean(0) - mean).abs() < 4.5 * std / math.sqrt(len(own)) + 0.005).all()
        spread = (own - own.mean(0)).square().mean().sqrt() / std  # over all three channels
        assert abs(spread - 1) < 4.5 / math.sqrt(6 * len(own)) + 0.03


def ode(eps, x, abar_start, abar_end, n=400):
    """The probability flow by Runge-Kutta: with y = x / sqrt(abar) and s = sqrt((1 - abar) / abar), dy/ds = eps."""
    def slope(y, s):
        return eps(y / math.sqrt(1 + s * s), 1 / (1 + s * s))

    start, end = (math.sqrt((1 - a) / a) for a in (abar_start, abar_end))
    nodes = np.geomspace(start, max(end, 0.01), n).tolist() + ([0.0] if end == 0 else [])
    y = x / math.sqrt(abar_start)
    for s, s_next in zip(nodes, nodes[1:]):
        h = s_next - s
        k1 = slope(y, s)
        k2 = slope(y + h / 2 * k1, s + h / 2)
        k3 = slope(y + h / 2 * k2, s + h / 2)
        k4 = slope(y + h * k3, s_next)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y * math.sqrt(abar_end)


@pytest.mark.parametrize("t", [599, 399, 199])
@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm_solver", 2), ("plms", 2)])
def test_order_of_convergence(sampler, order, t):
    """Twice the steps divide DDIM's error by 2, the others' by 4, against an ODE solver that shares nothing."""
    abar, x = Diffusion().alpha_bar, randn(50, 3, 1, 1)
    exact, errors = ode(APART.eps, x, abar[-1].item(), abar[t].item()), []
    for steps in (50, 100, 200):  # all of them stop at t
        _, seen = trace(SAMPLERS[sampler], lambda x, t: APART.eps(x, abar[t].item()), x, abar, steps=steps, clip=False)
        state = next(state for when, state, *_ in seen if when == t)
        errors.append((state - exact).square().mean().sqrt().item())
    assert errors[0] < 0.02
    pairs = list(zip(errors, errors[1:]))
    for coarse, fine in pairs[-1 if sampler == "plms" else 0 :]:  # PLMS is better than that at first
        assert coarse / fine == pytest.approx(2**order, rel=0.12)


@pytest.mark.parametrize("wanted", [0.7, 1.0])
def test_second_order_beats_ddim_under_guidance(wanted):
    """At w = 3 and 20 steps, images of DPM-Solver++ and PLMS are at most half as far from the exact one as DDIM's.

    Unconditional is the mixture; the condition gives its first part the weight `wanted`.
    """
    abar, x = Diffusion().alpha_bar, randn(100, 3, 1, 1)
    condition = Mixture([wanted, 1 - wanted], BROAD.means.tolist(), BROAD.stds.tolist())

    def eps(x, abar):
        return BROAD.eps(x, abar) + 3 * (condition.eps(x, abar) - BROAD.eps(x, abar))

    exact = ode(eps, x, abar[-1].item(), 1.0)
    error = {name: (SAMPLERS[name](lambda x, t: eps(x, abar[t].item()), x, abar, steps=20, clip=False) - exact)
             .square().mean().sqrt() for name in ("ddim", "dpm_solver", "plms")}
    assert error["dpm_solver"] < 0.5 * error["ddim"] and error["plms"] < 0.5 * error["ddim"]


# ----------------------------------------------------------- samplers: every schedule, every number of steps


class Knows(nn.Module):
    """A network in float32 that knows its images: `given` with a mask, `without` with none."""

    def __init__(self, diffusion, given, without):
        super().__init__()
        self.diffusion, self.images = diffusion, torch.stack([without, given])

    def mask_features(self, mask):
        return torch.ones(len(mask), 1, 1, 1)

    def forward(self, x, t, *, features=None):
        which = torch.zeros(len(x), dtype=torch.long) if features is None else features.flatten().long()
        a, s = (c.double() for c in self.diffusion.coefficients(t))
        eps = (x.double() - a * self.images[which]) / s
        return (eps if self.diffusion.prediction == "eps" else a * eps - s * self.images[which]).float()


@pytest.mark.parametrize("schedule", ["thesis", "linear", "nichol"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("T", [1, 2, 10, 1000])
def test_every_setting_gives_the_known_image(schedule, prediction, T):
    """With every schedule, sampler, number of steps and guidance, the image is that of the guided prediction."""
    d, (given, without) = Diffusion(T, schedule, prediction=prediction), randn(2, 3, 8, 16).clamp(-1, 1).float()
    model, mask = Knows(d, given, without), torch.ones(2, 5, 8, 16)
    runs = [("ddpm", T, 0.0, 3.0)]
    for sampler, eta in (("ddim", 0.0), ("ddim", 1.0), ("dpm_solver", 0.0), ("plms", 0.0)):
        for steps in {1, 2, 5, 20} & set(range(T + 1)):
            runs += [(sampler, steps, eta, w) for w in (1.0, 3.0)]
        runs += [(sampler, T, eta, 3.0)] * (prediction == "v")
    for sampler, steps, eta, w in runs:
        eps_fn = guided_eps(model, d, mask, w)
        x = sample(eps_fn, noise_like_seeds([1, 2], (3, 8, 16)), d.alpha_bar, sampler, steps, eta)
        expected = (without + w * (given - without)).clamp(-1, 1).expand_as(x)
        # the first step divides the rounding of eps by sqrt(alpha_bar), which is 5e-5 in nichol
        atol = 0.02 if steps <= 5 else 1e-3
        torch.testing.assert_close(x, expected, atol=atol, rtol=0, msg=f"{sampler}, {steps} steps, {eta=}, {w=}")


@pytest.mark.parametrize("schedule", ["thesis", "linear", "nichol"])
@pytest.mark.parametrize("sampler, eta", WAYS)
def test_images_have_contrast(schedule, sampler, eta):
    """From 2 to 1000 steps, images differ from each other as those of the mixture do, and are neither mean nor noise.

    Their contrast is measured as a share of the mixture's. A single step can only make the mean of all images.
    """
    abar = Diffusion(1000, schedule).alpha_bar
    mean = (APART.weights[:, None] * APART.means).sum(0)
    contrast = (APART.weights[:, None] * (APART.stds[:, None] ** 2 + (APART.means - mean) ** 2)).sum(0).mean().sqrt()
    for steps, least, most in ((1, 0, 0.02), (2, 0.15, 1.1), (5, 0.6, 1.15), (20, 0.88, 1.05), (1000, 0.95, 1.05)):
        if sampler != "ddpm" or steps == 1000:
            noise = gaussian((500, 3, 1, 1), 3)
            x = sample(lambda x, t: APART.eps(x, abar[t].item()), noise, abar, sampler, steps, eta).flatten(1)
            assert least <= (x - x.mean(0)).square().mean().sqrt() / contrast <= most, steps
            if steps > 1:
                distance = ((x[:, None] - APART.means) / APART.stds[:, None]).square().mean(2).min(1).values
                assert distance.mean() < {2: 3.5, 5: 1.6}.get(steps, 1.15), steps  # it is 1 in the mixture


# ------------------------------------------------------------------------------------ seeds and the real network


def test_noise_depends_on_the_seed_alone():
    """The same seed gives the same noise, in any batch and order and whatever torch's own generator does."""
    shape = (3, 4, 6)
    torch.manual_seed(0)
    a, b = noise_like_seeds([1, 2, 3], shape), noise_like_seeds([3, 9, 1, 2], shape)
    for _ in range(3):  # and stays so call after call
        x = a()
        torch.manual_seed(1)
        torch.testing.assert_close(b()[[2, 3, 0]], x, rtol=0, atol=0)
        assert x.shape == (3, *shape) and not torch.equal(x[0], x[1])
    assert not torch.equal(a(), x)
    many = noise_like_seeds(range(100), (3, 8, 8))()
    assert abs(many.mean()) < 5 / math.sqrt(19200) and abs(many.var() - 1) < 5 * math.sqrt(2 / 19200)


@pytest.mark.parametrize("sampler, eta", WAYS)
def test_same_seed_same_image(sampler, eta):
    """The same seed gives the same image in any batch and order, to rounding, by every sampler."""
    model, d, all_masks = tiny_unet(), Diffusion(T=20, beta_end=0.3, prediction="v"), masks(4)

    def make(numbers):
        eps_fn = guided_eps(model, d, all_masks[numbers], 3.0)
        noise = noise_like_seeds([100 + i for i in numbers], (3, 16, 16))
        return sample(eps_fn, noise, d.alpha_bar, sampler, 6, eta)

    x = make([0, 1, 2])
    assert x.abs().max() <= 1 and not torch.allclose(x[0], x[1], atol=0.1)
    for numbers in ([1], [2, 3, 1, 0]):
        for image, i in zip(make(numbers), numbers):
            if i < 3:
                torch.testing.assert_close(image, x[i], atol=1e-3, rtol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_leaves_the_network_as_it_was(sampler, training):
    """Sampling changes neither the mode nor the weights of the network, and leaves no gradient behind."""
    model, d = tiny_unet().train(training), Diffusion(T=4, beta_end=0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = sample(guided_eps(model, d, masks(1)), noise_like_seeds([1], (3, 16, 16)), d.alpha_bar, sampler, 2)
    assert all(m.training is training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not x.requires_grad and all(p.grad is None for p in model.parameters())
