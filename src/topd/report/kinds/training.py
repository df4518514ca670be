"""What the page of a training run shows: curves, forks, and where the time went."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from topd.report.charts import (
    Chart,
    Fact,
    count_whole,
    curve_table,
    curves,
    group_table,
    histogram,
    legend_below,
    number,
    series,
    spaced,
)
from topd.report.charts.svg import ALARM, FAINT, INK, PALETTE, REAL, hint
from topd.report.folder import finite, is_stage1, read_logs, settings_of
from topd.report.guided import Verdict, rule_of, trajectory_caption, ways
from topd.report.headline import DIVERGENCES, change
from topd.report.text import counted, plain
from topd.runs.records import GuidanceRecord, read_records, updates_in

Logs = Sequence[Mapping[str, float]]
BARS = 40
PHASE = "seconds/"
LEAST_SHARE = 0.0005  # of the time, of a phase that is drawn: stage 1 has no transport


class Curves(NamedTuple):
    """A figure of some keys of the logs, each with the label of its curve."""

    name: str
    title: str
    caption: str
    unit: str
    keys: tuple[tuple[str, str], ...]


CURVES = (
    Curves(
        "divergence",
        "Divergence from the teacher",
        "Mean over response tokens of the token divergence, on the student's own rollouts. Every "
        "update has prompts of its own, so a single update says little.",
        "nats a token",
        (
            *DIVERGENCES.items(),
            ("reverse_kl_sampled", "sampled reverse KL"),
            ("eval_loss", "held out"),
        ),
    ),
    Curves(
        "loss",
        "Loss",
        "What an update minimises, mean over response tokens; no divergence was computed.",
        "nats a token",
        (("loss", "loss"),),
    ),
    Curves(
        "held_out",
        "Held-out problems",
        "Share of the problems of the recipe's evaluation that the student solves, greedily and by "
        "a sample; update 0 is the student as it came.",
        "share of the problems",
        (("eval/greedy", "greedy"), ("eval/pass@1", "sampled")),
    ),
    Curves(
        "trajectory",
        "Trajectory loss",
        "L_traj, mean over guided tokens.",
        "nats a guided token",
        (("topd/trajectory_loss", "L_traj"),),
    ),
    Curves(
        "distance",
        "Distance of the windows",
        "Mean optimal-transport distance between what student and teacher write next, over the "
        "candidates of an update. 0: the same tokens; about 1: unrelated ones.",
        "mean OT distance",
        (("topd/mean_ot", "mean OT distance"),),
    ),
    Curves(
        "alarms",
        "False alarms among the candidates",
        "Share of the candidates that the verdict of this run counts as false alarms.",
        "share of candidates",
        (("topd/false_alarm_share", "false alarms"),),
    ),
    Curves(
        "length",
        "Length of the responses",
        "Mean length of the student's rollouts.",
        "tokens",
        (("completions/mean_length", "mean length"),),
    ),
    Curves(
        "health",
        "Signs of collapse",
        "Share of rollouts cut by the length limit, and of 4-grams that repeat within a rollout.",
        "share",
        (
            ("completions/clipped_ratio", "cut by the limit"),
            ("completions/repeated_4gram_share", "repeated 4-grams"),
        ),
    ),
    Curves(
        "entropy",
        "Entropy of the student",
        "Mean over response tokens. A steep fall is a student that stops exploring.",
        "nats a token",
        (("entropy", "entropy"),),
    ),
)


@dataclass(frozen=True)
class Found:
    """What guidance.jsonl says of a run: distances by verdict, and what L_traj is taken along."""

    real: list[float]
    alarm: list[float]
    ways: dict[str, None]


def training_charts(folder: Path) -> list[Chart]:
    """The figures of a training run; those that it has no numbers for are left out."""
    logs, found, rule = read_logs(folder), _found(folder), rule_of(folder)
    settings = settings_of(folder)
    captions = {
        **_captions(settings),
        "trajectory": trajectory_caption(found.ways),
        "alarms": rule.told,
    }
    left_out = {"alarms"} if not rule.why_alarm else set()
    if is_stage1(settings):
        left_out.add("health")  # of answers that the student did not write
    if any(key in log for log in logs for key in DIVERGENCES):
        left_out.add("loss")
    charts = [
        chart
        for shown in _with_sets(logs)
        if shown.name not in left_out
        and (chart := _curve_chart(logs, shown, captions.get(shown.name) or shown.caption))
    ]
    if teachers := _by_teacher(logs):
        charts.insert(1, teachers)
    if found.real or found.alarm:
        charts.insert(2, _fork_chart(found, rule))
    times = _phase_seconds(logs)
    return [*charts, _time_chart(logs, times)] if times else charts


def _with_sets(logs: Logs) -> list[Curves]:
    """``CURVES``, with a curve of each of several evaluation sets: ``eval_NAME_loss``."""
    found = dict.fromkeys(key for log in logs for key in log)
    named = (key[5:-5] for key in found if key.startswith("eval_") and key.endswith("_loss"))
    sets = tuple((f"eval_{name}_loss", f"held out, {plain(name, limit=30)}") for name in named)
    divergence, *others = CURVES
    return [divergence._replace(keys=(*divergence.keys, *sets)), *others]


def _captions(settings: Mapping[str, Any]) -> dict[str, str]:
    """What is said otherwise where the responses are not all the student's."""
    if is_stage1(settings):
        return {
            "divergence": "Mean over the tokens of the answers of the token divergence.",
            "length": "Mean length of the answers that the student learns from.",
        }
    if settings.get("teacher_share"):
        both = "the student's rollouts, or what the teacher wrote in their place"
        return {
            "divergence": f"Mean over response tokens of the token divergence, on {both}.",
            "length": f"Mean length of {both}.",
        }
    return {}


def training_facts(folder: Path) -> list[Fact]:
    """The run in a few numbers."""
    every = read_logs(folder)
    logs = [log for log in every if "loss" in log]
    done, asked = max((log.get("step", 0) for log in every), default=0), _asked(folder)
    if not logs:
        return [Fact("updates", number(done), "none was logged yet")]
    facts = [Fact("updates", number(done), f"of {asked:,}" if done < asked else "")]
    changes = (_change(logs, key) for key in DIVERGENCES if finite(logs, key)[0])
    facts += [*changes][:1]
    found, rule = _found(folder), rule_of(folder)
    for name, distances in zip(rule.groups, (found.real, found.alarm), strict=True):
        if distances:
            median = f"median OT distance {np.median(distances):.3f}"
            facts.append(Fact(name, f"{len(distances):,}", median))
    times = _phase_seconds(logs)
    if times:
        slowest = max(times, key=times.__getitem__)
        share = times[slowest] / max(sum(times.values()), 1e-9)
        note = f"{share:.0%} of it in {slowest}"
        facts.append(Fact("time in the phases", duration(sum(times.values())), note))
    return facts


def _asked(folder: Path) -> int:
    """The updates that a run was to make; 0 where epochs say it, or nothing is known."""
    asked = settings_of(folder).get("max_steps")
    return asked if isinstance(asked, int) else 0


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(5.25), duration(312), duration(7300)
    ('5.2 s', '5 min 12 s', '2 h 2 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    return "{} h {} min".format(*divmod(round(seconds / 60), 60))


def _curve_chart(logs: Logs, shown: Curves, caption: str) -> Chart | None:
    found = [curve for key, label in shown.keys if (curve := series(logs, key, label))]
    if not found:
        return None
    draw = curves(found, unit=shown.unit)
    return Chart(shown.name, shown.title, caption, draw, *curve_table(found))


def _by_teacher(logs: Logs) -> Chart | None:
    """A curve of each of several teachers; ``teacher/NAME/reverse_kl_sampled`` of the logs."""
    start, end = "teacher/", "/reverse_kl_sampled"
    ours = dict.fromkeys(k for log in logs for k in log if k.startswith(start) and k.endswith(end))
    keys = tuple((k, plain(k.removeprefix(start).removesuffix(end), limit=40)) for k in ours)
    caption = "Sampled reverse KL on the rollouts of each teacher, mean over response tokens."
    shown = Curves("teachers", "By teacher", caption, "nats a token", keys)
    return _curve_chart(logs, shown, caption)


def _change(logs: Logs, key: str) -> Fact:
    """Means of the first and last updates, and of how many."""
    values, updates = finite(logs, key)
    first, last, count, differ = change(values)
    if len(values) == 1:
        return Fact(DIVERGENCES[key], f"{first:.3f}", "nats a token, logged once")
    head, tail = sum(updates[:count]), sum(updates[-count:])
    ends = f"first and last {tail}" if head == tail else f"first {head} and last {tail}"
    note = f"nats a token, mean of the {ends} of {counted(sum(updates), 'update')}"
    arrow = "→" if differ else "to"
    noise = {True: "", False: "; no change to be seen", None: "; too few to tell a change"}[differ]
    return Fact(DIVERGENCES[key], f"{first:.3f} {arrow} {last:.3f}", note + noise)


def _found(folder: Path) -> Found:
    """One pass over guidance.jsonl."""
    found = Found([], [], {})
    for record in read_records(folder, "guidance.jsonl", GuidanceRecord):
        for fork in record.forks:
            if math.isfinite(fork.distance):
                (found.real if fork.real else found.alarm).append(fork.distance)
        found.ways.update(dict.fromkeys(ways(record)))
    return found


def _fork_chart(found: Found, rule: Verdict) -> Chart:
    real, alarm = rule.groups
    groups = {real: found.real, alarm: found.alarm}
    return Chart(
        "forks",
        "How far apart the candidates' windows are",
        "Every candidate of the run by the distance of its two windows. Vertical lines: medians. "
        + rule.told,
        histogram(groups, {real: REAL, alarm: ALARM}, unit="OT distance"),
        *group_table(groups),
    )


def _phase_seconds(logs: Logs) -> dict[str, float]:
    times: dict[str, float] = defaultdict(float)
    for log in logs:
        for key, value in log.items():
            if key.startswith(PHASE) and math.isfinite(value):
                times[key.removeprefix(PHASE)] += value
    return dict(times)


def _time_chart(logs: Logs, times: Mapping[str, float]) -> Chart:
    total = sum(times.values())
    seen = tuple(phase for phase, seconds in times.items() if seconds >= LEAST_SHARE * total)
    rows = tuple(
        (phase, number(seconds), f"{seconds / max(total, 1e-9):.1%}")
        for phase, seconds in times.items()
    )
    return Chart(
        "time",
        "Where the time goes",
        f"Seconds by phase of an update; {duration(total)} in all."
        + " Transport is the optimal-transport solver, windows the teacher's look ahead."
        * ("windows" in times),
        _time_bars(logs, seen),
        ("phase", "seconds", "share"),
        rows,
    )


def _time_bars(logs: Logs, phases: tuple[str, ...]) -> Callable[[Axes], None]:
    """Stacked bars, each the mean of neighbouring updates; a log has the sum of those it is of."""
    timed = [log for log in logs if any(PHASE + phase in log for phase in phases)]
    updates, edges = updates_in(timed), spaced(len(timed) + 1, BARS + 1)
    parts = [slice(*ends) for ends in pairwise(edges)]
    counts = [sum(updates[part]) for part in parts]
    ends = [timed[part][-1]["step"] for part in parts]
    places = [end - (count - 1) / 2 for end, count in zip(ends, counts, strict=True)]
    names = [
        f"updates {end - count + 1:g} to {end:g}, mean" if count > 1 else f"update {end:g}"
        for end, count in zip(ends, counts, strict=True)
    ]

    def draw(axes: Axes) -> None:
        bottom, widths = np.zeros(len(parts)), 0.8 * np.array(counts)
        for colour, phase in zip(cycle((*PALETTE, INK, FAINT)), phases, strict=False):
            sums = [sum(log.get(PHASE + phase, 0.0) for log in timed[part]) for part in parts]
            means = np.array(sums) / counts
            bars = axes.bar(places, means, widths, bottom=bottom, color=colour, label=phase)
            for bar, name, mean in zip(bars, names, means, strict=True):
                hint(bar, [f"{phase}, {name}: {mean:.3g} s"])
            bottom += means
        axes.set(xlabel="updates", ylabel="seconds an update")
        count_whole(axes)
        legend_below(axes, 3)

    return draw
