"""Rollouts in CUDA graphs: are they right, and how fast: ``python -m bench.graphs_check [PARTS]``.

One JSON line a part, each with its own fault; some two minutes on one GPU. ``--tiny`` runs the same
code on tiny shapes, on a CPU too, without capture.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bench.gpu_models import SHAPES, device, forget, make, peak, random_ids, restart_peak, settle
from topd.engines.graphs import Graphs, attention
from topd.engines.hf import HFEngine
from topd.types import Generation, Ids, Sampling

MOST = 160.0  # seconds, after which no part is begun
STARTED = time.perf_counter()
TINY = "--tiny" in sys.argv
Row = dict[str, Any]


def engine(model: PreTrainedModel, way: str, **options: Any) -> HFEngine:
    """Ours, eager, in graphs, or in graphs with compiled pieces."""
    made = HFEngine(model, eos_ids=options.pop("eos", []), graphs=False, **options)
    if way != "eager":
        made.graphs = Graphs(model, made.forward, fuse=way == "fused")
    return made


def timed(work: Callable[[], object]) -> float:
    settle()
    started = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - started


def kernel() -> Row:
    """The Triton kernel against torch's own attention."""
    found: Row = {}
    for dtype in (torch.float32, torch.bfloat16):
        for shape, windowed in (((9, 3, 64), False), ((32, 8, 128), False), ((4, 1, 256), True)):
            for continuing in (False, True):
                used = attention._tried(shape, dtype, dtype, device(), windowed, continuing)
                found[f"{dtype} {shape} {continuing=}"] = used is not None
    return found


def speed(name: str, rows: int, tokens: int, way: str, **options: Any) -> Row:
    """Tokens a second of rollouts after a first call."""
    if TINY:
        name, rows, tokens = "tiny", 4, 20
    model = make(name, dtype=options.pop("dtype", torch.bfloat16))
    writer = engine(model, way, **options)
    texts = random_ids(rows, 64, SHAPES[name].vocab)
    forget()
    before = restart_peak()

    def write(count: int) -> list[Generation]:
        return writer.generate(texts, Sampling(max_new_tokens=count), list(range(rows)))

    first = timed(lambda: write(tokens))
    spent = min(timed(lambda: write(tokens)) for _ in range(1 if way == "eager" else 2))
    return {
        "tokens/s": round(rows * tokens / spent),
        "ms a step": round(1000 * spent / tokens, 2),
        "first call s": round(first, 2),
        "GiB over the model": round(peak() - before, 2),
        "broken": writer.graphs.broken if writer.graphs else None,
    }


def small(kind: str) -> PreTrainedModel:
    """A small model of a family, float32, with distributions that are not flat."""
    sizes: dict[str, Any] = {
        **{"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 512},
        **{"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2},
        **{"head_dim": 32, "max_position_embeddings": 2048, "initializer_range": 0.06},
    }
    config_of, model_of = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    }[kind]
    if kind == "gemma3":
        sizes |= {"sliding_window": 24, "sliding_window_pattern": 3, "query_pre_attn_scalar": 32}
    torch.manual_seed(0)
    return model_of(config_of(**sizes)).eval().to(device())


def ragged(count: int) -> list[Ids]:
    """Prompts of 3 to 40 tokens."""
    some = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 41, (count,), generator=some).tolist()
    return [tuple(torch.randint(4, 8000, (length,), generator=some).tolist()) for length in lengths]


def equality(kind: str, way: str) -> Row:
    """Texts of 1,000 prompts, greedy and sampled, with ends, and windows: equal token for token?"""
    model = small(kind)
    ends = list(range(2, 8192, 160))
    prompts = ragged(20 if TINY else 1000)
    plain, ours = engine(model, "eager", eos=ends), engine(model, way, eos=ends)
    row: Row = {}
    for name, sampling in (
        ("greedy", Sampling(0.0, max_new_tokens=48)),
        ("sampled", Sampling(1.0, max_new_tokens=48)),
    ):
        seeds = list(range(len(prompts)))
        expected = plain.generate(prompts, sampling, seeds)
        found = ours.generate(prompts, sampling, seeds)
        row |= {f"{name} {key}": value for key, value in compared(found, expected).items()}
    responses = [one.tokens for one in expected[:64]]
    scores = plain.score(prompts[:64], responses)
    starts = [(b, t) for b, text in enumerate(responses) for t in range(0, len(text), 7)]
    windows = Sampling(1.0, max_new_tokens=24)
    for rejoin in (0, 4):
        seeds = list(range(len(starts)))
        expected = plain.continue_from(scores, starts, windows, seeds, rejoin=rejoin)
        found = ours.continue_from(scores, starts, windows, seeds, rejoin=rejoin)
        row |= {f"windows {rejoin} {k}": v for k, v in compared(found, expected).items()}
    return {**row, "broken": ours.graphs.broken if ours.graphs else None}


def compared(found: list[Generation], expected: list[Generation]) -> Row:
    """How many texts are equal, and how far their log-probs are apart."""
    same = [(a, b) for a, b in zip(found, expected, strict=True) if a.tokens == b.tokens]
    gaps = [abs(x - y) for a, b in same for x, y in zip(a.logprobs, b.logprobs, strict=True)]
    return {"equal": f"{len(same)} of {len(found)}", "gap": float(f"{max(gaps, default=0):.2g}")}


def precision(way: str) -> Row:
    """In bfloat16: log-probs when written against those of a scoring forward, nats."""
    name = "tiny" if TINY else "SmolLM2-135M"
    model = make(name)
    writer = engine(model, way)
    prompts = random_ids(32, 64, SHAPES[name].vocab)
    written = writer.generate(prompts, Sampling(max_new_tokens=128), list(range(32)))
    scores = writer.score(prompts, [one.tokens for one in written], keep=False)
    told = torch.tensor([one.logprobs for one in written])
    gap = (told - scores.logprobs.cpu()).abs()
    alone = writer.generate(prompts[:4], Sampling(max_new_tokens=128), list(range(4)))
    return {
        "mean gap": float(f"{gap.mean():.3g}"),
        "largest": float(f"{gap.max():.3g}"),
        "same text in another batch": sum(
            a.tokens == b.tokens for a, b in zip(alone, written, strict=False)
        ),
        "broken": writer.graphs.broken if writer.graphs else None,
    }


def profile(name: str, rows: int, way: str) -> Row:
    """Where a step's time goes: microseconds of its kernels."""
    if TINY:
        name, rows = "tiny", 4
    model = make(name)
    writer = engine(model, way)
    texts, sampling = random_ids(rows, 64, SHAPES[name].vocab), Sampling(max_new_tokens=256)
    writer.generate(texts, sampling, list(range(rows)))
    kept = [*writer.graphs._graphs.values()] if writer.graphs else []
    if not kept:
        return {"graph": None}
    graph = kept[0][0]
    writer.graphs._place.fill_(128)  # type: ignore[union-attr]
    writer.graphs._slot.zero_()  # type: ignore[union-attr]
    bare = timed(lambda: [graph.replay() for _ in range(10)]) / 10
    writer.graphs._slot.zero_()  # type: ignore[union-attr]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        graph.replay()
        settle()
    table = sorted(seen.key_averages(), key=lambda one: -one.self_device_time_total)
    kernels = {
        one.key[:60]: [one.count, round(one.self_device_time_total)]
        for one in table
        if one.self_device_time_total > 0
    }
    return {
        "ms a replay": round(1000 * bare, 3),
        "kernels": sum(one.count for one in table),
        "us of kernels": round(sum(one.self_device_time_total for one in table)),
        "count and us": dict(list(kernels.items())[:22]),
    }


def autocasted() -> torch.autocast:
    return torch.autocast(device().type, torch.bfloat16)


PARTS: dict[str, Callable[[], Row]] = {
    "kernel": kernel,
    "135M graph": lambda: speed("SmolLM2-135M", 128, 256, "graph"),
    "135M fused": lambda: speed("SmolLM2-135M", 128, 256, "fused"),
    "profile 135M fused": lambda: profile("SmolLM2-135M", 128, "fused"),
    "equal qwen3 fused": lambda: equality("qwen3", "fused"),
    "equal gemma3 fused": lambda: equality("gemma3", "fused"),
    "equal llama fused": lambda: equality("llama", "fused"),
    "135M eager": lambda: speed("SmolLM2-135M", 128, 96, "eager"),
    "bf16 fused": lambda: precision("fused"),
    "4B fused": lambda: speed("Qwen3-4B", 32, 512, "fused"),
    "profile 4B fused": lambda: profile("Qwen3-4B", 32, "fused"),
    "0.6B float32 autocast fused": lambda: speed(
        "Qwen3-0.6B", 32, 256, "fused", dtype=torch.float32, autocast=autocasted
    ),
    "bf16 graph": lambda: precision("graph"),
    "equal llama graph": lambda: equality("llama", "graph"),
    "profile 135M graph": lambda: profile("SmolLM2-135M", 128, "graph"),
    "4B eager": lambda: speed("Qwen3-4B", 32, 48, "eager"),
}


def main() -> None:
    """Run the parts that are named, or all."""
    wanted = [name for name in sys.argv[1:] if name != "--tiny"]
    for name, part in PARTS.items():
        if wanted and not any(word in name for word in wanted):
            continue
        begun = time.perf_counter()
        if begun - STARTED > MOST:
            print(json.dumps({"part": name, "left out": "no time"}), flush=True)
            continue
        try:
            row = part()
        except Exception as fault:  # noqa: BLE001 - one part's fault hides no other's figures
            row = {"fault": repr(fault)[:300], "where": traceback.format_exc()[-900:]}
        row["s"] = round(time.perf_counter() - begun, 1)
        print(json.dumps({"part": name, **row}), flush=True)
        forget()


if __name__ == "__main__":
    main()
