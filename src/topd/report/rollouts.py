"""Rollouts of a run folder joined with their forks, as many as a page can hold."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from topd.errors import TOPDError
from topd.report.folder import kind_of
from topd.runs.records import (
    ForkRecord,
    GuidanceRecord,
    PositionRecord,
    RolloutRecord,
    SampleRecord,
    numbered_records,
    read_records,
)

MOST, MOST_TOKENS = 1000, 500_000  # on a page of its own size: about 25 MB
OfRollout = TypeVar("OfRollout", PositionRecord, SampleRecord)


@dataclass(frozen=True)
class Selection:
    """Rollouts in the order of the file, and how many the folder has in all."""

    rollouts: tuple[RolloutRecord, ...]
    total: int


def select_rollouts(folder: Path, *, limit: int | None = None) -> Selection:
    """At most about ``limit`` rollouts with their forks; None: 1,000, and about 500,000 tokens.

    Where a folder has more, prompts are chosen evenly spaced by their number, each with all its
    rollouts, so that a prompt can be followed through the run. Raises TOPDError.
    """
    lines, tokens = defaultdict[int, list[int]](list), 0
    for number, record in numbered_records(folder, "rollouts.jsonl", RolloutRecord):
        lines[record.prompt].append(number)
        tokens += len(record.response_ids)
    counts = {prompt: len(own) for prompt, own in lines.items()}
    total = sum(counts.values())
    prompts = _spaced(counts, limit or min(MOST, total * MOST_TOKENS // max(tokens, 1)))
    only = {number for prompt in prompts for number in lines[prompt]}  # the rest is not read again
    again = numbered_records(folder, "rollouts.jsonl", RolloutRecord, only)
    chosen = [record for _, record in again]
    return Selection(tuple(_with_forks(folder, chosen)), total)


def read_rollout(folder: Path, index: int) -> RolloutRecord:
    """One rollout by its line, from 0, with its forks. Raises TOPDError if there is none."""
    last = -1
    for last, record in enumerate(read_records(folder, "rollouts.jsonl", RolloutRecord)):
        if last == index:
            return _with_forks(folder, [record])[0]
    there = f"rollouts 0 to {last}" if last >= 0 else "no rollout yet"
    raise TOPDError(f"--rollout {index}: {folder} has {there}.")


def _spaced(counts: dict[int, int], limit: int) -> set[int]:
    """Prompts whose rollouts are no more than ``limit``, at least one prompt."""
    ordered, total = sorted(counts), sum(counts.values())
    if total <= limit:
        return set(ordered)
    keep = max(1, len(ordered) * limit // total)
    return {ordered[i * len(ordered) // keep] for i in range(keep)}


def _with_forks(folder: Path, rollouts: list[RolloutRecord]) -> list[RolloutRecord]:
    kind = kind_of(folder)
    if kind == "probe":  # positions that were chosen as low-loss or at random are forks too
        positions = _of_each(rollouts, folder, "positions.jsonl", PositionRecord)
        return [_with(r, positions[r.rollout]) for r in rollouts]
    if kind == "repair":  # one fork each, with what the student wrote before and after
        samples = _of_each(rollouts, folder, "samples.jsonl", SampleRecord)
        return [
            _with(r, [_repaired(r, samples[r.rollout])]) if samples[r.rollout] else r
            for r in rollouts
        ]
    wanted = {(r.step, r.rollout) for r in rollouts}
    found = {
        (g.step, g.rollout): g
        for g in read_records(folder, "guidance.jsonl", GuidanceRecord)
        if (g.step, g.rollout) in wanted
    }
    return [_guided(r, found.get((r.step, r.rollout))) for r in rollouts]


def _of_each(
    rollouts: list[RolloutRecord], folder: Path, name: str, kind: type[OfRollout]
) -> dict[int | None, list[OfRollout]]:
    """The records of a file by their rollout."""
    found: dict[int | None, list[OfRollout]] = {r.rollout: [] for r in rollouts}
    for record in read_records(folder, name, kind):
        if record.rollout in found:
            found[record.rollout].append(record)
    return found


def _repaired(rollout: RolloutRecord, samples: list[SampleRecord]) -> ForkRecord:
    first = samples[0]
    place, window = first.position, first.teacher_tokens
    both = rollout.logprobs[place : place + 1], rollout.teacher_logprobs[place : place + 1]
    return ForkRecord(
        position=place,
        token_loss=both[0][0] - both[1][0] if all(both) else math.nan,
        distance=first.distance if first.found is None else first.found,
        real=True,
        student_tokens=rollout.response_ids[place : place + max(len(window), 1)],
        teacher_tokens=window,
        after=tuple(samples),
    )


def _guided(rollout: RolloutRecord, guidance: GuidanceRecord | None) -> RolloutRecord:
    if guidance is None:
        return rollout
    forks = []
    for fork in guidance.forks:
        own = rollout.response_ids[fork.position : fork.position + fork.student_length]
        forks.append(fork.model_copy(update={"student_tokens": own}))
    return _with(rollout.model_copy(update={**dict(guidance), "guided": True}), forks)


def _with(rollout: RolloutRecord, forks: Sequence[ForkRecord]) -> RolloutRecord:
    """A rollout with its forks in the order of the text, one a position: of two the high-loss one.

    Raises TOPDError where one is outside.
    """
    in_order = sorted(forks, key=lambda fork: (fork.position, fork.group == "high"))
    by_position = {fork.position: fork for fork in in_order}
    for fork in by_position.values():
        inside = fork.position < len(rollout.response_ids) and all(
            0 <= i < len(fork.student_tokens) and 0 <= j < len(fork.teacher_tokens)
            for i, j, _ in fork.plan
        )
        if not inside:
            raise TOPDError(
                f"rollout {rollout.rollout} of update {rollout.step}: its fork at token "
                f"{fork.position} does not fit it. Do both files come from the same run?"
            )
    return rollout.model_copy(update={"forks": tuple(by_position.values())})
