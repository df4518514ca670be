"""The kill test itself: a small one that always runs, and that it sees a difference."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bench.kill import differences

ROOT = Path(__file__).parent.parent


def test_a_run_that_is_killed_and_resumed_is_the_one_that_was_not(tmp_path):
    """In an interpreter of its own: it forks."""
    output = tmp_path / "kill.json"
    words = ["-m", "bench.kill", "--kills", "2", "--only", "topd", "--output", str(output)]
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(output.read_text())["topd"]
    assert found["kills"] >= 2
    assert found["unequal"] == []


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Two run folders that are the same but for their times."""
    for name, seconds in (("whole", 1.0), ("again", 2.0)):
        (tmp_path / name / "student").mkdir(parents=True)
        (tmp_path / name / "student" / "model.safetensors").write_bytes(b"weights")
        records = [{"step": step, "loss": 0.5, "seconds/learning": seconds} for step in (1, 2)]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    return tmp_path / "whole", tmp_path / "again"


def test_times_may_differ_and_nothing_else(folders):
    whole, again = folders
    assert list(differences(whole, again)) == []
    metrics, weights = again / "metrics.jsonl", again / "student" / "model.safetensors"
    lines = metrics.read_text().splitlines(keepends=True)
    for content in (lines[:1], [*lines, lines[1]], [lines[1], lines[0]]):
        metrics.write_text("".join(content))
        assert list(differences(whole, again)) == ["metrics.jsonl differs"]
    shutil.copy(whole / "metrics.jsonl", metrics)
    weights.write_bytes(b"weighty")
    assert list(differences(whole, again)) == ["student/model.safetensors differs"]
    weights.unlink()
    assert list(differences(whole, again)) == ["student/model.safetensors differs"]
    shutil.copytree(whole, again, dirs_exist_ok=True)
    (again / ".partial").mkdir()
    assert list(differences(whole, again)) == [".partial is left over"]
