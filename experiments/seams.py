"""Is the seam of an edited image seen? A box of held-out real images is hidden and drawn anew, in several ways.

    python -m experiments.seams --checkpoint runs/idd_lite/checkpoint.pt --root data/idd_lite/prepared

The mask stays as it is, so that the true pixels are known. Ways: the predicted x_0 of the kept pixels is replaced by
the real one (DDNM, Wang et al. 2023); the same with rounds of noising and denoising at every step (RePaint, Lugmayr
et al. 2022); replacement and membrane, which is ddpm.keep_pixels(). Measured, each with its standard error over images:

    distance    root mean square to the true pixels in the box, in grey levels, the mean over the samples
    of mean     the same of the mean of an image's samples; a sampler of the right answers has a lower one
    seam        differences between neighbours across the border, as a multiple of those of the true image
    inside      the same between neighbours in the box: a seam is not seen where `seam` is no larger than `inside`

Writes seams.json and sheet.png (real, hidden, and a sample of each way). 24 images, 3 samples: 15 minutes on 2 cores.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

from checkpoint import load_checkpoint, pick_device
from config import command
from dataset import Pairs, contact_sheet, to_uint8, unpack
from ddpm import guided_eps, keep_pixels, noise_like_seeds, predict_eps, predict_x0, sample, steps_down
from sample import load_network

WAYS = {  # how the real pixels get in, sampler, eta, rounds of each step
    "replacement": ("replace", "dpm_solver", 0.0, 1),
    "replacement, eta 1": ("replace", "ddim", 1.0, 1),
    "replacement, 5 rounds": ("replace", "repaint", 1.0, 5),
    "membrane": ("membrane", "dpm_solver", 0.0, 1),
    "membrane, eta 1": ("membrane", "ddim", 1.0, 1),
    "membrane, 5 rounds": ("membrane", "repaint", 1.0, 5),
}


def replace_pixels(eps_fn, image, keep, alpha_bar):
    """keep_pixels() without its membrane."""
    def eps_fn_that_replaces(x, t):
        abar = alpha_bar[t].item()
        return predict_eps(x, torch.where(keep, image, predict_x0(x, eps_fn(x, t), abar)), abar)

    return eps_fn_that_replaces


def repaint(eps_fn, noise, alpha_bar, steps, rounds):
    """DDIM with eta = 1 that takes each step `rounds` times, with the noise of the step put back in between."""
    x = noise()
    for t, abar, abar_next in steps_down(alpha_bar, steps):
        for left in range(rounds, 0, -1):
            x0 = predict_x0(x, eps_fn(x, t), abar)
            if abar_next == 1:
                return x0
            sigma = math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))
            direction = math.sqrt(1 - abar_next - sigma**2) * predict_eps(x, x0, abar)
            x = math.sqrt(abar_next) * x0 + direction + sigma * noise()
            if left > 1:
                x = math.sqrt(abar / abar_next) * x + math.sqrt(1 - abar / abar_next) * noise()
    return x


def hide_boxes(count, size, seed=0):
    """keep (count, 1, H, W) bool: false in a box of a third of each side, below the upper quarter and off the edges."""
    (H, W), rng = size, np.random.default_rng(seed)
    keep = torch.ones(count, 1, H, W, dtype=torch.bool)
    for i in range(count):
        y, x = rng.integers(H // 4, H - H // 3 - H // 16), rng.integers(W // 16, W - W // 3 - W // 16)
        keep[i, :, y : y + H // 3, x : x + W // 3] = False
    return keep


def steepness(images, keep, across):
    """Mean absolute difference, (B,), of neighbours across the border of the box, or else of those inside of it."""
    total, count = 0, 0
    for axis in (2, 3):
        first, second = (keep.narrow(axis, start, keep.shape[axis] - 1) for start in (0, 1))
        pairs = first ^ second if across else ~first & ~second
        total = total + (images.diff(dim=axis).abs() * pairs).sum(dim=(1, 2, 3))
        count = count + images.shape[1] * pairs.sum(dim=(1, 2, 3))
    return total / count


def measure(drawn, real, keep):
    """{name: (B,)} of drawn (samples, B, 3, H, W) and real (B, 3, H, W), in [-1, 1]."""
    def distance(images):
        squares = (images - real).square() * ~keep
        return 127.5 * (squares.sum(dim=(1, 2, 3)) / (real.shape[1] * (~keep).sum(dim=(1, 2, 3)))).sqrt()

    result = {"distance": torch.stack([distance(images) for images in drawn]).mean(dim=0),
              "of mean": distance(drawn.mean(dim=0))}
    for name, across in (("seam", True), ("inside", False)):
        true = steepness(real, keep, across).mean()  # of all images: a single one may be flat
        result[name] = torch.stack([steepness(images, keep, across) for images in drawn]).mean(dim=0) / true
    return result


def run(args):
    state, device = load_checkpoint(args.checkpoint), pick_device(args.device)
    settings = state["config"]["sample"] | {"device": device}
    _, model, diffusion, autocast = load_network(state, settings)
    size = tuple(state["config"]["data"]["size"])
    pairs = Pairs(args.root, args.split, size)
    chosen = np.linspace(0, len(pairs) - 1, min(args.images, len(pairs))).round().astype(int)
    real, mask = unpack(pairs.planes[chosen].to(device), model.num_classes)
    keep = hide_boxes(len(chosen), size).to(device)
    guidance = settings["guidance"] if args.guidance is None else args.guidance

    print(f"{len(chosen)} images of {pairs.folder}, {args.samples} samples, {args.steps} steps, guidance {guidance:g}")
    print(f"{'':24}" + "".join(f"{name:>16}" for name in ("distance", "of mean", "seam", "inside")))
    results, columns = {}, {"real": real, "hidden": real * keep}
    for way, (how, sampler, eta, rounds) in WAYS.items():
        drawn = []
        for k in range(args.samples):
            noise = noise_like_seeds(range(k * len(chosen), (k + 1) * len(chosen)), real.shape[1:], device)
            with torch.no_grad(), autocast():
                eps_fn = guided_eps(model, diffusion, mask, guidance)
                wrap = keep_pixels if how == "membrane" else replace_pixels
                eps_fn = wrap(eps_fn, real, keep, diffusion.alpha_bar)
                if sampler == "repaint":
                    x = repaint(eps_fn, noise, diffusion.alpha_bar, args.steps, rounds)
                else:
                    x = sample(eps_fn, noise, diffusion.alpha_bar, sampler, args.steps, eta)
            drawn.append(torch.where(keep, real, x.float().clamp(-1, 1)))
        columns[way] = drawn[0]
        measured = measure(torch.stack(drawn), real, keep)
        results[way] = {name: [values.mean().item(), values.std().item() / len(chosen) ** 0.5]
                        for name, values in measured.items()}
        print(f"{way:24}" + "".join(f"{mean:9.2f} ± {error:4.2f}" for mean, error in results[way].values()), flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "seams.json").write_text(json.dumps(results, indent=1))
    images = [to_uint8(column) for column in columns.values()]
    contact_sheet([list(row) for row in zip(*images)][:12], list(columns)).save(args.out / "sheet.png")
    print(args.out / "sheet.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True, help="a prepared data set")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--images", type=int, default=24, help="evenly spaced in the split; default: %(default)s")
    parser.add_argument("--samples", type=int, default=3, help="of each image and way; default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, help="default: that of the checkpoint")
    parser.add_argument("--out", type=Path, default=Path("out/seams"), help="default: %(default)s")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    command(run, parser.parse_args())


if __name__ == "__main__":
    main()
