"""What each thing done for speed is worth: every one against the plain form of the same thing, in one process.

    python -m benchmarks.speed                           all of it at the size of the preset idd_lite: minutes on a CPU
    python -m benchmarks.speed --only loader groupnorm   some of it
    python -m benchmarks.speed --preset bdd100k --set train.batch_size=1 --only checkpointing

The forms of a thing take turns in rounds, so that whatever else the machine does meets all of them alike. Shown are the median over
the rounds, the range, and `speed`: the median of the plain form's time over this form's in the same round; the plain form comes
first. On a machine with other work only `speed` means something.
"""

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.timing import LAYOUTS, machine, now, peak_memory, table
from checkpoint import build, pick_device
from config import add_config_arguments, load_config
from data.common import write_dataset
from data.toy.prepare import scene
from dataset import Pairs, batches, read_image, unpack
from ddpm import dpm_solver, guided_eps, noise_like_seeds, sample
from masks import Colorbook, one_hot
from unet import UNet

K, W, INTERVAL = 19, 3.0, (0.3, 3.0)  # classes; guidance, and the levels of noise that an interval limits it to


def race(forms, rounds, device, per=1, **columns):
    """Rows for a table: the callables of {name: form} take turns. per divides the times; columns are {title: {name: value}}."""
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
    return [{"form": name, "ms": 1e3 * statistics.median(times), "least": 1e3 * min(times), "most": 1e3 * max(times),
             "speed": statistics.median(a / b for a, b in zip(plain, times))} | {k: v.get(name) for k, v in columns.items()}
            for name, times in seconds.items()]


def prepared(cfg, device, precision=None, B=None):
    """Network, diffusion and autocast of a config at a precision, and random images (B, 3, H, W) with masks (B, K, H, W)."""
    cfg = copy.deepcopy(cfg)
    cfg["train"]["precision"] = precision or cfg["train"]["precision"]
    B, size = B or cfg["train"]["batch_size"], cfg["data"]["size"]
    mask = one_hot(torch.randint(K, (B, *size)).byte().to(device), K)
    return *build(cfg, K, device), torch.rand(B, 3, *size, device=device) * 2 - 1, mask


def training_step(cfg, device, precision=None, layout="channels_last", change=lambda model: None):
    """A function that does forward and backward on one batch, and the network, which change(model) alters before."""
    model, diffusion, autocast, x0, mask = prepared(cfg, device, precision)
    model.to(memory_format=LAYOUTS[layout])
    change(model)

    def step():
        model.zero_grad()
        with autocast():
            loss = diffusion.loss(model, x0, mask)
        loss.backward()

    return step, model


def plain_eps(model, diffusion, mask):
    """Guidance as the thesis does it: two passes, and the mask stem in every step."""

    def eps_fn(x, t):
        t = torch.full((len(x),), t, device=x.device)
        out_c, out_u = model(x, t, mask).float(), model(x, t).float()
        return diffusion.to_eps(out_u + W * (out_c - out_u), x, t)

    return eps_fn


def count_passes(way, diffusion, sampler, steps):
    """Passes of the network per picture, and runs of its mask stem, in a whole run of a small network."""
    model, calls = UNet(K, 8, 16), {"passes": 0, "mask stem": 0}

    def count(name, _, args, out):
        calls[name] += len(out)

    model.image_stem.register_forward_hook(partial(count, "passes"))
    model.mask_stem.register_forward_hook(partial(count, "mask stem"))
    with torch.no_grad():
        sample(way(model, diffusion, torch.zeros(1, K, 8, 8)), noise_like_seeds([0], (3, 8, 8)), diffusion.alpha_bar, sampler, steps)
    return calls


@torch.no_grad()
def guidance(cfg, device, rounds):
    """Guided sampling: a step, for one picture and for a batch; a step without the network; a run of 20 steps; passes, counted"""
    steps, alone = [], []
    for B in (1, cfg["sample"]["batch_size"]):
        model, diffusion, autocast, x, mask = prepared(cfg, device, B=B)
        T = diffusion.T // 2
        with autocast():
            forms = {f"{B}: two passes, mask stem in each step": partial(plain_eps(model, diffusion, mask), x, T),
                     f"{B}: two passes, mask stem once": partial(guided_eps(model, diffusion, mask, W, one_batch=False), x, T),
                     f"{B}: one double batch, mask stem once": partial(guided_eps(model, diffusion, mask, W), x, T),
                     f"{B}: one pass (w = 1)": partial(guided_eps(model, diffusion, mask, 1.0), x, T)}
            steps += race(forms, rounds, device)
            ms = race({"": partial(dpm_solver, lambda x, t: x, x, diffusion.alpha_bar, 20)}, rounds, device, per=20)[0]["ms"]
        alone.append({"form": f"{B}: the sampler without the network", "ms": ms, "% of one pass": 100 * ms / steps[-1]["ms"]})
    model, diffusion, autocast, x, mask = prepared(cfg, device, B=1)
    ways = {"two passes, mask stem in each step": plain_eps, "ours": partial(guided_eps, guidance=W),
            f"ours, guidance at noise {INTERVAL}": partial(guided_eps, guidance=W, interval=INTERVAL)}
    with autocast():
        runs = race({f"20 steps: {name}": lambda way=way: dpm_solver(way(model, diffusion, mask), x, diffusion.alpha_bar, 20)
                     for name, way in ways.items()}, rounds, device)
    counts = [{"form": f"{sampler}, {n} steps: {name}"} | count_passes(way, diffusion, sampler, n)
              for sampler, n in (("ddpm", diffusion.T), ("dpm_solver", 20)) for name, way in ways.items()]
    return [steps, alone, runs, [row | {"speed": counts[0]["passes"] / row["passes"]} for row in counts]]


class PlainPairs(Dataset):
    """The thesis's way: read an RGB mask, compare it with every colour, and hand float planes to the collate."""

    def __init__(self, folder, colorbook):
        self.files, self.colorbook = sorted((folder / "images").iterdir()), colorbook

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image, mask = read_image(self.files[i]), read_image(self.files[i].parents[1] / "rgb" / self.files[i].name)
        planes = np.stack([(mask == color).all(axis=-1) for color in self.colorbook.colors]).astype(np.float32)
        return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1), torch.from_numpy(planes)


def loader(cfg, device, rounds):
    """A pair, from the data set to images and one-hot masks on the device: toy scenes of 128x128, 19 classes, batches of 32"""
    size, B, colorbook = (128, 128), 32, Colorbook.load("colorbook.json")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "prepared"
        write_dataset(root, colorbook, {"train": [(f"{i}", partial(scene, i, size)) for i in range(B)]})
        pairs = Pairs(root, "train", size)
        (root / "train" / "rgb").mkdir()
        for (_, file, _), planes in zip(pairs.files, pairs.planes.numpy()):
            Image.fromarray(colorbook.paint(planes[3])).save(root / "train" / "rgb" / file.name)
        plain, ours = DataLoader(PlainPairs(root / "train", colorbook), B), batches(pairs, B, 0, flip=0.5, device=device)
        forms = {"the thesis's loader, one process": lambda: [[x.to(device) for x in batch] for batch in plain],
                 "ours": lambda: unpack(next(ours), K)}
        carried = dict(zip(forms, (4 * (3 + K) * size[0] * size[1] / 1e6, 4 * size[0] * size[1] / 1e6)))
        rows = race(forms, rounds, device, per=B, **{"MB per pair": carried})
        ours.close()  # ends its thread
    return [rows]


def optimiser(cfg, device, rounds):
    """A step of AdamW, and one of the averaged weights"""
    model = prepared(cfg, device)[0]
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

    adamw = {"AdamW, for loop": {"foreach": False}, "AdamW, foreach": {"foreach": True}, "AdamW, fused": {"fused": True}}
    return [race({name: torch.optim.AdamW(model.parameters(), lr=1e-5, **how).step for name, how in adamw.items()}, rounds, device),
            race({"EMA, for loop": one_by_one, "EMA, foreach": together}, rounds, device)]


def layout(cfg, device, rounds):
    """Forward and backward of a training batch, by precision and memory layout"""
    return [race({f"{precision}, {name}": training_step(cfg, device, precision, name)[0]
                  for precision in ("fp32", "bf16") for name in ("contiguous", "channels_last")}, rounds, device)]


def native(x, w, b):
    return F.group_norm(x, 1, w.to(x.dtype), b.to(x.dtype))


def in_float32(x, w, b):
    return F.group_norm(x.float(), 1, w, b).to(x.dtype)


def layer_norm(x, w, b):
    """Over (C, H, W) in the order in which they lie in memory."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    x = x.permute(0, 2, 3, 1) if last else x
    y = F.layer_norm(x, x.shape[1:])
    return torch.addcmul(b[:, None, None], y.permute(0, 3, 1, 2) if last else y, w[:, None, None])


def var_mean(x, w, b):
    var, mean = torch.var_mean(x, dim=(1, 2, 3), correction=0, keepdim=True)
    scale = (var + 1e-5).rsqrt() * w[:, None, None]
    return torch.addcmul(b[:, None, None] - mean * scale, x, scale)


def groupnorm(cfg, device, rounds):
    """GroupNorm(1): shares of the operations in a forward and backward, in %; then other ways to compute it, forward and backward"""
    cuda, tables = device.type == "cuda", [[]]
    ops = "native_group_norm", "native_group_norm_backward", "gelu", "gelu_backward", "convolution_backward"
    for precision in ("fp32", "bf16"):
        step = training_step(cfg, device, precision)[0]
        step()
        with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
            for _ in range(3):
                step()
        times = {e.key[6:]: e.self_device_time_total if cuda else e.self_cpu_time_total for e in profile.key_averages() if e.key.startswith("aten::")}
        tables[0].append({"precision": precision} | {op: 100 * times[op] / sum(times.values()) for op in ops})

    shape = cfg["train"]["batch_size"], cfg["model"]["hidden_dim"], *cfg["data"]["size"]
    for dtype in (torch.float32, torch.bfloat16):
        forms, (w, b) = {}, (torch.randn(shape[1], device=device, requires_grad=True) for _ in "wb")
        ways = {"F.group_norm": native, "F.layer_norm": layer_norm, "torch.var_mean": var_mean}
        ways |= {} if dtype is torch.float32 else {"F.group_norm in float32": in_float32}
        for name, way in ways.items():
            for order, memory_format in LAYOUTS.items():
                x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
                forms[f"{str(dtype)[6:]}, {order}, {name}"] = lambda way=way, x=x, w=w, b=b: torch.autograd.grad(way(x, w, b), (x, w, b), x)
        tables.append(race(forms, rounds, device))
    return tables


def checkpointing(cfg, device, rounds):
    """Forward and backward of a training batch that keeps all activations, or only the borders of the blocks"""

    def borders(model):
        for block in model.children():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    forms = {"all activations kept": training_step(cfg, device), "checkpointing": training_step(cfg, device, change=borders)}
    rows = race({name: step for name, (step, _) in forms.items()}, rounds, device)
    for row, (step, model) in zip(rows, forms.values()):
        model.zero_grad()
        row["peak GiB"] = peak_memory(step, [*model.parameters()], device) / 2**30
    return [rows]


def compiled(cfg, device, rounds):
    """Forward and backward of a training batch, eager and by torch.compile; the first step compiles, unless it is in torch's cache"""
    tables = []
    for precision in ("fp32", "bf16"):
        forms, seconds = {f"{precision}, eager": training_step(cfg, device, precision)[0]}, {}
        for name in LAYOUTS:
            torch.compiler.reset()
            forms[f"{precision}, compiled, {name}"] = step = training_step(cfg, device, precision, name, torch.nn.Module.compile)[0]
            start = time.perf_counter()
            step()
            seconds[f"{precision}, compiled, {name}"] = time.perf_counter() - start
        tables.append(race(forms, rounds, device, **{"first step, s": seconds}))
    return tables


PARTS = {part.__name__: part for part in (guidance, loader, optimiser, layout, groupnorm, checkpointing, compiled)}


def benchmark(cfg, device, only, rounds, out):
    """The tables of the named parts on the screen, and their rows in a JSON file, after each; returns what is in it."""
    result = machine(device) | {"size": cfg["data"]["size"], "hidden_dim": cfg["model"]["hidden_dim"], "rounds": rounds,
                                "batch_size": cfg["train"]["batch_size"]}
    print(", ".join(f"{k} {v}" for k, v in result.items()))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    for name in only:
        try:
            result[name] = PARTS[name](cfg, device, rounds)
        except RuntimeError as error:
            if name != "compiled":
                raise
            result[name] = [[{"not compiled": str(error).strip().splitlines()[0]}]]  # no C++ compiler, say
        print(f"\n{name}. {PARTS[name].__doc__}\n\n" + "\n\n".join(map(table, result[name])))
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{out}: the same figures")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.set_defaults(preset="idd_lite")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="cpu", help="(default: %(default)s)")
    parser.add_argument("--out", default="out/benchmark.json", help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        if args.rounds < 1:
            raise ValueError(f"--rounds {args.rounds}: expected 1 or more")
        benchmark(load_config(args.config, args.preset, args.set), pick_device(args.device), args.only, args.rounds, args.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


if __name__ == "__main__":
    main()
