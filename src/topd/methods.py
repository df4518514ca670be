"""What is done about it: every method is one function from evidence to guidance.

    method(evidence: Evidence, **options) -> tuple[Guidance, ...]      one Guidance a rollout

The loss of an update is then, with D the token divergence and p_S the student,

    sum_t w_t D_t / T  -  sum_t a_t log p_S(y_t) / T  +  lambda sum_i G_i / (all guided tokens)

T counts response tokens; w and a are ``weights`` and ``advantages``; G is KL(y~ || p_S) at soft
targets and the branch's own loss at the tokens of branches. To add a method, write such a function
and put it into ``METHODS`` under its name. One of your own needs no row: ``method:
my_module:function`` (docs/how-to/own-method.md shows a whole one).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from topd.detectors import teachability_of
from topd.divergence import select_candidates
from topd.named import row_named
from topd.transport import sparse_soft_targets
from topd.types import (
    Branch,
    BranchLoss,
    Evidence,
    Guidance,
    Ids,
    Needs,
    SoftTarget,
    TokenStatistics,
)

NEVER = -1e4  # nats, of a token that the teacher bars: log p_T is -inf


def opd(evidence: Evidence) -> tuple[Guidance, ...]:
    """On-policy distillation: every token counts as it is. Source: arXiv 2306.13649."""
    return tuple(Guidance((1.0,) * length) for length in _lengths(evidence))


# Forks: real divergent points are guided


def topd(evidence: Evidence) -> tuple[Guidance, ...]:
    """Soft targets along the student's window at every real divergent point.

        y~_{t+i} = sum_j gamma_ij onehot(x^T_{t+j}) / sum_j gamma_ij

    False alarms keep their token loss. Source: arXiv 2606.00305, the published method.
    """
    windows, real = evidence.windows, evidence.real
    guided = sparse_soft_targets(evidence.transport.plan[real], windows.teacher_tokens[real])
    starts = zip(windows.row[real].tolist(), windows.start[real].tolist(), guided, strict=True)
    found = []
    for row, start, window in starts:
        found += [(row, SoftTarget(start + i, *y)) for i, y in enumerate(window) if y[0]]
    return _opd_with(evidence, "targets", found)


def window_sft(evidence: Evidence) -> tuple[Guidance, ...]:
    """Cross-entropy on the teacher's window, in the teacher's own context, at every real point.

    The control that guidance by transport must beat: the same windows, no transport.
    """
    return _branched(evidence, "cross_entropy")


def window_kd(evidence: Evidence, *, reverse: bool = False) -> tuple[Guidance, ...]:
    """KL(p_T || p_S) along the teacher's own window at every real point, over the full vocabulary.

    With ``reverse``, KL(p_S || p_T). The student learns the window where the teacher would be, not
    where its own rollout went; the states are those of the window's decoding. Source: this project.
    """
    return _branched(evidence, "reverse_kl" if reverse else "forward_kl")


def first_fork(
    evidence: Evidence, *, after: float = 0.3, loss: BranchLoss = "forward_kl"
) -> tuple[Guidance, ...]:
    """Back to the first real divergent point: the teacher's window there, less of what followed.

    At the first real point t of a rollout the student learns the teacher's window in the teacher's
    own context, by ``loss``: KL(p_T || p_S), reverse_kl or cross_entropy. The token losses after t
    count ``after`` times: there the rollout is off the teacher's path, as is the teacher's advice;
    with 0 the student does not even read them. It brings settings of its own. Source: this project.
    """
    found = []
    for g in _branched(evidence, loss):
        n = g.branches[0].start + 1 if g.branches else len(g.weights)
        weights = *g.weights[:n], *(after * weight for weight in g.weights[n:])
        found.append(Guidance(weights, branches=g.branches[:1]))
    return tuple(found)


def olive(evidence: Evidence) -> tuple[Guidance, ...]:
    """Cross-entropy on the teacher's continuation of a rollout that is cut off; nothing else.

        L = -lambda sum_i log p_S(x^T_{t+i} | x, y_<t, x^T_{<t+i}) / (all of the teacher's tokens)

    No token loss of the rollout counts. Meant with ``candidate_loss: random`` and a
    ``candidate_fraction`` that gives one cut a rollout, ``false_alarm_share: 0`` and windows as
    long as a response. Source: after OLIVE, arXiv 2609.36246.
    """
    guidance = _branched(evidence, "cross_entropy")
    return tuple(Guidance((0.0,) * len(g.weights), branches=g.branches[:1]) for g in guidance)


def relay(evidence: Evidence, *, tokens: int = 24) -> tuple[Guidance, ...]:
    """The teacher writes the window, the student resumes from it, and is distilled on both.

    The student writes ``tokens`` tokens after the teacher's window at every real point; the
    reverse KL is taken along the teacher's and its own tokens. Source: after Relay-OPD, arXiv
    2607.26057, simplified: the published trigger is the teacher's wish for a reflection word.
    """
    return _branched(evidence, "reverse_kl", go_on=tokens)


def _branched(evidence: Evidence, loss: BranchLoss, *, go_on: int = 0) -> tuple[Guidance, ...]:
    """The teacher's window at every real point as a branch of its rollout, by their starts."""
    windows, found = evidence.windows, []
    for k in evidence.real.nonzero()[:, 0].tolist():
        tokens = tuple(windows.teacher_tokens[k][windows.teacher_mask[k]].tolist())
        found.append((int(windows.row[k]), Branch(int(windows.start[k]), tokens, loss, go_on)))
    return _opd_with(evidence, "branches", found)


def _opd_with(
    evidence: Evidence, part: str, found: Iterable[tuple[int, Any]]
) -> tuple[Guidance, ...]:
    """OPD, and as ``part`` of every rollout's guidance what is ``found``, with its row, for it."""
    parts: list[list[Any]] = [[] for _ in evidence.mask]
    for row, value in found:
        parts[row].append(value)
    pairs = zip(opd(evidence), parts, strict=True)
    return tuple(replace(g, **{part: tuple(values)}) for g, values in pairs)


# False alarms: their token loss is held down


def downweight(evidence: Evidence) -> tuple[Guidance, ...]:
    """Cap the token loss of every false alarm at the median token loss of its rollout.

    Source: arXiv 2606.00305, "low-OT high-loss down-weighting".
    """
    return _capped(evidence, ~evidence.real)


def downweight_matched(evidence: Evidence) -> tuple[Guidance, ...]:
    """The control of ``downweight``: as many tokens, drawn from the real divergent points.

    Source: arXiv 2606.00305, "matched high-OT down-weighting".
    """
    count = int((~evidence.real).sum())
    generator = torch.Generator().manual_seed(evidence.seed)
    places = evidence.real.nonzero()[:, 0]
    drawn = places[torch.randperm(len(places), generator=generator)[:count]]
    return _capped(evidence, torch.zeros_like(evidence.real).index_fill(0, drawn, True))


def _capped(evidence: Evidence, chosen: Bool[Tensor, " N"]) -> tuple[Guidance, ...]:
    row, start = evidence.windows.row[chosen].tolist(), evidence.windows.start[chosen].tolist()
    return _opd_with(evidence, "capped", zip(row, start, strict=True))


# Tokens: some are left out, or weighted (always of the full-vocabulary loss, where sources differ)


def kl_top(evidence: Evidence, *, share: float = 0.2) -> tuple[Guidance, ...]:
    """Only the ``share`` of the batch's tokens with the largest reverse KL.

    Source: the divergence baseline of arXiv 2604.14084 (no share is published).
    """
    return _kept(evidence, _statistics(evidence).reverse_kl, share)


def entropy_top(evidence: Evidence, *, share: float = 0.5) -> tuple[Guidance, ...]:
    """Only the ``share`` of the batch's tokens where the student's entropy is largest.

    Source: TIP, arXiv 2604.14084.
    """
    return _kept(evidence, _statistics(evidence).entropy, share)


def teachability(evidence: Evidence, *, share: float = 0.05) -> tuple[Guidance, ...]:
    """Only the ``share`` of the batch's tokens that are most teachable.

    See :func:`~topd.detectors.teachability_of`. Source: TA-OPD, arXiv 2605.26844.
    """
    return _kept(evidence, teachability_of(_statistics(evidence), evidence.mask), share)


def iw_opd(evidence: Evidence, *, gamma: float = 0.5) -> tuple[Guidance, ...]:
    """Weights that fall from 1 + gamma to 1 as the rollout drifts from the teacher.

        w_t = 1 + gamma (1 - sum_{s<t} d_s / sum_s d_s),  d = |log p_T(y) - log p_S(y)|

    Source: the released code of IW-OPD, arXiv 2606.22600.
    """
    drift = _gap(evidence).abs() * evidence.mask
    total = drift.sum(-1, keepdim=True).clamp(min=1e-8)
    before = (drift.cumsum(-1) - drift) / total
    return _weighted(evidence, (1 + gamma * (1 - before)) * evidence.mask)


def dial_opd(evidence: Evidence, *, share: float = 0.4, beta: float = 1.0) -> tuple[Guidance, ...]:
    """Only the ``share`` of every rollout's tokens where both models' probabilities differ most.

        s = |log q - log p|^(1 - beta) |q - p|^beta,   p, q of the token, student's and teacher's

    with ``beta`` in [0, 1]: above 1 it is not finite where both agree. A large ratio of two tiny
    probabilities is no reason to learn. Source: DIAL-OPD, arXiv 2610.11659.
    """
    apart = evidence.logprobs.exp() - _teacher(evidence).exp()
    score = _gap(evidence).abs() ** (1 - beta) * apart.abs() ** beta
    return _mean_over(evidence, select_candidates(score, evidence.mask, fraction=share))


def ier_opd(evidence: Evidence, *, share: float = 0.1) -> tuple[Guidance, ...]:
    """Only the ``share`` of the batch's tokens whose sampled gradient is the most reliable.

    See :func:`~topd.losses.linear_token_statistics`. Source: the released code of IER-OPD, arXiv
    2609.24432.
    """
    return _kept(evidence, _statistics(evidence).reliability, share)


def eopd(evidence: Evidence, *, threshold: float = 0.8) -> tuple[Guidance, ...]:
    """Forward KL as well where the teacher's entropy is above ``threshold`` nats.

        L = sum_t (KL(p_S || p_T) + [H(p_T) > threshold] KL(p_T || p_S)) / T

    with the settings that it brings. Source: EOPD, arXiv 2603.07079 ("augments the reverse KL with
    forward KL on tokens where the teacher distribution has high entropy"); the threshold is ours.
    """
    high = (_statistics(evidence).teacher_entropy > threshold) & evidence.mask
    parts = zip(opd(evidence), evidence.rollouts, high.tolist(), strict=True)
    return tuple(replace(g, branches=tuple(_runs(r.response, marks))) for g, r, marks in parts)


def _runs(response: Ids, marks: Sequence[bool]) -> Iterator[Branch]:
    """The response's own text as branches, one a run of marked tokens."""
    for marked, places in groupby(range(len(response)), key=lambda t: marks[t]):
        run = [*places]
        if marked:
            yield Branch(run[0], response[run[0] : run[-1] + 1], "forward_kl")


def negative(
    evidence: Evidence, *, advantage: float = -0.5, share: float = 0.2
) -> tuple[Guidance, ...]:
    """The control without a teacher: one fixed negative advantage on the least likely tokens.

    The ``share`` of the batch's tokens with the lowest log p_S gets ``advantage``, the mean is over
    them. Source: arXiv 2608.31046, which reports that it matches distillation.
    """
    found = []
    for rare in _kept(evidence, -evidence.logprobs, share):
        advantages = tuple(advantage * weight for weight in rare.weights)
        found.append(Guidance((0.0,) * len(advantages), advantages=advantages))
    return tuple(found)


def _kept(evidence: Evidence, score: Float[Tensor, "B T"], share: float) -> tuple[Guidance, ...]:
    """The mean over the ``share`` of a batch's tokens that score best, and each rollout's best."""
    mask = evidence.mask
    batch = select_candidates(score.flatten()[None], mask.flatten()[None], fraction=share)
    one = select_candidates(score, mask, fraction=1e-9)
    return _mean_over(evidence, batch.reshape(mask.shape) | one)


def _mean_over(evidence: Evidence, kept: Bool[Tensor, "B T"]) -> tuple[Guidance, ...]:
    """The mean over the kept tokens: weight (all tokens / kept tokens), 0 elsewhere."""
    return _weighted(evidence, kept * (evidence.mask.sum() / kept.sum().clamp(min=1)))


def _teacher(evidence: Evidence) -> Float[Tensor, "B T"]:
    assert evidence.teacher_logprobs is not None  # methods are not asked about answers
    return evidence.teacher_logprobs


def _gap(evidence: Evidence) -> Float[Tensor, "B T"]:
    """log p_T - log p_S of every token, nats; ``NEVER`` at the least, which sums stay finite by."""
    return (_teacher(evidence) - evidence.logprobs).clamp(min=NEVER)


def _weighted(evidence: Evidence, weights: Float[Tensor, "B T"]) -> tuple[Guidance, ...]:
    rows = zip(weights.tolist(), _lengths(evidence), strict=True)
    return tuple(Guidance(tuple(row[:length])) for row, length in rows)


class Method(NamedTuple):
    """A method and what it needs: windows (the teacher decodes), statistics (one more student
    forward), of a rollout's real points the first alone, all rollouts of an update together.

    ``settings`` are fields of TOPDConfig that the method was measured with: they hold wherever the
    user gives nothing else. ``needs`` is what it wants of the teacher beyond the token losses, or
    in their place: windows are enough with the options ``by_windows``. ``learns`` names the fields
    of Guidance by which it learns, by default any; ``caps``: all that it does is to cap token
    losses over the whole distribution. ``goes_on`` is the option that says how many tokens of its
    own the student writes after a window.
    """

    guide: Callable[..., tuple[Guidance, ...]]
    looks_ahead: bool = False
    statistics: bool = False
    first_only: bool = False
    whole_update: bool = False
    settings: Mapping[str, Any] = MappingProxyType({})
    needs: Needs = "distributions"
    by_windows: Mapping[str, Any] = MappingProxyType({})
    learns: tuple[str, ...] = ("weights", "targets", "branches", "advantages")
    caps: bool = False
    goes_on: str = ""

    @property
    def of_tokens(self) -> bool:
        """Whether it weights token losses and does nothing else."""
        return self.learns == ONLY_TOKENS

    def beyond(self, window: int) -> int:
        """How many tokens after a rollout a text may end that is read for it, with such windows.

        A window may begin at the last token of a rollout that has ended.
        """
        own = inspect.signature(self.guide).parameters[self.goes_on].default if self.goes_on else 0
        return window + own if self.looks_ahead else 0


FIRST_FORK = {  # as measured in docs/evidence.md
    "candidate_loss": "surprise",
    "candidate_threshold": 1.0,  # nats
    "candidate_fraction": 0.2,
    "false_alarm_share": 0.0,  # the surprise is the verdict
    "trajectory_weight": 0.5,
    "window_length": 0.5,  # of a rollout
    "look_ahead_until": 0.5,  # of all updates
}

ONLY_TOKENS = ("weights",)
OWN_CONTEXT = ("weights", "branches")

ALONG_ROLLOUTS = {"trajectory_weight": 1.0, "trajectory_reduction": "sum"}  # a mean over tokens

METHODS: dict[str, Method] = {  # the first is the default; docs/which-method.md says why
    "opd": Method(opd, needs="logprobs", learns=ONLY_TOKENS),
    "first_fork": Method(
        first_fork,
        looks_ahead=True,
        first_only=True,
        settings=FIRST_FORK,
        by_windows={"loss": "cross_entropy"},
        learns=OWN_CONTEXT,
    ),
    "topd": Method(topd, looks_ahead=True, needs="windows", learns=("weights", "targets")),
    "window_sft": Method(window_sft, looks_ahead=True, needs="windows", learns=OWN_CONTEXT),
    "window_kd": Method(window_kd, looks_ahead=True, learns=OWN_CONTEXT),
    "olive": Method(
        olive, looks_ahead=True, first_only=True, needs="windows", learns=("branches",)
    ),
    "relay": Method(relay, looks_ahead=True, learns=OWN_CONTEXT, goes_on="tokens"),
    "downweight": Method(downweight, looks_ahead=True, learns=ONLY_TOKENS, caps=True),
    "downweight_matched": Method(
        downweight_matched, looks_ahead=True, whole_update=True, learns=ONLY_TOKENS, caps=True
    ),
    "kl_top": Method(kl_top, statistics=True, whole_update=True, learns=ONLY_TOKENS),
    "entropy_top": Method(entropy_top, statistics=True, whole_update=True, learns=ONLY_TOKENS),
    "teachability": Method(teachability, statistics=True, whole_update=True, learns=ONLY_TOKENS),
    "iw_opd": Method(iw_opd, needs="logprobs", learns=ONLY_TOKENS),
    "dial_opd": Method(dial_opd, whole_update=True, needs="logprobs", learns=ONLY_TOKENS),
    "ier_opd": Method(ier_opd, statistics=True, whole_update=True, learns=ONLY_TOKENS),
    "eopd": Method(eopd, statistics=True, settings=ALONG_ROLLOUTS, learns=OWN_CONTEXT),
    "negative": Method(negative, whole_update=True, needs="nothing", learns=("advantages",)),
}


def method_named(name: str) -> Method:
    """By its name in ``METHODS``, or ``module:function``. Raises TOPDError if there is none."""
    return row_named("method", name, METHODS, Method)


def _statistics(evidence: Evidence) -> TokenStatistics:
    assert evidence.statistics is not None  # the method says that it needs them
    return evidence.statistics


def _lengths(evidence: Evidence) -> Sequence[int]:
    """Up to each rollout's last token, which is the student's."""
    rows = evidence.mask.tolist()
    return [max((t for t, own in enumerate(row, 1) if own), default=0) for row in rows]
