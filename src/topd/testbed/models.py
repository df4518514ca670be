"""The testbed's tokenizer and tiny Qwen3-type models, and how they are made.

A teacher has some 0.3 M parameters and writes as ``TEACHER`` does; a base student has 0.13 M and
writes as ``STUDENT`` does, mistakes included. Their weights (bfloat16) come with the package;
``python -m topd.testbed make FAMILY`` makes them again.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from datasets import Dataset
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from topd.testbed import problems
from topd.testbed.world import END, STUDENT, TEACHER, Family, write

Role: TypeAlias = Literal["teacher", "student"]

SIZES = {
    "teacher": {"hidden_size": 96, "intermediate_size": 256, "head_dim": 24},
    "student": {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16},
}
AUTHORS = {"teacher": TEACHER, "student": STUDENT}
PAD = "<pad>"


def tokenizer_of(family: Family) -> PreTrainedTokenizerBase:
    """A word-level tokenizer of a family's vocabulary."""
    words = {word: i for i, word in enumerate((PAD, END, *family.vocabulary))}
    tokenizer = Tokenizer(WordLevel(words, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def fresh_model(family: Family, role: Role, *, seed: int) -> PreTrainedModel:
    """A model with random weights, float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(family.vocabulary) + 2,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **SIZES[role],
    )
    return Qwen3ForCausalLM(config)


def make(
    family: Family,
    role: Role,
    folder: Path,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
    texts: int = 20_000,
) -> None:
    """Train a model from scratch on its author's texts and save it with its tokenizer, bfloat16.

    Args:
        family, role: what to make.
        folder: where to.
        steps: updates of AdamW, with a cosine schedule.
        texts: how many texts the author writes; each is read several times.
        batch_size: texts an update.
        learning_rate: its peak.
        seed: of texts, weights and their order.
    """
    tokenizer = tokenizer_of(family)
    model = fresh_model(family, role, seed=seed)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "unused"),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            weight_decay=0.01,
            save_strategy="no",
            logging_steps=max(1, steps // 10),
            report_to="none",
            seed=seed,
            disable_tqdm=True,
        ),
        train_dataset=_texts(family, role, texts, seed, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    trainer.train()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _texts(
    family: Family,
    role: Role,
    count: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Dataset:
    rng, held_out = random.Random(seed), set(problems(family.name, "test"))
    rows = []
    for prompt in family.prompts(rng, count):
        if prompt in held_out:
            continue
        head = tokenizer(prompt)["input_ids"]
        tail = tokenizer(f"{write(family, prompt, AUTHORS[role], rng)} {END}")["input_ids"]
        rows.append({"input_ids": head + tail, "labels": [-100] * len(head) + tail})
    return Dataset.from_list(rows)
