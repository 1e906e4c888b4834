"""How many steps are enough: the distance of few steps to the 1000 of DDIM from the same noise, and what a segmenter makes of them.

    python -m benchmarks.steps --checkpoint runs/idd_lite/checkpoint.pt --n 32 --out runs/steps
    python -m benchmarks.steps --checkpoint runs/idd_lite/checkpoint.pt --segmenter runs/segmenter/checkpoint.pt
    python -m benchmarks.steps --checkpoint runs/idd_lite/checkpoint.pt --guidance 3 --guidance-interval 0.3 3

Pictures of n masks of a split, one seed each, by every sampler with every number of steps. Their root mean square difference
to the picture of DDIM (eta 0) with all T steps, which is next to the solution that all of them approximate, is in grey levels
0..255, mean over the pictures and its standard error; "other noise" is how far another seed is, for scale. With --segmenter also
how well the pictures obey their masks; "real" is what that segmenter finds in the real ones. Guidance, interval and precision
change the solution itself: the reference is made with the same ones. Writes steps.csv, curve.png and sheet.png.
"""

import argparse
import csv
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from checkpoint import build, load_checkpoint, pick_device
from config import checked
from dataset import Pairs, contact_sheet, to_uint8, unpack
from ddpm import guided_eps, noise_like_seeds, sample
from masks import UNLABELLED, Colorbook

COLORS = {"dpm_solver": "#1f4e9e", "plms": "#c0392b", "ddim": "#2e8b57", "other noise": "#888888", "real": "#888888"}


def compare(args):
    device, state = pick_device(args.device), load_checkpoint(args.checkpoint)
    cfg, colorbook = state["config"], Colorbook(state["colorbook"])
    checked("sample.guidance_interval", args.guidance_interval, "--guidance-interval")
    for sampler in args.samplers:
        checked("sample.sampler", sampler, "--samplers")
    w = args.guidance if args.guidance is not None else cfg["sample"]["guidance"]
    if args.precision:
        cfg["train"]["precision"] = args.precision
    segment = None
    if args.segmenter:
        from evaluate import confusion_matrix, load_segmenter, scores
        segment, known = load_segmenter(args.segmenter, colorbook, device)
    model, diffusion, autocast = build(cfg, len(colorbook), device)
    if not model.num_classes:
        raise ValueError(f"{args.checkpoint} was trained without masks: there is nothing to guide")
    model.load_state_dict(state["ema"])
    model.eval()
    if not all(1 <= steps <= diffusion.T for steps in args.steps):
        raise ValueError(f"--steps {' '.join(map(str, args.steps))}: expected numbers in 1..{diffusion.T}, the steps of this checkpoint")
    pairs = Pairs(args.root or cfg["data"]["root"], args.split, cfg["data"]["size"])
    if list(pairs.colorbook.classes.items()) != list(colorbook.classes.items()):
        raise ValueError(f"{args.root or cfg['data']['root']}: its colorbook is not that of the checkpoint")
    n = min(args.n, len(pairs))
    planes = pairs.planes[torch.linspace(0, len(pairs) - 1, n).round().long()]
    args.out.mkdir(parents=True, exist_ok=True)

    runs = [("ddim", diffusion.T), *((sampler, steps) for sampler in args.samplers for steps in args.steps), ("other noise", min(20, diffusion.T))]
    bar = tqdm(total=n * sum(steps for _, steps in runs), unit="step", dynamic_ncols=True)
    passed = []
    model.register_forward_hook(lambda module, inputs, output: passed.append(len(output)))

    def make(sampler, steps):
        """Pictures (n, 3, H, W) in [-1, 1]; the bar tells by whom."""
        bar.set_description(f"{sampler} {steps}")
        made, seed = [], args.seed + (sampler == "other noise") * n
        for part in torch.arange(n).split(args.batch_size):
            with torch.no_grad(), autocast():
                mask = unpack(planes[part].to(device), len(colorbook))[1]
                eps_fn = guided_eps(model, diffusion, mask, w, interval=args.guidance_interval)
                noise = noise_like_seeds((seed + part).tolist(), (3, *planes.shape[2:]), device)
                x = sample(eps_fn, noise, diffusion.alpha_bar, "dpm_solver" if sampler == "other noise" else sampler, steps,
                           observe=lambda *_: bar.update(len(part)))
            made.append(x.cpu())
        return torch.cat(made)

    def judged(pictures):
        """Pixel accuracy and mean IoU of pictures (n, H, W, 3) uint8 against their masks."""
        if not segment:
            return {}
        seen = torch.cat([segment(part) for part in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(args.batch_size)])
        truth = torch.where(torch.isin(planes[:, 3], torch.tensor(list(known))), planes[:, 3], UNLABELLED)
        accuracy, mean_iou, _ = scores(confusion_matrix(truth, seen, len(colorbook)))
        return {"pixel_accuracy": round(accuracy, 4), "mean_iou": round(mean_iou, 4)}

    rows, shown, reference = [], {}, None
    for sampler, steps in runs:
        passed.clear()
        x = make(sampler, steps)
        reference = x if reference is None else reference
        off = 127.5 * (x - reference).square().mean(dim=(1, 2, 3)).sqrt()
        shown[sampler, steps] = to_uint8(x[:3])
        rows.append({"sampler": sampler, "steps": steps, "passes": round(sum(passed) / n, 1), "distance": f"{off.mean():.3f}",
                     "standard_error": f"{off.std(correction=0) / math.sqrt(n):.3f}"} | judged(to_uint8(x)))
    rows.append({"sampler": "real"} | judged(planes[:, :3].permute(0, 2, 3, 1).numpy()))
    bar.close()

    with open(args.out / "steps.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["sampler", "steps", "passes", "distance", "standard_error", "pixel_accuracy", "mean_iou"], restval="")
        writer.writeheader()
        writer.writerows(rows)
    print((args.out / "steps.csv").read_text())
    about = f"{n} masks of {args.split}, guidance {w:g}" + (f" where noise is {args.guidance_interval}" if args.guidance_interval else "")
    curves(rows, f"{about}, {cfg['train']['precision']}").save(args.out / "curve.png")
    paint = [colorbook.paint(ids.numpy()) for ids in planes[:3, 3]]
    sheet = [[paint[i], *(shown[sampler, steps][i] for steps in args.steps), shown["ddim", diffusion.T][i]]
             for i in range(min(3, n)) for sampler in args.samplers]
    contact_sheet(sheet, ["mask", *map(str, args.steps), f"DDIM {diffusion.T}"]).save(args.out / "sheet.png")
    print(f"{args.out}: steps.csv, curve.png, sheet.png ({', '.join(args.samplers)}: a row each, under {', '.join(map(str, args.steps))} steps)")


def curves(rows, about):
    """Distance, and where it was measured the mean IoU, over the steps: one PIL picture; both axes of distances logarithmic."""
    size, left, top, low = 440, 60, 60, 56
    panels = [("distance", "difference to all the steps of DDIM, grey levels of 255")]
    panels += [("mean_iou", "mean IoU of the segmenter with the masks")] * ("mean_iou" in rows[0])
    lines = {}  # the reference is no point: its distance is zero
    for row in rows[1:]:
        lines.setdefault(row["sampler"], []).append(row)
    picture = Image.new("RGB", (len(panels) * (size + left + 30), size + top + low), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    draw.text((8, 6), about, "black", font)
    x = 16 + draw.textlength(about, font)
    for name in [name for name in lines if name not in ("other noise", "real")]:
        draw.text((x, 6), name, COLORS[name], font)
        x += 12 + draw.textlength(name, font)
    counts = sorted({row["steps"] for name in lines for row in lines[name] if name not in ("other noise", "real")})
    for p, (key, title) in enumerate(panels):
        values = [float(row[key]) for row in rows[1:] if row.get(key) not in (None, "") and float(row[key]) > 0]
        if key == "distance":
            ticks = [m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5) if min(values) / 2.5 < m * 10.0**e < 2.5 * max(values)]
        else:
            ticks = [i / 20 for i in range(21) if min(values) - 0.05 < i / 20 < max(values) + 0.05]
        x_left, scale = left + p * (size + left + 30), math.log if key == "distance" else float

        def place(value, a, b):
            return size * (value - a) / (b - a) if b > a else size / 2

        def at(steps, value):
            return (x_left + place(math.log(steps), math.log(counts[0]), math.log(counts[-1])),
                    top + size - place(scale(value), scale(ticks[0]), scale(ticks[-1])))

        draw.text((x_left, 30), title, "black", font)
        for value in ticks:
            y = at(counts[0], value)[1]
            draw.line([(x_left, y), (x_left + size, y)], "#dddddd")
            draw.text((x_left - 6, y), f"{value:g}", "black", font, anchor="rm")
        for steps in counts:
            draw.text((at(steps, ticks[0])[0], top + size + 6), str(steps), "black", font, anchor="mt")
        draw.text((x_left + size / 2, top + size + 26), "steps", "black", font, anchor="mt")
        for name, points in lines.items():
            if points[0].get(key) in (None, ""):
                continue
            if name in ("other noise", "real"):  # a level, not a curve
                y = at(counts[0], float(points[0][key]))[1]
                draw.line([(x_left, y), (x_left + size, y)], COLORS[name], 2)
                draw.text((x_left + size - 6, y - 2), name, COLORS[name], font, anchor="rb")
                continue
            path = [at(row["steps"], float(row[key])) for row in points if float(row[key]) > 0 or key != "distance"]
            draw.line(path, COLORS[name], 2)
            for x, y in path:
                draw.ellipse([x - 4, y - 4, x + 4, y + 4], COLORS[name])
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/toy/checkpoint.pt"), help="default: %(default)s")
    parser.add_argument("--root", type=Path, help="the prepared data; default: what the checkpoint was trained on")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--n", type=int, default=32, help="masks; default: %(default)s")
    parser.add_argument("--samplers", nargs="+", default=["dpm_solver", "plms", "ddim"], help="default: dpm_solver plms ddim")
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 5, 10, 20, 50, 100, 200], help="default: 3 5 10 20 50 100 200")
    parser.add_argument("--guidance", type=float, help="default: the checkpoint's")
    parser.add_argument("--guidance-interval", type=float, nargs="*", default=[], metavar="NOISE", help="lowest and highest noise level")
    parser.add_argument("--segmenter", help="the judge: a checkpoint of experiments/segmenter.py, or a Mask2Former")
    parser.add_argument("--seed", type=int, default=1, help="of the first picture; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], help="default: the checkpoint's")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--out", type=Path, default=Path("runs/steps"), help="default: %(default)s")
    try:
        compare(parser.parse_args())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")


if __name__ == "__main__":
    main()
