"""The testbed's tokenizer and tiny Qwen3-type models, and how they are made.

A teacher has some 0.3 M parameters and writes as ``TEACHER`` does; a base student has 0.13 M
and writes as ``STUDENT`` does, mistakes included. What an author slipped at and then put right is
read and not learned. The teacher of guesses is told the answer (:data:`TOLD`). Their weights
(bfloat16) come with the package;
``python -m topd.testbed FAMILY ROLE`` makes them again.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

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
from topd.testbed.guesses import Guesses
from topd.testbed.world import END, STUDENT, TEACHER, Family, Step, derive

Role: TypeAlias = Literal["teacher", "student"]

AUTHORS = {"teacher": TEACHER, "student": STUDENT}


@dataclass(frozen=True)
class Making:
    """How large a model is, and how it is made: so many updates, at this peak learning rate."""

    hidden_size: int
    intermediate_size: int
    steps: int
    layers: int = 3
    learning_rate: float = 3e-3
    lessons: Family | None = None  # whose problems it learns, if not the family's own
    told: bool = False  # the answer, at the end of its prompt


MAKINGS: dict[str, Making] = {
    "teacher": Making(96, 256, steps=1000),
    "student": Making(64, 160, steps=600),
    "guesses/teacher": Making(96, 256, steps=1500, told=True),
    # does sums, and has never guessed
    "guesses/student": Making(64, 160, steps=1000, lessons=Guesses((2, 3, 4, 5), given=True)),
}
PAD = "<pad>"
TOLD = "{prompt} told {answer}"  # a prompt of a teacher that is told


def tokenizer_of(family: Family) -> PreTrainedTokenizerBase:
    """A word-level tokenizer of a family's vocabulary."""
    words = {word: i for i, word in enumerate((PAD, END, *family.vocabulary))}
    tokenizer = Tokenizer(WordLevel(words, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def making_of(family: Family, role: Role) -> Making:
    """The family's own making of a role, or that of all families."""
    return MAKINGS.get(f"{family.name}/{role}", MAKINGS[role])


def fresh_model(family: Family, making: Making, *, seed: int) -> PreTrainedModel:
    """A model with random weights, float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(family.vocabulary) + 2,
        num_hidden_layers=making.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        hidden_size=making.hidden_size,
        intermediate_size=making.intermediate_size,
        head_dim=making.hidden_size // 4,
    )
    return Qwen3ForCausalLM(config)


def make(
    family: Family,
    role: Role,
    folder: Path,
    *,
    batch_size: int = 64,
    seed: int = 0,
    texts: int = 20_000,
    making: Making | None = None,
    **arguments: Any,
) -> None:
    """Train a model from scratch on its author's texts and save it with its tokenizer, bfloat16.

    AdamW with a cosine schedule, for as many updates as :data:`MAKINGS` says.

    Args:
        family, role: what to make.
        folder: where to.
        texts: how many texts the author writes; each is read several times.
        batch_size: texts an update.
        seed: of texts, weights and their order.
        making: how; none: as :data:`MAKINGS` says.
        arguments: more training arguments of transformers.
    """
    tokenizer = tokenizer_of(family)
    making = making or making_of(family, role)
    model = fresh_model(family, making, seed=seed)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "unused"),
            max_steps=making.steps,
            per_device_train_batch_size=batch_size,
            learning_rate=making.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            weight_decay=0.01,
            save_strategy="no",
            logging_steps=making.steps // 10,
            report_to="none",
            seed=seed,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=_texts(family, role, texts, seed, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    trainer.train()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _texts(
    family: Family, role: Role, count: int, seed: int, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    rng, held_out = random.Random(seed), set(problems(family.name, "test"))
    rows = []
    making = making_of(family, role)
    taught = making.lessons or family
    for prompt in taught.prompts(rng, count):
        if prompt in held_out:
            continue
        steps = [*derive(taught, prompt, AUTHORS[role], rng), Step((END,), None)]
        words = [(word, step.slip) for step in steps for word in step.words]
        told = TOLD.format(prompt=prompt, answer=steps[-2].words[-1]) if making.told else prompt
        head = tokenizer(told)["input_ids"]
        tail = tokenizer(" ".join(word for word, _ in words))["input_ids"]
        learned = [-100 if slip else i for i, (_, slip) in zip(tail, words, strict=True)]
        rows.append({"input_ids": head + tail, "labels": [-100] * len(head) + learned})
    return Dataset.from_list(rows)
