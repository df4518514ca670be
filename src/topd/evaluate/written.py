"""Answers as they are written: one spelling for LaTeX, Unicode and plain text. Pure functions.

Text from ``\\text{}`` and its kin is kept apart in guillemets, ``5\\text{ m}`` as ``5 «m»``, so
that a unit is not taken for a variable.
"""

# ruff: noqa: RUF001, SIM905 - the characters are the subject; words in a string

from __future__ import annotations

import re

ALIKE = str.maketrans(  # \u2011 is a hyphen that breaks no line, which gpt-oss writes for a minus
    "−‒–‐\u2011﹣－⋅∙✕✖⨯∗⁄∕∶", "-------··×××*//:"
)
CHARACTERS = {
    **{ord(a): b for a, b in zip("０１２３４５６７８９", "0123456789", strict=True)},
    **{ord(a): f"\\frac{{{b[0]}}}{{{b[1]}}}" for a, b in
       zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞",
           "12 13 23 14 34 15 25 35 45 16 56 18 38 58 78".split(), strict=True)},
    **{ord(a): rf" \{b} " for a, b in
       zip("√π∞∪∩×·÷≤≥≠±θαβφ∈≈∣",
           "sqrt pi infty cup cap times cdot div le ge ne pm theta alpha beta phi in approx mid"
           .split(), strict=True)},
    ord("°"): "°", ord("％"): "%", ord("＝"): "=", ord("，"): ",", ord("（"): "(", ord("）"): ")",
}  # fmt: skip
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
GROUPS = re.compile(  # of thousands, as written where a comma or a stop is no decimal mark
    r"(?<![\d.,'’_])\d{1,3}(?:(?:['’]\d{3})+|(?:_\d{3})+|(?:\.\d{3}){2,})(?![\d.'’_])"
)
NESTED = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"  # braces three deep
TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|hbox|operatorname|boldsymbol)"
    rf"\s*{NESTED}"
)
BOXED = re.compile(rf"\\f?box(?:ed)?\s*{NESTED}")
SWITCH = re.compile(  # fonts and sizes
    r"\\(?:bf|rm|it|sf|(?:display|text|script)style|small|[lL]arge|LARGE|[hH]uge|left|right|limits"
    r"|[bB]igg?[lr]?)(?![A-Za-z])\s?"
)
SPACE = re.compile(
    r"(?<!\\)\\(?:[,;:> ]|(?:q?quad|enspace|(?:thin|med|thick|nobreak)?space|hfill)(?![A-Za-z])"
    r"|[hm](?:space|skip)\*?\{[^{}]*\})|~"
)
ARGUMENT = re.compile(  # as sympy writes it; math-verify reads on, \\sin{(1)}/2 as the sine of 1/2
    r"(\\(?:sin|cos|tan|cot|sec|csc|log|ln|exp)(?:[_^](?:\w|\{-?\w+\}))?)\s*\{(\([^(){}]*\))\}"
)
BREAK = re.compile(r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|mm|cm|em|ex|in)\s*\]")  # and space after it
DOTS = re.compile(r"\.{3,}|…|\\[lc]?dots[a-z]?(?![A-Za-z])")
COUNTED = re.compile(r"([-+]?[$€£¥]?\d[\d.,]*)\s+((?!am\b|pm\b)[a-z]+(?: [a-z]+)?)")
DEGREES = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)|\s*\\degrees?\b|\s*°")
RELATIONS = {"leqslant": "le", "leq": "le", "geqslant": "ge", "geq": "ge", "neq": "ne"}
PREFIX = re.compile(
    r"^«?\s*(?:the\s+)?(?:final\s+)?answer\s*(?:is\b|:|=)\s*|^(?:\\approx|approximately|about)\s+"
    r"|^\\(?:approx|sim|equiv)\s*(?=[-$\d.])",
    re.I,
)
_ONES = "one two three four five six seven eight nine".split()
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NAMES = {
    "zero": 0,
    **{word: i for i, word in enumerate([*_ONES, *_TEENS], 1)},
    **{word: 10 * i for i, word in enumerate(_TENS, 2)},
}
LARGE = {
    "dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9,
}  # fmt: skip
_SMALL = rf"(?:(?:{'|'.join(_TENS)})(?:[-\s](?:{'|'.join(_ONES)}))?|{'|'.join(NAMES)})"
_LARGE = rf"(?:{'|'.join(LARGE)})"
NAMED = re.compile(rf"\b(?:{'|'.join([*NAMES, *LARGE])})(?:s|th|fold)?\b", re.I)
SIGNED = re.compile(r"(?<!\d )\b(?:minus|negative)\s+(?=[$€£¥\d]|$)", re.I)
SPELLED = re.compile(
    rf"\b(?!(?:one|two|three)\s+quarters?\b)"
    rf"(?:{_SMALL}|an?(?=\s+{_LARGE}))\b(?:[-\s]+{_LARGE}\b(?:,?\s+(?:and\s+)?{_SMALL}\b)?)*"
    rf"(?![-\w]|,?\s+(?:and\s+)?(?:{_SMALL}|{_LARGE})\b)",
    re.I,
)


def plain(answer: str) -> str:
    """An answer in one spelling, without delimiters, styles, and a final stop.

    >>> plain("\\\\$32,\\\\!348."), plain("\\\\left(\\\\tfrac12,\\\\; 3\\\\right)"), plain("x²")
    ('$32348', '(\\\\frac{1}{2}, 3)', 'x^{2}')
    """
    text = re.sub(
        "[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: "^{" + m.group().translate(SUPERSCRIPTS) + "}", answer
    )
    text = DOTS.sub(r"\\ldots ", BREAK.sub(r"\\\\", text))
    text = text.translate(ALIKE).translate(CHARACTERS).replace("**", " ")
    text = _without_delimiters(text.strip(" _\t\n"))
    text = re.sub(r"\\tag\*?\s*\{[^{}]*\}|\\!(?!\s*\d)", "", text)
    text = re.sub(r"\{,\}|,\s*\\!\s*(?=\d)|\\!", "", text)
    text = SPACE.sub(" ", SWITCH.sub("", text))
    for _ in range(3):  # nested boxes and styles
        text = BOXED.sub(r"\1", text)
        text = TEXT.sub(_marked, text)
    text = re.sub(r"\^\s*(?:\\prime\b|\{\s*\\prime\s*\})", "'", text)
    text = text.replace("\\%", "%").replace("\\pounds", "£").replace("\\euro", "€")
    text = DEGREES.sub("°", text)
    text = re.sub(
        r"\\(leqslant|leq|geqslant|geq|neq)(?![A-Za-z])",
        lambda m: "\\" + RELATIONS[m.group(1)],
        re.sub(r"\\not\s*=", r"\\ne ", text),
    )
    text = text.replace("\\lt", "<").replace("\\gt", ">").replace("<=", "\\le ").replace(
        ">=", "\\ge "
    )  # fmt: skip
    text = PREFIX.sub("", _fractions(ARGUMENT.sub(r"\1\2", text)).strip())
    text = GROUPS.sub(lambda found: re.sub(r"\D", "", found.group()), text)
    if text.count("«") != text.count("»"):
        text = re.sub("[«»]", "", text)
    return re.sub(r"\s+", " ", text).strip(" \n*").rstrip(".,;").strip()


def typed(text: str) -> str:
    """Text with one minus, blank and sign of a kind, and no blanks between groups of thousands."""
    text = re.sub(r"(?<=\d)[\u00a0\u2007\u2009\u202f](?=\d{3}(?!\d))", "", text)
    text = re.sub(r"[^\S\n]", " ", text.translate(ALIKE))
    return SIGNED.sub("-", text)


def spelled(text: str) -> str | None:
    """Text with digits for numbers in words, if it begins with one or has only one; else None.

    >>> spelled("minus twenty-five degrees"), spelled("one would need more")
    ('-25 degrees', None)
    """
    found = list(SPELLED.finditer(text))
    begins = bool(found) and not SIGNED.sub("", text[: found[0].start()]).strip(" *")
    if not (begins or len(found) == 1) or NAMED.search(SPELLED.sub("", text)):
        return None
    if found[0].group().lower() == "one" and not (
        begins and re.fullmatch(r"(?:\s+(?!of\b)[a-z]+)?[\s*.]*", text[found[0].end() :])
    ):
        return None  # a pronoun
    text = SPELLED.sub(lambda number: str(_value(number.group().lower())), text)
    return SIGNED.sub("-", text)


def _value(words: str) -> int:
    """Of a number in words: ``two thousand and five``."""
    total, current = 0, 0
    for word in re.findall(r"[a-z]+", words):
        if word in NAMES:
            current += NAMES[word]
        elif word in LARGE:
            current = max(current, 1) * LARGE[word]
            if LARGE[word] >= 1000:
                total, current = total + current, 0
    return total + current


def _without_delimiters(text: str) -> str:
    """Without those of formulas. A dollar that opens no formula is money."""
    text = text.replace("\\$", "\x01")
    if text.count("$") % 2:
        text = re.sub(r"\$(?=\s*\d)", "\x01", text, count=1)
    return re.sub(r"\$|\\[()\[\]]", " ", text).replace("\x01", "$")


def _marked(found: re.Match[str]) -> str:
    """Text in guillemets if it has letters; a formula in a font is a formula, as is one letter."""
    inside = found.group(1)
    if not re.search("[a-zA-Z]", inside) or re.search(r"\\[a-z]", inside):  # \mathbf{\frac12}
        return inside
    words = inside.strip()
    if re.fullmatch(r"[a-zA-Z]", words) and found.group().startswith((r"\math", r"\op", r"\bold")):
        return inside
    counted = COUNTED.fullmatch(words)  # a number with what it counts
    if counted:
        return f" {counted[1]} «{counted[2]}»"
    return f" «{words}»"


def _fractions(text: str) -> str:
    """``\\frac12`` and ``\\sqrt2`` with their braces. √12 is the root of 12."""
    text = re.sub(r"\\[dtc](frac|binom)(?![^\W\d])", r"\\\1", text)
    text = re.sub(r"\\frac\s*(\w)", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\w)", r"\1{\2}", text)
    text = re.sub(r"\\frac\s*(\{[^{}]*\})\s*(\{)", r"\\frac\1\2", text)
    text = re.sub(r"\\sqrt\s*(\d+(?:\.\d+)?|\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s*(\\frac\s*\{[^{}]*\}\s*\{[^{}]*\})", r"\\sqrt{\1}", text)
    return re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
