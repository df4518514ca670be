"""What a comparison found: means over seeds and problems by arm, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from topd.commands.compare import budgets
from topd.commands.compare.budgets import SCORES
from topd.commands.recipe import Clock
from topd.statistics import SHARES, holm, p_value, seed_problem_interval

SECONDS: dict[Clock, str] = {"wall": "seconds", "cpu": "cpu_seconds"}
Result: TypeAlias = dict[str, Any]


def summarise(
    results: Sequence[Result],
    baseline: str,
    starts: Mapping[str, Any],
    *,
    clock: Clock = "wall",
    references: Sequence[str] = (),
) -> Result:
    """Means over seeds and problems by arm, and paired differences from the baseline.

    ``results`` are lines of results.jsonl, ``starts`` evaluations of the student before stage 2 by
    name; ``clock`` says whose seconds count. All others are compared with ``references`` at equal
    budgets as well.

    Returns:
        The content of compare.json. Intervals are over both seeds and problems (95 %). What
        stands under ``at equal time`` is read off an arm's curve when it had run as long as the
        baseline with the same seed. ``equal`` has by reference and arm
        :func:`~topd.commands.compare.budgets.at_equal_budgets`, ``against`` the ends of both,
        ``spent`` what arms cost, ``curves`` their means over seeds.
    """
    arms = list(dict.fromkeys(result["arm"] for result in results))
    by_arm = {arm: {r["seed"]: r for r in results if r["arm"] == arm} for arm in arms}
    time = SECONDS[clock]
    return {
        "arms": arms,
        "baseline": baseline,
        "seeds": sorted({result["seed"] for result in results}),
        "clock": clock,
        "starts": dict(starts),
        "summary": {arm: _summary(runs, by_arm[baseline], time) for arm, runs in by_arm.items()},
        "spent": {arm: budgets.spent(runs) for arm, runs in by_arm.items()},
        "cost": budgets.FORMULA,
        "curves": {arm: budgets.mean_curve(runs) for arm, runs in by_arm.items()},
        "equal": {
            name: {
                arm: budgets.at_equal_budgets(runs, by_arm[name], time)
                for arm, runs in by_arm.items()
                if arm != name and runs.keys() & by_arm[name].keys()
            }
            for name in references
        },
        "against": {name: _against(by_arm, name) for name in references},
    }


def _against(by_arm: Mapping[str, Mapping[int, Result]], name: str) -> dict[str, Result]:
    """How far every arm ends above a reference, paired by seed and problem; by arm and score.

    ``holm`` is the p-value of no difference, adjusted for the number of arms.
    """
    reference = by_arm[name]
    found: dict[str, Result] = {}
    for arm, runs in by_arm.items():
        paired = sorted(runs.keys() & reference.keys())
        if arm == name or not paired:
            continue
        found[arm] = {"seeds": paired}
        for score in SCORES:
            solved = [(runs[s]["solved"][score], reference[s]["solved"][score]) for s in paired]
            interval = partial(seed_problem_interval, [np.subtract(*both) for both in solved])
            found[arm][score] = {**asdict(interval()), "p": p_value(interval)}
    for score in SCORES:
        adjusted = holm([gains[score].pop("p") for gains in found.values()])
        for gains, p in zip(found.values(), adjusted, strict=True):
            gains[score]["holm"] = p
    return found


def _summary(runs: Mapping[int, Result], base: Mapping[int, Result], time: str) -> Result:
    seeds, paired = sorted(runs), sorted(runs.keys() & base.keys())
    name = next(iter(base.values()))["arm"]
    found: Result = {
        "seconds": float(np.median([runs[s][time] for s in seeds])),
        "seconds_ratio": float(np.median([runs[s][time] / base[s][time] for s in paired])),
        "teacher_tokens": float(np.mean([runs[s]["teacher_tokens"] for s in seeds])),
    }
    for score in SCORES:
        own = [runs[s]["solved"][score] for s in seeds]
        found[score] = asdict(seed_problem_interval(own, bounds=SHARES))
        gain = [np.subtract(runs[s]["solved"][score], base[s]["solved"][score]) for s in paired]
        found[f"{score}_vs_{name}"] = asdict(seed_problem_interval(gain))
        early = [
            budgets.solved_at(runs[s]["curve"], score, "seconds", time, base[s]["curve"][-1][time])
            for s in paired
        ]
        found[f"{score} at equal time"] = float(np.mean(early))
        behind = [at - base[s]["solved"][score] for at, s in zip(early, paired, strict=True)]
        found[f"{score}_vs_{name} at equal time"] = asdict(seed_problem_interval(behind))
    return found
