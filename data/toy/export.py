"""Make the small weights that come with the project from a run on toy scenes, or those of any run, to pass on.

    python -m data.toy.export --checkpoint runs/toy/checkpoint.pt --out data/toy/weights.pt

Only the averaged weights are kept, in half precision, with what sampling needs: an eighth of the size. Such a file can
be sampled from, but not resumed.
"""

import argparse
from pathlib import Path

from checkpoint import load_checkpoint, save_checkpoint
from config import command


def export(checkpoint, out):
    state = load_checkpoint(checkpoint)
    kept = {key: state[key] for key in ("step", "images", "seconds", "config", "colorbook")}
    save_checkpoint(out, kept | {"ema": {name: weights.half() for name, weights in state["ema"].items()}})
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {state['step']} steps")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a run")
    parser.add_argument("--out", type=Path, required=True, help="the small checkpoint")
    args = parser.parse_args()
    command(export, args.checkpoint, args.out)


if __name__ == "__main__":
    main()
