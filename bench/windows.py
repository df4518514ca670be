"""The teacher's windows against ``generate`` from every cut prefix: ``python -m bench.windows``.

Greedy, of the candidates of one batch of rollouts. What is counted are the positions that the
teacher's decoder computes, padding included; the scoring forward, whose cache our windows start
from, is needed for the loss anyway and does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import eq
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from bench.measure import RESULTS, Found, Table, environment, finish, paired, spread, summary
from bench.pairs import load, ours
from topd.seeds import sampling_seeds
from topd.types import Ids


class Counter:
    """Positions and forwards of a model while it is watched."""

    positions = forwards = 0

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        self.positions += kwargs["input_ids"].numel()
        self.forwards += 1


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[Counter]:
    """Count the forwards of a model's decoder."""
    counter = Counter()
    hook = model.get_decoder().register_forward_pre_hook(counter, with_kwargs=True)
    try:
        yield counter
    finally:
        hook.remove()


@torch.no_grad()
def generated(model: PreTrainedModel, prefixes: list[Ids], length: int) -> list[Ids]:
    """Greedy continuations of prefixes in one call of ``generate``, padded on the left."""
    width = max(map(len, prefixes))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prefixes])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prefixes])
    written = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=length, do_sample=False, pad_token_id=0
    )
    return [tuple(row) for row in written[:, width:].tolist()]


def main(
    models: Annotated[str, typer.Argument(help="smollm2, tiny, or WIDTHxLAYERS.")] = "smollm2",
    batch: int = 2,
    tokens: int = 512,
    window: int = 50,
    fraction: float = 0.0225,
    runs: int = 6,
    results: Path = RESULTS,
) -> None:
    """Time, positions and forwards of three ways to the same windows."""
    started = environment()
    trainer = ours(
        load(models),
        per_device_train_batch_size=batch,
        max_completion_length=tokens,
        window_length=window,
        candidate_fraction=fraction,
    )
    observer, teacher = trainer.observer, trainer.teacher_model
    seeds = sampling_seeds(0, 0, batch)
    rollouts = observer.roll_out(trainer.train_dataset[:batch], seeds)
    scores = observer.score(rollouts)
    starts = observer.candidates(observer.token_losses(rollouts, scores), window)
    prefixes = [rollouts[b].prompt.teacher + rollouts[b].response[:t] for b, t in starts]
    cases: dict[str, Callable[[], list[Ids]]] = {
        "topd": lambda: [w.tokens for w in observer.look_ahead(scores, starts, seeds, window)],
        "generate, one call": lambda: generated(teacher, prefixes, window),
        "generate, one by one": lambda: [generated(teacher, [p], window)[0] for p in prefixes],
    }
    expected = cases["generate, one by one"]()
    found = summary(paired(cases, runs))
    for name, case in cases.items():
        with counted(teacher) as counter:
            written = case()
        found[name]["positions"], found[name]["forwards"] = counter.positions, counter.forwards
        found[name]["equal"] = sum(map(eq, written, expected))
    settings = {
        "precision": "float32",
        "models": models,
        "batch": batch,
        "tokens": tokens,
        "window": window,
        "windows": len(starts),
        "runs": runs,
    }
    finish("windows", settings, found, started, tables, results)


def tables(found: Found) -> Iterator[Table]:
    """What was measured, as a table."""
    settings, results = found["settings"], found["results"]
    ours = results["topd"]["positions"]
    rows = [
        [
            name,
            f"{x['seconds']:.2f}",
            spread(x["ratio"]),
            f"{x['positions']:,}",
            f"{x['positions'] / ours:.1f}",
            f"{x['forwards']:,}",
            f"{x['equal']}",
        ]
        for name, x in results.items()
    ]
    yield Table(
        f"Windows on {settings['models']}: {settings['windows']} of K = {settings['window']}, "
        f"{settings['batch']} rollouts of {settings['tokens']}",
        ["way", "seconds", "over topd", "positions", "over topd", "forwards", "equal"],
        rows,
        f"Medians of {settings['runs']} paired runs. Equal: windows that have the same tokens as "
        "generate, one by one.",
    )


if __name__ == "__main__":
    typer.run(main)
