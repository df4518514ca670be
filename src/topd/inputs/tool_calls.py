"""The arguments of tool calls: logs, chat templates and servers have them in different forms."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from topd.errors import TOPDError, shown


def with_mappings(index: int, calls: Any) -> Any:
    """A message's ``tool_calls`` with their arguments as mappings; other forms as they are.

    Of text, as OpenAI's logs have it, most chat templates would make JSON once more, in quotes.

    >>> with_mappings(0, [{"function": {"name": "add", "arguments": '{"a": 1}'}}])
    [{'function': {'name': 'add', 'arguments': {'a': 1}}}]

    Raises TOPDError, with the row: arguments that are neither a mapping nor JSON text of one.
    """
    return _changed(calls, partial(_mapping, index))


def with_texts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as text, as chat servers ask."""
    calls = message.get("tool_calls")
    return {**message, **({"tool_calls": _changed(calls, as_text)} if calls else {})}


def with_less(message: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A message without parts of these names; of several calls the last one alone is left out."""
    rest = {name: value for name, value in message.items() if name not in names}
    calls = message.get("tool_calls") if "tool_calls" in names else None
    several = isinstance(calls, Sequence) and not isinstance(calls, str) and len(calls) > 1
    return {**rest, **({"tool_calls": calls[:-1]} if calls and several else {})}


def as_text(arguments: Any) -> str:
    """The arguments of a call as JSON text."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def arguments_of(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The arguments of all calls."""
    found: list[Any] = []
    for message in messages:
        _changed(message.get("tool_calls"), found.append)
    return found


def _changed(calls: Any, change: Callable[[Any], Any]) -> Any:
    """Calls with their arguments changed, whether these are in ``function`` or beside the name."""
    if isinstance(calls, Mapping):
        if isinstance(calls.get("function"), Mapping):
            return {**calls, "function": _changed(calls["function"], change)}
        return {key: change(v) if key == "arguments" else v for key, v in calls.items()}
    if isinstance(calls, Sequence) and not isinstance(calls, str):
        return [_changed(call, change) for call in calls]
    return calls


def _mapping(index: int, given: Any) -> Any:
    try:
        found = json.loads(given or "{}") if isinstance(given, str) else given
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, Mapping):
        raise TOPDError(
            f"data row {index}: the arguments of a tool call must be a mapping such as {{a: 1}}, "
            f"or JSON text of one, not {shown(given)}."
        )
    return found
