"""Files of a run folder: JSON written atomically, JSONL read and cut a line at a time."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from topd.errors import TOPDError

UNREADABLE = (ValueError, RecursionError)  # not UTF-8, not JSON, not the right keys, too deep

LOCK = ".lock"  # of the process that writes to a run folder, which touches it (topd.runs.lock)
PATIENCE = 60.0  # seconds that a lock from another host is watched: attributes on NFS may be as old


def check_is_folder(folder: Path) -> None:
    """Raises TOPDError for a run folder that is not there."""
    if not folder.is_dir():
        raise TOPDError(f"run folder {folder}: the folder does not exist. Give one under runs/.")


def ranks_of(checkpoint: Path) -> int:
    """How many ranks saved a checkpoint: each has a file of its random state there."""
    return len(list(checkpoint.glob("rng_state*.pth"))) or 1


def is_written_to(folder: Path) -> bool:
    """Whether a process has touched the folder's lock of late. Takes no lock."""
    try:
        return time.time() - (folder / LOCK).stat().st_mtime < PATIENCE
    except FileNotFoundError:
        return False


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON file, atomically."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json_text(record))
    partial.replace(path)


def read_whole(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run folder; empty if there is none. Raises TOPDError if broken."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes().decode())
    except UNREADABLE as error:
        raise TOPDError(
            f"{path}: not valid JSON ({error}). Bring it back, or start over in another folder."
        ) from error
    if not isinstance(content, dict):
        raise TOPDError(f"{path}: must hold one JSON object.")
    return content


def as_json(record: Mapping[str, Any]) -> Any:
    """A record as it is read back: tuples are lists, keys are text."""
    return json.loads(json.dumps(record, default=str))


def json_text(record: Mapping[str, Any]) -> str:
    """How a JSON file of the run folder is written."""
    return json.dumps(record, indent=2, default=str) + "\n"


def trim(path: Path, keep: Callable[[dict[str, Any]], bool] = lambda _: True) -> int:
    """Cut a JSONL file before its first line that is not to be kept, or a damaged last one.

    Damaged is what was cut off while it was written, or did not reach the disk. Reads a line at a
    time. Returns the number of lines left; 0 if the file is missing.

    Raises:
        TOPDError: a line is damaged that is not the last; nothing is cut then.
    """
    if not path.exists():
        return 0
    kept = end = 0
    lines = raw_lines(path)
    for line in lines:
        try:
            wanted = line.endswith(b"\n") and keep(json.loads(line.decode()))
        except (*UNREADABLE, LookupError, TypeError) as error:
            if next(lines, None) is not None:
                raise TOPDError(
                    f"{path}, line {kept + 1}: not a record ({error}), and not the last line. "
                    "Bring it back, or start over in another folder."
                ) from error
            break
        if not wanted:
            break
        kept, end = kept + 1, end + len(line)
    os.truncate(path, end)
    return kept


def raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file as they are, with their ends, one at a time; none if it is missing.

    Raises:
        TOPDError: it is there and cannot be read.
    """
    try:
        if path.is_file():
            with open(path, "rb") as file:
                yield from file
    except OSError as error:
        raise TOPDError(
            f"{path}: cannot be read ({error.strerror}). Check its permissions."
        ) from error


def numbered_lines(
    path: Path, kind: type = dict, only: Container[int] | None = None
) -> Iterator[tuple[int, Any]]:
    """The values of a JSONL file with the numbers of their lines, one at a time.

    A last line cut off by a job that is running or was killed is left out; a missing file has none.

    Args:
        path: the file.
        kind: of every value: dict, or object for any.
        only: numbers of the lines to read; none: all.

    Raises:
        TOPDError: the file cannot be read, or a line is not JSON, or of another kind.
    """
    for number, line in enumerate(raw_lines(path), 1):
        if not line.strip() or (only is not None and number not in only):
            continue
        try:
            content = json.loads(line.decode())
        except UNREADABLE as error:
            if not line.endswith(b"\n"):
                return
            raise TOPDError(f"{path}, line {number}: not valid JSON ({error}).") from error
        if not isinstance(content, kind):
            raise TOPDError(f"{path}, line {number}: must be a JSON object.")
        yield number, content


def read_lines(path: Path, kind: type = dict) -> Iterator[Any]:
    """The values of :func:`numbered_lines` without the numbers."""
    return (content for _, content in numbered_lines(path, kind))


def kept_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file to be added to: a last line that was cut off is dropped from it."""
    trim(path)
    return list(read_lines(path))


def sync(path: Path) -> None:
    """Have a file or a folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
