"""What the page of a probe shows: is token loss a guide to where the models part?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy.stats import t

from topd.report.charts import Chart, group_table, histogram, number, spaced
from topd.report.charts.svg import ALARM, FOURTH, REAL, STUDENT, hint
from topd.report.folder import settings_of
from topd.report.summary import loss_name
from topd.runs.records import PositionRecord, read_records

GROUPS = {"high": "high loss", "random": "random", "low": "low loss"}
COLOURS = {"high loss": REAL, "random": FOURTH, "low loss": STUDENT}
DOTS = 1500  # of the scatter; the binned means are over all positions
BINS, LEAST = 10, 10  # bins at most, positions in each at least


@dataclass(frozen=True)
class Positions:
    """The numbers of a probe's positions; floats only, so that millions of them fit."""

    distance: dict[str, list[float]]  # by group
    loss: dict[str, list[float]]
    prompt: dict[str, list[int]]
    rejoin: Counter[int | None]  # of the high-loss positions


class Bin(NamedTuple):
    """Positions of about one loss: how many, both means, half of the distance's interval."""

    size: int
    loss: float
    distance: float
    reach: float


def probe_charts(folder: Path) -> list[Chart]:
    """The figures of a probe."""
    found = _read(folder)
    charts = []
    if any(found.distance.values()):
        loss = loss_name(settings_of(folder).get("candidate_loss"))
        charts = [_distances(found, loss), _loss_against_distance(found, loss)]
    if any(key is not None for key in found.rejoin):
        charts.append(_rejoin(found.rejoin))
    return charts


def _read(folder: Path) -> Positions:
    found = Positions({}, {}, {}, Counter())
    for name in GROUPS.values():
        found.distance[name], found.loss[name], found.prompt[name] = [], [], []
    for record in read_records(folder, "positions.jsonl", PositionRecord):
        group = GROUPS.get(record.group)
        if group is None or not math.isfinite(record.distance + record.token_loss):
            continue
        found.distance[group].append(record.distance)
        found.loss[group].append(record.token_loss)
        found.prompt[group].append(record.prompt)
        if record.group == "high":
            found.rejoin[record.rejoin] += 1
    return found


def _distances(found: Positions, loss: str) -> Chart:
    return Chart(
        "distances",
        "What follows high-loss, random and low-loss tokens",
        "Optimal-transport distance of the two models' windows from the same prefix, by how the "
        "position was chosen. Vertical lines: medians. Where the high-loss curve lies over the "
        f"low-loss one, {loss} raises false alarms.",
        histogram(found.distance, COLOURS, unit="OT distance"),
        *group_table(found.distance),
    )


def _loss_against_distance(found: Positions, name: str) -> Chart:
    loss, distance, prompt = (
        np.concatenate([np.asarray(v, dtype=float) for v in groups.values()])
        for groups in (found.loss, found.distance, found.prompt)
    )
    label = f"{name}, nats" if name == "token loss" else name
    count = max(2, min(BINS, len(loss) // LEAST))
    edges = np.unique(np.quantile(loss, np.linspace(0, 1, count + 1)))
    place = np.clip(np.searchsorted(edges, loss, side="right") - 1, 0, max(len(edges) - 2, 0))
    bins = []
    for b in np.unique(place).tolist():
        near, far, whose = (values[place == b] for values in (loss, distance, prompt))
        bins.append(Bin(len(near), float(near.mean()), float(far.mean()), _reach(far, whose)))
    rows = tuple((number(b.loss), f"{b.size:,}", number(b.distance), number(b.reach)) for b in bins)
    return Chart(
        "loss-distance",
        f"Does a high {name} mean another path?",
        f"Each dot a position (at most {DOTS:,} are drawn); line: means of {len(bins)} bins of "
        "about equal count over all positions, with 95 % t-intervals over prompts.",
        _scatter(loss, distance, bins, label),
        (f"mean {label}", "positions", "mean OT distance", "+- (95 %)"),
        rows,
    )


def _reach(values: np.ndarray, prompt: np.ndarray) -> float:
    """Half of a 95 % t-interval of the mean of values that are dependent within a prompt.

    By the prompts' sums of residuals (cluster-robust); NaN for a single prompt.
    """
    prompts, which = np.unique(prompt, return_inverse=True)
    if (count := len(prompts)) < 2:
        return math.nan
    sums = np.bincount(which, values - values.mean())
    return float(t.ppf(0.975, count - 1) * np.sqrt(count / (count - 1) * sums @ sums) / len(values))


def _scatter(
    loss: np.ndarray, distance: np.ndarray, bins: list[Bin], label: str
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        shown = spaced(len(loss), DOTS)
        axes.plot(loss[shown], distance[shown], "o", color=ALARM, alpha=0.4, ms=3, mew=0)
        _, x, y, reach = zip(*bins, strict=True)
        axes.errorbar(x, y, reach, color=REAL, capsize=2, lw=1.2)
        (dots,) = axes.plot(x, y, "s", color=REAL, ms=4)
        hint(dots, [f"mean {label} {b.loss:.3g}: mean OT {b.distance:.3f}" for b in bins])
        top = 1.05 * float(distance.max())
        axes.set(xlabel=label, ylabel="OT distance", ylim=(0, max(top, 1e-9)))

    return draw


def _rejoin(counts: Counter[int | None]) -> Chart:
    total = sum(counts.values())
    lengths = sorted(key for key in counts if key is not None)
    shares = [counts[n] / total for n in lengths]
    rows = tuple((str(n), f"{counts[n]:,}", f"{counts[n] / total:.1%}") for n in lengths)

    def draw(axes: Axes) -> None:
        bars = axes.bar(lengths, shares, 0.8, color=STUDENT)
        for bar, n in zip(bars, lengths, strict=True):
            hint(bar, [f"agree again after {n} tokens: {counts[n]:,} positions"])
        axes.set(
            xlabel="tokens until the windows agree again", ylabel="share of high-loss positions",
            xlim=(-1, max(lengths) + 1),
        )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return Chart(
        "rejoin",
        "How soon the windows agree again",
        f"Of {total:,} high-loss positions, {counts[None]:,} windows ({counts[None] / total:.0%}) "
        "never agree again within the window.",
        draw,
        ("tokens", "positions", "share"),
        rows,
    )
