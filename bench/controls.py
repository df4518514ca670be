"""Controls that only the testbed can have: true forks as a detector, right answers as a reward.

Named in a recipe as ``candidate_loss: bench.controls:oracle_arithmetic`` and ``method:
bench.controls:rl``, from the repository's root.
"""

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from topd.detectors import Detector
from topd.methods import Method
from topd.testbed import FAMILIES
from topd.testbed.models import tokenizer_of
from topd.testbed.world import END, labels
from topd.types import Evidence, Guidance, TokenScores

SURE = 100.0  # nats: above every threshold


def true_fork(tokens: TokenScores, *, family: str) -> Tensor:
    """The labelled fork of every rollout scores ``SURE``, all other tokens 0; [B T].

    The perfect detector: what is then missing is not for want of finding forks.
    """
    score = torch.zeros_like(tokens.teacher)
    for row, (ids, mask, prompt) in enumerate(
        zip(tokens.tokens, tokens.mask, tokens.prompts, strict=True)
    ):
        words = _words(family, ids[mask].tolist())
        found = labels(FAMILIES[family], " ".join(_words(family, prompt)), words)
        if "fork" in found:
            score[row, found.index("fork")] = SURE
    return score


oracle_arithmetic = Detector(partial(true_fork, family="arithmetic"))
oracle_programs = Detector(partial(true_fork, family="programs"))
oracle_logic = Detector(partial(true_fork, family="logic"))
oracle_guesses = Detector(partial(true_fork, family="guesses"))


def _rl(evidence: Evidence, *, family: str, distil: float = 0.0) -> tuple[Guidance, ...]:
    """The verifier's reward less the mean of the same prompt's rollouts, on every token.

        L = distil sum_t D_t / T - sum_t A log p_S(y_t) / T,   A = right - mean(right)

    Group baseline without a scale, as in Dr. GRPO (arXiv 2503.20783); with ``distil`` 1 it is RL
    beside OPD. Give ``num_generations`` above 1.
    """
    right: dict[int, list[float]] = {}
    for rollout in evidence.rollouts:
        prompt, response = (
            " ".join(word for word in _words(family, ids) if word != END)
            for ids in (rollout.prompt.student, rollout.response)
        )
        solved = rollout.finished and FAMILIES[family].check(prompt, response)
        right.setdefault(rollout.prompt.index, []).append(float(solved))
    means = {index: sum(found) / len(found) for index, found in right.items()}
    own = {index: iter(found) for index, found in right.items()}
    guidance = []
    for rollout in evidence.rollouts:
        index, length = rollout.prompt.index, len(rollout.response)
        gain = next(own[index]) - means[index]
        guidance.append(Guidance((distil,) * length, advantages=(gain,) * length))
    return tuple(guidance)


rl = Method(_rl, whole_update=True)


@cache
def _tokenizer(family: str) -> PreTrainedTokenizerBase:
    return tokenizer_of(FAMILIES[family])


def _words(family: str, ids: Sequence[int]) -> list[str]:
    return list(_tokenizer(family).convert_ids_to_tokens(list(ids)))
