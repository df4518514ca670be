"""The engines of a student and its teachers, each in this process or served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from topd.engines import Engine
from topd.engines.decode_check import check_decoding
from topd.engines.hf import HFEngine
from topd.engines.servers.checks import check_logprobs, check_whole, probe_of
from topd.engines.servers.vllm import VLLMEngine
from topd.engines.servers.weight_sync import ServedStudent
from topd.engines.text.writers import text_engine
from topd.errors import TOPDError
from topd.inputs.models import ModelSpec, eos_ids
from topd.inputs.models.heads import head_of
from topd.inputs.models.vocabulary import shared_ids
from topd.inputs.text_models import is_by_text


def open_engines(
    sources: Sequence[object],
    models: Sequence[PreTrainedModel],
    tokenizers: Sequence[PreTrainedTokenizerBase],
    temperature: float,
    autocast: Callable[[], AbstractContextManager[None]],
    *,
    spans: bool = False,
) -> tuple[HFEngine, list[Engine]]:
    """The engines of a student and of its teachers, if any, in their order, and checked.

    Each is served where its source says so. All sample the ids that all have. With ``spans`` a
    teacher by text in this process tells the log-probs of spans of the student's text.

    Raises:
        TOPDError: a model does not write what its forwards say, servers of the teacher disagree,
            or the student's cannot tell the log-probs of ``temperature``.
        StoppedError: a server does not answer.
    """
    text = any(map(is_by_text, sources))  # one teacher then, of whatever vocabulary
    exchanged = 1 if text else len(sources)
    options: dict[str, Any] = {
        "eos_ids": eos_ids(models[0], tokenizers[0]),
        "vocab_size": min(head_of(model).vocab_size for model in models[:exchanged]),
        "allowed": _common_ids(tokenizers[:exchanged]),
        "autocast": autocast,
    }
    unshared = _unshared_ids(tokenizers[:exchanged], options["allowed"])
    student = _student(sources[0], models[0], tokenizers[0], temperature, unshared, options)
    teachers = zip(sources[1:], models[1:], tokenizers[1:], strict=True)
    if text:
        assert isinstance(sources[1], ModelSpec)
        engines: list[Engine] = [text_engine(sources[1], models, tokenizers, options, spans)]
    else:
        engines = [_teacher(*teacher, unshared, options) for teacher in teachers]
    for engine in (student, *engines):
        if type(engine) is HFEngine:  # others are written by servers
            check_decoding(engine)
    return student, engines


def _student(
    source: object,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
    unshared: Sequence[int],
    options: dict[str, Any],
) -> HFEngine:
    if not (isinstance(source, ModelSpec) and source.served):
        return HFEngine(model, name="student", **options)
    if temperature != 1:
        raise TOPDError(
            f"temperature: {temperature:g} does not go with student.served, whose log-probs "
            "are those of temperature 1. Set it to 1, or leave student.served out."
        )
    probe = probe_of(tokenizer)
    return ServedStudent(model, source.served, probe, unshared, name="student", **options)


def _teacher(
    source: object,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    unshared: Sequence[int],
    options: dict[str, Any],
) -> Engine:
    if not (isinstance(source, ModelSpec) and source.served):
        return HFEngine(model, name="teacher", **options)
    teacher = VLLMEngine(model, source.path, source.served, unshared, name="teacher", **options)
    check_logprobs(teacher, tokenizer)
    if source.served.check_whole:
        check_whole(teacher, source, tokenizer)
    return teacher


def _common_ids(tokenizers: Sequence[PreTrainedTokenizerBase]) -> list[int]:
    """The ids that stand for the same token in all, ascending."""
    student = tokenizers[0]
    return sorted(set.intersection(*({*shared_ids(student, other)} for other in tokenizers)))


def _unshared_ids(
    tokenizers: Sequence[PreTrainedTokenizerBase], common: Sequence[int]
) -> list[int]:
    """The ids that stand for a token in some only, or for another, ascending."""
    known = (token for tokenizer in tokenizers for token in tokenizer.get_vocab().values())
    return sorted({*known} - {*common})
