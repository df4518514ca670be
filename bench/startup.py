"""How long a user waits: for a refusal, for help, and for the first token of a recipe.

    python -m bench.startup [RECIPE] [--other FOLDER] [--runs 3]

Seconds of whole processes, the imports of Python included. Another checkout of this repository is
measured in turns with this one, each with its own recipe of that name. The CPU time is that of a
process and its threads, which other work on the same cores hardly changes; the wall-clock time is
fair only on idle cores.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parents[1]
FIRST = """
import os, sys
from topd.engines.hf import HFEngine
generate = HFEngine.generate

def until_the_first(self, *args, **rest):
    if not sys._getframe(1).f_code.co_filename.endswith("decode_check.py"):
        rest["tick"] = lambda *_: os._exit(99)
    return generate(self, *args, **rest)

HFEngine.generate = until_the_first
from topd.cli import app
sys.argv[0] = "topd"
app()
"""
ARITHMETIC = "recipes/testbed/arithmetic.yaml"
COMMANDS = {
    "a mistyped key": ["train", ARITHMETIC, "--learning_rat", "1"],
    "an unknown method": ["train", ARITHMETIC, "--method", "topdd"],
    "a recipe that is not there": ["train", "nowhere.yaml"],
    "topd --help": ["--help"],
    "topd methods": ["methods"],
    "topd settings window": ["settings", "window"],
}


def main(
    recipe: Annotated[str, typer.Argument()] = "recipes/demo.yaml",
    other: Annotated[Path | None, typer.Option(help="Another checkout, measured too.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Medians of so many, in turns.")] = 3,
) -> None:
    """Print a table of CPU and wall-clock seconds, medians."""
    trees = {"here": HERE} if other is None else {"here": HERE, str(other): other.resolve()}
    print(f"Medians of {runs} runs in turns; load {os.getloadavg()[0]:.1f} at the start\n")
    columns = [f"{unit} s, {name}" for name in trees for unit in ("CPU", "wall")]
    print(f"| wait for | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, words in COMMANDS.items():
        _row(name, trees, ["-m", "topd", *words], runs, (0, 2))
    with tempfile.TemporaryDirectory() as folder:
        words = ["-c", FIRST, "train", recipe, "--output_dir", str(Path(folder) / "run")]
        _row(f"the first token of {recipe}", trees, words, runs, (99,))


def _row(
    name: str, trees: dict[str, Path], words: list[str], runs: int, codes: tuple[int, ...]
) -> None:
    """A line of the table; where a checkout does not do it, its cells say so."""
    seconds: dict[str, list[tuple[float, float]]] = {tree: [] for tree in trees}
    for _ in range(runs):
        for tree, place in trees.items():
            if (found := _seconds(place, words, codes)) is not None:
                seconds[tree].append(found)
    cells = [
        f"{statistics.median(both):.2f}" if both else "-"
        for found in seconds.values()
        for both in (list(zip(*found, strict=True)) or [(), ()])
    ]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _seconds(place: Path, words: list[str], codes: tuple[int, ...]) -> tuple[float, float] | None:
    """CPU and wall-clock seconds of a command in a checkout; None where it ends otherwise."""
    before, begun = _children(), time.perf_counter()
    done = subprocess.run(  # noqa: S603
        [sys.executable, *words],
        capture_output=True,
        check=False,
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(place / "src")},
    )
    wall = time.perf_counter() - begun
    return (_children() - before, wall) if done.returncode in codes else None


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    typer.run(main)
