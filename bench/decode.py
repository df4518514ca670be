"""Ways to write rollouts: weights, precision, cache, compilation. ``python -m bench.decode``.

The same prompts and number of tokens. What the first call of each takes longer than the others,
where compilation happens, is said apart.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from transformers import PreTrainedModel
from transformers.generation import CompileConfig

from bench.measure import RESULTS, Found, Table, environment, finish, paired, spread, summary
from bench.pairs import load, prompts
from topd.engines import packed
from topd.engines.hf import HFEngine
from topd.types import Ids, Sampling


def engine(model: PreTrainedModel, rows: list[Ids], tokens: int) -> Callable[[], int]:
    """Our own rollouts."""
    writer = HFEngine(model, eos_ids=[])
    sampling = Sampling(max_new_tokens=tokens)
    return lambda: sum(len(g.tokens) for g in writer.generate(rows, sampling, range(len(rows))))


def as_they_are(write: Callable[[], int]) -> Callable[[], int]:
    """The same without packed copies of the weights."""

    def written() -> int:
        with patch.object(packed, "LEAST_MODEL", math.inf):
            return write()

    return written


def generate(
    model: PreTrainedModel, rows: list[Ids], tokens: int, **how: object
) -> Callable[[], int]:
    """Those of transformers' ``generate``."""
    ids = torch.tensor(rows)

    def write() -> int:
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=True,
            pad_token_id=0,
            **how,
        )
        return written[:, ids.shape[1] :].numel()

    return write


def compile_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose decoder is compiled, for any length."""
    model = copy.deepcopy(model)
    model.get_decoder().compile(dynamic=True)
    return model


def main(
    models: Annotated[str, typer.Argument(help="smollm2, tiny, or WIDTHxLAYERS.")] = "smollm2",
    batch: int = 2,
    tokens: int = 128,
    compiled: Annotated[bool, typer.Option(help="Also what torch.compile makes of it.")] = True,
    runs: int = 5,
    results: Path = RESULTS,
) -> None:
    """Seconds of one batch of rollouts, way by way."""
    started = environment()
    single, _, tokenizer = load(models)
    half = copy.deepcopy(single).to(torch.bfloat16)
    texts = prompts(tokenizer, batch)
    rows = [tuple(tokenizer.apply_chat_template(x, return_dict=False)) for x in texts]
    rows = [row[: min(map(len, rows))] for row in rows]
    ways = {
        "ours": engine(single, rows, tokens),
        "ours, weights not packed": as_they_are(engine(single, rows, tokens)),
        "ours, bfloat16": engine(half, rows, tokens),
        "ours, bfloat16, not packed": as_they_are(engine(half, rows, tokens)),
        "generate": generate(single, rows, tokens),
        "generate, static cache": generate(
            single, rows, tokens, cache_implementation="static", disable_compile=True
        ),
    }
    if compiled:
        everywhere = CompileConfig(dynamic=False)
        everywhere._compile_all_devices = True
        ways["ours, compiled"] = engine(compile_decoder(single), rows, tokens)
        ways["generate, static cache, compiled"] = generate(
            copy.deepcopy(single),
            rows,
            tokens,
            cache_implementation="static",
            compile_config=everywhere,
        )
    first, failed = {}, {}
    for name, way in list(ways.items()):
        begun = time.perf_counter()
        try:
            written = way()
        except RuntimeError as fault:  # what a compiler cannot do is a finding
            failed[name] = type(fault).__name__
            del ways[name]
            continue
        if written != batch * tokens:
            raise SystemExit(f"{name}: {written} tokens, not {tokens} a row")
        first[name] = time.perf_counter() - begun
    found = summary(paired(ways, runs))
    for name, seconds in first.items():
        found[name]["first"] = seconds
    settings = {
        "precision": "float32 where not said otherwise",
        "models": models,
        "batch": batch,
        "tokens": tokens,
        "runs": runs,
        "failed": failed,
    }
    finish("decode", settings, found, started, tables, results)


def tables(found: Found) -> Iterator[Table]:
    """What was measured, as a table."""
    settings, results = found["settings"], found["results"]
    yield Table(
        f"Rollouts of {settings['models']}: {settings['batch']} of {settings['tokens']} tokens",
        ["way", "seconds", "over ours", "first call"],
        [
            [name, f"{x['seconds']:.2f}", spread(x["ratio"]), f"{x['first']:.1f}"]
            for name, x in results.items()
        ]
        + [[name, fault, "", ""] for name, fault in settings["failed"].items()],
        f"Medians of {settings['runs']} paired runs after two calls that do not count.",
    )


if __name__ == "__main__":
    typer.run(main)
