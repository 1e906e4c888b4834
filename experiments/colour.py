"""Colours of a street: a palette rides with the mask, to keep the colours of a real image, or to ask for others.

    python -m experiments.colour --preset toy --set train.steps=8000 --colour car=200,30,30
    python train.py --preset idd_lite --set train.steps=4000 --set out=runs/plain          a network without colours
    python -m experiments.colour --preset idd_lite --colour vehicles=200,30,30 --judge runs/judge/checkpoint.pt \\
        --plain runs/plain/checkpoint.pt
    python -m experiments.colour --checkpoint runs/colour_toy/colour.pt --mask my.png --colour car=200,30,30 \\
        --colour sky=250,150,80
    python -m experiments.colour --checkpoint runs/colour_toy/colour.pt --mask street_mask.png \\
        --like evening.png --like-mask evening_mask.png

The first and third train a network (4000 steps by default), measure it on masks of test and draw a sheet. On two CPU
cores with bf16 the toy takes 20 minutes, IDD-Lite 35, after 27 for --plain; estimates, from 40 training images a
second. Ctrl-C loses nothing: the same command goes on. With --checkpoint it draws images, at half a second each: of the
palette of a real image and its mask (--like: its own one keeps its colours, any other lends them), of single colours
(--colour, which goes before --like), or of none. All into --out. The colour of a class is its mean, windows, wheels and
shade included: a red car's is no full red.

The table has a row for each guidance w and source of colours: none, the mask's own real image, another real image,
--colour, and the network --plain. Masks and seeds are the same in all; [low, high] is 95 % over masks:
  distance         from the colour asked for of a class to its mean colour in the generated image, in CIE-LAB (2.3 can
                   just be seen); mean over the classes that cover half a percent of the mask or more, then over masks
  without colours  the same of images of the same masks and seeds for which no colours were given
  closer by        the second less the first, of each mask
  real image       the same of the masks' own images: how far from home the colours asked for are
  pixel accuracy, mean IoU, share of the ceiling, Frechet distance, its floor: as in evaluate.py. Is the mask still
                   obeyed? A judge that never saw a red sky may take it for a bus
"""

import argparse
import difflib
import itertools
import math
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from skimage.color import rgb2lab

from benchmarks.timing import table
from checkpoint import join_processes, load_checkpoint, pick_device, pick_precision
from config import add_config_arguments, command, load_config
from dataset import Pairs, contact_sheet, fit_pair, read_image, to_uint8, unpack
from ddpm import Diffusion, noise_like_seeds
from evaluate import mean_of, resample
from experiments.common import parse_count, parse_numbers
from experiments.drawing import (DPM_SOLVER, Results, draw_images, draw_jobs, draw_missing, interval, load_judge,
                                 make_judge)
from experiments.training import fit, go_on_alone, make_loader, read, spread
from masks import Colorbook, one_hot, read_mask
from sample import file_of, load_network, plan, read_masks
from train import read_data
from unet import UNet

TRAIN_STEPS = 4000  # unless --set train.steps says otherwise
STEPS = 20  # of DPM-Solver++
LEAST = 0.005  # share of the mask that a class must cover to be measured: a few pixels have no colour of their own

# ------------------------------------------------------------------------------------------------------ palettes
# A palette is colours (B, K, 3) in [-1, 1], as images are, and given (B, K) bool: which classes have one.


def class_means(x, mask):
    """The palette of images x (B, 3, H, W) with masks (B, K, H, W): each class's mean colour, and which are there."""
    pixels = mask.sum(dim=(2, 3))
    return torch.einsum("bchw,bkhw->bkc", x, mask) / pixels.clamp(min=1)[..., None], pixels > 0


def condition_planes(mask, colours, given):
    """The network's condition (B, K + 3, H, W): the mask, and three planes that have each class's colour in its pixels.

    A colour goes from 0.5 (black) to 1.5 (white), and what is not given is 0, so that nothing and black differ as much
    as black and mid-grey do, and the planes are about as large as those of the mask.
    """
    shifted = (1 + colours / 2) * given[..., None]
    return torch.cat([mask, torch.einsum("bkhw,bkc->bchw", mask, shifted)], dim=1)


def drop_colours(given):
    """given (B, K) as the network is trained on: a quarter of the images have no colours, a quarter all of theirs, and
    the others a share of them drawn evenly, so that one may ask for the colour of a single class.
    """
    share = (2 * torch.rand(len(given), 1, device=given.device) - 0.5).clamp(0, 1)
    return given & (torch.rand(given.shape, device=given.device) < share)


def parse_colour(text):
    """ "car=200,30,30" to ("car", [200, 30, 30])."""
    name, _, values = text.rpartition("=")
    try:
        rgb = [int(value) for value in values.split(",")]
    except ValueError:
        rgb = []
    if not name or len(rgb) != 3 or not all(0 <= value <= 255 for value in rgb):
        raise argparse.ArgumentTypeError(f"expected CLASS=R,G,B, 0..255 each, such as car=200,30,30, got {text!r}")
    return name, rgb


def set_colours(named, colorbook, colours, given):
    """Put the colours [(class name, [r, g, b])] into a palette (K, 3), (K,). ValueError for an unknown class."""
    for name, rgb in named:
        if name not in colorbook.names:
            nearest = difflib.get_close_matches(name, colorbook.names, 1, 0)[0]
            raise ValueError(f"--colour {name}: no class of {colorbook.source}; the nearest is {nearest!r}, and there "
                             f"are {', '.join(colorbook.names)}")
        k = colorbook.names.index(name)
        colours[k], given[k] = torch.tensor(rgb) / 127.5 - 1, True


def lab_distances(images, mask, colours, asked):
    """Distances in CIE-LAB of each class's mean colour in images (N, H, W, 3) uint8 to colours (N, K, 3): (N,) float64.

    mask (N, K, H, W), asked (N, K) bool. The mean over the classes of an image that are asked for and cover LEAST of
    its mask; NaN where there are none.
    """
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    found = class_means(x, mask)[0]
    lab, wanted = (rgb2lab((palette.double().numpy() + 1) / 2) for palette in (found, colours))
    distance = torch.from_numpy(np.linalg.norm(lab - wanted, axis=-1))
    measured = asked & (mask.mean(dim=(2, 3)) >= LEAST)
    return torch.where(measured, distance, torch.nan).nanmean(dim=1)


def paint_palette(ids, colours, given):
    """Ids (H, W) with the colours (K, 3) of a palette, light grey where there is none: (H, W, 3) uint8."""
    shown = np.full((256, 3), 225, np.uint8)
    k = torch.nonzero(given).flatten()
    shown[k] = ((colours[k] + 1) * 127.5).round().byte().numpy()
    return shown[ids]


# ----------------------------------------------------------------------------------------- training and sampling


def train_network(cfg, pairs, held_out, file, device, minutes):
    """Train a network of masks and palettes on pairs; returns it with its averaged weights."""
    m, c, K = cfg["model"], cfg["train"], len(pairs.colorbook)
    torch.manual_seed(cfg["seed"])
    about = {"kind": "colour", "size": list(pairs.size), "classes": pairs.colorbook.classes,
             "network": [K + 3, m["hidden_dim"], m["emb_dim"], m["attention"]], "diffusion": cfg["diffusion"]}
    model = UNet(*about["network"]).to(device, memory_format=torch.channels_last)
    nn.init.zeros_(model.out.weight)  # as in train.py: begin with the prediction 0
    nn.init.zeros_(model.out.bias)
    diffusion = Diffusion(**cfg["diffusion"]).to(device)
    n = min(c["val_pairs"], len(held_out))
    val_planes = held_out.planes[torch.linspace(0, len(held_out) - 1, n).long()]
    val_t = spread(n, diffusion.T).long()
    val_noise = noise_like_seeds(range(n), (3, *pairs.size))()

    def loss(net, planes):
        x0, mask = unpack(planes, K)
        colours, given = class_means(x0, mask)
        t, eps, keep = diffusion.draw(x0.shape, c["label_drop"], device)  # keep: mask and colours together
        return diffusion.loss(net, x0, condition_planes(mask, colours, drop_colours(given)), t, eps, keep)

    @torch.no_grad()
    def validate(net):
        sums = {"val_eps with colours": 0.0, "val_eps without colours": 0.0}
        for part in zip(*(x.to(device).split(c["batch_size"]) for x in (val_planes, val_t, val_noise))):
            planes, t, eps = part
            x0, mask = unpack(planes, K)
            colours, given = class_means(x0, mask)
            for name, asked in zip(sums, (given, torch.zeros_like(given))):
                condition = condition_planes(mask, colours, asked)
                sums[name] += diffusion.errors(net, x0, condition, t, eps)[1].sum().item()
        return {name: total / n for name, total in sums.items()}

    @torch.no_grad()
    def preview(net):
        shown = val_planes[torch.linspace(0, n - 1, min(c["previews"], n)).round().long()]
        x0, mask = unpack(shown, K)
        colours, given = class_means(x0, mask)
        rows = [[pairs.colorbook.paint(ids) for ids in shown[:, 3].numpy()], to_uint8(x0)]
        for asked in (given, torch.zeros_like(given)):
            condition = condition_planes(mask, colours, asked).to(device)
            rows.append(draw_images(net, diffusion, condition, range(len(shown)), cfg["sample"]["guidance"],
                                    min(STEPS, diffusion.T)))
        return contact_sheet(rows)

    return fit(model, loss, make_loader(cfg, pairs, device), c, file, device, about, validate, preview, minutes)


# ----------------------------------------------------------------------------------------------------- the study


def distance_columns(images, none, real, mask, colours, asked):
    """The columns of distances: with the colours, without, the difference, of the real images; how many masks."""
    distance, without, home = (lab_distances(shown, mask, colours, asked) for shown in (images, none, real))
    measured = ~distance.isnan()  # the same masks in all three
    counts, _ = resample(len(real), len(real), None)
    columns = {"masks": int(measured.sum())}
    for title, values in (("distance", distance), ("without colours", without), ("closer by", without - distance),
                          ("real image", home)):
        columns[title] = interval(mean_of(values[measured], counts[:, measured])) if measured.any() else "-"
    return columns


def sources_of_colours(args, x0, mask, colorbook):
    """{source: (colours (N, K, 3), asked (N, K) bool)} for images x0 (N, 3, H, W) of test and their masks."""
    colours, own = class_means(x0, mask)
    half = len(x0) // 2  # files are named by their drive: half the set away is another one
    sources = {"none": (colours, torch.zeros_like(own)), "own": (colours, own),
               "another image": (colours.roll(half, 0), own & own.roll(half, 0))}
    if args.colour:
        single, named = torch.zeros(len(colorbook), 3), torch.zeros(len(colorbook), dtype=torch.bool)
        set_colours(args.colour, colorbook, single, named)
        sources["single"] = (single.expand_as(colours), named & own)
    return sources


def load_plain(path, colorbook, size, device):
    """The checkpoint of a network without colours, the network and its diffusion. ValueError for other classes, sizes.
    """
    state = load_checkpoint(path)
    same_classes = list(state["colorbook"].items()) == list(colorbook.classes.items())  # their order is the ids
    if not same_classes or tuple(state["config"]["data"]["size"]) != size:
        raise ValueError(f"{path}: other classes or another size than {colorbook.source} at {size[0]}x{size[1]}")
    _, net, diffusion, _ = load_network(state, {"precision": "auto", "device": device})
    return state, net, diffusion


def draw_conditions(net, diffusion, condition, first_seed, steps, device, ids, seeds, guidance):
    """draw() of draw_missing(): the image of seed s has row s - first_seed of the condition planes (N, C, H, W)."""
    rows = condition[[seed - first_seed for seed in seeds]].to(device)
    return draw_images(net, diffusion, rows, seeds, guidance, steps)


def study(args):
    """Train, draw masks of test with every source of colours, measure, and draw the sheet."""
    cfg = load_config(args.config, args.preset, [f"train.steps={TRAIN_STEPS}", *args.set])
    device, out = pick_device(cfg["device"]), args.out or Path(f"runs/colour_{Path(cfg['out']).name}")
    pairs, held_out = read_data(cfg, *join_processes(device), dry_run=False)
    test, colorbook = Pairs(cfg["data"]["root"], "test", pairs.size), pairs.colorbook
    segment = load_judge(args.judge, colorbook, pairs.size, device)
    chosen = torch.linspace(0, len(test) - 1, min(args.masks, len(test))).round().long()
    x0, mask = unpack(test.planes[chosen], len(colorbook))
    sources = sources_of_colours(args, x0, mask, colorbook)
    plain = load_plain(args.plain, colorbook, pairs.size, device) if args.plain else None
    net = train_network(cfg, pairs, held_out, out / "colour.pt", device, args.minutes)
    go_on_alone()
    state = read(out / "colour.pt", "colour") | {"path": out / "colour.pt"}
    networks = dict.fromkeys(sources, (state, net, Diffusion(**cfg["diffusion"]).to(device)))
    if plain:
        sources["plain"], networks["plain"] = sources["none"], plain

    masks = {test.files[i][0]: test.planes[i, 3].numpy() for i in chosen}
    real, ids = to_uint8(x0), test.planes[chosen, 3].numpy()
    judge = None
    if segment:
        judge = make_judge(segment, ids, real, pairs.planes[:, :3].permute(0, 2, 3, 1).numpy(), colorbook.names)
    precision = pick_precision(cfg["sample"]["precision"], device)
    results, names, images = Results(out / "results.json"), [], {}
    for w, source in itertools.product(args.guidance, sources):
        (colours, asked), (state, network, process) = sources[source], networks[source]
        settings = DPM_SOLVER | {"mask": test.folder / "masks", "n": 1, "seed": args.seed, "guidances": [w],
                                 "steps": args.steps, "precision": precision}
        palette = (colours * asked[..., None]).numpy().tobytes() + asked.numpy().tobytes()
        jobs = [job | {"colours": source, "colours_crc32": zlib.crc32(palette)} for job in plan(state, settings, masks)]
        names.append(f"{source}, w = {w:g}")
        row = results.begin(names[-1], jobs[0] | {"masks": len(masks), "judge": args.judge})
        condition = mask if source == "plain" else condition_planes(mask, colours, asked)
        draw = partial(draw_conditions, network, process, condition, args.seed, args.steps, device)
        folder = out / "images" / source.replace(" ", "_")
        draw_missing(jobs, masks, draw, folder, device)
        images[source] = np.stack([read_image(file_of(job, folder)) for job in jobs])
        if "columns" not in row:
            distances = distance_columns(images[source], images["none"], real, mask, colours, asked)
            judged = judge(images[source]) if judge else {}
            row["columns"] = {"colours": source, "w": f"{w:g}"} | distances | judged
            results.save()
    print(f"{len(real)} masks of {test.folder}\n\n{table([results.rows[name]['columns'] for name in names])}\n")
    for source in ("own", "plain") if plain else ("own",):
        state, network, _ = networks[source]
        print(f"{state['path']}: {state['step']} steps, {sum(p.numel() for p in network.parameters()):,} parameters")
    print("own and another image are told colours of the test images, single one of yours: their Frechet distance does "
          "not compare with that of none and plain")
    draw_study(sources, images, real, ids, colorbook).save(out / "sheet.png")
    print(f"{results.file}, {out / 'sheet.png'}: masks and real images, then for each source the colours and, at w = "
          f"{w:g}, the images")


def draw_study(sources, images, real, ids, colorbook):
    """Eight masks and their real images; below them, for every source, the palette and the generated image."""
    shown = np.linspace(0, len(real) - 1, min(8, len(real))).round().astype(int)
    rows = [[colorbook.paint(ids[i]) for i in shown], [real[i] for i in shown]]
    for name, (colours, asked) in sources.items():
        if asked.any():
            rows.append([paint_palette(ids[i], colours[i], asked[i]) for i in shown])
        rows.append([images[name][i] for i in shown])
    return contact_sheet(rows)


# ------------------------------------------------------------------------------------------------- single images


def read_palette(args, colorbook, size):
    """The palette (K, 3), (K,) that --like and --colour ask for."""
    colours, given = torch.zeros(len(colorbook), 3), torch.zeros(len(colorbook), dtype=torch.bool)
    if bool(args.like) != bool(args.like_mask):
        raise ValueError("--like and --like-mask go together: an image, and the mask that tells its classes")
    if args.like:
        ids = read_mask(args.like_mask, colorbook)[0]
        image, ids = fit_pair(read_image(args.like), ids, size, None, f"{args.like} and {args.like_mask}")
        planes = torch.from_numpy(np.dstack([image, ids])).permute(2, 0, 1)
        of_image = class_means(*unpack(planes[None], len(colorbook)))
        colours, given = of_image[0][0], of_image[1][0]
    set_colours(args.colour, colorbook, colours, given)
    return colours, given


def draw_masks(args):
    """Images of --mask with the colours asked for, each with its settings, and sheet.png."""
    state, out, device = read(args.checkpoint, "colour"), args.out or Path("out_colour"), pick_device(args.device)
    about, colorbook = state["about"], Colorbook(state["about"]["classes"], args.checkpoint)
    size, K, diffusion = tuple(about["size"]), len(colorbook), Diffusion(**about["diffusion"]).to(device)
    masks = read_masks(args.mask, colorbook, size)
    colours, given = read_palette(args, colorbook, size)
    net = UNet(*about["network"])
    net.load_state_dict(state["ema"])
    net.to(device, memory_format=torch.channels_last).eval()

    @torch.no_grad()
    def draw(ids, seeds, w):
        palette = (x.to(device).expand(len(ids), *x.shape) for x in (colours, given))
        return draw_images(net, diffusion, condition_planes(one_hot(ids, K), *palette), seeds, w, args.steps)

    asked = {colorbook.names[k]: to_uint8(colours[k].view(1, 3, 1, 1)).flatten().tolist() for k in given.nonzero()}
    jobs = draw_jobs(args, state | {"path": args.checkpoint}, masks, colorbook, draw, out, device, {"colours": asked})
    images = np.stack([read_image(file_of(job, out)) for job in jobs])
    mask = one_hot(torch.stack([torch.from_numpy(masks[job["mask"]]) for job in jobs]), K)
    for k, (name, rgb) in zip(given.nonzero(), asked.items()):
        only = (torch.arange(K) == k).expand(len(jobs), -1)
        distance = lab_distances(images, mask, colours.expand(len(jobs), -1, -1), only)
        found = f"{distance.nanmean():.1f} from it in CIE-LAB" if (~distance.isnan()).any() else "in none of the masks"
        print(f"{name}: asked for {rgb}, {found}")


def run(args):
    if bool(args.checkpoint) != bool(args.mask):
        raise ValueError("--checkpoint and --mask go together, and draw images; without them a network is trained")
    if (args.like or args.like_mask) and not args.checkpoint:
        raise ValueError("--like takes the colours of an image to draw with: name a network with --checkpoint")
    (draw_masks if args.checkpoint else study)(args)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_config_arguments(parser)
    add("--colour", type=parse_colour, action="append", default=[], metavar="CLASS=R,G,B", help="repeat for several")
    add("--out", type=Path, help="default: runs/colour_<name of the data>; for images: out_colour")
    add("--minutes", type=float, default=math.inf, help="at most, of training in all")
    add("--masks", type=parse_count, default=64, help="of test, that are measured; default: %(default)s")
    add("--judge", help="a checkpoint of experiments.segmenter: is the mask obeyed?")
    add("--plain", help="a checkpoint of train.py for the same data, of as many steps, to stand beside")
    add("--checkpoint", help="a colour.pt to draw with")
    add("--mask", help="a mask file, or a folder of them")
    add("--like", help="the image whose colours to take")
    add("--like-mask", help="its mask")
    add("--n", type=parse_count, default=4, help="images per mask; default: %(default)s")
    add("--seed", type=int, default=1, help="of the first image; default: %(default)s")
    add("--guidance", type=parse_numbers, default=[1.0, 2.0], metavar="W[,W...]",
        help="1 keeps the colours of an image best; single ones far from it need 2 or 3; default: 1,2")
    add("--steps", type=parse_count, default=STEPS, help="of DPM-Solver++; default: %(default)s")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"], help="with --checkpoint")
    command(run, parser.parse_args())


if __name__ == "__main__":
    main()
