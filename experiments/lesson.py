"""The lesson: how mask-guided diffusion works, drawn from any checkpoint by the public functions of the project.

    python -m experiments.lesson --checkpoint runs/toy/checkpoint.pt
    python -m experiments.lesson --checkpoint runs/idd_lite/checkpoint.pt --mask my.png --image photo.jpg

Draws, as lesson_*.png: the noise schedules; the forward process on a scene; the reverse process step by step, as the
samplers show it to `observe`; one noise at four strengths of guidance; few steps beside all of them; the network, with
the shapes that its own modules report. The noise of an image depends on its seed alone: 1, 2, 3. A checkpoint of 64x64
and width 32 takes about 4 minutes on two cores, nearly all of it for the 1000 steps of DDIM and DDPM.
"""

import argparse
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from checkpoint import build, load_checkpoint, pick_device, pick_precision
from config import command
from data.toy.prepare import scene
from dataset import contact_sheet, fit, read_image, to_uint8
from ddpm import guided_eps, make_betas, noise_like_seeds, sample
from masks import Colorbook, one_hot, read_mask

SEEDS, SCENE = (1, 2, 3), 24
COLORS = {"thesis": "#1f4e9e", "linear": "#c0392b", "nichol": "#2e8b57"}  # of the schedules
BLUE, PURPLE, GREEN, GREY, ORANGE = "#dbe7f6", "#eadcf2", "#dcefdc", "#eeeeee", "#f3b562"
BOXES = {  # of the drawing of the network, by name: column, row, colour, what it is or does
    "mask": (0, 0, GREY, "one-hot"), "mask_stem": (1, 0, BLUE, "DoubleConv"),
    "x_t": (0, 1, GREY, "noisy image"), "image_stem": (1, 1, BLUE, "DoubleConv"), "x1": (2, 1, GREY, "image"),
    "down1": (2, 2, BLUE, "halve, convolve"), "down2": (2, 3, BLUE, "halve, convolve"),
    "down3": (2, 4, BLUE, "halve, convolve"), "bottleneck": (3, 4, PURPLE, "3 DoubleConv"),
    "up1": (4, 3, GREEN, "double, join, convolve"), "up2": (4, 2, GREEN, "double, join, convolve"),
    "up3": (4, 1, GREEN, "double, join, convolve"), "out": (4, 0, GREEN, "Conv 1x1"),
    "t": (0, 3, GREY, "time step"), "time_embedding": (1, 3, ORANGE, "sines and cosines")}
ENTERING = {"image_stem": ["x_t"], "mask_stem": ["mask"], "down1": ["x1", "time_embedding"]}  # boxes before a part
PATHS = ["mask mask_stem x1", "x_t image_stem x1 down1 down2 down3 bottleneck up1 up2 up3 out",
         "x1 up3", "down1 up2", "down2 up1", "t time_embedding"]  # an arrow from each box to the next


def load(args):
    """What the images are drawn from: the network with its averaged weights, the diffusion, a mask, and a scene."""
    state = load_checkpoint(args.checkpoint)
    cfg, device = state["config"], pick_device("auto")
    cfg["train"]["precision"] = pick_precision(cfg["sample"]["precision"], device)
    colorbook = Colorbook(state["colorbook"], source=state["path"])
    model, diffusion, autocast = build(cfg, len(colorbook), device)
    model.load_state_dict(state["ema"])
    model.eval()
    size, mask, painted = tuple(cfg["data"]["size"]), None, None
    if model.num_classes:
        ids = fit(read_mask(args.mask, colorbook)[0], size)
        mask, painted = one_hot(torch.from_numpy(ids)[None].to(device), len(colorbook)), colorbook.paint(ids)
    image = fit(read_image(args.image), size) if args.image else scene(SCENE, size)[0]
    return SimpleNamespace(model=model, diffusion=diffusion, autocast=autocast, device=device, size=size, mask=mask,
                           painted=painted, image=image, settings=cfg["diffusion"], steps=min(20, diffusion.T),
                           guidance=cfg["sample"]["guidance"] if model.num_classes else 0.0)


def generate(run, seeds, sampler, steps, guidance, observe=lambda *state: None):
    """Images (B, H, W, 3) uint8 of the mask, one per seed, and how many passes of the network each of them took."""
    passes = []
    counter = run.model.image_stem.register_forward_hook(lambda module, inputs, out: passes.append(len(out)))
    mask = None if run.mask is None else run.mask.expand(len(seeds), -1, -1, -1)
    noise = noise_like_seeds(seeds, (3, *run.size), run.device)
    with run.autocast(), tqdm(total=steps, desc=f"{sampler}, w = {guidance:g}", unit="step", leave=False) as bar:
        eps_fn = guided_eps(run.model, run.diffusion, mask, guidance)
        x = sample(eps_fn, noise, run.diffusion.alpha_bar, sampler, steps,
                   observe=lambda *state: (bar.update(), observe(*state)))
    counter.remove()
    return to_uint8(x), sum(passes) // len(seeds)


def grid(rows, columns, labels, caption):
    """Rows of (H, W, 3) uint8 images with a title over each column, a label beside each row, and a caption on top."""
    sheet, font = contact_sheet(rows), ImageFont.load_default(15)
    sizes = {text: ImageDraw.Draw(sheet).multiline_textbbox((0, 0), text, font)[2:]
             for text in (caption, *columns, *labels)}
    titles = 24 + sizes[caption][1]
    left, top = 16 + max(sizes[text][0] for text in labels), titles + 6 + max(sizes[text][1] for text in columns)
    image = Image.new("RGB", (max(left + sheet.width, 24 + sizes[caption][0]), top + sheet.height), "white")
    image.paste(sheet, (left, top))
    pen, cell_w, cell_h = ImageDraw.Draw(image), sheet.width / len(columns), sheet.height / len(rows)
    pen.multiline_text((8, 8), caption, "black", font)
    for c, text in enumerate(columns):
        pen.multiline_text((left + (c + .5) * cell_w, titles), text, "black", font, anchor="ma", align="center")
    for r, text in enumerate(labels):
        pen.multiline_text((left - 4, top + (r + .5) * cell_h), text, "black", font, anchor="rm", align="right")
    return image


# ------------------------------------------------------------------------------------------------ the lesson


def draw_schedules(run):
    """alpha_bar_t = (1 - beta_1) ... (1 - beta_t) (DDPM, section 2), for three choices of beta."""
    s, T, width, height, low = run.settings, run.diffusion.T, 800, 540, 670
    betas = {name: make_betas(name, T, s["beta_start"], s["beta_end"]) for name in COLORS}
    levels = {name: (1 - beta).cumprod(0) for name, beta in betas.items()}
    panels = [("beta: the variance of the noise added at step t", 130, 1.25 * s["beta_end"], list(betas.items())),
              ("what is left of the image, sqrt(alpha_bar), falls;\nthe noise in it, sqrt(1 - alpha_bar), rises", 1130,
               1, [(name, curve.sqrt()) for name, abar in levels.items() for curve in (abar, 1 - abar)])]
    image = Image.new("RGB", (2000, 900), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(30)
    for title, left, highest, curves in panels:
        pen.multiline_text((left, 20), title, "black", font)
        for i in range(6):
            x, y = left + i * width / 5, low - i * height / 5
            pen.line([(left, y), (left + width, y)], "#dddddd" if i else "black", 2)
            pen.text((left - 14, y), f"{highest * i / 5:.3g}", "black", font, anchor="rm")
            pen.line([(x, low), (x, low + 10)], "black", 2)
            pen.text((x, low + 16), f"{T * i / 5:g}", "black", font, anchor="ma")
        pen.text((left + width / 2, low + 60), "time step t", "black", font, anchor="ma")
        for name, curve in curves:
            points = [(left + t * width / T, low - v * height / highest)
                      for t, v in enumerate(curve.tolist()) if v <= highest]
            pen.line(points, COLORS[name], 8 if name == s["schedule"] else 4, "curve")
    for i, (name, color) in enumerate(COLORS.items()):
        own = name == s["schedule"]
        pen.line([(130 + 630 * i, 810), (200 + 630 * i, 810)], color, 8 if own else 4)
        text = f"{name}, last beta {betas[name][-1]:.3g}" + "\nthat of this checkpoint" * own
        pen.multiline_text((220 + 630 * i, 792), text, "black", font)
    return image.reduce(2).quantize(64)


def draw_forward(run):
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, eps ~ N(0, I) (DDPM, equation 4), from one eps."""
    T = run.diffusion.T
    times = sorted({min(round(share * T), T - 1) for share in (0, .05, .15, .3, .5, .7, 1)})
    t = torch.tensor(times, device=run.device)
    x0 = (torch.from_numpy(run.image) / 127.5 - 1).permute(2, 0, 1).to(run.device)
    eps = noise_like_seeds(SEEDS[:1], (3, *run.size), run.device)()
    x = run.diffusion.q_sample(x0, t, eps)
    titles = [f"t = {time}\n{a:.3f} x_0\n+ {s:.3f} eps"
              for time, a, s in zip(times, *(c.flatten().tolist() for c in run.diffusion.coefficients(t)))]
    return grid([to_uint8(x)], titles, ["x_t"], "The forward process: x_t = sqrt(alpha_bar_t) x_0 + "
                "sqrt(1 - alpha_bar_t) eps, from an image to noise in one line")


def draw_reverse(run):
    """x_0 = (x_t - sqrt(1 - alpha_bar_t) eps_theta(x_t, t)) / sqrt(alpha_bar_t), clipped, at steps of a sampler."""
    seen = []
    generate(run, SEEDS[:1], "dpm_solver", run.steps, run.guidance, lambda *state: seen.append(state))
    shown = [seen[i] for i in dict.fromkeys(np.linspace(0, run.steps - 1, 6).round().astype(int).tolist())]
    titles = [f"t = {t}" for t, *_ in shown]
    columns = [[to_uint8(x)[0] for x in state] for _, *state in shown]
    if run.mask is not None:
        blank = np.full_like(run.painted, 255)
        titles.insert(0, "mask")
        columns.insert(0, [run.painted, blank, blank])
    labels = ["x_t", "predicted\nnoise eps", "predicted\nx_0"]
    return grid(list(zip(*columns)), titles, labels, f"The reverse process: {len(shown)} of {run.steps} steps of "
                f"DPM-Solver++, guidance {run.guidance:g}. The last x_0 is the image")


def draw_guidance(run):
    """eps = eps_u + w (eps_c - eps_u) (Ho and Salimans 2022, whose w is ours minus 1), from the same noise."""
    images = [generate(run, SEEDS, "dpm_solver", run.steps, w)[0] for w in (0, 1, 2, 5)]
    titles = ["mask", "w = 0\nwithout mask", "w = 1\nwith mask", "w = 2\nbeyond it", "w = 5\nfar beyond it"]
    return grid([[run.painted, *row] for row in zip(*images)], titles, [f"seed {seed}" for seed in SEEDS],
                f"Guidance: eps = eps_u + w (eps_c - eps_u), the same noise in a row, {run.steps} steps")


def draw_samplers(run):
    """x_T to x_0 by few large steps (Lu et al. 2022, Song et al. 2021) and by all T (DDPM, Algorithm 2)."""
    T, names = run.diffusion.T, {"dpm_solver": "DPM-Solver++", "ddim": "DDIM", "ddpm": "DDPM"}
    todo = [("dpm_solver", 5), ("dpm_solver", 10), ("dpm_solver", 20), ("ddim", 10), ("ddim", 20), ("ddim", T)]
    todo = list(dict.fromkeys((sampler, min(steps, T)) for sampler, steps in todo)) + [("ddpm", T)]
    made = {key: generate(run, SEEDS, *key, run.guidance) for key in todo}
    titles, reference = [], made["ddim", T][0].astype(float)
    for (sampler, steps), (images, passes) in made.items():
        distance = np.sqrt(((images - reference) ** 2).mean(axis=(1, 2, 3))).mean()
        titles.append(f"{names[sampler]}\n{steps} steps\n{passes} passes\noff by {distance:.1f}")
        print(titles[-1].replace("\n", ", "))
    return grid(list(zip(*(images for images, _ in made.values()))), titles, [f"seed {seed}" for seed in SEEDS],
                f"The same noise in a row, guidance {run.guidance:g}: passes of the network for one image, and how far "
                f"it is from DDIM with all\n{T} steps (root mean square, grey levels of 0 to 255). DDPM adds new noise "
                "at every step: another image")


def read_shapes(run):
    """{box: shape (C, H, W)} of what enters and leaves the parts of the network, as hooks see it in one pass."""
    shapes, hooks = {"t": ()}, []
    for name, part in run.model.named_children():
        if list(part.parameters()):  # not of the nn.Identity where there is no attention
            def note(part, entering, leaving, name=name):
                shapes[name] = leaving.shape[1:]
                shapes.update((box, x.shape[1:]) for box, x in zip(ENTERING.get(name, ()), entering))

            hooks.append(part.register_forward_hook(note))
    with torch.no_grad():
        run.model(torch.zeros(1, 3, *run.size, device=run.device), torch.zeros(1, device=run.device), run.mask)
    for hook in hooks:
        hook.remove()
    return shapes


def draw_network(run):
    """eps_theta(x_t, t, c), the U-Net of unet.py (Bozsó 2023, section 4.2): every shape is from read_shapes()."""
    shapes = read_shapes(run)
    boxes = {name: list(box) for name, box in BOXES.items() if name in shapes}
    boxes["out"][3] += f": {run.diffusion.prediction}"
    if run.mask is not None:
        boxes["x1"][3] += " + mask"
    if "attention1" in shapes:
        boxes["down3"][3] += ",\nattention1"
        boxes["up1"][3] += ",\nattention2"

    image = Image.new("RGB", (2000, 1130), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(28)
    middle = {name: (200 + 400 * column, 110 + 230 * row) for name, (column, row, *_) in boxes.items()}
    for start, end in chain.from_iterable(pairwise(path.split()) for path in PATHS):
        if start not in boxes:
            continue
        (x0, y0), (x1, y1) = middle[start], middle[end]
        down = (y1 > y0) - (y1 < y0)  # 1 down, -1 up, 0 to the right
        tip, angle = ((x1, y1 - 92 * down), 90 + 90 * down) if down else ((x1 - 182, y1), 270)
        pen.line([(x0, y0), (x1, y0), (x1, y1)], "black", 4)  # to the right, then up or down; the boxes cover its ends
        pen.regular_polygon((*tip, 18), 3, angle, "black")
        if x1 - x0 > 400 and not down:
            pen.text((x0 + 400, y0 - 10), "skip connection", "black", font, anchor="ms")
    for name, (_, _, fill, what) in boxes.items():
        x, y = middle[name]
        text = f"{name}\n{what}\n" + " x ".join(map(str, shapes[name]))
        pen.rounded_rectangle([x - 170, y - 80, x + 170, y + 80], 16, fill, "black", 3)
        pen.multiline_text((x, y), text.strip(), "black", font, anchor="mm", align="center")
        if name.startswith(("down", "up")):
            pen.ellipse([x - 194, y - 104, x - 146, y - 56], ORANGE, "black", 3)
            pen.text((x - 170, y - 80), "t", "black", font, anchor="mm")
    total = sum(w.numel() for w in run.model.parameters())
    pen.multiline_text((30, 950), "Shapes are channels x height x width.\nt on a corner: the time embedding, after\n"
                       f"SiLU and Linear, is added.\n{total:,} weights in all", "black", font)
    return image.reduce(2).quantize(64)


def lesson(args):
    """Draw everything. Raises ValueError or OSError for what the user can fix."""
    run = load(args)
    print(f"seeds {', '.join(map(str, SEEDS))} of the noise" + f", {SCENE} of the scene" * (not args.image))
    args.out.mkdir(parents=True, exist_ok=True)
    for draw in draw_schedules, draw_network, draw_forward, draw_reverse, draw_guidance, draw_samplers:
        if draw is draw_guidance and run.mask is None:
            print(f"{args.checkpoint} was trained without masks: no guidance to draw, and no mask in the other images")
            continue
        path = args.out / f"{draw.__name__.replace('draw', 'lesson')}.png"
        draw(run).save(path, optimize=True)
        print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--mask", default="data/hand_drawn.png", help="default: %(default)s")
    parser.add_argument("--image", help="of the forward process; default: a drawn toy scene")
    parser.add_argument("--out", type=Path, default=Path("out/lesson"), help="folder; default: %(default)s")
    command(lesson, parser.parse_args())


if __name__ == "__main__":
    main()
