"""What our own figures on a CPU have become: ``python -m bench.before COMMIT [PART ...]``.

The benchmarks of an older commit and of this checkout do the same piece of work in turn, forwards
and backwards, each in a process of its own tree that stays; a first piece of each does not count.
Seconds are of CPU time, all threads of the process: other work on the same cores changes them less
than the clock's, but it takes idle cores to tell five per cent. Quotients are of paired pieces:
1.05 is five per cent more than it was.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.measure import RESULTS, Found, Table, against, environment, finish, in_turn, spread

HERE = Path(__file__).parents[1]
STOP = "stop"


@dataclass(frozen=True)
class Part:
    """Pieces of work: those of ``names`` that a benchmark compares at its n-th ``call``."""

    command: str
    names: tuple[str, ...]
    call: int = 0
    runs: int = 7


STEP = "step smollm2 --batch"
PARTS = {
    "loss-151936": Part("loss --shapes 151936x1024 --growth 8", ("chunked",), runs=4),
    "loss-49152": Part("loss --shapes 49152x576 --growth 8", ("chunked",)),
    "transport": Part("transport", ("topd exact",), runs=60),
    "transport-cut": Part("transport", ("topd exact",), 1, runs=60),
    "transport-sinkhorn": Part("transport", ("topd sinkhorn",), 2, runs=60),
    "windows": Part("windows", ("topd",)),
    "step-testbed-opd": Part("step testbed --arms opd", ("opd",), runs=60),
    "step-testbed-topd": Part("step testbed --arms topd", ("topd",), runs=60),
    "step-testbed-first_fork": Part("step testbed --arms first_fork", ("first_fork",), runs=60),
    "step-tiny-opd": Part("step tiny --arms opd", ("opd",)),
    "step-tiny-topd": Part("step tiny --arms topd", ("topd",)),
    "step-opd": Part(f"{STEP} 2 --arms opd", ("opd",), runs=4),
    "step-topd": Part(f"{STEP} 2 --arms topd", ("topd",), runs=4),
    "step-opd-bf16": Part(f"{STEP} 4 --bf16 --checkpointing --arms opd", ("opd",), runs=4),
    "step-topd-bf16": Part(f"{STEP} 4 --bf16 --checkpointing --arms topd", ("topd",), runs=4),
    "growth": Part("growth", ("128", "512", "1024", "2048", "4096"), runs=5),
    "growth-batch": Part("growth --lengths 8", ("1", "2", "4", "8"), 1),
    "growth-window": Part("growth --lengths 8 --batches 1", ("25", "50", "100"), 2),
    "growth-fraction": Part(
        "growth --lengths 8 --batches 1 --windows 8", ("0.01", "0.0225", "0.045", "0.09"), 3
    ),
    "decode": Part(
        "decode --tokens 64 --no-compiled",
        ("ours", "ours, weights not packed", "ours, bfloat16", "ours, bfloat16, not packed"),
    ),
}


def work(end: int, command: str, call: int) -> None:
    """Run a benchmark of this process's tree up to its n-th comparison; then do as one is told."""
    import topd

    pipe = Connection(end)
    pipe.send(str(topd.__file__))
    module, *words = command.split()
    bench = importlib.import_module(f"bench.{module}")
    calls = iter(range(call + 1))

    def compared(cases: Mapping[str, Any], runs: int, *student: str) -> Any:
        if next(calls) < call:
            return {name: [1.0] for name in cases}
        if module == "step":
            bench.serve(pipe, next(iter(cases.values())), *student)
        if module == "growth":
            cases = {name: partial(bench.step, trainer) for name, trainer in cases.items()}
        obey(pipe, cases)

    setattr(bench, "measure" if module in ("step", "growth") else "paired", compared)
    app = typer.Typer(add_completion=False)
    app.command()(bench.main)
    app(words)


def obey(pipe: Connection, cases: Mapping[str, Callable[[], object]]) -> None:
    """Do each piece of work that is asked for, and tell its seconds."""
    while (name := pipe.recv()) != STOP:
        started = time.perf_counter()
        cases[name]()
        pipe.send({"seconds": time.perf_counter() - started})
    raise SystemExit


@contextmanager
def worker(tree: Path, part: Part) -> Iterator[Callable[[str], Found]]:
    """A process of a tree that does a piece of work when it is called."""
    paths = os.pathsep.join([str(tree / "src"), str(tree)])
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/said", "w+") as said:
        pipe, end = Pipe()
        words = [str(end.fileno()), part.command, str(part.call)]
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", __file__, "--work", *words],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": paths, "TMPDIR": folder},
            stdout=said,
            stderr=said,
            pass_fds=[end.fileno()],
        )
        end.close()
        try:
            if not Path(pipe.recv()).is_relative_to(tree / "src"):
                raise SystemExit(f"{tree}: another topd is imported there")
            yield partial(piece, pipe, process.pid)
            with suppress(OSError):
                pipe.send(STOP)
        except (EOFError, ConnectionError):
            last = Path(said.name).read_text()[-3000:]
            raise SystemExit(f"{tree}, {part.command}:\n{last}") from None
        finally:
            process.terminate()
            process.wait()


def piece(pipe: Connection, process: int, name: str) -> Found:
    """One piece of work: CPU and wall-clock seconds, and the peak where its benchmark tells it."""
    clock = (~process << 3) | 2  # Linux: the CPU time of a process
    started = time.clock_gettime(clock)
    pipe.send(name)
    return {**pipe.recv(), "cpu": time.clock_gettime(clock) - started}


def beside(part: Part, trees: Mapping[str, Path]) -> Found:
    """Each piece of a part in every tree, in turn: seconds, quotients, and quotients of peaks."""
    found: Found = {}
    with worker(trees["before"], part) as before, worker(trees["now"], part) as now:
        ways = {"before": before, "now": now}
        for name in part.names:
            done: dict[str, list[Found]] = {tree: [] for tree in ways}
            for way in ways.values():
                way(name)
            for run in range(part.runs):
                for tree in in_turn(list(ways), run):
                    done[tree].append(ways[tree](name))
            cpu, wall = (
                {tree: [x[unit] for x in own] for tree, own in done.items()}
                for unit in ("cpu", "seconds")
            )
            found[name] = {
                "cpu": {tree: statistics.median(x) for tree, x in cpu.items()},
                "ratio": against(cpu["before"], cpu["now"]),
                "wall_ratio": against(wall["before"], wall["now"]),
            }
            if "peak" in done["now"][-1]:
                grown = {t: own[-1]["peak"] - own[-1]["base"] for t, own in done.items()}
                found[name]["memory"] = grown["now"] / grown["before"]
    return found


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A working tree of a commit, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        git("worktree", "add", "--detach", f"{folder}/tree", commit)
        try:
            yield Path(folder, "tree")
        finally:
            git("worktree", "remove", "--force", f"{folder}/tree")


def git(*words: str) -> str:
    """What git says, in this repository."""
    return subprocess.run(  # noqa: S603
        ["git", *words],  # noqa: S607
        cwd=HERE,
        text=True,
        capture_output=True,
        check=True,
    ).stdout


def main(
    commit: Annotated[str, typer.Argument(help="An older commit of this repository.")],
    parts: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(PARTS)}.")] = None,
    runs: Annotated[int | None, typer.Option(help="Of each piece; none: each part's own.")] = None,
    results: Path = RESULTS,
) -> None:
    """Measure the parts that are named, or all; what is on file of the others is kept."""
    started, path = environment(), results / "perf-before.json"
    found: Found = json.loads(path.read_text())["results"] if path.exists() else {}
    now = git("rev-parse", "--short", "HEAD").strip()
    settings = {"precision": "float32 where not said otherwise"}
    with checkout(commit) as tree:
        for name in parts or PARTS:
            part = PARTS[name] if runs is None else replace(PARTS[name], runs=runs)
            about = {"before": commit, "now": now, "load": round(os.getloadavg()[0], 1)}
            pieces = beside(part, {"before": tree, "now": HERE})
            found[name] = {**about, **asdict(part), "pieces": pieces}
            finish("before", settings, found, started, tables, results)


def tables(found: Found) -> Iterator[Table]:
    """What was measured, as a table."""
    yield Table(
        "CPU seconds before and now",
        ["part", "of", "piece", "before", "now", "quotient", "in wall time", "memory", "pieces"],
        [
            [
                part,
                x["command"],
                name,
                *(f"{seconds:.3g}" for seconds in piece["cpu"].values()),
                spread(piece["ratio"]),
                f"{piece['wall_ratio']['median']:.2f}",
                f"{piece['memory']:.2f}" if "memory" in piece else "",
                str(x["runs"]),
            ]
            for part, x in found["results"].items()
            for name, piece in x["pieces"].items()
        ],
        f"Medians of pieces done in turn. {_commits(found)}. "
        "Memory: the quotient of the peaks over the models.",
    )


def _commits(found: Found) -> str:
    """Of which commits, and of which parts where not all are of the same."""
    pairs: dict[str, list[str]] = defaultdict(list)
    for name, x in found["results"].items():
        pairs[f"{x['before']} before, {x['now']} now"].append(name)
    if len(pairs) == 1:
        return next(iter(pairs))
    return "; ".join(f"{pair}: {', '.join(names)}" for pair, names in pairs.items())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        typer.run(main)
