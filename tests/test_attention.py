"""Attention of one token over its row, in torch and as a kernel, against float64 row by row.

The kernel runs on a GPU, or with ``TRITON_INTERPRET=1`` on a CPU; elsewhere it is skipped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import DEVICE
from topd.engines.graphs import attention
from topd.engines.graphs.attention import Prefixes

HEADS, GROUPS, WIDTH = 6, 3, 24
LENGTH, TEXTS = 100, (150, 3, 70)  # of a row's own entries, and of what is shared
# of each row its text, how much of it is the row's, and how many entries of its own follow
ROWS = [(0, 150, 0), (0, 149, 1), (0, 1, 64), (1, 3, 65), (2, 70, 99), (2, 64, 20), (0, 0, 7)]


def attends(name: str) -> Callable[..., Tensor]:
    if name == "torch":
        return attention._plain
    kernel = pytest.importorskip(
        "topd.engines.graphs.decode_kernel", reason="the kernel needs Triton"
    )
    if not kernel.serves(torch.empty(0, device=DEVICE)):
        pytest.skip("the kernel needs a GPU, or TRITON_INTERPRET=1")
    return kernel.attend


def made(*sizes: int, seed: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def by_hand(query: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Attention [H D] of one query [H D] over a row's whole keys and values [n G D]."""
    seen = slice(max(0, len(keys) - window) if window else 0, None)
    found = []
    for head, one in enumerate(query.double()):
        key, value = (x[seen, head // (HEADS // GROUPS)].double() for x in (keys, values))
        found.append((key @ one * 0.3).softmax(0) @ value)
    return torch.stack(found)


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("continuing", [False, True])
@pytest.mark.parametrize("name", ["torch", "kernel"])
def test_attention_over_a_prefix_and_own_entries_is_that_over_the_whole_row(
    name, continuing, window
):
    """Blocks begin, end and are passed over anywhere; what is beyond a row's entries is huge."""
    attend = attends(name)
    text, known, own = torch.tensor(ROWS, device=DEVICE).T.contiguous()
    first = torch.tensor([0, TEXTS[0], TEXTS[0] + TEXTS[1]], device=DEVICE)[text]
    known = known if continuing else known * 0
    query, new = (
        made(len(ROWS), HEADS, 1, WIDTH, seed=0),
        made(2, len(ROWS), GROUPS, 1, WIDTH, seed=1),
    )
    shared = made(2, sum(TEXTS), GROUPS, WIDTH, seed=2)
    cache = made(2, len(ROWS), GROUPS, LENGTH, WIDTH, seed=3)
    for row, after in enumerate(own.tolist()):
        cache[:, row, :, after:] = 1e4
    options: dict[str, Any] = {"scale": 0.3, "window": window}
    if continuing:
        options["prefixes"] = Prefixes(shared[0], shared[1], first, known)
    before = cache.clone()
    found = attend(query, (new[0], new[1]), (cache[0], cache[1]), known + own, **options)
    assert found.shape == (len(ROWS), 1, HEADS, WIDTH)
    for row in range(len(ROWS)):
        begin, have, after = int(first[row]), int(known[row]), int(own[row])
        parts = shared[:, begin : begin + have], before[:, row, :, :after].transpose(1, 2)
        keys, values = torch.cat([*parts, new[:, row].transpose(1, 2)], 1)
        expected = by_hand(query[row, :, 0], keys, values, window)
        torch.testing.assert_close(found[row, 0].double(), expected, atol=2e-5, rtol=2e-5)
        assert (cache[:, row, :, after] == new[:, row, :, 0]).all()
        before[:, row, :, after] = new[:, row, :, 0]
    assert (cache == before).all()  # and nothing else was written


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("continuing", [False, True])
def test_a_kernel_that_is_off_is_not_used(monkeypatch, windowed, continuing):
    """With what is shared, and without: each is tried by itself."""
    kernel = pytest.importorskip(
        "topd.engines.graphs.decode_kernel", reason="the kernel needs Triton"
    )
    if not kernel.serves(torch.empty(0, device=DEVICE)):
        pytest.skip("the kernel needs a GPU, or TRITON_INTERPRET=1")
    shape, right = (HEADS, GROUPS, 16), kernel.attend
    tried = attention._tried.__wrapped__
    how = shape, torch.float32, torch.float32, DEVICE, windowed, continuing
    assert tried(*how) is kernel

    def wrong(*args, prefixes=None, **options):
        if prefixes is not None:
            prefixes = prefixes._replace(first=prefixes.first.clamp(max=0))
        return right(*args, prefixes=prefixes, **options)

    monkeypatch.setattr(kernel, "attend", wrong)
    assert (tried(*how) is None) is continuing


def kernels_module(monkeypatch: pytest.MonkeyPatch, attend: Callable[..., Tensor]) -> object:
    """In the place of the kernel's, which there is nowhere without Triton."""
    module = SimpleNamespace(serves=lambda _: True, attend=attend)
    monkeypatch.setattr("topd.engines.graphs.decode_kernel", module, raising=False)
    monkeypatch.setitem(sys.modules, "topd.engines.graphs.decode_kernel", module)
    return module


def test_a_kernel_that_gives_nan_is_not_used(monkeypatch, caplog):
    kernels_module(
        monkeypatch, lambda *given, **_: attention._plain(*given, scale=torch.nan, window=None)
    )
    how = (HEADS, GROUPS, 16), torch.float32, torch.float32, DEVICE, False, False
    assert attention._tried.__wrapped__(*how) is None
    assert "off by nan" in caplog.text


@pytest.mark.parametrize("continuing", [False, True])
def test_a_right_kernel_is_used_where_float32_has_few_digits(monkeypatch, continuing):
    """TF32 is a setting of torch's products; a kernel in their place has all digits."""
    right, product, attends = attention._plain, torch.einsum, torch.nn.functional

    def coarse(x: Any) -> Any:
        return x.bfloat16().float() if getattr(x, "dtype", None) == torch.float32 else x

    def products(how: str, *given: Tensor) -> Tensor:
        return product(how, *map(coarse, given))

    def attention_by(*given: Tensor, **options: Any) -> Tensor:
        return whole(*map(coarse, given), **options)

    def kernel(query: Tensor, *given: Any, **options: Any) -> Tensor:
        with pytest.MonkeyPatch.context() as exact:
            exact.setattr(torch, "einsum", product)
            exact.setattr(attends, "scaled_dot_product_attention", whole)
            return right(query, *given, **options)

    whole = attends.scaled_dot_product_attention
    module = kernels_module(monkeypatch, kernel)
    monkeypatch.setattr(torch, "einsum", products)
    monkeypatch.setattr(attends, "scaled_dot_product_attention", attention_by)
    how = (HEADS, GROUPS, 16), torch.float32, torch.float32, DEVICE, False, continuing
    assert attention._tried.__wrapped__(*how) is module
