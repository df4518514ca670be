"""What can be set: methods, and the keys of a recipe, as rows of text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments

from topd.config import TOPDConfig
from topd.errors import TOPDError
from topd.methods import METHODS, Method
from topd.training.warmstart import WarmstartConfig

RECOMMENDED = (
    "Start with opd, the default: after stage 1 (topd warmstart) if the teacher may write answers. "
    "Take first_fork where it may write some tokens and greedy accuracy counts: "
    "docs/which-method.md has the sizes."
)


def method_rows() -> Iterator[tuple[str, str, str]]:
    """Name, what it needs, and its first sentence, for every method."""
    for name, method in METHODS.items():
        first = (inspect.getdoc(method.guide) or "").split("\n\n")[0]
        yield name, _needs(method), " ".join(first.split())


def setting_rows(word: str = "") -> list[tuple[str, str, str]]:
    """Name, default and explanation of settings.

    Args:
        word: in the name or the explanation, whatever its case; empty: all that TOPD adds or whose
            default differs from transformers'.

    Raises:
        TOPDError: no setting has the word in it.
    """
    plain = {field.name: _default(field) for field in fields(TrainingArguments)}
    wanted = word.lower().lstrip("-").replace("-", "_")
    found: list[tuple[str, str, str]] = []
    for kind, place in ((TOPDConfig, ""), (WarmstartConfig, "warmstart.")):
        seen = {name for name, _, _ in found}
        for field in fields(kind):
            row = (place + field.name, _default(field), _words(field))
            ours = field.name not in plain or row[1] != plain[field.name]
            matches = wanted in field.name.lower() or word.lower() in row[2].lower()
            known = place and (field.name, *row[1:]) in found
            if (matches if word else ours) and not known and row[0] not in seen:
                found.append(row)
    if not found:
        raise TOPDError(f"settings: none has {word!r} in its name or explanation. Try another.")
    return found


def _needs(method: Method) -> str:
    needs = []
    if method.looks_ahead:
        needs.append("the teacher writes windows")
    if method.statistics:
        needs.append("one more student forward")
    options = [*inspect.signature(method.guide).parameters.values()][1:]
    if options:
        shown = ", ".join(f"{option.name}: {option.default}" for option in options)
        needs.append(f"method_options {{{shown}}}")
    if method.settings:
        shown = ", ".join(f"{name}: {value}" for name, value in method.settings.items())
        needs.append(f"brings {{{shown}}}")
    return "; ".join(needs)


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return "none" if field.default is None else str(field.default)
    return "none" if field.default_factory is MISSING else str(field.default_factory())


def _words(field: Field[Any]) -> str:
    return " ".join(str(field.metadata.get("help", "")).split())
