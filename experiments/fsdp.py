"""Does it pay to shard the weights: one training step under DDP, FSDP, and FSDP with CPU offload, in memory and time.

    torchrun --nproc_per_node=2 -m experiments.fsdp --preset idd_lite        two processes, on CPUs or GPUs
    python -m experiments.fsdp --preset bdd100k --set train.batch_size=8     one process: what CPU offload alone saves

DDP (train.py) keeps every weight, gradient and moment of AdamW on every device. FSDP gives each process a part of
them, and collects the weights of a block when it runs; with CPU offload the parts lie in the memory of the CPU. Each
makes the same steps: the network of `unet.py` with random weights, the loss of `ddpm.py` on one random batch, AdamW.
All must take the step of a single process that works through the batch in as many micro-batches.

Prints a row for each: the median seconds of a step; the peak memory of tensors in the first process (without EMA, which
costs as much as the weights); and by how much the gradient of the first step differs from the single process's,
relative to its norm. All have contiguous weights, which FSDP asks for, so that nothing but the sharding differs;
train.py itself uses channels-last. A minute for idd_lite on two CPU cores. On a CPU there is nothing to offload to, and
FSDP needs a newer torch than 2.6.
"""

import argparse
import statistics

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.timing import machine, now, peak_memory, table
from checkpoint import build, join_processes, pick_device, pick_precision
from config import add_config_arguments, command, load_config
from dataset import unpack

CLASSES = 19


def shard(model, device, offload):
    """FSDP2: every block with weights is a unit of its own, whose weights are collected when it runs."""
    if offload:
        model.to("cpu")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for block in model.children():
        if list(block.parameters()):
            fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)


def full_tensors(tensors, device):
    """Tensors on the CPU, put together from the parts of all processes where they are sharded."""
    full = []
    for tensor in tensors:
        tensor = tensor.detach().to(device)  # offloaded parts are exchanged on the device too
        full.append((tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu())
    return full


def train_steps(kind, cfg, steps, device):
    """The network after `steps` steps, with the gradients of the last one, and the seconds of each step.

    kind is "one process" (the whole batch, in as many micro-batches as there are processes), "DDP", "FSDP" or "FSDP,
    CPU offload". Every process draws the whole batch, t, noise and label drops, and works on its own part of them.
    """
    torch.manual_seed(cfg["seed"])
    model, diffusion, autocast = build(cfg, CLASSES, device)
    model.to(memory_format=torch.contiguous_format)  # FSDP takes no other layout
    if kind.startswith("FSDP"):
        shard(model, device, kind.endswith("offload"))
    net = DistributedDataParallel(model) if kind == "DDP" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg["train"]["lr"], betas=(0.9, cfg["train"]["beta2"]))

    B, size = cfg["train"]["batch_size"], cfg["data"]["size"]
    planes = torch.cat([torch.randint(256, (B, 3, *size)), torch.randint(CLASSES, (B, 1, *size))], dim=1).byte()
    x0, mask = unpack(planes.to(device), CLASSES)
    mask = mask if model.num_classes else None
    rank, ranks = dist.get_rank(), dist.get_world_size()
    micro_batches = [slice(r * B // ranks, (r + 1) * B // ranks) for r in range(ranks)]
    mine = micro_batches if kind == "one process" else [micro_batches[rank]]
    torch.manual_seed(cfg["seed"])

    seconds = []
    for _ in range(steps):
        start = now(device)
        optimizer.zero_grad()
        t, eps, keep = diffusion.draw(x0.shape, cfg["train"]["label_drop"], device)
        for i in mine:
            with autocast():
                loss = diffusion.loss(net, x0[i], mask if mask is None else mask[i], t[i], eps[i], keep[i])
            (loss / len(mine)).backward()
        optimizer.step()
        seconds.append(now(device) - start)
    return model, seconds


def run(args):
    """Measure every kind and print the table. Raises ValueError where this torch, device or config cannot."""
    cfg, steps = load_config(args.config, args.preset, args.set), args.steps
    device = pick_device(cfg["device"])
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise ValueError(f"FSDP on the CPU needs a newer torch than {torch.__version__}: update it, or use CUDA")
    cfg["train"]["precision"] = pick_precision(cfg["train"]["precision"], device)
    if device.type not in ("cpu", "cuda") or cfg["train"]["precision"] == "fp16":
        raise ValueError(f"expected device cpu or cuda and train.precision fp32 or bf16, got {device.type} and "
                         f"{cfg['train']['precision']}: GradScaler is not a part of this comparison")
    rank, ranks = join_processes(device)
    if ranks == 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    B, precision = cfg["train"]["batch_size"], cfg["train"]["precision"]
    if steps < 2 or B % ranks:
        raise ValueError(f"expected --steps of 2 or more and a train.batch_size that {ranks} process(es) can share "
                         f"evenly, got {steps} and {B}")
    print(f"{ranks} process(es), {machine(device)}, {precision}, {'x'.join(map(str, cfg['data']['size']))}, "
          f"hidden {cfg['model']['hidden_dim']}, batch {B}, {steps} steps\n")

    rows, expected = [], None
    for kind in ("one process", "DDP", "FSDP", *["FSDP, CPU offload"] * (device.type == "cuda")):
        model, _ = train_steps(kind, cfg, 1, device)
        gradient = torch.cat([g.flatten() for g in full_tensors([p.grad for p in model.parameters()], device)])
        del model
        expected = gradient if expected is None else expected
        seconds = train_steps(kind, cfg, steps, device)[1]
        peak = peak_memory(lambda kind=kind: train_steps(kind, cfg, 2, device), [], device)
        rows.append({"kind": kind, "s per step": statistics.median(seconds[1:]), "peak GiB": peak / 2**30,
                     "difference of the gradient": ((gradient - expected).norm() / expected.norm()).item()})
    print(table(rows))
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--steps", type=int, default=5, help="the first is warm-up (default: %(default)s)")
    command(run, parser.parse_args())


if __name__ == "__main__":
    main()
