"""The start-up check of decoding: what a model writes against its own forwards without a cache."""

from __future__ import annotations

import functools
import json
from contextlib import nullcontext
from functools import partial, partialmethod

import pytest
from bench.families import V, examine, tiny
from transformers import (
    AutoModelForCausalLM,
    BertGenerationConfig,
    PreTrainedModel,
    XLNetConfig,
)

from conftest import DEVICE, EOS, USE_CPU, WORDS, rows, tiny_model, tiny_tokenizer
from conftest import torch_on_device as torch
from topd import TOPDConfig, TOPDTrainer
from topd.engines import decode_check, forward
from topd.engines.decode_check import check_decoding, decoding_gap
from topd.engines.forward import WAYS
from topd.engines.hf import HFEngine
from topd.errors import TOPDError
from topd.inputs.models import heads
from topd.inputs.models.heads import check_head, head_of
from topd.inputs.models.positions import rope_switch, takes_masks
from topd.training.learning.layout import can_pack
from topd.types import Sampling


@pytest.fixture(autouse=True)
def afresh(monkeypatch) -> None:
    """Nothing is known from other tests."""
    monkeypatch.setattr(decode_check, "_KNOWN", {})


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("Qwen3", "windows share the cache"),
        ("GPT-Neo", "prefixes again"),
        ("MPT (ALiBi)", "prefixes again"),
        ("LFM2", "prefixes again"),
        ("Mamba", "exact"),
    ],
)
def test_an_architecture_of_each_kind_writes_what_is_written_by_hand(name, verdict):
    found = examine(name)
    assert verdict in found.verdict
    assert found.wrong == 0
    assert found.texts > 10
    assert found.gap < 1e-3


@pytest.mark.parametrize("name", ["GPT-Neo", "MPT (ALiBi)", "Gemma 2"])
def test_a_promise_that_does_not_hold_is_found_and_a_slower_way_taken(name):
    """Places counted in the cache, and a mask of our own given to sliding layers."""
    model = tiny(name)
    engine = HFEngine(model, eos_ids=[EOS], vocab_size=V, way="shared")
    assert decode_check._fault(engine) is not None
    check_decoding(engine)
    assert engine.way == "fresh"


def test_what_a_generation_config_would_change_is_named(monkeypatch):
    said = []
    monkeypatch.setattr(decode_check.logger, "warning_once", said.append)
    model = tiny_model()
    check_decoding(HFEngine(model, eos_ids=[EOS]))
    model.generation_config.update(
        repetition_penalty=1.0, temperature=0.6, top_k=20, do_sample=True
    )
    check_decoding(HFEngine(model, eos_ids=[EOS]))
    assert not said
    model.generation_config.update(repetition_penalty=1.05, suppress_tokens=[5, 6], min_p=0.1)
    check_decoding(HFEngine(model, eos_ids=[EOS], name="student"))
    (one,) = said
    assert "student" in one
    assert "repetition_penalty: 1.05, min_p: 0.1, suppress_tokens: [5, 6], not applied" in one


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_write_the_same(way):
    """Tokens, log-probs and windows; in the slowest without any cache."""
    prompts, seeds = [(1, 9, 23, 41), (5,), (8, 7, 6, 5, 4, 9)], [1, 2, 3]
    sampling = Sampling(1.0, max_new_tokens=9)
    engines = [HFEngine(tiny_model(), eos_ids=[3, 11, 20, 40], way=w) for w in ("shared", way)]
    both = [engine.generate(prompts, sampling, seeds) for engine in engines]
    assert [w.tokens for w in both[0]] == [w.tokens for w in both[1]]
    assert [w.finished for w in both[0]] == [w.finished for w in both[1]]
    responses = [(9, 10, 12, 13), (30,), (33, 34, 35)]
    starts = [(0, 0), (0, 2), (2, 1), (1, 0)]
    for first, second in zip(
        *(
            e.continue_from(e.score(prompts, responses), starts, sampling, range(4))
            for e in engines
        ),
        strict=True,
    ):
        assert first.tokens == second.tokens
        assert first.logprobs == pytest.approx(second.logprobs, abs=2e-5)
        torch.testing.assert_close(first.hidden, second.hidden, atol=2e-5, rtol=2e-5)


def odd_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Its forward of one token is not that of the token in a row, as of a cache passed by."""
    model = tiny_model().to(dtype)
    decoder = model.get_decoder()
    forward = decoder.forward

    @functools.wraps(forward)
    def odd(input_ids, **kwargs):
        output = forward(input_ids=input_ids, **kwargs)
        if input_ids.shape[1] == 1:
            output.last_hidden_state = -output.last_hidden_state
        return output

    decoder.forward = odd
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_cache_does_not_do_is_read_without(dtype):
    engine = HFEngine(odd_model(dtype), eos_ids=[EOS])
    gap, allowed = decoding_gap(engine)
    assert gap > allowed
    check_decoding(engine)
    assert engine.way == "whole"


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_transformers_own_name_of_the_cache_is_known(kind):
    """``past_key_values``, ``cache`` from 5.24 on: by another one every text is read anew."""
    assert HFEngine(tiny_model(kind), eos_ids=[EOS]).way == "shared"


def test_a_decoder_whose_cache_has_an_unknown_name_is_said_to_be_slow(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(forward, "OF_KEYS", ())
    monkeypatch.setattr(decode_check.logger, "warning", said.append)
    engine = HFEngine(tiny_model("llama"), eos_ids=[EOS])
    check_decoding(engine)
    assert engine.way == "whole"
    (line,) = said
    assert "reading every text again" in line
    assert "no cache that is known here" in line


def test_a_model_that_no_way_fits_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(decode_check, "WAYS", WAYS[:3])
    reason = r"teacher: Qwen3ForCausalLM does not write .* nats"
    with pytest.raises(TOPDError, match=reason):
        check_decoding(HFEngine(odd_model(), eos_ids=[EOS], name="teacher"))


def test_half_precision_passes():
    engine = HFEngine(tiny_model().bfloat16(), eos_ids=[EOS])
    check_decoding(engine)
    assert engine.way == "shared"


def test_half_precision_whose_rounding_is_large_passes_and_a_fault_does_not():
    """Log-probs of -100: on a CPU padding alone changes no bit of them, decoding does."""
    model = tiny_model(num_hidden_layers=4).bfloat16()
    model.lm_head.weight.data *= 10
    engine = HFEngine(model, eos_ids=[EOS])
    gap, allowed = decoding_gap(engine)
    assert gap < allowed
    check_decoding(engine)
    assert engine.way == "shared"
    odd = odd_model(torch.bfloat16)
    odd.lm_head.weight.data *= 10
    gap, allowed = decoding_gap(HFEngine(odd, eos_ids=[EOS]))
    assert gap > allowed


def test_weights_that_are_nan_are_for_others_to_report():
    model = tiny_model()
    model.lm_head.weight.data.fill_(torch.nan)
    check_decoding(HFEngine(model, eos_ids=[EOS]))


def test_the_check_is_made_once_for_models_of_one_configuration(monkeypatch):
    made, gap = [], decode_check.decoding_gap
    monkeypatch.setattr(
        decode_check, "decoding_gap", lambda e, **how: (made.append(e), gap(e, **how))[1]
    )
    for seed in (0, 1):
        check_decoding(HFEngine(tiny_model(seed=seed), eos_ids=[EOS]))
    engine = HFEngine(tiny_model(num_hidden_layers=3), eos_ids=[EOS])
    check_decoding(engine)
    assert len(made) == 2 * (1 if engine.graphs is None else 2)  # in graphs, and without


@pytest.mark.parametrize("half", [False, True])
def test_graphs_are_tried_in_the_precision_of_their_use(half, monkeypatch):
    """Then all else with weights as they are; another precision is another try."""
    seen, gap = [], decode_check.decoding_gap

    def noted(engine, **how):
        seen.append((engine.graphs is not None, how["as_used"]))
        return gap(engine, **how)

    monkeypatch.setattr(decode_check, "decoding_gap", noted)
    for autocast in (nullcontext, partial(torch.autocast, DEVICE.type, torch.bfloat16)):
        model = tiny_model(num_hidden_layers=1, intermediate_size=48)
        model = model.bfloat16() if half else model
        engine = HFEngine(model, eos_ids=[EOS], graphs=True, autocast=autocast)
        check_decoding(engine)
        assert not engine.graphs.broken
    again = 1 if half else 2  # autocast changes nothing of weights in half precision
    assert seen == [(True, True), (False, False)] * again


def test_rows_read_in_one_forward_are_bounded_where_prefixes_are_read_anew():
    model = tiny_model(use_sliding_window=True, sliding_window=64, max_window_layers=1)
    engine, shapes = HFEngine(model, eos_ids=[]), []
    responses = [tuple((7 * i + b) % 50 + 8 for i in range(240)) for b in range(2)]
    scores = engine.score([tuple(range(3, 13))] * 2, responses)
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    starts = [(b, t) for b in range(2) for t in range(0, 240, 3)]
    windows = engine.continue_from(scores, starts, Sampling(0.0, max_new_tokens=2), range(160))
    hook.remove()
    assert len(windows) == 160
    assert max(shapes) <= 64 * 252


def test_rope_that_depends_on_the_longest_row_is_refused_where_it_changes(tmp_path):
    model = tiny("Phi-3, longrope")
    assert rope_switch(model.config) == 40
    engine = HFEngine(model, eos_ids=[EOS], name="teacher")
    engine.score([(5, 6)], [tuple(range(8, 46))])
    for ask in (
        lambda: engine.score([(5, 6), (7,)], [(9,), tuple(range(8, 48))]),
        lambda: engine.generate([(5, 6)], Sampling(max_new_tokens=40), [0]),
    ):
        with pytest.raises(TOPDError, match="teacher: 41 tokens; beyond 40 its RoPE"):
            ask()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Llama", None), ("Llama, RoPE yarn", None), ("Llama, RoPE dynamic", 64), ("Mamba", None)],
)
def test_where_rope_switches(name, expected):
    assert rope_switch(tiny(name).config) == expected


def test_branches_are_packed_only_where_masks_say_it_all():
    packs = {name: can_pack(tiny(name)) for name in ("Qwen3", "Jamba", "LFM2", "Falcon, ALiBi")}
    assert packs == {"Qwen3": True, "Jamba": False, "LFM2": False, "Falcon, ALiBi": False}
    assert not takes_masks(tiny("Gemma 2").config)


def test_a_teachers_positions_must_hold_its_windows_too(tmp_path):
    """Prompt 6 and completion 12 fit into 20 positions, a window of 8 after them does not."""
    options = {"max_completion_length": 12, "window_length": 8, "use_cpu": USE_CPU, "max_steps": 1}
    models = [tiny_model(seed=s, max_position_embeddings=20) for s in (0, 1)]
    for method, fits in (("opd", True), ("topd", False)):
        args = TOPDConfig(output_dir=str(tmp_path / method), method=method, **options)
        ask = lambda args=args: TOPDTrainer(  # noqa: E731
            *models, args, rows(2), processing_class=tiny_tokenizer()
        )
        if fits:
            ask()
        else:
            with pytest.raises(TOPDError, match=r"teacher: .*window_length.* has 20 positions"):
                ask()


def test_a_model_that_names_no_decoder_is_refused(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model, "get_decoder", lambda: model)
    with pytest.raises(TOPDError, match="teacher: Qwen3ForCausalLM names no decoder"):
        check_head("teacher", model)
    monkeypatch.setattr(model, "get_decoder", lambda: model.lm_head)
    with pytest.raises(TOPDError, match="teacher: Qwen3ForCausalLM names no decoder"):
        check_head("teacher", model)


def test_a_soft_cap_far_above_the_logits_is_seen_and_known(monkeypatch):
    """30 tanh(x / 30) differs from x = 1 by 4e-4 only, and by 10 % at what trained models have."""
    model = tiny("RecurrentGemma")
    assert head_of(model).softcap == 30.0
    check_head("teacher", model)
    monkeypatch.setattr(model.config, "logits_soft_cap", 60.0)
    known = head_of(model)
    monkeypatch.setattr(model.config, "logits_soft_cap", 30.0)
    monkeypatch.setattr(heads, "head_of", lambda _: known)
    with pytest.raises(TOPDError, match="treats logits in a way that TOPD does not know"):
        check_head("teacher", model)


@pytest.mark.parametrize("bars", [[-1], [-1, 7]])
def test_rows_that_a_model_bars_hide_no_other_logits(monkeypatch, bars):
    """A gap of infinity is not above a share of infinity."""
    model = tiny_model()
    forward = type(model).forward

    def own(self, factor, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = factor * output.logits
        output.logits[..., bars] = -torch.inf
        return output

    monkeypatch.setattr(type(model), "forward", partialmethod(own, 1.0))
    if bars == [-1]:  # a row of padding
        check_head("teacher", model)
        monkeypatch.setattr(type(model), "forward", partialmethod(own, 2.0))
    with pytest.raises(TOPDError, match="treats logits in a way that TOPD does not know"):
        check_head("teacher", model)


@pytest.mark.parametrize(
    "config",
    [
        BertGenerationConfig(num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                             max_position_embeddings=64, hidden_size=32, vocab_size=V),
        XLNetConfig(vocab_size=V, d_model=32, n_layer=2, n_head=4, d_inner=48),  # -1 positions
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_a_model_that_sees_what_follows_is_refused(config):
    """Its noise beside padding is large, which must not make a large difference look like it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    with pytest.raises(TOPDError, match="does not write what its own forwards say"):
        check_decoding(HFEngine(model, eos_ids=[EOS]))


def test_a_model_that_keeps_a_state_of_its_own_forgets_it_at_a_prompt_of_one_token():
    """RecurrentGemma reads one token as the next of what it read last."""
    engine = HFEngine(tiny("RecurrentGemma"), eos_ids=[EOS], way="alone")
    assert decode_check._fault(engine) is not None
    check_decoding(engine)
    assert engine.way == "whole"


HOLES = [*range(41), 45, 46, 50]  # of 64 rows


def test_ids_that_no_token_has_are_never_sampled():
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[41:] *= 3  # loud, as untrained rows may be
    prompts, sampling = [(1, 9)] * 16, Sampling(1.0, max_new_tokens=16)
    everything = HFEngine(model, eos_ids=[]).generate(prompts, sampling, range(16))
    assert {t for w in everything for t in w.tokens} - {*HOLES}
    engine = HFEngine(model, eos_ids=[], allowed=HOLES)
    assert engine.head.vocab_size == 51
    written = engine.generate(prompts, sampling, range(16))
    assert {t for w in written for t in w.tokens} <= {*HOLES}
    logits = model(torch.tensor([(1, 9) + written[0].tokens]), use_cache=False).logits[0, 1:-1]
    known = logits[:, HOLES].log_softmax(-1)
    places = torch.tensor([HOLES.index(t) for t in written[0].tokens])
    expected = known.gather(1, places[:, None])[:, 0].tolist()
    assert written[0].logprobs == pytest.approx(expected, abs=1e-4)
    scores = engine.score([(1, 9)], [written[0].tokens])
    assert scores.logprobs[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_run_samples_and_learns_tokens_of_the_tokenizer_only(tmp_path):
    """Rows that both heads have and no token: neither sampled, nor with any gradient."""
    tokenizer = tiny_tokenizer(WORDS[:40])
    models = [tiny_model(seed=seed, tie_word_embeddings=False) for seed in (0, 1)]
    before = models[0].lm_head.weight[40:].detach().clone()
    args = TOPDConfig(
        output_dir=str(tmp_path),
        method="opd",
        use_cpu=USE_CPU,
        max_steps=2,
        learning_rate=1e-2,
        max_completion_length=24,
        weight_decay=0.0,
        save_strategy="no",
    )
    trainer = TOPDTrainer(*models, args, rows(4), processing_class=tokenizer)
    trainer.train()
    sampled = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").open()]
    assert max(t for one in sampled for t in one["response_ids"]) < 40
    after = trainer.model.lm_head.weight.detach()
    assert torch.equal(after[40:], before)
    assert not torch.equal(after[:40], tiny_model(tie_word_embeddings=False).lm_head.weight[:40])
