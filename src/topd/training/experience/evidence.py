"""What was seen of rollouts, from lists of tokens to padded tensors: windows, scores, forks."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor
from transformers.utils import logging

from topd import transport
from topd.config import TOPDConfig
from topd.divergence import select_candidates, thin_candidates
from topd.engines import Scores
from topd.engines.text.spans import share_evenly
from topd.errors import TOPDError
from topd.methods import NEVER
from topd.runs.records import Fork
from topd.types import (
    Effort,
    Evidence,
    Generation,
    Guidance,
    Ids,
    Needs,
    Rollout,
    Spans,
    Starts,
    TokenScores,
    TokenStatistics,
    Windows,
)

ALIKE = 1e-3  # nats a token; rounding is about 1e-5 (docs/method.md), a pair that differs 0.1

logger = logging.get_logger(__name__)

TOLD: tuple[Needs, ...] = ("logprobs", "distributions")  # what tells log-probs of given tokens


@dataclass(frozen=True)
class Seen:
    """What a rank has seen of its rollouts; ``starts`` (row, token) and ``written`` by window.

    ``hidden`` [T D] and ``logprobs`` [T] nats are the teacher's, one entry a rollout; ``spans`` are
    those that it told log-probs of, where its tokenizer is another.
    """

    hidden: list[Tensor]
    logprobs: list[Tensor]
    starts: list[tuple[int, int]]
    written: list[Generation]
    evidence: Evidence
    spans: Sequence[Spans] = ()


@dataclass(frozen=True)
class Experience:
    """What one update learns from; every tuple has one entry a rollout.

    ``teacher_hidden`` [T D] are the teacher's last hidden states that predict each response token
    and ``teacher_logprobs`` [T] its log-probs of those tokens, in nats, on the CPU; where the loss
    does without the teacher, no columns and none. ``branch_hidden`` has
    the teacher's states [K D] for each branch of the guidance; ``efforts`` what each window took;
    ``spans`` as in :class:`Seen`; ``spent`` the tokens beside the rollouts and their scores:
    ``teacher_written`` in windows, ``student_written`` and ``teacher_read`` along branches.
    """

    rollouts: tuple[Rollout, ...]
    teacher_hidden: tuple[Tensor, ...]
    teacher_logprobs: tuple[Tensor, ...]
    forks: tuple[tuple[Fork, ...], ...]
    guidance: tuple[Guidance, ...]
    branch_hidden: tuple[tuple[Tensor, ...], ...]
    efforts: tuple[Effort, ...]
    spans: tuple[Spans, ...]
    spent: Counter[str]


def candidates_of(
    losses: Sequence[Tensor], mask: Tensor, args: TOPDConfig, length: int
) -> list[tuple[int, int]]:
    """(row, token) of every candidate.

    Losses are [T] nats, one a rollout; ``mask`` [B T] is True at the student's tokens; ``length``
    is K.
    """
    threshold = args.candidate_threshold
    candidates = select_candidates(
        padded(losses)[0],
        mask,
        fraction=args.candidate_fraction,
        threshold=-torch.inf if threshold is None else threshold,
    )
    candidates = thin_candidates(candidates, gap=args.window_gap or length)
    return [(row, t) for row, t in candidates.nonzero().tolist()]


def differing(
    rollouts: Sequence[Rollout], teacher: Tensor, candidates: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The candidates, (row, token), of the rollouts in which student and teacher differ at all.

    They do not where their log-probs of the sampled tokens are less than ``ALIKE`` nats apart in
    the mean. Every quota finds forks there too, and a student that is its teacher would be trained
    away from it. ``teacher`` are its log-probs [B T], or [B 0] if it tells none.
    """
    alike, told = set(), teacher.cpu().double()  # one copy, not one a row
    for row, rollout in enumerate(rollouts):
        own = torch.tensor(rollout.logprobs, dtype=torch.float64)
        teachers = told[row, : len(rollout.response)]
        if not (rollout.logprobs and teachers.numel()):
            continue
        if float(own_only(rollout, (own - teachers).abs()).mean()) < ALIKE:
            alike.add(row)
    if alike and len(alike) == len(rollouts):
        logger.warning_once(
            f"Student and teacher agree: their log-probs are less than {ALIKE:g} nats a token "
            "apart, so there is nothing to look ahead for in such rollouts, and they get no "
            "candidate. Are they the same model with the same prompt?"
        )
    return [(row, t) for row, t in candidates if row not in alike]


def token_scores(
    rollouts: Sequence[Rollout],
    scores: Scores,
    statistics: Sequence[Tensor] | None = None,
    rewritten: Sequence[Tensor] | None = None,
) -> TokenScores:
    """What detectors look at, on the CPU; ``statistics`` [6 T] a rollout, if there are any.

    Likewise ``rewritten`` [T].
    """
    tokens, _ = padded([torch.tensor(r.response, dtype=torch.long) for r in rollouts])
    mask = own_mask(rollouts)
    student, _ = padded([torch.tensor(logprobs_of(r)) for r in rollouts])
    known = None if statistics is None else statistics_of(statistics)
    share = None if rewritten is None else padded(rewritten)[0]
    teacher, likeliest = scores.logprobs.cpu(), scores.likeliest.cpu()
    prompts = tuple(r.prompt.student for r in rollouts)
    return TokenScores(tokens, mask, student, teacher, likeliest, known, prompts, share)


def where_told(scores: Scores, rollouts: Sequence[Rollout], gives: Needs) -> Scores:
    """Scores with the student's own log-prob where the teacher's is not told (NaN): no difference.

    Only of a teacher by text that ``gives`` logprobs, whose server may split a text otherwise. All
    tokens of a span differ by as much.
    """
    if gives != "logprobs":
        return scores
    own, _ = padded([torch.tensor(logprobs_of(r)) for r in rollouts])
    own = own.to(scores.logprobs)
    told = share_evenly(scores.logprobs, own, scores.spans)
    return replace(scores, logprobs=told.where(~told.isnan(), own))


def share_rewritten(rollout: Rollout, start: int, window: Ids, length: int) -> float:
    """The share of ``length`` tokens from ``start`` on that a window has otherwise, in [0, 1].

    A rollout that was cut off is compared as far as it goes. A window without tokens says nothing.
    """
    end = rollout.turn_end(start)
    own = rollout.response[start : min(start + length, end)]
    if not window:
        return 0.0
    cut = not rollout.finished and end == len(rollout.response)
    longest = len(own) if cut else max(len(own), len(window))
    pairs = zip_longest(own, window[:longest])
    return sum(a != b for a, b in pairs) / max(longest, 1)


def by_token_loss(
    kind: str,
    guidance: Sequence[Guidance],
    rollouts: Sequence[Rollout],
    teacher: Sequence[Tensor],
    spans: Sequence[Spans] = (),
) -> tuple[Guidance, ...]:
    """The guidance with its token losses as ``token_loss`` has them.

    For ``sampled`` the divergence of a token is its one-sample estimate, whose gradient is that of
    an advantage w_t (log p_T(y_t) - log p_S(y_t)), with log p_S at sampling. For ``spans`` every
    token of a span has the difference of the whole span, and tokens of no span have none. Of a
    token that the teacher bars the difference is ``NEVER``, which a weight of 0 leaves out. For
    ``none`` no token loss counts. ``teacher`` are its log-probs [T] a rollout.
    """
    if kind == "full":
        return tuple(guidance)
    found = []
    rows = zip(guidance, rollouts, teacher, strict=True)
    for row, (guide, rollout, theirs) in enumerate(rows):
        none = (0.0,) * len(guide.weights)
        guide, weights = replace(guide, weights=none), guide.weights
        if kind != "none":
            own, gain = guide.advantages or none, theirs.tolist()
            pairs = zip(gain, logprobs_of(rollout), strict=True)
            gaps = [max(t - s, NEVER) for t, s in pairs]
            for first, end in spans[row] if kind == "spans" else ():
                gaps[first:end] = [sum(gaps[first:end])] * (end - first)
            advantages = tuple(a + w * g for a, w, g in zip(own, weights, gaps, strict=True))
            guide = replace(guide, advantages=advantages)
        found.append(guide)
    return tuple(found)


def pair_windows(
    rollouts: Sequence[Rollout], starts: Starts, written: Sequence[Generation], length: int
) -> Windows:
    """Pair what the teacher wrote with the student's own rollout from the same token on.

    A window ends with its turn. All are padded to ``length``: the position cost does not depend on
    the batch.
    """
    ends = [rollouts[row].turn_end(t) for row, t in starts]
    own = [
        torch.tensor(rollouts[row].response[t : min(t + length, end)])
        for (row, t), end in zip(starts, ends, strict=True)
    ]
    theirs = [torch.tensor(window.tokens) for window in written]
    for k, ((b, _), end) in enumerate(zip(starts, ends, strict=True)):
        # cut by the length limit, not ended: compare what both have
        if not rollouts[b].finished and end == len(rollouts[b].response):
            theirs[k] = theirs[k][: len(own[k])]
    student_tokens, student_mask = padded(own, length)
    teacher_tokens, teacher_mask = padded(theirs, length)
    row, start = torch.tensor(starts, dtype=torch.long).reshape(-1, 2).unbind(-1)
    return Windows(row, start, student_tokens, student_mask, teacher_tokens, teacher_mask)


def copied(evidence: Evidence) -> Evidence:
    """For a method, which may change its tensors in place: others and the records have theirs."""
    tensors = copy.deepcopy(replace(evidence, rollouts=()))
    return replace(tensors, rollouts=evidence.rollouts)


def forks_of(evidence: Evidence, count: int) -> tuple[tuple[Fork, ...], ...]:
    windows, solved = evidence.windows, evidence.transport
    lengths = windows.teacher_mask.sum(-1).tolist()
    theirs = zip(windows.teacher_tokens.tolist(), lengths, strict=True)
    columns = {
        "position": windows.start.tolist(),
        "token_loss": evidence.token_loss[windows.row, windows.start].tolist(),
        "distance": solved.distance.tolist(),
        "real": evidence.real.tolist(),
        "teacher_tokens": [tuple(tokens[:length]) for tokens, length in theirs],
        "student_length": windows.student_mask.sum(-1).tolist(),
        "plan": transport.sparse_plans(solved.plan),
        "converged": solved.converged.tolist(),
    }
    forks: list[list[Fork]] = [[] for _ in range(count)]
    for row, *fork in zip(windows.row.tolist(), *columns.values(), strict=True):
        forks[row].append(Fork(**dict(zip(columns, fork, strict=True))))
    return tuple(tuple(row) for row in forks)


def checked_scores(scores: object, mask: Tensor) -> Tensor:
    """What a detector has returned, as floats. Raises TOPDError: not [B T], or NaN in ``mask``."""
    if not isinstance(scores, Tensor) or scores.shape != mask.shape:
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise TOPDError(
            f"candidate_loss: must return a tensor [B T], here {tuple(mask.shape)}, and returned "
            f"{shape}."
        )
    if scores[mask].isnan().any():
        raise TOPDError("candidate_loss: gave NaN to a token. Give each token a number.")
    return scores if scores.is_floating_point() else scores.float()


def own_only(rollout: Rollout, values: Tensor) -> Tensor:
    """Of values [T] of a rollout those at the student's tokens."""
    return values[torch.tensor(rollout.own)] if rollout.replies else values


def own_mask(rollouts: Sequence[Rollout]) -> Tensor:
    """[B T] bool, True at the student's tokens."""
    return padded([torch.tensor(r.own, dtype=torch.bool) for r in rollouts])[0].bool()


def logprobs_of(rollout: Rollout) -> Sequence[float]:
    """Of an answer that was not sampled: zeros."""
    return rollout.logprobs or (0.0,) * len(rollout.response)


def statistics_of(rows: Sequence[Tensor]) -> TokenStatistics:
    """From [6 T] a rollout."""
    return TokenStatistics(*(padded([row[i] for row in rows])[0] for i in range(6)))


def padded(rows: Sequence[Tensor], width: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different lengths, padded with zeros to [N L], L >= ``width``, and their mask."""
    length = torch.tensor([len(row) for row in rows], dtype=torch.long)
    width = max([width, *length.tolist()])
    padded = torch.zeros(len(rows), width, dtype=rows[0].dtype if rows else torch.long)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded, torch.arange(width) < length[:, None]
