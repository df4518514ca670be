"""Rollouts of several turns: what an environment writes is read, and learned nowhere."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import AddedToken

from conftest import EOS, rows, tiny_model, tiny_tokenizer
from test_audit import chain_again, edit_record
from test_text import byte_level
from topd import TOPDConfig, TOPDTrainer
from topd.commands.audit import Trust, audit_run, replay_step
from topd.commands.probe import ProbeConfig
from topd.commands.recipe import read_recipe
from topd.commands.train import run_recipe
from topd.divergence import moved_to_random
from topd.engines.hf import HFEngine
from topd.errors import TOPDError
from topd.inputs.models import ModelSpec
from topd.inputs.prompt_rows import Row as ReadRow
from topd.inputs.prompt_rows import read_row
from topd.inputs.prompts import PromptEncoder
from topd.inputs.prompts.tools import Replies, calculated, calculator, environment_named
from topd.methods import METHODS
from topd.report.page import write_report
from topd.report.terminal import show
from topd.runs.records import RolloutRecord
from topd.testbed import FAMILIES, problems
from topd.testbed.models import tokenizer_of
from topd.training.experience import Observer
from topd.training.experience import turns as turning
from topd.training.experience.asked import of_own_tokens
from topd.training.experience.evidence import Experience
from topd.training.experience.turns import Turns, turns_of
from topd.training.learning import Totals, collate, learning_terms, update_loss
from topd.training.metrics import Means, measure_experience
from topd.types import Branch, Guidance, Prompt, Rollout, Sampling, SoftTarget

FAMILY = FAMILIES["programs"]
TEXTS = problems("programs", "train", 8)
LIMIT = 44
CPU = torch.device("cpu")

# Environments


@given(
    st.recursive(
        st.integers(0, 99).map(str),
        lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        ),
        max_leaves=6,
    )
)
def test_the_calculator_calculates_as_python_does(expression: str) -> None:
    assert calculated(expression) == str(eval(expression))  # digits, brackets, + - *
    whole = str(eval(expression) * 10**9)
    assert calculated(f"({expression}) * 10**9 / 1") in (whole, "error")  # above 10**15
    assert calculator({}, ["<calc>1</calc>", f"<calc>2</calc> or <calc>{expression}</calc>"]) == (
        calculated(expression)
    )


@pytest.mark.parametrize(
    "expression",
    ["9**9**9", "2**65", "1/0", "1e308*10", "1e400", "(-8)**0.5", "", "1 +", "x", "True", "'a' * 9"]
    + ["__import__('os')", "(1).real", "[1][0]", "1 if 1 else 2", "1 < 2", "(" * 99, "1+" * 99]
    + ["1" * 201, "- " * 99 + "1 1", "1\n2", "0x10 @ 2", "10**15 + 1"],
)
def test_whatever_is_no_arithmetic_is_an_error(expression: str) -> None:
    assert calculated(expression) == "error"


def test_the_evaluator_gives_the_problem_once_more_until_it_is_solved() -> None:
    ask, row = environment_named("testbed://programs"), {"prompt": "double then add 3 :"}
    assert ask(row, ["return x"]) == row["prompt"]
    assert ask(row, ["return x", "a = x * 2 ; b = a + 3 ; return b"]) is None


# The tokens of a reply

ENDED = (
    "{% for m in messages %}{% if m.role == 'tool' and no_tools %}{{ raise_exception('no tools') }}"
    "{% endif %}<|user|> {{ m.role }} {{ m.content }} {% if m.role == 'assistant' %}</s> . "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


CHAT = ReadRow(0, [{"role": "user", "content": "what"}], None, {})


def with_template(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_a_reply_in_a_conversation_is_what_the_template_writes_there() -> None:
    tokenizer = with_template(ENDED)
    found = Replies(tokenizer, frozenset([2])).ids("3", CHAT)
    words = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "so w1"}]
    ids = {
        n: tokenizer.apply_chat_template(more, add_generation_prompt=asks)["input_ids"]
        for n, (more, asks) in enumerate(
            ((words, False), ([*words, {"role": "tool", "content": "3"}], True))
        )
    }
    kept = ids[0].index(2) + 1  # with the end that the student has written
    assert ids[1] == ids[0][:kept] + list(found)


@pytest.mark.parametrize("special", [False, True])
def test_a_call_whose_tags_are_special_tokens_is_heard(special):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=special) for t in ("<calc>", "</calc>")])
    replies = Replies(tokenizer, frozenset({EOS}))
    turn = tuple(tokenizer("so <calc> 3 + 4 </calc> </s>")["input_ids"])
    assert replies.text(turn) == replies.text(turn[:-1]) == "so <calc> 3 + 4 </calc>"
    assert calculator({}, [replies.text(turn)]) == "7"
    assert replies.text(()) == ""


def test_an_environment_reads_every_space_that_the_student_wrote() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True  # as many a saved tokenizer has it
    turn = tuple(tokenizer("what . the . so </s>", add_special_tokens=False)["input_ids"])
    text = Replies(tokenizer, frozenset([EOS])).text(turn)
    assert text == tokenizer.decode(list(turn[:-1]), clean_up_tokenization_spaces=False)
    assert " ." in text


def test_a_template_without_tools_has_the_reply_from_a_user_and_one_without_ends_is_refused():
    plain = with_template(ENDED)
    kwargs = {"no_tools": True}
    found = Replies(plain, frozenset([2]), kwargs).ids("3", CHAT)
    other = Replies(plain, frozenset([2])).ids("3", CHAT)
    assert found != ()
    assert len(found) == len(other)
    said = "after the assistant's and its end, '</s>'"
    with pytest.raises(TOPDError, match=said):
        Replies(tiny_tokenizer(), frozenset([2])).check([CHAT])  # its template ends no message
    with pytest.raises(TOPDError, match="fails at data row 7: no tools"):
        Replies(plain, frozenset([2])).check([CHAT, replace(CHAT, index=7, template_kwargs=kwargs)])


# Excerpts of what Qwen3, Llama 3.1 and Gemma 3 publish, as far as it concerns replies
QWEN = r"""
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == "tool" %}
        {{- "<|im_start|>user\n<tool_response>\n" + m.content + "\n</tool_response>" }}
    {%- elif m.role == "assistant" and loop.index0 > ns.last and loop.last %}
        {{- "<|im_start|>assistant\n<think>\n\n</think>\n\n" + m.content }}
    {%- else %}
        {{- "<|im_start|>" + m.role + "\n" + m.content }}
    {%- endif %}
    {{- "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- "<think>\n\n</think>\n\n" }}
    {%- endif %}
{%- endif %}"""
LLAMA = r"""
{%- for m in messages %}
    {{- "<|start|>" + ("ipython" if m.role == "tool" else m.role) + "<|sep|>" }}
    {{- m.content | tojson if m.role == "tool" else m.content | trim }}
    {{- "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start|>assistant<|sep|>" }}{% endif %}"""
GEMMA = r"""
{%- for m in messages %}
    {%- if (m.role == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant") }}
    {%- endif %}
    {{- "<start>" + ("model" if m.role == "assistant" else m.role) + "\n" + m.content | trim }}
    {{- "<end_of_turn>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<start>model\n" }}{% endif %}"""
MARKS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start|>", "<|sep|>", "<end_of_turn>"]
TOLD = ["27", "27\n", "", "a\nb", 'say "x" \\', "<|eot_id|> done <|im_end|>", "café 🙂"]


def published(template: str) -> tuple[Any, frozenset[int]]:
    """A tokenizer of bytes with a template, and the token that ends its turns."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = template
    (end,) = (m for m in MARKS if m in template and m in ("<|im_end|>", "<|eot_id|>", MARKS[-1]))
    return tokenizer, frozenset([tokenizer.convert_tokens_to_ids(end)])


@pytest.mark.parametrize(
    ("template", "role", "written"),
    [
        (
            QWEN,
            "tool",
            lambda text: (
                f"\n<|im_start|>user\n<tool_response>\n{text}\n</tool_response><|im_end|>\n"
                "<|im_start|>assistant\n"
            ),
        ),
        (
            LLAMA,
            "tool",
            lambda text: (
                f"<|start|>ipython<|sep|>{json.dumps(text, ensure_ascii=False)}<|eot_id|>"
                "<|start|>assistant<|sep|>"
            ),
        ),
        (
            GEMMA,
            "user",
            lambda text: f"\n<start>user\n{text.strip()}<end_of_turn>\n<start>model\n",
        ),
    ],
    ids=["qwen", "llama", "gemma"],
)
def test_published_templates_write_every_reply_in_one_role(template, role, written) -> None:
    tokenizer, ends = published(template)
    replies = Replies(tokenizer, ends)
    replies.check([CHAT])
    assert replies.role == role
    for text in TOLD:
        assert tokenizer.decode(list(replies.ids(text, CHAT))) == written(text)


def test_a_row_s_own_template_arguments_hold_in_every_turn() -> None:
    tokenizer, ends = published(QWEN)
    asked = {"prompt": [{"role": "user", "content": "3 * 9"}]}
    own = {**asked, "chat_template_kwargs": '{"enable_thinking": false}'}
    found = PromptEncoder(tokenizer, tokenizer, with_rows=True).encode([asked, own])
    turns = Turns(lambda row, turns: "27", Replies(tokenizer, ends), 2, 999, Sampling())
    turns.check(found)
    empty, turn = "<think>\n\n</think>\n\n", tuple(tokenizer("7<|im_end|>")["input_ids"])
    for thinks, prompt in zip((True, False), found, strict=True):
        assert tokenizer.decode(list(prompt.student)).endswith(empty) != thinks
        for index, row in enumerate((asked, own)):
            reply = turns.replies.ids("27", read_row(index, row))
            assert tokenizer.decode(list(reply)).endswith(empty) == bool(index)
            spans = turns.spans(prompt, turn + reply + turn)
            assert (spans == ((len(turn), len(turn + reply)),)) == (thinks != bool(index))


def test_what_a_conversation_says_holds_in_every_turn() -> None:
    """As SmolLM3's template reads in a system message whether the student thinks."""
    tokenizer, ends = published(QWEN)
    told = "'/no_think' in messages[0].content"
    tokenizer.chat_template = QWEN.replace("enable_thinking is defined and", f"{told} or")
    told = [{"role": "system", "content": "/no_think"}, *CHAT.prompt]
    replies = Replies(tokenizer, ends)
    for prompt, empty in ((CHAT.prompt, False), (told, True)):
        found = tokenizer.decode(list(replies.ids("27", replace(CHAT, prompt=prompt))))
        assert found.endswith("<think>\n\n</think>\n\n") == empty


GLM = r"""
{%- for m in messages %}
    {{- "<|observation|>\n" if m.role == "tool" else "<|" + m.role + "|>\n" }}{{ m.content }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>" }}{% endif %}"""


def test_a_reply_begins_where_the_student_s_own_end_was() -> None:
    """GLM's messages have no end: the next one's beginning ends a turn, or <|endoftext|> does."""
    tokenizer = byte_level()
    marks = ["<|user|>", "<|observation|>", "<|endoftext|>", "<|assistant|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = GLM
    user, tool, end = tokenizer.convert_tokens_to_ids(marks[:3])
    replies = Replies(tokenizer, frozenset([user, tool, end]))
    replies.check([CHAT])
    reply = "\n27<|assistant|>"
    for own, begun in ((tool, ""), (end, "<|observation|>"), (None, "")):
        assert tokenizer.decode(list(replies.ids("27", CHAT, own))) == begun + reply
    turns = Turns(lambda row, turns: "27", replies, 2, 999, Sampling())
    (prompt,) = PromptEncoder(tokenizer, tokenizer, with_rows=True).encode(
        [{"prompt": CHAT.prompt}]
    )
    for own in (tool, end):
        first = (*tokenizer("7")["input_ids"], own)
        told = replies.ids("27", CHAT, own)
        spans = turns.spans(prompt, first + told + first)
        assert spans == ((len(first), len(first + told)),)
    qwen, ends = published(QWEN)  # which ends its messages: another end is no reason to write it
    other = Replies(qwen, frozenset({*ends, qwen.eos_token_id}))
    assert other.ids("27", CHAT, qwen.eos_token_id) == other.ids("27", CHAT, *ends)


def test_every_kind_of_conversation_is_asked_for_a_reply() -> None:
    plain = with_template(ENDED.replace("no_tools %", "messages | length > 3 %"))
    talk = [{"role": "system", "content": "so"}, *CHAT.prompt]
    Replies(plain, frozenset([2])).check([CHAT])
    with pytest.raises(TOPDError, match="fails at data row 7: no tools"):
        Replies(plain, frozenset([2])).check([CHAT, replace(CHAT, index=7, prompt=talk)])


def test_a_teacher_whose_template_writes_replies_otherwise_is_told_of(caplog) -> None:
    tokenizer, ends = published(QWEN)
    prompts = PromptEncoder(tokenizer, tokenizer, with_rows=True).encode([{"prompt": CHAT.prompt}])
    plain = replace(prompts[0], row={"prompt": "what"})
    turns = Turns(lambda row, turns: "27", Replies(tokenizer, ends), 2, 999, Sampling())
    alike, other, mute = (published(QWEN)[0] for _ in range(3))
    other.chat_template = QWEN.replace("tool_response>", "tool>")
    mute.chat_template = "{{ raise_exception('no tools') }}"
    turns.check(prompts, [alike])
    turns.check([plain], [other])
    assert not caplog.records
    turns.check(prompts, [alike, other, mute])
    assert ["<tool>" in r.message for r in caplog.records] == [True, False]
    assert all("reads another format than its own" in r.message for r in caplog.records)


# Rollouts


def mirror(row: dict[str, Any], turns: Sequence[str]) -> str | None:
    """Replies with what it was told, three words of it."""
    assert row["prompt"] in TEXTS
    return " ".join(turns[-1].split()[:3]) or "x"


def observer_with(turns: int = 3, limit: int = LIMIT, **settings: Any) -> Observer:
    engines = [
        HFEngine(ModelSpec(path=f"testbed://programs/{role}").load_model(), eos_ids=[1])
        for role in ("student", "teacher")
    ]
    args = TOPDConfig(
        output_dir="unused", max_completion_length=limit, environment="test_turns:mirror",
        max_turns=turns, use_cpu=True, per_device_train_batch_size=8, window_length=8,
        candidate_fraction=0.3, **settings,
    )  # fmt: skip
    replies = Replies(tokenizer_of(FAMILY), frozenset([1]))
    return Observer(*engines, args, turns=Turns(mirror, replies, turns, limit, args.sampling))


def prompts_of(texts: Sequence[str] = TEXTS) -> list[Prompt]:
    tokenizer = tokenizer_of(FAMILY)
    ids = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    return [
        Prompt(i, p, p, row={"prompt": t}) for i, (p, t) in enumerate(zip(ids, texts, strict=True))
    ]


@pytest.fixture(scope="module")
def observer() -> Observer:
    return observer_with()


@pytest.fixture(scope="module")
def told(observer) -> list[Rollout]:
    found = observer.roll_out(prompts_of(), list(range(8)))
    assert sum(len(r.replies) for r in found) >= 8
    assert {r.finished for r in found} == {True, False}  # some are cut by the limit
    return found


def test_turns_and_replies_alternate_and_a_rollout_ends_with_the_student(observer, told) -> None:
    tokenizer, alone = tokenizer_of(FAMILY), replace(observer.turns, most=1)
    for rollout in told:
        assert len(rollout.response) == len(rollout.logprobs) <= LIMIT
        assert len(rollout.turns) == len(rollout.replies) + 1 <= 3
        for (first, end), turn in zip(rollout.replies, rollout.turns, strict=False):
            assert turn[-1] == 1
            assert rollout.response[first - 1] == 1
            words = tokenizer.decode(list(turn), skip_special_tokens=True).split()[:3]
            assert tokenizer.decode(list(rollout.response[first:end])).split() == words
            assert rollout.logprobs[first:end] == (0.0,) * (end - first)
        assert sum(rollout.own) == len(rollout.written)
        assert rollout.own[-1]
        assert rollout.finished == (rollout.response[-1] == 1)
        assert observer.turns.spans(rollout.prompt, rollout.response) == rollout.replies
        if rollout.replies:
            assert alone.spans(rollout.prompt, rollout.response) != rollout.replies


def test_log_probs_are_those_of_the_whole_conversation(observer, told) -> None:
    scores = observer.student.score(
        [r.prompt.student for r in told], [r.response for r in told], keep=False
    )
    for rollout, logprobs in zip(told, scores.logprobs, strict=True):
        own = torch.tensor(rollout.own)
        found = torch.tensor(rollout.logprobs)[own]
        torch.testing.assert_close(found, logprobs[: len(own)][own], atol=1e-4, rtol=1e-4)


def test_a_rollout_depends_on_its_own_seed_and_not_on_the_batch(observer, told) -> None:
    prompts = prompts_of()
    order = [5, 2, 7]
    found = observer.roll_out([prompts[i] for i in order], order)
    for i, rollout in zip(order, found, strict=True):
        assert rollout.response == told[i].response
        assert rollout.replies == told[i].replies
        torch.testing.assert_close(rollout.logprobs, told[i].logprobs, atol=1e-5, rtol=1e-5)


def test_no_batch_reaches_further_than_a_rollout_of_one_turn(observer, told, monkeypatch) -> None:
    write, reached = observer.student.generate, []

    def generate(prompts: Any, sampling: Any, *rest: Any, **more: Any) -> Any:
        reached.append(max(map(len, prompts)) + sampling.max_new_tokens)
        return write(prompts, sampling, *rest, **more)

    monkeypatch.setattr(observer.student, "generate", generate)
    assert observer.roll_out(prompts_of(), list(range(8))) == told
    assert max(reached) <= LIMIT + max(len(p.student) for p in prompts_of())
    assert len(reached) > 3  # so the second turn had more than one batch


def test_replies_that_leave_no_room_are_told_and_what_an_environment_does_to_a_row_is_its_own(
    observer, told, monkeypatch
) -> None:
    def takes(row: dict[str, Any], turns: Sequence[str]) -> str | None:
        row["parts"].pop()  # a second time there would be none
        return mirror({"prompt": row.pop("prompt")}, turns)

    said: list[str] = []
    monkeypatch.setattr(turning.logger, "warning_once", said.append)
    took = Observer(*(observer.student, observer.teacher), observer.args)
    took.turns = replace(observer.turns, environment=takes, limit=LIMIT)
    prompts = [replace(p, row={**p.row, "parts": [1]}) for p in prompts_of()]
    assert [r.response for r in took.roll_out(prompts, list(range(8)))] == [
        r.response for r in told
    ]
    said.clear()
    took.turns = replace(observer.turns, environment=lambda row, turns: "x " * LIMIT)
    assert not any(r.replies for r in took.roll_out(prompts_of(), list(range(8))))
    assert {line.partition(",")[0] for line in said} == {
        f"environment: a reply leaves the student no token of max_completion_length ({LIMIT})"
    }


# Learning


def experience_of(observer: Observer, told: Sequence[Rollout], name: str) -> Experience:
    method = METHODS[name]
    return observer.inspect(told, list(range(len(told))), method)


def loss_of(observer: Observer, experience: Experience) -> torch.Tensor:
    written = sum(len(r.written) for r in experience.rollouts)
    totals = Totals(written, sum(g.guided for g in experience.guidance))
    batch = collate(experience, range(len(experience.rollouts)), totals, CPU)
    model = observer.student.model
    model.zero_grad()
    return update_loss(
        learning_terms(model, batch, observer.teacher.head, observer.args), batch, observer.args
    )[0]


def test_loss_and_gradient_are_those_of_the_students_tokens_by_hand(observer, told) -> None:
    """Mean KL(p_S || p_T) over the student's tokens, from both models' own logits."""
    experience = experience_of(observer, told, "opd")
    loss = loss_of(observer, experience)
    loss.backward()
    model, teacher = observer.student.model, observer.teacher.model
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    terms = []
    for rollout in told:
        ids = torch.tensor([rollout.prompt.student + rollout.response])
        first = len(rollout.prompt.student) - 1
        own = model(input_ids=ids).logits[0, first:-1].log_softmax(-1)
        with torch.no_grad():
            theirs = teacher(input_ids=ids).logits[0, first:-1].log_softmax(-1)
        terms.append((own.exp() * (own - theirs)).sum(-1)[torch.tensor(rollout.own)])
    by_hand = torch.cat(terms).mean()
    by_hand.backward()
    torch.testing.assert_close(loss, by_hand, atol=1e-6, rtol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_no_method_looks_at_what_the_environment_wrote(observer, told, name) -> None:
    """The teacher's states and log-probs there may be anything; the loss stays as it is."""
    experience = experience_of(observer, told, name)
    for rollout, guide, forks in zip(told, experience.guidance, experience.forks, strict=True):
        own = rollout.own
        assert len(guide.weights) == len(own)
        for values in (guide.weights, guide.advantages):
            assert not any(x for x, mine in zip(values, own, strict=False) if not mine)
        places = [t.position for t in guide.targets] + [b.start for b in guide.branches]
        assert all(own[t] for t in (*places, *guide.capped, *(f.position for f in forks)))
        for fork in forks:
            end = rollout.turn_end(fork.position)
            assert fork.position + fork.student_length <= end
    loss = float(loss_of(observer, experience).detach())
    noise = torch.Generator().manual_seed(0)
    hidden = [
        torch.where(torch.tensor(r.own)[:, None], h, torch.randn(h.shape, generator=noise))
        for r, h in zip(told, experience.teacher_hidden, strict=True)
    ]
    other = replace(experience, teacher_hidden=tuple(hidden))
    assert float(loss_of(observer, other).detach()) == loss


def test_windows_and_replies_are_looked_for_in_every_turn(observer, told) -> None:
    forks = experience_of(observer, told, "topd").forks
    later = [f for r, row in zip(told, forks, strict=True) for f in row if r.replies and
             f.position >= r.replies[0][1]]  # fmt: skip
    assert later
    assert any(fork.student_length < 8 for row in forks for fork in row)


def test_the_figures_count_the_students_tokens_alone(observer, told) -> None:
    means = Means()
    experience = experience_of(observer, told, "opd")
    measure_experience(means, experience)
    found = means.take()
    written = [len(r.written) for r in told]
    assert found["completions/mean_length"] == sum(written) / 8
    assert found["completions/mean_turns"] == sum(len(r.turns) for r in told) / 8
    assert found["tokens/student_written"] == sum(written)
    pairs = zip(told, experience.teacher_logprobs, strict=True)
    gaps = [a - float(b) for r, p in pairs for a, b, own in zip(r.logprobs, p, r.own) if own]  # noqa: B905
    assert found["reverse_kl_sampled"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)
    batch = collate(experience, range(8), Totals(sum(written), 0), CPU)
    assert batch["lengths"] == written
    assert len(batch["tokens"]) == sum(written)


def test_a_method_that_would_learn_what_an_environment_wrote_is_refused() -> None:
    rollout = Rollout(Prompt(0, (5,), (5,)), (7, 1, 8, 8, 9, 1), (0.0,) * 6, True, ((2, 4),))

    def asked(**parts: Any) -> Guidance:
        (found,) = of_own_tokens([Guidance((1.0,) * 6, **parts)], [rollout], 20)
        return found

    target = SoftTarget(1, (3,), (1.0,))
    whole = Branch(0, rollout.response, "forward_kl")
    assert asked(targets=(target,)).weights == (1, 1, 0, 0, 1, 1)
    assert asked(branches=(replace(whole, tokens=(7, 1)), Branch(4, (8, 8, 8), "forward_kl")))
    for place, parts in [
        (2, {"targets": (replace(target, position=2),)}),
        (3, {"branches": (Branch(3, (9,), "forward_kl"),)}),
        (2, {"branches": (whole,)}),
    ]:
        with pytest.raises(TOPDError, match=f"a branch at token {place} of a rollout, which the"):
            asked(**parts)
        (found,) = of_own_tokens(
            [Guidance((1.0,) * 6, **parts)], [replace(rollout, replies=())], 20
        )
        assert found.weights == (1,) * 6


def test_a_random_place_is_one_of_the_mask() -> None:
    mask = torch.tensor([[True, False, False, False, False, True]])
    for token in range(20):
        tokens = torch.tensor([[token, 0, 0, 0, 0, 1]])
        moved = moved_to_random(torch.tensor([[1.0, 9, 9, 9, 9, 2.0]]), mask, tokens)
        assert int(moved.masked_fill(~mask, -9.0).argmax()) in (0, 5)
        assert float(moved.max()) == 2.0


# Runs: from the recipe to the page

RECIPE = {
    "student": "testbed://programs/student",
    "teacher": "testbed://programs/teacher",
    "data": {"path": "testbed://programs", "limit": 32},
    "environment": "testbed://programs",
    "max_turns": 3,
    "method": "first_fork",
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "max_completion_length": 100,
    "look_ahead_until": None,
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": 1,
    "use_cpu": True,
}
TIMES = ("seconds", "runtime", "per_second")


def trained(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({**RECIPE, "output_dir": str(folder / "run"), **changes}))
    return run_recipe(path, quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("turns"))


def read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if not any(t in k for t in TIMES)} for r in records]


def test_a_run_with_turns_is_recorded_audited_repeated_and_shown(run) -> None:
    records = [RolloutRecord(**line) for line in read(run / "rollouts.jsonl")]
    told = [i for i, record in enumerate(records) if record.replies]
    assert 3 <= len(told) < len(records)
    guidance = read(run / "guidance.jsonl")
    for record, asked in zip(records, guidance, strict=True):
        off = {t for first, end in record.replies for t in range(first, end)}
        assert all(asked["weights"].get(str(t)) == 0 for t in off)
    logs = read(run / "metrics.jsonl")
    assert all(log["completions/mean_turns"] > 1 for log in logs if "loss" in log and told)
    for found in (audit_run(run, updates=3), replay_step(run, 2)):
        assert not found.faults
    console = Console(record=True, width=100)
    show(run, told[0], console)
    told_in_terminal = " ".join(console.export_text().split())
    assert "italic: the environment" in told_in_terminal
    first = records[told[0]]
    own = sum(not first.is_reply(t) for t in range(len(first.response_ids)))
    turns = f"in {len(first.replies) + 1} turns ({own} by the student)"
    assert f"{len(first.response_ids)} tokens {turns}" in told_in_terminal
    page = write_report(run).read_text()
    assert "written by the environment" in page


def test_forged_replies_are_found(run, tmp_path) -> None:
    """Where the mask was moved, or hides a student's turn, even if nothing else was changed."""

    def moved(record: dict[str, Any]) -> None:
        (first, end), *rest = record["replies"]
        record["replies"] = [[first + 1, end], *rest]

    def hidden(record: dict[str, Any]) -> None:
        del record["replies"]

    number = next(i for i, r in enumerate(read(run / "rollouts.jsonl")) if "replies" in r)
    for n, change in enumerate((moved, hidden)):
        place = tmp_path / str(n)
        shutil.copytree(run.parent, place)
        with contextlib.chdir(place):
            edit_record(Path("run/rollouts.jsonl"), number, change)
            chain_again()
            faults = audit_run(Path("run"), updates=3).faults
        assert any("its replies are not those of the environment" in fault for fault in faults)


def test_a_resumed_run_is_the_run_that_was_not_stopped(run, tmp_path) -> None:
    folder = trained(tmp_path, max_steps=3)
    for later in (folder / "checkpoint-3", folder / "checkpoint-2", folder / "student"):
        shutil.rmtree(later)
    trained(tmp_path, resume_from_checkpoint="last")
    for name in ("rollouts.jsonl", "guidance.jsonl", "metrics.jsonl"):
        assert read(folder / name) == read(run / name)
    ours, theirs = (load_file(f / "student/model.safetensors") for f in (folder, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def silent(row: Any, turns: Sequence[str]) -> None:
    """Has nothing to say."""


def test_an_environment_that_never_replies_changes_nothing(tmp_path) -> None:
    found = {}
    for name in (None, "test_turns:silent"):
        (tmp_path / str(name)[:4]).mkdir()
        folder = trained(tmp_path / str(name)[:4], environment=name, max_turns=4, max_steps=2)
        weights = load_file(folder / "student/model.safetensors")
        parts = [read(folder / f"{part}.jsonl") for part in ("rollouts", "guidance", "metrics")]
        found[name] = parts, weights
    for log in found["test_turns:silent"][0][2]:
        assert "loss" not in log or log.pop("completions/mean_turns") == 1.0
    assert found[None][0] == found["test_turns:silent"][0]
    both = [found[name][1] for name in found]
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])


def empty(row: Any, turns: Sequence[str]) -> str:
    """What a tool says that prints nothing."""
    return ""


def test_an_empty_reply_is_one_of_no_tokens_and_is_recorded_and_audited(tmp_path) -> None:
    changes = {"max_turns": 2, "max_steps": 1, "method": "opd", "save_strategy": "no"}
    folder = trained(tmp_path, environment="test_turns:empty", **changes)
    spans = [RolloutRecord(**line).replies for line in read(folder / "rollouts.jsonl")]
    assert any(spans)
    assert all(first == end for record in spans for first, end in record)
    assert not audit_run(folder, trust=Trust(remote_code=True)).faults


def test_every_end_that_the_students_spec_names_ends_a_turn(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    spec = ModelSpec(path=str(tmp_path), eos_token=("</s>", "<|user|>"))
    args = TOPDConfig(output_dir="unused", environment="calculator", use_cpu=True)
    turns = turns_of(args, [spec, spec], spec.load_tokenizer())
    assert turns.replies.ends == {2, 4}


# What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"environment": None}, "max_turns: has no effect without environment"),
        ({"max_turns": 1}, "max_turns: 1 leaves the environment nothing"),
        ({"max_turns": 0}, "max_turns"),
        ({"teacher_share": 0.5}, "teacher_share: does not go with environment"),
        ({"window_rejoin": 2}, "window_rejoin: does not go with environment"),
        ({"window_replay": 2, "save_strategy": "no"}, "window_replay: does not go with"),
        ({"overlap": True}, "overlap: does not go with environment"),
        ({"environment": "abacus"}, "'abacus' is not one of calculator"),
        ({"environment": "testbed://chess"}, "has no family 'chess'"),
        ({"environment": "no_such_module:reply"}, "cannot be imported"),
        (
            {"evaluation": {"path": "testbed://programs", "max_tokens": 8}},
            "evaluation: asks for one turn",
        ),
    ],
)
def test_what_does_not_go_with_turns_is_refused(tmp_path, changes, said) -> None:
    with pytest.raises(TOPDError, match=said):
        trained(tmp_path, **changes)
    assert not (tmp_path / "run" / "rollouts.jsonl").exists()


def test_a_warm_start_and_an_analysis_have_no_turns(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    stage = {"answers": "data", "environment": "calculator"}
    path.write_text(json.dumps({**RECIPE, "warmstart": stage}))
    with pytest.raises(TOPDError, match="answers written beforehand have one turn"):
        read_recipe(path, warmstart=True)
    with pytest.raises(TOPDError, match="an analysis looks at rollouts of one turn"):
        read_recipe(path, {"window_length": 8}, config=ProbeConfig)


def test_served_models_and_replies_that_are_no_text_are_refused() -> None:
    args = TOPDConfig(output_dir="unused", environment="calculator", use_cpu=True)
    served = ModelSpec(path="x", served={"completions": ["http://localhost:1"]})
    with pytest.raises(TOPDError, match="needs student and teacher in this process"):
        turns_of(args, [ModelSpec(path="y"), served], tiny_tokenizer())
    observer = observer_with()
    observer.turns = replace(observer.turns, environment=lambda row, turns: 3)
    with pytest.raises(TOPDError, match=r"data row [0-7]: replied 3\. Return a text, which may be"):
        observer.roll_out(prompts_of(), list(range(8)))


def test_half_a_character_in_a_reply_is_refused_in_words() -> None:
    """As output of a command has it that is decoded with surrogateescape."""
    observer = observer_with()
    observer.turns = replace(observer.turns, environment=lambda row, turns: "so \udcff")
    with pytest.raises(TOPDError, match=r"row [0-7]: replied a text with half a character: 'so"):
        observer.roll_out(prompts_of(), list(range(8)))


@pytest.mark.parametrize(("reply", "told"), [("so </s> then", True), ("so < / s > then", False)])
def test_the_name_of_a_special_token_in_a_reply_is_told_of(reply, told, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(turning.logger, "warning_once", said.append)
    observer = observer_with()
    observer.turns = replace(observer.turns, environment=lambda row, turns: reply)
    assert "</s>" in observer.turns.replies.tokenizer.all_special_tokens
    observer.roll_out(prompts_of(), list(range(8)))
    assert any("a reply has '</s>' in it, which is read as that" in one for one in said) == told


def test_an_audit_runs_no_foreign_environment_without_leave(tmp_path) -> None:
    folder = trained(tmp_path, environment="test_turns:silent", max_steps=1, save_strategy="no")
    with pytest.raises(TOPDError, match="its environment 'test_turns:silent' is code of its own"):
        audit_run(folder)
    assert not audit_run(folder, trust=Trust(remote_code=True)).faults


def test_a_chat_template_that_cannot_reply_is_refused_before_learning(tmp_path) -> None:
    messages = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows(4)]
    args = TOPDConfig(output_dir=str(tmp_path), environment="calculator", use_cpu=True)
    args.max_completion_length = 64
    with pytest.raises(TOPDError, match="writes no message of a tool or a user"):
        TOPDTrainer(
            tiny_model(seed=0),
            tiny_model(seed=1),
            args,
            messages,
            processing_class=tiny_tokenizer(),
        )
