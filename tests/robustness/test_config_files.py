"""Config files that are wrong in every way: each must be a message that names the file and helps."""

import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import config
from config import checked, flatten, load_config, parse_overrides

PROJECT = yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8"))
BASE = flatten({key: value for key, value in PROJECT.items() if key != "presets"})


@pytest.fixture(scope="module", autouse=True)
def read_the_projects_file_once():
    """config.yaml is the slow half of every load."""
    real, project = config.read_yaml, config.read_yaml(config.PROJECT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "read_yaml", lambda path: project if path == config.PROJECT else real(path))
        yield


def refused(path, *words):
    with pytest.raises(ValueError) as error:
        load_config(path)
    assert str(path) in str(error.value) and all(word in str(error.value) for word in words), error.value
    assert len(str(error.value)) < 1500


# ----------------------------------------------------------------------------------------------- wrong values

HUGE = 10**400
NEVER = [None, {}, [1], {"a": 1}, b"1", 2 + 1j, math.nan, math.inf, -math.inf, -1, -0.5, HUGE, -HUGE, "a\0b", "a\nb",
         "\x1b[31m"]  # no setting can have any of these
WRONG = {  # what else a setting cannot have, by the type of its value in config.yaml
    bool: [*NEVER, [], 0, 1, "true", "yes", ""],
    int: [*NEVER, [], True, 1.0, "3", "1e400", "", "a lot", 2**64],
    float: [*NEVER, [], True, "", "a lot", "1,5", "0x", "nan", "inf", "-1", "1e400"],
    str: [*NEVER, [], 5, 1.5, True],
    list: [*NEVER, 5, True, "", "64x64", [64], [64, 64, 64], ["64", "64"], [True, 8], [-8, 8], [8, 4], [math.nan, 8],
           [[8], 8], [8, math.inf]],
}


@pytest.mark.parametrize("key", BASE)
def test_wrong_values(key):
    """A value that a setting cannot have is refused with the file, the key, the value and what was expected."""
    for value in WRONG[type(BASE[key])]:
        with pytest.raises(ValueError) as error:
            checked(key, value, "my.yaml, preset mine")
        text = str(error.value)
        assert text.startswith(f"my.yaml, preset mine: {key} is ") and len(text) < 400, text
        assert len(text.split("; expected ")[1]) > 8


@pytest.mark.parametrize("key", BASE)
def test_unknown_and_missing_keys(tmp_path, key):
    """A misspelt key of a file is refused with the nearest; a key that is missing gets the project's value."""
    *parents, leaf = key.split(".")
    typo = leaf[:-1] if len(leaf) > 2 else leaf + leaf
    part, path = {typo: BASE[key]}, tmp_path / "my.yaml"
    for parent in reversed(parents):
        part = {parent: part}
    path.write_text(json.dumps(part))  # JSON is YAML
    refused(path, f"'{'.'.join([*parents, typo])}'", "nearest", key)
    others = {name: value for name, value in BASE.items() if name != key}
    path.write_text(json.dumps(config.nest(others | {"preset": ""})))
    assert load_config(path) == load_config(overrides=["data.root="])


# ------------------------------------------------------------------------------------------- slips of the editor

SLIPS = {
    "twice": ("seed: 1\nout: a\nseed: 2\n", ["'seed'", "line 3", "delete"]),
    "twice, quoted": ("seed: 1\n'seed': 2\n", ["'seed'", "line 2"]),
    "twice, below": ("train:\n  lr: 1\n  steps: 5\n  lr: 2\n", ["'lr'", "line 4"]),
    "twice, in a preset": ("presets:\n  a:\n    train: {lr: 1,\n      lr: 2}\n", ["'lr'", "line 4"]),
    "two presets": ("presets:\n  a: {seed: 1}\n  a: {seed: 2}\n", ["'a'", "line 3"]),
    "two parts": ("train: {lr: 1}\ntrain: {steps: 5}\n", ["'train'", "line 2"]),
    "tab": ("train:\n\tlr: 1\n", ["line 2", "spaces, not with tabs"]),
    "tab after spaces": ("train:\n  lr: 1\n  \tsteps: 2\n", ["line 3", "spaces, not with tabs"]),
    "indent": ("train:\n  lr: 1\n   steps: 2\n", ["line 3"]),
    "a list": ("- seed: 1\n", ["mapping of settings"]), "a word": ("hello", ["mapping of settings"]),
    "nothing": ("", ["mapping of settings"]), "only a comment": ("# none\n", ["mapping of settings"]),
    "two documents": ("seed: 1\n---\nseed: 2\n", ["line 2"]),
    "presets are a list": ("presets: [toy]\n", ["presets that are mappings"]),
    "empty preset": ("presets: {mine: }\n", ["presets that are mappings"]),
    "preset is a list": ("preset: [toy]\n", ["preset", "['toy']"]),
    "preset is a number": ("preset: 5\n", ["preset", "5"]),
    "preset of nobody": ("preset: fog\npresets: {night: {seed: 1}}\n", ["'fog'", "night", "toy"]),
    "part is a number": ("train: 5\n", ["'train'", "nearest"]), "part is empty": ("train:\n", ["'train'", "nearest"]),
    "setting is a part": ("seed: {a: 1}\n", ["'seed.a'", "nearest"]),
    "no text as key": ("5: 1\n", ["'5'"]), "list as key": ("[a]: 1\n", []), "mapping as key": ("? {a: 1}\n: 2", []),
    "endless": ("data: &a {root: *a}\n", []), "no alias": ("seed: *a\n", ["line 1"]), "deep": ("[" * 2000, []),
    "no date": ("out: 2024-99-99\n", []), "NUL": ("seed: \0\n", []),
    "code": ("seed: !!python/object/apply:os.system [exit]\n", ["line 1"]),
    "no flag": ("seed: !!bool maybe\n", []), "no number": ("seed: !!int ''\n", []),
    "no float": ("seed: !!float ''\n", []), "no timestamp": ("seed: !!timestamp x\n", []),
    "no binary": ("seed: !!binary x\n", []), "of the future": ("%YAML 9.9\n---\nseed: 1\n", ["line 1"]),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_in_yaml(tmp_path, slip):
    """A slip of the editor is refused with the file, and with the line where the parser knows it."""
    text, words = SLIPS[slip]
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    refused(tmp_path / "my.yaml", *words)


def test_code_in_yaml_is_not_run(tmp_path):
    """Tags of Python are refused, in a file and in --set, and nothing is executed."""
    proof = tmp_path / "proof"
    for tag in f"!!python/object/apply:builtins.open ['{proof}', w]", "!!python/name:os.system":
        (tmp_path / "my.yaml").write_text(f"out: {tag}\n")
        refused(tmp_path / "my.yaml")
        assert parse_overrides([f"out={tag}"]) == {"out": tag}  # only a text
    assert not proof.exists()
    yaml.unsafe_load(f"!!python/object/apply:builtins.open ['{proof}', w]").close()
    assert proof.exists()  # so the test would have seen it


# ------------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_config_in_another_encoding(tmp_path, encoding):
    """A file that an old editor saved is refused with the advice to save it as UTF-8."""
    (tmp_path / "my.yaml").write_bytes("seed: 0  # für später\n".encode(encoding))
    refused(tmp_path / "my.yaml", "UTF-8")


@pytest.mark.parametrize("change", [lambda text: b"\xef\xbb\xbf" + text, lambda text: text.replace(b"\n", b"\r\n")],
                         ids=["BOM", "CRLF"])
def test_config_saved_on_windows(tmp_path, change):
    """A byte order mark and Windows' line ends change nothing."""
    (tmp_path / "my.yaml").write_bytes(change(Path("config.yaml").read_bytes()))
    assert load_config(tmp_path / "my.yaml") == load_config("config.yaml")


def test_what_is_no_file(tmp_path):
    """A folder, or a path that is not there, is an error that names it and where the project's file is."""
    for path in tmp_path, tmp_path / "none.yaml":
        with pytest.raises(FileNotFoundError) as error:
            load_config(path)
        assert str(path) in str(error.value) and str(Path("config.yaml").absolute()) in str(error.value)


# ------------------------------------------------------------------------------------------------ anything at all

WORDS = ["preset", "presets", "train", "lr", "seed", "toy", ":", ": ", "{", "}", "[", "]", " ", "\n", "  ", "- ", "&a ",
         "*a", "!", "!!", "int ", "bool ", "float ", "set ", "'", '"', "#", "|", "1", "~", "<<", "?", ","]


@settings(max_examples=150, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(WORDS), max_size=14).map(
    lambda parts: "".join(parts).encode())))
@example(b"<<: {seed: 1}")
@example(b"<<: 5")
@example(b"seed: !!bool 1")
@example(b"!!set {seed}")
@example(b"seed: 1:30")
def test_any_file_as_config(tmp_path, content):
    """Whatever stands in a file, it gives a complete config or a ValueError that names it."""
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    try:
        cfg = load_config(path)
    except ValueError as error:
        assert "my.yaml" in str(error)
    else:
        assert flatten(cfg).keys() == BASE.keys()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from([*BASE, "step", ""]), st.one_of(
    st.text(max_size=20), st.lists(st.sampled_from(WORDS), max_size=8).map("".join), st.integers().map(str),
    st.floats().map(str)))
@example("out", "!!bool x")
@example("out", "!!int ''")
@example("seed", "9" * 5000)
@example("out", "[" * 2000)
def test_any_override(key, value):
    """Whatever --set is given, it is one checked value or a ValueError that repeats what was given."""
    try:
        given_settings = parse_overrides([f"{key}={value}"])
    except ValueError as error:
        assert f"--set {key}={value}" in str(error)
    else:
        assert given_settings.keys() == {key}
        assert type(given_settings[key]) is type(BASE[key])
