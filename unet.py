"""The network: a U-Net of double convolutions that adds the features of a mask to those of a noisy image.

    model = UNet(num_classes=19)
    out = model(x, t, mask)                              # the noise predicted in x (or v, see ddpm.py)
    out = model(x, t, features=model.mask_features(mask))  # the same; a sampling loop runs the mask stem once
    out = model(x, t)                                    # no mask: nothing is added

Letters used for shapes:
    B  images in the batch          H, W  height and width, each a multiple of 8, not necessarily equal
    K  classes of the mask          h     hidden_dim, the width of the first layer
    E  emb_dim, width of the time embedding

Sources: Bozsó, "Semantic Segmentation Mask-Guided Image Generation with Diffusion Models" (2023), section 4.2;
for the attention blocks Bozsó, Béres and Gyires-Tóth (2024), section III-B.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def time_embedding(t, dim):
    """Sinusoidal embedding (Vaswani et al. 2017, 3.5): t (B,), any real numbers, gives (B, dim) in [-1, 1]."""
    freq = 10000 ** (-torch.arange(0, dim, 2, device=t.device, dtype=torch.float32) / dim)
    angle = t.float()[:, None] * freq
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class DoubleConv(nn.Module):
    """Conv3x3, GroupNorm(1), GELU, Conv3x3, GroupNorm(1): (B, in, H, W) to (B, out, H, W).

    residual=True gives GELU(x + DoubleConv(x)) and needs in_ch == out_ch.
    """

    def __init__(self, in_ch, out_ch, mid_ch=None, residual=False):
        super().__init__()
        mid_ch = mid_ch or out_ch
        self.residual = residual
        self.net = nn.Sequential(
            nn.Conv2d(in_ch, mid_ch, 3, padding=1, bias=False),
            nn.GroupNorm(1, mid_ch),
            nn.GELU(),
            nn.Conv2d(mid_ch, out_ch, 3, padding=1, bias=False),
            nn.GroupNorm(1, out_ch),
        )

    def forward(self, x):
        return F.gelu(x + self.net(x)) if self.residual else self.net(x)


class Down(nn.Module):
    """Halve the image, convolve, add the time: (B, in, H, W) to (B, out, H/2, W/2)."""

    def __init__(self, in_ch, out_ch, emb_dim):
        super().__init__()
        self.conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(in_ch, in_ch, residual=True), DoubleConv(in_ch, out_ch))
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_ch))

    def forward(self, x, emb):
        return self.conv(x) + self.time(emb)[:, :, None, None]


class Up(nn.Module):
    """Double the image, join the skip connection, convolve, add the time.

    x and skip (B, C, 2H, 2W) give (B, out, 2H, 2W); in_ch counts the channels of both, so x is (B, in_ch - C, H, W).
    """

    def __init__(self, in_ch, out_ch, emb_dim):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv = nn.Sequential(DoubleConv(in_ch, in_ch, residual=True), DoubleConv(in_ch, out_ch, in_ch // 2))
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_ch))

    def forward(self, x, skip, emb):
        x = torch.cat([skip, self.up(x)], dim=1)
        return self.conv(x) + self.time(emb)[:, :, None, None]


class SelfAttention(nn.Module):
    """Every position looks at every other: LayerNorm, 4-head attention, LayerNorm, two Linear; both parts residual."""

    def __init__(self, ch):
        super().__init__()
        self.norm = nn.LayerNorm(ch)
        self.attention = nn.MultiheadAttention(ch, num_heads=4, batch_first=True)
        self.linear = nn.Sequential(nn.LayerNorm(ch), nn.Linear(ch, ch), nn.GELU(), nn.Linear(ch, ch))

    def forward(self, x):
        B, C, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)                        # (B, H*W, C)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]  # (B, H*W, C)
        x = x + self.linear(x)                                  # (B, H*W, C)
        return x.transpose(1, 2).reshape(B, C, H, W)            # (B, C, H, W)


class UNet(nn.Module):
    """The mask-guided U-Net; 88,842,371 parameters as it stands, 90,816,131 with attention.

    num_classes  K, channels of the one-hot mask; 0 builds the unconditional baseline, which has no mask stem
    hidden_dim   h, an even number; the widths are h, 2h, 4h, 4h, in the bottleneck 8h, then 2h, h, h
    emb_dim      E, an even number
    attention    self-attention after the third Down (4h channels at 1/8) and the first Up (2h channels at 1/4)
    """

    def __init__(self, num_classes=19, hidden_dim=128, emb_dim=256, attention=False):
        super().__init__()
        if emb_dim % 2 or hidden_dim % 2:
            raise ValueError(f"hidden_dim and emb_dim must be even, got {hidden_dim} and {emb_dim}")
        h, E = hidden_dim, emb_dim
        self.num_classes, self.emb_dim = num_classes, emb_dim
        self.image_stem = DoubleConv(3, h)
        self.mask_stem = DoubleConv(num_classes, h) if num_classes else None
        self.down1 = Down(h, 2 * h, E)
        self.down2 = Down(2 * h, 4 * h, E)
        self.down3 = Down(4 * h, 4 * h, E)
        self.attention1 = SelfAttention(4 * h) if attention else nn.Identity()
        self.bottleneck = nn.Sequential(DoubleConv(4 * h, 8 * h), DoubleConv(8 * h, 8 * h), DoubleConv(8 * h, 4 * h))
        self.up1 = Up(8 * h, 2 * h, E)
        self.attention2 = SelfAttention(2 * h) if attention else nn.Identity()
        self.up2 = Up(4 * h, h, E)
        self.up3 = Up(2 * h, h, E)
        self.out = nn.Conv2d(h, 3, 1)

    def mask_features(self, mask):
        """The mask stem alone: one-hot mask (B, K, H, W) to features (B, h, H, W). They depend on neither x nor t."""
        if self.mask_stem is None:
            raise ValueError("this network was built with num_classes=0 (unconditional) and takes no mask")
        if mask.dim() != 4 or mask.shape[1] != self.num_classes:
            raise ValueError(f"the mask must be one-hot (B, {self.num_classes}, H, W), got {tuple(mask.shape)}")
        return self.mask_stem(mask)

    def forward(self, x, t, mask=None, *, features=None, keep=None):
        """The network's prediction for noisy images x at time steps t.

        x         (B, 3, H, W) float, about N(0, 1) at high noise and [-1, 1] at none
        t         (B,) time steps 0..T-1
        mask      (B, K, H, W) one-hot, all zero where unlabelled; None adds no features at all, while a mask that is
                  zero everywhere still adds those that the stem makes of it
        features  (B, h, H, W) from mask_features(), instead of mask
        keep      (B,) bool: False drops the mask of that image, as None would for the whole batch
        returns   (B, 3, H, W)
        Raises ValueError where the shapes do not fit.
        """
        if mask is not None and features is not None:
            raise ValueError("give mask or features, not both")
        if mask is not None:
            features = self.mask_features(mask)
        self.check_shapes(x, t, features, keep)
        emb = time_embedding(t, self.emb_dim)      # (B, E)
        x1 = self.image_stem(x)                    # (B, h, H, W)
        if features is not None:
            x1 = x1 + (features if keep is None else features * keep[:, None, None, None])
        x2 = self.down1(x1, emb)                   # (B, 2h, H/2, W/2)
        x3 = self.down2(x2, emb)                   # (B, 4h, H/4, W/4)
        x4 = self.attention1(self.down3(x3, emb))  # (B, 4h, H/8, W/8)
        y = self.bottleneck(x4)                    # (B, 4h, H/8, W/8)
        y = self.attention2(self.up1(y, x3, emb))  # (B, 2h, H/4, W/4)
        y = self.up2(y, x2, emb)                   # (B, h, H/2, W/2)
        y = self.up3(y, x1, emb)                   # (B, h, H, W)
        return self.out(y)                         # (B, 3, H, W)

    def check_shapes(self, x, t, features, keep):
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] % 8 or x.shape[3] % 8:
            raise ValueError(f"x must be (B, 3, H, W), H and W multiples of 8 (three halvings), got {tuple(x.shape)}")
        B, _, H, W = x.shape
        for name, values in ("t", t), ("keep", keep):
            if values is not None and values.shape != (B,):
                raise ValueError(f"{name} must be ({B},), one value per image, got {tuple(values.shape)}")
        expected = (B, self.out.in_channels, H, W)
        if features is not None and features.shape != expected:
            raise ValueError(f"mask features must be {expected}, as the image's are, got {tuple(features.shape)}")
