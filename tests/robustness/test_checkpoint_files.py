"""Checkpoints of others, cut off, damaged, malicious or of another network: each must be a message that helps."""

import copy
import json
import pickle
import struct
import sys
import zipfile

import pytest
import torch

import sample as sample_program
from checkpoint import build, load_checkpoint, save_checkpoint
from config import load_config

CLASSES = {"road": [128, 64, 128], "sky": [70, 130, 180], "car": [0, 0, 142], "person": [220, 20, 60]}


@pytest.fixture(scope="module")
def state():
    """A complete checkpoint of an untrained network, as a dict."""
    cfg = load_config("config.yaml", "toy", [
        "device=cpu", "data.size=[8, 8]", "model.hidden_dim=4", "model.emb_dim=8", "diffusion.T=20"])
    model, _, _ = build(cfg, len(CLASSES), torch.device("cpu"))
    weights = model.state_dict()
    return {"model": weights, "ema": copy.deepcopy(weights), "optimizer": {}, "scaler": {}, "step": 1, "images": 2,
            "rng": {"cpu": torch.get_rng_state()}, "seconds": 1.0, "config": cfg, "colorbook": CLASSES, "format": 1}


@pytest.fixture(scope="module")
def complete_file(state, tmp_path_factory):
    """The bytes of that checkpoint, which loads."""
    path = tmp_path_factory.mktemp("complete") / "checkpoint.pt"
    save_checkpoint(path, state)
    assert load_checkpoint(path)["step"] == 1
    return path.read_bytes()


def refused(path, *words):
    """load_checkpoint() refuses with a ValueError that names the file, says the words and what was expected."""
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    text = str(error.value)
    assert str(path) in text and "expected" in text and all(word in text for word in words), text
    assert "weights_only" not in text  # torch's advice to try it unsafely
    assert len(text) < 1200


# ------------------------------------------------------------------------------------------- what is no checkpoint


def test_files_of_others(tmp_path, state):
    """Another program's file is refused in one message, whatever it is, without the advice to load it unsafely."""
    head = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    raw = {"empty": b"", "zeros": bytes(1000), "text": b"no checkpoint", "html": b"<html>404</html>",
           "safetensors": struct.pack("<Q", len(head)) + head + bytes(4), "pickle": pickle.dumps({"model": {}})}
    for name, content in raw.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
        refused(tmp_path / f"{name}.pt", "checkpoint.pt that train.py has written")
    saved = {"list": [state["model"]], "number": 5, "none": None, "tensor": torch.zeros(3), "text": "hello", "dict": {},
             "weights": state["model"],
             "lightning": {"state_dict": state["model"], "epoch": 3, "hyper_parameters": {}},
             "keys": {5: 1, None: 2}, "config": {"config": [], "model": 1, "ema": 2, "colorbook": 3, "step": 4}}
    for name, content in saved.items():
        torch.save(content, tmp_path / f"{name}.pt")
        refused(tmp_path / f"{name}.pt", "not a checkpoint of this project")
    with zipfile.ZipFile(tmp_path / "docs.pt", "w") as archive:
        archive.writestr("docs/readme.txt", "hello")
    refused(tmp_path / "docs.pt", "checkpoint.pt that train.py has written")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    refused(tmp_path / "module.pt", "could run a program")


def test_a_folder_and_a_missing_file(tmp_path, state):
    """A folder is refused with the checkpoint that should be in it, and a missing file with where it was looked for."""
    refused(tmp_path, "folder", str(tmp_path / "checkpoint.pt"))
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    refused(tmp_path, "folder", str(tmp_path / "checkpoint.pt"))
    with pytest.raises(FileNotFoundError) as error:
        load_checkpoint(tmp_path / "none.pt")
    assert str(tmp_path / "none.pt") in str(error.value)


# -------------------------------------------------------------------------------------------------- malicious


class Evil:
    """What pickle would execute on loading: it opens a file for writing."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_is_not_run(tmp_path, state):
    """Code anywhere in a checkpoint is refused and nothing of it is executed."""
    proof = tmp_path / "proof"
    places = {
        "alone": Evil(proof), "beside": state | {"extra": Evil(proof)}, "as config": state | {"config": Evil(proof)},
        "in weights": state | {"ema": {**state["ema"], "x": Evil(proof)}}, "as key": state | {("x", Evil(proof)): 1}}
    for name, content in places.items():
        torch.save(content, tmp_path / f"{name}.pt")
        refused(tmp_path / f"{name}.pt", "could run a program")
        (tmp_path / f"{name}, pickled.pt").write_bytes(pickle.dumps(content))
        refused(tmp_path / f"{name}, pickled.pt")
        torch.save(content, tmp_path / f"{name}, old.pt", _use_new_zipfile_serialization=False)
        refused(tmp_path / f"{name}, old.pt")
        assert not proof.exists()
    pickle.loads(pickle.dumps(Evil(proof))).close()
    assert proof.exists()  # so the test would have seen it


# ------------------------------------------------------------------------------------------- cut off, damaged


def test_truncated_checkpoint(tmp_path, complete_file):
    """A file that is cut off anywhere is refused as such."""
    size = len(complete_file)
    for cut in {*range(0, size, size // 40), *(size - n for n in (1, 2, 21, 22, 23, 100, 1000))}:
        (tmp_path / "cut.pt").write_bytes(complete_file[:cut])
        refused(tmp_path / "cut.pt", "cut off")


def test_a_flipped_bit_is_found(tmp_path, state, complete_file):
    """A bit that flipped is refused, or was in the padding: the weights that load are those that were saved."""
    path, accepted = tmp_path / "bad.pt", 0
    positions = torch.randint(len(complete_file), (30,), generator=torch.Generator().manual_seed(0)).tolist()
    for position in positions:
        damaged = bytearray(complete_file)
        damaged[position] ^= 16
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert all(torch.equal(loaded["ema"][key], weight) for key, weight in state["ema"].items())
            accepted += 1
    assert accepted < 15


@pytest.mark.parametrize("name", ["down1.time.1.weight", "out.bias", "image_stem.net.3.weight"])
def test_a_flipped_bit_in_a_weight_is_refused(tmp_path, state, complete_file, name):
    """A weight that changed on the disk is found by the check sum of the file, which torch does not look at."""
    weight = state["model"][name]
    order = tuple(sorted(range(weight.dim()), key=weight.stride, reverse=True))  # as it lies in memory
    start = complete_file.index(weight.permute(order).numpy().tobytes())
    damaged = bytearray(complete_file)
    damaged[start + 5] ^= 64
    (tmp_path / "bad.pt").write_bytes(damaged)
    refused(tmp_path / "bad.pt", "damaged")


# ------------------------------------------------------------------------------------- parts that do not fit


def changed(state, **parts):
    """A copy of the state with parts replaced, or taken out where they are None; config__model__T is a nested key."""
    new = copy.deepcopy(state)
    for name, value in parts.items():
        *parents, last = name.split("__")
        part = new
        for parent in parents:
            part = part[parent]
        if value is None:
            del part[last]
        else:
            part[last] = value
    return new


CHANGES = {
    "newer": ({"format": 2}, ["newer", "format 2", "update"]),
    "format": ({"format": "x"}, []),
    "no ema": ({"ema": None}, ["'ema' is missing"]),
    "no config": ({"config": None}, ["'config' is missing"]),
    "no colorbook": ({"colorbook": None}, ["'colorbook' is missing"]),
    "no step": ({"step": None}, ["'step' is missing"]), "step": ({"step": "5"}, ["step", "'5'"]),
    "half a step": ({"step": 1.5}, ["step", "1.5"]),
    "config is a text": ({"config": "x"}, []), "weights are a text": ({"ema": "x"}, []),
    "weights are a list": ({"ema": [1]}, []), "colorbook is a list": ({"colorbook": [[1, 2, 3]]}, []),
    "part missing": ({"config__model": None}, [
        "lacks", "model.attention", "model.conditional", "model.emb_dim", "model.hidden_dim"]),
    "key missing": ({"config__diffusion__prediction": None}, ["lacks diffusion.prediction"]),
    "value": ({"config__diffusion__T": "x"}, ["config", "diffusion.T is 'x'", "whole number"]),
    "betas": ({"config__diffusion__beta_start": 0.5}, ["beta_start <= beta_end"]),
    "odd": ({"config__model__hidden_dim": 5}, ["even"]),
    "wider": ({"config__model__hidden_dim": 8}, ["size mismatch"]),
    "attention": ({"config__model__attention": True}, ["Missing", "attention1"]),
    "no masks": ({"config__model__conditional": False}, ["Unexpected", "mask_stem"]),
    "fewer classes": ({"colorbook__car": None}, ["mask_stem.net.0.weight", "[4, 4, 3, 3]", "[4, 3, 3, 3]"]),
    "no classes": ({"colorbook": {}}, ["1 to 255 classes"]),
    "colour": ({"colorbook__car": [0, 0, 999]}, ["'car'", "999"]),
    "weight missing": ({"ema__out.bias": None}, ["Missing", "out.bias"]),
    "weight too many": ({"ema__out.extra": torch.zeros(1)}, ["Unexpected", "out.extra"]),
    "weight of the raw network": ({"model__out.bias": torch.zeros(4)}, ["out.bias", "[4]", "[3]"]),
    "no tensor": ({"ema__out.bias": 5}, ["out.bias"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_checkpoints_that_do_not_fit(tmp_path, state, change):
    """Parts that are missing, of another kind or of another network are refused by their names, sizes and values."""
    parts, words = CHANGES[change]
    torch.save(changed(state, **parts), tmp_path / "odd.pt")
    refused(tmp_path / "odd.pt", *words)


def test_older_and_longer_checkpoints(tmp_path, state):
    """A checkpoint without a format number or newer settings, or with something more in it, loads with its weights."""
    for new in (changed(state, format=None), state | {"note": "hello"}, changed(state, config__train__lr=None),
                changed(state, config__sample=None, optimizer=None), changed(state, config__diffusion__sigma=3)):
        torch.save(new, tmp_path / "old.pt")
        loaded = load_checkpoint(tmp_path / "old.pt")
        assert loaded["step"] == 1 and loaded["config"]["sample"]["steps"] == 10
        assert all(torch.equal(loaded["ema"][key], weight) for key, weight in state["ema"].items())


# ---------------------------------------------------------------------------------------------------- sample.py


@pytest.mark.parametrize("kind, words", [
    ("another network", "size mismatch"), ("a text", "damaged one"), ("a folder", "folder"), ("nothing", "no such")])
def test_sample_with_a_wrong_checkpoint(tmp_path, state, monkeypatch, kind, words):
    """sample.py ends in one line that names the checkpoint, and makes no folder for images."""
    path = tmp_path / "odd.pt"
    if kind == "another network":
        torch.save(changed(state, config__model__hidden_dim=8), path)
    elif kind == "a text":
        path.write_text("hello")
    elif kind == "a folder":
        path.mkdir()
    arguments = ["--unconditional", "1", "--checkpoint", path, "--out", tmp_path / "out", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        sample_program.main()
    message = str(stopped.value.code)
    assert message.startswith("error: ") and str(path) in message and words in message, message
    assert not (tmp_path / "out").exists()
