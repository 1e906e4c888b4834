"""The ladder of a run: what its previews and validation loss were after N steps, as one picture and a table.

    python -m benchmarks.ladder --run runs/toy --out experiments/toy_ladder.png
"""

import argparse
import csv
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TOP = 18  # of a caption


def ladder(run, out):
    """Stack the masks, the real images, and the row of generated pictures of every preview sheet."""
    sheets = {int(path.stem): Image.open(path) for path in sorted((run / "previews").glob("*.png"))}
    if not sheets:
        raise ValueError(f"{run / 'previews'}: no preview sheets; is --run the folder of a run with masks?")
    strips = []
    for step, sheet in sheets.items():
        row = sheet.height // 3
        if not strips:
            strips += [("mask", sheet.crop((0, 0, sheet.width, row))), ("real", sheet.crop((0, row, sheet.width, 2 * row)))]
        strips.append((f"{step} steps", sheet.crop((0, 2 * row, sheet.width, 3 * row))))
    picture = Image.new("RGB", (strips[0][1].width, sum(strip.height + TOP for _, strip in strips)), "white")
    y = 0
    for caption, strip in strips:
        ImageDraw.Draw(picture).text((4, y + 2), caption, "black", ImageFont.load_default(12))
        picture.paste(strip, (0, y + TOP))
        y += TOP + strip.height
    picture.save(out)
    print("| steps | minutes | loss | val_loss | val_eps |\n| --- | --- | --- | --- | --- |")
    with open(run / "log.csv", newline="") as file:
        for r in csv.DictReader(file):
            if r["val_loss"]:
                print(f"| {r['step']} | {float(r['seconds']) / 60:.1f} | {r['loss']} | {r['val_loss']} | {r['val_eps']} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/toy"))
    parser.add_argument("--out", type=Path, default=Path("ladder.png"))
    args = parser.parse_args()
    try:
        ladder(args.run, args.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
