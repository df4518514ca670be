"""What a run was asked for: first what differs from the defaults, then its files as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from topd.report.summary import SummaryTable
from topd.report.text import counted, plain, visible
from topd.runs.files import read_whole
from topd.runs.records import read_run
from topd.runs.settings import NO_CHOICE, differing, known

FILES = ("run.json", "manifest.json")
RESULTS = ("evaluation.json", "gate.json")  # these hold their own settings
# of models and data, what nobody needs to be told
PLAIN: dict[str, Any] = {"dtype": "float32", "split": "train", "size": 512, "chat": True}
EMPTY: tuple[Any, ...] = (None, {}, [], False, "")
ASKED = ("settings", "suite", "models", "versions", "machine", "data")


def settings_table(folder: Path) -> SummaryTable | None:
    """Models and data of a run, and every setting that is not its default; None: nothing known."""
    run = read_run(folder)
    rows = [*_made_of(run.get("recipe")), *_changed(run.get("config")), *_of_results(folder)]
    if not rows:
        return None
    shown = tuple(tuple(plain(text, limit=300) for text in row) for row in rows)
    if not run:
        asked = tuple(row[:2] for row in shown)
        return SummaryTable("What was asked", ("setting", "value"), asked, prose=True)
    title, columns = "What differs from the defaults", ("setting", "value", "default")
    return SummaryTable(title, columns, shown, prose=True)


def changes_on_resuming(folder: Path) -> Iterator[str]:
    """Where a run went on with other settings than before, and which: a sentence each time."""
    for resumed in read_run(folder).get("resumed", ()):
        found = [words for key, pair in resumed["changed"].items() for words in _change(key, *pair)]
        if found:
            done = counted(resumed["step"], "update")
            yield f"After {done} with other settings: {', '.join(found)}."


def _change(key: str, old: Any, new: Any) -> Iterator[str]:
    """What has changed, of sections only the keys that have."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            if old.get(name) != new.get(name):
                yield from _change(f"{key}.{name}", old.get(name), new.get(name))
    else:
        values = (plain(_text(value), limit=60) for value in (old, new))
        yield f"{plain(key.removeprefix('config.'), limit=60)} {' → '.join(values)}"


def settings_files(folder: Path) -> dict[str, str]:
    """The files that say how a run was made, to be read: run.json and manifest.json, or the parts
    of an evaluation's or a gate's result that say so."""
    found = {name: read_whole(folder / name) for name in FILES}
    for name in RESULTS:
        content = read_whole(folder / name)
        found[name] = {key: content[key] for key in ASKED if key in content}
    return {
        name: "\n".join(map(partial(visible, limit=2000), _lines(content)))
        for name, content in found.items()
        if content
    }


def _made_of(recipe: Any) -> Iterator[tuple[str, str, str]]:
    """The recipe's models and data: what is given of each."""
    if not isinstance(recipe, dict):
        return
    for part, content in recipe.items():
        if isinstance(content, dict):
            for key, value in content.items():
                if value not in EMPTY and PLAIN.get(key, EMPTY) != value:
                    yield f"{part}.{key}", _text(value), ""


def _changed(config: Any) -> Iterator[tuple[str, str, str]]:
    """Settings that differ, the method first, and those that only this command has."""
    if not isinstance(config, dict):
        return
    if "method" in config:
        yield "method", _text(config["method"]), _text(known().plain.get("method"))
    for name, (value, default) in sorted(differing(config).items()):
        if name != "method":
            yield name, _text(value), _text(default)
    own = {s.name.removeprefix("warmstart.").split()[0]: s.default for s in known().settings}
    for name, value in config.items():
        if name not in known().plain and name not in NO_CHOICE and own.get(name) != _text(value):
            yield name, _text(value), own.get(name, "")


def _of_results(folder: Path) -> Iterator[tuple[str, str, str]]:
    """What an evaluation or a gate was given."""
    yield from _made_of(read_whole(folder / "evaluation.json").get("settings"))
    for key in ("models", "suite"):
        yield from _made_of(read_whole(folder / "gate.json").get(key))


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _lines(content: Mapping[str, Any]) -> list[str]:
    return json.dumps(content, indent=2, ensure_ascii=False).split("\n")
