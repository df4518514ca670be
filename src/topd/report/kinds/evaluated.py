"""The pages of evaluations and gates: shares with intervals, harms against limits, and answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from matplotlib.axes import Axes

from topd.report.charts import Chart, draw_intervals, number
from topd.report.charts.svg import ALARM, FAINT, hint
from topd.report.headline import model_name
from topd.report.summary import SummaryTable
from topd.report.text import counted, plain
from topd.runs.records import (
    EvaluationRecord,
    GateFigure,
    GateRecord,
    IntervalRecord,
    ResponseRecord,
    read_record,
    read_records,
)

LINES = 40  # problems that a table shows
CUT_OFF = 0.05  # a larger share of responses at the length limit is told
NAMES = {
    "greedy": "greedy accuracy",
    "greedy_length": "greedy length, tokens",
    "mean_length": "sampled length, tokens",
    "greedy_truncated": "greedy, cut off at the limit",
    "truncated": "sampled, cut off at the limit",
}
RIGHT = ("accuracy", "sampled_accuracy", "refusals")  # a gate's figures that are told as shares


# Evaluations


def evaluation_words(folder: Path) -> Iterator[str]:
    """What a model solves, and what stands in the way of believing it."""
    found = read_record(folder, "evaluation.json", EvaluationRecord)
    if found is None:
        return
    data, figures = found.settings.get("data", {}), found.figures
    greedy, drawn, cut = (figures.get(k) for k in ("greedy", "pass@1", "greedy_truncated"))
    if greedy:
        samples = f", and {_share(drawn)} of its samples are right" if drawn else ""
        yield (
            f"{_model(found.settings.get('model', {}))} solves {_share(greedy)} of "
            f"{counted(found.problems, 'problem')} of {_file(data)} greedily{samples}."
        )
    if cut and cut.mean > CUT_OFF:
        limit = data.get("max_tokens")
        at = f"at {limit:,} tokens" if isinstance(limit, int) else "by the length limit"
        yield (
            f"{100 * cut.mean:.1f} % of the greedy answers were cut off {at} and may have been on "
            "the way to a right one: raise --max-tokens before you compare."
        )


def evaluation_charts(folder: Path) -> list[Chart]:
    """Accuracies with their intervals."""
    found = read_record(folder, "evaluation.json", EvaluationRecord)
    figures = found.figures if found else {}
    shares = {n: i for n, i in figures.items() if not n.endswith(("length", "truncated"))}
    named = {_name(n): i for n, i in shares.items()}
    if not shares:
        return []

    def draw(axes: Axes) -> None:
        draw_intervals(axes, named, "share of the problems")
        axes.set_xlim(0, 1)

    return [
        Chart(
            "accuracy",
            "What it solves",
            "Dot: mean over problems. Line: the 95 % interval over problems of this kind; equal "
            "answers to few problems are not certainty, so it never has width 0. pass@k: at least "
            "one of k samples is right.",
            draw,
            ("", "mean", "95 % interval"),
            tuple((_name(n), *_cells(n, i)) for n, i in shares.items()),
        )
    ]


def evaluation_tables(folder: Path) -> list[SummaryTable]:
    """Every figure, and the first problems with what was answered."""
    found = read_record(folder, "evaluation.json", EvaluationRecord)
    tables = []
    if found:
        figures = tuple((_name(n), *_cells(n, i)) for n, i in found.figures.items())
        tables.append(SummaryTable("Figures", ("", "mean", "95 % interval"), figures))
    problems = _by_problem(folder, "responses.jsonl")
    if problems:
        columns = ("row", "greedy", "samples right", "tokens", "greedy answer")
        more = f": the first {LINES} of {len(problems):,}" if len(problems) > LINES else ""
        rows = tuple(_problem_row(n, answers) for n, answers in list(problems.items())[:LINES])
        title = "Rows" if found and found.problems < len(problems) else "Problems"
        tables.append(SummaryTable(f"{title}{more}", columns, rows, prose=True))
    return tables


def _problem_row(row: int, answers: Sequence[ResponseRecord]) -> tuple[str, ...]:
    greedy = next((a for a in answers if a.sample is None), None)
    drawn = [a for a in answers if a.sample is not None]
    right = f"{sum(a.verified for a in drawn)} of {len(drawn)}"
    if greedy is None:
        return str(row), "-", right, "-", ""
    said = "right" if greedy.verified else "wrong"
    cut = "" if greedy.finished else ", cut off"
    return str(row), said + cut, right, f"{len(greedy.ids):,}", plain(greedy.text, limit=300)


# Gates


def gate_words(folder: Path) -> Iterator[str]:
    """Whether the candidate passed, what is worse, and what these prompts cannot tell."""
    found = read_record(folder, "gate.json", GateRecord)
    if found is None:
        return
    problems = found.suite.get("problems", {})
    base, candidate = (_model(found.models.get(role, {})) for role in ("base", "candidate"))
    parts = {f.name == "refusals": f.harm.problems for f in found.figures}
    asked = [
        f"{counted(parts[of_refusals], 'prompt' if of_refusals else 'problem')} of {_file(data)}"
        for of_refusals, data in ((False, problems), (True, found.suite.get("refusals") or {}))
        if of_refusals in parts
    ]
    told = "Passed" if found.passed else "FAILED"
    on = " and ".join(asked) or f"problems of {_file(problems)}"
    yield f"{told}: {candidate} against {base} on {on}."
    for figure in found.figures:
        if figure.verdict == "worse":
            yield f"{_title(figure)} is worse: {_harm(figure)}; the limit is {_limit(figure)}."
    unknown = [_title(f) for f in found.figures if f.verdict == "open"]
    if unknown:
        yield f"Neither shown to be worse nor within the limit: {', '.join(unknown)}."
    yield from (plain(remark[:1].upper() + remark[1:]) for remark in found.remarks)


def gate_charts(folder: Path) -> list[Chart]:
    """Harms with their intervals beside their limits."""
    found = read_record(folder, "gate.json", GateRecord)
    if found is None or not found.figures:
        return []
    figures = found.figures
    level = 100 * figures[0].harm.level

    def draw(axes: Axes) -> None:
        draw_intervals(axes, {_title(f): f.harm for f in figures}, "harm")
        for place, figure in enumerate(reversed(figures)):
            (stroke,) = axes.plot([figure.limit], [place], "|", color=ALARM, ms=16, mew=2.5)
            hint(stroke, [f"{_title(figure)}: limit {figure.limit:.4g}"])
        axes.axvline(0, color=FAINT, lw=1.5, zorder=0)

    return [
        Chart(
            "harm",
            "How much worse the candidate is",
            "Dot: mean over prompts of how much worse the candidate is, paired; line: its "
            f"{level:.4g} % interval; stroke: the limit. A whole line right of its stroke is a "
            "regression, one left of it is within. Shares of responses; the length as a share of "
            "the base's mean length; calibration is the Brier score.",
            draw,
            ("", "harm", "interval", "limit"),
            tuple((_title(f), *_harm_cells(f), _limit(f)) for f in figures),
        )
    ]


def gate_tables(folder: Path) -> list[SummaryTable]:
    """Every figure of both models, and what both answered where only the base is right."""
    found = read_record(folder, "gate.json", GateRecord)
    if found is None:
        return []
    columns = ("", "base", "candidate", "harm", "interval", "limit", "verdict")
    rows = tuple(
        (_title(f), _value(f, f.base), _value(f, f.candidate), *_harm_cells(f), _limit(f),
         "within the limit" if f.verdict == "within" else plain(f.verdict, limit=20))
        for f in found.figures
    )  # fmt: skip
    tables = [SummaryTable("Figures", columns, rows)]
    if found.lost:
        both = [_by_problem(folder, f"{role}_problems.jsonl") for role in ("base", "candidate")]
        more = f": the first {LINES} of {len(found.lost):,}" if len(found.lost) > LINES else ""
        lost = tuple(
            (str(row), *(_greedy_text(answers.get(row, ())) for answers in both))
            for row in found.lost[:LINES]
        )
        title = f"Problems that only the base solves{more}"
        sides = ("row", "base, greedy", "candidate, greedy")
        tables.append(SummaryTable(title, sides, lost, prose=True))
    return tables


def _title(figure: GateFigure) -> str:
    return plain(figure.name.replace("_", " "), limit=40)


def _value(figure: GateFigure, value: float) -> str:
    """A model's own figure: accuracies and refusals as shares that are right."""
    if figure.name == "calibration":
        return f"{value:.3f}"
    if figure.name == "length":
        return f"{value:,.1f} {plain(figure.unit, limit=20)}"
    return f"{100 * (1 - value if figure.name in RIGHT else value):.1f} %"


def _harm_cells(figure: GateFigure) -> tuple[str, str]:
    harm = figure.harm
    mean, low, high = (_amount(figure, x) for x in (harm.mean, harm.low, harm.high))
    return mean, f"{low} to {high}"


def _amount(figure: GateFigure, value: float) -> str:
    """With its sign; a 0 that is only rounded has none of its own."""
    return f"{value:+z.3f}" if figure.name == "calibration" else f"{100 * value:+z.1f} %"


def _harm(figure: GateFigure) -> str:
    """As in a sentence: a share's harm is in points, that of the length relative to the base's."""
    harm = figure.harm
    if figure.name == "calibration":
        return f"by {harm.mean:.3f} [{harm.low:.3f}, {harm.high:.3f}]"
    unit = "% of the base's length" if figure.name == "length" else "points"
    return f"by {100 * harm.mean:.1f} [{100 * harm.low:.1f}, {100 * harm.high:.1f}] {unit}"


def _limit(figure: GateFigure) -> str:
    value = figure.limit
    return f"{value:.4g}" if figure.name == "calibration" else f"{100 * value:.4g} %"


def _greedy_text(answers: Sequence[ResponseRecord]) -> str:
    return next((plain(a.text, limit=300) for a in answers if a.sample is None), "-")


# Both


def _by_problem(folder: Path, name: str) -> dict[int, list[ResponseRecord]]:
    """Answers by row of the data, in the order of the file; empty where there is no such file."""
    found: dict[int, list[ResponseRecord]] = {}
    for record in read_records(folder, name, ResponseRecord):
        found.setdefault(record.problem, []).append(record)
    return found


def _model(spec: Mapping[str, Any]) -> str:
    return plain(
        model_name(str(spec.get("gguf_file") or spec.get("path") or "the model")), limit=80
    )


def _file(data: Mapping[str, Any]) -> str:
    return plain(PurePath(str(data.get("path", "its data"))).name, limit=80)


def _name(figure: str) -> str:
    return NAMES.get(figure, plain(figure, limit=40))


def _share(found: IntervalRecord) -> str:
    return f"{100 * found.mean:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _cells(figure: str, found: IntervalRecord) -> tuple[str, str]:
    if figure.endswith("length"):
        return number(found.mean), f"{number(found.low)} to {number(found.high)}"
    return f"{100 * found.mean:.1f} %", f"{100 * found.low:.1f} to {100 * found.high:.1f} %"
