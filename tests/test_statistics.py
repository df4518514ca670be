"""Intervals over seeds and problems, their coverage, and many comparisons at once."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy.stats import binomtest, t

from topd.errors import TOPDError
from topd.statistics import (
    bootstrap,
    holm,
    p_value,
    paired_bootstrap,
    seed_problem_interval,
    t_reach,
)

# Seeds and problems


def test_the_interval_is_that_of_problems_where_seeds_agree():
    values = np.random.default_rng(0).random(200)
    both = seed_problem_interval([values, values, values], bounds=(0, 1))
    alone = bootstrap(list(values))
    assert (both.mean, both.low, both.high) == pytest.approx((alone.mean, alone.low, alone.high))
    assert both.problems == 200


def test_the_interval_of_one_seed_is_that_of_its_problems():
    values = list(np.random.default_rng(0).random(20))
    assert seed_problem_interval([values], bounds=(0, 1)) == bootstrap(values)


def test_the_interval_is_students_where_problems_agree_and_are_many():
    """Seeds' means 0.1, 0.2 and 0.3, each alike on all of 20,000 problems."""
    found = seed_problem_interval(np.array([[0.1], [0.2], [0.3]]) * np.ones((3, 20_000)), 0.9)
    half = t.ppf(0.95, 2) * 0.1 / 3**0.5
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-3)


def test_equal_values_are_not_certainty():
    found = seed_problem_interval(np.zeros((3, 20)))
    assert (1 - found.high) ** 20 == pytest.approx(0.025)
    assert found.low == -found.high


def test_values_that_make_no_table_or_leave_the_bounds_are_refused():
    for values in ([], [[1.0, 0.0], [1.0]]):
        with pytest.raises(TOPDError, match="same problems"):
            seed_problem_interval(values)
    with pytest.raises(TOPDError, match="outside"):
        seed_problem_interval([[2.0], [-2.0]])
    for interval, values in ((bootstrap, [5.0, 6.0]), (seed_problem_interval, [[5.0, 6.0]])):
        said = rf"{interval.__name__}: the bounds \(0, inf\) must be finite\. Give the least and"
        with pytest.raises(TOPDError, match=said):
            interval(values, bounds=(0, float("inf")))


@pytest.mark.parametrize("level", [0, 1, 95, -0.5, float("nan")])
def test_a_level_that_is_no_share_is_refused(level):
    for values in ([1.0, 1.0], [0.5, 1.0]):
        for interval in (
            partial(bootstrap, values),
            partial(paired_bootstrap, values, values),
            partial(seed_problem_interval, [values, values]),
            partial(t_reach, values),
        ):
            with pytest.raises(TOPDError, match=r"level is .* between 0 and 1"):
                interval(level=level)


def test_too_little_to_tell_from_is_refused():
    with pytest.raises(TOPDError, match="resamples is 0"):
        bootstrap([0.0, 1.0], resamples=0)
    with pytest.raises(TOPDError, match="t_reach: 1 value"):
        t_reach([1.0])


def world(generator, seeds: int, problems: int, spread: float) -> np.ndarray:
    """Differences of two methods' right answers; their true mean is 0. [seeds, problems]"""
    difficulty = generator.normal(0, 1.5, problems)
    right = [
        generator.random((seeds, problems))
        < 1 / (1 + np.exp(difficulty + generator.normal(0, spread, (seeds, 1))))
        for _ in range(2)
    ]
    return right[0].astype(float) - right[1]


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
def test_the_interval_covers_the_truth_as_often_as_it_says(seeds, spread):
    """300 worlds; by chance 95 % shows as 92.2 % or less once in 100 times."""
    generator, covered = np.random.default_rng([seeds, int(100 * spread)]), 0
    for _ in range(300):
        found = seed_problem_interval(world(generator, seeds, 100, spread), resamples=400)
        covered += found.low <= 0 <= found.high
    assert covered / 300 >= 0.923


# Many comparisons


def test_a_p_value_is_where_the_interval_begins_to_leave_out_0():
    """Of 400 pairs 222 were better and 178 worse: the exact test of a fair coin."""
    values = [1.0] * 222 + [-1.0] * 178
    at = partial(bootstrap, values, bounds=(-1, 1))
    found = p_value(lambda level: at(level=level))
    assert found == pytest.approx(binomtest(222, 400).pvalue, rel=0.2)
    assert at(level=1 - 1.001 * found).low > 0 >= at(level=1 - 0.9 * found).low
    assert p_value(lambda level: at(level=level), least=0.5) == 0.5


def test_holm_by_hand():
    """Sorted 0.01, 0.02, 0.03, 0.5: times 4, 3, 2, 1, never falling, at most 1."""
    assert holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize("wrong", [float("nan"), -0.1, 1.5])
def test_holm_takes_p_values_only(wrong):
    """NaN made every other test's value 1."""
    with pytest.raises(TOPDError, match=rf"holm: the p-value {wrong:g} is outside \[0, 1\]"):
        holm([wrong, 0.01])


def test_holm_keeps_the_error_of_all_tests_together():
    """10 true nulls: the chance of one rejection or more is 1 - 0.995^10 = 4.9 %."""
    drawn = np.random.default_rng(0).random((4000, 10))
    assert 0.04 < np.mean([min(holm(p.tolist())) < 0.05 for p in drawn]) < 0.058
