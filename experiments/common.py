"""What several experiments share: numbers of the command line, files, the masks of a study, programs, and curves."""

import argparse
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from checkpoint import replacing
from config import PROJECT
from dataset import list_files
from masks import save_mask
from sample import read_masks

COLORS = ["#1f4e9e", "#c0392b", "#2e8b57", "#e08e1b", "#8e44ad", "#16a0b0", "#7f5539", "#d6408b", "#666666"]


def parse_numbers(text):
    return [float(number) for number in text.split(",")]


def parse_count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def write_text(path, text):
    """Write a file in UTF-8, which takes the name `path` once it is complete."""
    with replacing(path) as file:
        file.write(text.encode())


def name_changes(before, now):
    """The keys whose values differ between two dicts of plain values, with both, as text; "" where all are equal.

    Dicts in other orders differ: the order of classes gives their ids.
    """
    changes = []
    for key in before | now:
        was, is_now = repr(before.get(key)), repr(now.get(key))
        if was != is_now:
            changes.append(f"{key} (was {was:.60}, is {is_now:.60})")
    return ", ".join(changes)


def choose_masks(split, folder, colorbook, size, n):
    """{stem: ids} of n masks, spread over the split; they are written to `folder`, where they were not yet.

    ValueError where the folder holds other masks, as of another n.
    """
    stems = list(list_files(split / "masks"))
    chosen = [stems[i] for i in torch.linspace(0, len(stems) - 1, min(n, len(stems))).round().int().tolist()]
    if not folder.exists():
        masks, side = read_masks(split / "masks", colorbook, size), folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(side, ignore_errors=True)
        side.mkdir(parents=True)
        for stem in chosen:
            save_mask(masks[stem], side / f"{stem}.png", colorbook)
        side.rename(folder)
    masks = read_masks(folder, colorbook, size)
    if set(masks) != set(chosen):
        raise ValueError(f"{folder}: {len(masks)} masks, which are not the {len(chosen)} that are asked for of "
                         f"{split}: choose another folder, or delete it with what was made of them")
    return masks


def run_program(name, *arguments):
    """Run a program of the project; its last words become the ValueError where it fails."""
    words = [sys.executable, str(PROJECT.with_name(name)), *map(str, arguments)]
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last_words = (done.stderr.strip() or "without a message").splitlines()[-1]
        raise ValueError(f"{' '.join(words)} ended with {done.returncode}: {last_words}")


def read_report(folder, columns):
    """What evaluate.py wrote to a folder, for columns {title: its name of a number}: {title: "value [interval]"}.

    "nan" stands for a number that is not there, or that has no value.
    """
    numbers, found = json.loads((folder / "report.json").read_text())["numbers"], {}
    for title, name in columns.items():
        number = numbers.get(name, {"value": None, "interval": None})
        found[title] = f"{math.nan if number['value'] is None else number['value']:.3f}"
        if number["interval"]:
            found[title] += " [{:.3f}, {:.3f}]".format(*number["interval"])
    return found


def make_axis(values, logarithmic, start, length):
    """A function from a value to its place in pixels, from start to start + length; and the ticks, which are values."""
    low, high = min(values), max(values)
    round_numbers = [m * 10.0**e for e in range(-9, 10) for m in (1, 2, 5)]
    if logarithmic:
        ticks = [number for number in round_numbers if low <= number <= high]
        return lambda v: start + length * np.log(v / low) / max(np.log(high / low), 1e-9), ticks
    step = next(number for number in round_numbers if high - low <= 10 * number)
    ticks = step * np.arange(np.floor(low / step), np.ceil(high / step) + 1)
    return lambda v: start + length * (v - ticks[0]) / max(ticks[-1] - ticks[0], 1e-9), ticks


def draw_curves(curves, title, log_x=False, log_y=False):
    """An image of curves {name: {x: [values]}}: a line through the means, bars from lowest to highest value."""
    image = Image.new("RGB", (640, 450 + 18 * len(curves)), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    x_of, x_ticks = make_axis([x for points in curves.values() for x in points], log_x, 70, 540)
    y_of, y_ticks = make_axis([y for points in curves.values() for values in points.values() for y in values], log_y,
                              400, -360)
    pen.text((70, 10), title, "black", font)
    for y in y_ticks:
        pen.line([(70, y_of(y)), (610, y_of(y))], "#dddddd")
        pen.text((62, y_of(y)), f"{y:.4g}", "black", font, anchor="rm")
    for x in x_ticks:
        pen.text((x_of(x), 408), f"{x:.4g}", "black", font, anchor="ma")
    for i, (name, points) in enumerate(curves.items()):
        color = COLORS[i % len(COLORS)]
        pen.line([(x_of(x), y_of(np.mean(points[x]))) for x in sorted(points)], color, 2)
        for x, values in points.items():
            pen.line([(x_of(x), y_of(min(values))), (x_of(x), y_of(max(values)))], color, 2)
        pen.text((70, 432 + 18 * i), name, color, font)
    return image
