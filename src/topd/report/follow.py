"""The page of a run under way: made again as its records grow, until the run has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from topd.errors import TOPDError
from topd.report.page import write_report
from topd.runs.files import is_written_to

EVERY = 10.0  # seconds between two looks, at least
SHARE = 5  # a page is made again after so many times what it took


def follow(
    folder: Path,
    *,
    rollouts: int | None = None,
    say: Callable[[str], None] = print,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Make the page now and whenever the records have grown; return it once the run has ended.

    During the run the page in a browser loads itself again, at the same place.

    Args:
        folder: of a run; it may have just begun.
        rollouts: as in :func:`~topd.report.page.write_report`.
        say: called with a line for what a watcher should know.
        sleep: waits so many seconds.

    Raises:
        TOPDError: the folder holds no run and nobody writes there, or its page cannot be made.
    """
    seen, told = -1, ""
    while is_written_to(folder):
        size, begun = _size(folder), time.monotonic()
        if size != seen:
            seen = size
            try:
                path = write_report(folder, rollouts=rollouts, reload=round(2 * EVERY))
                line = f"report: {path} (follows the run; Ctrl-C ends this, not the run)"
            except TOPDError as error:  # its first records are being written
                line = f"no page yet: {error}"
            if line != told:
                say(line)
            told = line
        sleep(max(EVERY, SHARE * (time.monotonic() - begun)))
    path = write_report(folder, rollouts=rollouts)
    say(f"report: {path} (nobody writes to the run: this is its last page)")
    return path


def _size(folder: Path) -> int:
    """Bytes of all records."""
    return sum(path.stat().st_size for path in folder.glob("*.jsonl"))
