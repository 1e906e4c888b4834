"""A segmenter trained on a prepared data set: the judge of evaluate.py, and the augmentation study of the paper.

    python -m experiments.segmenter --root data/idd_lite/prepared --out runs/segmenter
    python -m experiments.segmenter --root data/idd_lite/prepared --arch lraspp_mobilenet_v3_large --lr 3e-3    for CPUs
    python sample.py --mask data/idd_lite/prepared/train/masks --n 1 --out generated
    python -m experiments.segmenter --root data/idd_lite/prepared --extra generated --seeds 3 --out runs/study

The first trains a judge on the train split, says how good it is on val and test, which is the ceiling of what it can find
in generated pictures, and writes checkpoint.pt for `evaluate.py --segmenter`. The data must have the size of the
generator's pictures, or be brought to it by --detail: a judge of finer pictures would take the generator's for blurred ones.

With --extra it is the study (Bozsó et al., IV-B): nets trained on the real pairs, and on these with generated pictures added, for
as many steps, from the same seeds. A generated picture belongs to the mask whose stem its own name begins with,
<stem>_w3_seed1.png to <stem>.png, as sample.py writes them; the masks are those of the train split, or --extra-masks, or
lie in the folder itself, as images/ and masks/. What is finished is kept in results.json, also after Ctrl-C: the same command
goes on, and a larger --seeds adds to it.
"""

import argparse
import copy
import json
import math
import os
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import t as student_t  # scikit-image needs scipy too
from tqdm import tqdm

from checkpoint import pick_device, save_checkpoint
from data.common import parse_size
from dataset import Pairs, batches, fit, fit_pair, list_files, read_image
from evaluate import build_segmenter, confusion_matrix, find_images, load_segmenter, mask_of, normalise, scores
from masks import UNLABELLED, open_image, read_mask

AUGMENT = {"p": 0.5, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.02, "vertical_flip": False, "rotate": 0.0,
           "crop": 0.5}  # strong, since data are few and no weights are pretrained


def add_extra(pairs, folder, masks_folder):
    """Append the generated pictures of a folder, and the masks that they were made from, to pairs held in memory.

    Pictures without a mask are listed and left out. ValueError where none has one, or a picture is a mask.
    """
    pictures, masks = find_images(folder), list_files(masks_folder)
    used = {path: masks[of] for stem, path in pictures.items() if (of := mask_of(stem, {}, masks)[0])}
    orphans = [stem for stem, path in pictures.items() if path not in used]
    if not used:
        raise ValueError(f"{folder}: none of its {len(pictures)} pictures has a name that begins with one of {masks_folder}; expected "
                         f"names such as {next(iter(masks), '<mask>')}_w3_seed1.png. Are they of other masks? Name these with --extra-masks")
    if orphans:
        print(f"{folder}: {len(orphans)} picture(s) without a mask left out: {', '.join(orphans[:10])}" + " ..." * (len(orphans) > 10))
    added = []
    for path, mask in tqdm(used.items(), desc="reading extra", unit="pair", leave=False):
        picture = open_image(path)
        if picture.mode == "P":
            raise ValueError(f"{path}: a palette picture, which is what masks are; expected generated pictures in {folder}")
        image = np.array(picture.convert("RGB"))
        ids = fit(read_mask(mask, pairs.colorbook)[0], image.shape[:2])  # as sample.py fitted it
        image, ids = fit_pair(image, ids, pairs.planes.shape[2:], None, f"{path} and {mask}")
        added.append(torch.from_numpy(np.concatenate([image.transpose(2, 0, 1), ids[None]])))
    print(f"{folder}: {len(used)} generated pictures of {len(set(used.values()))} masks added to {len(pairs)} real pairs")
    pairs.files = pairs.files + [(path.stem, path, mask) for path, mask in used.items()]
    pairs.planes = torch.cat([pairs.planes, torch.stack(added)])


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


def train_segmenter(pairs, settings, seed, device, title):
    """A net trained from `seed` for settings["steps"] steps: AdamW, one cycle of the learning rate, cross-entropy."""
    torch.manual_seed(seed)
    net = build_segmenter(settings["arch"], len(pairs.colorbook))
    if settings["backbone"]:
        load_backbone(net, settings["backbone"])
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # MobileNet's 0.01 would average over more steps than a short training has
    net.to(device, memory_format=torch.channels_last).train()
    steps, half = settings["steps"], settings["precision"] == "bf16"
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings["lr"], weight_decay=0.01)
    cycle = max(steps + 1, 11)  # a tenth of it is warm-up, which has to be longer than a step
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings["lr"], total_steps=cycle, pct_start=0.1)
    loader = batches(pairs, settings["batch_size"], seed, flip=0.5, augment=AUGMENT, device=device)
    bar = tqdm(range(1, steps + 1), unit="img", unit_scale=settings["batch_size"], desc=title, dynamic_ncols=True)
    for step in bar:
        images, ids = next(loader).split([3, 1], dim=1)
        x = normalise(F.interpolate(images.float(), size=settings["size"], mode="bilinear", antialias=True))
        with torch.autocast(device.type, torch.bfloat16, half):
            logits = net(x.contiguous(memory_format=torch.channels_last))["out"]
        logits = F.interpolate(logits.float(), size=ids.shape[2:], mode="bilinear")
        labelled = (ids != UNLABELLED).sum().clamp(min=1)
        loss = F.cross_entropy(logits, ids[:, 0].long(), ignore_index=UNLABELLED, reduction="sum") / labelled
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if not loss.isfinite():
                raise ValueError(f"{title}, step {step}: the loss is not finite; try a smaller --lr, or --precision fp32")
    return net


def judge(path, pairs, device, batch_size=64):
    """Pixel accuracy, mean IoU and IoU per class (None where it does not occur) of a checkpoint, as evaluate.py sees it."""
    segment, _ = load_segmenter(path, pairs.colorbook, device)
    K = len(pairs.colorbook)
    confusion = sum(confusion_matrix(planes[:, 3], segment(planes[:, :3]), K) for planes in pairs.planes.split(batch_size))
    accuracy, mean_iou, iou = scores(confusion)
    by_class = {name: None if math.isnan(value) else value for name, value in zip(pairs.colorbook.names, iou.tolist())}
    return {"pixel accuracy": accuracy, "mean IoU": mean_iou} | by_class


def paired(real, added):
    """Of scores of equal seeds: mean and sample deviation of both and of added - real, and the latter's 95 % interval.

    The interval is Student's t of the n differences, mean ± t(n - 1) std / sqrt(n). With one seed, deviations and interval are None.
    """
    n, groups = len(real), {"real": real, "real + generated": added, "difference": np.subtract(added, real)}
    result = {name: {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if n > 1 else None}
              for name, values in groups.items()}
    mean, std = result["difference"].values()
    reach = student_t.ppf(0.975, n - 1) * std / n**0.5 if n > 1 else None
    return result | {"interval": [mean - reach, mean + reach] if n > 1 else None}


def report(runs, splits, seeds):
    """Print the table of a judge, or those of a study with a verdict for each split, which are returned for the JSON."""

    def line(name, cells, width):
        print(f"{name:20}" + "".join(f"{cell:>{width}}" for cell in cells))

    rows, study = list(runs["real"][seeds[0]][splits[0]]), {}
    if len(runs) == 1:
        line("", splits, 10)
        for row in rows:
            values = [runs["real"][seeds[0]][split][row] for split in splits]
            line(row, ["-" if value is None else f"{value:.4f}" for value in values], 10)
        return study
    for split in splits:
        compared = {row: [[run[seed][split][row] for seed in seeds] for run in runs.values()] for row in rows}
        study[split] = {row: paired(*values) for row, values in compared.items() if None not in values[0]}
        line(split, ["real", "real + generated", "difference", "95 % interval"], 20)
        for row, c in study[split].items():
            parts = [(c[key], sign) for key, sign in (("real", ""), ("real + generated", ""), ("difference", "+"))]
            cells = [f"{part['mean']:{sign}.4f}" + (f" ± {part['std']:.4f}" if c["interval"] else "") for part, sign in parts]
            line(row, [*cells, "{:+.4f} to {:+.4f}".format(*c["interval"]) if c["interval"] else "-"], 20)
        if c["interval"] is None:
            verdict = "one seed tells nothing about the noise: take --seeds 3 or more"
        else:
            low, high = study[split]["mean IoU"]["interval"]
            verdict = ("within the noise between seeds, no effect shown" if low <= 0 <= high else
                       "more than the noise between seeds: the generated pictures " + ("helped" if low > 0 else "harmed"))
        study[split]["verdict"] = f"{split}: the difference of mean IoU is {verdict}"
        print(study[split]["verdict"] + "\n")
    print(f"± is the deviation over seeds {', '.join(seeds)}. Not in it: which pictures are judged, and which were generated. One class in twenty\n"
          "leaves its interval by chance, so the verdicts are on mean IoU alone; where those of two splits differ, nothing is shown.")
    return study


def run(args):
    args.seeds = args.seeds or (3 if args.extra else 1)
    for name, least in {"steps": 1, "batch_size": 2, "scale": 1, "seeds": 1, "seed": 0}.items():
        if getattr(args, name) < least:  # batch norm after the pooling of the whole picture needs two of them
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {least} or more")
    if args.seeds > 1 and not args.extra:
        raise ValueError(f"--seeds {args.seeds} is for the study: name generated pictures with --extra")
    device, out = pick_device(args.device), args.out

    # data: what is trained on, and what it is judged on
    files = list_files(args.root / "train" / "images")
    detail = list(args.detail or (read_image(next(iter(files.values()))).shape[:2] if files else (64, 64)))
    pools = {"real": Pairs(args.root, "train", detail, memory_gb=float("inf"))}
    held_out = {split: Pairs(args.root, split, detail, memory_gb=float("inf")) for split in ("val", "test")
                if (args.root / split).is_dir()}
    if not held_out:
        raise ValueError(f"{args.root}: neither val/ nor test/ is there to judge on")
    if args.extra:
        masks = args.extra_masks or (args.extra if (args.extra / "masks").is_dir() else args.root / "train") / "masks"
        if masks.resolve() in [(args.root / split / "masks").resolve() for split in held_out]:
            raise ValueError(f"--extra-masks {masks}: pictures of these masks would be trained on and judged by; expected others")
        pools["real + generated"] = copy.copy(pools["real"])
        add_extra(pools["real + generated"], args.extra, masks)

    # what is finished already, if it was made in the same way
    settings = {"arch": args.arch, "detail": detail, "size": [side * args.scale for side in detail], "steps": args.steps,
                "batch_size": args.batch_size, "lr": args.lr, "precision": args.precision,
                "backbone": args.backbone and str(args.backbone), "seed": args.seed, "augment": AUGMENT,
                "pairs": {name: [len(pairs), zlib.crc32(pairs.planes.numpy())]
                          for name, pairs in (pools | held_out).items()}}
    results = {"settings": settings, "runs": {name: {} for name in pools}}
    file = out / "results.json"
    if file.exists():
        results = json.loads(file.read_text(encoding="utf-8"))
        changed = [key for key in settings if results["settings"].get(key) != settings[key]]
        if changed:
            raise ValueError(f"{file}: made with another {', '.join(changed)}: choose another --out, or delete it to begin anew")

    def write(results):
        side = file.with_name(file.name + ".partial")
        side.write_text(json.dumps(results, indent=1), encoding="utf-8")
        os.replace(side, file)

    out.mkdir(parents=True, exist_ok=True)
    print(f"{args.arch} on {device.type} ({args.precision}): {args.steps} steps of {args.batch_size}, pictures of {detail[0]}x{detail[1]} "
          f"seen at {settings['size'][0]}x{settings['size'][1]}; seeds {args.seed} to {args.seed + args.seeds - 1}")

    for seed in range(args.seed, args.seed + args.seeds):
        for name, pairs in pools.items():
            path = out / (f"{name.replace(' ', '')}_seed{seed}.pt" if args.extra else "checkpoint.pt")
            if str(seed) in results["runs"][name] and (args.extra or path.exists()):
                print(f"{name}, seed {seed}: finished already, in {file}")
                continue
            started = time.monotonic()
            net = train_segmenter(pairs, settings, seed, device, f"{name}, seed {seed}")
            save_checkpoint(path, {"arch": args.arch, "model": net.state_dict(), "colorbook": pairs.colorbook.classes,
                                   "size": settings["size"], "step": args.steps, "config": settings | {"seed": seed}})
            results["runs"][name][str(seed)] = {split: judge(path, part, device) for split, part in held_out.items()} | {
                "minutes": (time.monotonic() - started) / 60}
            write(results)

    print()
    seeds = [str(seed) for seed in range(args.seed, args.seed + args.seeds)]
    results["study"] = report(results["runs"], list(held_out), seeds)
    write(results)
    print(f"{file}" if args.extra else f"next: python evaluate.py --segmenter {out / 'checkpoint.pt'} --real ... --fake ...")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data/toy/prepared"), help="a prepared data set; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/segmenter"), help="checkpoint.pt and results.json; default: %(default)s")
    parser.add_argument("--extra", type=Path, help="the study: a folder of generated pictures to add to the real ones")
    parser.add_argument("--extra-masks", type=Path, help="the masks that they were made from; default: those of the train split")
    parser.add_argument("--seeds", type=int, help="of the study, from --seed on; default: 3")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation; default: %(default)s")
    parser.add_argument("--arch", default="deeplabv3_resnet50", help="or lraspp_mobilenet_v3_large; default: %(default)s")
    parser.add_argument("--backbone", type=Path, help="a file with torchvision's ImageNet weights of resnet50 or mobilenet_v3_large")
    parser.add_argument("--detail", type=parse_size, metavar="HxW", help="of the generator's pictures; default: as prepared")
    parser.add_argument("--scale", type=int, default=2, help="how many times larger the net sees them; default: %(default)s")
    parser.add_argument("--steps", type=int, default=4000, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="the highest of the cycle; default: %(default)s")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default: %(default)s")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto")
    args = parser.parse_args()
    try:
        run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; what is finished is in {args.out}, and the same command goes on")


if __name__ == "__main__":
    main()
