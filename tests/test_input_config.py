"""Config files and checkpoints that are wrong in every way: each must be a message that helps."""

import copy
import json
import math
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import sample as sample_module
from checkpoint import load_checkpoint
from config import INTERVAL, SETTINGS, checked, flatten, load_config
from train import train

KNOWN = flatten(SETTINGS)
COMMON = yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8"))
NAN, INF, HUGE = math.nan, math.inf, 10**400
NUMBERS = [NAN, INF, -INF, -1, -0.5, HUGE, -HUGE, "1e400", "nan", "-1", "1,5", "0x"]
ALWAYS = [None, [], {}, [1], {"a": 1}, b"1", 2 + 1j]


def wrong_values(key):
    """Values that the setting cannot have, by what config.yaml says of it."""
    want = KNOWN[key]
    if want is bool:
        return [*ALWAYS, 0, 1, "true", "yes", ""]
    if want is str:
        return [*ALWAYS, 5, 1.5, True, "a\0b", "a\nb", "\x1b[31m"] + ([] if key in ("preset", "sample.mask") else ["", "  "])
    if key == "data.size":
        return [*ALWAYS, 64, "64x64", [64], [64, 64, 64], [64, 60], [0, 8], [-8, 8], [64.0, 64], ["64", "64"], [True, 8], [8, 10**9],
                [8, HUGE], [NAN, 8], [[8], 8]]
    if want is INTERVAL:
        return [*(v for v in ALWAYS if v != []), 5, True, "", [3, 1], [2, 2], [-1, 2], ["a", "b"], [0, 1, 2]]
    if isinstance(want, tuple) and isinstance(want[0], str):
        return [*ALWAYS, 5, True, "", want[0].upper(), want[0] + " ", list(want)]
    if want is int or isinstance(want, range):
        return [*ALWAYS, *NUMBERS, True, 1.0, "3", 2**64] + ([] if isinstance(want, range) and 0 in want else [0])
    high = {"data.augment.hue": 0.5, "data.augment.rotate": 180}.get(key, 1e9 if want is float else want[1])
    return [*ALWAYS, *NUMBERS, True, "", "a lot", high * 1.01 + 1e-9]


@pytest.mark.parametrize("key", KNOWN)
def test_wrong_values(key):
    """A value that cannot be would be taken, and the run be another one than was meant, or fail hours later."""
    for value in wrong_values(key):
        with pytest.raises(ValueError) as error:
            checked(key, value, "my.yaml, preset mine")
        text = str(error.value)
        assert text.startswith(f"my.yaml, preset mine: {key} is {repr(value)[:200]}; expected "), text
        assert len(text.split("; expected ")[1]) > 8 and len(text) < 400


@pytest.mark.parametrize("key", KNOWN)
def test_unknown_and_missing_keys(tmp_path, key):
    """A misspelt key would leave the setting at its old value; a missing one would be an error of Python."""
    *parents, leaf = key.split(".")
    typo = leaf[:-1] if len(leaf) > 2 else leaf + leaf
    for what, words in (("typo", [f"'{'.'.join([*parents, typo])}'", "nearest", key]), ("missing", ["missing settings", key])):
        tree = copy.deepcopy(COMMON)
        at = tree
        for parent in parents:
            at = at[parent]
        value = at.pop(leaf)
        if what == "typo":
            at[typo] = value
        del tree["presets"]
        (tmp_path / "my.yaml").write_text(json.dumps(tree))  # JSON is YAML, and quick to read
        if key == "preset" and what == "missing":
            assert load_config(tmp_path / "my.yaml")["preset"] == ""
            continue
        with pytest.raises(ValueError) as error:
            load_config(tmp_path / "my.yaml")
        assert "my.yaml" in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_ends_of_ranges():
    """A value at the end of its range would be refused."""
    for key, want in KNOWN.items():
        ends = {int: (1, 10**9), float: (0.0, 1e9), bool: (False, True), str: ("a b", "/ö/道路")}.get(want)
        if key == "data.size":
            ends = [8, 8], [8192, 8192]
        if isinstance(want, (range, tuple)):
            ends = want[0], want[-1]
        if want is INTERVAL:
            ends = [], [0, 0.5]
        assert [checked(key, end, "here") for end in ends] == list(ends)


@pytest.mark.parametrize("key, value, words", [
    ("model.hidden_dim", 33, "even"), ("model.emb_dim", 255, "even"), ("diffusion.T", 1, "from 2 on"),
    ("data.augment.hue", 0.6, "0.5"), ("data.augment.crop", 0, "from 0.1"), ("train.grad_clip", 0, "from 1e-09"),
    ("diffusion.beta_start", 0, "from 1e-08"), ("diffusion.beta_end", 1, "to 0.999"), ("out", "''", "not empty"),
    ("seed", 2**63, "whole number from 0"), ("train.steps", "1e3", "whole number"), ("data.root", "5", "in quotes"),
    ("out", "2024-01-01", "in quotes"), ("train.batch_size", 10**9, "65536")])
def test_what_would_fail_later(key, value, words):
    """A number that no network, schedule or augmentation can work with would pass, and fail after the data are read."""
    with pytest.raises(ValueError) as error:
        load_config("config.yaml", overrides=[f"{key}={value}"])
    assert f"--set {key}=" in str(error.value) and words in str(error.value), error.value


SLIPS = {
    "twice": ("seed: 1\nout: a\nseed: 2\n", ["'seed'", "line 1", "line 3", "delete"]),
    "twice, quoted": ("seed: 1\n'seed': 2\n", ["'seed'", "line 1", "line 2"]),
    "twice, below": ("train:\n  lr: 1\n  steps: 5\n  lr: 2\n", ["'lr'", "line 2", "line 4"]),
    "twice, in a preset": ("presets:\n  a:\n    train: {lr: 1,\n      lr: 2}\n", ["'lr'", "line 3", "line 4"]),
    "two presets": ("presets:\n  a: {seed: 1}\n  a: {seed: 2}\n", ["'a'", "line 2", "line 3"]),
    "two parts": ("train: {lr: 1}\ntrain: {steps: 5}\n", ["'train'", "line 1", "line 2"]),
    "a dot": ("train: {lr: 1}\ntrain.lr: 2\n", ["'train.lr'", "line 2", "--set"]),
    "tab": ("train:\n\tlr: 1\n", ["line 2", "spaces, not with tabs"]),
    "tab after spaces": ("train:\n  lr: 1\n  \tsteps: 2\n", ["line 3", "spaces, not with tabs"]),
    "indent": ("train:\n  lr: 1\n   steps: 2\n", ["line 3"]),
    "a list": ("- seed: 1\n", ["mapping of settings"]), "a word": ("hello", ["mapping of settings"]),
    "nothing": ("", ["mapping of settings"]), "only a comment": ("# none\n", ["mapping of settings"]),
    "two documents": ("seed: 1\n---\nseed: 2\n", ["line 2"]),
    "presets are a list": ("presets: [toy]\n", ["presets that are mappings"]),
    "empty preset": ("presets: {toy: }\n", ["presets that are mappings"]),
    "preset is a list": ("preset: [toy]\npresets: {toy: {seed: 1}}\n", ["no preset", "['toy']", "there are toy"]),
    "preset is a number": ("preset: 5\npresets: {toy: {seed: 1}}\n", ["no preset", "5"]),
    "part is a number": ("train: 5\n", ["'train'", "nearest"]), "part is empty": ("train:\n", ["'train'", "nearest"]),
    "setting is a part": ("seed: {a: 1}\n", ["'seed.a'", "nearest"]),
    "no text as key": ("5: 1\n", ["'5'"]), "list as key": ("[a]: 1\n", ["my.yaml"]),
    "alias": ("data: &a {root: x}\ntrain: *a\n", ["alias", "line 2"]),
    "endless": ("data: &a {root: *a}\n", ["alias", "line 1"]),
    "deep": ("[" * 5000, ["my.yaml"]), "no date": ("out: 2024-99-99\n", ["my.yaml"]), "NUL": ("seed: \0\n", ["my.yaml"]),
    "code": ("seed: !!python/object/apply:os.system [exit]\n", ["my.yaml", "line 1"]),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_in_yaml(tmp_path, slip):
    """A slip of the editor would change the run unnoticed (PyYAML keeps the last of two equal keys) or end in a traceback."""
    text, words = SLIPS[slip]
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        load_config(tmp_path / "my.yaml")
    assert str(tmp_path / "my.yaml") in str(error.value) and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_config_in_another_encoding(tmp_path, encoding):
    """A file saved by an old editor would end in an error about bytes."""
    (tmp_path / "my.yaml").write_bytes("seed: 0  # für später\n".encode(encoding))
    with pytest.raises(ValueError, match="my.yaml.*UTF-8"):
        load_config(tmp_path / "my.yaml")


@pytest.mark.parametrize("change", [lambda text: b"\xef\xbb\xbf" + text, lambda text: text.replace(b"\n", b"\r\n")],
                         ids=["BOM", "CRLF"])
def test_config_saved_on_windows(tmp_path, change):
    """A config that Notepad has saved could not be read."""
    (tmp_path / "my.yaml").write_bytes(change(Path("config.yaml").read_bytes()))
    assert load_config(tmp_path / "my.yaml") == load_config("config.yaml")


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(
    ["preset", "presets", "train", "lr", ":", "{", "}", "[", "]", " ", "\n", "  ", "- ", "&a ", "*a", "!", "'", '"', "#", "|",
     "1", "~", "<<", "?", ","]), max_size=14).map(lambda parts: "".join(parts).encode())))
@example(b"<<: {seed: 1}")
@example(b"? {a: 1}\n: 2")
def test_any_file_as_config(tmp_path, content):
    """Some file that is no config would end in a traceback."""
    (tmp_path / "my.yaml").write_bytes(content)
    with pytest.raises(ValueError, match="my.yaml"):
        load_config(tmp_path / "my.yaml")


# --------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def state(flat_root, tmp_path_factory):
    """A checkpoint of one step, as a dict."""
    values = {"device": "cpu", "out": tmp_path_factory.mktemp("run"), "data.root": flat_root, "data.size": [8, 8],
              "model.hidden_dim": 4, "model.emb_dim": 8, "train.steps": 1, "train.batch_size": 2, "train.val_pairs": 2,
              "train.previews": 1, "diffusion.T": 20}
    cfg = load_config("config.yaml", "toy", [f"{key}={value}" for key, value in values.items()])
    train(cfg)
    return load_checkpoint(Path(cfg["out"]) / "checkpoint.pt")


def refused(path, *words):
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and all(word in str(error.value) for word in words), error.value
    assert "weights_only" not in str(error.value)  # torch's advice to try it unsafely


def test_files_of_others(tmp_path, state):
    """Another program's file would end in a traceback, or in torch's advice to load it unsafely."""
    head = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    raw = {"empty": b"", "zeros": bytes(1000), "text": b"no checkpoint", "html": b"<html>404</html>",
           "safetensors": struct.pack("<Q", len(head)) + head + bytes(4), "pickle": pickle.dumps({"model": {}})}
    for name, content in raw.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
        refused(tmp_path / f"{name}.pt", "expected a whole checkpoint.pt that train.py has written")
    saved = {"weights": state["model"], "list": [state["model"]], "number": 5, "none": None, "tensor": torch.zeros(3),
             "lightning": {"state_dict": state["model"], "epoch": 3, "hyper_parameters": {}}}
    for name, content in saved.items():
        torch.save(content, tmp_path / f"{name}.pt")
        refused(tmp_path / f"{name}.pt", "not a checkpoint of this project", "model", "config")
    with zipfile.ZipFile(tmp_path / "docs.pt", "w") as archive:
        archive.writestr("docs/readme.txt", "hello")
    refused(tmp_path / "docs.pt", "expected a whole checkpoint.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    refused(tmp_path / "module.pt", "could run a program")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_is_not_run(tmp_path, state):
    """A checkpoint from the internet could do anything to this computer."""
    proof = tmp_path / "proof"
    places = {"alone": Evil(proof), "beside": state | {"extra": Evil(proof)}, "as config": state | {"config": Evil(proof)},
              "in weights": state | {"ema": {**state["ema"], "x": Evil(proof)}}, "as key": state | {("x", Evil(proof)): 1}}
    for name, content in places.items():
        torch.save(content, tmp_path / f"{name}.pt")
        refused(tmp_path / f"{name}.pt", "could run a program")
        (tmp_path / f"{name}, pickled.pt").write_bytes(pickle.dumps(content))
        refused(tmp_path / f"{name}, pickled.pt")
        assert not proof.exists()
    pickle.loads(pickle.dumps(Evil(proof))).close()
    assert proof.exists()  # so the test would have noticed


def test_truncated_checkpoint(tmp_path, state):
    """Half a checkpoint, from a full disk or a broken copy, would be taken for a whole one."""
    torch.save(state, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    load_checkpoint(tmp_path / "whole.pt")
    for cut in {*range(0, len(whole), len(whole) // 40), *(len(whole) - n for n in (1, 2, 21, 22, 23, 100, 1000))}:
        (tmp_path / "cut.pt").write_bytes(whole[:cut])
        refused(tmp_path / "cut.pt", "cut off or of another kind")


@pytest.mark.parametrize("seed", range(3))
def test_damaged_checkpoint(tmp_path, state, seed):
    """A flipped bit would change a weight unnoticed: torch does not look at the check sums."""
    torch.save(state, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    generator = torch.Generator().manual_seed(seed)
    same = 0
    for at in torch.randint(len(whole), (12,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[at] ^= 16
        (tmp_path / "bad.pt").write_bytes(damaged)
        try:
            found = load_checkpoint(tmp_path / "bad.pt")
        except ValueError as error:
            assert "bad.pt" in str(error)
        else:  # padding between the parts
            assert all(torch.equal(found["ema"][key], weight) for key, weight in state["ema"].items())
            same += 1
    assert same < 12
    weight = state["ema"]["down1.time.1.weight"].numpy().tobytes()
    damaged = bytearray(whole)
    damaged[whole.index(weight) + 5] ^= 64
    (tmp_path / "bad.pt").write_bytes(damaged)
    refused(tmp_path / "bad.pt", "damaged")


def changed(state, **parts):
    """A copy of the state with parts replaced, or taken out where they are None; config__model__T stands for nesting."""
    new = copy.deepcopy(state)
    for name, value in parts.items():
        *parents, last = name.split("__")
        at = new
        for parent in parents:
            at = at[parent]
        if value is None:
            del at[last]
        else:
            at[last] = value
    return new


CHANGES = {
    "newer": ({"format": 2}, ["newer version", "format 2", "update"]),
    "no ema": ({"ema": None}, ["ema missing"]), "no config": ({"config": None}, ["config missing"]),
    "no optimizer": ({"optimizer": None}, ["optimizer missing"]), "step": ({"step": "5"}, ["step missing or of another kind"]),
    "config is a text": ({"config": "x"}, ["config missing or of another kind"]),
    "part missing": ({"config__model": None}, ["lacks", "model.attention, model.conditional, model.emb_dim, model.hidden_dim"]),
    "key missing": ({"config__diffusion__T": None}, ["lacks diffusion.T"]),
    "part is a number": ({"config__model": 5}, ["lacks", "model.hidden_dim"]),
    "value": ({"config__diffusion__T": "x"}, ["its config", "diffusion.T is 'x'", "whole number"]),
    "unknown key": ({"config__diffusion__sigma": 3}, ["config", "sigma"]),
    "betas": ({"config__diffusion__beta_start": 0.5}, ["beta_start <= beta_end"]),
    "wider": ({"config__model__hidden_dim": 8}, ["(model)", "image_stem.net.0.weight", "(4, 3, 3, 3)", "(8, 3, 3, 3)", "more"]),
    "attention": ({"config__model__attention": True}, ["(model)", "attention1", "missing"]),
    "no masks": ({"config__model__conditional": False}, ["mask_stem", "expected none"]),
    "fewer classes": ({"colorbook__car": None}, ["3 classes", "mask_stem.net.0.weight", "(4, 4, 3, 3)", "(4, 3, 3, 3)"]),
    "no classes": ({"colorbook": {}}, ["1 to 255 classes"]), "colour": ({"colorbook__car": [0, 0, 999]}, ["'car'", "999"]),
    "weight missing": ({"ema__out.bias": None}, ["(ema)", "out.bias", "missing"]),
    "no tensor": ({"ema__out.bias": 5}, ["(ema)", "out.bias"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_checkpoints_that_do_not_fit(tmp_path, state, change):
    """Weights would be poured into another network than they were trained in, or a traceback would say which shapes differ."""
    parts, words = CHANGES[change]
    torch.save(changed(state, **parts), tmp_path / "odd.pt")
    refused(tmp_path / "odd.pt", *words)


def test_older_and_longer_checkpoints(tmp_path, state):
    """Checkpoints from before there was a format number, or with something more in them, could not be used any more."""
    for new in (changed(state, format=None), state | {"note": "hello"}, changed(state, config__train__lr=None)):
        torch.save(new, tmp_path / "old.pt")
        assert load_checkpoint(tmp_path / "old.pt")["step"] == 1


def test_resume_names_the_first_class_that_differs(tmp_path, state, flat_root):
    """With 150 classes nobody would find the one that was renamed."""
    cfg = copy.deepcopy(state["config"]) | {"out": str(tmp_path)}
    classes = {"street" if name == "road" else name: rgb for name, rgb in state["colorbook"].items()}
    torch.save(changed(state, colorbook=classes), tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="another colorbook.*'street'.*'road'"):
        train(cfg, resume=True)


def test_sample_with_a_checkpoint_of_another_network(tmp_path, state, monkeypatch):
    """sample.py would end in a traceback."""
    torch.save(changed(state, config__model__hidden_dim=8), tmp_path / "odd.pt")
    words = ["sample.py", "--unconditional", "1", "--checkpoint", tmp_path / "odd.pt", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit, match="error: .*odd.pt: its weights"):
        sample_module.main()
    assert not os.path.exists(tmp_path / "out")
