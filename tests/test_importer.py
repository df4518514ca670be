"""Configurations of TRL and verl as recipes: every key is told what became of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from topd.cli import app
from topd.commands.importer import arguments_of, import_file, imported
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


def outcomes(content: dict[str, Any]) -> dict[str, str]:
    return {line.key: line.outcome for line in imported("x", content).lines}


def test_a_distillation_config_of_trl_is_a_recipe(tmp_path) -> None:
    found = imported("x", TRL)
    path = tmp_path / "recipe.yaml"
    path.write_text(found.text())
    recipe = read_recipe(path)
    assert (recipe.student.path, recipe.teacher.path) == ("student", "teacher")
    assert recipe.data.path == "prompts.jsonl"
    args = recipe.args
    assert (args.beta, args.learning_rate, args.warmup_steps) == (0.5, 1e-5, 0.1)
    assert args.max_completion_length == 512  # TRL's default, not ours
    assert args.per_device_train_batch_size == 8
    said = {line.key: line.outcome for line in found.lines}
    assert said["beta"] == "kept"
    assert said["use_vllm"] == "left out"
    assert said["warmup_ratio"] == said["num_train_epochs"] == "translated"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"lmbda": 0.25}, "lmbda: 0.25 of the answers are the student's own"),
        ({"seq_kd": True, "lmbda": 1.0}, "seq_kd: it learns the teacher's texts"),
        ({"max_new_tokens": 64}, "lmbda: 0.5 .*its default there"),
        ({"load_in_4bit": True}, "load_in_4bit: a quantised student"),
        ({"use_uld_loss": True}, "use_uld_loss: losses across tokenizers"),
    ],
)
def test_what_a_recipe_cannot_say_is_refused(more, reason) -> None:
    with pytest.raises(TOPDError, match=reason):
        imported("x", {**TRL, **more}).text()


def test_a_gkd_config_that_is_on_policy_keeps_its_defaults() -> None:
    found = imported("x", {**TRL, "lmbda": 1.0, "max_new_tokens": 64}).recipe
    assert found["max_completion_length"] == 64
    assert found["temperature"] == 0.9


def test_lora_and_precision() -> None:
    lora = {"use_peft": True, "lora_r": 8, "lora_target_modules": ["q_proj"], "dtype": "bfloat16"}
    found = imported("x", {**TRL, **lora}).recipe
    assert found["lora"] == {"r": 8, "target_modules": ["q_proj"]}
    assert found["bf16"] is True
    assert "lora" not in imported("x", {**TRL, "lora_r": 8}).recipe


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
        ({"data.image_key": "images"}, "images are not read"),
        ({"data.train_files": ["a", "b"]}, "2 files: join them"),
        ({"actor_rollout_ref.actor.use_kl_loss": True}, "a second divergence"),
        ({"distillation.distillation_loss.loss_mode": "magic"}, "magic is not a divergence"),
    ],
)
def test_what_verl_does_besides_is_refused(more, reason) -> None:
    with pytest.raises(TOPDError, match=reason):
        imported("x", {**VERL, **more}).text()


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
    found = arguments_of(script)
    assert found == {
        "data.train_batch_size": 32,
        "data.train_files": ["$HOME/a.parquet"],
        "actor_rollout_ref.model.path": "Qwen/x",
        "config-name": "x",
        "bf16": True,
        "beta": 0.5,
    }


def test_a_script_of_gkd_has_its_defaults(tmp_path) -> None:
    words = " ".join(f"--{key} {value}" for key, value in TRL.items())
    for name, refused in (("gkd.py", True), ("distillation.py", False)):
        (tmp_path / "run.sh").write_text(f"python trl/{name} \\\n {words}\n")
        assert bool(import_file(tmp_path / "run.sh").refused) == refused


def test_the_command(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gkd.json").write_text(json.dumps(TRL))
    run = CliRunner().invoke(app, ["import", "gkd.json", "--output", "recipe.yaml"])
    assert run.exit_code == 0, run.output
    assert read_recipe(Path("recipe.yaml")).student.path == "student"
    assert CliRunner().invoke(app, ["import", "gkd.json", "--output", "recipe.yaml"]).exit_code == 2
    Path("other.yaml").write_text("a: 1\n")
    with pytest.raises(TOPDError, match="neither TRL's"):
        import_file(Path("other.yaml"))
    with pytest.raises(TOPDError, match="cannot be read"):
        import_file(Path("none.yaml"))
