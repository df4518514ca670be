"""Recipes and the configuration: what is read, what is refused, and in which words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import numpy as np
import pytest
import yaml
from peft import LoraConfig

from topd import TOPDConfig
from topd.commands.keys import SHARED, parse_overrides, read_mapping
from topd.commands.recipe import read_recipe
from topd.config import CHECKPOINTING, rules
from topd.config.rules import RULES
from topd.errors import TOPDError
from topd.inputs.models import ModelSpec
from topd.inputs.rows import DataSpec
from topd.inputs.self_teacher import SelfTeacher
from topd.training.warmstart import WarmstartConfig

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
PARTS = {"student": "a/student", "teacher": "a/teacher", "data": "prompts.jsonl", "use_cpu": True}
ON_CPU = {"use_cpu": True}  # transformers refuses bf16 on a machine without a GPU otherwise


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """Write a recipe: the three parts and the given keys, or a text as it is."""

    def write(text: str | bytes | None = None, *, without: str = "", **changes: Any) -> Path:
        path = tmp_path / "little.yaml"
        if text is None:
            content = {**PARTS, "output_dir": str(tmp_path / "run"), **changes}
            text = yaml.safe_dump({k: v for k, v in content.items() if k != without})
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(path: Path, overrides: dict[str, Any] | None = None, **options: Any) -> str:
    with pytest.raises(TOPDError) as caught:
        read_recipe(path, overrides, **options)
    assert isinstance(caught.value, ValueError)
    return str(caught.value).replace(f"{path}", "RECIPE")


def says(message: str, *parts: str) -> None:
    """Fault, place and remedy, in the words expected."""
    for part in parts:
        assert part in message


# The recipes of this repository


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_can_be_read(path):
    recipe = read_recipe(path, ON_CPU)
    assert type(recipe.args) is TOPDConfig
    assert recipe.data.path or recipe.data.task


@pytest.mark.parametrize(
    "path",
    [p for p in RECIPES if "warmstart" in yaml.safe_load(p.read_text())],
    ids=lambda p: p.stem,
)
def test_every_warm_start_of_the_repository_can_be_read(path):
    first, second = read_recipe(path, ON_CPU, warmstart=True), read_recipe(path, ON_CPU)
    assert type(first.args) is WarmstartConfig
    assert first.args.output_dir != second.args.output_dir
    if second.student.path.startswith("runs/"):  # stage 2 starts where stage 1 ends
        assert second.student.path == f"{first.args.output_dir}/student"


def test_the_paper_recipe_has_the_published_numbers():
    path = RECIPES[0].parent / "qwen3_paper.yaml"
    args, first = read_recipe(path, ON_CPU).args, read_recipe(path, ON_CPU, warmstart=True).args
    assert (args.num_generations, args.temperature, args.top_p) == (4, 1.0, 1.0)
    assert (args.max_prompt_length, args.max_completion_length) == (800, 8000)
    assert (args.divergence, args.kd_ratio, args.learning_rate) == ("reverse_kl", 1.0, 2e-6)
    assert (args.warmup_steps, args.max_grad_norm, args.num_train_epochs) == (0.05, 1.0, 1)
    assert (args.candidate_fraction, args.window_length) == (0.0225, 50)
    assert (first.divergence, first.kd_ratio, first.learning_rate) == ("forward_kl", 0.5, 2e-5)
    assert (first.temperature, first.top_p, first.max_completion_length) == (0.6, 0.95, 16384)
    assert first.per_device_train_batch_size * first.gradient_accumulation_steps * 4 == 128


# What is read


def test_a_path_stands_for_a_mapping_with_a_path(write):
    recipe = read_recipe(write())
    assert recipe.student == ModelSpec(path="a/student")
    assert recipe.teacher == ModelSpec(path="a/teacher")
    assert recipe.data == DataSpec(path="prompts.jsonl")
    assert recipe.eval_data is None
    assert recipe.lora is None


def test_scientific_notation_without_a_point_is_a_number(write):
    """YAML reads 1e-5 as a string."""
    path = write(Path(write()).read_text() + "learning_rate: 1e-5\n")
    assert read_recipe(path).args.learning_rate == 1e-5


def test_lora_is_for_causal_language_models_unless_it_says_otherwise(write):
    lora = read_recipe(write(lora={"r": 4, "target_modules": ["q_proj"]})).lora
    assert isinstance(lora, LoraConfig)
    assert (lora.r, lora.target_modules, lora.task_type) == (4, {"q_proj"}, "CAUSAL_LM")


def test_the_run_folder_is_named_after_the_recipe_and_the_stage(write):
    path = write(without="output_dir")
    assert read_recipe(path).args.output_dir.startswith("runs/little-2")
    assert read_recipe(path, warmstart=True).args.output_dir.startswith("runs/little-warmstart-2")


def test_one_anchor_may_serve_both_models(write):
    path = write("student: &m {path: a, dtype: bfloat16}\nteacher: *m\ndata: d.jsonl\n")
    recipe = read_recipe(path, ON_CPU)
    assert recipe.teacher == recipe.student == ModelSpec(path="a", dtype="bfloat16")
    changed = read_recipe(path, {**ON_CPU, "student.path": "b"})
    assert changed.student == ModelSpec(path="b", dtype="bfloat16")
    assert changed.teacher == recipe.teacher


def test_a_merged_mapping_may_be_overridden(write):
    text = "student: &m {path: a, dtype: bfloat16}\nteacher: {<<: *m, path: b}\ndata: d.jsonl\n"
    recipe = read_recipe(write(text), ON_CPU)
    assert recipe.teacher == ModelSpec(path="b", dtype="bfloat16")


def test_warm_start_shares_models_and_data_but_not_the_settings_of_stage_2(write):
    path = write(
        learning_rate=1.0,
        method="downweight",
        lora={"r": 4},
        warmstart={"data": "answers.jsonl", "top_p": 0.5, "use_cpu": True},
    )
    recipe = read_recipe(path, warmstart=True)
    assert recipe.student.path == "a/student"
    assert recipe.data.path == "answers.jsonl"
    assert recipe.lora.r == 4
    assert (recipe.args.learning_rate, recipe.args.method, recipe.args.top_p) == (2e-5, "opd", 0.5)
    assert read_recipe(path).data.path == "prompts.jsonl"


def test_overrides_go_to_the_stage_that_runs(write):
    path = write(warmstart={"seed": 1})
    assert read_recipe(path, {"seed": 7}, warmstart=True).args.seed == 7
    assert read_recipe(path, {"seed": 7}).args.seed == 7
    own = {"warmstart.seed": 8, "seed": 7}
    assert read_recipe(path, own, warmstart=True).args.seed == 8
    says(refusal(path, own), "warmstart.seed", "not run here", "topd compare")


HOW = {"dtype": "bfloat16", "attn_implementation": "eager", "trust_remote_code": True}
SERVED = {"completions": "http://a:1", "weights": "shared"}
WHICH = {"gguf_file": "x.gguf", "revision": "a", "tokenizer": "b", "eos_token": "c",
         "chat_template": "d"}  # fmt: skip


@pytest.mark.parametrize("part", ["student", "teacher", "teachers.a"])
def test_another_path_is_loaded_and_served_as_the_recipe_says(write, tmp_path, part):
    model = {"path": "old", "served": SERVED, **HOW, **WHICH}
    changes = {"teachers": {"a": model, "b": "other"}} if part == "teachers.a" else {part: model}
    path = write(without="teacher" if part == "teachers.a" else "", **changes)

    def read(to: str) -> dict[str, Any]:
        recipe = read_recipe(path, {part: to})
        found = recipe.teacher.sources["a"] if "." in part else getattr(recipe, part)
        return found.model_dump(exclude_defaults=True, exclude={"served"}), found.served

    there, served = read(str(tmp_path))
    assert there == {"path": str(tmp_path), **HOW}
    assert served.weights == "shared"
    there.pop("trust_remote_code")  # which is of a repository, not of the key
    assert read("hub/new")[0] == {**there, "path": "hub/new"}


def test_a_teacher_that_becomes_the_student_is_nothing_else(write):
    path = write(teacher={"path": "old", "dtype": "bfloat16"})
    assert read_recipe(path, {"teacher": "self"}).teacher == SelfTeacher()


# The command line's words


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--seed", "3"], {"seed": 3}),
        (["--seed=3"], {"seed": 3}),
        (["--data.limit", "8", "--seed", "3"], {"data.limit": 8, "seed": 3}),
        (["--bf16", "--seed", "3"], {"bf16": True, "seed": 3}),
        (["--bf16"], {"bf16": True}),
        (["--bf16", "false"], {"bf16": False}),
        (["--max_steps", "-1"], {"max_steps": -1}),
        (["--data", "{path: a, limit: 2}"], {"data": {"path": "a", "limit": 2}}),
        (["--teacher_prompt=a=b"], {"teacher_prompt": "a=b"}),
        (["--teacher_prompt", "null"], {"teacher_prompt": None}),
        (["--teacher_prompt", "Hint: 7"], {"teacher_prompt": "Hint: 7"}),
        (["--warmstart.teacher_prompt=- 7"], {"warmstart.teacher_prompt": "- 7"}),
        (["--teacher_prompt", "So:\n{{ prompt }} "], {"teacher_prompt": "So:\n{{ prompt }} "}),
        (["--teacher_prompt=Solve\n\nit."], {"teacher_prompt": "Solve\n\nit."}),
        (["--teacher_prompt", "'7'"], {"teacher_prompt": "7"}),
        (["--seed", "1", "--seed", "2"], {"seed": 2}),
    ],
)
def test_words_are_keys_and_yaml_values(words, found):
    assert parse_overrides(words) == found


@pytest.mark.parametrize("word", ["seed", "-s"])
def test_a_word_without_a_key_is_refused(word):
    with pytest.raises(TOPDError, match=r"command line: .* stands alone\. Write --key value"):
        parse_overrides(["--seed=3", word])


def test_a_value_that_is_not_yaml_is_text():
    template = "{{ prompt }} {{ solution }}"
    assert parse_overrides(["--teacher_prompt", template]) == {"teacher_prompt": template}


def test_a_dotted_key_opens_a_path_and_leaves_the_rest(write):
    recipe = read_recipe(write(), {"student.dtype": "bfloat16", "data.columns.prompt": "question"})
    assert recipe.student == ModelSpec(path="a/student", dtype="bfloat16")
    assert recipe.data == DataSpec(path="prompts.jsonl", columns={"prompt": "question"})


def test_a_dotted_key_into_a_number_is_refused(write):
    says(refusal(write(max_steps=3), {"max_steps.x": 1}), "max_steps")


# What is refused


@pytest.mark.parametrize("part", ["student", "teacher", "data"])
def test_a_missing_part_is_named(write, part):
    path = write(without=part)
    says(refusal(path), "RECIPE", f"{part} is missing", "needs student, teacher and data")


@pytest.mark.parametrize("warmstart", [False, True])
def test_an_unknown_key_is_refused_with_a_suggestion(write, warmstart):
    wrong = {"methd": "opd"}
    path = write(warmstart=wrong) if warmstart else write(**wrong)
    says(refusal(path, warmstart=warmstart), "RECIPE", "'methd'", "Did you mean method?")


def test_an_unknown_key_like_no_other_points_to_the_list_of_keys(write):
    says(refusal(write(xyzzyxx=1)), "'xyzzyxx'", "topd settings WORD finds them")


def test_an_unknown_key_of_a_part_is_told_which_the_part_has(write):
    words = "It has chat, columns, limit, name, path, seed, size, split, task."
    says(refusal(write(data={"path": "prompts.jsonl", "xyzzyxx": 1})), "in data", words)


def test_an_unknown_key_of_the_command_line_is_refused(write):
    says(refusal(write(), {"sed": 1}), "'sed'", "Did you mean seed?")


@pytest.mark.parametrize(
    ("part", "key", "near"),
    [
        ("student", "dtpe", "dtype"),
        ("teacher", "eos_tokn", "eos_token"),
        ("data", "collumns", "columns"),
        ("eval_data", "limt", "limit"),
        ("lora", "target_module", "target_modules"),
    ],
)
def test_an_unknown_nested_key_is_refused_with_its_place_and_a_suggestion(write, part, key, near):
    content = {"path": "x", key: 1} if part != "lora" else {key: 1}
    message = refusal(write(**{part: content}))
    says(message, part, key)
    says(message, f"Did you mean {near}?")


def test_an_unknown_key_of_the_warm_start_names_the_section(write):
    says(refusal(write(warmstart={"answrs": "data"}), warmstart=True), "warmstart", "answers?")


def test_an_unknown_key_of_the_warm_start_is_refused_before_stage_2_too(write):
    says(refusal(write(warmstart={"answrs": "data"})), "warmstart", "'answrs'")


def test_an_unknown_key_of_stage_2_is_refused_before_the_warm_start_too(write):
    says(refusal(write(methd="opd"), warmstart=True), "'methd'", "Did you mean method?")


def test_a_column_that_nothing_reads_is_refused(write):
    """columns: {promt: question} would leave the prompt unmapped."""
    data = {"path": "x.jsonl", "columns": {"promt": "question"}}
    says(refusal(write(data=data)), "columns", "promt")


@pytest.mark.parametrize(
    "text",
    [
        "student: a\nstudent: b\n",
        "student: {path: a, path: b}\n",
        "warmstart: {seed: 1, seed: 2}\n",
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(write, text):
    says(refusal(write("# first line\n" + text)), "a key twice", "line 2")


def test_a_key_that_stands_twice_beside_a_merge_is_refused(write):
    text = "student: &m {dtype: float32}\nteacher: {<<: *m, path: a, path: b}\n"
    says(refusal(write(text)), "a key twice", "line 2")


def test_what_was_merged_may_be_merged_again(write):
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b, y: 3}\n"
    assert read_mapping(write(text))["c"] == {"x": 1, "y": 3}


def test_a_missing_recipe_is_named(tmp_path):
    says(refusal(tmp_path / "no.yaml"), "RECIPE", "cannot be read", "No such file")


def test_a_folder_is_no_recipe(tmp_path):
    says(refusal(tmp_path), "RECIPE", "cannot be read")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("student: [", "not valid YAML"),
        ("student: \x00", "not valid YAML"),
        ("- student\n", "must be a mapping"),
        ("student", "must be a mapping"),
        ("", "must be a mapping"),
        (b"\xff\xfe\x00\x81", "cannot be read"),
        ("student: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(write, text, fault):
    path = write(text)
    says(refusal(path), "RECIPE", fault)


@pytest.mark.parametrize("stage", [["seed"], "seed", 3])
def test_the_warm_start_must_be_a_mapping(write, stage):
    says(refusal(write(warmstart=stage), warmstart=True), "warmstart must be a mapping")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", "fast"),
        ("max_steps", "many"),
        ("num_generations", 1.5),
        ("method", 3),
        ("window_length", [50]),
        ("drop_long_prompts", "perhaps"),
        ("chat_template_kwargs", "enable_thinking"),
        ("chat_template_kwargs", ["enable_thinking"]),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_key(write, key, value):
    path = write(**{key: value})
    message = refusal(path)
    says(message, f"RECIPE: {key}:", repr(value))


@pytest.mark.parametrize(
    ("part", "value"),
    [("student", 3), ("student", None), ("teacher", ["a"]), ("data", 3), ("lora", "q_proj")],
)
def test_a_part_that_is_no_mapping_is_refused_with_what_to_write(write, part, value):
    path = write(**{part: value})
    says(refusal(path), f"RECIPE: {part}", "mapping")


def test_a_nested_value_of_the_wrong_type_is_refused_with_its_place(write):
    says(refusal(write(data={"path": "x", "limit": 0})), "data.limit", "greater than or equal to 1")
    says(refusal(write(teacher={"path": "x", "dtype": "int8"})), "teacher.dtype", "'bfloat16'")
    says(refusal(write(lora={"task_type": "GUESSING"})), "lora", "GUESSING", "CAUSAL_LM")
    says(refusal(write(teacher={"dtype": "float32"})), "teacher.path is missing")


@pytest.mark.parametrize("data", [{"path": "a.jsonl", "task": "gsm_symbolic"}, {"limit": 3}])
def test_data_has_one_source(write, data):
    says(refusal(write(data=data)), "data", "give either path or task")


@pytest.mark.parametrize(
    ("source", "key"),
    [("path", "size"), ("path", "seed"), ("task", "split"), ("task", "name")],
)
def test_a_key_of_the_other_source_of_data_is_refused(write, source, key):
    data = {source: "x", key: 3 if source == "path" else "test"}
    says(refusal(write(data=data)), "data", f"{key} has no effect with {source}")


@pytest.mark.parametrize("key", ["save_strategy", "logging_strategy", "eval_strategy"])
def test_no_means_no_where_text_is_wanted(write, key):
    """YAML reads a bare no as false."""
    assert getattr(read_recipe(write(), parse_overrides([f"--{key}=no"])).args, key) == "no"


OUT_OF_RANGE: dict[str, list[Any]] = {
    "seed": [-1, 1 << 32],
    "max_steps": [0, -2],
    "num_train_epochs": [0.0, -1.0, float("inf")],
    "weight_decay": [-1.0, float("nan"), float("inf")],
    "adam_beta1": [1.0, -0.1, float("nan")],
    "adam_beta2": [1.5],
    "adam_epsilon": [-1.0, float("inf")],
    "max_grad_norm": [-1.0, float("nan")],
    "warmup_steps": [-1.0, 1.5, float("inf")],
    "logging_steps": [0, -1, 1.5, float("nan")],
    "save_steps": [0, -3],
    "eval_steps": [0],
    "eval_delay": [-1.0, float("nan")],
    "save_total_limit": [0],
    "torch_empty_cache_steps": [0],
    "dataloader_num_workers": [-1],
    "dataloader_prefetch_factor": [0],
    "ddp_timeout": [0],
    "ddp_bucket_cap_mb": [-1],
    "beta": [-0.1, 1.1, float("nan")],
    "kd_ratio": [-0.1, 1.1],
    "false_alarm_share": [-0.1, 1.1],
    "top_p": [0.0, 1.1],
    "candidate_fraction": [0.0, 1.1],
    "temperature": [0.0, -1.0, float("nan"), float("inf")],
    "epsilon": [0.0],
    "max_logprob_gap": [0.0],
    "max_importance": [0.9, float("inf")],
    "trajectory_weight": [-0.1, float("inf"), float("nan")],
    "position_weight": [-0.1],
    "window_temperature": [-0.1],
    "top_k": [-1],
    "learning_rate": [-1e-6, float("inf")],
    "max_prompt_length": [0],
    "max_completion_length": [0],
    "num_generations": [0],
    "max_turns": [0],
    "window_length": [0],
    "window_gap": [0],
    "look_ahead_every": [0],
    "look_ahead_until": [0],
    "teacher_share": [-0.1, 1.1],
    "window_rejoin": [-1],
    "window_replay": [-1],
    "chunk_tokens": [0],
    "score_batch_size": [0],
    "per_device_train_batch_size": [0],
    "per_device_eval_batch_size": [0],
    "gradient_accumulation_steps": [0],
    "embedding": ["both"],
    "solver": ["magic"],
    "teachers_mix": ["sum"],
    "reference": ["right"],
    "trajectory_reduction": ["median"],
    "token_loss": ["some"],
    "stop_length": [-0.1],
    "stop_finished": [-0.1],
    "stop_fresh": [-0.1],
    "stop_entropy": [-0.1],
    "stop_divergence": [-0.1],
    "stop_patience": [0],
    "nonfinite": ["continue"],
    "remove_unused_columns": [True],
}


def test_every_rule_of_the_configuration_is_tested_here():
    words = {k for k, hint in get_type_hints(TOPDConfig).items() if get_origin(hint) is Literal}
    ranges = {name for names, _, _ in RULES for name in names.split()}
    assert set(OUT_OF_RANGE) == ranges | words


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in OUT_OF_RANGE.items() for value in values]
)
def test_a_value_out_of_range_is_refused_with_its_key_in_a_recipe_and_in_python(write, key, value):
    path = write(**{key: value})
    says(refusal(path), f"RECIPE: {key}:", repr(value))
    with pytest.raises(TOPDError, match=rf"^{key}: .*(must be|should be|is unknown)"):
        TOPDConfig(output_dir="unused", use_cpu=True, **{key: value})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learning_rate": "abc"}, "learning_rate: Input should be a valid number"),
        ({"top_k": 1.5}, "top_k: Input should be a valid integer"),
        ({"bf16": "yes please"}, "bf16: Input should be a valid boolean"),
        ({"max_grad_norm": None}, "max_grad_norm: Input should be a valid number"),
        ({"lr_scheduler_kwargs": {"num_cycles": float("nan")}}, "lr_scheduler_kwargs: nan must be"),
        ({"method_options": [1]}, "method_options: "),
        ({"tf32": True}, r"tf32.*Correct it, or leave it out\."),
        ({"bf16": True, "fp16": True}, r"not both\. Correct it, or leave it out\."),
        ({"accelerator_config": {"split_batchs": True}}, "split_batchs"),
        ({"optim": "nonsense"}, "nonsense is not a valid"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "requires an eval strategy"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor can only be set"),
        ({"method": "kl_top", "method_options": {"share": "x"}}, "share: 'x' is not of the type"),
        ({"method": "kl_top", "method_options": {"share": 7}}, "share: 7 must be in"),
        ({"method": "kl_top", "method_options": '{"share": 7}'}, "share: 7 must be in"),
        ({"method": "relay", "method_options": {"tokens": 2.5}}, "tokens: 2.5 is not of the type"),
    ],
)
def test_values_of_wrong_types_are_refused_in_python_as_in_recipes(options, said):
    with pytest.raises(TOPDError, match=said):
        TOPDConfig(output_dir="unused", use_cpu=True, **options)


def test_bf16_without_a_gpu_is_refused_by_its_name(monkeypatch):
    monkeypatch.setattr(rules, "is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(TOPDError, match="bf16: no GPU here has it"):
        TOPDConfig(output_dir="unused", bf16=True)
    TOPDConfig(output_dir="unused", bf16=True, use_cpu=True)


def test_values_are_taken_as_the_types_of_their_fields(tmp_path):
    made = TOPDConfig(
        output_dir=tmp_path, use_cpu=True, learning_rate="1e-3", seed=np.int64(3),
        temperature=np.float32(0.5), max_grad_norm=float("inf"), log_rollouts="no",
    )  # fmt: skip
    assert (made.output_dir, made.learning_rate, made.seed) == (str(tmp_path), 1e-3, 3)
    assert (type(made.seed), made.temperature, made.log_rollouts) == (int, 0.5, False)


def test_an_unknown_method_is_refused_with_those_there_are(write):
    says(refusal(write(method="topdd")), "method", "'topdd'", "opd, first_fork, topd")


def test_epsilon_without_the_sinkhorn_solver_is_refused(write):
    says(refusal(write(epsilon=0.1)), "epsilon", "no effect", "Set solver: sinkhorn")
    assert read_recipe(write(epsilon=0.1, solver="sinkhorn")).args.epsilon == 0.1


def test_cross_entropy_on_own_samples_is_refused(write):
    says(refusal(write(kd_ratio=0.5)), "kd_ratio", "no signal", "warm start")
    stage = {"kd_ratio": 0.25, "use_cpu": True}
    assert read_recipe(write(warmstart=stage), warmstart=True).args.kd_ratio == 0.25


def test_a_divergence_that_is_no_part_of_a_warm_start_is_refused(write):
    stage = {"beta": 1.0, "use_cpu": True}
    says(refusal(write(warmstart=stage), warmstart=True), "beta", "no effect", "Set kd_ratio")
    path = write(warmstart={**stage, "kd_ratio": 0.5})
    assert read_recipe(path, warmstart=True).args.divergence == "reverse_kl"


def test_a_warm_start_shares_prompts_lengths_precision_and_batches_and_has_its_own_rate(write):
    """Unless it has its own; how long and how fast stage 2 learns is not its business."""
    more = {
        **{"max_completion_length": 77, "teacher_prompt": "{{ prompt }}!", "bf16": False},
        **{"activation_checkpointing": True, "max_prompt_length": 99},
        "gradient_accumulation_steps": 7,
        **{"learning_rate": 0.5, "max_steps": 3, "temperature": 2.0, "method": "topd"},
    }
    first = read_recipe(write(**more, warmstart={"max_prompt_length": 5}), warmstart=True).args
    assert (first.max_completion_length, first.max_prompt_length) == (77, 5)
    assert (first.teacher_prompt, first.gradient_accumulation_steps) == ("{{ prompt }}!", 7)
    assert getattr(first, CHECKPOINTING) is True
    assert (first.learning_rate, first.max_steps, first.temperature) == (2e-5, -1, 0.6)
    stage = {"activation_checkpointing": False, "per_device_train_batch_size": 2}
    own = read_recipe(write(**more, warmstart=stage), warmstart=True).args
    assert (getattr(own, CHECKPOINTING), own.gradient_accumulation_steps) == (False, 1)
    given = {"gradient_checkpointing": False, "teacher_prompt": None}
    own = read_recipe(
        write(**more), {**given, "per_device_train_batch_size": 2}, warmstart=True
    ).args
    assert (getattr(own, CHECKPOINTING), own.teacher_prompt) == (False, None)
    assert own.gradient_accumulation_steps == 7
    assert getattr(read_recipe(write(**more), given).args, CHECKPOINTING) is False
    settings = {key for group in SHARED for key in group}
    fields_of = {f.name for f in fields(WarmstartConfig)}
    assert {k for k in settings if not re.match("(activation|gradient)_check", k)} <= fields_of


@pytest.mark.parametrize(("kd_ratio", "told"), [(0, None), (0.5, "{{ hint }}")])
def test_a_prompt_of_a_teacher_that_nobody_asks_is_no_part_of_a_warm_start(write, kd_ratio, told):
    """Its columns may be those of stage 2 alone."""
    path = write(teacher_prompt="{{ hint }}", reference="none", warmstart={"answers": "data"})
    assert read_recipe(path, {"kd_ratio": kd_ratio}, warmstart=True).args.teacher_prompt == told


def test_a_warm_start_says_what_it_learns_how_long_and_how_fast():
    def said(**more: Any) -> str:
        return WarmstartConfig(output_dir="unused", use_cpu=True, **more).settings_of_method()

    assert said(kd_ratio=0, max_steps=7, gradient_accumulation_steps=8) == (
        "stage 1: cross-entropy on the teacher's answers, 32 an update, 7 updates at 2e-05"
    )
    assert said(kd_ratio=0.25, answers="data") == (
        "stage 1: 0.25 forward KL, the rest cross-entropy, on the data's solutions, 4 an update, "
        "1 epoch at 2e-05"
    )
    assert said(kd_ratio=1, max_steps=1).startswith("stage 1: forward KL on the teacher's answers")
    assert said(kd_ratio=1, max_steps=1).endswith(", 1 update at 2e-05")


def test_guidance_in_a_warm_start_is_refused(write):
    path = write(warmstart={"method": "topd", "use_cpu": True})
    says(refusal(path, warmstart=True), "method", "'topd'", "warm start takes opd")


def test_generations_that_do_not_fill_an_update_are_refused(write):
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    message = refusal(write(num_generations=4, **sizes))
    says(message, "num_generations", "4 does not divide the 6 rollouts")
    assert read_recipe(write(num_generations=6, **sizes)).args.num_generations == 6


@pytest.mark.parametrize(
    ("key", "why"), [("fsdp", "the launcher's to say"), ("deepspeed", "is not supported")]
)
def test_sharding_is_refused(write, key, why):
    says(refusal(write(**{key: "full_shard"})), key, why, "Leave it out")


def test_pushing_the_run_folder_to_the_hub_is_refused(write):
    says(refusal(write(push_to_hub=True)), "push_to_hub", "all prompts", "student/ folder")


# The configuration


@pytest.mark.parametrize(
    ("beta", "kind"),
    [(1.0, "reverse_kl"), (0.0, "forward_kl"), (0.5, "jsd"), (0.999, "jsd"), (1e-3, "jsd")],
)
def test_beta_names_the_divergence_as_in_trl(beta, kind):
    assert TOPDConfig(output_dir="unused", use_cpu=True, beta=beta).divergence == kind


PAPER = {  # arXiv 2606.00305, stage 2
    "temperature": 1.0,
    "top_p": 1.0,
    "max_prompt_length": 800,
    "beta": 1.0,
    "kd_ratio": 1.0,
    "learning_rate": 2e-6,
    "warmup_steps": 0.05,
    "max_grad_norm": 1.0,
    "num_train_epochs": 1.0,
    "candidate_fraction": 0.0225,
    "window_length": 50,
    "false_alarm_share": 0.3,
}
OPEN = {  # what the paper leaves open: the defaults of the table "what we do"
    "candidate_loss": "sampled",
    "window_temperature": 0.0,
    "embedding": "teacher",
    "position_weight": 0.0,
    "solver": "exact",
    "ot_threshold": None,
    "trajectory_reduction": "mean",
    "trajectory_weight": 0.1,
    "window_gap": None,
    "candidate_threshold": None,
}


@pytest.mark.parametrize(("key", "value"), [*PAPER.items(), *OPEN.items()])
def test_defaults_are_those_of_the_method(key, value):
    """All but the method itself: that is plain OPD, and topd is named."""
    assert getattr(TOPDConfig(output_dir="unused", use_cpu=True, method="topd"), key) == value


def test_defaults_of_the_warm_start_are_the_papers_but_for_cross_entropy():
    args = WarmstartConfig(output_dir="unused", use_cpu=True)
    assert (args.divergence, args.kd_ratio, args.asks_teacher) == ("forward_kl", 0.0, False)
    assert (args.temperature, args.top_p) == (0.6, 0.95)
    assert (args.learning_rate, args.warmup_steps, args.num_train_epochs) == (2e-5, 0.05, 1)
    assert args.loss_temperature == 1.0


def test_every_field_of_ours_has_help():
    own = {name for kind in (TOPDConfig, WarmstartConfig) for name in kind.__annotations__}
    own.discard("left_out")  # which is no field
    documented = {f.name for f in fields(WarmstartConfig) if f.metadata.get("help", "").strip()}
    assert own <= documented


def test_recomputation_has_both_names_and_no_warning(recwarn):
    more = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    new = {key.replace("gradient", "activation"): value for key, value in more.items()}
    args = [
        read_recipe(None, PARTS | ON_CPU | keys | {"output_dir": "unused"}).args
        for keys in (more, new)
    ]
    assert getattr(args[0], CHECKPOINTING) is True
    assert args[0].to_dict() == args[1].to_dict()
    assert not [w for w in recwarn if "checkpointing" in str(w.message)]
