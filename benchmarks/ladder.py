"""The ladder of a run: what its previews and validation loss were after N steps, as one image and a table.

    python -m benchmarks.ladder --run runs/toy --weights data/toy/weights.pt --out experiments/toy_ladder.png

--weights adds a row of the same masks by another checkpoint, at its own size.
"""

import argparse
import csv
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from checkpoint import build, load_checkpoint, pick_device, pick_precision
from config import command
from dataset import Pairs
from train import preview

CAPTION = 18  # height in pixels


def by_other_weights(run, weights):
    """A caption, and the preview sheet of the run by the averaged weights of another checkpoint."""
    cfg, state, device = load_checkpoint(run / "checkpoint.pt")["config"], load_checkpoint(weights), pick_device("auto")
    other = state["config"]
    other["train"] |= {"precision": pick_precision("auto", device), "previews": cfg["train"]["previews"]}
    pairs = Pairs(cfg["data"]["root"], cfg["data"]["val"], other["data"]["size"])
    model, diffusion, autocast = build(other, len(pairs.colorbook), device)
    model.load_state_dict(state["ema"])
    height, width = other["data"]["size"]
    sheet = preview(model, diffusion, pairs, other, device, autocast)
    return f"{state['step']} steps at {height}x{width}", sheet


def ladder(run, out, weights=None):
    """Stack the masks, the real images, and the row of generated images of every preview sheet; print the table."""
    sheets = {int(path.stem): Image.open(path) for path in sorted((run / "previews").glob("*.png"))}
    if not sheets:
        raise ValueError(f"{run / 'previews'}: no preview sheets; expected the folder of a run with masks as --run")
    strips = []
    for step, sheet in sheets.items():
        row = sheet.height // 3
        if not strips:
            strips.append(("mask", sheet.crop((0, 0, sheet.width, row))))
            strips.append(("real", sheet.crop((0, row, sheet.width, 2 * row))))
        strips.append((f"{step} steps", sheet.crop((0, 2 * row, sheet.width, 3 * row))))
    if weights:
        caption, sheet = by_other_weights(run, weights)
        row = sheet.height // 3
        strip = sheet.crop((0, 2 * row, sheet.width, 3 * row))
        strips.append((caption, strip.resize(strips[0][1].size, Image.Resampling.NEAREST)))
    image = Image.new("RGB", (strips[0][1].width, sum(strip.height + CAPTION for _, strip in strips)), "white")
    y = 0
    for caption, strip in strips:
        ImageDraw.Draw(image).text((4, y + 2), caption, "black", ImageFont.load_default(12))
        image.paste(strip, (0, y + CAPTION))
        y += CAPTION + strip.height
    image.save(out)
    print("| steps | minutes | loss | val_loss | val_eps |\n| --- | --- | --- | --- | --- |")
    with open(run / "log.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["val_loss"]:
                minutes = float(row["seconds"]) / 60
                print(f"| {row['step']} | {minutes:.1f} | {row['loss']} | {row['val_loss']} | {row['val_eps']} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/toy"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("ladder.png"), help="default: %(default)s")
    parser.add_argument("--weights", type=Path, help="a checkpoint for one more row")
    args = parser.parse_args()
    command(ladder, args.run, args.out, args.weights)


if __name__ == "__main__":
    main()
