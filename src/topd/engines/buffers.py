"""Keys and values in fixed buffers, and the attention of one new token a row over them.

Row r has its entries from 0 to its own length, so nothing is masked that would be read. While
prompts are read, transformers' own attention runs and the buffers note what it sees. In a step,
between :func:`stepping`'s two ends, attention is :func:`one_token`: no mask is made for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from topd.engines.fused import FAULTS
from topd.types import autocast_dtype

logger = logging.get_logger(__name__)

NAME = "topd_one_token"  # of the attention; transformers makes no mask for a name it has none for
SLACK = 2  # entries after the last token, for steps that are tried
HARMLESS = frozenset(
    ("position_ids", "is_causal", "output_attentions", "output_hidden_states", "use_cache")
    + ("cache_position", "position_embeddings", "return_dict", "output_router_logits")
)  # arguments of attention that change nothing for one token over a contiguous past


class UncapturedError(RuntimeError):
    """A model, or what it was asked for, does not suit graphs."""


class FixedLayer(DynamicLayer):
    """The keys and values of one layer: [R G L D] in memory that is kept and only grows.

    While prompts are read it notes them; while tokens are written it hands out all it has, and
    keeps the new key and value for :func:`one_token`, which puts them into their place.
    """

    def __init__(self, buffers: Buffers, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.fresh: tuple[Tensor, Tensor] | None = None
        self._buffers = buffers
        self._cells = (torch.empty(0), torch.empty(0))
        self._whole = self._cells

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Note what was read, or keep what is new."""
        if self._buffers.reading:
            self.note(key_states, value_states)
            return key_states, value_states
        self.fresh, self._buffers.pending = (key_states, value_states), self
        assert self.keys is not None
        return self.keys, self.values

    def note(self, keys: Tensor, values: Tensor) -> None:
        """Have these entries [N G n D] at the beginning of the first N rows."""
        if keys.shape != values.shape:
            raise UncapturedError("keys and values of different widths")
        dtype = autocast_dtype(keys.device) or keys.dtype
        rows, length = self._buffers.rows, self._buffers.length
        shape = (rows, keys.shape[1], length, keys.shape[3])
        size = shape[0] * shape[1] * shape[2] * shape[3]
        cells = self._cells[0]
        if cells.numel() < size or cells.dtype != dtype or cells.device != keys.device:
            self._cells = self._whole = (torch.empty(0), torch.empty(0))  # frees before it takes
            self._cells = (keys.new_zeros(size, dtype=dtype), keys.new_zeros(size, dtype=dtype))
            self._buffers.moved = True
        self._whole = (self._cells[0][:size].view(shape), self._cells[1][:size].view(shape))
        for whole, new in zip(self._whole, (keys, values), strict=True):
            whole[: len(new), :, : new.shape[2]] = new

    def narrow(self, rows: int) -> None:
        """Hand out the first rows from now on."""
        self.keys, self.values = (whole[:rows] for whole in self._whole)

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy rows to others, up to a length."""
        for whole in self._whole:
            whole[target, :, :length] = whole[source, :, :length]

    def get_seq_length(self) -> int:
        """Nothing that a model should count: positions are given to it."""
        return 0


class Buffers:
    """The keys and values of all layers of a model.

    Attributes:
        cache: what the model's forward takes.
        place: [R], where each row's new token stands; set by who steps.
        rows, length: how large the buffers are for what is read next.
        reading: whether prefixes are read.
        pending: the layer whose new key and value wait for their attention.
        moved: whether memory was taken since this was last set to False.
    """

    def __init__(self, model: PreTrainedModel, place: Tensor) -> None:
        self.cache, self.place = DynamicCache(config=model.config), place
        self.rows = self.length = 0
        self.reading = self.moved = False
        self.pending: FixedLayer | None = None
        self._config = model.config.get_text_config()
        self.layers = [
            FixedLayer(
                self,
                layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None,
            )
            for layer in self.cache.layers
        ]
        self.cache.layers = [*self.layers]

    @contextmanager
    def noting(self) -> Iterator[DynamicCache]:
        """Inside, what is read into the cache that this yields is noted from entry 0 on."""
        self.reading = True
        try:
            yield self.cache
        finally:
            self.reading = False

    def copy(self, cache: DynamicCache, rows: Tensor, length: int) -> None:
        """Have the first ``length`` entries of some rows of another cache."""
        for layer, old in zip(self.layers, cache.layers, strict=True):
            layer.note(*(x[:, :, :length].index_select(0, rows) for x in (old.keys, old.values)))

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy rows to others, up to a length."""
        for layer in self.layers:
            layer.move(source, target, length)

    @contextmanager
    def stepping(self, rows: int) -> Iterator[None]:
        """Inside, the model's forward reads one token of each of the first rows."""
        global _stepping
        before = self._config._attn_implementation, torch.is_autocast_cache_enabled(), _stepping
        for layer in self.layers:
            layer.narrow(rows)
        try:
            self._config._attn_implementation = NAME
            torch.set_autocast_cache_enabled(False)  # what it keeps is gone at the next replay
            _stepping = self
            yield
        finally:
            _stepping = before[2]
            torch.set_autocast_cache_enabled(before[1])
            self._config._attn_implementation = before[0]


_stepping: Buffers | None = None


def one_token(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention of transformers for one new token a row; queries [R H 1 D], buffers [R G L D].

    Returns [R 1 H D]. Raises UncapturedError for what it does not know: attention sinks, or a soft
    cap, which transformers' own kernels differ in heeding.
    """
    if _stepping is None:
        raise UncapturedError("attention of one token outside of a step")
    layer, _stepping.pending = _stepping.pending, None
    if layer is None:
        raise UncapturedError("attention without keys of its own")
    odd = [name for name, given in others.items() if given is not None and name not in HARMLESS]
    if odd or key is not layer.keys or query.shape[2] != 1:
        raise UncapturedError(f"attention with {', '.join(odd) or 'other keys'}")
    if sliding_window not in (None, layer.window):
        raise UncapturedError(f"a window of {sliding_window} where the cache has {layer.window}")
    assert layer.fresh is not None
    scale = scaling if scaling is not None else float(query.shape[-1]) ** -0.5
    fresh, layer.fresh = layer.fresh, None
    place = _stepping.place[: len(query)]
    kernel = _kernel(query, key, windowed=layer.window is not None)
    attend = _plain if kernel is None else kernel.attend
    return attend(query, fresh, (key, value), place, scale=scale, window=layer.window), None


def _plain(
    query: Tensor,
    new: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    place: Tensor,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """The same as :func:`topd.engines.decode_kernel.attend` in torch's own operations."""
    row = torch.arange(len(query), device=query.device)
    for cells, one in zip(cache, new, strict=True):
        cells[row, :, place] = one[:, :, 0].to(cells.dtype)
    key, value = cache
    entry, at = torch.arange(key.shape[2], device=key.device), place[:, None]
    seen = entry <= at
    if window is not None:
        seen &= entry > at - window
    mask, query = seen[:, None, None], query.to(key.dtype)
    found = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return found.transpose(1, 2)


ALL_ATTENTION_FUNCTIONS.register(NAME, one_token)


def _kernel(query: Tensor, keys: Tensor, *, windowed: bool) -> Any:
    """The module of the Triton kernel where it serves; None elsewhere."""
    shape = (query.shape[1], keys.shape[1], keys.shape[3])
    return _tried(shape, query.dtype, keys.dtype, keys.device, windowed)


@functools.cache
def _tried(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    kept: torch.dtype,
    device: torch.device,
    windowed: bool,
) -> Any:
    """The kernel's module, if it gives what attention without it gives on a small example."""
    try:
        from topd.engines import decode_kernel
    except ImportError:  # no Triton
        return None
    heads, groups, width = shape
    if not decode_kernel.serves(torch.empty(0, dtype=kept, device=device)):
        return None
    some = torch.Generator().manual_seed(0)

    def made(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=some).to(device, dtype)

    rows, length = 4, 160
    place = torch.tensor([0, 5, 130, 159], device=device)
    query, fresh = made(rows, heads, 1, width), (made(rows, groups, 1, width),) * 2
    cells = made(rows, groups, length, width).to(kept)
    options: dict[str, Any] = {"scale": width**-0.5, "window": 40 if windowed else None}
    try:
        found = decode_kernel.attend(query, fresh, (cells.clone(), cells.clone()), place, **options)
        expected = _plain(query, fresh, (cells, cells.clone()), place, **options)
        gap = float((found.float() - expected.float()).abs().max())
    except FAULTS as fault:
        said = str(fault).strip().partition("\n")[0][:100]
        logger.warning(f"no kernel for attention ({type(fault).__name__}: {said}): slower.")
        return None
    if gap > (1e-4 if torch.float32 in (dtype, kept) and dtype == kept else 0.05):
        logger.warning(f"no kernel for attention: it is off by {gap:.2g}. Writing is slower.")
        return None
    return decode_kernel


def rounded(tokens: int) -> int:
    """How many entries a row of the buffers has, so that few numbers of them are captured."""
    unit = 128 if tokens + SLACK <= 512 else 256
    return -(-(tokens + SLACK) // unit) * unit


def entry_bytes(model: PreTrainedModel) -> int:
    """Bytes of a token's keys and values in all layers, under the autocast that is on."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    dtype = autocast_dtype(model.device) or model.dtype
    return 2 * text.num_hidden_layers * groups * width * dtype.itemsize
