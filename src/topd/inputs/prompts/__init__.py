"""Rows of data -> prompts as token ids -> rollouts. Text is tokenised here, once, and never again.

A teacher may see more than the student: a Jinja template makes its user message from the columns
of the row. The response is the same token ids for both; only the prefixes differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from topd.errors import TOPDError
from topd.inputs.border import Border, tells_places
from topd.inputs.models.bare import named_faults
from topd.inputs.models.vocabulary import shared_ids
from topd.inputs.prompt_rows import Messages, Row, last_user, plain_rows, read_row, with_last_user
from topd.inputs.prompts.chat import TEMPLATE_FAULTS, check_messages, check_tools, rendered, said
from topd.inputs.prompts.ends import (
    check_one_thought,
    check_parts,
    common_end,
    ended,
    once_ended,
    text_ids,
    with_another_end,
)
from topd.inputs.prompts.many import mapped
from topd.inputs.prompts.references import Reference, columns_of, referred
from topd.inputs.prompts.remarks import LOOKED_AT, warn_of_dates, warn_of_ends, warn_of_marks
from topd.inputs.prompts.templates import BoundedSandbox, fill, known
from topd.inputs.teachers import NO_ROUTES, Routes
from topd.inputs.text_models import check_reaches
from topd.types import Generation, Ids, Prompt, Rollout

logger = logging.get_logger(__name__)

LONGEST_TOKEN = 1000  # characters; no token of a known vocabulary has as many


@dataclass(frozen=True)
class PromptEncoder:
    """Turns rows into prompts. See :meth:`encode`.

    Tokenizers come with their chat templates; their vocabulary must be the same.
    ``teacher_prompt`` is a Jinja template of the teacher's user message. It sees the row's columns,
    and ``prompt``: the text of the student's last user message.
    """

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase]  # of several each one's
    teacher_prompt: str | None = None
    max_length: int = 800  # tokens of the longest prompt of either
    drop_long: bool = False  # leave longer prompts out instead of refusing them
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # of both chat templates
    routes: Routes = NO_ROUTES  # of several teachers, which row is whose
    reference: Reference = "given"  # the answer that teacher_prompt is told: see .references
    by_text: bool = False  # the teacher learns of a response as text: its ids need not be its own
    with_rows: bool = False  # prompts keep their row, for an environment
    ends: frozenset[int] = frozenset()  # tokens that end the student's responses, if known

    def encode(
        self, rows: Iterable[Mapping[str, Any]], *, with_response: bool = False
    ) -> list[Prompt]:
        """Encode rows with a ``prompt`` (string or messages) or ``messages`` column.

        A string is tokenised as it is; messages go through the chat template, with the row's
        ``tools`` and ``chat_template_kwargs``. A final assistant turn is not part of the prompt: it
        is the reference ``solution``, unless the row has one (or a ``completion``).

        Args:
            with_response: also encode the answer as the response, for warm start: the ids that the
                template writes for the finished conversation, from the end of the prompt on.

        Returns:
            Prompts in order; ``index`` counts rows.

        Raises:
            TOPDError: a row lacks a prompt, has an empty one, one that is too long, or lacks a
                column that the teacher's template names. The message names the row.
        """
        template = self._template()
        given = plain_rows(rows)
        self._remark(given, asks=not with_response)
        told = self._told(given)

        def prompt_of(index: int) -> Prompt | None:
            return self._one(index, given[index], told[index], template, with_response)

        found = mapped(prompt_of, range(len(given)), "prompts")
        prompts = [prompt for prompt in found if prompt is not None]
        longest = [max(len(p.student), len(p.teacher)) for p in prompts]
        for prompt, length in zip(prompts, longest, strict=True):
            if length > self.max_length and not self.drop_long:
                raise TOPDError(
                    f"data row {prompt.index}: the prompt has {length} tokens, the limit is "
                    f"{self.max_length}. Raise max_prompt_length, or set drop_long_prompts: true."
                )
        kept = [p for p, n in zip(prompts, longest, strict=True) if n <= self.max_length]
        if len(kept) < len(given):
            logger.warning(
                f"data: {len(given) - len(kept)} of {len(given)} prompts are longer than "
                f"{self.max_length} tokens and left out"
            )
        if not kept:
            raise TOPDError("data: no prompt is left. Check the data and max_prompt_length.")
        return kept

    def _is_huge(self, asked: Row) -> bool:
        """Whether a prompt is too long whatever its tokens are: it is not tokenised then.

        Raises TOPDError: it is, and long prompts are not left out.
        """
        texts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        size = sum(len(t if isinstance(t, str) else str(t.get("content") or "")) for t in texts)
        if size <= LONGEST_TOKEN * self.max_length:
            return False
        if self.drop_long:
            return True
        raise TOPDError(
            f"data row {asked.index}: the prompt has {size:,} characters, more than "
            f"{self.max_length} tokens hold. Raise max_prompt_length, or set "
            "drop_long_prompts: true."
        )

    def _remark(self, rows: Sequence[Mapping[str, Any]], *, asks: bool) -> None:
        """Warnings about these rows; ``asks``: the student is to answer them."""
        warn_of_dates((self.student, *self._teachers))
        first = [read_row(index, row) for index, row in enumerate(rows[:LOOKED_AT])]
        warn_of_marks(first, self.student)
        if self.ends and first and asks and not isinstance(first[0].prompt, str):
            more = {**self.template_kwargs, **first[0].template_kwargs}
            warn_of_ends(first[0], self.student, self.ends, more)

    def _told(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """For every row what replaces its own reference in the teacher's prompt."""
        if self.reference == "given":
            return [{}] * len(rows)
        columns = columns_of(self.teacher_prompt or "", Environment())  # noqa: S701 - only parsed
        solved = [{**row, "solution": read_row(i, row).solution} for i, row in enumerate(rows)]
        return referred(solved, columns, self.reference)

    def _one(
        self,
        index: int,
        row: Mapping[str, Any],
        told: Mapping[str, Any],
        template: Template | None,
        with_response: bool,
    ) -> Prompt | None:
        """A row's prompt; None for one that is too long and left out."""
        asked = read_row(index, row)
        if self._is_huge(asked):
            return None
        prompt, more = asked.prompt, {**self.template_kwargs, **asked.template_kwargs}
        if not isinstance(prompt, str):
            self._check_read(index, more)
        check_reaches(asked, self._teachers)
        student = self._ids(index, self.student, prompt, more)
        name = self.routes.name_of(index, row) if self.routes.places else None
        if template is not None:
            text = self._fill(index, template, {**row, "solution": asked.solution, **told}, prompt)
            teacher = self._teachers_ids(index, name, with_last_user(prompt, text), more)
        else:
            teacher = self._teachers_ids(index, name, prompt, more, student)
        response = self._response(asked, student, more) if with_response else None
        return Prompt(index, student, teacher, response, name, row if self.with_rows else None)

    @property
    def _teachers(self) -> Sequence[PreTrainedTokenizerBase]:
        return self.teacher if isinstance(self.teacher, Sequence) else (self.teacher,)

    def _teachers_ids(
        self,
        index: int,
        name: str | None,
        prompt: str | Messages,
        more: Mapping[str, Any],
        student: Ids | None = None,
    ) -> Ids:
        """Of the teacher of that name, or of all; ``student``: the ids of the same prompt."""
        asked = self._teachers if name is None else [self._teachers[self.routes.places[name]]]
        found = [
            student
            if student is not None and tokenizer is self.student
            else self._ids(index, tokenizer, prompt, more)
            for tokenizer in asked
        ]
        if any(ids != found[0] for ids in found):
            raise TOPDError(
                f"data row {index}: the chat templates of the teachers write it differently, and a "
                "mean is taken after one prompt. Give all the same chat_template."
            )
        return found[0]

    def _check_read(self, index: int, more: Mapping[str, Any]) -> None:
        """Refuse arguments that neither chat template names. Raises TOPDError."""
        for name in more:
            if self._words and name not in self._words:
                raise TOPDError(
                    f"data row {index}: {name} is not read by the chat template, so it would have "
                    "no effect. Correct its name (chat_template_kwargs), leave it out, or use a "
                    "template that reads it."
                )

    @cached_property
    def _words(self) -> frozenset[str]:
        """All words of all chat templates."""
        templates = (str(t.chat_template or "") for t in (self.student, *self._teachers))
        return frozenset(word for text in templates for word in re.findall(r"\w+", text))

    def _fill(
        self, index: int, template: Template, row: Mapping[str, Any], prompt: str | Messages
    ) -> str:
        columns = {name: value for name, value in row.items() if value is not None}
        try:
            text = fill({**columns, "prompt": last_user(prompt)}, template)
        except TEMPLATE_FAULTS as error:
            raise TOPDError(
                f"data row {index}: teacher_prompt cannot be filled in: {said(error)}. "
                f"The row has the columns {', '.join(sorted(columns))}."
            ) from error
        if not text.strip():
            raise TOPDError(f"data row {index}: teacher_prompt comes out empty. Correct it.")
        return text

    def _ids(
        self,
        index: int,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str | Messages,
        more: Mapping[str, Any],
    ) -> Ids:
        if not isinstance(prompt, str):
            found: Ids = rendered(index, tokenizer, prompt, more, tokenize=True)
            written = partial(rendered, index, tokenizer, more=more, tokenize=False)
            known = self._known.setdefault((id(tokenizer), *more), set())
            check_messages(index, prompt, written, known)
            check_tools(index, tokenizer, prompt, more, known)
        elif more:
            raise TOPDError(
                f"data row {index}: {', '.join(more)} need a chat template, and the prompt is "
                "text. Give it as messages, or leave them out."
            )
        else:
            with _tokenised(index):
                found = text_ids(tokenizer, prompt)
        if not found:
            raise TOPDError(
                f"data row {index}: the tokenizer makes no token of the prompt. Remove the row."
            )
        return found

    def _response(self, asked: Row, prompt: Ids, more: Mapping[str, Any]) -> Ids:
        """The answer's ids: what the template writes from the end of the prompt on, and an end."""
        index, tokenizer = asked.index, self.student
        calls = not isinstance(asked.prompt, str) and (asked.answer or {}).get("tool_calls")
        if asked.answer is None or not (asked.solution or calls):
            raise TOPDError(f"data row {index}: no solution to learn from. Map a solution column.")
        if isinstance(asked.prompt, str):
            with _tokenised(index):
                ids = self._joined(prompt, asked.solution or "")
            return self._ended(index, (*ids, tokenizer.eos_token_id))
        whole = [*asked.prompt, asked.answer]

        def finished(answer: Mapping[str, Any]) -> str:
            written = [*asked.prompt, answer]
            return str(rendered(index, tokenizer, written, more, tokenize=False, asks=False))

        before = rendered(index, tokenizer, asked.prompt, more, tokenize=False)
        after, with_other = finished(asked.answer), finished(with_another_end(asked.answer))
        check_parts(index, asked.answer, after, finished)
        if not after.startswith(before):
            raise TOPDError(
                f"data row {index}: the chat template does not write the answer after its prompt, "
                f"which ends with {before[-40:]!r}. Give the part that it wants (reasoning_content "
                "in the last message), or chat_template_kwargs such as {enable_thinking: false}."
            )
        if "</think>" in asked.answer["content"]:
            given = rendered(index, tokenizer, asked.prompt, more, tokenize=False, asks=False)
            check_one_thought(index, asked.answer, given, after)
        ids = rendered(index, tokenizer, whole, more, tokenize=True, asks=False)
        if ids[: len(prompt)] == prompt:
            ids = ids[len(prompt) :]
        else:  # the first token of the answer would join the last of the prompt
            ids = self._joined(prompt, after[len(before) :])
        return self._ended(index, ended(tokenizer, ids, common_end(after, with_other)))

    def _joined(self, prompt: Ids, text: str) -> Ids:
        """The ids of a text after a prompt."""
        if self._border is not None:
            return self._border.joined(prompt, text)
        return tuple(self.student(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def _known(self) -> dict[Any, set[Any]]:
        """The kinds of message that every tokenizer's template writes."""
        return {}

    @cached_property
    def _border(self) -> Border | None:
        return Border(self.student) if tells_places(self.student) else None

    def _ended(self, index: int, ids: Ids) -> Ids:
        """An answer up to its end, if the teacher has all of its tokens. Raises TOPDError."""
        ids = once_ended(index, self.student, ids, self.ends)
        unknown = sorted(set(ids) - self._shared) if self._shared is not None else ()
        if unknown:
            raise TOPDError(
                f"data row {index}: the answer has {self.student.decode(unknown[:1])!r}, a token "
                "that the teacher does not have. Take it out, or choose another teacher."
            )
        return ids

    @cached_property
    def _shared(self) -> frozenset[int] | None:
        """The ids that all have; None where all are one tokenizer, or no ids are exchanged."""
        if self.by_text:
            return None
        others = [tokenizer for tokenizer in self._teachers if tokenizer is not self.student]
        ids = [frozenset(shared_ids(self.student, tokenizer)) for tokenizer in others]
        return frozenset.intersection(*ids) if ids else None

    def _template(self) -> Template | None:
        if self.teacher_prompt is None:
            return None
        sandbox = BoundedSandbox(undefined=StrictUndefined, finalize=known, autoescape=False)
        try:
            return sandbox.from_string(self.teacher_prompt)
        except (TemplateError, RecursionError, MemoryError, ValueError) as error:
            raise TOPDError(f"teacher_prompt: not a Jinja template: {said(error)}.") from error


def make_rollout(prompt: Prompt, written: Generation) -> Rollout:
    """A prompt and what the student wrote to it."""
    return Rollout(prompt, written.tokens, written.logprobs, written.finished)


def repeated_ngram_share(response: Sequence[int], n: int = 4) -> float:
    """Share of a response's n-grams that occurred before in it; 0 for a short response.

    >>> repeated_ngram_share((1, 2, 3, 4, 1, 2, 3, 4))
    0.2
    """
    grams = list(zip(*(response[i:] for i in range(n)), strict=False))
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


@contextmanager
def _tokenised(index: int) -> Iterator[None]:
    """Say which row a tokenizer has no tokens for. Raises TOPDError."""
    try:
        with named_faults():
            yield
    except (ValueError, TypeError) as error:  # the latter for half a character: a lone surrogate
        raise TOPDError(
            f"data row {index}: the tokenizer cannot read it: {said(error)}. Change the text, or "
            "use a tokenizer that knows its characters."
        ) from error
