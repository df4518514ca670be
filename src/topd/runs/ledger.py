"""A chain of hashes beside the run folder's records: what was written, in which order.

``ledger.jsonl`` has an entry for every record and every file that a training run writes::

    {"n": 7, "file": "guidance.jsonl", "step": 0, "rollout": 1, "record": SHA-256 of the line,
     "previous": hash of entry 6, "hash": SHA-256 of this entry without its hash}

Entries are only ever added. ``{"event": "begin", "step": s, "records": {NAME: n}}`` says that a run
begins there, or resumes from a checkpoint: what was recorded after the first ``n`` lines of a file
was dropped and is re-derived; ``directory``, where the command ran. ``update`` names the student's
weights before an update, ``end`` is the last entry of a run that ended. ``head.json`` holds the
number of entries and the last hash, so that a chain whose end was cut off is found too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from topd.errors import TOPDError
from topd.runs.files import UNREADABLE, digest, raw_lines, write_whole

LEDGER, HEAD = "ledger.jsonl", "head.json"
START = "0" * 64  # what the first entry follows

Entry: TypeAlias = dict[str, Any]


class Ledger:
    """Adds entries to the chain of a folder; continues where an earlier one ended.

    A last entry that was cut off while it was written, or did not reach the disk, is dropped.

    Raises:
        TOPDError: the one before it is not an entry either.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / LEDGER
        lines = list(raw_lines(path))
        whole = lines[:-1] if lines and _end_at(lines[-1]) is None else lines
        end = _end_at(whole[-1]) if whole else (0, START)
        if end is None:
            raise TOPDError(
                f"{path}, line {len(whole)}: is not an entry, and not the last line. Bring the "
                "ledger back, or start over in another folder."
            )
        if len(whole) < len(lines):
            os.truncate(path, sum(map(len, whole)))
        self.count, self.head = end

    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Link the entries to those before and write them, and the new head."""
        with open(self.folder / LEDGER, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(self._linked(entry)) + "\n" for entry in entries)
        write_whole(self.folder / HEAD, {"entries": self.count, "hash": self.head})

    def _linked(self, entry: Mapping[str, Any]) -> Entry:
        linked = {"n": self.count, **entry, "previous": self.head}
        self.count, self.head = self.count + 1, entry_hash(linked)
        return {**linked, "hash": self.head}


def _end_at(line: bytes) -> tuple[int, str] | None:
    """How many entries a chain has up to a line, and the last one's hash; None if it is none."""
    try:
        entry = json.loads(line.decode())
        number, own = entry["n"], entry["hash"]
    except (*UNREADABLE, LookupError, TypeError):
        return None
    known = type(number) is int and isinstance(own, str) and line.endswith(b"\n")
    return (number + 1, own) if known else None


def entry_hash(entry: Mapping[str, Any]) -> str:
    """SHA-256 of an entry as canonical JSON (sorted keys, no spaces), its own hash left out.

    The hash of the entry before it is part of it.
    """
    content = {key: value for key, value in entry.items() if key != "hash"}
    return digest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def check_chain(entries: Iterable[Mapping[str, Any]], head: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a chain: changed, missing and swapped entries, a cut end. In words."""
    expected, previous, at = 0, START, {}
    for entry in entries:
        at[entry["n"]] = entry["hash"]
        if entry["n"] > expected:
            yield f"{LEDGER}: {_span(expected, entry['n'] - 1)} missing"
        elif entry["n"] < expected:
            yield f"{LEDGER}: entry {entry['n']} comes after entry {expected - 1}: moved or added"
        elif entry["previous"] != previous:
            this = f"entry {entry['n']}"
            yield f"{LEDGER}: {this} does not follow the one before it: one was replaced"
        if entry["hash"] != entry_hash(entry):
            yield f"{LEDGER}: entry {entry['n']} was changed"
        expected, previous = entry["n"] + 1, entry["hash"]
    last = head["entries"] - 1
    if last >= expected and head["hash"] == previous:
        yield f"{HEAD}: counts {head['entries']} entries, the chain has {expected}"
    elif last >= expected:
        yield f"{LEDGER}: its end is missing, {_span(expected, last)} gone"
    elif last >= 0 and at.get(last) != head["hash"]:
        yield f"{HEAD}: its hash is not that of entry {last}: the chain was rewritten"


def surviving(entries: Iterable[Entry]) -> list[Entry]:
    """The entries of files and records that count.

    Those of updates that were re-derived are left out; of a file, the latest entry counts.
    """
    files: dict[str, Entry] = {}
    records: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.get("event") == "begin":
            for name, kept in entry["records"].items():
                del records.setdefault(name, [])[int(kept) :]
        elif "file" in entry and "step" in entry:
            records.setdefault(entry["file"], []).append(entry)
        elif "file" in entry:
            files[entry["file"]] = entry
    return [*files.values(), *(entry for of_file in records.values() for entry in of_file)]


def ended(entries: Iterable[Entry]) -> Entry | None:
    """The ``end`` of a run that has ended; None: it has not, or not since it was resumed."""
    found: Entry | None = None
    for entry in entries:
        if entry.get("event") in ("begin", "end"):
            found = entry if entry["event"] == "end" else None
    return found


def _span(first: int, last: int) -> str:
    return f"entry {first} is" if first == last else f"entries {first} to {last} are"
