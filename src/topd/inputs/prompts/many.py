"""Many rows are worked on by several processes, with a bar; the result is that of one process."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")
Made = TypeVar("Made")
MANY = 20_000  # rows from which other processes are worth their start: some ten seconds of work
CHUNK = 500
_shared: list[Any] = []  # work and items, which a forked process has without being sent them


def mapped(work: Callable[[Item], Made], items: Sequence[Item], what: str) -> list[Made]:
    """``work`` of every item, in order; of many by as many forked processes as there are cores.

    It gives a value that can be pickled; its errors are raised here. ``what`` is for the bar.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if len(items) < MANY or cores < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return [work(item) for item in items]
    starts = range(0, len(items), CHUNK)
    _shared[:] = work, items
    try:
        with multiprocessing.get_context("fork").Pool(cores) as pool:
            parts: Iterator[list[Made]] = pool.imap(_part, starts)
            shown = track(
                parts,
                f"encoding {len(items):,} {what}",
                len(starts),
                console=Console(stderr=True),
                transient=True,
                disable=not sys.stderr.isatty(),  # colours may be asked for elsewhere
            )
            return [made for part in shown for made in part]
    finally:
        _shared.clear()


def _part(start: int) -> list[Any]:
    work, items = _shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in this process: each has a core
    return [work(item) for item in items[start : start + CHUNK]]
