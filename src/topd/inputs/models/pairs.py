"""A student and its teacher: do they fit, before any weight is read? Then both models."""

from __future__ import annotations

import copy
import warnings

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from topd.errors import TOPDError
from topd.inputs.models import (
    LOADED,
    ModelSource,
    ModelSpec,
    as_spec,
    config_of,
    eos_ids,
    tokenizer_of,
)
from topd.inputs.models.quantised import check_quantised
from topd.inputs.models.vocabulary import check_embedding_rows, check_tokenizers
from topd.inputs.text_models import is_by_text, stand_in, text_tokenizer


def tokenizers_of(
    student: ModelSource,
    teacher: ModelSource,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """The tokenizers of a pair, those given or their own, after the checks that need no weights.

    Raises TOPDError: the pair does not fit, or a model is not what can be trained.
    """
    if student is teacher and isinstance(student, LOADED):
        raise TOPDError("teacher_model: is the student itself. Use copy.deepcopy(model).")
    for given in (student_tokenizer, teacher_tokenizer):
        if given is not None and not isinstance(given, PreTrainedTokenizerBase):
            raise TOPDError(
                f"processing_class: a {type(given).__name__} is not a tokenizer. Give one, "
                "e.g. AutoTokenizer.from_pretrained(PATH), or a processor's own."
            )
    _check_served(student, teacher)
    check_quantised("student", student, config_of(student))
    if not (isinstance(teacher, ModelSpec) and teacher.text):  # whose weights are elsewhere
        check_quantised("teacher", teacher, config_of(teacher))
    alike = not isinstance(student, LOADED) and student == teacher
    ours = student_tokenizer or tokenizer_of(student)
    if isinstance(teacher, ModelSpec) and teacher.by_text:
        return ours, _tokenizer_by_text(student, teacher, ours, teacher_tokenizer)
    theirs = teacher_tokenizer or (ours if alike else tokenizer_of(teacher, otherwise=ours))
    check_tokenizers(ours, theirs)
    _compare_ends((student, teacher), (ours, theirs))
    check_embedding_rows("student", config_of(student), ours)
    if not alike:
        check_embedding_rows("teacher", config_of(teacher), theirs)
    return ours, theirs


def _tokenizer_by_text(
    student: ModelSource,
    teacher: ModelSpec,
    ours: PreTrainedTokenizerBase,
    given: PreTrainedTokenizerBase | None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a teacher by text, which may be another than the student's."""
    check_embedding_rows("student", config_of(student), ours)
    if teacher.text is not None:
        named = teacher.tokenizer
        lent = given or (as_spec(named).load_tokenizer() if named else None)
        return text_tokenizer(teacher, ours, lent)
    theirs = given or teacher.load_tokenizer()
    check_embedding_rows("teacher", config_of(teacher), theirs)
    return theirs


def load_pair(
    student: ModelSource, teacher: ModelSource
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Both models, loaded unless they are already; a pair of equal sources is read once.

    Of a served teacher only what is around its decoder.
    """
    ours = student if isinstance(student, LOADED) else as_spec(student).load_model()
    if isinstance(teacher, LOADED):
        return ours, teacher
    theirs = as_spec(teacher)
    if theirs.text is not None:
        return ours, stand_in(theirs.path, ours.config.get_text_config().vocab_size)
    if theirs.served:
        return ours, theirs.load_frame()
    alike = not isinstance(student, LOADED) and student == teacher
    return ours, copy.deepcopy(ours) if alike else theirs.load_model()


def _compare_ends(
    models: tuple[ModelSource, ModelSource], tokenizers: tuple[PreTrainedTokenizerBase, ...]
) -> None:
    """Say which tokens the teacher ends with that do not end the student's responses.

    A student that waits for another end than its teacher's writes ever longer responses: arXiv
    2609.20511.
    """
    ours, theirs = (
        set(eos_ids(model, tokenizer)) for model, tokenizer in zip(models, tokenizers, strict=True)
    )
    own = _names(tokenizers[0], ours)
    more = _names(tokenizers[1], theirs - ours)
    if more:
        warnings.warn(
            f"The student's responses end at {', '.join(own)}; the teacher ends its own at "
            f"{', '.join(more)} too, which does not end the student's. To end at all of them: "
            f"eos_token: [{', '.join([*own, *more])}] in the student's spec.",
            stacklevel=2,
        )


def _names(tokenizer: PreTrainedTokenizerBase, ids: set[int]) -> list[str]:
    """Of tokens by id; an id that is only in a generation config has none."""
    return [name for name in tokenizer.convert_ids_to_tokens(sorted(ids)) if name is not None]


def _check_served(student: ModelSource, teacher: ModelSource) -> None:
    """What each role needs of its servers. Raises TOPDError."""
    if is_by_text(student):
        raise TOPDError("student.text, student.as_text: a student is trained here. Give its path.")
    if isinstance(teacher, ModelSpec) and teacher.served:
        if not teacher.served.pooling:
            raise TOPDError(
                "teacher.served.pooling: is missing. A teacher's states come from a pooling "
                "server: start both kinds with topd serve-teacher, and give both URLs."
            )
        if teacher.gguf_file:
            raise TOPDError(
                "teacher.served: goes with safetensors, of which the head is read here, not with "
                "gguf_file. Save the model with save_pretrained, and serve that."
            )
    if isinstance(student, ModelSpec) and student.served and not student.served.weights:
        raise TOPDError(
            "student.served.weights: is missing. Name a folder that training and servers share: "
            "the student's weights go there after every update."
        )
