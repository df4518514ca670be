"""Short programs from a description, checked by running them in an evaluator of our own grammar.

::

    clip 5 after double after add 3 :     a = x + 3 ; b = a * 2 ; c = b if b < 5 else 5 ; return c

Surface: names of variables, commuting terms, equivalent forms (``a + a``), the word for "return".
Forks: operations in the order of reading where the description says "after" (the whole program
goes another way), a reversed difference, a flipped comparison.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from topd.testbed.world import State, Step

NAMES, RETURN = ("abcde", "pqrst", "uvwyz"), ("return", "give", "out")
SIZES = (2, 3, 4)  # operations of a problem
CONSTANTS = tuple(map(str, range(2, 8)))
INPUTS = (-7, -2, 0, 1, 3, 6, 11)
BARE, WITH_CONSTANT = ("double", "square", "negate", "twist"), ("add", "less", "from", "clip")

Operation = tuple[str, ...]  # a verb, and its constant if it has one
Forms = Callable[[Operation, str], tuple[str, ...]]


@dataclass(frozen=True)
class Reasoning:
    """Operations still to write, the variable that holds the value, and the names in use."""

    left: tuple[Operation, ...]
    current: str = "x"
    used: frozenset[str] = frozenset()
    backwards: bool = False  # read from the end: said with "after", and nothing is written yet


class Programs:
    """The family."""

    name = "programs"
    result_is_proof = True
    vocabulary = tuple(
        dict.fromkeys(
            [*"x0123456789", *"".join(NAMES), *RETURN, *BARE, *WITH_CONSTANT, "then", "after"]
            + [*":=;+-*<>", "if", "else"]
        )
    )

    def prompts(self, rng: random.Random, count: int) -> list[str]:
        """Different descriptions; half of them name the last operation first, with "after"."""
        found: dict[str, None] = {}
        while len(found) < count:
            operations = [_draw(rng) for _ in range(rng.choice(SIZES))]
            joint = rng.choice((" then ", " after "))
            found[joint.join(map(" ".join, operations)) + " :"] = None
        return list(found)

    def start(self, prompt: str) -> State:
        """All operations in the order of execution."""
        operations, after = _read(prompt)
        return Reasoning(operations, backwards=after)

    def steps(self, state: State) -> Sequence[Step]:
        """One statement for the next operation, or the return."""
        assert isinstance(state, Reasoning)
        return _statements(state, _forms) if state.left else _returns(state)

    def mistakes(self, state: State) -> Sequence[Step]:
        """The order of reading; the operands of a difference and of a comparison exchanged."""
        assert isinstance(state, Reasoning)
        if state.backwards:
            return _statements(Reasoning(state.left[::-1]), _forms)
        if state.left and state.left[0][0] in ("from", "clip"):
            return _statements(state, _wrong_forms)
        return ()

    def check(self, prompt: str, response: str) -> bool:
        """Whether the program gives what the description asks for, on seven inputs."""
        operations, _ = _read(prompt)
        return all(run(response, x) == _carry_out(operations, x) for x in INPUTS)


def run(program: str, x: int) -> int | None:
    """Run a program on an input; None if it is not of the grammar or uses an unknown name.

    ::

        program   = { name "=" value ";" } word value      word = return | give | out
        value     = term [ ("+" | "-" | "*") term ] | term "if" term ("<" | ">") term "else" term

    >>> run("a = x + 3 ; b = a * 2 ; return b", 4)
    14
    """
    *statements, last = program.split(" ; ")
    known = {"x": x}
    try:
        for statement in statements:
            name, equals, *words = statement.split()
            if equals != "=" or name not in "".join(NAMES):
                return None
            known[name] = _evaluate(words, known)
        word, name = last.split()
        return _term(name, known) if word in RETURN else None
    except (ValueError, KeyError):
        return None


def _evaluate(words: Sequence[str], known: dict[str, int]) -> int:
    if len(words) == 7:
        first, _, left, sign, right, _, second = words
        if (words[1], words[5]) != ("if", "else") or sign not in "<>":
            raise ValueError(words)
        a, b = _term(left, known), _term(right, known)
        return _term(first if (a < b if sign == "<" else a > b) else second, known)
    left, sign, right = words
    a, b = _term(left, known), _term(right, known)
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def _term(word: str, known: dict[str, int]) -> int:
    return int(word) if len(word) == 1 and word in "0123456789" else known[word]


def _draw(rng: random.Random) -> Operation:
    verb = rng.choice(BARE + WITH_CONSTANT)
    return (verb,) if verb in BARE else (verb, rng.choice(CONSTANTS))


def _read(prompt: str) -> tuple[tuple[Operation, ...], bool]:
    """The operations in the order of execution, and whether that is not the order of reading."""
    text = prompt.removesuffix(" :")
    after = " after " in text
    parts = [tuple(part.split()) for part in text.split(" after " if after else " then ")]
    return tuple(parts[::-1] if after else parts), after


def _carry_out(operations: Sequence[Operation], x: int) -> int:
    for verb, *constant in operations:
        k = int(constant[0]) if constant else 0
        x = {
            "double": 2 * x,
            "square": x * x,
            "negate": -x,
            "twist": 1 - x,
            "add": x + k,
            "less": x - k,
            "from": k - x,
            "clip": min(x, k),
        }[verb]
    return x


def _forms(operation: Operation, a: str) -> tuple[str, ...]:
    """The right values of an operation on variable ``a``, equivalent to each other."""
    verb, k = operation[0], operation[-1]
    return {
        "double": (f"{a} * 2", f"2 * {a}", f"{a} + {a}"),
        "square": (f"{a} * {a}",),
        "negate": (f"0 - {a}",),
        "twist": (f"1 - {a}",),
        "add": (f"{a} + {k}", f"{k} + {a}"),
        "less": (f"{a} - {k}",),
        "from": (f"{k} - {a}",),
        "clip": (f"{a} if {a} < {k} else {k}", f"{k} if {a} > {k} else {a}"),
    }[verb]


def _wrong_forms(operation: Operation, a: str) -> tuple[str, ...]:
    verb, k = operation
    return (f"{a} - {k}",) if verb == "from" else (f"{a} if {a} > {k} else {k}",)


def _statements(state: Reasoning, forms: Forms) -> tuple[Step, ...]:
    operation, *left = state.left
    values = forms(operation, state.current)
    steps = []
    for style, (i, text) in itertools.product(range(3), enumerate(values)):
        name = next(name for name in NAMES[style] if name not in state.used)
        after = Reasoning(tuple(left), name, state.used | {name})
        steps.append(Step((name, "=", *text.split(), ";"), after, (style, i)))
    return tuple(steps)


def _returns(state: Reasoning) -> tuple[Step, ...]:
    return tuple(Step((word, state.current), None, (i,)) for i, word in enumerate(RETURN))
