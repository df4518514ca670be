"""What an audit found, in words, and where two records differ."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topd.errors import TOPDError
from topd.runs.files import as_json, is_written_to
from topd.runs.records import as_before


@dataclass
class AuditResult:
    """What was checked, and the faults; both in words."""

    checked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def not_under_way(folder: Path, found: AuditResult) -> AuditResult:
    """What was found, but of no run that is under way: what it has just added looks like a fault.

    Raises TOPDError for faults of a folder that a process writes to.
    """
    if found.faults and is_written_to(folder):
        raise TOPDError(
            f"{folder}: the run is under way, so that its files were read at different times and "
            "faults cannot be told from what it added in between. Run this again once it has "
            "ended, or, if it was killed, in a minute."
        )
    return found


def is_suspect(found: AuditResult, *beginnings: str) -> bool:
    """Whether a fault was found already in what a further check relies on."""
    return any(fault.startswith(beginnings) for fault in found.faults)


def place_of(record: Mapping[str, Any]) -> str:
    if "rollout" in record:
        return f"update {record['step']}, rollout {record['rollout']}"
    return f"step {record['step']}"


def disagreements(
    recorded: Mapping[str, Any], now: Mapping[str, Any], known: set[str], tolerance: float
) -> Iterator[str]:
    plain = as_before(as_json(now), recorded)
    for key in sorted(known & plain.keys()):
        if key not in recorded:
            yield f"{place_of(recorded)}: {key} is missing"
            continue
        where = _difference(recorded[key], plain.get(key), tolerance)
        if where is not None:
            yield f"{place_of(recorded)}: {key}{where}"


def _difference(recorded: Any, now: Any, tolerance: float) -> str | None:
    """Where two values of JSON differ first, and how; None if they agree."""
    if isinstance(recorded, dict) and isinstance(now, dict) and recorded.keys() == now.keys():
        pairs = [(f".{key}", recorded[key], now[key]) for key in recorded]
    elif isinstance(recorded, list) and isinstance(now, list) and len(recorded) == len(now):
        pairs = [(f"[{i}]", *pair) for i, pair in enumerate(zip(recorded, now, strict=True))]
    elif recorded == now or _are_near(recorded, now, tolerance):
        return None
    else:
        return f": recorded {shortened(recorded)}, re-derived {shortened(now)}"
    for where, one, other in pairs:
        inner = _difference(one, other, tolerance)
        if inner is not None:
            return where + inner
    return None


def _are_near(recorded: Any, now: Any, tolerance: float) -> bool:
    if not (isinstance(recorded, float) and isinstance(now, float)):
        return False
    return abs(recorded - now) <= tolerance or (math.isnan(recorded) and math.isnan(now))


def is_close(logged: Any, value: float, tolerance: float) -> bool:
    """Whether a figure of a log, which may be anything, is this one."""
    return isinstance(logged, (int, float)) and abs(logged - value) <= tolerance


def shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
