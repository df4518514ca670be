"""Where every token of a micro-batch is: rows of ids, branches packed after their rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from topd.inputs.models.positions import takes_masks
from topd.training.learning.router import router_weight
from topd.types import Guidance, Rollout

PER_TOKEN = (
    *("place", "tokens", "weights", "sampled", "teacher_hidden", "target_tokens"),
    *("target_probabilities", "capped", "advantages"),
)


def sent(values: Any, dtype: torch.dtype = torch.long, *, device: torch.device) -> Tensor:
    """A tensor on the device. A GPU copies from pinned memory, so that nobody waits for it."""
    tensor = torch.as_tensor(values, dtype=dtype)
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Layout:
    """Where everything stands: rows of token ids, and what is packed in them.

    ``places`` has for each branch, in order, the (row, column) whose state predicts each token.
    ``spans`` are packed branches: (row, first column, tokens that they see before, length).
    """

    ids: list[list[int]]
    places: list[list[tuple[int, int]]]
    spans: list[tuple[int, int, int, int]]

    def positions(self, width: int, device: torch.device) -> Int[Tensor, "B L"]:
        """Position ids: a packed branch counts on from where it leaves its rollout."""
        positions = torch.arange(width).repeat(len(self.ids), 1)
        for row, first, seen, length in self.spans:
            positions[row, first : first + length] = torch.arange(seen, seen + length)
        return sent(positions, device=device)

    def visible(self, width: int, device: torch.device) -> Bool[Tensor, "B 1 L L"]:
        """True where a token (row of the mask) may look: its own past, no other branch."""
        mask = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        visible = mask.repeat(len(self.ids), 1, 1, 1)
        for row, first, seen, length in self.spans:
            visible[row, 0, first : first + length, seen:first] = False
        return visible


def lay_out(rollouts: Sequence[Rollout], guidance: Sequence[Guidance], *, packed: bool) -> Layout:
    """One row a rollout; its branches after it, or in rows of their own after all rollouts.

    The last token of a branch predicts nothing and is left out; a branch that is the rollout's own
    text has no tokens of its own.
    """
    ids = [[*r.prompt.student, *r.response] for r in rollouts]
    places: list[list[tuple[int, int]]] = []
    spans: list[tuple[int, int, int, int]] = []
    for row, (rollout, guide) in enumerate(zip(rollouts, guidance, strict=True)):
        for branch in guide.branches:
            seen, read = len(rollout.prompt.student) + branch.start, branch.tokens[:-1]
            if branch.is_part_of(rollout.response):
                places.append([(row, seen - 1 + i) for i in range(len(branch.tokens))])
            elif packed:
                first = len(ids[row])
                ids[row].extend(read)
                spans.append((row, first, seen, len(read)))
                places.append([(row, seen - 1), *((row, first + i) for i in range(len(read)))])
            else:
                places.append([(len(ids), seen - 1 + i) for i in range(len(branch.tokens))])
                ids.append([*ids[row][:seen], *read])
    return Layout(ids, places, spans)


def dealt(count: int, sizes: Sequence[int]) -> list[list[int]]:
    """Rows as micro-batches of so many; those beyond all sizes are dealt to them in turn.

    >>> dealt(7, [2, 2])
    [[0, 1, 4, 6], [2, 3, 5]]
    """
    rows = iter(range(count))
    parts = [list(islice(rows, size)) for size in sizes]
    for i, more in enumerate(rows):
        parts[i % len(parts)].append(more)
    return parts


def can_pack(model: PreTrainedModel) -> bool:
    """Whether branches may share a row: full attention throughout, by a kernel that takes masks.

    A load-balancing loss counts the tokens of plain rows.
    """
    config = model.config.get_text_config()
    masks = takes_masks(model.config) and config._attn_implementation == "sdpa"
    return masks and not router_weight(model)


def learned_part(rollout: Rollout, guidance: Guidance) -> tuple[Rollout, Guidance]:
    """Without the tokens after the last that the loss depends on: nobody needs to read them."""
    end = guidance.learned
    return (
        replace(rollout, response=rollout.response[:end], logprobs=rollout.logprobs[:end]),
        replace(guidance, weights=guidance.weights[:end], advantages=guidance.advantages[:end]),
    )


def own_parts(batch: Mapping[str, Any], rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """What of a batch has an entry a token, without the tokens that an environment wrote.

    They are read by the student, and no more.
    """
    owned = (own for r in rollouts for own in r.own)
    place = sent([i for i, own in enumerate(owned) if own], device=batch["tokens"].device)
    kept = {key: batch[key][place] for key in PER_TOKEN if batch[key] is not None}
    return {**kept, "lengths": [sum(r.own) for r in rollouts]}


def support_of(guidance: Sequence[Guidance]) -> list[tuple[list[int], list[float]]]:
    """Tokens and probabilities of all soft targets at each response token that is learned."""
    support: list[tuple[list[int], list[float]]] = []
    for guide in guidance:
        first = len(support)
        support += [([], []) for _ in guide.weights]
        for target in guide.targets:
            tokens, mass = support[first + target.position]
            tokens.extend(target.tokens)
            mass.extend(target.probabilities)
    return support
