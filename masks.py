"""What a mask is: classes and their colours, reading, soft edges, saving, one-hot planes, the legend.

    python masks.py --colorbook colorbook.json --out legend.png     draw which colour is which class
    python masks.py --colorbook runs/toy/checkpoint.pt              the classes that a checkpoint was trained with
"""

import argparse
import json
import math
import warnings
from collections import Counter
from pathlib import Path
from shlex import quote

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

UNLABELLED = 255
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
REACH = 20  # a colour within this Euclidean distance of a class's (0..255 a channel) is taken for it
LARGEST = 2**20  # pixels: of a larger drawing with soft edges, only every 2nd, 3rd, ... row and column is snapped


class Colorbook:
    """The classes in id order: classes {name: [r, g, b]}, names, colors (K, 3) uint8, and source, for messages."""

    def __init__(self, classes, source="colorbook.json"):
        """classes: {name: [r, g, b]}, 1 to 255 of them, each value 0..255. ValueError otherwise."""
        for name, rgb in classes.items():
            if not (isinstance(rgb, list) and len(rgb) == 3 and all(type(v) is int and 0 <= v <= 255 for v in rgb)):
                raise ValueError(f"class {name!r} has colour {rgb!r}: expected three whole numbers 0..255")
        repeated = [rgb for rgb, n in Counter(map(tuple, classes.values())).items() if n > 1]
        if repeated or not 1 <= len(classes) <= 255:
            raise ValueError(f"expected 1 to 255 classes of different colours, got {len(classes)}, twice: {repeated}")
        self.classes, self.names, self.source = dict(classes), list(classes), str(source)
        self.colors = np.array(list(classes.values()), np.uint8)

    def __len__(self):
        return len(self.names)

    @classmethod
    def load(cls, path):
        """Read a colorbook.json, or the colorbook in a checkpoint.pt. FileNotFoundError or ValueError name the file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file; expected a colorbook.json or a checkpoint.pt")
        try:
            if ".pt" in Path(path).suffixes:  # checkpoint.pt.previous too
                pairs = list(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["colorbook"].items())
            else:
                pairs = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=list)
            if len(dict(pairs)) < len(pairs):
                raise ValueError(f"a class stands in it twice: {[name for name, _ in pairs]}")
            return cls(dict(pairs), path)
        except Exception as error:  # torch raises many kinds for a broken file
            raise ValueError(f"{path}: not a colorbook ({{name: [r, g, b], ...}}) or checkpoint: {error}") from error

    def save(self, path):
        lines = [f"  {json.dumps(name)}: {json.dumps(rgb)}" for name, rgb in self.classes.items()]
        Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    def paint(self, ids):
        """Class ids (H, W) uint8 to colours (H, W, 3) uint8 for people: unlabelled is a light grey checkerboard."""
        y, x = np.indices(ids.shape)
        board = np.where((y // 4 + x // 4) % 2, 200, 230).astype(np.uint8)
        colors = self.colors[np.minimum(ids, len(self) - 1)]
        return np.where((ids == UNLABELLED)[..., None], board[..., None], colors)


def open_image(path):
    """An image file as a PIL image, read to its end, turned as its EXIF says. ValueError names file and remedy."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.verify()  # check sums of a PNG, not looked at otherwise; it has to be opened anew then
            with Image.open(path) as image:
                frames = getattr(image, "n_frames", 1)
                if frames > 1 and image.format != "MPO":  # phones put a second, small image into an MPO
                    raise ValueError(f"it has {frames} frames, of which none is known to be the right one")
                ImageOps.exif_transpose(image, in_place=True)
        return image
    except Exception as error:  # Pillow raises many kinds for a broken file
        size = f" ({Path(path).stat().st_size:,} bytes)" if Path(path).is_file() else ""
        raise ValueError(f"{path}{size}: not readable as an image: {error}; expected a complete file of one frame, at "
                         f"most {Image.MAX_IMAGE_PIXELS:,} pixels. Save it as a PNG. Scale it down if it is larger "
                         "(a mask without smoothing)") from error


def read_mask(path, colorbook):
    """A mask file as class ids.

    Returns ids (H, W) uint8 (0..K-1, or 255 unlabelled), what the file was ("palette", "ids", "colours", or "colours
    (white taken as unlabelled)"), and the share 0..1 of pixels whose colour was off and had to be snapped to a class.
    Unlabelled is what is transparent and, in colours, black if no class is black and white if none is nearly white.
    ValueError: unknown colours or ids, how many pixels have them, and the nearest class.
    """
    image = open_image(path)
    if image.mode not in ("P", "L", "RGB", "RGBA"):
        raise ValueError(f"{path}: mode {image.mode}; expected palette, grey (ids) or RGB(A). Save it as an 8-bit PNG")
    rgba, values = np.array(image.convert("RGBA")), np.array(image)
    opaque = rgba[..., 3] >= 128
    kind = "ids" if image.mode == "L" else "colours"
    used = np.unique(values[opaque]) if values.ndim == 2 else ()
    if image.mode == "P":  # ids if the palette says so, else colours that happen to be stored with a palette
        shown, ours = np.zeros((2, 256, 3), np.uint8)  # the colour of each id, in the file and in the colorbook
        palette = np.reshape(image.getpalette("RGB"), (-1, 3))
        shown[: len(palette)], ours[: len(colorbook)] = palette, colorbook.colors
        if not (shown[UNLABELLED] == colorbook.colors).all(axis=1).any():
            ours[UNLABELLED] = shown[UNLABELLED]  # unlabelled may be shown in any colour
        if np.array_equal(shown[used], ours[used]):
            kind = "palette"
        elif (shown[used] == used[:, None]).all() and (shown[1] == 1).all():  # a ramp of greys: used = {0} is no proof
            kind = "ids"
    if kind == "colours":
        return read_colors(np.where(opaque[..., None], rgba[..., :3], 0), opaque, colorbook, path)
    if kind == "ids":
        check_grey(image, used.tolist(), colorbook, path)
    return check_ids(np.where(opaque, values, np.uint8(UNLABELLED)), colorbook, path), kind, 0.0


def check_ids(ids, colorbook, path):
    """ids as they are, or a ValueError where one is neither a class nor 255."""
    values, counts = np.unique(ids[(ids >= len(colorbook)) & (ids != UNLABELLED)], return_counts=True)
    if len(values):
        listed = ", ".join(f"{v} ({n} pixels)" for v, n in zip(values[:8], counts))
        raise ValueError(f"{path}: unknown class ids {listed}; expected 0..{len(colorbook) - 1} or 255 for unlabelled. "
                         "Are these the ids of another colorbook, or colours that were saved as grey?")
    return ids


def check_grey(image, used, colorbook, path):
    """ValueError if the values used in a grey mask are not exact, or may be colours that were saved as grey.

    They may be if every one is black, white or the grey of a class, and one of them is not that class's own id.
    """
    if image.mode == "L":
        with Image.open(path) as unread:
            coding = f"{image.format} {unread.tile[0][3]}"  # "L;2" or "L;4" bits were scaled to 0..255
        if "JPEG" in coding or "L;" in coding or image.info.get("compression") == "jpeg":
            raise ValueError(f"{path}: grey in {coding}; expected exact ids, without loss. Save it as an 8-bit PNG")
    greys = {rgb[0]: k for k, rgb in enumerate(colorbook.colors.tolist()) if len(set(rgb)) == 1}
    meant = {v: greys.get(v, UNLABELLED) for v in used}
    if greys.keys() & meant and meant.keys() <= greys.keys() | {0, 255} and any(v != k for v, k in meant.items()):
        name = dict(enumerate(colorbook.names)) | {UNLABELLED: "unlabelled"}
        listed = "; ".join(f"{v} is the colour of {name[k]!r} and the id of {name.get(v)!r}" for v, k in meant.items())
        raise ValueError(f"{path}: grey values that may be colours or ids: {listed}. Expected ids only. Save it as an "
                         "8-bit PNG, in RGB if these are colours, with a palette if they are ids")


def read_colors(rgb, opaque, colorbook, path):
    """Colours (H, W, 3) uint8, black where not opaque (H, W), to what read_mask() returns; ValueError as there."""
    names, colors = list(colorbook.names), colorbook.colors.astype(int)
    for name, shade, near in (("unlabelled", 0, 0), ("unlabelled (white)", 255, REACH)):
        if np.linalg.norm(colors - shade, axis=1).min() > near:  # no class has that colour
            names, colors = [*names, name], np.append(colors, [[shade] * 3], axis=0)
    weights = np.array([1 << 16, 1 << 8, 1], np.uint32)
    codes, exact = rgb.astype(np.uint32) @ weights, colors.astype(np.uint32) @ weights  # 0xRRGGBB
    off, order = ~np.isin(codes, exact), exact.argsort()
    index = order[np.searchsorted(exact, codes, sorter=order).clip(max=len(exact) - 1)]  # where off: any
    if off.any():
        if (rgb == rgb[..., :1]).all() and set(np.unique(rgb)) <= {*range(len(colorbook)), UNLABELLED}:
            raise ValueError(f"{path}: class ids that were saved as RGB; expected one channel. Save it as a grey PNG")
        step = math.ceil(math.sqrt(off.size / LARGEST))
        part = np.s_[::step, ::step]
        snapped, unknown = snap(rgb[part], colors)
        foreign = codes[off & np.isin(codes, codes[part][unknown])]
        if len(foreign):
            listed = []
            for code, n in Counter(foreign.tolist()).most_common(5):
                color = code >> 16, code >> 8 & 255, code & 255
                k = np.linalg.norm(colors - color, axis=1).argmin()
                listed.append(f"{color} {n} pixels, nearest class {names[k]!r} {tuple(colors[k].tolist())}")
            raise ValueError(f"{path}: {foreign.size} pixels ({foreign.size / off.size:.1%}) have colours that are in "
                             f"no class of the colorbook: {'; '.join(listed)}. Paint with the colours that "
                             f"`python masks.py --colorbook {quote(str(colorbook.source))}` draws")
        y, x = (np.arange(n) // step for n in off.shape)
        index = np.where(off | (step == 1), snapped[y[:, None], x], index)
    ids = np.where(opaque & (index < len(colorbook)), index, UNLABELLED).astype(np.uint8)
    white = names[-1] == "unlabelled (white)" and (index == len(names) - 1).any()
    return ids, "colours (white taken as unlabelled)" if white else "colours", float(off.mean())


def snap(rgb, colors):
    """Which of colors each pixel of a drawing with soft edges was painted in.

    rgb (H, W, 3) and colors (K, 3), 0..255. Returns the index into colors (H, W), and what is unknown (H, W) bool.
    Solid: within REACH of a color and even in 3x3, or exact in 3x3. Every other pixel takes the nearest color that is
    solid in its square of 8x8 pixels or one beside it, so that a blend of two never becomes a third; but a thin stroke,
    near a color and no blend of the solid ones, keeps it. Unknown: an even spot near no color, or a photograph.
    """
    (H, W), K = rgb.shape[:2], len(colors)
    rgb, colors = torch.tensor(rgb).float(), torch.tensor(colors).float()
    distance = torch.cdist(rgb.flatten(0, 1), colors).T.reshape(K, H, W)
    off, nearest = distance.min(dim=0)
    far, planes = off > REACH, rgb.permute(2, 0, 1)
    spread = (dilate(planes) + dilate(-planes)).amax(dim=0)  # the largest - the smallest value in 3x3 pixels
    solid = ~far & (spread <= 8) | (dilate(off[None])[0] == 0)

    y, x = torch.nonzero(solid, as_tuple=True)
    present = torch.zeros(K, -(-H // 8), -(-W // 8))  # the colors that are solid in each square of 8x8 pixels
    present[nearest[y, x], y // 8, x // 8] = 1
    beside = dilate(present) > 0  # ... or in one of the eight squares around it
    # the box, in RGB, of the solid colors beside: a blend of them lies in it
    low = torch.where(beside[..., None], colors[:, None, None], torch.inf).amin(dim=0) - REACH  # (h, w, 3)
    high = torch.where(beside[..., None], colors[:, None, None], -torch.inf).amax(dim=0) + REACH

    row, column = torch.arange(H)[:, None] // 8, torch.arange(W) // 8  # the square of each pixel
    between = ((low[row, column] <= rgb) & (rgb <= high[row, column])).all(dim=2)
    index = (distance + (1000.0 * ~beside)[:, row, column]).argmin(dim=0)  # 1000: farther than any color
    index = torch.where(far | between, index, nearest)
    unknown = far & (spread <= 2)
    if unknown.sum() <= 0.01 * (~solid).sum():  # so few may be soft edges; then only a photograph is refused
        unknown = far & ((far & ~between).float().mean() > 0.25)
    return index.numpy(), unknown.numpy()


def dilate(planes):
    """The largest value of planes (C, H, W) in the 3x3 pixels around each."""
    return F.max_pool2d(planes, 3, 1, 1)


def save_mask(ids, path, colorbook):
    """Write class ids (H, W) uint8 as a palette PNG: pixel = id, palette = colorbook, unlabelled is black."""
    image = Image.fromarray(ids)
    image.putpalette(colorbook.colors.tobytes().ljust(768, b"\0"))
    image.save(path)


def one_hot(ids, num_classes):
    """ids (B, H, W) uint8 on any device to (B, K, H, W) float32 there; unlabelled (255) is zero in every plane."""
    B, H, W = ids.shape
    planes = torch.zeros(B, num_classes, H, W, device=ids.device)
    return planes.scatter_(1, ids.clamp(max=num_classes - 1).long()[:, None], (ids != UNLABELLED)[:, None].float())


def draw_bars(colorbook, texts, lengths=None):
    """One line per class: its colour, its id and name, a text, and a bar of length 0..1."""
    image = Image.new("RGB", (300 if lengths is None else 700, 22 * len(colorbook) + 10), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for k, (name, rgb) in enumerate(colorbook.classes.items()):
        y = 7 + 22 * k
        draw.rectangle([8, y, 40, y + 16], tuple(rgb), "black")
        draw.text((48, y), f"{k:3d}  {name}", "black", font)
        draw.text((190, y), texts[k], "black", font)
        if lengths is not None and lengths[k] > 0:
            draw.rectangle([290, y, 290 + 400 * lengths[k], y + 16], tuple(rgb), "black")
    return image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--colorbook", default=Path(__file__).with_name("colorbook.json"),
                        help="a colorbook.json or a checkpoint.pt; default: the project's")
    parser.add_argument("--out", default="legend.png", help="default: %(default)s")
    args = parser.parse_args()
    try:
        colorbook = Colorbook.load(args.colorbook)
        draw_bars(colorbook, [str(tuple(rgb)) for rgb in colorbook.colors.tolist()]).save(args.out)
        print(f"{args.out}: {len(colorbook)} classes")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


if __name__ == "__main__":
    main()
