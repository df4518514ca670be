"""Two real processes, by gloo, are one process with twice the accumulation; a hang fails.

accelerate runs DDP on a CPU where it is asked for FSDP. In tests/rank_worker.py it is made to
shard, with FSDP2 on a CPU mesh, by the code that it runs on GPUs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rank_worker
from rank_worker import CASES
from test_trainer import student
from topd import TOPDConfig
from topd.commands.audit import audit_run, replay_step
from topd.commands.audit.replay import _check_filled
from topd.commands.audit.settings import ranks_at
from topd.commands.train import run_recipe
from topd.errors import TOPDError
from topd.training.sharded import WholeCopy, check_kind, check_launch, fsdp_plugin
from topd.training.startup import check_optimizer

ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds; a hang, not a slow machine
TIMES = ("second", "runtime")
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(str(ROOT / name) for name in ("src", "tests"))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **more}


def ended(processes: list[subprocess.Popen[str]]) -> None:
    """Wait for all; on a failure or a hang end the others and tell what was said."""
    try:
        said = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(x[-4000:] for x in said)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder) -> list[dict[str, Any]]:
    """What each of two ranks found, by case."""
    cases = ("ddp", "ddp_resumed", "layouts", "faults", "evaluated", "answered", "reordered")
    cases += ("apart", "asked")
    cases += ("fsdp", "fsdp_resumed", "fsdp_evaluated", "fsdp_optimizers", "fsdp_adapters")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "ACCELERATE_USE_CPU": "true"}
    ranks = [
        environment(**shared, **{f"{kind}WORLD_SIZE": "2" for kind in ("", "LOCAL_")}, **own)
        for own in ({"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(2))
    ]
    command = [sys.executable, str(ROOT / "tests" / "rank_worker.py"), str(folder), *cases]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ended([subprocess.Popen(command, env=env, **pipes) for env in ranks])
    return [
        {case: torch.load(folder / f"{case}-{n}.pt", weights_only=False) for case in cases}
        for n in range(2)
    ]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, Any]:
    """The same in this process."""
    return rank_worker.ddp(tmp_path_factory.mktemp("one"), 1)


def same(found: Any, expected: Any) -> None:
    """Equal in all but the last digits."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            same(ours, theirs)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    else:
        assert found == expected


def timeless(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in log.items() if not any(t in k for t in TIMES)} for log in logs]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_are_one_process_with_twice_the_accumulation(two, one, kind, case):
    whole = one[case]
    assert len(whole["gradients"]) == 2
    if case in ("topd", "first_fork"):
        assert any(fork["real"] for row in whole["guidance"] for fork in row["forks"])
    if case == "turns":
        assert any(rollout["replies"] for rollout in whole["rollouts"] if "replies" in rollout)
    for number, rank in enumerate(two):
        found = rank[kind][case]
        assert bool(found["sharded"]) is (kind == "fsdp")
        torch.testing.assert_close(found["gradients"], whole["gradients"], **NEAR)
        torch.testing.assert_close(found["weights"], whole["weights"], **NEAR)
        same(timeless(found["logs"]), timeless(whole["logs"]))
        if number == 0:  # it writes for all
            for name in ("rollouts", "guidance", "tokens"):
                same(found[name], whole[name])
            assert [r["rollout"] for r in found["rollouts"]] == [*range(16)] * 2


def test_a_run_that_is_resumed_within_an_epoch_keeps_its_order(two, tmp_path):
    whole, cut = two[0]["reordered"]
    assert cut == whole == rank_worker.reordered(tmp_path, 1)[1]
    assert sorted(whole[:12]) == sorted(whole[12:]) == list(range(12))
    assert whole[:12] != whole[12:]


def test_the_teachers_answers_are_written_among_the_ranks(two, tmp_path):
    whole = rank_worker.answered(tmp_path, 1)
    for rank in two:
        found = rank["answered"]
        assert found["learned"] == whole["learned"]
        assert found["written"] == whole["written"]
        assert found["cost"] == whole["cost"] > 0
        assert found["said"].startswith("asked.")


def test_a_checkpoint_of_sharded_ranks_loads_in_one_process(two, folder):
    for place in ("checkpoint-2", "student"):
        loaded = AutoModelForCausalLM.from_pretrained(folder / "fsdp" / "opd" / place)
        torch.testing.assert_close(
            dict(loaded.state_dict()), two[0]["fsdp"]["opd"]["weights"], rtol=0, atol=0
        )


def test_resumed_ranks_are_those_that_were_not_stopped(two):
    for kind in ("ddp", "fsdp"):
        found, whole = two[0][f"{kind}_resumed"], two[0][kind]["opd"]
        torch.testing.assert_close(found["weights"], whole["weights"], rtol=0, atol=0)
        same(timeless(found["logs"]), timeless(whole["logs"]))  # means are added up otherwise
        for name in ("rollouts", "guidance", "tokens"):
            assert found[name] == whole[name]


def without_ranks(settings: dict[str, Any]) -> dict[str, Any]:
    """As an earlier version wrote run.json."""
    return {key: value for key, value in settings.items() if key != "ranks"}


def test_one_process_resumes_what_two_ranks_began_with_as_many_rollouts(two, folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "ddp" / "opd", run)
    shutil.rmtree(run / "student")
    place = str(run / "checkpoint-1")
    for edit in (dict, without_ranks):
        (run / "run.json").write_text(json.dumps(edit(json.loads((run / "run.json").read_text()))))
        with pytest.raises(TOPDError, match=r"has 16 rollouts, of 2 rank\(s\); of 1 it would have"):
            rank_worker.made(run, 2, **CASES["opd"][1]).train(resume_from_checkpoint=place)
        assert ranks_at(run, 0) == 2
        assert (run / "checkpoint-2").exists()
    trainer = rank_worker.made(run, 1, **CASES["opd"][1])
    trainer.train(resume_from_checkpoint=place)
    torch.testing.assert_close(trainer.model.state_dict(), two[0]["ddp"]["opd"]["weights"], **NEAR)
    resumed = json.loads((run / "run.json").read_text())
    assert resumed["ranks"] == 1
    assert resumed["resumed"][0]["changed"]["ranks"] == [2, 1]


def test_a_checkpoint_of_another_launch_is_refused_before_records_are_cut(two, folder, tmp_path):
    assert two[0]["fsdp"]["opd"]["sharded"]
    run = tmp_path / "run"
    shutil.copytree(folder / "fsdp" / "opd", run)
    with pytest.raises(TOPDError, match="was saved by FSDP2 and does not resume without it"):
        rank_worker.made(run, 1, **CASES["opd"][1]).train(str(run / "checkpoint-1"))
    assert (run / "checkpoint-2").exists()
    with pytest.raises(TOPDError, match=r"checkpoint-1 was saved by FSDP2, .*before the first"):
        replay_step(run, 1, tolerance=1e-3)
    with pytest.raises(TOPDError, match="was saved without FSDP2 and does not resume with it"):
        check_kind(run / "checkpoint-1", ["optimizer.pt"], WholeCopy(student()))


def test_a_student_that_is_sharded_otherwise_learns_the_same(two, tmp_path):
    whole = rank_worker.layouts(tmp_path, 1)
    for rank in two:
        for name, found in rank["layouts"].items():
            expected, own = whole[name]["gradients"], found["gradients"]
            assert found["sharded"]
            assert found["dtype"] == torch.float32  # the policy's bfloat16 is for the model
            near = 1e-2 if name == "half" else 1e-5
            assert found["loss"] == pytest.approx(whole[name]["loss"], rel=near)
            if name != "half":  # this student's gradients in bfloat16 are far from those in float32
                torch.testing.assert_close(own, expected, **NEAR)


def test_a_fault_on_one_rank_is_raised_on_all(two, folder):
    first, second = (dict(rank["faults"]) for rank in two)
    assert (first.pop("on_first"), second.pop("on_first")) == ("[0, 1]", "[]")
    assert first == second
    assert first["observe"] == first["agreed"] == first["later, not saved"] == "rank 1: its fault."
    for name in ("later", "judged"):
        assert "checkpoint-1 is saved: 1 of 2 updates" in first[name]
        assert (folder / "faults" / name / "checkpoint-1" / "seal.json").exists()
    assert "max_logprob_gap" in first["gap"]
    assert first["everywhere"] == "[0, 1]"


def test_ranks_that_were_given_something_else_are_refused(two):
    """Each would train on what it has: with other rates even the weights are others."""
    first, second = (rank["apart"] for rank in two)
    assert "nothing" not in first
    for name, said in (
        ("data", "train_dataset: is not the same on rank 0 and on rank 1. Launch"),
        ("eval", "eval_dataset b: is not the same"),
        ("teacher", "teacher: is not the same"),
        ("temperature", "temperature: is not the same on rank 0 and on rank 1: 1.0, and 0.8."),
        ("learning_rate", "learning_rate: is not the same"),
        ("answers", "train_dataset: is not the same"),  # before the teacher writes
        ("folder", "output_dir: rank 1 does not see in FOLDER what rank 0 writes there."),
    ):
        assert first.pop(name).startswith(said)
        assert second.pop(name).startswith(said)
    assert first == second == {}


def test_what_a_callback_of_one_rank_asks_for_all_do(two, tmp_path):
    """Ranks that did different things ended in tracebacks of gloo's, or hung."""
    ends = [(2, ["checkpoint-1"]), (3, ["checkpoint-1"])]  # an update that was begun is done
    assert rank_worker.asked(tmp_path, 1) == ends
    assert [rank["asked"] for rank in two] == [ends] * 2


def test_an_evaluation_counts_every_prompt_once_and_changes_no_training(two, tmp_path):
    whole = rank_worker.evaluated(tmp_path, 1)
    for number, rank in enumerate(two):
        for kind in ("evaluated", "fsdp_evaluated"):
            found = rank[kind]
            assert bool(found["sharded"]) is (kind == "fsdp_evaluated")
            assert found["losses"] == pytest.approx(whole["losses"], rel=1e-5)
            torch.testing.assert_close(found["weights"], whole["weights"], **NEAR)
            assert found["written"] == (0 if number else whole["written"])


@pytest.mark.parametrize(
    ("prompts", "drops", "steps", "fails"),
    [  # micro-batches of 4, two at a time; an epoch of 5 has two updates if the last is dropped
        *((20, True, (n, n), n > 0) for n in (0, 1, 2, 3)),
        *((20, False, (n, n), n in (2, 5)) for n in (0, 1, 2, 3, 4, 5)),
        (20, False, (0, 3), True),
        (16, True, (0, 5), False),
        (4, True, (0, 0), True),  # no run has that, but a folder may say so
    ],
)
def test_updates_that_ranks_filled_up_or_dropped_are_not_replayed(prompts, drops, steps, fails):
    args = SimpleNamespace(num_generations=1, per_device_train_batch_size=4)
    args.gradient_accumulation_steps, args.dataloader_drop_last = 2, drops
    trainer: Any = SimpleNamespace(args=args, train_dataset=range(prompts))
    with pytest.raises(TOPDError, match="fill up") if fails else nullcontext():
        _check_filled(trainer, steps, 2)


RECIPE: dict[str, Any] = {
    "student": "testbed://arithmetic/student",
    "teacher": "testbed://arithmetic/teacher",
    "data": {"path": "testbed://arithmetic", "limit": 64},
    "method": "topd",
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 24,
    "window_length": 8,
    "candidate_fraction": 0.2,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "use_cpu": True,
}


def test_topd_train_by_accelerate_launch(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "output_dir": str(tmp_path / "two")}))
    # --cpu would start one process; the recipe has use_cpu
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no"]
    port = ["--dynamo_backend", "no", "--main_process_port", free_port()]
    module = ["-m", "topd", "train", str(recipe)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, *port, *module]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ended([subprocess.Popen(command, env=environment(), cwd=tmp_path, **pipes)])
    words = ["--output_dir", str(tmp_path / "one"), "--gradient_accumulation_steps", "2"]
    run_recipe(recipe, words, quiet=True)

    def read(run: str, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / run / name).read_text().splitlines()]

    assert [r["rollout"] for r in read("two", "rollouts.jsonl")] == [*range(8)] * 2
    for name in ("rollouts.jsonl", "guidance.jsonl", "tokens.jsonl"):
        same(read("two", name), read("one", name))
    same(timeless(read("two", "metrics.jsonl")), timeless(read("one", "metrics.jsonl")))
    ours, theirs = (load_file(tmp_path / n / "student/model.safetensors") for n in ("two", "one"))
    torch.testing.assert_close(ours, theirs, **NEAR)
    assert (tmp_path / "two" / "report.html").exists()
    found = audit_run(tmp_path / "two", updates=2)
    assert found.faults == []
    assert any("decisions" in said for said in found.checked)
    with pytest.raises(TOPDError, match=r"2 ranks made it, .* Give a --tolerance"):
        replay_step(tmp_path / "two", 1)
    found = replay_step(tmp_path / "two", 1, tolerance=1e-3)
    assert found.faults == []
    assert "weights: not compared, 2 ranks made them" in found.checked
    shutil.rmtree(tmp_path / "two")


def test_an_optimiser_that_fsdp_cannot_shard_save_or_load_is_refused_at_the_start(two):
    """Adafactor failed in its first step, Adagrad at its first checkpoint, SGD at a resume."""
    for found in two:
        said = found["fsdp_optimizers"]
        assert list(said) == ["adafactor", "adagrad", "sgd"]
        assert all(
            f"optim {name}, under FSDP2: cannot be used" in text for name, text in said.items()
        )


def test_a_student_that_fsdp_cannot_shard_is_refused_at_the_start(two):
    """Both ended in tracebacks of torch's, one of them at the first update."""
    for found in two:
        said = found["fsdp_adapters"]
        assert list(said) == ["tokens", "modules"]
        assert all("student: FSDP2 cannot shard it: " in text for text in said.values())
        torn = r"lm_head\.weight and \S+embed_tokens\.original_module\.weight would no longer"
        assert re.search(torn, said["modules"])


def test_an_optimiser_that_is_given_is_refused_under_fsdp(monkeypatch):
    """transformers did so, in a traceback once the models were read."""
    model = student()
    optimizer = torch.optim.AdamW(model.parameters())
    check_optimizer(model, None, (optimizer, None))
    for name, value in rank_worker.launched().items():
        monkeypatch.setenv(name, value)
    check_optimizer(model, None, (None, None))
    with pytest.raises(TOPDError, match=r"optimizers: .* under FSDP, .* set optim"):
        check_optimizer(model, None, (optimizer, None))


def test_the_launch_in_the_docs_goes(monkeypatch):
    for name, value in rank_worker.launched().items():
        monkeypatch.setenv(name, value)
    check_launch(TOPDConfig(use_cpu=True))
    assert fsdp_plugin().reshard_after_forward is True


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "PARALLELISM_CONFIG is not supported"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend: inductor has no effect here"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "version 1 is not supported"),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
            },
            "fsdp_state_dict_type: FULL_STATE_DICT",
        ),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
            },
            "fsdp_cpu_ram_efficient_loading: false",
        ),
    ],
)
def test_a_launch_that_does_not_go_is_refused(monkeypatch, variables, said):
    args = TOPDConfig(use_cpu=True)
    check_launch(args)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TOPDError, match=said):
        check_launch(args)


def test_a_launchers_mixed_precision_is_that_of_the_settings(monkeypatch):
    """Else a run was trained in bfloat16, and its records said otherwise."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_launch(TOPDConfig(use_cpu=True, bf16=True))
    with pytest.raises(TOPDError, match=r"mixed_precision: bf16 is the launcher's.*Set bf16: true"):
        check_launch(TOPDConfig(use_cpu=True))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "kl_top"}, "method: kl_top chooses among all rollouts"),
        ({"candidate_loss": "surprise", "score_batch_size": 3}, "score_batch_size: 3"),
        ({"accelerator_config": {"even_batches": False}}, "accelerator_config: split_batches"),
    ],
)
def test_what_does_not_go_with_several_ranks_is_refused(tmp_path, monkeypatch, options, said):
    args = {"output_dir": str(tmp_path), "use_cpu": True, **options}
    TOPDConfig(**args)
    monkeypatch.setattr(TOPDConfig, "world_size", 2)
    with pytest.raises(TOPDError, match=said):
        TOPDConfig(**args)


def test_the_generations_of_a_prompt_may_be_on_several_ranks(tmp_path, monkeypatch):
    args = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 1}
    with pytest.raises(
        TOPDError, match=r"2 does not divide the 1 rollouts .* x gradient_accu\w+\)"
    ):
        TOPDConfig(**args, num_generations=2)
    monkeypatch.setattr(TOPDConfig, "world_size", 2)
    TOPDConfig(**args, num_generations=2)
    with pytest.raises(TOPDError, match=r"3 does not divide the 2 rollouts .* x ranks\)"):
        TOPDConfig(**args, num_generations=3)
