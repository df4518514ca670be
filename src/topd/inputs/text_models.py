"""What is here of a teacher that gives only text: its tokenizer, and a model in its place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from topd.errors import TOPDError
from topd.inputs.models.positions import rope_switch
from topd.inputs.prompt_rows import Row
from topd.inputs.served import ByText

CHAT_TEMPLATE = "{{ messages | tojson }}"  # a chat server puts its own template around them


def is_by_text(model: object) -> TypeGuard[ByText]:
    """Whether nothing but text is asked of a model."""
    return isinstance(model, ByText) and model.by_text


def text_tokenizer(
    spec: Any, student: PreTrainedTokenizerBase, lent: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """What writes the prompts of a teacher at a URL: the tokenizer ``lent``, or the student's.

    Its chat template is the one of the teacher's spec; for a chat server the messages themselves.
    """
    template = CHAT_TEMPLATE if spec.text.chat else spec.chat_template and spec._template()
    tokenizer = lent or student
    if template:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def check_reaches(asked: Row, teachers: Sequence[PreTrainedTokenizerBase]) -> None:
    """Refuse what a row gives to the template where a server has its own. Raises TOPDError."""
    if asked.template_kwargs and any(t.chat_template == CHAT_TEMPLATE for t in teachers):
        raise TOPDError(
            f"data row {asked.index}: its {', '.join(asked.template_kwargs)} would not reach the "
            "teacher, a chat server with a template of its own. Leave teacher.text.chat out, so "
            "that the prompt is written here, or leave the columns out."
        )


def reach_of(config: PretrainedConfig) -> int | None:
    """How many tokens a model reads as it should; None: there is no limit.

    Beyond it there are no positions, or RoPE has other frequencies (``rope_switch``).
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min([n for n in (positions, rope_switch(config)) if n is not None], default=None)


def stand_in(name: str, rows: int) -> PreTrainedModel:
    """A model of no layers and zeros, in the place of weights that are elsewhere.

    Its ``name`` is part of its fingerprint; ``rows`` are the tokens of the student's vocabulary.
    """
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=2,
        intermediate_size=2,
        num_hidden_layers=0,
        num_attention_heads=1,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._name_or_path = name
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    model.register_buffer("stands_for", torch.tensor(list(name.encode()), dtype=torch.uint8))
    return model
