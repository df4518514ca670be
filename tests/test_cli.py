"""``topd train`` and ``topd warmstart`` for real, on tiny folders."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.utils import logging
from typer.testing import CliRunner, Result

from conftest import read, tiny_tokenizer, write_pair
from topd import TOPDConfig, cli
from topd.commands import terminal
from topd.commands.keys import parse_overrides
from topd.commands.tables import show_change, show_table
from topd.inputs.models import ModelSpec
from topd.methods import METHODS
from topd.training.progress import Phases

LITTLE = {
    "student": "student",
    "teacher": "teacher",
    "data": "prompts.jsonl",
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "max_completion_length": 8,
    "method": "topd",
    "window_length": 3,
    "candidate_fraction": 0.3,
    "learning_rate": 0.01,
    "save_strategy": "no",
    "use_cpu": True,
    "warmstart": {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_completion_length": 60,
        "save_strategy": "no",
        "use_cpu": True,
    },
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """A student, a teacher, prompts and a recipe."""
    return write_pair(tmp_path_factory.mktemp("cli"), **LITTLE).parent


@pytest.fixture(autouse=True)
def fresh(monkeypatch) -> Iterator[None]:
    """What a command changes in its process is undone: environment, verbosity, bars."""
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.delenv("TQDM_DISABLE")
    verbosity = logging.get_verbosity()
    logging.enable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def invoke(folders: Path, *words: str, command: str = "train") -> Result:
    before = Path.cwd()
    os.chdir(folders)
    try:
        return CliRunner().invoke(cli.app, [command, "recipe.yaml", *words])
    finally:
        os.chdir(before)


def topd(folders: Path, folder: Path, *words: str, command: str = "train") -> str:
    """The output of a run that must succeed."""
    result = invoke(folders, "--output_dir", str(folder), *words, command=command)
    assert result.exit_code == 0, result.output
    return result.output


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())["config"]


# One run, looked at from all sides


@pytest.fixture(scope="session")
def finished(folders, tmp_path_factory) -> tuple[str, Path]:
    """The output and the run folder of one run in a wide terminal."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    before, terminal.console = terminal.console, Console(width=200)
    try:
        return topd(folders, folder), folder
    finally:
        terminal.console = before


def test_a_run_prints_one_line_an_update_within_80_columns(finished):
    output, folder = finished
    table = [line for line in output.splitlines() if line and line[0] in "┏┃┡│└"]
    assert max(map(len, table)) <= 80
    assert [line.split()[1] for line in table if line[0] == "│"] == ["1", "2"]
    logs = [log for log in read(folder / "metrics.jsonl") if "loss" in log]
    for title, shown in (
        ("loss", f"{logs[0]['loss']:.4f}"),
        ("reverse KL", f"{logs[0]['reverse_kl']:.4f}"),
        ("mean OT", f"{logs[0]['topd/mean_ot']:.3f}"),
    ):
        assert title in table[1]
        assert shown in table[3]


def test_a_run_ends_with_the_path_of_its_folder_on_one_line(finished):
    output, folder = finished
    assert output.splitlines()[-1] == f"run folder: {folder}"


def test_what_a_terminal_cannot_show_ends_no_command(finished):
    """Of a rollout that is ◆ and ○; tokens of another script are the same to it."""
    words = [sys.executable, "-m", "topd", "show", str(finished[1])]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(words, capture_output=True, text=True, env=env)
    assert shown.returncode == 0, shown.stderr
    assert "? 1. " in shown.stdout


def test_a_run_prints_no_warnings_and_leaves_no_bars(finished):
    output, _ = finished
    assert "Warning" not in output
    assert "it/s" not in output


def test_the_run_folder_holds_all_that_its_legend_names(finished):
    _, folder = finished
    records = {"metrics.jsonl", "rollouts.jsonl", "guidance.jsonl", "tokens.jsonl"}
    names = {"run.json", "manifest.json", "ledger.jsonl", "head.json", *records}
    assert {path.name for path in folder.iterdir()} == {*names, "report.html", "student"}
    rollouts, guidance = read(folder / "rollouts.jsonl"), read(folder / "guidance.jsonl")
    assert [(r["step"], r["rollout"]) for r in rollouts] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [r["prompt"] for r in rollouts] == [g["prompt"] for g in guidance]
    assert sum(len(g["forks"]) for g in guidance) == sum(
        log.get("topd/candidates", 0) for log in read(folder / "metrics.jsonl")
    )
    tokenizer = tiny_tokenizer()
    assert all(r["text"] == tokenizer.decode(r["response_ids"]) for r in rollouts)
    assert config(folder)["learning_rate"] == 0.01
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["models"]) == {"student", "teacher"}


def test_the_trained_student_loads_and_has_learned(finished, folders):
    _, folder = finished
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    start = AutoModelForCausalLM.from_pretrained(folders / "student")
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert not torch.equal(student.lm_head.weight, start.lm_head.weight)
    assert isinstance(ModelSpec(path=str(folder / "student")).load_tokenizer().eos_token_id, int)
    assert "library_name: transformers" in (folder / "student" / "README.md").read_text()


def test_a_second_run_in_the_folder_is_refused(finished, folders):
    _, folder = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = invoke(folders, "--output_dir", str(folder))
    assert result.exit_code == 2
    assert "already holds a run" in " ".join(result.stderr.split())
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert files.items() <= before.items()


# Words of the command line


def test_keys_of_the_command_line_replace_those_of_the_recipe(folders, tmp_path):
    folder = tmp_path / "run"
    words = ("--max_steps", "1", "--method=opd", "--data.limit", "1", "--student.path", "teacher")
    topd(folders, folder, *words, "--beta=0.5")
    assert (config(folder)["method"], config(folder)["max_steps"]) == ("opd", 1)
    assert {line["prompt"] for line in read(folder / "rollouts.jsonl")} == {0}
    log = read(folder / "metrics.jsonl")[0]
    assert log["jsd"] == pytest.approx(0, abs=1e-6)  # the student is the teacher
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["models"]["student"]["name"] == "teacher"


def test_quiet_prints_log_lines_and_no_bars(folders, tmp_path):
    """One line a log, shorter than a terminal is wide; so too without a terminal."""
    output = topd(folders, tmp_path / "run", "--quiet", "--max_steps", "2")
    lines = [line for line in output.splitlines() if line.startswith("update ")]
    assert [line.split("  ")[0] for line in lines] == ["update 1/2", "update 2/2"]
    for line, log in zip(lines, read(tmp_path / "run" / "metrics.jsonl"), strict=False):
        assert f"loss {log['loss']:.4g}  reverse KL {log['reverse_kl']:.3g}" in line
        assert len(line) < 80
    assert "eta" in lines[0]
    assert "eta" not in lines[1]
    assert "it/s" not in output
    assert "{" not in output.partition("report:")[0]
    assert output.startswith("loading ")


def test_bad_words_end_with_exit_code_2_and_one_message(folders, tmp_path):
    for words in (["--sed", "3"], ["seed"], ["--data.path", "no.jsonl"], ["--teacher", "no/where"]):
        result = invoke(folders, "--output_dir", str(tmp_path / "run"), *words)
        assert result.exit_code == 2
        assert isinstance(result.exception, SystemExit)
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("error: ") == 1
        assert all(line.startswith("loading ") for line in result.stdout.splitlines())


def test_a_recipe_that_is_not_there_ends_with_exit_code_2(tmp_path):
    result = CliRunner().invoke(cli.app, ["train", str(tmp_path / "no.yaml")])
    assert result.exit_code == 2
    assert str(tmp_path / "no.yaml") in result.stderr  # whole, however narrow the terminal
    assert "Traceback" not in result.output


@pytest.mark.parametrize("words", [["--logging_steps", "10"], ["--logging_strategy", "'no'"]])
def test_a_run_that_logged_no_update_still_ends_well(folders, tmp_path, words):
    assert "run folder: " in topd(folders, tmp_path / "run", "--max_steps", "1", *words)
    assert (tmp_path / "run" / "student" / "config.json").exists()


def test_bars_are_taken_away_when_a_run_fails(folders, tmp_path, monkeypatch):
    """Or the terminal stays without a cursor."""
    screen, bars, draw = StringIO(), [], Phases.show

    def show(phases: Phases, console: Console) -> None:
        bars.append(phases)
        draw(phases, console)

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(screen, "isatty", lambda: True)
    terminal = Console(file=screen, force_terminal=True)
    monkeypatch.setattr("topd.commands.train.Console", lambda **_: terminal)
    monkeypatch.setattr(Phases, "show", show)
    words = ("--max_logprob_gap", "1e-12", "--output_dir", str(tmp_path / "run"))
    assert invoke(folders, *words).exit_code == 2
    shown = screen.getvalue()
    bars[0].stop()  # whatever is found here, the next test has a whole terminal
    hidden, back = shown.rfind("\x1b[?25l"), shown.rfind("\x1b[?25h")
    assert back > hidden >= 0


def test_a_run_goes_on_from_a_checkpoint_with_every_update_recorded_once(folders, tmp_path):
    folder = tmp_path / "run"
    topd(folders, folder, "--save_strategy", "steps", "--save_steps", "1")
    topd(
        folders,
        folder,
        "--max_steps",
        "3",
        "--resume_from_checkpoint",
        str(folder / "checkpoint-1"),
    )
    logs = [log["step"] for log in read(folder / "metrics.jsonl") if "loss" in log]
    assert logs == [1, 2, 3]
    rollouts = [(line["step"], line["rollout"]) for line in read(folder / "rollouts.jsonl")]
    assert rollouts == [(step, number) for step in range(3) for number in range(2)]


# Parts of a recipe


def test_lora_trains_an_adapter_and_saves_the_whole_student_too(folders, tmp_path):
    folder = tmp_path / "run"
    words = ("--lora", "{r: 2, lora_alpha: 8, target_modules: [q_proj, v_proj]}")
    shown = topd(folders, folder, *words)
    student = AutoModelForCausalLM.from_pretrained(folder / "student").state_dict()
    start = AutoModelForCausalLM.from_pretrained(folders / "student").state_dict()
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    trained = sum(weight.numel() for weight in adapter.values())
    assert f"adapter on q_proj, v_proj: {trained} of " in shown
    changed = {name for name in start if not torch.equal(student[name], start[name])}
    assert changed == {n for n in start if "q_proj" in n or "v_proj" in n}
    for name in changed:
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        update = 8 / 2 * adapter[f"{key}B.weight"] @ adapter[f"{key}A.weight"]
        torch.testing.assert_close(student[name], start[name] + update)


def test_evaluation_data_is_evaluated(folders, tmp_path):
    words = ("--eval_data", "{path: prompts.jsonl, limit: 3}", "--eval_strategy", "steps")
    topd(folders, tmp_path / "run", *words, "--eval_steps", "1")
    logs = read(tmp_path / "run" / "metrics.jsonl")
    losses = [log["eval_loss"] for log in logs if "eval_loss" in log]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
    assert losses[0] != losses[1]


def test_a_warm_started_student_goes_on_to_stage_2(folders, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    how = ("--answers", "data", "--kd_ratio", "0.5")
    output = topd(folders, first, *how, command="warmstart")
    assert "forward KL" in output
    assert "forks found" not in output or "│ 0 │" in re.sub(" +", " ", output)
    assert config(first)["kd_ratio"] == 0.5
    topd(folders, second, "--student.path", str(first / "student"), "--max_steps", "1")
    models = [json.loads((f / "manifest.json").read_text())["models"] for f in (first, second)]
    assert models[1]["student"]["name"] == str(first / "student")
    assert models[1]["student"]["sha256"] != models[0]["student"]["sha256"]
    assert models[1]["teacher"]["sha256"] == models[0]["teacher"]["sha256"]


def test_a_warm_start_keeps_the_teachers_answers(folders, tmp_path):
    topd(folders, tmp_path / "run", command="warmstart")
    header, *answers = read(tmp_path / "run" / "answers.jsonl")
    assert "prompts" in header
    assert len(answers) == 8
    learned = [r["response_ids"] for r in read(tmp_path / "run" / "rollouts.jsonl")]
    assert learned
    assert all(response in answers and response for response in learned)


# The table


def log(step: int, **changes: float) -> dict[str, float]:
    return {"step": step, "loss": 1.0, "reverse_kl": 1.0, "completions/mean_length": 9.0, **changes}


@pytest.fixture
def shown(capsys) -> Callable[[], str]:
    """What is printed, in a terminal that is wide enough for all."""
    return lambda: capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "lines"), [(0, 0), (1, 1), (2, 2), (12, 12), (13, 12), (500, 12)]
)
def test_the_table_has_at_most_12_updates_the_first_and_the_last_among_them(shown, count, lines):
    show_table(Console(width=200), [log(i + 1) for i in range(count)])
    steps = [int(line.split()[1]) for line in shown().splitlines() if line.startswith("│")]
    assert len(steps) == len(set(steps)) == lines
    if count:
        assert (steps[0], steps[-1]) == (1, count)


def test_the_table_of_a_long_run_fits_80_columns(shown):
    big = {"loss": 12.3456, "topd/real_divergent_points": 12345, "topd/false_alarm_share": 1.0}
    show_table(
        Console(width=200), [log(10_000 + i, **big, **{"topd/mean_ot": 0.5}) for i in range(20)]
    )
    assert max(map(len, shown().splitlines())) <= 80


def test_a_mean_of_nothing_is_a_dash(shown):
    show_table(Console(width=200), [log(1, **{"topd/mean_ot": 0.25}), log(2)])
    first, second = (line for line in shown().splitlines() if line.startswith("│"))
    assert "0.250" in first
    assert " - " in second


def test_the_change_is_a_mean_with_a_t_interval_by_hand(shown):
    """Ten updates: fifths of two. sem(1, 3) = 1, t(0.975, 1 degree) = 12.7062."""
    values = [1.0, 3.0, 9, 9, 9, 9, 9, 9, 0.25, 0.25]
    logs = [log(i, reverse_kl=value) for i, value in enumerate(values, 1)]
    lines = [
        "reverse_kl, first 2 updates: 2.0000 +- 12.7062 nats a token",
        "reverse_kl, last 2 updates: 0.2500 +- 0.0000 nats a token",
    ]
    show_change(Console(width=200), logs)
    assert shown().splitlines() == lines
    without = [{"step": 0, "loss": 0.0}, *logs, {"step": 11, "loss": 0.0}]  # these had no token
    show_change(Console(width=200), without)
    assert shown().splitlines() == lines
    show_change(Console(width=200), [{**log, "step": 5 * log["step"]} for log in logs])
    assert shown().splitlines() == [line.replace("2 updates", "10 updates") for line in lines]


def test_the_change_of_a_warm_start_on_cross_entropy_alone_is_that_of_the_loss(shown):
    """It has no divergence: ``kd_ratio: 0`` asks no teacher."""
    show_change(
        Console(width=200), [{"step": i, "loss": 1.0 if i < 6 else 0.5} for i in range(1, 11)]
    )
    assert shown().splitlines() == [
        "loss, first 2 updates: 1.0000 +- 0.0000 nats a token",
        "loss, last 2 updates: 0.5000 +- 0.0000 nats a token",
    ]


def test_no_change_is_claimed_from_fewer_than_ten_updates(shown):
    show_change(Console(width=200), [log(i) for i in range(9)])
    assert shown() == ""


# Help


def test_a_command_ends_without_a_look_at_all_objects_of_the_libraries(monkeypatch):
    """Python collects garbage as it ends, of torch and others for more than a second."""
    at_end: list[Callable[..., object]] = []
    monkeypatch.setattr(cli.atexit, "register", at_end.append)
    assert CliRunner().invoke(cli.app, ["methods"]).exit_code == 0
    assert at_end == [gc.freeze]


def test_the_module_runs_as_the_command():
    command = [sys.executable, "-m", "topd", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert {"train", "warmstart", "report", "figures", "show"} <= {*done.stdout.split()}


# What can be found


def command(*words: str) -> Any:
    return CliRunner().invoke(cli.app, list(words))


def test_every_method_is_listed_with_its_first_sentence():
    listed = " ".join(command("methods").output.split())
    for name, method in METHODS.items():
        first = " ".join((method.guide.__doc__ or "").split("\n\n")[0].replace("``", "").split())
        assert name in listed
        assert first in listed


@pytest.mark.parametrize(
    ("verb", "own"), [("probe", "rollouts"), ("repair", "samples"), ("warmstart", "answers")]
)
def test_the_help_of_a_command_begins_with_the_settings_that_it_alone_has(verb, own):
    shown = " ".join(command(verb, "--help").output.split())
    assert f"Settings of this command: {own}, " in shown
    assert "Settings, each --NAME VALUE: method, " in shown


@pytest.mark.parametrize("verb", [one.callback.__name__ for one in cli.app.registered_commands])
def test_help_cuts_no_name_off_at_80_columns(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = {"import_": "import", "evaluate_model": "eval"}
    shown = command(names.get(verb, verb.replace("_", "-")), "--help").output
    assert "Usage: " in shown
    assert "…" not in shown


def test_a_paragraph_of_help_runs_on_from_line_to_line():
    assert "16384. Both have" in command("serve-teacher", "--help").output


@pytest.mark.skipif(
    Version(version("typer")) < Version("0.26"), reason="an older typer says less of arguments"
)
def test_help_says_how_to_do_without_a_recipe_and_so_does_the_fault():
    shown = " ".join(command("train", "--help").output.replace("│", "").split())
    assert "train [OPTIONS] [RECIPE]" in shown
    assert "--student MODEL --teacher MODEL" in shown
    assert "[required]" not in shown
    for words, part in (([], "student"), (["--student", "x"], "teacher")):
        refused = command("train", *words)
        assert refused.exit_code == 2
        said = " ".join(refused.stderr.split())
        assert f"{part} is missing. Name a recipe, or give --student, --teacher and --data." in said


def test_settings_are_found_by_a_word_of_their_name_or_their_explanation():
    ours = command("settings").output
    for field in fields(TOPDConfig):
        if field.name not in {f.name for f in fields(TrainingArguments)}:
            assert f"{field.name} = " in ours
    assert "adam_beta1" not in ours
    assert "adam_beta1 = 0.9" in command("settings", "adam").output
    assert "window_length = 50" in command("settings", "K, tokens").output
    assert "window-length" not in command("settings", "--", "--window-length").output
    refused = command("settings", "no such word")
    assert refused.exit_code == 2
    assert "none has 'no such word'" in refused.stderr


def test_help_of_training_lists_every_setting_of_ours():
    text = " ".join(command("train", "--help").output.split())
    for field in fields(TOPDConfig):
        if field.name not in {f.name for f in fields(TrainingArguments)}:
            assert field.name in text


def test_the_version_is_told():
    assert command("--version").output == f"topd {version('topd')}\n"


def test_dashes_and_underscores_are_the_same(folders, tmp_path):
    folder = tmp_path / "run"
    topd(folders, folder, "--max-steps", "1", "--data.limit=1", "--max_prompt-length", "99")
    assert (config(folder)["max_steps"], config(folder)["max_prompt_length"]) == (1, 99)
    for option in ("--max_tokens", "--max-tokens"):
        result = command("eval", "no/where", "no.jsonl", option, "0")
        assert "No such option" not in result.output


def test_arms_of_a_comparison_keep_the_dashes_of_their_names():
    assert parse_overrides(["--compare.arms.a-b.beta", "0"]) == {"compare.arms.a-b.beta": 0}


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lr", "learning_rate"),
        ("batch-size", "per_device_train_batch_size"),
        ("window", "window_length"),
    ],
)
def test_names_of_other_trainers_are_known(word, meant, folders, tmp_path):
    result = invoke(folders, "--output_dir", str(tmp_path / "run"), f"--{word}", "1")
    assert result.exit_code == 2
    assert f"Did you mean {meant}?" in " ".join(result.stderr.split())
