"""Quantised models: what can be read here is asked of transformers, before weights are."""

from __future__ import annotations

import copy

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from topd.errors import LIBRARY_FAULTS, TOPDError

_FAULTS: tuple[type[Exception], ...] = (*LIBRARY_FAULTS, OSError)
_REMEDY = "Give the same model in bfloat16, not quantised."


def check_quantised(role: str, model: object, config: PretrainedConfig) -> None:
    """Refuse quantised weights that cannot be used as ``role``, student or teacher.

    Raises TOPDError: a student's cannot learn, or what reads them is not installed or does not run
    on this machine.
    """
    parts = model.state_dict().values() if isinstance(model, torch.nn.Module) else ()
    if not all(isinstance(part, torch.Tensor) for part in parts):
        raise TOPDError(
            f"{role}: is quantised, by torch.ao for instance: its weights are not tensors. "
            f"{_REMEDY}"
        )
    asked = getattr(config, "quantization_config", None)
    if not (asked or getattr(model, "is_quantized", False)):
        return
    kept = asked if isinstance(asked, dict) else getattr(asked, "__dict__", {})
    method = kept.get("quant_method") or getattr(model, "quantization_method", "it")
    name = str(getattr(method, "value", method))
    if name == "gguf":  # a GGUF file is dequantised when it is read
        return
    if role == "student":
        raise TOPDError(f"{role}: is quantised ({name}), and such weights cannot learn. {_REMEDY}")
    try:
        if isinstance(model, PreTrainedModel):
            model.to(model.device)
        else:
            AutoHfQuantizer.from_config(copy.deepcopy(asked)).validate_environment(
                dtype=torch.float32, device_map=None
            )
    except _FAULTS as error:
        said = str(error).split("\n")[0].rstrip(".")
        raise TOPDError(f"{role}: is quantised ({name}): {said}. {_REMEDY}") from error
