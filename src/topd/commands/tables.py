"""What a run, a probe, a repair or a comparison found, as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from topd.report import headline
from topd.report.charts import spaced
from topd.report.folder import finite, read_logs
from topd.report.summary import loss_name, verdict_in
from topd.report.text import counted
from topd.statistics import t_reach

BASE = 12  # characters of a baseline's name that fit into a column of 80
Summary = Mapping[str, Any]
Log = Mapping[str, float]


def show_run(console: Console, folder: Path) -> None:
    """Print the logged updates of a training run, its fall, and what is solved of held-out data."""
    every = read_logs(folder)
    logs = [log for log in every if "loss" in log]
    if logs:
        show_table(console, logs)
        show_change(console, logs)
    for line in headline.held_out_words(every):
        console.print(line, markup=False, highlight=False)


def show_change(console: Console, logs: Sequence[Log]) -> None:
    """Print the divergence of the first and the last fifth of the updates, with intervals.

    The loss instead, where only cross-entropy is learned (``kd_ratio: 0``).
    The intervals are 95 % t-intervals over logs. Each update has prompts of its own, so this
    shows the trend in training; it is no evaluation.
    """
    found = ((key, *finite(logs, key)) for key in (*headline.DIVERGENCES, "loss"))
    name, values, updates = next((of for of in found if of[1]), ("", [], []))
    count = len(values) // 5
    if count < 2:
        return
    for label, part in (("first", slice(count)), ("last", slice(-count, None))):
        mean, half = sum(values[part]) / count, t_reach(values[part])
        which = f"{name}, {label} {sum(updates[part])} updates"
        console.print(f"{which}: {mean:.4f} +- {half:.4f} nats a token")


def show_table(console: Console, logs: Sequence[Log]) -> None:
    """Print the updates of a run, at most 12 of them, evenly spaced."""
    table = Table()
    columns = [
        ("step", "step", "{:.0f}"),
        ("loss", "loss", "{:.4f}"),
        ("reverse KL", "reverse_kl", "{:.4f}"),
        ("forward KL", "forward_kl", "{:.4f}"),
        ("forks found", "topd/real_divergent_points", "{:.0f}"),
        ("false alarms", "topd/false_alarm_share", "{:.0%}"),
        ("mean OT", "topd/mean_ot", "{:.3f}"),
        ("length", "completions/mean_length", "{:.0f}"),
    ]
    looked = any(entry.get("topd/candidates", 1) for entry in logs)
    shown = [
        column
        for column in columns
        if any(column[1] in entry for entry in logs) and (looked or column[0] != "forks found")
    ]
    for title, _, _ in shown:
        table.add_column(title, justify="right")
    for i in spaced(len(logs), 12):
        table.add_row(*(f.format(logs[i][key]) if key in logs[i] else "-" for _, key, f in shown))
    console.print(table)


def show_probe(console: Console, summary: Summary) -> None:
    """Print the summary of a probe (probe.json)."""
    console.print(_groups(summary), _correlations(summary))
    for name, title in (("false_alarms", "False alarms"), ("forks", "Real divergent points")):
        if summary["pairs"][name]:
            console.print(_pairs(title, summary["pairs"][name]))
    cost = summary["cost"]
    tokens, seconds = cost["tokens"], cost["seconds"]["all"]
    lines = (
        f"ot_threshold for training: {interval(summary['threshold'])}",
        f"cost: {tokens['student_sampled']:,} tokens sampled, {tokens['teacher_scored']:,} scored "
        f"and {tokens['teacher_decoded']:,} written by the teacher, {seconds:,.0f} s",
        "{} ({})".format(*verdict_in(summary)),
    )
    for line in (*lines, *_outcomes(summary), *headline.probe_words(summary)):
        console.print(line, markup=False, highlight=False)


def _outcomes(summary: Summary) -> Iterator[str]:
    """What verified candidates came to, in two lines; nothing where none was."""
    if "outcomes" not in summary:
        return
    right, forks = summary["outcomes"]["right"], summary["outcomes"]["verified"]
    tokens = summary["cost"]["tokens"]
    yield (
        f"right answers: {percent(right['before'])} if the teacher takes over at a candidate, "
        f"{percent(right['after'])} if after it, {percent(right['alone'])} by the student"
    )
    yield (
        f"verified forks: {percent(forks['all'])} of the candidates, {percent(forks['real'])} of "
        f"those real by OT, {percent(forks['false_alarms'])} of the false alarms; for "
        f"{tokens['teacher_verifying']:,} tokens of the teacher and "
        f"{tokens['student_verifying']:,} of the student"
    )


def show_repair(console: Console, summary: Summary) -> None:
    """Print the summary of a repair (repair.json)."""
    table = _table(
        f"{counted(summary['samples'], 'fork')}, {counted(summary['updates'], 'update')} each, "
        f"learning rate {summary['learning_rate']:g}, windows of {summary['window_length']} tokens",
        ("method", "mean OT", "reduction", "against opd"),
        box.SIMPLE_HEAD,
    )
    for name, arm in summary["arms"].items():
        against = arm.get("difference_to_opd")
        table.add_row(
            name,
            interval(arm["mean"]),
            interval(arm["reduction_percent"], "{:.0f}%") if name != "before" else "",
            interval(against, "{:+.3f}") if against else "",
        )
    console.print(table)
    paper = ", ".join(f"{name} {value:.3f}" for name, value in summary["paper"].items())
    console.print(f"the paper's: {paper}", markup=False, highlight=False)


def show_compare(console: Console, summary: Summary) -> None:
    """Print the summary of a comparison (compare.json): per cent, intervals of 95 %."""
    base = summary["baseline"]
    over = escape(f"over {base}" if len(base) <= BASE else "over baseline")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("arm", overflow="fold", max_width=20)
    for title in ("greedy", over, "pass@1", over, "time"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, start in summary["starts"].items():
        table.add_row(
            escape(name), _mean_percent(start["greedy"]), "", _mean_percent(start["pass@1"]), "", ""
        )
    for name, arm in summary["summary"].items():
        gains = [_gain(arm[f"{score}_vs_{base}"]) for score in ("greedy", "pass@1")]
        versus = ["", ""] if name == base else gains
        scores = [_mean_percent(arm[score]) for score in ("greedy", "pass@1")]
        time = f"{arm['seconds_ratio']:.2f}"
        table.add_row(escape(name), scores[0], versus[0], scores[1], versus[1], time)
    console.print(table)
    for line in headline.compare_words(summary):
        console.print(line, markup=False, highlight=False)
    problems = summary["summary"][base]["greedy"]["problems"]
    time = "CPU time" if summary.get("clock") == "cpu" else "time"
    asked = f"{counted(problems, 'problem')}, {headline.seeds_words(summary)}"
    line = f"{asked}; per cent; {time} over {base}'s"
    console.print(line, markup=False, highlight=False)


def _mean_percent(found: Summary) -> str:
    return f"{100 * found['mean']:.1f}"


def _gain(found: Summary) -> str:
    mean, low, high = (100 * found[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} \\[{low:.1f},{high:.1f}]"


def interval(found: Summary, form: str = "{:.3f}") -> str:
    """An estimate with its 95 % interval.

    >>> interval({"value": 0.5, "low": 0.25, "high": None})
    '0.500'
    >>> interval({"value": 0.5, "low": 0.25, "high": 0.75})
    '0.500 [0.250, 0.750]'
    """
    value, low, high = (found[name] for name in ("value", "low", "high"))
    if value is None:
        return "-"
    if low is None or high is None:
        return form.format(value)
    return f"{form.format(value)} [{form.format(low)}, {form.format(high)}]"


def percent(found: Summary) -> str:
    """A share with its 95 % interval, in per cent."""
    return interval(found, "{:.1%}")


def _groups(summary: Summary) -> Table:
    table = _table(
        f"{counted(summary['rollouts'], 'rollout')}, windows of {summary['window_length']} tokens",
        ("tokens", "number", "median OT", "join again", "after"),
    )
    for name in ("high", "random", "low"):
        spread = summary["distributions"][name]
        after = spread["median_rejoin"]
        table.add_row(
            name + ("-loss" if name != "random" else ""),
            f"{spread['count']:,}",
            interval(summary["median_distance"][name]),
            percent(summary["rejoined_share"][name]),
            "-" if after is None else f"{after:.0f}",
        )
    return table


def _correlations(summary: Summary) -> Table:
    table = _table("Correlation with OT", ("over", "loss", "Pearson", "Spearman"))
    ranks = loss_name(summary["token_loss"]).removeprefix("candidate_loss ")
    pearson, spearman = (summary["correlations"][kind] for kind in ("pearson", "spearman"))
    for over in ("random", "high", "all"):
        for loss in pearson:
            table.add_row(
                over if loss == "token_loss" else "",
                ranks if loss == "token_loss" else loss.replace("_", " "),
                interval(pearson[loss][over], "{:.2f}"),
                interval(spearman[loss][over], "{:.2f}"),
            )
    return table


def _pairs(title: str, pairs: Sequence[Summary]) -> Table:
    """The first five."""
    table = _table(title, ("student", "teacher", "times"))
    for pair in pairs[:5]:
        texts = (escape(repr(pair[f"{who}_text"])) for who in ("student", "teacher"))
        table.add_row(*texts, f"{pair['count']:,}")
    return table


def _table(title: str, columns: Sequence[str], style: box.Box = box.HEAVY_HEAD) -> Table:
    narrow = style is not box.HEAVY_HEAD  # figures with intervals need every column
    padding = (0, 1, 0, 0) if narrow else (0, 1)
    table = Table(
        title=title, title_justify="left", width=None if narrow else 78, box=style, padding=padding,
        show_edge=not narrow,
    )  # fmt: skip
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    return table
