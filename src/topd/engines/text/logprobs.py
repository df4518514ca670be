"""Log-probs of the student's tokens, from a server that tells those of its own tokens of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from topd.inputs.border import Border
from topd.types import Ids

TOLD = 0.9  # of the student's tokens at least, where log-probs are wanted
Pieces = Sequence[tuple[str, float | None]]  # a server's tokens of a text, and their log-probs


def whole_text(border: Border, ids: Ids) -> str:
    """What ids read as, without a character that is cut off at their end."""
    texts = (border.text(ids[:end]) for end in range(len(ids), -1, -1))
    return next(text for text in texts if text is not None)


def logprobs_of_tokens(border: Border, ids: Ids, pieces: Pieces) -> list[float]:
    """The log-prob of every token, nats; NaN where none is told.

    A token has that of the server's tokens which read as it does. None is told where the server
    splits the text inside it, where a character is several tokens, where it spells the name of a
    special token letter by letter, and before such a place that the server does not spell.

    Args:
        border: of the student's tokenizer.
        ids: what the student wrote.
        pieces: of a text that ends with what the ids read as; the prompt's may come first.
    """
    text = whole_text(border, ids)
    after = {len(text): 0.0}  # at every border of the server's the log-prob of all that follows
    place = len(text)
    for piece, logprob in reversed(pieces):
        begin = place - len(piece)
        if not piece or logprob is None or begin < 0 or text[begin:place] != piece:
            break
        after[begin] = after[place] + logprob
        place = begin
    ends = [min(end, len(text)) for end in border.places(ids)]
    special = {*border.tokenizer.convert_tokens_to_ids(border.marks)}
    found = []
    for token, (a, b) in zip(ids, pairwise([0, *ends]), strict=True):
        spelt = token in special and any(a < place < b for place in after)
        told = a < b and a in after and b in after and not spelt
        found.append(after[a] - after[b] if told else math.nan)
    return found
