"""How good are the pictures: do they obey the mask, and do they look real?

    python evaluate.py --real test/ --fake out/ --segmenter runs/judge/segmenter.pt
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.models import segmentation

from dataset import UNLABELLED

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
    """Images (B, 3, H, W) uint8 as the segmenter sees them, in training and in judging: ImageNet's mean and deviation."""
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
                         f"{len(found)}; its own are {', '.join(labels)}. Train one on these classes with "
                         "`python -m experiments.segmenter`")
    if missing:
        print(f"{where} has no {', '.join(missing)}: pixels of these classes are left out of every number")
    if len(found) < len(labels):
        others = [label for i, label in enumerate(labels) if i not in found.values()]
        print(f"{where}: {len(others)} of its labels are in no class of the colorbook and are never chosen: {', '.join(others)}")
    return found


def load_segmenter(name, colorbook, device):
    """The judge: a function from images (B, 3, H, W) uint8 to class ids (B, H, W) uint8, and {class id: its label id}.

    name is a checkpoint of experiments/segmenter.py, or a Mask2Former of the transformers package: a folder or its name.
    ValueError where it is neither, or knows less than half of the colorbook's classes.
    """
    if not Path(name).is_file():
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
        x = normalise(F.interpolate(images.to(device).float(), size=size, mode="bilinear", antialias=True))
        logits = F.interpolate(net(x)["out"][:, chosen], size=images.shape[-2:], mode="bilinear")
        return classes[logits.argmax(1)].byte().cpu()

    return segment, found


# -------------------------------------------------------------------------------------------------- scores


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
