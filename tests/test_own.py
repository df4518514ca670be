"""Methods and detectors from outside, as the how-to page has them; the settings of a method."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from conftest import USE_CPU, write_pair
from topd import TOPDConfig
from topd.cli import app
from topd.commands.audit import Trust, audit_run
from topd.commands.recipe import read_recipe
from topd.commands.train import run_recipe
from topd.detectors import DETECTORS, detector_named
from topd.errors import TOPDError
from topd.methods import FIRST_FORK, METHODS, method_named
from topd.training.warmstart import WarmstartConfig

PAGE = (Path(__file__).parents[1] / "docs/how-to/own-method.md").read_text(encoding="utf-8")
SMALL = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 12,
    "output_dir": "run",
    "save_strategy": "no",
    "use_cpu": USE_CPU,
}


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"run/{name}.jsonl").read_text().splitlines()]


def config(**changes: Any) -> TOPDConfig:
    return TOPDConfig(**{"output_dir": "unused", "use_cpu": USE_CPU, **changes})


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """The page's module in the working directory."""
    monkeypatch.chdir(tmp_path)
    for module in ("my_guides", "raising", "tensors"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    Path("my_guides.py").write_text(block("python"))
    return tmp_path


def test_the_example_of_the_page_trains_and_is_audited(own):
    keys = ("method", "method_options", "candidate_loss")
    changes = {key: yaml.safe_load(block("yaml"))[key] for key in keys}
    path = write_pair(own, **SMALL, window_length=4, **changes)
    done = CliRunner().invoke(app, ["train", str(path)])
    assert done.exit_code == 0, done.output
    assert "method my_guides:quiet_alarms: candidate_fraction 0.2" in done.output
    records = lines("guidance")
    alarms = [(r, f) for r in records for f in r["forks"] if not f["real"]]
    assert alarms
    assert all(r["weights"][str(f["position"])] == pytest.approx(0.1) for r, f in alarms)
    with pytest.raises(TOPDError, match=r"'my_guides:quiet_alarms' is code .*--trust-remote-code"):
        audit_run(Path("run"))
    assert not audit_run(Path("run"), trust=Trust(remote_code=True)).faults


def test_the_example_of_the_page_knows_rollouts_of_several_turns(own):
    with open("my_guides.py", "a") as file:
        file.write("def reply(row, turns):\n    return None if turns[1:] else 'so the sum is'\n")
    keys = ("method", "method_options", "candidate_loss")
    changes = {key: yaml.safe_load(block("yaml"))[key] for key in keys}
    data = {"path": str(own / "prompts.jsonl"), "chat": False}
    turns = {"environment": "my_guides:reply", "max_turns": 2, "max_completion_length": 40}
    path = write_pair(own, **{**SMALL, **turns, **changes}, data=data, window_length=4)
    run_recipe(path, quiet=True)
    assert any(rollout.get("replies") for rollout in lines("rollouts"))


WRONG = """
from topd.types import Branch, Guidance, SoftTarget

def few(evidence):
    return [Guidance((1.0,)) for _ in evidence.rollouts]

def other(evidence):
    return [Guidance((1.0,) * len(r.response), advantages=(0.5,)) for r in evidence.rollouts]

def one(evidence):
    return Guidance(()),

def beyond(evidence):
    rows = [r.response for r in evidence.rollouts]
    return [Guidance((1.0,) * len(r), (SoftTarget(len(r), (3,), (1.0,)),)) for r in rows]

def targets(evidence, token=3, mass=(1.0,)):
    rows = [r.response for r in evidence.rollouts]
    return [Guidance((1.0,) * len(r), (SoftTarget(0, (token,), mass),)) for r in rows]

def strange(evidence):
    return targets(evidence, 10**6)

def negative(evidence):
    return targets(evidence, -1)

def uneven(evidence):
    return targets(evidence, mass=(0.5, 0.5))

def branched(evidence, tokens=(10**6, 3), loss="forward_kl"):
    rows = [r.response for r in evidence.rollouts]
    return [Guidance((1.0,) * len(r), branches=(Branch(0, tokens, loss),)) for r in rows]

def doubled(evidence):
    return targets(evidence, mass=(2.0,))

def halved(evidence):
    return targets(evidence, mass=(0.5,))

def empty(evidence):
    return [
        Guidance((1.0,) * len(r.response), (SoftTarget(0, (), ()),)) for r in evidence.rollouts
    ]

def unlikely(evidence):
    return two(evidence, (1.5, -0.5))

def unknown(evidence):
    return two(evidence, (0.5, float("nan")))

def two(evidence, mass):
    target = SoftTarget(0, (3, 4), mass)
    return [Guidance((1.0,) * len(r.response), (target,)) for r in evidence.rollouts]

def before(evidence):
    return [Guidance((1.0,) * len(r.response), capped=(-1,)) for r in evidence.rollouts]

def endless(evidence):
    return [Guidance((float("inf"),) * len(r.response)) for r in evidence.rollouts]

def unsure(evidence):
    rows = [len(r.response) for r in evidence.rollouts]
    return [Guidance((1.0,) * n, advantages=(float("nan"),) * n) for n in rows]

def worded(evidence):
    return [Guidance(("much",) * len(r.response)) for r in evidence.rollouts]

def parted(evidence):
    return branched(evidence, (3.7,))

def bare(evidence):
    return [Guidance((1.0,) * len(r.response), ((0, (3,), (1.0,)),)) for r in evidence.rollouts]

def kl(evidence):
    rows, branch = [r.response for r in evidence.rollouts], Branch(0, (3,), "kl")
    return [Guidance((1.0,) * len(r), branches=(branch,)) for r in rows]

def turned(tokens):
    return tokens.student.T

def unknown_first(tokens):
    score = tokens.student.clone()
    score[:, 0] = float("nan")
    return score
"""
RAISING = """
import torch
from topd.methods import opd

def third(evidence, *, updates=2):
    seen.append(1)
    return look_up({}) if len(seen) > updates else opd(evidence)

def look_up(table):
    return table["key"]

@torch.no_grad()
def score(tokens):
    return 1 / 0

def reply(row):
    return None

def hungry(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

seen, known = [], {}.get
"""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "wrong:few"}, r"^method: gave 1 weights and 0 advantages to a rollout of \d+ "),
        ({"method": "wrong:other"}, r"^method: gave \d+ weights and 1 advantages to a rollout of"),
        ({"method": "wrong:one"}, r"^method: must return 4 Guidance here, .* returned \(Guidance"),
        (
            {"method": "wrong:beyond"},
            r"^method: has a target, .* at \d+ of a rollout of \d+ tokens",
        ),
        ({"method": "wrong:strange"}, r"^method: has the tokens 1000000 to .* may have 0 to "),
        ({"method": "wrong:negative"}, r"^method: has the tokens -1 to -1 in targets or branches"),
        ({"method": "wrong:branched"}, r"^method: has the tokens 3 to 1000000 in targets"),
        ({"method": "wrong:uneven"}, r"^method: has a target with other numbers of tokens and "),
        *(
            ({"method": f"wrong:{name}"}, rf"^method: has a target at 0 .* or sum to {total}, not")
            for name, total in (
                *(("doubled", "2"), ("halved", "0.5"), ("empty", "0"), ("unlikely", "1")),
                ("unknown", "nan"),
            )
        ),
        ({"method": "wrong:before"}, r"^method: has a target, .* at -1 of a rollout of \d+ tokens"),
        (
            {"method": "wrong:endless"},
            r"^method: gave a token the weight or advantage inf\. Give a",
        ),
        ({"method": "wrong:unsure"}, r"^method: gave a token the weight or advantage nan\. Give a"),
        *(
            ({"method": f"wrong:{name}"}, rf"^method: a Guidance has numbers, whole .*{of}")
            for name, of in (("worded", "'much'"), ("parted", "'float'"), ("bare", "'tuple'"))
        ),
        (
            {"method": "wrong:kl"},
            r"^method: has a branch by 'kl'. Choose one of cross_entropy, forward_kl, reverse_kl.$",
        ),
        (
            {"method": "topd", "candidate_loss": "wrong:unknown_first", "window_length": 4},
            r"^candidate_loss: gave NaN to a token\. Give each token a number\.$",
        ),
        (
            {"method": "window_sft", "candidate_loss": "wrong:turned", "window_length": 4},
            r"^candidate_loss: must return a tensor \[B T\], here \(4, 12\), .* returned \(12, 4\)",
        ),
    ],
)
def test_what_does_not_fit_the_rollouts_is_refused(own, changes, said):
    Path("wrong.py").write_text(WRONG)
    path = write_pair(own, **SMALL, **changes)
    with pytest.raises(TOPDError, match=said):
        run_recipe(path, quiet=True)


TENSORS = """
import torch
from topd.methods import Method, opd
from topd.types import Branch, Guidance, SoftTarget

def listed(evidence, kind=list):
    target = SoftTarget(0, kind([3, 4]), kind([0.5, 0.5]))
    return [
        Guidance(kind([0.5] * len(r.response)), [target], kind([1]), [Branch(1, kind([3]), loss)])
        for r, loss in zip(evidence.rollouts, ("cross_entropy", "forward_kl") * 2)
    ]

def tensors(evidence):
    return listed(evidence, torch.tensor)

def blanked(evidence):
    evidence.windows.start.zero_()
    evidence.transport.distance.zero_()
    evidence.real.fill_(True)
    return opd(evidence)

blank, seen = Method(blanked, looks_ahead=True), Method(opd, looks_ahead=True)
"""


def recorded(own, method):
    shutil.rmtree("run", ignore_errors=True)
    run_recipe(write_pair(own, **SMALL, window_length=4, method=method), quiet=True)
    return lines("guidance")


def test_tensors_and_lists_of_a_method_are_its_numbers(own):
    Path("tensors.py").write_text(TENSORS)
    assert recorded(own, "tensors:tensors") == recorded(own, "tensors:listed")
    assert not audit_run(Path("run"), trust=Trust(remote_code=True)).faults


def test_a_method_that_changes_its_evidence_changes_no_record_of_it(own):
    Path("tensors.py").write_text(TENSORS)
    forks = [record["forks"] for record in recorded(own, "tensors:seen")]
    assert any(fork["position"] for row in forks for fork in row)
    assert forks == [record["forks"] for record in recorded(own, "tensors:blank")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"method": "raising:third", "method_options": {"updates": 0}},
            r"^method: raising:third raised KeyError: 'key' \(\S+raising.py, line 10\)\. Correct ",
        ),
        (
            {"method": "window_sft", "candidate_loss": "raising:score", "window_length": 4},
            r"^candidate_loss: raising:score raised ZeroDivisionError: .*raising.py, line 14\)",
        ),
        (
            {"environment": "raising:reply", "max_turns": 2, "max_completion_length": 40},
            r"^environment: raising:reply raised TypeError: .* given \(when it was called\)",
        ),
        (
            {"environment": "raising:known", "max_turns": 2, "max_completion_length": 40},
            r"^environment: builtins:get raised TypeError: unhashable .* \(when it was called\)",
        ),
    ],
)
def test_an_exception_of_a_function_from_outside_is_told_as_its_own(own, changes, said):
    Path("raising.py").write_text(RAISING)
    data = {"path": str(own / "prompts.jsonl"), "chat": False}
    with pytest.raises(TOPDError, match=said):
        run_recipe(write_pair(own, **{**SMALL, **changes}, data=data), quiet=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "raising:hungry"},
        {"method": "window_sft", "candidate_loss": "raising:hungry", "window_length": 4},
        {"environment": "raising:hungry", "max_turns": 2, "max_completion_length": 40},
        {"method": "hungry:method"},
    ],
)
def test_a_gpu_without_memory_is_no_fault_of_a_function_from_outside(own, changes):
    Path("raising.py").write_text(RAISING)
    Path("hungry.py").write_text("import raising\nraising.hungry()\n")
    data = {"path": str(own / "prompts.jsonl"), "chat": False}
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\. Tried"):
        run_recipe(write_pair(own, **{**SMALL, **changes}, data=data), quiet=True)


def test_a_run_that_a_function_from_outside_stops_is_saved_and_its_traceback_shown(own):
    Path("raising.py").write_text(RAISING)
    changes = {"method": "raising:third", "save_strategy": "steps", "max_steps": 4}
    path = write_pair(own, **{**SMALL, **changes})
    done = CliRunner().invoke(app, ["train", str(path), "--quiet"])
    assert done.exit_code == 2
    shown = " ".join(done.output.split())
    assert "Correct it there. run/checkpoint-2 is saved: 2 of 4 updates. Resume with" in shown
    assert "line 10, in look_up" in shown
    assert "topd/named.py" not in shown


@pytest.mark.parametrize(
    ("code", "said"), [("1 / 0", "ZeroDivisionError: "), ("raise SystemExit(0)", "SystemExit: 0")]
)
def test_a_module_that_raises_anything_when_it_is_imported_is_refused(own, code, said):
    Path("broken.py").write_text(code)
    with pytest.raises(TOPDError, match=rf"'broken' cannot be imported \({said}"):
        detector_named("broken:score")


def test_plain_functions_become_rows(own):
    assert not method_named("my_guides:silence").looks_ahead
    assert method_named("my_guides:quiet_alarms").looks_ahead
    assert not detector_named("my_guides:doubt").statistics


@pytest.mark.parametrize(
    ("key", "name", "said"),
    [
        ("method", "nowhere:f", "'nowhere' cannot be imported (ModuleNotFoundError"),
        ("method", "my_guides:f", "has no 'f'"),
        ("method", "my_guides:__doc__", "is a NoneType. Name a function, or a Method."),
        ("method", "my_guides:Method", "is a type. Name a function"),
        ("method", "loud", "nor my_module:function"),
        ("candidate_loss", "my_guides:quiet_alarms", "is a Method. Name a function, or a Detector"),
        ("candidate_loss", "broken:f", "'broken' cannot be imported (SyntaxError"),
        ("candidate_loss", "loud", f"is not one of {', '.join(DETECTORS)}"),
    ],
)
def test_what_is_not_there_is_refused(own, key, name, said):
    Path("broken.py").write_text("def f(:\n")
    with pytest.raises(TOPDError, match=rf"^{key}: .*{re.escape(said)}"):
        config(**{key: name})


def test_a_method_that_brings_no_setting_is_refused(own):
    with open("my_guides.py", "a") as file:
        file.write("wrong = Method(silence, settings={'candidate_share': 0.2})\n")
    with pytest.raises(TOPDError, match=r"brings 'candidate_share', which is no setting"):
        config(method="my_guides:wrong")


# The settings that a method brings


def test_a_method_alone_is_the_configuration_that_was_measured():
    args = config(method="first_fork")
    assert {name: getattr(args, name) for name in FIRST_FORK} == FIRST_FORK
    assert config(method="topd").candidate_loss == "sampled"
    assert args.settings_of_method().startswith("method first_fork: candidate_loss surprise, ")


@pytest.mark.parametrize(
    "given", [{"candidate_fraction": 0.0225}, {"candidate_threshold": None}, {"window_length": 7}]
)
def test_what_is_given_comes_first_also_where_it_is_the_default(given):
    args = config(method="first_fork", **given)
    assert {name: getattr(args, name) for name in FIRST_FORK} == {**FIRST_FORK, **given}
    assert f"{next(iter(given))} {next(iter(given.values()))} (given)" in args.settings_of_method()


def test_the_default_is_plain_opd_and_what_would_have_no_effect_is_said():
    assert (config().method, next(iter(METHODS))) == ("opd", "opd")
    assert config().settings_of_method() == "method opd"
    said = config(window_length=7, candidate_loss="surprise").settings_of_method()
    assert said == "method opd (looks nowhere ahead: no effect of window_length)"
    assert "no effect" not in config(method="topd", window_length=7).settings_of_method()


def test_a_recipe_and_the_command_line_give_too(tmp_path):
    path = write_pair(tmp_path, **SMALL, method="first_fork", trajectory_weight=0.1)
    args = read_recipe(path, {"window_length": 9}).args
    assert (args.trajectory_weight, args.window_length, args.candidate_loss) == (0.1, 9, "surprise")


def test_stored_settings_are_read_as_they_were(monkeypatch):
    stored = config(method="first_fork", candidate_fraction=0.1).to_dict()
    changed = METHODS["first_fork"]._replace(settings={"candidate_threshold": 9.0})
    monkeypatch.setitem(METHODS, "first_fork", changed)
    again = TOPDConfig(**{key: stored[key] for key in (*FIRST_FORK, "method", "output_dir")})
    assert (again.candidate_threshold, again.candidate_fraction) == (1.0, 0.1)


def brought_by(args):
    """The settings of first_fork that it has brought, and those of no method."""
    return {name: getattr(args, name) for name in FIRST_FORK}


PLAIN = {name: getattr(TOPDConfig, name) for name in FIRST_FORK}


@pytest.mark.parametrize(
    ("module", "name"), [("transformers", "HfArgumentParser"), ("trl", "TrlParser")]
)
def test_parsers_that_pass_every_field_give_what_differs_from_its_default(module, name, capsys):
    parse = getattr(pytest.importorskip(module), name)
    words = ["--output_dir", "unused", *["--use_cpu"] * USE_CPU]
    own = ["--method", "first_fork", "--window_gap", "3", "--window_length", "7"]
    (args,) = parse(TOPDConfig).parse_args_into_dataclasses([*words, *own])
    assert brought_by(args) == {**FIRST_FORK, "window_length": 7}
    assert (args.window_gap, args.report_to) == (3, [])
    for word, until in (("0.25", 0.25), ("40", 40), ("auto", "auto")):
        more = ["--look_ahead_until", word, "--method_options", "{}", "--beta", "0.5"]
        (args,) = parse(TOPDConfig).parse_args_into_dataclasses([*words, *more])
        assert (args.look_ahead_until, args.method_options, args.beta) == (until, {}, 0.5)
    (args,) = parse(WarmstartConfig).parse_args_into_dataclasses([*words, "--answers", "data"])
    assert (args.answers, args.learning_rate, args.method) == ("data", 2e-5, "opd")
    with pytest.raises(SystemExit):
        parse(TOPDConfig).parse_args(["--help"])
    assert "--look_ahead_until" in capsys.readouterr().out


def test_a_replaced_method_brings_its_settings_and_the_former_ones_go():
    assert brought_by(replace(config(), method="first_fork")) == FIRST_FORK
    args = config(method="first_fork", candidate_threshold=None, learning_rate=1e-5)
    kept = {**FIRST_FORK, "candidate_threshold": None}
    assert brought_by(replace(args, seed=1)) == kept  # given, if the default
    assert brought_by(replace(args, seed=1, window_length=7)) == {**kept, "window_length": 7}
    former = replace(replace(args, seed=1), method="topd")
    assert brought_by(former) == {**PLAIN, "candidate_threshold": None}
    assert (former.learning_rate, former.seed, former.output_dir) == (1e-5, 1, "unused")
    args.window_length = 12  # set afterwards: given too
    assert brought_by(replace(args, method="topd"))["window_length"] == 12


def test_a_share_that_was_worked_out_is_not_given():
    args = config(method="first_fork")
    args.count_updates(10)
    assert args.look_ahead_until == 5
    assert replace(args, max_steps=1000).look_ahead_until == 0.5
    assert replace(args, method="opd").look_ahead_until is None
    given = config(method="first_fork", look_ahead_until=0.3)
    given.count_updates(10)
    assert replace(given, seed=1).look_ahead_until == 3


# Shares


@pytest.mark.parametrize(("share", "lengths", "expected"), [(0.5, [10, 31], 10), (0.5, [2, 3], 4)])
def test_a_window_may_be_a_share_of_the_mean_rollout(share, lengths, expected):
    assert config(window_length=share).window_tokens(lengths) == expected
    assert config(window_length=7).window_tokens(lengths) == 7


@pytest.mark.parametrize(("updates", "expected"), [(150, 75), (1, 1), (80, 40)])
def test_looking_ahead_may_end_at_a_share_of_the_updates(updates, expected):
    args = config(method="topd", look_ahead_until=0.5)
    args.count_updates(updates)
    assert args.look_ahead_until == expected
    assert [args.looks_ahead(step) for step in (0, expected - 1, expected)] == [True, True, False]


@pytest.mark.parametrize("name", ["window_length", "look_ahead_until"])
@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_a_number_is_whole_or_a_share(name, value):
    with pytest.raises(TOPDError, match=f"{name}: .* must be at least 1 and whole, or a share"):
        config(**{name: value})


def test_a_run_by_shares_says_what_it_used_and_is_audited(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = {"method": "first_fork", "candidate_threshold": -9.0, "num_train_epochs": 2.0}
    path = write_pair(tmp_path, **{**SMALL, "max_steps": -1}, **keys)
    run_recipe(path, quiet=True)
    stored = json.loads(Path("run/run.json").read_text())["config"]
    updates = json.loads(Path("run/rollouts.jsonl").read_text().splitlines()[-1])["step"] + 1
    assert stored["look_ahead_until"] == round(updates / 2)
    assert stored["window_length"] == 0.5
    rollouts = lines("rollouts")
    guidance = lines("guidance")
    looked = {row["step"] for row in guidance if row["forks"]}
    assert looked == set(range(updates // 2))
    for step in looked:
        lengths = [len(row["response_ids"]) for row in rollouts if row["step"] == step]
        most = max(4, round(sum(lengths) / len(lengths) / 2))
        forks = [fork for row in guidance if row["step"] == step for fork in row["forks"]]
        assert max(len(fork["teacher_tokens"]) for fork in forks) == most
    assert not audit_run(Path("run"), updates=updates).faults


def test_an_analysis_needs_windows_of_one_length(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_pair(tmp_path, **SMALL, method="first_fork")
    done = CliRunner().invoke(app, ["probe", str(path)])
    assert done.exit_code == 2
    assert "Give a number of tokens, e.g. --window_length 24" in " ".join(done.output.split())
