"""The exponential numbers: their law, their independence, and that they are the same everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from topd.engines.draws import Noise, draw, exponential, row_words, step_keys, token_words
from topd.types import Sampling

CPU = torch.device("cpu")
MASK = 0xFFFFFFFF


def lowbias32(x: int) -> int:
    """In Python's own integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def by_hand(seed: int, step: int, token: int) -> float:
    low, high = seed & MASK, seed >> 32 & MASK
    first = lowbias32(lowbias32(low) ^ high)
    second = lowbias32(lowbias32(high ^ 0x9E3779B9) + low & MASK)
    first = lowbias32(first + step * 0x9E3779B9 & MASK)
    second = lowbias32(first ^ second)
    x = first ^ lowbias32(token + 1)
    x ^= x >> 16
    x = (x * 0x7FEB352D & MASK) ^ second
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    x ^= x >> 16
    u = ((x & 0x7FFFFFFF) + 0.5) / 2**31
    return float(-np.log1p(-u))


def numbers(seeds: list[int], steps: int, vocab: int) -> Tensor:
    """[N K V]"""
    first, second = (word[:, None] for word in row_words(seeds))
    keys = step_keys(first, second, torch.arange(steps, dtype=torch.int32))
    return exponential(*keys, token_words(vocab, CPU))


def uniform(found: Tensor) -> np.ndarray:
    """The numbers' own quantiles: uniform on (0, 1) if they are standard exponential."""
    return stats.expon.cdf(found.double().flatten().numpy())


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**32 - 1, 2**32, 2**63 + 12345])
def test_the_numbers_are_those_of_the_hash_in_whole_numbers(seed):
    found = numbers([seed], 3, 70)
    for step in range(3):
        for token in (0, 1, 7, 63, 69):
            assert found[0, step, token].item() == pytest.approx(
                by_hand(seed, step, token), rel=1e-5
            )


def test_the_numbers_are_standard_exponential_and_finite():
    found = numbers(list(range(50)), 20, 1000)
    assert found.isfinite().all()
    assert stats.kstest(uniform(found), "uniform").pvalue > 1e-3
    assert found.mean().item() == pytest.approx(1, abs=5e-3)
    assert found.var().item() == pytest.approx(1, rel=1e-2)


def test_the_ends_of_the_numbers_are_positive_finite_and_far_apart():
    """Of the least and the largest hash there is."""
    words = torch.tensor([0, 0x7FFFFFFF, -1, -(2**31)], dtype=torch.int32)
    u = words.bitwise_and(0x7FFFFFFF).float().add(0.5).mul(-(1 - 2.0**-24) / 2.0**31)
    found = -torch.log1p(u)
    assert found.isfinite().all()
    assert found.max() > 12
    assert 0 < found.min() < 1e-9


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_neighbours_in_seed_step_and_token_are_independent(axis):
    """Ranks of neighbours are uncorrelated, and their pairs fill the unit square evenly."""
    found = numbers(list(range(60)), 60, 60)
    u = torch.from_numpy(uniform(found)).view(60, 60, 60)
    for apart in (1, 2, 16, 32):
        one = u.narrow(axis, 0, 60 - apart).flatten()
        other = u.narrow(axis, apart, 60 - apart).flatten()
        correlation = np.corrcoef(one, other)[0, 1]
        assert abs(correlation) < 4.5 / np.sqrt(len(one))
        cells = ((one * 8).long() * 8 + (other * 8).long()).bincount(minlength=64).numpy()
        assert stats.chisquare(cells).pvalue > 1e-4


def test_no_two_of_many_keys_are_the_same():
    first, second = (word[:, None] for word in row_words(list(range(2000))))
    keys = torch.stack(step_keys(first, second, torch.arange(500, dtype=torch.int32)), -1)
    assert len(keys.view(-1, 2).unique(dim=0)) == 2000 * 500


@pytest.mark.parametrize("vocab", [7, 300, 50_000])
def test_draws_have_their_probabilities_tokens_of_1e_5_too(vocab):
    """Chi-square over tokens sorted by probability and pooled to 50 expected a cell."""
    rows = 20_000 if vocab < 1000 else 2000
    torch.manual_seed(0)
    logits = torch.randn(vocab) * 2
    noise = Noise(range(rows), 1, vocab, CPU, greedy=False)
    drawn = []
    for some in torch.arange(rows).split(500):
        token, _ = draw(logits.expand(len(some), -1), noise.at(some, 0, 0), Sampling())
        drawn.append(token)
    p = logits.double().softmax(-1)
    order = p.argsort(descending=True)
    cell = (p[order].cumsum(0) * (rows // 50)).long().clamp(max=rows // 50 - 1)
    expected = torch.zeros(rows // 50, dtype=torch.float64).index_add_(0, cell, p[order] * rows)
    place = torch.empty_like(order).index_copy_(0, order, cell)
    counts = place[torch.cat(drawn)].bincount(minlength=rows // 50)
    some = expected > 5
    statistic = ((counts[some] - expected[some]) ** 2 / expected[some]).sum().item()
    assert statistic < stats.chi2.ppf(0.999, int(some.sum()))


def test_numbers_kept_for_many_steps_are_those_made_one_by_one(monkeypatch):
    """In any order, for a few rows, whatever the blocks are."""
    place = torch.tensor([[0, 3], [2, 8], [1, 0], [2, 9]]).unbind(-1)
    expected = numbers([5, 6, 7], 10, 11)[place]
    for at_once, table in ((1 << 16, 1 << 22), (70, 1 << 22), (1, 1 << 22), (1 << 16, 0)):
        monkeypatch.setattr("topd.engines.draws.AT_ONCE", at_once)
        monkeypatch.setattr("topd.engines.draws.TABLE", table)
        noise = Noise([5, 6, 7], 10, 11, CPU, greedy=False)
        assert torch.equal(noise.at(*place, 9), expected)


def test_rounding_the_logits_to_bfloat16_moves_few_tokens():
    """Nearly flat over a large vocabulary, where a cumulative sum moves every token."""
    torch.manual_seed(0)
    logits = torch.randn(200, 32_768) * 0.02
    near = logits + torch.randn_like(logits) * 1e-4  # of the size of bfloat16's last bit there
    found = Noise(range(200), 1, 32_768, CPU, greedy=False).at(torch.arange(200), 0, 0)
    tokens = [draw(x, found, Sampling())[0] for x in (logits, near)]
    assert (tokens[0] == tokens[1]).float().mean() > 0.99


@pytest.fixture(params=[False, True])
def algorithms(request) -> Iterator[bool]:
    """Whether they are to be deterministic, as under ``full_determinism``."""
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.set_deterministic_debug_mode(before)


def test_the_race_draws_what_gumbel_max_draws(algorithms, monkeypatch):
    """With G = -log E, in float64; and tells the log-prob before top-k and top-p."""
    torch.manual_seed(0)
    if algorithms:  # on a GPU torch then refuses to sum floats one after another
        monkeypatch.setattr("topd.engines.draws.TopPLogitsWarper", None)
    logits, found = torch.randn(300, 1000) * 3, numbers(list(range(300)), 1, 1000)[:, 0]
    for sampling in (Sampling(), Sampling(0.6), Sampling(top_k=20), Sampling(top_p=0.8)):
        token, logprob = draw(logits, found, sampling)
        known = (logits.double() / sampling.temperature).log_softmax(-1)
        assert logprob.tolist() == pytest.approx(known[range(300), token].tolist(), abs=2e-5)
        rank, mass = (known[:, :, None] < known[:, None]).sum(-1), known.exp().sort(-1, True)
        short = (mass.values.cumsum(-1) - mass.values).gather(-1, rank) >= sampling.top_p
        cut = short | (rank >= (sampling.top_k or 1000))
        perturbed = (known - found.double().log()).masked_fill(cut, -torch.inf)
        assert token.tolist() == perturbed.argmax(-1).tolist()


def test_greedy_draws_read_no_numbers():
    noise = Noise([1, 2], 3, 4, CPU, greedy=True)
    assert noise.at(torch.arange(2), 0, 0) is None
    token, logprob = draw(torch.eye(4)[:2] * 3, None, Sampling(temperature=0.0))
    assert token.tolist() == [0, 1]
    assert logprob.tolist() == pytest.approx([3 - np.log(3 + np.exp(3))] * 2, abs=1e-6)
