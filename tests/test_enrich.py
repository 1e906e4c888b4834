"""Enriching a data set: shapes, places, edits, what the judge leaves out, resuming; and the study of its worth."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import CLASSES, LOOKS
from PIL import Image
from scipy.ndimage import binary_dilation

import evaluate
from data.common import write_dataset
from dataset import read_image
from evaluate import build_segmenter, resample
from experiments import drawing, enrich, enrich_study, segmenter
from masks import UNLABELLED, Colorbook, read_mask

BOOK = Colorbook(CLASSES)
ROAD, SKY, CAR, PERSON = range(4)
SHAPES = {CAR: np.array([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 1, 1]], bool),
          PERSON: np.array([[0, 1], [1, 1], [1, 1], [1, 0]], bool)}


def stand(ids, k, row, column):
    """Put the shape of class k into ids, so that it stands on `row`."""
    h, w = SHAPES[k].shape
    ids[row - h : row, column : column + w][SHAPES[k]] = k


def scene(i):
    """image (16, 24, 3) and ids (16, 24): sky and road, a car in the left half, a person in the right one, noise."""
    rng = np.random.default_rng(i)
    ids = np.full((16, 24), ROAD, np.uint8)
    ids[:6] = SKY
    stand(ids, CAR, rng.integers(10, 15), rng.integers(1, 7))
    stand(ids, PERSON, rng.integers(11, 15), rng.integers(13, 21))
    return (LOOKS[ids] + rng.integers(-9, 10, (16, 24, 3))).clip(0, 255).astype(np.uint8), ids


@pytest.fixture
def root(tmp_path):
    """A prepared set of two drives in train, and of a third one in test."""
    train = [(f"{'ab'[i % 2]}_{i}", lambda i=i: scene(i)) for i in range(12)]
    test = [(f"c_{i}", lambda i=i: scene(i)) for i in range(20, 24)]
    write_dataset(tmp_path / "prepared", BOOK, {"train": train, "test": test})
    return tmp_path / "prepared"


def sees_the_left_half(name, colorbook, device):
    """A judge of known answers: each pixel has the class of the nearest colour, but right of the middle all is road."""
    def segment(images):
        distance = (images.permute(0, 2, 3, 1)[..., None, :].float() - torch.from_numpy(LOOKS).float()).norm(dim=-1)
        ids = distance.argmin(-1).byte()
        ids[:, :, 12:] = ROAD
        return ids

    segment.image_size = [16, 24]
    return segment


@pytest.fixture
def enriched(root, untrained, tmp_path, monkeypatch):
    """enriched("--n", 4, ...) runs the program on the toy streets and returns its folder."""
    monkeypatch.setattr(drawing, "load_segmenter", sees_the_left_half)
    checkpoint = untrained(sample__steps=3, sample__guidance=1.0)

    def call(*options, out="out"):
        words = ["--root", root, "--checkpoint", checkpoint, "--classes", "person, car", "--judge", "judge.pt",
                 "--least", 3, "--device", "cpu", "--out", tmp_path / out, *options]
        monkeypatch.setattr(sys, "argv", ["enrich", *map(str, words)])
        enrich.main()
        return tmp_path / out

    return call


def lines_of(out):
    return [json.loads(line) for line in (out / "edits.jsonl").read_text().splitlines()]


def result_of(out, line):
    """The new image and mask of a line, the real ones, and where the masks differ."""
    folder = out if line["accepted"] else out / "rejected"
    image, mask = read_image(folder / "images" / line["image"]), read_mask(folder / "masks" / line["image"], BOOK)[0]
    real, ids = scene(int(line["place"]["in"][2:]))
    return image, mask, real, ids, mask != ids


# -------------------------------------------------------------------------------------------------- shapes and places


def test_shapes_come_out_as_they_were():
    """A shape is cut out to the pixel, with its box and what it stands on; others are left out, each for its reason."""
    ids = np.full((2, 20, 30), ROAD, np.uint8)
    ids[:, :8] = SKY
    stand(ids[1], CAR, 12, 7)
    ids[0, 5:9, 0:3] = ids[1, 16, 20] = CAR                     # at the edge; of one pixel
    ids[0, 6:18, 10:13] = ids[1, 12:15, 20:23] = CAR            # of 12 rows; above unlabelled pixels
    ids[1, 15, 20:23], ids[0, 13:16, 20:22], ids[0, 9:13, 20:22] = UNLABELLED, PERSON, CAR  # and on a person
    shapes, left_out = enrich.cut_shapes(ids, CAR, [CAR, PERSON], 3)
    assert len(shapes) == 1 and (shapes[0]["mask"] == SHAPES[CAR]).all()
    assert (shapes[0]["source"], shapes[0]["box"], shapes[0]["ground"]) == (1, (9, 7, 12, 12), ROAD)
    assert sorted(left_out.values()) == [1, 1, 1, 2] and left_out["of less than 3 pixels"] == 1


def test_sizes_follow_the_row():
    """The growth of height with the row is found, and is none where the rows do not differ."""
    shapes = [{"box": (0, 0, row, 1), "mask": np.ones((round(40 * np.exp(0.05 * row)), 1))} for row in range(0, 60, 5)]
    assert enrich.growth(shapes) == pytest.approx(0.05, abs=1e-3)
    assert enrich.growth(shapes[:1] * 9) == 0


def test_free_columns_are_all_of_them():
    """A shape may stand exactly where each of its lowest pixels has the ground beneath, and it hides nothing rare."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids, shape = rng.choice(4, (12, 15), p=[0.7, 0.1, 0.1, 0.1]).astype(np.uint8), rng.random((3, 3)) < 0.5
        shape[:, 1] = True
        row, expected = int(rng.integers(1, 12)), []
        for x in range(13):
            stands = all(ids[row, x + j] == ROAD for j in range(3) if shape[2, j])
            hidden = [ids[row - 3 + i, x + j] for i in range(3) for j in range(3) if row >= 3 and shape[i, j]]
            if row >= 3 and stands and CAR not in hidden:
                expected.append(x)
        assert enrich.free_columns(shape, ids, row, ROAD, [CAR]).tolist() == expected


def test_a_shape_is_scaled_to_its_row():
    """Placed lower, a shape is larger by the growth; and it stands on a row on which another one of its class does."""
    ids = np.stack([scene(i)[1] for i in range(12)])
    shapes, _ = enrich.cut_shapes(ids, CAR, [CAR], 3)
    rows, seen = {shape["box"][2] for shape in shapes}, set()
    for seed in range(60):
        place = enrich.find_place(shapes, 0.1, ids, [CAR, PERSON], 3, np.random.default_rng(seed))
        top, left, bottom, right = place["box"]
        expected = np.array([3, 5]) * np.exp(0.1 * (bottom - place["shape"]["box"][2]))
        assert np.abs(expected - place["mask"].shape).max() <= 0.5 and bottom in rows
        assert (bottom - top, right - left) == place["mask"].shape and place["scene"] != place["shape"]["source"]
        assert (ids[place["scene"], bottom, left:right][place["mask"][-1]] == ROAD).all()
        seen.add(place["mask"].shape)
    assert len(seen) > 2


def test_nothing_floats():
    """The lowest pixels of a thing are on the row that was asked for, above its ground, also where it has shrunk."""
    ids = np.full((8, 32, 24), ROAD, np.uint8)
    ids[:, :20:3] = SKY  # most rows are no road
    legs = np.array([[1, 1, 1]] * 5 + [[0, 1, 0]], bool)
    shapes = [{"source": i % 8, "box": (row - 6, 3, row, 6), "mask": legs, "ground": ROAD}
              for i, row in enumerate(range(8, 30))]
    assert not enrich.resize(legs, [4, 2])[-1].any()  # the middle column is gone, and with it the foot
    for seed in range(200):
        place = enrich.find_place(shapes, 0.05, ids, [CAR], 3, np.random.default_rng(seed))
        top, left, bottom, right = place["box"]
        new = np.zeros((32, 24), bool)
        new[top:bottom, left:right] = place["mask"]
        foot = np.flatnonzero(new.any(axis=1))[-1]
        assert foot == bottom - 1 and (ids[place["scene"], foot + 1][new[foot]] == ROAD).all()


def test_without_a_place_there_is_none():
    """A shape whose ground is in no other mask finds no place."""
    ids = np.stack([scene(0)[1], np.full((16, 24), SKY, np.uint8)])
    shapes, _ = enrich.cut_shapes(ids, CAR, [CAR], 3)
    assert len(shapes) == 1
    assert enrich.find_place(shapes, 0.0, ids, [CAR], 3, np.random.default_rng(0)) is None


# ------------------------------------------------------------------------------------------------------------ the edits


def test_edits_are_what_their_lines_tell(enriched, exact, root):
    """Each line names shape, place and seed; the mask differs there alone, and every kept pixel has all its bits."""
    for path in sorted((root / "test").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()  # nothing of it is needed
    out = enriched("--n", 8, "--seen", 0, "--seed", 5)
    assert sorted(path.name for path in out.iterdir()) == [
        "colorbook.json", "edits.jsonl", "images", "masks", "rejected", "report.json", "settings.json", "sheet.png"]
    lines = lines_of(out)
    assert [line["class"] for line in lines] == ["person", "car"] * 4
    assert [line["seed"] for line in lines] == [*range(5, 13)]
    for line in lines:
        image, mask, real, ids, changed = result_of(out, line)
        top, left, bottom, right = line["place"]["box"]
        source, box = scene(int(line["shape"]["from"][2:]))[1], line["shape"]["box"]
        k = BOOK.names.index(line["class"])
        assert (source[box[0] : box[2], box[1] : box[3]] == k).sum() == SHAPES[k].sum()
        expected = np.zeros((16, 24), bool)
        expected[top:bottom, left:right] = SHAPES[k]  # of one size in all scenes
        assert (changed == expected).all() and (mask[changed] == k).all() and line["place"]["on"] == "road"
        assert line["shape"]["from"] != line["place"]["in"]
        near = binary_dilation(changed, np.ones((3, 3)))  # the margin: a pixel, at this size
        assert (image[~near] == real[~near]).all()
        assert np.abs(image[changed].astype(int) - LOOKS[k]).mean() < 30


def test_what_the_judge_does_not_see_is_left_out(enriched, exact, capsys):
    """Accepted is what it sees in the wanted share of pixels; the rates are told, and each class gets its number."""
    out = enriched("--n", 10, "--seen", 0.5, "--tries", 20, "--set", "sample.batch_size=3")
    lines, report = lines_of(out), json.loads((out / "report.json").read_text())
    for line in lines:
        changed = result_of(out, line)[-1]
        share = changed[:, :12].sum() / changed.sum()
        assert line["seen"] == pytest.approx(share, abs=1e-4) and line["accepted"] == (share >= 0.5)
        assert line["seen_before"] == 0  # nothing of these classes was there
    text = capsys.readouterr().out
    assert report["car"]["no place"] == 0
    for name, unseen in {"person": 1.0, "car": 0.0}.items():  # in the real scenes, on the right and on the left
        accepted = [line["accepted"] for line in lines if line["class"] == name]
        rejected = accepted.count(False) / len(accepted)
        assert sum(accepted) == 5 and 0 < rejected < 1
        assert report[name]["rejected"] == pytest.approx(rejected) and report[name]["real shapes unseen"] == unseen
        assert report[name]["seen before"] == 0
        assert f"{name}: {len(accepted)} edits with 12 shapes, 5 accepted" in text
        assert f"{rejected:.0%} of the edits, nor in {unseen:.0%} of the real shapes" in text
    assert len(list((out / "images").iterdir())) == 10 == len(list((out / "masks").iterdir()))


def test_a_judge_that_sees_nothing_ends_the_run(enriched, monkeypatch, capsys):
    """After --tries edits for each image the program ends, and says that there are no more."""
    def blind(images):
        return torch.full_like(images[:, 0], SKY)

    blind.image_size = None
    monkeypatch.setattr(drawing, "load_segmenter", lambda *names: blind)
    out = enriched("--n", 2, "--tries", 3)
    assert len(lines_of(out)) == 6 and not list((out / "images").iterdir())
    assert "0 images of 2" in capsys.readouterr().out


def test_a_class_without_a_place_ends_nothing(enriched, exact, root, monkeypatch, capsys):
    """Tries that find no place are counted, a class without shapes is skipped, and the others get their images."""
    find = enrich.find_place
    monkeypatch.setattr(enrich, "find_place", lambda shapes, *others: (
        None if (shapes[0]["mask"].shape == SHAPES[PERSON].shape) else find(shapes, *others)))
    out = enriched("--n", 6, "--tries", 3, "--seen", 0, "--classes", "person,car,sky")
    lines, report = lines_of(out), json.loads((out / "report.json").read_text())
    assert [line["seed"] for line in lines] == list(range(1, 13))
    assert [(report[name]["shapes"], report[name]["no place"], report[name]["accepted"])
            for name in ("person", "car", "sky")] == [(12, 9, 0), (12, 0, 3), (0, 0, 0)]
    assert report["sky"]["rejected"] is None and report["person"]["real shapes unseen"] == 1
    assert "no shape of sky can be put elsewhere: the class is skipped" in capsys.readouterr().out


def test_stopped_and_resumed(enriched, monkeypatch):
    """Stopped after the first batch, the same command ends with the same files, bit for bit."""
    options = "--n", 9, "--seen", 0.2, "--set", "sample.batch_size=4"
    whole = enriched(*options, out="whole")
    batches, real = [], enrich.sample.sample_jobs

    def stops(*args, **kwargs):
        batches.append(0)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(enrich.sample, "sample_jobs", stops)
    with pytest.raises(SystemExit):
        enriched(*options, out="parts")
    monkeypatch.setattr(enrich.sample, "sample_jobs", real)
    parts = enriched(*options, out="parts")
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert len(files) > 20 and all((whole / name).read_bytes() == (parts / name).read_bytes() for name in files)
    assert sorted(files) == sorted(path.relative_to(parts) for path in parts.rglob("*") if path.is_file())


@pytest.mark.parametrize("case, words", [
    ("class", ["--classes carr", "road, sky, car, person", "did you mean car?"]),
    ("no shape", ["no shape of sky", "12 cut off by the edge", "--least"]),
    ("judge", ["judge.pt", "lacks sky, car, person"]),
    ("generator", ["untrained.pt knows the classes road, sky, car, person", "dog", "train a generator"]),
    ("judge in place", ["another judge", "choose another --out"]),
    ("other files", ["no settings.json"]),
    ("other settings", ["another n, seen", "choose another --out"]),
    ("no data", ["train/images: no such folder"]),
    ("25 per cent", ["--seen 25", "0 to 1"]),
])
def test_mistakes_are_messages(enriched, root, tmp_path, monkeypatch, case, words):
    """A mistake is one line that says what was found and what to do."""
    options = ["--n", 2]
    if case == "class":
        options += ["--classes", "carr"]
    elif case == "no shape":
        options += ["--classes", "sky"]
    elif case == "judge":
        monkeypatch.setattr(drawing, "load_segmenter", evaluate.load_segmenter)
        arch, classes = "lraspp_mobilenet_v3_large", {"road": [1, 2, 3], "dog": [4, 5, 6]}
        state = {"arch": arch, "model": build_segmenter(arch, 2).state_dict(), "colorbook": classes}
        torch.save(state, tmp_path / "judge.pt")
        options += ["--judge", tmp_path / "judge.pt"]
    elif case == "generator":
        Colorbook({"dog": [1, 2, 3]} | CLASSES).save(root / "colorbook.json")
        for path in (root / "train" / "masks").iterdir():
            Image.new("L", (24, 16)).save(path)
    elif case == "judge in place":
        (tmp_path / "judge.pt").write_bytes(b"trained")
        options += ["--judge", tmp_path / "judge.pt"]
        enriched(*options)
        (tmp_path / "judge.pt").write_bytes(b"trained again")
    elif case == "other files":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
    elif case == "other settings":
        enriched(*options)
        options = ["--n", 3, "--seen", 0.1]
    elif case == "25 per cent":
        options += ["--seen", 25]
    elif case == "no data":
        options += ["--root", tmp_path]
    with pytest.raises(SystemExit) as stopped:
        enriched(*options)
    message = str(stopped.value.code)
    assert message.startswith("error: ") and all(word in message for word in words), message


# ------------------------------------------------------------------------------------------------------------ the study


class Pixelwise(torch.nn.Module):
    """A stand-in for a segmenter that looks at one pixel at a time."""

    def __init__(self, arch, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, num_classes, 1)

    def forward(self, x):
        return {"out": self.conv(x)}


@pytest.fixture
def study(root, untrained, exact, tmp_path, monkeypatch):
    """study("--seeds", 2, ...) runs the study on the toy streets; returns its folder, the order of what happened, and
    the class weights of all trainings of as many steps."""
    for module in (segmenter, evaluate):
        monkeypatch.setattr(module, "build_segmenter", Pixelwise)
    checkpoint, events, weights = untrained(sample__steps=2, sample__guidance=1.0), [], {}
    train, pairs, edit = enrich_study.train_segmenter, enrich_study.Pairs, enrich.run

    def note_training(pairs, settings, seed, *others):
        events.append(f"train {seed}, {settings['steps']} steps")
        weights.setdefault(settings["steps"], []).append(settings["class_weights"])

    monkeypatch.setattr(enrich_study, "train_segmenter", lambda *a: note_training(*a) or train(*a))
    monkeypatch.setattr(enrich_study, "Pairs", lambda *a, **k: events.append(a[1]) or pairs(*a, **k))
    monkeypatch.setattr(enrich, "run", lambda args: events.append("enrich") or edit(args))

    def call(*options):
        events.clear()
        words = ["--root", root, "--checkpoint", checkpoint, "--classes", "person,car", "--drive", "^[a-z]", "--shares",
                 50, 100, "--steps", 2, 3, "--seen", 0, "--least", 3, "--out", tmp_path / "study", "--device", "cpu",
                 *options]
        monkeypatch.setattr(sys, "argv", ["enrich_study", *map(str, words)])
        enrich_study.main()
        return tmp_path / "study", events, weights

    return call


def test_the_study_end_to_end(study, root, capsys):
    """Arms have equal masks or numbers, a share is made of itself alone, held-out drives come last, runs are kept."""
    out, events, weights = study("--seeds", 1)
    judges = ["train 1000, 2 steps", "train 1000, 3 steps"]
    assert [event for event in events if event.startswith("train ")] == [
        *judges, *["train 0, 2 steps"] * 4, *["train 0, 3 steps"] * 3]  # images drawn as a whole at one share only
    assert events.count("enrich") == 2 and events.count("test") == 1
    assert events.index("test") > events.index("train 0, 2 steps") > len(events) - 1 - events[::-1].index("enrich")
    for steps, share in ((2, out / "share050" / "prepared"), (3, root)):  # of real pairs, whatever is added
        of_real = segmenter.class_weights(segmenter.Pairs(share, "train", (16, 24))).tolist()
        assert weights[steps] == [of_real] * (5 if steps == 2 else 4)
    for share, n in (("share050", 6), ("share100", 12)):
        lines = lines_of(out / share / "enriched")
        stems = {path.stem for path in (out / share / "prepared" / "train" / "images").glob("*")}
        assert len(stems) == (6 if n == 6 else 0) and len(lines) == n
        assert len(list((out / share).glob("plain/images/*"))) == (n if n == 6 else 0)
        for line in lines:
            assert n == 12 or {line["shape"]["from"], line["place"]["in"]} <= stems
            mask, real, ids, changed = result_of(out / share / "enriched", line)[1:]
            pasted = read_image(out / share / "pasted" / "images" / line["image"])
            assert (read_mask(out / share / "pasted" / "masks" / line["image"], BOOK)[0] == mask).all()
            (top, left, bottom, right), k = line["shape"]["box"], BOOK.names.index(line["class"])
            source = scene(int(line["shape"]["from"][2:]))[0][top:bottom, left:right]
            assert (pasted[~changed] == real[~changed]).all() and (pasted[changed] == source[SHAPES[k]]).all()
    rows = [row.split(" | ") for row in (out / "table.md").read_text().splitlines() if row.startswith("| 50 % | 1 |")]
    assert [row[2] for row in rows] == ["IoU of person", "IoU of car", "IoU of road", "IoU of sky", "mean IoU",
                                        "pixel accuracy"]
    study("--seeds", 2)
    assert [event for event in events if event.startswith("train ")] == [
        *["train 1, 2 steps"] * 4, *["train 1, 3 steps"] * 3]
    table = (out / "table.md").read_text()
    assert "| 100 % | 2 | mean IoU | " in capsys.readouterr().out
    assert sorted(path.name for path in out.glob("share050/*_seed*.pt")) == [
        f"{arm}_seed0.pt" for arm in ("enriched", "pasted", "plain", "real")]
    notes = [line for line in table.splitlines() if line.startswith("The generator at ")]  # trained on other scenes
    assert [note.split(",")[0] for note in notes] == ["The generator at 50 %", "The generator at 100 %"]
    with pytest.raises(SystemExit, match="share050/settings.json: begun with another steps"):
        study("--steps", 4)


def test_a_generator_of_the_share_alone_is_not_noted(root, untrained, tmp_path):
    """Whether a generator knows more than its share is read from its checkpoint, however many checkpoints there are."""
    path = untrained(data__root=root)
    assert enrich_study.note_generator(path, 100, root) == ""
    note = enrich_study.note_generator(path, 10, tmp_path / "share010" / "prepared")
    assert f"at 10 %, {path}, was trained on {root}, not on this share" in note


def image(hit, missed):
    return [[hit, missed], [0, 10]]  # of class road: IoU hit / (hit + missed)


def test_the_figures_of_the_table():
    """IoU and differences are those that one gets by hand; bold is what the interval does not doubt."""
    real = [[image(5, 5), image(5, 5)], [image(4, 6), image(6, 4)]]      # IoU of road 0.5 in both seeds
    better = [[image(8, 2), image(7, 3)], [image(9, 1), image(7, 3)]]    # 0.75 and 0.8
    runs = {"real": np.array(real), "enriched": np.array(better), "pasted": np.array(real)}
    rows = [line.split(" | ") for line in enrich_study.score_table({10: runs}, ["road", "dog"], ["dog"],
                                                                   np.array([0, 1]))]
    assert rows[0][4:] == ["enriched - pasted", "enriched - real", "pasted - real", "plain - real |"]
    assert [row[2] for row in rows[2:6]] == ["IoU of dog", "IoU of road", "mean IoU", "pixel accuracy"]
    road = rows[3]
    assert road[3] == "0.5000 ± 0.0000" and road[4] == road[5] and road[5].startswith("+0.2750 [-")
    assert road[6:] == ["+0.0000 [+0.0000, +0.0000]", "- |"]
    counts = resample(2, 2, None)[0]
    values = enrich_study.all_scores(better, counts, ["road", "dog"])["road"]
    assert values[0].tolist() == [0.75, 0.8] and set(values[counts[:, 1] == 2, 0]) == {0.7}
    steady = {"real": np.array(real[:1] * 2), "pasted": np.array([[image(8, 2)] * 2] * 2)}
    rows = enrich_study.score_table({10: steady | {"enriched": steady["real"]}}, ["road", "dog"], [], np.array([0, 1]))
    assert "| **+0.3000** [+0.3000, +0.3000] | - |" in rows[2]


def test_the_interval_covers_seeds_and_drives():
    """Where drives agree it is Student's t of the seeds, where seeds agree that of the drives, else both add up; frames
    of one drive are one observation."""
    seeds = np.array([0.03, 0.01, 0.02, 0.05, 0.04])  # their mean has a deviation of 0.00707
    draws = np.concatenate([[[0]], np.tile([[0.01], [-0.01]], (500, 1))])  # deviation 0.01
    reach = {}
    for name, difference in {"seeds": seeds + 0 * draws, "drives": 0.03 + draws + 0 * seeds, "both": seeds + draws,
                             "none": 0 * seeds + 0 * draws}.items():
        mean, (low, high) = enrich_study.compare(difference, 10)
        assert mean == pytest.approx(0.03 if name != "none" else 0) and (low + high) / 2 == pytest.approx(mean)
        reach[name] = high - mean
    assert reach["seeds"] == pytest.approx(2.7764 * 0.0070711, rel=1e-4)  # t(4)
    assert reach["drives"] == pytest.approx(2.2622 * 0.01, rel=1e-4)  # t(9)
    # variance 0.5e-4 + 1e-4; degrees of freedom 2.25 / (0.25 / 4 + 1 / 9) = 12.96, where t = 2.161
    assert reach["both"] == pytest.approx(2.161 * 1.5e-4**0.5, rel=1e-3) and reach["none"] == 0
    assert enrich_study.compare(draws, 10)[1] is None and enrich_study.compare(seeds + draws, 1)[1] is None
    frames = np.array([[image(9, 1)] * 5 + [image(2, 8)] * 5] * 2), np.array([[image(5, 5)] * 10] * 2)
    runs = {10: {"real": frames[1], "enriched": frames[0], "pasted": frames[1]}}
    widths = []
    for drive_index in (np.arange(10), np.repeat([0, 1], 5)):
        cell = enrich_study.score_table(runs, ["road", "dog"], [], drive_index)[2].split(" | ")[5]
        low, high = re.search(r"\[(.*), (.*)\]", cell).groups()
        widths.append(float(high) - float(low))
    assert widths[1] > 2 * widths[0]


@pytest.mark.parametrize("options, words", [
    (["--drive", "^[a-z]_[0-9]"], ["drive(s), such as", "both train and test"]),
    (["--drive", "x"], ["--drive x", "12 of the 12 names"]),
    (["--shares", 0, 100], ["--shares [0, 100]"]),
    (["--shares", 10], ["--steps: 2 for 1 shares"]),
    (["--checkpoint", "a", "b", "--shares", 10, "--steps", 1], ["--checkpoint: 2 for 1 shares"]),
    (["--steps", 1, 0], ["--steps [1, 0]"]),
    (["--split", "val"], ["val"]),
])
def test_mistakes_in_the_study(study, root, tmp_path, options, words):
    """A mistake is one line; a drive in both splits is one of them."""
    if "^[a-z]_[0-9]" in options:
        (root / "train" / "images" / "a_0.png").rename(root / "train" / "images" / "c_20.png")
    with pytest.raises(SystemExit) as stopped:
        study(*options)
    assert all(word in str(stopped.value.code) for word in ["error: ", *words]), stopped.value.code
    assert not (tmp_path / "study").exists()


def test_a_generator_for_each_share(study, root, tmp_path, capsys):
    """Where a checkpoint is missing, the share that it has to be trained on is there, and the message names it."""
    with pytest.raises(SystemExit) as stopped:
        study("--checkpoint", tmp_path / "untrained.pt", tmp_path / "missing.pt")
    assert "missing.pt: no such checkpoint" in stopped.value.code and f"data.root={root}" in stopped.value.code
    assert len(list((tmp_path / "study" / "share050" / "prepared" / "train" / "images").iterdir())) == 6


def test_rare_classes_weigh_more(root):
    """With --balance the weights are as 1 / sqrt(share of the pixels), and a mean pixel weighs 1."""
    pairs = enrich_study.Pairs(root, "train", (16, 24))
    pairs.planes[:, 3] = SKY
    pairs.planes[:, 3, :4, :6], pairs.planes[:, 3, 8:, :] = CAR, UNLABELLED  # 168 of sky, 24 of car in each
    weights = segmenter.class_weights(pairs)
    assert weights[CAR] / weights[SKY] == pytest.approx(7**0.5)
    assert weights[CAR] * 24 + weights[SKY] * 168 == pytest.approx(192)
    planes, logits = pairs.planes[:1], torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    loss = segmenter.segmentation_loss(lambda x: {"out": logits}, planes, (16, 24), torch.no_grad(), weights)
    log_p, ids = logits.log_softmax(1), planes[0, 3].numpy()
    expected = [-log_p[0, k, y, x] * weights[k] for (y, x), k in np.ndenumerate(ids) if k != UNLABELLED]
    assert loss == pytest.approx(sum(expected).item() / 192, rel=1e-4)
