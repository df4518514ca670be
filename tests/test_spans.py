"""Token losses across tokenizers, by the spans of text that both have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from conftest import read, tiny_model, write_pair
from test_text import TEACHER, TOKENIZERS, byte_level, learned
from topd.cli import app
from topd.engines import Scores
from topd.engines.hf import HFEngine
from topd.engines.text.spans import SpanReader, aligned
from topd.errors import TOPDError
from topd.inputs.border import Border
from topd.inputs.models import ModelSpec
from topd.training.experience.evidence import by_token_loss, where_told
from topd.types import Guidance, Ids, Prompt, Rollout

SPANS = {"token_loss": "spans", "method": "opd", "trajectory_weight": 0.0}


# Alignment


def test_spans_close_where_both_split_and_a_character_is_not_split():
    """Student so| the| answ|er; teacher s|o| the answer. Of é's two bytes the first is no end."""
    assert aligned([2, 6, 11, 13], [1, 2, 13], 13) == (((0, 1), (1, 4)), ((0, 2), (2, 3)))
    assert aligned([1, 1, 2], [1, 2], 2) == (((0, 1), (1, 3)), ((0, 1), (1, 2)))
    assert aligned([1, 3], [1, 2, 3], 2) == (((0, 1),), ((0, 1),))  # past the limit: none
    assert aligned([1, 1], [1], 1) == (((0, 1),), ((0, 1),))  # cut off inside a character


def reader(student: Any, teacher: Any, rows: int) -> SpanReader:
    engine = HFEngine(tiny_model(seed=1, vocab=rows), eos_ids=[teacher.eos_token_id])
    return SpanReader(engine, (student, teacher), frozenset([student.eos_token_id]))


@pytest.mark.parametrize("other", ["pieces", "pieces, no first blank"])
@pytest.mark.parametrize("text", ["so the answer is 12.\n", " Naïve café — 東京 é", "x"])
def test_a_span_reads_alike_in_both_and_all_of_a_text_has_one(other, text):
    student, teacher = TOKENIZERS["bytes"], TOKENIZERS[other]
    ids = Border(student).ids((), text) or ()
    end = (student.eos_token_id,)
    found = reader(student, teacher, len(teacher)).align(ids + end)
    own, theirs = Border(student), Border(teacher)
    assert found.own[0][0] == found.theirs[0][0] == 0
    for spans, count in ((found.own, len(ids) + 1), (found.theirs, len(found.ids))):
        assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]]
        assert spans[-1] == (count - 1, count)
    assert found.ids[-1] == teacher.eos_token_id
    for (_, a), (_, b) in zip(found.own[:-1], found.theirs[:-1], strict=True):
        assert own.text(ids[:a]) == theirs.text(found.ids[:b])


def test_what_cannot_be_aligned_has_no_span():
    student, teacher = TOKENIZERS["bytes"], TOKENIZERS["pieces"]
    spans = reader(student, teacher, len(teacher))
    own, end = Border(student), student.eos_token_id
    ids, more = own.ids((), "so the") or (), own.ids((), "東") or ()
    assert spans.align((*ids, *more[:1])).own[-1][1] == len(ids)  # a byte of three
    assert spans.align((*ids, *more[:1], end)).own[-1][1] == len(ids)
    assert spans.align((*ids, *more[:1], *ids, end)).own[-1][1] == len(ids)  # amid the text
    assert spans.align((*ids, end, *ids)).own[-1][1] == len(ids)  # a special token inside
    unknown = own.ids((), "so <unk> the") or ()  # the name of one of the teacher's
    assert own.text(unknown[: spans.align(unknown).own[-1][1]]) == "so "
    assert spans.align((end,)) == ((teacher.eos_token_id,), ((0, 1),), ((0, 1),))
    assert spans.align(()).own == ()


def test_a_reader_sums_the_teachers_own_log_probs_after_its_own_prompt():
    student, teacher = TOKENIZERS["bytes"], TOKENIZERS["pieces"]
    spans, prompts = reader(student, teacher, len(teacher)), [(7, 8), (9,)]
    ids = Border(student).ids((), "so the answer") or ()
    rows: list[Ids] = [ids, (Border(student).ids((), "東") or ())[:1]]
    (own, told), (none, nothing) = spans.read(prompts, rows)
    assert none == ()
    assert nothing == []
    theirs = spans.align(ids)
    assert own == theirs.own
    assert max(b - a for a, b in theirs.theirs) > 1  # a sum among them
    with torch.no_grad():
        logits = spans.engine.model(torch.tensor([[7, 8, *theirs.ids]])).logits[0, 1:-1]
    single = logits.double().log_softmax(-1).gather(1, torch.tensor(theirs.ids)[:, None])[:, 0]
    assert told == pytest.approx([float(single[a:b].sum()) for a, b in theirs.theirs], abs=1e-5)


def test_a_response_that_is_too_long_for_the_teacher_has_no_span():
    student, teacher = TOKENIZERS["bytes"], TOKENIZERS["pieces"]
    spans = reader(student, teacher, len(teacher))
    ids = Border(student).ids((), "so the answer") or ()
    room = 512 - len(spans.align(ids).ids)
    (one, told), (none, nothing) = spans.read([(7,) * room, (7,) * (room + 1)], [ids, ids])
    assert len(one) == len(told) > 1
    assert none == ()
    assert nothing == []


def test_a_log_prob_that_is_nan_is_no_agreement():
    student, teacher = TOKENIZERS["bytes"], TOKENIZERS["pieces"]
    spans = reader(student, teacher, len(teacher))
    with torch.no_grad():
        spans.engine.model.model.norm.weight[0] = torch.nan
    with pytest.raises(TOPDError, match="teacher: NaN log-prob in a span of response 0"):
        spans.read([(7,)], [Border(student).ids((), "so") or ()])


# The loss


def estimate(logits: Tensor, tokens: Ids, weights: Any, advantages: Any) -> Tensor:
    """-sum_t a_t log p_S(y_t), as the learning phase has it."""
    own = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert not any(weights)
    return -(torch.tensor(advantages, dtype=own.dtype) * own).sum()


def test_the_loss_and_its_gradient_by_hand():
    """Tokens a|b|c|d, spans [a], [b c], and d in none; the teacher tells -1 of a and -5 of b c.

    With the student's log-probs -2, -0.5, -0.5, -3: D = 1 of a, -5 + 1 = -4 of b and of c, 0 of d.
    The gradient by a token's logits is weight D (p - onehot).
    """
    student = (-2.0, -0.5, -0.5, -3.0)
    rollout = Rollout(Prompt("x", (1,), (1,)), (0, 1, 2, 3), student, finished=False)
    told = torch.tensor([[-1.0, -2.5, -2.5, torch.nan]])
    spans = (((0, 1), (1, 3)),)
    scores = Scores(torch.zeros(1, 4, 2), told, torch.zeros(1, 4).long(), None, spans)
    read = where_told(scores, [rollout], "logprobs").logprobs
    assert read[0].tolist() == [-1.0, -2.5, -2.5, -3.0]  # -0.5 - 4 / 2 of each token of the span
    asked = [Guidance((1.0, 1.0, 0.5, 1.0))]
    (guide,) = by_token_loss("spans", asked, [rollout], list(read), spans)
    assert guide.advantages == (1.0, -4.0, -2.0, 0.0)  # 0.5 is a weight of the method's
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    estimate(logits, rollout.response, guide.weights, guide.advantages).backward()
    assert logits.grad is not None
    hand = torch.tensor(guide.advantages)[:, None] * (
        logits.detach().softmax(-1) - torch.eye(5, dtype=torch.float64)[:4]
    )
    torch.testing.assert_close(logits.grad, hand, rtol=0, atol=1e-6)


def test_tokens_of_a_span_differ_by_as_much_and_sum_to_what_was_told():
    rollout = Rollout(Prompt("x", (1,), (1,)), (0, 1, 2), (-3.0, -0.1, -1.0), finished=False)
    told = torch.tensor([[-2.5, -2.5, -4.0]])
    scores = Scores(torch.zeros(1, 3, 2), told, torch.zeros(1, 3).long(), None, (((0, 2), (2, 3)),))
    read = where_told(scores, [rollout], "logprobs").logprobs[0]
    assert (read - torch.tensor(rollout.logprobs)).tolist() == pytest.approx([-0.95, -0.95, -3.0])
    assert float(read[:2].sum()) == pytest.approx(-5.0)


def test_the_span_estimate_has_the_gradient_of_the_reverse_kl_of_whole_spans():
    """Over all texts of two tokens its mean is the exact gradient of KL(p_S, p_T) of the pair."""
    torch.manual_seed(0)
    first = torch.randn(3, dtype=torch.float64, requires_grad=True)
    second = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(9, dtype=torch.float64).log_softmax(0).reshape(3, 3)
    student = first.log_softmax(0)[:, None] + second.log_softmax(1)
    exact = torch.autograd.grad((student.exp() * (student - teacher)).sum(), (first, second))
    total = torch.zeros((), dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            s = (first.log_softmax(0)[a].item(), second[a].log_softmax(0)[b].item())
            rollout = Rollout(Prompt("x", (1,), (1,)), (a, b), s, finished=False)
            shared = torch.full((2,), float(teacher[a, b]) / 2, dtype=torch.float64)
            asked = [Guidance((1.0, 1.0))]
            (guide,) = by_token_loss("spans", asked, [rollout], [shared], [((0, 2),)])
            logits = torch.stack([first, second[a]])
            loss = estimate(logits, (a, b), guide.weights, guide.advantages)
            total = total + student[a, b].exp().detach() * loss
    for ours, theirs in zip(torch.autograd.grad(total, (first, second)), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


# Runs


def test_where_every_token_is_a_span_it_is_token_loss_sampled(tmp_path):
    """Loss, records and gradient to 1e-6: one tokenizer, whose words are the testbed's."""
    found = {}
    for name, teacher, loss in (
        ("sampled", {"path": TEACHER}, "sampled"),
        ("spans", {"path": TEACHER, "as_text": True}, "spans"),
    ):
        (tmp_path / name).mkdir()
        _, gradient = learned(tmp_path / name, teacher, **{**SPANS, "token_loss": loss})
        files = [tmp_path / name / "run" / f"{f}.jsonl" for f in ("rollouts", "guidance")]
        found[name] = gradient, [read(file) for file in files]
    (gradient, (rollouts, guidance)), (theirs, (others, guided)) = found.values()
    assert max(float(g.abs().max()) for g in gradient.values()) > 1e-3
    assert any(row["finished"] for row in rollouts)  # the end is a span too
    for name, values in gradient.items():
        torch.testing.assert_close(theirs[name], values, rtol=0, atol=1e-6)
    for a, b in zip(rollouts, others, strict=True):
        assert b["teacher_logprobs"] == pytest.approx(a["teacher_logprobs"], abs=1e-6)
    for a, b in zip(guidance, guided, strict=True):
        assert b["advantages"] == pytest.approx(a["advantages"], abs=1e-6)
    (log,) = [x for x in read(tmp_path / "spans/run/metrics.jsonl") if "loss" in x]
    assert log["completions/share_in_spans"] == 1.0


def made_pair(root: Path) -> None:
    """A student of words, and a teacher of bytes."""
    write_pair(root)
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tiny_model(seed=1, vocab=len(tokenizer)).save_pretrained(root / "teacher")
    tokenizer.save_pretrained(root / "teacher")


@pytest.mark.parametrize("changes", [SPANS, {"token_loss": "spans", "method": "window_sft"}])
def test_a_pair_of_tokenizers_trains_and_its_run_is_audited_and_replayed(tmp_path, changes):
    made_pair(tmp_path)
    pair = {"student": str(tmp_path / "student"), "data": str(tmp_path / "prompts.jsonl")}
    teacher = {"path": str(tmp_path / "teacher"), "as_text": True}
    _, gradient = learned(tmp_path, teacher, **pair, **changes, max_steps=2)
    assert max(float(g.abs().max()) for g in gradient.values()) > 1e-4
    logs = [log for log in read(tmp_path / "run/metrics.jsonl") if "loss" in log]
    assert all(0 < log["completions/share_in_spans"] <= 1 for log in logs)
    guidance = read(tmp_path / "run/guidance.jsonl")
    assert any(any(row["advantages"]) for row in guidance)
    for verb, *options in (("audit",), ("replay", "--step", "0")):
        result = CliRunner().invoke(app, [verb, str(tmp_path / "run"), *options])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("teacher", "changes", "said"),
    [
        ({"path": TEACHER}, {}, "token_loss: spans is for a teacher in this process"),
        ({"text": {"url": "http://127.0.0.1:9", "logprobs": True}}, {}, "set token_loss: full"),
        ({"path": TEACHER, "as_text": True}, {"temperature": 0.7}, "Set temperature: 1"),
        ({"path": TEACHER, "as_text": True}, {"beta": 0.5}, "beta: has no effect with"),
        ({"path": TEACHER, "as_text": True}, {"method": "kl_top"}, "kl_top needs distributions"),
        ({"path": TEACHER, "as_text": True}, {"method": "window_kd"}, "needs distributions"),
        ({"path": TEACHER, "as_text": True}, {"environment": "calculator"}, "does not go with env"),
    ],
)
def test_what_spans_do_not_go_with_is_refused_before_weights_load(
    tmp_path, monkeypatch, teacher, changes, said
):
    monkeypatch.setattr(ModelSpec, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(TOPDError, match=said):
        learned(tmp_path, teacher, **{**SPANS, **changes})
