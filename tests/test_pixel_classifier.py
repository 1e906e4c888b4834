"""Segmentation by the features of a diffusion network: what features are, and that the report holds what was judged."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoint import build, save_checkpoint
from dataset import Pairs
from ddpm import noise_like_seeds
from evaluate import scores
from experiments import pixel_classifier
from experiments.pixel_classifier import (classify_pixels, features, fine_tune, judge, load_source, runs_of_draw,
                                          sample_pixels, take, with_deviation, with_interval)
from masks import UNLABELLED
from conftest import CLASSES

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """checkpoint("name", key=value, ...) is the path of name/checkpoint.pt, a network of 16x16 with random weights."""

    def make(name="net", **settings):
        cfg, path = tiny(diffusion__T=20, **settings), tmp_path / name / "checkpoint.pt"
        torch.manual_seed(1)
        model, _, _ = build(cfg, len(CLASSES), CPU)
        path.parent.mkdir()
        save_checkpoint(path, {"ema": model.state_dict(), "step": 7, "config": cfg, "colorbook": CLASSES})
        return path

    return make


@pytest.fixture
def source(checkpoint):
    return load_source(checkpoint(train__ema=0.5), CPU, "fp32")


def test_features_are_what_leaves_the_block(source, flat_root):
    """The last convolution of the network, applied to the features of up3, gives the network's own output at that t."""
    images = Pairs(flat_root, "val", (16, 16)).planes[:3, :3]
    x0, noise = images / 127.5 - 1, noise_like_seeds([0], (3, 16, 16))()
    for share, t in ((0.05, 1), (0.25, 5), (0.75, 15)):
        x = source.diffusion.q_sample(x0, torch.tensor([t] * 3), noise)
        expected = source.model(x, torch.tensor([t] * 3))
        torch.testing.assert_close(source.model.out(features(source, images, ["up3"], [share])), expected)


def test_features_are_joined_and_enlarged(source, flat_root):
    """Channels of all blocks stand side by side, for one t after the other, each block enlarged to the image."""
    images = Pairs(flat_root, "val", (16, 16)).planes[:2, :3]
    joined = features(source, images, ["bottleneck", "up2"], [0.05, 0.25])
    assert joined.shape == (2, 2 * (32 + 8), 16, 16)
    parts = [features(source, images, [block], [t]) for t in (0.05, 0.25) for block in ("bottleneck", "up2")]
    assert torch.equal(joined, torch.cat(parts, dim=1))
    corner = parts[0][:, :, :4, :4]  # the bottleneck is 2x2: its corner value reaches a quarter of an enlarged pixel
    assert torch.equal(corner, corner[:, :, :1, :1].expand_as(corner))
    assert not torch.equal(parts[0][:, :, 0, 0], parts[0][:, :, 8, 8])
    assert not source.model.up2._forward_hooks


def test_no_mask_enters_the_features(source, flat_root):
    """Features do not depend on the stem of the mask, and a network without that stem gives some as well."""
    images = Pairs(flat_root, "val", (16, 16)).planes[:2, :3]
    before = features(source, images, ["up1"], [0.15])
    for weights in source.model.mask_stem.parameters():
        weights.fill_(1e3)
    assert torch.equal(features(source, images, ["up1"], [0.15]), before)


def test_pixels_are_labelled_and_of_all_images(source, flat_root, monkeypatch):
    """Every image gives as many pixels, none of them unlabelled, each with its own features."""
    pairs = take(Pairs(flat_root, "train", (16, 16)), [0, 1, 2, 3])
    pairs.planes[:, 3, :8] = UNLABELLED
    pairs.planes[3, 3] = 3
    monkeypatch.setattr(pixel_classifier, "PIXELS", 400)
    x, y = sample_pixels(source, pairs, ["image_stem"], [0.05], seed=0)
    assert x.shape == (400, 8) and y.shape == (400,)
    assert (y[300:] == 3).all() and UNLABELLED not in y
    maps = features(source, pairs.planes[:, :3], ["image_stem"], [0.05])
    for i, ids in enumerate(pairs.planes[:, 3]):
        where = (x[100 * i:100 * (i + 1), :, None, None] == maps[i]).all(1)  # (100, 16, 16)
        assert (where.flatten(1).sum(1) == 1).all() and len(where.nonzero()[:, 1:].unique(dim=0)) == 100
        assert torch.equal(ids[where.any(0)].sort().values.long(), y[100 * i:100 * (i + 1)].sort().values)


def test_voters_learn_the_classes(source, flat_root, monkeypatch):
    """From five images whose classes are colours, voters find the classes of others; a majority beats a wrong voter."""
    monkeypatch.setattr(pixel_classifier, "MLP", {"steps": 150, "batch_size": 256, "lr": 1e-2})
    train, test = (Pairs(flat_root, split, (16, 16)) for split in ("train", "test"))
    predict = classify_pixels(source, ["image_stem", "up3"], [0], 3, take(train, range(5)), 0)
    ids, disagreement = predict(test.planes[:, :3])
    right = ids == test.planes[:, 3]
    assert right.float().mean() > 0.9
    assert set((3 * disagreement).round().unique().tolist()) <= {0, 1, 2}
    assert (right[disagreement < 0.1]).float().mean() >= right.float().mean()


def test_a_vote_is_a_majority(source, flat_root, monkeypatch):
    """Of voters for 2, 2 and 1 the majority's 2 is the answer, and a third of them disagrees."""
    answers = iter([2, 2, 1])

    def always(x, y, num_classes, seed):
        k = next(answers)
        return lambda x: torch.nn.functional.one_hot(torch.full((len(x),), k), num_classes).float()

    monkeypatch.setattr(pixel_classifier, "train_mlp", always)
    pairs = take(Pairs(flat_root, "test", (16, 16)), [0])
    ids, disagreement = classify_pixels(source, ["up3"], [0.05], 3, pairs, 0)(pairs.planes[:, :3])
    assert ids.shape == (1, 16, 16) and (ids == 2).all()
    torch.testing.assert_close(disagreement, torch.full((1, 16, 16), 1 / 3))


def test_fine_tuning_begins_with_the_weights(source, flat_root, tmp_path, monkeypatch):
    """What is trained is the diffusion network with a new last layer; the source itself stays as it was."""
    before, trained = {key: value.clone() for key, value in source.model.state_dict().items()}, {}

    def fit(net, loss, load_batches, c, path, device, about):
        trained.update(net.state_dict())
        assert c["steps"] == 5 and c["ema"] == 0.995  # a recipe for all, and not the checkpoint's
        assert all(weights.requires_grad for weights in net.parameters())
        loss(net, next(load_batches(0))).backward()
        return net

    monkeypatch.setattr(pixel_classifier, "fit", fit)
    pairs = take(Pairs(flat_root, "train", (16, 16)), [0, 1])
    ids, disagreement = fine_tune(source, pairs, 0, 5, tmp_path)(pairs.planes[:, :3])
    assert ids.shape == (2, 16, 16) and ids.max() < 4 and disagreement is None
    assert trained["out.weight"].shape == (4, 8, 1, 1)
    assert all(torch.equal(trained[key], before[key]) for key in before if not key.startswith("out."))
    assert all(torch.equal(value, before[key]) for key, value in source.model.state_dict().items())


def test_random_weights_are_not_those_of_the_checkpoint(checkpoint):
    path = checkpoint()
    trained, untrained = (load_source(path, CPU, "fp32", trained) for trained in (True, False))
    assert not torch.equal(trained.model.up1.conv[0].net[0].weight, untrained.model.up1.conv[0].net[0].weight)
    assert [trained.about["steps"], untrained.about["steps"]] == [7, 0]


def test_predictions_are_judged_at_the_common_size(flat_root):
    """The truth at 8x8, enlarged, is judged against 16x16; agreement counts labelled pixels by agreement and truth."""
    small, judged = (Pairs(flat_root, "val", (side, side)) for side in (8, 16))
    judged.planes[0, 3, :4] = UNLABELLED
    disagreement = torch.zeros(10, 8, 8)
    disagreement[:, :2] = 0.5
    rest = iter(small.planes[:, 3].split(pixel_classifier.CHUNK))
    result = judge(lambda images: (next(rest), disagreement[:len(images)]), small, judged)
    enlarged = small.planes[:, 3].numpy().repeat(2, axis=1).repeat(2, axis=2)
    truth = judged.planes[:, 3].numpy()
    expected = np.zeros((4, 4), int)
    np.add.at(expected, (truth[truth != UNLABELLED], enlarged[truth != UNLABELLED]), 1)
    assert result["confusion"] == expected.tolist()
    right, labelled = truth == enlarged, truth != UNLABELLED
    counts = []
    for part in (np.s_[:, 4:], np.s_[:, :4]):
        counts += [int((~right & labelled)[part].sum()), int((right & labelled)[part].sum())]
    assert result["agreement"] == counts and counts[3] > 0


@pytest.fixture
def study(checkpoint, flat_root, tmp_path, monkeypatch):
    """study("--sizes", "4") runs the smallest form of the whole study; its results and its report."""
    nets = [checkpoint("masks"), checkpoint("small", model__conditional="false", data__size=[8, 8])]
    small = {"MEMBERS": 2, "TABLE_MEMBERS": 1, "TABLE_BLOCKS": ["down3", "up3"], "TABLE_TIMES": [0, 0.5], "SHOWN": 2,
             "MLP": {"steps": 3, "batch_size": 8, "lr": 1e-3}, "PIXELS": 200, "CHUNK": 64}
    for name, value in small.items():
        monkeypatch.setattr(pixel_classifier, name, value)
    monkeypatch.setitem(pixel_classifier.SEGMENTER, "batch_size", 2)
    monkeypatch.setitem(pixel_classifier.FINE_TUNING, "batch_size", 2)

    def run(*options, nets=nets):
        chosen = [word for net in nets for word in ("--checkpoint", net)]
        arguments = [*chosen, "--out", tmp_path / "out", "--draws", "2", "--steps", "1", *options]
        monkeypatch.setattr(sys, "argv", ["pixel_classifier", *map(str, arguments)])
        pixel_classifier.main()
        return json.loads((tmp_path / "out" / "results.json").read_text()), (tmp_path / "out" / "report.md").read_text()

    return run


def test_the_study(study, tmp_path, monkeypatch):
    """Tables hold the mean and deviation of what was judged; a larger study keeps what is there, another is refused."""
    first, _ = study("--sizes", "4", nets=[tmp_path / "masks" / "checkpoint.pt"])
    results, report = study("--sizes", "3,4,all")
    assert all(results["runs"][name] == run for name, run in first["runs"].items())
    names = ["masks", "small", "random weights"]
    methods = [f"{method} {name}" for method in ("pixel classifier of", "U-Net trained from") for name in names]
    rows = [*methods, "segmenter from scratch"]
    draws = {}
    for run in results["runs"].values():  # 5 pairs of test, 10 of val, all of them labelled
        assert np.sum(run["confusion"]) == (1280 if run["row"] in rows else 2560)
        draws.setdefault((run["row"], run["n"]), []).append(scores(torch.tensor(run["confusion"]))[1])
    assert set(draws) >= {(row, n) for row in rows for n in (4, 50)}
    assert [len(draws[row, 4]) for row in rows] == [2] * 7 and [len(draws[row, 50]) for row in rows] == [1] * 7
    assert {row for row, n in draws if n == 3} == {row for row in rows if "random" not in row}
    table, differences = (part.split("\n\n")[1] for part in report.split("Mean IoU on test")[1].split("Difference to"))
    assert "| 3 images, 2 draws | 4 images, 2 draws | all 50 images, 1 draw |" in table
    for row in rows:
        values = draws[row, 4]
        cells = [cell.strip() for cell in table.split(f"| {row} |")[1].split("\n")[0].split("|")]
        assert cells[1] == f"{(values[0] + values[1]) / 2:.3f} ± {abs(values[0] - values[1]) / 2**0.5:.3f}"
        assert (cells[0] == "") == ("random" in row) and cells[2] == f"{draws[row, 50][0]:.3f}"
        if row != rows[0]:
            mean = np.mean(np.subtract(values, draws[rows[0], 4]))
            cell = differences.split(f"| {row} |")[1].split("|")[1]
            assert cell.strip().startswith(f"{mean:+.3f} [")
    cells = [line for line in report.splitlines() if line.startswith(("| down3 |", "| up3 |"))]
    assert len(cells) == 2 and all(line.count("±") == 2 for line in cells)
    for line in ("- small: 8x8, without masks, 7 steps", "- random weights: 16x16, with masks, 0 steps"):
        assert line in report
    sheet = Image.open(tmp_path / "out" / "maps.png")
    assert sheet.width > 2 * 128 and sheet.height > (2 + 7 + 3) * 128
    assert Image.open(tmp_path / "out" / "curves.png").height > 7 * 18
    assert not list((tmp_path / "out").glob("unfinished/*"))

    for name in ("train_mlp", "fit", "train_segmenter"):
        monkeypatch.setattr(pixel_classifier, name, None)  # nothing is trained again
    assert study("--sizes", "3,4,all") == (results, report)
    with pytest.raises(SystemExit, match="made with another steps: choose another --out"):
        study("--sizes", "4", "--steps", "2")


def test_runs_of_a_draw():
    """All images are drawn once and 50 or more twice; random weights get the shown number and all; blocks two draws."""
    rows, cells = ["pixel classifier of a", "pixel classifier of random weights"], ["up1 at 0 T"]
    seen = {(*run, draw) for draw in range(4) for run in runs_of_draw(draw, rows, cells, [5, 20, 50, 90], 20, 90)}
    expected = {(rows[0], n, draw) for n, draws in {5: 4, 20: 4, 50: 2, 90: 1}.items() for draw in range(draws)}
    expected |= {(rows[1], 20, draw) for draw in range(4)} | {(rows[1], 90, 0)} | {(cells[0], 20, 0), (cells[0], 20, 1)}
    assert seen == expected


def test_cells_of_the_tables():
    """Differences of equal draws 0.1 and 0.3: mean 0.2, and t(1) = 12.706 times 0.1 to either side."""
    assert with_interval([0.2, 0.4], [0.3, 0.7]) == "+0.200 [-1.071, +1.471]"
    assert with_interval([0.2], [0.3]) == "+0.100" and with_interval([0.2], []) == ""
    assert with_deviation([0.2, 0.4]) == "0.300 ± 0.141" and with_deviation([0.2]) == "0.200"


def test_networks_of_several_folders(study, checkpoint, tmp_path, capsys):
    """Checkpoints of another data.root are refused, and with --root they are marked in what is printed."""
    nets = [tmp_path / "masks" / "checkpoint.pt", checkpoint("other", data__root=str(tmp_path / "elsewhere"))]
    with pytest.raises(SystemExit, match=f"other on {tmp_path / 'elsewhere'}.*name the folder by --root"):
        study(nets=nets)
    root = load_source(nets[0], CPU, "fp32").about["root"]
    with pytest.raises(SystemExit, match="--sizes 51"):
        study("--root", root, "--sizes", "51", nets=nets)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if "whether it saw what it is judged on" in line] == ["- other"]


def test_mistakes(study, checkpoint, tmp_path):
    """More images than there are, two networks of one name, and no network are one line."""
    with pytest.raises(SystemExit, match="--sizes 51: .*train has only 50 pairs"):
        study("--sizes", "51")
    net = tmp_path / "masks" / "checkpoint.pt"
    with pytest.raises(SystemExit, match="folders called masks, masks"):
        study(nets=[net, net])
    with pytest.raises(SystemExit, match="no such checkpoint"):
        study(nets=[tmp_path / "nowhere.pt"])
    with pytest.raises(SystemExit, match="neither val/ nor test/"):
        study("--root", tmp_path)
