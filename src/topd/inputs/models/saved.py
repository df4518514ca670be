"""Weights on disk into a model in memory, where they may have other names."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel

from topd.inputs.models.bare import named_faults


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
