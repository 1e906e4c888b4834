"""Digits of a class that is asked for (seed 001, 5.1): a score model of MNIST, steered by a classifier of noisy digits.

    python -m experiments.score_digits --data ../shared/data/mnist        a folder with MNIST's files: 40 minutes
    python -m experiments.score_digits                                    downloaded by torchvision, to data/mnist
    python -m experiments.score_digits --data ... --minutes 1.5 --n 2 --steps 50 --scales 0,1,10 --run runs/digits_toy
                                                                          3 minutes

Trains three networks (a score network and a wide residual classifier of noisy digits on 60 % of the digits, a judge of
clean ones on 30 % that these never saw), then samples each digit at every scale of the classifier's gradient: how many
does the judge read as the digit asked for, and how far are they from real ones, in the judge's features? Prints a table
and writes results.json and digits.png: a row for each scale, the same seeds in all. Minutes are those of two CPU cores.
Ctrl-C loses nothing: the same command goes on.

The seed found gradients 1000 times smaller than the score, and scaled them. A likelihood needs no factor: log p(y | x)
of one image is added as it is (scale 1), if it was not divided by the size of a batch.
"""

import argparse
import gzip
import json
import math
import zlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.datasets import MNIST
from tqdm import tqdm

from benchmarks.timing import table
from checkpoint import autocast, pick_device, pick_precision, replacing
from config import command, load_config
from dataset import contact_sheet
from ddpm import noise_like_seeds
from evaluate import frechet_distance
from experiments.common import parse_count, parse_numbers
from experiments.score_sde import to_images, train_classifier, train_score
from experiments.training import fit, make_loader
from experiments.ve_sde import (draw_samples, guided_score, largest_distance, log_likelihood, network_score,
                                see_through_noise, sigma_at, time_at)
from masks import Colorbook

FILES = ("{}-images-idx3-ubyte", "{}-labels-idx1-ubyte")
SCALES = [0.0, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0]
SIZE = 32  # 28x28 digits with a black edge of 2: the U-Net halves three times

# -------------------------------------------------------------------------------------------------------- digits


def read_idx(path):
    """The uint8 array in an IDX file (yann.lecun.com/exdb/mnist), gzipped or not. ValueError names the file."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        dimensions = data[3]
        shape = np.frombuffer(data, ">u4", dimensions, offset=4)
        if data[:3] != b"\0\0\x08":
            raise ValueError("it does not begin with 00 00 08")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (ValueError, IndexError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not an IDX file of bytes, or cut off: {error}; get MNIST's files anew") from error


def read_digits(folder):
    """All digits in a folder of MNIST's files, (N, 28, 28) uint8, and their labels (N,); None: by torchvision."""
    if folder is None:
        try:
            for train in (True, False):
                MNIST("data/mnist", train, download=True)
        except (URLError, RuntimeError, OSError) as error:
            raise OSError(f"MNIST cannot be downloaded ({error}); name a folder with its files by --data") from error
        folder = Path("data/mnist/MNIST/raw")
    images, labels = [], []
    for part in ("train", "t10k"):
        found = [next((p for p in (folder / name.format(part), folder / f"{name.format(part)}.gz") if p.exists()), None)
                 for name in FILES]
        if all(found):
            images.append(read_idx(found[0]))
            labels.append(read_idx(found[1]))
            if images[-1].shape != (len(labels[-1]), 28, 28):
                raise ValueError(f"{found[0]} has {images[-1].shape}, {found[1]} {labels[-1].shape}: expected N images "
                                 "of 28x28 and N labels")
    if not images:
        raise ValueError(f"{folder}: no digits; expected {' and '.join(FILES)}, with train or t10k, or with .gz")
    return np.concatenate(images), np.concatenate(labels)


class Digits:
    """Digits as pairs whose mask is one label: planes (N, 2, 32, 32) uint8."""

    size = (SIZE, SIZE)
    colorbook = Colorbook({str(digit): [25 * digit] * 3 for digit in range(10)})

    def __init__(self, images, labels):
        padded = torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2))))
        self.planes = torch.stack([padded, torch.from_numpy(labels.copy()).view(-1, 1, 1).expand_as(padded)], dim=1)

    def __len__(self):
        return len(self.planes)


def label_of(planes):
    return planes[:, 1, 0, 0]


# ------------------------------------------------------------------------------------------------------ networks


class WideBlock(nn.Module):
    """A block of a wide residual network (Zagoruyko and Komodakis 2016), with group norm: no statistics over noises."""

    def __init__(self, in_ch, out_ch, stride):
        super().__init__()
        self.net = nn.Sequential(
            nn.GroupNorm(8, in_ch), nn.SiLU(), nn.Conv2d(in_ch, out_ch, 3, stride, padding=1),
            nn.GroupNorm(8, out_ch), nn.SiLU(), nn.Conv2d(out_ch, out_ch, 3, padding=1))
        self.shortcut = nn.Conv2d(in_ch, out_ch, 1, stride)

    def forward(self, x):
        return self.shortcut(x) + self.net(x)


class WideResNet(nn.Sequential):
    """Digit and noise level (B, 2, 32, 32) to logits (B, 10): 16, 32 and 64 channels, times `widen`."""

    def __init__(self, widen=2):
        w = 16 * widen
        super().__init__(
            nn.Conv2d(2, 16, 3, stride=2, padding=1), WideBlock(16, w, 1), WideBlock(w, w, 1), WideBlock(w, 2 * w, 2),
            WideBlock(2 * w, 2 * w, 1), WideBlock(2 * w, 4 * w, 2), WideBlock(4 * w, 4 * w, 1),
            nn.GroupNorm(8, 4 * w), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 10))


class Judge(nn.Sequential):
    """A plain convolutional network, digits (B, 1, 32, 32) in [0, 1] to (B, 10); its last layer reads features (B, 64).

    Digits come as they are, so that their grey levels and contrast count.
    """

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, 10))


# ----------------------------------------------------------------------------------------------------- the study


def train_networks(args, cfg, device):
    """The score network, the guide, the judge, smax, and the held-out digits."""
    images, labels = read_digits(args.data)
    order = np.random.default_rng(0).permutation(len(images))
    cuts = np.split(order, [len(order) * 6 // 10, len(order) * 9 // 10])
    own, for_judge, held_out = (Digits(images[part], labels[part]) for part in cuts)
    smax = largest_distance(own.planes[:3000, :1])
    print(f"{len(own)} digits for score and guide, {len(for_judge)} for the judge, {len(held_out)} held out; "
          f"smax {smax}")
    score = train_score(cfg, own, held_out, args.run / "score.pt", smax, device, args.minutes)
    torch.manual_seed(cfg["seed"])
    about = {"kind": "guide", "smax": smax, "encoding": "log sigma", "highest": 1.0}
    guide = train_classifier(WideResNet(), label_of, cfg, own, held_out, args.run / "guide.pt", about, device,
                             args.minutes / 4)
    judge = train_judge(cfg, for_judge, held_out, args.run / "judge.pt", device, args.minutes / 10)
    return score, guide, judge, smax, held_out


def train_judge(cfg, pairs, held_out, file, device, minutes=math.inf):
    """A Judge trained on the pairs; its log has its accuracy on held-out digits."""
    torch.manual_seed(cfg["seed"])
    judge = Judge().to(device, memory_format=torch.channels_last)

    def loss(net, planes):
        return F.cross_entropy(net(to_images(planes)).float(), label_of(planes).long())

    def validate(net):
        seen, _ = read_by(net, to_images(held_out.planes).to(device))
        return {"accuracy": (seen == label_of(held_out.planes)).float().mean().item()}

    about = {"kind": "judge", "input": "[0, 1]", "seed": cfg["seed"], "train": cfg["train"]}
    return fit(judge, loss, make_loader(cfg, pairs, device), cfg["train"], file, device, about, validate,
               minutes=minutes)


@torch.no_grad()
def read_by(judge, x):
    """What the judge reads in digits x (B, 1, 32, 32) in [0, 1], (B,), and its features (B, 64) float64."""
    features = torch.cat([nn.Sequential(*list(judge)[:-1])(part) for part in x.split(100)])
    return judge[-1](features).argmax(dim=1).cpu(), features.double().cpu()


def compare_gradients(score_fn, logits_fn, digits, smax, device):
    """Rows {"t", |score|, |gradient|, ratio, accuracy}, medians over 100 held-out digits."""
    rows, planes = [], digits.planes[:100].to(device)
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        sigma = sigma_at(t, smax)
        noise = noise_like_seeds(range(len(planes)), (1, SIZE, SIZE), device)
        x = (to_images(planes) + sigma * noise()).requires_grad_()
        logits = logits_fn(x, sigma)
        gradient, = torch.autograd.grad(log_likelihood(logits, label_of(planes).long()), x)
        with torch.no_grad():
            sizes = [values.flatten(1).norm(dim=1).median().item() for values in (score_fn(x, sigma), gradient)]
        accuracy = (logits.argmax(dim=1) == label_of(planes)).float().mean().item()
        rows.append({"t": t, "sigma": sigma, "score": sizes[0], "gradient": sizes[1], "score / gradient":
                     sizes[0] / sizes[1], "accuracy of the guide": accuracy})
    return rows


def run_study(args):
    own = ["data.flip=0", f"data.size=[{SIZE},{SIZE}]", "train.batch_size=32", "train.steps=20000",
           "model.hidden_dim=16"]
    cfg = load_config(preset="idd_lite", overrides=own + args.set)  # the preset has no training settings of its own
    device = pick_device(cfg["device"])
    score, guide, judge, smax, held_out = train_networks(args, cfg, device)
    score_fn = network_score(score, smax, cfg["diffusion"]["prediction"])
    guide.requires_grad_(False)

    def logits_fn(x, sigma):
        return see_through_noise(guide, x, torch.full((len(x),), time_at(sigma, smax), device=device), smax)

    real = to_images(held_out.planes).to(device)
    seen, real_features = read_by(judge, real)
    ceiling = (seen == label_of(held_out.planes)).float().mean().item()
    halves = real_features.tensor_split(2)
    floor = frechet_distance(*halves, *(torch.ones(len(half)) for half in halves)).item()
    print(f"the judge reads {ceiling:.1%} of the held-out digits as they are labelled; the Frechet distance of one "
          f"half of them to the other is {floor:.3g}\n")
    print(table(compare_gradients(score_fn, logits_fn, held_out, smax, device)) + "\n")

    precision, file = pick_precision("auto", device), args.run / "results.json"
    settings = {"n": args.n, "steps": args.steps, "seed": args.seed, "minutes": args.minutes, "config": cfg,
                "held out": zlib.crc32(held_out.planes.numpy())}
    results = json.loads(file.read_text()) if file.exists() else {"settings": settings, "rows": {}}
    changed = [key for key in settings if results["settings"].get(key) != settings[key]]
    if changed:
        raise ValueError(f"{file}: made with another {', '.join(changed)}: choose another --run, or delete it")
    labels = torch.arange(10).repeat_interleave(args.n)
    for scale in args.scales:
        samples = args.run / f"samples_{scale:g}.npy"
        if f"{scale:g}" in results["rows"] and samples.exists():
            continue
        parts = []
        for seeds in tqdm(torch.arange(len(labels)).split(100), f"scale {scale:g}"):
            noise = noise_like_seeds([args.seed + int(i) for i in seeds], (1, SIZE, SIZE), device)
            steered = guided_score(score_fn, logits_fn, labels[seeds].to(device), lambda sigma, scale=scale: scale)
            with autocast(precision, device):
                parts.append(draw_samples(steered, noise, smax, "pc", args.steps).clamp(0, 1))
        x = torch.cat(parts)
        read_as, features = read_by(judge, x)
        ones = torch.ones(len(features)), torch.ones(len(real_features))
        results["rows"][f"{scale:g}"] = {
            "scale": scale, "read as asked": (read_as == labels).float().mean().item(),
            "Frechet distance, judge's features": frechet_distance(features, real_features, *ones).item()}
        with replacing(samples) as opened:
            np.save(opened, (255 * x[:, 0]).round().byte().cpu().numpy())
        with replacing(file) as opened:
            opened.write(json.dumps(results, indent=1).encode())
    print(table(list(results["rows"].values())))
    rows = []
    for name in results["rows"]:
        digits = np.load(args.run / f"samples_{name}.npy")
        shown = [digits[digit * args.n + i] for digit in range(10) for i in range(min(2, args.n))]
        rows.append([np.repeat(digit[..., None], 3, axis=2) for digit in shown])
    contact_sheet(rows, least=48).save(args.run / "digits.png")
    print(f"\n{file}, {args.run / 'digits.png'}: a row for each scale, {', '.join(results['rows'])}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="a folder with MNIST's IDX files, of which t10k alone will do; default: a download")
    add("--run", type=Path, default=Path("runs/digits"), help="the folder of the run; default: %(default)s")
    add("--minutes", type=float, default=20, help="of training the score network, a quarter of them for the guide "
        "and a tenth for the judge; default: 20")
    add("--scales", type=parse_numbers, default=SCALES, metavar="S[,S...]", help="of the gradient; default: 0 to 1000")
    add("--n", type=parse_count, default=20, help="samples of each digit at each scale; default: %(default)s")
    add("--steps", type=parse_count, default=200, help="of the predictor-corrector sampler; default: %(default)s")
    add("--seed", type=int, default=1, help="of the first sample; default: %(default)s")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of config.yaml: model.hidden_dim=32")
    command(run_study, parser.parse_args())


if __name__ == "__main__":
    main()
