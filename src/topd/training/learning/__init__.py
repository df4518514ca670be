"""The learning phase: one student forward on the rollouts, and the loss of their guidance.

    L = sum_t w_t D_t / (all response tokens)  +  lambda sum_i G_i / (all guided tokens)

with G_i = KL(y~_i || p_S) at soft targets, and the branch's own loss at the tokens of branches. The
denominators are those of the whole update, over micro-batches and ranks. A mixture of experts whose
configuration asks for a load-balancing loss adds its own, the mean over micro-batches by rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypedDict, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from topd.config import TOPDConfig
from topd.inputs.models.heads import head_of
from topd.losses import Kind, TokenTerms, Upstream, importance, linear_token_terms, soft_target_kl
from topd.training.experience.evidence import Experience
from topd.training.learning.layout import Layout, lay_out, learned_part, own_parts, sent, support_of
from topd.training.learning.router import balanced_forward, router_weight
from topd.types import BranchLoss, Guidance, Head, Rollout, autocast_dtype

T = TypeVar("T")
ALIGNED = 16  # columns: attention kernels would copy a mask of other widths, in every layer


@dataclass(frozen=True)
class Totals:
    """Response tokens, guided tokens and rollouts of the whole update."""

    tokens: float
    guided: float
    rollouts: float = 1


class BranchBatch(TypedDict):
    """All tokens of a micro-batch's branches with one loss, end to end: Q of them.

    ``place`` [Q] are the flat positions whose state predicts each of ``tokens`` [Q];
    ``teacher_hidden`` [Q D] the teacher's states in the same contexts.
    """

    loss: BranchLoss
    place: Int[Tensor, " Q"]
    tokens: Int[Tensor, " Q"]
    teacher_hidden: Float[Tensor, "Q D"]


class LearningBatch(TypedDict):
    """Some rollouts of an update, ready for the student. P are the response tokens that the loss
    depends on, end to end.

    ``place`` [P] are flat positions in ``input_ids`` [B L] whose state predicts each token;
    ``sampled`` [P] the log-probs at sampling (NaN where none were recorded); ``guided`` counts the
    tokens of L_traj. ``capped`` [P] marks losses to be capped (None: none is); ``lengths`` are the
    rollouts' numbers of response tokens, ``read`` those of each row without padding.
    ``positions`` [B L] and ``visible`` [B 1 L L] are None
    unless branches are packed after their rollouts.
    """

    input_ids: Int[Tensor, "B L"]
    positions: Int[Tensor, "B L"] | None
    visible: Bool[Tensor, "B 1 L L"] | None
    place: Int[Tensor, " P"]
    tokens: Int[Tensor, " P"]
    weights: Float[Tensor, " P"]
    sampled: Float[Tensor, " P"]
    teacher_hidden: Float[Tensor, "P D"]
    target_tokens: Int[Tensor, "P M"]
    target_probabilities: Float[Tensor, "P M"]
    guided: int
    capped: Bool[Tensor, " P"] | None
    advantages: Float[Tensor, " P"] | None
    lengths: list[int]
    read: list[int]
    branches: list[BranchBatch]
    totals: Totals


class LearningTerms(NamedTuple):
    """What one forward yields: the terms of the P response tokens, and the sum of branch losses.

    ``balance`` is the model's own load-balancing loss of its routers, times the weight that its
    configuration gives it; None where it asks for none.
    """

    tokens: TokenTerms
    branches: Float[Tensor, ""]
    balance: Float[Tensor, ""] | None = None


def collate(
    experience: Experience,
    rows: Sequence[int],
    totals: Totals,
    device: torch.device,
    *,
    packed: bool = True,
) -> LearningBatch:
    """Lay some rollouts of an experience out for one forward, on ``device``.

    ``packed`` branches come after their rollout, in the same row; else each has a row.
    """
    pairs = [learned_part(experience.rollouts[row], experience.guidance[row]) for row in rows]
    rollouts, guidance = zip(*pairs, strict=True)
    layout = lay_out(rollouts, guidance, packed=packed)
    width = max(map(len, layout.ids))
    if layout.spans and device.type == "cuda":
        width += -width % ALIGNED
    learned = zip(rows, guidance, strict=True)
    states = [experience.teacher_hidden[row][: len(g.weights)] for row, g in learned]
    target_tokens, target_probabilities = _targets(guidance, device)
    tokens = partial(_end_to_end, device=device)
    numbers = partial(_end_to_end, device=device, dtype=torch.float32)
    batch = LearningBatch(
        input_ids=sent([row + [0] * (width - len(row)) for row in layout.ids], device=device),
        positions=layout.positions(width, device) if layout.spans else None,
        visible=layout.visible(width, device) if layout.spans else None,
        place=tokens(_predicting(row * width, rollout) for row, rollout in enumerate(rollouts)),
        tokens=tokens(r.response for r in rollouts),
        weights=numbers(g.weights for g in guidance),
        sampled=numbers(r.logprobs or [torch.nan] * len(r.response) for r in rollouts),
        teacher_hidden=torch.cat(states).to(device),
        target_tokens=target_tokens,
        target_probabilities=target_probabilities,
        guided=sum(g.guided for g in guidance),
        capped=_capped(guidance, device),
        advantages=_advantages(guidance, device),
        lengths=[len(r.response) for r in rollouts],
        read=[len(row) for row in layout.ids],
        branches=_branch_batches(experience, rows, layout, width, device),
        totals=totals,
    )
    if any(r.replies for r in rollouts):
        batch.update(cast(LearningBatch, own_parts(batch, rollouts)))
    return batch


def _end_to_end(
    rows: Iterable[Iterable[float]], *, device: torch.device, dtype: torch.dtype = torch.long
) -> Float[Tensor, " P"] | Int[Tensor, " P"]:
    return sent([value for row in rows for value in row], dtype, device=device)


def _predicting(first: int, rollout: Rollout) -> range:
    """Flat positions whose state predicts each response token of a row that begins at ``first``."""
    place = first + len(rollout.prompt.student) - 1
    return range(place, place + len(rollout.response))


def _targets(
    guidance: Sequence[Guidance], device: torch.device
) -> tuple[Int[Tensor, "P M"], Float[Tensor, "P M"]]:
    """Tokens and probabilities of the soft targets at each token, filled up with zeros."""
    support = support_of(guidance)
    counts = torch.tensor([len(tokens) for tokens, _ in support], dtype=torch.long)
    filled = torch.arange(max(counts.tolist(), default=0)) < counts[:, None]
    ids, mass = torch.zeros(filled.shape, dtype=torch.long), torch.zeros(filled.shape)
    ids[filled] = torch.tensor([k for tokens, _ in support for k in tokens], dtype=torch.long)
    mass[filled] = torch.tensor([p for _, own in support for p in own], dtype=torch.float32)
    return sent(ids, device=device), sent(mass, torch.float32, device=device)


def _advantages(guidance: Sequence[Guidance], device: torch.device) -> Float[Tensor, " P"] | None:
    """By what the log-prob of each token is multiplied; None where none has an advantage."""
    if not any(g.advantages for g in guidance):
        return None
    given = (g.advantages or (0.0,) * len(g.weights) for g in guidance)
    return _end_to_end(given, device=device, dtype=torch.float32)


def _capped(guidance: Sequence[Guidance], device: torch.device) -> Bool[Tensor, " P"] | None:
    """Where losses are capped; None where none is."""
    if not any(g.capped for g in guidance):
        return None
    marks = ([t in g.capped for t in range(len(g.weights))] for g in guidance)
    return _end_to_end(marks, device=device, dtype=torch.bool)


def _branch_batches(
    experience: Experience, rows: Sequence[int], layout: Layout, width: int, device: torch.device
) -> list[BranchBatch]:
    branches = [branch for row in rows for branch in experience.guidance[row].branches]
    states = [hidden for row in rows for hidden in experience.branch_hidden[row]]
    batches = []
    for loss in sorted({branch.loss for branch in branches}):
        own = [k for k, branch in enumerate(branches) if branch.loss == loss]
        place = [row * width + column for k in own for row, column in layout.places[k]]
        tokens = [token for k in own for token in branches[k].tokens]
        batches.append(
            BranchBatch(
                loss=loss,
                place=sent(place, device=device),
                tokens=sent(tokens, device=device),
                teacher_hidden=torch.cat([states[k] for k in own]).to(device),
            )
        )
    return batches


def learning_terms(
    model: PreTrainedModel, batch: LearningBatch, teacher_head: Head, args: TOPDConfig
) -> LearningTerms:
    """One forward of the student without its head, then the chunked head.

    The head's weight is read inside the head's own forward, where FSDP2 has it whole. Teacher's
    states without columns are those of a teacher that nobody asks: its logits are 0, for nothing.
    """
    if not batch["teacher_hidden"].shape[1]:
        teacher_head = Head(teacher_head.weight[:, :0], barred=teacher_head.barred)
    states, balance = _forward(model, batch)
    torch.clear_autocast_cache()  # 16-bit weights: the backward pass holds those that it needs
    linear = model.get_output_embeddings()

    def head_forward() -> LearningTerms:
        return _terms(states, head_of(model), batch, teacher_head, args)

    return inside_forward(linear, linear, head_forward)._replace(balance=balance)


def _forward(
    model: PreTrainedModel, batch: LearningBatch
) -> tuple[Float[Tensor, "N D"], Float[Tensor, ""] | None]:
    """Last hidden states of all B L places, end to end, and the weighted balance of routers."""
    weight = router_weight(model)
    if weight:
        states, balance = balanced_forward(model, batch["input_ids"], batch["read"])
        return states.flatten(0, 1), weight * balance
    more: dict[str, Tensor] = {}
    if batch["visible"] is not None:
        more["attention_mask"] = _added(batch["visible"], model.dtype)
    if batch["positions"] is not None:
        more["position_ids"] = batch["positions"]
    output = model.get_decoder()(input_ids=batch["input_ids"], use_cache=False, **more)
    return output.last_hidden_state.flatten(0, 1), None


def _added(visible: Bool[Tensor, "B 1 L L"], dtype: torch.dtype) -> Float[Tensor, "B 1 L L"]:
    """The mask as what is added to scores, once for all layers: each would make and keep its own.

    In the precision that attention computes in, so that none casts it either.
    """
    dtype = autocast_dtype(visible.device) or dtype
    added = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return added.masked_fill_(~visible, torch.finfo(dtype).min)


def _terms(
    states: Tensor, head: Head, batch: LearningBatch, teacher_head: Head, args: TOPDConfig
) -> LearningTerms:
    def terms_of(
        part: LearningBatch | BranchBatch, targets: Tensor, kind: Kind, expected: Upstream | None
    ) -> TokenTerms:
        return linear_token_terms(
            states[part["place"]],
            head,
            part["teacher_hidden"],
            teacher_head,
            part["tokens"],
            targets,
            kind=kind,
            beta=args.beta,
            temperature=args.loss_temperature,
            chunk_tokens=args.chunk_tokens,
            expected=expected,
            promised=_promised(states),
        )

    def branch_loss(part: BranchBatch) -> Tensor:
        """The sum of one kind of branch loss over its tokens, nats."""
        loss, factor = part["loss"], states.new_ones(len(part["tokens"]))
        none = part["tokens"].new_zeros(len(factor), 0)
        if loss == "cross_entropy":
            return -terms_of(part, none, "reverse_kl", Upstream(None, -factor, None)).logprob.sum()
        return terms_of(part, none, loss, Upstream(factor, None, None)).divergence.sum()

    terms = terms_of(batch, batch["target_tokens"], args.divergence, _expected(batch, args))
    parts = [branch_loss(part) for part in batch["branches"]]
    return LearningTerms(terms, sum(parts, terms.divergence.new_zeros(())))


def _promised(states: Tensor) -> bool:
    """Whether the loss is taken to be :func:`update_loss`: comparing would wait for the device."""
    return states.device.type != "cpu"


def _expected(batch: LearningBatch, args: TOPDConfig) -> Upstream | None:
    """The derivative of :func:`update_loss` by the terms; None where it is not known yet."""
    if batch["capped"] is not None:
        return None
    totals, count = batch["totals"], max(batch["totals"].tokens, 1)
    targets = logprob = None
    if args.trajectory_weight and totals.guided:
        targets = -_trajectory_factor(totals, args) * batch["target_probabilities"]
    if args.kd_ratio < 1:
        logprob = (args.kd_ratio - 1) * batch["weights"] / count
    if batch["advantages"] is not None:
        logprob = (0.0 if logprob is None else logprob) - batch["advantages"] / count
    divergence = args.kd_ratio * batch["weights"] / count
    if args.overlap:
        return Upstream(divergence, logprob, targets, batch["sampled"], args.max_importance)
    return Upstream(divergence, logprob, targets)


def _trajectory_factor(totals: Totals, args: TOPDConfig) -> float:
    """lambda over the count that the reduction of L_traj names."""
    count = totals.guided if args.trajectory_reduction == "mean" else totals.tokens
    return args.trajectory_weight / count


def update_loss(
    learned: LearningTerms, batch: LearningBatch, args: TOPDConfig
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """This batch's share of the update's loss, and the sum of its trajectory divergences, nats."""
    totals, terms = batch["totals"], learned.tokens
    token_loss = terms.divergence
    if args.kd_ratio == 0:  # a divergence that nobody asks for may be infinite
        token_loss = -terms.logprob
    elif args.kd_ratio < 1:
        token_loss = args.kd_ratio * token_loss - (1 - args.kd_ratio) * terms.logprob
    if batch["capped"] is not None:
        token_loss = cap_at_medians(token_loss, batch["capped"], batch["lengths"])
    gain = terms.logprob
    if args.overlap:
        ratio = importance(terms.logprob, batch["sampled"], args.max_importance)
        token_loss, gain = ratio * token_loss, ratio * gain
    token_loss = token_loss.masked_fill(batch["weights"] == 0, 0.0)  # an infinite one likewise
    loss = (batch["weights"] * token_loss).sum() / max(totals.tokens, 1)
    if batch["advantages"] is not None:
        loss = loss - (batch["advantages"] * gain).sum() / max(totals.tokens, 1)
    trajectory = soft_target_kl(terms.target_logprobs, batch["target_probabilities"]).sum()
    trajectory = trajectory + learned.branches
    if args.trajectory_weight and totals.guided:
        loss = loss + _trajectory_factor(totals, args) * trajectory
    if learned.balance is not None:
        loss = loss + learned.balance * (len(batch["lengths"]) / totals.rollouts)
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


def inside_forward(wrapped: nn.Module, module: nn.Module, run: Callable[[], T]) -> T:
    """Call ``run`` as the forward of ``wrapped``, so that the hooks of DDP and FSDP fire.

    ``module`` is what ``wrapped`` wraps (or the same).
    """
    own = vars(module).get("forward")  # accelerate's autocast, if any
    found: list[T] = []

    def restore() -> None:
        if own is not None:
            module.forward = own
        else:
            vars(module).pop("forward", None)

    def redirected() -> T:
        restore()  # ``run`` may need the real one
        found.append(run())
        return found[0]

    module.forward = redirected
    try:
        output = wrapped()
    finally:
        restore()
    # FSDP2 hands on a copy in the dtype of its policy; its hooks are on what was returned to it
    return found[0] if isinstance(wrapped, FSDPModule) else output
