"""The exact value of a written number: integers, decimals, fractions, powers, factorials.

Rationals are compared as rationals: 2/3 is not 0.6667, 10^-20 not 10^-21, 100! not 100! + 1. What
is not rational, or would take long, has no value here. Text is untrusted: sizes are bounded.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

BITS = 100_000  # of any number on the way
DEEP = 40
SPACED = r"\d{1,3}(?: \d{3})+(?! ?\d)(?:\.\d+)?|"  # 1 234 567
UNSPACED = r"\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
NUMBER = f"(?:{SPACED}{UNSPACED})"
TOKEN = re.compile(
    rf"\s*(?:({NUMBER}(?:[eE][-+]?\d{{1,4}}(?!\w))?)|(\\[a-zA-Z]+)|([-+*/^!(){{}}]))"
)
REPEATING = re.compile(r"([-+]?)\s*(\d*)\.(\d{0,30})\\overline\{(\d{1,30})\}")
POINT = re.compile(r"\(\s*-?\d{1,3}(?:,\d{3})+\s*\)")  # (1,234), no number with thousands
MIXED = re.compile(r"([-+]?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)")
TIMES = ("\\cdot", "\\times", "*")
OVER = ("\\div", "/")


class NotExactError(ValueError):
    """No rational number, or one too large."""


def exact(text: str) -> Fraction | None:
    """The value of a text in the spelling of :func:`topd.evaluate.written.plain`; None without one.

    >>> exact("1,080"), exact("3\\\\frac{1}{2}"), exact("10^{-2}"), exact("x + 1")
    (Fraction(1080, 1), Fraction(7, 2), Fraction(1, 100), None)
    """
    if POINT.fullmatch(text):
        return None
    mixed = MIXED.fullmatch(text)
    if mixed:
        sign, whole, over, under = mixed.groups()
        text = f"{sign}{whole}\\frac{{{over}}}{{{under}}}"
    again = REPEATING.fullmatch(text)
    if again:
        sign, whole, once, period = again.groups()
        nines = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(once)
        value = Fraction(int(whole + once or "0"), 10 ** len(once)) + nines
        return -value if sign == "-" else value
    try:
        return _Reader(text).value()
    except (NotExactError, ZeroDivisionError, OverflowError):
        return None


class _Reader:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        place = 0
        while place < len(text.rstrip()):
            found = TOKEN.match(text, place)
            if found is None or len(self.tokens) > 500:
                raise NotExactError
            self.tokens.append(found.group().strip())
            place = found.end()
        self.place, self.depth = 0, 0

    def value(self) -> Fraction:
        found = self.sum()
        if self.place < len(self.tokens):
            raise NotExactError
        return found

    @property
    def next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, *tokens: str) -> str:
        if self.next not in tokens:
            return ""
        self.place += 1
        return self.tokens[self.place - 1]

    def sum(self) -> Fraction:
        self.depth += 1
        if self.depth > DEEP:
            raise NotExactError
        found = self.product()
        while sign := self.take("+", "-"):
            other = self.product()
            found = _bounded(found + other if sign == "+" else found - other)
        self.depth -= 1
        return found

    def product(self) -> Fraction:
        sign = -1 if self.take("+", "-") == "-" else 1
        found = self.power()
        while self.next:
            if self.take(*TIMES):
                found = _bounded(found * self.factor())
            elif self.take(*OVER):
                found = _bounded(found / self.factor())
            elif self.next in ("(", "\\sqrt", "\\binom"):
                found = _bounded(found * self.power())
            else:
                break
        return sign * found

    def factor(self) -> Fraction:
        sign = -1 if self.take("-") else 1
        return sign * self.power()

    def power(self) -> Fraction:
        found = self.atom()
        while self.take("!"):
            if found.denominator != 1 or not 0 <= found <= 5000:
                raise NotExactError
            found = Fraction(math.factorial(int(found)))
        if not self.take("^"):
            return _bounded(found)
        exponent = self.group() if self.next == "{" else self.factor()
        size = max(found.numerator.bit_length(), found.denominator.bit_length())
        if exponent.denominator != 1 or size * abs(exponent) > BITS:
            raise NotExactError
        return found ** int(exponent)

    def atom(self) -> Fraction:
        token = self.next
        if token in ("(", "{"):
            return self.group()
        self.place += 1
        if token == "\\frac":
            return _bounded(self.group() / self.group())
        if token == "\\binom":
            n, k = self.group(), self.group()
            if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= 5000:
                raise NotExactError
            return Fraction(math.comb(int(n), int(k)))
        if token == "\\sqrt":
            return _root(self.group())
        if not re.match(r"[\d.]", token):
            raise NotExactError
        whole = _number(token)
        mixed = self.tokens[self.place : self.place + 7]
        if token.isdigit() and mixed[:1] == ["\\frac"] and "".join(mixed[1::3]) == "{{":
            return whole + self.atom()  # 3\frac{1}{2}
        return whole

    def group(self) -> Fraction:
        closing = {"(": ")", "{": "}"}.get(self.next)
        if closing is None:
            raise NotExactError
        self.place += 1
        found = self.sum()
        if not self.take(closing):
            raise NotExactError
        return found


def _number(token: str) -> Fraction:
    if len(token) > 4000:  # Python reads no longer ones
        raise NotExactError
    mantissa, _, exponent = re.sub(r"[ ,]", "", token).lower().partition("e")
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
        raise NotExactError
    return value


def _root(value: Fraction) -> Fraction:
    if value < 0:
        raise NotExactError
    over, under = math.isqrt(value.numerator), math.isqrt(value.denominator)
    if over * over != value.numerator or under * under != value.denominator:
        raise NotExactError
    return Fraction(over, under)
