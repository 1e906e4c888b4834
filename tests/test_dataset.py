"""Images and pairs: sizes, reading, maps, augmentation, batches, sheets. Every image is drawn here and is known."""

import colorsys
import itertools
import json
import multiprocessing
import os
import random
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import (
    CAR, CITYSCAPES, NONE, PALETTE, ROAD, SKY, VEGETATION, check_match, save_palette, street, write_pairs)

import dataset
from config import load_config
from data.common import parse_size
from dataset import Pairs, augment_pair, batches, contact_sheet, fit, list_files, to_uint8, unpack


# ---------------------------------------------------------------------------------------------------- sizes


def coordinates(h, w):
    """Four images of uint8 (h, w) that hold y and x of every pixel: y // 256, y % 256, x // 256, x % 256."""
    y, x = np.indices((h, w))
    return [part.astype(np.uint8) for part in (y // 256, y % 256, x // 256, x % 256)]


def test_fit_of_the_thesis():
    """1280x720 becomes the centre 720x720, 128x128 of it, as in the thesis (4.1)."""
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
    """A mask takes the pixels at the centres of the result's, counted by hand here."""
    _, y, _, x = (fit(part, size, crop) for part in coordinates(*shape))
    assert np.array_equal(y, np.tile(np.array(rows)[:, None], len(columns)))
    assert np.array_equal(x, np.tile(columns, (len(rows), 1)))


def test_fit_leaves_its_own_size_alone():
    """An image of the size asked for comes back as it is, to the bit."""
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    assert np.array_equal(fit(image, (16, 24)), image) and np.array_equal(fit(image, [16, 24]), image)


@pytest.mark.parametrize("size", [(16, 16), (37, 24), (96, 200)])
def test_fit_makes_no_new_ids(size):
    """Resized masks hold ids that were there before, and no averages of them."""
    ids = np.random.default_rng(0).choice(np.array([0, 7, 18, NONE], np.uint8), (60, 80))
    assert set(np.unique(fit(ids, size))) <= {0, 7, 18, NONE} and fit(ids, size).shape == size


@pytest.mark.parametrize("shape", [(60, 100), (100, 60)])
@pytest.mark.parametrize("size", [(32, 32), (32, 64), (48, 32), (128, 120)])
def test_fit_never_stretches(shape, size):
    """A disc stays a disc, in image and mask, whatever the ratios."""
    distance = np.hypot(*(np.indices(shape) - np.array(shape)[:, None, None] / 2 + .5))
    for array in ((distance < 12).astype(np.uint8), np.dstack([(distance < 12).astype(np.uint8) * 255] * 3)):
        disc = fit(array, size).reshape(*size, -1)[..., 0]
        y, x = np.nonzero(disc > disc.max() / 2)
        assert abs(np.ptp(y) - np.ptp(x)) <= 1 and np.ptp(y) > 4


@pytest.mark.parametrize("crop", [(9, 4), (4, 17)])
def test_crop_too_large(crop):
    """A crop that does not fit is refused with both sizes."""
    with pytest.raises(ValueError, match=f"{crop[0]}x{crop[1]}.*8x16"):
        fit(np.zeros((8, 16), np.uint8), (4, 4), crop)


@pytest.mark.parametrize("text", ["128", "0x8", "8x8x8", "axb", "8x-8", "", "²x8"])
def test_parse_size(text):
    """HEIGHTxWIDTH is read in that order, and everything else is refused."""
    assert parse_size("64x96") == (64, 96)
    with pytest.raises(Exception, match="HEIGHTxWIDTH"):
        parse_size(text)


# ---------------------------------------------------------------------------------------------------- pairs


@pytest.fixture
def five(tmp_path):
    """Five pairs of 16x24, all different, none of them its own mirror image."""
    rng = np.random.default_rng(1)
    masks = {f"pair{i}": rng.integers(0, 19, (16, 24)).astype(np.uint8) for i in range(5)}
    return write_pairs(tmp_path / "five", masks)


def test_planes(five):
    """The planes are the pixels of the files, in the order of the stems: red, green, blue, class id."""
    planes = Pairs(five, "train", (16, 24)).planes
    assert planes.dtype == torch.uint8 and planes.shape == (5, 4, 16, 24)
    for i in range(5):
        stored = np.array(Image.open(five / "train" / "masks" / f"pair{i}.png"))
        assert np.array_equal(planes[i, 3], stored) and np.array_equal(planes[i, :3].permute(1, 2, 0), PALETTE[stored])


@pytest.mark.parametrize("size", [(64, 64), (32, 64), (96, 48)])
def test_image_and_mask_fit_alike(tmp_path, size):
    """Image and mask are cropped and scaled to the same place."""
    planes = Pairs(write_pairs(tmp_path / "data", {"a": street(180, 320)}), "train", size).planes[0]
    check_match(planes[:3], planes[3])


def test_kind_of_mask_is_printed(tmp_path, capsys):
    """How many masks were palettes, and how many colours, is printed."""
    root = write_pairs(tmp_path / "data", {"a": street(), "b": street(), "c": street()})
    Image.fromarray(PALETTE[street()]).save(root / "train" / "masks" / "c.png")
    Pairs(root, "train", (48, 64))
    assert re.search("3 pairs: 2 palette, 1 colours\n", capsys.readouterr().out)


@pytest.mark.parametrize("memory_gb", [0, 4])
def test_large_crops_and_enlargement_are_printed(tmp_path, capsys, memory_gb):
    """Images of which the crop cuts more than a tenth are counted, and small ones as enlarged."""
    shapes = {"kept": (40, 60), "tall": (80, 60), "wide": (40, 120), "tenth": (44, 60), "small": (20, 30)}
    root = write_pairs(tmp_path / "data", {stem: street(*shape) for stem, shape in shapes.items()})
    Pairs(root, "train", (32, 48), memory_gb)  # 44x60 loses 9.1 %, 80x60 and 40x120 a half
    out = capsys.readouterr().out
    assert "5 pairs: 5 palette, 1 enlarged (prepare the data with a larger --size), 2 that lose more " in out
    assert "2 that lose more than a tenth to the crop to 32x48\n" in out
    Pairs(root, "train", (16, 16), memory_gb)  # 20 of 60 columns, 20 of 80 rows, 80 of 120, 16 of 60, 10 of 30
    assert "5 that lose more than a tenth to the crop to 16x16" in capsys.readouterr().out


def test_orphans_are_listed(tmp_path, capsys):
    """Images and masks without a partner are left out, counted and named."""
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
    """A split without images or masks is refused, with what makes them."""
    root = write_pairs(tmp_path / "data", {"a": street()})
    (root / "train" / missing / "a.png").unlink()
    (root / "train" / missing).rmdir()
    words = f"train: no pairs;.*{missing}/NAME.*python -m data.*data.root"
    with pytest.raises(ValueError, match=f"{re.escape(str(root))}.{words}"):
        Pairs(root, "train", (8, 8))


def test_missing_split(tmp_path):
    """A missing val is refused with the splits that exist and the setting that chooses one."""
    root = write_pairs(write_pairs(tmp_path / "data", {"a": street()}), {"b": street()}, "test")
    (root / "extra" / "images").mkdir(parents=True)  # no masks: not a split
    with pytest.raises(ValueError, match="val: no pairs; expected images/.*: test, train.*data.val"):
        Pairs(root, "val", (8, 8))
    with pytest.raises(ValueError, match="nowhere.val: no pairs; expected .*nowhere: none.*python -m data"):
        Pairs(tmp_path / "nowhere", "val", (8, 8))


@pytest.mark.parametrize("place", ["", "train", "train/images"])
def test_a_file_as_folder(tmp_path, place):
    """A file where a folder belongs is refused with its name, not with an error of the system."""
    root = write_pairs(tmp_path / "data", {"a": street()})
    (root / place).rename(tmp_path / "away")
    (root / place).write_bytes(b"PK")
    with pytest.raises(ValueError, match=f"{re.escape(str(root / 'train'))}: no pairs; expected images"):
        Pairs(root, "train", (8, 8))
    with pytest.raises(ValueError, match=f"{re.escape(str(root / place))}: a file, expected a folder"):
        list_files(root / place)


def test_empty_split(tmp_path):
    """A split without a pair is refused."""
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "data" / "val"))):
        Pairs(write_pairs(tmp_path / "data", {}, "val"), "val", (8, 8))


@pytest.mark.parametrize("memory_gb", [0, 4])
def test_pair_of_two_sizes(tmp_path, memory_gb):
    """An image and a mask of different sizes are refused, with both files and sizes."""
    root = write_pairs(tmp_path / "data", {"a": street()})
    save_palette(street(24, 64), root / "train" / "masks" / "a.png")
    with pytest.raises(ValueError, match=r"images.a\.png.*masks.a\.png.*48, 64.*24, 64"):
        Pairs(root, "train", (8, 8), memory_gb=memory_gb)


def test_same_stem_twice(tmp_path):
    """Two images of one stem are refused with both names."""
    root = write_pairs(tmp_path / "data", {"a": street()})
    Image.fromarray(PALETTE[street()]).save(root / "train" / "images" / "a.jpg")
    with pytest.raises(ValueError, match=r"(a\.jpg.*a\.png|a\.png.*a\.jpg)"):
        Pairs(root, "train", (8, 8))


# ----------------------------------------------------------------------------------------------- mapped from a file


def maps(root):
    return sorted(path.name for path in (root / "train").iterdir() if path.is_file())


def test_memory_and_mapped_file_agree(five, capsys):
    """Mapped planes are those in memory; the file is written once, read again, and another size has its own."""
    held = Pairs(five, "train", (12, 16)).planes
    assert maps(five) == [] and torch.equal(Pairs(five, "train", (12, 16), memory_gb=0).planes, held)
    assert "pairs: 5 palette" in capsys.readouterr().out and len(maps(five)) == 1
    assert torch.equal(Pairs(five, "train", (12, 16), memory_gb=0).planes, held)
    assert re.fullmatch(r".*: 5 pairs, 0\.0 GiB mapped from \.planes_12x16_\w+\n", capsys.readouterr().out)
    Pairs(five, "train", (16, 12), memory_gb=0)
    assert len(maps(five)) == 2


@pytest.mark.parametrize("size, limit, mapped", [((16, 16), 5121, False), ((16, 16), 5119, True)])
def test_memory_gb(five, size, limit, mapped):
    """memory_gb is the limit in GiB up to which 4 bytes a pixel are held in memory."""
    Pairs(five, "train", size, memory_gb=limit / 2**30)
    assert len(maps(five)) == mapped


def repaint(root, stem, value):
    """Give the mask of a pair another class, in as many bytes as before (BMP), a second later."""
    path = root / "train" / "masks" / f"{stem}.bmp"
    before = path.stat()
    Image.fromarray(np.full((16, 24), value, np.uint8)).save(path)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


def test_a_map_is_never_stale(five):
    """Files changed in place, added, or read as other classes are read again, also where names and sizes stay equal."""
    for path in (five / "train" / "masks").iterdir():
        Image.fromarray(np.array(Image.open(path))).save(path.with_suffix(".bmp"))
        path.unlink()
    Pairs(five, "train", (12, 12), 0)
    repaint(five, "pair2", CAR)
    assert (Pairs(five, "train", (12, 12), 0).planes[2, 3] == CAR).all()
    Image.fromarray(PALETTE[np.full((16, 24), SKY, np.uint8)]).save(five / "train" / "images" / "pair2.png")
    assert (Pairs(five, "train", (12, 12), 0).planes[2, :3].permute(1, 2, 0) == torch.from_numpy(PALETTE[SKY])).all()
    write_pairs(five, {"pair9": np.full((16, 24), ROAD, np.uint8)})
    assert (Pairs(five, "train", (12, 12), 0).planes[5, 3] == ROAD).all()


def test_a_map_follows_the_colorbook(tmp_path):
    """With another order of the classes, masks in colours are read anew."""
    root = write_pairs(tmp_path / "data", {"a": street()})
    Image.fromarray(PALETTE[street()]).save(root / "train" / "masks" / "a.png")
    before = Pairs(root, "train", (48, 64), memory_gb=0).planes[0, 3]
    names = [*CITYSCAPES][::-1]
    (root / "colorbook.json").write_text(json.dumps({name: list(CITYSCAPES[name]) for name in names}))
    after = Pairs(root, "train", (48, 64), memory_gb=0).planes[0, 3]
    assert torch.equal(after, torch.where(before == NONE, before, 18 - before))


def test_two_processes_make_one_map(five, monkeypatch):
    """Two processes that map the same pairs, one in the middle of the other, both get the right planes."""
    held, read, calls = Pairs(five, "train", (12, 12)).planes, dataset.read_image, []

    def read_and_meet(path):
        calls.append(path)
        if len(calls) == 3:  # the other process ends first
            assert torch.equal(Pairs(five, "train", (12, 12), memory_gb=0).planes, held)
        return read(path)

    monkeypatch.setattr(dataset, "read_image", read_and_meet)
    assert torch.equal(Pairs(five, "train", (12, 12), memory_gb=0).planes, held)
    assert len(calls) == 10 and len(maps(five)) == 1


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_killed_map_is_made_anew(five, monkeypatch):
    """After a kill in the middle of writing the map, the next training writes it anew."""
    def read_and_die(path):
        return os._exit(9) if "pair3" in path.name else read(path)

    read = dataset.read_image
    monkeypatch.setattr(dataset, "read_image", read_and_die)
    killed = multiprocessing.get_context("fork").Process(target=Pairs, args=(five, "train", (12, 12), 0))
    killed.start()
    killed.join()
    monkeypatch.undo()
    assert killed.exitcode == 9 and not any(re.fullmatch(r"\.planes_12x12_\w{12}", name) for name in maps(five))
    assert torch.equal(Pairs(five, "train", (12, 12), 0).planes, Pairs(five, "train", (12, 12)).planes)


def write_under_a_limit(root):
    """Map the pairs where no file may grow above 600 bytes, as on a full disk; exit code 3 if the message is right."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        Pairs(root, "train", (12, 12), memory_gb=0)
    except OSError as error:
        words = (str(root / "train" / ".planes_12x12_"), "cannot be written", "File too large", "GiB", "data.memory_gb")
        os._exit(3 if all(word in str(error) for word in words) else 4)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_map_on_a_full_disk(five):
    """A full disk ends in a message that names the file and the setting, and leaves nothing."""
    child = multiprocessing.get_context("fork").Process(target=write_under_a_limit, args=(five,))
    child.start()
    child.join()
    assert child.exitcode == 3 and maps(five) == []


def test_map_in_a_read_only_folder(five, monkeypatch):
    """Where the folder may only be read, the message names the file and the setting."""
    def refuse(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(dataset, "read_mask", lambda path, book: (np.zeros((16, 24), np.uint8), "palette", 0))
    with pytest.raises(OSError, match=r"\.planes_12x12.*Permission denied.*data\.memory_gb"):
        Pairs(five, "train", (12, 12), memory_gb=0)


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
    """Image and mask are turned and cut to the same place, without new ids."""
    image, ids = as_pair(street(96, 128))
    image_2, ids_2 = augmented(image, ids, np.random.default_rng(seed), 1.0, **NOTHING | {what: GEOMETRIC[what]})
    assert not torch.equal(ids, ids_2) and ids_2.shape == ids.shape and image_2.shape == image.shape
    assert ids_2.dtype == image_2.dtype == torch.uint8 and set(ids_2.unique().tolist()) <= set(ids.unique().tolist())
    check_match(image_2, ids_2)


@pytest.mark.parametrize("what", ["rotate", "crop"])
def test_augmentation_keeps_edges_in_place(what):
    """The edges of the mask stay on those of the image, to a part of a pixel."""
    image, ids = as_pair(np.tile(np.repeat(np.array([ROAD, 7] * 4, np.uint8), 8), (64, 1)))
    agree = []
    for seed in range(10):
        image_2, ids_2 = augmented(image, ids, np.random.default_rng(seed), 1.0, **NOTHING | {what: GEOMETRIC[what]})
        half = (int(PALETTE[7][1]) + int(PALETTE[ROAD][1])) / 2  # green: where the image is half road and half sign
        agree.append(((image_2[1] > half) == (ids_2 == 7))[ids_2 != NONE].float().mean())
    assert np.mean(agree) >= .99


def test_vertical_flip():
    """A vertical flip turns the rows of image and mask around."""
    image, ids = as_pair(street())
    image_2, ids_2 = augmented(image, ids, np.random.default_rng(0), 1.0, **NOTHING | {"vertical_flip": True})
    assert np.array_equal(ids_2, ids.numpy()[::-1]) and np.array_equal(image_2, image.numpy()[:, ::-1])


class Draws:
    """A random generator that always says yes, and draws the value at `share` of every range."""

    def __init__(self, share):
        self.share = share

    def random(self):
        return 0.0

    def uniform(self, low, high):
        return low + self.share * (high - low)


def test_quarter_turn():
    """A rotation by 90 degrees is numpy's quarter turn, of image and mask."""
    image, ids = as_pair(np.random.default_rng(0).integers(0, 19, (32, 32)).astype(np.uint8))
    for share, turns in ((1, 1), (0, -1)):
        image_2, ids_2 = augmented(image, ids, Draws(share), 1.0, **NOTHING | {"rotate": 90})
        assert np.array_equal(ids_2, np.rot90(ids, turns)) and np.array_equal(image_2, np.rot90(image, turns, (1, 2)))


def test_corners_of_a_rotation_are_unlabelled():
    """The corners that a rotation leaves empty are black and unlabelled."""
    image, ids = as_pair(np.full((64, 64), VEGETATION, np.uint8))
    image, ids = augmented(image, ids, Draws(1), 1.0, **NOTHING | {"rotate": 45})
    assert set(ids.unique().tolist()) == {VEGETATION, NONE} and ids[32, 32] == VEGETATION
    for y, x in itertools.product((0, -1), (0, -1)):
        assert ids[y, x] == NONE and not image[:, y, x].any()
    assert (ids == NONE).float().mean() == pytest.approx(3 - 2 * 2**.5, abs=.01)  # what an octagon leaves of a square


def brightness(rgb, factor):
    return rgb * factor


def contrast(rgb, factor):
    mean = (rgb @ [.299, .587, .114]).mean()
    return mean + (rgb - mean) * factor


def saturation(rgb, factor):
    grey = (rgb @ [.299, .587, .114])[..., None]
    return grey + (rgb - grey) * factor


def hue(rgb, turn):
    hsv = [colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in rgb.reshape(-1, 3)]
    return np.array([colorsys.hsv_to_rgb((h + turn) % 1, s, v) for h, s, v in hsv]).reshape(rgb.shape) * 255


@pytest.mark.parametrize("share", [0, .2, .5, 1])
@pytest.mark.parametrize("formula, strength, low, high", [
    (brightness, .4, .6, 1.4), (contrast, .7, .3, 1.7), (saturation, 1, 0, 2), (hue, .3, -.3, .3)])
def test_photometric_augmentation(formula, strength, low, high, share):
    """Each change of light is its textbook formula with a factor from the whole range, and leaves the mask alone."""
    rgb = np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    image, ids = torch.from_numpy(rgb).permute(2, 0, 1), torch.zeros(12, 16, dtype=torch.uint8)
    image_2, ids_2 = augmented(image, ids, Draws(share), 1.0, **NOTHING | {formula.__name__: strength})
    expected = formula(rgb.astype(float), low + share * (high - low)).clip(0, 255)
    assert image_2.dtype == torch.uint8 and torch.equal(ids, ids_2)
    assert np.abs(image_2.permute(1, 2, 0).numpy() - expected).max() <= 3


@pytest.mark.parametrize("what", ["brightness", "contrast", "saturation"])
def test_light_goes_both_ways(what):
    """Over many draws an image gets darker as often as brighter, and likewise for contrast and saturation."""
    rgb = np.zeros((2, 2, 3), np.uint8) + np.uint8([[[120, 90, 70], [60, 90, 100]]])
    image, ids = torch.from_numpy(rgb).permute(2, 0, 1), torch.zeros(2, 2, dtype=torch.uint8)
    amount = {"brightness": lambda x: x.mean(), "contrast": lambda x: np.ptp(x.mean(axis=0)),
              "saturation": lambda x: np.ptp(x, axis=0).mean()}[what]
    draws = []
    for i in range(200):
        image_2, _ = augmented(image, ids, np.random.default_rng(i), 1.0, **NOTHING | {what: .5})
        draws.append(amount(image_2.numpy().astype(float)) / amount(image.numpy().astype(float)))
    assert 70 <= sum(draw > 1 for draw in draws) <= 130 and .45 <= min(draws) < .6 and 1.4 < max(draws) <= 1.55


def test_windows_lie_everywhere():
    """Cut windows have every size down to `crop` and lie at all places, in height and width by themselves."""
    y, x = (torch.from_numpy(part) for part in np.indices((40, 40)).astype(np.uint8))
    corners = []
    for seed in range(200):
        options = NOTHING | {"crop": .5}
        planes = torch.stack([y, y, y, y]), torch.stack([x, x, x, x])
        y_2, x_2 = (augment_pair(p, np.random.default_rng(seed), 1.0, **options)[3].int().numpy() for p in planes)
        corners.append([y_2[0, 0], 39 - y_2[-1, -1], x_2[0, 0], 39 - x_2[-1, -1]])
    top, bottom, left, right = np.array(corners).T
    for before, after in ((top, bottom), (left, right)):
        assert before.min() == 0 == after.min() and before.max() > 14 < after.max()
        assert (before + after).max() <= 20 and (before + after).min() <= 1  # the window is 20 to 40 pixels wide
        assert abs((before - after).mean()) < 2
    assert abs(np.corrcoef(top, left)[0, 1]) < .25


def test_probability_of_augmentation(five):
    """Each augmentation comes with probability p (60..120 of 300 is 4 standard deviations), never with p = 0."""
    image, ids = as_pair(street())
    options, flips = NOTHING | {"vertical_flip": True}, 0
    for seed in range(300):
        flips += not torch.equal(ids, augmented(image, ids, np.random.default_rng(seed), .3, **options)[1])
    assert 60 <= flips <= 120
    for seed in range(20):
        assert all(map(torch.equal, augmented(image, ids, np.random.default_rng(seed), 0.0, **ALL), (image, ids)))
    pairs = Pairs(five, "train", (16, 24))
    assert same_batches(some(3, pairs, 3, seed=0, augment={"p": 0, **ALL}), some(3, pairs, 3, seed=0))


@pytest.mark.parametrize("setting", [
    "flip=-0.1", "flip=1.1", "augment.p=2", "augment.brightness=1.5", "augment.contrast=-0.5",
    "augment.saturation=1.01", "augment.hue=0.6", "augment.rotate=181",
    "augment.crop=0", "augment.crop=1.5", "augment.hue=.nan"])
def test_settings_out_of_range(setting):
    """A setting of the augmentation out of its range is refused by name when the config is read."""
    with pytest.raises(ValueError, match=f"data.{setting.split('=')[0]}.*expected a number from"):
        load_config("config.yaml", None, [f"data.{setting}"])


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


def order_of(drawn):
    """Which pairs of `numbered` the batches hold."""
    return torch.cat([planes[:, 3, 0, 0] for planes in drawn]).tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 7, 20])
def test_every_pair_once_per_epoch(numbered, batch_size):
    """Every epoch holds every pair once, in a new order, also where a batch is larger than the data set."""
    drawn = some(-(-70 // batch_size), numbered, batch_size, seed=3)
    assert all(planes.shape == (batch_size, 4, 8, 8) and planes.dtype == torch.uint8 for planes in drawn)
    assert all(np.array_equal(planes[:, :3].permute(0, 2, 3, 1), PALETTE[planes[:, 3]]) for planes in drawn)
    order = np.reshape(order_of(drawn)[:70], (10, 7))
    assert np.array_equal(np.sort(order), np.tile(np.arange(7), (10, 1)))
    assert len({tuple(epoch) for epoch in order.tolist()}) >= 9  # 5040 orders: two equal ones of ten are already rare


def test_seed_decides(five):
    """The same seed gives the same batches, another seed gives others."""
    pairs = Pairs(five, "train", (16, 24))
    first, again, other = (some(4, pairs, 3, seed=seed, **BOTH) for seed in (0, 0, 1))
    assert same_batches(first, again) and not same_batches(first, other)


def test_no_two_random_streams_are_equal(five, monkeypatch):
    """Order, flips and augmentation draw from generators of different seeds, at whatever epochs and steps."""
    make, seeds = np.random.default_rng, []

    def spy(seed):
        seeds.append(tuple(seed))
        return make(seed)

    monkeypatch.setattr(np.random, "default_rng", spy)
    some(10, Pairs(five, "train", (8, 8)), 5, seed=3, **BOTH)
    batch = [seed for seed in seeds if seed.count(3) and len(seed) == 3]
    assert len(batch) == len(seeds) and len({seed[0] for seed in seeds}) == 3 and len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("step", [1, 2, 5, 7])
def test_resumed_order(five, step):
    """A resumed run goes on with the pairs, flips and augmentation of the run that was stopped."""
    pairs = Pairs(five, "train", (16, 24))
    resumed = some(3, pairs, 3, seed=5, start=3 * step, **BOTH)
    assert same_batches(some(step + 3, pairs, 3, seed=5, **BOTH)[step:], resumed)


def test_another_batch_size_goes_on(numbered):
    """With another batch size a resumed run neither repeats an image nor leaves one out."""
    whole = order_of(some(42, numbered, 1, seed=5))
    assert order_of(some(6, numbered, 7, seed=5)) == whole
    assert order_of([*some(3, numbered, 4, seed=5), *some(6, numbered, 5, seed=5, start=12)]) == whole


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_share_a_batch(five, ranks):
    """The parts of the processes, together, are the batch of one process."""
    pairs = Pairs(five, "train", (16, 24))
    parts = [some(4, pairs, 8, seed=1, start=16, rank=rank, ranks=ranks, **BOTH) for rank in range(ranks)]
    assert all(part.shape[0] == 8 // ranks for rank in parts for part in rank)
    assert same_batches(map(torch.cat, zip(*parts)), some(4, pairs, 8, seed=1, start=16, **BOTH))


@pytest.mark.parametrize("flip, low, high", [(0.0, 0, 0), (0.2, 17, 63), (1.0, 200, 200)])
def test_flip(five, flip, low, high):
    """Image and mask are mirrored together, as often as was set: 17..63 of 200 is 4 standard deviations."""
    pairs = Pairs(five, "train", (16, 24))
    plain, flipped = torch.cat(some(40, pairs, 5, seed=0)), torch.cat(some(40, pairs, 5, seed=0, flip=flip))
    mirrored = [not torch.equal(a, b) for a, b in zip(plain, flipped)]
    assert low <= sum(mirrored) <= high
    assert all(torch.equal(b, a.flip(-1) if m else a) for a, b, m in zip(plain, flipped, mirrored))


def test_each_step_flips_anew(five):
    """The places in a batch that are mirrored differ from step to step, and each pair is seen both ways."""
    pairs = Pairs(five, "train", (16, 24))
    plain, flipped = some(20, pairs, 5, seed=0), some(20, pairs, 5, seed=0, flip=.5)
    patterns = {tuple(not torch.equal(a, b) for a, b in zip(*batch)) for batch in zip(plain, flipped)}
    assert len(patterns) >= 10  # of 32
    assert len({pair.numpy().tobytes() for batch in flipped for pair in batch}) == 10  # five, and their mirror images


def test_each_epoch_augments_anew(numbered):
    """A pair is augmented differently in every epoch, and pairs of one batch differently from one another."""
    settings = {"p": 1.0, **NOTHING, "brightness": .5}
    drawn = torch.cat(some(20, numbered, 7, seed=0, augment=settings))
    for i in range(7):
        values = drawn[drawn[:, 3, 0, 0] == i][:, :3].float().mean(dim=(1, 2, 3)) / PALETTE[i].mean()
        assert len(values) == 20 and len(values.unique()) >= 12 and values.min() < .85 < 1.05 < values.max()
    plain = torch.from_numpy(PALETTE[drawn[:, 3, 0, 0]]).float().mean(dim=1)
    factors = (drawn[:, :3].float().mean(dim=(1, 2, 3)) / plain).reshape(20, 7)
    assert (factors.std(dim=1) > .05).all()


def test_global_random_state_is_untouched(five):
    """Loading draws nothing from the global random generators, which the training uses."""
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    some(3, Pairs(five, "train", (16, 24)), 3, seed=0, **BOTH)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


@pytest.mark.parametrize("memory_gb", [0, 4])
def test_batches_leave_the_pairs_alone(five, memory_gb):
    """Flips and augmentation change the batch, never the pairs that it was taken from."""
    pairs = Pairs(five, "train", (16, 24), memory_gb)
    before = pairs.planes.clone()
    some(5, pairs, 5, seed=0, flip=1.0, augment={"p": 1.0, **ALL})
    assert torch.equal(pairs.planes, before)


def test_uint8_round_trip():
    """All 256 values go to [-1, 1] on the device and come back as they were; what lies outside is clipped."""
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    x, mask = unpack(torch.cat([values, torch.full((1, 1, 16, 16), 2, dtype=torch.uint8)], dim=1), 5)
    assert (x.min(), x.max(), x.dtype) == (-1, 1, torch.float32) and mask.shape == (1, 5, 16, 16) and mask[:, 2].all()
    assert to_uint8(x).dtype == np.uint8 and np.array_equal(to_uint8(x), values.permute(0, 2, 3, 1))
    assert to_uint8(torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2).expand(1, 3, 1, 2))[0, 0, :, 0].tolist() == [0, 255]


# --------------------------------------------------------------------------------------------------- sheets


@pytest.mark.parametrize("h, w, enlarged", [(16, 16, 8), (16, 24, 8), (64, 96, 2), (150, 130, 1), (100, 300, 2)])
@pytest.mark.parametrize("titles", [(), ("mask", "one", "two")])
def test_contact_sheet(h, w, enlarged, titles):
    """Every image of a sheet is there whole, enlarged without smoothing, in its row and column."""
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
