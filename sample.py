"""Images from masks, with a trained checkpoint and nothing else.

    python sample.py --mask data/hand_drawn.png                     a mask, or a folder of masks
    python sample.py --mask masks/ --n 8 --seed 100                 8 images per mask
    python sample.py --mask masks/ --n 8 --seed 100 --resume        go on where it was stopped
    python sample.py --mask my.png --guidance 1,2,3,5               the same seeds at each guidance, on one sheet
    python sample.py --mask my.png --sampler ddpm                   all 1000 steps of Algorithm 2
    python sample.py --unconditional 16                             no mask
    torchrun --nproc_per_node=4 -- sample.py --mask masks/          the same images, shared out to 4 processes or GPUs

Settings come from the flags, else from --set, else from a --config or --preset that is named, else from the checkpoint.
Each image is a PNG named <mask>_w<guidance>_seed<seed>.png that carries its settings as text; sheet.png shows them all.
"""

import argparse
import contextlib
import json
import math
import time
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from checkpoint import build, join_processes, load_checkpoint, pick_device, replacing
from config import add_config_arguments, checked, command, load_config, parse_overrides
from dataset import contact_sheet, fit, list_files, read_image, to_uint8
from ddpm import guided_eps, noise_like_seeds, sample
from masks import SUFFIXES, UNLABELLED, Colorbook, one_hot, read_mask

FLAGS = ("mask", "n", "sampler", "steps", "seed", "batch_size", "out")  # each is the setting sample.<flag>


def resolve(args):
    """The checkpoint as a dict, and the settings of the samples: its `sample` part, with guidances, size and device.

    cfg, without the checkpoint, names the run, the device and a mask that was written into config.yaml.
    """
    cfg = load_config(args.config, args.preset, args.set)
    given = parse_overrides(args.set)
    foreign = [key for key in given if not key.startswith("sample.") and key not in ("out", "device")]
    if foreign:
        raise ValueError(f"--set {foreign[0]}: the checkpoint has its own; here --set takes sample.*, out and device")
    state = load_checkpoint(args.checkpoint or Path(cfg["out"]) / "checkpoint.pt")
    s = load_config(args.config, args.preset, args.set, base=state["config"])["sample"]
    s["mask"] = cfg["sample"]["mask"] or s["mask"]
    for key in FLAGS:
        if getattr(args, key) is not None:
            s[key] = checked(f"sample.{key}", getattr(args, key), f"--{key.replace('_', '-')}")
    s["guidances"] = [s["guidance"]]
    if args.guidance:
        where = f"--guidance {args.guidance} (several as 1,2,3,5)"
        s["guidances"] = list(dict.fromkeys(checked("sample.guidance", w, where) for w in args.guidance.split(",")))
    s["size"] = tuple(state["config"]["data"]["size"])
    s["device"] = pick_device(args.device or cfg["device"])
    if s["precision"] == "auto":
        s["precision"] = state["config"]["train"]["precision"]
        if s["precision"] == "fp16" and s["device"].type != "cuda":
            s["precision"] = "fp32"  # only CUDA is fast in fp16

    if args.unconditional is not None:
        if args.unconditional < 1:
            raise ValueError(f"--unconditional {args.unconditional}: expected how many images to make, 1 or more")
        if args.mask or args.guidance or args.n:
            raise ValueError("--unconditional N makes N images without a mask: leave out --mask, --guidance and --n")
        s["guidances"] = [0.0]
    elif not state["config"]["model"]["conditional"]:
        raise ValueError(f"{state['path']} was trained without masks (model.conditional: false): use --unconditional N")
    elif not s["mask"]:
        raise ValueError("no mask: give --mask FILE_OR_FOLDER, set sample.mask in the config, or use --unconditional N")
    elif Path(s["mask"]).resolve() == Path(s["out"]).resolve():
        raise ValueError(f"{s['out']}: the masks are in it; choose another folder for the images with --out")
    if s["steps"] > state["config"]["diffusion"]["T"] and s["sampler"] != "ddpm":
        raise ValueError(f"--steps {s['steps']}: expected 1..{state['config']['diffusion']['T']}, the checkpoint's T")
    return state, s


def read_masks(path, colorbook, size):
    """{stem: ids (H, W) uint8} of a mask file or of a folder of masks, fitted to size; prints how they were read."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path.absolute()}: no such mask file or folder")
    files = list_files(path) if path.is_dir() else {path.stem: path}
    if not files:
        raise ValueError(f"{path}: no masks in this folder; expected images ({', '.join(SUFFIXES)})"
                         + (f". Do you mean {path / 'masks'}?" if (path / "masks").is_dir() else ""))
    masks, notes = {}, defaultdict(list)
    for stem, file in files.items():
        ids, kind, snapped = read_mask(file, colorbook)
        H, W = ids.shape
        note = f"mask(s) in {kind}"
        if (H, W) != size:
            note += f", {H}x{W} resized to {size[0]}x{size[1]}"
        if H * size[1] != W * size[0]:
            note += " after cropping the centre to that ratio"
        notes[note].append((snapped, (ids == UNLABELLED).mean()))
        masks[stem] = fit(ids, size)
    for note, shares in notes.items():
        snapped, unlabelled = np.mean(shares, axis=0)
        print(f"{path}: {len(shares)} {note}; {snapped:.1%} of the pixels snapped to the nearest class, "
              f"{unlabelled:.1%} unlabelled")
    return masks


def sample_jobs(jobs, masks, model, diffusion, s, autocast, show=True):
    """Make every (stem, guidance, seed) of jobs; yields, batch by batch, jobs and their images (B, H, W, 3) uint8.

    Jobs of one guidance go together, since w = 0 or 1 takes one pass of the network a step and any other w two. As few
    batches as s["batch_size"] allows; smaller ones once the device's memory turns out to be too small.
    """
    size, device, limit = s["size"], s["device"], s["batch_size"]
    passes = diffusion.T if s["sampler"] == "ddpm" else s["steps"]
    bar = tqdm(total=len(jobs) * passes, unit="step", desc=f"{len(jobs)} images of {passes} steps", disable=not show)
    for guidance in dict.fromkeys(w for _, w, _ in jobs):
        todo = [job for job in jobs if job[1] == guidance]
        while todo:
            B = math.ceil(len(todo) / math.ceil(len(todo) / limit))  # equally large batches
            batch, bar_before = todo[:B], bar.n
            try:
                mask = None
                if masks:
                    ids = torch.stack([torch.from_numpy(masks[stem]) for stem, _, _ in batch])
                    mask = one_hot(ids.to(device), model.num_classes)
                with torch.no_grad(), autocast():
                    eps_fn = guided_eps(model, diffusion, mask, guidance, s["one_batch"], s["guidance_interval"])
                    noise = noise_like_seeds([seed for _, _, seed in batch], (3, *size), device)
                    x = sample(eps_fn, noise, diffusion.alpha_bar, s["sampler"], s["steps"], s["eta"],
                               observe=lambda *_: bar.update(len(batch)))
                images = to_uint8(x)
            except RuntimeError as error:
                if "out of memory" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
                    raise
                if len(batch) == 1:
                    raise ValueError(f"one image of {size[0]}x{size[1]} does not fit into the device's memory; try "
                                     "--set sample.one_batch=false, or --device cpu") from None
                limit, bar.n = len(batch) // 2, bar_before
                bar.write(f"out of memory with {len(batch)} images at a time: going on with {limit}")
                continue
            yield batch, images
            todo = todo[B:]
    bar.close()


def draw_sheet(jobs, masks, guidances, colorbook, read):
    """sheet.png: a row per mask, or per mask and seed with a column for each guidance; at most 50 rows of 16 images."""
    if not masks:
        images = [read(job) for job in jobs[:400]]
        return contact_sheet([images[i : i + 8] for i in range(0, len(images), 8)])
    painted = {stem: colorbook.paint(ids) for stem, ids in masks.items()}
    if len(guidances) == 1:
        of_mask = {stem: [job for job in jobs if job[0] == stem][:16] for stem in list(masks)[:50]}
        return contact_sheet([[painted[stem], *map(read, of_mask[stem])] for stem in of_mask], ["mask"])
    seeds = [(stem, seed) for stem, w, seed in jobs if w == guidances[0]][:50]
    rows = [[painted[stem], *(read((stem, w, seed)) for w in guidances)] for stem, seed in seeds]
    return contact_sheet(rows, ["mask", *(f"w = {w:g}" for w in guidances)])


def run(args):
    state, s = resolve(args)
    rank, ranks = join_processes(s["device"])
    colorbook, out, started = Colorbook(state["colorbook"], source=state["path"]), Path(s["out"]), time.monotonic()
    state["config"]["train"]["precision"] = s["precision"]
    model, diffusion, autocast = build(state["config"], len(colorbook), s["device"])
    model.load_state_dict(state["model" if args.raw else "ema"])
    model.eval()
    torch.backends.cudnn.benchmark = True  # batches of one size: let cuDNN choose its fastest convolution for it

    # what to make: (mask, guidance, seed); each mask has seeds of its own, or all would begin with the same noise
    masks = {} if args.unconditional else read_masks(s["mask"], colorbook, s["size"])
    if masks:
        jobs = [(stem, w, s["seed"] + i * s["n"] + j)
                for i, stem in enumerate(masks) for w in s["guidances"] for j in range(s["n"])]
    else:
        jobs = [("unconditional", 0.0, s["seed"] + i) for i in range(args.unconditional)]

    weights_crc32 = zlib.crc32(model.out.weight.detach().cpu().numpy())  # any training changes the last layer

    def file(job):
        stem, w, seed = job
        return out / (f"{stem}_w{w:g}_seed{seed}.png" if masks else f"{stem}_seed{seed}.png")

    def settings(job):
        stem, w, seed = job
        return json.dumps({
            "mask": stem if masks else None, "mask_source": str(Path(s["mask"])) if masks else None,
            "mask_crc32": zlib.crc32(masks[stem].tobytes()) if masks else None, "seed": seed, "guidance": w,
            "guidance_interval": s["guidance_interval"], "sampler": s["sampler"],
            "steps": diffusion.T if s["sampler"] == "ddpm" else s["steps"], "eta": s["eta"],
            "precision": s["precision"], "weights": "raw" if args.raw else "ema",
            "checkpoint": str(state["path"]), "trained_steps": state["step"], "weights_crc32": weights_crc32})

    def is_made(job):
        with contextlib.suppress(OSError), Image.open(file(job)) as image:
            image.load()  # OSError where it is cut off
            return image.info.get("settings") == settings(job)
        return False

    def save(job, image):
        text = PngInfo()
        text.add_text("settings", settings(job))
        try:
            with replacing(file(job)) as png:
                Image.fromarray(image).save(png, "png", pnginfo=text)
        except OSError as error:
            raise OSError(f"{file(job)} was not saved: {error}; is the disk full? --resume makes the rest") from error

    for path in filter(Path.is_file, map(file, jobs)):
        with contextlib.suppress(OSError), Image.open(path) as image:  # OSError: cut off while it was written
            if "settings" not in image.info:
                raise ValueError(f"{path}: an image that was not made here is in the way: choose another --out")

    # each process makes its share of the work, and writes a batch while the device works on the next one
    out.mkdir(parents=True, exist_ok=True)
    todo = [job for job in jobs if not (args.resume and is_made(job))]
    if len(todo) < len(jobs):
        print(f"{out}: {len(jobs) - len(todo)} of {len(jobs)} images are there already")
    if ranks > 1:
        dist.barrier()  # all have looked at the folder before one of them writes
    share = [job for w in s["guidances"] for job in todo if job[1] == w][rank::ranks]
    try:
        with ThreadPoolExecutor() as pool:
            written = ()
            for batch, images in sample_jobs(share, masks, model, diffusion, s, autocast, show=rank == 0):
                list(written)  # waits for the files of the last batch, and raises their errors
                written = pool.map(save, batch, images)
            list(written)
    except KeyboardInterrupt:
        finished = sum(map(is_made, jobs))
        raise KeyboardInterrupt(f"{finished} of {len(jobs)} images are in {out}; --resume makes the rest")
    if ranks > 1:
        dist.barrier()  # all images are there
        dist.destroy_process_group()
    if rank > 0:
        return
    sheet = draw_sheet(jobs, masks, s["guidances"], colorbook, lambda job: read_image(file(job)))
    with replacing(out / "sheet.png") as png:
        sheet.save(png, "png")
    print(f"{len(todo)} image(s) in {time.monotonic() - started:.1f} s on {s['device'].type}, {s['sampler']}, guidance "
          f"{', '.join(f'{w:g}' for w in s['guidances'])}, seeds {jobs[0][2]} to {jobs[-1][2]}: {out}, side by side in "
          f"{out / 'sheet.png'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mask", help="a mask file, or a folder of them")
    parser.add_argument("--unconditional", type=int, metavar="N", help="N images without a mask")
    parser.add_argument("--checkpoint", help="default: checkpoint.pt in the run that config.yaml names")
    parser.add_argument("--n", type=int, help="images per mask")
    parser.add_argument("--sampler", help="dpm_solver, plms, ddim or ddpm")
    parser.add_argument("--steps", type=int, help="of dpm_solver, plms and ddim")
    parser.add_argument("--guidance", metavar="W[,W...]", help="one or several; 1 is without guidance")
    parser.add_argument("--seed", type=int, help="of the first image")
    parser.add_argument("--batch-size", type=int, help="most images at a time")
    parser.add_argument("--out", help="folder for images and sheet.png")
    parser.add_argument("--resume", action="store_true", help="skip the images that are there with the same settings")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--raw", action="store_true", help="the last weights instead of their average (EMA)")
    add_config_arguments(parser)
    command(run, parser.parse_args())


if __name__ == "__main__":
    main()
