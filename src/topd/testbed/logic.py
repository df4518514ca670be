"""Knights, who tell the truth, and knaves, who lie: a search with checks.

::

    A : B K and C N ; B : not A K ; C : A N ?     try K K K : A says T and F = F no ; try N K ...

The puzzles are those of the package's ``knights_knaves`` task with three people, in few words:
``B K`` says that B is a knight, ``B N`` that he is a knave. Surface: which case is tried next, and
the words for "says", "try" and "so". Forks: a case accepted after the first of its
checks, an implication taken to be false where its condition is, an inclusive "or" taken to be
exclusive.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from topd.errors import TOPDError
from topd.testbed.world import Author, State, Step, write

TRY, SAYS, SO = ("try", "suppose", "let"), ("says", "claims", "states"), ("so", "thus", "hence")
LONGEST = 90
OUT_OF_TURN = 0.005  # against 1 for the case that is next
PEOPLE, KNIGHT, KNAVE = "ABC", "K", "N"
CONNECTIVES = {"and": "and", "or": "or", "->": "->", "<=>": "<->"}

Case = tuple[str, ...]  # a role for each of the people
CASES: tuple[Case, ...] = tuple(itertools.product((KNIGHT, KNAVE), repeat=len(PEOPLE)))
Statement = tuple[str, ...]  # words


@dataclass(frozen=True)
class Reasoning:
    """The statements, the cases already refuted, the one under trial and who is checked next."""

    statements: tuple[Statement, ...]
    refuted: frozenset[Case] = frozenset()
    case: Case | None = None
    person: int = 0


class Logic:
    """The family."""

    name = "logic"
    result_is_proof = False
    vocabulary = tuple(
        dict.fromkeys(
            [*PEOPLE, KNIGHT, KNAVE, "T", "F", "not", *CONNECTIVES.values(), "ok", "no", ":", ";"]
            + ["?", "=", *TRY, *SAYS, *SO]
        )
    )

    def prompts(self, rng: random.Random, count: int) -> list[str]:
        """Different puzzles with one solution each, found within ``LONGEST`` words."""
        found: dict[str, None] = {}
        while len(found) < count:
            puzzles = _puzzles(rng.randrange(1 << 30), 500)
            found.update({prompt: None for prompt in puzzles if _is_short(self, prompt)})
        return list(found)[:count]

    def start(self, prompt: str) -> State:
        """The statements, nothing tried."""
        return Reasoning(_statements(prompt))

    def steps(self, state: State) -> Sequence[Step]:
        """Try a case, check a statement under it, or conclude."""
        assert isinstance(state, Reasoning)
        if state.case is None:
            return _trials(state)
        if state.person == len(PEOPLE):
            return _conclusions(state.case)
        return _checks(state, _truth(state.statements[state.person], state.case))

    def mistakes(self, state: State) -> Sequence[Step]:
        """A case accepted too early; a wrong truth value of an implication or a disjunction."""
        assert isinstance(state, Reasoning)
        if state.case is None or state.person == len(PEOPLE):
            return ()
        if state.person and not _fits(state.statements, state.case):
            return _conclusions(state.case)
        wrong = _mistaken_truth(state.statements[state.person], state.case)
        return () if wrong is None else _checks(state, wrong)

    def check(self, prompt: str, response: str) -> bool:
        """Whether the last words name the one case in which all statements fit their speakers."""
        words = response.split()
        case = tuple(words[-len(PEOPLE) :])
        return (
            len(words) > len(PEOPLE) and words[-1 - len(PEOPLE)] in SO and case == solution(prompt)
        )


def solution(prompt: str) -> Case:
    """The one case in which knights tell the truth and knaves lie.

    >>> solution("A : B N ; B : A K <-> B N ; C : A N and B K ?")
    ('N', 'K', 'K')
    """
    statements = _statements(prompt)
    (case,) = [case for case in CASES if _fits(statements, case)]
    return case


@lru_cache(maxsize=64)
def _puzzles(seed: int, size: int) -> tuple[str, ...]:
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise TOPDError("testbed: logic needs reasoning-gym: pip install topd[tasks].") from error
    options = {"n_people": len(PEOPLE), "depth_constraint": 2, "width_constraint": 2}
    puzzles = create_dataset("knights_knaves", size=size, seed=seed, **options)
    return tuple(_prompt(puzzle["metadata"]["statements"]) for puzzle in puzzles)


def _prompt(statements: Sequence[object]) -> str:
    said = [f"{who} : {_words(s)}" for who, s in zip(PEOPLE, statements, strict=True)]
    return " ; ".join(said) + " ?"


def _words(statement: object) -> str:
    """One of reasoning-gym's nested statements in few words."""
    assert isinstance(statement, tuple)
    kind, *parts = statement
    if kind in ("telling-truth", "lying"):
        return f"{PEOPLE[parts[0]]} {KNIGHT if kind == 'telling-truth' else KNAVE}"
    if kind == "not":
        return f"not {_words(parts[0])}"
    return f" {CONNECTIVES[kind]} ".join(map(_words, parts))


def _statements(prompt: str) -> tuple[Statement, ...]:
    return tuple(tuple(part.split()[2:]) for part in prompt.removesuffix(" ?").split(" ; "))


def _values(statement: Statement, case: Case) -> list[str]:
    """The statement with its claims replaced by their truth values under a case."""
    found: list[str] = []
    words = iter(statement)
    for word in words:
        if word in PEOPLE:
            found.append("T" if next(words) == case[PEOPLE.index(word)] else "F")
        else:
            found.append(word)
    return found


def _truth(statement: Statement, case: Case) -> bool:
    values = _values(statement, case)
    if values[0] == "not":
        return values[1] == "F"
    if len(values) == 1:
        return values[0] == "T"
    a, connective, b = values[0] == "T", values[1], values[2] == "T"
    return {"and": a and b, "or": a or b, "->": b or not a, "<->": a == b}[connective]


def _mistaken_truth(statement: Statement, case: Case) -> bool | None:
    """What the misled author takes for the truth, where it differs from it."""
    values = _values(statement, case)
    if values[1:2] == ["->"] and values[0] == "F":
        return False
    return False if values == ["T", "or", "T"] else None


def _fits(statements: Sequence[Statement], case: Case) -> bool:
    return all(
        _truth(statement, case) == (role == KNIGHT)
        for statement, role in zip(statements, case, strict=True)
    )


def _trials(state: Reasoning) -> tuple[Step, ...]:
    open_cases = [case for case in CASES if case not in state.refuted]
    if not open_cases:  # only after a mistake
        return _conclusions(CASES[0])
    return tuple(
        Step(
            (word, *case, ":"),
            Reasoning(state.statements, state.refuted, case),
            (i,),
            weight=OUT_OF_TURN if rank else 1.0,
        )
        for (i, word), (rank, case) in itertools.product(enumerate(TRY), enumerate(open_cases))
    )


def _checks(state: Reasoning, truth: bool) -> tuple[Step, ...]:
    case, person = state.case, state.person
    assert case is not None
    fits = truth == (case[person] == KNIGHT)
    values = _values(state.statements[person], case)
    if fits:
        after = Reasoning(state.statements, state.refuted, case, person + 1)
    else:
        after = Reasoning(state.statements, state.refuted | {case})
    told = ("=", "T" if truth else "F", "ok" if fits else "no", ";")
    return tuple(Step((PEOPLE[person], SAYS[i], *values, *told), after, (i,)) for i in range(3))


def _conclusions(case: Case) -> tuple[Step, ...]:
    return tuple(Step((word, *case), None, (i,)) for i, word in enumerate(SO))


def _is_short(family: Logic, prompt: str) -> bool:
    """Whether trying the cases in their usual order finds the solution within ``LONGEST`` words."""
    usual = Author(habit=(1.0, 0.0, 0.0))
    return len(write(family, prompt, usual, random.Random(0)).split()) <= LONGEST
