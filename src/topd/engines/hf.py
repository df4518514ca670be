"""The embedded engine: a transformers model in this process.

Sampling takes its numbers from the row's own seed (:mod:`topd.engines.draws`), so a response does
not depend on what else is in the batch. Only full-attention caches can be shared
between windows; other models continue from a fresh prefill, slower and equal, and where a model's
own cache does not do, its rows are written one by one, or without a cache. See :data:`Way`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from topd.engines import Scores, Tick, no_tick
from topd.engines.decoding import (
    Window,
    WindowBatch,
    growing_cache,
    open_windows,
    select_rows,
)
from topd.engines.draws import Noise, draw
from topd.engines.fused import FAULTS
from topd.engines.graphs import Graphs, graphable
from topd.engines.memory import in_chunks
from topd.engines.packed import packed
from topd.errors import TOPDError
from topd.inputs.heads import head_of
from topd.inputs.positions import rope_switch, takes_masks
from topd.losses import linear_logprobs
from topd.types import Effort, Generation, Head, Ids, Sampling

WINDOWS_AT_ONCE = 64
ROLLOUTS_SHARE, WINDOWS_SHARE = 1 / 3, 1 / 16  # of a GPU's memory, for buffers of graphs
TOKENS_AT_ONCE = 1 << 14  # of prefixes that are read again
ROOM = 256  # entries that a cache holds at first; then it grows by half


# How a model writes, fastest first; each is exact for more models than the one before.
#   shared  together, windows after the cache of the scoring forward, by masks of our own
#   fresh   together, windows after their prefixes, which are read again
#   alone   likewise, one row at a time: nothing is padded, and no row leaves a batch
#   whole   together, without a cache: every text is read from its beginning for each token
Way = Literal["shared", "fresh", "alone", "whole"]
WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True)
class _Prefix:
    """What ``continue_from`` needs of a scoring forward; ``cache`` is None if none was kept."""

    prompts: tuple[Ids, ...]
    responses: tuple[Ids, ...]
    cache: DynamicCache | None


class HFEngine:
    """Generation, scoring and continuation with a transformers causal language model.

    Args:
        model: the model, on its device. It is put into eval mode for each call and back.
        eos_ids: tokens that end a response.
        vocab_size: only the first so many tokens are sampled; the rest are padding rows.
        allowed: ids that tokens have; no others are sampled nor counted.
        name: what error messages call the model.
        autocast: makes the context of every forward, so that it computes as training does.
        way: how to write; by default what the configuration says, which
            :func:`~topd.engines.decode_check.check_decoding` tries.
        graphs: whether to write with :mod:`topd.engines.graphs`; by default on a GPU, where the
            configuration says that it can.

    Attributes:
        graphs: what writes in graphs; None or ``broken`` where nothing does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_ids: Sequence[int],
        vocab_size: int | None = None,
        allowed: Sequence[int] | None = None,
        name: str = "model",
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
        way: Way | None = None,
        graphs: bool | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self._autocast = autocast
        self.vocab_size = vocab_size or head_of(model).vocab_size
        self._barred: Tensor | None = None
        if allowed is not None:
            self._allow(allowed)
        self._kernel = model.config.get_text_config()._attn_implementation
        self._cache_name = _cache_name(model)
        self.way: Way = way or _first_way(model, self._cache_name)
        self._switch = rope_switch(model.config)
        self._ends = frozenset(eos_ids)
        self._eos = torch.tensor(sorted(self._ends), device=model.device)
        wanted = model.device.type == "cuda" and way is None if graphs is None else graphs
        suits = wanted and self._cache_name == "past_key_values" and graphable(model)
        self.graphs = Graphs(model, self._forward) if suits else None

    @property
    def head(self) -> Head:
        """The model's output head on the tokens that may be sampled."""
        head = head_of(self.model).narrowed(self.vocab_size)
        if self._barred is None:
            return head
        return replace(head, barred=self._barred.to(head.weight.device))

    def _allow(self, ids: Sequence[int]) -> None:
        """Rows after the last token are sliced off, those between tokens barred."""
        allowed = torch.tensor([i for i in ids if i < self.vocab_size], device=self.model.device)
        self.vocab_size = int(allowed.max()) + 1
        if len(allowed) < self.vocab_size:
            barred = torch.ones(self.vocab_size, dtype=torch.bool, device=allowed.device)
            barred[allowed] = False
            self._barred = barred

    def ends(self, tokens: Ids) -> bool:
        """Whether a text ends with an end-of-sequence token."""
        return bool(tokens) and tokens[-1] in self._ends

    @property
    def shares(self) -> bool:
        """Whether texts with a common prefix may be in one row."""
        return self.way == "shared"

    @torch.no_grad()
    def embed(self, tokens: Int[Tensor, "N n"]) -> Float[Tensor, "N n D"]:
        """Input embeddings of tokens."""
        return self.model.get_input_embeddings()(tokens.to(self._eos.device))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Ids],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        tick: Tick = no_tick,
    ) -> list[Generation]:
        """Sample one response a prompt. See :class:`~topd.engines.Engine`."""
        check_seeds(seeds, prompts)
        if not prompts:
            return []
        self._check_reach(max(map(len, prompts)) + sampling.max_new_tokens - 1)
        found = self._in_graphs(
            lambda graphs: in_chunks(
                lambda some: self._captured(graphs, prompts[some], sampling, seeds[some], tick),
                len(prompts),
                graphs.at_once(max(map(len, prompts)), sampling.max_new_tokens, ROLLOUTS_SHARE),
            )
        )
        if found is not None:
            return found
        with self._evaluating(), packed(self.model, self.head) as head:
            if self.way == "whole":
                return self._reread(head, prompts, sampling, seeds, tick)
            if self.way != "alone":
                return self._written(head, prompts, sampling, seeds, tick)
            rows = zip(prompts, seeds, strict=True)
            return [self._written(head, [p], sampling, [s], tick)[0] for p, s in rows]

    def _written(
        self,
        head: Head,
        prompts: Sequence[Ids],
        sampling: Sampling,
        seeds: Sequence[int],
        tick: Tick,
    ) -> list[Generation]:
        """Read prompts, padded on the left, and write after them."""
        width = max(len(prompt) for prompt in prompts)
        ids = self._tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        length = self._tensor([len(prompt) for prompt in prompts])
        mask = torch.arange(width, device=ids.device) >= width - length[:, None]
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        cache = growing_cache(self.model, room=min(sampling.max_new_tokens, ROOM))
        hidden = self._forward(ids, mask, positions, cache)[:, -1]
        return self._decode(head, hidden, mask, length, cache, sampling, seeds, tick)

    def _in_graphs(self, write: Callable[[Graphs], list[Generation]]) -> list[Generation] | None:
        """What is written in graphs; None, said once, where that is not possible."""
        if self.graphs is None or self.graphs.broken:
            return None
        try:
            with self._evaluating():
                return write(self.graphs)
        except FAULTS as fault:
            if isinstance(fault, TOPDError):
                raise
            self.graphs.give_up(self.name, fault)
            return None

    def _captured(
        self,
        graphs: Graphs,
        prompts: Sequence[Ids],
        sampling: Sampling,
        seeds: Sequence[int],
        tick: Tick,
    ) -> list[Generation]:
        """The same as ``_written``, in graphs; prompts are padded on the right."""
        lengths = [len(prompt) for prompt in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]

        def take(
            rows: list[int], drawn: list[list[int]], said: list[list[float]], _: Tensor | None
        ) -> list[int]:
            going = []
            for row, new, values in zip(rows, drawn, said, strict=True):
                end = next((k + 1 for k, one in enumerate(new) if one in self._ends), None)
                tokens[row] += new[:end]
                logprobs[row] += values[:end]
                if end is None:
                    going.append(row)
            return going

        with graphs.casting(self.head) as head:
            graphs.open(len(prompts), max(lengths), sampling.max_new_tokens)
            hidden = graphs.read(self._padded(prompts), self._tensor(lengths))
            graphs.write(head, hidden, lengths, sampling, seeds, take, keep=False, tick=tick)
        self._check_written(torch.tensor([sum(values) for values in logprobs]))
        return [
            Generation(tuple(text), tuple(values), self.ends(tuple(text)))
            for text, values in zip(tokens, logprobs, strict=True)
        ]

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Ids],
        responses: Sequence[Ids],
        *,
        temperature: float = 1.0,
        keep: bool = True,
    ) -> Scores:
        """Log-probs and last hidden states of responses. See :class:`~topd.engines.Engine`."""
        with self._evaluating():
            return self._score(prompts, responses, temperature, keep)

    def _score(
        self, prompts: Sequence[Ids], responses: Sequence[Ids], temperature: float, keep: bool
    ) -> Scores:
        ids = [list(p) + list(r) for p, r in zip(prompts, responses, strict=True)]
        self._check_reach(max(map(len, ids)))
        cache = DynamicCache(config=self.model.config) if keep and self.shares else None
        # Padding stands on the right, where a causal model cannot see it: no mask is needed.
        states = self._forward(self._padded(ids), None, None, cache)
        width = max(len(response) for response in responses)
        place = self._tensor([len(p) - 1 for p in prompts])[:, None] + torch.arange(
            width, device=states.device
        )
        place = place.clamp(max=states.shape[1] - 1)
        hidden = states.gather(1, place[:, :, None].expand(-1, -1, states.shape[-1]))
        prefix = _Prefix(tuple(prompts), tuple(responses), cache)
        return self._scores(hidden, responses, temperature, prefix)

    def _scores(
        self, hidden: Tensor, responses: Sequence[Ids], temperature: float, prefix: object
    ) -> Scores:
        """What the states [B T D] that predict the responses say of them."""
        tokens = self._padded(responses)
        found = linear_logprobs(
            hidden.flatten(0, 1), self.head, tokens.flatten(), temperature=temperature
        )
        logprobs, likeliest = (values.reshape(tokens.shape) for values in found)
        length = self._tensor([len(response) for response in responses])
        outside = torch.arange(tokens.shape[1], device=tokens.device) >= length[:, None]
        return Scores(hidden, logprobs.masked_fill(outside, 0.0), likeliest, prefix)

    @torch.no_grad()
    def continue_from(
        self,
        scores: Scores,
        starts: Sequence[tuple[int, int]],
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
        prefix = scores.prefix
        assert isinstance(prefix, _Prefix)
        check_seeds(seeds, starts)
        if prefix.cache is None or not self.shares:
            return self._continue_afresh(prefix, starts, sampling, seeds, tick)
        longest = max((len(prefix.prompts[b]) + t for b, t in starts), default=0)
        found = self._in_graphs(
            lambda graphs: in_chunks(
                lambda some: self._captured_windows(
                    graphs, scores, starts[some], sampling, seeds[some], rejoin, tick
                ),
                len(starts),
                graphs.at_once(longest, sampling.max_new_tokens, WINDOWS_SHARE),
            )
        )
        if found is not None:
            return found
        with self._evaluating(), packed(self.model, self.head) as head:
            return in_chunks(
                lambda some: self._windows(
                    head, scores, starts[some], sampling, seeds[some], rejoin, tick
                ),
                len(starts),
                WINDOWS_AT_ONCE,
            )

    def _windows(
        self,
        head: Head,
        scores: Scores,
        starts: Sequence[tuple[int, int]],
        sampling: Sampling,
        seeds: Sequence[int],
        rejoin: int,
        tick: Tick,
    ) -> list[Generation]:
        """Write windows: read some tokens of each, draw after each, keep what agrees."""
        prefix, steps = scores.prefix, sampling.max_new_tokens
        assert isinstance(prefix, _Prefix)
        assert prefix.cache is not None
        width = scores.hidden.shape[-1]
        windows, rows = open_windows(
            starts, prefix.prompts, prefix.responses, limit=steps, width=width
        )
        hidden = scores.hidden[tuple(self._tensor(starts).unbind(-1))]
        batch = WindowBatch(windows, self._noise(head, sampling, seeds), hidden, self._ends, rejoin)
        longest = max(window.known for window in windows)
        cache = self._copied(prefix.cache, rows, longest, room=steps)
        while True:
            tick()
            batch.take(hidden, *draw(head.logits(hidden), batch.gumbel, sampling))
            if rejoin:
                batch.rejoin(scores, starts)
            needed = batch.rows()
            if not needed:
                break
            if len(needed) < len(rows):
                rows = needed
                select_rows(cache, self._tensor(needed))
            layout = batch.lay_out()
            hidden = self._forward(layout.ids, layout.mask, layout.positions, cache)
            hidden = hidden[layout.row, layout.column]
        return self._of_windows(windows, batch.states)

    def _captured_windows(
        self,
        graphs: Graphs,
        scores: Scores,
        starts: Sequence[tuple[int, int]],
        sampling: Sampling,
        seeds: Sequence[int],
        rejoin: int,
        tick: Tick,
    ) -> list[Generation]:
        """The same as ``_windows``, in graphs: each window has a row, and none reads its draft."""
        prefix, steps = scores.prefix, sampling.max_new_tokens
        assert isinstance(prefix, _Prefix)
        assert prefix.cache is not None
        windows = [
            Window(row, len(prefix.prompts[b]) + t, prefix.responses[b][t : t + steps], steps)
            for row, (b, t) in enumerate(starts)
        ]
        at = self._tensor(starts)
        hidden = scores.hidden[at[:, 0], at[:, 1]]
        states = hidden.new_zeros(len(windows), steps, hidden.shape[-1])
        known = scores.logprobs.tolist() if rejoin else []
        written = 0

        def take(
            rows: list[int], drawn: list[list[int]], said: list[list[float]], new: Tensor | None
        ) -> list[int]:
            nonlocal written
            assert new is not None
            count = new.shape[1]
            states[self._tensor(rows), written : written + count] = new
            for row, tokens, logprobs in zip(rows, drawn, said, strict=True):
                window, (b, t) = windows[row], starts[row]
                read = count if written else count - 1
                window.read, window.forwards = window.read + read, window.forwards + read
                for token, logprob in zip(tokens, logprobs, strict=True):
                    if window.going:
                        window.take((token,), (logprob,), self._ends, rejoin)
                    if rejoin and window.going and window.agreed >= rejoin:
                        rest = window.rejoin(known[b][t + len(window.tokens) :], self._ends)
                        states[row, rest] = scores.hidden[b, t + rest.start : t + rest.stop]
            written += count
            return [row for row in rows if windows[row].going]

        with graphs.casting(self.head) as head:
            lengths = [window.known for window in windows]
            graphs.open(len(windows), max(lengths), steps)
            graphs.copy(prefix.cache, at[:, 0], max(lengths))
            graphs.write(head, hidden, lengths, sampling, seeds, take, keep=True, tick=tick)
        return self._of_windows(windows, states)

    def _of_windows(self, windows: Sequence[Window], states: Tensor) -> list[Generation]:
        """What was written, with its states [N K D]."""
        self._check_written(torch.tensor([sum(window.logprobs) for window in windows]))
        return [
            Generation(
                tuple(window.tokens),
                tuple(window.logprobs),
                window.ended,
                own[: len(window.tokens)],
                Effort(window.read, window.forwards),
            )
            for window, own in zip(windows, states, strict=True)
        ]

    def _copied(
        self, cache: DynamicCache, rows: Sequence[int], length: int, *, room: int
    ) -> DynamicCache:
        """Some rows of a cache, cut to their first ``length`` entries, with room for more."""
        index, copy = self._tensor(rows), growing_cache(self.model, room)
        for new, old in zip(copy.layers, cache.layers, strict=True):
            new.update(*(x[:, :, :length].index_select(0, index) for x in (old.keys, old.values)))
        return copy

    def _continue_afresh(
        self,
        prefix: _Prefix,
        starts: Sequence[tuple[int, int]],
        sampling: Sampling,
        seeds: Sequence[int],
        tick: Tick,
    ) -> list[Generation]:
        """Continue by reading every prefix again: for caches that cannot be shared."""
        cut = [prefix.prompts[b] + prefix.responses[b][:t] for b, t in starts]
        longest = max(map(len, cut), default=1) + sampling.max_new_tokens
        at_once = max(1, min(WINDOWS_AT_ONCE, TOKENS_AT_ONCE // longest))
        return in_chunks(
            lambda some: self._afresh(cut[some], sampling, seeds[some], tick), len(cut), at_once
        )

    def _afresh(
        self, cut: Sequence[Ids], sampling: Sampling, seeds: Sequence[int], tick: Tick
    ) -> list[Generation]:
        written = self.generate(cut, sampling, seeds, tick=tick)
        hidden = self.score(cut, [w.tokens for w in written], keep=False).hidden
        return [replace(w, hidden=h[: len(w.tokens)]) for w, h in zip(written, hidden, strict=True)]

    def _decode(
        self,
        head: Head,
        hidden: Tensor,
        mask: Tensor,
        position: Tensor,
        cache: DynamicCache,
        sampling: Sampling,
        seeds: Sequence[int],
        tick: Tick,
    ) -> list[Generation]:
        """Write tokens from ``hidden`` [N D], the states that predict each row's next token.

        ``mask`` [N L] says which entries of the cache a row may see, ``position`` [N] is the
        position of its next token. A row leaves the batch when it has ended.
        """
        steps = sampling.max_new_tokens
        noise = self._noise(head, sampling, seeds)
        alive = torch.arange(len(hidden), device=hidden.device)
        tokens = torch.full((len(hidden), steps), -1, device=hidden.device)
        logprobs = torch.zeros(len(hidden), steps, device=hidden.device)
        for step in range(steps):
            token, logprob = draw(head.logits(hidden), noise.at(alive, step, step), sampling)
            tokens[alive, step], logprobs[alive, step] = token, logprob.float()
            tick()
            going = (~torch.isin(token, self._eos)).nonzero()[:, 0]  # the only host sync
            if step + 1 == steps or not len(going):
                break
            if len(going) < len(alive):
                select_rows(cache, going)
                alive, token, mask, position = (x[going] for x in (alive, token, mask, position))
            mask = torch.nn.functional.pad(mask, (0, 1), value=True)
            seen = mask[:, None, None] if self.shares else mask
            hidden = self._forward(token[:, None], seen, position[:, None], cache)[:, -1]
            position = position + 1
        self._check_written(logprobs)
        return self._generations(tokens, logprobs)

    def _reread(
        self,
        head: Head,
        prompts: Sequence[Ids],
        sampling: Sampling,
        seeds: Sequence[int],
        tick: Tick,
    ) -> list[Generation]:
        """Write after prompts without a cache: all is read again for each token."""
        steps = sampling.max_new_tokens
        noise = self._noise(head, sampling, seeds)
        tokens = torch.full((len(prompts), steps), -1, device=self._eos.device)
        logprobs = torch.zeros(len(prompts), steps, device=self._eos.device)
        texts, going = [list(prompt) for prompt in prompts], list(range(len(prompts)))
        for step in range(steps):
            some = [texts[k] for k in going]
            states = self._forward(self._padded(some), None, None, None)
            last = self._tensor([len(text) - 1 for text in some])
            hidden, alive = states[torch.arange(len(some)), last], self._tensor(going)
            token, logprob = draw(head.logits(hidden), noise.at(alive, step, step), sampling)
            tokens[alive, step], logprobs[alive, step] = token, logprob.float()
            tick()
            for k, written in zip(going, token.tolist(), strict=True):
                texts[k].append(written)
            going = [k for k in going if texts[k][-1] not in self._ends]
            if not going:
                break
        self._check_written(logprobs)
        return self._generations(tokens, logprobs)

    def _noise(self, head: Head, sampling: Sampling, seeds: Sequence[int]) -> Noise:
        return Noise(
            seeds,
            sampling.max_new_tokens,
            head.vocab_size,
            self._eos.device,
            greedy=sampling.temperature == 0,
        )

    def _check_reach(self, longest: int) -> None:
        """No batch stands on both sides of where RoPE changes. Raises TOPDError if one would."""
        if self._switch is not None and longest > self._switch:
            raise TOPDError(
                f"{self.name}: {longest} tokens, and behind {self._switch} its RoPE (longrope or "
                "dynamic) has other frequencies, for all rows of a batch. Ask for shorter texts."
            )

    def _check_written(self, logprobs: Tensor) -> None:
        if bool(logprobs.isnan().any()):
            raise TOPDError(
                f"{self.name}: NaN logits while writing. Check its weights, lower the learning "
                "rate, or use bfloat16 or float32."
            )

    def _generations(self, tokens: Tensor, logprobs: Tensor) -> list[Generation]:
        finished = torch.isin(tokens, self._eos).any(-1).tolist()
        lengths = (tokens >= 0).sum(-1).tolist()
        return [
            Generation(tuple(t[:length]), tuple(p[:length]), end)
            for t, p, length, end in zip(
                tokens.tolist(), logprobs.tolist(), lengths, finished, strict=True
            )
        ]

    def _forward(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: DynamicCache | None
    ) -> Tensor:
        """Last hidden states [N L D]; the cache, if there is one, grows by L."""
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

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with self._autocast():
                yield
        finally:
            self.model.train(training)

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        width = max(len(row) for row in rows)
        return self._tensor([list(row) + [0] * (width - len(row)) for row in rows])

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, device=self._eos.device)


def _cache_name(model: PreTrainedModel) -> str | None:
    """The argument in which a decoder takes its cache; None if it takes none of transformers'."""
    known = inspect.signature(model.get_decoder().forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in known), None)


def _first_way(model: PreTrainedModel, cache_name: str | None) -> Way:
    """The fastest way that a configuration promises."""
    if cache_name is None:
        return "whole"
    masks = cache_name == "past_key_values" and takes_masks(model.config)
    return "shared" if masks else "fresh"


def check_seeds(seeds: Sequence[int], rows: Sequence[object]) -> None:
    """Every row has a seed. Raises TOPDError if not."""
    if len(seeds) != len(rows):
        raise TOPDError(f"{len(seeds)} seeds for {len(rows)} rows: give one a row.")
