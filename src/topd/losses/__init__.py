"""Token divergences and the trajectory loss: pure functions of tensors, in nats.

Notation: p_S is the student's next-token distribution, p_T the teacher's, both of
softmax(logits / temperature). Gradients flow to whatever requires them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Linear

from topd.errors import TOPDError
from topd.losses.chunked import Kind, Task, TokenTerms, Upstream, head_terms, importance
from topd.types import Head

__all__ = [
    "Kind",
    "TokenTerms",
    "Upstream",
    "importance",
    "linear_logprobs",
    "linear_token_divergence",
    "linear_token_terms",
    "sampled_divergence",
    "soft_target_kl",
    "token_divergence",
    "topk_divergence",
    "trajectory_loss",
]

_NEVER = -1e4  # a log-prob whose probability is 0 in every float type, and whose gradient is finite


def token_divergence(
    student_logits: Float[Tensor, "*P V"],
    teacher_logits: Float[Tensor, "*P V"],
    *,
    kind: Kind = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Tensor, "*P"]:
    r"""Divergence of the two next-token distributions at every token, over the full vocabulary.

    ==========  ==================================================================
    reverse_kl  KL(p_S || p_T) = sum_v p_S (log p_S - log p_T), the OPD loss
    forward_kl  KL(p_T || p_S)
    jsd         beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S
    ==========  ==================================================================

    Args:
        student_logits: [B T V] (any leading axes).
        teacher_logits: the same shape.
        kind: which divergence.
        beta: weight of the teacher in the generalised JSD, between 0 and 1; unused otherwise.
        temperature: divides both logits.

    Returns:
        [B T], nats, in at least float32. A token whose logit is -inf has probability 0 and
        contributes nothing to the divergence from its own distribution.

    Raises:
        TOPDError: shapes differ, or kind, beta or temperature are out of range.

    Source: Agarwal et al., On-Policy Distillation of Language Models, arXiv 2306.13649, section 3.

    >>> half, quarter = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> token_divergence(half, quarter).item()  # 0.5 log(0.5/0.25) + 0.5 log(0.5/0.75)
    0.1438...
    """
    _check_divergence(kind, beta, temperature)
    if student_logits.shape != teacher_logits.shape:
        raise TOPDError(
            f"token_divergence: student logits {tuple(student_logits.shape)} and teacher logits "
            f"{tuple(teacher_logits.shape)} differ in shape. Slice padded vocabulary rows first."
        )
    student = _log_softmax(student_logits, temperature)
    return _divergence(student, _log_softmax(teacher_logits, temperature), kind, beta)


def sampled_divergence(
    student_logprobs: Float[Tensor, "*P"],
    teacher_logprobs: Float[Tensor, "*P"],
    *,
    kind: Literal["k1", "k3"] = "k1",
) -> Float[Tensor, "*P"]:
    """Estimates of KL(p_S || p_T) from the log-probs of a token sampled from p_S.

    k1 = log p_S - log p_T is unbiased and may be negative; k3 = r - 1 - log r with r = p_T / p_S
    is unbiased and never negative.

    Args:
        student_logprobs: log p_S of the sampled tokens, [B T].
        teacher_logprobs: log p_T of the same tokens, [B T].

    Returns:
        [B T], nats.

    Raises:
        TOPDError: an unknown kind.

    Source: Schulman, Approximating KL divergence (2020).
    """
    log_ratio = teacher_logprobs - student_logprobs
    if kind == "k1":
        return -log_ratio
    if kind == "k3":
        return torch.expm1(log_ratio) - log_ratio
    raise TOPDError(f"sampled_divergence: kind {kind!r} is not one of k1, k3.")


def topk_divergence(
    student_logits: Float[Tensor, "*P V"],
    teacher_logprobs: Float[Tensor, "*P k"],
    teacher_tokens: Int[Tensor, "*P k"],
    *,
    kind: Kind = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Tensor, "*P"]:
    """Divergence on the teacher's k tokens and one tail bucket that holds all others.

    Merging tokens into one bucket can only lower a divergence, so this is a lower bound of
    :func:`token_divergence`, and equal to it at k = V - 1. The mass is not renormalised: the
    student gains nothing by leaving the support.

    Args:
        student_logits: [B T V].
        teacher_logprobs: [B T k], nats, of softmax(teacher logits / temperature).
        teacher_tokens: [B T k], which tokens those are, all different.
        kind: as in :func:`token_divergence`.
        beta: likewise.
        temperature: likewise.

    Returns:
        [B T], nats. The teacher's tail mass is held above the smallest step of float32 (1.2e-7),
        so that rounding in a served log-prob cannot make the divergence infinite.

    Raises:
        TOPDError: kind, beta or temperature are out of range.
    """
    _check_divergence(kind, beta, temperature)
    everything = _log_softmax(student_logits, temperature)
    student, teacher = everything.gather(-1, teacher_tokens), teacher_logprobs.to(everything.dtype)
    if teacher.shape[-1] < everything.shape[-1]:  # else there is no tail
        tail = everything.scatter(-1, teacher_tokens, -math.inf).logsumexp(-1, keepdim=True)
        missing = 1 - teacher.exp().sum(-1, keepdim=True)
        floor = torch.finfo(torch.float32).eps
        student = torch.cat([student, tail], -1)
        teacher = torch.cat([teacher, missing.clamp(min=floor).log()], -1)
    return _divergence(student, teacher, kind, beta)


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
        TOPDError: kind, beta, temperature or chunk_tokens are out of range.
    """
    _check_divergence(kind, beta, temperature)
    _check_chunk(chunk_tokens)
    student_head, teacher_head = _on_one_vocabulary(student_head, teacher_head)
    task = Task(
        student_head,
        teacher_head,
        teacher_hidden,
        tokens,
        target_tokens,
        kind,
        beta,
        temperature,
        chunk_tokens,
        expected,
        promised,
    )
    return head_terms(student_hidden, student_head, task)


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
        TOPDError: kind, beta, temperature or chunk_tokens are out of range.
    """
    shape = student_hidden.shape[:-1]
    none = torch.zeros(shape.numel(), 0, dtype=torch.long, device=student_hidden.device)
    terms = linear_token_terms(
        student_hidden.flatten(0, -2),
        _as_head(student_head),
        teacher_hidden.flatten(0, -2),
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


def linear_token_statistics(
    student_hidden: Float[Tensor, "P D"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "P E"],
    teacher_head: Head,
    *,
    temperature: float = 1.0,
    candidates: int = 16,
    chunk_tokens: int = 1024,
) -> Float[Tensor, "4 P"]:
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
        [4 P]: KL(p_S || p_T), the student's entropy, KL(p_T || p_S) on the union of the likeliest
        tokens (all nats), and p_T's mass on the student's. Meant for use without gradients.

    Raises:
        TOPDError: temperature or chunk_tokens are out of range.
    """
    _check_chunk(chunk_tokens)
    _check_temperature(temperature)
    student_head, teacher_head = _on_one_vocabulary(student_head, teacher_head)
    parts = []
    hidden = zip(
        student_hidden.split(chunk_tokens), teacher_hidden.split(chunk_tokens), strict=True
    )
    for own, other in hidden:
        log_s = _log_softmax(student_head.logits(own), temperature)
        log_t = _log_softmax(teacher_head.logits(other), temperature)
        parts.append(_statistics(log_s, log_t, min(candidates, student_head.vocab_size)))
    return torch.cat(parts, dim=-1)


def _statistics(log_s: Tensor, log_t: Tensor, candidates: int) -> Tensor:
    ours, theirs = (x.topk(candidates, dim=-1).indices for x in (log_s, log_t))
    rest = torch.ones_like(log_s, dtype=torch.bool).scatter(-1, ours, False)
    mass = log_t.masked_fill(rest, -math.inf).logsumexp(-1).exp()
    rest = rest.scatter(-1, theirs, False)
    on_union = [x.masked_fill(rest, -math.inf).log_softmax(-1) for x in (log_t, log_s)]
    entropy = torch.special.entr(log_s.exp()).sum(-1)
    return torch.stack([_kl(log_s, log_t), entropy, _kl(*on_union), mass])


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
    temperature is not above 0 or chunk_tokens is below 1.
    """
    _check_chunk(chunk_tokens)
    _check_temperature(temperature)
    logprobs, likeliest = [], []
    for h, t in zip(hidden.split(chunk_tokens), tokens.split(chunk_tokens), strict=True):
        known = _log_softmax(head.logits(h), temperature)
        logprobs.append(known.gather(-1, t[:, None])[:, 0])
        likeliest.append(known.argmax(-1))
    return torch.cat(logprobs), torch.cat(likeliest)


def soft_target_kl(
    logprobs: Float[Tensor, "*P M"], probabilities: Float[Tensor, "*P M"]
) -> Float[Tensor, "*P"]:
    """KL(y || p_S) = sum_v y_v (log y_v - log p_S(v)) on the support of y; [P], nats.

    Entries of probability 0 contribute nothing. Several targets for one token may be laid side by
    side in M: their divergences add.
    """
    cross = (probabilities * logprobs).masked_fill(probabilities == 0, 0.0)
    return (torch.special.xlogy(probabilities, probabilities) - cross).sum(-1)


def trajectory_loss(
    student_logprobs: Float[Tensor, "N K V"],
    targets: Float[Tensor, "N K V"],
    mask: Tensor,
) -> Float[Tensor, ""]:
    """L_traj: the mean over guided positions of KL(y~ || p_S(. | c)).

    Args:
        student_logprobs: [N K V], nats, log p_S in the student's own contexts c.
        targets: [N K V], soft targets y~, rows that sum to 1.
        mask: [N K], True at guided positions.

    Returns:
        A scalar in nats; 0, with a gradient of 0, when nothing is guided. The paper sums over
        the window; the mean keeps lambda independent of the window's length.

    Source: arXiv 2606.00305, L_traj.
    """
    guided = mask.bool()
    kl = soft_target_kl(student_logprobs, targets).masked_fill(~guided, 0.0)
    return kl.sum() / guided.sum().clamp(min=1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide if temperature == 1.0 else wide / temperature, dim=-1)


def _divergence(student: Tensor, teacher: Tensor, kind: Kind, beta: float) -> Tensor:
    if kind == "reverse_kl":
        return _kl(student, teacher)
    if kind == "forward_kl":
        return _kl(teacher, student)
    nowhere = (student == -math.inf) & (teacher == -math.inf)  # log(0 + 0) has no gradient
    student, teacher = student.masked_fill(nowhere, _NEVER), teacher.masked_fill(nowhere, _NEVER)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v p (log p - log q), tokens of p = 0 left out (so that -inf - -inf is never formed)."""
    impossible = log_p == -math.inf
    gap = log_p.masked_fill(impossible, 0.0) - log_q.masked_fill(impossible, 0.0)
    # below every float p is 0, and 0 inf no number: what is possible at all costs inf
    return (log_p.exp() * gap).masked_fill(gap == math.inf, math.inf).sum(-1)


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


def _check_divergence(kind: str, beta: float, temperature: float) -> None:
    if kind not in get_args(Kind):
        raise TOPDError(f"kind {kind!r} is not one of {', '.join(get_args(Kind))}.")
    if kind == "jsd" and not 0 < beta < 1:
        raise TOPDError(f"beta = {beta} is outside (0, 1): use forward_kl for 0, reverse_kl for 1.")
    _check_temperature(temperature)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise TOPDError(f"temperature = {temperature} must be above 0.")


def _check_chunk(chunk_tokens: int) -> None:
    if chunk_tokens < 1:
        raise TOPDError(f"chunk_tokens = {chunk_tokens} must be at least 1.")
