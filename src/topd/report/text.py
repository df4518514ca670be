"""Untrusted text made fit to be shown: nothing invisible, nothing endless, nothing broken."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import lru_cache

LIMIT = 200  # characters of one token that are shown
JOINERS = "\u200c\u200d"  # part of words and emoji
NAMES = {"\n": "↵\n", "\t": "⇥\t", "\r": "␍"}


@lru_cache(maxsize=1 << 16)  # the same tokens come again and again
def visible(text: str, *, limit: int = LIMIT) -> str:
    """Text with its controls, bidirectional marks and lone surrogates written out.

    >>> visible("a\\n\\u202eb\\x1b[31m")
    'a↵\\n⟨U+202E⟩b⟨U+001B⟩[31m'
    """
    shown = "".join(map(_shown, text[:limit]))
    if len(text) > limit:
        shown += f"… ({len(text):,} characters)"
    return shown


def plain(text: str, *, limit: int = 4000) -> str:
    """As :func:`visible`, in one line: for titles, labels and search results.

    >>> plain("a\\n b")
    'a b'
    """
    return visible(" ".join(text.split()), limit=limit)


def counted(count: float, what: str) -> str:
    """A number of things in words.

    >>> counted(1, "token"), counted(2000, "token")
    ('1 token', '2,000 tokens')
    """
    return f"{count:,.0f} {what}{'s' * (count != 1)}"


def join_visible(texts: Iterable[str]) -> str:
    """Tokens as running text, with line breaks kept and everything else visible."""
    return "".join(visible(text).replace("↵\n", "\n").replace("⇥\t", "\t") for text in texts)


def _shown(character: str) -> str:
    if character in NAMES:
        return NAMES[character]
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return f"⟨U+{ord(character):04X}⟩" if hidden and character not in JOINERS else character
