"""Optimal transport between two windows: how far apart is what student and teacher write next?

    D_OT = min over gamma in Pi(a, b) of sum_ij gamma_ij C_ij

with C the ground cost between token embeddings and a, b uniform over the tokens of either window
(arXiv 2606.00305). Row i is the student's i-th token, column j the teacher's j-th.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import ot
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from topd.types import TOPDError, Transport, wide_dtype

Solver = Literal["exact", "sinkhorn"]

TOLERANCE = 1e-6  # largest error of a column's marginal, relative to the marginal
MAX_ITERATIONS = 5_000
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
        TOPDError: a negative or infinite position weight.

    >>> same = torch.eye(2)[None]
    >>> ground_cost(same, same, position_weight=1.0)[0].tolist()
    [[0.0, 1.5], [1.5, 0.0]]
    """
    if not 0 <= position_weight < math.inf:
        raise TOPDError(f"position_weight = {position_weight} must be finite and at least 0.")
    student = torch.nn.functional.normalize(_at_least_float32(student_embeddings), dim=-1)
    teacher = torch.nn.functional.normalize(_at_least_float32(teacher_embeddings), dim=-1)
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
            long, POT's network simplex otherwise); ``sinkhorn`` is entropic, batched, in the log
            domain.
        epsilon: strength of the entropy, in the unit of the cost; ``sinkhorn`` only.

    Returns:
        ``distance`` [N] = <plan, cost> (without the entropy), ``plan`` [N n m] of mass 1,
        ``converged`` [N]. A pair with an empty window has distance and plan 0. Where Sinkhorn has
        converged, rows are exact and columns hold to ``TOLERANCE``; elsewhere the plan is rounded
        to exact marginals. No gradient flows through.

    Raises:
        TOPDError: shapes differ, a cost is not finite, or an option is out of range.

    Source: Flamary et al., POT, JMLR 2021; Peyre & Cuturi, Computational Optimal Transport, 4.4.

    >>> plan = solve(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])).plan
    >>> plan[0].tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    rows, columns = _masks(cost, student_mask, teacher_mask)
    both = rows[:, :, None] & columns[:, None, :]
    wide = cost.detach().to(wide_dtype(cost.device)).masked_fill(~both, 0.0)
    if not wide.isfinite().all():
        raise TOPDError("transport.solve: a cost is NaN or infinite. Check the embeddings.")
    if method == "exact":
        plan, converged = _exact(wide, rows, columns)
    elif method == "sinkhorn":
        if not 0 < epsilon < math.inf:
            raise TOPDError(f"transport.solve: epsilon = {epsilon} must be finite and above 0.")
        plan, converged = _sinkhorn(wide, rows, columns, epsilon)
    else:
        raise TOPDError(f"transport.solve: method {method!r} is not one of exact, sinkhorn.")
    distance = (plan * wide).sum((-1, -2))
    dtype = torch.promote_types(cost.dtype, torch.float32)
    return Transport(distance.to(dtype), plan.to(dtype), converged)


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
    rows = _row_distributions(plan)
    tokens = teacher_tokens.masked_fill(plan.sum(-2) == 0, 0)  # behind the mask anything may stand
    targets = rows.new_zeros(*plan.shape[:2], vocab_size)
    return targets.scatter_add(-1, tokens[:, None, :].expand(plan.shape), rows)


def sparse_soft_target(
    row: Float[Tensor, " m"], teacher_tokens: Int[Tensor, " m"]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """One row of :func:`soft_targets` as its support and its probabilities.

    Args:
        row: [m], a row of a plan with mass above 0.
        teacher_tokens: [m].

    Returns:
        Tokens in rising order and their probabilities, which sum to 1. Entries below 1e-9 of the
        row are left out.

    >>> sparse_soft_target(torch.tensor([0.1, 0.0, 0.3]), torch.tensor([7, 8, 7]))
    ((7,), (1.0,))
    """
    support = (row > 1e-9 * row.sum()).nonzero()[:, 0]  # solvers leave dust
    tokens, place = teacher_tokens[support].unique(return_inverse=True)
    mass = torch.zeros(len(tokens), dtype=torch.float64).index_add(0, place, row[support].double())
    return tuple(tokens.tolist()), tuple((mass / mass.sum()).tolist())


def sparse_plan(plan: Float[Tensor, "n m"]) -> tuple[tuple[int, int, float], ...]:
    """The entries of one plan that a person could see, row by row, for the run folder.

    Args:
        plan: [n m], of any mass.

    Returns:
        (i, j, mass), without entries below ``PLAN_DUST`` of their row: an exact plan is kept
        whole, an entropic one loses its haze.

    >>> sparse_plan(torch.tensor([[0.5, 0.0], [0.0, 0.5]]))
    ((0, 0, 0.5), (1, 1, 0.5))
    """
    entries = (plan > PLAN_DUST * plan.sum(-1, keepdim=True)).nonzero()
    mass = plan[entries[:, 0], entries[:, 1]].double()
    return tuple(
        (i, j, round(m, 9)) for (i, j), m in zip(entries.tolist(), mass.tolist(), strict=True)
    )


def _row_distributions(plan: Tensor) -> Tensor:
    mass = plan.sum(-1, keepdim=True)
    return torch.where(mass > 0, plan / mass.where(mass > 0, torch.ones_like(mass)), 0.0)


def _masks(cost: Tensor, student: Tensor | None, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    count, n, m = cost.shape
    rows = (
        torch.ones(count, n, dtype=torch.bool, device=cost.device) if student is None else student
    )
    columns = (
        torch.ones(count, m, dtype=torch.bool, device=cost.device) if teacher is None else teacher
    )
    if rows.shape != (count, n) or columns.shape != (count, m):
        raise TOPDError(
            f"transport.solve: masks {tuple(rows.shape)} and {tuple(columns.shape)} do not fit "
            f"the cost {tuple(cost.shape)}: rows are the student, columns the teacher."
        )
    return rows.bool(), columns.bool()


def _exact(cost: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    plan = np.zeros(cost.shape)
    converged = np.ones(len(cost), dtype=bool)
    windows = zip(cost.cpu().numpy(), rows.cpu().numpy(), columns.cpu().numpy(), strict=True)
    for k, (c, row, column) in enumerate(windows):
        block = np.ix_(row, column)
        plan[k][block], converged[k] = _exact_one(np.ascontiguousarray(c[block], dtype=np.float64))
    return (
        torch.from_numpy(plan).to(cost.device, cost.dtype),
        torch.from_numpy(converged).to(cost.device),
    )


def _exact_one(cost: np.ndarray) -> tuple[np.ndarray, bool]:
    """Plan of one window. Equal lengths: a vertex of the Birkhoff polytope, so an assignment."""
    n, m = cost.shape
    if n == 0 or m == 0:
        return np.zeros((n, m)), True
    if n == m:
        plan = np.zeros((n, n))
        plan[linear_sum_assignment(cost)] = 1 / n
        return plan, True
    plan, log = ot.emd(np.full(n, 1 / n), np.full(m, 1 / m), cost, log=True)
    return plan, log["warning"] is None


def _sinkhorn(cost: Tensor, rows: Tensor, columns: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Log-domain Sinkhorn: plan = exp(f + g - C / epsilon), rounded where it has not converged."""
    if cost.numel() == 0:
        return cost, torch.ones(len(cost), dtype=torch.bool, device=cost.device)
    log_a, log_b = _uniform(rows, cost).log(), _uniform(columns, cost).log()
    kernel = -cost / epsilon
    settled = ~rows.any(-1) | ~columns.any(-1)
    g = torch.zeros_like(log_b)
    for iteration in range(MAX_ITERATIONS):
        f = log_a - (kernel + _closed(g, columns)[:, None, :]).logsumexp(-1)
        excess = (kernel + _closed(f, rows)[:, :, None]).logsumexp(-2) + g - log_b
        error = excess.expm1().abs().masked_fill(~columns, 0.0).amax(-1)
        converged = settled | (error <= TOLERANCE)
        if iteration % 10 == 0 and converged.all():  # the only host sync of the loop
            break
        # a window stops when it has converged, so that its plan does not depend on the batch
        g = torch.where(converged[:, None], g, g - excess)
    both = rows[:, :, None] & columns[:, None, :]
    plan = (kernel + f[:, :, None] + g[:, None, :]).exp().masked_fill(~both, 0.0)
    rounded = _rounded(plan, _uniform(rows, plan), _uniform(columns, plan))
    return torch.where(converged[:, None, None], plan, rounded), converged


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


def _closed(potential: Tensor, mask: Tensor) -> Tensor:
    return potential.masked_fill(~mask, -math.inf)


def _uniform(mask: Tensor, like: Tensor) -> Tensor:
    """1 / count on the mask, 0 elsewhere."""
    return mask.to(like.dtype) / mask.sum(-1, keepdim=True).clamp(min=1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
