"""``topd probe`` on tiny real models: positions, resumption, refusals, the command."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from conftest import greedy_by_transformers, kill_at_write, load, read, tiny_model, write_pair
from topd import cli, transport
from topd.commands import terminal
from topd.commands.probe import ProbeConfig, choose, run_probe
from topd.commands.probe.statistics import GROUPS
from topd.commands.session import open_pair, read_analysis
from topd.config import TOPDConfig
from topd.errors import StoppedError, TOPDError
from topd.losses import token_divergence
from topd.methods import METHODS
from topd.runs.files import trim
from topd.seeds import sampling_seeds
from topd.training.experience import Observer
from topd.training.progress import Phases

SETTINGS = {
    "max_completion_length": 24,
    "window_length": 6,
    "candidate_fraction": 0.15,
    "seed": 3,
    "teacher_prompt": "{{ prompt }} {{ solution }}",
    "max_prompt_length": 100,
}
FOUND = "probe.json"
WORDS = ("--rollouts", "10", "--rollout_batch_size", "4", "--bootstrap", "40")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"), **SETTINGS)


def probe(recipe: Path, folder: Path, *words: str) -> Path:
    return run_probe(recipe, [*WORDS, "--output_dir", str(folder), *words])


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    return probe(recipe, tmp_path_factory.mktemp("finished") / "run")


# What is in the records


def test_the_run_folder_holds_all_that_its_legend_names(finished):
    names = {"run.json", "manifest.json", "rollouts.jsonl", "positions.jsonl", "metrics.jsonl"}
    assert {path.name for path in finished.iterdir()} == {*names, "tokens.jsonl", "probe.json"}
    texts = {one["id"]: one for one in read(finished / "tokens.jsonl")}
    assert len(texts) == len(read(finished / "tokens.jsonl"))
    for one in read(finished / "positions.jsonl"):
        assert {*one["student_tokens"], *one["teacher_tokens"]} <= set(texts)
    rollouts = read(finished / "rollouts.jsonl")
    assert [one["rollout"] for one in rollouts] == list(range(10))
    assert len({one["prompt"] for one in rollouts[:8]}) == 8  # every prompt once, then again
    run = load(finished / "run.json")
    assert run["command"] == "probe"
    assert run["config"]["rollouts"] == 10
    assert set(load(finished / "manifest.json")["models"]) == {"student", "teacher"}


@torch.no_grad()
def test_losses_are_those_of_the_models_own_logits(recipe, finished):
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(recipe.parent / name)
        for name in ("student", "teacher")
    )

    def logprobs(model, prompt, response):
        ids = torch.tensor([[*prompt, *response]])
        return model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)

    positions = read(finished / "positions.jsonl")
    for rollout in read(finished / "rollouts.jsonl"):
        assert rollout["prompt_ids"] != rollout["teacher_prompt_ids"]
        response = rollout["response_ids"]
        own = logprobs(student, rollout["prompt_ids"], response)
        theirs = logprobs(teacher, rollout["teacher_prompt_ids"], response)
        token = torch.tensor(response)[:, None]
        expected = {
            "token_loss": (own - theirs).gather(-1, token)[:, 0],
            "reverse_kl": token_divergence(own, theirs),
            "entropy": -(own.exp() * own).sum(-1),
        }
        for name in ("reverse_kl", "entropy"):
            found = torch.tensor(rollout[name])
            torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4)
        for one in positions:
            if one["rollout"] == rollout["rollout"]:
                for name, values in expected.items():
                    value = values[one["position"]].item()
                    assert one[name] == pytest.approx(value, rel=1e-4, abs=1e-4)


def test_the_teachers_window_is_its_greedy_path_from_the_same_prefix(recipe, finished):
    teacher = AutoModelForCausalLM.from_pretrained(recipe.parent / "teacher")
    rollouts = read(finished / "rollouts.jsonl")
    for one in read(finished / "positions.jsonl"):
        rollout = rollouts[one["rollout"]]
        t, response = one["position"], rollout["response_ids"]
        assert one["prompt"] == rollout["prompt"]
        assert one["student_tokens"] == response[t : t + 6]
        length = 6 if rollout["finished"] else min(6, len(response) - t)
        ids = rollout["teacher_prompt_ids"] + response[:t]
        assert tuple(one["teacher_tokens"]) == greedy_by_transformers(teacher, ids, length)


def test_distance_and_plan_are_optimal_transport_between_the_windows(recipe, finished):
    teacher = AutoModelForCausalLM.from_pretrained(recipe.parent / "teacher")
    table = teacher.get_input_embeddings().weight.detach()
    for one in read(finished / "positions.jsonl"):
        windows = [torch.tensor(one[name]) for name in ("student_tokens", "teacher_tokens")]
        windows[1] = windows[1][: len(windows[0])]
        cost = transport.ground_cost(*(table[window][None] for window in windows))
        assert one["distance"] == pytest.approx(transport.solve(cost).distance.item(), abs=1e-5)
        assert sum(mass for _, _, mass in one["plan"]) == pytest.approx(1, abs=1e-4)
        spent = sum(mass * cost[0, i, j].item() for i, j, mass in one["plan"])
        assert spent == pytest.approx(one["distance"], abs=1e-4)


def test_high_loss_positions_are_the_candidates_of_training(recipe, finished):
    prepared = read_analysis("probe", recipe, [*WORDS, "--output_dir", str(finished)], ProbeConfig)
    pair = open_pair(prepared, Phases())
    observer = Observer(pair.observer.student, pair.observer.teacher, prepared.args)
    questions = pair.questions(3, 1)
    prompts = [next(questions) for _ in range(10)]
    seeds = sampling_seeds(3, 0, 10)
    experience = observer.inspect(observer.roll_out(prompts, seeds), seeds, METHODS["topd"])
    forks = {
        (row, fork.position): fork.distance
        for row, found in enumerate(experience.forks)
        for fork in found
    }
    high = {
        (one["rollout"], one["position"]): one["distance"]
        for one in read(finished / "positions.jsonl")
        if one["group"] == "high"
    }
    assert high.keys() == forks.keys()
    assert len(high) > 10
    for place, distance in high.items():
        assert distance == pytest.approx(forks[place], abs=1e-5)


# Positions by group


def options(folder: Path = Path("unused"), **changes: Any) -> ProbeConfig:
    return ProbeConfig(output_dir=str(folder), use_cpu=True, **changes)


def test_low_loss_positions_are_among_the_quietest_and_no_candidates():
    loss = torch.tensor([0.1, -3.0, 0.2, 5.0, -0.1, 0.0, 2.0, -1.0])
    drawn = [choose(loss, [0], options(group_size=2), number) for number in range(200)]
    assert all(found["high"] == [0] for found in drawn)
    assert Counter(t for found in drawn for t in found["low"]).keys() == {2, 4, 5}
    assert all(found["low"] == sorted(set(found["low"])) for found in drawn)


def test_random_positions_are_uniform_over_all_tokens():
    loss = torch.linspace(0, 1, 8)
    drawn = [choose(loss, [7], options(group_size=2), number)["random"] for number in range(2000)]
    counts = Counter(t for found in drawn for t in found)
    assert all(len(set(found)) == 2 for found in drawn)
    assert sum(counts.values()) == 4000
    assert max(abs(counts[t] - 500) for t in range(8)) < 5 * np.sqrt(500)


def test_there_are_as_many_of_a_group_as_candidates_or_as_asked_for_or_as_there_are():
    loss = torch.zeros(10)
    sizes = {
        size: {k: len(v) for k, v in choose(loss, [1, 5], options(group_size=size), 0).items()}
        for size in (None, 4, 50)
    }
    assert sizes[None] == {"high": 2, "random": 2, "low": 2}
    assert sizes[4] == {"high": 2, "random": 4, "low": 4}
    assert sizes[50] == {"high": 2, "random": 10, "low": 4}  # five quietest, one a candidate


def test_positions_depend_on_seed_and_rollout_alone():
    loss = torch.arange(30.0)
    first, again = (choose(loss, [29], options(group_size=3), 4) for _ in range(2))
    assert first == again
    assert first != choose(loss, [29], options(group_size=3), 5)
    assert first != choose(loss, [29], options(group_size=3, seed=9), 4)


# The summary


def test_the_summary_is_that_of_the_positions(finished):
    positions, summary = read(finished / "positions.jsonl"), load(finished / "probe.json")
    by_group = {g: [p for p in positions if p["group"] == g] for g in GROUPS}
    low = np.array([p["distance"] for p in by_group["low"]])
    high = np.array([p["distance"] for p in by_group["high"]])
    threshold = np.quantile(low, 0.75)
    assert summary["threshold"]["value"] == pytest.approx(threshold)
    assert summary["false_alarm_share"]["value"] == pytest.approx((high < threshold).mean())
    assert summary["median_distance"]["high"]["value"] == pytest.approx(np.median(high))
    assert summary["positions"] == summary["positions_in_statistics"] == len(positions)
    assert {g: summary["distributions"][g]["count"] for g in GROUPS} == {
        g: len(some) for g, some in by_group.items()
    }
    assert [p["real"] for p in positions] == [p["distance"] >= threshold for p in positions]
    for name, verdict in (("false_alarms", False), ("forks", True)):
        some = [p for p in by_group["high"] if p["real"] is verdict]
        pairs = Counter((p["student_tokens"][0], p["teacher_tokens"][0]) for p in some)
        found = [(pair["student"], pair["teacher"]) for pair in summary["pairs"][name]]
        counts = [pair["count"] for pair in summary["pairs"][name]]
        assert counts == [pairs[pair] for pair in found]
        assert counts == sorted(pairs.values(), reverse=True)[:10]
    for name in ("pearson", "spearman"):
        found = summary["correlations"][name]["token_loss"]["all"]
        assert found["low"] <= found["value"] <= found["high"]


def test_full_windows_are_those_that_nothing_cut(finished):
    summary = load(finished / "probe.json")
    positions = read(finished / "positions.jsonl")
    full = [p for p in positions if len(p["student_tokens"]) == 6]
    found = summary["full_windows"]
    assert 0 < found["positions"] == len(full) < len(positions)
    high = [p["distance"] for p in full if p["group"] == "high"]
    low = [p["distance"] for p in full if p["group"] == "low"]
    assert found["median_distance"]["high"]["value"] == pytest.approx(np.median(high))
    assert found["false_alarm_share"]["value"] == pytest.approx(
        (np.array(high) < np.quantile(low, 0.75)).mean()
    )


def test_the_cost_is_counted_in_tokens_and_seconds(finished):
    cost = load(finished / "probe.json")["cost"]
    rollouts = read(finished / "rollouts.jsonl")
    answers = sum(len(r["response_ids"]) for r in rollouts)
    assert cost["tokens"]["student_sampled"] == answers
    prompts = sum(len(r["teacher_prompt_ids"]) for r in rollouts)
    assert cost["tokens"]["teacher_scored"] == answers + prompts
    shown = sum(len(p["teacher_tokens"]) for p in read(finished / "positions.jsonl"))
    assert cost["tokens"]["teacher_decoded"] >= shown  # windows may be cut after they are written
    phases = {"rollouts", "scoring", "windows", "transport"}
    assert set(cost["seconds"]) == {*phases, "all"}
    assert cost["seconds"]["all"] == pytest.approx(sum(cost["seconds"][p] for p in phases))


# Going on


def records(folder: Path) -> dict[str, Any]:
    """All that must not depend on interruptions."""
    summary = load(folder / "probe.json")
    del summary["cost"]["seconds"]
    names = ("rollouts.jsonl", "positions.jsonl")
    return {"summary": summary, **{name: (folder / name).read_bytes() for name in names}}


@pytest.mark.parametrize("writes", range(1, 9))
def test_a_killed_probe_goes_on_to_the_same_result_bit_for_bit(
    recipe, finished, tmp_path, monkeypatch, writes
):
    """Killed at each write of a batch's records, half of the last line written."""
    kill_at_write(monkeypatch, writes)
    with pytest.raises(StoppedError, match=f"Ctrl-C.*--output_dir {tmp_path}/run continues"):
        probe(recipe, tmp_path / "run")
    monkeypatch.undo()
    assert not (tmp_path / "run" / "probe.json").exists()
    probe(recipe, tmp_path / "run")
    assert records(tmp_path / "run") == records(finished)
    assert read(tmp_path / "run" / "tokens.jsonl") == read(finished / "tokens.jsonl")


def test_what_is_done_is_not_done_again(recipe, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(Observer, "roll_out", partial(pytest.fail, "sampled again"))
    before = records(finished)
    probe(recipe, finished)
    assert records(finished) == before


@pytest.mark.parametrize("other", ["6", "13"])
def test_a_probe_goes_on_to_more_rollouts_or_fewer(recipe, finished, tmp_path, other):
    """As if they had been asked for at once; 10, 6 and 13 all end with a smaller batch of 4."""
    probe(recipe, tmp_path / "run", "--rollouts", other)
    assert load(tmp_path / "run" / "probe.json")["rollouts"] == int(other)
    probe(recipe, tmp_path / "run")
    assert records(tmp_path / "run") == records(finished)
    assert load(tmp_path / "run" / "run.json")["config"]["rollouts"] == 10


def test_an_analysis_has_no_update_for_rollouts_of_a_prompt_to_divide(tmp_path):
    """Its remedy, per_device_train_batch_size, has no effect here and is refused."""
    assert options(tmp_path, num_generations=3).num_generations == 3


def test_a_file_is_cut_before_its_first_bad_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"n": 0}\n{"n": 1}\n{"n": 2}\n{"n"')
    assert trim(path) == 3
    assert path.read_text() == '{"n": 0}\n{"n": 1}\n{"n": 2}\n'
    assert trim(path, lambda record: record["n"] < 1) == 1
    assert path.read_text() == '{"n": 0}\n'
    assert trim(tmp_path / "none.jsonl") == 0


# Refusals


def refusal(recipe: Path, *words: str) -> str:
    with pytest.raises(TOPDError) as caught:
        run_probe(recipe, words)
    return str(caught.value)


def test_a_folder_of_another_probe_is_refused_before_a_model_loads(recipe, finished, monkeypatch):
    monkeypatch.setattr("topd.commands.session.load_pair", partial(pytest.fail, "loaded"))
    words = (*WORDS, "--output_dir", str(finished))
    message = refusal(recipe, *words, "--seed", "4")
    assert "seed = 3, now it is 4" in message
    assert "Choose another folder" in message
    assert "teacher" in refusal(recipe, *words, "--teacher.dtype", "bfloat16")


def test_a_folder_of_a_training_run_is_refused(recipe, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {}, "config": {}}))
    message = refusal(recipe, "--output_dir", str(tmp_path))
    assert "another kind (training)" in message


def test_a_folder_whose_settings_are_damaged_is_refused(recipe, tmp_path):
    (tmp_path / "run.json").write_bytes(b"\xff{")
    assert "run.json: not valid JSON" in refusal(recipe, "--output_dir", str(tmp_path))


def test_other_weights_under_the_same_name_are_refused(tmp_path):
    recipe = write_pair(tmp_path, **SETTINGS)
    probe(recipe, tmp_path / "run")
    tiny_model(seed=7).save_pretrained(tmp_path / "teacher")
    message = refusal(recipe, *WORDS, "--output_dir", str(tmp_path / "run"))
    assert "other models" in message


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--rollouts", "0"), "rollouts: 0 must be at least 1"),
        (("--group_size", "0"), "group_size: 0 must be at least 1"),
        (("--bootstrap", "39"), "bootstrap: 39 must be at least 40: fewer resamples"),
        (("--rollout_batch_size", "-2"), "rollout_batch_size: -2"),
        (("--low_share", "0"), "low_share: 0.0 must be above 0"),
        (("--low_share", "1.5"), "low_share: 1.5"),
        (("--rolouts", "8"), "Did you mean rollouts?"),
        (("--learning_rate", "1"), "learning_rate: has no effect on topd probe. Leave it out."),
        (("--max_steps", "9"), "max_steps: has no effect"),
        (("--false_alarm_share", "0.1"), "false_alarm_share: has no effect"),
        (("--evaluation.limit", "3"), "evaluation"),
        (("--window_length", "0"), "window_length"),
        (("--max_completion_length", "600"), "positions"),
    ],
)
def test_bad_options_are_refused_with_their_name(recipe, tmp_path, words, part):
    assert part in refusal(recipe, "--output_dir", str(tmp_path / "run"), *words)


@pytest.mark.parametrize(
    "word",
    ["save_strategy=no", "eval_strategy=no", "warmup_steps=0", "logging_strategy=no"]
    + ["stop_patience=null", "lora=null", "overlap=false", "push_to_hub=false"],
)
def test_what_says_what_an_analysis_does_anyway_is_taken(recipe, tmp_path, word):
    folder = tmp_path / "run"
    read_analysis("probe", recipe, [*WORDS, f"--{word}", f"--output_dir={folder}"], ProbeConfig)


def test_rollouts_too_short_for_a_threshold_are_refused(recipe, tmp_path):
    words = (*WORDS, "--max_completion_length", "1", "--output_dir", str(tmp_path / "run"))
    message = refusal(recipe, *words)
    assert "no low-loss position" in message
    assert "max_completion_length" in message


@pytest.mark.parametrize(
    ("pair", "words", "part"),
    [
        ("student", (), r"two models agree .* Are they the same model"),
        ("teacher", ("--candidate_threshold", "50"), r"candidate_threshold: 50.* Lower candidate_"),
    ],
)
def test_without_a_candidate_the_reason_is_said_and_groups_of_a_size_are_compared(
    recipe, tmp_path, pair, words, part
):
    """A threshold that no token passes; a student that is its teacher, as in training."""
    same = ("--teacher", str(recipe.parent / pair), "--teacher_prompt", "{{ prompt }}")
    words = (*WORDS, *same, *words, "--rollouts", "4", "--output_dir", str(tmp_path / "run"))
    message = refusal(recipe, *words)
    assert re.search(f"no candidate in any rollout.*{part}.* set group_size", message)
    found = load(run_probe(recipe, [*words[:-1], str(tmp_path / "2"), "--group_size", "2"]) / FOUND)
    assert [found["distributions"][g]["count"] for g in GROUPS] == [0, 8, 8]
    assert (found["verdict"], found["false_alarm_share"]["value"]) == ("undecided", None)


def test_training_does_not_know_the_options_of_a_probe():
    with pytest.raises(TypeError, match="rollouts"):
        TOPDConfig(rollouts=3)


# The command


def command(recipe: Path, *words: str) -> Any:
    return CliRunner().invoke(cli.app, ["probe", str(recipe), *words])


def test_the_command_prints_tables_within_80_columns(recipe, finished, monkeypatch):
    monkeypatch.setattr(terminal, "console", Console(width=80))
    result = command(recipe, *WORDS, "--output_dir", str(finished), "--quiet")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80 + len(str(finished))
    table = [line for line in result.output.splitlines() if line and line[0] in "┏┃┡│└"]
    assert max(map(len, table)) <= 80
    summary = load(finished / "probe.json")
    for shown in (
        f"{summary['median_distance']['high']['value']:.3f} [",
        f"ot_threshold for training: {summary['threshold']['value']:.3f}",
        f"False alarms among high-loss tokens: {100 * summary['false_alarm_share']['value']:.1f} %",
        f"Token loss as a guide: {summary['verdict']}",
        f"run folder: {finished}",
    ):
        assert shown in result.output


def test_the_folder_of_a_recipe_is_not_used_for_a_probe(tmp_path, monkeypatch):
    recipe = write_pair(tmp_path, **SETTINGS, output_dir=str(tmp_path / "training"))
    monkeypatch.chdir(tmp_path)
    result = command(recipe, *WORDS, "--rollouts", "2")
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("recipe-probe-")
    assert not (tmp_path / "training").exists()
