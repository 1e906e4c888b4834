"""Train the network.

    python train.py --config config.yaml                   the preset named in the file: toy
    python train.py --config config.yaml --preset idd_lite
    python train.py --config config.yaml --dry-run         check config and data, say how large it is, and stop
    python train.py --config config.yaml --resume          go on after Ctrl-C, a crash, or with a larger train.steps
    python train.py --set train.steps=2000 --set out=runs/mine

A run is a folder: checkpoint.pt, log.csv (one row per train.log_every steps), previews/, config.yaml as resolved.
"""
import argparse
import copy
import csv
import itertools
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from checkpoint import FORMAT, build, join_processes, load_checkpoint, pick_device, save_checkpoint
from config import add_config_arguments, flatten, load_config
from dataset import Pairs, batches, contact_sheet, to_uint8, unpack
from ddpm import guided_eps, noise_like_seeds, sample


def agree(number, device):
    """The largest of the numbers that the processes have."""
    number = torch.tensor(number, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def shard(model):
    """FSDP2: each process keeps a part of every weight, and puts a block together when it runs."""
    model.to(memory_format=torch.contiguous_format)  # FSDP takes no other layout
    for block in model.children():
        if list(block.parameters()):
            fully_shard(block)
    register_fsdp_forward_method(fully_shard(model), "mask_features")


def whole(tree):
    """A tensor, or a nested dict of them, with what shard() spread over the processes put together."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


@torch.no_grad()
def validate(model, diffusion, pairs, count, num_classes, batch_size, device, autocast):
    """Errors on held-out pairs, masks given, at fixed noise and at t spread evenly over 0..T-1.

    Returns the mean error of what the network predicts, the same in four equal ranges of t, and the mean error of the
    noise, which compares networks that predict different things.
    """
    n = min(count, len(pairs))
    chosen = torch.linspace(0, len(pairs) - 1, n).round().long()
    t = ((torch.arange(n) + 0.5) * diffusion.T / n).long()[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    errors = []
    for part in torch.arange(n).split(batch_size):
        x0, mask = unpack(pairs.planes[chosen[part]].to(device), num_classes)
        eps = noise_like_seeds(part.tolist(), x0.shape[1:], device)()
        with autocast():
            errors.append(torch.stack(diffusion.errors(model, x0, mask if model.num_classes else None, t[part].to(device), eps)))
    loss, eps_error = torch.cat(errors, dim=1).cpu()
    bins = [loss[(t >= a) & (t < a + diffusion.T / 4)].mean().item() for a in (diffusion.T / 4 * i for i in range(4))]
    return loss.mean().item(), bins, eps_error.mean().item()


@torch.no_grad()
def preview(model, diffusion, pairs, cfg, colorbook, device, autocast):
    """A sheet: mask, real image, and what the model makes of the mask, always the same masks and seeds."""
    chosen = torch.linspace(0, len(pairs) - 1, min(cfg["train"]["previews"], len(pairs))).round().long()
    planes = pairs.planes[chosen]
    mask = unpack(planes.to(device), len(colorbook))[1] if model.num_classes else None
    s = cfg["sample"]
    with autocast():
        eps_fn = guided_eps(model, diffusion, mask, s["guidance"])
        noise = noise_like_seeds(range(len(chosen)), (3, *planes.shape[2:]), device)
        made = sample(eps_fn, noise, diffusion.alpha_bar, "dpm_solver", min(20, diffusion.T))
    rows = [[colorbook.paint(pair[3]), pair[:3].transpose(1, 2, 0), fake] for pair, fake in zip(planes.numpy(), to_uint8(made))]
    return contact_sheet([list(column) for column in zip(*rows)])


def train(cfg, resume=False, dry_run=False):
    """One run, from config to finished checkpoint. Raises ValueError or OSError for what the user can mend."""
    device, out = pick_device(cfg["device"]), Path(cfg["out"])
    d, c = cfg["data"], cfg["train"]
    path = out / "checkpoint.pt"
    saved = path.exists() or path.with_name(path.name + ".previous").exists()
    if (saved or (out / "log.csv").exists()) and not resume and not dry_run:
        raise FileExistsError(f"{out}: this run exists. Go on with --resume, or choose another folder with --set out=...")
    if resume and not saved and out.exists():
        print(f"{out} has no checkpoint yet: starting at step 0")
    state = load_checkpoint(path) if resume and (saved or not out.exists()) else None
    rank, ranks = join_processes(device)
    if c["batch_size"] % (ranks * c["accumulate"]):
        raise ValueError(f"train.batch_size {c['batch_size']} cannot be shared out evenly to {ranks} process(es) in "
                         f"train.accumulate {c['accumulate']} part(s): make it a multiple of {ranks * c['accumulate']}")
    if c["fsdp"] and (ranks == 1 or c["precision"] == "fp16"):
        raise ValueError(f"train.fsdp needs several processes (torchrun --nproc_per_node=N train.py ...), there is {ranks}, and "
                         f"train.precision fp32 or bf16, it is {c['precision']}")
    if c["fsdp"] and device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise ValueError(f"train.fsdp on the CPU needs a newer torch than {torch.__version__}: update it, or leave train.fsdp false")

    # data; the first process draws the toy scenes, which need no download, or maps the files, and the others find it done
    root = Path(d["root"])
    if rank:
        dist.barrier()
    elif not root.exists() and root.parts[-2:] == ("toy", "prepared"):
        from data.toy.prepare import prepare
        prepare(root, size=tuple(d["size"]))
    pairs, held_out = (Pairs(root, split, d["size"], d["memory_gb"]) for split in ("train", d["val"]))
    if ranks > 1 and not rank:
        dist.barrier()
    colorbook, num_classes = pairs.colorbook, len(pairs.colorbook)

    # model, its average, optimiser, loss scaler
    torch.manual_seed(cfg["seed"])
    model, diffusion, autocast = build(cfg, num_classes, device)
    torch.nn.init.zeros_(model.out.weight)  # begin with the prediction 0, not with noise that has to be unlearnt
    ema = copy.deepcopy(model).requires_grad_(False)
    step, seconds = 0, 0.0
    if state:
        changed = {k: (v, flatten(cfg).get(k)) for k, v in flatten(state["config"]).items() if v != flatten(cfg).get(k)}
        fixed = {k: changed[k] for k in changed if k.startswith(("model.", "diffusion."))}
        if list(state["colorbook"].items()) != list(colorbook.classes.items()):  # the order is the ids
            classes = itertools.zip_longest(state["colorbook"].items(), colorbook.classes.items())
            fixed["colorbook"] = next((old, new) for old, new in classes if old != new)
        if fixed:
            raise ValueError(f"{path}: a checkpoint cannot go on with another {', '.join(fixed)}: "
                             f"{'; '.join(f'{k} was {old}, is {new}' for k, (old, new) in fixed.items())}")
        for key, (old, new) in changed.items():
            print(f"resuming with {key} {new} instead of {old}")
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        step, seconds = state["step"], state["seconds"]
    if c["fsdp"]:
        shard(model)
        shard(ema)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c["lr"], betas=(0.9, c["beta2"]), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=c["precision"] == "fp16")
    if state:
        for p, moments in zip(model.parameters(), state["optimizer"]["state"].values()):
            if isinstance(p, DTensor):
                moments |= {k: distribute_tensor(v.to(device), p.device_mesh, p.placements) for k, v in moments.items() if v.dim()}
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # one that was off has no state
            scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"])

    size, epochs = f"{d['size'][0]}x{d['size'][1]}", c["steps"] * c["batch_size"] / len(pairs)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {ranks if ranks > 1 else ''}{device.type} ({c['precision']}), "
          f"{num_classes} classes, {size}, {len(pairs)} pairs; {c['steps']} steps of {c['batch_size']} = {epochs:.1f} epochs; "
          f"seed {cfg['seed']}")
    if dry_run:
        return print(f"dry run: everything can be read; a run would go to {out}")
    if step >= c["steps"]:
        return print(f"{path} is at step {step} of {c['steps']} already: raise train.steps to go on")

    # what the loop calls: the network itself, or the network with one of these around it
    net = model
    if c["activation_checkpointing"]:
        for block in model.children():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if ranks > 1 and not c["fsdp"]:
        net = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    if c["compile"]:
        net = torch.compile(net)
    torch.backends.cudnn.benchmark = True  # one size of picture: let cuDNN choose its fastest convolution for it

    # the folder of the run; rows that a crashed run logged past its checkpoint would come twice
    ranges = [f"val_loss_t{i * diffusion.T // 4}" for i in range(4)]
    columns = ["step", "epoch", "seconds", "images_per_s", "loss", "grad_norm", "val_loss", *ranges, "val_eps", "val_eps_raw"]
    log = out / "log.csv"
    if not rank:
        (out / "previews").mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False), encoding="utf-8")
        lines = log.read_text().splitlines(keepends=True)[1:] if step and log.exists() else []
        kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[0]) <= step]
        log.with_suffix(".partial").write_text(",".join(columns) + "\n" + "".join(kept))
        os.replace(log.with_suffix(".partial"), log)

    def save():
        rng = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else {})
        moments = optimizer.state_dict()
        state = {"format": FORMAT, "model": whole(model.state_dict()), "ema": whole(ema.state_dict()),
                 "optimizer": moments | {"state": whole(moments["state"])}, "scaler": scaler.state_dict(), "step": step,
                 "epoch": step * c["batch_size"] / len(pairs), "seconds": seconds, "rng": rng, "config": cfg,
                 "colorbook": colorbook.classes}
        if not rank:
            save_checkpoint(path, state)

    stop = []  # Ctrl-C and SIGTERM finish the step and save; a second one ends at once

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    loader = batches(pairs, c["batch_size"], cfg["seed"], step * c["batch_size"], d["flip"], d["augment"], device, rank, ranks)
    bar = tqdm(total=c["steps"], initial=step, unit="img", unit_scale=c["batch_size"], desc=out.name, dynamic_ncols=True,
               mininterval=0.5 if os.isatty(2) else 30, disable=rank > 0)
    sums, since, started, last_log = torch.zeros(2, device=device), step, time.monotonic() - seconds, time.monotonic()
    halt = 0

    try:
        while step < c["steps"] and not halt:
            for group in optimizer.param_groups:
                group["lr"] = c["lr"] * min((step + 1) / c["warmup"], 1, math.sqrt(c["hold"] / (step + 1)))
            optimizer.zero_grad()
            for planes in next(loader).chunk(c["accumulate"]):
                x0, mask = unpack(planes, num_classes)
                with autocast():
                    loss = diffusion.loss(net, x0, mask if model.num_classes else None, c["label_drop"], rank, ranks)
                scaler.scale(loss / c["accumulate"]).backward()
                sums[0] += loss.detach() / c["accumulate"]
            scaler.unscale_(optimizer)
            norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), c["grad_clip"]))
            scaler.step(optimizer)
            scaler.update()
            step += 1
            decay = min(c["ema"], (1 + step) / (10 + step))  # short memory at first: early previews show the present weights
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

            # fp16 overflows now and then, which GradScaler answers by leaving out the step: such a norm is no alarm
            sums[1] += norm.nan_to_num(0, 0, 0) if scaler.is_enabled() else norm
            bar.update()
            halt = max(stop, default=0)
            if ranks > 1:
                halt = agree(halt, device) if step % 10 == 0 else 0
            due = {name: step % c[name] == 0 or step == c["steps"] for name in ("log_every", "val_every", "preview_every", "save_every")}
            if not (any(due.values()) or halt):
                continue
            if ranks > 1:
                dist.all_reduce(sums)
                sums /= ranks
            loss_mean, norm_mean = (sums / (step - since)).tolist()
            seconds = time.monotonic() - started
            problem = "" if math.isfinite(loss_mean) and math.isfinite(norm_mean) else "loss or gradient is not finite"
            if scaler.is_enabled() and scaler.get_scale() < 1:
                problem = f"the gradient overflows fp16 at every step, at a scale of {scaler.get_scale():g} too"
            if problem:
                raise ValueError(f"step {step}: {problem}. {path} " + ("keeps the last good state" if path.exists() else
                                 "was not written yet") + "; try a smaller train.lr or train.precision=fp32")
            row = dict.fromkeys(columns, "")
            if due["val_every"]:
                args = held_out, c["val_pairs"], num_classes, c["batch_size"], device, autocast
                row["val_loss"], bins, row["val_eps"] = validate(ema, diffusion, *args)
                row |= dict(zip(ranges, bins))
                row["val_eps_raw"] = validate(model, diffusion, *args)[2]
                bar.write(f"step {step}: loss {loss_mean:.4f}, val {row['val_loss']:.4f}, error on eps {row['val_eps']:.4f}")
            if due["log_every"] or due["val_every"] or halt:
                rate = (step - since) * c["batch_size"] / (time.monotonic() - last_log)
                row |= {"step": step, "epoch": step * c["batch_size"] / len(pairs), "seconds": round(seconds, 1),
                        "images_per_s": round(rate, 1), "loss": loss_mean, "grad_norm": norm_mean}
                if not rank:
                    with open(log, "a", newline="") as file:
                        csv.DictWriter(file, columns).writerow({k: f"{v:.5g}" if type(v) is float else v for k, v in row.items()})
                sums.zero_()
                since, last_log = step, time.monotonic()
            if due["preview_every"]:
                sheet = preview(ema, diffusion, held_out, cfg, colorbook, device, autocast)
                if not rank:
                    sheet.save(out / "previews" / f"{step:07d}.png")
            if due["save_every"] or halt:  # after the log: rows past a checkpoint are made again, rows before it are not
                save()
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if ranks > 1:
        dist.destroy_process_group()
    if halt:
        print(f"stopped at step {step} of {c['steps']}, saved in {path}: go on with --resume")
        raise SystemExit(128 + halt)
    print(f"{path}: {step} steps in {seconds / 60:.1f} minutes; next: python sample.py --checkpoint {path} --mask ...")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the run's folder")
    parser.add_argument("--dry-run", action="store_true", help="read config and all data, say what the run would be, and stop")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that this terminal cannot show is no error
    try:
        train(load_config(args.config, args.preset, args.set), args.resume, args.dry_run)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


if __name__ == "__main__":
    main()
