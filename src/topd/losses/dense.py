"""Divergences of two next-token distributions that are held whole, and the trajectory loss."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topd.errors import TOPDError
from topd.losses.terms import LEAST, Kind, check_same_tokens

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
    check_divergence(kind, beta, temperature)
    if student_logits.shape != teacher_logits.shape:
        raise TOPDError(
            f"token_divergence: student logits {tuple(student_logits.shape)} and teacher logits "
            f"{tuple(teacher_logits.shape)} differ in shape. Slice padded vocabulary rows first."
        )
    student = log_softmax(student_logits, temperature)
    return _divergence(student, log_softmax(teacher_logits, temperature), kind, beta)


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
        TOPDError: shapes differ, or an unknown kind.

    Source: Schulman, Approximating KL divergence (2020).
    """
    check_same_tokens(student_logprobs.shape, teacher_logprobs.shape)
    log_ratio = teacher_logprobs - student_logprobs
    if kind == "k1":
        return -log_ratio
    if kind == "k3":
        endless = torch.expm1(log_ratio) == math.inf
        held = log_ratio.masked_fill(endless, 0.0)
        return _with_inf(torch.expm1(held) - held, endless)
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
        TOPDError: shapes differ, or kind, beta or temperature are out of range.
    """
    check_divergence(kind, beta, temperature)
    check_same_tokens(teacher_logprobs.shape, teacher_tokens.shape)
    check_same_tokens(student_logits.shape[:-1], teacher_tokens.shape[:-1])
    everything = log_softmax(student_logits, temperature)
    student, teacher = everything.gather(-1, teacher_tokens), teacher_logprobs.to(everything.dtype)
    if teacher.shape[-1] < everything.shape[-1]:  # else there is no tail
        rest = everything.scatter(-1, teacher_tokens, -math.inf)
        none = (rest == -math.inf).all(-1, keepdim=True)  # whose logsumexp has no gradient
        tail = rest.masked_fill(none, 0.0).logsumexp(-1, keepdim=True)
        tail = tail.masked_fill(none, -math.inf)
        missing = 1 - teacher.exp().sum(-1, keepdim=True)
        floor = torch.finfo(torch.float32).eps
        student = torch.cat([student, tail], -1)
        teacher = torch.cat([teacher, missing.clamp(min=floor).log()], -1)
    return _divergence(student, teacher, kind, beta)


def soft_target_kl(
    logprobs: Float[Tensor, "*P M"], probabilities: Float[Tensor, "*P M"]
) -> Float[Tensor, "*P"]:
    """KL(y || p_S) = sum_v y_v (log y_v - log p_S(v)) on the support of y; [P], nats.

    Entries of probability 0 contribute nothing. Several targets for one token may be laid side by
    side in M: their divergences add. Whether they are distributions is not checked, as that would
    wait for a GPU: a negative or NaN one gives NaN, one that sums to c is learned c times as much.

    Raises TOPDError if the shapes differ.
    """
    check_same_tokens(logprobs.shape, probabilities.shape)
    never = probabilities == 0
    y, log_p = probabilities.masked_fill(never, 1.0), logprobs.masked_fill(never, 0.0)
    return _expected(y, y.log() - log_p)


def trajectory_loss(
    student_logprobs: Float[Tensor, "N K V"], targets: Float[Tensor, "N K V"], mask: Tensor
) -> Float[Tensor, ""]:
    """L_traj: the mean over guided positions of KL(y~ || p_S(. | c)).

    Args:
        student_logprobs: [N K V], nats, log p_S in the student's own contexts c.
        targets: [N K V], soft targets y~, rows that sum to 1, which is not checked (see
            :func:`soft_target_kl`).
        mask: [N K], True at guided positions.

    Returns:
        A scalar in nats; 0, with a gradient of 0, when nothing is guided. The paper sums over
        the window; the mean keeps lambda independent of the window's length.

    Raises:
        TOPDError: the shapes of log-probs and targets differ.

    Source: arXiv 2606.00305, L_traj.
    """
    check_same_tokens(student_logprobs.shape, targets.shape)
    guided = mask.bool().expand(targets.shape[:-1])
    kl = soft_target_kl(student_logprobs, targets.masked_fill(~guided[..., None], 0.0))
    return kl.sum() / guided.sum().clamp(min=1)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide if temperature == 1.0 else wide / temperature, dim=-1)


def _divergence(student: Tensor, teacher: Tensor, kind: Kind, beta: float) -> Tensor:
    if kind == "reverse_kl":
        return kl(student, teacher)
    if kind == "forward_kl":
        return kl(teacher, student)
    nowhere = (student == -math.inf) & (teacher == -math.inf)  # log(0 + 0) has no gradient
    student, teacher = student.masked_fill(nowhere, _NEVER), teacher.masked_fill(nowhere, _NEVER)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v p (log p - log q), tokens of p = 0 left out (so that -inf - -inf is never formed)."""
    impossible = log_p == -math.inf
    gap = log_p.masked_fill(impossible, 0.0) - log_q.masked_fill(impossible, 0.0)
    return _expected(log_p.exp(), gap)


def _expected(p: Tensor, gap: Tensor) -> Tensor:
    """sum_v p gap; inf where a gap is, also where p is below every float.

    The gradient is that of a very large gap: times 0, as of a masked token, it is 0 and not NaN.
    """
    most = min(-LEAST, torch.finfo(gap.dtype).max)
    return _with_inf((p * gap.clamp(max=most)).sum(-1), (gap == math.inf).any(-1))


def _with_inf(values: Tensor, places: Tensor) -> Tensor:
    """The values, inf at some places; their gradients stay what they are."""
    return values + torch.zeros_like(values).masked_fill(places, math.inf)


def check_divergence(kind: str, beta: float, temperature: float) -> None:
    if kind not in get_args(Kind):
        raise TOPDError(f"kind {kind!r} is not one of {', '.join(get_args(Kind))}.")
    if kind == "jsd" and not 0 < beta < 1:
        raise TOPDError(f"beta = {beta} is outside (0, 1): use forward_kl for 0, reverse_kl for 1.")
    check_temperature(temperature)


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise TOPDError(f"temperature = {temperature} must be above 0.")
