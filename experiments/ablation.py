"""What is each part worth? Runs that differ from a preset in one thing, trained, sampled and judged alike.

    python -m experiments.ablation --preset idd_lite --set train.steps=2000 --judge runs/judge/checkpoint.pt
    python -m experiments.ablation --preset toy --minutes 5 --judge runs/toy_judge/checkpoint.pt --only base "batch 8"

Each variant is trained (for train.steps, or for --minutes where time is what is equal), makes an image of each test
mask by `sample.py`, and goes through `evaluate.py`. Prints a table and writes it as results.json, with a sheet of the
same masks and seeds in every variant. Ctrl-C loses nothing: the same command goes on, and --only adds variants later.

"base, seed 1" tells the noise: a difference that is no larger than between the two bases means nothing. On two CPU
cores with bf16, 2000 steps of 16 at 64x64 take 12 minutes, sampling and judging 160 masks 2.
"""

import argparse
import contextlib
import csv
import json
import os
import signal
import threading
from pathlib import Path
from unittest import mock

import torch

from checkpoint import load_checkpoint, replacing
from config import add_config_arguments, command, load_config
from dataset import contact_sheet, fit, list_files, read_image
from ddpm import Diffusion
from experiments.common import run_program
from masks import Colorbook, read_mask
from train import train

# --------------------------------------------------------------------------------- what no setting can change


def drop_per_batch(diffusion, shape, label_drop=0.1, device=None, draw=Diffusion.draw):
    """Diffusion.draw() with one coin for the whole batch, as in the thesis's code."""
    t, eps, keep = draw(diffusion, shape, label_drop, device)
    return t, eps, keep[:1].expand(shape[0])


def min_snr_loss(diffusion, model, x0, mask, t, eps, keep=None):
    """Min-SNR weighting with gamma 5 (Hang et al. 2023): every t counts as x_0's error times min(SNR, 5).

    The error of v is (SNR + 1) times that of x_0, the error of eps SNR times.
    """
    snr = (diffusion.signal[t] / diffusion.sigma[t]) ** 2
    weight = snr.clamp(max=5) / (snr + 1 if diffusion.prediction == "v" else snr)
    return (weight * diffusion.errors(model, x0, mask, t, eps, keep)[0]).mean()


def zeros_but_in_the_last_layer(weights):
    """torch.nn.init.zeros_() for all but the last layer, which alone has three rows."""
    return weights if len(weights) == 3 else torch.nn.init.constant_(weights, 0)


VARIANTS = {  # name: settings, or (what is replaced, by what)
    "base": [], "base, seed 1": ["seed=1"],
    "eps": ["diffusion.prediction=eps"],
    "linear": ["diffusion.schedule=linear"], "nichol": ["diffusion.schedule=nichol"],
    "min-SNR": ("ddpm.Diffusion.loss", min_snr_loss),
    "drop 0.2": ["train.label_drop=0.2"], "drop 0.05": ["train.label_drop=0.05"],
    "drop per batch": ("ddpm.Diffusion.draw", drop_per_batch),
    "no flip": ["data.flip=0"], "EMA 0.99": ["train.ema=0.99"], "EMA 0.999": ["train.ema=0.999"],
    "lr 1e-3": ["train.lr=0.001"], "lr 4e-3": ["train.lr=0.004"], "constant lr": ["train.hold=1000000000"],
    "lr of the thesis": ["train.lr=0.0003", "train.warmup=1", "train.hold=1000000000", "train.beta2=0.999"],
    "random last layer": ("torch.nn.init.zeros_", zeros_but_in_the_last_layer),
    "attention": ["model.attention=true"],
    "fp32": ["train.precision=fp32"], "fp32, seed 1": ["train.precision=fp32", "seed=1"],
    "width 16": ["model.hidden_dim=16"], "width 24": ["model.hidden_dim=24"], "width 48": ["model.hidden_dim=48"],
    "width 64": ["model.hidden_dim=64"], "batch 4": ["train.batch_size=4"], "batch 8": ["train.batch_size=8"],
    "batch 16": ["train.batch_size=16"], "batch 32": ["train.batch_size=32"],
    "size 48": ["data.size=[48,48]"], "size 64": ["data.size=[64,64]"],
}

# --------------------------------------------------------------------------------------------------- one variant


def train_variant(name, args, out):
    """Train one variant to the end of its budget, from its last checkpoint on; the checkpoint as a dict."""
    change, path = VARIANTS[name], out / "checkpoint.pt"
    settings, patch = (change, contextlib.nullcontext()) if isinstance(change, list) else ([], mock.patch(*change))
    endless = ["train.steps=1000000000"] if args.minutes else []
    cfg = load_config(args.config, args.preset, [*args.set, *endless, *settings, f"out={out}"])
    spent = load_checkpoint(path)["seconds"] if path.exists() else 0
    left = 60 * args.minutes - spent if args.minutes else threading.TIMEOUT_MAX
    if left > 0:
        timer = threading.Timer(left, os.kill, (os.getpid(), signal.SIGTERM))  # on which train() saves and stops
        timer.daemon = True
        timer.start()
        try:
            with patch:
                train(cfg, resume=out.exists())
        except SystemExit as stopped:
            if not args.minutes or stopped.code != 128 + signal.SIGTERM:
                raise
        finally:
            timer.cancel()
    return load_checkpoint(path)


def judge_variant(args, state, out):
    """Sample the held-out masks at each guidance and evaluate: {guidance: {number: value}}."""
    split, reports = Path(state["config"]["data"]["root"], args.split).absolute(), {}
    made = out / "images"
    guidances = ",".join(f"{w:g}" for w in args.guidance)
    run_program("sample.py", "--checkpoint", out / "checkpoint.pt", "--mask", split / "masks", "--n", args.n,
                "--guidance", guidances, "--out", made, "--resume")
    for w in args.guidance:
        report = out / f"report_w{w:g}"
        run_program("evaluate.py", "--real", split, "--fake", made, "--guidance", w, "--segmenter", args.judge,
                    "--train", split.with_name("train"), "--out", report)
        numbers = json.loads((report / "report.json").read_text())["numbers"]
        reports[f"{w:g}"] = {key: number["value"] for key, number in numbers.items()}
    return reports


# ---------------------------------------------------------------------------------------------------- all of them


def ablation(args):
    unknown = [name for name in args.only if name not in VARIANTS]
    if unknown:
        raise ValueError(f"no variant is called {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    args.judge, out = Path(args.judge).absolute(), args.out.absolute()
    if not args.judge.is_file():
        raise ValueError(f"{args.judge}: no such judge; python -m experiments.segmenter trains one")
    file = out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in args.only or ["base"]:
        if name not in results:
            run = out / name.replace(" ", "_").replace(",", "")
            state = train_variant(name, args, run)
            with open(run / "log.csv", newline="") as log:
                last = [row for row in csv.DictReader(log) if row["val_eps"]][-1]
            results[name] = {
                "folder": run.name, "steps": state["step"], "minutes": state["seconds"] / 60,
                "val_eps_raw": float(last["val_eps_raw"]), "val_eps": float(last["val_eps"]),
                "guidance": judge_variant(args, state, run)}
            with replacing(file) as opened:
                opened.write(json.dumps(results, indent=1).encode())
    print_table(results)
    root = load_config(args.config, args.preset, args.set)["data"]["root"]
    draw(results, Path(root, args.split), args.guidance[-1], out).save(out / "variants.png")
    print(f"{file}, {out / 'variants.png'}")


def print_table(results):
    """A row for each variant; the figures of evaluate.py for each guidance beside those of the training."""
    columns = {"share of mean IoU": "share of the ceiling: mean IoU", "Frechet": "Frechet distance, segmenter features",
               "within a mask": "distance within a mask"}
    guidances = list(next(iter(results.values()))["guidance"])
    heads = [f"{column}, w = {w}" for w in guidances for column in columns]
    print("| variant | steps | minutes | val_eps raw | val_eps EMA | " + " | ".join(heads) + " |")
    print("| --- " * (5 + len(heads)) + "|")
    for name, r in results.items():
        cells = [f"{r['steps']}", f"{r['minutes']:.1f}", f"{r['val_eps_raw']:.4f}", f"{r['val_eps']:.4f}"]
        for w in guidances:
            values = [r["guidance"][w].get(key) for key in columns.values()]
            cells += ["" if value is None else f"{value:.3f}" for value in values]
        print(f"| {name} | " + " | ".join(cells) + " |")


def draw(results, split, w, out):
    """Eight masks, and below them the image of each, from the same seed in every variant, at guidance w."""
    colorbook, masks = Colorbook.load(split.with_name("colorbook.json")), list_files(split / "masks")
    size = None
    chosen = [list(masks)[int(i)] for i in torch.linspace(0, len(masks) - 1, min(8, len(masks)))]
    rows = []
    for r in results.values():
        images = []
        for mask in chosen:
            images.append(read_image(min((out / r["folder"] / "images").glob(f"{mask}_w{w:g}_seed*.png"))))
        size = size or images[0].shape[:2]
        rows.append([fit(image, size) for image in images])
    painted = [colorbook.paint(fit(read_mask(masks[mask], colorbook)[0], size)) for mask in chosen]
    return contact_sheet([painted, *rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--judge", required=True, help="a checkpoint of experiments.segmenter")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="variants; default: base. There are: "
                        + ", ".join(VARIANTS))
    parser.add_argument("--minutes", type=float, default=0, help="of training, for each variant; default: train.steps")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0], help="default: 1 2")
    parser.add_argument("--split", default="test", help="whose masks are drawn; default: %(default)s")
    parser.add_argument("--n", type=int, default=1, help="images of each mask; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="default: %(default)s")
    command(ablation, parser.parse_args())


if __name__ == "__main__":
    main()
