"""Rows of prompts: from JSONL, Parquet, a folder, a hub, or a task generator."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import datasets
from pydantic import BaseModel, ConfigDict, Field, model_validator

from topd.errors import TOPDError
from topd.testbed import SCHEME, rows_of

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class DataSpec(BaseModel):
    """Where prompts come from and which column is what.

    Either ``path`` (a JSONL or Parquet file, a folder, a hub name, or ``testbed://FAMILY``) or
    ``task`` (a generator of the reasoning-gym package, with ``size`` and ``seed``). ``columns``
    maps ``prompt``, ``messages``, ``answer`` or ``solution`` to a column, with dots into nested
    ones (``metadata.solution``, ``turns.0``); other columns stay as they are. With ``chat`` a
    string prompt becomes a user message (not in the testbed, whose models know no chat).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = None
    name: str | None = None
    split: str = "train"
    task: str | None = None
    size: int = Field(default=512, ge=1)
    seed: int = 0
    columns: dict[Literal["prompt", "messages", "answer", "solution"], str] = {}
    chat: bool = True
    limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        if (self.path is None) == (self.task is None):
            raise ValueError("give either path or task")
        for name in {"size", "seed"} if self.path else {"name", "split"}:
            if name in self.model_fields_set:
                raise ValueError(f"{name} has no effect with {'path' if self.path else 'task'}")
        return self

    def load(self) -> list[dict[str, Any]]:
        """The rows, columns mapped. Raises TOPDError: no such data, an empty or missing column."""
        rows = [
            self._row(i, row)
            for i, row in enumerate(self._task_rows() if self.task else self._stored_rows())
        ]
        if not rows:
            raise TOPDError(f"data {self.path or self.task}: has no rows.")
        return rows

    def _row(self, index: int, row: Mapping[str, Any]) -> dict[str, Any]:
        mapped = dict(row)
        for ours, column in self.columns.items():
            mapped[ours] = self._cell(index, row, column)
        prompt = mapped.get("prompt")
        if self.chat and isinstance(prompt, str) and not (self.path or "").startswith(SCHEME):
            mapped["prompt"] = [{"role": "user", "content": prompt}]
        return mapped

    def _cell(self, index: int, row: Mapping[str, Any], column: str) -> Any:
        try:
            return reduce(_inside, column.split("."), row)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise TOPDError(
                f"data {self.path or self.task}, row {index}: no column {column!r}. It has "
                f"{', '.join(sorted(map(str, row)))}. Correct data.columns."
            ) from error

    def _task_rows(self) -> list[dict[str, Any]]:
        try:
            from reasoning_gym import create_dataset
        except ImportError as error:
            raise TOPDError("data.task needs reasoning-gym: pip install topd[tasks].") from error
        try:
            return list(create_dataset(self.task, size=self.size, seed=self.seed))[: self.limit]
        except ValueError as error:
            raise TOPDError(
                f"data.task {self.task!r}: {str(error).rstrip('.')}. Name a generator of "
                "reasoning-gym."
            ) from error

    def _stored_rows(self) -> list[dict[str, Any]]:
        assert self.path is not None
        if self.path.startswith(SCHEME):
            return rows_of(self.path, self.split, self.limit)
        try:
            found = _read(self.path, self.name, self.split)
            return list(found if self.limit is None else found.take(min(self.limit, len(found))))
        except UnicodeDecodeError as error:
            raise TOPDError(f"data {self.path}: is not UTF-8 ({error}). Convert it.") from error
        except KeyError as error:  # of datasets: a NUL in a nested name is cut off in its schema
            raise TOPDError(
                f"data {self.path}: no value for {error}, a name that it has. Rename it."
            ) from error
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            cause = error.__cause__ or error
            raise TOPDError(
                f"data {self.path}: cannot be read. Give a .jsonl or .parquet file, a folder, or "
                f"a hub name. {type(cause).__name__}: {cause}"
            ) from error


def _inside(value: Any, key: str) -> Any:
    return value[int(key)] if isinstance(value, list) else value[key]


def _read(place: str, name: str | None, split: str) -> datasets.Dataset:
    path = Path(place).expanduser()
    kind = FORMATS.get(path.suffix)
    if kind is None:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _saved(path, split)
        return datasets.load_dataset(str(path) if path.exists() else place, name, split=split)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    return datasets.load_dataset(kind, data_files=str(path), split=split)


def _saved(path: Path, split: str) -> datasets.Dataset:
    """What ``save_to_disk`` wrote: a data set, or several by split."""
    found = datasets.load_from_disk(str(path))
    splits = found if isinstance(found, datasets.DatasetDict) else {"train": found}
    if split not in splits:
        raise ValueError(f"it has no split {split!r}, but {', '.join(splits)}")
    return splits[split]
