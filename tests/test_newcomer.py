"""README's way from an install to a result, with one's own weights and data and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from conftest import rows, tiny_model, tiny_tokenizer
from topd.cli import app
from topd.commands.recipe import read_recipe

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SIZES = "--max_completion_length 8 --per_device_train_batch_size 2 --use_cpu true".split()  # noqa: SIM905
FOLDER = ["--output_dir", "runs/NAME"]  # by default it has the date in its name


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """Two folders of weights and two files of problems, in a folder of one's own."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("student", "teacher")):
        tiny_model(seed=seed).save_pretrained(Path("path/to") / name)
        tiny_tokenizer().save_pretrained(Path("path/to") / name)
    problems = [{"prompt": row["prompt"], "answer": row["solution"]} for row in rows(4)]
    for name in ("train.jsonl", "test.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in problems))
    return tmp_path


def command(start: str, **changes: str) -> list[str]:
    """The words of README's command that starts so, with other values of its options."""
    (line,) = [x for block in blocks("sh") for x in block.splitlines() if x.startswith(start)]
    words = line.partition("#")[0].split()[1:]
    for name, value in changes.items():
        words[words.index(f"--{name}") + 1] = value
    return words


def ran(words: list[str], *more: str) -> str:
    done = CliRunner().invoke(app, [*words, *more])
    assert done.exit_code == 0, done.output
    return done.output


def test_from_own_weights_to_a_page_and_an_evaluation(own: Path) -> None:
    ran(command("topd train --student", max_steps="1", bf16="false"), *SIZES, *FOLDER)
    assert Path("runs/NAME/report.html").is_file()
    assert Path("runs/NAME/student/model.safetensors").is_file()
    Path("runs/NAME/report.html").unlink()
    ran(command("topd report"))
    assert Path("runs/NAME/report.html").is_file()
    assert "results: " in ran(command("topd eval"), "--max-tokens", "8", "--samples", "1")


def test_the_commands_on_a_recipe_run_in_the_order_of_readme(own: Path) -> None:
    (text,) = blocks("yaml")
    for theirs, ours in (
        ("Qwen/Qwen3-0.6B ", "path/to/student"),
        ("Qwen/Qwen3-4B", "path/to/teacher"),
        ("gsm8k_train.jsonl", "train.jsonl"),
        ("{prompt: question, solution: answer}", "{solution: answer}"),
        ("max_completion_length: 512", "max_completion_length: 8"),
        ("bf16: true", "bf16: false"),  # a CPU may lack bfloat16
        ("chat_template_kwargs:", "#"),  # Qwen's
    ):
        assert theirs in text
        text = text.replace(theirs, ours)
    Path("recipe.yaml").write_text(text)
    Path("suite.yaml").write_text("problems: {path: test.jsonl, samples: 1, max_tokens: 8}\n")
    one = [*SIZES, "--max_steps", "1"]
    ran(command("topd warmstart"), *one, "--answers", "data", "--output_dir", "runs/STAGE1")
    few = ["--max_completion_length", "8", "--use_cpu", "true", "--rollouts", "4"]
    ran(command("topd probe"), *few, "--window_length", "2")
    ran(command("topd train recipe"), *one, *FOLDER)
    ran(command("topd report"))
    ran(command("topd eval"), "--max-tokens", "8", "--samples", "1")
    gate = CliRunner().invoke(app, command("topd gate"))
    assert gate.exit_code in (0, 1)  # a student of one update may be worse
    assert "verdict" in gate.output


def test_the_recipe_is_a_recipe(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    off = {"bf16": False, "use_cpu": True}  # a CPU may lack bfloat16
    assert read_recipe(path, off).teacher.dtype == "bfloat16"
    assert yaml.safe_load(text)["method"] == "opd"


def test_the_python_example_runs_with_own_models(own: Path) -> None:
    (code,) = blocks("python")
    for theirs, ours in (
        ('"Qwen/Qwen3-0.6B"', '"path/to/student"'),
        ('"Qwen/Qwen3-4B"', '"path/to/teacher"'),
        ("max_completion_length=512, max_steps=100", "max_completion_length=8, max_steps=1"),
        (
            'load_dataset("trl-lib/DeepMath-103K", split="train")',
            'load_dataset("json", data_files="train.jsonl", split="train")',
        ),
    ):
        assert theirs in code
        code = code.replace(theirs, ours)
    code = code.replace("max_steps=1", "max_steps=1, use_cpu=True, output_dir='runs/py'")
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=own, capture_output=True, text=True
    )
    assert f"report: {Path('runs/py/report.html')}" in done.stdout
    assert Path("runs/py/report.html").is_file()
    assert Path("runs/py/student/model.safetensors").is_file()


def test_a_recipe_of_the_package_is_found_anywhere(tmp_path, monkeypatch) -> None:
    from topd.commands import keys

    packaged = tmp_path / "package" / "recipes"
    packaged.mkdir(parents=True)
    (packaged / "mine.yaml").write_text("student: a\nteacher: b\ndata: {path: c}\n")
    monkeypatch.setattr(keys, "__file__", str(tmp_path / "package" / "commands" / "recipe.py"))
    monkeypatch.chdir(tmp_path)
    assert read_recipe("recipes/mine.yaml").student.path == "a"
