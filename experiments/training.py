"""The training of the experiments' own networks, by the recipe of train.py: one loop, one kind of checkpoint.

    net = fit(model, loss, load_batches, cfg["train"], "runs/x/net.pt", device, about={"kind": "net", "width": 32})
    state = read("runs/x/net.pt", "net")                    # state["about"] builds the network, state["ema"] fills it

Beside net.pt there are net.csv, a row every log_every steps, and previews/net_<step>.png. Ctrl-C saves, and the same
command goes on where it was, to the weights that it would have had.
"""

import copy
import csv
import io
import math
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import pick_precision, random_state, read_archive, replacing, save_checkpoint
from dataset import batches
from train import check_finite, locked, stop_signals


def read(path, kind):
    """What fit() saved, on the CPU; nothing in the file is executed.

    FileNotFoundError, or a ValueError that names the file for one that is damaged or holds another kind of network.
    """
    path = Path(path)
    previous = path.with_name(f"{path.name}.previous")
    if previous.exists() and not path.exists():
        print(f"{path} is not there: {previous.name} is used instead")
        path = previous
    if not path.is_file():
        raise FileNotFoundError(f"{path.absolute()}: no such checkpoint; train the {kind} network first (--help)")
    try:
        state = read_archive(path)
        found = state["about"]["kind"]
    except (PermissionError, MemoryError):  # no fault of the file
        raise
    except Exception as error:  # torch and zipfile raise many kinds for a file that is no checkpoint
        raise ValueError(f"{path}: not a checkpoint of an experiment, or a damaged one: {str(error).splitlines()[0]}. "
                         f"Delete it; if there is {path.name}.previous, give that its name") from error
    if found != kind:
        raise ValueError(f"{path}: the checkpoint of a {found} network; expected one of kind {kind}")
    return state


def autocast(precision, device):
    """The context in which networks compute at "fp32", "fp16" or "bf16"."""
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    return torch.autocast(device.type, half, half is not None)


def write_log(path, rows):
    """A CSV file of rows, dicts whose keys are the columns; what a row does not have stays empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def restore(path, about, parts, device):
    """What `path` holds, loaded into parts {name: network or optimizer}; {} where no training was begun yet.

    ValueError where it was begun with something else than `about` says.
    """
    if not path.exists() and not path.with_name(f"{path.name}.previous").exists():
        return {}
    state = read(path, about["kind"])
    if state["about"] != about:
        changed = [key for key in about if state["about"].get(key) != about[key]]
        raise ValueError(f"{path}: begun with another {', '.join(changed)}: choose another folder, or delete it")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    random_state(device, state["rng"])
    return state


def make_loader(cfg, pairs, device):
    """The function load_batches(start) that fit() wants, for pairs."""
    d = cfg["data"]
    return lambda start: batches(pairs, cfg["train"]["batch_size"], cfg["seed"], start, d["flip"], d["augment"], device)


def spread(n, highest=1.0):
    """t (n,) spread evenly over 0..highest, shuffled: pairs come in the order of their names, often by place."""
    return (torch.randperm(n, generator=torch.Generator().manual_seed(0)) + 0.5) / n * highest


def fit(model, loss, load_batches, c, path, device, about, validate=None, preview=None, minutes=math.inf):
    """Train `model`, on the device already, for c["steps"] steps or `minutes`; returns it with its averaged weights.

    loss(model, batch)   a scalar; its random numbers come from torch, whose state is saved
    load_batches(start)  an endless iterator of batches, after the first `start` images
    c                    the `train` part of a config
    about                plain values that the network is built from, "kind" among them: others cannot be resumed
    validate(model)      {column: number} for the log, every val_every steps; of the averaged weights
    preview(model)       a PIL image, every preview_every steps; likewise

    ValueError or OSError for what the user can fix; SystemExit where a signal stopped the training, after saving.
    """
    if c["accumulate"] > 1 or c["compile"] or c["activation_checkpointing"]:
        raise ValueError("train.accumulate, train.compile and train.activation_checkpointing are for train.py alone")
    path, batch_size = Path(path), c["batch_size"]
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=c["lr"], betas=(0.9, c["beta2"]), fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    state = restore(path, about, parts, device)
    precision = state.get("precision") or pick_precision(c["precision"], device)  # a run keeps the one it began with
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if state.get("scaler"):  # one that was off has no state
        scaler.load_state_dict(state["scaler"])
    step, log, seconds = state.get("step", 0), state.get("log", []), state.get("seconds", 0.0)
    started = time.monotonic() - seconds
    sums, summed = torch.zeros(2, device=device), 0  # of loss and gradient norm, since the last row of the log
    bar = tqdm(total=c["steps"], initial=step, desc=path.stem, unit="step", dynamic_ncols=True,
               mininterval=0.5 if os.isatty(2) else 30)
    with locked(path.parent), stop_signals() as stop, bar:
        loader = load_batches(step * batch_size)
        over = step >= c["steps"] or seconds >= 60 * minutes
        while not over:
            # linear warm-up, constant up to step `hold`, then as 1 / sqrt(step), as in train.py
            lr = c["lr"] * min((step + 1) / c["warmup"], 1, math.sqrt(c["hold"] / (step + 1)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            with autocast(precision, device):
                value = loss(model, next(loader))
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c["grad_clip"])
            scaler.step(optimizer)
            scaler.update()
            step += 1
            decay = min(c["ema"], (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
                for averaged, present in zip(ema.buffers(), model.buffers()):
                    averaged.copy_(present)
                sums += torch.stack([value.detach(), norm.nan_to_num(0, 0, 0) if scaler.is_enabled() else norm])
            summed += 1
            bar.update()

            seconds = time.monotonic() - started
            over = step >= c["steps"] or seconds >= 60 * minutes
            if over or stop or step % c["log_every"] == 0 or step % c["val_every"] == 0:
                loss_mean, norm_mean = (sums / summed).tolist()
                check_finite(loss_mean, norm_mean, scaler, step, path)
                row = {"step": step, "seconds": round(seconds, 1), "loss": loss_mean, "grad_norm": norm_mean}
                if validate and (over or step % c["val_every"] == 0):
                    with autocast(precision, device):
                        row |= validate(ema)
                log.append(row)
                write_log(path.with_suffix(".csv"), log)
                bar.set_postfix(loss=f"{loss_mean:.4f}")
                sums.zero_()
                summed = 0
            if preview and (over or step % c["preview_every"] == 0):
                file = path.parent / "previews" / f"{path.stem}_{step:07d}.png"
                file.parent.mkdir(exist_ok=True)
                with autocast(precision, device):
                    preview(ema).save(file)
            if over or stop or step % c["save_every"] == 0:
                save_checkpoint(path, {name: part.state_dict() for name, part in parts.items()} | {
                    "scaler": scaler.state_dict(), "precision": precision, "rng": random_state(device), "step": step,
                    "seconds": time.monotonic() - started, "log": log, "about": about, "config": c})
            if stop and not over:
                print(f"\nstopped at step {step} of {c['steps']}, saved in {path}: the same command goes on")
                raise SystemExit(128 + stop[0])
    return ema
