"""Where a text of tokens begins and ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from topd.errors import TOPDError
from topd.inputs.tool_calls import with_less
from topd.types import Ids

Text = TypeVar("Text", str, Ids)
PARTS = (  # some under several names
    *(("tool_calls",), ("function_call",)),
    ("reasoning_content", "reasoning", "thinking"),
)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    """A text's ids with the tokenizer's special tokens: BOS once, no end after what continues."""
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        del ids[0]
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    while len(ids) > max(1, len(plain)) and plain[-1:] != ids[-1:]:
        del ids[-1]
    return tuple(ids)


def with_another_end(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """An answer whose content has one character more; one without content as it is.

    What a template writes after either is what both texts end with, see :func:`common_end`: to look
    for the content itself would find it in the template's own text, or not at all where the
    template changes it.
    """
    text = answer["content"].rstrip()
    return {**answer, "content": text + ("," if text.endswith(".") else ".")} if text else answer


def common_end(one: Text, other: Text) -> Text:
    """The longest text that both end with.

    >>> common_end("3 ><|im_end|>", "3 >.<|im_end|>")
    '<|im_end|>'
    """
    pairs = zip(reversed(one), reversed(other), strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return one[len(one) - shared :]


def ended(tokenizer: PreTrainedTokenizerBase, ids: Ids, tail: str) -> Ids:
    """A finished turn up to its last token that is no blank; with an end, if the template has none.

    The template has its own where its ``tail``, after the content, is more than blanks.
    """
    if not tail.strip():
        return (*ids, tokenizer.eos_token_id)
    while len(ids) > 1 and not tokenizer.decode(ids[-1:]).strip():
        ids = ids[:-1]
    return ids


def once_ended(
    index: int, tokenizer: PreTrainedTokenizerBase, ids: Ids, ends: frozenset[int]
) -> Ids:
    """An answer up to the first token that ends a response: after it nothing is ever written.

    Args:
        index: the row, for messages.
        tokenizer: the student's.
        ids: the answer, with an end.
        ends: tokens that end the student's responses; empty: only the tokenizer's is known.

    Raises TOPDError: the answer has no such token, or continues after it.
    """
    names, known = tokenizer.convert_ids_to_tokens, ends or {int(tokenizer.eos_token_id)}
    named = ", ".join(map(str, names(sorted(known))))
    place = next((i for i, token in enumerate(ids) if token in known), len(ids))
    if place == len(ids) and ends:
        raise TOPDError(
            f"data row {index}: the chat template ends the answer with {names(ids[-1])!r}, and "
            f"the student's responses end at {named}: it would not learn "
            "to stop. Set eos_token of the student (a list, if there are several), or choose "
            "another chat_template."
        )
    if str(tokenizer.decode(list(ids[place + 1 :]), skip_special_tokens=True)).strip():
        raise TOPDError(
            f"data row {index}: the answer has {names(ids[place])!r} in it, the token that ends a "
            "response, and continues after it. Take it out of the text."
        )
    return ids[: place + 1]


def check_parts(
    index: int, answer: Mapping[str, Any], whole: str, finished: Callable[[Mapping[str, Any]], str]
) -> None:
    """Refuse an answer's part that a chat template leaves out: it would not be learned.

    ``whole`` is the conversation with it, and ``finished`` writes one with another answer. Raises
    TOPDError.
    """
    fewer = {}
    for names in PARTS:
        given = [name for name in names if answer.get(name)]
        if given:
            fewer[given[0]] = with_less(answer, *names)
    thought, closed, rest = answer["content"].rpartition("</think>")
    if thought.replace("<think>", "").strip():
        fewer[f"thought before {closed}"] = {**answer, "content": rest}
    for part, without in fewer.items():
        if finished(without) == whole:
            raise TOPDError(
                f"data row {index}: the chat template does not write the answer's {part}, so it "
                "would not be learned. Leave it out, or use a template that writes it."
            )


def check_one_thought(index: int, answer: Mapping[str, Any], before: str, whole: str) -> None:
    """Refuse a thought in an answer's text after one of the template's own: both would be learned.

    ``whole`` is the conversation with it, ``before`` that without it. Raises TOPDError.
    """
    here, known, written = (text.count("</think>") for text in (answer["content"], before, whole))
    if written - known > here:
        raise TOPDError(
            f"data row {index}: the chat template writes a thought of its own before the one in "
            "the answer's text, so both would be learned. Give the latter as reasoning_content "
            "alone, or use a template or chat_template_kwargs that take it from the text."
        )
