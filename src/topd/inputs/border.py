"""Where text meets token ids: what a student wrote as text, and more text as its tokens.

Only the new tokens are made from text. The ids before them stay as they are, whatever the tokenizer
would make of the whole; what is joined reads back as what was written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from topd.inputs.models.bare import named_faults
from topd.inputs.models.vocabulary import PROBE, known_ids
from topd.types import Ids

LEADS = ("\n", "a", ".")  # a text is encoded after one that its first token does not join
BROKEN = "\ufffd"  # a decoder's sign for bytes that are no whole character


class Border:
    """Joins text to token ids of one tokenizer.

    A text is decoded and encoded after a lead of fixed tokens: many tokenizers treat the first word
    of a text otherwise than the same word later.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._lead = self._plain("\n") or self._plain(PROBE)[:1]
        self._lead_text = self._decoded(self._lead)
        self.marks = special_names(tokenizer)

    def text(self, ids: Ids) -> str | None:
        """What ids read as inside a text; None where they end inside a character."""
        whole = self._decoded(self._lead + ids)
        if whole.endswith(BROKEN) or not whole.startswith(self._lead_text):
            return None
        return whole[len(self._lead_text) :]

    def reads(self, before: Ids, ids: Ids, text: str) -> bool:
        """Whether ids read as ``text`` after the ids ``before``."""
        known = self.text(before)
        return known is not None and self.text(before + ids) == known + text

    def ids(self, before: Ids, text: str, *, by_letter: bool = True) -> Ids | None:
        """Ids that read as ``text`` after the ids ``before``; None where there are none.

        First those that the tokenizer itself has for the text there, if it begins a token at the
        border; else those of the text alone, after some other text, or ``by_letter``.
        """
        if not text:
            return ()
        known = self.text(before)
        if known is None:
            return None
        candidates = self._candidates(known, text, by_letter)
        return next((found for found in candidates if self.reads(before, found, text)), None)

    def joined(self, before: Ids, text: str) -> Ids:
        """The ids of a text: such as read so after the ids ``before``, or those of it alone.

        Of a text alone many tokenizers begin with a space that is not in it. Some read nothing
        back: they write all in lower case, or a space before each word.
        """
        alone = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # or it raises
        if self.reads(before, alone, text):
            return alone
        return self.ids(before, text, by_letter=False) or alone

    def cut_at_mark(self, text: str) -> tuple[str, str]:
        """The text before the first special token's name in it, and that name; else all, ''."""
        found = [(text.index(mark), -len(mark), mark) for mark in self.marks if mark in text]
        if not found:
            return text, ""
        place, _, mark = min(found)
        return text[:place], mark

    def places(self, ids: Ids) -> list[int]:
        """How many characters of :meth:`text` there are after each token.

        Of tokens that end inside a character as many as before it: its last one has it.
        """
        found, done, texts = [], 0, 0
        for end in range(1, len(ids) + 1):
            first = max(0, done - 4)  # context for decoders that look at the token before
            before, piece = self.text(ids[first:done]), self.text(ids[first:end])
            if piece is not None and before is not None:
                texts, done = texts + len(piece) - len(before), end
            found.append(texts)
        return found

    def _candidates(self, known: str, text: str, by_letter: bool) -> Iterator[Ids]:
        found = self._after(self._lead_text + known, text)
        if found:
            yield found
        yield self._plain(text)
        for lead in LEADS:
            found = self._after(lead, text)
            if found:
                yield found
        if by_letter:
            yield tuple(token for c in text for token in self._character(c))

    def _character(self, c: str) -> Ids:
        found = (self._after(lead, c) for lead in LEADS)
        return next((ids for ids in found if ids and self.text(ids) == c), ())

    def _after(self, before: str, text: str) -> Ids | None:
        """The tokens of ``before + text`` from the border on, if one begins there."""
        try:
            with named_faults():
                whole = self.tokenizer(
                    before + text, add_special_tokens=False, return_offsets_mapping=True
                )
        except ValueError:  # a character that it cannot read, of the lead perhaps
            return None
        ids, offsets = whole["input_ids"], whole["offset_mapping"]
        border = len(before)
        first = next((i for i, (start, _) in enumerate(offsets) if start >= border), len(ids))
        if first and offsets[first - 1][1] > border:
            return None
        return tuple(ids[first:])

    def _plain(self, text: str) -> Ids:
        return known_ids(self.tokenizer, text)

    def _decoded(self, ids: Ids) -> str:
        return decoded(self.tokenizer, ids)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ids as they are, special tokens by their names."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def special_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The names of special tokens, by which no text is meant; longer ones first."""
    added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    return sorted({*tokenizer.all_special_tokens, *added} - {""}, key=len, reverse=True)


def special_search(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], re.Match[str] | None]:
    """Finds the first name of a special token in a text."""
    return re.compile("|".join(map(re.escape, special_names(tokenizer))) or "(?!)").search


def tells_places(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer tells which characters of a text a token is made of."""
    try:
        with named_faults():
            known = tokenizer("", add_special_tokens=False, return_offsets_mapping=True)
    except (NotImplementedError, KeyError, TypeError, ValueError):  # as slow ones say no
        return False
    return "offset_mapping" in known
