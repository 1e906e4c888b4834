"""Masks, images, and the classes they speak of.

    python dataset.py legend [--colorbook colorbook.json]      draw which colour is which class and id
    python dataset.py count --root data/toy/prepared           count pixels per class: a table and a picture

A prepared data set is a folder <root> with colorbook.json and {train,val,test}/{images,masks}/<stem>.*; an image and
a mask are a pair where their stems are equal. A prepared mask is an 8-bit palette PNG: the pixel is the class id, the
palette is the colorbook, 255 is unlabelled. Pictures in colorbook colours and 8-bit pictures of ids are read too.
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from tqdm import tqdm

UNLABELLED = 255
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")

# ------------------------------------------------------------------------------------------------ colorbook


class Colorbook:
    """The classes in id order: names (K strings) and colors (K, 3) uint8; at most 255 of them."""

    def __init__(self, classes):
        """classes: {name: [r, g, b]}, each 0..255, in id order. ValueError where that is not what it is."""
        for name, rgb in classes.items():
            if not (isinstance(rgb, list) and len(rgb) == 3 and all(type(v) is int and 0 <= v <= 255 for v in rgb)):
                raise ValueError(f"class {name!r} has colour {rgb!r}: expected three whole numbers 0..255")
        twice = [rgb for rgb, n in Counter(map(tuple, classes.values())).items() if n > 1]
        if twice or not 1 <= len(classes) <= 255:
            raise ValueError(f"expected 1 to 255 classes of different colours, got {len(classes)}, repeated: {twice}")
        self.classes, self.names = dict(classes), list(classes)
        self.colors = np.array(list(classes.values()), np.uint8)

    def __len__(self):
        return len(self.names)

    @classmethod
    def load(cls, path):
        """Read a colorbook.json; FileNotFoundError or ValueError name the file."""

        def no_repeats(pairs):
            repeated = [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]
            if repeated:
                raise ValueError(f"the class {repeated[0]!r} stands in it twice")
            return dict(pairs)

        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such colorbook; expected a JSON file {{name: [r, g, b], ...}}")
        try:
            classes = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=no_repeats)
            if not isinstance(classes, dict):
                raise ValueError("expected {name: [r, g, b], ...}")
            return cls(classes)
        except ValueError as error:
            raise ValueError(f"{path}: not a colorbook: {error}") from None

    def save(self, path):
        lines = [f"  {json.dumps(name)}: {json.dumps(rgb)}" for name, rgb in self.classes.items()]
        Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    def paint(self, ids):
        """Class ids (H, W) uint8 to their colours (H, W, 3) uint8; unlabelled is black."""
        table = np.zeros((256, 3), np.uint8)
        table[: len(self)] = self.colors
        return table[ids]


# ---------------------------------------------------------------------------------------------------- masks


def open_image(path):
    """A picture file, read to its end and turned as its EXIF says; ValueError names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.verify()  # the check sums of a PNG, which are not looked at otherwise; it has to be opened anew then
            with Image.open(path) as image:
                frames = getattr(image, "n_frames", 1)
                if frames > 1 and image.format != "MPO":  # phones put a second, small picture into an MPO
                    raise ValueError(f"it has {frames} frames, of which none is known to be the right one")
                ImageOps.exif_transpose(image, in_place=True)
        return image
    except Exception as error:  # Pillow raises many kinds for a broken file
        size = f" ({Path(path).stat().st_size:,} bytes)" if Path(path).is_file() else ""
        raise ValueError(f"{path}{size}: not readable as a picture: {error}. Expected a whole file of one frame and at most "
                         f"{Image.MAX_IMAGE_PIXELS:,} pixels: download it again, or save it as a PNG") from error


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


def read_mask(path, colorbook):
    """A mask file as class ids.

    Returns ids (H, W) uint8 (0..K-1, or 255 unlabelled), what the file was ("palette", "ids" or "colours"), and the
    share 0..1 of pixels whose colour was off and had to be snapped to a class. Transparent is unlabelled in all of them.
    ValueError names the file, the unknown colours or ids, how many pixels have them, and the nearest class.
    """
    image = open_image(path)
    if image.mode not in ("P", "L", "RGB", "RGBA"):
        raise ValueError(f"{path}: a picture of mode {image.mode}; expected an 8-bit palette, grey (ids), RGB or RGBA "
                         "picture. Save it as an 8-bit PNG")
    values, kind, opaque = np.array(image), "colours", np.ones(image.size[::-1], bool)
    if image.has_transparency_data:
        opaque = np.array(image.convert("RGBA"))[..., 3] >= 128
    if image.mode == "P":  # ids if the palette says so, else a colour picture that happens to be stored with a palette
        used, palette = np.unique(values[opaque]).tolist(), image.getpalette("RGB")
        shown = {i: tuple(palette[3 * i : 3 * i + 3]) or (0, 0, 0) for i in used}
        classes = dict(enumerate(map(tuple, colorbook.colors.tolist())))
        grey = all(rgb == (i, i, i) for i, rgb in shown.items()) and (any(used) or palette[3:6] == [1, 1, 1])
        ours = (rgb == classes.get(i, (0, 0, 0)) or i == UNLABELLED and rgb not in classes.values() for i, rgb in shown.items())
        if grey or all(ours):
            kind = "palette"
    elif image.mode == "L":
        with Image.open(path) as unread:
            coding = f"{image.format} {unread.tile[0][3]}"  # 2 or 4 bits are "L;2" or "L;4", and were scaled to 0..255
        if "JPEG" in coding or "L;" in coding or image.info.get("compression") == "jpeg":
            raise ValueError(f"{path}: a grey picture stored as {coding}, so that its values are not exactly the ids; expected "
                             "8 bits without loss. Save it as an 8-bit PNG")
        kind = "ids"
    if kind == "colours":
        lossy = image.format in ("JPEG", "MPO", "WEBP", "AVIF")
        ids, snapped = snap_colors(np.array(image.convert("RGBA"))[..., :3], opaque, colorbook, path, lossy)
        return ids, kind, snapped
    return check_ids(np.where(opaque, values, np.uint8(UNLABELLED)), colorbook, path), kind, 0.0


def check_ids(ids, colorbook, path):
    """ids as they are, or a ValueError where one is neither a class nor 255."""
    values, counts = np.unique(ids[(ids >= len(colorbook)) & (ids != UNLABELLED)], return_counts=True)
    if len(values):
        found = ", ".join(f"{v} ({n} pixels)" for v, n in zip(values[:8], counts))
        raise ValueError(f"{path}: unknown class ids {found}; expected 0..{len(colorbook) - 1} or 255 for unlabelled, "
                         f"the nearest class is {len(colorbook) - 1} {colorbook.names[-1]!r}. Are these the ids of "
                         "another colorbook?")
    return ids


def snap_colors(rgb, opaque, colorbook, path, lossy=False, near=6, reach=20):
    """Colours (H, W, 3) uint8 to ids (H, W) and the share of snapped pixels; black and transparent are unlabelled.

    A pixel is sure if it has the colour of a class, within `near` (Euclidean, 0..255 a channel), in an even spot, or
    exactly, in a drawing without soft edges. Every other one is a blend of two classes beside it, and belongs to the nearer
    end of the line of colours between them, so never to a third class whose colour lies on the way. Beside it are those
    sure in a square that grows until the colour comes within reach / 2 of a line. What is left goes to a class within
    `reach`, or was a stroke so thin that it has no sure pixel: a blend of a class beside it and any other. Anything else is
    unknown: an error if it is painted, which is an even spot or one colour in 20 pixels, or makes up more than 2 %. In a file
    that was compressed with loss, all edges ring: there 10 % may be unknown, and an equal colour says nothing.
    """
    H, W = opaque.shape
    rgb = np.where(opaque[..., None], rgb, 0).astype(np.uint8)
    colors, names = colorbook.colors.astype(np.float32), colorbook.names
    if colors.any(axis=1).all():  # no class is black: black means unlabelled
        colors, names = np.concatenate([colors, np.zeros((1, 3), np.float32)]), [*names, "unlabelled"]
    packed, index = np.unique(rgb.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32), return_inverse=True)
    index, found = index.reshape(H, W), np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1).astype(np.float32)
    nearest, least = np.zeros(len(found), np.uint8), np.full(len(found), np.inf, np.float32)
    for k, color in enumerate(colors):
        distance = np.linalg.norm(found - color, axis=1)
        nearest, least = np.where(distance < least, np.uint8(k), nearest), np.minimum(distance, least)
    ids, off = nearest[index], least[index]
    snapped = float((off > 0).mean())
    if snapped:
        picture = Image.fromarray(rgb)
        largest, smallest = (np.array(picture.filter(f(3))) for f in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
        spread = (largest - smallest).max(axis=2)  # in the 3x3 pixels around
        hard = ~np.array(Image.fromarray(off > 0).convert("L").filter(ImageFilter.MaxFilter(3))).astype(bool)
        sure = (off <= near) & (spread <= 8) | (off <= reach) & (spread <= 2) | hard
        unknown = off > reach
        if (unknown & (spread <= 2)).any():  # painted, whatever is beside it
            unknown &= spread <= 2
        elif unknown.mean() < 0.5:  # no photograph
            ids, unknown = unblend(ids, off, sure, found[index], colors, reach)
        stroke = not lossy and unknown.any() and np.bincount(index[unknown]).max() >= 20
        if stroke or (unknown & (spread <= 8)).any() or unknown.mean() > (0.1 if lossy else 0.02):
            unknown = ~sure & np.isin(index, index[unknown])  # with those that a blend might have explained
            counts = Counter(index[unknown].tolist()).most_common(5)
            listed = "; ".join(f"{tuple(map(int, found[i]))} {n} pixels, nearest class {names[nearest[i]]!r} "
                               f"{tuple(map(int, colors[nearest[i]]))}" for i, n in counts)
            raise ValueError(f"{path}: {unknown.sum()} pixels ({unknown.mean():.1%}) have colours that are in no class "
                             f"of the colorbook: {listed}. Paint with the colours that `python dataset.py legend` draws")
    ids[(ids >= len(colorbook)) | ~opaque] = UNLABELLED
    return ids, snapped


def unblend(ids, off, sure, rgb, colors, reach):
    """The ids of soft edges: see snap_colors(). Returns ids (H, W), and where they are unknown, (H, W) bool.

    ids (H, W) are the nearest classes, off (H, W) their distance in colour, sure (H, W) says where they are right; rgb
    (H, W, 3) are the colours, and colors (K, 3) those of the classes.
    """
    (H, W), K, (v, u), (y, x) = ids.shape, len(colors), np.nonzero(sure), np.nonzero(~sure)
    color, label, known = rgb[y, x], ids[y, x], np.zeros(len(y), bool)
    miss = np.full(len(y), np.inf, np.float32)

    def blend(at, a, b):
        """Pixels `at` take the nearer end of the line from class a to b if they are closer to it than to any so far."""
        way = colors[b] - colors[a]
        t = ((color[at] - colors[a]) @ way / max(way @ way, 1)).clip(0, 1)
        aside = np.linalg.norm(color[at] - colors[a] - t[:, None] * way, axis=1)
        closer = aside < miss[at]
        miss[at[closer]], label[at[closer]] = aside[closer], np.where(t < 0.5, a, b)[closer]

    side, present = 4, torch.zeros(K, -(-H // 4), -(-W // 4))
    present[ids[v, u].astype(int), v // side, u // side] = 1  # which classes are in which square
    while True:
        beside = F.max_pool2d(present, 3, 1, 1).numpy() > 0  # in the square of a pixel and the eight around it
        left, together = np.flatnonzero(~known), beside.reshape(K, -1).astype(np.float32)
        here = beside[:, y[left] // side, x[left] // side]
        miss[left] = np.inf
        for a, b in np.argwhere(np.triu(together @ together.T)):
            blend(left[here[a] & here[b]], a, b)
        known[left] = miss[left] <= reach / 2
        if 2 * side > max(16, min(H, W) // 16):
            break
        present, side = F.max_pool2d(present, 2, ceil_mode=True), 2 * side
    low, high = (extreme(np.where(beside[..., None], colors[:, None, None], none), axis=0)[y // side, x // side]
                 for extreme, none in ((np.min, np.inf), (np.max, -np.inf)))
    known |= ((color >= low - reach) & (color <= high + reach)).all(axis=1)  # a blend of three, or in linear light
    left, before = np.flatnonzero(~known), label.copy()
    miss[left] = np.inf
    for a, b in itertools.product(range(K), repeat=2):
        blend(left[beside[a, y[left] // side, x[left] // side]], a, b)
    close = off[y, x] <= reach
    label = np.where(known | (miss <= reach / 2), label, np.where(close, ids[y, x], before))
    ids, unknown = ids.copy(), np.zeros((H, W), bool)
    ids[y, x], unknown[y, x] = label, ~(known | (miss <= reach / 2) | close)
    return ids, unknown


def save_mask(ids, path, colorbook):
    """Write class ids (H, W) uint8 as the palette PNG described above."""
    image = Image.fromarray(np.ascontiguousarray(ids))
    image.putpalette(colorbook.paint(np.arange(256, dtype=np.uint8)).tobytes())
    image.save(path)


def one_hot(ids, num_classes):
    """ids (B, H, W) uint8 on any device to (B, K, H, W) float32 there; unlabelled (255) is zero in every plane."""
    B, H, W = ids.shape
    planes = torch.zeros(B, num_classes, H, W, device=ids.device)
    return planes.scatter_(1, ids.clamp(max=num_classes - 1).long()[:, None], (ids != UNLABELLED)[:, None].float())


# -------------------------------------------------------------------------------------------- sizes and files


def parse_size(text):
    """ "64x96" to (64, 96): height, width."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 128x128, got {text!r}")
    return int(parts[0]), int(parts[1])


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


def write_dataset(out, colorbook, splits):
    """Write a prepared data set: all of it or nothing.

    splits: {"train": [(stem, make), ...], ...} where make() returns an image (H, W, 3) and ids (H, W), both uint8.
    It is built in <out>.partial and renamed at the end, so a run that was stopped leaves nothing half-written and a
    second run replaces the first. A folder that is no prepared data set is never replaced: FileExistsError.
    """
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    if out.exists() and not (out / "colorbook.json").is_file():
        raise FileExistsError(f"{out} exists and is no prepared data set (no colorbook.json): choose another --out")
    if not any(splits.values()):
        raise ValueError(f"no image has a mask: nothing to write to {out}")
    shutil.rmtree(partial, ignore_errors=True)
    for split, items in splits.items():
        for kind in ("images", "masks"):
            (partial / split / kind).mkdir(parents=True)
        for stem, make in tqdm(items, desc=f"{out.parent.name} {split}", unit="pair"):
            image, ids = make()
            Image.fromarray(image).save(partial / split / "images" / f"{stem}.png")
            save_mask(ids, partial / split / "masks" / f"{stem}.png", colorbook)
    colorbook.save(partial / "colorbook.json")
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
    print(f"{out}: " + ", ".join(f"{len(items)} {split}" for split, items in splits.items()) + " pairs")


def prepare_command(prepare, doc, name, size, **more):
    """The command line of a data/<name>/prepare.py: calls prepare(source, out, size, crop, ...more)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the folder of the unpacked download")
    parser.add_argument("--out", type=Path, default=Path("data", name, "prepared"), help="default: %(default)s")
    parser.add_argument("--size", type=parse_size, default=size, metavar="HxW",
                        help=f"height x width of the result, square or not; default: {size[0]}x{size[1]}")
    parser.add_argument("--crop", type=parse_size, metavar="HxW",
                        help="centred window that is taken first; default: the largest that has the ratio of --size")
    for flag, options in more.items():
        parser.add_argument(f"--{flag}", **options)
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that this terminal cannot show is no error
    try:
        prepare(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


# ---------------------------------------------------------------------------------------------------- pairs


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


# ------------------------------------------------------------------------------------------------- pictures


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


def draw_bars(colorbook, texts, lengths=None):
    """One line per class: its colour, its id and name, a text, and a bar of length 0..1."""
    line, bar = 22, 0 if lengths is None else 400
    image = Image.new("RGB", (300 + bar, line * len(colorbook) + 10), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for k, name in enumerate(colorbook.names):
        y, color = 5 + k * line, tuple(map(int, colorbook.colors[k]))
        draw.rectangle([8, y + 2, 40, y + line - 4], color, "black")
        draw.text((48, y + 2), f"{k:3d}  {name}", "black", font)
        draw.text((190, y + 2), texts[k], "black", font)
        if bar and lengths[k] > 0:
            draw.rectangle([290, y + 2, 290 + lengths[k] * bar, y + line - 4], color, "black")
    return image


def legend(args):
    """Draw class, colour and id of a colorbook."""
    colorbook = Colorbook.load(args.colorbook)
    draw_bars(colorbook, [str(tuple(map(int, c))) for c in colorbook.colors]).save(args.out)
    print(f"{args.out}: {len(colorbook)} classes")


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
    command = commands.add_parser("legend", help=legend.__doc__)
    command.add_argument("--colorbook", default="colorbook.json")
    command.add_argument("--out", default="legend.png")
    command.set_defaults(run=legend)
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
