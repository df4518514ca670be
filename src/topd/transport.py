"""Optimal transport between two windows: how far apart is what student and teacher write next?

    D_OT = min over gamma in Pi(a, b) of sum_ij gamma_ij C_ij

with C the ground cost between token embeddings and a, b uniform over the tokens of either window
(arXiv 2606.00305). Row i is the student's i-th token, column j the teacher's j-th.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import ot
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from topd.errors import TOPDError
from topd.types import Ids, Transport, Windows, wide_dtype

Solver = Literal["exact", "sinkhorn"]

TOLERANCE = 1e-6  # largest error of a column's marginal, relative to the marginal
MAX_ITERATIONS = 200  # some 16 are needed at epsilon 0.05, some 50 at 1e-5
FIRST_EPSILON = 1.0
FOLLOWED = 0.1  # the error at which epsilon falls
WINDOWS_AT_ONCE = 32  # on the host; they stay in the processor's cache
DISTANCE_DUST = 1e-6  # rounding leaves a token up to 1e-7 from itself in float32
PLAN_DUST = 1e-3  # of its row's mass; what is below is not written down


def ground_cost(
    student_embeddings: Float[Tensor, "N n D"],
    teacher_embeddings: Float[Tensor, "N m D"],
    *,
    position_weight: float = 0.0,
) -> Float[Tensor, "N n m"]:
    """C_ij = 1 - cos(e_i, e_j) + position_weight |i - j| / max(n, m).

    Args:
        student_embeddings: [N n D], one a token; need not be normalised.
        teacher_embeddings: [N m D], in the same space.
        position_weight: eta, at least 0. Without it a student token is matched to the same token
            anywhere in the teacher's window.

    Returns:
        [N n m], in [0, 2 + eta).

    Raises:
        TOPDError: a negative or infinite position weight, or embeddings of other windows or widths.

    >>> same = torch.eye(2)[None]
    >>> ground_cost(same, same, position_weight=1.0)[0].tolist()
    [[0.0, 1.5], [1.5, 0.0]]
    """
    if not 0 <= position_weight < math.inf:
        raise TOPDError(f"position_weight = {position_weight} must be finite and at least 0.")
    ours, theirs = student_embeddings.shape, teacher_embeddings.shape
    if (ours[0], ours[2]) != (theirs[0], theirs[2]):
        raise TOPDError(
            f"ground_cost: student embeddings {tuple(ours)} and teacher embeddings {tuple(theirs)} "
            "differ in windows or width. Take both from one table: [N n D] and [N m D]."
        )
    dtype = torch.promote_types(student_embeddings.dtype, teacher_embeddings.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    student = torch.nn.functional.normalize(student_embeddings.to(dtype), dim=-1)
    teacher = torch.nn.functional.normalize(teacher_embeddings.to(dtype), dim=-1)
    cost = (1 - student @ teacher.transpose(-1, -2)).clamp(0, 2)  # rounding may leave [0, 2]
    if position_weight:
        i = torch.arange(cost.shape[-2], device=cost.device, dtype=cost.dtype)
        j = torch.arange(cost.shape[-1], device=cost.device, dtype=cost.dtype)
        cost = cost + position_weight * (i[:, None] - j).abs() / max(cost.shape[-2:])
    return cost


def solve(
    cost: Float[Tensor, "N n m"],
    student_mask: Bool[Tensor, "N n"] | None = None,
    teacher_mask: Bool[Tensor, "N m"] | None = None,
    *,
    method: Solver = "exact",
    epsilon: float = 0.05,
) -> Transport:
    """Transport plans with uniform marginals over the tokens that the masks select.

    Args:
        cost: [N n m], finite where both masks hold.
        student_mask: [N n], True on tokens; None for all.
        teacher_mask: [N m], likewise.
        method: ``exact`` is a linear programme (an assignment where both windows are equally
            long, POT's network simplex otherwise); ``sinkhorn`` is entropic, all windows at once
            on the cost's device.
        epsilon: strength of the entropy, in the unit of the cost; ``sinkhorn`` only.

    Returns:
        ``distance`` [N] = <plan, cost> (without the entropy), ``plan`` [N n m] of mass 1,
        ``converged`` [N]. A pair with an empty window has distance and plan 0. Where ``sinkhorn``
        has converged, rows are exact and columns hold to ``TOLERANCE``; elsewhere the plan is
        rounded to exact marginals. No gradient flows through.

    Raises:
        TOPDError: shapes differ, a cost is not finite, or an option is out of range.

    Source: Flamary et al., POT, JMLR 2021; Peyre & Cuturi, Computational Optimal Transport, 4.4.

    >>> plan = solve(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])).plan
    >>> plan[0].tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    rows, columns = _masks(cost, student_mask, teacher_mask)
    given = _at_least_float32(cost.detach())
    if student_mask is not None or teacher_mask is not None:
        given = given.masked_fill(~(rows[:, :, None] & columns[:, None, :]), 0.0)
    if not given.sum().isfinite():
        raise TOPDError("transport.solve: a cost is NaN or infinite. Check the embeddings.")
    if method == "exact":
        return _exact(given, rows, columns)
    if method != "sinkhorn":
        raise TOPDError(f"transport.solve: method {method!r} is not one of exact, sinkhorn.")
    if not 0 < epsilon < math.inf:
        raise TOPDError(f"transport.solve: epsilon = {epsilon} must be finite and above 0.")
    return _entropic(given, rows, columns, epsilon)


def without_dust(solved: Transport, windows: Windows, compared: Bool[Tensor, "N m"]) -> Transport:
    """The same, with a distance of exactly 0 where nothing but rounding or entropy keeps apart.

    So it is where both windows are the same tokens, whatever the solver, and where the distance is
    below ``DISTANCE_DUST``, as that of the same tokens in another order may be. Plans stay.

    Args:
        solved: plans on the CPU.
        windows: what was compared.
        compared: [N m], the teacher's tokens that were.
    """
    own, n = windows.student_mask, min(windows.student_mask.shape[1], compared.shape[1])
    equal = windows.student_tokens[:, :n] == windows.teacher_tokens[:, :n]
    same = (equal | ~own[:, :n]).all(-1) & (own.sum(-1) == compared.sum(-1))
    nothing = same | (solved.distance < DISTANCE_DUST)
    return replace(solved, distance=solved.distance.masked_fill(nothing, 0.0))


def soft_targets(
    plan: Float[Tensor, "N n m"], teacher_tokens: Int[Tensor, "N m"], vocab_size: int
) -> Float[Tensor, "N n V"]:
    """y~_i = sum_j gamma_ij onehot(x^T_j) / sum_j gamma_ij: the teacher's tokens that token i met.

    Args:
        plan: [N n m], any mass.
        teacher_tokens: [N m]; tokens of masked columns do not matter.
        vocab_size: V.

    Returns:
        [N n V], every row sums to 1 (0 where the plan's row is empty). The paper's y~ has row sum
        1/n; scaling by n makes it a distribution.
    """
    mass = plan.sum(-1, keepdim=True)
    rows = plan / mass.where(mass > 0, 1.0)
    tokens = teacher_tokens.masked_fill(plan.sum(-2) == 0, 0)  # after the mask anything may be
    targets = rows.new_zeros(*plan.shape[:2], vocab_size)
    return targets.scatter_add(-1, tokens[:, None, :].expand(plan.shape), rows)


def sparse_soft_targets(
    plan: Float[Tensor, "N n m"], teacher_tokens: Int[Tensor, "N m"]
) -> list[list[tuple[Ids, tuple[float, ...]]]]:
    """:func:`soft_targets` as supports and probabilities: n rows for each of the N plans.

    Args:
        plan: [N n m], any mass.
        teacher_tokens: [N m].

    Returns:
        Of every row the tokens in rising order and their probabilities, which sum to 1; both are
        empty where the plan's row is. Entries below 1e-9 of the row are left out.

    >>> sparse_soft_targets(torch.tensor([[[0.1, 0.0, 0.3]]]), torch.tensor([[7, 8, 7]]))
    [[((7,), (1.0,))]]
    """
    plan, teacher_tokens = plan.cpu(), teacher_tokens.cpu()
    count, n, _ = plan.shape
    window, i, j = (plan > 1e-9 * plan.sum(-1, keepdim=True)).nonzero(as_tuple=True)  # no dust
    row, token = (window * n + i).numpy(), teacher_tokens[window, j].numpy()
    vocab = token.max(initial=0) + 1
    met, place = np.unique(row * vocab + token, return_inverse=True)
    mass = np.bincount(place, weights=plan[window, i, j].double().numpy())
    row, token = np.divmod(met, vocab)
    mass = mass / np.bincount(row, weights=mass)[row]
    ends = np.searchsorted(row, np.arange(count * n + 1)).tolist()
    tokens, probabilities = token.tolist(), mass.tolist()
    rows = [
        (tuple(tokens[first:last]), tuple(probabilities[first:last]))
        for first, last in pairwise(ends)
    ]
    return [rows[k * n : (k + 1) * n] for k in range(count)]


def sparse_plans(plan: Float[Tensor, "N n m"]) -> list[tuple[tuple[int, int, float], ...]]:
    """The entries of every plan that a person could see, row by row, for the run folder.

    Args:
        plan: [N n m], of any mass.

    Returns:
        (i, j, mass) for each plan, without entries below ``PLAN_DUST`` of their row: an exact plan
        is kept whole, an entropic one loses its haze.

    >>> sparse_plans(torch.tensor([[[0.5, 0.0], [0.0, 0.5]]]))
    [((0, 0, 0.5), (1, 1, 0.5))]
    """
    plan = plan.cpu()
    window, i, j = (plan > PLAN_DUST * plan.sum(-1, keepdim=True)).nonzero(as_tuple=True)
    mass = plan[window, i, j].double().numpy().round(9)
    entries = list(zip(i.tolist(), j.tolist(), mass.tolist(), strict=True))
    ends = torch.searchsorted(window, torch.arange(len(plan) + 1)).tolist()
    return [tuple(entries[first:last]) for first, last in pairwise(ends)]


def _masks(cost: Tensor, student: Tensor | None, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    count, n, m = cost.shape
    rows = cost.new_ones(count, n, dtype=torch.bool) if student is None else student
    columns = cost.new_ones(count, m, dtype=torch.bool) if teacher is None else teacher
    if rows.shape != (count, n) or columns.shape != (count, m):
        raise TOPDError(
            f"transport.solve: masks {tuple(rows.shape)} and {tuple(columns.shape)} do not fit "
            f"the cost {tuple(cost.shape)}: rows are the student, columns the teacher."
        )
    return rows.bool(), columns.bool()


class _Entries(NamedTuple):
    """What is not 0 in a plan, and whether the plan is optimal."""

    i: np.ndarray
    j: np.ndarray
    mass: np.ndarray
    optimal: bool


_EMPTY = _Entries(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), True)


def _exact(cost: Tensor, rows: Tensor, columns: Tensor) -> Transport:
    """One window after the other on the host, and everything around it in one go."""
    host = [x.cpu().split(WINDOWS_AT_ONCE) for x in (cost, rows, columns)]
    solved = [one for some in zip(*host, strict=True) for one in _exact_some(*some)]
    i, j, mass = (np.concatenate(x) for x in list(zip(_EMPTY, *solved, strict=True))[:3])
    window = np.arange(len(solved)).repeat([len(one.mass) for one in solved])
    place = tuple(torch.from_numpy(x).to(cost.device) for x in (window, i, j))
    carried = torch.from_numpy(mass).to(cost.device, wide_dtype(cost.device))
    distance = carried.new_zeros(len(cost)).index_add(0, place[0], carried * cost[place])
    plan = torch.zeros_like(cost)
    plan[place] = carried.to(cost.dtype)
    optimal = torch.tensor([one.optimal for one in solved], dtype=torch.bool, device=cost.device)
    return Transport(distance.to(cost.dtype), plan, optimal)


def _exact_some(cost: Tensor, rows: Tensor, columns: Tensor) -> list[_Entries]:
    if rows.all() and columns.all():
        return [_exact_one(one) for one in _shifted(cost.double()).numpy()]
    solved = []
    for one, row, column in zip(cost.double(), rows, columns, strict=True):
        i, j = row.nonzero()[:, 0], column.nonzero()[:, 0]
        found = _exact_one(_shifted(one[i[:, None], j]).numpy())
        solved.append(found._replace(i=i.numpy()[found.i], j=j.numpy()[found.j]))
    return solved


def _shifted(cost: Tensor) -> Tensor:
    """Less a number a column, so that no column is everyone's nearest: the same plans, sooner.

    Minima are exact, so that the choice among equal plans does not depend on the batch.
    """
    if not cost.numel():
        return cost
    return cost - (cost - cost.amin(-1, keepdim=True)).amin(-2, keepdim=True)


def _exact_one(cost: np.ndarray) -> _Entries:
    """Equal lengths: a vertex of the Birkhoff polytope, so an assignment."""
    n, m = cost.shape
    if n == m:
        return _Entries(*linear_sum_assignment(cost), np.full(n, 1 / max(n, 1)), True)
    if not (n and m):
        return _EMPTY
    plan, log = ot.emd(np.full(n, 1 / n), np.full(m, 1 / m), cost, log=True)
    i, j = plan.nonzero()
    return _Entries(i, j, plan[i, j], log["warning"] is None)


def _entropic(cost: Tensor, rows: Tensor, columns: Tensor, epsilon: float) -> Transport:
    """The plan exp((f + g - C) / epsilon): Newton's method on g, while f keeps the rows exact.

    Epsilon falls to its end value as g follows; a step is damped to log(1 + r) / r of itself, r its
    range. Sinkhorn's own iteration has the same fixed point, but stalls where windows share most of
    their tokens and the plan is near a permutation. Source: Brauer, Clason, Lorenz & Wirth, A
    Sinkhorn-Newton method for entropic optimal transport, 2017.
    """
    wide = cost.to(wide_dtype(cost.device))
    live = rows.any(-1, keepdim=True) & columns.any(-1, keepdim=True)
    if not live.any():
        return Transport(cost.new_zeros(len(cost)), torch.zeros_like(cost), ~live[:, 0])
    a, b = _uniform(rows & live, wide), _uniform(columns & live, wide)
    shut = (live & ~columns)[:, None, :]
    ridge = torch.where(b > 0, 1e3 * torch.finfo(wide.dtype).eps * b, 1.0)
    g, now = torch.zeros_like(b), wide.new_full(live.shape, max(epsilon, FIRST_EPSILON))
    for _ in range(MAX_ITERATIONS):
        rates = ((g[:, None, :] - wide) / now[:, :, None]).masked_fill(shut, -math.inf).softmax(-1)
        plan = a[:, :, None] * rates
        lack = b - plan.sum(-2)
        error = (lack.abs() / b.amax(-1, keepdim=True)).amax(-1, keepdim=True).nan_to_num(0.0)
        converged = (now == epsilon) & (error <= TOLERANCE) | ~live
        if converged.all():
            break
        slope = torch.diag_embed(b - lack + ridge) - rates.mT @ plan + b[:, :, None] * b[:, None, :]
        step = torch.linalg.solve_ex(slope, lack[:, :, None])[0][:, :, 0]
        spread = (step.amax(-1, keepdim=True) - step.amin(-1, keepdim=True)).clamp(min=1e-9)
        # a window stops when it has converged, so that its plan does not depend on the batch
        g = torch.where(converged, g, g + now * step * spread.log1p() / spread)
        now = torch.where(error <= FOLLOWED, (now / 4).clamp(min=epsilon), now)
    plan = torch.where(converged[:, :, None], plan, _rounded(plan, a, b))
    distance = (plan * wide).sum((-1, -2))
    return Transport(distance.to(cost.dtype), plan.to(cost.dtype), converged[:, 0])


def _rounded(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The nearby plan whose marginals are exactly a [N n] and b [N m].

    Source: Altschuler, Weed & Rigollet, Near-linear time approximation algorithms for optimal
    transport via Sinkhorn iteration, NeurIPS 2017, algorithm 2.
    """
    tiny = torch.finfo(plan.dtype).tiny
    plan = plan * (a / plan.sum(-1).clamp(min=tiny)).clamp(max=1)[:, :, None]
    plan = plan * (b / plan.sum(-2).clamp(min=tiny)).clamp(max=1)[:, None, :]
    rest_a, rest_b = (a - plan.sum(-1)).clamp(min=0), (b - plan.sum(-2)).clamp(min=0)
    mass = rest_a.sum(-1).clamp(min=tiny)
    return plan + rest_a[:, :, None] * rest_b[:, None, :] / mass[:, None, None]


def _uniform(mask: Tensor, like: Tensor) -> Tensor:
    """1 / count on the mask, 0 elsewhere."""
    return mask.to(like.dtype) / mask.sum(-1, keepdim=True).clamp(min=1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
