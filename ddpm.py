"""Diffusion: noise schedules, the training loss, and four hand-written samplers.

    diffusion = Diffusion(T=1000, schedule="thesis")
    loss = diffusion.loss(model, x0, mask, *diffusion.draw(x0.shape))  # Algorithm 1
    eps_fn = guided_eps(model, diffusion, mask, guidance=3.0)       # the network as a noise prediction
    noise = noise_like_seeds([1, 2, 3], (3, 64, 64), device)        # one seed per image
    x0 = dpm_solver(eps_fn, noise(), diffusion.alpha_bar, steps=20) # or plms, ddim, ddpm

Images are float in [-1, 1], shape (B, 3, H, W); masks are one-hot (B, K, H, W); t is 0..T-1 everywhere, and
x_t = sqrt(alpha_bar[t]) x_0 + sqrt(1 - alpha_bar[t]) eps. A sampler knows nothing of networks: it is given any
function eps_fn(x, t) with t an int, so that an exact answer can stand in for the network.

Sources: Ho et al. 2020 (DDPM), Ho and Salimans 2022 (classifier-free guidance), Salimans and Ho 2022 (v),
Song et al. 2021 (DDIM), Lu et al. 2022 (DPM-Solver++), Liu et al. 2022 (PLMS), Kynkäänniemi et al. 2024 (guidance in an
interval), Wang et al. 2023 (DDNM: keeping pixels), Nichol and Dhariwal 2021, and the thesis (Bozsó 2023).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------ schedules


def make_betas(schedule="thesis", T=1000, beta_start=1e-4, beta_end=0.02):
    """The variances beta (T,) in float64, each in (0, 1).

    "thesis"   betas shaped like half a cosine from beta_start to beta_end (Bozsó 2023, appendix)
    "linear"   DDPM, section 4
    "nichol"   the cosine alpha_bar of Nichol and Dhariwal, equation 17; beta_start and beta_end play no part
    """
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"expected 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
    s = torch.linspace(0, 1, T, dtype=torch.float64)
    if schedule == "thesis":
        return (beta_start + (beta_end - beta_start) * (1 + torch.cos(math.pi * s)) / 2).flip(0)
    if schedule == "linear":
        return beta_start + (beta_end - beta_start) * s
    if schedule == "nichol":
        f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)
    raise ValueError(f"unknown schedule {schedule!r}: expected thesis, linear or nichol")


class Diffusion(nn.Module):
    """The forward process, and what the network is trained to predict.

    prediction  "eps", the noise (DDPM), or "v" = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans and Ho)
    alpha_bar   (T,) float64 on the CPU, for the samplers; the float32 buffers for training move with .to(device)
    """

    def __init__(self, T=1000, schedule="thesis", beta_start=1e-4, beta_end=0.02, prediction="eps"):
        super().__init__()
        if prediction not in ("eps", "v"):
            raise ValueError(f"unknown prediction {prediction!r}: expected eps or v")
        self.T, self.prediction = T, prediction
        self.alpha_bar = torch.cumprod(1 - make_betas(schedule, T, beta_start, beta_end), dim=0)
        if self.alpha_bar[-1] < 1e-12 or self.alpha_bar[0] > 1 - 1e-12:  # predictions are divided by their roots
            raise ValueError(f"schedule {schedule!r}, T {T}, betas {beta_start} to {beta_end}: alpha_bar goes from "
                             f"{self.alpha_bar[0]:.3g} to {self.alpha_bar[-1]:.3g}; expected values of at least 1e-12, "
                             "and below 1 by as much: choose another T, beta_start or beta_end (nichol has its own)")
        self.register_buffer("signal", self.alpha_bar.sqrt().float(), persistent=False)       # sqrt(alpha_bar)
        self.register_buffer("sigma", (1 - self.alpha_bar).sqrt().float(), persistent=False)  # sqrt(1 - alpha_bar)

    def coefficients(self, t):
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at t (B,), each (B, 1, 1, 1)."""
        return self.signal[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x_0) in one step: x0, eps (B, 3, H, W), t (B,) in 0..T-1 (DDPM, equation 4)."""
        a, s = self.coefficients(t)
        return a * x0 + s * eps

    def to_eps(self, out, x, t):
        """The noise that the network's output `out` at (x, t) stands for, in float32."""
        a, s = self.coefficients(t)
        return out.float() if self.prediction == "eps" else s * x + a * out.float()

    def draw(self, shape, label_drop=0.1, device=None):
        """The random numbers of a training step on images of shape (B, 3, H, W): t (B,), eps like them, keep (B,) bool.

        keep is False with probability label_drop (p_uncond of Ho and Salimans): such an image is trained without its
        mask, so that one network learns both the conditional and the unconditional prediction.
        """
        t = torch.randint(self.T, shape[:1], device=device)
        eps = torch.randn(shape, device=device)
        keep = torch.rand(shape[0], device=device) >= label_drop
        return t, eps, keep

    def errors(self, model, x0, mask, t, eps, keep=None):
        """Mean squared errors of each image, two (B,): in the target of the training (eps or v), and in eps.

        The second compares networks that predict different things; for "v" it is alpha_bar times the first.
        """
        a, s = self.coefficients(t)
        target = eps if self.prediction == "eps" else a * eps - s * x0
        out = model(self.q_sample(x0, t, eps), t, mask, keep=keep)
        error = (out.float() - target).square().mean(dim=(1, 2, 3))
        return error, error if self.prediction == "eps" else a.flatten() ** 2 * error

    def loss(self, model, x0, mask, t, eps, keep=None):
        """Algorithm 1 of DDPM, line 5, for images x0 (B, 3, H, W) in [-1, 1] and what draw() drew; a scalar."""
        return self.errors(model, x0, mask, t, eps, keep)[0].mean()


# ----------------------------------------------------------------------------------- the network as eps_fn


def guided_eps(model, diffusion, mask=None, guidance=3.0, interval=None):
    """A function eps_fn(x, t) with classifier-free guidance: eps = eps_u + w (eps_c - eps_u), w = guidance.

    mask       one-hot (B, K, H, W), or None for unconditional samples; its features are computed here, once
    guidance   w; 1 is the conditional prediction alone and 0 the unconditional one, in one pass of the network per
               step; every other value takes two, as one batch of 2B
    interval   (low, high): use w only where low < sqrt((1 - alpha_bar) / alpha_bar) <= high, the noise for a signal
               of 1, and w = 1 at other t (Kynkäänniemi et al. 2024). None: w everywhere
    """
    low, high = interval or (0.0, math.inf)
    noise_level = ((1 - diffusion.alpha_bar) / diffusion.alpha_bar).sqrt().tolist()
    with torch.no_grad():
        features = None if mask is None else model.mask_features(mask)

    def eps_fn(x, t):
        w = guidance if low < noise_level[t] <= high else 1
        t = torch.full((len(x),), t, device=x.device)
        if features is None or w == 0:
            out = model(x, t)
        elif w == 1:
            out = model(x, t, features=features)
        else:
            both = torch.cat([features, torch.zeros_like(features)])  # adding zeros is adding no mask
            out_c, out_u = model(torch.cat([x, x]), torch.cat([t, t]), features=both).float().chunk(2)
            out = out_u + w * (out_c - out_u)
        return diffusion.to_eps(out, x, t)  # the weights 1 - w and w add up to 1, so guiding v guides eps

    return eps_fn


def keep_pixels(eps_fn, image, keep, alpha_bar):
    """An eps_fn for redrawing a part of a real image: the x_0 that it predicts is `image` where `keep` is true.

    image (B, 3, H, W) in [-1, 1], keep (B, 1, H, W) bool; for every sampler, which then returns the kept pixels.

    To replace the predicted x_0 is DDNM (Wang et al. 2023) with a mask as its operator. By itself it leaves a frame
    around the new part, since the network sees the real pixels only through the noise. So what it got wrong there is
    also carried over the border: a membrane, in which every new pixel has the mean of its neighbours (Pérez et al.
    2003), relaxed for 40 rounds only, so that it fades away. For smooth images it is about the conditional mean of
    the new pixels given the kept ones. x_0 is clipped here, whatever the sampler does.
    """
    reach = max(1, min(image.shape[2:]) // 64)  # of a round, in pixels

    def eps_fn_that_keeps(x, t):
        abar = alpha_bar[t].item()
        x0 = predict_x0(x, eps_fn(x, t), abar)
        error = torch.where(keep, image - x0, 0)
        membrane = error
        for _ in range(40):
            mean = F.avg_pool2d(membrane, 2 * reach + 1, 1, reach, count_include_pad=False)
            membrane = torch.where(keep, error, mean)
        return predict_eps(x, (x0 + membrane).clamp(-1, 1), abar)

    return eps_fn_that_keeps


def noise_like_seeds(seeds, shape, device="cpu"):
    """A function that draws noise (len(seeds), *shape), each image from a generator of its own.

    The numbers depend on the image's seed alone: on neither the batch around it nor the device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


# ------------------------------------------------------------------------------------------------- samplers
# Each takes eps_fn(x, t), the starting noise x (B, 3, H, W) and alpha_bar (T,), and returns x_0.
# observe(t, x, eps, x0), where given, is called at every step with x_t, the noise predicted in it and the image
# predicted from it: for progress bars, drawings and lessons.


def trailing_steps(T, steps):
    """`steps` time steps from T-1 downwards, evenly spaced (Lin et al. 2024, "trailing"): ints."""
    if not 1 <= steps <= T:
        raise ValueError(f"steps must lie in 1..{T}, got {steps}")
    return [round(T - i * T / steps) - 1 for i in range(steps)]


def steps_down(alpha_bar, steps):
    """[(t, alpha_bar at t, alpha_bar at the next step)] of trailing_steps(); after the last one it is 1: no noise."""
    ts = trailing_steps(len(alpha_bar), steps)
    levels = [*alpha_bar[ts].tolist(), 1.0]
    return list(zip(ts, levels, levels[1:]))


def predict_x0(x, eps, abar, clip=True):
    """x_0 from x_t and the noise in it; clip bounds it to [-1, 1], the range of images."""
    x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    return x0.clamp(-1, 1) if clip else x0


def predict_eps(x, x0, abar):
    """The noise that turns x_0 into x_t; where x_0 was clipped, it is not the network's own."""
    return (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)


def denoise(eps_fn, x, t, abar, clip, observe):
    """One call of the network: the x_0 that it predicts from the state x at t."""
    eps = eps_fn(x, t)
    x0 = predict_x0(x, eps, abar, clip)
    if observe:
        observe(t, x, eps, x0)
    return x0


@torch.no_grad()
def ddpm(eps_fn, x, alpha_bar, noise, clip=True, observe=None):
    """Algorithm 2 of DDPM: all T steps of the ancestral chain, sigma^2 = beta; noise() draws z like x.

    The mean is written through x_0 (DDPM, equation 7), which for an x_0 that is not clipped is Algorithm 2's line 4.
    """
    for t, abar, abar_next in steps_down(alpha_bar, len(alpha_bar)):  # the next step is t - 1
        alpha = abar / abar_next
        beta = 1 - alpha
        x0 = denoise(eps_fn, x, t, abar, clip, observe)
        x = (math.sqrt(abar_next) * beta * x0 + math.sqrt(alpha) * (1 - abar_next) * x) / (1 - abar)
        if t > 0:  # no noise at the last step
            x = x + math.sqrt(beta) * noise()
    return x


@torch.no_grad()
def ddim(eps_fn, x, alpha_bar, steps=50, eta=0.0, noise=None, clip=True, observe=None):
    """DDIM (Song et al. 2021, equation 12): eta = 0 is deterministic, eta = 1 has the variance of DDPM's posterior.

    noise() draws z like x and is needed where eta > 0.
    """
    if not 0 <= eta <= 1 or eta > 0 and noise is None:
        raise ValueError(f"eta must lie in 0..1, and above 0 needs noise(); got eta {eta}")
    for t, abar, abar_next in steps_down(alpha_bar, steps):
        x0 = denoise(eps_fn, x, t, abar, clip, observe)
        eps = predict_eps(x, x0, abar)
        sigma = eta * math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))  # equation 16
        x = math.sqrt(abar_next) * x0 + math.sqrt(max(0.0, 1 - abar_next - sigma**2)) * eps
        if sigma > 0:
            x = x + sigma * noise()
    return x


@torch.no_grad()
def dpm_solver(eps_fn, x, alpha_bar, steps=20, clip=True, observe=None):
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): data prediction, deterministic, second order.

    lam = log(signal / noise) is the variable in which the remaining integral is smooth. The last step goes to zero
    noise, where lam is infinite and the update becomes x = x_0.
    """
    x0_before = lam_before = None
    for t, abar, abar_next in steps_down(alpha_bar, steps):
        x0 = denoise(eps_fn, x, t, abar, clip, observe)
        if abar_next == 1:
            return x0
        lam, lam_next = (0.5 * math.log(a / (1 - a)) for a in (abar, abar_next))
        h = lam_next - lam
        D = x0
        if x0_before is not None:  # the line through the last two predictions, halfway into this step
            r = (lam - lam_before) / h
            D = x0 + (x0 - x0_before) / (2 * r)
        x = math.sqrt((1 - abar_next) / (1 - abar)) * x - math.sqrt(abar_next) * math.expm1(-h) * D
        x0_before, lam_before = x0, lam


@torch.no_grad()
def plms(eps_fn, x, alpha_bar, steps=20, clip=True, observe=None):
    """PLMS (Liu et al. 2022): DDIM's step along a mean of the last four noises, extrapolated (Adams-Bashforth).

    Without the paper's Runge-Kutta start: the first three steps take fewer noises, so that every step is one call of
    eps_fn, which limits the whole to second order. Deterministic.
    """
    weights = [(1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
    history = []  # of noises, the newest first
    for t, abar, abar_next in steps_down(alpha_bar, steps):
        x0 = denoise(eps_fn, x, t, abar, clip, observe)
        history = [predict_eps(x, x0, abar), *history[:3]]
        eps = sum(weight * past for weight, past in zip(weights[len(history) - 1], history))
        x0 = predict_x0(x, eps, abar, clip)
        x = math.sqrt(abar_next) * x0 + math.sqrt(1 - abar_next) * predict_eps(x, x0, abar)
    return x


def sample(eps_fn, noise, alpha_bar, sampler="dpm_solver", steps=20, eta=0.0, observe=None):
    """Images (B, 3, H, W) in [-1, 1] by the sampler of that name; ddpm always walks all T steps."""
    if sampler == "ddpm":
        x = ddpm(eps_fn, noise(), alpha_bar, noise, observe=observe)
    elif sampler == "ddim":
        x = ddim(eps_fn, noise(), alpha_bar, steps, eta, noise, observe=observe)
    elif sampler == "dpm_solver":
        x = dpm_solver(eps_fn, noise(), alpha_bar, steps, observe=observe)
    elif sampler == "plms":
        x = plms(eps_fn, noise(), alpha_bar, steps, observe=observe)
    else:
        raise ValueError(f"unknown sampler {sampler!r}: expected dpm_solver, plms, ddim or ddpm")
    return x.clamp(-1, 1)
