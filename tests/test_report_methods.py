"""The pages of every method: what they say of a rollout is what its line of guidance.jsonl says."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import report_folders as make
from test_methods import ROWS, STARTS, evidence, with_statistics
from test_report import page
from topd.methods import METHODS
from topd.report.guided import LOSSES, NOTHING, Verdict, verdict_rule
from topd.report.terminal import show
from topd.runs.folder import guidance_record
from topd.runs.records import Fork, GuidanceRecord, read_records
from topd.types import Guidance, Prompt, Rollout

REAL = (True, False, True, True)


def run_of(method: str, folder: Path, **config: Any) -> list[dict[str, Any]]:
    """A run folder of one update by a method, from evidence by hand; its lines of guidance."""
    found = with_statistics(evidence(ROWS, STARTS, list(REAL)))
    asked = METHODS[method].guide(found)
    make.training(folder, rollouts=2)
    rows = [make.rollout(0, n, n, [3 + t for t in range(len(r))]) for n, r in enumerate(ROWS)]
    make.lines(folder / "rollouts.jsonl", rows)
    windows = found.windows
    forks: list[list[Fork]] = [[], []]
    for k, (row, start) in enumerate(STARTS if METHODS[method].looks_ahead else []):
        tokens = tuple(windows.teacher_tokens[k][windows.teacher_mask[k]].tolist())
        length = int(windows.student_mask[k].sum())
        forks[row].append(
            Fork(
                position=start,
                token_loss=2.5,
                distance=0.25 * k,
                real=REAL[k],
                teacher_tokens=tokens,
                student_length=length,
            )
        )
    lines = [
        guidance_record(0, n, Rollout(Prompt(n, (0,), (0,)), (), (), finished=True), forks[n], g)
        for n, g in enumerate(asked)
    ]
    make.lines(folder / "guidance.jsonl", lines)
    settings = {"method": method, "false_alarm_share": 0.3, "ot_threshold": None, **config}
    (folder / "run.json").write_text(json.dumps({"recipe": {}, "config": settings}))
    return [json.loads(line) for line in (folder / "guidance.jsonl").read_text().splitlines()]


def in_terminal(folder: Path, index: int) -> str:
    file = StringIO()
    show(folder, index, Console(file=file, width=500, force_terminal=False))
    return " ".join(file.getvalue().split())


def named(record: dict[str, Any]) -> list[str]:
    """What must be said of a line of guidance: a piece of text for everything it holds.

    A branch where the teacher wrote a window is that window, any other the rollout's own text.
    """
    weights, advantages = record["weights"], [a for a in record["advantages"] if a]
    places = {fork["position"] for fork in record["forks"]}
    windows = [b for b in record["branches"] if b["start"] in places]
    own = [b for b in record["branches"] if b["start"] not in places]
    pieces = [
        f"At token {b['start']} the student learns the teacher's window"
        f"{', continued by the student,' if b['go_on'] else ''} in that window's own context, by "
        f"{LOSSES[b['loss']]} {'with' if b['loss'] == 'cross_entropy' else 'along'} it: "
        f"{len(b['tokens'])} token"
        for b in windows
    ]
    if own:
        (loss,) = {LOSSES[b["loss"]] for b in own}
        at = ", ".join(str(b["start"] + i) for b in own for i in range(len(b["tokens"])))
        pieces.append(f"{loss} as well, on the rollout's own token {at}.")
    if record["targets"]:
        pieces.append(f"Soft targets at {len(record['targets'])} token")
    if record["capped"]:
        pieces.append(f"median at token {', '.join(map(str, record['capped']))}.")
    if weights:
        pieces.append("count")
    if advantages:
        pieces.append(f"Advantage {advantages[0]:.4g} on the log-prob of {len(advantages)} of")
    return pieces or [NOTHING]


@pytest.mark.parametrize("method", METHODS)
def test_page_and_terminal_say_what_the_line_of_guidance_says(method, tmp_path):
    lines = run_of(method, tmp_path)
    parsed = page(tmp_path)
    for n, record in enumerate(lines):
        block = parsed.data(f"rollout-{n}")
        said, printed = " ".join(block["asked"]), in_terminal(tmp_path, n)
        for piece in named(record):
            assert piece in said.replace("weighted", "count")
        assert (NOTHING in said) == (named(record) == [NOTHING])
        assert all(sentence in printed for sentence in block["asked"])
        weights = {str(t): w for t, w in block["weights"]}
        assert weights == {t: pytest.approx(w, abs=1e-4) for t, w in record["weights"].items()}
        assert [a for _, a in block["advantages"]] == pytest.approx(
            [a for a in record["advantages"] if a], abs=1e-4
        )


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.looks_ahead])
def test_every_candidate_says_what_is_asked_there(method, tmp_path):
    lines = run_of(method, tmp_path)
    parsed = page(tmp_path)
    for n, record in enumerate(lines):
        branches = {b["start"]: b for b in record["branches"]}
        for fork in parsed.data(f"rollout-{n}")["forks"]:
            at, said = fork["position"], fork["asked"]
            assert ("the student learns" in said) == (at in branches)
            assert (fork["branch"] or {}).get("ids") == branches.get(at, {}).get("tokens")
            assert ("held down" in said) == (at in record["capped"])
            weight = record["weights"].get(str(at))
            assert (weight is None) or f"counts {weight:.4g} times" in said
            guided = any(
                at <= t["position"] < at + len(fork["student"]["ids"]) for t in record["targets"]
            )
            assert ("Soft targets" in said) == guided


def test_first_fork_s_page_shows_its_branch_and_what_counts_less(tmp_path):
    """The window at the first real point, and 0.3 after it; numbers by hand."""
    run_of("first_fork", tmp_path)
    asked = page(tmp_path).data("rollout-0")["asked"]
    assert asked == [
        "Token losses count 0.3 times from token 1 on.",
        "At token 0 the student learns the teacher's window in that window's own context, by "
        "KL(p_T || p_S) along it: 4 tokens.",
    ]


CAPTIONS = {
    "topd": "KL from the soft targets to the student, along the student's own window.",
    "window_sft": "cross-entropy along the teacher's window, in that window's own context.",
    "window_kd": "KL(p_T || p_S) along the teacher's window, in that window's own context.",
    "first_fork": "KL(p_T || p_S) along the teacher's window, in that window's own context.",
    "relay": "KL(p_S || p_T) along the teacher's window and what the student wrote after it",
    "eopd": "KL(p_T || p_S) on tokens that the method chose.",
}


@pytest.mark.parametrize("method", CAPTIONS)
def test_the_caption_of_the_trajectory_loss_says_what_was_learned_along(method, tmp_path):
    run_of(method, tmp_path)
    text = page(tmp_path).text
    assert {caption for caption in CAPTIONS.values() if caption in text} == {CAPTIONS[method]}


def test_the_student_s_own_tokens_after_a_relayed_window_are_shown(tmp_path):
    """As the trainer records it: the branch has the teacher's window and then the student's."""
    lines = run_of("relay", tmp_path)
    branch = lines[0]["branches"][0]
    own = [9, 8, 7]
    branch["tokens"] = [*branch["tokens"], *own]
    make.lines(tmp_path / "guidance.jsonl", lines)
    fork = page(tmp_path).data("rollout-0")["forks"][0]
    assert fork["branch"]["ids"] == fork["teacher"]["ids"] + own
    assert "learned in the rollout's place" in in_terminal(tmp_path, 0)


# Verdicts


RULES = [
    ({"false_alarm_share": 0.3}, "Among the 30 % of this update's candidates with the smallest"),
    ({"false_alarm_share": 0.3, "ot_threshold": 0.25}, "below 0.25 (ot_threshold)"),
    ({"false_alarm_share": 0.0}, "All candidates of this run are, whatever their"),
]


@pytest.mark.parametrize(("settings", "reason"), RULES)
def test_a_verdict_is_told_with_its_rule(settings, reason, tmp_path):
    run_of("topd", tmp_path, **settings)
    parsed = page(tmp_path)
    text = parsed.text
    assert reason in text
    assert reason in " ".join(parsed.data("about")["why"].values())
    assert reason in in_terminal(tmp_path, 0)
    quota = settings == {"false_alarm_share": 0.3}
    assert ("False alarm by quota: Among the 30 %" in text) == quota  # of which group it speaks
    assert ("a quota, not a finding" in text) == quota
    assert "another word on the same path" not in text


def test_of_several_teachers_each_has_its_quota_and_its_whole_name(tmp_path):
    """A name may hold a slash, as on the Hub, and is not to be trusted."""
    run_of("topd", tmp_path)
    names = ("Org/math", "Org/code\n<b>")
    keys = {f"teacher/{name}/reverse_kl_sampled": 0.5 for name in names}
    make.lines(tmp_path / "metrics.jsonl", [{**make.log(1), **keys}])
    parsed = page(tmp_path)
    assert ["update", "Org/math", "Org/code <b>"] in [table[0] for table in parsed.tables]
    said = "Among the 30 % of its teacher's candidates in this update with the smallest OT distance"
    assert said in parsed.text
    assert said in in_terminal(tmp_path, 0)


def test_where_no_candidate_can_be_a_false_alarm_none_is_spoken_of(tmp_path):
    run_of("first_fork", tmp_path, false_alarm_share=0.0)
    lines = (tmp_path / "guidance.jsonl").read_text().replace('"real": false', '"real": true')
    (tmp_path / "guidance.jsonl").write_text(lines)
    assert "false alarm" not in page(tmp_path).text.lower()
    assert "false alarm" not in in_terminal(tmp_path, 0)
    run_of("topd", tmp_path)
    assert "False alarms among the candidates" in page(tmp_path).text


def test_a_method_that_looks_nowhere_ahead_has_rollouts_and_no_forks(tmp_path):
    run_of("opd", tmp_path)
    text = page(tmp_path).text
    assert "Rollouts" in text
    assert "Forks" not in text
    assert "○" not in in_terminal(tmp_path, 0)


# Runs whose responses are not all the student's


def test_a_warm_start_is_told_as_one(tmp_path):
    """Answers that were imitated: no teacher was followed, no rollout sampled, no collapse seen."""
    run_of("opd", tmp_path, answers="data", kd_ratio=0.0)
    logs = [{"step": n, "loss": 2.0 if n < 6 else 1.0, "entropy": 1.0} for n in range(1, 11)]
    make.lines(tmp_path / "metrics.jsonl", logs)
    text = page(tmp_path).text
    assert "Warm start" in text
    assert "imitated the answers of its data (stage 1)." in text
    assert "Loss 2 to 1 over 10 updates: a fall beyond chance (95 %)." in text
    assert "by opd" not in text
    assert "own rollouts" not in text
    assert "Signs of collapse" not in text
    assert "no divergence was computed" in text


def test_all_of_several_teachers_are_named(tmp_path):
    run_of("opd", tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    run["recipe"] = {"teachers": {"math": {"path": "a"}, "code": {"path": "b"}}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert "student-of-test learned by opd from math and code." in page(tmp_path).text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"teacher_share": 0.25}, "In 25 % of the updates the teacher wrote the responses."),
        ({"window_replay": 4}, "Every update learned up to 4 windows of earlier updates again."),
    ],
)
def test_what_an_update_learns_besides_its_rollouts_is_said(settings, said, tmp_path):
    run_of("first_fork", tmp_path, **settings)
    assert said in page(tmp_path).text
    run_of("first_fork", tmp_path / "other")
    assert said not in page(tmp_path / "other").text


def test_a_run_without_settings_gives_no_reason_that_it_does_not_know():
    assert verdict_rule("training", {}, None) == Verdict()
    assert "0.25" in verdict_rule("probe", {"false_alarm_share": 0.3}, 0.25).why_alarm


def test_a_method_from_outside_is_told_as_it_is_recorded(tmp_path):
    """Weights of several sizes, a negative advantage and a branch, from no method of ours."""
    run_of("opd", tmp_path)
    odd = Guidance((0.5, 2.0, 1.0, 1.0, 0.0), advantages=(0.0, 0.0, -0.5, 0.25, 0.0))
    rollout = Rollout(Prompt(0, (0,), (0,)), (), (), finished=True)
    make.lines(tmp_path / "guidance.jsonl", [guidance_record(0, 0, rollout, [], odd)])
    assert page(tmp_path).data("rollout-0")["asked"] == [
        "Token losses are weighted: 0 to 2 at 3 of 5 tokens.",
        "Advantage -0.5 to 0.25 on the log-prob of 2 of 5 tokens; these were sampled, and below 0 "
        "they are made less likely.",
    ]


@pytest.mark.parametrize(
    ("weights", "asked"),
    [
        ((1.0, 0.0, 0.0, 1.0, 1.0), NOTHING),
        ((1.0, 0.0, 0.0, 0.3, 0.3), "Token losses count 0.3 times from token 3 on."),
        ((0.5, 0.0, 0.0, 1.0, 2.0), "Token losses are weighted: 0.5 to 2 at 2 of 3 tokens."),
        ((0.0, 0.0, 0.0, 1.0, 1.0), "2 of 3 tokens count, 1 times each; the other"),
    ],
)
def test_tokens_of_an_environment_are_not_counted_among_the_weighted(weights, asked, tmp_path):
    run_of("opd", tmp_path)
    make.lines(
        tmp_path / "rollouts.jsonl", [{**make.rollout(0, 0, 0, range(5)), "replies": [[1, 3]]}]
    )
    rollout = Rollout(Prompt(0, (0,), (0,)), (), (), finished=True)
    make.lines(tmp_path / "guidance.jsonl", [guidance_record(0, 0, rollout, [], Guidance(weights))])
    parsed = page(tmp_path)
    (said,) = parsed.data("rollout-0")["asked"]
    assert said.startswith(asked)
    assert "written by the environment, not learned" in parsed.text


def test_a_rollout_without_a_line_of_guidance_says_nothing(tmp_path):
    run_of("opd", tmp_path)
    (tmp_path / "guidance.jsonl").write_text("")
    assert page(tmp_path).data("rollout-0")["asked"] == []
    assert list(read_records(tmp_path, "guidance.jsonl", GuidanceRecord)) == []
