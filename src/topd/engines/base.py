"""What every engine has of its model in this process: the head, the embeddings, and the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Required, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from topd.engines import Scores, Tick, no_tick
from topd.errors import TOPDError
from topd.inputs.models.heads import evaluating, head_of
from topd.losses import linear_logprobs
from topd.types import Head, Ids, Needs, Sampling, Starts

WIDTHS = {"cuda": 64}  # of a device: the numbers of rows of a head that suit it, multiples of this


@dataclass(frozen=True)
class Prefix:
    """What ``continue_from`` needs of scored texts; ``cache`` is None if none was kept here."""

    prompts: tuple[Ids, ...]
    responses: tuple[Ids, ...]
    cache: DynamicCache | None = None

    def before(self, starts: Starts) -> list[Ids]:
        """The texts, prompts included, before each (row, token)."""
        return [self.prompts[row] + self.responses[row][:t] for row, t in starts]


@dataclass(frozen=True)
class Wanted:
    """How texts are to be written: ``seeds`` one a text, ``tick`` called once a forward.

    ``rejoin`` is of how many tokens that are the rollout's a window stops; 0: of none.
    """

    sampling: Sampling
    seeds: Sequence[int]
    tick: Tick = no_tick
    rejoin: int = 0

    @property
    def steps(self) -> int:
        """How many tokens at most."""
        return self.sampling.max_new_tokens

    def of(self, some: slice) -> Wanted:
        """The same of some texts."""
        return replace(self, seeds=self.seeds[some])


class Options(TypedDict, total=False):
    """The keywords of BaseEngine."""

    eos_ids: Required[Sequence[int]]
    vocab_size: int | None
    allowed: Sequence[int] | None
    name: str
    autocast: Callable[[], AbstractContextManager[None]]


class BaseEngine:
    """An engine but for the decoder, which may be elsewhere.

    Args:
        model: head and embeddings on their device; a decoder only where a subclass calls it.
        eos_ids: tokens that end a response.
        vocab_size: only the first so many tokens are sampled; the rest are padding rows.
        allowed: ids that tokens have; no others are sampled nor counted.
        name: what error messages call the model.
        autocast: makes the context of every forward, so that it computes as training does.

    Attributes:
        end_ids: tokens that end a response.
        barred: [V], True where there is no token; None if there are all.
        device: of the model and of all that engines return.
        gives: what a student can learn from it as a teacher.
    """

    gives: Needs = "distributions"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_ids: Sequence[int],
        vocab_size: int | None = None,
        allowed: Sequence[int] | None = None,
        name: str = "model",
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model, self.name, self.device = model, name, model.device
        self.autocast = autocast
        self.vocab_size = vocab_size or head_of(model).vocab_size
        self.barred: Tensor | None = None
        if allowed is not None:
            self._allow(allowed)
        self.end_ids = frozenset(eos_ids)

    def _allow(self, ids: Sequence[int]) -> None:
        """Rows after the last token are sliced off, those between tokens barred.

        A GPU multiplies and reads rows of an odd width slowly: there some stay, barred.
        """
        allowed = torch.tensor([i for i in ids if i < self.vocab_size], device=self.device)
        end, unit = int(allowed.max()) + 1, WIDTHS.get(self.device.type, 1)
        self.vocab_size = min(end + -end % unit, self.vocab_size)
        if len(allowed) < self.vocab_size:
            self.barred = torch.ones(self.vocab_size, dtype=torch.bool, device=self.device)
            self.barred[allowed] = False

    @property
    def head(self) -> Head:
        """The model's output head on the tokens that may be sampled."""
        head = head_of(self.model).narrowed(self.vocab_size)
        if self.barred is None:
            return head
        return replace(head, barred=self.barred.to(head.weight.device))

    def ends(self, tokens: Ids) -> bool:
        """Whether a text ends with an end-of-sequence token."""
        return bool(tokens) and tokens[-1] in self.end_ids

    @torch.no_grad()
    def embed(self, tokens: Int[Tensor, "N n"]) -> Float[Tensor, "N n D"]:
        """Input embeddings of tokens."""
        return self.model.get_input_embeddings()(tokens.to(self.device))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model is in eval mode, and computes as training does."""
        with evaluating(self.model), self.autocast():
            yield

    def padded(self, rows: Sequence[Sequence[int]]) -> Int[Tensor, "N L"]:
        """Token ids, filled up on the right with 0."""
        width = max(len(row) for row in rows)
        return self.tensor([list(row) + [0] * (width - len(row)) for row in rows])

    def tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Whole numbers on the model's device."""
        return torch.tensor(values, dtype=torch.long, device=self.device)


def check_seeds(seeds: Sequence[int], rows: Sequence[object]) -> None:
    """Every row has a seed. Raises TOPDError if not."""
    if len(seeds) != len(rows):
        raise TOPDError(f"{len(seeds)} seeds for {len(rows)} rows: give one a row.")


def scores_of(
    hidden: Float[Tensor, "B T D"], head: Head, prefix: Prefix, temperature: float
) -> Scores:
    """What the states that predict the responses of ``prefix`` say of them."""
    rows = [torch.tensor(response, dtype=torch.long) for response in prefix.responses]
    tokens = pad_sequence(rows, batch_first=True).to(hidden.device)
    found = linear_logprobs(hidden.flatten(0, 1), head, tokens.flatten(), temperature=temperature)
    logprobs, likeliest = (values.reshape(tokens.shape) for values in found)
    length = torch.tensor([len(row) for row in rows], device=tokens.device)
    outside = torch.arange(tokens.shape[1], device=tokens.device) >= length[:, None]
    return Scores(hidden, logprobs.masked_fill(outside, 0.0), likeliest, prefix)
