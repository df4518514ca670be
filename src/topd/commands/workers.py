"""Work in several processes: what was done is kept if one fails, and they end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import takewhile
from multiprocessing.queues import SimpleQueue
from typing import TypeVar

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"

Key = TypeVar("Key")
Task = TypeVar("Task")
Done = TypeVar("Done")


def in_workers(
    work: Callable[[Task], Done], tasks: Mapping[Key, Task], jobs: int
) -> Iterator[tuple[Key, Done]]:
    """Results as they come, of ``jobs`` processes with one thread each.

    Where several GPUs are visible each process has one of them, in turn. If one fails, those under
    way still give theirs, no other begins, and then its error is raised. Where the caller is
    interrupted, or wants no more, all end at once.
    """
    spawn = multiprocessing.get_context("spawn")
    devices, places = visible_devices(), spawn.SimpleQueue()
    for number in range(jobs):
        places.put(devices[number % len(devices)] if len(devices) > 1 else None)
    with ProcessPoolExecutor(
        jobs, mp_context=spawn, initializer=_begin, initargs=(places,)
    ) as pool:
        try:
            yield from _results(pool, work, tasks)
        except (KeyboardInterrupt, GeneratorExit):
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def _results(
    pool: ProcessPoolExecutor, work: Callable[[Task], Done], tasks: Mapping[Key, Task]
) -> Iterator[tuple[Key, Done]]:
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


def visible_devices() -> list[str]:
    """The GPUs that this process may use, by their names in ``CUDA_VISIBLE_DEVICES``."""
    named = os.environ.get(VISIBLE)
    if named is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    names = (name.strip() for name in named.split(","))
    return [*takewhile(lambda name: name not in ("", "-1"), names)]  # as CUDA reads them


def _begin(places: SimpleQueue[str | None]) -> None:
    """A worker begins. CUDA, which has not started here yet, sees its GPU alone.

    Ctrl-C, which a terminal tells all processes, is its parent's to act on.
    """
    device = places.get()
    if device is not None:
        os.environ[VISIBLE] = device
    signal.signal(signal.SIGINT, lambda *_: None)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """However it ended: a worker of a comparison that was killed would go on writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)
