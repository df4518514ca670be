"""A world whose forks are known: problems, right and wrong reasoning, and a label for every token.

A family says, for a state of the reasoning, which steps are right in all their surface forms, and
which wrong step a misled author would take. From these two lists follow the texts of a teacher and
of a student with other habits, and the label of every token of any text:

=========  ===================================================================================
forced     the only token from which a right derivation can still be completed
surface    one of several such tokens: another connective, order of terms, equivalent form
fork       the first token after which no right derivation is left
derailed   whatever follows a fork
=========  ===================================================================================
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Label = Literal["forced", "surface", "fork", "derailed"]
State = Hashable

END = "</s>"


@dataclass(frozen=True)
class Step:
    """A few words of reasoning and the state that their author then believes in (None: the end).

    ``form`` numbers the synonym taken at each free choice; habits are weights of those numbers.
    ``weight`` is what every author thinks of the step beside that. A ``slip`` can be put right
    later, so it is no mistake; a model that is made from a text does not learn to write it.
    """

    words: tuple[str, ...]
    after: State | None
    form: tuple[int, ...] = ()
    weight: float = 1.0
    slip: bool = False


@dataclass(frozen=True)
class Author:
    """Who writes: how often he takes each synonym, how often he falls into a known mistake, and
    how often he slips where a slip is possible."""

    habit: tuple[float, float, float]
    mistakes: float = 0.0
    slips: float = 0.0

    def weight(self, step: Step) -> float:
        """How much he likes a step, beside others that are as right."""
        liked = step.weight * math.prod(self.habit[i] for i in step.form)
        return liked * (self.slips if step.slip else 1.0 - self.slips)


TEACHER = Author(habit=(0.94, 0.04, 0.02), mistakes=0.03, slips=0.4)
STUDENT = Author(habit=(0.1, 0.2, 0.7), mistakes=0.8)
REFERENCE = Author(habit=STUDENT.habit)  # writes solutions: no mistakes, the student's habits


class Family(Protocol):
    """A kind of problem. Texts are words with blanks between them.

    ``name`` is one word, ``vocabulary`` every word of its prompts and responses;
    ``result_is_proof``: a right result cannot be luck.
    """

    name: str
    vocabulary: tuple[str, ...]
    result_is_proof: bool

    def prompts(self, rng: random.Random, count: int) -> list[str]:
        """Different problems of mixed difficulty."""

    def start(self, prompt: str) -> State:
        """The state of the reasoning before the first word."""

    def steps(self, state: State) -> Sequence[Step]:
        """All right next steps."""

    def mistakes(self, state: State) -> Sequence[Step]:
        """The wrong steps that a misled author takes here; often none."""

    def check(self, prompt: str, response: str) -> bool:
        """Whether the response answers the problem, however it got there."""


def write(family: Family, prompt: str, author: Author, rng: random.Random) -> str:
    """One author's reasoning on a problem, without the end-of-sequence token."""
    return " ".join(word for step in derive(family, prompt, author, rng) for word in step.words)


def derive(family: Family, prompt: str, author: Author, rng: random.Random) -> list[Step]:
    """The steps of one author's reasoning on a problem."""
    state: State | None = family.start(prompt)
    steps: list[Step] = []
    while state is not None:
        misled = family.mistakes(state) if rng.random() < author.mistakes else ()
        options = misled or family.steps(state)
        steps += rng.choices(options, [author.weight(step) for step in options])
        state = steps[-1].after
    return steps


def labels(family: Family, prompt: str, response: Sequence[str]) -> list[Label]:
    """Label every word of a response; the end of the sequence is the word ``</s>``.

    Where a right result proves the reasoning (a program that runs), a response with one has no
    fork: what leaves the listed forms is then another equivalent form.
    """
    found: list[Label] = []
    places = _places(family, family.start(prompt))
    for word in response:
        allowed = {step.words[i] if step else END for step, i in places}
        if word not in allowed:
            found.append("fork")
            break
        found.append("surface" if len(allowed) > 1 else "forced")
        places = _advance(family, places, word)
    text = " ".join(word for word in response if word != END)
    if found[-1:] == ["fork"] and family.result_is_proof and family.check(prompt, text):
        found[-1] = "surface"
        return found + ["surface"] * (len(response) - len(found))
    return found + ["derailed"] * (len(response) - len(found))


# a step under way and the number of its words so far; None: the end
Place = tuple[Step | None, int]


def _places(family: Family, state: State | None) -> set[Place]:
    return {(None, 0)} if state is None else {(step, 0) for step in family.steps(state)}


def _advance(family: Family, places: set[Place], word: str) -> set[Place]:
    after: set[Place] = set()
    for step, i in places:
        if step is None or step.words[i] != word:
            continue
        after |= {(step, i + 1)} if i + 1 < len(step.words) else _places(family, step.after)
    return after
