"""What the loss asks of a model's head, token by token, and what it gets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topd.errors import TOPDError
from topd.types import Head, wide_dtype

Kind = Literal["reverse_kl", "forward_kl", "jsd"]

LEAST = -1e30  # stands for the log-prob of a token of probability 0: 0 LEAST is 0, not NaN


class Upstream(NamedTuple):
    """By what a loss multiplies each term: its derivative by them. None stands for zeros.

    With ``sampled`` [P], the log-probs at sampling, the factors of divergence and logprob are also
    multiplied by the tokens' :func:`importance`, at most ``most``.
    """

    divergence: Float[Tensor, " P"] | None
    logprob: Float[Tensor, " P"] | None
    target_logprobs: Float[Tensor, "P M"] | None
    sampled: Float[Tensor, " P"] | None = None
    most: float = math.inf

    def at(self, rows: slice, logprob: Float[Tensor, " r"]) -> Upstream:
        """The factors of some tokens, whose log-probs are known by now."""
        divergence, own, targets, sampled = (
            None if x is None else x[rows]
            for x in (self.divergence, self.logprob, self.target_logprobs, self.sampled)
        )
        if sampled is None:
            return Upstream(divergence, own, targets)
        ratio = importance(logprob, sampled, self.most)
        divergence, own = (None if x is None else ratio * x for x in (divergence, own))
        return Upstream(divergence, own, targets)

    def flat(self, like: Int[Tensor, "P M"]) -> Float[Tensor, "P 2+M"]:
        """All factors of a token side by side, after the target tokens, as wide as can be."""
        zero = like.new_zeros(len(like), dtype=wide_dtype(like.device))
        parts = [
            zero if self.divergence is None else self.divergence,
            zero if self.logprob is None else self.logprob,
            zero[:, None].expand_as(like) if self.target_logprobs is None else self.target_logprobs,
        ]
        return torch.cat([part.to(zero.dtype).reshape(len(like), -1) for part in parts], 1)


def importance(
    logprob: Float[Tensor, " P"], sampled: Float[Tensor, " P"], most: float
) -> Float[Tensor, " P"]:
    """p_now / p_sampling of every sampled token, at most ``most``; without gradient.

    Corrects for rollouts that older weights wrote. Source: truncated importance sampling, Ionides,
    Journal of Computational and Graphical Statistics 17 (2008); a token at a time, as is usual.
    Raises TOPDError if the shapes differ.

    >>> importance(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -4.0]), 2.0)
    tensor([1., 2.])
    """
    check_same_tokens(logprob.shape, sampled.shape)
    return (logprob.detach() - sampled).exp().clamp(max=most)


def check_same_tokens(*shapes: torch.Size) -> None:
    """What is longer would be cut off, or read at other tokens; [T] and [T 1] would make [T T]."""
    if len(set(shapes)) > 1:
        axes = ", ".join(str(tuple(shape)) for shape in shapes)
        raise TOPDError(f"tokens: the tensors are of {axes} tokens. Give the same in each.")


class TokenTerms(NamedTuple):
    """What one pass over the vocabulary yields for each of P tokens.

    divergence [P] and entropy [P] in nats; logprob [P] of the token that is there;
    target_logprobs [P M] of the soft target's tokens. The entropy carries no gradient.
    """

    divergence: Float[Tensor, " P"]
    entropy: Float[Tensor, " P"]
    logprob: Float[Tensor, " P"]
    target_logprobs: Float[Tensor, "P M"]


@dataclass(frozen=True)
class Task:
    """What is asked of the head; nothing in it is differentiated.

    ``student`` gives scale and soft-cap; its weights are passed apart. ``expected`` are the
    factors that the loss is expected to use; None if they are not known. ``promised``: it uses them
    up to one number, which need not be made sure of.
    """

    student: Head
    teacher: Head
    teacher_hidden: Float[Tensor, "P E"]
    tokens: Int[Tensor, " P"]
    target_tokens: Int[Tensor, "P M"]
    kind: Kind
    beta: float
    temperature: float
    chunk_tokens: int
    expected: Upstream | None = None
    promised: bool = False
