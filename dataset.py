"""Pairs of image and mask: match, fit, read, batch, augment, and cut out a part of one for editing.

    pairs = Pairs("data/toy/prepared", "train", size=(64, 64))
    loader = batches(pairs, batch_size=16, seed=0)           # endless
    x0, mask = unpack(next(loader), len(pairs.colorbook))    # images in [-1, 1] and one-hot masks
"""

import hashlib
import itertools
import math
import secrets
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import InterpolationMode
from tqdm import tqdm

from masks import UNLABELLED, Colorbook, one_hot, open_image, read_mask

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
ORDER, FLIP, AUGMENT = range(3)  # the seeds of batches() begin with one of these: no two random streams are equal


def read_image(path):
    """An image file as (H, W, 3) uint8 RGB: 16 bits scaled to 8, black where transparent. ValueError names the file."""
    image = open_image(path)
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):  # convert() would clip to white
        image = Image.fromarray(((np.array(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F", "LAB"):
        raise ValueError(f"{path}: mode {image.mode} of unknown range; expected 8 or 16 bits. Save it as an 8-bit PNG")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def fit(image, size, crop=None):
    """The centre of an image, resized to `size`: stretched only if the crop has another ratio.

    image     (H, W, 3) uint8, resized bicubic with anti-aliasing, or class ids (H, W) uint8, resized NEAREST
    size      (height, width)
    crop      (height, width) of the centre; without it the largest window that has the ratio of `size`
    """
    H, W = image.shape[:2]
    h, w = crop or (min(H, W * size[0] / size[1]), min(W, H * size[1] / size[0]))
    if h > H or w > W:
        raise ValueError(f"the crop {h}x{w} does not fit into an image of {H}x{W} (height x width)")
    box = ((W - w) / 2, (H - h) / 2, (W + w) / 2, (H + h) / 2)
    resample = Image.Resampling.NEAREST if image.ndim == 2 else Image.Resampling.BICUBIC
    return np.array(Image.fromarray(image).resize(size[::-1], resample, box=box))


def fit_pair(image, ids, size, crop, where):
    """fit() of an image and its mask; ValueError, with the files named in `where`, if they differ in size."""
    if image.shape[:2] != ids.shape:
        raise ValueError(f"{where}: the image is {image.shape[:2]} and the mask {ids.shape} (height, width); "
                         "a pair must have one size")
    return fit(image, size, crop), fit(ids, size, crop)


def prepare_edit(image, mask, changed, size):
    """A real image (H, W, 3), its new mask (H, W), and where to redraw it (H, W) bool, cut out for a network of `size`.

    The window around the change has the network's size, but is at least twice as large as the change. Returns a dict:
    image and mask as given, window (slices); and, in the network's size, what is in the window: real (h, w, 3),
    ids (h, w), and keep (1, h, w) bool, which is false where the change is and in a margin of 1/32 around it.
    """
    first, last = np.argwhere(changed).min(axis=0), np.argwhere(changed).max(axis=0) + 1
    scale = max(1.0, (2 * (last - first) / size).max())
    sides = np.minimum(np.round(scale * np.array(size)), changed.shape).astype(int)
    start = np.clip((first + last - sides) // 2, 0, changed.shape - sides)
    window = tuple(slice(a, a + n) for a, n in zip(start.tolist(), sides.tolist()))
    extent = changed[window].shape  # as the crop of fit(): the whole window, whatever its ratio
    redraw = F.adaptive_max_pool2d(torch.from_numpy(changed[window])[None].float(), size)  # 1 where any pixel changed
    margin = max(1, min(size) // 32)
    redraw = F.max_pool2d(redraw, 2 * margin + 1, 1, margin)
    return {"image": image, "mask": mask, "window": window, "real": fit(image[window], size, extent),
            "ids": fit(mask[window], size, extent), "keep": redraw == 0}


def put_back(edit, drawn):
    """The whole image with what was drawn, (h, w, 3) uint8, in its window; pixels of weight 0 stay bit for bit."""
    image, window = edit["image"].copy(), edit["window"]
    extent = image[window].shape[:2]
    weight = F.interpolate((~edit["keep"])[None].float(), extent, mode="bilinear")[0, 0, :, :, None].numpy()
    image[window] = np.round(weight * fit(drawn, extent, drawn.shape[:2]) + (1 - weight) * image[window])
    return image


def list_files(folder, ending=""):
    """{stem: path} of the image files in a folder; with an ending such as "_gt", of NAME_gt.png: {NAME: path}.

    Stems are in Unicode form NFC; macOS writes é as e and an accent. Hidden files are left out. ValueError: no such
    folder, or two files of one stem.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: {'a file, expected a folder' if Path(folder).exists() else 'no such folder'}")
    files = {}
    for path in sorted(Path(folder).iterdir()):
        shown = not path.name.startswith(".") and not path.is_dir()
        if shown and path.suffix.lower() in SUFFIXES and path.stem.endswith(ending):
            stem = unicodedata.normalize("NFC", path.stem.removesuffix(ending))
            if stem in files:
                raise ValueError(f"{path} and {files[stem].name} have the same stem: rename or delete one of them")
            files[stem] = path
    return files


def match_pairs(images, masks, where):
    """[(stem, image, mask)] of two dicts by stem; prints how many have no partner, and ten of them."""
    for kind, alone in (("image(s) without a mask", images.keys() - masks.keys()),
                        ("mask(s) without an image", masks.keys() - images.keys())):
        if alone:
            more = " ..." if len(alone) > 10 else ""
            print(f"{where}: {len(alone)} {kind} left out: {', '.join(sorted(alone)[:10])}{more}")
    return [(stem, images[stem], masks[stem]) for stem in sorted(images.keys() & masks.keys())]


class Pairs:
    """The pairs of <root>/<split>/{images,masks}, fitted to size (height, width); the classes: <root>/colorbook.json.

    planes  (N, 4, H, W) uint8: red, green, blue, class id; in memory, or above memory_gb GiB mapped from a file;
            with check_only=True the files are read, and nothing is kept
    files   [(stem, path of the image, path of the mask)], N of them

    ValueError names the folder without pairs, or the files that cannot be used.
    """

    def __init__(self, root, split, size, memory_gb=4.0, check_only=False):
        root, self.folder, self.size = Path(root), Path(root) / split, tuple(size)
        folders = self.folder / "images", self.folder / "masks"
        images, masks = (list_files(folder) if folder.is_dir() else {} for folder in folders)
        self.files = match_pairs(images, masks, self.folder)
        if not self.files:
            splits = ", ".join(sorted(path.parent.name for path in root.glob("*/masks"))) or "none"
            raise ValueError(f"{self.folder}: no pairs; expected images/NAME and masks/NAME ({', '.join(SUFFIXES)}), "
                             f"without sub-folders. Splits in {root}: {splits}. Prepare the data first (python -m data."
                             "<name>.prepare), or set data.root, or data.val to another split")
        self.colorbook = Colorbook.load(root / "colorbook.json")
        shape = (len(self.files), 4, *self.size)
        if check_only:
            for _ in self.read():
                pass
        elif math.prod(shape) <= memory_gb * 2**30:
            self.planes = torch.empty(shape, dtype=torch.uint8)
            for i, planes in enumerate(self.read()):
                self.planes[i] = torch.from_numpy(planes)
        else:
            self.planes = self.map_planes(shape)

    def __len__(self):
        return len(self.files)

    def read(self):
        """Yield the planes (4, H, W) of each pair; at the end print notes, or raise ValueError for all that is bad."""
        notes, bad, (h, w) = Counter(), [], self.size
        for _, image_path, mask_path in tqdm(self.files, f"reading {self.folder.name}", unit="pair", leave=False):
            try:
                image = read_image(image_path)
                ids, kind, snapped = read_mask(mask_path, self.colorbook)
                fitted = fit_pair(image, ids, self.size, None, f"{image_path} and {mask_path}")
            except ValueError as error:
                bad.append(str(error))
                continue
            H, W = ids.shape
            kept = min(H * w / (W * h), W * h / (H * w))  # the share of the pixels that fit() does not crop
            notes[kind + (" with soft edges" if snapped else "")] += 1
            if H < h or W < w:
                notes["enlarged (prepare the data with a larger --size)"] += 1
            if kept < 0.9:
                notes[f"that lose more than a tenth to the crop to {h}x{w}"] += 1
            yield np.ascontiguousarray(np.dstack(fitted).transpose(2, 0, 1))  # for file.write()
        if bad:
            listed = [*bad[:10], f"... and {len(bad) - 10} more"] if len(bad) > 10 else bad
            raise ValueError("\n".join([f"{self.folder}: {len(bad)} of {len(self)} pairs cannot be used; "
                                        "fix or delete them:", *listed]))
        print(f"{self.folder}: {len(self)} pairs: " + ", ".join(f"{n} {note}" for note, n in notes.items()))

    def map_planes(self, shape):
        """Planes mapped from <split>/.planes_<H>x<W>_<key>, written if missing; the key changes when any file does."""
        paths = [path for _, image, mask in self.files for path in (image, mask)]
        state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        key = hashlib.sha256(repr((state, self.colorbook.classes)).encode()).hexdigest()[:12]
        path = self.folder / f".planes_{shape[2]}x{shape[3]}_{key}"
        partial = path.with_suffix(f".{secrets.token_hex(4)}")  # another process may be writing the same map
        gib = math.prod(shape) / 2**30
        try:
            if not path.exists():
                with open(partial, "wb") as file:  # written, not mapped: on a full disk a mapping ends in a crash
                    for planes in self.read():
                        file.write(planes)
                partial.replace(path)
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error}. Make room there for {gib:.1f} GiB, or hold the pairs in "
                          "memory with a larger data.memory_gb") from error
        finally:
            partial.unlink(missing_ok=True)
        print(f"{self.folder}: {len(self)} pairs, {gib:.1f} GiB mapped from {path.name}")
        return torch.from_file(str(path), size=math.prod(shape), dtype=torch.uint8).reshape(shape)


def augment_pair(planes, rng, p, brightness, contrast, saturation, hue, vertical_flip, rotate, crop):
    """Classical augmentation (the thesis, Bozsó 2023, 2.1) of the planes (4, H, W) of a pair, each with probability p.

    The first four change the image, the others image and mask alike. The horizontal flip is in batches().

    brightness, contrast, saturation   v: multiplied by a factor in [1 - v, 1 + v]
    hue                                shifted by up to this share of a full turn, either way
    vertical_flip                      whether it may be turned upside down
    rotate                             by up to so many degrees, either way; the corners are black and unlabelled
    crop                               a window of [crop, 1] of the height and of the width, scaled back
    """
    image, ids = planes[:3], planes[3:]
    for adjust, v in ((TF.adjust_brightness, brightness), (TF.adjust_contrast, contrast),
                      (TF.adjust_saturation, saturation)):
        if v and rng.random() < p:
            image = adjust(image, rng.uniform(1 - v, 1 + v))
    if hue and rng.random() < p:
        image = TF.adjust_hue(image, rng.uniform(-hue, hue))
    if vertical_flip and rng.random() < p:
        image, ids = image.flip(-2), ids.flip(-2)
    if rotate and rng.random() < p:
        angle = rng.uniform(-rotate, rotate)
        image = TF.rotate(image, angle, InterpolationMode.BILINEAR)
        ids = TF.rotate(ids, angle, InterpolationMode.NEAREST, fill=UNLABELLED)
    if crop < 1 and rng.random() < p:
        H, W = planes.shape[1:]
        h, w = (round(side * rng.uniform(crop, 1)) for side in (H, W))
        box = (int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1)), h, w)
        image = TF.resized_crop(image, *box, [H, W], InterpolationMode.BILINEAR, antialias=True)
        ids = TF.resized_crop(ids, *box, [H, W], InterpolationMode.NEAREST_EXACT)  # NEAREST is half a pixel off
    return torch.cat([image, ids])


def batches(pairs, batch_size, seed, start=0, flip=0.0, augment=None, device="cpu", rank=0, ranks=1):
    """Batches without end: planes (batch_size / ranks, 4, H, W) uint8 on the device.

    start      images that the training has seen before
    flip       the probability of a horizontal flip
    augment    the settings of augment_pair(), or None
    rank       this process gets its part of each batch, `rank` of `ranks`

    Every pair comes once per epoch, in a new order each; epochs run on without a short batch. All depends on the seed
    and on how many images came before, so a resumed run goes on where it stopped, where a DataLoader would begin its
    epoch again. The next batch is gathered while this one is used.
    """
    mine = slice(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)

    @lru_cache(maxsize=2)  # a batch may lie in two epochs
    def order(epoch):
        return np.random.default_rng([ORDER, seed, epoch]).permutation(len(pairs))

    def gather(first):
        positions = range(first, first + batch_size)[mine]  # among all images since the start of the training
        chosen = [int(order(position // len(pairs))[position % len(pairs)]) for position in positions]
        planes = pairs.planes[chosen]  # a copy
        if augment and augment["p"] > 0:
            for i, position in enumerate(positions):
                planes[i] = augment_pair(planes[i], np.random.default_rng([AUGMENT, seed, position]), **augment)
        # drawn for the whole batch, whatever part of it is mine
        flips = np.random.default_rng([FLIP, seed, first]).random(batch_size)[mine] < flip
        planes[flips] = planes[flips].flip(-1)
        return planes.pin_memory() if torch.device(device).type == "cuda" else planes

    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(gather, start)
        for next_first in itertools.count(start + batch_size, batch_size):
            planes = ahead.result()
            ahead = thread.submit(gather, next_first)
            yield planes.to(device, non_blocking=True)


def unpack(planes, num_classes):
    """Planes (B, 4, H, W) uint8 to images (B, 3, H, W) in [-1, 1] and one-hot masks (B, K, H, W), both float32.

    Where num_classes is 0, as of a network without masks, the mask is None.
    """
    x0 = planes[:, :3].float() / 127.5 - 1
    return x0, (one_hot(planes[:, 3], num_classes) if num_classes else None)


def to_uint8(x):
    """Images (B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8 arrays."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def contact_sheet(rows, titles=(), least=128):
    """Rows of equally large (H, W, 3) uint8 images as one PIL image, enlarged so that each side is `least` or more."""
    H, W = rows[0][0].shape[:2]
    scale, gap, top = math.ceil(least / min(H, W)), 4, 18 if titles else 0
    cell_h, cell_w = H * scale + gap, W * scale + gap
    sheet = Image.new("RGB", (cell_w * max(map(len, rows)) + gap, cell_h * len(rows) + gap + top), "white")
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            enlarged = Image.fromarray(image).resize((W * scale, H * scale), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (gap + c * cell_w, top + gap + r * cell_h))
    for c, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((gap + c * cell_w, 2), title, "black", ImageFont.load_default(12))
    return sheet
