"""With which settings, and by which format of the records, was an update of a run made?"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from topd.errors import TOPDError
from topd.inputs.self_teacher import WORD
from topd.runs.checkpoints import last
from topd.runs.files import ranks_of
from topd.runs.records import check_format

ALONE: dict[str, Any] = {  # a repetition writes nothing but records
    "save_strategy": "no",
    "save_on_each_node": False,
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
IDLE = (  # beginnings of settings that no update depends on
    *("save_", "eval_", "per_device_eval_", "do_", "load_best_", "metric_for_best_", "greater_is_"),
    *("hub_", "push_to_hub", "report_to", "run_name", "project", "trackio_", "logging_dir"),
    *("log_level", "log_on_each_node", "dataloader_num_", "dataloader_pin_"),
    *("dataloader_persistent_", "dataloader_prefetch_"),
)


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


def by_settings(folder: Path, steps: Iterable[int]) -> list[list[int]]:
    """Updates by the settings that they were made with: first those with the current settings,
    if any, then the others. Raises TOPDError: ``run.json`` cannot be read.
    """
    with read_from(folder, "run.json"):
        stored = as_stored(folder)
        groups: dict[str, list[int]] = {_as_text(*settings_at(stored, None)): []}
        for step in steps:
            groups.setdefault(_as_text(*settings_at(stored, step)), []).append(step)
    return list(groups.values())


def as_stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def format_at(folder: Path, step: int) -> int:
    """The format that the records of an update were written in: a resume may have raised it.

    Raises TOPDError: ``run.json`` cannot be read, or a later version wrote it.
    """
    found = check_format(folder)
    with read_from(folder, "run.json"):
        for changed in _changed_after(as_stored(folder), step):
            found = int(changed.get("format", (found,))[0])
    return found


def ranks_at(folder: Path, step: int | None) -> int:
    """How many ranks made an update, by default the latest. Raises TOPDError as above."""
    with read_from(folder, "run.json"):
        stored = as_stored(folder)
        found = stored.get("ranks")
        if found is None:  # earlier versions did not say
            saved = last(folder)
            found = ranks_of(saved) if saved else 1
        for changed in _changed_after(stored, step):
            found = changed.get("ranks", (found,))[0]
        return int(found)


def was_changed(folder: Path) -> bool:
    """Whether a resume changed what an update may depend on. Raises TOPDError."""
    with read_from(folder, "run.json"):
        changed = [name for after in _changed_after(as_stored(folder), -1) for name in after]
    return any(name != "format" and _matters(name.removeprefix("config.")) for name in changed)


def _changed_after(stored: Mapping[str, Any], step: int | None) -> Iterator[Mapping[str, Any]]:
    """What each resume after an update changed, the last one first; none after none."""
    for resume in reversed(stored.get("resumed", ())):
        if step is None or resume["step"] <= step:
            break
        yield resume["changed"]


def settings_at(stored: Mapping[str, Any], step: int | None) -> tuple[Any, dict[str, Any]]:
    """Recipe and configuration of an update: the current ones, with what each resume after it
    changed put back. Models and data no resume changes, though perhaps where they are, and how fast
    a student that is its own teacher becomes one.
    """
    sources, config = stored["recipe"], dict(stored["config"])
    for changed in _changed_after(stored, step):
        others = any(name == "format" or name.startswith("versions.") for name in changed)
        for name, (before, _) in changed.items():
            if name == "recipe.lora" or (name == "recipe.teacher" and _is_own(before)):
                sources = {**sources, name.removeprefix("recipe."): before}
            elif name.startswith("config."):
                config[name.removeprefix("config.")] = before
                if others and before is None:  # the version before had no such setting
                    del config[name.removeprefix("config.")]
    return sources, config


def _as_text(sources: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """What may make a difference to an update, to be compared."""
    mattering = {key: value for key, value in config.items() if _matters(key)}
    own = [sources.get(key) for key in ("lora", "teacher")]
    own[1] = own[1] if _is_own(own[1]) else None
    return json.dumps([own, mattering], sort_keys=True)


def _matters(key: str) -> bool:
    """Whether an update may depend on a setting."""
    return key not in ALONE and not key.startswith(IDLE)


def _is_own(teacher: object) -> bool:
    """Whether a teacher is the student itself, as run.json has it."""
    return isinstance(teacher, Mapping) and WORD in teacher
