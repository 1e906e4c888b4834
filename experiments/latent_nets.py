"""The networks of experiments/latent.py: an autoencoder with a codebook, its losses, and a U-Net with cross-attention.

    z = net.encode(x)                            x (B, 3, H, W) in [-1, 1] to latents (B, 3, H/4, W/4)
    codes, ids, commitment = net.quantizer(z)    the nearest code of each position
    y = net.decode(codes)

Sources: van den Oord et al. 2017 (VQ-VAE; A.1: the codebook as a moving average), Dhariwal et al. 2020 (Jukebox, B.1:
codes that nobody uses are revived), Esser et al. 2021 (VQ-GAN), Rombach et al. 2022 (latent diffusion), Wang et al.
2003 (multi-scale SSIM), Zhao et al. 2017 (L1 and SSIM as a loss), Vaswani et al. 2017 (attention).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from experiments.score_digits import WideBlock
from unet import UNet

DOWN = 4  # a latent position stands for 4x4 pixels
NOT_TOLD = 2  # the state of a label beside 0, absent, and 1, present
LATENT_CHANNELS = 3  # as many as UNet takes; latent diffusion's VQ-f4 has 3 too

# ---------------------------------------------------------------------------------------------- the autoencoder


class Quantizer(nn.Module):
    """A codebook of `n` vectors with `dim` numbers, each the moving average of the latents that chose it.

    The codes are no parameters: in training mode every call moves them. A code that was chosen by less than 3 % of its
    fair share of late takes the place of a latent drawn at random, which is also how all of them begin.
    """

    def __init__(self, n, dim, decay=0.99, revive_below=0.03):
        super().__init__()
        self.decay, self.revive_below = decay, revive_below
        self.register_buffer("codes", torch.zeros(n, dim))
        self.register_buffer("share", torch.zeros(n))  # moving average of how often a code is chosen; 1 is fair
        self.register_buffer("sums", torch.zeros(n, dim))  # of the latents that chose it, as often: codes * share
        self.register_buffer("revived", torch.zeros((), dtype=torch.long))  # how many were, the first ones included

    def nearest(self, z):
        """The ids (B, h, w) of the codes nearest to latents z (B, dim, h, w), in float32 whatever autocast says."""
        flat = z.permute(0, 2, 3, 1).flatten(0, 2).float()
        with torch.autocast(z.device.type, enabled=False):
            distance = self.codes.square().sum(dim=1) - 2 * flat @ self.codes.T  # and |z|^2, which is the same for all
        return distance.argmin(dim=1).view(len(z), *z.shape[2:])

    def lookup(self, ids):
        return F.embedding(ids, self.codes).permute(0, 3, 1, 2)

    def forward(self, z):
        """Codes (B, dim, h, w) through which the gradient passes unchanged, ids (B, h, w), and the commitment loss."""
        z = z.float()
        if self.training:
            self.update(z.detach())
        ids = self.nearest(z)
        codes = self.lookup(ids)
        return z + (codes - z).detach(), ids, (z - codes).square().mean()

    @torch.no_grad()
    def update(self, z):
        """Revive, choose, and move the averages."""
        n, dim = self.codes.shape
        flat = z.permute(0, 2, 3, 1).reshape(-1, dim)
        dead = self.share < self.revive_below
        drawn = flat[torch.randint(len(flat), (n,), device=z.device)]
        self.codes.copy_(torch.where(dead[:, None], drawn, self.codes))
        self.sums.copy_(torch.where(dead[:, None], drawn, self.sums))  # with a share of 1
        self.share.masked_fill_(dead, 1.0)
        self.revived += dead.sum()
        ids, fair = self.nearest(z).flatten(), len(flat) / n
        counts = torch.bincount(ids, minlength=n) / fair
        sums = torch.zeros_like(self.sums).index_add_(0, ids, flat) / fair
        self.share.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.codes.copy_(self.sums / self.share[:, None])


def code_use(ids, n):
    """The share of n codes that occur in ids, and the perplexity, exp(entropy): as many codes used evenly say as much.
    """
    p = torch.bincount(ids.flatten(), minlength=n).double()
    p = p / p.sum()
    return (p > 0).double().mean().item(), torch.special.entr(p).sum().exp().item()


class Patches(nn.Sequential):
    """The patch discriminator (Isola et al. 2017): images to a map of numbers, large where a patch looks real."""

    def __init__(self, width=32):
        super().__init__(
            nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2), nn.Conv2d(2 * width, 4 * width, 4, 2, 1),
            nn.GroupNorm(8, 4 * width), nn.LeakyReLU(0.2), nn.Conv2d(4 * width, 1, 3, padding=1))


class Autoencoder(nn.Module):
    """Images (B, 3, H, W) to latents (B, 3, H/4, W/4) and back.

    width is a multiple of 8, n the number of codes; adversarial adds the discriminator that the decoder has to fool.
    """

    def __init__(self, width=32, n=1024, adversarial=False):
        super().__init__()
        w = width
        self.patches = Patches() if adversarial else None
        self.register_buffer("age", torch.zeros((), dtype=torch.long))  # steps of training
        self.encode = nn.Sequential(
            nn.Conv2d(3, w, 3, padding=1), WideBlock(w, w, 1), WideBlock(w, 2 * w, 2), WideBlock(2 * w, 4 * w, 2),
            WideBlock(4 * w, 4 * w, 1), nn.GroupNorm(8, 4 * w), nn.SiLU(), nn.Conv2d(4 * w, LATENT_CHANNELS, 1))
        self.quantizer = Quantizer(n, LATENT_CHANNELS)
        self.decode = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, 4 * w, 3, padding=1), WideBlock(4 * w, 4 * w, 1), WideBlock(4 * w, 2 * w, 1),
            nn.Upsample(scale_factor=2), WideBlock(2 * w, 2 * w, 1), WideBlock(2 * w, w, 1),
            nn.Upsample(scale_factor=2), WideBlock(w, w, 1), nn.GroupNorm(8, w), nn.SiLU(),
            nn.Conv2d(w, 3, 3, padding=1))

    def decode_nearest(self, z):
        """Images of latents that lie beside the codes, as sampled ones do."""
        return self.decode(self.quantizer.lookup(self.quantizer.nearest(z)))


def adversarial_losses(patches, x, y):
    """The hinge losses of the discriminator and of the image y, as one sum that can be stepped along at once.

    The discriminator learns from x and a detached y; y learns from a discriminator whose weights are detached.
    """
    real, made = patches(x), patches(y.detach())
    frozen = {name: weight.detach() for name, weight in patches.named_parameters()}
    fooled = torch.func.functional_call(patches, frozen, y)
    return F.relu(1 - real).mean() + F.relu(1 + made).mean(), -fooled.mean()


def ssim(x, y):
    """The structural similarity of x and y (B, C, H, W) in [0, 1], a scalar: a Gaussian of 11x11 pixels (Wang et al.
    2004). Its first factor compares means, and has no sense where these may be negative.
    """
    offsets = torch.arange(-5, 6, device=x.device, dtype=x.dtype)
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    line = line / line.sum()

    def blur(image):
        planes = F.conv2d(image.flatten(0, 1)[:, None], line.view(1, 1, 11, 1))
        return F.conv2d(planes, line.view(1, 1, 1, 11))

    with torch.autocast(x.device.type, enabled=False):  # variances are small differences, which bf16 does not have
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y, covariance = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean()


def structure_loss(x, y):
    """1 - SSIM of images in [-1, 1], mean over up to three scales, each half the one before: in place of a perceptual
    term.
    """
    losses, x, y = [], (x + 1) / 2, (y + 1) / 2
    while len(losses) < 3 and min(x.shape[2:]) >= 11:
        losses.append(1 - ssim(x, y))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return torch.stack(losses).mean()


# -------------------------------------------------------------------------------------------- the latent U-Net


class CrossAttention(nn.Module):
    """Every position looks at self.context (B, N, context_ch); then two Linear; both residual, as in SelfAttention.

    The context is an attribute since UNet calls its attention blocks with x alone.
    """

    def __init__(self, ch, context_ch, heads=4):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(ch)
        self.query, self.key, self.value = nn.Linear(ch, ch), nn.Linear(context_ch, ch), nn.Linear(context_ch, ch)
        self.out, self.context = nn.Linear(ch, ch), None
        self.linear = nn.Sequential(nn.LayerNorm(ch), nn.Linear(ch, ch), nn.GELU(), nn.Linear(ch, ch))

    def attend(self, y, context):
        """softmax(Q K' / sqrt(d)) V in each head of d channels: y (B, P, ch), context (B, N, C) give (B, P, ch)."""
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2)               # (B, heads, P or N, d)
                   for x in (self.query(y), self.key(context), self.value(context)))
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=3)  # (B, heads, P, N)
        return self.out((weights @ v).transpose(1, 2).flatten(2))                 # (B, P, ch)

    def forward(self, x):
        B, C, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)                  # (B, H*W, C)
        x = x + self.attend(self.norm(x), self.context)   # (B, H*W, C)
        x = x + self.linear(x)                            # (B, H*W, C)
        return x.transpose(1, 2).reshape(B, C, H, W)      # (B, C, H, W)


class LatentUNet(UNet):
    """UNet on latents (B, 3, h, w), whose attention blocks look at labels: a vector for each class, there or not.

    The mask comes at the size of the latents, (B, K, h, w), as the share of each class in the 4x4 pixels of a position:
    its features are added to those of the latents, as in UNet.
    """

    def __init__(self, num_classes, hidden_dim=32, emb_dim=256, heads=4):
        super().__init__(num_classes, hidden_dim, emb_dim)
        self.labels = nn.Parameter(torch.randn(3, num_classes, emb_dim))  # of absent, present, NOT_TOLD
        self.attention1 = CrossAttention(4 * hidden_dim, emb_dim, heads)
        self.attention2 = CrossAttention(2 * hidden_dim, emb_dim, heads)

    def forward(self, x, t, mask=None, *, keep=None, keep_mask=None):
        """The prediction for noisy latents x (B, 3, h, w) at t (B,).

        mask       (B, K, h, w) shares of the classes; None tells neither mask nor labels
        keep       (B,) bool: False drops mask and labels of that image
        keep_mask  (B,) bool: False drops the mask alone: which classes there are is still told
        """
        B, K = len(x), self.num_classes
        told = torch.ones(B, dtype=torch.bool, device=x.device) if keep is None else keep
        states, features = torch.full((B, K), NOT_TOLD, device=x.device), None
        if mask is not None:
            states = torch.where(told[:, None], mask.amax(dim=(2, 3)).gt(0).long(), NOT_TOLD)
            features = self.mask_features(mask)
        context = self.labels[states, torch.arange(K, device=x.device)]  # (B, K, E)
        self.attention1.context = self.attention2.context = context
        shown = told if keep_mask is None else told & keep_mask
        return super().forward(x, t, features=features, keep=shown)
