"""Images of masks by the networks of experiments: files as sample.py writes them, the rows of a table, and a judge."""

import json
import time

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import autocast, pick_precision, replacing
from dataset import to_uint8
from ddpm import guided_eps, noise_like_seeds, sample
from evaluate import in_batches, load_segmenter, measure_features, measure_masks, resample
from sample import draw_sheet, file_of, plan, save, settings_of

AT_ONCE = 16  # images in a batch
DPM_SOLVER = {"sampler": "dpm_solver", "guidance_interval": [], "eta": 0.0}  # of sample.plan()'s settings
FRECHET = "Frechet distance, segmenter features"
JUDGED = {"pixel accuracy": "pixel accuracy: generated / mask", "mean IoU": "mean IoU: generated / mask",
          "share of the ceiling": "share of the ceiling: mean IoU", "Frechet distance": FRECHET,
          "its floor": f"{FRECHET}, floor"}  # column: evaluate.py's name

# -------------------------------------------------------------------------------------------------------- images


def draw_images(net, diffusion, planes, seeds, guidance, steps):
    """Images (B, H, W, 3) uint8 of the condition planes (B, C, H, W) of a UNet, by DPM-Solver++."""
    noise = noise_like_seeds(seeds, (3, *planes.shape[2:]), planes.device)
    return to_uint8(sample(guided_eps(net, diffusion, planes, guidance), noise, diffusion.alpha_bar, steps=steps))


def draw_missing(jobs, masks, draw, out, device):
    """Save the images of jobs that are not in `out` with the same settings; returns how many, and the seconds for them.

    draw(ids, seeds, guidance) gives images (B, H, W, 3) uint8 of ids (B, H, W) uint8.
    """
    todo = [job for job in jobs if settings_of(file_of(job, out)) != json.dumps(job)]
    out.mkdir(parents=True, exist_ok=True)
    batches = []
    for guidance in dict.fromkeys(job["guidance"] for job in todo):
        of_this_guidance = [job for job in todo if job["guidance"] == guidance]
        for first in range(0, len(of_this_guidance), AT_ONCE):
            batches.append(of_this_guidance[first : first + AT_ONCE])
    started = time.monotonic()
    for batch in tqdm(batches, str(out), unit="batch", disable=not batches):
        ids = torch.stack([torch.from_numpy(masks[job["mask"]]) for job in batch])
        with torch.no_grad(), autocast(batch[0]["precision"], device):
            images = draw(ids.to(device), [job["seed"] for job in batch], batch[0]["guidance"])
        for job, image in zip(batch, images):
            save(job, image, out)
    return len(todo), time.monotonic() - started


def draw_jobs(args, state, masks, colorbook, draw, out, device, more):
    """args.n images of each mask {stem: ids} at each of args.guidance, and sheet.png of them all; returns their jobs.

    draw is that of draw_missing(); args has mask, seed and steps too; state is the checkpoint, with its path; more goes
    into the settings in each file.
    """
    settings = DPM_SOLVER | {"mask": args.mask, "n": args.n, "seed": args.seed, "guidances": args.guidance,
                             "steps": args.steps, "precision": pick_precision("auto", device)}
    jobs = [job | more for job in plan(state, settings, masks)]
    drawn, _ = draw_missing(jobs, masks, draw, out, device)
    draw_sheet(jobs, masks, colorbook, out).save(out / "sheet.png")
    print(f"{len(jobs)} images, {drawn} of them new: {out / 'sheet.png'}")
    return jobs


# -------------------------------------------------------------------------------------------------------- the table


class Results:
    """The rows of a study in a JSON file: {name: {"settings": what it is made from, "cost", "columns"}}.

    "columns" are what the table shows; a row without them is not finished.
    """

    def __init__(self, file):
        self.file = file
        self.rows = json.loads(file.read_text()) if file.exists() else {}

    def begin(self, name, settings):
        """The row of that name, from the file or new. ValueError where it was begun with other settings."""
        row = self.rows.setdefault(name, {"settings": settings})
        changed = [f"{key} was {row['settings'].get(key)!r}, is {settings.get(key)!r}"
                   for key in (row["settings"] | settings) if row["settings"].get(key) != settings.get(key)]
        if changed:
            raise ValueError(f"{self.file}: the row {name!r} was made with other settings: {'; '.join(changed)}. "
                             f"Rename {self.file.parent}, or delete this file and the images beside it")
        self.save()
        return row

    def save(self):
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as opened:
            opened.write(json.dumps(self.rows, indent=1).encode())


# -------------------------------------------------------------------------------------------------------- the judge


def interval(values):
    """ "value [95 % interval]" of a number and its draws (1 + R,)."""
    low, high = torch.nanquantile(values[1:], values.new_tensor([0.025, 0.975])).tolist()
    return f"{values[0]:.3g} [{low:.3g}, {high:.3g}]"


def load_judge(path, colorbook, size, device):
    """evaluate.load_segmenter(), or None without a path; says where the judge was trained on images of another size."""
    segment = load_segmenter(path, colorbook, device) if path else None
    if segment and segment.image_size not in (None, list(size)):
        print("{} was trained on images of {}x{}; in these, of {}x{}, it sees less".format(
            path, *segment.image_size, *size))
    return segment


def make_judge(segment, ids, real, train, names):
    """The function from generated images of ids to judge_columns(); what it sees in real images is seen once."""
    n = len(real)
    in_real = in_batches(segment, real, "segmenter").numpy()
    with_features = segment.features and n > 1
    floor = {}
    if with_features and len(train) >= n:
        some = np.random.default_rng(0).choice(len(train), n, replace=False)
        unpaired = resample(n, n, None)
        distance = measure_features(real, train[some], None, unpaired, segment.features)
        floor = {f"{FRECHET}, floor": distance[FRECHET]}

    def judge(generated):
        counts = resample(n, n, np.arange(n))
        in_generated = in_batches(segment, generated, "segmenter").numpy()
        numbers = floor | measure_masks(ids, in_real, in_generated, counts[1], names)
        if with_features:
            numbers |= measure_features(real, generated, None, counts, segment.features)
        return {column: interval(numbers[name]) if name in numbers else "-" for column, name in JUDGED.items()}

    return judge


def judge_columns(segment, ids, real, generated, train, names):
    """Is the mask obeyed, and are the images like real ones? {column: interval}, "-" for what this judge cannot tell.

    ids (N, H, W), real and generated (N, H, W, 3) images of them, train (M, H, W, 3) for the floor.
    """
    return make_judge(segment, ids, real, train, names)(generated)
