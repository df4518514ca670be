"""Engines write and score tokens: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor

from topd.types import Generation, Head, Ids, Needs, Sampling, Spans, Starts, Texts

Tick = Callable[[], None]


def no_tick() -> None:
    """The default for ``tick``, which engines call once for every forward pass of a phase."""


@dataclass(frozen=True)
class Scores:
    """What one scoring forward yields for B responses, padded on the right to T.

    ``hidden`` [B T D] are the last hidden states that predict each response token, ``logprobs``
    [B T] the log-probs of those tokens in nats (0 on padding), ``likeliest`` [B T] the tokens that
    the model itself likes best there. ``prefix`` belongs to the engine: from it ``continue_from``
    continues without reading the prompt again. ``spans``: of every response, where the teacher's
    tokenizer is another, the tokens [first, end) of each span that it told a log-prob of.
    """

    hidden: Float[Tensor, "B T D"]
    logprobs: Float[Tensor, "B T"]
    likeliest: Int[Tensor, "B T"]
    prefix: object
    spans: tuple[Spans, ...] = ()


class Engine(Protocol):
    """A model that can be sampled from, asked for log-probs, and continued.

    ``gives`` says what a student can learn from it as a teacher.
    """

    gives: Needs

    @property
    def head(self) -> Head:
        """The map from the hidden states that ``score`` returns to logits."""

    def ends(self, tokens: Ids) -> bool:
        """Whether a text ends with an end-of-sequence token."""

    def embed(self, tokens: Int[Tensor, "N n"]) -> Float[Tensor, "N n D"]:
        """Input embeddings of tokens."""

    def generate(
        self, prompts: Texts, sampling: Sampling, seeds: Sequence[int], *, tick: Tick = ...
    ) -> list[Generation]:
        """Sample one response a prompt; a response depends on its prompt and its seed alone."""

    def score(
        self, prompts: Texts, responses: Texts, *, temperature: float = 1.0, keep: bool = True
    ) -> Scores:
        """Log-probs and last hidden states of given responses, from one forward.

        ``keep`` False spares the memory of what only ``continue_from`` needs.
        """

    def continue_from(
        self,
        scores: Scores,
        starts: Starts,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        rejoin: int = 0,
        tick: Tick = ...,
    ) -> list[Generation]:
        """Continue scored response ``b`` from before its token ``t``, for every (b, t).

        The hidden states of what it writes are kept, as those of a scored response are, where the
        engine has them at hand; else they are None, and scored when they are needed. With
        ``rejoin`` above 0 a window whose last so many tokens are the response's stops, and takes
        its rest from there: no longer exact.
        """
