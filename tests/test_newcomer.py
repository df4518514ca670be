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
SIZES = "--max_steps 1 --max_completion_length 8 --per_device_train_batch_size 2 --use_cpu true"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """Two folders of weights and a file of problems, in a folder of one's own."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("student", "teacher")):
        tiny_model(seed=seed).save_pretrained(Path("path/to") / name)
        tiny_tokenizer().save_pretrained(Path("path/to") / name)
    problems = [{"prompt": row["prompt"], "answer": row["solution"]} for row in rows(4)]
    for name in ("train.jsonl", "test.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in problems))
    return tmp_path


def command(start: str) -> list[str]:
    """The words of README's command that starts so."""
    (line,) = [x for block in blocks("sh") for x in block.splitlines() if x.startswith(start)]
    return line.partition("#")[0].split()[1:]


def ran(words: list[str]) -> str:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return done.output


def test_from_own_weights_to_a_page_and_an_evaluation(own: Path) -> None:
    words = [w for w in command("topd train --student") if w not in ("--bf16", "true")]
    words[words.index("--max_steps") : words.index("--max_steps") + 2] = SIZES.split()
    ran([*words, "--data.chat", "false", "--output_dir", "runs/NAME"])
    assert Path("runs/NAME/report.html").is_file()
    assert Path("runs/NAME/student/model.safetensors").is_file()
    ran(command("topd report"))
    tail = "--max-tokens 8 --samples 1 --no-chat --columns prompt=prompt,answer=answer"
    assert "results: " in ran([*command("topd eval"), *tail.split()])


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
