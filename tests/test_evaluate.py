"""evaluate.py on problems whose answer is known, and on bad input."""

import itertools
import json
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
from PIL import Image, ImageFilter
from skimage.metrics import structural_similarity
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

import evaluate
import sample
from data.toy.prepare import prepare, scene
from dataset import list_files, read_image
from masks import UNLABELLED, Colorbook, read_mask, save_mask
from train import train

BOOK = Colorbook(CLASSES)
load_inception = evaluate.load_inception  # most tests put a stand-in in its place


class Backbone(torch.nn.Module):
    """Two feature maps as torchvision's backbones have them: the image, and a random convolution of it."""

    def forward(self, x):
        generator = torch.Generator().manual_seed(0)
        maps = torch.relu(torch.nn.functional.conv2d(x, torch.randn(32, 3, 3, 3, generator=generator)))
        weight = torch.randn(64, 32, 3, 3, generator=generator) / 10
        return {"low": x, "high": torch.relu(torch.nn.functional.conv2d(maps, weight, stride=2))}


class ByColour(torch.nn.Module):
    """A stand-in for a segmenter whose answer is known: the class whose look is nearest to the colour of the pixel.

    The nearest of some points is the largest of linear functions: |x - c|^2 = |x|^2 - 2 c.x + |c|^2.
    """

    def __init__(self, arch, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, num_classes, 1)
        self.backbone = Backbone()

    def learn(self):
        looks = evaluate.normalise(torch.from_numpy(LOOKS)[:, :, None, None])
        self.load_state_dict({"conv.weight": 2 * looks, "conv.bias": -looks.square().sum((1, 2, 3))})
        return self

    def forward(self, x):
        return {"out": self.conv(x)}


class FewFeatures(torch.nn.Module):
    """A stand-in for Inception: random projections of the image, 7 at layer 64 and 5 others at layer 2048; zeros."""

    def forward(self, x):
        noise = torch.randn(x[0].numel(), 12, generator=torch.Generator().manual_seed(0))
        few = (x.flatten(1).float() / 255) @ noise
        early, late = few[:, :7], 3 * few[:, 7:].cos()
        return torch.cat([torch.nn.functional.pad(early, (0, 57)), torch.nn.functional.pad(late, (0, 2043))], dim=1)


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """The checkpoint of the stand-in, as experiments/segmenter.py would write it."""
    path = tmp_path_factory.mktemp("judge") / "segmenter.pt"
    torch.save({"arch": "lraspp_mobilenet_v3_large", "model": ByColour("", 4).learn().state_dict(), "step": 1,
                "colorbook": CLASSES, "size": [16, 16]}, path)
    return path


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command("--real", ...) runs evaluate.py in this process with the stand-ins, and returns its report.

    inception is what FID and KID are computed with where no file of weights is given: without it they are left out.
    """
    monkeypatch.setattr(evaluate, "build_segmenter", ByColour)

    def call(*options, out="report", inception=None):
        load = load_inception if "--inception-weights" in options else lambda file, device: inception
        monkeypatch.setattr(evaluate, "load_inception", load)
        options = ["evaluate.py", "--device", "cpu", "--out", tmp_path / out, *options]
        monkeypatch.setattr(sys, "argv", [str(option) for option in options])
        evaluate.main()
        return json.loads((tmp_path / out / "report.json").read_text())

    return call


@pytest.fixture
def real(tmp_path, flat_root):
    """A split of 10 pairs in which a tenth of the pixels has the look of another class: the ceiling is below 1."""
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
    """fake(source, name=lambda stem: ..., change=lambda image: ...) is a folder of changed copies of images."""

    def make(source, name=lambda stem: f"{stem}_w3_seed1", change=lambda image: image, out="fake"):
        (tmp_path / out).mkdir(exist_ok=True)
        for stem, path in list_files(source).items():
            Image.fromarray(change(read_image(path))).save(tmp_path / out / f"{name(stem)}.png")
        return tmp_path / out

    return make


def value(report, name):
    return report["numbers"][name]["value"]


def by_hand(truth, seen, K):
    """Pixel accuracy and mean IoU in the words of their definition (Bozsó 2023, 5.8 and 5.9), one set at a time."""
    seen, truth = seen[truth != UNLABELLED], truth[truth != UNLABELLED]
    iou = [((truth == k) & (seen == k)).sum() / ((truth == k) | (seen == k)).sum()
           for k in range(K) if (truth == k).any() or (seen == k).any()]
    return (truth == seen).mean(), np.mean(iou)


def seen_by_hand(images, classes=4):
    """Ids (N, H, W) of images (N, H, W, 3): the class whose look is nearest."""
    return np.square(images[..., None, :].astype(int) - LOOKS[:classes]).sum(-1).argmin(-1)


def columns(report, name):
    """{column: value} of a score of the segmenter."""
    found = (key.split(": ") for key in report["numbers"])
    return {key[1]: value(report, ": ".join(key)) for key in found if key[0] == name}


def torch_fid(x, y):
    statistics = [fid_features_to_statistics(features.double()) for features in (x, y)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def torch_kid(x, y):
    metric = kid_features_to_metric(x, y, kid_subset_size=len(x), kid_subsets=2, verbose=False)
    return metric["kernel_inception_distance_mean"]


def counts(draws):
    return torch.tensor(draws, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ single numbers


def test_iou_by_hand():
    """A class that is predicted but not there counts as 0; what neither has is left out, and what is unlabelled."""
    truth = torch.tensor([[0, 0, 0, 1, 1, 255]], dtype=torch.uint8)
    seen = torch.tensor([[0, 0, 1, 1, 2, 3]], dtype=torch.uint8)
    confusion = evaluate.confusion_matrix(truth, seen, 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    accuracy, mean_iou, iou = evaluate.scores(confusion)
    assert accuracy == pytest.approx(3 / 5)
    assert iou[:3].tolist() == pytest.approx([2 / 3, 1 / 3, 0])  # 2 of {0,0,0}, 1 of {1,1} and a 0 that was taken for 1
    assert torch.isnan(iou[3])  # predicted where nothing is known, which counts for nothing
    assert mean_iou == pytest.approx(1 / 3)


def test_iou_of_random_masks_agrees_with_its_definition():
    """IoU is that of the whole set, pixel by pixel; many sets at once give what each gives."""
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, 4, 255], (3, 20, 20)).astype(np.uint8)
    seen = rng.integers(0, 6, (3, 20, 20)).astype(np.uint8)
    matrices = [evaluate.confusion_matrix(*map(torch.from_numpy, pair), 7) for pair in zip(truth, seen)]
    accuracy, mean_iou, _ = evaluate.scores(sum(matrices))
    assert (accuracy, mean_iou) == pytest.approx(by_hand(truth, seen, 7))
    assert list(zip(*evaluate.scores(torch.stack(matrices))[:2])) == [
        pytest.approx(by_hand(*pair, 7)) for pair in zip(truth, seen)]


def test_fid_of_two_gaussians_is_the_closed_form():
    """FID is the Fréchet distance of the features' Gaussians."""
    rng = np.random.default_rng(0)

    def exactly(mean, covariance, n=200):
        """n points that have this mean and covariance, not only on average."""
        x = rng.standard_normal((n, len(mean)))
        x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
        return torch.from_numpy(x @ np.linalg.cholesky(covariance).T + mean)

    def fid(x, y):
        return evaluate.frechet_distance(x, y, torch.ones(len(x)).double(), torch.ones(len(y)).double()).item()

    m1, m2 = np.array([1.0, 2, 3]), np.array([0.0, 2, 5])
    a, b = np.array([1.0, 4, 9]), np.array([4.0, 4, 1])
    assert fid(exactly(m1, np.diag(a)), exactly(m2, np.diag(b))) == pytest.approx(5 + 5)  # 1 + 0 + 4, and 1 + 0 + 4
    A, B = np.diag(a), np.array([[2.0, 1, 0], [1, 3, 1], [0, 1, 2]])  # which do not commute
    root = scipy.linalg.sqrtm(scipy.linalg.sqrtm(A) @ B @ scipy.linalg.sqrtm(A))
    assert fid(exactly(m1, A), exactly(m2, B)) == pytest.approx(5 + np.trace(A + B - 2 * root.real))


@pytest.mark.parametrize("n, m, D", [(30, 20, 6), (12, 9, 40)])
def test_fid_and_kid_are_those_of_torch_fidelity(n, m, D):
    """FID of repeated images is torch-fidelity's of the repeated features, KID its unbiased estimate without copies."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((n, D)), 2 * rng.standard_normal((m, D)) + 1
    x_counts, y_counts = rng.integers(0, 4, n), rng.integers(0, 4, m)
    expected = torch_fid(torch.from_numpy(x.repeat(x_counts, axis=0)), torch.from_numpy(y.repeat(y_counts, axis=0)))
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    fid = evaluate.frechet_distance(x, y, counts(x_counts), counts(y_counts)).item()
    assert fid == pytest.approx(expected, rel=1e-4)
    kid = evaluate.kernel_distance(x[:m], y, *counts(np.ones((2, 1, m)))).item()
    assert kid == pytest.approx(torch_kid(x[:m], y), rel=1e-4)

    def mean(a, b, a_counts, b_counts):
        total, weight = 0, 0
        for i, j in itertools.product(range(len(a)), range(len(b))):
            if a is not b or i != j:
                total += a_counts[i] * b_counts[j] * (a[i] @ b[j] / D + 1) ** 3
                weight += a_counts[i] * b_counts[j]
        return total / weight

    expected = mean(x, x, x_counts, x_counts) + mean(y, y, y_counts, y_counts) - 2 * mean(x, y, x_counts, y_counts)
    rows = counts(np.stack([np.ones(n), x_counts])), counts(np.stack([np.ones(m), y_counts]))
    assert evaluate.kernel_distance(x, y, *rows)[1].item() == pytest.approx(expected.item())


def some_index(n, per_mask):
    """The real image of each of n * per_mask generated ones, in an order that is not that of the masks."""
    return np.random.default_rng(1).permutation(np.arange(n).repeat(per_mask))


def test_interval_of_a_mean_is_the_known_one():
    """The interval of a mean of 400 values is mean +- 1.96 deviations / sqrt(400), for real and generated images."""
    x = torch.from_numpy(np.random.default_rng(0).normal(5, 2, 400))
    mean, reach = x.mean().item(), 1.96 * x.std().item() / 20
    for index in (some_index(400, 1), None):
        for side in (0, 1):
            drawn = evaluate.resample(400, 400, index, 4000)[side]
            values = evaluate.mean_of(x if side == 0 or index is None else x[index], drawn)
            assert values[0].item() == pytest.approx(mean)
            found = np.percentile(values[1:], [2.5, 97.5])
            assert found == pytest.approx([mean - reach, mean + reach], abs=0.1 * reach)


def test_images_of_one_mask_are_drawn_together():
    """Four copies of every generated image tell no more than one: the interval stays as wide; drawn apart it halves."""
    x, intervals = np.random.default_rng(0).normal(5, 2, 100), []
    for per_mask, paired in ((1, True), (4, True), (4, False)):
        index = some_index(100, per_mask)
        _, drawn = evaluate.resample(100, len(index), index if paired else None, 2000)
        means = evaluate.mean_of(torch.from_numpy(x[index]), drawn)
        intervals.append(np.percentile(means[1:], [2.5, 97.5]))
    assert intervals[0] == pytest.approx(intervals[1])
    (low, high), (low_apart, high_apart) = intervals[1:]
    assert high_apart - low_apart == pytest.approx((high - low) / 2, rel=0.1)


def test_pairs_are_drawn_together():
    """A draw has every generated image as often as its real one; the first row has every image once."""
    index = some_index(20, 3)
    real, generated = evaluate.resample(20, 60, index, 50)
    assert torch.equal(generated, real[:, index]) and (real.sum(1) == 20).all() and real[1:].unique().numel() > 3
    assert (real[0] == 1).all() and all((x[0] == 1).all() for x in evaluate.resample(20, 60, None, 5))


def test_ssim_is_that_of_the_thesis():
    """SSIM is formula 5.1: its window, its constants."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (2, 11, 11)).astype(np.uint8)
    g = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g) / g.sum() ** 2
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, cov = ((w * a * b.astype(float)).sum() - (w * a).sum() * (w * b).sum() for a, b in ((x, x), (y, y), (x, y)))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    found = structural_similarity(x, y, **evaluate.SSIM_OPTIONS)
    assert found == pytest.approx(expected)  # only the centre of 11x11 counts


@pytest.mark.parametrize("name, expected", [
    ("a_w3_seed7", "a"),        # sample.py
    ("a_w1.5_seed12", "a"),
    ("a", "a"),
    ("a_7", "a"),
    ("b_7", "b_7"),             # a stem that looks like a numbered one
    ("b_7_w3_seed1", "b_7"),
    ("b_7_2", "b_7"),
    ("b_7_w1e-05_seed1", "b_7"),
    ("c_w3_seed1", None),
    ("unconditional_seed3", None),
])
def test_names(name, expected):
    """A generated image belongs to the mask that its name tells."""
    assert evaluate.mask_of(name, {"a", "b_7"}) == expected


def test_the_report_has_the_95_percent_interval(tmp_path):
    """The interval goes from the 2.5th to the 97.5th percentile of the draws, which begin after the value."""
    values = torch.cat([torch.tensor([7.0]), torch.randperm(1001) / 10]).double()
    evaluate.write_report(tmp_path, {"SSIM": values}, {}, {"warning": ""})
    found = json.loads((tmp_path / "report.json").read_text())["numbers"]["SSIM"]
    assert (found["value"], found["interval"]) == (7, pytest.approx([2.5, 97.5]))


# --------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file that fits Inception, with random weights, scaled so that images still differ at its end."""
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
    """A perfect set gets the perfect numbers, by the real Inception network and --inception-weights."""
    for path in sorted((real / "images").iterdir())[4:]:
        path.unlink()
    report = command("--real", real, "--fake", fake(real / "images"), "--segmenter", judge,
                     "--inception-weights", weights)
    assert value(report, "SSIM") == pytest.approx(1)
    assert value(report, "FID, layer 64") == pytest.approx(0, abs=1e-3)
    assert value(report, "FID, layer 2048") == pytest.approx(0, abs=1e-2)
    assert value(report, "KID") <= 0  # the pairs of equal images between the sets are the only ones of their kind
    assert value(report, "share of the ceiling: mean IoU") == value(report, "share of the ceiling: pixel accuracy") == 1
    iou = columns(report, "mean IoU")
    assert iou["generated / mask"] == iou["real / mask"] < 1
    assert iou["generated / real"] == columns(report, "pixel accuracy")["generated / real"] == 1
    for x in report["numbers"].values():
        assert set(x) == {"value", "interval", "meaning"} and x["meaning"]
    assert report["n"] == "4 real, 4 generated"
    assert "compare at equal N only" in report["numbers"]["FID, layer 2048"]["meaning"]


def test_layers_have_their_labels(command, real, fake):
    """FID of layers 64 and 2048, and KID of layer 2048, are torch-fidelity's of these features, with intervals."""
    folder = fake(real / "images", change=lambda image: image // 2)
    report = command("--real", real, "--fake", folder, inception=FewFeatures())
    sides = [torch.stack([torch.from_numpy(read_image(path)).permute(2, 0, 1) for path in list_files(files).values()])
             for files in (real / "images", folder)]
    layers = dict(zip((64, 2048), zip(*(FewFeatures()(side).split([64, 2048], dim=1) for side in sides))))
    for layer, both in layers.items():
        assert value(report, f"FID, layer {layer}") == pytest.approx(torch_fid(*both), rel=1e-3)
    expected = torch_kid(*layers[2048])
    assert value(report, "KID") == pytest.approx(expected, rel=1e-3)
    low, high = report["numbers"]["KID"]["interval"]
    assert low < expected < high
    assert all(x["interval"][0] < x["interval"][1] for name, x in report["numbers"].items() if "FID" in name)
    assert "Repeated images raise FID" in report["interval"]


def test_ceiling_and_iou_agree_with_their_definition(command, real, fake, judge, tmp_path):
    """Every column is of the sets that it names, the ceiling counted once for every generated image."""
    report = command("--real", real, "--fake", fake(real / "images", change=lambda x: x[::-1]), "--segmenter", judge)
    images = np.stack([read_image(path) for path in list_files(real / "images").values()])
    truth = np.stack([read_mask(path, BOOK)[0] for path in list_files(real / "masks").values()])
    seen = seen_by_hand(images)

    def check(report, seen_fake, index):
        sides = {"generated / mask": (truth[index], seen_fake), "real / mask": (truth[index], seen[index]),
                 "generated / real": (seen[index], seen_fake)}
        for column, (a, b) in sides.items():
            found = columns(report, "pixel accuracy")[column], columns(report, "mean IoU")[column]
            assert found == pytest.approx(by_hand(a, b, 4)), column
            for k, name in enumerate(CLASSES):
                union = ((a == k) | (b == k)).sum()
                expected = ((a == k) & (b == k)).sum() / union if union else None
                assert value(report, f"IoU: {column}: {name}") == pytest.approx(expected)
        expected = by_hand(truth[index], seen_fake, 4)[1] / by_hand(truth[index], seen[index], 4)[1]
        assert value(report, "share of the ceiling: mean IoU") == pytest.approx(expected)
        low, high = report["numbers"]["share of the ceiling: mean IoU"]["interval"]
        assert low <= expected <= high and low < high

    check(report, seen[:, ::-1], np.arange(10))
    stems = sorted(list_files(real / "images"))  # 1 image of the first mask, 3 of the second, none of the others
    shutil.rmtree(tmp_path / "fake")
    (tmp_path / "fake").mkdir()
    for name, i in (("w3_seed9", 0), ("w3_seed1", 1), ("w3_seed2", 1), ("w3_seed3", 1)):
        Image.fromarray(images[i][::-1]).save(tmp_path / "fake" / f"{stems[i]}_{name}.png")
    report = command("--real", real, "--fake", tmp_path / "fake", "--segmenter", judge)
    check(report, seen[[0, 1, 1, 1], ::-1], [0, 1, 1, 1])


def test_shuffled_pairing_is_noticed_by_ssim_and_iou_alone(command, real, fake, judge):
    """SSIM and IoU compare images of one mask; FID does not depend on names."""
    def brighter(image):
        return np.minimum(image, 235) + 20

    right = command("--real", real, "--fake", fake(real / "images", change=brighter), "--segmenter", judge,
                    inception=FewFeatures())
    stems = sorted(list_files(real / "images"))
    turned = dict(zip(stems, stems[1:] + stems[:1]))
    shuffled = fake(real / "images", turned.get, brighter, "shuffled")
    wrong = command("--real", real, "--fake", shuffled, "--segmenter", judge, inception=FewFeatures())
    assert value(wrong, "SSIM") < 0.9 * value(right, "SSIM")
    assert value(wrong, "share of the ceiling: mean IoU") < 0.9
    for layer in (64, 2048):
        assert value(wrong, f"FID, layer {layer}") == pytest.approx(value(right, f"FID, layer {layer}"), rel=1e-4)
        assert value(right, f"FID, layer {layer}") > 0.01


def test_what_sample_writes(command, tiny, flat_root, tmp_path, monkeypatch):
    """What sample.py wrote is evaluated as it is, at one guidance; the report has the settings of its first image."""
    train(tiny(train__steps=2, train__val_every=2, train__save_every=2, train__preview_every=2))
    monkeypatch.setattr(sys, "argv", [str(x) for x in (
        "sample.py", "--checkpoint", tmp_path / "run" / "checkpoint.pt", "--n", 2, "--guidance", "1,3",
        "--mask", flat_root / "test" / "masks", "--out", tmp_path / "out")])
    sample.main()
    with pytest.raises(SystemExit, match="error: .*images of guidance 1.0, 3.0: choose one with --guidance"):
        command("--real", flat_root / "test", "--fake", tmp_path / "out")
    report = command("--real", flat_root / "test", "--fake", tmp_path / "out", "--guidance", 3,
                     "--train", flat_root / "train")
    assert report["n"] == "5 real, 10 generated"
    found = json.loads(report["generated with"])
    assert (found["trained_steps"], found["sampler"]) == (2, "dpm_solver")
    assert found["guidance"] == 3 and found["checkpoint"] == str(tmp_path / "run" / "checkpoint.pt")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.json", "at_a_glance.png", "nearest_training.png"}


def cells(sheet, size=16, scale=8, gap=4, top=18):
    """The images of a contact sheet under titles, by row."""
    pixels, cell = np.array(Image.open(sheet)), size * scale + gap
    ys, xs = range(top, pixels.shape[0] - gap, cell), range(0, pixels.shape[1] - gap, cell)
    return [[pixels[y + gap : y + cell : scale, x + gap : x + cell : scale] for x in xs] for y in ys]


def test_at_a_glance_goes_from_the_lowest_ssim_to_the_highest(command, real, fake, judge, tmp_path):
    """A row shows mask, real and generated image and what is seen in both, of one pair; SSIM orders the rows."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    strengths = iter([0, 0.2, 0.6, 0.3, 0.5, 0.1, 0.4, 1, 0.8, 0.9])

    def spoil(image):
        a = next(strengths)
        return ((1 - a) * image + a * noise).astype(np.uint8)

    folder = fake(real / "images", lambda stem: stem, spoil)
    report = command("--real", real, "--fake", folder, "--segmenter", judge)
    triples = {}
    for stem, path in list_files(folder).items():
        a, b = read_image(real / "images" / f"{stem}.png"), read_image(path)
        ssim = structural_similarity(a, b, channel_axis=-1, gaussian_weights=True, use_sample_covariance=False)
        triples[ssim] = [BOOK.paint(read_mask(real / "masks" / f"{stem}.png", BOOK)[0]), a, b,
                         *(BOOK.paint(seen_by_hand(x[None])[0].astype(np.uint8)) for x in (a, b))]
    order = sorted(triples)
    assert value(report, "SSIM") == pytest.approx(np.mean(order)) and order[-1] == pytest.approx(1)
    rows = cells(tmp_path / "report" / "at_a_glance.png")
    assert len(rows) == 8
    for row, ssim in ((rows[0], order[0]), (rows[-1], order[-1])):
        assert all((x == y).all() for x, y in zip(row, triples[ssim])) and len(row) == 5


def test_diversity_and_copies(command, tmp_path, flat_root, real):
    """A model that returns one image per mask, or training images, is found out."""
    stems = sorted(list_files(real / "images"))[:2]
    (tmp_path / "fake").mkdir()
    levels = (100, 110, 130, 0, 250)
    for k, stem in enumerate(stems):
        for grey in levels:
            Image.new("RGB", (16, 16), (grey + k,) * 3).save(tmp_path / "fake" / f"{stem}_{grey}.png")
    report = command("--real", real, "--fake", tmp_path / "fake", "--train", flat_root / "train")
    assert value(report, "distance within a mask") == pytest.approx(
        np.mean([abs(one - other) for one, other in itertools.combinations(levels, 2)]))
    a, b = (read_image(real / "images" / f"{stem}.png").astype(float) for stem in stems)
    assert value(report, "distance between real images") == pytest.approx(np.sqrt(((a - b) ** 2).mean()))
    known = np.stack([read_image(path).astype(float) for path in list_files(flat_root / "train" / "images").values()])
    known = np.concatenate([known, known[:, :, ::-1]])

    def nearest(images):
        return np.mean([np.sqrt(((known - image) ** 2).mean((1, 2, 3))).min() for image in images])

    greys = [np.full((16, 16, 3), grey + k) for grey in levels for k in (0, 1)]
    assert value(report, "nearest training image") == pytest.approx(nearest(greys))
    assert value(report, "nearest training image, of real ones") == pytest.approx(nearest([a, b]))
    rows = cells(tmp_path / "report" / "nearest_training.png")
    distances = [nearest(np.array([image])) for image, _ in rows]
    assert distances == pytest.approx(sorted(nearest([grey]) for grey in greys)[:8])
    for (image, match), distance in zip(rows, distances):
        assert np.sqrt(((match.astype(float) - image) ** 2).mean()) == pytest.approx(distance)
        assert any((match == x).all() for x in known)
    stolen = [read_image(path) for path in list_files(flat_root / "train" / "images").values()][7]
    for path in (tmp_path / "fake").iterdir():
        Image.fromarray(stolen[:, ::-1]).save(path)
    report = command("--real", real, "--fake", tmp_path / "fake", "--train", flat_root / "train")
    assert value(report, "distance within a mask") == pytest.approx(0, abs=1e-3)
    assert value(report, "nearest training image") == pytest.approx(0, abs=1e-3)
    assert all((x == stolen[:, ::-1]).all() for row in cells(tmp_path / "report" / "nearest_training.png") for x in row)


def test_the_distance_within_a_mask_is_of_masks_with_several_images(command, tmp_path, real):
    """Of masks with 2, 1 and 3 images, it is the mean of the first and the last, which weigh alike."""
    (tmp_path / "fake").mkdir()
    for stem, levels in zip(sorted(list_files(real / "images")), [(100, 110), (0,), (50, 90, 200)]):
        for grey in levels:
            Image.new("RGB", (16, 16), (grey,) * 3).save(tmp_path / "fake" / f"{stem}_{grey}.png")
    report = command("--real", real, "--fake", tmp_path / "fake")
    assert value(report, "distance within a mask") == pytest.approx(np.mean([10, np.mean([40, 110, 150])]))


def test_orphans_and_sizes(command, real, fake, capsys):
    """Images without a mask are left out and listed, masks without an image left out; pairs of other sizes fitted."""
    folder = fake(real / "images")
    stems = sorted(list_files(real / "images"))
    (folder / f"{stems[0]}_w3_seed1.png").unlink()
    for kind in ("images", "masks"):  # one pair is larger, and wider
        path = real / kind / f"{stems[1]}.png"
        Image.open(path).resize((64, 32), Image.Resampling.NEAREST).save(path)
    Image.new("RGB", (16, 16)).save(folder / "stranger_w3_seed1.png")
    report = command("--real", real, "--fake", folder)
    printed = capsys.readouterr().out
    assert "fake: 1 image(s) without a mask left out: stranger" in printed
    assert "1 that lose more than a tenth to the crop to 16x16" in printed
    assert report["n"] == "9 real, 9 generated"


def test_sixteen_bits_are_read_as_everywhere(command, real, fake):
    """A real image of 16 bits equals its generated one of 8 bits; images may be wider than high."""
    columns = [*range(16), *range(8)]
    folder = fake(real / "images", change=lambda image: np.repeat(image[:, columns, :1], 3, axis=2))
    for path in (real / "images").iterdir():
        Image.fromarray(read_image(path)[:, columns, 0].astype(np.uint16) * 257).save(path)
        save_mask(read_mask(real / "masks" / path.name, BOOK)[0][:, columns], real / "masks" / path.name, BOOK)
    report = command("--real", real, "--fake", folder)
    assert value(report, "SSIM") == pytest.approx(1) and report["size"] == [16, 24]


def test_unconditional_sets_get_fid_and_kid_only(command, real, fake, judge):
    """Images without a mask are not paired; FID and KID compare them with all real ones."""
    folder = fake(real / "images", lambda stem: f"unconditional_seed{stem[-1]}")
    sorted(folder.iterdir())[0].unlink()
    report = command("--real", real, "--fake", folder, "--unpaired", inception=FewFeatures())
    assert set(report["numbers"]) == {"FID, layer 64", "FID, layer 2048", "KID"}
    assert all(x["interval"][0] < x["interval"][1] for x in report["numbers"].values())
    assert report["n"] == "10 real, 9 generated"


def test_without_weights_and_network_the_rest_is_measured(real, fake, judge, tmp_path, monkeypatch, capsys):
    """A machine without a network measures the rest, from any folder, and prints how to get FID and KID."""
    def no_network(*args, **options):
        raise URLError("Name or service not known")

    monkeypatch.setattr(evaluate, "build_segmenter", ByColour)
    monkeypatch.setattr(inception, "load_state_dict_from_url", no_network)
    fake(real / "images")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [
        "evaluate.py", "--real", "real/val", "--fake", "fake", "--segmenter", str(judge), "--device", "cpu"])
    evaluate.main()
    report = json.loads((tmp_path / "runs" / "evaluation" / "report.json").read_text())
    printed = capsys.readouterr().out
    assert inception.URL_INCEPTION_V3 in printed and "--inception-weights FILE" in printed
    assert {"SSIM", "share of the ceiling: mean IoU"} <= set(report["numbers"]) and "KID" not in report["numbers"]
    assert "SSIM: likeness" in printed and "no test of the mask" in printed and report["interval"] in printed
    monkeypatch.setattr(sys, "argv", [*sys.argv[:4], "fakes"])
    with pytest.raises(SystemExit, match=f"error: {tmp_path}/fakes: no such folder"):
        evaluate.main()


def test_old_results_last_until_new_ones_are_there(command, real, fake, tmp_path, monkeypatch, capsys):
    """An evaluation stopped by Ctrl-C or a full disk leaves the old report; a finished one replaces all of it."""
    folder = fake(real / "images")
    command("--real", real, "--fake", folder, "--train", real)
    old = {path: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert len(old) == 3

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    for name, stop, message in (("structural_similarity", interrupted, "130"), ("json.dumps", interrupted, "130"),
                                ("measure_copies", full, "error: .*No space left")):
        with monkeypatch.context() as patch:
            patch.setattr(f"evaluate.{name}", stop)
            with pytest.raises(SystemExit, match=message):
                command("--real", real, "--fake", folder, "--train", real)
        assert {path: path.read_bytes() for path in (tmp_path / "report").iterdir()} == old
    assert "Traceback" not in capsys.readouterr().err
    command("--real", real, "--fake", folder)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.json", "at_a_glance.png"}


# ------------------------------------------------------------------------- the segmenter's own Frechet distance

NAME = "Frechet distance, segmenter features"


def look(images):
    """The features of the stand-in by hand: its last map, averaged over the image."""
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return Backbone()(evaluate.normalise(x))["high"].mean(dim=(2, 3))


def test_distance_in_segmenter_features_and_its_floor(command, real, fake, judge, flat_root):
    """Both are torch-fidelity's distance of the averaged last feature map, the floor that of as many train images."""
    folder = fake(real / "images", change=lambda image: image // 2)
    ten = real.parent / "ten"
    shutil.copytree(flat_root / "train" / "images", ten / "images")
    for path in sorted((ten / "images").iterdir())[10:]:
        path.unlink()
    report = command("--real", real, "--fake", folder, "--segmenter", judge, "--train", ten)
    expected = torch_fid(*(look([read_image(path) for path in list_files(x).values()])
                           for x in (real / "images", folder)))
    assert value(report, NAME) == pytest.approx(expected, rel=1e-3)
    floor = torch_fid(*(look([read_image(path) for path in list_files(x / "images").values()]) for x in (real, ten)))
    assert value(report, f"{NAME}, floor") == pytest.approx(floor, rel=1e-3)
    for name in (NAME, f"{NAME}, floor"):
        assert report["numbers"][name]["interval"][0] < report["numbers"][name]["interval"][1]
        assert report["numbers"][name]["meaning"]
    (ten / "images" / "flat_0.png").unlink()
    report = command("--real", real, "--fake", folder, "--segmenter", judge, "--train", ten)
    assert f"{NAME}, floor" not in report["numbers"]
    assert NAME in command("--real", real, "--fake", folder, "--segmenter", judge, "--unpaired")["numbers"]


def test_the_floor_is_of_a_part_of_train_at_the_same_n(command, real, fake, judge, flat_root):
    """Of 50 train images 10 are taken, the same ones each time; all 50 would be nearer to the real ones."""
    options = "--real", real, "--fake", fake(real / "images"), "--segmenter", judge, "--train", flat_root / "train"
    floors = [value(command(*options), f"{NAME}, floor") for _ in range(2)]
    x, y = (look([read_image(path) for path in list_files(folder).values()])
            for folder in (real / "images", flat_root / "train" / "images"))
    assert floors[0] == floors[1] > 0
    of_ten = [torch_fid(x, y[torch.randperm(50)[:10]]) for _ in range(50)]
    assert min(of_ten) / 2 < floors[0] < 2 * max(of_ten)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Toy streets of 32x48, 64 in train and in test, and 64 others that play the generated ones."""
    root = tmp_path_factory.mktemp("toy") / "prepared"
    prepare(root, train=64, val=0, test=64, size=(32, 48))
    return root, [scene([1, i], (32, 48))[0] for i in range(64)]


def blur(image, radius, rng):
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def noise(image, deviation, rng):
    return (image + rng.normal(0, deviation, image.shape)).clip(0, 255).astype(np.uint8)


def swap_channels(image, share, rng):
    return image[..., [1, 2, 0]] if rng.random() < share else image


def test_segmenter_features_know_damage(command, toy, tmp_path):
    """Other streets of the same kind are near the floor; blur, noise and swapped channels above it, the more so the
    stronger they are."""
    root, images = toy
    book = Colorbook.load(root / "colorbook.json")
    torch.manual_seed(0)
    state = {"arch": "lraspp_mobilenet_v3_large", "model": ByColour("", len(book)).state_dict()}
    torch.save(state | {"colorbook": book.classes, "size": [32, 48]}, tmp_path / "judge.pt")
    (tmp_path / "fake").mkdir()

    def distance(damage=None, strength=0.0):
        rng = np.random.default_rng(0)
        for i, image in enumerate(images):
            changed = damage(image, strength, rng) if damage else image
            Image.fromarray(changed).save(tmp_path / "fake" / f"street_{i}.png")
        report = command("--real", root / "test", "--fake", tmp_path / "fake", "--segmenter", tmp_path / "judge.pt",
                         "--train", root / "train", "--unpaired")
        return value(report, NAME) / value(report, f"{NAME}, floor")

    assert 0.3 < distance() < 2
    for damage, strengths in ((blur, (1.5, 3)), (noise, (40, 80)), (swap_channels, (0.5, 1))):
        weak, strong = (distance(damage, strength) for strength in strengths)
        assert 1.5 < weak < 0.8 * strong, (damage.__name__, weak, strong)


@pytest.mark.parametrize("arch, channels", [("lraspp_mobilenet_v3_large", 960), ("deeplabv3_resnet50", 2048)])
def test_features_are_the_last_map_of_the_real_networks(arch, channels, tmp_path):
    """Of both networks the features are what the last block of the backbone gives out, averaged over the image."""
    torch.manual_seed(0)
    net = evaluate.build_segmenter(arch, 4)
    torch.save({"arch": arch, "model": net.state_dict(), "colorbook": CLASSES, "size": [32, 48]}, tmp_path / "net.pt")
    segment = evaluate.load_segmenter(tmp_path / "net.pt", BOOK, torch.device("cpu"))
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    with torch.no_grad():
        x = evaluate.normalise(images)
        for block in net.eval().backbone.children():
            x = block(x)
        assert x.shape[1] == channels
        assert torch.allclose(segment.features(images), x.mean(dim=(2, 3)))


# ------------------------------------------------------------------------------------------------------ segmenters


def test_other_order_and_more_classes(command, real, fake, judge, tmp_path):
    """Labels are matched to classes by name, in any order; a label of no class is never given."""
    state = torch.load(judge)
    order = ["car", "person", "sky", "road"]
    rows = [list(CLASSES).index(name) for name in order]
    state["model"] = {name: torch.cat([tensor[rows], tensor[:1] + 100]) for name, tensor in state["model"].items()}
    colours = {name: CLASSES[name] for name in order} | {"ego vehicle": [1, 2, 3]}
    torch.save(state | {"colorbook": colours}, tmp_path / "five.pt")
    report = command("--real", real, "--fake", fake(real / "images"), "--segmenter", tmp_path / "five.pt")
    truth = np.stack([read_mask(path, BOOK)[0] for path in list_files(real / "masks").values()])
    seen = seen_by_hand(np.stack([read_image(path) for path in list_files(real / "images").values()]))
    found = columns(report, "pixel accuracy")["real / mask"], columns(report, "mean IoU")["real / mask"]
    assert found == pytest.approx(by_hand(truth, seen, 4))


def test_segmenter_of_another_size_is_a_warning(command, real, fake, judge, tmp_path):
    """Images of another size than the segmenter's training images have a warning; equal or unknown sizes have none."""
    folder = fake(real / "images")
    for size, expected in (([48, 80], True), ([16, 16], False)):
        torch.save(torch.load(judge) | {"image_size": size}, tmp_path / "sized.pt")
        found = command("--real", real, "--fake", folder, "--segmenter", tmp_path / "sized.pt")["warning"]
        assert ("trained on images of 48x80" in found and "of 16x16" in found) == expected == bool(found)
    assert not command("--real", real, "--fake", folder, "--segmenter", judge)["warning"]


def test_segmenter_sees_the_size_it_was_trained_at(judge, tmp_path, monkeypatch):
    """The net sees every image at the size of its training; its answer has the size of the image."""
    sizes = []

    class Noting(ByColour):
        def forward(self, x):
            sizes.append(tuple(x.shape[-2:]))
            return super().forward(x)

    monkeypatch.setattr(evaluate, "build_segmenter", Noting)
    torch.save(torch.load(judge) | {"size": [24, 48]}, tmp_path / "wide.pt")
    segment = evaluate.load_segmenter(tmp_path / "wide.pt", BOOK, torch.device("cpu"))
    images = torch.from_numpy(LOOKS[[1, 2]])[:, :, None, None].expand(2, 3, 16, 20)
    assert segment(images).shape == (2, 16, 20) and sizes == [(24, 48)]
    assert (segment(images) == torch.tensor([1, 2])[:, None, None]).all()


def test_mask2former(tmp_path):
    """The thesis's judge answers as its own processor does, in the colorbook's ids, never with a label of no class."""
    transformers = pytest.importorskip("transformers", reason="the transformers package is optional")
    names = ["car", "license plate", "sky", "person", "road"]
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
    segment = evaluate.load_segmenter(tmp_path / "net", BOOK, torch.device("cpu"))
    with torch.no_grad():  # the processor's own way, one picture at a time, without the label that is none of ours
        for image, ids in zip(images, segment(images)):
            made = net(**processor(images=image, return_tensors="pt"))
            made.class_queries_logits[..., 1] = -torch.inf
            expected = processor.post_process_semantic_segmentation(made, target_sizes=[(40, 48)])[0]
            assert (torch.tensor([2, 9, 1, 3, 0])[expected] == ids).double().mean() > 0.99  # to rounding


# ------------------------------------------------------------------------------------------------------- bad input


def empty(x):
    for path in (x.real / "images").iterdir():
        path.unlink()


def cut(x):
    path = sorted(x.fake.iterdir())[0]
    path.write_bytes(path.read_bytes()[:-30])


def unequal_pair(x):
    save_mask(np.zeros((8, 16), np.uint8), sorted((x.real / "masks").iterdir())[0], BOOK)


def other_names(x):
    for k, path in enumerate(sorted(x.fake.iterdir())):
        path.rename(x.fake / f"image{k}.png")


def other_masks(x):
    for k, path in enumerate(sorted((x.real / "masks").iterdir())):
        path.rename(x.real / "masks" / f"mask{k}.png")


def photo_as_mask(x):
    shutil.copy(sorted((x.real / "images").iterdir())[0], sorted((x.real / "masks").iterdir())[0])


def generator(x):
    torch.save({"model": {}, "ema": {}, "config": {}, "colorbook": CLASSES, "step": 3}, x.real / "generator.pt")


def other_classes(x):
    Colorbook({"tram": [9, 9, 9]} | dict(list(CLASSES.items())[:3])).save(x.real.parent / "colorbook.json")
    for path in (x.real / "masks").iterdir():
        save_mask(np.zeros((16, 16), np.uint8), path, BOOK)


@pytest.mark.parametrize("harm, options, message", [
    (empty, [], r"val: no pairs; expected images/NAME and masks/NAME"),
    (None, ["--real", "{real}/.."], r"real: no pairs; expected images/NAME and masks/NAME"),
    (None, ["--real", "{real}/images"], r"images: no pairs; expected images/NAME and masks/NAME"),
    (None, ["--fake", "{real}/nowhere"], r"nowhere: no such folder"),
    (None, ["--train", "{real}/nowhere"], r"nowhere: no such folder"),
    (None, ["--train", "{real}/.."], r"no images in this folder; expected some, or images/ in it"),
    (other_names, [], r"no image has the name of a mask \(flat_100, .*expected <stem>, .*--unpaired"),
    (cut, [], r"flat_100_w3_seed1.png .*not readable as an? (picture|image)"),
    (other_masks, [], r"val: no pairs; expected images/NAME and masks/NAME"),
    (None, ["--fake", "{fake}/flat_100_w3_seed1.png"], r"flat_100_w3_seed1.png: a file, expected a folder"),
    (photo_as_mask, [], r"flat_100.png: .* have colours that are in no class"),
    (unequal_pair, [], r"flat_100.png: the image is \(16, 16\) and the mask \(8, 16\)"),
    (None, ["--guidance", 2], r"images of guidance 3.0: choose one with --guidance"),
    (None, ["--guidance", 2, "--unpaired"], r"images of guidance 3.0: choose one with --guidance"),
    (None, ["--out", "{fake}"], r"fake: a folder of images; expected a folder of its own"),
    (None, ["--out", "{real}"], r"val: a folder of images; expected a folder of its own"),
    (None, ["--out", "{real}/masks"], r"masks: a folder of images; expected a folder of its own"),
    (None, ["--out", "{judge}"], r"segmenter.pt: a file, expected a folder"),
    (None, ["--inception-weights", "{real}/nowhere.pth"], r"nowhere.pth: not the weights of .*Inception.*https"),
    (None, ["--inception-weights", "{judge}"], r"segmenter.pt: not the weights of torch-fidelity's Inception.*https"),
    (None, ["--segmenter", "{real}/images/flat_100.png"], r"flat_100.png: seen from .*not a segmenter's.*experiments"),
    (generator, ["--segmenter", "{real}/generator.pt"], r"generator.pt: .*not a segmenter's.*are generators"),
    (other_classes, ["--segmenter", "{judge}"], r"a segmenter of road, sky, car, person: it lacks tram of .*colorbook"),
])
def test_bad_input(command, real, fake, judge, tmp_path, harm, options, message):
    """What is wrong is said with its remedy, before anything is written."""
    x = SimpleNamespace(real=real, fake=fake(real / "images"))
    if harm:
        harm(x)
    options = [str(option).format(real=real, fake=x.fake, judge=judge) for option in options]
    with pytest.raises(SystemExit, match=f"error: (?s:.*){message}"):
        command("--real", real, "--fake", x.fake, *options)
    assert not (tmp_path / "report").exists()


def test_weights_that_would_run_code_are_refused(command, real, fake, tmp_path):
    """A file of weights that would run code is refused (torch-fidelity loads pickles whole)."""
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was here"), "w"))

    torch.save({"weights": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(SystemExit, match="evil.pth: not the weights"):
        command("--real", real, "--fake", fake(real / "images"), "--inception-weights", tmp_path / "evil.pth")
    assert not (tmp_path / "was here").exists()


def test_transformers_missing(monkeypatch):
    """Who gives a name that is no file learns what a segmenter can be, and what to install."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"facebook/some: .*experiments.segmenter.*pip install transformers"):
        evaluate.load_segmenter("facebook/some", BOOK, torch.device("cpu"))


@pytest.mark.parametrize("side", ["--fake", "--train"])
def test_masks_are_no_images(command, real, fake, side):
    """The folder of masks in the place of images is refused."""
    sides = {"--real": real, "--fake": fake(real / "images")} | {side: real / "masks"}
    with pytest.raises(SystemExit, match=r"error: .*flat_\d+.png: a mask, as all in its folder .*expected images"):
        command(*(x for pair in sides.items() for x in pair))
