"""Reads back what a training run wrote, and trusts none of it.

Whatever is in the files of a folder, they are read, or refused in words that name file and
line. Records are those of :mod:`topd.runs.records`, without their leniency; what a record has
besides is kept as it is.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from topd.errors import TOPDError
from topd.runs.files import UNREADABLE, json_text, raw_lines
from topd.runs.ledger import HEAD, LEDGER, Entry, ended
from topd.runs.records import BranchRecord, ForkRecord, GuidanceRecord, Id, PromptIds, RolloutRecord


class _Stored(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Line(_Stored):
    step: Id


class _RolloutLine(RolloutRecord):
    """A rollout as training writes it: nothing is left out, and nothing taken for another type."""

    model_config = ConfigDict(strict=True)
    step: Id
    rollout: Id
    prompt_ids: PromptIds
    teacher_prompt_ids: PromptIds
    response_ids: tuple[Id, ...]
    logprobs: tuple[float, ...]
    finished: bool

    @model_validator(mode="after")
    def _one_each(self) -> _RolloutLine:
        if len(self.logprobs) not in (0, len(self.response_ids)):
            raise ValueError("logprobs and response_ids differ in length")
        turns = pairwise(((0, 0), *self.replies, (len(self.response_ids),) * 2))
        if self.replies and not all(a <= b < c <= d for (a, b), (c, d) in turns):
            raise ValueError("replies are not inside the response, one after the other")
        return self


class _GuidanceLine(GuidanceRecord):
    """Likewise, of guidance."""

    model_config = ConfigDict(strict=True)
    step: Id
    rollout: Id
    forks: tuple[ForkRecord, ...]
    branches: tuple[BranchRecord, ...]


class _Link(_Stored):
    """An entry of the ledger; which other keys it needs depends on what it is of."""

    n: int
    previous: str
    hash: str


class _OfFile(_Link):
    file: str
    record: str


class _Begin(_Link):
    step: Id
    records: dict[str, Id]
    directory: str = ""


class _Weights(_Link):
    step: Id
    student: str


class _Head(_Stored):
    entries: Annotated[int, Field(ge=1)]
    hash: str


class _Model(_Stored):
    sha256: str


class _Manifest(_Stored):
    models: dict[str, _Model]
    data: str


LINES: dict[str, type[BaseModel]] = {
    "metrics.jsonl": _Line,
    "rollouts.jsonl": _RolloutLine,
    "guidance.jsonl": _GuidanceLine,
}
EVENTS: dict[Any, type[_Link]] = {"begin": _Begin, "update": _Weights, "end": _Weights}


def split_lines(path: Path) -> tuple[list[bytes], bool]:
    """The lines of a file without their ends, and whether the last has one. Raises TOPDError."""
    lines = list(raw_lines(path))
    ended = all(line.endswith(b"\n") for line in lines)
    return [line.removesuffix(b"\n") for line in lines], ended


def read_entries(folder: Path) -> tuple[list[Entry], list[str]]:
    """The ledger's entries, and in words which lines are none or were written otherwise.

    Raises:
        TOPDError: there is no ledger, or it cannot be read.
    """
    path = folder / LEDGER
    if not path.is_file():
        raise TOPDError(
            f"{folder}: has no {LEDGER}. Only runs of topd train and topd warmstart can be audited "
            "or replayed."
        )
    lines, whole = split_lines(path)
    entries: list[Entry] = []
    faults: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            _kind_of(entry).model_validate(entry)
        except UNREADABLE:
            faults.append(f"{LEDGER}: line {number} is not an entry")
            continue
        entries.append(entry)
        if json.dumps(entry).encode() != line:
            faults.append(f"{LEDGER}: line {number} was changed, though not what it says")
    return entries, faults if whole else [*faults, f"{LEDGER}: line {len(lines)} is cut off"]


def entries_in(folder: Path) -> list[Entry]:
    """The ledger's entries; none where there is no ledger."""
    return read_entries(folder)[0] if (folder / LEDGER).exists() else []


def not_of_the_end(student: Path) -> list[str]:
    """A warning where a run's ``student/`` is not that of its latest updates; else nothing."""
    run = student.parent
    if student.name != "student" or not (entries := entries_in(run)) or ended(entries):
        return []
    ends = [entry["step"] for entry in entries if entry.get("event") == "end"]
    stopped = f"is that of {ends[-1]} updates, before it was resumed" if ends else "may be damaged"
    return [f"warning: {run} has not ended: its student/ {stopped}"]


def _kind_of(entry: Any) -> type[_Link]:
    """What an entry must hold."""
    if not isinstance(entry, dict):
        return _Link
    event = entry.get("event")
    named = EVENTS.get(event, _Link) if isinstance(event, str) else _Link
    return _OfFile if "file" in entry else named


def read_head(folder: Path) -> dict[str, Any] | None:
    """The number of entries and the last hash; None if it is missing or not as it is written."""
    try:
        content = _content(folder / HEAD)
        head = _Head.model_validate_json(content).model_dump()
    except UNREADABLE:
        return None
    return head if content == json_text(head).encode() else None


def read_records(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a record file; none if the file is missing.

    Raises:
        TOPDError: a line is no such record.
    """
    lines, _ = split_lines(folder / name)
    return [_checked(LINES[name], line, f"{name}, line {n}") for n, line in enumerate(lines, 1)]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The fingerprints of models and data. Raises TOPDError if the manifest has none."""
    name = "manifest.json"
    found = _checked(_Manifest, _content(folder / name), name)
    missing = [role for role in ("student", "teacher") if role not in found["models"]]
    if missing:
        raise TOPDError(f"{name}: cannot be read: models.{missing[0]} is missing.")
    return found


def _checked(kind: type[BaseModel], content: bytes, place: str) -> dict[str, Any]:
    """JSON, if it is of this kind. Raises TOPDError if not."""
    try:
        found = json.loads(content)
        kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "as a whole"
        raise TOPDError(f"{place}: cannot be read: {where}: {first['msg']}.") from error
    except UNREADABLE as error:
        raise TOPDError(f"{place}: cannot be read: {error}.") from error
    return found


def _content(path: Path) -> bytes:
    """All of a file; nothing if it is missing. Raises TOPDError if it cannot be read."""
    return b"".join(raw_lines(path))
