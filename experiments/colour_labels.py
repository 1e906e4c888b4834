"""Streets in a colour that is asked for (seed 004, 4.2.2 and 5.4): eight colour labels, in RGB and in CIE-LAB.

    python -m experiments.colour_labels                                      toy scenes, drawn if need be: 20 minutes
    python -m experiments.colour_labels --preset idd_lite --run runs/colours_idd                  the same, real streets
    python -m experiments.colour_labels --minutes 3 --n 16 --run runs/colours_small               8 minutes
    torchrun --nproc_per_node=2 -m -- experiments.colour_labels               trained by two processes, on GPUs or cores

The seed labels a painting by the colour of eight that is nearest to its mean, in RGB, and finds grey paintings under
purple; in CIE-LAB they are black or white. A small U-Net of labels is trained on 32x32 streets, and asked for each
colour at guidance 1, 2, 5 and 15, by PLMS in 50 steps. Streets as they are have two labels, black and white; so each is
seen under lamps of many colours and strengths, and as many are kept of each label. What stands in a street tells
nothing of its colour then: only the label does. The first 70 % of the streets, by name, train this generator, the
others the reader that scores; a drive at the border may be in both.

And it counts what the labels get wrong, for streets as they are and under coloured lamps: a colour for a grey image, a
hue that is not the nearest, black or white for a colour (a table, and mislabelled.png: the label in RGB, the one in
LAB, and ten streets, for the commonest cases in which the two differ). Prints both tables, what their columns are, and
writes them to report.md, the rows to results.json, and colours.png: a row for each guidance, two images of each label.
Minutes are those of two CPU cores. Ctrl-C loses nothing: the same command goes on.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from skimage.color import rgb2hsv, rgb2lab

from benchmarks.timing import machine, table
from checkpoint import join_processes, pick_device, pick_precision
from config import add_config_arguments, command, load_config
from dataset import contact_sheet, fit
from experiments.common import parse_count, parse_numbers, write_text
from experiments.label_unet import (BATCH, PARTS, SIZE, Labelled, as_shown, checksum, compare_features, draw_labels,
                                    open_results, run_jobs, share_with_interval, train_generator, train_reader,
                                    with_interval)
from experiments.training import go_on_alone
from masks import one_hot
from train import read_data

COLOURS = {"orange": (255, 165, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "purple": (128, 0, 128),
           "yellow": (255, 255, 0), "red": (255, 0, 0), "black": (0, 0, 0), "white": (255, 255, 255)}  # RGB as in CSS
NAMES, RGB = list(COLOURS), np.array(list(COLOURS.values()), float)
LAB = rgb2lab(RGB / 255)
LAMPS = 32  # of each street

COLUMNS = f"""\
labelled as asked: the share of the images whose label is the one that was asked for
pixels, mean: distance of every pixel, and of the mean of an image, to the label's colour, in RGB (0 to 255) and LAB
own, all: Frechet distance to held-out streets of the same label, and to all of them, in the features of a network that
names what stands in a street and which label it has
variety: the variance of these features within a label, as a share of that of held-out streets
s for 15: 15 times the seconds of an image, drawn in batches of {BATCH}
[ ]: Wilson's 95 % interval of a share of images; ±: the 95 % interval of a mean over images (pixels, mean) or over the
eight labels (the others). Both are for other images of the same two networks: each was trained once, and another
training would differ more
training images: which a perfect generator would be like"""

# ------------------------------------------------------------------------------------------------------- colours


def mean_colours(images):
    """The mean colour of images (N, H, W, 3) uint8 in RGB, 0 to 255, and in LAB, the mean of its pixels: two (N, 3)."""
    return (images.mean(axis=(1, 2)), np.stack([rgb2lab(image).mean(axis=(0, 1)) for image in images]))


def nearest(colours, labels):
    """The label (N,) whose colour, a row of `labels`, is nearest to each of colours (N, 3)."""
    return np.linalg.norm(colours[:, None] - labels, axis=2).argmin(axis=1)


def labels_of(images, space):
    """The labels (N,) of images (N, H, W, 3) uint8 in "rgb" or "lab"."""
    rgb, lab = mean_colours(images)
    return nearest(rgb, RGB) if space == "rgb" else nearest(lab, LAB)


def label_distances(images, labels):
    """Distances (N,) of images (N, H, W, 3) uint8 to the colours of labels (N,): "pixels" and "mean" in RGB and LAB."""
    rgb, lab = mean_colours(images)
    pixels_lab = [np.linalg.norm(rgb2lab(image) - LAB[label], axis=2).mean() for image, label in zip(images, labels)]
    return {"pixels, RGB": np.linalg.norm(images - RGB[labels][:, None, None], axis=3).mean(axis=(1, 2)),
            "mean, RGB": np.linalg.norm(rgb - RGB[labels], axis=1),
            "pixels, LAB": np.array(pixels_lab),
            "mean, LAB": np.linalg.norm(lab - LAB[labels], axis=1)}


def under_lamps(images, seed, lamps=LAMPS):
    """Images (N, H, W, 3) uint8, each under as many lamps: (N * lamps, H, W, 3), and the number of the image of each.

    A lamp has a colour between white and one of the eight, nearer to that. The brightest channel of the lit street has
    a mean anywhere from 0 to 500, beyond white: only what is overexposed is as blue, or as yellow, as the label.
    """
    rng, number = np.random.default_rng(seed), np.repeat(np.arange(len(images)), lamps)
    hues = RGB / np.maximum(RGB.max(axis=1, keepdims=True), 1)  # the eight, as bright as they go: the largest is 1
    hues[NAMES.index("black")] = 1  # a weak white lamp
    mix = rng.random((len(number), 1)) ** 0.25  # 0 is white, 1 the hue; half of the lamps have more than 0.84
    light = 1 - mix + mix * hues[rng.integers(len(RGB), size=len(number))]
    # the lit street's mean has a brightest channel of 1 now (of 255), and after the next line one from 0 to 500
    light /= (light * images.mean(axis=(1, 2))[number]).max(axis=1, keepdims=True).clip(min=1)
    light *= rng.uniform(0, 500, (len(number), 1))
    lit = np.empty((len(number), *images.shape[1:]), np.uint8)
    for i, n in enumerate(number):
        lit[i] = (images[n] * light[i]).clip(0, 255)
    return lit, number


def count_mislabelled(images, name):
    """Rows for RGB and for LAB, and [(RGB label, LAB label, images of that kind)], the commonest first.

    Neither distance has a say in what counts as wrong, but how far the channels of the image's mean are apart: a label
    that is a colour, for a grey image, less than a tenth of white; one whose hue is not the nearest of the six, by
    HSV's angle, for others; and black or white for a vivid image, more than half of white.
    """
    rgb, lab = mean_colours(images)
    apart, hue = np.ptp(rgb, axis=1), rgb2hsv(rgb / 255)[:, :1]
    grey, vivid = apart < 25.5, apart > 127.5
    turn = np.abs(hue - rgb2hsv(RGB[:6] / 255)[:, 0])
    nearest_hue = np.minimum(turn, 1 - turn).argmin(axis=1)
    found, rows = {"RGB": nearest(rgb, RGB), "LAB": nearest(lab, LAB)}, []
    for space, labels in found.items():
        coloured = labels < 6  # neither black nor white
        counts = np.bincount(labels, minlength=len(NAMES))
        rows.append({"images": f"{name}, by {space}", "n": len(images),
                     "a colour for grey": f"{(coloured & grey).mean():.1%}",
                     "another hue is nearer": f"{(coloured & ~grey & (labels != nearest_hue)).mean():.1%}",
                     "black or white for a colour": f"{(~coloured & vivid).mean():.1%}",
                     **{colour: f"{n / len(images):.1%}" for colour, n in zip(NAMES, counts)}})
    pairs = np.stack(list(found.values()))
    kinds, counts = np.unique(pairs[:, pairs[0] != pairs[1]], axis=1, return_counts=True)
    return rows, [(a, b, images[(pairs.T == (a, b)).all(axis=1)]) for a, b in kinds.T[(-counts).argsort()]]


# ------------------------------------------------------------------------------------------------------ the study


def read_streets(pairs):
    """Images (N, 32, 32, 3) and ids (N, 32, 32) of Pairs."""
    planes = pairs.planes.permute(0, 2, 3, 1).numpy()
    return tuple(np.stack([fit(np.ascontiguousarray(street), (SIZE, SIZE)) for street in part])
                 for part in (planes[..., :3], planes[..., 3]))


def label_streets(images, ids, space, seed):
    """Labelled streets under lamps, as many of each label as the rarest has. ValueError where a label has under ten."""
    lit, number = under_lamps(images, seed)
    labels = labels_of(lit, space)
    counts = np.bincount(labels, minlength=len(NAMES))
    if counts.min() < 10:
        raise ValueError(f"{len(images)} streets under {LAMPS} lamps each: {counts.min()} are "
                         f"{NAMES[counts.argmin()]}; expected 10 or more. Take more streets: toy scenes come from "
                         "python -m data.toy.prepare --train 5000 --val 1000")
    order = np.random.default_rng(seed).permutation(len(lit))
    kept = np.concatenate([order[labels[order] == k][:counts.min()] for k in range(len(NAMES))])
    return Labelled(lit[kept], labels[kept], ids[number[kept]])


def draw_mislabelled(kinds):
    """A row for each kind: the colour of its RGB label, that of its LAB label, and ten of its images."""
    rows = []
    for rgb_label, lab_label, images in kinds:
        flat = [np.full((SIZE, SIZE, 3), RGB[label], np.uint8) for label in (rgb_label, lab_label)]
        rows.append([*flat, *images[:: max(1, len(images) // 10)][:10]])
    return contact_sheet(rows, ["by RGB", "by LAB"], least=96)


def show_mistakes(streets, run):
    """Count the mistakes of both spaces; returns the report's part on them and draws mislabelled.png."""
    plain, kinds = count_mislabelled(streets, "as they are")
    lit, kinds_lit = count_mislabelled(under_lamps(streets, 2, lamps=2)[0], "under lamps")
    draw_mislabelled(kinds[:4] + kinds_lit[:6]).save(run / "mislabelled.png")
    return (f"{table(plain + lit)}\n\nmislabelled.png: {min(4, len(kinds))} rows of streets as they are, then "
            f"{min(6, len(kinds_lit))} under lamps")


def run_study(args):
    if args.n < 2:
        raise ValueError("--n is 1: a variance within a label needs 2 or more samples")
    own = ["model.hidden_dim=16", "train.label_drop=0.2", "train.batch_size=32", "train.steps=4000", "train.previews=8"]
    cfg = load_config(args.config, args.preset, own + args.set)
    device = pick_device(cfg["device"])
    splits = read_data(cfg, *join_processes(device), dry_run=False)
    K, streets = len(splits[0].colorbook), [read_streets(pairs) for pairs in splits]
    cut = len(streets[0][0]) * 7 // 10
    own_streets = label_streets(*(part[:cut] for part in streets[0]), args.space, 0)
    for_reader = label_streets(*(part[cut:] for part in streets[0]), args.space, 0)
    held_out = label_streets(*streets[1], args.space, 1)
    print(f"{len(own_streets)} streets for the generator, {len(for_reader)} for the reader, {len(held_out)} held out")
    precision = pick_precision(cfg["sample"]["precision"], device)
    results = open_results(args.run, {
        "n": args.n, "seed": args.seed, "space": args.space, "minutes": args.minutes, "precision": precision,
        "config": {part: cfg[part] for part in PARTS}, "held out": checksum(held_out)})

    def content(planes):
        """What the reader names, (B, K + 8): shares of the classes in the mask, and the label; each sums to 1/2."""
        shares = one_hot(planes[:, 3], K).mean(dim=(2, 3))
        shares = shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-6)
        return torch.cat([shares, F.one_hot(planes[:, -1, 0, 0].long(), 8)], dim=1) / 2

    model, diffusion = train_generator(cfg, own_streets, held_out, 8, args.run / "generator.pt", device, args.minutes)
    reader = train_reader(cfg, content, K + 8, for_reader, held_out, args.run / "reader.pt", device, args.minutes)
    go_on_alone()
    logits, real_features = reader.read(held_out.images)
    missed = (logits[:, :K].softmax(dim=1) - 2 * content(held_out.planes)[:, :K]).abs().sum(dim=1) / 2
    seen = share_with_interval(logits[:, K:].argmax(dim=1) == held_out.labels)
    ceiling = (f"Of held-out streets the reader misplaces {with_interval(missed)} of the area, and names the label of "
               f"{seen}.")

    def draw(guidance):
        labels = torch.arange(8).repeat(args.n)
        return labels, *draw_labels(model, diffusion, labels, args.seed, guidance, precision=precision)

    def training_images():
        rows = [torch.nonzero(own_streets.labels == k)[:args.n, 0] for k in range(8)]
        chosen = torch.stack(rows, dim=1).flatten()
        return own_streets.labels[chosen], own_streets.planes[chosen, :3].permute(0, 2, 3, 1).numpy(), None

    def measure(labels, images):
        row = {"labelled as asked": share_with_interval(labels_of(images, args.space) == labels.numpy())}
        row |= {name: with_interval(values) for name, values in label_distances(images, labels.numpy()).items()}
        _, features = reader.read(Labelled(images, labels).images)
        found = compare_features(features, labels, real_features, held_out.labels)
        return row | {name: with_interval(values) for name, values in found.items()}

    jobs = {"training images": training_images} | {f"w = {w:g}": partial(draw, w) for w in args.guidance}
    rows, images = run_jobs(args.run, results, jobs, measure)
    report = (f"{show_mistakes(streets[0][0], args.run)}\n\n{machine(device)}, PLMS in 50 steps\n\n{table(rows)}\n\n"
              f"{ceiling}\n\n{COLUMNS}\n")
    write_text(args.run / "report.md", report)
    print(report)
    sheet = [[drawn[i] for k in range(8) for i in (k, 8 + k)] for drawn in images.values()]
    contact_sheet([as_shown(row) for row in sheet], least=64).save(args.run / "colours.png")
    print(f"\n{args.run / 'results.json'}, {args.run / 'colours.png'}: {'; '.join(images)}; {', '.join(NAMES)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_config_arguments(parser)
    add("--run", type=Path, default=Path("runs/colours"), help="the folder of the run; default: %(default)s")
    add("--space", choices=["lab", "rgb"], default="lab", help="of the labels that are trained; default: %(default)s")
    add("--minutes", type=float, default=math.inf, help="at most, of training each of the two networks")
    add("--guidance", type=parse_numbers, default=[1.0, 2.0, 5.0, 15.0], metavar="W[,W...]", help="default: 1,2,5,15")
    add("--n", type=parse_count, default=50, help="samples of each colour at each guidance; default: %(default)s")
    add("--seed", type=int, default=1, help="of the first sample; default: %(default)s")
    command(run_study, parser.parse_args())


if __name__ == "__main__":
    main()
