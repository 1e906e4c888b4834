"""What a checkpoint does with pairs that it never saw: its error on the noise, and whether its pictures follow their mask.

    python -m benchmarks.held_out --checkpoint runs/idd_lite/checkpoint.pt --split test --n 48 --out held_out.png

Prints the mean squared error on the noise (masks given, t spread evenly, fixed noise, float32) for the raw and the averaged
weights. Then makes a picture from each of n masks and measures its squared error to the real picture of that mask, and to the
real picture of another one: if the mask did not matter, the two would be equal. The sheet shows generated pictures only, a row
per mask, with --show-data also mask and real picture.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from checkpoint import build, load_checkpoint, pick_device
from dataset import Pairs, contact_sheet, to_uint8, unpack
from ddpm import guided_eps, noise_like_seeds, sample
from masks import Colorbook
from train import validate


@torch.no_grad()
def held_out(checkpoint, split, n, seeds, guidance, steps, batch_size, show_data, out):
    state, device = load_checkpoint(checkpoint), pick_device("auto")
    cfg, colorbook = state["config"], Colorbook(state["colorbook"])
    cfg["train"]["precision"] = "fp32"
    model, diffusion, autocast = build(cfg, len(colorbook), device)
    pairs = Pairs(cfg["data"]["root"], split, cfg["data"]["size"])
    for weights in ("model", "ema"):
        model.load_state_dict(state[weights])
        loss, _, eps_error = validate(model, diffusion, pairs, len(pairs), len(colorbook), batch_size, device, autocast)
        print(f"step {state['step']}, {split}, {len(pairs)} pairs, {weights}: loss {loss:.5f}, error on eps {eps_error:.5f}")

    chosen = np.linspace(0, len(pairs) - 1, min(n, len(pairs))).round().astype(int)
    planes = pairs.planes[chosen]
    real, mask = unpack(planes.to(device), len(colorbook))
    columns = []
    for k in range(seeds):
        made = []
        for part in torch.arange(len(chosen)).split(batch_size):
            noise = noise_like_seeds([1000 * k + int(i) for i in part], real.shape[1:], device)
            made.append(sample(guided_eps(model, diffusion, mask[part], guidance), noise, diffusion.alpha_bar, steps=steps))
        columns.append(torch.cat(made))
    own = torch.stack([(x - real).square().mean(dim=(1, 2, 3)) for x in columns]).mean(0)
    other = torch.stack([(x - real.roll(len(chosen) // 2, 0)).square().mean(dim=(1, 2, 3)) for x in columns]).mean(0)
    print(f"squared error to the real picture of the same mask {own.mean():.3f}, of another mask {other.mean():.3f}; "
          f"nearer to its own in {(own < other).sum()} of {len(own)} (guidance {guidance:g}, {seeds} seed(s), {steps} steps)")
    rows = [list(row) for row in zip(*(to_uint8(x) for x in columns))]
    if show_data:
        rows = [[colorbook.paint(pair[3]), pair[:3].transpose(1, 2, 0), *row] for pair, row in zip(planes.numpy(), rows)]
    contact_sheet(rows[:8]).save(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/idd_lite/checkpoint.pt"))
    parser.add_argument("--split", default="val")
    parser.add_argument("--n", type=int, default=48, help="masks")
    parser.add_argument("--seeds", type=int, default=1, help="pictures per mask")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--show-data", action="store_true", help="masks and real pictures too: for your eyes only")
    parser.add_argument("--out", type=Path, default=Path("held_out.png"))
    try:
        held_out(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


if __name__ == "__main__":
    main()
