"""The start-up checks of a training run: what can be known is known before weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import datasets
import torch
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from topd.config import TOPDConfig
from topd.engines.server_checks import check_servers
from topd.errors import TOPDError
from topd.inputs.adapters import check_apart, check_trainable, try_adapter, with_adapter
from topd.inputs.models import ModelSource, check_context, config_of, source_of
from topd.inputs.pairs import load_pair, with_tokenizer_of
from topd.inputs.prompts import PromptEncoder
from topd.training.inherited import check_inherited
from topd.training.overlap import check_overlap
from topd.training.preflight import (
    check_router,
    check_saving,
    without_dropout,
)
from topd.training.trials import check_settings
from topd.types import Prompt

logger = logging.get_logger(__name__)

Rows: TypeAlias = datasets.Dataset | Sequence[dict[str, Any]]
Sources: TypeAlias = tuple[ModelSource, ModelSource]
Tokenizers: TypeAlias = tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]


def sources_of(
    student: ModelSource | Mapping[str, Any], teacher: ModelSource | Mapping[str, Any]
) -> Sources:
    """Where student and teacher come from. Raises TOPDError for what is no source."""
    ours, theirs = source_of("model", student), source_of("teacher_model", teacher)
    return with_tokenizer_of(ours, theirs), theirs


def check_arguments(args: Any, sources: Sources, train: Any, evaluation: Any) -> None:
    """What can be said before anything is read. Raises TOPDError."""
    if not isinstance(args, TOPDConfig):
        raise TOPDError(f"args: must be a TOPDConfig, not {type(args).__name__}.")
    for name, rows in (("train_dataset", train), ("eval_dataset", evaluation)):
        if isinstance(rows, datasets.IterableDataset):
            raise TOPDError(f"{name}: streaming is not supported. Load it, or take a part of it.")
        if isinstance(rows, dict):
            raise TOPDError(f"{name}: has splits {', '.join(map(str, rows))}. Choose one of them.")
        if isinstance(rows, str | Path):
            raise TOPDError(
                f"{name}: is a path. Load it: topd.inputs.rows.DataSpec(path={str(rows)!r}).load()."
            )
        if isinstance(rows, Sequence) and not all(isinstance(row, Mapping) for row in rows):
            raise TOPDError(
                f"{name}: its rows must be mappings such as {{'prompt': 'What is 1 + 2?'}}."
            )
    check_inherited(args)
    if args.eval_strategy != "no" and evaluation is None:
        raise TOPDError("eval_strategy: needs data: give eval_dataset (eval_data in a recipe).")
    if args.overlap:
        check_overlap(*sources, args)
    if args.n_gpu > 1:
        logger.warning(
            f"{args.n_gpu} GPUs are visible; a process uses one. For all: accelerate launch."
        )
        args._n_gpu = 1  # else Trainer would run DataParallel, over other rollouts than asked for


def rows_of(data: Any) -> Any:
    """The rows of a pandas DataFrame; other data as it is."""
    return data.to_dict("records") if hasattr(data, "to_dict") and hasattr(data, "iloc") else data


def encoder_of(tokenizers: Tokenizers, args: TOPDConfig) -> PromptEncoder:
    """Encodes a pair's prompts with the templates and limits of ``args``."""
    return PromptEncoder(
        *tokenizers,
        args.teacher_prompt,
        args.max_prompt_length,
        args.drop_long_prompts,
        cast(dict[str, Any], args.chat_template_kwargs or {}),
    )


def check_sources(
    sources: Sources, tokenizers: Tokenizers, prompts: Sequence[Prompt], args: TOPDConfig
) -> None:
    """Whether contexts and servers are long enough for these prompts. Raises TOPDError."""
    response, window = args.max_completion_length, args.longest_window
    student = response + max((len(prompt.student) for prompt in prompts), default=0)
    teacher = response + max((len(prompt.teacher) for prompt in prompts), default=0)
    ahead = window if args.guidance_method().looks_ahead else 0
    check_context("student", sources[0], student)
    check_context("teacher", sources[1], teacher + ahead)
    check_servers("student", sources[0], tokenizers[0], student)
    check_servers("teacher", sources[1], tokenizers[1], teacher + window)


def check_training(
    sources: Sources, tokenizers: Tokenizers, args: TOPDConfig, optimizers: tuple[Any, Any]
) -> None:
    """Try what a run needs besides: logging, optimiser, schedule, saving. Raises TOPDError."""
    check_settings(args, optimizers)
    check_saving(sources[0], tokenizers[0])


def load_models(
    sources: Sources, args: TOPDConfig, lora: PeftConfig | None, *, trained: bool
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student, with its adapter if it gets one, and teacher; checked as far as they can be alone.

    Raises:
        TOPDError: an adapter that does not fit, models that cannot be loaded or share weights, or
            a student that is to be ``trained`` and cannot be.
    """
    if lora is not None:
        try_adapter(config_of(sources[0]), lora, sources[0])
    student, teacher = load_pair(*sources)
    if lora is not None:
        set_seed(args.seed)  # of the adapter's first weights
        student = with_adapter(student, lora)
    check_apart(student, teacher)
    if trained:
        check_trainable(student)
        check_router(student)
        _warn_of_coarse_weights(student)
    if args.disable_dropout:
        without_dropout(student)
    return student, teacher


def _warn_of_coarse_weights(student: PreTrainedModel) -> None:
    dtypes = {p.dtype for p in student.parameters() if p.requires_grad}
    if dtypes - {torch.float32, torch.float64}:
        logger.warning(
            f"student: its trainable weights are {dtypes}; small updates are lost in rounding. "
            "Load it in float32 and set bf16: true for mixed precision."
        )
