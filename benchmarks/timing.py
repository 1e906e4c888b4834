"""How long pictures and training take on this device, beside the thesis's Table 2, and how near that is to the hardware.

    python -m benchmarks.timing                              the preset of config.yaml: minutes on a CPU
    python -m benchmarks.timing --preset bdd100k --modes eager compiled --layouts channels_last contiguous
                                                              all of it at the thesis's size, for a GPU
    python -m benchmarks.timing --pictures 1 4 --full        every step of the 1000 is taken, none is extrapolated

Sampling: the real samplers on random masks, after a warm-up, guidance at every step, at sample.precision and sample.compile of the
config. Of a run longer than --timed-steps only that many steps are timed: the time to the end of the first one, plus the median of
the others for each that is left, since every step is the same work. Training: train.py's step (batch to the device, loss, backward,
clipping, AdamW, EMA) on random pairs; fp32 has TF32 off, unlike train.py and sampling, which leave cuDNN's default on. Peak
memory is that of tensors: on CUDA the allocator's, on a CPU the profiler's. The device's rate is that of a large matrix product
at the same precision in the same run; the network's operations are counted by torch, not assumed.
"""

import argparse
import copy
import gc
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from checkpoint import build, pick_device
from config import add_config_arguments, load_config
from dataset import unpack
from ddpm import guided_eps, noise_like_seeds, sample
from masks import Colorbook, one_hot

# Bozsó 2023, Table 2: pictures, then seconds for 1000 steps with and without a mask, V100. The two differ by the mask stem's
# share of the work, so each is one pass per step; guidance takes two.
THESIS = {1: (75, 71), 2: (95, 91), 4: (139, 135), 8: (227, 221), 16: (298, 288), 32: (538, 522), 64: (1272, 1247)}
PRECISIONS = ["fp32", "tf32", "fp16", "bf16"]
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def now(device):
    """Seconds, once the device has done all that it was given."""
    getattr(torch, device.type).synchronize()
    return time.perf_counter()


def machine(device):
    """{"device", "threads", "torch"}: what a figure has to be read with."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"device": f"{device.type}: {name or platform.machine()}", "threads": torch.get_num_threads(), "torch": torch.__version__}


def count_flops(cfg, num_classes):
    """Floating-point operations per picture: a forward pass with mask, and a training step's forward and backward."""
    model, diffusion, _ = build(cfg, num_classes, torch.device("meta"))  # shapes alone: nothing is computed
    x0 = torch.zeros(1, 3, *cfg["data"]["size"], device="meta")
    mask = torch.zeros(1, num_classes, *cfg["data"]["size"], device="meta") if model.num_classes else None
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(x0, torch.zeros(1, device="meta"), mask)
    with FlopCounterMode(display=False) as training:
        diffusion.loss(model, x0, mask).backward()
    return forward.get_total_flops(), training.get_total_flops()


def set_precision(precision):
    """TF32 on for "tf32" alone (cuDNN has it on by default, even in float32); gives autocast's name of the precision."""
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
    """Bytes of tensors at the worst moment of work(); held: the tensors that are there all along. None where unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    total = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak + sum(t.numel() * t.element_size() for t in held)


def extrapolate(marks, steps):
    """Seconds for `steps` steps from the moments at which the first few of them ended, all but the first of equal length."""
    return marks[0] + (steps - 1) * statistics.median(b - a for a, b in zip(marks, marks[1:]))


@torch.no_grad()
def sampling_seconds(model, diffusion, mask, n, size, sampler, steps, guidance, one_batch, timed, device):
    """Seconds for n pictures: guidance's set-up, `timed` of the steps, and the rest extrapolated."""
    marks, timed = [], min(timed, steps)
    start = now(device)
    eps_fn = guided_eps(model, diffusion, mask, guidance, one_batch)
    noise = noise_like_seeds(range(n), (3, *size), device)
    alpha_bar = diffusion.alpha_bar[:timed] if sampler == "ddpm" else diffusion.alpha_bar  # ddpm walks all that it is given
    sample(eps_fn, noise, alpha_bar, sampler, timed, observe=lambda *_: marks.append(now(device) - start))
    return now(device) - start if timed == steps else extrapolate(marks, steps)


def time_sampling(cfg, num_classes, device, pictures, timed):
    """A row of seconds per number of pictures: the chain and the fast sampler, without and with guidance, and without mask."""
    cfg = copy.deepcopy(cfg)
    s, size, c = cfg["sample"], cfg["data"]["size"], cfg["train"]
    if s["precision"] != "auto":  # as in sample.py
        c["precision"] = s["precision"]
    elif device.type != "cuda" and c["precision"] == "fp16":
        c["precision"] = "fp32"
    model, diffusion, autocast = build(cfg, num_classes, device)
    model.eval()
    fast = "dpm_solver" if s["sampler"] == "ddpm" else s["sampler"]
    w = s["guidance"] if s["guidance"] not in (0, 1) else 3.0
    for n in tqdm(pictures, unit="batch", desc="sampling"):
        row = {"pictures": n}
        torch.compiler.reset()
        if s["compile"]:
            model.compile(dynamic=False)
        mask = one_hot(torch.randint(num_classes, (n, *size)).byte().to(device), num_classes) if model.num_classes else None
        for sampler, steps in (("ddpm", diffusion.T), (fast, s["steps"])):
            for name, m, guidance in (("w = 1", mask, 1.0), (f"w = {w:g}", mask, w), ("no mask", None, 0.0)):
                if m is not None or name == "no mask":
                    args = model, diffusion, m, n, size, sampler, steps, guidance, s["one_batch"]
                    try:
                        with autocast():
                            sampling_seconds(*args, 2, device)  # warm-up: kernels chosen, memory allocated
                            row[f"{sampler} {steps}, {name}"] = sampling_seconds(*args, timed, device)
                    except torch.OutOfMemoryError:
                        row[f"{sampler} {steps}, {name}"] = None
        yield row


def time_training(cfg, num_classes, device, precision, mode, layout, repeats):
    """Images per second (median) of train.py's step, and its peak memory in bytes."""
    cfg = copy.deepcopy(cfg)
    cfg["train"]["precision"] = set_precision(precision)
    c, size = cfg["train"], cfg["data"]["size"]
    B = c["batch_size"]
    torch.manual_seed(cfg["seed"])
    torch.compiler.reset()
    gc.collect()  # the networks of the rows before
    model, diffusion, autocast = build(cfg, num_classes, device)
    model.to(memory_format=LAYOUTS[layout])
    ema = copy.deepcopy(model).requires_grad_(False)
    if c["activation_checkpointing"]:
        for block in model.children():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if mode == "compiled":
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=c["lr"], fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    planes = torch.cat([torch.randint(256, (B, 3, *size)), torch.randint(num_classes, (B, 1, *size))], dim=1).byte()
    planes = planes.pin_memory() if device.type == "cuda" else planes

    def step():
        optimizer.zero_grad()
        for part in planes.to(device, non_blocking=True).chunk(c["accumulate"]):
            x0, mask = unpack(part, num_classes)
            with autocast():
                loss = diffusion.loss(model, x0, mask if model.num_classes else None, c["label_drop"])
            scaler.scale(loss / c["accumulate"]).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), c["grad_clip"])
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - c["ema"])

    step()
    step()
    seconds = []
    for _ in range(repeats):
        start = now(device)
        step()
        seconds.append(now(device) - start)
    optimizer.zero_grad()
    moments = [v for state in optimizer.state.values() for v in state.values()]
    return B / statistics.median(seconds), peak_memory(step, [*model.parameters(), *ema.parameters(), *moments], device)


def minutes(seconds):
    return "-" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}" if seconds >= 60 else f"{seconds:.3g} s"


def table(rows):
    """Dicts of equal keys as a markdown table; numbers with three digits."""
    cells = [[f"{v:.3g}" if type(v) is float else "-" if v is None else str(v) for v in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(rows[0]), ["---"] * len(rows[0]), *cells])


def timing(cfg, device, pictures, timed, full, precisions, modes, layouts, out):
    """All of it: tables on the screen, and the same figures in a JSON file, after each part. Returns what is in the file."""
    book = Path(cfg["data"]["root"]) / "colorbook.json"
    num_classes = len(Colorbook.load(book if book.exists() else "colorbook.json"))
    forward, training = count_flops(cfg, num_classes)
    size, B = "x".join(map(str, cfg["data"]["size"])), cfg["train"]["batch_size"]
    result = machine(device) | {
        "size": size, "hidden_dim": cfg["model"]["hidden_dim"], "classes": num_classes, "train.precision": cfg["train"]["precision"],
        "sample.precision": cfg["sample"]["precision"], "batch_size": B, "timed_steps": timed, "full": full,
        "gflop_forward": forward / 1e9, "gflop_training_image": training / 1e9, "sampling_seconds": [], "training": []}
    print("\n".join(f"{k}: {v:.1f}" if type(v) is float else f"{k}: {v}" for k, v in result.items() if v != []))

    Path(out).parent.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True  # as in train.py and sample.py

    def save():
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for row in time_sampling(cfg, num_classes, device, pictures, cfg["diffusion"]["T"] if full else timed):
        result["sampling_seconds"].append(row)
        save()
    if pictures:
        print(f"\nTime for so many pictures at once, {size}. The thesis (V100, 128x128, 88.8 M parameters) has one pass per step, as w = 1 and "
              "no mask\nhave here; guidance takes two. "
              + ("" if full else f"Runs of more than {timed} steps: {timed} were timed, the rest extrapolated. ") + "-: no figure.\n")
        print(table([{"pictures": row["pictures"]} | dict(zip(("thesis, mask", "thesis, no mask"), map(minutes, THESIS.get(
            row["pictures"], (None, None))))) | {k: minutes(v) for k, v in row.items() if k != "pictures"}
            for row in result["sampling_seconds"]]))

    variants = [(p, mode, layout) for p in precisions for mode in modes for layout in layouts]
    rates = result["matrix_tflops"] = {p: matrix_rate(device, p) / 1e12 for p in dict.fromkeys([*precisions, "bf16"])}
    for precision, mode, layout in tqdm(variants, unit="variant", desc="training"):
        row = dict.fromkeys(("precision", "mode", "layout", "images/s", "peak GiB", "% of rate", "% of bf16 rate"))
        row |= {"precision": precision, "mode": mode, "layout": layout, "note": ""}
        try:
            rate, peak = time_training(cfg, num_classes, device, precision, mode, layout, timed)
            row |= {"images/s": rate, "peak GiB": peak and peak / 2**30, "% of rate": 1e-10 * rate * training / rates[precision],
                    "% of bf16 rate": 1e-10 * rate * training / rates["bf16"]}
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
        except RuntimeError as error:
            if mode != "compiled":
                raise
            row["note"] = f"not compiled: {str(error).strip().splitlines()[0][:80]}"  # no C++ compiler, say
        result["training"].append(row)
        save()
    if variants:
        print(f"\nTraining in steps of {B}, {size}; the thesis: 15.0 images/s. Rate: a matrix product here, TFLOP/s, "
              + ", ".join(f"{k} {v:.3g}" for k, v in rates.items()) + "\n\n" + table(result["training"]))
    print(f"\n{out}: the same figures")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--pictures", type=int, nargs="*", default=list(THESIS), metavar="N", help="(default: the thesis's rows)")
    parser.add_argument("--timed-steps", type=int, metavar="N", help="of each run, 3 or more (default: 20 on CUDA, else 3)")
    parser.add_argument("--full", action="store_true", help="time every step of sampling")
    parser.add_argument("--precisions", nargs="*", choices=PRECISIONS, help="of training (default: all on CUDA, else fp32 bf16)")
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager"], help="(default: eager)")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=["channels_last"], help="(default: channels_last)")
    parser.add_argument("--out", default="out/timing.json", help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        cfg = load_config(args.config, args.preset, args.set)
        device = pick_device(cfg["device"])
        timed, precisions = (20, PRECISIONS) if device.type == "cuda" else (3, ["fp32", "bf16"])
        timed = timed if args.timed_steps is None else args.timed_steps
        if timed < 3 or min(args.pictures, default=1) < 1:
            raise ValueError(f"expected --timed-steps of 3 or more and --pictures of 1 or more, got {timed} and {args.pictures}")
        timing(cfg, device, args.pictures, timed, args.full, precisions if args.precisions is None else args.precisions, args.modes,
               args.layouts, args.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


if __name__ == "__main__":
    main()
