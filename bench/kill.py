"""Kill runs at random moments, resume them, and compare with runs that were not killed.

``python -m bench.kill`` writes docs/results/kill.json. Every attempt is a process of its own,
killed with SIGKILL: one in five while it loads, the others up to 0.2 s after a random share of the
records is there. Each trial is killed up to four times and then left to end. What it leaves must
equal the undisturbed run, byte for byte in weights, and in every record but for times, and the
audit of its ledger must find no fault. This shows
nothing about power cuts: what a killed process has written stays in the page cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
import yaml

from topd.commands.audit import audit_run
from topd.commands.compare import run_compare
from topd.commands.probe import run_probe
from topd.commands.train import run_recipe

Process: TypeAlias = multiprocessing.process.BaseProcess

OUTPUT = Path("docs/results/kill.json")
MOST_KILLS = 4  # a trial
APART = ("seal.json", "ledger.jsonl", "head.json")  # hashes of times; the audit looks at them
VARYING = ("seconds", "runtime", "per_second", "equal time", "resumed")  # parts of keys
BASE: dict[str, Any] = {
    "student": "testbed://programs/student",
    "teacher": "testbed://programs/teacher",
    "data": {"path": "testbed://programs", "limit": 64},
    "max_steps": 6,
    "per_device_train_batch_size": 8,
    "max_completion_length": 32,
    "learning_rate": 1.0e-3,
    "window_length": 12,
    "candidate_fraction": 0.2,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "use_cpu": True,
}
LORA = {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
COMPARE: dict[str, Any] = {
    "max_steps": 3,
    "save_strategy": "no",
    "evaluation": {
        **{"path": "testbed://programs", "limit": 8, "samples": 1, "max_tokens": 24, "every": 3},
    },
    "warmstart": {
        "data": {"path": "testbed://programs", "limit": 32},
        **{"max_steps": 3, "max_completion_length": 48, "save_strategy": "no", "use_cpu": True},
    },
    "compare": {
        "warmstart": True,
        "seeds": [0, 1],
        "arms": {"opd": {"method": "opd"}, "topd": {"method": "topd"}},
    },
}
RUNS: dict[str, dict[str, Any]] = {
    "opd": {"method": "opd", "logging_steps": 2},
    "topd": {"method": "topd"},
    "topd, bf16": {"method": "topd", "bf16": True},
    "topd, LoRA with dropout": {"method": "topd", "lora": LORA, "disable_dropout": False},
    "first_fork": {"method": "first_fork", "gradient_accumulation_steps": 2},
    "compare": COMPARE,
    "probe": {},
}


def main() -> None:
    """Kill, resume, compare, and write what came out."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kills", type=int, default=8, help="Of each kind of run, at least.")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stored = json.loads(options.output.read_text()) if options.output.exists() else {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in options.only:
            rng = random.Random(f"{options.seed} {name}")
            found[name] = series(name, Path(place), rng, options.kills)
            figures = {key: value for key, value in found[name].items() if key != "at"}
            print(f"{name}: {json.dumps(figures)}", flush=True)
            options.output.write_text(json.dumps({**stored, **found}, indent=1) + "\n")
    if any(kind["unequal"] for kind in found.values()):
        sys.exit("a resumed run is not the uninterrupted one")


def series(name: str, place: Path, rng: random.Random, kills: int) -> dict[str, Any]:
    """Trials of one kind of run until it was killed so many times."""
    recipe = place / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**BASE, **RUNS[name]}))
    command = {"compare": compare, "probe": probe}.get(name, train)
    whole = place / f"{name}-whole"
    started(command, recipe, whole).join()
    trials, at, unequal = 0, [], []
    while len(at) < kills:
        folder = place / f"{name}-{trials}"
        at += trial(command, recipe, folder, rng, recorded(whole))
        faults = [*differences(whole, folder), *audited(folder)]
        unequal += [f"trial {trials}: {fault}" for fault in faults]
        shutil.rmtree(folder)
        trials += 1
    return {
        "kills": len(at),
        "trials": trials,
        "before the first record": sum(not k["records"] for k in at),
        "during a checkpoint": sum(k["writing"] for k in at),
        "unequal": unequal,
        "at": at,
    }


def trial(
    command: Callable[[Path, Path], None],
    recipe: Path,
    folder: Path,
    rng: random.Random,
    total: int,
) -> list[dict[str, Any]]:
    """One run, killed and resumed till it ends; the share of ``total`` that each kill found."""
    at: list[dict[str, Any]] = []
    levels = iter(sorted(rng.uniform(0, total) for _ in range(MOST_KILLS)))
    while True:
        process = started(command, recipe, folder)
        level = next(levels, None)
        if level is None:
            process.join()
        elif rng.random() < 0.2:
            process.join(rng.uniform(0, 2))
        else:
            wait(process, folder, level)
            process.join(rng.uniform(0, 0.2))
        if process.exitcode is not None:
            if process.exitcode:
                raise SystemExit(f"{folder}: exit code {process.exitcode}")
            return at
        process.kill()
        process.join()
        writing = any(folder.rglob(".partial"))
        at.append({"records": round(recorded(folder) / total, 3), "writing": writing})


def wait(process: Process, folder: Path, level: float) -> None:
    """Until so many bytes of records are there, or the process has ended."""
    while process.exitcode is None and recorded(folder) < level:
        process.join(0.01)


def recorded(folder: Path) -> int:
    """Bytes of records below a folder."""
    try:
        return sum(path.stat().st_size for path in folder.rglob("*.jsonl"))
    except FileNotFoundError:  # removed meanwhile
        return 0


def started(command: Callable[[Path, Path], None], recipe: Path, folder: Path) -> Process:
    """A process that runs a command. Forked: the imports are paid for once."""
    process = multiprocessing.get_context("fork").Process(
        target=silently, args=(command, recipe, folder)
    )
    process.start()
    return process


def silently(command: Callable[[Path, Path], None], recipe: Path, folder: Path) -> None:
    """Without the log lines of training."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    command(recipe, folder)


def train(recipe: Path, folder: Path) -> None:
    """``topd train`` that continues where it was stopped."""
    words = [f"--output_dir={folder}", "--resume_from_checkpoint=last"]
    run_recipe(recipe, words, quiet=True)


def compare(recipe: Path, folder: Path) -> None:
    """``topd compare``."""
    run_compare(recipe, [f"--output_dir={folder}"])


def probe(recipe: Path, folder: Path) -> None:
    """``topd probe``."""
    words = ["--rollouts=48", "--rollout_batch_size=8", "--bootstrap=50"]
    run_probe(recipe, [f"--output_dir={folder}", *words])


def audited(folder: Path) -> Iterator[str]:
    """What ``topd audit --updates 0`` finds in the runs below a folder."""
    for ledger in sorted(folder.rglob("ledger.jsonl")):
        yield from audit_run(ledger.parent, updates=0).faults


def differences(whole: Path, folder: Path) -> Iterator[str]:
    """What is not the same in two run folders, times apart."""
    for path in sorted(p for p in whole.rglob("*") if p.suffix in (".jsonl", ".json")):
        other = folder / path.relative_to(whole)
        if path.name not in APART and not same(path, other, whole, folder):
            yield f"{path.relative_to(whole)} differs"
    for path in sorted(whole.rglob("*.safetensors")):
        other = folder / path.relative_to(whole)
        if not other.exists() or path.read_bytes() != other.read_bytes():
            yield f"{path.relative_to(whole)} differs"
    for path in sorted(folder.rglob("*")):
        if not (whole / path.relative_to(folder)).exists():
            yield f"{path.relative_to(folder)} is left over"


def same(path: Path, other: Path, whole: Path, folder: Path) -> bool:
    """Whether two record files agree in all but times and the names of their folders."""
    return other.exists() and contents(path, whole) == contents(other, folder)


def contents(path: Path, folder: Path) -> list[Any]:
    """The records of a file, comparable with those of another folder."""
    text = path.read_text().replace(str(folder), "RUN")
    records = [text] if path.suffix == ".json" else text.splitlines()
    return [timeless(json.loads(record)) for record in records]


def timeless(value: Any) -> Any:
    """A record without its times, and without what run.json says of resumes."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not any(part in k for part in VARYING)}
        return {key: timeless(inner) for key, inner in kept.items()}
    return [timeless(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
