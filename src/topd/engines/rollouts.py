"""Writing after prompts: with a cache, in graphs, or by reading all again for each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topd.engines.base import Wanted
from topd.engines.decoding import Window, growing_cache, select_rows
from topd.engines.draws import draw
from topd.engines.forward import ForwardEngine
from topd.engines.graphs import Graphs
from topd.engines.graphs.buffers import rounded
from topd.types import Generation, Head, Texts

ROOM = 256  # entries that a cache holds at first; then it grows by half


class CachedRows:
    """Texts on their way, in rows of a cache; prompts are padded on the left.

    ``mask`` [N L] says which entries of the cache a row may see, ``position`` [N] is that of its
    next token.
    """

    def __init__(self, engine: ForwardEngine, prompts: Texts, steps: int) -> None:
        self._engine = engine
        width = max(len(prompt) for prompt in prompts)
        self._ids = engine.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        self.position = engine.tensor([len(prompt) for prompt in prompts])
        self.mask = torch.arange(width, device=engine.device) >= width - self.position[:, None]
        self._cache = growing_cache(engine.model, room=min(steps, ROOM))

    def start(self) -> Float[Tensor, "N D"]:
        """Read the prompts: the states that predict the first tokens."""
        positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)
        return self._engine.forward(self._ids, self.mask, positions, self._cache)[:, -1]

    def read(self, going: Int[Tensor, " n"], token: Int[Tensor, " n"]) -> Float[Tensor, "n D"]:
        """Read a token of each row that is going; the others are left."""
        if len(going) < len(self.mask):
            select_rows(self._cache, going)
            self.mask, self.position = self.mask[going], self.position[going]
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
        seen = self.mask[:, None, None] if self._engine.shares else self.mask
        ids, positions = token[:, None], self.position[:, None]
        self.position = self.position + 1
        return self._engine.forward(ids, seen, positions, self._cache)[:, -1]


class RereadRows:
    """Texts on their way without a cache: one is read from its beginning for each token."""

    def __init__(self, engine: ForwardEngine, prompts: Texts) -> None:
        self._engine, self._texts = engine, [*prompts]

    def start(self) -> Float[Tensor, "N D"]:
        """The states that predict the next tokens."""
        states = self._engine.forward(self._engine.padded(self._texts))
        last = self._engine.tensor([len(text) - 1 for text in self._texts])
        return states[torch.arange(len(last)), last]

    def read(self, going: Int[Tensor, " n"], token: Int[Tensor, " n"]) -> Float[Tensor, "n D"]:
        """As in CachedRows."""
        written = zip(going.tolist(), token.tolist(), strict=True)
        self._texts = [(*self._texts[k], new) for k, new in written]
        return self.start()


def write(
    engine: ForwardEngine, head: Head, rows: CachedRows | RereadRows, wanted: Wanted
) -> list[Generation]:
    """Write after prompts. A row leaves the batch when it has ended."""
    steps, noise, hidden = wanted.steps, engine.noise(head, wanted), rows.start()
    alive, ends = torch.arange(len(hidden), device=engine.device), engine.tensor([*engine.end_ids])
    tokens = torch.full((len(hidden), steps), -1, device=engine.device)
    logprobs = torch.zeros(len(hidden), steps, device=engine.device)
    for step in range(steps):
        token, logprob = draw(head.logits(hidden), noise.at(alive, step, step), wanted.sampling)
        tokens[alive, step], logprobs[alive, step] = token, logprob.float()
        wanted.tick()
        going = (~torch.isin(token, ends)).nonzero()[:, 0]  # the only host sync
        if step + 1 == steps or not len(going):
            break
        if len(going) < len(alive):
            alive, token = alive[going], token[going]
        hidden = rows.read(going, token)
    lengths = (tokens >= 0).sum(-1).tolist()
    written = zip(tokens.tolist(), logprobs.tolist(), lengths, strict=True)
    return _generations(engine, [(t[:length], p[:length]) for t, p, length in written])


def write_in_graphs(
    engine: ForwardEngine, graphs: Graphs, prompts: Texts, wanted: Wanted
) -> list[Generation]:
    """The same in graphs; prompts are padded on the right."""
    lengths = [len(prompt) for prompt in prompts]
    texts = [Window(row, length, (), wanted.steps) for row, length in enumerate(lengths)]

    def take(
        rows: list[int], drawn: list[list[int]], said: list[list[float]], _: Tensor | None
    ) -> list[int]:
        for row, new, values in zip(rows, drawn, said, strict=True):
            texts[row].write(new, values, engine.end_ids)
        return [row for row in rows if texts[row].going]

    with graphs.casting(engine.head) as head:
        graphs.open(len(prompts), rounded(max(lengths) + wanted.steps))
        hidden = graphs.read(engine.padded(prompts), engine.tensor(lengths))
        graphs.write(head, hidden, lengths, wanted, take, keep=False)
    return _generations(engine, [(text.tokens, text.logprobs) for text in texts])


def _generations(
    engine: ForwardEngine, written: Sequence[tuple[list[int], list[float]]]
) -> list[Generation]:
    return engine.check_written(
        [Generation(tuple(t), tuple(p), engine.ends(tuple(t))) for t, p in written]
    )
