"""What the positions of a probe say: statistics with 95 % intervals, from positions.jsonl alone.

Intervals are percentiles of a bootstrap that draws prompts with replacement, each with all its
positions: those of one rollout are not independent. Every statistic is recomputed on each
resample, quantiles and ranks too.

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
from typing import Any, TypeAlias

import numpy as np
from scipy.stats import rankdata

from topd.commands.outcomes import HALF
from topd.commands.session import ROLLOUTS, AnalysisConfig
from topd.errors import TOPDError
from topd.runs.files import read_lines
from topd.statistics import bootstrap

POSITIONS = "positions.jsonl"
METRICS = "metrics.jsonl"
GROUPS = ("high", "random", "low")
SHARES = ("false_alarm_share", "rejoined/", "verified/", "right/")  # names of figures in [0, 1]
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

Array: TypeAlias = np.ndarray
COLUMNS = np.dtype(
    [(name, "i8") for name in ("prompt", "group", "student", "teacher", "length")]
    + [(name, "f8") for name in (*LOSSES, "distance", "rejoin", *OUTCOMES)]
)


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Sample:
    """The positions that statistics are made of, and how many there were in all."""

    columns: Array
    positions: int


def rejoin(student: Sequence[int], teacher: Sequence[int]) -> int | None:
    """How many tokens the student writes before both windows run on together.

    The smallest i for which there is a j such that student[i:] and teacher[j:] agree up to the end
    of the shorter, over at least ``REJOIN_RUN`` tokens (or the whole shorter window, if that is
    less). The windows may meet at different places: i and j need not be equal.

    Args:
        student, teacher: token ids.

    Returns:
        0 for windows that never part, None for windows that do not meet again.

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
    """The numeric columns of positions.jsonl: all, or those of a random sample of the prompts.

    Args:
        path: the file.
        seed: of the sample.
        most: about how many positions to keep at most.
    """
    with open(path, "rb") as file:
        positions = sum(1 for _ in file)
    share = most / max(positions, 1)

    def rows() -> Iterator[tuple[Any, ...]]:
        for record in read_lines(path):
            prompt = record["prompt"]
            if share >= 1 or zlib.crc32(f"{seed} {prompt}".encode()) < share * 2**32:
                yield _row(record)

    return Sample(np.fromiter(rows(), COLUMNS), positions)


def intervals(
    columns: Array, measure: Callable[[Array], dict[str, float]], *, repeats: int, seed: int
) -> dict[str, Interval]:
    """Every statistic of ``measure`` with a bootstrap interval over prompts.

    Args:
        columns: structured array with a ``prompt`` column.
        measure: statistics by name; NaN where one is not defined.
        repeats: resamples.
        seed: of the resampling.

    Returns:
        The statistics of ``columns`` and the 2.5 and 97.5 percentiles over the resamples in which
        they are defined; no interval where that is less than half of them, or with one prompt.
        Equal values are not certainty: a share that no resample changes has the exact interval of
        so many prompts (:func:`topd.statistics.bootstrap`), and other figures have none.
    """
    columns = columns[columns["prompt"].argsort(kind="stable")]
    _, start, size = np.unique(columns["prompt"], return_index=True, return_counts=True)
    generator = np.random.default_rng(seed)
    values, drawn = measure(columns), []
    for _ in range(repeats if len(start) > 1 else 0):
        unit = generator.integers(len(start), size=len(start))
        offset = start[unit] - (size[unit].cumsum() - size[unit])
        drawn.append(measure(columns[offset.repeat(size[unit]) + np.arange(size[unit].sum())]))
    found = {}
    for name, value in values.items():
        low, high = _percentiles([one.get(name, math.nan) for one in drawn])
        if low is not None and low == high:
            exact = bootstrap([value] * len(start)) if name.startswith(SHARES) else None
            low, high = (exact.low, exact.high) if exact else (None, None)
        found[name] = Interval(_number(value), low, high)
    return found


def measure(columns: Array) -> dict[str, float]:
    """Medians, threshold, false alarms, correlations and reconvergence of some positions.

    ``threshold`` is the upper quartile of the OT distances of low-loss positions,
    ``false_alarm_share`` the share of high-loss positions below it (arXiv 2606.00305).
    """
    groups = {name: columns[columns["group"] == i] for i, name in enumerate(GROUPS)}
    threshold = _quantile(groups["low"]["distance"], 0.75)
    found = {
        "threshold": threshold,
        "false_alarm_share": _mean(groups["high"]["distance"] < threshold),
    }
    for name, some in groups.items():
        found[f"median/{name}"] = _quantile(some["distance"], 0.5)
        found[f"rejoined/{name}"] = _mean(np.isfinite(some["rejoin"]))
    for name, some in {**groups, "all": columns}.items():
        for loss in LOSSES if name != "low" else ():
            found[f"pearson/{loss}/{name}"] = pearson(some[loss], some["distance"])
            ranks = (rankdata(some[loss]), rankdata(some["distance"]))
            found[f"spearman/{loss}/{name}"] = pearson(*ranks)
    return found | _outcomes(groups["high"], threshold)


def _outcomes(high: Array, threshold: float) -> dict[str, float]:
    """What came of the candidates that were verified; empty where none was."""
    high = high[np.isfinite(high["before"])]
    if not len(high):
        return {}
    drop, far = high["before"] - high["after"], high["distance"] >= threshold
    forks = drop >= HALF
    return {
        **{f"right/{name}": _mean(high[name]) for name in OUTCOMES},
        "verified/all": _mean(forks),
        "verified/real": _mean(forks[far]),
        "verified/false_alarms": _mean(forks[~far]),
    }


def pearson(x: Array, y: Array) -> float:
    """Pearson's r [-1, 1]; NaN if there are fewer than two values or one side is constant."""
    if len(x) < 2 or not (np.ptp(x) > 0 and np.ptp(y) > 0):
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def verdict(false_alarms: Interval, correlation: Interval) -> str:
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
    for i, name in enumerate(GROUPS):
        some = columns[columns["group"] == i]
        levels = {
            str(q): _number(_quantile(some["distance"], q / 100)) for q in (5, 25, 50, 75, 95)
        }
        tokens = np.sort(some["rejoin"])
        found[name] = {
            "count": len(some),
            "mean": _number(_mean(some["distance"])),
            "quantiles": levels,
            "histogram": np.histogram(some["distance"], edges)[0].tolist(),
            "median_rejoin": _number(tokens[len(tokens) // 2]) if len(tokens) else None,
        }
    return found


def frequent_pairs(columns: Array, threshold: float, *, most: int = 10) -> dict[str, Any]:
    """The commonest (student token, teacher token, count) at false alarms and at forks."""
    high = columns[columns["group"] == GROUPS.index("high")]
    alarm = high["distance"] < threshold
    found = {}
    for name, some in (("false_alarms", high[alarm]), ("forks", high[~alarm])):
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

    Args:
        folder: a run folder with all its records.
        args: of the probe.
        decode: text of tokens.

    Raises:
        TOPDError: there is no low-loss position, so that no threshold can be found.
    """
    sample = read_sample(folder / POSITIONS, seed=args.seed)
    found = intervals(sample.columns, measure, repeats=args.bootstrap, seed=args.seed)
    threshold = found["threshold"].value
    if threshold is None:
        raise TOPDError(
            "probe: no low-loss position in any rollout: they are too short. Raise "
            "max_completion_length or low_share."
        )
    mark_real(folder / POSITIONS, threshold)
    full = sample.columns[sample.columns["length"] == args.window_length]
    narrower = intervals(full, measure, repeats=args.bootstrap, seed=args.seed)
    return {
        "rollouts": sum(1 for _ in read_lines(folder / ROLLOUTS)),
        "prompts": len(np.unique(sample.columns["prompt"])),
        "positions": sample.positions,
        "positions_in_statistics": len(sample.columns),
        "interval": f"95 % percentile bootstrap over prompts, {args.bootstrap} resamples",
        "window_length": args.window_length,
        "token_loss": args.candidate_loss,
        "verdict": verdict(found["false_alarm_share"], found["spearman/token_loss/random"]),
        "rule": RULE,
        **_statistics(found),
        "full_windows": {"positions": len(full), **_statistics(narrower)},
        "distributions": distributions(sample.columns, 2.0 + args.position_weight),
        "pairs": _pair_texts(frequent_pairs(sample.columns, threshold), decode),
        "cost": _cost(folder),
    }


def _statistics(found: dict[str, Interval]) -> dict[str, Any]:
    return {
        "threshold": asdict(found["threshold"]),
        "false_alarm_share": asdict(found["false_alarm_share"]),
        "median_distance": _nested(found, "median"),
        "rejoined_share": _nested(found, "rejoined"),
        "correlations": {
            kind: {loss: _nested(found, f"{kind}/{loss}") for loss in LOSSES}
            for kind in ("pearson", "spearman")
        },
        **(
            {"outcomes": {part: _nested(found, part) for part in ("right", "verified")}}
            if "verified/all" in found
            else {}
        ),
    }


def mark_real(path: Path, threshold: float) -> None:
    """Set ``real`` at every position: whether its distance reaches the threshold."""
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        for record in read_lines(path):
            file.write(json.dumps({**record, "real": record["distance"] >= threshold}) + "\n")
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


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _percentiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    defined = [value for value in values if math.isfinite(value)]
    if len(defined) * 2 < len(values) or not defined:
        return None, None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def _nested(found: dict[str, Interval], prefix: str) -> dict[str, Any]:
    """The statistics under ``prefix/`` by the rest of their name."""
    head = prefix + "/"
    return {k.removeprefix(head): asdict(v) for k, v in found.items() if k.startswith(head)}


def _pair_texts(
    pairs: dict[str, Any], decode: Callable[[list[int]], str]
) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [
            {
                "student": student,
                "teacher": teacher,
                "student_text": decode([student]),
                "teacher_text": decode([teacher]),
                "count": count,
            }
            for student, teacher, count in some
        ]
        for name, some in pairs.items()
    }


def _cost(folder: Path) -> dict[str, Any]:
    """Tokens, and seconds by phase, over all batches and all the times that it was started."""
    total: Counter[str] = Counter()
    for record in read_lines(folder / METRICS):
        total.update({name: value for name, value in record.items() if name != "step"})
    seconds = {k.removeprefix("seconds/"): v for k, v in total.items() if "/" in k}
    tokens = {k: v for k, v in total.items() if "/" not in k}
    return {"tokens": tokens, "seconds": {**seconds, "all": sum(seconds.values())}}
