"""Which values of a configuration are refused, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from topd.errors import TOPDError
from topd.methods import check_learns, method_named

if TYPE_CHECKING:
    from topd.config import TOPDConfig

REFUSED = {
    "fsdp": "FSDP2 is the launcher's to say: accelerate launch, see docs/scaling.md. Leave it out.",
    "deepspeed": "is not supported. Leave it out.",
    "push_to_hub": "would publish the run folder with all prompts and rollouts. Upload its "
    "student/ folder instead.",
    "hub_token": "a secret would be written into the run folder. Set HF_TOKEN in the environment "
    "instead, and revoke this one if it was in a file.",
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
        "max_turns "
        "chunk_tokens score_batch_size per_device_train_batch_size per_device_eval_batch_size "
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
    check_learns(config.method, config.token_loss, config.trajectory_weight)
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
    rollouts = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if rollouts % config.num_generations:
        raise TOPDError(
            f"num_generations: {config.num_generations} does not divide the {rollouts} rollouts "
            "of an update (per_device_train_batch_size x gradient_accumulation_steps)."
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
