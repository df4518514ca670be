"""The model card of a trained student: where it comes from, how it was made, what it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from topd.runs.files import read_lines
from topd.runs.ledger import Ledger
from topd.runs.records import updates_in

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
| updates | {{ steps }}
{%- if best %}; the student is that of {{ best }}, the best of those evaluated and saved{% endif %}
{%- if logged < steps %} (cost and tokens: of the first {{ logged }}, which are logged){% endif %} |
| {{ "answers" if imitated else "rollouts" }} an update | {{ rollouts }} |
| learning rate | {{ learning_rate }} |
| seed | {{ seed }} |
| cost | {{ "%.3g"|format(seconds) }} s in the phases of the updates, on {{ device }} |
{% if teacher_tokens -%}
| tokens that the teacher wrote | {{ "%.0f"|format(teacher_tokens) }} |
{% endif -%}
{% if head -%}
| ledger, entries and last hash | {{ entries }}, `{{ head }}` |
{% endif %}
First and last log of each figure, on the training prompts:

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
    *,
    best: int | None = None,
) -> None:
    """Write README.md into ``folder``, from a run's manifest, arguments, log history and ledger.

    ``best``: the update that the student is of, if not the last one.
    """
    logs = [entry for entry in history if "loss" in entry]
    imitated = hasattr(args, "answers")  # by a warm start
    way = "off" if imitated else "on"
    card = ModelCard.from_template(
        ModelCardData(library_name="transformers", tags=["topd", f"{way}-policy-distillation"]),
        template_str=TEMPLATE,
        student=manifest["models"]["student"]["name"],
        teacher=manifest["models"]["teacher"]["name"],
        own_prompt=args.teacher_prompt is not None,
        method=_imitation(args) if imitated else args.method,
        imitated=imitated,
        data=manifest["data"],
        steps=max((entry["step"] for entry in history), default=0),
        best=best,
        logged=sum(updates_in(logs)),
        rollouts=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        seconds=sum(v for log in logs for k, v in log.items() if k.startswith("seconds/")),
        device=manifest["machine"]["device"],
        teacher_tokens=_written(logs) + _answered(folder.parent, args),
        entries=ledger.count if ledger else 0,
        head=ledger.head if ledger else "",
        metrics=_ends(logs),
    )
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def _imitation(args: Any) -> str:
    """What a warm start learns from, and by which loss."""
    whose = {"teacher": "the teacher's answers", "data": "the answers of its data"}
    answers = whose.get(args.answers, "the answers of an earlier warm start")
    return f"imitation of {answers} (stage 1), kd_ratio: {args.kd_ratio:g}"


def _written(logs: Sequence[Mapping[str, float]]) -> float:
    """Tokens that the teacher wrote in the logged updates; a log has their mean."""
    means = zip(logs, updates_in(logs), strict=True)
    return sum(log.get("tokens/teacher_written", 0) * updates for log, updates in means)


def _answered(run: Path, args: Any) -> int:
    """Tokens of the answers that a warm start had the teacher write, of those that ended."""
    if getattr(args, "answers", None) != "teacher":
        return 0
    _, *answers = [*read_lines(run / "answers.jsonl", object)] or [None]
    return sum(map(len, answers))


def _ends(logs: Sequence[Mapping[str, float]]) -> list[tuple[str, float, float]]:
    """Every figure with its first and its last value; an update may lack one that others have."""
    names = dict.fromkeys(name for log in logs for name in log)
    shown = [n for n in names if not n.startswith("seconds/") and n not in ("epoch", "step")]
    found = {name: [log[name] for log in logs if name in log] for name in shown}
    return [(name, values[0], values[-1]) for name, values in found.items()]


def replace_section(card: Path, heading: str, text: str) -> None:
    """Put a section of a card in the place of that of the same heading, or at the end."""
    content = card.read_text(encoding="utf-8")
    before, found, after = content.partition(f"## {heading}\n")
    rest = after.partition("\n## ")
    following = f"\n## {rest[2]}" if rest[1] else ""
    start = before if found else f"{content.rstrip()}\n\n"
    card.write_text(f"{start}## {heading}\n\n{text.strip()}\n{following}", encoding="utf-8")
