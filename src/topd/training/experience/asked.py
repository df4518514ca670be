"""What a method asks, checked against the rollouts and in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from operator import index
from typing import SupportsIndex, get_args

from topd.errors import TOPDError
from topd.types import Branch, BranchLoss, Guidance, Ids, Rollout, SoftTarget

ROUNDING = 0.01  # of a target's sum, where its probabilities were made in bfloat16


def of_own_tokens(
    found: object, rollouts: Sequence[Rollout], vocab_size: int
) -> tuple[Guidance, ...]:
    """The guidance without weights and advantages of tokens that an environment wrote.

    Raises TOPDError where it does not fit the rollouts, or names tokens from ``vocab_size`` on.
    """
    guidance = _checked(found, rollouts, vocab_size)
    return tuple(
        replace(
            guide,
            weights=tuple(w * own for w, own in zip(guide.weights, r.own, strict=True)),
            advantages=tuple(a * own for a, own in zip(guide.advantages, r.own, strict=False)),
        )
        if r.replies
        else guide
        for guide, r in zip(guidance, rollouts, strict=True)
    )


def _checked(found: object, rollouts: Sequence[Rollout], vocab_size: int) -> tuple[Guidance, ...]:
    """In plain numbers. Raises TOPDError where a method gave no Guidance that fits a rollout."""
    given = found if isinstance(found, Sequence) else ()
    if len(given) != len(rollouts) or not all(isinstance(guide, Guidance) for guide in given):
        raise TOPDError(
            f"method: must return {len(rollouts)} Guidance here, one a rollout in their order, and "
            f"returned {str(found)[:80]}."
        )
    plain = tuple(map(_plain, given))
    for guide, rollout in zip(plain, rollouts, strict=True):
        _check_fits(guide, len(rollout.response), vocab_size)
        _check_own(guide, rollout)
    return plain


def _check_fits(guide: Guidance, tokens: int, vocab_size: int) -> None:
    """Raises TOPDError for what a rollout of so many tokens, or the vocabulary, does not have."""
    weights, advantages = len(guide.weights), len(guide.advantages)
    if weights != tokens or advantages not in (0, tokens):
        raise TOPDError(
            f"method: gave {weights} weights and {advantages} advantages to a rollout of "
            f"{tokens} tokens. Give each of its tokens a weight, and an advantage or none."
        )
    places = [*guide.capped, *(target.position for target in guide.targets)]
    for place in (*places, *(branch.start for branch in guide.branches)):
        if not 0 <= place < tokens:
            raise TOPDError(
                f"method: has a target, a branch or a capped token at {place} of a rollout of "
                f"{tokens} tokens. Count them from 0."
            )
    ids = [token for target in guide.targets for token in target.tokens]
    ids += [token for branch in guide.branches for token in branch.tokens]
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise TOPDError(
            f"method: has the tokens {min(ids)} to {max(ids)} in targets or branches, and may "
            f"have 0 to {vocab_size - 1}. Take ids of the student's tokenizer."
        )
    for target in guide.targets:
        _check_target(target)
    known = get_args(BranchLoss)
    for loss in {branch.loss for branch in guide.branches}.difference(known):
        raise TOPDError(f"method: has a branch by {loss!r}. Choose one of {', '.join(known)}.")


def _check_own(guide: Guidance, rollout: Rollout) -> None:
    """Raises TOPDError for a target, or a branch, that is learned of what an environment wrote."""
    places = [target.position for target in guide.targets] if rollout.replies else []
    for branch in guide.branches if rollout.replies else ():
        count = len(branch.tokens) if branch.is_part_of(rollout.response) else 1
        places += range(branch.start, branch.start + count)
    for place in places:
        if not rollout.own[place]:
            raise TOPDError(
                f"method: has a target or a branch at token {place} of a rollout, which the "
                "environment wrote. Take places where evidence.mask is true, and end a branch of "
                "the rollout's own text with its turn."
            )


def _plain(guide: Guidance) -> Guidance:
    """With Python's numbers, where a method gave tensors' or numpy's. Raises TOPDError."""
    try:
        found = Guidance(
            tuple(map(float, guide.weights)),
            tuple(
                SoftTarget(index(t.position), _ids(t.tokens), tuple(map(float, t.probabilities)))
                for t in guide.targets
            ),
            _ids(guide.capped),
            tuple(
                Branch(index(b.start), _ids(b.tokens), b.loss, index(b.go_on))
                for b in guide.branches
            ),
            tuple(map(float, guide.advantages)),
        )
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise TOPDError(
            "method: a Guidance has numbers, whole ones as places and tokens, SoftTarget in "
            f"targets and Branch in branches ({error})."
        ) from error
    for value in (*found.weights, *found.advantages):
        if not math.isfinite(value):
            raise TOPDError(f"method: gave a token the weight or advantage {value}. Give a number.")
    return found


def _ids(values: Iterable[SupportsIndex]) -> Ids:
    return tuple(map(index, values))


def _check_target(target: SoftTarget) -> None:
    """Raises TOPDError for what is not a distribution over its tokens."""
    if len(target.tokens) != len(target.probabilities):
        raise TOPDError(
            "method: has a target with other numbers of tokens and probabilities. Give each "
            "token one."
        )
    total = sum(target.probabilities)
    if not (min(target.probabilities, default=0) >= 0 and abs(total - 1) <= ROUNDING):
        raise TOPDError(
            f"method: has a target at {target.position} whose probabilities are negative or NaN, "
            f"or sum to {total:.4g}, not to 1. Take a softmax, or divide them by their sum."
        )
