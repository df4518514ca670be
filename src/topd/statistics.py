"""Means over problems with their intervals, and pass@k. Pure functions of numbers.

A problem is the unit everywhere: its samples are averaged first, so that an interval speaks of
other problems of the same kind. All intervals of one score a problem are one bootstrap: problems
get random weights (Rubin 1981), and so does one problem more that was not seen, which counts as
the worst value possible at the upper end and as the least at the lower. So equal values are not
certainty, and few problems are not many: for right and wrong answers the ends are those of Clopper
and Pearson (1934), for other bounded values they are Gaffke's, with coverage at any number of
problems in all cases known (Learned-Miller and Thomas 2020, arXiv 1905.06208). Source of pass@k:
Chen et al. 2021, arXiv 2107.03374.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from topd.errors import TOPDError

RESAMPLES = 10_000
AT_ONCE = 1 << 22  # weights drawn at a time: 32 MiB
SHARES = (0.0, 1.0)  # bounds of accuracies and other shares

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Interval:
    """A mean over ``problems`` problems, and its interval at ``level``."""

    mean: float
    low: float
    high: float
    problems: int
    level: float = 0.95


def bootstrap(
    values: Sequence[float],
    *,
    bounds: Bounds = SHARES,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Interval:
    """The mean of one value a problem, with its interval. Honest for few values and for equal ones.

    With weights w from a flat Dirichlet distribution over the n values and one more, each end is a
    quantile of w_1 x_1 + ... + w_n x_n + w_(n+1) bound. n equal values give the closed form
    x + (bound - x) (1 - ((1 - level) / 2)^(1 / n)).

    Args:
        values: one number a problem.
        bounds: the least and the largest value that a problem can have.
        seed: of the generator that draws the weights.
        resamples: how often.
        level: mass of the interval, in (0, 1).

    Raises:
        TOPDError: no values, one outside the bounds, bounds that are not finite, a level outside
            (0, 1), or no resamples.

    >>> round(bootstrap([0.0] * 30).high, 4)
    0.1157
    """
    if not len(values):
        raise TOPDError("bootstrap: no problems. Give at least one value.")
    _check_level("bootstrap", level)
    if resamples < 1:
        raise TOPDError(f"bootstrap: resamples is {resamples}. Give at least 1.")
    _check_bounds("bootstrap", values, bounds)
    known, (least, most) = np.asarray(values, dtype=np.float64), map(float, bounds)
    count, tail = len(known), (1 - level) / 2
    if np.ptp(known) == 0:
        first, beyond = float(known[0]), 1 - tail ** (1 / count)
        low, high = (first + (bound - first) * beyond for bound in (least, most))
        return Interval(first, low, high, count, level)
    low, high = _ends(known, bounds, np.random.default_rng(seed), resamples, tail)
    mean = float(known.mean())
    return Interval(mean, min(low, mean), max(high, mean), count, level)


def _check_level(where: str, level: float) -> None:
    if not 0 < level < 1:
        raise TOPDError(
            f"{where}: level is {level:g}. Give a share between 0 and 1, e.g. 0.95 for 95 %."
        )


def _check_bounds(where: str, values: Sequence[float], bounds: Bounds) -> None:
    least, most = bounds
    outside = [float(value) for value in values if not least <= value <= most]
    fault = f"the value {outside[0]:g} is outside [{least:g}, {most:g}]" if outside else ""
    if not np.isfinite(bounds).all():
        fault = f"the bounds ({least:g}, {most:g}) must be finite"
    if fault:
        raise TOPDError(
            f"{where}: {fault}. Give the least and the largest value that a problem can have: "
            "bounds=(LEAST, LARGEST)."
        )


def _ends(
    known: np.ndarray, bounds: Bounds, generator: np.random.Generator, resamples: int, tail: float
) -> tuple[float, float]:
    """The quantiles of both ends, over weights of [known] and of one problem more."""
    rows = max(1, AT_ONCE // (len(known) + 1))
    means = []  # of both ends: [resamples, 2]
    for first in range(0, resamples, rows):
        weights = generator.standard_exponential((min(rows, resamples - first), len(known) + 1))
        seen = (weights[:, :-1] @ known)[:, None] + weights[:, -1:] * np.array(bounds)
        means.append(seen / weights.sum(-1, keepdims=True))
    low, high = np.concatenate(means).T
    return float(np.quantile(low, tail)), float(np.quantile(high, 1 - tail))


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    *,
    bounds: Bounds = SHARES,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Interval:
    """How much ``a`` is above ``b`` on the same problems: the mean of a - b and its interval.

    Problems are weighted in pairs, so what makes a problem hard for both cancels. Other training
    seeds are not part of the interval: see :func:`seed_problem_interval`.

    Args:
        a: one value a problem, e.g. its share of correct samples under one method.
        b: the same problems in the same order, under another.
        bounds: the least and the largest value of both; differences then lie within their distance.

    Raises:
        TOPDError: different numbers of problems, none, a value of either outside the bounds, bounds
            that are not finite, or a level outside (0, 1).

    >>> round(paired_bootstrap([1.0] * 40, [1.0] * 40).high, 4)  # nothing seen, not nothing there
    0.0881
    """
    if len(a) != len(b):
        raise TOPDError(
            f"paired_bootstrap: {len(a)} and {len(b)} problems. Compare runs on the same problems."
        )
    for given in (a, b):
        _check_bounds("paired_bootstrap", given, bounds)
    difference = [x - y for x, y in zip(a, b, strict=True)]
    reach = bounds[1] - bounds[0]
    return bootstrap(
        difference, bounds=(-reach, reach), seed=seed, resamples=resamples, level=level
    )


def seed_problem_interval(
    values: Sequence[Sequence[float]] | np.ndarray,
    level: float = 0.95,
    *,
    bounds: Bounds = (-1.0, 1.0),
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """The mean over training seeds and problems, and its interval for other seeds and problems.

    Both distances from the mean are added as squares (Howe 1974; Graybill and Wang 1980): that of
    :func:`bootstrap` over problems, whose values are averaged over seeds, and that of Student's t
    over the seeds' means. Where either part dominates the interval is that part's; elsewhere it is
    somewhat wide, as a seed's mean has the noise of problems in it too. Two seeds have one degree
    of freedom (t = 12.7): where they differ they show nearly nothing. One seed says nothing about
    others: its interval is that over problems.

    Args:
        values: [seeds, problems], e.g. differences of two methods run with the same seed.
        level: mass of the interval, in (0, 1).
        bounds: the least and the largest value possible; (-1, 1) is for differences of shares.
        seed: of the generator that draws the weights.
        resamples: how often.

    Raises:
        TOPDError: no values, not the same problems for each seed, a value outside the bounds,
            bounds that are not finite, or a level outside (0, 1).

    >>> found = seed_problem_interval([[0.5, 0.0, 1.0], [0.5, 0.0, 0.0]], bounds=(0, 1))
    >>> round(found.mean, 4), found.low, found.high, found.problems
    (0.3333, 0.0, 1.0, 3)
    """
    if not len(values) or len({len(row) for row in values}) > 1:
        raise TOPDError(
            "seed_problem_interval: give at least one seed, and the same problems for each."
        )
    known = np.asarray(values, dtype=np.float64)
    _check_bounds("seed_problem_interval", known.ravel().tolist(), bounds)
    by_problem = known.mean(0).clip(*bounds).tolist()
    over = bootstrap(by_problem, bounds=bounds, seed=seed, resamples=resamples, level=level)
    reach = t_reach(known.mean(1).tolist(), level) if len(known) > 1 else 0.0
    return Interval(
        over.mean,
        max(float(bounds[0]), over.mean - float(np.hypot(over.mean - over.low, reach))),
        min(float(bounds[1]), over.mean + float(np.hypot(over.high - over.mean, reach))),
        over.problems,
        level,
    )


def p_value(interval_at: Callable[[float], Interval], *, least: float = 1e-3) -> float:
    """The least error at which an interval leaves out 0, by bisection; at least ``least``.

    Args:
        interval_at: the interval at a level, e.g. ``partial(seed_problem_interval, values)``.
        least: what the resamples can tell; the end of an interval at level 1 - p is their p / 2
            quantile.

    >>> p_value(lambda level: bootstrap([0.0] * 5, bounds=(-1, 1), level=level))
    1.0
    """

    def excludes(error: float) -> bool:
        found = interval_at(1 - error)
        return found.low > 0 or found.high < 0

    low, high = least, 1.0
    if excludes(low):
        return low
    while high / low > 1.01:
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if excludes(middle) else (middle, high)
    return 1.0 if low > 0.98 else high


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the same order: reject those below the error wanted.

    The chance of one false rejection or more is then at most that error, however the tests depend
    on each other. Source: Holm 1979. Raises TOPDError for one outside [0, 1], as NaN is.

    >>> print(*(round(p, 3) for p in holm([0.01, 0.04, 0.03])))
    0.03 0.06 0.06
    """
    if outside := [p for p in p_values if not 0 <= p <= 1]:
        raise TOPDError(
            f"holm: the p-value {outside[0]:g} is outside [0, 1]. Leave out tests without one."
        )
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def t_reach(values: Sequence[float], level: float = 0.95) -> float:
    """How far Student's t-interval of the mean reaches to either side; for two values or more.

    Raises:
        TOPDError: fewer values, or a level outside (0, 1).

    >>> round(t_reach([0.0, 2.0]), 3)
    12.706
    """
    from scipy.stats import sem, t

    _check_level("t_reach", level)
    if len(values) < 2:
        raise TOPDError(f"t_reach: {len(values)} values. Give at least two.")
    return float(t.ppf((1 + level) / 2, len(values) - 1) * sem(values))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of ``k`` samples is right, without bias, from more of them.

    1 - C(samples - correct, k) / C(samples, k), as a product that does not overflow. The plug-in
    1 - (1 - correct / samples)^k is too small. Source: Chen et al. 2021, arXiv 2107.03374.

    Raises:
        TOPDError: k above the number of samples, or numbers out of range.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise TOPDError(
            f"pass_at_k: {correct} correct of {samples} samples at k = {k}. k lies between 1 and "
            "the number of samples, and no more can be correct than were drawn."
        )
    wrong = samples - correct
    if wrong < k:
        return 1.0
    return 1.0 - float(np.prod([(wrong - i) / (samples - i) for i in range(k)]))


def stopped_falling(values: Sequence[float], count: int = 10) -> bool:
    """Whether the mean of ``count`` values in a row was ever no lower than that of those before.

    Source: the rule by which RetireOPD (arXiv 2609.20784) lets its teacher go, "once discrepancy
    stops shrinking"; the count is ours, its other condition (success) is left out.

    >>> stopped_falling([3.0, 2.0, 1.0], 1), stopped_falling([3.0, 2.0, 2.0, 1.0], 1)
    (False, True)
    """
    sums = [sum(values[i : i + count]) for i in range(len(values) - count + 1)]
    return any(later >= before for before, later in zip(sums, sums[count:], strict=False))
