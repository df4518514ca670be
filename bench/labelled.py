"""Which score of a token finds the forks? Every row of ``DETECTORS`` against the testbed's labels.

A fork is the token after which no right derivation is left; tokens after a fork are left out, for
no label is defined there. Detectors are compared on all other tokens, and on the loud ones alone,
where a token loss cannot tell a fork from another way to say the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from topd import transport
from topd.commands.probe.outcomes import Verified, verify_forks
from topd.config import TOPDConfig
from topd.detectors import DETECTORS
from topd.engines import Scores
from topd.engines.hf import HFEngine
from topd.evaluate import Interval
from topd.seeds import sampling_seeds
from topd.testbed.world import END, Family, labels
from topd.training.experience import Observer
from topd.training.experience.evidence import pair_windows, token_scores
from topd.types import Generation, Ids, Prompt, Rollout

LOUD = 1.0  # nats: tokens of at least this loss are the loud ones
POSITION_WEIGHT = 1.0


@dataclass(frozen=True)
class Labelled:
    """Scores of all tokens of some rollouts and what they are.

    ``scores`` by detector and ``fork`` and ``rollout`` have one entry a token. ``verified`` are
    the outcomes at every token, where they were asked for.
    """

    scores: Mapping[str, np.ndarray]
    fork: np.ndarray
    rollout: np.ndarray
    verified: Verified | None = None


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties half: Mann-Whitney's U.

    NaN where one of the two is missing.

    >>> auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    0.75
    """
    count = positive.sum()
    if count in (0, len(positive)):
        return float("nan")
    _, place, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (sizes.cumsum() - (sizes - 1) / 2)[place]
    other = len(positive) - count
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * other))


def precision_recall(scores: np.ndarray, positive: np.ndarray, chosen: int) -> tuple[float, float]:
    """Precision and recall of the ``chosen`` tokens of highest score.

    >>> precision_recall(np.array([3.0, 2.0, 1.0]), np.array([True, False, True]), 2)
    (0.5, 0.5)
    """
    best = np.argsort(-scores, kind="stable")[:chosen]
    hits = int(positive[best].sum())
    return hits / max(chosen, 1), hits / max(int(positive.sum()), 1)


def table(found: Labelled, *, resamples: int = 500) -> dict[str, dict[str, object]]:
    """AUC with its interval, precision and recall of every detector, on all tokens and loud ones.

    As many tokens are chosen as there are forks, so that precision and recall agree. The interval
    draws rollouts again (95 %, percentile bootstrap): tokens of one rollout are dependent.
    """
    loud = found.scores["token loss"] >= LOUD
    parts = {"all tokens": np.ones_like(loud), "loud tokens": loud}
    return {
        part: {
            "tokens": int(inside.sum()),
            "forks": int(found.fork[inside].sum()),
            "detectors": {
                name: _figures(values[inside], found.fork[inside], found.rollout[inside], resamples)
                for name, values in found.scores.items()
            },
        }
        for part, inside in parts.items()
    }


def _figures(
    scores: np.ndarray, fork: np.ndarray, rollout: np.ndarray, resamples: int
) -> dict[str, object]:
    generator = np.random.default_rng(0)
    groups = [np.flatnonzero(rollout == r) for r in np.unique(rollout)]
    drawn = []
    for _ in range(resamples):
        rows = np.concatenate(
            [groups[i] for i in generator.integers(len(groups), size=len(groups))]
        )
        drawn.append(auc(scores[rows], fork[rows]))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    precision, _ = precision_recall(scores, fork, int(fork.sum()))
    interval = Interval(auc(scores, fork), float(low), float(high), len(groups))
    return {"auc": vars(interval), "precision": precision}


def label_rollouts(
    family: Family,
    observer: Observer,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    decode: Sequence[str],
    *,
    samples: int = 0,
) -> Labelled:
    """Roll out, look ahead from every token up to the first fork, and score.

    Args:
        family: labels the tokens.
        observer: student, teacher and settings (window length).
        prompts: token ids of the problems.
        texts: their words.
        decode: the word of every token id.
        samples: continuations to the end by either model from every token, for the detectors by
            outcome; 0: none.
    """
    rollouts = observer.roll_out(prompts, sampling_seeds(observer.args.seed, 0, len(prompts)))
    marks = [
        labels(family, text, [decode[token] for token in rollout.response])
        for text, rollout in zip(texts, rollouts, strict=True)
    ]
    keep = [
        (row, t) for row, mark in enumerate(marks) for t, m in enumerate(mark) if m != "derailed"
    ]
    scores = observer.score(rollouts)
    found = _token_scores(observer, rollouts, scores)
    found |= _window_scores(observer, rollouts, scores, keep)
    verified = None
    if samples:

        def right(prompt: Prompt, response: Ids) -> bool:
            words = (decode[token] for token in response)
            return family.check(texts[prompt.index], " ".join(w for w in words if w != END))

        verified = verify_forks(observer, rollouts, keep, right, samples=samples)
        found["outcome, drop"] = np.array([outcome.drop for outcome in verified.outcomes])
        found["outcome, gain"] = np.array([outcome.gain for outcome in verified.outcomes])
    at = tuple(np.array(keep).T)
    return Labelled(
        {name: v[at] if v.ndim == 2 else v for name, v in found.items()},
        np.array([marks[row][t] == "fork" for row, t in keep]),
        np.array([row for row, _ in keep]),
        verified,
    )


def _token_scores(
    observer: Observer, rollouts: Sequence[Rollout], scores: Scores
) -> dict[str, np.ndarray]:
    """Detectors that look at one token, [B T] each."""
    tokens = token_scores(
        rollouts,
        scores,
        observer.statistics(rollouts, scores),
        observer.rewritten(rollouts, scores, range(len(rollouts))),
    )
    return {row.title or name: row.score(tokens).numpy() for name, row in DETECTORS.items()}


def _window_scores(
    observer: Observer,
    rollouts: Sequence[Rollout],
    scores: Scores,
    starts: Sequence[tuple[int, int]],
) -> dict[str, np.ndarray]:
    """Detectors that compare windows, one entry a start."""
    length = observer.args.longest_window
    written = observer.look_ahead(scores, starts, range(len(rollouts)), length)
    windows = pair_windows(rollouts, starts, written, length)
    static = observer.compare(windows).distance
    args = copy(observer.args)
    args.position_weight = POSITION_WEIGHT
    placed = Observer(observer.student, observer.teacher, args).compare(windows).distance
    return {
        "OT, static": static.numpy(),
        "OT, position cost": placed.numpy(),
        "OT, contextual": _contextual(rollouts, scores, starts, written).numpy(),
    }


def _contextual(
    rollouts: Sequence[Rollout],
    scores: Scores,
    starts: Sequence[tuple[int, int]],
    written: Sequence[Generation],
) -> Tensor:
    """OT on the teacher's states after each token of either window, the last token left out."""
    distances = []
    for (row, t), window in zip(starts, written, strict=True):
        assert window.hidden is not None
        theirs = window.hidden[1:]
        end = min(len(rollouts[row].response), t + len(window.tokens))  # after it is padding
        own = scores.hidden[row, t + 1 : end]
        if not len(theirs) or not len(own):
            distances.append(scores.hidden.new_zeros(()).float())
            continue
        cost = transport.ground_cost(own[None], theirs[None])
        distances.append(transport.solve(cost).distance[0])
    return torch.stack(distances).cpu()


def observer_of(
    student: HFEngine, teacher: HFEngine, *, window_length: int, max_tokens: int, seed: int
) -> Observer:
    """An observer with the settings that detectors need."""
    args = TOPDConfig(
        output_dir="unused", window_length=window_length, max_completion_length=max_tokens,
        per_device_train_batch_size=64, score_batch_size=1 << 20, seed=seed, use_cpu=True,
    )  # fmt: skip
    return Observer(student, teacher, args)
