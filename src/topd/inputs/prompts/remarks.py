"""What is remarked of prompts before they are encoded: nothing of it is a fault by itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from topd.errors import TOPDError
from topd.inputs.border import special_search
from topd.inputs.prompt_rows import Row
from topd.inputs.prompts.chat import rendered
from topd.inputs.prompts.ends import common_end

logger = logging.get_logger(__name__)
TOKEN = "Set eos_token of the student (a list, if there are several)."
TEXT = "It is not a token here: use a chat template that ends a turn with one of these."
LOOKED_AT = 100  # rows that are searched for special tokens


def warn_of_dates(tokenizers: Iterable[PreTrainedTokenizerBase]) -> None:
    """Say whose chat template writes another prompt every day."""
    for tokenizer in {id(t): t for t in tokenizers}.values():
        if "strftime_now" in str(tokenizer.chat_template or ""):
            logger.warning(
                f"{tokenizer.name_or_path}: its chat template writes today's date, so on "
                "another day the prompts are others and a run is not resumed. Where the "
                "template takes one, set chat_template_kwargs: {date_string: ...}."
            )


def warn_of_ends(
    asked: Row, student: PreTrainedTokenizerBase, ends: Collection[int], more: Mapping[str, Any]
) -> None:
    """Say that the student's responses continue where its chat template ends a turn.

    ``asked`` is a row with messages, ``ends`` the tokens that end a response, ``more`` the
    template's arguments.
    """
    talks = ([*asked.prompt, {"role": "assistant", "content": text}] for text in "ab")
    names = [student.decode([end]) for end in sorted(ends)]
    with suppress(TOPDError):  # a template may want more of an answer
        tail = common_end(
            *(rendered(0, student, talk, more, tokenize=False, asks=False) for talk in talks)
        )
        if tail.strip() and not any(name in tail for name in names):
            has = {*student.get_added_vocab(), *student.all_special_tokens, tail.strip()}
            known = any(name in tail for name in has & student.get_vocab().keys())
            logger.warning_once(
                f"student: its chat template ends a turn with {tail.strip()!r}, and its "
                f"responses end at {', '.join(names)}: they continue after the end of a turn. "
                + (TOKEN if known else TEXT)
            )


def warn_of_marks(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    """Say that a message's text has the name of a special token, as of a finished prompt."""
    search = special_search(tokenizer)
    for row in rows:
        texts = () if isinstance(row.prompt, str) else (m["content"] for m in row.prompt)
        found = next(filter(None, map(search, texts)), None)
        if found:
            logger.warning_once(
                f"data row {row.index}: a message's text has {found[0]!r}, which is read as that "
                "special token. If prompts are already written by a chat template, set data.chat: "
                "false (topd eval: --no-chat), and none is put around them; else take it out."
            )
            return
