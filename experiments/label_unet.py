"""A U-Net that is told a label where ours is given a mask, and what the studies with it share (labels, colour_labels).

    model, diffusion = train_generator(cfg, pairs, held_out, 26, "runs/labels/generator.pt", device)
    images, seconds = draw_labels(model, diffusion, torch.tensor([0, 1, 2]), seed=1, guidance=2.0)

The shallow network of seed 004, 4.3 and 4.4: four times down, four times up, linear attention before each (the softmax
form of Shen et al. 2021; the seed cites Li et al. 2020, an expansion of the exponential), the label's embedding added
to the time's, and a "zero-label" in place of every fifth label, for guidance. A label is to it what a mask is to UNet,
so the loss, the guidance and the samplers are those of ddpm.py.

Letters used for shapes: B images, C channels, E emb_dim, K labels, n positions, d channels of an attention head.
"""

import json
import math
import re
import time
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import autocast, replacing
from config import flatten
from dataset import contact_sheet
from ddpm import Diffusion, guided_eps, noise_like_seeds, sample
from evaluate import frechet_distance
from experiments.common import name_changes, write_text
from experiments.training import fit, make_loader, spread
from unet import DoubleConv, Down, Up, time_embedding

SIZE = 32  # height and width of the images
BATCH = 128  # samples at a time
PARTS = ["seed", "data", "model", "diffusion", "train"]  # of the config: what the two networks depend on

# ------------------------------------------------------------------------------------------------------ networks


def linear_attention(q, k, v):
    """Efficient attention (Shen et al. 2021): q, k, v (B, heads, n, d) to (B, heads, n, d).

    It is A v for A = softmax(q) softmax(k)', the softmax of q over channels and that of k over positions, so that the
    rows of A add up to 1 as they do in ordinary attention. Multiplied from the right, A (n, n) is never there: O(n).
    """
    return q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-1, -2) @ v)


class LinearAttention(nn.Module):
    """Residual linear attention of 4 heads, (B, C, H, W) to the same; C is a multiple of 4."""

    def __init__(self, ch):
        super().__init__()
        self.norm = nn.GroupNorm(1, ch)
        self.qkv = nn.Conv2d(ch, 3 * ch, 1, bias=False)
        self.out = nn.Conv2d(ch, ch, 1)

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).flatten(2)           # (B, 3C, n)
        qkv = qkv.unflatten(1, (3, 4, -1)).mT             # (B, 3, 4, n, d)
        y = linear_attention(*qkv.unbind(1))              # (B, 4, n, d)
        return x + self.out(y.mT.reshape(x.shape))


class LabelUNet(nn.Module):
    """The U-Net of labels: images (B, C, H, W), H and W multiples of 16; widths h, 2h, 4h, 4h, 4h from top to bottom.

    The zero-label has the embedding 0: the bias of `embed` is what a learnt one would add.
    """

    def __init__(self, num_labels, channels, hidden_dim, emb_dim):
        super().__init__()
        h, E = hidden_dim, emb_dim
        if h % 4 or E % 2:
            raise ValueError(f"hidden_dim must be a multiple of 4 (heads), emb_dim even; got {h} and {E}")
        widths = [h, 2 * h, 4 * h, 4 * h]  # of the four levels with skip connections; the bottleneck has the last again
        self.emb_dim = E
        self.label = nn.Embedding(num_labels, E)
        self.embed = nn.Linear(E, E)
        self.stem = DoubleConv(channels, h)
        self.attention_down = nn.ModuleList(LinearAttention(width) for width in widths)
        self.down = nn.ModuleList(Down(width, below, E) for width, below in zip(widths, [2 * h, 4 * h, 4 * h, 4 * h]))
        self.bottleneck = DoubleConv(4 * h, 4 * h, residual=True)
        self.attention_up = nn.ModuleList(LinearAttention(width) for width in widths[::-1])
        self.up = nn.ModuleList(Up(2 * width, above, E) for width, above in zip(widths[::-1], [4 * h, 2 * h, h, h]))
        self.out = nn.Conv2d(h, channels, 1)

    def mask_features(self, labels):
        """The embedding of labels (B,), (B, E); guided_eps() asks for it by this name."""
        return self.label(labels)

    def forward(self, x, t, labels=None, *, features=None, keep=None):
        """As UNet's forward(), with labels (B,) for the mask and features (B, E); no label is the zero-label."""
        emb = time_embedding(t, self.emb_dim)                     # (B, E)
        if labels is not None:
            features = self.mask_features(labels)
        if features is not None:
            emb = emb + (features if keep is None else features * keep[:, None])
        emb, skips = self.embed(emb), []
        x = self.stem(x)                                          # (B, h, H, W)
        for attention, down in zip(self.attention_down, self.down):
            skips.append(attention(x))
            x = down(skips[-1], emb)                              # at last (B, 4h, H/16, W/16)
        x = self.bottleneck(x)
        for attention, up in zip(self.attention_up, self.up):
            x = up(attention(x), skips.pop(), emb)                # at last (B, h, H, W)
        return self.out(x)                                        # (B, C, H, W)


class Reader(nn.Module):
    """What scores: a plain convolutional network, (B, C, 32, 32) to logits (B, K), with 32 features before them."""

    def __init__(self, channels, outputs):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 5, padding=2), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 4 * 4, 32), nn.ReLU())
        self.out = nn.Linear(32, outputs)

    def forward(self, x):
        return self.out(self.features(x))

    @torch.no_grad()
    def read(self, images):
        """Of images (N, C, 32, 32) in [-1, 1]: logits (N, K) and features (N, 32), float64 on the CPU."""
        device = self.out.weight.device
        features = torch.cat([self.features(part.to(device)) for part in images.split(BATCH)])
        return self.out(features).cpu().double(), features.cpu().double()


# ------------------------------------------------------------------------------------------------------ training


class Labelled:
    """Images (N, H, W, C) uint8, labels (N,), and perhaps the ids (N, H, W) of masks, as planes that batches() takes.

    planes (N, C + 1, H, W), or with ids (N, C + 2, H, W); the last one is the label everywhere.
    """

    def __init__(self, images, labels, ids=None):
        images, labels = torch.from_numpy(images).permute(0, 3, 1, 2), torch.as_tensor(labels, dtype=torch.uint8)
        self.channels = images.shape[1]
        parts = [images] if ids is None else [images, torch.from_numpy(ids)[:, None]]
        self.planes = torch.cat([*parts, labels.view(-1, 1, 1, 1).expand_as(images[:, :1])], dim=1)

    def __len__(self):
        return len(self.planes)

    @property
    def labels(self):
        return self.planes[:, -1, 0, 0].long()

    @property
    def images(self):
        """(N, C, H, W) float32 in [-1, 1]."""
        return self.planes[:, :self.channels].float() / 127.5 - 1


def checksum(pairs):
    """A number that tells these pairs from others."""
    return zlib.crc32(pairs.planes.contiguous().numpy())


def held_out_planes(held_out, n, device):
    """n of the held-out planes, spread over all of them."""
    return held_out.planes[torch.linspace(0, len(held_out) - 1, min(n, len(held_out))).long()].to(device)


def train_generator(cfg, pairs, held_out, num_labels, file, device, minutes=math.inf):
    """Train a LabelUNet on Labelled pairs; returns it, with its averaged weights, and its Diffusion."""
    m, c, channels = cfg["model"], cfg["train"], pairs.channels
    torch.manual_seed(cfg["seed"])
    model = LabelUNet(num_labels, channels, m["hidden_dim"], m["emb_dim"])
    model.to(device, memory_format=torch.channels_last)
    nn.init.zeros_(model.out.weight)  # as in train.py: begin with the prediction 0
    nn.init.zeros_(model.out.bias)
    diffusion = Diffusion(**cfg["diffusion"]).to(device)
    seen = held_out_planes(held_out, c["val_pairs"], device)
    fixed_t = (diffusion.T * spread(len(seen))).long().to(device)
    fixed_eps = noise_like_seeds(range(len(seen)), (channels, *seen.shape[2:]), device)()

    def unpack(planes):
        return planes[:, :channels].float() / 127.5 - 1, planes[:, -1, 0, 0].long()

    def loss(net, planes):
        x0, labels = unpack(planes)
        return diffusion.loss(net, x0, labels, *diffusion.draw(x0.shape, c["label_drop"], device))

    @torch.no_grad()
    def validate(net):
        parts = zip(*(values.split(c["batch_size"]) for values in (*unpack(seen), fixed_t, fixed_eps)))
        errors = torch.cat([torch.stack(diffusion.errors(net, *part)) for part in parts], dim=1)
        return dict(zip(("val_loss", "val_eps"), errors.mean(dim=1).tolist()))

    def preview(net):
        x, _ = draw_labels(net, diffusion, torch.arange(c["previews"]) % num_labels, 1, 2.0,
                           steps=min(20, diffusion.T))
        return contact_sheet([as_shown(x)], least=64)

    about = {"kind": "generator", "network": [num_labels, channels, m["hidden_dim"], m["emb_dim"]],
             "diffusion": cfg["diffusion"], "data": checksum(pairs), "flip": cfg["data"]["flip"],
             "augment": cfg["data"]["augment"]}
    model = fit(model, loss, make_loader(cfg, pairs, device), c, file, device, about, validate, preview, minutes)
    return model, diffusion


def train_reader(cfg, target_of, outputs, pairs, held_out, file, device, minutes=math.inf):
    """Train a Reader, for a quarter of the steps, to name target_of(planes): labels (B,) or shares (B, K)."""
    c, channels = cfg["train"] | {"steps": -(-cfg["train"]["steps"] // 4)}, pairs.channels
    torch.manual_seed(cfg["seed"])
    net = Reader(channels, outputs).to(device)

    def loss(net, planes):
        return F.cross_entropy(net(planes[:, :channels].float() / 127.5 - 1).float(), target_of(planes))

    @torch.no_grad()
    def validate(net):
        return {"val_loss": loss(net, held_out_planes(held_out, c["val_pairs"], device)).item()}

    about = {"kind": "reader", "network": [channels, outputs], "data": checksum(pairs), "flip": cfg["data"]["flip"],
             "augment": cfg["data"]["augment"]}
    return fit(net, loss, make_loader(cfg, pairs, device), c, file, device, about, validate, minutes=minutes)


# ------------------------------------------------------------------------------------------- samples and measures


def draw_labels(model, diffusion, labels, seed, guidance, sampler="plms", steps=50, precision="fp32"):
    """Samples of labels (N,), (N, 32, 32, C) uint8, of seeds from `seed` on; and the seconds that it took."""
    device, channels, parts = model.out.weight.device, model.out.out_channels, []
    started = time.monotonic()
    calls = diffusion.T if sampler == "ddpm" else steps
    with tqdm(total=len(labels) * calls, desc=f"{len(labels)} images, {sampler}, w = {guidance:g}", unit="step") as bar:
        for chosen in torch.arange(len(labels)).split(BATCH):
            noise = noise_like_seeds([seed + int(i) for i in chosen], (channels, SIZE, SIZE), device)
            eps_fn = guided_eps(model, diffusion, labels[chosen].to(device), guidance)
            with autocast(precision, device):
                x = sample(eps_fn, noise, diffusion.alpha_bar, sampler, steps,
                           observe=lambda t, x, eps, x0: bar.update(len(x)))
            parts.append(((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(parts).numpy(), time.monotonic() - started


def as_shown(images):
    """Images (N, H, W, 1 or 3) as a list of (H, W, 3), for contact_sheet()."""
    return [np.broadcast_to(image, (*image.shape[:2], 3)).copy() for image in images]


def compare_features(features, labels, real_features, real_labels):
    """Of features (N, D) with labels (N,), and real ones: three lists, with a number for each label of the first.

    "own" and "all" are Frechet distances to the real images of that label, and to all real ones. "variety" is the
    variance of the label's features as a share of what the real images of that label have: 1 is as much as they have.
    Each of these labels needs two images on either side.
    """
    found = {"own": [], "all": [], "variety": []}
    for label in labels.unique():
        x, own = features[labels == label], real_features[real_labels == label]
        for name, real in (("own", own), ("all", real_features)):
            found[name].append(frechet_distance(x, real, torch.ones(len(x)), torch.ones(len(real))).item())
        found["variety"].append((x.var(dim=0).sum() / own.var(dim=0).sum()).item())
    return found


def with_interval(values):
    """Numbers as text: their mean and the half-width of its 95 % interval, as if they were independent."""
    values = np.asarray(values, float)
    return f"{values.mean():.3g} ± {1.96 * values.std(ddof=1) / math.sqrt(len(values)):.2g}"


def share_with_interval(hits):
    """A share as text, of hits (N,) of 0 and 1, and Wilson's 95 % interval, which is none of length 0."""
    p, n, z = np.asarray(hits, float).mean(), len(hits), 1.96
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return f"{p:.3g} [{max(0, centre - half):.3g}, {min(1, centre + half):.3g}]"


def open_results(run, settings):
    """results.json of a run, {"settings", "rows"}; ValueError where it was made with other settings."""
    file = run / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {"settings": settings, "rows": {}}
    changes = name_changes(flatten(results["settings"]), flatten(settings))
    if changes:
        raise ValueError(f"{file}: made with another {changes}: choose another --run, or delete it")
    return results


def run_jobs(run, results, jobs, measure):
    """Do and measure each job {name: function}; what is finished stays. Returns the rows and the images.

    A job gives labels, images and seconds; measure(labels, images) a row. The rows go to results.json, images to
    samples_<name>.npy.
    """
    images = {}
    for name, job in jobs.items():
        path = run / f"samples_{re.sub('[^A-Za-z0-9.]+', '_', name)}.npy"
        if name not in results["rows"] or not path.exists():
            labels, drawn, seconds = job()
            row = {"images": name, "n": len(drawn)} | measure(labels, drawn)
            results["rows"][name] = row | {"s for 15": "-" if seconds is None else 15 * seconds / len(drawn)}
            with replacing(path) as opened:
                np.save(opened, drawn)
            write_text(run / "results.json", json.dumps(results, indent=1))
        images[name] = np.load(path)
    return [results["rows"][name] for name in jobs], images
