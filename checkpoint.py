"""From a config to a network, and from a run to a file and back.

    model, diffusion, autocast = build(cfg, num_classes, device)
    save_checkpoint(path, {"model": ..., "ema": ..., "config": cfg, "colorbook": classes, ...})
    state = load_checkpoint(path)

A checkpoint is one file of tensors and plain values: model, ema, optimizer, scaler, rng, step, images, seconds, config,
colorbook; ema, step, config and colorbook are enough to sample from. It is read with weights_only=True, so nothing in
it is executed.
"""

import itertools
import os
import pickle
import sys
import zipfile
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from config import flatten, load_config
from ddpm import Diffusion
from masks import Colorbook
from unet import UNet

FORMAT = 1  # one more when an older program could not read a new checkpoint


class NewerFormat(ValueError):
    """A checkpoint that is not damaged, but written by a newer version of this program."""


# ------------------------------------------------------------------------------------------------------ build


def pick_device(name):
    """The torch.device of "cuda", "mps" or "cpu", or of "auto": the first of them there is.

    Where torchrun started several processes, each gets a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no CUDA device: set device=cpu, or check driver and torch")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is mps, but torch sees no GPU of Apple: set device=cpu")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def join_processes(device):
    """(rank, number of processes); where torchrun started several they form a group, and only the first one prints."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # a process may wait for hours while another reads the data; torchrun ends all of them when one dies
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), ranks


def pick_precision(name, device):
    """The precision that "auto" stands for on this device, printed with the reason; any other name as it is."""
    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            print("fp16 is slow on a CPU and no gain there: take auto")
        return name
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name, why = "fp16", "this GPU does not multiply bf16"
    elif device.type == "cuda":
        name, why = "bf16", "this GPU multiplies it"
    else:  # torch before 2.13 has no public query
        has = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        native = [feature for feature in ("amx_bf16", "avx512_bf16") if has.get(feature)]
        name = "bf16" if native else "fp32"
        why = f"this CPU has {native[0]}" if native else f"torch names no bf16 instructions of this {device.type}"
    print(f"precision {name}: {why}")
    return name


def autocast(precision, device):
    """The context in which networks compute at "bf16" or "fp16"; any other name is fp32."""
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    return torch.autocast(device.type, half, enabled=half is not None)


def build(cfg, num_classes, device, precision=None):
    """What a config describes, on the device: the network, the diffusion, and a function that opens autocast.

    precision is a name that pick_precision() gave; by default that of train.precision. "auto" itself is fp32 here.
    """
    m, precision = cfg["model"], precision or cfg["train"]["precision"]
    model = UNet(num_classes if m["conditional"] else 0, m["hidden_dim"], m["emb_dim"], m["attention"])
    model.to(device, memory_format=torch.channels_last)  # the layout that convolutions are fastest in
    return model, Diffusion(**cfg["diffusion"]).to(device), partial(autocast, precision, device)


# ------------------------------------------------------------------------------------------------------- save


@contextmanager
def replacing(path, keep_previous=False):
    """A binary file that takes the name `path` once it is complete and on the disk; an error before that removes it.

    keep_previous=True renames what stood there to *.previous.
    """
    path = Path(path)
    side = path.with_name(path.name + ".partial")
    try:
        with open(side, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            os.replace(path, path.with_name(path.name + ".previous"))
        os.replace(side, path)
    except BaseException:
        side.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the folder too, or a power cut could undo the renaming
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def save_checkpoint(path, state):
    """Write a checkpoint; at every moment a complete one is `path` or *.previous. OSError: it cannot be written."""
    try:
        with replacing(path, keep_previous=True) as file:
            torch.save(state | {"format": FORMAT}, file)
    except (OSError, RuntimeError) as error:  # torch's writer has a RuntimeError for a full disk
        raise OSError(f"{path} could not be saved: {error}; is the disk full? The one before is untouched") from error


# ------------------------------------------------------------------------------------------------------- load


def read_archive(path):
    """What torch.save() wrote, on the CPU. Check sums are compared, nothing is executed; many kinds of errors."""
    with zipfile.ZipFile(path) as archive:  # torch does not look at the check sums
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{damaged} in it is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path):
    """The dict that train.py saved, on the CPU, its config completed; nothing in the file is executed.

    FileNotFoundError, or a ValueError that names the file for one that is damaged, of another program or of a newer
    version, or whose weights do not fit its own config and colorbook.
    """
    if path.is_dir():
        raise ValueError(f"{path}: a folder; expected a checkpoint such as {path / 'checkpoint.pt'}")
    if not path.is_file():
        raise FileNotFoundError(f"{path.absolute()}: no such checkpoint; train.py makes one, sample.py --checkpoint "
                                "names another. Relative paths start in the current folder")
    try:
        state = read_archive(path)
        if state.get("format", FORMAT) > FORMAT:
            raise NewerFormat(f"{path}: format {state['format']} is newer, expected {FORMAT}: update the program")
        own, state["config"] = flatten(state["config"]), load_config(base=state["config"])
        network = [key for key in flatten(state["config"]) if key.startswith(("model.", "diffusion."))]
        missing = [key for key in network if key not in own]
        if missing:  # what makes the network is never guessed
            raise ValueError(f"its config lacks {', '.join(missing)}")
        # do the weights fit? On the device "meta" a network has shapes alone
        model, _, _ = build(state["config"], len(Colorbook(state["colorbook"])), torch.device("meta"))
        for weights in state["ema"], state.get("model", state["ema"]):
            model.load_state_dict(dict(weights), assign=True)  # of a copy: torch notes assign=True in the dict
        if not isinstance(state["step"], int):
            raise ValueError(f"step is {state['step']!r}")
        return state
    except (NewerFormat, PermissionError, MemoryError):  # no fault of the file
        raise
    except Exception as error:  # torch and zipfile raise many kinds for a file that is no checkpoint
        reason = " ".join(str(error).split("\n")[:3]) + " is missing" * isinstance(error, KeyError)
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors, numbers and texts, which could run a program"
        if isinstance(error, zipfile.BadZipFile):
            reason = "it is cut off or of another kind"
        raise ValueError(f"{path}: not a checkpoint of this project, or a damaged one: {reason}; expected a complete "
                         "checkpoint.pt that train.py has written") from error


def load_checkpoint(path):
    """read_checkpoint() of `path`, or, where that is damaged or gone, of the previous one; which one is printed then.

    state["path"] is the file that was read.
    """
    path = Path(path)
    previous = Path(f"{path}.previous")
    try:
        return read_checkpoint(path) | {"path": path}
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, NewerFormat) or not previous.is_file():
            raise
        print(f"{error}\n{previous}: used instead")
        return read_checkpoint(previous) | {"path": previous}


def random_sources(device):
    """Where torch draws random numbers, {name: module}: the CPU, and the device if it is another one."""
    return {"cpu": torch} | ({device.type: getattr(torch, device.type)} if device.type != "cpu" else {})


def random_state(device):
    """The states {name: tensor} of random_sources()."""
    return {name: source.get_rng_state() for name, source in random_sources(device).items()}


def set_random_state(device, state):
    """Set what random_state() gave, on this device or another one."""
    for name, source in random_sources(device).items():
        if name in state:
            source.set_rng_state(state[name])


def compare_run(state, cfg, colorbook):
    """Print what changed since the checkpoint was written; ValueError for other classes or another network."""
    old, new = flatten(state["config"]), flatten(cfg)
    changed = {key: f"{key} was {old[key]}, is {new[key]}" for key in old if old[key] != new[key]}
    fixed = [text for key, text in changed.items() if key.startswith(("model.", "diffusion."))]
    classes = itertools.zip_longest(state["colorbook"].items(), colorbook.classes.items())  # their order is the ids
    fixed += [f"class {before} was there, is {after}" for before, after in classes if before != after][:1]
    if fixed:
        raise ValueError(f"{state['path']} cannot be resumed with another network or colorbook: {'; '.join(fixed)}")
    for text in changed.values():
        print(f"resuming: {text}")


def restore_run(cfg, colorbook, model, ema, optimizer, scaler, device):
    """Load the checkpoint of a run into the parts of a training: (step, images seen, seconds), or zeros without one.

    ValueError as in compare_run(). A damaged checkpoint whose predecessor is used instead is set aside, as *.damaged,
    so that the next save does not rename it over the good one.
    """
    path = Path(cfg["out"], "checkpoint.pt")
    if not path.exists() and not path.with_name(path.name + ".previous").exists():
        print(f"{path.parent} has no checkpoint yet: starting at step 0")
        return 0, 0, 0.0
    state = load_checkpoint(path)
    missing = [key for key in ("model", "optimizer", "scaler", "rng", "seconds") if key not in state]
    if missing:
        raise ValueError(f"{state['path']} lacks {', '.join(missing)}: it can be sampled from, but not resumed")
    compare_run(state, cfg, colorbook)
    if state["path"] != path and path.exists():
        with suppress(FileNotFoundError):  # another process was faster
            os.replace(path, path.with_name(path.name + ".damaged"))
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # one that was off has no state
        scaler.load_state_dict(state["scaler"])
    set_random_state(device, state["rng"])
    images = state.get("images", state["step"] * state["config"]["train"]["batch_size"])
    return state["step"], images, state["seconds"]
