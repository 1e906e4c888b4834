"""data/<name>/prepare.py on miniature downloads in the official layouts, whose masks are known, and the toy scenes."""

import importlib
import itertools
import json
import multiprocessing
import os
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from scenes import CAR, CITYSCAPES, NONE, PALETTE, PERSON, ROAD, SKY, VEGETATION, check_match

from config import load_config
from data.common import write_dataset
from data.toy import prepare as toy
from dataset import Pairs
from masks import Colorbook
from train import train

LABELS = [  # (label id, name, train id) of cityscapesScripts, labels.py
    (0, "unlabeled", 255), (1, "ego vehicle", 255), (2, "rectification border", 255), (3, "out of roi", 255),
    (4, "static", 255), (5, "dynamic", 255), (6, "ground", 255), (7, "road", 0), (8, "sidewalk", 1),
    (9, "parking", 255), (10, "rail track", 255), (11, "building", 2), (12, "wall", 3), (13, "fence", 4),
    (14, "guard rail", 255), (15, "bridge", 255), (16, "tunnel", 255), (17, "pole", 5), (18, "polegroup", 255),
    (19, "traffic light", 6), (20, "traffic sign", 7), (21, "vegetation", 8), (22, "terrain", 9), (23, "sky", 10),
    (24, "person", 11), (25, "rider", 12), (26, "car", 13), (27, "truck", 14), (28, "bus", 15), (29, "caravan", 255),
    (30, "trailer", 255), (31, "train", 16), (32, "motorcycle", 17), (33, "bicycle", 18)]
LABEL_ID = np.array([{train: label for label, _, train in LABELS}.get(k, 0) for k in range(256)], np.uint8)


def run(name, source, out, size=(40, 60), crop=None, **more):
    module = importlib.import_module(f"data.{name}.prepare")
    more = {"labels": "auto"} | more if name == "bdd100k" else more
    module.prepare(source=source, out=out, size=size, crop=crop, **more)


def save(array, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


# A download is built from {official split: {stem: train ids, 255 is unlabelled}}; the image shows the class by colour.


def bdd100k(source, frames):
    for split, scenes in frames.items():
        for stem, ids in scenes.items():
            save(PALETTE[ids], source / "images" / "10k" / split / f"{stem}.jpg")
            save(ids, source / "labels" / "sem_seg" / "masks" / split / f"{stem}.png")


def cityscapes(source, frames):
    for split, scenes in frames.items():
        for stem, ids in scenes.items():
            label = source / "gtFine" / split / "aachen" / f"{stem}_gtFine_labelIds.png"
            save(PALETTE[ids], source / "leftImg8bit" / split / "aachen" / f"{stem}_leftImg8bit.png")
            save(LABEL_ID[ids], label)
            save(PALETTE[ids], label.with_name(f"{stem}_gtFine_color.png"))
            save(ids.astype(np.uint16), label.with_name(f"{stem}_gtFine_instanceIds.png"))
            label.with_name(f"{stem}_gtFine_polygons.json").write_text("{}")


def camvid(source, frames):
    for split, scenes in frames.items():
        for stem, ids in scenes.items():
            save(PALETTE[ids], source / split / f"{stem}.jpg")
            save(np.where(ids == NONE, 11, ids).astype(np.uint8), source / f"{split}annot" / f"{stem}.png")


def idd_lite(source, frames, drive=lambda stem: stem):
    for split, scenes in frames.items():
        for stem, ids in scenes.items():
            label = source / "gtFine" / split / drive(stem) / f"{stem}_label.png"
            save(PALETTE[ids], source / "leftImg8bit" / split / drive(stem) / f"{stem}_image.jpg")
            save(ids, label)
            save(ids, label.with_name(f"{stem}_inst_label.png"))


DOWNLOADS = {"bdd100k": bdd100k, "cityscapes": cityscapes, "camvid": camvid, "idd_lite": idd_lite}
EXPECTED = {"bdd100k": {"train": 3, "test": 2}, "cityscapes": {"train": 3, "val": 2}, "camvid": {"train": 3, "val": 2},
            "idd_lite": {"train": 2, "val": 1, "test": 2}}  # idd_lite: one of its three drives is held out
all_of_them = pytest.mark.parametrize("name", DOWNLOADS)


def blocks(seed):
    """Ids (40, 60) in blocks of 10 of the classes 0..6 and unlabelled, which every data set here has."""
    ids = np.random.default_rng(seed).choice(np.array([*range(7), NONE], np.uint8), (4, 6))
    return ids.repeat(10, axis=0).repeat(10, axis=1)


SCENES = {f"f{i}": blocks(i) for i in range(5)}


@pytest.fixture
def download(tmp_path):
    """download(name) is the folder of a small download with f0, f1, f2 in train and f3, f4 in val."""

    def make(name):
        stems = list(SCENES)
        DOWNLOADS[name](tmp_path / "source", {split: {s: SCENES[s] for s in part} for split, part in
                                              (("train", stems[:3]), ("val", stems[3:]))})
        return tmp_path / "source"

    return make


def label_of(source, stem):
    return next(p for p in sorted(source.rglob(f"{stem}*.png")) if p.stem.removeprefix(stem) in
                ("", "_label", "_gtFine_labelIds"))


def written(out, kind="masks"):
    """{split: {stem: array}} of a prepared folder."""
    return {split.name: {p.stem: np.array(Image.open(p)) for p in sorted((split / kind).iterdir())}
            for split in sorted(out.iterdir()) if split.is_dir()}


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------ what holds for all four


@all_of_them
def test_shape_of_the_result(tmp_path, download, name, capsys):
    """Every pair of the download arrives in a split that Pairs reads, with its own mask."""
    run(name, download(name), tmp_path / "out")
    masks = written(tmp_path / "out")
    assert {split: len(found) for split, found in masks.items() if found} == EXPECTED[name]
    found = {stem.split("_")[-1]: ids for split in masks.values() for stem, ids in split.items()}
    assert found.keys() == SCENES.keys() and all(np.array_equal(found[stem], SCENES[stem]) for stem in SCENES)
    for split, n in EXPECTED[name].items():
        pairs = Pairs(tmp_path / "out", split, (40, 60))
        assert len(pairs) == n and f"{n} pairs: {n} palette\n" in capsys.readouterr().out
        for planes in pairs.planes.numpy():
            error = np.abs(planes[:3].transpose(1, 2, 0).astype(int) - PALETTE[planes[3]])
            assert error.max() == 0 if name == "cityscapes" else error.mean() < 15  # PNG, the others are JPEG


@all_of_them
def test_palette_is_the_colorbook(tmp_path, download, name):
    """A viewer shows the masks in the colours of the colorbook."""
    run(name, download(name), tmp_path / "out")
    book = json.loads((tmp_path / "out" / "colorbook.json").read_text(encoding="utf-8"))
    assert len(book) == {"camvid": 11, "idd_lite": 7}.get(name, 19)
    if len(book) == 19:
        assert [*book] == [*CITYSCAPES] and [*map(tuple, book.values())] == [*CITYSCAPES.values()]
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(book)] = list(book.values())
    for path in (tmp_path / "out").rglob("masks/*"):
        with Image.open(path) as image:
            assert path.suffix == ".png" and image.mode == "P"
            assert np.array_equal(np.array(image.convert("RGB")), colors[np.array(image)])


@all_of_them
def test_twice_gives_the_same_bytes(tmp_path, download, name):
    """Preparing twice gives the same bytes, and leaves nothing but the result."""
    source = download(name)
    run(name, source, tmp_path / "out")
    first = content(tmp_path / "out")
    run(name, source, tmp_path / "out")
    run(name, source, tmp_path / "deep" / "other")
    assert first == content(tmp_path / "out") == content(tmp_path / "deep" / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "out", "source"]  # and nothing half-written


@all_of_them
@pytest.mark.parametrize("size, crop, rows, columns", [
    ((16, 24), (16, 24), slice(12, 28), slice(18, 42)),  # the window alone
    ((40, 40), None, slice(0, 40), slice(10, 50)),       # the largest square in the middle
    ((20, 30), None, slice(1, 40, 2), slice(1, 60, 2)),  # halved: NEAREST takes the pixel right of the centre
    ((8, 4), (16, 8), slice(13, 28, 2), slice(27, 34, 2))])
def test_size_and_crop(tmp_path, download, name, size, crop, rows, columns):
    """--crop takes the centred window, --size is what it is scaled to: these pixels."""
    run(name, download(name), tmp_path / "out", size, crop)
    masks, images = written(tmp_path / "out"), written(tmp_path / "out", "images")
    found = {stem.split("_")[-1]: ids for split in masks.values() for stem, ids in split.items()}
    assert all(np.array_equal(found[stem], ids[rows, columns]) for stem, ids in SCENES.items())
    assert {image.shape for split in images.values() for image in split.values()} == {(*size, 3)}


BROKEN = {"bdd100k": 40, "cityscapes": 34, "camvid": 12, "idd_lite": 7}  # the smallest id, or one, that does not exist


@all_of_them
def test_broken_label_leaves_the_old_folder(tmp_path, download, name):
    """A label that does not exist is refused by name, and the set prepared before stays as it was."""
    source = download(name)
    label = label_of(source, "f1")
    whole = label.read_bytes()
    bad = np.array(Image.open(label))
    bad[5, 5] = BROKEN[name]
    save(bad, label)
    with pytest.raises(ValueError, match=re.escape(label.name) + f".*{BROKEN[name]}"):
        run(name, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    label.write_bytes(whole)
    run(name, source, tmp_path / "out")
    before = content(tmp_path / "out")
    save(bad, label)
    with pytest.raises(ValueError, match=re.escape(label.name)):
        run(name, source, tmp_path / "out", (20, 30))
    assert content(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@all_of_them
@pytest.mark.parametrize("damage", ["empty", "cut short"])
def test_damaged_label(tmp_path, download, name, damage):
    """A file that is empty or cut short is refused by name."""
    source = download(name)
    label = label_of(source, "f1")
    label.write_bytes(label.read_bytes()[: 0 if damage == "empty" else -30])
    with pytest.raises((ValueError, OSError), match=re.escape(label.name)):
        run(name, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@all_of_them
def test_label_of_another_shape(tmp_path, download, name):
    """A label of another size than its image is refused by name."""
    source = download(name)
    label = label_of(source, "f1")
    save(np.array(Image.open(label))[:, :40], label)
    with pytest.raises(ValueError, match=re.escape(label.name)):
        run(name, source, tmp_path / "out")


@all_of_them
def test_missing_source(tmp_path, name):
    """A folder that is not there is reported as --source."""
    with pytest.raises(ValueError, match="nowhere.*--source"):
        run(name, tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@all_of_them
def test_missing_labels(tmp_path, download, name):
    """A download without its labels is refused, with the folder that they belong into."""
    source = download(name)
    folder = {"bdd100k": "labels", "camvid": "trainannot"}.get(name, "gtFine")
    shutil.rmtree(source / folder)
    with pytest.raises(ValueError, match=f"{re.escape(str(source))}.*{folder}"):
        run(name, source, tmp_path / "out")


@all_of_them
def test_orphans_are_counted(tmp_path, download, name, capsys):
    """Images without a mask, and masks without an image, are counted and listed."""
    source = download(name)
    label_of(source, "f1").unlink()
    next(p for p in source.rglob("f2*") if p.suffix == ".jpg" or "leftImg8bit" in p.name).unlink()
    run(name, source, tmp_path / "out")
    out = capsys.readouterr().out
    assert re.search(r"1 image\(s\) without a mask.*f1\b", out)
    assert re.search(r"1 mask\(s\) without an image.*f2\b", out)
    assert sum(len(split) for split in written(tmp_path / "out").values()) == 3


@all_of_them
@pytest.mark.filterwarnings("ignore:.*sys.modules")
def test_command(tmp_path, download, name, monkeypatch, capsys):
    """The command of the README prepares with its options, and ends in an error when it cannot."""
    source = download(name)

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["prepare", *map(str, words)])
        runpy.run_module(f"data.{name}.prepare", run_name="__main__")

    command("--source", source, "--out", tmp_path / "out", "--size", "8x12", "--crop", "16x24")
    assert {ids.shape for split in written(tmp_path / "out").values() for ids in split.values()} == {(8, 12)}
    with pytest.raises(SystemExit, match="error:.*nowhere"):
        command("--source", tmp_path / "nowhere", "--out", tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        command("--source", source, "--out", tmp_path / "out", "--size", "128")
    assert "HEIGHTxWIDTH" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- writing a prepared set

TWO = Colorbook({"road": [128, 64, 128], "sky": [70, 130, 180]})


def one_pair(value):
    """The splits of a set of one pair, whose image is of this value everywhere."""
    return {"train": [("a", lambda: (np.full((4, 4, 3), value, np.uint8), np.zeros((4, 4), np.uint8)))], "val": []}


@pytest.fixture
def prepared(tmp_path):
    """A prepared set whose one image is of value 1, alone in its folder."""
    write_dataset(tmp_path / "parent" / "set", TWO, one_pair(1))
    return tmp_path / "parent" / "set"


def value_of(folder):
    """The value of the image of a whole set of one_pair()."""
    assert sorted(content(folder)) == ["colorbook.json", "train/images/a.png", "train/masks/a.png"]
    return int(np.array(Image.open(folder / "train" / "images" / "a.png")).mean())


@pytest.mark.parametrize("name", [
    "notes.txt", ".git/config", "colorbook.json.old", "train/photo.png", "train/images/a.jpg", "train/images/old/a.png",
    "train/images.zip", "train/depth/a.png", "train_old/images/a.png", "test/masks/labels.csv", "val/planes.npy"])
def test_only_a_prepared_set_is_replaced(prepared, name):
    """A folder that holds one file more than a prepared set is refused with its name, and stays as it is."""
    (prepared / name).parent.mkdir(parents=True, exist_ok=True)
    (prepared / name).write_bytes(b"precious")
    before = content(prepared)
    with pytest.raises(FileExistsError, match=re.escape(str(prepared))) as error:
        write_dataset(prepared, TWO, one_pair(2))
    named = re.search("holds (.*?), which", str(error.value))[1]
    assert (named.rstrip("/") + "/").startswith(name.split("/")[0]) and name.startswith(named.rstrip("/"))
    assert content(prepared) == before and [path.name for path in prepared.parent.iterdir()] == ["set"]


def test_a_folder_of_pairs_without_a_colorbook_is_kept(prepared):
    """Images and masks in our shape, but without colorbook.json, are somebody's own and are not replaced."""
    (prepared / "colorbook.json").unlink()
    with pytest.raises(FileExistsError, match="no colorbook.json"):
        write_dataset(prepared, TWO, one_pair(2))
    assert (prepared / "train" / "images" / "a.png").exists()


@pytest.mark.filterwarnings("ignore:.*sys.modules")
def test_out_is_the_repository(tmp_path, monkeypatch):
    """`--out .` in a clone of this repository, which has a colorbook.json, deletes nothing."""
    files = {"colorbook.json": "{}", "train.py": "", "train/images/a.png": "", ".git/HEAD": "ref: refs/heads/main"}
    for name, text in files.items():
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_text(text)
    monkeypatch.chdir(tmp_path / "clone")
    for out in (".", "../clone", str(tmp_path)):
        monkeypatch.setattr(sys, "argv", ["prepare", "--out", out, "--train", "1", "--val", "0", "--test", "0"])
        with pytest.raises(SystemExit, match="error: .*(train.py|.git|clone)"):
            runpy.run_module("data.toy.prepare", run_name="__main__")
    assert content(tmp_path / "clone") == {name: text.encode() for name, text in files.items()}


@pytest.mark.parametrize("out", ["CamVid", "."])
@pytest.mark.filterwarnings("ignore:.*sys.modules")
def test_out_is_the_source(tmp_path, download, monkeypatch, out):
    """An --out that is or contains the --source is refused, and the download stays."""
    source = download("camvid").rename(tmp_path / "CamVid")
    before = content(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare", "--source", "CamVid", "--out", out])
    with pytest.raises(SystemExit, match=f"error: --out {re.escape(out)} is or contains --source CamVid"):
        runpy.run_module("data.camvid.prepare", run_name="__main__")
    assert content(source) == before


def test_maps_go_with_their_set(prepared):
    """A set from which a training has made maps is replaced, and the maps of the old images go with it."""
    Pairs(prepared, "train", (8, 8), memory_gb=0)
    assert len(content(prepared)) == 4
    write_dataset(prepared, TWO, one_pair(2))
    assert value_of(prepared) == 2


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_to_and_in_a_set(prepared, tmp_path):
    """Where --out is a link the set behind it is replaced; a set with a link in it is refused."""
    (tmp_path / "link").symlink_to(prepared)
    write_dataset(tmp_path / "link", TWO, one_pair(2))
    assert (tmp_path / "link").is_symlink() and value_of(prepared) == 2
    (prepared / "test").symlink_to(tmp_path)
    with pytest.raises(FileExistsError, match="holds test"):
        write_dataset(prepared, TWO, one_pair(3))


def test_two_at_once(prepared):
    """Two programs that write one set at the same time leave the whole set of the one that ends last."""
    splits = one_pair(2)
    (stem, make), = splits["train"]

    def make_and_meet():
        write_dataset(prepared, TWO, one_pair(3))
        assert value_of(prepared) == 3
        return make()

    write_dataset(prepared, TWO, splits | {"train": [(stem, make_and_meet)]})
    assert value_of(prepared) == 2 and [path.name for path in prepared.parent.iterdir()] == ["set"]


def test_files_that_come_while_a_set_is_built(prepared):
    """A file that somebody puts into the old set while the new one is built keeps the old set in its place."""
    splits = one_pair(2)
    (stem, make), = splits["train"]

    def make_late():
        (prepared / "notes.txt").write_bytes(b"precious")
        return make()

    with pytest.raises(FileExistsError, match="notes.txt"):
        write_dataset(prepared, TWO, splits | {"train": [(stem, make_late)]})
    (prepared / "notes.txt").unlink()
    assert value_of(prepared) == 1


def write_and_stop(out, moment, stop):
    """Write a set of value 2 to `out`, and call stop() while it is drawn, or before the first or second renaming."""
    splits, rename, renamed = one_pair(2), os.replace, []
    (stem, make), = splits["train"]

    def replace(source, target):
        renamed.append(source)
        if moment == f"renaming {len(renamed)}":
            stop()
        rename(source, target)

    def draw():
        if moment == "drawing":
            stop()
        return make()

    os.replace = replace
    try:
        write_dataset(out, TWO, splits | {"train": [(stem, draw)]})
    finally:
        os.replace = rename


MOMENTS = ["drawing", "renaming 1", "renaming 2"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["Ctrl-C", "full"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_error_leaves_the_old_set(prepared, moment, error):
    """After Ctrl-C or a full disk, whenever they come, the old set stands in its place, with nothing beside it."""
    def stop():
        raise error

    with pytest.raises(type(error)):
        write_and_stop(prepared, moment, stop)
    assert value_of(prepared) == 1 and [path.name for path in prepared.parent.iterdir()] == ["set"]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_leaves_the_old_set(prepared, moment):
    """After a kill, whenever it comes, the old set is whole, in its place or beside it, and the next run succeeds."""
    fork = multiprocessing.get_context("fork")
    killed = fork.Process(target=write_and_stop, args=(prepared, moment, lambda: os._exit(9)))
    killed.start()
    killed.join()
    assert killed.exitcode == 9
    old, = [path.parent for path in prepared.parent.rglob("colorbook.json") if value_of(path.parent) == 1]
    assert old == prepared or moment == "renaming 2"
    write_dataset(prepared, TWO, one_pair(3))
    assert value_of(prepared) == 3


# -------------------------------------------------------------------------------------------------- BDD100K

# The centre 720x720 of 1280x720 begins at x = 280, and 45 of its pixels become 8: a shape whose sides lie on multiples
# of 45 becomes the same shape in units of 8, whatever happens to the pixels of its outline.
SHAPES = [  # category, left, top, right, bottom in units of 45 in the window; in drawing order
    ("sky", -6, 0, 22, 7), ("road", -6, 9, 22, 16), ("banner", 2, 7, 6, 9), ("vegetation", 8, 4, 12, 9),
    ("car", 4, 8, 9, 12), ("person", 6, 6, 7, 11)]
KNOWN = np.full((128, 128), NONE, np.uint8)
KNOWN[:56], KNOWN[72:] = SKY, ROAD  # between them a strip that is unlabelled, with a banner, which is no class
KNOWN[32:72, 64:96] = VEGETATION
KNOWN[64:96, 32:72] = CAR
KNOWN[48:88, 48:56] = PERSON
MIRRORED = KNOWN[:, ::-1]


def polygons(name, mirror=False):
    """A Scalabel frame of the shapes above."""
    labels = []
    for i, (category, left, top, right, bottom) in enumerate(SHAPES):
        left, right = (16 - right, 16 - left) if mirror else (left, right)
        left, right = (min(max(280 + 45 * x, 0), 1280) for x in (left, right))
        vertices = [[left, 45 * top], [right, 45 * top], [right, 45 * bottom], [left, 45 * bottom]]
        labels.append({"id": str(i), "category": category,
                       "poly2d": [{"vertices": vertices, "types": "LLLL", "closed": True}]})
    return {"name": f"{name}.jpg", "url": "", "timestamp": 10000, "labels": labels}


def full_size(mirror=False, unit=45):
    """The same frame as ids (720, 1280); with another unit it is smaller."""
    ids, start = np.full((16 * unit, 256 * unit // 9), NONE, np.uint8), 56 * unit // 9
    for category, left, top, right, bottom in SHAPES:
        left, right = (16 - right, 16 - left) if mirror else (left, right)
        if category in CITYSCAPES:
            left, right = max(0, start + unit * left), max(0, start + unit * right)
            ids[unit * top : unit * bottom, left:right] = [*CITYSCAPES].index(category)
    return ids


FRAMES = {"train": ("0a-1", False), "val": ("0b-2", True)}  # official split: the stem, and whether it is mirrored


def write_bdd(source, form):
    old = form.startswith("older")
    for split, (stem, mirror) in FRAMES.items():
        ids = full_size(mirror, unit=9 if "colours" in form else 45)  # reading large colour pictures takes its time
        image = source / ("seg/images" if old else "images/10k") / split / f"{stem}.jpg"
        save(PALETTE[ids], image, quality=100, subsampling=0)
        rgba = np.dstack([PALETTE[ids], np.full(ids.shape, 255, np.uint8)])
        if "masks" in form:
            save(ids, source / (f"seg/labels/{split}/{stem}_train_id.png" if old else
                                f"labels/sem_seg/masks/{split}/{stem}.png"))
        elif "colours" in form:
            save(rgba, source / (f"seg/color_labels/{split}/{stem}_train_color.png" if old else
                                 f"labels/sem_seg/colormaps/{split}/{stem}.png"))
        else:
            frames = [polygons(stem, mirror), {"name": "0c-3.jpg", "labels": None}]
            path = source / "labels" / "sem_seg" / "polygons" / f"sem_seg_{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"frames": frames, "config": {}} if form.endswith("frames") else frames))


@pytest.mark.parametrize("form", ["polygons", "polygons in frames", "masks", "colours", "older masks", "older colours"])
def test_bdd_forms_agree(tmp_path, form):
    """Each of the official forms of the labels gives the same masks, in the geometry of the thesis (4.1)."""
    write_bdd(tmp_path / "bdd", form)
    run("bdd100k", tmp_path / "bdd", tmp_path / "out", (128, 128))
    masks = written(tmp_path / "out")
    assert {split: [*found] for split, found in masks.items()} == {"train": ["0a-1"], "test": ["0b-2"]}
    assert np.array_equal(masks["train"]["0a-1"], KNOWN) and np.array_equal(masks["test"]["0b-2"], MIRRORED)
    pair = Pairs(tmp_path / "out", "test", (128, 128)).planes[0]
    image, ids = pair[:3], pair[3]
    check_match(image, ids)


def test_bdd_orphans(tmp_path, capsys):
    """Polygons without an image, and images without polygons, are listed."""
    write_bdd(tmp_path / "bdd", "polygons")
    save(PALETTE[full_size()], tmp_path / "bdd" / "images" / "10k" / "val" / "0d-4.jpg")
    run("bdd100k", tmp_path / "bdd", tmp_path / "out", (16, 16))
    out = capsys.readouterr().out
    assert len(re.findall(r"1 mask\(s\) without an image.*0c-3", out)) == 2
    assert len(re.findall(r"val: 1 image\(s\) without a mask.*0d-4", out)) == 1


@pytest.mark.parametrize("labels, expected", [("auto", KNOWN), ("polygons", KNOWN), ("masks", KNOWN[:, ::-1])])
def test_bdd_choice_of_labels(tmp_path, labels, expected):
    """--labels chooses the form, and auto takes the polygons, as the thesis did."""
    write_bdd(tmp_path / "bdd", "polygons")
    for split, (stem, mirror) in FRAMES.items():
        save(full_size(not mirror), tmp_path / "bdd" / "labels" / "sem_seg" / "masks" / split / f"{stem}.png")
    run("bdd100k", tmp_path / "bdd", tmp_path / "out", (128, 128), labels=labels)
    assert np.array_equal(written(tmp_path / "out")["train"]["0a-1"], expected)


@pytest.mark.parametrize("last", [[[840, 360]], []], ids=["returns to the first vertex", "is closed by it"])
def test_bdd_curves(tmp_path, last):
    """Bézier curves are drawn as curves: a circle of four of them has the area of a circle."""
    c, r, k = (640, 360), 200, 200 * 4 / 3 * (2**.5 - 1)
    unit = [(r, k), (k, r), (0, r), (-k, r), (-r, k), (-r, 0), (-r, -k), (-k, -r), (0, -r), (k, -r), (r, -k)]
    vertices = [[c[0] + r, c[1]], *([c[0] + x, c[1] + y] for x, y in unit), *last]
    frame = polygons("0a-1")
    frame["labels"] = [{"category": "car", "poly2d": [{"vertices": vertices, "types": "L" + "C" * (len(vertices) - 1),
                                                       "closed": True}]}]
    write_bdd(tmp_path / "bdd", "polygons")
    (tmp_path / "bdd" / "labels" / "sem_seg" / "polygons" / "sem_seg_train.json").write_text(json.dumps([frame]))
    run("bdd100k", tmp_path / "bdd", tmp_path / "out", (720, 720))
    ids = written(tmp_path / "out")["train"]["0a-1"]
    y, x = np.nonzero(ids == CAR)
    assert len(y) == pytest.approx(np.pi * r**2, rel=.015)  # the control points alone would give 15 % more
    assert (y.mean(), x.mean()) == pytest.approx((360, 360), abs=1)
    assert np.hypot(y - 360, x - 360).max() <= r + 2


@pytest.mark.parametrize("text", [
    "[", "{}", "[{}]", "7",
    '[{"name": "0a-1.jpg", "labels": [{"poly2d": []}]}]',
    '[{"name": "0a-1.jpg", "labels": [{"category": "car", "poly2d": [{"vertices": [[0, 0], [9, 0], [9, 9]]}]}]}]',
    '[{"name": "0a-1.jpg", "labels": [{"category": "car", "poly2d": [{"vertices": [[0], [9], [9]], "types": "LLL"}]}]}]'
], ids=["cut short", "no frames", "no name", "a number", "no category", "no types", "no points"])
def test_bdd_broken_polygons(tmp_path, text):
    """A broken file of polygons is refused by name."""
    write_bdd(tmp_path / "bdd", "polygons")
    (tmp_path / "bdd" / "labels" / "sem_seg" / "polygons" / "sem_seg_train.json").write_text(text)
    with pytest.raises(ValueError, match="sem_seg_train.json"):
        run("bdd100k", tmp_path / "bdd", tmp_path / "out", (16, 16))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- Cityscapes, CamVid, IDD-Lite


def test_cityscapes_train_ids(tmp_path):
    """Each of the 34 label ids becomes the train id of the benchmark, or unlabelled."""
    assert [name for _, name, train in LABELS if train != NONE] == [*CITYSCAPES]  # the table above is sound
    label_ids = np.tile(np.arange(34, dtype=np.uint8).repeat(2), (34, 1))
    cityscapes(tmp_path / "city", {split: {"a_0_0": np.zeros((34, 68), np.uint8)} for split in ("train", "val")})
    save(label_ids, tmp_path / "city" / "gtFine" / "val" / "aachen" / "a_0_0_gtFine_labelIds.png")
    run("cityscapes", tmp_path / "city", tmp_path / "out", (34, 68))
    masks = written(tmp_path / "out")
    assert [*masks] == ["train", "val"] and not masks["train"]["a_0_0"].any()
    assert np.array_equal(masks["val"]["a_0_0"], np.tile(np.repeat([train for _, _, train in LABELS], 2), (34, 1)))


def test_cityscapes_keeps_its_width(tmp_path):
    """The whole width of 1:2 images is kept."""
    ids = np.tile(np.repeat(np.array([ROAD, SKY, CAR, VEGETATION], np.uint8), 64), (128, 1))
    cityscapes(tmp_path / "city", {split: {"a_0_0": ids} for split in ("train", "val")})
    run("cityscapes", tmp_path / "city", tmp_path / "out", (32, 64))
    pair = Pairs(tmp_path / "out", "train", (32, 64)).planes[0]
    image, small = pair[:3], pair[3]
    assert np.array_equal(small, ids[::4, ::4])
    check_match(image, small)


def test_camvid_unlabelled(tmp_path):
    """CamVid's class 11 becomes unlabelled, and a missing val is left out."""
    ids = np.tile(np.arange(12, dtype=np.uint8), (12, 1))
    for split in ("train", "test"):  # no val: that split is left out
        save(np.zeros((12, 12, 3), np.uint8), tmp_path / "CamVid" / split / "a.png")
        save(ids, tmp_path / "CamVid" / f"{split}annot" / "a.png")
    run("camvid", tmp_path / "CamVid", tmp_path / "out", (12, 12))
    assert [*written(tmp_path / "out")] == ["test", "train"]
    assert written(tmp_path / "out")["train"]["a"].tolist() == [[*range(11), NONE]] * 12


DRIVES = [f"{i:03d}" for i in range(23)]


def idd_drives(tmp_path, official):
    """Prepare drives of two frames, which have the same names in every drive: {split: the drives in it}."""
    for split, drives in official.items():
        for drive in drives:
            frames = {stem: np.full((8, 8), i, np.uint8) for i, stem in enumerate(("frame0_a", "frame1_b"))}
            idd_lite(tmp_path / "idd", {split: frames}, lambda stem, drive=drive: drive)
            for path in (tmp_path / "idd" / "leftImg8bit" / split / drive).iterdir():  # the image tells its drive
                save(np.full((8, 8, 3), int(drive) * 2, np.uint8), path, quality=100)
    run("idd_lite", tmp_path / "idd", tmp_path / "out", (8, 8))
    found = {split: [int(image.mean() / 2 + .5) for image in images.values()]
             for split, images in written(tmp_path / "out", "images").items()}
    assert all(drives.count(drive) == 2 for drives in found.values() for drive in drives)  # both frames, in one split
    assert sorted(drive for drives in found.values() for drive in drives) == sorted(
        2 * [int(drive) for drives in official.values() for drive in drives])
    masks = [ids for split in written(tmp_path / "out").values() for ids in split.values()]
    assert sorted(int(ids[0, 0]) for ids in masks) == [0] * (len(masks) // 2) + [1] * (len(masks) // 2)
    return {split: set(drives) for split, drives in found.items()}


def test_idd_official_val_is_test(tmp_path):
    """The official val becomes test, and no drive is on two sides."""
    found = idd_drives(tmp_path, {"train": DRIVES[:18], "val": DRIVES[18:]})
    assert found["test"] == set(range(18, 23)) and not found["train"] & found["val"]
    assert 1 <= len(found["val"]) <= 4 and len(found["train"]) >= 14


def test_idd_without_official_val(tmp_path):
    """Without the official val, drives of train are held out for val and for test."""
    found = idd_drives(tmp_path, {"train": DRIVES})
    assert found["val"] and found["test"] and len(found["train"]) >= 17
    assert not found["train"] & found["val"] and not found["train"] & found["test"] and not found["val"] & found["test"]


def test_idd_instances_are_ignored(tmp_path, download, capsys):
    """The instance masks of the official download are neither used nor listed."""
    source = download("idd_lite")
    assert len([*source.rglob("*_inst_label.png")]) == 5
    run("idd_lite", source, tmp_path / "out")
    assert "f0_inst" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- toy scenes

TOYS = [toy.scene([0, i], (48, 48)) for i in range(60)]


def test_a_seed_is_a_scene():
    """The same seed draws the same scene, another seed another one, without numpy's global random state."""
    state = np.random.get_state()[1].copy()
    for seed in (3, [1, 2, 3]):
        (image, ids), (image2, ids2) = toy.scene(seed), toy.scene(seed)
        assert (image == image2).all() and (ids == ids2).all()
    assert (toy.scene(3)[0] != toy.scene(4)[0]).any() and (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("size", [(64, 64), (32, 64), (48, 40)])
def test_sizes(size):
    """Scenes have the size that was asked for, height first, and ids of the 19 classes."""
    image, ids = toy.scene(0, size)
    assert image.shape == (*size, 3) and ids.shape == size and image.dtype == ids.dtype == np.uint8 and ids.max() < 19


def test_every_class_occurs():
    """Each class is in more than one scene of twenty, road and sky are in nearly all."""
    seen = np.mean([np.bincount(ids.ravel(), minlength=19) > 0 for _, ids in TOYS], axis=0)
    assert seen.min() > 0.05 and seen[[ROAD, SKY]].min() > 0.95, dict(zip(CITYSCAPES, seen))


def test_mask_and_light_both_matter():
    """The mask tells much of the colours, but neither the hour nor the colour of a car."""
    images = np.stack([image for image, _ in TOYS]) / 255
    ids = np.stack([ids for _, ids in TOYS])
    by_class = np.stack([images[ids == k].mean(axis=0) for k in range(19)])
    without, given_class = ((images - guess) ** 2 for guess in (images.mean(axis=(0, 1, 2)), by_class[ids]))
    assert given_class.mean() < 0.8 * without.mean()
    brightness = images.mean(axis=(1, 2, 3))
    assert brightness.std() > 0.1 and brightness.min() < 0.3 < 0.5 < brightness.max()
    cars = [images[i][ids[i] == CAR].mean(axis=0) for i in range(60) if (ids[i] == CAR).sum() > 20]
    assert np.std(cars, axis=0).max() > 0.08


@pytest.mark.parametrize("axis", [0, 1])
def test_mask_lies_on_the_image(axis):
    """A pixel has the class that covers more than half of it, wherever an edge runs: no shift by a part of a pixel."""
    for edge in range(5, 60):
        painter = toy.Painter(np.random.default_rng(0), (16, 16))
        painter.time, painter.dark = "day", False
        corner = (edge, 0) if axis else (0, edge)
        painter.draw("rectangle", [*corner, 63, 63], 1, (255, 255, 255), CAR)  # on black, which is sky
        image, ids = toy.finish(painter)
        covered = np.clip((np.arange(1, 17) * 4 - edge) / 4, 0, 1)
        along = (image[8, :, 0], ids[8]) if axis else (image[:, 8, 0], ids[:, 8])
        assert np.abs(along[0] / 255 - covered).max() < .01
        clear = covered != .5
        assert np.array_equal((along[1] == CAR)[clear], covered[clear] > .5)


def test_whole_scenes_agree_with_their_masks():
    """In whole scenes the mask explains the colours best where it lies, better than shifted by a pixel to any side."""
    def unexplained(dy, dx):
        error = 0
        for image, ids in TOYS:
            ids = np.roll(ids, (dy, dx), (0, 1))[1:-1, 1:-1].ravel()
            colors = image[1:-1, 1:-1].reshape(-1, 3).astype(float)
            for k in np.unique(ids):
                error += ((colors[ids == k] - colors[ids == k].mean(axis=0)) ** 2).sum()
        return error

    shifts = {shift: unexplained(*shift) for shift in itertools.product((-1, 0, 1), repeat=2)}
    assert all(shifts[0, 0] < .97 * error for shift, error in shifts.items() if shift != (0, 0))


def test_splits_and_seeds_draw_different_scenes(tmp_path):
    """No scene is in two splits, or twice in one, and another seed draws other scenes."""
    scenes = []
    for seed in (0, 1):
        toy.prepare(tmp_path / str(seed), 3, 3, 3, (16, 16), seed)
        images = written(tmp_path / str(seed), "images")
        assert {split: len(found) for split, found in images.items()} == {"train": 3, "val": 3, "test": 3}
        assert len({stem for found in images.values() for stem in found}) == 9
        scenes += [image.tobytes() for found in images.values() for image in found.values()]
    assert len(set(scenes)) == 18


def test_default_size_is_the_preset(tmp_path, monkeypatch):
    """Without --size, scenes are drawn in the size that the preset toy trains on."""
    counts = ["--train", "1", "--val", "0", "--test", "0"]
    monkeypatch.setattr(sys, "argv", ["prepare", "--out", str(tmp_path / "toy"), *counts])
    toy.main()
    (image,) = written(tmp_path / "toy", "images")["train"].values()
    assert image.shape[:2] == tuple(load_config("config.yaml", "toy")["data"]["size"])


def test_training_draws_its_own_scenes(tiny, tmp_path, monkeypatch):
    """On a fresh clone the first training draws the toy scenes, in its own size."""
    monkeypatch.setattr(toy, "scene", lambda seed, size: tuple(a[:size[0], :size[1]] for a in TOYS[seed[-1] % 60]))
    cfg = tiny(data__root=tmp_path / "toy" / "prepared", train__steps=2)
    train(cfg)
    splits = written(tmp_path / "toy" / "prepared", "images")
    assert {split: len(images) for split, images in splits.items()} == {"train": 1000, "val": 100, "test": 100}
    assert {image.shape for images in splits.values() for image in images.values()} == {(16, 16, 3)}


@pytest.mark.parametrize("wrong", [{"train": -1}, {"seed": -5}, {"size": (8, 8)}])
def test_mistakes_are_messages(tmp_path, wrong):
    """Wrong numbers are refused with the range that is right, and write nothing."""
    with pytest.raises(ValueError, match="must be 0 or more|at least 16x16"):
        toy.prepare(tmp_path / "prepared", **{"train": 1, "val": 0, "test": 0} | wrong)
    assert not (tmp_path / "prepared").exists()
