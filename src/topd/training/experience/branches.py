"""Branches of a guidance: the student writes on where it is asked to, the teacher scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from topd.engines.several import reader_of
from topd.seeds import Stream, seed_of
from topd.types import Generation, Guidance, Rollout

if TYPE_CHECKING:
    from topd.training.experience import Observer


def gone_on(
    watch: Observer, rollouts: Sequence[Rollout], guidance: Sequence[Guidance], seeds: Sequence[int]
) -> tuple[Guidance, ...]:
    """The guidance, with the student's own tokens after the branches that ask for them."""
    asked = [
        (row, k, branch)
        for row, guide in enumerate(guidance)
        for k, branch in enumerate(guide.branches)
        if branch.go_on and not watch.student.ends(branch.tokens)
    ]
    if not asked:
        return tuple(guidance)
    prompts = [
        rollouts[row].prompt.student + rollouts[row].response[: branch.start] + branch.tokens
        for row, _, branch in asked
    ]
    own = [seed_of(seeds[row], Stream.RELAY, branch.start) for row, _, branch in asked]
    limit = max(branch.go_on for _, _, branch in asked)
    with watch.phases.phase("windows", limit) as tick:
        limited = replace(watch.args.sampling, max_new_tokens=limit)
        written = watch.student.generate(prompts, limited, own, tick=tick)
    watch.spent["student_written"] += sum(len(more.tokens) for more in written)
    branches = [list(guide.branches) for guide in guidance]
    for (row, k, branch), more in zip(asked, written, strict=True):
        branches[row][k] = replace(branch, tokens=branch.tokens + more.tokens[: branch.go_on])
    return tuple(
        replace(guide, branches=tuple(found))
        for guide, found in zip(guidance, branches, strict=True)
    )


def branch_states(
    watch: Observer,
    rollouts: Sequence[Rollout],
    guidance: Sequence[Guidance],
    written: Mapping[tuple[int, int], Generation],
    hidden: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], ...]:
    """The teacher's states along every branch: of its window, of the rollout, or scored now.

    One by text has none, and is not asked.
    """
    weight = watch.teacher.head.weight
    states: dict[tuple[int, int], Tensor] = {}
    unknown: list[tuple[int, int]] = []
    for row, guide in enumerate(guidance):
        for k, branch in enumerate(guide.branches):
            window, count = written.get((row, branch.start)), len(branch.tokens)
            if window and window.hidden is not None and window.tokens[:count] == branch.tokens:
                states[row, k] = window.hidden[:count]
            elif branch.is_part_of(rollouts[row].response):
                states[row, k] = hidden[row][branch.start : branch.start + count]
            elif watch.teacher.gives != "distributions":
                states[row, k] = weight.new_zeros(count, weight.shape[1])
            else:
                unknown.append((row, k))
    if unknown:
        states.update(_scored(watch, rollouts, guidance, unknown))
    return tuple(
        tuple(states[row, k] for k in range(len(guide.branches)))
        for row, guide in enumerate(guidance)
    )


def _scored(
    watch: Observer,
    rollouts: Sequence[Rollout],
    guidance: Sequence[Guidance],
    places: Sequence[tuple[int, int]],
) -> dict[tuple[int, int], Tensor]:
    """States along branches that are read now; ``places`` are their rows and numbers."""
    branches = [guidance[row].branches[k] for row, k in places]
    prompts = [
        rollouts[row].prompt.teacher + rollouts[row].response[: branch.start]
        for (row, _), branch in zip(places, branches, strict=True)
    ]
    tokens = [branch.tokens for branch in branches]
    watch.spent["teacher_read"] += sum(map(len, prompts)) + sum(map(len, tokens))
    reader = reader_of(watch.teacher, [rollouts[row].prompt for row, _ in places])
    with watch.phases.phase("scoring"):
        hidden = reader.score(prompts, tokens, keep=False).hidden
    return {
        place: states[: len(branch.tokens)]
        for place, states, branch in zip(places, hidden, branches, strict=True)
    }
