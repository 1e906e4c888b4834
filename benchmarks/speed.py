"""What each thing done for speed is worth: every one against the plain form of the same thing, in one process.

    python -m benchmarks.speed                           all of it at the size of the preset idd_lite: minutes on a CPU
    python -m benchmarks.speed --only loader groupnorm   some of it
    python -m benchmarks.speed --preset bdd100k --set train.batch_size=1 --only checkpointing

The forms of a thing take turns in rounds, so that whatever else the machine does affects all of them alike. The
tables have the median over the rounds, the range, and `speed`: the median of the plain form's time over this form's
in the same round; the plain form comes first. On a machine with other work only `speed` means something. Precisions,
layouts and torch.compile of a training step are compared by benchmarks.timing.
"""

import argparse
import copy
import math
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.timing import machine, now, peak_memory, table, training_step
from checkpoint import build, pick_device
from config import add_config_arguments, command, load_config
from data.common import write_dataset
from data.toy.prepare import scene
from dataset import Pairs, batches, read_image, unpack
from ddpm import dpm_solver, guided_eps, noise_like_seeds, sample
from masks import Colorbook, one_hot
from unet import UNet

K, W, INTERVAL = 19, 3.0, (0.3, 3.0)  # classes; guidance, and the levels of noise that an interval limits it to


def race(forms, rounds, device, per=1):
    """Rows for a table: the callables of {name: form} take turns; `per` divides the times."""
    for work in forms.values():  # warm-up
        work()
    start = now(device)
    for work in forms.values():
        work()
    turns = math.ceil(0.1 * len(forms) / (now(device) - start))  # short forms are repeated, for about 0.1 s at a time
    seconds = {name: [] for name in forms}
    for _ in tqdm(range(rounds), unit="round", leave=False):
        for name, work in forms.items():
            start = now(device)
            for _ in range(turns):
                work()
            seconds[name].append((now(device) - start) / turns / per)
    plain = next(iter(seconds.values()))
    rows = []
    for name, times in seconds.items():
        speed = statistics.median(a / b for a, b in zip(plain, times))
        rows.append({"form": name, "ms": 1e3 * statistics.median(times), "least": 1e3 * min(times),
                     "most": 1e3 * max(times), "speed": speed})
    return rows


# ------------------------------------------------------------------------------------------------ guidance


def plain_eps(model, diffusion, mask):
    """Guidance as the thesis does it: two passes, and the mask stem in every step."""

    def eps_fn(x, t):
        t = torch.full((len(x),), t, device=x.device)
        out_c, out_u = model(x, t, mask).float(), model(x, t).float()
        return diffusion.to_eps(out_u + W * (out_c - out_u), x, t)

    return eps_fn


def count_passes(make_eps_fn, diffusion, sampler, steps):
    """Passes of the network per image, and runs of its mask stem, in a whole run of a small network."""
    model, calls = UNet(K, 8, 16), {"passes": 0, "mask stem": 0}

    def count(name, _, args, out):
        calls[name] += len(out)

    model.image_stem.register_forward_hook(partial(count, "passes"))
    model.mask_stem.register_forward_hook(partial(count, "mask stem"))
    with torch.no_grad():
        eps_fn = make_eps_fn(model, diffusion, torch.zeros(1, K, 8, 8))
        sample(eps_fn, noise_like_seeds([0], (3, 8, 8)), diffusion.alpha_bar, sampler, steps)
    return calls


@torch.no_grad()
def guidance(cfg, device, rounds):
    """Guided sampling: a step, for one image and for a batch; a step without the network; 20 steps; passes, counted"""
    model, diffusion, autocast = build(cfg, K, device)
    size, T = cfg["data"]["size"], diffusion.T // 2
    steps, samplers = [], []
    for B in (cfg["sample"]["batch_size"], 1):
        x = torch.randn(B, 3, *size, device=device)
        mask = one_hot(torch.randint(K, (B, *size)).byte().to(device), K)
        with autocast():
            eps_fns = {"two passes, mask stem in each step": plain_eps(model, diffusion, mask),
                       "one double batch, mask stem once": guided_eps(model, diffusion, mask, W),
                       "one pass (w = 1)": guided_eps(model, diffusion, mask, 1.0)}
            steps += race({f"{B}: {name}": partial(eps_fn, x, T) for name, eps_fn in eps_fns.items()}, rounds, device)
            no_network = {"": partial(dpm_solver, lambda x, t: x, x, diffusion.alpha_bar, 20)}
            ms = race(no_network, rounds, device, per=20)[0]["ms"]
        samplers.append({"form": f"{B}: the sampler without the network", "ms": ms,
                         "% of one pass": 100 * ms / steps[-1]["ms"]})

    # runs of one image: x and mask are the last ones
    ways = {"two passes, mask stem in each step": plain_eps, "ours": partial(guided_eps, guidance=W),
            f"ours, guidance at noise {INTERVAL}": partial(guided_eps, guidance=W, interval=INTERVAL)}
    forms, counts = {}, []
    for name, way in ways.items():
        forms[f"20 steps: {name}"] = lambda way=way: dpm_solver(way(model, diffusion, mask), x, diffusion.alpha_bar, 20)
    with autocast():
        runs = race(forms, rounds, device)
    for sampler, n in (("ddpm", diffusion.T), ("dpm_solver", 20)):
        for name, way in ways.items():
            counts.append({"form": f"{sampler}, {n} steps: {name}"} | count_passes(way, diffusion, sampler, n))
            counts[-1]["speed"] = counts[0]["passes"] / counts[-1]["passes"]
    return [steps, samplers, runs, counts]


# -------------------------------------------------------------------------------------------------- loader


class PlainPairs(Dataset):
    """The thesis's way: read an RGB mask, compare it with every colour, and hand float planes to the collate."""

    def __init__(self, folder, colorbook):
        self.files, self.colorbook = sorted((folder / "images").iterdir()), colorbook

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image = read_image(self.files[i])
        mask = read_image(self.files[i].parents[1] / "rgb" / self.files[i].name)
        planes = np.stack([(mask == color).all(axis=-1) for color in self.colorbook.colors]).astype(np.float32)
        return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1), torch.from_numpy(planes)


def loader(cfg, device, rounds):
    """A pair, from the data set to image and one-hot mask on the device: toy scenes, 128x128, batches of 32"""
    size, B, colorbook = (128, 128), 32, Colorbook.load("colorbook.json")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "prepared"
        write_dataset(root, colorbook, {"train": [(f"{i}", partial(scene, i, size)) for i in range(B)]})
        pairs = Pairs(root, "train", size)
        (root / "train" / "rgb").mkdir()
        for (_, file, _), planes in zip(pairs.files, pairs.planes.numpy()):
            Image.fromarray(colorbook.paint(planes[3])).save(root / "train" / "rgb" / file.name)
        plain = DataLoader(PlainPairs(root / "train", colorbook), B)
        ours = batches(pairs, B, 0, flip=0.5, device=device)
        forms = {"the thesis's loader, one process": lambda: [[x.to(device) for x in batch] for batch in plain],
                 "ours": lambda: unpack(next(ours), K)}
        rows = race(forms, rounds, device, per=B)
        bytes_per_pair = [sum(x[0].nbytes for x in next(iter(plain))), next(ours)[0].nbytes]
        ours.close()  # ends its thread
    return [[row | {"MB per pair": n / 1e6} for row, n in zip(rows, bytes_per_pair)]]


# ------------------------------------------------------------------------------------------------ training


def optimiser(cfg, device, rounds):
    """A step of AdamW, and one of the averaged weights"""
    model = build(cfg, K, device)[0]
    ema = copy.deepcopy(model).requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.randn_like(p)

    @torch.no_grad()
    def one_by_one():
        for averaged, p in zip(ema.parameters(), model.parameters()):
            averaged.lerp_(p, 0.005)

    @torch.no_grad()
    def together():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 0.005)

    AdamW = partial(torch.optim.AdamW, list(model.parameters()), lr=1e-5)
    steps = {"AdamW, for loop": AdamW(foreach=False).step, "AdamW, foreach": AdamW(foreach=True).step,
             "AdamW, fused": AdamW(fused=True).step}
    return [race(steps, rounds, device), race({"EMA, for loop": one_by_one, "EMA, foreach": together}, rounds, device)]


def groupnorm(cfg, device, rounds):
    """Shares of the operations in a training step, in %"""
    ops = "native_group_norm", "native_group_norm_backward", "gelu", "gelu_backward", "convolution_backward"
    rows = []
    for precision in ("fp32", "bf16"):
        step, _ = training_step(cfg | {"train": cfg["train"] | {"precision": precision}}, K, device)
        with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
            for _ in range(3):
                step()
        times = {}
        for event in profile.key_averages():
            if event.key.startswith("aten::"):
                cuda = device.type == "cuda"
                times[event.key[6:]] = event.self_device_time_total if cuda else event.self_cpu_time_total
        rows.append({"precision": precision} | {op: 100 * times[op] / sum(times.values()) for op in ops})
    return [rows]


def checkpointing(cfg, device, rounds):
    """A training step that keeps all activations, or only the borders of the blocks"""
    forms = {}
    for name, activation_checkpointing in (("all activations kept", False), ("checkpointing", True)):
        changed = cfg["train"] | {"activation_checkpointing": activation_checkpointing}
        forms[name] = training_step(cfg | {"train": changed}, K, device)
    rows = race({name: step for name, (step, _) in forms.items()}, rounds, device)
    for row, (step, held) in zip(rows, forms.values()):
        row["peak GiB"] = peak_memory(step, held, device) / 2**30
    return [rows]


PARTS = {part.__name__: part for part in (guidance, loader, optimiser, groupnorm, checkpointing)}


def speed(cfg, device, only, rounds):
    """Print the tables of the named parts; returns {part: its tables}."""
    print(f"{machine(device)}; {cfg['data']['size']}, hidden {cfg['model']['hidden_dim']}, "
          f"batch {cfg['train']['batch_size']}, {rounds} rounds")
    tables = {}
    for name in only:
        tables[name] = PARTS[name](cfg, device, rounds)
        print(f"\n{name}. {PARTS[name].__doc__}\n\n" + "\n\n".join(map(table, tables[name])), flush=True)
    return tables


def run(args):
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: expected 1 or more")
    cfg = load_config(args.config, args.preset, args.set)
    speed(cfg, pick_device(cfg["device"]), args.only, args.rounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_config_arguments(parser)
    parser.set_defaults(preset="idd_lite")
    add("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
        help=f"some of {', '.join(PARTS)}")
    add("--rounds", type=int, default=7, help="(default: %(default)s)")
    command(run, parser.parse_args())


if __name__ == "__main__":
    main()
