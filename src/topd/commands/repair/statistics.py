"""What the samples of a repair say: means and paired differences with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from topd.commands.probe.intervals import Array, intervals, method_of
from topd.commands.probe.statistics import cost_of
from topd.commands.repair.config import RepairConfig
from topd.runs.files import read_lines

SAMPLES = "samples.jsonl"
PAPER = {"before": 0.538, "opd": 0.350, "topd": 0.204}


def summarise(folder: Path, args: RepairConfig) -> dict[str, Any]:
    """The content of repair.json, from the records in the folder."""
    names = ("before", *args.method_names)
    table = read_table(folder / SAMPLES, names)
    found = intervals(table, measure, repeats=args.bootstrap, seed=args.seed)
    return {
        "samples": len(table),
        "updates": args.updates,
        "learning_rate": args.learning_rate,
        "window_length": args.window_length,
        "trajectory_weight": {
            name: args.loss_of(name).trajectory_weight for name in args.method_names
        },
        "interval": method_of(args.bootstrap),
        "mean_distance_found": float(table["found"].mean()),
        "arms": {
            name: {
                "median": float(np.median(table[name])),
                **{
                    statistic.partition("/")[0]: asdict(interval)
                    for statistic, interval in found.items()
                    if statistic.partition("/")[2] == name
                },
            }
            for name in names
        },
        "paper": PAPER,
        "cost": {"seconds": cost_of(folder)["seconds"]},
    }


def read_table(path: Path, names: Sequence[str]) -> Array:
    """samples.jsonl as a structured array: a row a sample, a column a method."""
    kind = np.dtype([("prompt", "i8"), ("found", "f8"), *((name, "f8") for name in names)])
    rows: list[dict[str, float]] = []
    for record in read_lines(path):
        if record["arm"] == "before":
            rows.append({"prompt": record["prompt"], "found": record["found"]})
        rows[-1][record["arm"]] = record["distance"]
    return np.array([tuple(row[name] for name in kind.names or ()) for row in rows], kind)


def measure(table: Array) -> dict[str, float]:
    """Means and paired comparisons; a reduction is in per cent of the mean before."""
    names = [name for name in table.dtype.names or () if name not in ("prompt", "found")]
    before = float(table["before"].mean())
    found = {}
    for name in names:
        mean = float(table[name].mean())
        found[f"mean/{name}"] = mean
        if name == "before":
            continue
        found[f"reduction_percent/{name}"] = 100 * (1 - mean / before) if before else math.nan
        for other in ("before", "opd"):
            if other in names and other != name:
                difference = float((table[name] - table[other]).mean())
                found[f"difference_to_{other}/{name}"] = difference
    return found
