"""The trainer of a run folder again, from what the folder says, as far as the auditor allows."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
from huggingface_hub import constants
from peft import LoraConfig
from transformers.utils import logging

from topd.commands.audit.settings import ALONE, as_stored, ranks_at, read_from, settings_at
from topd.commands.recipe import Recipe
from topd.commands.train import make_trainer
from topd.config import TOPDConfig
from topd.errors import RELATIVE, TOPDError
from topd.inputs.models import ModelSpec
from topd.inputs.rows import DataSpec
from topd.inputs.self_teacher import SelfTeacher, self_teacher_of
from topd.inputs.teachers import Teachers
from topd.named import NAMING, is_outside
from topd.runs.records import check_format
from topd.runs.verified import entries_in
from topd.training.inherited import FOLLOWING
from topd.training.trainer import TOPDTrainer
from topd.training.warmstart import OF_ANSWERS, OF_ROLLOUTS, WarmstartConfig, WarmstartTrainer

PATHS = {"path", "tokenizer", "chat_template", "answers"}  # keys of a recipe


@dataclass(frozen=True)
class Trust:
    """What the auditor allows. A run folder may be another's, so nothing of this is read there."""

    remote_code: bool = False  # run code of the models' repositories where the run did
    completions: Sequence[str] = ()  # URLs of the auditor's servers of a teacher that was served
    pooling: Sequence[str] = ()  # likewise, those that give last hidden states
    api_key_env: str | None = None  # the environment variable with their API key


NO_TRUST = Trust()


@contextmanager
def rebuilt(folder: Path, trust: Trust, *, at: int | None = None) -> Iterator[TOPDTrainer]:
    """The trainer of a run folder, in a folder of its own that is removed at the end.

    Its settings are those of update ``at``, by default the current ones.
    """
    gc.collect()  # the models of one before
    logging.set_verbosity_error()
    with TemporaryDirectory(prefix="topd-") as scratch:
        recipe = stored_recipe(folder, Path(scratch), trust, at=at)
        with _paths_named(folder), read_from(folder, "run.json"), _offline():
            trainer, _ = make_trainer(recipe, recipe.data.load())
        if isinstance(trainer, WarmstartTrainer) and trainer.args.answers == "teacher":
            answers = Path(scratch) / "answers.jsonl"
            with read_from(folder, answers.name):
                shutil.copy(folder / answers.name, answers)
                trainer.train_dataset = trainer._answered(trainer.questions, answers)
        yield trainer


def stored_recipe(
    folder: Path, output: Path, trust: Trust = NO_TRUST, *, at: int | None = None
) -> Recipe:
    """The recipe of a run as ``run.json`` has it, without evaluation, writing into ``output``.

    Its settings are those of update ``at``, by default the current ones; one process does what
    several ranks did by as many times the accumulation. Relative paths that are not there are those
    of the directory that the run was started in.

    Raises TOPDError: there is none, it cannot be read, or it needs what the auditor does not allow.
    """
    with read_from(folder, "run.json"):
        sources, config = settings_at(as_stored(folder), at)
        check_format(folder)
        config["gradient_accumulation_steps"] *= ranks_at(folder, at)
        directory = _directory(folder)
        if directory:
            sources = _located(sources, directory)
            config |= _located({key: config[key] for key in config.keys() & {"answers"}}, directory)
        if sources:
            sources = {**sources, **_allowed(folder, sources, config, trust)}
        return _recipe(folder, sources, config, output)


def _directory(folder: Path) -> Path | None:
    """Where the command ran that wrote ``run.json``, as the ledger has it."""
    begun = [entry for entry in entries_in(folder) if entry.get("event") == "begin"]
    named = begun[-1].get("directory") if begun else None
    return Path(named) if named else None


def _located(value: Any, directory: Path) -> Any:
    """A part of a recipe, with the paths that are there from ``directory`` only."""
    if not isinstance(value, Mapping):
        return value
    found = {key: _located(inner, directory) for key, inner in value.items()}
    for key in PATHS & found.keys():
        given = found[key]
        word = key != "path" and given in ("teacher", "data")
        if isinstance(given, str) and not word and not os.path.exists(given):
            elsewhere = os.path.join(directory, given)
            found[key] = elsewhere if os.path.exists(elsewhere) else given
    return found


def _relative(value: Any) -> Iterator[str]:
    """The relative paths in a part of a recipe; names on the hub look alike."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in PATHS and isinstance(inner, str) and not os.path.isabs(inner):
                yield inner
            yield from _relative(inner)


def started_elsewhere(folder: Path) -> str:
    """What to add to a fault of models or data, where a relative path may be to other ones."""
    directory = _directory(folder)
    if directory in (None, Path.cwd()):
        return ""
    if not any(os.path.exists(path) for path in _relative(as_stored(folder)["recipe"])):
        return ""
    return f" (relative paths are those from {Path.cwd()}, the run's were from {directory})"


@contextmanager
def _paths_named(folder: Path) -> Iterator[None]:
    """Say where the run was started if a relative path of its recipe is not there."""
    try:
        yield
    except TOPDError as error:
        directory, said = _directory(folder), str(error)
        named = any(path in said for path in _relative(as_stored(folder)["recipe"]))
        if named and directory not in (None, Path.cwd()):
            raise TOPDError(
                f"{said.rstrip('.').removesuffix(RELATIVE)}. The run was started in {directory}, "
                "which its relative paths start from: bring the files there, or run this where "
                "they are."
            ) from error
        raise


def _allowed(
    folder: Path, sources: Mapping[str, Any], config: Mapping[str, Any], trust: Trust
) -> dict[str, Any]:
    """Student and teacher with the auditor's servers in the place of those that the folder names.

    Raises TOPDError: models or a method that run code, or a served teacher, without leave.
    """
    student, several = dict(sources["student"]), sources.get("teachers")
    teachers = several or {"": sources["teacher"]}
    if not trust.remote_code:
        _refuse_code(folder, (student, *teachers.values()), config)
    here = all(
        spec.get("served") is None and spec.get("text") is None for spec in teachers.values()
    )
    if here and replace(trust, remote_code=False) != NO_TRUST:
        raise TOPDError(
            f"{folder}: its teacher was not served, so a server and its key have no effect. Leave "
            "them out."
        )
    student["served"] = None  # its weights are here
    if several:
        for name, spec in several.items():
            if spec.get("served"):
                raise TOPDError(
                    f"{folder}: its teacher {name} was served, beside others. An audit connects to "
                    "servers of one teacher only: audit it with --updates 0."
                )
        return {"student": student, "teachers": several}
    teacher = dict(sources["teacher"])
    served, text = teacher.get("served"), teacher.get("text")
    if text is not None:
        own = _own_servers(folder, {}, trust)
        teacher["text"] = {**text, "url": own["completions"], "api_key_env": own["api_key_env"]}
    if served is not None:
        teacher["served"] = _own_servers(folder, served, trust)
    return {"student": student, "teacher": teacher}


def _refuse_code(
    folder: Path, specs: Iterable[Mapping[str, Any]], config: Mapping[str, Any]
) -> None:
    """Raises TOPDError for models or a method that run code of their own."""
    said = "To run it, say --trust-remote-code."
    if any(spec.get("trust_remote_code") for spec in specs):
        raise TOPDError(f"{folder}: its models ran code of their repositories. {said}")
    for key in NAMING:
        if is_outside(str(config.get(key))):
            raise TOPDError(f"{folder}: its {key} {config[key]!r} is code of its own. {said}")


def _own_servers(folder: Path, served: Mapping[str, Any], trust: Trust) -> dict[str, Any]:
    """The auditor's servers in the place of a folder's. Raises TOPDError if none are given."""
    if not trust.completions or (served.get("pooling") and not trust.pooling):
        raise TOPDError(
            f"{folder}: its teacher was served. An audit does not connect to servers that a folder "
            "names. Start your own with topd serve-teacher and give them with --served-teacher URL "
            "and --served-pooling URL (their API key with --api-key-env), or audit it with "
            "--updates 0."
        )
    return {
        **served,
        "completions": list(trust.completions),
        "pooling": list(trust.pooling),
        "api_key_env": trust.api_key_env,
        "weights": None,
    }


@contextmanager
def _offline() -> Iterator[None]:
    """Have models and data from this machine only, whatever a folder names."""
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _recipe(
    folder: Path, sources: Mapping[str, Any], config: Mapping[str, Any], output: Path
) -> Recipe:
    if not sources:
        raise TOPDError(
            f"{folder}: its models and data came from Python, not from a recipe: they cannot be "
            "loaded again. Audit it with --updates 0."
        )
    kind = WarmstartConfig if "answers" in config else TOPDConfig
    known = {f.name for f in fields(kind) if f.init}
    if kind is WarmstartConfig:  # older versions took them
        known -= {*OF_ROLLOUTS, *(OF_ANSWERS if config["answers"] == "data" else ())}
    settings = {key: value for key, value in config.items() if key in known} | ALONE
    if settings.get("lr_scheduler_type") in FOLLOWING:  # evaluations, and here are none
        settings |= {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None}
    teacher: ModelSpec | Teachers | SelfTeacher
    if "teachers" in sources:
        teacher = Teachers({name: ModelSpec(**spec) for name, spec in sources["teachers"].items()})
    else:
        teacher = self_teacher_of(sources["teacher"]) or ModelSpec(**sources["teacher"])
    return Recipe(
        student=ModelSpec(**sources["student"]),
        teacher=teacher,
        data=DataSpec.recorded(sources["data"]),
        lora=LoraConfig(**sources["lora"]) if sources["lora"] else None,
        args=kind(**{**settings, "output_dir": str(output)}, left_out={}),  # all as they were
    )
