"""BDD100K, the 8000 labelled images of its 10k set, 19 classes, to the common folder shape.

    python -m data.bdd100k.prepare --source bdd100k

expects the official download "10K Images" and "Semantic Segmentation", unpacked into one folder:

    images/10k/{train,val}/<id>.jpg                      1280x720
    labels/sem_seg/polygons/sem_seg_{train,val}.json     polygons, which the thesis used, or
    labels/sem_seg/masks/{train,val}/<id>.png            8-bit train ids, 255 is unlabelled, or
    labels/sem_seg/colormaps/{train,val}/<id>.png        RGBA in Cityscapes colours

or the older release: seg/images/{train,val}/<id>.jpg with seg/labels/{train,val}/<id>_train_id.png or
seg/color_labels/{train,val}/<id>_train_color.png. The centre 720x720 becomes 128x128 (thesis 4.1); the official train
is written as train (7000 pairs), the official val as test (1000). Polygons that overlap are drawn in their order.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data.common import prepare_command, write_dataset
from dataset import fit_pair, list_files, match_pairs, read_image
from masks import UNLABELLED, Colorbook, read_mask


def outline(vertices, types):
    """The corners of a Scalabel poly2d: "L" is a corner, three "C" in a row end a cubic Bézier curve."""
    points, i = [tuple(vertices[0])], 1
    closed = vertices + vertices[:1]  # a curve that closes the polygon ends at its first vertex
    while i < len(vertices):
        if types[i] == "C" and i + 3 <= len(closed):
            p0, p1, p2, p3 = (np.array(p, float) for p in (points[-1], *closed[i : i + 3]))
            s = np.linspace(0, 1, 17)[1:, None]
            curve = (1 - s) ** 3 * p0 + 3 * s * (1 - s) ** 2 * p1 + 3 * s**2 * (1 - s) * p2 + s**3 * p3
            points += map(tuple, curve)
            i += 3
        else:
            points.append(tuple(vertices[i]))
            i += 1
    return points


def draw_polygons(labels, shape, colorbook, where):
    """The labels of one Scalabel frame as ids (H, W) uint8; categories outside the 19 classes are unlabelled."""
    canvas = Image.new("L", (shape[1], shape[0]), UNLABELLED)
    try:
        for label in labels or ():
            if label["category"] in colorbook.names:
                for poly in label.get("poly2d") or ():
                    if len(poly["vertices"]) > 2:
                        ImageDraw.Draw(canvas).polygon(outline(poly["vertices"], poly["types"]),
                                                       fill=colorbook.names.index(label["category"]))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{where}: not a label of category, and poly2d of vertices and types: {error!r}") from None
    return np.array(canvas)


def find_labels(source, split, kind, colorbook):
    """{stem: (file, read)}, where read(shape) gives ids, or None; kind is polygons, masks or colormaps."""
    if kind == "polygons":
        path = source / "labels" / "sem_seg" / "polygons" / f"sem_seg_{split}.json"
        if not path.is_file():
            return None
        readers = {}
        try:
            frames = json.loads(path.read_text(encoding="utf-8"))
            for frame in frames["frames"] if isinstance(frames, dict) else frames:
                def read(shape, frame=frame):
                    return draw_polygons(frame.get("labels"), shape, colorbook, f"{path}, {frame['name']}")
                readers[Path(frame["name"]).stem] = path, read
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a Scalabel list of frames with name and labels: {error!r}") from None
        return readers
    new = source / "labels" / "sem_seg" / kind / split
    old = source / "seg" / ("labels" if kind == "masks" else "color_labels") / split
    folder, ending = (new, "") if new.is_dir() else (old, "_train_id" if kind == "masks" else "_train_color")
    if not folder.is_dir():
        return None
    return {stem: (path, lambda shape, path=path: read_mask(path, colorbook)[0])
            for stem, path in list_files(folder, ending).items()}


def choose_labels(source, split, labels, colorbook):
    """find_labels() of the form that `labels` names; auto takes the first form that is there."""
    kinds = ("polygons", "masks", "colormaps") if labels == "auto" else (labels,)
    for kind in kinds:
        readers = find_labels(source, split, kind, colorbook)
        if readers is not None:
            print(f"{source}, {split}: labels from {kind}")
            return readers
    raise ValueError(f"{source}: no {' or '.join(kinds)} of {split}; expected them below labels/sem_seg or seg")


def prepare(source, out, size, crop, labels):
    colorbook = Colorbook.load(Path(__file__).parents[2] / "colorbook.json")
    splits = {"train": [], "test": []}
    for split, items in (("train", splits["train"]), ("val", splits["test"])):
        folders = source / "images" / "10k" / split, source / "seg" / "images" / split
        images = next((folder for folder in folders if folder.is_dir()), None)
        if images is None:
            raise ValueError(f"{source}: no images/10k/{split} and no seg/images/{split}; --source is the folder above")
        readers = choose_labels(source, split, labels, colorbook)
        for stem, path, (label, read) in match_pairs(list_files(images), readers, images):
            def make(path=path, label=label, read=read):
                image = read_image(path)
                return fit_pair(image, read(image.shape[:2]), size, crop, f"{path} and {label}")
            items.append((stem, make))
    write_dataset(out, colorbook, splits)


if __name__ == "__main__":
    prepare_command(prepare, __doc__, "bdd100k", size=(128, 128), labels={
        "default": "auto", "choices": ["auto", "polygons", "masks", "colormaps"],
        "help": "which form of the labels; auto takes the first that is there"})
