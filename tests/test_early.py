"""Refusals and lists that need neither torch nor transformers, against the real classes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest
from typer.testing import CliRunner

from topd.cli import app
from topd.commands import early, probe, recipe, repair, session, settings
from topd.commands.keys import parse_overrides
from topd.config import TOPDConfig
from topd.detectors import DETECTORS
from topd.errors import TOPDError
from topd.evaluate.spec import EvaluationSpec, TrainingEvaluation
from topd.inputs.models import ModelSpec
from topd.inputs.rows import TEXTS, DataSpec
from topd.methods import METHODS
from topd.runs.settings import TABLE, differing, known, matching
from topd.training.warmstart import WarmstartConfig

CONFIGS = [
    TOPDConfig, WarmstartConfig, session.AnalysisConfig, probe.ProbeConfig, repair.RepairConfig,
]  # fmt: skip
SPECS = [ModelSpec, DataSpec, EvaluationSpec, TrainingEvaluation, recipe.CompareSpec]
COMMANDS = app.registered_commands
PAIR = "student: no/student\nteacher: no/teacher\ndata: {path: prompts.jsonl}\n"


@pytest.mark.parametrize("command", [one.name or one.callback.__name__ for one in COMMANDS])
def test_a_launcher_of_several_processes_is_refused_where_nothing_is_trained(monkeypatch, command):
    """Each would do the work: one was refused as a second writer, two wrote one page at a time."""
    monkeypatch.setenv("WORLD_SIZE", "2")

    def refused() -> bool:
        result = CliRunner().invoke(app, [command, "--unknown", "x"], env={"COLUMNS": "200"})
        assert result.exit_code == 2
        return f"launcher: topd {command} runs in one process, not in 2." in result.output

    assert not refused()  # a batch system says so of a job
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert refused() is (command not in ("train", "warmstart"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not refused()


@pytest.mark.parametrize("kind", CONFIGS)
def test_settings_read_from_the_source_are_those_of_the_class(kind):
    assert early.declared(kind.__name__) == {f.name for f in fields(kind) if f.init}


@pytest.mark.parametrize("kind", SPECS)
def test_keys_of_a_part_read_from_the_source_are_those_of_the_class(kind):
    assert early.declared(kind.__name__) == set(kind.model_fields)


def test_methods_and_detectors_are_those_of_the_tables():
    assert early.rows_of_table("methods.py") == list(METHODS)
    assert early.rows_of_table("detectors.py") == list(DETECTORS)


def test_the_table_of_settings_is_up_to_date():
    """``python -m bench.settings`` writes it."""
    assert TABLE.read_text(encoding="utf-8") == settings.table()


@pytest.mark.parametrize("kind", ["ProbeConfig", "RepairConfig", "AnalysisConfig"])
def test_what_the_help_of_an_analysis_names_is_explained(kind):
    for name in early.own_settings(kind):
        found = [row for row in matching(name, known().settings) if row.name.split()[0] == name]
        assert len(found) == 1
        assert found[0].words


def test_a_run_that_gives_nothing_differs_in_nothing(tmp_path):
    for use_cpu in (True, False):
        plain = TOPDConfig(output_dir=str(tmp_path), use_cpu=use_cpu)
        assert differing(plain.to_dict()) == {}
    other = TOPDConfig(output_dir=str(tmp_path), use_cpu=True, method="topd", window_length=9)
    assert differing(other.to_dict()) == {"method": ("topd", "opd"), "window_length": (9, 50)}


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--learning_rat", "1"), "unknown key 'learning_rat'. Did you mean learning_rate?"),
        (("--student.dtyp", "x"), "unknown key 'dtyp' in student. Did you mean dtype?"),
        (("--method", "topdd"), "method: 'topdd' is not one of opd, first_fork, topd"),
        (("--candidate_loss", "loud"), "candidate_loss: 'loud' is not one of sampled"),
        (("--student", "./nowhere"), "model ./nowhere: no such file or folder (a relative path "),
        ((), "no such file prompts.jsonl (a relative path starts where the command runs)"),
    ],
)
def test_the_same_is_refused_early_and_late(tmp_path, monkeypatch, words, fault):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(PAIR)
    with pytest.raises(TOPDError) as said:
        early.check_early(tmp_path / "recipe.yaml", words)
    assert fault in str(said.value)
    with pytest.raises(TOPDError) as late:
        recipe.read_recipe(tmp_path / "recipe.yaml", parse_overrides(words)).data.load()
    assert str(late.value) == str(said.value) or "nowhere" in fault


def test_a_comparison_takes_keys_of_stage_1_that_there_are(tmp_path):
    (tmp_path / "recipe.yaml").write_text(PAIR.replace("prompts.jsonl", "testbed://programs"))
    early.check_early(tmp_path / "recipe.yaml", ["--warmstart.answers=data"], compare=True)
    with pytest.raises(TOPDError, match=r"'answrs' in warmstart\. Did you mean answers"):
        early.check_early(tmp_path / "recipe.yaml", ["--warmstart.answrs=data"], compare=True)
    with pytest.raises(TOPDError, match=r"warmstart\.answers: is a key of stage 1"):
        early.check_early(tmp_path / "recipe.yaml", ["--warmstart.answers=data"])


def test_a_file_that_is_not_there_is_told_early_as_it_is_late():
    for kind in (*TEXTS, ".parquet", ".csv.gz"):
        with pytest.raises(TOPDError, match="no such file") as late:
            DataSpec(path=f"no{kind}").load()
        with pytest.raises(TOPDError) as first:
            early.check_data(f"no{kind}")
        assert str(first.value) == str(late.value)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("train", "recipe.yaml", "--lr", "1"), 2),
        (("warmstart", "nowhere.yaml"), 2),
        (("probe", "recipe.yaml", "--rollout", "1"), 2),
        (("repair", "recipe.yaml", "--method", "topdd"), 2),
        (("compare", "recipe.yaml"), 2),
        (("eval", "./nowhere", "recipe.yaml"), 2),
        (("gate", "./nowhere", "./nowhere", "--suite", "nowhere.yaml"), 2),
        (("audit", "nowhere"), 2),
        (("replay", "nowhere", "--step", "0"), 2),
        (("report", "nowhere"), 2),
        (("trian",), 2),
        (("methods",), 0),
        (("settings", "window"), 0),
        (("--version",), 0),
        (("--help",), 0),
        (("train", "--help"), 0),
        (("eval", "--help"), 0),
        (("train", "-h"), 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_refusal_waits_for_no_heavy_import(tmp_path, words, code):
    (tmp_path / "recipe.yaml").write_text(PAIR)
    program = (
        "import sys\n"
        "HEAVY = 'torch transformers datasets scipy matplotlib jinja2 math_verify'.split()\n"
        f"sys.argv = ['topd', *{words!r}]\n"
        "from topd.cli import app\n"
        "try:\n    app()\n"
        "except SystemExit as end:\n"
        "    heavy = {*HEAVY} & set(sys.modules)\n"
        f"    assert (end.code or 0, heavy) == ({code}, set()), (end.code, heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
