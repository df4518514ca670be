"""What the teacher's own prompt is told of the answer: the row's, another row's, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from jinja2 import Environment, meta

from topd.errors import TOPDError

Reference: TypeAlias = Literal["given", "wrong", "none"]
COLUMNS = ("solution", "answer")


def columns_of(template: str, environment: Environment) -> list[str]:
    """The columns with the answer that a template names. Raises jinja2's errors."""
    named = meta.find_undeclared_variables(environment.parse(template))
    return [name for name in COLUMNS if name in named]


def referred(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], reference: Literal["wrong", "none"]
) -> list[dict[str, Any]]:
    """For every row the values that its template gets in the place of its own reference.

    ``none``: empty text. ``wrong``: those of the next row whose values are others.

    >>> referred([{"answer": "3"}, {"answer": "3"}, {"answer": "5"}], ["answer"], "wrong")
    [{'answer': '5'}, {'answer': '5'}, {'answer': '3'}]

    Raises TOPDError: the template names no reference, or all rows have the same one.
    """
    if not columns:
        raise TOPDError(
            f"reference: {reference} has no effect: teacher_prompt names neither "
            f"{' nor '.join(COLUMNS)}. Leave it out."
        )
    if reference == "none":
        return [dict.fromkeys(columns, "") for _ in rows]
    own = [{name: row.get(name) for name in columns} for row in rows]
    there = [values for values in own if None not in values.values()]
    if not any(values != there[0] for values in there):
        raise TOPDError(
            "reference: wrong needs rows with different answers to take another's, and all rows "
            f"have the same {' and '.join(columns)}. Give more rows, or reference: none."
        )
    later = ((own[(i + k) % len(own)] for k in range(1, len(own))) for i in range(len(own)))
    return [
        next(other for other in others if other != values and None not in other.values())
        for values, others in zip(own, later, strict=True)
    ]
