"""Methods, on evidence built by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import losses
from topd.config.rules import check_learns, check_options
from topd.detectors import teachability_of
from topd.errors import TOPDError
from topd.methods import METHODS, NEVER, downweight, opd, topd
from topd.training.experience.evidence import by_token_loss
from topd.training.learning import cap_at_medians
from topd.transport import soft_targets, solve
from topd.types import (
    Branch,
    Evidence,
    Guidance,
    Prompt,
    Rollout,
    SoftTarget,
    TokenStatistics,
    Transport,
    Windows,
)

INF = math.inf


# ---- methods ----------------------------------------------------------------------------------


def evidence(
    rows: list[list[float]],
    starts: list[tuple[int, int]],
    real: list[bool],
    *,
    student_length: int = 3,
    teacher_length: int = 4,
) -> Evidence:
    """Windows of random costs at the given starts; the student's end with their rollout."""
    token_loss, mask = losses(*rows)
    n, m, count = student_length, teacher_length, len(starts)
    generator = torch.Generator().manual_seed(0)
    row, start = torch.tensor(starts, dtype=torch.long).reshape(-1, 2).unbind(-1)
    left = torch.tensor([len(rows[b]) - t for b, t in starts], dtype=torch.long)
    student_mask = torch.arange(n) < left[:, None]
    teacher_mask = torch.arange(m) < (m - torch.arange(count) % 2)[:, None]
    windows = Windows(
        row,
        start,
        torch.randint(3, 9, (count, n), generator=generator),
        student_mask,
        torch.randint(3, 9, (count, m), generator=generator) * teacher_mask,
        teacher_mask,
    )
    cost = torch.rand(count, n, m, generator=generator)
    plans = solve(cost, student_mask, teacher_mask)
    token_loss = token_loss.masked_fill(~mask, 0.0)
    own = -torch.rand(mask.shape, generator=generator) * mask
    return Evidence(
        token_loss,
        own,
        mask,
        windows,
        plans,
        torch.tensor(real, dtype=torch.bool),
        teacher_logprobs=own - token_loss,
        rollouts=tuple(
            Rollout(Prompt(b, (1,), (1,)), tuple(range(3, 3 + len(row))), (-1.0,) * len(row), True)
            for b, row in enumerate(rows)
        ),
    )


ROWS = [[1.0, 2.0, 9.0, 3.0, 4.0], [5.0, 6.0]]
STARTS = [(0, 0), (0, 2), (0, 4), (1, 0)]


def no_windows() -> Evidence:
    """What a step without candidates yields: no window, and so no width either."""
    token_loss, mask = losses([1.0, 2.0], [3.0])
    ids, none = torch.zeros(0, dtype=torch.long), torch.zeros(0, 0, dtype=torch.bool)
    windows = Windows(ids, ids, none.long(), none, none.long(), none)
    plans = Transport(torch.zeros(0), torch.zeros(0, 0, 0), torch.zeros(0).bool())
    return Evidence(token_loss, 0 * token_loss, mask, windows, plans, torch.zeros(0).bool())


def with_statistics(found: Evidence) -> Evidence:
    """The same evidence with random statistics, zero after the mask."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.rand(found.mask.shape, generator=generator) * found.mask for _ in range(6)]
    return replace(found, statistics=TokenStatistics(*values))


LOOKING = sorted(name for name, method in METHODS.items() if method.looks_ahead)


@pytest.mark.parametrize("name", sorted({*LOOKING} - {"olive"}))
def test_without_windows_methods_that_look_ahead_are_plain_distillation(name):
    assert METHODS[name].guide(no_windows()) == (Guidance((1.0, 1.0)), Guidance((1.0,)))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_one_guidance_a_rollout_with_one_weight_a_token(name):
    found = with_statistics(evidence([*ROWS, []], STARTS, [True, False, True, False]))
    guidance = METHODS[name].guide(found)
    assert [len(one.weights) for one in guidance] == [5, 2, 0]
    assert all(type(weight) is float for one in guidance for weight in one.weights)


def test_only_methods_that_look_ahead_depend_on_the_windows():
    one = with_statistics(evidence(ROWS, STARTS, [True] * 4))
    other = replace(one, real=torch.tensor([False, True, False, False]))
    changed = {name for name, method in METHODS.items() if method.guide(one) != method.guide(other)}
    assert changed == set(LOOKING)


@pytest.mark.parametrize("name", ["kl_top", "entropy_top", "teachability", "ier_opd"])
def test_selection_keeps_the_highest_scores_at_mean_weight_one(name):
    """Of all 7 tokens a share of 0.4 keeps 3, and one more where a rollout has none."""
    found = with_statistics(evidence(ROWS, STARTS, [True] * 4))
    scores = {
        "kl_top": found.statistics.reverse_kl,
        "entropy_top": found.statistics.entropy,
        "teachability": teachability_of(found.statistics, found.mask),
        "ier_opd": found.statistics.reliability,
    }[name]
    places = [(0, t) for t in range(5)] + [(1, t) for t in range(2)]
    best = set(sorted(places, key=lambda place: -scores[place])[:3])
    best |= {(0, int(scores[0].argmax())), (1, int(scores[1, :2].argmax()))}
    guidance = METHODS[name].guide(found, share=0.4)
    for row, t in places:
        expected = 7 / len(best) if (row, t) in best else 0.0
        assert guidance[row].weights[t] == pytest.approx(expected)


def test_teachability_by_hand():
    """D = 0..20 has the quantiles 1 and 19, C = 1 everywhere but for one token of 0."""
    _, mask = losses([0.0] * 21)
    disagreement = torch.arange(21.0)[None]
    mass = torch.linspace(0, 1, 21).flip(0)[None]  # quantiles 0.05 and 0.95
    none = torch.zeros(1, 21)
    found = replace(
        evidence([[0.0] * 21], [], []),
        mask=mask,
        statistics=TokenStatistics(none, none, disagreement, mass, none, none),
    )
    expected = [min(max((d - 1) / 18, 0), 1) * min(max((19 - d) / 18, 0), 1) for d in range(21)]
    torch.testing.assert_close(
        teachability_of(found.statistics, found.mask)[0], torch.tensor(expected)
    )


def test_weights_of_iw_opd_by_hand():
    """Losses 1, -2, 1 of a rollout: 1 + 0.5 (1 - 0), 1 + 0.5 (1 - 1/4), 1 + 0.5 (1 - 3/4)."""
    (guide,) = METHODS["iw_opd"].guide(evidence([[1.0, -2.0, 1.0]], [], []))
    assert guide.weights == pytest.approx((1.5, 1.375, 1.125))


def test_a_token_that_the_teacher_never_writes_leaves_every_weight_finite():
    found = evidence([[1.0, INF, 1.0]], [], [])
    (guide,) = METHODS["iw_opd"].guide(found)
    assert guide.weights == pytest.approx((1.5, 1.5, 1.0), abs=1e-3)
    (guide,) = METHODS["dial_opd"].guide(found, share=0.34, beta=0.0)
    assert guide.weights == (0.0, 3.0, 0.0)


@pytest.mark.parametrize("loss", ["sampled", "surprise"])
def test_the_drift_of_iw_opd_does_not_depend_on_the_detector(loss):
    found = evidence([[1.0, -2.0, 1.0]], [], [])
    seen = found if loss == "sampled" else replace(found, token_loss=found.token_loss + 7.0)
    assert METHODS["iw_opd"].guide(seen) == METHODS["iw_opd"].guide(found)


def probabilities(student: list[float], teacher: list[float]) -> Evidence:
    """One rollout whose tokens have these probabilities."""
    own, theirs = torch.tensor([student]).log(), torch.tensor([teacher]).log()
    found = evidence([[0.0] * len(student)], [], [])
    return replace(found, logprobs=own, teacher_logprobs=theirs)


def test_dial_opd_prefers_a_gap_of_probabilities_to_a_ratio_of_tiny_ones():
    """|q - p| is 0.1, 0.0009 and 0.5; the ratios are 2, 10 and 2."""
    found = probabilities([0.2, 1e-4, 0.5], [0.1, 1e-3, 1.0])
    (by_gap,) = METHODS["dial_opd"].guide(found, share=0.34)
    (by_ratio,) = METHODS["dial_opd"].guide(found, share=0.34, beta=0.0)
    assert found.statistics is None  # log-probs are all that it asks for
    assert METHODS["dial_opd"].needs == "logprobs"
    assert by_gap.weights == (0.0, 0.0, 3.0)
    assert by_ratio.weights == (0.0, 3.0, 0.0)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 1.7])
def test_the_score_of_dial_opd_is_the_logarithmic_mean_times_the_reward(beta):
    """L(p, q)^beta |r| with L = (q - p) / (log q - log p), the first form in the paper."""
    generator = torch.Generator().manual_seed(3)
    p, q = torch.rand(2, 40, generator=generator).tolist()
    score = [
        ((b - a) / (math.log(b) - math.log(a))) ** beta * abs(math.log(b / a))
        for a, b in zip(p, q, strict=True)
    ]
    best = sorted(range(40), key=lambda t: -score[t])[:10]
    (guide,) = METHODS["dial_opd"].guide(probabilities(p, q), share=0.25, beta=beta)
    assert [t for t, weight in enumerate(guide.weights) if weight] == sorted(best)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_dial_opd_leaves_out_tokens_where_both_models_agree(beta):
    check_options("dial_opd", {"beta": beta})
    found = probabilities([0.5, 0.5, 0.5], [0.5, 0.4, 0.5])
    (guide,) = METHODS["dial_opd"].guide(found, share=0.34, beta=beta)
    assert [weight > 0 for weight in guide.weights] == [False, True, False]


def test_dial_opd_on_all_tokens_is_opd():
    found = evidence(ROWS, STARTS, [True] * 4)
    assert METHODS["dial_opd"].guide(found, share=1.0) == opd(found)


def test_eopd_adds_forward_kl_where_the_teacher_is_in_doubt():
    """Runs of tokens above the threshold, as parts of the rollout's own text."""
    found = with_statistics(evidence(ROWS, STARTS, [True] * 4))
    doubt = torch.tensor([[0.9, 0.1, 1.0, 1.2, 0.1], [0.1, 0.81, 9.0, 9.0, 9.0]])
    found = replace(found, statistics=replace(found.statistics, teacher_entropy=doubt))
    first, second = METHODS["eopd"].guide(found)
    assert first.branches == (Branch(0, (3,), "forward_kl"), Branch(2, (5, 6), "forward_kl"))
    assert second.branches == (Branch(1, (4,), "forward_kl"),)
    assert METHODS["eopd"].guide(found, threshold=INF) == opd(found)
    parts = zip(found.rollouts, (first, second), strict=True)
    assert all(b.is_part_of(r.response) for r, guide in parts for b in guide.branches)


def test_the_negative_control_pushes_the_least_likely_tokens_down():
    """Two of seven tokens kept (a share of 0.3), one a rollout at least: mean over the kept."""
    found = evidence(ROWS, STARTS, [True] * 4)
    logprobs = torch.tensor([[-0.1, -3.0, -0.2, -4.0, -0.3], [-0.5, -0.4, 0.0, 0.0, 0.0]])
    first, second = METHODS["negative"].guide(replace(found, logprobs=logprobs), share=0.3)
    each = pytest.approx(-0.5 * 7 / 3)
    assert first.advantages == (0, each, 0, each, 0)
    assert second.advantages == (each, 0)
    assert set(first.weights) == {0.0}


@pytest.mark.parametrize(
    ("name", "options", "loss"),
    [
        ("window_sft", {}, "cross_entropy"),
        ("window_kd", {}, "forward_kl"),
        ("window_kd", {"reverse": True}, "reverse_kl"),
        ("relay", {}, "reverse_kl"),
    ],
)
def test_branches_are_the_teachers_windows_at_real_points(name, options, loss):
    found = evidence(ROWS, STARTS, [True, False, False, True])
    guidance = METHODS[name].guide(found, **options)
    for guide, k in zip(guidance, (0, 3), strict=True):
        (branch,) = guide.branches
        tokens = found.windows.teacher_tokens[k][found.windows.teacher_mask[k]]
        assert branch.tokens == tuple(tokens.tolist())
        assert (branch.start, branch.loss) == (STARTS[k][1], loss)
        assert (branch.go_on > 0) == (name == "relay")
        assert guide.guided == len(branch.tokens)
        assert set(guide.weights) == {1.0}


def test_the_first_fork_is_learned_and_what_follows_counts_less():
    """Real at tokens 2 and 4 of the first rollout, none of the second."""
    found = evidence(ROWS, STARTS, [False, True, True, False])
    first, second = METHODS["first_fork"].guide(found, after=0.25)
    (branch,) = first.branches
    tokens = found.windows.teacher_tokens[1][found.windows.teacher_mask[1]]
    assert (branch.start, branch.tokens, branch.loss) == (2, tuple(tokens.tolist()), "forward_kl")
    assert first.weights == (1.0, 1.0, 1.0, 0.25, 0.25)
    assert second == Guidance((1.0, 1.0))
    other, _ = METHODS["first_fork"].guide(found, after=0.25, loss="cross_entropy")
    assert other == replace(first, branches=(replace(branch, loss="cross_entropy"),))


def test_olive_learns_the_teachers_text_behind_one_cut_and_nothing_else():
    found = evidence(ROWS, STARTS, [False, True, True, False])
    first, second = METHODS["olive"].guide(found)
    (branch,) = first.branches
    tokens = found.windows.teacher_tokens[1][found.windows.teacher_mask[1]]
    assert branch == Branch(2, tuple(tokens.tolist()), "cross_entropy")
    assert first.weights == (0.0,) * 5
    assert second == Guidance((0.0, 0.0))


@pytest.mark.parametrize("seed", range(4))
def test_the_matched_control_caps_as_many_real_points_drawn_by_the_seed(seed):
    found = evidence(ROWS, STARTS, [True, False, True, True])
    guidance = METHODS["downweight_matched"].guide(replace(found, seed=seed))
    capped = [(row, t) for row, guide in enumerate(guidance) for t in guide.capped]
    assert len(capped) == 1
    assert set(capped) <= {STARTS[0], STARTS[2], STARTS[3]}
    assert guidance == METHODS["downweight_matched"].guide(replace(found, seed=seed))


def test_the_matched_control_draws_differently_by_seed():
    found = evidence(ROWS, STARTS, [True, False, True, True])
    drawn = {METHODS["downweight_matched"].guide(replace(found, seed=s)) for s in range(20)}
    assert len(drawn) == 3


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("topd", {"share": 0.1}),
        ("kl_top", {"shar": 0.1}),
        ("tpd", {}),
        ("kl_top", {"share": "many"}),
        ("first_fork", {"loss": "forward"}),
        ("dial_opd", {"beta": 1.1}),
    ],
)
def test_unknown_methods_and_options_are_refused(method, options):
    with pytest.raises(TOPDError, match="method"):
        check_options(method, options)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_by_the_fields_that_it_says(name):
    """And what they leave it without token losses, or without L_traj, is refused or not."""
    method = METHODS[name]
    found = with_statistics(evidence(ROWS, STARTS, [True, False, True, False]))
    guidance = method.guide(found, **({"threshold": 0.1} if name == "eopd" else {}))
    parts = ("weights", "targets", "branches", "advantages")
    filled = {part for part in parts if any(any(getattr(guide, part)) for guide in guidance)}
    assert filled == {*method.learns}
    for kind, weight in (("full", 0.1), ("full", 0.0), ("none", 0.1), ("none", 0.0)):
        gone = {"weights"} if kind == "none" else set()
        gone |= set() if weight else {"targets", "branches"}
        if filled - gone:
            check_learns(name, kind, weight)
        else:
            said = "token_loss: none" if method.of_tokens else "trajectory_weight: 0"
            with pytest.raises(TOPDError, match=f"{said} leaves {name} nothing to learn"):
                check_learns(name, kind, weight)


@pytest.mark.parametrize("names", [("after",), ("after", "loss"), ("loss", "after")])
def test_an_option_of_token_losses_has_no_effect_without_them(names):
    """Whatever else is there, before it or after."""
    values = {"after": 0.0, "loss": "forward_kl"}
    options = {name: values[name] for name in names}
    check_options("first_fork", options, "sampled")
    with pytest.raises(TOPDError, match=r"method_options: after: .* token_loss: none\. Leave it"):
        check_options("first_fork", options, "none")


@pytest.mark.parametrize("name", METHODS)
def test_sampled_token_losses_carry_any_weight_and_no_cap(name):
    """A cap is of losses over the whole distribution: nothing would hold it down."""
    found = with_statistics(evidence(ROWS, STARTS, [True, False, True, False]))
    guidance = METHODS[name].guide(found)
    capped = any(guide.capped for guide in guidance)
    assert METHODS[name].caps == capped
    for kind in ("sampled", "spans"):
        if capped:
            with pytest.raises(TOPDError, match=f"token_loss: {kind} leaves {name} without effect"):
                check_learns(name, kind, 0.1)
        else:
            check_learns(name, kind, 0.1)


def test_a_token_that_the_teacher_bars_counts_as_much_as_its_weight():
    """With weight 0 it counts nothing; -inf times 0 would be no number. By hand."""
    rollout = Rollout(Prompt(0, (1,), (1,)), (5, 6, 7), (-1.0, -1.0, -0.5), finished=True)
    teacher = [torch.tensor([-math.inf, -math.inf, -0.25])]
    guide = Guidance((0.0, 1.5, 2.0))
    (found,) = by_token_loss("sampled", [guide], [rollout], teacher)
    assert found.advantages == (0.0, 1.5 * NEVER, 0.5)
    (found,) = by_token_loss("spans", [guide], [rollout], teacher, [((1, 3),)])
    assert found.advantages == (0.0, 1.5 * (NEVER + 0.25), 2.0 * (NEVER + 0.25))


def test_opd_leaves_every_token_as_it_is():
    guidance = opd(evidence(ROWS, STARTS, [True] * 4))
    assert guidance == (Guidance((1.0,) * 5), Guidance((1.0,) * 2))


def test_topd_targets_by_hand():
    """One window at token 1: its plan sends token 1 to words 7 and 8, token 2 to word 8."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    windows = Windows(
        torch.tensor([0]),
        torch.tensor([1]),
        torch.tensor([[3, 4]]),
        mask,
        torch.tensor([[8, 7, 8]]),
        torch.ones(1, 3, dtype=torch.bool),
    )
    plan = torch.tensor([[[1 / 6, 1 / 3, 0.0], [1 / 6, 0.0, 1 / 3]]])
    plans = Transport(torch.zeros(1), plan, torch.tensor([True]))
    loss, tokens = losses([1.0, 9.0, 2.0])
    (guidance,) = topd(Evidence(loss, 0 * loss, tokens, windows, plans, torch.tensor([True])))
    first, second = guidance.targets
    assert guidance.weights == (1.0, 1.0, 1.0)
    assert (first.position, first.tokens) == (1, (7, 8))
    assert first.probabilities == pytest.approx((2 / 3, 1 / 3))
    assert second == SoftTarget(2, (8,), (1.0,))


def test_topd_guides_the_students_window_at_real_points_only():
    """Window 2 starts at the last token of rollout 0, so it has one token."""
    guidance = topd(evidence(ROWS, STARTS, [True, False, True, True]))
    assert [[t.position for t in one.targets] for one in guidance] == [[0, 1, 2, 4], [0, 1]]
    assert all(weight == 1 for one in guidance for weight in one.weights)


def test_topd_targets_are_distributions_over_the_teachers_window():
    found = evidence(ROWS, STARTS, [True] * 4)
    words = set(found.windows.teacher_tokens[found.windows.teacher_mask].tolist())
    for one in topd(found):
        for target in one.targets:
            assert sum(target.probabilities) == pytest.approx(1, abs=1e-12)
            assert min(target.probabilities) > 0
            assert list(target.tokens) == sorted(set(target.tokens))
            assert set(target.tokens) <= words


def test_topd_targets_are_the_dense_soft_targets():
    found = evidence(ROWS, STARTS, [True, True, False, True])
    dense = soft_targets(found.transport.plan, found.windows.teacher_tokens, 9)
    expected = [(0, 0 + i, dense[0, i]) for i in range(3)]
    expected += [(0, 2 + i, dense[1, i]) for i in range(3)]
    expected += [(1, 0 + i, dense[3, i]) for i in range(2)]
    targets = [(b, target) for b, one in enumerate(topd(found)) for target in one.targets]
    for (b, target), (row, position, values) in zip(targets, expected, strict=True):
        assert (b, target.position) == (row, position)
        spread = torch.zeros(9).double()
        spread[list(target.tokens)] = torch.tensor(target.probabilities, dtype=torch.float64)
        torch.testing.assert_close(spread, values.double(), atol=1e-6, rtol=0)


def test_topd_without_a_real_point_is_opd():
    found = evidence(ROWS, STARTS, [False] * 4)
    assert topd(found) == opd(found)


def test_downweight_caps_false_alarms_and_only_those():
    guidance = downweight(evidence(ROWS, [(0, 2), (0, 4), (1, 1)], [True, False, False]))
    assert [one.capped for one in guidance] == [(4,), (1,)]
    assert all(set(one.weights) == {1.0} and one.targets == () for one in guidance)


def capped(rows: list[list[float]], marked: list[tuple[int, int]]) -> list[float]:
    mark = [(b, t) in marked for b, row in enumerate(rows) for t in range(len(row))]
    loss = torch.tensor([x for row in rows for x in row]).double()
    return cap_at_medians(loss, torch.tensor(mark), [len(row) for row in rows]).tolist()


def test_a_cap_is_the_median_of_its_own_rollout():
    """Median of 1, 2, 9, 3, 4 is 3; of 5, 6 it is 5.5."""
    rows = [[1.0, 2, 9, 3, 4], [5.0, 6]]
    assert capped(rows, [(0, 2), (1, 1)]) == pytest.approx([1, 2, 3, 3, 4, 5, 5.5])


def test_a_cap_leaves_tokens_at_or_below_the_median():
    rows = [[1.0, 2, 9, 3, 4]]
    assert capped(rows, [(0, 0), (0, 3)]) == rows[0]


def test_a_capped_token_still_learns_with_the_weight_median_over_loss():
    loss = torch.tensor([1.0, 2.0, 8.0], requires_grad=True)
    cap_at_medians(loss, torch.tensor([False, False, True]), [3]).sum().backward()
    assert loss.grad.tolist() == [1.0, 1.0, 2 / 8]


@settings(max_examples=40)
@given(st.lists(st.floats(0, 20, width=32), min_size=1, max_size=7))
def test_a_capped_loss_is_the_smaller_of_loss_and_median(row):
    half = len(row) // 2
    ordered = sorted(row)
    cap = ordered[half] if len(row) % 2 else (ordered[half - 1] + ordered[half]) / 2
    found = capped([row], [(0, t) for t in range(len(row))])
    assert found == pytest.approx([min(loss, cap) for loss in row], rel=1e-6, abs=1e-9)


def test_methods_do_not_change_their_evidence():
    found = with_statistics(evidence(ROWS, STARTS, [True, False, True, False]))
    copy = replace(found, token_loss=found.token_loss.clone())
    for method in METHODS.values():
        method.guide(found)
    assert torch.equal(found.token_loss, copy.token_loss)
