"""Weights in oneDNN's own order while a model writes on a CPU.

A product of a few rows with a weight that lies as it is trained spends most of its time on the
weight's order. Writing multiplies with each weight once a token, so a copy in the right order
pays (docs/performance.md, "decode"). On other devices nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from topd.inputs.models.adapters import plain_layers
from topd.types import Head, autocast_dtype

LEAST = 2**16  # entries of a weight: of smaller ones the call costs more than the product
LEAST_MODEL = 2**22  # entries of all: fewer lie in the processor's cache


class PackedLinear:
    """``x @ weight.T + bias`` with a packed copy of the weight [V D]. No gradient."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._dtype = _computed(weight)
        plain = weight.detach().to(self._dtype).contiguous()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(plain)
        self._bias = None if bias is None else bias.detach().to(self._dtype)

    def __call__(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        return torch.ops.mkldnn._linear_pointwise(
            x.to(self._dtype), self._weight, self._bias, "none", [], ""
        )


@contextmanager
def packed(model: PreTrainedModel, head: Head) -> Iterator[Head]:
    """Inside, the model's decoder multiplies with packed copies of its weights.

    Yields the head, packed too. The copies take as much memory as what they are made of, in the
    precision of the autocast that is on, and are gone after it. A model that fits into the
    processor's cache stays as it is.
    """
    layers = [layer for layer in plain_layers(model) if packable(layer.weight)]
    weights = [layer.weight for layer in layers] + [head.weight] * packable(head.weight)
    with ExitStack() as stack:
        if sum(weight.numel() for weight in weights) >= LEAST_MODEL:
            for layer in layers:
                vars(layer)["forward"] = PackedLinear(layer.weight, layer.bias)
                stack.callback(vars(layer).pop, "forward")
            if packable(head.weight):
                head = replace(head, product=PackedLinear(head.weight, head.bias))
        yield head


def packable(weight: Tensor) -> bool:
    """Whether a packed copy can be made of a weight, and pays."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.device.type == "cpu"
        and weight.numel() >= LEAST
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and _supported(_computed(weight))
    )


def _computed(weight: Tensor) -> torch.dtype:
    """The precision that a product with a weight has, under autocast too."""
    dtype = autocast_dtype(weight.device) if weight.dtype.is_floating_point else None
    return dtype or weight.dtype


def _supported(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32
