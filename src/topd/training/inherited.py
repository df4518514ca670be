"""Every argument that TOPDConfig inherits from transformers: it works, or it is refused.

A setting without effect would be worse than an error: the run would not be what it says it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.trainer_utils import SchedulerType

from topd.config import TOPDConfig
from topd.errors import TOPDError

_WORKS = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate
    lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1
    adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps max_grad_norm bf16
    fp16 tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs torch_empty_cache_steps logging_strategy logging_steps
    logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica
    disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
    eval_on_start do_eval save_only_model save_strategy save_steps
    save_total_limit hub_private_repo hub_model_id hub_revision load_best_model_at_end
    metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed use_cpu accelerator_config
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    dataloader_in_order ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph ddp_backend ddp_timeout skip_memory_metrics resume_from_checkpoint local_rank
"""
WORKS = frozenset(_WORKS.split())
ELSEWHERE = frozenset(  # refused, or held to a value, by TOPDConfig itself
    ["fsdp", "fsdp_config", "deepspeed", "push_to_hub", "hub_token", "remove_unused_columns"]
)
READ_ONCE = (  # when a trainer is made: what they are changed to afterwards has no effect
    *("output_dir", "seed", "bf16", "fp16", "per_device_train_batch_size", "method", "token_loss"),
    *("temperature", "max_prompt_length", "drop_long_prompts", "teacher_prompt", "reference"),
    *("chat_template_kwargs", "environment", "teachers_mix", "teacher_column", "window_replay"),
    *("overlap", "disable_dropout", "answers"),
)
_LOSS = "the loss is TOPD's own"
_ORDER = "the order of the prompts follows from seed alone, and is resumed and audited by it"
_COMPILED = "the student's layers are called without the compiled wrapper"
_NO_OUTPUTS = "an evaluation keeps a mean divergence and no outputs"
FOLLOWING = ("reduce_lr_on_plateau", "greedy")  # schedules that follow evaluations
REFUSED: Mapping[str, str] = {
    "label_smoothing_factor": _LOSS,
    "label_names": _LOSS,
    "average_tokens_across_devices": "the mean is always over the tokens of all ranks",
    "data_seed": _ORDER,
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "use_liger_kernel": "the head's loss is chunked here already, and the kernel's is not called",
    "liger_kernel_config": "use_liger_kernel is not supported",
    "use_cache": "learning reads whole rollouts, and sampling always keeps a cache",
    "neftune_noise_alpha": (
        "noise in training only would part it from the sampling; a warm start may have it"
    ),
    "auto_find_batch_size": "a second attempt would begin inside the records of the first",
    "bf16_full_eval": "an evaluation is made in the precision of the training",
    "fp16_full_eval": "an evaluation is made in the precision of the training",
    "include_num_input_tokens_seen": "metrics.jsonl and rollouts.jsonl count tokens already",
    "prediction_loss_only": _NO_OUTPUTS,
    "eval_do_concat_batches": _NO_OUTPUTS,
    "eval_use_gather_object": _NO_OUTPUTS,
    "eval_accumulation_steps": _NO_OUTPUTS,
    "include_for_metrics": _NO_OUTPUTS,
    "batch_eval_metrics": _NO_OUTPUTS,
    "enable_jit_checkpoint": (
        "at SIGTERM topd train saves a run already, and so does train() in Python inside "
        "`with trainer.watch.until_terminated():`"
    ),
    "save_on_each_node": "one rank writes the run folder, which all nodes see",
    "hub_strategy": "nothing is uploaded while a run is under way",
    "hub_always_push": "nothing is uploaded while a run is under way",
    "parallelism_config": "ranks are the launcher's to say (docs/scaling.md)",
    "debug": "its hooks need a forward of the whole model",
    "do_train": "it is for scripts: call train()",
    "do_predict": "it is for scripts: use topd eval",
}


def check_inherited(args: TOPDConfig) -> None:
    """Refuse an inherited argument that would have no effect. Raises TOPDError, with the reason."""
    defaults = {f.name: f.default for f in fields(TOPDConfig)}
    for name, reason in REFUSED.items():
        value = getattr(args, name, None)  # transformers may not have it in another version
        if value in (defaults.get(name), None, "", []):
            continue
        if name == "neftune_noise_alpha" and args.learns_from_answers:
            continue
        raise TOPDError(f"{name}: {value!r} has no effect here: {reason}. Leave it out.")
    if args.fp16 and args.device.type == "cpu":
        raise TOPDError("fp16: has no effect on a CPU. Set bf16, or leave it out.")
    _check_best(args)


def read_once(args: TOPDConfig) -> dict[str, Any]:
    """The settings of :data:`READ_ONCE`."""
    return {name: getattr(args, name) for name in READ_ONCE if hasattr(args, name)}


def check_as_read(args: TOPDConfig, before: Mapping[str, Any]) -> None:
    """Refuse what was changed since a trainer was made and has no effect any more.

    ``before`` is what :func:`read_once` gave when it was made. Raises TOPDError.
    """
    for name, now in read_once(args).items():
        if now != before[name]:
            raise TOPDError(
                f"{name}: was {before[name]!r} when the trainer was made, which reads it then, and "
                f"is {now!r} now. Make a new trainer with it."
            )


def with_one_figure(args: TOPDConfig) -> list[str]:
    """The settings that go by the figure of an evaluation."""
    named = args.lr_scheduler_type  # or the class of one that was given
    schedule = named.value if isinstance(named, SchedulerType) else named
    asked = {
        "load_best_model_at_end": args.load_best_model_at_end,
        "save_strategy best": args.save_strategy == "best",
        f"lr_scheduler_type {schedule}": schedule in FOLLOWING,
    }
    return [name for name, is_set in asked.items() if is_set]


def _check_best(args: TOPDConfig) -> None:
    """What the best model is known by: an evaluation's mean divergence, the only figure it gives.

    Raises TOPDError.
    """
    settings = with_one_figure(args)
    if settings and args.eval_strategy == "no":
        raise TOPDError(
            f"{settings[0]}: has no effect without evaluations. Set eval_strategy and eval_data."
        )
    if args.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise TOPDError(
            f"metric_for_best_model: an evaluation gives eval_loss, not "
            f"{args.metric_for_best_model!r}. Leave it out."
        )
    if args.greater_is_better:
        raise TOPDError(
            "greater_is_better: the figure is a divergence, so the largest is the worst. Leave it "
            "out."
        )
