"""Writing with one CUDA graph a token: what a GPU waits for otherwise is Python.

Keys and values lie in fixed buffers, a row's entries from 0 to its own length. A step reads one
token of every row, draws the next and notes it, all on the device; it is captured once for a number
of rows and replayed. Every few tokens the host reads what was drawn: rows that have ended leave
when the rest fits into the next smaller captured number.

The step is the model's own forward. Inside it, and only there, attention is that of one token over
its row (:func:`one_token`), and element-wise parts are compiled (:mod:`topd.engines.fused`).
Elsewhere than on a GPU the same step runs as it is, which is how it is tested.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from topd.engines import Tick
from topd.engines.draws import draw, row_words, step_keys, token_words
from topd.engines.fused import FAULTS, Fused
from topd.inputs.positions import rope_switch
from topd.types import Head, Sampling

logger = logging.get_logger(__name__)

NAME = "topd_one_token"  # of the attention; it has no mask, as transformers makes none for it
BUCKETS = (2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)  # numbers of rows
EVERY = 16  # tokens from one look of the host to the next; half as many for short texts
WARM = 2  # steps before a capture
MOST_GRAPHS = 96
MOST_MOVES = 3  # of the weights to other memory
HARMLESS = frozenset(
    ("position_ids", "is_causal", "output_attentions", "output_hidden_states", "use_cache")
    + ("cache_position", "position_embeddings", "return_dict", "output_router_logits")
)  # arguments of attention that change nothing for one token over a contiguous past

Forward = Callable[[Tensor, None, Tensor | None, DynamicCache], Tensor]
Take = Callable[[list[int], list[list[int]], list[list[float]], Tensor | None], list[int]]


class UncapturedError(RuntimeError):
    """A model, or what it was asked for, does not suit graphs."""


def graphable(model: PreTrainedModel) -> bool:
    """Whether a configuration promises that a model can write in graphs.

    So it is with RoPE, full or sliding attention, and plain weights on one device.
    """
    text = model.config.get_text_config()
    layers = DynamicCache(config=model.config).layers
    weights = [*model.parameters()]
    return (
        bool(layers)
        and all(type(one) in (DynamicLayer, DynamicSlidingWindowLayer) for one in layers)
        and {*(getattr(text, "layer_types", None) or ())} <= {"full_attention", "sliding_attention"}
        and bool(getattr(text, "rope_parameters", None))
        and rope_switch(model.config) is None
        and all(type(weight) in (Tensor, nn.Parameter) for weight in weights)
        and len({weight.device for weight in weights}) == 1
        and not any(hasattr(module, "_hf_hook") for module in model.modules())
    )


class FixedLayer(DynamicLayer):
    """The keys and values of one layer: [R G L D] in memory that is kept and only grows.

    While prompts are read it notes them; while tokens are written it hands out all it has, and
    keeps the new key and value for :func:`one_token`, which puts them into their place.
    """

    def __init__(self, writer: Graphs, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.fresh: tuple[Tensor, Tensor] | None = None
        self._writer = writer
        self._cells = (torch.empty(0), torch.empty(0))
        self._whole = self._cells

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Note what was read, or keep what is new."""
        if self._writer.reading:
            self.note(key_states, value_states)
            return key_states, value_states
        self.fresh, self._writer.pending = (key_states, value_states), self
        assert self.keys is not None
        return self.keys, self.values

    def note(self, keys: Tensor, values: Tensor) -> None:
        """Have these entries [N G n D] at the beginning of the first N rows."""
        if keys.shape != values.shape:
            raise UncapturedError("keys and values of different widths")
        dtype = _computed(keys)
        rows, length = self._writer.rows, self._writer.length
        shape = (rows, keys.shape[1], length, keys.shape[3])
        size = shape[0] * shape[1] * shape[2] * shape[3]
        cells = self._cells[0]
        if cells.numel() < size or cells.dtype != dtype or cells.device != keys.device:
            self._cells = self._whole = (torch.empty(0), torch.empty(0))  # frees before it takes
            self._cells = (keys.new_zeros(size, dtype=dtype), keys.new_zeros(size, dtype=dtype))
            self._writer.drop()
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


class Graphs:
    """Writes for one model, in buffers and graphs that are kept from call to call.

    Args:
        model: on its device, in eval mode whenever it writes.
        forward: of the model's decoder: token ids [N L], no mask, positions [N L] or None, a cache;
            gives the last hidden states [N L D].
        fuse: whether element-wise parts are compiled; by default where it pays.

    Attributes:
        broken: why it is no longer used; None while it is.
    """

    def __init__(self, model: PreTrainedModel, forward: Forward, *, fuse: bool | None = None):
        self.broken: str | None = None
        self.reading = False
        self.rows = self.length = 0
        self.pending: FixedLayer | None = None
        self._model, self._forward = model, forward
        self._device = model.device
        windows = [
            layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
            for layer in DynamicCache(config=model.config).layers
        ]
        self._cache = DynamicCache(config=model.config)
        self._layers = [FixedLayer(self, window) for window in windows]
        self._cache.layers = [*self._layers]
        self._fused = Fused(model, on=fuse)
        self._casts = CastWeights()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, object]] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._weights: Hashable = None
        self._moves = 0
        self._make_state()

    def _make_state(self) -> None:
        most, device = BUCKETS[-1], self._device
        self._token, self._place = torch.zeros(2, most, dtype=torch.long, device=device)
        self._words = torch.zeros(2, most, dtype=torch.int32, device=device)
        self._step = torch.zeros(most, dtype=torch.int32, device=device)
        self._slot = torch.zeros(1, dtype=torch.long, device=device)
        self._drawn = torch.zeros(most, EVERY + WARM, dtype=torch.long, device=device)
        self._logprobs = torch.zeros(most, EVERY + WARM, device=device)
        self._states = torch.empty(0, device=device)

    # Before writing

    @contextmanager
    def casting(self, head: Head) -> Iterator[Head]:
        """Inside, weights are what autocast would make of them at every token. Yields the head."""
        with self._casts.used(self._model, head) as (head, moved):
            if moved:
                self.drop()
            yield head

    def open(self, rows: int, longest: int, steps: int) -> None:
        """Have buffers for so many rows whose prefixes have ``longest`` tokens at most."""
        self._check_weights()
        needed = longest + steps + WARM
        unit = 128 if needed <= 512 else 256
        self.rows, self.length = bucket(rows), -(-needed // unit) * unit

    def read(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Read prefixes [N n], padded on the right. Returns the states [N D] after each."""
        self.reading = True
        try:
            states = self._forward(ids, None, None, self._cache)
        finally:
            self.reading = False
        return states[torch.arange(len(ids), device=ids.device), lengths - 1]

    def copy(self, cache: DynamicCache, rows: Tensor, length: int) -> None:
        """Have the first ``length`` entries of some rows of another cache."""
        for layer, old in zip(self._layers, cache.layers, strict=True):
            layer.note(*(x[:, :, :length].index_select(0, rows) for x in (old.keys, old.values)))

    # Writing

    def write(
        self,
        head: Head,
        states: Tensor,
        known: Sequence[int],
        sampling: Sampling,
        seeds: Sequence[int],
        take: Take,
        *,
        keep: bool,
        tick: Tick,
    ) -> None:
        """Write after the prefixes that were read, until nothing is going.

        Args:
            head: as ``casting`` gives it.
            states: [N D], the last hidden states after each prefix.
            known: the prefixes' lengths.
            sampling: how, and how many tokens at most.
            seeds: one a row.
            take: is told rows, the next tokens of each and their log-probs, and, with ``keep``, the
                states [n K D] that predict them; returns the rows that go on.
            keep: whether states are needed.
            tick: called once a token.
        """
        slots: list[int | None] = self._begin(states, known, seeds, keep=keep)
        rows, steps = len(slots), sampling.max_new_tokens
        every = EVERY if steps > 4 * EVERY else EVERY // 2
        filled = states.new_zeros(rows, states.shape[1])
        filled[: len(states)] = states
        with self._decoding(rows):
            self._put(head, filled, sampling, keep=keep)
        tick()
        held = written = 1
        while True:
            count = min(every - held, steps - written)
            if count:
                step = self._ready(rows, head, sampling, keep=keep)
                for _ in range(count):
                    step()
                    tick()
            held, written = held + count, written + count
            going = self._told(slots, held, take, keep=keep)
            if written == steps or not going:
                return
            held = 0
            self._slot.zero_()
            slots = self._left(slots, going, max(known) + written)
            rows = len(slots)

    def _begin(
        self, states: Tensor, known: Sequence[int], seeds: Sequence[int], *, keep: bool
    ) -> list[int | None]:
        count, rows = len(known), self.rows
        for tensor in (self._token, self._place, self._step, self._slot, self._words):
            tensor.zero_()
        self._place[:count] = torch.tensor(known, device=self._device) - 1
        for own, words in zip(self._words, row_words(seeds), strict=True):
            own[:count] = words.to(self._device)
        shape = (BUCKETS[-1], EVERY + WARM, states.shape[-1])
        if keep and (self._states.shape != shape or self._states.dtype != states.dtype):
            self._states = states.new_zeros(shape)
            self.drop()
        return [*range(count), *[None] * (rows - count)]

    def _put(self, head: Head, states: Tensor, sampling: Sampling, *, keep: bool) -> None:
        """Draw after the states [R D] of the first R rows, and note it."""
        rows = len(states)
        logits = head.logits(states)
        if sampling.temperature == 0:
            token, logprob = draw(logits, None, sampling)
        else:
            first, second = self._words[:, :rows]
            keys = step_keys(first, second, self._step[:rows])
            token, logprob = self._fused.drawn(
                logits, keys, token_words(head.vocab_size, self._device), sampling
            )
        here = torch.arange(EVERY + WARM, device=self._device) == self._slot
        for notes, new in ((self._drawn, token), (self._logprobs, logprob.float())):
            notes[:rows] = torch.where(here, new[:, None], notes[:rows])
        if keep:
            kept = torch.where(here[:, None], states[:, None], self._states[:rows])
            self._states[:rows] = kept
        self._token[:rows].copy_(token)
        self._place[:rows].add_(1)
        self._step[:rows].add_(1)
        self._slot.add_(1)

    def _one(self, rows: int, head: Head, sampling: Sampling, *, keep: bool) -> None:
        """One token of every row."""
        ids, positions = self._token[:rows, None], self._place[:rows, None]
        states = self._forward(ids, None, positions, self._cache)[:, -1]
        self._put(head, states, sampling, keep=keep)

    def _told(self, slots: Sequence[int | None], held: int, take: Take, *, keep: bool) -> list[int]:
        """Tell what was drawn, the only host sync; rows that go on."""
        at = [slot for slot, row in enumerate(slots) if row is not None]
        place = torch.tensor(at, device=self._device)
        drawn = self._drawn[place, :held].tolist()
        logprobs = self._logprobs[place, :held].tolist()
        states = self._states[place, :held] if keep else None
        return take([row for row in slots if row is not None], drawn, logprobs, states)

    def _left(self, slots: list[int | None], going: Sequence[int], length: int) -> list[int | None]:
        """Move rows that go on to the front, where they fit into a smaller number of rows."""
        alive = {*going}
        slots = [row if row in alive else None for row in slots]
        rows = min(bucket(len(going)), len(slots))
        free = [slot for slot in range(rows) if slots[slot] is None]
        late = [slot for slot in range(rows, len(slots)) if slots[slot] is not None]
        if late:
            source = torch.tensor(late, device=self._device)
            target = torch.tensor(free[: len(late)], device=self._device)
            for state in (self._token, self._place, self._step, *self._words):
                state[target] = state[source]
            for layer in self._layers:
                layer.move(source, target, length)
            for new, old in zip(free, late, strict=False):
                slots[new] = slots[old]
        slots = slots[:rows]
        over = [slot for slot, row in enumerate(slots) if row is None]
        if over:  # they write on, from their beginning, and nobody reads it
            self._place[torch.tensor(over, device=self._device)] = 0
        return slots

    # One step, as it is or as a graph

    def _ready(
        self, rows: int, head: Head, sampling: Sampling, *, keep: bool
    ) -> Callable[[], None]:
        def one() -> None:
            self._one(rows, head, sampling, keep=keep)

        if self._device.type != "cuda":

            def plain() -> None:
                with self._decoding(rows):
                    one()

            return plain
        how = (sampling.temperature, sampling.top_k, sampling.top_p, keep, head.vocab_size)
        key = (rows, self.rows, self.length, how, _autocast(self._device))
        if key not in self._graphs:
            if len(self._graphs) >= MOST_GRAPHS:
                self._graphs.clear()
            read = head, token_words(head.vocab_size, self._device)  # may not be freed before it
            self._graphs[key] = self._captured(rows, one), read
        return self._graphs[key][0].replay

    def _captured(self, rows: int, one: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The step as a graph, after steps that compile and allocate what it needs."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
            self._pool = torch.cuda.graph_pool_handle()
        moved = (self._token, self._place, self._step, self._slot)
        before = [state.clone() for state in moved]
        graph = torch.cuda.CUDAGraph()
        with self._decoding(rows):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM):
                    one()
                for state, old in zip(moved, before, strict=True):
                    state.copy_(old)
            torch.cuda.current_stream().wait_stream(self._stream)
            torch.cuda.synchronize(self._device)
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                one()
        return graph

    @contextmanager
    def _decoding(self, rows: int) -> Iterator[None]:
        """Inside, the model's forward is a step: attention of one token over the buffers."""
        global _writing
        config = self._model.config.get_text_config()
        before = config._attn_implementation, torch.is_autocast_cache_enabled(), _writing
        for layer in self._layers:
            layer.narrow(rows)
        with self._fused.on():
            try:
                config._attn_implementation = NAME
                torch.set_autocast_cache_enabled(False)  # what it keeps is gone at the next replay
                _writing = self
                yield
            finally:
                _writing = before[2]
                torch.set_autocast_cache_enabled(before[1])
                config._attn_implementation = before[0]

    def taken(self) -> FixedLayer:
        """The layer whose new key and value wait for their attention."""
        layer, self.pending = self.pending, None
        if layer is None:
            raise UncapturedError("attention without keys of its own")
        return layer

    def place(self, rows: int) -> Tensor:
        """[R] where the new token of each row stands."""
        return self._place[:rows]

    # What is kept

    def drop(self) -> None:
        """Forget the graphs: what they point to is no longer there."""
        self._graphs.clear()

    def give_up(self, name: str, fault: Exception | str) -> None:
        """Be used no more, and say why."""
        said = fault if isinstance(fault, str) else f"{type(fault).__name__}: {fault}"
        self.broken = said.strip().partition("\n")[0][:120]
        self.release()
        logger.warning(f"{name}: writes without CUDA graphs, which is slower ({self.broken}).")

    def release(self) -> None:
        """Give back the memory of graphs, buffers and copies of weights."""
        self.drop()
        for layer in self._layers:
            layer._cells = layer._whole = (torch.empty(0), torch.empty(0))
            layer.keys = layer.values = layer.fresh = None  # type: ignore[assignment]
        self._casts = CastWeights()
        self._make_state()
        self._pool, self._stream, self._weights = None, None, None

    def _check_weights(self) -> None:
        """Graphs end with the memory that their weights were in."""
        tensors = [*self._model.parameters(), *self._model.buffers()]
        adapters = tuple(
            (module.disable_adapters, module.merged, tuple(module.active_adapters))
            for module in self._model.modules()
            if hasattr(module, "merged") and hasattr(module, "disable_adapters")
        )
        now = (tuple(tensor.data_ptr() for tensor in tensors), adapters)
        if now == self._weights:
            return
        if self._graphs:
            self._moves += 1
            self.drop()
        if self._moves > MOST_MOVES:
            raise UncapturedError("its weights are moved again and again")
        self._weights = now


_writing: Graphs | None = None


def one_token(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention of transformers for one new token a row; queries [R H 1 D], buffers [R G L D].

    Returns [R 1 H D]. Raises UncapturedError for what it does not know, as attention sinks.
    """
    if _writing is None:
        raise UncapturedError("attention of one token outside of a step")
    layer = _writing.taken()
    odd = [name for name, given in others.items() if given is not None and name not in HARMLESS]
    if odd or key is not layer.keys or query.shape[2] != 1:
        raise UncapturedError(f"attention with {', '.join(odd) or 'other keys'}")
    if sliding_window not in (None, layer.window):
        raise UncapturedError(f"a window of {sliding_window} where the cache has {layer.window}")
    assert layer.fresh is not None
    scale = scaling if scaling is not None else float(query.shape[-1]) ** -0.5
    fresh, layer.fresh = layer.fresh, None
    place = _writing.place(len(query))
    kernel = _kernel(query, key, softcap, layer.window)
    attend = _plain if kernel is None else kernel.attend
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": layer.window}
    return attend(query, fresh, (key, value), place, **options), None


def _plain(
    query: Tensor,
    new: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    place: Tensor,
    *,
    scale: float,
    softcap: float | None,
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
    if softcap is None:
        found = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
        return found.transpose(1, 2)
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    score = softcap * torch.tanh((query @ key.transpose(2, 3)).float() * scale / softcap)
    weight = score.masked_fill(~mask, -torch.inf).softmax(-1).to(value.dtype)
    return (weight @ value).transpose(1, 2)


ALL_ATTENTION_FUNCTIONS.register(NAME, one_token)


def _kernel(query: Tensor, keys: Tensor, softcap: float | None, window: int | None) -> Any:
    """The module of the Triton kernel where it serves; None elsewhere."""
    capped, windowed = softcap is not None, window is not None
    shape = (query.shape[1], keys.shape[1], keys.shape[3])
    return _tried(shape, query.dtype, keys.dtype, keys.device, capped, windowed)


@functools.cache
def _tried(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    kept: torch.dtype,
    device: torch.device,
    capped: bool,
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
    options: dict[str, Any] = {
        "softcap": 20.0 if capped else None,
        "window": 40 if windowed else None,
    }
    scale = width**-0.5
    try:
        found = decode_kernel.attend(
            query, fresh, (cells.clone(), cells.clone()), place, scale=scale, **options
        )
        expected = _plain(query, fresh, (cells, cells.clone()), place, scale=scale, **options)
        gap = float((found.float() - expected.float()).abs().max())
    except FAULTS as fault:
        said = str(fault).strip().partition("\n")[0][:100]
        logger.warning(f"no kernel for attention ({type(fault).__name__}: {said}): slower.")
        return None
    if gap > (1e-4 if torch.float32 in (dtype, kept) and dtype == kept else 0.05):
        logger.warning(f"no kernel for attention: it is off by {gap:.2g}. Writing is slower.")
        return None
    return decode_kernel


class CastWeights:
    """Weights in autocast's precision: cast once a call instead of once a token.

    The copies stay where they are, so that graphs can point to them.
    """

    def __init__(self) -> None:
        self._copies: dict[int, Tensor] = {}

    @contextmanager
    def used(self, model: PreTrainedModel, head: Head) -> Iterator[tuple[Head, bool]]:
        """Inside, the decoder's linear layers use the copies. Yields the head, and whether any
        copy is at another place than before."""
        device = head.weight.device
        if _autocast(device) is None:
            yield head, False
            return
        before = {key: copy.data_ptr() for key, copy in self._copies.items()}
        with ExitStack() as stack:
            for layer in model.get_decoder().modules():
                if type(layer) is nn.Linear and "forward" not in vars(layer):
                    vars(layer)["forward"] = self._product(layer.weight, layer.bias)
                    stack.callback(vars(layer).pop, "forward")
            product = self._product(head.weight, head.bias, head_of=id(self))
            now = {key: copy.data_ptr() for key, copy in self._copies.items()}
            yield _with_product(head, product), now != before

    def _product(
        self, weight: Tensor, bias: Tensor | None, head_of: int | None = None
    ) -> Callable[[Tensor], Tensor]:
        """``x @ weight.T + bias`` with the copies."""
        key = head_of if head_of is not None else id(weight)
        copies = (self._copied(key, weight), None if bias is None else self._copied(-key, bias))

        def product(x: Tensor) -> Tensor:
            return nn.functional.linear(x, *copies)

        return product

    def _copied(self, key: int, weight: Tensor) -> Tensor:
        dtype = _autocast(weight.device)
        if not weight.dtype.is_floating_point or weight.dtype == dtype:
            return weight.detach()
        known = self._copies.get(key)
        if known is None or known.shape != weight.shape or known.dtype != dtype:
            known = self._copies[key] = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        known.copy_(weight.detach())
        return known


def _with_product(head: Head, product: Callable[[Tensor], Tensor]) -> Head:
    return Head(head.weight, head.bias, head.scale, head.softcap, product, head.barred)


def bucket(rows: int) -> int:
    """The least captured number of rows that holds so many."""
    return next((most for most in BUCKETS if most >= rows), BUCKETS[-1])


def _autocast(device: torch.device) -> torch.dtype | None:
    """The precision of the autocast that is on; None if none is."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def _computed(keys: Tensor) -> torch.dtype:
    """The precision that attention has, under autocast too."""
    return _autocast(keys.device) or keys.dtype
