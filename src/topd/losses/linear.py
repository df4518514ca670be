"""Divergences, statistics and log-probs from hidden states, whose logits are never held whole."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Linear

from topd.errors import TOPDError
from topd.losses.chunked import head_terms
from topd.losses.dense import check_divergence, check_temperature, kl, log_softmax
from topd.losses.terms import Kind, Task, TokenTerms, Upstream, check_same_tokens
from topd.types import Head


def linear_token_terms(
    student_hidden: Float[Tensor, "P D"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "P E"],
    teacher_head: Head,
    tokens: Int[Tensor, " P"],
    target_tokens: Int[Tensor, "P M"],
    *,
    kind: Kind = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    expected: Upstream | None = None,
    promised: bool = False,
) -> TokenTerms:
    """Everything the training loss needs, from hidden states, ``chunk_tokens`` tokens at a time.

    At most one chunk of logits [chunk_tokens V] of each model is alive. Value and gradient are
    those of the unchunked formula; nothing flows to the teacher.

    Args:
        student_hidden: [P D], last hidden states that predict the tokens.
        student_head: the student's head; its padded vocabulary rows are ignored.
        teacher_hidden: [P E], the teacher's; its width may differ.
        teacher_head: the teacher's head. Rows that either head bars are no tokens: they have
            probability 0 on both sides.
        tokens: [P], the tokens that are there.
        target_tokens: [P M], support of the soft targets (any token where there is none).
        kind: as in :func:`token_divergence`.
        beta: likewise.
        temperature: likewise.
        chunk_tokens: tokens a chunk.
        expected: by what the loss will multiply each term, up to one common factor. The gradient
            is then computed with the values, in one pass. Without it, or if the loss does
            otherwise, the backward pass computes each chunk again: slower, and equal.
        promised: the loss is sure to do so. The backward pass then does not wait for the device to
            see whether it did; if it did not, gradients are NaN.

    Raises:
        TOPDError: kind, beta, temperature or chunk_tokens are out of range, or the tensors are not
            of the same tokens.
    """
    check_divergence(kind, beta, temperature)
    _check_chunk(chunk_tokens)
    check_same_tokens(
        *(x.shape[:1] for x in (student_hidden, teacher_hidden, tokens, target_tokens))
    )
    heads = _on_one_vocabulary(student_head, teacher_head)
    given = *heads, teacher_hidden, tokens, target_tokens
    task = Task(*given, kind, beta, temperature, chunk_tokens, expected, promised)
    return head_terms(student_hidden, task)


def linear_token_divergence(
    student_hidden: Float[Tensor, "*B D"],
    student_head: Head | Linear | Tensor,
    teacher_hidden: Float[Tensor, "*B E"],
    teacher_head: Head | Linear | Tensor,
    *,
    kind: Kind = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> Float[Tensor, "*B"]:
    """:func:`token_divergence` of the logits h W^T, which are never held whole.

    Args:
        student_hidden: [B T D] (any leading axes).
        student_head: [V D], a Linear, or a :class:`~topd.types.Head` with scale and soft-cap.
        teacher_hidden: [B T E].
        teacher_head: [V E], a Linear or a Head. Where one vocabulary is longer, its last rows are
            padding.
        kind: as in :func:`token_divergence`.
        beta: likewise.
        temperature: likewise.
        chunk_tokens: tokens whose logits are alive at a time.

    Returns:
        [B T], nats, value and gradient as if the logits had been held; nothing flows to the
        teacher. Fastest where the loss is a multiple of the sum.

    Raises:
        TOPDError: kind, beta, temperature or chunk_tokens are out of range, or the tensors are not
            of the same tokens.
    """
    shape = student_hidden.shape[:-1]
    check_same_tokens(shape, teacher_hidden.shape[:-1])
    none = torch.zeros(shape.numel(), 0, dtype=torch.long, device=student_hidden.device)
    terms = linear_token_terms(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        _as_head(student_head),
        teacher_hidden.reshape(-1, teacher_hidden.shape[-1]),
        _as_head(teacher_head),
        none.new_zeros(shape.numel()),
        none,
        kind=kind,
        beta=beta,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        expected=Upstream(student_hidden.new_ones(shape.numel()), None, None),
    )
    return terms.divergence.reshape(shape)


_LEAST = 1e-8  # of a noise that is divided by


def linear_token_statistics(
    student_hidden: Float[Tensor, "P D"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "P E"],
    teacher_head: Head,
    *,
    temperature: float = 1.0,
    candidates: int = 16,
    chunk_tokens: int = 1024,
) -> Float[Tensor, "6 P"]:
    """What methods that weigh tokens look at: :class:`topd.types.TokenStatistics`, a row each.

    Args:
        student_hidden: as in :func:`linear_token_terms`.
        student_head: likewise.
        teacher_hidden: likewise.
        teacher_head: likewise.
        temperature: divides both logits.
        candidates: how many tokens of either model are its likeliest.
        chunk_tokens: tokens whose logits are alive at a time.

    Returns:
        [6 P]: KL(p_S || p_T), the student's entropy, KL(p_T || p_S) on the union of the likeliest
        tokens (all nats), p_T's mass on the student's, the teacher's entropy (nats), and the
        information-efficiency ratio of a sampled reverse KL on that union,

            signal / (sum_v (1 - p_v) (c_v - b)^2 - signal),   signal = Var_p(c)

        with c = log p_S - log p_T and b = sum_v (1 - p_v) c_v / sum_v (1 - p_v), its best baseline
        (arXiv 2609.24432). Meant for use without gradients.

    Raises:
        TOPDError: temperature or chunk_tokens are out of range, or the tensors are not of the same
            tokens.
    """
    _check_chunk(chunk_tokens)
    check_temperature(temperature)
    check_same_tokens(student_hidden.shape[:1], teacher_hidden.shape[:1])
    student_head, teacher_head = _on_one_vocabulary(student_head, teacher_head)
    parts = []
    hidden = zip(
        student_hidden.split(chunk_tokens), teacher_hidden.split(chunk_tokens), strict=True
    )
    for own, other in hidden:
        log_s = log_softmax(student_head.logits(own), temperature)
        log_t = log_softmax(teacher_head.logits(other), temperature)
        parts.append(_statistics(log_s, log_t, min(candidates, student_head.vocab_size)))
    return torch.cat(parts, dim=-1)


def _statistics(log_s: Tensor, log_t: Tensor, candidates: int) -> Tensor:
    ours, theirs = (x.topk(candidates, dim=-1).indices for x in (log_s, log_t))
    rest = torch.ones_like(log_s, dtype=torch.bool).scatter(-1, ours, False)
    mass = log_t.masked_fill(rest, -math.inf).logsumexp(-1).exp()
    rest = rest.scatter(-1, theirs, False)
    theirs, ours = (x.masked_fill(rest, -math.inf).log_softmax(-1) for x in (log_t, log_s))
    entropies = [torch.special.entr(x.exp()).sum(-1) for x in (log_s, log_t)]
    reliable = _efficiency(ours, theirs)
    return torch.stack(
        [kl(log_s, log_t), entropies[0], kl(theirs, ours), mass, entropies[1], reliable]
    )


def _efficiency(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Signal over noise of the reverse KL's gradient from one sample of p, with its best baseline.

    Log ratios are held within 30 nats, as in the released code of arXiv 2609.24432.
    """
    never, p = log_p == -math.inf, log_p.exp()
    rest = (1 - p).masked_fill(never, 0.0)
    ratio = (log_p - log_q).masked_fill(never, 0.0).clamp(-30, 30)
    mean = (p * ratio).sum(-1, keepdim=True)
    signal = (p * (ratio - mean) ** 2).sum(-1)
    total = rest.sum(-1, keepdim=True)
    best = torch.where(total > _LEAST, (rest * ratio).sum(-1, keepdim=True) / total, mean)
    noise = (rest * (ratio - best) ** 2).sum(-1) - signal
    return signal / noise.clamp(min=_LEAST)


def linear_logprobs(
    hidden: Float[Tensor, "P D"],
    head: Head,
    tokens: Int[Tensor, " P"],
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[Float[Tensor, " P"], Int[Tensor, " P"]]:
    """log softmax(logits / temperature) of the given tokens, nats, and the likeliest tokens.

    Both [P], a chunk at a time, meant for scoring without gradients. Raises TOPDError if the
    temperature is not above 0, chunk_tokens is below 1, or ``tokens`` are not as many.
    """
    _check_chunk(chunk_tokens)
    check_temperature(temperature)
    check_same_tokens(hidden.shape[:1], tokens.shape)
    logprobs, likeliest = [], []
    for h, t in zip(hidden.split(chunk_tokens), tokens.split(chunk_tokens), strict=True):
        known = log_softmax(head.logits(h), temperature)
        logprobs.append(known.gather(-1, t[:, None])[:, 0])
        likeliest.append(known.argmax(-1))
    return torch.cat(logprobs), torch.cat(likeliest)


def _on_one_vocabulary(student: Head, teacher: Head) -> tuple[Head, Head]:
    """Both heads on the rows that both have, less those that either bars."""
    size = min(student.vocab_size, teacher.vocab_size)
    student, teacher = student.narrowed(size), teacher.narrowed(size)
    bars = [head.barred for head in (student, teacher) if head.barred is not None]
    if not bars:
        return student, teacher
    barred = bars[0] if len(bars) == 1 else bars[0] | bars[1]
    return replace(student, barred=barred), replace(teacher, barred=barred)


def _as_head(head: Head | Linear | Tensor) -> Head:
    if isinstance(head, Linear):
        return Head(head.weight, head.bias)
    return Head(head) if isinstance(head, Tensor) else head


def _check_chunk(chunk_tokens: int) -> None:
    if chunk_tokens < 1:
        raise TOPDError(f"chunk_tokens = {chunk_tokens} must be at least 1.")
