"""Enrich a data set: real images in which things of rare classes are new, with masks that are exact by construction.

    python -m experiments.enrich --root data/idd_lite/prepared --checkpoint runs/idd_lite/checkpoint.pt \\
        --classes "living things,vehicles" --judge runs/judge/checkpoint.pt --n 1000 --out enriched

Shapes of these classes are cut out of the train split's masks: connected regions that touch no edge of the image. Each
is put into another mask where such things stand: on the row of another one of its class, on the same class beneath,
in a size that follows the row as sizes do in the data. There the real image is drawn anew (as by sample.py --image),
and the rest keeps its pixels. Images in which the judge, a segmenter, does not see the new thing go to rejected/. Their
rate is printed beside two that tell what the judge is worth: of the real shapes in which it does not see the class
either, and of the places in which it saw the class before anything was there. Train it with --balance.

OUT gets images/, masks/ and colorbook.json, as sample.py --as-dataset writes them; edits.jsonl, a line for each edit:
where the shape is from, where it was put, the seed, the share of its pixels in which the judge sees the class, after
the edit and before, and whether the image was accepted; report.json; and sheet.png. Of val and test no file is opened.
Ctrl-C loses nothing: the same command goes on. 1000 edits of 64x64 take 5 minutes on two CPU cores.
"""

import argparse
import difflib
import json
import math
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from skimage.measure import label, regionprops
from tqdm import tqdm

import sample
from checkpoint import replacing
from config import command
from dataset import Pairs, contact_sheet, list_files, prepare_edit, read_image
from evaluate import load_segmenter
from masks import UNLABELLED, read_mask, save_mask

# -------------------------------------------------------------------------------------------------- shapes and places


def cut_shapes(ids, k, rare, least):
    """The regions of class k in the masks ids (N, H, W) that can stand elsewhere, and {reason: how many cannot}.

    What stands on another of the classes `rare` is left out: a rider is but a part of what he rides on.

    A shape is a dict: source, the number of its mask; box, its rows and columns (top, left, bottom, right), so that it
    stands on row `bottom`; mask (h, w) bool; ground, the class of most pixels beneath its lowest row.
    """
    shapes, left_out, (H, W) = [], Counter(), ids.shape[1:]
    for i, mask in enumerate(ids):
        for region in regionprops(label(mask == k)):
            top, left, bottom, right = region.bbox
            if min(top, left) == 0 or bottom == H or right == W:
                left_out["cut off by the edge of the image"] += 1
                continue
            ground = int(np.bincount(mask[bottom, left:right][region.image[-1]]).argmax())
            if region.area < least:
                left_out[f"of less than {least} pixels"] += 1
            elif bottom - top > H / 2 or right - left > W / 2:
                left_out["of more than half the image's height or width"] += 1
            elif ground == UNLABELLED or ground in rare:
                left_out["on unlabelled ground or on another of the classes"] += 1
            else:
                shapes.append({"source": i, "box": region.bbox, "mask": region.image, "ground": ground})
    return shapes, left_out


def growth(shapes):
    """b of height = a exp(b row), fitted to the shapes and the rows that they stand on; 0 where these are too few."""
    rows = [shape["box"][2] for shape in shapes]
    heights = [shape["mask"].shape[0] for shape in shapes]
    return float(np.polyfit(rows, np.log(heights), 1)[0]) if len(set(rows)) > 2 else 0.0


def free_columns(shape, ids, row, ground, rare):
    """The columns of ids (H, W) at which shape (h, w) bool may stand on `row`.

    The class `ground` is beneath all pixels of its lowest row, and it hides no pixel of the classes `rare`.
    """
    h, w = shape.shape
    if row < h or w > ids.shape[1]:
        return np.array([], int)
    windows = sliding_window_view(ids[row - h : row + 1], (h + 1, w))[0]  # (columns, h + 1, w)
    stands = (windows[:, -1, shape[-1]] == ground).all(axis=1)
    hides = np.isin(windows[:, :-1][:, shape], rare).any(axis=1)
    return np.flatnonzero(stands & ~hides)


def find_place(name, shapes, slope, ids, rare, least, rng):
    """One of the shapes of class `name`, the number of another mask, and the box there with the mask in its new size.

    ValueError where none is found.
    """
    for _ in range(2000):
        shape, like = (shapes[i] for i in rng.integers(len(shapes), size=2))
        scene, row = int(rng.integers(len(ids))), like["box"][2]
        scale = math.exp(slope * (row - shape["box"][2]))
        if scene == shape["source"] or like["ground"] != shape["ground"] or not 0.5 <= scale <= 2:
            continue
        mask = resize(shape["mask"], [max(1, round(side * scale)) for side in shape["mask"].shape])
        columns = free_columns(mask, ids[scene], row, shape["ground"], rare) if mask.sum() >= least else []
        if len(columns):
            column = int(rng.choice(columns))
            box = [row - mask.shape[0], column, row, column + mask.shape[1]]
            return {"shape": shape, "mask": mask, "scene": scene, "box": box}
    raise ValueError(f"{len(shapes)} shapes of {name} were tried 2000 times, and fit into no other mask on a row and a "
                     "class that such things stand on: the data are too few for it, leave it out of --classes")


def resize(array, size, resample=Image.Resampling.NEAREST):
    """A mask (h, w) bool or an image (h, w, 3) uint8 at another size (height, width)."""
    return np.array(Image.fromarray(array).resize(size[::-1], resample))


def rows_and_columns(box):
    """The index of a box (top, left, bottom, right) in an image."""
    top, left, bottom, right = box
    return slice(top, bottom), slice(left, right)


# ----------------------------------------------------------------------------------------------- what is made, and seen


def next_classes(lines, names, n, tries, batch_size):
    """The classes of the next edits: in turns those that lack images, of the n to be made, and have tries left."""
    missing = {}
    for i, name in enumerate(names):
        wanted = n // len(names) + (i < n % len(names))
        accepted = [line["accepted"] for line in lines if line["class"] == name]
        missing[name] = min(wanted - sum(accepted), tries * wanted - len(accepted))
    turns = range(max(missing.values()))
    return [name for turn in turns for name in names if missing[name] > turn][:batch_size]


def real_shapes_unseen(shapes, k, planes, segment, threshold):
    """The share of the real shapes of class k in which the judge does not see it."""
    unseen = []
    for i in tqdm({shape["source"] for shape in shapes}, "judging real shapes", unit="image", leave=False):
        seen = segment(planes[i : i + 1, :3])[0].numpy()
        for shape in (shape for shape in shapes if shape["source"] == i):
            unseen.append((seen[rows_and_columns(shape["box"])][shape["mask"]] == k).mean() < threshold)
    return float(np.mean(unseen))


def report(lines, shapes, left_out, pairs, segment, threshold):
    """{class: figures}, printed: how many shapes there were and edits were made, and what the judge saw."""
    figures, threshold = {}, max(threshold, 1e-6)  # with --seen 0 a class is seen in one pixel or more
    for name in shapes:
        k, of_class = pairs.colorbook.names.index(name), [line for line in lines if line["class"] == name]
        accepted = [line["accepted"] for line in of_class]
        figures[name] = {"shapes": len(shapes[name]), "left out": left_out[name], "edits": len(of_class),
                         "accepted": sum(accepted), "rejected": 1 - float(np.mean(accepted)),
                         "real shapes unseen": real_shapes_unseen(shapes[name], k, pairs.planes, segment, threshold),
                         "seen before": float(np.mean([line["seen_before"] >= threshold for line in of_class]))}
        print("{0}: {edits} edits with {shapes} shapes, {accepted} accepted. The judge does not see the class in "
              "{rejected:.0%} of them, nor in {real shapes unseen:.0%} of the real shapes; in {seen before:.0%} of the "
              "places it saw it before the edit".format(name, **figures[name]))
    return figures


def draw_sheet(lines, out, pairs, segment):
    """Up to eight accepted edits and four rejected ones: image and mask, the new ones, the judge's view."""
    stems, paint, rows = [stem for stem, *_ in pairs.files], pairs.colorbook.paint, []
    for accepted, most in ((True, 8), (False, 4)):
        some = [line for line in lines if line["accepted"] == accepted]
        for i in np.linspace(0, len(some) - 1, min(most, len(some))).round().astype(int):
            planes = pairs.planes[stems.index(some[i]["place"]["in"])].numpy()
            folder, name = out if accepted else out / "rejected", some[i]["image"]
            image = read_image(folder / "images" / name)
            seen = segment(torch.from_numpy(image).permute(2, 0, 1)[None])[0].numpy()
            mask = read_mask(folder / "masks" / name, pairs.colorbook)[0]
            rows.append([planes[:3].transpose(1, 2, 0), paint(planes[3]), paint(mask), image, paint(seen)])
    return contact_sheet(rows, ["real", "mask", "edited mask", "result", "judge"])


# ------------------------------------------------------------------------------------------------------- from the start


def class_names(text, colorbook):
    """ "person,rider" to names of the colorbook; ValueError with the nearest one for a name that is not there."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in colorbook.names:
            near = difflib.get_close_matches(name, colorbook.names, 1, 0)[0]
            raise ValueError(f"--classes {name}: the classes of {colorbook.source} are {', '.join(colorbook.names)}; "
                             f"did you mean {near}?")
    return names


def check_output(out, colorbook, settings):
    """Begin or continue the folder; ValueError where it holds something else, or was begun with other settings."""
    file = out / "settings.json"
    if file.exists():
        begun = json.loads(file.read_text(encoding="utf-8"))
        changed = [key for key in settings if begun.get(key) != settings[key]]
        if changed:
            raise ValueError(f"{file}: begun with another {', '.join(changed)}: choose another --out, or delete it")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds files, but no settings.json of this program: choose another --out")
    for folder in (out, out / "rejected"):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "masks").mkdir(exist_ok=True)
    colorbook.save(out / "colorbook.json")
    write(file, json.dumps(settings, indent=1))


def write(path, text):
    with replacing(path) as file:
        file.write(text.encode())


def make_edits(classes, first, pairs, shapes, slopes, least, network):
    """Edit an image for each of these classes, with seeds from `first` on. Yields the line for edits.jsonl, the image,
    its prepare_edit(), and what is new in it, (H, W) bool.

    network: (model, diffusion, s, autocast) for sample.sample_jobs().
    """
    ids, (model, diffusion, s, autocast) = pairs.planes[:, 3].numpy(), network
    names, stems = pairs.colorbook.names, [stem for stem, *_ in pairs.files]
    rare = [names.index(name) for name in shapes]
    edits, lines, new = {}, {}, {}
    for seed, name in enumerate(classes, first):
        place = find_place(name, shapes[name], slopes[name], ids, rare, least, np.random.default_rng(seed))
        shape, scene = place["shape"], place["scene"]
        changed = np.zeros(ids.shape[1:], bool)
        changed[rows_and_columns(place["box"])] = place["mask"]
        mask = np.where(changed, np.uint8(names.index(name)), ids[scene])
        image = pairs.planes[scene, :3].permute(1, 2, 0).numpy()
        file = f"edit_{seed - s['seed']:05}.png"
        edits[file], new[file] = prepare_edit(image, mask, changed, s["size"]), changed
        lines[file] = {"image": file, "class": name, "seed": seed,
                       "shape": {"from": stems[shape["source"]], "box": list(shape["box"])},
                       "place": {"in": stems[scene], "box": place["box"], "on": names[shape["ground"]]}}
    jobs = [{"mask": file, "seed": line["seed"], "guidance": s["guidances"][0]} for file, line in lines.items()]
    fitted = {file: edit["ids"] for file, edit in edits.items()}
    for batch, images in sample.sample_jobs(jobs, fitted, model, diffusion, s, autocast, edits, show=False):
        for job, image in zip(batch, images):
            file = job["mask"]
            yield lines[file], image, edits[file], new[file]


def read_inputs(args):
    """The train split as Pairs, the names of the classes, the judge, the checkpoint and the settings of its samples.

    ValueError where they do not go together.
    """
    words = ["--checkpoint", args.checkpoint, "--mask", args.root / "train" / "masks", "--seed", args.seed, "--out",
             args.out, "--device", args.device, "--set", "sample.sampler=ddim", "--set", "sample.eta=1"]
    words += [word for setting in args.set for word in ("--set", setting)]
    state, s = sample.resolve(sample.make_parser().parse_args([str(word) for word in words]))
    first = next(iter(list_files(args.root / "train" / "images").values()), None)
    pairs = Pairs(args.root, "train", read_image(first).shape[:2] if first else s["size"])
    colorbook, names = pairs.colorbook, class_names(args.classes, pairs.colorbook)
    if list(state["colorbook"]) != colorbook.names:
        raise ValueError(f"{args.checkpoint} knows the classes {', '.join(state['colorbook'])}, but those of "
                         f"{colorbook.source} are {', '.join(colorbook.names)}: train a generator on these data")
    if args.n < len(names) or args.tries < 1 or not 0 <= args.seen <= 1:
        raise ValueError(f"--n {args.n}, --tries {args.tries}, --seen {args.seen}: expected an image or more of each "
                         "class, 1 or more, and a share from 0 to 1")
    segment = load_segmenter(args.judge, colorbook, s["device"])
    if segment.image_size not in (None, list(pairs.size)):
        print(f"{args.judge} was trained on images of {segment.image_size}, and sees less in these of {pairs.size}")
    return pairs, names, segment, state, s


def cut_classes(pairs, names, least):
    """cut_shapes() of each class, printed: {name: shapes} and {name: {reason: how many}}. ValueError for no shapes."""
    shapes, left_out, rare = {}, {}, [pairs.colorbook.names.index(name) for name in names]
    for name, k in zip(names, rare):
        shapes[name], left_out[name] = cut_shapes(pairs.planes[:, 3].numpy(), k, rare, least)
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out[name].items()) or "none"
        if not shapes[name]:
            raise ValueError(f"{pairs.folder}: no shape of {name} can be put elsewhere (left out: {reasons}); leave "
                             "it out of --classes, or lower --least")
        print(f"{len(shapes[name])} shapes of {name}; left out: {reasons}")
    return shapes, left_out


def run(args):
    """From a prepared data set to an enriched split. ValueError or OSError for what the user can fix."""
    pairs, names, segment, state, s = read_inputs(args)
    shapes, left_out = cut_classes(pairs, names, args.least)
    slopes, colorbook = {name: growth(of_class) for name, of_class in shapes.items()}, pairs.colorbook
    _, model, diffusion, autocast = sample.load_network(state, s)
    settings = {"data_crc32": zlib.crc32(pairs.planes.numpy()), "classes": names, "n": args.n, "tries": args.tries,
                "seen": args.seen, "least": args.least, "judge": str(args.judge),
                "weights_crc32": zlib.crc32(state["ema"]["out.weight"].numpy()), "trained_steps": state["step"]}
    settings |= {key: s[key] for key in ("seed", "sampler", "steps", "eta", "guidance", "guidance_interval",
                                         "precision", "batch_size")}
    check_output(args.out, colorbook, settings)
    file, lines = args.out / "edits.jsonl", []
    if (args.out / "report.json").exists():
        print(f"{args.out}: finished already")
        return
    if file.exists():
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        print(f"{args.out}: going on after {len(lines)} edits")
    network = model, diffusion, s, autocast
    with tqdm(total=args.n, initial=sum(line["accepted"] for line in lines), unit="image") as bar:
        while classes := next_classes(lines, names, args.n, args.tries, s["batch_size"]):
            edits = make_edits(classes, s["seed"] + len(lines), pairs, shapes, slopes, args.least, network)
            for line, image, edit, new in edits:
                views = segment(torch.from_numpy(np.stack([image, edit["image"]])).permute(0, 3, 1, 2)).numpy()
                share, share_before = (views[:, new] == colorbook.names.index(line["class"])).mean(axis=1).tolist()
                line |= {"seen": round(share, 4), "seen_before": round(share_before, 4), "accepted": share >= args.seen}
                folder = args.out if line["accepted"] else args.out / "rejected"
                Image.fromarray(image).save(folder / "images" / line["image"])
                save_mask(edit["mask"], folder / "masks" / line["image"], colorbook)
                lines.append(line)
                bar.update(line["accepted"])
            bar.set_postfix(rejected=f"{1 - np.mean([line['accepted'] for line in lines]):.0%}")
            write(file, "".join(json.dumps(line) + "\n" for line in lines))
    figures = report(lines, shapes, left_out, pairs, segment, args.seen)
    draw_sheet(lines, args.out, pairs, segment).save(args.out / "sheet.png")
    write(args.out / "report.json", json.dumps(figures, indent=1))
    accepted = sum(line["accepted"] for line in lines)
    print(f"{args.out}: {accepted} images of {args.n}, side by side with their masks in {args.out / 'sheet.png'}")
    if accepted < args.n:
        print(f"the rest was rejected, {args.tries} edits for each image that was wanted: more --tries, a lower "
              "--seen, a better judge or a better generator would give more")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--root", type=Path, required=True, help="a prepared data set; only its train split is read")
    add("--checkpoint", type=Path, required=True, help="a generator trained on these classes")
    add("--classes", required=True, metavar="CLASS,...", help="what is put into the images, as many of each")
    add("--judge", required=True, help="a segmenter, as evaluate.py --segmenter takes it; leaves images out")
    add("--n", type=int, default=1000, help="images to be accepted; default: %(default)s")
    add("--tries", type=int, default=4, help="edits for each of them at most; default: %(default)s")
    add("--seen", type=float, default=0.25, help="an image is accepted where the judge sees the class in this share of "
        "the new thing's pixels; 0 accepts all; default: %(default)s")
    add("--least", type=int, default=12, help="pixels of the smallest shape; default: %(default)s")
    add("--seed", type=int, default=1, help="of the first edit; default: %(default)s")
    add("--out", type=Path, default=Path("enriched"), help="default: %(default)s")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the samples: sample.steps=50; "
        "default: the checkpoint's, with ddim and eta 1")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    return parser


def main():
    command(run, make_parser().parse_args())


if __name__ == "__main__":
    main()
