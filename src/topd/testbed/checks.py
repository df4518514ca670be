"""A chain of sums, the long ones done in the head and then checked: a slip can be noticed.

::

    3 : * 4 + 2 , - 5 =    so 3 * 4 + 2 = 4 ; check 4 - 2 = 2 : 3 * 4 = 2 ok ; so 4 - 5 = 9 ; ...
                           so 3 * 4 + 2 = 9 ; check 9 - 2 = 7 : 3 * 4 = 2 no ; redo 2 + 2 = 4 ; ...

Numbers are on a clock of ten hours. Surface: connectives, the words for "equals", "check", "ok" and
"answer", and the value from the head, right or wrong: its check can still put it right. Fork: a
check that says what it should instead of what it is, or "ok" where the two values differ.

Who never slips shows no check that fails. A student that imitates him learns checks that always
pass; where it slips and he does not, only its own slips can teach it to say "no" and to continue.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from topd.testbed.world import State, Step

SO, EQUALS, ANSWER = ("so", "then", "next"), ("=", "is", "gives"), ("answer", "result", "total")
CHECK, OK = ("check", "test", "verify"), ("ok", "good", "fine")
LARGE = 6

Item = tuple[str, ...]  # operators and digits in turn: one pair on paper, two in the head


@dataclass(frozen=True)
class Reasoning:
    """The value so far, the items left, and how far the first of them is."""

    value: int
    items: tuple[Item, ...]
    said: bool = False
    guess: int | None = None  # what the head says
    redo: bool = False


class Checks:
    """The family. ``lengths`` are the numbers of items, ``hard`` the share of those in the head."""

    name = "checks"
    result_is_proof = False
    vocabulary = (
        *map(str, range(10)), *"+-*:;,=.", "is", "gives", "no", "redo", *SO, *ANSWER, *CHECK, *OK
    )  # fmt: skip

    def __init__(self, lengths: Sequence[int] = (4, 5, 6), hard: float = 0.6) -> None:
        self.lengths, self.hard = tuple(lengths), hard

    def prompts(self, rng: random.Random, count: int) -> list[str]:
        """Different chains."""
        found: dict[str, None] = {}
        while len(found) < count:
            items = [self._item(rng) for _ in range(rng.choice(self.lengths))]
            found[f"{rng.randrange(10)} : {' , '.join(items)} ="] = None
        return list(found)

    def _item(self, rng: random.Random) -> str:
        if rng.random() < self.hard:
            return f"* {rng.randrange(2, 10)} + {rng.randrange(1, 10)}"
        return f"{rng.choice('+-*')} {rng.randrange(1, 10)}"

    def start(self, prompt: str) -> State:
        """The first value and all items."""
        return Reasoning(*_read(prompt))

    def steps(self, state: State) -> Sequence[Step]:
        """A sum is said; if it is a long one, its value comes from the head and is checked."""
        assert isinstance(state, Reasoning)
        if not state.items:
            return [
                Step((".", word, str(state.value)), None, (i,)) for i, word in enumerate(ANSWER)
            ]
        if not state.said:
            return _said(state)
        if state.guess is None:
            return _guesses(state)
        return _redone(state) if state.redo else _checks(state)

    def mistakes(self, state: State) -> Sequence[Step]:
        """One too much for the product of two large digits, and a check that nods."""
        assert isinstance(state, Reasoning)
        if not state.said or state.guess is not None:
            return ()
        if min(state.value, int(state.items[0][1])) < LARGE:
            return ()
        slipped = replace(state, guess=(_after(state.value, state.items[0]) + 1) % 10)
        return [
            replace(step, words=(str(slipped.guess), *step.words))
            for step in _checks(slipped, nod=True)
        ]

    def check(self, prompt: str, response: str) -> bool:
        """Whether the last word is the value, after a word for "answer"."""
        words = response.split()
        return len(words) > 1 and words[-2] in ANSWER and words[-1] == value(prompt)


def value(prompt: str) -> str:
    """The value of a prompt's chain, from left to right, modulo ten.

    >>> value("3 : * 4 + 2 , - 5 =")
    '9'
    """
    found, items = _read(prompt)
    for item in items:
        found = _after(found, item)
    return str(found)


def _read(prompt: str) -> tuple[int, tuple[Item, ...]]:
    first, _, items = prompt.removesuffix(" =").partition(" : ")
    return int(first), tuple(tuple(item.split()) for item in items.split(" , "))


def _after(value: int, item: Item) -> int:
    for operator, digit in zip(item[::2], item[1::2], strict=True):
        value = _apply(value, operator, digit)
    return value


def _apply(value: int, operator: str, digit: str) -> int:
    x = int(digit)
    return {"+": value + x, "-": value - x, "*": value * x}[operator] % 10


def _said(state: Reasoning) -> list[Step]:
    """The first item in all its forms; a short one with its value."""
    item, rest = state.items[0], state.items[1:]
    result = _after(state.value, item)
    short = len(item) == 2
    return [
        Step(
            (so, str(state.value), *item, equals, *((str(result), ";") if short else ())),
            Reasoning(result, rest) if short else replace(state, said=True),
            (i, j),
        )
        for i, so in enumerate(SO)
        for j, equals in enumerate(EQUALS)
    ]


def _guesses(state: Reasoning) -> list[Step]:
    """The right value, or one of the nine others."""
    right = _after(state.value, state.items[0])
    return [
        Step((str(guess),), replace(state, guess=guess), weight=1 / 9, slip=True)
        if guess != right
        else Step((str(guess),), replace(state, guess=guess))
        for guess in range(10)
    ]


def _checks(state: Reasoning, nod: bool = False) -> list[Step]:
    """The check of what the head said, in all its forms; one that nods repeats what it wants."""
    item, guess = state.items[0], state.guess
    assert guess is not None
    back, product = (guess - int(item[3])) % 10, _apply(state.value, *item[:2])
    passed = nod or back == product
    return [
        Step(
            (";", check, str(guess), "-", item[3], equals, str(back), ":", str(state.value))
            + (*item[:2], equals, str(back if nod else product), verdict, ";"),
            Reasoning(guess, state.items[1:]) if passed else replace(state, redo=True),
            (i, j, k),
        )
        for i, check in enumerate(CHECK)
        for j, equals in enumerate(EQUALS)
        for k, verdict in enumerate(OK if passed else ("no",))
    ]


def _redone(state: Reasoning) -> list[Step]:
    """The sum once more, on paper, from the product that the check has found."""
    item = state.items[0]
    product, result = _apply(state.value, *item[:2]), _after(state.value, item)
    return [
        Step(
            ("redo", str(product), "+", item[3], equals, str(result), ";"),
            Reasoning(result, state.items[1:]),
            (j,),
        )
        for j, equals in enumerate(EQUALS)
    ]
