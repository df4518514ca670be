"""Writing windows after the cache of a scoring forward, together or in graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from topd.engines import Scores
from topd.engines.base import Prefix, Wanted
from topd.engines.decoding import Window, WindowBatch, growing_cache, open_windows, select_rows
from topd.engines.draws import draw
from topd.engines.forward import ForwardEngine
from topd.engines.graphs import Graphs
from topd.engines.graphs.buffers import SHARED_UNIT, own_entries, rounded
from topd.types import Effort, Generation, Head, Starts


def write_windows(
    engine: ForwardEngine, head: Head, scores: Scores, starts: Starts, wanted: Wanted
) -> list[Generation]:
    """Write windows: read some tokens of each, draw after each, keep what agrees."""
    prefix, cache = _prefix_of(scores)
    windows, rows = open_windows(
        starts, prefix.prompts, prefix.responses, limit=wanted.steps, width=scores.hidden.shape[-1]
    )
    hidden = scores.hidden[tuple(engine.tensor(starts).unbind(-1))]
    noise, rejoin = engine.noise(head, wanted), wanted.rejoin
    batch = WindowBatch(windows, noise, hidden, engine.end_ids, rejoin)
    own = growing_cache(engine.model, wanted.steps)
    _copy(cache, own, engine.tensor(rows), max(window.known for window in windows))
    while True:
        wanted.tick()
        batch.take(hidden, *draw(head.logits(hidden), batch.numbers, wanted.sampling))
        if rejoin:
            batch.rejoin(scores, starts)
        needed = batch.rows()
        if not needed:
            return _generations(engine, windows, batch.states)
        if len(needed) < len(rows):
            rows = needed
            select_rows(own, engine.tensor(needed))
        layout = batch.lay_out()
        hidden = engine.forward(layout.ids, layout.mask, layout.positions, own)
        hidden = hidden[layout.row, layout.column]


class _InGraphs:
    """Windows that graphs write: each has a row, and none reads its draft."""

    def __init__(
        self, engine: ForwardEngine, scores: Scores, starts: Starts, wanted: Wanted
    ) -> None:
        self._engine, self._scores, self._starts = engine, scores, starts
        self._rejoin, steps = wanted.rejoin, wanted.steps
        prefix, _ = _prefix_of(scores)
        self.windows = [
            Window(row, len(prefix.prompts[b]) + t, prefix.responses[b][t : t + steps], steps)
            for row, (b, t) in enumerate(starts)
        ]
        hidden = scores.hidden
        self.states = hidden.new_zeros(len(starts), steps, hidden.shape[-1])
        self._known = scores.logprobs.tolist() if wanted.rejoin else []
        self._written = 0

    def take(
        self, rows: list[int], drawn: list[list[int]], said: list[list[float]], new: Tensor | None
    ) -> list[int]:
        """Note what was drawn and its states [n K D]; returns the rows that are still going."""
        assert new is not None
        count, written = new.shape[1], self._written
        self.states[self._engine.tensor(rows), written : written + count] = new
        for row, tokens, logprobs in zip(rows, drawn, said, strict=True):
            window = self.windows[row]
            read = count if written else count - 1
            window.read, window.forwards = window.read + read, window.forwards + read
            if not self._rejoin:
                window.write(tokens, logprobs, self._engine.end_ids)
                continue
            for token, logprob in zip(tokens, logprobs, strict=True):
                if window.going:
                    window.take((token,), (logprob,), self._engine.end_ids, self._rejoin)
                if window.going and window.agreed >= self._rejoin:
                    self._take_rest(row, window)
        self._written += count
        return [row for row in rows if self.windows[row].going]

    def _take_rest(self, row: int, window: Window) -> None:
        """Take the rest of the rollout for that of a window."""
        b, t = self._starts[row]
        rest = window.rejoin(self._known[b][t + len(window.tokens) :], self._engine.end_ids)
        self.states[row, rest] = self._scores.hidden[b, t + rest.start : t + rest.stop]


def write_windows_in_graphs(
    engine: ForwardEngine, graphs: Graphs, scores: Scores, starts: Starts, wanted: Wanted
) -> list[Generation]:
    """The same in graphs."""
    _, cache = _prefix_of(scores)
    found = _InGraphs(engine, scores, starts, wanted)
    known = [window.known for window in found.windows]
    with graphs.casting(engine.head) as head:
        graphs.open(len(starts), own_entries(wanted.steps), continuing=True)
        graphs.buffers.share(cache, [b for b, _ in starts], known)
        hidden = scores.hidden[tuple(engine.tensor(starts).unbind(-1))]
        graphs.write(head, hidden, known, wanted, found.take, keep=True)
    return _generations(engine, found.windows, found.states)


def entries_of(scores: Scores, starts: Starts, steps: int) -> Callable[[int], int]:
    """How many entries graphs have for so many of these windows: of their texts, and their own."""
    prompts = _prefix_of(scores)[0].prompts

    def read(some: Starts) -> int:
        ends = {b: 0 for b, _ in some}
        for b, t in some:
            ends[b] = max(ends[b], len(prompts[b]) + t)
        return sum(ends.values())

    def entries(rows: int) -> int:
        parts = [starts[k : k + rows] for k in range(0, len(starts), rows)]
        most = max(map(read, parts), default=0)
        return rounded(most, SHARED_UNIT) + rows * own_entries(steps)

    return entries


def _prefix_of(scores: Scores) -> tuple[Prefix, DynamicCache]:
    """The scored texts, and the cache that was kept of them."""
    prefix = scores.prefix
    assert isinstance(prefix, Prefix)
    assert prefix.cache is not None
    return prefix, prefix.cache


def _copy(cache: DynamicCache, own: DynamicCache, rows: Tensor, length: int) -> None:
    """Write some rows of a cache, cut to their first ``length`` entries, into an empty one."""
    for new, old in zip(own.layers, cache.layers, strict=True):
        new.update(*(x[:, :, :length].index_select(0, rows) for x in (old.keys, old.values)))


def _generations(
    engine: ForwardEngine, windows: Sequence[Window], states: Float[Tensor, "N K D"]
) -> list[Generation]:
    """What was written, with its states."""
    return engine.check_written(
        [
            Generation(
                tuple(window.tokens),
                tuple(window.logprobs),
                window.ended,
                own[: len(window.tokens)],
                Effort(window.read, window.forwards),
            )
            for window, own in zip(windows, states, strict=True)
        ]
    )
