"""A gate's figures in words: its table in the terminal, its section of a model card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from topd.report.text import counted

if TYPE_CHECKING:
    from topd.commands.gate import Figure, Suite


def show(figures: Sequence[Figure], suite: Suite, good: bool, console: Console) -> None:
    """Print the figures, what they cannot say, and the verdict. Fits 80 columns."""
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for title in ("", "base", "candidate", "harm", "interval", "limit", "verdict"):
        table.add_column(title, justify="right" if title else "left")
    for figure in figures:
        table.add_row(*_cells(figure))
    console.print(table)
    for remark in remarks(figures):
        console.print(remark, highlight=False)
    rule = " or open" if suite.strict else ""
    console.print("passed" if good else f"FAILED: a figure is worse{rule}", highlight=False)


def card_text(
    base: str, suite: Suite, figures: Sequence[Figure], lost: Sequence[int], good: bool
) -> str:
    """The gate's result as a section of a model card: evidence, and known failures."""
    asked = {figure.name == "refusals": figure.harm.problems for figure in figures}
    parts = ((False, "problem", suite.problems), (True, "prompt", suite.refusals))
    on = " and ".join(
        f"{counted(asked[refused], name)} of `{part.path}`"
        for refused, name, part in parts
        if part and refused in asked
    )
    lines = [
        f"{'Passed' if good else 'FAILED'} against `{base}` on {on}, same prompts and random "
        "numbers. Harm is how much worse. "
        "Where all harms are within their limits, some figure is called worse in about "
        f"{_percent(suite.error)} of cases at most.",
        "",
        "| | base | candidate | harm | interval | limit | verdict |",
        "|---|---|---|---|---|---|---|",
        *("| " + " | ".join(_cells(figure)) + " |" for figure in figures),
        "",
        "Known failures:",
        "",
    ]
    worse, unknown = (
        ", ".join(_title(f) for f in figures if f.verdict == found) or "none"
        for found in ("worse", "open")
    )
    rows = f": rows {', '.join(map(str, lost[:20]))}{', ...' * (len(lost) > 20)}" if lost else ""
    lines += [
        f"- worse: {worse}",
        f"- not shown to be within the limit: {unknown}",
        f"- problems that the base solves and this model does not: {len(lost)}{rows}",
        *(f"- {remark}" for remark in remarks(figures)),
    ]
    return "\n".join(lines)


def remarks(figures: Sequence[Figure]) -> list[str]:
    """What a reader must know beside the figures: a base with nothing to lose, too few prompts."""
    found = []
    for figure in figures:
        if figure.name in ("accuracy", "sampled_accuracy") and figure.base == 1:
            kind = "greedily" if figure.name == "accuracy" else "in any sample"
            found.append(
                f"the base solves none of the {figure.harm.problems} problems {kind}: it has no "
                f"{_title(figure)} to lose, so these problems say nothing of harm. Choose problems "
                "that it can solve."
            )
        if figure.name == "length" and figure.unit == "characters":
            found.append(
                "the models' tokenizers split text differently: the length is in characters, "
                "and repetition, calibration and max_tokens count each model's own tokens."
            )
    open_ones = [f for f in figures if f.verdict == "open" and f.name != "length" and f.limit > 0]
    if open_ones:
        least = max(open_ones, key=_needed)
        found.append(
            f"open: {least.harm.problems} prompts do not show whether the harm is within "
            f"{_limit(least)}; that takes at least {_needed(least)}, more where answers "
            "differ."
        )
    return found


def _needed(figure: Figure) -> int:
    """Prompts without any difference that put a figure within its limit."""
    return math.ceil(math.log((1 - figure.harm.level) / 2) / math.log1p(-min(figure.limit, 0.99)))


def _cells(figure: Figure) -> tuple[str, ...]:
    """A line of the table. Accuracies and refusals are shown as shares that are right.

    All in per cent but lengths and the Brier score; a harm of a share is in
    points, that of the length relative to the base's mean.
    """
    turned = figure.name in ("accuracy", "sampled_accuracy", "refusals")
    base, candidate = ((1 - x if turned else x) for x in (figure.base, figure.candidate))
    harm, percent = figure.harm, figure.name != "calibration"
    mean = "{:.1f}" if figure.name == "length" else "{:.1%}" if percent else "{:.3f}"
    change = "{:+.1%}" if percent else "{:+.3f}"
    return (
        _title(figure),
        mean.format(base),
        mean.format(candidate),
        change.format(harm.mean),
        f"{change.format(harm.low)}, {change.format(harm.high)}",
        _limit(figure).replace(" ", ""),
        figure.verdict,
    )


def _limit(figure: Figure) -> str:
    """A Brier score has no unit."""
    return f"{figure.limit:.4g}" if figure.name == "calibration" else _percent(figure.limit)


def _title(figure: Figure) -> str:
    return figure.name.replace("_", " ")


def _percent(value: float) -> str:
    return f"{100 * value:.4g} %"
