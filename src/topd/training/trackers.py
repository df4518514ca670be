"""Tables for trackers: completions as TRL's trainers log them, and the candidates of an update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import TensorBoardCallback

Row = dict[str, Any]
Tables = dict[str, list[Row]]
MODULES = ("wandb", "trackio")  # that have ``log`` and ``Table(dataframe=...)``


def tables_of(
    rollouts: Sequence[Mapping[str, Any]],
    guidance: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
) -> Tables:
    """Lines of rollouts.jsonl and guidance.jsonl as ``completions`` and ``forks``.

    A table without rows is left out. Token losses are in nats; ``real`` is the verdict by the
    run's own rule, None where there is none.
    """

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    pairs = list(zip(rollouts, guidance, strict=True))
    found = {
        "completions": [_completion(rollout, line, text) for rollout, line in pairs],
        "forks": [row for rollout, line in pairs for row in _forks(rollout, line, text)],
    }
    return {name: rows for name, rows in found.items() if rows}


def _completion(rollout: Mapping[str, Any], line: Mapping[str, Any], text: Any) -> Row:
    teacher = {"teacher": rollout["teacher"]} if "teacher" in rollout else {}
    return {
        "prompt": text(rollout["prompt_ids"]),
        "completion": text(rollout["response_ids"]),
        "rollout": rollout["rollout"],
        **teacher,
        "tokens": len(rollout["response_ids"]),
        "finished": rollout["finished"],
        "candidates": len(line["forks"]),
    }


def _forks(rollout: Mapping[str, Any], line: Mapping[str, Any], text: Any) -> Iterator[Row]:
    ids = rollout["response_ids"]
    for fork in line["forks"]:
        at = fork["position"]
        yield {
            "rollout": rollout["rollout"],
            "token": at,
            "text before": text(ids[max(at - 20, 0) : at]),
            "student wrote": text(ids[at : at + fork["student_length"]]),
            "teacher would write": text(fork["teacher_tokens"]),
            "token loss": fork["token_loss"],
            "OT distance": fork["distance"],
            "real": fork["real"],
        }


def log_tables(
    tables: Tables, step: int, report_to: Sequence[str], callbacks: Iterable[TrainerCallback]
) -> None:
    """Send tables to the trackers of a run, under their names; to TensorBoard as text.

    Args:
        tables: see :func:`tables_of`.
        step: of the log that they belong to; also their first column.
        report_to: the trackers that the run names.
        callbacks: of the trainer, among which is TensorBoard's writer.
    """
    from pandas import DataFrame  # where nothing is sent, nothing is loaded

    stepped = {name: [{"step": step, **row} for row in rows] for name, rows in tables.items()}
    for module in map(import_module, (name for name in MODULES if name in report_to)):
        if getattr(module, "run", True) is not None:  # a W&B run may have been ended by hand
            made = {name: module.Table(dataframe=DataFrame(rows)) for name, rows in stepped.items()}
            module.log(made)
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer:
            for name, rows in stepped.items():
                callback.tb_writer.add_text(name, markdown(rows), step)
            callback.tb_writer.flush()


def markdown(rows: Sequence[Row]) -> str:
    r"""Rows as a table that a line break or bar in a text does not break.

    >>> print(markdown([{"a": 1, "b": "x|y\nz"}]))
    | a | b |
    |---|---|
    | 1 | x&#124;y↵z |
    """
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    drawn = ["| " + " | ".join(map(_cell, line)) + " |" for line in lines]
    return "\n".join([drawn[0], "|" + "---|" * len(rows[0]), *drawn[1:]])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    shown = "" if value is None else str(value)
    for plain, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\r", ""), ("\n", "↵")):
        shown = shown.replace(plain, safe)
    return shown
