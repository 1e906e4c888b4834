"""What a checkpoint does with pairs that it never saw: its error on the noise, and whether images follow their mask.

    python -m benchmarks.held_out --checkpoint runs/idd_lite/checkpoint.pt --split test --n 48 --out held_out.png

Prints the mean squared error on the noise (masks given, t spread evenly, fixed noise, float32) for the raw and the
averaged weights. Then makes an image from each of n masks, with the sampler, steps and guidance of the checkpoint's
config, and measures its squared error to the real image of that mask, and to the real image of another one: if the
mask did not matter, the two would be equal. The sheet shows generated images only; with --show-data also their masks
and real images.
"""

import argparse
from pathlib import Path

import torch

from checkpoint import build, load_checkpoint, pick_device, pick_precision
from config import command
from dataset import Pairs, contact_sheet, to_uint8, unpack
from ddpm import guided_eps, noise_like_seeds, sample
from masks import Colorbook
from train import validate


def load_run(checkpoint, split, precision="auto"):
    """A checkpoint with its averaged weights, and a split of the data that it was trained on.

    Returns the checkpoint's dict, the device, network, diffusion,
    autocast and pairs. ValueError where the run has no masks, or its data have other classes by now.
    """
    state = load_checkpoint(checkpoint)
    cfg, colorbook = state["config"], Colorbook(state["colorbook"])
    device = pick_device(cfg["device"])
    cfg["train"]["precision"] = pick_precision(precision, device)
    model, diffusion, autocast = build(cfg, len(colorbook), device)
    if not model.num_classes:
        raise ValueError(f"{checkpoint} was trained without masks (model.conditional: false): nothing to follow")
    model.load_state_dict(state["ema"])
    model.eval()
    pairs = Pairs(cfg["data"]["root"], split, cfg["data"]["size"])
    if list(pairs.colorbook.classes.items()) != list(colorbook.classes.items()):
        raise ValueError(f"{cfg['data']['root']}: its colorbook is not that of {checkpoint}")
    return state, device, model, diffusion, autocast, pairs


def spread(pairs, n):
    """Planes of n of the pairs, or of all if there are fewer, evenly spread."""
    return pairs.planes[torch.linspace(0, len(pairs) - 1, min(n, len(pairs))).round().long()]


@torch.no_grad()
def held_out(checkpoint, split, n, show_data, out):
    """Print both measures and save the sheet. Raises ValueError or OSError for what the user can fix."""
    state, device, model, diffusion, autocast, pairs = load_run(checkpoint, split, "fp32")
    s, K, colorbook = state["config"]["sample"], len(pairs.colorbook), pairs.colorbook
    for weights in ("model", "ema"):
        model.load_state_dict(state[weights])
        errors = validate(model, diffusion, pairs, len(pairs), s["batch_size"], device, autocast)
        print(f"step {state['step']}, {split}, {len(pairs)} pairs, {weights}: loss {errors['val_loss']:.5f}, "
              f"error on eps {errors['val_eps']:.5f}")

    planes = spread(pairs, n)
    images = []
    for i in torch.arange(len(planes)).split(s["batch_size"]):
        mask = unpack(planes[i].to(device), K)[1]
        noise = noise_like_seeds(i.tolist(), (3, *planes.shape[2:]), device)
        eps_fn = guided_eps(model, diffusion, mask, s["guidance"], s["guidance_interval"])
        images.append(sample(eps_fn, noise, diffusion.alpha_bar, s["sampler"], s["steps"], s["eta"]).cpu())
    generated, real = torch.cat(images), unpack(planes, K)[0]
    own = (generated - real).square().mean(dim=(1, 2, 3))
    other = (generated - real.roll(len(planes) // 2, 0)).square().mean(dim=(1, 2, 3))
    print(f"squared error to the real image of the same mask {own.mean():.3f}, of another mask {other.mean():.3f}; "
          f"nearer to its own in {(own < other).sum()} of {len(own)} "
          f"({s['sampler']}, {s['steps']} steps, guidance {s['guidance']:g})")
    rows = [[image] for image in to_uint8(generated[:8])]
    if show_data:
        pairs_and_rows = zip(planes.numpy(), rows)
        rows = [[colorbook.paint(pair[3]), pair[:3].transpose(1, 2, 0), *row] for pair, row in pairs_and_rows]
    contact_sheet(rows, ["mask", "real", "generated"] if show_data else ()).save(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path("runs/idd_lite/checkpoint.pt"), help="default: %(default)s")
    add("--split", default="val", help="default: %(default)s")
    add("--n", type=int, default=48, help="masks; default: %(default)s")
    add("--show-data", action="store_true", help="masks and real images too: for your eyes only")
    add("--out", type=Path, default=Path("held_out.png"), help="default: %(default)s")
    args = parser.parse_args()
    command(held_out, args.checkpoint, args.split, args.n, args.show_data, args.out)


if __name__ == "__main__":
    main()
