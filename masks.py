"""What a mask is: classes and their colours, reading, saving, one-hot planes, the legend."""

import argparse
import itertools
import json
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

UNLABELLED = 255
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


class Colorbook:
    """The classes in id order: names (K strings) and colors (K, 3) uint8; at most 255 of them."""

    def __init__(self, classes, source="colorbook.json"):
        """classes: {name: [r, g, b]}, each 0..255, in id order. ValueError where that is not what it is."""
        for name, rgb in classes.items():
            if not (isinstance(rgb, list) and len(rgb) == 3 and all(type(v) is int and 0 <= v <= 255 for v in rgb)):
                raise ValueError(f"class {name!r} has colour {rgb!r}: expected three whole numbers 0..255")
        twice = [rgb for rgb, n in Counter(map(tuple, classes.values())).items() if n > 1]
        if twice or not 1 <= len(classes) <= 255:
            raise ValueError(f"expected 1 to 255 classes of different colours, got {len(classes)}, repeated: {twice}")
        self.classes, self.names, self.source = dict(classes), list(classes), source
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
                             f"of the colorbook: {listed}. Paint with the colours that `python masks.py` draws")
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--colorbook", default="colorbook.json")
    parser.add_argument("--out", default="legend.png")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        legend(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


if __name__ == "__main__":
    main()
