"""What a key of TRL or verl is here: (outcome, note, what it sets in the recipe).

Written against TRL 1.16 (``trl/trainer/distillation_config.py``, ``trl/experimental/gkd``) and verl
0.9 (``verl/trainer/config``). Keys of the recipe are paths such as ``student/path``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from topd.config import TOPDConfig
from topd.training.inherited import REFUSED, WORKS

Ruled: TypeAlias = tuple[str, str, dict[str, Any]]
OUT: Ruled = ("left out", "", {})

TRL_DEFAULTS: dict[str, dict[str, Any]] = {  # that differ from ours
    "gkd": {
        **{"lmbda": 0.5, "beta": 0.5, "temperature": 0.9, "max_new_tokens": 128},
        **{"learning_rate": 2e-5, "per_device_train_batch_size": 8, "num_train_epochs": 3.0},
    },
    "distillation": {
        **{"beta": 1.0, "learning_rate": 1e-6, "max_completion_length": 512},
        **{"per_device_train_batch_size": 8, "num_train_epochs": 3.0},
    },
}
_SAME = set(TOPDConfig.__dataclass_fields__) - {"method", "teacher_prompt"}
_TRL_MOVED = {
    "model_name_or_path": "student/path",
    "model_revision": "student/revision",
    "attn_implementation": "student/attn_implementation",
    "teacher_model_name_or_path": "teacher/path",
    "teacher_model_revision": "teacher/revision",
    "dataset_name": "data/path",
    "dataset_config": "data/name",
    "dataset_train_split": "data/split",
    "max_new_tokens": "max_completion_length",
    "warmup_ratio": "warmup_steps",
}
_TRL_REFUSED = {
    "load_in_4bit": "a quantised student is not trained here",
    "load_in_8bit": "a quantised student is not trained here",
    "seq_kd": "it learns the teacher's texts: use topd warmstart for that",
    "use_uld_loss": "losses across tokenizers are not importable",
    "min_p": "sampling has no min_p here",
    "max_tool_calling_iterations": "rollouts with tools are not importable",
}
_TRL_MACHINES = ("vllm_", "use_vllm", "ds3_", "log_completions", "num_completions", "log_unique")


def trl_rule(key: str, value: Any, content: Mapping[str, Any]) -> Ruled:
    """A key of GKDConfig or DistillationConfig, of ScriptArguments or ModelConfig."""
    if key in _TRL_REFUSED and value not in (None, False, 0):
        return "refused", _TRL_REFUSED[key], {}
    if key == "lmbda":
        if float(value) == 1:
            return "translated", "", {}
        return "refused", f"{value} of the answers are the student's own; a recipe has all", {}
    if key in ("dtype", "torch_dtype") and value in ("bfloat16", "float16"):
        note = "the student stays in float32 and computes in 16 bits"
        return "translated", note, {"bf16" if value == "bfloat16" else "fp16": True}
    if key in ("dtype", "torch_dtype") and value in ("auto", "float32"):
        return OUT
    if key in ("model_init_kwargs", "teacher_model_init_kwargs") and isinstance(value, Mapping):
        return _init_kwargs(key, value)
    if key == "trust_remote_code" and value:
        paths = ("student/trust_remote_code", "teacher/trust_remote_code")
        return "translated", "", dict.fromkeys(paths, True)
    if key.startswith("lora_") or key == "use_peft":
        return _lora(key, value, bool(content.get("use_peft")))
    if key in _TRL_MOVED:
        return "translated", "", {_TRL_MOVED[key]: value}
    return _shared(key, value, _TRL_MACHINES)


def _shared(key: str, value: Any, machines: Sequence[str]) -> Ruled:
    if key in ("deepspeed", "fsdp", "fsdp_config"):
        return "left out", "sharding is the launcher's to say: docs/scaling.md", {}
    if key == "push_to_hub" or key in REFUSED or key.startswith(tuple(machines)):
        return "left out", REFUSED.get(key, "") if value else "", {}
    if key in _SAME or key in WORKS:
        return "kept", "", {key: value}
    return "unknown", "", {}


def _init_kwargs(key: str, given: Mapping[str, Any]) -> Ruled:
    role = "teacher" if key.startswith("teacher") else "student"
    names = {"dtype": "dtype", "torch_dtype": "dtype", "revision": "revision"}
    names |= {"attn_implementation": "attn_implementation"}
    found = {f"{role}/{names[k]}": v for k, v in given.items() if k in names and v != "auto"}
    if role == "student":
        found.pop("student/dtype", None)
    return "translated", "", found


def _lora(key: str, value: Any, used: bool) -> Ruled:
    if not used or key == "use_peft":
        return ("translated", "", {"lora/r": 16}) if used else OUT
    name = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}.get(key)
    name = "target_modules" if key == "lora_target_modules" else name
    return ("translated", "", {f"lora/{name}": value}) if name else ("unknown", "", {})


_VERL_MOVED = {
    "actor_rollout_ref.model.path": "student/path",
    "actor_rollout_ref.model.lora_rank": "lora/r",
    "actor_rollout_ref.model.lora_alpha": "lora/lora_alpha",
    "actor_rollout_ref.model.enable_gradient_checkpointing": "gradient_checkpointing",
    "actor_rollout_ref.ref.model.path": "teacher/path",
    "distillation.teacher_model.model_path": "teacher/path",
    "actor_rollout_ref.actor.optim.lr": "learning_rate",
    "actor_rollout_ref.actor.optim.weight_decay": "weight_decay",
    "actor_rollout_ref.actor.optim.lr_warmup_steps": "warmup_steps",
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": "warmup_steps",
    "actor_rollout_ref.actor.grad_clip": "max_grad_norm",
    "actor_rollout_ref.rollout.n": "num_generations",
    "actor_rollout_ref.rollout.temperature": "temperature",
    "actor_rollout_ref.rollout.top_p": "top_p",
    "data.max_prompt_length": "max_prompt_length",
    "data.max_response_length": "max_completion_length",
    "data.filter_overlong_prompts": "drop_long_prompts",
    "data.prompt_key": "data/columns/prompt",
    "trainer.total_epochs": "num_train_epochs",
    "trainer.total_training_steps": "max_steps",
    "trainer.experiment_name": "run_name",
}
_VERL_SETTLED = (  # by what follows from several keys
    *("distillation.enabled", "distillation.distillation_loss.use_task_rewards"),
    *("algorithm.adv_estimator", "distillation.teacher_key"),
)
_VERL_MACHINES = (
    *(
        "actor_rollout_ref.",
        "trainer.",
        "ray_kwargs.",
        "critic.",
        "reward",
        "custom_reward",
        "global_profiler.",
    ),
    *("distillation.", "data.val", "data.shuffle", "data.truncation", "data.dataloader"),
    *("global_profiler.", "transfer_queue.", "config-", "algorithm."),
    *("data.return", "data.train_batch", "data.seed"),
)
_LOSSES = {  # loss_mode: beta, and what differs
    "k1": (1.0, "a sampled estimate of the reverse KL; here it is taken over the vocabulary"),
    "k2": (1.0, "a sampled estimate of the reverse KL; here it is taken over the vocabulary"),
    "k3": (1.0, "a sampled estimate of the reverse KL; here it is taken over the vocabulary"),
    "reverse_kl_topk": (1.0, "over the likeliest tokens there, over the vocabulary here"),
    "forward_kl_topk": (0.0, "over the likeliest tokens there, over the vocabulary here"),
    "jsd_topk": (0.5, "over the likeliest tokens there, over the vocabulary here"),
}


def verl_rule(key: str, value: Any, content: Mapping[str, Any]) -> Ruled:
    """A dotted key of verl's ppo_trainer."""
    if key == "actor_rollout_ref.model.lora_rank" and not value:
        return OUT
    if key in _VERL_MOVED:
        return "translated", "", {} if value is None else {_VERL_MOVED[key]: value}
    if key in _VERL_SETTLED:
        return "translated", "", {}
    if key == "data.train_files":
        return _files(value)
    if key.startswith("distillation.teacher_models.") and key.endswith(("model_path", ".path")):
        place = key.rpartition(".")[0]
        keys = (content.get(f"{place}.key"), content.get(f"{place}.domain"), key.split(".")[2])
        named = str(next(name for name in keys if name))
        return "translated", "", {f"teachers/{named.replace('/', '|')}": value}
    if key == "distillation.distillation_loss.loss_mode":
        known = _LOSSES.get(str(value))
        if known is None:
            return "refused", f"{value} is not a divergence that is known here", {}
        return "translated", known[1], {"beta": known[0]}
    if key in ("data.image_key", "data.video_key") and value:
        return "refused", "images are not read", {}
    if key.endswith(("loss_max_clamp", "log_prob_min_clamp")) and value is not None:
        return "translated", f"losses are not clamped here (there: {value})", {}
    if key in ("actor_rollout_ref.actor.use_kl_loss", "algorithm.use_kl_in_reward") and value:
        return "refused", "a second divergence, from another model, is not in the loss", {}
    if key == "actor_rollout_ref.actor.entropy_coeff" and value:
        return "refused", "an entropy bonus is not in the loss", {}
    if key == "actor_rollout_ref.actor.ppo_mini_batch_size":
        return _update(value, content)
    if key == "actor_rollout_ref.rollout.top_k":
        return "translated", "", {"top_k": max(0, int(value))}
    if key == "trainer.save_freq":
        every = {"save_strategy": "no"} if int(value) < 1 else {"save_steps": int(value)}
        return "translated", "", every
    return OUT if key.startswith(_VERL_MACHINES) else ("unknown", "", {})


def _files(value: Any) -> Ruled:
    files = [value] if isinstance(value, str) else list(value or [])
    if len(files) != 1:
        return "refused", f"{len(files)} files: join them into one, and import again", {}
    return "translated", "", {"data/path": files[0]}


def _update(prompts: Any, content: Mapping[str, Any]) -> Ruled:
    """An update of so many prompts, each answered n times, as micro-batches."""
    rollouts = int(prompts) * int(content.get("actor_rollout_ref.rollout.n", 1))
    wanted = int(content.get("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu") or 4)
    micro = next(size for size in range(min(wanted, rollouts), 0, -1) if rollouts % size == 0)
    sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": rollouts // micro}
    batch = int(content.get("data.train_batch_size", prompts))
    note = "for one process; divide gradient_accumulation_steps by the number of processes"
    if batch != int(prompts):
        note += (
            f"; {batch} prompts are answered before {batch // int(prompts)} updates there, here "
        )
        note += "before each"
    return "translated", note, sizes
