"""Candidates and verdicts, on numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import losses
from topd.divergence import (
    moved_to_random,
    moved_to_start,
    real_divergent_points,
    select_candidates,
    surprise,
    thin_candidates,
)
from topd.errors import TOPDError

INF = math.inf


def chosen(candidates: Tensor) -> list[tuple[int, int]]:
    return [(row, position) for row, position in candidates.nonzero().tolist()]


# ---- select_candidates ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "fraction", "count"),
    [
        (1, 0.0225, 1),
        (10, 0.0225, 1),  # 0.2 of a token, but at least one
        (66, 0.0225, 1),  # 1.485
        (67, 0.0225, 2),  # 1.5075
        (200, 0.0225, 4),  # 4.5, halves to even
        (9688, 0.0225, 218),  # the paper's count
        (10, 0.24, 2),
        (10, 0.26, 3),
        (10, 0.25, 2),  # 2.5
        (14, 0.25, 4),  # 3.5
        (5, 1.0, 5),
    ],
)
def test_the_nearest_count_of_tokens_is_taken_and_at_least_one(length, fraction, count):
    loss = torch.rand(1, length, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, length, dtype=torch.bool)
    assert select_candidates(loss, mask, fraction=fraction).sum() == count


def test_the_loudest_tokens_of_each_rollout_are_taken():
    loss, mask = losses([0.1, 5.0, 0.2, 4.0], [9.0, 8.0], [0.01, 0.03, 0.02, 0.0])
    found = select_candidates(loss, mask, fraction=0.5)
    assert chosen(found) == [(0, 1), (0, 3), (1, 0), (2, 1), (2, 2)]


def test_masked_tokens_are_never_taken_wherever_they_stand():
    loss = torch.tensor([[9.0, 1.0, 9.0, 2.0, 9.0]])
    mask = torch.tensor([[False, True, False, True, False]])
    assert chosen(select_candidates(loss, mask, fraction=1.0)) == [(0, 1), (0, 3)]
    assert chosen(select_candidates(loss, mask, fraction=0.5)) == [(0, 3)]


def test_a_rollout_without_tokens_has_no_candidate():
    loss, mask = losses([], [1.0, 2.0])
    assert chosen(select_candidates(loss, mask, fraction=0.5)) == [(1, 1)]


def test_of_equal_losses_the_earlier_is_taken():
    loss, mask = losses([3.0, 7.0, 7.0, 7.0, 3.0, 3.0], [0.0] * 6)
    found = select_candidates(loss, mask, fraction=4 / 6)
    assert chosen(found) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize("fraction", [0.3, 0.7, 1.0])
def test_a_loss_of_minus_infinity_is_a_token_like_any_other(fraction):
    """It ranks last among the tokens, and before every masked one."""
    loss = torch.tensor([[5.0, -INF, -INF, 5.0, 1.0]])
    mask = torch.tensor([[False, True, True, False, True]])
    expected = {0.3: [4], 0.7: [1, 4], 1.0: [1, 2, 4]}[fraction]
    found = select_candidates(loss, mask, fraction=fraction)
    assert chosen(found) == [(0, t) for t in expected]


def test_an_infinite_loss_is_the_loudest():
    loss, mask = losses([1.0, INF, 2.0])
    assert chosen(select_candidates(loss, mask, fraction=0.3)) == [(0, 1)]


@settings(max_examples=60)
@given(st.data(), st.floats(0.01, 1.0))
def test_selection_ignores_padding_and_batch_order(data, fraction):
    row = st.lists(st.sampled_from([-INF, -1.0, 0.0, 0.5, 0.5, 2.0, 7.0]), max_size=9)
    rows = data.draw(st.lists(row, min_size=2, max_size=4))
    order = data.draw(st.permutations(range(len(rows))))
    found = select_candidates(*losses(*rows), fraction=fraction)
    moved = select_candidates(*losses(*(rows[k] for k in order)), fraction=fraction)
    assert torch.equal(moved, found[list(order)])
    for k, one in enumerate(rows):
        alone = select_candidates(*losses(one), fraction=fraction)[0]
        assert torch.equal(found[k, : len(one)], alone)
        assert not found[k, len(one) :].any()


@pytest.mark.parametrize(
    ("threshold", "expected"), [(4.0, [1, 3]), (4.5, [1]), (6.0, []), (-INF, [1, 3])]
)
def test_quieter_tokens_than_the_threshold_are_left_out(threshold, expected):
    loss, mask = losses([0.1, 5.0, 0.2, 4.0])
    found = select_candidates(loss, mask, fraction=0.5, threshold=threshold)
    assert chosen(found) == [(0, t) for t in expected]


def test_a_nan_loss_is_an_error_only_under_the_mask():
    loss = torch.tensor([[1.0, math.nan]])
    said = r"^select_candidates: a token loss is NaN\. Check both models' log-probs\.$"
    with pytest.raises(TOPDError, match=said):
        select_candidates(loss, torch.tensor([[True, True]]), fraction=0.5)
    found = select_candidates(loss, torch.tensor([[True, False]]), fraction=0.5)
    assert chosen(found) == [(0, 0)]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, math.nan])
def test_fraction_out_of_range_is_an_error(fraction):
    said = rf"^fraction = {fraction} must be above 0 and at most 1\.$"
    with pytest.raises(TOPDError, match=said):
        select_candidates(torch.zeros(1, 2), torch.ones(1, 2).bool(), fraction=fraction)


# ---- thin_candidates --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gap", "expected"),
    [(1, [0, 1, 3, 4, 7]), (2, [0, 3, 7]), (3, [0, 3, 7]), (4, [0, 4]), (7, [0, 7]), (99, [0])],
)
def test_candidates_keep_their_distance_from_the_last_one_kept(gap, expected):
    candidates = torch.zeros(2, 8, dtype=torch.bool)
    candidates[0, [0, 1, 3, 4, 7]] = True
    candidates[1, 1] = True  # a row of its own
    found = thin_candidates(candidates, gap=gap)
    assert chosen(found) == [(0, t) for t in expected] + [(1, 1)]


def test_thinning_changes_no_input():
    candidates = torch.ones(1, 5, dtype=torch.bool)
    thin_candidates(candidates, gap=3)
    assert candidates.all()


@pytest.mark.parametrize("gap", [0, -1])
def test_gap_out_of_range_is_an_error(gap):
    with pytest.raises(TOPDError, match=rf"^gap = {gap} must be at least 1\.$"):
        thin_candidates(torch.ones(1, 2).bool(), gap=gap)


# ---- surprise ---------------------------------------------------------------------------------

pairs = st.lists(
    st.tuples(st.floats(0, 20), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30
)


@given(pairs)
def test_a_surprise_is_the_teachers_nll_less_its_frequency(tokens):
    nll, likeliest, written = (torch.tensor(column) for column in zip(*tokens, strict=True))
    found = surprise(-nll, likeliest, written)
    for i, (loss, a, y) in enumerate(tokens):
        same = sum((b, z) == (a, y) for _, b, z in tokens) - 1
        asked = sum(b == a for _, b, _ in tokens) - 1
        habit = same / asked if asked else 0
        rarity = (1 - habit) * (1 - math.log(same + 1) / math.log(len(tokens) + 1))
        assert found[i].item() == pytest.approx(loss * rarity, abs=1e-4)
        assert 0 <= found[i] <= loss + 1e-5


def test_what_the_student_writes_once_is_as_surprising_as_it_is_unlikely():
    once = surprise(torch.tensor([-3.0, -4.0]), torch.tensor([0, 0]), torch.tensor([1, 2]))
    assert once.tolist() == [3.0, 4.0]
    assert surprise(torch.tensor([-3.0]), torch.tensor([0]), torch.tensor([1])).tolist() == [3.0]
    assert surprise(torch.zeros(0), torch.zeros(0).long(), torch.zeros(0).long()).shape == (0,)


def test_a_token_that_the_teacher_never_writes_is_no_surprise_where_it_is_a_habit():
    """-inf: 0 for a full habit, not NaN, and the highest there is elsewhere."""
    never = torch.tensor([-INF, -INF, -INF, -1.0])
    found = surprise(never, torch.tensor([0, 0, 2, 3]), torch.tensor([1, 1, 1, 1]))
    assert found[:2].tolist() == [0.0, 0.0]
    assert found.argmax() == 2
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert chosen(select_candidates(found[None], mask, fraction=0.25)) == [(0, 2)]


# ---- real_divergent_points --------------------------------------------------------------------


def test_the_nearest_share_are_false_alarms():
    distance = torch.tensor([0.5, 0.1, 0.9, 0.2, 0.7, 0.3, 0.8, 0.4, 0.6, 1.0])
    real = real_divergent_points(distance, false_alarm_share=0.3)
    assert real.tolist() == [True, False, True, False, True, False, True, True, True, True]


@pytest.mark.parametrize(
    ("count", "share", "alarms"),
    [
        (0, 0.3, 0),
        (1, 0.3, 0),
        (1, 0.6, 1),
        (2, 0.3, 1),  # 0.6
        (4, 0.3, 1),  # 1.2
        (5, 0.3, 2),  # 1.5, halves to even
        (5, 0.5, 2),  # 2.5
        (5, 0.0, 0),
        (5, 1.0, 5),
    ],
)
def test_the_share_is_rounded_to_the_nearest_count(count, share, alarms):
    distance = 1 + torch.arange(count).float()
    real = real_divergent_points(distance, false_alarm_share=share)
    assert real.dtype == torch.bool
    assert real.tolist() == [False] * alarms + [True] * (count - alarms)


def test_of_equal_distances_exactly_the_share_are_false_alarms():
    assert real_divergent_points(torch.ones(10), false_alarm_share=0.3).sum() == 7


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_threshold_decides_instead_of_the_share(share):
    distance = torch.tensor([0.5, 0.49, 0.51, 0.0])
    real = real_divergent_points(distance, false_alarm_share=share, threshold=0.5)
    assert real.tolist() == [True, False, True, False]
    assert real_divergent_points(distance[:0], threshold=0.5).tolist() == []


@pytest.mark.parametrize(
    ("given", "real"),
    [
        ({"false_alarm_share": 0.25}, [False, False, False, True]),  # three of four, not one
        ({"threshold": 0.0}, [False, False, False, True]),
        ({"false_alarm_share": 0.0}, [True] * 4),  # the verdict is not by distance
    ],
)
def test_windows_that_are_not_apart_are_no_divergent_points(given, real):
    assert real_divergent_points(torch.tensor([0.0, 0.0, 0.0, 0.5]), **given).tolist() == real
    if real[0] is False:
        assert not real_divergent_points(torch.zeros(5), **given).any()


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_share_out_of_range_is_an_error(share):
    said = rf"^false_alarm_share = {share} must be between 0 and 1\.$"
    with pytest.raises(TOPDError, match=said):
        real_divergent_points(torch.ones(2), false_alarm_share=share)


# Controls: the highest score of a rollout, moved


@pytest.mark.parametrize("move", [lambda s, m, t: moved_to_start(s, m), moved_to_random])
def test_a_moved_score_passes_a_threshold_in_as_many_rollouts_at_one_token(move):
    draw = torch.Generator().manual_seed(0)
    score, tokens = torch.randn(50, 9, generator=draw), torch.arange(450).reshape(50, 9)
    mask = torch.arange(9) < torch.randint(1, 10, (50, 1), generator=draw)
    loud = score.masked_fill(~mask, -math.inf).amax(-1) >= 1
    assert 0 < loud.sum() < 50
    found = select_candidates(move(score, mask, tokens), mask, fraction=1.0, threshold=1.0)
    assert torch.equal(found.sum(-1), loud.long())


def test_a_moved_score_worked_by_hand():
    score = torch.tensor([[1.0, 3.0, 2.0, 99.0], [-1.0, -4.0, 99.0, 99.0], [2.0, 9.0, 9.0, 9.0]])
    mask = torch.arange(4) < torch.tensor([[3], [2], [1]])
    expected = torch.tensor([[3.0, 0.0, 0.0, 0.0], [-1.0, -5.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
    assert torch.equal(moved_to_start(score, mask), expected)
    for token in range(8):  # a rollout of one token has one place
        found = moved_to_random(score[2:], mask[2:], torch.full((1, 4), token))
        assert torch.equal(found, expected[2:])


def test_a_random_place_is_the_rollouts_own_and_even():
    """The same in any batch, and of 3,000 rollouts of three tokens each place has 1,000 +- 130."""
    tokens = torch.arange(9000).reshape(3000, 3)
    mask = torch.ones(3000, 3).bool()
    place = moved_to_random(mask.float(), mask, tokens).argmax(-1)
    assert (place.bincount(minlength=3) - 1000).abs().max() < 130  # five standard deviations
    alone = moved_to_random(torch.ones(1, 5), torch.arange(5)[None] < 3, torch.arange(5)[None])
    assert int(alone.argmax()) == int(place[0])
