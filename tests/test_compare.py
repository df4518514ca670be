"""Comparisons: paired, resumable, and summarised without flattery."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from conftest import USE_CPU
from topd import cli
from topd.commands import compare
from topd.commands.compare import OWN, run_compare
from topd.commands.compare.budgets import TOKENS
from topd.commands.compare.problems import check_models, rows_digest
from topd.commands.compare.start import read_comparison
from topd.commands.compare.summary import summarise
from topd.commands.probe import run_probe
from topd.commands.recipe import read_recipe
from topd.commands.session import until_stopped
from topd.commands.tables import show_compare
from topd.commands.workers import VISIBLE, in_workers, visible_devices
from topd.errors import NONFINITE, TERMINATED, StoppedError, TOPDError
from topd.runs.files import as_json, digest
from topd.runs.lock import one_writer
from topd.runs.verified import read_entries
from topd.training.warmstart import Answered

RECIPE = """
student: testbed://programs/student
teacher: testbed://programs/teacher
data: {path: "testbed://programs", limit: 40}
evaluation: {path: "testbed://programs", limit: 20, samples: 2, temperature: 1.0, top_p: 1.0,
  max_tokens: 48, batch_size: 64, every: 1}
max_steps: 2
per_device_train_batch_size: 4
max_completion_length: 48
learning_rate: 1.0e-3
log_rollouts: false
use_cpu: true
warmstart:
  answers: data
  max_steps: 2
  per_device_train_batch_size: 4
  max_completion_length: 48
  use_cpu: true
compare:
  seeds: [0, 1]
  arms:
    opd: {method: opd}
    "topd, sharp": {method: topd, trajectory_weight: 0.3}
""".replace("use_cpu: true", f"use_cpu: {USE_CPU}")


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def results(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def without_seconds(result: dict) -> dict:
    curve = [{k: v for k, v in point.items() if "seconds" not in k} for point in result["curve"]]
    return {**{k: v for k, v in result.items() if "seconds" not in k}, "curve": curve}


# Summaries


def one(arm: str, seed: int, right: list[float], seconds: float) -> dict:
    middle, end = sum(right) / len(right) / 2, sum(right) / len(right)
    curve = [
        {
            "step": step,
            "seconds": seconds * share,
            "cpu_seconds": 2 * seconds * share,
            "greedy": score,
            "pass@1": score,
            "solved": {"greedy": [x * level for x in right], "pass@1": [x * level for x in right]},
            **dict.fromkeys(("student_written", "learned", "teacher_read"), 10.0 * step),
            "teacher_written": (2.0 if arm == "new" else 0.0) * step,
        }
        for step, share, score, level in (
            (0, 0.0, 0.0, 0.0),
            (1, 0.5, middle, 0.5),
            (2, 1.0, end, 1.0),
        )
    ]
    solved = {"greedy": right, "pass@1": right}
    return {"arm": arm, "seed": seed, "greedy": end, "pass@1": end, "seconds": seconds,
            "cpu_seconds": 2 * seconds, "teacher_tokens": 7.0, "curve": curve,
            "solved": solved}  # fmt: skip


def test_of_the_last_update_and_the_best_a_curve_ends_with_the_student_of_the_run():
    """With load_best_model_at_end both are evaluated, after the same update."""
    spent = dict.fromkeys((f"tokens/{key}" for key in TOKENS), 5.0)
    scored = [
        {"step": step, "eval/training_seconds": t, "eval/training_cpu_seconds": t,
         "eval/greedy": score, "eval/pass@1": score}
        for step, t, score in ((0, 0.0, 0.1), (1, 1.0, 0.2), (1, 1.5, 0.4))
    ]  # fmt: skip
    logs = [scored[0], {"step": 1, "loss": 1.0, **spent}, *scored[1:]]
    curve = compare._curve(logs, [{"greedy": [x]} for x in (0.1, 0.2, 0.4)], Answered())
    assert [(p["step"], p["greedy"], p["solved"]["greedy"]) for p in curve] == [
        (0, 0.1, [0.1]),
        (1, 0.4, [0.4]),
    ]
    assert curve[-1]["seconds"] == 1.5
    assert curve[-1]["learned"] == 5.0


def test_differences_are_paired_by_seed_and_problem():
    found = summarise(
        [
            one("opd", 0, [1, 0, 0, 0], 10), one("new", 0, [1, 1, 0, 0], 20),
            one("opd", 1, [0, 0, 1, 1], 12), one("new", 1, [0, 1, 1, 1], 24),
        ],
        "opd", {},
    )  # fmt: skip
    new = found["summary"]["new"]
    assert new["greedy"]["mean"] == 5 / 8
    assert new["greedy_vs_opd"]["mean"] == 1 / 4
    assert new["greedy_vs_opd"]["low"] < 0  # four problems, of which two do not differ
    assert new["seconds_ratio"] == 2
    # half of its time is the baseline's, when it stood at 0.25 and 0.375 against 0.25 and 0.5
    assert new["greedy at equal time"] == pytest.approx((0.25 + 0.375) / 2)
    behind = new["greedy_vs_opd at equal time"]
    assert behind["mean"] == pytest.approx(-0.125 / 2)
    assert behind["low"] < -0.1875 < 0.0625 < behind["high"]  # beyond the seeds' own -1/8 and 0
    same = found["summary"]["opd"]["greedy_vs_opd"]
    assert found["summary"]["opd"]["greedy_vs_opd at equal time"] == same
    assert (same["mean"], same["high"]) == (0, pytest.approx(1 - 0.025 ** (1 / 4)))


def test_arms_are_compared_where_they_have_spent_the_same():
    """Twice as slow and with teacher's tokens: at equal seconds half of its answers are there."""
    runs = [
        one("opd", 0, [1, 0, 0, 0], 10), one("new", 0, [1, 1, 0, 0], 20),
        one("opd", 1, [0, 0, 1, 1], 10), one("new", 1, [0, 1, 1, 1], 20),
    ]  # fmt: skip
    found = summarise(runs, "opd", {}, references=["opd", "new"])
    equal = found["equal"]["opd"]["new"]
    assert equal["updates"]["greedy"]["mean"] == 1 / 4
    assert equal["seconds"]["greedy"]["mean"] == pytest.approx((5 / 16) - 3 / 8)
    assert equal["seconds"]["greedy"]["low"] < equal["seconds"]["greedy"]["mean"]
    assert equal["teacher-written tokens"] is None  # the reference has none
    # costs at the end: 20 + 0.6 * 20 + r (t + 0.2 * 20), with t = 0 for OPD and 4 for the other
    assert found["spent"]["opd"]["cost"] == {"1": 36.0, "5": 52.0, "25": 132.0}
    assert found["spent"]["new"]["cost"] == {"1": 40.0, "5": 72.0, "25": 232.0}
    assert equal["cost at r = 25"]["greedy"]["mean"] == pytest.approx(132 / 232 * 5 / 8 - 3 / 8)
    behind = found["equal"]["new"]["opd"]["teacher-written tokens"]
    assert behind["reached"] == 0
    assert found["equal"]["new"]["opd"]["seconds"]["reached"] == 0.5
    runs[2] = one("opd", 1, [0, 0, 1, 1], 40)  # more than was to be spent does not make up for less
    found = summarise(runs, "opd", {}, references=["new"])
    assert found["equal"]["new"]["opd"]["seconds"]["reached"] == 0.75
    runs[2] = one("opd", 1, [0, 0, 1, 1], 10)
    found = summarise(runs, "opd", {}, references=["opd", "new"])
    assert behind["greedy"]["mean"] == -1 / 4
    end = found["against"]["new"]["opd"]
    assert (end["greedy"]["mean"], end["seeds"]) == (-1 / 4, [0, 1])
    assert end["greedy"]["holm"] == 1  # four problems say nothing
    assert [p["step"] for p in found["curves"]["new"]] == [0, 1, 2]


def test_the_table_fits_a_terminal_of_80_columns():
    found = summarise(
        [one(arm, s, [1, 0, 1, 0], 10.0) for arm in ("opd", "downweight_matched") for s in (0, 1)],
        "opd", {"warm start": {"greedy": {"mean": 0.4}, "pass@1": {"mean": 0.2}}},
    )  # fmt: skip
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_compare(console, found)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "+0.0 [-60.2,60.2]" in text
    assert "downweight_matched" in text
    assert "2 seeds; 95 % intervals over seeds and problems; per cent; time over\nopd's" in text


# Runs


def test_a_comparison_goes_on_where_it_stopped_with_the_same_results(recipe, tmp_path, monkeypatch):
    whole = results(run_compare(recipe, [f"--output_dir={tmp_path / 'whole'}"]))
    assert [(r["arm"], r["seed"]) for r in whole] == [
        ("opd", 0), ("topd, sharp", 0), ("opd", 1), ("topd, sharp", 1),
    ]  # fmt: skip
    run, done = compare.run_arm, []

    def stopping(task, console):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task)
        return run(task, console)

    words = [f"--output_dir={tmp_path / 'parts'}"]
    monkeypatch.setattr(compare, "run_arm", stopping)
    with pytest.raises(StoppedError, match=rf"Ctrl-C.*same command with --output_dir {tmp_path}"):
        run_compare(recipe, words)
    monkeypatch.setattr(compare, "run_arm", run)
    parts = results(run_compare(recipe, [*words, "--resume_from_checkpoint=last"]))
    assert [without_seconds(r) for r in parts] == [without_seconds(r) for r in whole]
    assert whole[0]["solved"] != whole[2]["solved"] or whole[0]["curve"] != whole[2]["curve"]


def test_a_run_that_fails_loses_no_other(recipe, tmp_path):
    words = [f"--output_dir={tmp_path / 'run'}", "--compare.seeds=[0]"]
    held = tmp_path / "run" / "arms" / "opd-0"
    held.mkdir(parents=True)
    with one_writer(held), pytest.raises(TOPDError, match="opd-0"):
        run_compare(recipe, [*words, "--compare.jobs=2"])
    (kept,) = results(tmp_path / "run")
    assert kept["arm"] == "topd, sharp"
    assert results(run_compare(recipe, words))[0] == kept


def test_arms_are_in_the_order_of_the_recipe_whichever_ended_first(recipe, tmp_path, monkeypatch):
    def run_arm(*_):
        found = one("", 0, [1.0, 0.0] * 10, 1.0)
        return {key: value for key, value in found.items() if key not in ("arm", "seed")}

    monkeypatch.setattr(compare, "run_arm", run_arm)
    monkeypatch.setattr(compare, "check_arms", lambda *_: {})
    words = [f"--output_dir={tmp_path / 'run'}", "--compare.arms"]
    run_compare(recipe, [*words, "{opd: {method: opd}}"])
    folder = run_compare(recipe, [*words, "{new: {method: topd}, opd: {method: opd}}"])
    assert results(folder)[0]["arm"] == "opd"
    assert json.loads((folder / "compare.json").read_text())["arms"] == ["new", "opd"]


def test_seeds_that_are_no_longer_asked_for_leave_the_table_and_come_back(
    recipe, tmp_path, monkeypatch
):
    def run_arm(task, *_):
        found = one("", 0, [1.0, 0.0] if task[1]["seed"] else [0.0, 0.0], 1.0)
        return {key: value for key, value in found.items() if key not in ("arm", "seed")}

    def table(seeds):
        words = [f"--output_dir={tmp_path / 'run'}", f"--compare.seeds={seeds}"]
        return json.loads((run_compare(recipe, words) / "compare.json").read_text())

    monkeypatch.setattr(compare, "run_arm", run_arm)
    monkeypatch.setattr(compare, "check_arms", lambda *_: {})
    monkeypatch.setattr(compare, "check_problems", lambda *_: None)
    both, without, again = table("[0, 1]"), table("[1]"), table("[0, 1]")
    assert (both["seeds"], both["summary"]["opd"]["greedy"]["mean"]) == ([0, 1], 0.25)
    assert (without["seeds"], without["summary"]["opd"]["greedy"]["mean"]) == ([1], 0.5)
    assert again == both
    assert len(results(tmp_path / "run")) == 4


def test_runs_after_one_that_fails_are_run_and_it_is_said_which_failed(
    recipe, tmp_path, monkeypatch
):
    """A night's work is not lost with its second run; brackets in names are no markup."""
    console, words = Console(record=True, width=200), [f"--output_dir={tmp_path / 'run'}"]
    words.append("--compare.arms={'opd [/b]': {method: opd}, bad: {method: topd}}")
    words.append("--compare.baseline=opd [/b]")

    def run_arm(task, console):
        if task[1]["method"] == "topd":
            raise StoppedError(f"update {task[1]['seed']}: not finite.", NONFINITE)
        found = one("", 0, [1.0, 0.0] * 10, 1.0)
        return {key: value for key, value in found.items() if key not in ("arm", "seed")}

    monkeypatch.setattr(compare, "run_arm", run_arm)
    monkeypatch.setattr(compare, "check_arms", lambda *_: {})
    said = r"arm 'bad', seed 0: update 0: not finite\. 1 more failed: 'bad', seed 1\. .* kept"
    with pytest.raises(StoppedError, match=said) as found:
        run_compare(recipe, words, console=console)
    assert found.value.exit_code == NONFINITE
    assert [(r["arm"], r["seed"]) for r in results(tmp_path / "run")] == [
        ("opd [/b]", 0), ("opd [/b]", 1),
    ]  # fmt: skip
    assert "bad, seed 0 failed: update 0" in console.export_text(clear=False)
    assert "opd [/b], seed 1: greedy 50.0%" in console.export_text()
    words[1] = "--compare.arms={'opd [/b]': {method: opd}}"
    show_compare(console, json.loads((run_compare(recipe, words) / "compare.json").read_text()))
    assert "over opd [/b]" in console.export_text()


def test_a_run_that_fails_leaves_its_models_no_memory(recipe, tmp_path, monkeypatch):
    """What the next runs need on the same GPU; one that had none itself is a run that failed."""
    words = [f"--output_dir={tmp_path / 'run'}", "--compare.arms={opd: {}, b: {}, c: {}}"]
    models = []

    class Model:
        """Of the run that fails."""

    def run_arm(task, console):
        gc.collect()
        alive = [model() for model in models]
        assert alive == [None] * len(alive)
        own = Model()
        models.append(weakref.ref(own))
        fault = torch.OutOfMemoryError("CUDA out of memory.")
        raise fault if len(models) > 1 else StoppedError("not finite.", NONFINITE) from fault

    monkeypatch.setattr(compare, "run_arm", run_arm)
    monkeypatch.setattr(compare, "check_arms", lambda *_: {})
    console = Console(record=True, width=200)
    said = r"arm 'opd', seed 0: not finite\. 2 more failed: 'b', seed 0; 'c', seed 0"
    with pytest.raises(StoppedError, match=said) as found:
        run_compare(recipe, [*words, "--compare.seeds=[0]"], console=console)
    assert (found.value.exit_code, len(models)) == (NONFINITE, 3)
    assert "CUDA out of memory. Lower per_device_train_batch_size" in console.export_text()


def test_the_traceback_of_a_function_of_ones_own_is_shown_at_the_end(recipe, tmp_path, monkeypatch):
    def run_arm(*_):
        fault = TOPDError("method: mine:guide raised KeyError: 'a'")
        fault.add_note("mine.py, in guide")  # as topd.named.called has it
        raise fault

    monkeypatch.setattr(compare, "run_arm", run_arm)
    monkeypatch.setattr(compare, "check_arms", lambda *_: {})
    words = [f"--output_dir={tmp_path / 'run'}", "--compare.seeds=[0]", "--quiet"]
    done = CliRunner().invoke(cli.app, ["compare", str(recipe), *words])
    assert "mine.py, in guide" in done.output


def test_workers_end_with_a_comparison_that_is_killed(recipe, tmp_path):
    """Else they would go on writing where it is to be continued."""
    folder = tmp_path / "run"
    words = ["compare", str(recipe), f"--output_dir={folder}", "--compare.jobs=2"]
    with subprocess.Popen([sys.executable, "-m", "topd", *words], stdout=subprocess.DEVNULL) as run:
        for _ in range(1200):
            if [*folder.glob("arms/*/run.json")]:
                break
            time.sleep(0.1)
        workers = psutil.Process(run.pid).children(recursive=True)
        run.kill()
    assert workers
    assert psutil.wait_procs(workers, timeout=60)[1] == []


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_each_worker_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    """Of those that are visible; where there is one they share it. Both wait for each other."""
    work = f"touch {tmp_path}/$$; until [ $(ls {tmp_path} | wc -l) = 2 ]; do sleep 0.1; done; "
    work += f"sleep 0.3; echo ${VISIBLE}"
    monkeypatch.setenv(VISIBLE, "GPU-a, 3")
    found = dict(in_workers(subprocess.getoutput, {0: work, 1: work}, 2))
    assert sorted(found.values()) == ["3", "GPU-a"]
    for named, seen in (("5", ["5"]), ("0,", ["0"]), ("0,-1,1", ["0"]), ("", [])):
        monkeypatch.setenv(VISIBLE, named)
        assert visible_devices() == seen
    monkeypatch.delenv(VISIBLE)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert visible_devices() == ["0", "1"]


def test_workers_end_at_once_if_the_comparison_is_interrupted():
    """No other task begins, and none is waited for."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    found = in_workers(time.sleep, {0: 0, 1: 600, 2: 600}, 2)
    try:
        assert next(found) == (0, None)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(found)
    finally:
        signal.signal(signal.SIGINT, before)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_says_how_it_continues(tmp_path, number):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    console, again = Console(record=True, width=200), f"same command with --output_dir {tmp_path}"
    try:
        with (
            pytest.raises(StoppedError, match=again) as found,
            until_stopped("probe", tmp_path, console),
        ):
            signal.raise_signal(number)
    finally:
        signal.signal(signal.SIGINT, before)
    assert found.value.exit_code == TERMINATED
    assert f"run folder: {tmp_path}; if it is stopped, the {again}" in console.export_text()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_arms_share_prompts_and_sampling_seeds(recipe, tmp_path):
    """With lambda 0 the guided arm is the baseline, rollout by rollout."""
    words = [f"--output_dir={tmp_path / 'run'}", "--compare.seeds=[3]"]
    plain = "{method: topd, trajectory_weight: 0, save_strategy: steps}"
    recipe.write_text(f"{recipe.read_text()}\nlogging_steps: 4")
    words += [f"--compare.arms={{opd: {{method: opd}}, plain: {plain}}}"]
    folder = run_compare(recipe, words)
    first, second = results(folder)
    # checkpoints that nobody asked for would never be read
    assert [path.parent.name for path in folder.rglob("checkpoint-*")] == ["plain-3"]
    assert first["solved"] == second["solved"]
    assert (second["teacher_tokens"] > 0) > (first["teacher_tokens"] > 0)
    for key in ("student_written", "teacher_read"):  # however often an update is logged
        spent = [[point[key] for point in result["curve"]] for result in (first, second)]
        assert spent[0] == spent[1]
        assert spent[0][-1] > spent[0][-2] > 0


def test_what_both_stages_share_is_given_to_the_common_start_too(recipe, tmp_path):
    """From the command line; its own settings stay."""
    words = [f"--output_dir={tmp_path / 'run'}", "--compare.warmstart", "--compare.seeds=[0]"]
    words += ["--chunk_tokens=77", "--max_steps=1", "--compare.arms={opd: {method: opd}}"]
    words += ["--data.limit=12", "--warmstart.learning_rate=1e-4"]
    folder = run_compare(recipe, words)
    stored = json.loads((folder / "warmstart" / "run.json").read_text())
    start, own = stored["config"], yaml.safe_load(RECIPE)["warmstart"]
    assert (start["chunk_tokens"], start["max_steps"]) == (77, own["max_steps"])
    assert (stored["recipe"]["data"]["limit"], start["learning_rate"]) == (12, 1e-4)
    arm = json.loads((folder / "arms" / "opd-0" / "run.json").read_text())["config"]
    assert (arm["max_steps"], arm["learning_rate"]) == (1, 1e-3)


def test_a_common_start_has_every_part_that_stage_1_reads(recipe):
    """What it names itself, here or in its part of the recipe, is its own."""
    words = ["--student.path=mine", "--teacher.dtype=bfloat16", "--data.path=other", "--lora.r=4"]
    words += ["--chat_template_kwargs.x=1", "--evaluation.limit=5", "--max_steps=9"]
    words += ["--window_length=9", "--temperature=0.8"]  # say nothing to stage 1
    words += ["--warmstart.data.limit=3", "--warmstart.fp16=false", "--bf16"]
    comparison = read_comparison(recipe, ["--compare.warmstart", *words, STAGED])
    first = comparison.first
    assert first is not None
    assert (first.student.path, first.teacher.dtype) == ("mine", "bfloat16")
    assert (first.data.path, first.data.limit, comparison.recipe.data.limit) == ("other", 3, 40)
    assert (first.lora.r, first.evaluation.limit) == (4, 5)
    assert (first.args.chat_template_kwargs, first.args.max_steps) == ({"x": 1}, 2)
    assert (first.args.bf16, comparison.recipe.args.bf16) == (False, True)
    assert comparison.arms["again"].data.limit == 3  # an arm of stage 1 is as its part says
    assert comparison.arms["new"].data.limit == 8
    assert [comparison.arms[arm].args.window_length for arm in ("opd", "new")] == [9, 50]
    assert [comparison.arms[arm].args.temperature for arm in ("opd", "new")] == [0.8, 0.6]
    assert comparison.arms["opd"].data.limit == 40


def test_every_arm_starts_from_the_warm_start(recipe, tmp_path):
    words = [f"--output_dir={tmp_path / 'run'}", "--compare.warmstart", "--compare.seeds=[0]"]
    words.append("--student.attn_implementation=eager")
    folder = run_compare(recipe, words)
    content = json.loads((folder / "compare.json").read_text())
    start = content["starts"]["warm start"]["greedy"]["mean"]
    assert {r["curve"][0]["greedy"] for r in results(folder)} == {start}
    assert set(content["starts"]) == {"base", "warm start"}
    student = json.loads((folder / "arms" / "opd-0" / "run.json").read_text())["recipe"]["student"]
    assert student["path"] == str(folder / "warmstart" / "student")
    assert student["attn_implementation"] == "eager"  # it is loaded as the student before it
    assert not [*folder.rglob("checkpoint-*")]
    found = results(folder)
    for other in (RECIPE.replace("  max_steps: 2", "  max_steps: 1"), RECIPE):
        recipe.write_text(other)
        if other == RECIPE:
            assert results(run_compare(recipe, words)) == found
        else:
            with pytest.raises(TOPDError, match=r"another comparison.*stage 1"):
                run_compare(recipe, words)
    stored = json.loads((folder / "run.json").read_text())
    older = {key: part for key, part in stored.items() if key not in ("start", "staged")}
    (folder / "run.json").write_text(json.dumps(older))  # which did not say how it began
    recipe.write_text(RECIPE.replace("  max_steps: 2", "  max_steps: 1"))
    assert results(run_compare(recipe, words)) == found
    assert json.loads((folder / "run.json").read_text()) == older


@pytest.mark.parametrize("answers", ["teacher", "data", "older.jsonl"])
def test_the_answers_of_the_common_start_are_those_that_it_learned(recipe, tmp_path, answers):
    """Wherever it had them from."""
    words = [f"--output_dir={tmp_path}", "--compare.warmstart", f"--warmstart.answers={answers}"]
    comparison = read_comparison(recipe, [*words, STAGED])
    written = str(tmp_path / "warmstart" / "answers.jsonl") if answers == "teacher" else answers
    assert comparison.arms["again"].args.answers == written


def test_a_comparison_needs_no_recipe_file(recipe, tmp_path):
    content = {**yaml.safe_load(RECIPE), "output_dir": str(tmp_path)}
    del content["warmstart"]
    words = [word for key, value in content.items() for word in (f"--{key}", json.dumps(value))]
    comparison = read_comparison(Path(words[0]), words[1:])
    assert (comparison.path, list(comparison.arms)) == (None, ["opd", "topd, sharp"])
    assert comparison.keys_of({"method": "opd"}, {})["student"] == content["student"]


STAGED = """--compare.arms={opd: {method: opd},
  again: {stage: warmstart, answers: start, max_steps: 2},
  new: {stage: warmstart, data.limit: 8, max_steps: 2}}"""


def test_stage_1_is_an_arm_like_any_other_and_its_answers_cost(recipe, tmp_path):
    text = RECIPE.replace("answers: data", "answers: teacher\n  data: {path: 'testbed://programs', "
                          "limit: 12}")  # fmt: skip
    recipe.write_text(text)
    words = [f"--output_dir={tmp_path / 'run'}", "--compare.seeds=[0]", "--compare.warmstart"]
    folder = run_compare(recipe, [*words, STAGED, "--compare.references=[opd, new]"])
    opd, again, new = results(folder)
    assert opd["curve"][0]["greedy"] == again["curve"][0]["greedy"] == new["curve"][0]["greedy"]
    written = [result["curve"][-1]["teacher_written"] for result in (opd, again, new)]
    assert written[0] == written[1] == 0 < written[2]
    assert new["curve"][0]["teacher_written"] == written[2]  # before the first update
    assert new["curve"][0]["cpu_seconds"] > again["curve"][0]["cpu_seconds"]
    for result, own in ((opd, True), (again, False), (new, False)):
        end = result["curve"][-1]
        assert (end["student_written"] > 0) == (end["teacher_read"] > 0) == own
        assert end["learned"] > 0
        assert len(end["solved"]["greedy"]) == 20
    stored = (folder / "warmstart" / "answers.jsonl").read_text().splitlines()
    assert len(stored) == 13
    assert not (folder / "arms" / "again-0" / "answers.jsonl").exists()
    content = json.loads((folder / "compare.json").read_text())
    assert set(content["equal"]["new"]) == {"opd", "again"}
    stored = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(stored[:2]))  # stopped in the third
    content = json.loads((folder / "run.json").read_text())
    content["compare"]["arms"]["again"]["overlap"] = True  # without effect, not refused before
    for stage in (content["start"], content["staged"]["again"]):
        stage["config"]["window_length"] = 7
    (folder / "run.json").write_text(json.dumps(content))
    run_compare(recipe, [*words, STAGED, "--compare.references=[opd, new]"])
    assert results(folder)[2]["curve"][-1]["teacher_written"] == written[2]  # its answers too
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({k: v for k, v in content.items() if k != "start"}))
    with pytest.raises(TOPDError, match="another comparison"):  # its arms of stage 1 were another
        run_compare(recipe, [*words, STAGED, "--warmstart.learning_rate=1"])


def test_another_comparison_is_not_mixed_in(recipe, tmp_path):
    words = [f"--output_dir={tmp_path / 'run'}", "--compare.seeds=[0]"]
    run_compare(recipe, words)
    with pytest.raises(TOPDError, match="another comparison"):
        run_compare(recipe, [*words, "--learning_rate=1e-4"])


def test_a_comparison_may_get_more_arms_and_seeds_and_no_other_ones(recipe, tmp_path):
    words = [f"--output_dir={tmp_path / 'run'}", "--compare.seeds=[0]"]
    one = "opd: {method: opd}"
    first = results(run_compare(recipe, [*words, f"--compare.arms={{{one}}}"]))
    more = "topd: {method: topd, seeds: [0, 1]}"
    folder = run_compare(recipe, [*words, f"--compare.arms={{{one}, {more}}}"])
    assert results(folder)[0] == first[0]
    assert [(r["arm"], r["seed"]) for r in results(folder)[1:]] == [("topd", 0), ("topd", 1)]
    with pytest.raises(TOPDError, match="another comparison"):
        run_compare(recipe, [*words, "--compare.arms={opd: {method: opd, beta: 0}}"])
    for place in ("opd-0", "topd-0"):  # as if the student there had been trained on since
        path = folder / "arms" / place / "manifest.json"
        content = json.loads(path.read_text())
        content["models"]["student"]["sha256"] = "0" * 64
        path.write_text(json.dumps(content))
    more = f"{more}, late: {{method: opd}}"
    with pytest.raises(TOPDError, match=r"student at testbed://.* other weights with late, seed 0"):
        run_compare(recipe, [*words, f"--compare.arms={{{one}, {more}}}"])
    assert len(results(folder)) == 3


def test_code_that_changed_between_the_seeds_of_an_arm_is_refused(recipe, tmp_path, monkeypatch):
    """They were averaged; another arm's code in the same file may change."""

    def run(content, seeds, more=""):
        (tmp_path / "my_mine.py").write_text(content)
        monkeypatch.delitem(sys.modules, "my_mine", raising=False)
        words = [f"--output_dir={tmp_path / 'run'}", "--max_steps=1"]
        arms = f"opd: {{method: opd}}, own: {{method: my_mine:mine}}{more}"
        words.append(f"--compare.arms={{{arms}}}")
        run_compare(recipe, [*words, f"--compare.seeds={seeds}"])

    monkeypatch.chdir(tmp_path)
    first = "from topd.methods import opd\n\nmine = opd\n"
    other = f"{first}more = opd\n"
    run(first, [0])
    more = ", more: {method: my_mine:more, seeds: [0]}"
    run(other, [0], more)
    with pytest.raises(TOPDError, match=r"my_mine:mine has changed since own, seed 0 was run"):
        run(other, [0, 1], more)
    assert len(results(tmp_path / "run")) == 3


def test_what_an_adapter_trains_whole_makes_no_other_student(tmp_path):
    """It is in the hash of the student's weights; a stand-in for a teacher of text has none."""
    adapters = {"opd": None, "whole": {"r": 4, "modules_to_save": ["norm"]}, "alike": {"r": 4}}
    for i, (arm, lora) in enumerate(adapters.items()):
        place = tmp_path / "arms" / f"{arm}-0"
        place.mkdir(parents=True)
        recipe = {"student": {"path": "a"}, "teacher": {"path": "b", "text": {}}, "lora": lora}
        models = {"student": {"sha256": f"{i}"}, "teacher": {"sha256": f"{i}"}}
        (place / "run.json").write_text(json.dumps({"recipe": recipe}))
        (place / "manifest.json").write_text(json.dumps({"models": models}))
    *before, last = [{"arm": arm, "seed": 0} for arm in adapters]
    check_models(tmp_path, last, before)
    (tmp_path / "arms/alike-0/run.json").write_text(
        json.dumps({"recipe": {**recipe, "lora": None}})
    )
    with pytest.raises(TOPDError, match="the student at a has other weights with alike"):
        check_models(tmp_path, last, before)


@pytest.mark.parametrize("changed", ["number", "rows", "rows, and all runs are done", "all done"])
def test_other_problems_than_those_of_runs_that_are_done_are_refused_before_one_runs(
    recipe, tmp_path, monkeypatch, changed
):
    """Runs are paired by problem; rows that repeat a prompt were problems to an older version."""
    words = [f"--output_dir={tmp_path / 'run'}", "--compare.seeds=[0]", "--max_steps=1"]
    arms, new = "--compare.arms={opd: {method: opd}}", "new"
    more = "--compare.arms={opd: {method: opd}, new: {method: topd}}"
    if "done" in changed:
        more, new = arms, "opd"
    if "rows, and" in changed:  # the student before and after stage 1 is still to be evaluated
        words = [*words, "--compare.warmstart"]
    (stored,) = results(run_compare(recipe, [*words, arms]))
    if changed == "number":
        del stored["problems"]  # as older versions had it
        stored["solved"] = {score: [*right, 0.0] for score, right in stored["solved"].items()}
    else:
        stored["problems"] = "0" * 64  # the file had other rows then
    (tmp_path / "run" / "results.jsonl").write_text(json.dumps(stored) + "\n")
    monkeypatch.setattr(compare, "run_arm", lambda *_: pytest.fail("an arm ran"))
    with pytest.raises(TOPDError, match=f"opd, seed 0 and {new} have different problems"):
        run_compare(recipe, [*words, more])


def rows_in(path: Path, recipe: Path) -> list[str]:
    """The recipe's rows in a file of their own, as its lines."""
    rows = [json.dumps(row) + "\n" for row in read_recipe(recipe).data.load()]
    path.write_text("".join(rows))
    return rows


def test_other_data_than_that_of_runs_that_are_done_is_refused_before_one_runs(
    recipe, tmp_path, monkeypatch
):
    """Seeds of old and new rows would be averaged as those of one arm."""
    path = tmp_path / "train.jsonl"
    rows = rows_in(path, recipe)
    words = [f"--output_dir={tmp_path / 'run'}", f"--data.path={path}", "--max_steps=1"]
    words += ["--data.chat=false", "--compare.arms={opd: {method: opd}}"]
    run_compare(recipe, [*words, "--compare.seeds=[0]"])
    monkeypatch.setattr(compare, "run_arm", lambda *_: pytest.fail("an arm ran"))
    path.write_text("".join(reversed(rows)))
    for seeds in ("[0, 1]", "[0]"):  # and where nothing is left to run
        with pytest.raises(TOPDError, match=r"train\.jsonl has other rows than when opd, seed 0 l"):
            run_compare(recipe, [*words, f"--compare.seeds={seeds}"])
    assert len(results(tmp_path / "run")) == 1


def test_other_data_than_that_of_stage_1_is_refused_before_an_arm_runs(
    recipe, tmp_path, monkeypatch
):
    """Else the arms would begin from a student of rows that no file has."""
    path = tmp_path / "train.jsonl"
    rows = rows_in(path, recipe)
    words = [f"--output_dir={tmp_path / 'run'}", f"--data.path={path}", "--data.chat=false"]
    words += ["--compare.seeds=[0]", "--compare.warmstart"]
    ran = []

    def stopped(*_):
        ran.append(path.read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_arm", stopped)
    for now in (rows, rows[:-1], rows):
        path.write_text("".join(now))
        said = "Ctrl-C" if now == rows else r"train\.jsonl has other rows than when stage 1 learned"
        with pytest.raises(TOPDError, match=said):
            run_compare(recipe, words)
    assert ran == ["".join(rows)] * 2


def test_data_that_are_gone_are_asked_of_nothing_that_has_run(recipe, tmp_path):
    path = tmp_path / "own.jsonl"
    rows = rows_in(path, recipe)
    arms = f"{{opd: {{method: opd}}, own: {{data: {{path: '{path}', chat: false}}}}}}"
    words = [f"--output_dir={tmp_path / 'run'}", "--max_steps=1", f"--compare.arms={arms}"]
    words += ["--compare.seeds=[0]", "--compare.warmstart", f"--warmstart.data.path={path}"]
    words += ["--warmstart.data.chat=false"]
    table = run_compare(recipe, words) / "compare.json"
    found = table.read_text()
    path.unlink()
    table.unlink()
    run_compare(recipe, words)
    assert table.read_text() == found
    with pytest.raises(TOPDError, match="holds another comparison"):  # not: has other rows
        run_compare(recipe, [*words, "--warmstart.data.limit=5"])
    path.write_text("".join(reversed(rows)))
    with pytest.raises(TOPDError, match=r"own\.jsonl has other rows than when stage 1 learned"):
        run_compare(recipe, words)


def test_a_comparison_of_a_version_that_did_not_count_tokens_is_refused(recipe, tmp_path):
    words = [f"--output_dir={tmp_path / 'run'}", "--max_steps=1", "--compare.seeds=[0]"]
    words += ["--compare.arms={opd: {method: opd}}"]
    (stored,) = results(run_compare(recipe, words))
    for point in stored["curve"]:
        del point["teacher_written"]
    (tmp_path / "run" / "results.jsonl").write_text(json.dumps(stored) + "\n")
    with pytest.raises(TOPDError, match=r"did not count tokens \(0\.1\.0\)"):
        run_compare(recipe, words)


def test_rows_with_a_picture_are_the_same_when_they_are_read_again():
    first, second = ([{"prompt": "a", "seen": object()}] for _ in range(2))
    assert rows_digest(first) == rows_digest(second) != rows_digest([{"prompt": "a", "seen": None}])


def test_a_folder_from_before_a_setting_has_it_at_its_default(recipe, tmp_path):
    """Its finished runs stay; another value of the new setting is another comparison."""
    one = "--compare.arms={opd: {method: opd}}"
    words = [f"--output_dir={tmp_path / 'run'}", "--compare.seeds=[0]", one]
    first = results(run_compare(recipe, words))
    stored = tmp_path / "run" / "run.json"
    content = json.loads(stored.read_text())
    for name in OWN:
        if content["config"].get(name) == as_json(OWN[name]):
            del content["config"][name]
    del content["recipe"]["teacher"]["as_text"]
    content["config"]["logging_steps"] = 7  # without effect, and not refused by older versions
    content["compare"]["arms"]["opd"]["stop_length"] = 3
    stored.write_text(json.dumps(content))
    assert results(run_compare(recipe, words)) == first
    stored.write_text(json.dumps(content))
    with pytest.raises(TOPDError, match="another comparison"):
        run_compare(recipe, [*words, "--teacher_share=0.5"])


def test_a_plan_is_in_the_ledger_before_the_results_it_is_for(recipe, tmp_path):
    plan = tmp_path / "plan.md"
    words = [f"--output_dir={tmp_path / 'run'}", "--compare.arms={opd: {method: opd}}"]
    words.append(f"--compare.plan={plan}")
    with pytest.raises(TOPDError, match=r"compare\.plan: no such file .*plan\.md"):
        run_compare(recipe, words)
    plan.write_text("Paired by seed and problem.")
    run_compare(recipe, [*words, "--compare.seeds=[0]"])
    plan.write_text("By seed alone.")
    folder = run_compare(recipe, [*words, "--compare.seeds=[0, 1]"])
    entries, faults = read_entries(folder)
    noted = [(e["sha256"], e["results"]) for e in entries if e.get("event") == "plan"]
    texts = (b"Paired by seed and problem.", b"By seed alone.")
    assert noted == [(digest(text), count) for text, count in zip(texts, (0, 1), strict=True)]
    assert faults == []


def test_a_folder_whose_settings_are_damaged_is_refused(recipe, tmp_path):
    (tmp_path / "run.json").write_bytes(b"\xff{")
    with pytest.raises(TOPDError, match=r"run\.json: not valid JSON.*another folder"):
        run_compare(recipe, [f"--output_dir={tmp_path}", "--compare.seeds=[0]"])
    own = tmp_path / "results.jsonl"
    own.write_text('{"mine": 1}\n{"mine": 2}')
    for settings in (None, "{}", '{"recipe": {}, "config": {}}'):
        (tmp_path / "run.json").unlink(missing_ok=True)
        if settings:
            (tmp_path / "run.json").write_text(settings)
        with pytest.raises(TOPDError, match="another run"):
            run_compare(recipe, [f"--output_dir={tmp_path}", "--compare.seeds=[0]"])
        assert own.read_text() == '{"mine": 1}\n{"mine": 2}'  # not cut: it is another's
    for path in tmp_path.glob("r*.json*"):
        path.unlink()
    (tmp_path / "warmstart" / "student").mkdir(parents=True)  # nor is that the start of the arms
    with pytest.raises(TOPDError, match="another run"):
        run_compare(recipe, [f"--output_dir={tmp_path}", "--compare.warmstart"])


_SERVED = ("--student.served.completions=http://a:1", "--student.served.weights=w")
_ONE = "{arm: opd, key: %s, values: [1]}"
_AGAIN = "--compare.arms={opd: {}, x: {stage: warmstart, answers: start, data.limit: 3}}"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--compare.arms={opd: {method: opdd}}"], "arm 'opd'.*opdd"),
        (["--compare.baseline=tpd"], "no arm 'tpd'"),
        (["--compare.references=[tpd]"], "no arm 'tpd'"),
        (["--compare.arms={opd: {seeds: 3}}"], "arm 'opd'.*seeds must be a list"),
        (["--compare.seeds=[-1]", "--compare.warmstart"], "arm 'opd'.*seeds must be.*from 0 to"),
        (["--compare.arms={opd: {stage: two}}"], "arm 'opd'.*stage: 'two'"),
        (["--compare.arms={opd: {answers: start}}"], "arm 'opd'.*(answers|common start)"),
        (["--compare.arms={opd: {stage: warmstart, answers: start}}"], "common start"),
        (["--compare.arms={opd: {stage: warmstart, answers: me}}"], "arm 'opd'.*answers: 'me'"),
        (["--compare.arms={opd: {learning_rat: 1}}"], "arm 'opd'.*learning_rat"),
        (["--compare.sweeps=[{arm: x, key: epsilon, values: [1]}]"], "no arm 'x'"),
        (["--compare.arms={opd: {}, x y: {}, x/y: {}}"], "x y, x/y: would be one folder"),
        (["--compare.arms={opd: {}, ' ': {}}"], "arm ' '.*table would not tell it.*Rename"),
        (["--compare.arms={opd: {}, base: {}}", "--compare.warmstart"], "arm 'base'.*not tell it"),
        (["--compare.arms={opd: {}, x: {seeds: [7]}}"], "arm 'x'.*no seed of.*opd"),
        ([f"--compare.sweeps=[{_ONE % 'r'}, {_ONE % 'b.r'}]"], "two arms are 'opd, r 1'"),
        (["--compare.arms={opd: {}, x: {data.path: no.jsonl}}"], "arm 'x'.*no.jsonl"),
        (["--compare.arms={opd: {}, x: {teacher_prompt: '{{ no }}'}}"], "arm 'x'.*no"),
        (["--compare.arms={opd: {}, x: {max_completion_length: 99999}}"], "arm 'x'.*positions"),
        (["--compare.arms={opd: {}, x: {optim: nought}}"], "arm 'x'.*nought"),
        (["--compare.arms={opd: {}, x: {lora.target_modules: [nought]}}"], "arm 'x'.*nought"),
        (["--warmstart.learning_rat=1", "--compare.warmstart"], "stage 1.*learning_rat"),
        (["--warmstart.answers=me", "--compare.warmstart"], "stage 1.*answers: 'me'"),
        (["--warmstart.max_steps=1"], r"warmstart\.max_steps: has no effect.*compare\.warmstart"),
        (["--compare.warmstart", "--student.served.completions=http://a:1"], "served.model"),
        (["--compare.jobs=2", *_SERVED], "jobs: 2 runs at a time would give their weights to the"),
        (["--compare.arms={opd: {}, x: {evaluation.limit: 9}}"], "'x': evaluation.limit is 9.*20"),
        (["--compare.arms={opd: {}, x: {evaluation.split: test}}"], "'x': evaluation.split is 'te"),
        (["--compare.arms={opd: {}, x: {evaluation.top_p: 0.5}}"], "'x': evaluation.top_p is 0.5"),
        (["--compare.arms={opd: {}, x: {evaluation: null}}"], "'x': evaluation.path is missing"),
        (["--compare.arms={opd: {}, x: {seed: 3}}"], "'x': seed: has no effect.*seeds"),
        (["--compare.arms={opd: {}, x: {compare.jobs: 3}}"], r"'x': compare\.jobs: has no effect"),
        (["--compare.arms={opd: {}, x: {output_dir: y}}"], "'x': output_dir: has no effect"),
        (["--compare.arms={opd: {}, x: {stop_length: 3}}"], "'x': stop_length: has no effect"),
        ([f"--compare.sweeps=[{_ONE % 'logging_steps'}]"], "logging_steps: has no effect in an"),
        (["--stop_patience=3"], "stop_patience: has no effect on a comparison.*is a result"),
        (["--seed=3"], r"seed: has no effect.*--compare.seeds '\[3\]'"),
        (["--compare.warmstart", _AGAIN], "'x'.*the common start only"),
        (["--evaluation=null"], "evaluation is missing"),
        (["--compare=null"], "compare is missing"),
    ],
)
def test_a_wrong_arm_is_refused_before_anything_runs(recipe, tmp_path, words, fault):
    with pytest.raises(TOPDError, match=fault):
        run_compare(recipe, [f"--output_dir={tmp_path / 'run'}", *words])
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(recipe, monkeypatch):
    """Each would run every arm, and all would write into one folder."""
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(TOPDError, match=r"topd compare runs in one process.*compare\.jobs"):
        run_compare(recipe)
    with pytest.raises(TOPDError, match="topd probe runs in one process"):
        run_probe(recipe)


def test_the_command_prints_its_table_and_writes_the_page(recipe, tmp_path):
    words = ["compare", str(recipe), "--quiet", "--output_dir", str(tmp_path / "run")]
    words += ["--compare.seeds", "[0]"]
    found = CliRunner().invoke(cli.app, words)
    assert found.exit_code == 0, found.output
    assert "topd, sharp" in found.output
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
