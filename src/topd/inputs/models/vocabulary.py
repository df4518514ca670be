"""One vocabulary for a pair: which ids mean the same to both, and a text that both split alike."""

from __future__ import annotations

import re

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from topd.errors import TOPDError
from topd.inputs.models.bare import named_faults
from topd.types import Ids

PROBE = "3 + 4 = 7, so the answer is\n\\boxed{7}. Naïve café — 東京 🙂"
MARK = re.compile(r"<[^<>\s]+>")  # <think>, <|im_end|>: no text is split into it
FAMILY = (
    "Token losses need one vocabulary: choose a teacher of the same family, or have it teach by "
    "text, with teacher.as_text: true (docs/how-to/text-teacher.md)."
)


def shared_ids(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """The ids that stand for the same token in both, ascending: those that may be sampled.

    Padding rows of the embeddings have no token and are left out, as are added tokens that only
    one of the two has (``<think>`` in the teacher alone, say).
    Raises TOPDError as :func:`check_vocabulary`.
    """
    check_vocabulary(student, teacher)
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    return tuple(sorted({i for token, i in ours.items() if theirs.get(token) == i}))


def check_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse a pair in which another than an added token has two meanings.

    Added tokens and marks such as ``<think>`` may be in one vocabulary only, or differ.
    Raises TOPDError, with the first difference.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    added = [set(tokenizer.get_added_vocab()) for tokenizer in (student, teacher)]
    differ = sorted(
        token
        for token in ours.keys() | theirs.keys()
        if ours.get(token) != theirs.get(token)
        and not all(
            token in special or MARK.fullmatch(token)
            for vocab, special in zip((ours, theirs), added, strict=True)
            if token in vocab
        )
    )
    if differ:
        token = differ[0]
        raise TOPDError(
            f"tokenizers differ at {len(differ)} tokens, first {token!r}: student id "
            f"{ours.get(token)}, teacher id {theirs.get(token)}. {FAMILY}"
        )


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse a pair whose token ids do not mean the same.

    Vocabularies, end-of-sequence tokens and the ids of a probe text are compared, not sizes. An
    added token that one of them lacks is no difference: it is never sampled nor learned.
    Raises TOPDError, with the first difference.
    """
    check_vocabulary(student, teacher)
    if (student.eos_token_id, student.eos_token) != (teacher.eos_token_id, teacher.eos_token):
        raise TOPDError(
            f"tokenizers end a response differently: student {student.eos_token!r}, teacher "
            f"{teacher.eos_token!r}. Set eos_token of one model to the other's."
        )
    if known_ids(student, PROBE) != known_ids(teacher, PROBE):
        raise TOPDError(f"tokenizers split the same text differently: {PROBE!r}. {FAMILY}")


def known_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    """A text's ids by itself; none where it has characters that the tokenizer cannot read."""
    try:
        with named_faults():
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    except ValueError:
        return ()


def check_embedding_rows(
    name: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Every token needs an embedding row; more rows are padding. Raises TOPDError."""
    rows = config.get_text_config().vocab_size
    needed = max(tokenizer.get_vocab().values()) + 1
    if rows < needed:
        raise TOPDError(
            f"{name}: {rows} embedding rows for {needed} tokens of its tokenizer. "
            "Use the tokenizer that belongs to the model."
        )
