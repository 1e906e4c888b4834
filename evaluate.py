"""How good are the generated images: do they obey the mask, and do they look real?

    python evaluate.py --real data/idd_lite/prepared/test --fake out               what needs no segmenter
    python evaluate.py ... --segmenter runs/judge/checkpoint.pt                    and whether the masks were obeyed
    python evaluate.py ... --segmenter facebook/mask2former-swin-large-cityscapes-semantic
    python evaluate.py ... --train data/idd_lite/prepared/train                    and whether images were copied

--real is a split of a prepared data set; --fake is what sample.py wrote, or any folder of <stem>.png or <stem>_<k>.png.
Every number goes to the screen and to report.json, with its interval, what it means and what it cannot tell.
at_a_glance.png has pairs from the lowest SSIM to the highest, nearest_training.png the likeliest copies.
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

from checkpoint import pick_device
from config import command
from dataset import Pairs, contact_sheet, fit, list_files, read_image
from masks import UNLABELLED, Colorbook, open_image

MEANING = {  # of a number, or of a part of its name: what it says; what it cannot tell
    "generated / mask": "does the image show what its mask asked for? The segmenter's own mistakes count too",
    "real / mask": "the ceiling, what this segmenter reaches on real images; where it is low, no score says much",
    "generated / real": "what it sees in both, as in the thesis (Bozsó 2023); a mistake in both counts as agreement",
    "share of the ceiling": "generated / mask over real / mask; cannot tell whether the images look real",
    "pixel accuracy": "share of pixels in the right class, of all images together; large classes hide small ones",
    "IoU": "pixels of a class in both over those in either, of all images together; 0 = no pixel in common",
    "mean IoU": "mean of that over the classes that occur in either; a rare class weighs as much as road",
    "SSIM": "likeness to the real image of the mask, 1 = equal; other light or colours lower it: no test of the mask",
    "FID, layer 64": "distance of Inception's early features, colours and textures: the thesis's scale; blind to shape",
    "FID, layer 2048": "the same of its last features; too high for few images: compare at equal N only",
    "KID": "like FID without its bias from N, around 0 = same distribution, may be negative; nothing about one image",
    "Frechet distance, segmenter features": "as FID, of its last feature map; compare at equal N and segmenter only",
    "Frechet distance, segmenter features, floor": "the same of as many --train images: what real images would get",
    "distance within a mask": "root mean square of grey levels between its images, at 32x32; noise is difference too",
    "distance between real images": "the scale for 'distance within a mask'; their masks differ too",
    "nearest training image": "in grey levels at 32x32; far below that of real ones = copied; details do not show",
    "nearest training image, of real ones": "the scale for 'nearest training image': images that nobody copied",
}
INTERVAL = ("95 % of the values when masks are drawn anew with all their images: how much the choice of them matters, "
            "not the training, its seed or the segmenter. Repeated images raise FID and Frechet distance: see how "
            "wide it is, not where")
SSIM_OPTIONS = {  # as in Wang et al. 2004: a Gaussian window of 11x11
    "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}

# ------------------------------------------------------------------------------------------- from folders to images


def find_images(folder):
    """{stem: path} of the images in a folder or in its images/, without sample.py's sheet.png. ValueError for none."""
    folder = Path(folder).absolute()  # whoever runs this from elsewhere sees where it looks
    files = list_files(folder / "images" if (folder / "images").is_dir() else folder)
    files.pop("sheet", None)
    if not files:
        raise ValueError(f"{folder}: no images in this folder; expected some, or images/ in it, as in <data set>/test")
    return files


def mask_of(name, stems):
    """The one of `stems` that <stem>, <stem>_<k> or sample.py's <stem>_w<guidance>_seed<seed> belongs to, or None."""
    shorter = re.sub(r"_(w[\d.e+-]+_seed)?\d+$", "", name)
    return next((stem for stem in (name, shorter) if stem in stems), None)


def find_generated(folder, stems, guidance):
    """The generated images of one guidance, [(stem of its mask, path)]; all of them, with stem None, if stems is empty.

    guidance is the w in sample.py's names, and may be None if all have the same. ValueError: no image of these masks,
    or none of this guidance.
    """
    found, orphans = {}, []
    for name, path in find_images(folder).items():
        stem = mask_of(name, stems)
        if stems and stem is None:
            orphans.append(name)
        else:
            w = re.search(r"_w([\d.e+-]+)_seed\d+$", name)
            found.setdefault(float(w[1]) if w else None, []).append((stem, path))
    if not found:
        raise ValueError(f"{folder}: no image has the name of a mask ({', '.join(stems[:3])}, ...); expected <stem>, "
                         "<stem>_<k> or <stem>_w<guidance>_seed<seed>. FID and KID need no masks: say --unpaired")
    if orphans:
        print(f"{folder}: {len(orphans)} image(s) without a mask left out: {', '.join(orphans[:10])}")
    if guidance is None and len(found) == 1:
        [guidance] = found
    if guidance not in found:
        raise ValueError(f"{folder}: images of guidance {', '.join(map(str, found))}: choose one with --guidance W")
    return found[guidance]


def read_images(paths, size):
    """Images (N, H, W, 3) uint8, fitted to size (height, width). ValueError where all of them are masks."""
    if all(open_image(path).mode == "P" for path in paths):
        raise ValueError(f"{paths[0]}: a mask, as all in its folder (they have palettes); expected images. Photos with "
                         "a palette have to be saved as RGB")
    return np.stack([fit(read_image(path), size) for path in tqdm(paths, desc="reading", unit="image", leave=False)])


# ---------------------------------------------------------------------------------------------------- segmenters


def build_segmenter(arch, num_classes):
    """A torchvision net without weights: normalised images (B, 3, H, W) to {"out": logits (B, num_classes, H, W)}."""
    if arch not in ("deeplabv3_resnet50", "lraspp_mobilenet_v3_large"):
        raise ValueError(f"no segmenter is called {arch!r}; there are deeplabv3_resnet50, lraspp_mobilenet_v3_large")
    return get_model(arch, weights=None, weights_backbone=None, num_classes=num_classes)


def normalise(images):
    """Images (B, 3, H, W), 0..255, as the segmenter sees them: by ImageNet's mean and deviation."""
    return TF.normalize(images.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def load_segmenter(name, colorbook, device):
    """The judge: a function from images (B, 3, H, W) uint8 to class ids (B, H, W) uint8 of the colorbook.

    name         a checkpoint of experiments/segmenter.py, or a Mask2Former of transformers
    .image_size  of the function: [H, W] of the images that it was trained on, or None
    .features    of the function: another one, from images to (B, C), the mean of the backbone's last feature map over
                 the image; None for a Mask2Former
    ValueError: no segmenter, or one that lacks a class of the colorbook.
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

    missing = [label for label in colorbook.names if label not in labels]
    if missing:
        raise ValueError(f"{name}: a segmenter of {', '.join(labels)}: it lacks {', '.join(missing)} of "
                         f"{colorbook.source}. Train one on these classes (python -m experiments.segmenter)")
    chosen = [labels.index(label) for label in colorbook.names]  # they alone compete; the winner's place is its id

    def prepare(images):  # for a checkpoint's net: "size" is what it takes, "image_size" was that of its images
        x = F.interpolate(images.float(), size=state["size"], mode="bilinear", antialias=True)
        return normalise(x).to(device)

    @torch.no_grad()
    def features(images):
        return list(net.backbone(prepare(images)).values())[-1].mean((2, 3)).cpu()

    @torch.no_grad()
    def segment(images):
        size = images.shape[-2:]
        if processor:
            output = net(**processor(images=list(images), return_tensors="pt").to(device))
            output.class_queries_logits = output.class_queries_logits[..., [*chosen, -1]]  # the last is "nothing"
            sizes = [size] * len(images)
            ids = torch.stack(processor.post_process_semantic_segmentation(output, target_sizes=sizes))
        else:
            ids = F.interpolate(net(prepare(images))["out"][:, chosen], size=size, mode="bilinear").argmax(1)
        return ids.byte().cpu()

    segment.image_size, segment.features = state.get("image_size"), None if processor else features
    return segment


def load_inception(weights, device):
    """Inception's features (B, 64 + 2048) of images (B, 3, H, W) uint8, as a function; None where it cannot be had."""
    try:
        if weights:  # torch-fidelity would run whatever is pickled in it; this refuses anything but tensors
            torch.load(weights, map_location="cpu", weights_only=True)
        net = create_feature_extractor("inception-v3-compat", ["64", "2048"], cuda=False,
                                       feature_extractor_weights_path=weights)  # cuda is its only other device
    except URLError as error:
        print(f"FID and KID are left out, for want of Inception's weights ({error}). Where there is a network, get "
              f"{URL_INCEPTION_V3} and give the file with --inception-weights FILE")
        return None
    except Exception as error:  # torch raises many kinds for a file that holds no weights
        raise ValueError(f"{weights or 'the download'}: not the weights of torch-fidelity's Inception, "
                         f"{URL_INCEPTION_V3}: {type(error).__name__}") from error
    net.to(device)
    return lambda images: torch.cat(net(images.to(device)), dim=1).cpu()


# ----------------------------------------------------------------------------------------------------- numbers
# A draw of the bootstrap is a row of counts: how often each image is taken. The first row takes every image once. Each
# measure_*() takes counts (R, n), or both_counts, a pair of them for real and generated images, and returns {name of a
# number: (R,)}, its value and that of each draw.


def resample(n, m, real_index, times=1000):
    """How often each of n real and m generated images counts, (1 + times, n) and (1 + times, m) float64.

    Once in the first row, as bootstrap draws in the others. Real images are drawn, each with all that was generated
    from its mask: real_index (m,) is the number of the real image for each generated one. Without pairs (None), both
    sets are drawn.
    """
    rng = np.random.default_rng(0)

    def draw(k):
        return torch.from_numpy(np.concatenate([np.ones((1, k)), rng.multinomial(k, [1 / k] * k, times)]))

    real = draw(n)
    return real, draw(m) if real_index is None else real[:, real_index]


def confusion_matrix(true_ids, predicted_ids, num_classes):
    """Pixels (K, K) int64: the row is the true class, the column the predicted one; 255 in either is left out."""
    seen = (true_ids != UNLABELLED) & (predicted_ids != UNLABELLED)
    pairs = true_ids[seen].long() * num_classes + predicted_ids[seen].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).cpu()


def scores(confusion):
    """Pixel accuracy and mean IoU, floats or lists, and IoU (..., K) float64 of confusion matrices (..., K, K).

    IoU = tp / (tp + fp + fn), as Cityscapes' own script and torchmetrics have it: 0 for a class that is predicted and
    not there, NaN and out of the mean only where neither has it.
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
    matrix = matrix - matrix.diag().diag()  # 0 for each with itself
    return ((counts @ matrix) * counts).sum(1) / (counts.sum(1).square() - counts.square().sum(1))


def frechet_distance(x, y, x_counts, y_counts):
    """FID (Heusel et al. 2017) of features x (n, D) and y (m, D) float64, each as often as counts (n,) and (m,) say.

    With covariances A'A and B'B (A has a row for each image), the trace of (A'A B'B)^1/2 is the sum of the singular
    values of AB', and so no square root of a matrix is needed.
    """
    means, roots = [], []
    for features, counts in ((x, x_counts), (y, y_counts)):
        drawn, times = features[counts > 0], counts[counts > 0, None]
        mean = (times * drawn).sum(0) / times.sum()
        A = (times / (times.sum() - 1)).sqrt() * (drawn - mean)
        means.append(mean)
        roots.append(torch.linalg.qr(A, "r").R)  # A = QR with Q'Q = 1, so R'R = A'A, and R has at most D rows
    spread = sum(root.square().sum() for root in roots) - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return (means[0] - means[1]).square().sum() + spread


def kernel_distance(x, y, x_counts, y_counts):
    """KID (Binkowski et al. 2018), unbiased, of features x (n, D) and y (m, D), for counts (R, n) and (R, m): (R,)."""
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    across = ((x_counts @ xy) * y_counts).sum(1) / (x_counts.sum(1) * y_counts.sum(1))
    return mean_of_pairs(xx, x_counts) + mean_of_pairs(yy, y_counts) - 2 * across


@torch.no_grad()
def in_batches(function, images, title):
    """function(images), joined, of batches (16, 3, H, W) of the images (N, H, W, 3) uint8."""
    batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(16)
    return torch.cat([function(batch) for batch in tqdm(batches, desc=title, unit="batch", leave=False)])


def measure_masks(mask, in_real, in_generated, counts, names):
    """Were the masks obeyed? Three arrays of ids (m, H, W): the masks, and what the segmenter sees in the images."""
    numbers, ids = {}, {"mask": mask, "real": in_real, "generated": in_generated}
    for column in ("generated / mask", "real / mask", "generated / real"):
        seen, true = column.split(" / ")
        pairs = zip(torch.from_numpy(ids[true]), torch.from_numpy(ids[seen]))
        matrices = [confusion_matrix(*pair, len(names)) for pair in pairs]
        accuracy, mean_iou, iou = scores(torch.tensordot(counts, torch.stack(matrices).double(), 1))
        numbers[f"pixel accuracy: {column}"] = torch.tensor(accuracy, dtype=torch.float64)
        numbers[f"mean IoU: {column}"] = torch.tensor(mean_iou, dtype=torch.float64)
        numbers |= {f"IoU: {column}: {name}": iou[:, k] for k, name in enumerate(names)}
    for score in ("pixel accuracy", "mean IoU"):
        ceiling = numbers[f"{score}: real / mask"]
        numbers[f"share of the ceiling: {score}"] = numbers[f"{score}: generated / mask"] / ceiling
    return numbers


def measure_ssim(columns, counts, colorbook):
    """SSIM of the columns "real" and "generated", (m, H, W, 3), and a sheet of all columns, eight rows by rank in SSIM.
    """
    pairs = zip(columns["real"], tqdm(columns["generated"], desc="SSIM", unit="pair", leave=False))
    ssim = torch.tensor([structural_similarity(*pair, channel_axis=-1, **SSIM_OPTIONS) for pair in pairs])
    rows = ssim.argsort()[torch.linspace(0, len(ssim) - 1, min(8, len(ssim))).round().long()].numpy()
    # class ids (H, W) are painted, images (H, W, 3) shown as they are
    shown = [[colorbook.paint(x) if x.ndim == 2 else x for x in column[rows]] for column in columns.values()]
    return {"SSIM": mean_of(ssim, counts)}, contact_sheet(list(zip(*shown)), list(columns))


def frechet_draws(x, y, both_counts):
    """frechet_distance() of all images and of 100 draws, (101,); more would take too long."""
    draws = tqdm(list(zip(*both_counts))[:101], desc="Frechet distance", leave=False)
    return torch.stack([frechet_distance(x, y, *draw) for draw in draws])


def measure_inception(real, generated, both_counts, inception):
    """FID at two of Inception's layers, and KID."""
    (x64, x2048), (y64, y2048) = (
        in_batches(inception, images, "Inception").double().split([64, 2048], 1) for images in (real, generated))
    return {"FID, layer 64": frechet_draws(x64, y64, both_counts),
            "FID, layer 2048": frechet_draws(x2048, y2048, both_counts),
            "KID": kernel_distance(x2048, y2048, *both_counts)}


def measure_features(real, generated, train, both_counts, features):
    """Frechet distance in the segmenter's features; its floor, at the same N, if there are as many images of train."""
    name = "Frechet distance, segmenter features"
    x = in_batches(features, real, "features, real").double()
    y = in_batches(features, generated, "features, generated").double()
    numbers = {name: frechet_draws(x, y, both_counts)}
    if train is not None and len(train) >= len(generated):
        some = np.random.default_rng(0).choice(len(train), len(generated), replace=False)
        y = in_batches(features, train[some], "features, train").double()
        numbers[f"{name}, floor"] = frechet_draws(x, y, resample(len(x), len(y), None))  # they are no pairs
    return numbers


def thumbnails(images):
    """Images (N, H, W, 3) as (N, 3072): distances are the root mean square difference of 32x32 pixels."""
    small = in_batches(lambda batch: F.interpolate(batch.float(), size=(32, 32), mode="area"), images, "thumbnails")
    return small.flatten(1).double() / 3072**0.5


def measure_diversity(x, y, real_index, real_counts):
    """How different are the images of one mask? x (n, D) and y (m, D): thumbnails of real and generated images."""
    with_several = np.flatnonzero(np.bincount(real_index) > 1)  # the masks
    if not len(with_several):
        return {}
    images_of = torch.from_numpy(real_index == with_several[:, None]).double()  # a row per mask: 1 for its images
    within = mean_of_pairs(torch.cdist(y, y), images_of)
    mask_counts = real_counts[:, with_several]  # a mask counts as its real image does
    numbers = {"distance within a mask": mean_of(within, mask_counts)}
    if len(x) > 1:
        numbers["distance between real images"] = mean_of_pairs(torch.cdist(x, x), real_counts)
    return numbers


def measure_copies(x, y, generated, train, both_counts):
    """Were images of train copied? x (n, D) and y (m, D): thumbnails of real and generated images. Also a sheet."""
    real_counts, generated_counts = both_counts
    train = np.concatenate([train, train[:, :, ::-1]])  # training may mirror images
    learnt = thumbnails(train)
    distance, nearest = torch.cdist(y, learnt).min(1)
    numbers = {"nearest training image": mean_of(distance, generated_counts),
               "nearest training image, of real ones": mean_of(torch.cdist(x, learnt).amin(1), real_counts)}
    rows = [[generated[j], train[nearest[j]]] for j in distance.argsort()[:8]]
    return numbers, contact_sheet(rows, ["generated", "nearest in training"])


def evaluate(args):
    """One evaluation, from two folders to a report. ValueError or OSError for what the user can fix."""
    out, split, device = Path(args.out), Path(args.real).resolve(), pick_device(args.device)
    if out.exists() and (list_files(out).keys() - {"at_a_glance", "nearest_training"} or (out / "images").is_dir()):
        raise ValueError(f"--out {out}: a folder of images; expected a folder of its own for the report")

    # the images, all at the size of the first generated one
    size = read_image(next(iter(find_images(args.fake).values()))).shape[:2]
    pairs = Pairs(split.parent, split.name, size, memory_gb=math.inf)  # without a cache file beside them
    stems = [] if args.unpaired else [stem for stem, *_ in pairs.files]
    files = find_generated(args.fake, stems, args.guidance)
    generated = read_images([path for _, path in files], size)
    train = read_images(list(find_images(args.train).values()), size) if args.train else None
    planes = pairs.planes.permute(0, 2, 3, 1).numpy()  # (n, H, W, 4): RGB and class id
    real_index = None  # (m,): for each generated image the number of its real one
    if stems:
        have_fakes, real_index = np.unique([stems.index(stem) for stem, _ in files], return_inverse=True)
        planes = planes[have_fakes]
    real, ids = planes[..., :3], planes[..., 3]
    print(f"{len(real)} real, {len(generated)} generated images of {size[0]}x{size[1]}")

    # what judges them
    segment, warning = None, ""
    if args.segmenter:
        segment = load_segmenter(args.segmenter, pairs.colorbook, device)
        if segment.image_size not in (None, list(size)):
            warning = ("{} was trained on images of {}x{}; in these, of {}x{}, it sees less: compare scores at equal "
                       "sizes only").format(args.segmenter, *segment.image_size, *size)
    inception = load_inception(args.inception_weights, device)
    out.mkdir(parents=True, exist_ok=True)

    # the numbers: of pairs, of whole sets, of copies of training images
    numbers, sheets = {}, {"at_a_glance.png": None, "nearest_training.png": None}
    both_counts = resample(len(real), len(generated), real_index)
    real_counts, generated_counts = both_counts
    real_small, generated_small = thumbnails(real), thumbnails(generated)
    if stems:
        columns = {"mask": ids[real_index], "real": real[real_index], "generated": generated}
        if segment:
            in_real = in_batches(segment, real, "segmenter, real").numpy()[real_index]
            in_generated = in_batches(segment, generated, "segmenter, generated").numpy()
            columns |= {"seen in real": in_real, "seen in generated": in_generated}
            numbers |= measure_masks(columns["mask"], in_real, in_generated, generated_counts, pairs.colorbook.names)
        ssim, sheets["at_a_glance.png"] = measure_ssim(columns, generated_counts, pairs.colorbook)
        numbers |= ssim | measure_diversity(real_small, generated_small, real_index, real_counts)
    if min(len(real), len(generated)) > 1:  # one image has no covariance
        if inception:
            numbers |= measure_inception(real, generated, both_counts, inception)
        if segment and segment.features:
            numbers |= measure_features(real, generated, train, both_counts, segment.features)
    if args.train:
        copies, sheets["nearest_training.png"] = measure_copies(
            real_small, generated_small, generated, train, both_counts)
        numbers |= copies
    write_report(out, numbers, sheets, {
        "n": f"{len(real)} real, {len(generated)} generated", "interval": INTERVAL, "warning": warning, "size": size,
        "generated with": open_image(files[0][1]).info.get("settings"), "settings": vars(args), "device": str(device)})


def write_report(out, numbers, sheets, about):
    """The report, on the screen and as files in `out`."""
    report, meanings = {}, {}
    for name, values in numbers.items():
        value, draws = values[0].item(), values[1:]
        low, high = torch.nanquantile(draws, draws.new_tensor([0.025, 0.975])).tolist()
        meaning = {part: MEANING[part] for part in name.split(": ") if part in MEANING}
        meanings |= meaning
        report[name] = {"value": value if math.isfinite(value) else None,
                        "interval": [low, high] if low < high < math.inf else None,
                        "meaning": "; ".join(meaning.values())}
        print(f"{name:44} {value:9.4f}" + (f"  [{low:.4f}, {high:.4f}]" if low < high else ""))
    print(f"\n[low, high]: {INTERVAL}\n")
    print("\n".join(f"{part}: {meaning}" for part, meaning in meanings.items()))
    if about["warning"]:
        print(f"\nWARNING: {about['warning']}")
    for name, sheet in sheets.items():
        (out / name).unlink(missing_ok=True)  # of an earlier evaluation
        if sheet:
            sheet.save(out / name)
    (out / "report.json").write_text(json.dumps({"numbers": report} | about, indent=1, default=str))
    print(f"\n{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", required=True, help="a split of a prepared data set: images/ and masks/")
    parser.add_argument("--fake", required=True, help="the folder of the generated images")
    parser.add_argument("--segmenter", help="a checkpoint of experiments.segmenter, or a Mask2Former of transformers")
    parser.add_argument("--train", help="the split that the model was trained on: looks for copies of its images")
    parser.add_argument("--guidance", type=float, metavar="W", help="only generated images of this guidance")
    parser.add_argument("--unpaired", action="store_true", help="images without masks: only whole sets are compared")
    parser.add_argument("--inception-weights", metavar="FILE", help="of torch-fidelity's Inception, without a network")
    parser.add_argument("--out", default="runs/evaluation", help="folder for report and sheets; default: %(default)s")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    command(evaluate, parser.parse_args())


if __name__ == "__main__":
    main()
