"""What can be refused before torch, transformers and datasets are imported.

Names of settings, methods and detectors are read from the sources, without running them: whatever
is not known there, the real classes would not know either (``tests/test_early.py`` compares).
Values are not looked at; that is :func:`~topd.commands.recipe.read_recipe`'s.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from topd.commands.keys import (
    PARTS,
    apart,
    from_command_line,
    part_of,
    read_content,
    refuse_unknown,
)
from topd.errors import GIVE_DATA, RELATIVE, TOPDError
from topd.named import is_outside, unknown

HERE = Path(__file__).parents[1]
THEIRS = Path(str(getattr(find_spec("transformers"), "origin", "")))  # which is not imported
HOMES: dict[str, str | Path] = {  # where each class is written
    "TrainingArguments": THEIRS.with_name("training_args.py"),
    "TOPDConfig": "config/__init__.py",
    "WarmstartConfig": "training/warmstart.py",
    "AnalysisConfig": "commands/session.py",
    "ProbeConfig": "commands/probe/__init__.py",
    "RepairConfig": "commands/repair/config.py",
    "ModelSpec": "inputs/models/__init__.py",
    "ByText": "inputs/served.py",
    "DataSpec": "inputs/rows.py",
    "EvaluationSpec": "evaluate/spec.py",
    "TrainingEvaluation": "evaluate/spec.py",
    "CompareSpec": "commands/recipe.py",
}
SPECS = {
    "teacher": "ModelSpec",
    "student": "ModelSpec",
    "data": "DataSpec",
    "eval_data": "DataSpec",
    "evaluation": "TrainingEvaluation",
    "compare": "CompareSpec",
}
FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")  # each also with .gz
ON_RANKS = ("train", "warmstart")


def check_one_process(command: str) -> None:
    """Refuse a launcher's several processes to all commands but those that share work among them.

    Each would do all of it and write the same files. A batch system may set WORLD_SIZE, too; only
    a launcher numbers the processes of a machine. Raises TOPDError.
    """
    ranks = os.environ.get("WORLD_SIZE", "1") if "LOCAL_RANK" in os.environ else "1"
    if ranks != "1" and command not in ON_RANKS:
        more = " compare.jobs spreads its runs over GPUs." if command == "compare" else ""
        raise TOPDError(
            f"launcher: topd {command} runs in one process, not in {ranks}. Start it without "
            f"accelerate launch or torchrun.{more}"
        )


def check_early(
    recipe: Path,
    words: Sequence[str],
    *,
    config: str = "TOPDConfig",
    warmstart: bool = False,
    compare: bool = False,
) -> None:
    """Refuse a recipe whose file, keys, methods or data files are not there. Raises TOPDError.

    A comparison takes overrides for both stages.
    """
    given, overrides = from_command_line(recipe, words)
    path = Path(given or "topd")
    own, stage = declared(config), declared("WarmstartConfig")
    if compare:
        overrides, first = apart(overrides)
        names = {*stage, *PARTS, "activation_checkpointing"}
        refuse_unknown(path, dict.fromkeys(map(part_of, first)), names, "warmstart.")
    content = read_content(given, overrides, fields=own, stage=stage, warmstart=warmstart)
    teachers = content.get("teachers")
    several = dict(teachers) if isinstance(teachers, Mapping) else {}
    parts = {part: content.get(part) for part in SPECS}
    parts |= {f"teachers.{name}": value for name, value in several.items()}
    for part, value in parts.items():
        if isinstance(value, Mapping) and not (part == "teacher" and "self" in value):
            refuse_unknown(path, value, declared(SPECS.get(part, "ModelSpec")), f"{part}.")
    for key, file in (("method", "methods.py"), ("candidate_loss", "detectors.py")):
        name, known = content.get(key), rows_of_table(file)
        if isinstance(name, str) and name not in known and not is_outside(name):
            raise TOPDError(f"{path}: {unknown(key, name, known)}")
    for value in (content.get("student"), content.get("teacher"), *several.values()):
        check_model(_path_of(value))
    for part in ("data", "eval_data"):
        check_data(_path_of(content.get(part)))


def check_model(place: str | None) -> None:
    """Raises TOPDError for what can only be a path here, and not a hub name, and is not there."""
    if place is None or "://" in place:
        return
    local = place.startswith(("/", "./", "../", "~")) or place.count("/") > 1
    if local and not Path(place).expanduser().exists():
        start = RELATIVE * place.startswith(".")
        raise TOPDError(f"model {place}: no such file or folder{start}. Check the path.")


def check_data(place: str | None) -> None:
    """Raises TOPDError for a file of data that is not there."""
    path = Path(place or "").expanduser()
    kind = path.with_suffix("") if path.suffix == ".gz" else path
    if place and "://" not in place and kind.suffix.lower() in FILES and not path.exists():
        start = RELATIVE * (not path.is_absolute())
        raise TOPDError(
            f"data {place}: cannot be read. {GIVE_DATA} FileNotFoundError: no such file {path}"
            f"{start}"
        )


def _path_of(value: Any) -> str | None:
    value = value.get("path") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else None


@cache
def declared(name: str) -> set[str]:
    """The fields of a class that ``HOMES`` knows, with those that it inherits."""
    bases = (base.id for base in _class(name).bases if isinstance(base, ast.Name))
    return {*own_settings(name)}.union(*(declared(base) for base in bases if base in HOMES))


def own_settings(*names: str) -> list[str]:
    """The settings that classes add to those that they inherit, in their order."""
    return [
        node.target.id
        for name in names
        for node in _class(name).body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not re.search("ClassVar|InitVar", ast.unparse(node.annotation))
    ]


def rows_of_table(file: str) -> list[str]:
    """The names in the one table of a module of the shelf: METHODS or DETECTORS."""
    for node in _tree(HERE / file).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
            return [str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)]
    raise AssertionError(f"{file} has no table")


def _class(name: str) -> ast.ClassDef:
    nodes = _tree(HERE / HOMES[name]).body
    return next(node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name)


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))
