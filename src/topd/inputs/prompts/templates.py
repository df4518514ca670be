"""Jinja templates from recipes, which may be a stranger's: no code, and bounded time and memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

from jinja2 import Template
from jinja2.exceptions import SecurityError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 1_000_000  # characters of a text, on the way too
WIDEST = 1_000  # a number that a filter or a method is given: widths, counts
SECONDS = 2.0  # for one row


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, in which nothing grows beyond bounds.

    Products, powers and ``%`` of texts are looked at before they are computed; arguments of
    methods and filters must be short and small.
    """

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """A binary operation, if its result is short. Raises SecurityError."""
        sizes = sorted((_size(left), _size(right)))
        if operator == "%" and isinstance(left, str):
            raise SecurityError("% on text is not allowed: use ~")
        if operator == "+" and sum(sizes) > LONGEST:
            raise SecurityError("a sum is too long")
        if operator == "*" and sizes[0] + sizes[1] > 0:
            count = next((x for x in (left, right) if isinstance(x, int)), 1)
            if sizes[1] * max(1, abs(count)) > LONGEST:
                raise SecurityError("a product is too long")
        numbers = [x for x in (left, right) if isinstance(x, int)]
        if operator in ("*", "**") and numbers and max(map(abs, numbers)) > 1 << 64:
            raise SecurityError("a number is too large")
        if operator == "**" and abs(right) > 64:
            raise SecurityError("an exponent is too large")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call, if what it works on is small. Raises SecurityError."""
        if isinstance(getattr(__obj, "__self__", None), str):
            _check(__obj.__self__, *args, *kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)


def known(value: Any) -> Any:
    """A value as it is written; None is what a row has where it lacks one. Raises UndefinedError.

    Given to Jinja as ``finalize``: None may be asked for, but not written.
    """
    if value is None:
        raise UndefinedError("a value that it writes is missing (None)")
    return value


def fill(values: Mapping[str, Any], template: Template) -> str:
    """The template filled in.

    Raises:
        TemplateError: it asks for what is not allowed, or the text is too long.
        TimeoutError: it takes too long.
        MemoryError, RecursionError: what they say.
    """
    end, parts, size = time.monotonic() + SECONDS, [], 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it takes more than {SECONDS:g} seconds")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for part in template.generate(dict(values)):
            parts.append(part)
            size += len(part)
            if size > LONGEST:
                raise SecurityError(f"it gives more than {LONGEST} characters")
    finally:
        sys.settrace(before)
    return "".join(parts)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else 0


def _check(text: str, *given: Any) -> None:
    """Arguments that could make something long of a text. Raises SecurityError."""
    for value in given:
        if isinstance(value, int) and abs(value) > WIDEST:
            raise SecurityError(f"{value if abs(value) < 1 << 64 else 'a number'} is too large")
        if _size(value) * max(1, len(text)) > 100 * LONGEST:
            raise SecurityError("a text is too long")
