"""How long images and training take on this device, beside the thesis's Table 2, and how near that is to the hardware.

    python -m benchmarks.timing                              the preset of config.yaml: minutes on a CPU
    python -m benchmarks.timing --preset bdd100k --modes eager compiled --layouts channels_last contiguous
                                                             all of it at the thesis's size, for a GPU
    python -m benchmarks.timing --images                     training alone; --precisions alone: sampling alone

Sampling: the real samplers on random masks, after a warm-up, guidance at every step, at sample.precision and
train.compile of the config. Of a run longer than --timed-steps only that many steps are timed: the time to the end
of the first one, plus the median of the others for each that is left, since every step is the same work. Training:
train.py's step (batch to the device, loss, backward, clipping, AdamW, EMA) on random pairs; fp32 has TF32 off, unlike
train.py and sampling, which leave cuDNN's default on. Peak memory is that of tensors: on CUDA the allocator's, on a
CPU the profiler's. The device's rate is that of a large matrix product at the same precision in the same run; the
network's operations are counted by torch.
"""

import argparse
import copy
import gc
import platform
import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from checkpoint import build, pick_device, pick_precision
from config import add_config_arguments, command, load_config
from ddpm import guided_eps, noise_like_seeds, sample
from masks import Colorbook, one_hot
from train import train_step, wrap

# Bozsó 2023, Table 2: images, then seconds for 1000 steps with and without a mask, V100. The two differ by the mask
# stem's share of the work, so each is one pass per step; guidance takes two.
THESIS = {1: (75, 71), 2: (95, 91), 4: (139, 135), 8: (227, 221), 16: (298, 288), 32: (538, 522), 64: (1272, 1247)}
PRECISIONS = ["fp32", "tf32", "fp16", "bf16"]
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

# ------------------------------------------------------------------------------------------------ measuring


def now(device):
    """Seconds, once the device has done all that it was given."""
    getattr(torch, device.type).synchronize()
    return time.perf_counter()


def machine(device):
    """What a figure has to be read with: the device's name, threads, torch's version."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor() or platform.machine()
    return f"{device.type}: {name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def count_flops(cfg, num_classes):
    """Floating-point operations per image: a forward pass with mask, and a training step's forward and backward."""
    model, diffusion, _ = build(cfg, num_classes, torch.device("meta"))  # shapes alone: nothing is computed
    x0 = torch.zeros(1, 3, *cfg["data"]["size"], device="meta")
    mask = torch.zeros(1, num_classes, *cfg["data"]["size"], device="meta") if model.num_classes else None
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(x0, torch.zeros(1, device="meta"), mask)
    with FlopCounterMode(display=False) as training:
        diffusion.loss(model, x0, mask, *diffusion.draw(x0.shape, 0.1, "meta")).backward()
    return forward.get_total_flops(), training.get_total_flops()


def set_precision(precision):
    """TF32 on for "tf32" alone (cuDNN has it on by default, even in float32); returns autocast's name of it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return "fp32" if precision == "tf32" else precision


def matrix_rate(device, precision):
    """The best of five products of two (n, n) matrices, in operations per second."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[set_precision(precision)]
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = now(device)
        a @ b
        best = min(best, now(device) - start)
    return 2 * n**3 / best


def peak_memory(work, held, device):
    """Bytes of tensors at the worst moment of work(); held: the tensors that are there all along. NaN where unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return float("nan")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    total = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak + sum(t.numel() * t.element_size() for t in held)


def minutes(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}" if seconds >= 60 else f"{seconds:.3g} s"


def table(rows):
    """Dicts of equal keys as a Markdown table; numbers with three digits."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lines.append([f"{value:.3g}" if type(value) is float else str(value) for value in row.values()])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ------------------------------------------------------------------------------------------------ sampling


def extrapolate(marks, steps):
    """Seconds for `steps` steps, from the moments at which the first few ended; all but the first are equally long."""
    return marks[0] + (steps - 1) * statistics.median(b - a for a, b in zip(marks, marks[1:]))


@torch.no_grad()
def sampling_seconds(model, diffusion, mask, n, size, sampler, steps, guidance, timed, device):
    """Seconds for n images: guidance's set-up, `timed` of the steps, and the rest extrapolated."""
    marks, timed = [], min(timed, steps)
    start = now(device)
    eps_fn = guided_eps(model, diffusion, mask, guidance)
    noise = noise_like_seeds(range(n), (3, *size), device)
    alpha_bar = diffusion.alpha_bar
    if sampler == "ddpm":
        alpha_bar = alpha_bar[:timed]  # it walks all that it is given
    sample(eps_fn, noise, alpha_bar, sampler, timed, observe=lambda *_: marks.append(now(device) - start))
    return now(device) - start if timed == steps else extrapolate(marks, steps)


def time_sampling(cfg, num_classes, device, counts, timed):
    """A row for each number of images: ddpm and a fast sampler, each with w = 1, with guidance, without mask."""
    cfg = copy.deepcopy(cfg)
    s, size, c = cfg["sample"], cfg["data"]["size"], cfg["train"]
    c["precision"] = pick_precision(s["precision"], device)
    model, diffusion, autocast = build(cfg, num_classes, device)
    model.eval()
    fast = "dpm_solver" if s["sampler"] == "ddpm" else s["sampler"]
    w = s["guidance"] if s["guidance"] not in (0, 1) else 3.0
    for n in tqdm(counts, unit="batch", desc="sampling"):
        torch.compiler.reset()
        if c["compile"]:
            model.compile(dynamic=False)
        forms = {"no mask": (None, 0.0)}
        if model.num_classes:
            mask = one_hot(torch.randint(num_classes, (n, *size)).byte().to(device), num_classes)
            forms = {"w = 1": (mask, 1.0), f"w = {w:g}": (mask, w)} | forms
        thesis = [minutes(seconds) for seconds in THESIS[n]] if n in THESIS else ["-", "-"]
        row = {"images": n, "thesis, mask": thesis[0], "thesis, no mask": thesis[1]}
        for sampler, steps in (("ddpm", diffusion.T), (fast, s["steps"])):
            for name, (m, guidance) in forms.items():
                args = model, diffusion, m, n, size, sampler, steps, guidance
                try:
                    with autocast():
                        sampling_seconds(*args, 3, device)  # warm-up: kernels are chosen, or compiled
                        row[f"{sampler} {steps}, {name}"] = minutes(sampling_seconds(*args, timed, device))
                except torch.OutOfMemoryError:
                    row[f"{sampler} {steps}, {name}"] = "out of memory"
        yield row


# ------------------------------------------------------------------------------------------------ training


def training_step(cfg, num_classes, device, layout="channels_last", compiled=False):
    """train.py's step on one random batch, as a function that has run once, and the tensors that stay between steps."""
    c, size = cfg["train"], cfg["data"]["size"]
    B = c["batch_size"]
    torch.manual_seed(cfg["seed"])
    model, diffusion, autocast = build(cfg, num_classes, device)
    model.to(memory_format=LAYOUTS[layout])
    ema = copy.deepcopy(model).requires_grad_(False)
    net = wrap(model, c | {"compile": compiled}, 1, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c["lr"], fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=c["precision"] == "fp16")
    planes = torch.cat([torch.randint(256, (B, 3, *size)), torch.randint(num_classes, (B, 1, *size))], dim=1).byte()
    planes = planes.pin_memory() if device.type == "cuda" else planes

    def step():
        drawn = diffusion.draw((B, 3, *size), c["label_drop"], device)
        batch = planes.to(device, non_blocking=True)
        train_step(net, model.num_classes, diffusion, optimizer, scaler, autocast, c, batch, drawn)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - c["ema"])

    step()
    moments = [v for state in optimizer.state.values() for v in state.values()]
    return step, [*model.parameters(), *ema.parameters(), *moments]


def time_training(cfg, num_classes, device, precision, mode, layout, repeats):
    """Images per second (median) of a training step, and its peak memory in bytes."""
    cfg = copy.deepcopy(cfg)
    cfg["train"]["precision"] = set_precision(precision)
    torch.compiler.reset()
    gc.collect()  # the networks of the rows before
    step, held = training_step(cfg, num_classes, device, layout, mode == "compiled")
    step()
    seconds = []
    for _ in range(repeats):
        start = now(device)
        step()
        seconds.append(now(device) - start)
    return cfg["train"]["batch_size"] / statistics.median(seconds), peak_memory(step, held, device)


def training_rows(cfg, num_classes, device, variants, operations, repeats):
    """A row for each (precision, mode, layout): images/s, peak memory, and the share of the device's matrix rate."""
    rates = {precision: matrix_rate(device, precision) for precision, *_ in variants}
    for precision, mode, layout in tqdm(variants, unit="variant", desc="training"):
        row = {"precision": precision, "mode": mode, "layout": layout, "images/s": "-", "peak GiB": "-",
               "% of rate": "-", "rate, TFLOP/s": rates[precision] / 1e12, "note": ""}
        try:
            rate, peak = time_training(cfg, num_classes, device, precision, mode, layout, repeats)
            row |= {"images/s": rate, "peak GiB": peak / 2**30, "% of rate": 100 * rate * operations / rates[precision]}
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
        except RuntimeError as error:
            if mode != "compiled":
                raise
            row["note"] = f"not compiled: {str(error).strip().splitlines()[0][:80]}"  # no C++ compiler, say
        yield row


# ---------------------------------------------------------------------------------------------------- both


def print_rows(rows):
    """A Markdown table, printed row by row as they come, so that Ctrl-C keeps what was measured; returns the rows."""
    printed = []
    for row in rows:
        lines = table([row]).splitlines()
        tqdm.write("\n".join(lines[2:] if printed else lines))
        printed.append(row)
    return printed


def timing(cfg, device, counts, timed, precisions, modes, layouts):
    """Print the tables of sampling and training; returns the rows of both."""
    book = Path(cfg["data"]["root"]) / "colorbook.json"
    num_classes = len(Colorbook.load(book if book.exists() else "colorbook.json"))
    forward, training = count_flops(cfg, num_classes)
    size, B = "x".join(map(str, cfg["data"]["size"])), cfg["train"]["batch_size"]
    print(f"{machine(device)}\n{size}, hidden {cfg['model']['hidden_dim']}, {num_classes} classes, batch {B}: "
          f"{forward / 1e9:.1f} GFLOP in a forward pass, {training / 1e9:.1f} for a training image")
    torch.backends.cudnn.benchmark = True  # as in train.py and sample.py

    sampling_table, training_table = [], []
    if counts:
        print("\nTime for so many images at once. The thesis (V100, 128x128, 88.8 M parameters) has one pass a step,\n"
              "as w = 1 and no mask have here; guidance takes two.\n"
              f"{timed} steps of each run are timed, the rest extrapolated.\n")
        sampling_table = print_rows(time_sampling(cfg, num_classes, device, counts, timed))
    variants = [(precision, mode, layout) for precision in precisions for mode in modes for layout in layouts]
    if variants:
        print(f"\nTraining in steps of {B}; the thesis: 15.0 images/s. Rate: that of a matrix product here.\n")
        training_table = print_rows(training_rows(cfg, num_classes, device, variants, training, timed))
    return sampling_table, training_table


def run(args):
    cfg = load_config(args.config, args.preset, args.set)
    device = pick_device(cfg["device"])
    default_steps, default_precisions = (20, PRECISIONS) if device.type == "cuda" else (3, ["fp32", "bf16"])
    timed = default_steps if args.timed_steps is None else args.timed_steps
    if timed < 3 or min(args.images, default=1) < 1:
        raise ValueError(f"expected --timed-steps of 3 or more, --images of 1 or more; got {timed} and {args.images}")
    precisions = default_precisions if args.precisions is None else args.precisions
    timing(cfg, device, args.images, timed, precisions, args.modes, args.layouts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_config_arguments(parser)
    add("--images", type=int, nargs="*", default=list(THESIS), metavar="N", help="(default: the thesis's rows)")
    add("--timed-steps", type=int, metavar="N", help="of each run, 3 or more (default: 20 on CUDA, else 3)")
    add("--precisions", nargs="*", choices=PRECISIONS, help="of training (default: all on CUDA, else fp32 bf16)")
    add("--modes", nargs="+", choices=["eager", "compiled"], default=["eager"], help="(default: eager)")
    add("--layouts", nargs="+", choices=list(LAYOUTS), default=["channels_last"], help="(default: channels_last)")
    command(run, parser.parse_args())


if __name__ == "__main__":
    main()
