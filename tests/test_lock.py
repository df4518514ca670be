"""A run folder has one writer, and a refused run leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import write_pair
from test_resume import make
from topd.cli import app
from topd.commands.train import run_recipe
from topd.errors import StoppedError, TOPDError
from topd.runs import lock
from topd.runs.folder import check_run_folder
from topd.runs.lock import LOCK, one_writer

HOLD = """
import sys, time
from pathlib import Path
from topd.runs.lock import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes to the folder ``run``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def write_lock(folder: Path, **owner: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    owner = {"host": socket.gethostname(), "pid": 1, "started": "2026-01-01 00:00:00", **owner}
    (folder / LOCK).write_text(json.dumps(owner))
    return folder / LOCK


def test_a_second_writer_is_refused_and_told_by_whom_and_what_to_do(tmp_path, other):
    run = tmp_path / "run"
    for refused in (check_run_folder, lambda folder: one_writer(folder).__enter__()):
        with pytest.raises(TOPDError) as caught:
            refused(run)
        assert str(caught.value).startswith(
            f"output_dir: another run is writing to {run} (process {other.pid} on "
            f"{socket.gethostname()}, since "
        )
        assert str(caught.value).endswith(f"has ended, remove {run / LOCK}.")
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_beside_a_living_one_is_refused_before_models_are_read(tmp_path, other, resume):
    """The models of this recipe are not there, and that is not what it says."""
    recipe = write_pair(tmp_path, student=str(tmp_path / "nowhere"), method="opd", max_steps=1)
    words = [f"--output_dir={tmp_path / 'run'}"] + ["--resume_from_checkpoint=last"] * resume
    with pytest.raises(TOPDError, match="another run is writing"):
        run_recipe(recipe, words, quiet=True)


@pytest.mark.parametrize("command", ["eval", "gate"])
def test_an_evaluation_and_a_gate_beside_a_living_writer_are_refused(tmp_path, other, command):
    suite = tmp_path / "suite.yaml"
    suite.write_text("problems: {path: testbed://arithmetic}\n")
    last = {"eval": ["testbed://arithmetic"], "gate": ["nowhere", "--suite", str(suite)]}[command]
    words = [command, "nowhere", *last, "--output", str(tmp_path / "run")]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 2
    assert "another run is writing" in " ".join((found.output + found.stderr).split())
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_a_trainer_in_python_is_refused_beside_a_living_run(tmp_path, other):
    with pytest.raises(TOPDError, match="another run is writing"):
        make(tmp_path / "run", method="opd", max_steps=1)


@pytest.mark.parametrize("place", ["rollouts.jsonl", "warmstart/answers.jsonl"])
def test_what_a_run_or_one_in_it_recorded_stays_at_a_fault(tmp_path, place):
    for line in ("{}\n", ""):
        run = tmp_path / f"run{len(line)}"
        with suppress(TOPDError), one_writer(run):
            (run / place).parent.mkdir(exist_ok=True)
            (run / place).write_text(line)
            raise TOPDError("a fault.")
        assert (run / place).exists() == bool(line)


def test_a_killed_owners_lock_is_taken_over_though_the_file_stays(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "run" / LOCK).exists()
    check_run_folder(tmp_path / "run")
    with one_writer(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()


def test_of_many_that_find_a_dead_owners_lock_one_gets_it(tmp_path):
    write_lock(tmp_path / "run", pid=2**22 + 1)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run")],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(3)
    ]
    try:
        end = time.monotonic() + 120
        while sum(p.poll() is None for p in started) > 1 and time.monotonic() < end:
            time.sleep(0.1)
        assert sorted(p.poll() is None for p in started) == [False, False, True]
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_lock_of_another_host_holds_while_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 1.0)
    path, ended = write_lock(tmp_path / "run", host="elsewhere", pid=7), threading.Event()

    def touch() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    beating = threading.Thread(target=touch)
    beating.start()
    try:
        with pytest.raises(TOPDError, match="process 7 on elsewhere, since 2026"):
            check_run_folder(tmp_path / "run")
    finally:
        ended.set()
        beating.join()
    with one_writer(tmp_path / "run"):  # nobody touches it now
        assert json.loads(path.read_text())["host"] == socket.gethostname()


def test_the_owner_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with one_writer(tmp_path / "run"):
        os.utime(tmp_path / "run" / LOCK, (0, 0))
        end = time.monotonic() + 10
        while (tmp_path / "run" / LOCK).stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.02)
        assert (tmp_path / "run" / LOCK).stat().st_mtime > 0


@pytest.mark.parametrize("content", ["", "[", "[]", '{"host": 1}', "[" * 4000])
def test_a_lock_that_says_nothing_and_is_not_held_is_taken_over(tmp_path, content):
    write_lock(tmp_path).write_text(content)
    with one_writer(tmp_path):
        assert (tmp_path / LOCK).read_text() != content


def test_one_process_may_ask_more_than_once(tmp_path):
    with one_writer(tmp_path):
        with one_writer(tmp_path):
            check_run_folder(tmp_path)
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


# What a refused run leaves


@pytest.mark.parametrize(
    "changes",
    [
        {"student": "nowhere"},
        {"max_prompt_length": 1},
        {"max_completion_length": 100_000},
        {"resume_from_checkpoint": "nowhere"},
    ],
)
def test_a_refused_run_leaves_no_folder(tmp_path, changes):
    recipe = write_pair(tmp_path, **{"method": "opd", "max_steps": 1, **changes})
    before = set(tmp_path.rglob("*"))
    with pytest.raises(TOPDError):
        run_recipe(recipe, [f"--output_dir={tmp_path / 'new' / 'run'}"], quiet=True)
    assert set(tmp_path.rglob("*")) == before


def refuse(folder: Path, error: TOPDError, *written: str) -> None:
    """A run that wrote some files and was then refused."""
    with one_writer(folder):
        for name in written:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}\n")
        raise error


@pytest.mark.parametrize(
    ("there", "error", "written", "left"),
    [
        (True, TOPDError("no."), ["mine"], ["mine"]),
        (False, TOPDError("no."), ["rollouts.jsonl"], ["rollouts.jsonl"]),
        (False, StoppedError("later.", 75), ["run.json"], ["run.json"]),
        (False, TOPDError("no."), ["run.json", "logs/events"], None),
    ],
)
def test_a_folder_that_was_there_stays_and_what_was_recorded_too(
    tmp_path, there, error, written, left
):
    run = tmp_path / "run"
    if there:
        run.mkdir()
    with pytest.raises(TOPDError):
        refuse(run, error, *written)
    assert ([path.name for path in run.iterdir()] if run.exists() else None) == left
