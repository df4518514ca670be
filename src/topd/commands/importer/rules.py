"""What a key of TRL is here: (outcome, note, what it sets in the recipe).

Written against TRL 1.16 (``trl/trainer/distillation_config.py``, ``trl/experimental/gkd``). Keys of
the recipe are paths such as ``student/path``. What comes out does not depend on the order of keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any, TypeAlias

from topd.config import TOPDConfig
from topd.errors import TOPDError
from topd.training.inherited import REFUSED, WORKS

Ruled: TypeAlias = tuple[str, str, dict[str, Any]]
OUT: Ruled = ("left out", "", {})

TRL_DEFAULTS: dict[str, dict[str, Any]] = {  # that differ from ours, by the class that has them
    "gkd": {
        **{"lmbda": 0.5, "beta": 0.5, "temperature": 0.9, "max_new_tokens": 128},
        "learning_rate": 2e-5,
    },
    "gold": {
        **{"lmbda": 0.5, "beta": 0.5, "temperature": 0.9, "top_p": 0.95},
        **{"max_completion_length": 128, "learning_rate": 1e-7},
    },
    "distillation": {
        **{"beta": 1.0, "learning_rate": 1e-6, "max_completion_length": 512},
        "disable_dropout": False,
    },
    "iw_opd": {  # and a DistillationConfig while it had lmbda
        **{"lmbda": 1.0, "beta": 1.0, "top_p": 0.95, "max_completion_length": 512},
        **{"learning_rate": 1e-6, "loss_top_k": 1},
    },
}
TRL_COMMON: dict[str, Any] = {
    **{"per_device_train_batch_size": 8, "num_train_epochs": 3.0, "warmup_steps": 0},
    **{"bf16": True, "gradient_checkpointing": True},
}
TRL_LORA: dict[str, Any] = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
_HALF = ("bfloat16", "float16")
_SAME = {f.name for f in fields(TOPDConfig)} - {"method", "teacher_prompt"}
_TRL_MOVED = {
    "model_name_or_path": "student/path",
    "model_revision": "student/revision",
    "chat_template": "student/chat_template",
    "eos_token": "student/eos_token",
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
    "vllm_structured_outputs_regex": "sampling has no regular expression here",
    "max_tool_calling_iterations": "rollouts with tools are not importable",
    "reward_funcs": "rewards are not in the loss",
    "datasets": "a mixture is not read: join it into one file, and name that as dataset_name",
    "config": "the rest of it is in that file: write both into one, and import that",
}
_LORA = {
    **{"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"},
    **{"lora_target_modules": "target_modules", "lora_modules_to_save": "modules_to_save"},
    **{"lora_target_parameters": "target_parameters", "lora_task_type": "task_type"},
    **{"use_rslora": "use_rslora", "use_dora": "use_dora"},
}
_OF_IW_OPD = {
    *("loss_top_k", "loss_add_tail", "reverse_kl_top_1_mode", "use_teacher_server"),
    *("distillation_objective", "iw_opd_gamma", "iw_opd_epsilon"),
}
LISTS = ("lora_target_modules", "lora_modules_to_save", "lora_target_parameters")
_TRL_MACHINES = (  # where and how fast, and what belongs to what is refused
    *("vllm_", "use_vllm", "ds3_", "log_completions", "num_completions", "log_unique", "wandb_"),
    *("dataset_num_proc", "pad_to_multiple_of", "uld_", "use_extended_uld", "bnb_", "use_bnb"),
    "teacher_tokenizer_name_or_path",
)


def number(key: str, value: Any, kind: type[int] | type[float] = int) -> Any:
    """A number that rules reckon with. Raises TOPDError for other values, such as a variable."""
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise TOPDError(
            f"{key}: {value!r} is not a number. Write the number in its place, and import again."
        ) from error


def typed(key: str, value: Any) -> Any:
    """A value that a file has as text, as TRL's parser reads it: "false", and mappings in JSON."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, str) and key.endswith("_kwargs"):
        with suppress(ValueError):
            return json.loads(value)
    return value


def trl_kind(content: Mapping[str, Any]) -> str | None:
    """Whose keys these are, a key of ``TRL_DEFAULTS``; None: they may be of any class."""
    if _OF_IW_OPD & set(content):
        return "iw_opd"
    if any(key.startswith(("uld_", "use_uld", "use_extended_uld")) for key in content):
        return "gold"
    if {"lmbda", "max_new_tokens", "seq_kd"} & set(content):
        return "gold" if "max_completion_length" in content else "gkd"
    return None


def guessed(kind: str | None, content: Mapping[str, Any]) -> str:
    """What to look at where keys that several classes have tell the class; else nothing."""
    if kind is None:
        read = "read as a DistillationConfig; a GKDConfig and a GOLDConfig have half of the answers"
        return f"{read} on-policy"
    if kind == "iw_opd":
        objective = any(key.startswith(("distillation_objective", "iw_opd_")) for key in content)
        read = "read as a DistillationConfig of a former TRL; an IWOPDConfig has the method iw_opd"
        return "" if objective else read
    own = ("max_new_tokens", "uld_", "use_uld", "use_extended_uld")
    if any(key.startswith(own) for key in content):
        return ""
    read = f"read as a {kind.upper()}Config; other classes with lmbda have another learning_rate, "
    return f"{read}beta, temperature and max_completion_length where they are not given"


def trl_defaults(kind: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration leaves to a class of TRL and we have otherwise."""
    found = {**TRL_COMMON, **TRL_DEFAULTS[kind], **(TRL_LORA if content.get("use_peft") else {})}
    beside = {  # what replaces a default
        "bf16": content.get("fp16") or "float16" in _dtypes(content),
        "warmup_steps": content.get("warmup_ratio") is not None,
        "gradient_checkpointing": "activation_checkpointing" in content,
    }
    if content.get("eval_strategy") == "steps" and "logging_steps" not in content:
        found["eval_steps"] = 10  # its logging_steps
    return {name: value for name, value in found.items() if not beside.get(name)}


def trl_rule(key: str, value: Any, content: Mapping[str, Any]) -> Ruled:
    """A key of GKDConfig or DistillationConfig, of ScriptArguments or ModelConfig."""
    if key in _TRL_REFUSED:
        return ("refused", _TRL_REFUSED[key], {}) if value not in (None, False, 0) else OUT
    if key == "lmbda":
        if number(key, value, float) == 1:
            return "translated", "all answers are the student's own, as always here", {}
        return "refused", f"{value} of the answers are the student's own; a recipe has all", {}
    kind = trl_kind(content)
    if key == "max_length" and kind and value is not None:
        if content.get("max_prompt_length"):
            return OUT
        answer = number(key, content.get("max_completion_length")) if kind != "gkd" else 0
        note = "longer prompts are cut there, and refused here or left out: drop_long_prompts"
        return "translated", note, {"max_prompt_length": max(1, number(key, value) - answer)}
    if key in ("dtype", "torch_dtype") and value in _HALF:
        note = "the student stays in float32 and computes in 16 bits"
        half = {"bf16" if value == "bfloat16" else "fp16": True}
        return "translated", note, {**half, "teacher/dtype": value}
    if key in ("dtype", "torch_dtype") and value in ("auto", "float32"):
        note = "as the weights are saved there; both models are loaded in float32 here"
        return "left out", note if value == "auto" else "", {}
    if key == "temperature" and kind == "gkd" and value != 1:
        note = "of the sampling alone there; here it divides the logits of the loss too"
        return "kept", note, {key: value}
    if key == "chat_template_path" and str(value).endswith(".jinja"):
        return "translated", "", {"student/chat_template": value}
    if key == "vllm_sync_frequency" and value is not None and number(key, value) > 1:
        note = f"rollouts are of the current weights here, there up to {value} updates old"
        return "translated", note, {}
    if key in _OF_IW_OPD:
        return _iw_opd(key, value, content)
    if key in ("bf16", "fp16") and not value and _HALF[key == "fp16"] in _dtypes(content):
        return OUT  # the weights have 16 bits
    if key == "warmup_ratio" and (value is None or content.get("warmup_steps")):
        return OUT  # the steps count
    if key == "warmup_steps" and not value and content.get("warmup_ratio") is not None:
        return OUT
    if key in ("model_init_kwargs", "teacher_model_init_kwargs") and isinstance(value, Mapping):
        return _init_kwargs(key, value)
    if key in ("trust_remote_code", "attn_implementation"):  # its scripts give both models it
        paths = (f"student/{key}", f"teacher/{key}")
        return ("translated", "", dict.fromkeys(paths, value)) if value else OUT
    if key in ("eval_strategy", "dataset_test_split"):
        return _evaluated(key, value, content)
    if key in _LORA or key == "use_peft":
        return _lora(key, value) if content.get("use_peft") else OUT
    if key in _TRL_MOVED:
        return "translated", "", {_TRL_MOVED[key]: value}
    if key in ("deepspeed", "fsdp", "fsdp_config"):
        return "left out", "sharding is the launcher's to say: docs/scaling.md", {}
    if key == "push_to_hub" or key in REFUSED or key.startswith(_TRL_MACHINES):
        return "left out", REFUSED.get(key, "") if value else "", {}
    if key in _SAME or key in WORKS:
        return "kept", "", {key: value}
    return "unknown", "", {}


def _evaluated(key: str, value: Any, content: Mapping[str, Any]) -> Ruled:
    """Evaluation is on the data's split for tests."""
    on = content.get("eval_strategy") not in (None, False, "no")
    if not on or key != "eval_strategy":
        return ("translated", "", {}) if on else OUT
    named = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_test_split"}
    data = {f"eval_data/{ours}": content[key] for ours, key in named.items() if content.get(key)}
    return "translated", "", {key: value, "eval_data/split": "test", **data}


def _iw_opd(key: str, value: Any, content: Mapping[str, Any]) -> Ruled:
    """What IWOPDConfig has, and a DistillationConfig had, besides."""
    method: dict[str, Any] = {"method": "iw_opd"}
    note = "of the sampled tokens there; here its weights are on the loss over the vocabulary"
    if (key, value) == ("distillation_objective", "iw_opd"):
        return "translated", note, method
    on = content.get("distillation_objective", "iw_opd") == "iw_opd"
    if key == "iw_opd_epsilon" and on:
        return "unknown", "", method
    if key == "iw_opd_gamma" and on:
        return "translated", note, {**method, "method_options/gamma": value}
    if key == "loss_top_k" and value:
        return "translated", f"over {value} tokens there, over the vocabulary here", {}
    return "left out", "", {}


def _init_kwargs(key: str, given: Mapping[str, Any]) -> Ruled:
    role = "teacher" if key.startswith("teacher") else "student"
    names = {"dtype": "dtype", "torch_dtype": "dtype", "revision": "revision"}
    names |= {name: name for name in ("attn_implementation", "trust_remote_code")}
    found = {f"{role}/{names[k]}": v for k, v in given.items() if k in names and v != "auto"}
    if role == "student":
        found.pop("student/dtype", None)
    lost = [k for k, v in given.items() if v is not None and f"{role}/{names.get(k)}" not in found]
    return "translated", f"not kept: {', '.join(lost)}" if lost else "", found


def _lora(key: str, value: Any) -> Ruled:
    if key == "use_peft":
        return "translated", "the adapter of lora", {}
    value = "all-linear" if value == ["all-linear"] else value
    return "translated", "", {f"lora/{_LORA[key]}": value}


def _dtypes(content: Mapping[str, Any]) -> list[Any]:
    return [content.get(name) for name in ("dtype", "torch_dtype")]
