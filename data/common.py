"""What the preparing scripts share: their command line, and writing a prepared data set."""

import argparse
import os
import re
import tempfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from config import command
from masks import save_mask

PREPARED = re.compile(r"colorbook\.json|(train|val|test)/((images|masks)/([^/]+\.png)?|\.planes_[^/]+)?")


def parse_size(text):
    """ "64x96" to (64, 96): height, width."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdecimal() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 128x128, got {text!r}")
    return int(parts[0]), int(parts[1])


def check_replaceable(out):
    """FileExistsError if `out` holds anything but a prepared data set and the maps that Pairs makes of it."""
    remedy = "and is not replaced: choose another --out, or delete it yourself"
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, {remedy}")
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix() + "/" * path.is_dir()
        if path.is_symlink() or not PREPARED.fullmatch(name):
            raise FileExistsError(f"{out} holds {name}, which is no part of a prepared data set, {remedy}")
    if out.exists() and any(out.iterdir()) and not (out / "colorbook.json").exists():
        raise FileExistsError(f"{out} holds files but no colorbook.json, so it is no prepared data set, {remedy}")


def write_dataset(out, colorbook, splits):
    """Write a prepared data set: all of it or nothing.

    splits: {"train": [(stem, make), ...], ...} where make() returns an image (H, W, 3) and ids (H, W), both uint8.

    It is built in a temporary folder beside `out`. An older set is moved aside, and deleted when the new one is in its
    place. FileExistsError where `out` holds anything else: see check_replaceable().
    """
    out = Path(out).resolve()  # where `out` is a link, the folder behind it is replaced, not the link
    check_replaceable(out)
    if not any(splits.values()):
        raise ValueError(f"no image has a mask: nothing to write to {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.partial-", dir=out.parent) as beside:
        new, old = Path(beside, "new"), Path(beside, "old")
        for split, items in splits.items():
            for kind in ("images", "masks"):
                (new / split / kind).mkdir(parents=True)
            for stem, make in tqdm(items, f"{out.parent.name} {split}", unit="pair"):
                image, ids = make()
                Image.fromarray(image).save(new / split / "images" / f"{stem}.png")
                save_mask(ids, new / split / "masks" / f"{stem}.png", colorbook)
        colorbook.save(new / "colorbook.json")
        check_replaceable(out)  # again: building takes minutes, in which somebody may have put files there
        try:
            if out.exists():
                os.replace(out, old)
            os.replace(new, out)
        except BaseException:  # Ctrl-C too: leaving the temporary folder deletes what is in it
            if old.exists() and not out.exists():
                os.replace(old, out)
            raise
    print(f"{out}: " + ", ".join(f"{len(items)} {split}" for split, items in splits.items()) + " pairs")


def prepare_command(prepare, doc, name, size, sources=None, **more):
    """The command line of a data/<name>/prepare.py: calls prepare(source, out, size, crop, ...more).

    sources: the folders that are read, {flag: help}; by default --source alone.
    """
    sources = sources or {"source": "the folder of the unpacked download"}
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, text in sources.items():
        parser.add_argument(f"--{flag}", type=Path, required=True, help=text)
    parser.add_argument("--out", type=Path, default=Path("data", name, "prepared"), help="default: %(default)s")
    parser.add_argument("--size", type=parse_size, default=size, metavar="HxW",
                        help=f"height x width of the result, square or not; default: {size[0]}x{size[1]}")
    parser.add_argument("--crop", type=parse_size, metavar="HxW",
                        help="centred window that is taken first; default: the largest that has the ratio of --size")
    for flag, options in more.items():
        parser.add_argument(f"--{flag}", **options)

    def run(out, **options):
        for flag in sources:
            if options[flag].resolve().is_relative_to(out.resolve()):
                raise ValueError(f"--out {out} is or contains --{flag} {options[flag]}, which is not replaced: choose "
                                 "another")
        prepare(out=out, **options)

    command(lambda: run(**vars(parser.parse_args())))
