"""Streets segmented from 20 labelled images, by the features of a diffusion network (seed 003; Baranchuk et al. 2022).

    python -m experiments.pixel_classifier --checkpoint runs/idd_lite/checkpoint.pt
    python -m experiments.pixel_classifier --checkpoint runs/idd_lite/checkpoint.pt runs/no_masks/checkpoint.pt \\
        runs/seed003/checkpoint.pt

A noisy image goes through the network without a mask, at three noise levels. What leaves the blocks of its decoder,
enlarged to the image, are the features of each pixel. Ten small networks learn the classes of single pixels from them,
and vote; where they disagree, the answer is uncertain. Beside that, on the same labelled images: the diffusion network
fine-tuned, and the segmenter of experiments/segmenter.py; and, with 20 and all images, the pixel classifier and the
fine-tuning of a network with random weights. There are 5, 10, 20, 50, 100 and all labelled images: three draws of the
small numbers, two from 50 on, and all once. More --draws, --sizes or checkpoints add to a finished study.

The second command adds a network that never saw a mask, which is the honest case, and the seed's attempt: 32x32, the
same blocks and t, its 1536 features. The two are trained by
    python train.py --preset idd_lite --set model.conditional=false --set out=runs/no_masks
    python train.py --preset idd_lite --set data.size=[32,32] --set model.hidden_dim=64 --set out=runs/seed003

Writes report.md (tables), curves.png, maps.png (predictions beside the truth) and results.json after each draw. On two
CPU cores the first command takes about 90 minutes, of which fine-tuning has 45 and the segmenter 25, and each further
checkpoint of 64x64 40. Ctrl-C loses nothing: the same command goes on.
"""

import argparse
import copy
import json
import math
import shutil
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.timing import table
from checkpoint import build, load_checkpoint, pick_device, pick_precision, replacing
from config import command
from dataset import Pairs, batches
from ddpm import noise_like_seeds
from evaluate import confusion_matrix, load_segmenter, scores
from experiments.common import draw_curves, parse_count
from experiments.lesson import grid
from experiments.segmenter import AUGMENT, paired, save, train_segmenter
from experiments.training import fit
from masks import UNLABELLED

BLOCKS = ["bottleneck", "up1", "up2", "up3"]  # the decoder: 8 h channels at each t
TIMES = [0.05, 0.15, 0.25]      # shares of T: t = 50, 150, 250, as in the paper and the seed
MEMBERS = 10                    # networks that vote
PIXELS = 40_000                 # that they learn from, as many of each image: neighbours show much the same
TABLE_BLOCKS, TABLE_TIMES, TABLE_MEMBERS = ["down1", "down2", "down3", *BLOCKS], [0, *TIMES, 0.5, 0.75], 3
MLP = {"steps": 500, "batch_size": 256, "lr": 1e-3}
SEGMENTER = {"arch": "lraspp_mobilenet_v3_large", "backbone": None, "batch_size": 16, "lr": 3e-3}
FINE_TUNING = {"batch_size": 16, "lr": 1e-3, "warmup": 50, "hold": 400, "beta2": 0.99, "grad_clip": 1.0, "ema": 0.995,
               "log_every": 50, "val_every": 10**9, "preview_every": 10**9, "save_every": 200, "accumulate": 1,
               "compile": False, "activation_checkpointing": False}
ALL_STEPS = 5                   # times as many steps of fine-tuning and of the segmenter with all labelled images
RANDOM = "random weights"
SHOWN, MAPS = 6, ["ids", "disagreement"]  # held-out images in maps.png; what is drawn of each
CHUNK = 8                       # images whose features are in memory at a time

# -------------------------------------------------------------------------------------------- the pixel classifier


def load_source(path, device, precision, trained=True):
    """The network of a checkpoint, whose features are taken; trained=False gives it the random weights of a start."""
    state = load_checkpoint(path)
    cfg = state["config"]
    cfg["train"]["precision"] = precision
    torch.manual_seed(0)
    model, diffusion, autocast = build(cfg, len(state["colorbook"]), device)
    if trained:
        model.load_state_dict(state["ema"])
    about = {"size": cfg["data"]["size"], "masks": cfg["model"]["conditional"], "root": cfg["data"]["root"],
             "steps": state["step"] if trained else 0,
             "weights": zlib.crc32(model.out.weight.detach().cpu().numpy().tobytes())}
    return SimpleNamespace(model=model.eval().requires_grad_(False), diffusion=diffusion, autocast=autocast,
                           device=device, precision=precision, size=tuple(cfg["data"]["size"]), about=about)


@torch.no_grad()
def features(source, images, blocks, times):
    """What leaves the named blocks, enlarged to the image: (B, C, H, W) float32, C the channels of all blocks and t.

    images (B, 3, H, W) uint8; times are shares of T. No mask is given. All images get one noise, as in the paper's
    code, so that features are a function of the image.
    """
    x0 = images.to(source.device).float() / 127.5 - 1
    noise = noise_like_seeds([0], x0.shape[1:], source.device)()
    outputs, hooks = [], []
    for block in blocks:
        module = source.model.get_submodule(block)
        hooks.append(module.register_forward_hook(lambda module, inputs, output: outputs.append(output.float())))
    for share in times:
        t = torch.full((len(x0),), round(share * source.diffusion.T), device=source.device)
        with source.autocast():
            source.model(source.diffusion.q_sample(x0, t, noise), t)
    for hook in hooks:
        hook.remove()
    return torch.cat([F.interpolate(output, x0.shape[2:], mode="bilinear") for output in outputs], dim=1)


def sample_pixels(source, pairs, blocks, times, seed):
    """Features (P, C) and classes (P,) of at most PIXELS labelled pixels, as many of each image, drawn by the seed."""
    generator, x, y = torch.Generator().manual_seed(seed), [], []
    for planes in tqdm(pairs.planes.split(CHUNK), "features", unit="batch", leave=False):
        maps = features(source, planes[:, :3], blocks, times).flatten(2)  # (B, C, H*W)
        for image_maps, ids in zip(maps, planes[:, 3].flatten(1).long()):
            labelled = (ids != UNLABELLED).nonzero()[:, 0]
            chosen = labelled[torch.randperm(len(labelled), generator=generator)[: PIXELS // len(pairs)]]
            x.append(image_maps[:, chosen.to(source.device)].T)
            y.append(ids[chosen])
    return torch.cat(x), torch.cat(y).to(source.device)


def train_mlp(x, y, num_classes, seed):
    """The classifier of DatasetGAN (Zhang et al. 2021), from features x (P, C) to logits; y (P,) are their classes."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(x.shape[1], 128), nn.ReLU(), nn.BatchNorm1d(128),
        nn.Linear(128, 32), nn.ReLU(), nn.BatchNorm1d(32),
        nn.Linear(32, num_classes)).to(x.device)
    optimizer = torch.optim.Adam(net.parameters(), MLP["lr"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MLP["lr"], total_steps=MLP["steps"])
    for _ in range(MLP["steps"]):
        i = torch.randint(len(x), (MLP["batch_size"],)).to(x.device)
        loss = F.cross_entropy(net(x[i]), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def classify_pixels(source, blocks, times, members, pairs, seed):
    """An ensemble trained on the pairs, as a function of images (B, 3, H, W) uint8.

    It gives class ids (B, H, W) uint8, those of the majority, and the share (B, H, W) of voters for other classes.
    """
    num_classes = len(pairs.colorbook)
    x, y = sample_pixels(source, pairs, blocks, times, seed)
    mean, deviation = x.mean(0), x.std(0) + 1e-3
    x = (x - mean) / deviation
    nets = []
    for member in tqdm(range(members), "voters", unit="net", leave=False):
        nets.append(train_mlp(x, y, num_classes, 1000 * seed + member))

    @torch.no_grad()
    def predict(images):
        maps = (features(source, images, blocks, times).permute(0, 2, 3, 1) - mean) / deviation  # (B, H, W, C)
        with source.autocast():
            votes = torch.stack([net(maps.flatten(0, 2)).argmax(1) for net in nets])             # (members, B*H*W)
        share, winner = F.one_hot(votes, num_classes).float().mean(0).max(1)
        return winner.view(maps.shape[:3]).byte().cpu(), 1 - share.view(maps.shape[:3]).cpu()

    return predict


# ----------------------------------------------------------------------------------------- what it is compared with


def fine_tune(source, pairs, seed, steps, folder):
    """The U-Net with a 1x1 convolution to the classes in place of its last, trained on clean images at t = 0.

    Like all methods a function of images that gives class ids and a disagreement, which is None here.
    """
    torch.manual_seed(seed)
    net = copy.deepcopy(source.model).requires_grad_(True)
    net.out = nn.Conv2d(net.out.in_channels, len(pairs.colorbook), 1).to(source.device)
    c = FINE_TUNING | {"steps": steps, "precision": source.precision}

    def logits_of(net, images):
        x = images.to(source.device).float() / 127.5 - 1
        return net(x, torch.zeros(len(x), device=source.device)).float()

    def loss(net, planes):
        ids = planes[:, 3].long()
        labelled = (ids != UNLABELLED).sum().clamp(min=1)
        return F.cross_entropy(logits_of(net, planes[:, :3]), ids, ignore_index=UNLABELLED, reduction="sum") / labelled

    def load_batches(start):
        return batches(pairs, c["batch_size"], seed, start, flip=0.5, augment=AUGMENT, device=source.device)

    about = {"kind": "fine-tuned U-Net", "seed": seed, "source": source.about, "pairs": len(pairs), "recipe": c}
    averaged = fit(net, loss, load_batches, c, folder / "unet.pt", source.device, about)

    @torch.no_grad()
    def predict(images):
        with source.autocast():
            return logits_of(averaged, images).argmax(1).byte().cpu(), None

    return predict


def train_from_scratch(device, precision, pairs, seed, steps, folder):
    """The segmenter of experiments/segmenter.py with its augmentation, which sees images at twice their size."""
    size = [2 * side for side in pairs.size]
    settings = SEGMENTER | {"steps": steps, "size": size, "precision": precision.replace("fp16", "fp32")}
    folder.mkdir(parents=True, exist_ok=True)
    net = train_segmenter(pairs, settings, seed, device, "segmenter", folder / "unfinished.pt")
    save(folder / "segmenter.pt", {"arch": settings["arch"], "model": net.state_dict(), "size": size,
                                   "colorbook": pairs.colorbook.classes})
    segment = load_segmenter(folder / "segmenter.pt", pairs.colorbook, device)
    return lambda images: (segment(images), None)


# --------------------------------------------------------------------------------------------------------- judging


def resize(planes, size):
    """Class ids or disagreement (B, h, w) at another size (height, width), NEAREST."""
    return F.interpolate(planes[:, None].float(), size, mode="nearest")[:, 0].to(planes.dtype)


def judge(predict, pairs, judged):
    """The confusion matrix of predictions for `pairs`, brought to the size of `judged`, the same pairs in that size.

    Also "agreement", numbers of pixels: all voters agree and are wrong, agree and are right, differ and are wrong,
    differ and are right.
    """
    confusion, agreement = 0, torch.zeros(4, dtype=torch.long)
    chunks = list(zip(pairs.planes.split(CHUNK), judged.planes.split(CHUNK)))
    for planes, judged_planes in tqdm(chunks, "judging", unit="batch", leave=False):
        ids, disagreement = predict(planes[:, :3])
        ids, truth = resize(ids, judged.size), judged_planes[:, 3]
        confusion = confusion + confusion_matrix(truth, ids, len(pairs.colorbook))
        if disagreement is not None:
            kinds = 2 * (resize(disagreement, judged.size) > 1e-6) + (ids == truth)
            agreement += torch.bincount(kinds[truth != UNLABELLED], minlength=4)
    return {"confusion": confusion.tolist(), "agreement": agreement.tolist()}


def take(pairs, chosen):
    """The pairs of the chosen numbers."""
    some = copy.copy(pairs)
    some.planes, some.files = pairs.planes[chosen], [pairs.files[i] for i in chosen]
    return some


# ---------------------------------------------------------------------------------------------------------- report


def draws_of(runs, row, n, key="confusion"):
    """What judge() found for a row, in each draw of n images: (draws, ...)."""
    return torch.tensor([run[key] for run in runs if (run["row"], run["n"]) == (row, n)])


def mean_ious(runs, row, n):
    """The mean IoU of each draw; [] where the row has none of n images."""
    confusions = draws_of(runs, row, n)
    return scores(confusions)[1] if len(confusions) else []


def with_deviation(values):
    """Mean ± sample deviation of the draws; "" of none."""
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}" if values else ""


def with_interval(first, values):
    """Mean of values - first, draw by draw, and its 95 % interval; "" where either has none."""
    if not first or not values:
        return ""
    result = paired(first, values)
    interval = " [{:+.3f}, {:+.3f}]".format(*result["interval"]) if result["interval"] else ""
    return f"{result['difference']['mean']:+.3f}{interval}"


def make_table(rows, columns, cell):
    """A Markdown table of cell(row, key), with a column for each {title: key}."""
    return table([{"": row} | {title: cell(row, key) for title, key in columns.items()} for row in rows])


def describe(name, source, judged, resized, root):
    """A line on a network: what it is, and the mean IoU that the true masks at its size reach at the judged one."""
    about, truth = source.about, judged.planes[:, 3]
    _, reached, _ = scores(confusion_matrix(truth, resize(resized.planes[:, 3], judged.size), len(judged.colorbook)))
    line = (f"- {name}: {source.size[0]}x{source.size[1]}, with{'' if about['masks'] else 'out'} masks, "
            f"{about['steps']} steps on the train split of {about['root']}; the true masks at its size have mean IoU "
            f"{reached:.3f}")
    if about["steps"] and Path(about["root"]).resolve() != root.resolve():
        line += f". **Not of {root}: whether it saw what it is judged on is unknown**"
    return line


def write_report(runs, rows, args, legend, judged, sizes, shown_n):
    """report.md: what was judged in the runs. shown_n is the number of labelled images where there is but one."""
    first, splits, train = next(iter(rows)), list(judged)[1:], judged["train"]
    split, names = splits[-1], train.colorbook.names

    def class_iou(row, k):
        return scores(draws_of(runs, row, shown_n))[2][:, k].nanmean().item()

    def agreement(row, column):
        wrong, right, others_wrong, others_right = draws_of(runs, row, shown_n, "agreement").sum(0).tolist()
        agreed, others = wrong + right, others_wrong + others_right
        return [agreed / (agreed + others), right / max(agreed, 1), others_right / max(others, 1)][column]

    columns = {}
    for n in sizes:
        count = len(mean_ious(runs, first, n))
        if count:
            columns[f"{'all ' if n == len(train) else ''}{n} images, {count} draw{'s' * (count > 1)}"] = n
    blocks = {f"t = {t:g} T": f"{t:g} T" for t in TABLE_TIMES}
    parts = [
        "# Segmentation from few labelled images",
        legend,
        f"Judged at {train.size[0]}x{train.size[1]}. A draw is of the labelled images and the seed, the same for all "
        f"rows. The segmenter and fine-tuning take {args.steps} steps, with all images {ALL_STEPS * args.steps}. "
        f"Blocks: {', '.join(BLOCKS)}; t: {', '.join(f'{t:g} T' for t in TIMES)}.",
        f"Mean IoU on {split}; ± is the sample deviation over the draws:",
        make_table(rows, columns, lambda row, n: with_deviation(mean_ious(runs, row, n))),
        f"Difference to {first}, draw by draw, and its 95 % interval (Student's t, which is wide for two draws):",
        make_table([row for row in rows if row != first], columns,
                   lambda row, n: with_interval(mean_ious(runs, first, n), mean_ious(runs, row, n))),
        f"IoU of each class on {split}, {shown_n} images; nan: does not occur.",
        make_table(rows, {name: k for k, name in enumerate(names)}, class_iou),
        f"Does disagreement find mistakes? Shares of the pixels of {split}, {shown_n} images, {MEMBERS} voters:",
        make_table([row for row in rows if row.startswith("pixel classifier")],
                   {"all voters agree": 0, "right where they agree": 1, "right elsewhere": 2}, agreement),
        f"Which block, which t? Mean IoU on {splits[0]} of {TABLE_MEMBERS} voters that see one block at one t of "
        f"{first.removeprefix('pixel classifier of ')}, {shown_n} images. Nothing above was chosen by it.",
        make_table(TABLE_BLOCKS, blocks, lambda block, t: with_deviation(mean_ious(runs, f"{block} at {t}", shown_n))),
        "![mean IoU over the number of images](curves.png)", "![predictions](maps.png)"]
    text = "\n\n".join(parts) + "\n"
    print("\n" + text)
    with replacing(args.out / "report.md") as file:
        file.write(text.encode())


def draw_maps(rows, shown, n, out):
    """Held-out pairs, and below them what each row predicts; disagreement is brighter where more voters disagree."""
    images = [list(shown.planes[:, :3].permute(0, 2, 3, 1).numpy()),
              [shown.colorbook.paint(ids) for ids in shown.planes[:, 3].numpy()]]
    labels = ["image", "truth"]
    for row in rows:
        with np.load(out / "maps" / f"{row}, {n} images.npz") as maps:
            images.append([shown.colorbook.paint(ids) for ids in maps["ids"]])
            labels.append(row)
            if "disagreement" in maps:
                grey = np.uint8(255 * maps["disagreement"])
                images.append([np.repeat(plane[..., None], 3, axis=2) for plane in grey])
                labels.append("disagreement")
    return grid(images, [""] * len(shown), labels, f"{n} labelled images, the first draw; drives that none has seen")


# ------------------------------------------------------------------------------------------------------- the study


def load_sources(args, device, precision):
    """{name: network}, the checkpoints by their folders and random weights; and the data's root, by default theirs."""
    names = [path.absolute().parent.name for path in args.checkpoint]
    if len(set(names)) < len(names):
        raise ValueError(f"the checkpoints lie in folders called {', '.join(names)}, their names in the tables: "
                         "rename one of the equal ones")
    sources = {name: load_source(path, device, precision) for name, path in zip(names, args.checkpoint)}
    roots = {Path(source.about["root"]).resolve(): name for name, source in sources.items()}
    if args.root is None and len(roots) > 1:
        found = ", ".join(f"{name} on {root}" for root, name in roots.items())
        raise ValueError(f"the checkpoints were trained on different folders: {found}. What one is judged on, another "
                         "may have been trained on: name the folder by --root if none has seen its test split")
    sources[RANDOM] = load_source(args.checkpoint[0], device, precision, trained=False)
    return sources, args.root or Path(sources[RANDOM].about["root"])


def plan(sources, device, precision):
    """What is compared, {row: (size, method)}: the rows of most tables, and those of the table of blocks.

    method(pairs, seed, steps, folder) trains on pairs of that size, and gives a function that predicts.
    """
    def voters(source, blocks, times, members):  # their steps are those of MLP, and they leave nothing in a folder
        return lambda pairs, seed, *_: classify_pixels(source, blocks, times, members, pairs, seed)

    first, rows, cells = next(iter(sources.values())), {}, {}
    for name, source in sources.items():
        rows[f"pixel classifier of {name}"] = source.size, voters(source, BLOCKS, TIMES, MEMBERS)
    for name, source in sources.items():
        rows[f"U-Net trained from {name}"] = source.size, partial(fine_tune, source)
    rows["segmenter from scratch"] = first.size, partial(train_from_scratch, device, precision)
    for t in TABLE_TIMES:
        for block in TABLE_BLOCKS:
            cells[f"{block} at {t:g} T"] = first.size, voters(first, [block], [t], TABLE_MEMBERS)
    return rows, cells


def runs_of_draw(draw, rows, cells, sizes, shown_n, n_all):
    """[(row, n)] of a draw: all images are drawn once, and 50 or more twice; random weights get shown_n and all."""
    runs = []
    for n in sizes:
        done = draw > 0 and n == n_all or draw > 1 and n >= 50
        runs += [(row, n) for row in rows if not done and (n in (shown_n, n_all) or not row.endswith(RANDOM))]
    return runs + [(cell, shown_n) for cell in cells if draw < 2]


def resume(file, made_with):
    """The results in the file, or empty ones. ValueError where one of made_with {name: value} was another then."""
    results = json.loads(file.read_text()) if file.exists() else {"made with": {}, "runs": {}}
    changed = [name for name, value in made_with.items() if results["made with"].get(name, value) != value]
    if changed:
        raise ValueError(f"{file}: made with another {', '.join(changed)}: choose another --out, or delete it")
    results["made with"] |= made_with
    return results


def run_study(args):
    device = pick_device("auto")
    precision = pick_precision("auto", device)
    sources, root = load_sources(args, device, precision)
    splits = [split for split in ("val", "test") if (root / split).is_dir()]
    if not splits:
        raise ValueError(f"{root}: neither val/ nor test/ is there to judge on")
    data, size = {}, sources[RANDOM].size
    for each in {source.size for source in sources.values()}:
        data[each] = {split: Pairs(root, split, each, memory_gb=math.inf) for split in ("train", *splits)}
    judged = data[size]
    legend = "\n".join(describe(name, source, judged[splits[-1]], data[source.size][splits[-1]], root)
                       for name, source in sources.items())
    print(legend)
    n_all = len(judged["train"])
    sizes = sorted({n_all if n == "all" else n for n in args.sizes})
    if sizes[-1] > n_all:
        raise ValueError(f"--sizes {sizes[-1]}: {root}/train has only {n_all} pairs")
    shown_n = min(sizes, key=lambda n: abs(n - 20))
    shown = torch.linspace(0, len(judged[splits[-1]]) - 1, SHOWN).long().tolist()

    made_with = {"steps": [args.steps, ALL_STEPS * args.steps]}
    made_with |= {name: source.about for name, source in sources.items()}
    made_with |= {split: zlib.crc32(pairs.planes.numpy()) for split, pairs in judged.items()}
    results = resume(args.out / "results.json", made_with)
    (args.out / "maps").mkdir(parents=True, exist_ok=True)
    rows, cells = plan(sources, device, precision)
    finished = []
    for draw in range(args.draws):
        order = np.random.default_rng(draw).permutation(n_all).tolist()
        runs = runs_of_draw(draw, rows, cells, sizes, shown_n, n_all)
        for row, n in tqdm(runs, f"draw {draw + 1} of {args.draws}", unit="run"):
            name, split = f"{row}, {n} images, draw {draw}", splits[-1] if row in rows else splits[0]
            if name not in results["runs"]:
                own_size, method = (rows | cells)[row]
                folder = args.out / "unfinished" / name
                steps = args.steps * (ALL_STEPS if n == n_all else 1)
                predict = method(take(data[own_size]["train"], order[:n]), draw, steps, folder)
                if draw == 0 and row in rows:
                    maps = predict(take(data[own_size][split], shown).planes[:, :3])
                    maps = {key: resize(plane, size).numpy() for key, plane in zip(MAPS, maps) if plane is not None}
                    np.savez(args.out / "maps" / f"{row}, {n} images.npz", **maps)
                found = judge(predict, data[own_size][split], judged[split])
                results["runs"][name] = {"row": row, "n": n, "draw": draw} | found
                with replacing(args.out / "results.json") as file:
                    file.write(json.dumps(results).encode())
                if folder.exists():
                    shutil.rmtree(folder)
            finished.append(results["runs"][name])

        write_report(finished, rows, args, legend, judged, sizes, shown_n)
        curves = {row: {n: mean_ious(finished, row, n) for n in sizes if mean_ious(finished, row, n)} for row in rows}
        title = f"mean IoU on {splits[-1]} over the number of labelled images; bars: lowest and highest draw"
        draw_curves(curves, title, log_x=True).save(args.out / "curves.png")
        draw_maps(rows, take(judged[splits[-1]], shown), shown_n, args.out).save(args.out / "maps.png")
    print(f"{args.out}: report.md, curves.png, maps.png, results.json")


def parse_sizes(text):
    return [part if part == "all" else parse_count(part) for part in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, nargs="+", action="extend", required=True, help="of train.py; tables use the names "
        "of their folders. The first one's size is what all are judged at")
    add("--root", type=Path, help="a prepared data set, whose val and test splits none of the networks was trained on; "
        "default: that of all checkpoints")
    add("--out", type=Path, default=Path("runs/pixels"), help="default: %(default)s")
    add("--sizes", type=parse_sizes, default="5,10,20,50,100,all", metavar="N[,N...]", help="numbers of labelled "
        "images; default: %(default)s")
    add("--draws", type=parse_count, default=3, help="of the labelled images and of the seed, at most 2 of 50 and more "
        "images, and 1 of all; default: %(default)s")
    add("--steps", type=parse_count, default=300, help="of fine-tuning and of the segmenter; five times as many with "
        "all images; default: %(default)s")
    command(run_study, parser.parse_args())


if __name__ == "__main__":
    main()
