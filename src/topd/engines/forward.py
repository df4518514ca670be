"""Forwards of a transformers model in this process, and in which way it can write with them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Literal, Unpack, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from topd.engines.base import BaseEngine, Options, Wanted
from topd.engines.draws import Noise
from topd.engines.graphs import Graphs, graphable
from topd.errors import TOPDError
from topd.inputs.models.positions import rope_switch, takes_masks
from topd.types import Generation, Head

# How a model writes, fastest first; each is exact for more models than the one before.
#   shared  together, windows after the cache of the scoring forward, by masks of our own
#   fresh   together, windows after their prefixes, which are read again
#   alone   likewise, one row at a time: nothing is padded, and no row leaves a batch
#   whole   together, without a cache: every text is read from its beginning for each token
Way = Literal["shared", "fresh", "alone", "whole"]
WAYS: tuple[Way, ...] = get_args(Way)
OF_KEYS = ("past_key_values", "cache")  # the latter from transformers 5.24 on, also of states


class ForwardEngine(BaseEngine):
    """A model whose decoder is called here.

    Args:
        model: the whole model, on its device.
        way: how to write; by default what the configuration says, which
            :func:`~topd.engines.decode_check.check_decoding` tries.
        graphs: whether to write with :mod:`topd.engines.graphs`; by default on a GPU, where the
            configuration says that it can.
        options: ``eos_ids``, and the others of :class:`~topd.engines.base.BaseEngine`.

    Attributes:
        graphs: what writes in graphs; None or ``broken`` where nothing does.
        switch: the length from which RoPE has other frequencies; None if it never has.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        way: Way | None = None,
        graphs: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, **options)
        self._kernel = model.config.get_text_config()._attn_implementation
        self._cache_name = _cache_name(model)
        self.way: Way = way or _first_way(model, self._cache_name)
        self.switch = rope_switch(model.config)
        wanted = self.device.type == "cuda" and way is None if graphs is None else graphs
        suits = wanted and self._cache_name in OF_KEYS and graphable(model)
        self.graphs = Graphs(model, self.forward) if suits else None

    @property
    def shares(self) -> bool:
        """Whether texts with a common prefix may be in one row."""
        return self.way == "shared"

    def release(self) -> None:
        """Give back the memory that writing in graphs took: nothing else does so at once."""
        if self.graphs is not None:
            self.graphs.release()

    def forward(
        self,
        ids: Int[Tensor, "N L"],
        mask: Bool[Tensor, "..."] | None = None,
        positions: Int[Tensor, "N L"] | None = None,
        cache: DynamicCache | None = None,
    ) -> Float[Tensor, "N L D"]:
        """Last hidden states; the cache, if there is one, grows by L."""
        output = self.model.get_decoder()(
            input_ids=ids,
            attention_mask=self._mask(mask),
            position_ids=positions,
            use_cache=cache is not None,
            **({self._cache_name: cache} if self._cache_name else {}),
        )
        return output.last_hidden_state

    def _mask(self, mask: Tensor | None) -> Tensor | None:
        """In the form that the model expects: eager attention adds a mask [N 1 q L].

        A row that is alone has no padding: nothing is masked.
        """
        if mask is None or mask.dim() == 2:
            return None if mask is None or self.way == "alone" else mask.long()
        if self._kernel == "sdpa":
            return mask
        added = torch.zeros_like(mask, dtype=self.model.dtype)
        return added.masked_fill_(~mask, torch.finfo(added.dtype).min)

    def noise(self, head: Head, wanted: Wanted) -> Noise:
        """The numbers that texts are drawn with."""
        greedy = wanted.sampling.temperature == 0
        return Noise(wanted.seeds, wanted.steps, head.vocab_size, self.device, greedy=greedy)

    def check_reach(self, longest: int) -> None:
        """No batch stands on both sides of where RoPE changes. Raises TOPDError if one would."""
        if self.switch is not None and longest > self.switch:
            raise TOPDError(
                f"{self.name}: {longest} tokens; beyond {self.switch} its RoPE (longrope or "
                "dynamic) has other frequencies, for all rows of a batch. Ask for shorter texts."
            )

    def check_written(self, written: Sequence[Generation]) -> list[Generation]:
        """The same texts. Raises TOPDError if a log-prob of theirs is NaN."""
        if any(math.isnan(logprob) for one in written for logprob in one.logprobs):
            raise TOPDError(
                f"{self.name}: NaN logits while writing. Check its weights, lower the learning "
                "rate, or use bfloat16 or float32."
            )
        return [*written]


def _cache_name(model: PreTrainedModel) -> str | None:
    """The argument in which a decoder takes its cache; None if it takes none of transformers'."""
    known = inspect.signature(model.get_decoder().forward).parameters
    return next((name for name in (*OF_KEYS, "cache_params") if name in known), None)


def _first_way(model: PreTrainedModel, cache_name: str | None) -> Way:
    """The fastest way that a configuration promises."""
    if cache_name is None:
        return "whole"
    masks = cache_name in OF_KEYS and takes_masks(model.config)
    return "shared" if masks else "fresh"
