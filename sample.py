"""Pictures from masks, with a trained checkpoint and nothing else.

    python sample.py --mask data/hand_drawn.png                     a mask, or a folder of masks
    python sample.py --mask masks/ --n 8 --seed 100                 8 pictures per mask
    python sample.py --mask my.png --guidance 1,2,3,5               the same seeds at each guidance, on one sheet
    python sample.py --mask my.png --sampler ddpm                   all 1000 steps of Algorithm 2
    python sample.py --unconditional 16                             no mask
    torchrun --nproc_per_node=4 -- sample.py --mask masks/          the same pictures, shared out to 4 processes or GPUs

Settings that are not given come from the `sample` part of --config, where one is named, else from the checkpoint. Every
picture is a PNG named <mask>_w<guidance>_seed<seed>.png that carries its settings as text; sheet.png shows them side by side.
"""

import argparse
import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from checkpoint import build, join_processes, load_checkpoint, pick_device
from config import add_config_arguments, checked, load_config
from dataset import contact_sheet, fit, list_files, read_image, to_uint8
from ddpm import guided_eps, noise_like_seeds, sample
from masks import SUFFIXES, UNLABELLED, Colorbook, one_hot, read_mask


def read_masks(path, colorbook, size):
    """{stem: ids (H, W) uint8} of a mask file or of every mask in a folder, fitted to size; says how."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such mask file or folder")
    files = list_files(path) if path.is_dir() else {path.stem: path}
    if not files:
        raise ValueError(f"{path}: no masks in this folder; expected pictures ({', '.join(SUFFIXES)})"
                         + (f". Do you mean {path / 'masks'}?" if (path / "masks").is_dir() else ""))
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


def sample_jobs(jobs, masks, model, diffusion, s, device, autocast, show=True):
    """Make every (stem, guidance, seed) of jobs; yields, batch by batch, jobs and their pictures (B, H, W, 3) uint8.

    A batch has one guidance, for w = 1 takes one pass and others two. As few batches as s["batch_size"] allows, equally
    large; smaller ones from where the device's memory turns out to be too small: pictures do not depend on the batch.
    """
    size, K = s["size"], model.num_classes
    passes = {"ddpm": diffusion.T}.get(s["sampler"], s["steps"])
    bar = tqdm(total=len(jobs) * passes, unit="step", desc=f"{len(jobs)} pictures of {passes} steps", disable=not show)
    most = s["batch_size"]
    for w in dict.fromkeys(w for _, w, _ in jobs):
        todo, B = [job for job in jobs if job[1] == w], 0
        while todo:
            B = B or -(-len(todo) // -(-len(todo) // most))
            part, done = todo[:B], bar.n
            full = part + part[-1:] * (B - len(part)) if s["compile"] else part  # what is compiled is for one shape
            try:
                mask = None
                if part[0][0] in masks:
                    mask = one_hot(torch.stack([torch.from_numpy(masks[stem]) for stem, _, _ in full]).to(device), K)
                with torch.no_grad(), autocast():
                    eps_fn = guided_eps(model, diffusion, mask, w, s["one_batch"], s["guidance_interval"])
                    noise = noise_like_seeds([seed for _, _, seed in full], (3, *size), device)
                    x = sample(eps_fn, noise, diffusion.alpha_bar, s["sampler"], s["steps"], s["eta"],
                               observe=lambda *_: bar.update(len(part)))
                pictures = to_uint8(x[: len(part)])
            except torch.OutOfMemoryError:
                if len(full) == 1:
                    raise ValueError(f"one picture of {size[0]}x{size[1]} does not fit into the memory of the device; "
                                     "try --set sample.one_batch=false, or --device cpu") from None
                most, B, bar.n = len(full) // 2, 0, done
                bar.write(f"out of memory with {len(full)} pictures at a time: going on with {most}")
                continue
            except RuntimeError as error:
                if not s["compile"]:
                    raise
                raise ValueError(f"with sample.compile: {str(error).splitlines()[0]}; --no-compile does without it") from error
            yield part, pictures
            todo = todo[B:]
    bar.close()


def run(args):
    # settings: the command line, then a config that was named, then the checkpoint
    named = args.config or args.preset or args.set
    cfg = load_config(args.config or "config.yaml", args.preset, args.set) if named or not args.checkpoint else None
    checkpoint = Path(args.checkpoint or Path(cfg["out"]) / "checkpoint.pt")
    state = load_checkpoint(checkpoint)
    trained = state["config"]
    s = {"guidance_interval": [], "precision": "auto", "compile": False}  # what a checkpoint may be too old to have
    s |= (cfg if named else trained)["sample"]
    for key in ("mask", "n", "sampler", "steps", "eta", "guidance_interval", "seed", "batch_size", "precision", "compile", "out"):
        if getattr(args, key) is not None:
            s[key] = checked(f"sample.{key}", getattr(args, key), f"--{key.replace('_', '-')}")
    guidances = list(dict.fromkeys(checked("sample.guidance", w, f"--guidance {args.guidance} (several as 1,2,3,5)")
                                   for w in (args.guidance.split(",") if args.guidance else [s["guidance"]])))
    s["size"] = tuple(trained["data"]["size"])
    if args.unconditional is not None and args.unconditional < 1:
        raise ValueError(f"--unconditional {args.unconditional}: expected how many pictures to make, 1 or more")
    if not args.unconditional and not s["mask"]:
        raise ValueError("no mask: give --mask FILE_OR_FOLDER, set sample.mask in the config, or use --unconditional N")

    device = pick_device(args.device or (cfg or trained)["device"])
    rank, ranks = join_processes(device)
    everybody = dist.new_group(backend="gloo", timeout=timedelta(days=7)) if ranks > 1 else None
    colorbook = Colorbook(state["colorbook"])
    torch.backends.cudnn.benchmark = True  # batches of one size: let cuDNN choose its fastest convolution for it
    if s["precision"] != "auto":
        trained["train"]["precision"] = s["precision"]
    elif device.type != "cuda" and trained["train"]["precision"] == "fp16":
        trained["train"]["precision"] = "fp32"  # only CUDA is fast in fp16
    model, diffusion, autocast = build(trained, len(colorbook), device)
    model.load_state_dict(state["model" if args.raw else "ema"])
    model.eval()
    if s["compile"]:
        model.compile(dynamic=False)

    # what to make: (mask, guidance, seed); each mask of a folder has seeds of its own, or all would share one night
    if args.unconditional:
        masks, guidances = {}, [0.0]
        jobs = [("unconditional", 0.0, s["seed"] + i) for i in range(args.unconditional)]
    else:
        if not model.num_classes:
            raise ValueError(f"{checkpoint} was trained without masks (model.conditional: false): use --unconditional N")
        masks = read_masks(s["mask"], colorbook, s["size"])
        jobs = [(stem, w, s["seed"] + i * s["n"] + j) for i, stem in enumerate(masks) for w in guidances for j in range(s["n"])]

    out, started = Path(s["out"]), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)

    def file(job):
        stem, w, seed = job
        return out / (f"{stem}_w{w:g}_seed{seed}.png" if masks else f"{stem}_seed{seed}.png")

    def save(job, picture):
        stem, w, seed = job
        about = PngInfo()
        about.add_text("settings", json.dumps({
            "mask": stem if masks else None, "mask_source": s["mask"] if masks else None, "seed": seed, "guidance": w,
            "guidance_interval": s["guidance_interval"], "sampler": s["sampler"],
            "steps": diffusion.T if s["sampler"] == "ddpm" else s["steps"], "eta": s["eta"],
            "precision": trained["train"]["precision"], "weights": "raw" if args.raw else "ema",
            "checkpoint": str(checkpoint), "trained_steps": state["step"]}))
        Image.fromarray(picture).save(file(job), pnginfo=about)

    # each process makes its share of the work, and writes a batch while the device works on the next one
    share = [job for w in guidances for job in jobs if job[1] == w][rank::ranks]
    with ThreadPoolExecutor() as pool:
        saved = ()
        for part, pictures in sample_jobs(share, masks, model, diffusion, s, device, autocast, show=rank == 0):
            list(saved)  # raises what went wrong in writing
            saved = pool.map(save, part, pictures)
        list(saved)
    if ranks > 1:
        dist.barrier(everybody)  # all pictures are there
        dist.destroy_process_group()
    if rank > 0:
        return

    def made(job):
        return read_image(file(job))

    if not masks:
        rows, titles = [[made(job) for job in jobs[i : i + 8]] for i in range(0, min(len(jobs), 400), 8)], ()
    elif len(guidances) > 1:  # a row per mask and seed, a column per guidance
        rows = [[colorbook.paint(masks[stem]), *(made((stem, w, seed)) for w in guidances)]
                for stem, _, seed in [job for job in jobs if job[1] == guidances[0]][:50]]
        titles = ["mask", *(f"w = {w:g}" for w in guidances)]
    else:
        rows = [[colorbook.paint(masks[stem]), *(made(job) for job in jobs if job[0] == stem)] for stem in list(masks)[:50]]
        titles = ["mask"]
    contact_sheet(rows, titles).save(out / "sheet.png")  # more than 50 rows would be no picture to look at
    print(f"{len(jobs)} pictures in {time.monotonic() - started:.1f} s on {device.type}, {s['sampler']}, "
          f"guidance {', '.join(f'{w:g}' for w in guidances)}, seeds {jobs[0][2]} to {jobs[-1][2]}: {out}, side by side in {out / 'sheet.png'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mask", help="a mask file, or a folder of them")
    parser.add_argument("--unconditional", type=int, metavar="N", help="N pictures without a mask")
    parser.add_argument("--checkpoint", help="default: checkpoint.pt in the run that config.yaml names")
    parser.add_argument("--n", type=int, help="pictures per mask")
    parser.add_argument("--sampler", help="dpm_solver, plms, ddim or ddpm")
    parser.add_argument("--steps", type=int, help="of dpm_solver, plms and ddim")
    parser.add_argument("--eta", type=float, help="of ddim, 0 to 1")
    parser.add_argument("--guidance", metavar="W[,W...]", help="one or several; 1 is without guidance")
    parser.add_argument("--guidance-interval", type=float, nargs="*", metavar="NOISE",
                        help="the lowest and highest noise level, for a signal of 1, with guidance; no numbers: all levels")
    parser.add_argument("--seed", type=int, help="of the first picture")
    parser.add_argument("--batch-size", type=int, help="most pictures at a time")
    parser.add_argument("--precision", help="auto (as it was trained), fp32, fp16 or bf16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile: for many pictures")
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
