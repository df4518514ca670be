"""Single tokens as text, from the run folder alone.

A run writes every token that occurs in it once to ``tokens.jsonl``: ``{"id": 5, "text": " the"}``,
or ``{"id": 9, "bytes": "e69d"}`` for a piece of a character. Text of a token is what it adds to a
text before it, its space included. So a reader needs neither the tokenizer nor its library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topd.errors import TOPDError
from topd.runs.files import numbered_lines

if TYPE_CHECKING:
    from topd.types import Ids

FILE = "tokens.jsonl"
BROKEN = "\N{REPLACEMENT CHARACTER}"
PART = "\N{MIDDLE DOT}"  # stands for a token that ends inside a character shown before it
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenWriter:
    """Gives each token's record once.

    Args:
        tokenizer: of transformers.
        seen: tokens that were given before, by a run that is now resumed.
    """

    def __init__(self, tokenizer: Any, seen: Iterable[int] = ()) -> None:
        from topd.inputs.border import decoded  # with torch, which no reader needs
        from topd.inputs.models.vocabulary import known_ids

        self.tokenizer, self._decoded = tokenizer, partial(decoded, tokenizer)
        self._seen = set(seen)
        self._anchor: Ids = known_ids(tokenizer, "a")[-1:]

    def records(self, sequences: Iterable[Sequence[int]]) -> Iterator[dict[str, Any]]:
        """Records of the tokens that were not given before, in order of appearance."""
        for token in (token for ids in sequences for token in ids):
            if token not in self._seen:
                self._seen.add(token)
                yield {"id": token, **self._piece(token)}

    def _piece(self, token: int) -> dict[str, str]:
        """What the token adds after a plain one: tokenizers drop a first token's space."""
        before, both = self._decoded(self._anchor), self._decoded((*self._anchor, token))
        text = both.removeprefix(before) if both.startswith(before) else self._decoded((token,))
        name = self.tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):
            return {"text": text}
        if byte := _BYTE.fullmatch(name):
            return {"bytes": byte[1].lower()}
        if BROKEN in text and all(c in _BYTE_OF for c in name):
            return {"bytes": bytes(_BYTE_OF[c] for c in name).hex()}
        return {"text": text}


class TokenTexts:
    """Reads ``tokens.jsonl``.

    Args:
        pieces: text, or bytes of a piece of a character, by token id.
    """

    def __init__(self, pieces: Mapping[int, str | bytes]) -> None:
        self.pieces = pieces

    @classmethod
    def read(cls, folder: Path) -> TokenTexts:
        """The tokens of a run folder; none if it has no ``tokens.jsonl``. Raises TOPDError."""
        lines = numbered_lines(folder / FILE)
        return cls(dict(_read_piece(folder / FILE, n, record) for n, record in lines))

    def texts(self, ids: Sequence[int]) -> list[str]:
        """One text a token. A character made of several tokens stands at the first of them.

        >>> tokens = TokenTexts({1: "so ", 2: b"\\xc3", 3: b"\\xa9"})
        >>> tokens.texts([1, 2, 3, 4, 3])
        ['so ', 'é', '·', '⟨4⟩', '⟨a9⟩']
        """
        found: list[str] = []
        while len(found) < len(ids):
            piece = self.pieces.get(ids[len(found)])
            if isinstance(piece, bytes):
                found += self._character(ids[len(found) :])
            else:
                found.append(f"⟨{ids[len(found)]}⟩" if piece is None else piece)
        return found

    def join(self, ids: Sequence[int]) -> str:
        """The tokens as one text."""
        return "".join(text for text in self.texts(ids) if text != PART)

    def _character(self, ids: Sequence[int]) -> list[str]:
        """The shortest run of byte pieces that is whole text, or the first one in hexadecimal."""
        whole = b""
        for count, token in enumerate(ids[:8], 1):
            piece = self.pieces.get(token)
            if not isinstance(piece, bytes):
                break
            whole += piece
            try:
                return [whole.decode(), *[PART] * (count - 1)]
            except UnicodeDecodeError:
                continue
        first = self.pieces[ids[0]]
        assert isinstance(first, bytes)
        return [f"⟨{first.hex()}⟩"]


def _read_piece(path: Path, number: int, record: dict[str, Any]) -> tuple[int, str | bytes]:
    try:
        piece = bytes.fromhex(record["bytes"]) if "bytes" in record else str(record["text"])
        return int(record["id"]), piece
    except (ValueError, KeyError, TypeError) as error:
        raise TOPDError(
            f"{path}, line {number}: not a token ({error!r}). Remove the line."
        ) from error


def _bytes_to_letters() -> dict[int, str]:
    """The letters that byte-level BPE writes bytes as. Source: GPT-2, encoder.py."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain}
    return letters | {byte: chr(256 + n) for n, byte in enumerate(others)}


_BYTE_OF = {letter: byte for byte, letter in _bytes_to_letters().items()}
