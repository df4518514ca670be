"""Prompts as token ids, for both readers; seeds; repetition; fingerprints."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tokenizers import AddedToken, normalizers, processors
from transformers import PreTrainedTokenizerFast

from conftest import EOS, WORDS, rows, tiny_tokenizer
from test_text import byte_level
from topd.errors import TOPDError
from topd.inputs.models.fingerprints import fingerprint
from topd.inputs.prompt_rows import read_row
from topd.inputs.prompts import PromptEncoder, make_rollout, remarks, repeated_ngram_share
from topd.seeds import sampling_seeds
from topd.training.startup import rows_of
from topd.types import Generation, Prompt

ASKED = [{"role": "user", "content": "what is 1 + 2 ?"}]
TALK = [
    {"role": "system", "content": "we add"},
    {"role": "user", "content": "what is 1 + 1 ?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and then ?"},
]
SHOUTED = (
    "{% if loud %}. {% endif %}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}= {% endif %}"
)


def encoder(**options) -> PromptEncoder:
    return PromptEncoder(tiny_tokenizer(), tiny_tokenizer(), **options)


def text(ids: tuple[int, ...]) -> str:
    return tiny_tokenizer().decode(ids)


def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that puts <s> before every text, and whose chat template does so too."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.chat_template = "<s> " + tokenizer.chat_template
    return tokenizer


# Prompts


def test_messages_go_through_the_chat_template_once():
    (prompt,) = encoder().encode([{"prompt": ASKED}])
    assert text(prompt.student) == "<|user|> what is 1 + 2 ? <|assistant|>"
    assert prompt.student == prompt.teacher
    assert prompt.response is None


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_parts_that_are_all_text_are_one_text(column):
    """As OpenAI and TRL write messages; Arrow fills in the keys that other parts have."""
    split = [{"type": "text", "text": "what is ", "image": None}, {"type": "text", "text": "1 ?"}]
    turns = [{"role": "user", "content": split}, {"role": "assistant", "content": split[1:]}]
    plain = [{"role": "user", "content": "what is 1 ?"}, {"role": "assistant", "content": "1 ?"}]
    given, wanted = (encoder().encode([{column: m}], with_response=True) for m in (turns, plain))
    assert given == wanted
    completion = {column: turns[:1], "completion": turns[1:]}
    assert encoder().encode([completion], with_response=True) == wanted
    mixed = [{"role": "user", "content": [*split, {"type": "image", "url": "x"}]}]
    with pytest.raises(TOPDError, match=r"data row 0: .*a content of text"):
        encoder().encode([{column: mixed}])


def test_every_turn_is_kept_the_system_message_first():
    (prompt,) = encoder().encode([{"prompt": TALK}])
    written = "<|system|> we add <|user|> what is 1 + 1 ? <|assistant|> 2 "
    written += "<|user|> and then ? <|assistant|>"
    assert list(prompt.student) == tiny_tokenizer()(written, add_special_tokens=False)["input_ids"]


def test_the_template_begins_the_sequence_and_nothing_is_added_to_it():
    (chat,) = PromptEncoder(with_bos(), with_bos()).encode([{"prompt": ASKED}])
    assert chat.student.count(1) == 1
    assert chat.student[0] == 1


def test_a_string_is_tokenised_as_it_is_with_its_special_tokens():
    (plain,) = PromptEncoder(with_bos(), with_bos()).encode([{"prompt": "what is 1 ?"}])
    assert text(plain.student) == "<s> what is 1 ?"


def test_messages_stand_in_for_a_missing_prompt_and_prompt_goes_first():
    by_messages, by_prompt = encoder().encode(
        [{"messages": ASKED}, {"prompt": "what is", "messages": ASKED}]
    )
    assert text(by_messages.student).startswith("<|user|> what is 1 + 2 ?")
    assert text(by_prompt.student) == "what is"


def test_of_two_prompts_it_is_said_once_which_one_counts(caplog):
    both = {"prompt": "what is", "messages": ASKED}
    encoder().encode([both, both, {"prompt": "what is", "messages": None}])
    assert caplog.text.count("prompt counts and messages is not read") == 1
    caplog.clear()
    encoder().encode([{"prompt": "what is", "messages": None}, {"messages": ASKED}])
    assert "prompt counts" not in caplog.text


def test_template_arguments_reach_both_chat_templates():
    student, teacher = tiny_tokenizer(), tiny_tokenizer()
    student.chat_template = teacher.chat_template = SHOUTED
    quiet, loud = (
        PromptEncoder(student, teacher, template_kwargs=arguments).encode([{"prompt": ASKED}])[0]
        for arguments in ({}, {"loud": True})
    )
    assert text(quiet.student) == text(quiet.teacher) == "what is 1 + 2 ? ="
    assert text(loud.student) == text(loud.teacher) == ". what is 1 + 2 ? ="


def test_a_value_that_a_row_lacks_is_not_written_as_none():
    """Arrow gives None to every row for a nested value that others have."""
    known = [{"prompt": ASKED, "meta": {"hint": "3"}}, {"prompt": ASKED, "meta": {"hint": None}}]
    with pytest.raises(TOPDError, match=r"row 1: teacher_prompt .*a value that it writes is miss"):
        encoder(teacher_prompt="{{ meta.hint }} {{ prompt }}").encode(known)
    asks = encoder(teacher_prompt="{{ meta.hint or 'so' }} {{ prompt }}").encode(known)
    assert [text(prompt.teacher).split()[1] for prompt in asks] == ["3", "so"]


def test_each_reader_has_its_own_chat_template():
    teacher = tiny_tokenizer()
    teacher.chat_template = SHOUTED
    (prompt,) = PromptEncoder(tiny_tokenizer(), teacher).encode([{"prompt": ASKED}])
    assert text(prompt.student) == "<|user|> what is 1 + 2 ? <|assistant|>"
    assert text(prompt.teacher) == "what is 1 + 2 ? ="


# The teacher's own prompt


def test_the_teachers_template_replaces_its_last_user_message_alone():
    (prompt,) = encoder(teacher_prompt="so {{ prompt }} = {{ hint }}").encode(
        [{"prompt": TALK, "hint": "3"}]
    )
    (plain,) = encoder().encode([{"prompt": TALK}])
    (asked,) = encoder().encode(
        [{"prompt": [*TALK[:-1], {"role": "user", "content": "so and then ? = 3"}]}]
    )
    assert prompt.student == plain.student
    assert prompt.teacher == asked.student


def test_the_teachers_template_replaces_a_string_whole():
    (prompt,) = encoder(teacher_prompt="{{ solution }} so {{ prompt }}").encode(
        [{"prompt": "what is 1 ?", "solution": "1 ."}]
    )
    assert text(prompt.student) == "what is 1 ?"
    assert text(prompt.teacher) == "1 . so what is 1 ?"


def test_the_teachers_template_escapes_nothing():
    words = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "a<b", "&", '"c"']
    tokenizer = tiny_tokenizer(words)
    escaping = PromptEncoder(tokenizer, tokenizer, "{{ prompt }}")
    (prompt,) = escaping.encode([{"prompt": 'a<b & "c"'}])
    assert prompt.teacher == prompt.student == (6, 7, 8)


def test_the_response_is_the_same_tokens_for_both_readers_and_ends():
    (prompt,) = encoder(teacher_prompt="{{ solution }}").encode(rows(1), with_response=True)
    assert text(prompt.response) == "so the answer is 0 . </s>"
    assert prompt.response[-1] == EOS


def test_a_response_begins_without_special_tokens():
    (prompt,) = PromptEncoder(with_bos(), with_bos()).encode(rows(1), with_response=True)
    assert 1 not in prompt.response


def test_a_given_solution_goes_before_the_final_assistant_turn():
    turn = {"role": "assistant", "content": "3 ."}
    row = {"messages": [*ASKED, turn], "solution": "so 3 ."}
    (prompt,) = encoder().encode([row], with_response=True)
    assert text(prompt.response) == "so 3 . </s>"
    assert text(prompt.student) == "<|user|> what is 1 + 2 ? <|assistant|>"


def test_rows_are_not_changed():
    row = {"messages": [*ASKED, {"role": "assistant", "content": "3 ."}], "solution": None}
    before = repr(row)
    encoder(teacher_prompt="{{ solution }}").encode([row])
    assert repr(row) == before


# Cells


MISSING = [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT]


@pytest.mark.parametrize("missing", MISSING, ids=repr)
def test_a_missing_cell_is_none_whatever_it_is(missing):
    names = ("solution", "tools", "chat_template_kwargs", "images", "prompt", "hint")
    row = {"messages": ASKED, **dict.fromkeys(names, missing)}
    reader = encoder(teacher_prompt="{{ prompt }} {{ hint | default('so') }}", with_rows=True)
    (prompt,) = reader.encode([row])
    assert text(prompt.student) == "<|user|> what is 1 + 2 ? <|assistant|>"
    assert text(prompt.teacher) == "<|user|> what is 1 + 2 ? so <|assistant|>"
    assert prompt.row == {"messages": ASKED, **dict.fromkeys(names)}
    with pytest.raises(TOPDError, match="row 0: no solution to learn from"):
        encoder().encode([row], with_response=True)


def test_the_missing_answers_of_a_data_frame_are_no_words():
    frame = pd.DataFrame({"prompt": ["what", "what"], "solution": ["so", None], "n": [1.5, None]})
    with pytest.raises(TOPDError, match="row 1: no solution to learn from"):
        encoder().encode(rows_of(frame), with_response=True)
    whole = encoder(with_rows=True).encode(rows_of(frame))
    assert [p.row["n"] for p in whole] == [1.5, None]


# The chat template is asked


def with_template(template: str, *words: str) -> PromptEncoder:
    tokenizer = tiny_tokenizer([*WORDS, *words])
    tokenizer.chat_template = template
    return PromptEncoder(tokenizer, tokenizer)


def learned(encoder: PromptEncoder, *messages: dict, **row) -> tuple[str, str]:
    """Prompt and answer as learned, and the finished conversation as the template writes it."""
    tokenizer = encoder.student
    (prompt,) = encoder.encode([{"messages": list(messages), **row}], with_response=True)
    whole = tokenizer.apply_chat_template(list(messages), return_dict=True)["input_ids"]
    return tokenizer.decode(prompt.student + prompt.response), tokenizer.decode(whole)


ANSWER = {"role": "assistant", "content": "so 3"}
TURNS = "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <eot> {% endfor %}"
TURNS += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
ENDING = TURNS.replace("<eot>", "</s>")
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|> {% if m['role'] == 'assistant' %}"
    "{% if m.get('reasoning_content') %}<think> {{ m['reasoning_content'] }} </think> {% endif %}"
    "{{ m['content'] | trim }} </s>{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> <think>{% endif %}"
)
CALLS = (
    "{% for t in tools or [] %}use {{ t['function']['name'] }} {% endfor %}{% for m in messages %}"
    "{% if 'tool_calls' in m %}call {{ m['tool_calls'][0]['function']['name'] }} </s> "
    "{% else %}<|{{ m['role'] }}|> {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ sign | default('=') }}{% endif %}"
)


def test_the_answer_ends_as_the_template_ends_a_turn():
    ours, theirs = learned(with_template(TURNS, "<eot>"), *ASKED, ANSWER)
    assert ours == theirs == "<|user|> what is 1 + 2 ? <eot> <|assistant|> so 3 <eot>"


def test_an_end_is_added_where_the_template_has_none():
    ours, theirs = learned(encoder(), *ASKED, ANSWER)
    assert ours == theirs + " </s>"


@pytest.mark.parametrize("content", [">", "so 3 >", "so <eot>", "so 3 ."])
@pytest.mark.parametrize("escape", ["", " | e"])
@pytest.mark.parametrize("end", ["<eot>", ""])
def test_an_answer_has_one_end_whatever_its_last_word(content, escape, end):
    template = TURNS.replace("<eot>", end).replace("['content']", f"['content']{escape}")
    reader = with_template(template, "<eot>", ">")
    ours, theirs = learned(reader, *ASKED, {**ANSWER, "content": content})
    assert ours == theirs + ("" if end else " </s>")


@pytest.mark.parametrize(
    "answer",
    [
        {**ANSWER, "reasoning_content": "add 1 and 2"},
        {**ANSWER, "content": "<think> add 1 and 2 </think> so 3"},
        {**ANSWER, "content": "  <think> add 1 and 2 </think> so 3 "},  # which the template strips
    ],
)
def test_reasoning_is_learned_as_the_template_writes_it(answer):
    reader = with_template(THINKING, "<think>", "</think>")
    ours, theirs = learned(reader, *ASKED, answer)
    assert ours == theirs
    assert ours.endswith("<|assistant|> <think> add 1 and 2 </think> so 3 </s>")


def test_an_answer_that_the_template_writes_elsewhere_is_refused():
    reader = with_template(THINKING, "<think>", "</think>")
    with pytest.raises(TOPDError, match=r"row 0: .*ends with '.*<think>'.*reasoning_content"):
        reader.encode([{"messages": [*ASKED, ANSWER]}], with_response=True)


TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": None}}]
CALL = {"tool_calls": [{"type": "function", "function": {"name": "sum", "arguments": {}}}]}


GIVEN = {"a": 1, "it's": 2, "c": "ü"}
PAIRS = '{"a": 1, "it\'s": 2, "c": "ü"}'


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{ a | tojson }}", PAIRS),
        ("{% if a is string %}{{ a }}{% else %}{{ a | tojson }}{% endif %}", PAIRS),
        ("{{ 'with ' + a }}", f"with {PAIRS}"),
        ("{{ 'with ' ~ a }}", f"with {PAIRS}"),
        ("{% for k, v in a | items %}{{ k }}={{ v }} {% endfor %}", "a=1 it's=2 c=ü "),
    ],
)
@pytest.mark.parametrize("given", [GIVEN, json.dumps(GIVEN), json.dumps(GIVEN, indent=1)])
@pytest.mark.parametrize("flat", [False, True])
def test_the_arguments_of_a_call_are_what_a_template_takes(written, expected, given, flat):
    """OpenAI's logs have them as text, which tojson would put into quotes once more."""
    call = "m.tool_calls[0]" if flat else "m.tool_calls[0].function"
    student = byte_level()
    student.chat_template = (
        f"{{% for m in messages %}}{{{{ m.role }}}} {{{{ m.content }}}}{{% if m.tool_calls %}}"
        f"{{% set a = {call}.arguments %}}{written}{{% endif %}}</s>{{% endfor %}}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    reader = PromptEncoder(student, student)

    def called(arguments: Any) -> str:
        named = {"name": "sum", "arguments": arguments}
        said = {"role": "assistant", "tool_calls": [named if flat else {"function": named}]}
        (prompt,) = reader.encode([{"messages": [*ASKED, said]}], with_response=True)
        (later,) = reader.encode([{"prompt": [*ASKED, said, *ASKED]}])
        response = student.decode(prompt.response)
        assert f"assistant {response}user" in student.decode(later.student)
        return response

    assert called(given) == f"{expected}</s>"


@pytest.mark.parametrize("arguments", ["{", "[1]", "3", 3, [1], '"{}"'])
def test_arguments_that_are_no_mapping_are_refused(arguments):
    call = {"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}
    with pytest.raises(TOPDError, match="row 0: the arguments of a tool call must be a mapping"):
        read_row(0, {"messages": [*ASKED, call]})


def test_what_is_given_as_json_text_keeps_its_nulls():
    """Those of a mapping may be Arrow's, which has every key in every row."""
    tools = [{"function": {"name": "sum", "default": None}}]
    call = {"role": "assistant", "tool_calls": [{"function": {"arguments": '{"a": null}'}}]}
    row = read_row(0, {"messages": [*ASKED, call], "tools": json.dumps(tools)})
    assert row.template_kwargs == {"tools": tools}
    assert row.answer["tool_calls"][0]["function"]["arguments"] == {"a": None}


@pytest.mark.parametrize("form", [TOOLS, json.dumps(TOOLS)])
def test_tools_and_template_arguments_of_a_row_are_rendered(form):
    reader = with_template(CALLS, "use", "call")
    data = [{"prompt": ASKED, "tools": form, "chat_template_kwargs": {"sign": "."}}]
    data.append({"prompt": ASKED, "tools": None, "chat_template_kwargs": None})
    first, second = (reader.student.decode(p.student) for p in reader.encode(data))
    assert first == "use sum <|user|> what is 1 + 2 ? ."
    assert second == "<|user|> what is 1 + 2 ? ="
    with pytest.raises(TOPDError, match="row 0: tools need a chat template"):
        reader.encode([{"prompt": "what is", "tools": TOOLS}])
    with pytest.raises(TOPDError, match="row 0: sgn is not read by the chat template"):
        reader.encode([{"prompt": ASKED, "chat_template_kwargs": {"sgn": "."}}])
    with pytest.raises(TOPDError, match="row 0: tools must be a list"):
        reader.encode([{"prompt": ASKED, "tools": {"a": 1}}])


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_a_tool_call_needs_no_content_and_may_be_the_answer(content):
    reader = with_template(CALLS, "use", "call")
    call = {"role": "assistant", **content, **CALL}
    (asked,) = reader.encode([{"prompt": [*ASKED, call, {"role": "tool", "content": "3"}]}])
    assert "call sum </s> <unk> 3 =" in reader.student.decode(asked.student)


def test_a_tool_call_is_learned_as_an_answer():
    template = CALLS.replace("call {{", "<|assistant|> call {{").replace(
        "{{ sign | default('=') }}", "<|assistant|>"
    )
    ours, theirs = learned(
        with_template(template, "use", "call"), *ASKED, {"role": "assistant", "content": "", **CALL}
    )
    assert ours == theirs == "<|user|> what is 1 + 2 ? <|assistant|> call sum </s>"


def test_keys_of_none_are_as_if_they_were_not_there():
    reader = with_template(CALLS, "use", "call")
    (prompt,) = reader.encode([{"prompt": [{**ASKED[0], "tool_calls": None, "name": None}]}])
    assert reader.student.decode(prompt.student) == "<|user|> what is 1 + 2 ? ="


def test_lists_may_be_arrays_as_pandas_reads_them_from_parquet():
    tools = [{"type": "function", "function": {"name": "sum", "required": np.array(["a"])}}]
    row = {"prompt": np.array(ASKED), "tools": np.array(tools), "images": np.array([])}
    reader = with_template(CALLS, "use", "call")
    (prompt,) = reader.encode([row])
    assert reader.student.decode(prompt.student) == "use sum <|user|> what is 1 + 2 ? ="


def test_a_completion_is_an_answer():
    for completion in ("so 3", [ANSWER], np.array([ANSWER])):
        row = {"prompt": ASKED, "completion": completion}
        (prompt,) = encoder().encode([row], with_response=True)
        assert text(prompt.response) == "so 3 </s>"


@pytest.mark.parametrize("role", ["human", "User", "critic"])
def test_a_role_that_no_template_knows_is_named(role):
    with pytest.raises(TOPDError, match=f"row 0: has a message of the role '{role}'"):
        encoder().encode([{"prompt": [{**ASKED[0], "role": role}]}])


@pytest.mark.parametrize("role", ["model", "gpt", "Assistant"])
def test_an_answer_of_another_role_is_no_part_of_the_prompt(role):
    """Many a template writes any role: the student would be shown the answer."""
    with pytest.raises(TOPDError, match=f"row 0: has a message of the role '{role}'"):
        encoder().encode([{"messages": [*ASKED, {"role": role, "content": "3"}]}])
    (prompt,) = encoder().encode([{"prompt": [*ASKED, {"role": "observation", "content": "3"}]}])
    assert "3" in text(prompt.student)  # a template's own role stays


def test_images_are_not_ignored():
    with pytest.raises(TOPDError, match=r"row 0: has images, which are not read"):
        encoder().encode([{"prompt": ASKED, "images": ["a.png"]}])


def special(single: str) -> PromptEncoder:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PromptEncoder(tokenizer, tokenizer)


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("prompt", ["<s> what is 1 ?", "what is 1 ?"])
def test_a_text_begins_once_and_does_not_end(single, prompt):
    (read,) = special(single).encode([{"prompt": prompt}])
    assert 2 not in read.student
    assert read.student.count(1) == (single.startswith("<s>") or prompt.startswith("<s>"))


def test_a_text_does_not_end_as_its_tokenizer_ends_texts_whatever_ends_a_response():
    reader = special("<s> $A </s>")
    reader.student.eos_token = "then"
    (read,) = reader.encode([{"prompt": "what is 1 ?"}])
    assert text(read.student) == "<s> what is 1 ?"


def test_a_prompt_of_no_tokens_is_refused_with_its_row():
    reader = encoder()
    reader.student.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(TOPDError, match="row 1: the tokenizer makes no token of the prompt"):
        reader.encode([{"prompt": "what"}, {"prompt": "\u200b"}])


@pytest.mark.parametrize("chat", [False, True])
def test_an_end_in_an_answer_is_learned_once_and_nothing_after_it(chat):
    reader = with_template(ENDING) if chat else encoder()
    prompt = ASKED if chat else "what is 1 + 2 ?"

    def learned_of(solution: str) -> str:
        (read,) = reader.encode([{"prompt": prompt, "solution": solution}], with_response=True)
        return text(read.response)

    assert learned_of("so 3") == learned_of("so 3 </s>") == learned_of("so 3 </s> </s>")
    assert learned_of("so 3") == "so 3 </s>"
    with pytest.raises(TOPDError, match=r"row 0: the answer has '</s>' in it, .* continues after"):
        learned_of("</s> so 3")


def test_an_answer_whose_end_does_not_end_the_student_is_refused():
    reader = with_template(TURNS, "<eot>")
    row = {"prompt": ASKED, "solution": "so 3"}
    with pytest.raises(TOPDError, match=r"answer with '<eot>', and .* end at </s>: it would not"):
        replace(reader, ends=frozenset({EOS})).encode([row], with_response=True)
    eot = reader.student.convert_tokens_to_ids("<eot>")
    (read,) = replace(reader, ends=frozenset({EOS, eot})).encode([row], with_response=True)
    assert read.response[-1] == eot


@pytest.mark.parametrize(
    ("template", "ends", "told"),
    [(TURNS, {EOS}, [True]), (TURNS, {EOS, 64}, []), (TURNS.replace("<eot>", ""), {EOS}, [])],
)
def test_a_template_whose_end_does_not_end_a_response_is_told_of(template, ends, told, monkeypatch):
    """As of a base model with a chat template: its responses would continue after their turn."""
    said: list[str] = []
    monkeypatch.setattr(remarks.logger, "warning_once", said.append)
    reader = replace(with_template(template, "<eot>"), ends=frozenset(ends))
    assert reader.student.convert_tokens_to_ids("<eot>") == 64
    reader.encode([{"prompt": ASKED}])
    assert [
        "ends a turn with '<eot>', and its responses end at </s>" in one for one in said
    ] == told
    reader.encode([{"prompt": "what is 1 + 2 ?"}])
    assert len(said) == len(told)


@pytest.mark.parametrize(
    ("end", "token", "remedy"),
    [("<eot>", "<eot>", "Set eos_token"), ("</turn>", "<eot>", "use a chat template that ends")],
)
def test_an_end_that_is_no_token_is_not_advised_as_one(end, token, remedy, monkeypatch):
    """As ChatML's beside a base model whose tokenizer was not given its marks."""
    said: list[str] = []
    monkeypatch.setattr(remarks.logger, "warning_once", said.append)
    reader = with_template(TURNS.replace("<eot>", end), token)
    replace(reader, ends=frozenset({EOS})).encode([{"prompt": ASKED}])
    (one,) = said
    assert f"ends a turn with {end!r}" in one
    assert one.count(remedy) == 1
    assert ("eos_token" in one) == (end == token)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (
            [{"role": "user", "content": "<|user|> what is 1 + 2 ? </s> <|assistant|>"}],
            ["<|user|>"],
        ),
        ([*TALK, {"role": "user", "content": "what ? </s>"}], ["</s>"]),
        ("what is 1 + 2 ? </s>", []),  # text is as it is
        (TALK, []),
    ],
)
def test_a_prompt_that_is_already_in_the_form_of_a_chat_is_told_of(prompt, told, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(remarks.logger, "warning_once", said.append)
    student = tiny_tokenizer()
    student.add_tokens([AddedToken("<|user|>", special=True)])  # as of Llama 3
    PromptEncoder(student, student).encode([{"prompt": ASKED}, *[{"prompt": prompt}] * 2])
    assert [one.split("has ")[1].split(",")[0].strip("'") for one in said] == told
    assert all(one.startswith("data row 1: ") and "data.chat: false" in one for one in said)


@pytest.mark.parametrize(
    "name", ["reasoning_content", "reasoning", "thinking", "tool_calls", "function_call"]
)
def test_a_part_of_an_answer_that_the_template_leaves_out_is_refused(name):
    value = [{"function": {"name": "add"}}] if name == "tool_calls" else "what we have"
    row = {"messages": [*ASKED, {**ANSWER, name: value}]}
    with pytest.raises(TOPDError, match=f"row 0: the chat template does not write .* {name}, so"):
        encoder().encode([row], with_response=True)
    encoder().encode([row])  # nothing is learned of it


def test_tools_that_the_template_leaves_out_are_refused():
    """Phi-4-mini's reads them of the system message."""
    system = "{% if m.role == 'system' and 'tools' in m %}{{ m.tools }}{% endif %}<|{{"
    rows = [{"prompt": ASKED}, {"prompt": ASKED, "tools": TOOLS}]
    reader = with_template(TURNS.replace("<|{{", system), "<eot>")
    with pytest.raises(TOPDError, match="row 1: the chat template does not write the row's tools"):
        reader.encode(rows)
    strict = "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}"
    with_template(strict + TURNS, "<eot>").encode(rows[1:])


def test_calls_that_the_template_leaves_out_are_refused():
    """As gpt-oss's writes the first call alone."""
    first = "{{ m['content'] }} {{ m.tool_calls[0].function.name if m.tool_calls }}"
    reader = with_template(TURNS.replace("{{ m['content'] }}", first), "<eot>")
    calls = [{"function": {"name": name}} for name in ("so", "then")]
    one, both = ({"role": "assistant", "tool_calls": calls[:count]} for count in (1, 2))
    assert learned(reader, *ASKED, one)[0].endswith("so <eot>")
    with pytest.raises(TOPDError, match="does not write the answer's tool_calls, so it would"):
        learned(reader, *ASKED, both)
    told = [{"prompt": [*ASKED, said, *ASKED]} for said in (one, both)]
    with pytest.raises(TOPDError, match="row 1: the chat template does not write the tool_calls"):
        reader.encode(told)


def test_a_thought_that_the_template_cuts_off_is_refused_unless_it_is_empty():
    cut = TURNS.replace("m['content']", "m['content'].split('</think>')[-1] | trim")
    reader = with_template(cut, "<eot>", "<think>", "</think>")
    with pytest.raises(TOPDError, match=r"write the answer's thought before </think>, so it"):
        learned(reader, *ASKED, {**ANSWER, "content": "<think> we add </think> so 3"})
    empty = {**ANSWER, "content": "<think> </think> so 3"}
    assert learned(reader, *ASKED, empty) == learned(reader, *ASKED, ANSWER)


@pytest.mark.parametrize("asks", ["<think> </think> ", ""])
def test_a_thought_in_the_text_after_one_of_the_template_s_own_is_refused(asks):
    """As Qwen3.8's and Kimi K2's write it, or SmolLM3's without thinking."""
    own = "{% if m['role'] == 'assistant' %}<think> </think> {% endif %}{{ m['content'] }}"
    template = TURNS.replace("{{ m['content'] }}", own)
    template = template.replace("<|assistant|>{%", f"<|assistant|> {asks}{{%")
    reader = with_template(template, "<eot>", "<think>", "</think>")
    said = {**ANSWER, "content": "<think> we add </think> so 3"}
    with pytest.raises(TOPDError, match="row 0: the chat template writes a thought of its own"):
        learned(reader, *ASKED, said)
    ours, _ = learned(reader, *ASKED, said, *ASKED, ANSWER)  # nothing is learned of an earlier one
    assert ours.endswith("<think> </think> so 3 <eot>")


RULE, RESULT = {"role": "system", "content": "be brief"}, {"role": "tool", "content": "3"}


@pytest.mark.parametrize(
    ("written", "messages", "fault"),
    [
        ("m['role'] != 'tool'", [*ASKED, ANSWER, RESULT], "content of message 2, .* 'tool'"),
        (
            "loop.first or m['role'] != 'system'",
            [RULE, *ASKED, ANSWER, RULE],
            "content of message 3",
        ),
        ("true", [*ASKED, {**ANSWER, **CALL}, RESULT], "tool_calls of message 1"),
        ("true", [*ASKED, {**ANSWER, "function_call": {"name": "sum"}}, *ASKED], "function_call"),
        (  # as Mistral's writes it: in a last message of the user
            "messages[-1].role == 'user' or m['role'] != 'system'",
            [RULE, *ASKED, ANSWER, RESULT],
            "content of message 0",
        ),
        (  # as DeepSeek's writes it: the last one
            "m['role'] != 'system' or messages[loop.index:] | map(attribute='role') | "
            "select('equalto', 'system') | list | length == 0",
            [RULE, *ASKED, ANSWER, RULE, *ASKED],
            "content of message 0",
        ),
    ],
)
def test_a_message_that_the_template_leaves_out_is_refused(written, messages, fault):
    some = TURNS.replace("<|{{", f"{{% if {written} %}}<|{{{{").replace(
        "<eot> ", "<eot> {% endif %}"
    )
    readers = with_template(TURNS, "<eot>"), with_template(some, "<eot>")
    reader = replace(readers[0], teacher=readers[1].student)
    rows = [{"prompt": [RULE, *ASKED]}, {"prompt": messages}]
    with pytest.raises(TOPDError, match=f"row 1: the chat template does not write the {fault}"):
        reader.encode(rows)
    reader.encode(rows[:1])


def test_a_message_that_a_template_cannot_do_without_is_written():
    """A content that it refuses is one that it reads."""
    strict = "{% if m['content'] != 'what' %}{{ raise_exception('other') }}{% endif %}"
    reader = with_template(TURNS.replace("<|{{", f"{strict}<|{{{{"), "<eot>")
    (prompt,) = reader.encode([{"prompt": [{"role": "user", "content": "what"}]}])
    assert reader.student.decode(prompt.student) == "<|user|> what <eot> <|assistant|>"


def test_an_answer_that_a_template_cuts_at_its_marks_is_written():
    marked = "{{ m['content'].split('<answer>')[-1].split('</answer>')[0] }}"
    reader = with_template(TURNS.replace("{{ m['content'] }}", marked), "<eot>")
    said = {**ANSWER, "content": f"we add <answer> {ANSWER['content']} </answer>"}
    (prompt,) = reader.encode([{"prompt": [*ASKED, said, *ASKED]}])
    assert "<|assistant|> so 3 <eot>" in reader.student.decode(prompt.student)


def test_one_of_two_names_of_a_thought_does():
    reader = with_template(THINKING, "<think>", "</think>")
    both = {**ANSWER, "reasoning": "we add", "reasoning_content": "we add"}
    assert "we add" in learned(reader, *ASKED, both)[0]


def test_a_call_is_no_answer_to_a_prompt_of_text():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}
    with pytest.raises(TOPDError, match="row 0: no solution to learn from"):
        encoder().encode([{"prompt": "what", "completion": [call]}], with_response=True)


def test_an_answer_of_tokens_that_the_teacher_lacks_is_refused():
    student = tiny_tokenizer()
    student.add_tokens(["<think>"], special_tokens=True)
    reader = PromptEncoder(student, tiny_tokenizer())
    row = {"prompt": ASKED, "solution": "<think> so 3"}
    with pytest.raises(
        TOPDError, match="row 0: the answer has '<think>', a token that the teacher"
    ):
        reader.encode([row], with_response=True)


# Length


def test_the_limit_itself_is_allowed():
    row = {"prompt": "what is 1 ?"}
    assert len(encoder(max_length=4).encode([row])) == 1
    with pytest.raises(TOPDError, match="row 0: the prompt has 4 tokens, the limit is 3"):
        encoder(max_length=3).encode([row])


@pytest.mark.parametrize("prompt", ["a" * 9001, [{"role": "user", "content": "a" * 9001}]])
def test_a_prompt_that_no_limit_can_hold_is_not_tokenised(prompt, monkeypatch):
    data = [{"prompt": prompt}, {"prompt": "we so"}]
    read = []
    ids = PromptEncoder._ids
    monkeypatch.setattr(PromptEncoder, "_ids", lambda *a: read.append(a[1]) or ids(*a))
    with pytest.raises(TOPDError, match="data row 0: the prompt has 9,001 characters, more than 9"):
        encoder(max_length=9).encode(data)
    kept = encoder(max_length=9, drop_long=True).encode(data)
    assert [p.index for p in kept] == [1]
    assert set(read) == {1}


def test_dropped_rows_leave_the_numbers_of_the_others():
    data = [{"prompt": "so so so"}, {"prompt": "so"}, {"prompt": "so so so"}, {"prompt": "we"}]
    kept = encoder(max_length=2, drop_long=True).encode(data)
    assert [(p.index, text(p.student)) for p in kept] == [(1, "so"), (3, "we")]


def test_a_long_prompt_of_the_teacher_is_dropped_too():
    data = [{"prompt": "so", "solution": "so so so"}, {"prompt": "so", "solution": "we"}]
    kept = encoder(max_length=2, drop_long=True, teacher_prompt="{{ solution }}").encode(data)
    assert [p.index for p in kept] == [1]


def test_an_empty_solution_is_no_response():
    with pytest.raises(TOPDError, match=r"row 1: no solution to learn from\. Map a solution"):
        encoder().encode([{"prompt": "so", "solution": "we"}, {"prompt": "so"}], with_response=True)


# Seeds, repetition, fingerprints


def test_seeds_differ_between_rollouts_steps_and_runs():
    seeds = [s for seed in (0, 1) for step in range(20) for s in sampling_seeds(seed, step, 50)]
    assert len(set(seeds)) == len(seeds) == 2000
    assert all(0 <= s < 2**32 for s in seeds)


@pytest.mark.parametrize("split", [1, 3, 7])
def test_any_split_of_an_update_gives_the_same_seeds(split):
    whole = sampling_seeds(3, 5, 12)
    rest = sampling_seeds(3, 5, 12 - split, first=split)
    assert whole == sampling_seeds(3, 5, split) + rest


def test_seeds_are_the_same_in_every_session():
    assert sampling_seeds(42, 7, 2) == [1955881634, 891417746]


@pytest.mark.parametrize(
    ("response", "n", "share"),
    [
        ((), 4, 0.0),
        ((1, 2, 3), 4, 0.0),
        ((1, 2, 3, 4), 4, 0.0),
        ((1, 1, 1, 1, 1), 4, 0.5),  # two 4-grams, one of them seen before
        ((1, 1, 1, 1, 1, 1, 1), 4, 0.75),
        ((1, 2, 1, 2, 1), 2, 0.5),  # 12 21 12 21
        ((1, 2, 3), 1, 0.0),
        ((1, 2, 1), 1, 1 / 3),
    ],
)
def test_repeated_share_by_hand(response, n, share):
    assert repeated_ngram_share(response, n) == pytest.approx(share)


PROMPTS = [Prompt(0, (1, 2), (1, 2)), Prompt(1, (3, 4), (3, 5), (6,))]


def test_equal_prompts_have_one_fingerprint():
    assert fingerprint(PROMPTS) == fingerprint(iter([replace(p) for p in PROMPTS]))


@pytest.mark.parametrize(
    "changed",
    [
        [replace(PROMPTS[0], student=(1, 3)), PROMPTS[1]],
        [replace(PROMPTS[0], teacher=(1, 3)), PROMPTS[1]],
        [PROMPTS[0], replace(PROMPTS[1], response=(7,))],
        [PROMPTS[0], replace(PROMPTS[1], response=None)],
        [PROMPTS[0], replace(PROMPTS[1], response=())],
        [PROMPTS[0], replace(PROMPTS[1], student=(34,))],
        [PROMPTS[0], replace(PROMPTS[1], student=(3,), teacher=(4, 3, 5))],
        PROMPTS[::-1],
        PROMPTS[:1],
        [*PROMPTS, PROMPTS[1]],
    ],
)
def test_any_change_of_the_prompts_changes_the_fingerprint(changed):
    assert fingerprint(changed) != fingerprint(PROMPTS)


def test_a_rollout_is_what_was_written_to_the_prompt():
    rollout = make_rollout(PROMPTS[0], Generation((5, 6), (-0.5, -1.0), finished=False))
    assert (rollout.prompt, rollout.response) == (PROMPTS[0], (5, 6))
    assert (rollout.logprobs, rollout.finished) == ((-0.5, -1.0), False)
