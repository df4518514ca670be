"""Writing in fixed buffers, as in CUDA graphs, against the eager engine; on CPUs uncaptured."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import DEVICE, EOS, VOCAB, cpu_only
from conftest import torch_on_device as torch
from topd.engines import decode_check, graphs, memory
from topd.engines.base import Prefix
from topd.engines.decode_check import check_decoding
from topd.engines.graphs import BUCKETS, attention, bucket, buffers, fused, graphable
from topd.engines.graphs.buffers import entry_bytes, rounded
from topd.engines.graphs.cast import CastWeights
from topd.engines.hf import ROLLOUTS_SHARE, WINDOWS_SHARE, HFEngine
from topd.engines.windows import entries_of
from topd.inputs.models.heads import head_of
from topd.types import Generation, Ids, Sampling

PROMPTS: list[Ids] = [(1, 9, 23, 41, 5), (1, 8), (1, 30, 31, 32, 33, 34, 35, 36, 7), (1,)]
RESPONSES: list[Ids] = [(11, 12, 13), (40, 41, 42, 43, 44, 45, 46), (50,), (9, 3, 9, 3)]
STARTS = [(b, t) for b, response in enumerate(RESPONSES) for t in range(len(response))]
SEEDS = list(range(100, 100 + len(STARTS)))
MANY_ENDS: Ids = tuple(range(2, VOCAB, 6))  # rows leave at different steps
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
    **{"max_position_embeddings": 256, "initializer_range": 0.4},
}
WINDOWED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {**WINDOWED, "query_pre_attn_scalar": 8}),
}
GREEDY = Sampling(0.0, max_new_tokens=20)
WARM = Sampling(1.1, max_new_tokens=70)
TIGHT = Sampling(1.5, top_p=0.7, top_k=9, max_new_tokens=20)


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config_of, made_of, more = KINDS[kind]
    config = config_of(**SIZES, **more)
    return made_of(config).eval().to(DEVICE)


def pair(model: PreTrainedModel, eos: Ids = MANY_ENDS, **options: Any) -> tuple[HFEngine, HFEngine]:
    """The eager engine, and the one that writes in graphs."""
    made = [HFEngine(model, eos_ids=eos, graphs=on, **options) for on in (False, True)]
    assert made[0].graphs is None
    assert made[1].graphs is not None
    return made[0], made[1]


def assert_same(found: list[Generation], expected: list[Generation], gap: float = 5e-5) -> None:
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert [one.finished for one in found] == [one.finished for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=gap)


@pytest.fixture(params=KINDS)
def model(request) -> PreTrainedModel:
    return model_of(request.param)


@pytest.mark.parametrize("sampling", [GREEDY, WARM, TIGHT])
def test_rollouts_are_those_of_the_eager_engine(model, sampling):
    """40 ragged rows that end at different steps, some at once, some never."""
    plain, ours = pair(model)
    prompts, seeds = PROMPTS * 10, list(range(40))
    expected = plain.generate(prompts, sampling, seeds)
    assert_same(ours.generate(prompts, sampling, seeds), expected)
    assert ours.graphs.broken is None
    if sampling == WARM:
        lengths = {len(one.tokens) for one in expected}
        assert 1 in lengths
        assert len(lengths) > 5


@pytest.mark.parametrize("rejoin", [0, 1, 3])
@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_windows_are_those_of_the_eager_engine(model, sampling, rejoin):
    plain, ours = pair(model)
    scores = plain.score(PROMPTS, RESPONSES)
    expected = plain.continue_from(scores, STARTS, sampling, SEEDS, rejoin=rejoin)
    found = ours.continue_from(scores, STARTS, sampling, SEEDS, rejoin=rejoin)
    assert_same(found, expected)
    assert ours.graphs.broken is None
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.hidden, other.hidden, atol=2e-4, rtol=2e-4)


def test_windows_take_the_rest_of_a_response_that_they_rejoin():
    """Drafts are what the model itself writes: every window rejoins after one token."""
    plain, ours = pair(model_of("llama"), eos=())
    written = plain.generate(PROMPTS, Sampling(0.0, max_new_tokens=30), range(4))
    scores = plain.score(PROMPTS, [one.tokens for one in written])
    starts = [(b, t) for b in range(4) for t in (0, 5, 25)]
    windows = Sampling(0.0, max_new_tokens=12)
    found = ours.continue_from(scores, starts, windows, range(12), rejoin=1)
    for one, (b, t) in zip(found, starts, strict=True):
        assert one.tokens == written[b].tokens[t : t + 12]
        assert one.hidden.shape[0] == len(one.tokens)
        torch.testing.assert_close(
            one.hidden, scores.hidden[b, t : t + len(one.tokens)], atol=2e-4, rtol=2e-4
        )


def test_rows_that_have_ended_leave(monkeypatch):
    """The steps that are taken get smaller, and each has room for the rows that go on."""
    plain, ours = pair(model_of("llama"), eos=MANY_ENDS[:3])
    sizes: list[int] = []
    one = ours.graphs._one

    def noted(rows, *args, **options):
        sizes.append(rows)
        one(rows, *args, **options)

    monkeypatch.setattr(ours.graphs, "_one", noted)
    prompts, seeds = PROMPTS * 25, list(range(100))
    expected = plain.generate(prompts, WARM, seeds)
    assert_same(ours.generate(prompts, WARM, seeds), expected)
    if DEVICE.type == "cpu":
        lengths = [len(text.tokens) for text in expected]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] == 128
        assert len({*sizes}) > 2
        for step, size in enumerate(sizes):
            assert size >= sum(length > step + 1 for length in lengths)


def test_more_rows_than_the_largest_number_go_in_turns(monkeypatch):
    plain, ours = pair(model_of("qwen3"))
    asked = []
    right = ours.graphs.open
    monkeypatch.setattr(ours.graphs, "at_once", lambda *_: 8)
    monkeypatch.setattr(ours.graphs, "open", lambda *a: asked.append(a[0]) or right(*a))
    prompts, seeds = PROMPTS * 5, list(range(20))
    assert_same(ours.generate(prompts, GREEDY, seeds), plain.generate(prompts, GREEDY, seeds))
    assert asked == [8, 8, 4]


def test_buffers_grow_and_are_used_again():
    plain, ours = pair(model_of("qwen3"))
    for rows, steps in ((2, 5), (9, 60), (3, 140), (20, 8)):
        prompts, seeds, sampling = (PROMPTS * 5)[:rows], range(rows), Sampling(1.0, 1.0, 0, steps)
        assert_same(
            ours.generate(prompts, sampling, seeds), plain.generate(prompts, sampling, seeds)
        )
    ours.graphs.release()
    assert_same(ours.generate(PROMPTS, GREEDY, range(4)), plain.generate(PROMPTS, GREEDY, range(4)))


def test_one_token_and_one_row():
    plain, ours = pair(model_of("llama"), eos=())
    for steps in (1, 2, 8, 9, 17):
        sampling = Sampling(1.0, max_new_tokens=steps)
        found = ours.generate(PROMPTS[:1], sampling, [5])
        assert_same(found, plain.generate(PROMPTS[:1], sampling, [5]))
        assert len(found[0].tokens) == steps


def test_what_windows_continue_lies_there_once():
    """A row has room for what it writes alone, and what is before it is copied once a text."""
    plain, ours = pair(model_of("qwen3"), eos=())
    scores = plain.score(PROMPTS, RESPONSES)
    starts = [(2, 0), (1, 3), (1, 6), (2, 0)]
    ours.continue_from(scores, starts, WARM, SEEDS[:4])
    assert_same(
        ours.continue_from(scores, starts, WARM, SEEDS[:4]),
        plain.continue_from(scores, starts, WARM, SEEDS[:4]),
    )
    held = ours.graphs.buffers
    assert held.first[:4].tolist() == [0, 9, 9, 0]
    assert held.known[:4].tolist() == [9, 5, 8, 9]
    for layer, read in zip(held.layers, scores.prefix.cache.layers, strict=True):
        assert layer.own.pair[0].numel() == 4 * 2 * 80 * 8  # 70 tokens, and two that are tried
        assert layer.shared.pair[0].numel() == 1024 * 2 * 8
        for mine, theirs in zip(layer.shared.pair, (read.keys, read.values), strict=True):
            lies = mine.view(1024, 2, 8).transpose(0, 1)
            assert (lies[:, :9] == theirs[2, :, :9]).all()
            assert (lies[:, 9:17] == theirs[1, :, :8]).all()
            assert (lies[:, 17:] == 0).all()


def test_rollouts_and_windows_take_turns_in_the_same_memory(monkeypatch):
    """After a first turn of each, no memory is taken, and no graph is dropped."""
    plain, ours = pair(model_of("qwen3"))
    dropped: list[int] = []
    drop = ours.graphs.drop
    monkeypatch.setattr(ours.graphs, "drop", lambda: dropped.append(1) or drop())

    def memory() -> list[int]:
        held = [(one.own.pair, one.shared.pair) for one in ours.graphs.buffers.layers]
        return [cells.data_ptr() for pairs in held for one in pairs for cells in one]

    scores, kept = plain.score(PROMPTS, RESPONSES), []
    for turn, (rows, count) in enumerate([(3, 15), (4, 12), (2, 5), (4, 15)]):
        seeds = range(turn, turn + rows)
        written = ours.generate(PROMPTS[:rows], WARM, seeds)
        assert_same(written, plain.generate(PROMPTS[:rows], WARM, seeds))
        asked = STARTS[-count:], WARM, SEEDS[-count:]
        found = ours.continue_from(scores, *asked)
        assert_same(found, plain.continue_from(scores, *asked))
        kept.append((memory(), len(dropped)))
    assert kept[0][1] == 3  # memory of rollouts, of windows, and of their states
    assert all(later == kept[0] for later in kept[1:])


def test_a_step_sees_as_many_shared_entries_whatever_is_shared(monkeypatch):
    """A captured step replays with the number that it was captured with."""
    monkeypatch.setattr(buffers, "SHARED_UNIT", 4)
    plain, ours = pair(model_of("qwen3"), eos=())
    scores, seen = plain.score(PROMPTS, RESPONSES), []
    for starts in (STARTS[:3], STARTS, STARTS[-2:], STARTS[:1], STARTS[3:9], STARTS):
        asked = starts, GREEDY, SEEDS[: len(starts)]
        assert_same(ours.continue_from(scores, *asked), plain.continue_from(scores, *asked))
        keys = ours.graphs.buffers.layers[0].prefixes(1).keys
        seen.append((keys.data_ptr(), keys.shape))  # the first had less memory
    assert len(set(seen[1:])) == 1


def test_what_writing_took_is_given_back():
    _, ours = pair(model_of("llama"))
    ours.generate(PROMPTS, GREEDY, SEEDS[:4])
    layer = ours.graphs.buffers.layers[0]
    assert layer.own.pair[0].numel()
    ours.release()
    assert not ours.graphs.buffers.layers[0].own.pair[0].numel()


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_windows_that_go_in_turns_are_those_that_go_together(monkeypatch, rows):
    plain, ours = pair(model_of("llama"))
    scores = plain.score(PROMPTS, RESPONSES)
    monkeypatch.setattr(ours.graphs, "at_once", lambda *_: rows)
    found = ours.continue_from(scores, STARTS, WARM, SEEDS)
    assert_same(found, plain.continue_from(scores, STARTS, WARM, SEEDS))


@pytest.mark.parametrize(
    ("gb", "windows", "rollouts"), [(139, 512, 512), (80, 384, 256), (24, 96, 64), (0.1, 2, 2)]
)
def test_how_many_rows_go_together_depends_on_memory(monkeypatch, gb, windows, rollouts):
    """Of 32 texts of 64 + 512 tokens, 368 windows of 50, by the entries of Qwen3-1.7B."""
    plain, ours = pair(model_of("llama"))
    monkeypatch.setattr(graphs, "entry_bytes", lambda _: 2 * 28 * 8 * 128 * 2)
    monkeypatch.setattr(ours.graphs, "_device", torch.device("cuda"))
    card = SimpleNamespace(total_memory=gb * 1e9)
    monkeypatch.setattr(graphs.torch.cuda, "get_device_properties", lambda _: card)
    texts = Prefix(((1,) * 64,) * 32, ((2,) * 512,) * 32, DynamicCache())
    scores = replace(plain.score(PROMPTS, RESPONSES), prefix=texts)
    starts = [(b, t) for b in range(32) for t in range(0, 511, 45)][:368]
    need = entries_of(scores, starts, 50)
    assert ours.graphs.at_once(need, WINDOWS_SHARE) == windows
    assert ours.graphs.at_once(lambda n: n * rounded(64 + 512), ROLLOUTS_SHARE) == rollouts
    assert ours.graphs.at_once(entries_of(scores, [], 50), WINDOWS_SHARE) >= windows  # of none


def test_new_weights_are_used(model):
    """In place, as an optimiser changes them, and as other tensors."""
    plain, ours = pair(model)
    before = ours.generate(PROMPTS, WARM, range(4))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    again = ours.generate(PROMPTS, WARM, range(4))
    assert_same(again, plain.generate(PROMPTS, WARM, range(4)))
    assert before != again
    for weight in model.parameters():
        weight.data = weight.data / 1.2
    assert_same(ours.generate(PROMPTS, WARM, range(4)), plain.generate(PROMPTS, WARM, range(4)))


def test_adapters_write_their_own_text():
    base = model_of("llama")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    plain, ours = pair(adapted.eval())
    expected = plain.generate(PROMPTS, WARM, range(4))
    assert_same(ours.generate(PROMPTS, WARM, range(4)), expected)
    with adapted.disable_adapter():
        other = ours.generate(PROMPTS, WARM, range(4))
        assert_same(other, plain.generate(PROMPTS, WARM, range(4)))
    assert other != expected
    assert_same(ours.generate(PROMPTS, WARM, range(4)), expected)


@pytest.mark.parametrize("half", [False, True])
def test_an_adapter_on_a_weight_itself_writes_its_own_text(half):
    """Under autocast the copy of the weight below it was multiplied with."""
    config = LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"])
    adapted = get_peft_model(model_of("llama"), config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    cast = partial(torch.autocast, DEVICE.type, torch.bfloat16) if half else nullcontext
    plain, ours = pair(adapted.eval(), autocast=cast)
    written = ours.generate(PROMPTS, WARM, range(4))
    scores = plain.score(PROMPTS, [one.tokens for one in written], temperature=1.1)
    for one, scored in zip(written, scores.logprobs.tolist(), strict=True):
        gaps = [abs(x - y) for x, y in zip(one.logprobs, scored, strict=False)]
        assert sum(gaps) / len(gaps) < (0.1 if half else 1e-4)


def test_a_head_whose_weight_is_another_each_time_is_not_captured():
    """A graph would multiply with the head of the update that it was captured in."""
    assert graphable(model_of("llama"))
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"lm_head": [5]})
    assert not graphable(get_peft_model(model_of("llama"), config))


def test_under_autocast_weights_are_cast_once_a_call_and_texts_are_near_autocasts(monkeypatch):
    """Log-probs as those of a scoring forward under the same autocast; weights float32 after it."""
    torch.manual_seed(0)
    model = model_of("llama")
    half = torch.bfloat16
    plain, ours = pair(model, autocast=lambda: torch.autocast(DEVICE.type, dtype=half))
    casts: list[int] = []
    copied = CastWeights._copied
    monkeypatch.setattr(
        CastWeights,
        "_copied",
        lambda self, *args: casts.append(1) or copied(self, *args),
    )
    for _ in range(2):
        casts.clear()
        written = ours.generate(PROMPTS, WARM, range(4))
        assert len(casts) == 2 * 7 + 1  # two layers' products, and the head
        scores = plain.score(PROMPTS, [one.tokens for one in written], temperature=1.1)
        for one, scored in zip(written, scores.logprobs.tolist(), strict=True):
            gaps = [abs(x - y) for x, y in zip(one.logprobs, scored, strict=False)]
            assert sum(gaps) / len(gaps) < 0.1
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_several_products_take_is_cast_once():
    model, casts = model_of("llama"), CastWeights()
    layer, x = model.model.layers[0].self_attn, torch.randn(3, 1, model.config.hidden_size)
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        expected = [layer.q_proj(x), layer.q_proj(x + 1)]
        with casts.used(model, head_of(model)):
            assert torch.equal(layer.q_proj(x), expected[0])
            first = casts._narrow(x)
            layer.k_proj(x)
            assert casts._narrow(x) is first
            x += 1  # in place
            assert torch.equal(layer.q_proj(x), expected[1])
    assert not casts._latest[0].numel()  # nothing is held


def test_long_windows_of_like_lengths_have_like_buffers():
    assert [buffers.own_entries(n) for n in (12, 24, 50, 70)] == [16, 32, 64, 80]
    assert {buffers.own_entries(n) for n in range(455, 511)} == {512}


def test_ticks_are_as_many_as_tokens():
    _, ours = pair(model_of("llama"), eos=())
    ticks: list[int] = []
    ours.generate(PROMPTS, Sampling(1.0, max_new_tokens=37), range(4), tick=lambda: ticks.append(1))
    assert len(ticks) == 37


def test_nothing_of_the_model_is_changed_after_writing(model):
    config = model.config.get_text_config()
    before = config._attn_implementation
    _, ours = pair(model)
    ours.graphs._fused.wanted = True
    ours.generate(PROMPTS, GREEDY, range(4))
    assert config._attn_implementation == before
    assert not any("forward" in vars(module) for module in model.modules())
    assert buffers._stepping is None


@pytest.mark.parametrize("when", ["made", "called"])
def test_what_does_not_compile_runs_as_it_is(when, monkeypatch, caplog):
    """As on a Python newer than torch compiles for, which it says before anything is called."""

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("not on this Python")

    model = model_of("qwen3")
    plain, ours = pair(model)
    monkeypatch.setattr(fused, "_pieces", {})
    monkeypatch.setattr("torch.compile", failing if when == "made" else lambda _: failing)
    ours.graphs._fused = fused.Fused(model, on=True)
    assert_same(ours.generate(PROMPTS, WARM, range(4)), plain.generate(PROMPTS, WARM, range(4)))
    assert ours.graphs.broken is None
    assert "draw: not compiled (RuntimeError: not on this Python)" in caplog.text


def test_what_is_compiled_is_looked_up_once(monkeypatch):
    """Sources of classes are read at the first text, not at every one for every layer."""
    read: list[object] = []
    source = inspect.getsource
    noting = SimpleNamespace(getsource=lambda kind: read.append(kind) or source(kind))
    monkeypatch.setattr(fused, "inspect", noting)
    fused._is_gated.cache_clear()
    pieces = fused.Fused(model_of("qwen3"), on=True)
    for _ in range(2):
        with pieces.on():
            pass
    assert len(read) == 1


@pytest.mark.parametrize("sampling", [GREEDY, WARM, TIGHT])
def test_a_step_waits_for_nothing_and_makes_nothing_elsewhere(model, sampling, monkeypatch):
    """As what is captured must not: on a device without values both are refused."""
    monkeypatch.setattr("torch.is_autocast_enabled", lambda *_: False)  # knows no such device
    ours = HFEngine(model.to("meta"), eos_ids=(EOS,), graphs=True)
    ids, lengths = (torch.zeros(*n, dtype=torch.long, device="meta") for n in ((4, 7), (4,)))
    ours.graphs.open(4, rounded(7 + 20))
    with torch.no_grad():
        states = ours.graphs.read(ids, lengths)
        for keep in (False, True):
            ours.graphs._begin(states, [7] * 4, SEEDS[:4], keep=keep)
            with ours.graphs._decoding(4):
                ours.graphs._one(4, ours.head, sampling, keep=keep)
    assert ours.graphs._drawn.is_meta


def test_a_model_whose_attention_is_another_falls_back_and_says_so_once(caplog):
    """gpt-oss has sinks: unknown to the attention of one token."""
    torch.manual_seed(0)
    config = GptOssConfig(
        **{**SIZES, **WINDOWED}, num_local_experts=2, num_experts_per_tok=1, rope_parameters=None
    )
    model = GptOssForCausalLM(config).eval().to(DEVICE)
    plain, ours = pair(model)
    expected = plain.generate(PROMPTS, GREEDY, range(4))
    for _ in range(2):
        assert_same(ours.generate(PROMPTS, GREEDY, range(4)), expected)
    assert "s_aux" in ours.graphs.broken
    said = [record for record in caplog.records if "without CUDA graphs" in record.message]
    assert len(said) == 1


def test_soft_capped_attention_is_not_captured():
    """Whether a cap is heeded is decided by the kernel that the model's own forward takes."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, **WINDOWED, query_pre_attn_scalar=8)
    plain, ours = pair(Gemma2ForCausalLM(config).eval().to(DEVICE))
    assert_same(ours.generate(PROMPTS, GREEDY, range(4)), plain.generate(PROMPTS, GREEDY, range(4)))
    assert "softcap" in ours.graphs.broken


def test_what_cannot_be_captured_is_not_tried():
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k != "head_dim"}
    longrope = LlamaForCausalLM(
        LlamaConfig(
            **SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        )
    )
    assert not graphable(longrope)
    assert graphable(PhiForCausalLM(PhiConfig(**sizes)))
    engine = HFEngine(longrope.to(DEVICE), eos_ids=[EOS], graphs=True)
    assert engine.graphs is None


def test_a_wrong_attention_is_found_at_the_start(monkeypatch, caplog):
    """And the model then writes as it would without graphs."""
    monkeypatch.setattr(decode_check, "_KNOWN", {})
    model = model_of("llama")
    right = attention._plain

    def wrong(query, new, cache, place, **options):
        return right(query, new, cache, place.clamp(max=4), **options)

    monkeypatch.setattr(attention, "_plain", wrong)
    monkeypatch.setattr(attention, "_tried", lambda *_: None)
    plain, ours = pair(model)
    check_decoding(ours)
    assert "log-probs differ" in ours.graphs.broken
    assert ours.way == "shared"
    assert_same(ours.generate(PROMPTS, WARM, range(4)), plain.generate(PROMPTS, WARM, range(4)))
    other = HFEngine(model, eos_ids=[EOS], graphs=True)
    check_decoding(other)  # from what is known
    assert "log-probs differ" in other.graphs.broken
    assert "without CUDA graphs" in caplog.text


def test_a_right_one_is_kept_at_the_start(model, monkeypatch):
    """Without the memory of the trial: buffers that grow take a quarter more than they need."""
    monkeypatch.setattr(decode_check, "_KNOWN", {})
    _, ours = pair(model)
    check_decoding(ours)
    assert ours.graphs.broken is None
    assert not any(one.own.pair[0].numel() for one in ours.graphs.buffers.layers)


def test_weights_that_move_at_every_call_are_written_without_graphs():
    plain, ours = pair(model_of("llama"))
    for call in range(8):
        ours.graphs._graphs[call] = None  # as if captured
        for weight in ours.model.parameters():
            weight.data = weight.data.clone()
        found = ours.generate(PROMPTS, GREEDY, range(4))
        assert_same(found, plain.generate(PROMPTS, GREEDY, range(4)))
    assert "moved" in ours.graphs.broken


def test_memory_that_runs_out_halves_the_rows(monkeypatch):
    plain, ours = pair(model_of("llama"))
    right, asked = ours.graphs.open, []

    def small(rows, *args):
        asked.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        right(rows, *args)

    monkeypatch.setattr(ours.graphs, "open", small)
    assert_same(ours.generate(PROMPTS, GREEDY, range(4)), plain.generate(PROMPTS, GREEDY, range(4)))
    assert asked[-2:] == [2, 2]


def test_fewer_rows_that_fit_are_written_after_memory_ran_out(monkeypatch):
    """Of what was taken for more rows nothing is left, and no number of rows is tried twice."""
    plain, ours = pair(model_of("llama"))
    taken, asked, said = buffers.Cells.of, [], []

    def limited(self, shape, like):
        asked.append(shape[0])
        found = taken(self, shape, like)
        held = [layer.own.pair[0].numel() for layer in ours.graphs.buffers.layers]
        if sum(held) > 4 * 2 * 2 * 128 * 8:  # four rows' keys in both layers
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return found

    monkeypatch.setattr(buffers.Cells, "of", limited)
    monkeypatch.setattr(memory.logger, "warning_once", said.append)
    prompts, seeds = PROMPTS * 2, range(8)
    assert_same(ours.generate(prompts, GREEDY, seeds), plain.generate(prompts, GREEDY, seeds))
    assert asked == [8, 8, 4, 4, 4, 4]
    assert ours.graphs.broken is None
    assert len(said) == 1
    assert "4 rollouts or windows at a time" in said[0]


def test_a_tokens_entry_is_as_large_as_the_buffers_are(model):
    _, ours = pair(model)
    ours.generate(PROMPTS, GREEDY, range(4))
    cells = sum(
        cell.numel() * cell.element_size()
        for one in ours.graphs.buffers.layers
        for cell in one.own.pair
    )
    assert cells == entry_bytes(model) * bucket(4) * rounded(9 + 20)


class FakeCuda:
    """As much of torch.cuda as a capture takes: the captured step runs at once.

    As torch has it, a capture that fails raises at its end, before its stream is left. ``doing`` is
    what is under way; ``refused`` whether what waits for the device is an error.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now: Any = SimpleNamespace(wait_stream=lambda _: None)
        self.doing, self.refused = "trials", False
        names = ("stream", "graph", "current_stream", "set_sync_debug_mode")
        fakes = {name: getattr(self, name) for name in names}
        fakes |= dict.fromkeys(("Stream", "CUDAGraph"), lambda *_: copy.copy(self.now))
        fakes |= dict.fromkeys(("graph_pool_handle", "synchronize"), lambda *_: None)
        for name, fake in fakes.items():
            monkeypatch.setattr(f"torch.cuda.{name}", fake)
        monkeypatch.setattr("torch.cuda.get_sync_debug_mode", lambda: 0)
        monkeypatch.setattr(graphs, "stream_of", lambda _: copy.copy(self.now))

    def current_stream(self, *_: object) -> Any:
        return self.now

    @contextmanager
    def stream(self, new: Any) -> Iterator[None]:
        old, self.now = self.now, new
        try:
            yield
        finally:
            self.now = old

    @contextmanager
    def graph(self, *_: object, stream: Any, **__: object) -> Iterator[None]:
        old, self.now, self.doing = self.now, stream, "capture"
        yield
        self.now = old

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.refused = mode == "error"


@cpu_only
def test_steps_that_are_tried_before_a_capture_leave_no_trace(monkeypatch):
    """All stands one token further, not three."""
    FakeCuda(monkeypatch)
    _, ours = pair(model_of("qwen3"))
    own, lengths = ours.graphs, [len(prompt) for prompt in PROMPTS]
    own.open(4, rounded(9 + 20))
    with torch.no_grad():
        states = own.read(ours.padded(PROMPTS), ours.tensor(lengths))
        own._begin(states, lengths, SEEDS[:4], keep=False)
        own._put(ours.head, states, WARM, keep=False)
        moved = (own._token, own._place, own._step, own._slot)
        before = [state.clone() for state in moved]
        own._captured(4, lambda: own._one(4, ours.head, WARM, keep=False))
    for state, old in zip(moved[1:], before[1:], strict=True):
        assert (state[:4] == old[:4] + 1).all()
    expected = ours.generate(PROMPTS, replace(WARM, max_new_tokens=2), SEEDS[:4])
    pairs = zip(own._token.tolist(), before[0].tolist(), expected, strict=False)
    for token, first, text in pairs:
        assert text.tokens == (first, token)[: len(text.tokens)]


@cpu_only
@pytest.mark.parametrize("when", ["trials", "capture"])
def test_a_step_that_cannot_be_captured_leaves_the_stream_of_before(monkeypatch, when):
    cuda = FakeCuda(monkeypatch)
    before = cuda.now

    def one() -> None:
        assert cuda.now is not before
        if cuda.doing == when:
            raise RuntimeError("not in a capture")

    with pytest.raises(RuntimeError, match="not in a capture"):
        pair(model_of("llama"))[1].graphs._captured(4, one)
    assert cuda.now is before
    assert cuda.doing == when


@cpu_only
def test_a_step_that_waits_for_the_device_is_found_before_it_is_captured(monkeypatch):
    """The first that is tried may wait: it compiles. A capture that fails costs memory for good."""
    cuda, waits = FakeCuda(monkeypatch), []

    def one() -> None:
        waits.append(cuda.refused)
        if cuda.refused:
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        pair(model_of("llama"))[1].graphs._captured(4, one)
    assert waits == [False, True]
    assert cuda.doing == "trials"
    assert not cuda.refused


def test_all_captures_of_a_device_have_one_stream(monkeypatch):
    """Every evaluation within training has graphs of its own, and cuBLAS memory for each stream."""
    graphs.stream_of.cache_clear()
    monkeypatch.setattr("torch.cuda.Stream", lambda device: [device])
    found = [graphs.stream_of(torch.device("cuda", k)) for k in (0, 1, 0)]
    graphs.stream_of.cache_clear()
    assert found[0] is found[2] is not found[1]


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 17, 33, 65, 512)] == [2, 2, 4, 32, 64, 96, 512]
    assert list(BUCKETS) == sorted(BUCKETS)
