"""Can an image be made four times larger? The network of experiments.upscale against filters, and the whole cascade.

    python -m experiments.segmenter --root data/idd_lite/prepared_224x320 --scale 1 --lr 3e-3 --steps 1000 \\
        --batch-size 8 --arch lraspp_mobilenet_v3_large --out runs/judge_224x320         the judge: 10 minutes
    python -m experiments.upscale_study --judge runs/judge_224x320/checkpoint.pt         20 minutes

It writes results.json, real.png and cascade.png in --out. The rows: held-out real images, shrunk and enlarged again by
two filters, by the network in one step (about the mean of all answers), in --steps (one answer), without being told the
mask, and in overlapping windows; then images that were generated from the masks, enlarged by a filter, and by the
network after noise of several levels. The columns: PSNR and SSIM to the real image, Frechet distance in the judge's
features, what the judge segments as asked (pixel accuracy and mean IoU, and the share of what it reaches in real
images), seconds an image. The floor is the Frechet distance of as many training images; the rows of real images may go
below it, since they are compared with what they were shrunk from. Brackets are 95 % intervals over images.

Minutes are for two CPU cores with bf16. Ctrl-C loses nothing: the same command goes on.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.metrics import structural_similarity
from tqdm import tqdm

from benchmarks.timing import machine, table
from checkpoint import pick_device, replacing
from config import command
from dataset import contact_sheet, fit, list_files, read_image, to_uint8
from evaluate import SSIM_OPTIONS, mask_of, read_images
from experiments.common import choose_masks, parse_count
from experiments.drawing import judge_columns, load_judge
from experiments.upscale import SCALE, Upscaler, draw_small, enlarge_files, in_large_pixels, save_png, shrink

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "Lanczos": Image.Resampling.LANCZOS}
LEVELS = (0.0, 0.05, 0.1, 0.2)  # of the noise that generated images get first


def by_filter(image, ids, seed, filter):
    """An image (h, w, 3) uint8 four times larger; ids and seed are there to be called as an Upscaler is."""
    return np.array(Image.fromarray(image).resize((SCALE * image.shape[1], SCALE * image.shape[0]), FILTERS[filter]))


def shrink_files(folder, stems, size, out):
    """Write the images of these stems to `out`, four times smaller than `size`; {stem: image (*size, 3)} of the large.
    """
    out.mkdir(exist_ok=True)
    paths, real = list_files(folder), {}
    for stem in stems:
        real[stem] = fit(read_image(paths[stem]), size)
        small = shrink(torch.from_numpy(real[stem]).permute(2, 0, 1)[None])
        save_png(to_uint8(small)[0], out / f"{stem}.png", {})
    return real


def with_interval(values):
    """ "mean ± half of its 95 % interval" over images."""
    return f"{np.mean(values):.3f} ± {1.96 * np.std(values) / len(values) ** 0.5:.3f}"


def likeness(real, larger):
    """PSNR and SSIM of pairs of images (H, W, 3)."""
    psnr = [10 * np.log10(255**2 / max(np.square(x - y.astype(float)).mean(), 1e-9)) for x, y in zip(real, larger)]
    ssim = [structural_similarity(x, y, channel_axis=-1, **SSIM_OPTIONS) for x, y in tqdm(zip(real, larger), "SSIM")]
    return {"PSNR": with_interval(psnr), "SSIM": with_interval(ssim)}


def list_ways(network, steps):
    """The rows: {name: (kind of small images, masks are told, function, what it is told beside the image)}."""
    def ours(**options):
        return network, {"level": 0.0, "steps": steps, "tile": None} | options

    return {
        "real, bicubic": ("real", False, by_filter, {"filter": "bicubic"}),
        "real, Lanczos": ("real", False, by_filter, {"filter": "Lanczos"}),
        "real, 1 step": ("real", True, *ours(steps=1)),
        f"real, {steps} steps": ("real", True, *ours()),
        f"real, {steps} steps, no mask": ("real", False, *ours()),
        f"real, {steps} steps, in tiles": ("real", True, *ours(tile=network.about["crop"])),
        "cascade, bicubic": ("cascade", False, by_filter, {"filter": "bicubic"}),
    } | {f"cascade, noise {level:g}": ("cascade", True, *ours(level=level)) for level in LEVELS}


def study(args):
    device, out, split = pick_device(args.device), args.out, Path(args.root, "test")
    network = Upscaler(args.run, device)
    names, size = network.colorbook.names, tuple(network.about["size"])
    judge = load_judge(args.judge, network.colorbook, size, device)
    settings = {key: str(getattr(args, key)) for key in ("judge", "small", "root", "steps", "seed", "count")}
    settings |= network.told
    file = out / "results.json"
    results = {"settings": settings, "rows": {}, "seconds_small": None}
    if file.exists():
        results = json.loads(file.read_text())
    if results["settings"] != settings:
        raise ValueError(f"{file}: made with {results['settings']}, not {settings}: rename {out}, or delete it")

    masks_of_real = choose_masks(split, out / "masks", network.colorbook, size, args.count)
    real = shrink_files(split / "images", masks_of_real, size, out / "shrunk")
    train_files = list(list_files(split.with_name("train") / "images").values())
    some = np.random.default_rng(0).choice(len(train_files), min(len(real), len(train_files)), replace=False)
    train = read_images([train_files[i] for i in some], size)
    files, masks = {"real": list_files(out / "shrunk")}, {"real": masks_of_real}
    files["cascade"], masks["cascade"], seconds_small = draw_small(
        args.small, out / "masks", out / "generated", 1, args.seed, network.colorbook, device)
    results["seconds_small"] = results["seconds_small"] or seconds_small

    ways = list_ways(network, args.steps)
    folders = {name: out / name.replace(", ", "_").replace(" ", "_") for name in ways}
    for name, (kind, told_masks, enlarge_one, options) in ways.items():
        if name in results["rows"]:
            continue
        told = network.told if enlarge_one is network else {}
        seconds = enlarge_files(files[kind], masks[kind] if told_masks else {}, folders[name], args.seed, enlarge_one,
                                told, **options)
        if seconds and kind == "cascade":
            seconds = seconds + results["seconds_small"] if results["seconds_small"] else None
        larger = read_images([folders[name] / f"{stem}.png" for stem in files[kind]], size)
        of_real = np.stack([real[mask_of(stem, real)] for stem in files[kind]])
        ids = np.stack([masks[kind][stem] for stem in files[kind]])
        # generated images show another street of the same mask
        row = {"way": name} | (likeness(of_real, larger) if kind == "real" else {"PSNR": "", "SSIM": ""})
        row |= judge_columns(judge, ids, of_real, larger, train, names)
        results["rows"][name] = row | {"s an image": seconds or "unknown"}
        with replacing(file) as opened:
            opened.write(json.dumps(results, indent=1).encode())

    print(f"{len(real)} images of {split}, {machine(device)}\n\n{table(list(results['rows'].values()))}")
    for kind, small in files.items():
        shown, rows = [name for name in ways if ways[name][0] == kind], []
        for stem in list(small)[:: max(1, len(small) // 6)][:6]:
            larger = [read_image(folders[name] / f"{stem}.png") for name in shown]
            mask = network.colorbook.paint(masks[kind][stem])
            rows.append([mask, in_large_pixels(small[stem]), *larger, real[mask_of(stem, real)]])
        contact_sheet(rows, ["mask", "small", *(name.split(", ", 1)[1] for name in shown), "real"]).save(
            out / f"{kind}.png")
    print(f"\n{file}, and beside it {' and '.join(f'{kind}.png' for kind in files)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--judge", type=Path, required=True, help="a checkpoint of experiments.segmenter, trained at that size")
    add("--run", type=Path, default=Path("runs/upscale"), help="of experiments.upscale; default: %(default)s")
    add("--small", type=Path, default=Path("runs/idd_56x80/checkpoint.pt"),
        help="the checkpoint of train.py that makes the small images; default: %(default)s")
    add("--root", default="data/idd_lite/prepared_224x320", help="a prepared data set; default: %(default)s")
    add("--out", type=Path, default=Path("runs/upscale/study"), help="default: %(default)s")
    add("--count", type=parse_count, default=100, help="as many images of test; default: %(default)s")
    add("--steps", type=parse_count, default=10, help="of DPM-Solver++; default: %(default)s")
    add("--seed", type=int, default=1, help="of the first image; default: %(default)s")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    command(study, parser.parse_args())


if __name__ == "__main__":
    main()
