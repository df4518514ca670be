"""Windows of earlier updates, learned again: a teacher's window is right whoever asks."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from topd.seeds import Stream, seed_of
from topd.training.experience.evidence import Experience
from topd.training.metrics import Means
from topd.types import Branch, Guidance, Rollout

KEPT = 1024  # windows, the latest
Window: TypeAlias = tuple[Rollout, Branch, Tensor]  # without a response; the teacher's states [K D]


@dataclass
class EarlierWindows:
    """What the teacher wrote in earlier updates, to be learned once more.

    A window keeps its prefix and the teacher's states along it, so that it costs one student
    forward and no teacher.

    Args:
        count: how many each update learns again, drawn evenly from those before it.
        seed: of the draws.
    """

    count: int
    seed: int

    def __post_init__(self) -> None:
        self._kept: deque[Window] = deque(maxlen=KEPT)

    def with_earlier(self, experience: Experience, step: int, means: Means) -> Experience:
        """An update with earlier windows after its rollouts; ``means`` count what those read.

        They have no response tokens: only L_traj counts them, as windows of this update.
        """
        if not self.count:
            return experience
        draw = random.Random(seed_of(self.seed, Stream.REPLAY, step))
        drawn = draw.sample(list(self._kept), min(self.count, len(self._kept)))
        self._kept += _windows(experience)
        nothing = experience.teacher_hidden[0][:0] if experience.teacher_hidden else None
        if not drawn or nothing is None:
            return experience
        rollouts, branches, states = zip(*drawn, strict=True)
        read = sum(len(r.prompt.student) + len(b.tokens) for r, b, _ in drawn)
        means.add("tokens/learned", read, 0)  # of the same update
        return replace(
            experience,
            rollouts=experience.rollouts + rollouts,
            teacher_hidden=experience.teacher_hidden + (nothing,) * len(drawn),
            guidance=experience.guidance + tuple(Guidance((), branches=(b,)) for b in branches),
            branch_hidden=experience.branch_hidden + tuple((s,) for s in states),
        )


def _windows(experience: Experience) -> list[Window]:
    """Every branch of an update as a text of its own: its prefix is the prompt."""
    found = []
    rows = zip(experience.rollouts, experience.guidance, experience.branch_hidden, strict=True)
    for rollout, guide, hidden in rows:
        for branch, states in zip(guide.branches, hidden, strict=True):
            prefix = rollout.response[: branch.start]
            own, theirs = rollout.prompt.student + prefix, rollout.prompt.teacher + prefix
            prompt = replace(rollout.prompt, student=own, teacher=theirs)
            alone = Rollout(prompt, (), (), rollout.finished)
            found.append((alone, replace(branch, start=0), states))
    return found
