"""Quantities, a number with what it counts: 5 cm is not 5 m, 5 thousand not 5, 20 % may be 0.2."""

# ruff: noqa: SIM905 - words in a string

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

SCALES = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "dozen": 12,
}  # fmt: skip
SHORT = frozenset("k K M B bn mn mil lakh crore".split())  # M for millions, or molar
THOUSANDS = {"k": 1000, "K": 1000, "M": 10**6}  # of money
_UNITS: dict[str, tuple[str, dict[str, str]]] = {
    # dimension: (size of each unit, spellings)
    "length": ("mm 1 cm 10 m 1000 km 1000000 inch 25.4 foot 304.8 yard 914.4 mile 1609344", {
        "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre",
        "km": "kilometer kilometre", "inch": "in inches", "foot": "ft feet", "yard": "yd",
        "mile": "mi"}),
    "time": ("second 1 minute 60 hour 3600 day 86400 week 604800", {
        "second": "s sec", "minute": "min", "hour": "h hr", "day": "", "week": ""}),
    "mass": ("g 1 kg 1000 mg 0.001", {"g": "gram", "kg": "kilogram", "mg": "milligram"}),
    "money": ("dollar 100 cent 1", {"dollar": "$ usd", "cent": "¢"}),
    "euro": ("euro 1", {"euro": "€ eur"}),
    "sterling": ("sterling 1", {"sterling": "£ gbp"}),
    "yen": ("yen 1", {"yen": "¥ jpy"}),
    "volume": ("l 1000 ml 1", {"l": "liter litre", "ml": "milliliter millilitre"}),
    "degree": ("° 1", {"°": "deg degree"}),
    "radian": ("radian 1", {"radian": "rad"}),
    "percent": ("% 1", {"%": "percent pct"}),
}  # fmt: skip
UNITS: dict[str, tuple[str, str, Fraction]] = {}  # spelling: (unit, dimension, size)
for _dimension, (_sizes, _spellings) in _UNITS.items():
    _words = _sizes.split()
    for _unit, _size in zip(_words[::2], _words[1::2], strict=True):
        for _spelling in (_unit, *_spellings.get(_unit, "").split()):
            UNITS[_spelling] = UNITS[_spelling + "s"] = (_unit, _dimension, Fraction(_size))
NEVER = frozenset(
    "or and not to than then less more least most if no about between so but from plus minus "
    "times over x is are half halves third thirds fourths fifths sixths eighths tenths "
    "hundredths thousandths millionths squared cubed factorial doubled tripled halved".split()
)
SUFFIX = re.compile(
    r"(?P<core>.*?[\d)}!])\s*(?P<unit>(?:%|°|«[^«»]*»|\^\{?-?\d\}?|/|\\cdot|·"
    r"|\\frac\s*\{\s*«[^«»]*»\s*\}\s*\{\s*«[^«»]*»(?:\^\{?\d\}?)?\s*\}"
    r"|(?<=[\s/])[A-Za-z]{3,}|(?<=[\s/])(?:cm|mm|km|kg|mg|ft|in|hr|mi|yd|ml|m|s|g|h)(?![A-Za-z]))"
    r"(?:\s*(?:%|°|«[^«»]*»|(?<=[»A-Za-z])\^\{?-?\d\}?|/"
    r"|(?<=[\s/])[A-Za-z]{1,}))*)\.?"
)
SYMBOL = re.compile(  # what has no digit at its end, with a unit that is known
    r"(?P<core>.*(?:\\pi|[A-Za-z]))\s*(?P<unit>«\s*(?:(?:square|cubic|sq)\s+)?"
    rf"(?:units?|{'|'.join(map(re.escape, UNITS))})\s*»(?:\s*\^\{{?\d\}}?)?)"
)


@dataclass(frozen=True)
class Quantity:
    """``core`` times ``scale`` of a unit: its words in one spelling, empty without one."""

    core: str
    scale: int
    unit: str

    @property
    def known(self) -> tuple[str, str, Fraction] | None:
        """(unit, dimension, size) of a simple unit in the table."""
        return UNITS.get(self.unit)


def quantity(text: str) -> Quantity:
    """The parts of a text in the spelling of :func:`topd.evaluate.written.plain`.

    >>> quantity("5 «cm»"), quantity("$18"), quantity("3 million")
    (Quantity(core='5', scale=1, unit='cm'), Quantity(core='18', scale=1, unit='dollar'), \
Quantity(core='3', scale=1000000, unit=''))
    """
    money = re.match(r"([-+]?)\s*([$€£¥])\s*", text)
    currency = UNITS[money.group(2)][0] if money else ""
    core = money.group(1) + text[money.end() :] if money else text
    found = SUFFIX.fullmatch(core) or SYMBOL.fullmatch(core)
    if found is None or found["unit"].startswith(("^", "/", "\\cdot", "·")):
        return Quantity(core, 1, currency)
    words = re.findall(r"[A-Za-z$€£¥%°¢]+|\^\{?-?\d\}?|/", found["unit"].replace("\\frac", ""))
    if "\\frac" in found["unit"] and len(words) == 2:
        words.insert(1, "/")
    words = [word.lower() if len(word) > 1 else word for word in words]
    if NEVER & set(words):
        return Quantity(text, 1, "")
    scale = 1
    for word in words:
        scale *= SCALES.get(word.removesuffix("s"), 1)
    rest = [word for word in words if word.removesuffix("s") not in SCALES and word != "of"]
    if money and rest and rest[0] in THOUSANDS:
        scale, rest = scale * THOUSANDS[rest[0]], rest[1:]
    unit = " ".join([currency] * bool(money) + [_one(word) for word in rest])
    if money and unit == f"{currency} {currency}":
        unit = currency
    return Quantity(found["core"].strip(), scale, _squared(unit))


def _one(word: str) -> str:
    """A word in one spelling: the table's, or without its plural s."""
    if word in UNITS:
        return UNITS[word][0]
    word = {"sq": "square", "per": "/"}.get(word, word)
    return re.sub(r"[{}]", "", word) if word[0] == "^" else word.removesuffix("s") or word


def _squared(unit: str) -> str:
    """``square X`` as ``X ^2``; mph and the like as they stand."""
    found = re.fullmatch(r"(square|cubic) (.+)", unit)
    return f"{found[2]} ^{2 if found[1] == 'square' else 3}" if found else unit


def converted(ours: Quantity, theirs: Quantity) -> tuple[Fraction, Fraction] | None:
    """Sizes of both units where they measure the same; None where they do not."""
    if ours.unit == theirs.unit:
        return Fraction(1), Fraction(1)
    mine, other = ours.known, theirs.known
    if mine is None or other is None or mine[1] != other[1]:
        return None
    return mine[2], other[2]
