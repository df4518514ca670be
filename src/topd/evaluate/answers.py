"""Is the answer right? A response's final answer against the reference of its row.

A verifier is any callable ``(response text, row) -> bool``. The one here knows the formats of
GSM8K, MATH-500, AIME and HMMT. Where the answer is, is found here; how it is written and whether
it is the reference say :mod:`topd.evaluate.written` and :mod:`topd.evaluate.comparison`, and
algebra goes to math-verify (:mod:`topd.evaluate.judge`). A wrong answer that counts is worse than
a right one that does not. Model text is untrusted: all here is linear in its length.
"""

# ruff: noqa: RUF001 - signs as they are written

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Integral
from typing import Any, TypeAlias

from topd.errors import TOPDError
from topd.evaluate.comparison import same
from topd.evaluate.exact import UNSPACED, exact
from topd.evaluate.judge import Judge
from topd.evaluate.units import SCALES, UNITS, quantity
from topd.evaluate.written import NAMED, plain, spelled, typed

Verify: TypeAlias = Callable[[str, Mapping[str, Any]], bool]

LONGEST = 1000  # characters; what is longer is no final answer
SCANNED = 2 * LONGEST  # of a statement
EXACT_FLOAT = 2**53
MARK = "####"
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:(\{)|(-?[\w.]*\w))")
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_GAP = r"(?:[\s$,;]|\\[()\[\] ,;]|\\q?quad\b)*+"
BETWEEN = re.compile(rf"{_GAP}(?:and|or|&|\\text\s*\{{\s*(?:and|or)\s*\}})?{_GAP}")
STATED = re.compile(
    r"answer(?:\s+is|[ *_]*:)[ *_:]*"
    r"|(?:^|\n)[#*_ ]*(?:the )?(?:final )?answer(?: is)?[ *_:]*(?=\n)",
    re.I,
)
RUN_ON = re.compile(r"\n[ \t*#]*(?:question|problem|q)\s*\d*[ *]*:", re.I)
THINKS = re.compile(r"<think>|\[THINK\]|<\|channel\|>analysis")
THOUGHT = re.compile(r".*(?:</think>|\[/THINK\]|<\|channel\|>final(?:<\|message\|>)?)", re.S)
FILLER = re.compile(r"(?:therefore|thus|simply|just|indeed|clearly|then|now|hence|so)\b,?\s*", re.I)
CLAUSE = re.compile(r",?\s+(?:because|since|as|which|so|where|when|for|if|that)\s", re.I)
FORMULA = re.compile(
    r"(?:\\\[(.*?)\\\]|\\\((.*?)\\\)|\$\$(.*?)\$\$|\$((?:\\[^\n]|[^$\n\\])+)\$(?!\d))", re.S
)
YES_OR_NO = re.compile(r"(yes|no|true|false),\s+(?!(?:and|or|but|yes|no|true|false)\b)", re.I)
DENIED = re.compile(r"(?:not|never|neither|no longer)\b", re.I)
EITHER = re.compile(
    r"\s*([a-z%]*),?\s+or\s+(?:maybe\s+|perhaps\s+)?[-+$]*\d[\d.,]*\d?%?\s*([a-z%]*)", re.I
)
CALM = re.compile(  # what has no factorial: words, tuples, fractions
    r".*[^\d)]|[A-Za-z]\w*\s*=\s*[-+.\d]+|[(\[][^,]*,.*\)|[-+]?\\[dt]?frac\s*\d\s*\d", re.S
)
PRICE = re.compile(  # 20 $1 bills
    r"(?<=\d)\s+\\?\$[\d.]+(?=\s+(?:bills?|coins?|notes?|tickets?)\b)"
)
LEFT = (  # a number that leaves the one before it as it is
    r"\d[\d.,]*\s+(?:(?:is|are)\s+left\b|left\s+over\b|(?:are\s+)?remain)"
    r"|0+\s+(?:left|inch|second|minute|hour|day|cent)"
)
EXPLAINED = (  # a number that explains the one before it
    rf"{LEFT}|\d[\d.,]*\s+(?:(?:(?:of|for|in)\s+)?(?:each|every)\b|times\s+(?:\d|as\b|the\b))"
    r"|\d[\d.,]*%?\s+(?:[a-z]+\s+)?(?:more|less|fewer)\s+than\b|\d[\d.,]*%\s+(?:off|of\s+\d|more|less)"
)
CHANGED = re.compile(  # what makes another number of the one before it
    r"!|_\{?\d|\(\s*-?\d|['′]\s*\d|[eE][-+]?\d|(?![mgshlLCF])[A-Za-z](?![A-Za-z])"
    r"|\s*[\^√π⁰¹²³⁴-⁹⁻½⅓⅔¼¾⅕-⅞]|\s+point\s"
    r"|\s+[-+]?\d(?![\d.]*-[a-z]|\d*/\d+-[a-z]+\s[a-z]+s\b)"
    r"|\s*\\(?!text|math|mbox|approx|q?quad)[a-zA-Z]"
    rf"|\s*,(?:\s+and)?(?:\s+[A-Za-z]+:)?\s*[-+({{]*(?!{EXPLAINED})\d"
    r"|\s*(?:[-+±/*×·÷:&]|(?<=\s)(?:x|plus|minus|times|less|mod|choose|to|through"
    r"|over(?!\s+\d+\s+(?:second|minute|hour|day|week|month|year))"
    r"|(?:divided|multiplied)\s+by|(?:more|less|fewer)\s+than)(?=\s))\s*[-+({]*\d"
    r"|(?:\s+[A-Za-z]+){1,2}(?:\s*[+*×÷]|\s+(?:x|plus|minus|times|less)\s)\s*\d"
    r"|(?P<thing>\s+[A-Za-z]+)\s*-\s*\d[\d.,]*(?P=thing)\b"
    rf"|(?:\s+[A-Za-z]+){{0,2}},?\s+and\s+[-+]?(?!{LEFT})\d"
    r"|(?:\s+[A-Za-z]+){0,2},?\s+and\s+(?:an?\s+|\d\s+)?(?:half|thirds?|quarters?)\b"
    r"|\s+(?:half(?!-dollar)|halves|thirds?(?!.grade)|fourths|fifths|sixths|eighths|tenths|(?:hundred"
    r"|thousand|million)ths|squared|cubed|factorial|doubled|tripled|halved)\b"
    r"|\s*(?:lakhs?|crores?|bn|mn|mil)\b"
    r"|\s*[+×÷^]\s*[A-Za-z(]"
)
ARGUMENT = re.compile(  # what makes another number of the one after it
    r"(?:[-+±/^*×·÷√∛]|\\(?!text|math|mbox|approx|q?quad)[a-zA-Z]+\s*\{?"
    r"|(?i:\b(?:half(?:\s+of)?|(?:thirds?|quarters?|fourths?|fifths?|tenths?)\s+of|twice|double|triple"
    r"|sqrt|root\s+of|log|over|under|(?:more|less|fewer|greater)\s+than)))\s*[({]*$"
)
COMPOUND = re.compile(  # 3 hours 15 minutes
    r"\s*([a-z]+),?\s+(?!0+\s)\d[\d.,]*\s*([a-z]+)\b(?!\s+(?:more|less|fewer)\s+than\b)", re.I
)
REFUSED = re.compile(r"\b(?:can(?:no|')t|unable to) (?:answer|solve|determine)", re.I)
LETTERS = {"k": "thousand", "m": "million", "b": "billion"}
LETTER = r"([KkMB])(?![A-Za-z])"
LAST = re.compile(rf"([$€£¥])?((?:(?<![\w)])[-+])?(?:{UNSPACED}))(?(1)(?:{LETTER})?)")
FIGURE = re.compile(
    r"(?<![\w.])(\()?([-+]?\s?[$€£¥]?\s?[-+]?(?:\d|\.\d)(?:[\d.,]*\d)?(?: \d{3}(?![\d.,]*\d))*"
    rf"(?:\s?(?:[/:^*-]|\bto\b)\s?\{{?-?[\d.,]*\d\}}?)*)(\s?%)?(\))?"
    rf"(?:\s({'|'.join(SCALES)})s?\b|{LETTER})?"
)


@dataclass(frozen=True)
class Claim:
    """What a response gives as its answer; ``boxed`` says that it is LaTeX from a box."""

    text: str
    boxed: bool = False


@dataclass(frozen=True)
class AnswerVerifier:
    """Checks a response against the reference in ``column`` of its row.

    The reference is a bare answer, or a worked solution that ends in ``#### 42`` or holds a
    ``\\boxed{}``. What a response thinks before ``</think>`` (``[/THINK]``, ``<|channel|>final``)
    does not count, and one that never stops thinking has no answer. Its answer is in its last
    ``\\boxed{}``, else in ``<answer>``, else after its last "answer is" or "answer:", on that line
    or the next. Only for a reference with ``####`` (GSM8K, whose prompts ask for no form) a number
    after ``####`` counts too and, failing all, the last number of the text.

    A comparison that does not end in time is a wrong answer, with a warning in the log.
    """

    column: str = "answer"
    judge: Judge = field(default_factory=Judge)

    def __call__(self, response: str, row: Mapping[str, Any]) -> bool:
        """Whether the response is right.

        Raises TOPDError if the row has no such column, or math-verify is not installed.
        """
        if self.column not in row:
            raise TOPDError(
                f"AnswerVerifier: a row has no column {self.column!r}, but {', '.join(row)}. Name "
                "the one of the reference: AnswerVerifier(column=NAME)."
            )
        written = reference_text(row[self.column])
        gold = reference_answer(written)
        claim = final_answer(response, numeric=MARK in written)
        if claim is None or len(claim.text) > LONGEST:
            return False
        ours, theirs = plain(gold), plain(claim.text)
        if MARK in written and not claim.boxed and exact(quantity(theirs).core) is None:
            return False
        return same(ours, theirs, self._ask)

    def _ask(self, gold: str, claim: str) -> bool:
        return self.judge.equal(f"\\boxed{{{gold}}}", f"\\boxed{{{claim}}}")

    def check(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Make sure that every row has a reference that can be read exactly.

        Raises:
            TOPDError: none, or one that is a date, several values, or a number too large for its
                type; the message names the row.
        """
        for i, row in enumerate(rows):
            value = row.get(self.column)
            try:
                written = "" if value is None else reference_text(value)
            except TOPDError as error:
                raise TOPDError(f"data row {i}, column {self.column!r}: {error}") from error
            if not reference_answer(written):
                raise TOPDError(
                    f"data row {i}: no reference answer in column {self.column!r}. Fill it in, "
                    "or map another column."
                )


def reference_text(value: Any) -> str:
    """A reference as it was written. A list of one is its element.

    Raises:
        TOPDError: a value whose writing is lost, or that is not one answer.

    >>> reference_text(12), reference_text(1e-05), reference_text(["2"])
    ('12', '0.00001', '2')
    """
    if isinstance(value, list | tuple) and len(value) == 1:
        return reference_text(value[0])
    if isinstance(value, float) and abs(value) < EXACT_FLOAT:
        return format(Decimal(repr(float(value))), "f").removesuffix(".0")
    if isinstance(value, str | Integral | Decimal):
        return str(value)
    kind = "a float that is not exact" if isinstance(value, float) else f"a {type(value).__name__}"
    raise TOPDError(
        f"the reference is {kind} ({str(value)[:60]}), which does not say how the answer is "
        'written. Give one answer as text, e.g. "2024-02-29".'
    )


def reference_answer(text: str) -> str:
    """The answer in a reference: after ``####``, in the last box, or the whole of it.

    >>> reference_answer("9 * 2 = <<9*2=18>>18\\n#### 18"), reference_answer("p - q")
    ('18', 'p - q')
    """
    if MARK in text:
        return text.rpartition(MARK)[2].strip()
    boxed = last_boxed(text)
    return (text if boxed is None else boxed).strip()


def final_answer(text: str, *, numeric: bool = False) -> Claim | None:
    """What a response gives as its answer, or None. See :class:`AnswerVerifier`.

    Args:
        text: the response.
        numeric: the answer is a number, and no form was asked for.

    >>> final_answer("So it is \\\\boxed{\\\\frac{1}{2}}.")
    Claim(text='\\\\frac{1}{2}', boxed=True)
    >>> final_answer("3 boxes of 6 are 18 eggs.", numeric=True)
    Claim(text='18', boxed=False)
    """
    said = spoken(text)
    if said is None:
        return None
    text, run_on = said, RUN_ON.search(said)
    if run_on:  # a base model continues with a problem of its own
        found = _located(text[: run_on.start()], numeric)
        if found is not None:
            return found
    found = _located(text, numeric)
    if found is not None or not numeric or REFUSED.search(text):
        return found
    numbers = list(LAST.finditer(typed(text)))
    return Claim(_scaled(numbers[-1][2], None, numbers[-1][3])) if numbers else None


def spoken(text: str) -> str | None:
    """What a response says after its thoughts; None if they do not end.

    >>> spoken("<think>7?</think>8"), spoken("[THINK]7")
    ('8', None)
    """
    thought = THOUGHT.match(text)
    if thought:
        return text[thought.end() :]
    return None if THINKS.search(text) else text


def _located(text: str, numeric: bool) -> Claim | None:
    """The answer in a box, in a tag, after the mark, or stated."""
    boxed = last_boxed(text)
    if boxed is not None:
        return Claim(boxed, boxed=True)
    before, closed, _ = text.rpartition("</answer>")
    _, opened, tagged = before.rpartition("<answer>")
    if closed and opened:
        return _figure(tagged) if numeric else Claim(tagged.strip(), boxed=True)
    if numeric and MARK in text:
        marked = _figure(text.rpartition(MARK)[2].split("\n")[0])
        if marked is not None:
            return marked
    places = list(STATED.finditer(text))
    if not places:
        return None
    rest = text[places[-1].end() :]
    if numeric:
        return _figure(_statement(re.sub(r"\bfor\s+(?=(?:each|every)\b)", "", rest)))
    said = _statement(rest)
    return Claim(said) if said else None


def _statement(rest: str) -> str:
    """What is stated: a formula, or the rest of the line or of the next, up to the next clause."""
    rest = rest.lstrip(" \n\t*_:`")[:SCANNED]
    rest = FILLER.sub("", rest, count=1) if FILLER.match(rest) else rest
    formula = FORMULA.match(rest)
    if formula and not re.match(r"\s*(?:,|and|or|%|\\%)", rest[formula.end() :]):
        after = re.match(r"\s?((?:square |cubic )?[a-zA-Z]+(?:\^\d)?)?", rest[formula.end() :])
        inside = next(group for group in formula.groups() if group is not None).strip()
        unit = after[1] if after and after[1] else ""
        if unit.islower() and not CLAUSE.match(f" {unit} "):
            return rf"{inside} \text{{{unit}}}"
        return inside
    sentence = re.split(r"(?<=[.!])(?<!\\!)\s", rest.split("\n")[0])[0].rstrip(' .*_`"')
    sentence = _calm(sentence)
    yes_or_no = YES_OR_NO.match(sentence)
    return yes_or_no[1] if yes_or_no else CLAUSE.split(sentence)[0].strip(' *_`"')


def _calm(said: str) -> str:
    """Without the mark of an exclamation. That of a bare number is a factorial's, not of money."""
    if said.count("$") < 2:
        said = re.sub(r"([$€£¥]\s?\d[\d.,]*)!+", r"\1", said)
    bare = said.rstrip("!")
    return bare.rstrip() if CALM.fullmatch(bare) else said


def _figure(said: str) -> Claim | None:
    """The number of a statement: its value, the first one, or that after its last equals sign."""
    said = _calm(typed(said[:SCANNED]).strip()).replace("**", " ")
    said = re.sub(r"(?<![\d)\s])\*|(?<=\s)\*(?!\s)|\*(?!\s*[\d(])", " ", said)  # no product
    said = PRICE.sub("", said.rpartition("=")[2].strip().strip("`"))
    said = re.sub(r"\\\$|\$", "", re.sub(r"\\[()\[\]]|\{,\}|\\!", "", said))
    said = re.sub(r"(?<=\d)\s*[x×]\s*(?=\d)", r" \\times ", said)
    found = FIGURE.search(said)
    if found is None:
        counted = spelled(said)
        if counted is not None:
            return _figure(counted)
        return Claim(said) if "\\" in said or NAMED.search(said) else None
    opened, number, percent, closed, *scale = found.groups()
    if opened and closed:  # of an accountant a loss, of others not
        return Claim(f"({number})?")
    formula = not re.search(r"\d\s+\(", said) and exact(quantity(plain(said)).core) is not None
    if formula or _changed(said, found):
        return Claim(said)
    number = re.sub(r"\s", "", number) if not re.search(r"\d \d{3}", number) else number
    return Claim(_scaled(number + (percent or "").strip(), *scale))


def _changed(said: str, number: re.Match[str]) -> bool:
    """Whether what is around the number of a statement denies it or makes another one of it."""
    either = EITHER.match(said, number.end())
    if DENIED.match(said) or (either and either[1] in ("", either[2])):
        return True
    parts = COMPOUND.match(said, number.end())
    if parts and all(part.lower() in UNITS for part in parts.groups()) and parts[1] != "in":
        return parts[2] != "in" or not said[parts.end() :].strip(" .")
    before = said[: number.start()]
    signed = re.match(r"[-+]\s", number[2]) and re.search(r"\w\s*$", before)
    changed = CHANGED.match(said, number.end())
    return bool(signed or changed or ARGUMENT.search(before[-LONGEST:]))


def _scaled(number: str, word: str | None, letter: str | None) -> str:
    """A number with its scale as a word: 30K is 30 thousand."""
    scale = LETTERS[letter.lower()] if letter else word
    return f"{number} {scale}" if scale else number


def last_boxed(text: str) -> str | None:
    """The content of the last ``\\boxed{}`` or ``\\fbox{}``; None without one, or if it is cut off.

    Boxes that only a comma, "and" or "or" parts are one list, the same box twice is one answer.

    >>> last_boxed("\\\\boxed{1}, no: \\\\boxed {\\\\sqrt{2}}")
    '\\\\sqrt{2}'
    >>> last_boxed("\\\\boxed{3} and \\\\boxed 5")
    '3, 5'
    """
    found: list[str] = []
    place, ended = 0, 0
    while box := BOX.search(text, place):
        if box[1]:
            end = _brace(text, box.end())
            if end is None:
                return None
            content, after = text[box.end() : end], end + 1
        else:
            content, after = box[2], box.end()
        apart = not found or BETWEEN.fullmatch(text[ended : box.start()]) is None
        joined = not apart and re.search(r"(?<!\\)[,;&]|and|or", text[ended : box.start()])
        found = [*found, content] if joined else [content]
        place = ended = after
    return ", ".join(found if len({*found}) > 1 else found[:1]) if found else None


def _brace(text: str, start: int) -> int | None:
    """Where the brace that was opened before ``start`` closes."""
    depth = 1
    for found in BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found.group(), 0)
        if depth == 0:
            return found.start()
    return None
