"""What a model's attention knows of positions, as far as its configuration says."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

logger = logging.get_logger(__name__)

# ALiBi, and GPT-Neo's local layers: what a token sees depends on where keys lie in the cache
COUNT_PLACES = ("bloom", "mpt", "gpt_neo")


def takes_masks(config: PretrainedConfig) -> bool:
    """Whether a mask and position ids alone say what a token sees.

    So it is with full attention throughout, by a kernel that takes any mask. Texts that share a
    prefix may then stand in one row. :func:`~topd.engines.decode_check.check_decoding` tries it.
    """
    text = config.get_text_config()
    layers = DynamicCache(config=config).layers
    return (
        text._attn_implementation in ("sdpa", "eager")
        and text.model_type not in COUNT_PLACES
        and not getattr(text, "alibi", False)
        and bool(layers)
        and all(type(layer) is DynamicLayer for layer in layers)
    )


def rope_switch(config: PretrainedConfig) -> int | None:
    """Behind how many tokens RoPE has other frequencies, for all rows of a batch; None: never.

    Dynamic NTK and longrope (Phi-3, Phi-4-mini) choose them by the longest row.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}  # of all layers, or of each kind
    ropes = [parameters] if "rope_type" in parameters else parameters.values()
    limits = [
        rope.get("original_max_position_embeddings", text.max_position_embeddings)
        if rope.get("rope_type") == "longrope"
        else text.max_position_embeddings
        for rope in ropes
        if isinstance(rope, Mapping) and rope.get("rope_type") in ("longrope", "dynamic")
    ]
    return min(limits, default=None)


def exact_rope(role: str, model: nn.Module) -> None:
    """Give a model its RoPE's frequencies in float32 back, where ``.to(torch.bfloat16)`` cut them.

    ``from_pretrained(..., dtype=...)`` keeps them, so a model that is loaded again has others, and
    the more so the longer a text is. Frequencies that are saved, or are made in 16 bits, stay.
    """
    said = set()
    for module in model.modules():
        for name, held in module.named_buffers(recurse=False):
            saved = name not in module._non_persistent_buffers_set
            if saved or not name.endswith("inv_freq") or held.dtype.itemsize != 2:
                continue
            fresh = _as_made(module, name, held.dtype)
            if fresh is None:
                said.add("are in 16 bits. If that is by .to() or .half(), load it in that dtype by")
            elif fresh.dtype != held.dtype:
                module.register_buffer(name, fresh.to(held.device), persistent=False)
                said.add("were in 16 bits, by .to() or .half(), and are in float32 again, as by")
    for what in sorted(said):
        logger.warning(
            f"{role}: the frequencies of its RoPE {what} from_pretrained(..., dtype=...)."
        )


def _as_made(module: nn.Module, name: str, dtype: torch.dtype) -> torch.Tensor | None:
    """A buffer as from_pretrained makes it in a dtype; None of a module that wants more for it."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return getattr(type(module)(module.config), name)
    except (AttributeError, TypeError, ValueError):
        return None
    finally:
        torch.set_default_dtype(usual)
