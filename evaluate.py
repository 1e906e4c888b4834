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
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from skimage.metrics import structural_similarity
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor
from torchvision.models import get_model
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
    "pixel accuracy": "share of pixels in the right class, of all images together; large classes hide small ones",
    "IoU": "pixels of a class in both over those in either; 0 = no pixel in common",
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
HOW = ("IoU: of the pixels of all images together. SSIM: scikit-image, RGB, 11x11 Gaussian window. FID, KID: Inception "
       "of torch-fidelity; KID: cubic kernel, all pairs of images. Distances: root mean square of 32x32 thumbnails")
INTERVAL = ("95 % of the values when masks are drawn anew with all their images: how much the choice of them matters, "
            "not the training, its seed or the segmenter. Copies in a draw raise FID: see how wide it is, not where")
SSIM = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}  # window: 11x11
SHEETS = {"at_a_glance.png", "nearest_training.png"}

# ------------------------------------------------------------------------------------------- from folders to images


def find_images(folder):
    """{stem: path} of the images in a folder or in its images/, without sample.py's sheet.png. ValueError for none."""
    folder = Path(folder).absolute()  # whoever runs this from elsewhere sees where it looks
    files = list_files(folder / "images" if (folder / "images").is_dir() else folder)
    files.pop("sheet", None)
    if not files:
        raise ValueError(f"{folder}: no images in this folder; expected some, or images/ in it, as in <data set>/test")
    return files


def mask_of(stem, settings, stems):
    """The one of `stems` that a generated image was made from, by its settings or else its own stem, or None."""
    names = settings.get("mask"), stem, re.sub(r"_w[\d.e+-]+_seed\d+$", "", stem), re.sub(r"_\d+$", "", stem)
    return next((name for name in names if name in stems), None)


def pair_up(real_files, args):
    """The generated images to compare, [(stem of its mask, path, settings)]; without pairs, every stem is None."""
    generated = []
    for name, path in find_images(args.fake).items():
        text = open_image(path).info.get("settings", "")
        settings = json.loads(text) if text.startswith('{"mask": ') else {}  # sample.py's begin with it
        if args.guidance in (None, settings.get("guidance")):
            generated.append((mask_of(name, settings, real_files), path, settings))
    if not generated:
        raise ValueError(f"{args.fake}: no image of guidance {args.guidance:g}")
    if args.unpaired or all(settings.get("mask", "") is None for *_, settings in generated):
        print("no pairs: all images of both folders are taken, and only FID and KID can compare them")
        return [(None, path, settings) for _, path, settings in generated]
    orphans = [path.stem for stem, path, _ in generated if stem is None]
    paired = sorted(entry for entry in generated if entry[0] is not None)
    if not paired:
        raise ValueError(f"{args.fake}: no image has the name of one in {args.real}: {orphans[0]!r}; expected "
                         f"{next(iter(real_files), '<stem>')!r}, <stem>_<k> or <stem>_w<guidance>_seed<seed>. FID and "
                         "KID need no pairs: say --unpaired")
    guidances = {settings.get("guidance") for *_, settings in paired}
    if len(guidances) > 1:
        raise ValueError(f"{args.fake}: guidance {', '.join(map(str, guidances))} are mixed: choose with --guidance W")
    for kind, names in (("generated", orphans), ("real", sorted(real_files.keys() - {stem for stem, *_ in paired}))):
        if names:
            print(f"{len(names)} {kind} image(s) without a partner left out: {', '.join(names[:10])}")
    return paired


def read_images(paths, size=None, masks=(), colorbook=None):
    """Image files as (N, H, W, 3) uint8, fitted to size, or that of the first; of their mask files ids (N, H, W)."""
    images, truth, resized, kinds = [], [], 0, set()
    for i, path in enumerate(tqdm(paths, desc="reading", unit="image", leave=False)):
        image = read_image(path)
        size = size or image.shape[:2]
        if masks:
            ids, _, _ = read_mask(masks[i], colorbook)
            truth.append(fit_pair(image, ids, size, None, f"{path} and {masks[i]}")[1])
        images.append(fit(image, size))
        resized += image.shape[:2] != size
        codes = image.astype(int) @ [65536, 256, 1]  # one number per colour: a mask has few, and even areas
        even = (codes[:, 1:] == codes[:, :-1]).mean()
        mask = open_image(path).mode == "P" or even > 0.75 and len(np.unique(codes)) <= 32
        kinds.add("plain" if even == 1 else "mask" if mask else "image")
    if kinds in ({"mask"}, {"mask", "plain"}):
        raise ValueError(f"{paths[0]}: a mask, as all in its folder (palettes, or few colours in even areas); expected "
                         "images. Masks go into masks/ beside images/; photos with a palette have to be saved as RGB")
    if resized:
        print(f"{paths[0].parent}: {resized} of {len(paths)} images cropped and resized to {size[0]}x{size[1]}")
    return np.stack(images), np.stack(truth) if masks else None


def build_segmenter(arch, num_classes):
    """A torchvision net without weights: normalised images (B, 3, H, W) to {"out": logits (B, num_classes, H, W)}."""
    if arch not in ("deeplabv3_resnet50", "lraspp_mobilenet_v3_large"):
        raise ValueError(f"no segmenter is called {arch!r}; there are deeplabv3_resnet50, lraspp_mobilenet_v3_large")
    return get_model(arch, weights=None, weights_backbone=None, num_classes=num_classes)


def normalise(images):
    """Images (B, 3, H, W), 0..255, as the segmenter sees them: by ImageNet's mean and deviation."""
    return TF.normalize(images.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def load_segmenter(name, colorbook, device):
    """The judge: a function from images (B, 3, H, W) uint8 to ids (B, H, W) uint8, and {class id: its label id}.

    name is a checkpoint of experiments/segmenter.py, or a Mask2Former of transformers. The function's image_size is
    the [H, W] of its training images, or None. ValueError where it lacks more than half of the colorbook's classes.
    """
    state, processor = {}, None
    try:
        if Path(name).is_file():
            state = torch.load(name, map_location="cpu", weights_only=True)
            labels = Colorbook(state["colorbook"], name).names
            net = build_segmenter(state["arch"], len(labels))
            net.load_state_dict(state["model"])
        else:
            from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation
            processor = AutoImageProcessor.from_pretrained(name)
            net = Mask2FormerForUniversalSegmentation.from_pretrained(name)
            labels = [label for _, label in sorted(net.config.id2label.items())]
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        raise ValueError(f"{name}: seen from {Path.cwd()}, not a segmenter's checkpoint (python -m "
                         "experiments.segmenter writes one; train.py's are generators), nor a Mask2Former (pip install "
                         f"transformers): {type(error).__name__}: {error}") from error
    net.to(device).eval()

    label_ids = {label.lower().replace("_", " "): i for i, label in enumerate(labels)}
    wanted = [label_ids.get(label.lower().replace("_", " ")) for label in colorbook.names]
    known = {k: i for k, i in enumerate(wanted) if i is not None}
    missing = ", ".join(label for label, i in zip(colorbook.names, wanted) if i is None)
    if 2 * len(known) < len(colorbook):
        raise ValueError(f"{name}: a segmenter of other classes, {', '.join(labels)}: it lacks {missing} of "
                         f"{colorbook.source}. Train one on these (python -m experiments.segmenter), or name the "
                         "images' own colorbook with --colorbook")
    if missing:
        print(f"{name} has no {missing}: pixels of these classes are left out of the numbers against the mask")
    # of the net's labels only `chosen` compete; the winner's place among them is that of its class id in `classes`
    classes, chosen = torch.tensor(list(known), device=device), list(known.values())

    @torch.no_grad()
    def segment(images):
        size = images.shape[-2:]
        if processor:
            output = net(**processor(images=list(images), return_tensors="pt").to(device))
            output.class_queries_logits = output.class_queries_logits[..., [*chosen, -1]]  # the last is "nothing"
            sizes = [size] * len(images)
            index = torch.stack(processor.post_process_semantic_segmentation(output, target_sizes=sizes))
        else:
            x = normalise(F.interpolate(images.float(), size=state["size"], mode="bilinear", antialias=True))
            index = F.interpolate(net(x.to(device))["out"][:, chosen], size=size, mode="bilinear").argmax(1)
        return classes[index].byte().cpu()

    segment.image_size = state.get("image_size")
    return segment, known


# ----------------------------------------------------------------------------------------------------- numbers
# A draw of the bootstrap is a row of counts: how often each image is taken. Row 0 takes every image once. Each metric
# takes counts (R, n) and returns (R,): its value, and that of each draw.


def resample(n, m, real_index, times=1000):
    """How often each of n real and m generated images counts, (1 + times, n) and (1 + times, m) float64.

    Once in the first row, as bootstrap draws in the others. Real images are drawn, each with all that was generated
    from its mask, those of its number in real_index (m,); without pairs (None), both sets are drawn.
    """
    rng = np.random.default_rng(0)
    real, generated = (np.concatenate([np.ones((1, k)), rng.multinomial(k, [1 / k] * k, times)]) for k in (n, m))
    return torch.from_numpy(real), torch.from_numpy(generated if real_index is None else real[:, real_index])


def interval(values):
    """The 95 % percentile interval [low, high] of numbers (R,), the first of which is that of all images."""
    return torch.nanquantile(values[1:], values.new_tensor([0.025, 0.975])).tolist()


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
        # A has a row per image; its R, with R'R = A'A, serves as well and has at most D rows
        roots.append(torch.linalg.qr((counts / (counts.sum() - 1)).sqrt() * (features - means[-1]), "r").R)
    spread = sum(root.square().sum() for root in roots) - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return (means[0] - means[1]).square().sum() + spread


def kernel_distance(x, y, x_counts, y_counts):
    """KID (Binkowski et al. 2018), unbiased, of features x (n, D) and y (m, D), for counts (R, n) and (R, m): (R,)."""
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    across = (x_counts @ xy * y_counts).sum(1) / (x_counts.sum(1) * y_counts.sum(1))
    return mean_of_pairs(xx, x_counts) + mean_of_pairs(yy, y_counts) - 2 * across


@torch.no_grad()
def in_batches(function, images, title):
    """A function of images (B, 3, H, W) uint8, of all images (N, H, W, 3), 16 at a time."""
    batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(16)
    return torch.cat([function(batch) for batch in tqdm(batches, desc=title, unit="batch", leave=False)])


def measure_masks(columns, counts, known, names):
    """Were the masks obeyed? columns has ids (m, H, W): "mask", "seen in real" and "seen in generated"."""
    numbers = {}
    sides = {"real": columns["seen in real"], "generated": columns["seen in generated"]}
    if "mask" in columns:  # without the classes that the segmenter does not know
        sides["mask"] = np.where(np.isin(columns["mask"], list(known)), columns["mask"], UNLABELLED)
    for column in ("generated / mask", "real / mask", "generated / real"):
        seen, true = column.split(" / ")
        if true in sides:
            pairs = zip(torch.from_numpy(sides[true]), torch.from_numpy(sides[seen]))
            matrices = [confusion_matrix(*pair, len(names)) for pair in pairs]
            scored = scores(torch.tensordot(counts, torch.stack(matrices).double(), 1))
            numbers[f"pixel accuracy: {column}"], numbers[f"mean IoU: {column}"], iou = map(torch.as_tensor, scored)
            numbers |= {f"IoU: {column}: {name}": iou[:, k] for k, name in enumerate(names)}
    for score in ("pixel accuracy", "mean IoU") if "mask" in sides else ():
        ceiling = numbers[f"{score}: real / mask"]
        numbers[f"share of the ceiling: {score}"] = numbers[f"{score}: generated / mask"] / ceiling
    return numbers


def load_inception(weights, device):
    """torch-fidelity's Inception, layers 64 and 2048, from a file or a download; None where there is no network."""
    try:
        if weights:  # torch-fidelity would run whatever is pickled in it; this refuses anything but tensors
            torch.load(weights, map_location="cpu", weights_only=True)
        return create_feature_extractor("inception-v3-compat", ["64", "2048"], cuda=False,
                                        feature_extractor_weights_path=weights).to(device)
    except URLError as error:
        print(f"FID and KID are left out, for want of Inception's weights ({error}). Where there is a network, get "
              f"{URL_INCEPTION_V3} and give the file with --inception-weights FILE")
    except Exception as error:  # torch raises many kinds for a file that holds no weights
        raise ValueError(f"{weights or 'the download'}: not the weights of torch-fidelity's Inception, "
                         f"{URL_INCEPTION_V3}: {type(error).__name__}") from error


def measure_features(real, generated, counts, inception, device):
    """FID at two of Inception's layers, and KID."""
    def features(images):
        return torch.cat(inception(images.to(device)), dim=1).cpu()

    x, y = (in_batches(features, images, "Inception").double().split([64, 2048], 1) for images in (real, generated))
    draws = list(zip(counts[0][:101], counts[1][:101]))  # more would take too long
    early, late = (torch.stack([frechet_distance(a, b, *draw) for draw in tqdm(draws, desc="FID", leave=False)])
                   for a, b in zip(x, y))
    return {"FID, layer 64": early, "FID, layer 2048": late, "KID": kernel_distance(x[1], y[1], *counts)}


def measure_distances(real, generated, real_index, train, counts):
    """How different are the images of one mask, and were images of train copied? With a sheet of the eight nearest."""
    def thumbnails(images):  # (N, 3072); Euclidean distance is the root mean square difference of 32x32 pixels
        small = in_batches(lambda batch: F.interpolate(batch.float(), size=(32, 32), mode="area"), images, "thumbnails")
        return small.flatten(1).double() / 3072**0.5

    numbers, sheet, x, y = {}, None, thumbnails(real), thumbnails(generated)
    if real_index is not None and len(set(real_index)) < len(real_index):
        several = np.flatnonzero(np.bincount(real_index) > 1)
        of_mask = torch.from_numpy(real_index == several[:, None]).double()  # a row per mask: 1 for its images
        within = mean_of_pairs(torch.cdist(y, y), of_mask)
        numbers["distance within a mask"] = mean_of(within, counts[0][:, several])
        numbers["distance between real images"] = mean_of_pairs(torch.cdist(x, x), counts[0])
    if train is not None:
        train = np.concatenate([train, train[:, :, ::-1]])  # training mirrors images
        learnt = thumbnails(train)
        distance, nearest = torch.cdist(y, learnt).min(1)
        numbers["nearest training image"] = mean_of(distance, counts[1])
        numbers["nearest training image, of real ones"] = mean_of(torch.cdist(x, learnt).amin(1), counts[0])
        rows = [[generated[j], train[nearest[j]]] for j in distance.argsort()[:8]]
        sheet = contact_sheet(rows, ["generated", "nearest in training"])
    return numbers, sheet


def evaluate(args):
    """One evaluation, from two folders to a report. ValueError or OSError for what the user can fix."""
    out, device, split = Path(args.out), pick_device(args.device), Path(args.real)
    others = {path.name for path in out.glob("*") if path.suffix.lower() in SUFFIXES or path.name == "images"} - SHEETS
    if out.is_file() or others:
        raise ValueError(f"--out {out}: a file or a folder of images; expected a folder of its own for the report")

    # what is compared: each generated image with the real one number real_index, or, without pairs, all with all
    real_files, masks = find_images(split), {}
    train_files = list(find_images(args.train).values()) if args.train else []
    beside = split.resolve().with_name("colorbook.json")
    default = beside if beside.is_file() else Path(__file__).with_name("colorbook.json")
    colorbook = Colorbook.load(args.colorbook or default)
    if (split / "masks").is_dir() and not args.unpaired:
        masks = list_files(split / "masks")
        real_files = {stem: path for stem, path, _ in match_pairs(real_files, masks, split)}
    pairs = pair_up(real_files, args)
    stems = sorted({stem for stem, *_ in pairs} - {None})
    real_index = np.searchsorted(stems, [stem for stem, *_ in pairs]) if stems else None

    # what judges them: a missing file fails now, not after an hour
    segment, known = load_segmenter(args.segmenter, colorbook, device) if stems and args.segmenter else (None, {})
    if args.segmenter and not stems:
        print("without pairs there are no masks to obey: --segmenter is not used")
    inception = load_inception(args.inception_weights, device)
    if not (stems or inception or train_files):
        raise ValueError("without pairs, Inception's weights or --train nothing can be measured")

    # everything at the size of the generated images
    generated, _ = read_images([path for _, path, _ in pairs])
    size = generated.shape[1:3]
    if stems and min(size) < 11:
        raise ValueError(f"{args.fake}: images of {size[0]}x{size[1]}; SSIM needs 11x11, its window, or more")
    real_masks = [masks[stem] for stem in stems if masks]
    real, truth = read_images([real_files[stem] for stem in stems or real_files], size, real_masks, colorbook)
    train = read_images(train_files, size)[0] if args.train else None
    out.mkdir(parents=True, exist_ok=True)
    least = min(len(real), len(generated))
    print(f"{len(real)} real, {len(generated)} generated images of {size[0]}x{size[1]}")

    numbers, counts = {}, resample(len(real), len(generated), real_index)
    glance = contact_sheet([real[:8], generated[:8]])
    if stems:
        columns = {"real": real[real_index], "generated": generated}
        if masks:
            columns = {"mask": truth[real_index]} | columns
        if segment:
            columns["seen in real"] = in_batches(segment, real, "segmenter, real").numpy()[real_index]
            columns["seen in generated"] = in_batches(segment, generated, "segmenter, generated").numpy()
            numbers |= measure_masks(columns, counts[1], known, colorbook.names)
        both = zip(columns["real"], tqdm(generated, desc="SSIM", unit="pair", leave=False))
        ssim = torch.tensor([structural_similarity(*pair, channel_axis=-1, **SSIM) for pair in both])
        numbers["SSIM"] = mean_of(ssim, counts[1])
        eight = ssim.argsort()[torch.linspace(0, len(ssim) - 1, min(8, len(ssim))).round().long()]
        shown = [[colorbook.paint(x) if x.ndim == 2 else x for x in column[eight]] for column in columns.values()]
        glance = contact_sheet(list(zip(*shown)), list(columns))
    if inception and least > 1:
        numbers |= measure_features(real, generated, counts, inception, device)
    distances, copies = measure_distances(real, generated, real_index, train, counts)

    keys = ("checkpoint", "trained_steps", "weights", "sampler", "steps", "eta", "guidance")
    made_with = {key: sorted({s[key] for *_, s in pairs if s.get(key) is not None}, key=str) for key in keys}
    warnings = [f"{args.fake} mixes images of different {key}: {', '.join(map(str, values))}"
                for key, values in made_with.items() if len(values) > 1]
    if segment and segment.image_size not in (None, list(size)):
        warnings.append("{} was trained on images of {}x{}; in these, of {}x{}, it sees less: compare scores at "
                        "equal sizes only".format(args.segmenter, *segment.image_size, *size))
    if segment and masks and numbers["mean IoU: real / mask"][0] < 0.2:
        warnings.append(f"{args.segmenter} recognises little in real images (mean IoU "
                        f"{numbers['mean IoU: real / mask'][0]:.2f}): what it says of generated ones means nothing")
    if inception and least < 2048:
        warnings.append("FID of fewer than 2048 images is too high by an amount that depends on N: compare at equal N"
                        + "; of one image there is none" * (least == 1))
    write(out, numbers | distances, {"at_a_glance.png": glance, "nearest_training.png": copies}, {
        "n": f"{len(real)} real, {len(generated)} generated", "how": HOW, "interval": INTERVAL, "warnings": warnings,
        "size": size, "generated with": made_with, "settings": vars(args), "device": str(device)})


def write(out, numbers, sheets, about):
    """The report on the screen and as a file; the old one and its sheets last until the new ones are complete."""
    report, meanings = {}, {}
    for name, values in numbers.items():
        value, (low, high) = values[0].item(), interval(values)
        meaning = {part: MEANING[part] for part in name.split(": ") if part in MEANING}
        meanings |= meaning
        report[name] = {"value": value if math.isfinite(value) else None,
                        "interval": [low, high] if low < high < math.inf else None,
                        "meaning": "; ".join(meaning.values())}
        print(f"{name:44} {value:9.4f}" + f"  [{low:.4f}, {high:.4f}]" * (low < high))
    print(f"\n[low, high]: {INTERVAL}\n")
    print("\n".join(f"{part}: {meaning}" for part, meaning in meanings.items()))
    print("".join(f"\nWARNING: {warning}" for warning in about["warnings"]))
    text = json.dumps({"numbers": report} | about, indent=1, default=str)
    for name, sheet in sheets.items():
        if sheet:
            with replacing(out / name) as file:
                sheet.save(file, "PNG")
        else:
            (out / name).unlink(missing_ok=True)
    with replacing(out / "report.json") as file:
        file.write(text.encode())
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
