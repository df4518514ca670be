"""What a written answer is made of: the items of a list, the intervals of a region."""

from __future__ import annotations

import re

VARIABLE = r"(?:[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?'?(?:\([a-z](?:,\s*[a-z])*\))?"
BRACKETS = {"(": ")", "[": "]", "{": "}"}
RELATION = re.compile(r"(\\le\b|\\ge\b|\\ne\b|<|>)")
THOUSANDS = re.compile(r"(?<=\d),\d{3}(?!\d)")


def intervals(text: str) -> list[str] | None:
    """The intervals of a union or of inequalities in one variable, as ``[0;1)``; None for others.

    >>> intervals("0 \\\\le x < 1"), intervals("x \\\\ne 3")
    (['[0;1)'], ['(-\\\\infty;3)', '(3;\\\\infty)'])
    """
    text = text.replace("+\\infty", "\\infty").strip()
    if has_relation(text):
        each = [_inequality(part) for part in split_list(text)]  # x < 2 or x > 3
        return None if None in each else [region for part in each if part for region in part]
    found = []
    for part in text.split("\\cup"):
        inner = re.fullmatch(r"\s*([(\[])([^()\[\]]*(?:\([^()]*\)[^()\[\]]*)*)([)\]])\s*", part)
        ends = split_list(inner[2]) if inner else []
        if inner is None or len(ends) != 2:
            return None
        found.append(f"{inner[1]}{ends[0]};{ends[1]}{inner[3]}")
    return found


def has_relation(text: str) -> bool:
    """Whether a text compares: <, >, at most, at least, not equal."""
    return RELATION.search(text) is not None


def _inequality(text: str) -> list[str] | None:
    pieces = [piece.strip() for piece in RELATION.split(text)]
    sides, signs = pieces[::2], pieces[1::2]
    where = [i for i, side in enumerate(sides) if re.fullmatch(VARIABLE, side)]
    if len(where) != 1 or len(sides) > 3 or not all(sides):
        return None
    if signs == ["\\ne"]:
        other = sides[1 - where[0]]
        return [f"(-\\infty;{other})", f"({other};\\infty)"]
    low, high = ("(", "-\\infty"), ("\\infty", ")")
    for i, sign in enumerate(signs):
        if sign == "\\ne" or where[0] not in (i, i + 1):
            return None
        left = where[0] == i  # variable SIGN bound
        bound, closed = sides[i + 1] if left else sides[i], sign in ("\\le", "\\ge")
        if (sign in ("<", "\\le")) == left:
            high = (bound, "]" if closed else ")")
        else:
            low = ("[" if closed else "(", bound)
    return [f"{low[0]}{low[1]};{high[0]}{high[1]}"]


def listed(text: str) -> tuple[str, list[str]]:
    """The bracket around a list, if there is one, and its items. ``\\\\pm`` stands for two."""
    text = re.sub(r"^[A-Za-z]\s*=\s*(?=.*,)(?![^,]*,\s*[A-Za-z]\s*=)", "", text)
    text = text.replace("\\{", "{").replace("\\}", "}").strip()
    bracket = text[:1] if text[:1] in BRACKETS and _closing(text) == len(text) - 1 else ""
    items = split_list(text[1:-1] if bracket else text)
    if bracket == "(" and len(items) == 1:
        bracket = ""
    both = []
    for item in items:
        sign = re.search(r"\\pm|\\mp", item)
        both += [item] if sign is None else [
            (item[: sign.start()] + s + item[sign.end() :]).strip() for s in ("+", "-")
        ]  # fmt: skip
    return bracket, [item.removeprefix("+").strip() for item in both]


def _closing(text: str) -> int:
    depth = 0
    for place, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return place
    return -1


def split_list(text: str) -> list[str]:
    """At commas and semicolons outside brackets; those of thousands stay.

    >>> split_list("1, (2, 3), 4"), split_list("1,000, 2"), split_list("1,2")
    (['1', '(2, 3)', '4'], ['1,000', '2'], ['1', '2'])
    """
    spaced = re.search(r",\s", text) is not None
    parts, depth, start = [], 0, 0
    for place, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        thousands = spaced and THOUSANDS.match(text, place) is not None
        if depth == 0 and char in ",;" and not thousands:
            parts.append(text[start:place].strip())
            start = place + 1
    return [part for part in (*parts, text[start:].strip()) if part]
