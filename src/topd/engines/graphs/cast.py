"""Weights in autocast's precision, cast once a call instead of once a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from topd.inputs.models.adapters import plain_layers
from topd.types import Head, autocast_dtype

HEAD = 0  # the key of the head's copy: no object has this id


class CastWeights:
    """Copies of a model's weights, which stay where they are: graphs can point to them."""

    def __init__(self) -> None:
        self._copies: dict[int, Tensor] = {}
        self._forget()

    def _forget(self) -> None:
        none = torch.empty(0)
        self._latest = none, none._version, none

    @contextmanager
    def used(self, model: PreTrainedModel, head: Head) -> Iterator[tuple[Head, bool]]:
        """Inside, the decoder's linear layers use the copies. Yields the head, and whether any
        copy is at another place than before."""
        device = head.weight.device
        if autocast_dtype(device) is None:
            yield head, False
            return
        before = {key: copy.data_ptr() for key, copy in self._copies.items()}
        with ExitStack() as stack:
            for layer in plain_layers(model):
                vars(layer)["forward"] = self._product(layer.weight, layer.bias)
                stack.callback(vars(layer).pop, "forward")
            product = self._product(head.weight, head.bias, HEAD)
            stack.callback(self._forget)
            now = {key: copy.data_ptr() for key, copy in self._copies.items()}
            yield replace(head, product=product), now != before

    def _product(
        self, weight: Tensor, bias: Tensor | None, key: int | None = None
    ) -> Callable[[Tensor], Tensor]:
        """``x @ weight.T + bias`` with the copies."""
        added = None if bias is None else self._copied(-1 if key == HEAD else id(bias), bias)
        copies = self._copied(id(weight) if key is None else key, weight), added

        def product(x: Tensor) -> Tensor:
            return nn.functional.linear(self._narrow(x), *copies)

        return product

    def _narrow(self, x: Tensor) -> Tensor:
        """``x`` in autocast's precision, cast once for all products that follow one another."""
        before, version, cast = self._latest
        if x is not before or x._version != version:
            dtype = autocast_dtype(x.device) or x.dtype
            cast = x.to(dtype)
            self._latest = x, x._version, cast
        return cast

    def _copied(self, key: int, weight: Tensor) -> Tensor:
        dtype = autocast_dtype(weight.device)
        if not weight.dtype.is_floating_point or weight.dtype == dtype:
            return weight.detach()
        known = self._copies.get(key)
        if known is None or known.shape != weight.shape or known.dtype != dtype:
            known = self._copies[key] = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        known.copy_(weight.detach())
        return known
