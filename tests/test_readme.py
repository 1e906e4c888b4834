"""What the README promises."""

import re
from pathlib import Path

import pytest

from config import SETTINGS, flatten

README = Path("README.md").read_text(encoding="utf-8")


def table(heading):
    """The cells of the first table under a heading."""
    lines = README.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


@pytest.mark.parametrize("row", table("Symbols"), ids=lambda row: row[0])
def test_symbols_exist(row):
    """A reader would look for a symbol that is not there."""
    code = "\n".join(Path(name).read_text(encoding="utf-8") for name in re.findall(r"`([\w.]+\.py)`", row[2]))
    for name in re.findall(r"`(\w+)`", row[1]):
        assert re.search(rf"\b{name}\b", code), f"{name} is not in {row[2]}"


@pytest.mark.parametrize("row", table("Deviations"), ids=lambda row: row[0])
def test_deviations_name_files(row):
    """A row of the deviations would lead nowhere."""
    assert Path(row[1].strip("`")).exists()


def test_files_and_settings_exist():
    """A link, a file or a setting that the README names would be gone."""
    for link in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert Path(link).exists(), link
    settings = flatten(SETTINGS)
    for key in re.findall(r"(?:--set |`)((?:data|model|diffusion|train|sample)\.\w+)[=`:]", README):
        assert key in settings or Path(key).exists(), key


def test_ci_runs_the_readme_command():
    """CI would test another way of installing than the one that people are told."""
    assert "grep -m1 'python -m pytest' README.md" in Path(".ci/run").read_text()
    assert re.search(r"^python3 -m venv .*requirements.txt && .*python -m pytest", README, re.M)
