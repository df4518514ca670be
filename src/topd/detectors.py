"""Where to look: every detector is one function that scores all tokens of a batch.

    detector(tokens: TokenScores) -> Float[Tensor, "B T"]      nats, or whatever it counts in

The tokens that score highest in their rollout are the candidates. To add a detector, write such a
function and put it into ``DETECTORS`` under its name: ``candidate_loss`` and the testbed's table
know it then. One of your own needs no row: ``candidate_loss: my_module:function``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from topd.divergence import moved_to_random, moved_to_start
from topd.divergence import surprise as surprise_of
from topd.named import row_named
from topd.types import Needs, TokenScores, TokenStatistics


def sampled(tokens: TokenScores) -> Float[Tensor, "B T"]:
    """The sampled token's loss, log p_S(y) - log p_T(y). Source: arXiv 2606.00305."""
    return tokens.student - tokens.teacher


def teacher_nll(tokens: TokenScores) -> Float[Tensor, "B T"]:
    """What the teacher thinks of the token, -log p_T(y)."""
    return -tokens.teacher


def surprise(tokens: TokenScores) -> Float[Tensor, "B T"]:
    """The same, less for habits of the student (:func:`topd.divergence.surprise`)."""
    mask, loss = tokens.mask, torch.zeros_like(tokens.teacher)
    loss[mask] = surprise_of(tokens.teacher[mask], tokens.likeliest[mask], tokens.tokens[mask])
    return loss


def student_nll(tokens: TokenScores) -> Float[Tensor, "B T"]:
    """The student's own surprise, -log p_S(y) of the token that it wrote."""
    return -tokens.student


def rewritten(tokens: TokenScores) -> Float[Tensor, "B T"]:
    """The share of the next tokens that the teacher, asked to continue here, writes otherwise.

    A short window from every token: as many as the rollout is long. Of equal shares the earlier
    token is taken. Source: this project, for teachers that tell no log-probs.
    """
    assert tokens.rewritten is not None  # the detector says that it needs it
    return tokens.rewritten


def entropy(tokens: TokenScores) -> Float[Tensor, "B T"]:
    """The student's entropy. Source: the entropy half of TIP, arXiv 2604.14084."""
    return _statistics(tokens).entropy


def reverse_kl(tokens: TokenScores) -> Float[Tensor, "B T"]:
    """KL(p_S || p_T) over the full vocabulary."""
    return _statistics(tokens).reverse_kl


def teachability(tokens: TokenScores) -> Float[Tensor, "B T"]:
    """How teachable the token is, in [0, 1] (:func:`teachability_of`)."""
    return teachability_of(_statistics(tokens), tokens.mask)


def random(tokens: TokenScores) -> Float[Tensor, "B T"]:
    """A control: the highest surprise of a rollout, moved to a random token of it."""
    return moved_to_random(surprise(tokens), tokens.mask, tokens.tokens)


def start(tokens: TokenScores) -> Float[Tensor, "B T"]:
    """A control: the highest surprise of a rollout, moved to its first token."""
    return moved_to_start(surprise(tokens), tokens.mask)


def teachability_of(statistics: TokenStatistics, mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Teachability norm(D) norm(C) of every token, [B T] in [0, 1].

    D is KL(p_T || p_S) on the union of both models' likeliest tokens, C the teacher's mass on the
    student's; norm(z) = clip((z - q05) / (q95 - q05), 0, 1) with the batch's quantiles. Source: the
    released code of arXiv 2605.26844.
    """
    scaled = []
    for values in (statistics.disagreement, statistics.compatibility):
        low, high = values[mask].quantile(torch.tensor([0.05, 0.95]).to(values))
        spread = (high - low).clamp(min=torch.finfo(values.dtype).tiny)
        scaled.append(((values - low) / spread).clamp(0, 1) * mask)
    return scaled[0] * scaled[1]


class Detector(NamedTuple):
    """A detector and what it needs: statistics (one more student forward), whole_batch (a token's
    score depends on the other rollouts scored with it), windows (a short one from every token).
    ``needs`` is what it wants of the teacher. ``title`` names it in the testbed's table.
    """

    score: Callable[[TokenScores], Tensor]
    statistics: bool = False
    whole_batch: bool = False
    title: str = ""
    needs: Needs = "distributions"
    windows: bool = False


DETECTORS: dict[str, Detector] = {
    "sampled": Detector(sampled, title="token loss", needs="logprobs"),
    "teacher_nll": Detector(teacher_nll, title="teacher NLL", needs="logprobs"),
    "surprise": Detector(surprise, whole_batch=True),
    "entropy": Detector(entropy, statistics=True, needs="nothing"),
    "student_nll": Detector(student_nll, title="student NLL", needs="nothing"),
    "rewritten": Detector(rewritten, needs="windows", windows=True),
    "reverse_kl": Detector(reverse_kl, statistics=True, title="full KL"),
    "teachability": Detector(teachability, statistics=True, whole_batch=True),
    "random": Detector(random, whole_batch=True),
    "start": Detector(start, whole_batch=True),
}


def detector_named(name: str) -> Detector:
    """By its name in ``DETECTORS``, or ``module:function``. Raises TOPDError if there is none."""
    return row_named("candidate_loss", name, DETECTORS, Detector)


def _statistics(tokens: TokenScores) -> TokenStatistics:
    assert tokens.statistics is not None  # the detector says that it needs them
    return tokens.statistics
