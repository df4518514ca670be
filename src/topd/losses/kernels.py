"""The passes over a chunk's logits as Triton kernels: each logit is read twice and written once.

What :func:`topd.losses.chunked._block` does in a dozen passes over float32 copies takes two here.
The first reads student's and teacher's row together and keeps running maxima, masses and sums
(Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867). The second
writes the slope over the student's logits. A JSD reads once more in between, since its mixture
needs both normalizers. Sums are in float32, and of gaps to the maxima, so that an offset between
the two models' logits costs no digits. A row is one program's: nothing depends on their order.

Importing this needs Triton.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from topd.losses.terms import LEAST, Task, TokenTerms, Upstream
from topd.types import Head

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels on the CPU
OLDEST = (8, 0)  # compute capability: earlier cards have no bfloat16
KINDS = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2}

ANY = ("rows", "columns", "breadth")  # sizes that are not worth code of their own

# columns and warps a program: the fastest of bench.loss_gpu's tiles on an H200
READ_BLOCK, READ_WARPS = 1024, 4
WRITE_BLOCK, WRITE_WARPS = 2048, 8
OWN_LEAST = 32  # places a row, a warp: fewer would be compiled apart, and are no faster

# rows of what the first pass finds [7 r]: maxima and log masses over them, values, slope's centre
TOP_S, MASS_S, TOP_T, MASS_T, VALUE, ENTROPY, CENTRE = range(7)


def serves(logits: Tensor, task: Task) -> bool:
    """Whether the kernels do this case; all others take the eager path.

    They run on GPUs, in up to float32. Not with a bias: its -inf bars tokens on one side only.
    """
    biased = task.student.bias is not None or task.teacher.bias is not None
    if biased or logits.dtype == torch.float64:
        return False
    return runs_on(logits.device)


def runs_on(device: torch.device) -> bool:
    """Whether Triton kernels run on a device: GPUs that have bfloat16, or interpreted."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= OLDEST
    return INTERPRETED


def block(
    logits: Tensor,
    teacher: Tensor,
    here: slice,
    task: Task,
    upstream: Upstream | None,
    values: TokenTerms,
) -> None:
    """As :func:`topd.losses.chunked._block`, but the slope is written over ``logits`` [r V].

    Without ``upstream`` the logits stay as they are.
    """
    places = torch.cat([task.tokens[here, None], task.target_tokens[here]], 1)
    shape, found = _shape(task, logits), logits.new_empty(7, len(logits), dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _read(logits, teacher, found, task, shape)
        values.divergence[here], values.entropy[here] = found[VALUE], found[ENTROPY]
        at = logits.gather(1, places)
        logprobs = _known(at, places, task, found)
        values.logprob[here], values.target_logprobs[here] = logprobs[:, 0], logprobs[:, 1:]
        if upstream is not None:
            factors = _factors(upstream.at(here, logprobs[:, 0]), places)
            _write(logits, teacher, at, places, factors, found, shape)


def _shape(task: Task, logits: Tensor) -> dict[str, Any]:
    """What all kernels are told about the heads and the divergence."""
    barred = task.student.barred
    s_in, s_out = _curve(task.student, task.temperature)
    t_in, t_out = _curve(task.teacher, task.temperature)
    return {
        "barred": logits if barred is None else barred.view(torch.uint8),
        "vocab": logits.shape[1],
        "s_in": s_in,
        "s_out": s_out,
        "t_in": t_in,
        "t_out": t_out,
        "beta": task.beta,
        "s_capped": task.student.softcap is not None,
        "t_capped": task.teacher.softcap is not None,
        "bars": barred is not None,
        "kind": KINDS[task.kind],
    }


def _curve(head: Head, temperature: float) -> tuple[float, float]:
    """Factors before and after the tanh of the soft-cap; without one, their product and 1."""
    if head.softcap is None:
        return head.scale / temperature, 1.0
    return head.scale / head.softcap, head.softcap / temperature


def _read(
    logits: Tensor, teacher: Tensor, found: Tensor, task: Task, shape: dict[str, Any]
) -> None:
    """The first pass, and what a JSD needs besides."""
    rows = len(logits)
    strides = {"s_stride": logits.stride(0), "t_stride": teacher.stride(0), "rows": rows}
    options = {"block": _width(READ_BLOCK, logits), "num_warps": READ_WARPS}
    _summaries[(rows,)](logits, teacher, found, **strides, **shape, **options)
    if task.kind == "jsd":
        _mixtures[(rows,)](logits, teacher, found, **strides, **shape, **options)


def _write(
    logits: Tensor,
    teacher: Tensor,
    at: Tensor,
    places: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    found: Tensor,
    shape: dict[str, Any],
) -> None:
    """The second pass; then the few places where a token's own log-prob counts, all summands."""
    divergence, own, total = factors
    rows, breadth = places.shape
    width = _width(WRITE_BLOCK, logits)
    columns = triton.cdiv(logits.shape[1], width)
    theirs = teacher.gather(1, places)
    strides = {"s_stride": logits.stride(0), "t_stride": teacher.stride(0), "rows": rows}
    _slopes[(rows * columns,)](
        *(logits, teacher, found, divergence, total),
        **strides,
        **shape,
        columns=columns,
        block=width,
        num_warps=WRITE_WARPS,
    )
    if own.numel():
        width = max(OWN_LEAST, triton.next_power_of_2(breadth))
        _own_slopes[(rows,)](
            *(logits, at, theirs, places, own, found, divergence, total),
            breadth=breadth,
            s_stride=logits.stride(0),
            rows=rows,
            **shape,
            block=width,
            num_warps=4 if width <= 1024 else 8,
        )


def _width(most: int, logits: Tensor) -> int:
    return min(most, triton.next_power_of_2(logits.shape[1]))


def _known(at: Tensor, places: Tensor, task: Task, found: Tensor) -> Tensor:
    """Log-probs [r 1+M] of the raw logits at some places."""
    wide, (before, after) = at.float(), _curve(task.student, task.temperature)
    wide = wide * before
    if task.student.softcap is not None:
        wide = after * torch.tanh(wide)
    logprobs = wide - found[TOP_S, :, None] - found[MASS_S, :, None]
    if task.student.barred is None:
        return logprobs
    return logprobs.masked_fill(task.student.barred[places], LEAST)


def _factors(upstream: Upstream, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the divergence [r]; of the log-probs at the places [r 1+M], or empty; their sums [r]."""
    rows, breadth = places.shape
    zero = torch.zeros(rows, dtype=torch.float32, device=places.device)
    divergence = zero if upstream.divergence is None else upstream.divergence.float()
    if upstream.logprob is None and upstream.target_logprobs is None:
        return divergence.contiguous(), zero[:0], zero
    own = zero.new_zeros(rows, breadth)
    if upstream.logprob is not None:
        own[:, 0] = upstream.logprob
    if upstream.target_logprobs is not None:
        own[:, 1:] = upstream.target_logprobs
    return divergence.contiguous(), own, own.sum(1)


@triton.jit
def _logit(raw, before, after, capped: tl.constexpr):
    """A raw logit over temperature, scaled and soft-capped; and its derivative by the raw one."""
    x = raw.to(tl.float32) * before
    slope = before + tl.zeros_like(x)
    if capped:
        shrunk = tl.exp(-2.0 * tl.abs(x))
        bounded = (1.0 - shrunk) / (1.0 + shrunk)
        bounded = tl.where(x < 0, -bounded, bounded)
        slope = after * before * (1.0 - bounded * bounded)
        x = after * bounded
    return x, slope


@triton.jit
def _mixed(log_s, log_t, beta):
    """log of beta p_T + (1 - beta) p_S."""
    one, other = log_s + tl.log(1.0 - beta), log_t + tl.log(beta)
    return tl.maximum(one, other) + tl.log(1.0 + tl.exp(-tl.abs(one - other)))


@triton.jit
def _slope(
    raw_s, raw_t, keep, own, found, row, rows, factor, total,
    s_in, s_out, t_in, t_out, beta,
    s_capped: tl.constexpr, t_capped: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """The loss's derivative by raw student logits; ``own`` are the factors of their log-probs."""
    s, bend = _logit(raw_s, s_in, s_out, s_capped)
    t, _ = _logit(raw_t, t_in, t_out, t_capped)
    log_s = (s - tl.load(found + row)) - tl.load(found + rows + row)
    log_t = (t - tl.load(found + 2 * rows + row)) - tl.load(found + 3 * rows + row)
    p = tl.exp(log_s)
    if kind == 1:
        slope = p - tl.exp(log_t)
    else:
        centre = tl.load(found + 6 * rows + row)
        if kind == 2:
            slope = (1.0 - beta) * p * (log_s - _mixed(log_s, log_t, beta) - centre)
        else:
            slope = p * (log_s - log_t - centre)
    return tl.where(keep, bend * (factor * slope + (own - total * p)), 0.0)


@triton.jit(do_not_specialize=ANY)
def _summaries(
    student, teacher, found, barred, vocab, rows, s_stride, t_stride,
    s_in, s_out, t_in, t_out, beta,
    s_capped: tl.constexpr, t_capped: tl.constexpr, bars: tl.constexpr, kind: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Both normalizers, the entropy, and a KL as E[log p - log q], in one read of a row."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, block)
    top_s = -1.0e30
    top_t = -1.0e30
    mass_s = tl.zeros([block], tl.float32)
    mass_t = tl.zeros([block], tl.float32)
    gaps = tl.zeros([block], tl.float32)
    below = tl.zeros([block], tl.float32)
    for first in range(0, vocab, block):
        column = first + lanes
        keep = column < vocab
        raw_s = tl.load(student + row * s_stride + column, mask=keep, other=0.0)
        raw_t = tl.load(teacher + row * t_stride + column, mask=keep, other=0.0)
        if bars:
            keep = keep & (tl.load(barred + column, mask=keep, other=1) == 0)
        s, _ = _logit(raw_s, s_in, s_out, s_capped)
        t, _ = _logit(raw_t, t_in, t_out, t_capped)
        s = tl.where(keep, s, -float("inf"))
        t = tl.where(keep, t, -float("inf"))
        new_s = tl.maximum(top_s, tl.max(s, 0))
        new_t = tl.maximum(top_t, tl.max(t, 0))
        up_s = top_s - new_s  # sums are of gaps to the maxima: these move
        up_t = top_t - new_t
        s -= new_s
        t -= new_t
        e_s = tl.exp(s)
        e_t = tl.exp(t)
        if kind == 1:
            gaps = tl.exp(up_t) * (gaps + mass_t * (up_t - up_s))
            gaps += tl.where(keep, e_t * (t - s), 0.0)
        else:
            gaps = tl.exp(up_s) * (gaps + mass_s * (up_s - up_t))
            gaps += tl.where(keep, e_s * (s - t), 0.0)
        below = tl.exp(up_s) * (below + mass_s * up_s) + tl.where(keep, e_s * s, 0.0)
        mass_s = tl.exp(up_s) * mass_s + e_s
        mass_t = tl.exp(up_t) * mass_t + e_t
        top_s = new_s
        top_t = new_t
    all_s = tl.sum(mass_s, 0)
    all_t = tl.sum(mass_t, 0)
    log_s = tl.log(all_s)
    log_t = tl.log(all_t)
    if kind == 1:
        value = tl.sum(gaps, 0) / all_t - (log_t - log_s)
    else:
        value = tl.sum(gaps, 0) / all_s - (log_s - log_t)
    tl.store(found + row, top_s)
    tl.store(found + rows + row, log_s)
    tl.store(found + 2 * rows + row, top_t)
    tl.store(found + 3 * rows + row, log_t)
    tl.store(found + 4 * rows + row, value)
    tl.store(found + 5 * rows + row, log_s - tl.sum(below, 0) / all_s)
    tl.store(found + 6 * rows + row, value)


@triton.jit(do_not_specialize=ANY)
def _mixtures(
    student, teacher, found, barred, vocab, rows, s_stride, t_stride,
    s_in, s_out, t_in, t_out, beta,
    s_capped: tl.constexpr, t_capped: tl.constexpr, bars: tl.constexpr, kind: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """The generalised JSD of a row, and KL(p_S || m), which its slope needs."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, block)
    own = tl.zeros([block], tl.float32)
    theirs = tl.zeros([block], tl.float32)
    top_s = tl.load(found + row)
    mass_s = tl.load(found + rows + row)
    top_t = tl.load(found + 2 * rows + row)
    mass_t = tl.load(found + 3 * rows + row)
    for first in range(0, vocab, block):
        column = first + lanes
        keep = column < vocab
        raw_s = tl.load(student + row * s_stride + column, mask=keep, other=0.0)
        raw_t = tl.load(teacher + row * t_stride + column, mask=keep, other=0.0)
        if bars:
            keep = keep & (tl.load(barred + column, mask=keep, other=1) == 0)
        s, _ = _logit(raw_s, s_in, s_out, s_capped)
        t, _ = _logit(raw_t, t_in, t_out, t_capped)
        log_s = (s - top_s) - mass_s
        log_t = (t - top_t) - mass_t
        mixed = _mixed(log_s, log_t, beta)
        own += tl.where(keep, tl.exp(log_s) * (log_s - mixed), 0.0)
        theirs += tl.where(keep, tl.exp(log_t) * (log_t - mixed), 0.0)
    centre = tl.sum(own, 0)
    tl.store(found + 4 * rows + row, beta * tl.sum(theirs, 0) + (1.0 - beta) * centre)
    tl.store(found + 6 * rows + row, centre)


@triton.jit(do_not_specialize=ANY)
def _slopes(
    student, teacher, found, factors, totals, barred, vocab, rows, s_stride, t_stride,
    s_in, s_out, t_in, t_out, beta, columns,
    s_capped: tl.constexpr, t_capped: tl.constexpr, bars: tl.constexpr, kind: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """The slope of some columns of a row, over the student's logits."""
    row = (tl.program_id(0) // columns).to(tl.int64)
    column = (tl.program_id(0) % columns) * block + tl.arange(0, block)
    inside = column < vocab
    keep = inside
    if bars:
        keep = keep & (tl.load(barred + column, mask=inside, other=1) == 0)
    place = student + row * s_stride + column
    raw_s = tl.load(place, mask=inside, other=0.0)
    raw_t = tl.load(teacher + row * t_stride + column, mask=inside, other=0.0)
    slope = _slope(
        raw_s, raw_t, keep, 0.0, found, row, rows,
        tl.load(factors + row), tl.load(totals + row),
        s_in, s_out, t_in, t_out, beta, s_capped, t_capped, kind,
    )  # fmt: skip
    tl.store(place, slope.to(student.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=ANY)
def _own_slopes(
    student, raw_student, raw_teacher, places, own, found, factors, totals, barred, vocab, rows,
    s_stride, s_in, s_out, t_in, t_out, beta, breadth,
    s_capped: tl.constexpr, t_capped: tl.constexpr, bars: tl.constexpr, kind: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """The slope where log-probs have factors of their own; a place named twice has their sum."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, block)
    inside = lanes < breadth
    base = row * breadth
    place = tl.load(places + base + lanes, mask=inside, other=0)
    keep = inside
    if bars:
        keep = keep & (tl.load(barred + place, mask=inside, other=1) == 0)
    summed = tl.zeros([block], tl.float32)
    for other in range(0, breadth):
        here = tl.load(places + base + other)
        summed += tl.where(place == here, tl.load(own + base + other), 0.0)
    slope = _slope(
        tl.load(raw_student + base + lanes, mask=inside, other=0.0),
        tl.load(raw_teacher + base + lanes, mask=inside, other=0.0),
        keep, summed, found, row, rows, tl.load(factors + row), tl.load(totals + row),
        s_in, s_out, t_in, t_out, beta, s_capped, t_capped, kind,
    )  # fmt: skip
    at = student + row * s_stride + place
    tl.store(at, slope.to(student.dtype.element_ty), mask=inside)
