"""The page without a browser: it says what the run folder says, whatever the models wrote."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from rich.console import Console

import report_folders as make
from topd.errors import TOPDError
from topd.report import page_line, write_report
from topd.report.charts import number
from topd.report.folder import kind_of, read_logs
from topd.report.rollouts import read_rollout, select_rollouts
from topd.report.settings import PLAIN, settings_table
from topd.report.summary import summary_tables, verdict_in
from topd.report.terminal import show
from topd.report.viewer import entry, view
from topd.runs import records
from topd.runs.records import ForkRecord, GuidanceRecord, read_records
from topd.runs.settings import known
from topd.runs.tokens import TokenTexts


class Parsed(HTMLParser):
    """Elements with their attributes, the text of scripts, and tables as rows of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            attrs, text = self.scripts[-1]
            self.scripts[-1] = attrs, text + data
        elif self._open in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self._open != "style":
            self.text += data

    def data(self, name: str) -> Any:
        """The content of a JSON block."""
        (text,) = [text for attrs, text in self.scripts if attrs.get("id") == name]
        return json.loads(text)


def page(folder: Path, **options: Any) -> Parsed:
    return Parsed(write_report(folder, **options).read_text(encoding="utf-8"))


def column(parsed: Parsed, *heads: str) -> dict[str, str]:
    """First to last cell of the table with these heads."""
    (table,) = [table for table in parsed.tables if table[0] == list(heads)]
    return {row[0]: row[-1] for row in table[1:]}


# What is read


@pytest.mark.parametrize("kind", make.KINDS)
def test_a_folder_is_known_by_its_files(kind, tmp_path):
    assert kind_of(make.KINDS[kind](tmp_path)) == kind


def test_a_folder_without_a_run_is_an_error_that_names_what_is_missing(tmp_path):
    with pytest.raises(TOPDError, match=r"the folder does not exist"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(TOPDError, match=r"holds no run.*metrics\.jsonl"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("rollouts.jsonl", "[1]\n", r"rollouts\.jsonl, line 7: must be a JSON object"),
        ("rollouts.jsonl", "{broken}\n", r"line 7: not valid JSON"),
        (
            "rollouts.jsonl",
            '{"rollout": 1, "prompt": 1}\n',
            r"line 7: response_ids: Field required",
        ),
        ("guidance.jsonl", '{"step": 0, "rollout": "x"}\n', r"line 7: rollout: "),
        ("metrics.jsonl", "nonsense\n", r"metrics\.jsonl, line 4: not valid JSON"),
        ("run.json", "}", r"run\.json: not valid JSON"),
        ("tokens.jsonl", "{}\n", r"tokens\.jsonl, line 11: not a token"),
        ("rollouts.jsonl", "{\udcff}\n", r"line 7: not valid JSON"),
        ("metrics.jsonl", "{\udcff}\n", r"line 4: not valid JSON"),
        ("run.json", "\udcff", r"run\.json: not valid JSON"),
        ("tokens.jsonl", "\udcff\n", r"tokens\.jsonl, line 11: not valid JSON"),
    ],
)
def test_a_broken_file_is_an_error_with_its_place(name, text, fault, tmp_path):
    with open(make.training(tmp_path) / name, "a", errors="surrogateescape") as file:
        file.write(text)  # \udcff: the byte FF, which UTF-8 does not have
    with pytest.raises(TOPDError, match=fault):
        write_report(tmp_path)


def test_a_last_line_that_a_running_job_is_writing_is_left_out(tmp_path):
    make.training(tmp_path)
    for name in ("rollouts.jsonl", "metrics.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write('{"step": 9, "lo')
    assert select_rollouts(tmp_path, limit=100).total == 6
    assert [log["step"] for log in read_logs(tmp_path)] == [1, 2, 3]


def test_a_fork_outside_its_rollout_is_an_error(tmp_path):
    make.training(tmp_path, rollouts=1)
    make.lines(tmp_path / "guidance.jsonl", [make.guidance(0, 0, 0, [make.fork(12, 0.5, True)])])
    with pytest.raises(TOPDError, match=r"its fork at token 12 does not fit"):
        write_report(tmp_path)
    outside = make.fork(2, 0.5, True, plan=[[0, 3, 1.0]])
    make.lines(tmp_path / "guidance.jsonl", [make.guidance(0, 0, 0, [outside])])
    with pytest.raises(TOPDError, match="does not fit"):
        write_report(tmp_path)


def test_a_long_run_keeps_whole_prompts_evenly_spaced(tmp_path, monkeypatch):
    make.training(tmp_path, rollouts=60, prompts=20)
    (tmp_path / "guidance.jsonl").rename(tmp_path / "aside")
    with monkeypatch.context() as patch:
        read = Mock(wraps=records._checked)
        patch.setattr(records, "_checked", read)
        chosen = select_rollouts(tmp_path, limit=15)
    (tmp_path / "aside").rename(tmp_path / "guidance.jsonl")
    assert chosen.total == 60
    assert read.call_count == 60 + 15  # in the second pass those that are shown
    assert Counter(r.prompt for r in chosen.rollouts) == {0: 3, 4: 3, 8: 3, 12: 3, 16: 3}
    parsed = page(tmp_path, rollouts=15)
    assert "15 of 60 rollouts are in this page" in parsed.text
    assert len(parsed.data("entries")) == 15


def test_of_long_rollouts_a_page_has_fewer_unless_it_is_told_how_many(tmp_path, monkeypatch):
    make.training(tmp_path, rollouts=60, prompts=20, length=40)
    assert len(select_rollouts(tmp_path).rollouts) == 60
    monkeypatch.setattr("topd.report.rollouts.MOST_TOKENS", 40 * 15)
    assert len(page(tmp_path).data("entries")) == 15
    assert len(page(tmp_path, rollouts=60).data("entries")) == 60


def test_one_rollout_is_found_by_its_line(tmp_path):
    make.training(tmp_path)
    found = read_rollout(tmp_path, 3)
    assert (found.step, found.rollout, found.forks[0].distance) == (1, 1, 0.503)
    with pytest.raises(TOPDError, match=r"--rollout 6: .* has rollouts 0 to 5\."):
        read_rollout(tmp_path, 6)
    (tmp_path / "rollouts.jsonl").write_text("")  # stopped in its first batch, and resumed
    with pytest.raises(TOPDError, match=r"--rollout 0: .* has no rollout yet\."):
        read_rollout(tmp_path, 0)


# What is shown of a rollout


def test_a_rollout_is_shown_with_its_windows_targets_and_threads(tmp_path):
    make.training(tmp_path)
    seen = view(read_rollout(tmp_path, 0), TokenTexts.read(tmp_path))
    assert seen.texts[:4] == (" so", " the", " sum", " is")
    assert seen.prompt_text == " so the"
    assert seen.student[1] - seen.teacher[1] == pytest.approx(0.1)
    real, alarm = seen.forks
    assert (real.position, real.distance, real.verdict) == (2, 0.5, "real")
    assert real.student.ids == seen.ids[2:5]
    assert real.teacher.texts == (" so", " the", " sum")
    assert real.threads == ((0, 0, 0.33333), (1, 1, 0.33333), (2, 2, 0.33333))
    assert real.targets == (((" two", 0.75), (" three", 0.25)),) * 3
    assert (alarm.verdict, alarm.targets) == ("alarm", ())
    assert entry(seen).forks == ((2, 0.5, "real"), (6, 0.1, "alarm"))


def test_rollouts_are_listed_by_the_words_of_their_prompts(tmp_path):
    make.training(tmp_path, rollouts=3)
    rows = [{**make.rollout(0, n, n, [1, 2, 3]), "prompt_ids": [1, 4 + n, 6]} for n in range(2)]
    make.lines(tmp_path / "rollouts.jsonl", rows)
    make.lines(tmp_path / "guidance.jsonl", [])
    assert [e["words"] for e in page(tmp_path).data("entries")] == ["two", "three"]
    make.lines(tmp_path / "rollouts.jsonl", rows[:1])
    assert [e["words"] for e in page(tmp_path).data("entries")] == [""]


def test_tokens_equal_in_place_are_counted(tmp_path):
    make.training(tmp_path, rollouts=1)
    same = make.fork(2, 0.1, False, teacher_tokens=[2, 9, 4])  # the student's are 2, 3, 4
    make.lines(tmp_path / "guidance.jsonl", [make.guidance(0, 0, 0, [same])])
    assert view(read_rollout(tmp_path, 0), TokenTexts.read(tmp_path)).forks[0].equal == 2


def test_positions_of_a_probe_are_marked_by_why_they_were_chosen(tmp_path):
    seen = view(read_rollout(make.probe(tmp_path), 0), TokenTexts.read(tmp_path))
    verdicts = ["real", "real", "alarm", "real", *["quiet"] * 5]
    assert [fork.verdict for fork in seen.forks] == verdicts
    assert [fork.facts[0][:2] for fork in seen.forks[1:3]] == [
        ("chosen as", "high"),
        ("agree again", "after 2 tokens"),
    ]


def test_positions_of_an_unfinished_probe_have_no_verdict(tmp_path):
    make.probe(tmp_path)
    records = map(json.loads, (tmp_path / "positions.jsonl").read_text().splitlines())
    open_ = [{**record, "real": None} for record in records]
    make.lines(tmp_path / "positions.jsonl", open_)
    seen = view(read_rollout(tmp_path, 0), TokenTexts.read(tmp_path))
    assert {fork.verdict for fork in seen.forks} == {"quiet"}


def test_a_repair_shows_the_same_prefix_before_and_after(tmp_path):
    seen = view(read_rollout(make.repair(tmp_path), 1), TokenTexts.read(tmp_path))
    (fork,) = seen.forks
    assert (fork.position, fork.distance, fork.verdict) == (2, 0.81, "real")
    assert fork.loss == pytest.approx(0.2)  # the loss at token t is t / 10
    assert fork.student.ids == (3, 4, 5)  # the rollout's own window, as long as the teacher's
    assert fork.teacher.ids == (0, 1, 2)
    assert [(a.arm, a.distance, a.window.ids) for a in fork.after] == [
        ("before", 0.6, (0, 1, 2)),
        ("opd", 0.5, (0, 1, 2)),
        ("topd", 0.2, (0, 1, 2)),
    ]


def test_numbers_that_are_not_finite_do_not_break_the_page(tmp_path):
    make.training(tmp_path, rollouts=1)
    row = make.rollout(0, 0, 0, [1, 2, 3])
    row["teacher_logprobs"][1] = float("-inf")
    make.lines(tmp_path / "rollouts.jsonl", [row])
    plan = [[0, 0, float("nan")], [1, 1, 0.25]]
    odd = make.fork(0, float("nan"), True, token_loss=float("inf"), plan=plan)
    line = make.guidance(0, 0, 0, [odd])
    line["targets"][0]["probabilities"][1] = float("inf")
    make.lines(tmp_path / "guidance.jsonl", [line])
    make.lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": float("nan"), "entropy": 1.0}])
    block = page(tmp_path).data("rollout-0")
    assert block["teacher"] == [-0.5, None, -0.7]
    (fork,) = block["forks"]
    assert (fork["distance"], fork["loss"]) == (None, 0.0)
    assert fork["threads"] == [[0, 0, None], [1, 1, 0.25]]
    assert fork["facts"][-1][:2] == ["candidate_loss", "not finite"]
    assert fork["targets"][0] == [[" three", None], [" two", 0.75]]
    file = StringIO()
    show(tmp_path, 0, Console(file=file, width=80))
    assert "not finite" in file.getvalue()


def test_a_run_without_token_texts_or_log_probs_is_still_shown(tmp_path):
    make.training(tmp_path, rollouts=1)
    (tmp_path / "tokens.jsonl").unlink()
    row = {**make.rollout(0, 0, 0, [1, 2, 3]), "logprobs": []}
    make.lines(tmp_path / "rollouts.jsonl", [row])
    make.lines(tmp_path / "guidance.jsonl", [])
    parsed = page(tmp_path)
    assert parsed.data("rollout-0")["texts"] == ["⟨1⟩", "⟨2⟩", "⟨3⟩"]
    assert "There is no tokens.jsonl" in parsed.text


# The numbers on the page are those of the folder


def test_curves_of_the_page_are_the_lines_of_metrics(tmp_path):
    make.training(tmp_path, rollouts=10)
    parsed, logs = page(tmp_path), read_logs(tmp_path)
    for key, head in (
        ("reverse_kl", "reverse KL"),
        ("topd/mean_ot", "mean OT distance"),
        ("entropy", "entropy"),
        ("completions/mean_length", "mean length"),
    ):
        shown = column(parsed, "update", head)
        assert shown == {f"{log['step']}": number(log[key]) for log in logs}


def test_seconds_by_phase_are_the_sums_of_metrics(tmp_path):
    make.training(tmp_path, rollouts=8)
    shown = column(page(tmp_path), "phase", "seconds", "share")
    assert shown == {"rollouts": "36.4%", "learning": "63.6%"}  # 8 and 14 of 22 seconds


def test_quartiles_of_the_page_are_those_of_the_forks(tmp_path):
    make.training(tmp_path, rollouts=9)
    records = read_records(tmp_path, "guidance.jsonl", GuidanceRecord)
    real = [fork.distance for r in records for fork in r.forks if fork.real]
    (table,) = [
        t for t in page(tmp_path).tables if t[0][:3] == ["group", "count", "lower quartile"]
    ]
    assert table[1][:2] == ["real divergent points", "9"]
    assert table[1][2:] == [
        number(float(x)) for x in (*np.quantile(real, (0.25, 0.5, 0.75)), np.mean(real))
    ]
    assert table[2][:2] == ["false alarms", "5"]


def test_every_fork_stands_in_the_page_with_its_numbers(tmp_path):
    """Its token loss is what the text is shaded by, t/10; 2.5 is what ``candidate_loss`` counts."""
    make.training(tmp_path)
    parsed = page(tmp_path)
    guided = list(read_records(tmp_path, "guidance.jsonl", GuidanceRecord))
    assert len(guided) == 6
    for n, record in enumerate(guided):
        shown = parsed.data(f"rollout-{n}")["forks"]
        assert [(f["position"], f["distance"], f["loss"]) for f in shown] == [
            (f.position, f.distance, f.position / 10) for f in record.forks
        ]
        assert all(f["facts"][-1][:2] == ["candidate_loss", "2.5"] for f in shown)
        assert parsed.data("entries")[n]["forks"] == [
            [f.position, f.distance, "real" if f.real else "alarm"] for f in record.forks
        ]


def test_a_probe_shows_groups_correlations_and_verdict(tmp_path):
    parsed = page(make.probe(tmp_path))
    (table,) = [t for t in parsed.tables if t[0][0] == "group"]
    assert [[*row[:2], row[3]] for row in table[1:]] == [
        ["high loss", "4", "0.6"],
        ["random", "2", "0.35"],
        ["low loss", "3", "0.2"],
    ]
    assert "Token loss is a weak guide for this pair." in parsed.text
    (figures,) = [t for t in parsed.tables if t[0] == ["", "value", "95 % interval"]]
    assert ["Pearson", "0.126", "0.1 to 0.15"] in figures
    assert ["Threshold", "0.25", ""] in figures
    (pairs,) = [t for t in parsed.tables if t[0] == ["student", "teacher", "count"]]
    assert pairs[1] == ["so", "thus", "12"]
    rejoin = column(parsed, "tokens", "positions", "share")
    assert rejoin == {"2": "50.0%"}  # two of four high-loss positions


def test_binned_means_are_over_all_positions_with_t_intervals_over_prompts(tmp_path):
    """Nine positions make two bins at the median loss; the median itself is in the upper one.

    Those of one of the three prompts are not independent: residuals are summed before squaring.
    """
    parsed = page(make.probe(tmp_path))
    (table,) = [t for t in parsed.tables if t[0][0] == "mean token loss, nats"]
    distances = np.concatenate(list(make.POSITIONS.values()))  # from the loudest to the quietest
    losses = 4.0 - np.arange(9) / 4
    for row, part in zip(table[1:], (slice(5, 9), slice(0, 5)), strict=True):
        some = distances[part]
        residuals = dict.fromkeys(range(3), 0.0)
        for place in range(*part.indices(9)):
            residuals[place % 3] += distances[place] - some.mean()
        spread = (3 / 2 * sum(r * r for r in residuals.values())) ** 0.5
        half = 4.302653 * spread / len(some)  # two degrees of freedom
        shown = (losses[part].mean(), len(some), some.mean(), half)
        assert row == [number(float(x)) for x in shown]


def test_ids_of_tokens_are_left_out_where_their_text_stands():
    record = {"student": 5, "student_text": " ", "teacher": 7, "teacher_text": "a", "count": 1200}
    (pairs,) = summary_tables({"pairs": [record]})
    assert pairs.columns == ("student", "teacher", "count")
    assert pairs.rows == (("' '", "a", "1,200"),)


def test_a_repair_shows_each_arm(tmp_path):
    parsed = page(make.repair(tmp_path))
    (table,) = [t for t in parsed.tables if t[0][0] == "group"]
    assert {row[0]: (row[1], row[3], row[5]) for row in table[1:]} == {
        "before": ("3", "0.6", "0.6"),
        "opd": ("3", "0.4", "0.4"),
        "topd": ("3", "0.2", "0.2"),
    }


def test_a_comparison_shows_means_with_intervals_and_curves_over_seeds(tmp_path):
    parsed = page(make.compare(tmp_path))
    (table,) = [t for t in parsed.tables if "teacher-written tokens" in t[0]]
    assert table[1][:4] == ["opd", "40.0 [37.0, 44.0]", "", "30.0 [28.0, 32.0]"]
    assert table[2][:3] == ["topd", "46.0 [43.0, 50.0]", "+6.0 [4.0, 8.0]"]
    assert "topd: +6.0 [4.0, 8.0] points over opd (greedy)." in parsed.text
    assert "{" not in parsed.text.partition("Arms")[2].partition("run.json")[0]
    arms = [t for t in parsed.tables if t[0] == ["arm", "mean", "low", "high"]]
    assert arms[0][1:] == [["opd", "0.4", "0.37", "0.44"], ["topd", "0.46", "0.43", "0.5"]]
    assert arms[1][1:] == [["topd", "0.06", "0.04", "0.08"]]  # against the baseline: not itself
    curve = next(t for t in parsed.tables if t[0] == ["update", "opd", "topd"])
    assert curve[1:] == [["2", "0.215", "0.245"], ["4", "0.415", "0.475"]]


def test_a_summary_keeps_every_figure_whatever_its_depth():
    (figures,) = summary_tables({"a": {"b": {"mean": 0.5, "low": 0.25, "high": 1}}, "n": 3})
    assert figures.rows == (("A · b", "0.5", "0.25 to 1"), ("N", "3", ""))
    (figures,) = summary_tables({"few": {"value": 0.5, "low": None, "high": None}})
    assert figures.rows == (("Few", "0.5", "-"),)


def test_a_verdict_stands_with_its_rule_and_histograms_are_not_printed():
    summary = {"verdict": "poor", "rule": "good: x; poor: y", "high": {"histogram": [1, 2], "n": 3}}
    assert verdict_in(summary) == ("Token loss as a guide: poor", "good: x; poor: y")
    assert summary_tables(summary)[0].rows == (("High · n", "3", ""),)


def test_an_unfinished_probe_says_so(tmp_path):
    (make.probe(tmp_path) / "probe.json").unlink()
    assert "There is no probe.json: the run has not finished" in page(tmp_path).text


# Untrusted text


# Evaluations, gates, settings


def test_an_evaluation_says_what_is_solved_and_what_was_cut_off(tmp_path):
    parsed = page(make.evaluation(tmp_path))
    assert (
        "first/student solves 25.0 % [0.6, 80.6] of 4 problems of test.jsonl greedily, and 12.5 % "
        "[0.3, 70.0] of its samples are right." in parsed.text
    )
    assert "25.0 % of the greedy answers were cut off at 3 tokens" in parsed.text
    assert ["greedy length, tokens", "3", "1.4 to 3"] in [row for t in parsed.tables for row in t]
    rows = [row for table in parsed.tables for row in table if row[-1].startswith("answer ")]
    assert rows == [
        ["0", "right", "1 of 2", "3", "answer 0"],
        ["1", "wrong", "0 of 2", "3", "answer 1"],
        ["2", "wrong", "0 of 2", "3", "answer 2"],
        ["3", "wrong, cut off", "0 of 2", "3", "answer 3"],
    ]


def test_a_gate_says_what_is_worse_and_what_is_not_known(tmp_path):
    parsed = page(make.gate(tmp_path))
    for sentence in (
        "FAILED: first/student against base on 4 problems of test.jsonl.",
        "accuracy is worse: by 30.0 [10.0, 50.0] points; the limit is 2 %.",
        "Neither shown to be worse nor within the limit: calibration.",
        "Open: 4 prompts do not tell.",
    ):
        assert sentence in parsed.text
    rows = {row[0]: row[1:] for table in parsed.tables for row in table if len(row) == 7}
    assert rows["accuracy"] == ["80.0 %", "50.0 %", "+30.0 %", "+10.0 % to +50.0 %", "2 %", "worse"]
    assert rows["length"][:2] == ["10.0 tokens", "9.0 tokens"]
    assert rows["calibration"][:3] == ["0.100", "0.110", "+0.010"]
    assert ["2", "base says", "candidate says"] in [row for t in parsed.tables for row in t]


def test_a_result_that_is_not_one_is_an_error_with_its_place(tmp_path):
    (make.gate(tmp_path) / "gate.json").write_text(json.dumps({"passed": "perhaps"}))
    with pytest.raises(TOPDError, match=r"gate\.json: passed"):
        write_report(tmp_path)


def test_the_settings_begin_with_what_is_not_the_default(tmp_path):
    make.training(tmp_path)
    config = {**known().plain, "method": "opd", "learning_rate": 0.5, "mine": 3, "output_dir": "x"}
    recipe = {"student": {"path": "org/s", "dtype": "float32"}, "lora": None}
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe, "config": config}))
    found = settings_table(tmp_path)
    assert found
    assert found.rows == (
        ("student.path", "org/s", ""),
        ("method", "opd", "opd"),
        ("learning_rate", "0.5", "2e-06"),
        ("mine", "3", ""),
    )
    text = (write_report(tmp_path)).read_text(encoding="utf-8")
    assert text.index(found.title) < text.index("<pre")


def test_a_resume_with_other_settings_is_said(tmp_path):
    """Once a resume that changed some; of a section only what differs in it."""
    make.training(tmp_path)
    spec = {"every": 10, "data": {"path": "a"}}
    changed = {
        "config.ot_threshold": [None, 0.25],
        "recipe.evaluation": [spec, {**spec, "data": {"path": "<b>\u202e"}}],
        "versions.torch": ["2.1", "2.2"],
    }
    entries = [{"step": 2, "changed": changed}, {"step": 3, "changed": {}}]
    (tmp_path / "run.json").write_text(json.dumps({"config": {}, "resumed": entries}))
    assert (
        "After 2 updates with other settings: ot_threshold none → 0.25, "
        "recipe.evaluation.data.path a → <b>⟨U+202E⟩, versions.torch 2.1 → 2.2. "
        "This page tells the last ones." in page(tmp_path).text
    )
    (tmp_path / "run.json").write_text(json.dumps({"config": {}, "resumed": entries[1:]}))
    assert "other settings" not in page(tmp_path).text


def test_what_the_settings_leave_out_are_defaults():
    from topd.inputs.models import ModelSpec
    from topd.inputs.rows import DataSpec

    fields = {**ModelSpec.model_fields, **DataSpec.model_fields}
    assert {name: fields[name].default for name in PLAIN} == PLAIN


def test_a_page_that_cannot_be_made_is_said_and_nothing_more(tmp_path):
    assert page_line(make.training(tmp_path / "a")) == f"report: {tmp_path / 'a' / 'report.html'}"
    assert page_line(tmp_path).startswith(f"no page was made: run folder {tmp_path}: holds no run")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """Everything that a model, a recipe or an arm's name could write is hostile."""
    folder = tmp_path_factory.mktemp("hostile") / "a<script>&'\""
    make.training(folder, words=make.HOSTILE, length=len(make.HOSTILE))
    evil = make.HOSTILE[1]
    models = {"student": {"name": evil.replace("/", "")}, "teacher": {"name": make.HOSTILE[6]}}
    (folder / "manifest.json").write_text(json.dumps({"models": models}))
    (folder / "run.json").write_text(json.dumps({"config": {"method": evil, "x": make.HOSTILE}}))
    write_report(folder)
    return folder


def test_hostile_text_makes_no_element_and_no_script(hostile, tmp_path):
    parsed = Parsed((hostile / "report.html").read_text(encoding="utf-8"))
    make.training(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"config": {"method": "opd", "x": 1}}))
    plain = page(tmp_path)
    assert Counter(tag for tag, _ in parsed.elements) == Counter(tag for tag, _ in plain.elements)
    assert [t for a, t in parsed.scripts if "type" not in a] == [
        t for a, t in plain.scripts if "type" not in a
    ]


def test_hostile_tokens_are_shown_as_text_with_what_is_hidden_written_out(hostile):
    texts = Parsed((hostile / "report.html").read_text(encoding="utf-8")).data("rollout-0")["texts"]
    assert "<script>alert(1)</script>" in texts
    assert "⟨U+202E⟩gnp.exe⟨U+2066⟩" in texts
    assert "a⟨U+D800⟩b" in texts
    assert "⟨U+001B⟩[31mred⟨U+0000⟩" in texts
    assert "x" * 200 + "… (100,000 characters)" in texts
    assert max(map(len, texts)) < 250


def test_hostile_names_of_arms_are_text_in_figures_too(tmp_path):
    make.lines(
        tmp_path / "samples.jsonl",
        [
            {"sample": i, "arm": arm, "distance": 0.5}
            for i, arm in enumerate(("<script>alert(1)</script>", "$\\frac{", "\u202e\x00", '"]]>'))
        ],
    )
    parsed = page(tmp_path)
    assert {a["id"] for a, _ in parsed.scripts if "type" in a} == {"about", "entries"}
    assert "<script>alert(1)</script>" in parsed.text
    assert "$\\frac{" in parsed.text


# What the page may do


@pytest.mark.parametrize("kind", make.KINDS)
def test_only_the_scripts_and_the_style_of_the_page_are_allowed(kind, tmp_path):
    text = write_report(make.KINDS[kind](tmp_path)).read_text(encoding="utf-8")
    parsed = Parsed(text)
    (policy,) = [a["content"] for t, a in parsed.elements if a.get("http-equiv")]
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    scripts = [text for attrs, text in parsed.scripts if "type" not in attrs]
    for name, content in (("style-src", styles), ("script-src", scripts)):
        hashes = [
            f"'sha256-{base64.b64encode(hashlib.sha256(c.encode()).digest()).decode()}'"
            for c in content
        ]
        assert f"{name} {' '.join(hashes)};" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy


@pytest.mark.parametrize("kind", make.KINDS)
def test_nothing_is_loaded_and_no_attribute_runs(kind, tmp_path):
    parsed = page(make.KINDS[kind](tmp_path))
    for tag, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
    ids = Counter(attributes["id"] for _, attributes in parsed.elements if attributes.get("id"))
    assert [name for name, count in ids.items() if count > 1] == []


def test_controls_of_the_page_have_names(tmp_path):
    parsed = page(make.training(tmp_path))
    for tag, attributes in parsed.elements:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert len(attributes["aria-label"]) > 20
        if attributes.get("role") == "tab":
            assert attributes["aria-controls"] in {a.get("id") for _, a in parsed.elements}


def test_the_same_folder_gives_the_same_page(tmp_path):
    make.training(tmp_path)
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    assert not list(tmp_path.glob("*.partial"))


def test_a_record_may_have_keys_that_this_version_does_not_know():
    known = {"position": 1, "token_loss": 0.5, "distance": 0.5}
    assert ForkRecord.model_validate({**known, "future": [1]}) == ForkRecord.model_validate(known)
