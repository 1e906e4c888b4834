"""Which classes are rare: the pixels of each class over a split of a prepared data set (Bozsó 2023, Figure 27).

    python -m experiments.count --root data/toy/prepared
    python -m experiments.count --root data/idd_lite/prepared --split val --out counts.png

Prints a table, and writes it as a CSV file and as a bar chart: counts.csv and counts.png. A class that is rare in the
training data is drawn badly later. A thousand masks take a few seconds.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import command
from dataset import list_files
from masks import UNLABELLED, Colorbook, draw_bars, read_mask


def count(root, split, out):
    """The table, the CSV file and the chart. Raises ValueError where there is no data set or a mask cannot be read."""
    colorbook = Colorbook.load(root / "colorbook.json")
    files = list_files(root / split / "masks")
    if not files:
        raise ValueError(f"{root / split / 'masks'}: no masks in this folder")
    pixels, images = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for path in tqdm(files.values(), unit="mask", leave=False):
        histogram = np.bincount(read_mask(path, colorbook)[0].ravel(), minlength=256)
        pixels += histogram
        images += histogram > 0

    share = pixels / pixels.sum()
    names = dict(enumerate(colorbook.names)) | {UNLABELLED: "unlabelled"}
    rows = [(k, name, int(pixels[k]), float(share[k]), int(images[k])) for k, name in names.items()]
    print(f"{'id':>3} {'class':14} {'pixels':>12} {'share':>8} {'images':>9}")
    for row in rows:
        print("{:3d} {:14} {:12,d} {:8.3%} {:9,d}".format(*row))
    with open(out.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("id", "class", "pixels", "share", "images"), *rows])
    classes = share[: len(colorbook)]
    draw_bars(colorbook, [f"{value:.2%}" for value in classes], classes / share.max()).save(out.with_suffix(".png"))
    print(f"{out.with_suffix('.png')} and .csv: {len(files)} masks of {root / split}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data/toy/prepared"), help="default: %(default)s")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("counts.png"), help="default: %(default)s")
    args = parser.parse_args()
    command(count, args.root, args.split, args.out)


if __name__ == "__main__":
    main()
