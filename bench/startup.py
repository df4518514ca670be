"""How long a user waits: for a refusal, for help, and for the first token of the demo.

    python -m bench.startup

CPU and wall-clock seconds of whole processes, the imports of Python included.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import typer

FIRST = """
import os, sys, time, resource
from topd.training.experience import Observer

def roll_out(self, prompts, seeds):
    def tick(*_):
        used = resource.getrusage(resource.RUSAGE_SELF)
        print("CPU", used.ru_utime + used.ru_stime, flush=True)
        os._exit(0)
    self.student.generate([p.student for p in prompts], self.args.sampling, seeds, tick=tick)

Observer.roll_out = roll_out
from topd.cli import app
sys.argv[0] = "topd"
app()
"""
COMMANDS = {
    "a mistyped key": ["train", "recipes/testbed/arithmetic.yaml", "--learning_rat", "1"],
    "an unknown method": ["train", "recipes/testbed/arithmetic.yaml", "--method", "topdd"],
    "a recipe that is not there": ["train", "nowhere.yaml"],
    "topd --help": ["--help"],
    "topd methods": ["methods"],
    "topd settings window": ["settings", "window"],
}


def main(recipe: str = "recipes/smollm2_gsm8k.yaml") -> None:
    """Print a table of CPU and wall-clock seconds."""
    print("| wait for | CPU s | wall s |\n|---|---|---|")
    for name, words in COMMANDS.items():
        before, begun = _children(), time.perf_counter()
        command = [sys.executable, "-m", "topd", *words]
        subprocess.run(command, capture_output=True, check=False)  # noqa: S603
        _row(name, _children() - before, time.perf_counter() - begun)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        words = ["train", recipe, "--output_dir", str(Path(folder) / "run")]
        command = [sys.executable, "-c", FIRST, *words]
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=True, env=dict(os.environ)
        )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("CPU ")]
    _row(f"the first token of {recipe}", float(line.split()[1]), time.perf_counter() - begun)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _row(name: str, cpu: float, wall: float) -> None:
    print(f"| {name} | {cpu:.2f} | {wall:.2f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
