"""Divergences and the trajectory loss, against numbers by hand and a float64 reference."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import DEVICE
from conftest import torch_on_device as torch
from topd.errors import TOPDError
from topd.losses import (
    TokenTerms,
    Upstream,
    chunked,
    importance,
    linear_logprobs,
    linear_token_divergence,
    linear_token_statistics,
    linear_token_terms,
    sampled_divergence,
    soft_target_kl,
    token_divergence,
    topk_divergence,
    trajectory_loss,
)
from topd.types import Head

KINDS = [
    ("reverse_kl", 0.5),
    ("forward_kl", 0.5),
    ("jsd", 0.1),
    ("jsd", 0.5),
    ("jsd", 0.9),
]
kinds = pytest.mark.parametrize(("kind", "beta"), KINDS)
untyped = pytest.mark.skipif(
    "config.getoption('jaxtyping_packages', None)", reason="--jaxtyping-packages objects first"
)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def reference(student, teacher, kind: str, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """The divergence in Python floats, one token at a time."""
    values = []
    width = student.shape[-1]
    for s, t in zip(student.reshape(-1, width), teacher.reshape(-1, width), strict=True):
        p = softmax(s.detach().double().cpu().numpy() / temperature)
        q = softmax(t.detach().double().cpu().numpy() / temperature)
        m = (1 - beta) * p + beta * q
        values.append(
            {
                "reverse_kl": lambda p=p, q=q: kl(p, q),
                "forward_kl": lambda p=p, q=q: kl(q, p),
                "jsd": lambda p=p, q=q, m=m: beta * kl(q, m) + (1 - beta) * kl(p, m),
            }[kind]()
        )
    return torch.tensor(values, dtype=torch.float64).reshape(student.shape[:-1])


def pair(*shape: int, seed: int = 0, grad: bool = False, scale: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_(grad)
        for _ in range(2)
    ]


def gradients(value: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Gradients of a weighted sum, so that every token's gradient counts differently."""
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    return list(torch.autograd.grad((value * weights).sum(), inputs, retain_graph=True))


def logs(*probabilities: float, grad: bool = False) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log().requires_grad_(grad)


# ---- token_divergence -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "beta", "expected"),
    [
        ("reverse_kl", 0.5, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        ("forward_kl", 0.5, 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)),
        # m = (3/8, 5/8)
        (
            "jsd",
            0.5,
            0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5))
            + 0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)),
        ),
        # m = 1/5 (1/4, 3/4) + 4/5 (1/2, 1/2) = (9/20, 11/20)
        (
            "jsd",
            0.2,
            0.2 * (0.25 * math.log(5 / 9) + 0.75 * math.log(15 / 11))
            + 0.8 * (0.5 * math.log(10 / 9) + 0.5 * math.log(10 / 11)),
        ),
    ],
)
def test_divergence_of_two_tokens_by_hand(kind, beta, expected):
    found = token_divergence(logs(0.5, 0.5), logs(0.25, 0.75), kind=kind, beta=beta)
    assert found.item() == pytest.approx(expected, abs=1e-14)


@kinds
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_divergence_equals_the_reference(kind, beta, temperature):
    student, teacher = pair(2, 5, 17)
    found = token_divergence(student, teacher, kind=kind, beta=beta, temperature=temperature)
    expected = reference(student, teacher, kind, beta, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@kinds
def test_divergence_gradcheck(kind, beta):
    student, teacher = pair(3, 6, grad=True)
    assert torch.autograd.gradcheck(
        lambda s, t: token_divergence(s, t, kind=kind, beta=beta, temperature=0.8),
        (student, teacher),
    )


def test_reverse_kl_is_the_default():
    student, teacher = pair(4, 7)
    assert torch.equal(
        token_divergence(student, teacher), token_divergence(student, teacher, kind="reverse_kl")
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jsd_swaps_its_arguments_with_beta(beta):
    student, teacher = pair(4, 9)
    torch.testing.assert_close(
        token_divergence(student, teacher, kind="jsd", beta=beta),
        token_divergence(teacher, student, kind="jsd", beta=1 - beta),
    )


@pytest.mark.parametrize(
    ("beta", "scale", "limit"),
    [(1e-7, 1e-7, "forward_kl"), (1 - 1e-7, 1e-7, "reverse_kl")],
)
def test_jsd_scaled_tends_to_a_kl_at_either_end(beta, scale, limit):
    student, teacher = pair(4, 9, scale=1.0)
    jsd = token_divergence(student, teacher, kind="jsd", beta=beta) / scale
    expected = token_divergence(student, teacher, kind=limit)
    torch.testing.assert_close(jsd, expected, rtol=1e-4, atol=0)


@kinds
@settings(max_examples=30)
@given(st.data())
def test_divergence_is_never_negative_zero_at_equality_and_ignores_shift_and_order(
    kind, beta, data
):
    logits = st.lists(st.floats(-20, 20), min_size=5, max_size=5)
    student, teacher = (torch.tensor([data.draw(logits)], dtype=torch.float64) for _ in range(2))
    order = torch.tensor(data.draw(st.permutations(range(5))))
    value = token_divergence(student, teacher, kind=kind, beta=beta)
    moved = token_divergence(student[:, order] + 3.0, teacher[:, order] - 5.0, kind=kind, beta=beta)
    assert value.item() >= -1e-13
    assert value.item() == pytest.approx(moved.item(), abs=1e-10)
    assert abs(token_divergence(student, student, kind=kind, beta=beta).item()) < 1e-13


@kinds
def test_no_gradient_at_equality(kind, beta):
    student, _ = pair(3, 8, grad=True)
    value = token_divergence(student, student.detach().clone(), kind=kind, beta=beta)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.abs().max() < 1e-13


@kinds
def test_temperature_divides_both_logits(kind, beta):
    student, teacher = pair(4, 9)
    torch.testing.assert_close(
        token_divergence(student, teacher, kind=kind, beta=beta, temperature=2.5),
        token_divergence(student / 2.5, teacher / 2.5, kind=kind, beta=beta),
    )


@kinds
def test_a_token_impossible_for_both_is_as_if_it_were_not_there(kind, beta):
    # For "jsd" the trap is logaddexp(-inf, -inf), whose derivative is NaN.
    student, teacher = pair(2, 6, grad=True)
    hole = torch.tensor([False, False, True, False, False, True])
    holed = [x.detach().masked_fill(hole, -math.inf).requires_grad_() for x in (student, teacher)]
    short = [x.detach()[:, ~hole].requires_grad_() for x in (student, teacher)]
    value = token_divergence(*holed, kind=kind, beta=beta)
    expected = token_divergence(*short, kind=kind, beta=beta)
    torch.testing.assert_close(value, expected)
    for found, right in zip(gradients(value, *holed), gradients(expected, *short), strict=True):
        torch.testing.assert_close(found[:, ~hole], right)
        assert (found[:, hole] == 0).all()


@pytest.mark.parametrize(
    ("kind", "beta", "barred"),
    [
        ("reverse_kl", 0.5, "student"),
        ("forward_kl", 0.5, "teacher"),
        ("jsd", 0.3, "student"),
        ("jsd", 0.3, "teacher"),
    ],
)
def test_a_token_impossible_for_one_gives_a_finite_value_and_gradient(kind, beta, barred):
    inputs = dict(zip(("student", "teacher"), pair(2, 5), strict=True))
    inputs[barred][:, 1] = -math.inf
    student, teacher = (x.requires_grad_() for x in inputs.values())
    value = token_divergence(student, teacher, kind=kind, beta=beta)
    torch.testing.assert_close(value, reference(student, teacher, kind, beta))
    for gradient in gradients(value, student, teacher):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_jsd_of_disjoint_distributions_is_the_entropy_of_beta(beta):
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    found = token_divergence(logs(1, 0), logs(0, 1), kind="jsd", beta=beta)
    assert found.item() == pytest.approx(entropy)


@pytest.mark.parametrize(("least", "bars"), [(-1e4, False), (-1e5, True), (-math.inf, True)])
def test_a_bias_bars_a_token_where_it_is_minus_infinity_in_some_precision(least, bars):
    weight = torch.zeros(3, 2)
    assert Head(weight, torch.tensor([0.0, least, 1.0])).bars is bars
    assert Head(weight, None, barred=torch.tensor([False, True, False])).bars
    assert not Head(weight).bars


def test_reverse_kl_is_infinite_where_the_student_says_the_impossible():
    assert token_divergence(logs(0.5, 0.5), logs(1, 0)).item() == math.inf


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("form", ["whole", "topk"])
def test_a_token_of_factor_0_leaves_no_nan_where_its_divergence_is_infinite(kind, form):
    """Masked or multiplied by 0, it has no part in the gradient; 0 inf would be NaN."""
    inputs = dict(zip(("teacher", "student"), pair(2, 6), strict=True))
    inputs["teacher" if kind == "reverse_kl" else "student"][1, [2, 3]] = -math.inf

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        if form == "whole":
            return token_divergence(student, teacher, kind=kind)
        tokens = torch.tensor([[1, 2, 3]]).expand(len(student), 3)
        logprobs = teacher.log_softmax(-1).gather(-1, tokens)
        return topk_divergence(student, logprobs, tokens, kind=kind)

    teacher, student = (x.requires_grad_() for x in inputs.values())
    value = divergence(student, teacher)
    assert value.isinf().tolist() == [False, True]
    masked = value.masked_fill(torch.tensor([False, True]), 0.0)
    times = torch.tensor([1.0, 0.0], dtype=value.dtype)
    alone = torch.autograd.grad(divergence(student[:1], teacher[:1]).sum(), (student, teacher))
    for one, factor in ((masked, torch.ones_like(times)), (value, times)):
        found = torch.autograd.grad(one, (student, teacher), factor, retain_graph=True)
        torch.testing.assert_close(found, alone)
    (steep,) = torch.autograd.grad(value[1], student)  # where it counts, it is not overlooked
    assert not steep.isnan().any()
    assert steep.abs().max() > (1e20 if kind == "reverse_kl" else 0)


@kinds
def test_bfloat16_logits_are_read_in_float32(kind, beta):
    student, teacher = (x.bfloat16() for x in pair(3, 50))
    found = token_divergence(student, teacher, kind=kind, beta=beta)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference(student, teacher, kind, beta).float())


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_divergence_keeps_every_leading_axis(shape):
    student, teacher = pair(*shape)
    found = token_divergence(student, teacher)
    assert found.shape == shape[:-1]
    torch.testing.assert_close(found, reference(student, teacher, "reverse_kl"))


OUTSIDE = "is outside (0, 1): use forward_kl for 0, reverse_kl for 1."


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(
            {"kind": "kl"},
            "kind 'kl' is not one of reverse_kl, forward_kl, jsd.",
            marks=untyped,
        ),
        ({"kind": "jsd", "beta": 0.0}, f"beta = 0.0 {OUTSIDE}"),
        ({"kind": "jsd", "beta": 1.0}, f"beta = 1.0 {OUTSIDE}"),
        ({"kind": "jsd", "beta": math.nan}, f"beta = nan {OUTSIDE}"),
        ({"temperature": 0.0}, "temperature = 0.0 must be above 0."),
        ({"temperature": -1.0}, "temperature = -1.0 must be above 0."),
        ({"temperature": math.nan}, "temperature = nan must be above 0."),
    ],
)
def test_options_out_of_range_are_errors_everywhere(options, words):
    student, teacher = pair(2, 4)
    hidden, weight = torch.ones(2, 3), torch.ones(4, 3)
    tokens = torch.zeros(2, 1, dtype=torch.long)
    words = f"^{re.escape(words)}$"
    with pytest.raises(TOPDError, match=words):
        token_divergence(student, teacher, **options)
    with pytest.raises(TOPDError, match=words):
        topk_divergence(student, teacher[:, :1], tokens, **options)
    with pytest.raises(TOPDError, match=words):
        linear_token_divergence(hidden, weight, hidden, weight, **options)


@untyped
def test_different_vocabularies_are_an_error_that_says_the_remedy():
    with pytest.raises(TOPDError) as caught:
        token_divergence(torch.zeros(2, 4), torch.zeros(2, 5))
    assert str(caught.value) == (
        "token_divergence: student logits (2, 4) and teacher logits (2, 5) differ in shape. Slice "
        "padded vocabulary rows first."
    )


# ---- sampled_divergence -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_expectation_of_the_sampled_divergence_is_the_reverse_kl(kind):
    student, teacher = pair(4, 11)
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    assert torch.equal(sampled_divergence(log_s, log_t), log_s - log_t)  # k1
    mean = (log_s.exp() * sampled_divergence(log_s, log_t, kind=kind)).sum(-1)
    torch.testing.assert_close(mean, token_divergence(student, teacher))


def test_sampled_divergence_by_hand():
    log_s, log_t = logs(0.5, 0.2), logs(0.25, 0.4)
    k1, k3 = (sampled_divergence(log_s, log_t, kind=kind) for kind in ("k1", "k3"))
    assert k1[0].tolist() == pytest.approx([math.log(2), -math.log(2)])
    assert k3[0].tolist() == pytest.approx([0.5 - 1 + math.log(2), 2 - 1 - math.log(2)])


@given(st.floats(-30, 0), st.floats(-30, 0))
def test_k3_is_never_negative(log_s, log_t):
    found = sampled_divergence(torch.tensor([log_s]), torch.tensor([log_t]), kind="k3")
    assert found.item() >= 0


@pytest.mark.parametrize("student", [-math.inf, -200.0])
def test_a_ratio_beyond_every_float_leaves_no_nan_at_a_token_of_factor_0(student):
    log_s = torch.tensor([-1.0, student], requires_grad=True)
    value = sampled_divergence(log_s, torch.tensor([-2.0, -1.0]), kind="k3")
    assert value.tolist() == [pytest.approx(math.exp(-1)), math.inf]
    (gradient,) = torch.autograd.grad(value, log_s, torch.tensor([1.0, 0.0]))
    assert gradient.tolist() == pytest.approx([1 - math.exp(-1), 0.0])


@untyped
def test_values_a_token_are_never_stretched():
    """[T] and [T 1] made [T T], and the mean of that was taken for a loss."""
    line, column, table = torch.zeros(3), torch.zeros(3, 1), torch.zeros(2, 3, 4)
    tokens = torch.arange(4).expand(1, 3, 4)
    for call in (
        lambda: sampled_divergence(line, column),
        lambda: importance(line, column, 2.0),
        lambda: soft_target_kl(table, table[:1]),
        lambda: trajectory_loss(table, table[:1], torch.ones(2, 3)),
        lambda: topk_divergence(table, table[:1], tokens),  # the second row was left out
        lambda: topk_divergence(table, table[..., :2], tokens.expand(2, 3, 4)),
    ):
        with pytest.raises(TOPDError, match=r"^tokens: the tensors are of .* Give the same"):
            call()


@untyped
def test_unknown_sampled_divergence_is_an_error():
    with pytest.raises(TOPDError, match=r"^sampled_divergence: kind 'k2' is not one of k1, k3\.$"):
        sampled_divergence(torch.zeros(1), torch.zeros(1), kind="k2")


# ---- topk_divergence --------------------------------------------------------------------------


def top_of(teacher: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    found = (teacher / temperature).log_softmax(-1).topk(k)
    return found.values, found.indices


@kinds
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_topk_of_all_but_one_token_is_the_full_divergence(kind, beta, temperature):
    student, teacher = pair(2, 3, 9, grad=True)
    options = {"kind": kind, "beta": beta, "temperature": temperature}
    full = token_divergence(student, teacher.detach(), **options)
    found = topk_divergence(student, *top_of(teacher.detach(), 8, temperature), **options)
    torch.testing.assert_close(found, full, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients(found, student), gradients(full, student))


@kinds
def test_topk_rises_with_k_to_the_full_divergence(kind, beta):
    student, teacher = pair(6, 10)
    levels = [
        topk_divergence(student, *top_of(teacher, k), kind=kind, beta=beta) for k in range(1, 10)
    ]
    for lower, higher in itertools.pairwise(levels):
        assert (lower <= higher + 1e-12).all()
    assert (levels[-1] <= token_divergence(student, teacher, kind=kind, beta=beta) + 1e-12).all()
    assert (levels[0] < levels[-1]).all()


@kinds
def test_topk_of_narrow_logprobs_is_computed_as_widely_as_the_students(kind, beta):
    student, teacher = pair(3, 9)
    logprobs, tokens = top_of(teacher, 4)
    found = topk_divergence(student, logprobs.bfloat16(), tokens, kind=kind, beta=beta)
    wide = topk_divergence(student, logprobs.bfloat16().double(), tokens, kind=kind, beta=beta)
    assert torch.equal(found, wide)


@kinds
def test_topk_of_the_whole_vocabulary_is_still_a_lower_bound(kind, beta):
    # There is no tail then: one held above 0 for the teacher alone would cost "forward_kl" inf.
    student, teacher = pair(2, 3, 6)
    found = topk_divergence(student, *top_of(teacher, 6), kind=kind, beta=beta)
    full = token_divergence(student, teacher, kind=kind, beta=beta)
    torch.testing.assert_close(found, full)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "reverse_kl",
            0.1 * math.log(0.1 / 0.4) + 0.2 * math.log(0.2 / 0.3) + 0.7 * math.log(0.7 / 0.3),
        ),
        (
            "forward_kl",
            0.4 * math.log(0.4 / 0.1) + 0.3 * math.log(0.3 / 0.2) + 0.3 * math.log(0.3 / 0.7),
        ),
    ],
)
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_topk_tail_bucket_by_hand(kind, expected, order):
    student, teacher = logs(0.1, 0.2, 0.3, 0.4), logs(0.4, 0.3, 0.2, 0.1)
    tokens = torch.tensor([order])
    found = topk_divergence(student, teacher.gather(-1, tokens), tokens, kind=kind)
    assert found.item() == pytest.approx(expected, abs=1e-13)


@kinds
def test_topk_gradcheck(kind, beta):
    student, teacher = pair(3, 7, grad=True)
    logprobs, tokens = top_of(teacher.detach(), 3)
    assert torch.autograd.gradcheck(
        lambda s, t: topk_divergence(s, t, tokens, kind=kind, beta=beta), (student, logprobs)
    )


@kinds
def test_topk_has_a_gradient_where_the_student_has_no_tail(kind, beta):
    """The logsumexp of no token has none; the student is then on its two tokens alone."""
    student, teacher = pair(3, 5, grad=True)
    tokens = torch.tensor([[0, 2]]).expand(3, 2)
    logprobs = teacher.detach().log_softmax(-1).gather(-1, tokens)
    holed = student.detach().clone()
    holed[1, [1, 3, 4]] = -math.inf
    value = topk_divergence(holed.requires_grad_(), logprobs, tokens, kind=kind, beta=beta)
    (gradient,) = torch.autograd.grad(value.sum(), holed)
    assert gradient.isfinite().all()
    assert (gradient[1, [0, 2]].abs() > 1e-6).all()


def test_topk_never_rewards_leaving_the_support():
    """The further the student's mass exceeds the teacher's tail of 0.2, the higher the loss."""
    teacher, tokens = logs(0.5, 0.3), torch.tensor([[0, 1]])
    outside = [0.2, 0.4, 0.6, 0.8, 0.99, 0.999999]
    values = [
        topk_divergence(
            logs(0.625 * (1 - x), 0.375 * (1 - x), x / 2, x / 2), teacher, tokens
        ).item()
        for x in outside
    ]
    assert values[0] == pytest.approx(0, abs=1e-9)
    assert values == sorted(values)
    assert values[-1] == pytest.approx(math.log(1 / 0.2), abs=1e-4)


@kinds
def test_topk_survives_a_teacher_whose_rounded_mass_exceeds_one(kind, beta):
    teacher = torch.tensor([[0.7, 0.3 + 2e-7]]).log()
    student = torch.zeros(1, 4, requires_grad=True)
    value = topk_divergence(student, teacher, torch.tensor([[0, 1]]), kind=kind, beta=beta)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


# ---- linear_token_divergence ------------------------------------------------------------------

P, V = 7, 13


def linear_case(*, student_pad: int = 0, teacher_pad: int = 0, bias: bool = True):
    """Hidden states of widths 5 and 4 and heads of V tokens and some padding, in float64."""
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    rows = V + student_pad
    student = leaf(P, 5), Head(leaf(rows, 5), leaf(rows) if bias else None)
    teacher = leaf(P, 4), Head(leaf(V + teacher_pad, 4))
    return *student, *teacher


def naive_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = hidden @ head.weight[:V].T
    if head.bias is not None:
        logits = logits + head.bias[:V]
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


def leaves(*things: Tensor | Head) -> list[Tensor]:
    parts = [[x] if isinstance(x, Tensor) else [x.weight, x.bias] for x in things]
    return [x for part in parts for x in part if x is not None]


def assert_same(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients(found, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(one, other)


@kinds
@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_linear_divergence_has_the_value_and_gradients_of_the_full_path(kind, beta, chunk_tokens):
    case = linear_case()
    options = {"kind": kind, "beta": beta, "temperature": 1.3}
    found = linear_token_divergence(*case, **options, chunk_tokens=chunk_tokens)
    expected = token_divergence(naive_logits(*case[:2]), naive_logits(*case[2:]), **options)
    assert_same(found, expected, leaves(*case[:2]))


@pytest.mark.parametrize(("student_pad", "teacher_pad"), [(0, 4), (3, 0), (2, 5)])
def test_padded_vocabulary_rows_are_ignored(student_pad, teacher_pad):
    """Padding on both sides at once is cut to the shorter table, as V is then not known here."""
    case = linear_case(student_pad=student_pad, teacher_pad=teacher_pad)
    both = min(student_pad, teacher_pad)
    case = (case[0], case[1].narrowed(V + student_pad - both), case[2], case[3])
    found = linear_token_divergence(*case, chunk_tokens=3)
    expected = token_divergence(naive_logits(*case[:2]), naive_logits(*case[2:]))
    torch.testing.assert_close(found, expected)


def test_padded_rows_of_the_student_get_no_gradient():
    case = linear_case(student_pad=3)
    found = linear_token_divergence(*case, chunk_tokens=3)
    weight, bias = gradients(found, case[1].weight, case[1].bias)
    assert (weight[V:] == 0).all()
    assert (bias[V:] == 0).all()
    assert (weight[:V] != 0).all()


@pytest.mark.parametrize(("scale", "softcap"), [(0.25, None), (1.0, 2.0), (0.5, 1.5)])
def test_scale_and_softcap_of_the_heads(scale, softcap):
    h, s, g, t = linear_case()
    case = (h, Head(s.weight, s.bias, scale, softcap), g, Head(t.weight, None, 2 * scale, softcap))
    found = linear_token_divergence(*case, chunk_tokens=3)
    expected = token_divergence(naive_logits(*case[:2]), naive_logits(*case[2:]))
    assert_same(found, expected, leaves(*case[:2]))


def test_linear_divergence_gradcheck():
    h, s, g, t = linear_case()

    def value(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_token_divergence(hidden, Head(weight, bias), g[:3], t, chunk_tokens=2)

    assert torch.autograd.gradcheck(value, (h[:3], s.weight, s.bias))


def test_linear_divergence_keeps_leading_axes_and_takes_bare_weights():
    h, s, g, t = linear_case(bias=False)
    found = linear_token_divergence(h[:6].reshape(2, 3, 5), s.weight, g[:6].reshape(2, 3, 4), t)
    expected = token_divergence(naive_logits(h, s), naive_logits(g, t))[:6].reshape(2, 3)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(linear_token_divergence(h[0], s.weight, g[0], t), expected[0, 0])


@untyped
def test_tensors_of_other_tokens_are_an_error():
    h, s, g, t = linear_case()
    none = torch.zeros(P, 0, dtype=torch.long)
    wrong = "^tokens: the tensors are of .* tokens. Give the same in each.$"
    for states in (g[: P - 1], torch.cat([g, g])):
        with pytest.raises(TOPDError, match=wrong):
            linear_token_divergence(h, s, states, t)
        with pytest.raises(TOPDError, match=wrong):
            linear_token_terms(h, s, states, t, none.new_zeros(P), none)
        with pytest.raises(TOPDError, match=wrong):
            linear_token_statistics(h, s, states, t)
    with pytest.raises(TOPDError, match=wrong):
        linear_token_divergence(h[:6].reshape(2, 3, -1), s, g[:6].reshape(3, 2, -1), t)
    for tokens in (none.new_zeros(P - 1), none.new_zeros(P + 1)):
        with pytest.raises(TOPDError, match=wrong):
            linear_token_terms(h, s, g, t, tokens, none)
        with pytest.raises(TOPDError, match=wrong):
            linear_logprobs(h, s, tokens)


def test_linear_divergence_of_no_tokens_is_empty_and_differentiable():
    h, s, g, t = linear_case()
    found = linear_token_divergence(h[:0], s, g[:0], t)
    assert found.shape == (0,)
    (gradient,) = torch.autograd.grad(found.sum(), s.weight)
    assert (gradient == 0).all()


@pytest.mark.parametrize("chunk_tokens", [0, -1])
def test_chunks_of_no_tokens_are_an_error(chunk_tokens):
    h, s, g, t = linear_case()
    said = f"^chunk_tokens = {chunk_tokens} must be at least 1.$"
    with pytest.raises(TOPDError, match=said):
        linear_token_divergence(h, s, g, t, chunk_tokens=chunk_tokens)
    with pytest.raises(TOPDError, match=said):
        linear_logprobs(h, s, torch.zeros(P, dtype=torch.long), chunk_tokens=chunk_tokens)


# ---- linear_token_terms and linear_logprobs ---------------------------------------------------


def terms_and_full(chunk_tokens: int, temperature: float = 0.6):
    case = linear_case()
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(V, (P,), generator=generator)
    targets = torch.randint(V, (P, 3), generator=generator)
    terms = linear_token_terms(
        *case, tokens, targets, temperature=temperature, chunk_tokens=chunk_tokens
    )
    full = (naive_logits(*case[:2]) / temperature).log_softmax(-1)
    return case, tokens, targets, terms, full


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_terms_have_the_values_and_gradients_of_the_full_path(chunk_tokens):
    case, tokens, targets, terms, full = terms_and_full(chunk_tokens)
    student = leaves(*case[:2])
    expected = token_divergence(naive_logits(*case[:2]), naive_logits(*case[2:]), temperature=0.6)
    assert_same(terms.divergence, expected, student)
    assert_same(terms.logprob, full[torch.arange(P), tokens], student)
    rows = torch.arange(P)[:, None].expand(P, 3)
    assert_same(terms.target_logprobs, full[rows, targets], student)


def test_entropy_is_that_of_the_student_and_carries_no_gradient():
    _, _, _, terms, full = terms_and_full(3)
    p = full.detach().exp().cpu().numpy()
    expected = [-sum(x * math.log(x) for x in row) for row in p]
    assert terms.entropy.tolist() == pytest.approx(expected)
    assert not terms.entropy.requires_grad


def test_a_loss_of_all_terms_together_has_the_full_gradient():
    """One backward through the recomputed chunks, all outputs at once."""
    case, tokens, targets, terms, full = terms_and_full(3)
    divergence = token_divergence(
        naive_logits(*case[:2]), naive_logits(*case[2:]).detach(), temperature=0.6
    )
    rows = torch.arange(P)
    expected = divergence.sum() - 2 * full[rows, tokens].sum()
    expected = expected - 3 * full[rows[:, None], targets].sum()
    found = terms.divergence.sum() - 2 * terms.logprob.sum() - 3 * terms.target_logprobs.sum()
    assert_same(found, expected, leaves(*case[:2]))


def foreseen_case():
    """A head with everything (bias, padding, scale, soft-cap), tokens and soft targets."""
    h, s, g, t = linear_case(student_pad=3)
    case = h, Head(s.weight, s.bias, 0.5, 1.5), g, Head(t.weight, None, 1.3)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(V, (P,), generator=generator)
    targets = torch.randint(V, (P, 3), generator=generator)
    factors = Upstream(*(torch.randn(x, generator=generator) for x in ((P,), (P,), (P, 3))))
    return case, tokens, targets, Upstream(*(x.double() for x in factors[:3]))


def weighted(divergence: Tensor, logprob: Tensor, targets: Tensor, by: Upstream) -> Tensor:
    return (divergence * by[0]).sum() + (logprob * by[1]).sum() + (targets * by[2]).sum()


@pytest.fixture
def passes(monkeypatch) -> list[None]:
    """Grows by one whenever the chunks are computed."""
    made: list[None] = []
    compute = chunked._compute
    monkeypatch.setattr(chunked, "_compute", lambda *a: (made.append(None), compute(*a))[1])
    return made


@kinds
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("scale", "once"), [(1.0, True), (-3.0, True), ("a token", None)])
def test_a_gradient_is_right_whether_its_factors_were_foreseen_or_not(
    kind, beta, frozen, scale, once, passes
):
    """One number times what was foreseen needs no second pass; for a frozen head, one a token."""
    case, tokens, targets, foreseen = foreseen_case()
    options = {"kind": kind, "beta": beta, "temperature": 0.6}
    if frozen:
        head = case[1]
        weight, bias = head.weight.detach(), head.bias.detach()
        case = case[0], replace(head, weight=weight, bias=bias), *case[2:]
    inputs = [case[0]] if frozen else leaves(*case[:2])
    actual = foreseen
    if scale == "a token":
        scale, once = torch.linspace(-1, 2, P, dtype=torch.float64), frozen
        actual = Upstream(scale * foreseen[0], scale * foreseen[1], scale[:, None] * foreseen[2])
    else:
        actual = Upstream(*(scale * factor for factor in foreseen[:3]))
    terms = linear_token_terms(*case, tokens, targets, **options, chunk_tokens=3, expected=foreseen)
    loss = weighted(terms.divergence, terms.logprob, terms.target_logprobs, actual)
    found = torch.autograd.grad(loss, inputs)
    assert len(passes) == (1 if once else 2)

    full = (naive_logits(*case[:2]) / 0.6).log_softmax(-1)
    teacher = naive_logits(*case[2:]).detach()
    expected = weighted(
        token_divergence(naive_logits(*case[:2]), teacher, **options),
        full.gather(1, tokens[:, None])[:, 0],
        full.gather(1, targets),
        actual,
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs))


def test_a_promise_that_is_kept_saves_the_comparison_and_one_that_is_not_gives_nan(passes):
    case, tokens, targets, foreseen = foreseen_case()
    options = {"chunk_tokens": 3, "expected": foreseen}

    def gradient(factor: Tensor, promised: bool) -> tuple[Tensor, ...]:
        terms = linear_token_terms(*case, tokens, targets, **options, promised=promised)
        loss = weighted(factor * terms.divergence, terms.logprob, terms.target_logprobs, foreseen)
        return torch.autograd.grad(3 * loss, leaves(*case[:2]))

    one, other = torch.ones(P), torch.arange(P)
    torch.testing.assert_close(gradient(one, True), gradient(one, False))
    assert len(passes) == 2
    assert all(x.isnan().any() for x in gradient(other, True))
    assert not any(x.isnan().any() for x in gradient(other, False))


def test_the_sum_of_a_linear_divergence_is_differentiated_in_one_pass(passes):
    case = linear_case()
    found = linear_token_divergence(*case).sum()
    torch.autograd.grad(3 * found, case[0])
    assert len(passes) == 1


def test_a_head_may_be_a_linear_layer_its_weight_or_a_head():
    h, s, g, t = linear_case()
    layer = torch.nn.Linear(5, V, dtype=torch.float64)
    layer.weight.data, layer.bias.data = s.weight.detach(), s.bias.detach()
    expected = linear_token_divergence(h, s, g, t)
    assert torch.equal(linear_token_divergence(h, layer, g, t.weight), expected)


def test_a_tied_head_gets_both_gradients_of_its_embeddings():
    """Through the states and as the head, added."""
    _, head, g, t = linear_case(bias=False)
    tokens = torch.arange(P) % V

    def value(divergence) -> Tensor:
        hidden = head.weight[tokens].tanh().cumsum(0)
        return divergence(hidden).sum()

    found = value(lambda h: linear_token_divergence(h, head, g, t, chunk_tokens=3))
    expected = value(lambda h: token_divergence(naive_logits(h, head), naive_logits(g, t)))
    assert_same(found, expected, [head.weight])


def test_bfloat16_gradients_are_summed_in_float32():
    """A thousand equal shares, a chunk each: bfloat16 sums stop growing at 256 of them."""
    tokens, vocab = 1024, 8
    generator = torch.Generator().manual_seed(0)
    row, other = torch.randn(2, 1, 16, generator=generator).bfloat16()
    head, theirs = torch.randn(2, vocab, 16, generator=generator).bfloat16()
    head.requires_grad_()

    def gradient(count: int) -> Tensor:
        states = row.expand(count, -1), other.expand(count, -1)
        loss = linear_token_divergence(states[0], head, states[1], theirs, chunk_tokens=1)
        assert loss.dtype == torch.float32
        return torch.autograd.grad(loss.sum(), head)[0].double()

    one = gradient(1)
    assert one.abs().max() > 1e-3
    torch.testing.assert_close(gradient(tokens), tokens * one, rtol=2**-7, atol=0)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_linear_logprobs_equal_the_full_log_softmax(chunk_tokens):
    hidden, head, _, _ = linear_case()
    head = Head(head.weight, head.bias, scale=0.5, softcap=3.0)
    tokens = torch.arange(P) % V
    found, best = linear_logprobs(hidden, head, tokens, temperature=0.7, chunk_tokens=chunk_tokens)
    full = (naive_logits(hidden, head) / 0.7).log_softmax(-1)
    torch.testing.assert_close(found, full[torch.arange(P), tokens])
    assert (best == full.argmax(-1)).all()


def test_logprobs_by_default_are_at_temperature_1():
    hidden, head, _, _ = linear_case()
    tokens = torch.arange(P) % V
    found, _ = linear_logprobs(hidden, head, tokens)
    full = naive_logits(hidden, head).log_softmax(-1)
    torch.testing.assert_close(found, full[torch.arange(P), tokens])


def test_logprobs_of_a_bfloat16_head_are_float32():
    hidden, head, _, _ = linear_case()
    narrow = Head(head.weight.bfloat16(), head.bias.bfloat16())
    found, _ = linear_logprobs(hidden.bfloat16(), narrow, torch.zeros(P, dtype=torch.long))
    assert found.dtype == torch.float32


def full_divergence(**options) -> Tensor:
    return token_divergence(*pair(3, 7), **options)


def divergence_of_few(**options) -> Tensor:
    student, teacher = pair(3, 7)
    return topk_divergence(student, *top_of(teacher, 4), **options)


def divergence_of_heads(**options) -> Tensor:
    return linear_token_divergence(*linear_case(), **options)


def divergence_of_terms(**options) -> Tensor:
    none = torch.zeros(P, 0, dtype=torch.long)
    return linear_token_terms(*linear_case(), torch.zeros(P).long(), none, **options).divergence


@pytest.mark.parametrize(
    "divergence", [full_divergence, divergence_of_few, divergence_of_heads, divergence_of_terms]
)
def test_a_divergence_is_by_default_reverse_kl_at_temperature_1_and_the_even_jsd(divergence):
    said = divergence(kind="reverse_kl", temperature=1.0)
    assert torch.equal(divergence(), said)
    assert not torch.equal(divergence(kind="forward_kl"), said)
    even = divergence(kind="jsd", beta=0.5, temperature=1.0)
    assert torch.equal(divergence(kind="jsd"), even)
    assert not torch.equal(divergence(kind="jsd", beta=0.6), even)


# ---- linear_token_statistics --------------------------------------------------------------------


def efficiency(p: np.ndarray, q: np.ndarray) -> float:
    """Signal over noise, from the definition: expectations under p of (c - b)^2 (1 / p - 1)."""
    c, leverage = np.log(p / q), 1 / p - 1
    signal = float(p @ (c - p @ c) ** 2)
    scale = float(p @ leverage)
    best = float(p @ (c * leverage)) / scale if scale > 1e-8 else float(p @ c)
    return signal / max(float(p @ ((c - best) ** 2 * leverage)) - signal, 1e-8)


def test_the_efficiency_of_two_tokens_by_hand():
    """p = (1/2, 1/2), c = +-a: signal a^2, leverage 1, b = 0, so the noise is a^2 - a^2 = 0."""
    assert efficiency(np.array([0.5, 0.5]), np.array([0.2, 0.8])) > 1e6
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.5, 0.125, 0.375])
    c = np.log(p / q)  # 0, log 2, log 2/3
    signal = p @ c**2 - (p @ c) ** 2
    b = (0.75 * c[1] + 0.75 * c[2]) / 2
    noise = 0.5 * b**2 + 0.75 * (c[1] - b) ** 2 + 0.75 * (c[2] - b) ** 2 - signal
    assert efficiency(p, q) == pytest.approx(signal / noise)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
@pytest.mark.parametrize(("candidates", "temperature"), [(1, 1.0), (2, 0.6), (4, 1.7), (100, 0.6)])
def test_statistics_equal_those_of_one_token_after_another(candidates, temperature, chunk_tokens):
    """Of a head with padded rows, which are no tokens."""
    h, s, g, t = linear_case(student_pad=3)
    found = linear_token_statistics(
        h, s, g, t, temperature=temperature, candidates=candidates, chunk_tokens=chunk_tokens
    )
    expected = []
    for ours, theirs in zip(naive_logits(h, s), naive_logits(g, t), strict=True):
        p, q = (softmax(x.detach().double().cpu().numpy() / temperature) for x in (ours, theirs))
        likely = set(np.argsort(-p)[:candidates])
        union = sorted(likely | set(np.argsort(-q)[:candidates]))
        inner = kl(q[union] / q[union].sum(), p[union] / p[union].sum())
        entropies = [-sum(x * math.log(x) for x in y) for y in (p, q)]
        mass = sum(q[v] for v in likely)
        reliable = efficiency(p[union] / p[union].sum(), q[union] / q[union].sum())
        expected.append([kl(p, q), entropies[0], inner, mass, entropies[1], reliable])
    assert found.shape == (6, P)
    torch.testing.assert_close(found.mT.double(), torch.tensor(expected, dtype=torch.float64))


def test_statistics_by_default_look_at_sixteen_tokens_at_temperature_1():
    h, s, g, t = linear_case()
    wide = [Head(torch.cat([x.weight] * 3) * torch.linspace(0, 1, 3 * V)[:, None]) for x in (s, t)]
    found = linear_token_statistics(h, wide[0], g, wide[1])
    said = linear_token_statistics(h, wide[0], g, wide[1], candidates=16, temperature=1.0)
    other = linear_token_statistics(h, wide[0], g, wide[1], candidates=15)
    assert torch.equal(found, said)
    assert not torch.equal(found, other)


def test_statistics_survive_a_token_that_cannot_be():
    """A bias of -inf bars it from both: its probability is 0 and adds nothing."""
    h, s, g, t = linear_case()
    barred = [torch.zeros(V, dtype=torch.float64).index_fill(0, torch.tensor([2]), -math.inf)] * 2
    heads = [Head(x.weight, bias) for x, bias in zip((s, t), barred, strict=True)]
    found = linear_token_statistics(h, heads[0], g, heads[1], candidates=V)
    kept = torch.tensor([v for v in range(V) if v != 2])
    without = [Head(x.weight[kept]) for x in (s, t)]
    expected = linear_token_statistics(h, without[0], g, without[1], candidates=V)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"chunk_tokens": 0}])
def test_statistics_refuse_options_out_of_range(options):
    with pytest.raises(TOPDError, match=next(iter(options))):
        linear_token_statistics(*linear_case(), **options)


class Memory(TorchDispatchMode):
    """Sizes of the storages that operations make: the largest, and the most alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.most = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def alive(self) -> int:
        self._known = {k: v for k, v in self._known.items() if not v[0].expired()}
        return sum(size for _, size in self._known.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.largest = max(self.largest, storage.nbytes())
                self._known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, self.alive())
        return out


def memory_of_forward_and_backward(loss) -> Memory:
    with Memory() as memory:
        loss().sum().backward()
    return memory


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_logits_are_never_held_whole(kind):
    tokens, vocab, width, chunk = 64, 199, 3, 2
    whole = 4 * tokens * vocab
    hidden = [torch.randn(tokens, width, requires_grad=True) for _ in range(2)]
    heads = [torch.randn(vocab, width, requires_grad=True) for _ in range(2)]
    memory = memory_of_forward_and_backward(
        lambda: linear_token_divergence(
            hidden[0], heads[0], hidden[1], heads[1], chunk_tokens=chunk, kind=kind
        )
    )
    full = memory_of_forward_and_backward(
        lambda: token_divergence(hidden[0] @ heads[0].T, hidden[1] @ heads[1].T, kind=kind)
    )
    assert full.largest >= whole  # the instrument sees what it should
    assert full.most >= 3 * whole
    assert memory.largest <= 4 * max(chunk * vocab, vocab * width, tokens * width)
    assert memory.most < whole  # a graph that kept every chunk would hold several


# ---- soft_target_kl and trajectory_loss -------------------------------------------------------


def guidance(n: int = 2, k: int = 4, v: int = 6):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(n, k, v, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.rand(n, k, v, generator=generator, dtype=torch.float64)
    targets = targets * (targets > 0.4)
    targets = targets / targets.sum(-1, keepdim=True)
    mask = torch.tensor([[True, True, False, True], [False, True, False, False]])
    return logits, targets, mask


def test_soft_target_kl_by_hand():
    found = soft_target_kl(logs(0.2, 0.5, 0.3), torch.tensor([[0.75, 0.25, 0.0]]).double())
    expected = 0.75 * math.log(0.75 / 0.2) + 0.25 * math.log(0.25 / 0.5)
    assert found.item() == pytest.approx(expected, abs=1e-14)


def test_trajectory_loss_by_hand():
    """Two guided positions of three; the third would change the mean if it were counted."""
    logprobs = torch.stack([logs(0.2, 0.8)[0], logs(0.5, 0.5)[0], logs(0.9, 0.1)[0]])[None]
    targets = torch.tensor([[[1.0, 0.0], [0.25, 0.75], [0.0, 1.0]]]).double()
    mask = torch.tensor([[True, True, False]])
    first = math.log(1 / 0.2)
    second = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    found = trajectory_loss(logprobs, targets, mask)
    assert found.item() == pytest.approx((first + second) / 2, abs=1e-14)
    twice = trajectory_loss(*(torch.cat([x, x]) for x in (logprobs, targets)), mask[0])
    assert twice.item() == pytest.approx(found.item(), abs=1e-14)  # one mask for all windows
    alone = trajectory_loss(logprobs, targets, torch.tensor([[True, False, False]]))
    assert alone.item() == pytest.approx(first, abs=1e-14)


def test_gradient_of_the_trajectory_loss_is_that_of_the_mean_cross_entropy():
    logits, targets, mask = guidance()
    found = torch.autograd.grad(trajectory_loss(logits.log_softmax(-1), targets, mask), logits)[0]
    expected = (logits.softmax(-1) - targets) * mask[:, :, None] / 4
    torch.testing.assert_close(found, expected.detach())


def test_trajectory_loss_gradcheck():
    logits, targets, mask = guidance()
    assert torch.autograd.gradcheck(
        lambda x: trajectory_loss(x.log_softmax(-1), targets, mask), (logits,)
    )


def test_trajectory_loss_is_zero_at_its_target():
    _, targets, mask = guidance()
    assert trajectory_loss(targets.log(), targets, mask).item() == pytest.approx(0, abs=1e-15)


def test_an_empty_mask_gives_zero_with_a_zero_gradient():
    logits, targets, mask = guidance()
    loss = trajectory_loss(logits.log_softmax(-1), targets, torch.zeros_like(mask))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert (gradient == 0).all()


def test_unguided_positions_do_not_matter_whatever_stands_there():
    logits, targets, mask = guidance()
    logprobs = logits.log_softmax(-1).detach()
    expected = trajectory_loss(logprobs, targets, mask)
    for rubbish, filler in ((-math.inf, 0.5), (math.nan, math.nan)):
        dirty = logprobs.masked_fill(~mask[:, :, None], rubbish).requires_grad_()
        filled = targets.masked_fill(~mask[:, :, None], filler).requires_grad_()
        found = trajectory_loss(dirty, filled, mask)
        torch.testing.assert_close(found, expected)
        assert all(x.isfinite().all() for x in torch.autograd.grad(found, (dirty, filled)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_target_the_student_bars_leaves_no_nan_where_it_has_factor_0(dtype):
    logprobs = torch.tensor([[-1.0, -2.0], [-math.inf, 0.0]], dtype=dtype, requires_grad=True)
    targets = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=dtype, requires_grad=True)
    value = soft_target_kl(logprobs, targets)
    assert value.tolist() == [pytest.approx(1.5 - math.log(2), rel=1e-3), math.inf]
    times = torch.tensor([1.0, 0.0], dtype=dtype)
    own, other = torch.autograd.grad(value, (logprobs, targets), times)
    assert own.tolist() == [[-0.5, -0.5], [0.0, 0.0]]
    assert other.isfinite().all()


def test_an_impossible_token_outside_the_target_costs_nothing():
    logprobs = logs(0.5, 0.5, 0.0, grad=True)
    value = soft_target_kl(logprobs, torch.tensor([[0.5, 0.5, 0.0]]).double())
    (gradient,) = torch.autograd.grad(value.sum(), logprobs)
    assert value.item() == pytest.approx(0, abs=1e-15)
    assert gradient.tolist() == [[-0.5, -0.5, 0.0]]


def test_sparse_targets_give_the_dense_divergence():
    logits, targets, _ = guidance()
    logprobs = logits.log_softmax(-1)
    mass, tokens = targets.sort(dim=-1, descending=True)  # the support in another order, then zeros
    sparse = soft_target_kl(logprobs.gather(-1, tokens), mass)
    assert_same(sparse, soft_target_kl(logprobs, targets), [logits])


def test_targets_side_by_side_add_up():
    logits, targets, _ = guidance()
    logprobs = logits.log_softmax(-1)[0]
    both = soft_target_kl(logprobs.repeat(1, 2), torch.cat([targets[0], targets[1]], dim=-1))
    torch.testing.assert_close(
        both, soft_target_kl(logprobs, targets[0]) + soft_target_kl(logprobs, targets[1])
    )


# Probability 0, half precision, importance


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("barring", ["student", "teacher", "both"])
def test_chunked_and_dense_agree_where_a_side_has_probability_0(kind, barring):
    """inf where one takes for possible what the other does not; finite where both or JSD."""
    h, s, g, t = linear_case()
    never = torch.zeros(V, dtype=torch.float64)
    never[V - 2 :] = -torch.inf
    if barring != "teacher":
        s = replace(s, bias=never)
    if barring != "student":
        t = replace(t, bias=never)
    expected = token_divergence(naive_logits(h, s), naive_logits(g, t), kind=kind)
    found = linear_token_divergence(h, s, g, t, kind=kind)
    torch.testing.assert_close(found, expected)
    apart = {"reverse_kl": "teacher", "forward_kl": "student"}.get(kind) == barring
    assert found.isinf().all() if apart else found.isfinite().all()


@kinds
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_barred_rows_are_no_tokens_on_either_side(kind, beta, side):
    """Values and gradients are those of heads that lack the rows, through a soft-cap too."""
    h, s, g, t = linear_case(bias=False)
    s, t = replace(s, softcap=2.0), replace(t, softcap=3.0)
    barred = torch.zeros(V, dtype=torch.bool)
    barred[[1, 4]] = True
    kept = (~barred).nonzero()[:, 0]
    few_s, few_t = replace(s, weight=s.weight[kept]), replace(t, weight=t.weight[kept])
    options = {"kind": kind, "beta": beta, "temperature": 0.7}
    few = token_divergence(naive_logits(h, few_s), naive_logits(g, few_t), **options).sum()
    heads = (replace(s, barred=barred), t) if side == "student" else (s, replace(t, barred=barred))
    found = linear_token_divergence(h, heads[0], g, heads[1], **options).sum()
    torch.testing.assert_close(found, few)
    grads = torch.autograd.grad(found, (h, s.weight)), torch.autograd.grad(few, (h, s.weight))
    torch.testing.assert_close(*grads)
    assert heads[0].logits(h)[:, barred].isneginf().all() == (side == "student")


def test_a_log_prob_below_every_float_is_no_impossibility():
    student = torch.tensor([[0.0, -200.0]])
    teacher = torch.tensor([[0.0, -torch.inf]])
    assert token_divergence(student, teacher).item() == math.inf


@pytest.mark.parametrize("tokens", [4096, 1 << 20])
def test_float16_gradients_of_long_updates_are_right(tokens):
    """Scaled as GradScaler does: a factor of 1 / tokens alone underflows in float16."""
    generator = torch.Generator().manual_seed(0)
    h, w, d = (torch.randn(x, generator=generator) for x in ((64, 32), (500, 32), (64, 32)))
    w, factor = 0.3 * w, torch.full((64,), 1 / tokens)
    none = torch.zeros(64, 0, dtype=torch.long)

    def gradients(dtype: torch.dtype, half: bool) -> list[Tensor]:
        hidden, weight = (x.to(dtype).requires_grad_() for x in (h, w))
        other, scale = (h + 0.3 * d).to(dtype), 32768.0
        with torch.autocast(DEVICE.type, dtype=torch.float16, enabled=half):
            terms = linear_token_terms(
                hidden,
                Head(weight),
                other,
                Head(w.to(dtype)),
                none.new_zeros(64),
                none,
                expected=Upstream(factor, None, None),
            )
            loss = terms.divergence.sum() / tokens
        found = torch.autograd.grad(scale * loss, (hidden, weight))
        return [x.double() / scale for x in found]

    exact = gradients(torch.float64, half=False)
    for found, right in zip(gradients(torch.float32, half=True), exact, strict=True):
        assert (found - right).norm() < 0.005 * right.norm()


@pytest.mark.parametrize("frozen", [False, True])
def test_factors_times_the_importance_are_foreseen(frozen, passes):
    case, tokens, targets, factors = foreseen_case()
    if frozen:
        head = case[1]
        case = case[0], replace(head, weight=head.weight.detach(), bias=None), *case[2:]
    sampled = torch.linspace(-4, -0.5, P, dtype=torch.float64)
    foreseen = Upstream(*factors[:3], sampled, 2.0)
    terms = linear_token_terms(*case, tokens, targets, chunk_tokens=3, expected=foreseen)
    ratio = importance(terms.logprob, sampled, 2.0)
    assert 0 < (ratio == 2.0).sum() < P
    actual = Upstream(ratio * factors[0], ratio * factors[1], factors[2])
    loss = weighted(terms.divergence, terms.logprob, terms.target_logprobs, actual)
    inputs = [case[0]] if frozen else leaves(*case[:2])
    found = torch.autograd.grad(loss, inputs)
    assert len(passes) == 1
    terms = linear_token_terms(*case, tokens, targets)
    again = weighted(terms.divergence, terms.logprob, terms.target_logprobs, actual)
    torch.testing.assert_close(found, torch.autograd.grad(again, inputs))


@pytest.mark.parametrize("wrong", [None, *TokenTerms._fields])
@pytest.mark.parametrize("by", [1e-2, math.nan])
def test_a_kernel_is_not_used_whose_trial_has_one_wrong_value(wrong, by, monkeypatch):
    """A NaN beside a right gradient too; here a kernel is made of the path that it is held to."""

    def block(logits: Tensor, *given: Any) -> None:
        logits.copy_(chunked._block(logits, *given))
        if wrong:
            getattr(given[-1], wrong)[1] += by

    monkeypatch.setattr(chunked, "kernels", SimpleNamespace(block=block))
    how = DEVICE, torch.float32, "forward_kl", 1.0, ((1.0, None), (1.0, None))
    assert chunked._tried.__wrapped__(*how) == (wrong is None)
