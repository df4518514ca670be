"""Recipes: YAML for TOPDConfig plus models and data, checked before anything is loaded.

Top-level keys are ``student``, ``teacher`` (or ``teachers``, several by name), ``data``,
``eval_data``, ``evaluation``, ``lora``, ``compare``, ``warmstart`` and every field of
:class:`~topd.TOPDConfig`. ``warmstart`` holds the keys of stage 1, fields of
:class:`~topd.training.warmstart.WarmstartConfig`; the other parts, and settings of prompts,
lengths, precision and batches, are shared unless it names its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from topd.commands.keys import RECOMPUTED, mapping_at, read_content, refuse_unknown
from topd.config import CHECKPOINTING, TOPDConfig
from topd.errors import TOPDError, placed, shown
from topd.evaluate.spec import TrainingEvaluation
from topd.inputs.models import ModelSpec
from topd.inputs.rows import DataSpec
from topd.inputs.self_teacher import SelfTeacher, self_teacher_of
from topd.inputs.teachers import Teachers
from topd.training.warmstart import WarmstartConfig

Spec = TypeVar("Spec", bound=BaseModel)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe of one stage."""

    student: ModelSpec
    teacher: ModelSpec | Teachers | SelfTeacher
    data: DataSpec
    args: TOPDConfig
    lora: LoraConfig | None
    eval_data: DataSpec | None = None
    evaluation: TrainingEvaluation | None = None
    compare: CompareSpec | None = None

    def sources(self) -> dict[str, Any]:
        """Models, data and adapter as plain values; ``args`` are written on their own."""
        several, lora = isinstance(self.teacher, Teachers), self.lora and self.lora.to_dict()
        return {
            "student": self.student.model_dump(),
            "teachers" if several else "teacher": self.teacher.model_dump(),
            "data": self.data.model_dump(),
            "eval_data": self.eval_data and self.eval_data.model_dump(),
            "evaluation": self.evaluation and self.evaluation.model_dump(),
            "lora": lora and {k: sorted(v) if isinstance(v, set) else v for k, v in lora.items()},
        }


Clock: TypeAlias = Literal["wall", "cpu"]
STARTS = ("base", "warm start")  # the student before and after stage 1, in a comparison's table


class Sweep(BaseModel):
    """Further arms: ``arm`` with ``key`` set to each of ``values``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arm: str
    key: str
    values: list[Any]


class CompareSpec(BaseModel):
    """Arms of a comparison: by name, the keys of the recipe that differ.

    Every arm is run with every seed, or with its own ``seeds``; ``baseline`` is the arm that the
    others are compared with, ``references`` are arms that all others are compared with at equal
    budgets (none: the baseline). ``jobs`` runs go side by side, on as many GPUs as are visible.
    With ``warmstart`` stage 1 of the recipe is run first, once, and every arm starts from its
    student. ``clock`` says which time is compared: the wall-clock, or the CPU seconds of a run's
    process, which other work on the same cores leaves alone. ``plan`` is a file that says how the
    results will be analysed, written before them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    arms: dict[str, dict[str, Any]]
    sweeps: list[Sweep] = []
    seeds: list[int] = [0, 1, 2, 3, 4]
    baseline: str = "opd"
    references: list[str] = []
    jobs: int = Field(default=1, ge=1)
    warmstart: bool = False
    clock: Clock = "wall"
    plan: str | None = None

    def runs(self) -> list[tuple[str, int, dict[str, Any]]]:
        """Every run as (arm, seed, the arm's keys), seed by seed. Raises as :meth:`all_arms`."""
        arms = self.all_arms()
        own = {arm: keys.get("seeds", self.seeds) for arm, keys in arms.items()}
        for arm, seeds in own.items():
            if not (isinstance(seeds, list) and seeds and all(map(_is_seed, seeds))):
                raise TOPDError(
                    f"compare, arm {arm!r}: seeds must be a list such as [0, 1], of whole numbers "
                    "from 0 to 4294967295."
                )
        for arm, seeds in own.items():
            if not set(seeds) & set(own[self.baseline]):
                raise TOPDError(
                    f"compare, arm {arm!r}: has no seed of the arm that it is compared with, "
                    f"{self.baseline}: {own[self.baseline]}. Give it one of them."
                )
        order = dict.fromkeys([*self.seeds, *(s for seeds in own.values() for s in seeds)])
        return [(arm, s, keys) for s in order for arm, keys in arms.items() if s in own[arm]]

    def all_arms(self) -> dict[str, dict[str, Any]]:
        """The arms and those of the sweeps.

        Raises TOPDError if one names an arm there is not, two would have one folder, or the table
        would not tell one from another row.
        """
        found = dict(self.arms)
        for sweep in self.sweeps:
            if sweep.arm not in self.arms:
                raise TOPDError(f"compare.sweeps: there is no arm {sweep.arm!r}.")
            for value in sweep.values:
                arm = f"{sweep.arm}, {sweep.key.rpartition('.')[2]} {value}"
                keys = {**self.arms[sweep.arm], sweep.key: value}
                if found.setdefault(arm, keys) != keys:
                    raise TOPDError(f"compare.sweeps: two arms are {arm!r}. Give one as an arm.")
        for arm in found:
            if not arm.strip() or (self.warmstart and arm in STARTS):
                raise TOPDError(
                    f"compare, arm {arm!r}: the table would not tell it from the student before or "
                    "after stage 1, or has no name for it. Rename the arm."
                )
        folders = Counter(map(in_files, found))
        if folders.total() > len(folders):
            alike = [arm for arm in found if folders[in_files(arm)] > 1]
            raise TOPDError(f"compare: {', '.join(alike)}: would be one folder. Rename an arm.")
        for key, names in (("baseline", [self.baseline]), ("references", self.references)):
            for name in names:
                if name not in found:
                    raise TOPDError(f"compare.{key}: there is no arm {name!r}.")
        return found


def _is_seed(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 32


def in_files(arm: str) -> str:
    """An arm's name in those of files.

    >>> in_files("first_fork, K 24")
    'first_fork--K-24'
    """
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in arm)


def read_recipe(
    path: str | Path | None,
    overrides: Mapping[str, Any] | None = None,
    *,
    warmstart: bool = False,
    config: type[TOPDConfig] = TOPDConfig,
) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file, also one of those that come with the package (``recipes/...``); None
            where the overrides say all.
        overrides: dotted keys and their values, which replace those of the file. ``warmstart.KEY``
            is a key of stage 1.
        warmstart: read stage 1 instead of stage 2.
        config: what stage 2 is read as; a subclass of TOPDConfig adds keys.

    Raises:
        TOPDError: the file cannot be read, a key is unknown, or a value is out of range.
    """
    own, stage = _fields(config), _fields(WarmstartConfig)
    content = read_content(path, overrides or {}, fields=own, stage=stage, warmstart=warmstart)
    path = Path(path or "topd")
    config, known = (WarmstartConfig, stage) if warmstart else (config, own)
    for name in RECOMPUTED:  # old and new are one
        for end in ("", "_kwargs"):
            if name + end in content:
                content[CHECKPOINTING + end] = content.pop(name + end)
    settings = {key: value for key, value in content.items() if key in known}
    now = f"{datetime.now():%Y%m%d-%H%M%S}"
    settings.setdefault("output_dir", f"runs/{path.stem}{'-warmstart' * warmstart}-{now}")
    teacher = _teacher(path, content)
    student = parse_spec(path, "student", ModelSpec, content["student"])
    data = parse_spec(path, "data", DataSpec, content["data"])
    kinds = dict[str, Any](eval_data=DataSpec, evaluation=TrainingEvaluation, compare=CompareSpec)
    asked = {part: kind for part, kind in kinds.items() if content.get(part)}
    others = {part: parse_spec(path, part, kind, content[part]) for part, kind in asked.items()}
    lora = _lora(path, content.get("lora"))
    if isinstance(teacher, ModelSpec):
        student = student.with_tokenizer_of(teacher)
    with placed(path):
        args = config(**settings)
    return Recipe(student, teacher, data, args, lora, **others)


def _teacher(path: Path, content: Mapping[str, Any]) -> ModelSpec | Teachers | SelfTeacher:
    if "teachers" in content:
        given = mapping_at(path, "teachers", content["teachers"]).items()
        return Teachers({n: parse_spec(path, f"teachers.{n}", ModelSpec, v) for n, v in given})
    with placed(path):
        own = self_teacher_of(content["teacher"])
    return own or parse_spec(path, "teacher", ModelSpec, content["teacher"])


def one_teacher(recipe: Recipe) -> ModelSpec:
    """The teacher of a recipe that has one. Raises TOPDError for several, or the student itself."""
    if not isinstance(recipe.teacher, ModelSpec):
        raise TOPDError(
            "teacher: probe and repair look at one teacher, which is not the student. Make a "
            "recipe with one: teacher: PATH."
        )
    return recipe.teacher


def _fields(kind: type) -> set[str]:
    return {f.name for f in fields(kind) if f.init}


def parse_spec(path: Path, part: str, kind: type[Spec], value: Any) -> Spec:
    """A part of a file as its model; text stands for its path. Raises TOPDError, with the place."""
    content = {"path": value} if isinstance(value, str) else mapping_at(path, part, value)
    refuse_unknown(path, content, set(kind.model_fields), f"{part}.")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise TOPDError(f"{path}: {part}{_first(error)}") from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    place = "".join(f".{part}" for part in first["loc"] if isinstance(part, str))
    if first["type"] == "missing":
        return f"{place} is missing."
    fault = first["msg"].removeprefix("Value error, ")
    given = shown(first["input"])
    if "api_key" in place or "@" in given:
        given = "not shown"
    return f"{place}: {fault} (given: {given})."


def _lora(path: Path, value: Any) -> LoraConfig | None:
    if value is None:
        return None
    refuse_unknown(path, mapping_at(path, "lora", value), _fields(LoraConfig), "lora.")
    rank = value.get("r", LoraConfig.r)
    if not isinstance(rank, int) or rank < 1:
        raise TOPDError(f"{path}: lora.r must be a whole number above 0 (given: {shown(rank)}).")
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **value})
    except (ValueError, TypeError) as error:
        raise TOPDError(f"{path}: lora: {error}") from error
