"""Rows of prompts: from JSONL, JSON, CSV, TSV, Parquet, a folder, a hub, or a task generator.

Files of text are read as they are written: a date stays text, a number keeps its digits.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import datasets
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers.utils import logging

from topd.errors import GIVE_DATA, RELATIVE, TOPDError
from topd.inputs.prompt_rows import plain_row, prompt_of, unformatted
from topd.testbed import SCHEME, rows_of

logger = logging.get_logger(__name__)

# of datasets; the latter where there is a loading script
OF_DATASETS = (datasets.exceptions.DatasetGenerationError, RuntimeError)
csv.field_size_limit(1 << 30)  # a cell may be longer than 131,072 characters
ABSENT = (KeyError, TypeError, IndexError, ValueError)  # a column, raised on the way to it
PACKED = (".zip", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar", ".tar", ".tgz")
ABOUT = ("config.json", "dataset_info.json", "dataset_infos.json")  # which hold no rows
OPTIONAL = ("answer", "solution")  # a row may lack them where others have them
TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # each also with .gz after it


class Written(float):
    """A number that knows how it was written: its text is that of the file.

    >>> number = Written("0.00001")
    >>> str(number), number < 1
    ('0.00001', True)
    """

    def __new__(cls, text: str) -> Written:
        number = super().__new__(cls, text)
        number._text = text
        return number

    _text: str

    def __str__(self) -> str:
        return self._text

    def __reduce__(self) -> tuple[type[Written], tuple[str]]:
        return Written, (self._text,)


class DataSpec(BaseModel):
    """Where prompts come from and which column is what.

    Either ``path`` (a file of JSONL, JSON, CSV, TSV, each also with ``.gz``, or Parquet, a folder,
    a hub name, or ``testbed://FAMILY``) or ``task`` (a generator of the reasoning-gym package, with
    ``size`` and ``seed``). ``columns`` maps ``prompt``, ``messages``, ``answer`` or ``solution`` to
    a column, with dots into nested ones (``metadata.solution``, ``turns.0``); other columns stay as
    they are, but for one that is called ``prompt`` where only ``messages`` is mapped: it would
    count in their place. With ``chat`` a string prompt becomes a user message (not in the testbed,
    whose models know no chat).
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
        if self.name and (self.path or "").startswith(SCHEME):
            raise ValueError(f"name has no effect with {SCHEME}")
        return self

    @classmethod
    def recorded(cls, stored: object) -> DataSpec:
        """Of a run's records, which have every key: those at their defaults were not given."""
        if not isinstance(stored, Mapping):
            return cls.model_validate(stored)  # which says so
        usual = {name: known.default for name, known in cls.model_fields.items()}
        return cls.model_validate({k: v for k, v in stored.items() if v != usual.get(k)})

    @property
    def makes_messages(self) -> bool:
        """Whether a prompt of text becomes a user message."""
        return self.chat and not (self.path or "").startswith(SCHEME)

    def has_messages(self) -> bool:
        """Whether prompts are messages: made from text, or those of the data. Raises TOPDError."""
        if self.makes_messages:
            return True
        of_prompts = {k: name for k, name in self.columns.items() if k not in OPTIONAL}
        (row,) = self.model_copy(update={"limit": 1, "columns": of_prompts}).load()
        return not isinstance(prompt_of(row), str)

    def load(self) -> list[dict[str, Any]]:
        """The rows, columns mapped. Raises TOPDError: no such data, an empty or missing column."""
        found = self._task_rows() if self.task else self._stored_rows()
        asked = {ours: name for ours, name in self.columns.items() if ours in OPTIONAL}
        optional = [ours for ours, name in asked.items() if any(_has(row, name) for row in found)]
        rows = [self._row(i, row, optional) for i, row in enumerate(found)]
        if not rows:
            raise TOPDError(f"data {self.path or self.task}: has no rows.")
        return rows

    def _row(self, index: int, row: Mapping[str, Any], optional: Sequence[str]) -> dict[str, Any]:
        """A row with its columns mapped; ``optional`` ones, which others have, it may lack."""
        mapped = dict(row)
        for ours, column in self.columns.items():
            absent = ours in optional and not _has(row, column)
            mapped[ours] = None if absent else self._cell(index, row, column)
        if "messages" in self.columns and "prompt" not in self.columns:
            mapped.pop("prompt", None)
        mapped = plain_row(mapped)
        name = "messages" if mapped.get("prompt") is None else "prompt"
        if self.makes_messages and isinstance(mapped.get(name), str):
            mapped[name] = [{"role": "user", "content": mapped[name]}]
        return mapped

    def _cell(self, index: int, row: Mapping[str, Any], column: str) -> Any:
        try:
            return _value(row, column)
        except ABSENT as error:
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
            if isinstance(found, list):
                return found[: self.limit]
            if self.limit is not None:
                found = found.take(min(self.limit, len(found)))
            return list(unformatted(found))
        except TOPDError:
            raise
        except UnicodeDecodeError as error:
            raise TOPDError(f"data {self.path}: is not UTF-8 ({error}). Convert it.") from error
        except KeyError as error:  # of datasets: a NUL in a nested name is cut off in its schema
            raise TOPDError(
                f"data {self.path}: no value for {error}, a name that it has. Rename it."
            ) from error
        except (OSError, EOFError, ValueError, csv.Error, *OF_DATASETS) as error:
            cause = error.__cause__ or error
            raise TOPDError(
                f"data {self.path}: cannot be read. {GIVE_DATA} {type(cause).__name__}: {cause}"
            ) from error


def _value(row: Mapping[str, Any], column: str) -> Any:
    """Of a column, whose name may have dots, or is a place in nested ones."""
    return row[column] if column in row else reduce(_inside, column.split("."), row)


def _has(row: Mapping[str, Any], column: str) -> bool:
    try:
        _value(row, column)
    except ABSENT:
        return False
    return True


def _inside(value: Any, key: str) -> Any:
    return value[int(key)] if isinstance(value, list) else value[key]


def _read(place: str, name: str | None, split: str) -> Any:
    """A data set, or the rows of a file of text."""
    path = Path(place).expanduser()
    kind = _kind(path)
    is_file = kind in (*TEXTS, ".parquet") and not path.is_dir()
    saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    if name and (is_file or saved):
        raise ValueError(f"it has no configurations, so name {name!r} has no effect: leave it out")
    if saved:
        return _saved(path, split)
    if not is_file and path.is_file():
        raise ValueError("it is a file, and its name ends otherwise")
    if not is_file:
        return _loaded(str(path) if path.exists() else place, name, split)
    if not path.is_file():
        raise FileNotFoundError(f"no such file {path}{RELATIVE * (not path.is_absolute())}")
    if kind == ".parquet" and path.stat().st_size:
        return datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split=split)
    rows = _rows_of_file(path)
    return rows if split == "train" else _part(split, {"train": rows})


def _kind(path: Path) -> str:
    """What a file's name says that it is, packed by gzip or not."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _part(split: str, rows: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of rows by split what ``train``, ``train[:100]`` or ``train+test`` says."""
    sizes = {name: len(found) for name, found in rows.items()}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    return [row for part in parts for row in rows[part.splitname][part.from_ : part.to]]


def _loaded(place: str, name: str | None, split: str) -> Any:
    """A folder of files, or what a hub has."""
    try:
        files = _files_of(Path(place), name) if Path(place).is_dir() else None
        if files is not None:
            split = "+".join(files) if split == "all" else split
            asked = {key: some if key in split else [] for key, some in files.items()}
            return _part(split, {key: _rows_of_files(some) for key, some in asked.items()})
        return datasets.load_dataset(place, name, split=split)
    except ValueError as error:
        if not str(error).startswith("Config name is missing"):
            raise
        known = ", ".join(datasets.get_dataset_config_names(place))
        raise TOPDError(
            f"data {place}: has the configurations {known}. Say which one with name, beside path "
            "in a recipe or a suite (topd eval: give a file of it)."
        ) from error


def _files_of(folder: Path, name: str | None) -> dict[str, list[Path]] | None:
    """A folder's files of text by split; None if it has others, or its card says how to read them.

    A warning names data that datasets leaves out. Raises ValueError for a name that is a pattern,
    and for files packed otherwise than by gzip, in which datasets would guess types.
    """
    if not {*str(folder.resolve())}.isdisjoint("*?["):
        raise ValueError(
            f"{folder.resolve()} has one of * ? [ in it, which datasets takes for a pattern of "
            "names. Rename that folder, or give a file of it"
        )
    with TemporaryDirectory() as empty:  # a cache would have features that datasets guessed
        builder = datasets.load_dataset_builder(str(folder), name, cache_dir=empty)
    config = builder.config
    files = {str(split): [*map(Path, some)] for split, some in (config.data_files or {}).items()}
    read = {file for some in files.values() for file in some}
    if packed := sorted(file.name for file in read if file.suffix.lower() in PACKED):
        raise ValueError(f"{packed[0]} is packed. Unpack it, or pack it with gzip (.gz)")
    known = {file for file in folder.resolve().rglob("*") if _kind(file) in (*TEXTS, ".parquet")}
    known = {file for file in known if file.name not in ABOUT}
    if name is None and (unread := sorted(file.name for file in known - read)):
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        logger.warning(
            f"data {folder}: not read: {', '.join(unread[:3])}{more}. Of a folder the commonest "
            "format is read, and where names say the split (train, test), those files alone."
        )
    usual = type(config)(name=config.name, data_files=config.data_files)
    if getattr(config, "sep", None) == "\t":
        usual.sep = "\t"  # of TSV
    are_texts = all(_kind(file) in TEXTS and file.is_file() for file in read)
    return files if are_texts and config == usual and not builder.info.features else None


def _rows_of_files(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Rows of one file after the other; one may have none. Raises ValueError with its name."""
    rows = []
    for file in files:
        try:
            rows += _rows_of_file(file, alone=False)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{file.name}: {error}") from None
    return rows


def _rows_of_file(path: Path, *, alone: bool = True) -> list[dict[str, Any]]:
    """Rows of a file of text, as they are written. Raises ValueError if one ``alone`` has none."""
    if path.stat().st_size == 0:
        if alone:
            raise ValueError("the file is empty")
        return []
    packed = path.suffix.lower() == ".gz"
    with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        rows = _rows_of_text(_kind(path), file)
    if alone and not rows:
        raise ValueError("the file has no rows")
    return rows


def _rows_of_text(kind: str, file: Any) -> list[dict[str, Any]]:
    """Rows whose values are what was written: no dates, no rounding, no columns filled in."""
    if kind in (".csv", ".tsv"):
        return _table(csv.DictReader(file, delimiter="," if kind == ".csv" else "\t", strict=True))
    if kind == ".json":
        text = file.read()
        try:
            whole = json.loads(text, parse_float=Written, object_pairs_hook=_once)
        except json.JSONDecodeError:
            return _lines(io.StringIO(text, newline=""))
        if isinstance(whole, dict) and "prompt" not in whole and "messages" not in whole:
            lists = [value for value in whole.values() if isinstance(value, list)]
            whole = lists[0] if len(lists) == 1 else whole
        found = whole if isinstance(whole, list) else [whole]
        return [_mapping(i, row) for i, row in enumerate(found, 1)]
    return _lines(file)


def _table(reader: csv.DictReader[str]) -> list[dict[str, Any]]:
    """Rows that have a value in every column of the first line, and no more."""
    rows = []
    names = [name for name in reader.fieldnames or () if name]
    if len(set(names)) < len(names):
        raise ValueError("its first line has a name twice")
    if len(names) == 1 and (other := set(names[0]) & {*";,|\t"}):
        raise ValueError(
            f"its columns seem to be separated by {other.pop()!r}. Save it with commas (.csv) or "
            "tabs (.tsv)"
        )
    for row in reader:
        if None in row or None in row.values():
            more = "more" if None in row else "fewer"
            raise ValueError(
                f"line {reader.line_num} has {more} values than there are columns (a comma or a "
                "quote too many?)"
            )
        rows.append(row)
    return rows


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON that names each key once: of two, nobody knows which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _lines(lines: Iterable[str]) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_float=Written, object_pairs_hook=_once)
            rows.append(_mapping(number, row))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not a row of JSON: {error}") from None
    return rows


def _mapping(number: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f'row {number} must be a mapping such as {{"prompt": ...}}, not {row!r}')
    return row


def _saved(path: Path, split: str) -> datasets.Dataset:
    """What ``save_to_disk`` wrote: a data set, or several by split."""
    try:
        found = datasets.load_from_disk(str(path))
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is not as save_to_disk writes it ({error!r})") from None
    splits = found if isinstance(found, datasets.DatasetDict) else {"train": found}
    if split not in splits:
        raise ValueError(f"it has no split {split!r}, but {', '.join(splits) or 'none'}")
    return splits[split]
