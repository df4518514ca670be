"""The arms of ``topd repair``: each turns one prefix and both windows after it into a loss.

    arm(own, along, lesson) -> scalar, nats

``own`` [n V] are the student's log-probs along its own window, ``along`` [m V] those along the
teacher's window, both in the student's context. A new arm is such a function, put into ``ARMS``
under its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from topd.losses import token_divergence, trajectory_loss
from topd.transport import soft_targets
from topd.types import Ids


@dataclass(frozen=True)
class Lesson:
    """What an arm may learn from: one prefix and both windows after it.

    ``teacher_on_student`` [n V] and ``teacher_on_own`` [m V] are the teacher's log-probs in nats
    along the student's window and along its own; the plans [n m] match the two windows.
    """

    prefix: Ids
    student_tokens: Ids
    teacher_tokens: Ids
    teacher_on_student: Float[Tensor, "n V"]
    teacher_on_own: Float[Tensor, "m V"]
    plan: Float[Tensor, "n m"]
    position_plan: Float[Tensor, "n m"]
    trajectory_weight: float


Arm = Callable[[Tensor, Tensor, Lesson], Tensor]


def opd(own: Tensor, along: Tensor, lesson: Lesson) -> Tensor:
    """Reverse KL along the student's window, mean over tokens."""
    return token_divergence(own, lesson.teacher_on_student).mean()


def window_sft(own: Tensor, along: Tensor, lesson: Lesson) -> Tensor:
    """Cross-entropy on the teacher's window, in the teacher's own context."""
    tokens = torch.tensor(lesson.teacher_tokens, device=along.device)
    return -along.gather(-1, tokens[:, None]).mean()


def window_kd(own: Tensor, along: Tensor, lesson: Lesson) -> Tensor:
    """Forward KL to the teacher over the full vocabulary, along the teacher's window."""
    return token_divergence(along, lesson.teacher_on_own, kind="forward_kl").mean()


def topd(own: Tensor, along: Tensor, lesson: Lesson) -> Tensor:
    """The published loss: OPD + lambda L_traj. Source: arXiv 2606.00305."""
    return opd(own, along, lesson) + _trajectory(own, lesson, lesson.plan)


def topd_position(own: Tensor, along: Tensor, lesson: Lesson) -> Tensor:
    """The same with a plan whose ground cost knows the positions of the tokens."""
    return opd(own, along, lesson) + _trajectory(own, lesson, lesson.position_plan)


ARMS: dict[str, Arm] = {
    "opd": opd,
    "window_sft": window_sft,
    "window_kd": window_kd,
    "topd": topd,
    "topd_position": topd_position,
}


def _trajectory(own: Tensor, lesson: Lesson, plan: Tensor) -> Tensor:
    tokens = torch.tensor(lesson.teacher_tokens, device=own.device)
    targets = soft_targets(plan[None].to(own.device), tokens[None], own.shape[-1])
    mask = torch.ones(targets.shape[:2], dtype=torch.bool, device=own.device)
    return lesson.trajectory_weight * trajectory_loss(own[None], targets, mask)
