"""Verified forks: values of prefixes, by hand and by the identities that hold among them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench.detectors import MARKS, outcome_table
from bench.labelled import observer_of

from conftest import write_pair
from topd.commands import probe
from topd.commands.probe import run_probe
from topd.commands.probe.outcomes import Outcome, checker_of, verify_forks
from topd.engines.hf import HFEngine
from topd.errors import TOPDError
from topd.inputs.models import ModelSpec
from topd.inputs.prompts import make_rollout
from topd.inputs.rows import DataSpec
from topd.report.page import write_report
from topd.report.rollouts import read_rollout
from topd.report.viewer import view
from topd.runs.tokens import TokenTexts
from topd.testbed import FAMILIES, problems
from topd.testbed.models import tokenizer_of
from topd.training.experience import Observer
from topd.types import Ids, Prompt, Sampling

FAMILY = FAMILIES["programs"]
TEXTS = problems("programs", "test", 6)


@pytest.fixture(scope="module")
def observer() -> Observer:
    engines = [
        HFEngine(ModelSpec(path=f"testbed://programs/{role}").load_model(), eos_ids=[1])
        for role in ("student", "teacher")
    ]
    return observer_of(*engines, window_length=8, max_tokens=48, seed=0)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    tokenizer = tokenizer_of(FAMILY)
    ids = [tuple(tokenizer(text)["input_ids"]) for text in TEXTS]
    return [Prompt(i, row, row) for i, row in enumerate(ids)]


def right(prompt: Prompt, response: Ids) -> bool:
    tokenizer = tokenizer_of(FAMILY)
    text = tokenizer.decode(list(response), skip_special_tokens=True)
    return FAMILY.check(TEXTS[prompt.index], text)


def rollouts_of(observer: Observer, prompts: list[Prompt], temperature: float):
    sampling = Sampling(temperature, max_new_tokens=48)
    seeds = list(range(len(prompts)))
    written = observer.student.generate([p.student for p in prompts], sampling, seeds)
    return [make_rollout(p, w) for p, w in zip(prompts, written, strict=True)]


@pytest.mark.parametrize("samples", [1, 3])
def test_what_the_tokens_of_a_rollout_spoil_adds_up(observer, prompts, samples) -> None:
    """The drops telescope: sum_t V(y_<t) - V(y_<=t) = V(nothing) - whether the rollout is right."""
    rollouts = rollouts_of(observer, prompts, 1.0)
    starts = [(row, t) for row, r in enumerate(rollouts) for t in range(len(r.response))]
    found = verify_forks(observer, rollouts, starts, right, samples=samples)
    by_row: dict[int, list[Outcome]] = {}
    for (row, _), outcome in zip(starts, found.outcomes, strict=True):
        by_row.setdefault(row, []).append(outcome)
    ends = [right(r.prompt, r.response) for r in rollouts]
    for row, outcomes in by_row.items():
        assert sum(o.drop for o in outcomes) == pytest.approx(outcomes[0].before - ends[row])
    assert len({*ends}) == 2  # there are both
    assert any(o.verified for o in found.outcomes)


def test_the_teachers_answer_is_its_greedy_path_and_its_tokens_are_counted(observer, prompts):
    rollouts = rollouts_of(observer, prompts, 1.0)
    starts = [(row, 3) for row in range(len(rollouts))]
    found, spent = verify_forks(observer, rollouts, starts, right), 0
    for (row, _), outcome in zip(starts, found.outcomes, strict=True):
        rollout = rollouts[row]
        values = []
        for end in (3, 4):
            prefix = rollout.response[:end]
            greedy = Sampling(0.0, max_new_tokens=48 - end)
            (more,) = observer.teacher.generate([rollout.prompt.teacher + prefix], greedy, [0])
            values.append(right(rollout.prompt, prefix + more.tokens))
            spent += len(more.tokens)
        assert (outcome.before, outcome.after) == tuple(values)
    assert found.tokens["teacher"] == spent
    assert found.tokens["student"] > 0


def test_a_greedy_student_goes_on_as_it_did_and_its_own_teacher_brings_nothing(observer, prompts):
    rollouts = rollouts_of(observer, prompts, 0.0)
    starts = [(row, t) for row, r in enumerate(rollouts) for t in range(len(r.response))]
    alone = Observer(observer.student, observer.student, observer.args)
    for outcome, (row, _) in zip(
        verify_forks(alone, rollouts, starts, right).outcomes, starts, strict=True
    ):
        own = right(rollouts[row].prompt, rollouts[row].response)
        assert outcome == Outcome(own, own, own)
        assert not outcome.verified


def test_a_rollout_without_room_is_judged_as_it_is(observer, prompts):
    rollouts = rollouts_of(observer, prompts[:1], 1.0)
    last = len(rollouts[0].response) - 1
    (outcome,) = verify_forks(observer, rollouts, [(0, last)], right).outcomes
    assert outcome.after == right(prompts[0], rollouts[0].response)


def test_the_verdict_by_hand():
    half, less = Outcome(before=0.75, after=0.25, alone=0.5), Outcome(0.75, 0.5, 0.0)
    assert (half.drop, half.gain, half.verified) == (0.5, 0.25, True)
    assert (less.drop, less.gain, less.verified) == (0.25, 0.75, False)


# In a probe: from the recipe to the page


@pytest.fixture(scope="module")
def probed(tmp_path_factory) -> Path:
    recipe = tmp_path_factory.mktemp("verified") / "probe.yaml"
    recipe.write_text(
        "student: testbed://programs/student\nteacher: testbed://programs/teacher\n"
        'data: {path: "testbed://programs", limit: 8}\nmax_completion_length: 48\n'
        "window_length: 12\ncandidate_loss: surprise\ncandidate_threshold: 1.0\nuse_cpu: true\n"
    )
    words = ["--rollouts", "8", "--bootstrap", "40", "--verify", "1"]
    return run_probe(recipe, [*words, "--output_dir", str(recipe.parent / "run")])


def test_a_thought_that_the_prompt_opens_belongs_to_what_is_verified(monkeypatch):
    asked: list[str] = []
    texts = {(1,): "Q <think>\n", (2,): "Q", (3,): r"Perhaps \boxed{5}"}

    def forks(_, rollouts, high, right, **options):
        assert [right(Prompt(i, (i,), (i,)), (3,)) for i in (1, 2)] == [True, True]

    monkeypatch.setattr(probe, "verify_forks", forks)
    pair = SimpleNamespace(
        observer=SimpleNamespace(args=probe.ProbeConfig(output_dir="unused", use_cpu=True)),
        tokenizer=SimpleNamespace(
            decode=lambda ids, **_: texts[tuple(ids)], convert_ids_to_tokens=lambda ids: []
        ),
    )
    empty = torch.zeros(0, dtype=torch.long)
    windows = SimpleNamespace(row=empty, start=empty)
    batch = probe.Batch((), empty, empty, None, (), windows, None, 0)
    probe._with_outcomes(batch, pair, lambda _, text: not asked.append(text), 0)
    assert asked == [r"<think>Perhaps \boxed{5}", r"Perhaps \boxed{5}"]


def test_a_probe_records_shows_and_counts_what_came_of_its_candidates(probed):
    lines = [json.loads(line) for line in (probed / "positions.jsonl").read_text().splitlines()]
    high = [line["outcome"] for line in lines if line["group"] == "high"]
    assert high
    assert not any("outcome" in line for line in lines if line["group"] != "high")
    summary = json.loads((probed / "probe.json").read_text())
    shares = summary["outcomes"]["right"]
    for name in ("before", "after", "alone"):
        assert shares[name]["value"] == pytest.approx(sum(o[name] for o in high) / len(high))
    forks = [o["before"] - o["after"] >= 0.5 for o in high]
    assert summary["outcomes"]["verified"]["all"]["value"] == pytest.approx(sum(forks) / len(forks))
    assert summary["cost"]["tokens"]["teacher_verifying"] > 0
    texts = TokenTexts.read(probed)
    seen = [fork for i in range(8) for fork in view(read_rollout(probed, i), texts).forks]
    facts = [name for fork in seen for name, _, _ in fork.facts]
    assert facts.count("right answers") == len(high)
    assert "right answers" in write_report(probed).read_text()


def test_a_probe_that_does_not_verify_has_no_word_of_it(tmp_path):
    recipe = write_pair(tmp_path, max_completion_length=12, window_length=4)
    folder = run_probe(
        recipe, ["--rollouts", "4", "--bootstrap", "40", "--output_dir", str(tmp_path / "run")]
    )
    assert "outcome" not in (folder / "positions.jsonl").read_text()
    assert "outcomes" not in json.loads((folder / "probe.json").read_text())


def test_data_without_answers_are_refused_before_a_model_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "what?"}\n')
    with pytest.raises(TOPDError, match="no answer to check against"):
        checker_of(DataSpec(path=str(path)))
    path.write_text('{"prompt": "what?", "answer": "3"}\n')
    check = checker_of(DataSpec(path=str(path)))
    assert check(0, "The answer is 3.")
    assert not check(0, "The answer is 4.")


def test_the_table_of_the_page_is_that_of_the_results():
    text = Path(__file__).parents[1].joinpath("docs/probe.md").read_text(encoding="utf-8")
    inner = text.partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert inner == outcome_table()
