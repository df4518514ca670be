"""The trainer of a run folder again, from what the folder says, as far as the auditor allows."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants
from peft import LoraConfig
from transformers import PrinterCallback
from transformers.utils import logging

from topd.commands.recipe import Recipe
from topd.commands.train import make_trainer
from topd.config import TOPDConfig
from topd.errors import TOPDError
from topd.inputs.models import ModelSpec
from topd.inputs.rows import DataSpec
from topd.inputs.self_teacher import SelfTeacher, self_teacher_of
from topd.inputs.teachers import Teachers
from topd.named import is_outside
from topd.runs.records import check_format
from topd.training.trainer import TOPDTrainer
from topd.training.warmstart import WarmstartConfig, WarmstartTrainer

ALONE: dict[str, Any] = {  # a repetition writes nothing but records
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "resume_from_checkpoint": None,
    "hub_token": None,  # transformers writes a placeholder
    "report_to": "none",
    "log_completions": False,
    "disable_tqdm": True,
    # nor does it tell anybody, or read files that a folder names
    "push_to_hub": False,
    "hub_model_id": None,
    "deepspeed": None,
    "accelerator_config": None,
    "trackio_space_id": None,
    "trackio_bucket_id": None,
    "trackio_static_space_id": None,
}


@dataclass(frozen=True)
class Trust:
    """What the auditor allows. A run folder may be another's, so nothing of this is read there.

    Args:
        remote_code: run code of the models' repositories where the run did.
        completions: URLs of the auditor's servers of the teacher, where the run's was served.
        pooling: likewise, those that give last hidden states.
        api_key_env: the environment variable with their API key.
    """

    remote_code: bool = False
    completions: Sequence[str] = ()
    pooling: Sequence[str] = ()
    api_key_env: str | None = None


NO_TRUST = Trust()


class Rebuilt:
    """The trainer of a run folder, in a folder of its own that is removed at the end."""

    def __init__(self, folder: Path, trust: Trust) -> None:
        self.folder, self.trust = folder, trust
        self.scratch = tempfile.TemporaryDirectory(prefix="topd-")

    def __enter__(self) -> TOPDTrainer:
        logging.set_verbosity_error()
        recipe = stored_recipe(self.folder, Path(self.scratch.name), self.trust)
        with read_from(self.folder, "run.json"), _offline():
            trainer, _ = make_trainer(
                recipe, recipe.data.load(), warmstart=isinstance(recipe.args, WarmstartConfig)
            )
        trainer.remove_callback(PrinterCallback)
        if isinstance(trainer, WarmstartTrainer) and trainer.args.answers == "teacher":
            answers = Path(self.scratch.name) / "answers.jsonl"
            with read_from(self.folder, answers.name):
                shutil.copy(self.folder / answers.name, answers)
                trainer.train_dataset = trainer._answered(trainer.questions, answers)
        return trainer

    def __exit__(self, *_: object) -> None:
        self.scratch.cleanup()


def stored_recipe(folder: Path, output: Path, trust: Trust = NO_TRUST) -> Recipe:
    """The recipe of a run as ``run.json`` has it, without evaluation, writing into ``output``.

    Raises:
        TOPDError: there is none, it cannot be read, or it needs what the auditor does not allow.
    """
    with read_from(folder, "run.json"):
        stored = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        sources, config = stored["recipe"], stored["config"]
        check_format(folder)
        if sources:
            sources = {**sources, **_allowed(folder, sources, config, trust)}
        return _recipe(folder, sources, config, output)


def _allowed(
    folder: Path, sources: Mapping[str, Any], config: Mapping[str, Any], trust: Trust
) -> dict[str, Any]:
    """Student and teacher with the auditor's servers in the place of those that the folder names.

    Raises:
        TOPDError: models or a method that run code, or a served teacher, without leave.
    """
    student, several = dict(sources["student"]), sources.get("teachers")
    teachers = several if several else {"": sources["teacher"]}
    if not trust.remote_code:
        _refuse_code(folder, (student, *teachers.values()), config)
    student["served"] = None  # its weights are here
    if several:
        return {"student": student, "teachers": _unserved(folder, several)}
    teacher = dict(sources["teacher"])
    served, text = teacher.get("served"), teacher.get("text")
    if text is not None:
        own = _own_servers(folder, {}, trust)
        urls = {"url": own["completions"], "api_key_env": own["api_key_env"]}
        teacher["text"] = {**text, **urls}
    if served is None:
        return {"student": student, "teacher": teacher}
    teacher["served"] = _own_servers(folder, served, trust)
    return {"student": student, "teacher": teacher}


def _refuse_code(
    folder: Path, specs: Iterable[Mapping[str, Any]], config: Mapping[str, Any]
) -> None:
    """Raises TOPDError for models or a method that run code of their own."""
    said = "To run it, say --trust-remote-code."
    if any(spec.get("trust_remote_code") for spec in specs):
        raise TOPDError(f"{folder}: its models ran code of their repositories. {said}")
    for key in ("method", "candidate_loss", "environment"):
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


def _unserved(folder: Path, teachers: Mapping[str, Any]) -> Mapping[str, Any]:
    """Several teachers, if none was served. Raises TOPDError."""
    served = [name for name, spec in teachers.items() if spec.get("served")]
    if served:
        raise TOPDError(
            f"{folder}: its teacher {served[0]} was served, beside others. An audit connects to "
            "servers of one teacher only: audit it with --updates 0."
        )
    return teachers


@contextmanager
def _offline() -> Iterator[None]:
    """Have models and data from this machine only, whatever a folder names."""
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def read_from(folder: Path, name: str) -> Iterator[None]:
    """Say which file it was where what is in it cannot be used, whatever that leads to."""
    try:
        yield
    except TOPDError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        said = " ".join(repr(error).split())
        raise TOPDError(f"{folder / name}: cannot be used: {said}.") from error


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
    settings = {key: value for key, value in config.items() if key in known} | ALONE
    return Recipe(
        student=ModelSpec(**sources["student"]),
        teacher=_teacher_of(sources),
        data=_data_of(sources["data"]),
        eval_data=None,
        evaluation=None,
        compare=None,
        lora=LoraConfig(**sources["lora"]) if sources["lora"] else None,
        args=kind(**{**settings, "output_dir": str(output)}, left_out={}),  # all as they were
    )


def _teacher_of(sources: Mapping[str, Any]) -> ModelSpec | Teachers | SelfTeacher:
    own = self_teacher_of(sources.get("teacher"))
    if own:
        return own
    if "teachers" not in sources:
        return ModelSpec(**sources["teacher"])
    return Teachers({name: ModelSpec(**spec) for name, spec in sources["teachers"].items()})


def _data_of(stored: Mapping[str, Any]) -> DataSpec:
    """Without the defaults: some keys exclude others."""
    usual = {name: known.default for name, known in DataSpec.model_fields.items()}
    return DataSpec(**{key: value for key, value in stored.items() if value != usual[key]})
