"""Values of a configuration as the types of their fields; a number is a number."""

from __future__ import annotations

import math
import os
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from topd.errors import TOPDError, shown

INFINITE = ("max_grad_norm",)  # gradients are measured then, and not clipped
_NO_LISTS = ("debug",)  # what HfArgumentParser passes, and transformers takes, for an empty one
_OBJECTS = ("accelerator_config",)  # may be an object of transformers


def typed(kind: type, name: str, value: Any) -> Any:
    """A value as the type of its field: ``"1e-5"`` as a float, a path as text.

    Raises TOPDError: it has another type, or is or has a number that is not finite.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if value is None and name in _NO_LISTS:
        return value
    if name in _OBJECTS and not isinstance(value, dict | str | None):
        return value
    try:
        found = _as(_adapter(kind, name), value)
    except ValueError as error:  # of older versions of pydantic an enum's own, too
        given = "not shown" if name.endswith("token") else shown(value)
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise TOPDError(f"{name}: {said} (given: {given}).") from error
    _check_finite(name, found)
    return found


def defaults_of(kind: type) -> dict[str, Any]:
    """The default of every argument of a dataclass; MISSING where there is none."""
    return {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(kind)
        if f.init
    }


def given_of(kind: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> frozenset[str]:
    """Which of the arguments that a configuration is made with were given, not filled in.

    Without ``left_out`` all of them, but where every field is passed: then those that differ from
    their defaults. With it, as ``dataclasses.replace`` passes it on, those that were given before
    and those that are not what they were.
    """
    defaults = defaults_of(kind)
    passed = {**dict(zip([*defaults][: len(args)], args, strict=True)), **kwargs}
    left_out = passed.pop("left_out", None)
    if left_out is None:
        left_out = defaults if passed.keys() >= defaults.keys() else {}
    return frozenset(
        name for name, value in passed.items() if name not in left_out or value != left_out[name]
    )


def left_out_by(config: Any, given: Container[str], brought: Container[str]) -> dict[str, Any]:
    """What a configuration has at its default, or from its method, since it was not given."""
    usual = defaults_of(type(config))
    kept = {name: getattr(config, name) for name in usual if name not in given}
    return {name: value for name, value in kept.items() if name in brought or value == usual[name]}


def worked_out(config: Any, name: str, value: Any) -> None:
    """Set what a value comes to; where none was given, none counts as given for it."""
    setattr(config, name, value)
    if name in config.left_out:
        config.left_out = {**config.left_out, name: value}  # a copy of it keeps its own


@cache
def _adapter(kind: type, name: str) -> TypeAdapter[Any]:
    return TypeAdapter(_hints(kind)[name], config=ConfigDict(arbitrary_types_allowed=True))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _as(adapter: TypeAdapter[Any], value: Any) -> Any:
    """The value as its type; false, as YAML reads a bare no, is the word where text is wanted."""
    try:
        return adapter.validate_python(value)
    except ValueError:  # older pydantics let an enum's own through
        if value is False:
            with suppress(ValueError):
                return adapter.validate_python("no")
        raise


def _check_finite(name: str, value: Any) -> None:
    """Every number in a value, whatever it is in. Raises TOPDError."""
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        for inner in value:
            _check_finite(name, inner)
    elif isinstance(value, float) and not math.isfinite(value):
        if value == math.inf and name in INFINITE:
            return
        raise TOPDError(f"{name}: {value} must be a finite number. Write one, or leave it out.")
