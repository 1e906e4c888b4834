"""The experiments: the segmenter as judge and in the augmentation study, the count of pixels, FSDP beside DDP."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from conftest import CLASSES, LOOKS
from PIL import Image

import evaluate
from config import load_config
from data.common import write_dataset
from dataset import Pairs
from ddpm import Diffusion
from experiments import count, segmenter
from masks import UNLABELLED, Colorbook, one_hot, save_mask
from unet import UNet

MAGENTA = (255, 0, 255)  # of the stand-ins for generated images: a colour that no real image has

# ----------------------------------------------------------------------------------------------- the segmenter


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
        monkeypatch.setattr(sys, "argv", ["segmenter", *map(str, options)])
        segmenter.main()
        out = options[len(options) - options[::-1].index("--out")]
        return json.loads((out / "results.json").read_text())

    return call


@pytest.fixture
def generated(tmp_path):
    """A folder as sample.py leaves it, from two train masks: four images and a sheet."""
    (tmp_path / "out").mkdir()
    for stem in ("flat_1_w3_seed1", "flat_1_w3_seed2", "flat_12_w1.5_seed1", "flat_12_w1.5_seed2", "sheet"):
        Image.new("RGB", (16, 16), MAGENTA).save(tmp_path / "out" / f"{stem}.png")
    return tmp_path / "out"


def test_judge_learns_and_evaluate_loads_it(command, flat_root, tmp_path):
    """The judge learns, evaluate.py reads the same answers out of it, and it knows the size of its images."""
    options = "--arch", "lraspp_mobilenet_v3_large", "--steps", 24, "--scale", 3, "--batch-size", 8, "--lr", 0.01
    results = command(*options)
    val = Pairs(flat_root, "val", (16, 16))
    images, ids = val.planes[:, :3], val.planes[:, 3]
    segment = evaluate.load_segmenter(tmp_path / "run" / "checkpoint.pt", val.colorbook, torch.device("cpu"))
    predicted = segment(images)
    accuracy = (predicted == ids).double().mean().item()
    assert results["runs"]["real"]["0"]["val"]["pixel accuracy"] == pytest.approx(accuracy, abs=1e-9)
    most_frequent = np.bincount(ids.numpy().ravel()).max() / ids.numel()
    assert accuracy > (1 + most_frequent) / 2, (accuracy, most_frequent)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (state["image_size"], state["size"]) == ([16, 16], [48, 48])


def test_study_differs_in_the_pictures_alone(command, generated, small, capsys):
    """Both arms of the study have the same steps, seeds and first weights; only one of them sees generated images."""
    command("--extra", generated, "--seeds", 2, "--steps", 15)
    assert "4 generated images of 2 masks added to 50 real pairs" in capsys.readouterr().out
    runs = [small.seen[i : i + 15] for i in range(0, 60, 15)]  # real 0, added 0, real 1, added 1
    assert len(small.seen) == 60 and {n for n, _, _ in small.seen} == {4}
    assert [sum(generated for _, generated, _ in run) for run in runs[0::2]] == [0, 0]
    for run in runs[1::2]:  # 60 images of 54 pairs: each once or twice
        assert 4 <= sum(generated for _, generated, _ in run) <= 8
    first = [run[0][2] for run in runs]
    assert torch.equal(first[0], first[1]) and torch.equal(first[2], first[3]) and not torch.equal(first[0], first[2])


def test_generated_images_get_the_mask_they_were_made_from(flat_root, tmp_path):
    """An image is paired with the mask whose stem begins its name, the longest such stem, and fitted like it."""
    pairs = Pairs(flat_root, "train", (16, 16))
    (tmp_path / "out").mkdir()
    (tmp_path / "masks").mkdir()
    for stem, k in {"a": 0, "a_1": 1, "b": 2}.items():
        save_mask(np.full((32, 48), k, np.uint8), tmp_path / "masks" / f"{stem}.png", Colorbook(CLASSES))
    expected = {"a": 0, "a_2": 0, "a_w3_seed1": 0, "a_1_w3_seed1": 1, "a_1": 1, "b_w1.5_seed12": 2}
    for stem in expected:
        Image.new("RGB", (24, 16), MAGENTA).save(tmp_path / "out" / f"{stem}.png")
    segmenter.add_extra(pairs, segmenter.match_masks(tmp_path / "out", tmp_path / "masks"))
    assert len(pairs) == 56 and len(pairs.planes) == 56
    for i in range(50, 56):
        assert (pairs.planes[i, 3] == expected[pairs.files[i][0]]).all() and pairs.planes[i, 1].max() == 0


@pytest.mark.parametrize("where", ["--extra-masks", "in the folder"])
def test_masks_of_the_judged_splits_are_refused(command, flat_root, tmp_path, small, where):
    """A mask of val by its name, or of test by its content under another name, is named and refused; others are not."""
    masks = tmp_path / "masks" if where == "--extra-masks" else tmp_path / "out" / "masks"
    images = tmp_path / "out" if where == "--extra-masks" else tmp_path / "out" / "images"
    masks.mkdir(parents=True)
    images.mkdir(parents=True, exist_ok=True)
    own = np.array(Image.open(flat_root / "train" / "masks" / "flat_1.png"))
    test = np.array(Image.open(flat_root / "test" / "masks" / "flat_203.png"))
    unlike = np.full((16, 16), 3, np.uint8)
    for stem, ids in {"flat_104": unlike, "renamed": test, "mine": own}.items():
        save_mask(ids, masks / f"{stem}.png", Colorbook(CLASSES))
        Image.new("RGB", (16, 16), MAGENTA).save(images / f"{stem}_w2_seed1.png")
    options = ["--extra", tmp_path / "out", "--steps", 1, "--seeds", 1]
    options += ["--extra-masks", masks] if where == "--extra-masks" else []
    with pytest.raises(SystemExit) as stopped:
        command(*options)
    message = str(stopped.value.code)
    assert message.startswith("error: 2 of 3 masks") and "mine" not in message
    assert "flat_104.png has the name of val/masks/flat_104.png" in message
    assert "renamed.png has the content of test/masks/flat_203.png" in message
    for stem in ("flat_104", "renamed"):
        (images / f"{stem}_w2_seed1.png").unlink()
    assert command(*options)["settings"]["pairs"]["real + generated"][0] == 51


def test_default_size_is_that_of_the_generated_images(command, generated, small, tmp_path):
    """Without --detail the study is at the size of the generated images, a judge at that of the data."""
    for path in generated.glob("*.png"):
        Image.new("RGB", (8, 24), MAGENTA).save(path)
    study = command("--extra", generated, "--steps", 1, "--seeds", 1, "--scale", 3)
    assert (study["settings"]["detail"], study["settings"]["size"]) == ([24, 8], [72, 24])
    state = torch.load(tmp_path / "run" / "real_seed0.pt", weights_only=True)
    assert (state["image_size"], state["size"]) == ([24, 8], [72, 24])
    assert command("--steps", 1, "--out", tmp_path / "alone")["settings"]["detail"] == [16, 16]
    assert command("--steps", 1, "--out", tmp_path / "finer", "--detail", "32x24")["settings"]["detail"] == [32, 24]


class Dropping(torch.nn.Module):
    """A stand-in with batch norm and dropout, which presses Ctrl-C in the steps that are named in `stops`."""

    calls, stops = 0, ()

    def __init__(self, arch, num_classes):
        super().__init__()
        conv = torch.nn.Conv2d(3, num_classes, 1)
        self.net = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.3), conv)

    def forward(self, x):
        if self.training:
            Dropping.calls += 1
            if Dropping.calls in Dropping.stops:
                os.kill(os.getpid(), signal.SIGINT)
        return {"out": self.net(x)}


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to oneself there")
def test_an_interrupted_training_goes_on(command, monkeypatch, tmp_path, capsys):
    """A judge that was stopped by Ctrl-C twice ends with the weights of one that was not, bit for bit."""
    for module in (segmenter, evaluate):
        monkeypatch.setattr(module, "build_segmenter", Dropping)
    command("--steps", 15, "--out", tmp_path / "undisturbed")
    Dropping.calls, Dropping.stops = 0, (4, 11)
    for step in (4, 11):
        with pytest.raises(SystemExit) as stopped:
            command("--steps", 15)
        assert stopped.value.code == 130 and f"step {step} of 15 is saved" in capsys.readouterr().err
        assert not (tmp_path / "run" / "checkpoint.pt").exists()
    with pytest.raises(SystemExit, match="error: .*checkpoint.unfinished.pt: begun with other settings"):
        command("--steps", 15, "--lr", 0.1)
    command("--steps", 15)
    assert Dropping.calls == 15 and not list((tmp_path / "run").glob("*unfinished*"))
    one, two = (torch.load(tmp_path / out / "checkpoint.pt", weights_only=True) for out in ("undisturbed", "run"))
    assert all(torch.equal(one["model"][key], two["model"][key]) for key in one["model"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_finished_runs_are_kept(command, generated, small, monkeypatch):
    """What a study has finished before Ctrl-C is not trained again; a study of other settings is refused."""
    study, real = ("--extra", generated, "--steps", 3), segmenter.train_segmenter

    def interrupted(pairs, settings, seed, *rest):
        if seed == 1:
            raise KeyboardInterrupt
        return real(pairs, settings, seed, *rest)

    monkeypatch.setattr(segmenter, "train_segmenter", interrupted)
    with pytest.raises(SystemExit, match="130"):
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
    for other, word in ((("--steps", 4), "steps"), (("--balance",), "pairs, class_weights"), ((), "pairs")):
        with pytest.raises(SystemExit, match=f"results.json: made with another {word}"):
            command(*study, *other)


def test_paired_by_hand():
    """Mean, deviation and interval of differences 0.03, 0.01, 0.02 are those by hand; t(2) = 4.3027."""
    c = segmenter.paired([0.40, 0.42, 0.41], [0.43, 0.43, 0.43])
    assert c["real"] == pytest.approx({"mean": 0.41, "std": 0.01})
    assert c["real + generated"] == pytest.approx({"mean": 0.43, "std": 0})
    assert c["difference"] == pytest.approx({"mean": 0.02, "std": 0.01})
    assert c["interval"] == pytest.approx([0.02 - 4.3027 * 0.01 / 3**0.5, 0.02 + 4.3027 * 0.01 / 3**0.5], abs=1e-6)
    assert segmenter.paired([0.4], [0.5])["interval"] is None


@pytest.mark.parametrize("added, words", [
    ([0.43, 0.43, 0.43], "within the noise"), ([0.430, 0.449, 0.441], "helped"), ([0.370, 0.389, 0.381], "harmed"),
    ([0.43], "one seed")])
def test_verdict(added, words, capsys):
    """A verdict is given only where the interval leaves out 0, and none from one seed."""
    real = {str(i): {"val": {"mean IoU": value, "rare": None}} for i, value in enumerate([0.40, 0.42, 0.41])}
    extra = {str(i): {"val": {"mean IoU": value, "rare": None}} for i, value in enumerate(added)}
    study = segmenter.report_study({"real": real, "real + generated": extra}, ["val"], list(extra))
    assert words in study["val"]["verdict"] and words in capsys.readouterr().out
    assert "rare" not in study["val"]


def test_unlabelled_pixels_teach_nothing(flat_root, small, tmp_path):
    """With four of five images unlabelled, the labelled ones are learnt as if the others were not there."""
    pairs = Pairs(flat_root, "train", (16, 16))
    settings = {"arch": "", "size": [16, 16], "steps": 60, "batch_size": 4, "lr": 0.1, "precision": "fp32",
                "backbone": None}
    pairs.planes[:40, 3] = 255  # as any class, they would drown the others
    net = segmenter.train_segmenter(pairs, settings, 0, torch.device("cpu"), "test", tmp_path / "unfinished.pt")
    images, ids = pairs.planes[:, :3], pairs.planes[:, 3]
    predicted = net(segmenter.normalise(images))["out"].argmax(1)
    assert (predicted == ids)[ids != 255].float().mean() > 0.95


def test_backbone_file(tmp_path):
    """Pretrained weights arrive in the backbone; files of anything else are refused by name."""
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
    ("--extra {tmp}/strange", ["strange", "none of its 2 images", "flat_0_w3_seed1.png", "--extra-masks"]),
    ("--extra {root}/train/masks", ["flat_0.png", "palette", "masks"]),
    ("--extra {tmp}/out --extra-masks {tmp}/classes", ["flat_1.png", "unknown class ids 7"]),
    ("--extra {tmp}/broken", ["flat_1_2.png", "not readable"]),
    ("--backbone nowhere.pth", ["nowhere.pth", "No such file"]),
])
def test_mistakes_are_messages(command, generated, flat_root, tmp_path, options, words):
    """Each mistake is named in one line before the training, with what was expected."""
    for folder in ("strange", "classes", "broken"):
        (tmp_path / folder).mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16)).save(tmp_path / "strange" / f"other_{i}.png")
    for stem in ("flat_1", "flat_12"):
        Image.fromarray(np.full((16, 16), 7, np.uint8)).save(tmp_path / "classes" / f"{stem}.png")
    (tmp_path / "broken" / "flat_1_2.png").write_bytes((generated / "flat_1_w3_seed1.png").read_bytes()[:60])
    with pytest.raises(SystemExit) as stopped:
        command("--steps", 1, *options.format(tmp=tmp_path, root=flat_root).split())
    message = str(stopped.value.code)
    assert message.startswith("error: ") and all(word in message for word in words), message
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("steps", [1, 9])
def test_shortest_trainings(command, small, steps):
    """The cycle of the learning rate has no shortest length: one step trains too."""
    assert command("--steps", steps)["runs"]["real"]["0"]["test"]["mean IoU"] >= 0
    assert len(small.seen) == steps


# ---------------------------------------------------------------------------------------------------- the count


def test_count(tmp_path, monkeypatch, capsys):
    """The table, the CSV file and the bars have the pixels and images of each class, counted here by hand."""
    a, b = np.zeros((8, 10), np.uint8), np.full((8, 16), UNLABELLED, np.uint8)
    a[:2], b[:4] = 2, 0  # a: 60 road, 20 car; b: 64 road, 64 unlabelled
    pairs = [(stem, lambda ids=ids: (LOOKS[ids % 4], ids)) for stem, ids in {"a": a, "b": b}.items()]
    write_dataset(tmp_path / "data", Colorbook(CLASSES), {"val": pairs})
    monkeypatch.setattr(sys, "argv", ["count", "--root", str(tmp_path / "data"), "--split", "val",
                                      "--out", str(tmp_path / "counts")])
    count.main()
    with open(tmp_path / "counts.csv", newline="", encoding="utf-8") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    found = {name: (row["id"], row["pixels"], float(row["share"]), row["images"]) for name, row in rows.items()}
    assert found == {"road": ("0", "124", 124 / 208, "2"), "sky": ("1", "0", 0, "0"), "car": ("2", "20", 20 / 208, "1"),
                     "person": ("3", "0", 0, "0"), "unlabelled": ("255", "64", 64 / 208, "1")}
    with Image.open(tmp_path / "counts.png") as image:
        colors = {rgb: n for n, rgb in image.convert("RGB").getcolors(2**24)}
    bars = {name: colors[tuple(rgb)] - colors[tuple(CLASSES["sky"])] for name, rgb in CLASSES.items()}
    assert bars["person"] == bars["sky"] == 0 and bars["road"] / bars["car"] == pytest.approx(124 / 20, rel=0.05)
    assert re.search(r"0 road +124 +59\.615%", capsys.readouterr().out)


@pytest.mark.parametrize("options", ["--root nowhere", "--root {root} --split nowhere"])
def test_count_of_nothing(flat_root, monkeypatch, options):
    """A folder that is not there is named."""
    monkeypatch.setattr(sys, "argv", ["count", *options.format(root=flat_root).split()])
    with pytest.raises(SystemExit, match="error:.*nowhere"):
        count.main()


# --------------------------------------------------------------------------------------------------------- FSDP

SPY = """
import sys, torch
from experiments import fsdp
folder, train_steps, unpack = sys.argv.pop(1), fsdp.train_steps, fsdp.unpack

def spied_steps(kind, cfg, steps, device):
    model, seconds = train_steps(kind, cfg, steps, device)
    tensors = [fsdp.full_tensors([getattr(p, part) for p in model.parameters()], device) for part in ("data", "grad")]
    if fsdp.dist.get_rank() == 0:
        torch.save(tensors, f"{folder}/{kind}_{steps}.pt")
    return model, seconds

def spied_unpack(planes, num_classes):
    torch.save(planes, f"{folder}/planes.pt.{fsdp.dist.get_rank()}")
    return unpack(planes, num_classes)

fsdp.train_steps, fsdp.unpack = spied_steps, spied_unpack
fsdp.main()
"""
SETTINGS = ["device=cpu", "model.hidden_dim=8", "model.emb_dim=16", "data.size=[16,24]", "train.batch_size=4",
            "train.lr=0.001", "train.beta2=0.9", "train.label_drop=0.5", "train.precision=fp32",
            "diffusion.prediction=eps"]


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has FSDP for GPUs only")
def test_two_processes_take_the_steps_of_one(tmp_path):
    """DDP and FSDP in two processes have the gradient of the whole batch, and after two steps the weights, to rounding.

    The reference is written out here: the noisy image, the squared error of the noise, AdamW, in one process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": str(free.getsockname()[1])}
    options = ["--preset", "toy", "--steps", "2", *[word for setting in SETTINGS for word in ("--set", setting)]]
    processes = []
    for rank in "01":
        processes.append(subprocess.Popen(
            [sys.executable, "-c", SPY, str(tmp_path), *options], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=env | {"RANK": rank, "LOCAL_RANK": rank}))
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    planes = torch.load(tmp_path / "planes.pt.0")
    assert torch.equal(planes, torch.load(tmp_path / "planes.pt.1")) and planes.shape == (4, 4, 16, 24)

    cfg = load_config(None, "toy", SETTINGS)
    x0, mask = planes[:, :3] / 127.5 - 1, one_hot(planes[:, 3], 19)
    torch.manual_seed(cfg["seed"])
    model, diffusion = UNet(19, 8, 16), Diffusion(**cfg["diffusion"])
    initial = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, betas=(0.9, 0.9))
    torch.manual_seed(cfg["seed"])
    gradients = []
    for _ in range(2):
        t, eps, keep = diffusion.draw(x0.shape, 0.5, "cpu")
        abar = diffusion.alpha_bar[t].float()[:, None, None, None]
        loss = (model(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t, mask, keep=keep) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])

    def off(tensors, expected, scale):
        return (torch.cat([x.flatten() for x in tensors]) - expected).norm() / scale.norm()

    for kind in ("one process", "DDP", "FSDP"):
        assert off(torch.load(tmp_path / f"{kind}_1.pt")[1], gradients[0], gradients[0]) < 1e-5, kind
        assert off(torch.load(tmp_path / f"{kind}_2.pt")[0], weights, weights - initial) < 1e-3, kind
    rows = [line.split("|") for line in outputs[0][0].splitlines() if line.startswith("|")][2:]
    assert [row[1].strip() for row in rows] == ["one process", "DDP", "FSDP"] and not outputs[1][0]
    assert all(float(row[2]) > 0 and 1e-4 < float(row[3]) < 1 and float(row[4]) < 1e-5 for row in rows)


def test_a_judge_does_not_replace_a_generator(flat_root, tmp_path, monkeypatch):
    """The folder of a training run is refused as --out of the segmenter, and stays as it was."""
    from experiments import segmenter
    (tmp_path / "config.yaml").write_text("seed: 0")
    (tmp_path / "checkpoint.pt").write_bytes(b"a generator")
    monkeypatch.setattr(sys, "argv", ["segmenter.py", "--root", str(flat_root), "--out", str(tmp_path), "--steps", "1",
                                      "--arch", "lraspp_mobilenet_v3_large"])
    with pytest.raises(SystemExit, match="error: .*the folder of a generator's run"):
        segmenter.main()
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"a generator"


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has FSDP for GPUs only")
@pytest.mark.parametrize("options, words", [
    (["--steps", "1"], "--steps of 2 or more"), (["--set", "train.precision=fp16"], "fp32 or bf16"),
    (["--set", "device=mps"], "mps")])
def test_fsdp_mistakes(monkeypatch, options, words):
    """What this comparison cannot do is refused before anything is measured."""
    from experiments import fsdp
    monkeypatch.setattr(sys, "argv", ["fsdp", "--preset", "toy", "--set", "device=cpu", *options])
    monkeypatch.setattr(fsdp.dist, "init_process_group", lambda *args, **kwargs: None)
    with pytest.raises(SystemExit, match=f"error: .*{words}"):
        fsdp.main()


def test_fsdp_on_an_older_torch(monkeypatch):
    """A torch without streams on the CPU is named, with the remedy."""
    from experiments import fsdp
    monkeypatch.setattr(sys, "argv", ["fsdp", "--preset", "toy", "--set", "device=cpu"])
    monkeypatch.setattr(torch.cpu, "Stream", object)
    with pytest.raises(SystemExit, match="error: FSDP on the CPU needs a newer torch"):
        fsdp.main()
