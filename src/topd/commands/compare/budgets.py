"""What every arm of a comparison spent, and how arms compare where they have spent the same.

A run is counted in updates, seconds and tokens, all from the common start on. For a teacher that is
r times as dear as the student, tokens become one number:

    cost(r) = student_written + READ x learned  +  r x (teacher_written + READ x teacher_read)

in the price of a token that the student writes. READ is what a token costs that is read, beside one
that is written: many are read at once. Learning reads a token three times (forward, backward).
``learned`` is counted three times for that reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from topd.statistics import seed_problem_interval

READ = 0.2  # about what services charge for a token read, beside one written
RATES = (1, 5, 25)  # r: how many times as dear the teacher is
SCORES = ("greedy", "pass@1")
TOKENS = ("student_written", "learned", "teacher_written", "teacher_read")
LEARNED_AS_READ = 3  # forward and backward
FORMULA = (
    f"student_written + {READ} x {LEARNED_AS_READ} x learned + "
    f"r x (teacher_written + {READ} x teacher_read)"
)
Point = Mapping[str, Any]


def cost(point: Point, rate: float, read: float = READ) -> float:
    """What a run has spent at a point of its curve, in tokens that the student writes.

    ``rate`` is r, ``read`` what a token costs that is read, beside one that is written.

    >>> spent = {"student_written": 10, "learned": 10, "teacher_written": 1, "teacher_read": 20}
    >>> cost(spent, 5)
    41.0
    """
    own = point["student_written"] + read * LEARNED_AS_READ * point["learned"]
    return float(own + rate * (point["teacher_written"] + read * point["teacher_read"]))


def axes(point: Point, clock: str) -> dict[str, float]:
    """What is held equal, by name."""
    return {
        "updates": float(point["step"]),
        "seconds": float(point[clock]),
        "teacher-written tokens": float(point["teacher_written"]),
        **{f"cost at r = {rate}": cost(point, rate) for rate in RATES},
    }


def spent(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """What an arm's runs spent in the mean: updates, seconds of both clocks, tokens, costs."""
    ends = [run["curve"][-1] for run in runs.values()]

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    return {
        "seeds": sorted(runs),
        "updates": mean([end["step"] for end in ends]),
        **{key: mean([end[key] for end in ends]) for key in ("seconds", "cpu_seconds", *TOKENS)},
        "cost": {str(rate): mean([cost(end, rate) for end in ends]) for rate in RATES},
    }


def at_equal_budgets(
    runs: Mapping[int, Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]], clock: str
) -> dict[str, Any]:
    """An arm against a reference, where it has spent what the reference spent in all.

    Both are results by seed, with ``curve`` (whose points have ``solved``, right answers by
    problem) and ``solved`` of the end. ``clock`` is the key of the seconds that count.

    Returns by what is held equal, and by score, the difference, paired by seed and problem, with
    its interval; None where the reference spent nothing. The arm is read off its curve, linear
    between evaluations, so before its schedule has ended if it spent more in all; one that spent
    less is taken at its end (``reached`` says what share of the budget it used).
    """
    seeds = sorted(runs.keys() & reference.keys())
    found: dict[str, Any] = {}
    for axis in axes(reference[seeds[0]]["curve"][-1], clock):
        budgets = {s: axes(reference[s]["curve"][-1], clock)[axis] for s in seeds}
        if not all(budgets.values()):
            found[axis] = None
            continue
        ends = {s: axes(runs[s]["curve"][-1], clock)[axis] for s in seeds}
        used = [min(1.0, ends[s] / budgets[s]) for s in seeds]
        found[axis] = {"reached": float(np.mean(used))}
        for score in SCORES:
            gains = [
                solved_at(runs[s]["curve"], score, axis, clock, budgets[s])
                - np.asarray(reference[s]["solved"][score])
                for s in seeds
            ]
            found[axis][score] = asdict(seed_problem_interval(gains))
    return found


def solved_at(
    curve: Sequence[Point], score: str, axis: str, clock: str, budget: float
) -> np.ndarray:
    """[problems] in [0, 1]: right answers where a curve has spent ``budget``."""
    places = [axes(point, clock)[axis] for point in curve]
    later = int(np.searchsorted(places, budget, side="right"))
    if later == len(places):
        return np.asarray(curve[-1]["solved"][score], dtype=float)
    before, after = curve[max(later - 1, 0)], curve[later]
    share = (budget - places[max(later - 1, 0)]) / max(places[later] - places[later - 1], 1e-12)
    first, second = (np.asarray(p["solved"][score], dtype=float) for p in (before, after))
    return first + share * (second - first)


def mean_curve(runs: Mapping[int, Mapping[str, Any]]) -> list[Any]:
    """The arm's curve, the mean over seeds at every evaluation that all of them have."""
    keys = ("step", "seconds", "cpu_seconds", *TOKENS, *SCORES)
    points = zip(*(run["curve"] for run in runs.values()), strict=False)
    return [{key: float(np.mean([p[key] for p in some])) for key in keys} for some in points]
