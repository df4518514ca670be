"""The engines of a pair, each in this process or served."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from topd.engines import Engine
from topd.engines.decode_check import check_decoding
from topd.engines.hf import HFEngine
from topd.engines.server_checks import check_logprobs, check_whole, probe_of
from topd.engines.vllm import VLLMEngine
from topd.engines.weight_sync import ServedStudent
from topd.errors import TOPDError
from topd.inputs.heads import head_of
from topd.inputs.models import ModelSpec, eos_ids
from topd.inputs.vocabulary import shared_ids


def open_engines(
    sources: tuple[object, object],
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    temperature: float,
    autocast: Callable[[], AbstractContextManager[None]],
) -> tuple[HFEngine, Engine]:
    """The engines of a student and a teacher, served where their ``sources`` say so, and checked.

    Raises:
        TOPDError: a model does not write what its forwards say, servers of the teacher disagree,
            or the student's cannot tell the log-probs of ``temperature``.
        StoppedError: a server does not answer.
    """
    options: dict[str, Any] = {
        "eos_ids": eos_ids(models[0], tokenizers[0]),
        "vocab_size": min(head_of(model).vocab_size for model in models),
        "allowed": shared_ids(*tokenizers),
        "autocast": autocast,
    }
    student = teacher = None
    if isinstance(sources[0], ModelSpec) and sources[0].served:
        if temperature != 1:
            raise TOPDError(
                f"temperature: {temperature:g} does not go with student.served, whose log-probs "
                "are those of temperature 1. Set it to 1, or leave student.served out."
            )
        probe = probe_of(tokenizers[0])
        student = ServedStudent(models[0], sources[0].served, probe, name="student", **options)
    if isinstance(sources[1], ModelSpec) and sources[1].served:
        path, served = sources[1].path, sources[1].served
        teacher = VLLMEngine(models[1], path, served, name="teacher", **options)
        check_logprobs(teacher, tokenizers[1])
        if served.check_whole:
            check_whole(teacher, sources[1], tokenizers[1])
    engines = (
        student or HFEngine(models[0], name="student", **options),
        teacher or HFEngine(models[1], name="teacher", **options),
    )
    for engine in engines:
        if type(engine) is HFEngine:  # others are written by servers
            check_decoding(engine)
    return engines
