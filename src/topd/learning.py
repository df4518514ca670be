"""The learning phase: one student forward on the rollouts, and the loss of their guidance.

    L = sum_t w_t D_t / (all response tokens)  +  lambda sum_i KL(y~_i || p_S) / (all guided tokens)

The denominators are those of the whole update, over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from topd.config import TOPDConfig
from topd.engines.hf import head_of
from topd.experience import Experience
from topd.losses import TokenTerms, Upstream, linear_token_terms, soft_target_kl
from topd.types import Head


@dataclass(frozen=True)
class Totals:
    """Response tokens and guided tokens of the whole update."""

    tokens: float
    guided: float


class LearningBatch(TypedDict):
    """Some rollouts of an update, ready for the student. P are their response tokens, end to end.

    ``place`` [P] are flat positions in ``input_ids`` [B L] whose state predicts each token;
    ``sampled`` [P] the log-probs at sampling (NaN where none were recorded); ``guided`` counts the
    soft targets. ``capped`` [P] marks losses to be capped (None: none is); ``lengths`` are the
    rollouts' numbers of response tokens.
    """

    input_ids: Int[Tensor, "B L"]
    place: Int[Tensor, " P"]
    tokens: Int[Tensor, " P"]
    weights: Float[Tensor, " P"]
    sampled: Float[Tensor, " P"]
    teacher_hidden: Float[Tensor, "P D"]
    target_tokens: Int[Tensor, "P M"]
    target_probabilities: Float[Tensor, "P M"]
    guided: int
    capped: Bool[Tensor, " P"] | None
    lengths: list[int]
    totals: Totals


def collate(
    experience: Experience, rows: Sequence[int], totals: Totals, device: torch.device
) -> LearningBatch:
    """Lay some rollouts of an experience out for one forward, on ``device``."""
    rollouts = [experience.rollouts[row] for row in rows]
    guidance = [experience.guidance[row] for row in rows]
    width = max(len(r.prompt.student) + len(r.response) for r in rollouts)
    ids = [[*r.prompt.student, *r.response] for r in rollouts]
    place = [
        b * width + len(r.prompt.student) - 1 + t
        for b, r in enumerate(rollouts)
        for t in range(len(r.response))
    ]
    support = _support(experience, rows)
    breadth = max((len(tokens) for tokens, _ in support), default=0)

    def tensor(values: Any, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return LearningBatch(
        input_ids=tensor([row + [0] * (width - len(row)) for row in ids]),
        place=tensor(place),
        tokens=tensor([token for r in rollouts for token in r.response]),
        weights=tensor([weight for g in guidance for weight in g.weights], torch.float32),
        sampled=tensor(
            [p for r in rollouts for p in (r.logprobs or [torch.nan] * len(r.response))],
            torch.float32,
        ),
        teacher_hidden=torch.cat([experience.teacher_hidden[row] for row in rows]).to(device),
        target_tokens=tensor(
            [tokens + [0] * (breadth - len(tokens)) for tokens, _ in support]
        ).reshape(len(support), breadth),
        target_probabilities=tensor(
            [mass + [0.0] * (breadth - len(mass)) for _, mass in support], torch.float32
        ).reshape(len(support), breadth),
        guided=sum(len(g.targets) for g in guidance),
        capped=tensor([t in g.capped for g in guidance for t in range(len(g.weights))], torch.bool)
        if any(g.capped for g in guidance)
        else None,
        lengths=[len(r.response) for r in rollouts],
        totals=totals,
    )


def token_terms(
    model: PreTrainedModel, batch: LearningBatch, teacher_head: Head, args: TOPDConfig
) -> TokenTerms:
    """One forward of the student without its head, then the chunked head. [P] each."""
    states = model.get_decoder()(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    return linear_token_terms(
        states.flatten(0, 1)[batch["place"]],
        head_of(model),
        batch["teacher_hidden"],
        teacher_head,
        batch["tokens"],
        batch["target_tokens"],
        kind=args.divergence,
        beta=args.beta,
        temperature=args.loss_temperature,
        chunk_tokens=args.chunk_tokens,
        expected=_expected(batch, args),
    )


def _expected(batch: LearningBatch, args: TOPDConfig) -> Upstream | None:
    """The derivative of :func:`update_loss` by the terms; capped losses make it unknown yet."""
    if batch["capped"] is not None:
        return None
    totals, weights = batch["totals"], batch["weights"] / max(batch["totals"].tokens, 1)
    targets = None
    if args.trajectory_weight and totals.guided:
        count = totals.guided if args.trajectory_reduction == "mean" else totals.tokens
        targets = -args.trajectory_weight / count * batch["target_probabilities"]
    logprob = None if args.kd_ratio == 1 else (args.kd_ratio - 1) * weights
    return Upstream(args.kd_ratio * weights, logprob, targets)


def update_loss(
    terms: TokenTerms, batch: LearningBatch, args: TOPDConfig
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """This batch's share of the update's loss, and the sum of its trajectory divergences, nats."""
    totals = batch["totals"]
    token_loss = terms.divergence
    if args.kd_ratio < 1:
        token_loss = args.kd_ratio * token_loss - (1 - args.kd_ratio) * terms.logprob
    if batch["capped"] is not None:
        token_loss = cap_at_medians(token_loss, batch["capped"], batch["lengths"])
    loss = (batch["weights"] * token_loss).sum() / max(totals.tokens, 1)
    trajectory = soft_target_kl(terms.target_logprobs, batch["target_probabilities"]).sum()
    if args.trajectory_weight and totals.guided:
        count = totals.guided if args.trajectory_reduction == "mean" else totals.tokens
        loss = loss + args.trajectory_weight * trajectory / count
    return loss, trajectory.detach()


def cap_at_medians(
    token_loss: Float[Tensor, " P"], capped: Bool[Tensor, " P"], lengths: Sequence[int]
) -> Float[Tensor, " P"]:
    """Scale capped losses down to the median loss of their rollout where they are above it.

    The factor carries no gradient: a capped token still learns, with the weight median / loss.
    """
    rollouts = token_loss.detach().split(list(lengths))
    median = torch.cat([r.quantile(0.5).expand(len(r)) for r in rollouts])
    loud = capped & (token_loss.detach() > median)
    return token_loss * torch.where(loud, median / token_loss.detach(), 1.0)


def inside_forward(wrapped: nn.Module, module: nn.Module, run: Callable[[], Any]) -> Any:
    """Call ``run`` as the forward of ``wrapped``, so that the hooks of DDP and FSDP fire.

    ``module`` is what ``wrapped`` wraps (or the same).
    """
    own = vars(module).get("forward")  # accelerate's autocast, if any

    def restore() -> None:
        if own is not None:
            module.forward = own
        else:
            vars(module).pop("forward", None)

    def redirected() -> Any:
        restore()  # ``run`` may need the real one
        return run()

    module.forward = redirected
    try:
        return wrapped()
    finally:
        restore()


def _support(experience: Experience, rows: Sequence[int]) -> list[tuple[list[int], list[float]]]:
    """Tokens and probabilities of all soft targets at each response token of these rollouts."""
    support: list[tuple[list[int], list[float]]] = []
    for row in rows:
        first = len(support)
        support += [([], []) for _ in experience.rollouts[row].response]
        for target in experience.guidance[row].targets:
            tokens, mass = support[first + target.position]
            tokens.extend(target.tokens)
            mass.extend(target.probabilities)
    return support
