"""What a mask is: classes and their colours, reading, soft edges, saving, one-hot planes, the legend.

    python masks.py --colorbook colorbook.json --out legend.png     draw which colour is which class
    python masks.py --colorbook runs/toy/checkpoint.pt              the classes that a checkpoint was trained with
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from shlex import quote

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

UNLABELLED = 255
REACH = 20  # a colour within this Euclidean distance of a class's (0..255 a channel) is taken for it
MOST_SNAPPED = 2**20  # pixels; of a larger drawing only every 2nd (3rd, ...) row and column is looked at for soft edges


class Colorbook:
    """The classes in id order: classes {name: [r, g, b]}, names, colors (K, 3) uint8, palette (256, 3) uint8, which is
    black where no class is, and source, for messages."""

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
        self.palette = np.zeros((256, 3), np.uint8)
        self.palette[: len(classes)] = self.colors

    def __len__(self):
        return len(self.names)

    @classmethod
    def load(cls, path):
        """Read a colorbook.json, or the colorbook in a checkpoint.pt. ValueError names the file."""
        try:
            if ".pt" in Path(path).suffixes:  # checkpoint.pt.previous too
                pairs = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["colorbook"].items()
            else:
                text = Path(path).read_text(encoding="utf-8")
                pairs = json.loads(text, object_pairs_hook=list)  # a dict would lose a class that is there twice
            if len(dict(pairs)) < len(pairs):
                raise ValueError(f"a class stands in it twice: {[name for name, _ in pairs]}")
            return cls(dict(pairs), path)
        except Exception as error:  # torch raises many kinds for a broken file
            raise ValueError(f"{path}: expected a colorbook, {{name: [r, g, b], ...}}, or a checkpoint.pt, "
                             f"found: {error}") from error

    def save(self, path):
        lines = [f"  {json.dumps(name)}: {json.dumps(rgb)}" for name, rgb in self.classes.items()]
        Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    def paint(self, ids):
        """Class ids (H, W) uint8 to colours (H, W, 3) uint8 for people: unlabelled is a light grey checkerboard."""
        image = self.palette[ids]
        y, x = np.nonzero(ids == UNLABELLED)
        image[y, x] = np.where((y // 4 + x // 4) % 2, 200, 230)[:, None]
        return image


def open_image(path):
    """An image file as a PIL image, checked to its end, turned as its EXIF says. ValueError names file and remedy."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: No such file in {Path(path).absolute().parent}; expected an image. Check the name")
    try:
        with Image.open(path) as image:
            image.verify()  # the check sums of a PNG; leaves the image unusable
        with Image.open(path) as image:
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # phones add a small second image
            if frames > 1 or image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"it has {frames} frames of {image.width * image.height} pixels")
            ImageOps.exif_transpose(image, in_place=True)
        return image
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise ValueError(f"{path} ({Path(path).stat().st_size:,} bytes): not readable as an image: {error}; expected "
                         f"one complete image of at most {Image.MAX_IMAGE_PIXELS:,} pixels. Save it as a PNG. Scale it "
                         "down if it is larger, a mask without smoothing") from error


def read_mask(path, colorbook):
    """A mask file as class ids.

    Returns ids (H, W) uint8 (0..K-1, or 255 unlabelled), what the file was ("palette", "ids" or "colours"), and the
    share 0..1 of pixels whose colour was off and had to be snapped to a class. Unlabelled is what is transparent; in
    colours also black, unless a class is black, and white, unless a class is nearly white.
    ValueError: unknown colours or ids, how many pixels have them, and the nearest class.
    """
    image = open_image(path)
    with open(path, "rb") as file:
        # the bits a channel in a PNG's header; Pillow scales grey of 2 and 4 bits to 0..255, so that ids would be lost
        bits = file.read(25)[24] if image.format == "PNG" else 8
    inexact = bits < 8 or "jpeg" in (image.format.lower(), image.info.get("compression"))  # grey is not what was saved
    if image.mode not in ("P", "L", "RGB", "RGBA") or (image.mode == "L" and inexact):
        raise ValueError(f"{path}: {image.format} of mode {image.mode}; expected a palette, RGB(A), or exact ids in "
                         "grey. Save it as an 8-bit PNG")
    rgba, values = np.array(image.convert("RGBA")), np.array(image)
    opaque = rgba[..., 3] >= 128
    kind = "ids" if image.mode == "L" else "colours"
    if image.mode == "P":  # ids if its palette is that of the colorbook or of greys, else colours stored as a palette
        shown = np.frombuffer(bytes(image.getpalette("RGB")).ljust(768, b"\0"), np.uint8).reshape(256, 3)
        same = (shown == colorbook.palette).all(axis=1)  # is the id shown in the colour of its class?
        same[UNLABELLED] = True  # it may be shown in any colour
        if (shown == np.arange(256)[:, None]).all():
            kind = "ids"
        elif same[values[opaque]].all():
            kind = "palette"
    if kind == "colours":
        ids, snapped = read_colors(np.where(opaque[..., None], rgba[..., :3], 0), colorbook, path)
        return np.where(opaque, ids, np.uint8(UNLABELLED)), kind, snapped
    if kind == "ids":
        check_grey(np.unique(values[opaque]).tolist(), colorbook, path)
    return check_ids(np.where(opaque, values, np.uint8(UNLABELLED)), colorbook, path), kind, 0.0


def check_ids(ids, colorbook, path):
    """The ids as they are, unless one is neither a class nor 255: ValueError."""
    values, counts = np.unique(ids[(ids >= len(colorbook)) & (ids != UNLABELLED)], return_counts=True)
    if len(values):
        listed = ", ".join(f"{v} ({n} pixels)" for v, n in zip(values[:8], counts))
        raise ValueError(f"{path}: unknown class ids {listed}; expected 0..{len(colorbook) - 1} or 255 for unlabelled. "
                         "Are these the ids of another colorbook, or colours? Save it as an 8-bit PNG, colours in RGB")
    return ids


def check_grey(values, colorbook, path):
    """ValueError if the grey values of a mask that should hold ids look like painted colours.

    They do if each is black, white or the colour of a class, and that class has another id. For example, where building
    is (70, 70, 70) and class 2: {0, 70, 255} was probably painted, {0, 2, 255} are ids.
    """
    greys = {r: k for k, (r, g, b) in enumerate(colorbook.colors.tolist()) if r == g == b}
    meant = {v: greys[v] for v in values if v in greys}  # as colours: {value: id}
    all_are_colours = meant and {0, 255, *meant} >= set(values)
    if all_are_colours and any(meant.get(v, UNLABELLED) != v for v in values):
        listed = ", ".join(f"{v} is the colour of {colorbook.names[k]!r}" for v, k in meant.items())
        raise ValueError(f"{path}: grey values that may be colours or ids: {listed}. Expected ids. Save it as an 8-bit "
                         "PNG, in RGB if these are colours, with a palette if they are ids")


def read_colors(rgb, colorbook, path):
    """Colours (H, W, 3) uint8 to ids (H, W) uint8, and the share of pixels that were snapped. ValueError: unknown."""
    names, colors = list(colorbook.names), colorbook.colors.astype(int)
    for shade, reach in ((0, 0), (255, REACH)):  # black and white are unlabelled, unless a class has that colour
        if np.linalg.norm(colors - shade, axis=1).min() > reach:
            names, colors = [*names, "unlabelled"], np.append(colors, [[shade] * 3], axis=0)
    to_code = np.array([1 << 16, 1 << 8, 1], np.uint32)
    codes = rgb.astype(np.uint32) @ to_code  # 0xRRGGBB
    index = np.full(codes.shape, -1)  # of each pixel's exact color in colors, or -1
    for k, code in enumerate(colors.astype(np.uint32) @ to_code):
        index[codes == code] = k
    off = index < 0
    if off.any():
        if (rgb == rgb[..., :1]).all() and set(np.unique(rgb)) <= {*range(len(colorbook)), UNLABELLED}:
            raise ValueError(f"{path}: class ids that were saved as RGB; expected one channel. Save it as a grey PNG")
        step = math.ceil(math.sqrt(off.size / MOST_SNAPPED))
        snapped, unknown = snap(rgb[::step, ::step], colors)
        if unknown.any():
            foreign = np.isin(codes, codes[::step, ::step][unknown])
            listed = []
            for color, n in Counter(map(tuple, rgb[foreign].tolist())).most_common(5):
                k = np.linalg.norm(colors - color, axis=1).argmin()
                listed.append(f"{color} {n} pixels, nearest class {names[k]!r} {tuple(colors[k].tolist())}")
            raise ValueError(f"{path}: {foreign.sum()} pixels ({foreign.mean():.1%}) have colours that are in no class "
                             f"of the colorbook: {'; '.join(listed)}. Paint with the colours that "
                             f"`python masks.py --colorbook {quote(str(colorbook.source))}` draws")
        H, W = off.shape
        if step == 1:
            index = snapped  # of all pixels: a blend of two classes may have the exact color of a third
        else:  # only some pixels were looked at: exact ones keep their color
            index = np.where(off, snapped.repeat(step, axis=0).repeat(step, axis=1)[:H, :W], index)
    is_class = index < len(colorbook)  # rather than black or white
    return np.where(is_class, index, UNLABELLED).astype(np.uint8), float(off.mean())


def snap(rgb, colors):
    """Which of colors each pixel of a drawing with soft edges was painted in.

    rgb (H, W, 3) and colors (K, 3), 0..255. Returns the index into colors (H, W), and what is unknown (H, W) bool.
      1. A pixel is solid where its 3x3 pixels are even and near one color, or all have exact colors.
      2. Every other pixel lies at an edge, as a blend of the colors on both sides, or in a thin stroke. It takes the
         nearest color of those that are solid close by, so that a blend of two never becomes a third one;
      3. but a stroke keeps its own color: it is near that color, and no blend of those that are solid close by.
      4. Unknown is an even spot near no color, unless so few are that they are bits of edges; and in a photograph,
         where a quarter of the pixels is near no color and no blend either, whatever is near none.
    Close by: in the pixel's square of 8x8 pixels, or in one of the eight squares around it.
    """
    def dilate(planes):
        """The largest value of planes (C, H, W) in the 3x3 pixels around each."""
        return F.max_pool2d(planes, 3, 1, 1)

    (H, W), K = rgb.shape[:2], len(colors)
    rgb, colors = torch.tensor(rgb).float(), torch.tensor(colors).float()
    distances = torch.cdist(rgb.flatten(0, 1), colors).T.reshape(K, H, W)
    distance, nearest = distances.min(dim=0)
    far = distance > REACH
    planes = rgb.permute(2, 0, 1)
    spread = (dilate(planes) + dilate(-planes)).amax(dim=0)  # the largest - the smallest value in 3x3 pixels
    solid = (~far & (spread <= 8)) | (dilate(distance[None])[0] == 0)

    y, x = torch.nonzero(solid, as_tuple=True)
    present = torch.zeros(K, math.ceil(H / 8), math.ceil(W / 8))  # the colors that are solid in squares of 8x8 pixels
    present[nearest[y, x], y // 8, x // 8] = 1
    close_by = dilate(present) > 0
    # the box, in RGB, of the colors that are solid close by: a blend of them lies in it
    low = torch.where(close_by[..., None], colors[:, None, None], torch.inf).amin(dim=0) - REACH  # (H/8, W/8, 3)
    high = torch.where(close_by[..., None], colors[:, None, None], -torch.inf).amax(dim=0) + REACH

    row, column = torch.arange(H)[:, None] // 8, torch.arange(W) // 8  # the square of each pixel
    blend = ((low[row, column] <= rgb) & (rgb <= high[row, column])).all(dim=2)
    index = (distances + (1000.0 * ~close_by)[:, row, column]).argmin(dim=0)  # 1000: farther than any color
    is_stroke = ~far & ~blend
    index = torch.where(is_stroke, nearest, index)
    unknown = far & (spread <= 2)
    if unknown.sum() <= 0.01 * (~solid).sum():  # so few are bits of edges, not painted: only a photograph is refused
        is_photograph = (far & ~blend).float().mean() > 0.25
        unknown = far & is_photograph
    return index.numpy(), unknown.numpy()


def save_mask(ids, path, colorbook):
    """Write class ids (H, W) uint8 as a palette PNG: pixel = id, palette = colorbook, unlabelled is black."""
    image = Image.fromarray(ids)
    image.putpalette(colorbook.palette.tobytes())
    image.save(path)


def one_hot(ids, num_classes):
    """ids (B, H, W) uint8 on any device to (B, K, H, W) float32 there; unlabelled (255) is zero in every plane."""
    classes = torch.arange(num_classes, dtype=torch.uint8, device=ids.device)
    return (ids[:, None] == classes[:, None, None]).float()


def draw_bars(colorbook, texts, lengths=None):
    """A line for each class: its colour, id, name and a text; with lengths 0..1 (experiments/count.py) a bar too."""
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
