"""Enrich a data set: real images in which things of rare classes are new, with masks that are exact by construction.

    python -m experiments.segmenter --root data/idd_lite/prepared --balance --out runs/judge_rare
    python -m experiments.enrich --root data/idd_lite/prepared --checkpoint runs/idd_lite/checkpoint.pt \\
        --classes "living things,vehicles" --judge runs/judge_rare/checkpoint.pt --n 1000 --out enriched

Shapes of these classes are cut out of the train split's masks: connected regions that touch no edge of the image. Each
is put into another mask where such things stand: its foot comes to a row on which another shape of its class stands,
with the same class of ground under it, and its size follows the row as sizes do in the data. There the real image is
drawn anew (as by sample.py --image), and the rest keeps its pixels. Images in which the judge does not see the new
thing go to rejected/. Their rate is printed beside two that tell what the judge is worth: of the real shapes in which
it does not see the class either, which flatters one that was trained on these images, as this one was; and of the
places in which it saw the class before anything was there. A judge that leaves images out must not score as well.

OUT gets images/, masks/ and colorbook.json, as sample.py --as-dataset writes them; edits.jsonl, a line for each try:
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
from evaluate import in_batches
from experiments.drawing import load_judge
from masks import UNLABELLED, read_mask, save_mask

# gives an edit smoother surfaces
SAMPLER = ["--set", "sample.sampler=ddim", "--set", "sample.steps=20", "--set", "sample.eta=1"]

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


def cut_classes(pairs, names, least):
    """{name: shapes} of cut_shapes(), printed. A class may have none; ValueError where all have none."""
    ids, shapes, rare = pairs.planes[:, 3].numpy(), {}, [pairs.colorbook.names.index(name) for name in names]
    for name, k in zip(names, rare):
        shapes[name], left_out = cut_shapes(ids, k, rare, least)
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"
        print(f"{len(shapes[name])} shapes of {name}; left out: {reasons}")
        if not shapes[name]:
            print(f"no shape of {name} can be put elsewhere: the class is skipped")
    if not any(shapes.values()):
        raise ValueError(f"{pairs.folder}: no shape of {', '.join(names)} can be put elsewhere (the last: {reasons}); "
                         "name other --classes, or lower --least")
    return shapes


def growth(shapes):
    """b of height = a exp(b row), fitted to the shapes and the rows that they stand on; 0 where these are too few."""
    rows = [shape["box"][2] for shape in shapes]
    heights = [shape["mask"].shape[0] for shape in shapes]
    return float(np.polyfit(rows, np.log(heights), 1)[0]) if len(set(rows)) > 2 else 0.0


def free_columns(shape, ids, row, ground, rare):
    """The columns of ids (H, W) at which shape (h, w) bool may stand on `row`.

    The class `ground` is beneath all pixels of its lowest row, and it hides no pixel of the classes `rare`. A shape
    without a pixel in its lowest row, as resizing leaves some, would float: there is no column for it.
    """
    h, w = shape.shape
    if row < h or w > ids.shape[1] or not shape[-1].any():
        return np.array([], int)
    windows = sliding_window_view(ids[row - h : row + 1], (h + 1, w))[0]  # (columns, h + 1, w)
    stands = (windows[:, -1, shape[-1]] == ground).all(axis=1)
    hides = np.isin(windows[:, :-1][:, shape], rare).any(axis=1)
    return np.flatnonzero(stands & ~hides)


def find_place(shapes, slope, ids, rare, least, rng):
    """A dict: one of the shapes; scene, the number of another mask; the box there; mask (h, w), the shape in its size.

    None where 2000 draws fit nowhere.
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
    return None


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


def plan_edits(classes, first, pairs, shapes, least, s):
    """A try for each of these classes, numbered from `first`: its line for edits.jsonl, and {file: edit}.

    An edit is prepare_edit()'s dict, with scene, the number of its pair, and new (H, W) bool, the pixels of the shape.
    A line without "image" has found no place.
    """
    ids, names = pairs.planes[:, 3].numpy(), pairs.colorbook.names
    rare = [names.index(name) for name in shapes]
    lines, edits = [], {}
    for number, name in enumerate(classes, first):
        line = {"class": name, "seed": s["seed"] + number, "accepted": False}
        lines.append(line)
        rng = np.random.default_rng(line["seed"])
        place = find_place(shapes[name], growth(shapes[name]), ids, rare, least, rng)
        if place is None:
            continue
        shape, scene = place["shape"], place["scene"]
        new = np.zeros(ids.shape[1:], bool)
        new[rows_and_columns(place["box"])] = place["mask"]
        mask = np.where(new, np.uint8(names.index(name)), ids[scene])
        image = pairs.planes[scene, :3].permute(1, 2, 0).numpy()
        line["image"] = f"edit_{number:05}.png"
        line["shape"] = {"from": pairs.files[shape["source"]][0], "box": list(shape["box"])}
        line["place"] = {"in": pairs.files[scene][0], "box": place["box"], "on": names[shape["ground"]]}
        edits[line["image"]] = prepare_edit(image, mask, new, s["size"]) | {"scene": scene, "new": new}
    return lines, edits


def draw_edits(lines, edits, network, s):
    """{file: image} of the edits of plan_edits(); network: (model, diffusion, autocast)."""
    model, diffusion, autocast = network
    ids = {file: edit["ids"] for file, edit in edits.items()}
    jobs = [{"mask": line["image"], "seed": line["seed"], "guidance": s["guidances"][0]} for line in lines]
    drawn = {}
    for batch, images in sample.sample_jobs(jobs, ids, model, diffusion, s, autocast, edits, show=False):
        drawn |= {job["mask"]: image for job, image in zip(batch, images)}
    return drawn


def judge_edits(lines, edits, drawn, names, segment, seen_in_real, threshold):
    """Write into the lines what the judge sees in the new things, and whether it accepts the image.

    seen_in_real (N, H, W): what it sees in the real images.
    """
    images = torch.from_numpy(np.stack([drawn[line["image"]] for line in lines])).permute(0, 3, 1, 2)
    for line, seen in zip(lines, segment(images).numpy()):
        edit, k = edits[line["image"]], names.index(line["class"])
        share = float((seen[edit["new"]] == k).mean())
        share_before = float((seen_in_real[edit["scene"]][edit["new"]] == k).mean())
        line |= {"seen": round(share, 4), "seen_before": round(share_before, 4), "accepted": share >= threshold}


def percent(value):
    return "-" if value is None else f"{value:.0%}"


def report(lines, shapes, names, seen_in_real, threshold):
    """{class: figures}, printed: how many shapes there were and edits were made, and what the judge saw.

    A rate of nothing is None.
    """
    figures, threshold = {}, max(threshold, 1e-6)  # with --seen 0 a class is seen in one pixel or more
    for name in shapes:
        tries = [line for line in lines if line["class"] == name]
        edits = [line for line in tries if "image" in line]
        unseen = []
        for shape in shapes[name]:
            seen = seen_in_real[shape["source"]][rows_and_columns(shape["box"])][shape["mask"]]
            unseen.append((seen == names.index(name)).mean() < threshold)
        accepted = [line["accepted"] for line in edits]
        rates = {"rejected": [not one for one in accepted], "real shapes unseen": unseen,
                 "seen before": [line["seen_before"] >= threshold for line in edits]}
        rates = {rate: float(np.mean(values)) if values else None for rate, values in rates.items()}
        figures[name] = {"shapes": len(shapes[name]), "no place": len(tries) - len(edits), "edits": len(edits),
                         "accepted": sum(accepted)} | rates
        print("{0}: {edits} edits with {shapes} shapes, {accepted} accepted; {no place} tries found no place. The "
              "judge does not see the class in {1} of the edits, nor in {2} of the real shapes; in {3} of the places "
              "it saw it before the edit".format(name, *map(percent, rates.values()), **figures[name]))
    return figures


def draw_sheet(lines, out, pairs, segment):
    """Up to eight accepted edits and four rejected ones: image and mask, the new ones, the judge's view."""
    stems, paint, rows = [stem for stem, *_ in pairs.files], pairs.colorbook.paint, []
    for folder, accepted, most in ((out, True, 8), (out / "rejected", False, 4)):
        edits = [line for line in lines if "image" in line and line["accepted"] == accepted]
        for i in np.linspace(0, len(edits) - 1, min(most, len(edits))).round().astype(int):
            planes = pairs.planes[stems.index(edits[i]["place"]["in"])].numpy()
            image = read_image(folder / "images" / edits[i]["image"])
            mask = read_mask(folder / "masks" / edits[i]["image"], pairs.colorbook)[0]
            seen = segment(torch.from_numpy(image).permute(2, 0, 1)[None])[0].numpy()
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


def read_inputs(args):
    """The train split as Pairs, the names of the classes, the judge, the checkpoint and the settings of its samples.

    ValueError where they do not go together.
    """
    words = ["--checkpoint", args.checkpoint, "--mask", args.root / "train" / "masks", "--seed", args.seed, "--out",
             args.out, "--device", args.device, *SAMPLER]
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
    return pairs, names, load_judge(args.judge, colorbook, pairs.size, s["device"]), state, s


def check_settings(file, settings):
    """Keep the settings in the file; ValueError where it has others."""
    begun = json.loads(file.read_text(encoding="utf-8")) if file.exists() else settings
    changed = [key for key in settings if begun.get(key) != settings[key]]
    if changed:
        raise ValueError(f"{file}: begun with another {', '.join(changed)}: choose another --out, or delete it")
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, json.dumps(settings, indent=1))


def begin(args, pairs, names, state, s):
    """The lines of edits.jsonl in the folder, which is begun or continued. ValueError where it holds something else."""
    settings = {"data_crc32": zlib.crc32(pairs.planes.numpy()), "classes": names, "n": args.n, "tries": args.tries,
                "seen": args.seen, "least": args.least, "judge": args.judge,
                "weights_crc32": zlib.crc32(state["ema"]["out.weight"].numpy()), "trained_steps": state["step"]}
    if Path(args.judge).is_file():  # else a Mask2Former's name
        settings["judge"] = f"crc32 {zlib.crc32(Path(args.judge).read_bytes())}"
    settings |= {key: s[key] for key in ("seed", "sampler", "steps", "eta", "guidance", "guidance_interval",
                                         "precision", "batch_size")}
    file = args.out / "settings.json"
    if not file.exists() and args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"{args.out} holds files, but no settings.json of this program: choose another --out")
    check_settings(file, settings)
    for folder in (args.out, args.out / "rejected"):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "masks").mkdir(exist_ok=True)
    pairs.colorbook.save(args.out / "colorbook.json")
    edits = args.out / "edits.jsonl"
    return [json.loads(line) for line in edits.read_text(encoding="utf-8").splitlines()] if edits.exists() else []


def write(path, text):
    with replacing(path) as file:
        file.write(text.encode())


def run(args):
    """From a prepared data set to an enriched split. ValueError or OSError for what the user can fix."""
    pairs, names, segment, state, s = read_inputs(args)
    shapes, classes = cut_classes(pairs, names, args.least), pairs.colorbook.names
    network = sample.load_network(state, s)[1:]
    out, lines = args.out, begin(args, pairs, names, state, s)
    if (out / "report.json").exists():
        print(f"{out}: finished already")
        return
    seen_in_real = in_batches(segment, pairs.planes[:, :3].permute(0, 2, 3, 1).numpy(), "judging real images").numpy()
    possible = [name for name in names if shapes[name]]
    with tqdm(total=args.n, initial=sum(line["accepted"] for line in lines), unit="image") as bar:
        while wanted := next_classes(lines, possible, args.n, args.tries, s["batch_size"]):
            tries, edits = plan_edits(wanted, len(lines), pairs, shapes, args.least, s)
            placed = [line for line in tries if "image" in line]
            if placed:
                drawn = draw_edits(placed, edits, network, s)
                judge_edits(placed, edits, drawn, classes, segment, seen_in_real, args.seen)
            for line in placed:
                file, folder = line["image"], out if line["accepted"] else out / "rejected"
                Image.fromarray(drawn[file]).save(folder / "images" / file)
                save_mask(edits[file]["mask"], folder / "masks" / file, pairs.colorbook)
            lines += tries
            write(out / "edits.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
            bar.update(sum(line["accepted"] for line in tries))
    figures = report(lines, shapes, classes, seen_in_real, args.seen)
    if any("image" in line for line in lines):
        draw_sheet(lines, out, pairs, segment).save(out / "sheet.png")
    write(out / "report.json", json.dumps(figures, indent=1))
    accepted = sum(line["accepted"] for line in lines)
    print(f"{out}: {accepted} images of {args.n}, side by side with their masks in sheet.png")
    if accepted < args.n:
        print(f"the rest was rejected or found no place, in {args.tries} tries for each: more --tries, a lower --seen, "
              "a better judge or a better generator would give more")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--root", type=Path, required=True, help="a prepared data set; only its train split is read")
    add("--checkpoint", type=Path, required=True, help="a generator trained on these classes")
    add("--classes", required=True, metavar="CLASS,...", help="what is put into the images, as many of each")
    add("--judge", required=True, help="a segmenter, as evaluate.py --segmenter takes it; leaves images out")
    add("--n", type=int, default=1000, help="images to be accepted; default: %(default)s")
    add("--tries", type=int, default=4, help="for each of them at most; default: %(default)s")
    add("--seen", type=float, default=0.25, help="an image is accepted where the judge sees the class in this share of "
        "the new thing's pixels; 0 accepts all; default: %(default)s")
    add("--least", type=int, default=12, help="pixels of the smallest shape; default: %(default)s")
    add("--seed", type=int, default=1, help="of the first edit; default: %(default)s")
    add("--out", type=Path, default=Path("enriched"), help="default: %(default)s")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the samples: sample.steps=50; "
        "default: the checkpoint's, with 20 steps of ddim and eta 1")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    return parser


def main():
    command(run, make_parser().parse_args())


if __name__ == "__main__":
    main()
