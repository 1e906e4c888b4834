"""The judge of evaluate.py, and the augmentation study."""

import json
import sys

import numpy as np
import pytest
import torch
import torchvision
from conftest import CLASSES
from PIL import Image

import evaluate
from dataset import Pairs
from experiments import segmenter
from masks import Colorbook, save_mask

MAGENTA = (255, 0, 255)  # of the stand-ins for generated pictures: a colour that no real picture has


class Pixelwise(torch.nn.Module):
    """A stand-in for a segmenter that looks at one pixel at a time, and remembers what it was shown while training."""

    seen = []

    def __init__(self, arch, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, num_classes, 1)

    def forward(self, x):
        if self.training:
            magenta = segmenter.normalise(torch.tensor(MAGENTA, dtype=torch.uint8).view(1, 3, 1, 1))
            generated = (x - magenta).abs().amax(dim=(1, 2, 3)) < 1e-3
            Pixelwise.seen.append((len(x), int(generated.sum()), self.conv.weight.detach().clone()))
        return {"out": self.conv(x)}


@pytest.fixture
def small(monkeypatch):
    """Puts the stand-in in the place of the networks, and returns what it notes down."""
    for module in (segmenter, evaluate):
        monkeypatch.setattr(module, "build_segmenter", Pixelwise)
    monkeypatch.setitem(segmenter.AUGMENT, "p", 0.0)  # else the colours change
    Pixelwise.seen = []
    return Pixelwise


@pytest.fixture
def command(flat_root, tmp_path, monkeypatch):
    """command("--steps", 3, ...) runs the experiment on the flat scenes in this process and returns results.json."""

    def call(*options, root=flat_root):
        options = ["--root", root, "--out", tmp_path / "run", "--device", "cpu", "--batch-size", 4, *options]
        monkeypatch.setattr(sys, "argv", ["segmenter.py", *map(str, options)])
        segmenter.main()
        return json.loads((tmp_path / "run" / "results.json").read_text())

    return call


@pytest.fixture
def generated(tmp_path):
    """A folder as sample.py leaves it, from two train masks: four pictures and a sheet."""
    (tmp_path / "out").mkdir()
    for stem in ("flat_1_w3_seed1", "flat_1_w3_seed2", "flat_12_w1.5_seed1", "flat_12_w1.5_seed2", "sheet"):
        Image.new("RGB", (16, 16), MAGENTA).save(tmp_path / "out" / f"{stem}.png")
    return tmp_path / "out"


def test_judge_learns_and_evaluate_loads_it(command, flat_root, tmp_path):
    """evaluate.py would be given a judge that knows nothing, or would read another answer out of it."""
    results = command("--arch", "lraspp_mobilenet_v3_large", "--steps", 24, "--scale", 3, "--batch-size", 8, "--lr", 1e-2)
    val = Pairs(flat_root, "val", (16, 16))
    images, ids = val.planes[:, :3], val.planes[:, 3]
    segment, found = evaluate.load_segmenter(tmp_path / "run" / "checkpoint.pt", val.colorbook, torch.device("cpu"))
    predicted = segment(images)
    accuracy = (predicted == ids).double().mean().item()
    assert results["runs"]["real"]["0"]["val"]["pixel accuracy"] == pytest.approx(accuracy, abs=1e-9)
    most_frequent = np.bincount(ids.numpy().ravel()).max() / ids.numel()
    assert accuracy > (1 + most_frequent) / 2, (accuracy, most_frequent)
    assert list(found) == [0, 1, 2, 3]


def test_study_differs_in_the_pictures_alone(command, generated, small, capsys):
    """The study would compare different trainings, or the generated pictures would never be seen."""
    command("--extra", generated, "--seeds", 2, "--steps", 15)
    printed = capsys.readouterr().out
    assert "4 generated pictures of 2 masks added to 50 real pairs" in printed and "sheet.png left out" in printed
    runs = [small.seen[i : i + 15] for i in range(0, 60, 15)]  # real 0, added 0, real 1, added 1
    assert len(small.seen) == 60 and {n for n, _, _ in small.seen} == {4}
    assert [sum(generated for _, generated, _ in run) for run in runs[0::2]] == [0, 0]
    assert all(4 <= sum(generated for _, generated, _ in run) <= 8 for run in runs[1::2])  # 60 of 54 pairs: each once or twice
    first = [run[0][2] for run in runs]
    assert torch.equal(first[0], first[1]) and torch.equal(first[2], first[3]) and not torch.equal(first[0], first[2])


def test_generated_pictures_get_the_mask_they_were_made_from(flat_root, tmp_path):
    """A generated car would be taught as a person, or masks larger than the pictures be refused."""
    pairs = Pairs(flat_root, "train", (16, 16))
    (tmp_path / "out").mkdir(), (tmp_path / "masks").mkdir()
    for stem, k in {"a": 0, "a_1": 1, "b": 2}.items():
        save_mask(np.full((32, 48), k, np.uint8), tmp_path / "masks" / f"{stem}.png", Colorbook(CLASSES))
    expected = {"a": 0, "a_2": 0, "a_w3_seed1": 0, "a_1_w3_seed1": 1, "a_1": 1, "b_w1.5_seed12": 2}
    for stem in expected:
        Image.new("RGB", (24, 16), MAGENTA).save(tmp_path / "out" / f"{stem}.png")
    segmenter.add_extra(pairs, tmp_path / "out", tmp_path / "masks")
    assert len(pairs) == 56 and len(pairs.planes) == 56
    for i in range(50, 56):
        assert (pairs.planes[i, 3] == expected[pairs.files[i][0]]).all() and pairs.planes[i, 1].max() == 0


def test_finished_runs_are_kept(command, generated, small, monkeypatch):
    """An hour of training would be lost to Ctrl-C, or figures of different settings be mixed."""
    study, real = ("--extra", generated, "--steps", 3), segmenter.train_segmenter

    def interrupted(pairs, settings, seed, *rest):
        if seed == 1:
            raise KeyboardInterrupt
        return real(pairs, settings, seed, *rest)

    monkeypatch.setattr(segmenter, "train_segmenter", interrupted)
    with pytest.raises(SystemExit, match="stopped"):
        command(*study, "--seeds", 2)
    assert len(small.seen) == 6  # two nets of 3 steps
    monkeypatch.setattr(segmenter, "train_segmenter", real)
    two = command(*study, "--seeds", 2)
    assert len(small.seen) == 12
    three = command(*study, "--seeds", 3)
    assert command(*study, "--seeds", 3) == three  # nothing left to do
    assert len(small.seen) == 18 and list(three["runs"]["real"]) == ["0", "1", "2"]
    assert all(three["runs"][name][seed] == two["runs"][name][seed] for name in two["runs"] for seed in ("0", "1"))
    Image.new("RGB", (16, 16), MAGENTA).save(generated / "flat_3_w3_seed1.png")
    for other, word in ((("--steps", 4), "steps"), ((), "pairs")):
        with pytest.raises(SystemExit, match=f"results.json: made with another {word}"):
            command(*study, *other)


def test_paired_by_hand():
    """The verdict would rest on a wrong spread."""
    c = segmenter.paired([0.40, 0.42, 0.41], [0.43, 0.43, 0.43])  # differences 0.03, 0.01, 0.02; t(2) = 4.3027
    assert c["real"] == pytest.approx({"mean": 0.41, "std": 0.01}) and c["real + generated"] == pytest.approx({"mean": 0.43, "std": 0})
    assert c["difference"] == pytest.approx({"mean": 0.02, "std": 0.01})
    assert c["interval"] == pytest.approx([0.02 - 4.3027 * 0.01 / 3**0.5, 0.02 + 4.3027 * 0.01 / 3**0.5], abs=1e-6)
    assert segmenter.paired([0.4], [0.5])["interval"] is None


@pytest.mark.parametrize("added, words", [
    ([0.43, 0.43, 0.43], "within the noise"), ([0.430, 0.449, 0.441], "helped"), ([0.370, 0.389, 0.381], "harmed"),
    ([0.43], "one seed")])
def test_verdict(added, words, capsys):
    """40.0 -> 40.3 could not be told from noise."""
    real = {str(i): {"val": {"mean IoU": value, "rare": None}} for i, value in enumerate([0.40, 0.42, 0.41])}
    extra = {str(i): {"val": {"mean IoU": value, "rare": None}} for i, value in enumerate(added)}
    study = segmenter.report({"real": real, "real + generated": extra}, ["val"], list(extra))
    assert words in study["val"]["verdict"] and words in capsys.readouterr().out and "rare" not in study["val"]


def test_unlabelled_pixels_teach_nothing(flat_root, small):
    """A judge would die of an unlabelled pixel, or of a picture without labels."""
    pairs = Pairs(flat_root, "train", (16, 16))
    settings = {"arch": "", "size": [16, 16], "steps": 60, "batch_size": 4, "lr": 0.1, "precision": "fp32", "backbone": None}
    pairs.planes[:40, 3] = 255  # four of five pictures: as any class, they would drown the others
    net = segmenter.train_segmenter(pairs, settings, 0, torch.device("cpu"), "test")
    images, ids = pairs.planes[:, :3], pairs.planes[:, 3]
    predicted = net(segmenter.normalise(images))["out"].argmax(1)
    assert (predicted == ids)[ids != 255].float().mean() > 0.95


def test_backbone_file(tmp_path):
    """Pretrained weights would be asked for and not be used."""
    torch.manual_seed(1)
    classifier = torchvision.models.mobilenet_v3_large()
    torch.save(classifier.state_dict(), tmp_path / "mobilenet.pth")
    net = evaluate.build_segmenter("lraspp_mobilenet_v3_large", 4)
    segmenter.load_backbone(net, tmp_path / "mobilenet.pth")
    for i in (0, 16):
        assert torch.equal(net.backbone[str(i)][0].weight, classifier.features[i][0].weight)
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "resnet.pth")
    for other in (tmp_path / "resnet.pth", "README.md"):
        with pytest.raises(ValueError, match=f"{other}: not the weights of this backbone"):
            segmenter.load_backbone(net, other)


@pytest.mark.parametrize("options, words", [
    ("--root nowhere", ["nowhere", "no such folder"]),
    ("--arch unet", ["unet", "deeplabv3_resnet50"]),
    ("--batch-size 1", ["--batch-size 1", "2 or more"]),
    ("--seeds 3", ["--seeds", "--extra"]),
    ("--extra nowhere", ["nowhere", "no such folder"]),
    ("--extra {tmp}/out --extra-masks nowhere", ["nowhere", "no such folder"]),
    ("--extra {tmp}/out --extra-masks {root}/val/masks", ["val", "judged by"]),
    ("--extra {tmp}/strange", ["strange", "none of its 2 pictures", "flat_0_w3_seed1.png", "--extra-masks"]),
    ("--extra {root}/train/masks", ["flat_0.png", "palette", "masks"]),
    ("--extra {tmp}/out --extra-masks {tmp}/classes", ["flat_12.png", "unknown class ids 7"]),
    ("--extra {tmp}/broken", ["flat_1_2.png", "not readable as a picture"]),
    ("--backbone nowhere.pth", ["nowhere.pth", "No such file"]),
])
def test_mistakes_are_messages(command, generated, flat_root, tmp_path, options, words):
    """A mistake would end in a traceback, or be found after an hour of training."""
    for folder in ("strange", "classes", "broken"):
        (tmp_path / folder).mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16)).save(tmp_path / "strange" / f"other_{i}.png")
    for stem in ("flat_1", "flat_12"):
        Image.fromarray(np.full((16, 16), 7, np.uint8)).save(tmp_path / "classes" / f"{stem}.png")
    (tmp_path / "broken" / "flat_1_2.png").write_bytes((generated / "flat_1_w3_seed1.png").read_bytes()[:60])
    with pytest.raises(SystemExit) as stopped:
        command("--steps", 1, *options.format(tmp=tmp_path, root=flat_root).split())
    assert str(stopped.value.code).startswith("error: ") and all(word in stopped.value.code for word in words), stopped.value.code
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("steps", [1, 9])
def test_shortest_trainings(command, small, steps):
    """Somebody who tries the command out would meet a division by zero in the learning rate's cycle."""
    assert command("--steps", steps)["runs"]["real"]["0"]["test"]["mean IoU"] >= 0 and len(small.seen) == steps
