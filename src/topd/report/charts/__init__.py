"""What a figure is: one drawing for page and paper, with its caption and its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from topd.report.charts.svg import INK, PALETTE, REAL, STYLE, hint
from topd.runs.records import IntervalRecord

HEIGHT = 2.9  # inches of a figure
MARKS = 120  # points of a curve that have a tooltip
DASHES = ("-", "--", ":", "-.")  # a curve under another is seen through it
LINES = 24  # lines of a table of numbers


@dataclass(frozen=True)
class Chart:
    """A figure. ``draw`` puts it on axes; ``columns`` and ``rows`` are its numbers as text."""

    name: str
    title: str
    caption: str
    draw: Callable[[Axes], None]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Fact:
    """One number in words: what it is, its value with unit, and a note."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Series:
    """A curve: its name, and pairs of x and y that are finite."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


def figure_of(chart: Chart) -> Figure:
    """The chart alone on a figure of 5.6 x 2.9 inches, higher where :func:`make_room` asks."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, HEIGHT), layout="constrained")
        chart.draw(figure.add_subplot())
    return figure


def make_room(axes: Axes, height: float) -> None:
    """Make the figure so many inches high, if it is not: nothing is left out or printed over."""
    if isinstance(figure := axes.figure, Figure):
        figure.set_size_inches(5.6, max(HEIGHT, height))


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits, or a dash.

    >>> number(0.123456), number(1234567.0), number(None), number(50)
    ('0.1235', '1,234,567', '-', '50')
    """
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) >= 10**digits - 0.5 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def series(logs: Sequence[Mapping[str, float]], key: str, name: str) -> Series | None:
    """A curve of the logs, or None where they do not have it."""
    pairs = [(log["step"], log[key]) for log in logs if key in log and "step" in log]
    pairs = [(x, y) for x, y in pairs if math.isfinite(y)]
    if not pairs:
        return None
    x, y = zip(*pairs, strict=True)
    return Series(name, x, y)


def curves(
    found: Sequence[Series], *, unit: str, x_label: str = "updates"
) -> Callable[[Axes], None]:
    """Curves over updates; long ones faint, with their running mean over a tenth of the run."""

    def draw(axes: Axes) -> None:
        for n, curve in enumerate(found):  # all 24 pairs of a dash and a colour before one again
            dash, colour = DASHES[(n + n // 12) % len(DASHES)], PALETTE[n % len(PALETTE)]
            _curve(axes, curve, colour, dash, unit, x_label)
        axes.set(xlabel=x_label, ylabel=unit)
        if min(min(curve.y) for curve in found) >= 0:  # nor is there less than none of it
            axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
        if x_label == "updates":
            count_whole(axes)
        if len(found) > len(PALETTE):
            make_room(axes, HEIGHT + 0.18 * math.ceil(len(found) / 2))
            legend_below(axes, 2)
        elif len(found) > 1:
            axes.legend()

    return draw


def count_whole(axes: Axes) -> None:
    """Whole numbers below the axis, also of a single one: there is no half of an update."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def legend_below(axes: Axes, columns: int) -> None:
    """The names below the figure, where they are printed over nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=columns)


def _curve(axes: Axes, curve: Series, colour: str, dash: str, unit: str, x_label: str) -> None:
    width = len(curve.x) // 10
    smooth = width >= 2
    axes.plot(
        curve.x, curve.y, dash, color=colour, alpha=0.35 if smooth else 1,
        lw=1 if smooth else 1.6, label=None if smooth else curve.name,
    )  # fmt: skip
    if smooth:
        mean = np.convolve(curve.y, np.ones(width) / width, mode="valid")
        start = (width - 1) // 2
        axes.plot(curve.x[start : start + len(mean)], mean, dash, color=colour, label=curve.name)
    marked = spaced(len(curve.x), MARKS)
    (dots,) = axes.plot(
        [curve.x[i] for i in marked],
        [curve.y[i] for i in marked],
        "o",
        color=colour,
        alpha=0.35 if smooth else 1,
    )
    hint(dots, [f"{curve.name}, {x_label} {curve.x[i]:g}: {curve.y[i]:.4g} {unit}" for i in marked])


def curve_table(found: Sequence[Series]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Columns and rows of curves over the same updates, evenly spaced."""
    steps = sorted({x for curve in found for x in curve.x})
    values = [dict(zip(curve.x, curve.y, strict=True)) for curve in found]
    rows = tuple(
        (number(steps[i]), *(number(by_step.get(steps[i])) for by_step in values))
        for i in spaced(len(steps), LINES)
    )
    return ("update", *(curve.name for curve in found)), rows


def draw_intervals(axes: Axes, found: dict[str, IntervalRecord], unit: str) -> None:
    """Means with their intervals, one below the other."""
    for place, (name, of) in enumerate(reversed(found.items())):
        axes.plot([of.low, of.high], [place, place], color=INK, lw=1.2)
        (dot,) = axes.plot([of.mean], [place], "o", color=REAL, ms=6)
        hint(dot, [f"{name}: {of.mean:.3f}, {of.low:.3f} to {of.high:.3f}"])
    axes.set_yticks(range(len(found)), list(found)[::-1])
    axes.set(xlabel=unit, ylim=(-0.6, len(found) - 0.4))


def histogram(
    groups: Mapping[str, Sequence[float]], colours: Mapping[str, str], *, unit: str
) -> Callable[[Axes], None]:
    """Shares of each group by bins over a common range, as steps, with medians as lines."""

    def draw(axes: Axes) -> None:
        every = np.concatenate([np.asarray(v, dtype=float) for v in groups.values()])
        edges = np.linspace(0, max(float(every.max()), 1e-9), 31)
        for dash, (name, values) in zip(("-", "--", "-."), groups.items(), strict=False):
            if not len(values):
                continue
            counts, _ = np.histogram(values, edges)
            share = counts / max(counts.sum(), 1)
            axes.stairs(share, edges, fill=True, color=colours[name], alpha=0.18)
            axes.stairs(share, edges, color=colours[name], ls=dash, label=name, lw=1.4)
            axes.axvline(float(np.median(values)), color=colours[name], ls=dash, lw=1)
        axes.set(xlabel=unit, ylabel="share of the group", xlim=(0, edges[-1]))
        if sum(len(values) > 0 for values in groups.values()) > 1:
            make_room(axes, HEIGHT + 0.18)
            legend_below(axes, 3)

    return draw


def group_table(
    groups: Mapping[str, Sequence[float]],
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Count, quartiles and mean of each group."""
    rows = []
    for name, values in groups.items():
        if len(values):
            low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
            shown = (low, median, high, np.mean(values))
            rows.append((name, f"{len(values):,}", *(number(float(x)) for x in shown)))
    return ("group", "count", "lower quartile", "median", "upper quartile", "mean"), tuple(rows)


def spaced(count: int, limit: int) -> list[int]:
    """At most ``limit`` of the numbers below ``count``, evenly spaced, first and last included.

    >>> spaced(10, 4), spaced(2, 4)
    ([0, 3, 6, 9], [0, 1])
    """
    if count <= limit:
        return list(range(count))
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]
