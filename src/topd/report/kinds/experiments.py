"""What the pages of repairs and comparisons show: arms, with intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from topd.report.charts import (
    Chart,
    Series,
    curve_table,
    curves,
    draw_intervals,
    group_table,
    make_room,
    number,
)
from topd.report.charts.svg import FAINT, INK, PALETTE, hint
from topd.report.headline import seeds_of
from topd.report.text import plain
from topd.runs.files import read_whole
from topd.runs.records import IntervalRecord, ResultRecord, SampleRecord, read_records

ROW = 0.2  # inches of an arm
LONGEST = 30  # characters of an arm's name in a figure
SCORES = {"greedy": "greedy accuracy", "pass@1": "pass@1"}


def repair_charts(folder: Path) -> list[Chart]:
    """The figures of a repair."""
    found: dict[str, list[float]] = defaultdict(list)
    for record in read_records(folder, "samples.jsonl", SampleRecord):
        if math.isfinite(record.distance):
            found[record.arm].append(record.distance)
    if not found:
        return []
    arms = dict(zip(labels(found), found.values(), strict=True))
    return [
        Chart(
            "repair",
            "How near the student's continuation comes",
            "Optimal-transport distance to the teacher's window from the same prefix, before and "
            "after the updates with each method. Box: quartiles and median; whiskers: 5th and 95th "
            "percentile; diamond: mean.",
            _boxes(arms),
            *group_table(arms),
        )
    ]


def labels(arms: Iterable[str]) -> list[str]:
    """Names of arms for a figure, of 30 characters or a little more, no two the same.

    Arms of a sweep differ at their ends, so a long name is shortened in its middle.

    >>> labels(["first_fork, every second update, K 12", "first_fork, every second update, K 24"])
    ['first_fork, eve…d update, K 12', 'first_fork, eve…d update, K 24']
    """
    found: list[str] = []
    for arm in arms:
        name = plain(arm)
        short = name if len(name) <= LONGEST else f"{name[:15]}…{name[-14:]}"
        same = sum(known == short or known.startswith(f"{short} (") for known in found)
        found.append(f"{short} ({same + 1})" if same else short)
    return found


def compare_charts(folder: Path) -> list[Chart]:
    """The figures of a comparison."""
    content = read_whole(folder / "compare.json")
    summary = content.get("summary", {})
    charts = []
    for score, name in SCORES.items():
        if any(_interval(arm.get(score)) for arm in summary.values()):
            charts.append(_interval_chart(score, name, summary))
        versus = f"{score}_vs_{content.get('baseline', 'opd')}"
        others = {arm: v for arm, v in summary.items() if arm != content.get("baseline", "opd")}
        if any(_interval(arm.get(versus)) for arm in others.values()):
            charts.append(_interval_chart(versus, f"{name} against the baseline", others))
    seeds, found = seeds_of(content), read_records(folder, "results.jsonl", ResultRecord)
    results = [run for run in found if run.seed in (seeds.get(run.arm) or {run.seed})]
    order = [*content.get("arms", []), *(result.arm for result in results)]
    results.sort(key=lambda result: order.index(result.arm))
    return [*charts, *_learning_curves(results, cpu=content.get("clock") == "cpu")]


def _boxes(arms: Mapping[str, Sequence[float]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        drawn = axes.boxplot(
            list(arms.values())[::-1], tick_labels=list(arms)[::-1], whis=(5, 95),
            showfliers=False, showmeans=True, patch_artist=True, orientation="horizontal",
            meanprops={"marker": "D", "markerfacecolor": INK, "markeredgecolor": INK},
        )  # fmt: skip
        for box, colour in zip(drawn["boxes"][::-1], PALETTE * len(arms), strict=False):
            box.set(facecolor=colour, edgecolor=INK, alpha=0.6)
        for median in drawn["medians"]:
            median.set(color=INK)
        for mean, values in zip(drawn["means"][::-1], arms.values(), strict=True):
            hint(mean, [f"mean {np.mean(values):.3f} of {len(values):,}"])
        axes.set(xlabel="OT distance to the teacher's window", xlim=(0, None))
        axes.grid(visible=False, axis="y")
        make_room(axes, 0.9 + ROW * len(arms))

    return draw


def _interval(value: Any) -> IntervalRecord | None:
    """A summary's entry, if it is an interval."""
    if not isinstance(value, dict) or not all(
        isinstance(value.get(key), int | float) for key in ("mean", "low", "high")
    ):
        return None
    return IntervalRecord(mean=value["mean"], low=value["low"], high=value["high"])


def _interval_chart(key: str, name: str, summary: Mapping[str, Any]) -> Chart:
    of_arms = {arm: interval for arm, v in summary.items() if (interval := _interval(v.get(key)))}
    found = dict(zip(labels(of_arms), of_arms.values(), strict=True))
    against = "_vs_" in key

    def draw(axes: Axes) -> None:
        draw_intervals(axes, found, name)
        make_room(axes, 0.9 + ROW * len(found))
        if against:
            axes.axvline(0, color=FAINT, lw=1.5, zorder=0)

    return Chart(
        "".join(c if c.isalnum() or c in "._-" else "-" for c in key.replace("@", "-at-")),
        f"{name[0].upper()}{name[1:]}",
        "Mean over seeds and the interval of compare.json."
        + (" Right of 0: better than the baseline." if against else ""),
        draw,
        ("arm", "mean", "low", "high"),
        tuple((arm, number(i.mean), number(i.low), number(i.high)) for arm, i in found.items()),
    )


def _learning_curves(results: Sequence[ResultRecord], *, cpu: bool) -> list[Chart]:
    unit = "CPU seconds" if cpu else "seconds"
    charts = []
    for score, name in SCORES.items():
        found = _mean_curves(results, score)
        if found:
            at = score.replace("@", "-at-")
            charts.append(_learning(f"curve-{at}", name, "over the updates", found, "updates"))
        timed = _mean_curves(results, score, clock="cpu_seconds" if cpu else "seconds")
        if any(max(curve.x) > 0 for curve in timed):
            charts.append(_learning(f"time-{at}", name, "over time", timed, unit))
    return charts


def _learning(name: str, score: str, over: str, found: Sequence[Series], unit: str) -> Chart:
    columns, rows = curve_table(found)
    return Chart(
        name,
        f"{score[0].upper()}{score[1:]} {over}",
        "Mean over seeds, at every evaluation of a run.",
        curves(found, unit=score, x_label=unit),
        (unit.removesuffix("s") if unit == "updates" else unit, *columns[1:]),
        rows,
    )


def _mean_curves(
    results: Sequence[ResultRecord], score: str, *, clock: str = "step"
) -> list[Series]:
    """By arm, over updates; or over the mean seconds of all seeds at the same update."""
    spent: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    arms: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        for point in result.curve:
            value = getattr(point, score.replace("@", "_at_"))
            if value is not None and math.isfinite(value):
                arms[result.arm][point.step].append(value)
                spent[result.arm][point.step].append(getattr(point, clock))
    return [
        Series(
            label,
            tuple(float(np.mean(spent[arm][s])) for s in sorted(steps)),
            tuple(float(np.mean(steps[s])) for s in sorted(steps)),
        )
        for label, (arm, steps) in zip(labels(arms), arms.items(), strict=True)
    ]
