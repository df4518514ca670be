"""Configurations of TRL and verl as recipes: every key is told what became of it."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig
from typer.testing import CliRunner

from topd import TOPDConfig
from topd.cli import app
from topd.commands.importer import import_file, imported, training_of
from topd.commands.importer.rules import TRL_COMMON, TRL_DEFAULTS, trl_defaults
from topd.commands.importer.verl import ACTOR, MODEL, OPTIM
from topd.commands.recipe import read_recipe
from topd.errors import TOPDError

TRL = {
    "model_name_or_path": "student",
    "teacher_model_name_or_path": "teacher",
    "dataset_name": "prompts.jsonl",
    "learning_rate": 1e-5,
    "beta": 0.5,
    "use_vllm": True,
    "warmup_ratio": 0.1,
}
OF_TRL = "from a TRL configuration (DistillationConfig)"
CPU = {"use_cpu": True}  # bf16 is TRL's default and verl's, and not every machine has it
VERL: dict[str, Any] = {
    "actor_rollout_ref.model.path": "student",
    "distillation.enabled": True,
    "distillation.teacher_models.teacher_model.model_path": "teacher",
    "distillation.distillation_loss.loss_mode": "forward_kl_topk",
    "distillation.distillation_loss.use_task_rewards": False,
    "data.train_files": ["prompts.parquet"],
    "data.train_batch_size": 64,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 32,
    "actor_rollout_ref.rollout.n": 2,
    "trainer.nnodes": 4,
}


SAVED: dict[str, Any] = {  # of a saved configuration, at its defaults
    **{f"{OPTIM}optimizer": "AdamW", f"{OPTIM}betas": [0.9, 0.999], f"{OPTIM}clip_grad": 1.0},
    **{f"{OPTIM}lr_warmup_steps": -1, f"{OPTIM}min_lr_ratio": 0.0, f"{OPTIM}num_cycles": 0.5},
    **{f"{OPTIM}total_training_steps": -1, f"{OPTIM}warmup_style": None},
    **{
        f"{ACTOR}ppo_epochs": 1,
        f"{ACTOR}loss_agg_mode": "token-mean",
        f"{ACTOR}use_kl_loss": False,
    },
    **{f"{ACTOR}clip_ratio": 0.2, f"{ACTOR}kl_loss_coef": 0.001, f"{ACTOR}entropy_coeff": 0},
    **{f"{ACTOR}optim._target_": "x", f"{ACTOR}fsdp_config.model_dtype": "fp32"},
    **{f"{ACTOR}use_fused_kernels": "${oc.select:x,false}", f"{ACTOR}qat.mode": "w4a16"},
    **{f"{MODEL}lora_rank": 0, f"{MODEL}lora_alpha": 16, f"{MODEL}target_modules": "all-linear"},
    **{f"{MODEL}exclude_modules": None, f"{MODEL}override_config": {}, f"{MODEL}use_shm": False},
    **{f"{MODEL}trust_remote_code": False, f"{MODEL}mtp.enable": False, f"{MODEL}lora.rank": 0},
    **{f"{MODEL}lora.dtype": None, "data.apply_chat_template_kwargs": {}, "data.shuffle": True},
    **{"actor_rollout_ref.rollout.do_sample": True, "actor_rollout_ref.hybrid_engine": True},
    **{"data.train_max_samples": -1, "distillation.distillation_loss.topk": 32},
    **{"trainer.total_training_steps": None, "algorithm.use_kl_in_reward": False},
    **{
        f"algorithm.{name}": 1.0
        for name in ("gamma", "lam", "kl_ctrl.kl_coef", "pf_ppo.weight_pow")
    },
    **{"algorithm.rollout_correction.rollout_is": None, "algorithm._target_": "x"},
    **{"algorithm.rollout_correction.rollout_is_threshold": 2.0, f"{ACTOR}sum_pi_squared_x": False},
    **{f"actor_rollout_ref.rollout.{name}_length": f"${{data.{name}}}" for name in ("prompt",)},
}


def outcomes(content: dict[str, Any]) -> dict[str, str]:
    return {line.key: line.outcome for line in imported("x", content).lines}


def test_a_distillation_config_of_trl_is_a_recipe(tmp_path) -> None:
    found = imported("x", TRL)
    path = tmp_path / "recipe.yaml"
    path.write_text(found.text())
    recipe = read_recipe(path, CPU)
    assert (recipe.student.path, recipe.teacher.path) == ("student", "teacher")
    assert recipe.data.path == "prompts.jsonl"
    args = recipe.args
    assert (args.beta, args.learning_rate, args.warmup_steps) == (0.5, 1e-5, 0.1)
    assert args.max_completion_length == 512  # TRL's default, not ours
    assert args.per_device_train_batch_size == 8
    said = {line.key: line.outcome for line in found.lines}
    assert said["beta"] == "kept"
    assert said["use_vllm"] == "left out"
    assert said["warmup_ratio"] == "translated"
    assert said["num_train_epochs"] == "kept"


def test_every_default_that_is_written_out_is_marked_and_every_other_name_told(tmp_path) -> None:
    (tmp_path / "trl.json").write_text(json.dumps(TRL))
    shown = CliRunner().invoke(app, ["import", str(tmp_path / "trl.json")]).output.splitlines()
    lines = imported("x", TRL).lines
    marked = [line.key for line in lines if line.key not in TRL and line.outcome == "kept"]
    assert {"num_train_epochs", "max_completion_length"} <= set(marked)
    for key in marked:
        (line,) = (line for line in shown if f" {key} = " in line)
        assert line.endswith(": its default there")
        assert f"# {key}: its default there" in shown
    assert "translated  warmup_ratio = 0.1 -> warmup_steps" in shown
    assert "translated  model_name_or_path = student -> student.path" in shown


def test_one_teacher_of_verl_is_told_as_the_recipe_has_it() -> None:
    (line,) = (line for line in imported("x", VERL).lines if line.key.endswith("model_path"))
    assert line.names == ("teacher",)


def test_a_recipe_says_that_something_differs_only_where_it_does() -> None:
    assert imported("x", TRL).text().startswith(f"# Imported {OF_TRL}; see what differs:\n# ")
    said = {**TRL_COMMON, **TRL_DEFAULTS["distillation"]}
    named = {key: TRL[key] for key in TRL if key.endswith(("_path", "_name"))}
    found = imported("x", {**named, **said}, kind="distillation")
    assert found.text().startswith(f"# Imported {OF_TRL}\n\n")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"lmbda": 0.25}, "lmbda: 0.25 of the answers are the student's own"),
        ({"seq_kd": True, "lmbda": 1.0}, "seq_kd: it learns the teacher's texts"),
        ({"max_new_tokens": 64}, "lmbda: 0.5 .*its default there"),
        ({"load_in_4bit": True}, "load_in_4bit: a quantised student"),
        ({"use_uld_loss": True}, "use_uld_loss: losses across tokenizers"),
        ({"reward_funcs": ["accuracy"]}, "reward_funcs: rewards are not in the loss"),
        ({"datasets": [{"path": "a"}]}, "datasets: a mixture is not read"),
        ({"vllm_structured_outputs_regex": "[0-9]+"}, "sampling has no regular expression here"),
        ({"config": "more.yaml"}, "config: the rest of it is in that file"),
    ],
)
def test_what_a_recipe_cannot_say_is_refused(more, reason) -> None:
    with pytest.raises(TOPDError, match=reason):
        imported("x", {**TRL, **more}).text()


def test_a_gkd_config_that_is_on_policy_keeps_its_defaults() -> None:
    found = imported("x", {**TRL, "lmbda": 1.0, "max_new_tokens": 64}).recipe
    assert found["max_completion_length"] == 64
    assert found["temperature"] == 0.9


def test_the_length_of_trl_is_that_of_prompts_less_the_answers_of_gold() -> None:
    on_policy = {**TRL, "lmbda": 1.0, "max_length": 512}
    assert imported("x", {**on_policy, "max_new_tokens": 64}).recipe["max_prompt_length"] == 512
    gold = {**on_policy, "max_completion_length": 112}
    assert imported("x", gold).recipe["max_prompt_length"] == 400
    assert "max_prompt_length" not in imported("x", {**gold, "max_length": None}).recipe


def test_both_models_get_what_the_scripts_of_trl_give_them_and_what_is_off_is_left_out() -> None:
    off = {"seq_kd": False, "use_uld_loss": False, "uld_skip_student_eos": True, "min_p": None}
    found = imported("x", {**TRL, **off, "lmbda": 1, "attn_implementation": "eager"})
    assert found.recipe["student"] == {"path": "student", "attn_implementation": "eager"}
    assert found.recipe["teacher"] == {"path": "teacher", "attn_implementation": "eager"}
    assert {line.outcome for line in found.lines if line.key in off} == {"left out"}


def test_lora_and_precision() -> None:
    lora = {"use_peft": True, "lora_r": 8, "lora_target_modules": ["q_proj"], "dtype": "bfloat16"}
    found = imported("x", {**TRL, **lora}).recipe
    theirs = {"lora_alpha": 32, "lora_dropout": 0.05}
    assert found["lora"] == {"r": 8, "target_modules": ["q_proj"], **theirs}
    assert found["bf16"] is True
    assert imported("x", {**TRL, "use_peft": True}).recipe["lora"] == {"r": 16, **theirs}
    assert "lora" not in imported("x", {**TRL, "lora_r": 8}).recipe
    assert imported("x", {**TRL, "bf16": None}).recipe["bf16"] is True  # as if it were not there
    half = imported("x", {**TRL, "dtype": "float16"}).recipe
    assert half["fp16"] is True
    assert half["teacher"] == {"path": "teacher", "dtype": "float16"}
    assert "bf16" not in half


@pytest.mark.parametrize(
    ("words", "learned"),
    [
        ("loss_top_k=1", (None, 1.0, 0.95)),  # a DistillationConfig while it had lmbda
        ("lmbda=1.0 max_prompt_length=300", (None, 1.0, 0.95)),
        ("distillation_objective=jsd iw_opd_gamma=0.5", (None, 1.0, 0.95)),
        ("distillation_objective=iw_opd", ("iw_opd", 1.0, 0.95)),
        ("iw_opd_gamma=0.25", ("iw_opd", 1.0, 0.95)),
        ("top_p=0.9", (None, 1.0, 0.9)),
    ],
)
def test_a_distillation_config_that_had_lmbda_has_its_own_defaults(words, learned, tmp_path):
    both = "--model_name_or_path s --teacher_model_name_or_path t --dataset_name d.jsonl"
    given = " ".join(f"--{word}" for word in words.split())
    (tmp_path / "run.sh").write_text(f"python trl/scripts/distillation.py {both} {given}\n")
    found = import_file(tmp_path / "run.sh")
    recipe = found.recipe
    assert (recipe.get("method"), recipe["beta"], recipe["top_p"]) == learned
    assert recipe.get("method_options", {}) == ({"gamma": 0.25} if "0.25" in words else {})
    assert recipe["learning_rate"] == 1e-6
    (tmp_path / "recipe.yaml").write_text(found.text())
    assert read_recipe(tmp_path / "recipe.yaml", CPU).args.top_p == learned[2]


def notes(content: dict[str, Any], **more: Any) -> dict[str, str]:
    return {line.key: line.note for line in imported("x", {**content, **more}).lines}


def test_the_temperature_of_gkd_is_not_in_its_loss() -> None:
    assert notes(TRL, lmbda=1, temperature=0.7)["temperature"].startswith("of the sampling alone")
    assert notes(TRL, lmbda=1)["temperature"].startswith("of the sampling alone there")  # 0.9
    assert notes(TRL, lmbda=1, temperature=1.0)["temperature"] == ""
    assert notes(TRL, temperature=0.7)["temperature"] == ""  # a DistillationConfig's is


def test_what_models_are_made_with_is_kept_or_named() -> None:
    given = {"dtype": "bfloat16", "trust_remote_code": True, "quantization_config": {"bits": 4}}
    found = imported("x", {**TRL, "teacher_model_init_kwargs": given})
    assert found.recipe["teacher"] == {
        **{"path": "teacher", "dtype": "bfloat16", "trust_remote_code": True}
    }
    assert "\n# teacher_model_init_kwargs: not kept: quantization_config\n" in found.text()
    assert notes(TRL, model_init_kwargs={"dtype": "auto"})["model_init_kwargs"].endswith(": dtype")
    assert notes(TRL, model_init_kwargs={"revision": "a"})["model_init_kwargs"] == ""
    assert notes(TRL, dtype="auto")["dtype"].startswith("as the weights are saved there")


@pytest.mark.parametrize(
    "content",
    [
        {**TRL, "lmbda": 1, "loss_top_k": 1, "max_length": 900, "max_prompt_length": 70},
        {**TRL, "lora_r": 64, "use_peft": True},
        {**TRL, "dtype": "bfloat16", "bf16": False},
        {**TRL, "warmup_steps": 0},
        {**TRL, "warmup_steps": 10},
        {**VERL, f"{OPTIM}lr_warmup_steps": -1, f"{OPTIM}lr_warmup_steps_ratio": 0.1},
        {**VERL, f"{OPTIM}lr_warmup_steps": 7, f"{OPTIM}lr_warmup_steps_ratio": 0.1},
    ],
)
def test_the_order_of_keys_does_not_count(content) -> None:
    backwards = dict(reversed(content.items()))
    assert imported("x", content).recipe == imported("x", backwards).recipe


SEEN_ELSEWHERE = {  # what is logged and where, not what is learned
    *("output_dir", "logging_steps", "logging_nan_inf_filter", "per_device_eval_batch_size"),
    *("remove_unused_columns", "activation_checkpointing"),  # a name of gradient_checkpointing
    "max_prompt_length",  # None: what max_length leaves; longer ones are refused here, not cut
}


@pytest.mark.parametrize("kind", TRL_DEFAULTS)
def test_the_defaults_of_trl_are_those_of_its_classes(kind, tmp_path) -> None:
    """Every setting that both have, where theirs differs: none is forgotten, none is wrong."""
    trl = pytest.importorskip("trl", minversion="1.16")
    place = trl if kind == "distillation" else import_module(f"trl.experimental.{kind}")
    names = {"gkd": "GKDConfig", "gold": "GOLDConfig", "iw_opd": "IWOPDConfig"}
    named = names.get(kind, "DistillationConfig")
    theirs = getattr(place, named)(output_dir=str(tmp_path), use_cpu=True)
    ours = TOPDConfig(output_dir=str(tmp_path), use_cpu=True)
    known = {f.name for f in fields(theirs)} - SEEN_ELSEWHERE
    both = known & {f.name for f in fields(TOPDConfig)}
    moved = ("lmbda", "max_new_tokens")
    wanted = {n: getattr(theirs, n) for n in both if getattr(theirs, n) != getattr(ours, n)}
    wanted |= {name: getattr(theirs, name) for name in moved if name in known}
    given = {**trl_defaults(kind, {})}
    for name in [name for name in given if name not in wanted]:
        assert given.pop(name) == getattr(theirs, name)  # written out, though it is ours too
    assert given == wanted


def test_the_adapter_of_trl_has_its_defaults() -> None:
    trl = pytest.importorskip("trl", minversion="1.16")
    model = trl.ModelConfig(use_peft=True)
    theirs = trl.get_peft_config(model).to_dict()
    ours = LoraConfig(**imported("x", {**TRL, "use_peft": True}).recipe["lora"]).to_dict()
    assert {name for name in theirs if theirs[name] != ours[name]} <= {"task_type"}


def test_an_update_of_verl_is_its_mini_batch() -> None:
    found = imported("x", VERL)
    recipe = yaml.safe_load(found.text())
    assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 64
    assert (recipe["num_generations"], recipe["beta"]) == (2, 0.0)
    assert (recipe["teacher"], recipe["data"]) == ("teacher", {"path": "prompts.parquet"})
    assert outcomes(VERL)["trainer.nnodes"] == "left out"
    assert outcomes({**VERL, "surprise.key": 1})["surprise.key"] == "unknown"
    nested = {"actor_rollout_ref": {"model": {"path": "student"}}, **VERL}
    nested.pop("actor_rollout_ref.model.path")
    assert imported("x", nested).recipe == found.recipe


def test_what_verl_leaves_out_has_its_defaults() -> None:
    found = imported("x", VERL).recipe
    wanted = {"weight_decay": 0.01, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0}
    wanted |= {"bf16": True, "gradient_checkpointing": True, "learning_rate": 1e-6}
    wanted |= {"max_prompt_length": 512, "max_completion_length": 512, "num_train_epochs": 30}
    assert {name: found[name] for name in wanted} == wanted
    assert "lora" not in imported("x", {**VERL, **SAVED}).recipe
    lora = imported("x", {**VERL, **SAVED, f"{MODEL}lora_rank": 8}).recipe["lora"]
    assert lora == {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def test_a_saved_configuration_of_verl_says_nothing_more() -> None:
    """All of its keys, at their defaults, and what has no value yet."""
    betas = {"adam_beta1": 0.9, "adam_beta2": 0.999}
    assert imported("x", {**VERL, **SAVED}).recipe == {**imported("x", VERL).recipe, **betas}
    found = outcomes({**VERL, **SAVED})
    assert {found[key] for key in SAVED} <= {"left out", "translated"}


@pytest.mark.parametrize(
    ("key", "value", "became"),
    [
        (f"{OPTIM}betas", [0.9, 0.95], {"adam_beta1": 0.9, "adam_beta2": 0.95}),
        (f"{OPTIM}lr_scheduler_type", "cosine", {"lr_scheduler_type": "cosine"}),
        (f"{OPTIM}warmup_style", "cosine", {"lr_scheduler_type": "cosine"}),
        (f"{OPTIM}lr_warmup_steps", 20, {"warmup_steps": 40}),
        ("data.apply_chat_template_kwargs.so", 1, {"chat_template_kwargs": {"so": 1}}),
        (f"{MODEL}trust_remote_code", True, {"student": {"path": "student",
                                                         "trust_remote_code": True}}),
        (f"{OPTIM}optimizer", "Muon", "unknown"),
        (f"{ACTOR}loss_agg_mode", "seq-mean-token-sum", "unknown"),
        ("trainer.total_training_steps", 10, {"max_steps": 20}),  # of 2 updates each
        ("actor_rollout_ref.rollout.response_length", 99, {"max_completion_length": 99}),
        ("actor_rollout_ref.rollout.prompt_length", 99, {"max_prompt_length": 99}),
        (f"{ACTOR}fsdp_config.model_dtype", "bf16", "translated"),
        (f"{ACTOR}fsdp_config.dtype", "bfloat16", {"bf16": True}),
        (f"{ACTOR}fsdp_config.dtype", "float16", {"fp16": True}),
        (f"{ACTOR}fsdp_config.dtype", "float32", "translated"),
        (f"{ACTOR}fsdp_config.dtype", "fp8", "unknown"),
        ("actor_rollout_ref.rollout.min_p", 0.1, "unknown"),
        ("actor_rollout_ref.rollout.stop_token_ids", [1, 2], "unknown"),
        ("actor_rollout_ref.rollout.presence_penalty", 0.0, "left out"),
        ("algorithm.rollout_correction.rollout_is", "token", "unknown"),
        ("trainer.save_freq", 10, {"save_steps": 20}),
        ("data.train_max_samples", 9, {"data": {"path": "prompts.parquet", "limit": 9}}),
        ("data.train_max_samples", None, "left out"),
        (f"{MODEL}override_config.attn_implementation", "sdpa",
         {"student": {"path": "student", "attn_implementation": "sdpa"}}),
        ("distillation.num_workers", 8, "left out"),
        ("config_name", "ppo_trainer.yaml", "left out"),
        ("config_name", "mine", "unknown"),
        ("trainer.critic_warmup", 5, "unknown"),
        ("trainer.critic_warmup", 0, "left out"),
        (f"{ACTOR}surprise", 1, "unknown"),
        (f"{ACTOR}use_surprise", 1, "unknown"),
        ("algorithm.surprise", 1, "unknown"),
        (f"{MODEL}surprise", 1, "unknown"),
        ("distillation.distillation_loss.use_policy_gradient", True, "unknown"),
        (f"{OPTIM}lr_scheduler_type", "wsd", "refused"),
        (f"{ACTOR}ppo_epochs", 2, "refused"),
        ("actor_rollout_ref.rollout.multi_turn.enable", True, "refused"),
        (f"{ACTOR}fsdp_config.param_offload", True, "left out"),
    ],
)  # fmt: skip
def test_what_verl_learns_by_is_not_left_out(key, value, became) -> None:
    content = {**VERL, **SAVED, key: value}
    if isinstance(became, str):
        assert outcomes(content)[key] == became
    else:
        found = imported("x", content).recipe
        assert {name: found[name] for name in became} == became


def test_a_divergence_of_verl_whose_coefficient_is_zero_is_off() -> None:
    content = {**VERL, f"{ACTOR}use_kl_loss": True, f"{ACTOR}kl_loss_coef": 0.0}
    assert outcomes(content)[f"{ACTOR}use_kl_loss"] == "left out"


def test_the_gkd_of_verl_recipe_is_a_recipe() -> None:
    content = {k: v for k, v in VERL.items() if not k.startswith("distillation.")}
    theirs = {"actor_rollout_ref.ref.teacher_path": "teacher", f"{ACTOR}kd_loss_type": "reverse_kl"}
    found = imported("x", {**content, **theirs})
    assert not found.refused
    assert found.recipe["teacher"] == {"path": "teacher"}
    assert found.recipe["beta"] == 1.0


def test_a_cosine_of_verl_ends_at_its_least_rate() -> None:
    content = {**VERL, f"{OPTIM}lr_scheduler_type": "cosine", f"{OPTIM}min_lr_ratio": 0.1}
    found = imported("x", content).recipe
    assert found["lr_scheduler_type"] == "cosine_with_min_lr"
    assert found["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            [f"{ACTOR}ppo_mini_batch_size=$((BS*2))"],
            r"ppo_mini_batch_size: '\$\(\(BS\*2\)\)' is not",
        ),
        (["trainer.save_freq=${X}"], r"trainer.save_freq: '\$\{X\}' is not a number. Write the"),
        (["actor_rollout_ref.rollout.n=$N"], r"rollout.n: '\$N' is not a number"),
        ([f"{OPTIM}lr=$LR"], r"optim.lr: '\$LR' is a variable that the file does not set. Write"),
        ([f"{OPTIM}betas=x"], r"betas: 'x' are not two numbers"),
        ([f"{ACTOR}ppo_mini_batch_size=0"], "ppo_mini_batch_size: 0 prompts are no update"),
    ],
)
def test_a_variable_where_a_number_is_wanted_is_refused_in_words(words, said) -> None:
    with pytest.raises(TOPDError, match=said):
        imported("x", {**VERL, **training_of(f"run {' '.join(words)}")[1]})


def test_a_variable_for_a_share_is_refused_in_words() -> None:
    with pytest.raises(TOPDError, match=r"lmbda: '\$L' is not a number. Write the number"):
        imported("x", {**TRL, **training_of("run --lmbda $L")[1]})


def test_several_teachers_of_verl() -> None:
    content = dict(VERL)
    del content["distillation.teacher_models.teacher_model.model_path"]
    for name in ("math", "code"):
        content[f"distillation.teacher_models.{name}.model_path"] = f"{name}-model"
        content[f"distillation.teacher_models.{name}.key"] = f"data/{name}"
    recipe = imported("x", content).recipe
    assert recipe["teachers"] == {"data/math": "math-model", "data/code": "code-model"}
    assert recipe["teacher_column"] == "data_source"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"distillation.enabled": False}, "this trains by rewards"),
        ({"distillation.distillation_loss.use_task_rewards": True}, "rewards of the task"),
        ({"data.image_key": "picture"}, "images are not read"),
        ({"data.train_files": ["a", "b"]}, "2 files: join them"),
        ({"actor_rollout_ref.actor.use_kl_loss": True}, "a second divergence"),
        ({"distillation.distillation_loss.loss_mode": "magic"}, "magic is not a divergence"),
    ],
)
def test_what_verl_does_besides_is_refused(more, reason) -> None:
    with pytest.raises(TOPDError, match=reason):
        imported("x", {**VERL, **more}).text()


def test_verls_defaults_for_images_do_not_stop_an_import() -> None:
    result = imported("x", {**VERL, "data.image_key": "images", "data.video_key": "videos"})
    assert result.recipe == imported("x", VERL).recipe


def test_the_arguments_of_a_script() -> None:
    script = """
# --lr 7
SIZE=${SIZE:-32}  # prompts
MODEL="Qwen/x"
export FILES="['$HOME/a.parquet']"
DATA=(
    data.train_batch_size=${SIZE}
    +data.train_files="$FILES"
)
python3 -m verl.trainer.main_ppo "${DATA[@]}" \\
    actor_rollout_ref.model.path=$MODEL --config-name=x --bf16 --beta 0.5 $@
"""
    found = training_of(script)[1]
    assert found == {
        "data.train_batch_size": 32,
        "data.train_files": ["~/a.parquet"],
        "actor_rollout_ref.model.path": "Qwen/x",
        "config_name": "x",
        "bf16": True,
        "beta": 0.5,
    }
    found = training_of("run --lora_target_modules q_proj v_proj --lora_r 8 2>&1 | tee log")[1]
    assert found == {"lora_target_modules": ["q_proj", "v_proj"], "lora_r": 8}


TAKEN_OUT = "taken out of the configuration"
OF_BOTH = "--teacher_model_name_or_path t"


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("CUDA_VISIBLE_DEVICES=0,1 A='b c' python x.py --beta 1", {"beta": 1}),
        ("# run x.py \\\nA=0 python x.py --beta 1", {"beta": 1}),
        ("A=1\nA=2 b c\nif x; then A=3 B=$A b; fi\npython x.py --beta $A", {"beta": 1}),
        ("export A=2 B\npython x.py --beta $A", {"beta": 2}),
        ("torchrun --nproc 4 -m a.b --beta 1 --max-length=2 &> log", {"beta": 1, "max_length": 2}),
        ("python -m torch.distributed.run --seed 1 x.py --beta 1", {"beta": 1}),
        ("srun -c 8 bash -c 'accelerate launch --bf16 x.py --beta 1'", {"beta": 1}),
        ("sbatch <<'END'\npython don't.py --beta 1\nEND", {"beta": 1}),
        ("X='x.py --beta 1'\nX+=' --bf16'\neval \"python $X\"", {"beta": 1, "bf16": True}),
        ("X=(--beta 1)\nX+=(--bf16)\nrun \"${X[@]}\"", {"beta": 1, "bf16": True}),
        ("X=(q_proj v_proj)\nrun --lora_target_modules ${X[@]} --beta 1 # c",
         {"lora_target_modules": ["q_proj", "v_proj"], "beta": 1}),
        ("N=2\nrun a.b=${A:-${B:-$N}} --c ${D:-$((N * (3 + 4)))}", {"a.b": 2, "c": 14}),
        ("M=1\nif [ $X ]; then\n M=2\nelse M=3; fi\nY=(--beta $M)\nX=$M\nX=4\nrun ${Y[@]} --c $X",
         {"$M": "3, of one branch of an if, case or &&", "beta": 3, "c": 4}),
        ("M=1 N=2 L=3\nwhile [ $# -gt 0 ]; do case $1 in\n --n) N=$2; shift 2;;\nesac; done\n"
         "[ $X ] && M=(7)\nrun a.b=$M --c $N --d $L",
         {"$M": "7, of one branch of an if, case or &&", "a.b": 7, "d": 3,
          "$N": "2, of one branch of an if, case or &&", "c": 2}),
        ("run --no_bf16 --no-tf32 --no_cuda --no_x y --beta 1",
         {"bf16": False, "tf32": False, "no_cuda": True, "no_x": "y", "beta": 1}),
        ("run a.b-c.d=1 ~a.e ~a.f=2 ~/g --h ~a.i",
         {"a.b-c.d": 1, "h": "~a.i", **dict.fromkeys(("~a.e", "~a.f=2"), TAKEN_OUT)}),
        ("run a.b=$((2 ** 9)) --c $((N / 0))", {"a.b": "$((2**9))", "c": "$((N/0))"}),
        ("run a.b='{c:1}' --d \"x # \\\"y\\\"\" $MORE \"$@\"",
         {"a.b": {"c": 1}, "d": 'x # "y"', "$MORE": "not set by the file"}),
        ("vllm serve t --seed 1 --dtype half --x 1\n"
         f"python x.py {OF_BOTH} --beta 1\npython eval.py --beta 2 --a b --c d --e f",
         {"teacher_model_name_or_path": "t", "beta": 1}),
    ],
)  # fmt: skip
def test_a_script_is_read_as_a_shell_reads_it(script, found) -> None:
    assert training_of(script)[1] == found


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (f"run {OF_BOTH} --a 1\nrun {OF_BOTH} --a 2", "x.sh: it starts 2 trainings. Give a file"),
        ("A=aaaaaaaaaa\n" + "A=$A$A\n" * 30, "x.sh: the variables of this script become too"),
        ("run " + "${A:-" * 9999 + "}" * 9999, "x.sh: a variable of this script is nested too"),
    ],
)
def test_a_script_that_cannot_be_read_is_refused_in_words(script, said, tmp_path) -> None:
    (tmp_path / "x.sh").write_text(script)
    with pytest.raises(TOPDError, match=said):
        import_file(tmp_path / "x.sh")


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("python gkd.py --lmbda 1", "gkd"),
        ("torchrun -m src.gold_vision --lmbda 1", "gold"),
        ("trl distillation --beta 1", "distillation"),
        ("trl distillation --lmbda 1", "iw_opd"),
        ("python my_distillation.py --lmbda 1 --max_completion_length 9", "gold"),
        ("python gkd_or_not/mine.py --lmbda 1", "gkd"),
        ("python mine.py  # not gold.py", "distillation"),
    ],
)
def test_a_recipe_says_whose_defaults_it_has(command, kind, tmp_path) -> None:
    words = " ".join(f"--{key} {value}" for key, value in TRL.items())
    (tmp_path / "x.sh").write_text(command.replace("--", f"{words} --", 1) + "\n")
    if "--" not in command:
        (tmp_path / "x.sh").write_text(f"python mine.py {words}  # not gold.py")
    found = import_file(tmp_path / "x.sh")
    assert found.kind == kind
    named = {"gkd": "GKD", "gold": "GOLD", "iw_opd": "IWOPD"}.get(kind, "Distillation")
    assert f"configuration ({named}Config" in found.text()


@pytest.mark.parametrize(
    ("more", "method"),
    [("", "iw_opd"), ("--lmbda 1.0", "iw_opd"), ("--distillation_objective jsd", None)],
)
def test_a_script_of_iw_opd_has_its_defaults_and_its_method(more, method, tmp_path) -> None:
    words = " ".join(f"--{key} {value}" for key, value in TRL.items() if key != "beta")
    path = tmp_path / "x.sh"
    path.write_text(f"python trl/experimental/iw_opd/iw_opd.py {words} {more}\n")
    found = import_file(path)
    assert found.kind == "iw_opd"
    assert found.recipe.get("method") == method
    assert (found.recipe["beta"], found.recipe["top_p"]) == (1.0, 0.95)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "read as a DistillationConfig; a GKDConfig"),
        ({"lmbda": 1.0}, "read as a GKDConfig; other classes"),
        ({"lmbda": 1.0, "max_completion_length": 9}, "read as a GOLDConfig; other classes"),
        ({"loss_top_k": 1}, "read as a DistillationConfig of a former TRL; an IWOPDConfig has"),
        ({"lmbda": 1.0, "max_new_tokens": 9}, None),
        ({"use_uld_loss": False}, None),
        ({"loss_top_k": 1, "distillation_objective": "jsd"}, None),
        ({"iw_opd_epsilon": 1e-8}, None),
    ],
)
def test_a_class_that_is_guessed_is_told_of(more, said) -> None:
    (*found,) = (line for line in imported("x", {**TRL, **more}).lines if line.key == "class")
    assert [line.note.startswith(said) for line in found] == ([True] if said else [])
    assert imported("x", {**TRL, **more}, kind="gkd").lines[0].key != "class"


def test_a_file_s_text_is_read_as_the_parser_of_trl_reads_it(tmp_path) -> None:
    """As a saved TrainingArguments has them, or YAML in quotes."""
    off = {"use_peft": "False", "bf16": "false", "fp16": "True"}
    kwargs = {"teacher_model_init_kwargs": '{"dtype": "bfloat16"}'}
    ratio = {"warmup_ratio": None, "warmup_steps": 0}
    found = imported("x", {**TRL, **off, **kwargs, **ratio}).recipe
    assert (found["bf16"], found["fp16"], found["warmup_steps"]) == (False, True, 0)
    assert "lora" not in found
    assert found["teacher"] == {"path": "teacher", "dtype": "bfloat16"}
    words = " ".join(f"--{key} {value}" for key, value in TRL.items())
    (tmp_path / "x.sh").write_text(f"trl distillation {words}", encoding="utf-8-sig")
    assert not [line for line in import_file(tmp_path / "x.sh").lines if line.key == "class"]


def test_the_end_and_the_template_of_trl_are_the_student_s() -> None:
    given = {"eos_token": "<|im_end|>", "chat_template_path": "chat.jinja"}
    found = imported("x", {**TRL, **given})
    assert found.recipe["student"] == {
        **{"path": "student", "eos_token": "<|im_end|>", "chat_template": "chat.jinja"}
    }
    assert outcomes({**TRL, **given})["eos_token"] == "translated"
    assert outcomes({**TRL, "chat_template_path": "a/model"})["chat_template_path"] == "unknown"


def test_rollouts_of_older_weights_are_told_of() -> None:
    key = "vllm_sync_frequency"
    assert notes(TRL, vllm_sync_frequency=4)[key].endswith("there up to 4 updates old")
    assert notes(TRL, vllm_sync_frequency=1)[key] == ""
    assert outcomes({**TRL, key: 1})[key] == "left out"


def test_an_evaluation_of_trl_is_on_its_split_for_tests() -> None:
    found = imported("x", {**TRL, "eval_strategy": "steps", "dataset_config": "main"}).recipe
    assert found["eval_data"] == {"path": "prompts.jsonl", "name": "main", "split": "test"}
    assert found["eval_steps"] == 10  # as it logs
    assert "eval_steps" not in imported("x", {**TRL, "eval_strategy": "epoch"}).recipe
    more = {"eval_strategy": "epoch", "dataset_test_split": "val"}
    assert imported("x", {**TRL, **more}).recipe["eval_data"]["split"] == "val"
    off = imported("x", {**TRL, "eval_strategy": "no", "dataset_test_split": "val"})
    assert not {"eval_data", "eval_strategy"} & set(off.recipe)
    assert not off.unknown


def test_what_the_recipe_says_of_a_key_without_counterpart() -> None:
    text = imported("x", {**TRL, "packing": True, "$MORE": "not set by the file"}).text()
    assert "# packing = True: no counterpart here\n# $MORE = not set by the file\n" in text


def test_a_value_of_several_lines_is_one_line_of_a_comment() -> None:
    more = {"system_prompt": "Think.\nbeta: 0.1\n" + "x" * 999, "chat_template": "{% a %}\nb"}
    found = imported("x", {**TRL, **more})
    assert yaml.safe_load(found.text()) == found.recipe
    assert "# system_prompt = Think. beta: 0.1 xxx" in found.text()
    assert found.recipe["student"]["chat_template"] == "{% a %}\nb"


def test_a_variable_in_a_text_is_told() -> None:
    found = imported("x", {**TRL, "dataset_name": "$DATA/a.jsonl"})
    assert "# dataset_name: it has a variable that the file does not set\n" in found.text()


def test_a_script_of_gkd_has_its_defaults(tmp_path) -> None:
    words = " ".join(f"--{key} {value}" for key, value in TRL.items())
    for name, refused in (("gkd.py", True), ("distillation.py", False)):
        (tmp_path / "run.sh").write_text(f"python trl/{name} \\\n {words}\n")
        assert bool(import_file(tmp_path / "run.sh").refused) == refused


def test_the_command(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gkd.json").write_text(json.dumps({**TRL, "tf32": True}))  # wants a GPU
    run = CliRunner().invoke(app, ["import", "gkd.json", "--output", "recipe.yaml"])
    assert run.exit_code == 0, run.output
    assert read_recipe(Path("recipe.yaml"), {**CPU, "tf32": None}).student.path == "student"
    for place in ("recipe.yaml", "nowhere/recipe.yaml"):  # is there; its folder is not
        run = CliRunner().invoke(app, ["import", "gkd.json", "--output", place])
        assert run.exit_code == 2
        assert run.stderr.startswith(f"error: --output: {place}")
    Path("gkd.json").write_text(json.dumps({**TRL, "learning_rate": "fast"}))
    for _ in range(2):  # refused before it is written
        run = CliRunner().invoke(app, ["import", "gkd.json", "--output", "other.yaml"])
        assert run.exit_code == 2
        said = " ".join(run.stderr.split())
        assert "gkd.json: its recipe cannot be used" in said
        assert "learning_rate" in said
    Path("other.yaml").write_text("teacher_model_name_or_path: t\n1: 2\n")
    assert [line.key for line in import_file(Path("other.yaml")).unknown] == ["1"]
    Path("other.yaml").write_text("a: 1\n")
    with pytest.raises(TOPDError, match="neither a distillation of TRL's"):
        import_file(Path("other.yaml"))
    with pytest.raises(TOPDError, match="cannot be read"):
        import_file(Path("none.yaml"))
