"""The experience phase: candidates, windows, forks and guidance of real tiny models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from conftest import EOS, USE_CPU, VOCAB, tiny_model
from conftest import greedy_by_transformers as greedy
from conftest import torch_on_device as torch
from topd import TOPDConfig, transport
from topd.detectors import DETECTORS
from topd.divergence import surprise
from topd.engines.hf import HFEngine
from topd.errors import TOPDError
from topd.losses import token_divergence
from topd.methods import METHODS, Method
from topd.training.experience import REWRITTEN, Observer
from topd.training.experience.evidence import Experience, differing, pair_windows
from topd.transport import sparse_soft_targets
from topd.types import Evidence, Generation, Guidance, Prompt, Rollout

K = 5
STUDENT = tiny_model("llama", seed=0)
TEACHER = tiny_model("qwen3", seed=1, hidden_size=40)
PROMPTS = [  # of several lengths; the teacher's own prompt is longer
    Prompt(10 + i, (25, 26, 6 + i % 4, 16, 7)[: 3 + i % 3], (30, 31, 25, 26, 6 + i)[: 4 + i % 2])
    for i in range(8)
]


def observer(folder: Path, teacher: PreTrainedModel = TEACHER, **options) -> Observer:
    args = {
        "seed": 5,  # rollouts of 3 to 20 tokens
        "per_device_train_batch_size": 4,
        "max_completion_length": 20,
        "method": "topd",
        "window_length": K,
        "candidate_fraction": 0.3,
        "use_cpu": USE_CPU,
        **options,
    }
    return Observer(
        HFEngine(STUDENT, eos_ids=[EOS]),
        HFEngine(teacher, eos_ids=[EOS]),
        TOPDConfig(output_dir=str(folder), **args),
    )


def observed(folder: Path, teacher: PreTrainedModel = TEACHER, **options) -> Experience:
    return observer(folder, teacher, **options).observe(PROMPTS, step=3)


@torch.no_grad()
def logprobs(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """All log-probs [T V] from the model's own logits."""
    ids = torch.tensor([[*prompt, *response]])
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def token_loss(rollout: Rollout, kind: str, temperature: float = 1.0) -> Tensor:
    """The loss that ranks candidates [T], by hand."""
    own = (logprobs(STUDENT, rollout.prompt.student, rollout.response) / temperature).log_softmax(
        -1
    )
    theirs = logprobs(TEACHER, rollout.prompt.teacher, rollout.response) / temperature
    theirs = theirs.log_softmax(-1)
    token = torch.tensor(rollout.response)[:, None]
    if kind == "reverse_kl":
        return token_divergence(own, theirs)
    if kind == "entropy":
        return -(own.exp() * own).sum(-1)
    own, theirs = own.gather(-1, token)[:, 0], theirs.gather(-1, token)[:, 0]
    if kind == "student_nll":
        return -own
    return own - theirs if kind == "sampled" else -theirs


def token_losses(rollouts: Sequence[Rollout], kind: str, temperature: float) -> list[Tensor]:
    """One [T] a rollout; a surprise depends on the other rollouts."""
    if kind != "surprise":
        return [token_loss(rollout, kind, temperature) for rollout in rollouts]
    best = [logprobs(TEACHER, r.prompt.teacher, r.response).argmax(-1) for r in rollouts]
    found = surprise(
        -torch.cat([token_loss(r, "teacher_nll", temperature) for r in rollouts]),
        torch.cat(best),
        torch.cat([torch.tensor(r.response) for r in rollouts]),
    )
    return list(found.split([len(r.response) for r in rollouts]))


def evidence(observer: Observer, rollouts: Sequence[Rollout]) -> Evidence:
    """What a method is shown."""
    seen = []

    def guide(evidence: Evidence) -> tuple[Guidance, ...]:
        seen.append(evidence)
        return METHODS["topd"].guide(evidence)

    observer.inspect(rollouts, range(len(rollouts)), Method(guide, looks_ahead=True))
    return seen[0]


def forks(experience: Experience) -> list[tuple[Rollout, object]]:
    return [
        (rollout, fork)
        for rollout, found in zip(experience.rollouts, experience.forks, strict=True)
        for fork in found
    ]


# The teacher's view


def test_teacher_states_and_logprobs_are_those_behind_its_own_prompt(tmp_path):
    experience = observed(tmp_path)
    assert len({len(rollout.response) for rollout in experience.rollouts}) >= 4
    for i, rollout in enumerate(experience.rollouts):
        prompt = rollout.prompt.teacher
        assert prompt != rollout.prompt.student
        ids = torch.tensor([[*prompt, *rollout.response]])
        with torch.no_grad():
            states = TEACHER.model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
        expected = logprobs(TEACHER, prompt, rollout.response)
        expected = expected.gather(-1, torch.tensor(rollout.response)[:, None])[:, 0]
        torch.testing.assert_close(experience.teacher_hidden[i], states, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(experience.teacher_logprobs[i], expected, rtol=1e-4, atol=1e-4)


def test_sampled_logprobs_are_the_students_own(tmp_path):
    for rollout in observed(tmp_path).rollouts:
        own = logprobs(STUDENT, rollout.prompt.student, rollout.response)
        own = own.gather(-1, torch.tensor(rollout.response)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), own, rtol=1e-4, atol=1e-4)


def test_a_rank_that_starts_later_sees_the_later_rollouts_of_the_update(tmp_path):
    rank = observer(tmp_path)
    whole = rank.observe(PROMPTS, step=3)
    second = rank.observe(PROMPTS[4:], step=3, numbers=range(4, 8))
    later = rank.observe(PROMPTS, step=4)
    answers = [[r.response for r in some.rollouts] for some in (whole, second, later)]
    assert answers[1] == answers[0][4:]
    assert answers[2] != answers[0]


def test_answers_written_beforehand_are_taken_as_they_are(tmp_path):
    written = [replace(prompt, response=(7, 8, EOS)) for prompt in PROMPTS]
    experience = observer(tmp_path, method="opd").observe(written, step=0)
    assert [r.response for r in experience.rollouts] == [(7, 8, EOS)] * 8
    assert all(r.logprobs == () and r.finished for r in experience.rollouts)


# Candidates


UNLIKE = {"teachability", "random", "start", "rewritten"}  # tried elsewhere


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", sorted({*DETECTORS} - UNLIKE))
def test_candidates_are_the_loudest_tokens_by_the_chosen_loss(tmp_path, kind, temperature):
    experience = observed(
        tmp_path,
        candidate_loss=kind,
        temperature=temperature,
        window_gap=1,
        chunk_tokens=7,
        score_batch_size=len(PROMPTS),
    )
    losses = token_losses(experience.rollouts, kind, temperature)
    for rollout, found, loss in zip(experience.rollouts, experience.forks, losses, strict=True):
        count = max(1, round(0.3 * len(rollout.response)))
        assert [f.position for f in found] == sorted(loss.topk(count).indices.tolist())
        for fork in found:
            assert fork.token_loss == pytest.approx(loss[fork.position].item(), abs=1e-4)


def test_what_the_teacher_rewrites_is_counted_by_its_own_greedy_words(tmp_path):
    seen = observer(tmp_path, candidate_loss="rewritten")
    rollouts = seen.roll_out(PROMPTS, range(len(PROMPTS)))
    found = seen.rewritten(rollouts, seen.score(rollouts), range(len(PROMPTS)))
    for rollout, shares in zip(rollouts, found, strict=True):
        for t, share in enumerate(shares.tolist()):
            own = rollout.response[t : t + REWRITTEN]
            ids = rollout.prompt.teacher + rollout.response[:t]
            window = greedy(TEACHER, ids, REWRITTEN)
            length = max(len(own), len(window)) if rollout.finished else len(own)
            other = sum(own[i : i + 1] != window[i : i + 1] for i in range(length))
            assert share == pytest.approx(other / length)


def test_the_losses_choose_differently(tmp_path):
    chosen = {
        tuple(f.position for _, f in forks(observed(tmp_path, candidate_loss=kind, window_gap=1)))
        for kind in ("sampled", "reverse_kl", "teacher_nll")
    }
    assert len(chosen) == 3


def test_candidates_below_the_threshold_are_left_out(tmp_path):
    everything = [f.token_loss for _, f in forks(observed(tmp_path, window_gap=1))]
    limit = sorted(everything)[len(everything) // 2]
    kept = [
        f.token_loss for _, f in forks(observed(tmp_path, window_gap=1, candidate_threshold=limit))
    ]
    assert kept == [loss for loss in everything if loss >= limit]
    assert 0 < len(kept) < len(everything)


def test_windows_are_disjoint_unless_a_smaller_gap_is_asked_for(tmp_path):
    def gaps(**options) -> list[int]:
        found = observed(tmp_path, **options).forks
        return [b.position - a.position for row in found for a, b in itertools.pairwise(row)]

    assert min(gaps()) >= K
    assert 2 <= min(gaps(window_gap=2)) < K
    assert min(gaps(window_gap=1)) == 1


def test_no_candidate_gives_the_guidance_of_opd(tmp_path):
    experience = observed(tmp_path, candidate_threshold=1e9)
    assert experience.forks == ((),) * 8
    assert experience.guidance == observed(tmp_path, method="opd").guidance


# Windows


def test_a_students_window_is_its_own_rollout_from_the_candidate_on(tmp_path):
    looking = observer(tmp_path)
    rollouts = looking.observe(PROMPTS, step=3).rollouts
    windows = evidence(looking, rollouts).windows
    lengths = set()
    for k, (row, start) in enumerate(zip(windows.row, windows.start, strict=True)):
        own = windows.student_tokens[k][windows.student_mask[k]].tolist()
        assert own == list(rollouts[row].response[start : start + K])
        lengths.add(len(own))
    assert len(lengths) > 1  # some windows meet the end


def test_a_teachers_window_is_its_greedy_continuation_of_the_shared_prefix(tmp_path):
    found = forks(observed(tmp_path))
    assert len(found) > 10
    for rollout, fork in found:
        prefix = [*rollout.prompt.teacher, *rollout.response[: fork.position]]
        window = greedy(TEACHER, prefix, K)
        if not rollout.finished:  # the limit cut the student's window: the teacher's is cut alike
            window = window[: fork.student_length]
        assert fork.teacher_tokens == window


def test_a_window_cut_by_the_length_limit_is_compared_over_what_both_have(tmp_path):
    """A student that writes just what the teacher would is at distance 0, wherever it is cut."""
    prompt, looking = PROMPTS[0], observer(tmp_path, ot_threshold=0.0)
    response = greedy(TEACHER, list(prompt.teacher), 7)
    cut = Rollout(prompt, response, (-9.0,) * len(response), finished=False)
    (found,) = looking.inspect([cut], [1], METHODS["topd"]).forks
    assert EOS not in response
    assert [f.distance for f in found] == pytest.approx([0.0] * len(found), abs=1e-6)
    assert {len(f.teacher_tokens) == f.student_length for f in found} == {True}


@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_where_the_student_has_ended_its_last_token_meets_the_teachers_next(tmp_path, solver):
    """Not all that the teacher writes next, of which its next token would be one part in K."""
    watch, written = observer(tmp_path, solver=solver), tuple(range(20, 20 + K))
    rollout = Rollout(Prompt(0, (1,), (1,)), (5, 6, 7, EOS), (0.0,) * 4, finished=True)
    starts, windows = [(0, 3), (0, 2)], [Generation(written, (0.0,) * K, finished=False)] * 2
    paired = pair_windows([rollout], starts, windows, K)
    found = watch.compare(paired)
    guided = sparse_soft_targets(found.plan, paired.teacher_tokens)
    assert guided[0][0] == ((20,), (1.0,))
    assert {token for tokens, _ in guided[1] for token in tokens} == {20, 21}
    table = torch.nn.functional.normalize(TEACHER.get_input_embeddings().weight.detach(), dim=-1)
    assert found.distance[0].item() == pytest.approx(1 - float(table[EOS] @ table[20]), abs=1e-5)
    assert paired.teacher_mask.all()  # methods that learn the window itself have all of it


def test_no_cache_is_kept_where_no_window_follows(tmp_path, monkeypatch):
    kept = []
    score = HFEngine.score

    def noted(self, *args, **kwargs):
        found = score(self, *args, **kwargs)
        kept.append(found.prefix.cache is not None)
        return found

    monkeypatch.setattr(HFEngine, "score", noted)
    observed(tmp_path, method="opd")
    assert kept
    assert not any(kept)
    kept.clear()
    observed(tmp_path, method="topd")
    assert any(kept)


def test_a_teachers_window_ends_with_its_end_of_sequence_token(tmp_path):
    found = forks(observed(tmp_path, window_length=20, window_gap=1))
    assert all(EOS not in fork.teacher_tokens[:-1] for _, fork in found)
    ended = [fork.teacher_tokens[-1] == EOS for _, fork in found]
    limits = [20 if rollout.finished else fork.student_length for rollout, fork in found]
    full = [len(f.teacher_tokens) == n for (_, f), n in zip(found, limits, strict=True)]
    assert set(ended) == {True, False}
    assert all(end or whole for end, whole in zip(ended, full, strict=True))


def test_sampled_windows_depend_on_the_seed_alone(tmp_path):
    greedy_ = observed(tmp_path).forks
    sampled = [
        observed(tmp_path, window_temperature=1.0, score_batch_size=n).forks for n in (1, 3, 8)
    ]
    tokens = [[f.teacher_tokens for row in found for f in row] for found in (*sampled, greedy_)]
    assert tokens[0] == tokens[1] == tokens[2] != tokens[3]


def test_methods_without_windows_decode_none(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the teacher decoded")

    monkeypatch.setattr(HFEngine, "continue_from", refuse)
    assert observed(tmp_path, method="opd").forks == ((),) * 8
    looking = observer(tmp_path, method="topd")
    assert looking.observe(PROMPTS, step=3, look_ahead=False).forks == ((),) * 8
    with pytest.raises(AssertionError, match="decoded"):
        looking.observe(PROMPTS, step=3)


# Transport and verdict


@pytest.mark.parametrize("embedding", ["teacher", "student"])
@pytest.mark.parametrize("position_weight", [0.0, 0.5])
def test_distances_are_those_of_the_chosen_embedding_and_ground_cost(
    tmp_path, embedding, position_weight
):
    reader = TEACHER if embedding == "teacher" else STUDENT
    table = reader.get_input_embeddings().weight.detach().double()
    table = table / table.norm(dim=-1, keepdim=True).clamp(min=1e-12)  # that of <pad> is 0
    experience = observed(tmp_path, embedding=embedding, position_weight=position_weight)
    for rollout, fork in forks(experience):
        own = torch.tensor(rollout.response[fork.position : fork.position + K])
        theirs = torch.tensor(fork.teacher_tokens)[: len(own)]
        steps = (torch.arange(len(own))[:, None] - torch.arange(len(theirs))).abs()
        cost = 1 - table[own] @ table[theirs].T
        cost = cost.clamp(min=0) + position_weight * steps / K
        expected = transport.solve(cost[None]).distance.item()
        assert fork.distance == pytest.approx(expected, abs=1e-5)


def test_position_weight_changes_which_tokens_meet(tmp_path):
    free, ordered = (
        observed(tmp_path, position_weight=eta, ot_threshold=0.0).guidance for eta in (0.0, 100.0)
    )
    assert free != ordered
    forks_ = observed(tmp_path, position_weight=100.0, ot_threshold=0.0).forks
    for guidance, found in zip(ordered, forks_, strict=True):
        targets = iter(guidance.targets)
        for fork in found:
            own = [next(targets) for _ in range(fork.student_length)]
            if len(fork.teacher_tokens) == fork.student_length:  # then token i meets token i
                assert [t.tokens for t in own] == [(x,) for x in fork.teacher_tokens]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_nearest_share_of_the_batch_are_false_alarms(tmp_path, share):
    found = [fork for _, fork in forks(observed(tmp_path, false_alarm_share=share))]
    alarms = [fork.distance for fork in found if not fork.real]
    assert len(alarms) == round(share * len(found))
    assert sorted(f.distance for f in found)[: len(alarms)] == sorted(alarms)


def test_an_ot_threshold_decides_by_itself(tmp_path):
    found = [fork for _, fork in forks(observed(tmp_path, ot_threshold=0.9))]
    assert {fork.real for fork in found} == {True, False}
    assert all(fork.real == (fork.distance >= 0.9) for fork in found)


def test_sinkhorn_distances_exceed_the_exact_ones_by_at_most_the_entropy(tmp_path):
    exact = [f.distance for _, f in forks(observed(tmp_path))]
    soft = [f.distance for _, f in forks(observed(tmp_path, solver="sinkhorn", epsilon=0.06))]
    excess = [b - a for a, b in zip(exact, soft, strict=True)]
    assert min(excess) > -1e-5
    assert 1e-3 < max(excess) < 0.06 * math.log(K)


# Batches and edges


@pytest.mark.parametrize("kind", ["sampled", "reverse_kl"])
def test_scoring_in_any_batch_size_gives_the_same_guidance(tmp_path, kind):
    whole = observed(tmp_path, score_batch_size=8, candidate_loss=kind)
    assert any(guidance.targets for guidance in whole.guidance)
    for size in (1, 3):
        part = observed(tmp_path, score_batch_size=size, candidate_loss=kind)
        assert part.rollouts == whole.rollouts
        assert part.guidance == whole.guidance
        for (_, a), (_, b) in zip(forks(part), forks(whole), strict=True):
            near = {"distance": 0.0, "token_loss": 0.0}
            assert a.model_copy(update=near) == b.model_copy(update=near)
            assert (a.distance, a.token_loss) == pytest.approx((b.distance, b.token_loss), abs=1e-4)


def test_rollouts_that_end_at_once_and_rollouts_that_never_end(tmp_path):
    looking = observer(tmp_path, ot_threshold=0.0)
    short = Rollout(PROMPTS[0], (EOS,), (-0.1,), finished=True)
    long = Rollout(PROMPTS[1], (9, 8) * 10, (-0.1,) * 20, finished=False)
    experience = looking.inspect([short, long, short], [1, 2, 3], METHODS["topd"])
    first, second, third = experience.forks
    assert [(f.position, f.student_length) for f in first] == [(0, 1)]
    assert first == third
    assert all(f.student_length == min(K, 20 - f.position) for f in second)
    assert [t.position for t in experience.guidance[0].targets] == [0]
    assert [len(g.weights) for g in experience.guidance] == [1, 20, 1]
    (target,) = experience.guidance[0].targets  # one token meets one
    assert (target.tokens, target.probabilities) == (first[0].teacher_tokens[:1], (1.0,))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_nan_in_the_teacher_is_reported_with_its_rollout(tmp_path, size):
    teacher = tiny_model("qwen3", seed=1)
    teacher.model.embed_tokens.weight.data[50] = float("nan")
    prompts = [*PROMPTS]
    prompts[5] = replace(prompts[5], teacher=(50, 26, 16))
    rollouts = [Rollout(p, (7, 8, 9), (-1.0,) * 3, finished=False) for p in prompts]
    looking = observer(tmp_path, teacher, score_batch_size=size)
    with pytest.raises(TOPDError, match=r"rollout 5, response token 0 \(prompt 15\)"):
        looking.inspect(rollouts, range(8), METHODS["opd"])


@pytest.mark.parametrize("position_weight", [0.0, 0.5])
def test_a_fork_does_not_depend_on_the_other_rollouts(tmp_path, position_weight):
    looking = observer(
        tmp_path, ot_threshold=0.0, window_length=40, position_weight=position_weight
    )
    looking.teacher = HFEngine(TEACHER, eos_ids=range(0, VOCAB, 4))  # its windows end soon
    rollouts = looking.observe(PROMPTS, step=3).rollouts
    whole = looking.inspect(rollouts, range(8), METHODS["topd"])
    for i in range(8):
        alone = looking.inspect(rollouts[i : i + 1], [i], METHODS["topd"])
        for one, same in zip(alone.forks[0], whole.forks[i], strict=True):
            assert one.teacher_tokens == same.teacher_tokens
            assert one.distance == pytest.approx(same.distance, abs=1e-5)


def test_a_fork_keeps_the_plan_of_its_own_window(tmp_path):
    """Uniform marginals over what is compared, and the plan's cost is the fork's distance."""
    for rollout, fork in forks(observed(tmp_path)):
        own = rollout.response[fork.position : fork.position + fork.student_length]
        plan = torch.zeros(len(own), len(fork.teacher_tokens))
        for i, j, mass in fork.plan:
            plan[i, j] = mass
        torch.testing.assert_close(plan.sum(1), torch.full((len(own),), 1 / len(own)))
        columns = min(len(own), len(fork.teacher_tokens))
        torch.testing.assert_close(plan.sum(0)[:columns], torch.full((columns,), 1 / columns))
        table = TEACHER.get_input_embeddings().weight.detach()
        cost = transport.ground_cost(
            table[list(own)][None], table[list(fork.teacher_tokens)][None]
        )[0]
        assert float((plan * cost).sum()) == pytest.approx(fork.distance, abs=1e-5)


def test_only_the_first_window_is_written_where_a_method_needs_no_other(tmp_path):
    options = {"method": "first_fork", "false_alarm_share": 0.0, "window_gap": 1}
    found = observed(tmp_path, **options)
    every = observed(tmp_path, **{**options, "ot_threshold": 0.0})  # the same verdicts, by distance
    assert [f[:1] for f in every.forks] == list(found.forks)
    assert any(len(f) > 1 for f in every.forks)
    assert found.guidance == every.guidance


@pytest.mark.parametrize(
    "options", [{}, {"solver": "sinkhorn", "epsilon": 0.2}, {"position_weight": 1.0}]
)
def test_windows_of_the_same_tokens_are_at_distance_zero(tmp_path, monkeypatch, options):
    """Not at the rounding of a cosine, nor at the entropy of a plan; other windows stay as they
    are: one that has a token more, and one that has another."""
    seen = observer(tmp_path, **options)
    texts = [torch.randint(6, VOCAB, (K,)).tolist() for _ in range(60)]
    rollouts = [Rollout(PROMPTS[0], tuple(text), (), finished=True) for text in texts]
    ends = [text[:-1] if i % 3 == 1 else [*text[:-1], 5] for i, text in enumerate(texts)]
    written = [Generation(tuple(t if i % 3 == 0 else e), (), True) for i, (t, e) in
               enumerate(zip(texts, ends, strict=True))]  # fmt: skip
    windows = pair_windows(rollouts, [(row, 0) for row in range(60)], written, K)
    found = seen.compare(windows)
    same = (torch.arange(60) % 3 == 0).cpu()
    assert torch.equal(found.distance == 0, same)
    monkeypatch.setattr(transport, "without_dust", lambda solved, *_: solved)
    bare = seen.compare(windows)
    assert (bare.distance[same] > 0).any()
    torch.testing.assert_close(found.distance[~same], bare.distance[~same], rtol=0, atol=0)
    torch.testing.assert_close(found.plan, bare.plan, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["topd", "first_fork"])
def test_a_student_that_is_its_teacher_has_no_candidate(method, tmp_path, caplog):
    """Whatever the quota or the surprise: there is no fork between equal models."""
    same = [Prompt(p.index, p.student, p.student) for p in PROMPTS]
    settings = {"method": method, "candidate_threshold": None}
    differ = observer(tmp_path, **settings).observe(same, step=3)
    assert any(differ.forks)
    equal = observer(tmp_path, STUDENT, **settings).observe(same, step=3)
    assert not any(equal.forks)
    assert not any(g.targets or g.branches or g.capped for g in equal.guidance)
    assert all(set(g.weights) <= {1.0} for g in equal.guidance)


def test_only_the_rollouts_that_differ_keep_their_candidates():
    """Mean gaps 0.0009 and 0.0011 nats; a rollout without log-probs of its own keeps its own."""

    def rollout(*logprobs: float, length: int) -> Rollout:
        return Rollout(Prompt(0, (1,), (1,)), (5,) * length, logprobs, finished=True)

    rollouts = [rollout(-1.0, -1.0, length=2), rollout(-1.0, length=1), rollout(length=2)]
    teachers = torch.tensor([[-1.0018, -1.0], [-1.0011, 9.9], [0.0, 0.0]])
    candidates = [(0, 1), (1, 0), (2, 1)]
    assert differing(rollouts, teachers, candidates) == [(1, 0), (2, 1)]
    assert differing(rollouts, teachers[:, :0], candidates) == candidates  # it tells none
