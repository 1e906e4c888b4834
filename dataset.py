"""Pairs of image and mask: match, fit, read, batch, augment.

    python dataset.py count --root data/toy/prepared           count pixels per class: a table and a picture
"""

import argparse
import csv
import hashlib
import math
import os
import sys
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from masks import SUFFIXES, UNLABELLED, Colorbook, draw_bars, one_hot, open_image, read_mask


def read_image(path):
    """A picture file as (H, W, 3) uint8 RGB: 16 bits scaled to 8, black where it is transparent. ValueError names the file."""
    image = open_image(path)
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):  # convert() would clip them
        return np.repeat(((np.array(image).astype(np.uint32) + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise ValueError(f"{path}: a picture of mode {image.mode}, whose range is not known; expected grey, RGB, RGBA, CMYK or "
                         "a palette, with 8 or 16 bits. Save it as an 8-bit PNG")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def fit(image, size, crop=None):
    """Crop the centre of a picture and resize it: no stretching unless the crop asks for it.

    image  (H, W, 3) uint8, resized bicubic with anti-aliasing, or ids (H, W) uint8, resized NEAREST
    size   (height, width) of the result
    crop   (height, width) of the window, or None for the largest one that has the ratio of `size`
    """
    H, W = image.shape[:2]
    h, w = crop or (min(H, W * size[0] / size[1]), min(W, H * size[1] / size[0]))
    if h > H or w > W:
        raise ValueError(f"the crop {h}x{w} does not fit into a picture of {H}x{W} (height x width)")
    if (H, W) == (h, w) == size:
        return image
    box = ((W - w) / 2, (H - h) / 2, (W + w) / 2, (H + h) / 2)
    resample = Image.Resampling.NEAREST if image.ndim == 2 else Image.Resampling.BICUBIC
    return np.array(Image.fromarray(image).resize(size[::-1], resample, box=box))


def fit_pair(image, ids, size, crop, where):
    """fit() of an image and its mask, which must have one size; `where` names the files in the ValueError."""
    if image.shape[:2] != ids.shape:
        raise ValueError(f"{where}: the image is {image.shape[:2]} and the mask {ids.shape} (height, width); a pair must "
                         "have one size")
    return fit(image, size, crop), fit(ids, size, crop)


def list_files(folder, ending=""):
    """{stem: path} of the pictures in a folder; `ending` is what a name must end with before the suffix, and loses.

    Stems are composed Unicode (NFC), in which names that macOS has taken apart are equal to others again. Hidden files and
    folders are no pictures.
    """
    files = {}
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")
    for path in sorted(Path(folder).iterdir()):
        if path.suffix.lower() in SUFFIXES and path.stem.endswith(ending) and path.name[0] != "." and not path.is_dir():
            stem = unicodedata.normalize("NFC", path.stem.removesuffix(ending))
            if stem in files:
                raise ValueError(f"{path} and {files[stem].name} have the same stem, which is what pairs are matched by: "
                                 "rename or delete one of them")
            files[stem] = path
    return files


def match_pairs(images, masks, where):
    """[(stem, image, mask)] of two dicts by stem; those without a partner are counted and listed."""
    for kind, missing in (("image(s) without a mask", images.keys() - masks.keys()),
                          ("mask(s) without an image", masks.keys() - images.keys())):
        if missing:
            print(f"{where}: {len(missing)} {kind} left out: {', '.join(sorted(missing)[:10])}"
                  + (" ..." if len(missing) > 10 else ""))
    return [(stem, images[stem], masks[stem]) for stem in sorted(images.keys() & masks.keys())]


class Pairs:
    """The pairs of one split as planes (N, 4, H, W) uint8: red, green, blue, class id.

    size is (height, width); pictures of another size are fitted. More than memory_gb of planes are mapped from a file that is
    made once, <root>/<split>/.planes_<H>x<W>_<key>.npy; the key changes with the pictures. Missing folders, empty splits and
    reading errors are ValueErrors that name the place.
    """

    def __init__(self, root, split, size, memory_gb=4.0):
        folder = Path(root) / split
        for needed in (folder / "images", folder / "masks"):
            if not needed.is_dir():
                raise ValueError(f"{needed}: no such folder. Prepare the data first (python -m data.<name>.prepare), "
                                 "or set data.root to a folder with {train,val,test}/{images,masks}")
        self.colorbook = Colorbook.load(Path(root) / "colorbook.json")
        images, masks = list_files(folder / "images"), list_files(folder / "masks")
        self.files = match_pairs(images, masks, folder)
        if not self.files:
            raise ValueError(f"{folder}: none of {len(images)} image(s) has a mask of the same name among {len(masks)}; "
                             f"expected images/NAME and masks/NAME ({', '.join(SUFFIXES)}), without sub-folders")
        shape = (len(self.files), 4, *size)
        if math.prod(shape) <= memory_gb * 2**30:
            self.planes = torch.empty(shape, dtype=torch.uint8)
            self.read(folder, self.planes.numpy())
            return
        state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for _, *pair in self.files for file in pair]
        key = hashlib.sha256(repr((state, self.colorbook.classes)).encode()).hexdigest()[:12]
        mapped = folder / f".planes_{size[0]}x{size[1]}_{key}.npy"
        if not mapped.exists():
            partial = mapped.with_suffix(".partial")
            try:
                planes = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
                self.read(folder, planes)
                planes.flush()
                os.replace(partial, mapped)
            finally:
                partial.unlink(missing_ok=True)
        print(f"{folder}: {len(self)} pairs, {math.prod(shape) / 2**30:.1f} GiB mapped from {mapped.name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns that the file is not writable; nobody writes to it
            self.planes = torch.from_numpy(np.load(mapped, mmap_mode="r"))

    def __len__(self):
        return len(self.files)

    def read(self, folder, planes):
        """Read every pair into planes (N, 4, H, W); says what kinds of masks there were. ValueError lists all that is bad."""
        found, bad = Counter(), []
        for (_, image_file, mask_file), out in zip(tqdm(self.files, f"reading {folder.name}", unit="pair", leave=False), planes):
            try:
                image, (ids, kind, snapped) = read_image(image_file), read_mask(mask_file, self.colorbook)
                found[kind + (" with soft edges" if snapped else "")] += 1
                if ids.shape[0] < out.shape[1] or ids.shape[1] < out.shape[2]:
                    found["enlarged (prepare the data with a larger --size)"] += 1
                image, ids = fit_pair(image, ids, out.shape[1:], None, f"{image_file} and {mask_file}")
                out[:3], out[3] = image.transpose(2, 0, 1), ids
            except ValueError as error:
                bad.append(str(error))
        if bad:
            raise ValueError(f"{folder}: {len(bad)} of {len(self)} pairs cannot be used; mend or delete them:\n"
                             + "\n".join(bad[:10]) + (f"\n... and {len(bad) - 10} more" if len(bad) > 10 else ""))
        print(f"{folder}: {len(self)} pairs: " + ", ".join(f"{n} {kind}" for kind, n in found.items()))


def augment_pair(planes, rng, p, brightness, contrast, saturation, hue, vertical_flip, rotate, crop):
    """Classical augmentation (Bozsó 2023, 2.1) of the planes (4, H, W) of a pair; each with probability p.

    Photometric, on the image: a factor from 1 - v to 1 + v for brightness, contrast and saturation, a shift from -hue to
    hue (a turn is 1). Geometric, on both alike: a vertical flip (vertical_flip: true or false), a rotation by up to
    `rotate` degrees, whose corners are black and unlabelled, and a window of crop to 1 times the size, scaled back.
    """
    image, ids = planes[:3], planes[3:]
    for adjust, v in ((TF.adjust_brightness, brightness), (TF.adjust_contrast, contrast), (TF.adjust_saturation, saturation)):
        if v and rng.random() < p:
            image = adjust(image, rng.uniform(1 - v, 1 + v))
    if hue and rng.random() < p:
        image = TF.adjust_hue(image, rng.uniform(-hue, hue))
    if vertical_flip and rng.random() < p:
        image, ids = image.flip(-2), ids.flip(-2)
    mode = TF.InterpolationMode
    if rotate and rng.random() < p:
        angle = rng.uniform(-rotate, rotate)
        image, ids = TF.rotate(image, angle, mode.BILINEAR), TF.rotate(ids, angle, mode.NEAREST, fill=UNLABELLED)
    if crop < 1 and rng.random() < p:
        H, W = planes.shape[1:]
        h, w = (round(side * rng.uniform(crop, 1)) for side in (H, W))
        box = (int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1)), h, w)
        image = TF.resized_crop(image, *box, [H, W], mode.BILINEAR, antialias=True)
        ids = TF.resized_crop(ids, *box, [H, W], mode.NEAREST_EXACT)
    return torch.cat([image, ids])


def batches(pairs, batch_size, seed, step=0, flip=0.0, augment=None, device="cpu", rank=0, ranks=1):
    """Batches without end from step `step` on: planes (batch_size / ranks, 4, H, W) uint8, on the device.

    Every pair comes once per epoch, in an order that is new each epoch; epochs run on without a short batch. flip is the
    probability of a horizontal flip, augment the settings of augment_pair() or None. All of it depends on (seed, step) alone,
    so a resumed run goes on as if it had never stopped, and process `rank` of `ranks` gets its part of the same batch. The
    next batch is gathered while this one is used.
    """

    @lru_cache(maxsize=2)
    def order(epoch):
        return np.random.default_rng([seed, epoch]).permutation(len(pairs))

    def gather(step):
        mine = slice(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)
        flips = torch.from_numpy(np.random.default_rng([seed, step, 0]).random(batch_size) < flip)[mine]
        positions = range(step * batch_size, (step + 1) * batch_size)[mine]
        planes = pairs.planes[[int(order(p // len(pairs))[p % len(pairs)]) for p in positions]]
        if augment and augment["p"] > 0:
            planes = torch.stack([augment_pair(pair, np.random.default_rng([seed, p, 1]), **augment)
                                  for p, pair in zip(positions, planes)])
        return (planes.pin_memory(), flips.pin_memory()) if torch.device(device).type == "cuda" else (planes, flips)

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(gather, step)
        while True:
            planes, flips = (x.to(device, non_blocking=True) for x in ahead.result())
            step += 1
            ahead = thread.submit(gather, step)
            yield torch.where(flips[:, None, None, None], planes.flip(-1), planes) if flip else planes


def unpack(planes, num_classes):
    """Planes (B, 4, H, W) uint8 to images (B, 3, H, W) float in [-1, 1] and one-hot masks (B, K, H, W), on their device."""
    return planes[:, :3].float() / 127.5 - 1, one_hot(planes[:, 3], num_classes)


def to_uint8(x):
    """Images (B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8 arrays."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def contact_sheet(rows, titles=(), least=128):
    """Rows of equally large (H, W, 3) uint8 pictures as one PIL image, enlarged so that each side is `least` or more."""
    H, W = rows[0][0].shape[:2]
    scale, gap, top = -(-least // min(H, W)), 4, 18 if titles else 0
    cell_h, cell_w = H * scale + gap, W * scale + gap
    sheet = Image.new("RGB", (cell_w * max(map(len, rows)) + gap, cell_h * len(rows) + gap + top), "white")
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            big = Image.fromarray(picture).resize((W * scale, H * scale), Image.Resampling.NEAREST)
            sheet.paste(big, (gap + c * cell_w, top + gap + r * cell_h))
    for c, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((gap + c * cell_w, 2), title, "black", ImageFont.load_default(12))
    return sheet


def count(args):
    """Pixels per class over a split (Bozsó 2023, Figure 27): a table on the screen and as CSV, and a picture."""
    colorbook = Colorbook.load(Path(args.root) / "colorbook.json")
    masks = list_files(Path(args.root) / args.split / "masks")
    pixels, pictures = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for path in tqdm(masks.values(), unit="mask"):
        n = np.bincount(read_mask(path, colorbook)[0].ravel(), minlength=256)
        pixels, pictures = pixels + n, pictures + (n > 0)
    share = pixels / max(1, pixels.sum())
    ids = [*range(len(colorbook)), UNLABELLED]
    rows = [(k, (colorbook.names + ["unlabelled"])[min(k, len(colorbook))], int(pixels[k]), float(share[k]), int(pictures[k]))
            for k in ids]
    print(f"{'id':>3} {'class':14} {'pixels':>12} {'share':>8} {'pictures':>9}")
    for row in rows:
        print("{:3d} {:14} {:12,d} {:8.3%} {:9,d}".format(*row))
    with open(Path(args.out).with_suffix(".csv"), "w", newline="") as file:
        csv.writer(file).writerows([("id", "class", "pixels", "share", "pictures"), *rows])
    draw_bars(colorbook, [f"{share[k]:.2%}" for k in range(len(colorbook))], share / share.max()).save(args.out)
    print(f"{args.out} and .csv: {len(masks)} masks of {args.root}/{args.split}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("count", help=count.__doc__)
    command.add_argument("--root", default="data/toy/prepared", help="a prepared data set")
    command.add_argument("--split", default="train")
    command.add_argument("--out", default="counts.png")
    command.set_defaults(run=count)
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


if __name__ == "__main__":
    main()
