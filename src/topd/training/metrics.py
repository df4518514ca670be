"""What a step measures: means over rollouts, tokens or updates, whole over all ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor

from topd.distributed import everywhere
from topd.inputs.prompts import repeated_ngram_share
from topd.training.experience.evidence import Experience, own_only
from topd.types import Rollout

logger = logging.getLogger(__name__)

SHORTER = (
    "Raise max_completion_length, or have shorter ones written; of a model that thinks first by "
    "chat_template_kwargs: {enable_thinking: false}."
)


class Means:
    """Running sums and counts by name. Tensors are added without waiting for the device.

    Args:
        ranks: how many ranks add to these means.
    """

    def __init__(self, ranks: int = 1) -> None:
        self._sums: dict[str, tuple[Tensor | float, float]] = {}
        self._share = 1 / ranks

    def add(self, name: str, total: Tensor | float, count: float | None = None) -> None:
        """Add ``total``, the sum of ``count`` values; none: this rank's share of one value."""
        before, seen = self._sums.get(name, (0.0, 0))
        self._sums[name] = (before + total, seen + (self._share if count is None else count))

    def state(self) -> dict[str, list[float]]:
        """Sums and counts over all ranks, for a checkpoint; a collective."""
        sums: dict[str, list[float]] = {}
        own = {name: (float(total), count) for name, (total, count) in self._sums.items()}
        for found in everywhere(own):
            for name, (total, count) in found.items():
                before, seen = sums.get(name, (0.0, 0))
                sums[name] = [before + total, seen + count]
        return sums

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from the state of a checkpoint, which only one rank may do."""
        self._sums = {name: (total, count) for name, (total, count) in state.items()}

    def take(self) -> dict[str, float]:
        """The means since the last call, over all ranks; a mean of nothing is left out.

        A collective.
        """
        table = self.state()
        self._sums.clear()
        return {name: total / count for name, (total, count) in sorted(table.items()) if count}

    def copy(self) -> Means:
        """These means, to which nothing is added any more. No collective."""
        found = Means()
        found._sums, found._share = dict(self._sums), self._share
        return found


def mean_seconds(by_rank: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds by phase, the mean over ranks; a phase that a rank had not took it no time.

    >>> mean_seconds([{"scoring": 2.0, "windows": 1.0}, {"scoring": 4.0}])
    {'scoring': 3.0, 'windows': 0.5}
    """
    names = dict.fromkeys(name for seconds in by_rank for name in seconds)
    return {n: sum(seconds.get(n, 0.0) for seconds in by_rank) / len(by_rank) for n in names}


def warn_of_cuts(rollouts: Sequence[Rollout], limit: int) -> None:
    """Say it where most rollouts are cut off: so little is learned of how they end."""
    cut = sum(not rollout.finished for rollout in rollouts)
    if 2 * cut > len(rollouts):
        logger.warning(
            f"{cut} of the first {len(rollouts)} rollouts did not end within {limit} tokens. "
            f"{SHORTER}"
        )


def measure_experience(means: Means, experience: Experience) -> None:
    """Lengths, repetition, the sampled reverse KL (k1), and what was found at the forks."""
    rollouts = experience.rollouts
    lengths = [len(rollout.written) for rollout in rollouts]
    clipped = sum(not rollout.finished for rollout in rollouts)
    repeated = sum(repeated_ngram_share(rollout.written) for rollout in rollouts)
    means.add("tokens_per_second", sum(lengths), 0)  # the seconds are counted at the log
    means.add("completions/mean_length", sum(lengths), len(rollouts))
    means.add("completions/clipped_ratio", clipped, len(rollouts))
    means.add("completions/repeated_4gram_share", repeated, len(rollouts))
    told = list(zip(rollouts, experience.teacher_logprobs, strict=True))
    sampled = [r for r, theirs in told if r.logprobs and len(theirs)]
    ratio = sum(sum(r.logprobs) for r in sampled) - sum(_total(r, p) for r, p in told)
    count = sum(len(r.written) for r in sampled)
    means.add("reverse_kl_sampled", ratio if sampled else 0.0, count)
    if experience.spans:
        spanned = sum(b - a for row in experience.spans for a, b in row)
        means.add("completions/share_in_spans", spanned, sum(lengths))
    if any(r.prompt.row is not None for r in rollouts):  # there is an environment
        means.add("completions/mean_turns", sum(len(r.turns) for r in rollouts), len(rollouts))
    forks = [fork for row in experience.forks for fork in row]
    real = sum(fork.real is True for fork in forks)
    means.add("topd/candidates", len(forks))
    means.add("topd/real_divergent_points", real)
    means.add("topd/false_alarm_share", len(forks) - real, len(forks))
    means.add("topd/unconverged_plans", sum(fork.converged is False for fork in forks))
    means.add("topd/mean_ot", sum(fork.distance for fork in forks), len(forks))
    means.add("topd/teacher_tokens", sum(len(fork.teacher_tokens) for fork in forks))
    efforts = experience.efforts
    means.add("topd/window_positions", sum(e.positions for e in efforts), len(efforts))
    means.add("topd/window_forwards", sum(e.forwards for e in efforts), len(efforts))
    _count_tokens(means, experience)
    _by_teacher(means, experience)


def _by_teacher(means: Means, experience: Experience) -> None:
    """Of each of several teachers: reverse KL (k1) a token; forks and window tokens a rollout."""
    parts = (experience.rollouts, experience.teacher_logprobs, experience.forks)
    for rollout, scores, forks in zip(*parts, strict=True):
        name = rollout.prompt.teacher_name
        if name is None:
            continue
        ratio = sum(rollout.logprobs) - _total(rollout, scores)
        sampled = len(rollout.written) if rollout.logprobs else 0
        means.add(f"teacher/{name}/reverse_kl_sampled", ratio if sampled else 0.0, sampled)
        means.add(f"teacher/{name}/candidates", len(forks), 1)
        means.add(f"teacher/{name}/real_divergent_points", sum(f.real is True for f in forks), 1)
        written = sum(len(fork.teacher_tokens) for fork in forks)
        means.add(f"teacher/{name}/teacher_tokens", written, 1)


def _total(rollout: Rollout, logprobs: Tensor) -> float:
    """The sum of log-probs [T] over the student's tokens; 0 of none."""
    return float((own_only(rollout, logprobs) if len(logprobs) else logprobs).sum())


def _count_tokens(means: Means, experience: Experience) -> None:
    """What an update cost in tokens: written and read by either model, learned by the student."""
    rollouts, guidance, spent = experience.rollouts, experience.guidance, experience.spent
    written = sum(len(r.written) for r in rollouts if r.logprobs)
    branches = sum(
        len(branch.tokens)
        for rollout, guide in zip(rollouts, guidance, strict=True)
        for branch in guide.branches
        if not branch.is_part_of(rollout.response)
    )
    read = sum(
        len(r.prompt.teacher) + len(r.response)
        for r, scored in zip(rollouts, experience.teacher_logprobs, strict=True)
        if len(scored)
    )
    prompts = sum(len(r.prompt.student) for r in rollouts)
    means.add("tokens/student_written", written + spent["student_written"])
    means.add("tokens/learned", prompts + sum(guide.learned for guide in guidance) + branches)
    answers = sum(len(r.response) for r in rollouts if not (r.logprobs or r.prompt.response))
    means.add("tokens/teacher_written", answers + spent["teacher_written"])
    means.add("tokens/teacher_read", read + spent["teacher_read"])
