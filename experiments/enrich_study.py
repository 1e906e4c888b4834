"""Does it help a segmenter that rare things were drawn into its images? Four ways to train it, on little data and much.

    python -m experiments.enrich_study --root data/idd_lite/prepared --checkpoint runs/idd_lite/checkpoint.pt \\
        --classes "living things,vehicles" --drive "^[^_]+_[0-9]+" --out runs/enrich_study

    real        the real pairs of the train split, or a share of them
    enriched    the real pairs, and as many images of experiments.enrich
    pasted      the real pairs, and the same edits with the real pixels of the shapes pasted in: copy-paste augmentation
    plain       the real pairs, and as many images drawn from their masks as a whole; at the first share only

Within a share, all are trained for as many steps from the same seeds, and a class weighs the same in the loss of all:
1 / sqrt(its share of the real pixels), since a short training finds no rare class without. Shapes, places, edits and
the judge of experiments.enrich come from the share alone; that judge is a segmenter with a seed of its own, which no
other part of the study uses. --checkpoint takes a generator for each share: the first call writes OUT/share010/prepared
to train one on, and says how; one that knows other data is named under the table. The held-out --split is opened to
score a segmenter that is trained, and never before; drives that have frames in it and in train are refused (--drive
tells which part of a name is the drive).

OUT gets table.md, after each seed; a folder for each share with what was made, pairs.png (real, mask, edited mask,
enriched, pasted) and the segmenters of seed 0; and the confusion matrices of each run. Ctrl-C loses nothing: the same
command goes on, and more --seeds or --shares are added. The defaults are 37 trainings and some 2300 edits, half of them
rejected: an estimated 90 minutes on two CPU cores at 64x64, by 0.3 s a step and 0.25 s an edit; at 128x128 four times
that.
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
from scipy.stats import t as student_t  # scikit-image needs scipy too

import sample
from checkpoint import load_checkpoint, pick_device, pick_precision, replacing
from config import command
from data.common import write_dataset
from dataset import Pairs, contact_sheet, list_files, read_image
from evaluate import confusion_matrix, find_images, load_segmenter, resample, scores
from experiments import enrich
from experiments.segmenter import AUGMENT, add_extra, class_weights, match_masks, save, train_segmenter
from masks import read_mask, save_mask

ARMS = ("real", "enriched", "pasted", "plain")
COMPARED = (("enriched", "pasted"), ("enriched", "real"), ("pasted", "real"), ("plain", "real"))
TRAINING = {"arch": "lraspp_mobilenet_v3_large", "lr": 3e-3, "batch_size": 16, "backbone": None, "augment": AUGMENT}
SCALE = 2  # times larger than they are, the net sees the images
JUDGE_SEED = 1000  # of the segmenters that leave images out; those that are scored have --seeds from 0 on
TABLE_SAYS = (
    "`share` is that of the real data. `real` is the mean over the seeds, with their standard deviation, of segmenters "
    "trained on real pairs alone. Every other column is the mean difference of segmenters of equal seeds and steps, "
    "whose training differs in the images that were added: drawn into real ones (enriched), pasted into them (pasted), "
    "or drawn as a whole (plain). Since all take the same steps, a segmenter with added images sees the real ones half "
    "as often as one without: `enriched - pasted` is the comparison in which nothing else differs. The interval, 95 %, "
    "takes seeds and drives for drawn: their variances, the latter from 1000 bootstrap draws of the scored drives, add "
    "up. Bold: zero is not in it. What was added was drawn once, for all seeds, and of many figures some are bold by "
    "chance.")
ADDED_SAYS = (
    "`shapes` could be cut out of the masks of the share; a class without any is skipped. `no place` counts the tries "
    "in which none fitted anywhere, `edits` the others, and `rejected` is the share of these in which the judge did "
    "not see the class; `real shapes not seen` is the same of the real shapes, and too low, since this judge was "
    "trained on them; `seen before` is the share of the places in which it saw the class before the edit.")

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


def make_pools(args, root, real, checkpoint, folder, with_plain):
    """{arm: Pairs} for the real pairs of one share, which lie in `root`; what is added to them is made in `folder`."""
    n = max(1, round(args.added * len(real)))
    sampling = ["--device", args.device, *[word for setting in args.set for word in ("--set", setting)]]
    options = ["--root", root, "--checkpoint", checkpoint, "--classes", args.classes, "--judge", folder / "judge.pt",
               "--n", n, "--tries", args.tries, "--seen", args.seen, "--least", args.least,
               "--out", folder / "enriched", *sampling]
    enrich.run(enrich.make_parser().parse_args([str(word) for word in options]))
    if not any((folder / "enriched" / "images").iterdir()):
        raise ValueError(f"{folder / 'enriched'}: its judge saw the new thing in no image: lower --seen (0 is all), "
                         "take more --steps, or a better generator")
    paste_all(real, folder / "enriched", folder / "pasted")
    extra = {arm: match_masks(folder / arm, folder / arm / "masks") for arm in ("enriched", "pasted")}
    if with_plain:
        count = len(extra["enriched"])
        options = ["--checkpoint", checkpoint, "--mask", root / "train" / "masks", "--n", math.ceil(count / len(real)),
                   "--as-dataset", folder / "plain", "--resume", *enrich.SAMPLER, *sampling]
        sample.run(sample.make_parser().parse_args([str(word) for word in options]))
        plain = list(match_masks(folder / "plain", folder / "plain" / "masks").items())
        extra["plain"] = dict(plain[i] for i in np.random.default_rng(0).permutation(len(plain))[:count])
    pools = {"real": real}
    for arm, files in extra.items():
        pools[arm] = copy.copy(real)
        add_extra(pools[arm], files)
    return pools


def train(pool, settings, seed, path, device):
    """Train a segmenter on a pool, unless its checkpoint is at `path` already."""
    if not path.exists():
        unfinished = path.with_suffix(".unfinished.pt")
        net = train_segmenter(pool, settings, seed, device, f"{path.parent.name} {path.stem}", unfinished)
        save(path, {"arch": settings["arch"], "model": net.state_dict(), "colorbook": pool.colorbook.classes,
                    "size": settings["size"], "image_size": settings["detail"], "step": settings["steps"]})
        unfinished.unlink()


# ------------------------------------------------------------------------------------------------------------ scores


def measure(path, pairs, device):
    """Confusion matrices (N, K, K) of a segmenter's checkpoint, one of each image."""
    segment, matrices = load_segmenter(path, pairs.colorbook, device), []
    for planes in pairs.planes.split(64):
        seen = segment(planes[:, :3])
        matrices += [confusion_matrix(true, found, len(pairs.colorbook)) for true, found in zip(planes[:, 3], seen)]
    return torch.stack(matrices).numpy()


def all_scores(matrices, counts, names):
    """{IoU of each class, mean IoU, pixel accuracy: (R, S)} of S seeds from their matrices (S, N, K, K).

    counts (R, N): how often each image counts, of evaluate.resample().
    """
    result = {name: [] for name in (*names, "mean IoU", "pixel accuracy")}
    for of_seed in torch.from_numpy(np.asarray(matrices)).double():
        accuracy, mean_iou, iou = scores(torch.tensordot(counts, of_seed, 1))
        for name, values in zip(result, (*iou.T.numpy(), mean_iou, accuracy)):
            result[name].append(values)
    return {name: np.stack(values, axis=1) for name, values in result.items()}


def compare(difference, drives):
    """Mean and 95 % interval of a score's difference (1 + R, S) between two arms; None for that of one seed or drive.

    Its first row has S seeds on all drives, the others have them on draws of drives. The variances of the mean over
    seeds and over draws add up; Student's t has the degrees of freedom of Welch and Satterthwaite. (Percentiles of
    draws of five seeds would hold the truth in 84 of 100 cases.)
    """
    mean, S = difference[0].mean(), difference.shape[1]
    if min(S, drives) < 2:
        return mean, None
    by_seeds = difference[0].var(ddof=1) / S
    by_drives = np.nanvar(difference[1:].mean(axis=1))
    variance = by_seeds + by_drives
    freedom = variance**2 / max(by_seeds**2 / (S - 1) + by_drives**2 / (drives - 1), 1e-30)
    reach = student_t.ppf(0.975, max(freedom, 1)) * math.sqrt(variance)
    return mean, (mean - reach, mean + reach)


def score_table(runs, names, rare, drive_index):
    """Lines of Markdown: {share: {arm: matrices (S, N, K, K)}} as scores, those of the classes `rare` first.

    drive_index (N,): the number of the drive of each image.
    """
    heads = ["share", "seeds", "score", "real", *(f"{arm} - {base}" for arm, base in COMPARED)]
    lines = ["| " + " | ".join(heads) + " |",
             "| --- " * len(heads) + "|"]
    drives = max(drive_index) + 1
    for share, matrices in runs.items():
        seeds = len(matrices["real"])
        counts = resample(drives, len(drive_index), drive_index)[1]
        arms = {arm: all_scores(of_arm, counts, names) for arm, of_arm in matrices.items()}
        for score in [*rare, *(name for name in arms["real"] if name not in rare)]:
            real = arms["real"][score][0]
            cells = [f"{share} %", f"{seeds}", f"IoU of {score}" if score in names else score,
                     f"{real.mean():.4f}" + (f" ± {real.std(ddof=1):.4f}" if seeds > 1 else "")]
            for arm, base in COMPARED:
                if arm not in arms:
                    cells.append("-")
                    continue
                mean, interval = compare(arms[arm][score] - arms[base][score], drives)
                cell = f"{mean:+.4f}"
                if interval:
                    bold = "**" if interval[0] > 0 or interval[1] < 0 else ""
                    cell = f"{bold}{cell}{bold} [{interval[0]:+.4f}, {interval[1]:+.4f}]"
                cells.append(cell)
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", TABLE_SAYS]


def added_table(reports):
    """Lines of Markdown from the reports of experiments.enrich, {share: {class: figures}}."""
    lines = ["| share | class | shapes | no place | edits | accepted | rejected | real shapes not seen | seen before |",
             "| --- " * 9 + "|"]
    for share, figures in reports.items():
        for name, f in figures.items():
            cells = [f"{share} %", name, *(str(f[key]) for key in ("shapes", "no place", "edits", "accepted")),
                     *(enrich.percent(f[key]) for key in ("rejected", "real shapes unseen", "seen before"))]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", ADDED_SAYS]


# --------------------------------------------------------------------------------------------------- from the start


def for_each_share(args, name):
    """{share: the value of --name}, which has one value, or one for each share."""
    values = getattr(args, name)
    if len(values) not in (1, len(args.shares)):
        raise ValueError(f"--{name}: {len(values)} for {len(args.shares)} shares: name one, or one for each of them")
    return dict(zip(args.shares, values * len(args.shares)))


def begin(args, device):
    """The real pairs, the names of the rare classes, and {share: the settings of its trainings}, which are kept.

    ValueError for what the user can fix.
    """
    steps, checkpoints = for_each_share(args, "steps"), for_each_share(args, "checkpoint")
    bad = [share for share in args.shares if not 1 <= share <= 100]
    if bad or args.seeds < 1 or min(args.steps) < 1:
        raise ValueError(f"--shares {args.shares}, --seeds {args.seeds}, --steps {args.steps}: expected 1 to 100 per "
                         "cent, 1 seed or more, 1 step or more")
    check_drives(args.root, args.split, args.drive)
    detail = read_image(next(iter(find_images(args.root / "train").values()))).shape[:2]
    pairs = Pairs(args.root, "train", detail, memory_gb=math.inf)
    rare = enrich.class_names(args.classes, pairs.colorbook)
    precision = pick_precision("auto", device).replace("fp16", "fp32")  # train_segmenter() has no GradScaler
    common = TRAINING | {"detail": list(detail), "size": [side * SCALE for side in detail], "precision": precision}
    settings = {}
    for share in args.shares:
        settings[share] = common | {"steps": steps[share]}
        about = {"train_crc32": zlib.crc32(pairs.planes.numpy()), "classes": rare, "split": args.split,
                 "added": args.added, "checkpoint": str(checkpoints[share])}
        enrich.check_settings(args.out / f"share{share:03}" / "settings.json", settings[share] | about)
    return pairs, rare, settings, checkpoints


def note_generator(checkpoint, share, root):
    """A line for the table where a generator was trained on something else than its share; "" otherwise."""
    trained_on = load_checkpoint(checkpoint)["config"]["data"]["root"]
    if Path(trained_on).resolve() == root.resolve():
        return ""
    return (f"The generator at {share} %, {checkpoint}, was trained on {trained_on}, not on this share of the data, "
            f"{root}. What it saw there and not here reached `enriched` and `plain`, but not `real` and `pasted`.\n\n")


def run(args):
    """From a prepared data set to table.md. ValueError or OSError for what the user can fix."""
    device, out = pick_device(args.device), args.out
    pairs, rare, settings, checkpoints = begin(args, device)
    folders = {share: out / f"share{share:03}" for share in args.shares}
    roots = {share: take_share(args.root, pairs, share, folder / "prepared") for share, folder in folders.items()}
    notes = ""
    for share, root in roots.items():
        if not checkpoints[share].is_file():
            raise ValueError(f"{checkpoints[share]}: no such checkpoint; train it on {root}: python train.py --set "
                             f"data.root={root} --set data.val=train --set data.size=... --set out=...")
        notes += note_generator(checkpoints[share], share, root)
    pools, reports = {}, {}
    for share, root in roots.items():
        real, folder = Pairs(root, "train", pairs.size, memory_gb=math.inf), folders[share]
        settings[share]["class_weights"] = class_weights(real).tolist()  # for all arms, whatever is added
        train(real, settings[share], JUDGE_SEED, folder / "judge.pt", device)
        pools[share] = make_pools(args, root, real, checkpoints[share], folder, with_plain=share == args.shares[0])
        reports[share] = json.loads((folder / "enriched" / "report.json").read_text(encoding="utf-8"))

    runs, held_out = {share: {arm: [] for arm in arms} for share, arms in pools.items()}, None
    for seed in range(args.seeds):
        for share, arms in pools.items():
            for arm, pool in arms.items():
                path = folders[share] / f"{arm}_seed{seed}.pt"
                measured = path.with_suffix(".npz")
                if not measured.exists():
                    train(pool, settings[share], seed, path, device)
                    held_out = held_out or Pairs(args.root, args.split, pairs.size, memory_gb=math.inf)
                    with replacing(measured) as opened:
                        np.savez(opened, matrices=measure(path, held_out, device),
                                 stems=[stem for stem, *_ in held_out.files])
                    if seed > 0:  # the first ones stay, to look at
                        path.unlink()
                result = np.load(measured)
                runs[share][arm].append(result["matrices"])
        drives = [re.search(args.drive, stem)[0] for stem in result["stems"]]
        drive_index = np.unique(drives, return_inverse=True)[1]
        lines = [*score_table(runs, pairs.colorbook.names, rare, drive_index), "", *added_table(reports), "", notes]
        enrich.write(out / "table.md", "\n".join(lines))
    print("\n".join(lines))
    print(out / "table.md")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--root", type=Path, required=True, help="a prepared data set")
    add("--checkpoint", type=Path, nargs="+", required=True, help="the generator; one, or one for each share")
    add("--classes", required=True, metavar="CLASS,...", help="the rare ones, which are put into the images")
    add("--drive", required=True, metavar="REGEX", help="what in a file's name is its drive; of IDD-Lite ^[^_]+_[0-9]+")
    add("--split", default="test", help="scores the segmenters; default: %(default)s")
    add("--shares", type=int, nargs="+", default=[10, 100], help="of the real data, per cent; default: 10 100")
    add("--steps", type=int, nargs="+", default=[300, 500], help="of a training, for all shares or for each; default: "
        "300 500")
    add("--seeds", type=int, default=5, help="of the segmenters; default: %(default)s")
    add("--added", type=float, default=1.0, help="images that are added, for each real one; default: %(default)s")
    for name, kind in (("tries", int), ("seen", float), ("least", int)):
        default = enrich.make_parser().get_default(name)
        add(f"--{name}", type=kind, default=default, help="of experiments.enrich; default: %(default)s")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the samples: sample.steps=50")
    add("--out", type=Path, default=Path("runs/enrich_study"), help="default: %(default)s")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    command(run, parser.parse_args())


if __name__ == "__main__":
    main()
