"""Letters that are asked for (seed 004, 4.4): a small U-Net of labels, trained on the letters of this machine's fonts.

    apt-get install fonts-aenigma fonts-lato fonts-freefont-ttf fonts-roboto-unhinted     on Debian: 500 fonts
    python -m experiments.labels                                              the fonts of this machine: 30 minutes
    python -m experiments.labels --fonts my_fonts --minutes 3 --n 4 --ddpm-n 2 --run runs/labels_small    8 minutes
    torchrun --nproc_per_node=2 -m -- experiments.labels                      trained by two processes, on GPUs or cores

Renders A to Z of every font, 32x32 and grey; fonts whose names begin with the same word are one design, and designs are
shared out: 50 % to the generator, 30 % to a reader, which scores, 20 % to neither, which the samples are compared with.
Designs of different names can look alike, so what is measured on "other" fonts is a little optimistic. Trains both,
then asks for each letter at guidance 1, 2, 5 and 15, by PLMS in 50 steps; and for some of each by all 1000 steps of
DDPM, from the same seeds as PLMS, for time and quality. Prints a table, what its columns are, and writes them to
report.md, the rows to results.json, and letters.png, A to Z in a row for each way. Minutes are those of two CPU cores.
Ctrl-C loses nothing: the same command goes on.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from benchmarks.timing import machine, table
from checkpoint import join_processes, pick_device, pick_precision
from config import command, load_config
from dataset import contact_sheet
from experiments.common import parse_count, parse_numbers, write_text
from experiments.label_unet import (BATCH, PARTS, SIZE, Labelled, as_shown, checksum, compare_features, draw_labels,
                                    open_results, run_jobs, share_with_interval, train_generator, train_reader,
                                    with_interval)
from experiments.training import go_on_alone

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FOLDERS = ["/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts",  # Linux
           "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts"]  # macOS, Windows
PLMS_STEPS = 50  # the seed's
LEAST = 10  # designs, of which two are held out: a variance needs two

COLUMNS = f"""\
read as asked: the share of the letters in which the reader, trained on other fonts, sees the letter that was asked for
own, all: Frechet distance, in the reader's features, to held-out letters of the same label, and to all held-out letters
variety: the variance of these features within a label, as a share of that of held-out letters
s for 15: 15 times the seconds of a letter, drawn in batches of {BATCH}; the seed has 40 for PLMS and 240 for DDPM
[ ]: Wilson's 95 % interval of a share of letters; ±: the 95 % interval of a mean over the 26 labels
Both are for other letters of the same two networks: each was trained once, and another training would differ more
own fonts: letters that the generator was trained on, which a perfect one would be like
fewer: the first of those letters, which have the seeds of those by DDPM"""

# ------------------------------------------------------------------------------------------------------- letters


def render(path):
    """The first word of a font's name, and its A to Z, (26, 32, 32, 1) uint8, black on white, centred.

    None for a font without these letters. OSError, or a ValueError, where FreeType cannot read or draw it.
    """
    font, shapes = ImageFont.truetype(path, 2 * SIZE), []
    for letter in LETTERS:
        canvas = Image.new("L", (8 * SIZE, 8 * SIZE))
        ImageDraw.Draw(canvas).text((4 * SIZE, 4 * SIZE), letter, "white", font, anchor="mm")
        ink = canvas.getbbox()
        if ink is None:
            return None
        shapes.append(canvas.crop(ink))
    if len({shape.tobytes() for shape in shapes}) < len(LETTERS):  # a font of another script has one box for all
        return None
    scale, images = (SIZE - 4) / max(max(shape.size) for shape in shapes), []
    for shape in shapes:
        shape = ImageOps.invert(shape.resize([max(1, round(scale * side)) for side in shape.size]))
        image = Image.new("L", (SIZE, SIZE), "white")
        image.paste(shape, ((SIZE - shape.width) // 2, (SIZE - shape.height) // 2))
        images.append(np.array(image)[..., None])
    words = (font.getname()[0] or "").split() or [path.stem]
    return words[0], np.stack(images)


def read_fonts(folders):
    """{design: (N, 26, 32, 32, 1)} of the font files in folders; a design is the first word of a font's name.

    ValueError where fewer than 10 designs have letters, with where fonts come from.
    """
    folders = [Path(folder).expanduser() for folder in folders]
    files = []
    for folder in folders:
        files += sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf", ".ttc"))
    designs, unusable = {}, []
    for path in tqdm(files, "fonts", unit="font", leave=False):
        try:
            rendered = render(path)
        except (OSError, ValueError):
            rendered = None
        if rendered:
            design, letters = rendered
            designs.setdefault(design, []).append(letters)
        else:
            unusable.append(path.name)
    count = sum(map(len, designs.values()))
    print(f"{count} fonts of {len(designs)} designs; {len(unusable)} without letters: "
          + ", ".join(unusable[:5]) + " ..." * (len(unusable) > 5))
    if len(designs) < LEAST:
        where = ", ".join(map(str, folders)) or "this system"
        raise ValueError(f"{where}: {len(files)} font files (.ttf, .otf, .ttc) with letters of {len(designs)} designs; "
                         f"expected {LEAST} designs or more. Name a folder with fonts by --fonts, or install some: on "
                         "Debian, apt-get install fonts-aenigma fonts-lato fonts-freefont-ttf fonts-roboto-unhinted")
    return {design: np.stack(fonts) for design, fonts in sorted(designs.items())}


def share_out(designs):
    """Labelled letters of 50, 30 and 20 % of the designs: for the generator, for the reader, and held out."""
    names = np.random.default_rng(0).permutation(list(designs))
    parts = []
    for chosen in np.split(names, [len(names) * 5 // 10, len(names) * 8 // 10]):
        fonts = np.concatenate([designs[name] for name in chosen])
        parts.append(Labelled(fonts.reshape(-1, SIZE, SIZE, 1), np.tile(np.arange(26), len(fonts))))
    return parts


# ----------------------------------------------------------------------------------------------------- the study


def run_study(args):
    if not 2 <= args.ddpm_n <= args.n:
        raise ValueError(f"--n is {args.n} and --ddpm-n {args.ddpm_n}: a variance within a letter needs 2 or more, and "
                         "those of DDPM are compared with as many of the others")
    # the seed flipped letters at random, and some of its samples are mirrored; it dropped a fifth of the labels
    own = ["data.flip=0", "model.hidden_dim=16", "train.label_drop=0.2", "train.batch_size=32", "train.steps=5000",
           "train.previews=26"]
    # a preset that leaves the training as config.yaml has it, where toy would change it; its data play no part here
    cfg = load_config(preset="idd_lite", overrides=own + args.set)
    device = pick_device(cfg["device"])
    join_processes(device)
    folders = [args.fonts] if args.fonts else [folder for folder in FOLDERS if Path(folder).expanduser().is_dir()]
    letters, for_reader, held_out = share_out(read_fonts(folders))
    print(f"{len(letters)} letters for the generator, {len(for_reader)} for the reader, {len(held_out)} held out")
    precision = pick_precision(cfg["sample"]["precision"], device)
    results = open_results(args.run, {
        "n": args.n, "ddpm_n": args.ddpm_n, "seed": args.seed, "minutes": args.minutes, "precision": precision,
        "config": {part: cfg[part] for part in PARTS}, "held out": checksum(held_out)})

    model, diffusion = train_generator(cfg, letters, held_out, 26, args.run / "generator.pt", device, args.minutes)
    reader = train_reader(cfg, lambda planes: planes[:, -1, 0, 0].long(), 26, for_reader, held_out,
                          args.run / "reader.pt", device, args.minutes)
    go_on_alone()
    logits, real_features = reader.read(held_out.images)
    ceiling = share_with_interval(logits.argmax(dim=1) == held_out.labels)

    def own_letters():
        rows = np.random.default_rng(args.seed).permutation(len(letters) // 26)[:args.n]
        planes = letters.planes.view(-1, 26, *letters.planes.shape[1:])[rows]
        return torch.arange(26).repeat(len(rows)), planes[:, :, :1].flatten(0, 1).permute(0, 2, 3, 1).numpy(), None

    def draw(n, guidance, sampler):
        labels = torch.arange(26).repeat(n)
        return labels, *draw_labels(model, diffusion, labels, args.seed, guidance, sampler, PLMS_STEPS, precision)

    def measure(labels, images):
        logits, features = reader.read(Labelled(images, labels).images)
        found = compare_features(features, labels, real_features, held_out.labels)
        return {"read as asked": share_with_interval(logits.argmax(dim=1) == labels)} | {
            name: with_interval(values) for name, values in found.items()}

    jobs = {"own fonts": own_letters}
    jobs |= {f"PLMS {PLMS_STEPS}, w = {w:g}": partial(draw, args.n, w, "plms") for w in args.guidance}
    second = args.guidance[1] if len(args.guidance) > 1 else args.guidance[0]  # 2, as in the seed
    jobs[f"DDPM, w = {second:g}"] = partial(draw, args.ddpm_n, second, "ddpm")
    rows, images = run_jobs(args.run, results, jobs, measure)
    plms, labels = f"PLMS {PLMS_STEPS}, w = {second:g}", torch.arange(26).repeat(args.ddpm_n)
    fewer = measure(labels, images[plms][:len(labels)])  # of the seeds that DDPM has
    rows.insert(-1, {"images": f"{plms}, fewer", "n": len(labels)} | fewer | {"s for 15": "-"})
    report = (f"{machine(device)}\n\n{table(rows)}\n\nThe reader reads {ceiling} of the held-out letters.\n\n"
              f"{COLUMNS}\n")
    write_text(args.run / "report.md", report)
    print(report)
    contact_sheet([as_shown(drawn[:26]) for drawn in images.values()], least=48).save(args.run / "letters.png")
    print(f"\n{args.run / 'results.json'}, {args.run / 'letters.png'}: {'; '.join(images)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--fonts", type=Path, metavar="FOLDER", help="with .ttf, .otf or .ttc files; default: the system's")
    add("--run", type=Path, default=Path("runs/labels"), help="the folder of the run; default: %(default)s")
    add("--minutes", type=float, default=math.inf, help="at most, of training each of the two networks")
    add("--guidance", type=parse_numbers, default=[1.0, 2.0, 5.0, 15.0], metavar="W[,W...]", help="default: 1,2,5,15")
    add("--n", type=parse_count, default=32, help="samples of each letter at each guidance; default: %(default)s")
    add("--ddpm-n", type=parse_count, default=4, help="of each letter by DDPM, at the second guidance; "
        "default: %(default)s")
    add("--seed", type=int, default=1, help="of the first sample; default: %(default)s")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of config.yaml: model.hidden_dim=32")
    command(run_study, parser.parse_args())


if __name__ == "__main__":
    main()
