"""A page that follows its run: made again as records grow, final when nobody writes any more."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import report_folders as make
from topd.cli import app
from topd.errors import TOPDError
from topd.report.follow import follow
from topd.runs.files import LOCK, PATIENCE, is_written_to

REFRESH = '<meta http-equiv="refresh"'


def grow(folder: Path, step: int) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(make.log(step)) + "\n")


def test_a_page_is_made_again_as_records_grow_until_the_run_ends(tmp_path):
    """Looks: a page; nothing new; a longer run; the lock is gone and the page is final."""
    said, pages, run = [], [], make.training(tmp_path)
    (run / LOCK).touch()

    def sleep(seconds: float) -> None:
        assert seconds >= 10
        page = run / "report.html"
        pages.append((page.stat().st_mtime_ns, page.read_text(encoding="utf-8")))
        if len(pages) == 2:
            grow(run, 4)
        elif len(pages) == 3:
            (run / LOCK).unlink()

    assert follow(run, say=said.append, sleep=sleep) == run / "report.html"
    assert pages[0] == pages[1]
    assert pages[2] != pages[1]
    assert all(REFRESH in text for _, text in pages)
    final = (run / "report.html").read_text(encoding="utf-8")
    assert REFRESH not in final
    assert "over 4 updates" in final
    assert ["follows the run" in line for line in said] == [True, False]


def test_a_run_that_has_just_begun_is_waited_for(tmp_path):
    said = []
    (tmp_path / LOCK).touch()

    def sleep(_: float) -> None:
        if (tmp_path / "metrics.jsonl").exists():
            (tmp_path / LOCK).unlink()
        make.training(tmp_path)

    follow(tmp_path, say=said.append, sleep=sleep)
    assert said[0].startswith("no page yet: ")
    assert len(said) == 3


def test_a_killed_run_is_not_waited_for(tmp_path):
    """Its lock is left behind and nobody touches it."""
    run, then = make.training(tmp_path), time.time() - PATIENCE - 1
    (run / LOCK).touch()
    assert is_written_to(run)
    os.utime(run / LOCK, (then, then))
    assert not is_written_to(run)
    follow(run, say=lambda _: None, sleep=lambda _: pytest.fail("waits"))


def test_where_no_run_is_and_nobody_writes_there_is_a_fault(tmp_path):
    with pytest.raises(TOPDError, match="holds no run"):
        follow(tmp_path)


def test_ctrl_c_ends_the_watching_and_nothing_else(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("topd.report.follow.follow", interrupted)
    done = CliRunner().invoke(app, ["report", str(make.training(tmp_path)), "--watch"])
    assert done.exit_code == 0
    assert "the run continues" in done.output
