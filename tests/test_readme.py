"""What the READMEs promise: their commands can be typed, and what they name is there."""

import argparse
import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from config import load_config, parse_overrides

PAGES = {name: Path(name).read_text(encoding="utf-8") for name in ("README.md", "experiments/README.md")}
README, BOTH = PAGES["README.md"], "\n".join(PAGES.values())
FENCES = re.findall(r"^```sh\n(.*?)^```", BOTH, re.M | re.S)
INLINE = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", BOTH, flags=re.M | re.S))


def table(heading):
    """The cells of the first table under a heading."""
    lines = README.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


def commands():
    """What follows `python` in every command: ["train.py", "--preset", "toy"]; of torchrun's, from the program on."""
    words = []
    lines = "\n".join(FENCES).splitlines() + [" ".join(text.split()) for text in INLINE]
    for line in lines:
        for part in line.split(" && "):
            if re.match(r"(\S*/)?python3? |torchrun ", part):
                program, *rest = shlex.split(part, comments=True)
                if program == "torchrun":
                    rest = rest[next(i for i, word in enumerate(rest) if word == "-m" or word.endswith(".py")):]
                words.append(rest)
    return words


def is_ours(words):
    return words[0] != "-m" or Path(words[1].split(".")[0]).is_dir()  # else a module of Python or of a package


class Parsed(BaseException):
    """The arguments that a program was given, in place of running it."""


@pytest.mark.parametrize("words", [*filter(is_ours, commands())], ids=" ".join)
def test_commands_parse(words, monkeypatch):
    """A command of the README is one that the program takes, and its settings resolve."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        raise Parsed(real(self, *args, **kwargs))

    if words[0] == "-c":
        compile(words[1], "README", "exec")
        return
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    arguments = words[2:] if words[0] == "-m" else words[1:]
    monkeypatch.setattr(sys, "argv", [words[0], *arguments])
    with pytest.raises(Parsed) as parsed:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    if words[0] in ("train.py", "sample.py"):
        given = parsed.value.args[0]
        load_config(given.config, given.preset, given.set)


def test_every_program_has_a_command():
    """There is a command for each program, each script that prepares data, each experiment and each benchmark."""
    started = {words[1] if words[0] == "-m" else words[0] for words in commands()}
    scripts = [*Path("data").glob("*/prepare.py"), *Path("experiments").glob("*.py"), *Path("benchmarks").glob("*.py")]
    runnable = {".".join(path.with_suffix("").parts) for path in scripts if "__main__" in path.read_text("utf-8")}
    assert started >= {"train.py", "sample.py", "evaluate.py", "masks.py"} | runnable


def test_settings_and_presets_exist():
    """A preset, a --set or a setting with a value that the README names is one that the config takes."""
    for preset in re.findall(r"--preset (\w+)", BOTH):
        load_config("config.yaml", preset)
    pattern = r"(?:--set |`)((?:data|model|diffusion|train|sample)\.[\w.]+)(?:=|: )([^\s`]+)"
    settings = re.findall(pattern, BOTH)
    assert len(settings) > 8
    for key, value in settings:
        parse_overrides([f"{key}={value}"] if value != "..." and value != "VALUE" else [])


def test_links_lead_somewhere():
    """Every file and every section that a link names is there."""
    for name, page in PAGES.items():
        links = re.findall(r"\]\(((?!http)[^)]+)\)", page)
        assert len(links) > 2
        for link in links:
            file, _, section = link.partition("#")
            target = Path(name).parent / file if file else Path(name)
            assert target.exists(), link
            if section:
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8").lower(), re.M)
                assert section in [re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("row", table("Symbols"), ids=lambda row: row[0])
def test_symbols_exist(row):
    """Every symbol of the table is a name in the file beside it."""
    code = "\n".join(Path(name).read_text(encoding="utf-8") for name in re.findall(r"`([\w.]+\.py)`", row[2]))
    for name in re.findall(r"`(\w+)`", row[1]):
        assert re.search(rf"\b{name}\b", code), f"{name} is not in {row[2]}"


@pytest.mark.parametrize("row", table("Deviations"), ids=lambda row: row[0])
def test_deviations_name_files(row):
    """The file of every deviation is there."""
    assert Path(row[1].strip("`")).exists()


@pytest.mark.parametrize("row", table("Promises, and the tests that check them"), ids=lambda row: row[0][:40])
def test_promises_are_tested(row):
    """The tests that check a promise are there, and are tests."""
    names = re.findall(r"`([^`]+)`", row[1])
    assert names and not [name for name in names if not Path(name).exists()]
    for name in names:
        files = [*Path(name).glob("test_*.py")] if name.endswith("/") else [Path(name)]
        assert files and all("def test_" in file.read_text(encoding="utf-8") for file in files), name


def test_the_reading_order_names_every_file():
    """The files of the reading order are there, and the nine of the core are among them."""
    order = README.split("## Reading order\n")[1].split("\n## ")[0]
    names = set(re.findall(r"`([\w/]+\.(?:py|yaml))`", order))
    assert all(Path(name).exists() for name in names)
    assert names >= {path.name for path in Path(".").glob("*.py")}


def quotations():
    """[(file, function, line)] of all quoted code that tells how it works; the comment above a line names its place."""
    section, found = README.split("## How it works\n")[1].split("\n## ")[0], []
    for fence in re.findall(r"^```python\n(.*?)^```", section, re.M | re.S):
        for line in fence.splitlines():
            if line.startswith("#"):
                place = re.search(r"  (\w+\.py), ([\w.]+)$", line).groups()
            else:
                found.append((*place, line))
    return found


@pytest.mark.parametrize("file, function, line", quotations())
def test_quoted_lines_are_in_the_code(file, function, line):
    """A line that the README quotes stands, as it is, in the function named beside its equation."""
    code = Path(file).read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)]
    sources = [ast.get_source_segment(code, node) for node in functions if node.name == function.split(".")[-1]]
    assert any(line in map(str.strip, source.splitlines()) for source in sources)


def test_ci_runs_the_readme_command():
    """CI installs and tests with the very line that people are told."""
    assert "grep -m1 'python -m pytest' README.md" in Path(".ci/run").read_text(encoding="utf-8")
    assert re.search(r"^python3 -m venv .*requirements.txt && .*python -m pytest", README, re.M)
