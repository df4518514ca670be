"""Ground cost, transport plans and soft targets, against brute force and linear programmes."""

from __future__ import annotations

import itertools
import math
import re
from itertools import pairwise

import numpy as np
import ot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linprog
from torch import Tensor

from conftest import torch_on_device as torch
from topd import transport
from topd.errors import TOPDError
from topd.transport import (
    DISTANCE_DUST,
    PLAN_DUST,
    TOLERANCE,
    ground_cost,
    soft_targets,
    solve,
    sparse_plans,
    sparse_soft_targets,
    without_dust,
)
from topd.types import Windows

SHAPES = [(1, 1), (1, 4), (3, 1), (2, 3), (3, 2), (4, 4), (2, 6), (5, 7), (7, 5)]
shapes = pytest.mark.parametrize(("n", "m"), SHAPES)
methods = pytest.mark.parametrize("method", ["exact", "sinkhorn"])
untyped = pytest.mark.skipif(
    "config.getoption('jaxtyping_packages', None)", reason="--jaxtyping-packages objects first"
)


def random_cost(n: int, m: int, *, count: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(count, n, m, generator=generator, dtype=torch.float64)


def best_assignment(cost: np.ndarray) -> float:
    """The distance by trying every permutation, each token split into lcm(n, m) equal parts."""
    n, m = cost.shape
    parts = math.lcm(n, m)
    split = cost.repeat(parts // n, axis=0).repeat(parts // m, axis=1)
    rows = range(parts)
    return min(split[rows, order].mean() for order in itertools.permutations(range(parts)))


def programme(cost: np.ndarray) -> float:
    """The distance as a generic linear programme, by HiGHS."""
    n, m = cost.shape
    rows = np.kron(np.eye(n), np.ones((1, m)))
    columns = np.kron(np.ones((1, n)), np.eye(m))
    marginals = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    found = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=marginals)
    return found.fun


def assert_coupling(plan: Tensor, *, column_error: float = 1e-9) -> None:
    """Non-negative, mass 1, uniform marginals; one plan [n m], nothing masked."""
    n, m = plan.shape
    assert (plan >= 0).all()
    assert plan.sum(-1).tolist() == pytest.approx([1 / n] * n, rel=1e-9)
    assert plan.sum(-2).tolist() == pytest.approx([1 / m] * m, rel=column_error)
    assert plan.sum().item() == pytest.approx(1, rel=1e-9)


# ---- ground_cost ------------------------------------------------------------------------------


def test_ground_cost_by_hand():
    student = torch.tensor([[[3.0, 0.0], [1.0, 1.0]]])
    teacher = torch.tensor([[[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]]])
    half = math.sqrt(0.5)
    expected = torch.tensor([[[0.0, 1.0, 2.0], [1 - half, 1 - half, 1 + half]]])
    torch.testing.assert_close(ground_cost(student, teacher), expected)


def test_position_cost_by_hand_with_student_rows_and_teacher_columns():
    """Two student tokens, four teacher tokens, all the same word: only |i - j| / 4 is left."""
    cost = ground_cost(torch.ones(1, 2, 3), torch.ones(1, 4, 3), position_weight=2.0)
    expected = 2 * torch.tensor([[[0, 1, 2, 3], [1, 0, 1, 2]]]) / 4
    torch.testing.assert_close(cost, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize(("n", "m"), [(3, 5), (5, 3), (4, 4)])
def test_cost_is_symmetric_and_between_zero_and_two_plus_eta(n, m, eta):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, n, 4).double(), torch.randn(6, m, 4).double()
    cost = ground_cost(student, teacher, position_weight=eta)
    other = ground_cost(teacher, student, position_weight=eta)
    torch.testing.assert_close(cost, other.mT)
    assert cost.shape == (6, n, m)
    assert cost.min() >= 0
    assert cost.max() <= 2 + eta


def test_cost_ignores_the_length_of_an_embedding():
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 3, 4).double(), torch.randn(1, 5, 4).double()
    scaled = ground_cost(student * torch.tensor([[[0.1], [1.0], [30.0]]]), 7 * teacher)
    torch.testing.assert_close(scaled, ground_cost(student, teacher))


def test_cost_is_zero_for_the_same_word_and_never_below():
    torch.manual_seed(0)
    words = torch.randn(1, 200, 7)
    cost = ground_cost(words, words)
    assert cost.min() >= 0
    assert cost.diagonal(dim1=-2, dim2=-1).max() < 1e-6


def test_cost_of_bfloat16_embeddings_is_float32():
    words = torch.randn(1, 3, 8).bfloat16()
    cost = ground_cost(words, words)
    assert cost.dtype == torch.float32
    torch.testing.assert_close(cost, ground_cost(words.float(), words.float()))


def test_cost_of_embeddings_of_two_precisions_is_in_the_wider_one():
    torch.manual_seed(0)
    narrow, wide = torch.randn(1, 3, 8), torch.randn(1, 5, 8).double()
    for student, teacher in ((narrow, wide), (wide, narrow)):
        cost = ground_cost(student, teacher)
        assert cost.dtype == torch.float64
        torch.testing.assert_close(cost, ground_cost(student.double(), teacher.double()))


@untyped
@pytest.mark.parametrize("shape", [(1, 2, 5), (2, 2, 8)])
def test_cost_of_embeddings_of_other_windows_or_widths_is_an_error(shape):
    said = f"student embeddings (1, 3, 8) and teacher embeddings {shape} differ in windows or width"
    with pytest.raises(TOPDError, match=re.escape(said)):
        ground_cost(torch.ones(1, 3, 8), torch.ones(shape))


@pytest.mark.parametrize("eta", [-0.1, math.inf, math.nan])
def test_position_weight_out_of_range_is_an_error(eta):
    said = f"^position_weight = {eta} must be finite and at least 0.$"
    with pytest.raises(TOPDError, match=said):
        ground_cost(torch.ones(1, 2, 3), torch.ones(1, 2, 3), position_weight=eta)


# ---- the exact plan ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@shapes
def test_exact_distance_equals_a_generic_linear_programme(n, m, seed):
    cost = random_cost(n, m, seed=seed)
    found = solve(cost)
    assert found.distance.item() == pytest.approx(programme(cost[0].cpu().numpy()), abs=1e-9)
    assert found.distance.item() == pytest.approx((found.plan * cost).sum().item())
    assert_coupling(found.plan[0])
    assert found.converged.all()


@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (2, 2), (4, 4), (5, 5), (2, 3), (3, 2), (1, 5), (4, 2), (2, 6), (6, 3)]
)
def test_exact_distance_equals_brute_force(n, m):
    cost = random_cost(n, m, seed=n + 10 * m)
    assert solve(cost).distance.item() == pytest.approx(
        best_assignment(cost[0].cpu().numpy()), abs=1e-9
    )


@shapes
def test_exact_plan_is_that_of_pot(n, m):
    cost = random_cost(n, m, seed=4)
    expected = ot.emd(np.full(n, 1 / n), np.full(m, 1 / m), cost[0].cpu().numpy())
    np.testing.assert_allclose(solve(cost).plan[0].cpu().numpy(), expected, atol=1e-12)


def test_exact_plan_by_hand_with_more_teacher_tokens():
    """Rows carry 1/2, columns 1/3: the middle column is shared."""
    cost = torch.tensor([[[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]]])
    found = solve(cost)
    expected = torch.tensor([[[1 / 3, 1 / 6, 0.0], [0.0, 1 / 6, 1 / 3]]])
    torch.testing.assert_close(found.plan, expected)
    assert found.distance.item() == pytest.approx(1 / 6)


costs = st.integers(1, 5).flatmap(
    lambda n: st.integers(1, 5).flatmap(
        lambda m: arrays(np.float64, (1, n, m), elements=st.floats(0, 2, width=16))
    )
)


@settings(max_examples=60)
@given(costs)
def test_exact_plan_is_a_coupling_no_worse_than_others_and_no_better_than_possible(array):
    cost = torch.from_numpy(array)
    found = solve(cost)
    distance = found.distance.item()
    assert_coupling(found.plan[0])
    assert distance <= cost.mean().item() + 1e-9  # the independent coupling
    assert distance >= cost.amin(-1).mean().item() - 1e-9  # every token to its nearest
    assert distance >= cost.amin(-2).mean().item() - 1e-9


@settings(max_examples=40)
@given(costs, st.floats(-1, 1), st.floats(0.1, 4))
def test_distance_is_symmetric_and_follows_shift_and_scale_of_the_cost(array, shift, scale):
    cost = torch.from_numpy(array)
    distance = solve(cost).distance.item()
    assert solve(cost.mT).distance.item() == pytest.approx(distance, abs=1e-9)
    assert solve(scale * cost + shift).distance.item() == pytest.approx(
        scale * distance + shift, abs=1e-9
    )


@pytest.mark.parametrize(("n", "m"), [(4, 4), (3, 5)])
@methods
def test_permuting_tokens_permutes_the_plan(n, m, method):
    cost = random_cost(n, m, seed=1)
    torch.manual_seed(0)
    rows, columns = torch.randperm(n), torch.randperm(m)
    found = solve(cost, method=method, epsilon=0.1)
    moved = solve(cost[:, rows][:, :, columns], method=method, epsilon=0.1)
    torch.testing.assert_close(moved.plan, found.plan[:, rows][:, :, columns], atol=1e-6, rtol=0)
    torch.testing.assert_close(moved.distance, found.distance, atol=1e-6, rtol=0)


@methods
def test_same_windows_are_at_distance_zero(method):
    torch.manual_seed(0)
    words = torch.randn(2, 6, 16).double()
    found = solve(ground_cost(words, words), method=method, epsilon=0.01)
    assert found.distance.tolist() == pytest.approx([0, 0], abs=1e-9)
    torch.testing.assert_close(found.plan, torch.eye(6).double().expand(2, 6, 6) / 6)


# ---- masks and batches ------------------------------------------------------------------------


def padded_batch(sizes: list[tuple[int, int]]) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Single problems, and the same padded into one batch with rubbish after the masks."""
    singles = [random_cost(n, m, seed=k) for k, (n, m) in enumerate(sizes)]
    n, m = (max(size) for size in zip(*sizes, strict=True))
    cost = torch.full((len(sizes), n, m), math.nan, dtype=torch.float64)
    for k, single in enumerate(singles):
        cost[k, : sizes[k][0], : sizes[k][1]] = single[0]
    student = torch.arange(n) < torch.tensor([[size[0]] for size in sizes])
    teacher = torch.arange(m) < torch.tensor([[size[1]] for size in sizes])
    return singles, cost, student, teacher


@methods
def test_padded_windows_equal_unpadded_ones_whatever_else_is_in_the_batch(method):
    sizes = [(2, 3), (5, 5), (1, 4), (4, 1), (3, 3)]
    singles, cost, student, teacher = padded_batch(sizes)
    found = solve(cost, student, teacher, method=method, epsilon=0.05)
    for k, ((n, m), single) in enumerate(zip(sizes, singles, strict=True)):
        alone = solve(single, method=method, epsilon=0.05)
        torch.testing.assert_close(found.plan[k, :n, :m], alone.plan[0], atol=1e-6, rtol=0)
        assert found.distance[k].item() == pytest.approx(alone.distance.item(), abs=1e-6)
        assert (found.plan[k, n:] == 0).all()
        assert (found.plan[k, :, m:] == 0).all()
    assert found.converged.all()
    torch.testing.assert_close(found.plan.sum((-1, -2)), torch.ones(5).double())


@methods
def test_masked_tokens_need_not_come_last(method):
    cost = random_cost(4, 5)
    rows, columns = torch.tensor([0, 2, 3]), torch.tensor([1, 4])
    student, teacher = torch.zeros(1, 4).bool(), torch.zeros(1, 5).bool()
    student[0, rows], teacher[0, columns] = True, True
    found = solve(cost, student, teacher, method=method)
    alone = solve(cost[:, rows][:, :, columns], method=method)
    torch.testing.assert_close(found.plan[:, rows][:, :, columns], alone.plan, atol=1e-6, rtol=0)
    assert found.plan.sum().item() == pytest.approx(1)


@methods
@pytest.mark.parametrize(("student_ends", "teacher_ends"), [(0, 3), (2, 0), (0, 0)])
def test_an_empty_window_has_no_plan_and_leaves_its_neighbours_alone(
    method, student_ends, teacher_ends
):
    cost = random_cost(2, 3, count=2)
    student = torch.arange(2) < torch.tensor([[student_ends], [2]])
    teacher = torch.arange(3) < torch.tensor([[teacher_ends], [3]])
    found = solve(cost, student, teacher, method=method)
    assert (found.plan[0] == 0).all()
    assert found.distance[0] == 0
    assert found.converged.all()
    torch.testing.assert_close(found.plan[1], solve(cost[1:], method=method).plan[0])


@methods
@pytest.mark.parametrize("shape", [(0, 3, 4), (0, 0, 0), (2, 0, 0), (2, 3, 0), (2, 0, 3)])
def test_no_windows_or_only_empty_ones(method, shape):
    """A step without candidates has windows of no width at all."""
    found = solve(torch.zeros(shape), method=method)
    assert found.plan.shape == shape
    assert found.distance.tolist() == [0.0] * shape[0]
    assert found.converged.tolist() == [True] * shape[0]


@methods
@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_plans_come_in_at_least_float32_and_without_gradient(method, given_dtype, dtype):
    cost = random_cost(2, 3).to(given_dtype).requires_grad_()
    found = solve(cost, method=method)
    assert found.distance.dtype == found.plan.dtype == dtype
    assert not found.distance.requires_grad
    assert not found.plan.requires_grad


# ---- the entropic plan ------------------------------------------------------------------------


def test_sinkhorn_by_hand():
    """By symmetry the plan is exp(-C / epsilon), normalised: its scalings are all equal."""
    epsilon = 0.4
    other = math.exp(-1 / epsilon) / (1 + math.exp(-1 / epsilon))
    found = solve(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), method="sinkhorn", epsilon=epsilon)
    expected = torch.tensor([[[1 - other, other], [other, 1 - other]]]) / 2
    torch.testing.assert_close(found.plan, expected)
    assert found.distance.item() == pytest.approx(other)


@pytest.mark.parametrize("epsilon", [1.0, 0.1])
@shapes
def test_sinkhorn_plan_has_its_marginals_and_gibbs_form(n, m, epsilon):
    """log plan + C / epsilon = f_i + g_j is what makes a coupling the entropic optimum."""
    cost = random_cost(n, m, seed=2)
    found = solve(cost, method="sinkhorn", epsilon=epsilon)
    plan = found.plan[0]
    assert found.converged.all()
    assert_coupling(plan, column_error=2 * TOLERANCE)
    assert plan.sum(-1).tolist() == pytest.approx([1 / n] * n, rel=1e-12)
    potential = plan.log() + cost[0] / epsilon
    mixed = potential - potential[:1] - potential[:, :1] + potential[:1, :1]
    assert mixed.abs().max() < 1e-8


@pytest.mark.parametrize(("n", "m"), [(3, 5), (7, 5), (6, 6)])
def test_sinkhorn_falls_to_the_exact_distance_and_plan_with_epsilon(n, m):
    """Its excess cost is at most epsilon times the entropy a plan can gain, log min(n, m)."""
    cost = random_cost(n, m, seed=6)
    exact = solve(cost)
    epsilons = [1.0, 0.3, 0.1, 0.03, 0.01, 0.003]
    found = [solve(cost, method="sinkhorn", epsilon=epsilon) for epsilon in epsilons]
    excess = [(one.distance - exact.distance).item() for one in found]
    assert all(later < before + 1e-7 for before, later in pairwise(excess))
    assert excess[-1] >= -1e-6
    for one, bound in zip(excess, epsilons, strict=True):
        assert one <= bound * math.log(min(n, m)) + 1e-6
    torch.testing.assert_close(found[-1].plan, exact.plan, atol=1e-4, rtol=0)


@pytest.mark.parametrize("epsilon", [0.1, 0.05, 0.01, 1e-4])
@pytest.mark.parametrize("changed", [0.02, 0.2, 1.0])
def test_sinkhorn_converges_on_windows_that_mostly_agree(changed, epsilon):
    """Their plan is near a permutation: at 0.05 Sinkhorn's own iteration needs over 5,000 steps."""
    torch.manual_seed(0)
    table, student = torch.randn(200, 64), torch.randint(200, (8, 50))
    teacher = torch.where(torch.rand(8, 50) < changed, torch.randint(200, (8, 50)), student)
    cost = ground_cost(table[student], table[teacher]).double()
    found = solve(cost, method="sinkhorn", epsilon=epsilon)
    assert found.converged.all()
    for plan in found.plan:
        assert_coupling(plan, column_error=2 * TOLERANCE)
    excess = found.distance - solve(cost).distance
    assert excess.min() > -1e-6
    assert excess.max() < epsilon * math.log(50)


def test_sinkhorn_of_a_huge_epsilon_is_the_independent_coupling():
    found = solve(random_cost(3, 4), method="sinkhorn", epsilon=1e6)
    torch.testing.assert_close(
        found.plan, torch.full((1, 3, 4), 1 / 12).double(), rtol=1e-5, atol=0
    )


def test_sinkhorn_does_not_underflow_at_a_tiny_epsilon():
    cost = torch.tensor([[[0.0, 2.0], [2.0, 0.0]]])
    found = solve(cost, method="sinkhorn", epsilon=1e-5)
    torch.testing.assert_close(found.plan[0], torch.eye(2) / 2)


def test_sinkhorn_says_which_windows_have_not_converged(monkeypatch):
    monkeypatch.setattr(transport, "MAX_ITERATIONS", 6)  # epsilon has just come down
    cost = torch.cat([torch.ones(1, 4, 4).double(), random_cost(4, 4, seed=6)])
    found = solve(cost, method="sinkhorn", epsilon=0.01)
    assert found.converged.tolist() == [True, False]
    for marginal in (found.plan.sum(-1), found.plan.sum(-2)):  # rounded, so exact all the same
        torch.testing.assert_close(marginal, torch.full((2, 4), 0.25).double())
    assert found.distance[1] >= solve(cost).distance[1]


def test_unfinished_exact_plans_are_reported(monkeypatch):
    monkeypatch.setattr(
        transport.ot, "emd", lambda a, b, cost, **_: (np.outer(a, b), {"warning": "stopped early"})
    )
    assert solve(random_cost(2, 3)).converged.tolist() == [False]


# ---- errors -----------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_cost_that_is_not_finite_is_an_error(method, bad):
    cost = random_cost(2, 3)
    cost[0, 1, 2] = bad
    said = r"^transport\.solve: a cost is NaN or infinite\. Check the embeddings\.$"
    with pytest.raises(TOPDError, match=said):
        solve(cost, method=method)


@untyped
@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ({"student_mask": (1, 3)}, "masks (1, 3) and (1, 3) do"),
        ({"teacher_mask": (1, 2)}, "masks (1, 2) and (1, 2) do"),
    ],
)
def test_masks_on_the_wrong_side_are_an_error(masks, said):
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in masks.items()}
    with pytest.raises(TOPDError) as caught:
        solve(random_cost(2, 3), **masks)
    assert str(caught.value) == (
        f"transport.solve: {said} not fit the cost (1, 2, 3): rows are the student, columns the "
        "teacher."
    )


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan])
def test_epsilon_out_of_range_is_an_error(epsilon):
    said = rf"^transport\.solve: epsilon = {epsilon} must be finite and above 0\.$"
    with pytest.raises(TOPDError, match=said):
        solve(random_cost(2, 3), method="sinkhorn", epsilon=epsilon)


@untyped
def test_unknown_method_is_an_error():
    said = r"^transport\.solve: method 'greedy' is not one of exact, sinkhorn\.$"
    with pytest.raises(TOPDError, match=said):
        solve(random_cost(2, 3), method="greedy")


# ---- soft targets -----------------------------------------------------------------------------


def test_soft_targets_by_hand():
    """Row 0 meets token 4 twice (1/8 + 1/4) and token 1 once (1/8)."""
    plan = torch.tensor([[[1 / 8, 1 / 8, 1 / 4], [0.0, 1 / 2, 0.0]]])
    expected = torch.tensor([[[0, 1 / 4, 0, 0, 3 / 4], [0, 1, 0, 0, 0]]])
    torch.testing.assert_close(soft_targets(plan, torch.tensor([[4, 1, 4]]), 5), expected)


@methods
def test_soft_targets_are_distributions_and_zero_on_masked_rows(method):
    _, cost, student, teacher = padded_batch([(2, 3), (4, 4), (3, 1)])
    plan = solve(cost, student, teacher, method=method, epsilon=0.2).plan
    tokens = torch.tensor([[1, 8, 1, 0], [2, 2, 3, 4], [5, 0, 0, 0]])
    targets = soft_targets(plan, tokens, 9)
    torch.testing.assert_close(targets.sum(-1), student.double())
    assert (targets >= 0).all()
    assert (targets[~student] == 0).all()


@pytest.mark.parametrize("rubbish", [0, 8, -1, 9])  # -1 and 9 are no tokens at all
def test_tokens_behind_the_mask_do_not_matter(rubbish):
    _, cost, student, teacher = padded_batch([(2, 2), (3, 4)])
    plan = solve(cost, student, teacher).plan
    tokens = torch.tensor([[5, 6, 1, 1], [1, 2, 3, 4]])
    dirty = tokens.masked_fill(~teacher, rubbish)
    assert torch.equal(soft_targets(plan, dirty, 9), soft_targets(plan, tokens, 9))


def test_soft_targets_of_one_token_that_there_is():
    plan = torch.tensor([[[0.5, 0.0], [0.0, 0.0]]])
    assert soft_targets(plan, torch.tensor([[0, 7]]), 1).tolist() == [[[1.0], [0.0]]]


def test_soft_targets_do_not_depend_on_the_mass_of_the_plan():
    plan, tokens = solve(random_cost(3, 4)).plan, torch.tensor([[1, 2, 1, 0]])
    torch.testing.assert_close(soft_targets(7 * plan, tokens, 5), soft_targets(plan, tokens, 5))


@methods
@pytest.mark.parametrize("seed", range(3))
def test_sparse_targets_are_the_dense_rows(method, seed):
    _, cost, student, teacher = padded_batch([(4, 5), (2, 2), (3, 1)])
    cost = cost + seed * random_cost(4, 5, count=3, seed=seed)
    plan = solve(cost, student, teacher, method=method).plan
    plan = plan.where(plan > 1e-9 * plan.sum(-1, keepdim=True), 0.0)  # dust is left out
    tokens = torch.tensor([[3, 1, 3, 7, 1], [2, 2, 0, 0, 0], [8, 0, 0, 0, 0]])
    found, dense = sparse_soft_targets(plan, tokens), soft_targets(plan, tokens, 9)
    for window, rows, mask in zip(found, dense, student, strict=True):
        for (support, probabilities), row, real in zip(window, rows, mask, strict=True):
            assert list(support) == row.nonzero()[:, 0].tolist()
            assert list(probabilities) == pytest.approx(row[list(support)].tolist(), rel=1e-12)
            assert sum(probabilities) == pytest.approx(float(real), abs=1e-12)


def test_dust_of_a_sparse_target_is_measured_against_its_row():
    """Of the first row all is little, of the second only one entry."""
    plan = torch.tensor([[[1e-12, 0.0], [0.5, 4e-10]]], dtype=torch.float64)
    assert sparse_soft_targets(plan, torch.tensor([[7, 8]])) == [[((7,), (1.0,)), ((7,), (1.0,))]]


def test_no_plans_have_no_sparse_form():
    assert sparse_soft_targets(torch.zeros(0, 0, 0), torch.zeros(0, 0, dtype=torch.long)) == []
    assert sparse_plans(torch.zeros(0, 0, 0)) == []


def test_guidance_follows_the_order_of_the_teachers_words():
    """Permuting the teacher's window, words and costs alike, changes no target."""
    cost, tokens = random_cost(3, 4, seed=2), torch.tensor([[5, 6, 7, 8]])
    order = torch.tensor([2, 0, 3, 1])
    expected = soft_targets(solve(cost).plan, tokens, 9)
    found = soft_targets(solve(cost[:, :, order]).plan, tokens[:, order], 9)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (4, 6)])
def test_an_exact_plan_is_written_down_whole(n, m):
    plan = solve(torch.rand(1, n, m, generator=torch.Generator().manual_seed(3))).plan[0]
    again = torch.zeros(n, m)
    for i, j, mass in sparse_plans(plan[None])[0]:
        again[i, j] = mass
    torch.testing.assert_close(again, plan, atol=1e-8, rtol=0)


def test_dust_of_a_plan_is_not_written_down_and_an_empty_row_has_no_entry():
    plan = torch.tensor([[0.5 - PLAN_DUST / 4, PLAN_DUST / 4], [0.0, 0.0]])
    assert sparse_plans(plan[None]) == [((0, 0, pytest.approx(0.5 - PLAN_DUST / 4)),)]


def test_windows_of_the_same_tokens_in_another_order_are_at_distance_zero():
    """Rounding keeps them apart, in float32, by less than ``DISTANCE_DUST``; others stay."""
    tokens = torch.arange(8 * 40).reshape(40, 8)
    others = tokens.flip(-1)
    others[1::2, 0] = 320
    table = torch.randn(321, 16, generator=torch.Generator().manual_seed(0))
    solved = solve(ground_cost(table[tokens], table[others])).cpu()
    mask, zeros = torch.ones_like(tokens).bool(), torch.zeros(40, dtype=torch.long)
    windows = Windows(zeros, zeros, tokens, mask, others, mask)
    assert 0 < solved.distance[::2].max() < DISTANCE_DUST
    found = without_dust(solved, windows, mask).distance
    assert found[::2].tolist() == [0.0] * 20
    assert torch.equal(found[1::2], solved.distance[1::2])
    assert (found[1::2] > DISTANCE_DUST).all()


def test_dust_is_measured_against_its_row_and_masses_are_rounded_to_nine_digits():
    """A row of little mass keeps entries that would be dust in another."""
    little = PLAN_DUST / 4
    plan = torch.tensor([[0.5, 0.0], [little / 3, little], [0.1, 3.4]], dtype=torch.float64)
    assert sparse_plans(plan[None]) == [
        ((0, 0, 0.5), (1, 0, round(little / 3, 9)), (1, 1, little), (2, 0, 0.1), (2, 1, 3.4))
    ]


@pytest.mark.parametrize("seed", range(5))
def test_rounding_gives_exact_marginals_near_the_plan(seed):
    """Lemma 7 of Altschuler et al. 2017: it moves at most twice what the marginals lack."""
    drawn = torch.Generator().manual_seed(seed)
    plan = torch.rand(3, 4, 6, generator=drawn, dtype=torch.float64) ** 4
    plan = plan / plan.sum((-1, -2), keepdim=True)
    a, b = (torch.rand(3, n, generator=drawn, dtype=torch.float64) for n in (4, 6))
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    rounded = transport._rounded(plan, a, b)
    assert (rounded >= 0).all()
    torch.testing.assert_close(rounded.sum(-1), a, rtol=0, atol=1e-12)
    torch.testing.assert_close(rounded.sum(-2), b, rtol=0, atol=1e-12)
    lacking = (plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)
    assert ((rounded - plan).abs().sum((-1, -2)) <= 2 * lacking + 1e-12).all()
