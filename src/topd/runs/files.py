"""Files of a run folder: JSON written atomically, JSONL read and cut a line at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from topd.errors import TOPDError


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
    except ValueError as error:
        raise TOPDError(
            f"{path}: not valid JSON ({error}). Bring it back, or start over in another folder."
        ) from error
    if not isinstance(content, dict):
        raise TOPDError(f"{path}: must hold one JSON object.")
    return content


def json_text(record: Mapping[str, Any]) -> str:
    """How a JSON file of the run folder is written."""
    return json.dumps(record, indent=2, default=str) + "\n"


def trim(path: Path, keep: Callable[[dict[str, Any]], bool] = lambda _: True) -> int:
    """Cut a JSONL file before its first line that is half-written or not to be kept.

    Reads a line at a time. Returns the number of lines left; 0 if the file is missing.
    """
    if not path.exists():
        return 0
    kept = end = 0
    with open(path, "r+b") as file:
        for line in file:
            if not line.endswith(b"\n") or not keep(json.loads(line)):
                break
            kept, end = kept + 1, end + len(line)
        file.truncate(end)
    return kept


def read_lines(path: Path) -> Iterator[Any]:
    """The records of a JSONL file, one at a time."""
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def sync(path: Path) -> None:
    """Have a file or a folder reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
