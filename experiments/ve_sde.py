"""The maths of score-based semantic synthesis: the VE-SDE, score, samplers, and the guidance of a segmenter.

    score_fn = network_score(model, smax, prediction)               # any function (x, sigma), an exact one too
    steered = guided_score(score_fn, logits_fn, ids, strength)      # + s(t) grad log p(y | x)
    x0 = predictor_corrector(steered, noise, noise_levels(smax, 300))

Images are in [0, 1], (B, C, H, W), and drowned in noise: x(t) = x(0) + sigma(t) z, t in 0..1. A sampler knows nothing
of networks. Sections and equations are those of the seed, "score-based semantic synthesis" (see score_sde.py).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from masks import UNLABELLED
from unet import DoubleConv

SIGMA_MIN = 0.01
T_HIGHEST = 0.8  # above it there is nothing to be seen (5.4.3): the segmenter neither learns nor steers there
T_FADING = 0.45  # below it the structures of the image stand, and the segmenter fades out (5.2.5)

# --------------------------------------------------------------------------------------------------- the VE-SDE
# sigma is a float in the samplers and a tensor (B,) in the training; t = 0 is the image, t = 1 the noise.


def sigma_at(t, smax):
    """sigma(t) = smin (smax / smin)^t (5.2)."""
    return SIGMA_MIN * (smax / SIGMA_MIN) ** t


def time_at(sigma, smax):
    """The t of a float sigma: the inverse of sigma_at()."""
    return math.log(sigma / SIGMA_MIN) / math.log(smax / SIGMA_MIN)


def noise_levels(smax, steps):
    """steps + 1 sigmas, evenly spaced in t, from smax down to smin."""
    return [sigma_at(1 - i / steps, smax) for i in range(steps + 1)]


def largest_distance(images):
    """smax (4.3.1): the largest Euclidean distance between two of the images (N, ...) uint8, with pixels in [0, 1].

    Of all pairs: seconds for 1000 images of 64x64. The seed takes random pairs (5.4.3), which may miss the largest.
    """
    parts, largest = images.flatten(1).split(256), 0.0
    for i, a in enumerate(tqdm(parts, "distances", leave=False)):
        for b in parts[: i + 1]:
            largest = max(largest, torch.cdist(a.float(), b.float()).max().item())
    return round(largest / 255, 2)


# -------------------------------------------------------------------------------------------- the score network


def predict_noise(model, x, t, smax, prediction):
    """The noise z that the U-Net sees in images x (B, 3, H, W) = x(0) + sigma(t) z; the score is -z / sigma.

    The U-Net is to be given [-1, 1] where there is no noise and N(0, 1) where there is nothing else, hence
    u = (2x - 1) / sqrt(1 + 4 sigma^2). That is x_t of DDPM at alpha_bar = 1 / (1 + 4 sigma^2): the VE-SDE differs
    from it by this change of variables alone. Its time embedding is made for 0..1000, and t is log sigma, scaled.
    prediction: what its output stands for, "eps" (the seed's) or "v", as in ddpm.py. Grey images (B, 1, H, W) go in
    as three equal channels, of whose outputs the mean is taken.
    """
    sigma = sigma_at(t, smax).view(-1, 1, 1, 1)
    signal = (1 + 4 * sigma**2).rsqrt()  # sqrt(alpha_bar)
    u = signal * (2 * x - 1)
    out = model(u.expand(-1, 3, -1, -1), 1000 * t).float()
    if x.shape[1] == 1:
        out = out.mean(dim=1, keepdim=True)
    return out if prediction == "eps" else 2 * sigma * signal * u + signal * out


def score_errors(model, x0, t, z, smax, prediction):
    """lambda |s(x(t)) + z / sigma|^2 (4.8, 4.14), mean over each image x0 (B, 3, H, W) in [0, 1]; (2, B), two lambdas.

    The first is trained, the second, lambda = sigma^2, is the seed's: the error of the noise. For "eps" they are equal.
    For "v" the first is (1 + 4 sigma^2) times the second, which makes it the error of v: at high noise the noise is
    easy to see, and what matters is the image behind it.
    """
    sigma = sigma_at(t, smax)
    noisy = x0 + sigma.view(-1, 1, 1, 1) * z  # 5.1
    error = (predict_noise(model, noisy, t, smax, prediction) - z).square().mean(dim=(1, 2, 3))
    return torch.stack([error if prediction == "eps" else (1 + 4 * sigma**2) * error, error])


def network_score(model, smax, prediction):
    """The network as score_fn(x, sigma): images (B, 3, H, W) and a float to the score, like x."""

    def score_fn(x, sigma):
        t = torch.full((len(x),), time_at(sigma, smax), device=x.device)
        return -predict_noise(model, x, t, smax, prediction) / sigma

    return score_fn


# ----------------------------------------------------------------------------------------------------- samplers
# Each takes score_fn(x, sigma), a function noise() that draws z (B, ...), and what noise levels to walk; it returns
# x(0). observe(sigma, x), where given, is called at every level.


def start(sigmas, noise):
    """x(1), which the seed's algorithms leave open: noise around a middle grey.

    Around 0 every image would begin too dark: at 64x64 a mean of 0.5 is 55 from 0, and smax about 80.
    """
    return 0.5 + sigmas[0] * noise()


def norm(x):
    """The norm of each image of x (B, ...), shaped to multiply it. One for the whole batch would tie its images."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))


def remove_noise(score_fn, x, sigma):
    """The mean of all images that x, with noise of sigma, may be: Tweedie's formula, one more call of the score."""
    return x + sigma**2 * score_fn(x, sigma)


@torch.no_grad()
def annealed_langevin(score_fn, noise, sigmas, step=0.05, repeats=5, denoise=True, observe=None):
    """Algorithms 1 and 2: `repeats` steps of Langevin dynamics (T there) at each of the falling sigmas.

    step is epsilon / sigma_L^2, so that alpha_i = step sigma_i^2. In the printed Algorithm 2 the denoising stands
    inside the loop over i, which would end at i = 1.
    """
    x = start(sigmas, noise)
    for sigma in sigmas:
        alpha = step * sigma**2
        for _ in range(repeats):
            x = x + alpha / 2 * score_fn(x, sigma) + math.sqrt(alpha) * noise()  # 4.7
        if observe:
            observe(sigma, x)
    return remove_noise(score_fn, x, sigmas[-1]) if denoise else x


@torch.no_grad()
def predictor_corrector(score_fn, noise, sigmas, snr=0.1, observe=None):
    """Algorithm 3: at each level a step of Langevin dynamics, the corrector, then one of the reverse SDE (4.11).

    The corrector goes first, as in the code of Song et al. 2021 (their text has the predictor first). Where the seed's
    printed algorithm cannot be meant (Song's appendix G has it right):
    - its corrector, x + 2 eps s + sqrt(2 eps) z, has half the variance that p_t has; the noise has to be sqrt(4 eps) z
    - its predictor has no score in it and only adds noise; the drift of 4.11 for VE is g^2 s, downwards in t
    - z_{i-1} is the z drawn just before, anew for each half; the predictor's score is that of the corrected x
    - it returns x with its noise, smin; so does, but for a twentieth, the mean of the last of 300 steps, as in Song's
      code: 2.5 grey levels. Here a step to no noise follows, as in Algorithm 2
    g^2 dt = d sigma^2 = 2 sigma^2 log(smax / smin) dt: Euler-Maruyama (4.20, which lacks the root of tau at g).
    """
    x = start(sigmas, noise)
    for sigma, lower in zip(sigmas, sigmas[1:]):
        z, s = noise(), score_fn(x, sigma)
        eps = (snr * norm(z) / norm(s)) ** 2
        x = x + 2 * eps * s + 2 * eps.sqrt() * z
        variance = 2 * sigma**2 * math.log(sigma / lower)  # g^2 dt
        x = x + variance * score_fn(x, sigma) + math.sqrt(variance) * noise()
        if observe:
            observe(lower, x)
    x = remove_noise(score_fn, x, sigmas[-1])
    if observe:
        observe(0.0, x)
    return x


@torch.no_grad()
def probability_flow(score_fn, noise, sigmas, heun=True, observe=None):
    """The ODE of 4.21, for VE dx = -sigma s d sigma; deterministic from x = smax z on, and to sigma = 0 at the end.

    -sigma s is the predicted noise, so a step of Euler (heun=False) is DDIM: in u = (2x - 1) / sqrt(1 + 4 sigma^2) it
    is the same step. Heun takes the mean of the slopes at both ends, except at the last step, at whose end is none.
    """
    x = start(sigmas, noise)
    for sigma, lower in zip(sigmas, [*sigmas[1:], 0.0]):
        slope = -sigma * score_fn(x, sigma)
        ahead = x + (lower - sigma) * slope
        if heun and lower > 0:
            slope = (slope - lower * score_fn(ahead, lower)) / 2
            ahead = x + (lower - sigma) * slope
        x = ahead
        if observe:
            observe(lower, x)
    return x


def draw_samples(score_fn, noise, smax, sampler, steps, snr=0.1, observe=None):
    """x(0) in `steps` steps of the sampler of that name: pc, langevin, heun, or euler, which is DDIM."""
    if steps < 2:
        raise ValueError(f"steps must be 2 or more, from smax to smin, got {steps}")
    sigmas = noise_levels(smax, steps - 1)  # the last step, from smin, is one to no noise
    if sampler == "pc":
        return predictor_corrector(score_fn, noise, sigmas, snr, observe)
    if sampler == "langevin":
        return annealed_langevin(score_fn, noise, sigmas, observe=observe)
    return probability_flow(score_fn, noise, sigmas, sampler == "heun", observe)


# -------------------------------------------------------------------------------- the segmenter of noisy images


class NoisySegmenter(nn.Module):
    """A plain U-Net (5.2): an image and a fourth channel, (B, 4, H, W), to logits (B, K, H, W)."""

    def __init__(self, num_classes, hidden_dim=32):
        super().__init__()
        h = hidden_dim
        self.down = nn.ModuleList([DoubleConv(4, h), DoubleConv(h, 2 * h), DoubleConv(2 * h, 4 * h)])
        self.middle = DoubleConv(4 * h, 4 * h)
        self.up = nn.ModuleList([DoubleConv(8 * h, 2 * h), DoubleConv(4 * h, h), DoubleConv(2 * h, h)])
        self.out = nn.Conv2d(h, num_classes, 1)

    def forward(self, x):
        skips = []
        for block in self.down:
            skips.append(F.gelu(block(x)))
            x = F.max_pool2d(skips[-1], 2)
        x = F.gelu(self.middle(x))
        for block in self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
            x = F.gelu(block(torch.cat([skips.pop(), x], dim=1)))
        return self.out(x)


def see_through_noise(net, x, t, smax, encoding="log sigma"):
    """Logits of `net` for noisy images x (B, C, H, W) at t (B,).

    Each image is brought to [0, 1] by its own minimum and maximum (5.3); the noise level is a channel more, as
    log sigma, or as t (5.2.2). Where the noise is high, the minimum and maximum say much the same.
    """
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    code = sigma_at(t, smax).log() if encoding == "log sigma" else t
    channel = code.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
    return net(torch.cat([(x - low) / (high - low).clamp(min=1e-6), channel], dim=1)).float()


def log_likelihood(logits, target):
    """log p(y | x), one number for the batch: images add up. target: ids (B, H, W), 255 for unlabelled, or (B,) labels.

    A sum over pixels and images, as a logarithm of probabilities is. A mean instead, as losses have it, would divide
    every gradient by the number of images in the batch: one source of factors such as the seed's 1000 (5.1).
    """
    return -F.cross_entropy(logits, target, ignore_index=UNLABELLED, reduction="sum")


def scale_factor(t, s0):
    """s(t) (5.5): how much of the segmenter's gradient is added. (Its text says linear; the formula falls as t^2.)"""
    return 0.0 if t > T_HIGHEST else s0 if t > T_FADING else s0 * t**2 / T_FADING**2


def guided_score(score_fn, logits_fn, target, strength):
    """score + s grad log p(y | x) (5.6) as score_fn(x, sigma).

    logits_fn(x, sigma) is the classifier or segmenter, target what it is to see, strength(sigma) is s, a float.
    """

    def guided(x, sigma):
        score, s = score_fn(x, sigma), strength(sigma)
        if s == 0:
            return score
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            gradient, = torch.autograd.grad(log_likelihood(logits_fn(x, sigma), target), x)
        return score + s * gradient

    return guided
