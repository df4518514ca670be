"""Which architectures decode exactly, and how: ``python -m bench.families`` writes docs/models.md.

A tiny random model of each goes through the start-up checks. What it accepts is then held
against decoding by hand: every token from a fresh forward of one whole row, without a cache, over
texts that are longer than the check's and reach past sliding windows and local attention.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from topd.engines.decode_check import check_decoding
from topd.engines.hf import HFEngine
from topd.errors import TOPDError
from topd.inputs.models.heads import check_head
from topd.types import Ids, Sampling

V, STEPS, ENDS = 61, 20, (3, 7)
PAGE = Path("docs/models.md")
NEAR = 1e-3  # nats
WAYS = {
    "shared": "exact, windows share the cache",
    "fresh": "exact, windows read their prefixes again",
    "alone": "exact, one row at a time",
    "whole": "exact, without a cache (slow)",
}
PLAIN = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL = {**PLAIN, "num_key_value_heads": 4}
HEADS = {**PLAIN, "head_dim": 8}
GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
MIXED = {**HEADS, "num_hidden_layers": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "qk_nope_head_dim": 4,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 40,
}
# what is shown -> (configuration class, its settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", PLAIN),
    "Llama, RoPE llama3": (
        "Llama",
        {
            **PLAIN,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
    ),
    "Llama, RoPE yarn": (
        "Llama",
        {
            **PLAIN,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "Llama, RoPE dynamic": (
        "Llama",
        {
            **PLAIN,
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        },
    ),
    "Qwen2": ("Qwen2", PLAIN),
    "Qwen2, sliding window": (
        "Qwen2",
        {**PLAIN, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "Qwen2-MoE": (
        "Qwen2Moe",
        {**PLAIN, **EXPERTS, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
    "Qwen3": ("Qwen3", HEADS),
    "Qwen3-MoE": ("Qwen3Moe", {**HEADS, **EXPERTS, "decoder_sparse_step": 1}),
    "Qwen3-Next": (
        "Qwen3Next",
        {**MIXED, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16},
    ),
    "Qwen3.5 (text)": ("Qwen3_5Text", {**MIXED, **LINEAR}),
    "Gemma": ("Gemma", HEADS),
    "Gemma 2": ("Gemma2", {**HEADS, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "Gemma 3 (text)": ("Gemma3Text", {**HEADS, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "RecurrentGemma": (
        "RecurrentGemma",
        {**PLAIN, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 6},
    ),
    "Mistral, full attention": ("Mistral", {**PLAIN, "sliding_window": None}),
    "Mistral, sliding window": ("Mistral", {**PLAIN, "sliding_window": 6}),
    "Ministral": ("Ministral", {**HEADS, "sliding_window": 6}),
    "Mixtral": (
        "Mixtral",
        {**PLAIN, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "Phi": ("Phi", FULL),
    "Phi-3": ("Phi3", PLAIN),
    "Phi-3, longrope": (
        "Phi3",
        {**PLAIN, "original_max_position_embeddings": 40, "rope_parameters": LONGROPE},
    ),
    "GPT-2": ("GPT2", GPT),
    "GPT-J": ("GPTJ", {**GPT, "rotary_dim": 4}),
    "CodeGen": ("CodeGen", {**GPT, "rotary_dim": 4}),
    "GPTBigCode": ("GPTBigCode", GPT),
    "OpenAI GPT": ("OpenAIGPT", GPT),
    "GPT-Neo": (
        "GPTNeo",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "max_position_embeddings": 256,
        },
    ),
    "GPT-NeoX (Pythia)": ("GPTNeoX", FULL),
    "gpt-oss": (
        "GptOss",
        {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "OPT": (
        "OPT",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 32,
        },
    ),
    "Bloom (ALiBi)": ("Bloom", {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "MPT (ALiBi)": (
        "Mpt",
        {"vocab_size": V, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    ),
    "Falcon": (
        "Falcon",
        {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "Falcon, ALiBi": (
        "Falcon",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "alibi": True,
        },
    ),
    "Falcon-H1": ("FalconH1", {**PLAIN, **MAMBA, "mamba_d_ssm": 64}),
    "FalconMamba": (
        "FalconMamba",
        {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    "Mamba": (
        "Mamba",
        {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    "Mamba 2": (
        "Mamba2",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
        },
    ),
    "RWKV": ("Rwkv", {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2}),
    "Jamba": (
        "Jamba",
        {
            **PLAIN,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "Bamba": ("Bamba", {**PLAIN, **MAMBA, "attn_layer_indices": [1]}),
    "Nemotron": ("Nemotron", HEADS),
    "Nemotron-H": (
        "NemotronH",
        {
            **HEADS,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
            "num_hidden_layers": 4,
        },
    ),
    "LFM2": (
        "Lfm2",
        {
            **PLAIN,
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        },
    ),
    "MiniMax": (
        "MiniMax",
        {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "Granite": ("Granite", {**PLAIN, "logits_scaling": 3.0}),
    "Granite 4 hybrid": (
        "GraniteMoeHybrid",
        {
            **PLAIN,
            **MAMBA,
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "shared_intermediate_size": 32,
            "num_local_experts": 0,
        },
    ),
    "Cohere": ("Cohere", {**PLAIN, "logit_scale": 0.3}),
    "Cohere 2": ("Cohere2", {**PLAIN, "logit_scale": 0.3, "sliding_window": 6}),
    "OLMo": ("Olmo", PLAIN),
    "OLMo 2": ("Olmo2", PLAIN),
    "OLMo 3": ("Olmo3", {**PLAIN, "sliding_window": 6}),
    "OLMoE": ("Olmoe", {**PLAIN, "num_experts": 4, "num_experts_per_tok": 2}),
    "SmolLM3": ("SmolLM3", PLAIN),
    "StableLM": ("StableLm", PLAIN),
    "Starcoder2": ("Starcoder2", PLAIN),
    "GLM-4": ("Glm4", HEADS),
    "DeepSeek-V3 (MLA)": (
        "DeepseekV3",
        {
            **FULL,
            **MLA,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "Llama 4 (text)": (
        "Llama4Text",
        {
            **HEADS,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 6,
        },
    ),
    "EXAONE 4": ("Exaone4", {**PLAIN, "sliding_window": 6, "sliding_window_pattern": 2}),
    "ERNIE 4.5": ("Ernie4_5", HEADS),
    "Seed-OSS": ("SeedOss", HEADS),
    "DBRX": (
        "Dbrx",
        {
            "vocab_size": V,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        },
    ),
    "Persimmon": ("Persimmon", FULL),
    "XGLM": (
        "XGLM",
        {
            "vocab_size": V,
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 256,
        },
    ),
    "BioGPT": ("BioGpt", {k: v for k, v in FULL.items() if k != "num_key_value_heads"}),
    "Granite MoE": ("GraniteMoe", {**PLAIN, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "GLM-4.5 (MoE)": (
        "Glm4Moe",
        {
            **HEADS,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "FlexOlmo": ("FlexOlmo", {**PLAIN, **EXPERTS}),
    "LFM2-MoE": (
        "Lfm2Moe",
        {**PLAIN, **EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    ),
    "Helium": ("Helium", HEADS),
    "Arcee": ("Arcee", PLAIN),
    "Apertus": ("Apertus", PLAIN),
    "DiffLlama": ("DiffLlama", PLAIN),
    "Doge": ("Doge", PLAIN),
    "Zamba 2": (
        "Zamba2",
        {
            **FULL,
            "mamba_d_state": 8,
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "num_mem_blocks": 1,
            "use_shared_attention_adapter": False,
            "adapter_rank": 4,
        },
    ),
    "xLSTM": (
        "xLSTM",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_blocks": 2,
            "num_heads": 4,
            "chunkwise_kernel": "chunkwise--native_autograd",
            "sequence_kernel": "native_sequence__native",
            "step_kernel": "native",
            "pad_token_id": 0,
        },
    ),
    "nanochat": ("NanoChat", PLAIN),
    "ERNIE 4.5 MoE": (
        "Ernie4_5_Moe",
        {
            **PLAIN,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_layer_start_index": 0,
        },
    ),
    "HunYuan dense": ("HunYuanDenseV1", HEADS),
    "JetMoE": (
        "JetMoe",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "intermediate_size": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 256,
        },
    ),
    "OLMo hybrid": ("OlmoHybrid", {**FULL, **LINEAR, "num_hidden_layers": 4}),
    "DeepSeek-V2 (MLA)": (
        "DeepseekV2",
        {
            **FULL,
            **MLA,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "MiniMax M2": ("MiniMaxM2", {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "ModernBERT decoder": ("ModernBertDecoder", {**FULL, "local_attention": 6}),
    "VaultGemma": ("VaultGemma", {**HEADS, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "CWM": ("Cwm", {**HEADS, "sliding_window": 6}),
    "MiniCPM3": ("MiniCPM3", {**FULL, **MLA}),
    "Qwen3.5-MoE (text)": (
        "Qwen3_5MoeText",
        {**MIXED, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16},
    ),
    "Gemma 3n (text)": (
        "Gemma3nText",
        {
            **HEADS,
            "sliding_window": 6,
            "vocab_size_per_layer_input": V,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "activation_sparsity_pattern": [0.0, 0.0],
            "altup_num_inputs": 2,
        },
    ),
}


@dataclass(frozen=True)
class Verdict:
    """What became of an architecture. ``wrong`` texts of ``texts`` differ from those by hand."""

    name: str
    model: str
    verdict: str
    wrong: int = 0
    texts: int = 0
    gap: float = 0.0


def tiny(name: str) -> PreTrainedModel:
    """A random model of an architecture, its distributions sharp, in eval mode."""
    kind, settings = FAMILIES[name]
    config: PretrainedConfig = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model.eval()


@torch.no_grad()
def by_hand(model: PreTrainedModel, prefix: Ids, ends: Sequence[int]) -> list[tuple[int, float]]:
    """Greedy tokens and log-probs, each from a fresh forward of the whole row."""
    ids, found = list(prefix), []
    for _ in range(STEPS):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        token = int(logits.argmax())
        found.append((token, float(logits.log_softmax(-1)[token])))
        ids.append(token)
        if token in ends:
            break
    return found


def texts_of(engine: HFEngine) -> Iterator[tuple[Ids, Any]]:
    """(prefix, what the engine wrote after it): generations and windows of a ragged batch."""
    generator = torch.Generator().manual_seed(2)
    greedy = Sampling(0.0, max_new_tokens=STEPS)

    def some(count: int) -> Ids:
        return tuple(torch.randint(8, V, (count,), generator=generator).tolist())

    prompts = [some(count) for count in (9, 1, 4, 14)]
    written = engine.generate(prompts, greedy, [0] * 4)
    yield from zip(prompts, written, strict=True)
    responses = [
        tuple(9 if i in (5, 6) else t for i, t in enumerate((*w.tokens, *some(4))[:20]) if t > 7)
        for w in written
    ]
    scores = engine.score(prompts[:2] + prompts[2:], responses)
    starts = [(b, t) for b in range(4) for t in range(0, len(responses[b]), 3)]
    short = Sampling(0.0, max_new_tokens=8)
    windows = engine.continue_from(scores, starts, short, [0] * len(starts))
    yield from zip([prompts[b] + responses[b][:t] for b, t in starts], windows, strict=True)


def examine(name: str) -> Verdict:
    """Put an architecture through the start-up checks; hold what passes against text by hand."""
    model = tiny(name)
    shown = type(model).__name__
    engine = HFEngine(model, eos_ids=ENDS, vocab_size=V)
    try:
        check_head("model", model)
        check_decoding(engine)
    except TOPDError as error:
        return Verdict(name, shown, f"refused: {error}")
    wrong, texts, gap = 0, 0, 0.0
    for prefix, one in texts_of(engine):
        expected = by_hand(model, prefix, ENDS)[: len(one.tokens)]
        texts += 1
        apart = [abs(p - q) for p, (_, q) in zip(one.logprobs, expected, strict=False)]
        same = one.tokens == tuple(token for token, _ in expected)
        wrong += not same and max(apart) > 1e-3  # a tie within rounding is none
        gap = max(gap, *apart) if same else gap
    verdict = WAYS[engine.way]
    if gap > NEAR:  # the same texts, and log-probs that rounding does not explain
        verdict = verdict.replace("exact", "near, not exact")
    return Verdict(name, shown, verdict, wrong, texts, gap)


HEAD = """# Models

Made by `python -m bench.families` (transformers {version}, torch {torch}, CPU, float32): tiny
random models of {count} architectures through the start-up checks, and what they accept against
decoding by hand, each token from a fresh forward of one whole row without a cache, over texts of up
to {steps} tokens in ragged batches, and windows.

At the start of every run and evaluation each model writes a few tokens as it will in use, and they
are compared with its own forwards without a cache. It then writes in the fastest way that is exact
for it:

- **windows share the cache** of the scoring forward: full attention by position, `sdpa` or `eager`
- **windows read their prefixes again**: sliding windows, recurrent layers, ALiBi; slower, the more
  so the longer the prefix
- **one row at a time**: where padding or the model's own cache does not do for batches
- **without a cache**: every text is read again for each token; for short texts only
- **refused**, with the reason

A model marked "near" writes the same texts as by hand here, with log-probs that rounding does not
explain, beyond the lengths that the start-up checks read.

RoPE that depends on the longest row of a batch (longrope, dynamic NTK) is exact up to where its
frequencies change (4,096 tokens for Phi-4-mini); longer texts are refused.

| architecture | class | verdict | texts unlike by hand | largest log-prob gap, nats |
|---|---|---|---:|---:|
"""


def page(found: Sequence[Verdict]) -> str:
    """The page, with a row a verdict."""
    head = HEAD.format(
        version=transformers.__version__,
        torch=torch.__version__.split("+")[0],
        count=len(found),
        steps=STEPS,
    )
    return head + "".join(
        f"| {v.name} | `{v.model}` | {v.verdict.replace('|', '/')} | "
        + (f"{v.wrong} of {v.texts} | {v.gap:.0e} |\n" if v.texts else "- | - |\n")
        for v in found
    )


def main(names: Sequence[str]) -> None:
    """Examine all architectures, or those named, and write the page if all were."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    found = []
    for name in names or FAMILIES:
        found.append(examine(name))
        print(found[-1], flush=True)
    if not names:
        PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
