"""Which kind of run a folder holds, and its logs. Its records are in :mod:`topd.runs.records`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from topd.errors import TOPDError
from topd.runs.files import check_is_folder, read_lines
from topd.runs.records import check_format, read_run, updates_in

Kind = Literal["training", "probe", "repair", "compare", "evaluation", "gate"]
MARKS: tuple[tuple[Kind, tuple[str, ...]], ...] = (  # which files make which kind, first hit
    ("gate", ("gate.json",)),
    ("evaluation", ("evaluation.json", "responses.jsonl")),
    ("compare", ("compare.json", "results.jsonl")),
    ("repair", ("repair.json", "samples.jsonl")),
    ("probe", ("probe.json", "positions.jsonl")),
    ("training", ("metrics.jsonl", "rollouts.jsonl")),
)


def kind_of(folder: Path) -> Kind:
    """What kind of run a folder holds. Raises TOPDError: no folder, or no run in it."""
    check_is_folder(folder)
    for kind, names in MARKS:
        if any((folder / name).is_file() for name in names):
            check_format(folder)
            return kind
    known = ", ".join(name for _, names in MARKS for name in names)
    raise TOPDError(f"run folder {folder}: holds no run. It has none of {known}.")


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings in a run's run.json; empty where there are none."""
    return read_run(folder).get("config") or {}


def is_stage1(settings: Mapping[str, Any]) -> bool:
    """Whether a run's settings are those of a warm start."""
    return "answers" in settings


def read_logs(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, numbers only, in order."""
    return [
        {key: value for key, value in log.items() if isinstance(value, int | float)}
        for log in read_lines(folder / "metrics.jsonl")
    ]


def finite(logs: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[int]]:
    """The finite values of a key, and over how many updates each is the mean.

    >>> finite([{"step": 2, "loss": 0.5}, {"step": 4}, {"step": 7, "loss": 0.25}], "loss")
    ([0.5, 0.25], [2, 3])
    """
    counted = zip(logs, updates_in(logs), strict=True)
    found = [(log[key], n) for log, n in counted if math.isfinite(log.get(key, math.nan))]
    return [value for value, _ in found], [n for _, n in found]
