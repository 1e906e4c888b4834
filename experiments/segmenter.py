"""A segmenter trained on a prepared data set: the judge of evaluate.py, and the augmentation study of the paper.

    python -m experiments.segmenter --root data/idd_lite/prepared --out runs/judge
    python -m experiments.segmenter --root data/idd_lite/prepared --arch lraspp_mobilenet_v3_large --lr 3e-3    for CPUs
    python sample.py --mask data/idd_lite/prepared/train/masks --n 1 --out generated
    python -m experiments.segmenter --root data/idd_lite/prepared --extra generated --seeds 3 --out runs/study

The first trains a judge on the train split, prints how good it is on val and test, which is the ceiling of what it
can find in generated images, and writes checkpoint.pt for `evaluate.py --segmenter`. Train it at the size of the
generator's images: a judge of finer images takes the generator's for blurred ones. Images are used as they were
prepared; if the generator's are of another size, give that as --detail HEIGHTxWIDTH.

With --extra it is the study (Bozsó et al., IV-B): segmenters trained on the real pairs, and on these with generated
images added, for as many steps, from the same seeds, all at the size of the generated images. A generated image
belongs to the mask whose stem its own name begins with, <stem>_w3_seed1.png to <stem>.png, as sample.py writes them.
The masks are those of the train split, or --extra-masks, or lie in the folder itself, as images/ and masks/.

Ctrl-C loses nothing: the same command goes on where it was, and a larger --seeds adds to a finished study. On two CPU
cores the judge for CPUs takes 16 minutes (--steps 1400 --batch-size 16), the study with three seeds 28 (--steps 300).
"""

import argparse
import copy
import io
import json
import math
import signal
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import t as student_t  # scikit-image needs scipy too
from tqdm import tqdm

from checkpoint import pick_device, pick_precision, random_state, replacing, set_random_state
from config import command
from data.common import parse_size
from dataset import Pairs, batches, fit, fit_pair, list_files, read_image
from evaluate import build_segmenter, confusion_matrix, find_images, load_segmenter, mask_of, normalise, scores
from masks import UNLABELLED, open_image, read_mask

AUGMENT = {"p": 0.5, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.02, "vertical_flip": False,
           "rotate": 0.0, "crop": 0.5}  # strong, since data are few and no weights are pretrained


# --------------------------------------------------------------------------------------------- generated images


def match_masks(folder, masks_folder):
    """{image: mask}, the files of generated images. Those without a mask are listed; ValueError if all are."""
    images, masks = find_images(folder), list_files(masks_folder)
    used, orphans = {}, []
    for stem, path in images.items():
        mask_stem = mask_of(stem, masks)
        if mask_stem is None:
            orphans.append(stem)
        else:
            used[path] = masks[mask_stem]
    if not used:
        example = next(iter(masks), "<mask>")
        raise ValueError(f"{folder}: none of its {len(images)} images has a name that begins with one of "
                         f"{masks_folder}; expected names such as {example}_w3_seed1.png. If they were made from other "
                         "masks, name these with --extra-masks")
    if orphans:
        print(f"{folder}: {len(orphans)} image(s) without a mask left out: {', '.join(orphans[:10])}"
              + " ..." * (len(orphans) > 10))
    return used


def refuse_judged_masks(masks, held_out, colorbook):
    """ValueError that names those of the mask files that the segmenter is judged on, by their stem or their ids."""
    size = tuple(next(iter(held_out.values())).planes.shape[2:])
    stems, contents = {}, {}
    for split, pairs in held_out.items():
        for (stem, _, path), planes in zip(pairs.files, pairs.planes):
            stems[stem] = contents[planes[3].numpy().tobytes()] = f"{split}/masks/{path.name}"
    judged = []
    for path in masks:
        ids = fit(read_mask(path, colorbook)[0], size)
        if path.stem in stems:
            judged.append(f"{path} has the name of {stems[path.stem]}")
        elif ids.tobytes() in contents:
            judged.append(f"{path} has the content of {contents[ids.tobytes()]}")
    if judged:
        raise ValueError(f"{len(judged)} of {len(masks)} masks belong to what the segmenter is judged on, so images of "
                         "them must not be trained on. Leave these out, or rename masks that only share a name:\n"
                         + "\n".join(judged[:10]) + f"\n... and {len(judged) - 10} more" * (len(judged) > 10))


def add_extra(pairs, used):
    """Append the files {generated image: mask} to pairs in memory. ValueError where an image is a mask."""
    added = []
    for path, mask in tqdm(used.items(), desc="reading extra", unit="pair", leave=False):
        if open_image(path).mode == "P":
            raise ValueError(f"{path}: an image with a palette, which is what masks are; expected generated images")
        image = read_image(path)
        ids = fit(read_mask(mask, pairs.colorbook)[0], image.shape[:2])  # as sample.py fitted it
        image, ids = fit_pair(image, ids, tuple(pairs.planes.shape[2:]), None, f"{path} and {mask}")
        added.append(torch.from_numpy(np.concatenate([image.transpose(2, 0, 1), ids[None]])))
    print(f"{len(used)} generated images of {len(set(used.values()))} masks added to {len(pairs)} real pairs")
    pairs.files = pairs.files + [(path.stem, path, mask) for path, mask in used.items()]
    pairs.planes = torch.cat([pairs.planes, torch.stack(added)])


# ----------------------------------------------------------------------------------------------------- training


def load_backbone(net, path):
    """Weights of torchvision's ImageNet classifier of the same backbone, such as resnet50-11ad3fa6.pth, into net."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {key.removeprefix("features."): value for key, value in state.items()}
        missing = net.backbone.load_state_dict(state, strict=False).missing_keys
    except Exception as error:  # torch raises many kinds for a file that is something else
        raise ValueError(f"{path}: not the weights of this backbone: {str(error).splitlines()[0]}") from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(f"{path}: not the weights of this backbone: {len(missing)} are missing, such as {missing[0]}")


def save(path, state):
    """Write beside, then rename. OSError where the disk is full (torch's own writer has a RuntimeError for that)."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def class_weights(pairs):
    """Weights (K,) of the classes in the loss, 1 / sqrt(share of the pixels), whose mean over all pixels is 1."""
    pixels = torch.bincount(pairs.planes[:, 3].flatten(), minlength=256)[: len(pairs.colorbook)]
    weights = (pixels.sum() / pixels.clamp(min=1)).sqrt()
    return weights * pixels.sum() / (weights * pixels).sum()


def segmentation_loss(net, planes, size, autocast, weights=None):
    """Cross-entropy of planes (B, 4, H, W) uint8 seen at `size`, mean over the labelled pixels; weights (K,)."""
    images, ids = planes.split([3, 1], dim=1)
    x = normalise(F.interpolate(images.float(), size=size, mode="bilinear", antialias=True))
    with autocast:
        logits = net(x.contiguous(memory_format=torch.channels_last))["out"]
    logits = F.interpolate(logits.float(), size=ids.shape[2:], mode="bilinear")
    labelled = (ids != UNLABELLED).sum().clamp(min=1)
    return F.cross_entropy(logits, ids[:, 0].long(), weights, ignore_index=UNLABELLED, reduction="sum") / labelled


def train_segmenter(pairs, settings, seed, device, title, unfinished):
    """A net trained from `seed` for settings["steps"] steps: AdamW, one cycle of the learning rate, cross-entropy.

    settings["class_weights"], where there are some, are those of the loss; nets that are compared need the same ones.
    The file `unfinished` is written every 500 steps, at the end, and on Ctrl-C, which ends in a KeyboardInterrupt;
    where it exists, the training goes on from it. ValueError if it was begun with other settings, or the loss is not
    finite.
    """
    torch.manual_seed(seed)
    net = build_segmenter(settings["arch"], len(pairs.colorbook))
    if settings["backbone"]:
        load_backbone(net, settings["backbone"])
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # MobileNet's 0.01 would average over more steps than a short training has
    net.to(device, memory_format=torch.channels_last).train()
    steps = settings["steps"]
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings["lr"], weight_decay=0.01)
    cycle = max(steps + 1, 11)  # a tenth of it is warm-up, which has to be longer than a step
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings["lr"], total_steps=cycle, pct_start=0.1)
    parts = {"model": net, "optimizer": optimizer, "schedule": schedule}
    begun = 0
    if unfinished.exists():
        state = torch.load(unfinished, map_location="cpu", weights_only=True)
        if state["config"] != settings | {"seed": seed}:
            raise ValueError(f"{unfinished}: begun with other settings: choose another --out, or delete it")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        set_random_state(device, state["rng"])
        begun = state["step"]
        print(f"{title}: going on at step {begun} of {steps}")

    stop = []

    def on_ctrl_c(number, frame):
        stop.append(number)
        signal.signal(number, signal.default_int_handler)  # a second one ends at once

    handler = signal.signal(signal.SIGINT, on_ctrl_c)
    B = settings["batch_size"]
    loader = batches(pairs, B, seed, begun * B, flip=0.5, augment=AUGMENT, device=device)
    weights = torch.tensor(settings["class_weights"], device=device) if settings.get("class_weights") else None
    bar = tqdm(range(begun + 1, steps + 1), initial=begun, total=steps, unit="step", desc=title, dynamic_ncols=True)
    try:
        for step in bar:
            autocast = torch.autocast(device.type, torch.bfloat16, settings["precision"] == "bf16")
            loss = segmentation_loss(net, next(loader), settings["size"], autocast, weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 50 == 0 or step == steps:
                bar.set_postfix(loss=f"{loss.item():.3f}")
                if not loss.isfinite():
                    raise ValueError(f"{title}, step {step}: the loss is not finite; try a smaller --lr, or "
                                     "--precision fp32")
            if stop or step % 500 == 0 or step == steps:
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= {"rng": random_state(device), "step": step, "config": settings | {"seed": seed}}
                save(unfinished, state)
            if stop:
                raise KeyboardInterrupt(f"{title}: step {step} of {steps} is saved, and the same command goes on")
    finally:
        signal.signal(signal.SIGINT, handler)
        bar.close()
    return net


def judge(path, pairs, device, batch_size=64):
    """Pixel accuracy, mean IoU and IoU per class (None where it does not occur) of a checkpoint, as in evaluate.py."""
    segment = load_segmenter(path, pairs.colorbook, device)
    K = len(pairs.colorbook)
    confusion = 0
    for planes in pairs.planes.split(batch_size):
        confusion = confusion + confusion_matrix(planes[:, 3], segment(planes[:, :3]), K)
    accuracy, mean_iou, iou = scores(confusion)
    result = {"pixel accuracy": accuracy, "mean IoU": mean_iou}
    for name, value in zip(pairs.colorbook.names, iou.tolist()):
        result[name] = None if math.isnan(value) else value
    return result


# ------------------------------------------------------------------------------------------------------ results


def paired(real, added):
    """Of scores of equal seeds: mean and sample deviation of both and of added - real, and the latter's 95 % interval.

    The interval is Student's t of the n differences, mean ± t(n - 1) std / sqrt(n). With one seed, deviations and
    interval are None.
    """
    n, result = len(real), {}
    for name, values in (("real", real), ("real + generated", added), ("difference", np.subtract(added, real))):
        result[name] = {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if n > 1 else None}
    mean, std = result["difference"].values()
    reach = student_t.ppf(0.975, n - 1) * std / n**0.5 if n > 1 else None
    return result | {"interval": [mean - reach, mean + reach] if n > 1 else None}


def print_line(name, cells, width):
    print(f"{name:20}" + "".join(f"{cell:>{width}}" for cell in cells))


def report_judge(scores_of_splits):
    """Print the scores of one segmenter, {split: {measure: value or None}}: a column for each split."""
    print_line("", scores_of_splits, 10)
    for measure in next(iter(scores_of_splits.values())):
        values = [split_scores[measure] for split_scores in scores_of_splits.values()]
        print_line(measure, ["-" if value is None else f"{value:.4f}" for value in values], 10)


def report_study(runs, splits, seeds):
    """Print a table with a verdict for each split; returns {split: {measure: paired(), "verdict": text}}."""
    study = {}
    for split in splits:
        study[split] = {}
        print_line(split, ["real", "real + generated", "difference", "95 % interval"], 20)
        for measure in runs["real"][seeds[0]][split]:
            real = [runs["real"][seed][split][measure] for seed in seeds]
            added = [runs["real + generated"][seed][split][measure] for seed in seeds]
            if None in real + added:  # a class that does not occur
                continue
            result = study[split][measure] = paired(real, added)
            cells = []
            for name, sign in (("real", ""), ("real + generated", ""), ("difference", "+")):
                std = result[name]["std"]
                cells.append(f"{result[name]['mean']:{sign}.4f}" + (f" ± {std:.4f}" if std is not None else ""))
            cells.append("{:+.4f} to {:+.4f}".format(*result["interval"]) if result["interval"] else "-")
            print_line(measure, cells, 20)
        interval = study[split]["mean IoU"]["interval"]
        if interval is None:
            verdict = "one seed tells nothing about the noise: take --seeds 3 or more"
        elif interval[0] <= 0 <= interval[1]:
            verdict = "within the noise between seeds, no effect shown"
        else:
            effect = "helped" if interval[0] > 0 else "harmed"
            verdict = f"more than the noise between seeds: the generated images {effect}"
        study[split]["verdict"] = f"{split}: the difference of mean IoU: {verdict}"
        print(study[split]["verdict"] + "\n")
    print(f"± is the deviation over seeds {', '.join(seeds)}. It does not cover which images are judged and which\n"
          "were generated. One class in twenty leaves its interval by chance, so the verdicts are on mean IoU alone;\n"
          "where those of two splits differ, nothing is shown.")
    return study


def load_data(args):
    """What is trained on, {"real": Pairs, "real + generated": Pairs}; what is judged on, {split: Pairs}; their size."""
    files = find_images(args.extra) if args.extra else list_files(args.root / "train" / "images")
    first = next(iter(files.values()), None)
    detail = args.detail or (read_image(first).shape[:2] if first else (64, 64))
    pools = {"real": Pairs(args.root, "train", detail, memory_gb=float("inf"))}
    held_out = {}
    for split in ("val", "test"):
        if (args.root / split).is_dir():
            held_out[split] = Pairs(args.root, split, detail, memory_gb=float("inf"))
    if not held_out:
        raise ValueError(f"{args.root}: neither val/ nor test/ is there to judge on")
    if args.extra:
        own, train_masks = args.extra / "masks", args.root / "train" / "masks"
        masks_folder = args.extra_masks or (own if own.is_dir() else train_masks)
        used = match_masks(args.extra, masks_folder)
        if masks_folder.resolve() != train_masks.resolve():
            refuse_judged_masks(sorted(set(used.values())), held_out, pools["real"].colorbook)
        pools["real + generated"] = copy.copy(pools["real"])
        add_extra(pools["real + generated"], used)
    return pools, held_out, list(detail)


def run(args):
    """From folders to checkpoints and results.json. Raises ValueError or OSError for what the user can fix."""
    args.seeds = args.seeds or (3 if args.extra else 1)
    for name, least in {"steps": 1, "batch_size": 2, "scale": 1, "seeds": 1, "seed": 0}.items():
        if getattr(args, name) < least:  # batch norm after the pooling of the whole image needs two of them
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {least} or more")
    if args.seeds > 1 and not args.extra:
        raise ValueError(f"--seeds {args.seeds} is for the study: name generated images with --extra")
    device, out = pick_device(args.device), args.out
    args.precision = pick_precision(args.precision, device).replace("fp16", "fp32")  # there is no GradScaler here
    pools, held_out, detail = load_data(args)

    # what is finished already, if it was made in the same way
    size = [side * args.scale for side in detail]
    settings = {"arch": args.arch, "detail": detail, "size": size, "steps": args.steps, "batch_size": args.batch_size,
                "lr": args.lr, "precision": args.precision, "backbone": args.backbone and str(args.backbone),
                "seed": args.seed, "augment": AUGMENT, "pairs": {},
                "class_weights": class_weights(pools["real"]).tolist() if args.balance else None}
    for name, pairs in (pools | held_out).items():
        settings["pairs"][name] = [len(pairs), zlib.crc32(pairs.planes.numpy())]
    results = {"settings": settings, "runs": {name: {} for name in pools}}
    file = out / "results.json"
    if file.exists():
        results = json.loads(file.read_text(encoding="utf-8"))
        changed = [key for key in settings if results["settings"].get(key) != settings[key]]
        if changed:
            raise ValueError(f"{file}: made with another {', '.join(changed)}: choose another --out, or delete it")

    def write_results():
        with replacing(file) as opened:
            opened.write(json.dumps(results, indent=1).encode())

    if (out / "config.yaml").exists():
        raise ValueError(f"{out}: the folder of a generator's run: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    seeds = range(args.seed, args.seed + args.seeds)
    print(f"{args.arch} on {device.type} ({args.precision}): {args.steps} steps of {args.batch_size}, images of "
          f"{detail[0]}x{detail[1]} seen at {size[0]}x{size[1]}; seeds {seeds[0]} to {seeds[-1]}")

    for seed in seeds:
        for name, pairs in pools.items():
            path = out / (f"{name.replace(' ', '')}_seed{seed}.pt" if args.extra else "checkpoint.pt")
            if str(seed) in results["runs"][name] and (args.extra or path.exists()):
                print(f"{name}, seed {seed}: finished already, in {file}")
                continue
            started, unfinished = time.monotonic(), path.with_suffix(".unfinished.pt")
            net = train_segmenter(pairs, settings, seed, device, f"{name}, seed {seed}", unfinished)
            save(path, {"arch": args.arch, "model": net.state_dict(), "colorbook": pairs.colorbook.classes,
                        "size": size, "image_size": detail, "step": args.steps, "config": settings | {"seed": seed}})
            run_scores = {split: judge(path, judged, device) for split, judged in held_out.items()}
            results["runs"][name][str(seed)] = run_scores | {"minutes": (time.monotonic() - started) / 60}
            write_results()
            unfinished.unlink(missing_ok=True)

    print()
    if args.extra:
        results["study"] = report_study(results["runs"], list(held_out), [str(seed) for seed in seeds])
        write_results()
        print(file)
    else:
        report_judge({split: results["runs"]["real"][str(args.seed)][split] for split in held_out})
        print(f"next: python evaluate.py --segmenter {out / 'checkpoint.pt'} --real ... --fake ...")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--root", type=Path, default=Path("data/toy/prepared"), help="a prepared data set; default: %(default)s")
    add("--out", type=Path, default=Path("runs/segmenter"), help="checkpoint.pt, results.json; default: %(default)s")
    add("--extra", type=Path, help="the study: a folder of generated images to add to the real ones")
    add("--extra-masks", type=Path, help="the masks that they were made from; default: those of the train split")
    add("--seeds", type=int, help="of the study, from --seed on; default: 3")
    add("--seed", type=int, default=0, help="of weights, order and augmentation; default: %(default)s")
    add("--arch", default="deeplabv3_resnet50", help="or lraspp_mobilenet_v3_large; default: %(default)s")
    add("--backbone", type=Path, help="a file with torchvision's ImageNet weights of resnet50 or mobilenet_v3_large")
    add("--detail", type=parse_size, metavar="HxW", help="height x width that all images are brought to before "
        "anything else: the size of the generator's images; default: that of the --extra images, else as prepared")
    add("--scale", type=int, default=2, help="how many times larger the net sees them; default: %(default)s")
    add("--steps", type=int, default=4000, help="default: %(default)s")
    add("--batch-size", type=int, default=16, help="default: %(default)s")
    add("--lr", type=float, default=1e-3, help="the highest of the cycle; default: %(default)s")
    add("--balance", action="store_true", help="rare classes weigh more, as 1 / sqrt(share of the pixels): for the "
        "judge of experiments.enrich, which has to see them")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="default: %(default)s")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    command(run, parser.parse_args())


if __name__ == "__main__":
    main()
