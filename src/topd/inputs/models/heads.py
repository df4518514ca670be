"""The output head of a causal language model, held against the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from topd.errors import TOPDError
from topd.types import Head

# the cap that a model puts on its logits, under the names that transformers uses
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def head_of(model: PreTrainedModel) -> Head:
    """The output head of a causal language model, with its scale and soft-cap.

    Raises TOPDError for a model without an output head.
    """
    linear = model.get_output_embeddings()
    if linear is None:
        raise TOPDError(f"{type(model).__name__} has no output head. Use a causal language model.")
    config = model.config.get_text_config()
    return Head(
        linear.weight,
        getattr(linear, "bias", None),
        scale=_logit_scale(config),
        softcap=_first_of(config, SOFTCAPS),
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, a model is in eval mode; then it is in the mode of before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def check_head(name: str, model: PreTrainedModel) -> None:
    """Make sure that ``head_of`` gives the model's own logits. Raises TOPDError if not.

    Rows after the last token may be padding, which some models bar (-inf).
    """
    ids = torch.arange(4, device=model.device)[None]
    with evaluating(model):
        expected = model(input_ids=ids, use_cache=False).logits.float()
        tokens = int((expected != -torch.inf).any(0).any(0).nonzero().max()) + 1
        try:
            states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            apart = head_of(model).logits(states) - expected
        except (AttributeError, TypeError, RuntimeError) as error:
            raise TOPDError(
                f"{name}: {type(model).__name__} names no decoder whose hidden states its head "
                f"takes ({type(error).__name__}: {str(error)[:100]}). It is not supported: use a "
                "causal language model of text."
            ) from error
    gap, most = (x[..., :tokens].abs().max().item() for x in (apart, expected.nan_to_num(neginf=0)))
    rounding = 1e-4 if model.dtype in (torch.float32, torch.float64) else 1e-2
    if gap > rounding * most:  # a NaN is for score to report
        raise TOPDError(
            f"{name}: logits computed from {type(model).__name__}'s hidden states differ from its "
            f"own by up to {gap:.3g}. It treats logits in a way that TOPD does not know."
        )


def _logit_scale(config: object) -> float:
    """The factor that a model puts on its logits, under the names that transformers uses."""
    scale = _first_of(config, ("logit_scale", "output_multiplier", "lm_head_multiplier"))
    if scale is not None:
        return scale
    scaling = _first_of(config, ("logits_scaling",))
    if scaling is None:
        return 1.0
    return scaling if getattr(config, "model_type", "") == "hyperclovax" else 1 / scaling


def _first_of(config: object, names: Sequence[str]) -> float | None:
    values = (getattr(config, name, None) for name in names)
    return next((float(value) for value in values if value is not None), None)
