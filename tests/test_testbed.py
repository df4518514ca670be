"""The testbed: right and wrong reasoning, labels, weights, detectors."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from bench.labelled import auc, label_rollouts, observer_of, precision_recall, table
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from typer import Typer
from typer.testing import CliRunner

from topd import TOPDConfig, TOPDTrainer
from topd.engines.hf import HFEngine
from topd.errors import TOPDError
from topd.inputs.models import ModelSpec
from topd.methods import METHODS, first_fork
from topd.testbed import (
    END,
    FAMILIES,
    family_of,
    guesses,
    labels,
    models,
    problems,
    rows_of,
    verify,
    write,
)
from topd.testbed import __main__ as testbed
from topd.testbed.arithmetic import value
from topd.testbed.logic import solution
from topd.testbed.models import tokenizer_of
from topd.testbed.programs import run
from topd.testbed.world import STUDENT, TEACHER, Author
from topd.types import Evidence, Guidance, Prompt, Sampling

every_family = pytest.mark.parametrize("name", FAMILIES)
NAMES = {"F": "forced", "S": "surface", "K": "fork", "D": "derailed"}


@every_family
def test_right_reasoning_has_no_fork_and_solves_the_problem(name):
    family, rng = FAMILIES[name], random.Random(0)
    for prompt in problems(name, "test", 60):
        text = write(family, prompt, replace(STUDENT, mistakes=0.0), rng)
        found = labels(family, prompt, [*text.split(), END])
        assert family.check(prompt, text)
        assert set(found) == {"forced", "surface"}
        assert set(f"{prompt} {text}".split()) <= set(family.vocabulary)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "guesses"])
def test_a_mistake_is_one_fork_with_nothing_but_derailment_behind(name):
    """Every wrong text that the misled author writes has exactly one fork."""
    family, rng = FAMILIES[name], random.Random(1)
    wrong = 0
    for prompt in problems(name, "test", 60):
        text = write(family, prompt, STUDENT, rng)
        found = labels(family, prompt, [*text.split(), END])
        if family.check(prompt, text) and "fork" not in found:
            continue
        wrong += 1
        place = found.index("fork")
        assert set(found[:place]) <= {"forced", "surface"}
        assert set(found[place + 1 :]) <= {"derailed"}
    assert wrong >= 10


@every_family
def test_habits_change_words_and_never_the_answer(name):
    family = FAMILIES[name]
    one, other = Author((1.0, 0.0, 0.0)), Author((0.0, 0.0, 1.0))
    sure = replace(TEACHER, mistakes=0.0)
    differ = 0
    for prompt in problems(name, "test", 30):
        texts = [write(family, prompt, author, random.Random(0)) for author in (sure, one)]
        assert all(family.check(prompt, text) for text in texts)
        try:
            differ += texts[1] != write(family, prompt, other, random.Random(0))
        except ValueError:  # a choice with fewer than three forms
            differ += 1
    assert differ >= 25


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("3 + 4 * 2 =", "plan * + ;", "FFFF"),  # no other order is allowed
        ("3 + 4 * 2 =", "plan + * ;", "FKDD"),
        ("3 + 4 =", "plan + ; so 4 + 3 is 7 . total 7", "FFFSSFFSFFSF"),
        ("3 + 4 =", "plan + ; so 4 + 3 is 8 . total 8", "FFFSSFFSKDDD"),
    ],
)
def test_labels_by_hand(prompt, response, expected):
    found = labels(FAMILIES["arithmetic"], prompt, response.split())
    assert found == [NAMES[letter] for letter in expected]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("try 4 * 3 = 2 + 4 = 6 - 6 = 0 ok ; answer 4", "SSFFSFFFSFFFSFSFSF"),
        ("say 8 * 3 = 4 + 4 is 8 - 6 = 2 no ; back 6 - 4 = 2 / 3 gives 4 ; answer 4",
         "SSFFSFFFSFFFSFFFSFFFSFFFSFFSF"),
        ("try 8 * 3 = 4 + 4 = 8 - 6 = 0 ok ; answer 8", "SSFFSFFFSFFFSKDDDD"),  # as wanted
        ("try 8 * 3 = 4 + 4 = 8 - 6 = 2 ok ; answer 8", "SSFFSFFFSFFFSFKDDD"),
        ("try 4 * 3 = 2 + 4 = 6 - 6 = 0 no ; back 6", "SSFFSFFFSFFFSFKDDD"),
    ],
)  # fmt: skip
def test_a_wrong_guess_is_no_fork_and_a_verdict_that_is_not_true_is_one(response, expected):
    found = labels(FAMILIES["guesses"], "* 3 + 4 : 6 =", response.split())
    assert found == [NAMES[letter] for letter in expected]


def test_a_guess_that_is_put_right_is_written_and_not_learned_and_the_teacher_is_told(monkeypatch):
    """What is masked beside the prompt is the wrong guesses, each one, and no more."""
    monkeypatch.setitem(models.AUTHORS, "teacher", replace(TEACHER, mistakes=0.0, slips=0.5))
    family, tokenizer = FAMILIES["guesses"], tokenizer_of(FAMILIES["guesses"])
    wrong = 0
    for row in models._texts(family, "teacher", 40, 0, tokenizer):
        ids, learned = row["input_ids"], row["labels"]
        prompt, _, text = tokenizer.decode(ids).partition(" =")
        told, number, *said = text.split()
        assert (told, number) == ("told", guesses.answer(f"{prompt} ="))
        head = len(tokenizer(prompt)["input_ids"]) + 3
        masked = [k for k in range(head, len(ids)) if learned[k] == -100]
        assert masked == [head + 1] * ("no" in said)
        wrong += len(masked)
        assert all(learned[k] in (i, -100) for k, i in enumerate(ids))
        assert family.check(f"{prompt} =", " ".join(said[:-1]))
        assert said[-1] == END
    assert wrong >= 10


@given(
    st.lists(
        st.tuples(st.sampled_from("+-"), st.integers(0, 9))
        | st.tuples(st.sampled_from("*/"), st.sampled_from([3, 7, 9])),
        min_size=1,
    ),
    st.integers(0, 9),
)
def test_the_answer_to_a_chain_is_the_one_digit_that_gives_what_is_wanted(sums, wanted):
    """By trying all ten; x / d is the y with y * d = x."""

    def after(value):
        for operator, digit in sums:
            if operator == "/":
                (value,) = (y for y in range(10) if y * digit % 10 == value)
            else:
                value = eval(f"{value} {operator} {digit}") % 10
        return value

    chain = " ".join(f"{operator} {digit}" for operator, digit in sums)
    right = guesses.answer(f"{chain} : {wanted} =")
    assert [str(x) for x in range(10) if after(x) == wanted] == [right]
    assert guesses.answer(f"{right} {chain} =") == str(wanted)


def test_another_program_that_gives_the_same_has_no_fork():
    """x + x + 3 in a form that the family does not list."""
    family = FAMILIES["programs"]
    response = "a = 3 + x ; b = a + x ; return b"
    assert family.check("double then add 3 :", response)
    assert "fork" not in labels(family, "double then add 3 :", [*response.split(), END])
    wrong = "a = 3 + x ; b = a + a ; return b"
    assert labels(family, "double then add 3 :", wrong.split()).count("fork") == 1


@settings(max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=5), st.data())
def test_arithmetic_is_that_of_python_modulo_ten(digits, data):
    operators = [data.draw(st.sampled_from("+-*")) for _ in digits[1:]]
    words = [str(digits[0])]
    for operator, digit in zip(operators, digits[1:], strict=True):
        words += [operator, str(digit)]
    expression = " ".join(words)
    assert value(f"{expression} =") == str(eval(expression) % 10)


@pytest.mark.parametrize(
    ("program", "x", "expected"),
    [
        ("return x", 5, 5),
        ("a = x if x < 3 else 3 ; return a", 5, 3),
        ("a = 3 if x > 3 else x ; out a", 2, 2),
        ("a = x * x ; b = a - 1 ; give b", -4, 15),
        ("a = q ; return a", 1, None),
        ("return b", 1, None),
        ("a = x + 1 ; return", 1, None),
        ("import os ; return x", 1, None),
        ("a = __import__('os') ; return a", 1, None),
        ("", 1, None),
        ("a = x + 10 ; return a", 1, None),
    ],
)
def test_programs_run_in_their_own_grammar_alone(program, x, expected):
    assert run(program, x) == expected


def test_puzzles_are_those_of_reasoning_gym():
    """The only case that fits is the package's own solution."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    from topd.testbed.logic import _prompt

    options = {"n_people": 3, "depth_constraint": 2, "width_constraint": 2}
    for puzzle in reasoning_gym.create_dataset("knights_knaves", size=40, seed=3, **options):
        found = puzzle["metadata"]
        expected = tuple("K" if knight else "N" for knight in found["solution"])
        assert solution(_prompt(found["statements"])) == expected


@every_family
def test_no_test_problem_is_trained_on(name):
    assert not set(problems(name, "test", 100)) & set(problems(name, "train", 300))
    assert problems(name, "train", 50) == problems(name, "train", 300)[:50]
    row = rows_of(f"testbed://{name}", "train", 1)[0]
    assert verify(f"testbed://{name}")(row["solution"], row)


@pytest.mark.parametrize("place", ["testbed://algebra", "testbed://logic", "testbed://logic/dean"])
def test_what_the_testbed_has_not_is_refused(place):
    with pytest.raises(TOPDError, match="testbed"):
        _ = ModelSpec(path=place).place


def greedy_accuracy(name: str, model: PreTrainedModel, count: int, tell: bool = False) -> float:
    tokenizer, prompts = tokenizer_of(FAMILIES[name]), problems(name, "test", count)
    told = [f"{p} told {guesses.answer(p)}" for p in prompts] if tell else prompts
    ids = [tuple(tokenizer(prompt)["input_ids"]) for prompt in told]
    written = HFEngine(model, eos_ids=[1]).generate(ids, Sampling(0.0, 1.0, 0, 160), range(count))
    texts = [tokenizer.decode(list(w.tokens), skip_special_tokens=True) for w in written]
    return sum(map(FAMILIES[name].check, prompts, texts)) / count


@every_family
def test_the_teachers_are_as_good_as_stated_and_the_students_are_not(name):
    teacher, student = (
        ModelSpec(path=f"testbed://{name}/{role}").load_model() for role in ("teacher", "student")
    )
    assert greedy_accuracy(name, teacher, 100, tell=name == "guesses") >= 0.95
    assert greedy_accuracy(name, student, 100) <= 0.5
    assert family_of(f"testbed://{name}/teacher") is FAMILIES[name]


def test_the_teacher_of_guesses_never_guesses_wrong_and_puts_wrong_guesses_right():
    """So its answers show no way back, and yet it knows the way from another's guess."""
    family, tokenizer = FAMILIES["guesses"], tokenizer_of(FAMILIES["guesses"])
    engine = HFEngine(ModelSpec(path="testbed://guesses/teacher").load_model(), eos_ids=[1])
    prompts = problems("guesses", "test", 60)
    told = [f"{p} told {guesses.answer(p)}" for p in prompts]
    tried = [
        f"{text} try {(int(text[-1]) + k % 9 + 1) % 10}" for k, text in enumerate(told)
    ]  # never the answer
    heads = [tuple(tokenizer(text)["input_ids"]) for text in (*told, *tried)]
    found = engine.generate(heads, Sampling(0.6, 0.95, 0, 48), range(len(heads)))
    texts = [tokenizer.decode(list(w.tokens), skip_special_tokens=True) for w in found]
    assert sum("no" in text.split() for text in texts[:60]) <= 3
    assert sum(map(family.check, prompts, texts[60:])) >= 0.9 * 60


# A method whose guidance is broken does worse


def shuffled(evidence: Evidence) -> tuple[Guidance, ...]:
    """``first_fork`` with every rollout's window in the place of the next one's."""
    guidance = first_fork(evidence)
    branches = [guide.branches for guide in guidance]
    rotated = [*branches[1:], branches[0]]
    return tuple(
        replace(
            g, branches=tuple(replace(b, start=min(b.start, len(g.weights) - 1)) for b in found)
        )
        for g, found in zip(guidance, rotated, strict=True)
    )


def test_guidance_shuffled_between_windows_does_worse(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "shuffled", METHODS["first_fork"]._replace(guide=shuffled))
    accuracy = {}
    for method in ("first_fork", "shuffled"):
        args = TOPDConfig(
            output_dir=str(tmp_path / method), method=method, max_steps=30, use_cpu=True,
            per_device_train_batch_size=32, max_completion_length=48, learning_rate=5e-4,
            window_length=24, candidate_fraction=0.2, candidate_threshold=1.0,
            candidate_loss="surprise", false_alarm_share=0.0, look_ahead_until=None,
            trajectory_weight=2.0, save_strategy="no", log_rollouts=False, disable_tqdm=True,
        )  # fmt: skip
        models = [ModelSpec(path=f"testbed://programs/{r}") for r in ("student", "teacher")]
        rows = rows_of("testbed://programs", "train", 960)
        trainer = TOPDTrainer(*models, args, rows)
        trainer.train()
        accuracy[method] = greedy_accuracy("programs", trainer.model, 300)
    assert accuracy["first_fork"] >= accuracy["shuffled"] + 0.05


# Detectors


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=20))
def test_auc_is_the_share_of_pairs_in_order(tokens):
    scores = np.array([float(score) for score, _ in tokens])
    positive = np.array([fork for _, fork in tokens])
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    found = auc(scores, positive)
    assert np.isnan(found) if not pairs else found == pytest.approx(np.mean(pairs))


def test_precision_and_recall_by_hand():
    scores, fork = np.array([5.0, 4.0, 3.0, 2.0]), np.array([True, False, False, True])
    assert precision_recall(scores, fork, 1) == (1.0, 0.5)
    assert precision_recall(scores, fork, 3) == (1 / 3, 0.5)
    assert [precision_recall(scores, fork, n)[1] for n in range(5)] == [0, 0.5, 0.5, 0.5, 1.0]


def test_every_detector_scores_every_token_before_the_fork():
    family = FAMILIES["programs"]
    tokenizer = tokenizer_of(family)
    engines = [
        HFEngine(ModelSpec(path=f"testbed://programs/{role}").load_model(), eos_ids=[1])
        for role in ("student", "teacher")
    ]
    texts = problems("programs", "test", 24)
    prompts = [
        Prompt(i, ids, ids)
        for i, ids in enumerate(tuple(tokenizer(text)["input_ids"]) for text in texts)
    ]
    observer = observer_of(*engines, window_length=8, max_tokens=48, seed=0)
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    found = label_rollouts(family, observer, prompts, texts, words)
    assert found.fork.sum() >= 8
    assert all(len(scores) == len(found.fork) for scores in found.scores.values())
    assert all(a <= b for a, b in pairwise(found.rollout))
    assert [found.fork[found.rollout == r].sum() <= 1 for r in range(24)] == [True] * 24
    figures = table(found, resamples=20)["all tokens"]["detectors"]
    assert figures["token loss"]["auc"]["mean"] > 0.8  # a teacher that knows the way
    assert set(figures) >= {
        "surprise",
        "teacher NLL",
        "entropy",
        "full KL",
        "teachability",
        "OT, contextual",
    }
    assert torch.isfinite(torch.tensor(np.stack(list(found.scores.values())))).all()
    observer = observer_of(*engines, window_length=24, max_tokens=48, seed=0)
    found, score = label_rollouts(family, observer, prompts, texts, words), observer.score

    def with_rubbish(rollouts, *rest, **options):
        scores = score(rollouts, *rest, **options)
        for states, rollout in zip(scores.hidden, rollouts, strict=True):
            states[len(rollout.response) :] = 7.0
        return scores

    observer.score = with_rubbish  # after the end of a rollout, where windows reach it too
    again = label_rollouts(family, observer, prompts, texts, words)
    for name, scores in found.scores.items():
        np.testing.assert_array_equal(again.scores[name], scores, name)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["sums", "teacher"], "'sums' is not one of arithmetic, programs, logic, guesses"),
        (["arithmetic/x", "teacher"], "'arithmetic/x' is not one of"),
        (["arithmetic", "pupil"], "'pupil' is not one of 'teacher', 'student'"),
    ],
)
def test_a_model_that_the_testbed_lacks_is_refused_in_words(monkeypatch, words, fault):
    monkeypatch.setattr(testbed, "make", lambda *_: pytest.fail("a model was made"))
    command = Typer()
    command.command()(testbed.main)
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 2
    assert fault in " ".join(result.stderr.replace("│", " ").split())
