"""Train the network.

    python train.py --config config.yaml                       the preset that the file names: toy scenes
    python train.py --preset idd_lite                          another preset
    python train.py --set data.root=my/data                    your own data, with the values of config.yaml
    python train.py --preset idd_lite --dry-run                check settings, data and disk, and stop
    python train.py --resume runs/idd_lite                     go on after Ctrl-C or a crash, with the run's settings
    python train.py --resume runs/idd_lite --set train.steps=9000          and all of them but this one
    torchrun --nproc_per_node=4 train.py --preset bdd100k      several GPUs, which share each batch

A run is a folder: checkpoint.pt, log.csv (a row every train.log_every steps), previews/, config.yaml as resolved.
"""

import argparse
import contextlib
import copy
import math
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from shlex import quote

import torch
import torch.distributed as dist
import yaml
from filelock import FileLock, Timeout
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from checkpoint import (build, join_processes, pick_device, pick_precision, random_state, replacing, restore_run,
                        save_checkpoint)
from config import add_config_arguments, command, load_config, parse_overrides
from dataset import Pairs, batches, contact_sheet, to_uint8, unpack
from ddpm import guided_eps, noise_like_seeds, sample
from masks import Colorbook

QUARTERS = ["val_loss_q1", "val_loss_q2", "val_loss_q3", "val_loss_q4"]  # val_loss where t is lowest (least noise), ...
COLUMNS = ["step", "epoch", "seconds",  # since the start
           "images_per_s", "loss", "grad_norm",  # of the steps since the row before
           "val_loss", *QUARTERS, "val_eps",  # of the EMA weights; val_eps is the error in eps, whatever is predicted
           "val_eps_raw"]  # the same of the weights before averaging

# ----------------------------------------------------------------------------------------------------- the loop


def train_step(net, num_classes, diffusion, optimizer, scaler, autocast, c, planes, drawn):
    """One step of the optimiser on the planes (B, 4, H, W) uint8 of a batch, RGB and class ids, in micro-batches.

    drawn is what Diffusion.draw() drew for the batch, c the config's train part. Returns the mean loss and the norm of
    the gradient before clipping, on the device.
    """
    optimizer.zero_grad()
    mean_loss = 0
    chunks = (x.chunk(c["accumulate"]) for x in (planes, *drawn))
    for part, t, eps, keep in zip(*chunks):
        x0, mask = unpack(part, num_classes)
        with autocast():
            loss = diffusion.loss(net, x0, mask, t, eps, keep) / c["accumulate"]
        scaler.scale(loss).backward()
        mean_loss += loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), c["grad_clip"])
    scaler.step(optimizer)
    scaler.update()
    return mean_loss, norm


def training_loop(cfg, model, diffusion, autocast, pairs, held_out, device, rank, ranks, resume):
    """Optimiser steps and EMA, and now and then a row of the log, previews and a checkpoint.

    Returns the number of the signal that stopped it, or 0.
    """
    d, c, out = cfg["data"], cfg["train"], Path(cfg["out"])
    checkpoint, log, batch_size = out / "checkpoint.pt", out / "log.csv", c["batch_size"]
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c["lr"], fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=c["precision"] == "fp16")
    step, images, seconds = 0, 0, 0.0  # images seen, and seconds since the start, over all restarts
    if resume:
        step, images, seconds = restore_run(cfg, pairs.colorbook, model, ema, optimizer, scaler, device)
    if step >= c["steps"]:
        print(f"{checkpoint} is at step {step} of {c['steps']} already: go on with a larger --set train.steps=...")
        return 0
    if rank == 0:
        (out / "previews").mkdir(exist_ok=True)
        with replacing(out / "config.yaml") as file:
            file.write(yaml.safe_dump(cfg, sort_keys=False, allow_unicode=True).encode())
        start_log(log, step)

    net = wrap(model, c, ranks, device)  # only for the loss; its weights are those of model, which is saved
    torch.backends.cudnn.benchmark = True  # images of one size: let cuDNN choose its fastest convolution for it
    loader = batches(pairs, batch_size, cfg["seed"], images, d["flip"], d["augment"], device, rank, ranks)
    bar = tqdm(total=images + (c["steps"] - step) * batch_size, initial=images, unit="img", desc=out.name,
               dynamic_ncols=True, mininterval=0.5 if os.isatty(2) else 30, disable=rank > 0)
    sums = torch.zeros(2, device=device)  # of loss and gradient norm, since the last row of the log
    logged_step = step  # of that row
    for group in optimizer.param_groups:
        group["betas"] = (0.9, c["beta2"])  # not before restore_run(), which brings those of the checkpoint
    with bar, stop_signals() as received:
        started = time.monotonic() - seconds
        row_started = time.monotonic()  # after the last row, its preview and checkpoint
        stopped_by = 0
        while step < c["steps"] and not stopped_by:
            # linear warm-up, constant up to step `hold`, then proportional to 1 / sqrt(step)
            for group in optimizer.param_groups:
                group["lr"] = c["lr"] * min((step + 1) / c["warmup"], 1, math.sqrt(c["hold"] / (step + 1)))
            # random numbers of the whole batch, however many processes and micro-batches share it
            drawn = diffusion.draw((batch_size, 3, *d["size"]), c["label_drop"], device)
            mine = [x.chunk(ranks)[rank] for x in drawn]
            loss, norm = train_step(
                net, model.num_classes, diffusion, optimizer, scaler, autocast, c, next(loader), mine)
            step, images = step + 1, images + batch_size
            decay = min(c["ema"], (1 + step) / (10 + step))  # EMA warm-up: early previews show the present weights
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

            sums[0] += loss
            # an overflow of fp16, which GradScaler answers by leaving out the step, is no alarm
            sums[1] += norm.nan_to_num(0, 0, 0) if scaler.is_enabled() else norm
            bar.update(batch_size)
            stopped_by = max(received, default=0)
            if ranks > 1:  # a signal that any process got; exchanged by the CPUs, so that no GPU has to wait
                of_all = torch.tensor(stopped_by)
                dist.all_reduce(of_all, dist.ReduceOp.MAX)
                stopped_by = of_all.item()
            due = {name for name in ("log", "val", "preview", "save")
                   if step % c[f"{name}_every"] == 0 or step == c["steps"]}
            if not due and not stopped_by:
                continue

            # whatever is due, a row of the log belongs to it
            seconds, row_seconds = time.monotonic() - started, time.monotonic() - row_started
            if ranks > 1:
                dist.all_reduce(sums)
            loss_mean, norm_mean = (sums / ranks / (step - logged_step)).tolist()
            check_finite(loss_mean, norm_mean, scaler, step, checkpoint)
            if rank == 0:
                row = {"step": step, "epoch": images / len(pairs), "seconds": seconds, "loss": loss_mean,
                       "grad_norm": norm_mean, "images_per_s": (step - logged_step) * batch_size / row_seconds}
                if "val" in due:
                    at_once = batch_size // ranks // c["accumulate"]
                    how = diffusion, held_out, c["val_pairs"], at_once, device, autocast
                    row |= validate(ema, *how)
                    row["val_eps_raw"] = validate(model, *how)["val_eps"]
                    bar.write(f"step {step}: loss {loss_mean:.4f}, "
                              f"val_loss {row['val_loss']:.4f}, val_eps {row['val_eps']:.4f}")
                append_log(log, row)  # before the checkpoint: after a crash between the two start_log() drops the row
                if "preview" in due:
                    sheet = preview(ema, diffusion, held_out, cfg, device, autocast)
                    with replacing(out / "previews" / f"{step:07d}.png") as file:
                        sheet.save(file, "png")
                if "save" in due or stopped_by:
                    save_checkpoint(checkpoint, {
                        "model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                        "scaler": scaler.state_dict(), "rng": random_state(device), "step": step, "images": images,
                        "seconds": seconds, "config": cfg, "colorbook": pairs.colorbook.classes})
            sums.zero_()
            logged_step, row_started = step, time.monotonic()
    if ranks > 1:
        dist.barrier()  # torchrun ends all processes once one has ended: the checkpoint has to be written by then
    if step < c["steps"]:
        print(f"stopped at step {step} of {c['steps']}, saved in {checkpoint}: go on with --resume {quote(str(out))}")
        return stopped_by
    print(f"{checkpoint}: {step} steps in {seconds / 60:.1f} minutes; next: "
          f"python sample.py --checkpoint {quote(str(checkpoint))} --mask ...")
    return 0


def wrap(model, c, ranks, device):
    """The network with what train.* asks for around it: recomputed activations, several processes, torch.compile."""
    if c["activation_checkpointing"]:
        for block in model.children():
            block.forward = partial(recompute, block.forward, use_reentrant=False)
    if ranks > 1:
        model = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    return torch.compile(model) if c["compile"] else model


def check_finite(loss, norm, scaler, step, checkpoint):
    """Raise a ValueError rather than let a network full of NaN be saved over the good one."""
    problem = "" if math.isfinite(loss) and math.isfinite(norm) else "loss or gradient is not finite"
    if scaler.is_enabled() and scaler.get_scale() < 1:  # GradScaler starts at 65536 and halves it at each overflow
        problem = f"the gradient overflows fp16 at every step, at a scale of {scaler.get_scale():g} too"
    if problem:
        kept = "keeps the last good state" if checkpoint.exists() else "was not written yet"
        raise ValueError(f"step {step}: {problem}. {checkpoint} {kept}; try a smaller train.lr or "
                         "train.precision=fp32")


@contextlib.contextmanager
def stop_signals():
    """A list that gets the number of a signal: Ctrl-C or SIGTERM ends the run after the step; a second one at once."""
    received = []

    def on_signal(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)  # the next one ends the process

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------- looking at the network


@torch.no_grad()
def validate(model, diffusion, pairs, count, batch_size, device, autocast):
    """Errors on held-out pairs, masks given, at fixed noise and at t spread evenly over 0..T-1: columns of the log.

    val_loss is the mean error of what the network predicts, QUARTERS has its means in the four quarters of t (NaN for
    one without a pair), val_eps is the mean error of the noise, which compares networks that predict different things.
    """
    n = min(count, len(pairs))
    chosen = torch.linspace(0, len(pairs) - 1, n).round().long()
    # pairs come in the order of their names, often by place: t must not rise along with it
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    t = ((torch.arange(n) + 0.5) * diffusion.T / n).long()[shuffled]
    errors = []
    for part in torch.arange(n).split(batch_size):
        x0, mask = unpack(pairs.planes[chosen[part]].to(device), model.num_classes)
        draw_noise = noise_like_seeds(part.tolist(), x0.shape[1:], device)
        with autocast():
            error, eps_error = diffusion.errors(model, x0, mask, t[part].to(device), draw_noise())
        errors.append(torch.stack([error, eps_error]))
    error, eps_error = torch.cat(errors, dim=1).cpu()
    columns = {name: error[t * 4 // diffusion.T == quarter].mean().item() for quarter, name in enumerate(QUARTERS)}
    return columns | {"val_loss": error.mean().item(), "val_eps": eps_error.mean().item()}


@torch.no_grad()
def preview(model, diffusion, pairs, cfg, device, autocast):
    """A sheet of masks, real images, and what the model makes of the masks in 20 steps, always with the same seeds."""
    chosen = torch.linspace(0, len(pairs) - 1, min(cfg["train"]["previews"], len(pairs))).round().long()
    planes = pairs.planes[chosen]
    _, mask = unpack(planes.to(device), model.num_classes)
    with autocast():
        eps_fn = guided_eps(model, diffusion, mask, cfg["sample"]["guidance"], cfg["sample"]["guidance_interval"])
        draw_noise = noise_like_seeds(range(len(chosen)), (3, *planes.shape[2:]), device)
        images = sample(eps_fn, draw_noise, diffusion.alpha_bar, "dpm_solver", min(20, diffusion.T))
    planes = planes.permute(0, 2, 3, 1).numpy()
    masks = [pairs.colorbook.paint(ids) for ids in planes[..., 3]]
    return contact_sheet([masks, planes[..., :3], to_uint8(images)])


# ------------------------------------------------------------------------------------------- the folder of a run


def check_run(cfg, resume, ranks):
    """Refuse a folder that is in use, data that are not there, and a batch that cannot be shared out, at once."""
    out, c, root = Path(cfg["out"]), cfg["train"], Path(cfg["data"]["root"])
    if not resume and out.is_dir() and {path.name for path in out.iterdir()} - {".lock"}:
        raise FileExistsError(f"{out}: not empty. Go on with this run by --resume {quote(str(out))}, or name another "
                              "folder by --set out=...")
    if not cfg["data"]["root"]:
        raise ValueError("no data: name a prepared data set with --set data.root=..., or a preset with --preset")
    if not (root / "colorbook.json").is_file() and not is_undrawn_toy(root):
        raise ValueError(f"data.root {root.absolute()} is no prepared data set: expected colorbook.json and train/, "
                         "val/ with images/ and masks/. Prepare one (python -m data.<name>.prepare), or name another")
    if c["batch_size"] % (ranks * c["accumulate"]):
        raise ValueError(f"train.batch_size {c['batch_size']} cannot be shared out evenly to {ranks} process(es) of "
                         f"{c['accumulate']} micro-batch(es): make it a multiple of {ranks * c['accumulate']}")


def is_undrawn_toy(root):
    """Whether root is the folder of the preset toy, and not there yet: read_data() draws it."""
    return not root.exists() and root.parts[-2:] == ("toy", "prepared")


def check_disk(out, num_parameters):
    """OSError where `out` cannot be written, or the disk has no room for two checkpoints and one being written."""
    nearest = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise OSError(f"{out} cannot be written to: choose another folder with --set out=...")
    needed = 3 * 16 * num_parameters  # 16 bytes: weight, EMA and Adam's two moments in float32
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise OSError(f"{out}: {free / 2**30:.1f} GiB free on this disk, checkpoints need {needed / 2**30:.1f} GiB: "
                      "free some, or choose another disk with --set out=...")


def locked(out):
    """A context that holds a run's folder against a second training; its lock is free once this process ends."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(out / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise OSError(f"{out}: another training runs in it: stop it, or choose a folder with --set out=...") from error


def start_log(log, step):
    """Keep the rows up to `step`: later ones will be written again, and a crash may have cut the last one short."""
    lines = log.read_text().splitlines(keepends=True)[1:] if log.exists() else []
    kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[0]) <= step]
    with replacing(log) as file:
        file.write((",".join(COLUMNS) + "\n" + "".join(kept)).encode())


def append_log(log, row):
    """Write a row {column: value}; columns without a value, and NaN, stay empty."""
    cells = [row.get(column, "") for column in COLUMNS]
    line = ",".join(f"{cell:.7g}" if isinstance(cell, float) else str(cell) for cell in cells).replace("nan", "")
    with open(log, "a", newline="") as file:
        file.write(line + "\n")


# ---------------------------------------------------------------------------------------- from a config to a run


def read_data(cfg, rank, ranks, dry_run):
    """[Pairs of train, Pairs of data.val]; missing toy scenes are drawn, but not by a dry run: [None, None] then."""
    d, root = cfg["data"], Path(cfg["data"]["root"])
    draw = is_undrawn_toy(root)
    if draw and dry_run:
        print(f"the toy scenes would be drawn first, to {root}")
        return [None, None]

    def read():
        return [Pairs(root, split, d["size"], d["memory_gb"], check_only=dry_run) for split in ("train", d["val"])]

    if rank == 0:
        if draw:
            from data.toy.prepare import prepare
            prepare(root, size=tuple(d["size"]))
        pairs = read()
    if ranks > 1:
        dist.barrier()  # the others read what the first process has drawn or mapped
    return pairs if rank == 0 else read()


def train(cfg, resume=False, dry_run=False):
    """One run, from config to finished checkpoint. Raises ValueError or OSError for what the user can fix."""
    d, c, out, device = cfg["data"], cfg["train"], Path(cfg["out"]), pick_device(cfg["device"])
    rank, ranks = join_processes(device)  # from here on, only the first process prints
    check_run(cfg, resume, ranks)
    root = Path(d["root"])
    # toy scenes that are not drawn yet will have the project's colorbook
    colorbook = Colorbook.load((root if root.exists() else Path(__file__).parent) / "colorbook.json")
    torch.manual_seed(cfg["seed"])
    c["precision"] = pick_precision(c["precision"], device)  # saved with the run, which keeps it when it is resumed
    model, diffusion, autocast = build(cfg, len(colorbook), device)
    torch.nn.init.zeros_(model.out.weight)  # predict 0 at first: what a random layer adds would have to be unlearnt
    torch.nn.init.zeros_(model.out.bias)
    num_parameters = sum(p.numel() for p in model.parameters())
    check_disk(out, num_parameters)
    processes = f"{ranks} x " if ranks > 1 else ""
    print(f"{num_parameters:,} parameters on {processes}{device.type} ({c['precision']}), {len(colorbook)} classes, "
          f"{d['size'][0]}x{d['size'][1]}, {c['steps']} steps of {c['batch_size']}, seed {cfg['seed']}")
    with contextlib.nullcontext() if rank or dry_run else locked(out):
        pairs, held_out = read_data(cfg, rank, ranks, dry_run)
        if pairs:
            print(f"{len(pairs)} pairs, which is {c['steps'] * c['batch_size'] / len(pairs):.1f} epochs")
        if dry_run:
            print(f"dry run: nothing was written; a run would go to {out}")
            stopped_by = 0
        else:
            stopped_by = training_loop(cfg, model, diffusion, autocast, pairs, held_out, device, rank, ranks, resume)
    if ranks > 1:
        dist.destroy_process_group()
    if stopped_by:
        raise SystemExit(128 + stopped_by)  # as a shell reports a signal


def start_or_resume(args):
    """From the command line to train(): a new run, or an old one with its own settings, of which --set changes some."""
    if args.resume is None:
        return train(load_config(args.config, args.preset, args.set), dry_run=args.dry_run)
    out = Path(args.resume)
    if not all((out / name).is_file() for name in ("config.yaml", "log.csv")):
        raise FileNotFoundError(f"{out.absolute()}: no run to resume: expected a folder with config.yaml and log.csv, "
                                "such as runs/toy")
    if args.config or args.preset or "out" in parse_overrides(args.set):
        raise ValueError(f"--resume {out} takes the settings of that run: leave out --config and --preset, and --set "
                         "out=...; --set changes other settings, one by one")
    cfg = load_config(out / "config.yaml", overrides=args.set) | {"out": str(out)}  # it may have been moved
    return train(cfg, resume=True, dry_run=args.dry_run)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, by its settings and --set")
    parser.add_argument("--dry-run", action="store_true", help="check settings, data and disk, and write nothing")
    command(start_or_resume, parser.parse_args())


if __name__ == "__main__":
    main()
