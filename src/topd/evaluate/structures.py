"""What a written answer is made of: the items of a list, the intervals of a region."""

# ruff: noqa: SIM905 - words in a string

from __future__ import annotations

import re
from collections.abc import Iterable
from string import ascii_letters

VARIABLE = r"(?:[A-Za-z]|\\(?!not\b)[a-z]+)(?:_\{?\w+\}?)?'?(?:\([a-z](?:,\s*[a-z])*\))?"
GREEK = (  # as tuples have them: (rho, theta, phi)
    "alpha beta gamma delta epsilon rho theta lambda mu nu sigma tau phi chi psi omega".split()
)
SIGNS = frozenset(
    "le ge ne gg ll nleq ngeq nless ngtr lesssim gtrsim prec succ preceq succeq in notin subset "
    "subseteq supset supseteq not equiv approx sim simeq cong propto to rightarrow mapsto mid nmid "
    "mod bmod pmod prime".split()
)
UNARY = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp".split()
READ = SIGNS | {  # commands that math-verify reads
    *UNARY,
    *"frac over sqrt cdot times div pi infty pm mp binom cup cap setminus emptyset".split(),
    *"varnothing lfloor rfloor lceil rceil lvert rvert vert mathbb".split(),
    *GREEK,
    *"zeta eta iota kappa xi upsilon varepsilon vartheta varphi".split(),
    *"Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega".split(),
}
ENDS = "|".join([*SIGNS, *"cdot times div pm mp cup cap setminus rfloor rceil rvert".split()])
UNCLEAR = re.compile(  # 1/2x, 1/2(x+1), ln 2/3, sin x * y
    rf"/\s*\d+\s*(?:[a-zA-Z(]|\\(?!(?:{ENDS})(?![a-zA-Z]))[a-zA-Z])"
    rf"|\\(?:{'|'.join(UNARY)})(?![a-z])(?:[_^](?:\w|\{{[^{{}}]*\}}))*\s*(?![\s(])"
    r"(?:[^-+()=,{}/<>]|\{[^{}]*\})*?(?:/|\\(?:cdot|times|div)(?![a-z]))"
)
MARKED = re.compile(r"\\(?:vec|hat|bar|overline|overrightarrow)\s*\{[A-Za-z]+\}")  # names, read so
BRACKETS = {"(": ")", "[": "]", "{": "}"}
NAME = re.compile(  # of what the value after it is: an angle, a side, a sum, an area
    rf"^(?:\\angle\s*[A-Z]{{1,3}}|[A-Z]{{2,3}}|[A-Za-z]\(-?[^()=+-]+\)|«[A-Za-z ]+»"
    rf"|{VARIABLE}(?:\s*\+\s*{VARIABLE})*)\s*=\s*(?=[^=]+$)"
)
NEARLY = re.compile(r"(?<=[\w})°])\s*\\approx\s*[-+\d.]+\s*(?:«[^»]*»|°)?$")
RELATION = re.compile(r"(\\(?:le|ge|ne)(?![A-Za-z])|<|>)")
REALS = r"\\mathbb\s*\{?\s*R\s*\}?"
BUILT = re.compile(  # {x in R | ...}
    rf"\\?\{{\s*({VARIABLE})\s*(?:\\in\s*{REALS}\s*)?(?:\\mid(?![a-z])|\||:)\s*(.*?)\s*\\?\}}"
)
HOLES = re.compile(rf"{REALS}\s*(?:\\setminus|\\backslash|-|\\)\s*\\?\{{(.*?)\\?\}}")
DOWN, UP = "(-\\infty", "\\infty)"
THOUSANDS = re.compile(r"(?<=\d),\d{3}(?!\d)")


def value_of(text: str, *, item: bool) -> str:
    """A value without its decimals after it; one that is no item of a list without its name too.

    >>> value_of("m+n = 204", item=False), value_of("12\\\\pi \\\\approx 37.7", item=True)
    ('204', '12\\\\pi')
    >>> value_of("2x = 4", item=False), value_of("AB = 3", item=True)  # beside BC = 2
    ('2x = 4', 'AB = 3')
    """
    text = NEARLY.sub("", text)
    return text if item else NAME.sub("", text)


def intervals(text: str) -> list[str] | None:
    """The intervals of a union or of inequalities in one variable, as ``[0;1)``; None for others.

    >>> intervals("0 \\\\le x < 1"), intervals("x \\\\ne 3")
    (['[0;1)'], ['(-\\\\infty;3)', '(3;\\\\infty)'])
    """
    text = text.replace("+\\infty", "\\infty").strip()
    built, holes = BUILT.fullmatch(text), HOLES.fullmatch(text)
    if built and has_relation(built[2]):
        text = built[2]
    if has_relation(text):
        parts = [p for part in text.split("\\lor") for p in split_list(part)]  # x < 2 or x > 3
        found = [_inequalities(part) for part in parts]
        if None in found or len({name for name, _ in filter(None, found)}) != 1:
            return None
        name = next(name for name, _ in filter(None, found))
        if built and built[1] != name:
            return None
        return [region for _, regions in filter(None, found) for region in regions]
    if re.fullmatch(REALS, text):
        return ["(-\\infty;\\infty)"]
    if holes:
        points = split_list(holes[1])
        return [f"(-\\infty;{points[0]})", f"({points[0]};\\infty)"] if len(points) == 1 else None
    regions = []
    for part in text.split("\\cup"):
        inner = re.fullmatch(r"\s*([(\[])([^()\[\]]*(?:\([^()]*\)[^()\[\]]*)*)([)\]])\s*", part)
        ends = split_list(inner[2]) if inner else []
        if inner is None or len(ends) != 2 or "=" in inner[2]:
            return None
        regions.append(f"{inner[1]}{ends[0]};{ends[1]}{inner[3]}")
    return regions


def has_relation(text: str) -> bool:
    """Whether a text compares: <, >, at most, at least, not equal."""
    return RELATION.search(text) is not None


def _inequalities(text: str) -> tuple[str, list[str]] | None:
    """The variable and the intervals of one inequality, or of two that hold together."""
    found = [_inequality(part) for part in text.split("\\land")]
    name, ends = found[0] or ("", [])
    if len(found) == 1:
        return (name, [";".join(pair) for pair in ends]) if ends else None
    if len(found) > 2 or found[1] is None or found[1][0] != name or len(ends + found[1][1]) != 2:
        return None
    (low, high), (other_low, other_high) = ends[0], found[1][1][0]
    if (high, other_low) == (UP, DOWN):
        return name, [f"{low};{other_high}"]
    return (name, [f"{other_low};{high}"]) if (low, other_high) == (DOWN, UP) else None


def _inequality(text: str) -> tuple[str, list[tuple[str, str]]] | None:
    """The variable of an inequality, and both ends of its intervals."""
    pieces = [piece.strip() for piece in RELATION.split(text)]
    sides, signs = pieces[::2], pieces[1::2]
    where = [i for i, side in enumerate(sides) if re.fullmatch(VARIABLE, side)]
    if len(where) != 1 or len(sides) > 3 or not all(sides):
        return None
    name = sides[where[0]]
    if signs == ["\\ne"]:
        other = sides[1 - where[0]]
        return name, [(DOWN, f"{other})"), (f"({other}", UP)]
    low, high = DOWN, UP
    for i, sign in enumerate(signs):
        if sign == "\\ne" or where[0] not in (i, i + 1):
            return None
        left = where[0] == i  # variable SIGN bound
        bound, closed = sides[i + 1] if left else sides[i], sign in ("\\le", "\\ge")
        if (sign in ("<", "\\le")) == left:
            high = f"{bound}{']' if closed else ')'}"
        else:
            low = f"{'[' if closed else '('}{bound}"
    return name, [(low, high)]


def listed(text: str) -> tuple[str, list[str]]:
    """The bracket around a list, if there is one, and its items. ``\\\\pm`` stands for two."""
    text = re.sub(rf"^[A-Za-z]\s*=\s*(?=.*,)(?![^,]*,\s*{VARIABLE}\s*=)", "", text)
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


def assigned(items: list[str]) -> dict[str, str]:
    """The values of ``x=1``, ``y=2`` by their names; empty if that is not what the items are.

    >>> assigned(["x=1", "y=2"]), assigned(["x=1", "x=2"]), assigned(["(a,b)=(3,4)"])
    ({'x': '1', 'y': '2'}, {}, {'a': '3', 'b': '4'})
    """
    if len(items) == 1:
        names, _, values = items[0].partition("=")
        sides = listed(names.strip()), listed(values.strip())
        if [side[0] for side in sides] != ["(", "("] or len(sides[0][1]) != len(sides[1][1]):
            return {}
        items = [f"{name}={value}" for name, value in zip(sides[0][1], sides[1][1], strict=True)]
    pairs = [[side.strip() for side in item.split("=")] for item in items]
    if not all(len(pair) == 2 and re.fullmatch(VARIABLE, pair[0]) for pair in pairs):
        return {}
    found = {re.sub(r"[\s{}]", "", name): value for name, value in pairs}
    return found if 1 < len(found) == len(items) else {}


def in_order(names: Iterable[str]) -> list[str] | None:
    """Names as a tuple has them; None where that is not sure: m, b may be (m, b) or (b, m).

    >>> in_order("yx"), in_order("mb"), in_order(["r", "\\\\theta"])
    (['x', 'y'], None, ['r', '\\\\theta'])
    """
    written = list(names)
    found = sorted(written, key=_place)
    return found if found == written or "".join(found) in ascii_letters else None


def _place(name: str) -> tuple[int, str, int, str]:
    letter, _, index = name.partition("_")
    greek = GREEK.index(letter[1:]) if letter[1:] in GREEK else -1
    return greek, letter, int(index) if index.isdigit() else 0, index


def variables(text: str) -> set[str]:
    """The letters of an expression, without those of constants.

    >>> sorted(variables("2e + \\\\alpha x"))
    ['\\\\alpha', 'x']
    """
    names = re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", text)
    greek = {name for name in names if name[0] == "\\" and name[1:] in GREEK}
    return greek | {name for name in names if name[0] != "\\" and name not in "ei"}


def misread(text: str) -> bool:
    """Whether math-verify would read an expression otherwise than it may be meant.

    Of a command that it does not know, and of degrees, it takes a number that is near. What is
    divided by a product, and where the argument of a function ends, it decides.

    >>> misread("\\\\lg 2"), misread("2\\\\ln 2"), misread("\\\\sin 5°+1"), misread("1/2x")
    (True, False, True, True)
    """
    known = READ.issuperset(re.findall(r"\\([a-zA-Z]+)", MARKED.sub("", text)))
    return not known or "°" in text or UNCLEAR.search(text) is not None
