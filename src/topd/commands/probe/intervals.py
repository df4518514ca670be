"""95 % intervals of the statistics of an analysis, by a bootstrap over prompts.

Intervals are percentiles of a bootstrap that draws prompts with replacement, each with all its
positions: those of one rollout are not independent. Every statistic is recomputed on each
resample, quantiles and ranks too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from topd.statistics import bootstrap

Array: TypeAlias = np.ndarray


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
) -> dict[str, Estimate]:
    """Every statistic of ``measure`` with a bootstrap interval over prompts.

    Args:
        columns: structured array with a ``prompt`` column.
        measure: statistics by name; NaN where one is not defined.
        repeats: resamples.
        seed: of the resampling.
        behind: of the statistics that are shares, in [0, 1], the number of prompts behind each.

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
            exact = bootstrap([value] * behind[name]) if name in behind else None
            low, high = (exact.low, exact.high) if exact else (None, None)
        found[name] = Estimate(number(value), low, high)
    return found


def number(value: float) -> float | None:
    """A statistic as it is written down: None where it is not defined."""
    return float(value) if math.isfinite(value) else None


def _percentiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    defined = [value for value in values if math.isfinite(value)]
    if len(defined) * 2 < len(values) or not defined:
        return None, None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)
