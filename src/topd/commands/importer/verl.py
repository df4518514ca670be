"""What a key of verl is here: (outcome, note, what it sets in the recipe).

Written against verl 0.9 (``verl/trainer/config``). Keys of the recipe are paths such as
``student/path``. What comes out does not depend on the order of keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from topd.commands.importer.rules import OUT, Ruled, number
from topd.errors import TOPDError
from topd.inputs.prompt_rows import UNREAD

ACTOR, MODEL = "actor_rollout_ref.actor.", "actor_rollout_ref.model."
OPTIM, ROLLOUT = f"{ACTOR}optim.", "actor_rollout_ref.rollout."
LOSS, TEMPLATE = "distillation.distillation_loss.", "data.apply_chat_template_kwargs."
DISTILLS = f"{ACTOR}kd_loss_type"  # of verl-recipe's GKD
VERL_DEFAULTS: dict[str, Any] = {  # that differ from ours
    f"{OPTIM}lr": 1e-6,
    f"{OPTIM}weight_decay": 0.01,
    f"{OPTIM}lr_scheduler_type": "constant",
    f"{OPTIM}lr_warmup_steps_ratio": 0.0,
    f"{ACTOR}ppo_mini_batch_size": 256,
    f"{ACTOR}fsdp_config.dtype": "bfloat16",
    f"{MODEL}enable_gradient_checkpointing": True,
    "data.train_batch_size": 1024,
    "data.max_prompt_length": 512,
    "data.max_response_length": 512,
    "trainer.total_epochs": 30,
}
VERL_LORA: dict[str, Any] = {f"{MODEL}lora_alpha": 16, f"{MODEL}target_modules": "all-linear"}
_LORA = {
    f"{MODEL}lora_rank": "r",
    f"{MODEL}lora_alpha": "lora_alpha",
    f"{MODEL}target_modules": "target_modules",
    f"{MODEL}exclude_modules": "exclude_modules",
}
_VERL_MOVED = {
    f"{MODEL}path": "student/path",
    f"{MODEL}enable_gradient_checkpointing": "gradient_checkpointing",
    f"{MODEL}override_config.attn_implementation": "student/attn_implementation",
    **dict.fromkeys(
        ("actor_rollout_ref.ref.model.path", "actor_rollout_ref.ref.teacher_path"), "teacher/path"
    ),
    "distillation.teacher_model.model_path": "teacher/path",
    f"{OPTIM}lr": "learning_rate",
    f"{OPTIM}weight_decay": "weight_decay",
    f"{ACTOR}grad_clip": "max_grad_norm",
    f"{ROLLOUT}n": "num_generations",
    f"{ROLLOUT}temperature": "temperature",
    f"{ROLLOUT}top_p": "top_p",
    "data.max_prompt_length": "max_prompt_length",
    "data.max_response_length": "max_completion_length",
    "data.filter_overlong_prompts": "drop_long_prompts",
    "data.prompt_key": "data/columns/prompt",
    "trainer.total_epochs": "num_train_epochs",
    "trainer.experiment_name": "run_name",
}
_VERL_SETTLED = (  # by what follows from several keys
    *("distillation.enabled", "distillation.distillation_loss.use_task_rewards"),
    *("algorithm.adv_estimator", "distillation.teacher_key", f"{LOSS}use_policy_loss"),
    f"{OPTIM}warmup_style",  # the former name of lr_scheduler_type
)
_IMAGES = ("data.image_key", "data.video_key")
_VERL_REFUSED = {  # where they are on
    **dict.fromkeys(
        (f"{ACTOR}use_kl_loss", "algorithm.use_kl_in_reward"),
        "a second divergence, from another model, is not in the loss",
    ),
    f"{ACTOR}entropy_coeff": "an entropy bonus is not in the loss",
    f"{ROLLOUT}multi_turn.enable": "rollouts with tools are not importable",
    **dict.fromkeys(_IMAGES, "images are not read; take the key out if the data has none"),
}
_VERL_PLAIN: dict[str, Any] = {  # a value with which nothing is learned otherwise than here
    f"{OPTIM}optimizer": "AdamW",
    f"{OPTIM}optimizer_impl": "torch.optim",
    f"{OPTIM}clip_grad": 1.0,
    f"{OPTIM}min_lr_ratio": 0.0,
    f"{OPTIM}num_cycles": 0.5,
    f"{OPTIM}zero_indexed_step": True,
    f"{ACTOR}loss_agg_mode": "token-mean",
    f"{ACTOR}freeze_vision_tower": False,
    f"{ACTOR}use_kl_loss": False,
    f"{ACTOR}entropy_coeff": 0,
    f"{ACTOR}qat.enable": False,
    f"{MODEL}trust_remote_code": False,
    f"{MODEL}mtp.enable": False,
    f"{MODEL}mtp.enable_train": False,
    f"{MODEL}lora.rank": 0,
    f"{ROLLOUT}do_sample": True,
    f"{ROLLOUT}ignore_eos": False,
    f"{ROLLOUT}repetition_penalty": 1.0,
    **dict.fromkeys((f"{ROLLOUT}stop", f"{ROLLOUT}stop_token_ids", f"{ROLLOUT}logit_bias")),
    **dict.fromkeys((f"{ROLLOUT}{n}_penalty" for n in ("presence", "frequency")), 0),
    **dict.fromkeys((f"{ROLLOUT}min_p", f"{ROLLOUT}over_sample_rate"), 0),
    f"{ROLLOUT}multi_turn.enable": False,
    f"{ROLLOUT}agent.default_agent_loop": "single_turn_agent",
    f"{LOSS}distillation_loss_coef": 1.0,
    f"{LOSS}use_policy_gradient": False,
    f"{LOSS}jsd_beta": 0.5,
    "algorithm.use_kl_in_reward": False,
    "data.shuffle": True,
    "data.truncation": "error",
    "data.train_max_samples": -1,
    "trainer.critic_warmup": 0,  # updates before the actor's first
    "trainer.val_only": False,
}
_VERL_MACHINES = (  # where and how fast, and what belongs to rewards, which are off
    *(f"{MODEL}use_{name}" for name in ("shm", "remove_padding", "liger", "fused_kernels")),
    *(f"{MODEL}enable_activation_offload", f"{MODEL}fused_kernel_options."),
    *(f"{MODEL}tiled_mlp.", f"{MODEL}mtp.", f"{MODEL}lora.", f"{MODEL}truncate_padding"),
    *(f"{ACTOR}fsdp_config.", f"{ACTOR}megatron.", f"{ACTOR}checkpoint.", f"{ACTOR}profiler."),
    *(f"{ACTOR}ppo_micro_batch_size", f"{ACTOR}ppo_max_token_len", f"{ACTOR}pad_"),
    *(f"{ACTOR}use_{name}" for name in ("dynamic_bsz", "torch_compile", "fused_kernels")),
    *(f"{ACTOR}use_{name}" for name in ("remove_padding", "prefix_grouper", "rollout_log_probs")),
    *(f"{ACTOR}strategy", f"{ACTOR}ulysses_", f"{ACTOR}entropy_", f"{ACTOR}calculate_"),
    *(f"{ACTOR}rollout_n", f"{ACTOR}router_replay.", f"{ACTOR}qat.", f"{ACTOR}shuffle"),
    *(f"{ACTOR}data_loader_seed", f"{ACTOR}kl_loss_", f"{ACTOR}clip_ratio", f"{ACTOR}tau_"),
    *(f"{ACTOR}policy_loss.", f"{OPTIM}total_training_steps", f"{OPTIM}lr_wsd_"),
    *("actor_rollout_ref.ref.", ROLLOUT, "actor_rollout_ref.hybrid_engine"),
    *("actor_rollout_ref.nccl_timeout", "trainer.", "ray_kwargs.", "critic.", "reward"),
    *("custom_reward", "sandbox_fusion.", "global_profiler.", "transfer_queue.", "config_path"),
    *(f"algorithm.{name}" for name in ("gamma", "lam", "norm_adv", "kl_", "use_pf_ppo", "pf_ppo.")),
    *(f"algorithm.rollout_correction.{name}" for name in ("rollout_is_", "rollout_rs_", "bypass_")),
    *("algorithm.rollout_correction.loss_type", "algorithm.filter_groups.", f"{ACTOR}sum_pi_"),
    *("skip.", "distillation.teacher_model"),
    *("distillation.n_gpus", "distillation.num_workers", "distillation.nnodes"),
    *("distillation.enable_resource_pool", f"{LOSS}topk"),
    *(f"{LOSS}policy_loss_mode", f"{LOSS}clip_ratio", "data.val", "data.dataloader"),
    *("data.return", "data.train_batch", "data.seed", "data.use_shm", "data.image_patch_size"),
    *("data.reward_fn_key", "data.filter_overlong_prompts_workers", "data.audio_key"),
    *("data.tool_config_path", "data.function_tool_path", "data.trust_remote_code"),
)
_LENGTHS = {f"data.max_{name}_length": f"{ROLLOUT}{name}_length" for name in ("prompt", "response")}
_STEPS = {"trainer.save_freq": "save_steps", "trainer.total_training_steps": "max_steps"}
_SAMPLED = "a sampled estimate of the reverse KL; here it is taken over the vocabulary"
_LIKELIEST = "over the likeliest tokens there, over the vocabulary here"
_LOSSES = {  # loss_mode: beta, and what differs
    **dict.fromkeys(("k1", "k2", "k3"), (1.0, _SAMPLED)),
    **dict.fromkeys(("reverse_kl_topk", "reverse_kl"), (1.0, _LIKELIEST)),
    **dict.fromkeys(("forward_kl_topk", "forward_kl"), (0.0, _LIKELIEST)),
    "jsd_topk": (0.5, _LIKELIEST),
}


def verl_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration leaves to verl and we have otherwise."""
    found = dict(VERL_DEFAULTS)
    if content.get(f"{MODEL}lora_rank"):
        found |= VERL_LORA
    if content.get("distillation.enabled") is True:
        found[f"{LOSS}loss_mode"] = "k3"
    return found


def verl_rule(key: str, value: Any, content: Mapping[str, Any]) -> Ruled:
    """A dotted key of verl's ppo_trainer."""
    if key in _LENGTHS and isinstance(content.get(_LENGTHS[key]), int):
        value = content[_LENGTHS[key]]  # where it is a number, it is the one that counts
    if key in _VERL_MOVED:
        return "translated", "", {} if value is None else {_VERL_MOVED[key]: value}
    if key in _VERL_SETTLED or (key in _LENGTHS.values() and isinstance(value, int)):
        return "translated", "", {}
    for rule in (_of_model, _of_optimiser, _of_teachers, _of_loss, _of_data, _of_steps):
        if found := rule(key, value, content):
            return found
    if key in _VERL_REFUSED and value:
        return "refused", _VERL_REFUSED[key], {}
    if key == "config_name":
        note = f"what {value} sets is not read; verl's own defaults are taken"
        return OUT if str(value).startswith("ppo_") else ("unknown", note, {})
    if value in (None, {}, []) or key.endswith("._target_"):
        return OUT
    plain = value == _VERL_PLAIN[key] if key in _VERL_PLAIN else key.startswith(_VERL_MACHINES)
    return OUT if plain else ("unknown", "", {})


def _of_model(key: str, value: Any, content: Mapping[str, Any]) -> Ruled | None:
    """A key of the student: its adapter, its code, its precision."""
    if key in _LORA:
        used = content.get(f"{MODEL}lora_rank") and value is not None
        return ("translated", "", {f"lora/{_LORA[key]}": value}) if used else OUT
    if key == f"{MODEL}trust_remote_code" and value:
        note = "of the student; give it to the teacher too, if it needs it"
        return "translated", note, {"student/trust_remote_code": True}
    if key == f"{ACTOR}fsdp_config.model_dtype" and value in ("bfloat16", "bf16"):
        return "translated", "the student stays in float32 and computes in 16 bits", {}
    if key == f"{ACTOR}fsdp_config.dtype":
        half = {"bfloat16": "bf16", "float16": "fp16"}.get(value, value)
        if half not in ("bf16", "fp16", "fp32", "float32"):
            return "unknown", "", {}
        return "translated", "", {half: True} if half in ("bf16", "fp16") else {}
    return None


def _of_teachers(key: str, value: Any, content: Mapping[str, Any]) -> Ruled | None:
    """The path of one of several teachers, by the name that its rows have."""
    told = value is not None and key.startswith("distillation.teacher_models.")
    if not told or not key.endswith(("model_path", ".path")):
        return None
    place = key.rpartition(".")[0]
    keys = (content.get(f"{place}.key"), content.get(f"{place}.domain"), key.split(".")[2])
    named = str(next(name for name in keys if name))
    return "translated", "", {f"teachers/{named.replace('/', '|')}": value}


def _of_loss(key: str, value: Any, content: Mapping[str, Any]) -> Ruled | None:
    """A key of the divergence, or of what the loss may have besides."""
    if key == f"{LOSS}loss_mode" or (key == DISTILLS and value is not None):
        known = _LOSSES.get(str(value))
        if known is None:
            return "refused", f"{value} is not a divergence that is known here", {}
        return "translated", known[1], {"beta": known[0]}
    if key.endswith(("loss_max_clamp", "log_prob_min_clamp")) and value is not None:
        return "translated", f"losses are not clamped here (there: {value})", {}
    if key == f"{ACTOR}use_kl_loss" and value and content.get(f"{ACTOR}kl_loss_coef") == 0:
        return OUT
    return None


def _of_data(key: str, value: Any, content: Mapping[str, Any]) -> Ruled | None:
    """A key of the rows and of how they are written."""
    if key.startswith(TEMPLATE) and len(key) > len(TEMPLATE):
        return "translated", "", {f"chat_template_kwargs/{key.removeprefix(TEMPLATE)}": value}
    if key == "data.train_files":
        files = [value] if isinstance(value, str) else list(value or [])
        if len(files) != 1:
            return "refused", f"{len(files)} files: join them into one, and import again", {}
        return "translated", "", {"data/path": files[0]}
    if key == "data.train_max_samples" and value is not None and number(key, value) > 0:
        note = "the first rows; there drawn if it shuffles"
        return "translated", note, {"data/limit": number(key, value)}
    if key in _IMAGES and value in UNREAD:  # verl's default has one in every configuration
        return "left out", "data with such a column is refused when it is read", {}
    return None


def _of_steps(key: str, value: Any, content: Mapping[str, Any]) -> Ruled | None:
    """A key of rollouts, updates, and what is counted in them."""
    if key == f"{ACTOR}ppo_epochs":
        once = number(key, value) == 1
        return OUT if once else ("refused", f"{value} updates by each rollout; here one", {})
    if key == f"{ACTOR}ppo_mini_batch_size":
        return _update(value, content)
    if key == f"{ROLLOUT}top_k":
        return "translated", "", {"top_k": max(0, number(key, value))}
    if key == "trainer.save_freq" and number(key, value) < 1:
        return "translated", "", {"save_strategy": "no"}
    if key in _STEPS and value is not None:
        note = f"in updates, {_updates(content)} a step there" if _updates(content) > 1 else ""
        return "translated", note, {_STEPS[key]: number(key, value) * _updates(content)}
    return None


def _of_optimiser(key: str, value: Any, content: Mapping[str, Any]) -> Ruled | None:
    """A key of the optimiser that is not only named otherwise."""
    if not key.startswith(OPTIM):
        return None
    name = key.removeprefix(OPTIM)
    steps = number(f"{OPTIM}lr_warmup_steps", content.get(f"{OPTIM}lr_warmup_steps") or 0)
    if name == "lr_warmup_steps":  # none: the ratio counts
        steps *= _updates(content)
        return ("translated", "", {"warmup_steps": steps}) if steps > 0 else OUT
    if name == "lr_warmup_steps_ratio":
        return OUT if steps > 0 or value is None else ("translated", "", {"warmup_steps": value})
    if name == "betas":
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
            return "translated", "", {"adam_beta1": value[0], "adam_beta2": value[1]}
        raise TOPDError(f"{OPTIM}betas: {value!r} are not two numbers. Write [0.9, 0.999].")
    if name == "lr_scheduler_type":
        return _schedule(content.get(f"{OPTIM}warmup_style") or value, content)
    if name == "min_lr_ratio" and value:
        return "translated", "", {}
    return None


def _schedule(kind: Any, content: Mapping[str, Any]) -> Ruled:
    """The learning rate after the warm-up."""
    if kind == "constant":
        return "translated", "", {"lr_scheduler_type": "constant_with_warmup"}
    if kind != "cosine":
        return "refused", f"{kind} is not a schedule that is known here", {}
    least = number(f"{OPTIM}min_lr_ratio", content.get(f"{OPTIM}min_lr_ratio") or 0, float)
    if not least:
        return "translated", "", {"lr_scheduler_type": "cosine"}
    named = {"lr_scheduler_type": "cosine_with_min_lr"}
    return "translated", "", {**named, "lr_scheduler_kwargs/min_lr_rate": least}


def _updates(content: Mapping[str, Any]) -> int:
    """Of verl's step, which answers a batch and learns it by mini-batches."""
    size = number(f"{ACTOR}ppo_mini_batch_size", content.get(f"{ACTOR}ppo_mini_batch_size") or 1)
    batch = number("data.train_batch_size", content.get("data.train_batch_size") or size)
    return max(1, int(batch // max(1, size)))


def _update(prompts: Any, content: Mapping[str, Any]) -> Ruled:
    """An update of so many prompts, each answered n times, as micro-batches."""

    def of(key: str, default: int) -> int:
        return int(number(key, content.get(key) or default))

    size = number(f"{ACTOR}ppo_mini_batch_size", prompts)
    batch = of("data.train_batch_size", size)
    size = min(size, batch)
    rollouts = size * of(f"{ROLLOUT}n", 1)
    wanted = of(f"{ACTOR}ppo_micro_batch_size_per_gpu", 4)
    micro = next((n for n in range(min(wanted, rollouts), 0, -1) if rollouts % n == 0), 0)
    if not micro:
        raise TOPDError(f"{ACTOR}ppo_mini_batch_size: {prompts!r} prompts are no update. Give one.")
    sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": rollouts // micro}
    note = "for one process; divide gradient_accumulation_steps by the number of processes"
    if batch != size:
        updates = f"{_updates(content)} updates"
        note += f"; {batch} prompts are answered before {updates} there, here before each"
    return "translated", note, sizes
