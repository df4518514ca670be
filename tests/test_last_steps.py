"""Every command ends as it began, on every kind of data that it takes."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from conftest import USE_CPU, tiny_model, tiny_tokenizer
from topd import cli

ANSWERS = [(f"{a} + {b}", str(a + b)) for a in (3, 4) for b in (2, 5)]
TURNS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in ANSWERS
]
PLAIN = [{"prompt": question, "solution": answer, "answer": answer} for question, answer in ANSWERS]
RENAMED = {"columns": {"prompt": "q", "answer": "meta.a", "solution": "meta.a"}}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
KINDS = ("strings", "messages", "turns", "columns", "csv", "gzip", "task", "testbed")
SMALL = {
    "max_steps": 2, "per_device_train_batch_size": 2, "max_completion_length": 6,
    "window_length": 3, "candidate_fraction": 0.4, "logging_steps": 1, "save_steps": 1,
    "save_strategy": "steps", "use_cpu": USE_CPU,
}  # fmt: skip


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_of(root: Path, kind: str) -> dict[str, Any]:
    """A data block of each kind."""
    path = root / f"{kind}.jsonl"
    if kind == "strings":
        return {"path": lines(path, PLAIN), "chat": False}
    if kind == "messages":
        rows = [{"messages": turns, "answer": turns[-1]["content"]} for turns in TURNS]
        return {"path": lines(path, rows)}
    if kind == "turns":
        rows = [{"prompt": turns[:1], "solution": turns[1]["content"]} for turns in TURNS]
        return {"path": lines(path, rows)}
    if kind == "columns":
        rows = [{"q": question, "meta": {"a": answer}} for question, answer in ANSWERS]
        return {"path": lines(path, rows), **RENAMED}
    if kind == "csv":
        with open(path.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "solution", "answer"])
            writer.writeheader()
            writer.writerows(PLAIN)
        return {"path": str(path.with_suffix(".csv"))}
    if kind == "gzip":
        with gzip.open(f"{path}.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in PLAIN)
        return {"path": f"{path}.gz"}
    if kind == "task":
        columns = {"prompt": "question", "solution": "answer"}
        return {"task": "basic_arithmetic", "size": 4, "columns": columns}
    return {"path": "testbed://arithmetic", "limit": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("last")
    for seed, name in enumerate(("student", "teacher")):
        tiny_model(seed=seed).save_pretrained(root / name)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(root / name)
    return root


def topd(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


def fine(*words: str, code: int = 0) -> str:
    result = topd(*words)
    assert result.exit_code == code, (words, result.output[-2000:], result.exception)
    return result.output


def recipe(root: Path, kind: str, name: str, **more: Any) -> tuple[str, Path]:
    """A recipe on a kind of data, and where its run goes."""
    folder = root / f"{name}-{kind}"
    models = {"student": str(root / "student"), "teacher": str(root / "teacher")}
    if kind == "testbed":
        models = {role: f"testbed://arithmetic/{role}" for role in models}
    content = {**models, "data": data_of(root, kind), "output_dir": str(folder), **more}
    path = root / f"{name}-{kind}.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path), folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_and_all_that_is_done_with_it(root, kind):
    path, folder = recipe(root, kind, "train", **SMALL)
    fine("train", path, "--quiet")
    run = str(folder)
    assert (folder / "student" / "README.md").is_file()
    fine("report", run)
    fine("show", run, "--rollout", "1")
    fine("figures", run, "--format", "svg")
    fine("audit", run)
    fine("replay", run, "--step", "1")


@pytest.mark.parametrize(
    ("kind", "answers"), [*((kind, "data") for kind in KINDS), ("testbed", "teacher")]
)
def test_a_warm_start(root, kind, answers):
    small = {k: v for k, v in SMALL.items() if "window" not in k and "candidate" not in k}
    name = f"warm-{answers}"
    small["max_completion_length"] = 64 if kind == "testbed" else 6
    own = {**small, "answers": answers, "output_dir": str(root / f"{name}-{kind}")}
    path, folder = recipe(root, kind, name, warmstart=own)
    fine("warmstart", path, "--quiet")
    fine("report", str(folder))
    fine("audit", str(folder))


@pytest.mark.parametrize("kind", ["columns", "testbed"])
def test_probe_and_repair(root, kind):
    small = {"use_cpu": USE_CPU, "max_completion_length": 8, "window_length": 3}
    path, folder = recipe(root, kind, "probe", **small, rollouts=4)
    fine("probe", path, "--quiet", "--output-dir", str(folder))
    fine("report", str(folder))
    small["methods"] = ["opd", "topd"]
    path, folder = recipe(root, kind, "repair", **small, samples=2, updates=1)
    fine("repair", path, "--quiet", "--output-dir", str(folder))
    fine("report", str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_eval_and_gate(root, kind):
    data = data_of(root, kind)
    if kind in ("messages", "task"):  # no column of its own for the question; no file
        said = fine("eval", str(root / "student"), data.get("path", "no.jsonl"), code=2)
        assert "columns" in said or "cannot be read" in said
        return
    model = str(root / "student") if kind != "testbed" else "testbed://arithmetic/student"
    columns = ["--columns", "prompt=q,answer=meta.a"] if kind == "columns" else []
    limits = ["--limit", "3", "--max-tokens", "6", "--samples", "2"]
    output = root / f"eval-{kind}"
    fine("eval", model, data["path"], *columns, *limits, "--output", str(output))
    assert json.loads((output / "evaluation.json").read_text())["problems"] == 3
    fine("report", str(output))
    problems = {"path": data["path"], "limit": 3, "max_tokens": 6, "samples": 1}
    if columns:
        problems["columns"] = {"prompt": "q", "answer": "meta.a"}
    suite = root / f"suite-{kind}.yaml"
    suite.write_text(yaml.safe_dump({"problems": problems}))
    output = root / f"gate-{kind}"
    fine("gate", model, model, "--suite", str(suite), "--output", str(output))
    fine("report", str(output))


@pytest.mark.parametrize("kind", ["messages", "columns", "testbed"])
def test_a_comparison_with_an_evaluation(root, kind):
    """Arms, an evaluation of each and the table at its end."""
    small = {k: v for k, v in SMALL.items() if "window" not in k and "candidate" not in k}
    more: dict[str, Any] = {"compare": {"arms": {"opd": {"method": "opd"}}, "seeds": [0, 1]}}
    problems = data_of(root, "gzip" if kind == "messages" else kind)
    problems.pop("columns", None)
    if kind == "columns":
        problems["columns"] = {"prompt": "q", "answer": "meta.a"}
    more["evaluation"] = {**problems, "limit": 2, "max_tokens": 4, "samples": 1, "every": 1}
    path, folder = recipe(root, kind, "compare", **small, **more)
    fine("compare", path, "--quiet")
    fine("report", str(folder))


@pytest.mark.parametrize("held", ["gate.json", "base_problems.jsonl", "evaluation.json"])
def test_a_folder_with_a_gate_or_an_evaluation_gets_no_other_records(root, tmp_path, held):
    """Nor those of a second gate after one that was stopped between its models."""
    (tmp_path / held).write_text("{}\n")
    path, _ = recipe(root, "strings", "held", **SMALL)
    data, model = data_of(root, "strings")["path"], str(root / "student")
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({"problems": {"path": data}}))
    for words in (
        ["train", path, "--output-dir"], ["eval", model, data, "--output"],
        ["gate", model, model, "--suite", str(suite), "--output"],
    ):  # fmt: skip
        assert "Choose another" in fine(*words, str(tmp_path), code=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([held, "suite.yaml"])
