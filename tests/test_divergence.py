"""Candidates, verdicts and methods, on evidence built by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from topd.divergence import (
    METHODS,
    downweight,
    opd,
    real_divergent_points,
    select_candidates,
    thin_candidates,
    topd,
)
from topd.learning import cap_at_medians
from topd.transport import soft_targets, solve
from topd.types import Evidence, Guidance, SoftTarget, TOPDError, Transport, Windows

INF = math.inf


def losses(*rows: list[float]) -> tuple[Tensor, Tensor]:
    """Rows of token losses, padded with the loudest loss there is, and their mask."""
    width = max(len(row) for row in rows)
    padded = torch.tensor([row + [1e9] * (width - len(row)) for row in rows])
    return padded, torch.arange(width) < torch.tensor([[len(row)] for row in rows])


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


@settings(max_examples=60, deadline=None)
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
    with pytest.raises(TOPDError, match="NaN"):
        select_candidates(loss, torch.tensor([[True, True]]), fraction=0.5)
    found = select_candidates(loss, torch.tensor([[True, False]]), fraction=0.5)
    assert chosen(found) == [(0, 0)]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, math.nan])
def test_fraction_out_of_range_is_an_error(fraction):
    with pytest.raises(TOPDError, match="fraction"):
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
    with pytest.raises(TOPDError, match="gap"):
        thin_candidates(torch.ones(1, 2).bool(), gap=gap)


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
    distance = torch.arange(count).float()
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


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_share_out_of_range_is_an_error(share):
    with pytest.raises(TOPDError, match="false_alarm_share"):
        real_divergent_points(torch.ones(2), false_alarm_share=share)


# ---- methods ----------------------------------------------------------------------------------


def evidence(
    rows: list[list[float]],
    starts: list[tuple[int, int]],
    real: list[bool],
    *,
    student_length: int = 3,
    teacher_length: int = 4,
) -> Evidence:
    """Windows of random costs at the given starts; the student's end with their rollout."""
    token_loss, mask = losses(*rows)
    n, m, count = student_length, teacher_length, len(starts)
    generator = torch.Generator().manual_seed(0)
    row, start = torch.tensor(starts, dtype=torch.long).reshape(-1, 2).unbind(-1)
    left = torch.tensor([len(rows[b]) - t for b, t in starts], dtype=torch.long)
    student_mask = torch.arange(n) < left[:, None]
    teacher_mask = torch.arange(m) < (m - torch.arange(count) % 2)[:, None]
    windows = Windows(
        row,
        start,
        torch.randint(3, 9, (count, n), generator=generator),
        student_mask,
        torch.randint(3, 9, (count, m), generator=generator) * teacher_mask,
        teacher_mask,
    )
    cost = torch.rand(count, n, m, generator=generator)
    plans = solve(cost, student_mask, teacher_mask)
    return Evidence(
        token_loss.masked_fill(~mask, 0.0),
        mask,
        windows,
        plans,
        torch.tensor(real, dtype=torch.bool),
    )


ROWS = [[1.0, 2.0, 9.0, 3.0, 4.0], [5.0, 6.0]]
STARTS = [(0, 0), (0, 2), (0, 4), (1, 0)]


def no_windows() -> Evidence:
    """What a step without candidates yields: no window, and so no width either."""
    token_loss, mask = losses([1.0, 2.0], [3.0])
    ids, none = torch.zeros(0, dtype=torch.long), torch.zeros(0, 0, dtype=torch.bool)
    windows = Windows(ids, ids, none.long(), none, none.long(), none)
    plans = Transport(torch.zeros(0), torch.zeros(0, 0, 0), torch.zeros(0).bool())
    return Evidence(token_loss, mask, windows, plans, torch.zeros(0).bool())


@pytest.mark.parametrize("name", METHODS)
def test_without_windows_every_method_is_plain_distillation(name):
    assert METHODS[name].guide(no_windows()) == (Guidance((1.0, 1.0)), Guidance((1.0,)))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_one_guidance_a_rollout_with_one_weight_a_token(name):
    guidance = METHODS[name].guide(evidence([*ROWS, []], STARTS, [True, False, True, False]))
    assert [len(one.weights) for one in guidance] == [5, 2, 0]
    assert all(type(weight) is float for one in guidance for weight in one.weights)


def test_only_methods_that_look_ahead_depend_on_the_windows():
    one = evidence(ROWS, STARTS, [True] * 4)
    other = evidence(ROWS, STARTS, [False] * 4)
    changed = {name for name, method in METHODS.items() if method.guide(one) != method.guide(other)}
    assert changed == {name for name, method in METHODS.items() if method.looks_ahead}


def test_opd_leaves_every_token_as_it_is():
    guidance = opd(evidence(ROWS, STARTS, [True] * 4))
    assert guidance == (Guidance((1.0,) * 5), Guidance((1.0,) * 2))


def test_topd_targets_by_hand():
    """One window at token 1: its plan sends token 1 to words 7 and 8, token 2 to word 8."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    windows = Windows(
        torch.tensor([0]),
        torch.tensor([1]),
        torch.tensor([[3, 4]]),
        mask,
        torch.tensor([[8, 7, 8]]),
        torch.ones(1, 3, dtype=torch.bool),
    )
    plan = torch.tensor([[[1 / 6, 1 / 3, 0.0], [1 / 6, 0.0, 1 / 3]]])
    plans = Transport(torch.zeros(1), plan, torch.tensor([True]))
    loss, tokens = losses([1.0, 9.0, 2.0])
    (guidance,) = topd(Evidence(loss, tokens, windows, plans, torch.tensor([True])))
    first, second = guidance.targets
    assert guidance.weights == (1.0, 1.0, 1.0)
    assert (first.position, first.tokens) == (1, (7, 8))
    assert first.probabilities == pytest.approx((2 / 3, 1 / 3))
    assert second == SoftTarget(2, (8,), (1.0,))


def test_topd_guides_the_students_window_at_real_points_only():
    """Window 2 starts at the last token of rollout 0, so it has one token."""
    guidance = topd(evidence(ROWS, STARTS, [True, False, True, True]))
    assert [[t.position for t in one.targets] for one in guidance] == [[0, 1, 2, 4], [0, 1]]
    assert all(weight == 1 for one in guidance for weight in one.weights)


def test_topd_targets_are_distributions_over_the_teachers_window():
    found = evidence(ROWS, STARTS, [True] * 4)
    words = set(found.windows.teacher_tokens[found.windows.teacher_mask].tolist())
    for one in topd(found):
        for target in one.targets:
            assert sum(target.probabilities) == pytest.approx(1, abs=1e-12)
            assert min(target.probabilities) > 0
            assert list(target.tokens) == sorted(set(target.tokens))
            assert set(target.tokens) <= words


def test_topd_targets_are_the_dense_soft_targets():
    found = evidence(ROWS, STARTS, [True, True, False, True])
    dense = soft_targets(found.transport.plan, found.windows.teacher_tokens, 9)
    expected = [(0, 0 + i, dense[0, i]) for i in range(3)]
    expected += [(0, 2 + i, dense[1, i]) for i in range(3)]
    expected += [(1, 0 + i, dense[3, i]) for i in range(2)]
    targets = [(b, target) for b, one in enumerate(topd(found)) for target in one.targets]
    for (b, target), (row, position, values) in zip(targets, expected, strict=True):
        assert (b, target.position) == (row, position)
        spread = torch.zeros(9).double()
        spread[list(target.tokens)] = torch.tensor(target.probabilities, dtype=torch.float64)
        torch.testing.assert_close(spread, values.double(), atol=1e-6, rtol=0)


def test_topd_without_a_real_point_is_opd():
    found = evidence(ROWS, STARTS, [False] * 4)
    assert topd(found) == opd(found)


def test_downweight_caps_false_alarms_and_only_those():
    guidance = downweight(evidence(ROWS, [(0, 2), (0, 4), (1, 1)], [True, False, False]))
    assert [one.capped for one in guidance] == [(4,), (1,)]
    assert all(set(one.weights) == {1.0} and one.targets == () for one in guidance)


def capped(rows: list[list[float]], marked: list[tuple[int, int]]) -> list[float]:
    mark = [(b, t) in marked for b, row in enumerate(rows) for t in range(len(row))]
    loss = torch.tensor([x for row in rows for x in row]).double()
    return cap_at_medians(loss, torch.tensor(mark), [len(row) for row in rows]).tolist()


def test_a_cap_is_the_median_of_its_own_rollout():
    """Median of 1, 2, 9, 3, 4 is 3; of 5, 6 it is 5.5."""
    rows = [[1.0, 2, 9, 3, 4], [5.0, 6]]
    assert capped(rows, [(0, 2), (1, 1)]) == pytest.approx([1, 2, 3, 3, 4, 5, 5.5])


def test_a_cap_leaves_tokens_at_or_below_the_median():
    rows = [[1.0, 2, 9, 3, 4]]
    assert capped(rows, [(0, 0), (0, 3)]) == rows[0]


def test_a_capped_token_still_learns_with_the_weight_median_over_loss():
    loss = torch.tensor([1.0, 2.0, 8.0], requires_grad=True)
    cap_at_medians(loss, torch.tensor([False, False, True]), [3]).sum().backward()
    assert loss.grad.tolist() == [1.0, 1.0, 2 / 8]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 20, width=32), min_size=1, max_size=7))
def test_a_capped_loss_is_the_smaller_of_loss_and_median(row):
    half = len(row) // 2
    ordered = sorted(row)
    cap = ordered[half] if len(row) % 2 else (ordered[half - 1] + ordered[half]) / 2
    found = capped([row], [(0, t) for t in range(len(row))])
    assert found == pytest.approx([min(loss, cap) for loss in row], rel=1e-6, abs=1e-9)


def test_methods_do_not_change_their_evidence():
    found = evidence(ROWS, STARTS, [True, False, True, False])
    copy = replace(found, token_loss=found.token_loss.clone())
    for method in METHODS.values():
        method.guide(found)
    assert torch.equal(found.token_loss, copy.token_loss)
