"""What the preparing scripts share: their command line, and writing a prepared data set."""

import argparse
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from masks import save_mask


def parse_size(text):
    """ "64x96" to (64, 96): height, width."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 128x128, got {text!r}")
    return int(parts[0]), int(parts[1])


def write_dataset(out, colorbook, splits):
    """Write a prepared data set: all of it or nothing.

    splits: {"train": [(stem, make), ...], ...} where make() returns an image (H, W, 3) and ids (H, W), both uint8.
    It is built in <out>.partial and renamed at the end, so a run that was stopped leaves nothing half-written and a
    second run replaces the first. A folder that is no prepared data set is never replaced: FileExistsError.
    """
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    if out.exists() and not (out / "colorbook.json").is_file():
        raise FileExistsError(f"{out} exists and is no prepared data set (no colorbook.json): choose another --out")
    if not any(splits.values()):
        raise ValueError(f"no image has a mask: nothing to write to {out}")
    shutil.rmtree(partial, ignore_errors=True)
    for split, items in splits.items():
        for kind in ("images", "masks"):
            (partial / split / kind).mkdir(parents=True)
        for stem, make in tqdm(items, desc=f"{out.parent.name} {split}", unit="pair"):
            image, ids = make()
            Image.fromarray(image).save(partial / split / "images" / f"{stem}.png")
            save_mask(ids, partial / split / "masks" / f"{stem}.png", colorbook)
    colorbook.save(partial / "colorbook.json")
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
    print(f"{out}: " + ", ".join(f"{len(items)} {split}" for split, items in splits.items()) + " pairs")


def prepare_command(prepare, doc, name, size, **more):
    """The command line of a data/<name>/prepare.py: calls prepare(source, out, size, crop, ...more)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the folder of the unpacked download")
    parser.add_argument("--out", type=Path, default=Path("data", name, "prepared"), help="default: %(default)s")
    parser.add_argument("--size", type=parse_size, default=size, metavar="HxW",
                        help=f"height x width of the result, square or not; default: {size[0]}x{size[1]}")
    parser.add_argument("--crop", type=parse_size, metavar="HxW",
                        help="centred window that is taken first; default: the largest that has the ratio of --size")
    for flag, options in more.items():
        parser.add_argument(f"--{flag}", **options)
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that this terminal cannot show is no error
    try:
        prepare(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
