"""The records' format: what was written before is read, what a later version wrote is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from conftest import write_pair
from topd.commands.audit import audit_run, replay_step
from topd.commands.evaluate import as_trained
from topd.commands.probe import run_probe
from topd.commands.train import run_recipe
from topd.errors import TOPDError
from topd.evaluate.spec import EvaluationSpec
from topd.inputs.models import ModelSpec
from topd.report.page import write_report
from topd.report.terminal import show
from topd.runs.checkpoints import begin_anew
from topd.runs.files import digest, file_digest
from topd.runs.folder import RECORDS
from topd.runs.ledger import HEAD, LEDGER, Ledger
from topd.runs.records import FORMAT, as_before

RUN = Path("run")
SMALL = {
    **{"max_steps": 1, "per_device_train_batch_size": 4, "max_completion_length": 12},
    **{
        "method": "topd",
        "window_length": 4,
        "candidate_fraction": 0.3,
        "output_dir": "run",
        "use_cpu": True,
    },
    **{"save_strategy": "no", "solver": "sinkhorn"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("records")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run_recipe(write_pair(root, **SMALL), quiet=True)
    return root


@pytest.fixture
def run(trained, monkeypatch) -> Path:
    monkeypatch.chdir(trained)
    return RUN


def edited(folder: Path, **changes: object) -> Path:
    """The run with other forks, whose chain was made again; ``format`` None leaves it out."""
    shutil.copytree(RUN, folder)
    stored = json.loads((folder / "run.json").read_text())
    number = changes.pop("format", FORMAT)
    stored = {k: v for k, v in stored.items() if k != "format"}
    stored |= {} if number is None else {"format": number}
    (folder / "run.json").write_text(json.dumps(stored))
    lines = [json.loads(line) for line in (folder / "guidance.jsonl").read_text().splitlines()]
    for record in lines:
        for fork in record["forks"]:
            fork.update(changes)
            if number is None:
                del fork["converged"]
    (folder / "guidance.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def chained(folder: Path) -> Path:
    entries = [json.loads(line) for line in (folder / LEDGER).read_text().splitlines()]
    found = {
        (name, n): digest(line)
        for name in RECORDS
        for n, line in enumerate((folder / name).read_bytes().splitlines())
    }
    (folder / LEDGER).unlink()
    (folder / HEAD).unlink()
    chain, seen = Ledger(folder), dict.fromkeys(RECORDS, 0)
    for entry in entries:
        plain = {k: v for k, v in entry.items() if k not in ("n", "previous", "hash")}
        if plain.get("file") in seen and "step" in plain:
            plain["record"] = found[plain["file"], seen[plain["file"]]]
            seen[plain["file"]] += 1
        elif "file" in plain:
            plain["record"] = file_digest(folder / plain["file"])
        chain.add([plain])
    return folder


def test_a_run_says_its_format_and_whether_plans_converged(run):
    assert json.loads((run / "run.json").read_text())["format"] == FORMAT
    lines = [json.loads(line) for line in (run / "guidance.jsonl").read_text().splitlines()]
    forks = [fork for line in lines for fork in line["forks"]]
    assert forks
    assert all(fork["converged"] is True for fork in forks)
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logs[0]["topd/unconverged_plans"] == 0


def test_a_folder_of_the_format_before_is_read_and_audited(run, tmp_path):
    before = chained(edited(tmp_path / "before", format=None))
    write_report(before)
    assert not audit_run(before, updates=1).faults
    with pytest.raises(TOPDError, match=r"a version before 0\.2\.0 sampled its texts"):
        replay_step(before, 0)
    assert not replay_step(run, 0).faults


def test_a_plan_that_did_not_converge_is_shown_and_found_by_an_audit(run, tmp_path):
    other = chained(edited(tmp_path / "other", converged=False))
    page = write_report(other).read_text(encoding="utf-8")
    assert "did not converge" in page
    assert "did not converge" not in write_report(run).read_text(encoding="utf-8")
    console = Console(width=80, record=True, quiet=True)
    for row in range(4):
        show(other, row, console)
    assert any("converged" in fault for fault in audit_run(other, updates=1).faults)


@pytest.mark.parametrize("number", [FORMAT + 1, "2", 0, True])
def test_a_later_format_is_refused_in_words(run, tmp_path, number):
    later = chained(edited(tmp_path / "later", format=number))
    for read in (write_report, audit_run, lambda folder: show(folder, 0, Console())):
        with pytest.raises(
            TOPDError, match=r"run\.json: format .* is none that this version reads"
        ):
            read(later)


@pytest.mark.parametrize(
    "text",
    [
        '{"recipe": "x", "config": {}}',
        '{"recipe": {"data": "x"}, "config": 3}',
        '{"recipe": {}, "config": {}, "resumed": [3]}',
        '{"recipe": {}, "config": {}, "command": 3}',
        '["recipe", "config"]',
    ],
)
def test_a_run_json_that_no_run_wrote_is_refused_by_all_who_read_it(run, tmp_path, text):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "student").mkdir(exist_ok=True)
    (folder / "run.json").write_text(text)
    student, spec = ModelSpec(path=str(folder / "student")), EvaluationSpec(path="x")
    readers = [
        lambda: write_report(folder),
        lambda: as_trained(spec, [student]),
        lambda: begin_anew(folder),
        lambda: replay_step(folder, 0),
        lambda: run_recipe(
            Path("recipe.yaml"), ["--resume_from_checkpoint=last", f"--output_dir={folder}"]
        ),
        lambda: run_probe(Path("recipe.yaml"), [f"--output_dir={folder}"]),
    ]
    for read in readers:
        with pytest.raises(TOPDError, match=r"run\.json: "):
            read()
    assert audit_run(folder, updates=0).faults


def test_only_fields_that_are_new_are_left_out():
    now = {"forks": [{"real": True, "converged": True}]}
    assert as_before(now, {"forks": [{"converged": False}]}) == now
