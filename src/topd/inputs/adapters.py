"""Students with adapters: what can be trained, and the model that an adapter makes of its base."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from topd.errors import TOPDError

ADAPTER = "adapter_config.json"
_PEFT_FAULTS = (ValueError, TypeError, RuntimeError, NotImplementedError, ImportError, KeyError)


def refuse_adapter_folder(path: str, place: str) -> None:
    """Refuse the folder of an adapter where a model is wanted. Raises TOPDError."""
    stored = Path(place) / ADAPTER
    if stored.is_file():
        raise TOPDError(
            f"model {path}: is an adapter ({ADAPTER}), not a model. Merge it into its base and "
            "save that: PeftModel.from_pretrained(base, adapter).merge_and_unload()."
            "save_pretrained(...). Or give a PeftModel in Python, loaded with is_trainable=True."
        )


def try_adapter(config: PretrainedConfig, adapter: PeftConfig, student: object) -> None:
    """Wrap and merge a model without weights as training will. Raises TOPDError if it fails.

    Args:
        config: the student's.
        adapter: what to wrap it in.
        student: the source of the student; a PeftModel has an adapter already.
    """
    if adapter.peft_type != PeftType.LORA or not isinstance(adapter, LoraConfig):
        raise TOPDError(f"peft_config: {adapter.peft_type} is not supported. Use LoRA.")
    if isinstance(student, PeftModel):
        raise TOPDError(
            f"peft_config: the student is a PeftModel with the adapter {student.active_adapter!r} "
            "already. Leave peft_config out, or merge the adapter first (merge_and_unload)."
        )
    empty = copy.deepcopy(adapter)
    if empty.init_lora_weights is not True:
        empty.init_lora_weights = True  # pissa and others read weights
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
            merged(get_peft_model(model, empty))
    except _PEFT_FAULTS as error:
        raise _refused(error) from error


def with_adapter(student: PreTrainedModel, adapter: PeftConfig) -> PeftModel:
    """The student wrapped in a new adapter. Raises TOPDError."""
    try:
        return get_peft_model(student, adapter)
    except _PEFT_FAULTS as error:
        raise _refused(error) from error


def _refused(error: Exception) -> TOPDError:
    return TOPDError(f"peft_config (lora in a recipe): {type(error).__name__}: {error}")


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model itself; of one with an adapter a copy that has it in its weights.

    An adapter on one of two tied embeddings parts them: the copy has a head of its own then.
    """
    if not isinstance(model, PeftModel):
        return model
    whole = copy.deepcopy(model)
    base = whole.get_base_model()
    inputs, head = base.get_input_embeddings(), base.get_output_embeddings()
    if isinstance(inputs, BaseTunerLayer) and not isinstance(head, BaseTunerLayer):
        own = inputs.get_base_layer().weight
        if head is not None and head.weight is own:
            head.weight = nn.Parameter(own.detach().clone())
            for config in (base.config, base.config.get_text_config()):
                config.tie_word_embeddings = False
    return whole.merge_and_unload()


def check_trainable(student: PreTrainedModel | PeftModel) -> None:
    """Refuse a student that nothing would be learned by. Raises TOPDError."""
    if isinstance(student.get_output_embeddings(), BaseTunerLayer):
        raise TOPDError("peft_config: LoRA on the output head is not supported. Leave it out.")
    if any(parameter.requires_grad for parameter in student.parameters()):
        return
    if isinstance(student, PeftModel):
        raise TOPDError(
            f"student: its adapter {student.active_adapter!r} is frozen, as PEFT loads it. Load it "
            "with PeftModel.from_pretrained(base, adapter, is_trainable=True)."
        )
    raise TOPDError("student: all its weights are frozen. Call model.requires_grad_(True) first.")


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that has weights in common with the student. Raises TOPDError."""
    ours = {id(parameter) for parameter in student.parameters()}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in ours]
    if shared:
        inside = "the base inside the student's adapter" if isinstance(student, PeftModel) else ""
        raise TOPDError(
            f"teacher_model: is the student itself, or has its weights ({inside or shared[0]}). "
            "Use copy.deepcopy(model), made before the adapter."
        )
