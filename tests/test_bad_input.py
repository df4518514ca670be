"""Bad prompts, pairs and folders: refused in words, and before any weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict
from pandas import Series
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from bad_inputs import CASES, PAGE, Case, make_models, message, row, write_case
from conftest import EOS, read, rows, tiny_model, tiny_tokenizer
from topd import TOPDConfig, TOPDTrainer
from topd.cli import app
from topd.errors import TOPDError
from topd.inputs.models.vocabulary import check_tokenizers

PAGE_ROWS = PAGE.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """The models that the cases name."""
    root = tmp_path_factory.mktemp("models")
    make_models(root)
    return root


@pytest.fixture
def recipe(tmp_path, folders, monkeypatch) -> Callable[..., Path]:
    """Write a recipe on the tiny models, beside which we then stand."""
    monkeypatch.chdir(tmp_path)

    def recipe(data: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
        case = Case("", "", "", "", "", changes=changes, data=data)
        return write_case(case, tmp_path, folders)

    return recipe


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.part}: {case.given}")
def test_bad_input_is_refused_with_fault_place_and_remedy_and_the_page_says_so(
    case, tmp_path, folders
):
    said = message(case, tmp_path, folders)
    for part in (case.fault, case.place, case.remedy):
        assert part in said
    assert row(case, said) in PAGE_ROWS


def test_the_page_has_these_cases_and_no_others():
    assert sum(line.startswith("| ") for line in PAGE_ROWS) == len(CASES) + len(
        {case.part for case in CASES}
    )


@pytest.fixture
def run(recipe, tmp_path) -> Callable[..., list[dict[str, float]]]:
    """The logs of a run through the command line."""

    def run(**changes: Any) -> list[dict[str, float]]:
        result = CliRunner().invoke(app, ["train", str(recipe(**changes))])
        assert result.exit_code == 0, result.output
        return read(tmp_path / "run" / "metrics.jsonl")

    return run


# What no recipe can say, and what is accepted


def test_dropping_long_prompts_keeps_the_others(recipe, tmp_path):
    lines = [{"prompt": "so " * 9}, {"prompt": "what"}, {"prompt": "so " * 9}]
    path = recipe(lines, max_prompt_length=5, drop_long_prompts=True)
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exit_code == 0, result.output
    assert {line["prompt"] for line in read(tmp_path / "run" / "rollouts.jsonl")} == {1}
    shown = result.output.replace("run folder", "").replace(str(tmp_path), "")
    assert "2" in [word for line in shown.splitlines() if "prompt" in line for word in line.split()]


COLUMNS = {"prompt": ["what is 1 + 2 ?"], "solution": ["so the answer is 3 ."]}
ROWS = Dataset.from_list(rows(2))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train_dataset": COLUMNS}, r"train_dataset: is a mapping of columns \(prompt, solution"),
        ({"train_dataset": rows(1)[0]}, "train_dataset: is a mapping of columns"),
        ({"eval_dataset": ROWS[:1]}, r"eval_dataset: .*select\(range\(8\)\)"),
        ({"eval_dataset": {"sums": COLUMNS}}, "eval_dataset 'sums': is a mapping of columns"),
        ({"eval_dataset": {"sums": None}}, "eval_dataset 'sums': None has no rows. Give a list"),
        ({"train_dataset": 8}, r"train_dataset: 8 has no rows\. Give a list"),
        (
            {"train_dataset": Series(COLUMNS["prompt"])},
            "data row 0: must be a mapping .* not a str",
        ),
        ({"train_dataset": {"what is 1 + 2 ?"}}, "data row 0: must be a mapping .* not a str"),
        (
            {"train_dataset": pandas.DataFrame([["q", "r"]], columns=["prompt", "prompt"])},
            "data: the column 'prompt' is there twice",
        ),
        (
            {"train_dataset": DatasetDict(train=ROWS, test=ROWS)},
            r"train_dataset: has splits train, test\. Choose one",
        ),
        ({"train_dataset": ROWS.to_iterable_dataset()}, r"streaming is not supported\. Load it"),
    ],
)
def test_what_python_may_take_for_rows_is_refused(tmp_path, data, said):
    args = TOPDConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TOPDError, match=said):
        TOPDTrainer(
            tiny_model(), tiny_model(), args, processing_class=tiny_tokenizer(),
            **{"train_dataset": rows(2), **data},
        )  # fmt: skip


def test_a_column_of_texts_is_taken_as_prompts(tmp_path):
    args = TOPDConfig(output_dir=str(tmp_path), use_cpu=True, max_completion_length=8)
    column = Dataset.from_dict(COLUMNS)
    trainer = TOPDTrainer(
        tiny_model(), tiny_model(), args, column["prompt"], processing_class=tiny_tokenizer()
    )
    assert len(trainer.train_dataset) == 1


# Pairs of models


def test_one_vocabulary_with_other_merges_is_refused():
    def byte_pair(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
        letters = ["</s>", *pre_tokenizers.ByteLevel.alphabet(), "an", "ns"]
        vocabulary = {letter: i for i, letter in enumerate(sorted(letters))}
        backend = Tokenizer(models.BPE(vocabulary, list(merges)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")

    one, other = byte_pair(("a", "n"), ("n", "s")), byte_pair(("n", "s"), ("a", "n"))
    assert one.get_vocab() == other.get_vocab()
    check_tokenizers(one, byte_pair(("a", "n"), ("n", "s")))
    with pytest.raises(TOPDError, match=r"split the same text differently.*same family"):
        check_tokenizers(one, other)  # an|s|wer and a|ns|wer


@pytest.mark.parametrize(("student", "teacher"), [("student", "padded"), ("more_padded", "padded")])
def test_padded_embedding_rows_are_accepted_and_never_sampled(run, tmp_path, student, teacher):
    assert run(student=student, teacher=teacher)[0]["loss"] > 0
    rollouts = read(tmp_path / "run" / "rollouts.jsonl")
    assert all(0 <= token < 80 for line in rollouts for token in line["response_ids"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"model": torch.compile(tiny_model())},
            r"model: OptimizedModule is no source\. Give a path, ",
        ),
        ({"teacher_model": ["a", "b"]}, r"teacher_model: list is no source\. Give a path, "),
        ({"peft_config": {"r": 4}}, r"peft_config: a dict is not supported\. Give a peft\.LoraCon"),
    ],
)
def test_what_is_no_model_and_no_adapter_is_refused(tmp_path, given, said):
    args = TOPDConfig(output_dir=str(tmp_path), use_cpu=True, max_completion_length=8)
    whole = {"model": tiny_model(), "teacher_model": tiny_model(seed=1), "args": args, **given}
    with pytest.raises(TOPDError, match=said):
        TOPDTrainer(**whole, train_dataset=rows(2), processing_class=tiny_tokenizer())


def test_the_student_as_its_own_teacher_is_refused(tmp_path):
    args = TOPDConfig(output_dir=str(tmp_path), use_cpu=True, max_completion_length=8)
    model = tiny_model()
    with pytest.raises(TOPDError, match=r"is the student itself, or has .*\. Use copy\.deep"):
        TOPDTrainer(model, model, args, rows(2), processing_class=tiny_tokenizer())


def test_a_model_in_memory_that_names_no_tokenizer_needs_one(tmp_path):
    args = TOPDConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TOPDError, match=r"processing_class: .* where its tokenizer is\. Give it"):
        TOPDTrainer(tiny_model(), tiny_model(), args, rows(2))


# What can only be seen in the run


def test_a_teacher_that_gives_nan_ends_the_run_with_exit_code_2(recipe):
    result = CliRunner().invoke(app, ["train", str(recipe(teacher="nan")), "--quiet"])
    assert result.exit_code == 2
    assert "teacher: NaN log-prob at rollout 0" in " ".join(result.stderr.split())


def test_answers_that_never_end_are_cut_and_learned_from(run, tmp_path):
    log = run(student="endless", max_steps=2)[0]
    assert log["completions/clipped_ratio"] == 1
    assert torch.isfinite(torch.tensor([log["loss"], log["grad_norm"]])).all()
    rollouts = read(tmp_path / "run" / "rollouts.jsonl")
    assert {(len(line["response_ids"]), line["finished"]) for line in rollouts} == {(8, False)}
    assert all(EOS not in line["response_ids"] for line in rollouts)


@pytest.mark.parametrize("method", ["topd", "downweight"])
def test_a_run_without_any_candidate_learns_the_token_loss_alone(run, method):
    log = run(candidate_threshold=1e9, method=method)[0]
    assert (log["topd/candidates"], log["topd/real_divergent_points"]) == (0, 0)
    assert log["loss"] == pytest.approx(log["reverse_kl"])
