"""The chunked loss against the full path and TRL's: ``python -m bench.loss``.

Forward and backward of the reverse KL with a trained head, float32. Memory is the growth of the
resident set over the inputs, at its highest, in a fresh process; it includes the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from bench.measure import (
    MIB,
    RESULTS,
    Found,
    Table,
    environment,
    finish,
    in_fresh_process,
    paired,
    peak_memory,
    spread,
    summary,
)
from topd.losses import linear_token_divergence, token_divergence

CHUNK = 1024
NAMES = ("full", "chunked", "TRL")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(tokens: int, vocab: int, width: int) -> Inputs:
    """Student hidden states and head, teacher hidden states and head; logits of size 1 or so."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(tokens, width, generator=generator) for _ in range(2)]
    heads = [torch.randn(vocab, width, generator=generator).div_(width**0.5) for _ in range(2)]
    return states[0].requires_grad_(), heads[0].requires_grad_(), states[1], heads[1]


def value(name: str, given: Inputs) -> Tensor:
    """The summed divergence by one of the three ways."""
    if name == "chunked":
        return linear_token_divergence(*given, chunk_tokens=CHUNK).sum()
    hidden, head, teacher_hidden, teacher_head = given
    if name == "full":
        return token_divergence(hidden @ head.T, teacher_hidden @ teacher_head.T).sum()
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(hidden))
    states = hidden[None], teacher_hidden[None]
    return _chunked_divergence_loss(*states, head, teacher_head, mask, 1.0, 1)[0]


def step(name: str, given: Inputs) -> None:
    """Value and gradients, which are then dropped."""
    value(name, given).backward()
    given[0].grad = given[1].grad = None


def memory(name: str, tokens: int, vocab: int, width: int) -> int:
    """Bytes over the inputs of one forward and backward. To be called in a fresh process."""
    step(name, inputs(4, 64, 8))  # so that what is loaded on first use does not count
    return peak_memory(partial(step, name, inputs(tokens, vocab, width)))


def gap(name: str, given: Inputs) -> float:
    """Largest difference from the full path in the head's gradient, relative to its largest."""
    found = []
    for way in (name, "full"):
        value(way, given).backward()
        found.append(given[1].grad)
        given[0].grad = given[1].grad = None
    return float((found[0] - found[1]).abs().max() / found[1].abs().max())


def sizes(text: str) -> tuple[int, int]:
    """151936x1024 as (vocab, width)."""
    vocab, width = text.split("x")
    return int(vocab), int(width)


def main(
    shapes: Annotated[str, typer.Option(help="V x D of every table.")] = "151936x1024,49152x576",
    tokens: int = 2048,
    growth: Annotated[str, typer.Option(help="Tokens at the last shape.")] = "2048,4096,8192",
    runs: int = 6,
    results: Path = RESULTS,
) -> None:
    """Time and memory at each shape, then memory against tokens at the last one."""
    started, found = environment(), {}
    for shape in shapes.split(","):
        given = inputs(tokens, *sizes(shape))
        cases: dict[str, Callable[[], None]] = {n: partial(step, n, given) for n in NAMES}
        few = inputs(min(tokens, 256), *sizes(shape))
        gaps = {name: gap(name, few) for name in NAMES[1:]}
        found[shape] = summary(paired(cases, runs))
        del few, given, cases
        for name in NAMES:
            figures = found[shape][name]
            figures["bytes"] = in_fresh_process(memory, name, tokens, *sizes(shape))
            figures["gradient_gap"] = gaps.get(name)
    grown = {
        tokens: in_fresh_process(memory, "chunked", int(tokens), *sizes(shape))
        for tokens in growth.split(",")
    }
    settings = {"precision": "float32", "tokens": tokens, "chunk_tokens": CHUNK, "runs": runs}
    finish("loss", settings, {"shapes": found, "growth": grown}, started, tables, results)


def tables(found: Found) -> Iterator[Table]:
    """What was measured, as tables."""
    settings = found["settings"]
    for shape, figures in found["results"]["shapes"].items():
        vocab, width = sizes(shape)
        rows = [
            [
                name,
                f"{x['seconds']:.2f}",
                spread(x["ratio"]),
                f"{x['bytes'] / MIB:,.0f}",
                "" if x["gradient_gap"] is None else f"{x['gradient_gap']:.0e}",
            ]
            for name, x in figures.items()
        ]
        yield Table(
            f"Loss: {settings['tokens']:,} tokens, V = {vocab:,}, D = {width}",
            ["path", "seconds", "over full", "MiB over inputs", "gradient gap"],
            rows,
            f"Medians of {settings['runs']} paired runs. MiB include the head's gradient, "
            f"{4 * vocab * width / MIB:,.0f}.",
        )
    rows = [[f"{int(t):,}", f"{x / MIB:,.0f}"] for t, x in found["results"]["growth"].items()]
    yield Table(
        f"Memory of the chunked loss, V = {vocab:,}, chunks of {settings['chunk_tokens']:,} tokens",
        ["tokens", "MiB over inputs"],
        rows,
    )


if __name__ == "__main__":
    typer.run(main)
