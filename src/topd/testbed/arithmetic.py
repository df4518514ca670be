"""Expressions on a clock of ten hours: say the order of the operations, then carry them out.

::

    3 + 4 * 2 - 5 =      plan * + - ; so 4 * 2 = 8 : 3 + 8 - 5 ; so 3 + 8 = 1 : 1 - 5 ; ...

Surface: connectives, the words for "equals" and "answer", commuting operands, any order that the
rules allow. Forks: the plan that ignores precedence (all later steps follow it), a slip in the
product of two large digits, and a difference below zero taken without its sign.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from topd.testbed.world import State, Step

SO, EQUALS, ANSWER = ("so", "then", "next"), ("=", "is", "gives"), ("answer", "result", "total")
OPERATORS = "+-*"
LENGTHS = (2, 3, 4)  # operators of a problem
LARGE = 6

Terms = tuple[str, ...]  # digits and operators in turn


@dataclass(frozen=True)
class Reasoning:
    """What is left of the expression, and the order of its operators; None before it is said."""

    terms: Terms
    order: tuple[int, ...] | None = None


class Arithmetic:
    """The family."""

    name = "arithmetic"
    result_is_proof = False
    vocabulary = (*map(str, range(10)), *OPERATORS, "plan", ";", ":", ".", *SO, *EQUALS, *ANSWER)

    def prompts(self, rng: random.Random, count: int) -> list[str]:
        """Different expressions."""
        found: dict[str, None] = {}
        while len(found) < count:
            words = [str(rng.randrange(10))]
            for _ in range(rng.choice(LENGTHS)):
                words += [rng.choice(OPERATORS), str(rng.randrange(10))]
            found[" ".join([*words, "="])] = None
        return list(found)

    def start(self, prompt: str) -> State:
        """The whole expression, no order yet."""
        return Reasoning(tuple(prompt.split()[:-1]))

    def steps(self, state: State) -> Sequence[Step]:
        """The plan first, then the operation that is next by the plan."""
        assert isinstance(state, Reasoning)
        return _plans(state.terms) if state.order is None else _operations(state, value=None)

    def mistakes(self, state: State) -> Sequence[Step]:
        """From left to right whatever the operators are; slips in products and differences."""
        assert isinstance(state, Reasoning)
        if state.order is None:
            naive = (0,) * (len(state.terms) // 2)  # the first of what is left, always
            return () if naive in _orders(state.terms) else (_plan(state.terms, naive, 0),)
        a, operator, b = _operands(state)
        if operator == "*" and min(int(a), int(b)) >= LARGE:
            return _operations(state, value=(int(a) * int(b) + 1) % 10)
        if operator == "-" and int(a) < int(b) != int(a) + 5:
            return _operations(state, value=int(b) - int(a))
        return ()

    def check(self, prompt: str, response: str) -> bool:
        """Whether the last word is the value, after a word for "answer"."""
        words = response.split()
        return len(words) > 1 and words[-2] in ANSWER and words[-1] == value(prompt)


def value(prompt: str) -> str:
    """The value of a prompt's expression, by the usual precedence, modulo ten.

    >>> value("3 + 4 * 2 - 5 =")
    '6'
    """
    terms: Terms = tuple(prompt.split()[:-1])
    while len(terms) > 1:
        k = next(i for i in range(len(terms) // 2) if _allowed(terms, i))
        terms = _reduced(terms, k, _apply(*terms[2 * k : 2 * k + 3]))
    return terms[0]


def _allowed(terms: Terms, k: int) -> bool:
    """Whether operator ``k`` may be carried out before the others."""
    operators = ("", *terms[1::2], "")
    before, own, after = operators[k : k + 3]
    return own == "*" or (before not in ("-", "*") and after != "*")


@lru_cache(maxsize=100_000)
def _orders(terms: Terms) -> tuple[tuple[int, ...], ...]:
    """All orders of the operators that respect the rules; entries count what is still there."""
    if len(terms) == 1:
        return ((),)
    found: list[tuple[int, ...]] = []
    for k in range(len(terms) // 2):
        if _allowed(terms, k):
            found += [(k, *rest) for rest in _orders(_reduced(terms, k, "0"))]
    return tuple(found)


@lru_cache(maxsize=10_000)
def _plans(terms: Terms) -> tuple[Step, ...]:
    orders = sorted(_orders(terms), key=lambda order: _operators(terms, order) != _usual(terms))
    return tuple(_plan(terms, order, min(rank, 2)) for rank, order in enumerate(orders))


def _usual(terms: Terms) -> tuple[str, ...]:
    """Products first, then from left to right."""
    return tuple(sorted(terms[1::2], key=lambda operator: operator != "*"))


def _plan(terms: Terms, order: tuple[int, ...], rank: int) -> Step:
    words = ("plan", *_operators(terms, order), ";")
    return Step(words, Reasoning(terms, order), (rank,))


def _operators(terms: Terms, order: Sequence[int]) -> tuple[str, ...]:
    left = list(terms[1::2])
    return tuple(left.pop(k) for k in order)


def _operands(state: Reasoning) -> Terms:
    assert state.order is not None
    k = state.order[0] if state.order else 0
    return state.terms[2 * k : 2 * k + 3]


def _operations(state: Reasoning, value: int | None) -> tuple[Step, ...]:
    """The next operation in all its forms; with ``value`` instead of the right result."""
    assert state.order
    a, operator, b = _operands(state)
    result = _apply(a, operator, b) if value is None else str(value)
    terms = _reduced(state.terms, state.order[0], result)
    written = [(a, operator, b)]
    if operator in "+*" and a != b:
        written.append((b, operator, a))
    steps = []
    for so, equals, order in itertools.product(range(3), range(3), range(len(written))):
        words = (SO[so], *written[order], EQUALS[equals], result)
        if len(terms) > 1:
            after = Reasoning(terms, state.order[1:])
            steps.append(Step((*words, ":", *terms, ";"), after, (so, equals, order)))
        else:
            steps += [
                Step((*words, ".", word, result), None, (so, equals, order, i))
                for i, word in enumerate(ANSWER)
            ]
    return tuple(steps)


def _apply(a: str, operator: str, b: str) -> str:
    x, y = int(a), int(b)
    return str({"+": x + y, "-": x - y, "*": x * y}[operator] % 10)


def _reduced(terms: Terms, k: int, result: str) -> Terms:
    return (*terms[: 2 * k], result, *terms[2 * k + 3 :])
