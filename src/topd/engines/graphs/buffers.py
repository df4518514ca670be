"""Keys and values in fixed buffers, and the attention of one new token a row over them.

Row r has its entries from 0 to its own length, so nothing is masked that would be read. While
prompts are read, transformers' own attention runs and the buffers note what it sees. In a step,
between :func:`stepping`'s two ends, attention is :func:`one_token`: no mask is made for it.

Windows of one text share its entries: these are copied once, end to end, and a row has only what it
writes itself (:class:`~topd.engines.graphs.attention.Prefixes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from topd.engines.graphs.attention import Prefixes, way_to_attend
from topd.types import autocast_dtype

NAME = "topd_one_token"  # of the attention; transformers makes no mask for a name it has none for
SLACK = 2  # entries after the last token, for steps that are tried
OWN_UNIT, SHARED_UNIT = 16, 1024  # of entries where rows continue prefixes
HARMLESS = frozenset(
    ("position_ids", "is_causal", "output_attentions", "output_hidden_states", "use_cache")
    + ("cache_position", "position_embeddings", "return_dict", "output_router_logits")
)  # arguments of attention that change nothing for one token over a contiguous past


class UncapturedError(RuntimeError):
    """A model, or what it was asked for, does not suit graphs."""


class Cells:
    """Memory for keys and for values that is kept and only grows."""

    def __init__(self, buffers: Buffers) -> None:
        self.pair = (torch.empty(0), torch.empty(0))
        self._buffers = buffers

    def of(self, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a shape, as autocast would have them."""
        dtype, size = autocast_dtype(like.device) or like.dtype, math.prod(shape)
        have = self.pair[0]
        if have.numel() < size or have.dtype != dtype or have.device != like.device:
            taken = grown(size) if have.numel() else size
            del have
            self.pair = (torch.empty(0), torch.empty(0))  # frees before it takes
            self.pair = (like.new_zeros(taken, dtype=dtype), like.new_zeros(taken, dtype=dtype))
            self._buffers.moved = True
        return self.pair[0][:size].view(shape), self.pair[1][:size].view(shape)

    def whole(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """All of them, as entries of a shape."""
        count = self.pair[0].numel() // math.prod(shape)
        keys, values = (cells[: count * math.prod(shape)] for cells in self.pair)
        return keys.view(count, *shape), values.view(count, *shape)


class FixedLayer(DynamicLayer):
    """The keys and values of one layer: [R G L D], and [E G D] before them, in fixed memory.

    While prompts are read it notes them; while tokens are written it hands out all it has, and
    keeps the new key and value for :func:`one_token`, which puts them into their place.
    """

    def __init__(self, buffers: Buffers, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.fresh: tuple[Tensor, Tensor] | None = None
        self._buffers = buffers
        self.own, self.shared = Cells(buffers), Cells(buffers)
        self._whole = self._before = self.own.pair

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
        self._make(keys, values)
        for whole, new in zip(self._whole, (keys, values), strict=True):
            whole[: len(new), :, : new.shape[2]] = new

    def share(self, keys: Tensor, values: Tensor, row: Tensor, entry: Tensor) -> None:
        """Have the entries (row, entry) [N] of keys and values [B G n D] before all rows' own.

        All memory there is for them is handed out: a captured step knows how much that is, and
        replays what it knows until the memory moves.
        """
        self._make(keys, values)
        shape = keys.shape[1], keys.shape[3]
        self._before = (torch.empty(0), torch.empty(0))  # frees views
        self.shared.of((rounded(len(row), SHARED_UNIT), *shape), keys)
        self._before = self.shared.whole(shape)
        for cells, old in zip(self._before, (keys, values), strict=True):
            cells[: len(row)] = old.transpose(1, 2)[row, entry]

    def _make(self, keys: Tensor, values: Tensor) -> None:
        """Have memory for the rows' own entries, of the kind of these."""
        if keys.shape != values.shape:
            raise UncapturedError("keys and values of different widths")
        shape = (self._buffers.rows, keys.shape[1], self._buffers.length, keys.shape[3])
        self._whole = self.keys, self.values = torch.empty(0), torch.empty(0)  # frees views
        self._whole = self.own.of(shape, keys)

    def prefixes(self, rows: int) -> Prefixes | None:
        """What the first rows have before their own entries; None where all are their own."""
        if not self._buffers.continuing:
            return None
        return Prefixes(*self._before, self._buffers.first[:rows], self._buffers.known[:rows])

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
        first, known: [R], of the shared entries those that are before each row's own.
        continuing: whether there are any.
        rows, length: how large the buffers are for what is read next.
        reading: whether prefixes are read.
        pending: the layer whose new key and value wait for their attention.
        moved: whether memory was taken since this was last set to False.
    """

    def __init__(self, model: PreTrainedModel, place: Tensor) -> None:
        self.cache, self.place = DynamicCache(config=model.config), place
        self.first, self.known = torch.zeros(2, len(place), dtype=torch.long, device=place.device)
        self.rows = self.length = 0
        self.reading = self.moved = self.continuing = False
        self.pending: FixedLayer | None = None
        self._config = model.config.get_text_config()
        self.layers = [
            FixedLayer(self, getattr(layer, "sliding_window", None)) for layer in self.cache.layers
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

    def open(self, rows: int, length: int, *, continuing: bool = False) -> None:
        """Have so many rows of so many entries of their own, for what is read or shared next."""
        self.rows, self.length, self.continuing = rows, length, continuing
        self.first.zero_()
        self.known.zero_()

    def share(self, cache: DynamicCache, rows: Sequence[int], known: Sequence[int]) -> None:
        """Have the first ``known`` entries of some rows of another cache before this one's rows.

        A row that several have is copied once, as far as one of them needs it.
        """
        longest: dict[int, int] = {}
        for row, length in zip(rows, known, strict=True):
            longest[row] = max(length, longest.get(row, 0))
        lengths, device = torch.tensor([*longest.values()]), self.place.device
        begin = lengths.cumsum(0) - lengths
        source = torch.tensor([*longest]).repeat_interleave(lengths)
        entry = torch.arange(len(source)) - begin.repeat_interleave(lengths)
        source, entry = source.to(device), entry.to(device)
        for layer, old in zip(self.layers, cache.layers, strict=True):
            layer.share(old.keys, old.values, source, entry)
        begins = dict(zip(longest, begin.tolist(), strict=True))
        self.first[: len(rows)] = torch.tensor([begins[row] for row in rows], device=device)
        self.known[: len(rows)] = torch.tensor(known, device=device)

    def move(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy rows to others, up to a length of their own entries."""
        for state in (self.first, self.known):
            state[target] = state[source]
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
    place, prefixes = _stepping.place[: len(query)], layer.prefixes(len(query))
    cache, window = (key, value), layer.window
    attend = way_to_attend(query, key, windowed=window is not None, continuing=prefixes is not None)
    return attend(query, fresh, cache, place, scale=scale, window=window, prefixes=prefixes), None


ALL_ATTENTION_FUNCTIONS.register(NAME, one_token)


def grown(size: int) -> int:
    """How much is taken in the place of memory that was too small for ``size``: it may grow again.

    >>> grown(1000)
    1250
    """
    return size * 5 // 4


def rounded(tokens: int, unit: int = 0) -> int:
    """How many entries a row of the buffers has, so that few numbers of them are captured."""
    unit = unit or (128 if tokens + SLACK <= 512 else 256)
    return -(-(tokens + SLACK) // unit) * unit


def own_entries(tokens: int) -> int:
    """How many entries of its own a row has that continues a prefix.

    Windows whose length is a share of the rollouts' differ from update to update, and every length
    has graphs of its own: long ones go in coarser steps.
    """
    unit = OWN_UNIT
    while tokens > 8 * unit:
        unit *= 2
    return rounded(tokens, unit)


def entry_bytes(model: PreTrainedModel) -> int:
    """Bytes of a token's keys and values in all layers, under the autocast that is on."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    dtype = autocast_dtype(model.device) or model.dtype
    return 2 * text.num_hidden_layers * groups * width * dtype.itemsize
