"""What can be set: methods, and the keys of a recipe, as rows of text."""

from __future__ import annotations

from collections.abc import Iterable

from topd.errors import TOPDError
from topd.runs.settings import Setting, is_current, known

RECOMMENDED = (
    "Start with opd, the default: after stage 1 (topd warmstart) if the teacher may write answers. "
    "Take first_fork where it may write some tokens and greedy accuracy counts: "
    "docs/which-method.md has the sizes."
)


def method_rows() -> Iterable[tuple[str, str, str]]:
    """Name, what it needs, and its first sentence, for every method."""
    return known().methods


def setting_rows(word: str = "") -> list[Setting]:
    """Settings with their defaults and explanations.

    Args:
        word: in the name or the explanation, whatever its case; empty: all that TOPD adds or whose
            default differs from transformers'.

    Raises:
        TOPDError: no setting has the word in it.
    """
    wanted = word.lower().lstrip("-").replace("-", "_")
    found = [
        row
        for row in _all()
        if (wanted in row.name.lower() or word.lower() in row.words.lower() if word else row.ours)
    ]
    if not found:
        raise TOPDError(f"settings: none has {word!r} in its name or explanation. Try another.")
    return found


def _all() -> Iterable[Setting]:
    """From the table, or from the classes if another transformers is installed."""
    if is_current():
        return known().settings
    from topd.commands.settings_table import settings

    return settings()
