"""The load-balancing loss of mixtures of experts: the model's own, where its configuration asks."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from topd.errors import LIBRARY_FAULTS, TOPDError
from topd.inputs.models.heads import evaluating

_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")  # names that transformers' models read


def router_weight(model: PreTrainedModel | PeftModel) -> float:
    """The weight of the load-balancing loss that a configuration asks for; 0 where it does not.

    As transformers decides: ``output_router_logits`` is true, and the coefficient is above 0.
    """
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    return float(next((getattr(config, name) for name in _WEIGHTS if hasattr(config, name)), 0.0))


def check_router(model: PreTrainedModel | PeftModel) -> None:
    """Make sure that a load-balancing loss which is asked for is the model's own to give.

    Its forward adds the loss to a cross-entropy over no tokens: that must be as much as its
    configuration says.

    Raises:
        TOPDError: it adds another amount, or none.
    """
    if not getattr(model.config.get_text_config(), "output_router_logits", False):
        return
    weight = router_weight(model)
    ids = torch.arange(16, device=model.device)[None] % model.config.get_text_config().vocab_size
    nothing = torch.full_like(ids, -100)
    try:
        with evaluating(model):
            output = model(input_ids=ids, labels=nothing, num_items_in_batch=1, use_cache=False)
        added, loss = float(output.loss.detach()), getattr(output, "aux_loss", None)
        given = 0.0
        if isinstance(loss, Tensor) and loss.requires_grad:
            given = weight * float(loss.detach())
        said = f"its own forward adds {added:.4g}, and its balance times the weight is {given:.4g}"
    except LIBRARY_FAULTS as error:
        added, given, said = 1.0, 0.0, f"{type(error).__name__}: {str(error)[:100]}"
    if not abs(added - given) <= 1e-3 * abs(added) or (weight and not given):
        raise TOPDError(
            f"student: its configuration has output_router_logits, a load-balancing loss of weight "
            f"{weight:g}, and {type(model).__name__} does not say what that loss is ({said}). Set "
            "output_router_logits: false in its config.json."
        )


def balanced_forward(
    model: PreTrainedModel | PeftModel, input_ids: Int[Tensor, "B L"], tokens: list[int]
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, ""]]:
    """Last hidden states, and the load-balancing loss that the model itself makes of its routers.

    One forward, with the head on one position a row. Padding is not counted.

    Args:
        tokens: how many of each row of ``input_ids`` are not padding.

    Raises TOPDError where it would have no gradient.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    forward = getattr(base, "_original_forward", base.forward)  # not accelerate's: float32 outputs
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    mask = columns < torch.tensor(tokens, device=input_ids.device)[:, None]
    found: list[Tensor] = []

    def note(_: Any, __: Any, output: Any) -> None:
        found.append(output.last_hidden_state)

    with base.get_decoder().register_forward_hook(note):
        given = {"input_ids": input_ids, "attention_mask": mask.long()}
        output = forward(**given, use_cache=False, logits_to_keep=1)
    if torch.is_grad_enabled() and not output.aux_loss.requires_grad:
        raise TOPDError(
            "student: its load-balancing loss has no gradient where activations are recomputed by "
            "use_reentrant: true. Set gradient_checkpointing_kwargs: {use_reentrant: false}."
        )
    return found[0], output.aux_loss
