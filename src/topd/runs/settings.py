"""What can be set, and its defaults, from a table that ``python -m bench.settings`` writes.

Reading the classes themselves takes torch and transformers; help and pages must not wait for those.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from topd.errors import TOPDError

TABLE = Path(__file__).with_name("settings.json")
# places and machines, not chosen for what is learned; the bars' default is what the process logs,
# and use_cpu, with which the table is made, unpins memory
NO_CHOICE = (
    *("output_dir", "logging_dir", "run_name", "use_cpu", "local_rank", "disable_tqdm"),
    "dataloader_pin_memory",
)


class Setting(NamedTuple):
    """A setting: its name with its section, default and explanation; ``ours`` if TOPD adds it or
    its default differs from transformers'."""

    name: str
    default: str
    words: str
    ours: bool


class Known(NamedTuple):
    """All settings, methods (name, needs, words), and the values of a run that gives nothing."""

    settings: tuple[Setting, ...]
    methods: tuple[tuple[str, str, str], ...]
    plain: Mapping[str, Any]


@cache
def known() -> Known:
    """The table."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return Known(
        tuple(Setting(*row) for row in table["settings"]),
        tuple((name, needs, words) for name, needs, words in table["methods"]),
        table["plain"],
    )


def matching(word: str, rows: Iterable[Setting]) -> list[Setting]:
    """The settings with a word in name or explanation, whatever its case; without one, our own.

    Raises:
        TOPDError: no setting has the word in it.
    """
    wanted = word.lower().lstrip("-").replace("-", "_")
    found = [
        row
        for row in rows
        if (wanted in row.name.lower() or word.lower() in row.words.lower() if word else row.ours)
    ]
    if not found:
        raise TOPDError(f"settings: none has {word!r} in its name or explanation. Try another.")
    return found


def is_current() -> bool:
    """Whether the table was made with the transformers that is installed."""
    made_with = json.loads(TABLE.read_text(encoding="utf-8"))["transformers"]
    try:
        return bool(version("transformers") == made_with)
    except PackageNotFoundError:
        return False


def differing(config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of the settings of a run those that are not the defaults: name to (value, default)."""
    plain = known().plain
    return {
        name: (value, plain[name])
        for name, value in config.items()
        if name in plain and value != plain[name]
    }
