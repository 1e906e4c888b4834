"""What several tests draw with: the Cityscapes colours, scenes whose right answer is known, comparing."""

import json
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from masks import Colorbook

CITYSCAPES = {  # copied from cityscapesScripts, labels.py, in the order of trainId
    "road": (128, 64, 128), "sidewalk": (244, 35, 232), "building": (70, 70, 70), "wall": (102, 102, 156),
    "fence": (190, 153, 153), "pole": (153, 153, 153), "traffic light": (250, 170, 30), "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35), "terrain": (152, 251, 152), "sky": (70, 130, 180), "person": (220, 20, 60),
    "rider": (255, 0, 0), "car": (0, 0, 142), "truck": (0, 0, 70), "bus": (0, 60, 100), "train": (0, 80, 100),
    "motorcycle": (0, 0, 230), "bicycle": (119, 11, 32)}
NAMES = [*CITYSCAPES, *["unlabelled"] * 237]  # by id, as PALETTE
PALETTE = np.zeros((256, 3), np.uint8)
PALETTE[:19] = list(CITYSCAPES.values())
BOOK = Colorbook({name: list(rgb) for name, rgb in CITYSCAPES.items()})
ROAD, BUILDING, POLE, VEGETATION, SKY, PERSON, CAR, TRUCK, MOTORCYCLE, NONE = 0, 2, 5, 8, 10, 11, 13, 14, 17, 255


def street(h=48, w=64):
    """A scene of six classes and unlabelled, with straight edges."""
    ids = np.full((h, w), SKY, np.uint8)
    ids[h // 2 :], ids[h // 4 : h // 2, : w // 3], ids[h // 3 : h // 2, w // 2 :] = ROAD, BUILDING, VEGETATION
    ids[h // 2 : 3 * h // 4, w // 2 : 3 * w // 4], ids[h // 2 :, : w // 8], ids[-h // 8 :] = CAR, PERSON, NONE
    return ids


def drawing(size, classes):
    """Ids (size, size) of slanted and round shapes of five classes that touch one another; the same in any size."""
    canvas = Image.new("L", (size, size), classes[0])
    pen, s = ImageDraw.Draw(canvas), size / 512
    pen.polygon([(x * s, y * s) for x, y in [(0, 300), (200, 260), (512, 330), (512, 512), (0, 512)]], fill=classes[1])
    pen.ellipse([v * s for v in (60, 120, 260, 330)], fill=classes[2])
    pen.polygon([(x * s, y * s) for x, y in [(230, 200), (420, 150), (440, 420), (210, 380)]], fill=classes[3])
    pen.ellipse([v * s for v in (300, 270, 400, 480)], fill=classes[4])
    return np.array(canvas)


@lru_cache
def painting(seed, h=144, w=192, scale=4, shapes=8):
    """Ids (4h, 4w): what somebody paints at random: polygons, ellipses, rectangles, strokes, of any class or erased."""
    rng = np.random.default_rng(seed)
    canvas = Image.new("L", (w * scale, h * scale), int(rng.integers(19)))
    pen, corner = ImageDraw.Draw(canvas), np.array([w, h]) * scale
    for _ in range(shapes):
        k = int(rng.integers(19)) if rng.random() < 0.9 else NONE
        middle, radius = rng.uniform(0, corner), rng.uniform(6, 45, 2) * scale
        shape = rng.choice(["polygon", "ellipse", "rectangle", "stroke"])
        if shape == "polygon":
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
            pen.polygon([tuple(middle + radius * (np.cos(a), np.sin(a))) for a in angles], fill=k)
        elif shape == "stroke":
            a, b, c = rng.uniform(0, corner, (3, 2))
            t = np.linspace(0, 1, 40)[:, None]
            curve = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
            pen.line([tuple(p) for p in curve], k, int(rng.uniform(4, 20) * scale), "curve")
        else:
            getattr(pen, shape)([*(middle - radius), *(middle + radius)], fill=k)
    return np.array(canvas)


def edges(ids):
    """Where ids (H, W) have a border of classes within 2 pixels, (H, W) bool."""
    planes = torch.from_numpy(ids)[None].float()
    return (F.max_pool2d(planes, 5, 1, 2) != -F.max_pool2d(-planes, 5, 1, 2))[0].numpy()


def save_palette(ids, path, palette=PALETTE, **options):
    image = Image.fromarray(ids)
    image.putpalette(np.ascontiguousarray(palette, np.uint8).tobytes())
    image.save(path, **options)


def write_pairs(root, masks, split="train", image=lambda ids: PALETTE[ids]):
    """A prepared folder, written without the code under test: {stem: ids}; the image shows the class as its colour."""
    for kind in ("images", "masks"):
        (root / split / kind).mkdir(parents=True, exist_ok=True)
    for stem, ids in masks.items():
        Image.fromarray(image(ids)).save(root / split / "images" / f"{stem}.png")
        save_palette(ids, root / split / "masks" / f"{stem}.png")
    (root / "colorbook.json").write_text(json.dumps({name: list(rgb) for name, rgb in CITYSCAPES.items()}))
    return root


def check_match(image, ids, margin=3, least=.3):
    """Away from edges every pixel of image (3, H, W) has the colour of its class in ids (H, W)."""
    planes = ids[None].float()
    side = 2 * margin + 1
    inner = (F.max_pool2d(planes, side, 1, margin) == -F.max_pool2d(-planes, side, 1, margin))[0].numpy()
    off = np.abs(image.permute(1, 2, 0).numpy().astype(int) - PALETTE[ids.numpy()]).max(axis=-1)
    assert inner.mean() >= least, "the case is too fine to tell"
    assert off[inner].max() <= 3
