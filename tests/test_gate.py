"""The release gate: figures worked by hand, verdicts, and models made worse on purpose."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from conftest import EOS, WORDS, load, read, rows, tiny_model, tiny_tokenizer
from report_folders import lines
from topd.cli import app
from topd.commands.gate import (
    MEASURES,
    Limits,
    RefusalSpec,
    Suite,
    compare_models,
    lost_problems,
    passed,
    read_suite,
)
from topd.commands.gate.text import card_text, remarks, show
from topd.engines.hf import HFEngine
from topd.errors import TOPDError
from topd.evaluate import Evaluation, Response, summarise
from topd.evaluate.spec import EvaluationSpec
from topd.report.kinds.evaluated import gate_tables, gate_words
from topd.runs.files import write_whole
from topd.runs.model_card import replace_section
from topd.types import Generation


def answers(
    right: list[bool], *, samples: int = 1, ids: tuple[int, ...] = (1, 2), **changes: Any
) -> Evaluation:
    """One greedy response and samples a problem, all alike."""
    return summarise(
        [
            Response(i, sample, ids, "", ok, **{"finished": True, "logprob": -1.0, **changes})
            for i, ok in enumerate(right)
            for sample in (None, *range(samples))
        ]
    )


def suite(**changes: Any) -> Suite:
    return Suite(problems=EvaluationSpec(path="x.jsonl"), **changes)


def verdicts(base: Evaluation, candidate: Evaluation, **changes: Any) -> dict[str, str]:
    pair = {"problems": base}, {"problems": candidate}
    return {f.name: f.verdict for f in compare_models(*pair, suite(**changes))}


# Figures


def test_figures_are_means_by_problem_and_larger_is_worse():
    found = summarise(
        [
            Response(0, None, (1, 2), "", True, True, math.log(0.25)),
            Response(0, 0, (1, 2, 3, 4), "", False, True),
            Response(1, None, (7,) * 6, "", False, False, math.log(0.5) * 6),
            Response(1, 0, (1, 2), "", True, True),
        ]
    )
    values = {name: measure(found) for name, measure in MEASURES.items()}
    assert values["accuracy"] == [0, 1]
    assert values["sampled_accuracy"] == [1, 0]
    assert values["length"] == [3, 4]
    assert values["truncated"] == [0, 0.5]
    assert values["repetition"] == pytest.approx([0, (2 / 3) / 2])  # 7777 three times, once new
    assert values["calibration"] == pytest.approx([(0.5 - 1) ** 2, 0.5**2])
    assert values["refusals"] == [0.5, 0.5]


def test_harm_and_its_interval_are_paired():
    """A base right on every second problem, and a candidate right on the same: no harm at all."""
    half = [i % 2 == 0 for i in range(40)]
    figures = compare_models({"problems": answers(half)}, {"problems": answers(half)}, suite())
    for f in figures:  # 40 equal pairs leave room for what was not seen, and not only at 0
        reach = 1 - (0.05 / 6) ** (1 / 40)
        assert f.harm.mean == 0
        assert (f.harm.low, f.harm.high) == pytest.approx((-reach, reach))
    other = [i % 2 == 1 for i in range(40)]
    figures = compare_models({"problems": answers(half)}, {"problems": answers(other)}, suite())
    assert figures[0].harm.mean == 0
    assert figures[0].harm.low < -0.3 < 0.3 < figures[0].harm.high


def test_the_error_is_shared_by_the_figures():
    pair = {"problems": answers([True] * 10)}, {"problems": answers([False] * 10)}
    assert {f.harm.level for f in compare_models(*pair, suite())} == {1 - 2 * 0.05 / 6}
    one = Limits(**dict.fromkeys(set(Limits.model_fields) - {"length"}))
    assert [f.harm.level for f in compare_models(*pair, suite(limits=one))] == [0.9]


def test_length_is_relative_to_the_base():
    base, longer = answers([True] * 40), answers([True] * 40, ids=(1, 2, 3))
    (figure,) = (
        f
        for f in compare_models({"problems": base}, {"problems": longer}, suite())
        if f.name == "length"
    )
    assert (figure.base, figure.candidate, figure.harm.mean) == (2, 3, 0.5)
    assert figure.verdict == "worse"


def test_models_with_other_tokens_are_compared_by_characters(place):
    """A text is not longer for being in twice as many tokens."""
    responses = answers([True] * 40), answers([True] * 40, ids=(1, 2, 3, 4))
    pair = [
        {"problems": summarise([replace(r, text="so 3") for r in found.responses])}
        for found in responses
    ]
    figures = compare_models(*pair, suite(), same_tokens=False)
    (figure,) = (f for f in figures if f.name == "length")
    assert (figure.base, figure.candidate, figure.harm.mean) == (4, 4, 0)
    assert any("the length is in characters" in remark for remark in remarks(figures))
    tiny_tokenizer([*WORDS[:5], *WORDS[:4:-1]]).save_pretrained("other")
    assert "the length is in characters" in " ".join(gate("base", "other").output.split())
    (figure,) = (f for f in load(Path("out/gate.json"))["figures"] if f["name"] == "length")
    texts = [len(one["text"]) for one in read(Path("out/base_problems.jsonl"))]
    assert (figure["unit"], figure["base"]) == ("characters", pytest.approx(fmean(texts)))
    (value,) = (row[1] for row in gate_tables(Path("out"))[0].rows if row[0] == "length")
    assert value.endswith(" characters")


def test_rows_with_one_prompt_are_one_problem():
    """Row 2 repeats row 0: its values are averaged with that row's before the interval."""
    base, candidate = (
        summarise(
            [
                Response(i, sample, (1,) * n, "", ok, True, -1.0 * n, 0 if i == 2 else None)
                for i, (ok, n) in enumerate(given)
                for sample in (None, 0)
            ]
        )
        for given in ([(True, 2), (True, 2), (True, 4)], [(False, 2), (True, 2), (True, 4)])
    )
    assert (base.problems, base.rows) == (2, 3)
    values = {name: measure(candidate) for name, measure in MEASURES.items()}
    assert (values["accuracy"], values["length"], values["truncated"]) == ([0.5, 0], [3, 2], [0, 0])
    p = math.exp(-1)
    assert values["calibration"] == pytest.approx([(p**2 + (p - 1) ** 2) / 2, (p - 1) ** 2])
    figures = compare_models({"problems": base}, {"problems": candidate}, suite())
    assert (figures[0].harm.mean, figures[0].harm.problems) == (0.25, 2)
    assert lost_problems(base, candidate) == [0]


def test_models_that_read_rows_apart_or_alike_are_refused(place):
    """The base does not know the words that tell two prompts apart."""
    asked = [{"prompt": f"what is {word}", "answer": "3"} for word in ("one", "two")]
    lines(place / "problems.jsonl", asked)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] | replace('two', 'one') }}"
    tokenizer.save_pretrained("base")
    result = gate("base", "same")
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "suite.problems: row 1 has the prompt of an earlier row for one model and not" in said


# Refusals


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I can't help with that.", True),
        ("I can\u2019t help with that.", True),
        ("I\u2019M SORRY, but no.", True),
        ("Here you are.", False),
        ("<think>I can't say? I can.</think> Here you are.", False),
        ("I can't say? I can.</think> Here you are.", False),
        ("<think>Fine.</think> I won\u02bct.", True),
        ("[THINK]I can't say? I can.[/THINK] Here you are.", False),
        ("<|channel|>analysis<|message|>I can't?<|channel|>final<|message|>Here it is.", False),
    ],
)
@pytest.mark.parametrize("phrases", [{}, {"phrases": ("can\u2019t", "sorry", "won\u2018t")}])
def test_a_refusal_is_said_and_not_thought_whatever_the_apostrophe(text, refuses, phrases):
    judged = RefusalSpec(path="x", **phrases)._as_it_should
    assert judged(text, {"refuse": refuses})
    assert not judged(text, {"refuse": not refuses})


def test_a_response_that_never_stops_thinking_neither_refuses_nor_answers():
    judged = RefusalSpec(path="x")._as_it_should
    for text in ("<think>I can't", "[THINK]I can't", "<|channel|>analysis<|message|>I can't"):
        assert not any(judged(text, {"refuse": refuse}) for refuse in (True, False))


def test_refusals_may_be_messages_and_a_part_of_them(tmp_path):
    asked = [{"role": "user", "content": "what is two ?"}]
    path = tmp_path / "asked.jsonl"
    lines(path, [{"messages": asked, "refuse": i == 0} for i in range(3)])
    spec = RefusalSpec(path=str(path), split="train[1:]")
    found = spec.load()
    assert [row["refuse"] for row in found] == [False, False]
    evaluator = spec.evaluator(found, tiny_tokenizer(), tiny_model().config)
    wanted = tiny_tokenizer().apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert list(evaluator.prompts[0].student) == list(wanted)
    lines(path, [{"question": "what", "refuse": True}])
    found = RefusalSpec(path=str(path)).load()
    with pytest.raises(TOPDError, match="row 0: has neither prompt nor messages, but question"):
        spec.evaluator(found, tiny_tokenizer(), tiny_model().config)


# Verdicts


def test_each_figure_can_fail_alone():
    good = answers([True] * 300)
    assert set(verdicts(good, good).values()) == {"within"}
    bad = {
        "length": answers([True] * 300, ids=(1, 2, 3), logprob=-1.5),
        "truncated": answers([True] * 300, finished=False),
        "repetition": answers([True] * 300, ids=(7,) * 8, logprob=-4.0),
        "calibration": answers([True] * 300, logprob=-3.0),
    }
    for name, candidate in bad.items():
        found = verdicts(good, candidate, limits=Limits(length=9 if name == "repetition" else 0.25))
        assert [key for key, verdict in found.items() if verdict == "worse"] == [name]


def test_few_problems_leave_a_figure_open_and_only_a_strict_gate_fails_then():
    base, candidate = answers([True] * 20), answers([True] * 18 + [False] * 2)
    pair = {"problems": base}, {"problems": candidate}
    figures = compare_models(*pair, suite(limits=Limits(calibration=None)))
    assert {f.name: f.verdict for f in figures}["accuracy"] == "open"
    assert passed(figures, strict=False)
    assert not passed(figures, strict=True)


@pytest.mark.parametrize("problems", [10, 20, 50, 200])
def test_equal_answers_to_few_problems_do_not_pass_a_strict_gate(problems):
    """A model that is 5 points worse shows nothing of it on 10 problems with a chance of 60 %."""
    good = answers([True] * problems)
    figures = compare_models({"problems": good}, {"problems": good}, suite())
    by_name = {f.name: f for f in figures}
    assert by_name["accuracy"].verdict == "open"
    assert not passed(figures, strict=True)
    assert remarks(figures) == [
        f"open: {problems} prompts do not show whether the harm is within 2 %; that takes at least "
        "237, more where answers differ."
    ]
    enough = answers([True] * 237)
    figures = compare_models({"problems": enough}, {"problems": enough}, suite())
    assert passed(figures, strict=True)
    assert remarks(figures) == []


def test_a_brier_score_that_is_open_has_no_per_cent():
    few = answers([True] * 10)
    alone = Limits(**{**dict.fromkeys(Limits.model_fields), "calibration": 0.02})
    (said,) = remarks(compare_models({"problems": few}, {"problems": few}, suite(limits=alone)))
    assert "whether the harm is within 0.02; that takes" in said


def test_a_base_that_solves_nothing_is_named():
    nothing = answers([False] * 300)
    figures = compare_models({"problems": nothing}, {"problems": nothing}, suite())
    greedily, sampled = remarks(figures)
    assert "the base solves none of the 300 problems greedily" in greedily
    assert "in any sample: it has no sampled accuracy to lose" in sampled
    assert greedily in card_text("base", suite(), figures, [], True)


def test_the_table_is_in_per_cent_and_fits_80_columns():
    base, candidate = answers([True] * 300), answers([True] * 270 + [False] * 30)
    figures = compare_models({"problems": base}, {"problems": candidate}, suite())
    console = Console(width=80, record=True, file=StringIO())
    show(figures, suite(), False, console)
    text = console.export_text()
    line = next(line for line in text.splitlines() if "sampled accuracy" in line)
    assert re.search(r"accuracy +100\.0% +90\.0% +\+10\.0% +\+\d\.\d%, \+1\d\.\d% +2% +worse", line)
    assert max(map(len, text.splitlines())) <= 80


def test_a_better_candidate_is_within_every_limit():
    found = verdicts(answers([False] * 300), answers([True] * 300))
    assert set(found.values()) == {"within"}


def test_a_harm_is_worse_only_beyond_its_limit():
    base, candidate = answers([True] * 100), answers([True] * 70 + [False] * 30)
    for limit, verdict in ((0.1, "worse"), (0.3, "open"), (0.5, "within")):
        assert verdicts(base, candidate, limits=Limits(accuracy=limit))["accuracy"] == verdict


def test_problems_that_the_base_solves_and_the_candidate_does_not():
    base, candidate = answers([True, True, False]), answers([True, False, True])
    assert lost_problems(base, candidate) == [1]


ALONE = Limits(**dict.fromkeys(set(Limits.model_fields) - {"refusals"}))


def test_refusals_count_if_there_are_some():
    pair = [{"problems": answers([True] * 300), "refusals": answers([ok] * 300)} for ok in (1, 0)]
    figures = compare_models(*pair, suite(refusals=RefusalSpec(path="x.jsonl")))
    assert [(f.name, f.verdict) for f in figures if f.verdict != "within"] == [
        ("refusals", "worse")
    ]


def test_problems_and_refusals_are_counted_apart(tmp_path):
    pair = [{"problems": answers([True] * 6), "refusals": answers([True] * 19)}] * 2
    both = "6 problems of `x.jsonl` and 19 prompts of `r.jsonl`, same"
    for limits, said in ((Limits(), both), (ALONE, "19 prompts of `r.jsonl`, same")):
        asked = suite(refusals=RefusalSpec(path="r.jsonl"), limits=limits, error=0.005)
        figures = compare_models(*pair, asked)
        card = card_text("base", asked, figures, [], True)
        assert f"against `base` on {said}" in card
        assert "in about 0.5 % of cases at most" in card
        record = {"passed": True, "figures": [asdict(f) for f in figures]}
        write_whole(tmp_path / "gate.json", {**record, "suite": asked.model_dump()})
        first = next(iter(gate_words(tmp_path)))
        assert first.endswith(f" on {said.removesuffix(', same').replace('`', '')}.")


# The command


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Two models, ten problems, four prompts to refuse or not, and a suite."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("base", 0), ("same", 0), ("other", 1)):
        tiny_model(seed=seed).save_pretrained(name)
        tiny_tokenizer().save_pretrained(name)
    problems = [{"prompt": row["prompt"], "answer": "3"} for row in rows(10)]
    lines(tmp_path / "problems.jsonl", problems)
    asked = [{"prompt": "what is two ?", "refuse": i % 2 == 0} for i in range(4)]
    lines(tmp_path / "refusals.jsonl", asked)
    write_suite()
    return tmp_path


def write_suite(**changes: Any) -> None:
    content = {
        "problems": {"path": "problems.jsonl", "samples": 2, "max_tokens": 6},
        "refusals": {"path": "refusals.jsonl", "max_tokens": 6, "phrases": ["so"]},
        **changes,
    }
    Path("suite.yaml").write_text(yaml.safe_dump(content))


def gate(*words: str) -> Any:
    return CliRunner().invoke(app, ["gate", *words, "--suite", "suite.yaml", "--output", "out"])


def test_a_model_passes_against_itself_and_the_card_says_so(place):
    Path("same/README.md").write_text(
        "# A model\n\n## Release gate\n\nNot run.\n\n## Uses\n\nAny\n"
    )
    result = gate("base", "same")
    assert result.exit_code == 0, result.output
    assert "passed" in result.output
    found = json.loads(Path("out/gate.json").read_text())
    assert found["passed"]
    assert {f["name"]: f["harm"]["mean"] for f in found["figures"]} == dict.fromkeys(MEASURES, 0)
    assert (
        found["base"]["models"]["model"]["sha256"]
        == (found["candidate"]["models"]["model"]["sha256"])
    )
    assert len(Path("out/candidate_problems.jsonl").read_text().splitlines()) == 10 * 3
    assert len(Path("out/base_refusals.jsonl").read_text().splitlines()) == 4 * 2
    card = Path("same/README.md").read_text()
    assert card.startswith("# A model\n\n## Release gate\n\nPassed against `base` on 10 problems")
    assert "| accuracy |" in card
    assert card.endswith("\n## Uses\n\nAny\n")
    assert "Not run" not in card


def test_a_regression_ends_with_1_and_the_card_names_it(place):
    """The base ends at once, the candidate continues until it is cut off."""
    terse = tiny_model()
    terse.model.embed_tokens.weight.data[:, 0] = 1e4  # one large coordinate in every state
    terse.lm_head.weight.data[EOS, 0] = 1e3
    terse.save_pretrained("base")
    Path("other/README.md").write_text("# A model\n")
    result = gate("base", "other")
    found = json.loads(Path("out/gate.json").read_text())
    worse = [f["name"] for f in found["figures"] if f["verdict"] == "worse"]
    assert worse == ["length", "truncated"]
    assert (result.exit_code, found["passed"]) == (1, False)
    assert "FAILED" in result.output
    card = Path("other/README.md").read_text()
    assert "## Release gate\n\nFAILED against `base`" in card
    assert "- worse: length, truncated\n" in card


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"problem": {}}, r"suite.yaml: unknown key 'problem' in suite\. Did you mean problems\?"),
        ({"problems": {"path": "no.jsonl"}}, "no.jsonl"),
        ({"problems": {"path": "problems.jsonl", "sample": 2}}, r"suite\.problems\.sample"),
        ({"problems": None}, r"suite\.problems"),
        ({"limits": {"accuracy": -0.1}}, r"suite\.limits\.accuracy: .*greater than or equal to 0"),
        ({"limits": {"speed": 0.1}}, r"suite\.limits\.speed"),
        ({"error": 0.5}, r"suite\.error: .*less than 0.5"),
        ({"limits": dict.fromkeys(Limits.model_fields)}, r"suite: limits: no figure has one"),
        (
            {"limits": {**dict.fromkeys(Limits.model_fields), "refusals": 0.1}, "refusals": None},
            r"suite: limits\.refusals has no effect without refusals",
        ),
        ({"limits": {"refusals": None}}, r"suite: refusals have no effect without their limit"),
        ({"refusals": {"path": "problems.jsonl"}}, r"problems.jsonl, row 0: refuse is None"),
        (
            {"refusals": {"path": "refusals.jsonl", "columns": {"answer": "a"}}},
            r"suite\.refusals\.columns: answer has no effect",
        ),
        (
            {"refusals": {"path": "refusals.jsonl", "columns": {"prompt": "p", "solution": "s"}}},
            r"suite\.refusals\.columns: solution has no effect",
        ),
        (
            {"problems": {"path": "testbed://logic", "columns": {"prompt": "p"}}},
            r"suite\.problems\.columns: has no effect with testbed://",
        ),
        ({"refusals": {"path": "refusals.jsonl", "split": "test"}}, 'Unknown split "test"'),
    ],
)
def test_a_bad_suite_is_refused_before_a_model_loads(place, monkeypatch, changes, fault):
    def load(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded before the suite was checked")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    write_suite(**changes)
    result = gate("base", "same")
    assert result.exit_code == 2
    assert re.search(fault, " ".join(result.stderr.split())), result.stderr


def test_a_folder_with_a_result_is_refused(place):
    Path("out").mkdir()
    Path("out/gate.json").write_text("{}")
    result = gate("base", "same")
    assert (result.exit_code, "already holds gate.json" in result.stderr) == (2, True)


def test_a_gate_that_is_stopped_continues_in_its_folder(place, monkeypatch):
    """The base's 38 responses and half of the candidate's are there. A card may be unreadable."""
    Path("other/README.md").write_bytes(b"\xff")
    assert "README.md has no section of this gate" in " ".join(gate("base", "other").output.split())
    Path("out").rename("whole")
    asked, generate = list[int](), HFEngine.generate

    def stops(self: HFEngine, prompts: Any, *more: Any) -> list[Generation]:
        asked.append(len(prompts))
        if len(asked) == 7:
            raise KeyboardInterrupt
        return generate(self, prompts, *more)

    monkeypatch.setattr("topd.commands.evaluate.check_decoding", lambda _: None)
    monkeypatch.setattr(HFEngine, "generate", stops)
    result = gate("base", "other")
    assert (result.exit_code, "topd gate was stopped" in result.stderr) == (75, True)
    done = sum(asked[:6])
    assert gate("base", "other").exit_code in (0, 1)
    assert done + sum(asked[7:]) == 2 * (10 * 3 + 4 * 2)
    found, whole = (json.loads(Path(f, "gate.json").read_text()) for f in ("out", "whole"))
    assert found == whole
    names = [sorted(path.name for path in Path(f).iterdir()) for f in ("out", "whole")]
    assert names[0] == names[1]
    for name in ("base_problems.jsonl", "candidate_problems.jsonl"):
        assert Path("out", name).read_text() == Path("whole", name).read_text()


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def fail(*_: Any, **__: Any) -> None:
    raise TOPDError("not a number")


@pytest.mark.parametrize("way", [stop, fail])
@pytest.mark.parametrize("where", ["topd.commands.gate.compare_models", "RunFolder.write"])
def test_a_gate_that_is_stopped_after_its_last_response_continues(place, monkeypatch, where, way):
    """While figures are made; or the result is written, with the responses' files there."""
    assert gate("base", "other").exit_code in (0, 1)
    Path("out").rename("whole")
    monkeypatch.setattr("topd.commands.evaluate.check_decoding", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(where.replace("RunFolder", "topd.runs.folder.RunFolder"), way)
        assert gate("base", "other").exit_code == (75 if way is stop else 2)
    assert Path("out/base_problems.begun.jsonl").exists()
    assert Path("out/base_problems.jsonl").exists() == (where == "RunFolder.write")
    monkeypatch.setattr(HFEngine, "generate", stop)
    result = gate("base", "other")
    assert result.exit_code in (0, 1), result.stderr
    files = [{path.name: path.read_text() for path in Path(f).iterdir()} for f in ("out", "whole")]
    assert files[0] == files[1]


def test_a_section_is_replaced_or_added(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# A\n\nText\n")
    replace_section(card, "Gate", "one")
    assert card.read_text() == "# A\n\nText\n\n## Gate\n\none\n"
    replace_section(card, "Gate", "two")
    assert card.read_text() == "# A\n\nText\n\n## Gate\n\ntwo\n"


def test_prompts_are_written_as_the_candidate_was_trained(place):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += " {{ so }}"
    for name in ("base", "run/student"):
        tiny_model().save_pretrained(name)
        tokenizer.save_pretrained(name)
    content = {"recipe": {"data": {"path": "a"}}, "config": {"chat_template_kwargs": {"so": "so"}}}
    Path("run/run.json").write_text(json.dumps(content))
    result = gate("base", "run")
    assert result.exit_code == 0, result.output
    said = 'prompts are written as in the training of run: chat_template_kwargs: {"so": "so"}'
    assert result.output.count(said) == 1
    asked = json.loads(Path("out/gate.json").read_text())["suite"]
    for part in ("problems", "refusals"):
        assert asked[part]["chat_template_kwargs"] == {"so": "so"}


def test_a_suite_is_read_with_its_defaults(place):
    found = read_suite(Path("suite.yaml"))
    assert (found.error, found.strict, found.limits) == (0.05, False, Limits())
    assert found.refusals is not None
    assert found.refusals.phrases == ("so",)
