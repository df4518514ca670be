"""The embedded engine: a transformers model in this process.

Sampling takes its numbers from the row's own seed (:mod:`topd.engines.draws`), so a response does
not depend on what else is in the batch. Only full-attention caches can be shared
between windows; other models continue from a fresh prefill, slower and equal, and where a model's
own cache does not do, its rows are written one by one, or without a cache. See
:data:`~topd.engines.forward.Way`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import DynamicCache

from topd.engines import Scores, Tick, no_tick
from topd.engines.base import Prefix, Wanted, check_seeds, scores_of
from topd.engines.forward import ForwardEngine
from topd.engines.graphs import Graphs
from topd.engines.graphs.buffers import rounded
from topd.engines.memory import in_chunks
from topd.engines.packed import packed
from topd.engines.rollouts import CachedRows, RereadRows, write, write_in_graphs
from topd.engines.windows import entries_of, write_windows, write_windows_in_graphs
from topd.errors import TOPDError, compiler_faults
from topd.types import Generation, Sampling, Starts, Texts

WINDOWS_AT_ONCE = 64
ROLLOUTS_SHARE, WINDOWS_SHARE = 1 / 3, 1 / 16  # of a GPU's memory, for buffers of graphs
TOKENS_AT_ONCE = 1 << 14  # of prefixes that are read again


class HFEngine(ForwardEngine):
    """Generation, scoring and continuation with a transformers causal language model.

    The model is put into eval mode for each call and back. For its arguments see
    :class:`~topd.engines.forward.ForwardEngine` and :class:`~topd.engines.base.BaseEngine`.
    """

    @torch.no_grad()
    def generate(
        self, prompts: Texts, sampling: Sampling, seeds: Sequence[int], *, tick: Tick = no_tick
    ) -> list[Generation]:
        """Sample one response a prompt. See :class:`~topd.engines.Engine`."""
        check_seeds(seeds, prompts)
        if not prompts:
            return []
        wanted, longest = Wanted(sampling, seeds, tick), max(map(len, prompts))
        self.check_reach(longest + wanted.steps - 1)
        found = self._in_graphs(
            lambda graphs, some: write_in_graphs(self, graphs, prompts[some], wanted.of(some)),
            len(prompts),
            lambda rows: rows * rounded(longest + wanted.steps),
            ROLLOUTS_SHARE,
        )
        if found is not None:
            return found
        with self.evaluating(), packed(self.model, self.head) as head:
            if self.way == "whole":
                return write(self, head, RereadRows(self, prompts), wanted)
            at_once = 1 if self.way == "alone" else len(prompts)
            parts = [slice(k, k + at_once) for k in range(0, len(prompts), at_once)]
            rows = (CachedRows(self, prompts[some], wanted.steps) for some in parts)
            written = zip(rows, parts, strict=True)
            return [g for own, some in written for g in write(self, head, own, wanted.of(some))]

    def _in_graphs(
        self,
        write: Callable[[Graphs, slice], list[Generation]],
        count: int,
        entries: Callable[[int], int],
        share: float,
    ) -> list[Generation] | None:
        """What is written in graphs; None, said once, where that is not possible.

        ``entries`` are those of buffers for a number of rows, ``share`` that of memory for them.
        """
        graphs = self.graphs
        if graphs is None or graphs.broken:
            return None
        try:
            with self.evaluating():
                return in_chunks(
                    lambda some: write(graphs, some),
                    count,
                    graphs.at_once(entries, share),
                    graphs.release,
                )
        except compiler_faults() as fault:
            if isinstance(fault, TOPDError):
                raise
            graphs.give_up(self.name, fault)
            return None

    @torch.no_grad()
    def score(
        self, prompts: Texts, responses: Texts, *, temperature: float = 1.0, keep: bool = True
    ) -> Scores:
        """Log-probs and last hidden states of responses. See :class:`~topd.engines.Engine`."""
        ids = [list(p) + list(r) for p, r in zip(prompts, responses, strict=True)]
        self.check_reach(max(map(len, ids)))
        cache = DynamicCache(config=self.model.config) if keep and self.shares else None
        width = max(len(response) for response in responses)
        with self.evaluating():
            # Padding is on the right, where a causal model cannot see it: no mask is needed.
            states = self.forward(self.padded(ids), cache=cache)
            place = self.tensor([len(p) - 1 for p in prompts])[:, None]
            place = place + torch.arange(width, device=states.device)
            place = place.clamp(max=states.shape[1] - 1)
            hidden = states.gather(1, place[:, :, None].expand(-1, -1, states.shape[-1]))
            prefix = Prefix(tuple(prompts), tuple(responses), cache)
            return scores_of(hidden, self.head, prefix, temperature)

    @torch.no_grad()
    def continue_from(
        self,
        scores: Scores,
        starts: Starts,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        rejoin: int = 0,
        tick: Tick = no_tick,
    ) -> list[Generation]:
        """Continue scored responses from (row, token) pairs. See :class:`~topd.engines.Engine`.

        All windows decode together, ``WINDOWS_AT_ONCE`` at most, after a copy of the scoring
        forward's cache that windows of one response may share; the first token comes from its
        hidden states. The response is the draft of its windows, verified in blocks.
        """
        prefix, wanted = scores.prefix, Wanted(sampling, seeds, tick, rejoin)
        assert isinstance(prefix, Prefix)
        check_seeds(seeds, starts)
        if prefix.cache is None or not self.shares:
            return self._continue_afresh(prefix, starts, wanted)
        found = self._in_graphs(
            lambda graphs, some: write_windows_in_graphs(
                self, graphs, scores, starts[some], wanted.of(some)
            ),
            len(starts),
            entries_of(scores, starts, wanted.steps),
            WINDOWS_SHARE,
        )
        if found is not None:
            return found
        with self.evaluating(), packed(self.model, self.head) as head:
            return in_chunks(
                lambda some: write_windows(self, head, scores, starts[some], wanted.of(some)),
                len(starts),
                WINDOWS_AT_ONCE,
            )

    def _continue_afresh(self, prefix: Prefix, starts: Starts, wanted: Wanted) -> list[Generation]:
        """Continue by reading every prefix again: for caches that cannot be shared."""
        cut = prefix.before(starts)
        longest = max(map(len, cut), default=1) + wanted.steps
        at_once = max(1, min(WINDOWS_AT_ONCE, TOKENS_AT_ONCE // longest))
        return in_chunks(lambda some: self._afresh(cut[some], wanted.of(some)), len(cut), at_once)

    def _afresh(self, cut: Texts, wanted: Wanted) -> list[Generation]:
        written = self.generate(cut, wanted.sampling, wanted.seeds, tick=wanted.tick)
        hidden = self.score(cut, [w.tokens for w in written], keep=False).hidden
        return [replace(w, hidden=h[: len(w.tokens)]) for w, h in zip(written, hidden, strict=True)]
