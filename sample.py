"""Pictures from masks, with a trained checkpoint and nothing else.

    python sample.py --mask data/hand_drawn.png                     a mask, or a folder of masks
    python sample.py --mask masks/ --n 8 --seed 100                 8 pictures per mask
    python sample.py --mask my.png --guidance 1,2,3,5               the same seeds at each guidance, on one sheet
    python sample.py --mask my.png --sampler ddpm                   all 1000 steps of Algorithm 2
    python sample.py --unconditional 16                             no mask

Settings that are not given come from the `sample` part of --config, where one is named, else from the checkpoint. Every
picture is a PNG named <mask>_w<guidance>_seed<seed>.png that carries its settings as text; sheet.png shows them side by side.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from dataset import SUFFIXES, UNLABELLED, Colorbook, contact_sheet, fit, list_files, one_hot, read_mask, to_uint8
from ddpm import guided_eps, noise_like_seeds, sample
from train import add_config_arguments, build, checked, load_checkpoint, load_config, pick_device


def read_masks(path, colorbook, size):
    """{stem: ids (H, W) uint8} of a mask file or of every mask in a folder, fitted to size; says how."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such mask file or folder")
    files = list_files(path) if path.is_dir() else {path.stem: path}
    if not files:
        raise ValueError(f"{path}: no masks in this folder; expected pictures ({', '.join(SUFFIXES)})")
    masks, said = {}, Counter()
    for stem, file in files.items():
        ids, kind, snapped = read_mask(file, colorbook)
        H, W = ids.shape
        masks[stem] = fit(ids, size)
        said[f"a mask in {kind}" + (f", {snapped:.1%} of its pixels snapped to the nearest class" if snapped else "")
             + (f", {(ids == UNLABELLED).mean():.1%} unlabelled" if (ids == UNLABELLED).any() else "")
             + (f", {H}x{W} resized to {size[0]}x{size[1]}" if (H, W) != size else "")
             + (" after cropping its centre to that ratio" if H * size[1] != W * size[0] else "")] += 1
    for what, n in said.most_common(8):
        print(f"{path}: {what}" + (f" ({n} such)" if n > 1 else ""))
    return masks


def sample_jobs(jobs, masks, model, diffusion, s, device, autocast):
    """Make every (stem, guidance, seed) of jobs in batches; yields the job and its picture (H, W, 3) uint8."""
    size, K = s["size"], model.num_classes
    passes = {"ddpm": diffusion.T}.get(s["sampler"], s["steps"])
    bar = tqdm(total=len(jobs) * passes, unit="step", desc=f"{len(jobs)} pictures of {passes} steps")
    for w in dict.fromkeys(w for _, w, _ in jobs):
        same = [job for job in jobs if job[1] == w]
        for start in range(0, len(same), s["batch_size"]):
            part = same[start : start + s["batch_size"]]
            mask = None
            if part[0][0] in masks:
                mask = one_hot(torch.stack([torch.from_numpy(masks[stem]) for stem, _, _ in part]).to(device), K)
            with torch.no_grad(), autocast():
                eps_fn = guided_eps(model, diffusion, mask, w, s["one_batch"])
                noise = noise_like_seeds([seed for _, _, seed in part], (3, *size), device)
                x = sample(eps_fn, noise, diffusion.alpha_bar, s["sampler"], s["steps"], s["eta"],
                           observe=lambda *_: bar.update(len(part)))
            yield from zip(part, to_uint8(x))
    bar.close()


def run(args):
    # settings: the command line, then a config that was named, then the checkpoint
    named = args.config or args.preset or args.set
    cfg = load_config(args.config or "config.yaml", args.preset, args.set) if named or not args.checkpoint else None
    checkpoint = Path(args.checkpoint or Path(cfg["out"]) / "checkpoint.pt")
    state = load_checkpoint(checkpoint)
    trained = state["config"]
    s = dict((cfg if named else trained)["sample"])
    for key in ("mask", "n", "sampler", "steps", "eta", "seed", "batch_size", "out"):
        if getattr(args, key) is not None:
            s[key] = checked(f"sample.{key}", getattr(args, key), f"--{key.replace('_', '-')}")
    guidances = [checked("sample.guidance", w, f"--guidance {args.guidance} (several as 1,2,3,5)")
                 for w in (args.guidance.split(",") if args.guidance else [s["guidance"]])]
    s["size"] = tuple(trained["data"]["size"])
    if args.unconditional is not None and args.unconditional < 1:
        raise ValueError(f"--unconditional {args.unconditional}: expected how many pictures to make, 1 or more")
    if not args.unconditional and not s["mask"]:
        raise ValueError("no mask: give --mask FILE_OR_FOLDER, set sample.mask in the config, or use --unconditional N")

    device = pick_device(args.device or (cfg or trained)["device"])
    colorbook = Colorbook(state["colorbook"])
    if device.type != "cuda" and trained["train"]["precision"] == "fp16":
        trained["train"]["precision"] = "fp32"  # only CUDA is fast in fp16
    model, diffusion, autocast = build(trained, len(colorbook), device)
    model.load_state_dict(state["model" if args.raw else "ema"])
    model.eval()

    # what to make: (mask, guidance, seed); each mask of a folder has seeds of its own, or all would share one night
    if args.unconditional:
        masks, guidances = {}, [0.0]
        jobs = [("unconditional", 0.0, s["seed"] + i) for i in range(args.unconditional)]
    else:
        if not model.num_classes:
            raise ValueError(f"{checkpoint} was trained without masks (model.conditional: false): use --unconditional N")
        masks = read_masks(s["mask"], colorbook, s["size"])
        jobs = [(stem, w, s["seed"] + i * s["n"] + j) for i, stem in enumerate(masks) for w in guidances for j in range(s["n"])]

    out, pictures, started = Path(s["out"]), {}, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    for job, picture in sample_jobs(jobs, masks, model, diffusion, s, device, autocast):
        stem, w, seed = job
        name = f"{stem}_seed{seed}.png" if not masks else f"{stem}_w{w:g}_seed{seed}.png"
        about = PngInfo()
        about.add_text("settings", json.dumps({
            "mask": stem if masks else None, "mask_source": s["mask"] if masks else None, "seed": seed, "guidance": w,
            "sampler": s["sampler"], "steps": diffusion.T if s["sampler"] == "ddpm" else s["steps"], "eta": s["eta"],
            "weights": "raw" if args.raw else "ema", "checkpoint": str(checkpoint), "trained_steps": state["step"]}))
        Image.fromarray(picture).save(out / name, pnginfo=about)
        pictures[job] = picture

    if not masks:
        made = list(pictures.values())
        rows, titles = [made[i : i + 8] for i in range(0, len(made), 8)], ()
    elif len(guidances) > 1:  # a row per mask and seed, a column per guidance
        rows = [[colorbook.paint(masks[stem]), *(pictures[stem, w, seed] for w in guidances)]
                for stem, first, seed in jobs if first == guidances[0]]
        titles = ["mask", *(f"w = {w:g}" for w in guidances)]
    else:
        rows = [[colorbook.paint(ids), *(p for (of, _, _), p in pictures.items() if of == stem)] for stem, ids in masks.items()]
        titles = ["mask"]
    contact_sheet(rows[:50], titles).save(out / "sheet.png")  # more would be no picture to look at
    print(f"{len(jobs)} pictures in {time.monotonic() - started:.1f} s on {device.type}, {s['sampler']}, "
          f"guidance {', '.join(f'{w:g}' for w in guidances)}, seeds {jobs[0][2]} to {jobs[-1][2]}: {out}, side by side in {out / 'sheet.png'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mask", help="a mask file, or a folder of them")
    parser.add_argument("--unconditional", type=int, metavar="N", help="N pictures without a mask")
    parser.add_argument("--checkpoint", help="default: checkpoint.pt in the run that config.yaml names")
    parser.add_argument("--n", type=int, help="pictures per mask")
    parser.add_argument("--sampler", help="dpm_solver, ddim or ddpm")
    parser.add_argument("--steps", type=int, help="of dpm_solver and ddim")
    parser.add_argument("--eta", type=float, help="of ddim, 0 to 1")
    parser.add_argument("--guidance", metavar="W[,W...]", help="one or several; 1 is without guidance")
    parser.add_argument("--seed", type=int, help="of the first picture")
    parser.add_argument("--batch-size", type=int, help="pictures at a time")
    parser.add_argument("--out", help="folder for pictures and sheet.png")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--raw", action="store_true", help="the last weights instead of their average (EMA)")
    add_config_arguments(parser, default=None)
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that this terminal cannot show is no error
    try:
        run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


if __name__ == "__main__":
    main()
