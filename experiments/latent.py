"""When does latent space pay? A latent diffusion model of masks beside our pixel DDPM, at equal time.

    python -m data.idd_lite.prepare --source idd20k_lite --size 128x128 --out data/idd_lite/prepared128
    python -m experiments.segmenter --root data/idd_lite/prepared128 --out runs/judge128
    python -m experiments.latent --preset idd_lite --set data.root=data/idd_lite/prepared128 \\
        --set data.size=[128,128] --judge runs/judge128/checkpoint.pt                                  100 minutes
    python -m experiments.latent --preset toy --set data.size=[64,64] --minutes 5,10                    50 minutes
    python -m experiments.latent --run runs/latent_prepared128/20_minutes --mask masks/       0.1 seconds an image

For each budget of --minutes three networks are trained one after the other: an autoencoder whose latents are a quarter
of the image's height and width and go through a codebook (VQ-VAE); for as long, a U-Net with cross-attention that
denoises latents, told the mask and which classes there are (a fifth of the images tell the classes alone, and so teach
it no mask); and train.py's U-Net on pixels, for as long as these two together. A longer budget goes on with the
autoencoder and the pixels' network of the shorter one. Encoding the images, under a minute, is in none of these.
Minutes are those of two CPU cores with bf16: the trainings, and a tenth of that for the rest, an estimate. Ctrl-C loses
nothing: the same command goes on.

The autoencoder is trained on L1 and 1 - SSIM at three scales, which stands in for VQ-GAN's perceptual term: the weights
of VGG cannot be downloaded where this trains, and those of the judge must not train what it judges. SSIM needs none,
and what L1 lets blur, local contrast and structure, is what it counts. --adversarial 0.5 adds VQ-GAN's discriminator.

The first table has the trainings, one each: how far a budget of minutes reaches depends on what else the machine does.
The second is of reconstructions of test images: PSNR in dB and SSIM against the image, the share of the codes that
occur, their perplexity (so many codes used evenly say as much), the deviation of the latents before they are scaled to
1, and what the judge sees. The third has a row for each way to draw masks of test: seconds an image; the peak memory of
16 at a time, guidance, decoding and all; the distance to the nearest training image; the rest is as in evaluate.py. For
the longest budget it adds "as long", as many steps as fit into the time of the other network's 20, and "labels alone".
"""

import argparse
import itertools
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from benchmarks.timing import machine, peak_memory, table
from checkpoint import autocast, pick_device, pick_precision
from config import add_config_arguments, command, load_config
from dataset import Pairs, batches, contact_sheet, read_image, to_uint8, unpack
from ddpm import Diffusion, dpm_solver, noise_like_seeds
from evaluate import SSIM_OPTIONS, measure_copies, resample, thumbnails
from experiments.common import parse_count, parse_numbers
from experiments.drawing import (AT_ONCE, DPM_SOLVER, Results, draw_images, draw_jobs, draw_missing, interval,
                                 load_judge, make_judge)
from experiments.latent_nets import DOWN, Autoencoder, LatentUNet, adversarial_losses, code_use, structure_loss
from experiments.training import fit, make_loader, read, spread
from masks import Colorbook, one_hot
from sample import file_of, plan, read_masks
from train import read_data, validate
from unet import UNet

STRUCTURE = 0.2  # weight of 1 - SSIM beside L1; the two are then about as large
COMMITMENT = 0.25  # of VQ-VAE's beta
ADVERSARIAL_AFTER = 1000  # steps: before that the decoder makes nothing that could fool anyone
LABELS_ALONE = 0.2  # share of images that the latent network is told the classes of, but not where they are

# ------------------------------------------------------------------------------------------------------ training


def train_autoencoder(cfg, args, pairs, held_out, file, device, minutes):
    """Train an autoencoder on pairs; returns it with its averaged weights and the latest codebook."""
    c = cfg["train"]
    torch.manual_seed(cfg["seed"])
    about = {"kind": "autoencoder", "size": list(pairs.size), "classes": pairs.colorbook.classes,
             "network": [args.width, args.codes, args.adversarial > 0]}
    model = Autoencoder(*about["network"]).to(device, memory_format=torch.channels_last)
    n = min(c["val_pairs"], len(held_out))
    x0, _ = unpack(held_out.planes[torch.linspace(0, len(held_out) - 1, n).long()], 0)

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

    return fit(model, loss, make_loader(cfg, pairs, device), c, file, device, about, measure, preview, minutes)


class Latents:
    """What the latent network is trained on, as pairs: planes (N, 3 + K, h, w), latents and shares of the classes."""

    @torch.no_grad()
    def __init__(self, autoencoder, pairs, mirror, precision, device):
        K = len(pairs.colorbook)
        parts = []
        for flipped, planes in itertools.product([False, True][: 1 + mirror], pairs.planes.split(32)):
            x0, mask = unpack(planes.flip(-1) if flipped else planes, K)  # a mirrored latent is not a mirror's latent
            with autocast(precision, device):
                z = autoencoder.encode(x0.to(device)).float().cpu()
            parts.append(torch.cat([z, F.avg_pool2d(mask, DOWN)], dim=1))
        self.planes = torch.cat(parts)

    def __len__(self):
        return len(self.planes)


def train_latent(cfg, args, autoencoder, pairs, held_out, file, device, minutes):
    """Train a latent network, on latents scaled to mean 0 and deviation 1; returns it with its averaged weights."""
    m, c, K = cfg["model"], cfg["train"], len(pairs.colorbook)
    encode = partial(Latents, autoencoder, precision=pick_precision(c["precision"], device), device=device)
    latents = encode(pairs, cfg["data"]["flip"] > 0)
    val_latents = encode(held_out, False)
    trained = read(file.with_name("autoencoder.pt"), "autoencoder")["step"]
    try:
        scale = read(file, "latent")["about"]["scale"]
    except FileNotFoundError:  # the training begins
        z = latents.planes[:, :3]
        scale = {"mean": z.mean((0, 2, 3)).tolist(), "std": z.std((0, 2, 3)).tolist(), "autoencoder steps": trained}
    if scale["autoencoder steps"] != trained:
        raise ValueError(f"{file}: for an autoencoder of {scale['autoencoder steps']} steps, and it has {trained} now: "
                         f"delete {file.name}, or choose another --run")
    mean, std = (torch.tensor(scale[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for encoded in (latents, val_latents):
        encoded.planes[:, :3] = (encoded.planes[:, :3] - mean) / std

    torch.manual_seed(cfg["seed"])
    about = {"kind": "latent", "size": list(pairs.size), "classes": pairs.colorbook.classes, "scale": scale,
             "diffusion": cfg["diffusion"], "network": [K, m["hidden_dim"], m["emb_dim"], args.heads]}
    model = LatentUNet(*about["network"]).to(device, memory_format=torch.channels_last)
    nn.init.zeros_(model.out.weight)  # as in train.py: begin with the prediction 0
    nn.init.zeros_(model.out.bias)
    diffusion = Diffusion(**cfg["diffusion"]).to(device)
    n = min(c["val_pairs"], len(val_latents))
    val_planes = val_latents.planes[torch.linspace(0, len(val_latents) - 1, n).long()]
    fixed = val_planes, spread(n, diffusion.T).long(), noise_like_seeds(range(n), val_planes[0, :3].shape)()

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

    return fit(model, loss, load, c, file, device, about, measure, minutes=minutes)


def train_pixel(cfg, pairs, held_out, file, device, minutes):
    """Train UNet on the images themselves, for so many minutes; returns it with its averaged weights."""
    m, K = cfg["model"], len(pairs.colorbook)
    c = cfg["train"] | {"steps": 10**9}
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
    shares = F.avg_pool2d(mask, DOWN)
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


def reconstruction_columns(real, images, ids, n, scale):
    used, perplexity = code_use(ids, n)
    pairs = list(zip(real, images))
    return {"PSNR": np.mean([peak_signal_noise_ratio(*pair) for pair in pairs]).item(),
            "SSIM": np.mean([structural_similarity(*pair, channel_axis=-1, **SSIM_OPTIONS) for pair in pairs]).item(),
            "codes used": f"{used:.1%} of {n}", "perplexity": perplexity,
            "deviation of latents": ", ".join(f"{std:.3g}" for std in scale["std"])}


def train_budget(cfg, args, pairs, held_out, folder, shorter, device, minutes):
    """Train the three networks in `folder`, from those of the shorter budget's on: {kind: (network, checkpoint)}."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("autoencoder", "pixel"):  # the latent network begins anew: these are other latents
        if shorter and not (folder / f"{kind}.pt").exists():
            shutil.copy(shorter / f"{kind}.pt", folder)
    files = {kind: folder / f"{kind}.pt" for kind in ("autoencoder", "latent", "pixel")}
    autoencoder = train_autoencoder(cfg, args, pairs, held_out, files["autoencoder"], device, minutes)
    latent = train_latent(cfg, args, autoencoder, pairs, held_out, files["latent"], device, minutes)
    both = sum(read(files[kind], kind)["seconds"] for kind in ("autoencoder", "latent"))
    pixel = train_pixel(cfg, pairs, held_out, files["pixel"], device, both / 60)
    nets = {"autoencoder": autoencoder, "latent": latent, "pixel": pixel}
    return {kind: (net, read(files[kind], kind) | {"path": files[kind]}) for kind, net in nets.items()}


def measure_ways(args, results, title, trained, masks, source, judge, device, longest):
    """Draw masks {stem: ids}, from `source`, in each way and judge the images: {name of the row: (N, H, W, 3) uint8}.
    """
    about, shown = trained["latent"][1]["about"], {}
    diffusion, K = Diffusion(**about["diffusion"]).to(device), len(about["classes"])
    precision = pick_precision("auto", device)

    def draw_by_latent(ids, seeds, w, steps, labels_alone):
        return draw_latent(trained["autoencoder"][0], trained["latent"][0], diffusion, about["scale"], one_hot(ids, K),
                           seeds, w, steps, labels_alone)

    def draw_by_pixel(ids, seeds, w, steps, labels_alone):
        return draw_images(trained["pixel"][0], diffusion, one_hot(ids, K), seeds, w, steps)

    def measure(way, kind, w, steps, peak=None, labels_alone=False):
        """The cost of an image; peak, in MiB, is measured where it is not given."""
        draw = partial({"latent": draw_by_latent, "pixel": draw_by_pixel}[kind], labels_alone=labels_alone)
        settings = DPM_SOLVER | {"mask": source, "n": 1, "seed": args.seed, "guidances": [w], "steps": steps,
                                 "precision": precision}
        more = {"way": way, "autoencoder_steps": trained["autoencoder"][1]["step"]}
        jobs = [job | more for job in plan(trained[kind][1], settings, masks)]
        name = f"{title}, {way}, w = {w:g}"
        row = results.begin(name, jobs[0] | {"masks": len(masks), "judge": args.judge})
        if "cost" not in row and peak is None:  # two steps, which also warm up what is timed below
            ids = torch.stack([torch.from_numpy(mask) for mask in list(masks.values())[:AT_ONCE]]).to(device)
            with torch.no_grad(), autocast(precision, device):
                peak = peak_memory(lambda: draw(ids, range(len(ids)), w, 2), [], device) / 2**20
        folder = trained[kind][1]["path"].parent / "images" / way.replace(", ", "_").replace(" ", "_")
        drawn, seconds = draw_missing(jobs, masks, partial(draw, steps=steps), folder, device)
        if "cost" not in row:
            if not drawn:
                raise ValueError(f"{folder}: images are there, and {results.file} lacks what they cost: delete them")
            row["cost"] = {"s an image": seconds / drawn, "peak MiB": round(peak)}
            results.save()
        shown[name] = np.stack([read_image(file_of(job, folder)) for job in jobs])
        if "columns" not in row:
            columns = {"budget": title, "way": way, "w": f"{w:g}", "steps": steps}
            row["columns"] = columns | row["cost"] | judge(shown[name])
            results.save()
        return row["cost"]

    for w in args.guidance:
        latent = measure("latent", "latent", w, args.steps)
        pixel = measure("pixels", "pixel", w, args.steps)
        if longest:
            ratio = pixel["s an image"] / latent["s an image"]
            longer, shorter = (min(diffusion.T, max(1, round(args.steps * r))) for r in (ratio, 1 / ratio))
            measure("latent, as long as pixels", "latent", w, longer, latent["peak MiB"])
            measure("pixels, as long as latent", "pixel", w, shorter, pixel["peak MiB"])
            measure("latent, labels alone", "latent", w, args.steps, latent["peak MiB"], labels_alone=True)
    return shown


def study(args):
    """The trainings of each budget, the three tables, and a sheet for each budget."""
    cfg = load_config(args.config, args.preset, ["train.steps=1000000000", *args.set])  # --minutes is the limit
    device, run = pick_device(cfg["device"]), args.run or Path(f"runs/latent_{Path(cfg['out']).name}")
    if any(side % (8 * DOWN) for side in cfg["data"]["size"]):
        raise ValueError(f"data.size {cfg['data']['size']}: latents are a quarter of it, which the U-Net halves three "
                         "times: choose multiples of 32")
    pairs, held_out = read_data(cfg, 0, 1, dry_run=False)
    test, colorbook = Pairs(cfg["data"]["root"], "test", pairs.size), pairs.colorbook
    chosen = torch.linspace(0, len(test) - 1, min(args.masks, len(test))).round().long()
    x0, _ = unpack(test.planes[chosen], 0)
    real, ids = to_uint8(x0), test.planes[chosen, 3].numpy()
    masks = {test.files[i][0]: test.planes[i, 3].numpy() for i in chosen}
    train_images = pairs.planes[:, :3].permute(0, 2, 3, 1).numpy()
    segment = load_judge(args.judge, colorbook, pairs.size, device)
    judge_by_segmenter = make_judge(segment, ids, real, train_images, colorbook.names) if segment else lambda images: {}
    real_small, both_counts = thumbnails(real), resample(len(real), len(real), np.arange(len(real)))

    def judge(images):
        copies, _ = measure_copies(real_small, thumbnails(images), images, train_images, both_counts)
        nearest, of_real_ones = (interval(copies[f"nearest training image{of}"]) for of in ("", ", of real ones"))
        return judge_by_segmenter(images) | {"nearest training image": nearest, "of real ones": of_real_ones}

    results, folder, trainings, names = Results(run / "results.json"), None, [], []
    for minutes in sorted(args.minutes):
        folder, shorter = run / f"{minutes:g}_minutes", folder
        title = f"{minutes:g} minutes"
        trained = train_budget(cfg, args, pairs, held_out, folder, shorter, device, minutes)
        for kind, (net, state) in trained.items():
            trainings.append({"budget": title, "network": kind, "parameters": sum(p.numel() for p in net.parameters()),
                              "minutes": state["seconds"] / 60, "steps": state["step"],
                              "steps a second": state["step"] / state["seconds"]})
        autoencoder, state = trained["autoencoder"]
        with autocast(pick_precision("auto", device), device):
            reconstructed, codes = reconstruct(autoencoder, x0, device)
        settings = {"autoencoder_steps": state["step"], "masks": len(masks), "judge": args.judge}
        row = results.begin(f"{title}, reconstruction", settings)
        if "columns" not in row:
            scale = trained["latent"][1]["about"]["scale"]
            columns = reconstruction_columns(real, reconstructed, codes, args.codes, scale)
            row["columns"] = {"budget": title} | columns | judge_by_segmenter(reconstructed)
            results.save()
        longest = minutes == max(args.minutes)
        shown = measure_ways(args, results, title, trained, masks, test.folder / "masks", judge, device, longest)
        names += shown
        columns = np.linspace(0, len(real) - 1, min(8, len(real))).round().astype(int)
        images = [real, reconstructed, *shown.values()]
        sheet = [[colorbook.paint(ids[i]) for i in columns], *([x[i] for i in columns] for x in images)]
        contact_sheet(sheet).save(folder / "sheet.png")
        print(f"{folder / 'sheet.png'}: masks, real images, reconstructed ones, {', '.join(shown)}")

    print(f"\n{len(real)} images of {test.folder}, {machine(device)}\n\n{table(trainings)}\n")
    reconstructions = [f"{minutes:g} minutes, reconstruction" for minutes in sorted(args.minutes)]
    print(table([results.rows[name]["columns"] for name in reconstructions]))
    print("a reconstruction has its image beside it: the Frechet distance may go below the floor, which is that of "
          f"other images\n\n{table([results.rows[name]['columns'] for name in names])}\n\n{results.file}")


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
    add("--run", type=Path, help="the study's folder, runs/latent_<name of the data>; with --mask that of a budget")
    add("--minutes", type=parse_numbers, default=[10.0, 20.0], metavar="M[,M...]",
        help="of training the autoencoder, and the latent network, and half of the pixels'; default: 10,20")
    add("--width", type=parse_count, default=32, help="of the autoencoder, a multiple of 8; default: %(default)s")
    add("--codes", type=parse_count, default=1024, help="in the codebook; default: %(default)s")
    add("--heads", type=parse_count, default=4, help="of the cross-attention; default: %(default)s")
    add("--adversarial", type=float, default=0, metavar="WEIGHT", help="of the discriminator; default: 0, none")
    add("--judge", help="a checkpoint of experiments.segmenter, trained at the size of the images")
    add("--masks", type=parse_count, default=64, help="of test, that are measured; default: %(default)s")
    add("--guidance", type=parse_numbers, default=[1.0], metavar="W[,W...]", help="more add rows; default: 1")
    add("--steps", type=parse_count, default=20, help="of DPM-Solver++; default: %(default)s")
    add("--seed", type=int, default=1, help="of the first image; default: %(default)s")
    add("--mask", help="with --run: a mask file, or a folder of them, to draw")
    add("--n", type=parse_count, default=4, help="with --mask: images of each; default: %(default)s")
    add("--out", type=Path, default=Path("out_latent"), help="with --mask: default: %(default)s")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"], help="with --mask")
    command(run, parser.parse_args())


if __name__ == "__main__":
    main()
