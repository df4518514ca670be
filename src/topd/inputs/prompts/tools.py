"""Environments: what answers a student between its turns, and how the answer is written.

    environment(row, turns: Sequence[str]) -> str | None

``row`` is the row of the data, ``turns`` are the student's so far, as text without the tokens that
end them; None: the conversation is over. A call is text, ``<calc>3 * (4 + 5)</calc>``: every
tokenizer can write it and every model can learn it, where the call formats of chat templates differ
by family and have no common parser. One of your own needs no row here: ``environment:
my_module:function``.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from topd.errors import TOPDError
from topd.inputs.border import decoded, special_search
from topd.inputs.prompt_rows import Row
from topd.inputs.prompts.chat import rendered
from topd.inputs.prompts.ends import common_end
from topd.named import row_named
from topd.testbed import SCHEME, verify
from topd.types import Ids

Columns: TypeAlias = Mapping[str, Any]
Environment: TypeAlias = Callable[[Columns, Sequence[str]], str | None]

CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
LONGEST = 200  # characters of an expression
LARGEST = 10.0**15  # of any value on the way: below it, whole numbers are exact
OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def calculator(row: Columns, turns: Sequence[str]) -> str | None:
    """The value of the last ``<calc>...</calc>`` of the last turn; None where there is no call.

    >>> calculator({}, ["That is <calc>3 * (4 + 5)</calc>"]), calculator({}, ["27."])
    ('27', None)
    """
    calls = CALL.findall(turns[-1])
    return calculated(calls[-1]) if calls else None


def calculated(expression: str) -> str:
    """The value of an expression of numbers, + - * / // % ** and brackets, or "error".

    Nothing is executed: the syntax tree is walked, and no value on the way may pass ``LARGEST``.
    What is not whole has 10 digits.

    >>> calculated("2 ** 10 - 24"), calculated("7 / 2"), calculated("1 / 0"), calculated("open()")
    ('1000', '3.5', 'error', 'error')
    """
    try:
        if len(expression) > LONGEST:
            raise ValueError("too long")
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (ValueError, SyntaxError, ArithmeticError, TypeError, RecursionError, MemoryError):
        return "error"
    return str(value) if isinstance(value, int) else f"{value:.{10 if value % 1 else 16}g}"


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value: Any = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > 64:
            raise ValueError("too large")
        value = OPERATORS[type(node.op)](left, right)
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_value(node.operand))
    else:
        raise ValueError("not arithmetic")
    if isinstance(value, complex) or not abs(value) <= LARGEST:  # NaN too
        raise ValueError("too large")
    return value


def second_try(
    right: Callable[[str, Columns], bool], row: Columns, turns: Sequence[str]
) -> str | None:
    """The testbed's evaluator: the problem once more where the last answer is not right."""
    return None if right(turns[-1], row) else str(row["prompt"])


ENVIRONMENTS: dict[str, Environment] = {"calculator": calculator}


def environment_named(name: str) -> Environment:
    """By its name in ``ENVIRONMENTS``, ``testbed://FAMILY``, or ``module:function``.

    Raises TOPDError if there is none.
    """
    if name.startswith(SCHEME):
        return partial(second_try, verify(name))
    return row_named("environment", name, ENVIRONMENTS, lambda function: function)


ANSWER, PROBE = "Done.", "a reply of the environment"
TALK = Row(0, [{"role": "user", "content": "Please."}], None, {})
ROLES = ("tool", "user")  # the first that the chat template writes


@dataclass(frozen=True)
class Replies:
    """Writes an environment's replies as the tokens between two turns of the student.

    In a conversation they are what the chat template writes after the end of the assistant's
    message: the reply as a message of its own, and the beginning of the next one. After a prompt
    that is plain text they are the reply's tokens. What the student wrote stays as it is.
    """

    tokenizer: PreTrainedTokenizerBase  # the student's
    ends: frozenset[int]  # tokens that end a turn
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # before a row's own

    def check(self, rows: Iterable[Row]) -> None:
        """Refuse a chat template that writes no reply in these conversations. Raises TOPDError."""
        kinds = {repr((row.template_kwargs, _roles(row))): row for row in rows}
        for row in kinds.values():
            if not self._writes(self.role, row):
                raise self._fault(f"data row {row.index}: ")

    def text(self, turn: Ids) -> str:
        """A turn of the student's without its end; a call may begin with a special token."""
        return decoded(self.tokenizer, turn[:-1] if {*turn[-1:]} & self.ends else turn)

    def ids(self, text: str, row: Row, end: int | None = None) -> Ids:
        """The tokens of a reply to a row's student. Raises TOPDError if the template fails.

        ``end`` is the token that its turn ends with. Where the template has none, and the beginning
        of the next message ends a turn (GLM's), that is part of the reply if it is another token.
        """
        if isinstance(row.prompt, str):
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._after(self.role, text, row, None if self._ends_turns else end)

    @cached_property
    def mark(self) -> Callable[[str], re.Match[str] | None]:
        """Finds the name of a special token in a reply, which is read as that token."""
        return special_search(self.tokenizer)

    def sample(self, tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
        """A reply to this student as another tokenizer's template writes it; "" if it does not."""
        with suppress(TOPDError):
            other = replace(self, tokenizer=tokenizer)
            return decoded(tokenizer, other._after(self.role, PROBE, row))
        return ""

    @cached_property
    def role(self) -> str:
        """Whose messages replies are, whatever they say. Raises TOPDError if nobody's."""
        for role in ROLES:
            with suppress(TOPDError):  # a template may know no tools
                if self._writes(role, TALK):
                    return role
        raise self._fault()

    @cached_property
    def _ends_turns(self) -> bool:
        """Whether the template ends an assistant's message, with or without another after it."""
        talks = (
            [*TALK.prompt, {"role": "assistant", "content": text}]
            for text in (ANSWER, f"{ANSWER} {ANSWER}")
        )
        with suppress(TOPDError):  # it may want more of a last message
            one, other = (
                rendered(0, self.tokenizer, t, self.template_kwargs, tokenize=True, asks=False)
                for t in talks
            )
            return not self.ends.isdisjoint(common_end(one, other))
        return True

    def _fault(self, place: str = "") -> TOPDError:
        ends = self.tokenizer.convert_ids_to_tokens(sorted(self.ends))
        return TOPDError(
            f"environment: {place}{self.tokenizer.name_or_path or 'the tokenizer'}: its chat "
            "template writes no message of a tool or a user after the assistant's and its end, "
            f"{' or '.join(map(repr, ends))}. Choose another chat_template, or give prompts as "
            "strings (data.chat: false)."
        )

    def _writes(self, role: str, row: Row) -> bool:
        """Whether what the template writes for a reply depends on the reply."""
        one, other = (self._after(role, text, row) for text in (PROBE, f"{PROBE} {PROBE}"))
        return one != other

    def _after(self, role: str, text: str, row: Row, own: int | None = None) -> Ids:
        """What is written after the end of the assistant's message; empty if that has no end.

        With that end, if the message has another of its ``own``.

        What follows a message is where the conversation is the same with a longer one: the empty
        reasoning that some templates put before a last message is not looked at. It may depend on
        what is asked: a system message turns reasoning off in SmolLM3's.
        """
        kwargs = {**self.template_kwargs, **row.template_kwargs}

        def written(answer: str) -> Ids:
            said = zip(("assistant", role), (answer, text), strict=True)
            messages = [*row.prompt, *({"role": who, "content": content} for who, content in said)]
            return rendered(row.index, self.tokenizer, messages, kwargs, tokenize=True)

        short, long = written(ANSWER), written(f"{ANSWER} {ANSWER}")
        tail = common_end(short, long) if short != long else ()
        end = next((i for i, token in enumerate(tail) if token in self.ends), len(tail))
        return tail[end if own not in (None, *tail[end : end + 1]) else end + 1 :]


def _roles(row: Row) -> list[str]:
    return [message["role"] for message in row.prompt if not isinstance(message, str)]
