"""The command that says how good pictures are: problems whose answer is known, and what happens with bad input."""

import json
import re
import shutil
import sys
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity.feature_extractor_inceptionv3 as inception
from conftest import CLASSES, LOOKS
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from skimage.metrics import structural_similarity

import evaluate
import sample
from dataset import list_files, read_image
from masks import UNLABELLED, Colorbook, read_mask, save_mask
from train import train

BOOK = Colorbook(CLASSES)
load_inception = evaluate.load_inception  # most tests put a stand-in in its place


class ByColour(torch.nn.Module):
    """A stand-in for a segmenter whose answer is known: the class whose look is nearest to the colour of the pixel.

    The nearest of some points is the largest of linear functions: |x - c|^2 = |x|^2 - 2 c.x + |c|^2.
    """

    def __init__(self, arch, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, num_classes, 1)

    def learn(self):
        looks = evaluate.normalise(torch.from_numpy(LOOKS)[:, :, None, None])
        self.load_state_dict({"conv.weight": 2 * looks, "conv.bias": -looks.square().sum((1, 2, 3))})
        return self

    def forward(self, x):
        return {"out": self.conv(x)}


class FewFeatures(torch.nn.Module):
    """A stand-in for Inception: 20 random projections of the picture at each layer, the other features zero."""

    def forward(self, x):
        made = torch.randn(x[0].numel(), 20, generator=torch.Generator().manual_seed(0))
        few = (x.flatten(1).float() / 255) @ made
        return torch.nn.functional.pad(few, (0, 44)), torch.nn.functional.pad(few.cos(), (0, 2028))


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """The checkpoint of the stand-in, as experiments/segmenter.py would write it."""
    path = tmp_path_factory.mktemp("judge") / "segmenter.pt"
    torch.save({"arch": "lraspp_mobilenet_v3_large", "model": ByColour("", 4).learn().state_dict(), "colorbook": CLASSES,
                "size": [16, 16], "step": 1}, path)
    return path


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command("--real", ...) runs evaluate.py in this process with the stand-ins, and returns its report.

    inception is what FID and KID are computed with where no file of weights is given: without it they are left out.
    """
    monkeypatch.setattr(evaluate, "build_segmenter", ByColour)

    def call(*options, out="report", inception=None):
        monkeypatch.setattr(evaluate, "load_inception", lambda file, device: load_inception(file, device) if file else inception)
        options = ["evaluate.py", "--device", "cpu", "--out", tmp_path / out, *options]
        monkeypatch.setattr(sys, "argv", [str(option) for option in options])
        evaluate.main()
        return json.loads((tmp_path / out / "report.json").read_text())

    return call


@pytest.fixture
def real(tmp_path, flat_root):
    """A split of 10 pairs in which a tenth of the pixels has the look of another class, so that the ceiling is below 1."""
    shutil.copytree(flat_root / "val", tmp_path / "real" / "val")
    shutil.copy(flat_root / "colorbook.json", tmp_path / "real")
    rng = np.random.default_rng(0)
    for path in (tmp_path / "real" / "val" / "images").iterdir():
        image = read_image(path)
        image[rng.random(image.shape[:2]) < 0.1] = LOOKS[rng.integers(4)]
        Image.fromarray(image).save(path)
    return tmp_path / "real" / "val"


@pytest.fixture
def fake(tmp_path):
    """fake(source, name=lambda stem: ..., change=lambda image: ...) is a folder of changed copies of a folder of pictures."""

    def make(source, name=lambda stem: f"{stem}_w3_seed1", change=lambda image: image, out="fake"):
        (tmp_path / out).mkdir(exist_ok=True)
        for stem, path in list_files(source).items():
            Image.fromarray(change(read_image(path))).save(tmp_path / out / f"{name(stem)}.png")
        return tmp_path / out

    return make


def value(report, name):
    return report["numbers"][name]["value"]


def by_hand(truth, seen, K):
    """Pixel accuracy and IoU per class in the words of their definition (Bozsó 2023, 5.8 and 5.9), one set at a time."""
    seen, truth = seen[truth != UNLABELLED], truth[truth != UNLABELLED]
    iou = [((truth == k) & (seen == k)).sum() / ((truth == k) | (seen == k)).sum() for k in range(K) if (truth == k).any()]
    return (truth == seen).mean(), np.mean(iou)


# ------------------------------------------------------------------------------------------------ single numbers


def test_iou_by_hand():
    """IoU and accuracy would be of some other quantity: rows for columns, unlabelled pixels counted, absent classes averaged."""
    truth = torch.tensor([[0, 0, 0, 1, 1, 255]], dtype=torch.uint8)
    seen = torch.tensor([[0, 0, 1, 1, 2, 0]], dtype=torch.uint8)
    confusion = evaluate.confusion_matrix(truth, seen, 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    accuracy, mean_iou, iou = evaluate.scores(confusion)
    assert accuracy == pytest.approx(3 / 5)
    assert iou[:2].tolist() == pytest.approx([2 / 3, 1 / 3])  # 2 of {0,0,0}, 1 of {1,1} and one 0 that was taken for 1
    assert torch.isnan(iou[2:]).all()  # 2 was seen but is not there; 3 is neither
    assert mean_iou == pytest.approx(1 / 2)


def test_iou_of_random_masks_agrees_with_its_definition():
    """The whole-set IoU would hold for the small case only."""
    rng = np.random.default_rng(0)
    truth, seen = rng.choice([0, 1, 2, 4, 255], (3, 20, 20)).astype(np.uint8), rng.integers(0, 5, (3, 20, 20)).astype(np.uint8)
    accuracy, mean_iou, _ = evaluate.scores(evaluate.confusion_matrix(*map(torch.from_numpy, (truth, seen)), 5))
    assert (accuracy, mean_iou) == pytest.approx(by_hand(truth, seen, 5))


def test_fid_of_two_gaussians_is_the_closed_form():
    """FID would not be the Fréchet distance of the features' Gaussians."""
    rng = np.random.default_rng(0)

    def exactly(mean, covariance, n=200):
        """n points that have this mean and covariance, not only on average."""
        x = rng.standard_normal((n, len(mean)))
        x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
        return torch.from_numpy(x @ np.linalg.cholesky(covariance).T + mean)

    m1, m2 = np.array([1.0, 2, 3]), np.array([0.0, 2, 5])
    a, b = np.array([1.0, 4, 9]), np.array([4.0, 4, 1])
    fid, _, _ = evaluate.fid_and_kid(exactly(m1, np.diag(a)), exactly(m2, np.diag(b)))
    assert fid == pytest.approx(5 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), abs=1e-8)  # 5 + 1 + 0 + 4
    A, B = np.diag(a), np.array([[2.0, 1, 0], [1, 3, 1], [0, 1, 2]])  # which do not commute
    fid, _, _ = evaluate.fid_and_kid(exactly(m1, A), exactly(m2, B))
    root = scipy.linalg.sqrtm(scipy.linalg.sqrtm(A) @ B @ scipy.linalg.sqrtm(A))
    assert fid == pytest.approx(5 + np.trace(A + B - 2 * root.real), abs=1e-8)


def test_kid_of_a_small_set_is_the_unbiased_estimate():
    """KID would crash below 100 pictures, or use another kernel or estimate than the thesis (5.5, 5.6)."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((6, 5)), rng.standard_normal((9, 5)) + 1
    _, kid, std = evaluate.fid_and_kid(torch.from_numpy(x), torch.from_numpy(y[:6]))

    def k(a, b):
        return (a @ b / 5 + 1) ** 3

    def mean_of_pairs(z):
        return np.mean([k(z[i], z[j]) for i in range(6) for j in range(6) if i != j])

    expected = mean_of_pairs(x) + mean_of_pairs(y[:6]) - 2 * np.mean([k(a, b) for a in x for b in y[:6]])
    assert kid == pytest.approx(expected) and std == pytest.approx(0, abs=1e-9)  # every subset is the whole set
    _, _, std = evaluate.fid_and_kid(torch.from_numpy(x), torch.from_numpy(y))
    assert std > 0  # 6 of 9


def test_ssim_is_that_of_the_thesis():
    """SSIM would have another window or other constants than formula 5.1 and so could not be compared."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (2, 11, 11)).astype(np.uint8)
    g = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g) / g.sum() ** 2
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, cov = ((w * a * b.astype(float)).sum() - (w * a).sum() * (w * b).sum() for a, b in ((x, x), (y, y), (x, y)))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert structural_similarity(x, y, **evaluate.SSIM) == pytest.approx(expected)  # of 11x11, only the centre counts


@pytest.mark.parametrize("name, settings, expected", [
    ("a_w3_seed7", {"mask": "a", "guidance": 3.0}, ("a", 3.0)),        # sample.py
    ("renamed", {"mask": "a", "guidance": 1.5}, ("a", 1.5)),
    ("a_w1.5_seed12", {}, ("a", 1.5)),                                 # the same, its text lost
    ("a", {}, ("a", None)),
    ("a_7", {}, ("a", None)),
    ("b_7", {}, ("b_7", None)),                                        # a stem that looks like a numbered one
    ("b_7_w3_seed1", {}, ("b_7", 3.0)),
    ("b_7_2", {}, ("b_7", None)),
    ("c_w3_seed1", {}, (None, 3.0)),
    ("unconditional_seed3", {"mask": None, "guidance": 0.0}, (None, 0.0)),
])
def test_names(name, settings, expected):
    """A picture would be compared with another one's mask."""
    assert evaluate.mask_of(name, settings, {"a", "b_7"}) == expected


# --------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file that fits Inception, with random weights, scaled so that pictures still differ at its end."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        net = inception.FeatureExtractorInceptionV3("", ["64"])
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(net.state_dict(), path)
    return path


def test_identical_folders(command, real, fake, judge, weights):
    """A perfect set would not get the perfect numbers, by the real Inception network and --inception-weights."""
    for path in sorted((real / "images").iterdir())[4:]:
        path.unlink()
    report = command("--real", real, "--fake", fake(real / "images"), "--segmenter", judge, "--inception-weights", weights)
    assert value(report, "SSIM") == pytest.approx(1)
    assert value(report, "FID, layer 64") == pytest.approx(0, abs=1e-3)
    assert value(report, "FID, layer 2048") == pytest.approx(0, abs=1e-2)
    assert value(report, "KID") < 3 * report["numbers"]["KID"]["std"] + 1e-6
    assert value(report, "share of the ceiling, mean IoU") == value(report, "share of the ceiling, pixel accuracy") == 1
    rows = report["segmentation"]["values"]
    assert rows["mean IoU"]["generated / mask"] == rows["mean IoU"]["real / mask"] < 1
    assert rows["mean IoU"]["generated / real"] == rows["pixel accuracy"]["generated / real"] == 1
    assert all(x["meaning"] and x["how"] and x["n"] for x in report["numbers"].values())
    assert "torch-fidelity 0" in report["numbers"]["FID, layer 64"]["how"] and "299x299" in report["numbers"]["KID"]["how"]
    assert any("FID from 4 pictures" in warning for warning in report["warnings"])


def test_ceiling_and_iou_agree_with_their_definition(command, real, fake, judge):
    """The columns would be of other sets than they say, or averaged per picture."""
    report = command("--real", real, "--fake", fake(real / "images", change=lambda x: x[::-1]), "--segmenter", judge)
    images = np.stack([read_image(path) for path in list_files(real / "images").values()])
    truth = np.stack([read_mask(path, BOOK)[0] for path in list_files(real / "masks").values()])
    seen = np.abs(images[..., None, :].astype(int) - LOOKS).sum(-1).argmin(-1)
    seen_fake, rows = seen[:, ::-1], report["segmentation"]["values"]
    sides = {"generated / mask": (truth, seen_fake), "real / mask": (truth, seen), "generated / real": (seen, seen_fake)}
    for column, (a, b) in sides.items():
        assert (rows["pixel accuracy"][column], rows["mean IoU"][column]) == pytest.approx(by_hand(a, b, 4)), column
    expected = by_hand(truth, seen_fake, 4)[1] / by_hand(truth, seen, 4)[1]
    assert value(report, "share of the ceiling, mean IoU") == pytest.approx(expected)


def test_shuffled_pairing_is_noticed_by_ssim_and_iou_alone(command, real, fake, judge):
    """SSIM and IoU would compare pictures of different masks, or FID would depend on names."""
    def brighter(image):
        return np.minimum(image, 235) + 20

    right = command("--real", real, "--fake", fake(real / "images", change=brighter), "--segmenter", judge,
                    inception=FewFeatures())
    stems = sorted(list_files(real / "images"))
    turned = dict(zip(stems, stems[1:] + stems[:1]))
    wrong = command("--real", real, "--fake", fake(real / "images", turned.get, brighter, "shuffled"), "--segmenter", judge,
                    inception=FewFeatures())
    assert value(wrong, "SSIM") < 0.9 * value(right, "SSIM")
    assert value(wrong, "share of the ceiling, mean IoU") < 0.9
    for layer in (64, 2048):
        assert value(wrong, f"FID, layer {layer}") == pytest.approx(value(right, f"FID, layer {layer}"), rel=1e-4)
        assert value(right, f"FID, layer {layer}") > 0.01


def test_what_sample_writes(command, tiny, flat_root, tmp_path, monkeypatch, capsys):
    """Pictures would have to be renamed first, or guidances and settings would be mixed unseen."""
    train(tiny(train__steps=2, train__val_every=2, train__save_every=2, train__preview_every=2))
    monkeypatch.setattr(sys, "argv", [str(x) for x in (
        "sample.py", "--checkpoint", tmp_path / "run" / "checkpoint.pt", "--n", 2, "--guidance", "1,3",
        "--mask", flat_root / "test" / "masks", "--out", tmp_path / "out")])
    sample.main()
    with pytest.raises(SystemExit, match="guidance 1.0, 3.0: choose with --guidance"):
        command("--real", flat_root / "test", "--fake", tmp_path / "out")
    report = command("--real", flat_root / "test", "--fake", tmp_path / "out", "--guidance", 3, "--train", flat_root / "train")
    assert report["numbers"]["SSIM"]["n"] == "5 real, 10 generated"
    assert report["generated with"] == {
        "checkpoint": [str(tmp_path / "run" / "checkpoint.pt")], "trained_steps": [2], "eta": [0.0], "weights": ["ema"],
        "sampler": ["dpm_solver"], "steps": [4], "guidance": [3.0]}
    assert report["left out"] == {"generated": [], "real": []} and "sheet.png left out" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.json", "at_a_glance.png", "nearest_training.png", "ssim_lowest", "ssim_highest"}


def test_lowest_and_highest_ssim_are_kept_as_pictures(command, real, fake, tmp_path):
    """The pairs that one would look at would be others than the number's."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    strengths = iter([0] + [0.1] * 8 + [1])

    def spoil(image):
        a = next(strengths)
        return ((1 - a) * image + a * noise).astype(np.uint8)

    report = command("--real", real, "--fake", fake(real / "images", lambda stem: stem, spoil))
    stems = sorted(list_files(real / "images"))
    names = {end: sorted(path.stem for path in (tmp_path / "report" / f"ssim_{end}").iterdir()) for end in ("lowest", "highest")}
    assert names["highest"][-1] == f"1.0000_{stems[0]}" and names["lowest"][0].endswith(stems[-1])
    every = [float(name.split("_")[0]) for name in names["lowest"]]  # there are but ten pictures
    assert (value(report, "SSIM"), report["numbers"]["SSIM"]["std"]) == pytest.approx((np.mean(every), np.std(every)), abs=1e-4)
    (tmp_path / "fake" / f"{stems[0]}.png").unlink()
    command("--real", real, "--fake", tmp_path / "fake")
    assert len(list((tmp_path / "report" / "ssim_highest").iterdir())) == 9  # those of the first evaluation are gone


def test_diversity_and_copies(command, tmp_path, flat_root, real, monkeypatch):
    """A model that returns one picture per mask, or training pictures, would win everything unseen."""
    stems = sorted(list_files(real / "images"))[:2]
    (tmp_path / "fake").mkdir()
    for k, stem in enumerate(stems):
        for grey in (100, 110, 130):
            Image.new("RGB", (16, 16), (grey + k,) * 3).save(tmp_path / "fake" / f"{stem}_{grey}.png")
    report = command("--real", real, "--fake", tmp_path / "fake", "--train", flat_root / "train")
    assert value(report, "distance within a mask") == pytest.approx((10 + 30 + 20) / 3)
    a, b = (read_image(real / "images" / f"{stem}.png").astype(float) for stem in stems)
    assert value(report, "distance between real pictures") == pytest.approx(np.sqrt(((a - b) ** 2).mean()))
    assert value(report, "nearest training picture, generated") > 10
    stolen = [read_image(path) for path in list_files(flat_root / "train" / "images").values()][7]
    for path in (tmp_path / "fake").iterdir():
        Image.fromarray(stolen[:, ::-1]).save(path)
    report = command("--real", real, "--fake", tmp_path / "fake", "--train", flat_root / "train")
    assert value(report, "distance within a mask") == pytest.approx(0, abs=1e-3)
    assert value(report, "nearest training picture, generated") == pytest.approx(0, abs=1e-3)
    assert value(report, "nearest training picture, real") > 1


def test_orphans_and_sizes_are_said(command, real, fake, capsys):
    """Sets of other sizes would be compared as if they were of one, or pictures would drop out unseen."""
    folder = fake(real / "images")
    stems = sorted(list_files(real / "images"))
    (folder / f"{stems[0]}_w3_seed1.png").unlink()
    for kind in ("images", "masks"):  # one pair is larger, and wider
        path = real / kind / f"{stems[1]}.png"
        Image.open(path).resize((64, 32), Image.Resampling.NEAREST).save(path)
    Image.new("RGB", (16, 16)).save(folder / "stranger_w3_seed1.png")
    report = command("--real", real, "--fake", folder)
    said = capsys.readouterr().out
    assert report["left out"] == {"generated": ["stranger_w3_seed1"], "real": [stems[0]]}
    assert "1 picture(s) left out" in said and "stranger" in said and stems[0] in said
    assert re.search(r"32x64 brought to 16x16.*cropping the centre.*\(1 such\)", said)
    assert report["numbers"]["SSIM"]["n"] == "9 real, 9 generated"


def test_images_without_masks(command, real, fake, judge):
    """A folder of photographs could not be used, or a ceiling would be invented for it."""
    report = command("--real", real / "images", "--fake", fake(real / "images"), "--segmenter", judge, "--colorbook",
                     real.parent / "colorbook.json")
    assert list(report["segmentation"]["values"]["mean IoU"]) == ["generated / real"]
    assert "share of the ceiling, mean IoU" not in report["numbers"] and value(report, "SSIM") == pytest.approx(1)


@pytest.mark.parametrize("how", ["settings", "flag"])
def test_unconditional_sets_get_fid_and_kid_only(command, real, fake, tmp_path, capsys, judge, how):
    """Pictures without a mask would be paired by accident, or could not be evaluated at all."""
    folder = fake(real / "images", lambda stem: f"unconditional_seed{stem[-1]}")
    if how == "settings":
        about = PngInfo()
        about.add_text("settings", json.dumps({"mask": None, "seed": 1, "guidance": 0.0}))
        for path in folder.iterdir():
            Image.open(path).save(path, pnginfo=about)
    report = command("--real", real, "--fake", folder, "--segmenter", judge, *(["--unpaired"] if how == "flag" else []),
                     inception=FewFeatures())
    assert set(report["numbers"]) == {"FID, layer 64", "FID, layer 2048", "KID"} and not report["segmentation"]["values"]
    assert "only FID and KID" in capsys.readouterr().out


def test_without_weights_and_network_the_rest_is_measured(real, fake, judge, tmp_path, monkeypatch, capsys):
    """A machine without a network would get no number at all, or no word on how to get the rest."""
    def no_network(*args, **options):
        raise URLError("Name or service not known")

    monkeypatch.setattr(evaluate, "build_segmenter", ByColour)
    monkeypatch.setattr(inception, "load_state_dict_from_url", no_network)
    monkeypatch.setattr(sys, "argv", [str(x) for x in (
        "evaluate.py", "--real", real, "--fake", fake(real / "images"), "--segmenter", judge, "--out", tmp_path / "report",
        "--device", "cpu")])
    evaluate.main()
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    said = capsys.readouterr().out
    assert inception.URL_INCEPTION_V3 in said and "--inception-weights FILE" in said
    assert {"SSIM", "share of the ceiling, mean IoU"} <= set(report["numbers"]) and "KID" not in report["numbers"]


# ------------------------------------------------------------------------------------------------------ segmenters


def test_classes_are_matched_by_name(capsys):
    """A segmenter with another order of classes would be read in the order of the colorbook."""
    book = Colorbook({"traffic light": [1, 0, 0], "pavement": [2, 0, 0], "car": [3, 0, 0], "ufo": [4, 0, 0]})
    assert evaluate.match_classes(["Cars", "road", "Traffic_Light", "sidewalk"], book, "judge") == {0: 2, 1: 3, 2: 0}
    said = capsys.readouterr().out
    assert "has no ufo" in said and "never chosen: road" in said


def test_other_order_and_missing_class(command, real, fake, judge, tmp_path):
    """Ids would be taken for those of the colorbook, and a class that the segmenter lacks would count as its mistake."""
    state = torch.load(judge)
    order = ["car", "sky", "road"]  # no person
    rows = [list(CLASSES).index(name) for name in order]
    state["model"] = {name: tensor[rows] for name, tensor in state["model"].items()}
    torch.save(state | {"colorbook": {name: CLASSES[name] for name in order}}, tmp_path / "three.pt")
    report = command("--real", real, "--fake", fake(real / "images"), "--segmenter", tmp_path / "three.pt")
    truth = np.stack([read_mask(path, BOOK)[0] for path in list_files(real / "masks").values()])
    images = np.stack([read_image(path) for path in list_files(real / "images").values()]).astype(int)
    seen = np.abs(images[..., None, :] - LOOKS[:3])
    seen = (seen**2).sum(-1).argmin(-1)
    rows = report["segmentation"]["values"]
    expected = by_hand(np.where(truth == 3, UNLABELLED, truth), seen, 4)
    assert (rows["pixel accuracy"]["real / mask"], rows["mean IoU"]["real / mask"]) == pytest.approx(expected)
    assert rows["person"]["real / mask"] is None


def test_segmenter_sees_the_size_it_was_trained_at(judge, tmp_path, monkeypatch):
    """Pictures of another size than the segmenter's would be judged at a scale that it never saw."""
    sizes = []

    class Noting(ByColour):
        def forward(self, x):
            sizes.append(tuple(x.shape[-2:]))
            return super().forward(x)

    monkeypatch.setattr(evaluate, "build_segmenter", Noting)
    torch.save(torch.load(judge) | {"size": [24, 48]}, tmp_path / "wide.pt")
    segment, _ = evaluate.load_segmenter(tmp_path / "wide.pt", BOOK, torch.device("cpu"))
    images = torch.from_numpy(LOOKS[[1, 2]])[:, :, None, None].expand(2, 3, 16, 20)
    assert segment(images).shape == (2, 16, 20) and sizes == [(24, 48)]
    assert (segment(images) == torch.tensor([1, 2])[:, None, None]).all()


def test_mask2former(tmp_path):
    """The thesis's judge would be fed pictures in another way than its own, or its labels would be taken for our ids."""
    transformers = pytest.importorskip("transformers", reason="the transformers package is optional")
    names = ["Car", "license_plate", "sky", "road"]
    backbone = transformers.SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
                                       out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, num_attention_heads=2, encoder_layers=1, decoder_layers=2, num_queries=8,
        id2label=dict(enumerate(names)))
    torch.manual_seed(0)
    net = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    processor = transformers.Mask2FormerImageProcessor(size={"height": 64, "width": 64})
    net.save_pretrained(tmp_path / "net")
    processor.save_pretrained(tmp_path / "net")
    images = torch.randint(0, 256, (3, 3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    segment, found = evaluate.load_segmenter(tmp_path / "net", BOOK, torch.device("cpu"))
    assert found == {0: 3, 1: 2, 2: 0}  # nobody is a person
    with torch.no_grad():  # the processor's own way, one picture at a time, without the label that is none of ours
        for image, ids in zip(images, segment(images)):
            made = net(**processor(images=image, return_tensors="pt"))
            made.class_queries_logits[..., 1] = -torch.inf
            expected = processor.post_process_semantic_segmentation(made, target_sizes=[(40, 48)])[0]
            assert (torch.tensor([2, 9, 1, 0])[expected] == ids).double().mean() > 0.99  # to rounding


# ------------------------------------------------------------------------------------------------------- bad input


def empty(x):
    for path in (x.real / "images").iterdir():
        path.unlink()


def cut(x):
    path = sorted(x.fake.iterdir())[0]
    path.write_bytes(path.read_bytes()[:-30])


def palette_mask(x):
    save_mask(np.zeros((16, 16), np.uint8), sorted(x.fake.iterdir())[0], BOOK)


def painted_mask(x):
    Image.fromarray(BOOK.paint(np.array([[0, 1, 3]] * 16, np.uint8).repeat(5, 1))).save(sorted(x.fake.iterdir())[0])


def id_mask(x):
    Image.fromarray(np.array([[0, 3, 255]] * 16, np.uint8)).save(sorted((x.real / "images").iterdir())[0])


def unequal_pair(x):
    save_mask(np.zeros((8, 16), np.uint8), sorted((x.real / "masks").iterdir())[0], BOOK)


def other_names(x):
    for k, path in enumerate(sorted(x.fake.iterdir())):
        path.rename(x.fake / f"picture{k}.png")


def small_pictures(x):
    for path in x.fake.iterdir():
        Image.open(path).resize((8, 8)).save(path)


def photo_as_mask(x):
    shutil.copy(sorted((x.real / "images").iterdir())[0], sorted((x.real / "masks").iterdir())[0])


@pytest.mark.parametrize("harm, options, message", [
    (empty, [], r"images: no pictures in this folder"),
    (None, ["--real", "{real}/.."], r"no pictures in this folder; give one of its splits: .*val"),
    (None, ["--fake", "{real}/nowhere"], r"nowhere: no such folder"),
    (None, ["--train", "{real}/nowhere"], r"nowhere: no such folder"),
    (other_names, [], r"no picture has the name of one in .*Found 'picture0'.*such as 'flat_100'.*--unpaired"),
    (cut, [], r"flat_100_w3_seed1.png .*not readable as a picture"),
    (palette_mask, [], r"flat_100_w3_seed1.png: a mask .*expected a picture"),
    (painted_mask, [], r"flat_100_w3_seed1.png: a mask .*expected a picture"),
    (id_mask, [], r"flat_100.png: a mask .*expected a picture"),
    (photo_as_mask, [], r"flat_100.png: .* have colours that are in no class"),
    (unequal_pair, [], r"flat_100.png: the image is \(16, 16\) and the mask \(8, 16\)"),
    (small_pictures, [], r"pictures of 8x8; SSIM needs 11x11"),
    (None, ["--guidance", 2], r"has pictures of guidance 3.0: choose with --guidance"),
    (None, ["--out", "{fake}"], r"a folder of pictures to compare: choose another"),
    (None, ["--batch-size", 0], r"--batch-size 0: expected 1 or more"),
    (None, ["--inception-weights", "{real}/nowhere.pth"], r"nowhere.pth: not the weights of torch-fidelity's Inception.*https"),
    (None, ["--inception-weights", "{judge}"], r"segmenter.pt: not the weights of torch-fidelity's Inception.*https"),
    (None, ["--segmenter", "{real}/images/flat_100.png"], r"flat_100.png: not a checkpoint of experiments/segmenter.py"),
    (None, ["--segmenter", "{judge}", "--colorbook", "colorbook.json"], r"segmenter of other classes: .*its own are road, sky"),
    (None, ["--device", "cpu", "--colorbook", "{real}/none.json"], r"none.json: no such colorbook"),
])
def test_bad_input(command, real, fake, judge, tmp_path, harm, options, message):
    """An evaluation would crash, or worse, give numbers for something else; nothing may be written by then."""
    x = SimpleNamespace(real=real, fake=fake(real / "images"))
    if harm:
        harm(x)
    options = [str(option).format(real=real, fake=x.fake, judge=judge) for option in options]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        command("--real", real, "--fake", x.fake, *options)
    assert not (tmp_path / "report").exists()


def test_weights_that_would_run_code_are_refused(command, real, fake, tmp_path):
    """A file from the net, given as weights, could do anything on this machine (torch-fidelity loads pickles whole)."""
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was here"), "w"))

    torch.save({"weights": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(SystemExit, match="evil.pth: not the weights"):
        command("--real", real, "--fake", fake(real / "images"), "--inception-weights", tmp_path / "evil.pth")
    assert not (tmp_path / "was here").exists()


def test_transformers_missing(monkeypatch):
    """Who gives the name of a Mask2Former would not learn what to install."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"facebook/some: no such file.*pip install transformers.*experiments/segmenter.py"):
        evaluate.load_segmenter("facebook/some", BOOK, torch.device("cpu"))
