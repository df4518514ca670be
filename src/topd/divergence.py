"""Where does the student leave the teacher?

Candidates are the high-loss tokens. Their windows say which are real divergent points and which are
false alarms. What is done about it is for :mod:`topd.methods`.
"""

from __future__ import annotations

import math
import zlib

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topd.errors import TOPDError
from topd.types import wide_dtype


def select_candidates(
    token_loss: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    fraction: float,
    threshold: float = -math.inf,
) -> Bool[Tensor, "B T"]:
    """The loudest tokens of every rollout.

    Args:
        token_loss: [B T], nats.
        mask: [B T], True on response tokens.
        fraction: share of a rollout's response tokens, in (0, 1], rounded to the nearest count
            (halves to even), at least 1.
        threshold: nats; quieter tokens are left out even if that leaves none.

    Returns:
        [B T] bool. Of equal losses the earlier token is taken. A rollout without response tokens
        has no candidate.

    Raises:
        TOPDError: fraction out of range, or a NaN loss under the mask.

    Source: arXiv 2606.00305 (218 of 9,688 tokens, 2.25 %).

    >>> loss = torch.tensor([[0.1, 3.0, 0.2, 9.0]])
    >>> select_candidates(loss, torch.tensor([[True, True, True, False]]), fraction=0.3)
    tensor([[False,  True, False, False]])
    """
    if not 0 < fraction <= 1:
        raise TOPDError(f"fraction = {fraction} must be above 0 and at most 1.")
    mask = mask.bool()
    if bool((token_loss.isnan() & mask).any()):
        raise TOPDError("select_candidates: a token loss is NaN. Check both models' log-probs.")
    order = token_loss.masked_fill(~mask, -math.inf).argsort(dim=-1, descending=True, stable=True)
    # A real loss of -inf ties with the filling: put masked tokens last among equals.
    order = order.gather(-1, (~mask).gather(-1, order).int().argsort(dim=-1, stable=True))
    rank = order.argsort(dim=-1)
    count = (mask.sum(-1).to(wide_dtype(mask.device)) * fraction).round().clamp(min=1)
    return mask & (rank < count[:, None]) & (token_loss >= threshold)


def surprise(
    teacher_logprobs: Float[Tensor, " P"], likeliest: Int[Tensor, " P"], tokens: Int[Tensor, " P"]
) -> Float[Tensor, " P"]:
    """How surprised the teacher is by each token, less where the student has a habit; [P], nats.

        s_t = -log p_T(y_t) (1 - c_t / n_t) (1 - log(1 + c_t) / log(1 + P))

    n_t counts the other tokens where the teacher would write the same a, c_t those of them where
    the student writes the same y. A habit ("next" wherever the teacher says "so") has
    a high loss often, a fork rarely. The first factor is small where the student mostly does so,
    the second where the batch is full of it.

    Args:
        teacher_logprobs: [P], nats, of the student's tokens; all tokens of a batch.
        likeliest: [P], the teacher's likeliest token at each place.
        tokens: [P], what the student wrote there.

    Source: this project; docs/evidence.md shows how well it finds forks.

    >>> nll, a, y = torch.full((4,), -2.0), torch.zeros(4).int(), torch.tensor([1, 1, 1, 2])
    >>> surprise(nll, a, y).round(decimals=2)
    tensor([0.2100, 0.2100, 0.2100, 2.0000])
    """
    width = int(tokens.max()) + 1 if len(tokens) else 1
    pairs = _count_of_each(likeliest.long() * width + tokens)
    share = (pairs - 1) / (_count_of_each(likeliest) - 1).clamp(min=1)
    spread = pairs.log() / math.log1p(len(tokens))
    loss = -teacher_logprobs.clamp(min=torch.finfo(teacher_logprobs.dtype).min)  # inf x 0 is NaN
    return loss * (1 - share) * (1 - spread)


def moved_to_random(
    score: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], tokens: Int[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """A rollout's highest score at a random token of it, all other tokens far below; [B T].

    The control of a detector: as many rollouts pass a threshold as do with ``score``, with one
    place each, drawn evenly from the rollout. The draw depends on the rollout's own ``tokens``
    alone, so that it is the same in every batch.

    >>> one = torch.ones(1, 3)
    >>> int(moved_to_random(one, one.bool(), one.long()).argmax()) in (0, 1, 2)
    True
    """
    places = []
    for row, own in zip(tokens, mask, strict=True):
        digest = zlib.crc32(",".join(map(str, row[own].tolist())).encode())
        draw = torch.Generator().manual_seed(digest)
        drawn = int(torch.randint(max(1, int(own.sum())), (1,), generator=draw))
        places.append(int(own.nonzero()[drawn]) if own.any() else 0)
    return _moved(score, mask, torch.tensor(places, dtype=torch.long, device=score.device))


def moved_to_start(score: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """A rollout's highest score at its first token, all other tokens far below; [B T].

    The other control: the place is early, and not found by anything.

    >>> moved_to_start(torch.tensor([[1.0, 3.0, 2.0]]), torch.ones(1, 3).bool())
    tensor([[3., 0., 0.]])
    """
    return _moved(score, mask, torch.zeros(len(score), dtype=torch.long, device=score.device))


def _moved(score: Tensor, mask: Bool[Tensor, "B T"], place: Int[Tensor, " B"]) -> Tensor:
    """The others get the rollout's lowest score, less one: they pass no threshold that it fails."""
    high = score.masked_fill(~mask, -math.inf).amax(-1)
    low = score.masked_fill(~mask, math.inf).amin(-1).clamp(max=high) - 1
    moved = low[:, None].expand_as(score).scatter(-1, place[:, None], high[:, None])
    return moved.masked_fill(~mask, 0.0)


def _count_of_each(values: Int[Tensor, " P"]) -> Int[Tensor, " P"]:
    """How often each value is there, itself included."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return counts[place]


def thin_candidates(candidates: Bool[Tensor, "B T"], *, gap: int) -> Bool[Tensor, "B T"]:
    """Drop each candidate that starts less than ``gap`` tokens after the last one kept.

    With ``gap`` = K no window starts inside another. Raises TOPDError if gap is below 1.

    >>> thin_candidates(torch.tensor([[True, True, False, True]]), gap=2)
    tensor([[ True, False, False,  True]])
    """
    if gap < 1:
        raise TOPDError(f"gap = {gap} must be at least 1.")
    kept = torch.zeros_like(candidates)
    free = [0] * len(candidates)
    for row, position in candidates.nonzero().tolist():
        if position >= free[row]:
            kept[row, position] = True
            free[row] = position + gap
    return kept


def real_divergent_points(
    distance: Float[Tensor, " N"], *, false_alarm_share: float = 0.3, threshold: float | None = None
) -> Bool[Tensor, " N"]:
    """Which candidates are real divergent points: those whose windows are far apart.

    Args:
        distance: [N], OT distances of the batch's candidates.
        false_alarm_share: this share with the smallest distances, rounded to the nearest count,
            are false alarms; in [0, 1]. With 0 all are real, whatever their distance.
        threshold: if given, it decides instead: real means a distance of at least this much.

    Returns:
        [N] bool. A verdict by distance takes no windows for real that are not apart at all.

    Raises:
        TOPDError: the share is out of range.

    Source: arXiv 2606.00305 (bottom 30 % by OT among the high-loss tokens).
    """
    if not 0 <= false_alarm_share <= 1:
        raise TOPDError(f"false_alarm_share = {false_alarm_share} must be between 0 and 1.")
    if threshold is not None:
        return (distance >= threshold) & (distance > 0)
    if false_alarm_share == 0:
        return torch.ones_like(distance, dtype=torch.bool)
    rank = distance.argsort(stable=True).argsort()
    return (rank >= round(false_alarm_share * len(distance))) & (distance > 0)
