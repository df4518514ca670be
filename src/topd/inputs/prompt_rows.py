"""A row of the data as a prompt and what belongs to it; every fault is said with its row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
from transformers.utils import logging

from topd.errors import TOPDError, shown
from topd.inputs.tool_calls import with_mappings

logger = logging.get_logger(__name__)

Messages = Sequence[Mapping[str, Any]]
UNREAD = ("images", "image", "videos", "video", "audios", "audio")
NOT_READ = (
    "data row {}: has {}, which are not read: only text is. Remove the column, or choose other "
    "data."
)
MEDIA = (datasets.Image, datasets.Audio, datasets.Video)
NARROW, NUMPY = ("float16", "float32"), (np.ndarray, np.generic)
EXACT = 2**53  # below it a float is the whole number that it was made of
ROLES = ("user", "assistant", "system", "tool", "developer", "function")
MISNAMED = (*ROLES, "human", "gpt", "model", "bot", "ai")
WRITTEN = re.compile(  # messages as text; [{"from": "Paris", ...}] may be an answer
    r"""\s*\[\s*\{\s*(?=(["'])(?:role|content|from|value)\1\s*:)"""
    rf""".*?(["'])(?:role|from)\2\s*:\s*(["'])(?:{"|".join(MISNAMED)})\3""",
    re.DOTALL,
)


def last_user(prompt: str | Messages) -> str:
    if isinstance(prompt, str):
        return prompt
    users = [message["content"] for message in prompt if message["role"] == "user"]
    return users[-1] if users else ""


def with_last_user(prompt: str | Messages, text: str) -> str | Messages:
    """The prompt with another text in its last user message."""
    if isinstance(prompt, str):
        return text
    last = max(i for i, message in enumerate(prompt) if message["role"] == "user")
    return [*prompt[:last], {**prompt[last], "content": text}, *prompt[last + 1 :]]


class Label(int):
    """A class label of datasets: the number that is stored, written by its name.

    >>> label = Label(1, "B")
    >>> str(label), ["four", "five"][label]
    ('B', 'five')
    """

    def __new__(cls, number: int, name: str) -> Label:
        label = super().__new__(cls, number)
        label._name = name
        return label

    _name: str

    def __str__(self) -> str:
        return self._name

    def __reduce__(self) -> tuple[type[Label], tuple[int, str]]:
        return Label, (int(self), self._name)


def unformatted(rows: Iterable[Any]) -> Iterator[Any]:
    """Rows as a data set has them, whatever its format makes of them.

    Class labels are :class:`Label` (-1 is none), and numbers of 32 bits or less the shortest that
    are stored so: 0.1, not 0.10000000149011612. A transform of its own stays.

    Raises TOPDError: a row has a picture or sound.
    """
    stored, kinds = rows, getattr(rows, "features", None) or {}
    if isinstance(rows, datasets.Dataset) and rows.format["type"] != "custom":
        stored = rows.with_format(None, rows.format["columns"])
        _check_media(stored)
    readers = {name: read for name, kind in kinds.items() if (read := _reader(kind))}
    for row in stored:
        yield _read_parts(readers, row) if readers else row


def _check_media(rows: datasets.Dataset) -> None:
    """Refuse files in columns that datasets would decode, whatever their names. Raises TOPDError.

    They are not decoded here: that takes libraries which nothing else needs.
    """
    for name in rows.format["columns"]:
        if _is_media(rows.features[name]):
            for index, table in enumerate(rows.with_format("arrow", [name])):
                if table[name][0].as_py():
                    raise TOPDError(NOT_READ.format(index, name))


def _reader(kind: Any) -> Callable[[Any], Any] | None:
    """What makes of a stored value what was written; None for a kind that is stored so."""
    if isinstance(kind, datasets.ClassLabel):
        return partial(_label, kind.names)
    if isinstance(kind, datasets.Value) and kind.dtype in NARROW:
        return partial(_shortest, np.dtype(kind.dtype).type)
    if isinstance(kind, Mapping):
        parts = {name: read for name, inner in kind.items() if (read := _reader(inner))}
        return partial(_read_parts, parts) if parts else None
    read = _reader(kind.feature) if hasattr(kind, "feature") else None
    return None if read is None else partial(_read_each, read)


def _is_media(kind: Any) -> bool:
    """Whether a column's kind is a file that datasets decodes, or a list of these."""
    return isinstance(kind, MEDIA) or (hasattr(kind, "feature") and _is_media(kind.feature))


def _label(names: Sequence[str], value: Any) -> Any:
    if type(value) is not int:
        return value
    return Label(value, names[value]) if value >= 0 else None


def _shortest(kind: type[np.floating[Any]], value: Any) -> Any:
    return float(str(kind(value))) if isinstance(value, float) else value


def _read_parts(readers: Mapping[str, Callable[[Any], Any]], value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {**value, **{name: read(value[name]) for name, read in readers.items() if name in value}}


def _read_each(read: Callable[[Any], Any], value: Any) -> Any:
    return [*map(read, value)] if isinstance(value, list) else value


def plain_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows as :func:`plain_row` gives them. A warning says which of two prompts counts.

    Raises TOPDError: one is not a mapping.
    """
    found = [plain_row(_mapping(index, row)) for index, row in enumerate(unformatted(rows))]
    if any(row.get("prompt") is not None and row.get("messages") is not None for row in found):
        logger.warning(
            "data: rows have both prompt and messages. prompt counts and messages is not read. To "
            "read the conversations, map them (columns: {messages: messages}), or leave the column "
            "prompt out."
        )
    return found


def _mapping(index: int, row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise TOPDError(
            f"data row {index}: must be a mapping such as {{'prompt': 'What is 1 + 2?'}}, not a "
            f"{type(row).__name__}. Give a list of these, or a data set of datasets."
        )
    return row


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as it is read: a missing cell is None, and an array is a list.

    Missing are NaN, and pandas' NA and NaT.

    >>> plain_row({"prompt": "What is 1 + 2?", "solution": float("nan")})
    {'prompt': 'What is 1 + 2?', 'solution': None}
    """
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy's, as in what pandas reads from Parquet
        narrow = str(getattr(value, "dtype", "")) in NARROW and isinstance(value, NUMPY)
        value = (value.astype(str).astype(float) if narrow else value).tolist()
    if isinstance(value, Sequence | Mapping):
        return value
    try:
        return None if value != value else value  # NaN and NaT are not equal to themselves
    except TypeError:  # pandas' NA does not say whether it is
        return None


def prompt_of(row: Mapping[str, Any]) -> Any:
    """The column that is a row's prompt: ``prompt``, or ``messages`` where it has none."""
    prompt = row.get("prompt")
    return row.get("messages") if prompt is None else prompt


@dataclass(frozen=True)
class Row:
    """A row of data, read: its prompt, the answer if it has one, and what the template gets.

    ``answer`` is an assistant's message, ``solution`` its text; ``template_kwargs`` are the row's
    own, ``tools`` among them.
    """

    index: int
    prompt: str | Messages
    answer: Mapping[str, Any] | None
    template_kwargs: Mapping[str, Any]

    @property
    def solution(self) -> str | None:
        """The text of the answer; None without one."""
        text = (self.answer or {}).get("content")
        return text if isinstance(text, str) and text.strip() else None


def read_row(index: int, row: Mapping[str, Any]) -> Row:
    """A row's prompt, answer, tools and template arguments. Raises TOPDError, with the row."""
    unread = [name for name in UNREAD if _filled(row.get(name)) not in (None, "", [], {})]
    if unread:
        raise TOPDError(NOT_READ.format(index, unread[0]))
    prompt = prompt_of(row)
    if prompt is None and row.keys() & {"prompt", "messages"}:
        prompt = ""
    if prompt is None:
        raise TOPDError(
            f"data row {index}: has neither prompt nor messages, but "
            f"{', '.join(sorted(map(str, row)))}. Map a column: columns: {{prompt: NAME}} "
            "(in Python: rename_column)."
        )
    answer = _answer(index, row)
    if not isinstance(prompt, str):
        prompt = _checked_messages(index, prompt)
        _check_roles(index, [message["role"] for message in prompt])
        if prompt and prompt[-1]["role"] == "assistant":
            answer = answer or prompt[-1]
            prompt = prompt[:-1]
    if not prompt or not last_user(prompt).strip():
        raise TOPDError(f"data row {index}: the prompt is empty. Remove the row or fill it in.")
    if isinstance(prompt, str) or len(prompt) == 1:
        _check_text(index, "prompt", last_user(prompt))
    kwargs = dict(_json_column(index, row, "chat_template_kwargs", Mapping) or {})
    tools = _json_column(index, row, "tools", Sequence)
    return Row(index, prompt, answer, {**kwargs, **({"tools": tools} if tools else {})})


def _check_roles(index: int, roles: Sequence[str]) -> None:
    """Refuse other names of known roles, and any other where nobody asks. Raises TOPDError.

    An answer of the role ``model`` would be a part of the prompt.
    """
    for role in roles:
        if role not in ROLES and (role.lower() in MISNAMED or "user" not in roles):
            raise TOPDError(
                f"data row {index}: has a message of the role {role!r}. Write the roles as user, "
                "assistant, system or tool."
            )


def _answer(index: int, row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The answer that a column has: ``solution``, or the ``completion`` of TRL's data."""
    solution = row.get("solution")
    if solution is None:
        solution = row.get("completion")
    if solution is None or (isinstance(solution, str) and not solution.strip()):
        return None
    if isinstance(solution, str) or not isinstance(solution, Sequence | Mapping):
        # a column of whole numbers with a gap is one of floats; those of JSON are Written
        if type(solution) is float and solution.is_integer() and abs(solution) < EXACT:
            solution = int(solution)
        _check_text(index, "solution", str(solution))
        return {"role": "assistant", "content": str(solution)}
    said = [solution] if isinstance(solution, Mapping) else solution
    if not all(isinstance(turn, Mapping) and "role" in turn for turn in said):
        raise TOPDError(
            f"data row {index}: the solution is a text or one message of the assistant, not "
            f"{shown(solution)}. Of several values map one: columns: {{solution: NAME.0}}, or "
            "NAME.KEY."
        )
    turns = _checked_messages(index, solution)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise TOPDError(
            f"data row {index}: a completion is a text or one message of the assistant. Split the "
            "conversation into rows."
        )
    return turns[0]


def _check_text(index: int, what: str, text: str) -> None:
    """Refuse messages that a table has made a text of: they would be learned as they look.

    Raises TOPDError.
    """
    if WRITTEN.match(text):
        raise TOPDError(
            f"data row {index}: the {what} is a text that looks like messages: {shown(text[:40])}. "
            "Give messages as a list, in JSONL or Parquet, or in a table the plain text."
        )


def _json_column(index: int, row: Mapping[str, Any], name: str, kind: Any) -> Any:
    """A column with values of the template's, given as they are or as JSON text."""
    value = _filled(row.get(name))
    if isinstance(value, str):
        try:
            value = json.loads(value)  # whose nulls are its own
        except (ValueError, RecursionError) as error:
            raise TOPDError(f"data row {index}: {name} is not JSON: {error}.") from error
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, kind):
        wanted = "a mapping such as {a: 1}" if kind is Mapping else "a list of tools"
        raise TOPDError(f"data row {index}: {name} must be {wanted}, not {value!r}.")
    return value


def _filled(value: Any) -> Any:
    """Without the keys of None that Arrow puts into every row for want of a value."""
    if hasattr(value, "tolist"):  # an array
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_filled(inner) for inner in value]
    return value


def _checked_messages(index: int, prompt: Any) -> list[dict[str, Any]]:
    messages = list(prompt) if isinstance(prompt, Sequence) else [prompt]
    checked = []
    for message in messages:
        fields = _filled(message) if isinstance(message, Mapping) else {}
        if fields.get("role") == "assistant" and fields.get("tool_calls"):
            fields = {"content": "", **fields}
            fields["tool_calls"] = with_mappings(index, fields["tool_calls"])
        if "content" in fields:
            fields["content"] = _joined(fields["content"])
        if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
            raise TOPDError(
                f"data row {index}: a prompt is a string or a list of messages, each with a role "
                f"and a content of text, not {message!r}."
            )
        checked.append(fields)
    return checked


def _joined(content: Any) -> Any:
    """The text of parts that are all text, end to end, as templates write them; others as given.

    A part is text as OpenAI and TRL write it.
    """
    parts = content if isinstance(content, list) else []
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    ]
    return "".join(texts) if texts and len(texts) == len(parts) else content
