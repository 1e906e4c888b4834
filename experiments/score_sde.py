"""The other way to the same goal: an unconditional score model, steered by a segmenter that can see through noise.

    python -m experiments.score_sde train --preset idd_lite               the score network: 40 minutes
    python -m experiments.score_sde train-segmenter --preset idd_lite     the segmenter of noisy images: 17 minutes
    python train.py --preset idd_lite --set train.steps=8500 --set out=runs/equal_time       DDPM: as long, 57 minutes
    python -m experiments.score_sde evaluate --run runs/score_idd_lite --root data/idd_lite/prepared \\
        --judge runs/judge/checkpoint.pt --ddpm runs/equal_time/checkpoint.pt                   40 minutes
    python -m experiments.score_sde sample --run runs/score_idd_lite --mask masks/ --s0 1,2     8 seconds an image
    python -m experiments.score_sde precision --preset idd_lite --set train.steps=200           6 minutes
    python -m experiments.score_sde smax --preset idd_lite                the largest distance of two training images

Minutes are those of two CPU cores with bf16, for IDD-Lite at 64x64: estimates, from 40 training images a second.
Without --preset all of it is the toy's. A run is a folder, runs/score_<name of the data>, with score.pt, segmenter.pt,
logs, previews, levels.json (what the segmenter sees at 41 noise levels) and evaluation/. Ctrl-C loses nothing: the same
command goes on. Training takes the settings of config.yaml, by --preset and --set as train.py does.

evaluate tries each s0 on masks of val; the one with the highest share of mean IoU, and DDPM, at the guidance of its
checkpoint, then draw masks of test. Network calls of an image are forward, those of the segmenter forward and backward.

Follows "score-based semantic synthesis" (seed 001), whose sections and equations the numbers here are: images x in
[0, 1] are drowned in noise, x(t) = x(0) + sigma(t) z, the VE-SDE. A network learns the score, the gradient of
log p_t(x); a segmenter trained on noisy images adds that of log p(y | x), for a mask y, while an image is sampled.
"""

import argparse
import json
import math
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from benchmarks.timing import machine, peak_memory, set_precision, table
from checkpoint import join_processes, load_checkpoint, pick_device, pick_precision, replacing
from config import add_config_arguments, command, load_config
from dataset import Pairs, contact_sheet, read_image, to_uint8
from ddpm import guided_eps, noise_like_seeds
from ddpm import sample as sample_ddpm
from evaluate import confusion_matrix, scores
from experiments.common import draw_curves, parse_count, parse_numbers, read_report, run_program
from experiments.drawing import Results, draw_missing, load_judge
from experiments.training import fit, go_on_alone, make_loader, read, spread
from experiments.ve_sde import (T_HIGHEST, NoisySegmenter, draw_samples, guided_score, largest_distance, log_likelihood,
                                network_score, scale_factor, score_errors, see_through_noise, sigma_at, time_at)
from masks import UNLABELLED, Colorbook, one_hot
from sample import draw_sheet, file_of, load_network, plan, read_masks
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


class Steered:
    """The score model of a run, steered by its segmenter: plan() says what to draw, draw() draws, calls are counted.

    args has run, sampler, steps, snr and seed.
    """

    def __init__(self, args, device):
        self.args, self.device, self.calls = args, device, Counter()
        self.path = Path(args.run, "score.pt")
        self.score, self.segmenter = read(self.path, "score"), read(self.path.with_name("segmenter.pt"), "segmenter")
        about, seen = self.score["about"], self.segmenter["about"]
        differing = [key for key in ("smax", "size", "classes") if json.dumps(about[key]) != json.dumps(seen[key])]
        if differing:  # as texts, since the order of the classes is their ids
            raise ValueError(f"{args.run}: score.pt and segmenter.pt were trained with another {', '.join(differing)}: "
                             "train one of them anew")
        self.smax, self.size, self.encoding = about["smax"], tuple(about["size"]), seen["encoding"]
        self.colorbook, self.precision = Colorbook(about["classes"], self.path), pick_precision("auto", device)
        self.minutes = (self.score["seconds"] + self.segmenter["seconds"]) / 60
        self.model, self.net = UNet(*about["network"]), NoisySegmenter(*seen["network"])
        for net, state in ((self.model, self.score), (self.net, self.segmenter)):
            net.load_state_dict(state["ema"])
            net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

    def plan(self, masks, source, s0s, n):
        """The jobs, as sample.plan() has them, of n images per mask {stem: ids} at each s0: it is their "guidance"."""
        settings = {"mask": source, "n": n, "seed": self.args.seed, "guidances": s0s, "eta": 0.0,
                    "guidance_interval": [0, T_HIGHEST], "sampler": self.args.sampler, "steps": self.args.steps,
                    "precision": self.precision}
        more = {"snr": self.args.snr, "segmenter_steps": self.segmenter["step"],
                "segmenter_crc32": zlib.crc32(self.segmenter["ema"]["out.weight"].numpy())}
        return [job | more for job in plan(self.score | {"path": self.path}, settings, masks)]

    def draw(self, ids, seeds, s0):
        """Images (B, H, W, 3) uint8 of ids (B, H, W)."""
        of_network = network_score(self.model, self.smax, self.score["about"]["prediction"])

        def score_fn(x, sigma):
            self.calls["network"] += len(x)
            return of_network(x, sigma)

        def logits_fn(x, sigma):
            self.calls["segmenter"] += len(x)
            t = torch.full((len(x),), time_at(sigma, self.smax), device=self.device)
            return see_through_noise(self.net, x, t, self.smax, self.encoding)

        def strength(sigma):
            return scale_factor(time_at(sigma, self.smax), s0)

        args, noise = self.args, noise_like_seeds(seeds, (3, *self.size), self.device)
        steered = guided_score(score_fn, logits_fn, ids.long(), strength)
        with tqdm(total=args.steps, desc=f"{len(ids)} images, s0 = {s0:g}", unit="step", leave=False) as bar:
            x = draw_samples(steered, noise, self.smax, args.sampler, args.steps, args.snr, lambda *_: bar.update())
        return to_uint8(2 * x - 1)


class Ddpm:
    """A run of train.py, with the settings of its checkpoint, as Steered is; plan() is for one image per mask."""

    def __init__(self, path, seed, device):
        self.device, self.calls = device, Counter()
        self.state = load_checkpoint(path)
        self.minutes = self.state["seconds"] / 60
        self.size = tuple(self.state["config"]["data"]["size"])
        self.s = self.state["config"]["sample"] | {"n": 1, "seed": seed, "device": device}
        self.s["guidances"] = [self.s["guidance"]]
        _, self.model, self.diffusion, _ = load_network(self.state, self.s)
        self.model.image_stem.register_forward_hook(
            lambda module, inputs, output: self.calls.update({"network": len(output)}))

    def plan(self, masks, source):
        return plan(self.state, self.s | {"mask": source}, masks)

    def draw(self, ids, seeds, guidance):
        s, alpha_bar = self.s, self.diffusion.alpha_bar
        mask = one_hot(ids, self.model.num_classes)
        eps_fn = guided_eps(self.model, self.diffusion, mask, guidance, s["guidance_interval"])
        noise = noise_like_seeds(seeds, (3, *self.size), ids.device)
        return to_uint8(sample_ddpm(eps_fn, noise, alpha_bar, s["sampler"], s["steps"], s["eta"]))


# ---------------------------------------------------------------------------------------------------- the commands


def read_settings(args):
    """The config, the device, the folder of the run, and the Pairs of train and val."""
    cfg = load_config(args.config, args.preset, args.set)
    run = Path(args.run or f"runs/score_{Path(cfg['out']).name}")
    device = pick_device(cfg["device"])
    return cfg, device, run, *read_data(cfg, *join_processes(device), dry_run=False)


def smax_command(args):
    _, _, _, pairs, _ = read_settings(args)
    print(f"smax {largest_distance(pairs.planes[:, :3])}: the largest distance of two of the {len(pairs)} training "
          f"images of {pairs.size[0]}x{pairs.size[1]}")


def train_command(args):
    cfg, device, run, pairs, held_out = read_settings(args)
    smax = largest_distance(pairs.planes[:, :3])
    print(f"score network, smax {smax}, {cfg['diffusion']['prediction']} prediction, {device.type}: {run / 'score.pt'}")
    train_score(cfg, pairs, held_out, run / "score.pt", smax, device, args.minutes)
    go_on_alone()


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
    go_on_alone()
    root, val, file = Path(cfg["data"]["root"]), cfg["data"]["val"], run / "levels.json"
    levels = json.loads(file.read_text()) if file.exists() else {}
    levels[f"{val}, {args.encoding}"] = accuracy_by_level(net, held_out, about, device)
    if val != "test" and (root / "test").is_dir():
        levels[f"test, {args.encoding}"] = accuracy_by_level(net, Pairs(root, "test", pairs.size), about, device)
    with replacing(file) as opened:
        opened.write(json.dumps(levels, indent=1).encode())
    for column in ("pixel accuracy", "mean IoU"):
        curves = {name: {row["t"]: [row[column]] for row in rows} for name, rows in levels.items()}
        image = draw_curves(curves, f"{column} over t, one training for each encoding")
        image.save(run / f"levels_{column.replace(' ', '_')}.png")
    shown = [{"split, encoding": name} | {f"mean IoU at t = {row['t']:.1f}": row["mean IoU"] for row in rows[::10]}
             for name, rows in levels.items()]
    print(f"{table(shown)}\n{file}\nlog sigma = log smin + t log(smax / smin): the two encodings differ in scale and "
          "offset alone, and each is one training")


def sample_command(args):
    device, out = pick_device(args.device), Path(args.out)
    method = Steered(args, device)
    masks = read_masks(args.mask, method.colorbook, method.size)
    for s0 in args.s0:
        method.calls.clear()
        drawn, seconds = draw_missing(method.plan(masks, args.mask, [s0], args.n), masks, method.draw, out, device)
        if drawn:
            calls = ", ".join(f"{n / drawn:.0f} {network} calls" for network, n in method.calls.items())
            print(f"s0 = {s0:g}: {seconds / drawn:.1f} seconds an image, {calls}")
    jobs = method.plan(masks, args.mask, args.s0, args.n)
    draw_sheet(jobs, masks, method.colorbook, out).save(out / "sheet.png")
    print(f"{len(jobs)} images: {out / 'sheet.png'}")


def measure(results, name, method, jobs, masks, split, judge):
    """The row of that name, finished: the method draws the jobs, of masks {stem: ids} of a split, which are judged."""
    row = results.begin(name, jobs[0] | {"masks": len(masks), "split": str(split), "judge": judge})
    if "columns" in row:
        return row
    folder = folder_of(results, name)
    stale = {path.name for path in folder.glob("*.png")} - {file_of(job, folder).name for job in jobs}
    if stale:  # evaluate.py would judge them too
        raise ValueError(f"{folder}: images of other settings, such as {min(stale)}: delete the folder")
    method.calls.clear()
    drawn, seconds = draw_missing(jobs, masks, method.draw, folder, method.device)
    if drawn:  # kept before anything that follows can fail
        row["cost"] = {"s an image": seconds / drawn, "network calls": method.calls["network"] / drawn,
                       "segmenter calls": method.calls["segmenter"] / drawn}
        results.save()
    report = folder.with_name(f"report_{folder.name}")
    run_program("evaluate.py", "--real", split, "--fake", folder, "--segmenter", judge,
                "--train", split.with_name("train"), "--out", report)
    cost = row.get("cost") or dict.fromkeys(("s an image", "network calls", "segmenter calls"), "unknown")
    row["columns"] = {"method": name} | read_report(report, NUMBERS) | cost | {"minutes of training": method.minutes}
    results.save()
    return row


def folder_of(results, name):
    return results.file.parent / name.replace(", ", "_").replace(" = ", "_")


def spread_masks(split, colorbook, size, n):
    """{stem: ids} of n masks, spread over the split."""
    masks = read_masks(split / "masks", colorbook, size)
    chosen = np.linspace(0, len(masks) - 1, min(n, len(masks))).round().astype(int)
    stems = [list(masks)[i] for i in chosen]
    return {stem: masks[stem] for stem in stems}


def show(results, names, masks, colorbook, title):
    """Print the rows of these names, and save their images: eight masks, and below them a row for each name."""
    stems = list(masks)[:: max(1, len(masks) // 8)][:8]
    rows = [[colorbook.paint(masks[stem]) for stem in stems]]
    for name in names:
        folder = folder_of(results, name)
        rows.append([read_image(next(folder.glob(f"{stem}_w*_seed*.png"))) for stem in stems])
    sheet = results.file.with_name(f"{title}.png")
    contact_sheet(rows).save(sheet)
    print(f"\n{len(masks)} masks of {title}; {sheet}: the masks, then {', '.join(names)}\n")
    print(table([results.rows[name]["columns"] for name in names]))


def evaluate_command(args):
    """Choose s0 on masks of val; then that one, and DDPM, on masks of test: two tables and two sheets."""
    device, root = pick_device(args.device), Path(args.root).absolute()
    steered = Steered(args, device)
    colorbook, size = steered.colorbook, steered.size
    load_judge(args.judge, colorbook, size, device)  # what is wrong with it is said before an image is made
    ddpm = Ddpm(args.ddpm, args.seed, device) if args.ddpm else None
    if ddpm and (ddpm.size != size or list(ddpm.state["colorbook"].items()) != list(colorbook.classes.items())):
        raise ValueError(f"{args.ddpm}: other classes or another size than in {steered.path}: its size is "
                         f"{list(ddpm.size)}, expected {list(size)}")
    val, test = root / "val", root / "test"
    val_masks = spread_masks(val, colorbook, size, args.val_masks)
    test_masks = spread_masks(test, colorbook, size, args.masks)
    results = Results(Path(args.run, "evaluation", "results.json"))

    share_of = {}
    for s0 in args.s0:
        jobs = steered.plan(val_masks, str(val / "masks"), [s0], 1)
        row = measure(results, f"val, s0 = {s0:g}", steered, jobs, val_masks, val, args.judge)
        share_of[s0] = float(row["columns"]["share of mean IoU"].split()[0])
    best = max(share_of, key=share_of.get)
    names = [f"test, s0 = {best:g}"]
    jobs = steered.plan(test_masks, str(test / "masks"), [best], 1)
    measure(results, names[0], steered, jobs, test_masks, test, args.judge)
    if ddpm:
        names.append("test, DDPM")
        jobs = ddpm.plan(test_masks, str(test / "masks"))
        measure(results, names[1], ddpm, jobs, test_masks, test, args.judge)

    print(f"{args.sampler} of {args.steps} steps, {machine(device)}; Frechet distances of one table can be compared")
    show(results, [f"val, s0 = {s0:g}" for s0 in args.s0], val_masks, colorbook, "val")
    show(results, names, test_masks, colorbook, "test")


def precision_command(args):
    """Train the score network for as many steps in fp32 and in half precision: memory, time, loss (5.3.1)."""
    cfg, device, run, pairs, held_out = read_settings(args)
    smax, rows = largest_distance(pairs.planes[:, :3]), []
    one_step = cfg | {"train": cfg["train"] | {"steps": 1, "val_pairs": 1, "previews": 1}}
    for precision in dict.fromkeys(["fp32", pick_precision("auto", device), *["fp16"] * (device.type == "cuda")]):
        cfg["train"]["precision"] = one_step["train"]["precision"] = precision
        set_precision(precision)  # without TF32, which cuDNN's convolutions take by default
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
            ("train-segmenter", train_segmenter_command, "train the segmenter of noisy images, measure it: 17 minutes"),
            ("sample", sample_command, "images of masks: 8 seconds an image"),
            ("evaluate", evaluate_command, "choose s0 on val, then measure it and DDPM on test: 40 minutes"),
            ("precision", precision_command, "train in fp32 and in half precision: memory, time, loss; 6 minutes")):
        added[name] = commands.add_parser(name, help=text, description=text)
        added[name].set_defaults(function=function)
    for name in ("smax", "train", "train-segmenter", "precision"):
        add_config_arguments(added[name])
        added[name].add_argument("--run", help="the folder of the run; default: runs/score_<name of the data>")
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
        add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    added["sample"].add_argument("--mask", required=True, help="a mask file, or a folder of them")
    added["sample"].add_argument("--n", type=parse_count, default=4, help="images per mask; default: %(default)s")
    added["sample"].add_argument("--out", default="out_score", help="default: %(default)s")
    added["evaluate"].add_argument("--root", required=True, help="the prepared data, with masks of val and of test")
    added["evaluate"].add_argument("--judge", required=True, help="a checkpoint of experiments.segmenter")
    added["evaluate"].add_argument("--ddpm", help="a checkpoint of train.py, to stand beside")
    added["evaluate"].add_argument("--val-masks", type=parse_count, default=24, metavar="N",
                                   help="of val, on which s0 is chosen; default: %(default)s")
    added["evaluate"].add_argument("--masks", type=parse_count, default=64, metavar="N",
                                   help="of test, that are measured; default: %(default)s")
    args = parser.parse_args()
    command(args.function, args)


if __name__ == "__main__":
    main()
