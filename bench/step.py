"""A whole step beside TRL's trainers: ``python -m bench.step tiny|smollm2|testbed``.

Every trainer has a process of its own; one step at a time, in turn, forwards and backwards. A step
is what lies between two ends of a step of transformers' Trainer; the first of each is not counted.
TRL runs with lmbda = 1 and beta = 1: the student's own rollouts, reverse KL. Precision, learning
rate, prompts, batch and rollout length are the same; nobody logs or saves.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer
from transformers import Trainer, TrainerCallback

from bench.measure import (
    MIB,
    RESULTS,
    Found,
    Table,
    environment,
    finish,
    in_fresh_process,
    in_turn,
    reset_peak,
    resident,
    spread,
    summary,
)
from bench.pairs import PHASES, QUIET, load, ours, prompts
from topd.commands.recipe import read_recipe
from topd.commands.train import make_trainer, run_recipe
from topd.config import CHECKPOINTING

TESTBED = Path("recipes/testbed/arithmetic.yaml")
ARMS = {
    "tiny": ("opd", "topd", "DistillationTrainer", "GKDTrainer"),
    "smollm2": ("opd", "topd", "DistillationTrainer", "GKDTrainer"),
    "testbed": ("opd", "topd", "first_fork"),
}
STOP = "stop"


@dataclass(frozen=True)
class Case:
    """One trainer: its arm, on which models, and the size of a step."""

    arm: str
    models: str
    batch: int
    tokens: int
    window: int
    fraction: float
    checkpointing: bool
    bf16: bool


def build(case: Case, student: str) -> tuple[Trainer, Callable[[], dict[str, float]]]:
    """The trainer, and what gives the seconds of its phases since the last call."""
    if case.models == "testbed":
        arm = read_recipe(TESTBED).compare.all_arms()[case.arm]
        args = {**arm, "student": student, "output_dir": tempfile.mkdtemp(), "evaluation": None}
        recipe = read_recipe(TESTBED, {**args, **QUIET, "learning_rate": 3e-4})
        trainer, _ = make_trainer(recipe, recipe.data.load())
        return trainer, trainer.phases.take
    if case.arm not in ("DistillationTrainer", "GKDTrainer"):
        trainer = ours(
            load(case.models),
            method=case.arm,
            per_device_train_batch_size=case.batch,
            max_completion_length=case.tokens,
            window_length=case.window,
            candidate_fraction=case.fraction,
            bf16=case.bf16,
            **{CHECKPOINTING: case.checkpointing},
        )
        return trainer, trainer.phases.take
    trainer = theirs(case)
    return trainer, timed_generation(trainer)


def theirs(case: Case) -> Trainer:
    """TRL's trainer of the same step."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    student, teacher, tokenizer = load(case.models)
    common = {
        "output_dir": tempfile.mkdtemp(),
        "beta": 1.0,
        "temperature": 1.0,
        "bf16": case.bf16,
        CHECKPOINTING: case.checkpointing,
        "per_device_train_batch_size": case.batch,
        **QUIET,
    }
    rows = [{"prompt": prompt} for prompt in prompts(tokenizer)]
    if case.arm == "DistillationTrainer":
        args = DistillationConfig(max_completion_length=case.tokens, **common)
        data = Dataset.from_list(rows)
        return DistillationTrainer(student, teacher, args, data, processing_class=tokenizer)
    answer = [{"role": "assistant", "content": "none"}]  # replaced by the rollout
    data = Dataset.from_list([{"messages": row["prompt"] + answer} for row in rows])
    gkd = GKDConfig(lmbda=1.0, max_new_tokens=case.tokens, **common)
    return GKDTrainer(student, teacher, gkd, train_dataset=data, processing_class=tokenizer)


def timed_generation(trainer: Trainer) -> Callable[[], dict[str, float]]:
    """Time a TRL trainer's calls of ``generate``."""
    spent, generate = [0.0], trainer.model.generate

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        written = generate(*args, **kwargs)
        spent[0] += time.perf_counter() - started
        return written

    def take() -> dict[str, float]:
        seconds, spent[0] = spent[0], 0.0
        return {"rollouts": seconds}

    trainer.model.generate = timed
    return take


class Gate(TrainerCallback):
    """Begins a step when told to, and reports it: seconds, phases, memory."""

    def __init__(self, pipe: Connection, take: Callable[[], dict[str, float]]) -> None:
        self.pipe, self.take = pipe, take

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.base = reset_peak()
        self.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds = time.perf_counter() - self.started
        step = {"seconds": seconds, "phases": self.take()}
        self.pipe.send({**step, "base": self.base, "peak": resident("VmHWM")})
        self.wait()

    def wait(self) -> None:
        if self.pipe.recv() == STOP:
            raise SystemExit
        self.started = time.perf_counter()


def serve(pipe: Connection, case: Case, student: str) -> None:
    """Train in this process, a step for every message."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    trainer, take = build(case, student)
    trainer.add_callback(Gate(pipe, take))
    trainer.train()


def measure(cases: Mapping[str, Case], runs: int, student: str) -> dict[str, list[Found]]:
    """The steps of every case, after a first one each."""
    context = multiprocessing.get_context("spawn")
    steps: dict[str, list[Found]] = {name: [] for name in cases}
    pipes: dict[str, Connection] = {}
    with ExitStack() as stack:
        for name, case in cases.items():
            pipes[name], end = context.Pipe()
            process = context.Process(target=serve, args=(end, case, student), daemon=True)
            process.start()
            end.close()
            stack.callback(process.join)
            stack.callback(pipes[name].send, STOP)
            step_of(pipes[name])
        for run in range(runs):
            for name in in_turn(list(cases), run):
                steps[name].append(step_of(pipes[name]))
    return steps


def step_of(pipe: Connection) -> Found:
    """Let one step run. Raises EOFError where its process has failed."""
    pipe.send("step")
    return pipe.recv()


def warm_student(folder: str) -> str:
    """The testbed's student after stage 1, as the recipe has it."""
    words = [f"--output_dir={folder}/warmstart", "--logging_strategy=no", "--evaluation=null"]
    return str(run_recipe(TESTBED, words, quiet=True, warmstart=True) / "student")


def main(
    models: Annotated[str, typer.Argument(help="tiny, smollm2, testbed, or WIDTHxLAYERS.")],
    arms: Annotated[str, typer.Option(help="Which trainers; none: all.")] = "",
    batch: int = 4,
    tokens: int = 512,
    window: int = 50,
    fraction: float = 0.0225,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations.")] = False,
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16, weights in float32.")] = False,
    runs: int = 6,
    results: Path = RESULTS,
) -> None:
    """Seconds a step, phases and peak memory of ours and TRL's."""
    started = environment()
    names = arms.split(",") if arms else ARMS.get(models, ARMS["tiny"])
    cases = {
        name: Case(name, models, batch, tokens, window, fraction, checkpointing, bf16)
        for name in names
    }
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TMPDIR=folder):
        # every trainer puts its run folder there
        student = in_fresh_process(warm_student, folder) if models == "testbed" else ""
        steps = measure(cases, runs, student)
    found = summary({name: [step["seconds"] for step in own] for name, own in steps.items()})
    for name, own in steps.items():
        found[name]["phases"] = {
            phase: statistics.median(step["phases"].get(phase, 0.0) for step in own)
            for phase in PHASES
        }
        found[name].update({key: own[-1][key] for key in ("base", "peak")})
    precision = "bfloat16 over float32 weights" if bf16 else "float32"
    settings = {"precision": precision, "runs": runs, **asdict(cases[names[0]])}
    name = f"step-{models}{'-checkpointing' * checkpointing}{'-bf16' * bf16}"
    finish(name, settings, found, started, tables, results)


def tables(found: Found) -> Iterator[Table]:
    """What was measured, as tables."""
    settings, results = found["settings"], found["results"]
    grown = {name: x["peak"] - x["base"] for name, x in results.items()}
    first = next(iter(grown.values()))
    size = f"{settings['batch']} rollouts of {settings['tokens']} tokens"
    if settings["models"] == "testbed":
        size = f"{TESTBED} as it stands"
    size += ", activations recomputed" * settings["checkpointing"]
    yield Table(
        f"A step on {settings['models']}: {size}",
        ["trainer", "s a step", "over opd", "peak MiB", "over models", "over opd"],
        [
            [
                name,
                f"{x['seconds']:.2f}",
                spread(x["ratio"]),
                f"{x['peak'] / MIB:,.0f}",
                f"{grown[name] / MIB:,.0f}",
                f"{grown[name] / first:.2f}",
            ]
            for name, x in results.items()
        ],
        f"Medians of {settings['runs']} paired steps. Peak: resident set of the process; over "
        "models: without what it had when training began.",
    )
    yield Table(
        f"Its phases in seconds, {settings['models']}",
        ["trainer", *PHASES, "the rest"],
        [
            [
                name,
                *(f"{x['phases'][phase]:.2f}" for phase in PHASES),
                f"{x['seconds'] - sum(x['phases'].values()):.2f}",
            ]
            for name, x in results.items()
        ],
        "TRL's scoring and learning are in the rest; transport of topd: "
        f"{_share(results, 'transport')} of its step.",
    )


def _share(results: Found, phase: str) -> str:
    if "topd" not in results:
        return "none"
    return f"{100 * results['topd']['phases'][phase] / results['topd']['seconds']:.2f} %"


if __name__ == "__main__":
    typer.run(main)
