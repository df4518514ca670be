"""Files that say what they should not: a clear error, in bounded time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_model, tiny_tokenizer, write_pair
from topd.commands.train import run_recipe
from topd.errors import TOPDError
from topd.inputs.models import as_spec
from topd.inputs.prompts import PromptEncoder
from topd.inputs.rows import DataSpec

Change = Callable[[dict[str, Any]], Any]
SPLIT = {"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": False}
TOKENIZERS: dict[str, Change] = {  # of tokenizer.json
    "no model": lambda file: file.pop("model"),
    "a model of no type": lambda file: file["model"].update(type="Nothing"),
    "a pattern that does not end": lambda file: file.update(pre_tokenizer=SPLIT),
    "no vocabulary": lambda file: file["model"].update(vocab=[1, 2]),
}
SETTINGS: dict[str, Change] = {  # of tokenizer_config.json
    "an end that is a number": lambda file: file.update(eos_token=3),
    "an end that is a mapping": lambda file: file.update(eos_token={"content": 5}),
    "a length that is a word": lambda file: file.update(model_max_length="many"),
    "a side that is none": lambda file: file.update(padding_side="middle"),
}
WHOLE = {"cut off": b'{"model": {"vo', "empty": b"", "null": b"null", "binary": bytes(range(256)),
         "deep": b"[" * 100_000 + b"]" * 100_000}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def changed(folder: Path, to: Path, name: str, change: Change | bytes) -> str:
    """A copy of a model's folder with one file changed."""
    to.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    if isinstance(change, bytes):
        (to / name).write_bytes(change)
        return str(to)
    content = json.loads((to / name).read_text())
    change(content)
    (to / name).write_text(json.dumps(content))
    return str(to)


@pytest.mark.parametrize("kind", [*TOKENIZERS, *SETTINGS, *WHOLE])
def test_a_broken_tokenizer_is_named(model, tmp_path, kind):
    change = {**TOKENIZERS, **SETTINGS, **WHOLE}[kind]
    name = "tokenizer_config.json" if kind in SETTINGS else "tokenizer.json"
    folder = changed(model, tmp_path / "broken", name, change)
    with pytest.raises(TOPDError, match=r"model .*broken: its tokenizer cannot be (loaded|used)"):
        as_spec(folder).load_tokenizer()


CONFIGS: dict[str, Change] = {  # of config.json
    "a pad token that is not there": lambda file: file.update(pad_token_id=99_999),
    "other layers than it lists": lambda file: file.update(num_hidden_layers=9),
    "a width that is a word": lambda file: file.update(hidden_size="wide"),
    "no heads to divide by": lambda file: file.update(num_key_value_heads=0),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_broken_configuration_is_named(model, tmp_path, kind):
    folder = changed(model, tmp_path / "broken", "config.json", CONFIGS[kind])
    with pytest.raises(TOPDError, match=r"model .*broken: its \w+ cannot be loaded"):
        as_spec(folder).load_model()
    with pytest.raises(TOPDError, match=r"model .*broken: its \w+ cannot be loaded"):
        run_recipe(write_pair(tmp_path, student=folder, max_completion_length=6))


@pytest.mark.parametrize("row", [{"prompt": "so zebra"}, {"prompt": "so", "solution": "zebra"}])
def test_a_word_that_a_tokenizer_has_no_token_for_is_named_by_its_row(model, tmp_path, row):
    def closed(file: dict[str, Any]) -> None:
        file["model"]["unk_token"] = "<no such token>"

    folder = changed(model, tmp_path / "closed", "tokenizer.json", closed)
    tokenizer = as_spec(folder).load_tokenizer()
    rows = [{"prompt": "so", "solution": "so"}, row]
    with pytest.raises(TOPDError, match=r"data row 1: the tokenizer cannot read it.*Missing \[UNK"):
        PromptEncoder(tokenizer, tokenizer).encode(rows, with_response="solution" in row)


@pytest.mark.parametrize("row", [{"prompt": "so \ud83d"}, {"prompt": "so", "solution": "\ud83d"}])
def test_half_a_character_is_named_by_its_row(tmp_path, row):
    """Escaped in JSON, where a text was cut in the middle of a sign."""
    path, tokenizer = tmp_path / "x.jsonl", tiny_tokenizer()
    path.write_text('{"prompt": "so", "solution": "so"}\n' + json.dumps(row))
    loaded = DataSpec(path=str(path), chat=False).load()
    with pytest.raises(TOPDError, match="data row 1: the tokenizer cannot read it"):
        PromptEncoder(tokenizer, tokenizer).encode(loaded, with_response="solution" in row)


ROWS = {
    "a quote that does not end": (".csv", 'prompt,solution\n"3 + 4,7\n', "unexpected end of data"),
    "a value too many": (".csv", "prompt,solution\n3,7,8\n", "line 2 has more values"),
    "a value too few": (".tsv", "prompt\tsolution\n3\t7\n3\n", "line 3 has fewer values"),
    "a key twice": (".jsonl", '{"prompt": "3", "prompt": "4"}\n', "a key is there twice"),
    "a key twice in a list": (
        ".json",
        '[\n{"prompt": "3", "prompt": "4"}\n]',
        "key is there twice",
    ),
    "a column twice": (".csv", "prompt,prompt\n3,4\n", "its first line has a name twice"),
    "a key twice inside": (".jsonl", '{"prompt": "3", "m": {"a": 1, "a": 2}}\n', "there twice"),
    "6,000 digits": (".jsonl", '{"prompt": "3", "n": ' + "9" * 6000 + "}\n", "4300 digits"),
    "200,000 lists": (".jsonl", '{"m": ' + "[" * 200_000 + "]" * 200_000 + "}\n", "recursion"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_that_say_two_things_or_too_much_are_refused(tmp_path, kind):
    suffix, text, said = ROWS[kind]
    path = tmp_path / f"rows{suffix}"
    path.write_text(text)
    with pytest.raises(TOPDError, match=said):
        DataSpec(path=str(path)).load()
