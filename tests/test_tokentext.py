"""Tokens as text: what real tokenizers' pieces become, and how characters come together again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import tiny_tokenizer
from topd.errors import TOPDError
from topd.runs.tokens import FILE, PART, TokenTexts, TokenWriter


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges but one: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "Ġa"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentence_piece() -> PreTrainedTokenizerFast:
    """Llama-like: a block stands for a space, bytes have tokens of their own."""
    vocabulary = {"<unk>": 0, "▁a": 1, "b": 2, "a": 3, "▁": 4}
    vocabulary |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def stored(tokenizer: PreTrainedTokenizerFast, folder: Path, *sequences: list[int]) -> TokenTexts:
    records = TokenWriter(tokenizer).records(sequences)
    (folder / FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    return TokenTexts.read(folder)


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("text", [" a", "b a a", "é 東京 🙂", "a\n\tb", "<script>"])
def test_the_pieces_of_a_text_joined_are_the_text(make, text, tmp_path):
    tokenizer = make()
    ids = tokenizer("b" + text, add_special_tokens=False)["input_ids"]
    assert stored(tokenizer, tmp_path, ids).join(ids).strip() == "b" + text


def test_a_word_level_piece_has_the_space_that_its_tokenizer_joins_with(tmp_path):
    tokenizer = tiny_tokenizer()
    ids = tokenizer("what is 2", add_special_tokens=False)["input_ids"]
    assert stored(tokenizer, tmp_path, ids).texts(ids) == [" what", " is", " 2"]


def test_a_tokenizer_that_knows_few_characters_needs_no_others(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"x": 0, "=": 1}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    few = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert stored(few, tmp_path, [0, 1]).texts([0, 1]) == ["x", "="]


def test_special_tokens_keep_their_names(tmp_path):
    tokenizer = tiny_tokenizer()
    assert stored(tokenizer, tmp_path, [2]).texts([2])[0].strip() == "</s>"


def test_a_character_of_four_tokens_stands_at_the_first(tmp_path):
    tokenizer = byte_level()
    ids = tokenizer("a🙂b", add_special_tokens=False)["input_ids"]
    assert stored(tokenizer, tmp_path, ids).texts(ids) == ["a", "🙂", PART, PART, PART, "b"]


def test_a_character_that_is_cut_off_is_shown_in_hexadecimal(tmp_path):
    tokenizer = byte_level()
    ids = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    texts = stored(tokenizer, tmp_path, ids)
    assert texts.texts(ids[:2]) == ["⟨f0⟩", "⟨9f⟩"]
    assert texts.texts([ids[1], *ids]) == ["⟨9f⟩", "🙂", PART, PART, PART]


def test_a_token_is_recorded_once_over_all_calls():
    writer = TokenWriter(tiny_tokenizer())
    assert [record["id"] for record in writer.records([(5, 6), (6, 5, 7)])] == [5, 6, 7]
    assert [record["id"] for record in writer.records([(7, 8)])] == [8]


def test_a_token_that_nothing_is_known_of_is_shown_as_its_number(tmp_path):
    assert TokenTexts.read(tmp_path).texts([12]) == ["⟨12⟩"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not valid JSON"),
        ('{"id": 3}', "not a token"),
        ('{"id": 3, "bytes": "xy"}', "not a token"),
        ("[]", "must be a JSON object"),
    ],
)
def test_a_broken_line_is_an_error_with_its_place(line, fault, tmp_path):
    (tmp_path / FILE).write_text('{"id": 1, "text": "a"}\n' + line + "\n")
    with pytest.raises(TOPDError, match=rf"tokens\.jsonl, line 2: {fault}"):
        TokenTexts.read(tmp_path)
