"""Several teachers as one engine: each text is read by its own, or by all, as their mean.

Last hidden states of different models differ in width and meaning. So a state here is that of one
teacher, padded, with the teacher's number in the last column; with the mean it is those of all side
by side. :class:`SeveralHeads` maps them to logits, so that nothing after it needs to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from topd.engines import Engine, Scores, Tick, no_tick
from topd.engines.base import Prefix, Wanted, scores_of
from topd.engines.draws import Noise, draw
from topd.inputs.teachers import Routes
from topd.types import Generation, Head, Ids, Needs, Prompt, Sampling, Starts, Texts


@dataclass(frozen=True)
class SeveralHeads(Head):
    """The heads of several teachers over one vocabulary.

    Without ``shares`` a state's last column is the number of its head. With them a state has those
    of all heads side by side, and its logits are the log of the mean distribution,

        log sum_k share_k softmax(logits_k)
    """

    heads: tuple[Head, ...] = ()
    shares: tuple[float, ...] = ()

    @classmethod
    def of(cls, heads: Sequence[Head], shares: Sequence[float] = ()) -> SeveralHeads:
        """From heads of one vocabulary; ``weight`` only says how wide a state is."""
        widths = [head.weight.shape[1] for head in heads]
        dtype = reduce(torch.promote_types, (head.weight.dtype for head in heads))
        width = sum(widths) if shares else max(widths) + 1
        weight = heads[0].weight.new_zeros(1, dtype=dtype).expand(heads[0].vocab_size, width)
        barred = heads[0].barred
        if barred is None and any(head.bars for head in heads):
            barred = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        return cls(weight, barred=barred, heads=tuple(heads), shares=tuple(shares))

    def narrowed(self, vocab_size: int) -> SeveralHeads:
        """The same heads on the first ``vocab_size`` tokens."""
        if vocab_size == self.vocab_size:
            return self
        return SeveralHeads.of([head.narrowed(vocab_size) for head in self.heads], self.shares)

    def raw(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """See :meth:`topd.types.Head.raw`; scale and soft-cap are already in it."""
        return lambda states: self._mixed(states).to(dtype)

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits in at least float32."""
        flat = self._mixed(hidden.flatten(0, -2)).reshape(*hidden.shape[:-1], self.vocab_size)
        return flat if self.barred is None else flat.masked_fill(self.barred, -math.inf)

    def _mixed(self, states: Float[Tensor, "P D"]) -> Float[Tensor, "P V"]:
        if self.shares:
            parts = states.split([head.weight.shape[1] for head in self.heads], -1)
            known = [
                head.logits(part.to(head.weight.dtype)).log_softmax(-1) + math.log(share)
                for head, part, share in zip(self.heads, parts, self.shares, strict=True)
            ]
            return torch.stack(known).logsumexp(0)
        number = states[:, -1].round().long()
        each = torch.arange(len(self.heads), device=number.device)
        counts = number.eq(each[:, None]).sum(1).tolist()  # one wait for the device, for all
        places = number.argsort(stable=True).split(counts)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        found = states.new_empty(len(states), self.vocab_size, dtype=wide)
        for head, rows in zip(self.heads, places, strict=True):
            own = states[rows, : head.weight.shape[1]].to(head.weight.dtype)
            found[rows] = head.logits(own).to(found.dtype)
        return found


class _Part(NamedTuple):
    """What one of several teachers scored: its place, the rows that are its own, their scores."""

    teacher: int
    rows: list[int]
    scores: Scores


class SeveralTeachers:
    """Teachers that each read their own texts. Use what :meth:`of` returns for texts.

    Args:
        engines: one a teacher, over one vocabulary.
        places: name of a teacher to its place among the engines.
        owners: whose each text is, by the teachers' places.
    """

    gives: Needs = "distributions"

    def __init__(
        self,
        engines: Sequence[Engine],
        places: Mapping[str, int],
        owners: Sequence[int] | None = None,
    ) -> None:
        self.engines, self.places = tuple(engines), places
        known = () if owners is None else engines
        self.rows: list[list[int]] = [[] for _ in known]  # of every engine; none: nobody reads
        for row, owner in enumerate(owners or ()):
            self.rows[owner].append(row)

    @property
    def head(self) -> Head:
        """The map from the states of any of them to logits."""
        return SeveralHeads.of([engine.head for engine in self.engines])

    def ends(self, tokens: Ids) -> bool:
        """Whether a text ends with an end-of-sequence token."""
        return self.engines[0].ends(tokens)

    def owners(self, prompts: Sequence[Prompt]) -> list[int]:
        """Whose each prompt is, by the teachers' places."""
        return [self.places[prompt.teacher_name or ""] for prompt in prompts]

    def of(self, prompts: Sequence[Prompt]) -> SeveralTeachers:
        """The engine for texts after these prompts, in this order."""
        return SeveralTeachers(self.engines, self.places, self.owners(prompts))

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
        """See :class:`~topd.engines.Engine`: each window by the teacher that scored its text."""
        found: dict[int, Generation] = {}
        for k, rows, own in cast(list[_Part], scores.prefix):
            asked = [i for i, (b, _) in enumerate(starts) if b in rows]
            if not asked:
                continue
            places = [(rows.index(starts[i][0]), starts[i][1]) for i in asked]
            numbers = [seeds[i] for i in asked]
            written = self.engines[k].continue_from(
                own, places, sampling, numbers, rejoin=rejoin, tick=tick
            )
            for i, window in zip(asked, written, strict=True):
                states = None if window.hidden is None else self.marked(window.hidden, k)
                found[i] = replace(window, hidden=states)
        return [found[i] for i in range(len(starts))]

    def marked(self, hidden: Float[Tensor, "... D"], k: int) -> Float[Tensor, "... W"]:
        """States of teacher ``k``, padded, with its number in the last column."""
        weight = self.head.weight
        wide = pad(hidden.to(weight.dtype), (0, weight.shape[1] - hidden.shape[-1]))
        wide[..., -1] = k
        return wide

    def embed(self, tokens: Int[Tensor, "N n"]) -> Float[Tensor, "N n D"]:
        """Input embeddings of each row's teacher, padded with zeros to the widest."""
        pairs = list(zip(self.engines, self.rows, strict=True))
        parts = [engine.embed(tokens[rows]) for engine, rows in pairs]
        dtype = reduce(torch.promote_types, (part.dtype for part in parts))
        width = max(part.shape[-1] for part in parts)
        wide = parts[0].new_zeros(*tokens.shape, width, dtype=dtype)
        for (_, rows), part in zip(pairs, parts, strict=True):
            wide[rows, :, : part.shape[-1]] = part.to(wide)
        return wide

    def generate(
        self, prompts: Texts, sampling: Sampling, seeds: Sequence[int], *, tick: Tick = no_tick
    ) -> list[Generation]:
        """See :class:`~topd.engines.Engine`."""
        found: dict[int, Generation] = {}
        for engine, rows in zip(self.engines, self.rows, strict=True):
            if rows:
                some = [prompts[row] for row in rows]
                own = engine.generate(some, sampling, [seeds[row] for row in rows], tick=tick)
                found.update(zip(rows, own, strict=True))
        return [found[row] for row in range(len(prompts))]

    def score(
        self, prompts: Texts, responses: Texts, *, temperature: float = 1.0, keep: bool = True
    ) -> Scores:
        """See :class:`~topd.engines.Engine`."""
        width = max(len(response) for response in responses)
        weight = self.head.weight
        hidden = weight.new_zeros(len(prompts), width, weight.shape[1])
        logprobs = torch.zeros(len(prompts), width, device=weight.device)
        likeliest = torch.zeros(len(prompts), width, dtype=torch.long, device=weight.device)
        parts = []
        for k, (engine, rows) in enumerate(zip(self.engines, self.rows, strict=True)):
            if not rows:
                continue
            some, own = [prompts[row] for row in rows], [responses[row] for row in rows]
            scores = engine.score(some, own, temperature=temperature, keep=keep)
            parts.append(_Part(k, rows, scores))
            long = scores.hidden.shape[1]
            hidden[rows, :long] = self.marked(scores.hidden, k)
            logprobs[rows, :long] = scores.logprobs.to(logprobs)
            likeliest[rows, :long] = scores.likeliest.to(likeliest)
        return Scores(hidden, logprobs, likeliest, parts)


class MeanTeacher:
    """Several teachers that all read every text: their mean distribution scores and writes.

    It writes without a cache: every teacher reads the whole text again for each token.

    Args:
        engines: one a teacher, over one vocabulary.
        shares: of each in the mean.
    """

    gives: Needs = "distributions"

    def __init__(self, engines: Sequence[Engine], shares: Sequence[float]) -> None:
        self.engines, self.shares = tuple(engines), tuple(shares)

    @property
    def head(self) -> Head:
        """The map from the states of all of them to logits."""
        return SeveralHeads.of([engine.head for engine in self.engines], self.shares)

    def ends(self, tokens: Ids) -> bool:
        """Whether a text ends with an end-of-sequence token."""
        return self.engines[0].ends(tokens)

    def embed(self, tokens: Int[Tensor, "N n"]) -> Float[Tensor, "N n D"]:
        """Input embeddings of all teachers side by side."""
        return torch.cat([engine.embed(tokens).float() for engine in self.engines], -1)

    def _states(self, prompts: Texts, responses: Texts) -> Float[Tensor, "B T D"]:
        parts = [engine.score(prompts, responses, keep=False).hidden for engine in self.engines]
        return torch.cat([part.to(self.head.weight.dtype) for part in parts], -1)

    @torch.no_grad()
    def score(
        self, prompts: Texts, responses: Texts, *, temperature: float = 1.0, keep: bool = True
    ) -> Scores:
        """See :class:`~topd.engines.Engine`; nothing is kept but the texts."""
        prefix = Prefix(tuple(prompts), tuple(responses))
        return scores_of(self._states(prompts, responses), self.head, prefix, temperature)

    def generate(
        self, prompts: Texts, sampling: Sampling, seeds: Sequence[int], *, tick: Tick = no_tick
    ) -> list[Generation]:
        """See :class:`~topd.engines.Engine`."""
        written = self._written(prompts, Wanted(sampling, seeds, tick))
        return [replace(generation, hidden=None) for generation in written]

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
        """See :class:`~topd.engines.Engine`; windows are written to their end."""
        prefix = cast(Prefix, scores.prefix)
        return self._written(prefix.before(starts), Wanted(sampling, seeds, tick))

    @torch.no_grad()
    def _written(self, prompts: Texts, wanted: Wanted) -> list[Generation]:
        """What comes after texts, with the states that predict it."""
        head, device = self.head, self.head.weight.device
        greedy = wanted.sampling.temperature == 0
        noise = Noise(wanted.seeds, wanted.steps, head.vocab_size, device, greedy=greedy)
        tokens: list[list[int]] = [[] for _ in prompts]
        said: list[list[float]] = [[] for _ in prompts]
        states: list[list[Tensor]] = [[] for _ in prompts]
        for step in range(wanted.steps):
            going = [row for row, text in enumerate(tokens) if not self.ends(tuple(text))]
            if not going:
                break
            read = [(*prompts[row], *tokens[row]) for row in going]
            hidden = self._states(read, [(0,)] * len(going))[:, 0]
            at = torch.tensor(going, device=hidden.device)
            drawn, logprobs = draw(head.logits(hidden), noise.at(at, step, step), wanted.sampling)
            for i, row in enumerate(going):
                tokens[row].append(int(drawn[i]))
                said[row].append(float(logprobs[i]))
                states[row].append(hidden[i])
            wanted.tick()
        return [
            Generation(
                tuple(text), tuple(own), self.ends(tuple(text)), torch.stack(kept) if kept else None
            )
            for text, own, kept in zip(tokens, said, states, strict=True)
        ]


def reader_of(teacher: Engine, prompts: Sequence[Prompt]) -> Engine:
    """The teacher for texts after these prompts, in this order: itself, where there is one."""
    return teacher.of(prompts) if isinstance(teacher, SeveralTeachers) else teacher


def owners_of(teacher: Engine, prompts: Sequence[Prompt]) -> list[int]:
    """Whose each prompt is, by the teachers' places; all 0 where one reads them all."""
    return teacher.owners(prompts) if isinstance(teacher, SeveralTeachers) else [0] * len(prompts)


def one_teacher(engines: Sequence[Engine], routes: Routes) -> Engine:
    """What reads every text: the only engine, or several as ``routes`` say."""
    if len(engines) == 1:
        return engines[0]
    if routes.mix == "mean":
        return MeanTeacher(engines, routes.shares)
    return SeveralTeachers(engines, routes.places)
