"""Settings that are handed on to others, tried on those before a model is read.

Names come from the real thing's signature, values from a trial: of torch's recomputation, the
optimiser, the schedule and the loader. What would have no effect is refused.
"""

from __future__ import annotations

import copy
import inspect
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer
from transformers.integrations import get_reporting_integration_callbacks
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType

from topd.config import CHECKPOINTING, TOPDConfig
from topd.config.values import defaults_of, worked_out
from topd.errors import LIBRARY_FAULTS, TOPDError
from topd.training.sharded import try_optimizer

RATE = "learning_rate"
OF_OPTIMISER = (
    *(RATE, "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("optim", "optim_args", "optim_target_modules"),
)
OF_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
UPDATES = 1000  # of the trial schedule, where a run does not say how many it has
_GIVEN_BY_TRAINER = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
_CONSTANT = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)  # not given their options


def check_settings(args: TOPDConfig, optimizers: tuple[Any, Any]) -> None:
    """Make loggers, a loader, optimiser and schedule of a small layer. Raises TOPDError.

    An optimiser that names its modules is made with the student only.
    """
    _check_checkpointing(args)
    _check_accelerator(args)
    optimizer, schedule = optimizers
    trial, usual = copy.copy(args), defaults_of(type(args))
    if optimizer is not None:
        _check_one_loss(optimizer)
        _take_optimiser(args, optimizer)
        trial.optim = usual["optim"]
    if schedule is not None:
        _check_effect(args, OF_SCHEDULE, [{"warmup_steps": 0}], "a schedule")
        worked_out(args, OF_SCHEDULE[0], type(schedule).__name__)
        trial.lr_scheduler_type = usual[OF_SCHEDULE[0]]
    with tempfile.TemporaryDirectory() as folder:
        trial.output_dir = folder
        with _place(f"report_to {args.report_to}"):
            for logger_of in get_reporting_integration_callbacks(args.report_to):
                logger_of()
        with _place("settings"):
            layer = nn.Linear(64, 64 * args.world_size)  # 8-bit optimisers have small ones in 32
            trainer = Trainer(layer, trial, train_dataset=[0], eval_dataset=[0])
        with _place("dataloader settings"):
            trainer.get_train_dataloader()
        if optimizer is None:
            _check_optimiser(args)
        if args.optim_target_modules:
            return
        with _place(f"optim {_word(trial.optim)}"):
            trainer.create_optimizer()
        with _place(f"lr_scheduler_type {_word(trial.lr_scheduler_type)}"):
            _check_schedule(trainer)
        with _place(f"optim {_word(args.optim)}, under FSDP2"):
            try_optimizer(layer, trainer.optimizer, trainer.accelerator)


@contextmanager
def _place(name: str) -> Iterator[None]:
    """Turn what the real thing says into a TOPDError that names the setting."""
    try:
        yield
    except TOPDError:
        raise
    except LIBRARY_FAULTS as error:
        raise TOPDError(
            f"{name}: cannot be used: {type(error).__name__}: {str(error).rstrip('.')}. "
            "Choose another, or install what it needs."
        ) from error


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))


def _refuse(given: Mapping[str, Any], known: set[str], name: str) -> None:
    """Raise TOPDError for a key that the real thing does not have."""
    for key in given:
        if key not in known:
            has = ", ".join(sorted(known)) or "none"
            raise TOPDError(f"{name}: unknown key {key!r}. Known: {has}.")


def _check_checkpointing(args: TOPDConfig) -> None:
    """Options of the recomputation of activations: torch's, and those of transformers' method."""
    name = f"{CHECKPOINTING}_kwargs"
    given = dict(getattr(args, name, None) or {})
    if not given:
        return
    if not getattr(args, CHECKPOINTING):
        raise TOPDError(f"{name}: has no effect without {CHECKPOINTING}: true. Set it.")
    enable = getattr(PreTrainedModel, f"{CHECKPOINTING}_enable")
    switches = {
        key: given.pop(key) for key in ("every_n_layers", "offload") if key in _named(enable)
        and key in given
    }  # fmt: skip
    every = switches.get("every_n_layers", 1)
    if not isinstance(every, int) or every < 1:
        raise TOPDError(f"{name}: every_n_layers: {every!r} must be a whole number above 0.")
    _refuse(given, {*_named(checkpoint), "preserve_rng_state"} - {"function"}, name)
    for key in ("use_reentrant", "preserve_rng_state", "debug", "early_stop"):
        if key in given and not isinstance(given[key], bool):
            raise TOPDError(f"{name}: {key}: {given[key]!r} must be true or false.")
    with _place(name):
        one = torch.ones(1, requires_grad=True)
        checkpoint(torch.exp, one, **{"use_reentrant": True, **given}).backward()


def _named(function: Any) -> set[str]:
    """The names of what a function takes, without its catch-alls."""
    taken = inspect.signature(function).parameters.values()
    return {one.name for one in taken if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}


def _check_accelerator(args: TOPDConfig) -> None:
    """Of accelerate's settings only the synchronisation of gradients has an effect here."""
    given = args.accelerator_config
    if not isinstance(given, AcceleratorConfig):
        return
    more = dict(given.gradient_accumulation_kwargs or {})
    sync = more.pop("sync_each_batch", False)
    if not isinstance(sync, bool):
        raise TOPDError(f"accelerator_config: sync_each_batch: {sync!r} must be true or false.")
    if more:
        raise TOPDError(
            f"accelerator_config: gradient_accumulation_kwargs: {', '.join(more)}: has no effect "
            "here, or breaks the accounting of rollouts. Set gradient_accumulation_steps."
        )
    plain = replace(given, gradient_accumulation_kwargs=None)
    other = [k for k, v in AcceleratorConfig().to_dict().items() if getattr(plain, k) != v]
    if other:
        raise TOPDError(
            f"accelerator_config: {', '.join(other)}: has no effect here: prompts, not tensors, "
            "are loaded, in an order that follows from seed alone. Leave it out."
        )


def _check_optimiser(args: TOPDConfig) -> None:
    """Every option that is given must change what the optimiser is made with."""

    def made(**options: Any) -> str:
        trial = copy.copy(args)
        for name, value in options.items():
            setattr(trial, name, value)
        try:
            return str(Trainer.get_optimizer_cls_and_kwargs(trial, nn.Linear(2, 2)))
        except LIBRARY_FAULTS as error:  # it was read, at least
            return str(error)

    said = f"has no effect with optim {_word(args.optim)}. Leave it out"
    numbers, modules = (0.5, 0.25), ("all-linear", "attn")  # one of two is not what was given
    for name, others in (
        ("adam_beta1", numbers), ("adam_beta2", numbers), ("adam_epsilon", numbers),
        ("optim_target_modules", modules),
    ):  # fmt: skip
        if getattr(args, name) == getattr(TOPDConfig, name):
            continue
        if all(made() == made(**{name: other}) for other in others):
            raise TOPDError(f"{name}: {said}.")
    for part in (args.optim_args or "").split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        values = (value or "1", "1", "2")
        if key and all(made(optim_args=f"{key}={x}") == made(optim_args=None) for x in values):
            raise TOPDError(f"optim_args: {key!r} {said}, or correct its name.")


def _check_one_loss(optimizer: Any) -> None:
    """Refuse an optimiser whose step evaluates the loss itself. Raises TOPDError."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TOPDError(
            f"optimizers: {type(optimizer).__name__} asks for the loss several times a step, and "
            "an update's rollouts are learned once. Give one that does not, such as AdamW."
        )


def _take_optimiser(args: TOPDConfig, optimizer: Any) -> None:
    """Of an optimiser that was given its rate counts, here and in the records of the run."""
    held = [_settings_of(group) for group in optimizer.param_groups]
    _check_effect(args, OF_OPTIMISER, held, "an optimiser")
    worked_out(args, RATE, max(float(own[RATE]) for own in held))
    worked_out(args, "optim", type(optimizer).__name__)


def _check_effect(
    args: TOPDConfig, names: Sequence[str], held: Sequence[Mapping[str, Any]], given: str
) -> None:
    """Refuse settings of what was given instead, unless that has the same. Raises TOPDError."""
    usual = defaults_of(type(args))
    for name in names:
        value = getattr(args, name)
        asked = name not in args.left_out and value != usual[name]
        if asked and all(value != own.get(name) for own in held):
            raise TOPDError(
                f"{name}: {_word(value)} has no effect: {given} was given (optimizers), which "
                f"has its own. Leave it out, or give no {given.partition(' ')[2]}."
            )


def _settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group of an optimiser's parameters is learned with, by the names of the settings."""
    first, second = (*(group.get("betas") or ()), None, None)[:2]
    return {
        RATE: group.get("initial_lr", group["lr"]), "weight_decay": group.get("weight_decay"),
        "adam_beta1": first, "adam_beta2": second, "adam_epsilon": group.get("eps"),
    }  # fmt: skip


def _check_schedule(trainer: Trainer) -> None:
    """The schedule's options are its own, and its rates are numbers from start to end."""
    args = trainer.args
    kind, given = SchedulerType(args.lr_scheduler_type), dict(args.lr_scheduler_kwargs or {})
    if given and kind in _CONSTANT:
        raise TOPDError(
            f"lr_scheduler_kwargs: {', '.join(given)}: has no effect with {_word(kind)}. Leave it "
            "out."
        )
    function = TYPE_TO_SCHEDULER_FUNCTION[kind]
    if not inspect.getfullargspec(function).varkw:  # else the schedule itself says what it takes
        _refuse(given, _named(function) - _GIVEN_BY_TRAINER, "lr_scheduler_kwargs")
    updates = args.max_steps if args.max_steps > 0 else UPDATES
    schedule = trainer.create_scheduler(updates)
    for rate in schedule.lr_lambdas if isinstance(schedule, LambdaLR) else ():
        factors = [rate(round(updates * part / 20)) for part in range(21)]
        if not all(isinstance(x, int | float) and 0 <= x < math.inf for x in factors):
            raise TOPDError(
                "lr_scheduler_kwargs: give learning rates that are not numbers of at least 0, e.g. "
                f"{next(x for x in factors if not 0 <= x < math.inf)} times learning_rate. Correct "
                "them."
            )
