"""95 % intervals of the statistics of an analysis, by a bootstrap over prompts.

Intervals are percentiles of a bootstrap that draws prompts with replacement, each with all its
positions: those of one rollout are not independent. Every statistic is recomputed on each
resample, quantiles and ranks too. Resampled means of n values vary too little, by (n - 1) / n, and
have no heavy tails, so the percentiles lie further out for few prompts: where those of a normal
reach as far as Student's t with sqrt(n / (n - 1)) (Hesterberg 2015, arXiv 1411.5279). Resamples
never leave the range of their values, and that of five prompts has less than 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from scipy.stats import norm, t

from topd.statistics import bootstrap

Array: TypeAlias = np.ndarray
LEAST_PROMPTS = 6  # the range of six values holds the median in 97 % of cases, of five in 94 %


@dataclass(frozen=True)
class Estimate:
    """An estimate and its 95 % interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


def intervals(
    columns: Array,
    measure: Callable[[Array], dict[str, float]],
    *,
    repeats: int,
    seed: int,
    behind: Mapping[str, int] = MappingProxyType({}),
    shares: Collection[str] = (),
) -> dict[str, Estimate]:
    """Every statistic of ``measure`` with a bootstrap interval over prompts.

    Args:
        columns: structured array with a ``prompt`` column.
        measure: statistics by name; NaN where one is not defined.
        behind: the number of prompts behind each statistic that not all prompts are behind.
        shares: the statistics that are shares, in [0, 1].

    Returns:
        The statistics of ``columns`` and percentiles over the resamples in which they are defined;
        no interval where that is less than half of them, or with fewer than ``LEAST_PROMPTS``.
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
        prompts = behind.get(name, len(start))
        low, high = _percentiles([one.get(name, math.nan) for one in drawn], prompts)
        if low is not None and low == high and name in shares:
            exact = bootstrap([value] * prompts)
            low, high = exact.low, exact.high
        elif low == high or prompts < LEAST_PROMPTS:
            low = high = None
        found[name] = Estimate(number(value), low, high)
    return found


def method_of(repeats: int) -> str:
    """What a summary says of its intervals; before 2026-11-28 they were plain percentiles."""
    return f"95 % expanded percentile bootstrap over prompts, {repeats} resamples"


def number(value: float) -> float | None:
    """A statistic as it is written down: None where it is not defined."""
    return float(value) if math.isfinite(value) else None


def _percentiles(values: Sequence[float], prompts: int) -> tuple[float | None, float | None]:
    defined = [value for value in values if math.isfinite(value)]
    if len(defined) * 2 < len(values) or not defined:
        return None, None
    degrees = max(prompts - 1, 1)
    tail = 100 * norm.cdf(-math.sqrt(prompts / degrees) * t.ppf(0.975, degrees))
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high)
