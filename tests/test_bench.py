"""The benchmarks run at their smallest sizes and find what they should; no time is judged."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

pytest.importorskip("trl", minversion="1.16")
from bench import (
    before,
    cost,
    decode,
    gpu,
    growth,
    loss,
    loss_gpu,
    measure,
    mutants,
    performance,
    step,
    transport,
    windows,
)
from bench.pairs import tiny

SMALL = {
    "decode": (decode, "64x2 --batch 2 --tokens 4 --no-compiled --runs 2"),
    "loss": (loss, "--shapes 97x8 --tokens 40 --growth 40,80 --runs 2"),
    "transport": (transport, "--windows 20 --length 5 --runs 2"),
    "windows": (windows, "64x1 --tokens 24 --window 4 --fraction 0.1 --runs 2"),
    "growth": (
        growth,
        "64x1 --vocab 64 --lengths 8,16 --length 8 --batches 1,2 --windows 2 --fractions 0.3 "
        "--runs 1",
    ),
    "step": (step, "64x1 --batch 2 --tokens 12 --window 3 --fraction 0.2 --runs 2"),
}


def run(name: str, folder: Path) -> dict[str, Any]:
    """A benchmark at its smallest size: what it wrote."""
    module, words = SMALL[name]
    app = typer.Typer()
    app.command()(module.main)
    done = CliRunner().invoke(app, [*words.split(), "--results", str(folder)])
    assert done.exit_code == 0, done.output
    assert "over" in done.output
    (path,) = folder.glob(f"perf-{name}*.json")
    return json.loads(path.read_text())


def page(folder: Path) -> str:
    (folder / "performance_head.md").write_text("# Head\n")
    return performance.page(folder)


def test_loss_compares_three_ways_to_one_gradient(tmp_path):
    found = run("loss", tmp_path)["results"]["shapes"]["97x8"]
    assert list(found) == ["full", "chunked", "TRL"]
    assert 0 < found["chunked"]["gradient_gap"] < 1e-5
    assert 0 < found["TRL"]["gradient_gap"] < 1e-5
    assert "| chunked |" in page(tmp_path)


def test_the_loss_on_a_gpu_is_measured_in_parts_that_give_figures_or_a_reason(monkeypatch):
    """The parts that need neither a GPU nor a compiler; eager errors are bfloat16's."""
    device, parts = torch.device("cpu"), loss_gpu.parts
    quick = [(n, p) for n, p in parts(40, 97, 8, 12, 1, device) if n not in ("compiled", "liger")]
    quick.append(("broken", lambda: {}["figure"]))
    monkeypatch.setattr(loss_gpu, "parts", lambda *_: iter(quick))
    found = list(loss_gpu.measure(device="cpu"))
    assert [x["part"] for x in found] == [n for n, _ in quick]
    (eager,) = (x for x in found if x["part"] == "eager")
    assert eager["ms"] > 0 < eager["over_products"]
    (broken,) = (x for x in found if x["part"] == "broken")
    assert "KeyError" in broken["reason"]
    errors = [x for x in found if x["part"] == "errors" and x.get("way") == "eager"]
    assert [x["kind"] for x in errors] == ["reverse_kl", "forward_kl", "jsd"]
    assert all(0 < x["weight"] < 2**-6 for x in errors)
    text = "\n".join(map(str, gpu.tables({"results": {"loss": {"rows": found}}})))
    assert all(f"| {words}" in text for words in ("bare products", "ours, eager", "broken"))
    late = list(loss_gpu.measure(device="cpu", seconds=-1))
    assert all("left out" in x["reason"] for x in late)


@pytest.mark.parametrize(
    "part",
    [
        before.Part("transport --windows 20 --length 5", ("topd exact",), call=1, runs=2),
        before.Part("growth 64x1 --vocab 64 --lengths 8,16", ("8", "16"), runs=1),
        before.Part("step 64x1 --batch 2 --tokens 12 --arms topd", ("topd",), runs=2),
    ],
)
def test_before_and_now_do_the_same_work_in_turn(part):
    """Two processes of this one tree."""
    found = before.beside(part, {"before": before.HERE, "now": before.HERE})
    assert list(found) == list(part.names)
    for piece in found.values():
        assert all(seconds > 0 for seconds in piece["cpu"].values())
        assert 0 < piece["ratio"]["low"] <= piece["ratio"]["high"]
        assert ("memory" in piece) == part.command.startswith("step")
    result = {"before": "a", "now": "b", "command": part.command, "runs": 2, "pieces": found}
    (table,) = before.tables({"results": {"part": result}})
    assert len(table.rows) == len(part.names)


def test_before_says_what_a_benchmark_said_when_it_failed():
    part = before.Part("transport --no-such-option", ("topd exact",))
    with pytest.raises(SystemExit, match="no-such-option"):
        before.beside(part, {"before": before.HERE, "now": before.HERE})


def test_decode_writes_as_many_tokens_in_every_way(tmp_path):
    found = run("decode", tmp_path)
    assert list(found["results"]) == [
        "ours",
        "ours, weights not packed",
        "ours, bfloat16",
        "ours, bfloat16, not packed",
        "generate",
        "generate, static cache",
    ]
    assert found["settings"]["failed"] == {}
    assert "| ours, bfloat16 " in page(tmp_path)


def test_transport_compares_equal_distances(tmp_path):
    found = run("transport", tmp_path)["results"]
    assert set(found) == {"exact", "cut", "sinkhorn"}
    for way in (*found["exact"].values(), *found["cut"].values()):
        assert way["gap"] < 1e-6
        assert len(way["runs"]) == 2
    assert "loop over SciPy" in page(tmp_path)


def test_windows_are_those_of_generate_and_need_fewer_positions(tmp_path):
    found = run("windows", tmp_path)
    count = found["settings"]["windows"]
    ours, theirs = (found["results"][name] for name in ("topd", "generate, one by one"))
    assert ours["equal"] == count > 0
    assert 0 < ours["positions"] < theirs["positions"]
    assert theirs["forwards"] == 4 * count
    assert "generate, one call" in page(tmp_path)


def test_growth_has_every_phase_at_every_size(tmp_path):
    found = run("growth", tmp_path)["results"]
    assert list(found["length"]) == ["8", "16"]
    assert all(x > 0 for x in found["length"]["16"].values())
    assert "| rollouts " in page(tmp_path)


def test_a_step_of_four_trainers_each_in_its_own_process(tmp_path):
    before = dict(os.environ)
    found = run("step", tmp_path)["results"]
    assert dict(os.environ) == before  # else whoever comes next has no TMPDIR
    assert list(found) == list(step.ARMS["tiny"])
    for figures in found.values():
        assert 0 < figures["phases"]["rollouts"] < figures["seconds"]
        assert 0 < figures["base"] < figures["peak"]
    assert found["topd"]["phases"]["windows"] > 0
    assert found["opd"]["phases"]["windows"] == 0
    assert "| GKDTrainer " in page(tmp_path)


def test_runs_are_paired_and_every_second_one_goes_backwards():
    order: list[str] = []
    cases = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = measure.paired(cases, 3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [len(x) for x in seconds.values()] == [3, 3]


def test_ratio_is_taken_run_by_run():
    ratio = measure.against([1.0, 2.0, 4.0], [2.0, 2.0, 2.0])
    assert ratio == {"median": 1.0, "low": 0.5, "high": 2.0}


def test_peak_memory_counts_what_was_freed_again_and_not_what_was_there():
    size = 64 * measure.MIB
    found = measure.in_fresh_process(_peak_of_one_tensor, size)
    assert size <= found < 1.2 * size


def _peak_of_one_tensor(size: int) -> int:
    before = torch.ones(2 * size, dtype=torch.uint8)
    found = measure.peak_memory(lambda: torch.ones(size, dtype=torch.uint8).max())
    assert len(before) == 2 * size
    return found


def test_mutants_are_counted_and_a_reason_does_not_make_a_survivor_a_kill():
    diff = "--- a\n+++ a\n@@ -1,3 +1,3 @@\n def f():\n-    return 1\n+    return 2\n"
    lines = mutants.changed_lines(diff)
    assert lines == {"was": "return 1", "becomes": "return 2"}
    found = [{"function": "f", "status": "killed"}, {"function": "f", "status": "timeout"}]
    found += [{"function": name, "status": "survived", **lines} for name in "fg"]
    reasons = [
        {"function": "f", "was": "return 1", "becomes": ["return 2", "return 3"], "reason": "so"},
        {"function": "h", "was": "return 1", "becomes": ["return 2"], "reason": "none"},
    ]
    judged = list(mutants.judged(found, reasons))
    assert [mutant.get("reason") for mutant in judged] == [None, None, "so", None]
    counted = mutants.counts(judged)
    assert counted == {
        "mutants": 4,
        "killed": 1,
        "timeout": 1,
        "survived": 2,
        "no tests": 0,
        "other": 0,
        "equivalent": 1,
        "rate": 0.25,
    }
    assert "| `f` | 4 | 1 | 1 | 2 | 0 | 0 | 1 | 25.0% |" in mutants.table({"f": counted})
    assert mutants.unused(found, reasons) == ["return 1"]


def test_the_cost_model_counts_the_flops_of_a_forward():
    model, n = tiny(128, 3, seed=0, vocab=512).requires_grad_(False), 40
    model.set_attn_implementation("eager")  # the counter does not know the CPU's kernel
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(n)[None])
    shape = cost.shape_of(model)
    counted = (
        cost.forward(shape, n, n) + 2 * shape.head * n
    )  # it multiplies what the mask hides too
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert shape.weights == sum(p.numel() for p in model.parameters())


def test_the_rates_that_made_some_seconds_are_found_again():
    rates = cost.Rates(3e10, 8e9, 2e-5)
    work = cost.Work(4, 30, 60, 96, 3, 32)
    parts = cost.costs(cost.STUDENT, cost.TEACHER, work)
    seconds = {name: part.seconds(rates) for name, part in parts.items()}
    found = cost.calibrated(seconds, parts)
    again = {name: part.seconds(found) for name, part in parts.items()}
    assert again == pytest.approx(seconds, rel=1e-3)


# One GPU


def test_every_part_for_a_gpu_gives_its_figures_on_tiny_shapes():
    names = ("rollouts", "windows", "step", "step-first-fork")
    found = {name: list(gpu.PARTS[name].run(True)) for name in names}
    assert [row["way"] for row in found["rollouts"]] == ["ours", "ours, eager", "generate"]
    assert all(row["tokens/s"] > 0 for row in found["rollouts"])
    assert all(row["seconds"] > 0 for row in found["windows"])
    assert [row["trainer"] for row in found["step"]] == ["opd", "topd", "opd"]
    assert [row["trainer"] for row in found["step-first-fork"]] == ["opd", "first_fork"]
    assert all("over opd" in found[name][1] for name in names[2:])
    assert {row["activations"] for row in found["step"]} == {"recomputed", "kept"}
    for row in found["step"]:  # what tells equal steps apart
        each = ("learning s, each", "collector s, each", "cudaMalloc, each")
        assert [len(row[name].split()) for name in each] == [1, 1, 1]
    results = {name: {"rows": rows, "seconds": 1.0} for name, rows in found.items()}
    text = "\n".join(map(str, gpu.tables({"results": results})))
    assert all(f"| {arm} " in text for arm in ("opd", "topd", "first_fork"))


def test_the_collectors_seconds_are_those_of_each_step(monkeypatch):
    clock, now = gpu.Clock(3, dict), iter([1.0, 1.5, 9.0, 9.25])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    clock.on_train_begin()
    for pauses in (1, 0, 1):
        for _ in range(pauses):
            clock.collect("start", {})
            clock.collect("stop", {})
        with suppress(gpu.FinishedError):
            clock.on_step_end()
    assert [step["collector"] for step in clock.found] == [0.5, 0, 0.25]


def test_a_part_that_fails_or_takes_too_long_is_named_with_its_reason(monkeypatch):
    rows, _ = gpu.in_process("rollouts", True, 0.2)
    assert rows == [{"fault": "not done after 0 s"}]

    def broken(tiny: bool):
        yield {"way": "first", "tokens/s": 3}
        raise ValueError("no more")

    monkeypatch.setitem(gpu.PIECES, "rollouts", gpu.Part(broken, 1.0, "broken"))
    done = CliRunner().invoke(_gpu_app(), ["rollouts", "--alone"])
    assert '"tokens/s": 3' in done.output
    assert '{"fault": "ValueError: no more"}' in done.output
    assert "'roll' is not one of" in CliRunner().invoke(_gpu_app(), ["roll"]).output


def _gpu_app() -> typer.Typer:
    app = typer.Typer()
    app.command()(gpu.main)
    return app
