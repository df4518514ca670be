"""Means over problems with their bootstrap intervals, and pass@k. Pure functions of numbers.

A problem is the unit everywhere: its samples are averaged first, and problems are drawn again, so
that an interval speaks of other problems of the same kind. Source: Efron 1979 (percentile
bootstrap); Chen et al. 2021, arXiv 2107.03374 (pass@k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from topd.errors import TOPDError

RESAMPLES = 10_000
AT_ONCE = 1 << 22  # indices drawn at a time: 32 MiB


@dataclass(frozen=True)
class Interval:
    """A mean over ``problems`` problems, and its interval at ``level``."""

    mean: float
    low: float
    high: float
    problems: int
    level: float = 0.95


def bootstrap(
    values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95
) -> Interval:
    """The mean of one value a problem, with its percentile bootstrap interval.

    Args:
        values: one number a problem.
        seed: of the generator that draws problems again.
        resamples: how often.
        level: mass of the interval, in (0, 1).

    Raises:
        TOPDError: no values.

    >>> bootstrap([1.0, 1.0, 1.0]).high
    1.0
    """
    if not values:
        raise TOPDError("bootstrap: no problems. Give at least one value.")
    known = np.asarray(values, dtype=np.float64)
    generator, count = np.random.default_rng(seed), len(known)
    rows = max(1, AT_ONCE // count)
    means = [
        known[generator.integers(count, size=(min(rows, resamples - first), count))].mean(-1)
        for first in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(known.mean()), float(low), float(high), count, level)


def share(
    values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95
) -> Interval:
    """:func:`bootstrap` for values in [0, 1], honest where all problems came out alike.

    Of problems that all gave 0, a bootstrap draws nothing else and claims certainty. A true mean of
    p gives n zeros with a probability of at most (1 - p)^n, so there the upper end is the exact
    1 - ((1 - level) / 2)^(1 / n) of Clopper and Pearson (1934); likewise for 1.

    Raises:
        TOPDError: no values, or one outside [0, 1].

    >>> round(share([0.0] * 30).high, 4)
    0.1157
    """
    if any(not 0 <= value <= 1 for value in values):
        raise TOPDError("share: a value is outside [0, 1]. Use bootstrap.")
    found = bootstrap(values, seed=seed, resamples=resamples, level=level)
    beyond = 1 - ((1 - level) / 2) ** (1 / found.problems)
    if max(values) == 0:
        return Interval(0.0, 0.0, beyond, found.problems, level)
    if min(values) == 1:
        return Interval(1.0, 1 - beyond, 1.0, found.problems, level)
    return found


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Interval:
    """How much ``a`` is above ``b`` on the same problems: the mean of a - b and its interval.

    Problems are drawn in pairs, so what makes a problem hard for both cancels. Other training
    seeds are not part of the interval: average them by problem first, and show them beside it.

    Args:
        a: one value a problem, e.g. its share of correct samples under one method.
        b: the same problems in the same order, under another.

    Raises:
        TOPDError: different numbers of problems, or none.
    """
    if len(a) != len(b):
        raise TOPDError(
            f"paired_bootstrap: {len(a)} and {len(b)} problems. Compare runs on the same problems."
        )
    difference = [x - y for x, y in zip(a, b, strict=True)]
    return bootstrap(difference, seed=seed, resamples=resamples, level=level)


def two_way_bootstrap(
    values: Sequence[Sequence[float]],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Interval:
    """The mean over training seeds and problems; both are drawn again, as both could be others.

    Args:
        values: [seeds, problems], e.g. differences of two methods run with the same seed.

    Raises:
        TOPDError: no values.

    >>> two_way_bootstrap([[1.0, 1.0], [1.0, 1.0]]).low
    1.0
    """
    known = np.asarray(values, dtype=np.float64)
    if known.size == 0:
        raise TOPDError("two_way_bootstrap: no values. Give at least one seed and one problem.")
    seeds, problems = known.shape
    generator = np.random.default_rng(seed)
    rows = generator.multinomial(seeds, [1 / seeds] * seeds, size=resamples) @ known
    columns = generator.multinomial(problems, [1 / problems] * problems, size=resamples)
    means = (rows * columns).sum(-1) / known.size
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(known.mean()), float(low), float(high), problems, level)


def t_reach(values: Sequence[float], level: float = 0.95) -> float:
    """How far Student's t-interval of the mean reaches to either side; for two values or more.

    >>> round(t_reach([0.0, 2.0]), 3)
    12.706
    """
    from scipy.stats import sem, t

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
