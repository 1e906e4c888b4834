"""How good are the pictures: do they obey the mask, and do they look real?

    python evaluate.py --real data/idd_lite/prepared/test --fake out                       what needs no segmenter
    python evaluate.py --real test/ --fake out/ --segmenter runs/segmenter/checkpoint.pt   and whether the masks were obeyed
    python evaluate.py --real test/ --fake out/ --segmenter facebook/mask2former-swin-large-cityscapes-semantic
    python evaluate.py --real test/ --fake out/ --train train/                             and whether pictures were copied

--real is a split of a prepared data set (images/ and masks/) or a folder of images; --fake is what sample.py wrote, or any
folder of <stem>.png or <stem>_<k>.png. Pairs are matched by stem. The table on the screen, with what every number means and
what it cannot tell, goes to report.json, beside at_a_glance.png and the pairs of lowest and highest SSIM.
"""

import argparse
import json
import math
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.utils import create_feature_extractor
from torchvision.models import segmentation
from tqdm import tqdm

from checkpoint import pick_device
from dataset import contact_sheet, fit, fit_pair, list_files, match_pairs
from masks import UNLABELLED, Colorbook, open_image, read_mask

MEANING = {  # of a number: what it says; what it cannot tell
    "SSIM": "likeness to the real picture of the mask, 1 = equal; another light or colour lowers it: no test of the mask",
    "FID, layer 2048": "distance of the two sets in Inception's last features, 0 = same mean and covariance; nothing about a "
                       "single picture or its mask",
    "FID, layer 64": "the same in early features, textures and colours (the thesis's scale); blind to what is shown, not "
                     "comparable with layer 2048",
    "KID": "like FID without its bias from N, around 0 = same distribution, may be negative; differences within +- are noise",
    "share of the ceiling, mean IoU": "how much of what the segmenter could see is there, classes alike; cannot tell "
                                      "whether it looks real",
    "share of the ceiling, pixel accuracy": "the same, pixels alike: the large classes decide",
    "distance within a mask": "how different the pictures of one mask are, 0 = always the same one; noise is difference too",
    "distance between real pictures": "the scale for the line above: real pictures of different masks; their content differs too",
    "nearest training picture, generated": "distance to the most similar training picture, mirrored or not; far below the next "
                                           "line = copied, but copied details do not show",
    "nearest training picture, real": "the scale for the line above: pictures that nobody copied",
    "generated / mask": "does the generated picture show what its mask asked for? The segmenter's own mistakes count too",
    "real / mask": "the ceiling: what this segmenter reaches on real pictures; another segmenter has another one",
    "generated / real": "what it sees in both, as in the thesis and the paper; a mistake made in both counts as agreement",
    "pixel accuracy": "share of pixels in the right class; large classes hide small ones",
    "mean IoU": "mean over the classes that occur of intersection over union (below, per class); rare ones weigh as much as road",
}
DISTANCE = "root mean square difference of 32x32 thumbnails, in grey levels 0..255"
SSIM = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}  # so the window is 11x11

# ------------------------------------------------------------------------------------------------ segmenter

SAME = {"pavement": "sidewalk", "tree": "vegetation", "pedestrian": "person", "motorbike": "motorcycle"}


def build_segmenter(arch, num_classes):
    """A torchvision net without pretrained weights: "deeplabv3_resnet50" or "lraspp_mobilenet_v3_large".

    Of normalised images (B, 3, H, W) it makes {"out": logits (B, num_classes, H, W)}.
    """
    nets = {net.__name__: net for net in (segmentation.deeplabv3_resnet50, segmentation.lraspp_mobilenet_v3_large)}
    if arch not in nets:
        raise ValueError(f"no segmenter is called {arch!r}; there are {', '.join(nets)}")
    return nets[arch](weights=None, weights_backbone=None, num_classes=num_classes)


def normalise(images):
    """Images (B, 3, H, W), 0..255, as the segmenter sees them in training and in judging: by ImageNet's mean and deviation."""
    mean, std = images.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float32)[..., None, None]
    return (images.float() / 255 - mean) / std


def match_classes(labels, colorbook, where):
    """Labels of a segmenter to classes of the colorbook, by name: {class id: label id}; says what has no partner."""

    def key(name):
        name = name.lower().replace("_", " ").replace("-", " ").strip()
        return SAME.get(name.removesuffix("s"), name).removesuffix("s")

    ids = {key(label): i for i, label in enumerate(labels)}
    found = {k: ids[key(name)] for k, name in enumerate(colorbook.names) if key(name) in ids}
    missing = [name for k, name in enumerate(colorbook.names) if k not in found]
    if 2 * len(found) < len(colorbook):
        raise ValueError(f"{where}: a segmenter of other classes: of {', '.join(colorbook.names)} it has only "
                         f"{len(found)}; its own are {', '.join(labels)}. Train one on these classes (python -m "
                         "experiments.segmenter), or name the pictures' own colorbook with --colorbook")
    if missing:
        print(f"{where} has no {', '.join(missing)}: pixels of these classes are left out of every number")
    if len(found) < len(labels):
        others = [label for i, label in enumerate(labels) if i not in found.values()]
        print(f"{where}: {len(others)} of its labels are no class of the colorbook and are never chosen: {', '.join(others)}")
    return found


def load_segmenter(name, colorbook, device):
    """The judge: a function from images (B, 3, H, W) uint8 to class ids (B, H, W) uint8, and {class id: its label id}.

    name is a checkpoint of experiments/segmenter.py, or a Mask2Former of the transformers package: a folder or its name.
    ValueError where it is neither, or knows less than half of the colorbook's classes.
    """
    if not Path(name).is_file():
        if Path(name).suffix == ".pt":
            raise ValueError(f"{name}: no such file; expected a checkpoint of experiments/segmenter.py, which trains one")
        return load_mask2former(name, colorbook, device)
    try:
        state = torch.load(name, map_location="cpu", weights_only=True)
        labels, size = list(state["colorbook"]), state["size"]
        net = build_segmenter(state["arch"], len(labels))
        net.load_state_dict(state["model"])
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        raise ValueError(f"{name}: not a checkpoint of experiments/segmenter.py: {type(error).__name__}: "
                         f"{str(error).splitlines()[0]}") from error
    found = match_classes(labels, colorbook, name)
    classes, chosen = (torch.tensor(list(ids), device=device) for ids in (found, found.values()))
    net.to(device).eval()

    @torch.no_grad()
    def segment(images):
        x = normalise(F.interpolate(images.float(), size=size, mode="bilinear", antialias=True))
        logits = F.interpolate(net(x.to(device))["out"][:, chosen], size=images.shape[-2:], mode="bilinear")
        return classes[logits.argmax(1)].byte().cpu()

    return segment, found


def load_mask2former(name, colorbook, device):
    """load_segmenter() for a Mask2Former, with the preprocessing that comes with it."""
    try:
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation
    except ImportError as error:
        raise ValueError(f"{name}: no such file. If it is a Mask2Former, the transformers package is needed "
                         f"(pip install transformers): {error}. Else give a checkpoint of experiments/segmenter.py") from error
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        net = Mask2FormerForUniversalSegmentation.from_pretrained(name).to(device).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: neither a checkpoint file nor a Mask2Former that transformers finds: {error}") from error
    found = match_classes([net.config.id2label[i] for i in range(len(net.config.id2label))], colorbook, name)
    classes = torch.tensor(list(found), device=device)

    @torch.no_grad()
    def segment(images):
        made = net(**processor(images=list(images), return_tensors="pt").to(device))
        made.class_queries_logits = made.class_queries_logits[..., [*found.values(), -1]]  # the last is "nothing"
        maps = processor.post_process_semantic_segmentation(made, target_sizes=[images.shape[-2:]] * len(images))
        return classes[torch.stack(maps)].byte().cpu()

    return segment, found


# -------------------------------------------------------------------------------------------------- numbers


def confusion_matrix(true_ids, predicted_ids, num_classes):
    """Pixels (K, K) int64: the row is the true class, the column the predicted one; 255 in either is left out."""
    seen = (true_ids != UNLABELLED) & (predicted_ids != UNLABELLED)
    pairs = true_ids[seen].long() * num_classes + predicted_ids[seen].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).cpu()


def scores(confusion):
    """Pixel accuracy, mean IoU, and IoU (K,) float64 per class: intersection over union of truth and prediction.

    A class that does not occur in the truth has IoU NaN and is left out of the mean: whatever was predicted as such
    already counts against the class that is really there.
    """
    hit, true = confusion.diag().double(), confusion.sum(1).double()
    iou = torch.where(true > 0, hit / (true + confusion.sum(0) - hit), torch.nan)
    return (hit.sum() / true.sum()).item(), iou.nanmean().item(), iou


def fid_and_kid(real, fake):
    """FID of two sets of features (N, D), and KID with its standard deviation over 100 subsets, by torch-fidelity.

    The subsets have 100 pictures, or as many as the smaller set; the kernel is the polynomial of degree 3.
    """
    fid = fid_statistics_to_metric(*(fid_features_to_statistics(x.double()) for x in (real, fake)), verbose=False)
    kid = kid_features_to_metric(real, fake, kid_subset_size=min(100, len(real), len(fake)), verbose=False)
    return fid[KEY_METRIC_FID], kid[KEY_METRIC_KID_MEAN], kid[KEY_METRIC_KID_STD]


def load_inception(weights, device):
    """torch-fidelity's Inception with the layers of 64 and 2048 features; None, and said why, where it cannot be had.

    weights is its file, or None for the one that torch has stored or can download. ValueError where it is another file.
    """
    try:
        if weights:  # torch-fidelity would run whatever is pickled in it; this refuses anything but tensors
            torch.load(weights, map_location="cpu", weights_only=True)
        net = create_feature_extractor("inception-v3-compat", ["64", "2048"], cuda=False,
                                       feature_extractor_weights_path=weights)
    except Exception as error:  # torch raises many kinds for a file that holds no weights
        if weights or not isinstance(error, OSError):
            raise ValueError(f"{weights or 'the stored download'}: not the weights of torch-fidelity's Inception: "
                             f"{type(error).__name__}: {str(error).splitlines()[0]}. They are {URL_INCEPTION_V3}") from error
        print(f"FID and KID are left out, for want of Inception's weights ({error}). Where there is a network, download\n"
              f"  {URL_INCEPTION_V3}\nand give the file with --inception-weights FILE")
        return None
    return net.to(device)


def thumbnails(images):
    """Images (B, 3, H, W) uint8 as (B, 3072) float64, so scaled that Euclidean distance is DISTANCE."""
    return F.interpolate(images.float(), size=(32, 32), mode="area").flatten(1).double() / 3072**0.5


def mean_distance(x):
    """Mean Euclidean distance of two different rows of x (N, D)."""
    return (torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))).item()


# ------------------------------------------------------------------------------------------------- pictures


def find_pictures(folder):
    """{stem: path} of the pictures in a folder or in its images/, without the sheet.png of sample.py."""
    folder = Path(folder) / "images" if (Path(folder) / "images").is_dir() else Path(folder)
    files = list_files(folder)
    if files.pop("sheet", None):
        print(f"{folder}: sheet.png left out")
    if not files:
        splits = ", ".join(str(path.parent) for path in sorted(folder.glob("*/images")))
        raise ValueError(f"{folder}: no pictures in this folder" + (f"; give one of its splits: {splits}" if splits else ""))
    return files


def mask_of(stem, settings, stems):
    """The one of `stems` that a generated picture was made from, or None, and its guidance, or None.

    From the settings that sample.py stores in the file, else from its name: <stem>, <stem>_w<guidance>_seed<seed>, <stem>_<k>.
    """
    named = re.fullmatch(r"(.+)_w(\d+(?:\.\d+)?(?:e[+-]?\d+)?)_seed\d+", stem)
    counted = re.fullmatch(r"(.+)_\d+", stem)
    names = (settings.get("mask"), stem, named and named[1], counted and counted[1])
    return next((name for name in names if name in stems), None), settings.get("guidance", float(named[2]) if named else None)


def pair_up(real, fake, real_files, guidance, unpaired):
    """What to compare: [(mask's stem or None, path, settings)] of the generated pictures, and the orphans of both sides.

    real, fake are the folders and real_files {stem: path}; guidance, where given, chooses. Without pairs (all pictures
    made without a mask, or `unpaired`) every stem is None. ValueError where pairs were to be expected.
    """
    made = []
    for name, path in tqdm(find_pictures(fake).items(), desc="pairing", unit="picture", leave=False):
        try:
            settings = dict(json.loads(open_image(path).info.get("settings", "{}")))
        except (json.JSONDecodeError, TypeError):
            settings = {}  # the text of another program
        stem, w = mask_of(name, settings, real_files)
        made.append((stem, path, settings | {"guidance": w}))
    if unpaired or all(settings.get("mask", "") is None for *_, settings in made):
        print("no pairs: all pictures of both folders are taken, and only FID and KID can compare them")
        return [(None, path, settings) for _, path, settings in made], [], []
    orphans = [path.stem for stem, path, _ in made if stem is None]
    if len(orphans) == len(made):
        raise ValueError(f"{fake}: no picture has the name of one in {real}. Found {orphans[0]!r} and the like; expected "
                         f"<stem>, <stem>_<k> or <stem>_w<guidance>_seed<seed> with a stem such as {next(iter(real_files))!r}. "
                         "Sets without pairs can be compared by FID and KID: say --unpaired")
    made = [m for m in made if m[0] is not None]
    found = {settings["guidance"] for *_, settings in made}
    made = sorted((m for m in made if guidance in (None, m[2]["guidance"])), key=lambda m: m[:2])
    if not made or guidance is None and len(found) > 1:
        raise ValueError(f"{fake} has pictures of guidance {', '.join(sorted(map(str, found)))}: choose with --guidance W")
    unused = sorted(real_files.keys() - {m[0] for m in made})
    for where, what, names in ((fake, "generated, but no real one of that name", orphans),
                               (real, "real, but none generated from it", unused)):
        if names:
            print(f"{where}: {len(names)} picture(s) left out ({what}): {', '.join(names[:10])}" + " ..." * (len(names) > 10))
    return made, orphans, unused


def read_all(files, masks, size, colorbook, where):
    """Pictures (H, W, 3) of [(stem, path)] and, where there are {stem: path} of masks, ids (H, W), fitted to size; says how."""
    pictures, truth, said = [], [], Counter()
    for stem, path in tqdm(files, desc=f"reading {where}", unit="picture", leave=False):
        image = open_image(path)
        rgb = np.array(image.convert("RGB"))
        codes, colors = (x.astype(np.int64) @ [65536, 256, 1] for x in (rgb, colorbook.colors))
        drawn = np.isin(codes, [0, *colors]).all() and codes.any()
        if image.mode == "P" or drawn or image.mode == "L" and np.isin(rgb, [*range(len(colorbook)), UNLABELLED]).all():
            raise ValueError(f"{path}: a mask (it has a palette, or nothing but classes); expected a picture. Masks belong in "
                             "masks/ beside images/; a photo that was stored with a palette has to be saved as RGB")
        if masks:
            ids, kind, snapped = read_mask(masks[stem], colorbook)
            said[f"masks are {kind}" + (" with soft edges" if snapped else "")] += 1
            truth.append(fit_pair(rgb, ids, size, None, f"{path} and {masks[stem]}")[1])
        H, W = rgb.shape[:2]
        if (H, W) != size:
            said[f"{H}x{W} brought to {size[0]}x{size[1]}, the size of the generated pictures"
                 + (", after cropping the centre to that ratio" if H * size[1] != W * size[0] else "")
                 + (", ENLARGED: the blur counts in every number" if H < size[0] or W < size[1] else "")] += 1
        pictures.append(fit(rgb, size))
    for what, n in said.items():
        print(f"{where}: {what} ({n} such)")
    return pictures, truth


# ------------------------------------------------------------------------------------------------- evaluate


def finite(x):
    """A number as JSON can hold it: NaN, which is nothing to measure, becomes None."""
    return None if x is None or math.isnan(x) else float(x)


def shown(x):
    return "-" if x is None else f"{x:.4f}"


def evaluate(args):
    """One evaluation, from folders to report.json. Raises ValueError or OSError for what the user can mend."""
    out, device = Path(args.out), pick_device(args.device)
    if out.resolve() in (Path(args.real).resolve(), Path(args.fake).resolve()):
        raise ValueError(f"--out {out} is a folder of pictures to compare: choose another")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: expected 1 or more")
    real_files, mask_files, train_files = find_pictures(args.real), {}, find_pictures(args.train) if args.train else {}
    own = Path(args.real).resolve().parent / "colorbook.json"
    colorbook = Colorbook.load(args.colorbook or (own if own.is_file() else Path(__file__).with_name("colorbook.json")))
    if (Path(args.real) / "masks").is_dir():
        mask_files = list_files(Path(args.real) / "masks")
        real_files = {stem: path for stem, path, _ in match_pairs(real_files, mask_files, args.real)}
    made, orphans, unused = pair_up(args.real, args.fake, real_files, args.guidance, args.unpaired)
    paired = made[0][0] is not None
    stems = sorted({stem for stem, *_ in made}) if paired else list(real_files)
    made_with = {key: sorted({s[key] for *_, s in made if s.get(key) is not None}, key=str) for key in
                 ("checkpoint", "trained_steps", "weights", "sampler", "steps", "eta", "guidance")}
    warnings = [f"{args.fake} mixes pictures of different {key}: {', '.join(map(str, values))}"
                for key, values in made_with.items() if len(values) > 1]

    # what may be missing is found missing now, not after an hour
    segment, known = load_segmenter(args.segmenter, colorbook, device) if paired and args.segmenter else (None, ())
    inception = load_inception(args.inception_weights, device)
    if not (paired or inception or train_files):
        raise ValueError("without pairs and without Inception's weights nothing can be measured")

    # everything at the size of the generated pictures
    size = Counter(open_image(path).size[::-1] for _, path, _ in made).most_common(1)[0][0]
    if paired and min(size) < 11:
        raise ValueError(f"{args.fake}: pictures of {size[0]}x{size[1]}; SSIM needs 11x11, the size of its window, or more")
    fake, _ = read_all([(None, path) for _, path, _ in made], {}, size, colorbook, args.fake)
    real, truth = read_all([(s, real_files[s]) for s in stems], mask_files if paired else {}, size, colorbook, args.real)
    index = {stem: i for i, stem in enumerate(stems)}
    of = torch.tensor([index[stem] for stem, *_ in made if paired], dtype=torch.long)  # of each generated picture, its real one
    for old in (*out.glob("ssim_*est/*.png"), out / "report.json", out / "nearest_training.png"):
        old.unlink(missing_ok=True)  # of another evaluation
    out.mkdir(parents=True, exist_ok=True)
    numbers, table, N = {}, {}, f"{len(real)} real, {len(fake)} generated"

    def number(name, value, how, std=None, n=N):
        numbers[name] = {"value": finite(value), "std": finite(std), "n": n, "how": how, "meaning": MEANING[name]}

    def batched(function, pictures, what):
        """What a function of images (B, 3, H, W) uint8 makes of pictures, a list of (H, W, 3) uint8, joined."""
        parts = tqdm(torch.arange(len(pictures)).split(args.batch_size), desc=what, unit="batch", leave=False)
        stacked = (torch.from_numpy(np.stack([pictures[i] for i in part])) for part in parts)
        return torch.cat([function(images.permute(0, 3, 1, 2)) for images in stacked])

    # does the segmenter see in the pictures what the mask asked for
    truth = torch.from_numpy(np.stack(truth)) if truth else None
    if segment:
        seen_real, seen_fake = batched(segment, real, "segmenter, real"), batched(segment, fake, "segmenter, generated")
        columns = {"generated / real": (seen_real[of], seen_fake)}
        if truth is not None:
            truth[~torch.isin(truth, torch.tensor(list(known)))] = UNLABELLED
            columns = {"generated / mask": (truth[of], seen_fake), "real / mask": (truth[of], seen_real[of])} | columns
        for column, sides in columns.items():
            confusion = sum(confusion_matrix(true, seen, len(colorbook)) for true, seen in zip(*(ids.split(64) for ids in sides)))
            accuracy, mean_iou, iou = scores(confusion)
            for name, value in zip(("pixel accuracy", "mean IoU", *colorbook.names), (accuracy, mean_iou, *iou.tolist())):
                table.setdefault(name, {})[column] = finite(value)
        for name in ("mean IoU", "pixel accuracy") if truth is not None else ():
            share, ceiling = table[name]["generated / mask"], table[name]["real / mask"]
            number(f"share of the ceiling, {name}", share / ceiling if ceiling else None, "generated / mask over real / mask")
    elif paired:
        print("no --segmenter: whether the masks were obeyed is not measured (python -m experiments.segmenter trains one)")

    # SSIM, and the pairs at its ends as pictures
    if paired:
        ssim = np.array([structural_similarity(real[i], picture, channel_axis=-1, **SSIM)
                         for picture, i in zip(tqdm(fake, desc="SSIM", unit="pair", leave=False), of)])
        number("SSIM", ssim.mean(), f"scikit-image {version('scikit-image')}: RGB {size[0]}x{size[1]}, Gaussian window 11x11 of "
               "sigma 1.5, population covariance, data range 255", ssim.std())
        order = ssim.argsort(kind="stable")
        for folder, ends in (("ssim_lowest", order[:10]), ("ssim_highest", order[::-1][:10])):
            (out / folder).mkdir(exist_ok=True)
            for j in ends:
                sheet = contact_sheet([[real[of[j]], fake[j]]], ["real", f"SSIM {ssim[j]:.4f}"])
                sheet.save(out / folder / f"{ssim[j]:.4f}_{made[j][1].stem}.png")

    # FID at two layers, and KID
    least = min(len(real), len(fake))
    if inception and least < 2:
        print("FID and KID are left out: they need two pictures on each side")
    elif inception:
        @torch.no_grad()
        def features(images):
            return torch.cat(inception(images.to(device)), dim=1).cpu()

        how = (f"torch-fidelity {version('torch-fidelity')}: {size[0]}x{size[1]} resized to 299x299, bilinear as in TensorFlow; "
               f"weights {args.inception_weights or Path(URL_INCEPTION_V3).name}")
        layers = [batched(features, pictures, "Inception").split([64, 2048], dim=1) for pictures in (real, fake)]
        for layer, *both in zip((64, 2048), *layers):
            fid, kid, std = fid_and_kid(*both)
            number(f"FID, layer {layer}", fid, how)
        number("KID", kid, f"layer 2048, 100 subsets of {min(100, least)}, polynomial kernel of degree 3; {how}", std)
        if least < 2048:
            warnings.append(f"FID from {least} pictures: below 2048 it is too high by an amount that depends on N, and at layer "
                            "2048 the covariance has not full rank. Compare it only at the same N; KID has no such bias")

    # diversity, and copies
    thumbs_fake, thumbs_real = (batched(thumbnails, pictures, "thumbnails") for pictures in (fake, real))
    groups = [thumbs_fake[of == i] for i in of.unique() if (of == i).sum() > 1]
    if groups:
        number("distance within a mask", np.mean([mean_distance(x) for x in groups]), DISTANCE,
               n=f"{sum(map(len, groups))} generated from {len(groups)} masks")
        scale = mean_distance(thumbs_real) if len(real) > 1 else None
        number("distance between real pictures", scale, DISTANCE, n=f"{len(real)} real")
    elif paired:
        print("one picture per mask: how different they can be is not measured (sample.py --n 4 makes four)")
    if train_files:
        train, _ = read_all(list(train_files.items()), {}, size, colorbook, args.train)
        thumbs = batched(thumbnails, train, "thumbnails")
        thumbs = torch.cat([thumbs, thumbs.unflatten(1, (3, 32, 32)).flip(-1).flatten(1)])  # training mirrors pictures
        (distance, nearest), (distance_real, _) = (torch.cdist(x, thumbs).min(dim=1) for x in (thumbs_fake, thumbs_real))
        for side, x in (("generated", distance), ("real", distance_real)):
            number(f"nearest training picture, {side}", x.mean(), DISTANCE, x.std(correction=0),
                   f"{len(x)} {side}, {len(train)} training")
        train += [picture[:, ::-1] for picture in train]
        rows = [[fake[j], train[nearest[j]]] + [real[i] for i in of[j : j + 1]] for j in distance.argsort()[:8].tolist()]
        contact_sheet(rows, ["generated", "nearest in training", "real"][: len(rows[0])]).save(out / "nearest_training.png")

    # the set at a glance
    rows, titles = [real[:8], fake[:8]], ()
    if paired:
        chosen = [(of[j], j) for j in np.unique(np.linspace(0, len(fake) - 1, 8).round().astype(int))]
        columns = {"real": [real[i] for i, _ in chosen], "generated": [fake[j] for _, j in chosen]}
        if truth is not None:
            columns = {"mask": [colorbook.paint(truth[i].numpy()) for i, _ in chosen]} | columns
        if segment:
            columns["seen in real"] = [colorbook.paint(seen_real[i].numpy()) for i, _ in chosen]
            columns["seen in generated"] = [colorbook.paint(seen_fake[j].numpy()) for _, j in chosen]
        rows, titles = list(zip(*columns.values())), list(columns)
    contact_sheet(rows, titles).save(out / "at_a_glance.png")

    legend = {name: MEANING[name] for name in (*next(iter(table.values())), "pixel accuracy", "mean IoU")} if table else {}
    packages = ("torch", "torchvision", "torch-fidelity", "scikit-image", "numpy", "pillow")
    report = {"numbers": numbers, "segmentation": {"by": args.segmenter, "n": N, "values": table, "meaning": legend},
              "warnings": warnings, "generated with": made_with, "size": size, "left out": {"generated": orphans, "real": unused},
              "settings": vars(args), "device": str(device), "versions": {name: version(name) for name in packages}}
    (out / "report.json").write_text(json.dumps(report, indent=1, default=str), encoding="utf-8")

    # the same on the screen
    for name, x in numbers.items():
        print(f"\n{name:38} {shown(x['value'])}" + (f" +- {shown(x['std'])}" if x["std"] is not None else "")
              + f"   N: {x['n']}\n    {x['meaning']}\n    [{x['how']}]")
    if table:
        print(f"\nsegmenter {args.segmenter}   N: {N}\n{'':18}" + "".join(f"{column:>20}" for column in legend if "/" in column))
        for name, row in table.items():
            print(f"{name:18}" + "".join(f"{shown(x):>20}" for x in row.values()))
        print("\n".join(f"{name:18}{meaning}" for name, meaning in legend.items()))
    for warning in warnings:
        print(f"\nWARNING: {warning}")
    print(f"\n{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", required=True, help="a split of a prepared data set, or a folder of images")
    parser.add_argument("--fake", required=True, help="the folder of the generated pictures")
    parser.add_argument("--segmenter", help="a checkpoint of experiments/segmenter.py, or a Mask2Former (needs transformers)")
    parser.add_argument("--train", help="the split that the model was trained on: looks for copies of its pictures")
    parser.add_argument("--guidance", type=float, metavar="W", help="only generated pictures of this guidance")
    parser.add_argument("--unpaired", action="store_true", help="do not look for pairs; FID and KID only")
    parser.add_argument("--inception-weights", metavar="FILE", help="of torch-fidelity's Inception, where there is no network")
    parser.add_argument("--colorbook", help="default: the one beside the split, else the project's")
    parser.add_argument("--out", default="runs/evaluation", help="folder for report and pictures; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at a time; default: %(default)s")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    args = parser.parse_args()
    try:
        evaluate(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


if __name__ == "__main__":
    main()
