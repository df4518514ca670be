"""How the cost of a step grows, by phase: ``python -m bench.growth``.

Attention itself is taken out: every token passes on its own value, so that what is left should grow
in proportion to the rollouts' length. Caches are kept as ever. Windows may overlap, so that their
number follows the fraction.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import repeat_kv

from bench.measure import RESULTS, Found, Table, environment, finish, in_turn
from bench.pairs import PHASES, Pair, load, ours
from topd import TOPDTrainer

REST = "the rest"


def own_value(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """In place of attention [B H L D]: each token's own value, [B L H D]."""
    own = repeat_kv(value[:, :, -query.shape[2] :], module.num_key_value_groups)
    return own.transpose(1, 2).contiguous(), None


@contextmanager
def without_attention() -> Iterator[None]:
    """Models that ask for ``sdpa``, so that the engines take their usual way, get none."""
    with patch.dict(AttentionInterface._global_mapping, {"sdpa": own_value}):
        yield


def step(trainer: TOPDTrainer) -> dict[str, float]:
    """Seconds by phase of one experience and one forward and backward, and outside of phases."""
    started = time.perf_counter()
    prompts = trainer.train_dataset[: trainer.args.per_device_train_batch_size]
    batches, _ = trainer.get_batch_samples(iter([prompts]), 1, trainer.args.device)
    trainer.training_step(trainer.model, batches[0])
    trainer.model.zero_grad()
    seconds = trainer.phases.take()
    return {**seconds, REST: time.perf_counter() - started - sum(seconds.values())}


def measure(trainers: dict[str, TOPDTrainer], runs: int) -> Found:
    """Median seconds of every phase, in turn, forwards and backwards."""
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for trainer in trainers.values():
        step(trainer)
    for run in range(runs):
        for name in in_turn(list(trainers), run):
            for phase, spent in step(trainers[name]).items():
                seconds[name][phase].append(spent)
    return {
        name: {phase: statistics.median(seconds[name][phase]) for phase in (*PHASES, REST)}
        for name in trainers
    }


def main(
    models: Annotated[str, typer.Argument(help="WIDTHxLAYERS of the tiny student.")] = "64x2",
    lengths: Annotated[str, typer.Option(help="Of rollouts.")] = "128,512,1024,2048,4096",
    batches: Annotated[str, typer.Option(help="Rollouts.")] = "1,2,4,8",
    windows: Annotated[str, typer.Option(help="K.")] = "25,50,100",
    fractions: Annotated[str, typer.Option(help="Of tokens.")] = "0.01,0.0225,0.045,0.09",
    vocab: int = 8192,
    length: Annotated[int, typer.Option(help="Of rollouts where something else varies.")] = 512,
    runs: int = 5,
    results: Path = RESULTS,
) -> None:
    """Vary one of rollout length, batch, K and fraction at a time."""
    started, pair = environment(), load(models, vocab)
    usual = {"length": length, "batch": 4, "window": 50, "fraction": 0.0225}
    varied = {
        "length": [int(x) for x in lengths.split(",")],
        "batch": [int(x) for x in batches.split(",")],
        "window": [int(x) for x in windows.split(",")],
        "fraction": [float(x) for x in fractions.split(",")],
    }
    found = {}
    for name, values in varied.items():
        settings = {str(value): {**usual, name: value} for value in values}
        with without_attention():
            trainers = {value: trainer_of(pair, x) for value, x in settings.items()}
            found[name] = measure(trainers, runs)
    settings = {
        "precision": "float32",
        "models": models,
        "vocab": vocab,
        "usual": usual,
        "runs": runs,
    }
    finish("growth", settings, found, started, tables, results)


def trainer_of(pair: Pair, size: dict[str, Any]) -> TOPDTrainer:
    """TOPD at a size."""
    return ours(
        pair,
        method="topd",
        max_completion_length=size["length"],
        per_device_train_batch_size=size["batch"],
        window_length=size["window"],
        candidate_fraction=size["fraction"],
        window_gap=1,
        max_logprob_gap=1e9,  # an attention that is none may see another cache
    )


def tables(found: Found) -> Iterator[Table]:
    """What was measured, as tables."""
    settings, results = found["settings"], found["results"]
    usual = ", ".join(f"{name} {value}" for name, value in settings["usual"].items())
    by_length = results["length"]
    lengths = [int(value) for value in by_length]
    first = 512 if 512 in lengths else lengths[0]
    rows = []
    for phase in (*PHASES, REST, "step"):
        cost = {n: _seconds(by_length[str(n)], phase) * 1e6 / n for n in lengths}
        grown = cost[lengths[-1]] / cost[first] if cost[first] else 1.0
        rows.append([phase, *(f"{x:,.0f}" for x in cost.values()), f"{grown:.2f}"])
    yield Table(
        f"Microseconds for each position of {settings['usual']['batch']} rollouts, by their length",
        ["phase", *(f"{n:,}" for n in lengths), f"{lengths[-1]:,} over {first:,}"],
        rows,
        f"Medians of {settings['runs']} runs, student {settings['models']}, V = "
        f"{settings['vocab']:,}, without attention; linear growth is 1.00.",
    )
    for name in ("batch", "window", "fraction"):
        yield Table(
            f"Seconds by {name} (else {usual})",
            [name, *PHASES, REST, "step"],
            [
                [value, *(f"{_seconds(x, phase):.2f}" for phase in (*PHASES, REST, "step"))]
                for value, x in results[name].items()
            ],
        )


def _seconds(by_phase: Found, phase: str) -> float:
    return sum(by_phase.values()) if phase == "step" else by_phase[phase]


if __name__ == "__main__":
    typer.run(main)
