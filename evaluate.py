"""How good are the generated images: do they obey the mask, and do they look real?

    python evaluate.py --real data/idd_lite/prepared/test --fake out               what needs no segmenter
    python evaluate.py --real test --fake out --segmenter runs/judge/checkpoint.pt and whether the masks were obeyed
    python evaluate.py --real test --fake out --segmenter facebook/mask2former-swin-large-cityscapes-semantic
    python evaluate.py --real test --fake out --train train                        and whether images were copied

--real is a split of a prepared data set or a folder of images; --fake is what sample.py wrote, or any folder of
<stem>.png or <stem>_<k>.png. Every number goes to the screen and to report.json, with its interval, what it means and
what it cannot tell. at_a_glance.png has pairs from the lowest SSIM to the highest, nearest_training.png likely copies.
"""

import argparse
import json
import math
import re
from collections import Counter, namedtuple
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from skimage.metrics import structural_similarity
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor
from torchvision.models import segmentation
from tqdm import tqdm

from checkpoint import pick_device, replacing
from config import command
from dataset import contact_sheet, fit, fit_pair, list_files, match_pairs, read_image
from masks import SUFFIXES, UNLABELLED, Colorbook, open_image, read_mask

MEANING = {  # of a number, or of a part of its name: what it says; what it cannot tell
    "generated / mask": "does the image show what its mask asked for? The segmenter's own mistakes count too",
    "real / mask": "the ceiling, what this segmenter reaches on real images; another one has another",
    "generated / real": "what it sees in both, as in the thesis and the paper; a mistake in both counts as agreement",
    "share of the ceiling": "generated / mask over real / mask; cannot tell whether the images look real",
    "pixel accuracy": "share of pixels in the right class; large classes hide small ones",
    "IoU": "pixels of a class in both over those in either; 0 = predicted and never there",
    "mean IoU": "mean of that over the classes that occur in either; a rare class weighs as much as road",
    "SSIM": "likeness to the real image of the mask, 1 = equal; other light or colours lower it: no test of the mask",
    "FID, layer 64": "distance of early features, textures and colours (the thesis's scale); blind to what is shown",
    "FID, layer 2048": "distance of Inception's last features, 0 = same mean and covariance; nothing about one image",
    "KID": "like FID without its bias from N, around 0 = same distribution, may be negative; nothing about one image",
    "distance within a mask": "how different its images are, in grey levels, 0 = all the same; noise is difference too",
    "distance between real images": "the scale for the line above; their masks differ too",
    "nearest training image": "in grey levels; far below the next line = copied; copied details do not show",
    "nearest training image, of real ones": "the scale for the line above: images that nobody copied",
}
INTERVAL = ("95 % of the values when masks are drawn anew with all their images: how much the choice of them matters, "
            "not the training, its seed or the segmenter. Copies in a draw raise FID: see how wide it is, not where")
DISTANCE = "root mean square difference of 32x32 thumbnails, in grey levels 0..255; training images mirrored or not"
SSIM = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}  # window: 11x11
SHEETS = {"at_a_glance.png", "nearest_training.png"}

# real (n, H, W, 3) and generated (m, H, W, 3) uint8; real_index (m,), the real image of each generated one, or None
# without pairs; truth (n, H, W) uint8, the masks of the real images, or None
Sets = namedtuple("Sets", "real generated real_index truth")

# ------------------------------------------------------------------------------------------- from folders to sets


def find_images(folder):
    """{stem: path} of the images in a folder or in its images/, without sample.py's sheet.png. ValueError for none."""
    folder = Path(folder) / "images" if (Path(folder) / "images").is_dir() else Path(folder)
    if not folder.is_dir():
        found = "is a file" if folder.is_file() else f"no such folder, seen from {Path.cwd()}"
        raise ValueError(f"{folder}: {found}; expected a folder of images")
    files = list_files(folder)
    files.pop("sheet", None)
    if not files:
        splits = ", ".join(str(path.parent) for path in sorted(folder.glob("*/images")))
        raise ValueError(f"{folder}: no images in this folder" + f"; give one of its splits: {splits}" * bool(splits))
    return files


def mask_of(stem, settings, stems):
    """By a generated image's settings or else its stem: the one of `stems` that it was made from, and its guidance."""
    named = re.fullmatch(r"(.+)_w(\d+(?:\.\d+)?(?:e[+-]?\d+)?)_seed\d+", stem)
    counted = re.fullmatch(r"(.+)_\d+", stem)
    names = (settings.get("mask"), stem, named and named[1], counted and counted[1])
    guidance = settings.get("guidance", float(named[2]) if named else None)
    return next((name for name in names if name in stems), None), guidance  # each may be None


def pair_up(real_files, args):
    """The generated images to compare, [(stem of the mask or None, path, settings)], and the stems left out.

    Every stem is None where all were made without a mask, or with --unpaired. ValueError where pairs were expected.
    """
    generated = []
    for name, path in find_images(args.fake).items():
        image = open_image(path)
        try:
            settings = dict(json.loads(image.info.get("settings", "{}")))
        except (json.JSONDecodeError, TypeError):
            settings = {}  # the text of another program
        stem, guidance = mask_of(name, settings, real_files)
        generated.append((stem, path, settings | {"guidance": guidance, "size": image.size[::-1]}))
    if args.unpaired or all(settings.get("mask", "") is None for *_, settings in generated):
        print("no pairs: all images of both folders are taken, and only FID and KID can compare them")
        return [(None, path, settings) for _, path, settings in generated], {}
    orphans = [path.stem for stem, path, _ in generated if stem is None]
    if len(orphans) == len(generated):
        raise ValueError(f"{args.fake}: no image has the name of one in {args.real}. Found {orphans[0]!r}, ...; "
                         "expected <stem>, <stem>_<k> or <stem>_w<guidance>_seed<seed> with a stem such as "
                         f"{next(iter(real_files), 'none')!r}. FID and KID need no pairs: say --unpaired")
    paired = sorted((entry for entry in generated if entry[0] is not None), key=lambda entry: entry[:2])
    guidances = {settings["guidance"] for *_, settings in paired}
    chosen = [entry for entry in paired if args.guidance in (None, entry[2]["guidance"])]
    if not chosen or args.guidance is None and len(guidances) > 1:
        raise ValueError(f"{args.fake} has images of guidance {', '.join(sorted(map(str, guidances)))}: "
                         "choose with --guidance W")
    left_out = {"generated": orphans, "real": sorted(real_files.keys() - {stem for stem, *_ in chosen})}
    for kind, names in left_out.items():
        if names:
            more = " ..." * (len(names) > 10)
            print(f"{len(names)} {kind} image(s) without a partner left out: {', '.join(names[:10])}{more}")
    return chosen, left_out


def is_mask(image, mode):
    """Whether an image (H, W, 3) of this Pillow mode has a palette, or few colours in even areas with hard edges."""
    step = np.abs(np.diff(image.astype(int), axis=1)).max(axis=2)  # from each pixel to the next
    even = len(np.unique(image.astype(int) @ [65536, 256, 1])) <= 32 and (step == 0).mean() > 0.75 and step.any()
    ids = mode == "L" and ((image < 64) | (image == UNLABELLED)).all()  # a dark photo has soft edges, or a lamp
    return mode == "P" or even and (ids or (step[step > 0] > 16).mean() > 0.9)


def read_images(paths, size, colorbook=None, masks=()):
    """Image files as (N, H, W, 3) uint8 of one size and, where their mask files are given, ids (N, H, W), else None."""
    images, truth, resized = [], [], Counter()
    for i, path in enumerate(tqdm(paths, desc="reading", unit="image", leave=False)):
        image = read_image(path)
        if is_mask(image, open_image(path).mode):
            raise ValueError(f"{path}: a mask (a palette, or few colours in even areas); expected an image. Masks go "
                             "into masks/ beside images/; a photo with a palette has to be saved as RGB")
        if masks:
            ids, _, _ = read_mask(masks[i], colorbook)
            truth.append(fit_pair(image, ids, size, None, f"{path} and {masks[i]}")[1])
        if image.shape[:2] != size:
            resized[image.shape[:2]] += 1
        images.append(fit(image, size))
    for (H, W), n in resized.items():
        note = "; they are enlarged, and their blur counts" if H < size[0] or W < size[1] else ""
        print(f"{paths[0].parent}: {n} of {H}x{W} cropped and resized to {size[0]}x{size[1]}, as generated{note}")
    return np.stack(images), np.stack(truth) if masks else None


# --------------------------------------------------------------------------------------------------- segmenter


def build_segmenter(arch, num_classes):
    """A torchvision net without weights: normalised images (B, 3, H, W) to {"out": logits (B, num_classes, H, W)}."""
    nets = {net.__name__: net for net in (segmentation.deeplabv3_resnet50, segmentation.lraspp_mobilenet_v3_large)}
    if arch not in nets:
        raise ValueError(f"no segmenter is called {arch!r}; there are {', '.join(nets)}")
    return nets[arch](weights=None, weights_backbone=None, num_classes=num_classes)


def normalise(images):
    """Images (B, 3, H, W), 0..255, as the segmenter sees them: by ImageNet's mean and deviation."""
    return TF.normalize(images.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def load_segmenter(name, colorbook, device):
    """The judge: a function from images (B, 3, H, W) uint8 to ids (B, H, W) uint8, and {class id: its label id}.

    name is a checkpoint of experiments/segmenter.py, or a Mask2Former of transformers: its folder or name.
    The function's image_size is the (H, W) of the images that it was trained on, or None where it is not known.
    ValueError where it is neither, or knows less than half of the colorbook's classes.
    """
    labels, image_size, predict = (load_torchvision if Path(name).is_file() else load_mask2former)(name, device)
    label_ids = {label.lower().replace("_", " "): i for i, label in enumerate(labels)}
    wanted = {k: label_ids.get(label.lower().replace("_", " ")) for k, label in enumerate(colorbook.names)}
    known = {k: i for k, i in wanted.items() if i is not None}
    missing = ", ".join(colorbook.names[k] for k in wanted if k not in known)
    if 2 * len(known) < len(colorbook):
        raise ValueError(f"{name}: a segmenter of other classes, {', '.join(labels)}: it lacks {missing}. Train one on "
                         "these (python -m experiments.segmenter), or name the images' own colorbook with --colorbook")
    if missing:
        print(f"{name} has no {missing}: pixels of these classes are left out of every number")
    classes = torch.tensor(list(known), device=device)

    @torch.no_grad()
    def segment(images):
        return classes[predict(images, list(known.values()))].byte().cpu()

    segment.image_size = image_size
    return segment, known


def load_torchvision(path, device):
    """Labels, image size, and predict(images, chosen labels) of a checkpoint of experiments/segmenter.py."""
    state = {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        net = build_segmenter(state["arch"], len(state["colorbook"])).to(device).eval()
        net.load_state_dict(state["model"])
        size, image_size = state["size"], state.get("image_size")
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        reason = "a generator's" if "ema" in state else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{path}: not a segmenter's checkpoint: {reason}; "
                         "`python -m experiments.segmenter` trains one") from error

    def predict(images, chosen):
        x = normalise(F.interpolate(images.float(), size=size, mode="bilinear", antialias=True))
        return F.interpolate(net(x.to(device))["out"][:, chosen], size=images.shape[-2:], mode="bilinear").argmax(1)

    return list(state["colorbook"]), image_size and tuple(image_size), predict


def load_mask2former(name, device):
    """The same of a Mask2Former, with the preprocessing that comes with it."""
    try:
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation
        processor = AutoImageProcessor.from_pretrained(name)
        net = Mask2FormerForUniversalSegmentation.from_pretrained(name).to(device).eval()
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{name}: no file, seen from {Path.cwd()} (`python -m experiments.segmenter` trains one); "
                         f"not loaded as a Mask2Former (pip install transformers): {error}") from error

    def predict(images, chosen):
        output = net(**processor(images=list(images), return_tensors="pt").to(device))
        output.class_queries_logits = output.class_queries_logits[..., [*chosen, -1]]  # the last is "nothing"
        sizes = [images.shape[-2:]] * len(images)
        return torch.stack(processor.post_process_semantic_segmentation(output, target_sizes=sizes))

    return [label for _, label in sorted(net.config.id2label.items())], None, predict


# ----------------------------------------------------------------------------------------------------- numbers


def confusion_matrix(true_ids, predicted_ids, num_classes):
    """Pixels (K, K) int64: the row is the true class, the column the predicted one; 255 in either is left out."""
    seen = (true_ids != UNLABELLED) & (predicted_ids != UNLABELLED)
    pairs = true_ids[seen].long() * num_classes + predicted_ids[seen].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).cpu()


def scores(confusion):
    """Pixel accuracy, mean IoU, and IoU (..., K) float64 per class, of confusion matrices (..., K, K).

    IoU = tp / (tp + fp + fn), as Cityscapes' own script and torchmetrics have it: 0 for a class that is predicted and
    not there, NaN and out of the mean only where neither has it. Pixels unlabelled in the truth count for nothing.
    """
    confusion = confusion.double()
    hit, true, predicted = confusion.diagonal(dim1=-2, dim2=-1), confusion.sum(-1), confusion.sum(-2)
    iou = hit / (true + predicted - hit)
    return (hit.sum(-1) / true.sum(-1)).tolist(), iou.nanmean(-1).tolist(), iou


def mean_of(values, counts):
    """Means (R,) of values (n,), each as often as counts (R, n) say."""
    return counts @ values / counts.sum(1)


def mean_of_pairs(matrix, counts):
    """Means (R,) of matrix (n, n) over pairs of different images; copies of an image make no pair."""
    matrix = matrix - matrix.diag().diag()
    return (counts @ matrix * counts).sum(1) / (counts.sum(1).square() - counts.square().sum(1))


def frechet_distance(x, y, x_counts, y_counts):
    """FID (Heusel et al. 2017) of features x (n, D) and y (m, D) float64, each as often as counts (n,) and (m,) say.

    With covariances A'A and B'B, the trace of (A'A B'B)^1/2 is the sum of the singular values of AB', no larger than
    the number of images.
    """
    means, roots = [], []
    for features, counts in ((x, x_counts), (y, y_counts)):
        features, counts = features[counts > 0], counts[counts > 0, None]
        means.append((counts * features).sum(0) / counts.sum())
        root = (counts / (counts.sum() - 1)).sqrt() * (features - means[-1])
        roots.append(torch.linalg.qr(root, "r").R if len(root) > root.shape[1] else root)
    spread = sum(root.square().sum() for root in roots) - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return (means[0] - means[1]).square().sum() + spread


def kernel_distance(x, y, x_counts, y_counts):
    """KID (Binkowski et al. 2018), unbiased, of features x (n, D) and y (m, D), for counts (R, n) and (R, m): (R,)."""
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    across = (x_counts @ xy * y_counts).sum(1) / (x_counts.sum(1) * y_counts.sum(1))
    return mean_of_pairs(xx, x_counts) + mean_of_pairs(yy, y_counts) - 2 * across


def bootstrap(statistic, sets, times):
    """A statistic of the sets, (S,), and its 95 % percentile interval over images drawn with replacement, (S, 2).

    statistic takes how often each image counts, real (R, n) and generated (R, m) float64, and gives (R,) or (R, S).
    Real images are drawn, each with all that was generated from its mask; without pairs, both sets are drawn.
    """
    rng, counts = np.random.default_rng(0), []
    for n in (len(sets.real), len(sets.generated)):
        counts.append(torch.from_numpy(np.concatenate([np.ones((1, n)), rng.multinomial(n, [1 / n] * n, times)])))
    real, generated = counts
    if sets.real_index is not None:
        generated = real[:, sets.real_index]
    values = torch.as_tensor(statistic(real, generated)).reshape(1 + times, -1)  # the first row: every image once
    return values[0], torch.nanquantile(values[1:], values.new_tensor([0.025, 0.975]), dim=0).T


# --------------------------------------- measurements: [(names, statistic of them for bootstrap(), how they are taken)]


def in_batches(function, images, title):
    """A function of images (B, 3, H, W) uint8, of all images (N, H, W, 3), 16 at a time."""
    batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(16)
    return torch.cat([function(batch) for batch in tqdm(batches, desc=title, unit="batch", leave=False)])


def measure_masks(sets, segment, known, colorbook):
    """Were the masks obeyed? With the ids that were seen in real and in generated images."""
    seen_real = in_batches(segment, sets.real, "segmenter, real")
    seen = in_batches(segment, sets.generated, "segmenter, generated")
    columns = {"generated / real": (seen_real[sets.real_index], seen)}
    if sets.truth is not None:
        truth = torch.from_numpy(sets.truth)[sets.real_index]
        truth = torch.where(torch.isin(truth, torch.tensor(list(known))), truth, UNLABELLED)
        columns = {"generated / mask": (truth, seen), "real / mask": (truth, seen_real[sets.real_index])} | columns

    def table(column):
        """All scores in one row: pixel accuracy, mean IoU, and the IoU of each class."""
        matrices = torch.stack([confusion_matrix(*ids, len(colorbook)) for ids in zip(*columns[column])]).double()
        return lambda _, counts: np.column_stack(scores(torch.einsum("rm,mij->rij", counts, matrices)))

    tables = {column: table(column) for column in columns}
    names = ["pixel accuracy: {}", "mean IoU: {}", *(f"IoU: {{}}: {name}" for name in colorbook.names)]
    measured = [([name.format(column) for name in names], tables[column], "from the pixels of all images together")
                for column in columns]
    if sets.truth is not None:
        def share(*counts):
            return tables["generated / mask"](*counts)[:, :2] / tables["real / mask"](*counts)[:, :2]
        names = ["share of the ceiling: pixel accuracy", "share of the ceiling: mean IoU"]
        measured.append((names, share, "generated / mask over real / mask"))
    return measured, (seen_real, seen)


def measure_ssim(sets):
    """Likeness of every pair; with SSIM (m,)."""
    pairs = zip(sets.real[sets.real_index], tqdm(sets.generated, desc="SSIM", unit="pair", leave=False))
    ssim = torch.tensor([structural_similarity(*pair, channel_axis=-1, **SSIM) for pair in pairs])
    how = f"scikit-image {version('scikit-image')}: RGB, Gaussian window 11x11 of sigma 1.5, population covariance"
    return [(["SSIM"], lambda _, counts: mean_of(ssim, counts), how)], ssim


def load_inception(weights, device):
    """torch-fidelity's Inception, layers 64 and 2048, from a file or a download; None where there is no network."""
    try:
        if weights:  # torch-fidelity would run whatever is pickled in it; this refuses anything but tensors
            torch.load(weights, map_location="cpu", weights_only=True)
        net = create_feature_extractor("inception-v3-compat", ["64", "2048"], cuda=False,
                                       feature_extractor_weights_path=weights)
        return net.to(device)
    except Exception as error:  # torch raises many kinds for a file that holds no weights
        if weights or not isinstance(error, OSError):
            raise ValueError(f"{weights or 'the stored download'}: not the weights of torch-fidelity's Inception, "
                             f"{URL_INCEPTION_V3}: {type(error).__name__}: {error}") from error
        print(f"FID and KID are left out, for want of Inception's weights ({error}). Where there is a network, get "
              f"{URL_INCEPTION_V3} and give the file with --inception-weights FILE")


def measure_features(sets, inception, device, weights):
    """FID at two of Inception's layers, and KID."""
    @torch.no_grad()
    def features(images):
        return torch.cat(inception(images.to(device)), dim=1).cpu()

    real, generated = (in_batches(features, images, "Inception").double() for images in (sets.real, sets.generated))
    early, late = zip(real.split([64, 2048], dim=1), generated.split([64, 2048], dim=1))
    how = (f"Inception of torch-fidelity {version('torch-fidelity')}: resized to 299x299, bilinear as in TensorFlow; "
           f"weights {weights or Path(URL_INCEPTION_V3).name}")

    def fid(layer):
        return lambda *counts: [frechet_distance(*layer, *draw) for draw in zip(*counts)]

    return [(["FID, layer 64"], fid(early), how), (["FID, layer 2048"], fid(late), how),
            (["KID"], lambda *counts: kernel_distance(*late, *counts),
             f"layer 2048, polynomial kernel of degree 3, all pairs of images rather than subsets of 100; {how}")]


def thumbnails(images):
    """Images (N, H, W, 3) as (N, 3072) float64, so scaled that Euclidean distance is DISTANCE."""
    small = in_batches(lambda batch: F.interpolate(batch.float(), size=(32, 32), mode="area"), images, "thumbnails")
    return small.flatten(1).double() / 3072**0.5


def measure_diversity(sets):
    """How different are the images of one mask? The scale is how different real images are."""
    several = np.flatnonzero(np.bincount(sets.real_index) > 1)
    if not len(several):
        print("one image per mask: how different they can be is not measured (sample.py --n 4 makes four)")
        return []
    real, generated = (torch.cdist(x, x) for x in map(thumbnails, (sets.real, sets.generated)))
    of_mask = torch.from_numpy(sets.real_index == several[:, None]).double()
    within = mean_of_pairs(generated, of_mask)
    return [(["distance within a mask"], lambda counts, _: mean_of(within, counts[:, several]), DISTANCE),
            (["distance between real images"], lambda counts, _: mean_of_pairs(real, counts), DISTANCE)]


def measure_copies(sets, train):
    """Were images of train (N, H, W, 3) copied? With a sheet of the eight nearest."""
    train = np.concatenate([train, train[:, :, ::-1]])  # training mirrors images
    known = thumbnails(train)
    generated, nearest = torch.cdist(thumbnails(sets.generated), known).min(1)
    real = torch.cdist(thumbnails(sets.real), known).amin(1)
    rows = [[sets.generated[j], train[nearest[j]]] for j in generated.argsort()[:8]]
    return [(["nearest training image"], lambda _, counts: mean_of(generated, counts), DISTANCE),
            (["nearest training image, of real ones"], lambda counts, _: mean_of(real, counts), DISTANCE),
            ], contact_sheet(rows, ["generated", "nearest in training"])


# ---------------------------------------------------------------------------------------------------- the report


def at_a_glance(sets, colorbook, ssim, seen):
    """Eight pairs from the lowest SSIM (m,) to the highest, and what was seen in them; without pairs, eight of each."""
    if ssim is None:
        return contact_sheet([sets.real[:8], sets.generated[:8]])
    chosen = ssim.numpy().argsort()[np.linspace(0, len(ssim) - 1, min(8, len(ssim))).round().astype(int)]
    index = sets.real_index[chosen]
    columns = {"mask": sets.truth[index]} if sets.truth is not None else {}
    columns |= {"real": sets.real[index], "generated": sets.generated[chosen]}
    if seen:
        columns |= {"seen in real": seen[0][index].numpy(), "seen in generated": seen[1][chosen].numpy()}
    images = [[colorbook.paint(x) if x.ndim == 2 else x for x in column] for column in columns.values()]
    return contact_sheet(list(zip(*images)), list(columns))


def evaluate(args):
    """One evaluation, from two folders to a report. ValueError or OSError for what the user can fix."""
    out, device = Path(args.out), pick_device(args.device)
    images = [path for path in out.glob("*") if path.suffix.lower() in SUFFIXES and path.name not in SHEETS]
    if out.is_file() or images or (out / "images").is_dir():
        found = "a file" if out.is_file() else "a folder of images"
        raise ValueError(f"--out {out}: {found}; expected a folder of its own for the report")

    # what is compared
    real_files, train_files, masks = find_images(args.real), find_images(args.train) if args.train else {}, {}
    beside = Path(args.real).resolve().parent / "colorbook.json"
    default = beside if beside.is_file() else Path(__file__).with_name("colorbook.json")
    colorbook = Colorbook.load(args.colorbook or default)
    if (Path(args.real) / "masks").is_dir():
        masks = list_files(Path(args.real) / "masks")
        real_files = {stem: path for stem, path, _ in match_pairs(real_files, masks, args.real)}
    pairs, left_out = pair_up(real_files, args)
    stems = sorted({stem for stem, *_ in pairs} - {None})

    # by what: whatever is missing is found missing now, not after an hour
    segment, known = load_segmenter(args.segmenter, colorbook, device) if stems and args.segmenter else (None, {})
    inception = load_inception(args.inception_weights, device)
    if not (stems or inception or train_files):
        raise ValueError("without pairs and without Inception's weights nothing can be measured")

    # everything at the size of the generated images
    size = Counter(settings["size"] for *_, settings in pairs).most_common(1)[0][0]
    if stems and min(size) < 11:
        raise ValueError(f"{args.fake}: images of {size[0]}x{size[1]}; SSIM needs 11x11, its window, or more")
    generated, _ = read_images([path for _, path, _ in pairs], size)
    real, truth = read_images([real_files[stem] for stem in stems or real_files], size, colorbook,
                              [masks[stem] for stem in stems if masks])
    train = read_images(list(train_files.values()), size)[0] if train_files else None
    sets = Sets(real, generated, np.searchsorted(stems, [stem for stem, *_ in pairs]) if stems else None, truth)
    print(f"{len(real)} real, {len(generated)} generated images of {size[0]}x{size[1]}")
    out.mkdir(parents=True, exist_ok=True)

    measured, seen, ssim, sheets = [], None, None, {}
    if segment:
        measured, seen = measure_masks(sets, segment, known, colorbook)
    elif stems:
        print("no --segmenter, so whether masks are obeyed is not measured: python -m experiments.segmenter trains one")
    if stems:
        likeness, ssim = measure_ssim(sets)
        measured += likeness + measure_diversity(sets)
    if inception and min(len(real), len(generated)) > 1:
        measured += measure_features(sets, inception, device, args.inception_weights)
    elif inception:
        print("FID and KID are left out: they need two images on each side")
    if train_files:
        copies, sheets["nearest_training.png"] = measure_copies(sets, train)
        measured += copies
    sheets["at_a_glance.png"] = at_a_glance(sets, colorbook, ssim, seen)

    numbers, several = {}, len(real) > 1
    for names, statistic, how in tqdm(measured, desc="intervals", leave=False):
        values, intervals = bootstrap(statistic, sets, 100 if "FID" in names[0] else 1000)
        for name, value, interval in zip(names, values.tolist(), intervals.tolist()):
            numbers[name] = {"value": value if math.isfinite(value) else None,
                             "interval": interval if several and np.isfinite([value, *interval]).all() else None,
                             "n": f"{len(real)} real, {len(generated)} generated", "how": how,
                             "meaning": "; ".join(MEANING[part] for part in name.split(": ") if part in MEANING)}

    keys = ("checkpoint", "trained_steps", "weights", "sampler", "steps", "eta", "guidance")
    made_with = {key: sorted({s[key] for *_, s in pairs if s.get(key) is not None}, key=str) for key in keys}
    cautions = [f"{args.fake} mixes images of different {key}: {', '.join(map(str, values))}"
                for key, values in made_with.items() if len(values) > 1]
    if segment and segment.image_size not in (None, size):
        cautions.append("{} was trained on images of {}x{}; in these, of {}x{}, it sees less: compare scores at "
                        "equal sizes only".format(args.segmenter, *segment.image_size, *size))
    if inception and min(len(real), len(generated)) < 2048:
        cautions.append("FID of fewer than 2048 images is too high by an amount that depends on N: compare at equal N")
    report = {"numbers": numbers, "interval": INTERVAL, "warnings": cautions, "generated with": made_with}
    write(out, report | {"size": size, "left out": left_out, "settings": vars(args), "device": str(device)}, sheets)


def write(out, report, sheets):
    """The report on the screen and as a file; the old one and its sheets last until the new ones are complete."""
    for name, sheet in sheets.items():
        with replacing(out / name) as file:
            sheet.save(file, "PNG")
    with replacing(out / "report.json") as file:
        file.write(json.dumps(report, indent=1, default=str).encode())
    for name in SHEETS - sheets.keys():
        (out / name).unlink(missing_ok=True)
    for name, x in report["numbers"].items():
        value, *interval = ("-" if v is None else f"{v:.4f}" for v in (x["value"], *(x["interval"] or ())))
        print(f"{name:44} {value:>9}" + (f"  [{', '.join(interval)}]" if interval else ""))
    print(f"\n[ ] {INTERVAL}\n")
    for part in dict.fromkeys(part for name in report["numbers"] for part in name.split(": ") if part in MEANING):
        print(f"{part}: {MEANING[part]}")
    for caution in report["warnings"]:
        print(f"\nWARNING: {caution}")
    print(f"\n{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", required=True, help="a split of a prepared data set, or a folder of images")
    parser.add_argument("--fake", required=True, help="the folder of the generated images")
    parser.add_argument("--segmenter", help="a checkpoint of experiments.segmenter, or a Mask2Former of transformers")
    parser.add_argument("--train", help="the split that the model was trained on: looks for copies of its images")
    parser.add_argument("--guidance", type=float, metavar="W", help="only generated images of this guidance")
    parser.add_argument("--unpaired", action="store_true", help="do not look for pairs; FID and KID only")
    parser.add_argument("--inception-weights", metavar="FILE", help="of torch-fidelity's Inception, without a network")
    parser.add_argument("--colorbook", help="default: the one beside the split, else the project's")
    parser.add_argument("--out", default="runs/evaluation", help="folder for report and sheets; default: %(default)s")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    command(evaluate, parser.parse_args())


if __name__ == "__main__":
    main()
