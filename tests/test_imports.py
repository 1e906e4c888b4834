"""The nine files import each other in one direction only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {"unet": "", "ddpm": "", "masks": "", "config": "", "dataset": "masks",
           "checkpoint": "config unet ddpm masks",
           "train": "config unet ddpm masks dataset checkpoint", "sample": "config unet ddpm masks dataset checkpoint",
           "evaluate": "config unet ddpm masks dataset checkpoint"}


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_run_one_way(name):
    """Each file imports only those that come before it; train.py alone may start the drawing of toy scenes."""
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    folders = {"data", "experiments", "benchmarks", "painter", "tests"}
    ours = {module for module in imported if module in ALLOWED or module.split(".")[0] in folders}
    assert ours <= set(ALLOWED[name].split()) | ({"data.toy.prepare"} if name == "train" else set())


def test_nothing_else_lies_at_the_top_level():
    """The programs at the top level are these nine."""
    assert {path.stem for path in ROOT.glob("*.py")} == set(ALLOWED)
