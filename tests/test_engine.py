"""The embedded engine against transformers' own generate, single forwards and exact frequencies."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from scipy.stats import chi2
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from conftest import DEVICE, EOS, TINY, USE_CPU, VOCAB, cpu_only, greedy_by_transformers, tiny_model
from conftest import torch_on_device as torch
from topd.engines import Engine, decoding, draws, hf, windows
from topd.engines import packed as packing
from topd.errors import TOPDError
from topd.inputs.models.heads import head_of
from topd.types import Effort, Generation, Ids, Sampling

HFEngine = functools.partial(hf.HFEngine, graphs=False)  # with them: test_graphs.py
PROMPTS: list[Ids] = [(1, 9, 23, 41, 5), (1, 8), (1, 30, 31, 32, 33, 34, 35, 36, 7), (1,)]
RESPONSES: list[Ids] = [(11, 12, 13), (40, 41, 42, 43, 44, 45, 46), (50,), (9, 3, 9, 3)]
STARTS = [(b, t) for b, response in enumerate(RESPONSES) for t in range(len(response))]
SEEDS = range(100, 100 + len(STARTS))  # of texts whose log-probs rounding moves little
GREEDY = Sampling(temperature=0.0, max_new_tokens=7)
NEVER: Ids = ()  # no end of sequence
MANY_ENDS: Ids = tuple(range(2, VOCAB, 6))  # rows leave the batch at different steps


@pytest.fixture(autouse=True, params=["plain", "packed"] if USE_CPU else ["plain"])
def weights(request, monkeypatch) -> str:
    """Every test writes with weights as they are, and with the packed copies of larger models."""
    if request.param == "packed":
        monkeypatch.setattr(packing, "LEAST", 1)
        monkeypatch.setattr(packing, "LEAST_MODEL", 1)
    return request.param


@pytest.fixture
def model(model_kind) -> PreTrainedModel:
    return tiny_model(model_kind)


@functools.cache
def engine_of(kind: str, *, seed: int = 0, eos_ids: Ids = (EOS,)) -> hf.HFEngine:
    return HFEngine(tiny_model(kind, seed=seed), eos_ids=eos_ids)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Ids) -> Tensor:
    """[L V] from one forward of one unpadded row, without a cache."""
    return model(torch.tensor([ids]), use_cache=False).logits[0]


def greedy_by_hand(model: PreTrainedModel, ids: Ids, steps: int, eos_ids: Ids) -> Ids:
    """The likeliest tokens, every one from a fresh forward of the whole row."""
    written: Ids = ()
    while len(written) < steps and not (written and written[-1] in eos_ids):
        written += (int(logits_of(model, ids + written)[-1].argmax()),)
    return written


def cut(b: int, t: int) -> Ids:
    return PROMPTS[b] + RESPONSES[b][:t]


def tokens_of(generations: list[Generation]) -> list[Ids]:
    return [one.tokens for one in generations]


def assert_same_text(found: list[Generation], expected: list[Generation]) -> None:
    """Bit-equal tokens; log-probs to rounding."""
    assert tokens_of(found) == tokens_of(expected)
    assert [one.finished for one in found] == [one.finished for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, rel=1e-5, abs=2e-5)


@contextmanager
def fed(model: PreTrainedModel) -> Iterator[list[tuple[int, ...]]]:
    """The shape of every batch of tokens that the decoder reads."""
    shapes: list[tuple[int, ...]] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    try:
        yield shapes
    finally:
        hook.remove()


# ---- greedy text ------------------------------------------------------------------------------


def test_greedy_generation_of_a_ragged_batch_is_that_of_transformers(model):
    found = HFEngine(model, eos_ids=[EOS]).generate(PROMPTS, GREEDY, range(4))
    assert tokens_of(found) == [greedy_by_transformers(model, p, 7) for p in PROMPTS]


def test_greedy_continuation_from_every_token_is_generation_from_the_cut_prefix(model):
    engine = HFEngine(model, eos_ids=[EOS])
    scores = engine.score(PROMPTS, RESPONSES)
    found = engine.continue_from(scores, STARTS, GREEDY, range(len(STARTS)))
    assert tokens_of(found) == [greedy_by_transformers(model, cut(b, t), 7) for b, t in STARTS]


def test_cached_decoding_is_that_of_fresh_forwards(model):
    engine = HFEngine(model, eos_ids=MANY_ENDS)
    scores = engine.score(PROMPTS, RESPONSES)
    found = engine.continue_from(scores, STARTS, GREEDY, range(len(STARTS)))
    expected = [greedy_by_hand(model, cut(b, t), 7, MANY_ENDS) for b, t in STARTS]
    assert tokens_of(found) == expected
    assert len({len(tokens) for tokens in expected}) > 2  # rows do leave at different steps


def test_greedy_text_does_not_depend_on_seeds(model_kind):
    engine = engine_of(model_kind)
    assert engine.generate(PROMPTS, GREEDY, [0] * 4) == engine.generate(PROMPTS, GREEDY, range(4))


# ---- continuation -----------------------------------------------------------------------------

WARM = Sampling(temperature=1.2, max_new_tokens=9)


def test_sampled_continuation_is_generation_from_the_cut_prefix_with_the_same_seed(model_kind):
    engine = engine_of(model_kind, eos_ids=MANY_ENDS)
    seeds = SEEDS
    scores = engine.score(PROMPTS, RESPONSES)
    found = engine.continue_from(scores, STARTS, WARM, seeds)
    assert_same_text(found, engine.generate([cut(b, t) for b, t in STARTS], WARM, seeds))


def test_a_window_does_not_depend_on_other_windows_or_their_order(model_kind):
    engine = engine_of(model_kind, eos_ids=MANY_ENDS)
    scores = engine.score(PROMPTS, RESPONSES)
    seeds = list(SEEDS)
    together = engine.continue_from(scores, STARTS, WARM, seeds)
    reverse = engine.continue_from(scores, STARTS[::-1], WARM, seeds[::-1])
    assert_same_text(reverse[::-1], together)
    for start, seed, expected in zip(STARTS, seeds, together, strict=True):
        assert_same_text(engine.continue_from(scores, [start], WARM, [seed]), [expected])


def test_a_window_does_not_depend_on_what_else_was_scored(model_kind):
    engine = engine_of(model_kind)
    batch = engine.continue_from(engine.score(PROMPTS, RESPONSES), [(3, 2)], WARM, [5])
    alone = engine.continue_from(engine.score(PROMPTS[3:], RESPONSES[3:]), [(0, 2)], WARM, [5])
    assert_same_text(batch, alone)


def test_continuing_leaves_the_scores_as_they_were(model_kind):
    engine = engine_of(model_kind)
    scores = engine.score(PROMPTS, RESPONSES)
    first = engine.continue_from(scores, STARTS, WARM, range(len(STARTS)))
    assert engine.continue_from(scores, STARTS, WARM, range(len(STARTS))) == first


def test_continuing_reads_no_token_again(model):
    """The prompt and the response are read once; then one new token a window and a step."""
    engine = HFEngine(model, eos_ids=NEVER)
    with fed(model) as shapes:
        scores = engine.score(PROMPTS, RESPONSES)
        assert shapes == [(4, max(len(p + r) for p, r in zip(PROMPTS, RESPONSES, strict=True)))]
        shapes.clear()
        engine.continue_from(scores, STARTS, WARM, range(len(STARTS)))
    assert shapes == [(len(STARTS), 1)] * (WARM.max_new_tokens - 1)


def test_a_row_that_has_ended_is_no_longer_fed(model):
    engine = HFEngine(model, eos_ids=MANY_ENDS)
    with fed(model) as shapes:
        written = engine.generate(PROMPTS * 4, WARM, range(16))
    alive = [sum(len(one.tokens) > step for one in written) for step in range(1, 9)]
    assert shapes == [(16, 9)] + [(count, 1) for count in alive if count]
    assert 0 < alive[0] < 16


@pytest.mark.parametrize("at_once", [1, 4])
def test_more_windows_than_decode_at_once_go_in_turns(model, monkeypatch, at_once):
    engine = HFEngine(model, eos_ids=NEVER)
    scores, seeds = engine.score(PROMPTS, RESPONSES), SEEDS
    expected = engine.continue_from(scores, STARTS, WARM, seeds)
    monkeypatch.setattr(hf, "WINDOWS_AT_ONCE", at_once)
    with fed(model) as shapes:
        found = engine.continue_from(scores, STARTS, WARM, seeds)
    assert_same_text(found, expected)
    assert max(count for count, _ in shapes) == at_once


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_where_memory_runs_out_fewer_windows_go_at_a_time(model, monkeypatch, caplog, fault):
    engine = HFEngine(model, eos_ids=NEVER)
    scores, seeds = engine.score(PROMPTS, RESPONSES), SEEDS
    expected = engine.continue_from(scores, STARTS, WARM, seeds)
    right, asked = windows.open_windows, []

    def small(starts, *args, **kwargs):
        asked.append(len(starts))
        if len(starts) > 2:
            raise fault
        return right(starts, *args, **kwargs)

    monkeypatch.setattr(windows, "open_windows", small)
    assert_same_text(engine.continue_from(scores, STARTS, WARM, seeds), expected)
    assert asked[0] == len(STARTS)
    assert max(asked[-2:]) <= 2


def test_memory_for_not_even_one_window_and_other_faults_are_raised(model, monkeypatch):
    engine = HFEngine(model, eos_ids=NEVER)
    scores = engine.score(PROMPTS, RESPONSES)
    for text in ("CUDA out of memory. Tried", "shapes do not match"):
        calls = []

        def fail(*_, text=text, calls=calls, **__):
            calls.append(1)
            raise RuntimeError(text)

        monkeypatch.setattr(windows, "open_windows", fail)
        with pytest.raises(RuntimeError, match=text):
            engine.continue_from(scores, STARTS, WARM, range(len(STARTS)))
        halves = len(STARTS).bit_length()  # all of them, half as many, ..., 1
        assert len(calls) == (halves if "memory" in text else 1)


@pytest.fixture(params=["alone", "shared"])
def share(request, monkeypatch) -> str:
    """Whether windows of one response have rows of their own or are packed into one."""
    if request.param == "shared":
        monkeypatch.setattr(decoding, "least_cost", lambda counts, _: max(counts))
    return request.param


def nearly(engine: hf.HFEngine, sampling: Sampling, seed: int) -> Ids:
    """What the engine itself writes, with some tokens changed: drafts that hold for a while."""
    (written,) = engine.generate([PROMPTS[0]], replace(sampling, max_new_tokens=40), [seed])
    return tuple(7 if i in (5, 6, 19) else token for i, token in enumerate(written.tokens))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8), Sampling(1.0, 0.9, 20)])
@pytest.mark.parametrize("budget", [0, 16, 1000])
def test_blocks_of_the_draft_are_verified_exactly(model_kind, monkeypatch, share, sampling, budget):
    """Token for token what is written one by one; all windows draw the numbers of their draft."""
    monkeypatch.setitem(decoding.FREE, DEVICE.type, budget)
    engine = engine_of(model_kind, eos_ids=NEVER)
    sampling, seed = replace(sampling, max_new_tokens=30), 3
    response = nearly(engine, sampling, seed)
    starts = [(0, t) for t in (20, 0, 6, 7)] + [(1, 2)]
    seeds = [seed] * len(starts)
    scores = engine.score([PROMPTS[0], PROMPTS[1]], [response, RESPONSES[0]])
    found = engine.continue_from(scores, starts, sampling, seeds)
    cuts = [PROMPTS[0] + response[:t] for _, t in starts[:-1]] + [PROMPTS[1] + RESPONSES[0][:2]]
    expected = engine.generate(cuts, sampling, seeds)
    assert tokens_of(found) == tokens_of(expected)
    for one, other in zip(found, expected, strict=True):  # 30 tokens deep in float32
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    for one, start in zip(found, cuts, strict=True):
        expected = engine.score([start], [one.tokens]).hidden[0]
        torch.testing.assert_close(one.hidden, expected, atol=1e-4, rtol=1e-4)
    if budget == 0:
        assert [one.effort.forwards for one in found] == [29] * 5


def test_a_draft_that_holds_saves_forwards(model):
    engine = HFEngine(model, eos_ids=NEVER)
    sampling = Sampling(0.0, max_new_tokens=30)
    (written,) = engine.generate([PROMPTS[0]], sampling, [0])
    scores = engine.score([PROMPTS[0]], [written.tokens])
    with fed(model) as shapes:
        (found,) = engine.continue_from(scores, [(0, 0)], sampling, [0])
    assert found.tokens == written.tokens
    assert found.effort == Effort(positions=29, forwards=len(shapes))
    assert len(shapes) < 8
    assert sum(length for _, length in shapes) == 29  # nothing was read in vain


def test_windows_that_share_a_row_read_its_cache_once(model, monkeypatch):
    monkeypatch.setattr(decoding, "least_cost", lambda counts, _: max(counts))
    engine = HFEngine(model, eos_ids=NEVER)
    scores = engine.score(PROMPTS, RESPONSES)
    with fed(model) as shapes:
        found = engine.continue_from(scores, STARTS, WARM, range(len(STARTS)))
    assert {rows for rows, _ in shapes} == {4}
    expected = engine.generate([cut(b, t) for b, t in STARTS], WARM, range(len(STARTS)))
    assert_same_text(found, expected)


def test_eager_attention_continues_like_any_other(share):
    model = tiny_model(attn_implementation="eager")
    engine, other = HFEngine(model, eos_ids=MANY_ENDS), engine_of("qwen3", eos_ids=MANY_ENDS)
    found = engine.continue_from(engine.score(PROMPTS, RESPONSES), STARTS, WARM, range(15))
    assert_same_text(found, other.generate([cut(b, t) for b, t in STARTS], WARM, range(15)))


def test_a_window_that_has_rejoined_takes_its_rest_from_the_response(model):
    engine = HFEngine(model, eos_ids=NEVER)
    sampling = Sampling(0.0, max_new_tokens=30)
    (written,) = engine.generate([PROMPTS[0]], sampling, [0])
    response = (*written.tokens[:20], *([7] * 10))
    scores = engine.score([PROMPTS[0]], [response])
    (exact,) = engine.continue_from(scores, [(0, 2)], sampling, [0])
    (found,) = engine.continue_from(scores, [(0, 2)], sampling, [0], rejoin=4)
    assert exact.tokens[:18] == response[2:20]
    assert found.tokens == response[2:]
    assert found.logprobs[4:] == pytest.approx(scores.logprobs[0, 6:].tolist(), abs=1e-4)
    torch.testing.assert_close(found.hidden[4:], scores.hidden[0, 6:], atol=1e-4, rtol=1e-4)
    assert found.effort.positions <= 6 < exact.effort.positions


@pytest.mark.parametrize("least", [1, 2, 4])
def test_where_a_window_rejoins_does_not_depend_on_the_others(model_kind, least):
    """Whatever is read with it in one forward: the text is that of the definition."""
    engine = engine_of(model_kind, eos_ids=MANY_ENDS)
    responses = []
    for written in engine_of(model_kind, eos_ids=NEVER).generate(
        PROMPTS, replace(GREEDY, max_new_tokens=24), range(4)
    ):
        responses.append(tuple(7 if i % 7 == 3 else t for i, t in enumerate(written.tokens)))
    scores, starts = engine.score(PROMPTS, responses), [(b, t) for b in range(4) for t in range(24)]
    sampling = replace(GREEDY, max_new_tokens=12)
    exact = engine.continue_from(scores, starts, sampling, range(96))
    together = engine.continue_from(scores, starts, sampling, range(96), rejoin=least)
    alone = [engine.continue_from(scores, [s], sampling, [0], rejoin=least)[0] for s in starts]
    assert tokens_of(together) == tokens_of(alone)
    expected = [
        rejoined(one.tokens, responses[b][t : t + 12], least)
        for (b, t), one in zip(starts, exact, strict=True)
    ]
    assert tokens_of(together) == expected
    assert expected != tokens_of(exact)


def rejoined(tokens: Ids, draft: Ids, least: int) -> Ids:
    """A window up to where its last tokens are the draft's, and the draft from there."""
    for end in range(1, len(tokens) + 1):
        if tokens[end - 1] in MANY_ENDS:
            break
        if end >= least and tokens[end - least : end] == draft[end - least : end]:
            return tokens[:end] + draft[end:]
    return tokens


def test_the_windows_copy_of_the_cache_takes_what_is_needed(model, monkeypatch):
    sizes = []
    grow = decoding.GrowingLayer._grow

    def noted(self, *args):
        grow(self, *args)
        sizes.append(self._buffers[0].shape[-2])

    monkeypatch.setattr(decoding.GrowingLayer, "_grow", noted)
    engine = HFEngine(model, eos_ids=NEVER)
    scores = engine.score([PROMPTS[0]], [tuple(range(3, 60)) * 4])
    engine.continue_from(scores, [(0, 200)], GREEDY, [0])
    assert sizes == [5 + 200 + 7] * 2  # of two layers: what is known, and the window


def test_a_window_that_never_rejoins_is_exact(model_kind):
    engine = engine_of(model_kind)
    scores, seeds = engine.score(PROMPTS, RESPONSES), range(len(STARTS))
    exact = engine.continue_from(scores, STARTS, WARM, seeds)
    assert engine.continue_from(scores, STARTS, WARM, seeds, rejoin=9) == exact


def test_no_windows_are_no_work(model):
    engine = HFEngine(model, eos_ids=[EOS])
    scores = engine.score(PROMPTS, RESPONSES)
    with fed(model) as shapes:
        assert engine.continue_from(scores, [], WARM, []) == []
    assert shapes == []


# ---- generation -------------------------------------------------------------------------------


def test_a_response_depends_on_its_prompt_and_seed_alone(model_kind):
    engine = engine_of(model_kind, eos_ids=MANY_ENDS)
    prompts, seeds = PROMPTS * 3, list(range(12))
    together = engine.generate(prompts, WARM, seeds)
    assert_same_text(engine.generate(prompts[::-1], WARM, seeds[::-1])[::-1], together)
    for prompt, seed, expected in zip(prompts, seeds, together, strict=True):
        assert_same_text(engine.generate([prompt], WARM, [seed]), [expected])


def test_other_seeds_write_other_text(model_kind):
    written = engine_of(model_kind).generate([PROMPTS[0]] * 20, WARM, range(20))
    assert len(set(tokens_of(written))) == 20


def test_a_longer_limit_only_goes_on(model_kind):
    engine = engine_of(model_kind, eos_ids=NEVER)
    short = engine.generate(PROMPTS, Sampling(max_new_tokens=3), range(4))
    long = engine.generate(PROMPTS, Sampling(max_new_tokens=6), range(4))
    assert tokens_of(short) == [tokens[:3] for tokens in tokens_of(long)]


def test_an_answer_ends_with_the_end_token_that_was_sampled(model):
    """Whatever token the greedy path writes fourth is declared an end of sequence."""
    path = greedy_by_hand(model, PROMPTS[0], 7, NEVER)
    end = path[3]
    (found,) = HFEngine(model, eos_ids=[63, end]).generate([PROMPTS[0]], GREEDY, [0])
    assert found.tokens == path[: path.index(end) + 1]
    assert found.finished


def test_an_answer_that_ends_at_the_limit_is_finished(model):
    path = greedy_by_hand(model, PROMPTS[0], 7, NEVER)
    length = path.index(path[3]) + 1
    engine = HFEngine(model, eos_ids=[path[3]])
    (found,) = engine.generate([PROMPTS[0]], Sampling(0.0, max_new_tokens=length), [0])
    assert (found.tokens, found.finished) == (path[:length], True)
    (found,) = engine.generate([PROMPTS[0]], Sampling(0.0, max_new_tokens=length - 1), [0])
    assert (found.tokens, found.finished) == (path[: length - 1], False)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.7, 0.9, 8, 7)])
def test_an_answer_that_never_ends_is_cut_without_an_end_token(model, sampling):
    with torch.no_grad():  # the end of sequence is out of reach
        head = torch.nn.Linear(32, VOCAB, device=DEVICE)
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()[EOS] = -1e4
        model.lm_head = head
    for found in HFEngine(model, eos_ids=[EOS]).generate(PROMPTS, sampling, range(4)):
        assert len(found.tokens) == len(found.logprobs) == 7
        assert EOS not in found.tokens
        assert not found.finished


def test_end_tokens_stand_last_and_exactly_in_finished_answers(model_kind):
    written = engine_of(model_kind, eos_ids=MANY_ENDS).generate(PROMPTS * 8, WARM, range(32))
    for one in written:
        ends = [token in MANY_ENDS for token in one.tokens]
        assert not any(ends[:-1])
        assert ends[-1] == one.finished
        assert one.finished or len(one.tokens) == WARM.max_new_tokens
    assert {one.finished for one in written} == {True, False}


# ---- log-probs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, max_new_tokens=6),
        Sampling(0.7, max_new_tokens=6),
        Sampling(0.7, top_p=0.8, top_k=9, max_new_tokens=6),
        Sampling(1.5, top_p=0.6, max_new_tokens=6),
        GREEDY,  # as the plain softmax has them
    ],
)
def test_recorded_logprobs_are_the_scores_at_the_same_temperature(model_kind, sampling):
    engine = engine_of(model_kind)
    written = engine.generate(PROMPTS, sampling, range(4))
    scores = engine.score(PROMPTS, tokens_of(written), temperature=sampling.temperature or 1.0)
    for one, scored in zip(written, scores.logprobs, strict=True):
        assert one.logprobs == pytest.approx(scored[: len(one.tokens)].tolist(), rel=1e-5, abs=2e-5)


def test_logprobs_of_a_continuation_are_the_scores_after_the_cut_prefix(model_kind):
    engine = engine_of(model_kind)
    scores = engine.score(PROMPTS, RESPONSES)
    sampling = Sampling(0.7, top_p=0.9, max_new_tokens=5)
    windows = engine.continue_from(scores, STARTS, sampling, range(len(STARTS)))
    again = engine.score([cut(b, t) for b, t in STARTS], tokens_of(windows), temperature=0.7)
    for one, scored in zip(windows, again.logprobs, strict=True):
        assert one.logprobs == pytest.approx(scored[: len(one.tokens)].tolist(), rel=1e-5, abs=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_of_a_ragged_batch_are_those_of_single_forwards(model, temperature):
    engine = HFEngine(model, eos_ids=[EOS])
    scores = engine.score(PROMPTS, RESPONSES, temperature=temperature)
    assert scores.hidden.shape == (4, 7, 32)
    assert scores.logprobs.shape == (4, 7)
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        first, length = len(prompt) - 1, len(response)
        logits = logits_of(model, prompt + response)[first : first + length]
        expected = (logits / temperature).log_softmax(-1)[torch.arange(length), list(response)]
        torch.testing.assert_close(scores.logprobs[b, :length], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            engine.head.logits(scores.hidden[b, :length]), logits, atol=1e-4, rtol=1e-4
        )
        assert (scores.logprobs[b, length:] == 0).all()


def test_student_and_teacher_prompts_of_other_lengths_give_aligned_scores(model_kind):
    """The same responses after a longer prompt: entry t still predicts response token t."""
    engine = engine_of(model_kind)
    longer = [(1, 60, 61, 62, *prompt[1:]) for prompt in PROMPTS[::-1]]
    for prompts in (PROMPTS, longer):
        scores = engine.score(prompts, RESPONSES)
        for b, (prompt, response) in enumerate(zip(prompts, RESPONSES, strict=True)):
            with torch.no_grad():
                states = engine.model.get_decoder()(torch.tensor([prompt + response]))
            expected = states.last_hidden_state[0, len(prompt) - 1 : -1]
            found = scores.hidden[b, : len(response)]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_continuations_keep_the_states_that_predict_their_tokens(model):
    """The same as scoring what was written after the cut prefix."""
    engine = HFEngine(model, eos_ids=MANY_ENDS)
    found = engine.continue_from(engine.score(PROMPTS, RESPONSES), STARTS, WARM, range(len(STARTS)))
    for one, (b, t) in zip(found, STARTS, strict=True):
        expected = engine.score([cut(b, t)], [one.tokens]).hidden[0]
        assert one.hidden.shape[0] == len(one.tokens)
        torch.testing.assert_close(one.hidden, expected, atol=1e-4, rtol=1e-4)


def test_empty_responses_are_scored_beside_others(model_kind):
    engine = engine_of(model_kind)
    scores = engine.score([PROMPTS[0], PROMPTS[1]], [(), (5, 6)])
    alone = engine.score([PROMPTS[1]], [(5, 6)])
    assert scores.logprobs[0].tolist() == [0, 0]
    torch.testing.assert_close(scores.logprobs[1], alone.logprobs[0])


def test_results_carry_no_gradient(model_kind):
    engine = engine_of(model_kind)
    scores = engine.score(PROMPTS, RESPONSES)
    assert not scores.hidden.requires_grad
    assert not scores.logprobs.requires_grad
    assert not engine.embed(torch.tensor([[1, 2]])).requires_grad


def test_embeddings_are_rows_of_the_input_table(model):
    tokens = torch.tensor([[5, 2, 5], [0, 63, 1]])
    found = HFEngine(model, eos_ids=[EOS]).embed(tokens)
    assert torch.equal(found, model.get_input_embeddings().weight[tokens])


# ---- frequencies ------------------------------------------------------------------------------

DRAWS = 4000


def kept(probabilities: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution after top-k, and then top-p of what is left."""
    order = np.argsort(-probabilities)
    if sampling.top_k:
        order = order[: sampling.top_k]
    share = probabilities[order] / probabilities[order].sum()
    order = order[: 1 + int((share.cumsum() < sampling.top_p).sum())]
    found = np.zeros_like(probabilities)
    found[order] = probabilities[order] / probabilities[order].sum()
    return found


def assert_drawn_from(probabilities: np.ndarray, drawn: list[int]) -> None:
    """Pearson's chi-square at the 0.1 % level, rare tokens pooled; nothing outside the support."""
    counts = np.bincount(drawn, minlength=len(probabilities))
    assert (counts[probabilities == 0] == 0).all()
    expected = probabilities * len(drawn)
    rare = expected < 8
    cells = [(counts[rare].sum(), expected[rare].sum())] if expected[rare].sum() > 1 else []
    cells += zip(counts[~rare], expected[~rare], strict=True)
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    assert statistic < chi2.ppf(0.999, max(1, len(cells) - 1))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, max_new_tokens=1),
        Sampling(2.0, max_new_tokens=1),
        Sampling(0.5, max_new_tokens=1),
        Sampling(1.5, top_k=5, max_new_tokens=1),
        Sampling(1.5, top_p=0.6, max_new_tokens=1),
        Sampling(2.0, top_p=0.7, top_k=12, max_new_tokens=1),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(model_kind, sampling):
    engine = engine_of(model_kind)
    prompt = PROMPTS[1]
    logits = logits_of(engine.model, prompt)[-1].double() / sampling.temperature
    expected = kept(logits.softmax(-1).cpu().numpy(), sampling)
    written = engine.generate([prompt] * DRAWS, sampling, range(DRAWS))
    assert_drawn_from(expected, [one.tokens[0] for one in written])


def test_the_second_token_is_drawn_anew_given_the_first(model_kind):
    """Were one random number used for both, the second would follow from the first."""
    engine = engine_of(model_kind, eos_ids=NEVER)
    sampling = Sampling(2.0, max_new_tokens=2)
    written = engine.generate([PROMPTS[1]] * DRAWS, sampling, range(DRAWS))
    ((first, count),) = Counter(one.tokens[0] for one in written).most_common(1)
    assert count > 100
    logits = logits_of(engine.model, (*PROMPTS[1], first))[-1].double() / 2
    drawn = [one.tokens[1] for one in written if one.tokens[0] == first]
    assert_drawn_from(logits.softmax(-1).cpu().numpy(), drawn)


@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_tightest_limits_are_greedy(model_kind, limits):
    engine = engine_of(model_kind)
    found = engine.generate(PROMPTS, Sampling(2.0, max_new_tokens=7, **limits), range(4))
    assert tokens_of(found) == tokens_of(engine.generate(PROMPTS, GREEDY, range(4)))


@pytest.mark.parametrize("sampling", [GREEDY, WARM, Sampling(1.0, top_k=60, max_new_tokens=5)])
def test_padding_rows_of_the_vocabulary_are_never_sampled(model, sampling):
    """Probabilities are those of the softmax over the first 10 tokens."""
    engine = HFEngine(model, eos_ids=[EOS], vocab_size=10)
    assert engine.head.vocab_size == 10
    assert head_of(model).vocab_size == VOCAB
    written = engine.generate(PROMPTS * 5, sampling, range(20))
    assert all(token < 10 for one in written for token in one.tokens)
    logits = logits_of(model, PROMPTS[0])[-1, :10] / (sampling.temperature or 1.0)
    expected = logits.log_softmax(-1)[written[0].tokens[0]].item()
    assert written[0].logprobs[0] == pytest.approx(expected, abs=1e-5)
    scored = engine.score(PROMPTS[:1], [written[0].tokens], temperature=sampling.temperature or 1.0)
    assert written[0].logprobs == pytest.approx(scored.logprobs[0].tolist(), rel=1e-5, abs=2e-5)


def test_where_odd_widths_are_slow_some_padding_rows_stay_and_change_nothing(model, monkeypatch):
    monkeypatch.setattr("topd.engines.base.WIDTHS", {})
    plain = HFEngine(model, eos_ids=[EOS], allowed=range(13))
    monkeypatch.setattr("topd.engines.base.WIDTHS", {DEVICE.type: 8})
    wide = HFEngine(model, eos_ids=[EOS], allowed=range(13))
    assert (plain.head.vocab_size, wide.head.vocab_size) == (13, 16)
    assert wide.barred.tolist() == [False] * 13 + [True] * 3
    for sampling in (GREEDY, WARM):
        found, expected = (e.generate(PROMPTS * 5, sampling, range(20)) for e in (wide, plain))
        assert tokens_of(found) == tokens_of(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert HFEngine(model, eos_ids=[EOS], allowed=range(VOCAB)).head.vocab_size == VOCAB


def test_a_token_of_probability_0_is_never_drawn():
    """All of a row are barred but two, whose numbers are as late as can be."""
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(3, 4)
    numbers = torch.tensor([[2e-10, 17, 16, 2e-10], [1, 0.3, 1, 3e-10], [3e-10, 16, 17, 3e-10]])
    token, logprob = draws.draw(logits, numbers, Sampling())
    assert token.tolist() == [2, 1, 1]
    assert logprob.tolist() == pytest.approx([np.log(0.5)] * 3)


# ---- other architectures ----------------------------------------------------------------------

PLAIN = {name: size for name, size in TINY.items() if name != "head_dim"}


def sliding_qwen3() -> PreTrainedModel:
    """One layer with full attention, one with a window of eight tokens."""
    return tiny_model("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1)


SLIDING = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TINY, sliding_window=8)),
    "qwen3": sliding_qwen3,
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**TINY, sliding_window=8)),
}
HEADS = {
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**TINY, sliding_window=64, final_logit_softcapping=5.0)
    ),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**PLAIN, logits_scaling=4.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**PLAIN, logit_scale=0.25)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**PLAIN)),
    "tied": lambda: tiny_model("qwen3", tie_word_embeddings=True),
}


def seeded(make) -> PreTrainedModel:
    torch.manual_seed(0)
    return make().eval().to(DEVICE)


@pytest.mark.parametrize("name", SLIDING)
def test_a_sliding_window_model_continues_like_fresh_forwards(name):
    model = seeded(SLIDING[name])
    engine = HFEngine(model, eos_ids=[EOS])
    prompts = [tuple(range(1, 14)), (1, 20), tuple(range(30, 41))]
    responses = [(11, 12, 13, 17, 18, 19, 21, 22), tuple(range(23, 37)), (50,)]
    starts = [(0, 0), (0, 3), (0, 7), (1, 0), (1, 5), (1, 11), (1, 13), (2, 0)]
    scores = engine.score(prompts, responses)
    assert not engine.shares
    found = engine.continue_from(scores, starts, GREEDY, range(len(starts)))
    assert tokens_of(found) == [
        greedy_by_hand(model, prompts[b] + responses[b][:t], 7, (EOS,)) for b, t in starts
    ]


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_a_sliding_window_model_scores_like_single_forwards(name):
    model = seeded(SLIDING[name])
    prompts, responses = [tuple(range(1, 14)), (1, 20)], [(40, 41), tuple(range(23, 37))]
    scores = HFEngine(model, eos_ids=[EOS]).score(prompts, responses)
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logprobs = logits_of(model, prompt + response)[len(prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs[torch.arange(len(response)), list(response)]
        torch.testing.assert_close(
            scores.logprobs[b, : len(response)], expected, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", HEADS)
def test_the_head_gives_the_models_own_logits(name):
    model = seeded(HEADS[name])
    engine = HFEngine(model, eos_ids=[EOS])
    (prompt, response) = (1, 9, 23), (41, 5, 7, 8)
    scores = engine.score([prompt], [response])
    logits = logits_of(model, prompt + response)[2:-1]
    torch.testing.assert_close(
        head_of(model).logits(scores.hidden[0]), logits, atol=1e-4, rtol=1e-4
    )
    expected = logits.log_softmax(-1)[torch.arange(4), list(response)]
    torch.testing.assert_close(scores.logprobs[0], expected, atol=1e-4, rtol=1e-4)


def test_the_heads_under_test_do_have_scale_softcap_and_bias():
    heads = {name: head_of(seeded(make)) for name, make in HEADS.items()}
    assert heads["gemma2"].softcap == 5.0
    assert (heads["granite"].scale, heads["cohere"].scale) == (0.25, 0.25)
    assert heads["phi"].bias is not None
    assert (heads["tied"].scale, heads["tied"].softcap, heads["tied"].bias) == (1.0, None, None)


def test_a_model_without_a_head_is_an_error():
    with pytest.raises(TOPDError, match="no output head"):
        head_of(LlamaModel(tiny_model("llama").config))


# ---- manners ----------------------------------------------------------------------------------


def everything(engine: Engine, tick) -> None:
    scores = engine.score(PROMPTS, RESPONSES)
    engine.generate(PROMPTS, WARM, range(4), tick=tick)
    engine.continue_from(scores, STARTS, WARM, range(len(STARTS)), tick=tick)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_read_in_eval_mode_and_put_back(model_kind, training):
    model = tiny_model(model_kind, attention_dropout=0.9).train(training)
    modes = []
    model.get_decoder().register_forward_pre_hook(lambda m, _: modes.append(m.training))
    everything(HFEngine(model, eos_ids=[EOS]), lambda: None)
    assert modes
    assert not any(modes)
    assert all(part.training == training for part in model.modules())


def test_the_model_is_put_back_after_an_error(model):
    def fail(*_):
        raise RuntimeError("out of memory")

    model.train()
    model.get_decoder().register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        HFEngine(model, eos_ids=[EOS]).generate(PROMPTS, WARM, range(4))
    assert model.training


def test_every_forward_runs_under_the_given_autocast(model_kind):
    model = tiny_model(model_kind)
    engine = HFEngine(
        model, eos_ids=[EOS], autocast=lambda: torch.autocast(DEVICE.type, dtype=torch.bfloat16)
    )
    seen: list[bool] = []
    model.get_decoder().register_forward_pre_hook(
        lambda *_: seen.append(torch.is_autocast_enabled(DEVICE.type))
    )
    everything(engine, lambda: None)
    assert seen
    assert all(seen)
    assert not torch.is_autocast_enabled(DEVICE.type)


def test_scores_under_autocast_are_the_models_own_under_autocast(model):
    ids, response = PROMPTS[0] + RESPONSES[0], list(RESPONSES[0])
    engine = HFEngine(
        model, eos_ids=[EOS], autocast=lambda: torch.autocast(DEVICE.type, dtype=torch.bfloat16)
    )
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        logits = logits_of(model, ids)[len(PROMPTS[0]) - 1 : -1]
    expected = logits.float().log_softmax(-1)[torch.arange(3), response]
    scored = engine.score(PROMPTS[:1], RESPONSES[:1]).logprobs[0]
    plain = HFEngine(model, eos_ids=[EOS]).score(PROMPTS[:1], RESPONSES[:1]).logprobs[0]
    torch.testing.assert_close(scored, expected, atol=1e-5, rtol=1e-5)
    assert (scored - plain).abs().max() > 1e-3


def test_a_tick_is_heard_for_every_token_of_the_longest_row(model_kind):
    ticks: list[int] = []
    engine = engine_of(model_kind, eos_ids=NEVER)
    everything(engine, lambda: ticks.append(1))
    assert len(ticks) == 2 * WARM.max_new_tokens


def test_global_random_numbers_are_neither_used_nor_moved(model_kind):
    engine = engine_of(model_kind)
    torch.manual_seed(1)
    first = engine.generate(PROMPTS, WARM, range(4))
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(2)
    assert engine.generate(PROMPTS, WARM, range(4)) == first


# ---- packed weights ---------------------------------------------------------------------------


@contextmanager
def written_packed() -> Iterator[list[torch.dtype]]:
    """The precision of every product with a packed weight."""
    products: list[torch.dtype] = []
    multiply = packing.PackedLinear.__call__

    def noted(self, x: Tensor) -> Tensor:
        product = multiply(self, x)
        products.append(product.dtype)
        return product

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing.PackedLinear, "__call__", noted)
        yield products


def test_models_of_some_size_write_with_packed_weights_and_others_do_not(model, weights):
    with written_packed() as products:
        everything(HFEngine(model, eos_ids=[EOS]), lambda: None)
    assert bool(products) == (weights == "packed")


def test_weights_are_packed_anew_and_the_layers_put_back(model_kind):
    model = tiny_model(model_kind)
    engine = HFEngine(model, eos_ids=NEVER)
    engine.generate(PROMPTS, GREEDY, range(4))
    assert not [m for m in model.modules() if "forward" in vars(m)]
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    found = engine.generate(PROMPTS, GREEDY, range(4))
    assert tokens_of(found) == [greedy_by_hand(model, p, 7, NEVER) for p in PROMPTS]
    model.get_decoder().register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate(PROMPTS, GREEDY, range(4))
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_no_memory_for_a_packed_copy_is_said_and_leaves_the_model_as_it_was(
    model, weights, monkeypatch
):
    made = []

    def second_fails(weight: Tensor, bias: Tensor | None) -> None:
        made.append(weight)
        if len(made) > 1:
            raise RuntimeError("not enough memory")

    monkeypatch.setattr(packing, "PackedLinear", second_fails)
    engine = HFEngine(model, eos_ids=NEVER)
    if weights == "packed":
        with pytest.raises(RuntimeError, match="not enough memory"):
            engine.generate(PROMPTS, GREEDY, range(4))
    else:
        engine.generate(PROMPTS, GREEDY, range(4))
    assert len(made) == (2 if weights == "packed" else 0)
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_a_layer_with_a_forward_of_its_own_keeps_it(model):
    layer = next(m for m in model.get_decoder().modules() if type(m) is torch.nn.Linear)
    calls = []

    def own(x: Tensor) -> Tensor:
        calls.append(1)
        return torch.nn.Linear.forward(layer, x)

    layer.forward = own
    HFEngine(model, eos_ids=NEVER).generate(PROMPTS, GREEDY, range(4))
    assert len(calls) == GREEDY.max_new_tokens
    assert layer.forward is own


@cpu_only
def test_packed_products_have_the_precision_of_the_model_or_of_autocast(model_kind, weights):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16 products")
    model = tiny_model(model_kind)
    half = torch.bfloat16
    with written_packed() as products:
        HFEngine(model, eos_ids=NEVER).generate(PROMPTS, GREEDY, range(4))
        assert set(products) == ({torch.float32} if weights == "packed" else set())
        products.clear()
        mixed = HFEngine(
            model, eos_ids=NEVER, autocast=lambda: torch.autocast(DEVICE.type, dtype=half)
        )
        mixed.generate(PROMPTS, GREEDY, range(4))
        HFEngine(tiny_model(model_kind).to(half), eos_ids=NEVER).generate(PROMPTS, GREEDY, range(4))
        assert set(products) == ({half} if weights == "packed" else set())


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": "all-linear"},
        {"target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [*range(40)]}},
    ],
)
def test_a_model_with_adapters_writes_its_own_text(model_kind, adapter):
    """With one on the weight of a layer itself it wrote as the model below it."""
    model = tiny_model(model_kind)
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(**adapter, init_lora_weights=False, r=4))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "tokens_delta" in name:
                weight.normal_(0, 1)
    found = HFEngine(adapted, eos_ids=NEVER).generate(PROMPTS, GREEDY, range(4))
    adapted.eval()
    assert tokens_of(found) == [greedy_by_hand(adapted, p, 7, NEVER) for p in PROMPTS]
    with adapted.disable_adapter():
        assert tokens_of(found) != [greedy_by_hand(adapted, p, 7, NEVER) for p in PROMPTS]
