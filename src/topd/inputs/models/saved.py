"""Weights on disk into a model in memory, where they may have other names."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.utils import logging

from topd.errors import LIBRARY_FAULTS, TOPDError
from topd.inputs.models.bare import named_faults

logger = logging.get_logger(__name__)

NAMED = 3  # weights in a message


@torch.no_grad()
def load_saved(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Give a model the weights that ``save_pretrained`` wrote into a folder.

    What is one tensor in memory may be several on disk (the experts of a mixture), of which
    ``load_state_dict`` finds nothing: then transformers reads the folder as a model of the class.
    Others are read as they are, so that a model that was changed in Python keeps its parts.

    Args:
        model: the model, of the shapes that were saved; its dtypes stay. Or one with an adapter.
        folder: has ``model*.safetensors``, or ``adapter_model.safetensors``, and maybe others;
            of adapters that are not called ``default`` in a folder of their name.
    """
    if isinstance(model, PeftModel):
        for name in model.peft_config:
            place = folder if name == "default" else folder / name
            weights = tensors_in(place, "adapter_model*.safetensors")
            set_peft_model_state_dict(model, weights, adapter_name=name)
        return
    weights = tensors_in(folder, "model*.safetensors")
    if {name for name, _ in model.named_parameters()} - weights.keys():
        weights.clear()
        kinds = (p.dtype for p in model.parameters() if p.is_floating_point())
        widest = max(kinds, key=lambda kind: kind.itemsize)  # of some, so that none is rounded
        options = {"config": model.config, "dtype": widest, "use_safetensors": True}
        with named_faults():
            weights = type(model).from_pretrained(folder, **options).state_dict()
    model.load_state_dict(weights, strict=False)


def tensors_in(folder: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    """All tensors of a folder's files, by the names that they have there."""
    return {k: v for file in folder.glob(pattern) for k, v in load_file(file).items()}


def check_complete(
    path: str, model: PreTrainedModel, report: Mapping[str, Collection[str]]
) -> None:
    """Refuse a model whose files lack weights: transformers makes up random ones, and warns.

    Buffers that they lack are as its own models begin. Weights that no part of the model has are
    said. ``report`` is transformers' of the loading. Raises TOPDError.
    """
    lacking, idle = (sorted(report[key]) for key in ("missing_keys", "unexpected_keys"))
    begun = {name for name, _ in model.named_buffers()} if _is_known(model) else set[str]()
    lacking = [name for name in lacking if name not in begun]
    others = f"weights that the model has no place for ({_some(idle)})" if idle else ""
    if lacking:
        raise TOPDError(
            f"model {path}: its files lack weights ({_some(lacking)}), which would be random"
            f"{f', and have {others}' * bool(idle)}. Are they whole, of this model, and with its "
            "own names of weights, as save_pretrained writes them?"
        )
    if idle:
        logger.warning(f"model {path}: its files have {others}. They are not used.")


def _is_known(model: PreTrainedModel) -> bool:
    return type(model).__module__.startswith("transformers.")


def _some(names: Sequence[str]) -> str:
    more = f", {len(names)} in all" * (len(names) > NAMED)
    return ", ".join(names[:NAMED]) + more


@torch.no_grad()
def remake_buffers(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model by code of its own the buffers that no file has, as its code makes them.

    transformers 5 leaves them without values (frequencies of RoPE, say), but for its own models.
    Raises TOPDError if it does not make them.
    """
    if _is_known(model):
        return model
    unsaved = [
        (f"{place}.{name}" if place else name, module.get_buffer(name))
        for place, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set & module._buffers.keys())
        if module._buffers[name] is not None
    ]
    if not unsaved:
        return model
    try:
        with init_empty_weights(include_buffers=False):
            fresh = type(model)(copy.deepcopy(model.config))
        made = dict(fresh.named_buffers(remove_duplicate=False))
        for name, buffer in unsaved:
            buffer.copy_(made[name])
    except LIBRARY_FAULTS as error:
        raise TOPDError(
            f"model {model.name_or_path}: its code does not make the buffers that its files do not "
            f"have ({type(error).__name__}: {error}), and transformers leaves them without values. "
            "Load it in Python, and give TOPDTrainer the model."
        ) from error
    return model
