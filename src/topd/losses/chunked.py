"""The vocabulary in tiles: values and gradients of a head's terms without [P V].

Logits exist for a chunk of tokens at a time. What stands between logits and their gradient is
elementwise and bound by memory, so it runs on blocks of rows that stay in the CPU's cache, and
writes the gradient over the logits. The products with the head see the whole chunk.

The gradient of a sum of terms needs the factor of every term, which a loss makes known only in
the backward pass. It is computed at once in the forward pass for the factors that the caller
expects. If they come true up to a common factor the gradient is scaled by it; if not, the chunks
are computed once more. So they are in float16 always: a loss is scaled there so that its gradients
are none of float16's zeros, and by how much is known in the backward pass only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from topd.errors import compiler_faults, first_line
from topd.losses.terms import LEAST, Kind, Task, TokenTerms, Upstream
from topd.types import Head, autocast_dtype

try:
    from topd.losses import kernels
except ImportError:  # no Triton here
    kernels = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

ROUNDING = 1e-6  # relative: a few roundings of float32
BLOCK = 1 << 17  # logits a block on the CPU: half a megabyte, a few of which fit into its cache


class Gradients(NamedTuple):
    """By hidden states [P D], head weight [V D] and bias [V]; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def head_terms(hidden: Float[Tensor, "P D"], task: Task) -> TokenTerms:
    """The terms of all tokens. Gradients flow to ``hidden`` and the student's head, once."""
    head = task.student
    inputs = hidden, head.weight, head.bias
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)):
        with torch.no_grad(), _without_autocast(hidden):
            return _compute(*inputs, task, None, (False,) * 3)[0]
    return TokenTerms(*_HeadTerms.apply(*inputs, task))


class _HeadTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: Task
    ) -> tuple[Tensor, ...]:
        ctx.task, ctx.needed = task, ctx.needs_input_grad[:3]
        ctx.save_for_backward(hidden, weight, bias)
        ctx.dtype = _compute_dtype(hidden)
        expected = None if ctx.dtype == torch.float16 else task.expected
        with _without_autocast(hidden):
            values, ready = _compute(hidden, weight, bias, task, expected, ctx.needed, ctx.dtype)
        ctx.ready = ready if expected else None
        ctx.expected = expected and expected.at(slice(None), values.logprob)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(values.entropy)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *factors: Tensor | None) -> tuple[Tensor | None, ...]:
        actual = Upstream(factors[0], factors[2], factors[3])
        hidden, weight, bias = ctx.saved_tensors
        found = _scaled(ctx, actual)
        ctx.ready = None  # scaled in place
        if found is None:
            with torch.no_grad(), _without_autocast(hidden):
                _, found = _compute(hidden, weight, bias, ctx.task, actual, ctx.needed, ctx.dtype)
        given = zip(found, (hidden, weight, bias), strict=True)
        return *(None if g is None else g.to(x.dtype) for g, x in given), None


def _scaled(ctx: Any, actual: Upstream) -> Gradients | None:
    """The gradients for the actual factors, if these are a multiple of the expected ones.

    If that was promised nobody waits for the device to compare them: gradients of a promise that
    was not kept are NaN.
    """
    like = ctx.task.target_tokens
    if ctx.ready is None or not len(like):
        return None
    learns = ctx.needed[1] or ctx.needed[2]
    scale, kept = common_factor(actual.flat(like), ctx.expected.flat(like), per_token=not learns)
    if ctx.task.promised:
        scale = scale.where(kept, math.nan)
    elif not kept:
        return None
    scale = scale.reshape(()) if learns else scale  # a bias has one axis
    return Gradients(*(None if g is None else g.mul_(scale.to(g.dtype)) for g in ctx.ready))


def common_factor(
    actual: Float[Tensor, "P F"], expected: Float[Tensor, "P F"], *, per_token: bool
) -> tuple[Tensor, Bool[Tensor, ""]]:
    """c with actual = c expected, and whether that holds up to float32's rounding.

    c is one number, or one a token [P 1] if ``per_token``.
    """
    axes: tuple[int, ...] = (1,) if per_token else (0, 1)
    norm = (expected * expected).sum(axes, keepdim=True)
    factor = (actual * expected).sum(axes, keepdim=True) / norm.where(norm > 0, 1.0)
    gap = (actual - factor * expected).abs().amax(axes, keepdim=True)
    rounding = ROUNDING if actual.dtype == torch.float64 else 4 * ROUNDING  # sums have it too
    tolerance = rounding * actual.abs().amax(axes, keepdim=True)
    return factor, (gap <= tolerance).all()


def _compute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task: Task,
    upstream: Upstream | None,
    needed: tuple[bool, ...],
    dtype: torch.dtype | None = None,
) -> tuple[TokenTerms, Gradients]:
    """TokenTerms, and the gradients for the given factors (none without factors)."""
    dtype = dtype or _compute_dtype(hidden)
    wide = torch.promote_types(dtype, torch.float32)
    weight, teacher_logits = weight.to(dtype), task.teacher.raw(dtype)
    bias = None if bias is None else bias.to(dtype)
    values = _empty(task, wide)
    gradients = _zeros(hidden, weight, needed if upstream else (False,) * 3)
    for rows in _slices(len(hidden), task.chunk_tokens):
        states = hidden[rows].to(dtype)
        logits = linear(states, weight, bias)
        teacher = teacher_logits(task.teacher_hidden[rows])
        _chunk(logits, teacher, rows, task, upstream, values)
        del teacher
        if upstream:
            _add_products(gradients, rows, logits, states, weight)
    return values, gradients


def _chunk(
    logits: Tensor,
    teacher: Tensor,
    rows: slice,
    task: Task,
    upstream: Upstream | None,
    values: TokenTerms,
) -> None:
    """Fill in the values of a chunk; write the derivative of its loss over ``logits`` [c V]."""
    if _kernels_serve(logits, task):
        return kernels.block(logits, teacher, rows, task, upstream, values)
    step = max(1, BLOCK // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for part in _slices(len(logits), step):
        here = slice(rows.start + part.start, rows.start + part.stop)
        slope = _block(logits[part], teacher[part], here, task, upstream, values)
        if slope is not None:
            logits[part] = slope


def _kernels_serve(logits: Tensor, task: Task) -> bool:
    """Whether Triton kernels do this case; before they are used they are tried."""
    if kernels is None or not kernels.serves(logits, task):
        return False
    curves = tuple((head.scale, head.softcap) for head in (task.student, task.teacher))
    return _tried(logits.device, logits.dtype, task.kind, task.temperature, curves)


@cache
def _tried(
    device: torch.device,
    dtype: torch.dtype,
    kind: Kind,
    temperature: float,
    curves: tuple[tuple[float, float | None], ...],
) -> bool:
    """Whether the kernels give what the eager path gives on a small example; if not, it is said."""
    some = torch.Generator().manual_seed(0)
    rows, vocab = 3, 2100
    logits, teacher = torch.randn(2, rows, vocab, generator=some).to(device, dtype)
    heads = [Head(logits.new_empty(vocab, 1), scale=scale, softcap=cap) for scale, cap in curves]
    tokens, ones = torch.tensor([0, 5, 2099], device=device), logits.new_ones(rows)
    task = Task(
        *(*heads, logits[:, :1], tokens, tokens[:, None].clone(), kind, 0.5, temperature, rows)
    )
    upstream, here = Upstream(ones, ones, ones[:, None]), slice(0, rows)
    values, expected = (_empty(task, torch.float32) for _ in range(2))
    slope = _block(logits, teacher, here, task, upstream, expected)
    assert slope is not None
    try:
        kernels.block(logits, teacher, here, task, upstream, values)
        pairs = zip(values, expected, strict=True)
        gaps = [logits - slope, *((x - y) / (1 + y.abs()) for x, y in pairs)]
        gap = float(torch.cat([x.float().flatten() for x in gaps]).abs().max())
    except compiler_faults() as fault:
        logger.warning(f"the loss without kernels ({first_line(fault)}): slower.")
        return False
    if gap <= (1e-4 if dtype == torch.float32 else 0.05):
        return True
    logger.warning(f"the loss without kernels: they are off by {gap:.2g}. It is slower.")
    return False


def _block(
    logits: Tensor,
    teacher: Tensor,
    here: slice,
    task: Task,
    upstream: Upstream | None,
    values: TokenTerms,
) -> Tensor | None:
    """Fill in the values of some rows; return the derivative of their loss by ``logits`` [r V]."""
    log_s, bend = _log_probs(logits, task.student, task.temperature)
    log_t, _ = _log_probs(teacher, task.teacher, task.temperature)
    p = log_s.exp()
    apart = _impossible(log_s, log_t, task)
    divergence, slope = divergence_and_slope(log_s, log_t, p, task.kind, task.beta)
    if apart is not None:
        divergence = divergence.masked_fill(apart, math.inf)
    token, targets = task.tokens[here, None], task.target_tokens[here]
    values.divergence[here] = divergence
    values.entropy[here] = -_expectation(p, log_s)
    values.logprob[here] = log_s.gather(1, token)[:, 0]
    values.target_logprobs[here] = log_s.gather(1, targets)
    if upstream is None:
        return None
    upstream = upstream.at(here, values.logprob[here])
    slope *= 0.0 if upstream.divergence is None else upstream.divergence[:, None].to(p.dtype)
    for factor, places in ((upstream.logprob, token), (upstream.target_logprobs, targets)):
        if factor is not None and places.shape[1]:
            own = factor.reshape(places.shape).to(p.dtype)
            _add_at(slope.addcmul_(p, own.sum(1, keepdim=True), value=-1), places, own)
    constant = task.student.scale / task.temperature
    if constant != 1.0:
        slope.mul_(constant)
    return slope if bend is None else slope.mul_(bend)


def _add_at(slope: Tensor, places: Tensor, own: Tensor) -> None:
    """Add ``own`` [r M] at those places of each row, which may be named twice."""
    if slope.device.type == "cpu":
        slope.scatter_add_(1, places, own)
    else:  # in one order
        rows = torch.arange(len(slope), device=slope.device)[:, None]
        slope.index_put_((rows, places), own, accumulate=True)


def _log_probs(logits: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor | None]:
    """log softmax of raw logits, scaled and soft-capped; and the soft-cap's derivative."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if head.scale != 1.0:
        wide = wide * head.scale
    bend = None
    if head.softcap is not None:
        bounded = torch.tanh(wide / head.softcap)
        wide, bend = head.softcap * bounded, 1 - bounded.square()
    if head.barred is not None:
        wide = wide.masked_fill(head.barred, -math.inf)
    logprobs = torch.log_softmax(wide if temperature == 1.0 else wide / temperature, -1)
    if head.bars:
        logprobs.clamp_(min=LEAST)
    return logprobs, bend


def _impossible(log_s: Tensor, log_t: Tensor, task: Task) -> Tensor | None:
    """[r], where a divergence is infinite: one side takes for possible what the other bars."""
    if task.kind == "jsd" or not (task.student.bars or task.teacher.bars):
        return None
    mine, theirs = (log_s, log_t) if task.kind == "reverse_kl" else (log_t, log_s)
    return ((theirs <= LEAST) & (mine > LEAST)).any(1)


def divergence_and_slope(
    log_s: Tensor, log_t: Tensor, p: Tensor, kind: Kind, beta: float
) -> tuple[Tensor, Tensor]:
    """Divergence [r] and its derivative by the student's logits [r V]. Overwrites ``log_t``.

    Reverse KL: p_S (g - <p_S, g>) with g = log p_S - log p_T. Forward KL: p_S - p_T. JSD: as
    reverse KL with the mixture for p_T, times 1 - beta; what moves the mixture itself cancels.
    """
    if kind == "reverse_kl":
        return _against(log_s, log_t, p)
    q = log_t.exp()
    if kind == "forward_kl":
        return _expectation(q, log_t.sub_(log_s)), p - q
    mixture = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    theirs = _expectation(q, log_t.sub_(mixture))
    own, slope = _against(log_s, mixture, p)
    return beta * theirs + (1 - beta) * own, slope.mul_(1 - beta)


def _against(log_s: Tensor, log_q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p_S || q) and its derivative by the student's logits. Overwrites ``log_q``."""
    gap = torch.sub(log_s, log_q, out=log_q)
    value = _expectation(p, gap)
    return value, gap.sub_(value[:, None]).mul_(p)


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    return (p * x).sum(1)


def _add_products(
    gradients: Gradients, rows: slice, slope: Tensor, states: Tensor, weight: Tensor
) -> None:
    """Add a chunk's share: the slope [c V] by the head's rows, and by the states."""
    if gradients.hidden is not None:
        gradients.hidden[rows] = slope @ weight
    if gradients.weight is not None:
        if gradients.weight.dtype == slope.dtype:
            gradients.weight.addmm_(slope.T, states)
        elif adds_wide(slope.device, slope.dtype):
            total = gradients.weight
            torch.addmm(total, slope.T, states, out_dtype=total.dtype, out=total)
        else:
            gradients.weight.add_(slope.T @ states)
    if gradients.bias is not None:
        gradients.bias.add_(slope.sum(0, dtype=gradients.bias.dtype))


@cache
def adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of narrow matrices can be added to a float32 one without a copy.

    cuBLAS can, from torch 2.8 or 2.9 on; it is tried, once.
    """
    if device.type != "cuda":
        return False
    one, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, one, one, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def _empty(task: Task, dtype: torch.dtype) -> TokenTerms:
    made = partial(task.teacher_hidden.new_empty, dtype=dtype)
    count, breadth = task.target_tokens.shape
    return TokenTerms(made(count), made(count), made(count), made(count, breadth))


def _zeros(hidden: Tensor, weight: Tensor, needed: tuple[bool, ...]) -> Gradients:
    """Where gradients are summed, in at least float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return Gradients(
        torch.empty_like(hidden) if needed[0] else None,
        torch.zeros_like(weight, dtype=wide) if needed[1] else None,
        weight.new_zeros(len(weight), dtype=wide) if needed[2] else None,
    )


def _slices(count: int, step: int) -> Iterator[slice]:
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    return autocast_dtype(hidden.device) or hidden.dtype


def _without_autocast(hidden: Tensor) -> torch.autocast:
    return torch.autocast(hidden.device.type, enabled=False)
