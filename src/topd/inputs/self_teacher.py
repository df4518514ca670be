"""A teacher that is the student: its current weights, or an average of those that it has had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from topd.errors import TOPDError
from topd.types import Prompt

WORD = "self"
FILE = "average.safetensors"  # of a checkpoint


class SelfTeacher(BaseModel):
    """The student as its own teacher, for ``teacher_model``.

    ``ema`` None: the current weights. Else the weights theta_T that after every update become

        theta_T <- ema theta_T + (1 - ema) theta_S

    and start as the student's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ema: float | None = Field(default=None, gt=0, lt=1)

    @property
    def path(self) -> str:
        """In a few words, for messages."""
        return WORD if self.ema is None else f"{WORD} (average, {self.ema:g})"

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """As a recipe has it, for run.json."""
        return {WORD: super().model_dump(**options)}


def self_teacher_of(teacher: object) -> SelfTeacher | None:
    """``self``, ``{self: {ema: 0.99}}`` or a SelfTeacher; None for any other teacher.

    Raises TOPDError: an average that is none.
    """
    if isinstance(teacher, SelfTeacher) or teacher is None:
        return teacher
    if teacher == WORD:
        return SelfTeacher()
    if not isinstance(teacher, Mapping) or WORD not in teacher:
        return None
    if len(teacher) > 1:
        raise TOPDError("teacher: self goes with no other key. Write {self: {ema: 0.99}}.")
    try:
        return SelfTeacher.model_validate(teacher[WORD] or {})
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        raise TOPDError(f"teacher.self: {said}. Write {{self: {{ema: 0.99}}}}.") from error


def check_own_prompts(prompts: Sequence[Prompt]) -> None:
    """Refuse a self-teacher that reads what the student reads. Raises TOPDError."""
    if prompts and all(prompt.teacher == prompt.student for prompt in prompts):
        raise TOPDError(
            "teacher: self reads the same prompts as the student, so both write alike and nothing "
            "is learned. Give it a prompt of its own: teacher_prompt, e.g. with the row's solution."
        )


class Average(TrainerCallback):
    """The exponential average of a student's trained weights, read in its teacher.

    It is kept in at least float32: of 16 bits a small step would round away. ``teacher`` is a copy
    of the student, whose weights are overwritten; ``student`` is not wrapped.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, ema: float) -> None:
        trained = {name for name, p in student.named_parameters() if p.requires_grad}
        self._read = {n: p for n, p in teacher.named_parameters() if n in trained}
        self._average = {
            n: p.detach().float() if p.dtype in (torch.bfloat16, torch.float16) else p
            for n, p in self._read.items()
        }
        self._student, self.ema = student, ema

    @property
    def bytes(self) -> int:
        """Of what it keeps besides the teacher's own weights."""
        kept = (p for name, p in self._average.items() if p is not self._read[name])
        return sum(p.numel() * p.element_size() for p in kept)

    @torch.no_grad()
    def on_step_end(self, *_: object, **__: object) -> None:
        """Take the weights in that an update made."""
        for name, current in self._student.named_parameters():
            if name in self._average:
                average = self._average[name]
                average.lerp_(current.to(average.dtype), 1 - self.ema)
                if self._read[name] is not average:
                    self._read[name].copy_(average)

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        weights = {name: p.detach().contiguous() for name, p in self._average.items()}
        save_file(weights, folder / FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read it from a checkpoint. Raises TOPDError if it has none."""
        if not (folder / FILE).is_file():
            raise TOPDError(
                f"resume_from_checkpoint: {folder} has no {FILE}, the teacher's weights. It is of "
                "another run: start over in another folder."
            )
        for name, weight in load_file(folder / FILE).items():
            self._average[name].copy_(weight)
            self._read[name].copy_(weight)
