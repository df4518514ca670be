"""Rows of data -> prompts as token ids -> rollouts. Text is tokenised here, once, and never again.

A teacher may see more than the student: a Jinja template makes its user message from the columns
of the row. The response is the same token ids for both; only the prefixes differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from topd.errors import TOPDError
from topd.types import Generation, Ids, Prompt, Rollout

logger = logging.get_logger(__name__)

Messages = Sequence[Mapping[str, str]]
_TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError)


@dataclass(frozen=True)
class PromptEncoder:
    """Turns rows into prompts. See :meth:`encode`.

    Args:
        student: the student's tokenizer and chat template.
        teacher: the teacher's; the vocabulary must be the same.
        teacher_prompt: Jinja template of the teacher's user message, or None. It sees the row's
            columns, and ``prompt``: the text of the student's last user message.
        max_length: longest prompt of either, in tokens.
        drop_long: leave longer prompts out instead of refusing them.
        template_kwargs: given to both chat templates.
    """

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase
    teacher_prompt: str | None = None
    max_length: int = 800
    drop_long: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def encode(
        self, rows: Iterable[Mapping[str, Any]], *, with_response: bool = False
    ) -> list[Prompt]:
        """Encode rows with a ``prompt`` (string or messages) or ``messages`` column.

        A string is tokenised as it is; messages go through the chat template. A final assistant
        turn is not part of the prompt: it is the reference ``solution``, unless the row has one.

        Args:
            rows: the data.
            with_response: also encode ``solution`` as the response, for warm start.

        Returns:
            Prompts in order; ``index`` counts rows.

        Raises:
            TOPDError: a row lacks a prompt, has an empty one, one that is too long, or lacks a
                column that the teacher's template names. The message names the row.
        """
        template = self._template()
        prompts = [self._one(i, row, template, with_response) for i, row in enumerate(rows)]
        longest = [max(len(p.student), len(p.teacher)) for p in prompts]
        for prompt, length in zip(prompts, longest, strict=True):
            if length > self.max_length and not self.drop_long:
                raise TOPDError(
                    f"data row {prompt.index}: the prompt has {length} tokens, the limit is "
                    f"{self.max_length}. Raise max_prompt_length, or set drop_long_prompts: true."
                )
        kept = [p for p, n in zip(prompts, longest, strict=True) if n <= self.max_length]
        if len(kept) < len(prompts):
            logger.warning(
                f"data: {len(prompts) - len(kept)} of {len(prompts)} prompts are longer than "
                f"{self.max_length} tokens and left out"
            )
        if not kept:
            raise TOPDError("data: no prompt is left. Check the data and max_prompt_length.")
        return kept

    def _one(
        self, index: int, row: Mapping[str, Any], template: Template | None, with_response: bool
    ) -> Prompt:
        prompt, solution = _split(index, row)
        student = self._ids(self.student, prompt)
        if template is not None:
            text = self._fill(index, template, {**row, "solution": solution}, prompt)
            teacher = self._ids(self.teacher, _with_last_user(prompt, text))
        else:
            alike = self.teacher is self.student
            teacher = student if alike else self._ids(self.teacher, prompt)
        response = self._response(index, solution) if with_response else None
        return Prompt(index, student, teacher, response)

    def _fill(
        self, index: int, template: Template, row: Mapping[str, Any], prompt: str | Messages
    ) -> str:
        columns = {name: value for name, value in row.items() if value is not None}
        try:
            text = template.render({**columns, "prompt": _last_user(prompt)})
        except _TEMPLATE_FAULTS as error:
            raise TOPDError(
                f"data row {index}: teacher_prompt cannot be filled in: {_said(error)}. "
                f"The row has the columns {', '.join(sorted(columns))}."
            ) from error
        if not text.strip():
            raise TOPDError(f"data row {index}: teacher_prompt comes out empty. Correct it.")
        return text

    def _ids(self, tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> Ids:
        if isinstance(prompt, str):
            return tuple(tokenizer(prompt)["input_ids"])
        name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.chat_template:
            raise TOPDError(
                f"{name} has no chat template, but the prompts are messages. Give prompts as "
                "strings (data.chat: false), or use an instruction model."
            )
        try:
            encoded = tokenizer.apply_chat_template(
                [dict(message) for message in prompt],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **self.template_kwargs,
            )
        except _TEMPLATE_FAULTS as error:
            raise TOPDError(
                f"{name}: its chat template fails: {_said(error)}. Check the messages' roles and "
                "chat_template_kwargs."
            ) from error
        return tuple(encoded["input_ids"])

    def _response(self, index: int, solution: str | None) -> Ids:
        if not solution or not solution.strip():
            raise TOPDError(f"data row {index}: no solution to learn from. Map a solution column.")
        ids = self.student(solution, add_special_tokens=False)["input_ids"]
        return (*ids, self.student.eos_token_id)

    def _template(self) -> Template | None:
        if self.teacher_prompt is None:
            return None
        sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
        try:
            return sandbox.from_string(self.teacher_prompt)
        except TemplateError as error:
            raise TOPDError(f"teacher_prompt: not a Jinja template: {_said(error)}.") from error


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


def _said(error: Exception) -> str:
    return str(error).rstrip(".")


def _split(index: int, row: Mapping[str, Any]) -> tuple[str | Messages, str | None]:
    """The prompt of a row, and its reference solution if it has one."""
    prompt = row.get("prompt")
    if prompt is None:
        prompt = row.get("messages")
    if prompt is None:
        raise TOPDError(
            f"data row {index}: has neither prompt nor messages, but {', '.join(sorted(row))}. "
            "Map a column: columns: {prompt: NAME}."
        )
    solution = row.get("solution")
    if not isinstance(prompt, str):
        prompt = _checked_messages(index, prompt)
        if prompt and prompt[-1]["role"] == "assistant":
            solution = solution or prompt[-1]["content"]
            prompt = prompt[:-1]
    if not prompt or not _last_user(prompt).strip():
        raise TOPDError(f"data row {index}: the prompt is empty. Remove the row or fill it in.")
    return prompt, solution


def _checked_messages(index: int, prompt: Any) -> list[dict[str, str]]:
    messages = list(prompt) if isinstance(prompt, Sequence) else [prompt]
    for message in messages:
        fields = message if isinstance(message, Mapping) else {}
        if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
            raise TOPDError(
                f"data row {index}: a prompt is a string or a list of messages, each with a role "
                f"and a content of text; here stands {message!r}."
            )
    return messages


def _last_user(prompt: str | Messages) -> str:
    if isinstance(prompt, str):
        return prompt
    users = [message["content"] for message in prompt if message["role"] == "user"]
    return users[-1] if users else ""


def _with_last_user(prompt: str | Messages, text: str) -> str | Messages:
    if isinstance(prompt, str):
        return text
    last = max(i for i, message in enumerate(prompt) if message["role"] == "user")
    return [*prompt[:last], {**prompt[last], "content": text}, *prompt[last + 1 :]]
