"""The other way to the same goal: an unconditional score model, steered by a segmenter that can see through noise.

    python -m experiments.score_sde smax --preset idd_lite                the largest distance of two training images
    python -m experiments.score_sde train --preset idd_lite               the score network: 40 minutes
    python -m experiments.score_sde train-segmenter --preset idd_lite     the segmenter of noisy images: 15 minutes
    python -m experiments.score_sde sample --run runs/score_idd_lite --mask masks/ --s0 1,2     7 seconds an image
    python -m experiments.score_sde evaluate --run runs/score_idd_lite --root data/idd_lite/prepared \\
        --judge runs/judge/checkpoint.pt --ddpm runs/idd_lite/checkpoint.pt                     75 minutes
    python -m experiments.score_sde precision --preset idd_lite --set train.steps=200           6 minutes

Minutes are those of two CPU cores with bf16, for IDD-Lite at 64x64. Without --preset all of it is the toy's. A run is
a folder, runs/score_<name of the data>, with score.pt, segmenter.pt, logs, previews, levels.json (what the segmenter
sees at 41 noise levels) and evaluation/ (a table over s0, DDPM beside it). Ctrl-C loses nothing: the same command goes
on. Training takes the settings of config.yaml, by --preset and --set as train.py does; equal time by --minutes.

Follows "score-based semantic synthesis" (seed 001), whose sections and equations the numbers here are: images x in
[0, 1] are drowned in noise, x(t) = x(0) + sigma(t) z, the VE-SDE. A network learns the score, the gradient of
log p_t(x); a segmenter trained on noisy images adds that of log p(y | x), for a mask y, while an image is sampled.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from benchmarks.timing import machine, peak_memory, table
from checkpoint import load_checkpoint, pick_device, pick_precision, replacing
from config import add_config_arguments, command, load_config
from dataset import Pairs, contact_sheet, read_image, to_uint8
from ddpm import noise_like_seeds
from evaluate import confusion_matrix, scores
from experiments.common import choose_masks, draw_curves, parse_count, parse_numbers, read_report, run_program
from experiments.training import autocast, fit, make_loader, read, spread
from experiments.ve_sde import (T_HIGHEST, NoisySegmenter, draw_samples, guided_score, largest_distance, log_likelihood,
                                network_score, scale_factor, score_errors, see_through_noise, sigma_at, time_at)
from masks import UNLABELLED, Colorbook
from sample import draw_sheet, file_of, load_network, plan, read_masks, sample_jobs, save, settings_of
from train import read_data
from unet import UNet

NUMBERS = {"share of mean IoU": "share of the ceiling: mean IoU",  # columns of the table, and evaluate.py's names
           "share of accuracy": "share of the ceiling: pixel accuracy",
           "SSIM": "SSIM", "Frechet distance": "Frechet distance, segmenter features",
           "its floor": "Frechet distance, segmenter features, floor"}
S0 = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]  # the seed, at 512x256, had seven from 0.0005 to 0.0035

# ------------------------------------------------------------------------------------------------------ training


def to_images(planes):
    """Planes (B, C + 1, H, W) uint8, of which the last one is the mask, to images x(0) (B, C, H, W) in [0, 1]."""
    return planes[:, :-1].float() / 255


def train_score(cfg, pairs, held_out, file, smax, device, minutes=math.inf):
    """Train a score network on pairs; returns it with its averaged weights."""
    m, c, prediction = cfg["model"], cfg["train"], cfg["diffusion"]["prediction"]
    torch.manual_seed(cfg["seed"])
    model = UNet(0, m["hidden_dim"], m["emb_dim"], m["attention"]).to(device, memory_format=torch.channels_last)
    nn.init.zeros_(model.out.weight)  # as in train.py: begin with the prediction 0
    nn.init.zeros_(model.out.bias)
    n = min(c["val_pairs"], len(held_out))
    x0 = to_images(held_out.planes[torch.linspace(0, len(held_out) - 1, n).long()]).to(device)
    fixed = [x0, spread(n).to(device), noise_like_seeds(range(n), x0.shape[1:], device)()]

    def loss(net, planes):
        images = to_images(planes)
        t, z = torch.rand(len(images), device=device), torch.randn_like(images)
        return score_errors(net, images, t, z, smax, prediction)[0].mean()

    @torch.no_grad()
    def validate(net):
        parts = zip(*(x.split(c["batch_size"]) for x in fixed))
        errors = torch.cat([score_errors(net, *part, smax, prediction) for part in parts], dim=1)
        return dict(zip(("val_loss", "val_eps"), errors.mean(dim=1).tolist()))

    def preview(net):
        noise = noise_like_seeds(range(c["previews"]), x0.shape[1:], device)
        x = draw_samples(network_score(net, smax, prediction), noise, smax, "heun", 20)
        return contact_sheet([list(to_uint8(2 * x.expand(-1, 3, -1, -1) - 1))])

    about = {"kind": "score", "size": list(x0.shape[2:]), "smax": smax, "prediction": prediction,
             "network": [0, m["hidden_dim"], m["emb_dim"], m["attention"]], "classes": pairs.colorbook.classes}
    return fit(model, loss, make_loader(cfg, pairs, device), c, file, device, about, validate, preview, minutes)


def train_classifier(net, target_of, cfg, pairs, held_out, file, about, device, minutes=math.inf):
    """Train `net` to name target_of(planes), ids (B, H, W) or labels (B,), in images at t drawn from [0, highest].

    about: smax, encoding, highest, and what the network is built from.
    """
    c, smax, encoding, highest = cfg["train"], about["smax"], about["encoding"], about["highest"]
    net.to(device, memory_format=torch.channels_last)

    def negative_log_likelihood(net, planes, t, z):
        x = to_images(planes) + sigma_at(t, smax).view(-1, 1, 1, 1) * z
        target = target_of(planes).long()
        labelled = (target != UNLABELLED).sum().clamp(min=1)
        return -log_likelihood(see_through_noise(net, x, t, smax, encoding), target) / labelled

    def loss(net, planes):
        t = highest * torch.rand(len(planes), device=device)
        return negative_log_likelihood(net, planes, t, torch.randn_like(planes[:, :-1], dtype=torch.float32))

    @torch.no_grad()
    def validate(net):
        n = min(c["val_pairs"], len(held_out))
        planes = held_out.planes[torch.linspace(0, len(held_out) - 1, n).long()].to(device)
        z = noise_like_seeds(range(n), planes[0, :-1].shape, device)()
        parts = zip(*(x.split(c["batch_size"]) for x in (planes, spread(n, highest).to(device), z)))
        return {"val_loss": np.mean([negative_log_likelihood(net, *part).item() for part in parts]).item()}

    return fit(net, loss, make_loader(cfg, pairs, device), c, file, device, about, validate, minutes=minutes)


@torch.no_grad()
def accuracy_by_level(net, pairs, about, device, levels=41):
    """[{"t", "pixel accuracy", "mean IoU"}] of a segmenter on pairs, for t evenly from 0 to highest (5.4.3)."""
    rows = []
    for t in tqdm(torch.linspace(0, about["highest"], levels).tolist(), "noise levels", leave=False):
        confusion = 0
        for i, planes in enumerate(pairs.planes.split(32)):
            images = to_images(planes)
            noise = noise_like_seeds(range(32 * i, 32 * i + len(planes)), images.shape[1:])()
            x = (images + sigma_at(t, about["smax"]) * noise).to(device)
            t_each = torch.full((len(x),), t, device=device)
            seen = see_through_noise(net, x, t_each, about["smax"], about["encoding"]).argmax(dim=1).cpu()
            confusion = confusion + confusion_matrix(planes[:, -1], seen, len(pairs.colorbook))
        accuracy, mean_iou, _ = scores(confusion)
        rows.append({"t": t, "pixel accuracy": accuracy, "mean IoU": mean_iou})
    return rows


# ------------------------------------------------------------------------------------------------------ sampling


def load_networks(run, device):
    """Of a run's folder: score_fn, logits_fn, and the checkpoints of the score network and the segmenter."""
    states = read(run / "score.pt", "score"), read(run / "segmenter.pt", "segmenter")
    about, seen = (state["about"] for state in states)
    differing = [key for key in ("smax", "size", "classes") if about[key] != seen[key]]
    if differing:
        raise ValueError(f"{run}: score.pt and segmenter.pt were trained with another {', '.join(differing)}: train "
                         "one of them anew")
    nets = UNet(*about["network"]), NoisySegmenter(*seen["network"])
    for net, state in zip(nets, states):
        net.load_state_dict(state["ema"])
        net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def logits_fn(x, sigma):
        t = torch.full((len(x),), time_at(sigma, about["smax"]), device=device)
        return see_through_noise(nets[1], x, t, about["smax"], seen["encoding"])

    return network_score(nets[0], about["smax"], about["prediction"]), logits_fn, states


def sample_masks(args, run, masks, s0s, out, device):
    """Write the images of masks {stem: ids} at each s0, where they are not there with the same settings.

    Returns the jobs of all of them, as sample.plan() has them, with s0 as the guidance; and {s0: {"seconds", "calls"}},
    for an image, of those that were made.
    """
    score_fn, logits_fn, (score, segmenter) = load_networks(run, device)
    smax, size = score["about"]["smax"], score["about"]["size"]
    settings = vars(args) | {"guidances": s0s, "guidance_interval": [0, T_HIGHEST], "eta": 0.0}
    jobs = plan(score | {"path": run / "score.pt"}, settings, masks, None)
    for job in jobs:
        job |= {"snr": args.snr, "segmenter_steps": segmenter["step"]}
    out.mkdir(parents=True, exist_ok=True)
    calls, costs = [], {}

    def counted(network):
        def call(x, sigma):
            calls.append(len(x))
            return network(x, sigma)
        return call

    for s0 in s0s:
        todo = [job for job in jobs if job["guidance"] == s0 and settings_of(file_of(job, out)) != json.dumps(job)]
        started = time.monotonic()
        bar = tqdm(total=len(todo) * args.steps, desc=f"{len(todo)} images, s0 = {s0:g}", unit="step")
        for first in range(0, len(todo), args.batch_size):
            batch = todo[first: first + args.batch_size]
            ids = torch.stack([torch.from_numpy(masks[job["mask"]]) for job in batch]).long().to(device)
            noise = noise_like_seeds([job["seed"] for job in batch], (3, *size), device)
            steered = guided_score(counted(score_fn), counted(logits_fn), ids,
                                   lambda sigma, s0=s0: scale_factor(time_at(sigma, smax), s0))
            with autocast(args.precision, device):
                x = draw_samples(steered, noise, smax, args.sampler, args.steps, args.snr,
                                 observe=lambda sigma, x, bar=bar: bar.update(len(x)))
            for job, image in zip(batch, to_uint8(2 * x - 1)):
                save(job, image, out)
        bar.close()
        if todo:
            costs[s0] = {"seconds": (time.monotonic() - started) / len(todo), "calls": sum(calls) / len(todo)}
            calls.clear()
    return jobs, costs


def sample_ddpm(args, state, masks, out, device):
    """Images of masks by the checkpoint of a train.py run, with its own settings; {"seconds", "calls"} of an image."""
    s, size = state["config"]["sample"], tuple(state["config"]["data"]["size"])
    s = s | {"n": 1, "seed": args.seed, "mask": args.mask, "size": size, "guidances": [s["guidance"]], "device": device}
    _, model, diffusion, ddpm_autocast = load_network(state, s)
    passes, started = [], time.monotonic()
    model.image_stem.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    out.mkdir(parents=True, exist_ok=True)
    jobs = plan(state, s, masks, None)
    for batch, images in sample_jobs(jobs, masks, model, diffusion, s, ddpm_autocast):
        for job, image in zip(batch, images):
            save(job, image, out)
    return {"seconds": (time.monotonic() - started) / len(jobs), "calls": sum(passes) / len(jobs)}


# ---------------------------------------------------------------------------------------------------- the commands


def read_settings(args):
    """The config, the device, the folder of the run, and the Pairs of train and val."""
    cfg = load_config(args.config, args.preset, args.set)
    run = Path(args.run or f"runs/score_{Path(cfg['out']).name}")
    return cfg, pick_device(cfg["device"]), run, *read_data(cfg, 0, 1, dry_run=False)


def smax_command(args):
    _, _, _, pairs, _ = read_settings(args)
    print(f"smax {largest_distance(pairs.planes[:, :3], args.pairs)}: the largest distance, of "
          f"{args.pairs or 'all'} pairs of the {len(pairs)} training images of {pairs.size[0]}x{pairs.size[1]}")


def train_command(args):
    cfg, device, run, pairs, held_out = read_settings(args)
    smax = largest_distance(pairs.planes[:, :3])
    print(f"score network, smax {smax}, {cfg['diffusion']['prediction']} prediction, {device.type}: {run / 'score.pt'}")
    train_score(cfg, pairs, held_out, run / "score.pt", smax, device, args.minutes)


def train_segmenter_command(args):
    """Train, then look at 41 noise levels of every held-out split; levels.json and the figures have all encodings."""
    cfg, device, run, pairs, held_out = read_settings(args)
    name = "segmenter" if args.encoding == "log sigma" else "segmenter_t"
    about = {"kind": name, "size": list(pairs.size), "smax": largest_distance(pairs.planes[:, :3]),
             "encoding": args.encoding, "highest": T_HIGHEST, "classes": pairs.colorbook.classes,
             "network": [len(pairs.colorbook), cfg["model"]["hidden_dim"]]}
    torch.manual_seed(cfg["seed"])
    net = train_classifier(NoisySegmenter(*about["network"]), lambda planes: planes[:, -1], cfg, pairs, held_out,
                           run / f"{name}.pt", about, device, args.minutes)
    root, val, file = Path(cfg["data"]["root"]), cfg["data"]["val"], run / "levels.json"
    levels = json.loads(file.read_text()) if file.exists() else {}
    levels[f"{val}, {args.encoding}"] = accuracy_by_level(net, held_out, about, device)
    if val != "test" and (root / "test").is_dir():
        levels[f"test, {args.encoding}"] = accuracy_by_level(net, Pairs(root, "test", pairs.size), about, device)
    with replacing(file) as opened:
        opened.write(json.dumps(levels, indent=1).encode())
    for measure in ("pixel accuracy", "mean IoU"):
        curves = {name: {row["t"]: [row[measure]] for row in rows} for name, rows in levels.items()}
        draw_curves(curves, f"{measure} over t").save(run / f"levels_{measure.replace(' ', '_')}.png")
    shown = [{"split, encoding": name} | {f"mean IoU at t = {row['t']:.1f}": row["mean IoU"] for row in rows[::10]}
             for name, rows in levels.items()]
    print(f"{table(shown)}\n{file}")


def sample_command(args):
    device, run, out = pick_device(args.device), Path(args.run), Path(args.out)
    args.precision = pick_precision("auto", device)
    about = read(run / "score.pt", "score")["about"]
    colorbook = Colorbook(about["classes"], run / "score.pt")
    masks = read_masks(args.mask, colorbook, tuple(about["size"]))
    jobs, costs = sample_masks(args, run, masks, args.s0, out, device)
    draw_sheet(jobs, masks, colorbook, out).save(out / "sheet.png")
    for s0, cost in costs.items():
        print(f"s0 = {s0:g}: {cost['seconds']:.1f} seconds and {cost['calls']:.0f} network calls an image")
    print(f"{len(jobs)} images: {out / 'sheet.png'}")


def judge(args, images, guidance, split, report):
    """What evaluate.py says of the images of one guidance, or s0: {column: "value [its 95 % interval]"}."""
    run_program("evaluate.py", "--real", split, "--fake", images, "--guidance", guidance, "--segmenter", args.judge,
                "--train", split.with_name("train"), "--out", report)
    return read_report(report, NUMBERS)


def evaluate_command(args):
    """The table over s0 and for DDPM, and a sheet: eight masks, and below them the image of each method."""
    device, run, split = pick_device(args.device), Path(args.run), Path(args.root, "test").absolute()
    out, args.judge, args.n = run / "evaluation", Path(args.judge).absolute(), 1
    args.precision, args.mask = pick_precision("auto", device), str(out / "masks")
    states = read(run / "score.pt", "score"), read(run / "segmenter.pt", "segmenter")
    about = states[0]["about"]
    ddpm = load_checkpoint(args.ddpm) if args.ddpm else None
    if ddpm and [ddpm["colorbook"], ddpm["config"]["data"]["size"]] != [about["classes"], about["size"]]:
        raise ValueError(f"{ddpm['path']}: other classes or another size than in {run / 'score.pt'}: its size is "
                         f"{ddpm['config']['data']['size']}, expected {about['size']}")
    colorbook = Colorbook(about["classes"], run / "score.pt")
    masks = choose_masks(split, out / "masks", colorbook, tuple(about["size"]), args.masks)
    file = out / "results.json"
    settings = {key: getattr(args, key) for key in ("sampler", "steps", "snr", "seed")} | {"judge": str(args.judge)}
    results = json.loads(file.read_text()) if file.exists() else {"settings": settings, "rows": {}}
    if results["settings"] != settings:
        raise ValueError(f"{file}: made with {results['settings']}, not {settings}: rename {out}, or delete it")

    methods = {f"s0 = {s0:g}": s0 for s0 in args.s0} | ({"DDPM": None} if args.ddpm else {})
    for name, s0 in methods.items():
        if name in results["rows"]:
            continue
        if s0 is None:
            cost = sample_ddpm(args, ddpm, masks, out / "DDPM", device)
            images, guidance, seconds = out / "DDPM", ddpm["config"]["sample"]["guidance"], ddpm["seconds"]
        else:
            images, guidance, seconds = out / "images", s0, sum(state["seconds"] for state in states)
            cost = sample_masks(args, run, masks, [s0], images, device)[1].get(s0, {"seconds": None, "calls": None})
        scores_of = judge(args, images, guidance, split, out / f"report_{name.replace(' ', '')}")
        results["rows"][name] = {"method": name} | scores_of | {
            "s an image": cost["seconds"], "calls an image": cost["calls"], "minutes of training": seconds / 60}
        with replacing(file) as opened:
            opened.write(json.dumps(results, indent=1).encode())

    print(f"{len(masks)} masks of {split}, {args.sampler} of {args.steps} steps, {machine(device)}\n")
    print(table(list(results["rows"].values())))
    shown = list(masks)[:: max(1, len(masks) // 8)][:8]
    rows = [[colorbook.paint(masks[stem]) for stem in shown]]
    for name in results["rows"]:
        folder, pattern = (out / "DDPM", "*") if name == "DDPM" else (out / "images", name.removeprefix("s0 = "))
        rows.append([read_image(min(folder.glob(f"{stem}_w{pattern}_seed*.png"))) for stem in shown])
    contact_sheet(rows).save(out / "methods.png")
    print(f"\n{file}, {out / 'methods.png'}: masks, then {', '.join(results['rows'])}")


def precision_command(args):
    """Train the score network for as many steps in fp32 and in half precision: memory, time, loss (5.3.1)."""
    cfg, device, run, pairs, held_out = read_settings(args)
    smax, rows = largest_distance(pairs.planes[:, :3]), []
    one_step = cfg | {"train": cfg["train"] | {"steps": 1, "val_pairs": 1, "previews": 1}}
    for precision in dict.fromkeys(["fp32", pick_precision("auto", device), *["fp16"] * (device.type == "cuda")]):
        cfg["train"]["precision"] = one_step["train"]["precision"] = precision
        with tempfile.TemporaryDirectory() as folder:
            peak = peak_memory(lambda file=Path(folder, "score.pt"): train_score(one_step, pairs, held_out, file, smax,
                                                                                 device), [], device)
        file = run / "precision" / precision / "score.pt"
        train_score(cfg, pairs, held_out, file, smax, device)
        state = read(file, "score")
        losses = {key: state["log"][-1][key] for key in ("loss", "val_loss", "val_eps")}
        rows.append({"precision": precision, "steps": state["step"], "s a step": state["seconds"] / state["step"],
                     "peak GiB": peak / 2**30} | losses)
    print(f"{machine(device)}, batch {cfg['train']['batch_size']}, {pairs.size[0]}x{pairs.size[1]}\n\n{table(rows)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, added = parser.add_subparsers(required=True, metavar="COMMAND"), {}
    for name, function, text in (
            ("smax", smax_command, "the largest distance of two training images: seconds"),
            ("train", train_command, "train the score network: 40 minutes"),
            ("train-segmenter", train_segmenter_command, "train the segmenter of noisy images, measure it: 15 minutes"),
            ("sample", sample_command, "images of masks: 7 seconds an image"),
            ("evaluate", evaluate_command, "a table over s0, and DDPM beside it: 75 minutes"),
            ("precision", precision_command, "train in fp32 and in half precision: memory, time, loss; 6 minutes")):
        added[name] = commands.add_parser(name, help=text, description=text)
        added[name].set_defaults(function=function)
    for name in ("smax", "train", "train-segmenter", "precision"):
        add_config_arguments(added[name])
        added[name].add_argument("--run", help="the folder of the run; default: runs/score_<name of the data>")
    added["smax"].add_argument("--pairs", type=parse_count, help="as many random pairs, instead of all")
    for name in ("train", "train-segmenter"):
        added[name].add_argument("--minutes", type=float, default=math.inf, help="at most, of training in all")
    added["train-segmenter"].add_argument("--encoding", choices=["log sigma", "t"], default="log sigma",
                                          help="of the noise, in the fourth channel; default: %(default)s")
    for name, s0s in (("sample", [2.0]), ("evaluate", S0)):
        add = added[name].add_argument
        add("--run", required=True, help="the folder of the run")
        add("--s0", type=parse_numbers, default=s0s, metavar="S0[,S0...]", help="0 is unsteered; default: %(default)s")
        add("--sampler", choices=["pc", "langevin", "heun", "euler"], default="pc", help="default: %(default)s")
        add("--steps", type=parse_count, default=300, help="noise levels; default: %(default)s")
        add("--snr", type=float, default=0.1, help="of the corrector; default: %(default)s")
        add("--seed", type=int, default=1, help="of the first image; default: %(default)s")
        add("--batch-size", type=parse_count, default=16, help="images at a time; default: %(default)s")
        add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    added["sample"].add_argument("--mask", required=True, help="a mask file, or a folder of them")
    added["sample"].add_argument("--n", type=parse_count, default=4, help="images per mask; default: %(default)s")
    added["sample"].add_argument("--out", default="out_score", help="default: %(default)s")
    added["evaluate"].add_argument("--root", required=True, help="the prepared data, whose test masks are taken")
    added["evaluate"].add_argument("--judge", required=True, help="a checkpoint of experiments.segmenter")
    added["evaluate"].add_argument("--ddpm", help="a checkpoint of train.py, to stand beside")
    added["evaluate"].add_argument("--masks", type=parse_count, default=64, help="as many; default: %(default)s")
    args = parser.parse_args()
    command(args.function, args)


if __name__ == "__main__":
    main()
