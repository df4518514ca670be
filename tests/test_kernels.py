"""The loss's Triton kernels against the eager path in float64: on a GPU, or interpreted.

With ``TRITON_INTERPRET=1`` they run on a CPU, slowly; without Triton there is nothing to test.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from topd.losses import Upstream, chunked
from topd.losses.terms import LEAST, Task
from topd.types import Head

pytest.importorskip("triton", reason="the kernels need Triton")
from triton.errors import TritonError

kernels = chunked.kernels
if not (torch.cuda.is_available() or kernels.INTERPRETED):
    pytest.skip("the kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
P = 5
KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.1), ("jsd", 0.9)]

kinds = pytest.mark.parametrize(("kind", "beta"), KINDS)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What the kernels did: proof that they were asked."""
    made: list[str] = []
    block = kernels.block
    monkeypatch.setattr(kernels, "block", lambda *a: (made.append("block"), block(*a))[1])
    monkeypatch.setattr(chunked, "_tried", lambda *_: True)
    return made


@pytest.fixture(autouse=True)
def narrow(monkeypatch) -> None:
    """Blocks of few columns, so that a small vocabulary fills several and part of one."""
    monkeypatch.setattr(kernels, "READ_BLOCK", 32)
    monkeypatch.setattr(kernels, "WRITE_BLOCK", 16)


def case(vocab: int, targets: int, seed: int = 0, offset: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, theirs = normal(vocab, 4), 2 * normal(vocab, 3)
    states, others = normal(P, 4), normal(P, 3)
    theirs[:, 0], others[:, 0] = 1.0, others[:, 0] + offset  # the same to all of a row's logits
    tokens = torch.randint(vocab, (P,), generator=generator)
    places = torch.randint(vocab, (P, targets), generator=generator)
    if targets > 1:
        places[:, 1] = tokens  # and a token that is its own target
    factors = normal(P), normal(P), normal(P, targets)
    return dict(
        zip(
            ("states", "weight", "others", "theirs", "tokens", "places", "d", "own", "targets"),
            (states, weight, others, theirs, tokens, places, *factors),
            strict=True,
        )
    )


def both(
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    barred: Tensor | None = None,
    curves: tuple[Any, ...] = (1.0, None, 1.0, None),
    without: tuple[str, ...] = (),
    **options: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """Values and gradients in ``dtype`` by the kernels, and of the same numbers in float64."""
    exact = {k: x.to(dtype).double() if x.is_floating_point() else x for k, x in given.items()}
    pairs = []
    for way, kind in ((kernels, dtype), (None, torch.float64)):
        x = {k: (v.to(kind) if v.is_floating_point() else v).to(DEVICE) for k, v in exact.items()}
        bars = None if barred is None else barred.to(DEVICE)
        student = Head(x["weight"], None, *curves[:2], barred=bars)
        teacher = Head(x["theirs"], None, *curves[2:], barred=bars)
        wide = torch.promote_types(kind, torch.float32)
        factors = {k: None if k in without else exact[k].to(DEVICE, wide) for k in FACTORS}
        task = Task(
            student, teacher, x["others"], x["tokens"], x["places"], chunk_tokens=3, **options
        )
        monkeypatch.setattr(chunked, "kernels", way)
        upstream = Upstream(*factors.values())
        args = x["states"], x["weight"], None, task, upstream, (True, True, False)
        values, gradients = chunked._compute(*args)
        pairs.append([*values, *gradients[:2]])
    return pairs[0], pairs[1]


FACTORS = ("d", "own", "targets")


def same(found: list[Tensor], exact: list[Tensor], rtol: float = 1e-5) -> None:
    """Equal up to ``rtol`` of the largest entry of each."""
    for one, other in zip(found, exact, strict=True):
        if one.numel():
            atol = rtol * max(1.0, float(other.abs().max()))
            torch.testing.assert_close(one.double(), other, rtol=0, atol=atol)


@kinds
@pytest.mark.parametrize("targets", [0, 1, 3])
def test_values_and_gradients_are_those_of_float64(kind, beta, targets, monkeypatch, calls):
    """Of a vocabulary that ends within a block; a target may be the token itself."""
    options = {"kind": kind, "beta": beta, "temperature": 0.6}
    same(*both(monkeypatch, case(83, targets), **options))
    assert len(calls) == 2  # chunks of 3 and 2 tokens


@kinds
@pytest.mark.parametrize(
    "curves", [(0.25, None, 0.5, None), (1.0, 2.0, 1.0, None), (0.5, 1.5, 1.3, 3.0)]
)
def test_scale_softcap_and_barred_rows(kind, beta, curves, monkeypatch, calls):
    barred = torch.zeros(83, dtype=torch.bool)
    barred[[0, 7]] = barred[32:64] = barred[80:] = True  # a whole block of the read among them
    given = case(83, 2)
    for name in ("tokens", "places"):
        given[name] = given[name] % 24 + 8
    options = {"kind": kind, "beta": beta, "temperature": 1.7, "curves": curves, "barred": barred}
    found, exact = both(monkeypatch, given, **options)
    same(found, exact)
    assert (found[-1][barred.to(DEVICE)] == 0).all()
    assert calls


def test_the_logprob_of_a_barred_token_is_as_on_the_eager_path(monkeypatch):
    given, barred = case(40, 1), torch.zeros(40, dtype=torch.bool)
    given["tokens"], barred[7] = torch.full_like(given["tokens"], 7), True
    given["own"] = torch.zeros_like(given["own"])
    options = {"kind": "reverse_kl", "beta": 0.5, "temperature": 1.0, "barred": barred}
    found, exact = both(monkeypatch, given, **options)
    assert (found[2] == LEAST).all()
    assert (exact[2] == LEAST).all()


@pytest.mark.parametrize("without", [("d",), ("own", "targets"), ("own",), ("targets",)])
def test_factors_that_are_not_there_are_zeros(without, monkeypatch):
    options = {"kind": "reverse_kl", "beta": 0.5, "temperature": 1.0, "without": without}
    same(*both(monkeypatch, case(40, 2), **options))


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_an_offset_between_the_models_logits_costs_no_digits(kind, monkeypatch):
    options = {"kind": kind, "beta": 0.5, "temperature": 1.0}
    plain = both(monkeypatch, case(83, 0), **options)[1][0]
    found, exact = both(monkeypatch, case(83, 0, offset=4096.0), **options)
    torch.testing.assert_close(exact[0], plain)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-3, atol=1e-3)


@kinds
def test_narrow_logits_are_read_in_float32(kind, beta, monkeypatch):
    """What is rounded are logits and slope, as on the eager path: the gaps are of its size."""
    options = {"kind": kind, "beta": beta, "temperature": 1.0}
    found, exact = both(monkeypatch, case(83, 2), dtype=torch.bfloat16, **options)
    monkeypatch.setattr(kernels, "serves", lambda *_: False)
    eager, _ = both(monkeypatch, case(83, 2), dtype=torch.bfloat16, **options)
    assert found[0].dtype == torch.float32
    for one, same_eager, other in zip(found, eager, exact, strict=True):
        gap = (one.double() - other).abs().max()
        assert gap <= 2 * (same_eager.double() - other).abs().max() + 1e-6


def test_what_the_kernels_do_not_do_takes_the_eager_path(calls):
    h, w = torch.randn(2, 4), torch.randn(7, 4)
    none = torch.zeros(2, 0, dtype=torch.long, device=DEVICE)
    for dtype, bias, asked in (
        (torch.float32, None, True),
        (torch.float32, torch.zeros(7), False),
        (torch.float64, None, False),
    ):
        bias = None if bias is None else bias.to(DEVICE, dtype)
        head, states = Head(w.to(DEVICE, dtype), bias), h.to(DEVICE, dtype)
        task = Task(
            head, head, states, none.new_zeros(2), none, "reverse_kl", 0.5, 1.0, chunk_tokens=2
        )
        calls.clear()
        terms = chunked.head_terms(states, task)
        assert bool(calls) is asked
        torch.testing.assert_close(terms.divergence, torch.zeros_like(terms.divergence))


CURVES = ((1.0, None), (0.5, 3.0))


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_tried_before_they_are_used(kind, dtype):
    chunked._tried.cache_clear()
    assert chunked._tried(DEVICE, dtype, kind, 0.7, CURVES)


def failing(*_: object) -> None:
    raise TritonError("no compiler")


def wrong(logits: Tensor, *_: object) -> None:
    logits.zero_()


@pytest.mark.parametrize(("block", "why"), [(failing, "no compiler"), (wrong, "they are off by")])
def test_where_they_fail_or_are_wrong_the_eager_path_is_taken(block, why, monkeypatch, caplog):
    chunked._tried.cache_clear()
    monkeypatch.setattr(kernels, "block", block)
    same(*both(monkeypatch, case(83, 2), kind="reverse_kl", beta=0.5, temperature=1.0))
    assert why in caplog.text
    chunked._tried.cache_clear()
