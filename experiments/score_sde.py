"""The other way to the same goal: an unconditional score model, steered by a segmenter that can see through noise.

    python -m experiments.score_sde smax --preset idd_lite                the largest distance of two training images
    python -m experiments.score_sde train --preset idd_lite               the score network: 60 minutes
    python -m experiments.score_sde train-segmenter --preset idd_lite     the segmenter of noisy images: 30 minutes
    python -m experiments.score_sde sample --run runs/score_idd_lite --mask masks/ --s0 0.1,0.3     1.5 minutes an image
    python -m experiments.score_sde evaluate --run runs/score_idd_lite --judge runs/judge/checkpoint.pt \\
        --ddpm runs/idd_lite/checkpoint.pt                                the table over s0, beside DDPM: 12 hours
    python -m experiments.score_sde precision --preset idd_lite --set train.steps=200     fp32 beside bf16: 6 minutes

Minutes are those of two CPU cores with bf16, for IDD-Lite at 64x64. Without --preset all of it is the toy's. A run is
a folder, runs/score_<name of the data>; Ctrl-C loses nothing: the same command goes on.

Follows "score-based semantic synthesis" (seed 001), whose sections and equations the numbers here are: images x in
[0, 1] are drowned in noise, x(t) = x(0) + sigma(t) z, the VE-SDE. A network learns the score, the gradient of
log p_t(x); a segmenter trained on noisy images adds that of log p(y | x), for a mask y, while an image is sampled.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from benchmarks.timing import machine, peak_memory, table
from checkpoint import build, load_checkpoint, pick_device, pick_precision, replacing
from config import add_config_arguments, command, load_config
from dataset import Pairs, batches, contact_sheet, list_files, read_image, to_uint8
from ddpm import noise_like_seeds
from evaluate import confusion_matrix, scores
from experiments.ablation import run_program
from experiments.training import autocast, fit, read
from experiments.ve_sde import (T_HIGHEST, NoisySegmenter, draw_samples, guided_score, largest_distance, log_likelihood,
                                network_score, scale_factor, score_errors, see_through_noise, sigma_at, time_at)
from masks import UNLABELLED, Colorbook, save_mask
from sample import draw_sheet, file_of, plan, read_masks, sample_jobs, save, settings_of
from train import read_data
from unet import UNet

S0 = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]  # the seed, at 512x256, had seven from 0.0005 to 0.0035

# ------------------------------------------------------------------------------------------------------ training


def to_images(planes):
    """Planes (B, C + 1, H, W) uint8, of which the last one is the mask, to images x(0) (B, C, H, W) in [0, 1]."""
    return planes[:, :-1].float() / 255


def spread(n, highest=1.0):
    """t (n,) spread evenly over 0..highest, shuffled: pairs come in the order of their names, often by place."""
    return (torch.randperm(n, generator=torch.Generator().manual_seed(0)) + 0.5) / n * highest


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
        x = draw_samples(network_score(net, smax, prediction), noise, smax, "heun", min(20, c["steps"]))
        return contact_sheet([list(to_uint8(2 * x.expand(-1, 3, -1, -1) - 1))])

    about = {"kind": "score", "size": list(x0.shape[2:]), "smax": smax, "prediction": prediction,
             "network": [0, m["hidden_dim"], m["emb_dim"], m["attention"]], "classes": pairs.colorbook.classes}
    return fit(model, loss, load_batches(cfg, pairs, device), c, file, device, about, validate, preview, minutes)


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

    return fit(net, loss, load_batches(cfg, pairs, device), c, file, device, about, validate, minutes=minutes)


def load_batches(cfg, pairs, device):
    """fit()'s load_batches(start)."""
    d = cfg["data"]
    return lambda start: batches(pairs, cfg["train"]["batch_size"], cfg["seed"], start, d["flip"], d["augment"], device)


@torch.no_grad()
def accuracy_by_level(net, pairs, about, device, levels=41):
    """[{"t", "pixel accuracy", "mean IoU"}] of a segmenter on pairs, for t evenly from 0 to highest (5.4.3)."""
    rows, K = [], len(pairs.colorbook)
    for t in tqdm(torch.linspace(0, about["highest"], levels).tolist(), "noise levels", leave=False):
        confusion = 0
        for i, planes in enumerate(pairs.planes.split(32)):
            images = to_images(planes)
            noise = noise_like_seeds(range(32 * i, 32 * i + len(planes)), images.shape[1:])()
            x = (images + sigma_at(t, about["smax"]) * noise).to(device)
            logits = see_through_noise(net, x, torch.full((len(x),), t, device=device), about["smax"], about["encoding"])
            confusion = confusion + confusion_matrix(planes[:, -1], logits.argmax(dim=1).cpu(), K)
        accuracy, mean_iou, _ = scores(confusion)
        rows.append({"t": t, "pixel accuracy": accuracy, "mean IoU": mean_iou})
    return rows


def draw_curves(curves, title):
    """An image of curves {name: [(x, y), ...]} with x and y in 0..1."""
    image = Image.new("RGB", (640, 440), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    pen.text((60, 8), title, "black", font)
    for i in range(11):
        x, y = 60 + 50 * i, 400 - 35 * i
        pen.line([(60, y), (560, y)], "#dddddd")
        pen.text((52, y), f"{i / 10:.1f}", "black", font, anchor="rm")
        pen.text((x, 406), f"{i / 10:.1f}", "black", font, anchor="ma")
    for i, (name, points) in enumerate(curves.items()):
        color = ("#1f4e9e", "#c0392b", "#2e8b57", "#e08e1b")[i % 4]
        pen.line([(60 + 500 * x, 400 - 350 * y) for x, y in points], color, 2)
        pen.text((330, 36 + 18 * i), name, color, font)
    return image


# ------------------------------------------------------------------------------------------------------ sampling


def load_networks(run, device):
    """Of a run's folder: what the score network knows (its `about`), score_fn, logits_fn, and the checkpoints."""
    states = [read(run / "score.pt", "score"), read(run / "segmenter.pt", "segmenter")]
    about, about_segmenter = (state["about"] for state in states)
    smax = about["smax"]
    differs = [key for key in ("smax", "size", "classes") if about[key] != about_segmenter[key]]
    if differs:
        raise ValueError(f"{run}: score.pt and segmenter.pt were trained with another {', '.join(differs)}: train one anew")
    nets = UNet(*about["network"]), NoisySegmenter(*about_segmenter["network"])
    for net, state in zip(nets, states):
        net.load_state_dict(state["ema"])
        net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def logits_fn(x, sigma):
        t = torch.full((len(x),), time_at(sigma, smax), device=device)
        return see_through_noise(nets[1], x, t, smax, about_segmenter["encoding"])

    return about, network_score(nets[0], smax, about["prediction"]), logits_fn, states


def plan_jobs(run, states, masks, args, s0s):
    """A dict for each image with all that it depends on, as sample.plan() has it; s0 takes the place of guidance."""
    s = {"n": args.n, "seed": args.seed, "guidances": s0s, "guidance_interval": [0, T_HIGHEST], "sampler": args.sampler,
         "steps": args.steps, "eta": 0.0, "precision": args.precision, "mask": args.mask}
    score, segmenter = states
    state = {"path": run / "score.pt", "step": score["step"], "ema": score["ema"]}
    return [job | {"snr": args.snr, "segmenter_steps": segmenter["step"]} for job in plan(state, s, masks, None)]


def sample_masks(run, masks, args, s0s, out, device):
    """Write the images of masks {stem: ids}; those that are there with the same settings stay.

    Returns the jobs of all of them, and {s0: seconds and network calls an image} of those that were made.
    """
    about, score_fn, logits_fn, states = load_networks(run, device)
    jobs, costs = plan_jobs(run, states, masks, args, s0s), {}
    calls = []

    def counted(function):
        return lambda x, sigma: (calls.append(len(x)), function(x, sigma))[1]

    out.mkdir(parents=True, exist_ok=True)
    for s0 in s0s:
        todo = [job for job in jobs if job["guidance"] == s0 and settings_of(file_of(job, out)) != json.dumps(job)]
        started, steps = time.monotonic(), args.steps + (args.sampler in ("langevin", "heun", "euler"))
        bar = tqdm(total=len(todo) * steps, desc=f"{len(todo)} images, s0 = {s0:g}", unit="step")
        calls.clear()
        for first in range(0, len(todo), args.batch_size):
            batch = todo[first: first + args.batch_size]
            ids = torch.stack([torch.from_numpy(masks[job["mask"]]) for job in batch]).long().to(device)
            noise = noise_like_seeds([job["seed"] for job in batch], (3, *about["size"]), device)
            with autocast(args.precision, device):
                steered = guided_score(counted(score_fn), counted(logits_fn), ids,
                                       lambda sigma: scale_factor(time_at(sigma, about["smax"]), s0))
                x = draw_samples(steered, noise, about["smax"], args.sampler, args.steps, args.snr,
                                 observe=lambda *_: bar.update(len(batch)))
            for job, image in zip(batch, to_uint8(2 * x - 1)):
                save(job, image, out)
        bar.close()
        if todo:
            costs[s0] = {"seconds": (time.monotonic() - started) / len(todo), "calls": sum(calls) / len(todo)}
    return jobs, costs


# ---------------------------------------------------------------------------------------------------- the commands


def settings(args):
    """The config, the device, and the folder of the run."""
    cfg = load_config(args.config, args.preset, args.set)
    return cfg, pick_device(cfg["device"]), Path(args.run or f"runs/score_{Path(cfg['out']).name}")


def run_smax(args):
    cfg, _, _ = settings(args)
    pairs, _ = read_data(cfg, 0, 1, False)
    which = f"{args.pairs:,} random pairs" if args.pairs else "all pairs"
    H, W = pairs.size
    print(f"smax {largest_distance(pairs.planes[:, :3], args.pairs)}: the largest distance of {which} of the "
          f"{len(pairs)} training images of {H}x{W}")


def run_train(args):
    cfg, device, run = settings(args)
    pairs, held_out = read_data(cfg, 0, 1, False)
    smax = largest_distance(pairs.planes[:, :3])
    print(f"score network, smax {smax}, {cfg['diffusion']['prediction']} prediction, {device.type}: {run / 'score.pt'}")
    train_score(cfg, pairs, held_out, run / "score.pt", smax, device, args.minutes)


def run_train_segmenter(args):
    """Train, then measure over 41 noise levels, on every held-out split; levels.json has all encodings so far."""
    cfg, device, run = settings(args)
    pairs, held_out = read_data(cfg, 0, 1, False)
    name = "segmenter" if args.encoding == "log sigma" else "segmenter_t"
    about = {"kind": name, "size": list(pairs.size), "smax": largest_distance(pairs.planes[:, :3]),
             "encoding": args.encoding, "highest": T_HIGHEST, "network": [len(pairs.colorbook), cfg["model"]["hidden_dim"]],
             "classes": pairs.colorbook.classes}
    torch.manual_seed(cfg["seed"])
    net = train_classifier(NoisySegmenter(*about["network"]), lambda planes: planes[:, -1], cfg, pairs, held_out,
                           run / f"{name}.pt", about, device, args.minutes)
    file = run / "levels.json"
    levels = json.loads(file.read_text()) if file.exists() else {}
    for split in dict.fromkeys((cfg["data"]["val"], "test")):
        if (Path(cfg["data"]["root"]) / split).is_dir():
            judged = held_out if split == cfg["data"]["val"] else Pairs(cfg["data"]["root"], split, cfg["data"]["size"])
            levels[f"{split}, {args.encoding}"] = accuracy_by_level(net, judged, about, device)
    with replacing(file) as opened:
        opened.write(json.dumps(levels, indent=1).encode())
    for measure in ("pixel accuracy", "mean IoU"):
        curves = {name: [(row["t"], row[measure]) for row in rows] for name, rows in levels.items()}
        draw_curves(curves, f"{measure} over t, on held-out pairs").save(run / f"levels_{measure.replace(' ', '_')}.png")
    print(f"{file}: " + ", ".join(f"{name}: mean IoU {rows[0]['mean IoU']:.3f} at t = 0, {rows[20]['mean IoU']:.3f} at "
                                  f"{rows[20]['t']:.1f}" for name, rows in levels.items()))


def run_sample(args):
    device, run = pick_device(args.device), Path(args.run)
    args.precision = pick_precision("auto", device)
    about = read(run / "score.pt", "score")["about"]
    colorbook = Colorbook(about["classes"], run / "score.pt")
    masks, out = read_masks(args.mask, colorbook, tuple(about["size"])), Path(args.out)
    jobs, costs = sample_masks(run, masks, args, args.s0, out, device)
    draw_sheet(jobs, masks, colorbook, out).save(out / "sheet.png")
    for s0, cost in costs.items():
        print(f"s0 = {s0:g}: {cost['seconds']:.1f} seconds and {cost['calls']:.0f} network calls an image")
    print(f"{len(jobs)} images: {out / 'sheet.png'}")


def sample_ddpm(path, masks, mask_folder, out, device, seed):
    """Images of masks by a checkpoint of train.py and its own settings; seconds and network calls an image."""
    state = load_checkpoint(path)
    cfg = state["config"]
    s = cfg["sample"] | {"n": 1, "seed": seed, "mask": str(mask_folder), "size": tuple(cfg["data"]["size"]),
                         "guidances": [cfg["sample"]["guidance"]], "device": device}
    s["precision"] = cfg["train"]["precision"] = pick_precision(s["precision"], device)
    model, diffusion, autocast_ddpm = build(cfg, len(state["colorbook"]), device)
    model.load_state_dict(state["ema"])
    model.eval()
    passes, started = [], time.monotonic()
    model.image_stem.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    out.mkdir(parents=True, exist_ok=True)
    for batch, images in sample_jobs(plan(state, s, masks, None), masks, model, diffusion, s, autocast_ddpm):
        for job, image in zip(batch, images):
            save(job, image, out)
    return {"seconds": (time.monotonic() - started) / len(masks), "calls": sum(passes) / len(masks)}, state


def judge(images, s0, args, split, report):
    """What evaluate.py says of the images of one s0 (or guidance)."""
    run_program("evaluate.py", "--real", split, "--fake", images, "--guidance", s0, "--segmenter", args.judge,
                "--train", split.with_name("train"), "--out", report)
    numbers = json.loads((report / "report.json").read_text())["numbers"]
    names = {"share of mean IoU": "share of the ceiling: mean IoU", "share of accuracy":
             "share of the ceiling: pixel accuracy", "Frechet": "Frechet distance, segmenter features",
             "floor": "Frechet distance, segmenter features, floor", "SSIM": "SSIM"}
    return {column: numbers.get(name, {}).get("value") for column, name in names.items()}


def run_evaluate(args):
    """The table over s0, DDPM below it, and a sheet of eight masks with the image of each method."""
    device, run = pick_device(args.device), Path(args.run)
    args.precision, args.n = pick_precision("auto", device), 1
    states = [read(run / "score.pt", "score"), read(run / "segmenter.pt", "segmenter")]
    about, split = states[0]["about"], Path(args.root, "test").absolute()
    colorbook, size = Colorbook(about["classes"], run / "score.pt"), tuple(about["size"])
    out, args.judge = run / "evaluation", Path(args.judge).absolute()
    args.mask, file = str(out / "masks"), out / "results.json"
    if not (out / "masks").exists():
        (out / "masks").mkdir(parents=True)
        stems = list(list_files(split / "masks"))
        chosen = {stems[int(i)] for i in torch.linspace(0, len(stems) - 1, min(args.masks, len(stems)))}
        for stem, ids in read_masks(split / "masks", colorbook, size).items():
            if stem in chosen:
                save_mask(ids, out / "masks" / f"{stem}.png", colorbook)
    masks = read_masks(out / "masks", colorbook, size)
    results = json.loads(file.read_text()) if file.exists() else {}

    def add(name, images, s0, cost, minutes):
        row = judge(images, s0, args, split, out / f"report_{name.replace(' ', '_')}")
        results[name] = row | {"s an image": cost["seconds"], "calls an image": cost["calls"], "minutes of training":
                               minutes, "images": str(images), "s0": s0}
        with replacing(file) as opened:
            opened.write(json.dumps(results, indent=1).encode())

    for s0 in args.s0:
        name = f"s0 = {s0:g}"
        if name not in results:
            cost = sample_masks(run, masks, args, [s0], out / "images", device)[1].get(s0, {"seconds": None, "calls": None})
            add(name, out / "images", s0, cost, sum(state["seconds"] for state in states) / 60)
    if args.ddpm and "DDPM" not in results:
        cost, state = sample_ddpm(args.ddpm, masks, out / "masks", out / "ddpm", device, args.seed)
        add("DDPM", out / "ddpm", state["config"]["sample"]["guidance"], cost, state["seconds"] / 60)

    print(f"{len(masks)} masks of {split}, {args.sampler}, {args.steps} steps, {machine(device)}\n")
    shown = [{"method": name} | {key: value for key, value in row.items() if key not in ("images", "s0")}
             for name, row in results.items()]
    print(table(shown))
    chosen = list(masks)[:: max(1, len(masks) // 8)][:8]
    rows = [[colorbook.paint(masks[stem]) for stem in chosen]]
    for row in results.values():
        rows.append([read_image(min(Path(row["images"]).glob(f"{stem}_w{row['s0']:g}_seed*.png"))) for stem in chosen])
    contact_sheet(rows).save(out / "methods.png")
    print(f"\n{file}, {out / 'methods.png'}: masks, then {', '.join(results)}")


def run_precision(args):
    """Train the score network for as many steps in fp32 and in half precision: memory, time, loss (5.3.1)."""
    cfg, device, run = settings(args)
    pairs, held_out = read_data(cfg, 0, 1, False)
    smax, rows = largest_distance(pairs.planes[:, :3]), []
    for precision in dict.fromkeys(["fp32", pick_precision("auto", device), *["fp16"] * (device.type == "cuda")]):
        cfg["train"]["precision"] = precision
        file = run / "precision" / precision / "score.pt"
        one_step = cfg | {"train": cfg["train"] | {"steps": 1}}
        peak = peak_memory(lambda: train_score(one_step, pairs, held_out, file.with_name("one_step.pt"), smax, device), [], device)
        train_score(cfg, pairs, held_out, file, smax, device)
        state = read(file, "score")
        rows.append({"precision": precision, "steps": state["step"], "s a step": state["seconds"] / state["step"],
                     "peak GiB": peak / 2**30} | {key: state["log"][-1][key] for key in ("loss", "val_loss", "val_eps")})
    print(f"{machine(device)}, batch {cfg['train']['batch_size']}, {'x'.join(map(str, pairs.size))}\n\n{table(rows)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name, function, text):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    for name, function, text in (
            ("smax", run_smax, "the largest distance of two training images: seconds"),
            ("train", run_train, "train the score network: 60 minutes"),
            ("train-segmenter", run_train_segmenter, "train the segmenter of noisy images, and measure it: 30 minutes"),
            ("precision", run_precision, "train in fp32 and in half precision: memory, time, loss; 6 minutes")):
        sub = add(name, function, text)
        add_config_arguments(sub)
        sub.add_argument("--run", help="the folder of the run; default: runs/score_<name of the data>")
        if name == "smax":
            sub.add_argument("--pairs", type=int, help="as many random pairs, instead of all")
        else:
            sub.add_argument("--minutes", type=float, default=math.inf, help="of training, if train.steps are not over")
        if name == "train-segmenter":
            sub.add_argument("--encoding", choices=["log sigma", "t"], default="log sigma", help="default: %(default)s")

    sub_sample = add("sample", run_sample, "images of masks: 1.5 minutes an image")
    sub_evaluate = add("evaluate", run_evaluate, "the table over s0, beside DDPM: 12 hours")
    for sub in (sub_sample, sub_evaluate):
        sub.add_argument("--run", required=True, help="the folder of the run")
        sub.add_argument("--s0", type=parse_numbers, default=S0, metavar="S0[,S0...]", help="default: seven; 0 is unsteered")
        sub.add_argument("--sampler", choices=["pc", "langevin", "heun", "euler"], default="pc", help="default: %(default)s")
        sub.add_argument("--steps", type=int, default=300, help="noise levels; default: %(default)s")
        sub.add_argument("--snr", type=float, default=0.1, help="of the corrector; default: %(default)s")
        sub.add_argument("--seed", type=int, default=1, help="of the first image; default: %(default)s")
        sub.add_argument("--batch-size", type=int, default=16, help="images at a time; default: %(default)s")
        sub.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    sub_sample.add_argument("--mask", required=True, help="a mask file, or a folder of them")
    sub_sample.add_argument("--n", type=int, default=4, help="images per mask; default: %(default)s")
    sub_sample.add_argument("--out", default="out_score", help="default: %(default)s")
    sub_evaluate.add_argument("--root", required=True, help="the prepared data set, whose test masks are taken")
    sub_evaluate.add_argument("--judge", required=True, help="a checkpoint of experiments.segmenter")
    sub_evaluate.add_argument("--ddpm", help="a checkpoint of train.py, to stand beside")
    sub_evaluate.add_argument("--masks", type=int, default=64, help="how many, spread over the split; default: %(default)s")
    args = parser.parse_args()
    command(args.function, args)


def parse_numbers(text):
    return [float(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
