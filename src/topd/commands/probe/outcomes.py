"""Verified forks: does the answer become right when the teacher takes over here?

    gain = V_T(y_<t) - V_S(y_<t)        the teacher takes over before token t, the student resumes
    drop = V_T(y_<t) - V_T(y_<=t)       the teacher takes over before token t, and after it

V(prefix) is the share of right answers among a model's continuations of a prefix to the end. The
gain says whether there is something to learn from here on; only the drop says that this very token
spoils the answer, so it is the verdict. Both cost whole answers: for checks by hand, not training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from topd.engines import Engine
from topd.errors import TOPDError
from topd.evaluate.answers import AnswerVerifier
from topd.inputs.rows import DataSpec
from topd.seeds import Stream, seed_of
from topd.testbed import SCHEME
from topd.testbed import verify as testbed_verifier
from topd.training.experience import Observer
from topd.types import Ids, Prompt, Rollout, Starts

Right: TypeAlias = Callable[[Prompt, Ids], bool]
Check: TypeAlias = Callable[[int, str], bool]  # row of the data, response
AT_ONCE = 64  # continuations
HALF = 0.5  # of the teacher's answers: with one greedy answer, that one


@dataclass(frozen=True)
class Outcome:
    """Shares of right answers at one token: the teacher takes over ``before`` or ``after`` it, or
    the student resumes ``alone`` from before it."""

    before: float
    after: float
    alone: float

    @property
    def gain(self) -> float:
        """What taking over here brings, in [-1, 1]."""
        return self.before - self.alone

    @property
    def drop(self) -> float:
        """What the token spoils, in [-1, 1]."""
        return self.before - self.after

    @property
    def verified(self) -> bool:
        """Whether the token is a fork: with it at least half of the answers turn wrong."""
        return self.drop >= HALF


@dataclass(frozen=True)
class Verified:
    """The outcomes of some starts, in order, and the tokens that teacher and student wrote."""

    outcomes: tuple[Outcome, ...]
    tokens: dict[str, int]


def verify_forks(
    observer: Observer,
    rollouts: Sequence[Rollout],
    starts: Starts,
    right: Right,
    *,
    samples: int = 1,
    number: int = 0,
) -> Verified:
    """Let both models write to the end from (row, token) pairs and check the answers.

    A response has ``max_completion_length`` tokens at most, however it was continued. One
    continuation is greedy; several ``samples`` are drawn at the student's temperature. A prefix
    that is needed twice is written once. The ``number`` of the first rollout fixes what is drawn,
    with the configuration's seed.
    """
    after = [(row, t + 1) for row, t in starts]
    asked = _Asked(observer, rollouts, right, samples, number)
    with observer.phases.phase("verifying"):
        teacher, theirs = asked.values(observer.teacher, sorted({*starts, *after}))
        student, own = asked.values(observer.student, sorted({*starts}))
    pairs = zip(starts, after, strict=True)
    found = tuple(Outcome(teacher[s], teacher[a], student[s]) for s, a in pairs)
    return Verified(found, {"teacher": theirs, "student": own})


@dataclass(frozen=True)
class _Asked:
    """The arguments of :func:`verify_forks`, to have V of prefixes for one model after another."""

    observer: Observer
    rollouts: Sequence[Rollout]
    right: Right
    samples: int
    number: int

    def values(self, engine: Engine, places: Starts) -> tuple[dict[tuple[int, int], float], int]:
        """V by place, (row, tokens of the response that are kept), and tokens written."""
        limit, hits, asked = self.observer.args.max_completion_length, {}, []
        for row, t in places:
            prefix = self.rollouts[row].response[:t]
            if engine.ends(prefix) or t >= limit:  # nothing is left to write
                hits[row, t] = self.samples * self.right(self.rollouts[row].prompt, prefix)
            else:
                hits[row, t] = 0
                asked += [(row, t, k) for k in range(self.samples)]
        asked.sort(key=lambda one: -one[1])  # of about one length together
        spent = 0
        for first in range(0, len(asked), AT_ONCE):
            some = asked[first : first + AT_ONCE]
            for (row, t, _), more in zip(some, self._written(engine, some), strict=True):
                rollout = self.rollouts[row]
                spent += len(more)
                whole = rollout.response[:t] + more[: limit - t]
                hits[row, t] += self.right(rollout.prompt, whole)
        return {place: count / self.samples for place, count in hits.items()}, spent

    def _written(self, engine: Engine, some: Sequence[tuple[int, int, int]]) -> list[Ids]:
        """What a model writes after each (row, tokens kept, number of the continuation)."""
        args, teacher = self.observer.args, engine is self.observer.teacher
        heads = [
            (r.prompt.teacher if teacher else r.prompt.student) + r.response[:t]
            for r, t in ((self.rollouts[row], t) for row, t, _ in some)
        ]
        room = max(args.max_completion_length - t for _, t, _ in some)
        sampling = replace(args.sampling, max_new_tokens=room)
        if self.samples == 1:
            sampling = replace(sampling, temperature=0.0)
        seeds = [_seed(args.seed, self.number + row, t, k) for row, t, k in some]
        return [more.tokens for more in engine.generate(heads, sampling, seeds)]


def _seed(seed: int, row: int, t: int, k: int) -> int:
    """Of continuation ``k`` from token ``t``: the same for both models."""
    return seed_of(seed_of(seed, Stream.OUTCOMES, row), t, k)


def checker_of(data: DataSpec) -> Check:
    """What checks an answer to a row of the data. Raises TOPDError if a row has no reference."""
    rows = data.load()
    if data.path and data.path.startswith(SCHEME):
        verify = testbed_verifier(data.path)
    else:
        column = next((name for name in ("answer", "solution") if name in rows[0]), None)
        if column is None:
            raise TOPDError(
                "verify: the data have no answer to check against. Map a column: "
                "data.columns: {answer: NAME}."
            )
        verify = AnswerVerifier(column)
        verify.check(rows)
    return lambda row, text: bool(verify(text, rows[row]))
