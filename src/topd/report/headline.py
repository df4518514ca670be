"""What was run and what came out, in sentences for people; noise is called noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from topd.report.charts import number
from topd.report.folder import finite, is_stage1, read_logs, settings_of
from topd.report.summary import SummaryTable, loss_name
from topd.report.text import counted, plain
from topd.runs.files import read_whole
from topd.runs.records import read_run
from topd.statistics import t_reach

DIVERGENCES = {"reverse_kl": "reverse KL", "forward_kl": "forward KL", "jsd": "generalised JSD"}
OUTCOMES = {  # the first of these that was logged
    **DIVERGENCES,
    "reverse_kl_sampled": "sampled reverse KL",
    "loss": "loss",
}
LEAST = 4  # updates that a change can be told from
RANKED = 4  # of so many first and last values each, being apart is a case in 35 by chance
SCORES = ("greedy", "pass@1")
ARM = 100  # characters of an arm's name in a table: arms of a sweep differ at their ends
ALL_SPENT = 0.995  # of a budget
NO_INTERVAL = "no interval (too few prompts, or equal values)"
SO = {
    "good": (
        "So: for this pair the {loss} can choose where to look. That looking ahead then pays is "
        "not shown: method: opd is the default (docs/which-method.md)."
    ),
    "poor": (
        "So: train with method: opd, which needs no windows, after topd warmstart if the teacher "
        "may write answers. If you look ahead for this pair, do not let the {loss} choose where: "
        "rank candidates by another loss{such}."
    ),
    "undecided": (
        "So: nothing yet. Run the probe again with more rollouts (--rollouts), of six prompts at "
        "least."
    ),
}


def probe_words(summary: Mapping[str, Any]) -> Iterator[str]:
    """The two figures of a probe's verdict, and what follows; nothing until it has finished."""
    verdict, loss = summary.get("verdict"), loss_name(summary.get("token_loss"))
    if not isinstance(verdict, str) or verdict not in SO:
        return
    share = _estimate(summary, 100, "false_alarm_share")
    rho = _estimate(summary, 1, "correlations", "spearman", "token_loss", "random")
    yield (
        f"False alarms among high-loss tokens: {share}. Spearman's rho between {loss} and OT "
        f"over random tokens: {rho}."
    )
    such = " (candidate_loss: surprise, which first_fork brings)" * ("surprise" not in loss)
    yield SO[verdict].format(loss=loss, such=such)


def _estimate(summary: Mapping[str, Any], scale: int, *path: str) -> str:
    """A figure of an analysis with its interval, times ``scale``."""
    found: Any = summary
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or found.get("value") is None:
        return "-"
    value, low, high = found["value"], found.get("low"), found.get("high")
    digits, unit = (1, " %") if scale == 100 else (2, "")
    said = f"{scale * value:.{digits}f}{unit}"
    if low is None or high is None:
        return f"{said}, {NO_INTERVAL}"
    return f"{said} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def model_names(folder: Path) -> dict[str, str]:
    """Student and teacher as the manifest names them, by the run that they are from.

    >>> model_name("runs/teach2/student"), model_name("Qwen/Qwen3-4B")
    ('teach2/student', 'Qwen3-4B')
    """
    models = read_whole(folder / "manifest.json").get("models")
    if not isinstance(models, dict):
        return {}
    found = {
        side: model_name(str(models[side].get("name", "")))
        for side in ("student", "teacher")
        if isinstance(models.get(side), dict)
    }
    recipe = read_run(folder).get("recipe")
    several = recipe.get("teachers") if isinstance(recipe, dict) else None
    if isinstance(several, dict) and several:
        found["teacher"] = " and ".join(map(str, several))
    return {side: name for side, name in found.items() if name}


def model_name(path: str) -> str:
    """The last part of a path, with the one before it where the last says nothing."""
    parts = PurePosixPath(path).parts
    vague = parts and (
        parts[-1] in ("student", "teacher", "adapter") or parts[-1].startswith("checkpoint-")
    )
    return "/".join(parts[-2:] if vague else parts[-1:])


def change(values: Sequence[float]) -> tuple[float, float, int, bool | None]:
    """First and last mean of a series, over how many values each, and whether they differ.

    A fifth of the values each, four at least, or half of fewer than eight. They differ where the
    difference is outside its 95 % interval, made of both means' t-intervals, or where all of at
    least four last values are below, or above, all of as many first ones (a steep fall widens its
    own interval; by chance that is one case in 35 at most). None for too few values to tell.
    """
    count = max(len(values) // 5, min(len(values) // 2, RANKED))
    if len(values) < LEAST:
        return values[0], values[-1], 1, None
    first, last = values[:count], values[-count:]
    a, b = float(np.mean(first)), float(np.mean(last))
    apart = count >= RANKED and (max(last) < min(first) or min(last) > max(first))
    return a, b, count, apart or abs(b - a) > math.hypot(t_reach(first), t_reach(last))


def change_words(name: str, values: Sequence[float], updates: int) -> str:
    """A series in a sentence; its values are means over so many ``updates`` together.

    >>> change_words("reverse KL", [0.12, 0.1, 0.14, 0.15, 0.13, 0.17], 6)
    'Reverse KL 0.12 to 0.15 over 6 updates: no change to be seen.'
    >>> change_words("loss", [0.12, 0.1], 20)
    'Loss 0.12 to 0.1 over 20 updates: too few logs to tell a change.'
    """
    first, last, _, differ = change(values)
    over = counted(updates, "update")
    if len(values) == 1:
        return f"{name[:1].upper()}{name[1:]} {number(first, 2)} over {over}, logged once."
    words = {
        None: f"too few {'logs ' * (updates > len(values))}to tell a change",
        False: "no change to be seen",
        True: f"a {'fall' if last < first else 'rise'} beyond chance (95 %)",
    }[differ]
    said = f"{name} {number(first, 2)} to {number(last, 2)} over {over}: {words}."
    return said[:1].upper() + said[1:]


def held_out_words(logs: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """What the student solves of held-out problems, before the first update and at the end.

    >>> before = {"step": 0, "eval/greedy": 0.1, "eval/problems": 64}
    >>> after = {"step": 9, "eval/greedy": 0.5, "eval/greedy_change": 0.4}
    >>> after |= {"eval/greedy_change_low": 0.3, "eval/greedy_change_high": 0.5}
    >>> print(*held_out_words([before, after]))
    Held-out problems, greedy: 10.0 % before, 50.0 % after; +40.0 [30.0, 50.0] points (64 problems).
    """
    evaluations = [log for log in logs if "eval/greedy" in log]
    for key, name in (("eval/greedy", "greedy"), ("eval/pass@1", "sampled")):
        if len(evaluations) > 1 and all(key in log for log in evaluations):
            before, after = (f"{100 * evaluations[i][key]:.1f} %" for i in (0, -1))
            said = f"Held-out problems, {name}: {before} before, {after} after"
            problems = counted(evaluations[0]["eval/problems"], "problem")
            yield f"{said}{_gain_words(evaluations[-1], key)} ({problems})."


def _gain_words(log: Mapping[str, float], key: str) -> str:
    """A paired gain since the first evaluation; nothing where there are no pairs."""
    if f"{key}_change" not in log:
        return ""
    gain, low, high = (100 * log[f"{key}_change{end}"] for end in ("", "_low", "_high"))
    noise = ", no change to be seen" if low <= 0 <= high else ""
    return f"; {gain:+.1f} [{low:.1f}, {high:.1f}] points{noise}"


def repair_words(summary: Mapping[str, Any]) -> Iterator[str]:
    """How much nearer each method brings the student's window to the teacher's, and who leads."""
    found = summary.get("arms")
    by_name = found if isinstance(found, dict) else {}
    arms = {
        name: gain
        for name, arm in by_name.items()
        if isinstance(gain := arm.get("reduction_percent"), dict) and gain.get("value") is not None
    }
    if not arms:
        return
    updates, forks = (summary.get(key, 0) for key in ("updates", "samples"))
    each = f"{counted(updates, 'update')} at each of {counted(forks, 'fork')}"
    yield f"{each}: the mean OT distance from the student's continuation to the teacher's falls by:"
    ranked = sorted(arms.items(), key=lambda pair: -pair[1]["value"])
    for name, gain in ranked:
        said = f"{plain(name, limit=40)} {gain['value']:.1f} %"
        low, high = gain["low"], gain["high"]
        if low is None or high is None:
            yield f"{said}, {NO_INTERVAL}."
            continue
        noise = ": the interval holds 0, no change to be seen" * (low <= 0 <= high)
        worse = ": farther away than before" * (high < 0)
        yield f"{said} [{low:.1f}, {high:.1f}]{noise}{worse}{_against_opd(by_name[name])}."


def _against_opd(arm: Mapping[str, Any]) -> str:
    """The paired difference of a method's mean distance to that of opd, where both were tried."""
    found = arm.get("difference_to_opd")
    if not isinstance(found, Mapping) or found.get("low") is None or found.get("high") is None:
        return ""
    value, low, high = found["value"], found["low"], found["high"]
    noise = ", no difference to be seen" * (low <= 0 <= high)
    return f"; OT distance less opd's {value:+.3f} [{low:.3f}, {high:.3f}]{noise}"


def training_words(folder: Path) -> Iterator[str]:
    """Who learned from whom, and whether the divergence has changed."""
    every = read_logs(folder)
    logs = [log for log in every if "loss" in log]
    settings, names = settings_of(folder), model_names(folder)
    if logs and len(names) == 2:
        yield _learned({side: plain(name, limit=80) for side, name in names.items()}, settings)
        yield from _also(settings)
        if left_out := max(log.get("answers/unfinished", 0) for log in every):
            share = f"{100 * left_out:.3g} %"
            yield f"{share} of the answers did not end within the limit and were left out."
    for key, name in OUTCOMES.items():
        values, updates = finite(logs, key)
        if values:
            yield change_words(name, values, sum(updates))
            if key in DIVERGENCES and max(map(abs, values[:LEAST])) < NOTHING_TO_LEARN:
                yield ALIKE
            break
    yield from held_out_words(every)
    yield from _faults(folder)


def _faults(folder: Path) -> Iterator[str]:
    """The updates that nonfinite left out, or that stopped the run: each has a folder."""
    found = [path.name.removeprefix("fault-") for path in folder.glob("fault-*")]
    if steps := sorted(int(step) for step in found if step.isdigit()):
        named = ", ".join(f"fault-{step}" for step in steps[:3])
        more = f" and {len(steps) - 3} more" * (len(steps) > 3)
        yield (
            f"The loss or a gradient was not finite in {counted(len(steps), 'update')}, so that no "
            f"weights were changed by it. The batch is kept: {named}{more}."
        )


def _learned(names: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """Who learned from whom, and how."""
    if is_stage1(settings):
        own = f"{names['teacher']}'s answers"
        whose = {"teacher": own, "data": "the answers of its data"}
        source = whose.get(settings["answers"], "the answers of an earlier warm start")
        return f"{names['student']} imitated {source} (stage 1)."
    method = settings.get("method")
    how = f" by {plain(str(method), limit=40)}" if method else ""
    prompt = ", which has a prompt of its own" if settings.get("teacher_prompt") else ""
    whom = "itself" if names["student"] == names["teacher"] and prompt else names["teacher"]
    return f"{names['student']} learned{how} from {whom}{prompt}."


def _also(settings: Mapping[str, Any]) -> Iterator[str]:
    """What an update learns besides its own rollouts."""
    if share := settings.get("teacher_share"):
        yield f"In {100 * share:.3g} % of the updates the teacher wrote the responses."
    if count := settings.get("window_replay"):
        yield f"Every update learned up to {count:g} windows of earlier updates again."


NOTHING_TO_LEARN = 1e-3  # nats a token
ALIKE = (
    "Student and teacher agree from the first updates on: there is nothing to learn here. Are they "
    "the same model with the same prompt?"
)


def compare_words(summary: Mapping[str, Any]) -> Iterator[str]:
    """Every arm against the baseline, in points, with its time."""
    base, arms = str(summary.get("baseline", "opd")), summary.get("summary", {})
    cpu = "CPU " * (summary.get("clock") == "cpu")
    seeds, every = seeds_of(summary), set(summary.get("seeds", ()))
    for name, arm in arms.items():
        gain = arm.get(f"greedy_vs_{base}")
        if name == base or not isinstance(gain, dict) or gain.get("mean") is None:
            continue
        alone = len(seeds.get(name, every) & seeds.get(base, every)) == 1
        noise = "; one seed, so an interval over problems alone" * alone
        if gain.get("low") is None:
            noise = ", one seed alone: no interval"
        elif gain["low"] <= 0 <= gain["high"]:
            over = " over problems alone" * alone
            noise = f"; the interval{over} holds 0, no difference to be seen"
        ratio = arm.get("seconds_ratio")
        time = f", {ratio:.1f} x the {cpu}time" if isinstance(ratio, int | float) else ""
        arm_name, base_name = plain(str(name), limit=ARM), plain(base, limit=ARM)
        yield f"{arm_name}: {_points(gain)} points over {base_name} (greedy){time}{noise}."


def seeds_words(summary: Mapping[str, Any]) -> str:
    """How many seeds a comparison has, and what its intervals are over.

    >>> seeds_words({"spent": {"a": {"seeds": [0, 1]}, "b": {"seeds": [0]}}}).partition(";")[0]
    '1 to 2 seeds an arm, compared on those in common'
    """
    each = list(seeds_of(summary).values()) or [set(summary.get("seeds", ()))]
    found = [len(seeds) for seeds in each]
    least, most = min(found), max(found)
    if most == 1:
        return "one seed; 95 % intervals over problems alone, not over seeds"
    count = f"{most} seeds" if least == most else f"{least} to {most} seeds"
    count += " an arm, compared on those in common" * any(seeds != each[0] for seeds in each)
    base = seeds_of(summary).get(str(summary.get("baseline", "opd")), set())
    alone = least == 1 or any(len(seeds & base) == 1 for seeds in each)
    over = f"seeds and problems{', of one seed over problems alone' * alone}"
    return f"{count}; 95 % intervals over {over}"


def seeds_of(summary: Mapping[str, Any]) -> dict[str, set[int]]:
    """The seeds of every arm; older summaries do not have them."""
    return {arm: set(spent.get("seeds", ())) for arm, spent in summary.get("spent", {}).items()}


def compare_tables(summary: Mapping[str, Any]) -> list[SummaryTable]:
    """One table by arm, in per cent, with what each started from and spent."""
    base = str(summary.get("baseline", "opd"))
    over = f"over {plain(base, limit=30)}"
    cpu = "CPU " * (summary.get("clock") == "cpu")
    spent = f"{cpu}time", f"{cpu}seconds", "teacher-written tokens"
    columns = ("arm", "greedy, %", over, "pass@1, %", over, *spent)
    rows = [
        (plain(str(name), limit=40), _percent(s.get("greedy")), "", _percent(s.get("pass@1")),
         *[""] * 4)
        for name, s in summary.get("starts", {}).items()
    ]  # fmt: skip
    for name, arm in summary.get("summary", {}).items():
        cells = [plain(str(name), limit=ARM)]
        for score in SCORES:
            gain = arm.get(f"{score}_vs_{base}")
            cells += [_percent(arm.get(score)), "" if name == base else _points(gain)]
        ratio = arm.get("seconds_ratio")
        cells.append(f"{ratio:.2f} x" if isinstance(ratio, int | float) else "-")
        cells += [number(arm.get("seconds")), number(arm.get("teacher_tokens"))]
        rows.append(tuple(cells))
    title = f"Arms: {seeds_words(summary)}"
    tables = [SummaryTable(title, columns, tuple(rows))] if rows else []
    return [*tables, *_equal_tables(summary)]


def _equal_tables(summary: Mapping[str, Any]) -> Iterator[SummaryTable]:
    """How arms compare with a reference where both have spent the same, by what is held equal."""
    cpu = "CPU " * (summary.get("clock") == "cpu")
    for reference, arms in summary.get("equal", {}).items():
        axes = list(dict.fromkeys(axis for arm in arms.values() for axis in arm))
        ends = summary.get("against", {}).get(reference, {})
        rows = tuple(
            (
                plain(str(name), limit=ARM),
                *(_at_equal(arm.get(axis)) for axis in axes),
                number(ends.get(name, {}).get("greedy", {}).get("holm"), 2),
            )
            for name, arm in arms.items()
        )
        if not arms:  # the reference has no other arm beside it
            continue
        title = (
            f"Greedy points over {plain(str(reference), limit=ARM)} where as much was spent, or at "
            "the end of an arm that spent less"
        )
        named = (cpu * (axis == "seconds") + plain(axis, limit=40) for axis in axes)
        columns = ("arm", *named, "p at the ends, by Holm")
        yield SummaryTable(title, columns, rows)


def _at_equal(found: Any) -> str:
    """Points at an equal budget, with the share of it that the arm has spent, if not all."""
    if not isinstance(found, dict):
        return "-"
    reached = found.get("reached")
    points = _points(found.get("greedy"))
    if isinstance(reached, int | float) and reached < ALL_SPENT:
        return f"{points}, having spent {100 * reached:.0f} %"
    return points


def _percent(found: Any, sign: str = "") -> str:
    """A share with its interval in per cent; a start is a number or one with an interval."""
    parts = found if isinstance(found, dict) else {"mean": found}
    mean, low, high = (parts.get(key) for key in ("mean", "low", "high"))
    if not isinstance(mean, int | float):
        return "-"
    ends = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * mean:{sign}.1f}{ends}"


def _points(gain: Any) -> str:
    return _percent(gain, "+")
