"""Colorbook, masks, sizes, pairs, batches, pictures. Every picture is drawn here and its right answer is known."""

import csv
import itertools
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter

import dataset
import masks
from data.common import parse_size
from dataset import Pairs, augment_pair, batches, contact_sheet, fit, to_uint8, unpack
from masks import Colorbook, one_hot, read_mask, save_mask

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


def save_palette(ids, path, palette=PALETTE, **options):
    image = Image.fromarray(ids)
    image.putpalette(np.ascontiguousarray(palette, np.uint8).tobytes())
    image.save(path, **options)


# ---------------------------------------------------------------------------------------------------- sizes


def coordinates(h, w):
    """Four pictures of uint8 (h, w) that hold y and x of every pixel: y // 256, y % 256, x // 256, x % 256."""
    y, x = np.indices((h, w))
    return [part.astype(np.uint8) for part in (y // 256, y % 256, x // 256, x % 256)]


def test_fit_of_the_thesis():
    """1280x720 would not become the centre 720x720, 128x128 of it, as in the thesis (4.1)."""
    a, b, c, d = (fit(part, (128, 128)).astype(int) for part in coordinates(720, 1280))
    centres = (np.arange(128) + .5) * 720 / 128
    y, x = np.meshgrid(np.floor(centres), np.floor(280 + centres), indexing="ij")
    assert np.array_equal(256 * a + b, y) and np.array_equal(256 * c + d, x)
    slope = np.zeros((720, 1280, 3), np.uint8)  # grows by 1 every 4 pixels from left to right, or 2 from top to bottom
    slope[..., 0], slope[..., 1] = np.clip((np.arange(1280) - 200) // 4, 0, 255), np.arange(720)[:, None] // 4
    small = fit(slope, (128, 128)).astype(float)
    assert np.abs(small[..., 0] - ((280 + centres - .5 - 200) / 4 - .375)).max() <= 1
    assert np.abs(small[..., 1] - ((centres - .5) / 4 - .375)[:, None])[2:-2].max() <= 1


@pytest.mark.parametrize("shape, size, crop, rows, columns", [
    ((4, 8), (4, 8), None, range(4), range(8)),
    ((4, 8), (4, 4), None, range(4), range(2, 6)),
    ((8, 4), (4, 4), None, range(2, 6), range(4)),
    ((4, 8), (2, 2), (2, 2), [1, 2], [3, 4]),
    ((9, 9), (3, 3), None, [1, 4, 7], [1, 4, 7]),
    ((9, 15), (1, 3), None, [4], [2, 7, 12]),
    ((2, 2), (4, 4), None, [0, 0, 1, 1], [0, 0, 1, 1]),
    ((6, 6), (2, 2), (6, 2), [1, 4], [2, 3])])
def test_fit_takes_these_pixels(shape, size, crop, rows, columns):
    """A mask would be shifted against what the documentation says, and so against its image."""
    _, y, _, x = (fit(part, size, crop) for part in coordinates(*shape))
    assert np.array_equal(y, np.tile(np.array(rows)[:, None], len(columns)))
    assert np.array_equal(x, np.tile(columns, (len(rows), 1)))


@pytest.mark.parametrize("size", [(16, 16), (37, 24), (96, 200)])
def test_fit_makes_no_new_ids(size):
    """Ids would be averaged into classes that the mask does not have."""
    ids = np.random.default_rng(0).choice(np.array([0, 7, 18, NONE], np.uint8), (60, 80))
    assert set(np.unique(fit(ids, size))) <= {0, 7, 18, NONE} and fit(ids, size).shape == size


@pytest.mark.parametrize("shape", [(60, 100), (100, 60)])
@pytest.mark.parametrize("size", [(32, 32), (32, 64), (48, 32), (128, 120)])
def test_fit_never_stretches(shape, size):
    """A round thing would become an ellipse, and all the cars too wide."""
    distance = np.hypot(*(np.indices(shape) - np.array(shape)[:, None, None] / 2 + .5))
    for picture in ((distance < 12).astype(np.uint8), np.dstack([(distance < 12).astype(np.uint8) * 255] * 3)):
        disc = fit(picture, size).reshape(*size, -1)[..., 0]
        y, x = np.nonzero(disc > disc.max() / 2)
        assert abs(np.ptp(y) - np.ptp(x)) <= 1 and np.ptp(y) > 4


@pytest.mark.parametrize("crop", [(9, 4), (4, 17)])
def test_crop_too_large(crop):
    """A crop that does not fit would be filled up with something."""
    with pytest.raises(ValueError, match=f"{crop[0]}x{crop[1]}.*8x16"):
        fit(np.zeros((8, 16), np.uint8), (4, 4), crop)


@pytest.mark.parametrize("text", ["128", "0x8", "8x8x8", "axb", "8x-8", ""])
def test_parse_size(text):
    """--size would take nonsense, or height and width in the wrong order."""
    assert parse_size("64x96") == (64, 96)
    with pytest.raises(Exception, match="HEIGHTxWIDTH"):
        parse_size(text)


# ---------------------------------------------------------------------------------------------------- pairs


def write_pairs(root, masks, split="train", image=lambda ids: PALETTE[ids]):
    """A prepared folder, written without the code under test: {stem: ids}; the image shows the class as its colour."""
    for kind in ("images", "masks"):
        (root / split / kind).mkdir(parents=True, exist_ok=True)
    for stem, ids in masks.items():
        Image.fromarray(image(ids)).save(root / split / "images" / f"{stem}.png")
        save_palette(ids, root / split / "masks" / f"{stem}.png")
    (root / "colorbook.json").write_text(json.dumps({name: list(rgb) for name, rgb in CITYSCAPES.items()}))
    return root


@pytest.fixture
def five(tmp_path):
    """Five pairs of 16x24, all different, none of them its own mirror picture."""
    rng = np.random.default_rng(1)
    masks = {f"pair{i}": rng.integers(0, 19, (16, 24)).astype(np.uint8) for i in range(5)}
    return write_pairs(tmp_path / "five", masks)


def check_match(image, ids, margin=3, least=.3):
    """Away from edges every pixel of image (3, H, W) has the colour of its class in ids (H, W)."""
    planes = ids[None].float()
    side = 2 * margin + 1
    inner = (F.max_pool2d(planes, side, 1, margin) == -F.max_pool2d(-planes, side, 1, margin))[0].numpy()
    off = np.abs(image.permute(1, 2, 0).numpy().astype(int) - PALETTE[ids.numpy()]).max(axis=-1)
    assert inner.mean() >= least, "the case is too fine to tell"
    assert off[inner].max() <= 3


def test_planes(five):
    """The planes would not be what the training loop takes, or not what the files hold."""
    planes = Pairs(five, "train", (16, 24)).planes
    stored = np.array(Image.open(five / "train" / "masks" / "pair2.png"))
    assert planes.dtype == torch.uint8 and planes.shape == (5, 4, 16, 24)
    assert np.array_equal(planes[2, 3], stored) and np.array_equal(planes[2, :3].permute(1, 2, 0), PALETTE[stored])


@pytest.mark.parametrize("size", [(64, 64), (32, 64), (96, 48)])
def test_image_and_mask_fit_alike(tmp_path, size):
    """Image and mask would be cropped or scaled to different places."""
    planes = Pairs(write_pairs(tmp_path / "data", {"a": street(180, 320)}), "train", size).planes[0]
    check_match(planes[:3], planes[3])


def test_memory_and_mapped_file_agree(five, capsys):
    """A data set that is too large for the memory would train on something else, or on files that have changed since."""
    held, mapped = (Pairs(five, "train", (12, 12), memory_gb=gb).planes for gb in (4, 0))
    assert "mapped from" in capsys.readouterr().out and torch.equal(held, mapped)
    assert not list((five / "train").glob("*.partial")) and torch.equal(Pairs(five, "train", (12, 12), 0).planes, held)
    file = five / "train" / "masks" / "pair2.png"
    save_mask(np.full((16, 24), CAR, np.uint8), file, Colorbook.load(five / "colorbook.json"))
    assert (Pairs(five, "train", (12, 12), 0).planes[2, 3] == CAR).all()


def test_kind_of_mask_is_said(tmp_path, capsys):
    """Nobody would notice that masks were taken for colours, or had to be snapped."""
    root = write_pairs(tmp_path / "data", {"a": street(), "b": street(), "c": street()})
    Image.fromarray(PALETTE[street()]).save(root / "train" / "masks" / "c.png")
    Pairs(root, "train", (48, 64))
    assert re.search("2 palette.*1 colours", capsys.readouterr().out)


def test_orphans_are_listed(tmp_path, capsys):
    """A misnamed file would shrink the data set without a word."""
    root = write_pairs(tmp_path / "data", {stem: street() for stem in ("a", "b", "c", "d")})
    (root / "train" / "images" / "b.png").unlink()
    (root / "train" / "masks" / "c.png").unlink()
    (root / "train" / "masks" / "d.png").unlink()
    assert [stem for stem, _, _ in Pairs(root, "train", (8, 8)).files] == ["a"]
    out = capsys.readouterr().out
    assert re.search(r"2 image\(s\) without a mask.*c, d\n", out)
    assert re.search(r"1 mask\(s\) without an image.*b\n", out)


@pytest.mark.parametrize("missing", ["images", "masks"])
def test_missing_folder(tmp_path, missing):
    """The user would not be told which folder is missing, and what makes it."""
    root = write_pairs(tmp_path / "data", {"a": street()})
    (root / "train" / missing / "a.png").unlink()
    (root / "train" / missing).rmdir()
    with pytest.raises(ValueError, match=f"{re.escape(str(root / 'train' / missing))}.*prepare"):
        Pairs(root, "train", (8, 8))


def test_empty_split(tmp_path):
    """Training on nothing would start."""
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "data" / "val"))):
        Pairs(write_pairs(tmp_path / "data", {}, "val"), "val", (8, 8))


@pytest.mark.parametrize("memory_gb", [0, 4])
def test_pair_of_two_sizes(tmp_path, memory_gb):
    """A mask that belongs to another picture would be scaled until it fits."""
    root = write_pairs(tmp_path / "data", {"a": street()})
    save_palette(street(24, 64), root / "train" / "masks" / "a.png")
    with pytest.raises(ValueError, match=r"images.a\.png.*masks.a\.png.*48, 64.*24, 64"):
        Pairs(root, "train", (8, 8), memory_gb=memory_gb)[0]


def test_same_stem_twice(tmp_path):
    """One of two pictures of the same name would be paired by chance."""
    root = write_pairs(tmp_path / "data", {"a": street()})
    Image.fromarray(PALETTE[street()]).save(root / "train" / "images" / "a.jpg")
    with pytest.raises(ValueError, match=r"(a\.jpg.*a\.png|a\.png.*a\.jpg)"):
        Pairs(root, "train", (8, 8))


# --------------------------------------------------------------------------------------------- augmentation

NOTHING = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "vertical_flip": False, "rotate": 0, "crop": 1}
ALL = {"brightness": .5, "contrast": .5, "saturation": .5, "hue": .5, "vertical_flip": True, "rotate": 30, "crop": .5}
GEOMETRIC = {"vertical_flip": True, "rotate": 40, "crop": .5}


def as_pair(ids):
    return torch.from_numpy(PALETTE[ids]).permute(2, 0, 1), torch.from_numpy(ids)


def augmented(image, ids, rng, p, **settings):
    planes = augment_pair(torch.cat([image, ids[None]]), rng, p, **settings)
    return planes[:3], planes[3]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("what", GEOMETRIC)
def test_geometric_augmentation(what, seed):
    """Image and mask would be turned or cut to different places."""
    image, ids = as_pair(street(96, 128))
    image_2, ids_2 = augmented(image, ids, np.random.default_rng(seed), 1.0, **NOTHING | {what: GEOMETRIC[what]})
    assert not torch.equal(ids, ids_2) and ids_2.shape == ids.shape and image_2.shape == image.shape
    assert ids_2.dtype == image_2.dtype == torch.uint8 and set(ids_2.unique().tolist()) <= set(ids.unique().tolist())
    check_match(image_2, ids_2)


@pytest.mark.parametrize("what", ["rotate", "crop"])
def test_augmentation_keeps_edges_in_place(what):
    """The edges of the mask would be shifted by a part of a pixel against those of the image."""
    image, ids = as_pair(np.tile(np.repeat(np.array([ROAD, 7] * 4, np.uint8), 8), (64, 1)))
    agree = []
    for seed in range(10):
        image_2, ids_2 = augmented(image, ids, np.random.default_rng(seed), 1.0, **NOTHING | {what: GEOMETRIC[what]})
        half = (int(PALETTE[7][1]) + int(PALETTE[ROAD][1])) / 2  # green: where the image is half road and half sign
        agree.append(((image_2[1] > half) == (ids_2 == 7))[ids_2 != NONE].float().mean())
    assert np.mean(agree) >= .99


def test_vertical_flip():
    """Upside down would be something else."""
    image, ids = as_pair(street())
    image_2, ids_2 = augmented(image, ids, np.random.default_rng(0), 1.0, **NOTHING | {"vertical_flip": True})
    assert np.array_equal(ids_2, ids.numpy()[::-1]) and np.array_equal(image_2, image.numpy()[:, ::-1])


class Extreme:
    """A random generator that always says yes, and draws the upper end."""

    random = staticmethod(lambda: 0.0)
    uniform = staticmethod(lambda low, high: high)


def test_quarter_turn():
    """A rotation would turn image and mask by another angle than the one that was drawn."""
    image, ids = as_pair(np.random.default_rng(0).integers(0, 19, (32, 32)).astype(np.uint8))
    image_2, ids_2 = augmented(image, ids, Extreme(), 1.0, **NOTHING | {"rotate": 90})
    assert np.array_equal(ids_2, np.rot90(ids)) and np.array_equal(image_2, np.rot90(image, axes=(1, 2)))


def test_corners_of_a_rotation_are_unlabelled():
    """The corners that a rotation leaves empty would be taught as a class."""
    image, ids = as_pair(np.full((64, 64), VEGETATION, np.uint8))
    image, ids = augmented(image, ids, Extreme(), 1.0, **NOTHING | {"rotate": 45})
    assert set(ids.unique().tolist()) == {VEGETATION, NONE} and ids[32, 32] == VEGETATION
    for y, x in itertools.product((0, -1), (0, -1)):
        assert ids[y, x] == NONE and not image[:, y, x].any()
    assert (ids == NONE).float().mean() == pytest.approx(3 - 2 * 2**.5, abs=.01)  # what an octagon leaves of a square


@pytest.mark.parametrize("what", ["brightness", "contrast", "saturation", "hue"])
def test_photometric_augmentation(what):
    """A change of light would not change the image, or would change the mask."""
    image, ids = as_pair(street())
    for seed in range(3):
        image_2, ids_2 = augmented(image, ids, np.random.default_rng(seed), 1.0, **NOTHING | {what: ALL[what]})
        assert torch.equal(ids, ids_2) and not torch.equal(image, image_2)
        assert image_2.dtype == torch.uint8 and image_2.shape == image.shape


def test_no_augmentation_with_p_0(five):
    """p: 0 would not switch it off."""
    image, ids = as_pair(street())
    for seed in range(20):
        assert all(map(torch.equal, augmented(image, ids, np.random.default_rng(seed), 0.0, **ALL), (image, ids)))
    pairs = Pairs(five, "train", (16, 24))
    assert same_batches(some(3, pairs, 3, seed=0, augment={"p": 0, **ALL}), some(3, pairs, 3, seed=0))


# -------------------------------------------------------------------------------------------------- batches


BOTH = {"flip": .5, "augment": {"p": .5, **ALL}}


def same_batches(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def some(n, *args, **options):
    return list(itertools.islice(batches(*args, **options), n))


@pytest.fixture
def numbered(tmp_path):
    """Seven pairs; the mask of pair i is class i everywhere."""
    masks = {f"{i}": np.full((8, 8), i, np.uint8) for i in range(7)}
    return Pairs(write_pairs(tmp_path / "numbered", masks), "train", (8, 8))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 20])
def test_every_pair_once_per_epoch(numbered, batch_size):
    """Some pairs would be seen more often than others; a batch larger than the data set would not work."""
    drawn = some(-(-70 // batch_size), numbered, batch_size, seed=3)
    assert all(planes.shape == (batch_size, 4, 8, 8) and planes.dtype == torch.uint8 for planes in drawn)
    assert all(np.array_equal(planes[:, :3].permute(0, 2, 3, 1), PALETTE[planes[:, 3]]) for planes in drawn)
    order = torch.cat([planes[:, 3, 0, 0] for planes in drawn])[:70].reshape(10, 7)
    assert torch.equal(order.sort(dim=1).values, torch.arange(7, dtype=torch.uint8).expand(10, 7))
    assert len({tuple(epoch) for epoch in order.tolist()}) >= 9  # 5040 orders: two equal ones of ten are already rare


def test_seed_decides(five):
    """Two runs with different seeds would see the same, or two with the same seed something different."""
    pairs = Pairs(five, "train", (16, 24))
    first = some(4, pairs, 3, seed=0, **BOTH)
    assert same_batches(first, some(4, pairs, 3, seed=0, **BOTH)) and not same_batches(first, some(4, pairs, 3, seed=1, **BOTH))


@pytest.mark.parametrize("step", [1, 2, 5, 7])
def test_resumed_order(five, step):
    """A resumed run would not go on with the pairs, flips and augmentation of the run that was stopped."""
    pairs = Pairs(five, "train", (16, 24))
    assert same_batches(some(step + 3, pairs, 3, seed=5, **BOTH)[step:], some(3, pairs, 3, seed=5, step=step, **BOTH))


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_share_a_batch(five, ranks):
    """Processes would train on the same pairs, or on others than one process would."""
    pairs = Pairs(five, "train", (16, 24))
    parts = [some(4, pairs, 8, seed=1, step=2, rank=rank, ranks=ranks, **BOTH) for rank in range(ranks)]
    assert all(part.shape[0] == 8 // ranks for rank in parts for part in rank)
    assert same_batches(map(torch.cat, zip(*parts)), some(4, pairs, 8, seed=1, step=2, **BOTH))


@pytest.mark.parametrize("flip, low, high", [(0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)])
def test_flip(five, flip, low, high):
    """Image and mask would be mirrored apart, or not as often as was set: 70..130 of 200 is 4 standard deviations."""
    pairs = Pairs(five, "train", (16, 24))
    plain, flipped = torch.cat(some(40, pairs, 5, seed=0)), torch.cat(some(40, pairs, 5, seed=0, flip=flip))
    mirrored = [not torch.equal(a, b) for a, b in zip(plain, flipped)]
    assert low <= sum(mirrored) <= high
    assert all(torch.equal(b, a.flip(-1) if m else a) for a, b, m in zip(plain, flipped, mirrored))


def test_epochs_flip_anew(five):
    """A pair would be mirrored in every epoch or in none, which is no augmentation."""
    seen = {pair.numpy().tobytes() for batch in some(20, Pairs(five, "train", (16, 24)), 5, seed=0, flip=.5) for pair in batch}
    assert len(seen) == 10  # each of the five, and each of their mirror pictures


def test_global_random_state_is_untouched(five):
    """The noise of the training would depend on how the data are loaded."""
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    some(3, Pairs(five, "train", (16, 24)), 3, seed=0, **BOTH)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_uint8_round_trip():
    """Pictures would get darker, or change by rounding, on their way to the device and back."""
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    x, mask = unpack(torch.cat([values, torch.full((1, 1, 16, 16), 2, dtype=torch.uint8)], dim=1), 5)
    assert (x.min(), x.max(), x.dtype) == (-1, 1, torch.float32) and mask.shape == (1, 5, 16, 16) and mask[:, 2].all()
    assert to_uint8(x).dtype == np.uint8 and np.array_equal(to_uint8(x), values.permute(0, 2, 3, 1))
    assert to_uint8(torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2).expand(1, 3, 1, 2))[0, 0, :, 0].tolist() == [0, 255]


# ------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("h, w, enlarged", [(16, 16, 8), (16, 24, 8), (64, 96, 2), (150, 130, 1), (100, 300, 2)])
@pytest.mark.parametrize("titles", [(), ("mask", "one", "two")])
def test_contact_sheet(h, w, enlarged, titles):
    """Previews would be cut, smoothed, laid over one another, or too small to see."""
    rows = [[np.full((h, w, 3), PALETTE[3 * r + c]) for c in range(3)] for r in range(2)]
    sheet = np.array(contact_sheet(rows, titles, least=128))
    assert sheet.shape[0] >= 2 * h * enlarged and sheet.shape[1] >= 3 * w * enlarged
    assert sheet.shape[0] <= 2 * h * enlarged + 40 and sheet.shape[1] <= 3 * w * enlarged + 20
    corners = []
    for k in range(6):  # row by row, from left to right
        y, x = np.nonzero((sheet == PALETTE[k]).all(axis=-1))
        assert len(y) == h * w * enlarged**2 and (np.ptp(y) + 1, np.ptp(x) + 1) == (h * enlarged, w * enlarged)
        corners.append((y.min(), x.min()))
    assert corners == sorted(corners) and len({y for y, _ in corners}) == 2 and len({x for _, x in corners}) == 3


def command(monkeypatch, name, *words):
    monkeypatch.setattr(sys, "argv", ["x.py", *([name] if name == "count" else []), *map(str, words)])
    (dataset if name == "count" else masks).main()


def test_count_command(tmp_path, monkeypatch, capsys):
    """The table of pixels per class would be wrong."""
    a, b = np.full((4, 5), ROAD, np.uint8), np.full((6, 10), NONE, np.uint8)
    a[0], b[:2] = CAR, ROAD  # a: 15 road, 5 car; b: 20 road, 40 unlabelled
    root = write_pairs(tmp_path / "data", {"a": a, "b": b}, "val")
    command(monkeypatch, "count", "--root", root, "--split", "val", "--out", tmp_path / "counts.png")
    with open(tmp_path / "counts.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["id"]), row["class"]) for row in rows] == [*enumerate(CITYSCAPES), (NONE, "unlabelled")]
    found = {row["class"]: (int(row["pixels"]), float(row["share"]), int(row["pictures"])) for row in rows}
    known = {"road": (35, 35 / 80, 2), "car": (5, 5 / 80, 1), "unlabelled": (40, 40 / 80, 1)}
    assert found == {name: known.get(name, (0, 0, 0)) for name in found}
    with Image.open(tmp_path / "counts.png") as image:
        colors = {rgb: n for n, rgb in image.convert("RGB").getcolors(2**24)}
    assert all(colors.get(rgb, 0) >= 200 for rgb in CITYSCAPES.values())
    assert colors[CITYSCAPES["road"]] > 2 * colors[CITYSCAPES["car"]]  # the longer bar
    assert re.search(r"0 road +35 +43\.750%", capsys.readouterr().out)


@pytest.mark.parametrize("words", [["legend", "--colorbook", "nowhere.json"], ["count", "--root", "nowhere"]])
def test_command_errors(tmp_path, monkeypatch, words):
    """A wrong path would end in a traceback, or in success."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="error:.*nowhere"):
        command(monkeypatch, *words)
