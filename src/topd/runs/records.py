"""The records of a run folder: one schema, that training writes and everything else reads.

Page, terminal, figures, audit and replay read the same classes. A field that is added gets a
default, so that folders of the format before are read; ``FORMAT`` is then counted up, and a folder
of a later format than this is refused in words.

====  ==================================================
1     no ``format`` in run.json
2     ``format``; forks say whether their plan ``converged``
3     the records are those of 2; tokens are drawn by Gumbel-max
4     a rollout has its ``teacher``'s name, where there are several
5     a rollout has the spans of its ``replies``, where there is an environment
6     the records are those of 5; equal windows are at distance 0, replies are written as the
      template has them, and ``tokens/`` in metrics.jsonl counts all that is written
====  ==================================================
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from topd.errors import TOPDError
from topd.runs.files import numbered_lines, read_whole

FORMAT = 6
DRAWN = 3  # from here on tokens are drawn with the numbers of today
JUDGED = 6  # from here on equal windows are at distance 0
LATER = {"forks": ("converged",)}  # fields of parts of records that format 1 has not
Id = Annotated[int, Field(ge=0)]
PromptIds = Annotated[tuple[Id, ...], Field(min_length=1)]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class SoftTargetRecord(Record):
    """A soft target of guidance.jsonl."""

    position: int
    tokens: tuple[int, ...]
    probabilities: tuple[float, ...]


class BranchRecord(Record):
    """A branch of guidance.jsonl: tokens in the response's place from token ``start`` on."""

    start: int = Field(ge=0)
    tokens: tuple[int, ...]
    loss: str
    go_on: int = 0


class SampleRecord(Record):
    """A line of a repair's samples.jsonl: what the student writes at a fork after some updates.

    ``arm`` is the method. ``found`` is the distance of the rollout's own window; it and the
    teacher's window are in the line of the arm ``before``.
    """

    sample: int
    arm: str
    distance: float
    rollout: int | None = None
    position: int = Field(default=0, ge=0)
    found: float | None = None
    student_tokens: tuple[int, ...] = ()
    teacher_tokens: tuple[int, ...] = ()


class Fork(Record):
    """One candidate of one rollout and what was found there, as guidance.jsonl has it.

    ``token_loss`` in nats, ``distance`` the OT distance of the two windows, ``real`` the verdict
    (None until it is made), ``converged`` whether the plan's marginals hold (None: not recorded).
    The student's window is the rollout itself from ``position`` on, ``student_length`` tokens.
    ``plan`` is the transport plan without dust: row i of the student's window, column j of the
    teacher's, and the mass between them.
    """

    position: int = Field(ge=0)
    token_loss: float
    distance: float
    real: bool | None = None
    teacher_tokens: tuple[int, ...] = ()
    student_length: int = Field(default=0, ge=0)
    plan: tuple[tuple[int, int, float], ...] = ()
    converged: bool | None = None


class OutcomeRecord(Record):
    """Shares of right answers at a token: the teacher takes over before or after it, or the
    student resumes ``alone`` from before it."""

    before: float
    after: float
    alone: float


class ForkRecord(Fork):
    """A fork with what a reader adds: a probe's group and rejoin, and both windows' tokens.

    ``rejoin``: tokens until the windows agree again; None if they never do, or if not measured.
    ``after``: the same prefix in a repair. ``outcome``: where a probe has verified it.
    """

    group: str | None = None
    rejoin: int | None = None
    student_tokens: tuple[int, ...] = ()
    after: tuple[SampleRecord, ...] = ()
    outcome: OutcomeRecord | None = None


class GuidanceRecord(Record):
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
    prompt: int
    group: str


class RolloutRecord(GuidanceRecord):
    """A line of rollouts.jsonl; ``guided`` once it is joined with its line of guidance.jsonl."""

    step: int = 0
    prompt: int
    prompt_ids: tuple[int, ...] = ()
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    teacher_logprobs: tuple[float, ...] = ()
    finished: bool = True
    teacher: str | None = None
    replies: tuple[tuple[Id, Id], ...] = ()
    guided: bool = False

    def is_reply(self, t: int) -> bool:
        """Whether an environment wrote token ``t``."""
        return any(first <= t < end for first, end in self.replies)


class CurvePoint(Record):
    """An evaluation within a run of a comparison."""

    step: float
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    greedy: float | None = None
    pass_at_1: float | None = Field(default=None, alias="pass@1")


class ResultRecord(Record):
    """A line of a comparison's results.jsonl: one arm with one seed."""

    arm: str
    seed: int
    greedy: float | None = None
    pass_at_1: float | None = Field(default=None, alias="pass@1")
    seconds: float | None = None
    teacher_tokens: float | None = None
    curve: tuple[CurvePoint, ...] = ()


class ResponseRecord(Record):
    """A line of an evaluation's responses.jsonl: the answer to row ``problem`` of the data.

    ``sample`` is None for the greedy one.
    """

    problem: int
    sample: int | None = None
    ids: tuple[int, ...] = ()
    text: str = ""
    verified: bool
    finished: bool = True


class IntervalRecord(Record):
    """A mean over problems with its interval."""

    mean: float
    low: float
    high: float
    problems: int = 0
    level: float = 0.95


class EvaluationRecord(Record):
    """evaluation.json: figures by name, and what was asked of which model."""

    problems: int
    samples: int
    figures: dict[str, IntervalRecord]
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)


class GateFigure(Record):
    """A figure of gate.json. ``base`` and ``candidate`` are means where larger is worse."""

    name: str
    base: float
    candidate: float
    harm: IntervalRecord
    limit: float
    verdict: str
    unit: str = "tokens"  # of a length


class GateRecord(Record):
    """gate.json: every figure with its verdict, and the rows of problems that only the base solves.

    ``models`` has the model's settings by role, base and candidate.
    """

    passed: bool
    figures: tuple[GateFigure, ...]
    remarks: tuple[str, ...] = ()
    lost: tuple[int, ...] = ()
    suite: dict[str, Any] = Field(default_factory=dict)
    models: dict[str, dict[str, Any]] = Field(default_factory=dict)


class _Resumed(Record):
    step: int
    changed: dict[str, tuple[Any, Any]]


class _Run(Record):
    """Of run.json what its readers rely on."""

    command: str = ""
    recipe: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    compare: dict[str, Any] | None = None
    resumed: tuple[_Resumed, ...] = ()


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_run(folder: Path) -> dict[str, Any]:
    """A folder's run.json; empty if there is none. Raises TOPDError for one that no run wrote."""
    content = read_whole(folder / "run.json")
    _checked(_Run, content, str(folder / "run.json"))
    return content


def check_format(folder: Path) -> int:
    """The format of a run folder. Raises TOPDError if a later version of this package wrote it."""
    found = read_whole(folder / "run.json").get("format", 1)
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise TOPDError(
            f"{folder / 'run.json'}: format {found!r} is none that this version reads (1 to "
            f"{FORMAT}). Install the version that wrote it, or a later one."
        )
    return found


def as_before(now: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A record made now, without the fields that were not known when ``recorded`` was written.

    >>> as_before({"forks": [{"real": True, "converged": True}]}, {"forks": [{"real": True}]})
    {'forks': [{'real': True}]}
    """
    made = dict(now)
    for part, names in LATER.items():
        before = [key for row in recorded.get(part, ()) if isinstance(row, dict) for key in row]
        drop = [name for name in names if name not in before]
        if part in made:
            made[part] = [
                {key: value for key, value in row.items() if key not in drop} for row in made[part]
            ]
    return made


def updates_in(logs: Sequence[Mapping[str, float]]) -> list[int]:
    """How many updates each log is the mean over: those since the log before it.

    >>> updates_in([{"step": 1}, {"step": 10}, {"step": 20}])
    [1, 9, 10]
    """
    return [round(b - a) for a, b in pairwise([0, *(log["step"] for log in logs)])]


def read_records(folder: Path, name: str, kind: type[AnyRecord]) -> Iterator[AnyRecord]:
    """The lines of a JSONL file, none if it is missing. Raises TOPDError: a line is wrong."""
    return (record for _, record in numbered_records(folder, name, kind))


def numbered_records(
    folder: Path, name: str, kind: type[AnyRecord], only: Container[int] | None = None
) -> Iterator[tuple[int, AnyRecord]]:
    """As :func:`read_records`, with the numbers of the lines: all, or ``only`` these."""
    for number, line in numbered_lines(folder / name, only=only):
        yield number, _checked(kind, line, f"{folder / name}, line {number}")


def read_record(folder: Path, name: str, kind: type[AnyRecord]) -> AnyRecord | None:
    """A JSON file of a run folder; None if there is none yet. Raises TOPDError if it is wrong."""
    content = read_whole(folder / name)
    return _checked(kind, content, str(folder / name)) if content else None


def _checked(kind: type[AnyRecord], content: dict[str, Any], place: str) -> AnyRecord:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise TOPDError(
            f"{place}: {key}: {first['msg']}. Was it written by this version?"
        ) from error
