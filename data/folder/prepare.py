"""Your own pairs of image and mask to the common folder shape; classes merged, dropped or renumbered.

    python -m data.folder.prepare --images photos --masks labels --colorbook my.json
    python -m data.folder.prepare ... --merge vehicle=car,truck,bus --drop sky     one class of three; one unlabelled
    python -m data.folder.prepare ... --merge person=24 --merge car=26,27 --drop 0 by the ids that stand in the masks
    python -m data.folder.prepare ... --group "^[^_]+"                             drives stay together
    python -m data.folder.prepare ... --names val=val.txt --names test=test.txt      these names; the others are train

An image and its mask have one name (drive_0001 for drive/0001.png, in sub-folders). Masks may be palette PNGs, images
in the colours of my.json, or 8-bit images of ids in its order; 255 is unlabelled. All are checked before anything is
written, and a report tells what was found. Frames of one drive look alike, and held-out ones measure little if their
neighbours are trained on: pairs whose names agree in what the expression --group finds go to one split.
"""

import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.common import prepare_command, write_dataset
from dataset import fit_pair, list_files, match_pairs, read_image
from masks import UNLABELLED, Colorbook, check_ids, open_image, read_mask


def find_files(folder, ending):
    """{name: path} of the image files in a folder and its sub-folders."""
    files = {}
    for part in [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]:
        for stem, path in list_files(part, ending).items():
            name = "_".join([*part.relative_to(folder).parts, stem])
            if name in files:
                raise ValueError(f"{path} and {files[name]} would both be called {name}: rename one of them")
            files[name] = path
    return files


def merge_classes(colorbook, merge, drop):
    """The colorbook of the result; table (256,), the new id of each old one or -1; and whether old ids were named.

    merge: texts NAME=MEMBER,...; drop: MEMBER,...; a member is a class or an id. A class that is new has the colour
    and the place of its first member.
    """
    becomes = {name: name for name in colorbook.names}  # and ids: the class that it becomes, None for unlabelled
    for text in [*merge, f"={drop}"]:
        name, _, members = text.partition("=")
        for member in filter(None, members.split(",")):
            if member not in colorbook.names and not (member.isdecimal() and int(member) < 256):
                raise ValueError(f"{text}: {member!r} is neither an id (0 to 255) nor a class of {colorbook.source}: "
                                 f"{', '.join(colorbook.names)}")
            if becomes.get(member, member) != member:
                raise ValueError(f"{text}: {member!r} is merged or dropped already: name it once")
            becomes[member] = name or None
    classes = {}
    for name, rgb in colorbook.classes.items():
        classes.setdefault(becomes[name], colorbook.classes.get(becomes[name], rgb))
    classes.pop(None, None)
    new_ids = {name: k for k, name in enumerate(classes)} | {None: UNLABELLED}
    table = np.full(256, -1)
    table[UNLABELLED] = UNLABELLED
    for member, name in becomes.items():  # classes first, so that ids go over them
        if name not in new_ids:
            raise ValueError(f"{colorbook.source} has no colour for {name!r}, which is made of ids: add it there")
        table[colorbook.names.index(member) if member in colorbook.names else int(member)] = new_ids[name]
    return Colorbook(classes, colorbook.source), table, len(becomes) > len(colorbook)


def read_labels(path, colorbook, table, by_id):
    """A mask as ids (H, W) by the table, and what the file was; by_id: the values in the file are looked up."""
    if by_id:
        ids, kind = np.array(open_image(path)), "ids"
        if ids.ndim != 2 or ids.dtype != np.uint8:
            raise ValueError(f"{path}: --merge and --drop name ids, so expected one channel of 8 bits")
        check_ids(np.where(table[ids] < 0, ids, np.uint8(UNLABELLED)), colorbook, path)
    else:
        ids, kind, snapped = read_mask(path, colorbook)
        kind += " with soft edges" * (snapped > 0)
    return table[ids].astype(np.uint8), kind


def split_pairs(pairs, shares, group, names):
    """{split: pairs}: by the names where there are any, else by shares, of whole groups in a fixed random order."""
    splits = {"train": [], "val": [], "test": []}
    split_of = {}
    for text in names:
        split, _, path = text.partition("=")
        if split not in splits:
            raise ValueError(f"--names {text}: expected train, val or test, as in val=val.txt")
        split_of |= {Path(line).stem: split for line in Path(path).read_text(encoding="utf-8").split()}
    missing = sorted(split_of.keys() - {name for name, *_ in pairs})
    if missing:
        raise ValueError(f"--names names {len(missing)} pairs that are not there: {', '.join(missing[:10])}")
    if split_of:
        for pair in pairs:
            splits[split_of.get(pair[0], "train")].append(pair)
        return splits
    if not re.fullmatch(r"\d+,\d+,\d+", shares) or sum(map(int, shares.split(","))) != 100:
        raise ValueError(f"--shares {shares}: expected per cent of train, val and test, as in 80,10,10")
    groups = defaultdict(list)
    for pair in pairs:
        try:
            found = re.search(group, pair[0])
        except re.error as error:
            raise ValueError(f"--group {group}: no regular expression: {error}") from error
        if not found:
            raise ValueError(f"--group {group} finds nothing in the name {pair[0]}")
        groups[found[0]].append(pair)
    wanted = {split: int(share) * len(pairs) / 100 for split, share in zip(splits, shares.split(","))}
    for name in random.Random(0).sample(sorted(groups), len(groups)):
        neediest = max(splits, key=lambda split: wanted[split] - len(splits[split]))
        splits[neediest] += groups[name]
    empty = [split for split in splits if wanted[split] and not splits[split]]
    if empty:
        raise ValueError(f"{len(groups)} group(s) of names are too few for {', '.join(empty)}: choose other --shares, "
                         "another --group, or name the pairs with --names")
    return splits


def check_pairs(pairs, read, colorbook, size, crop):
    """Read all pairs and print what was found; ValueError that lists those that cannot be used."""
    bad, kinds, shapes, pixels = [], Counter(), Counter(), np.zeros(256)
    for _, image, mask in tqdm(pairs, "checking", unit="pair", leave=False):
        try:
            ids, kind = read(mask)
            fitted = fit_pair(read_image(image), ids, size, crop, f"{image} and {mask}")[1]
        except ValueError as error:
            bad.append(str(error))
            continue
        kinds[kind] += 1
        shapes[ids.shape] += 1
        pixels += np.bincount(fitted.ravel(), minlength=256)
    if bad:
        raise ValueError("\n".join([f"{len(bad)} of {len(pairs)} pairs cannot be used; the first are:", *bad[:10]]))
    print(f"{len(pairs)} pairs; masks in " + ", ".join(f"{kind}: {n}" for kind, n in kinds.items()))
    for (H, W), n in shapes.most_common(10):
        h, w = crop or (min(H, W * size[0] / size[1]), min(W, H * size[1] / size[0]))
        print(f"{n} of {H}x{W} (height x width): {1 - h * w / H / W:.0%} cropped, the centre {h:.0f}x{w:.0f} resized")
    for k, name in [*enumerate(colorbook.names), (UNLABELLED, "unlabelled")]:
        print(f"{name:20} {pixels[k] / pixels.sum():7.2%} of the pixels")


def prepare(images, masks, out, size, crop, colorbook, merge=(), drop="", shares="80,10,10", group=".*", names=(),
            endings=","):
    source, (image_ending, mask_ending) = Colorbook.load(colorbook), endings.split(",")
    result, table, by_id = merge_classes(source, merge, drop)
    pairs = match_pairs(find_files(images, image_ending), find_files(masks, mask_ending), images)
    if not pairs:
        raise ValueError(f"{images} and {masks}: no image has the name of a mask. Where names end differently give "
                         "--endings, such as _leftImg8bit,_gtFine_labelIds")

    def read(mask):
        return read_labels(mask, source, table, by_id)

    splits = split_pairs(pairs, shares, group, names)
    check_pairs(pairs, read, result, size, crop)
    items = {split: [] for split in splits if splits[split]}
    for split in items:
        for name, image, mask in splits[split]:
            def make(image=image, mask=mask):
                return fit_pair(read_image(image), read(mask)[0], size, crop, f"{image} and {mask}")
            items[split].append((name, make))
    write_dataset(out, result, items)


if __name__ == "__main__":
    prepare_command(
        prepare, __doc__, "folder", size=(64, 64),
        sources={"images": "folder of the images, with its sub-folders", "masks": "folder of their masks"},
        colorbook={"required": True, "help": "the classes of the masks, in the order of the ids"},
        merge={"action": "append", "default": [], "metavar": "NAME=CLASS_OR_ID,..."},
        drop={"default": "", "metavar": "CLASS_OR_ID,...", "help": "becomes unlabelled"},
        shares={"default": "80,10,10", "help": "%% of train, val and test; default: %(default)s"},
        group={"default": ".*", "metavar": "REGEX", "help": "pairs whose names agree in it share a split"},
        names={"action": "append", "default": [], "metavar": "SPLIT=FILE", "help": "names of its pairs"},
        endings={"default": ",", "metavar": "IMAGE,MASK", "help": "how names end that differ, before the suffix"})
