"""Is the answer right? A response's final answer against the reference of its row.

A verifier is any callable ``(response text, row) -> bool``. The one here knows the formats of
GSM8K, MATH-500, AIME and HMMT. Numbers and equal strings are compared here; all else goes to
math-verify (:mod:`topd.evaluate.judge`). Model text is untrusted: all here is linear in its length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, TypeAlias

from topd.errors import TOPDError
from topd.evaluate.judge import Judge

Verify: TypeAlias = Callable[[str, Mapping[str, Any]], bool]

LONGEST = 1000  # characters; what is longer is no final answer
MARK = "####"
NUMBER = r"(?:(?<![\w)])[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
MARKED = re.compile(rf"{MARK}\s*\$?({NUMBER})")
STATED = re.compile(r"answer(?: is|:|\*\*:|:\*\*)[ :]*([^\n]*)", re.IGNORECASE)
SPACING = re.compile(r"\\[!,;: ]|\\(?:left|right)(?![a-zA-Z])|\{,\}|[\s$]")
WORDS = re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}")


@dataclass(frozen=True)
class Claim:
    """What a response gives as its answer; ``boxed`` says that it is LaTeX from a box."""

    text: str
    boxed: bool = False


@dataclass(frozen=True)
class AnswerVerifier:
    """Checks a response against the reference in ``column`` of its row.

    The reference is a bare answer, or a worked solution that ends in ``#### 42`` or holds a
    ``\\boxed{}``. The response's answer is what stands in its last ``\\boxed{}``, or else behind
    its last "answer is" or "answer:". Only for a reference with ``####`` (GSM8K, whose prompts ask
    for no form) a number after ``####`` counts too and, failing all, the last number of the text.

    A comparison that does not end in time is a wrong answer, with a warning in the log.
    """

    column: str = "answer"
    judge: Judge = field(default_factory=Judge)

    def __call__(self, response: str, row: Mapping[str, Any]) -> bool:
        """Whether the response is right. Raises TOPDError if math-verify is not installed."""
        written = str(row[self.column])
        gold = reference_answer(written)
        claim = final_answer(response, numeric=MARK in written)
        if claim is None or len(claim.text) > LONGEST:
            return False
        ours, theirs = plain(gold), plain(claim.text)
        if ours == theirs:
            return True
        if number(ours) is not None and number(theirs) is not None:
            return number(ours) == number(theirs)
        asked = f"\\boxed{{{claim.text}}}" if claim.boxed else claim.text
        return self.judge.equal(f"\\boxed{{{gold}}}", asked)

    def check(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Make sure that every row has a reference. Raises TOPDError, which names the row."""
        for i, row in enumerate(rows):
            written = row.get(self.column)
            if written is None or not reference_answer(str(written)):
                raise TOPDError(
                    f"data row {i}: no reference answer in column {self.column!r}. Fill it in, "
                    "or map another column."
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
    boxed = last_boxed(text)
    if boxed is not None:
        return Claim(boxed, boxed=True)
    marked = MARKED.findall(text) if numeric else []
    if marked:
        return Claim(marked[-1])
    stated = [found.strip(" *") for found in STATED.findall(text)]
    said = re.split(r"\.(?:\s|$)", stated[-1])[0].strip(" *") if stated else ""
    if not numeric:
        return Claim(said) if said else None
    numbers = re.findall(NUMBER, said) or re.findall(NUMBER, text)
    return Claim(numbers[-1]) if numbers else None


def last_boxed(text: str) -> str | None:
    """The content of the last ``\\boxed{}`` or ``\\fbox{}``; None without one, or if it is cut off.

    >>> last_boxed("\\\\boxed{1} or \\\\boxed{\\\\sqrt{2}}")
    '\\\\sqrt{2}'
    """
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for found in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(found.group(), 0)
        if depth == 0:
            return text[start : start + found.start()]
    return None


def plain(answer: str) -> str:
    """An answer without spacing, dollars, final stop and other ways to write the same.

    >>> plain("\\\\$32,\\\\!348."), plain("\\\\text{(C)}"), plain("\\\\dfrac12")
    ('32,348', 'C', '\\\\frac12')
    """
    answer = WORDS.sub(r"\1", answer.strip()).replace("\\$", "")
    answer = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", answer)
    answer = SPACING.sub("", answer).rstrip(".")
    choice = re.fullmatch(r"\(([A-Z])\)", answer)
    return choice.group(1) if choice else answer


def number(text: str) -> Decimal | None:
    """The value of a decimal number, thousands separated or not; None for anything else.

    >>> number("1,080") == number("1080.00")
    True
    """
    if len(text) > LONGEST or not re.fullmatch(NUMBER, text):
        return None
    return Decimal(text.replace(",", ""))
