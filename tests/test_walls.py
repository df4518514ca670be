"""Which room may import which: the direction of CONTRIBUTING's floor plan."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import topd

ROOT = Path(topd.__file__).parent
SHELF = [
    "errors", "types", "seeds", "distributed", "statistics", "divergence", "named", "detectors",
    "transport", "losses", "methods", "config",
]  # fmt: skip
ROOMS = {  # every room, and the rooms that it may import besides itself and the shelf
    "testbed": set(),
    "inputs": {"testbed"},
    "engines": {"inputs", "testbed"},
    "runs": {"inputs", "testbed"},
    "training": {"inputs", "testbed", "engines", "runs"},
    "evaluate": {"inputs", "testbed", "engines", "runs"},
    "report": {"runs"},
    "commands": {"inputs", "testbed", "engines", "runs", "training", "evaluate", "report"},
}
FRONT = {"__init__", "__main__", "cli"}


def imported(path: Path) -> set[str]:
    """The first part below topd of everything that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "topd":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("topd."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = path.relative_to(ROOT).with_suffix("").parts[0]
    names = imported(path) & (set(SHELF) | set(ROOMS) | FRONT)
    if here in FRONT:
        return
    allowed = set(SHELF[: SHELF.index(here) + 1]) if here in SHELF else set(SHELF) | ROOMS[here]
    assert names <= allowed | {here}


def test_there_are_few_files_at_the_top() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 14
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()} == (
        set(ROOMS) | {"config", "losses"}
    )


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_no_folder_has_more_than_13_modules(room: str) -> None:
    for folder in [ROOT / room, *(path for path in (ROOT / room).rglob("*") if path.is_dir())]:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= 13, folder


def test_every_fixture_says_what_it_gives() -> None:
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.returns is None:
                assert not any("fixture" in ast.unparse(d) for d in node.decorator_list), (
                    f"{path.name}: {node.name}"
                )


def test_at_most_two_modules_are_longer_than_400_lines() -> None:
    long = [str(p) for p in ROOT.rglob("*.py") if len(p.read_text().splitlines()) > 400]
    assert len(long) <= 2, long
