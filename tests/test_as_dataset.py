"""sample.py --as-dataset and --only: pairs that train a segmenter, of the masks that have what is rare."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import CLASSES
from PIL import Image

import sample as sample_module
from data.common import write_dataset
from dataset import Pairs
from experiments.segmenter import add_extra, match_masks
from masks import Colorbook, save_mask


@pytest.fixture
def checkpoint(untrained):
    return untrained(sample__steps=2, sample__guidance=2.0)


@pytest.fixture
def make(checkpoint, tmp_path, monkeypatch):
    """make("--n", 2, ...) runs sample.py on masks/; returns the folder named by --as-dataset."""

    def call(*options):
        arguments = ["--checkpoint", checkpoint, "--device", "cpu", "--mask", tmp_path / "masks", "--as-dataset",
                     tmp_path / "more", *options]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        sample_module.main()
        return tmp_path / "more"

    return call


@pytest.fixture
def masks(tmp_path):
    """Twelve masks of 64x96: a car in the first eight, a person in the first and the ninth; {stem: ids}."""
    (tmp_path / "masks").mkdir()
    layouts = {}
    for i in range(12):
        ids = np.zeros((64, 96), np.uint8)
        ids[:30] = 1
        if i < 8:
            ids[32:48, 8:24] = 2
        if i in (0, 8):
            ids[32:48, 40:48] = 3
        ids[50:52, i] = 255
        layouts[f"m{i:02}"] = ids
        save_mask(ids, tmp_path / "masks" / f"m{i:02}.png", Colorbook(CLASSES))
    return layouts


def names(out):
    return sorted(path.stem for path in (out / "images").iterdir())


def test_what_comes_out_is_a_split(make, masks):
    """images/ and masks/ have the same names, the masks are as the model saw them, and Pairs reads the folder."""
    out = make("--n", 2)
    assert sorted(path.name for path in out.iterdir()) == ["colorbook.json", "images", "masks", "sheet.png"]
    expected = [f"m{i:02}_w2_seed{seed}" for i in range(12) for seed in (1 + 2 * i, 2 + 2 * i)]
    assert names(out) == sorted(expected)
    assert list(json.loads((out / "colorbook.json").read_text()).items()) == list(CLASSES.items())
    pairs = Pairs(out, ".", (16, 24))
    assert len(pairs) == 24
    for (stem, image, mask), planes in zip(pairs.files, pairs.planes):
        whole = masks[stem.split("_")[0]]
        assert (planes[3].numpy() == whole[2::4, 2::4]).all()  # NEAREST: the middle of 4x4 pixels
        assert Image.open(mask).mode == "P" and Image.open(image).size == (24, 16)


def test_it_trains_a_segmenter(make, masks, tmp_path):
    """experiments.segmenter --extra takes the folder as it is, each image with its own mask."""
    out = make("--n", 1)
    used = match_masks(out, out / "masks")
    assert len(used) == 12 and all(image.stem == mask.stem for image, mask in used.items())
    write_dataset(tmp_path / "real", Colorbook(CLASSES), {
        "train": [("a", lambda: (np.zeros((16, 24, 3), np.uint8), np.zeros((16, 24), np.uint8)))]})
    pairs = Pairs(tmp_path / "real", "train", (16, 24))
    add_extra(pairs, used)
    assert len(pairs) == 13


def test_only_masks_with_a_class(make, masks, capsys):
    """--only takes the masks that have one of the classes, and every class gets the same number of images."""
    out = make("--n", 2, "--only", "car,person")
    made = Counter(name.split("_")[0] for name in names(out))
    assert set(made) == {f"m{i:02}" for i in range(9)} and sum(made.values()) == 18
    # weights: a car in 8 masks, 1/8 each; a person in 2, 1/2 each; the sum is 2, for 18 images
    expected = {"m00": 9 * (1 / 8 + 1 / 2), "m08": 9 / 2} | {f"m{i:02}": 9 / 8 for i in range(1, 8)}
    assert all(abs(made[stem] - share) < 1 for stem, share in expected.items()), made
    text = capsys.readouterr().out
    assert "8 of 12 masks have car" in text and "2 of 12 masks have person" in text


def test_stopped_and_resumed(make, masks, monkeypatch):
    """--resume makes what is missing, of the same masks and seeds, and leaves what is there."""
    out = make("--n", 1, "--only", "person,car")
    before = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    gone = sorted(before)[2]
    gone.unlink()
    (out / "masks" / gone.name).unlink()
    runs, real = [], sample_module.noise_like_seeds
    monkeypatch.setattr(sample_module, "noise_like_seeds", lambda seeds, *a: runs.extend(seeds) or real(seeds, *a))
    make("--n", 1, "--only", "person,car", "--resume")
    assert len(runs) == 1 and gone.stem.endswith(f"seed{runs[0]}")
    assert (out / "masks" / gone.name).exists()
    assert all((path.stat().st_mtime_ns == time) == (path != gone) for path, time in before.items())


def test_an_edited_image_and_its_mask(make, masks, tmp_path):
    """With --image the pair is the whole edited image and its whole mask."""
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "street.png")
    out = make("--n", 1, "--image", tmp_path / "street.png", "--mask", tmp_path / "masks" / "m08.png", "--image-mask",
               tmp_path / "masks" / "m09.png")
    assert names(out) == ["m08_w2_seed1"]
    pairs = Pairs(out, ".", (64, 96))
    assert (pairs.planes[0, 3].numpy() == masks["m08"]).all()
    assert (pairs.planes[0, :3].permute(1, 2, 0).numpy()[:20] == image[:20]).all()


@pytest.mark.parametrize("options, words", [
    (["--only", "tree"], ["tree", "road, sky, car, person"]),
    (["--only", "person"], ["no mask has person"]),
    (["--unconditional", 2], ["--unconditional", "--as-dataset"]),
    (["--as-dataset", "."], ["the masks are in it"]),
    (["--as-dataset", "theirs"], ["theirs", "holds images"]),
    (["--as-dataset", "others"], ["others", "colorbook.json"]),
])
def test_mistakes_are_messages(make, tmp_path, monkeypatch, options, words):
    """A mistake is one line that names it, and nothing of other people's is written to."""
    monkeypatch.chdir(tmp_path)
    for folder in ("masks", "theirs/images", "others/images"):
        (tmp_path / folder).mkdir(parents=True)
    Colorbook({"dog": [1, 2, 3]}).save(tmp_path / "others" / "colorbook.json")
    save_mask(np.zeros((16, 24), np.uint8), tmp_path / "masks" / "a.png", Colorbook(CLASSES))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        make(*options)
    assert all(word in stopped.value.code for word in ["error: ", *words]), stopped.value.code
    assert sorted(tmp_path.rglob("*")) == before


def test_out_and_as_dataset(make, masks, capsys):
    """--out beside --as-dataset is refused: there would be two places."""
    with pytest.raises(SystemExit):
        make("--out", "elsewhere")
    assert "not allowed with argument" in capsys.readouterr().err
