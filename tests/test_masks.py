"""Colorbooks, masks exact and soft, what is refused, the legend: every mask is drawn, and its right answer known."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from scenes import (
    BOOK, BUILDING, CAR, CITYSCAPES, MOTORCYCLE, NONE, PALETTE, PERSON, POLE, ROAD, SKY, TRUCK, VEGETATION, drawing,
    edges, painting, save_palette, street,
)

import masks
from masks import Colorbook, one_hot, read_mask, save_mask

# ------------------------------------------------------------------------------------------------ colorbook


def test_colorbook_is_cityscapes():
    """The classes, their order and their colours are those of Cityscapes and BDD100K."""
    stored = json.loads((Path(masks.__file__).parent / "colorbook.json").read_text(encoding="utf-8"))
    assert list(stored) == list(CITYSCAPES) and [tuple(rgb) for rgb in stored.values()] == list(CITYSCAPES.values())


@pytest.mark.parametrize("text, words", [
    ('{"road": [1, 2, 3], "road": [4, 5, 6]}', "road"),
    ('{"road": [1, 2, 3], "sky": [1, 2, 3]}', "1, 2, 3"),
    ('{"road": [1, 2]}', "road"),
    ('{"road": [1, 2, 3, 4]}', "road"),
    ('{"road": [1, 2, 256]}', "256"),
    ('{"road": [1, 2, -1]}', "-1"),
    ('{"road": [1, 2, 0.5]}', "0.5"),
    ('{"road": [true, 2, 3]}', "road"),
    ('{"road": "#010203"}', "#010203"),
    ("{}", "1 to 255"),
    ("[[1, 2, 3]]", ""),
    ("7", ""),
    ('{"road": [1, 2, 3]', ""),
    ("", "")])
def test_colorbook_errors(tmp_path, text, words):
    """A slip in a user's own colorbook is named with its file."""
    (tmp_path / "mine.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="mine.json") as error:
        Colorbook.load(tmp_path / "mine.json")
    assert words in str(error.value)


def test_colorbook_missing(tmp_path):
    """The path that was looked for is in the error."""
    with pytest.raises(ValueError, match="nowhere.json: expected a colorbook.*No such file"):
        Colorbook.load(tmp_path / "nowhere.json")


def test_colorbook_round_trip(tmp_path):
    """Names in any language and the order of the classes survive saving and loading."""
    classes = {"úttest": [1, 2, 3], 'a "b"': [0, 0, 0], "道路": [255, 255, 255]}
    Colorbook(classes).save(tmp_path / "book.json")
    book = Colorbook.load(tmp_path / "book.json")
    assert list(book.classes.items()) == list(classes.items()) == list(zip(book.names, book.colors.tolist()))
    assert book.source == str(tmp_path / "book.json") and Colorbook(classes).source == "colorbook.json"


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.pt.previous"])
def test_colorbook_of_a_checkpoint(tmp_path, name):
    """A checkpoint gives the classes that it was trained with, in their order."""
    classes = {"snow": [255, 255, 255], "ice": [9, 99, 200]}
    torch.save({"colorbook": classes, "model": {"weight": torch.zeros(3)}}, tmp_path / name)
    book = Colorbook.load(tmp_path / name)
    assert list(book.classes.items()) == list(classes.items()) and book.source == str(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "dict", "list", "code"])
def test_no_colorbook_in_a_checkpoint(tmp_path, content):
    """A damaged file, one that is not a checkpoint, and one that would run code are refused by name."""
    path = tmp_path / "other.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        contents = {"dict": {"model": 1}, "list": [1], "code": {"colorbook": {"road": [1, 2, 3]}, "other": print}}
        torch.save(contents[content], path)
    with pytest.raises(ValueError, match="other.pt: expected a colorbook"):
        Colorbook.load(path)


def test_paint():
    """Each class has its colour; unlabelled has two light greys in turn, which cannot be taken for a black class."""
    ids = np.full((16, 24), NONE, np.uint8)
    ids[:, :19] = np.arange(19)
    painted = BOOK.paint(ids)
    assert painted.dtype == np.uint8 and np.array_equal(painted[:, :19], PALETTE[ids[:, :19]])
    rest = painted[:, 19:]
    assert (rest == rest[..., :1]).all() and rest.min() >= 180 and len(np.unique(rest)) == 2
    assert 0.4 <= (rest == rest.min()).mean() <= 0.6


# ---------------------------------------------------------------------------------------------- exact masks


def as_rgba(ids, path):
    """Transparent where unlabelled, with a class's colour below, as an eraser leaves it."""
    rgb, alpha = PALETTE[np.where(ids == NONE, CAR, ids)], np.where(ids == NONE, 0, 255)
    Image.fromarray(np.dstack([rgb, alpha]).astype(np.uint8)).save(path)


def as_foreign_palette(ids, path, black=255, **options):
    """Indices that are not the ids: index 18 - k is class k."""
    index = np.where(ids == NONE, black, 18 - ids).astype(np.uint8)
    save_palette(index, path, np.concatenate([PALETTE[18::-1], np.zeros((237, 3))]), **options)


FORMS = {
    "palette": ("palette", save_palette),
    "grey palette": ("ids", lambda ids, path: Image.fromarray(ids).convert("P").save(path)),
    "8-bit ids": ("ids", lambda ids, path: Image.fromarray(ids).save(path)),
    "RGB": ("colours", lambda ids, path: Image.fromarray(PALETTE[ids]).save(path)),
    "RGB, few colours": ("colours", lambda ids, path: Image.fromarray(PALETTE[ids]).quantize(16).save(path)),
    "RGBA": ("colours", as_rgba),
    "palette of another order": ("colours", as_foreign_palette),
    "transparent palette": ("colours", lambda ids, path: as_foreign_palette(ids, path, 200, transparency=200)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_agree(tmp_path, form):
    """The same scene is the same mask, whichever program saved it."""
    kind, write = FORMS[form]
    write(street(), tmp_path / "mask.png")
    ids, found, snapped = read_mask(tmp_path / "mask.png", BOOK)
    assert ids.dtype == np.uint8 and np.array_equal(ids, street())
    assert (found, snapped) == (kind, 0)


def test_black_may_be_a_class(tmp_path):
    """In a colorbook with a black class, black is that class."""
    Image.fromarray(np.array([[[0, 0, 0], [9, 200, 9]]], np.uint8)).save(tmp_path / "mask.png")
    book = Colorbook({"grass": [9, 200, 9], "void": [0, 0, 0]})
    assert read_mask(tmp_path / "mask.png", book)[0].tolist() == [[1, 0]]
    rgba = np.array([[[0, 0, 0, 255], [0, 0, 0, 0], [9, 200, 9, 0], [9, 200, 9, 255]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", book)[0].tolist() == [[1, NONE, NONE, 0]]


@pytest.mark.parametrize("K", [1, 19, 255])
def test_save_mask_round_trip(tmp_path, K):
    """A prepared mask holds the ids exactly and shows the colorbook's colours, unlabelled black, in any viewer."""
    colors = np.array([(i % 7 * 40, i % 11 * 25, i) for i in range(1, K + 1)], np.uint8)
    book = Colorbook({str(i): rgb for i, rgb in enumerate(colors.tolist())})
    ids = np.resize(np.array([*range(K), NONE], np.uint8), (16, 20))
    save_mask(ids, tmp_path / "mask.png", book)
    assert np.array_equal(read_mask(tmp_path / "mask.png", book)[0], ids)
    seen = np.concatenate([colors, np.zeros((256 - K, 3), int)])[ids]
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P" and np.array_equal(np.array(image), ids)
        assert np.array_equal(np.array(image.convert("RGB")), seen)


# ---------------------------------------------------------------------------------------- white and grey

MERGED = {"road": [128, 64, 128], "sky": [70, 130, 180], "void": [0, 0, 0], "line": [255, 255, 255], "car": [0, 0, 142]}


def test_white_canvas(tmp_path):
    """White is unlabelled where no class is near it, hard or soft."""
    ids = drawing(256, (NONE, 8, NONE, 13, ROAD))
    rgb = np.where((ids == NONE)[..., None], np.uint8(255), PALETTE[ids])
    Image.fromarray(rgb).save(tmp_path / "hard.png")
    found, kind, snapped = read_mask(tmp_path / "hard.png", BOOK)
    assert np.array_equal(found, ids) and (kind, snapped) == ("colours", 0)
    for name, radius, least in (("soft.png", 1.5, 0.99), ("soft.jpg", 0, 0.98)):
        Image.fromarray(rgb).filter(ImageFilter.GaussianBlur(radius)).save(tmp_path / name)
        found = read_mask(tmp_path / name, BOOK)[0]
        assert (found == ids).mean() >= least and np.isin(found, (NONE, 8, 13, ROAD)).mean() >= 0.999


@pytest.mark.parametrize("shade", [255, 250])
def test_white_may_be_a_class(tmp_path, shade):
    """White is the class that is white or nearly so, hard and soft, and black stays unlabelled."""
    book = Colorbook({"road": [128, 64, 128], "line": [shade] * 3})
    ids = np.where(np.hypot(*np.indices((64, 64)) - 32) < 20, 1, np.where(np.indices((64, 64))[0] < 8, NONE, 0))
    rgb = np.array([[128, 64, 128], [255] * 3, *[[0] * 3] * 254], np.uint8)[ids]
    for radius in (0, 1):
        Image.fromarray(rgb).filter(ImageFilter.GaussianBlur(radius)).save(tmp_path / "mask.png")
        found, kind, _ = read_mask(tmp_path / "mask.png", book)
        assert (found == ids).mean() >= (0.98 if radius else 1) and kind == "colours"


BINARY = {"background": [0, 0, 0], "object": [255, 255, 255]}

GREYS = {  # classes; the values in a grey file; the words of the refusal, or none where these are ids
    "black and white are classes": (MERGED, [0, 255], ("colours or ids", "'void'", "'line'")),
    "only black of a black class": (MERGED, [0], ("colours or ids", "'void'")),
    "only white of a white class": (MERGED, [255], ("colours or ids", "'line'")),
    "ids of a colorbook with black and white": (MERGED, [0, 2, 4, 255], ()),
    "greys of classes, far above the ids": (CITYSCAPES, [0, 70, 153], ("colours or ids", "'building'", "'pole'")),
    "a white line on black": ({"line": [255, 255, 255]}, [0, 255], ("colours or ids", "'line'")),
    "greys that are ids too": ({str(k): [k + 1] * 3 for k in range(9)}, [3, 4], ("colours or ids", "'2'", "'3'")),
    "greys that are their own ids": ({str(k): [k] * 3 for k in range(9)}, [0, 3, 4, 255], ()),
    "Cityscapes, all road": (CITYSCAPES, [0], ()),
    "Cityscapes, road and unlabelled": (CITYSCAPES, [0, 255], ()),
    "Cityscapes, all ids": (CITYSCAPES, [*range(19), 255], ()),
    "binary, 0 and 1": (BINARY, [0, 1], ()),
    "binary, only background": (BINARY, [0], ()),
    "binary, 0 and 255": (BINARY, [0, 255], ("colours or ids", "'object'")),
}


@pytest.mark.parametrize("case", GREYS)
@pytest.mark.parametrize("ramp", [False, True])
def test_grey_masks(tmp_path, case, ramp):
    """Grey values are ids; where they may be the colours of other classes, the error names these."""
    classes, values, words = GREYS[case]
    book = Colorbook({name: list(rgb) for name, rgb in classes.items()})
    ids = np.resize(np.array(values, np.uint8), (6, 7))
    if ramp:  # a palette of greys
        save_palette(ids, tmp_path / "mask.png", np.arange(256)[:, None].repeat(3, axis=1))
    else:
        Image.fromarray(ids).save(tmp_path / "mask.png")
    if not words:
        assert np.array_equal(read_mask(tmp_path / "mask.png", book)[0], ids)
        return
    with pytest.raises(ValueError, match=r"mask\.png.*xpected.*RGB") as error:
        read_mask(tmp_path / "mask.png", book)
    assert all(word in str(error.value) for word in words)


# ----------------------------------------------------------------------------------------------- soft edges

SCENES = {"street": (SKY, VEGETATION, BUILDING, CAR, ROAD), "bright": (9, 1, 6, 7, 4),
          "with unlabelled": (NONE, 8, 0, 2, 9), "dark": (CAR, 15, BUILDING, VEGETATION, 12)}


def check_soft(got, hard, snapped, agreement):
    assert (got == hard).mean() >= agreement
    assert set(np.unique(got)) <= set(np.unique(hard))
    assert snapped > 0


@pytest.mark.parametrize("scene, radius", [("street", 1), *[(scene, 3) for scene in SCENES]])
def test_brush_edges(tmp_path, scene, radius):
    """A mask drawn with an ordinary, soft brush is read without rims of classes that nobody painted."""
    hard = drawing(512, SCENES[scene])
    Image.fromarray(PALETTE[hard]).filter(ImageFilter.GaussianBlur(radius)).save(tmp_path / "mask.png")
    ids, _, snapped = read_mask(tmp_path / "mask.png", BOOK)
    check_soft(ids, hard, snapped, .99)


@pytest.mark.parametrize("scene, resample", [("street", Image.Resampling.BOX), ("bright", Image.Resampling.BICUBIC)])
def test_antialiased_drawing(tmp_path, scene, resample):
    """A mask that was drawn large and scaled down, or with smooth lines, is read right."""
    large = drawing(2048, SCENES[scene])
    Image.fromarray(PALETTE[large]).resize((512, 512), resample).save(tmp_path / "mask.png")
    ids, _, snapped = read_mask(tmp_path / "mask.png", BOOK)
    check_soft(ids, large[2::4, 2::4], snapped, .99)


@pytest.mark.parametrize("a, b, between", [
    (ROAD, SKY, "wall"), (SKY, PERSON, "wall"), (POLE, CAR, "wall"), (POLE, NONE, "building"),
    (PERSON, NONE, "bicycle"), (CAR, NONE, "truck"), (TRUCK, MOTORCYCLE, "car"), (MOTORCYCLE, NONE, "car and truck"),
    (ROAD, VEGETATION, "none")])
def test_no_halo_of_a_third_class(tmp_path, a, b, between):
    """A blend of two Cityscapes colours that passes a third one is one of the two."""
    hard = np.where(np.hypot(*np.indices((256, 256)) - 128) < 80, a, b).astype(np.uint8)
    Image.fromarray(PALETTE[hard]).filter(ImageFilter.GaussianBlur(3)).save(tmp_path / "mask.png")
    ids, _, snapped = read_mask(tmp_path / "mask.png", BOOK)
    check_soft(ids, hard, snapped, .99)


@pytest.mark.parametrize("wide", [2, 3])
def test_thin_soft_strokes(tmp_path, wide):
    """A pole of a few soft pixels stays visible, all along its length."""
    large = np.full((256, 256), SKY, np.uint8)
    large[128:] = ROAD
    large[:, 101 : 101 + 4 * wide] = POLE
    Image.fromarray(PALETTE[large]).resize((64, 64), Image.Resampling.BOX).save(tmp_path / "mask.png")
    ids = read_mask(tmp_path / "mask.png", BOOK)[0]
    assert (ids == large[2::4, 2::4]).mean() >= 0.97 and ((ids == POLE).sum(axis=1) >= wide / 2).all()


@pytest.mark.parametrize("wide", [1, 2])
def test_thin_hard_strokes_beside_soft_edges(tmp_path, wide):
    """A pole in exact colour stays as it was painted where other strokes of the mask are soft."""
    hard = drawing(256, (SKY, VEGETATION, BUILDING, CAR, ROAD))
    image = Image.fromarray(PALETTE[hard]).filter(ImageFilter.GaussianBlur(1))
    rgb = np.array(image)
    rgb[10:70, 200 : 200 + wide] = PALETTE[POLE]  # before the sky
    Image.fromarray(rgb).save(tmp_path / "mask.png")
    ids = read_mask(tmp_path / "mask.png", BOOK)[0]
    assert (ids[10:70, 200 : 200 + wide] == POLE).all() and (ids == POLE).sum() == 60 * wide


def test_large_soft_mask(tmp_path, monkeypatch):
    """Colours of a large mask are compared on every third pixel; its ids have the size of the file and are in place."""
    assert masks.MOST_SNAPPED <= 1024**2
    monkeypatch.setattr(masks, "MOST_SNAPPED", 250**2)
    small = drawing(256, SCENES["street"])
    Image.fromarray(PALETTE[small]).resize((701, 702), Image.Resampling.BICUBIC).save(tmp_path / "mask.png")
    sizes, snap = [], masks.snap
    monkeypatch.setattr(masks, "snap", lambda rgb, colors: sizes.append(rgb.shape) or snap(rgb, colors))
    ids = read_mask(tmp_path / "mask.png", BOOK)[0]
    truth = np.array(Image.fromarray(small).resize((701, 702), Image.Resampling.NEAREST))
    assert ids.shape == (702, 701) and sizes == [(234, 234, 3)]
    assert (ids == truth).mean() >= 0.99
    shifted = [
        (np.roll(ids, shift, (0, 1)) == truth)[4:-4, 4:-4].mean() for shift in ((0, 2), (0, -2), (2, 0), (-2, 0))
    ]
    assert max(shifted) < (ids == truth)[4:-4, 4:-4].mean()


def test_large_exact_mask(tmp_path):
    """Every pixel of a large mask in exact colours is read."""
    ids = np.random.default_rng(0).choice(np.array([*range(19), NONE], np.uint8), (1100, 1000))
    Image.fromarray(PALETTE[ids]).save(tmp_path / "mask.png", compress_level=1)
    assert np.array_equal(read_mask(tmp_path / "mask.png", BOOK)[0], ids)


# ------------------------------------------------------------------------------ reduced and compressed masks

STORED = {
    "GIF": ("gif", lambda image, path: image.save(path)),
    "64 colours": ("png", lambda image, path: image.quantize(64).save(path)),
    "JPEG 50": ("jpg", lambda image, path: image.save(path, quality=50)),
    "JPEG 75": ("jpg", lambda image, path: image.save(path, quality=75)),
    "JPEG 90": ("jpg", lambda image, path: image.save(path, quality=90)),
    "WEBP 50": ("webp", lambda image, path: image.save(path, quality=50)),
    "WEBP 90": ("webp", lambda image, path: image.save(path, quality=90)),
}


@pytest.mark.parametrize("form", STORED)
@pytest.mark.parametrize("radius", [0, 2])
def test_stored_with_loss(tmp_path, form, radius):
    """Hard masks, and strokes blurred with a radius of 2 pixels, are read from files that keep colours roughly."""
    suffix, save = STORED[form]
    right, right_at_edges, foreign = [], [], []
    for seed in range(3):
        truth = painting(seed)[1::2, 1::2]
        image = Image.fromarray(PALETTE[truth])
        if radius:
            image = image.filter(ImageFilter.GaussianBlur(radius))
        save(image, tmp_path / f"mask.{suffix}")
        ids = read_mask(tmp_path / f"mask.{suffix}", BOOK)[0]
        right.append((ids == truth).mean())
        right_at_edges.append((ids == truth)[edges(truth)].mean())
        foreign.append(np.isin(ids, truth, invert=True).mean())
    print(f"{form}, radius {radius}: {np.mean(right):.2%}, at edges {np.mean(right_at_edges):.1%}, "
          f"classes not in the mask {np.mean(foreign):.3%}")
    assert np.mean(right) >= 0.993 and np.mean(right_at_edges) >= 0.93 and np.mean(foreign) <= 0.0005


# ------------------------------------------------------------------------------------------- unknown colours


def flat(size, *columns):
    """Ids (size, size): columns of these classes, equally wide."""
    return np.tile(np.repeat(np.array(columns, np.uint8), -(-size // len(columns)))[:size], (size, 1))


SPOTS = {  # the scene, and the rows and columns that are painted in a colour of no class
    "inside a class": (flat(64, ROAD), np.s_[20:30, 20:30]),
    "of 3x3 pixels": (flat(64, ROAD), np.s_[20:23, 20:23]),
    "between two classes": (flat(64, ROAD, CAR), np.s_[27:37, 27:37]),
    "between the nearest class and another": (flat(64, 1, SKY), np.s_[27:37, 27:37]),
    "between a class and unlabelled": (flat(64, 12, NONE), np.s_[27:37, 27:37]),
    "in a corner": (flat(64, ROAD, CAR), np.s_[:10, 54:]),
    "wide stripes": (flat(16, ROAD, SKY, CAR, 1), np.s_[6:10, 6:10]),
    "narrow stripes": (flat(16, *[12, 17] * 4), np.s_[5:9, 5:9]),
    "stripes as wide as a pixel": (flat(16, *[1, NONE, CAR, 9] * 4), np.s_[5:9, 5:9]),
    "a stripe": (flat(16, ROAD, SKY, CAR, 1), np.s_[:, 8:11]),
}


@pytest.mark.parametrize("spot", SPOTS)
def test_unknown_colour(tmp_path, spot):
    """A painted spot of no class is refused with its colour, its pixels, the nearest class and where to look."""
    ids, place = SPOTS[spot]
    rgb = PALETTE[ids]
    rgb[place] = 255, 0, 255
    Image.fromarray(rgb).save(tmp_path / "drawn.png")
    with pytest.raises(ValueError) as error:
        read_mask(tmp_path / "drawn.png", Colorbook(BOOK.classes, "runs/mine/checkpoint.pt"))
    text = str(error.value)
    assert "drawn.png" in text and "(255, 0, 255)" in text and "'sidewalk'" in text  # 43 away, the next one is 114 away
    assert re.search(rf"\b{ids[place].size} pixels", text)
    assert "python masks.py --colorbook runs/mine/checkpoint.pt" in text


@pytest.mark.parametrize("largest", [2**20, 2**16])
def test_unknown_colour_among_soft_edges(tmp_path, monkeypatch, largest):
    """A spot of no class is refused among soft edges, and counted in the whole file, also if a part is compared."""
    monkeypatch.setattr(masks, "MOST_SNAPPED", largest)
    rgb = np.array(Image.fromarray(PALETTE[drawing(512, SCENES["street"])]).filter(ImageFilter.GaussianBlur(0.7)))
    rgb[30:60, 300:330] = 255, 200, 255
    Image.fromarray(rgb).save(tmp_path / "drawn.png")
    with pytest.raises(ValueError, match=r"\(255, 200, 255\) 900 pixels"):
        read_mask(tmp_path / "drawn.png", BOOK)


def test_unknown_colour_in_a_reduced_palette(tmp_path):
    """A spot of no class is refused in a soft mask of 64 colours, too."""
    rgb = np.array(Image.fromarray(PALETTE[drawing(512, SCENES["street"])]).filter(ImageFilter.GaussianBlur(1)))
    rgb[30:70, 300:340] = 255, 200, 255
    Image.fromarray(rgb).quantize(64).save(tmp_path / "drawn.png")
    with pytest.raises(ValueError, match=r"\(25\d, (19\d|20\d), 25\d\) 1\d{3} pixels"):
        read_mask(tmp_path / "drawn.png", BOOK)


@pytest.mark.parametrize("wide", [1, 2])
def test_thin_foreign_line(tmp_path, wide):
    """A line of no class, too thin for an interior, is read as what is beside it."""
    ids = flat(64, ROAD, SKY)
    rgb = PALETTE[ids]
    rgb[10:50, 10 : 10 + wide] = 255, 0, 255
    Image.fromarray(rgb).save(tmp_path / "drawn.png")
    found, _, snapped = read_mask(tmp_path / "drawn.png", BOOK)
    assert np.array_equal(found, ids) and snapped == 40 * wide / 64**2


@pytest.mark.parametrize("rgb, nearest", [((255, 255, 200), "unlabelled"), ((0, 255, 0), "vegetation"),
                                          ((200, 0, 120), "person"), ((30, 30, 30), "unlabelled")])
def test_nearest_class_is_named(tmp_path, rgb, nearest):
    """The class that the message names is the one whose colour is nearest."""
    known = [*CITYSCAPES.items(), ("unlabelled", (0, 0, 0)), ("unlabelled", (255, 255, 255))]
    assert nearest == min(known, key=lambda item: sum((a - b) ** 2 for a, b in zip(item[1], rgb)))[0]
    image = PALETTE[street()]
    image[2:14, 40:60] = rgb
    Image.fromarray(image).save(tmp_path / "drawn.png")
    with pytest.raises(ValueError, match=re.escape(f"{rgb} 240 pixels") + f".*{nearest}"):
        read_mask(tmp_path / "drawn.png", BOOK)


@pytest.mark.parametrize("seed", range(4))
def test_photograph_is_no_mask(tmp_path, seed):
    """Image and mask given in the wrong order are refused: smooth noise at several scales, as a photograph has."""
    rng = np.random.default_rng(seed)
    photo = np.zeros((128, 128, 3))
    for side in (2, 4, 8, 16, 32, 64):
        noise = Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8))
        photo += np.array(noise.resize((128, 128), Image.Resampling.BICUBIC)) / 6
    photo = Image.fromarray(photo.astype(np.uint8))
    for name, image in (("photo.jpg", photo), ("blurred.png", photo.filter(ImageFilter.GaussianBlur(4)))):
        image.save(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}.*in no class"):
            read_mask(tmp_path / name, BOOK)


@pytest.mark.parametrize("write", [lambda ids, path: Image.fromarray(ids).save(path), save_palette],
                         ids=["8-bit ids", "palette"])
def test_unknown_ids(tmp_path, write):
    """Ids of another colorbook are refused with how many pixels have them."""
    ids = street()
    ids[:3, :4], ids[4, :5] = 19, 40
    write(ids, tmp_path / "mask.png")
    with pytest.raises(ValueError) as error:
        read_mask(tmp_path / "mask.png", BOOK)
    text = str(error.value)
    assert "mask.png" in text and "19 (12 pixels)" in text and "40 (5 pixels)" in text and "0..18" in text


# ----------------------------------------------------------------------------------------- one-hot, legend


@pytest.mark.parametrize("K", [1, 7, 19, 255])
def test_one_hot(K):
    """Each plane is 1 where its class is; unlabelled is 0 in every plane."""
    ids = torch.from_numpy(np.random.default_rng(K).choice([*range(K), NONE], (3, 8, 10)).astype(np.uint8))
    ids[0, 0, :3] = torch.tensor([0, K - 1, NONE])
    slow = F.one_hot(torch.where(ids == NONE, K, ids.long()), K + 1)[..., :K].permute(0, 3, 1, 2)
    fast = one_hot(ids, K)
    assert fast.dtype == torch.float32 and torch.equal(fast, slow.float())
    assert fast[0, :, 0, 2].sum() == 0


def run_legend(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["masks.py", *map(str, words)])
    masks.main()


@pytest.mark.parametrize("source", ["colorbook.json", "checkpoint.pt"])
def test_legend_command(tmp_path, monkeypatch, source):
    """The legend shows every colour of a colorbook or a checkpoint, in the order of the ids."""
    colors = dict(list(CITYSCAPES.items())[3:][::-1])
    if source == "checkpoint.pt":
        torch.save({"colorbook": {name: list(rgb) for name, rgb in colors.items()}}, tmp_path / source)
    else:
        (tmp_path / source).write_text(json.dumps(colors))
    run_legend(monkeypatch, "--colorbook", tmp_path / source, "--out", tmp_path / "legend.png")
    pixels = np.array(Image.open(tmp_path / "legend.png").convert("RGB"))
    tops = []
    for rgb in colors.values():
        rows = np.nonzero((pixels[:, :41] == rgb).all(axis=-1))[0]
        assert len(rows) >= 200
        tops.append(rows.min())
    assert tops == sorted(tops)


def test_legend_of_nothing(tmp_path, monkeypatch):
    """A wrong path ends in one line, not in a traceback or in success."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="error:.*nowhere"):
        run_legend(monkeypatch, "--colorbook", "nowhere.json")


def test_ids_saved_as_rgb_are_refused(tmp_path):
    """Class ids in three equal channels, which are nearly black colours, are refused with the remedy."""
    ids = np.arange(7, dtype=np.uint8).repeat(40).reshape(14, 20)
    Image.fromarray(np.stack([ids] * 3, axis=2)).save(tmp_path / "ids.png")
    with pytest.raises(ValueError, match="ids.png: class ids that were saved as RGB; .*grey PNG"):
        read_mask(tmp_path / "ids.png", BOOK)


def test_one_soft_pixel_leaves_a_large_drawing_exact(tmp_path):
    """Above the size that is snapped whole, only pixels that are no colour of a class are looked up in steps."""
    for row in (500, 501):
        drawing = np.full((1200, 1000, 3), PALETTE[SKY], np.uint8)
        drawing[row] = PALETTE[ROAD]
        drawing[3, 3] = (PALETTE[SKY].astype(int) + PALETTE[ROAD]) // 2
        Image.fromarray(drawing).save(tmp_path / "large.png")
        ids, kind, snapped = read_mask(tmp_path / "large.png", BOOK)
        assert (ids[row] == ROAD).all() and (np.delete(ids, [row, 3], axis=0) == SKY).all()
        assert kind == "colours" and snapped == 1 / 1_200_000
