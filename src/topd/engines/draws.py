"""Sampling by an exponential race: a number for each token, from the row's seed and the step.

The token drawn is the argmax of ``p / E``, where ``p`` is the softmax and every ``E`` a standard
exponential number: the first to ring of clocks with the rates ``p``, so a sample of ``p``. With
``G = -log E`` it is Gumbel-max, the argmax of ``logits / T + G`` (Maddison et al., 2014,
"A* sampling"), for a logarithm less a token. ``E`` is a function of (seed, step, token) alone. A
change of the logits in their last bits, by another batch, kernel or device, therefore changes the
token only where two tokens nearly tie; a cumulative sum over the vocabulary, compared with one
uniform number, moves with every bit of every token.

The numbers come from an integer hash that has the same bits on every device: ``lowbias32`` (Chris
Wellons, 2018, "Prospecting for hash functions") with a key of two 32-bit words. int32 products wrap
around, and ``>>`` keeps the sign, so every shift is masked.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from topd.types import Sampling

AT_ONCE = 1 << 16  # numbers: fewer cost little more than the calls that make them
TABLE = 1 << 22  # numbers that are kept at most
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)  # lowbias32
STEP = 0x9E3779B9 - (1 << 32)  # odd: no two steps of a row have the same key
WHOLE = 1 << 40  # a probability of 1 as an integer
UNIT = -(1 - 2.0**-24) / 2.0**31  # of the numbers 0.5 to 2^31 - 0.5: -u, and u is never 1


def draw(
    logits: Float[Tensor, "N V"], numbers: Float[Tensor, "N V"] | None, sampling: Sampling
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """A token a row, and its log-prob in nats before top-k and top-p.

    Args:
        logits: of the next tokens; -inf where a token cannot be.
        numbers: positive exponential numbers; not read at temperature 0.
        sampling: temperature, top-k and top-p.
    """
    if sampling.temperature == 0:
        token = _largest(logits)
        return token, logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    assert numbers is not None
    scaled = logits if sampling.temperature == 1 else logits / sampling.temperature
    p, kept = scaled.softmax(-1), scaled
    if sampling.top_k:
        kept = TopKLogitsWarper(min(sampling.top_k, kept.shape[-1]))(None, kept)
    if sampling.top_p < 1:
        kept = _nucleus(kept, sampling.top_p)
    rates = p if kept is scaled else p.masked_fill(kept == -torch.inf, 0)
    token = _largest(rates / numbers)
    return token, p.gather(-1, token[:, None])[:, 0].log()


def _nucleus(scores: Float[Tensor, "N V"], top_p: float) -> Float[Tensor, "N V"]:
    """The scores, -inf outside the likeliest tokens whose probabilities come to ``top_p``.

    torch refuses a sum of floats one after another on a GPU if its algorithms are to be
    deterministic (``full_determinism``), so that one is of integers.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return TopPLogitsWarper(top_p)(None, scores)
    ordered, places = scores.sort(-1)
    outside = (ordered.softmax(-1) * WHOLE).long().cumsum(-1) <= int((1 - top_p) * WHOLE)
    outside[:, -1] = False
    return scores.masked_fill(outside.scatter(-1, places, outside), -torch.inf)


def _largest(values: Float[Tensor, "N V"]) -> Int[Tensor, " N"]:
    """Where each row is largest; on a CPU by NumPy, which takes a tenth of torch's time."""
    if values.device.type != "cpu":
        return values.argmax(-1)
    return torch.from_numpy(values.detach().numpy().argmax(-1))


class Noise:
    """The exponential numbers of N rows, K steps and V tokens, made when they are asked for.

    Those of a few rows and a small vocabulary are made for several steps at once and kept.

    Args:
        seeds: one a row.
        steps: K.
        vocab: V.
        device: where the numbers are needed.
    """

    def __init__(
        self, seeds: Sequence[int], steps: int, vocab: int, device: torch.device, *, greedy: bool
    ) -> None:
        self._greedy = greedy
        first, second = (word[:, None] for word in row_words(seeds))
        keys = step_keys(first, second, torch.arange(steps, dtype=torch.int32))
        self._keys = keys[0].to(device), keys[1].to(device)
        self._tokens = token_words(vocab, device)
        self._table = torch.empty(0)
        self._filled, self._block = 0, max(1, AT_ONCE // max(1, len(seeds) * vocab))
        if len(seeds) * steps * vocab <= TABLE and not greedy:
            self._table = torch.empty(len(seeds), steps, vocab, device=device)

    def at(self, row: Tensor, step: Tensor | int, last: int) -> Float[Tensor, "F V"] | None:
        """Those of F pairs of row and step, ``last`` the largest step; None if greedy."""
        if self._greedy:
            return None
        if not len(self._table):
            return exponential(self._keys[0][row, step], self._keys[1][row, step], self._tokens)
        while self._filled <= last:
            some = slice(self._filled, self._filled + self._block)
            first, second = (key[:, some] for key in self._keys)
            self._table[:, some] = exponential(first, second, self._tokens)
            self._filled += self._block
        return self._table[row, step]


def exponential(
    first: Int[Tensor, "*N"], second: Int[Tensor, "*N"], tokens: Int[Tensor, " V"]
) -> Float[Tensor, "*N V"]:
    """Standard exponential numbers of keys and tokens: -log(1 - u), u in (0, 1).

    ``u`` is finest near 0, where the smallest numbers come from: 31 bits, so that a token of a
    probability of 1e-6 is drawn as often as it should.
    """
    x = first[..., None] ^ tokens
    _fold(x, 16).mul_(FIRST).bitwise_xor_(second[..., None])
    _fold(x, 15).mul_(SECOND)
    x = _fold(x, 16).bitwise_and_(0x7FFFFFFF)
    return x.float().add_(0.5).mul_(UNIT).log1p_().neg_()


def step_keys(
    first: Int[Tensor, "..."], second: Int[Tensor, "..."], step: Int[Tensor, "..."]
) -> tuple[Int[Tensor, "..."], Int[Tensor, "..."]]:
    """The two words of the keys of rows at steps, from the rows' own; int32, broadcast."""
    key = _mixed(first + step * STEP)
    return key, _mixed(key ^ second)


def row_words(seeds: Sequence[int]) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Two words of int32 a seed; of a seed the lowest 64 bits count."""
    low, high = (
        torch.tensor([_signed(seed >> by) for seed in seeds], dtype=torch.int32) for by in (0, 32)
    )
    return _mixed(_mixed(low) ^ high), _mixed(_mixed(high ^ STEP) + low)


@functools.lru_cache(maxsize=8)
def token_words(vocab: int, device: torch.device) -> Int[Tensor, " V"]:
    """A word of int32 for every token."""
    return _mixed(torch.arange(1, vocab + 1, dtype=torch.int32)).to(device)


def _mixed(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """lowbias32 of every word."""
    return _fold(_fold(_fold(x.clone(), 16).mul_(FIRST), 15).mul_(SECOND), 16)


def _fold(x: Tensor, by: int) -> Tensor:
    """x ^ (x >>> by), in place."""
    return x.bitwise_xor_((x >> by).bitwise_and_((1 << (32 - by)) - 1))


def _signed(word: int) -> int:
    """The lowest 32 bits as int32."""
    return ((word + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
