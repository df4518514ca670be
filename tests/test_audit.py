"""Audit and replay: a run as it was has no fault, and every forgery is found and named."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conftest import RENAMED, renamed_model, rows, tiny_model, tiny_tokenizer, write_pair
from topd import TOPDConfig, TOPDTrainer, transport
from topd.cli import app
from topd.commands.audit import AuditResult, Trust, audit_run, replay_step, stored_recipe
from topd.commands.audit.settings import by_settings, format_at
from topd.commands.probe import run_probe
from topd.commands.train import run_recipe
from topd.errors import StoppedError, TOPDError
from topd.report.text import counted
from topd.runs.files import LOCK, digest, file_digest
from topd.runs.folder import RECORDS, RunFolder
from topd.runs.ledger import HEAD, LEDGER, Ledger
from topd.runs.records import FORMAT
from topd.training.warmstart import OF_ROLLOUTS

SMALL = {
    "student": "student",
    "teacher": "teacher",
    "data": "prompts.jsonl",
    "output_dir": "run",
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "max_completion_length": 12,
    "method": "topd",
    "window_length": 4,
    "candidate_fraction": 0.3,
    "learning_rate": 1e-3,
    "save_steps": 2,
    "seed": 3,
}
STAGE_1 = {key: SMALL[key] for key in SMALL.keys() - {"method", *OF_ROLLOUTS}}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
RUN = Path("run")
EVALUATED = {"eval_data": "prompts.jsonl", "eval_strategy": "steps", "eval_steps": 1}


def trained(root: Path, *, stage: int = 2, **changes: Any) -> Path:
    """A folder of models, data and a run, all named relative to it."""
    with contextlib.chdir(root):
        run_recipe(write_pair(root, **{**SMALL, **changes}), quiet=True, warmstart=stage == 1)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copied(whole, tmp_path, monkeypatch) -> None:
    """We stand in a copy of a folder with a finished run, to do as we like there."""
    shutil.copytree(whole, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def edit(path: Path, change: Callable[[list[str]], object]) -> None:
    lines = path.read_text().splitlines(keepends=True)
    change(lines)
    path.write_text("".join(lines))


def edit_record(path: Path, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    def changed(lines: list[str]) -> None:
        record = json.loads(lines[number])
        change(record)
        lines[number] = json.dumps(record) + "\n"

    edit(path, changed)


def swap(lines: list[str]) -> None:
    lines[1], lines[2] = lines[2], lines[1]


def turn(fork: dict[str, Any]) -> None:
    fork["real"] = not fork["real"]


def chain_again() -> None:
    """What a forger does who knows the format: the chain again, over the records as they are."""
    (RUN / LEDGER).unlink()
    chain = Ledger(RUN)
    for name in RECORDS:
        for line in (RUN / name).read_text().splitlines():
            record = json.loads(line)
            place = {key: record[key] for key in ("step", "rollout") if key in record}
            chain.add([{"file": name, **place, "record": digest(line.encode())}])


def only(found: AuditResult, *parts: str) -> None:
    """One fault, that says all this."""
    assert len(found.faults) == 1, found.faults
    for part in parts:
        assert part in found.faults[0]


# As it was


def test_a_run_as_it_was_has_no_fault(copied):
    found = audit_run(RUN)
    assert found.faults == []
    said = "decisions: 12 rollouts and 26 candidates of the updates 0, 1, 2 re-derived (--seed "
    assert any(line.startswith(said) for line in found.checked)
    assert "files: 10, records: 28" in found.checked  # 12 + 12, three updates and the summary


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({"lora": LORA}, 2),
        ({"method": "first_fork", "candidate_loss": "surprise", "look_ahead_every": 2}, 2),
        ({"method": "relay"}, 2),
        ({"method": "kl_top"}, 2),
        ({"candidate_loss": "reverse_kl"}, 2),
        ({"embedding": "student"}, 2),
        ({"data": {"path": "prompts.jsonl", "limit": 6}, "dataloader_drop_last": True}, 2),
        ({"method": "downweight_matched", "window_temperature": 1.0}, 2),
        ({"teacher_prompt": "{{ prompt }} so {{ solution }}"}, 2),
        ({"warmstart": {**STAGE_1, "answers": "data"}}, 1),
        ({"warmstart": {**STAGE_1, "max_completion_length": 400}}, 1),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_every_kind_of_run_passes_audit_and_replay(tmp_path, monkeypatch, changes, stage):
    monkeypatch.chdir(trained(tmp_path, stage=stage, **changes))
    if stage == 1:  # as an older version, which did not refuse it
        stored = json.loads((RUN / "run.json").read_text())
        stored["config"]["window_length"] = 4
        if stored["config"]["answers"] == "data":
            stored["config"]["temperature"] = 0.5
        (RUN / "run.json").write_text(json.dumps(stored))
        rechain()
    found, kind = audit_run(RUN), {*map(str, changes.values())}
    assert found.faults == []
    told = any(line.endswith("at update 0 alone; see topd replay") for line in found.checked)
    assert told is bool(kind & {"relay", "kl_top", "reverse_kl", "student"})
    read = [json.loads(line) for line in (RUN / "guidance.jsonl").read_text().splitlines()]
    gone = bool(kind & {"reverse_kl", "student"})  # with the student of later updates
    candidates = sum(len(row["forks"]) for row in read if not (gone and row["step"]))
    assert f" and {counted(candidates, 'candidate')} of the updates" in found.checked[-1]
    for step in (0, 2):
        assert replay_step(RUN, step).faults == []


def test_a_run_that_went_on_from_a_checkpoint_has_no_fault(copied):
    words = [f"--resume_from_checkpoint={RUN / 'checkpoint-2'}"]
    run_recipe(Path("recipe.yaml"), words, quiet=True)
    assert audit_run(RUN).faults == []
    begun = [line for line in (RUN / LEDGER).read_text().splitlines() if '"begin"' in line]
    assert [json.loads(line)["step"] for line in begun] == [0, 2]


def test_a_killed_run_that_goes_on_has_no_fault(copied):
    """SIGKILL between a record and its entry, inside an entry, and before the head."""
    with open(RUN / "rollouts.jsonl", "a") as records, open(RUN / LEDGER, "a") as chain:
        records.write('{"step": 3, "rollout": 0}\n')
        chain.write('{"n": 38, "fi')
    entry = json.loads((RUN / LEDGER).read_text().splitlines()[-4])
    (RUN / HEAD).write_text(json.dumps({"entries": entry["n"] + 1, "hash": entry["hash"]}))
    run_recipe(Path("recipe.yaml"), ["--resume_from_checkpoint=last"], quiet=True)
    assert audit_run(RUN, updates=0).faults == []


def test_a_finished_run_that_goes_on_from_its_last_checkpoint_has_no_fault(copied):
    """It makes its summary again, which is dated as the last log is."""
    run_recipe(Path("recipe.yaml"), ["--resume_from_checkpoint=last"], quiet=True)
    assert audit_run(RUN, updates=0).faults == []


@pytest.mark.parametrize("save_steps", [1, 100])
def test_a_loss_that_is_not_finite_is_made_again(tmp_path, monkeypatch, save_steps):
    """By the command that its message names; without the fault the run then continues."""
    right = TOPDTrainer.compute_loss

    def broken(self, *args, **kwargs):
        loss = right(self, *args, **kwargs)
        return loss * math.nan if self.state.global_step == 2 else loss

    monkeypatch.setattr(TOPDTrainer, "compute_loss", broken)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoppedError, match="topd replay run --step 2 makes it again"):
        run_recipe(write_pair(tmp_path, **SMALL | {"save_steps": save_steps}), quiet=True)
    assert audit_run(RUN).faults == []
    found = replay_step(RUN, 2)
    assert found.faults == []
    assert found.checked[0] == "replay: update 2, from checkpoint-2"
    assert re.match("stopped: update 3: the loss .* is not finite", found.checked[1])
    monkeypatch.setattr(TOPDTrainer, "compute_loss", right)
    run_recipe(Path("recipe.yaml"), ["--resume_from_checkpoint=last"], quiet=True)
    assert audit_run(RUN).faults == []


def test_a_run_whose_settings_were_changed_at_a_resume_has_no_fault(copied):
    """Each update is re-derived with the settings that it was made with."""
    words = [f"--resume_from_checkpoint={RUN / 'checkpoint-2'}", "--max_steps=4"]
    words += ["--candidate_fraction=0.6", "--window_length=3", "--lr_scheduler_type=cosine"]
    run_recipe(Path("recipe.yaml"), words, quiet=True)
    found = audit_run(RUN, updates=9)
    assert found.faults == []
    assert any("of the updates 0, 1, 2, 3 re-derived" in line for line in found.checked)
    for step in (1, 3):  # before and after
        assert replay_step(RUN, step).faults == []
    shutil.rmtree(RUN / "checkpoint-2")
    with pytest.raises(TOPDError, match=r"resumed with other settings at update 2.*before 2"):
        replay_step(RUN, 3)
    edit_record(RUN / "guidance.jsonl", 0, lambda record: turn(record["forks"][0]))
    assert any("update 0, rollout 0: forks" in fault for fault in audit_run(RUN, updates=9).faults)


@pytest.mark.parametrize("newer", [{"versions.topd": ["0.1", "0.2"]}, {"format": [1, 6]}])
def test_settings_of_an_update_are_those_of_the_run_that_made_it(copied, tmp_path, newer):
    """From 40 on it was resumed, then again from 20: those of 30 are the last run's."""
    stored = json.loads((RUN / "run.json").read_text())
    stored["resumed"] = [
        {"step": 40, "changed": {"config.beta": [0.25, 0.5], "recipe.lora": [{"r": 3}, None]}},
        {
            "step": 50,
            "changed": {"recipe.teacher": [{"self": {"ema": 0.5}}, {"self": {"ema": 0.9}}]},
        },
        {"step": 20, "changed": {"config.beta": [0.5, 1.0], "config.gone": [1, 2]}},
        {"step": 60, "changed": {**newer, "config.seed": [None, 3]}},
    ]
    stored["config"]["beta"] = 1.0
    stored["recipe"]["teacher"] = {"self": {"ema": 0.9}}
    (RUN / "run.json").write_text(json.dumps(stored))
    of = {n: stored_recipe(RUN, tmp_path, at=n) for n in (10, 30, 60, None)}
    assert {n: recipe.args.beta for n, recipe in of.items()} == {10: 0.25, 30: 1, 60: 1, None: 1}
    assert {n: recipe.args.seed for n, recipe in of.items()} == {10: 42, 30: 42, 60: 3, None: 3}
    assert {n: recipe.teacher.ema for n, recipe in of.items()} == {
        10: 0.5, 30: 0.9, 60: 0.9, None: 0.9,
    }  # fmt: skip
    assert by_settings(RUN, (10, 30, 60)) == [[60], [10], [30]]
    assert of[10].lora.r == 3
    assert of[30].lora is None
    stored["resumed"] = stored["resumed"][1:2]  # the teacher's alone
    (RUN / "run.json").write_text(json.dumps(stored))
    assert by_settings(RUN, (10, 60)) == [[60], [10]]


def test_a_resume_that_changed_nothing_an_update_depends_on_is_no_change(copied):
    """Models are loaded once, checks of the order and the rate stay, and a replay goes across."""
    words = [f"--resume_from_checkpoint={RUN / 'checkpoint-2'}", "--save_steps=7", "--eval_steps=5"]
    words += ["--save_total_limit=3", "--run_name=another"]
    run_recipe(Path("recipe.yaml"), words, quiet=True)
    changed = json.loads((RUN / "run.json").read_text())["resumed"][0]["changed"]
    assert {"config.save_steps", "config.eval_steps"} <= changed.keys()
    assert by_settings(RUN, range(3)) == [[0, 1, 2]]
    found = audit_run(RUN, updates=1)
    assert found.faults == []
    assert "settings: order of the prompts, learning rate of each log" in found.checked
    shutil.rmtree(RUN / "checkpoint-2")
    assert replay_step(RUN, 2).checked[0] == "replay: update 2, from the beginning"
    assert replay_step(RUN, 2).faults == []


@pytest.mark.parametrize(
    ("setting", "matters"),
    [
        *((name, False) for name in ("do_eval", "hub_strategy", "report_to", "save_only_model")),
        *((name, True) for name in ("dataloader_drop_last", "logging_steps", "seed", "top_p")),
    ],
)
def test_settings_that_an_update_may_depend_on_part_its_updates(copied, setting, matters):
    stored = json.loads((RUN / "run.json").read_text())
    changed = {f"config.{setting}": ["other", stored["config"][setting]]}
    stored["resumed"] = [{"step": 2, "changed": changed}]
    (RUN / "run.json").write_text(json.dumps(stored))
    assert by_settings(RUN, range(3)) == ([[2], [0, 1]] if matters else [[0, 1, 2]])


def test_what_a_run_left_behind_that_was_resumed_before_it_is_not_compared(copied, monkeypatch):
    """The end of the first run is of other weights than those after the same update again."""
    words = [f"--resume_from_checkpoint={RUN / 'checkpoint-2'}", "--learning_rate=0.02"]
    with monkeypatch.context() as killed:
        killed.setattr(TOPDTrainer, "_save_student", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_recipe(Path("recipe.yaml"), words, quiet=True)
    found = replay_step(RUN, 2)
    assert found.faults == []
    assert found.checked[-1] == "weights: before the updates 2"


def test_a_run_killed_before_it_notes_its_end_or_its_resume_is_not_accused_alone(
    copied, monkeypatch
):
    """A student that the ledger has no end of may be the resumed run's: the fault says so."""
    right, write = RunFolder.note, RunFolder.write

    def stopped(self, event, **details):
        return 1 / 0 if event == "end" else right(self, event, **details)

    words = ["--resume_from_checkpoint=last", "--max_steps=6"]
    monkeypatch.setattr(RunFolder, "note", stopped)
    with pytest.raises(ZeroDivisionError):
        run_recipe(Path("recipe.yaml"), words, quiet=True)
    only(audit_run(RUN), "student: has not the weights", "(by the resumed run, if that was")
    monkeypatch.setattr(RunFolder, "note", right)
    monkeypatch.setattr(RunFolder, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # the ledger has a beginning that run.json has not
        run_recipe(Path("recipe.yaml"), words, quiet=True)
    monkeypatch.setattr(RunFolder, "write", write)
    run_recipe(Path("recipe.yaml"), words, quiet=True)
    assert audit_run(RUN).faults == []


# Of before


def near(root: Path) -> None:
    """A run of two models so near that many windows are equal."""
    recipe = write_pair(
        root, **{**SMALL, "candidate_fraction": 1.0, "window_gap": 1, "window_length": 2}
    )
    teacher = tiny_model(seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(torch.randn_like(weight) * 0.01)
    teacher.save_pretrained(root / "teacher")
    run_recipe(recipe, quiet=True)


def test_a_run_of_before_equal_windows_were_at_distance_zero_is_not_accused(tmp_path, monkeypatch):
    """What does not follow from them is compared all the same. Else it were a forgery."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as before:
        before.setattr(transport, "without_dust", lambda solved, *_: solved)
        before.setattr("topd.runs.folder.FORMAT", 5)
        near(tmp_path)
    left_out = "verdicts: not re-derived in updates with equal windows, as a version before format"
    found = audit_run(RUN, updates=9)
    assert found.faults == []
    assert any(line.startswith(left_out) for line in found.checked)
    with pytest.raises(TOPDError, match=r"update \d repeats otherwise, .* before format 6 wrote"):
        replay_step(RUN, 2)
    replace("run.json", '"format": 5', '"format": 6')
    rechain()
    assert any(".real" in fault for fault in audit_run(RUN, updates=9).faults)
    replace("run.json", '"format": 6', '"format": 5')
    edit_record(RUN / "guidance.jsonl", 0, lambda r: r["forks"][0]["teacher_tokens"].append(9))
    rechain()
    assert any("teacher_tokens" in fault for fault in audit_run(RUN, updates=9).faults)


def test_the_format_of_an_update_is_that_of_its_run(copied):
    """It repeats, also across the resume."""
    replace("run.json", f'"format": {FORMAT}', '"format": 5')
    rechain()
    assert replay_step(RUN, 1).faults == []
    words = [f"--resume_from_checkpoint={RUN / 'checkpoint-2'}"]
    run_recipe(Path("recipe.yaml"), words, quiet=True)
    resumed = json.loads((RUN / "run.json").read_text())["resumed"]
    assert resumed == [{"step": 2, "changed": {"format": [5, FORMAT]}}]
    assert [format_at(RUN, step) for step in range(3)] == [5, 5, FORMAT]
    found = audit_run(RUN, updates=9)
    assert found.faults == []
    assert "settings: order of the prompts, learning rate of each log" in found.checked
    assert [replay_step(RUN, step).faults for step in (1, 2)] == [[], []]
    shutil.rmtree(RUN / "checkpoint-2")
    assert replay_step(RUN, 2).faults == []


def test_a_run_that_was_resumed_for_longer_and_killed_has_not_ended(copied, monkeypatch):
    monkeypatch.setattr(TOPDTrainer, "_save_student", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_recipe(Path("recipe.yaml"), ["--resume_from_checkpoint=last", "--max_steps=4"])
    found = audit_run(RUN)
    assert found.faults == []
    at = found.checked.index("student: of 3 updates, from before it was resumed")
    said = r"the run was resumed after \d updates and has not ended since"
    assert re.fullmatch(said, found.checked[at - 1])
    edit_weights(RUN / "student", 1.01)  # it may have been killed while it saved, too
    only(audit_run(RUN, updates=0), "student/model.safetensors: was changed (by the resumed run,")


@pytest.mark.parametrize("killed", [True, False])
def test_a_student_without_the_end_of_its_run_is_not_vouched_for(copied, killed):
    """The ledger's tail is cut with a right head, or the run died while it saved the student."""
    written = (RUN / LEDGER).read_text().splitlines(keepends=True)
    kept = written[: next(n for n, line in enumerate(written) if '"student/' in line)]
    (RUN / LEDGER).write_text("".join(kept))
    last = json.loads(kept[-1])
    head = json.dumps({"entries": last["n"] + 1, "hash": last["hash"]}, indent=2)
    (RUN / HEAD).write_text(head + "\n")
    if killed:
        (RUN / "student" / "README.md").unlink()
    found = audit_run(RUN)
    assert "the run has not ended, or was stopped" in found.checked
    assert found.faults[0] == "student/model.safetensors: is not in the ledger"
    assert found.faults[1].startswith("student: cannot be verified: the ledger has no end of the")
    assert ("stopped while it saved" in found.faults[1]) == killed
    assert len(found.faults) == 2


def test_a_pruned_checkpoint_is_no_fault(copied):
    shutil.rmtree(RUN / "checkpoint-2")
    assert audit_run(RUN, updates=0).faults == []


# What a forger does


def test_an_edited_weight_of_a_token_is_found(copied):
    edit_record(RUN / "guidance.jsonl", 5, lambda record: record["weights"].update({"3": 0.5}))
    found = audit_run(RUN)
    assert found.faults[0] == "guidance.jsonl, update 1, rollout 1: was changed (line 6)"
    assert found.faults[1].startswith("update 1, rollout 1: weights: recorded {")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("student", "student/model.safetensors: was changed"),
        ("checkpoint-2", "checkpoint-2: model.safetensors was changed after it was written"),
    ],
)
def test_an_edited_weight_of_the_student_is_found(copied, place, said):
    edit_weights(RUN / place, 1.000001)
    only(audit_run(RUN), said)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_any_file_of_the_student_is_covered(copied, name):
    path = RUN / "student" / name
    path.write_bytes(path.read_bytes() + b" ")
    only(audit_run(RUN, updates=0), f"student/{name}: was changed")


def test_a_file_that_is_added_to_the_student_is_found_and_its_card_may_grow(copied):
    with (RUN / "student" / "README.md").open("a") as card:
        card.write("More.")
    assert audit_run(RUN, updates=0).faults == []
    (RUN / "student" / "modeling.py").touch()
    only(audit_run(RUN, updates=0), "student/modeling.py: is not in the ledger")


def test_an_edited_checkpoint_with_its_seal_made_anew_is_found(copied):
    edit_weights(RUN / "checkpoint-2", 1.01)
    seal_again(RUN / "checkpoint-2")
    only(audit_run(RUN, updates=0), "checkpoint-2/seal.json: was changed")


def edit_weights(place: Path, factor: float) -> None:
    weights = load_file(place / "model.safetensors")
    weights["model.norm.weight"] *= factor
    save_file(weights, place / "model.safetensors", {"format": "pt"})


def seal_again(place: Path) -> None:
    """What a forger does who knows the format of seals."""
    seal = json.loads((place / "seal.json").read_text())
    path = place / "model.safetensors"
    seal["files"][path.name] = [path.stat().st_size, file_digest(path)]
    seal["student"] = ""  # as earlier versions
    (place / "seal.json").write_text(json.dumps(seal))


@pytest.mark.parametrize(
    ("name", "number", "place"),
    [
        ("rollouts.jsonl", 0, "update 0, rollout 0"),
        ("guidance.jsonl", 7, "update 1, rollout 3"),
        ("guidance.jsonl", 11, "update 2, rollout 3"),
        ("metrics.jsonl", 1, "step 2"),
    ],
)
def test_a_deleted_record_is_found(copied, name, number, place):
    edit(RUN / name, lambda lines: lines.pop(number))
    only(audit_run(RUN), f"{name}, {place}: is missing")


def test_two_swapped_records_are_found(copied):
    edit(RUN / "rollouts.jsonl", swap)
    assert audit_run(RUN, updates=0).faults == [
        "rollouts.jsonl, line 2: update 0, rollout 2 stands where update 0, rollout 1 did",
        "rollouts.jsonl, line 3: update 0, rollout 1 stands where update 0, rollout 2 did",
    ]


def test_an_added_record_is_found(copied):
    edit(RUN / "metrics.jsonl", lambda lines: lines.insert(0, '{"step": 0, "loss": 9.0}\n'))
    only(audit_run(RUN, updates=0), "metrics.jsonl, line 1: is not in the ledger")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_swapped_model_is_found(copied, role):
    tiny_model(seed=7).save_pretrained(role)
    faults = audit_run(RUN).faults
    assert re.fullmatch(rf"{role}: {role} has not the weights of the run: .*", faults[0])
    assert len(faults) > 1 or role == "student"  # the teacher's decisions are other ones too


def test_a_teacher_with_one_other_weight_is_found(copied):
    weights = load_file("teacher/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][7, 11] += 1e-6
    save_file(weights, "teacher/model.safetensors", {"format": "pt"})
    assert audit_run(RUN).faults[0].startswith("teacher: teacher has not the weights")


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("config", "false_alarm_share", 0.9), ("config", "seed", 4), ("recipe", "lora", None)],
)
def test_a_changed_recipe_is_found(copied, part, key, value):
    stored = json.loads((RUN / "run.json").read_text())
    stored[part][key] = value
    (RUN / "run.json").write_text(json.dumps(stored))
    assert audit_run(RUN, updates=0).faults == ["run.json: was changed"]


def test_changed_prompts_are_found(copied):
    edit_record(Path("prompts.jsonl"), 0, lambda row: row.update(prompt="what is 3 + 3 ?"))
    only(audit_run(RUN), "data: the prompts are not those of the run")


@pytest.mark.parametrize(
    ("part", "value"),
    [("student", {}), ("teacher", {"path": "no/where"}), ("data", None), ("lora", {"rank": 2})],
)
def test_a_recipe_that_cannot_be_run_is_one_more_fault(copied, part, value):
    stored = json.loads((RUN / "run.json").read_text())
    stored["recipe"][part] = value
    (RUN / "run.json").write_text(json.dumps(stored))
    faults = audit_run(RUN).faults
    assert faults[0] == "run.json: was changed"
    assert faults[1].startswith("decisions: not re-derived: ")


def test_a_run_folder_alone_cannot_make_an_audit_run_code(copied):
    stored = json.loads((RUN / "run.json").read_text())
    stored["recipe"]["teacher"]["trust_remote_code"] = True
    (RUN / "run.json").write_text(json.dumps(stored))
    assert "--trust-remote-code" in audit_run(RUN).faults[1]
    assert audit_run(RUN, trust=Trust(remote_code=True)).faults == ["run.json: was changed"]
    with pytest.raises(TOPDError, match="--trust-remote-code"):
        replay_step(RUN, 1)


# Of the ledger itself


def test_a_deleted_and_an_edited_entry_are_found(copied):
    edit(RUN / LEDGER, lambda lines: lines.pop(9))
    edit_record(RUN / LEDGER, 20, lambda entry: entry.update(step=7))
    faults = audit_run(RUN, updates=0).faults
    assert faults[:2] == [f"{LEDGER}: entry 9 is missing", f"{LEDGER}: entry 21 was changed"]


def test_a_ledger_whose_end_was_cut_off_is_found(copied):
    edit(RUN / LEDGER, lambda lines: lines.pop())
    assert f"{LEDGER}: its end is missing, entry 42 is gone" in audit_run(RUN, updates=0).faults


@pytest.mark.parametrize("text", ["", "so", "[]", '{"entries": 38}'])
def test_a_head_that_is_none_is_found(copied, text):
    (RUN / HEAD).write_text(text)
    only(audit_run(RUN, updates=0), f"{HEAD}: is missing or no head")


def test_an_entry_that_is_none_is_found(copied):
    edit(RUN / LEDGER, lambda lines: lines.__setitem__(4, "so\n"))
    assert f"{LEDGER}: line 5 is not an entry" in audit_run(RUN, updates=0).faults


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("guidance.jsonl", lambda r: r["weights"].update({"3": 0.5}), "weights"),
        (
            "guidance.jsonl",
            lambda r: r["forks"][0].update(real=not r["forks"][0]["real"]),
            "forks[0].real",
        ),
        ("guidance.jsonl", lambda r: r["forks"][0].update(distance=0.0), "forks[0].distance"),
        ("guidance.jsonl", lambda r: r["forks"].pop(), "forks"),
        ("guidance.jsonl", lambda r: r["targets"].pop(), "targets"),
        ("guidance.jsonl", lambda r: r.update(prompt=0), "prompt"),
        ("rollouts.jsonl", lambda r: r["teacher_logprobs"].__setitem__(2, -0.1), "teacher_log"),
        ("rollouts.jsonl", lambda r: r["logprobs"].__setitem__(0, 9.0), "forks"),
        ("rollouts.jsonl", lambda r: r["response_ids"].__setitem__(0, 9), "forks"),
        ("rollouts.jsonl", lambda r: r.update(text="forged"), "text"),
    ],
)
def test_a_forgery_with_a_chain_made_anew_is_found_by_making_decisions_again(
    copied, name, change, fault
):
    edit_record(RUN / name, 6, change)
    chain_again()
    faults = audit_run(RUN).faults
    assert any(said.startswith(f"update 1, rollout 2: {fault}") for said in faults), faults


def rechain() -> None:
    """As :func:`chain_again`, with the files and events of the chain that was there."""
    before = [json.loads(line) for line in (RUN / LEDGER).read_text().splitlines()]
    lines = {name: iter((RUN / name).read_text().splitlines()) for name in RECORDS}
    (RUN / LEDGER).unlink()
    chain = Ledger(RUN)
    for entry in before:
        kept = {k: v for k, v in entry.items() if k not in ("n", "previous", "hash")}
        if "step" in kept and "file" in kept:
            kept["record"] = digest(next(lines[kept["file"]]).encode())
        elif "file" in kept:
            kept["record"] = file_digest(RUN / kept["file"])
        chain.add([kept])


def edit_all(name: str, change: Callable[[dict[str, Any]], object]) -> None:
    for number in range(len((RUN / name).read_text().splitlines())):
        edit_record(RUN / name, number, change)


def other_prompts(record: dict[str, Any]) -> None:
    record["prompt"] = (record["prompt"] + 3) % 8


def replace(name: str, old: str, new: str) -> None:
    content = (RUN / name).read_text()
    assert old in content
    (RUN / name).write_text(content.replace(old, new))


def only_in(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[], None]:
    return lambda: edit_all(name, change)


def forged_resume() -> None:
    """It would explain another learning rate."""
    stored = json.loads((RUN / "run.json").read_text())
    changed = {"config.learning_rate": [stored["config"]["learning_rate"], 1e-5]}
    stored["resumed"] = [{"step": 1, "changed": changed}]
    stored["config"]["learning_rate"] = 1e-5
    (RUN / "run.json").write_text(json.dumps(stored, indent=2) + "\n")


FORGERIES: dict[str, tuple[Callable[[], object], str]] = {
    "finished": (
        only_in("rollouts.jsonl", lambda r: r.update(finished=not r["finished"])),
        "its last token says otherwise",
    ),
    "prompts exchanged": (
        lambda: [edit_all(f"{n}.jsonl", other_prompts) for n in ("rollouts", "guidance")],
        "its tokens are not those of prompt",
    ),
    "student's prompt": (
        only_in("rollouts.jsonl", lambda r: r["prompt_ids"].append(7)),
        "its tokens are not those of prompt",
    ),
    "no log-probs": (
        only_in("rollouts.jsonl", lambda r: r.update(logprobs=[])),
        "logprobs are missing",
    ),
    "keys removed": (only_in("guidance.jsonl", lambda r: r.pop("targets")), "targets is missing"),
    "text removed": (only_in("rollouts.jsonl", lambda r: r.pop("text")), "text is missing"),
    "lengths halved": (
        only_in(
            "metrics.jsonl",
            lambda r: (
                r.update({"completions/mean_length": r["completions/mean_length"] / 2})
                if "loss" in r
                else None
            ),
        ),
        "completions/mean_length is 6.0, its rollouts give 12.0",
    ),
    "a mean removed": (
        only_in("metrics.jsonl", lambda r: r.pop("completions/mean_length", None)),
        "completions/mean_length is null, its rollouts give 12.0",
    ),
    "learning rate": (
        lambda: replace("run.json", '"learning_rate": 0.001', '"learning_rate": 0.002'),
        "run.json's settings give 0.002",
    ),
    "schedule": (
        lambda: replace(
            "run.json", '"lr_scheduler_type": "linear"', '"lr_scheduler_type": "constant"'
        ),
        "run.json's settings give",
    ),
    "text changed": (
        only_in("rollouts.jsonl", lambda r: r.update(text=r["text"] + " 7")),
        "text: ",
    ),
    "method": (
        lambda: replace("run.json", '"method": "topd"', '"method": "window_kd"'),
        "branches: recorded [], re-derived",
    ),
    "window's length": (
        lambda: replace("run.json", '"window_length": 4', '"window_length": 5'),
        "forks: recorded",
    ),
    "seed": (
        lambda: [replace(n, '"seed": 3', '"seed": 4') for n in ("run.json", "manifest.json")],
        "where seed 4 has",
    ),
    "a resume": (forged_resume, "run.json: resumed at update 1, where the ledger has no beginning"),
    "student's weights": (
        lambda: shutil.copy("student/model.safetensors", RUN / "student"),
        "student: has not the weights that the run ended with",
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_what_a_forger_changes_everywhere_is_found_though_the_chain_is_whole(copied, forgery):
    change, fault = FORGERIES[forgery]
    change()
    rechain()
    assert not audit_run(RUN, updates=0).faults  # the chain alone does not tell
    faults = audit_run(RUN, updates=9).faults
    assert any(fault in said for said in faults), faults


def test_an_exchanged_adapter_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(trained(tmp_path, lora=LORA))
    path = RUN / "adapter" / "adapter_model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(path).items()}, path)
    rechain()
    assert audit_run(RUN, updates=9).faults == [
        "adapter: has not the weights that the run ended with"
    ]


@pytest.mark.parametrize(("start", "part"), [("pissa", "svd"), ("olora", "qr")])
def test_an_adapter_made_of_the_weights_is_audited_and_resumed_elsewhere(
    tmp_path, monkeypatch, start, part
):
    """Another number of threads rounds otherwise: an honest run was accused, and not resumed."""
    monkeypatch.chdir(trained(tmp_path, lora={**LORA, "init_lora_weights": start}))
    parts = getattr(torch.linalg, part)

    def elsewhere(*args: Any, **options: Any) -> Any:
        return tuple(factor * (1 + 1e-6) for factor in parts(*args, **options))

    monkeypatch.setattr(torch.linalg, part, elsewhere)
    assert audit_run(RUN, updates=9).faults == []
    words = ["--output_dir=run", "--resume_from_checkpoint=last", "--max_steps=4"]
    run_recipe(Path("recipe.yaml"), words, quiet=True)
    assert audit_run(RUN, updates=9).faults == []
    weights = load_file("student/model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, "student/model.safetensors", {"format": "pt"})
    assert any("student" in said for said in audit_run(RUN, updates=1).faults)


def test_nobody_knows_beforehand_which_updates_an_audit_takes(copied):
    said = {audit_run(RUN, updates=1).checked[-1].rpartition("--seed ")[2] for _ in range(3)}
    assert len(said) == 3
    given = audit_run(RUN, updates=1, seed=5)
    assert given.checked[-1].endswith("(--seed 5)")
    assert given == audit_run(RUN, updates=1, seed=5)


# What a stranger's folder names is not asked


@pytest.fixture
def spy() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """A server, and what it was sent."""
    sent: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent.append((self.path, self.headers.get("Authorization")))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": []}')

        do_POST = do_GET  # noqa: N815 - http.server's name

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()


def serve(role: str, url: str) -> None:
    stored = json.loads((RUN / "run.json").read_text())
    served = {"completions": [url], "pooling": [url], "api_key_env": "MY_SECRET"}
    stored["recipe"][role]["served"] = {**served, "weights": str(Path.cwd() / "written")}
    (RUN / "run.json").write_text(json.dumps(stored, indent=2) + "\n")
    rechain()


@pytest.mark.parametrize("command", [["audit"], ["replay", "--step", "0"]])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_folder_names_a_server_and_a_secret_in_vain(copied, spy, monkeypatch, command, role):
    url, sent = spy
    monkeypatch.setenv("MY_SECRET", "hunter2")
    serve(role, url)
    result = CliRunner().invoke(app, [command[0], str(RUN), *command[1:]])
    assert sent == []
    assert not Path("written").exists()
    if role == "teacher":
        assert result.exit_code == 2
        assert "--served-teacher" in result.stderr
    else:
        assert result.exit_code == 0  # its weights are here


def test_the_auditors_own_server_gets_the_auditors_own_key_and_no_other(copied, spy, monkeypatch):
    url, sent = spy
    monkeypatch.setenv("MY_SECRET", "hunter2")
    monkeypatch.setenv("OWN", "mine")
    serve("teacher", "http://127.0.0.1:9")
    words = ["--served-teacher", url, "--served-pooling", url, "--api-key-env", "OWN"]
    result = CliRunner().invoke(app, ["audit", str(RUN), *words])
    assert result.exit_code == 2  # it is no vLLM
    assert {key for _, key in sent} == {"Bearer mine"}


@pytest.mark.parametrize("option", ["--served-teacher", "--served-pooling", "--api-key-env"])
def test_a_server_is_refused_where_the_teacher_was_not_served(copied, option):
    """Else an auditor would take its verdict for the server's."""
    for words in (["audit", "run"], ["replay", "run", "--step", "0"]):
        result = CliRunner().invoke(app, [*words, option, "http://127.0.0.1:9"])
        assert result.exit_code == 2
        assert "its teacher was not served" in " ".join(result.stderr.split())


def test_a_folder_that_names_models_of_the_hub_makes_no_connection(copied, monkeypatch):
    """Also where the auditor is online; nor is anything pushed."""
    replace("run.json", '"path": "student"', '"path": "somebody/else"')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked: list[object] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *a, **k: asked.append(a) or [])
    found = audit_run(RUN)
    assert asked == []
    assert "decisions: not re-derived" in found.faults[-1]


def test_a_repetition_pushes_nothing_and_runs_no_method_of_the_folder(copied):
    stored = json.loads((RUN / "run.json").read_text())
    stored["config"].update(push_to_hub=True, hub_model_id="a/b", deepspeed="x.json")
    (RUN / "run.json").write_text(json.dumps(stored))
    args = stored_recipe(RUN, Path("scratch")).args
    assert (args.push_to_hub, args.hub_model_id, args.deepspeed) == (False, None, None)
    stored["config"]["method"] = "first_fork"  # its settings were other ones: they stay
    (RUN / "run.json").write_text(json.dumps(stored))
    assert stored_recipe(RUN, Path("scratch")).args.brought == {}
    stored["config"]["method"] = "os:system"
    (RUN / "run.json").write_text(json.dumps(stored))
    with pytest.raises(TOPDError, match=r"'os:system' is code .* --trust-remote-code"):
        stored_recipe(RUN, Path("scratch"))


def test_records_that_cannot_be_read_are_a_fault(copied):
    edit(RUN / "rollouts.jsonl", lambda lines: lines.__setitem__(4, "so\n"))
    faults = audit_run(RUN).faults
    assert faults[0] == "rollouts.jsonl, update 1, rollout 0: was changed (line 5)"
    assert faults[1].startswith("decisions: not re-derived")


# Of anything at all

FILES = (*RECORDS, LEDGER, HEAD, "run.json", "manifest.json")
ODD = (None, -1, 10**30, math.nan, "x", "\x00", [], {}, [None], {"a": 1})


@pytest.fixture(scope="module")
def other(whole, tmp_path_factory) -> Path:
    """A copy that examples change and put right again."""
    return shutil.copytree(whole, tmp_path_factory.mktemp("other") / "copy")


@contextlib.contextmanager
def holding(root: Path, name: str, content: bytes) -> Iterator[None]:
    """We stand in the folder while a file of its run holds this."""
    path = root / RUN / name
    right = path.read_bytes()
    path.write_bytes(content)
    try:
        with contextlib.chdir(root):
            yield
    finally:
        path.write_bytes(right)


def changed_bytes(data: st.DataObject, content: bytes) -> bytes:
    """One byte flipped, lost or added, or the end cut off."""
    at = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[at]))
    before, after = content[:at], content[at:]
    return data.draw(
        st.sampled_from(
            [before + bytes([byte]) + after[1:], before + after[1:], before]
            + [before + bytes([byte]) + after]
        )
    )


def changed_value(data: st.DataObject, record: Any) -> None:
    """Some value of a record, however deep, lost or replaced by another kind."""
    while True:
        keys = sorted(record) if isinstance(record, dict) else range(len(record))
        key = data.draw(st.sampled_from(keys))
        inner = record[key]
        if not (isinstance(inner, dict | list) and inner and data.draw(st.booleans())):
            break
        record = inner
    new = data.draw(st.sampled_from(ODD).filter(lambda value: value != inner) | st.just(LOST))
    if new is LOST:
        del record[key]
    else:
        record[key] = new


LOST = object()


@settings(max_examples=300)
@given(data=st.data(), name=st.sampled_from(FILES))
def test_any_byte_changed_in_any_record_file_is_found_there(other, data, name):
    content = changed_bytes(data, (other / RUN / name).read_bytes())
    with holding(other, name, content):
        faults = audit_run(RUN, updates=0).faults
    assert any(name in fault for fault in faults), faults


@settings(max_examples=60)
@given(data=st.data(), name=st.sampled_from(FILES))
def test_any_value_changed_in_any_record_file_is_found_there_and_decisions_end_in_words(
    other, data, name
):
    lines = (other / RUN / name).read_bytes().splitlines(keepends=True)
    n = data.draw(st.integers(0, len(lines) - 1))
    record = json.loads(lines[n] if name.endswith("jsonl") else b"".join(lines))
    changed_value(data, record)
    written = f"{json.dumps(record)}\n".encode()
    content = b"".join([*lines[:n], written, *lines[n + 1 :]])
    with holding(other, name, content if name.endswith("jsonl") else written):
        faults = audit_run(RUN, updates=1).faults
    assert any(name in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("name", "damage", "fault"),
    [
        ("rollouts.jsonl", lambda b: b.replace(b'"step": 1', b'"step": \xff', 1), "(line 5)"),
        ("metrics.jsonl", lambda b: b[:-1], "metrics.jsonl: line 4 is cut off"),
        ("metrics.jsonl", lambda b: b.replace(b"\n", b"\r", 1), "(line 1)"),
        (
            LEDGER,
            lambda b: b.replace(b'"record"', b'"recorb"', 1),
            f"{LEDGER}: line 2 is not an entry",
        ),
        (
            LEDGER,
            lambda b: b.replace(b"begin", b"beg\xffn", 1),
            f"{LEDGER}: line 1 is not an entry",
        ),
        (LEDGER, lambda b: b.replace(b": 7", b":\t7", 1), f"{LEDGER}: line 8 was changed"),
        (LEDGER, lambda b: b[:-1], f"{LEDGER}: line 43 is cut off"),
        (LEDGER, lambda b: b"[" * 100_000 + b"\n" + b, f"{LEDGER}: line 1 is not an entry"),
        (HEAD, lambda b: b.replace(b"43", b"93", 1), f"{HEAD}: counts 93 entries, the chain has"),
        (HEAD, lambda b: b.replace(b"43", b"0", 1), f"{HEAD}: is missing or no head"),
        (HEAD, lambda b: b.replace(b"  ", b"", 1), f"{HEAD}: is missing or no head"),
        ("manifest.json", lambda b: b.replace(b"models", b"mode1s"), "manifest.json: was changed"),
    ],
)
def test_damage_is_named_with_its_line(copied, name, damage, fault):
    content = (RUN / name).read_bytes()
    (RUN / name).write_bytes(damage(content))
    faults = audit_run(RUN, updates=0).faults
    assert any(fault in said for said in faults), faults


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("manifest.json", (b'"teacher"', b'"teach3r"'), "manifest.json.*models.teacher is missing"),
        ("manifest.json", (b"sha256", b"sha\xff56"), "manifest.json: cannot be read"),
        (
            "rollouts.jsonl",
            (b'"logprobs": [', b'"logprobs": [0,'),
            "rollouts.jsonl, line 1: .*diff",
        ),
        ("guidance.jsonl", (b'"forks"', b'"fork3"'), "guidance.jsonl, line 1: .*forks"),
        ("rollouts.jsonl", (b'_ids": [', b'_ids": [99999'), "update 0, rollout 0: .* know 64"),
        ("run.json", (b'"config"', b'"confih"'), "run.json: cannot be used: KeyError"),
    ],
)
def test_what_decisions_cannot_be_made_from_is_named(copied, name, damage, said):
    content = (RUN / name).read_bytes()
    (RUN / name).write_bytes(content.replace(*damage, 1))
    last = audit_run(RUN).faults[-1]
    assert re.match(f"decisions: not re-derived: .*{said}", last), last


def test_an_entry_of_a_file_outside_of_the_run_is_not_followed(copied):
    """Reading a device would never end."""
    Ledger(RUN).add([{"file": "/dev/zero", "record": "0"}, {"file": "a" * 300, "record": "0"}])
    faults = audit_run(RUN, updates=0).faults
    assert faults == ["/dev/zero: is missing", f"{'a' * 300}: cannot be read (File name too long)"]


# Replay


def test_a_replay_starts_from_the_checkpoint_before(copied, caplog):
    assert replay_step(RUN, 1).checked[0] == "replay: update 1, from the beginning"
    found = replay_step(RUN, 2)
    assert "with other settings" not in caplog.text  # of its own folder
    assert found.checked[0] == "replay: update 2, from checkpoint-2"
    assert found.checked[-2] == "weights: before the updates 2, 3"
    assert re.fullmatch(r"student: every value of \d+ tensors", found.checked[-1])


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_replay_to_the_end_finds_one_value_of_the_student(tmp_path, monkeypatch, lora):
    """Which the ledger's digest has not: 64 values a tensor, of a LoRA run those of the adapter."""
    monkeypatch.chdir(trained(tmp_path, lora=lora))
    file = RUN / "student" / "model.safetensors"
    weights = load_file(file)
    key = max(weights, key=lambda key: weights[key].numel())
    weights[key].view(-1)[1] += 1
    save_file(weights, file, {"format": "pt"})
    rechain()
    assert audit_run(RUN).faults == []
    assert replay_step(RUN, 2).faults == [f"student: {key} is not as the run ended with it"]
    assert replay_step(RUN, 1).faults == []


@pytest.mark.parametrize(("lora", "rate"), [(None, 30.0), (LORA, 1.0)])
def test_a_run_that_ended_with_its_best_student_has_no_fault(tmp_path, monkeypatch, lora, rate):
    """A replay has the student of the last update, so it says that it does not compare the two."""
    options = {**EVALUATED, "load_best_model_at_end": True, "save_steps": 1}
    options |= {"lora": lora, "learning_rate": rate, "max_logprob_gap": 1e3}  # it gets worse
    monkeypatch.chdir(trained(tmp_path, **options))
    assert audit_run(RUN).faults == []
    found = replay_step(RUN, 2)
    assert found.faults == []
    assert "student: not compared, it is the run's best, of an earlier update" in found.checked
    stored = json.loads((RUN / "run.json").read_text())
    stored["config"]["load_best_model_at_end"] = False
    (RUN / "run.json").write_text(json.dumps(stored))
    assert "weights before update 3: not those of the run" in replay_step(RUN, 2).faults


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_run_whose_rate_followed_evaluations_is_audited_and_not_replayed(
    tmp_path, monkeypatch, schedule
):
    """A repetition makes no evaluations, which both schedules are refused without."""
    monkeypatch.chdir(trained(tmp_path, **EVALUATED, lr_scheduler_type=schedule))
    assert audit_run(RUN).faults == []
    with pytest.raises(TOPDError, match=f"--step 2: .* evaluations .*{schedule}.* topd audit"):
        replay_step(RUN, 2)


@pytest.mark.parametrize("kind", RENAMED)
def test_a_run_of_a_model_with_other_names_on_disk_has_no_fault(tmp_path, monkeypatch, kind):
    config = write_pair(tmp_path, **SMALL)
    for seed, role in enumerate(("student", "teacher")):
        shutil.rmtree(tmp_path / role)
        renamed_model(kind, seed=seed).save_pretrained(tmp_path / role)
        tiny_tokenizer().save_pretrained(tmp_path / role)
    monkeypatch.chdir(tmp_path)
    run_recipe(config, quiet=True)
    assert audit_run(RUN).faults == []
    assert replay_step(RUN, 2).faults == []


def test_a_replay_finds_another_rollout_another_loss_and_other_weights(copied):
    edit_record(RUN / "rollouts.jsonl", 4, lambda record: record["logprobs"].__setitem__(3, -0.25))
    edit_record(RUN / "metrics.jsonl", 0, lambda record: record.update(loss=1.0))
    written = [json.loads(line) for line in (RUN / LEDGER).read_text().splitlines()]
    (number,) = (e["n"] for e in written if e.get("event") == "update" and e["step"] == 1)
    edit_record(RUN / LEDGER, number, lambda entry: entry.update(student="f" * 64))
    faults = replay_step(RUN, 1).faults
    assert [re.sub(r"[\d.e-]+$", "", fault) for fault in faults] == [
        "metrics.jsonl, step 1: loss: recorded 1.0, re-derived ",
        "rollouts.jsonl, update 1, rollout 0: logprobs[3]: recorded -0.25, re-derived ",
        "weights before update 1: not those of the run",
    ]


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("metrics.jsonl", "grad_norm", "metrics.jsonl, step 2: grad_norm is missing"),
        ("guidance.jsonl", "weights", "guidance.jsonl, update 1, rollout 0: weights is missing"),
    ],
)
def test_a_replay_finds_a_key_that_one_record_lacks(copied, name, key, said):
    edit_record(RUN / name, 1 if name == "metrics.jsonl" else 4, lambda record: record.pop(key))
    rechain()
    assert said in replay_step(RUN, 1).faults


def test_a_replay_from_a_changed_checkpoint_differs(copied):
    edit_weights(RUN / "checkpoint-2", 1.01)
    with pytest.raises(TOPDError, match=r"checkpoint-2: model.safetensors was changed"):
        replay_step(RUN, 2)
    seal_again(RUN / "checkpoint-2")
    assert "weights before update 2: not those of the run" in replay_step(RUN, 2).faults


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("rollouts.jsonl", (b"text", b"t\xffxt"), "rollouts.jsonl, line 1: cannot be read"),
        ("metrics.jsonl", (b'"step"', b'"stop"'), "metrics.jsonl, line 1: cannot be read: step"),
        ("manifest.json", (b"models", b"mode1s"), "was begun with other models"),
        ("run.json", (b"{", b""), "run.json: cannot be used"),
    ],
)
def test_a_replay_of_damaged_records_ends_in_words(copied, name, damage, said):
    content = (RUN / name).read_bytes()
    (RUN / name).write_bytes(content.replace(*damage, 1))
    with pytest.raises(TOPDError, match=said):
        replay_step(RUN, 2)


# From another directory


def test_relative_paths_are_found_where_the_run_was_started(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert audit_run(whole / "run", updates=1).faults == []
    assert replay_step(whole / "run", 2).faults == []
    Path("prompts.jsonl").write_text('{"prompt": "what is 3 + 3 ?"}\n')
    faults = audit_run(whole / "run", updates=1).faults
    assert faults == [
        f"data: the prompts are not those of the run (relative paths are those from {tmp_path}, "
        f"the run's were from {whole})"
    ]


def test_the_answers_of_a_warm_start_are_found_where_it_was_started(copied, tmp_path, monkeypatch):
    stored = json.loads((RUN / "run.json").read_text())
    stored["config"].update(method="opd", answers="old.jsonl")
    (RUN / "run.json").write_text(json.dumps(stored))
    (RUN / LEDGER).unlink()
    Ledger(RUN).add([{"event": "begin", "step": 0, "records": {}, "directory": str(Path.cwd())}])
    Path("old.jsonl").touch()
    here = Path.cwd()
    monkeypatch.chdir(tmp_path)
    found = stored_recipe(here / RUN, Path("scratch")).args.answers
    assert found == str(here / "old.jsonl")


def test_a_relative_path_that_is_gone_is_named_with_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    there = trained(tmp_path / "there", max_steps=1, method="opd").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    said = rf"prompts\.jsonl\. The run was started in {tmp_path}/there, .*Chain, files and records"
    with pytest.raises(TOPDError, match=said):
        audit_run(there / "run")
    monkeypatch.chdir(there)
    assert audit_run(RUN).faults == []
    assert str(tmp_path) not in (RUN / "student" / "README.md").read_text()


def test_an_update_that_there_was_not_is_refused(copied):
    with pytest.raises(TOPDError, match=r"--step 3: run has the updates 0 to 2\. Choose one"):
        replay_step(RUN, 3)


# Doors


def test_the_command_says_what_it_checked_and_ends_with_1_if_there_is_a_fault(copied):
    good = CliRunner().invoke(app, ["audit", "run", "--updates", "1"])
    assert (good.exit_code, good.stderr) == (0, "")
    assert good.stdout.endswith("no fault found\n")
    assert CliRunner().invoke(app, ["replay", "run", "--step", "1"]).exit_code == 0
    edit(RUN / "guidance.jsonl", lambda lines: lines.pop())
    bad = CliRunner().invoke(app, ["audit", "run", "--updates", "0"])
    assert (bad.exit_code, bad.stderr) == (
        1,
        "guidance.jsonl, update 2, rollout 3: is missing\n",
    )


def test_a_folder_without_a_ledger_is_refused(tmp_path):
    with pytest.raises(TOPDError, match=r"has no ledger.jsonl\. Only runs of topd train"):
        audit_run(tmp_path)


def test_a_probe_is_not_replayed_as_if_its_batches_were_updates(copied):
    words = ["--rollouts", "2", "--bootstrap", "40", "--output_dir", "probe"]
    run_probe(Path("recipe.yaml"), words)
    with pytest.raises(TOPDError, match=r"probe: has no ledger\.jsonl\. Only runs of topd train"):
        replay_step(Path("probe"), 0)


def test_a_run_under_way_is_not_accused(copied):
    """Records that it adds while an audit reads are in no ledger that was read before them."""
    (RUN / LOCK).touch()
    assert audit_run(RUN, updates=1).faults == []
    edit(RUN / "guidance.jsonl", lambda lines: lines.append(lines[-1]))
    for check in (partial(audit_run, updates=0), audit_run, partial(replay_step, step=2)):
        with pytest.raises(TOPDError, match=r"the run is under way.*once it has ended"):
            check(RUN)
    os.utime(RUN / LOCK, (0, 0))  # of a process that was killed
    assert audit_run(RUN, updates=0).faults


def test_an_audit_of_a_run_without_rollouts_claims_nothing_of_them(tmp_path):
    with contextlib.chdir(trained(tmp_path, log_rollouts=False)):
        found = audit_run(RUN)
    assert found.faults == []
    assert "settings: learning rate of each log" in found.checked
    said = "decisions: none re-derived, as no update has its rollouts on record"
    assert found.checked[-1] == said


def test_a_comparison_with_a_plan_has_a_ledger_and_is_not_accused(tmp_path):
    run = RunFolder(tmp_path / "run", chained=True)
    run.write("run.json", {"compare": {"plan": "plan.md"}})
    run.note("plan", sha256="0" * 64, path="plan.md", results=0)
    found = audit_run(tmp_path / "run", updates=0)
    assert (found.faults, found.checked) == ([], ["chain: 2 entries", "files: 1, records: 0"])
    with pytest.raises(TOPDError, match=r"is a comparison.*arms/ARM-SEED.*--updates 0"):
        audit_run(tmp_path / "run")


def test_models_from_python_cannot_be_loaded_again(tmp_path):
    args = TOPDConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1, save_strategy="no")
    args.max_completion_length = 8
    TOPDTrainer(
        tiny_model(), tiny_model(seed=1), args, rows(4), processing_class=tiny_tokenizer()
    ).train()
    assert audit_run(tmp_path, updates=0).faults == []
    with pytest.raises(TOPDError, match=r"came from Python.*--updates 0"):
        audit_run(tmp_path)
