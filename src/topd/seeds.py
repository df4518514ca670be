"""Where random numbers come from: one stream a purpose, so that none are drawn twice.

Everything random in a run comes from ``(seed, stream, number)``. A rollout's stream is the number
of its update, so those of all other purposes are above any update that is reached.
"""

from __future__ import annotations

from enum import IntEnum, unique

import numpy as np


@unique
class Stream(IntEnum):
    """The streams besides the updates' own.

    ``EVALUATION_SAMPLES`` is the first of as many streams as a problem has samples, so it is the
    highest but for the one of an update that is never reached.
    """

    REPLAY = 1 << 18  # which earlier windows are learned again
    RELAY = 1 << 19  # what the student writes after a window
    WINDOWS = 1 << 20  # the teacher's windows
    ANSWERS = 1 << 21  # the teacher's answers for a warm start
    EVALUATION_SAMPLES = 1 << 22
    REPAIR_RESAMPLES = 1 << 23
    PROBE_POSITIONS = 1 << 24
    OUTCOMES = 1 << 25  # continuations that verify a fork
    TURNS = 1 << 26  # the student's turns after the first
    EVALUATION_ROLLOUTS = (1 << 31) - 1


def seed_of(seed: int, step: int, number: int) -> int:
    """The seed of one rollout of an update, or of what else has a stream and a number."""
    return int(np.random.SeedSequence((seed, step, number)).generate_state(1, np.uint32)[0])


def sampling_seeds(seed: int, step: int, count: int, *, first: int = 0) -> list[int]:
    """Independent seeds for ``count`` rollouts of one update, numbered from ``first`` on.

    They depend on nothing else: any split into batches gives the same rollouts.
    """
    return [seed_of(seed, step, first + i) for i in range(count)]
