"""``topd import`` on 20 public configurations: ``python -m bench.imports`` writes the table.

What is here of each are the arguments that decide something, with the values that its variables
have by default; where and how fast it runs is left out, names of files are shortened, and texts
are not here. TRL and verl are Apache-2.0. The last part of docs/how-to/import.md is made from it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from topd.commands.importer import imported

PAGE = Path("docs/how-to/import.md")
MARK = "## Tried on 20 public configurations"
TRL, VERL = "huggingface/trl", "verl-project/verl"
OPD = "examples/on_policy_distillation_trainer/run_"
HUB = {"push_to_hub": True, "gradient_checkpointing": True, "output_dir": "out"}
GKD = {
    **{"model_name_or_path": "Qwen/Qwen2-0.5B-Instruct", "report_to": "wandb", **HUB},
    **{"teacher_model_name_or_path": "Qwen/Qwen2-1.5B-Instruct", "logging_steps": 1},
    **{"dataset_name": "andito/chatbot_arena_completions", "learning_rate": 2e-5},
    **{"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "num_train_epochs": 3},
}
GOLD = {
    **{"model_name_or_path": "meta-llama/Llama-3.2-1B-Instruct", "num_train_epochs": 1, **HUB},
    **{"teacher_model_name_or_path": "Qwen/Qwen2-1.5B-Instruct", "learning_rate": 2e-5},
    **{"dataset_name": "trl-lib/chatbot_arena_completions", "gradient_accumulation_steps": 8},
    "per_device_train_batch_size": 4,
}
DISTILLATION = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "teacher_model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct",
    "dataset_name": "trl-lib/ultrafeedback-prompt",
    **{"learning_rate": 2e-5, "num_train_epochs": 1, "output_dir": "out"},
}
R1 = {
    **{"model_name_or_path": "R1-Distill-Qwen-1.5B", "dtype": "auto", "bf16": True},
    **{"teacher_model_name_or_path": "R1-Distill-Qwen-7B", "dataset_name": "conversation.jsonl"},
    **{"teacher_tokenizer_name_or_path": "R1-Distill-Qwen-7B", "dataset_train_split": "train"},
    **{"learning_rate": 5e-7, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
    **{"num_train_epochs": 1, "temperature": 1, "top_p": 0.95, "top_k": 0, "lmbda": 1.0},
    **{"max_completion_length": 1200, "max_length": 3000, "seed": 42, "warmup_ratio": 0.05},
    **{"lr_scheduler_type": "constant", "trust_remote_code": True, "save_steps": 20},
    **{"use_vllm": True, "vllm_mode": "colocate", "distill_method": "seq_level_kd"},
}
ACTOR, REF, LOSS = "actor_rollout_ref.actor.", "actor_rollout_ref.", "distillation."
TEACHERS = "distillation.teacher_models."


def verl(student: str, teacher: str, prompts: int, lengths: tuple[int, int], **more: Any) -> Any:
    """What verl's examples have in common; ``more`` with ``__`` for a dot."""
    return {
        f"{REF}model.path": student,
        f"{TEACHERS}teacher_model.model_path": teacher,
        "data.train_files": ["train.parquet"],
        "data.train_batch_size": prompts,
        "data.max_prompt_length": lengths[0],
        "data.max_response_length": lengths[1],
        **{"data.filter_overlong_prompts": True, "data.truncation": "error"},
        f"{REF}model.enable_gradient_checkpointing": True,
        **{f"{ACTOR}optim.lr": 1e-6, f"{ACTOR}ppo_mini_batch_size": prompts},
        **{f"{REF}rollout.n": 1, "trainer.total_epochs": 15, "trainer.save_freq": 200},
        "algorithm.adv_estimator": "grpo",
        "algorithm.use_kl_in_reward": False,
        **{f"{LOSS}enabled": True, f"{LOSS}distillation_loss.use_task_rewards": False},
        f"{LOSS}distillation_loss.log_prob_min_clamp": -10.0,
        **{key.replace("__", "."): value for key, value in more.items()},
    }


def loss(mode: str, clamp: float | None = 10.0) -> dict[str, Any]:
    return {
        f"{LOSS}distillation_loss.loss_mode": mode,
        f"{LOSS}distillation_loss.loss_max_clamp": clamp,
    }


def opd(student: str, batch: int, micro: int) -> dict[str, Any]:
    """A fork's trainer, whose reference model is the teacher."""
    return {
        **{"algorithm.adv_estimator": "opd", "algorithm.use_kl_in_reward": False},
        **{f"{REF}model.path": student, "data.train_files": "gsm8k/train.parquet"},
        **{"data.train_batch_size": batch, f"{ACTOR}ppo_mini_batch_size": batch // 2},
        **{f"{ACTOR}ppo_micro_batch_size_per_gpu": micro, f"{ACTOR}use_kl_loss": False},
        **{f"{ACTOR}entropy_coeff": 0, f"{ACTOR}optim.lr": 1e-6, f"{REF}rollout.n": 1},
        **{"data.max_prompt_length": 512, "data.max_response_length": 1024},
    }


def older(content: dict[str, Any], **teachers: str) -> dict[str, Any]:
    """As verl had it before 0.8: inside actor_rollout_ref, teachers with a domain."""
    single = f"{TEACHERS}teacher_model.model_path"
    kept = {k: v for k, v in content.items() if k != single and "use_task_rewards" not in k}
    kept[f"{LOSS}distillation_loss.use_policy_loss"] = False
    for i, (domain, path) in enumerate(teachers.items()):
        kept |= {f"{TEACHERS}teacher{i}.path": path, f"{TEACHERS}teacher{i}.domain": domain}
    before = {k: v for k, v in kept.items() if k.startswith(LOSS)}
    rest = {k: v for k, v in kept.items() if k not in before}
    return rest | {f"{REF}{key}": value for key, value in before.items()}


SMALL = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-3B-Instruct", 128, (256, 512))
LARGE = ("Qwen/Qwen3-8B", "Qwen/Qwen3-32B", 128, (1024, 2048))
VISION = {"data.image_key": "images"}
CODER = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
LORA = {f"{REF}model.lora_rank": 256, f"{REF}model.lora_alpha": 512}
MANY = {"data.train_files": ["a.parquet", "b.parquet"]}
TWO = {
    f"{TEACHERS}gsm8k.key": "openai/gsm8k",
    f"{TEACHERS}gsm8k.model_path": "Qwen/Qwen3-32B",
    f"{TEACHERS}geo3k.key": "hiyouga/geometry3k",
    f"{TEACHERS}geo3k.model_path": "Qwen/Qwen3-VL-32B-Instruct",
    f"{LOSS}teacher_key": "data_source",
}
PEFT = {"use_peft": True, "lora_r": 64, "lora_alpha": 16, "learning_rate": 2e-4}
CONFIGS: list[tuple[str, str, dict[str, Any]]] = [  # repository, file, arguments
    (TRL, "trl/scripts/distillation.py, full", DISTILLATION),
    (TRL, "trl/scripts/distillation.py, LoRA", {**DISTILLATION, **PEFT, "lora_r": 32}),
    (TRL, "examples/scripts/gkd.py, full", GKD),
    (TRL, "examples/scripts/gkd.py, LoRA", {**GKD, **PEFT}),
    (TRL, "trl/experimental/gold/gold.py, full", GOLD),
    (TRL, "trl/experimental/gold/gold.py, LoRA", {**GOLD, **PEFT}),
    ("a script of GOLD", "Llama-3.2-1B from Qwen2-1.5B", {**GOLD, "push_to_hub": False}),
    ("a script of TRL's", "R1-Distill-Qwen 1.5B from 7B", R1),
    (VERL, f"{OPD}qwen3_8b_fsdp.sh", verl(*LARGE, **loss("k1"), **MANY)),
    (VERL, f"{OPD}qwen_gsm8k.sh", verl(*SMALL, **loss("k1"))),
    (
        VERL,
        f"{OPD}qwen3_reverse_kl_fsdp.sh",
        verl(
            *("Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", 32, (512, 1024)),
            **loss("reverse_kl_topk", None),
            trainer__total_epochs=1,
        ),
    ),
    (
        VERL,
        f"{OPD}dsr1_1.5b_reverse_kl_fsdp.sh",
        verl(
            *("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "hbx/JustRL-DeepSeek-1.5B"),
            *(64, (512, 7680)),
            **loss("reverse_kl_topk", None),
            trainer__total_epochs=1,
            trainer__save_freq=10,
        ),
    ),
    (
        VERL,
        f"{OPD}qwen_math.sh",
        verl(
            *("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-4B-Instruct-2507", 128, (1024, 1024)),
            **loss("forward_kl_topk"),
            custom_reward_function__name="compute_score_math_verify",
        ),
    ),
    (
        VERL,
        f"{OPD}qwen_codeforces.sh",
        older(
            verl("Qwen/Qwen2.5-0.5B", "", 128, (1024, 1024), **loss("forward_kl_topk", None)),
            codeforces=CODER,
        ),
    ),
    (
        VERL,
        f"{OPD}qwen_mopd.sh",
        older(
            verl(
                *("Qwen/Qwen2.5-1.5B-Instruct", "", 128, (1024, 1024)),
                **loss("forward_kl_topk", None),
                **LORA,
                **MANY,
            ),
            **{"openai/gsm8k": "Qwen/Qwen2.5-Math-1.5B-Instruct", "codeforces": CODER},
        ),
    ),
    (VERL, f"{OPD}qwen3_8b_mopd_fsdp.sh", verl(*LARGE, **loss("k1"), **VISION, **MANY, **TWO)),
    (
        VERL,
        f"{OPD}qwen3_5_2b_fsdp.sh",
        verl(
            *("Qwen/Qwen3.5-2B", "Qwen/Qwen3.5-35B-A3B", 128, (1024, 2048)),
            **loss("k1"),
            **VISION,
            trainer__total_epochs=30,
            trainer__save_freq=5,
        ),
    ),
    (VERL, "verl/trainer/config/ppo_trainer.yaml", {f"{LOSS}enabled": False, f"{REF}rollout.n": 1}),
    (
        "masoudhashemi/verl-opd",
        "examples/grpo_trainer/run_qwen3-8b_opd.sh",
        opd("Qwen/Qwen3-8B", 512, 32),
    ),
    (
        "masoudhashemi/verl-opd",
        "examples/grpo_trainer/run_qwen3-32b_to_8b_opd.sh",
        {**opd("Qwen/Qwen3-8B", 256, 16), f"{REF}ref.model.path": "Qwen/Qwen3-32B"},
    ),
]


def row(repository: str, name: str, arguments: dict[str, Any]) -> tuple[bool, str]:
    """Whether there is a recipe, and the line of the table."""
    words = f"{repository} {name}".lower()
    kind = next((kind for kind in ("gkd", "gold", "distillation.py") if kind in words), None)
    found = imported(name, arguments, kind=kind and kind.removesuffix(".py"))
    counts = Counter(line.outcome for line in found.lines)
    if found.refused:
        came = "; ".join(f"`{line.key}`: {line.note}" for line in found.refused)
    else:
        came = f"**a recipe**: beta {found.recipe.get('beta', 1.0):g}"
        if found.unknown:
            came += f"; to look at: {', '.join(f'`{line.key}`' for line in found.unknown)}"
    cells = [str(counts[kind]) for kind in ("kept", "translated", "left out", "unknown")]
    line = f"| {repository}: {name.removeprefix('examples/')} | {came} | {' | '.join(cells)} |"
    return not found.refused, line


def main() -> None:
    """Write the last part of the page."""
    rows = [row(*config) for config in CONFIGS]
    made = sum(whole for whole, _ in rows)
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    text = f"""{MARK}

{made} of {len(rows)} become a recipe (`python -m bench.imports`, which has of each the
arguments that decide something).

| configuration | what came out | kept | translated | left out | unknown |
|---|---|---|---|---|---|
"""
    PAGE.write_text(head + text + "\n".join(line for _, line in rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
