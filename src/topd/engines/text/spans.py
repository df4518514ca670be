"""Token losses across tokenizers: the spans of a text at whose ends two tokenisations both split.

What is followed: the alignment of TRL's GOLD trainer (``ULDLoss._align_by_byte_offsets`` in
``trl/experimental/gold/gold_trainer.py``), whose groups close where both sides reach the same
place. Not its loss on sorted distributions (ULD, arXiv 2402.12030): see docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from topd.engines.hf import HFEngine
from topd.engines.text.logprobs import whole_text
from topd.errors import TOPDError
from topd.inputs.border import BROKEN, Border
from topd.inputs.text_models import reach_of
from topd.types import Ids, Spans, Texts


class Aligned(NamedTuple):
    """The teacher's tokens of a response, and of every span the tokens of either, [first, end)."""

    ids: Ids
    own: Spans
    theirs: Spans


def aligned(own: Sequence[int], theirs: Sequence[int], limit: int) -> tuple[Spans, Spans]:
    """The smallest spans of both tokenisations of a text, up to its character ``limit``.

    Args:
        own: how many characters there are after each token, as :meth:`Border.places` says.
        theirs: the same of the other tokenisation.
        limit: characters that both have.

    >>> aligned([2, 5, 6, 6], [1, 2, 6], 6)  # the last token is inside a character
    (((0, 1), (1, 3)), ((0, 2), (2, 3)))
    """
    first, second = _ends(own), _ends(theirs)
    shared = [0, *sorted(place for place in first.keys() & second.keys() if place <= limit)]
    steps = list(pairwise(shared))
    ours, others = (tuple((ends.get(a, 0), ends[b]) for a, b in steps) for ends in (first, second))
    return ours, others


def _ends(places: Sequence[int]) -> dict[int, int]:
    """How many tokens there are up to each place but 0: a place is reached by its first token."""
    counted = [(place, count) for count, place in enumerate(places, 1) if place]
    return dict(reversed(counted))


class SpanReader:
    """A teacher in this process that tells the log-probs of spans of what the student wrote.

    Args:
        engine: the teacher.
        tokenizers: the student's, and the teacher's.
        ends: tokens that end a response of the student's.
    """

    def __init__(
        self, engine: HFEngine, tokenizers: Sequence[PreTrainedTokenizerBase], ends: frozenset[int]
    ) -> None:
        self.engine, self.ends = engine, ends
        self.own, self.theirs = (Border(tokenizer) for tokenizer in tokenizers)
        self.reach = reach_of(engine.model.config)

    def align(self, response: Ids) -> Aligned:
        """The spans of a response, and the teacher's tokens that they are made of.

        From the name of a special token on nothing has a span: neither tokenizer means text by it.
        Nor from bytes on that are no character: their sign would be read in their place.
        The end of the response is a span of its own.
        """
        ended = bool(response) and response[-1] in self.ends
        body = response[:-1] if ended else response
        whole = whole_text(self.own, body)
        text = self.theirs.cut_at_mark(self.own.cut_at_mark(whole)[0])[0].partition(BROKEN)[0]
        ids = self.theirs.ids((), text)
        if ids is None:
            return Aligned((), (), ())
        own, theirs = aligned(self.own.places(body), self.theirs.places(ids), len(text))
        if ended and text == self.own.text(body):
            own = (*own, (len(body), len(response)))
            theirs = (*theirs, (len(ids), len(ids) + 1))
            ids = (*ids, self._end(response[-1]))
        return Aligned(ids, own, theirs)

    def read(self, prompts: Texts, responses: Texts) -> list[tuple[Spans, list[float]]]:
        """Of every response its spans, and the teacher's log-probs of them, nats.

        One that is too long for the teacher has none. Raises TOPDError where a log-prob is NaN.
        """
        rows = [self.align(response) for response in responses]
        for k, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            if self.reach is not None and len(prompt + row.ids) > self.reach:
                rows[k] = Aligned((), (), ())
        asked = [k for k, row in enumerate(rows) if row.own]
        told: list[list[float]] = [[] for _ in rows]
        if asked:
            scores = self.engine.score(
                [prompts[k] for k in asked], [rows[k].ids for k in asked], keep=False
            )
            for k, logprobs in zip(asked, scores.logprobs.cpu().double(), strict=True):
                told[k] = [float(logprobs[a:b].sum()) for a, b in rows[k].theirs]
                if any(map(math.isnan, told[k])):
                    raise TOPDError(
                        f"teacher: NaN log-prob in a span of response {k}. Load the teacher in "
                        "bfloat16 or float32, and check its weights."
                    )
        return [(row.own, own) for row, own in zip(rows, told, strict=True)]

    def _end(self, token: int) -> int:
        """How the teacher ends: by the token of the same name, else by its tokenizer's own."""
        student, teacher = self.own.tokenizer, self.theirs.tokenizer
        same = teacher.get_vocab().get(str(student.convert_ids_to_tokens(token)))
        if same in self.engine.end_ids:
            return int(same)
        end = teacher.eos_token_id
        return min(self.engine.end_ids) if end is None else int(end)


def share_evenly(logprobs: torch.Tensor, own: torch.Tensor, spans: Sequence[Spans]) -> torch.Tensor:
    """Log-probs [B T] whose differences from ``own`` [B T] are the same at all tokens of a span.

    The sum over a span stays what the teacher told.
    """
    shared = logprobs.clone()
    for row, found in enumerate(spans):
        for a, b in found:
            if b - a > 1:
                gap = (logprobs[row, a:b] - own[row, a:b]).mean()
                shared[row, a:b] = own[row, a:b] + gap
    return shared
