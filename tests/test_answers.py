"""The table of answers with their right verdicts, and the parts that find and compare answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from topd.errors import TOPDError
from topd.evaluate import AnswerVerifier
from topd.evaluate.answers import final_answer, last_boxed, reference_text
from topd.evaluate.exact import exact
from topd.evaluate.units import quantity
from topd.evaluate.written import plain

PAIRS = [
    json.loads(line)
    for line in (Path(__file__).parent / "answer_pairs.jsonl").read_text("utf-8").splitlines()
]
LOST = {  # right answers that count as wrong: (reference, response)
    # the last number of a text that states nothing, as documented
    ("x\n#### 18", "So, 18 eggs.\n\nLet me know if you want 2 more examples!"),
    ("1234567", "The answer is 12,34,567."),  # India's groups; or a list of three numbers
}


@pytest.fixture(scope="module")
def verdicts() -> Iterator[list[bool]]:
    """The verdict of every pair."""
    verifier = AnswerVerifier()
    yield [verifier(pair["response"], {"answer": pair["reference"]}) for pair in PAIRS]
    verifier.judge.close()


def test_the_table_is_large_and_every_pair_has_a_source():
    assert len(PAIRS) >= 1000
    assert len({(pair["reference"], pair["response"]) for pair in PAIRS}) == len(PAIRS)
    assert all(pair["source"] for pair in PAIRS)
    assert 0.4 < sum(pair["right"] for pair in PAIRS) / len(PAIRS) < 0.7


def test_no_wrong_answer_counts(verdicts):
    accepted = [p for p, got in zip(PAIRS, verdicts, strict=True) if got and not p["right"]]
    assert accepted == []


def test_right_answers_count_but_for_those_that_are_listed(verdicts):
    lost = {
        (pair["reference"], pair["response"])
        for pair, got in zip(PAIRS, verdicts, strict=True)
        if pair["right"] and not got
    }
    assert lost == LOST
    assert len(LOST) <= 0.05 * sum(pair["right"] for pair in PAIRS)


# Where the answer is


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed {7}", "7"), (r"\boxed 7", "7"), (r"\boxed{3} and \boxed{5}", "3, 5"),
        (r"\boxed{3}. Then \boxed{5}", "5"), (r"\boxed{5} but \boxed{", None), (r"\boxed", None),
    ],
)  # fmt: skip
def test_boxes(text, found):
    assert last_boxed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is:\n\n$$42$$\n", "42"), ("**Final Answer:**\n42", "42"),
        ("<answer> 7 </answer>", "7"), (r"<think>\boxed{5}</think> The answer is 7.", "7"),
        (r"[THINK]\boxed{5}[/THINK]The answer is 7.", "7"), (r"[THINK]\boxed{5}", None),
        (r"<|channel|>analysis\boxed{5}", None), (r"<|channel|>analysis no<|channel|>final", None),
        (r"<|channel|>analysis\boxed{5}assistant<|channel|>finalThe answer is 7.", "7"),
        (r"<think>\boxed{5}", None), ("the answer is 7 because 7 > 6", "7"),
    ],
)  # fmt: skip
def test_stated_answers(text, found):
    claim = final_answer(text)
    assert (claim and claim.text) == found


# Numbers


def test_exact_values():
    assert exact("1,080.50") == Fraction(2161, 2)
    assert exact(r"-\frac{1}{2}") == exact("-0.5") == Fraction(-1, 2)
    assert exact(r"3\frac{1}{2}") == exact("3 1/2") == Fraction(7, 2)
    assert exact(r"2\frac{1}{2}(3)") == Fraction(15, 2)
    assert exact("-3^2") == -9
    assert exact("2^{3!}") == 64
    assert exact(r"\sqrt{\frac{9}{4}}\cdot\binom{4}{2}") == 9
    assert exact("100!") + 1 == exact("100!+1")
    assert exact("6.02e3") == exact(r"6.02 \times 10^{3}") == 6020


@pytest.mark.parametrize(
    "text",
    ["x", "", "1,23", "2.5.5", "1..2", "1/0", "10^{10^{10}}", "99999!", "(" * 900, "9" * 5000,
     r"\sqrt{2}", "0^{-1}", "1e99999", r"\frac{1}", "5 6", "2^{1/2}"],
)  # fmt: skip
def test_what_has_no_exact_value(text):
    assert exact(text) is None


def test_quantities():
    assert quantity("5 «cm»^2").unit == quantity("5 «square centimeters»").unit
    assert quantity("$5").unit == quantity("5 dollars").unit == "dollar"
    assert quantity("2xy").unit == ""
    assert quantity("5 or 7").unit == ""
    assert (quantity("3 million").scale, quantity("2 «dozen» «eggs»").scale) == (10**6, 12)


def test_one_spelling():
    assert plain("½") == plain(r"\dfrac12") == plain(r"\frac 12") == r"\frac{1}{2}"
    assert plain("\u22125") == plain("\u20135") == "-5"
    assert plain(r"90^\circ") == plain(r"90^{\circ}") == plain(r"90\degree") == "90°"
    assert plain(r"10,\!080") == plain("10{,}080") == "10080"


# References


@pytest.mark.parametrize(
    ("value", "text"),
    [("2024-02-29", "2024-02-29"), (12, "12"), (10**30, "1" + "0" * 30), (0.00001, "0.00001"),
     (2.5e-05, "0.000025"), (5.0, "5"), (2.5, "2.5"), (Decimal("1E-7"), "1E-7"), (True, "True"),
     (["2"], "2"), (np.float64(2.5), "2.5"), (np.int64(12), "12")],
)  # fmt: skip
def test_references_are_read_exactly(value, text):
    assert reference_text(value) == text


@pytest.mark.parametrize(
    "value",
    [datetime(2024, 2, 29), date(2024, 2, 29), ["2", "3"], [], {"value": 2}, 1e22, float("nan")],
)
def test_references_whose_writing_is_lost_are_refused_by_row(value):
    with pytest.raises(TOPDError, match=r"row 1, column 'answer': the reference is .*as text"):
        AnswerVerifier().check([{"answer": "0"}, {"answer": value}])
