"""Evaluating an engine on problems: what it answers greedily and when it samples, and how surely.

Greedy and sampled always both: reverse KL sharpens a student and cross-entropy on soft targets
spreads it, so that one can rise while the other falls.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from topd.engines import Engine, Tick, no_tick
from topd.errors import TOPDError
from topd.evaluate.answers import Verify
from topd.inputs.prompt_rows import unformatted
from topd.seeds import Stream, seed_of
from topd.statistics import Interval, bootstrap, pass_at_k
from topd.types import Generation, Ids, Prompt, Sampling

Asked: TypeAlias = tuple[Prompt, int | None]  # problem, number of the sample: None is greedy
Decode: TypeAlias = Callable[[Ids], str]
Keep: TypeAlias = Callable[[Sequence["Response"]], None]  # a batch, as soon as it is there

THOUGHT = "<think>"
MARKS = {THOUGHT, "</think>", "[THINK]", "[/THINK]", "<|channel|>"}  # kept in a response's text
TAIL = 16  # tokens of a prompt that its last mark is looked for in


@dataclass(frozen=True)
class Response:
    """One answer. ``problem`` is the row of the data; ``sample`` counts from 0, None is greedy.

    ``finished`` is False if the length limit cut it off; it is verified all the same.
    ``logprob`` is that of the whole response under the model, in nats. ``repeats`` is the first
    row with the same prompt, where that is another: both are one problem to every figure.
    """

    problem: int
    sample: int | None
    ids: Ids
    text: str
    verified: bool
    finished: bool
    logprob: float = field(default=0.0, compare=False)
    repeats: int | None = field(default=None, compare=False)

    def record(self) -> dict[str, Any]:
        """Plain values; without the log-prob, whose last bits depend on the batch."""
        left_out = ("logprob", "repeats")
        return {key: value for key, value in asdict(self).items() if key not in left_out}


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found. All intervals are over problems.

    Rows of the data with one prompt are one problem, whose value is the mean of theirs: they do not
    stand for more problems than there are.

    ``greedy`` is the share of problems solved greedily, ``pass_at[1]`` the mean over problems of
    the share of right samples, ``pass_at[k]`` the unbiased pass@k. Lengths are in tokens,
    ``truncated`` is the share of responses that the length limit cut off. ``responses`` are in the
    order of the problems, the greedy one before the samples.
    """

    problems: int
    samples: int
    greedy: Interval
    pass_at: Mapping[int, Interval]
    greedy_length: Interval
    mean_length: Interval
    greedy_truncated: Interval
    truncated: Interval
    responses: tuple[Response, ...]

    @property
    def rows(self) -> int:
        """Rows that were answered: more than ``problems`` where some have the same prompt."""
        return len({response.problem for response in self.responses})

    def solved(self, *, greedy: bool = False) -> list[float]:
        """The share of right responses to each problem: what ``paired_bootstrap`` compares."""
        return [_mean(r.verified for r in g) for g in by_problem(self.responses, greedy)]

    def intervals(self) -> dict[str, Interval]:
        """Every figure by its name: greedy, pass@k, lengths and truncated shares."""
        return {
            "greedy": self.greedy,
            **{f"pass@{k}": interval for k, interval in self.pass_at.items()},
            "greedy_length": self.greedy_length,
            "mean_length": self.mean_length,
            "greedy_truncated": self.greedy_truncated,
            "truncated": self.truncated,
        }

    def record(self) -> dict[str, Any]:
        """Everything but the responses, as plain values for a JSON file."""
        return {
            "problems": self.problems,
            "rows": self.rows,
            "samples": self.samples,
            "figures": {name: asdict(interval) for name, interval in self.intervals().items()},
        }


def first_rows(prompts: Iterable[Prompt]) -> dict[int, int]:
    """The first row with the same prompt, of every row that repeats one."""
    first: dict[Ids, int] = {}
    found = {p.index: first.setdefault(p.student, p.index) for p in prompts}
    return {row: before for row, before in found.items() if row != before}


def summarise(responses: Sequence[Response], *, seed: int = 0) -> Evaluation:
    """Figures and intervals of verified responses, ordered by problem.

    Every row has one greedy response and the same number of samples. For the intervals of
    lengths a response to another problem is at most as long as the longest here. Raises TOPDError
    where a row has others.
    """
    once = Counter(r.problem for r in responses if r.sample is None)
    counts = Counter(r.problem for r in responses if r.sample is not None)
    if once != Counter([*counts]) or len({*counts.values()}) != 1:
        raise TOPDError(
            "summarise: each problem needs one greedy response, and as many samples as the others "
            "(at least one). Give all responses of an evaluation."
        )
    greedy, drawn = by_problem(responses, True), by_problem(responses, False)
    samples = next(iter(counts.values()))
    right = [_right_by_row(group) for group in drawn]
    longest = float(max(len(response.ids) for response in responses))
    share = partial(bootstrap, seed=seed)
    length = partial(share, bounds=(0.0, longest))
    return Evaluation(
        problems=len(drawn),
        samples=samples,
        greedy=share([_mean(r.verified for r in group) for group in greedy]),
        pass_at={
            k: share([_mean(pass_at_k(samples, c, k) for c in counts) for counts in right])
            for k in _ks(samples)
        },
        greedy_length=length([_mean(len(r.ids) for r in group) for group in greedy]),
        mean_length=length([_mean(len(r.ids) for r in group) for group in drawn]),
        greedy_truncated=share([_mean(not r.finished for r in group) for group in greedy]),
        truncated=share([_mean(not r.finished for r in group) for group in drawn]),
        responses=tuple(responses),
    )


@dataclass(frozen=True)
class Evaluator:
    """Answers every problem once greedily and ``samples`` times at ``sampling``, and verifies.

    A sample depends on the seed, the row's number and its own number alone: not on batches, on
    the other problems, or on how many samples there are. Two models evaluated with one seed are
    sampled with the same random numbers.

    Args:
        prompts: the problems; ``Prompt.index`` is their row.
        rows: the data, whose row a response is verified against.
        verify: whether a response text is right, True or False; after a prompt that ends in
            ``<think>`` it is given that mark too.
        tokenizer: of the model.
        samples: responses a problem, besides the greedy one.
        sampling: how they are drawn; its length limit is also that of the greedy ones.
        seed: of the samples and of the bootstrap.
        batch_size: responses written at a time.

    Raises:
        TOPDError: no problems, no samples, a sampling at temperature 0 or out of range, or a prompt
            without a row of its own.
    """

    prompts: Sequence[Prompt]
    rows: Sequence[Mapping[str, Any]]
    verify: Verify
    tokenizer: PreTrainedTokenizerBase
    samples: int = 4
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not all(isinstance(prompt, Prompt) for prompt in self.prompts):
            raise TOPDError("prompts: give token ids, as trainer.encoder.encode(rows) makes them.")
        least = min(len(self.prompts), self.samples, self.batch_size)
        if least < 1 or self.sampling.temperature <= 0:
            raise TOPDError(
                "evaluate: needs prompts, at least one sample and a batch size of 1, and a "
                "sampling temperature above 0 (greedy responses are always written too)."
            )
        if not self._have_rows():
            raise TOPDError(
                "rows: a prompt is verified against the row of its index, and here a prompt has "
                "none, or two have the same one. Give as prompts what trainer.encoder.encode(rows) "
                "makes of these rows, once, and rows as a list of mappings."
            )
        if hasattr(self.rows, "features"):  # a data set, whose class labels are numbers
            object.__setattr__(self, "rows", [*unformatted(self.rows)])
        given = self.sampling
        if not (
            given.temperature < math.inf
            and 0 < given.top_p <= 1
            and given.top_k >= 0
            and given.max_new_tokens >= 1
        ):
            raise TOPDError(
                f"sampling: {given} is out of range. temperature must be finite, top_p in (0, 1], "
                "top_k at least 0 and max_new_tokens at least 1."
            )

    def _have_rows(self) -> bool:
        """Whether every prompt has a row of its own."""
        places = [prompt.index for prompt in self.prompts]
        try:
            there = all(isinstance(self.rows[place], Mapping) for place in places)
        except (LookupError, TypeError):
            return False
        return there and min(places) >= 0 and len({*places}) == len(places)

    def __call__(
        self,
        engine: Engine,
        *,
        tick: Tick = no_tick,
        done: Iterable[Response] = (),
        keep: Keep = lambda _: None,
    ) -> Evaluation:
        """Evaluate.

        Args:
            engine: the model.
            tick: called once for every response.
            done: responses of the same evaluation that was stopped; they are not written again.
            keep: is given every new batch of responses.
        """
        kept = {(response.problem, response.sample): response for response in done}
        greedy = replace(self.sampling, temperature=0.0, top_p=1.0, top_k=0)
        responses = []
        for numbers, sampling in (((None,), greedy), (range(self.samples), self.sampling)):
            asked = [(prompt, i) for prompt in self.prompts for i in numbers]
            known = [kept[p.index, i] for p, i in asked if (p.index, i) in kept]
            responses += known
            for _ in known:
                tick()
            new = [(p, i) for p, i in asked if (p.index, i) not in kept]
            for batch in self._batches(new):
                written = self._answer(engine, batch, sampling)
                responses += written
                for _ in written:
                    tick()
                keep(written)
        place = {prompt.index: i for i, prompt in enumerate(self.prompts)}
        responses.sort(key=lambda r: (place[r.problem], -1 if r.sample is None else r.sample))
        first = first_rows(self.prompts)
        repeats = [replace(r, repeats=first.get(r.problem)) for r in responses]
        return summarise(repeats, seed=self.seed)

    @property
    def count(self) -> int:
        """Responses in all: ticks of one evaluation."""
        return len(self.prompts) * (1 + self.samples)

    def decode(self, ids: Ids) -> str:
        """Token ids as text, without special tokens but the marks of what is thought."""
        return text_of(self.tokenizer, ids)

    def _batches(self, asked: Sequence[Asked]) -> Iterator[Sequence[Asked]]:
        """Longest prompts first: little padding, and what does not fit the memory fails at once."""
        ordered = sorted(asked, key=lambda pair: -len(pair[0].student))
        for first in range(0, len(ordered), self.batch_size):
            yield ordered[first : first + self.batch_size]

    def _answer(self, engine: Engine, batch: Sequence[Asked], sampling: Sampling) -> list[Response]:
        prompts = [prompt.student for prompt, _ in batch]
        first = Stream.EVALUATION_SAMPLES
        seeds = [seed_of(self.seed, first + (i or 0), p.index) for p, i in batch]
        written = engine.generate(prompts, sampling, seeds)
        return [self._verified(*pair, made) for pair, made in zip(batch, written, strict=True)]

    def _verified(self, prompt: Prompt, sample: int | None, written: Generation) -> Response:
        text, row = self.decode(written.tokens), prompt.index
        opened = opened_thought(prompt.student, self.decode)
        right = self.verify(opened + text, self.rows[row])
        if right not in (True, False):  # a reward of -1 would count as right
            raise TOPDError(
                f"verify: returned {right!r:.80}. Return True or False, e.g. reward > 0."
            )
        logprob = sum(written.logprobs)
        return Response(row, sample, written.tokens, text, bool(right), written.finished, logprob)


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Ids) -> str:
    """A response's text, without special tokens but the marks of what is thought.

    Without these a thought, or one that is cut off, would be read as an answer.
    """
    if MARKS.isdisjoint(tokenizer.convert_ids_to_tokens(list(ids))):
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))
    special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    kept = [token for token in ids if special.get(token, THOUGHT) in MARKS]
    return str(tokenizer.decode(kept, skip_special_tokens=False))


def opened_thought(prompt: Ids, decode: Decode) -> str:
    """``<think>`` if a prompt ends in it, as some templates have it; else nothing.

    What verifies a response needs it in front: else a thought that is cut off looks like an answer.
    """
    return THOUGHT if decode(prompt[-TAIL:]).rstrip().endswith(THOUGHT) else ""


def by_problem(responses: Sequence[Response], greedy: bool) -> list[list[Response]]:
    """The greedy responses, or the samples, in groups of one problem: of all rows that have it."""
    groups: dict[int, list[Response]] = {}
    for response in responses:
        if (response.sample is None) == greedy:
            first = response.problem if response.repeats is None else response.repeats
            groups.setdefault(first, []).append(response)
    return list(groups.values())


def _right_by_row(samples: Sequence[Response]) -> list[int]:
    counts: dict[int, int] = {}
    for response in samples:
        counts[response.problem] = counts.get(response.problem, 0) + response.verified
    return list(counts.values())


def _ks(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself."""
    return sorted({1 << i for i in range(samples.bit_length())} | {samples})


def _mean(values: Any) -> float:
    known = [float(value) for value in values]
    return sum(known) / len(known)
