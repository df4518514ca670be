"""Models of known shapes with random weights, for benchmarks on a GPU: no download, no disk.

Their distributions are nearly flat: of 150,000 tokens the end of a text is one, so rollouts have
full length but for a few in a million tokens. No head has a bias, as real ones have none.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from topd.types import Ids

GIB = 1 << 30
EOS = 2


@dataclass(frozen=True)
class Shape:
    """What a model's size is made of; ``kind`` is the architecture.

    ``padding`` are the head's rows that no token has.
    """

    kind: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    tied: bool = True
    padding: int = 0


SHAPES = {
    "SmolLM2-135M": Shape("llama", 576, 30, 9, 3, 64, 1536, 49_152),
    "SmolLM2-1.7B": Shape("llama", 2048, 24, 32, 32, 64, 8192, 49_152),
    "Qwen3-0.6B": Shape("qwen3", 1024, 28, 16, 8, 128, 3072, 151_936, padding=267),
    "Qwen3-1.7B": Shape("qwen3", 2048, 28, 16, 8, 128, 6144, 151_936, padding=267),
    "Qwen3-4B": Shape("qwen3", 2560, 36, 32, 8, 128, 9728, 151_936, padding=267),
    "Qwen3-8B": Shape("qwen3", 4096, 36, 32, 8, 128, 12_288, 151_936, tied=False, padding=267),
    "Qwen3-14B": Shape("qwen3", 5120, 40, 40, 8, 128, 17_408, 151_936, tied=False, padding=267),
    "Qwen3-32B": Shape("qwen3", 5120, 64, 64, 8, 128, 25_600, 151_936, tied=False, padding=267),
    "tiny": Shape("qwen3", 64, 2, 4, 2, 16, 128, 512),
}


def device() -> torch.device:
    """The GPU; the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make(
    name: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    place: torch.device | None = None,
) -> PreTrainedModel:
    """A model of a shape, made on the device; ``generate`` ends at no token."""
    shape = SHAPES[name]
    config_of, model_of = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[shape.kind]
    config = config_of(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.inner,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with place or device():
            model = model_of(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return model


def random_ids(rows: int, length: int, vocab: int, seed: int = 0) -> list[Ids]:
    """Texts of random tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(4, min(vocab, 1000), (rows, length), generator=generator)
    return [tuple(row) for row in drawn.tolist()]


def settle() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """How long work takes, on the GPU too."""
    settle()
    started = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - started


def forget() -> None:
    """Give freed memory back, so that the next peak is that of what comes next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def restart_peak() -> float:
    """Forget the highest memory so far; GiB that are taken now."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / GIB


def peak() -> float:
    """The highest memory since ``restart_peak``, GiB."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
