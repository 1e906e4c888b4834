"""The training of the experiments' own networks, by the recipe of train.py: one loop, one kind of checkpoint.

    net = fit(model, loss, load_batches, cfg["train"], "runs/x/net.pt", device, about={"kind": "net", "width": 32})
    state = read("runs/x/net.pt", "net")                    # state["about"] builds the network, state["ema"] fills it

Beside net.pt there are net.csv, a row every log_every steps, and previews/net_<step>.png. Ctrl-C saves, and the same
command goes on where it was, to the weights that it would have had. A program that calls join_processes() first and
go_on_alone() after its last training can be started by torchrun.
"""

import contextlib
import copy
import csv
import io
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import autocast, pick_precision, random_state, read_archive, save_checkpoint, set_random_state
from dataset import batches
from experiments.common import name_changes, write_text
from train import check_finite, locked, stop_signals, wrap


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
        raise FileNotFoundError(f"{path.absolute()}: no such checkpoint; train the {kind} network first, or "
                                "name another folder (--help)")
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


def write_log(path, rows):
    """A CSV file of rows, dicts whose keys are the columns; what a row does not have stays empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def check_settings(c, ranks):
    """Refuse settings that fit() does not have, a batch that cannot be shared out, and processes that never joined."""
    if c["accumulate"] > 1 or c["compile"] or c["activation_checkpointing"]:
        raise ValueError("train.accumulate, train.compile and train.activation_checkpointing are for train.py alone")
    if c["batch_size"] % ranks:
        raise ValueError(f"train.batch_size {c['batch_size']} cannot be shared out evenly to {ranks} processes: make "
                         f"it a multiple of {ranks}")
    if ranks == 1 and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("this program trains in one process: start it without torchrun")


def restore(path, about, c, parts, device):
    """What `path` holds, loaded into parts {name: network or optimizer}; {} where no training was begun yet.

    ValueError where it was begun with another `about` or with settings c that would have trained other weights.
    """
    if not path.exists() and not path.with_name(f"{path.name}.previous").exists():
        return {}
    state = read(path, about["kind"])
    before, now = ({key: value for key, value in settings.items()
                    if key not in ("steps", "val_pairs", "previews") and not key.endswith("_every")}
                   for settings in (state["config"], c))
    changes = name_changes(state["about"] | before, about | now)
    if changes:
        raise ValueError(f"{path}: begun with another {changes}: choose another folder, or delete it")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    set_random_state(device, state["rng"])
    return state


def make_loader(cfg, pairs, device):
    """The function load_batches(start) that fit() wants, for pairs."""
    d = cfg["data"]
    return lambda start: batches(pairs, cfg["train"]["batch_size"], cfg["seed"], start, d["flip"], d["augment"], device)


def spread(n, highest=1.0):
    """t (n,) spread evenly over 0..highest, shuffled: pairs come in the order of their names, often by place."""
    return (torch.randperm(n, generator=torch.Generator().manual_seed(0)) + 0.5) / n * highest


def share_batches(net, rank, ranks):
    """A function like `net`, but each process computes its part of the batch, and all of them get the whole output.

    So the loss and its random numbers are those of the whole batch, as in one process. All inputs begin with (B, ...).
    """
    def part(x):
        return x.chunk(ranks)[rank] if torch.is_tensor(x) else x

    def call(*inputs, **named):
        out = net(*map(part, inputs), **{name: part(x) for name, x in named.items()}).contiguous()
        outputs = [torch.empty_like(out) for _ in range(ranks)]
        dist.all_gather(outputs, out.detach())
        outputs[rank] = out  # the only part that the gradient goes through here
        return torch.cat(outputs)

    return call


def largest(*numbers):
    """The largest that any process has of each number; all wait for each other."""
    if not dist.is_initialized():
        return numbers
    of_all = torch.tensor(numbers)
    dist.all_reduce(of_all, dist.ReduceOp.MAX)
    return of_all.tolist()


def go_on_alone():
    """End all processes but the first: after the last training there is work for one."""
    if dist.is_initialized():
        rank = dist.get_rank()
        dist.destroy_process_group()
        os.environ["WORLD_SIZE"] = "1"  # for programs that the first one starts
        if rank > 0:
            raise SystemExit(0)


def fit(model, loss, load_batches, c, path, device, about, validate=None, preview=None, minutes=math.inf):
    """Train `model`, on the device already, by c, the `train` part of a config; returns it with its averaged weights.

    loss(model, batch)   a scalar; its random numbers come from torch, whose state is saved
    load_batches(start)  an endless iterator of batches, after the first `start` images
    about                plain values that the network is built from, "kind" among them, and whatever else, beside c,
                         the weights depend on: with others, a training is not resumed
    validate(model)      {column: number} for the log, every val_every steps; of the averaged weights, and without
                         torch's own random numbers
    preview(model)       a PIL image, every preview_every steps; likewise
    minutes              after so many it ends, before c["steps"]

    In several processes each computes its part of every batch; the first one validates and saves. ValueError or OSError
    for what the user can fix; SystemExit where a signal stopped the training, after saving.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    check_settings(c, ranks)
    path, c = Path(path), c | {"seed": torch.initial_seed()}  # that of the weights already
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=c["lr"], betas=(0.9, c["beta2"]), fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    state = restore(path, about, c, parts, device)
    precision = state.get("precision") or pick_precision(c["precision"], device)  # a run keeps the one it began with
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if state.get("scaler"):  # one that was off has no state
        scaler.load_state_dict(state["scaler"])
    step, log, seconds = state.get("step", 0), state.get("log", []), state.get("seconds", 0.0)
    started = time.monotonic() - seconds
    sums, summed = torch.zeros(2, device=device), 0  # of loss and gradient norm, since the last row of the log
    net = share_batches(wrap(model, c, ranks, device), rank, ranks) if ranks > 1 else model

    def is_over():
        return step >= c["steps"] or seconds >= 60 * minutes

    bar = tqdm(total=c["steps"], initial=step, desc=path.stem, unit="step", dynamic_ncols=True,
               mininterval=0.5 if os.isatty(2) else 30, disable=rank > 0)
    with contextlib.nullcontext() if rank else locked(path.parent), stop_signals() as received, bar:
        loader = load_batches(step * c["batch_size"])
        over, stopped_by = is_over(), 0
        while not over and not stopped_by:
            # linear warm-up, constant up to step `hold`, then as 1 / sqrt(step), as in train.py
            lr = c["lr"] * min((step + 1) / c["warmup"], 1, math.sqrt(c["hold"] / (step + 1)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            with autocast(precision, device):
                value = loss(net, next(loader))
            # the gradient of the batch is the sum over the processes, where DistributedDataParallel takes the mean
            scaler.scale(ranks * value).backward()
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
            over, stopped_by = largest(is_over(), max(received, default=0))
            due = {name for name in ("log", "val", "preview", "save") if over or step % c[f"{name}_every"] == 0}
            if not due and not stopped_by:
                continue

            # whatever is due, a row of the log belongs to it
            loss_mean, norm_mean = (sums / summed).tolist()
            check_finite(loss_mean, norm_mean, scaler, step, path)
            sums.zero_()
            summed = 0
            if rank > 0:
                continue
            row = {"step": step, "seconds": round(seconds, 1), "loss": loss_mean, "grad_norm": norm_mean}
            if validate and "val" in due:
                with autocast(precision, device):
                    row |= validate(ema)
            log.append(row)
            write_log(path.with_suffix(".csv"), log)
            bar.set_postfix(loss=f"{loss_mean:.4f}")
            if preview and "preview" in due:
                file = path.parent / "previews" / f"{path.stem}_{step:07d}.png"
                file.parent.mkdir(exist_ok=True)
                with autocast(precision, device):
                    preview(ema).save(file)
            if "save" in due or stopped_by:
                save_checkpoint(path, {name: part.state_dict() for name, part in parts.items()} | {
                    "scaler": scaler.state_dict(), "precision": precision, "rng": random_state(device), "step": step,
                    "seconds": time.monotonic() - started, "log": log, "about": about, "config": c})
        [stopped_by] = largest(max([*received, stopped_by]))  # also by a signal while the end was saved
    if stopped_by:
        print(f"\nstopped at step {step} of {c['steps']}, saved in {path}: the same command goes on")
        raise SystemExit(128 + stopped_by)
    return ema
