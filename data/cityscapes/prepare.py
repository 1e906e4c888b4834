"""Cityscapes, the 19 classes of the benchmark, to the common folder shape.

    python -m data.cityscapes.prepare --source cityscapes --size 128x256

expects the official download: leftImg8bit/{train,val}/<city>/<id>_leftImg8bit.png and
gtFine/{train,val}/<city>/<id>_gtFine_labelIds.png. The 34 label ids become the 19 train ids, the rest is unlabelled.
The labels of the official test split are withheld, so there is no test here: val is what one evaluates on.
"""

from pathlib import Path

import numpy as np

from data.common import prepare_command, write_dataset
from dataset import fit_pair, list_files, match_pairs, read_image
from masks import UNLABELLED, Colorbook, open_image

TRAIN_IDS = np.full(256, UNLABELLED, np.uint8)  # label id to train id
TRAIN_IDS[[7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]] = np.arange(19)


def read_label_ids(path):
    """A ..._labelIds.png as train ids (H, W) uint8."""
    ids = np.array(open_image(path))
    if ids.ndim != 2 or ids.dtype != np.uint8 or ids.max() > 33:
        raise ValueError(f"{path}: expected an 8-bit image of label ids 0..33, found {ids.dtype} {ids.shape}, "
                         f"largest value {ids.max()}")
    return TRAIN_IDS[ids]


def prepare(source, out, size, crop):
    colorbook = Colorbook.load(Path(__file__).parents[2] / "colorbook.json")
    splits = {"train": [], "val": []}
    for split, items in splits.items():
        images, labels = source / "leftImg8bit" / split, source / "gtFine" / split
        if not images.is_dir() or not labels.is_dir():
            raise ValueError(f"{images} and {labels} are needed; --source is the folder of leftImg8bit and gtFine")
        for city in sorted(p.name for p in images.iterdir() if p.is_dir()):
            city_images = list_files(images / city, "_leftImg8bit")
            city_labels = list_files(labels / city, "_gtFine_labelIds") if (labels / city).is_dir() else {}
            for stem, image, label in match_pairs(city_images, city_labels, images / city):
                def make(image=image, label=label):
                    return fit_pair(read_image(image), read_label_ids(label), size, crop, label)
                items.append((stem, make))
    write_dataset(out, colorbook, splits)


if __name__ == "__main__":
    prepare_command(prepare, __doc__, "cityscapes", size=(128, 256))
