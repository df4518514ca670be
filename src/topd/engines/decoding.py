"""What decoding is made of: a cache that grows in place, and windows that share a prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from topd.engines import Scores
from topd.engines.draws import Noise
from topd.types import Ids, Starts, Texts

MOST_AHEAD = 8  # draft tokens of a window in one forward
FREE = {"cpu": 16}  # tokens that a forward reads for little more than the price of one
FREE_ELSEWHERE = 256


class GrowingLayer(DynamicLayer):
    """Keys and values in a buffer that is written in place; transformers copies all at each token.

    ``room`` is how many entries the first buffer holds after what is written first. A full buffer
    grows by as many, or by an eighth: copied that seldom it costs little beside the reading of all
    entries at each token.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write after what there is; returns all keys and all values, as views."""
        used = self.get_seq_length()
        length = used + key_states.shape[-2]
        if self._buffers is None or length > self._buffers[0].shape[-2]:
            self._grow(key_states, value_states, length)
        assert self._buffers is not None
        keys, values = self._buffers
        keys[:, :, used:length], values[:, :, used:length] = key_states, value_states
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        return self.keys, self.values

    def _grow(self, key_states: Tensor, value_states: Tensor, length: int) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        room = max(self.room, length // 8) if used else self.room
        buffers = []
        for old, new in ((self.keys, key_states), (self.values, value_states)):
            buffer = new.new_empty(*new.shape[:-2], length + room, new.shape[-1])
            if used:
                buffer[:, :, :used] = old
            buffers.append(buffer)
        self._buffers = (buffers[0], buffers[1])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        if self._buffers is not None:
            keys, values = (buffer.index_select(0, indices) for buffer in self._buffers)
            length, self._buffers = self.get_seq_length(), (keys, values)
            self.keys, self.values = keys[:, :, :length], values[:, :, :length]


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep some rows of a cache, the states of recurrent layers too."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.reorder_cache(rows)  # it selects; batch_select_indices knows keys and values only
        else:
            layer.batch_select_indices(rows)


def growing_cache(model: PreTrainedModel, room: int) -> DynamicCache:
    """An empty cache; its full-attention layers grow in place."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        GrowingLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


@dataclass
class Window:
    """One window on its way: what is written, and the rollout from the same token on as its draft.

    ``row`` is its row of the cache and ``known`` how many tokens stand before it. ``agreed`` counts
    its last tokens that are the draft's: as many more of the draft may be read in one forward, and
    are kept as long as they are what is drawn. A window at odds with the rollout reads none.
    """

    row: int
    known: int
    draft: Ids
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    agreed: int = 0
    read: int = 0
    forwards: int = 0
    ended: bool = False

    @property
    def going(self) -> bool:
        """Whether there is more to write."""
        return not self.ended and len(self.tokens) < self.limit

    def to_read(self, ahead: int) -> list[int]:
        """Its last token, and at most ``ahead`` tokens of the draft after it."""
        written = len(self.tokens)
        ahead = min(self.agreed, ahead, self.limit - written - 1)
        return [self.tokens[-1], *self.draft[written : written + ahead]]

    def take(
        self, drawn: Sequence[int], logprobs: Sequence[float], ends: Container[int], rejoin: int = 0
    ) -> int:
        """Write what was drawn after each token read, up to the first that is not the draft's.

        Or up to where its last ``rejoin`` tokens are the draft's, however many were read with them.
        Returns how many tokens were written.
        """
        for count, (token, logprob) in enumerate(zip(drawn, logprobs, strict=True), 1):
            met = self.draft[len(self.tokens) : len(self.tokens) + 1] == (token,)
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self.agreed = self.agreed + 1 if met else 0
            self.ended = token in ends
            if self.ended or not met or self.agreed == rejoin:
                return count
        return len(drawn)

    def write(self, drawn: Sequence[int], logprobs: Sequence[float], ends: Container[int]) -> None:
        """Write what was drawn one after the other, up to an end, whatever the draft is."""
        count = next((k + 1 for k, token in enumerate(drawn) if token in ends), len(drawn))
        self.tokens += drawn[:count]
        self.logprobs += logprobs[:count]
        self.ended = self.tokens[-1] in ends

    def rejoin(self, rest: Sequence[float], ends: Container[int]) -> slice:
        """Take the rest of the draft, whose tokens have these log-probs. Returns which of it."""
        taken = slice(len(self.tokens), min(self.limit, len(self.draft)))
        self.tokens += self.draft[taken]
        self.logprobs += rest[: taken.stop - taken.start]
        self.ended, self.limit = self.tokens[-1] in ends, len(self.tokens)
        return taken


def open_windows(
    starts: Starts, prompts: Texts, responses: Texts, *, limit: int, width: int
) -> tuple[list[Window], list[int]]:
    """Windows from (row, token) pairs, and of which response each row of their cache is.

    Windows of one response may share a row, whose entries are then read once for all of them.
    """
    counts = Counter(b for b, _ in starts)
    length = max(len(prompts[b]) + t for b, t in starts)
    share = least_cost([*counts.values()], length / width)
    rows: list[int] = []
    last: dict[int, tuple[int, int]] = {}  # of each response its last row, and the windows there
    windows = []
    for b, t in starts:
        row, held = last.get(b, (0, share))
        if held == share:
            row, held = len(rows), 0
            rows.append(b)
        last[b] = row, held + 1
        windows.append(Window(row, len(prompts[b]) + t, responses[b][t : t + limit], limit))
    return windows, rows


def least_cost(counts: Sequence[int], entries: float) -> int:
    """How many windows share a row: rows with fewer are filled up with as many tokens.

    ``counts`` are the windows of each response; to read a row costs as much as ``entries`` tokens.
    """

    def cost(share: int) -> float:
        return sum(-(-count // share) for count in counts) * (share + entries)

    return min(range(1, max(counts) + 1), key=cost)


class Layout(NamedTuple):
    """Blocks of tokens, F in all, in rows of the cache that are filled up to q.

    ``row`` and ``column`` [F] say where in ``ids`` each stands. ``mask`` [R 1 q L] is True where a
    token looks: what its window sees of the cache, and its own block up to itself.
    """

    ids: Int[Tensor, "R q"]
    positions: Int[Tensor, "R q"]
    row: Int[Tensor, " F"]
    column: Int[Tensor, " F"]
    mask: Bool[Tensor, "R 1 q L"]


class WindowBatch:
    """Windows that are written together: ``take`` what was drawn, ``lay_out`` what is read next.

    What was read in vain stays in the cache, and nobody sees it.

    Args:
        windows: N of them, nothing written yet.
        noise: of N rows, for the draws of all their tokens.
        hidden: [N D], the states that predict the first tokens.
        ends: tokens that end a window.
        rejoin: of how many tokens that are the draft's a window stops; 0: of none.
    """

    def __init__(
        self,
        windows: Sequence[Window],
        noise: Noise,
        hidden: Float[Tensor, "N D"],
        ends: Container[int],
        rejoin: int = 0,
    ) -> None:
        self.windows, self._ends, self._device = windows, ends, hidden.device
        self._rejoin = rejoin
        known = torch.tensor([window.known for window in windows], device=self._device)
        self._seen = torch.arange(int(known.max()), device=self._device) < known[:, None]
        self._noise = noise
        steps = max(window.limit for window in windows)
        self.states = hidden.new_zeros(len(windows), steps, hidden.shape[-1])
        self._going = list(range(len(windows)))
        self._read = [[0]] * len(windows)
        self._layout: Layout | None = None
        self._last = 0
        self._place = self._places()

    @property
    def numbers(self) -> Float[Tensor, "F V"] | None:
        """The numbers for what is drawn next."""
        return self._noise.at(*self._place, self._last)

    def _places(self) -> tuple[Tensor, Tensor]:
        """Window and token that each of the F tokens read predicts."""
        pairs = [
            (k, len(self.windows[k].tokens) + j)
            for k, block in zip(self._going, self._read, strict=True)
            for j in range(len(block))
        ]
        self._last = max(token for _, token in pairs)
        window, token = torch.tensor(pairs, device=self._device).unbind(-1)
        return window, token

    def take(
        self, hidden: Float[Tensor, "F D"], token: Int[Tensor, " F"], logprob: Float[Tensor, " F"]
    ) -> None:
        """Write what was drawn from the states after each token read."""
        self.states[self._place] = hidden
        tokens, logprobs = token.tolist(), logprob.tolist()
        kept: list[bool] = []
        for k, block in zip(self._going, self._read, strict=True):
            some = slice(len(kept), len(kept) + len(block))
            count = self.windows[k].take(tokens[some], logprobs[some], self._ends, self._rejoin)
            kept += [j < count for j in range(len(block))]
        if self._layout:
            new = self._seen.new_zeros(len(self.windows), self._layout.ids.shape[1])
            new[self._place[0], self._layout.column] = torch.tensor(kept, device=self._device)
            self._seen = torch.cat([self._seen, new], dim=1)
        self._going = [k for k in self._going if self.windows[k].going]

    def rejoin(self, scores: Scores, starts: Starts) -> None:
        """Windows whose last ``rejoin`` tokens are the draft's take their rest from it."""
        for k in self._going:
            window, (b, t) = self.windows[k], starts[k]
            if window.agreed >= self._rejoin:
                logprobs = scores.logprobs[b, t + len(window.tokens) :].tolist()
                rest = window.rejoin(logprobs, self._ends)
                self.states[k, rest] = scores.hidden[b, t + rest.start : t + rest.stop]
        self._going = [k for k in self._going if self.windows[k].going]

    def rows(self) -> list[int]:
        """The rows of the cache that are still needed; from now on they are renumbered."""
        self._going.sort(key=lambda k: self.windows[k].row)
        rows = sorted({self.windows[k].row for k in self._going})
        number = {row: i for i, row in enumerate(rows)}
        for k in self._going:
            self.windows[k].row = number[self.windows[k].row]
        return rows

    def lay_out(self) -> Layout:
        """What is read next."""
        going = [self.windows[k] for k in self._going]
        self._read = blocks(going, FREE.get(self._device.type, FREE_ELSEWHERE))
        for window, block in zip(going, self._read, strict=True):
            window.read, window.forwards = window.read + len(block), window.forwards + 1
        self._layout = self._packed(going)
        self._place = self._places()
        return self._layout

    def _packed(self, going: Sequence[Window]) -> Layout:
        cells: list[list[tuple[int, int, int, bool]]] = [[] for _ in {w.row for w in going}]
        place: list[tuple[int, int]] = []
        for k, window, block in zip(self._going, going, self._read, strict=True):
            first, row = window.known + len(window.tokens) - 1, cells[window.row]
            place += [(window.row, len(row) + j) for j in range(len(block))]
            row += [(token, first + j, k, True) for j, token in enumerate(block)]
        width = max(map(len, cells))
        filled = [row + [(0, 0, row[0][2], False)] * (width - len(row)) for row in cells]
        ids, positions, owner, real = torch.tensor(filled, device=self._device).unbind(-1)
        beside = (owner[:, :, None] == owner[:, None, :]).tril() & (real[:, None, :] > 0)
        mask = torch.cat([self._seen[owner], beside], dim=-1)[:, None]
        row_of, column = torch.tensor(place, device=self._device).unbind(-1)
        return Layout(ids, positions, row_of, column, mask)


def blocks(windows: Sequence[Window], budget: int) -> list[list[int]]:
    """What each window reads next: as much of the drafts as keeps the filled rows in budget."""
    most = budget // len({window.row for window in windows}) - 1
    for ahead in range(min(MOST_AHEAD, most), 0, -1):
        held = Counter[int]()
        for window in windows:
            held[window.row] += len(window.to_read(ahead))
        if len(held) * max(held.values()) <= budget:
            return [window.to_read(ahead) for window in windows]
    return [window.to_read(0) for window in windows]
