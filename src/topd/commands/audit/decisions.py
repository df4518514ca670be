"""Decisions made again from stored rollouts, and compared with those of the run."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from topd.commands.audit.result import (
    AuditResult,
    disagreements,
    is_close,
    is_suspect,
    place_of,
    shortened,
)
from topd.commands.audit.settings import format_at
from topd.config import TOPDConfig
from topd.engines import Engine
from topd.engines.text import TextEngine
from topd.errors import TOPDError
from topd.inputs.models import eos_ids
from topd.report.text import counted
from topd.runs.folder import guidance_record, rollout_record
from topd.runs.records import DRAWN, JUDGED
from topd.runs.verified import read_records
from topd.seeds import sampling_seeds
from topd.training.metrics import Means, measure_experience
from topd.training.trainer import TOPDTrainer
from topd.types import Prompt, Rollout

BEFORE = f"as a version before format {JUDGED} wrote the run (run.json)"
OF_STUDENT = "decisions: what needs the student's weights, at update 0 alone; see topd replay"
BY_VERDICT = {"weights", "capped", "targets", "branches", "advantages"}
Updates: TypeAlias = dict[int, tuple[list[Any], list[Any]]]  # rollouts and guidance, by number


@dataclass
class Rederived:
    """How much was re-derived, and what was not, in words."""

    updates: list[int] = field(default_factory=list)
    rollouts: int = 0
    candidates: int = 0
    left_out: set[str] = field(default_factory=set)

    def in_words(self, seed: int) -> Iterator[str]:
        """For what was checked; ``seed`` is that of the updates that were chosen."""
        yield from sorted(self.left_out)
        if self.updates:
            which = f"update{'s' * (len(self.updates) > 1)}"
            yield (
                f"decisions: {counted(self.rollouts, 'rollout')} and "
                f"{counted(self.candidates, 'candidate')} of the {which} "
                f"{', '.join(map(str, sorted(self.updates)))} re-derived (--seed {seed})"
            )
        elif not self.left_out:
            yield "decisions: none re-derived, as no update has its rollouts on record"


def chosen_updates(folder: Path, updates: int, seed: int) -> Updates:
    """The records of so many updates at random, in order."""
    stored: Updates = {}
    for i, name in enumerate(("rollouts.jsonl", "guidance.jsonl")):
        for record in read_records(folder, name):
            stored.setdefault(record["step"], ([], []))[i].append(record)
    whole = [n for n, (rollouts, guidance) in stored.items() if len(rollouts) == len(guidance)]
    steps = sorted(random.Random(seed).sample(sorted(whole), min(updates, len(whole))))
    return {step: stored[step] for step in steps}


def check_decisions(
    folder: Path,
    trainer: TOPDTrainer,
    stored: Updates,
    tolerance: float,
    found: AuditResult,
    done: Rederived,
) -> None:
    """Make the decisions of updates again that had the settings of this trainer."""
    if trainer.own:
        done.left_out.add("teacher: the student of later updates is not stored; see topd replay")
    for step, (rollouts, guidance) in stored.items():
        written = format_at(folder, step)
        otherwise, judged = written < DRAWN, written >= JUDGED
        if otherwise and trainer.args.window_temperature > 0:
            done.left_out.add("windows: not re-derived, drawn with the numbers of before 0.2.0")
        if not is_suspect(found, "data:"):
            found.faults += _rollout_faults(trainer, rollouts)
        if step and trainer.own:
            continue
        again, means = _decided(trainer, step, rollouts, _divergences(folder, step, trainer.args))
        found.faults += _mean_faults(folder, step, means, trainer.args, tolerance)
        known = _known(trainer, guidance, step, otherwise=otherwise)
        if step and not otherwise and "branches" not in known:
            done.left_out.add(OF_STUDENT)
        free = not judged and any(f["distance"] == 0 for _, made in again for f in made["forks"])
        if free:
            known -= BY_VERDICT
            done.left_out.add(f"verdicts: not re-derived in updates with equal windows, {BEFORE}")
        for pair, (theirs, ours) in zip(zip(rollouts, guidance, strict=True), again, strict=True):
            found.faults += disagreements(pair[0], theirs, known, tolerance)
            guided, ours = (_without_verdicts(x) if free else x for x in (pair[1], ours))
            found.faults += disagreements(guided, ours, known, tolerance)
            done.candidates += len(pair[1]["forks"]) if "forks" in known else 0
        done.rollouts += len(rollouts)
        done.updates.append(step)


def _without_verdicts(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of guidance without what depends on how near equal windows are."""
    left = ("distance", "real")
    forks = [{k: v for k, v in fork.items() if k not in left} for fork in record["forks"]]
    return {**record, "forks": forks}


def _rollout_faults(trainer: TOPDTrainer, records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a rollout says of itself against its prompt, its tokens and the replies."""
    args = trainer.args
    prompts = {prompt.index: prompt for prompt in trainer.train_dataset}
    ends = set(eos_ids(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class))
    for record in records:
        place, response = place_of(record), record["response_ids"]
        prompt = prompts.get(record["prompt"])
        ids = [record["prompt_ids"], record["teacher_prompt_ids"]]
        if prompt is None or [list(prompt.student), list(prompt.teacher)] != ids:
            yield f"{place}: its tokens are not those of prompt {record['prompt']}"
        elif prompt.teacher_name != record.get("teacher"):
            yield f"{place}: its teacher is not that of prompt {record['prompt']}"
        if args.learns_from_answers or args.teacher_writes(record["step"]):
            continue
        if record["finished"] != (bool(response) and response[-1] in ends):
            yield f"{place}: finished is {record['finished']}, its last token says otherwise"
        if len(response) > args.max_completion_length or (
            not record["finished"] and len(response) < args.max_completion_length
        ):
            yield f"{place}: has {len(response)} tokens, the limit is {args.max_completion_length}"
        if len(record["logprobs"]) != len(response):
            yield f"{place}: logprobs are missing"
        spans = tuple((first, end) for first, end in record.get("replies", ()))
        told = trainer.turns.spans(prompt, tuple(response)) if trainer.turns and prompt else ()
        if spans != told:
            yield f"{place}: its replies are not those of the environment"


def _decided(
    trainer: TOPDTrainer,
    step: int,
    records: Sequence[Mapping[str, Any]],
    logged: Sequence[float],
) -> tuple[list[tuple[dict[str, Any], dict[str, Any]]], dict[str, float]]:
    """The records that the teacher and the method make of stored rollouts, and their means.

    ``logged`` are the divergences of the updates before.
    """
    turned = any(record.get("replies") for record in records)
    rollouts = [_rollout(record, trainer.observer.teacher, turned) for record in records]
    seeds = sampling_seeds(trainer.args.seed, step, len(rollouts))
    look = trainer.args.looks_ahead(step, logged)
    look &= step == 0 or not _needs_student(trainer.args)
    made = trainer.observer.inspect(rollouts, seeds, trainer.args.guidance_method(look_ahead=look))
    decode, means = trainer.processing_class.decode, Means()
    measure_experience(means, made)
    pairs = [
        (
            rollout_record(step, i, r, made.teacher_logprobs[i].tolist(), decode(list(r.response))),
            guidance_record(step, i, r, made.forks[i], made.guidance[i]),
        )
        for i, r in enumerate(made.rollouts)
    ]
    return pairs, means.take()


def _divergences(folder: Path, step: int, args: TOPDConfig) -> list[float]:
    """Those that were logged before an update."""
    logs = read_records(folder, "metrics.jsonl")
    return [log[args.divergence] for log in logs if args.divergence in log and log["step"] <= step]


def _mean_faults(
    folder: Path, step: int, means: Mapping[str, float], args: TOPDConfig, tolerance: float
) -> Iterator[str]:
    """Logged means that follow from rollouts and the teacher alone, where each update is logged."""
    logs = {log["step"]: log for log in read_records(folder, "metrics.jsonl") if "loss" in log}
    if args.logging_steps != 1 or args.logging_strategy != "steps":
        return
    if step + 1 not in logs:
        return
    for name, value in means.items():
        logged = logs[step + 1].get(name)
        follows = name.startswith("completions/") or name.endswith("_sampled")
        if follows and not is_close(logged, value, tolerance):
            yield (
                f"metrics.jsonl, step {step + 1}: {name} is {shortened(logged)}, its rollouts give "
                f"{shortened(value)}"
            )


def _rollout(record: Mapping[str, Any], teacher: Engine, turned: bool) -> Rollout:
    own = teacher.head.vocab_size
    theirs = len(teacher.writer.tokenizer) if isinstance(teacher, TextEngine) else own
    sizes = {"prompt_ids": own, "teacher_prompt_ids": theirs, "response_ids": own}
    for key, vocab_size in sizes.items():
        if max(record[key], default=0) >= vocab_size:
            raise TOPDError(
                f"rollouts.jsonl, {place_of(record)}: {key} has the token {max(record[key])}, the "
                f"models know {vocab_size}."
            )
    prompt = Prompt(
        record["prompt"],
        tuple(record["prompt_ids"]),
        tuple(record["teacher_prompt_ids"]),
        teacher_name=record.get("teacher"),
        row={} if turned else None,  # by which turns are counted
    )
    return Rollout(
        prompt,
        tuple(record["response_ids"]),
        tuple(record["logprobs"]),
        record["finished"],
        tuple((first, end) for first, end in record.get("replies", ())),
    )


def _needs_student(args: TOPDConfig) -> bool:
    """Whether decisions depend on weights of the student that are not stored."""
    return (
        args.guidance_method().statistics or args.detector.statistics or args.embedding == "student"
    )


def is_sampled(args: TOPDConfig) -> bool:
    """Whether a run's texts depend on random numbers."""
    own = not args.learns_from_answers and args.temperature > 0
    return own or args.window_temperature > 0


def _known(
    trainer: TOPDTrainer, guidance: Sequence[Mapping[str, Any]], step: int, *, otherwise: bool
) -> set[str]:
    """The keys of a record that can be re-derived without the student of that update.

    ``otherwise``: windows and what follows them were drawn with other random numbers, where they
    were not greedy.
    """
    keys = {"prompt", "prompt_ids", "teacher_prompt_ids", "teacher_logprobs", "text", "finished"}
    if (step and _needs_student(trainer.args)) or (
        otherwise and trainer.args.window_temperature > 0
    ):
        return keys
    keys |= {"forks", "weights", "capped", "targets", "advantages"}
    goes_on = any(branch["go_on"] for row in guidance for branch in row["branches"])
    return keys if (step or otherwise) and goes_on else {*keys, "branches"}
