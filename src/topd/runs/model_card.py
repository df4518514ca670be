"""The model card of a trained student: where it comes from, how it was made, what it measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from topd.runs.ledger import Ledger

TEMPLATE = """---
{{ card_data }}
---
# A student trained with TOPD

| | |
|---|---|
| student at the start | `{{ student }}` |
| teacher | `{{ teacher }}`{% if own_prompt %}, with a prompt of its own{% endif %} |
| method | {{ method }} |
| data (SHA-256 of the prompts' token ids) | `{{ data[:16] }}` |
| updates | {{ steps }} |
| rollouts an update | {{ rollouts }} |
| learning rate | {{ learning_rate }} |
| seed | {{ seed }} |
| cost | {{ "%.3g"|format(seconds) }} s in the phases of the updates, on {{ device }} |
{% if teacher_tokens -%}
| tokens that the teacher wrote | {{ "%.0f"|format(teacher_tokens) }} |
{% endif -%}
{% if head -%}
| ledger, entries and last hash | {{ entries }}, `{{ head }}` |
{% endif %}
First and last logged update, on the training prompts:

| | first | last |
|---|---|---|
{% for name, first, last in metrics -%}
| {{ name }} | {{ "%.4g"|format(first) }} | {{ "%.4g"|format(last) }} |
{% endfor %}
These are figures of training, not of what the model can do. It can be wrong with confidence, and
has whatever its teacher and its data have of bias. The run folder beside it holds the
configuration, versions and every rollout; `topd audit` checks it against the ledger.

## Release gate

Not run: this model was not evaluated on any benchmark here. `topd gate BASE MODEL --suite FILE`
evaluates it.
"""


def write_model_card(
    folder: Path,
    manifest: Mapping[str, Any],
    args: Any,
    history: list[dict[str, float]],
    ledger: Ledger | None = None,
) -> None:
    """Write README.md into ``folder``, from a run's manifest, arguments, log history and ledger."""
    logs = [entry for entry in history if "loss" in entry]
    names = [name for name in logs[0] if name in logs[-1]] if logs else []
    shown = [n for n in names if not n.startswith("seconds/") and n not in ("epoch", "step")]
    card = ModelCard.from_template(
        ModelCardData(library_name="transformers", tags=["topd", "on-policy-distillation"]),
        template_str=TEMPLATE,
        student=manifest["models"]["student"]["name"],
        teacher=manifest["models"]["teacher"]["name"],
        own_prompt=args.teacher_prompt is not None,
        method=args.method,
        data=manifest["data"],
        steps=logs[-1]["step"] if logs else 0,
        rollouts=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        seconds=sum(v for log in logs for k, v in log.items() if k.startswith("seconds/")),
        device=manifest["machine"]["device"],
        teacher_tokens=sum(log.get("topd/teacher_tokens", 0) for log in logs),
        entries=ledger.count if ledger else 0,
        head=ledger.head if ledger else "",
        metrics=[(name, logs[0][name], logs[-1][name]) for name in shown],
    )
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def replace_section(card: Path, heading: str, text: str) -> None:
    """Put a section of a card in the place of that of the same heading, or at the end."""
    content = card.read_text(encoding="utf-8")
    before, found, after = content.partition(f"## {heading}\n")
    rest = after.partition("\n## ")
    following = f"\n## {rest[2]}" if rest[1] else ""
    start = before if found else f"{content.rstrip()}\n\n"
    card.write_text(f"{start}## {heading}\n\n{text.strip()}\n{following}", encoding="utf-8")
