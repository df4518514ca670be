"""Work in chunks that fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.utils import logging

logger = logging.get_logger(__name__)

Result = TypeVar("Result")


def in_chunks(
    work: Callable[[slice], list[Result]],
    count: int,
    most: int,
    release: Callable[[], None] = lambda: None,
) -> list[Result]:
    """The results of ``count`` pieces of work, ``most`` at a time, fewer where memory runs out.

    Then ``release`` gives back what is kept from one to the next: fewer would have as much.

    >>> in_chunks(lambda some: list(range(5))[some], 5, 2)
    [0, 1, 2, 3, 4]

    Raises:
        RuntimeError: out of memory with a single piece.
    """
    done: list[Result] = []
    while len(done) < count:
        most = min(most, count - len(done))
        try:
            done += work(slice(len(done), len(done) + most))
            continue
        except RuntimeError as error:
            if most == 1 or not should_reduce_batch_size(error):
                raise
        most //= 2  # outside the handler, whose traceback holds what is to be freed
        release()
        clear_device_cache(garbage_collection=True)
        logger.warning_once(
            f"out of memory in writing: {most} rollouts or windows at a time; nothing changes but "
            "rounding. Lower score_batch_size or window_length to have all windows at once."
        )
    return done
