"""When does latent space pay? A latent diffusion model of masks beside our pixel DDPM, at equal time.

    python -m data.idd_lite.prepare --source idd20k_lite --size 128x128 --out data/idd_lite/prepared128
    python -m experiments.segmenter --root data/idd_lite/prepared128 --out runs/judge128
    python -m experiments.latent --preset idd_lite --set data.root=data/idd_lite/prepared128 \\
        --set data.size=[128,128] --judge runs/judge128/checkpoint.pt           three trainings, two tables: 195 minutes
    python -m experiments.latent --preset toy --set data.size=[64,64] --minutes 10,20                  65 minutes
    python -m experiments.latent --run runs/latent_prepared128 --mask masks/ --guidance 1,2            a second an image

Three networks are trained one after the other: an autoencoder whose latents are a quarter of the image's height and
width and go through a codebook (VQ-VAE); a U-Net with cross-attention that denoises latents, told the mask and which
classes there are; and train.py's U-Net on pixels, for as long as these two together. Times are those of two CPU cores.
Encoding the images once, a minute, is in none of these. Ctrl-C loses nothing: the same command goes on.

The autoencoder is trained on L1 and 1 - SSIM at three scales, which stands in for VQ-GAN's perceptual term: the weights
of VGG cannot be downloaded where this trains, and those of the judge must not train what it judges. SSIM needs none,
and what L1 lets blur, local contrast and structure, is what it counts. --adversarial 0.5 adds VQ-GAN's discriminator.

The first table is of reconstructions of test images: PSNR in dB and SSIM against the image, the share of the codes that
occur, their perplexity (so many codes used evenly say as much), the deviation of the latents before they are scaled to
1, and the Frechet distance in the judge's features with its floor, real training images. The second has a row for each
way to draw masks of test: seconds an image and the peak memory of 16 at a time, guidance, decoding and all; the rest is
as in evaluate.py. "as long" takes as many steps as fit into the time of the other network's 20.
"""

import argparse
import itertools
import json
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from benchmarks.timing import machine, peak_memory, table
from checkpoint import pick_device, pick_precision, replacing
from config import add_config_arguments, command, load_config
from dataset import Pairs, batches, contact_sheet, read_image, to_uint8, unpack
from ddpm import Diffusion, dpm_solver, noise_like_seeds
from evaluate import SSIM_OPTIONS
from experiments.common import parse_count, parse_numbers
from experiments.drawing import AT_ONCE, draw_images, draw_in_batches, draw_jobs, judge_columns, load_judge
from experiments.latent_nets import F_DOWN, Autoencoder, LatentUNet, adversarial_losses, code_use, structure_loss
from experiments.training import autocast, fit, make_loader, read, spread
from masks import Colorbook, one_hot
from sample import read_masks
from train import read_data, validate
from unet import UNet

STRUCTURE = 0.2  # weight of 1 - SSIM beside L1; the two are then about as large
COMMITMENT = 0.25  # of VQ-VAE's beta
ADVERSARIAL_AFTER = 1000  # steps: before that the decoder makes nothing that could fool anyone
LABELS_ALONE = 0.2  # share of images that the latent network is told the classes of, but not where they are

# ------------------------------------------------------------------------------------------------------ training


def train_autoencoder(cfg, args, pairs, held_out, file, device):
    """Train an autoencoder on pairs; returns it with its averaged weights and the latest codebook."""
    c = cfg["train"]
    torch.manual_seed(cfg["seed"])
    about = {"kind": "autoencoder", "size": list(pairs.size), "classes": pairs.colorbook.classes,
             "network": [args.width, args.codes, args.adversarial > 0]}
    model = Autoencoder(*about["network"]).to(device, memory_format=torch.channels_last)
    x0, _ = unpack(held_out.planes[torch.linspace(0, len(held_out) - 1, min(c["val_pairs"], len(held_out))).long()], 0)

    def reconstruction_loss(x, y):
        return (x - y).abs().mean() + STRUCTURE * structure_loss(x, y)

    def loss(net, planes):
        x, _ = unpack(planes, 0)
        codes, _, commitment = net.quantizer(net.encode(x))
        y = net.decode(codes).float()
        value = reconstruction_loss(x, y)
        net.age += 1
        if args.adversarial > 0 and net.age > ADVERSARIAL_AFTER:
            of_patches, not_fooled = adversarial_losses(net.patches, x, y)
            # Esser et al., equation 7: as large a gradient in the last layer as that of the reconstruction
            sizes = [torch.autograd.grad(term, net.decode[-1].weight, retain_graph=True)[0].norm()
                     for term in (value, not_fooled)]
            value = value + of_patches + args.adversarial * sizes[0] / (sizes[1] + 1e-4) * not_fooled
        return value + COMMITMENT * commitment

    @torch.no_grad()
    def measure(net):
        losses, ids = [], []
        for x in x0.split(c["batch_size"]):
            codes, chosen, _ = net.quantizer(net.encode(x.to(device)))
            losses += [reconstruction_loss(x.to(device), net.decode(codes).float()).item()] * len(x)
            ids.append(chosen)
        used, perplexity = code_use(torch.cat(ids), args.codes)
        return {"val_loss": np.mean(losses).item(), "codes used": used, "perplexity": perplexity}

    @torch.no_grad()
    def preview(net):
        x = x0[: c["previews"]].to(device)
        return contact_sheet([list(to_uint8(x)), list(to_uint8(net.decode_nearest(net.encode(x)).float()))])

    return fit(model, loss, make_loader(cfg, pairs, device), c, file, device, about, measure, preview, args.minutes[0])


class Latents:
    """What the latent network is trained on, as pairs: planes (N, 3 + K, h, w), latents and shares of the classes."""

    @torch.no_grad()
    def __init__(self, autoencoder, pairs, mirror, precision, device):
        parts, K = [], len(pairs.colorbook)
        for flipped, planes in itertools.product([False, True][: 1 + mirror], pairs.planes.split(32)):
            x0, mask = unpack(planes.flip(-1) if flipped else planes, K)  # a mirrored latent is not a mirror's latent
            with autocast(precision, device):
                z = autoencoder.encode(x0.to(device)).float().cpu()
            parts.append(torch.cat([z, F.avg_pool2d(mask, F_DOWN)], dim=1))
        self.planes = torch.cat(parts)

    def __len__(self):
        return len(self.planes)


def train_latent(cfg, args, autoencoder, pairs, held_out, file, device):
    """Train a latent network, on latents scaled to mean 0 and deviation 1; returns it with its averaged weights."""
    m, c, K = cfg["model"], cfg["train"], len(pairs.colorbook)
    trained, scale_file = read(file.with_name("autoencoder.pt"), "autoencoder")["step"], file.with_name("scale.json")
    encode = partial(Latents, autoencoder, precision=pick_precision(c["precision"], device), device=device)
    latents, held_out = encode(pairs, cfg["data"]["flip"] > 0), encode(held_out, False)
    if not scale_file.exists():
        z = latents.planes[:, :3]
        with replacing(scale_file) as opened:
            opened.write(json.dumps({"mean": z.mean((0, 2, 3)).tolist(), "std": z.std((0, 2, 3)).tolist(),
                                     "autoencoder steps": trained}).encode())
    scale = json.loads(scale_file.read_text())
    print("latents: " + ", ".join(f"{mean:.3g} ± {std:.3g}" for mean, std in zip(scale["mean"], scale["std"]))
          + " in three channels; scaled to 0 ± 1")
    if scale["autoencoder steps"] != trained:
        raise ValueError(f"{scale_file}: of an autoencoder of {scale['autoencoder steps']} steps, and it has {trained} "
                         f"now: delete {scale_file.name} and {file.name}, or choose another --run")
    mean, std = (torch.tensor(scale[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for some in (latents, held_out):
        some.planes[:, :3] = (some.planes[:, :3] - mean) / std

    torch.manual_seed(cfg["seed"])
    about = {"kind": "latent", "size": list(pairs.size), "classes": pairs.colorbook.classes, "scale": scale,
             "diffusion": cfg["diffusion"], "network": [K, m["hidden_dim"], m["emb_dim"], args.heads]}
    model = LatentUNet(*about["network"]).to(device, memory_format=torch.channels_last)
    nn.init.zeros_(model.out.weight)  # as in train.py: begin with the prediction 0
    nn.init.zeros_(model.out.bias)
    diffusion = Diffusion(**cfg["diffusion"]).to(device)
    n = min(c["val_pairs"], len(held_out))
    t = spread(n, diffusion.T).long()
    some = held_out.planes[torch.linspace(0, len(held_out) - 1, n).long()]
    fixed = some, t, noise_like_seeds(range(n), some[0, :3].shape)()

    def loss(net, planes):
        z, mask = planes.split([3, K], dim=1)
        drawn = diffusion.draw(z.shape, c["label_drop"], device)
        keep_mask = torch.rand(len(z), device=device) >= LABELS_ALONE
        return diffusion.loss(partial(net, keep_mask=keep_mask), z, mask, *drawn)

    @torch.no_grad()
    def measure(net):
        parts = zip(*(x.to(device).split(c["batch_size"]) for x in fixed))
        errors = [diffusion.errors(net, *planes.split([3, K], dim=1), *rest) for planes, *rest in parts]
        return dict(zip(("val_loss", "val_eps"), torch.cat([torch.stack(e) for e in errors], 1).mean(1).tolist()))

    def load(start):
        return batches(latents, c["batch_size"], cfg["seed"], start, device=device)

    return fit(model, loss, load, c, file, device, about, measure, minutes=args.minutes[1])


def train_pixel(cfg, pairs, held_out, file, device, minutes):
    """Train UNet on the images themselves; returns it with its averaged weights."""
    m, c, K = cfg["model"], cfg["train"] | {"steps": 10**9}, len(pairs.colorbook)
    torch.manual_seed(cfg["seed"])
    about = {"kind": "pixel", "size": list(pairs.size), "classes": pairs.colorbook.classes,
             "diffusion": cfg["diffusion"], "network": [K, m["hidden_dim"], m["emb_dim"], m["attention"]]}
    model = UNet(*about["network"]).to(device, memory_format=torch.channels_last)
    nn.init.zeros_(model.out.weight)
    nn.init.zeros_(model.out.bias)
    diffusion = Diffusion(**cfg["diffusion"]).to(device)

    def loss(net, planes):
        x0, mask = unpack(planes, K)
        return diffusion.loss(net, x0, mask, *diffusion.draw(x0.shape, c["label_drop"], device))

    def measure(net):
        return validate(net, diffusion, held_out, c["val_pairs"], c["batch_size"], device, nullcontext)

    return fit(model, loss, make_loader(cfg, pairs, device), c, file, device, about, measure, minutes=minutes)


# ------------------------------------------------------------------------------------------------------ sampling


def load(run, kind, make, device):
    """Of a run's folder: the network of that kind with its averaged weights, and what it is built from."""
    state = read(run / f"{kind}.pt", kind)
    net = make(*state["about"]["network"])
    net.load_state_dict(state["ema"])
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), state


def latent_eps(net, diffusion, shares, guidance, labels_alone=False):
    """guided_eps() of ddpm.py for a LatentUNet: eps_fn(x, t) for class shares (B, K, h, w)."""
    B = len(shares)
    keep_mask = torch.full((2 * B,), not labels_alone, device=shares.device)
    conditional = torch.arange(2 * B, device=shares.device) < B

    def eps_fn(x, t):
        t = torch.full((B,), t, device=x.device)
        if guidance == 1:
            out = net(x, t, shares, keep_mask=keep_mask[:B])
        else:
            both = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([shares, shares]), keep=conditional,
                       keep_mask=keep_mask)
            out_c, out_u = both.float().chunk(2)
            out = out_u + guidance * (out_c - out_u)
        return diffusion.to_eps(out, x, t)

    return eps_fn


@torch.no_grad()
def draw_latent(autoencoder, net, diffusion, scale, mask, seeds, guidance, steps, labels_alone=False):
    """Images (B, H, W, 3) uint8 of masks (B, K, H, W): DPM-Solver++ on latents, which nothing clips, then decoded."""
    shares = F.avg_pool2d(mask, F_DOWN)
    noise = noise_like_seeds(seeds, (3, *shares.shape[2:]), mask.device)
    eps_fn = latent_eps(net, diffusion, shares, guidance, labels_alone)
    z = dpm_solver(eps_fn, noise(), diffusion.alpha_bar, steps, clip=False)
    mean, std = (torch.tensor(scale[key], device=mask.device).view(1, 3, 1, 1) for key in ("mean", "std"))
    return to_uint8(autoencoder.decode_nearest(z * std + mean).float())


# ----------------------------------------------------------------------------------------------------- the study


@torch.no_grad()
def reconstruct(autoencoder, x0, device):
    """Images x0 (N, 3, H, W) through the autoencoder, (N, H, W, 3) uint8, and the ids of their codes."""
    images, ids = [], []
    for x in x0.split(16):
        ids.append(autoencoder.quantizer.nearest(autoencoder.encode(x.to(device))))
        images.append(to_uint8(autoencoder.decode(autoencoder.quantizer.lookup(ids[-1])).float()))
    return np.concatenate(images), torch.cat(ids).cpu()


def reconstruction_row(real, images, ids, n, scale, judged):
    """The columns of the first table."""
    used, perplexity = code_use(ids, n)
    pairs = list(zip(real, images))
    row = {"PSNR": np.mean([peak_signal_noise_ratio(*pair) for pair in pairs]).item(),
           "SSIM": np.mean([structural_similarity(*pair, channel_axis=-1, **SSIM_OPTIONS) for pair in pairs]).item(),
           "codes used": f"{used:.1%} of {n}", "perplexity": perplexity,
           "deviation of latents": ", ".join(f"{std:.3g}" for std in scale["std"])}
    return row | judged


def ways(args, results, nets, pixel, w):
    """Yield (name, steps, draw) of each way to draw; the later ones take as long as the earlier ones took."""
    T = pixel[1].T
    latent = partial(draw_latent, *nets, guidance=w)
    yield "latent", args.steps, partial(latent, steps=args.steps)
    yield "pixels", args.steps, partial(draw_images, *pixel, guidance=w, steps=args.steps)
    ratio = results[f"pixels, w = {w:g}"]["s an image"] / results[f"latent, w = {w:g}"]["s an image"]
    longer, shorter = (min(T, max(1, round(args.steps * r))) for r in (ratio, 1 / ratio))
    yield "latent, as long as pixels", longer, partial(latent, steps=longer)
    yield "pixels, as long as latent", shorter, partial(draw_images, *pixel, guidance=w, steps=shorter)
    yield "latent, labels alone", args.steps, partial(latent, steps=args.steps, labels_alone=True)


def study(args):
    """The three trainings, the two tables, and the sheet."""
    cfg = load_config(args.config, args.preset, ["train.steps=1000000000", *args.set])  # --minutes is the limit
    device, run = pick_device(cfg["device"]), args.run or Path(f"runs/latent_{Path(cfg['out']).name}")
    if any(side % (8 * F_DOWN) for side in cfg["data"]["size"]):
        raise ValueError(f"data.size {cfg['data']['size']}: latents are a quarter of it, which the U-Net halves three "
                         "times: choose multiples of 32")
    pairs, held_out = read_data(cfg, 0, 1, dry_run=False)
    test, colorbook, K = Pairs(cfg["data"]["root"], "test", pairs.size), pairs.colorbook, len(pairs.colorbook)
    segment = load_judge(args.judge, colorbook, pairs.size, device)
    autoencoder = train_autoencoder(cfg, args, pairs, held_out, run / "autoencoder.pt", device)
    net = train_latent(cfg, args, autoencoder, pairs, held_out, run / "latent.pt", device)
    seconds = {kind: read(run / f"{kind}.pt", kind)["seconds"] for kind in ("autoencoder", "latent")}
    pixel = train_pixel(cfg, pairs, held_out, run / "pixel.pt", device, sum(seconds.values()) / 60)
    states = {kind: read(run / f"{kind}.pt", kind) for kind in ("autoencoder", "latent", "pixel")}
    for kind, state in states.items():
        print(f"{kind}: {state['step']} steps in {state['seconds'] / 60:.1f} minutes")

    scale, diffusion = states["latent"]["about"]["scale"], Diffusion(**cfg["diffusion"]).to(device)
    chosen = torch.linspace(0, len(test) - 1, min(args.masks, len(test))).round().long()
    x0, mask = unpack(test.planes[chosen], K)
    real, ids = to_uint8(x0), test.planes[chosen, 3].numpy()
    train_images, precision = pairs.planes[:, :3].permute(0, 2, 3, 1).numpy(), pick_precision("auto", device)

    def judge(images):
        return judge_columns(segment, ids, real, images, train_images, colorbook.names) if segment else {}

    settings = {kind: state["step"] for kind, state in states.items()}
    settings |= {key: getattr(args, key) for key in ("masks", "seed", "steps", "judge")}
    file = run / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {"settings": settings, "rows": {}}
    if results["settings"] != settings:
        raise ValueError(f"{file}: made with {results['settings']}, not {settings}: delete it and {run / 'images'}")
    with autocast(precision, device):
        reconstructed, codes = reconstruct(autoencoder, x0, device)
    if "reconstruction" not in results:
        judged = judge(reconstructed)
        results["reconstruction"] = reconstruction_row(real, reconstructed, codes, args.codes, scale, judged)
    rows, shown = results["rows"], {"reconstructed": reconstructed}
    for w in args.guidance:
        for name, steps, draw in ways(args, rows, (autoencoder, net, diffusion, scale), (pixel, diffusion), w):
            key, seeds = f"{name}, w = {w:g}", range(args.seed, args.seed + len(real))
            folder = run / "images" / key.replace(", ", "_").replace(" ", "_").replace("_=_", "")
            paths = [folder / f"{test.files[i][0]}_{seed}.png" for i, seed in zip(chosen, seeds)]
            if key not in rows:
                folder.mkdir(parents=True, exist_ok=True)
                with torch.no_grad(), autocast(precision, device):
                    started = time.monotonic()
                    images = draw_in_batches(draw, mask, seeds, device, key)
                    seconds = (time.monotonic() - started) / len(images)
                    first = mask[:AT_ONCE].to(device)
                    peak = peak_memory(lambda: draw(first, seeds[:AT_ONCE]), [], device) / 2**20
                for path, image in zip(paths, images):
                    Image.fromarray(image).save(path)
                rows[key] = {"way": name, "w": f"{w:g}", "steps": steps, "s an image": seconds, "peak MiB": round(peak)}
                rows[key] |= judge(images)
                with replacing(file) as opened:
                    opened.write(json.dumps(results, indent=1).encode())
            shown[key] = np.stack([read_image(path) for path in paths])
    print(f"\n{len(real)} images of {test.folder}, {machine(device)}\n\n{table([results['reconstruction']])}\n")
    print(table(list(rows.values())))
    columns = np.linspace(0, len(real) - 1, min(8, len(real))).round().astype(int)
    sheet = [[colorbook.paint(ids[i]) for i in columns], *([x[i] for i in columns] for x in (real, *shown.values()))]
    contact_sheet(sheet).save(run / "sheet.png")
    print(f"\n{file}, {run / 'sheet.png'}: masks, real images, {', '.join(shown)}")


def draw_masks(args):
    """Images of --mask by the latent network of --run, each with its settings, and sheet.png."""
    device = pick_device(args.device)
    autoencoder, _ = load(args.run, "autoencoder", Autoencoder, device)
    net, state = load(args.run, "latent", LatentUNet, device)
    about, colorbook = state["about"], Colorbook(state["about"]["classes"], args.run / "latent.pt")
    diffusion = Diffusion(**about["diffusion"]).to(device)
    masks = read_masks(args.mask, colorbook, tuple(about["size"]))

    def draw(ids, seeds, w):
        mask = one_hot(ids, len(colorbook))
        return draw_latent(autoencoder, net, diffusion, about["scale"], mask, seeds, w, args.steps)

    draw_jobs(args, state | {"path": args.run / "latent.pt"}, masks, colorbook, draw, args.out, device, {})


def run(args):
    if args.mask and not args.run:
        raise ValueError("--mask draws with the networks of a run: name its folder with --run")
    (draw_masks if args.mask else study)(args)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_config_arguments(parser)
    add("--run", type=Path, help="the folder of the run; default: runs/latent_<name of the data>")
    add("--minutes", type=parse_numbers, default=[30.0, 60.0], metavar="A,L",
        help="at most, of training the autoencoder and the latent network, in all; default: 30,60")
    add("--width", type=parse_count, default=32, help="of the autoencoder, a multiple of 8; default: %(default)s")
    add("--codes", type=parse_count, default=1024, help="in the codebook; default: %(default)s")
    add("--heads", type=parse_count, default=4, help="of the cross-attention; default: %(default)s")
    add("--adversarial", type=float, default=0, metavar="WEIGHT", help="of the discriminator; default: 0, none")
    add("--judge", help="a checkpoint of experiments.segmenter, trained at the size of the images")
    add("--masks", type=parse_count, default=64, help="of test, that are measured; default: %(default)s")
    add("--guidance", type=parse_numbers, default=[1.0, 2.0], metavar="W[,W...]", help="default: 1,2")
    add("--steps", type=parse_count, default=20, help="of DPM-Solver++; default: %(default)s")
    add("--seed", type=int, default=1, help="of the first image; default: %(default)s")
    add("--mask", help="with --run: a mask file, or a folder of them, to draw")
    add("--n", type=parse_count, default=4, help="with --mask: images of each; default: %(default)s")
    add("--out", type=Path, default=Path("out_latent"), help="with --mask: default: %(default)s")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"], help="with --mask")
    command(run, parser.parse_args())


if __name__ == "__main__":
    main()
