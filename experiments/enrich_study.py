"""Does it help a segmenter that rare things were drawn into its images? Four ways to train it, on little data and much.

    python -m experiments.enrich_study --root data/idd_lite/prepared --checkpoint runs/idd_lite/checkpoint.pt \\
        --classes "living things,vehicles" --drive "^train_[0-9]+" --out runs/enrich_study

    real        the real pairs of the train split, or a share of them
    enriched    these, and as many images of experiments.enrich
    pasted      these, and the same edits with the real pixels of the shapes pasted in: copy-paste augmentation
    plain       these, and as many images drawn from masks of these, without any editing

All are trained for as many steps from the same seeds, with a loss in which rare classes weigh more, since without it a
short training does not find them at all (--no-balance). For each share of the real data, shapes, places, edited images
and the judge of experiments.enrich come from that share alone. That judge is a segmenter of the share with a seed of
its own, which no other part of the study uses. A --checkpoint for each share makes the generator one of the share alone
too, where one for all of them has seen the whole train split; the first call writes OUT/share010/prepared and the
like, to train them on, and says how. The held-out --split is opened to score a segmenter that is trained, and never
before; drives that have frames in it and in train are refused (--drive tells which part of a name is the drive).

OUT gets table.md, a folder for each share with what was made and pairs.png (real, mask, edited mask, enriched, pasted),
and the confusion matrices of each run. Ctrl-C loses nothing: the same command goes on, more --seeds are added. On two
CPU cores the 60 runs of three shares and five seeds take 4 hours at 64x64, 6 at 96x128; one run of them 3 minutes or 6.
"""

import argparse
import copy
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sample
from checkpoint import pick_device, pick_precision, replacing
from config import command
from data.common import write_dataset
from dataset import Pairs, contact_sheet, list_files, read_image
from evaluate import confusion_matrix, find_images, load_segmenter, resample, scores
from experiments import enrich
from experiments.segmenter import AUGMENT, add_extra, match_masks, paired, save, train_segmenter
from masks import read_mask, save_mask

ARMS = ("real", "enriched", "pasted", "plain")
COMPARED = (("enriched", "real"), ("pasted", "real"), ("plain", "real"), ("enriched", "pasted"))
JUDGE_SEED = 1000  # of the segmenters that leave images out; those that are scored have --seeds from 0 on
TABLE_SAYS = (
    "`share` is that of the real data. `real` is the mean over the seeds, with their standard deviation, of segmenters "
    "trained on real pairs alone. Every other column is the mean difference of segmenters of equal seeds and steps, "
    "whose training differs in the images that were added: drawn into real ones (enriched), pasted into them (pasted), "
    "or drawn as a whole (plain). The first interval, 95 %, is Student's t over the seeds, and tells nothing about "
    "which images were scored; the second, of 1000 bootstrap draws of the scored images, tells nothing about the "
    "trainings, and takes frames of one drive for independent ones. Bold: neither has zero in it. What was added was "
    "drawn once, for all seeds, and of many figures some are bold by chance.")
ADDED_SAYS = (
    "`shapes` could be cut out of the masks of the share, `edits` were made with them, and `rejected` is the share of "
    "these in which the judge did not see the class; `real shapes not seen` is the same of the real shapes, in images "
    "that this judge was trained on; `seen before` is the share of the places in which it saw the class before the "
    "edit.")

# ------------------------------------------------------------------------------------------------- what is trained on


def check_drives(root, split, drive):
    """ValueError where a drive has frames both in train and in the split that scores."""
    drives = {}
    for part in ("train", split):
        stems = list_files(root / part / "images")
        found = {stem: re.search(drive, stem) for stem in stems}
        unnamed = [stem for stem, match in found.items() if not match]
        if unnamed or not stems:
            raise ValueError(f"--drive {drive} finds nothing in {len(unnamed)} of the {len(stems)} names of "
                             f"{root / part / 'images'}, such as {', '.join(unnamed[:3])}")
        drives[part] = {match[0] for match in found.values()}
    shared = sorted(drives["train"] & drives[split])
    if shared:
        raise ValueError(f"{root}: {len(shared)} drive(s), such as {shared[0]}, have frames in both train and {split}, "
                         "which look alike. Split by drives: python -m data.folder.prepare --group")
    print(f"{len(drives['train'])} drives to train on, {len(drives[split])} others to score on")


def take_share(root, pairs, share, out):
    """The root of a prepared data set with `share` per cent of the train split, drawn at random, the smaller share a
    part of the larger one."""
    if share == 100:
        return root
    if not (out / "colorbook.json").exists():
        order = np.random.default_rng(0).permutation(len(pairs))[: max(1, round(share / 100 * len(pairs)))]
        chosen = []
        for i in sorted(order):
            planes = pairs.planes[i].numpy()
            chosen.append((pairs.files[i][0], lambda p=planes: (np.ascontiguousarray(p[:3].transpose(1, 2, 0)), p[3])))
        write_dataset(out, pairs.colorbook, {"train": chosen})
    return out


def paste(image, changed, source, shape_box, place_box):
    """image with the pixels of source from shape_box, brought to the size of place_box, where changed is true."""
    rows, columns = enrich.rows_and_columns(place_box)
    cut = source[enrich.rows_and_columns(shape_box)]
    result, inside = image.copy(), changed[rows, columns]
    result[rows, columns][inside] = enrich.resize(cut, inside.shape, Image.Resampling.BICUBIC)[inside]
    return result


def paste_all(pairs, enriched, out):
    """The accepted edits of the folder `enriched` once more, with real pixels; pairs.png, beside `out`, shows some."""
    planes = {stem: pairs.planes[i].numpy() for i, (stem, *_) in enumerate(pairs.files)}
    lines = [json.loads(line) for line in (enriched / "edits.jsonl").read_text(encoding="utf-8").splitlines()]
    lines, rows = [line for line in lines if line["accepted"]], []
    shown = np.linspace(0, len(lines) - 1, min(12, len(lines))).round().astype(int)
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for i, line in enumerate(lines):
        scene, source = (planes[stem] for stem in (line["place"]["in"], line["shape"]["from"]))
        mask = read_mask(enriched / "masks" / line["image"], pairs.colorbook)[0]
        image = scene[:3].transpose(1, 2, 0)
        pasted = paste(image, mask != scene[3], source[:3].transpose(1, 2, 0), line["shape"]["box"],
                       line["place"]["box"])
        Image.fromarray(pasted).save(out / "images" / line["image"])
        save_mask(mask, out / "masks" / line["image"], pairs.colorbook)
        if i in shown:
            drawn, paint = read_image(enriched / "images" / line["image"]), pairs.colorbook.paint
            rows.append([image, paint(scene[3]), paint(mask), drawn, pasted])
    contact_sheet(rows, ["real", "mask", "edited mask", "enriched", "pasted"]).save(out.parent / "pairs.png")


def make_pools(args, root, real, checkpoint, folder, train):
    """{arm: Pairs} for the real pairs of one share, which lie in `root`; what is added is made in `folder` first.

    train(pairs, seed, path) trains a segmenter.
    """
    train(real, JUDGE_SEED, folder / "judge.pt")
    n = max(1, round(args.added * len(real)))
    settings = [word for setting in args.set for word in ("--set", setting)]
    options = ["--root", root, "--checkpoint", checkpoint, "--classes", args.classes, "--judge", folder / "judge.pt",
               "--n", n, "--tries", args.tries, "--seen", args.seen, "--least", args.least, "--device", args.device,
               "--out", folder / "enriched", *settings]
    enrich.run(enrich.make_parser().parse_args([str(word) for word in options]))
    if not any((folder / "enriched" / "images").iterdir()):
        raise ValueError(f"{folder / 'enriched'}: its judge saw the new thing in no image: lower --seen (0 is all), "
                         "take more --steps, or a better generator")
    used = {"enriched": match_masks(folder / "enriched", folder / "enriched" / "masks")}
    count = len(used["enriched"])
    paste_all(real, folder / "enriched", folder / "pasted")
    used["pasted"] = match_masks(folder / "pasted", folder / "pasted" / "masks")
    options = ["--checkpoint", checkpoint, "--mask", root / "train" / "masks", "--n", math.ceil(count / len(real)),
               "--as-dataset", folder / "plain", "--resume", "--device", args.device, *settings]
    sample.run(sample.make_parser().parse_args([str(word) for word in options]))
    plain = list(match_masks(folder / "plain", folder / "plain" / "masks").items())
    used["plain"] = dict(plain[i] for i in np.random.default_rng(0).permutation(len(plain))[:count])
    pools = {"real": real}
    for arm, files in used.items():
        pools[arm] = copy.copy(real)
        add_extra(pools[arm], files)
    return pools


# ------------------------------------------------------------------------------------------------------------ scores


def confusions(path, pairs, device):
    """Confusion matrices (N, K, K) of a segmenter's checkpoint, one of each image."""
    segment, matrices = load_segmenter(path, pairs.colorbook, device), []
    for planes in pairs.planes.split(64):
        seen = segment(planes[:, :3])
        matrices += [confusion_matrix(true, found, len(pairs.colorbook)) for true, found in zip(planes[:, 3], seen)]
    return torch.stack(matrices).numpy()


def all_scores(matrices, counts):
    """Scores (S, R, K + 2) of S seeds from their matrices (S, N, K, K): IoU of each class, mean IoU, pixel accuracy.

    counts (R, N): how often each image counts, of evaluate.resample().
    """
    result = []
    for of_seed in torch.from_numpy(np.asarray(matrices)).double():
        accuracy, mean_iou, iou = scores(torch.tensordot(counts, of_seed, 1))
        result.append(torch.cat([iou, torch.tensor([mean_iou, accuracy]).T], dim=1))
    return torch.stack(result)


def compare(added, base):
    """One score of two arms, each (S, R): mean difference, its interval by seeds and by images (None for one seed)."""
    difference = (added - base).mean(dim=0)
    low, high = torch.nanquantile(difference[1:], torch.tensor([0.025, 0.975]).double()).tolist()
    by_seeds = paired(base[:, 0].tolist(), added[:, 0].tolist())["interval"]
    return difference[0].item(), by_seeds, [low, high]


def table(runs, names, rare):
    """Lines of Markdown: {share: {arm: matrices (S, N, K, K)}} as scores, those of the classes `rare` first."""
    measures = [*rare, *(name for name in names if name not in rare), "mean IoU", "pixel accuracy"]
    columns = [*names, "mean IoU", "pixel accuracy"]
    heads = ["share", "seeds", "score", "real", *(f"{added} - {base}" for added, base in COMPARED)]
    lines = ["| " + " | ".join(heads) + " |",
             "| --- " * len(heads) + "|"]
    for share, arms in runs.items():
        seeds, images = len(arms["real"]), len(arms["real"][0])
        counts = resample(images, images, None)[0]
        arm_scores = {arm: all_scores(matrices, counts) for arm, matrices in arms.items()}
        for measure in measures:
            values = {arm: every[..., columns.index(measure)] for arm, every in arm_scores.items()}
            real = values["real"][:, 0]
            cells = [f"{share} %", f"{seeds}", f"IoU of {measure}" if measure in names else measure]
            cells.append(f"{real.mean():.4f}" + (f" ± {real.std():.4f}" if seeds > 1 else ""))
            for added, base in COMPARED:
                mean, by_seeds, by_images = compare(values[added], values[base])
                intervals = [by_images] if by_seeds is None else [by_seeds, by_images]
                cell = f"{mean:+.4f}"
                if seeds > 1 and all(low > 0 or high < 0 for low, high in intervals):
                    cell = f"**{cell}**"
                cells.append(cell + "".join(f" [{low:+.4f}, {high:+.4f}]" for low, high in intervals))
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", TABLE_SAYS]


def what_was_added(shares):
    """Lines of Markdown from the reports of experiments.enrich, {share: {class: figures}}."""
    lines = ["| share | class | shapes | edits | accepted | rejected | real shapes not seen | seen before |",
             "| --- " * 8 + "|"]
    for share, figures in shares.items():
        for name, f in figures.items():
            cells = [f"{share} %", name, *(str(f[key]) for key in ("shapes", "edits", "accepted")),
                     *(f"{f[key]:.0%}" for key in ("rejected", "real shapes unseen", "seen before"))]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", ADDED_SAYS]


# --------------------------------------------------------------------------------------------------- from the start


def begin(args, device):
    """The real pairs, the names of the rare classes and the settings of all trainings, which settings.json keeps.

    ValueError for what the user can fix.
    """
    if len(args.checkpoint) not in (1, len(args.shares)):
        raise ValueError(f"{len(args.checkpoint)} checkpoints for {len(args.shares)} shares: name one, or one for each")
    bad = [share for share in args.shares if not 1 <= share <= 100]
    if bad or args.seeds < 1:
        raise ValueError(f"--shares {args.shares}, --seeds {args.seeds}: expected 1 to 100 per cent, 1 seed or more")
    check_drives(args.root, args.split, args.drive)
    detail = read_image(next(iter(find_images(args.root / "train").values()))).shape[:2]
    pairs = Pairs(args.root, "train", detail, memory_gb=math.inf)
    rare = enrich.class_names(args.classes, pairs.colorbook)
    precision = pick_precision(args.precision, device).replace("fp16", "fp32")  # train_segmenter() has no GradScaler
    settings = {"arch": args.arch, "detail": list(detail), "size": [side * args.scale for side in detail],
                "steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "precision": precision,
                "backbone": None, "augment": AUGMENT}
    about = settings | {"train_crc32": zlib.crc32(pairs.planes.numpy()), "classes": rare, "split": args.split,
                        "added": args.added, "balance": args.balance,
                        "checkpoint": [str(path) for path in args.checkpoint]}
    file = args.out / "settings.json"
    begun = json.loads(file.read_text(encoding="utf-8")) if file.exists() else about
    changed = [key for key in about if begun.get(key) != about[key]]
    if changed:
        raise ValueError(f"{file}: begun with another {', '.join(changed)}: choose another --out, or delete it")
    args.out.mkdir(parents=True, exist_ok=True)
    enrich.write(file, json.dumps(about, indent=1))
    return pairs, rare, settings


def run(args):
    """From a prepared data set to table.md. ValueError or OSError for what the user can fix."""
    device, out = pick_device(args.device), args.out
    pairs, rare, settings = begin(args, device)

    def train(pool, seed, path):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished.pt")
            its_settings = settings | ({"balance": True} if args.balance or seed == JUDGE_SEED else {})
            net = train_segmenter(pool, its_settings, seed, device, f"{path.parent.name} {path.stem}", unfinished)
            save(path, {"arch": args.arch, "model": net.state_dict(), "colorbook": pairs.colorbook.classes,
                        "size": settings["size"], "image_size": settings["detail"], "step": args.steps})
            unfinished.unlink()

    pools, added = {}, {}
    checkpoints = dict(zip(args.shares, args.checkpoint * (len(args.shares) // len(args.checkpoint))))
    roots = {share: take_share(args.root, pairs, share, out / f"share{share:03}" / "prepared") for share in args.shares}
    for share, root in roots.items():
        if not checkpoints[share].is_file():
            raise ValueError(f"{checkpoints[share]}: no such checkpoint; train it on {root}: python train.py --set "
                             f"data.root={root} --set data.val=train --set data.size=... --set out=...")
    for share, root in roots.items():
        real, folder = Pairs(root, "train", pairs.size, memory_gb=math.inf), out / f"share{share:03}"
        pools[share] = make_pools(args, root, real, checkpoints[share], folder, train)
        added[share] = json.loads((folder / "enriched" / "report.json").read_text(encoding="utf-8"))
    runs, held_out = {share: {arm: [] for arm in ARMS} for share in args.shares}, None
    for seed in range(args.seeds):
        for share, arms in pools.items():
            for arm, pool in arms.items():
                path = out / f"share{share:03}" / f"{arm}_seed{seed}.pt"
                measured = path.with_suffix(".npy")
                if not measured.exists():
                    train(pool, seed, path)
                    held_out = held_out or Pairs(args.root, args.split, pairs.size, memory_gb=math.inf)
                    matrices = confusions(path, held_out, device)
                    with replacing(measured) as opened:
                        np.save(opened, matrices)
                    path.unlink()
                runs[share][arm].append(np.load(measured))
        lines = [*table(runs, pairs.colorbook.names, rare), "", *what_was_added(added), ""]
        if len(args.checkpoint) < len(args.shares):
            lines.append("The generator was trained on the whole train split at every share.")
        enrich.write(out / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(out / "table.md")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--root", type=Path, required=True, help="a prepared data set")
    add("--checkpoint", type=Path, nargs="+", required=True, help="the generator; one, or one for each share")
    add("--classes", required=True, metavar="CLASS,...", help="the rare ones, which are put into the images")
    add("--drive", required=True, metavar="REGEX", help="what in a file's name is its drive, such as ^[^_]+")
    add("--split", default="test", help="scores the segmenters; default: %(default)s")
    add("--shares", type=int, nargs="+", default=[10, 50, 100], help="of the real data, per cent; default: 10 50 100")
    add("--seeds", type=int, default=5, help="of the segmenters; default: %(default)s")
    add("--added", type=float, default=1.0, help="images that are added, for each real one; default: %(default)s")
    for name, kind in (("tries", int), ("seen", float), ("least", int)):
        default = enrich.make_parser().get_default(name)
        add(f"--{name}", type=kind, default=default, help="of experiments.enrich; default: %(default)s")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the samples: sample.steps=50")
    add("--arch", default="lraspp_mobilenet_v3_large", help="or deeplabv3_resnet50; default: %(default)s")
    add("--scale", type=int, default=2, help="how many times larger the net sees the images; default: %(default)s")
    add("--steps", type=int, default=600, help="of each training; default: %(default)s")
    add("--batch-size", type=int, default=16, help="default: %(default)s")
    add("--lr", type=float, default=3e-3, help="the highest of the cycle; default: %(default)s")
    add("--balance", action=argparse.BooleanOptionalAction, default=True, help="rare classes weigh more in the loss of "
        "all segmenters; without it only in that of those that leave images out")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="default: %(default)s")
    add("--out", type=Path, default=Path("runs/enrich_study"), help="default: %(default)s")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    command(run, parser.parse_args())


if __name__ == "__main__":
    main()
