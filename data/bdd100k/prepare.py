"""BDD100K, the 8000 labelled pictures of its 10k set, 19 classes, to the common folder shape.

    python -m data.bdd100k.prepare --source bdd100k

expects the official download "10K Images" and "Semantic Segmentation", unpacked into one folder:

    images/10k/{train,val}/<id>.jpg                      1280x720
    labels/sem_seg/polygons/sem_seg_{train,val}.json     polygons, which the thesis used, or
    labels/sem_seg/masks/{train,val}/<id>.png            8-bit train ids, 255 is unlabelled, or
    labels/sem_seg/colormaps/{train,val}/<id>.png        RGBA in Cityscapes colours

or the older release: seg/images/{train,val}/<id>.jpg with seg/labels/{train,val}/<id>_train_id.png or
seg/color_labels/{train,val}/<id>_train_color.png. The centre 720x720 becomes 128x128 (thesis 4.1); the official train is
written as train (7000 pairs) and the official val as test (1000). Polygons that overlap are drawn in their order.
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
    """{stem: (file, read)}, where read(shape) gives ids; kind is polygons, masks or colormaps. None if there are none."""
    if kind == "polygons":
        path = source / "labels" / "sem_seg" / "polygons" / f"sem_seg_{split}.json"
        if not path.is_file():
            return None
        try:
            frames = json.loads(path.read_text(encoding="utf-8"))
            frames = frames["frames"] if isinstance(frames, dict) else frames
            return {Path(frame["name"]).stem: (path, lambda shape, frame=frame: draw_polygons(
                frame.get("labels"), shape, colorbook, f"{path}, {frame['name']}")) for frame in frames}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a Scalabel list of frames with name and labels: {error!r}") from None
    new = source / "labels" / "sem_seg" / kind / split
    old = source / "seg" / ("labels" if kind == "masks" else "color_labels") / split
    folder, ending = (new, "") if new.is_dir() else (old, "_train_id" if kind == "masks" else "_train_color")
    if not folder.is_dir():
        return None
    return {stem: (path, lambda shape, path=path: read_mask(path, colorbook)[0])
            for stem, path in list_files(folder, ending).items()}


def prepare(source, out, size, crop, labels):
    colorbook = Colorbook.load(Path(__file__).parents[2] / "colorbook.json")
    splits = {}
    for split, name in (("train", "train"), ("val", "test")):
        images = next((p for p in (source / "images" / "10k" / split, source / "seg" / "images" / split) if p.is_dir()), None)
        if images is None:
            raise ValueError(f"{source}: neither images/10k/{split} nor seg/images/{split}; --source is the folder above")
        kinds = ("polygons", "masks", "colormaps") if labels == "auto" else (labels,)
        kind, found = next(((k, f) for k in kinds if (f := find_labels(source, split, k, colorbook)) is not None), (None, None))
        if found is None:
            raise ValueError(f"{source}: no {' or '.join(kinds)} of {split}; expected them below labels/sem_seg or seg")
        print(f"{images}: labels from {kind}")
        splits[name] = []
        for stem, image, (label, read) in match_pairs(list_files(images), found, images):
            def make(image=image, label=label, read=read):
                picture = read_image(image)
                return fit_pair(picture, read(picture.shape[:2]), size, crop, f"{image} and {label}")
            splits[name].append((stem, make))
    write_dataset(out, colorbook, splits)


if __name__ == "__main__":
    prepare_command(prepare, __doc__, "bdd100k", size=(128, 128), labels={
        "default": "auto", "choices": ["auto", "polygons", "masks", "colormaps"],
        "help": "which form of the labels; auto takes the first that is there"})
