"""Four times larger: a second diffusion model that enlarges images, and the whole way from a mask to 224x320.

    python -m data.idd_lite.prepare --source idd20k_lite --size 224x320 --out data/idd_lite/prepared_224x320
    python train.py --preset idd_lite --set data.root=data/idd_lite/prepared_224x320 --set data.size=[56,80] \\
        --set out=runs/idd_56x80                                            images of 56x80: 45 minutes
    python -m experiments.segmenter --root data/idd_lite/prepared_224x320 --scale 1 --lr 3e-3 --steps 1000 \\
        --batch-size 8 --arch lraspp_mobilenet_v3_large --out runs/judge_224x320         the judge: 30 minutes
    python -m experiments.upscale --judge runs/judge_224x320/checkpoint.pt  trains and measures: 60 and 50 minutes
    python -m experiments.upscale --mask my.png --n 4                       from a mask to 224x320: seconds an image
    python -m experiments.upscale --images out/                             enlarges the images of a folder
    python -m experiments.upscale --images out/ --mask masks/               the same, with the masks they were made of

The thesis (5.2.6) enlarged its images by a pretrained model of another domain and found no new detail; this one is
trained on the data itself. It is a cascade (Ho et al. 2021, SR3 of Saharia et al. 2021): our U-Net, to whose mask
planes the bicubic enlargement of the small image is added. What is diffused is what that enlargement lacks, as in
SRDiff (Li et al. 2021). In training the small image gets noise of a random level, which one more plane tells
(conditioning augmentation): generated images differ from real ones, and some noise hides in what. It trains on crops
and samples whole images, or overlapping --tile windows of them where memory is short, blended at every step.

The study writes evaluation/results.json, real.png and cascade.png in --run. The rows: held-out real images, shrunk and
enlarged again by two filters, by this network in one step (about the mean of all answers) and in --steps (one answer);
then the cascade from masks, with noise of several levels. The columns: PSNR and SSIM to the real image, Frechet
distance in the judge's features (and that of training images, its floor), what the judge segments as asked (mean IoU,
pixel accuracy) as a share of what it does in real images, seconds an image. Brackets are 95 % intervals over images.
Minutes are estimates for two CPU cores with bf16. Ctrl-C loses nothing: the same command goes on.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from benchmarks.timing import machine, table
from checkpoint import load_checkpoint, pick_device, pick_precision, replacing
from config import command, load_config
from data.common import parse_size
from dataset import batches, contact_sheet, fit, list_files, read_image, to_uint8, unpack
from ddpm import Diffusion, dpm_solver, guided_eps, noise_like_seeds
from evaluate import find_images, mask_of
from experiments.common import choose_masks, parse_count, read_report, run_program
from experiments.training import autocast, read
from experiments.training import fit as train
from masks import UNLABELLED, Colorbook, one_hot, read_mask
from sample import file_of, load_network, plan, read_masks, sample_jobs, save, settings_of
from train import read_data
from unet import UNet

SCALE = 4
HIGHEST = 0.25  # deviation of the noise that small images get in training, at most; images are in [-1, 1]
LEVELS = (0.0, 0.05, 0.1, 0.2)  # that the study tries on generated images
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "Lanczos": Image.Resampling.LANCZOS}
FLOOR = "Frechet distance, segmenter features, floor"
NUMBERS = {"SSIM": "SSIM", "Frechet distance": "Frechet distance, segmenter features",
           "share of mean IoU": "share of the ceiling: mean IoU",
           "share of accuracy": "share of the ceiling: pixel accuracy"}  # columns, and evaluate.py's names

# -------------------------------------------------------------------------------------------------- the model


def shrink(images):
    """Images (B, 3, H, W) uint8 to small ones (B, 3, H/4, W/4) in [-1, 1], of 8 bits as in a file."""
    size = [side // SCALE for side in images.shape[2:]]
    small = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
    return small.round().clamp(0, 255) / 127.5 - 1


def enlarge(small):
    """Small images (B, 3, h, w) four times larger, by the bicubic filter that PIL has; antialias=True selects it."""
    return F.interpolate(small, scale_factor=SCALE, mode="bicubic", antialias=True)


def make_condition(small, mask, level, noise):
    """What the network is told, (B, 4 + K, H, W): three planes of the enlarged small image, its noise level, the mask.

    small (B, 3, h, w) in [-1, 1] gets noise (like it) of deviation level (B,); mask (B, K, H, W) is one-hot, or all
    zero where it is not known.
    """
    level = level.view(-1, 1, 1, 1)
    plane = (level / HIGHEST).expand(-1, 1, *mask.shape[2:])
    return torch.cat([enlarge(small + level * noise), plane, mask], dim=1)


def cut_crops(planes, num_classes, crop, mask_drop):
    """Random crops of a batch of planes (B, 4, H, W) uint8: the images (B, 3, *crop) and what the network is told.

    The noise level is uniform from 0 to HIGHEST; with probability mask_drop a mask is left out.
    """
    x0, mask = unpack(planes, num_classes)
    B, (h, w), (H, W) = len(planes), crop, planes.shape[2:]
    small, draw = shrink(planes[:, :3]), torch.rand(2, B, device=planes.device)
    mask = mask * (draw[1] >= mask_drop).view(-1, 1, 1, 1)
    everything = torch.cat([x0, make_condition(small, mask, HIGHEST * draw[0], torch.randn_like(small))], dim=1)
    corners = zip(torch.randint(H - h + 1, (B,)).tolist(), torch.randint(W - w + 1, (B,)).tolist())
    crops = torch.stack([image[:, y : y + h, x : x + w] for image, (y, x) in zip(everything, corners)])
    return crops[:, :3], crops[:, 3:]


def in_tiles(make_eps_fn, condition, tile):
    """An eps_fn for whole images, computed in overlapping windows and blended (MultiDiffusion, Bar-Tal et al. 2023).

    make_eps_fn(condition) gives the eps_fn of a window of condition (B, C, H, W); tile is its height and width. They
    overlap by a quarter at least, and their weights fall to their edges. What an eps_fn of single pixels predicts is
    not changed by it.
    """
    sides = [min(n, side) for n, side in zip(tile, condition.shape[2:])]
    starts, ramps = [], []
    for n, length in zip(sides, condition.shape[2:]):
        count = math.ceil((length - n) / (0.75 * n)) + 1
        starts.append(np.linspace(0, length - n, count).round().astype(int).tolist())
        ramps.append((torch.arange(n) + 1).minimum(n - torch.arange(n)).clamp(max=n / 4))
    weight = (ramps[0][:, None] * ramps[1]).to(condition.device)
    windows = [(slice(y, y + sides[0]), slice(x, x + sides[1])) for y in starts[0] for x in starts[1]]
    eps_fns = [make_eps_fn(condition[..., rows, columns]) for rows, columns in windows]

    def eps_fn(x, t):
        total, weights = torch.zeros_like(x), torch.zeros_like(x[0, 0])
        for (rows, columns), eps_fn_of_window in zip(windows, eps_fns):
            total[..., rows, columns] += weight * eps_fn_of_window(x[..., rows, columns], t)
            weights[rows, columns] += weight
        return total / weights

    return eps_fn


@torch.no_grad()
def upscale(model, diffusion, deviation, small, mask, level, seeds, steps, tile=None):
    """Small images (B, 3, h, w) in [-1, 1] four times larger, likewise; mask (B, K, H, W) one-hot, zero if not known.

    deviation is that of what is diffused, level the noise that `small` gets first, a float; a seed for each image.
    """
    noise = noise_like_seeds([seed + 2**40 for seed in seeds], small.shape[1:], small.device)()  # not that of x
    condition = make_condition(small, mask, torch.full((len(small),), level, device=small.device), noise)

    def make_eps_fn(part):
        return guided_eps(model, diffusion, part, guidance=1.0)

    eps_fn = in_tiles(make_eps_fn, condition, tile) if tile else make_eps_fn(condition)
    x = noise_like_seeds(seeds, (3, *mask.shape[2:]), small.device)()
    x = dpm_solver(eps_fn, x, diffusion.alpha_bar, steps, clip=False)  # a difference of images has no bounds of its own
    return (condition[:, :3] + deviation * x).clamp(-1, 1)


# --------------------------------------------------------------------------------------------------- training


def train_upscaler(args, device):
    """Train, or go on with it; the network's checkpoint is upscale.pt in --run."""
    own = [f"data.root={args.root}", "train.batch_size=4", "train.val_pairs=32", "train.previews=4"]
    cfg = load_config(preset="idd_lite", overrides=[*own, "data.size=[224,320]", *args.set])
    pairs, held_out = read_data(cfg, 0, 1, dry_run=False)
    c, m, K, (H, W) = cfg["train"], cfg["model"], len(pairs.colorbook), pairs.size
    crop = H // 16 * 8, W // 16 * 8  # half of each side, a multiple of 8
    if min(crop) < 8:
        raise ValueError(f"data.size is {H}x{W}: expected 16x16 or more, since crops have half of each side")
    some = pairs.planes[torch.linspace(0, len(pairs) - 1, min(64, len(pairs))).long(), :3]
    deviation = round((some.float() / 127.5 - 1 - enlarge(shrink(some))).std().item(), 4)
    diffusion = Diffusion(**cfg["diffusion"]).to(device)
    torch.manual_seed(cfg["seed"])
    model = UNet(4 + K, m["hidden_dim"], m["emb_dim"], m["attention"]).to(device, memory_format=torch.channels_last)
    nn.init.zeros_(model.out.weight)  # as in train.py: begin with the prediction 0
    nn.init.zeros_(model.out.bias)

    def lacking(crops, condition):
        return (crops - condition[:, :3]) / deviation

    def loss(net, planes):
        crops, condition = cut_crops(planes, K, crop, c["label_drop"])
        t, eps, _ = diffusion.draw(crops.shape, 0.0, device)
        return diffusion.loss(net, lacking(crops, condition), condition, t, eps)

    chosen = torch.linspace(0, len(held_out) - 1, min(c["val_pairs"], len(held_out))).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fixed = cut_crops(held_out.planes[chosen], K, crop, 0.0)
        t = ((torch.randperm(len(chosen)) + 0.5) / len(chosen) * diffusion.T).long()
        fixed = [x.to(device).split(c["batch_size"]) for x in (*fixed, t, torch.randn_like(fixed[0]))]

    @torch.no_grad()
    def validate(net):
        losses = [diffusion.loss(net, lacking(crops, condition), condition, t, eps) * len(t)
                  for crops, condition, t, eps in zip(*fixed)]
        return {"val_loss": sum(losses).item() / len(chosen)}

    def preview(net):
        planes = held_out.planes[chosen[: c["previews"]]].to(device)
        small, mask = shrink(planes[:, :3]), unpack(planes, K)[1]
        larger = upscale(net, diffusion, deviation, small, mask, 0.0, range(len(planes)), min(10, diffusion.T))
        real = planes[:, :3].float() / 127.5 - 1
        return contact_sheet(list(zip(*(to_uint8(x) for x in (enlarge(small), larger, real)))), ["bicubic", "", "real"])

    about = {"kind": "upscale", "network": [4 + K, m["hidden_dim"], m["emb_dim"], m["attention"]],
             "diffusion": cfg["diffusion"], "deviation": deviation, "size": [H, W], "crop": list(crop),
             "classes": pairs.colorbook.classes}

    def load_batches(start):
        return batches(pairs, c["batch_size"], cfg["seed"], start, cfg["data"]["flip"], None, device)

    train(model, loss, load_batches, c, args.run / "upscale.pt", device, about, validate, preview)


# ----------------------------------------------------------------------------------------------------- images


def save_png(image, path, settings):
    """Write an image (H, W, 3) uint8 with its settings in it, as sample.py does."""
    text = PngInfo()
    text.add_text("settings", json.dumps(settings))
    with replacing(path) as png:
        Image.fromarray(image).save(png, "png", pnginfo=text)


def load_upscaler(run, device):
    """The network of a run as a function enlarge_one(image, ids, seed, level, steps, tile).

    image (h, w, 3) uint8 gives (4h, 4w, 3); ids is its mask, of any size, or None. Its `about` is what the network is
    built from, `told` what stands in each PNG. ValueError where the device's memory is too small.
    """
    state = read(run / "upscale.pt", "upscale")
    about = state["about"]
    model, diffusion = UNet(*about["network"]), Diffusion(**about["diffusion"]).to(device)
    model.load_state_dict(state["ema"])
    model.to(device, memory_format=torch.channels_last).eval()
    precision = pick_precision("auto", device)

    def enlarge_one(image, ids, seed, level, steps, tile):
        size = SCALE * image.shape[0], SCALE * image.shape[1]
        ids = np.full(size, UNLABELLED, np.uint8) if ids is None else fit(ids, size)
        mask = one_hot(torch.from_numpy(ids)[None].to(device), len(about["classes"]))
        small = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1
        try:
            with autocast(precision, device):
                x = upscale(model, diffusion, about["deviation"], small, mask, level, [seed], steps, tile)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"{size[0]}x{size[1]} does not fit into the device's memory: give a --tile, such as "
                             "{}x{}".format(*about["crop"])) from error
        return to_uint8(x)[0]

    enlarge_one.about, enlarge_one.told = about, {"trained_steps": state["step"], "precision": precision}
    return enlarge_one


def filter_one(image, ids, seed, name):
    """Like load_upscaler()'s function, by a filter."""
    return np.array(Image.fromarray(image).resize((SCALE * image.shape[1], SCALE * image.shape[0]), FILTERS[name]))


filter_one.told = {}


def enlarge_files(files, masks, out, seed, enlarge_one, **way):
    """Write out/<stem>.png for each small image {stem: path}, by a function such as load_upscaler() gives.

    masks {stem: ids} are of those that have one, seed is that of the first, way what else the function takes. What is
    there with the same settings stays. Returns seconds an image, None where all of them were there. ValueError: an
    image with an odd side.
    """
    out.mkdir(parents=True, exist_ok=True)
    started, made = time.monotonic(), 0
    for i, (stem, path) in enumerate(tqdm(files.items(), out.name, unit="image")):
        job = {"small": str(path), "mask": stem in masks, "seed": seed + i} | way | enlarge_one.told
        if settings_of(out / f"{stem}.png") != json.dumps(job):
            image = read_image(path)
            if image.shape[0] % 2 or image.shape[1] % 2:
                raise ValueError(f"{path} is {image.shape[0]}x{image.shape[1]}: expected even sides, since the network "
                                 "halves the large image three times")
            save_png(enlarge_one(image, masks.get(stem), seed + i, **way), out / f"{stem}.png", job)
            made += 1
    return (time.monotonic() - started) / made if made else None


def draw_small(args, path, out, n, colorbook, device):
    """n small images of each mask of `path` by the checkpoint --small: {stem: file}, {stem: mask}, seconds an image."""
    state = load_checkpoint(args.small)
    if state["colorbook"] != colorbook.classes:
        raise ValueError(f"{args.small}: its classes are {', '.join(state['colorbook'])}, those of the upscaler "
                         f"{', '.join(colorbook.names)}: train both on one data set")
    s, size = state["config"]["sample"], tuple(state["config"]["data"]["size"])
    s |= {"n": n, "seed": args.seed, "mask": str(path), "size": size, "guidances": [s["guidance"]], "device": device}
    masks = read_masks(path, colorbook, size)
    _, model, diffusion, cast = load_network(state, s)
    jobs, started = plan(state, s, masks), time.monotonic()
    todo = [job for job in jobs if settings_of(file_of(job, out)) != json.dumps(job)]
    out.mkdir(parents=True, exist_ok=True)
    for batch, images in sample_jobs(todo, masks, model, diffusion, s, cast):
        for job, image in zip(batch, images):
            save(job, image, out)
    seconds = (time.monotonic() - started) / len(todo) if todo else None
    large = read_masks(path, colorbook, tuple(SCALE * side for side in size))
    return ({file_of(job, out).stem: file_of(job, out) for job in jobs},
            {file_of(job, out).stem: large[job["mask"]] for job in jobs}, seconds)


def in_large_pixels(path):
    return read_image(path).repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def from_masks(args, device):
    """The whole way: small images of the masks, enlarged; and a sheet."""
    network = load_upscaler(args.run, device)
    colorbook = Colorbook(network.about["classes"], args.run / "upscale.pt")
    files, masks, of_small = draw_small(args, args.mask, args.out / "small", args.n, colorbook, device)
    of_large = enlarge_files(files, masks, args.out, args.seed, network, level=args.level, steps=args.steps,
                             tile=args.tile)
    rows = [[colorbook.paint(masks[stem]), in_large_pixels(path), read_image(args.out / f"{stem}.png")]
            for stem, path in list(files.items())[:50]]
    contact_sheet(rows, ["mask", "small", "four times larger"]).save(args.out / "sheet.png")
    print(f"{len(files)} images: {args.out}, side by side in {args.out / 'sheet.png'}. Seconds an image: "
          f"{of_small or 0:.1f} for the small one, {of_large or 0:.1f} for the large one")


def from_images(args, device):
    """Enlarge an image, or those of a folder; with --mask each has the mask whose name its own begins with."""
    if args.images.resolve() == args.out.resolve():
        raise ValueError(f"--out {args.out}: the small images are in it; choose another folder")
    network = load_upscaler(args.run, device)
    files, masks = find_images(args.images) if args.images.is_dir() else {args.images.stem: args.images}, {}
    if args.mask:
        colorbook = Colorbook(network.about["classes"], args.run / "upscale.pt")
        found = list_files(args.mask) if args.mask.is_dir() else {args.mask.stem: args.mask}
        of_image = {stem: found.get(mask_of(stem, found)) for stem in files}
        masks = {stem: read_mask(path, colorbook)[0] for stem, path in of_image.items() if path}
    seconds = enlarge_files(files, masks, args.out, args.seed, network, level=args.level, steps=args.steps,
                            tile=args.tile)
    print(f"{len(files)} images, {len(masks)} of them with a mask: {args.out}. {seconds or 0:.1f} seconds an image")


# -------------------------------------------------------------------------------------------------- the study


def shrink_files(folder, stems, size, out):
    """Write the images of these stems to `out`, four times smaller than `size`; {stem: image (*size, 3)} of the large.
    """
    out.mkdir(exist_ok=True)
    paths, real = list_files(folder), {}
    for stem in stems:
        real[stem] = fit(read_image(paths[stem]), size)
        small = shrink(torch.from_numpy(real[stem]).permute(2, 0, 1)[None])
        save_png(to_uint8(small)[0], out / f"{stem}.png", {})
    return real


def measure(folder, real, args, with_floor):
    """The columns of a row, PSNR to the real images {stem: image} and what evaluate.py says of a folder; the floor."""
    psnr = []
    for name, path in find_images(folder).items():
        error = np.square(read_image(path).astype(float) - real[mask_of(name, real)]).mean()
        psnr.append(10 * math.log10(255**2 / max(error, 1e-9)))
    split, report = Path(args.root, "test").absolute(), folder.with_name(f"report_{folder.name}")
    train_images = ["--train", split.with_name("train")] if with_floor else []  # it is the same for all rows
    run_program("evaluate.py", "--real", split, "--fake", folder, "--segmenter", args.judge, "--out", report,
                *train_images)
    numbers = json.loads((report / "report.json").read_text())["numbers"]
    of_psnr = {"PSNR": f"{np.mean(psnr):.2f} ± {1.96 * np.std(psnr) / len(psnr) ** 0.5:.2f}"}
    return of_psnr | read_report(report, NUMBERS), numbers.get(FLOOR, {}).get("value")


def study(args, device):
    """Train, then a row for each way to large images; rows that are in results.json stay."""
    train_upscaler(args, device)
    if not args.judge:
        return print("trained; --judge CHECKPOINT, of experiments.segmenter, measures it")
    network, out, split = load_upscaler(args.run, device), args.run / "evaluation", Path(args.root, "test")
    args.judge, size = args.judge.absolute(), tuple(network.about["size"])
    colorbook = Colorbook(network.about["classes"], args.run / "upscale.pt")
    settings = {key: str(getattr(args, key)) for key in ("judge", "small", "steps", "seed", "count")} | network.told
    file = out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {"settings": settings, "rows": {}}
    if results["settings"] != settings:
        raise ValueError(f"{file}: made with {results['settings']}, not {settings}: rename {out}, or delete it")

    of_real = choose_masks(split, out / "masks", colorbook, size, args.count)
    real = shrink_files(split / "images", of_real, size, out / "shrunk")
    small, masks, seconds_before = {"real": list_files(out / "shrunk")}, {"real": of_real}, {"real": 0.0}
    if args.small.exists():
        small["cascade"], masks["cascade"], seconds_before["cascade"] = draw_small(
            args, out / "masks", out / "generated", 1, colorbook, device)
    else:
        print(f"{args.small} is not there, so there are no rows of the cascade; train.py makes it (see --help)")

    ways = {}
    for kind in small:
        levels = {f"{args.steps} steps": 0.0} if kind == "real" else {f"noise {level:g}": level for level in LEVELS}
        ways |= {(kind, name): (filter_one, {"name": name}) for name in FILTERS}
        ways |= {(kind, name): (network, {"level": level, "steps": args.steps, "tile": None})
                 for name, level in levels.items()}
    ways["real", "1 step"] = network, {"level": 0.0, "steps": 1, "tile": None}
    ways["real", "in tiles"] = network, {"level": 0.0, "steps": args.steps, "tile": network.about["crop"]}
    folders = {(kind, way): out / f"{kind}_{way.replace(' ', '_')}" for kind, way in ways}
    for (kind, way), folder in folders.items():
        name, (enlarge_one, options) = f"{kind}, {way}", ways[kind, way]
        if name in results["rows"]:
            continue
        seconds = enlarge_files(small[kind], masks[kind], folder, args.seed, enlarge_one, **options)
        columns, floor = measure(folder, real, args, "floor" not in results)
        row, results["floor"] = {"way": name} | columns, results.get("floor", floor)
        if kind == "cascade":  # it is another street of the same mask
            row |= {"PSNR": "", "SSIM": ""}
        known = seconds is not None and seconds_before[kind] is not None  # not, where images were there before
        results["rows"][name] = row | {"s an image": seconds + seconds_before[kind] if known else ""}
        with replacing(file) as opened:
            opened.write(json.dumps(results, indent=1).encode())

    print(f"{len(real)} images of {split}, {machine(device)}\n\n{table(list(results['rows'].values()))}\n\n"
          f"The Frechet distance of as many training images is {results['floor']:.3f}")
    for kind, files in small.items():
        shown, rows = {way: folder for (of, way), folder in folders.items() if of == kind}, []
        for stem in list(files)[:: max(1, len(files) // 6)][:6]:
            larger = [read_image(folder / f"{stem}.png") for folder in shown.values()]
            mask = colorbook.paint(masks[kind][stem])
            rows.append([mask, in_large_pixels(files[stem]), *larger, real[mask_of(stem, real)]])
        contact_sheet(rows, ["mask", "small", *shown, "real"]).save(out / f"{kind}.png")
    print(f"{file}, and beside it {', '.join(f'{kind}.png' for kind in small)}")


def run(args):
    if args.level > HIGHEST or args.level < 0:
        raise ValueError(f"--level {args.level}: expected 0 to {HIGHEST}, what the network was trained with")
    if args.tile and (args.tile[0] % 8 or args.tile[1] % 8):
        raise ValueError("--tile {}x{}: expected multiples of 8".format(*args.tile))
    device = pick_device(args.device)
    if args.images:
        from_images(args, device)
    elif args.mask:
        from_masks(args, device)
    else:
        study(args, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--mask", type=Path, help="a mask, or a folder of them: the whole way; with --images, the masks of these")
    add("--images", type=Path, help="a small image, or a folder of them, to be enlarged")
    add("--run", type=Path, default=Path("runs/upscale"), help="folder of the training and study; default: %(default)s")
    add("--small", type=Path, default=Path("runs/idd_56x80/checkpoint.pt"),
        help="the checkpoint of train.py that makes the small images; default: %(default)s")
    add("--out", type=Path, default=Path("out/large"), help="of --mask and --images; default: %(default)s")
    add("--n", type=parse_count, default=4, help="images of each mask; default: %(default)s")
    add("--level", type=float, default=0.1, help="noise that small images of --mask and --images get first, from 0 to "
        f"{HIGHEST}: more hides more of their faults, and of their detail; default: %(default)s")
    add("--steps", type=parse_count, default=10, help="of DPM-Solver++; default: %(default)s")
    add("--tile", type=parse_size, metavar="HxW", help="overlapping windows of this size; default: whole images")
    add("--seed", type=int, default=1, help="of the first image; default: %(default)s")
    add("--root", default="data/idd_lite/prepared_224x320", help="the study: a prepared data set; default: %(default)s")
    add("--judge", type=Path, help="the study: a checkpoint of experiments.segmenter, trained at that size")
    add("--count", type=parse_count, default=100, help="the study: as many images of test; default: %(default)s")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the training: train.steps=2000")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    command(run, parser.parse_args())


if __name__ == "__main__":
    main()
