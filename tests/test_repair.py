"""``topd repair``: losses by hand, weights restored, samples, statistics, resumption, command."""

from __future__ import annotations

import hashlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from conftest import DEVICE, greedy_by_transformers, kill_at_write, load, read, write_pair
from topd import cli, transport
from topd.commands import repair, terminal
from topd.commands.probe import ProbeConfig
from topd.commands.probe.intervals import intervals
from topd.commands.repair import (
    Sample,
    correct,
    distance_to_teacher,
    find_samples,
    loss_on,
    restore,
    run_repair,
    snapshot,
    to_learn,
    treat,
)
from topd.commands.repair.config import TRIED, RepairConfig
from topd.commands.repair.statistics import PAPER, measure, read_table
from topd.commands.session import Pair, open_pair, read_analysis
from topd.config import TOPDConfig
from topd.errors import StoppedError, TOPDError
from topd.training.experience import Observer
from topd.training.progress import Phases

K = 5
SETTINGS = {
    "max_completion_length": 24,
    "window_length": K,
    "candidate_fraction": 0.15,
    "seed": 3,
    "learning_rate": 0.01,
    "teacher_prompt": "{{ prompt }} {{ solution }}",
    "max_prompt_length": 100,
}
WORDS = ("--samples", "3", "--rollout_batch_size", "4", "--bootstrap", "40", "--updates", "2")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"), **SETTINGS)


def run(recipe: Path, folder: Path, *words: str) -> Path:
    return run_repair(recipe, [*WORDS, "--output_dir", str(folder), *words])


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    return run(recipe, tmp_path_factory.mktemp("finished") / "run")


def prepared(recipe: Path, folder: Path, *words: str) -> tuple[Pair, RepairConfig]:
    given = [*WORDS, "--output_dir", str(folder / "unused"), *words]
    analysis = read_analysis("repair", recipe, given, RepairConfig)
    return open_pair(analysis, Phases()), analysis.args


def some_samples(pair: Pair, args: RepairConfig, count: int = 3) -> list[Sample]:
    found = find_samples(pair, args, 0)
    return [next(found) for _ in range(count)]


def weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


# Losses


@torch.no_grad()
def logprobs_of(model: nn.Module, prefix: tuple[int, ...], window: tuple[int, ...]) -> Tensor:
    """[n V] nats, from the model's own logits."""
    ids = torch.tensor([[*prefix, *window]]).to(DEVICE)
    return model(input_ids=ids).logits[0, len(prefix) - 1 : -1].log_softmax(-1).cpu()


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def losses_by_hand(pair: Pair, sample: Sample, weight: float) -> dict[str, float]:
    """What training with each method would have this fork cost, from whole distributions."""
    prompt, own, theirs = sample.fork.prompt, sample.fork.response, sample.teacher_tokens
    s_own, s_along = (logprobs_of(pair.student, prompt.student, w) for w in (own, theirs))
    t_own, t_along = (logprobs_of(pair.teacher, prompt.teacher, w) for w in (own, theirs))
    divergence = reverse_kl(s_own, t_own)
    opd = divergence.mean().item()
    sft = -s_along.gather(-1, torch.tensor(theirs)[:, None]).mean().item()
    kd = reverse_kl(t_along, s_along).mean().item()
    plan = sample.seen.evidence.transport.plan[0, : len(own), : len(theirs)].double()
    onehot = nn.functional.one_hot(torch.tensor(theirs), s_own.shape[-1]).double()
    target = plan @ onehot / plan.sum(-1, keepdim=True)
    target_kl = (torch.xlogy(target, target) - target * s_own).sum(-1).mean().item()
    faded = torch.tensor([1.0, *[0.3] * (len(own) - 1)])
    return {
        "opd": opd,
        "topd": opd + weight * target_kl,
        "window_sft": opd + weight * sft,
        "window_kd": opd + weight * kd,
        "first_fork": (faded * divergence).mean().item() + weight * kd,
        "olive": weight * sft,
    }


def test_losses_are_those_of_training_by_hand(recipe, tmp_path):
    names = "[opd, topd, window_sft, window_kd, first_fork, olive]"
    pair, args = prepared(recipe, tmp_path, "--methods", names, "--trajectory_weight", "0.7")
    for sample in some_samples(pair, args):
        expected = losses_by_hand(pair, sample, 0.7)
        assert tuple(expected) == args.method_names
        for name, value in expected.items():
            batch = to_learn(pair, args, sample, name)
            loss = loss_on(pair, args.loss_of(name), batch).item()
            assert loss == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_a_method_brings_its_settings_of_the_loss_unless_they_are_given(recipe, tmp_path):
    _, args = prepared(recipe, tmp_path, "--method", "topd")
    assert args.loss_of("first_fork").trajectory_weight == 0.5
    assert args.loss_of("window_sft").trajectory_weight == RepairConfig.trajectory_weight == 0.1
    _, args = prepared(recipe, tmp_path, "--trajectory_weight", "0.25")
    assert {args.loss_of(name).trajectory_weight for name in TRIED} == {0.25}


def test_options_are_those_of_the_method_that_they_belong_to(recipe, tmp_path):
    words = ("--method", "iw_opd", "--method_options", "{gamma: 0.0}")
    pair, args = prepared(recipe, tmp_path, *words, "--methods", "[opd, iw_opd]")
    (sample,) = some_samples(pair, args, 1)
    plain, weighted = (to_learn(pair, args, sample, name) for name in args.method_names)
    assert torch.equal(plain["weights"], weighted["weights"])


@pytest.mark.parametrize("name", ["kl_top", "teachability", "relay", "negative"])
def test_every_kind_of_method_can_be_tried(recipe, tmp_path, name):
    pair, args = prepared(recipe, tmp_path, "--methods", name)
    assert args.method_names == (name,)
    (sample,) = some_samples(pair, args, 1)
    start, weights = weights_hash(pair.student), snapshot(pair.student)
    correct(pair, args, sample, name)
    assert weights_hash(pair.student) != start
    restore(pair.student, weights)


def test_a_method_of_ones_own_is_tried(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_repair_guides.py").write_text(
        "from topd.methods import Method, window_sft\n"
        "def mine(evidence):\n    return window_sft(evidence)\n"
        "heavy = Method(mine, looks_ahead=True, settings={'trajectory_weight': 2.0})\n"
    )
    own = "my_repair_guides:heavy"
    folder = run(recipe, tmp_path / "run", "--methods", f"[window_sft, '{own}']")
    summary = load(folder / "repair.json")
    assert list(summary["arms"]) == ["before", "window_sft", own]
    assert summary["trajectory_weight"] == {"window_sft": 0.1, own: 2.0}
    pair, args = prepared(recipe, tmp_path, "--methods", f"[window_sft, '{own}']")
    (sample,) = some_samples(pair, args, 1)
    sft, heavy = (to_learn(pair, args, sample, name) for name in args.method_names)
    assert heavy["branches"][0]["tokens"].tolist() == sft["branches"][0]["tokens"].tolist()
    expected = losses_by_hand(pair, sample, 2.0)["window_sft"]
    assert loss_on(pair, args.loss_of(own), heavy).item() == pytest.approx(expected, rel=1e-4)


# Samples


def test_samples_are_real_divergent_points_with_a_whole_window_one_a_rollout(recipe, tmp_path):
    pair, args = prepared(recipe, tmp_path, "--ot_threshold", "0.85")
    samples = some_samples(pair, args, 8)
    numbers = [sample.number for sample in samples]
    assert numbers == sorted(set(numbers))
    teacher = AutoModelForCausalLM.from_pretrained(recipe.parent / "teacher")
    table = teacher.get_input_embeddings().weight.detach()
    for sample in samples:
        rollout, t, fork = sample.rollout, sample.position, sample.fork
        assert fork.prompt.student == rollout.prompt.student + rollout.response[:t]
        assert fork.prompt.teacher == rollout.prompt.teacher + rollout.response[:t]
        assert fork.response == rollout.response[t : t + K]
        assert rollout.finished or len(fork.response) == K
        ids = rollout.prompt.teacher + rollout.response[:t]
        assert sample.teacher_tokens == greedy_by_transformers(teacher, ids, K)
        cost = transport.ground_cost(
            table[torch.tensor(fork.response)][None],
            table[torch.tensor(sample.teacher_tokens[: len(fork.response)])][None],
        )
        assert sample.distance == pytest.approx(transport.solve(cost).distance.item(), abs=1e-5)
        assert sample.distance >= 0.85
        evidence, both = sample.seen.evidence, cost.shape[-1]  # the teacher's rest is left out
        plan = evidence.transport.plan[0, : len(fork.response)]
        assert (plan[:, :both] * cost[0]).sum().item() == pytest.approx(sample.distance, abs=1e-5)
        assert not plan[:, both:].any()
        assert evidence.real.tolist() == [True]
        assert evidence.windows.start.tolist() == [0]


# The experiment


def test_every_method_starts_from_the_same_weights_which_are_back_at_the_end(
    recipe, tmp_path, monkeypatch
):
    pair, args = prepared(recipe, tmp_path)
    start, seen, after = weights_hash(pair.student), [], []

    def spied(pair: Pair, args: RepairConfig, sample: Sample, name: str) -> None:
        seen.append(weights_hash(pair.student))
        correct(pair, args, sample, name)
        after.append(weights_hash(pair.student))

    monkeypatch.setattr(repair, "correct", spied)
    weights = snapshot(pair.student)
    for sample in some_samples(pair, args, 2):
        list(treat(pair, args, sample, weights))
    assert seen == [start] * 2 * len(TRIED)
    assert start not in after
    assert len(set(after)) == len(after)
    assert weights_hash(pair.student) == start


def test_the_optimiser_of_a_method_knows_nothing_of_the_methods_before(recipe, tmp_path):
    found = {}
    for names in ("[window_sft, opd]", "[opd]"):
        pair, args = prepared(recipe, tmp_path, "--methods", names)
        (sample,) = some_samples(pair, args, 1)
        weights = snapshot(pair.student)
        kept = {}

        def spied(pair, args, sample, name, kept=kept):
            correct(pair, args, sample, name)
            kept[name] = weights_hash(pair.student)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(repair, "correct", spied)
            list(treat(pair, args, sample, weights))
        found[names] = kept["opd"]
    assert len(set(found.values())) == 1


def test_restore_undoes_anything():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    saved, before = snapshot(model), weights_hash(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7).add_(1e-9)
    assert weights_hash(model) != before
    restore(model, saved)
    assert weights_hash(model) == before


@pytest.mark.parametrize("name", ["olive", "window_sft"])
def test_enough_updates_along_the_teachers_window_repair_the_fork(recipe, tmp_path, name):
    pair, args = prepared(recipe, tmp_path, "--updates", "150")
    args.learning_rate = 3e-3
    for sample in some_samples(pair, args, 2):
        before, tokens = distance_to_teacher(pair, args, sample)
        assert tokens != sample.teacher_tokens
        weights = snapshot(pair.student)
        correct(pair, args, sample, name)
        after, tokens = distance_to_teacher(pair, args, sample)
        restore(pair.student, weights)
        if name == "olive":
            assert tokens == sample.teacher_tokens
            assert after == pytest.approx(0, abs=1e-5)
        assert after < before


def test_opd_lowers_the_divergence_along_the_students_own_window(recipe, tmp_path):
    pair, args = prepared(recipe, tmp_path, "--updates", "20")
    args.learning_rate = 3e-3
    for sample in some_samples(pair, args, 2):
        weights, values = snapshot(pair.student), []
        batch = to_learn(pair, args, sample, "opd")
        for _ in range(2):
            with torch.no_grad():
                values.append(loss_on(pair, args, batch).item())
            correct(pair, args, sample, "opd")
        restore(pair.student, weights)
        assert values[1] < 0.7 * values[0]


@pytest.mark.parametrize("norm", ["1e9", "0"])
def test_one_update_is_one_step_of_adamw(recipe, tmp_path, norm):
    """By hand, from the gradient of the loss: lr g / (|g| + eps) wherever there is a gradient.

    A norm of 0 clips nothing, as in training.
    """
    pair, args = prepared(recipe, tmp_path, "--updates", "1", "--max_grad_norm", norm)
    (sample,) = some_samples(pair, args, 1)
    weights = snapshot(pair.student)
    loss_on(pair, args, to_learn(pair, args, sample, "topd")).backward()
    gradients = {n: p.grad.clone() for n, p in pair.student.named_parameters()}
    pair.student.zero_grad()
    correct(pair, args, sample, "topd")
    for name, parameter in pair.student.named_parameters():
        gradient = gradients[name]
        expected = weights[name] - 0.01 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.data, expected, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in pair.student.parameters())


# Records and summary


def test_the_run_folder_holds_all_that_its_legend_names(finished):
    names = {"run.json", "manifest.json", "rollouts.jsonl", "samples.jsonl", "metrics.jsonl"}
    assert {path.name for path in finished.iterdir()} == {*names, "tokens.jsonl", "repair.json"}
    texts = {one["id"]: one for one in read(finished / "tokens.jsonl")}
    assert len(texts) == len(read(finished / "tokens.jsonl"))
    for one in read(finished / "samples.jsonl"):
        assert {*one["student_tokens"], *one.get("teacher_tokens", ())} <= set(texts)
    samples = read(finished / "samples.jsonl")
    places = [(one["sample"], one["arm"]) for one in samples]
    assert places == [(i, arm) for i in range(3) for arm in ("before", *TRIED)]
    rollouts = {one["rollout"]: one for one in read(finished / "rollouts.jsonl")}
    assert len(rollouts) == 3
    for one in samples:
        assert one["prompt"] == rollouts[one["rollout"]]["prompt"]
        assert 1 <= len(one["student_tokens"]) <= K


def test_the_distance_before_is_that_of_the_students_greedy_continuation(recipe, finished):
    student = AutoModelForCausalLM.from_pretrained(recipe.parent / "student")
    teacher = AutoModelForCausalLM.from_pretrained(recipe.parent / "teacher")
    table = teacher.get_input_embeddings().weight.detach()
    rollouts = {one["rollout"]: one for one in read(finished / "rollouts.jsonl")}
    for one in (one for one in read(finished / "samples.jsonl") if one["arm"] == "before"):
        rollout = rollouts[one["rollout"]]
        ids = rollout["prompt_ids"] + rollout["response_ids"][: one["position"]]
        assert tuple(one["student_tokens"]) == greedy_by_transformers(student, ids, K)
        windows = (one["student_tokens"], one["teacher_tokens"])
        cost = transport.ground_cost(*(table[torch.tensor(window)][None] for window in windows))
        assert one["distance"] == pytest.approx(transport.solve(cost).distance.item(), abs=1e-5)


def table(**arms: list[float]) -> np.ndarray:
    names = list(arms)
    kind = np.dtype([("prompt", "i8"), ("found", "f8"), *((name, "f8") for name in names)])
    rows = zip(*arms.values(), strict=True)
    return np.array([(i, 0.0, *row) for i, row in enumerate(rows)], kind)


def test_means_reductions_and_paired_differences_by_hand():
    found = measure(table(before=[0.4, 0.8], opd=[0.2, 0.7], topd=[0.0, 0.3]))
    assert found["mean/before"] == pytest.approx(0.6)
    assert found["mean/opd"] == pytest.approx(0.45)
    assert found["reduction_percent/opd"] == pytest.approx(25)
    assert found["reduction_percent/topd"] == pytest.approx(75)
    assert found["difference_to_before/opd"] == pytest.approx(-0.15)
    assert found["difference_to_opd/topd"] == pytest.approx(-0.3)
    assert "difference_to_opd/opd" not in found


def test_the_papers_reductions_are_35_and_62_per_cent():
    found = measure(table(**{name: [value] for name, value in PAPER.items()}))
    assert round(found["reduction_percent/opd"]) == 35
    assert round(found["reduction_percent/topd"]) == 62


def test_no_reduction_is_claimed_where_nothing_was_apart():
    assert math.isnan(measure(table(before=[0.0], opd=[0.0]))["reduction_percent/opd"])


def test_intervals_are_paired():
    """Samples differ much, the arms by nearly a constant: the difference's interval is narrow."""
    before = np.random.default_rng(0).uniform(size=50)
    nearly = 0.125 + np.random.default_rng(1).uniform(-1e-4, 1e-4, size=50)
    columns = table(before=before.tolist(), opd=(before - nearly).tolist())
    found = intervals(columns, measure, repeats=50, seed=0)
    difference, mean = found["difference_to_before/opd"], found["mean/opd"]
    assert difference.low == pytest.approx(-0.125, abs=1e-4)
    assert difference.high == pytest.approx(-0.125, abs=1e-4)
    assert mean.high - mean.low > 0.1


def test_the_summary_is_that_of_the_samples(finished):
    summary, samples = load(finished / "repair.json"), read(finished / "samples.jsonl")
    assert summary["samples"] == 3
    assert summary["updates"] == 2
    assert summary["paper"] == {"before": 0.538, "opd": 0.350, "topd": 0.204}
    assert list(summary["arms"]) == ["before", *TRIED]
    for name, arm in summary["arms"].items():
        distances = [one["distance"] for one in samples if one["arm"] == name]
        assert arm["mean"]["value"] == pytest.approx(np.mean(distances))
        assert arm["median"] == pytest.approx(np.median(distances))
    assert set(summary["arms"]["before"]) == {"mean", "median"}
    assert "difference_to_opd" not in summary["arms"]["opd"]
    assert "difference_to_opd" in summary["arms"]["topd"]
    found = [one["found"] for one in samples if one["arm"] == "before"]
    assert summary["mean_distance_found"] == pytest.approx(np.mean(found))


def test_samples_are_read_as_a_table(tmp_path):
    lines = [
        {"sample": 0, "arm": "before", "distance": 0.5, "prompt": 7, "found": 0.9},
        {"sample": 0, "arm": "opd", "distance": 0.25, "prompt": 7},
        {"sample": 1, "arm": "before", "distance": 0.75, "prompt": 2, "found": 0.8},
        {"sample": 1, "arm": "opd", "distance": 0.125, "prompt": 2},
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_table(path, ("before", "opd"))
    assert found.tolist() == [(7, 0.9, 0.5, 0.25), (2, 0.8, 0.75, 0.125)]


# Going on


def records(folder: Path) -> dict[str, Any]:
    summary = load(folder / "repair.json")
    del summary["cost"]
    names = ("rollouts.jsonl", "samples.jsonl")
    return {"summary": summary, **{name: (folder / name).read_bytes() for name in names}}


@pytest.mark.parametrize("writes", range(1, 9))
def test_a_killed_repair_goes_on_to_the_same_result_bit_for_bit(
    recipe, finished, tmp_path, monkeypatch, writes
):
    kill_at_write(monkeypatch, writes)
    with pytest.raises(StoppedError, match=f"Ctrl-C.*--output_dir {tmp_path}/run continues"):
        run(recipe, tmp_path / "run")
    monkeypatch.undo()
    assert not (tmp_path / "run" / "repair.json").exists()
    run(recipe, tmp_path / "run")
    assert records(tmp_path / "run") == records(finished)
    assert read(tmp_path / "run" / "tokens.jsonl") == read(finished / "tokens.jsonl")


def test_what_is_done_is_not_done_again(recipe, finished, monkeypatch):
    monkeypatch.setattr(Observer, "roll_out", partial(pytest.fail, "sampled again"))
    before = records(finished)
    run(recipe, finished)
    assert records(finished) == before


@pytest.mark.parametrize("other", ["2", "5"])
def test_a_repair_goes_on_to_more_samples_or_fewer(recipe, finished, tmp_path, other):
    run(recipe, tmp_path / "run", "--samples", other)
    run(recipe, tmp_path / "run")
    assert records(tmp_path / "run") == records(finished)


# Refusals


def refusal(recipe: Path, *words: str) -> str:
    with pytest.raises(TOPDError) as caught:
        run_repair(recipe, words)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--samples", "0"), "samples: 0 must be at least 1"),
        (("--updates", "0"), "updates: 0 must be at least 1"),
        (("--overlap", "true"), "overlap: has no effect on topd repair. Leave it out."),
        (("--per_device_train_batch_size", "9"), "per_device_train_batch_size: has no effect"),
        (("--methods", "[opd, sft]"), "methods: 'sft' is not one of opd, first_fork"),
        (("--methods", "[opd, topd, opd]"), "methods: opd is there twice. Name it once."),
        (("--methods", "[downweight]"), "methods: downweight holds down the loss of false alarms"),
        (("--methods", "downweight_matched"), "a fork of a repair is real: it would be opd"),
        (
            ("--token_loss", "none"),  # whatever method is, which is not tried
            "methods: token_loss: none leaves opd nothing to learn. Choose a method with windows. "
            "Those to try are named in methods",
        ),
        (
            ("--methods", "[opd, olive]", "--trajectory_weight", "0"),
            "methods: trajectory_weight: 0 leaves olive nothing to learn",
        ),
        (("--fp16", "true"), "fp16: a repair does not scale its loss"),
        (
            ("--methods", "no_such_guides:sft"),
            "methods: no_such_guides:sft: 'no_such_guides'",
        ),
        (("--rollouts", "9"), "unknown key 'rollouts'"),
    ],
)
def test_bad_options_are_refused_with_their_name(recipe, tmp_path, words, part):
    assert part in refusal(recipe, "--output_dir", str(tmp_path / "run"), *words)


@pytest.mark.parametrize("kind", [RepairConfig, ProbeConfig])
@pytest.mark.parametrize(
    "options", [{"token_loss": "none"}, {"method": "olive", "trajectory_weight": 0.0}]
)
def test_what_method_would_learn_is_not_asked_where_it_is_not_trained(tmp_path, kind, options):
    tried = {"methods": ("topd", "window_sft")} if kind is RepairConfig else {}
    args = kind(output_dir=str(tmp_path), window_length=4, use_cpu=True, **tried, **options)
    assert args.token_loss == options.get("token_loss", "full")
    with pytest.raises(TOPDError, match=r"leaves .* nothing to learn"):
        TOPDConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_what_the_student_writes_after_a_window_has_to_fit(recipe, tmp_path):
    """512 positions; relay has the student write 24 tokens more."""
    words = ("--max_completion_length", "600", "--output_dir", str(tmp_path / "run"))
    tokens = [
        int(refusal(recipe, *words, "--methods", name).partition(" make ")[2].split()[0])
        for name in ("opd", "relay")
    ]
    assert tokens[1] - tokens[0] == 24


def test_a_folder_of_a_probe_is_refused(recipe, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"command": "probe"}))
    assert "another kind (probe)" in refusal(recipe, "--output_dir", str(tmp_path))


def test_another_number_of_updates_is_another_repair(recipe, finished):
    words = (*WORDS, "--output_dir", str(finished), "--updates", "3")
    assert "updates = 2, now it is 3" in refusal(recipe, *words)


@pytest.mark.parametrize(
    "change",
    [("--ot_threshold", "1.99"), ("--teacher", "student", "--teacher_prompt", "{{ prompt }}")],
)
def test_models_that_hardly_part_end_in_words(recipe, tmp_path, monkeypatch, change):
    """No window is as far apart; the same model has no candidate, as in training."""
    monkeypatch.setattr(repair, "ROLLOUTS_A_SAMPLE", 3)
    change = [str(recipe.parent / word) if word == "student" else word for word in change]
    words = (*WORDS, *change, "--output_dir", str(tmp_path / "run"))
    message = refusal(recipe, *words)
    assert "Rollouts on which both models agree have none" in message
    assert "only 0 of 3 real divergent points" in message
    assert "9 rollouts" in message
    assert "candidate_fraction" in message


# The command


def test_the_command_prints_a_table_within_80_columns(recipe, finished, monkeypatch):
    monkeypatch.setattr(terminal, "console", Console(width=80))
    words = [*WORDS, "--output_dir", str(finished), "--quiet"]
    result = CliRunner().invoke(cli.app, ["repair", str(recipe), *words])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert max(len(line) for line in lines if not line.startswith("run folder")) <= 80
    summary = load(finished / "repair.json")
    for name, arm in summary["arms"].items():
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert f"{arm['mean']['value']:.3f}" in line
        assert (arm["mean"]["low"], "[" in line) == (None, False)  # three prompts tell no interval
    assert "the paper's: before 0.538, opd 0.350, topd 0.204" in result.output
