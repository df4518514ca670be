"""Completions and forks in a run's trackers: what of the run folder is sent, and to whom."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from conftest import read
from test_resume import make
from topd import TOPDConfig
from topd.errors import TOPDError
from topd.training.trackers import markdown

WHERE = {"candidate_fraction": 0.3, "window_length": 4, "max_steps": 2}


def fake(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    """A tracker's module that takes everything; what its ``log`` is given."""
    sent: list[dict[str, Any]] = []
    module = MagicMock(__spec__=ModuleSpec(name, None), __version__="99", ConfigError=ValueError)
    module.Table = lambda dataframe: SimpleNamespace(rows=dataframe.to_dict(orient="records"))
    module.log = lambda logs, **_: sent.append(logs)
    module.context_vars.current_space_id.get.return_value = None
    for part in (name, f"{name}.sdk", f"{name}.sdk.lib", f"{name}.sdk.lib.config_util"):
        monkeypatch.setitem(sys.modules, part, module)
    return sent


def tables(sent: list[dict[str, Any]], name: str) -> list[list[dict[str, Any]]]:
    return [logs[name].rows for logs in sent if name in logs]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_each_update_s_completions_and_forks(name, tmp_path, monkeypatch):
    sent = fake(monkeypatch, name)
    trainer = make(tmp_path, method="topd", report_to=name, log_completions=True, **WHERE)
    trainer.train()
    rollouts, guidance = read(tmp_path / "rollouts.jsonl"), read(tmp_path / "guidance.jsonl")
    completions, forks = tables(sent, "completions"), tables(sent, "forks")
    assert [{row["step"] for row in table} for table in completions] == [{1}, {2}]
    said = [row for table in completions for row in table]
    decode = trainer.processing_class.decode
    assert [row["completion"] for row in said] == [
        decode(line["response_ids"], skip_special_tokens=True) for line in rollouts
    ]
    assert [row["prompt"] for row in said] == [
        decode(line["prompt_ids"], skip_special_tokens=True) for line in rollouts
    ]
    found = [(row["token"], row["OT distance"], row["real"]) for table in forks for row in table]
    assert found
    assert found == [
        (f["position"], f["distance"], f["real"]) for line in guidance for f in line["forks"]
    ]
    assert forks[0][0]["teacher would write"] == decode(
        guidance[0]["forks"][0]["teacher_tokens"], skip_special_tokens=True
    )


def test_nothing_is_sent_that_was_not_asked_for(tmp_path, monkeypatch):
    """Prompts leave the machine with log_completions alone; a method without forks has no table."""
    sent = fake(monkeypatch, "wandb")
    make(tmp_path / "off", method="topd", report_to="wandb", **WHERE).train()
    assert any("loss" in key for logs in sent for key in logs)
    assert not any(key in logs for logs in sent for key in ("completions", "forks"))
    sent.clear()
    run = make(tmp_path / "opd", method="opd", report_to="wandb", log_completions=True, max_steps=1)
    run.train()
    assert len(tables(sent, "completions")) == 1
    assert not tables(sent, "forks")


def test_tensorboard_gets_the_tables_as_text(tmp_path, monkeypatch):
    if find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    options = {"method": "topd", "report_to": "tensorboard", "log_completions": True, **WHERE}
    make(tmp_path / "run", **options).train()
    read = EventAccumulator(str(tmp_path / "board"))
    read.Reload()
    for name in ("completions", "forks"):
        events = read.Tensors(f"{name}/text_summary")
        assert [event.step for event in events] == [1, 2]
        assert events[0].tensor_proto.string_val[0].startswith(b"| step | ")


def test_text_of_a_model_does_not_break_a_table():
    drawn = markdown([{"a": "x|y\n| z |", "b": "<img src=x>"}, {"a": None, "b": 0.123456}])
    assert drawn.splitlines()[2:] == [
        "| x&#124;y↵&#124; z &#124; | &lt;img src=x> |",
        "|  | 0.1235 |",
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "report_to names none of tensorboard, trackio, wandb"),
        ({"report_to": "mlflow"}, "report_to names none"),
        ({"report_to": "wandb", "log_rollouts": False}, "needs log_rollouts"),
    ],
)
def test_completions_that_would_go_nowhere_are_refused(settings, said, tmp_path):
    with pytest.raises(TOPDError, match=said):
        TOPDConfig(output_dir=str(tmp_path), log_completions=True, **settings)
