"""How many steps are enough: the distance of few steps to DDIM with all steps from the same noise.

    python -m benchmarks.steps --checkpoint runs/idd_lite/checkpoint.pt --n 32 --out runs/steps
    python -m benchmarks.steps --checkpoint runs/idd_lite/checkpoint.pt --segmenter runs/judge/checkpoint.pt
    python -m benchmarks.steps --checkpoint runs/idd_lite/checkpoint.pt --guidance 3 --guidance-interval 0.3 3

Images of n masks of a split, one seed each, by every sampler with every number of steps. Their root mean square
difference to the image of DDIM (eta 0) with all T steps, which is next to the solution that all of them approximate,
is in grey levels 0..255, mean over the images and its standard error; "other noise" is how far another seed is, for
scale. With --segmenter also how well the images obey their masks; "real" is what that segmenter finds in the real
ones. Guidance and interval change the solution itself: the reference is made with the same ones. Writes steps.csv,
curve.png and sheet.png.
"""

import argparse
import csv
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from benchmarks.held_out import load_run, spread
from config import checked, command
from dataset import contact_sheet, to_uint8, unpack
from ddpm import guided_eps, noise_like_seeds, sample
from evaluate import confusion_matrix, load_segmenter, scores

SAMPLERS = {"dpm_solver": "#1f4e9e", "plms": "#c0392b", "ddim": "#2e8b57"}  # and their colours
LEVELS = {"other noise": "#888888", "real": "#888888"}  # drawn as levels, not as curves
COLUMNS = ["sampler", "steps", "passes", "distance", "standard_error", "pixel_accuracy", "mean_iou"]


def make_judge(segmenter, planes, pairs, device, batch_size):
    """A function from images (n, H, W, 3) uint8 to pixel accuracy and mean IoU with the masks of the planes."""
    segment = load_segmenter(segmenter, pairs.colorbook, device)

    def judge(images):
        batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(batch_size)
        predicted = torch.cat([segment(batch) for batch in batches])
        accuracy, mean_iou, _ = scores(confusion_matrix(planes[:, 3], predicted, len(pairs.colorbook)))
        return {"pixel_accuracy": round(accuracy, 4), "mean_iou": round(mean_iou, 4)}

    return judge


def compare(args):
    """Sample, measure, and write the three files. Raises ValueError or OSError for what the user can fix."""
    state, device, model, diffusion, autocast, pairs = load_run(args.checkpoint, args.split)
    s, T = state["config"]["sample"], diffusion.T
    w = s["guidance"] if args.guidance is None else args.guidance
    if not all(1 <= steps <= T for steps in args.steps):
        raise ValueError(f"--steps {' '.join(map(str, args.steps))}: expected numbers in 1..{T}, diffusion.T")
    checked("sample.guidance_interval", args.guidance_interval, "--guidance-interval")
    planes = spread(pairs, args.n)
    n = len(planes)
    judge = make_judge(args.segmenter, planes, pairs, device, s["batch_size"]) if args.segmenter else None
    args.out.mkdir(parents=True, exist_ok=True)

    runs = [("ddim", T)]  # the reference
    runs += [(sampler, steps) for sampler in args.samplers for steps in args.steps]
    runs += [("other noise", min(20, T))]
    bar = tqdm(total=n * sum(steps for _, steps in runs), unit="step", dynamic_ncols=True)
    passes = []
    model.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))

    def generate(sampler, steps):
        """Images (n, 3, H, W) in [-1, 1]."""
        bar.set_description(f"{sampler} {steps}")
        seed = 1
        if sampler == "other noise":
            sampler, seed = "dpm_solver", 1 + n
        images = []
        for i in torch.arange(n).split(s["batch_size"]):
            with torch.no_grad(), autocast():
                mask = unpack(planes[i].to(device), len(pairs.colorbook))[1]
                eps_fn = guided_eps(model, diffusion, mask, w, args.guidance_interval)
                noise = noise_like_seeds((seed + i).tolist(), (3, *planes.shape[2:]), device)
                x = sample(eps_fn, noise, diffusion.alpha_bar, sampler, steps, observe=lambda *_: bar.update(len(i)))
            images.append(x.cpu())
        return torch.cat(images)

    rows, shown, reference = [], {}, None
    for sampler, steps in runs:
        passes.clear()
        x = generate(sampler, steps)
        reference = x if reference is None else reference
        distance = 127.5 * (x - reference).square().mean(dim=(1, 2, 3)).sqrt()
        error = distance.std(correction=0) / math.sqrt(n)
        shown[sampler, steps] = to_uint8(x[:3])
        rows.append({"sampler": sampler, "steps": steps, "passes": round(sum(passes) / n, 1),
                     "distance": f"{distance.mean():.3f}", "standard_error": f"{error:.3f}"})
        if judge:
            rows[-1] |= judge(to_uint8(x))
    if judge:
        rows.append({"sampler": "real"} | judge(planes[:, :3].permute(0, 2, 3, 1).numpy()))
    bar.close()

    with open(args.out / "steps.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print((args.out / "steps.csv").read_text())
    interval = f" at noise {args.guidance_interval}" if args.guidance_interval else ""
    draw_curves(rows, f"{n} masks of {args.split}, guidance {w:g}{interval}").save(args.out / "curve.png")
    sheet = []
    for i in range(min(3, n)):
        painted = pairs.colorbook.paint(planes[i, 3].numpy())
        for sampler in args.samplers:
            sheet.append([painted, *(shown[sampler, steps][i] for steps in args.steps), shown["ddim", T][i]])
    contact_sheet(sheet, ["mask", *map(str, args.steps), f"DDIM {T}"]).save(args.out / "sheet.png")
    print(f"{args.out}: steps.csv, curve.png, sheet.png (a row for each of {', '.join(args.samplers)})")


def draw_curves(rows, caption):
    """Distance, and mean IoU where it was measured, over the steps: a PIL image with logarithmic axes."""
    side, left, top, bottom = 440, 60, 60, 56
    panels = {"distance": "difference to DDIM with all steps, grey levels of 255"}
    if "mean_iou" in rows[0]:
        panels["mean_iou"] = "mean IoU of the segmenter with the masks"
    image = Image.new("RGB", (len(panels) * (side + left + 30), side + top + bottom), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    draw.text((8, 6), caption, "black", font)
    x = 16 + draw.textlength(caption, font)
    for name, color in SAMPLERS.items():
        draw.text((x, 6), name, color, font)
        x += 12 + draw.textlength(name, font)
    counts = sorted({row["steps"] for row in rows[1:] if row["sampler"] in SAMPLERS})
    lowest, highest = math.log(counts[0]), math.log(counts[-1])

    for panel, (key, title) in enumerate(panels.items()):
        points = []  # the reference, rows[0], has distance 0 and is no point of a curve
        for row in rows[1:]:
            if key in row and float(row[key]) > 0:
                points.append((row["sampler"], row.get("steps"), float(row[key])))
        values = [value for _, _, value in points]
        if key == "distance":
            scale = math.log
            ticks = [m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5)]
            ticks = [tick for tick in ticks if min(values) / 2.5 < tick < 2.5 * max(values)]
        else:
            scale = float
            ticks = [i / 20 for i in range(21) if min(values) - 0.05 < i / 20 < max(values) + 0.05]
        x_left = left + panel * (side + left + 30)

        def at_x(steps):
            return x_left + (side * (math.log(steps) - lowest) / (highest - lowest) if highest > lowest else side / 2)

        def at_y(value):
            span = scale(ticks[-1]) - scale(ticks[0])
            return top + side - (side * (scale(value) - scale(ticks[0])) / span if span else side / 2)

        draw.text((x_left, 30), title, "black", font)
        for tick in ticks:
            draw.line([(x_left, at_y(tick)), (x_left + side, at_y(tick))], "#dddddd")
            draw.text((x_left - 6, at_y(tick)), f"{tick:g}", "black", font, anchor="rm")
        for steps in counts:
            draw.text((at_x(steps), top + side + 6), str(steps), "black", font, anchor="mt")
        draw.text((x_left + side / 2, top + side + 26), "steps", "black", font, anchor="mt")
        for name, color in SAMPLERS.items():
            path = [(at_x(steps), at_y(value)) for sampler, steps, value in points if sampler == name]
            draw.line(path, color, 2)
            for x, y in path:
                draw.ellipse([x - 4, y - 4, x + 4, y + 4], color)
        for name, _, value in points:
            if name in LEVELS:
                draw.line([(x_left, at_y(value)), (x_left + side, at_y(value))], LEVELS[name], 2)
                draw.text((x_left + side - 6, at_y(value) - 2), name, LEVELS[name], font, anchor="rb")
    return image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path("runs/toy/checkpoint.pt"), help="default: %(default)s")
    add("--split", default="test", help="default: %(default)s")
    add("--n", type=int, default=32, help="masks; default: %(default)s")
    add("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS), help="default: all of them")
    add("--steps", type=int, nargs="+", default=[3, 5, 10, 20, 50, 100, 200], help="default: 3 5 10 20 50 100 200")
    add("--guidance", type=float, help="default: the checkpoint's")
    add("--guidance-interval", type=float, nargs=2, default=[], metavar="NOISE", help="lowest and highest noise level")
    add("--segmenter", help="the judge: a checkpoint of experiments/segmenter.py, or a Mask2Former")
    add("--out", type=Path, default=Path("runs/steps"), help="default: %(default)s")
    command(compare, parser.parse_args())


if __name__ == "__main__":
    main()
