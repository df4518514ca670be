"""Is a claim the reference? By what the reference is: words, a date, a number, a list, algebra.

Words, dates, times and choices are compared as text, numbers as exact rationals, lists and
intervals by their parts; what is left is algebra, which math-verify is asked about. Where the kinds
differ the answer is no: a right answer lost costs a little, a wrong one that counts misleads.
"""

# ruff: noqa: SIM905 - words in a string

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from itertools import chain
from typing import TypeAlias

from topd.evaluate.exact import exact
from topd.evaluate.structures import (
    SIGNS,
    VARIABLE,
    assigned,
    has_relation,
    in_order,
    intervals,
    listed,
    misread,
    value_of,
    variables,
)
from topd.evaluate.units import SHORT, converted, quantity

Ask: TypeAlias = Callable[[str, str], bool]  # whether two are equal, the reference first

MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
DATE = re.compile(
    r"\d{4}-\d{1,2}-\d{1,2}(?:[T ].*)?|\d{1,2}[/.]\d{1,2}[/.]\d{2,4}|\d{3}-\d{4}"
    rf"|(?:\d{{1,2}} )?(?:{'|'.join(MONTHS)})[a-z]*\.? \d{{1,4}}(?:,? \d{{4}})?",
    re.I,
)
LABEL = re.compile(  # versions, addresses, formulas of chemistry
    r"v?\d+(?:\.\d+){2,}|v\d[\w.]*|(?=[^\d]*[A-Z][^\d]*\d)(?:[A-Z][a-z]?\d*)+"
)
GROUPED = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
SPACED = re.compile(r"(?<![\d._^])\d{1,3}(?: \d{3})+(?!\d)")
APART = re.compile(r"(?<=\d)(?<!_\d)(?<!_\d\d)\s+(?=\d)")  # the 8 of \log_2 8 is no second number
WORD = re.compile(r",?\s*(?:«\s*(and|or)\s*»|\b(and|or)\b)\s*")
TURNED = {"ge": "le", ">": "<", "gg": "ll", "bmod": "mod", "pmod": "mod"}  # sides may be turned
EMPTY = re.compile(r"\\?\{\s*\\?\}|\\(?:emptyset|varnothing)|∅")
TIME = re.compile(r"(\d{1,2}):(\d{2})(?::\d{2})?\s*([ap]\.?\s*m\.?)?", re.I)
CHOICE = re.compile(r"\(?([A-Z])\)?")
CHOSEN = re.compile(
    r"(?:(?i:option|choice)\s+)?(?:\(?([A-Za-z])[).:]?|\(?([A-Z])[).:]\s+.+|\(([A-Z])\).*)"
)
SECOND = re.compile(
    r"[).:]*\s*(?:[,/&]|and\b|or\b)\s*(?i:(?:or|and|option|choice)\s+)*\(?(?!I [a-z])[A-Z]\b"
)
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc log ln exp min max gcd lcm mod det arcsin arccos arctan sinh cosh "
    "tanh sqrt pi infty frac cup cap inf lim sup".split()
)
SMALL = frozenset("or no on of is to in at by an as if it we".split())
ARTICLES = frozenset({"the", "a", "an"})
BASED = re.compile(r"\(?(\d+)\)?_\{?(\d{1,2})\}?")
RATIO = re.compile(r"[^:]+(?::[^:]+)+")
MATRIX = re.compile(
    r"[\[(]?\s*\\begin\{(array|[pbvB]?matrix)\}(?:\{[clr| ]*\})?(.*)\\end\{\1\}\s*[\])]?", re.S
)
MOST_PARTS = 50


def same(gold: str, claim: str, ask: Ask, *, deep: int = 0) -> bool:
    """Whether a claim is the reference, both in the spelling of ``written.plain``.

    Args:
        gold: the reference.
        claim: the answer of a model; it may be anything.
        ask: whether two expressions are mathematically equal, the reference first.
    """
    if not gold or not claim or deep > 6:
        return False
    if _tight(gold) == _tight(claim) or (EMPTY.fullmatch(gold) and EMPTY.fullmatch(claim)):
        return True
    if ("?" in claim) != ("?" in gold):
        return False
    gold, claim = _joined(gold), _joined(claim)
    if "=" not in gold and "\\approx" not in gold:
        claim = value_of(claim, item=deep > 0)
    inner = partial(same, ask=ask, deep=deep + 1)
    for kind in (_choices, _literals, _matrices, _quantities, _words):
        verdict = kind(gold, claim, inner)
        if verdict is not None:
            return verdict
    return _parts(gold, claim, inner, ask)


def _tight(text: str) -> str:
    """Without blanks, but for one between digits: "1 1/2" is not "11/2", and "1 234" a number.

    "1, 234" is a list of two, and "1,234" a number.
    """
    text = re.sub(r"(?<=\d),\s+(?=\d{3}(?!\d))", ";", _grouped(text))
    return re.sub(r"[\s«»]", "", APART.sub("|", text))


def _grouped(text: str) -> str:
    """With no blanks in groups of thousands."""
    return SPACED.sub(lambda found: found.group().replace(" ", ""), text)


def _joined(text: str) -> str:
    """A list with commas for its "and" or "or", if nothing else in it is a word.

    Between inequalities they differ: the signs of logic stand for them.
    """
    signs = {"and": ", ", "or": ", "}
    if has_relation(text):
        signs = {"and": " \\land ", "or": " \\lor "}
        text = re.sub(r"\\wedge(?![a-z])", r"\\land", re.sub(r"\\vee(?![a-z])", r"\\lor", text))
    joined = WORD.sub(lambda found: signs[found[1] or found[2]], text)
    return text if _wordy(joined) else joined


# Text


def _choices(gold: str, claim: str, inner: Ask) -> bool | None:
    """A letter, or a list of letters, against letters with or without what they stand for."""
    ours, theirs = _unmarked(gold), _unmarked(claim)
    if CHOICE.fullmatch(ours):
        found = CHOSEN.fullmatch(theirs)
        if found is None or SECOND.match(theirs, found.end(found.lastindex or 0)):
            return False
        return found[found.lastindex or 0].upper() == re.sub(r"[()]", "", ours)
    letters = re.split(r"\s*,\s*", ours)
    if len(letters) > 1 and all(CHOICE.fullmatch(letter) for letter in letters):
        bare = [sorted(re.sub(r"[()]", "", x) for x in re.split(r"\s*,\s*|\s+and\s+", y))
                for y in (ours, theirs)]  # fmt: skip
        return bare[0] == bare[1]
    return None


def _literals(gold: str, claim: str, inner: Ask) -> bool | None:
    """Dates, times of day and telephone numbers: text, whatever an algebra makes of them."""
    pair = [_unmarked(text) for text in (gold, claim)]
    times = [TIME.fullmatch(text) for text in pair]
    if any(times):
        return all(times) and len({_time(found) for found in times if found}) == 1
    if any(DATE.fullmatch(text) for text in pair):
        return _letters(pair[0]) == _letters(pair[1])
    if LABEL.fullmatch(pair[0]):
        return _tight(pair[0]) == _tight(pair[1])
    return None


def _time(found: re.Match[str]) -> tuple[int, str, str]:
    return int(found[1]), found[2], re.sub(r"[.\s]", "", found[3] or "").lower()


def _words(gold: str, claim: str, inner: Ask) -> bool | None:
    """Where either side has words, both are text: the same words in the same order."""
    if not (_wordy(gold) or _wordy(claim)):
        return None
    if not (_wordy(gold) and _wordy(claim)):
        return False
    return _letters(gold) == _letters(claim)


def _wordy(text: str) -> bool:
    """Whether there are words in a text that are no names of mathematics."""
    if re.search(r"«[^»]*[a-zA-Z]{2}", text):
        return True
    bare = re.sub(r"\\[a-zA-Z]+", " ", _unmarked(text))
    runs = re.findall(r"[^\W\d_]+", bare)
    if any(run.lower() not in FUNCTIONS and (len(run) > 2 or run.lower() in SMALL) for run in runs):
        return True
    return bool(re.fullmatch(r"[^\W\d_]{2,}", text.strip())) and text.lower() not in FUNCTIONS


def _unmarked(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[«»]", "", text)).strip()


def _letters(text: str) -> list[str]:
    words = re.findall(r"\w+|[-+=<>/^%]", _unmarked(text).casefold().replace("_", " "))
    return [word for word in words if word not in ARTICLES] or words


# Numbers


def _quantities(gold: str, claim: str, inner: Ask) -> bool | None:
    """Numbers with or without units. A side without a unit is taken to be in the other's."""
    ours, theirs = quantity(gold), quantity(claim)
    if (ours.unit, ours.scale, theirs.unit, theirs.scale) == ("", 1, "", 1):
        values = exact(gold), exact(claim)
        return None if None in values else values[0] == values[1]
    if _wordy(ours.core) or _wordy(theirs.core):
        return None
    mine, other = exact(ours.core), exact(theirs.core)
    if "%" in (ours.unit, theirs.unit) and ours.unit != theirs.unit:
        if mine is None or other is None or (ours.unit and theirs.unit):
            return False
        share, number = (mine, other) if ours.unit == "%" else (other, mine)
        return number == share / 100 or (number == share and abs(share) >= 1)
    if theirs.unit in SHORT and not ours.unit:
        return False
    sizes = converted(ours, theirs) if ours.unit and theirs.unit else (Fraction(1), Fraction(1))
    if sizes is None:
        return False
    if mine is not None and other is not None:
        return mine * ours.scale * sizes[0] == other * theirs.scale * sizes[1]
    if sizes[0] != sizes[1] or ours.scale != theirs.scale:
        return False
    return inner(ours.core, theirs.core)


def _numbers(gold: str, claim: str) -> bool | None:
    """Numbers in a base, and ratios."""
    based = [BASED.fullmatch(text) for text in (gold, claim)]
    if any(based):
        values = [_in_base(found) for found in based if found]
        if all(based):
            return values[0] is not None and len(set(values)) == 1
        plain = claim if based[0] else gold
        return plain == next(found[1] for found in based if found)  # 555 is not 4210_5 yet
    if RATIO.fullmatch(gold):
        terms = [[exact(term) for term in text.split(":")] for text in (gold, claim)]
        if len(terms[1]) == 1 and len(terms[0]) == 2 and None not in terms[0] and terms[0][1]:
            return terms[1][0] == terms[0][0] / terms[0][1]  # type: ignore[operator]
        return _proportional(terms[0], terms[1])
    return False if RATIO.fullmatch(claim) else None


def _in_base(found: re.Match[str]) -> tuple[int, int] | None:
    base = int(found[2])
    if not 2 <= base <= 36 or any(int(digit) >= base for digit in found[1]):
        return None
    return base, int(found[1][:300], base)


def _proportional(ours: Sequence[Fraction | None], theirs: Sequence[Fraction | None]) -> bool:
    if len(ours) != len(theirs) or None in ours or None in theirs or not ours[0] or not theirs[0]:
        return False
    return all(
        a * theirs[0] == b * ours[0]  # type: ignore[operator]
        for a, b in zip(ours, theirs, strict=True)
    )


# Structures


def _parts(gold: str, claim: str, inner: Ask, ask: Ask) -> bool:
    """Matrices, sets of numbers, lists, equations; then algebra."""
    number = None if has_relation(gold + claim) else _numbers(gold, claim)
    if number is not None:
        return number
    if any(GROUPED.fullmatch(text) for text in (gold, claim)) and "," in gold and "," in claim:
        return False  # a number with thousands, and a list: equal numbers were found before
    gold, claim = (re.sub(rf"^{VARIABLE}\s*\\in\b\s*", "", text) for text in (gold, claim))
    region, other = intervals(gold), intervals(claim)
    if region and (other or "\\cup" in gold or has_relation(gold)):
        return other is not None and _all_same(region, other, inner, ordered=False)
    if other and (has_relation(claim) or "\\cup" in claim):
        return False
    if ("\\land" in gold and "\\lor" in claim) or ("\\lor" in gold and "\\land" in claim):
        return False
    gold, claim = (re.sub(r"\s*\\l(?:and|or)(?![a-z])\s*", ", ", text) for text in (gold, claim))
    ours, theirs = listed(gold), listed(claim)
    lists = len(ours[1]) > 1 or len(theirs[1]) > 1 or ours[0] or theirs[0]
    if lists or assigned(ours[1]) or assigned(theirs[1]):
        return _lists(ours, theirs, inner)
    return _equation(gold, claim, inner, ask)


def _matrices(gold: str, claim: str, inner: Ask) -> bool | None:
    """By their entries, whatever their brackets."""
    if "\\begin" not in gold + claim:
        return None
    found = [MATRIX.fullmatch(text) for text in (gold, claim)]
    if not all(found):
        return False
    rows = [[row.split("&") for row in re.split(r"\\\\", m[2]) if row.strip()] for m in found if m]
    if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
        return False
    pairs = zip(*(chain.from_iterable(entries) for entries in rows), strict=True)
    return all(inner(a.strip(), b.strip()) for a, b in pairs)


def _lists(ours: tuple[str, list[str]], theirs: tuple[str, list[str]], inner: Ask) -> bool:
    """Tuples are ordered, sets and bare lists are not. A bare list may be for either."""
    (kind, gold), (other, claim) = ours, theirs
    mine, named = assigned(gold), assigned(claim)
    letters = {name.partition("_")[0] for name in named}  # x_1 and x_2 may be roots in any order
    if mine or (named and kind != "{" and (kind or len(letters) > 1)):
        return _named(mine, named, ours, theirs, inner)
    if not kind and not other and len(gold) == 1 < len(claim):  # 17, 17 or 3/4, 0.75
        values = {exact(item) for item in claim}
        return len(values) == 1 and None not in values and _item(gold[0], claim[0], inner)
    if kind == "(":
        sides = [item.partition("=")[0].strip() for item in claim if "=" in item]
        once = len(set(sides)) == len(sides)  # x=1, x=2 are roots
        return once and other in ("(", "") and _all_same(gold, claim, inner, ordered=True)
    if kind == "[":
        return other == "[" and _all_same(gold, claim, inner, ordered=True)
    return other in ("{", "") and _all_same(gold, claim, inner, ordered=False)


def _named(
    mine: Mapping[str, str],
    named: Mapping[str, str],
    ours: tuple[str, list[str]],
    theirs: tuple[str, list[str]],
    inner: Ask,
) -> bool:
    """Values with names on one side or both. Without names they count in the order of names."""
    if mine and named and mine.keys() != named.keys():
        return False
    order = list(mine) if mine and named else in_order(mine or named)
    if order is None or (theirs if mine else ours)[0] not in ("(", "", "{" if named else ""):
        return False
    gold = [mine[name] for name in order] if mine else ours[1]
    claim = [named[name] for name in order] if named else theirs[1]
    return _all_same(gold, claim, inner, ordered=True)


def _all_same(gold: Sequence[str], claim: Sequence[str], inner: Ask, *, ordered: bool) -> bool:
    if len(gold) != len(claim) or len(gold) > MOST_PARTS or "\\ldots" in (*gold, *claim):
        return False
    left = list(claim)
    for item in gold:
        choices = left[:1] if ordered else left
        found = next((other for other in choices if _item(item, other, inner)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _item(gold: str, claim: str, inner: Ask) -> bool:
    """Two items of lists; regions by their brackets and ends."""
    if ";" not in gold + claim:
        if has_relation(gold) and variables(gold) != variables(claim):
            return False  # x > 1, y < 2
        return inner(gold, claim)
    if gold[0] + gold[-1] != claim[0] + claim[-1]:
        return False
    ends = zip(gold[1:-1].split(";"), claim[1:-1].split(";"), strict=True)
    return all(inner(a.strip(), b.strip()) for a, b in ends)


def _equation(gold: str, claim: str, inner: Ask, ask: Ask) -> bool:
    """Equations: the side of a lone variable is its name, and may be missing on one side."""
    ours, theirs = gold.split("="), claim.split("=")
    if len(ours) == len(theirs) == 2:
        if _tight(ours[0]) == _tight(theirs[0]):
            return inner(ours[1].strip(), theirs[1].strip())
        if all(re.fullmatch(VARIABLE, side[0].strip()) for side in (ours, theirs)):
            return False
    elif len(ours) == 2 and len(theirs) == 1 and re.fullmatch(VARIABLE, ours[0].strip()):
        return inner(ours[1].strip(), claim)
    elif len(ours) == 1 and len(theirs) > 1:
        named = re.fullmatch(VARIABLE, theirs[0].strip())
        values = {exact(side.strip()) for side in (theirs if not named else theirs[1:])}
        if (len(values) == 1 and None not in values) or (named and len(theirs) == 2):
            return inner(gold, theirs[-1].strip())
        return False
    elif len(ours) != len(theirs):
        return False
    return _algebra(gold, claim, ask)


def _algebra(gold: str, claim: str, ask: Ask) -> bool:
    """What math-verify is asked: expressions of the same variables, no decimal for a root.

    It overlooks relations, primes and what a number is modulo, and joins "1 2" to 12.
    """
    gold, claim = _grouped(gold), _grouped(claim)
    if _signs(gold) != _signs(claim) or APART.search(f"{gold};{claim}"):
        return False
    if misread(gold) or misread(claim):
        return False
    if variables(gold) != variables(claim) or "\\ldots" in gold + claim:
        return False
    values = exact(gold), exact(claim)
    if (values[0] is None) != (values[1] is None):
        number = gold if values[0] is not None else claim
        if "." in number or not re.search(r"\\[a-z]|[a-z^(]", gold + claim):
            return False
    return ask(gold, claim)


def _signs(text: str) -> list[str]:
    found = re.findall(r"(?<=\\)[a-zA-Z]+|[<>']", text)
    return sorted(TURNED.get(sign, sign) for sign in found if sign in SIGNS or sign in "<>'")
