"""A student that is its own teacher: current weights or their average, and the controls."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import TrainerCallback

from conftest import (
    RENAMED,
    USE_CPU,
    renamed_model,
    rows,
    tiny_model,
    tiny_tokenizer,
    write_pair,
)
from conftest import torch_on_device as torch
from topd import TOPDConfig, TOPDTrainer
from topd.commands.audit import audit_run, replay_step
from topd.commands.train import run_recipe
from topd.errors import TOPDError
from topd.inputs.prompts import PromptEncoder
from topd.inputs.prompts.references import referred
from topd.inputs.self_teacher import Average

TOLD = "{{ prompt }} {{ solution }}"
SMALL = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "max_completion_length": 12,
    "seed": 3,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "teacher_prompt": TOLD,
    "save_strategy": "no",
    "use_cpu": USE_CPU,
    "disable_tqdm": True,
}
LORA = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}


class Seen(TrainerCallback):
    """Keeps the student's and the teacher's weights after every update."""

    def __init__(self) -> None:
        self.weights: list[tuple[Any, Any]] = []

    def on_step_end(self, args, state, control, model=None, **_) -> None:
        both = (model, self.trainer.teacher_model)
        self.weights.append(tuple([p.detach().clone() for p in m.parameters()] for m in both))


def trained(folder: Path, teacher: Any, **options: Any) -> tuple[TOPDTrainer, Seen]:
    seen, lora = Seen(), options.pop("peft_config", None)
    made = TOPDTrainer(
        tiny_model("llama", seed=0),
        teacher,
        TOPDConfig(output_dir=str(folder), **{**SMALL, **options}),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        peft_config=lora,
    )
    made.add_callback(seen)  # after the average's own
    seen.trainer = made
    made.train()
    return made, seen


@pytest.mark.parametrize("method", ["opd", "window_kd"])
def test_current_weights_are_a_fresh_copy_of_the_student_at_every_update(tmp_path, method) -> None:
    """Its own teacher for one update is a frozen copy; the weights are the student's own."""
    options = {"method": method, "window_length": 4, "candidate_fraction": 0.3, "max_steps": 1}
    own, _ = trained(tmp_path / "own", "self", **options)
    copied, _ = trained(tmp_path / "copy", tiny_model("llama", seed=0), **options)
    assert own.teacher_model is own.model
    before = tiny_model("llama", seed=0).parameters()
    pairs = zip(own.model.parameters(), copied.model.parameters(), before, strict=True)
    moved = False
    for p, q, start in pairs:
        assert torch.equal(p, q)
        moved = moved or not torch.equal(p, start)
        assert p.requires_grad
    assert moved


@pytest.mark.parametrize("peft", [None, LORA])
def test_the_average_by_hand(tmp_path, peft) -> None:
    """After every update: 0.75 of the average before, 0.25 of the student."""
    lora = LoraConfig(**peft) if peft else None
    start, expected = tiny_model("llama", seed=0), None
    made, seen = trained(tmp_path, {"self": {"ema": 0.75}}, peft_config=lora)
    assert made.teacher_model is not made.model
    if not peft:
        expected = [p.detach().clone() for p in start.parameters()]
        for student, average in seen.weights:
            expected = [0.75 * e + 0.25 * s for e, s in zip(expected, student, strict=True)]
            for e, a in zip(expected, average, strict=True):
                torch.testing.assert_close(a, e)
    (first, after), (_, last) = seen.weights[0], seen.weights[-1]
    assert any(not torch.equal(p, q) for p, q in zip(after, last, strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(first, after, strict=True))
    assert not any(p.requires_grad for p in made.teacher_model.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_average_of_small_steps_is_not_rounded_away(tmp_path, dtype) -> None:
    """After n equal updates it has gone 1 - 0.99^n of the way, and a resumed one goes on there."""
    kind = getattr(torch, dtype)
    student, teacher = (torch.nn.Linear(50, 50, bias=False, dtype=kind) for _ in range(2))
    with torch.no_grad():
        student.weight.fill_(0.5)
        teacher.weight.fill_(0.5)
        average = Average(teacher, student, 0.99)
        student.weight += 0.0625
    for _ in range(100):
        average.on_step_end()
    average.save(tmp_path)
    other = torch.nn.Linear(50, 50, bias=False, dtype=kind)
    resumed = Average(other, student, 0.99)
    resumed.load(tmp_path)
    assert torch.equal(other.weight, teacher.weight)
    for one in (average, resumed):
        for _ in range(50):
            one.on_step_end()
    assert torch.equal(other.weight, teacher.weight)
    assert teacher.weight.dtype == kind
    assert average.bytes == (0 if kind == torch.float32 else 4 * 2500)
    due = 0.5 + 0.0625 * (1 - 0.99**150)
    torch.testing.assert_close(teacher.weight, torch.full_like(teacher.weight, due))


def recipe_of(root: Path, **changes: Any) -> Path:
    path = write_pair(root)
    content = {
        **{"student": str(root / "student"), "data": str(root / "prompts.jsonl")},
        **{"teacher": "self", "output_dir": str(root / "run"), **SMALL, **changes},
    }
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return path


@pytest.mark.parametrize("kind", [None, *RENAMED])
@pytest.mark.parametrize("teacher", ["self", {"self": {"ema": 0.9}}])
def test_a_run_is_audited_replayed_and_resumed(tmp_path, teacher, kind) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "chat_template_kwargs": {}}
    recipe = recipe_of(tmp_path, teacher=teacher, **saves)
    if kind:  # the average, beside it in a checkpoint, has the names in memory
        (tmp_path / "student" / "model.safetensors").unlink()
        renamed_model(kind).save_pretrained(tmp_path / "student", max_shard_size="10KB")
    with contextlib.chdir(tmp_path):
        run_recipe(recipe, quiet=True)
        whole = Path("run/rollouts.jsonl").read_text()
        found = audit_run(Path("run"), updates=3, seed=0)
        assert found.faults == []
        assert any("student of later updates" in said for said in found.checked)
        assert replay_step(Path("run"), 2).faults == []
        words = ["--resume_from_checkpoint", "run/checkpoint-2"]
        run_recipe(recipe, words, quiet=True)
        assert Path("run/rollouts.jsonl").read_text() == whole


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher_prompt": None}, "self reads the same prompts as the student"),
        ({"teacher": {"self": {"ema": 1.0}}}, "teacher.self: Input should be less than 1"),
        ({"teacher": {"self": {"rate": 0.9}}}, "teacher.self: Extra inputs"),
        ({"teacher": {"self": {}, "path": "x"}}, "self goes with no other key"),
        ({"reference": "none", "teacher_prompt": "think: {{ prompt }}"}, "names neither solution"),
        ({"reference": "wrong", "teacher_prompt": None}, "no effect without teacher_prompt"),
        ({"reference": "right"}, "reference"),
    ],
)
def test_bad_input_is_told_before_weights_load(tmp_path, monkeypatch, changes, said) -> None:
    path = recipe_of(tmp_path, **changes)
    monkeypatch.setattr("topd.training.trainer.load_models", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(TOPDError, match=said):
        run_recipe(path, quiet=True)


def test_references_of_a_prompt() -> None:
    tokenizer = tiny_tokenizer()
    data = [{"prompt": "what", "solution": word} for word in ("so", "so", "the")]

    def teachers(**options: Any) -> list[str]:
        prompts = PromptEncoder(tokenizer, tokenizer, TOLD, **options).encode(data)
        return [tokenizer.decode(prompt.teacher) for prompt in prompts]

    assert teachers() == ["what so", "what so", "what the"]
    assert teachers(reference="wrong") == ["what the", "what the", "what so"]
    assert teachers(reference="none") == ["what"] * 3
    same = [{"answer": "1"}] * 3
    with pytest.raises(TOPDError, match="all rows have the same answer"):
        referred(same, ["answer"], "wrong")
    wrong = referred([*same, {"answer": None}, {"answer": "2"}], ["answer"], "wrong")
    assert [row["answer"] for row in wrong] == ["2", "2", "2", "2", "1"]
