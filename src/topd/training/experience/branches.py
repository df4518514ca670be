"""Branches of a guidance: the student writes on where it is asked to, the teacher scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from topd.engines import Engine
from topd.engines.several import reader_of
from topd.seeds import Stream, sampling_seeds
from topd.training.progress import Phases
from topd.types import Generation, Guidance, Rollout, Sampling


def gone_on(
    student: Engine,
    rollouts: Sequence[Rollout],
    guidance: Sequence[Guidance],
    seeds: Sequence[int],
    sampling: Sampling,
    phases: Phases,
    spent: Counter[str],
) -> tuple[Guidance, ...]:
    """The guidance, with the student's own tokens after the branches that ask for them.

    They are counted in ``spent``.
    """
    asked = [
        (row, k)
        for row, guide in enumerate(guidance)
        for k, branch in enumerate(guide.branches)
        if branch.go_on and not student.ends(branch.tokens)
    ]
    if not asked:
        return tuple(guidance)
    branches = [list(guide.branches) for guide in guidance]
    limit = max(branches[row][k].go_on for row, k in asked)
    prompts = [
        rollouts[row].prompt.student
        + rollouts[row].response[: branches[row][k].start]
        + branches[row][k].tokens
        for row, k in asked
    ]
    own = [
        sampling_seeds(seeds[row], Stream.RELAY, 1, first=branches[row][k].start)[0]
        for row, k in asked
    ]
    with phases.phase("windows", limit) as tick:
        limited = replace(sampling, max_new_tokens=limit)
        written = student.generate(prompts, limited, own, tick=tick)
    spent["student_written"] += sum(len(more.tokens) for more in written)
    for (row, k), more in zip(asked, written, strict=True):
        branch = branches[row][k]
        branches[row][k] = replace(branch, tokens=branch.tokens + more.tokens[: branch.go_on])
    return tuple(
        replace(guide, branches=tuple(found))
        for guide, found in zip(guidance, branches, strict=True)
    )


def branch_states(
    teacher: Engine,
    rollouts: Sequence[Rollout],
    guidance: Sequence[Guidance],
    written: Mapping[tuple[int, int], Generation],
    hidden: Sequence[Tensor],
    phases: Phases,
    spent: Counter[str],
) -> tuple[tuple[Tensor, ...], ...]:
    """The teacher's states along every branch: of its window, of the rollout, or scored now.

    What it reads then is counted in ``spent``. One by text has none, and is not asked.
    """
    weight = teacher.head.weight
    states: dict[tuple[int, int], Tensor] = {}
    unknown: list[tuple[int, int]] = []
    for row, guide in enumerate(guidance):
        for k, branch in enumerate(guide.branches):
            window, count = written.get((row, branch.start)), len(branch.tokens)
            if window and window.hidden is not None and window.tokens[:count] == branch.tokens:
                states[row, k] = window.hidden[:count]
            elif branch.is_part_of(rollouts[row].response):
                states[row, k] = hidden[row][branch.start : branch.start + count]
            elif teacher.gives != "distributions":
                states[row, k] = weight.new_zeros(count, weight.shape[1])
            else:
                unknown.append((row, k))
    if unknown:
        states.update(_scored(teacher, rollouts, guidance, unknown, phases, spent))
    return tuple(
        tuple(states[row, k] for k in range(len(guide.branches)))
        for row, guide in enumerate(guidance)
    )


def _scored(
    teacher: Engine,
    rollouts: Sequence[Rollout],
    guidance: Sequence[Guidance],
    places: Sequence[tuple[int, int]],
    phases: Phases,
    spent: Counter[str],
) -> dict[tuple[int, int], Tensor]:
    branches = [guidance[row].branches[k] for row, k in places]
    prompts = [
        rollouts[row].prompt.teacher + rollouts[row].response[: branch.start]
        for (row, _), branch in zip(places, branches, strict=True)
    ]
    tokens = [branch.tokens for branch in branches]
    spent["teacher_read"] += sum(map(len, prompts)) + sum(map(len, tokens))
    reader = reader_of(teacher, [rollouts[row].prompt for row, _ in places])
    with phases.phase("scoring"):
        hidden = reader.score(prompts, tokens, keep=False).hidden
    return {
        place: states[: len(branch.tokens)]
        for place, states, branch in zip(places, hidden, branches, strict=True)
    }
