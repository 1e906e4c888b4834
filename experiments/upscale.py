"""Four times larger: a second diffusion model that enlarges images, and the whole way from a mask to 224x320.

    python -m data.idd_lite.prepare --source idd20k_lite --size 224x320 --out data/idd_lite/prepared_224x320
    python train.py --preset idd_lite --set data.root=data/idd_lite/prepared_224x320 --set data.size=[56,80] \\
        --set train.steps=3000 --set out=runs/idd_56x80                     images of 56x80: 21 minutes
    python -m experiments.upscale                                           trains the second model: 50 minutes
    python -m experiments.upscale --mask my.png --n 4                       from a mask to 224x320: seconds an image
    python -m experiments.upscale --images out/                             enlarges the images of a folder
    python -m experiments.upscale --images out/ --mask masks/               the same, with the masks they were made of
    python -m experiments.upscale --images small/ --mask masks/ --level 0   real images, which need no noise

The thesis (5.2.6) enlarged its images by a pretrained model of another domain and found no new detail; this one is
trained on the data itself. It is a cascade (Ho et al. 2021, SR3 of Saharia et al. 2021): our U-Net, which is told the
bicubic enlargement of the small image beside the mask. What is diffused is what that enlargement lacks, as in SRDiff
(Li et al. 2021). In training the small image gets noise of a random level, and a plane tells the level (conditioning
augmentation): generated images differ from real ones, and noise hides how. It trains on crops and samples whole images,
or overlapping --tile windows of them where memory is short, blended at every step.

How good it is: experiments.upscale_study. Minutes are for two CPU cores with bf16. Ctrl-C loses nothing: the same
command goes on.
"""

import argparse
import json
import math
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from checkpoint import autocast, join_processes, load_checkpoint, pick_device, pick_precision, replacing
from config import command, load_config
from data.common import parse_size
from dataset import contact_sheet, fit, list_files, read_image, to_uint8, unpack
from ddpm import Diffusion, dpm_solver, guided_eps, noise_like_seeds
from evaluate import find_images, mask_of
from experiments import training
from experiments.common import parse_count
from masks import UNLABELLED, Colorbook, one_hot, read_mask
from sample import file_of, load_network, plan, read_masks, sample_jobs, save, settings_of
from train import read_data
from unet import UNet

SCALE = 4
HIGHEST = 0.25  # deviation of the noise that small images get in training, at most; images are in [-1, 1]
NOISE_GAIN = 0.82  # deviation of white noise of deviation 1 after enlarge()

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
    zero where it is not known. The plane of the level lies in 1..2: the network normalises what it is told, so one
    plane at least has to tell the scale of the others.
    """
    level = level.view(-1, 1, 1, 1)
    plane = (1 + level / HIGHEST).expand(-1, 1, *mask.shape[2:])
    return torch.cat([enlarge(small + level * noise), plane, mask], dim=1)


def deviation_at(level, deviation):
    """Deviation (B, 1, 1, 1) of what the enlargement lacks at noise level (B,); `deviation` is that without noise.

    The difference has the enlarged noise in it, which is to be taken away.
    """
    return (deviation**2 + (NOISE_GAIN * level) ** 2).sqrt().view(-1, 1, 1, 1)


def cut_crops(planes, num_classes, crop, mask_drop, deviation):
    """Random crops of a batch of planes (B, 4, H, W) uint8: what is diffused, (B, 3, *crop), and what the network is
    told, (B, 4 + K, *crop).

    The noise level is uniform from 0 to HIGHEST; with probability mask_drop a mask is left out. deviation is that of
    what the enlargement of an image lacks.
    """
    x0, mask = unpack(planes, num_classes)
    B, (h, w), (H, W) = len(planes), crop, planes.shape[2:]
    small, draw = shrink(planes[:, :3]), torch.rand(2, B, device=planes.device)
    level, told = HIGHEST * draw[0], draw[1] >= mask_drop
    condition = make_condition(small, mask * told.view(-1, 1, 1, 1), level, torch.randn_like(small))
    lacking = (x0 - condition[:, :3]) / deviation_at(level, deviation)
    both = torch.cat([lacking, condition], dim=1)
    corners = zip(torch.randint(H - h + 1, (B,)).tolist(), torch.randint(W - w + 1, (B,)).tolist())
    crops = torch.stack([image[:, y : y + h, x : x + w] for image, (y, x) in zip(both, corners)])
    return crops[:, :3], crops[:, 3:]


def in_tiles(make_eps_fn, condition, tile):
    """An eps_fn for whole images, computed in overlapping windows and blended (MultiDiffusion, Bar-Tal et al. 2023).

    make_eps_fn(condition) gives the eps_fn of a window of condition (B, C, H, W); tile is its height and width. They
    overlap by a quarter at least, and their weights fall to their edges. What an eps_fn of single pixels predicts is
    not changed by it.
    """
    sides = [min(n, side) for n, side in zip(tile, condition.shape[2:])]
    starts = []
    ramps = []
    for n, length in zip(sides, condition.shape[2:]):
        count = math.ceil((length - n) / (0.75 * n)) + 1
        starts.append(np.linspace(0, length - n, count).round().astype(int).tolist())
        ramps.append((torch.arange(n) + 1).minimum(n - torch.arange(n)).clamp(max=n / 4))
    weight = (ramps[0][:, None] * ramps[1]).to(condition.device)
    windows = [(slice(y, y + sides[0]), slice(x, x + sides[1])) for y in starts[0] for x in starts[1]]
    eps_fns = [make_eps_fn(condition[..., rows, columns]) for rows, columns in windows]

    def eps_fn(x, t):
        total = torch.zeros_like(x)
        weights = torch.zeros_like(x[0, 0])
        for (rows, columns), eps_fn_of_window in zip(windows, eps_fns):
            total[..., rows, columns] += weight * eps_fn_of_window(x[..., rows, columns], t)
            weights[rows, columns] += weight
        return total / weights

    return eps_fn


@torch.no_grad()
def upscale(model, diffusion, deviation, small, mask, level, seeds, steps, tile=None):
    """Small images (B, 3, h, w) in [-1, 1] four times larger, likewise; mask (B, K, H, W) one-hot, zero if not known.

    deviation is that of what an enlargement lacks, level the noise that `small` gets first, a float; a seed for each
    image.
    """
    # from `seeds` themselves the small images were made: other noise for what is told, and for x
    noise = noise_like_seeds([seed + 2**40 for seed in seeds], small.shape[1:], small.device)()
    x = noise_like_seeds([seed + 2**41 for seed in seeds], (3, *mask.shape[2:]), small.device)()
    levels = torch.full((len(small),), level, device=small.device)
    condition = make_condition(small, mask, levels, noise)

    def make_eps_fn(part):
        return guided_eps(model, diffusion, part, guidance=1.0)

    eps_fn = in_tiles(make_eps_fn, condition, tile) if tile else make_eps_fn(condition)
    x = dpm_solver(eps_fn, x, diffusion.alpha_bar, steps, clip=False)  # a difference of images has no bounds of its own
    return (condition[:, :3] + deviation_at(levels, deviation) * x).clamp(-1, 1)


# --------------------------------------------------------------------------------------------------- training


def train_upscaler(args, device):
    """Train, or go on with it; the network's checkpoint is upscale.pt in --run."""
    if any(setting.startswith("data.root=") for setting in args.set):
        raise ValueError("--set data.root: the data set is given as --root")
    own = [f"data.root={args.root}", "data.size=[224,320]", "train.batch_size=4", "train.val_pairs=32",
           "train.previews=4", "train.preview_every=1000"]
    cfg = load_config(preset="idd_lite", overrides=[*own, *args.set])
    pairs, held_out = read_data(cfg, *join_processes(device), dry_run=False)
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

    def loss(net, planes):
        lacking, condition = cut_crops(planes, K, crop, c["label_drop"], deviation)
        t, eps, _ = diffusion.draw(lacking.shape, 0.0, device)
        return diffusion.loss(net, lacking, condition, t, eps)

    chosen = torch.linspace(0, len(held_out) - 1, min(c["val_pairs"], len(held_out))).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lacking, condition = cut_crops(held_out.planes[chosen], K, crop, 0.0, deviation)
        fixed = lacking, condition, training.spread(len(chosen), diffusion.T).long(), torch.randn_like(lacking)
        fixed = [part.to(device).split(c["batch_size"]) for part in fixed]

    @torch.no_grad()
    def validate(net):
        total = sum(diffusion.loss(net, *batch).item() * len(batch[0]) for batch in zip(*fixed))
        return {"val_loss": total / len(chosen)}

    def preview(net):
        planes = held_out.planes[chosen[: c["previews"]]].to(device)
        small, mask = shrink(planes[:, :3]), unpack(planes, K)[1]
        larger = upscale(net, diffusion, deviation, small, mask, 0.0, range(len(planes)), min(10, diffusion.T))
        real = planes[:, :3].float() / 127.5 - 1
        return contact_sheet(list(zip(*(to_uint8(x) for x in (enlarge(small), larger, real)))), ["bicubic", "", "real"])

    about = {"kind": "upscale", "network": [4 + K, m["hidden_dim"], m["emb_dim"], m["attention"]],
             "diffusion": cfg["diffusion"], "deviation": deviation, "size": [H, W], "crop": list(crop),
             "classes": pairs.colorbook.classes}

    training.fit(model, loss, training.make_loader(cfg, pairs, device), c, args.run / "upscale.pt", device, about,
                 validate, preview)
    training.go_on_alone()


# ----------------------------------------------------------------------------------------------------- images


def save_png(image, path, settings):
    """Write an image (H, W, 3) uint8 with its settings in it, as sample.py does."""
    text = PngInfo()
    text.add_text("settings", json.dumps(settings))
    with replacing(path) as png:
        Image.fromarray(image).save(png, "png", pnginfo=text)


class Upscaler:
    """The trained network of a run; called, it enlarges one image."""

    def __init__(self, run, device):
        """ValueError or FileNotFoundError where run has no upscale.pt."""
        state = training.read(run / "upscale.pt", "upscale")
        self.about, self.device, self.precision = state["about"], device, pick_precision("auto", device)
        self.colorbook = Colorbook(self.about["classes"], run / "upscale.pt")
        self.told = {"trained_steps": state["step"], "precision": self.precision,
                     "weights_crc32": zlib.crc32(state["ema"]["out.weight"].numpy())}  # stand in each PNG
        self.model, self.diffusion = UNet(*self.about["network"]), Diffusion(**self.about["diffusion"]).to(device)
        self.model.load_state_dict(state["ema"])
        self.model.to(device, memory_format=torch.channels_last).eval()

    def __call__(self, image, ids, seed, level, steps, tile=None):
        """image (h, w, 3) uint8 to (4h, 4w, 3); ids is its mask, of any size, or None if it is not known.

        ValueError: an odd side, or a device's memory that is too small.
        """
        h, w = image.shape[:2]
        size = SCALE * h, SCALE * w
        if h % 2 or w % 2:
            raise ValueError(f"{h}x{w}: expected even sides, since the network halves the large image three "
                             "times; crop it")
        ids = np.full(size, UNLABELLED, np.uint8) if ids is None else fit(ids, size)
        mask = one_hot(torch.from_numpy(ids)[None].to(self.device), len(self.colorbook))
        small = torch.from_numpy(image).to(self.device).permute(2, 0, 1)[None].float() / 127.5 - 1
        network = self.model, self.diffusion, self.about["deviation"]
        try:
            with autocast(self.precision, self.device):
                x = upscale(*network, small, mask, level, [seed], steps, tile)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"{size[0]}x{size[1]} does not fit into the device's memory: give a --tile, such as "
                             "{}x{}".format(*self.about["crop"])) from error
        return to_uint8(x)[0]


def enlarge_files(files, masks, out, seed, enlarge_one, told, **options):
    """Write out/<stem>.png for each small image {stem: path}, by enlarge_one(image, ids or None, seed, **options).

    masks {stem: ids} are of those that have one, seed is that of the first image; told and options stand in each PNG.
    What is there with the same settings stays. Returns seconds an image, None where all of them were there.
    """
    out.mkdir(parents=True, exist_ok=True)
    started, made = time.monotonic(), 0
    for i, (stem, path) in enumerate(tqdm(files.items(), out.name, unit="image")):
        image, ids = read_image(path), masks.get(stem)
        job = {"small": str(path), "small_crc32": zlib.crc32(image.tobytes()), "seed": seed + i} | options | told
        if ids is not None:
            job["mask_crc32"] = zlib.crc32(ids.tobytes())
        if settings_of(out / f"{stem}.png") == json.dumps(job):
            continue
        try:
            larger = enlarge_one(image, ids, seed + i, **options)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        save_png(larger, out / f"{stem}.png", job)
        made += 1
    return (time.monotonic() - started) / made if made else None


def draw_small(checkpoint, path, out, n, seed, colorbook, device):
    """n small images of each mask of `path`, in `out`: {stem: file}, {stem: ids four times larger}, seconds an image.

    Seconds are None where all of them were there. ValueError where the checkpoint has other classes than colorbook.
    """
    state = load_checkpoint(checkpoint)
    if list(state["colorbook"].items()) != list(colorbook.classes.items()):  # their order gives the ids
        raise ValueError(f"{checkpoint}: its classes are {', '.join(state['colorbook'])}, those of the upscaler "
                         f"{', '.join(colorbook.names)}: train both on one data set")
    s, size = state["config"]["sample"], tuple(state["config"]["data"]["size"])
    s |= {"n": n, "seed": seed, "mask": str(path), "size": size, "guidances": [s["guidance"]], "device": device}
    masks = read_masks(path, colorbook, size)
    _, model, diffusion, autocast = load_network(state, s)
    jobs, started = plan(state, s, masks), time.monotonic()
    todo = [job for job in jobs if settings_of(file_of(job, out)) != json.dumps(job)]
    out.mkdir(parents=True, exist_ok=True)
    for batch, images in sample_jobs(todo, masks, model, diffusion, s, autocast):
        for job, image in zip(batch, images):
            save(job, image, out)
    seconds = (time.monotonic() - started) / len(todo) if todo else None
    larger = read_masks(path, colorbook, tuple(SCALE * side for side in size))
    files = {file_of(job, out).stem: file_of(job, out) for job in jobs}
    return files, {file_of(job, out).stem: larger[job["mask"]] for job in jobs}, seconds


def in_large_pixels(path):
    return read_image(path).repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def from_masks(args, device):
    """The whole way: small images of the masks, enlarged; and a sheet."""
    network = Upscaler(args.run, device)
    files, masks, seconds_small = draw_small(
        args.small, args.mask, args.out / "small", args.n, args.seed, network.colorbook, device)
    seconds_large = enlarge_files(files, masks, args.out, args.seed, network, network.told, level=args.level,
                                  steps=args.steps, tile=args.tile)
    rows = [[network.colorbook.paint(masks[stem]), in_large_pixels(path), read_image(args.out / f"{stem}.png")]
            for stem, path in list(files.items())[:50]]
    contact_sheet(rows, ["mask", "small", "four times larger"]).save(args.out / "sheet.png")
    print(f"{len(files)} images: {args.out}, side by side in {args.out / 'sheet.png'}. Seconds an image: "
          f"{seconds_small or 0:.1f} for the small one, {seconds_large or 0:.1f} for the large one")


def from_images(args, device):
    """Enlarge an image, or those of a folder; with --mask each has the mask whose name its own begins with."""
    if args.images.resolve() == args.out.resolve():
        raise ValueError(f"--out {args.out}: the small images are in it; choose another folder")
    network = Upscaler(args.run, device)
    files = find_images(args.images) if args.images.is_dir() else {args.images.stem: args.images}
    masks = {}
    if args.mask:
        mask_files = list_files(args.mask) if args.mask.is_dir() else {args.mask.stem: args.mask}
        mask_stems = {stem: mask_of(stem, mask_files) for stem in files}
        masks = {stem: read_mask(mask_files[mask_stem], network.colorbook)[0]
                 for stem, mask_stem in mask_stems.items() if mask_stem}
        if not masks:
            raise ValueError(f"--mask {args.mask}: no mask has a name that one of {', '.join(list(files)[:3])} begins "
                             "with; rename it, or leave --mask out")
    seconds = enlarge_files(files, masks, args.out, args.seed, network, network.told, level=args.level,
                            steps=args.steps, tile=args.tile)
    print(f"{len(files)} images, {len(masks)} of them with a mask: {args.out}. {seconds or 0:.1f} seconds an image")


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
        train_upscaler(args, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--mask", type=Path, help="a mask, or a folder of them: the whole way; with --images, the masks of these")
    add("--images", type=Path, help="a small image, or a folder of them, to be enlarged")
    add("--run", type=Path, default=Path("runs/upscale"), help="folder of the training; default: %(default)s")
    add("--small", type=Path, default=Path("runs/idd_56x80/checkpoint.pt"),
        help="the checkpoint of train.py that makes the small images; default: %(default)s")
    add("--out", type=Path, default=Path("out/large"), help="of --mask and --images; default: %(default)s")
    add("--n", type=parse_count, default=4, help="images of each mask; default: %(default)s")
    add("--level", type=float, default=0.05, help="noise that small images of --mask and --images get first, from 0 to "
        f"{HIGHEST}: more hides more of their faults, and of their detail; default: %(default)s")
    add("--steps", type=parse_count, default=10, help="of DPM-Solver++; default: %(default)s")
    add("--tile", type=parse_size, metavar="HxW", help="overlapping windows of this size; default: whole images")
    add("--seed", type=int, default=1, help="of the first image; default: %(default)s")
    add("--root", default="data/idd_lite/prepared_224x320", help="the training: a prepared set; default: %(default)s")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the training: train.steps=2000")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    command(run, parser.parse_args())


if __name__ == "__main__":
    main()
