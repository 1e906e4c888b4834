"""What experiments with networks of masks of their own do after training: images as sample.py makes them, and numbers
as evaluate.py has them.
"""

import json

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import pick_precision
from dataset import to_uint8
from ddpm import guided_eps, noise_like_seeds, sample
from evaluate import in_batches, load_segmenter, measure_features, measure_masks, resample
from experiments.training import autocast
from sample import draw_sheet, file_of, plan, save, settings_of

AT_ONCE = 16  # images in a batch
JUDGED = {"pixel accuracy": "pixel accuracy: generated / mask", "mean IoU": "mean IoU: generated / mask",
          "share of the ceiling": "share of the ceiling: mean IoU",
          "Frechet distance": "Frechet distance, segmenter features",
          "its floor": "Frechet distance, segmenter features, floor"}  # column: evaluate.py's name


def draw_images(net, diffusion, planes, seeds, guidance, steps):
    """Images (B, H, W, 3) uint8 of the condition planes (B, C, H, W) of a UNet, by DPM-Solver++."""
    noise = noise_like_seeds(seeds, (3, *planes.shape[2:]), planes.device)
    return to_uint8(sample(guided_eps(net, diffusion, planes, guidance), noise, diffusion.alpha_bar, steps=steps))


def draw_in_batches(draw, planes, seeds, device, title):
    """Images (N, H, W, 3) uint8 by draw(planes, seeds), on the device, of planes (N, C, H, W) and N seeds."""
    images = []
    for part in tqdm(torch.arange(len(planes)).split(AT_ONCE), title, unit="batch"):
        images.append(draw(planes[part].to(device), [seeds[i] for i in part]))
    return np.concatenate(images)


def draw_jobs(args, state, masks, colorbook, draw, out, device, more):
    """Files of masks {stem: ids} at each of args.guidance, where they are not there with the same settings.

    draw(ids, seeds, guidance) gives images (B, H, W, 3) uint8 of ids (B, H, W) uint8; args has mask, n, seed, steps
    and guidance, a list; state is the checkpoint, with its path; more goes into the settings in each file. Returns the
    jobs, as sample.plan() has them; sheet.png shows them all.
    """
    settings = {"mask": args.mask, "n": args.n, "seed": args.seed, "guidances": args.guidance, "guidance_interval": [],
                "eta": 0.0, "sampler": "dpm_solver", "steps": args.steps, "precision": pick_precision("auto", device)}
    jobs = [job | more for job in plan(state, settings, masks)]
    todo = [job for job in jobs if settings_of(file_of(job, out)) != json.dumps(job)]
    out.mkdir(parents=True, exist_ok=True)
    for w in args.guidance:
        of_this_guidance = [job for job in todo if job["guidance"] == w]
        for first in tqdm(range(0, len(of_this_guidance), AT_ONCE), f"guidance {w:g}", unit="batch"):
            batch = of_this_guidance[first : first + AT_ONCE]
            ids = torch.stack([torch.from_numpy(masks[job["mask"]]) for job in batch])
            with autocast(settings["precision"], device):
                images = draw(ids.to(device), [job["seed"] for job in batch], w)
            for job, image in zip(batch, images):
                save(job, image, out)
    draw_sheet(jobs, masks, colorbook, out).save(out / "sheet.png")
    print(f"{len(jobs)} images, {len(todo)} of them new: {out / 'sheet.png'}")
    return jobs


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


def judge_columns(segment, ids, real, generated, train, names):
    """Is the mask obeyed, and are the images like real ones? {column: interval}, "-" for what this judge cannot tell.

    ids (N, H, W), real and generated (N, H, W, 3) images of them, train (M, H, W, 3) for the floor.
    """
    counts = resample(len(real), len(generated), np.arange(len(real)))
    seen = [in_batches(segment, images, "segmenter").numpy() for images in (real, generated)]
    numbers = measure_masks(ids, *seen, counts[1], names)
    if segment.features and len(real) > 1:
        numbers |= measure_features(real, generated, train, counts, segment.features)
    return {column: interval(numbers[name]) if name in numbers else "-" for column, name in JUDGED.items()}
