"""Reads run folders: what kind of run it is, and its records, checked line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from topd.errors import TOPDError

Kind = Literal["training", "probe", "repair", "compare"]
MARKS: tuple[tuple[Kind, tuple[str, ...]], ...] = (  # which files make which kind, first hit
    ("compare", ("compare.json", "results.jsonl")),
    ("repair", ("repair.json", "samples.jsonl")),
    ("probe", ("probe.json", "positions.jsonl")),
    ("training", ("metrics.jsonl", "rollouts.jsonl")),
)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class SoftTargetRecord(_Record):
    """A soft target of guidance.jsonl."""

    position: int
    tokens: tuple[int, ...]
    probabilities: tuple[float, ...]


class BranchRecord(_Record):
    """A branch of guidance.jsonl: tokens in the response's place from token ``start`` on."""

    start: int = Field(ge=0)
    tokens: tuple[int, ...]
    loss: str
    go_on: int = 0


class SampleRecord(_Record):
    """A line of a repair's samples.jsonl: what the student writes at a fork after an arm's updates.

    ``found`` is the distance of the rollout's own window; it and the teacher's window stand in the
    line of the arm ``before``.
    """

    sample: int
    arm: str
    distance: float
    rollout: int | None = None
    position: int = Field(default=0, ge=0)
    found: float | None = None
    student_tokens: tuple[int, ...] = ()
    teacher_tokens: tuple[int, ...] = ()


class ForkRecord(_Record):
    """A candidate: from guidance.jsonl, or from positions.jsonl with a group and a rejoin.

    ``rejoin``: tokens until the windows agree again; None if they never do, or if not measured.
    ``real`` is None until the verdict is made. ``after``: the same prefix in a repair.
    """

    position: int = Field(ge=0)
    token_loss: float
    distance: float
    real: bool | None = None
    group: str | None = None
    rejoin: int | None = None
    student_tokens: tuple[int, ...] = ()
    teacher_tokens: tuple[int, ...] = ()
    student_length: int = Field(default=0, ge=0)
    plan: tuple[tuple[int, int, float], ...] = ()
    after: tuple[SampleRecord, ...] = ()


class GuidanceRecord(_Record):
    """A line of guidance.jsonl. ``weights`` are those of the token losses that are not 1."""

    step: int
    rollout: int
    forks: tuple[ForkRecord, ...] = ()
    targets: tuple[SoftTargetRecord, ...] = ()
    capped: tuple[int, ...] = ()
    weights: dict[int, float] = Field(default_factory=dict)
    branches: tuple[BranchRecord, ...] = ()
    advantages: tuple[float, ...] = ()


class PositionRecord(ForkRecord):
    """A line of a probe's positions.jsonl."""

    rollout: int
    group: str


class RolloutRecord(_Record):
    """A line of rollouts.jsonl; ``guided`` once it is joined with its line of guidance.jsonl."""

    step: int = 0
    rollout: int
    prompt: int
    prompt_ids: tuple[int, ...] = ()
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    teacher_logprobs: tuple[float, ...] = ()
    finished: bool = True
    forks: tuple[ForkRecord, ...] = ()
    targets: tuple[SoftTargetRecord, ...] = ()
    capped: tuple[int, ...] = ()
    weights: dict[int, float] = Field(default_factory=dict)
    branches: tuple[BranchRecord, ...] = ()
    advantages: tuple[float, ...] = ()
    guided: bool = False


class CurvePoint(_Record):
    """An evaluation within a run of a comparison."""

    step: float
    seconds: float = 0.0
    greedy: float | None = None
    pass_at_1: float | None = Field(default=None, alias="pass@1")


class ResultRecord(_Record):
    """A line of a comparison's results.jsonl: one arm with one seed."""

    arm: str
    seed: int
    greedy: float | None = None
    pass_at_1: float | None = Field(default=None, alias="pass@1")
    seconds: float | None = None
    teacher_tokens: float | None = None
    curve: tuple[CurvePoint, ...] = ()


AnyRecord = TypeVar("AnyRecord", bound=_Record)


def kind_of(folder: Path) -> Kind:
    """What kind of run a folder holds. Raises TOPDError: no folder, or no run in it."""
    if not folder.is_dir():
        raise TOPDError(f"run folder {folder}: there is no such folder. Give one under runs/.")
    for kind, names in MARKS:
        if any((folder / name).is_file() for name in names):
            return kind
    known = ", ".join(name for _, names in MARKS for name in names)
    raise TOPDError(f"run folder {folder}: holds no run. It has none of {known}.")


def read_logs(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, numbers only, in order."""
    path = folder / "metrics.jsonl"
    return [
        {key: value for key, value in log.items() if isinstance(value, int | float)}
        for _, log in _lines(path)
    ]


def read_records(folder: Path, name: str, kind: type[AnyRecord]) -> Iterator[AnyRecord]:
    """The lines of a JSONL file, one by one. Raises TOPDError: no file, or a line that is wrong."""
    path = folder / name
    if not path.is_file():
        raise TOPDError(f"run folder {folder}: {name} is missing. Was the run interrupted?")
    for number, line in _lines(path):
        try:
            yield kind.model_validate(line)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise TOPDError(
                f"{path}, line {number}: {place}: {first['msg']}. Was it written by this version?"
            ) from error


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Parsed lines with their numbers. A last line cut off by a running job is left out."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                content = json.loads(line.decode())
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise TOPDError(f"{path}, line {number}: not valid JSON ({error}).") from error
            if not isinstance(content, dict):
                raise TOPDError(f"{path}, line {number}: must be a JSON object.")
            yield number, content
