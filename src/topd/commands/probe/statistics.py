"""What the positions of a probe say: statistics with 95 % intervals, from positions.jsonl alone.

Memory is bounded: a file is read a line at a time, and only 13 numbers of a position are kept, of
at most about ``MOST_POSITIONS`` positions. Beyond that a random sample of the prompts stands for
all.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from topd.commands.probe.intervals import Array, Estimate, intervals, method_of, number
from topd.commands.probe.outcomes import HALF
from topd.commands.session import ROLLOUTS, AnalysisConfig
from topd.errors import TOPDError
from topd.report.summary import loss_name
from topd.runs.files import raw_lines, read_lines
from topd.training.experience.evidence import ALIKE

POSITIONS = "positions.jsonl"
METRICS = "metrics.jsonl"
GROUPS = ("high", "random", "low")
LOSSES = ("token_loss", "reverse_kl", "entropy")
OUTCOMES = ("before", "after", "alone")  # shares of right answers, where they were asked for
MOST_POSITIONS = 300_000
REJOIN_RUN = 4  # tokens in common up to the end of a window that count as having joined again
MOST_FALSE_ALARMS = 0.25
LEAST_CORRELATION = 0.3
RULE = (
    f"good: the upper end of the false-alarm share is at most {MOST_FALSE_ALARMS:.0%} and the "
    "lower end of Spearman's rho between token loss and OT over random tokens at least "
    f"{LEAST_CORRELATION}; poor: the lower end of the share is above, or the upper end of rho "
    "below; otherwise undecided"
)

COLUMNS = np.dtype(
    [(name, "i8") for name in ("prompt", "group", "student", "teacher", "length")]
    + [(name, "f8") for name in (*LOSSES, "distance", "rejoin", *OUTCOMES)]
)


@dataclass(frozen=True)
class Sample:
    """The positions that statistics are made of, and how many there were in all."""

    columns: Array
    positions: int


def rejoin(student: Sequence[int], teacher: Sequence[int]) -> int | None:
    """How many tokens the student writes before both windows run on together.

    The smallest i for which there is a j such that student[i:] and teacher[j:] agree up to the end
    of the shorter, over at least ``REJOIN_RUN`` tokens (or the whole shorter window, if that is
    less). The windows may meet at different places: i and j need not be equal. 0 for windows that
    never part, None for windows that do not meet again.

    >>> rejoin([7, 1, 2, 3, 4], [8, 9, 1, 2, 3, 4])
    1
    """
    n, m = len(student), len(teacher)
    if not n or not m:
        return None
    together = np.equal.outer(np.asarray(student), np.asarray(teacher))
    for i in range(n - 2, -1, -1):  # from here on both windows say the same until one ends
        together[i, :-1] &= together[i + 1, 1:]
    left = np.minimum.outer(n - np.arange(n), m - np.arange(m))
    meets = (together & (left >= min(REJOIN_RUN, n, m))).any(axis=1)
    return int(meets.argmax()) if meets.any() else None


def read_sample(path: Path, *, seed: int, most: int = MOST_POSITIONS) -> Sample:
    """The numeric columns of positions.jsonl: all, or beyond about ``most`` positions those of a
    random sample of the prompts."""
    positions = sum(1 for _ in raw_lines(path))
    share = most / max(positions, 1)

    def rows() -> Iterator[tuple[Any, ...]]:
        for record in read_lines(path):
            prompt = record["prompt"]
            if share >= 1 or zlib.crc32(f"{seed} {prompt}".encode()) < share * 2**32:
                yield _row(record)

    return Sample(np.fromiter(rows(), COLUMNS), positions)


def measure(columns: Array) -> dict[str, float]:
    """Medians, threshold, false alarms, correlations and reconvergence of some positions.

    ``threshold`` is the upper quartile of the OT distances of low-loss positions,
    ``false_alarm_share`` the share of high-loss positions that are not real by it
    (arXiv 2606.00305).
    """
    groups = _by_group(columns)
    found = {"threshold": _threshold(groups)}
    found |= {name: _mean(hits) for name, (_, hits) in _shares(groups).items()}
    for name, some in groups.items():
        found[f"median/{name}"] = _quantile(some["distance"], 0.5)
    for name, some in {**groups, "all": columns}.items():
        for loss in LOSSES if name != "low" else ():
            found[f"pearson/{loss}/{name}"] = pearson(some[loss], some["distance"])
            ranks = (rankdata(some[loss]), rankdata(some["distance"]))
            found[f"spearman/{loss}/{name}"] = pearson(*ranks)
    return found


def prompts_behind(columns: Array) -> dict[str, int]:
    """Of each figure in :func:`measure` how many prompts have a position that it is taken over."""
    groups = _by_group(columns)
    behind = {name: groups.get(name.rpartition("/")[2], columns) for name in measure(columns)}
    behind |= {name: some for name, (some, _) in _shares(groups).items()}
    behind["threshold"] = groups["low"]
    return {name: len(np.unique(some["prompt"])) for name, some in behind.items()}


def is_real(distance: Array, threshold: float) -> Array:
    """Whether windows are real divergent points: equal ones are none, whatever the threshold."""
    return (distance >= threshold) & (distance > 0)


def _by_group(columns: Array) -> dict[str, Array]:
    return {name: columns[columns["group"] == i] for i, name in enumerate(GROUPS)}


def _threshold(groups: dict[str, Array]) -> float:
    return _quantile(groups["low"]["distance"], 0.75)


def _shares(groups: dict[str, Array]) -> dict[str, tuple[Array, Array]]:
    """Every share by name: the positions that it is taken over, and what each counts in it."""
    high, threshold = groups["high"], _threshold(groups)
    real, alarm = _verdicts(high, threshold)
    found = {"false_alarm_share": (high[real | alarm], alarm[real | alarm])}
    for name, some in groups.items():
        found[f"rejoined/{name}"] = some, np.isfinite(some["rejoin"])
    asked = np.isfinite(high["before"])  # what came of the candidates that were verified
    fork = high["before"] - high["after"] >= HALF
    for name in OUTCOMES if asked.any() else ():
        found[f"right/{name}"] = high[asked], high[asked][name]
    parts = {"all": asked, "real": asked & real, "false_alarms": asked & alarm}
    for name, part in parts.items() if asked.any() else ():
        found[f"verified/{name}"] = high[part], fork[part]
    return found


def _verdicts(high: Array, threshold: float) -> tuple[Array, Array]:
    """Which are real and which are false alarms; neither where there is no threshold."""
    real = is_real(high["distance"], threshold)
    return real, ~real & math.isfinite(threshold)


def pearson(x: Array, y: Array) -> float:
    """Pearson's r [-1, 1]; NaN if there are fewer than two values or one side is constant."""
    if len(x) < 2 or not (np.ptp(x) > 0 and np.ptp(y) > 0):
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def verdict(false_alarms: Estimate, correlation: Estimate) -> str:
    """good, poor or undecided, by ``RULE``."""
    share, rho = false_alarms, correlation
    if share.low is None or share.high is None or rho.low is None or rho.high is None:
        return "undecided"
    if share.high <= MOST_FALSE_ALARMS and rho.low >= LEAST_CORRELATION:
        return "good"
    if share.low > MOST_FALSE_ALARMS or rho.high < LEAST_CORRELATION:
        return "poor"
    return "undecided"


def distributions(columns: Array, highest: float) -> dict[str, Any]:
    """Of each group: counts in 40 equal bins of [0, ``highest``], quantiles, tokens to rejoin.

    ``median_rejoin`` counts windows that do not meet again as infinitely far; None if they are
    half or more.
    """
    edges = np.linspace(0, highest, 41)
    found: dict[str, Any] = {"edges": edges.tolist()}
    for name, some in _by_group(columns).items():
        levels = {str(q): number(_quantile(some["distance"], q / 100)) for q in (5, 25, 50, 75, 95)}
        tokens = np.sort(some["rejoin"])
        found[name] = {
            "count": len(some),
            "mean": number(_mean(some["distance"])),
            "quantiles": levels,
            "histogram": np.histogram(some["distance"], edges)[0].tolist(),
            "median_rejoin": number(tokens[len(tokens) // 2]) if len(tokens) else None,
        }
    return found


def frequent_pairs(columns: Array, threshold: float, *, most: int = 10) -> dict[str, Any]:
    """The commonest (student token, teacher token, count) at false alarms and at forks."""
    high = _by_group(columns)["high"]
    real, alarm = _verdicts(high, threshold)
    found = {}
    for name, some in (("false_alarms", high[alarm]), ("forks", high[real])):
        pairs = Counter(zip(some["student"].tolist(), some["teacher"].tolist(), strict=True))
        ordered = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
        found[name] = [[*pair, times] for pair, times in ordered]
    return found


def summarise(
    folder: Path, args: AnalysisConfig, decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """The content of probe.json, from the records in the folder; also decides ``real`` in them.

    ``full_windows`` has the same statistics of the positions whose window is K tokens long: neither
    cut by the length limit nor ended.

    Raises TOPDError: there is no low-loss position, so that no threshold can be found.
    """
    sample = read_sample(folder / POSITIONS, seed=args.seed)
    found = _measured(sample.columns, args)
    threshold = found["threshold"].value
    if threshold is None:
        raise TOPDError(_no_threshold(sample.columns, args))
    mark_real(folder / POSITIONS, threshold)
    full = sample.columns[sample.columns["length"] == args.window_length]
    narrower = _measured(full, args)
    return {
        "rollouts": sum(1 for _ in read_lines(folder / ROLLOUTS)),
        "prompts": len(np.unique(sample.columns["prompt"])),
        "positions": sample.positions,
        "positions_in_statistics": len(sample.columns),
        "interval": method_of(args.bootstrap),
        "window_length": args.window_length,
        "token_loss": args.candidate_loss,
        "verdict": verdict(found["false_alarm_share"], found["spearman/token_loss/random"]),
        "rule": RULE,
        **_statistics(found),
        "full_windows": {"positions": len(full), **_statistics(narrower)},
        "distributions": distributions(sample.columns, 2.0 + args.position_weight),
        "pairs": _pair_texts(frequent_pairs(sample.columns, threshold), decode),
        "cost": cost_of(folder),
    }


def _no_threshold(columns: Array, args: AnalysisConfig) -> str:
    """Why there is no low-loss position, and what to do."""
    if len(_by_group(columns)["high"]) or getattr(args, "group_size", None):
        return (
            "probe: no low-loss position in any rollout: they are too short. Raise "
            "max_completion_length or low_share."
        )
    agree = f"the two models agree (log-probs less than {ALIKE:g} nats a token apart)"
    least = args.candidate_threshold
    why, remedy = agree, "Are they the same model with the same prompt?"
    if least is not None:
        loss = loss_name(args.candidate_loss)
        why = f"no {loss} reaches candidate_threshold: {least:g}, or {agree}"
        remedy = "Lower candidate_threshold."
    return (
        f"probe: no candidate in any rollout, so no low-loss position goes with one: {why}. "
        f"{remedy} For random and low-loss positions alone set group_size."
    )


def _measured(columns: Array, args: AnalysisConfig) -> dict[str, Estimate]:
    return intervals(
        columns,
        measure,
        repeats=args.bootstrap,
        seed=args.seed,
        behind=prompts_behind(columns),
        shares=_shares(_by_group(columns)),
    )


def _statistics(found: dict[str, Estimate]) -> dict[str, Any]:
    outcomes = {part: _nested(found, part) for part in ("right", "verified")}
    return {
        "threshold": asdict(found["threshold"]),
        "false_alarm_share": asdict(found["false_alarm_share"]),
        "median_distance": _nested(found, "median"),
        "rejoined_share": _nested(found, "rejoined"),
        "correlations": {
            kind: {loss: _nested(found, f"{kind}/{loss}") for loss in LOSSES}
            for kind in ("pearson", "spearman")
        },
        **({"outcomes": outcomes} if "verified/all" in found else {}),
    }


def mark_real(path: Path, threshold: float) -> None:
    """Set ``real`` at every position, by :func:`is_real`."""
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for record in read_lines(path):
            real = bool(is_real(record["distance"], threshold))
            file.write(json.dumps({**record, "real": real}) + "\n")
    partial.replace(path)


def _row(record: dict[str, Any]) -> tuple[Any, ...]:
    meets = record["rejoin"]
    return (
        record["prompt"],
        GROUPS.index(record["group"]),
        record["student_tokens"][0],
        record["teacher_tokens"][0],
        len(record["student_tokens"]),
        *(record[name] for name in LOSSES),
        record["distance"],
        math.inf if meets is None else meets,
        *((record.get("outcome") or {}).get(name, math.nan) for name in OUTCOMES),
    )


def _quantile(values: Array, q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else math.nan


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else math.nan


def _nested(found: dict[str, Estimate], prefix: str) -> dict[str, Any]:
    """The statistics under ``prefix/`` by the rest of their name."""
    head = prefix + "/"
    return {k.removeprefix(head): asdict(v) for k, v in found.items() if k.startswith(head)}


def _pair_texts(
    pairs: dict[str, Any], decode: Callable[[list[int]], str]
) -> dict[str, list[dict[str, Any]]]:
    def told(student: int, teacher: int, count: int) -> dict[str, Any]:
        texts = {"student_text": decode([student]), "teacher_text": decode([teacher])}
        return {"student": student, "teacher": teacher, **texts, "count": count}

    return {name: [told(*pair) for pair in some] for name, some in pairs.items()}


def cost_of(folder: Path) -> dict[str, Any]:
    """Tokens, and seconds by phase, over all that was done and all the times it was started."""
    total: Counter[str] = Counter()
    for record in read_lines(folder / METRICS):
        total.update({name: value for name, value in record.items() if name != "step"})
    seconds = {k.removeprefix("seconds/"): v for k, v in total.items() if "/" in k}
    tokens = {k: v for k, v in total.items() if "/" not in k}
    return {"tokens": tokens, "seconds": {**seconds, "all": sum(seconds.values())}}
