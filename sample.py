"""Images from masks, with a trained checkpoint and nothing else.

    python sample.py --mask data/hand_drawn.png                     a mask, or a folder of masks
    python sample.py --mask masks/ --n 8 --seed 100                 8 images per mask
    python sample.py --mask masks/ --n 8 --seed 100 --resume        go on where it was stopped
    python sample.py --mask my.png --guidance 1,2,3,5               the same seeds at each guidance, on one sheet
    python sample.py --mask my.png --sampler ddpm                   all 1000 steps of Algorithm 2
    python sample.py --unconditional 16                             no mask
    python sample.py --mask masks/ --only person,rider --as-dataset more    pairs to train on, of masks with these
    python sample.py --image street.png --image-mask mask.png --mask edited.png     redraw what differs, keep the rest
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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from checkpoint import build, join_processes, load_checkpoint, pick_device, pick_precision, replacing
from config import add_config_arguments, checked, command, load_config, parse_overrides
from dataset import SUFFIXES, contact_sheet, fit, list_files, prepare_edit, put_back, read_image, to_uint8
from ddpm import guided_eps, keep_pixels, noise_like_seeds, sample
from masks import UNLABELLED, Colorbook, one_hot, read_mask, save_mask

FLAGS = ("mask", "n", "sampler", "steps", "seed", "batch_size", "out")  # each is the setting sample.<flag>
TOY_WEIGHTS = Path(__file__).parent / "data" / "toy" / "weights.pt"  # how they were trained: experiments/RESULTS.md


def find_checkpoint(args, cfg):
    """The path of --checkpoint, or of the run that cfg names; toy weights where the toy run was not trained yet."""
    run = Path(cfg["out"])
    if args.checkpoint or run.exists() or cfg["data"]["root"] != "data/toy/prepared":
        return Path(args.checkpoint or run / "checkpoint.pt")
    print(f"{run} was not trained yet: using the weights that come with the project, {TOY_WEIGHTS}")
    return TOY_WEIGHTS


def resolve(args, state=None):
    """The checkpoint as a dict, and the settings s of the samples, as a dict too. ValueError: they do not fit together.

    s is the `sample` part of the checkpoint's config, changed by what was named, with guidances, size and device added.
    state is the checkpoint where it was loaded before.
    """
    for key in parse_overrides(args.set):
        if not key.startswith("sample.") and key not in ("out", "device"):
            raise ValueError(f"--set {key}: the checkpoint has its own; here --set takes sample.*, out and device")
    cfg = load_config(args.config, args.preset, args.set)  # tells where the checkpoint is
    state = state or load_checkpoint(find_checkpoint(args, cfg))
    s = load_config(args.config, args.preset, args.set, base=state["config"])["sample"]
    s["mask"] = cfg["sample"]["mask"] or s["mask"]  # the only setting in which config.yaml goes over the checkpoint
    for key in FLAGS:
        if getattr(args, key) is not None:
            s[key] = checked(f"sample.{key}", getattr(args, key), f"--{key.replace('_', '-')}")
    s["guidances"] = [s["guidance"]]
    if args.guidance:
        where = f"--guidance {args.guidance} (several as 1,2,3,5)"
        s["guidances"] = list(dict.fromkeys(checked("sample.guidance", w, where) for w in args.guidance.split(",")))
    if args.unconditional is not None:
        s["guidances"] = [0.0]
    if s["sampler"] == "ddpm":
        s["steps"] = state["config"]["diffusion"]["T"]
    s["out"] = args.as_dataset or s["out"]
    s["size"] = tuple(state["config"]["data"]["size"])
    s["device"] = pick_device(args.device or cfg["device"])
    check_together(args, state, s)
    return state, s


def check_together(args, state, s):
    """ValueError for flags, settings and a checkpoint that do not go together."""
    T = state["config"]["diffusion"]["T"]
    if s["steps"] > T:
        raise ValueError(f"--steps {s['steps']}: expected 1..{T}, the checkpoint's T")
    if (args.image_mask or args.redraw) and not args.image:
        raise ValueError("--image-mask and --redraw tell what is new in an image: give it with --image")
    if args.unconditional is not None:
        if args.unconditional < 1:
            raise ValueError(f"--unconditional {args.unconditional}: expected how many images to make, 1 or more")
        if any((args.mask, args.guidance, args.n, args.only, args.as_dataset, args.image)):
            raise ValueError("--unconditional N makes N images without a mask: leave out --mask, --guidance, --n, "
                             "--only, --as-dataset and --image")
    elif not state["config"]["model"]["conditional"]:
        raise ValueError(f"{state['path']} was trained without masks (model.conditional: false): use --unconditional N")
    elif not s["mask"]:
        raise ValueError("no mask: give --mask FILE_OR_FOLDER, set sample.mask in the config, or use --unconditional N")
    elif Path(s["mask"]).resolve() == Path(s["out"], "masks" if args.as_dataset else ".").resolve():
        raise ValueError(f"{s['mask']}: the masks are in it; choose another folder for the images with --out")


def load_network(state, s):
    """The colorbook, the network with its averaged weights, the diffusion and autocast; s["precision"] is decided."""
    s["precision"] = pick_precision(s["precision"], s["device"])
    colorbook = Colorbook(state["colorbook"], source=state["path"])
    model, diffusion, autocast = build(state["config"], len(colorbook), s["device"], s["precision"])
    model.load_state_dict(state["ema"])
    model.eval()
    torch.backends.cudnn.benchmark = True  # batches of one size: let cuDNN choose its fastest convolution for it
    return colorbook, model, diffusion, autocast


def read_masks(path, colorbook, size):
    """{stem: ids (H, W) uint8} of a mask file or of a folder of masks, fitted to size; prints how they were read."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path.absolute()}: no such mask file or folder")
    files = list_files(path) if path.is_dir() else {path.stem: path}
    if not files:
        raise ValueError(f"{path}: no masks in this folder; expected images ({', '.join(SUFFIXES)})"
                         + (f". Do you mean {path / 'masks'}?" if (path / "masks").is_dir() else ""))
    masks, lost, notes = {}, [], defaultdict(list)  # {how they were read: [shares of pixels snapped and unlabelled]}
    for stem, file in files.items():
        ids, kind, snapped = read_mask(file, colorbook)
        H, W = ids.shape
        note = f"mask(s) in {kind}"
        if (H, W) != size:
            note += f" of {H}x{W} (height x width) resized to {size[0]}x{size[1]}"
        if H * size[1] != W * size[0]:
            note += " after cropping the centre to that ratio"
        notes[note].append((snapped, (ids == UNLABELLED).mean()))
        masks[stem] = fit(ids, size)
        pixel = H * W / (size[0] * size[1])  # of the network, in pixels of the mask: what is smaller is no loss
        gone = [colorbook.names[k] for k in np.setdiff1d(ids, masks[stem])
                if k != UNLABELLED and (ids == k).sum() >= pixel]
        lost += [f"{stem} ({', '.join(gone)})"] if gone else []
    for note, shares in notes.items():
        snapped, unlabelled = np.mean(shares, axis=0)
        print(f"{path}: {len(shares)} {note}; {snapped:.1%} of the pixels snapped to the nearest class, "
              f"{unlabelled:.1%} unlabelled")
    if lost:
        print(f"{path}: {len(lost)} mask(s) lose a class by that, cut off or too small: {', '.join(lost[:10])}"
              + (" ..." if len(lost) > 10 else ""))
    return masks


def count_per_mask(masks, names, colorbook, n):
    """{stem: how many images} of the masks that have classes of these names, on average n for each such mask.

    Each class gets equally many, spread over the masks that have it: the rarer the classes of a mask, the more of it.
    """
    weights = defaultdict(float)
    for name in names:
        if name not in colorbook.names:
            raise ValueError(f"--only {name}: the classes of {colorbook.source} are {', '.join(colorbook.names)}")
        having = [stem for stem, ids in masks.items() if (ids == colorbook.names.index(name)).any()]
        print(f"{len(having)} of {len(masks)} masks have {name}")
        for stem in having:
            weights[stem] += 1 / len(having)
    if not weights:
        raise ValueError(f"no mask has {' or '.join(names)}: nothing to make")
    ends = np.cumsum(list(weights.values())) / sum(weights.values()) * n * len(weights)  # running sums, rounded below
    counts = np.diff(ends.round(), prepend=0).astype(int).tolist()
    print(f"{sum(counts)} images of {np.count_nonzero(counts)} of these {len(weights)} masks")
    return dict(zip(weights, counts))


def read_edit(args, mask, colorbook, size):
    """prepare_edit()'s dict for the files that were named: the whole image and mask, and real, ids and keep at `size`;
    with "settings", which tell the edit in the PNG of a result. ValueError: other sizes, or nothing or all is new.
    """
    image, ids = read_image(args.image), read_mask(mask, colorbook)[0]
    masks, reference = Path(args.image).absolute().parent.parent / "masks", args.redraw or args.image_mask
    if not reference and masks.is_dir():  # of a prepared split
        reference = list_files(masks).get(Path(args.image).stem)
    if not reference:
        raise ValueError(f"{args.image}: which part of it is new? Give the mask that it has with --image-mask, or the "
                         "part to redraw, white on black, with --redraw")
    before = read_image(reference)[..., 0] if args.redraw else read_mask(reference, colorbook)[0]  # greys, or class ids
    for path, shape in ((mask, ids.shape), (reference, before.shape)):
        if shape != image.shape[:2]:
            raise ValueError(f"{path} is {shape[0]}x{shape[1]} and {args.image} {image.shape[0]}x{image.shape[1]} "
                             "(height x width): an image and its masks must have one size")
    changed = before >= 128 if args.redraw else before != ids
    edit = prepare_edit(image, ids, changed, size) if changed.any() else None
    if not edit or not edit["keep"].any():
        new = f"white in {reference}" if args.redraw else f"of another class in {mask} than in {reference}"
        raise ValueError(f"{changed.mean():.0%} of the pixels are {new}; expected some that are, which are drawn anew, "
                         "and some that are not, which are kept")
    (top, bottom), (left, right) = ((part.start, part.stop) for part in edit["window"])
    print(f"{args.image}: {changed.mean():.1%} are new by {reference}, and redrawn with a margin in a window of "
          f"{bottom - top}x{right - left} at row {top}, column {left}, which the network sees at {size[0]}x{size[1]}")
    edit["settings"] = {"image": str(args.image), "edit_crc32": zlib.crc32(image.tobytes() + changed.tobytes())}
    return edit


def plan(state, s, masks, counts=None, edits=None):
    """The jobs, a dict for each image: all that it depends on, as it will stand in its PNG.

    counts: {stem of a mask, or None without masks: how many images}; by default s["n"] of each mask.
    """
    common = {key: s[key] for key in ("guidance_interval", "sampler", "steps", "eta", "precision")}
    common |= {"checkpoint": str(state["path"]), "trained_steps": state["step"],
               "weights_crc32": zlib.crc32(state["ema"]["out.weight"].numpy())}  # any training changes it
    jobs, first = [], s["seed"]
    for stem, n in (counts or dict.fromkeys(masks, s["n"])).items():
        of_mask = {"mask": stem}
        if stem is not None:
            of_mask |= {"mask_source": str(Path(s["mask"])), "mask_crc32": zlib.crc32(masks[stem].tobytes())}
        if edits:
            of_mask |= edits[stem]["settings"]
        for guidance in s["guidances"]:
            for seed in range(first, first + n):
                jobs.append(of_mask | {"seed": seed, "guidance": guidance} | common)
        first += n  # each mask has seeds of its own, or all would begin with the same noise
    return jobs


def file_of(job, out):
    if job["mask"] is None:
        return out / f"unconditional_seed{job['seed']}.png"
    return out / f"{job['mask']}_w{job['guidance']:g}_seed{job['seed']}.png"


def settings_of(path):
    """The settings in a PNG that was made here, as text; "" where there is no such file or it was cut off.

    ValueError for any other image: it would be lost.
    """
    with contextlib.suppress(OSError), Image.open(path) as image:
        if "settings" not in image.info:
            raise ValueError(f"{path}: an image that was not made here is in the way: choose another --out")
        image.load()  # OSError where it was cut off
        return image.info["settings"]
    return ""


def check_dataset(folder, colorbook):
    """ValueError where --as-dataset would mix what is made here with other pairs."""
    path, classes = folder / "colorbook.json", list(colorbook.classes.items())  # in the order of their ids
    same = path.exists() and list(Colorbook.load(path).classes.items()) == classes
    if (folder / "images").exists() and not same:
        raise ValueError(f"{folder} holds images, but no colorbook.json of the classes of {colorbook.source}: choose "
                         "another folder for --as-dataset")


def save(job, image, out):
    text, path = PngInfo(), file_of(job, out)
    text.add_text("settings", json.dumps(job))
    try:
        with replacing(path) as png:
            Image.fromarray(image).save(png, "png", pnginfo=text)
    except OSError as error:
        raise OSError(f"{path} was not saved: {error}; is the disk full? --resume makes the rest") from error


def sample_jobs(jobs, masks, model, diffusion, s, autocast, edits=None, show=True, observe=lambda *step: None):
    """Make the image of each job; yields, batch by batch, jobs and their images (B, H, W, 3) uint8.

    edits      {stem: prepare_edit()}, for real images that are redrawn; the results have their sizes
    observe    observe(t, x, eps, x0) is called at every step of a batch; see ddpm.py

    Jobs of one guidance go together, since w = 0 or 1 takes one pass of the network a step and any other w two. Batches
    are equally large, of at most s["batch_size"] images, and halved where they do not fit into the device's memory.
    """
    size, device, limit = s["size"], s["device"], s["batch_size"]
    bar = tqdm(total=len(jobs) * s["steps"], unit="step", desc=f"{len(jobs)} images of {s['steps']} steps",
               disable=not show)

    def on_step(t, x, eps, x0):
        bar.update(len(x))
        observe(t, x, eps, x0)

    for guidance in dict.fromkeys(job["guidance"] for job in jobs):
        todo = [job for job in jobs if job["guidance"] == guidance]
        while todo:
            B = math.ceil(len(todo) / math.ceil(len(todo) / limit))
            batch, bar_before = todo[:B], bar.n
            try:
                mask = None
                if masks:
                    ids = torch.stack([torch.from_numpy(masks[job["mask"]]) for job in batch])
                    mask = one_hot(ids.to(device), model.num_classes)
                with torch.no_grad(), autocast():
                    eps_fn = guided_eps(model, diffusion, mask, guidance, s["guidance_interval"])
                    if edits:
                        real = torch.stack([torch.from_numpy(edits[job["mask"]]["real"]) for job in batch])
                        keep = torch.stack([edits[job["mask"]]["keep"] for job in batch])
                        real = real.to(device).permute(0, 3, 1, 2) / 127.5 - 1
                        eps_fn = keep_pixels(eps_fn, real, keep.to(device), diffusion.alpha_bar)
                    draw_noise = noise_like_seeds([job["seed"] for job in batch], (3, *size), device)
                    x = sample(eps_fn, draw_noise, diffusion.alpha_bar, s["sampler"], s["steps"], s["eta"], on_step)
                images = to_uint8(x)
                if edits:
                    images = [put_back(edits[job["mask"]], image) for job, image in zip(batch, images)]
            except RuntimeError as error:
                if "out of memory" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
                    raise
                if len(batch) == 1:
                    raise ValueError(f"one image of {size[0]}x{size[1]} does not fit into the device's memory; try "
                                     "--guidance 1, which takes half as much, or --device cpu") from None
                limit, bar.n = len(batch) // 2, bar_before
                bar.write(f"out of memory with {len(batch)} images at a time: going on with {limit}")
                continue
            yield batch, images
            todo = todo[B:]
    bar.close()


def draw_sheet(jobs, masks, colorbook, out, edits=None):
    """sheet.png: a row per mask, or per mask and seed with a column for each guidance; 8 a row without masks.

    At most 50 rows of 17 cells.
    """
    rows, guidances = {}, list(dict.fromkeys(job["guidance"] for job in jobs))
    for i, job in enumerate(jobs):
        if not masks:
            row = i // 8
        elif len(guidances) == 1:
            row = job["mask"]
        else:
            row = job["mask"], job["seed"]
        if row not in rows and len(rows) == 50:
            continue
        if row not in rows and edits:
            rows[row] = [edits[job["mask"]]["image"], colorbook.paint(edits[job["mask"]]["mask"])]
        elif row not in rows:
            rows[row] = [colorbook.paint(masks[job["mask"]])] if masks else []
        if len(rows[row]) <= 16:
            rows[row].append(read_image(file_of(job, out)))
    titles = ["image"] * bool(edits) + ["mask"] * bool(masks) + [f"w = {w:g}" for w in guidances] * (len(guidances) > 1)
    return contact_sheet(list(rows.values()), titles)


def run(args):
    state, s = resolve(args)
    rank, ranks = join_processes(s["device"])
    print(f"{state['path']}: a network of {state['step']} steps")
    started = time.monotonic()
    colorbook, model, diffusion, autocast = load_network(state, s)
    masks, edits, counts = {}, {}, None
    if args.unconditional:
        counts = {None: args.unconditional}
    elif args.image:
        edits = {Path(s["mask"]).stem: read_edit(args, s["mask"], colorbook, s["size"])}
        masks = {stem: edit["ids"] for stem, edit in edits.items()}
    else:
        masks = read_masks(s["mask"], colorbook, s["size"])
    if args.only:
        counts = count_per_mask(masks, args.only.split(","), colorbook, s["n"])
    folder = Path(s["out"])
    images_folder, masks_folder = (folder / "images", folder / "masks") if args.as_dataset else (folder, None)
    if args.as_dataset:
        check_dataset(folder, colorbook)
    jobs = plan(state, s, masks, counts, edits)
    existing = [settings_of(file_of(job, images_folder)) for job in jobs]  # refuses images that were not made here
    todo = [job for job, text in zip(jobs, existing) if not (args.resume and text == json.dumps(job))]
    if len(todo) < len(jobs):
        print(f"{images_folder}: {len(jobs) - len(todo)} of {len(jobs)} images are there already")
    if ranks > 1:
        dist.barrier()  # all have looked at the folder before one of them writes
    images_folder.mkdir(parents=True, exist_ok=True)
    if args.as_dataset:
        masks_folder.mkdir(exist_ok=True)
        colorbook.save(folder / "colorbook.json")

    # each process makes its share of every guidance
    mine = sorted(todo, key=lambda job: s["guidances"].index(job["guidance"]))[rank::ranks]
    try:
        for batch, images in sample_jobs(mine, masks, model, diffusion, s, autocast, edits, show=rank == 0):
            for job, image in zip(batch, images):
                if args.as_dataset:  # first, so that an image that is there has its mask
                    ids = edits[job["mask"]]["mask"] if edits else masks[job["mask"]]
                    save_mask(ids, file_of(job, masks_folder), colorbook)
                save(job, image, images_folder)
    except KeyboardInterrupt:  # command() prints the text
        finished = sum(settings_of(file_of(job, images_folder)) == json.dumps(job) for job in jobs)
        raise KeyboardInterrupt(f"{finished} of {len(jobs)} images are in {images_folder}; --resume makes the rest")
    if ranks > 1:
        dist.barrier()  # all images are there
        dist.destroy_process_group()
    if rank > 0:
        return
    with replacing(folder / "sheet.png") as png:
        draw_sheet(jobs, masks, colorbook, images_folder, edits).save(png, "png")
    print(f"{len(todo)} image(s) in {time.monotonic() - started:.1f} s on {s['device'].type}, {s['sampler']}, guidance "
          f"{', '.join(f'{w:g}' for w in s['guidances'])}, seeds {jobs[0]['seed']} to {jobs[-1]['seed']}: "
          f"{images_folder}, side by side in {folder / 'sheet.png'}")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mask", help="a mask file, or a folder of them")
    parser.add_argument("--unconditional", type=int, metavar="N", help="N images without a mask")
    parser.add_argument("--checkpoint", help="default: the run that config.yaml names, or toy weights")
    parser.add_argument("--n", type=int, help="images per mask")
    parser.add_argument("--sampler", help="dpm_solver, plms, ddim or ddpm")
    parser.add_argument("--steps", type=int, help="of dpm_solver, plms and ddim")
    parser.add_argument("--guidance", metavar="W[,W...]", help="one or several; 1 is without guidance")
    parser.add_argument("--seed", type=int, help="of the first image")
    parser.add_argument("--batch-size", type=int, help="most images at a time")
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--out", help="folder for images and sheet.png")
    folder.add_argument("--as-dataset", metavar="FOLDER", help="for images/, masks/ and colorbook.json to train on")
    parser.add_argument("--only", metavar="CLASS,...", help="masks that have one of these, more often the rarer it is")
    parser.add_argument("--image", metavar="FILE", help="a real image, redrawn where --mask is new")
    new = parser.add_mutually_exclusive_group()
    new.add_argument("--image-mask", metavar="FILE", help="the mask of --image; default: ../masks/ of a prepared split")
    new.add_argument("--redraw", metavar="FILE", help="what to redraw, white on black, instead")
    parser.add_argument("--resume", action="store_true", help="skip the images that are there with the same settings")
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"])
    add_config_arguments(parser)
    return parser


def main():
    command(run, make_parser().parse_args())


if __name__ == "__main__":
    main()
