"""Work in several processes: what was done is kept if one fails, and they end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

Key = TypeVar("Key")
Task = TypeVar("Task")
Done = TypeVar("Done")


def in_workers(
    work: Callable[[Task], Done], tasks: Mapping[Key, Task], jobs: int
) -> Iterator[tuple[Key, Done]]:
    """Results as they come, of ``jobs`` processes with one thread each.

    If one fails, those under way still give theirs, no other begins, and then its error is raised.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_begin) as pool:
        runs = {pool.submit(work, task): key for key, task in tasks.items()}
        faults: list[BaseException] = []
        for done in as_completed(runs):
            if done.cancelled():
                continue
            if fault := done.exception():
                faults.append(fault)
                for run in runs:
                    run.cancel()
                continue
            yield runs[done], done.result()
        if faults:
            raise faults[0]


def _begin() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """However it ended: a worker of a comparison that was killed would go on writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)
