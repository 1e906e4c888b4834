"""data/folder/prepare.py through its command: whose pairs, which classes, which split, and what is refused."""

import json
import runpy
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from dataset import Pairs
from masks import UNLABELLED, Colorbook

MINE = {"road": [128, 64, 128], "car": [0, 0, 142], "truck": [0, 0, 70], "sky": [70, 130, 180], "bus": [0, 60, 100]}
ROAD, CAR, TRUCK, SKY, BUS = range(5)


def stripes(*classes, size=16):
    """Ids (size, size): a horizontal stripe of each class."""
    return np.repeat(np.array(classes, np.uint8), size // len(classes))[:, None].repeat(size, axis=1)


def write(folder, name, ids, kind="colours", values=None):
    """A pair: an image whose grey is the id times 40, and a mask in colours, or of `values` as grey ids."""
    for part, array in (("photos", np.dstack([ids * 40] * 3)), ("labels", ids)):
        path = folder / part / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if part == "labels" and kind == "colours":
            array = np.array([*MINE.values(), *[[0, 0, 0]] * 251], np.uint8)[ids]
        elif part == "labels":
            array = np.array(values, np.uint8)[ids]
        Image.fromarray(array.astype(np.uint8)).save(path)


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """prepare("--drop", "sky", ...) runs the command on the pairs of tmp_path; returns {split: {name: ids}}."""
    (tmp_path / "my.json").write_text(json.dumps(MINE))

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["prepare", "--images", str(tmp_path / "photos"), "--masks",
                                          str(tmp_path / "labels"), "--colorbook", str(tmp_path / "my.json"), "--out",
                                          str(tmp_path / "out"), "--size", "16x16", *map(str, options)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # runpy's, about a module that is imported already
            runpy.run_module("data.folder.prepare", run_name="__main__")
        return {split.name: {path.stem: np.array(Image.open(path)) for path in sorted((split / "masks").iterdir())}
                for split in (tmp_path / "out").iterdir() if split.is_dir()}

    return call


def classes(tmp_path):
    return list(json.loads((tmp_path / "out" / "colorbook.json").read_text()))


@pytest.fixture
def drives(tmp_path):
    """Twenty pairs, four of each of the drives a to e."""
    for i in range(20):
        write(tmp_path, f"{'abcde'[i % 5]}_{i:02}", stripes(SKY, CAR, TRUCK, ROAD))


def test_pairs_come_as_they_are(prepare, drives, tmp_path):
    """Without options the classes, ids and images are those of the folders, and 80, 10 and 10 % go to the splits."""
    splits = prepare()
    assert {split: len(masks) for split, masks in splits.items()} == {"train": 16, "val": 2, "test": 2}
    assert classes(tmp_path) == list(MINE)
    for masks in splits.values():
        assert all((ids == stripes(SKY, CAR, TRUCK, ROAD)).all() for ids in masks.values())
    pairs = Pairs(tmp_path / "out", "train", (16, 16))  # training reads it
    assert (pairs.planes[:, 0] == pairs.planes[:, 3] * 40).all()


def test_the_same_twice(prepare, drives):
    """The split is the same every time, so that a set that is prepared again holds out the same pairs."""
    assert {k: list(v) for k, v in prepare().items()} == {k: list(v) for k, v in prepare().items()}


@pytest.mark.parametrize("options, names, expected", [
    (["--merge", "vehicle=car,truck,bus"], ["road", "vehicle", "sky"], (2, 1, 1, 0)),
    (["--merge", "car=truck,bus"], ["road", "car", "sky"], (2, 1, 1, 0)),
    (["--drop", "sky,truck"], ["road", "car", "bus"], (UNLABELLED, 1, UNLABELLED, 0)),
    (["--merge", "thing=sky,truck", "--drop", "bus"], ["road", "car", "thing"], (2, 1, 2, 0)),
])
def test_classes_are_merged_and_dropped(prepare, drives, tmp_path, options, names, expected):
    """A merged class has one id, a dropped one is unlabelled, and the others move up."""
    splits = prepare(*options)
    assert classes(tmp_path) == names
    assert (splits["val"].popitem()[1] == stripes(*expected)).all()


def test_ids_are_renumbered(prepare, tmp_path):
    """Ids that the colorbook does not know become the classes that --merge names; the others keep their order."""
    for i in range(10):
        write(tmp_path, f"p{i}", stripes(SKY, CAR, TRUCK, ROAD), "ids", values=[0, 26, 27, 33, 5])
    splits = prepare("--merge", "car=26", "--merge", "truck=27", "--drop", "33")
    assert classes(tmp_path) == list(MINE)
    assert (splits["test"].popitem()[1] == stripes(UNLABELLED, CAR, TRUCK, ROAD)).all()
    with pytest.raises(SystemExit, match=r"10 of 10 pairs.*\n.*p0.png.*33 \(64 pixels\)"):
        prepare("--merge", "car=26,27")


def test_drives_stay_together(prepare, drives):
    """--group sends all pairs of a drive to one split."""
    splits = prepare("--group", "^[a-z]", "--shares", "60,20,20")
    drives_of = {split: {name[0] for name in masks} for split, masks in splits.items()}
    assert sorted(len(names) for names in drives_of.values()) == [1, 1, 3]
    assert set.union(*drives_of.values()) == set("abcde")


def test_split_by_names(prepare, drives, tmp_path):
    """Names in the files of --names go to their split, with or without suffix, and all others to train."""
    (tmp_path / "val.txt").write_text("a_00.png\nb_01\n")
    splits = prepare("--names", f"val={tmp_path / 'val.txt'}")
    assert list(splits["val"]) == ["a_00", "b_01"] and len(splits["train"]) == 18 and "test" not in splits


def test_folders_and_endings(prepare, tmp_path, capsys):
    """Names are those of the sub-folders and the files without --endings; what has no partner is reported."""
    for drive in ("day", "night"):
        for i in range(5):
            write(tmp_path, f"{drive}/{i:04}", stripes(SKY, ROAD))
            (tmp_path / "photos" / drive / f"{i:04}.png").rename(tmp_path / "photos" / drive / f"{i:04}_rgb.png")
            (tmp_path / "labels" / drive / f"{i:04}.png").rename(tmp_path / "labels" / drive / f"{i:04}_ids.png")
    (tmp_path / "labels" / "night" / "0004_ids.png").unlink()
    splits = prepare("--endings", "_rgb,_ids")
    expected = {*[f"day_{i:04}" for i in range(5)], *[f"night_{i:04}" for i in range(4)]}
    assert set().union(*splits.values()) == expected
    assert "1 image(s) without a mask left out: night_0004" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no image has the name of a mask.*--endings"):
        prepare()


def test_the_report(prepare, tmp_path, capsys):
    """The report tells how many pairs of which size there are, what is cropped, and the share of each class."""
    for i in range(10):
        write(tmp_path, f"p{i}", np.repeat(stripes(SKY, SKY, SKY, ROAD), 2, axis=1))
    prepare()
    out = capsys.readouterr().out
    assert "10 pairs; masks in colours: 10" in out and "10 of 16x32" in out and "50% cropped, the centre 16x16" in out
    shares = {line.split()[0]: line.split()[1] for line in out.splitlines() if "of the pixels" in line}
    assert shares == {"road": "25.00%", "car": "0.00%", "truck": "0.00%", "sky": "75.00%", "bus": "0.00%",
                      "unlabelled": "0.00%"}


@pytest.mark.parametrize("options, words", [
    (["--merge", "vehicle=car,lorry"], ["'lorry'", "road, car, truck", "my.json"]),
    (["--merge", "car=truck", "--drop", "truck"], ["'truck'", "once"]),
    (["--merge", "animal=7"], ["'animal'", "colour", "my.json"]),
    (["--shares", "80,30,10"], ["80,30,10", "per cent"]),
    (["--group", "x+"], ["x+", "a_00"]),
    (["--group", "("], ["--group (", "no regular expression"]),
    (["--group", "_"], ["1 group(s)", "val, test", "--names"]),
    (["--names", "dev=val.txt"], ["dev=val.txt", "train, val or test"]),
    (["--names", "val=nowhere.txt"], ["nowhere.txt"]),
    (["--colorbook", "nowhere.json"], ["nowhere.json"]),
    (["--images", "nowhere"], ["nowhere", "no such folder"]),
])
def test_mistakes_are_messages(prepare, drives, tmp_path, options, words):
    """A mistake is one line that names it and what was expected; nothing is written."""
    with pytest.raises(SystemExit) as stopped:
        prepare(*options)
    assert all(word in stopped.value.code for word in ["error: ", *words]), stopped.value.code
    assert not (tmp_path / "out").exists()


def test_bad_pairs_are_listed(prepare, drives, tmp_path):
    """All pairs are looked at before anything is written: a strange colour and a size that differs are both named."""
    Image.new("RGB", (16, 16), (255, 0, 255)).save(tmp_path / "labels" / "a_00.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "b_01.png")
    with pytest.raises(SystemExit) as stopped:
        prepare()
    message = stopped.value.code
    assert "2 of 20 pairs" in message and "(255, 0, 255)" in message and "b_01.png: the image is (8, 8)" in message
    assert not (tmp_path / "out").exists()


def test_out_is_not_a_source(prepare, drives, tmp_path):
    """The folders of a user's own images are never replaced."""
    for out in (tmp_path, tmp_path / "photos"):
        with pytest.raises(SystemExit, match="is or contains --images"):
            prepare("--out", out)
    assert len(Colorbook.load(tmp_path / "my.json")) == 5 and len(list((tmp_path / "photos").iterdir())) == 20
