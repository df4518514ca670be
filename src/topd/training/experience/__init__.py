"""The experience phase: prompts -> rollouts -> token losses -> candidates -> windows -> transport
-> guidance. No gradients, engines only; the result can be printed, saved and learned from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from topd import transport
from topd.config import TOPDConfig
from topd.distributed import agreed, everywhere
from topd.divergence import real_divergent_points
from topd.engines import Engine, Scores, Tick
from topd.engines.several import owners_of, reader_of
from topd.errors import TOPDError
from topd.inputs.prompts import make_rollout
from topd.losses import linear_token_statistics
from topd.methods import Method
from topd.named import called
from topd.seeds import Stream, seed_of
from topd.training.experience.asked import of_own_tokens
from topd.training.experience.branches import branch_states, gone_on
from topd.training.experience.evidence import (
    TOLD,
    Experience,
    Seen,
    by_token_loss,
    candidates_of,
    checked_scores,
    copied,
    differing,
    forks_of,
    logprobs_of,
    own_mask,
    padded,
    pair_windows,
    share_rewritten,
    statistics_of,
    token_scores,
    where_told,
)
from topd.training.experience.turns import Turns
from topd.training.progress import Phases
from topd.types import Evidence, Generation, Prompt, Rollout, Spans, Starts, Transport, Windows

REWRITTEN = 4  # tokens of the windows that a detector has written from every token


class Observer:
    """Lets the student write and the teacher look ahead.

    Args:
        student: the engine that samples; current weights.
        teacher: the engine that scores and continues.
        args: what to look for.
        phases: where the seconds are counted.
        turns: an environment that replies to the student; none: rollouts have one turn.
    """

    def __init__(
        self,
        student: Engine,
        teacher: Engine,
        args: TOPDConfig,
        phases: Phases | None = None,
        turns: Turns | None = None,
    ) -> None:
        self.student, self.teacher, self.args = student, teacher, args
        self.phases, self.turns = phases or Phases(), turns
        self.spent: Counter[str] = Counter()  # see Experience

    def observe(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        numbers: Sequence[int] | None = None,
        look_ahead: bool = True,
        teacher_writes: bool = False,
    ) -> Experience:
        """Roll out and look ahead. A collective where there are several ranks.

        Args:
            prompts: one a rollout; a prompt that is there twice is answered twice.
            step: number of the update; with the seed it fixes what is sampled.
            numbers: of the rollouts within the update, over all ranks; none: from 0 on.
            look_ahead: False to score only: no windows, and every token counts as it is.
            teacher_writes: it does the responses, not the student.

        Raises:
            TOPDError: here or on another rank.
        """
        numbers = range(len(prompts)) if numbers is None else numbers
        seeds = [seed_of(self.args.seed, step, n) for n in numbers]
        method = self.args.guidance_method(look_ahead=look_ahead)
        write = self.answered if teacher_writes else self.roll_out
        rollouts = agreed(lambda: write(prompts, seeds), self._waiting)
        return self.inspect(rollouts, seeds, method, numbers)

    def roll_out(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Rollout]:
        """The student's responses; those written beforehand are taken as they are."""
        if all(prompt.response is not None for prompt in prompts):
            return [Rollout(p, p.response or (), (), finished=True) for p in prompts]
        with self.phases.phase("rollouts", self.args.max_completion_length) as tick:
            written = self.student.generate(
                [prompt.student for prompt in prompts], self.args.sampling, seeds, tick=tick
            )
            found = [make_rollout(p, w) for p, w in zip(prompts, written, strict=True)]
            return self.turns.resumed(found, self.student, seeds, tick) if self.turns else found

    def answered(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Rollout]:
        """The teacher's responses, drawn as its windows are; without log-probs."""
        length = self.args.max_completion_length
        texts, sampling = [p.teacher for p in prompts], self.args.window_sampling(length)
        with self.phases.phase("answers", length) as tick:
            written = reader_of(self.teacher, prompts).generate(texts, sampling, seeds, tick=tick)
        pairs = zip(prompts, written, strict=True)
        return [replace(make_rollout(p, w), logprobs=()) for p, w in pairs]

    def inspect(
        self,
        rollouts: Sequence[Rollout],
        seeds: Sequence[int],
        method: Method,
        numbers: Sequence[int] | None = None,
    ) -> Experience:
        """The teacher's view of given rollouts: scores, forks and guidance. As ``observe``."""
        numbers = range(len(rollouts)) if numbers is None else numbers
        self.spent = Counter()
        length = self._window_length(rollouts) if method.looks_ahead else 1
        seen = agreed(lambda: self._look(rollouts, seeds, method, length), self._waiting)
        if method.looks_ahead:
            evidence = replace(seen.evidence, real=self._verdicts(rollouts, seen, numbers))
            seen = replace(seen, evidence=evidence)
        return agreed(lambda: self.guided(rollouts, seeds, method, seen), self._waiting)

    def _waiting(self) -> AbstractContextManager[Tick]:
        return self.phases.phase("waiting")

    def _window_length(self, rollouts: Sequence[Rollout]) -> int:
        """K; a share is one of the mean length over all ranks."""
        own = [len(rollout.written) for rollout in rollouts]
        if self.args.window_length >= 1:
            return self.args.window_tokens(own)
        return self.args.window_tokens([n for lengths in everywhere(own) for n in lengths])

    def _look(
        self, rollouts: Sequence[Rollout], seeds: Sequence[int], method: Method, length: int
    ) -> Seen:
        """Scores and windows of ``length``, and how far these are apart; no verdict yet."""
        if not self.args.asks_teacher and not any(r.logprobs for r in rollouts):
            return self._unscored(rollouts)
        hidden: list[Tensor] = []
        logprobs: list[Tensor] = []
        losses: list[Tensor] = []
        statistics: list[Tensor] = []
        spans: list[Spans] = []
        starts: list[tuple[int, int]] = []
        written: list[Generation] = []
        size = self.args.score_batch_size or self.args.per_device_train_batch_size
        for first in range(0, len(rollouts), size):
            some = rollouts[first : first + size]
            scores = self.score(some, first, keep=method.looks_ahead)
            hidden += [h[: len(r.response)] for h, r in zip(scores.hidden, some, strict=True)]
            told = scores.logprobs if self.teacher.gives in TOLD else scores.logprobs[:, :0]
            logprobs += [p[: len(r.response)] for p, r in zip(told.cpu(), some, strict=True)]
            spans += scores.spans
            needed = method.statistics or self.args.detector.statistics
            known = self.statistics(some, scores) if needed else None
            statistics += known or []
            losses += self.token_losses(some, scores, known, seeds[first:])
            if method.looks_ahead:
                found = self.candidates(losses[first:], length, own_mask(some))
                found = differing(some, told, found)
                if method.first_only and self.args.all_candidates_are_real:
                    found = sorted({row: (row, t) for row, t in reversed(found)}.values())
                windows = self.look_ahead(scores, found, seeds[first:], length)
                for (row, t), window in zip(found, windows, strict=True):
                    if window.tokens:  # a teacher by text may have none there
                        starts.append((first + row, t))
                        written.append(window)
            del scores  # and its cache, before the next is made
        evidence = self.evidence(rollouts, losses, starts, written, length, logprobs)
        if method.statistics:
            evidence = replace(evidence, statistics=statistics_of(statistics))
        return Seen(hidden, logprobs, starts, written, replace(evidence, seed=seeds[0]), spans)

    def _unscored(self, rollouts: Sequence[Rollout]) -> Seen:
        """Answers that are learned without the teacher: no columns of its states, no log-probs."""
        weight = self.teacher.head.weight
        hidden = [weight.new_zeros(len(r.response), 0) for r in rollouts]
        losses = [torch.zeros(len(r.response)) for r in rollouts]
        evidence = self.evidence(rollouts, losses, [], [], 1)
        return Seen(hidden, [torch.zeros(0) for _ in rollouts], [], [], evidence)

    def _verdicts(self, rollouts: Sequence[Rollout], seen: Seen, numbers: Sequence[int]) -> Tensor:
        """[N] bool, which windows are real divergent points: a share is one of all ranks'.

        Distances of different teachers have no common unit, so each teacher's are ranked apart.
        """
        distance = seen.evidence.transport.distance
        owners = owners_of(self.teacher, [rollouts[row].prompt for row, _ in seen.starts])
        starts = zip(owners, seen.starts, strict=True)
        own = [(owner, numbers[row], t) for owner, (row, t) in starts]
        pairs = list(zip(own, distance.tolist(), strict=True))
        all_ = sorted(pair for found in everywhere(pairs) for pair in found)
        verdict: dict[tuple[int, int, int], bool] = {}
        for _, some in groupby(all_, key=lambda pair: pair[0][0]):
            places, distances = zip(*some, strict=True)
            real = real_divergent_points(
                distance.new_tensor(distances),
                false_alarm_share=self.args.false_alarm_share,
                threshold=self.args.ot_threshold,
            )
            verdict.update(zip(places, real.tolist(), strict=True))
        return torch.tensor([verdict[place] for place in own], dtype=torch.bool)

    def guided(
        self, rollouts: Sequence[Rollout], seeds: Sequence[int], method: Method, seen: Seen
    ) -> Experience:
        """What a method makes of what was seen, verdicts included. Raises TOPDError."""
        asked = called("method", method.guide, copied(seen.evidence))
        asked = of_own_tokens(asked, rollouts, self.teacher.head.vocab_size)
        asked = by_token_loss(self.args.token_loss, asked, rollouts, seen.logprobs, seen.spans)
        guidance = gone_on(self, rollouts, asked, seeds)
        windows = dict(zip(seen.starts, seen.written, strict=True))
        return Experience(
            tuple(rollouts),
            tuple(seen.hidden),
            tuple(seen.logprobs),
            forks_of(seen.evidence, len(rollouts)),
            guidance,
            branch_states(self, rollouts, guidance, windows, seen.hidden),
            tuple(window.effort for window in seen.written),
            tuple(seen.spans),
            self.spent,
        )

    def score(self, rollouts: Sequence[Rollout], first: int = 0, *, keep: bool = True) -> Scores:
        """The teacher's scores of rollouts that are numbered from ``first``; see ``Engine.score``.

        Raises TOPDError where a log-prob is NaN.
        """
        with self.phases.phase("scoring"):
            scores = reader_of(self.teacher, [r.prompt for r in rollouts]).score(
                [r.prompt.teacher for r in rollouts],
                [r.response for r in rollouts],
                temperature=self.args.loss_temperature,
                keep=keep,
            )
            scores = where_told(scores, rollouts, self.teacher.gives)
            broken = scores.logprobs.isnan().nonzero().tolist()
        if broken:
            row, t = broken[0]
            raise TOPDError(
                f"teacher: NaN log-prob at rollout {first + row}, response token {t} (prompt "
                f"{rollouts[row].prompt.index}). Load the teacher in bfloat16 or float32, and "
                "check its weights."
            )
        return scores

    def token_losses(
        self,
        rollouts: Sequence[Rollout],
        scores: Scores,
        statistics: Sequence[Tensor] | None = None,
        seeds: Sequence[int] = (),
    ) -> list[Tensor]:
        """What ranks candidates (``candidate_loss``), [T] a rollout, on the CPU.

        Some detectors count over these rollouts. ``statistics`` are those of :meth:`statistics`,
        read now if a detector needs them and they are not given. ``seeds`` are one a rollout, for
        detectors that look ahead.
        """
        detector = self.args.detector
        if detector.statistics and statistics is None:
            statistics = self.statistics(rollouts, scores)
        rewritten = self.rewritten(rollouts, scores, seeds) if detector.windows else None
        tokens = token_scores(rollouts, scores, statistics, rewritten)
        loss = checked_scores(called("candidate_loss", detector.score, tokens), tokens.mask)
        return [row[: len(r.response)] for row, r in zip(loss, rollouts, strict=True)]

    def statistics(self, rollouts: Sequence[Rollout], scores: Scores) -> list[Tensor]:
        """[6 T] a rollout, on the CPU, as in ``linear_token_statistics``; one student forward."""
        with self.phases.phase("scoring"), torch.no_grad():
            student = self.student.score(
                [r.prompt.student for r in rollouts], [r.response for r in rollouts], keep=False
            )
            found = linear_token_statistics(
                student.hidden.flatten(0, 1),
                self.student.head,
                scores.hidden.flatten(0, 1),
                self.teacher.head,
                temperature=self.args.loss_temperature,
                chunk_tokens=self.args.chunk_tokens,
            )
            rows = found.reshape(len(found), len(rollouts), -1).transpose(0, 1).cpu()
        return [row[:, : len(r.response)] for row, r in zip(rows, rollouts, strict=True)]

    def rewritten(
        self, rollouts: Sequence[Rollout], scores: Scores, seeds: Sequence[int]
    ) -> list[Tensor]:
        """[T] a rollout: the share of its next tokens that the teacher writes otherwise there."""
        starts = [(row, t) for row, r in enumerate(rollouts) for t in range(len(r.response))]
        written = iter(self.look_ahead(scores, starts, seeds or [0] * len(rollouts), REWRITTEN))

        def shares(r: Rollout) -> list[float]:
            places = range(len(r.response))
            return [share_rewritten(r, t, next(written).tokens, REWRITTEN) for t in places]

        return [torch.tensor(shares(r)) for r in rollouts]

    def candidates(
        self, losses: Sequence[Tensor], length: int, own: Tensor | None = None
    ) -> list[tuple[int, int]]:
        """(row, token) of every candidate; ``own`` [B T] are the student's tokens, none: all."""
        return candidates_of(losses, padded(losses)[1] if own is None else own, self.args, length)

    def look_ahead(
        self, scores: Scores, starts: Starts, seeds: Sequence[int], length: int
    ) -> list[Generation]:
        """What the teacher writes from each (row, token), ``length`` tokens at most."""
        if not starts:
            return []
        sampling, rejoin = self.args.window_sampling(length), self.args.window_rejoin
        own = [seed_of(seeds[row], Stream.WINDOWS, t) for row, t in starts]
        with self.phases.phase("windows", length) as tick:
            written = self.teacher.continue_from(
                scores, starts, sampling, own, rejoin=rejoin, tick=tick
            )
        self.spent["teacher_written"] += sum(len(window.tokens) for window in written)
        return written

    def evidence(
        self,
        rollouts: Sequence[Rollout],
        losses: Sequence[Tensor],
        starts: Starts,
        written: Sequence[Generation],
        length: int,
        teacher: Sequence[Tensor] | None = None,
    ) -> Evidence:
        """Windows of ``length`` at most and how far they are apart; no verdict: none is real.

        ``teacher`` are its log-probs, [T] a rollout, where it was asked.
        """
        token_loss, mask = padded(losses)[0], own_mask(rollouts)
        windows = pair_windows(rollouts, starts, written, length)
        prompts = [rollouts[row].prompt for row, _ in starts]
        solved = self.compare(windows, teacher=reader_of(self.teacher, prompts))
        real = torch.zeros(len(starts), dtype=torch.bool)
        logprobs, _ = padded([torch.tensor(logprobs_of(r)) for r in rollouts])
        theirs = None if teacher is None else padded(teacher)[0]
        seen = token_loss, logprobs, mask, windows, solved, real
        return Evidence(*seen, teacher_logprobs=theirs, rollouts=tuple(rollouts))

    def compare(self, windows: Windows, *, teacher: Engine | None = None) -> Transport:
        """Optimal transport between paired windows, with the cost and solver of ``args``.

        Of a teacher's window that is longer than the student's only as much is compared as the
        student has: its last token would else be compared with all that the teacher writes on.
        Windows of the same tokens are at distance 0. Of several teachers ``teacher`` is their own.
        """
        length = windows.student_mask.sum(-1, keepdim=True)
        both = windows.teacher_mask & (torch.arange(windows.teacher_mask.shape[1]) < length)
        with self.phases.phase("transport"):
            reader = (teacher or self.teacher) if self.args.embedding == "teacher" else self.student
            cost = transport.ground_cost(
                reader.embed(windows.student_tokens),
                reader.embed(windows.teacher_tokens),
                position_weight=self.args.position_weight,
            )
            solved = transport.solve(
                cost,
                windows.student_mask.to(cost.device),
                both.to(cost.device),
                method=self.args.solver,
                epsilon=self.args.epsilon,
            )
            return transport.without_dust(solved.cpu(), windows, both)
