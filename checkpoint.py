"""Build, save, load."""

import os
import pickle
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from config import SETTINGS, checked, flatten
from ddpm import Diffusion
from masks import Colorbook
from unet import UNet

FORMAT = 1  # of checkpoints: one more when an older program could not read a new one


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no CUDA device: set device=cpu, or check driver and torch build")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def join_processes(device):
    """(rank, number of processes), joined into a group where torchrun started them; only the first of them prints."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), ranks


def build(cfg, num_classes, device):
    """What a config describes, on the device: the network, the diffusion, and a function that opens autocast."""
    m, precision = cfg["model"], cfg["train"]["precision"]
    model = UNet(num_classes if m["conditional"] else 0, m["hidden_dim"], m["emb_dim"], m["attention"])
    model.to(device, memory_format=torch.channels_last)  # the layout that convolutions are fastest in
    half = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    return model, Diffusion(**cfg["diffusion"]).to(device), lambda: torch.autocast(device.type, half, half is not None)


@contextmanager
def replacing(path):
    """A binary file that takes the name `path` when it is complete and on the disk; whatever goes wrong leaves `path` as it was."""
    side = path.with_name(path.name + ".partial")
    try:
        with open(side, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(side, path)
    except BaseException:
        side.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the folder too, or a power cut may undo the renaming
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def save_checkpoint(path, state):
    """Write to a side file, sync, rename; the checkpoint before it stays as *.previous.

    Whatever happens, a whole checkpoint stands under one of the two names. OSError where it cannot be written.
    """
    side = path.with_name(path.name + ".partial")
    try:
        with open(side, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer has a RuntimeError for a full disk
        side.unlink(missing_ok=True)
        raise OSError(f"{path} could not be saved: {error}. The one saved before is untouched") from error
    if path.exists():
        os.replace(path, path.with_name(path.name + ".previous"))
    os.replace(side, path)


def read_checkpoint(path):
    """The dict that save() in train() wrote, on the CPU; nothing in the file is executed.

    FileNotFoundError, or a ValueError that names the file for one that is damaged, of another program or a newer version, or
    whose weights do not fit its own config and colorbook.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; `python train.py` without --resume makes one, `sample.py --checkpoint FILE` names another")
    expected = "expected a whole checkpoint.pt that train.py has written"
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the check sums
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: not loaded: it holds more than tensors, numbers and texts, and that could run a program; "
                         + expected) from error
    except Exception as error:  # torch and zipfile raise many kinds for a file that is no checkpoint
        reason = "it is cut off or of another kind" if isinstance(error, zipfile.BadZipFile) else str(error).partition("\n")[0]
        raise ValueError(f"{path}: not readable as a checkpoint: {reason}; {expected}") from error
    state = state if isinstance(state, dict) else {}
    if isinstance(state.get("format"), int) and state["format"] > FORMAT:
        raise ValueError(f"{path}: written by a newer version of this program (format {state['format']}, this one knows "
                         f"{FORMAT}): update the program")
    parts = dict.fromkeys(("model", "ema", "optimizer", "scaler", "rng", "config", "colorbook"), dict)
    parts |= {"step": int, "seconds": (int, float)}
    wrong = [key for key, kind in parts.items() if not isinstance(state.get(key), kind)]
    if wrong:
        raise ValueError(f"{path}: not a checkpoint of this project: {', '.join(wrong)} missing or of another kind; {expected}")

    config = flatten(state["config"])
    for key in config.keys() & flatten(SETTINGS).keys():
        checked(key, config[key], f"{path}, its config")
    needed = {key for key in flatten(SETTINGS) if key.startswith(("model.", "diffusion.", "data.size", "train.precision"))}
    if needed - config.keys():
        raise ValueError(f"{path}: its config lacks {', '.join(sorted(needed - config.keys()))}; {expected}")
    try:
        colorbook = Colorbook(state["colorbook"])
        model, _, _ = build(state["config"], len(colorbook), torch.device("meta"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its config or colorbook is of no use: {error}") from error
    shapes = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    for part in ("model", "ema"):
        found = {key: tuple(getattr(weight, "shape", ())) for key, weight in state[part].items()}
        odd = [key for key in shapes | found if shapes.get(key) != found.get(key)]
        if odd:
            raise ValueError(f"{path}: its weights ({part}) are not of the network that its config and {len(colorbook)} "
                             f"classes describe: {odd[0]} is {found.get(odd[0], 'missing')}, expected {shapes.get(odd[0], 'none')}"
                             + (f", and {len(odd) - 1} more" if len(odd) > 1 else ""))
    return state


def load_checkpoint(path):
    """read_checkpoint() of `path`, or, where that is damaged or gone, of the one saved before it, which is said."""
    path = Path(path)
    previous = path.with_name(path.name + ".previous")
    try:
        return read_checkpoint(path)
    except (ValueError, OSError) as error:
        if not previous.is_file():
            raise
        state = read_checkpoint(previous)
        print(f"{error}\n{previous}: used instead, step {state['step']}")
        return state
