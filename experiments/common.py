"""What several experiments share: numbers on the command line, the masks of a study, the programs of the project."""

import argparse
import json
import math
import subprocess
import sys

import torch

from config import PROJECT
from masks import save_mask
from sample import read_masks


def parse_numbers(text):
    return [float(number) for number in text.split(",")]


def parse_count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def choose_masks(split, folder, colorbook, size, n):
    """{stem: ids} of n masks, spread over the split; they are written to `folder`, where they were not yet."""
    if not folder.exists():
        masks = read_masks(split / "masks", colorbook, size)
        chosen = torch.linspace(0, len(masks) - 1, min(n, len(masks))).round().int().tolist()
        folder.mkdir(parents=True)
        for i in chosen:
            save_mask(list(masks.values())[i], folder / f"{list(masks)[i]}.png", colorbook)
    return read_masks(folder, colorbook, size)


def run_program(name, *arguments):
    """Run a program of the project; its last words become the ValueError where it fails."""
    words = [sys.executable, str(PROJECT.with_name(name)), *map(str, arguments)]
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}")


def read_report(folder, columns):
    """What evaluate.py wrote to a folder, for columns {title: its name of a number}: {title: "value [interval]"}."""
    numbers, found = json.loads((folder / "report.json").read_text())["numbers"], {}
    for title, name in columns.items():
        number = numbers.get(name, {"value": math.nan, "interval": None})
        found[title] = f"{number['value']:.3f}"
        if number["interval"]:
            found[title] += " [{:.3f}, {:.3f}]".format(*number["interval"])
    return found
