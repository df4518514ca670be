"""What the ranks of a run say to each other.

Every function here is a collective where there are several ranks: all of them must call it, as
often and in the same order, whatever their prompts, rollouts and windows are. With one rank it
costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from topd.errors import TOPDError

WRAPPER = "_checkpoint_wrapped_module."  # of activation checkpointing, inside a parameter's name

T = TypeVar("T")


def rank() -> int:
    """The number of this process among the ranks; 0 where there is one. No collective."""
    return dist.get_rank() if several() else 0


def end_ranks() -> None:
    """Leave the group of ranks, at the end of a process whose work is done.

    A group that is still there when Python ends has threads that may let go of Python objects
    after the interpreter is gone: the process then aborts, although all went well.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def everywhere(value: T) -> list[T]:
    """The picklable values of all ranks, in the order of the ranks."""
    if not several():
        return [value]
    found: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def on_first(value: T) -> list[T]:
    """The picklable values of all ranks on rank 0, in the order of the ranks; elsewhere none."""
    if not several():
        return [value]
    found: list[T | None] = [None] * dist.get_world_size()
    first = dist.get_rank() == 0
    dist.gather_object(value, found if first else None)
    return found if first else []  # type: ignore[return-value]


def agreed(
    run: Callable[[], T], waiting: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> T:
    """What ``run`` returns here. Where it raises TOPDError on one rank, all ranks raise it.

    So no rank waits for another that has given up, and what was learned can still be saved by all.

    Args:
        run: what may fail; no collective, or one that cannot.
        waiting: makes the context of waiting for the other ranks, to time it.
    """
    if not several():
        return run()
    fault, found = None, None
    try:
        found = run()
    except TOPDError as error:
        fault = error
    with waiting():
        faults = [error for error in everywhere(fault) if error is not None]
    if faults:
        raise fault or faults[0]
    return found  # type: ignore[return-value]


def check_alike(given: Mapping[str, Any]) -> None:
    """Refuse ranks that were given different things, each picklable. Raises TOPDError on all."""
    first, *others = everywhere(dict(given))
    for number, other in enumerate(others, start=1):
        for name in {**first, **other}:
            ours, theirs = first.get(name), other.get(name)
            if ours != theirs:
                shown = f": {ours!r}, and {theirs!r}" if len(f"{ours!r}{theirs!r}") < 100 else ""
                raise TOPDError(
                    f"{name}: is not the same on rank 0 and on rank {number}{shown}. Launch all "
                    "ranks with the same recipe, data, models and packages."
                )


def several() -> bool:
    """Whether there is more than one rank. No collective."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter, detached. A collective where it is sharded."""
    detached = parameter.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached
