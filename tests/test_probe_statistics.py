"""The statistics of a probe, by hand and against references."""

from __future__ import annotations

import itertools
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from topd.commands.probe import ProbeConfig
from topd.commands.probe.intervals import Estimate, intervals
from topd.commands.probe.statistics import (
    COLUMNS,
    GROUPS,
    LEAST_CORRELATION,
    MOST_FALSE_ALARMS,
    REJOIN_RUN,
    distributions,
    frequent_pairs,
    mark_real,
    measure,
    pearson,
    prompts_behind,
    read_sample,
    rejoin,
    summarise,
    verdict,
)


def table(**groups: list[float]) -> np.ndarray:
    """Positions with the given distances by group; every one has a prompt of its own."""
    found = np.zeros(sum(map(len, groups.values())), COLUMNS)
    found["prompt"] = np.arange(len(found))
    names = [name for name, values in groups.items() for _ in values]
    found["group"] = [GROUPS.index(name) for name in names]
    found["distance"] = list(itertools.chain(*groups.values()))
    return found


def record(**changes: Any) -> dict[str, Any]:
    return {
        "rollout": 0,
        "prompt": 0,
        "position": 3,
        "group": "high",
        "token_loss": 1.0,
        "reverse_kl": 0.5,
        "entropy": 0.25,
        "distance": 0.125,
        "real": None,
        "rejoin": 2,
        "student_tokens": [5, 6],
        "teacher_tokens": [7, 6],
        "plan": [[0, 0, 0.5], [1, 1, 0.5]],
        **changes,
    }


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


# Reconvergence


@pytest.mark.parametrize(
    ("student", "teacher", "tokens"),
    [
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], 0),  # never parted
        ([9, 2, 3, 4, 5], [8, 2, 3, 4, 5], 1),  # one surface token
        ([9, 9, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7], 2),  # two words more, cut by the window
        ([2, 3, 4, 5, 6], [9, 9, 2, 3, 4], None),  # only three in common up to the end
        ([2, 3, 4, 5, 6], [9, 2, 3, 4, 5], 0),  # the teacher says a word more first
        ([1, 2, 3, 4, 9], [1, 2, 3, 4, 8], None),  # parts at the end: not together again
        ([9, 3], [8, 3], None),  # one token of two is no run
        ([7, 3], [7, 3], 0),  # short, and the same
        ([7], [8], None),
        ([7], [7], 0),
        ([], [7], None),
        ([7], [], None),
    ],
)
def test_rejoin_by_hand(student, teacher, tokens):
    assert rejoin(student, teacher) == tokens


def test_rejoin_is_its_definition_on_random_windows():
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(400):
        n, m = generator.integers(1, 9, size=2)
        student, teacher = generator.integers(2, size=n).tolist(), generator.integers(2, size=m)
        teacher = teacher.tolist()
        meets = [
            i
            for i in range(n)
            for j in range(m)
            if min(n - i, m - j) >= min(REJOIN_RUN, n, m)
            and all(a == b for a, b in zip(student[i:], teacher[j:], strict=False))
        ]
        assert rejoin(student, teacher) == min(meets, default=None)
        seen.add(min(meets, default=None))
    assert len(seen) >= 5


# The paper's figures


def test_threshold_and_false_alarms_by_hand():
    """The upper quartile of 0.1 .. 0.5 is 0.4; 0.1 and 0.39 of four lie below it, 0.4 does not."""
    found = measure(table(high=[0.1, 0.39, 0.4, 0.7], low=[0.5, 0.1, 0.3, 0.2, 0.4], random=[9.0]))
    assert found["threshold"] == pytest.approx(0.4)
    assert found["false_alarm_share"] == 0.5
    assert found["median/high"] == pytest.approx(0.395)
    assert found["median/low"] == pytest.approx(0.3)
    assert found["median/random"] == 9.0


def test_correlations_by_hand_and_against_scipy():
    generator = np.random.default_rng(1)
    columns = table(high=[1.0, 2.0, 4.0], random=generator.integers(5, size=40).tolist())
    columns["token_loss"][:3] = [1, 2, 3]
    columns["token_loss"][3:] = generator.integers(5, size=40)  # with ties
    columns["entropy"] = -(columns["token_loss"] ** 3)
    found = measure(columns)
    # deviations (-1, 0, 1) and (-4/3, -1/3, 5/3): 3 / sqrt(2 x 42/9)
    assert found["pearson/token_loss/high"] == pytest.approx(3 / math.sqrt(2 * 42 / 9))
    assert found["spearman/token_loss/high"] == pytest.approx(1.0)
    assert found["spearman/entropy/high"] == pytest.approx(-1.0)
    some = columns[3:]
    assert found["spearman/token_loss/random"] == pytest.approx(
        scipy.stats.spearmanr(some["token_loss"], some["distance"]).statistic
    )
    assert found["pearson/token_loss/all"] == pytest.approx(
        scipy.stats.pearsonr(columns["token_loss"], columns["distance"]).statistic
    )


@pytest.mark.parametrize(
    ("x", "y"), [([], []), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0])]
)
def test_a_correlation_that_does_not_exist_is_nan(x, y):
    assert math.isnan(pearson(np.array(x), np.array(y)))


def test_what_is_missing_is_nan_and_not_zero():
    found = measure(table(high=[0.5]))
    assert math.isnan(found["threshold"])
    assert math.isnan(found["false_alarm_share"])
    assert math.isnan(found["median/low"])
    assert math.isnan(found["rejoined/random"])


def test_windows_that_meet_again_are_counted_by_group():
    columns = table(high=[1.0, 1, 1, 1], low=[1.0, 1])
    columns["rejoin"] = [0, 3, math.inf, math.inf, math.inf, 1]
    found = measure(columns)
    assert found["rejoined/high"] == 0.5
    assert found["rejoined/low"] == 0.5


def test_distributions_by_hand():
    columns = table(high=[0.01, 0.31, 1.99], low=[0.5, 0.7])
    columns["rejoin"] = [0, 7, math.inf, math.inf, 2]
    found = distributions(columns, 2.0)
    assert found["edges"][:2] == [0.0, 0.05]
    assert [i for i, count in enumerate(found["high"]["histogram"]) if count] == [0, 6, 39]
    assert sum(found["low"]["histogram"]) == found["low"]["count"] == 2
    assert found["low"]["mean"] == pytest.approx(0.6)
    assert found["low"]["quantiles"]["75"] == pytest.approx(0.65)
    assert found["high"]["median_rejoin"] == 7
    assert found["low"]["median_rejoin"] is None  # half of them never
    assert found["random"] == {
        "count": 0,
        "mean": None,
        "quantiles": dict.fromkeys(("5", "25", "50", "75", "95")),
        "histogram": [0] * 40,
        "median_rejoin": None,
    }


def test_token_pairs_are_those_of_high_loss_positions_by_verdict():
    columns = table(high=[0.1, 0.2, 0.4, 0.9, 0.9, 0.9], low=[0.1] * 5)
    columns["student"] = [1, 1, 5, 2, 2, 3, *[8] * 5]
    columns["teacher"] = [4, 4, 6, 7, 7, 7, *[8] * 5]
    assert frequent_pairs(columns, 0.4) == {
        "false_alarms": [[1, 4, 2]],
        "forks": [[2, 7, 2], [3, 7, 1], [5, 6, 1]],
    }
    assert frequent_pairs(columns, 0.4, most=1)["forks"] == [[2, 7, 2]]


# Intervals


def mean(columns: np.ndarray) -> dict[str, float]:
    return {"mean": float(columns["distance"].mean())}


@pytest.mark.parametrize(("count", "least"), [(5, None), (6, 0.88), (12, 0.91)])
def test_an_interval_covers_what_it_says_or_there_is_none(count, least):
    """Percentiles alone cover the mean of 2, 5, 6, 12 normal values in 50, 84, 86, 91 %."""
    generator, times = np.random.default_rng(8), 400 if least else 1
    hits = 0
    for _ in range(times):
        values = generator.normal(size=count).tolist()
        found = intervals(table(high=values), mean, repeats=300, seed=0)["mean"]
        if least is None:
            assert found == Estimate(pytest.approx(np.mean(values)), None, None)
        else:
            hits += found.low <= 0 <= found.high
    assert hits >= times * (least or 0)


def test_the_interval_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(3).normal(size=400)
    found = intervals(table(high=values.tolist()), mean, repeats=2000, seed=0)["mean"]
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)


def test_more_positions_of_the_same_rollouts_do_not_narrow_an_interval():
    """Ten copies of every position: nothing new is known, though there are ten times as many."""
    columns = table(high=np.random.default_rng(4).normal(size=30).tolist())
    once = intervals(columns, mean, repeats=200, seed=1)["mean"]
    tenfold = intervals(np.tile(columns, 10), mean, repeats=200, seed=1)["mean"]
    assert tenfold.low == pytest.approx(once.low)
    assert tenfold.high == pytest.approx(once.high)
    assert once.high - once.low > 0.3


def test_a_prompt_is_drawn_with_all_its_positions():
    columns = table(high=[1.0, 2.0, 3.0, 4.0, 5.0])
    columns["prompt"] = [7, 3, 7, 3, 5]
    wholes = {7: {1.0, 3.0}, 3: {2.0, 4.0}, 5: {5.0}}

    def count(some: np.ndarray) -> dict[str, float]:
        for members in wholes.values():
            times = {value: int((some["distance"] == value).sum()) for value in members}
            assert len(set(times.values())) == 1
        drawn.add(sum((some["distance"] == min(m)).sum() for m in wholes.values()))
        return {"prompts": 3.0}

    drawn: set[int] = set()
    assert intervals(columns, count, repeats=100, seed=0)["prompts"] == Estimate(3.0, None, None)
    assert drawn == {3}


def test_equal_values_are_not_certainty():
    """No false alarm at 28 prompts: up to 1 - 0.025^(1/28) may be; a median has no interval."""
    columns = table(high=[0.5] * 28, low=[0.1, 0.2])
    known = {"behind": prompts_behind(columns), "shares": ("false_alarm_share",)}
    found = intervals(columns, measure, repeats=60, seed=0, **known)
    share, bound = found["false_alarm_share"], 1 - 0.025 ** (1 / 28)
    assert (share.value, share.low) == (0.0, 0.0)
    assert share.high == pytest.approx(bound)
    assert found["median/high"] == Estimate(0.5, None, None)
    assert verdict(share, found["spearman/token_loss/random"]) == "undecided"


def test_a_figure_knows_no_more_than_the_prompts_with_a_position_in_it():
    """Two candidates, one a prompt, among 40 prompts: two values, not 40."""
    columns = table(high=[0.5, 0.6], low=[0.1] * 19 + [0.2] * 19)
    columns["before"], columns["rejoin"] = math.nan, math.inf
    columns["before"][:2] = 1.0  # the teacher takes over: right before the token, wrong after it
    behind = prompts_behind(columns)
    assert behind["false_alarm_share"] == behind["verified/all"] == behind["rejoined/high"] == 2
    assert (behind["rejoined/low"], behind["rejoined/random"]) == (38, 0)
    assert (behind["threshold"], behind["median/high"]) == (38, 2)
    assert behind["spearman/entropy/all"] == 40
    shares = ("false_alarm_share", "verified/all", "rejoined/low")
    found = intervals(columns, measure, repeats=200, seed=0, behind=behind, shares=shares)
    assert found["median/high"] == Estimate(pytest.approx(0.55), None, None)
    assert found["median/low"].low is not None
    bound = 0.025**0.5
    assert found["false_alarm_share"] == Estimate(0.0, 0.0, pytest.approx(1 - bound))
    assert found["verified/all"] == Estimate(1.0, pytest.approx(bound), 1.0)
    assert found["rejoined/low"].high == pytest.approx(1 - 0.025 ** (1 / 38))


def test_so_it_is_of_full_windows(tmp_path):
    """Ten prompts with a high-loss position, none of them a false alarm."""
    records = [
        record(prompt=i, distance=0.5 - 0.4 * (i % 2), group="low" if i % 2 else "high")
        for i in range(20)
    ]
    write(tmp_path / "positions.jsonl", records)
    for name in ("rollouts.jsonl", "metrics.jsonl"):
        write(tmp_path / name, [])
    args = ProbeConfig(output_dir=str(tmp_path), use_cpu=True, window_length=2, bootstrap=40)
    found = summarise(tmp_path, args, str)
    for part in (found, found["full_windows"]):
        assert part["false_alarm_share"]["value"] == 0
        assert part["false_alarm_share"]["high"] == pytest.approx(1 - 0.025**0.1)


def test_an_interval_needs_six_prompts_and_half_of_the_resamples():
    assert intervals(table(high=[1.0]), mean, repeats=10, seed=0)["mean"] == Estimate(1, None, None)

    def rare(columns: np.ndarray) -> dict[str, float]:
        whole = len(set(columns["prompt"].tolist())) == 8  # seldom in a resample of eight
        return {"rare": 1.0 if whole else math.nan, "never": math.nan}

    found = intervals(table(high=[1.0] * 8), rare, repeats=50, seed=0)
    assert found["rare"] == Estimate(1.0, None, None)
    assert found["never"] == Estimate(None, None, None)


def test_the_seed_decides_the_interval():
    columns = table(high=np.random.default_rng(5).normal(size=20).tolist())
    first, again, other = (intervals(columns, mean, repeats=50, seed=s) for s in (0, 0, 1))
    assert first == again != other


# The verdict


@pytest.mark.parametrize(
    ("share", "rho", "expected"),
    [
        ((0.1, MOST_FALSE_ALARMS), (LEAST_CORRELATION, 0.6), "good"),
        ((0.1, 0.26), (0.4, 0.6), "undecided"),
        ((0.1, 0.2), (0.2, 0.6), "undecided"),
        ((0.26, 0.33), (0.4, 0.6), "poor"),
        ((0.1, 0.2), (0.05, 0.2), "poor"),
        ((None, None), (0.4, 0.6), "undecided"),
        ((0.1, 0.2), (None, None), "undecided"),
    ],
)
def test_the_verdict_by_its_rule(share, rho, expected):
    assert verdict(Estimate(0.2, *share), Estimate(0.5, *rho)) == expected


def test_the_papers_own_pair_would_be_a_poor_guide():
    """218 high-loss tokens, 29.23 % false alarms, rho 0.143: normal intervals."""
    half = 1.96 * math.sqrt(0.2923 * 0.7077 / 218)
    share = Estimate(0.2923, 0.2923 - half, 0.2923 + half)
    assert verdict(share, Estimate(0.143, 0.123, 0.163)) == "poor"


# Reading


def test_all_positions_are_read_with_their_numbers(tmp_path):
    records = [record(prompt=3), record(group="low", rejoin=None, student_tokens=[9, 1])]
    sample = read_sample(write(tmp_path / "p.jsonl", records), seed=0)
    assert sample.positions == 2
    assert sample.columns.dtype == COLUMNS
    first, second = sample.columns.tolist()
    assert first[:10] == (3, 0, 5, 7, 2, 1.0, 0.5, 0.25, 0.125, 2.0)
    assert second[:10] == (0, 2, 9, 7, 2, 1.0, 0.5, 0.25, 0.125, math.inf)
    assert all(math.isnan(x) for x in (*first[10:], *second[10:]))  # nobody took over


def test_of_too_many_positions_a_random_sample_of_whole_prompts_is_kept(tmp_path):
    records = [record(prompt=i // 4, distance=i % 4) for i in range(4000)]
    path = write(tmp_path / "p.jsonl", records)
    sample = read_sample(path, seed=0, most=1000)
    prompts, counts = np.unique(sample.columns["prompt"], return_counts=True)
    assert set(counts.tolist()) == {4}
    assert 200 < len(prompts) < 300
    assert 400 < prompts.mean() < 600  # from everywhere, not from the start
    assert sample.positions == 4000
    again, other = (read_sample(path, seed=seed, most=1000).columns for seed in (0, 1))
    assert again.tobytes() == sample.columns.tobytes()
    assert set(np.unique(other["prompt"])) != set(prompts)


def peak(path: Path, most: int) -> int:
    tracemalloc.start()
    columns = read_sample(path, seed=0, most=most).columns
    intervals(columns, measure, repeats=3, seed=0)
    mark_real(path, 0.5)
    _, found = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return found


def test_eight_times_the_positions_need_no_more_memory(tmp_path):
    window = list(range(24))
    plan = [[i, i, 0.04] for i in window]
    sizes = []
    for count in (500, 4000):
        records = (
            record(prompt=i // 6, group=GROUPS[i % 3], student_tokens=window, plan=plan)
            for i in range(count)
        )
        path = write(tmp_path / f"{count}.jsonl", records)
        sizes.append(peak(path, most=300))
    assert sizes[1] < 1.5 * sizes[0]
    assert sizes[1] < path.stat().st_size / 8


# The verdict on a position


@pytest.mark.parametrize(
    ("threshold", "real"), [(0.25, [False, False, True, True]), (0.0, [False, True, True, True])]
)
def test_a_distance_that_reaches_the_threshold_is_real(tmp_path, threshold, real):
    """And that of equal windows never is."""
    distances = [0.0, 0.1, 0.25, 0.3]
    records = [record(distance=d, position=i) for i, d in enumerate(distances)]
    path = write(tmp_path / "p.jsonl", records)
    mark_real(path, threshold)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [one["real"] for one in found] == real
    columns = table(high=distances, low=[threshold] * 4)
    assert measure(columns)["false_alarm_share"] == real.count(False) / 4
    pairs = frequent_pairs(columns, threshold)
    assert [sum(n for *_, n in pairs[k]) for k in ("forks", "false_alarms")] == [
        real.count(True), real.count(False),
    ]  # fmt: skip
    assert [{**one, "real": None} for one in found] == records
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl"]
