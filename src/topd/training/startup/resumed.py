"""What a resumed run takes from its current settings, and what only from its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.training_args import OptimizerNames

from topd.config import TOPDConfig
from topd.errors import TOPDError
from topd.training.inherited import FOLLOWING, with_one_figure

OPTIONS = ("weight_decay", "betas", "eps")  # of a group of parameters, besides its rate
KEPT = ("optim", "optim_args", "optim_target_modules")
OF_TRANSFORMERS = frozenset(one.value for one in OptimizerNames)
RATES = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs")  # in the state of FOLLOWING
# of an adapter's configuration, what changes neither its weights nor what they do
FREE = frozenset(
    ("auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights")
    + ("lora_dropout", "peft_version", "revision", "task_type")
)
CONFIG = "adapter_config.json"


def check_resumed(
    checkpoint: Path, student: nn.Module, changed: Mapping[str, Any], args: TOPDConfig
) -> None:
    """Refuse another optimiser or adapter than the checkpoint is of, and what comes too late.

    Args:
        checkpoint: what is resumed from.
        student: as it is before the checkpoint is loaded.
        changed: settings before and now (:func:`topd.runs.checkpoints.check_same`).
        args: the current ones.

    Raises:
        TOPDError: its state would not fit, or would be read as that of other weights; or figures
            of other evaluations would be held against each other.
    """
    if changed.get("config.eval_on_start") == [False, True]:
        raise TOPDError(
            "eval_on_start: has no effect on a run that is resumed: it is for the student before "
            "the first update. Leave it out."
        )
    if "eval_data" in changed and (judged := with_one_figure(args)):
        raise TOPDError(
            f"eval_dataset (eval_data in a recipe): is another than before, and {judged[0]} would "
            "hold its figures against those of the other. Give the same, or start over in another "
            "folder."
        )
    schedules = [args.lr_scheduler_type, *changed.get("config.lr_scheduler_type", ())]
    follows = any(one in FOLLOWING for one in schedules)
    for name in (*KEPT, *(RATES if follows else ())):
        if found := changed.get(f"config.{name}"):
            before, now = found
            given = name == "optim" and now not in OF_TRANSFORMERS
            if given and "versions.topd" in changed:  # earlier ones did not say that one was given
                continue
            raise TOPDError(
                f"resume_from_checkpoint: {name} was {before!r} and is {now!r}: {checkpoint} has "
                "a state of the optimiser and its schedule that goes with the former. Set it as it "
                "was, or start over in another folder."
            )
    adapters = student.peft_config if isinstance(student, PeftModel) else {}
    if not adapters and (checkpoint / CONFIG).exists():
        raise _another(checkpoint, "has an adapter, and the student has none")
    for name, config in adapters.items():
        path = checkpoint / ("" if name == "default" else name) / CONFIG
        if not path.exists():
            raise _another(checkpoint, f"has no adapter {name!r}, and the student has one")
        then, now = json.loads(path.read_text(encoding="utf-8")), _plain(config.to_dict())
        for key in sorted(then.keys() & now.keys() - FREE):
            if _plain(then[key]) != now[key]:
                said = f"has an adapter of {key} {then[key]!r}, and the student's has {now[key]!r}"
                raise _another(checkpoint, said)


def _another(checkpoint: Path, said: str) -> TOPDError:
    return TOPDError(
        f"resume_from_checkpoint: {checkpoint} {said}. Give the same peft_config (lora in a "
        "recipe), or start over in another folder."
    )


def _plain(value: Any) -> Any:
    """As JSON has it, sets in order."""
    if isinstance(value, Mapping):
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return sorted((_plain(own) for own in value), key=str)
    return getattr(value, "value", value)


@contextmanager
def current_options(optimizer: Any, scheduler: Any) -> Iterator[None]:
    """Inside, the state of both is loaded, which brings the options that they were saved with.

    After it groups of parameters have the options that they were made with, and the rate that the
    current learning rate and schedule have at this update.
    """
    given = [{**group, "params": None} for group in optimizer.param_groups]
    yield
    schedule = getattr(scheduler, "scheduler", scheduler)
    parts = list(_parts(schedule))
    cycles = any(getattr(part, "use_beta1", False) for part in parts)  # betas are its state
    for i, (group, fresh) in enumerate(zip(optimizer.param_groups, given, strict=True)):
        options = [key for key in OPTIONS if key in fresh and not (cycles and key == "betas")]
        group.update({key: fresh[key] for key in options})
        if "initial_lr" not in fresh:  # of a schedule that follows evaluations
            continue
        rate, before = fresh["initial_lr"], group["initial_lr"]
        group["initial_lr"] = rate
        for part in parts:
            if hasattr(part, "base_lrs"):
                part.base_lrs[i] = rate
        if isinstance(schedule, LambdaLR):
            group["lr"] = rate * schedule.lr_lambdas[i](schedule.last_epoch)
        elif rate != before:
            group["lr"] *= rate / before
        schedule._last_lr[i] = group["lr"]


def _parts(schedule: Any) -> Iterator[Any]:
    """A schedule, and those that it is made of (SequentialLR, ChainedScheduler)."""
    yield schedule
    for part in getattr(schedule, "_schedulers", ()):
        yield from _parts(part)
