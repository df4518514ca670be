"""Messages through a chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from topd.errors import TOPDError
from topd.inputs.models.bare import named_faults
from topd.inputs.prompt_rows import Messages
from topd.inputs.tool_calls import arguments_of, as_text, with_less, with_texts

TEMPLATE_FAULTS = (
    *(TemplateError, TypeError, ValueError, ArithmeticError, LookupError),
    *(MemoryError, RecursionError, TimeoutError),
)
_JOINS: dict[str, bool] = {}  # of chat templates, whether they join arguments of calls as text


def rendered(
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    more: Mapping[str, Any],
    *,
    tokenize: bool,
    asks: bool = True,
) -> Any:
    """Messages through the chat template: their ids, or the text. Raises TOPDError.

    ``asks`` for an answer: the generation prompt is at the end.
    """
    name = tokenizer.name_or_path or "the tokenizer"
    if not tokenizer.chat_template:
        raise TOPDError(
            f"{name} has no chat template, but the prompts are messages. Give prompts as "
            "strings (data.chat: false), set chat_template or tokenizer: teacher in the model's "
            "spec, or use an instruction model."
        )
    try:
        with named_faults():
            write = partial(tokenizer.apply_chat_template, add_generation_prompt=asks, **more)
            template = str(tokenizer.chat_template)
            given = _as_taken(template, messages, partial(write, tokenize=False))
            found = write(given, tokenize=tokenize, return_dict=tokenize)
        return tuple(found["input_ids"]) if tokenize else found
    except TEMPLATE_FAULTS as error:
        raise TOPDError(
            f"{name}: its chat template fails at data row {index}: {said(error)}. Check the "
            "messages' roles, tools and chat_template_kwargs."
        ) from error


def _as_taken(
    template: str, messages: Messages, write: Callable[[Any], str]
) -> list[dict[str, Any]]:
    """Messages with the arguments of calls as the template takes them: a mapping, or text."""
    given = [dict(message) for message in messages]
    arguments = arguments_of(messages)
    if not arguments or _JOINS.get(template) is False:
        return given
    forms = given, [with_texts(message) for message in messages]
    if template in _JOINS:
        return forms[1]
    misread = {str(one) for one in arguments} - {as_text(one) for one in arguments}
    for joins, form in enumerate(forms):
        with suppress(*TEMPLATE_FAULTS):
            text = write(form)
            if not any(one in text for one in misread):  # a mapping as Python writes it
                if misread:
                    _JOINS[template] = bool(joins)
                return form
    return given


def check_messages(
    index: int, messages: Messages, written: Callable[[Messages], str], known: set[Any]
) -> None:
    """Refuse a message of a prompt that the chat template leaves out: the model would not see it.

    Args:
        index: the row, for messages.
        messages: the prompt.
        written: the template's text of a conversation.
        known: gets the kinds of message that are written; another of one is not looked at.

    Raises TOPDError.
    """
    roles = [message["role"] for message in messages]
    for place, message in enumerate(messages):
        given = [part for part in ("content", "tool_calls", "function_call") if message.get(part)]
        # Mistral's writes a system message into a last message of the user, DeepSeek's the last one
        kind = (roles[place], place == 0, roles[place] in roles[place + 1 :], roles[-1], *given)
        kind = (*kind, len(message.get("tool_calls") or ()) > 1)  # gpt-oss's writes the first one
        for part in given if kind not in known else ():
            other = with_less(message, part)
            pair = (message, other)
            if part == "content":  # texts without marks, which a template may cut at
                pair = ({**other, part: "a"}, {**other, part: "b"})
            try:
                first, second = (
                    written([*messages[:place], one, *messages[place + 1 :]]) for one in pair
                )
            except TOPDError:  # it cannot do without
                continue
            if first == second:
                raise TOPDError(
                    f"data row {index}: the chat template does not write the {part} of message "
                    f"{place}, whose role is {message['role']!r}: the model would not see it. "
                    "Leave it out, or use a template that writes it."
                )
        known.add(kind)


def check_tools(
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    more: Mapping[str, Any],
    known: set[Any],
) -> None:
    """Refuse tools that the chat template does not write: the model would not know of them.

    ``known`` is as of :func:`check_messages`. Raises TOPDError.
    """
    if not more.get("tools") or "tools" in known:
        return
    without = {name: value for name, value in more.items() if name != "tools"}
    texts: list[str] = []
    with suppress(TOPDError):  # it cannot do without
        for some in (more, without):
            texts.append(rendered(index, tokenizer, messages, some, tokenize=False))
    if texts[1:] == texts[:1]:
        raise TOPDError(
            f"data row {index}: the chat template does not write the row's tools: the model would "
            "not know of them. Leave them out, or use a template that writes them."
        )
    known.add("tools")


def said(error: Exception) -> str:
    """What a library's error says, without a full stop."""
    return str(error).rstrip(".") or type(error).__name__
