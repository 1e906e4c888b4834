"""One YAML: presets, overrides, the nearest key."""

import difflib
import sys
from pathlib import Path

import yaml

SIZE, SHARE = "two multiples of 8, at most 8192: [height, width]", (0.0, 1.0)
INTERVAL = "two rising numbers, 0 or more: [lowest, highest], or [] for no limits"
SETTINGS = {  # every key of config.yaml: its type, a range of whole numbers, the ends of other numbers, or the texts it may be
    "preset": str, "device": ("auto", "cuda", "mps", "cpu"), "seed": range(2**63), "out": str,
    "data": {"root": str, "val": str, "size": SIZE, "flip": SHARE, "memory_gb": float, "augment": {
        "p": SHARE, "brightness": SHARE, "contrast": SHARE, "saturation": SHARE, "hue": (0.0, 0.5), "vertical_flip": bool,
        "rotate": (0.0, 180.0), "crop": (0.1, 1.0)}},
    "model": {"conditional": bool, "hidden_dim": range(2, 4097, 2), "emb_dim": range(2, 4097, 2), "attention": bool},
    "diffusion": {"T": range(2, 100_001), "schedule": ("thesis", "linear", "nichol"), "beta_start": (1e-8, 0.999),
                  "beta_end": (1e-8, 0.999), "prediction": ("eps", "v")},
    "train": {"steps": int, "batch_size": range(1, 65_537), "accumulate": range(1, 65_537), "lr": (1e-9, 10.0), "warmup": int,
              "hold": int, "beta2": (0.0, 0.99999), "grad_clip": (1e-9, 1e12), "label_drop": SHARE, "ema": SHARE,
              "precision": ("fp32", "fp16", "bf16"), "compile": bool, "activation_checkpointing": bool, "fsdp": bool, "log_every": int,
              "val_every": int, "val_pairs": int, "preview_every": int, "previews": range(1, 1025), "save_every": int},
    "sample": {"mask": str, "n": int, "sampler": ("dpm_solver", "plms", "ddim", "ddpm"), "steps": int, "eta": SHARE,
               "guidance": (0.0, 1000.0), "guidance_interval": INTERVAL, "one_batch": bool, "seed": range(2**63),
               "batch_size": range(1, 65_537), "precision": ("auto", "fp32", "fp16", "bf16"), "compile": bool, "out": str},
}


def flatten(tree, prefix=""):
    """{"a": {"b": 1}} to {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def checked(key, value, where):
    """The value as the type that SETTINGS asks for, or a ValueError that names the file, the key and the remedy."""
    known = flatten(SETTINGS)
    if key not in known:
        near = difflib.get_close_matches(key, known, 1, 0) or difflib.get_close_matches(
            key.split(".")[-1], [k.split(".")[-1] for k in known], 1, 0)
        raise ValueError(f"{where}: no setting is called {key!r}; the nearest is {near[0]!r}")
    want = known[key]
    if want is int:
        want = range(1, 10**9 + 1)
    elif want is float:
        want = (0.0, 1e9)
    if want is SIZE:
        expected = SIZE
        fine = isinstance(value, list) and len(value) == 2 and all(type(v) is int and v in range(8, 8193, 8) for v in value)
    elif want is INTERVAL:
        expected = INTERVAL
        fine = value == [] or (isinstance(value, list) and len(value) == 2 and all(type(v) in (int, float) for v in value)
                               and 0 <= value[0] < value[1])
    elif want is bool:
        expected, fine = "true or false", type(value) is bool
    elif want is str:
        may_be_empty = key in ("preset", "sample.mask")
        expected = "a text" + ("" if may_be_empty else " that is not empty") + ", in quotes if it looks like something else"
        fine = isinstance(value, str) and value.isprintable() and bool(may_be_empty or value.strip())
    elif isinstance(want, range):
        low = {0: "from 0 on", 1: "above 0"}.get(want[0], f"from {want[0]} on")
        expected = f"{'an even' if want.step == 2 else 'a'} whole number {low}, at most {want[-1]}"
        fine = type(value) is int and value in want
    elif isinstance(want[0], str):
        expected, fine = f"one of {', '.join(want)}", value in want
    else:
        expected, number = f"a number from {want[0]:g} to {want[1]:g}", value
        if isinstance(value, (int, str)) and not isinstance(value, bool):  # YAML takes 1 for an int and 1e-4 for a string
            try:
                number = float(value)
            except (ValueError, OverflowError):
                pass
        fine = isinstance(number, float) and want[0] <= number <= want[1]
        value = number if fine else value
    if not fine:
        raise ValueError(f"{where}: {key} is {value!r:.200}; expected {expected}")
    return value


class UniqueKeys(yaml.SafeLoader):
    """YAML without what would surprise: PyYAML keeps the last of two equal keys, and an alias can be of endless size."""

    def construct_mapping(self, node, deep=False):
        lines = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise ValueError(f"the key {name!r} stands in line {lines[name]} and again in line {line}: delete one of them")
            if "." in name:
                raise ValueError(f"the key {name!r} in line {line} has a dot, which only --set understands: nest it")
            lines[name] = line
        return super().construct_mapping(node, deep)

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"an alias in line {self.peek_event().start_mark.line + 1}: write the value itself")
        return super().compose_node(parent, index)


def load_config(path, preset=None, overrides=()):
    """config.yaml with a preset laid over it and `key.sub=value` overrides over that, checked: a nested dict."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such config file; the one that comes with the project is config.yaml")
    try:
        with open(path, encoding="utf-8-sig") as file:
            tree = yaml.load(file, UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        hint = ". Indent with spaces, not with tabs" if r"'\t'" in str(error) else ""
        hint = ". Save it as UTF-8" if isinstance(error, UnicodeDecodeError) else hint
        raise ValueError(f"{path}: not readable as YAML: {error}{hint}") from None
    presets = tree.pop("presets", None) or {} if isinstance(tree, dict) else None
    if not isinstance(presets, dict) or not all(isinstance(layer, dict) for layer in presets.values()):
        raise ValueError(f"{path}: expected a mapping of settings, with presets that are mappings too")
    name = preset or tree.get("preset") or ""
    if not isinstance(name, str) or name not in presets and (preset or name and presets):
        # a run's resolved config keeps the name, not the presets
        raise ValueError(f"{path}: no preset is called {name!r}; there are {', '.join(map(str, presets)) or 'none'}")
    settings = {key: (value, str(path)) for key, value in flatten(tree).items()}
    settings |= {key: (value, f"{path}, preset {name}") for key, value in flatten(presets.get(name, {})).items()}
    settings["preset"] = (name, str(path))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or key == "preset":
            raise ValueError(f"--set {text}: expected key.sub=value" + (", and --preset for a preset" if equals else ""))
        try:
            settings[key] = (yaml.safe_load(value) if value else "", f"--set {text}")
        except (yaml.YAMLError, ValueError, RecursionError):
            settings[key] = (value, f"--set {text}")
    cfg = {}
    for key, (value, where) in settings.items():
        value, at = checked(key, value, where), cfg
        *parents, last = key.split(".")
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    missing = flatten(SETTINGS).keys() - flatten(cfg).keys()
    if missing:
        raise ValueError(f"{path}: missing settings: {', '.join(sorted(missing))}; the project's config.yaml has them all")
    return cfg


def add_config_arguments(parser, default="config.yaml"):
    parser.add_argument("--config", default=default, help="the YAML file (default: config.yaml)")
    parser.add_argument("--preset", help="a preset of that file, instead of the one that it names")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, such as train.steps=2000")


def command(run, *args):
    """Run the main part of a program: what the user can fix ends in one line, Ctrl-C in exit code 130."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that this terminal cannot show is no error
    try:
        run(*args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
    except KeyboardInterrupt as stopped:
        print(f"\nstopped by Ctrl-C{'; ' * bool(stopped.args)}{' '.join(map(str, stopped.args))}", file=sys.stderr)
        raise SystemExit(130)
