"""Where a text of tokens begins and ends."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from topd.types import Ids

Text = TypeVar("Text", str, Ids)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    """A text's ids with the tokenizer's special tokens: BOS once, no end after what continues."""
    ids = list(tokenizer(text)["input_ids"])
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        del ids[0]
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and plain[-1:] != ids[-1:]:
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
