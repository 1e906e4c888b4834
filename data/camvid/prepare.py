"""CamVid, 11 classes, in the SegNet split, to the common folder shape.

    python -m data.camvid.prepare --source CamVid

expects {train,val,test}/<id>.png or .jpg with {train,val,test}annot/<id>.png beside them: ids 0..10, and 11 for
unlabelled, which becomes 255. A split whose folder is missing is left out; train is needed.
"""

import numpy as np

from data.common import prepare_command, write_dataset
from dataset import fit_pair, list_files, match_pairs, read_image
from masks import UNLABELLED, Colorbook, check_ids, open_image

CLASSES = {  # in the order of the ids, in the palette of the data set's authors
    "sky": [128, 128, 128],
    "building": [128, 0, 0],
    "pole": [192, 192, 128],
    "road": [128, 64, 128],
    "pavement": [60, 40, 222],
    "tree": [128, 128, 0],
    "sign": [192, 128, 128],
    "fence": [64, 64, 128],
    "car": [64, 0, 128],
    "pedestrian": [64, 64, 0],
    "bicyclist": [0, 128, 192],
}


def prepare(source, out, size, crop):
    colorbook, splits = Colorbook(CLASSES), {}
    for split in ("train", "val", "test"):
        images, labels = source / split, source / f"{split}annot"
        if split != "train" and not images.is_dir():
            print(f"{images}: no such folder, split left out")
            continue
        if not images.is_dir() or not labels.is_dir():
            raise ValueError(f"{images} and {labels} are needed; --source is the folder of train and trainannot")
        splits[split] = []
        for stem, image, label in match_pairs(list_files(images), list_files(labels), images):
            def make(image=image, label=label):
                ids = np.array(open_image(label))
                ids = check_ids(np.where(ids == len(CLASSES), np.uint8(UNLABELLED), ids), colorbook, label)
                return fit_pair(read_image(image), ids, size, crop, label)
            splits[split].append((stem, make))
    write_dataset(out, colorbook, splits)


if __name__ == "__main__":
    prepare_command(prepare, __doc__, "camvid", size=(48, 64))
