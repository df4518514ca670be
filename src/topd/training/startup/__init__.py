"""The start-up checks of a training run: what can be known is known before weights are read."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import datasets
import torch
from peft import PeftConfig
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from topd.config import TOPDConfig
from topd.engines.servers.checks import check_servers
from topd.engines.text.checks import check_room, check_text_teacher
from topd.errors import TOPDError, shown
from topd.inputs.models import (
    LOADED,
    ModelSource,
    ModelSpec,
    as_spec,
    check_context,
    config_of,
    source_of,
    tokenizer_of,
)
from topd.inputs.models.adapters import check_apart, check_trainable, try_adapter, with_adapter
from topd.inputs.models.pairs import load_pair, tokenizers_of
from topd.inputs.models.positions import exact_rope
from topd.inputs.prompts import PromptEncoder
from topd.inputs.self_teacher import SelfTeacher, self_teacher_of
from topd.inputs.teachers import NO_ROUTES, Routes, Teachers
from topd.inputs.text_models import is_by_text
from topd.training.experience import REWRITTEN
from topd.training.experience.overlap import check_overlap
from topd.training.inherited import check_inherited, with_one_figure
from topd.training.learning.router import check_router
from topd.training.sharded import fsdp_plugin
from topd.training.startup.preflight import without_dropout
from topd.training.startup.text_needs import check_gives
from topd.types import Prompt

logger = logging.get_logger(__name__)

DataRows: TypeAlias = datasets.Dataset | Sequence[dict[str, Any]]
Rows: TypeAlias = DataRows | Sequence[str]
Sources: TypeAlias = tuple[ModelSource, ...]  # the student's, then those of its teachers
Tokenizers: TypeAlias = tuple[PreTrainedTokenizerBase, ...]  # likewise
AnyTeacher: TypeAlias = ModelSource | Mapping[str, Any] | Teachers | SelfTeacher


def sources_of(student: ModelSource | Mapping[str, Any], teacher: AnyTeacher | None) -> Sources:
    """Where student and teachers come from. Raises TOPDError for what is no source."""
    if teacher is None:
        raise TOPDError(
            "teacher_model: is missing. Name a teacher. A warm start from data with kd_ratio: 0 "
            "learns nothing of it: there the path of the student does."
        )
    ours = source_of("model", student)
    if self_teacher_of(teacher):
        if isinstance(ours, ModelSpec) and ours.served:
            raise TOPDError("teacher: self needs the student here. Leave student.served out.")
        return ours, ours
    if isinstance(teacher, Teachers):
        return ours, *teacher.distinct
    theirs = source_of("teacher_model", teacher)
    if isinstance(ours, ModelSpec) and not isinstance(theirs, LOADED):
        ours = ours.with_tokenizer_of(as_spec(theirs))
    return ours, theirs


def routes_of(teacher: object, args: TOPDConfig) -> Routes:
    """Which teacher reads which row. Raises TOPDError where a setting of several has no effect."""
    if isinstance(teacher, Teachers):
        for name in ("window_rejoin", "teacher_column"):
            if args.teachers_mix == "mean" and getattr(args, name) != getattr(TOPDConfig, name):
                raise TOPDError(f"{name}: has no effect with teachers_mix: mean. Leave it out.")
        return Routes(teacher.places, args.teachers_mix, args.teacher_column)
    for name in ("teachers_mix", "teacher_column"):
        if getattr(args, name) != getattr(TOPDConfig, name):
            raise TOPDError(f"{name}: has no effect with one teacher. Leave it out.")
    return NO_ROUTES


def tokenizers_of_all(
    sources: Sources,
    student: PreTrainedTokenizerBase | None = None,
    teacher: PreTrainedTokenizerBase | None = None,
) -> Tokenizers:
    """The tokenizers of a student and its teachers, after the checks of each pair.

    Raises TOPDError as :func:`~topd.inputs.models.pairs.tokenizers_of`.
    """
    ours, *theirs = sources
    if theirs == [ours] and isinstance(ours, LOADED):  # its own teacher
        known = student or tokenizer_of(ours)
        return known, teacher or known
    pairs = [tokenizers_of(ours, source, student, teacher) for source in theirs]
    return pairs[0][0], *(own for _, own in pairs)


def check_arguments(
    args: Any, kind: type[TOPDConfig], sources: Sources, train: Any, evaluation: Any
) -> None:
    """What can be said before anything is read; ``kind`` is the trainer's. Raises TOPDError."""
    if not isinstance(args, kind):
        raise TOPDError(f"args: must be a {kind.__name__}, not {type(args).__name__}.")
    if args.learns_from_answers and kind is TOPDConfig:
        raise TOPDError(
            f"args: a {type(args).__name__} is for topd.training.warmstart.WarmstartTrainer, and "
            "here the student learns from its own samples. Give a TOPDConfig, or take that trainer."
        )
    check_no_columns("eval_dataset", evaluation)
    sets = {f"eval_dataset {key!r}": rows for key, rows in sets_of(evaluation).items() if key}
    given = {"train_dataset": train, "eval_dataset": None if sets else evaluation}
    given = {name: rows for name, rows in given.items() if rows is not None}
    for name, rows in {**given, **sets}.items():
        _check_rows(name, rows)
    check_inherited(args)
    if sets and (settings := with_one_figure(args)):
        raise TOPDError(
            f"{settings[0]}: with several evaluation sets there is no one figure to go by. Give "
            "eval_dataset one set."
        )
    check_gives(sources[1:], args)
    if args.eval_strategy != "no" and evaluation is None:
        raise TOPDError("eval_strategy: needs data: give eval_dataset (eval_data in a recipe).")
    if args.overlap:
        for teacher in sources[1:]:
            check_overlap(sources[0], teacher, args)
    if args.n_gpu > 1:
        logger.warning(
            f"{args.n_gpu} GPUs are visible; a process uses one. For all: accelerate launch."
        )
        args._n_gpu = 1  # else Trainer would run DataParallel, over other rollouts than asked for


def check_no_columns(name: str, data: Any) -> None:
    """Refuse lists by column, which are no sets of rows by name. Raises TOPDError."""
    if isinstance(data, dict) and data.keys() & {"prompt", "messages"}:
        raise TOPDError(
            f"{name}: is a mapping of columns ({', '.join(map(str, data))}). Give rows: a list, "
            "datasets.Dataset.from_dict(...), or of a data set select(range(8)), not [:8]."
        )


def _check_rows(name: str, rows: Any) -> None:
    """What is no set of rows. Raises TOPDError."""
    if isinstance(rows, datasets.IterableDataset):
        raise TOPDError(f"{name}: streaming is not supported. Load it, or take a part of it.")
    check_no_columns(name, rows)
    if isinstance(rows, dict):
        splits = ", ".join(map(str, rows)) or "none"
        raise TOPDError(f"{name}: has splits {splits}. Choose one of them.")
    if isinstance(rows, str | Path):
        raise TOPDError(
            f"{name}: is a path. Load it: topd.inputs.rows.DataSpec(path={str(rows)!r}).load()."
        )
    if not (hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")):
        raise TOPDError(f"{name}: {shown(rows)} has no rows. Give a list of them, or a data set.")
    mappings = isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows)
    if isinstance(rows, Sequence) and not (_are_texts(rows) or mappings):
        raise TOPDError(
            f"{name}: its rows must be texts, or mappings such as {{'prompt': 'What is 1 + 2?'}}."
        )


def _are_texts(rows: Any) -> bool:
    of_rows = isinstance(rows, Sequence) and not isinstance(rows, str)
    return of_rows and all(isinstance(row, str) for row in rows)


def rows_of(data: Any) -> Any:
    """The rows of a DataFrame of pandas, a Dataset of torch or a list of texts; others as they are.

    Raises TOPDError: a DataFrame has a column twice.

    >>> rows_of(["What is 1 + 2?"])
    [{'prompt': 'What is 1 + 2?'}]
    """
    if _are_texts(data):
        return [{"prompt": text} for text in data]
    if hasattr(data, "iloc") and hasattr(data, "columns"):
        if not data.columns.is_unique:
            twice = data.columns[data.columns.duplicated()][0]
            raise TOPDError(f"data: the column {twice!r} is there twice. Rename one.")
        short = data.select_dtypes(["float16", "float32"])  # else 0.1 is 0.10000000149011612
        for kind in (str, float):
            data = data.astype(dict.fromkeys(short, kind))
        return data.to_dict("records")
    if hasattr(data, "__len__") and not hasattr(data, "__iter__"):  # torch's, which may have no end
        return [data[index] for index in range(len(data))]
    return data


def sets_of(evaluation: Any) -> dict[str, Any]:
    """Sets of rows by name; a single one under the empty name, none at all as no set."""
    if isinstance(evaluation, dict):
        return evaluation
    return {} if evaluation is None else {"": evaluation}


def encoder_of(
    tokenizers: Tokenizers,
    args: TOPDConfig,
    routes: Routes = NO_ROUTES,
    *,
    by_text: bool = False,
    ends: Sequence[int] = (),
) -> PromptEncoder:
    """Encodes prompts for a student and its teachers with the templates and limits of ``args``."""
    return PromptEncoder(
        tokenizers[0],
        tokenizers[1:],
        args.teacher_prompt,
        args.max_prompt_length,
        args.drop_long_prompts,
        cast(dict[str, Any], args.chat_template_kwargs or {}),
        routes,
        args.reference,
        by_text,
        args.environment is not None,
        frozenset(ends),
    )


def check_sources(
    sources: Sources, tokenizers: Tokenizers, prompts: Sequence[Prompt], args: TOPDConfig
) -> None:
    """Whether contexts and servers are long enough for these prompts. Raises TOPDError.

    An answer that is there is as long as it is; one to come may have ``max_completion_length``.
    """
    response = args.max_completion_length
    answers = [response if p.response is None else len(p.response) for p in prompts]
    student, teacher = (
        max((len(ids) + own for ids, own in zip(texts, answers, strict=True)), default=response)
        for texts in ([p.student for p in prompts], [p.teacher for p in prompts])
    )
    method = args.guidance_method()
    ahead = max(method.beyond(args.longest_window), REWRITTEN if args.detector.windows else 0)
    learned = ahead if "branches" in method.learns else 0
    check_context("student", sources[0], student, learned)
    served = learned if method.goes_on else 0  # what it is asked to write
    check_servers("student", sources[0], tokenizers[0], student, served)
    for source, tokenizer in zip(sources[1:], tokenizers[1:], strict=True):
        if is_by_text(source):
            if source.as_text and getattr(args, "answers", "teacher") == "teacher":
                assert isinstance(source, ModelSpec)
                writes = args.learns_from_answers or args.teacher_share
                check_room(source, prompts, response if writes else ahead)
            whole = args.sampling if args.learns_from_answers else None
            most = teacher if whole else teacher + ahead
            pair = tokenizers[0], tokenizer
            check_text_teacher(source, pair, prompts, whole=whole, most=most)
            continue
        check_context("teacher", source, teacher, ahead)
        check_servers("teacher", source, tokenizer, teacher, ahead)


def check_optimizer(
    student: ModelSource, lora: PeftConfig | None, optimizers: tuple[Optimizer | None, Any]
) -> None:
    """Whether an optimiser that was given has all that is to be trained, and a schedule it.

    Raises TOPDError; under FSDP for any that was given.
    """
    optimizer, schedule = optimizers
    if fsdp_plugin() and (optimizer is not None or schedule is not None):
        raise TOPDError(
            "optimizers: transformers takes none under FSDP, which shards the weights that they "
            "have. Leave them out, and set optim, optim_args and lr_scheduler_type."
        )
    own = getattr(schedule, "optimizer", optimizer)  # or what is wrapped by the other
    groups = [getattr(one, "param_groups", None) for one in (own, optimizer)]
    other = own is not optimizer and groups[0] is not groups[1]
    if schedule is not None and (optimizer is None or other):
        raise TOPDError(
            "optimizers: the schedule is not one of the optimiser that trains, whose rates it "
            "would not change. Give both, the schedule made from the optimiser."
        )
    if optimizer is None:
        return
    if lora is not None:
        raise TOPDError(
            "optimizers: the optimiser was made before the adapter of peft_config and has none of "
            "its weights. Wrap the model first (peft.get_peft_model), make the optimiser from the "
            "result's parameters, and give both without peft_config."
        )
    if not isinstance(student, LOADED):
        raise TOPDError(
            "optimizers: the optimiser was made before the student is loaded and has none of its "
            "weights. Load it first (topd.inputs.models.ModelSpec(path=...).load_model()), make "
            "the optimiser from its parameters, and give both."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    if missing := [name for name, p in trained if id(p) not in held]:
        raise TOPDError(
            f"optimizers: {len(missing)} of the student's {len(trained)} trainable parameters are "
            f"not in the optimiser, such as {missing[0]}. Make it from the parameters of the "
            "model that you give, and freeze those that are not to be trained "
            "(requires_grad_(False))."
        )


def check_student(
    sources: Sources, args: TOPDConfig, lora: PeftConfig | None, own: SelfTeacher | None
) -> None:
    """Whether an adapter fits the student, and the settings a self-teacher. Raises TOPDError."""
    if lora is not None:
        try_adapter(config_of(sources[0]), lora, sources[0])
    if own and args.window_replay:
        raise TOPDError(
            "window_replay: keeps the states of a teacher that stays as it is. Leave it out, or "
            "take another teacher than self."
        )


def load_models(
    sources: Sources,
    args: TOPDConfig,
    lora: PeftConfig | None,
    *,
    trained: bool,
    own: SelfTeacher | None = None,
) -> tuple[PreTrainedModel, ...]:
    """Student, with its adapter if it gets one, and teachers; checked as far as they can be alone.

    Raises:
        TOPDError: models that cannot be loaded, share weights or are on other devices, or a
            student that is to be ``trained`` and cannot be.
    """
    student, *teachers = _loaded(sources, own)
    for role, model in (("student", student), *(("teacher", teacher) for teacher in teachers)):
        exact_rope(role, model)
    if lora is not None:
        set_seed(args.seed)  # of the adapter's first weights
        student = with_adapter(student, lora)
    _check_placed("student", student, args.device)
    for teacher in teachers:
        _check_placed("teacher", teacher, args.device)
        check_apart(student, teacher)
    if trained:
        check_trainable(student)
        check_router(student)
        _warn_of_coarse_weights(student)
    if args.disable_dropout:
        without_dropout(student)
    if own:
        teachers = [student if own.ema is None else copy.deepcopy(student)]
    return student, *teachers


def _loaded(sources: Sources, own: SelfTeacher | None) -> tuple[PreTrainedModel, ...]:
    """Student and teachers; the student alone where it is its own."""
    if own:
        first = sources[0]
        return (first if isinstance(first, LOADED) else as_spec(first).load_model(),)
    student, teacher = load_pair(*sources[:2])
    return student, teacher, *(load_pair(student, source)[1] for source in sources[2:])


def _check_placed(name: str, model: PreTrainedModel, device: torch.device) -> None:
    """Whether Trainer can move a model to where it computes. Raises TOPDError."""
    given = (getattr(model, "hf_device_map", None) or {}).values()
    places = {f"{device.type}:{place}" if isinstance(place, int) else str(place) for place in given}
    here = {str(device), *([device.type] if not device.index else [])}
    if places <= here or places == {"cpu"}:
        if any(weight.is_meta for weight in model.parameters()):
            raise TOPDError(
                f"{name}: is on the meta device, where weights have no values. Load it with "
                "from_pretrained, outside of torch.device('meta')."
            )
        return
    where = ", ".join(sorted(places))
    raise TOPDError(
        f"{name}: device_map has put it on {where}, and the run is on {device}. "
        "Load it without device_map. One that is too large can be served "
        "(docs/how-to/served-teacher.md) or sharded (docs/scaling.md)."
    )


def _warn_of_coarse_weights(student: PreTrainedModel) -> None:
    dtypes = {p.dtype for p in student.parameters() if p.requires_grad}
    if dtypes - {torch.float32, torch.float64}:
        logger.warning(
            f"student: its trainable weights are {dtypes}; small updates are lost in rounding. "
            "Load it in float32 and set bf16: true for mixed precision."
        )
