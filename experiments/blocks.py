"""Which blocks help a small DDPM of digits (seed 003, Table 1)? AdaGN, ConvNeXt, a cosine schedule, attention.

    python -m experiments.blocks --data ../shared/data/mnist              a folder with MNIST's files: 75 minutes
    python -m experiments.blocks                                          downloaded by torchvision, to data/mnist
    python -m experiments.blocks --data ... --trainings 1 --draws 2 --n 100 --set train.steps=300 --out runs/blocks_toy
                                                                          6 minutes

Six networks learn to draw digits: a ResNet DDPM, four that differ from it in one thing, and our own U-Net of DoubleConv
with as many parameters. They are compared in three ways: after equally many steps; after the time that DDPM took for
these; and after equally many steps at the width that gives them DDPM's number of parameters. Each is trained from
several seeds, and several sets of digits are drawn from each: DDIM, eta 1, 50 steps. Distances are Frechet's to digits
that were held out, in the features of a classifier of digits that is trained here too, and FID where Inception's
weights are given.

--out gets report.md (tables, and what their columns are), results.json, digits.png (a column for each network),
curves.png (distance over time), checkpoints and samples, half a gigabyte. Ctrl-C loses nothing: the same command goes
on. On two CPU cores with bf16, training takes about 45 minutes (a step of 32 digits takes DDPM 0.11 s on one core,
ConvNeXt of DDPM's number of parameters 0.22), drawing 43,000 digits 25 and the rest 5.
"""

import argparse
import copy
import json
import statistics
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.timing import machine, now, table
from checkpoint import autocast, pick_device, pick_precision, replacing
from config import command, load_config
from dataset import contact_sheet, to_uint8
from ddpm import Diffusion, guided_eps, noise_like_seeds, sample
from evaluate import frechet_distance, in_batches, load_inception
from experiments.common import draw_curves, parse_count
from experiments.score_digits import SIZE, Digits, read_by, read_digits, train_judge
from experiments.training import fit, make_loader, read, spread
from unet import UNet, time_embedding

ROWS = {  # name: block, attention, schedule, and the seed's FID by Inception (its Table 1; 50 epochs of MNIST at 32x32)
    "DDPM": ("resnet", True, "linear", "47.08"),
    "AdaGN": ("adagn", True, "linear", "49.30"),
    "ConvNeXt": ("convnext", True, "linear", "44.00"),
    "cosine": ("resnet", True, "nichol", "46.54"),
    "no attention": ("resnet", False, "linear", "52.48"),
    "DoubleConv": ("doubleconv", False, "linear", "")}
COMPARISONS = ("equal steps", "equal time", "equal parameters")
GROUPS = 4  # of a GroupNorm
SAME_TIME, SAME_PARAMETERS = 0.05, 0.15  # shares within which a network of equal steps stands for the matched one too
FINER = 5  # times as many steps of the sampler, in which "cosine" is compared with "DDPM" once more

# -------------------------------------------------------------------------------------------------------- blocks
# A block takes x (B, in, H, W) and a time embedding (B, E) to (B, out, H, W), attention x alone. Both begin as their
# shortcut: the last layer of the other branch is zero.


def zeroed(layer):
    """The layer, with its weights and bias set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def make_shortcut(in_ch, out_ch):
    return nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()


class ResNetBlock(nn.Module):
    """DDPM's block: GroupNorm, SiLU, Conv3x3, twice, with the time added in between.

    adaptive=True is AdaGN (Dhariwal and Nichol 2021, 4.1): the time scales and shifts what the second norm gives.
    """

    def __init__(self, in_ch, out_ch, emb_dim, adaptive=False):
        super().__init__()
        self.adaptive = adaptive
        self.norm1 = nn.GroupNorm(GROUPS, in_ch)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.time = nn.Linear(emb_dim, 2 * out_ch if adaptive else out_ch)
        self.norm2 = nn.GroupNorm(GROUPS, out_ch)
        self.conv2 = zeroed(nn.Conv2d(out_ch, out_ch, 3, padding=1))
        self.shortcut = make_shortcut(in_ch, out_ch)

    def forward(self, x, emb):
        y = self.conv1(F.silu(self.norm1(x)))
        time = self.time(F.silu(emb))[:, :, None, None]
        if self.adaptive:
            scale, shift = time.chunk(2, dim=1)
            y = self.norm2(y) * (1 + scale) + shift
        else:
            y = self.norm2(y + time)
        return self.shortcut(x) + self.conv2(F.silu(y))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm over the channels of each pixel, Linear, GELU, Linear (Liu et al. 2022).

    Between the two Linear there are twice the channels, as in the seed's appendix A; the paper has four times as many.
    The time, which the paper's classifier does not have, is added before the norm.
    """

    def __init__(self, in_ch, out_ch, emb_dim):
        super().__init__()
        self.depthwise = nn.Conv2d(in_ch, in_ch, 7, padding=3, groups=in_ch)
        self.time = nn.Linear(emb_dim, in_ch)
        self.pixelwise = nn.Sequential(nn.LayerNorm(in_ch), nn.Linear(in_ch, 2 * out_ch), nn.GELU(),
                                       zeroed(nn.Linear(2 * out_ch, out_ch)))
        self.shortcut = make_shortcut(in_ch, out_ch)

    def forward(self, x, emb):
        y = self.depthwise(x) + self.time(F.silu(emb))[:, :, None, None]
        y = self.pixelwise(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # channels last, and back
        return self.shortcut(x) + y


class Attention(nn.Module):
    """DDPM's self-attention: every pixel of x (B, C, H, W) adds what it finds in all others; one head."""

    def __init__(self, ch):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, ch)
        self.qkv = nn.Conv2d(ch, 3 * ch, 1)
        self.out = zeroed(nn.Conv2d(ch, ch, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)  # (B, C, H*W) each
        weights = (q.transpose(1, 2) @ k / C**0.5).softmax(dim=2)    # (B, H*W, H*W), a row for each query
        y = v @ weights.transpose(1, 2)                              # (B, C, H*W)
        return x + self.out(y.reshape(B, C, H, W))                   # (B, C, H, W)


# ------------------------------------------------------------------------------------------------------ networks


class BlockUNet(nn.Module):
    """A U-Net of one kind of block for grey images (B, 1, H, W) and t (B,), H and W multiples of 8; gives (B, 1, H, W).

    width      the four levels have 1, 2, 4 and 4 times as many channels, rounded to multiples of 4
    block      "resnet", "adagn" or "convnext"
    attention  after the blocks of the two lower levels, and in the middle

    One block on each level down, two in the middle, one on each level up; levels are joined by means of 2x2 pixels and
    by repeating pixels, which have no parameters. What is compared are the blocks.
    """

    def __init__(self, width=16, block="resnet", attention=True, emb_dim=128):
        super().__init__()
        c = [GROUPS * round(width * factor / GROUPS) for factor in (1, 2, 4, 4)]
        if c[0] < GROUPS:
            raise ValueError(f"the width (model.hidden_dim) must be 3 or more, got {width}")

        def make_block(in_ch, out_ch):
            if block == "convnext":
                return ConvNeXtBlock(in_ch, out_ch, emb_dim)
            return ResNetBlock(in_ch, out_ch, emb_dim, adaptive=block == "adagn")

        def make_attention(level):
            return Attention(c[level]) if attention and level >= 2 else nn.Identity()

        self.emb_dim = emb_dim
        self.time = nn.Sequential(nn.Linear(emb_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.stem = nn.Conv2d(1, c[0], 3, padding=1)
        self.down = nn.ModuleList(map(make_block, [c[0], *c[:3]], c))
        self.down_attention = nn.ModuleList(map(make_attention, range(4)))
        self.middle1, self.middle2 = make_block(c[3], c[3]), make_block(c[3], c[3])
        self.middle_attention = make_attention(3)
        self.up = nn.ModuleList(make_block(below + here, here) for below, here in zip([*c[1:], c[3]], c))
        self.up_attention = nn.ModuleList(map(make_attention, range(4)))
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, c[0]), nn.SiLU(), zeroed(nn.Conv2d(c[0], 1, 3, padding=1)))

    def forward(self, x, t):
        emb = self.time(time_embedding(t, self.emb_dim))         # (B, E)
        x, skips = self.stem(x), []                              # (B, c0, H, W)
        for level in range(4):
            x = F.avg_pool2d(x, 2) if level else x
            x = self.down_attention[level](self.down[level](x, emb))
            skips.append(x)                                      # (B, c, H/2^level, W/2^level)
        x = self.middle2(self.middle_attention(self.middle1(x, emb)), emb)
        for level in (3, 2, 1, 0):
            x = F.interpolate(x, scale_factor=2.0) if level < 3 else x
            x = self.up[level](torch.cat([x, skips[level]], dim=1), emb)
            x = self.up_attention[level](x)                      # (B, c, H/2^level, W/2^level)
        return self.out(x)                                       # (B, 1, H, W)


class GreyUNet(nn.Module):
    """Our own U-Net without masks, for grey images: in as three equal channels, out as the mean of three."""

    def __init__(self, width, emb_dim):
        super().__init__()
        self.net = UNet(0, width, emb_dim)
        zeroed(self.net.out)

    def forward(self, x, t):
        return self.net(x.expand(-1, 3, -1, -1), t).mean(dim=1, keepdim=True)


def build_network(block, attention, width, emb_dim):
    return GreyUNet(width, emb_dim) if block == "doubleconv" else BlockUNet(width, block, attention, emb_dim)


def count_parameters(*network):
    with torch.device("meta"):
        return sum(p.numel() for p in build_network(*network).parameters())


def match_width(block, attention, width, emb_dim):
    """The width whose parameters are nearest in number to DDPM's at `width`, or `width` itself where they are near."""
    target = count_parameters(*ROWS["DDPM"][:2], width, emb_dim)
    widths = range(max(4, width // 4 * 2), 2 * width + 1, 2 if block == "doubleconv" else 1)  # our own U-Net's are even

    def difference(candidate):
        return abs(count_parameters(block, attention, candidate, emb_dim) / target - 1)

    near = width in widths and difference(width) <= SAME_PARAMETERS
    return width if near else min(widths, key=difference)


# ----------------------------------------------------------------------------------- one network: train and draw


def to_range(planes):
    """Digits x_0 (B, 1, 32, 32) in [-1, 1] of planes (B, 2, 32, 32) uint8."""
    return planes[:, :1].float() / 127.5 - 1


def eps_errors(net, diffusion, x0, t, eps):
    """Diffusion.errors() of a network without masks: what is trained, and the error in eps, two (B,)."""
    return diffusion.errors(lambda x, t, mask, keep: net(x, t), x0, None, t, eps)


def measure_costs(networks, planes, diffusion, c, device, rounds=40):
    """{network: seconds of a training step}; networks are arguments of build_network(), c the `train` part of a config.

    Medians over the rounds, in each of which all take a step in turn: whatever else the machine does slows all alike.
    """
    x0, parts, seconds = to_range(planes), {}, {network: [] for network in networks}
    for network in networks:
        net = build_network(*network).to(device, memory_format=torch.channels_last)
        parts[network] = net, copy.deepcopy(net), torch.optim.AdamW(net.parameters(), fused=True)
    for _ in tqdm(range(2 + rounds), "seconds of a step", unit="round"):
        for network, (net, ema, optimizer) in parts.items():  # the step of fit(), with digits that are there already
            started = now(device)
            t, eps, _ = diffusion.draw(x0.shape, device=device)
            optimizer.zero_grad()
            with autocast(c["precision"], device):
                loss = eps_errors(net, diffusion, x0, t, eps)[0].mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), c["grad_clip"])
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - c["ema"])
            seconds[network].append(now(device) - started)
    return {network: statistics.median(values[2:]) for network, values in seconds.items()}  # the first two warm up


def train_row(name, width, seed, steps, cfg, digits, held_out, out, device):
    """Train a row's network of that width to `steps`, from its last checkpoint on.

    Returns the network, its Diffusion, and its mean error in eps over held-out digits, at fixed t and noise.
    """
    block, attention, schedule, _ = ROWS[name]
    network, d = (block, attention, width, cfg["model"]["emb_dim"]), cfg["diffusion"] | {"schedule": schedule}
    cfg = cfg | {"seed": seed, "train": cfg["train"] | {"steps": steps}}
    diffusion = Diffusion(**d).to(device)
    x0 = to_range(held_out.planes[: cfg["train"]["val_pairs"]]).to(device)
    t = (d["T"] * spread(len(x0))).long().to(device)
    eps = noise_like_seeds(range(len(x0)), x0.shape[1:], device)()

    def loss(net, planes):
        x0 = to_range(planes)
        return eps_errors(net, diffusion, x0, *diffusion.draw(x0.shape, device=device)[:2])[0].mean()

    @torch.no_grad()
    def validate(net):
        parts = zip(*(values.split(cfg["train"]["batch_size"]) for values in (x0, t, eps)))
        return {"val_eps": torch.cat([eps_errors(net, diffusion, *part)[1] for part in parts]).mean().item()}

    torch.manual_seed(seed)
    net = build_network(*network).to(device, memory_format=torch.channels_last)
    recipe = {key: value for key, value in cfg["train"].items() if key != "steps"}
    about = {"kind": "digits", "network": list(network), "diffusion": d, "seed": seed, "train": recipe}
    file = out / f"{name.replace(' ', '_')}_w{width}_seed{seed}.pt"
    if file.exists() and read(file, "digits")["step"] > steps:
        raise ValueError(f"{file} is past step {steps}, whose digits are missing in {out}: delete it to train it anew")
    net = fit(net, loss, make_loader(cfg, digits, device), cfg["train"], file, device, about, validate)
    with autocast(cfg["train"]["precision"], device):
        return net, diffusion, validate(net)["val_eps"]


def draw_digits(net, diffusion, seeds, steps, cfg, device):
    """Digits (N, 32, 32) uint8 of the seeds, in `steps` steps of the config's sampler."""
    s, parts = cfg["sample"], []
    eps_fn = guided_eps(net, diffusion)
    for part in tqdm(torch.tensor(seeds).split(100), f"{len(seeds)} digits", unit="batch", leave=False):
        noise = noise_like_seeds(part.tolist(), (1, SIZE, SIZE), device)
        with autocast(cfg["train"]["precision"], device):
            x = sample(eps_fn, noise, diffusion.alpha_bar, s["sampler"], steps, s["eta"])
        parts.append(to_uint8(x)[..., 0])
    return np.concatenate(parts)


# ----------------------------------------------------------------------------------------------------- the study


def make_measure(judge, inception, real, device):
    """A function from digits (N, 32, 32) uint8 to {distance: value}, to the digits `real`, less those `known`."""
    def judge_features(digits):
        return read_by(judge, torch.from_numpy(digits)[:, None].to(device) / 255)[1]

    def inception_features(digits):
        colored = np.repeat(digits[..., None], 3, axis=3)
        return in_batches(inception, colored, "Inception")[:, 64:].double()

    kinds = {"Frechet": judge_features} | ({"FID": inception_features} if inception else {})
    of_real = {kind: features(real) for kind, features in kinds.items()}
    all_real = torch.ones(len(real))

    def measure(digits, known=()):
        return {kind: frechet_distance(features(digits), of_real[kind], torch.ones(len(digits)), all_real).item()
                for kind, features in kinds.items() if kind not in known}

    return measure


def make_plan(cfg, planes, device):
    """{row: {comparison: {"width", "steps", "cost"}}}; the cost is seconds of a step, measured here."""
    steps, width, emb_dim = cfg["train"]["steps"], cfg["model"]["hidden_dim"], cfg["model"]["emb_dim"]
    networks = {}  # of each row, at its own width and with about DDPM's number of parameters; one for DoubleConv
    for name, (block, attention, *_) in ROWS.items():
        matched = match_width(block, attention, width, emb_dim)
        widths = (matched if block == "doubleconv" else width, matched)
        networks[name] = [(block, attention, w, emb_dim) for w in widths]
    costs = measure_costs(set(sum(networks.values(), [])), planes, Diffusion(**cfg["diffusion"]).to(device),
                          cfg["train"], device)
    plan, time_of_ddpm = {}, steps * costs[networks["DDPM"][0]]
    for name, (own, matched) in networks.items():
        same_time = max(1, round(time_of_ddpm / costs[own]))
        if abs(same_time / steps - 1) <= SAME_TIME:
            same_time = steps
        choices = zip(COMPARISONS, (own, own, matched), (steps, same_time, steps))
        plan[name] = {comparison: {"width": network[2], "steps": count, "cost": costs[network]}
                      for comparison, network, count in choices}
    return plan


def points_of(runs, draws):
    """{(width, steps): sets of digits to draw there} of a row: `draws` at its ends in the plan, one on the way."""
    own = runs["equal steps"]
    on_the_way = {(own["width"], max(1, own["steps"] // part)): 1 for part in (4, 2)}
    return dict(sorted((on_the_way | {(run["width"], run["steps"]): draws for run in runs.values()}).items()))


def name_point(name, width, seed, steps, finer=False):
    return f"{name.replace(' ', '_')}_w{width}_seed{seed}_{steps}" + "_finer" * finer


def study(args):
    own_settings = ["data.flip=0", f"data.size=[{SIZE},{SIZE}]", "model.hidden_dim=16", "model.emb_dim=128",
                    "diffusion.prediction=eps", "train.batch_size=32", "train.steps=2500",
                    "sample.sampler=ddim", "sample.steps=50", "sample.eta=1"]  # a deterministic sampler leaves noise
    cfg = load_config(preset="idd_lite", overrides=own_settings + args.set)  # a preset without training settings
    device, out = pick_device(cfg["device"]), args.out
    cfg["train"]["precision"] = pick_precision(cfg["train"]["precision"], device)
    inception = load_inception(args.inception_weights, device) if args.inception_weights else None
    images, labels = read_digits(args.data)
    order = np.random.default_rng(0).permutation(len(images))
    cuts = np.split(order, [len(order) * 6 // 10, len(order) * 9 // 10])
    for_networks, for_judge, held_out = (Digits(images[part], labels[part]) for part in cuts)
    print(f"{len(for_networks)} digits for the networks, {len(for_judge)} for the judge, {len(held_out)} held out")

    (out / "samples").mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    settings = {"digits": [len(images), zlib.crc32(images)], "n": args.n, "draws": args.draws, "config": cfg}
    results = json.loads(file.read_text()) if file.exists() else {"settings": settings, "floor": {}, "points": {}}
    if results["settings"] != settings:
        raise ValueError(f"{file}: begun with other digits, --n, --draws or --set: choose another --out, or delete it")

    def write_results():
        with replacing(file) as opened:
            opened.write(json.dumps(results, indent=1).encode())

    def measure_point(name, width, seed, steps, sets, finer=False):
        """Train to a point, draw `sets` sets of digits there and measure them: what of this is not done yet."""
        key = name_point(name, width, seed, steps, finer)
        samples, point = out / "samples" / f"{key}.npy", results["points"].setdefault(key, {"draws": []})
        if "val_eps" not in point or not samples.exists():
            net, diffusion, val_eps = train_row(name, width, seed, steps, cfg, for_networks, held_out, out, device)
            sampler_steps = cfg["sample"]["steps"] * (FINER if finer else 1)
            with replacing(samples) as opened:
                np.save(opened, draw_digits(net, diffusion, range(1, sets * args.n + 1), sampler_steps, cfg, device))
            point |= {"val_eps": val_eps, "draws": [{} for _ in range(sets)]}
        for draw, digits in zip(point["draws"], np.load(samples).reshape(sets, args.n, SIZE, SIZE)):
            draw |= measure(digits, draw)
        write_results()

    write_results()  # from here on other settings are refused
    # the judge sees no digit that the networks learn from, nor the held-out ones
    judge = train_judge(cfg, for_judge, held_out, out / "judge.pt", device)
    measure = make_measure(judge, inception, held_out.planes[:, 0].numpy(), device)
    results["floor"] |= measure(for_networks.planes[: args.n, 0].numpy(), results["floor"])
    if "plan" not in results:
        results["plan"] = make_plan(cfg, for_networks.planes[: cfg["train"]["batch_size"]].to(device), device)
        write_results()

    for seed in range(args.trainings):
        for name, runs in results["plan"].items():
            for (width, steps), sets in points_of(runs, args.draws).items():  # one training passes through all of them
                measure_point(name, width, seed, steps, sets)
            if seed == 0 and name in ("DDPM", "cosine"):
                run = runs["equal steps"]
                measure_point(name, run["width"], seed, run["steps"], 1, finer=True)
        write_report(results, out, seed + 1, f"{machine(device)}, {cfg['train']['precision']}", len(held_out))
        draw_curves(collect_curves(results, seed + 1), "Frechet distance over seconds of training", True,
                    True).save(out / "curves.png")
    draw_sheet(results["plan"], held_out, out).save(out / "digits.png")
    print(f"\n{out / 'report.md'}, curves.png, digits.png")


# ---------------------------------------------------------------------------------------------------- the report

EXPLANATION = """\
- width factor: the levels have 1, 2, 4 and 4 times as many channels, rounded to multiples of 4.
- s a step: median seconds of a training step, measured in turn with the other networks' before the study began.
- error in eps: mean squared error of the noise predicted in held-out digits, at fixed t and noise; mean of the seeds.
  Not to be compared across schedules: with the cosine a t stands for another level of noise.
- Frechet: distance of {n} drawn digits to the {held_out} held-out ones in the features of the digit classifier Judge;
  no FID. Mean over all trainings and draws.
- Frechet, trainings: mean over the draws of each training seed. What differs by less than these do is not shown to
  differ.
- Frechet, ± of draws: standard deviation over the {draws} sets of digits of one training, the mean over trainings. The
  sets of all trainings and networks begin with the same noise.
- FID: the same three in Inception's 2048 features (torch-fidelity); so few digits make it too high.
- seed 003: the FID by Inception that its Table 1 has for its own networks; an order to compare with, no scale.

Equal steps: all have one width. Equal time: as many steps as fit into the time of DDPM's; within {same_time:.0%} of
these it is the network of equal steps. Equal parameters: the width with which there are as many as DDPM has; within
{same_parameters:.0%} of these it is the network of equal steps, with its own number. DoubleConv is matched in all three
tables. The recipe is one for all, so how well it suits a block is part of what was measured."""


def summarise(points, kind):
    """Cells of a kind of distance: mean, mean of each training, deviation of draws; "-" where not all were measured."""
    titles = kind, f"{kind}, trainings", f"{kind}, ± of draws"
    by_training = [[draw.get(kind) for draw in point["draws"]] for point in points]
    if None in sum(by_training, []):
        return dict.fromkeys(titles, "-")
    means = [statistics.mean(values) for values in by_training]
    cells = [f"{statistics.mean(means):.3g}", "; ".join(f"{value:.3g}" for value in means), ""]
    if len(by_training[0]) > 1:
        cells[2] = f"{statistics.mean(statistics.stdev(values) for values in by_training):.2g}"
    return dict(zip(titles, cells))


def read_points(results, name, width, steps, trainings):
    """What was measured at one of points_of(), for each seed."""
    return [results["points"][name_point(name, width, seed, steps)] for seed in range(trainings)]


def compare_samplers(results):
    """One line: the two schedules with more steps of the sampler, the first training's first set of digits."""
    steps, cells = results["settings"]["config"]["sample"]["steps"], []
    for name in ("DDPM", "cosine"):
        run = results["plan"][name]["equal steps"]
        point, finer = (results["points"][name_point(name, run["width"], 0, run["steps"], finer)]["draws"][0]["Frechet"]
                        for finer in (False, True))
        cells.append(f"{name} {point:.3g} with {steps} steps, {finer:.3g} with {FINER * steps}")
    return f"Is it the schedule, or the sampler on it? Frechet of one set of digits of seed 0: {'; '.join(cells)}."


def write_report(results, out, trainings, made_on, held_out):
    """report.md, and the same on the screen: a table for each comparison, over the first `trainings` seeds."""
    s, floor = results["settings"], results["floor"]
    text = [f"Networks: {trainings} training seed(s), then {s['draws']} draws of {s['n']} digits each. {made_on}.",
            f"Floor, {s['n']} real digits that were trained on, to the held-out ones: {json.dumps(floor)}"]
    for comparison in COMPARISONS:
        rows = []
        for name, (block, attention, _, seed_003) in ROWS.items():
            run = results["plan"][name][comparison]
            points = read_points(results, name, run["width"], run["steps"], trainings)
            parameters = count_parameters(block, attention, run["width"], s["config"]["model"]["emb_dim"])
            row = {"network": name, "width factor": run["width"], "parameters": f"{parameters:,}",
                   "steps": run["steps"], "s a step": run["cost"],
                   "error in eps": statistics.mean(point["val_eps"] for point in points)}
            for kind in floor:
                row |= summarise(points, kind)
            rows.append(row | {"seed 003": seed_003})
        text += [f"## {comparison.capitalize()}", table(rows)]
    text.append(compare_samplers(results))
    text.append(EXPLANATION.format(held_out=held_out, n=s["n"], draws=s["draws"], same_time=SAME_TIME,
                                   same_parameters=SAME_PARAMETERS))
    (out / "report.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    print("\n\n".join(text))


def draw_sheet(plan, held_out, out, rows=10):
    """Real digits, and those of each network after equally many steps: the first seed's, a column each."""
    columns = {"real": held_out.planes[:rows, 0].numpy()}
    for name, runs in plan.items():
        run = runs["equal steps"]
        columns[name] = np.load(out / "samples" / f"{name_point(name, run['width'], 0, run['steps'])}.npy")[:rows]
    shown = [[np.repeat(digit[..., None], 3, axis=2) for digit in row] for row in zip(*columns.values())]
    return contact_sheet(shown, list(columns), least=96)


def collect_curves(results, trainings):
    """{row: {seconds of training at its own width: [Frechet distance of each draw]}}"""
    curves = {}
    for name, runs in results["plan"].items():
        own, curves[name] = runs["equal steps"], {}
        for width, steps in points_of(runs, results["settings"]["draws"]):
            if width == own["width"]:
                points = read_points(results, name, width, steps, trainings)
                curves[name][steps * own["cost"]] = [draw["Frechet"] for point in points for draw in point["draws"]]
    return curves


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="a folder with MNIST's IDX files, of which t10k alone will do; default: a download")
    add("--out", type=Path, default=Path("runs/blocks"), help="the folder of the study; default: %(default)s")
    add("--trainings", type=parse_count, default=2, help="of each network, seeds 0, 1, ...; default: %(default)s")
    add("--draws", type=parse_count, default=3, help="sets of digits from each training; default: %(default)s")
    add("--n", type=parse_count, default=500, help="digits in a set; default: %(default)s")
    add("--inception-weights", metavar="FILE", help="of torch-fidelity's Inception: FID too, an hour, now or later")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of config.yaml: train.steps=1000")
    command(study, parser.parse_args())


if __name__ == "__main__":
    main()
