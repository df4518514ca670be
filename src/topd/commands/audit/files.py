"""The chain of the ledger, and files and records against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from topd.commands.audit.result import AuditResult, place_of
from topd.errors import TOPDError
from topd.runs import checkpoints
from topd.runs.files import digest, file_digest
from topd.runs.folder import RECORDS, files_in
from topd.runs.ledger import HEAD, Entry, check_chain, ended, surviving
from topd.runs.records import read_run
from topd.runs.verified import read_entries, read_head, split_lines

PLACES = ("student", "adapter")
SAVED = " (by the resumed run, if that was stopped while it saved its student)"


def of_comparison(folder: Path) -> bool:
    """Whether a folder is a comparison's: it has a ledger for its plan, as its runs have theirs."""
    with suppress(TOPDError):  # damaged, as its digest in the ledger says
        return "compare" in read_run(folder)
    return False


def read_chain(folder: Path, found: AuditResult) -> list[Entry]:
    """The ledger's entries; what is wrong with their chain is found here."""
    entries, faults = read_entries(folder)
    found.faults += faults
    head = read_head(folder)
    if head is None:
        found.faults.append(f"{HEAD}: is missing or no head")
    found.faults += check_chain(entries, head or {"entries": 0, "hash": ""})
    found.checked.append(f"chain: {len(entries)} entries")
    return entries


def check_end(folder: Path, entries: Sequence[Entry], found: AuditResult) -> None:
    """Whether the ledger says how the run ended, and so which student is the right one."""
    if ended(entries):
        return
    there = [name for name in PLACES if any(p.is_file() for p in (folder / name).rglob("*"))]
    before = [entry["step"] for entry in entries if entry.get("event") == "end"]
    if before:
        begun = [entry["step"] for entry in entries if entry.get("event") == "begin"][-1]
        found.checked += [
            f"the run was resumed after {begun} updates and has not ended since",
            *(f"{name}: of {before[-1]} updates, from before it was resumed" for name in there),
        ]
        return
    found.checked.append("the run has not ended, or was stopped")
    stopped = "It was stopped while it saved this, or the"
    if (folder / "student" / "README.md").exists():  # written last
        stopped = "The"
    found.faults += (
        f"{name}: cannot be verified: the ledger has no end of the run. {stopped} ledger's last "
        "entries are lost or were cut off. Resume the run: it then saves its student again"
        for name in there
    )


def check_records(folder: Path, entries: Sequence[Entry], found: AuditResult) -> None:
    """Files and records against the entries that count."""
    saved = "" if ended(entries) else SAVED
    entries = surviving(entries)
    whole = [entry for entry in entries if "step" not in entry]
    for entry in whole:
        of_end = saved if entry["file"].startswith(PLACES) else ""
        faults = _file_faults(folder, entry["file"], entry["record"])
        found.faults += (fault + of_end for fault in faults)
    known = {entry["file"] for entry in whole}
    found.faults += (
        f"{name}: is not in the ledger"
        for name in files_in(folder, *PLACES)
        if name not in known
        # earlier versions sealed weights only
        and ("student/config.json" in known or name.endswith(".safetensors"))
    )
    records = 0
    for name in RECORDS:
        expected = [entry for entry in entries if entry["file"] == name and "step" in entry]
        lines, ends = split_lines(folder / name)
        found.faults += _line_faults(name, expected, [digest(line) for line in lines])
        if not ends:
            found.faults.append(f"{name}: line {len(lines)} is cut off")
        records += len(expected)
    found.checked.append(f"files: {len(whole)}, records: {records}")


def _file_faults(folder: Path, name: str, recorded: str) -> Iterator[str]:
    """A file that is missing or was changed; of a checkpoint, any of its files."""
    path = folder / name
    try:
        if path.name == checkpoints.SEAL and not path.parent.exists():
            return  # pruned
        if not path.is_file():
            yield f"{name}: is missing"
        elif file_digest(path) != recorded:
            yield f"{name}: was changed"
        elif path.name == checkpoints.SEAL and isinstance(
            fault := checkpoints.examined(path.parent), str
        ):
            yield f"{path.parent.name}: {fault}"
    except OSError as error:
        yield f"{name}: cannot be read ({error.strerror})"


def _line_faults(name: str, expected: Sequence[Entry], lines: Sequence[str]) -> Iterator[str]:
    """Records that were changed, are missing, were added, or are in another place."""
    known = {entry["record"]: entry for entry in expected}
    there = set(lines)
    missing = [entry for entry in expected if entry["record"] not in there]
    strange = [n for n, line in enumerate(lines, 1) if line not in known]
    for entry in missing:
        changed = strange.pop(0) if strange else None
        how = "is missing" if changed is None else f"was changed (line {changed})"
        yield f"{name}, {place_of(entry)}: {how}"
    for number in strange:
        yield f"{name}, line {number}: is not in the ledger"
    if missing or strange:
        return
    for number, (line, entry) in enumerate(zip(lines, expected, strict=False), 1):
        if line != entry["record"]:
            here, there_was = place_of(known[line]), place_of(entry)
            yield f"{name}, line {number}: {here} stands where {there_was} did"
    if len(lines) != len(expected):
        yield f"{name}: has {len(lines)} lines, the ledger {len(expected)}"
