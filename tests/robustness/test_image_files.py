"""Folders as people have them: odd names, missing partners, broken files among good ones."""

import io
import os
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import CLASSES
from PIL import Image

from dataset import Pairs, read_image
from masks import Colorbook
from train import main, train

SCENE = np.repeat(np.arange(4, dtype=np.uint8), 16).reshape(8, 8)
BOOK = Colorbook(CLASSES)


def encode(array, kind="png", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


IMAGE, MASK = encode(BOOK.paint(SCENE)), encode(SCENE)


@pytest.fixture
def data(tmp_path):
    """data({name: bytes}, {name: bytes}) writes images and masks of the split train, and returns the root."""

    def write(images, masks, split="train"):
        for kind, files in (("images", images), ("masks", masks)):
            folder = tmp_path / "data" / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (folder / name).write_bytes(content)
        BOOK.save(tmp_path / "data" / "colorbook.json")
        return tmp_path / "data"

    return write


def stems(root, **options):
    pairs = Pairs(root, "train", (8, 8), **options)
    assert all(np.array_equal(pairs.planes[i, 3], SCENE) for i in range(len(pairs)))
    assert np.abs(pairs.planes[:, :3].permute(0, 2, 3, 1).numpy().astype(int) - BOOK.paint(SCENE)).mean() < 6  # JPEG
    return [stem for stem, _, _ in pairs.files]


def test_mixed_suffixes_and_case(data):
    """Suffixes of all kinds, in capitals or not, make pairs, on every system."""
    jpeg, big = encode(BOOK.paint(SCENE), "jpeg"), encode(BOOK.paint(SCENE), "bmp")
    images = {"a.JPG": jpeg, "b.jpeg": jpeg, "c.PNG": IMAGE, "d.Bmp": big, "e.tiff": encode(BOOK.paint(SCENE), "tiff")}
    masks = {"a.png": MASK, "b.PNG": MASK, "c.bmp": encode(SCENE, "bmp"), "d.TIF": encode(SCENE, "tiff"), "e.png": MASK}
    assert stems(data(images, masks)) == ["a", "b", "c", "d", "e"]


def test_what_systems_leave_in_folders(data):
    """What Finder, Explorer and editors leave in a folder is no image."""
    rubbish = {".DS_Store": b"\0\0\0\1Bud1", "._a.png": b"\0\5\26\7", ".b.png": b"", "Thumbs.db": b"", "notes.txt": b"",
               "c.png~": b""}
    root = data({"a.png": IMAGE} | rubbish, {"a.png": MASK} | rubbish)
    for kind in ("images", "masks"):
        (root / "train" / kind / "folder.png").mkdir()
        (root / "train" / kind / "old").mkdir()
    assert stems(root) == ["a"]


def test_only_sub_folders(data):
    """Masks in sub-folders are refused, with the shape that is expected."""
    root = data({"a.png": IMAGE}, {})
    (root / "train" / "masks" / "zurich").mkdir()
    with pytest.raises(ValueError, match=r"no pairs; expected .*masks/NAME.*without sub-folders"):
        stems(root)


@pytest.mark.parametrize("name", [
    "köln 道路 ü", "Straße nach Süden (2)", "it's (1) [copy] #2 %d", "a.b.c", "x" * 240, "-n", "trailing "])
def test_names_as_people_give_them(data, name):
    """Names with spaces, umlauts, marks, dots, in another script, or of full length are found."""
    if os.name == "nt" and len(name) > 200:
        pytest.skip("Windows has no paths of this length")
    assert stems(data({f"{name}.png": IMAGE}, {f"{name}.png": MASK})) == [unicodedata.normalize("NFC", name)]


def test_names_taken_apart_by_macos(data):
    """A name with ö pairs with the same name from a Mac, which stores o and two dots."""
    whole, apart = (unicodedata.normalize(form, "Köln_é") for form in ("NFC", "NFD"))
    assert whole != apart
    assert stems(data({f"{whole}.png": IMAGE}, {f"{apart}.png": MASK})) == [whole]


def test_stems_that_differ_in_case(data):
    """Where the system tells a from A they are two pairs, and never mixed up."""
    root = data({"a.png": IMAGE}, {"a.png": MASK})
    if (root / "train" / "masks" / "A.PNG").exists():
        pytest.skip("this system does not tell a from A")
    root = data({"A.png": IMAGE, "b.png": IMAGE}, {"A.png": MASK, "B.png": MASK})
    pairs = Pairs(root, "train", (8, 8))
    assert [(stem, image.stem, mask.stem) for stem, image, mask in pairs.files] == [("A", "A", "A"), ("a", "a", "a")]


@pytest.mark.parametrize("name", ["道路", b"\xff"], ids=["another script", "no text"])
def test_names_that_the_terminal_cannot_show(data, tiny, tmp_path, monkeypatch, name):
    """Names that an old terminal cannot show are printed with escapes, and the run goes on."""
    root = data({"a.png": IMAGE}, {"a.png": MASK})
    shutil.copytree(root / "train", root / "val")
    try:
        with open(os.path.join(os.fsencode(root / "train" / "images"), os.fsencode(name) + b".png"), "wb") as file:
            file.write(IMAGE)
    except (OSError, UnicodeDecodeError):
        pytest.skip("this file system takes text only")
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tiny(data__root=root)))
    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tmp_path / "my.yaml"), "--dry-run"])
    main()
    screen.flush()
    printed = screen.buffer.getvalue()
    assert b"1 image(s) without a mask left out: \\u" in printed and b"dry run" in printed


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links(data, tmp_path):
    """Links to files elsewhere are followed; dead ones and loops are refused by name."""
    root = data({}, {})
    (tmp_path / "elsewhere.png").write_bytes(IMAGE)
    for stem in ("good", "dead", "loop"):
        (root / "train" / "masks" / f"{stem}.png").write_bytes(MASK)
    images = root / "train" / "images"
    (images / "good.png").symlink_to(tmp_path / "elsewhere.png")
    assert stems(root) == ["good"]
    (images / "dead.png").symlink_to(tmp_path / "nowhere.png")
    (images / "loop.png").symlink_to(images / "loop.png")
    (images / "parent").symlink_to(images)
    with pytest.raises(ValueError, match="2 of 3 pairs") as error:
        stems(root)
    assert "dead.png" in str(error.value) and "loop.png" in str(error.value) and "good.png" not in str(error.value)


PHOTO = encode(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8))
BAD = {"cut.png": (IMAGE, MASK[:60]), "empty.png": (b"", MASK), "small.png": (IMAGE, encode(SCENE[:4])),
       "ids.png": (IMAGE, encode(SCENE + 7)), "swapped.png": (MASK, PHOTO)}


@pytest.mark.parametrize("memory_gb", [0, 4])
def test_all_bad_pairs_are_listed(data, memory_gb):
    """All bad pairs are listed at once, ten of them by name, and the good ones are not."""
    good = {f"{i:04d}.png" for i in range(400)}
    root = data(dict.fromkeys(good, IMAGE) | {name: image for name, (image, _) in BAD.items()},
                dict.fromkeys(good, MASK) | {name: mask for name, (_, mask) in BAD.items()})
    with pytest.raises(ValueError, match="5 of 405 pairs cannot be used") as error:
        Pairs(root, "train", (8, 8), memory_gb=memory_gb)
    lines = str(error.value).splitlines()
    assert len(lines) == 6 and all(any(name in line for line in lines[1:]) for name in BAD)
    for i in range(17):
        (root / "train" / "masks" / f"{i:04d}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="22 of 405 pairs cannot be used.*(\n.*){10}\n... and 12 more$"):
        Pairs(root, "train", (8, 8), memory_gb=memory_gb)


@pytest.mark.parametrize("memory_gb", [0, 4])
@pytest.mark.parametrize("split, kind", [("train", "images"), ("val", "masks")])
def test_dry_run_reads_every_file(tiny, flat_root, tmp_path, capsys, memory_gb, split, kind):
    """--dry-run reads every file of train and val, and refuses a damaged one by name."""
    root = tmp_path / "copy"
    shutil.copytree(flat_root, root)
    cfg = tiny(data__root=root, data__memory_gb=memory_gb)
    train(cfg, dry_run=True)
    printed = capsys.readouterr().out
    assert "50 pairs" in printed and "10 pairs" in printed and "dry run" in printed and not Path(cfg["out"]).exists()
    victim = sorted((root / split / kind).iterdir())[7]
    victim.write_bytes(victim.read_bytes()[:-30])
    with pytest.raises(ValueError, match=f"1 of .* pairs cannot be used(.|\n)*{victim.name}"):
        train(cfg, dry_run=True)
    assert not Path(cfg["out"]).exists()


def test_pairs_of_different_sizes(data):
    """Images of many sizes, tall and wide, become planes of one size."""
    sizes = [(8, 8), (16, 8), (9, 40), (8, 13), (64, 64)]
    images, masks = {}, {}
    for i, (h, w) in enumerate(sizes):
        ids = np.full((h, w), i % 4, np.uint8)
        images[f"{i}.png"], masks[f"{i}.png"] = encode(BOOK.paint(ids)), encode(ids)
    pairs = Pairs(data(images, masks), "train", (8, 16))
    assert pairs.planes.shape == (5, 4, 8, 16) and all((pairs.planes[i, 3] == i % 4).all() for i in range(5))


def test_a_set_as_people_have_it(data):
    """JPEG and 16-bit images with umlauts and spaces in their names are read to the same pixels as 8-bit PNGs."""
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040  # 0..65520: 255 is 65535
    images = {"Grüne Gasse 1.JPG": encode(np.full((8, 8, 3), (10, 200, 90), np.uint8), "jpeg", quality=95),
              "Grüne Gasse 2.png": encode(grey), "Grüne Gasse 3.tif": encode(grey, "tiff"),
              "Grüne Gasse 4.png": encode((grey // 257).astype(np.uint8))}
    masks = {f"Grüne Gasse {i}.png": MASK for i in range(1, 5)}
    pairs = Pairs(data(images, masks), "train", (8, 8))
    assert np.abs(pairs.planes[0, :3].numpy().astype(int) - np.array([10, 200, 90])[:, None, None]).max() <= 4
    for i in (1, 2, 3):
        assert np.abs(pairs.planes[i, :3].numpy() - grey / 257).max() <= 1
    assert all(np.array_equal(planes[3], SCENE) for planes in pairs.planes)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_in_an_image_is_black(tmp_path, mode):
    """By an alpha channel, half of which is half as bright, or by one colour that stands for it."""
    rgb, alpha, options = BOOK.paint(SCENE), np.where(SCENE == 1, 0, 255).astype(np.uint8), {}
    if mode in ("RGBA", "LA"):
        alpha[SCENE == 2] = 128
        rgb = rgb if mode == "RGBA" else np.repeat(SCENE[..., None] * 50 + 40, 3, axis=2)
        image = Image.fromarray(np.dstack([rgb if mode == "RGBA" else rgb[..., 0], alpha]))
    else:
        image = Image.fromarray(SCENE if mode == "P" else rgb)
        options["transparency"] = 1 if mode == "P" else tuple(CLASSES["sky"])
        if mode == "P":
            image.putpalette(BOOK.colors.tobytes())
    image.save(tmp_path / "a.png", **options)
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.mode == mode
    assert np.abs(read_image(tmp_path / "a.png") - rgb * (alpha[..., None] / 255)).max() <= 1
