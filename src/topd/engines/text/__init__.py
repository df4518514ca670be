"""The text engine: a teacher that continues the text that the student has written.

It has no logits, hidden states or ids that the student knows. Its words become the student's tokens
at the border (:mod:`topd.inputs.border`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from topd.engines import Scores, Tick, no_tick
from topd.engines.base import BaseEngine, Prefix, Wanted, check_seeds
from topd.engines.text.logprobs import TOLD, Pieces, logprobs_of_tokens, whole_text
from topd.engines.text.spans import SpanReader
from topd.errors import TOPDError
from topd.inputs.border import BROKEN, Border
from topd.types import Generation, Ids, Needs, Sampling, Starts, Texts

logger = logging.get_logger(__name__)

SPARE = 8  # tokens that are written beyond a window, so that its last word is a whole one
IN_A_ROW = 16  # prompts that a server may refuse, or texts of which it tells nothing, in a row


class Written(NamedTuple):
    """What a writer wrote, and whether it ended there by itself."""

    text: str
    ended: bool


class Writer(Protocol):
    """A model that continues texts; its ``tokenizer`` is that of the prompts."""

    tokenizer: PreTrainedTokenizerBase

    def write(self, prompts: Texts, texts: Sequence[str], wanted: Wanted) -> list[Written]:
        """What comes after every prompt (ids of the teacher's tokenizer) and text."""
        ...


class TextEngine(BaseEngine):
    """A teacher by text. Scores have no states: its head makes every token as likely as any other.

    Args:
        model: see :func:`~topd.inputs.text_models.stand_in`.
        writer: what writes.
        tokenizer: the student's.
        read: tells of prompts and texts the teacher's own tokens and their log-probs, if anything
            does; they must be the student's too.
        spans: what tells log-probs of spans of the student's tokens, if anything does.
        eos_ids, vocab_size, allowed, name, autocast: as in BaseEngine, the student's.
    """

    gives: Needs = "windows"

    def __init__(
        self,
        model: PreTrainedModel,
        writer: Writer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        read: Callable[[Texts, Sequence[str]], list[Pieces]] | None = None,
        spans: SpanReader | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.gives = "logprobs" if read or spans else "windows"
        self.writer, self.read, self.spans = writer, read, spans
        self.border, self.theirs = Border(tokenizer), Border(writer.tokenizer)
        self.end = int(tokenizer.eos_token_id)
        self._untold, self._none_in_a_row = 0, 0  # batches, texts
        self._ends = {str(t) for t in tokenizer.convert_ids_to_tokens(sorted(self.end_ids))}

    def generate(
        self, prompts: Texts, sampling: Sampling, seeds: Sequence[int], *, tick: Tick = no_tick
    ) -> list[Generation]:
        """Write one response a prompt, as the student's tokens. No log-probs are known."""
        return self._tokens([()] * len(prompts), prompts, Wanted(sampling, seeds, tick))

    def score(
        self, prompts: Texts, responses: Texts, *, temperature: float = 1.0, keep: bool = True
    ) -> Scores:
        """States of zeros; log-probs, zeros as well unless the writer tells them.

        They are NaN where the writer does not tell one, see :func:`logprobs_of_tokens`, and outside
        of spans; the tokens of a span share its log-prob. Raises TOPDError where it tells none of
        ``IN_A_ROW`` responses in a row.
        """
        shape = len(responses), max(map(len, responses))
        weight = self.head.weight
        hidden = weight.new_zeros(*shape, weight.shape[1])
        ids = torch.zeros(shape, dtype=torch.long, device=self.device)
        prefix = Prefix(tuple(prompts), tuple(responses))
        logprobs = hidden.new_zeros(shape, dtype=torch.float32)
        if self.spans is not None:
            return self._by_spans(self.spans, Scores(hidden, logprobs, ids, prefix))
        if self.read is not None:
            texts = [whole_text(self.border, response) for response in responses]
            pieces = self.read(prompts, texts)
            pairs = zip(responses, pieces, strict=True)
            known = [logprobs_of_tokens(self.border, *pair) for pair in pairs]
            for row, found in enumerate(known):
                logprobs[row, : len(found)] = torch.tensor(found)
            self._check_told([k for k, one in enumerate(pieces) if one], responses, known)
        return Scores(hidden, logprobs, ids, prefix)

    def _check_told(
        self, rows: Sequence[int], responses: Texts, known: Sequence[Sequence[float]]
    ) -> None:
        """Say where of the texts in ``rows`` few log-probs are told, ends left out.

        Else a server that has another model by now would teach nothing, without a word.
        """
        told = [
            [not math.isnan(x) for token, x in zip(responses[k], known[k], strict=True)
             if token not in self.end_ids]
            for k in rows
        ]  # fmt: skip
        for text in filter(None, told):
            self._none_in_a_row = 0 if any(text) else self._none_in_a_row + 1
        count, asked = sum(map(sum, told)), sum(map(len, told))
        if count >= TOLD * asked:
            return
        why = (
            f"teacher.text.logprobs: of {asked} tokens in a batch of responses the server tells "
            f"{count}: it splits text otherwise than the student's tokenizer, or has another model "
            "than at the start."
        )
        if self._none_in_a_row >= IN_A_ROW:
            raise TOPDError(f"{why} It told none of the last {self._none_in_a_row} responses.")
        self._untold += 1
        say_left_out(f"{why} The others count as agreed on", self._untold, "batches")

    def _by_spans(self, reader: SpanReader, scores: Scores) -> Scores:
        prefix = scores.prefix
        assert isinstance(prefix, Prefix)
        read = reader.read(prefix.prompts, prefix.responses)
        for row, (spans, told) in enumerate(read):
            scores.logprobs[row, : len(prefix.responses[row])] = torch.nan
            for (a, b), logprob in zip(spans, told, strict=True):
                scores.logprobs[row, a:b] = logprob / (b - a)
        return replace(scores, spans=tuple(spans for spans, _ in read))

    def continue_from(
        self,
        scores: Scores,
        starts: Starts,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        rejoin: int = 0,
        tick: Tick = no_tick,
    ) -> list[Generation]:
        """Continue scored responses. See :class:`~topd.engines.Engine`; ``rejoin`` has no effect.

        A window has no tokens where none can be had: its prefix ends inside a character, or what
        the teacher wrote has no tokens of the student's that read alike.
        """
        prefix = scores.prefix
        assert isinstance(prefix, Prefix)
        before = [prefix.responses[row][:t] for row, t in starts]
        prompts = [prefix.prompts[row] for row, _ in starts]
        return self._tokens(before, prompts, Wanted(sampling, seeds, tick))

    def _tokens(self, before: Texts, prompts: Texts, wanted: Wanted) -> list[Generation]:
        """What the writer continues ``before`` with, as tokens; at most ``max_new_tokens``."""
        check_seeds(wanted.seeds, before)
        known = [self.border.text(ids) for ids in before]
        asked = [k for k, text in enumerate(known) if text is not None]
        limit = wanted.steps
        longer = replace(wanted.sampling, max_new_tokens=limit + SPARE)
        written = self.writer.write(
            [prompts[k] for k in asked],
            [known[k] or "" for k in asked],
            Wanted(longer, [wanted.seeds[k] for k in asked], wanted.tick),
        )
        tokens: list[Ids] = [()] * len(before)
        for k, answer in zip(asked, written, strict=True):
            tokens[k] = self._joined(before[k], answer, limit)
        return [Generation(ids, (), self.ends(ids)) for ids in tokens]

    def _joined(self, before: Ids, written: Written, limit: int) -> Ids:
        """The tokens of an answer after ``before``. One that was cut off loses its last token.

        The name of a special token of either ends it, as does the writer: nobody puts one into a
        text. So do bytes that are no character.
        """
        text, mark = self.border.cut_at_mark(written.text)
        ended = mark in self._ends if mark else written.ended
        text, other = self.theirs.cut_at_mark(text)
        if other:  # which the student does not have
            mark, ended = other, False
        text, *broken = text.split(BROKEN, 1)
        if broken:  # bytes of no character, which have no text
            mark, ended = "", False
        ids = self.border.ids(before, text)
        if ids is None:
            return ()
        if ended:
            return (*ids, self.end)[:limit]
        return ids[:limit] if len(ids) > limit or mark else ids[:-1]


def say_left_out(said: str, count: int, of: str) -> None:
    """Say the first one that is left out, the 10th, the 100th, and so on."""
    if str(count).strip("0") == "1":
        logger.error(f"{said}, {count} {of} so far; said again at ten times as many.")
