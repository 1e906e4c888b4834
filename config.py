"""One YAML file: every setting with its reason, a preset laid over it, and changes from the command line.

    cfg = load_config("config.yaml", preset="idd_lite", overrides=["train.steps=2000"])
    cfg["train"]["steps"]                                   # 2000

Everything is laid over the project's config.yaml, so a file of your own needs only the settings that it changes.
"""

import difflib
import math
import os
import sys
from pathlib import Path

import yaml

PROJECT = Path(__file__).with_name("config.yaml")


# A kind of value is a triple: its type, what is expected in words, and a test of a value of that type.


def whole(low=1, high=10**9):
    return int, f"a whole number from {low} to {high}", lambda v: low <= v <= high


def real(low, high):
    return float, f"a number from {low:g} to {high:g}", lambda v: low <= v <= high


def one_of(*names):
    return str, f"one of {', '.join(names)}", lambda v: v in names


FLAG = bool, "true or false", lambda v: True
TEXT = str, "a text, in quotes if it looks like something else", lambda v: v.isprintable()
NAME = str, "a text, not empty, in quotes if it looks like something else", lambda v: v.isprintable() and v.strip()
SHARE, SEED, PRECISION = real(0, 1), whole(0, 2**63 - 1), one_of("auto", "fp32", "fp16", "bf16")
SIZE = list, "two multiples of 8, at most 8192: [height, width]", lambda v: (
    len(v) == 2 and all(type(side) is int and side in range(8, 8193, 8) for side in v))
INTERVAL = list, "two rising numbers, 0 or more: [lowest, highest], or [] for no limits", lambda v: (
    v == [] or len(v) == 2 and all(type(end) in (int, float) for end in v) and 0 <= v[0] < v[1] < math.inf)

SETTINGS = {  # every key of config.yaml and its kind
    "preset": TEXT, "device": one_of("auto", "cuda", "mps", "cpu"), "seed": SEED, "out": TEXT,
    "data.root": TEXT, "data.val": NAME, "data.size": SIZE, "data.flip": SHARE, "data.memory_gb": real(0, 1e9),
    "data.augment.p": SHARE, "data.augment.brightness": SHARE, "data.augment.contrast": SHARE,
    "data.augment.saturation": SHARE, "data.augment.hue": real(0, 0.5), "data.augment.vertical_flip": FLAG,
    "data.augment.rotate": real(0, 180), "data.augment.crop": real(0.1, 1),
    "model.conditional": FLAG, "model.attention": FLAG,
    "model.hidden_dim": whole(2, 4096), "model.emb_dim": whole(2, 4096),
    "diffusion.T": whole(2, 100_000), "diffusion.schedule": one_of("thesis", "linear", "nichol"),
    "diffusion.beta_start": real(1e-8, 0.999), "diffusion.beta_end": real(1e-8, 0.999),
    "diffusion.prediction": one_of("eps", "v"),
    "train.steps": whole(), "train.batch_size": whole(1, 65_536), "train.accumulate": whole(1, 65_536),
    "train.lr": real(1e-9, 10), "train.warmup": whole(), "train.hold": whole(), "train.beta2": real(0, 0.99999),
    "train.grad_clip": real(1e-9, 1e12), "train.label_drop": SHARE, "train.ema": SHARE,
    "train.precision": PRECISION, "train.compile": FLAG, "train.activation_checkpointing": FLAG,
    "train.log_every": whole(), "train.val_every": whole(), "train.val_pairs": whole(), "train.preview_every": whole(),
    "train.previews": whole(1, 1024), "train.save_every": whole(),
    "sample.mask": TEXT, "sample.n": whole(), "sample.sampler": one_of("dpm_solver", "plms", "ddim", "ddpm"),
    "sample.steps": whole(), "sample.eta": SHARE, "sample.guidance": real(0, 1000),
    "sample.guidance_interval": INTERVAL, "sample.seed": SEED, "sample.batch_size": whole(1, 65_536),
    "sample.precision": PRECISION, "sample.out": NAME,
}


def flatten(tree, prefix=""):
    """{"a": {"b": 1}} to {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        is_part = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if is_part else {f"{prefix}{key}": value}
    return flat


def nest(flat):
    """{"a.b": 1} to {"a": {"b": 1}}."""
    tree = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        part = tree
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = value
    return tree


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a repeated key is an error; PyYAML itself keeps the last one."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ValueError(f"the key {key.value!r} of line {key.start_mark.line + 1} is there twice: delete one")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path):
    """The settings {"a.b": value} of a file, and its presets {name: settings}. ValueError names the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such config file; the one that comes with the project is {PROJECT}")
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8-sig"), UniqueKeys)
        presets = tree.pop("presets", None) or {}
        return flatten(tree), {name: flatten(layer) for name, layer in presets.items()}
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:
        hint = ". Indent with spaces, not with tabs" if r"'\t'" in str(error) else ""
        hint = ". Save it as UTF-8" if isinstance(error, UnicodeDecodeError) else hint
        raise ValueError(f"{path}: not readable as YAML: {error}{hint}") from None
    except (AttributeError, TypeError):
        raise ValueError(f"{path}: expected a mapping of settings, with presets that are mappings too") from None


def checked(key, value, where):
    """The value, of the type that SETTINGS asks for; a ValueError names the file, the key and the remedy."""
    if key not in SETTINGS:
        def likeness(known):  # of the whole key and of its last part
            pairs = (key, known), (key.split(".")[-1], known.split(".")[-1])
            return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        raise ValueError(f"{where}: no setting is called {key!r}; the nearest is {max(SETTINGS, key=likeness)!r}")
    kind, expected, fits = SETTINGS[key]
    if kind is float and type(value) in (int, str):
        try:
            value = float(value)  # YAML takes 1 for whole and 1e-4 for a text
        except (ValueError, OverflowError):
            pass
    if type(value) is not kind or not fits(value):
        raise ValueError(f"{where}: {key} is {value!r:.200}; expected {expected}")
    return value


def parse_overrides(texts):
    """{key: value} of "key.sub=value" texts, checked."""
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key == "preset":
            raise ValueError(f"--set {text}: expected key.sub=value; a preset is named by --preset")
        try:
            parsed = yaml.safe_load(value) if value else ""
        except (yaml.YAMLError, ValueError, LookupError, RecursionError):
            parsed = value
        settings[key] = checked(key, parsed, f"--set {text}")
    return settings


def load_config(path=None, preset=None, overrides=(), base=None):
    """A nested dict of all settings. ValueError or FileNotFoundError name the file, the key and the remedy.

    Later ones go over earlier ones:
      1. the project's config.yaml
      2. `base`, the config of a checkpoint; keys that no longer exist are left out
      3. the preset, as the project has it
      4. the file `path`, where one is named; before 3 if the caller names the preset
      5. the preset, as that file has it
      6. `overrides`, texts key.sub=value
    The preset that a file names goes with its data: it is left out where an override names another data.root. An empty
    `out` becomes runs/<name of the data>.
    """
    project, project_presets = read_yaml(PROJECT)
    own, own_presets = read_yaml(path) if path else ({}, {})
    base = {key: value for key, value in flatten(base or {}).items() if key in SETTINGS}
    given = parse_overrides(overrides)

    # a file may name a preset; a checkpoint has all settings already
    named_by = own if path else {} if base else project
    name = checked("preset", preset or named_by.get("preset", ""), path or PROJECT)
    presets = project_presets | own_presets
    if name and name not in presets:
        raise ValueError(f"{path or PROJECT}: no preset is called {name!r}; there are {', '.join(map(str, presets))}")
    if name and not preset and "data.root" in given:
        print(f"data.root is {given['data.root']}, so the preset {name!r} is not used (--preset {name} would)")
        name = ""

    layers = [(PROJECT, project), ("config", base)]
    middle = [(f"{PROJECT}, preset {name}", project_presets.get(name, {})), (path, own)]
    layers += reversed(middle) if preset else middle
    layers += [(f"{path}, preset {name}", own_presets.get(name, {}))]
    settings = {key: checked(key, value, where) for where, layer in layers for key, value in layer.items()}
    missing = SETTINGS.keys() - settings.keys()
    if missing:
        raise ValueError(f"{PROJECT}: missing settings: {', '.join(sorted(missing))}")
    settings |= given | {"preset": ""}  # all is resolved: the config that a run saves needs no preset any more
    if not settings["out"]:
        data = Path(os.path.abspath(settings["data.root"]))
        settings["out"] = str(Path("runs", data.parent.name if data.name == "prepared" else data.name))
    return nest(settings)


def add_config_arguments(parser, default=None):
    parser.add_argument("--config", default=default, help=f"the YAML file (default: {PROJECT.name} of the project)")
    parser.add_argument("--preset", help="a preset of that file, instead of the one that it names")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting: train.steps=2000")


def command(run, *args):
    """Run the main part of a program: what the user can fix ends in one line, Ctrl-C in exit code 130."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that this terminal cannot show is no error
    try:
        run(*args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
    except KeyboardInterrupt as stopped:
        print("\nstopped by Ctrl-C" + "".join(f": {text}" for text in stopped.args), file=sys.stderr)
        raise SystemExit(130)
