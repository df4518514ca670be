"""How the benchmarks measure: paired runs in both orders, peak memory of a process, a table."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path("docs/results")
PACKAGES = ("torch", "transformers", "trl", "POT", "scipy", "numpy")
MIB = 1 << 20

Found = dict[str, Any]


def paired(cases: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of every case in every run; each second run goes through the cases backwards.

    Each case runs once before, unmeasured.
    """
    for case in cases.values():
        case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for run in range(runs):
        for name in in_turn(list(cases), run):
            started = time.perf_counter()
            cases[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def in_turn(names: Sequence[str], run: int) -> Sequence[str]:
    """The order of a run: forwards, then backwards, and so on."""
    return names[:: -1 if run % 2 else 1]


def against(base: Sequence[float], other: Sequence[float]) -> Found:
    """The quotients other / base of paired runs: their median, least and largest."""
    quotients = [o / b for b, o in zip(base, other, strict=True)]
    return {"median": statistics.median(quotients), "low": min(quotients), "high": max(quotients)}


def summary(seconds: Mapping[str, Sequence[float]]) -> Found:
    """Median seconds of every case, and its quotient with the first case."""
    base = next(iter(seconds.values()))
    return {
        name: {"seconds": statistics.median(own), "ratio": against(base, own), "runs": list(own)}
        for name, own in seconds.items()
    }


def peak_memory(case: Callable[[], object]) -> int:
    """Bytes by which this process grows at most during ``case``: resident set, its high-water mark.

    The mark is reset first, so what was there before does not count. Meant for a process that has
    done nothing else (:func:`in_fresh_process`): freed memory that it kept would be used again.
    """
    before = reset_peak()
    case()
    return resident("VmHWM") - before


def reset_peak() -> int:
    """Set the high-water mark of the resident set to the resident set; return it, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    """A line of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


@dataclass(frozen=True)
class Table:
    """Rows of text under a title, and a line of what to know about them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __str__(self) -> str:
        """Markdown, with columns of even width so that a terminal shows it too."""
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [_line([cell.ljust(w) for cell, w in zip(x, widths, strict=True)]) for x in lines]
        text.insert(1, _line(["-" * width for width in widths]))
        note = ["", self.note] if self.note else []
        return "\n".join([f"### {self.title}", "", *text, *note])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(ratio: Found) -> str:
    """A quotient as text."""
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def environment() -> Found:
    """What the figures depend on."""
    return {
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }


def describe(found: Found) -> str:
    """The environment of a result as text, in lines of at most 80 characters."""
    here = found["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
    machine = f"{here['cpu']}, {here['cores']} cores, threads: {here['threads']}"
    precision = found["settings"]["precision"]
    lines = f"{machine}, {precision}, load {here['load']} at the start;\n{versions}."
    return f"`{found['command']}`\n\n{lines}"


def finish(
    name: str,
    settings: Found,
    results: Found,
    started: Found,
    tables: Callable[[Found], Iterable[Table]],
    folder: Path,
) -> None:
    """Write docs/results/perf-NAME.json and print its tables."""
    command = f"python -m bench.{name.split('-')[0]} {shlex.join(sys.argv[1:])}".strip()
    found = {"command": command, "environment": started, "settings": settings, "results": results}
    (folder / f"perf-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(describe(found), *map(str, tables(found)), sep="\n\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
