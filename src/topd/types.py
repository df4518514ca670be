"""The axis legend and the frozen records that cross from one room to the next.

Axes, everywhere in this package:

====  ==============================================================
B     rollouts in a batch
T     response tokens of a rollout (padded to the longest)
P     response tokens of a batch laid end to end, without padding
V     vocabulary
N     windows in a batch
n, m  length of a student window, of a teacher window
K     length of a window when both sides have it in common
M     support of a sparse soft target
D     width of a hidden state or an embedding
====  ==============================================================

Rows are always the student, columns the teacher. Losses are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Ids = tuple[int, ...]
Texts = Sequence[Ids]  # one a row
Starts = Sequence[tuple[int, int]]  # rows and response tokens that windows begin at
Spans = tuple[tuple[int, int], ...]  # from token, to token (not included)

# What is wanted of a teacher, each with all before it: continuations, the log-probs of given
# tokens, whole next-token distributions.
Needs = Literal["nothing", "windows", "logprobs", "distributions"]
NEEDS: tuple[Needs, ...] = get_args(Needs)


@dataclass(frozen=True)
class Prompt:
    """One prompt as token ids, once for each reader.

    ``student`` and ``teacher`` differ only where the teacher has its own prompt. ``response`` is
    an answer written beforehand (warm start); None when the student is to write it.
    ``teacher_name`` is the teacher that the row asks for, where there are several; ``row`` the
    columns of the data, where an environment is asked with them.
    """

    index: int
    student: Ids
    teacher: Ids
    response: Ids | None = None
    teacher_name: str | None = None
    row: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep all."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024


@dataclass(frozen=True)
class Effort:
    """What it took to write a text: token-positions read after its prefix, and forwards."""

    positions: int = 0
    forwards: int = 0


@dataclass(frozen=True)
class Generation:
    """What an engine wrote: token ids, their log-probs in nats, and whether it ended by itself.

    Log-probs are those of softmax(logits / temperature), before top-k and top-p (at temperature 0:
    of the plain softmax). The end-of-sequence token is part of ``tokens`` only if it was sampled.
    ``hidden`` [K D] are the last hidden states that predict each token, where they were kept;
    ``effort`` is counted for windows.
    """

    tokens: Ids
    logprobs: tuple[float, ...]
    finished: bool
    hidden: Float[Tensor, "K D"] | None = field(default=None, compare=False, repr=False)
    effort: Effort = field(default=Effort(), compare=False, repr=False)


@dataclass(frozen=True)
class Rollout:
    """A response to a prompt. ``logprobs`` is empty when the response was not sampled.

    ``replies`` are the spans that an environment wrote between turns of the student: they have
    log-prob 0 here and are learned nowhere. The last token is always the student's.
    """

    prompt: Prompt
    response: Ids
    logprobs: tuple[float, ...]
    finished: bool
    replies: Spans = ()

    @property
    def own(self) -> tuple[bool, ...]:
        """Which tokens are the student's."""
        places = range(len(self.response))
        return tuple(not any(first <= t < end for first, end in self.replies) for t in places)

    @property
    def turns(self) -> tuple[Ids, ...]:
        """What the student wrote, a turn each."""
        firsts = (0, *(end for _, end in self.replies))
        return tuple(self.response[first : self.turn_end(first)] for first in firsts)

    @property
    def written(self) -> Ids:
        """All that the student wrote."""
        return tuple(token for turn in self.turns for token in turn)

    def turn_end(self, t: int) -> int:
        """One after the last token of the turn that token ``t`` is in."""
        return next((first for first, _ in self.replies if first > t), len(self.response))


@dataclass(frozen=True)
class Head:
    """The map from a last hidden state to logits: scale x (h W^T + b), soft-capped.

    weight [V D], bias [V] or None. ``softcap`` c gives c tanh(logits / c) (Gemma); ``scale`` is the
    factor some models put on their logits (Cohere, Granite). ``product``, where given, multiplies
    in the place of weight and bias: a faster way to the same values. ``barred`` [V], where given,
    is True at rows that no token has: their probability is 0.
    """

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    product: Callable[[Tensor], Tensor] | None = None
    barred: Bool[Tensor, " V"] | None = None

    @cached_property
    def bars(self) -> bool:
        """Whether a token may have probability 0: a row is barred, or its bias is -inf in float16.

        On a GPU every bias may be so: to look at it would wait for the device.
        """
        if self.bias is None or self.barred is not None:
            return self.barred is not None
        lowest = torch.finfo(torch.float16).min
        return self.bias.device.type != "cpu" or bool((self.bias < lowest).any())

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def narrowed(self, vocab_size: int) -> Head:
        """The same head on the first ``vocab_size`` tokens: padded embedding rows sliced off."""
        if vocab_size == self.vocab_size:
            return self
        bias = None if self.bias is None else self.bias[:vocab_size]
        barred = None if self.barred is None else self.barred[:vocab_size]
        return Head(self.weight[:vocab_size], bias, self.scale, self.softcap, barred=barred)

    def raw(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The product with weight and bias, without scale and soft-cap, cast to ``dtype`` once."""
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        return lambda states: torch.nn.functional.linear(states.to(dtype), weight, bias)

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits in at least float32."""
        if self.product is not None:
            logits = self.product(hidden)
        else:
            logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.barred is None else logits.masked_fill(self.barred, -math.inf)


@dataclass(frozen=True)
class Windows:
    """What both models write next from the same prefix: N windows of a batch of rollouts.

    ``row`` and ``start`` say where the window begins: at response token ``start`` of rollout
    ``row``, that token included. Masks are True on tokens, which always come first.
    """

    row: Int[Tensor, " N"]
    start: Int[Tensor, " N"]
    student_tokens: Int[Tensor, "N n"]
    student_mask: Bool[Tensor, "N n"]
    teacher_tokens: Int[Tensor, "N m"]
    teacher_mask: Bool[Tensor, "N m"]


@dataclass(frozen=True)
class Transport:
    """Optimal transport between N pairs of windows, with its evidence.

    ``distance`` [N] is the cost of ``plan`` [N n m]; every plan has mass 1 (0 where a window is
    empty). ``converged`` [N] says whether the marginals hold to the solver's tolerance.
    """

    distance: Float[Tensor, " N"]
    plan: Float[Tensor, "N n m"]
    converged: Bool[Tensor, " N"]

    def cpu(self) -> Transport:
        """The same on the CPU."""
        return Transport(self.distance.cpu(), self.plan.cpu(), self.converged.cpu())


@dataclass(frozen=True)
class TokenStatistics:
    """What both distributions say at every token of a batch, [B T] each, 0 outside the mask.

    ``reverse_kl`` KL(p_S || p_T) and the student's ``entropy`` in nats; ``disagreement``
    KL(p_T || p_S) on the union of both models' likeliest tokens, renormalised there;
    ``compatibility`` the teacher's mass on the student's likeliest tokens; ``teacher_entropy`` in
    nats; ``reliability`` the information-efficiency ratio of a sampled reverse KL
    (:func:`~topd.losses.linear_token_statistics`).
    """

    reverse_kl: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    disagreement: Float[Tensor, "B T"]
    compatibility: Float[Tensor, "B T"]
    teacher_entropy: Float[Tensor, "B T"]
    reliability: Float[Tensor, "B T"]


@dataclass(frozen=True)
class TokenScores:
    """All that a detector may look at: every token of some rollouts, [B T] each.

    ``student`` and ``teacher`` are both models' log-probs of the ``tokens`` in nats (the student's
    0 for an answer that it did not sample), ``likeliest`` the tokens that the teacher likes best
    there. ``statistics`` and ``rewritten``, the share of the next tokens that the teacher writes
    otherwise (in [0, 1]), are there for detectors that need them. 0 outside ``mask``.
    ``prompts`` are the student's, one a rollout.
    """

    tokens: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    student: Float[Tensor, "B T"]
    teacher: Float[Tensor, "B T"]
    likeliest: Int[Tensor, "B T"]
    statistics: TokenStatistics | None = None
    prompts: tuple[Ids, ...] = ()
    rewritten: Float[Tensor, "B T"] | None = None


@dataclass(frozen=True)
class Evidence:
    """All that a method may look at: one batch of rollouts and their windows.

    ``token_loss`` and the student's ``logprobs`` at sampling [B T] in nats, 0 outside ``mask``
    [B T]. ``real`` [N] is the verdict on each window: real divergent point, or false alarm.
    ``statistics`` are there for methods that need them. ``seed`` is for methods that draw.
    ``teacher_logprobs`` [B T] are those of the same tokens, in nats, where the teacher was asked.
    """

    token_loss: Float[Tensor, "B T"]
    logprobs: Float[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    windows: Windows
    transport: Transport
    real: Bool[Tensor, " N"]
    statistics: TokenStatistics | None = None
    seed: int = 0
    teacher_logprobs: Float[Tensor, "B T"] | None = None
    rollouts: tuple[Rollout, ...] = ()


@dataclass(frozen=True)
class SoftTarget:
    """A sparse distribution over next tokens at response token ``position``; sums to 1."""

    position: int
    tokens: Ids
    probabilities: tuple[float, ...]


BranchLoss = Literal["cross_entropy", "forward_kl", "reverse_kl"]


@dataclass(frozen=True)
class Branch:
    """Another continuation of a rollout, to be learned in its own context.

    ``tokens`` stand in place of the response from token ``start`` on: each is predicted from the
    prompt, the response before ``start`` and the branch's own tokens before it. ``loss`` is taken
    at every token: cross-entropy with it, or a divergence from the teacher in the same context.
    A method may ask that the student first resumes from it by ``go_on`` tokens.
    """

    start: int
    tokens: Ids
    loss: BranchLoss
    go_on: int = 0

    def is_part_of(self, response: Ids) -> bool:
        """Whether it is what the response itself says there: no text to be read beside it."""
        return response[self.start : self.start + len(self.tokens)] == self.tokens


@dataclass(frozen=True)
class Guidance:
    """What a method asks of one rollout, in plain numbers: it can be stored, read and replayed.

    ``weights`` multiply the token losses, one a response token; ``targets`` pull the student's
    distribution at their positions; at ``capped`` positions the token loss is scaled down to the
    rollout's median where it is above. ``branches`` are learned beside the rollout.
    ``advantages``, one a token or none, multiply the sampled tokens' log-probs, to be raised.
    """

    weights: tuple[float, ...]
    targets: tuple[SoftTarget, ...] = ()
    capped: tuple[int, ...] = ()
    branches: tuple[Branch, ...] = ()
    advantages: tuple[float, ...] = ()

    @property
    def guided(self) -> int:
        """How many tokens L_traj is taken over."""
        return len(self.targets) + sum(len(branch.tokens) for branch in self.branches)

    @property
    def learned(self) -> int:
        """How many response tokens the loss depends on: all up to the last with a part in it."""
        if self.capped:  # at a median over the whole rollout
            return len(self.weights)
        last = [target.position for target in self.targets]
        last += [branch.start for branch in self.branches]
        last += [t for terms in (self.weights, self.advantages) for t, x in enumerate(terms) if x]
        return max(last, default=-1) + 1


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest float of a device: float64, or float32 on Apple's, which lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The precision of the autocast that is on; None if none is."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None
