"""What number gives the wanted one? A guess, its proof on paper, and the way back where it fails.

::

    * 3 + 4 : 6 =    try 4 * 3 = 2 + 4 = 6 - 6 = 0 ok ; answer 4
                     try 8 * 3 = 4 + 4 = 8 - 6 = 2 no ; back 6 - 4 = 2 / 3 = 4 ; answer 4

Numbers are on a clock of ten hours, where one can divide by 3, 7 and 9. The teacher's prompt ends
with the answer, "told 4": it never guesses wrong, and its answers never show the way back. A
student that imitates it learns to guess and to nod; it is not told, so it cannot guess right.

Surface: the words for "try", "equals", "ok", "back" and "answer", and any guess, which can still be
put right. Fork: a wrong sum, or a verdict that is not true.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from topd.testbed.world import State, Step

TRY, EQUALS, OK = ("try", "say", "guess"), ("=", "is", "gives"), ("ok", "good", "fine")
BACK, ANSWER = ("back", "undo", "reverse"), ("answer", "result", "total")
TURNED = {"+": "-", "-": "+", "*": "/", "/": "*"}
ONE_OVER = {3: 7, 7: 3, 9: 9}

Sum = tuple[str, str]  # operator and digit


@dataclass(frozen=True)
class Reasoning:
    """The sums ahead, the value that the next one begins with, and what was guessed before them.

    ``sums`` are those of the prompt and ``wanted`` is what they should give; None: only they are
    done. ``back`` is the way back from it.
    """

    sums: tuple[Sum, ...]
    wanted: int | None
    ahead: tuple[Sum, ...]
    value: int | None = None
    guess: int | None = None
    said: bool = False
    back: bool = False


class Guesses:
    """The family. ``lengths`` are numbers of sums; ``given``: the number is, and not wanted."""

    name = "guesses"
    result_is_proof = False
    vocabulary = (
        *map(str, range(10)), *"+-*/:;=", "is", "gives", "no", "told", *TRY, *OK, *BACK, *ANSWER
    )  # fmt: skip

    def __init__(self, lengths: Sequence[int] = (2, 3, 4), given: bool = False) -> None:
        self.lengths, self.given = tuple(lengths), given

    def prompts(self, rng: random.Random, count: int) -> list[str]:
        """Different chains; products and shifts in turn, so that no two sums are one."""
        found: dict[str, None] = {}
        while len(found) < count:
            first, digit = rng.randrange(2), rng.randrange(10)
            chain = [_sum(rng, (first + i) % 2 == 0) for i in range(rng.choice(self.lengths))]
            text = " ".join(chain)
            found[f"{digit} {text} =" if self.given else f"{text} : {digit} ="] = None
        return list(found)

    def start(self, prompt: str) -> State:
        """Nothing is said yet."""
        sums, wanted, given = _read(prompt)
        return Reasoning(sums, wanted, sums, given, given)

    def steps(self, state: State) -> Sequence[Step]:
        """A guess, the sums from there, a verdict; if it failed, the sums back from the wanted."""
        assert isinstance(state, Reasoning)
        if state.guess is None:
            return _guesses(state) if state.said else _each(TRY, replace(state, said=True))
        if state.ahead:
            return _added(state)
        if state.back or state.wanted is None:
            return [Step((";", *step.words, str(state.value)), None, step.form) for step in _END]
        return _verdicts(state, state.wanted)

    def mistakes(self, state: State) -> Sequence[Step]:
        """None: whoever guesses wrong needs no other."""
        return ()

    def check(self, prompt: str, response: str) -> bool:
        """Whether the last word is the number, after a word for "answer"."""
        words = response.split()
        return len(words) > 1 and words[-2] in ANSWER and words[-1] == answer(prompt)


def answer(prompt: str) -> str:
    """The number from which a prompt's sums give the wanted one, modulo ten.

    >>> answer("* 3 + 4 * 7 : 2 =")
    '4'
    """
    sums, wanted, given = _read(prompt)
    return str(_after(given, sums) if wanted is None else _after(wanted, _turned(sums)))


def _read(prompt: str) -> tuple[tuple[Sum, ...], int | None, int | None]:
    """The sums, what they should give, and what they begin with; one of the last two is None."""
    text, _, wanted = prompt.removesuffix(" =").partition(" : ")
    words = text.split()
    given = int(words.pop(0)) if words[0].isdigit() else None
    sums = tuple(zip(words[::2], words[1::2], strict=True))
    return sums, int(wanted) if wanted else None, given


def _sum(rng: random.Random, product: bool) -> str:
    if product:
        return f"{rng.choice('*/')} {rng.choice(sorted(ONE_OVER))}"
    return f"{rng.choice('+-')} {rng.randrange(1, 10)}"


def _turned(sums: Sequence[Sum]) -> tuple[Sum, ...]:
    return tuple((TURNED[operator], digit) for operator, digit in reversed(sums))


def _after(value: int | None, sums: Iterable[Sum]) -> int:
    assert value is not None
    for operator, digit in sums:
        x = int(digit)
        value = {"+": value + x, "-": value - x, "*": value * x}.get(
            operator, value * ONE_OVER.get(x, 0)
        ) % 10
    return value


def _each(words: Sequence[str], after: State | None) -> list[Step]:
    return [Step((word,), after, (i,)) for i, word in enumerate(words)]


_END = _each(ANSWER, None)


def _guesses(state: Reasoning) -> list[Step]:
    """The right number, or one of the nine others; what is wanted is to be taken off at the end."""
    right = _after(state.wanted, _turned(state.sums))
    ahead = (*state.sums, ("-", str(state.wanted)))
    return [
        Step(
            (str(guess),),
            replace(state, ahead=ahead, guess=guess, value=guess),
            weight=1.0 if guess == right else 1 / 9,
            slip=guess != right,
        )
        for guess in range(10)
    ]


def _added(state: Reasoning) -> list[Step]:
    """The next sum, with its value."""
    value, rest = _after(state.value, state.ahead[:1]), state.ahead[1:]
    return [
        Step((*state.ahead[0], equals, str(value)), replace(state, ahead=rest, value=value), (i,))
        for i, equals in enumerate(EQUALS)
    ]


def _verdicts(state: Reasoning, wanted: int) -> list[Step]:
    """The answer, if nothing is left; else the way back from what was wanted."""
    if state.value == 0:
        return [
            Step((ok, ";", *end.words, str(state.guess)), None, (i, *end.form))
            for i, ok in enumerate(OK)
            for end in _END
        ]
    back = replace(state, ahead=_turned(state.sums), value=wanted, back=True)
    return [Step(("no", ";", word, str(wanted)), back, (i,)) for i, word in enumerate(BACK)]
