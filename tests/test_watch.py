"""A run that should not continue: what is seen, what is said, and that it can be resumed."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import signal
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from conftest import rows, write_pair
from test_resume import lines, make, records
from topd import TOPDConfig, TOPDTrainer
from topd.commands import terminal
from topd.commands.train import run_recipe
from topd.errors import COLLAPSED, DISK, NONFINITE, TERMINATED, StoppedError, TOPDError
from topd.methods import Method
from topd.training import stop_rules
from topd.training.progress import Phases, silence_others
from topd.training.stop_rules import Rule, rules
from topd.training.warmstart import WarmstartConfig, WarmstartTrainer
from topd.types import Evidence, Guidance

# Stop rules

LENGTH = Rule("stop_length", "length", "mean length")
REST = replace(LENGTH, rest=True)
ABOVE = replace(LENGTH, above=True, floor=0.5)


@Method
def silent(evidence: Evidence) -> tuple[Guidance, ...]:
    """A method of which no token counts."""
    return tuple(Guidance((0.0,) * len(rollout.response)) for rollout in evidence.rollouts)


def args(**changes) -> TOPDConfig:
    return TOPDConfig(output_dir="unused", stop_length=0.5, stop_patience=2, **changes)


@pytest.mark.parametrize(
    ("rule", "values", "fires"),
    [
        (LENGTH, [10, 10, 9, 4, 4], True),
        (LENGTH, [12, 4, 5, 5.9], True),  # the limit is 0.5 x the best of them
        (LENGTH, [10, 10, 4, 5], False),  # the limit itself is allowed
        (LENGTH, [10, 10, 4, 4, 9], False),  # it came back
        (LENGTH, [10, 4, 4], False),  # too few to say
        (LENGTH, [0, 0, 0, 0], False),  # it was so from the start
        (LENGTH, [10, 10, 99, 99], False),
        (REST, [0.2, 0.2, 0.9, 0.7], True),  # of 0.8, less than 0.4 is left
        (REST, [0.2, 0.2, 0.9, 0.5], False),
        (ABOVE, [1, 3, 1.1, 1.2], True),
        (ABOVE, [1, 9, 0.6, 0.7], True),
        (ABOVE, [1, 3, 1.1, 0.4], False),
        (ABOVE, [0, 0, 0.2, 0.2], False),  # reckoned from 0.5
        (ABOVE, [0, 0, 0.3, 0.26], True),
    ],
)
def test_a_rule_compares_the_last_logs_with_the_first(rule, values, fires):
    found = rule.broken([{"length": value} for value in values], args())
    assert bool(found) is fires


def test_an_update_of_which_nothing_counts_is_passed_over(tmp_path):
    logs = [{"length": value} for value in (12, 8, 3, 4)]
    assert LENGTH.broken([{}, logs[0], {}, *logs[1:], {}], args()) == LENGTH.broken(logs, args())
    trainer = make(tmp_path, method="test_watch:silent", stop_patience=1, max_steps=2)
    trainer.train()
    assert all("reverse_kl" not in log for log in trainer.state.log_history)


def test_a_rule_says_what_was_seen_and_what_the_limit_is():
    said = LENGTH.broken([{"length": value} for value in (12, 8, 3, 4)], args())
    assert said == (
        "mean length was 3 to 4 in the last 2 logs and 12 at best in the first 2; the limit is "
        "6 (stop_length: 0.5)"
    )


@pytest.mark.parametrize("off", [None, 0.0])
def test_a_rule_can_be_switched_off(off):
    logs = [{"length": value} for value in (9, 9, 1, 1)]
    assert LENGTH.broken(logs, args())
    assert not LENGTH.broken(logs, replace(args(), stop_length=off))
    assert not LENGTH.broken(logs, replace(args(), stop_patience=None))


def test_every_limit_has_a_rule_and_answers_have_one_only():
    fields = {n for n in TOPDConfig.__dataclass_fields__ if n.startswith("stop_")}
    assert {rule.limit for rule in rules(args())} == fields - {"stop_patience"}
    for kd_ratio, figure in ((0.5, "forward_kl"), (0.0, "loss")):
        own = WarmstartConfig(output_dir="unused", use_cpu=True, kd_ratio=kd_ratio)
        assert [rule.figure for rule in rules(own)] == [figure]


@pytest.mark.parametrize("every", [1, 2])
def test_a_run_that_collapses_is_stopped_with_a_checkpoint(tmp_path, every):
    """A learning rate that ruins the student: its responses are one token again and again."""
    trainer = make(
        tmp_path,
        method="opd",
        max_steps=60,
        learning_rate=0.3,
        warmup_steps=6,
        logging_steps=every,
        save_strategy="no",
        stop_patience=3,
        max_logprob_gap=1e9,
    )
    with pytest.raises(StoppedError, match=r"collapsed.*in the last 3 logs.*stop_") as found:
        trainer.train()
    assert found.value.exit_code == COLLAPSED
    step = trainer.state.global_step
    assert f"update {step}:" in str(found.value)
    assert 6 * every <= step < 60
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert not (tmp_path / "student").exists()


# Losses that are not finite


def broken(monkeypatch, at: int, value: float, *, gradient: bool = False) -> None:
    """The loss of an update is not finite, or only its gradient is not."""
    right = TOPDTrainer.compute_loss

    def loss(self, model, inputs, **kwargs):
        found = right(self, model, inputs, **kwargs)
        if self.state.global_step != at:
            return found
        if not gradient:
            self.update_loss = self.update_loss * value
            return found * value
        first = next(p for p in model.parameters() if p.requires_grad)
        return found + (first.flatten()[0] - first.flatten()[0].detach()).abs().sqrt()  # d/dx at 0

    monkeypatch.setattr(TOPDTrainer, "compute_loss", loss)


FAULTS: list[dict[str, Any]] = [
    {"value": math.nan},
    {"value": math.inf},
    {"value": 1.0, "gradient": True},
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(tmp_path, monkeypatch, fault):
    broken(monkeypatch, 2, **fault)
    trainer = make(tmp_path, method="opd", max_steps=4)
    with pytest.raises(
        StoppedError, match=r"update 3: .*not finite.*fault-2.*nonfinite: skip"
    ) as e:
        trainer.train()
    assert e.value.exit_code == NONFINITE
    fault_folder, before = tmp_path / "fault-2", tmp_path / "checkpoint-2"
    kept, saved = (load_file(f / "model.safetensors") for f in (fault_folder, before))
    torch.testing.assert_close(kept, saved, rtol=0, atol=0)
    batch = load_file(fault_folder / "batch.safetensors")
    responses = [
        r["response_ids"] for r in map(json.loads, lines(tmp_path / "rollouts.jsonl")[-2:])
    ]
    assert batch["0.tokens"].tolist() == responses[0] + responses[1]


def test_after_the_fault_is_mended_the_run_goes_on(tmp_path, monkeypatch):
    make(tmp_path / "whole", method="opd", max_steps=4).train()
    broken(monkeypatch, 2, math.nan)
    with pytest.raises(StoppedError):
        make(tmp_path / "run", method="opd", max_steps=4).train()
    monkeypatch.undo()
    make(tmp_path / "run", method="opd", max_steps=4).train(resume_from_checkpoint=True)
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def failing(trainer: TOPDTrainer, room: str, fault: Exception) -> TOPDTrainer:
    """It raises in update 3, while it looks, learns or, after update 2, is evaluated."""
    if room == "nan":
        trainer.add_callback(Ruin())
        return trainer
    place, name, when = {
        "looks": (trainer.observer, "score", 2),
        "learns": (trainer, "compute_loss", 2),
        "is evaluated": (trainer.evaluator, "score", 2),
    }[room]
    right = getattr(place, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == when:
            raise fault
        return right(*args, **kwargs)

    setattr(place, name, wrong)
    return trainer


class Ruin(TrainerCallback):
    """A weight becomes NaN, in the third update."""

    def on_step_begin(self, args, state, control, model=None, **_) -> None:
        if state.global_step == 2:
            next(iter(model.parameters())).data.fill_(math.nan)


RARE: dict[str, Any] = {"method": "opd", "max_steps": 4, "save_steps": 100, "logging_steps": 3}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.parametrize("room", ["looks", "learns", "is evaluated"])
@pytest.mark.parametrize("kind", [TOPDError, RuntimeError])
def test_a_fault_keeps_the_updates_that_are_done(tmp_path, room, kind):
    """Of the update under way the run has its records once, as if the fault had not been."""
    options = RARE | ({"eval_data": rows(4), **EVALUATED} if room == "is evaluated" else {})
    make(tmp_path / "whole", **options).train()
    run = tmp_path / "run"
    with pytest.raises(kind, match="content_filter") as found:
        failing(make(run, **options), room, kind("content_filter")).train()
    said = " ".join([str(found.value), *getattr(found.value, "__notes__", ())])
    assert f"{run}/checkpoint-2 is saved: 2 of 4 updates. Resume with" in said
    assert getattr(found.value, "exit_code", 2) == 2
    make(run, **options).train(resume_from_checkpoint=True)
    ours, theirs = (
        {k: trained(v) for k, v in records(tmp_path / r).items()} for r in ("run", "whole")
    )
    assert ours == theirs


def trained(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All but the evaluation that failed, which is not made again."""
    return [log for log in logs if "eval_loss" not in log or log["step"] != 2]


@pytest.mark.parametrize(
    ("room", "changes", "kept", "said"),
    [
        ("looks", {"save_strategy": "no"}, [], "^content_filter$"),
        ("looks", {"save_total_limit": 1, "save_steps": 1}, ["checkpoint-2"], "checkpoint-2 is"),
        ("nan", {}, [], "not finite, so no"),
    ],
)
def test_what_is_not_kept_at_a_fault(tmp_path, room, changes, kept, said):
    """Nothing where nothing is saved; and no weights that would take the place of better ones."""
    with pytest.raises(TOPDError, match=said):
        failing(make(tmp_path, **RARE | changes), room, TOPDError("content_filter")).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == kept


@pytest.mark.parametrize("fault", FAULTS)
def test_such_an_update_can_be_left_out(tmp_path, monkeypatch, fault):
    broken(monkeypatch, 2, **fault)
    make(tmp_path, method="opd", max_steps=5, nonfinite="skip").train()
    weights = [load_file(tmp_path / f"checkpoint-{n}" / "model.safetensors") for n in (2, 3, 4)]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)
    assert any(not torch.equal(weights[2][name], weights[1][name]) for name in weights[1])
    assert (tmp_path / "fault-2" / "batch.safetensors").exists()
    assert not (tmp_path / "fault-2" / "model.safetensors").exists()
    logs = [json.loads(line) for line in lines(tmp_path / "metrics.jsonl")]
    finite = [math.isfinite(log["loss"]) for log in logs[:5]]
    assert finite == [True, True, fault.get("gradient", False), True, True]
    assert math.isfinite(logs[-1]["train_loss"])


def test_what_a_callback_keeps_in_the_control_is_left_alone(tmp_path):
    """It became true or false where ranks agree on what is asked for."""

    class Keeps(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            control.own = [state.global_step]

    trainer = make(tmp_path, method="opd", max_steps=2)
    trainer.add_callback(Keeps())
    trainer.train()
    assert trainer.control.own == [1]


# SIGTERM and Ctrl-C


class Terminate(TrainerCallback):
    """The machine is wanted by someone else, in the middle of an update."""

    def __init__(self, number: int, times: int = 1) -> None:
        self.number, self.times = number, times

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.fixture
def no_nohup() -> Iterator[None]:
    """The tests themselves may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("no_nohup")
@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C"), (signal.SIGHUP, "SIGHUP")],
)
def test_a_signal_ends_the_update_saves_and_says_so(
    tmp_path, monkeypatch, capfd, number, name
) -> None:
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "max_completion_length": 8}
    recipe = write_pair(tmp_path, **settings, save_strategy="no", method="opd")
    run_recipe(recipe, [f"--output_dir={tmp_path / 'whole'}"], quiet=True)
    handlers = [signal.getsignal(n) for n in stop_rules.SIGNALS]
    with monkeypatch.context() as patch:
        create = TOPDTrainer.__init__

        def with_callback(self, *args, **kwargs):
            create(self, *args, **kwargs)
            self.add_callback(Terminate(number))

        patch.setattr(TOPDTrainer, "__init__", with_callback)
        words = [f"--output_dir={tmp_path / 'run'}", "--resume_from_checkpoint=last"]
        with pytest.raises(StoppedError, match=name) as found:
            run_recipe(recipe, words, quiet=True)
    assert found.value.exit_code == TERMINATED
    assert str(found.value) == (
        f"{name}: the run was stopped. The update under way is finished, and "
        f"{tmp_path / 'run'}/checkpoint-3 is saved: 3 of 4 updates. Resume with the same command "
        f"and --output_dir {tmp_path / 'run'} --resume_from_checkpoint last (in Python: "
        "trainer.train(resume_from_checkpoint=True))."
    )
    assert f"{name}: finishing the update under way" in capfd.readouterr().err
    assert [signal.getsignal(n) for n in stop_rules.SIGNALS] == handlers
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    run_recipe(recipe, words, quiet=True)
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_what_is_printed_when_the_terminal_has_gone_stops_nothing(capfd):
    """Writing to it fails: the run ended before it was saved."""
    before, (read_end, write_end) = os.dup(1), os.pipe()
    os.dup2(write_end, 1)
    try:
        stop_rules._leave_terminal()
        os.close(read_end)
        os.write(1, b"lost")
        os.write(2, b"kept")
    finally:
        os.dup2(before, 1)
        os.close(before)
        os.close(write_end)
    assert capfd.readouterr() == ("", "kept")


def test_a_run_under_nohup_goes_on(tmp_path):
    trainer = make(tmp_path, method="opd", max_steps=4)
    trainer.add_callback(Terminate(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with trainer.watch.until_terminated():
            trainer.train()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("later", [False, True])
def test_a_second_ctrl_c_ends_at_once_where_no_launcher_passed_on_the_first(
    tmp_path, monkeypatch, later
):
    """The checkpoint was lost where a batch system signals ranks and their launcher."""
    if later:
        monkeypatch.setattr(stop_rules, "PASSED_ON", 0.0)
    trainer = make(tmp_path, method="opd", max_steps=4)
    trainer.add_callback(Terminate(signal.SIGINT, times=2))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        ends = KeyboardInterrupt if later else StoppedError
        with pytest.raises(ends), trainer.watch.until_terminated():
            trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "checkpoint-3").exists() is not later
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("killed", [True, False])
def test_last_begins_a_run_that_has_no_checkpoint_yet(tmp_path, killed):
    """Its data may be in the same folder."""
    recipe = write_pair(tmp_path, max_steps=2, per_device_train_batch_size=2, method="opd")
    run = tmp_path / "run"
    run.mkdir()
    data = (tmp_path / "prompts.jsonl").rename(run / "train.jsonl")
    if killed:
        (run / "run.json").write_text('{"recipe": {}, "config": {}}')
        (run / "metrics.jsonl").write_text('{"loss": 1.0, "step": 1}\n')
    words = [f"--output_dir={run}", "--resume_from_checkpoint=last", "--max_completion_length=8"]
    run_recipe(recipe, [*words, f"--data.path={data}"], quiet=True)
    assert data.stat().st_size
    assert [log["step"] for log in map(json.loads, lines(run / "metrics.jsonl"))] == [1, 2, 2]


def test_sigterm_ends_the_writing_of_answers_too(tmp_path):
    """Those that are there are kept, and a resume uses them."""
    words = [f"--output_dir={tmp_path / 'run'}", "--answer_batch_size=2", "--max_steps=2"]
    words += ["--max_completion_length=8", "--resume_from_checkpoint=last", "--use_cpu=true"]
    recipe, answer, asked = write_pair(tmp_path), WarmstartTrainer._answer, []

    def terminated(self, *args):
        asked.append(1)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return [[7, 2] for _ in answer(self, *args)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WarmstartTrainer, "_answer", terminated)
        with pytest.raises(StoppedError, match=r"SIGTERM.*answers\.jsonl has 4 answers"):
            run_recipe(recipe, words, quiet=True, warmstart=True)
        assert len(lines(tmp_path / "run" / "answers.jsonl")) == 1 + 4
        run_recipe(recipe, words, quiet=True, warmstart=True)
    assert len(asked) == 4  # of eight prompts, two at a time


def test_a_command_ends_with_the_exit_code_of_its_fault():
    for error, code in ((TOPDError("a"), 2), (StoppedError("b", TERMINATED), 75)):
        with pytest.raises(typer.Exit) as found, terminal.faults():
            raise error
        assert found.value.exit_code == code


def test_a_stop_comes_whole_out_of_another_process():
    again = pickle.loads(pickle.dumps(StoppedError("why", DISK)))
    assert (str(again), again.exit_code) == ("why", DISK)


@pytest.mark.parametrize("kind", ["ended", "probe", "compare"])
def test_last_never_empties_the_folder_of_another_run(tmp_path, kind):
    recipe, run = write_pair(tmp_path, method="opd"), tmp_path / "run"
    (run / "student").mkdir(parents=True)
    (run / "positions.jsonl").write_text("{}\n")
    if kind == "ended":
        (run / "student" / "README.md").touch()
    else:
        found = {"command": "probe"} if kind == "probe" else {"compare": {"arms": {}}}
        (run / "run.json").write_text(json.dumps(found))
    with pytest.raises(TOPDError, match=r"holds a(nother command's run| run .*no checkpoint)"):
        run_recipe(recipe, [f"--output_dir={run}", "--resume_from_checkpoint=last"])
    assert (run / "positions.jsonl").exists()


# Trackers


def test_every_figure_of_the_log_reaches_the_trackers(tmp_path):
    class Tracker(TrainerCallback):
        seen: list[dict[str, float]] = []  # noqa: RUF012

        def on_log(self, args, state, control, logs=None, **_):
            self.seen.append(dict(logs))

    trainer = make(tmp_path, max_steps=1)
    trainer.add_callback(Tracker())
    trainer.train()
    recorded = json.loads(lines(tmp_path / "metrics.jsonl")[0])
    assert set(recorded) - {"step"} == set(Tracker.seen[0])
    assert {"topd/mean_ot", "reverse_kl", "completions/mean_length"} <= set(Tracker.seen[0])


def test_no_tracker_is_used_unless_named():
    assert TOPDConfig(output_dir="unused").report_to == []


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5])
def test_a_warm_start_that_begins_at_its_teacher_may_leave_it(tmp_path, kd_ratio):
    """Divergence 0 at first and 0.31 to 0.53 nats later is learning from answers, no collapse."""
    args = WarmstartConfig(output_dir=str(tmp_path), use_cpu=True, kd_ratio=kd_ratio)
    (rule,) = rules(args)
    logs = [{rule.figure: 0.0}] * 10
    assert not rule.broken([*logs, *[{rule.figure: 0.53}] * 10], args)
    assert rule.broken([*logs, *[{rule.figure: 1.6}] * 10], args)


# Lines


class Clock:
    """Seconds that a test sets."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("topd.training.progress.time.perf_counter", lambda: self.now)


def test_counts_without_a_terminal_are_lines_now_and_then(monkeypatch):
    clock, file = Clock(monkeypatch), io.StringIO()
    phases = Phases()
    phases.show(Console(file=file, force_terminal=False))
    phases.start(100, "samples")
    for step in range(1, 101):
        clock.now += 1
        phases.step_done(step)
    phases.stop()
    assert file.getvalue().splitlines() == [
        "samples 30/100  30 s",
        "samples 60/100  60 s",
        "samples 90/100  90 s",
        "samples 100/100  100 s",
    ]


def test_no_bar_is_drawn_where_only_colours_are_asked_for(monkeypatch):
    """As a notebook does for its commands, and some CI: every turn of the bar was there to read."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    phases, file = Phases(), io.StringIO()
    phases.show(Console(file=file))
    phases.start(2, "samples")
    with phases.phase("rollouts", 3) as tick:
        tick()
    phases.step_done(2)
    phases.stop()
    assert "samples 2/2" in file.getvalue()
    assert "rollouts" not in file.getvalue()


def test_only_the_warning_about_pinned_memory_is_left_out():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence_others()
        warnings.warn(
            "'pin_memory' argument is set as true but no accelerator is found.", stacklevel=1
        )
        warnings.warn("'pin_memory' will go away", stacklevel=1)
    assert [str(one.message) for one in caught] == ["'pin_memory' will go away"]
