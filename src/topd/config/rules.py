"""Which values of a configuration are refused, and why."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from transformers.utils import is_torch_bf16_gpu_available

from topd.errors import TOPDError
from topd.methods import METHODS, method_named
from topd.types import BranchLoss

if TYPE_CHECKING:
    from topd.config import TOPDConfig

REFUSED = {
    "fsdp": "FSDP2 is the launcher's to say: accelerate launch, see docs/scaling.md. Leave it out.",
    "deepspeed": "is not supported. Leave it out.",
    "push_to_hub": "would publish the run folder with all prompts and rollouts. Upload its "
    "student/ folder instead (in Python, after train(): trainer.push_to_hub()).",
    "hub_token": "a secret would be written into the run folder. Set HF_TOKEN in the environment "
    "instead, and revoke this one if it was in a file.",
}
_RANGES: dict[str, tuple[float, float]] = {  # of a method's options
    "share": (1e-9, 1),
    "tokens": (1, 1e9),
    "beta": (0, 1),
    **dict.fromkeys(("after", "gamma", "threshold"), (0, math.inf)),
}
WITH_TABLES = ("tensorboard", "trackio", "wandb")
RULES: tuple[tuple[str, Any, str], ...] = (  # of what is not None; none is NaN, see values.py
    (
        "beta kd_ratio false_alarm_share teacher_share",
        lambda x: 0 <= x <= 1,
        "must be between 0 and 1",
    ),
    ("top_p candidate_fraction", lambda x: 0 < x <= 1, "must be above 0 and at most 1"),
    ("adam_beta1 adam_beta2", lambda x: 0 <= x < 1, "must be at least 0 and below 1"),
    (
        "temperature epsilon max_logprob_gap num_train_epochs",
        lambda x: x > 0,
        "must be finite and above 0",
    ),
    (
        "trajectory_weight position_weight window_temperature window_rejoin window_replay top_k "
        "learning_rate stop_length stop_finished stop_fresh stop_entropy stop_divergence "
        "weight_decay adam_epsilon max_grad_norm eval_delay dataloader_num_workers",
        lambda x: x >= 0,
        "must be finite and at least 0",
    ),
    ("max_importance", lambda x: x >= 1, "must be finite and at least 1"),
    (
        "max_prompt_length max_completion_length num_generations window_gap look_ahead_every "
        "max_turns chunk_tokens score_batch_size "
        "per_device_train_batch_size per_device_eval_batch_size "
        "gradient_accumulation_steps stop_patience save_total_limit torch_empty_cache_steps "
        "dataloader_prefetch_factor ddp_timeout ddp_bucket_cap_mb",
        lambda x: x >= 1,
        "must be at least 1",
    ),
    ("seed", lambda x: 0 <= x < 1 << 32, "must be from 0 to 4294967295"),
    (
        "max_steps",
        lambda x: x == -1 or x >= 1,
        "must be a number of updates, or left out: it would train nothing",
    ),
    (
        "window_length logging_steps save_steps eval_steps",
        lambda x: 0 < x < 1 or x == int(x) >= 1,
        "must be at least 1 and whole, or a share above 0 and below 1",
    ),
    (
        "look_ahead_until",
        lambda x: x == "auto" if isinstance(x, str) else 0 < x < 1 or x == int(x) >= 1,
        "must be at least 1 and whole, or a share above 0 and below 1, or auto",
    ),
    (
        "warmup_steps",
        lambda x: 0 <= x < 1 or x == int(x) >= 1,
        "must be at least 1 and whole, or a share of at least 0 and below 1",
    ),
    ("remove_unused_columns", lambda x: not x, "must be off: prompts are encoded at the start"),
)


def check_values(config: TOPDConfig) -> None:
    """What is out of range, or has no effect. Raises TOPDError."""
    for names, holds, rule in RULES:
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not holds(value):
                raise TOPDError(f"{name}: {value!r} {rule}.")
    if config.token_loss != "full":
        _check_token_loss(config)
    logged = config.token_loss == "full" and config.logging_strategy != "no"
    if config.look_ahead_until == "auto" and not logged:
        raise TOPDError(
            "look_ahead_until: auto goes by the divergence of each log, which there is with "
            "token_loss: full and logging. Give a number or a share of updates."
        )
    if config.kd_ratio != 1 and not config.learns_from_answers:
        raise TOPDError(
            "kd_ratio: cross-entropy on the student's own samples has no signal. Leave it at "
            "1, or run a warm start."
        )
    if config.window_replay and not method_named(config.method).looks_ahead:
        raise TOPDError(
            f"window_replay: {config.method} does not look ahead, so it has no windows to learn "
            "again. Leave it out, or choose a method with windows."
        )
    if config.window_replay and config.save_strategy != "no":
        raise TOPDError(
            "window_replay: a checkpoint does not hold the windows, so a run that resumes from one "
            "would be another. Set save_strategy: 'no'."
        )
    for name, why in REFUSED.items():
        if getattr(config, name):
            raise TOPDError(f"{name}: {why}")
    for name in ("chat_template_kwargs", "method_options"):
        given = getattr(config, name)
        if isinstance(given, str) and not given.startswith("{"):
            raise TOPDError(f"{name}: {given!r} is not a mapping, e.g. {{a: 1}}.")
    if config.reference != "given" and config.teacher_prompt is None:
        raise TOPDError(
            f"reference: {config.reference} has no effect without teacher_prompt. Leave it out."
        )
    if config.bf16 and not (config.use_cpu or is_torch_bf16_gpu_available()):
        raise TOPDError("bf16: no GPU here has it. Leave it out, or set use_cpu: true.")
    _check_environment(config)
    if config.epsilon != type(config).epsilon and config.solver == "exact":
        raise TOPDError("epsilon: has no effect with solver: exact. Set solver: sinkhorn.")


def _check_environment(config: TOPDConfig) -> None:
    """What does not go with turns, or has no effect without them. Raises TOPDError."""
    if config.environment is None:
        if config.max_turns != type(config).max_turns:
            raise TOPDError("max_turns: has no effect without environment. Leave it out.")
        return
    if config.max_turns < 2:
        raise TOPDError(
            "max_turns: 1 leaves the environment nothing to reply to. Raise it, or leave out "
            "environment."
        )
    if config.learns_from_answers:
        raise TOPDError(
            "environment: answers written beforehand have one turn. Leave it out of a warm start."
        )
    for name in ("teacher_share", "overlap", "window_rejoin", "window_replay"):
        if getattr(config, name):
            raise TOPDError(f"{name}: does not go with environment. Leave one of them out.")


def _check_token_loss(config: TOPDConfig) -> None:
    """What goes with a token loss that is not full. Raises TOPDError."""
    kind = f"token_loss: {config.token_loss}"
    if config.learns_from_answers:
        raise TOPDError(f"{kind} is for rollouts. A warm start has kd_ratio: leave it out.")
    if config.token_loss == "spans" and config.environment is not None:
        raise TOPDError(f"{kind} does not go with environment. Leave one of them out.")
    if config.beta != 1:
        raise TOPDError(f"beta: has no effect with {kind}. Leave it out.")
    if config.teacher_share:
        raise TOPDError(
            f"teacher_share: with {kind} nothing is learned of what the teacher writes. Leave it "
            "out; stage 1 (topd warmstart) learns its answers."
        )
    looks_always = config.look_ahead_until is None and config.look_ahead_every == 1
    if config.token_loss == "none" and not looks_always:
        raise TOPDError(
            f"{kind} learns nothing in updates that do not look ahead. Set look_ahead_every: 1 "
            "and look_ahead_until: null."
        )


def check_options(name: str, options: Mapping[str, Any], loss: str = "full") -> None:
    """Raises TOPDError for a method or an option that does not exist, or a value out of range.

    ``loss`` is ``token_loss`` of TOPDConfig: an option that has no effect with it is refused too.
    """
    known = inspect.signature(method_named(name).guide).parameters
    has = [*known][1:]
    for option, value in options.items():
        if option not in has:
            raise TOPDError(
                f"method_options: {name} has no option {option!r}. It has: "
                f"{', '.join(has) or 'none'}."
            )
        if (name, option, loss) == ("first_fork", "after", "none"):
            raise TOPDError(
                "method_options: after: weights token losses, of which there are none with "
                "token_loss: none. Leave it out."
            )
        _check_option(name, option, value, known[option].annotation)


def _check_option(name: str, option: str, value: Any, kind: Any) -> None:
    """A value of a method's option against its type and its range. Raises TOPDError."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {"float": number, "int": type(value) is int, "bool": type(value) is bool}
    least, most = _RANGES.get(option, (-math.inf, math.inf))
    if kind == "BranchLoss" and value not in get_args(BranchLoss):
        words = ", ".join(get_args(BranchLoss))
        raise TOPDError(f"method_options: {option}: {value!r} is not one of {words}.")
    if not fits.get(getattr(kind, "__name__", kind), True):
        raise TOPDError(f"method_options: {option}: {value!r} is not of the type {kind}.")
    if name in METHODS and number and not least <= value <= most:
        raise TOPDError(f"method_options: {option}: {value} must be in [{least}, {most}].")


def check_learns(name: str, token_loss: str, trajectory_weight: float) -> None:
    """Refuse a method that is left with nothing to learn, or without effect. Raises TOPDError."""
    method = method_named(name)
    if method.caps and token_loss in ("sampled", "spans"):
        raise TOPDError(
            f"token_loss: {token_loss} leaves {name} without effect: it caps token losses over the "
            "whole distribution. Set token_loss: full, or choose another method."
        )
    none = {"weights"} if token_loss == "none" else set()
    off = {"targets", "branches"} if trajectory_weight == 0 else set()
    if {*method.learns} - none - off:
        return
    if method.of_tokens:
        raise TOPDError(
            f"token_loss: none leaves {name} nothing to learn. Choose a method with windows."
        )
    raise TOPDError(
        f"trajectory_weight: 0 leaves {name} nothing to learn: L_traj is all that it learns"
        f"{' with token_loss: none' if none else ''}. Raise it."
    )


def check_groups(config: TOPDConfig) -> None:
    """Whether an update has all rollouts of a prompt. Raises TOPDError."""
    rollouts = config.per_device_train_batch_size * config.gradient_accumulation_steps
    rollouts *= config.world_size
    if rollouts % config.num_generations:
        ranks = " x ranks" if config.world_size > 1 else ""
        raise TOPDError(
            f"num_generations: {config.num_generations} does not divide the {rollouts} rollouts "
            f"of an update (per_device_train_batch_size x gradient_accumulation_steps{ranks})."
        )


def check_ranks(config: TOPDConfig) -> None:
    """What does not go with several ranks. Raises TOPDError."""
    if method_named(config.method).whole_update:
        raise TOPDError(
            f"method: {config.method} chooses among all rollouts of an update, and a rank has "
            f"only its own. Run one process, with gradient_accumulation_steps."
        )
    if config.window_replay:
        raise TOPDError("window_replay: goes with one process only. Leave it out, or run one.")
    size = config.score_batch_size or config.per_device_train_batch_size
    if config.detector.whole_batch and config.per_device_train_batch_size % size:
        raise TOPDError(
            f"score_batch_size: {size} does not divide per_device_train_batch_size, and "
            f"candidate_loss: {config.candidate_loss} would count over other rollouts than in "
            "one process. Leave it out."
        )
    loader = config.accelerator_config
    if loader.split_batches or loader.dispatch_batches or not loader.even_batches:
        raise TOPDError(
            "accelerator_config: split_batches, dispatch_batches and even_batches: false do "
            "not go with several ranks, which take whole micro-batches in turn. Leave them out."
        )


def check_trackers(config: TOPDConfig) -> None:
    """Completions can be sent, where they are asked for. Raises TOPDError."""
    if not config.log_completions:
        return
    if not any(name in WITH_TABLES for name in config.report_to or ()):
        raise TOPDError(
            f"log_completions: has no effect: report_to names none of {', '.join(WITH_TABLES)}. "
            "Set report_to, or leave it out: rollouts.jsonl and the page have all rollouts."
        )
    if not config.log_rollouts:
        raise TOPDError("log_completions: needs log_rollouts: true. Leave one of them out.")
