"""Writing with one CUDA graph a token: what a GPU waits for otherwise is Python.

Keys and values lie in fixed buffers, a row's entries from 0 to its own length; what windows of one
text have before these lies there once. A step reads one token of every row, draws the next and
notes it, all on the device; it is captured once for a number of rows and replayed. Every few tokens
the host reads what was drawn: rows that have ended leave when the rest fits into the next smaller
captured number.

The step is the model's own forward. Inside it, and only there, attention is that of one token over
its row (:mod:`topd.engines.graphs.buffers`), and its element-wise parts are compiled
(:mod:`topd.engines.graphs.fused`).
Elsewhere than on a GPU the same step runs as it is, which is how it is tested.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging

from topd.engines.base import Wanted
from topd.engines.draws import draw, row_words, step_keys, token_words
from topd.engines.graphs.buffers import SLACK, Buffers, UncapturedError, entry_bytes
from topd.engines.graphs.cast import CastWeights
from topd.engines.graphs.fused import Fused
from topd.inputs.models.heads import head_of
from topd.inputs.models.positions import rope_switch
from topd.types import Head, Sampling, autocast_dtype

logger = logging.get_logger(__name__)

BUCKETS = (2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)  # numbers of rows
EVERY = 16  # tokens from one look of the host to the next; half as many for short texts
MOST_GRAPHS = 96
MOST_MOVES = 3  # of the weights to other memory
Forward = Callable[[Tensor, None, Tensor | None, DynamicCache], Tensor]
Take = Callable[[list[int], list[list[int]], list[list[float]], Tensor | None], list[int]]


def graphable(model: PreTrainedModel) -> bool:
    """Whether a configuration promises that a model can write in graphs.

    So it is with RoPE, full or sliding attention, and plain weights on one device, the head's too.
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
        # a head with trained tokens has another each time, and a graph keeps its first
        and any(head_of(model).weight is weight for weight in weights)
        and len({weight.device for weight in weights}) == 1
        and not any(hasattr(module, "_hf_hook") for module in model.modules())
    )


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
        self._model, self._forward = model, forward
        self._device = model.device
        self._fused = Fused(model, on=fuse)
        self._casts = CastWeights()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, object]] = {}
        self._pool: Any = None
        self._weights: Hashable = None
        self._moves = 0
        self._make_state()

    def _make_state(self) -> None:
        most, device = BUCKETS[-1], self._device
        self._token, self._place = torch.zeros(2, most, dtype=torch.long, device=device)
        self._words = torch.zeros(2, most, dtype=torch.int32, device=device)
        self._step = torch.zeros(most, dtype=torch.int32, device=device)
        self._slot = torch.zeros(1, dtype=torch.long, device=device)
        self._drawn = torch.zeros(most, EVERY + SLACK, dtype=torch.long, device=device)
        self._logprobs = torch.zeros(most, EVERY + SLACK, device=device)
        self._states = torch.empty(0, device=device)
        self.buffers = Buffers(self._model, self._place)

    # Before writing

    @contextmanager
    def casting(self, head: Head) -> Iterator[Head]:
        """Inside, weights are what autocast would make of them at every token. Yields the head."""
        with self._casts.used(self._model, head) as (head, moved):
            if moved:
                self.drop()
            yield head

    def at_once(self, entries: Callable[[int], int], share: float) -> int:
        """How many rows may be written together: their buffers take a share of the GPU at most.

        ``entries`` says how many the buffers have for a number of rows.
        """
        if self._device.type != "cuda":
            return BUCKETS[-1]
        whole = torch.cuda.get_device_properties(self._device).total_memory
        most = share * whole / entry_bytes(self._model)
        return max((rows for rows in BUCKETS if entries(rows) <= most), default=BUCKETS[0])

    def open(self, rows: int, length: int, *, continuing: bool = False) -> None:
        """Have buffers for so many rows, of ``length`` entries each.

        ``continuing`` rows have what comes before these from :meth:`Buffers.share`.
        """
        self._check_weights()
        self.buffers.open(bucket(rows), length, continuing=continuing)

    def read(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Read prefixes [N n], padded on the right. Returns the states [N D] after each."""
        with self.buffers.noting() as cache:
            states = self._forward(ids, None, None, cache)
        return states[torch.arange(len(ids), device=ids.device), lengths - 1]

    # Writing

    def write(
        self,
        head: Head,
        states: Tensor,
        known: Sequence[int],
        wanted: Wanted,
        take: Take,
        *,
        keep: bool,
    ) -> None:
        """Write after the prefixes that were read, until nothing is going.

        Args:
            head: as ``casting`` gives it.
            states: [N D], the last hidden states after each prefix.
            known: the prefixes' lengths.
            wanted: how, and how many tokens at most.
            take: is told rows, the next tokens of each and their log-probs, and, with ``keep``, the
                states [n K D] that predict them; returns the rows that go on.
            keep: whether states are needed.
        """
        slots: list[int | None] = self._begin(states, known, wanted.seeds, keep=keep)
        rows, steps, sampling = len(slots), wanted.steps, wanted.sampling
        read = 0 if self.buffers.continuing else max(known)
        every = EVERY if steps > 4 * EVERY else EVERY // 2
        filled = states.new_zeros(rows, states.shape[1])
        filled[: len(states)] = states
        with self._decoding(rows):
            self._put(head, filled, sampling, keep=keep)
        wanted.tick()
        held = written = 1
        while True:
            count = min(every - held, steps - written)
            if count:
                step = self._ready(rows, head, sampling, keep=keep)
                for _ in range(count):
                    step()
                    wanted.tick()
            held, written = held + count, written + count
            going = self._told(slots, held, take, keep=keep)
            if written == steps or not going:
                return
            held = 0
            self._slot.zero_()
            slots = self._left(slots, going, read + written)
            rows = len(slots)

    def _begin(
        self, states: Tensor, known: Sequence[int], seeds: Sequence[int], *, keep: bool
    ) -> list[int | None]:
        count, rows = len(known), self.buffers.rows
        if self.buffers.moved:
            self.drop()
            self.buffers.moved = False
        for tensor in (self._token, self._place, self._step, self._slot, self._words):
            tensor.zero_()
        self._place[:count] = torch.tensor(known, device=self._device) - 1
        for own, words in zip(self._words, row_words(seeds), strict=True):
            own[:count] = words.to(self._device)
        shape = (BUCKETS[-1], EVERY + SLACK, states.shape[-1])
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
        here = torch.arange(EVERY + SLACK, device=self._device) == self._slot
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
        states = self._forward(ids, None, positions, self.buffers.cache)[:, -1]
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
            self.buffers.move(source, target, length)
            for new, old in zip(free, late, strict=False):
                slots[new] = slots[old]
        slots = slots[:rows]
        over = [slot for slot, row in enumerate(slots) if row is None]
        if over:  # they write on, from their beginning, and nobody reads it
            for state in (self._place, self.buffers.known):
                state[torch.tensor(over, device=self._device)] = 0
        return slots

    # One step, as it is or as a graph

    def _ready(
        self, rows: int, head: Head, sampling: Sampling, *, keep: bool
    ) -> Callable[[], None]:
        def one() -> None:
            self._one(rows, head, sampling, keep=keep)

        if self._device.type != "cuda":
            return self._decoding(rows)(one)
        how = (sampling.temperature, sampling.top_k, sampling.top_p, keep, head.vocab_size)
        # how far apart rows are, not how many there are
        buffers = self.buffers.length, self.buffers.continuing
        key = (rows, buffers, how, autocast_dtype(self._device))
        if key not in self._graphs:
            if len(self._graphs) >= MOST_GRAPHS:
                self._graphs.clear()
            read = head, token_words(head.vocab_size, self._device)  # may not be freed before it
            self._graphs[key] = self._captured(rows, one), read
        return self._graphs[key][0].replay

    def _captured(self, rows: int, one: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The step as a graph, after steps that compile and allocate what it needs.

        A step that waits for the device is found before the capture.
        """
        stream = stream_of(self._device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        moved = (self._token, self._place, self._step, self._slot)
        before = [state.clone() for state in moved]
        graph = torch.cuda.CUDAGraph()
        with self._decoding(rows):
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):  # torch leaves it current where a capture fails
                for trial in range(SLACK):
                    with _refusing_waits() if trial else nullcontext():
                        one()
                for state, old in zip(moved, before, strict=True):
                    state.copy_(old)
                torch.cuda.synchronize(self._device)
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
                ):
                    one()
        return graph

    @contextmanager
    def _decoding(self, rows: int) -> Iterator[None]:
        """Inside, the model's forward is a step of the first rows."""
        with self._fused.on(), self.buffers.stepping(rows):
            yield

    # What is kept

    def drop(self) -> None:
        """Forget the graphs: what they point to is no longer there."""
        self._graphs.clear()
        self._pool = None

    def give_up(self, name: str, fault: Exception | str) -> None:
        """Be used no more, and say why."""
        said = fault if isinstance(fault, str) else f"{type(fault).__name__}: {fault}"
        self.broken = said.strip().partition("\n")[0][:120]
        self.release()
        logger.warning(f"{name}: writes without CUDA graphs, which is slower ({self.broken}).")

    def release(self) -> None:
        """Give back the memory of graphs, buffers and copies of weights."""
        self.drop()
        self._casts = CastWeights()
        self._make_state()
        self._weights = None

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


@contextmanager
def _refusing_waits() -> Iterator[None]:
    """Inside, what waits for the device raises RuntimeError.

    Within a capture it would end that, too, but torch's allocator would then take it to be under
    way until the process ends, and free nothing that is cached when memory runs out.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@functools.cache
def stream_of(device: torch.device) -> torch.cuda.Stream:
    """Where all steps are captured: cuBLAS keeps memory, 32 MiB, for each stream that it saw."""
    return torch.cuda.Stream(device)


def bucket(rows: int) -> int:
    """The least captured number of rows that holds so many."""
    return next((most for most in BUCKETS if most >= rows), BUCKETS[-1])
