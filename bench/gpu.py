"""What one GPU does: ``python -m bench.gpu [PARTS]``, eight minutes at most, without a network.

Each part runs in a process of its own, most important first, and prints a line as soon as a figure
is known: what is over its time limit, or fails, keeps the figures that it had, and its fault is
printed. Models have the shapes of known ones and random weights; the end of a text is barred.
``--tiny`` runs the same code on tiny shapes, on a CPU too: its figures mean nothing.
"""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from transformers import TrainerCallback

from bench import loss_gpu
from bench.gpu_models import (
    SHAPES,
    device,
    forget,
    make,
    peak,
    random_ids,
    restart_peak,
    seconds,
    settle,
)
from bench.measure import RESULTS, Found, Table, describe, environment
from bench.pairs import QUIET, ours, prompts, words
from topd.config import CHECKPOINTING
from topd.engines.hf import HFEngine
from topd.types import Ids, Sampling

MOST = 480.0  # seconds for all parts
ROW = "ROW "
PROMPT = 64  # tokens
FIRST_TOKENS = 16  # of a first step of TRL's
WINDOW = 50
SPACING = 46  # tokens from one window to the next: some 2 % of the tokens are candidates

Row = dict[str, Any]


# Rollouts


@dataclass(frozen=True)
class Writing:
    """A size of rollouts; slow ways write only ``few`` tokens a row."""

    shape: str
    rows: int
    tokens: int
    few: int


ROLLOUTS = (Writing("SmolLM2-135M", 128, 256, 128), Writing("Qwen3-4B", 32, 512, 64))
TINY_ROLLOUTS = (Writing("tiny", 2, 8, 4),)


def rollouts(tiny: bool) -> Iterator[Row]:
    """Ours with and without graphs, and transformers' two ways."""
    for size in TINY_ROLLOUTS if tiny else ROLLOUTS:
        model = make(size.shape)
        texts = random_ids(size.rows, PROMPT, SHAPES[size.shape].vocab)
        ways = {
            "ours": (ours_writes(model, texts), size.tokens),
            "ours, eager": (ours_writes(model, texts, eager=True), size.few),
            "generate": (transformers_writes(model, texts), size.few),
        }
        for name, (write, tokens) in ways.items():
            yield from written(name, size, write, tokens)
        del model, ways, write
        forget()
    if not tiny:
        yield from under_autocast()


def batching(tiny: bool) -> Iterator[Row]:
    """Transformers' continuous batching; it needs a GPU."""
    size = TINY_ROLLOUTS[0] if tiny else ROLLOUTS[0]
    model = make(size.shape)
    texts = random_ids(size.rows, PROMPT, SHAPES[size.shape].vocab)
    if device().type == "cuda":
        yield from written("generate_batch", size, batches_write(model, texts), size.few)


def under_autocast() -> Iterator[Row]:
    """As in training: float32 weights, bfloat16 products."""
    size = Writing("Qwen3-0.6B", 32, 512, 64)
    model = make(size.shape, dtype=torch.float32)
    texts = random_ids(size.rows, PROMPT, SHAPES[size.shape].vocab)
    cast = {"autocast": lambda: torch.autocast(device().type, torch.bfloat16)}
    name = "ours, float32 weights under autocast"
    yield from written(name, size, ours_writes(model, texts, **cast), size.tokens)


def written(name: str, size: Writing, write: Callable[[int], int], tokens: int) -> Iterator[Row]:
    """One row: tokens a second of one way after a short call, or its fault."""
    row = {"way": name, "model": size.shape, "rows": size.rows, "tokens": tokens}
    try:
        forget()
        base = restart_peak()
        first = seconds(lambda: write(min(8, tokens)))
        spent = min(seconds(lambda: expect(write(tokens), size.rows * tokens)) for _ in range(2))
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as fault:
        yield {**row, "fault": short(fault)}
        return
    yield {
        **row,
        "tokens/s": round(size.rows * tokens / spent),
        "ms a token": round(1000 * spent / tokens, 2),
        "first call s": round(first, 1),
        "GiB over the model": round(peak() - base, 2),
    }


def expect(found: int, wanted: int) -> None:
    """Refuse a figure of fewer tokens."""
    if found != wanted:
        raise RuntimeError(f"{found} tokens written, not {wanted}")


def engine(model: Any, *, eager: bool = False, **options: Any) -> HFEngine:
    """Our engine; in graphs where it does so by itself."""
    return HFEngine(model, eos_ids=[], graphs=False if eager else None, **options)


def ours_writes(model: Any, texts: list[Ids], **options: Any) -> Callable[[int], int]:
    """Our rollouts."""
    writer = engine(model, **options)

    def write(tokens: int) -> int:
        found = writer.generate(texts, Sampling(max_new_tokens=tokens), range(len(texts)))
        return sum(len(one.tokens) for one in found)

    return write


def transformers_writes(model: Any, texts: list[Ids]) -> Callable[[int], int]:
    """Those of ``generate``, sampled."""
    ids = torch.tensor(texts, device=model.device)

    def write(tokens: int) -> int:
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )
        return found[:, ids.shape[1] :].numel()

    return write


def batches_write(model: Any, texts: list[Ids]) -> Callable[[int], int]:
    """Those of transformers' continuous batching, sampled."""
    from transformers import GenerationConfig

    def write(tokens: int) -> int:
        config = GenerationConfig(max_new_tokens=tokens, do_sample=True, top_k=0, pad_token_id=0)
        found = model.generate_batch([list(text) for text in texts], generation_config=config)
        return sum(len(one.generated_tokens) for one in found.values())

    return write


# Scoring and windows


def windows(tiny: bool) -> Iterator[Row]:
    """A teacher reads rollouts and continues from the middle of them."""
    name, rows, length = ("tiny", 2, 48) if tiny else ("Qwen3-1.7B", 32, 512)
    model = make(name)
    vocab = SHAPES[name].vocab
    texts, answers = random_ids(rows, PROMPT, vocab), random_ids(rows, length, vocab, seed=1)
    starts = [(b, t) for b in range(rows) for t in range(0, length - 1, SPACING)]
    sampling = Sampling(0.0, max_new_tokens=8 if tiny else WINDOW)
    shared = {"model": name, "rollouts": rows, "tokens": length}
    for way in ("ours", "ours, eager"):
        reader = engine(model, eager="eager" in way)
        reader.score(texts, answers)
        forget()
        base = restart_peak()
        spent = min(seconds(partial(reader.score, texts, answers)) for _ in range(2))
        yield {
            "what": f"scoring, {way}",
            **shared,
            "seconds": round(spent, 3),
            "tokens/s": round(rows * (PROMPT + length) / spent),
            "GiB over the model": round(peak() - base, 2),
        }
        scores = reader.score(texts, answers)
        look = partial(reader.continue_from, scores, starts, sampling, range(len(starts)))
        look()
        yield window_row(f"windows, {way}", shared, len(starts), sampling, seconds(look))
        del scores, reader, look
    few = starts[:: max(1, len(starts) // 64)]
    again = engine(model)
    cut = [texts[b] + answers[b][:t] for b, t in few]
    spent = seconds(lambda: again.generate(cut, sampling, range(len(few))))
    yield window_row("windows, generate from each prefix", shared, len(few), sampling, spent)


def window_row(what: str, shared: Row, count: int, sampling: Sampling, spent: float) -> Row:
    """A figure of windows."""
    tokens = count * sampling.max_new_tokens
    return {
        "what": what,
        **shared,
        "windows": count,
        "seconds": round(spent, 3),
        "tokens/s": round(tokens / spent),
    }


# A whole step


class FinishedError(Exception):
    """Enough steps."""


class Clock(TrainerCallback):
    """Seconds, phases and memory of every step; ends the run after so many.

    Also what makes equal steps differ: seconds of Python's garbage collector, and how often memory
    was taken from the device (a capture has given back what was cached).
    """

    def __init__(self, steps: int, take: Callable[[], dict[str, float]]) -> None:
        self.steps, self.take = steps, take
        self.found: list[Row] = []
        self.collecting = self.collected = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        settle()
        self.base = restart_peak()
        self.start()

    def start(self) -> None:
        self.collected, self.taken = 0.0, takings()
        self.started = time.perf_counter()

    def collect(self, phase: str, _: object) -> None:
        """As one of ``gc.callbacks``."""
        now = time.monotonic()
        if phase == "start":
            self.collecting = now
        else:
            self.collected += now - self.collecting

    def on_step_end(self, *_: Any, **__: Any) -> None:
        settle()
        spent = time.perf_counter() - self.started
        why = {"collector": self.collected, "taken": takings() - self.taken}
        self.found.append({"seconds": spent, "peak": peak(), "phases": self.take(), **why})
        if len(self.found) == self.steps:
            raise FinishedError
        restart_peak()
        self.start()


def takings() -> int:
    """How often memory was taken from the device so far."""
    return int(torch.cuda.memory_stats().get("num_device_alloc", 0))


@dataclass(frozen=True)
class Update:
    """The size of an update: ``batch`` rollouts, ``micro`` of them a forward and backward."""

    student: str = "Qwen3-0.6B"
    teacher: str = "Qwen3-1.7B"
    batch: int = 32
    micro: int = 8
    tokens: int = 512
    window: int = WINDOW
    recomputed: bool = True

    def arguments(self) -> dict[str, Any]:
        """Settings that both libraries know."""
        return {
            **QUIET,
            "use_cpu": device().type == "cpu",
            "bf16": True,
            "per_device_train_batch_size": self.micro,
            "gradient_accumulation_steps": self.batch // self.micro,
            "max_completion_length": self.tokens,
            "temperature": 1.0,
            CHECKPOINTING: self.recomputed,
        }


TINY_UPDATE = Update("tiny", "tiny", 4, 2, 16, 4)
EVERY_SECOND = {"look_ahead_every": 2, "look_ahead_until": None}


def step(tiny: bool) -> Iterator[Row]:
    """A whole step of ours: in turns one of topd and one of opd, of one trainer."""
    yield from in_turns("topd", tiny)
    size = TINY_UPDATE if tiny else Update()
    yield measured("opd", Update(**{**vars(size), "recomputed": False}), 2, our_trainer)


def step_first_fork(tiny: bool) -> Iterator[Row]:
    """The same of first_fork."""
    yield from in_turns("first_fork", tiny)


def in_turns(arm: str, tiny: bool) -> Iterator[Row]:
    """Steps of a method and of opd, and the quotients of neighbours, after a first one of each."""
    size, pairs = (TINY_UPDATE, 1) if tiny else (Update(), 4)
    clock = timed(partial(our_trainer, **EVERY_SECOND), arm, size, 2 + 2 * pairs)
    ahead, plain = clock.found[2::2], clock.found[3::2]
    opd = figures("opd", size, clock, plain)
    del opd["peak GiB"]  # buffers of windows are kept
    yield opd
    quotients = sorted(a["seconds"] / b["seconds"] for a, b in zip(ahead, plain, strict=True))
    over = f"{median(quotients):.2f} [{quotients[0]:.2f}, {quotients[-1]:.2f}]"
    yield {**figures(arm, size, clock, ahead), "over opd": over}


def step_trl(tiny: bool) -> Iterator[Row]:
    """The same step of TRL's DistillationTrainer, whose defaults are lambda 1 and reverse KL."""
    size = TINY_UPDATE if tiny else Update()
    theirs = measured("DistillationTrainer", size, 2, trl_trainer)
    yield theirs
    ours_ = measured("opd", size, 3, our_trainer)
    yield {**ours_, "TRL over it": f"{theirs['s a step'] / ours_['s a step']:.2f}"}


SMALL = Update("SmolLM2-135M", "SmolLM2-135M", 64, 32, 128, recomputed=False)


def small(tiny: bool) -> Iterator[Row]:
    """Updates of a small pair, as in a comparison of methods."""
    yield measured("opd", TINY_UPDATE if tiny else SMALL, 3 if tiny else 8, our_trainer)


def sharing(tiny: bool) -> Iterator[Row]:
    """The same run alone and three at once, as ``compare.jobs`` has them."""
    for count in (1, 2 if tiny else 3):
        with ThreadPoolExecutor(count) as pool:
            runs = [pool.submit(in_process, "small", tiny, 60.0) for _ in range(count)]
        seconds = [run.result()[0][0]["s a step"] for run in runs]
        rate = sum(60 / one for one in seconds)
        yield {"runs at once": count, "s an update": max(seconds), "updates a minute": round(rate)}


def measured(arm: str, size: Update, steps: int, build: Callable[..., Any]) -> Row:
    """The last steps of a run, after a first one."""
    clock = timed(build, arm, size, steps)
    return figures(arm, size, clock, clock.found[1:])


def timed(build: Callable[..., Any], arm: str, size: Update, steps: int) -> Clock:
    """The clock of a run."""
    forget()
    trainer, take = build(arm, size)
    clock = Clock(steps, take)
    trainer.add_callback(clock)
    gc.callbacks.append(clock.collect)
    with contextlib.suppress(FinishedError), patch("time.perf_counter", settled_clock):
        trainer.train()
    gc.callbacks.remove(clock.collect)
    return clock


def figures(arm: str, size: Update, clock: Clock, kept: Sequence[Row]) -> Row:
    """Some steps in a row of a table: medians of few, so the least."""
    best = min(kept, key=lambda one: one["seconds"])
    phases = {f"{name} s": round(spent, 2) for name, spent in best["phases"].items()}
    return {
        "trainer": arm,
        "pair": f"{size.student} <- {size.teacher}",
        "rollouts": f"{size.batch} x {size.tokens}",
        "activations": "recomputed" if size.recomputed else "kept",
        "s a step": round(best["seconds"], 3),
        "first step s": round(clock.found[0]["seconds"], 1),
        "peak GiB": round(max(one["peak"] for one in kept), 2),
        "GiB before": round(clock.base, 2),
        **phases,
        "learning s, each": " ".join(f"{one['phases'].get('learning', 0):.2f}" for one in kept),
        "collector s, each": " ".join(f"{one['collector']:.2f}" for one in kept),
        "cudaMalloc, each": " ".join(str(one["taken"]) for one in kept),
    }


def settled_clock(clock: Callable[[], float] = time.perf_counter) -> float:
    """The clock, once the GPU is done: a phase has its own seconds, not those of the one before."""
    settle()
    return clock()


def pair(size: Update) -> tuple[Any, Any, Any]:
    """Student in float32, teacher in bfloat16, and a tokenizer."""
    student, shape = make(size.student, seed=0, dtype=torch.float32), SHAPES[size.student]
    return student, make(size.teacher, seed=1), words(shape.vocab - shape.padding)


def our_trainer(
    arm: str, size: Update, **changes: Any
) -> tuple[Any, Callable[[], dict[str, float]]]:
    """Ours; nearly flat random models need no limit of the gap in bfloat16."""
    trainer = ours(
        pair(size),
        method=arm,
        window_length=size.window,
        max_logprob_gap=10.0,
        stop_patience=None,
        score_batch_size=size.batch,  # and all windows together
        **changes,
        **size.arguments(),
    )
    return trainer, trainer.phases.take


def trl_trainer(_: str, size: Update) -> tuple[Any, Callable[[], dict[str, float]]]:
    """TRL's, with our batch and precision."""
    from datasets import Dataset
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    from bench.step import timed_generation

    student, teacher, tokenizer = pair(size)
    args = DistillationConfig(output_dir=tempfile.mkdtemp(), beta=1.0, **size.arguments())
    data = Dataset.from_list([{"prompt": prompt} for prompt in prompts(tokenizer)])
    trainer = DistillationTrainer(student, teacher, args, data, processing_class=tokenizer)
    trainer.add_callback(ShortFirst(trainer.generation_config, size.tokens))
    return trainer, timed_generation(trainer)


class ShortFirst(TrainerCallback):
    """The first step, which does not count, writes few tokens: ``generate`` takes half a minute."""

    def __init__(self, config: Any, tokens: int) -> None:
        self.config, self.tokens = config, tokens
        config.max_new_tokens = min(FIRST_TOKENS, tokens)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.config.max_new_tokens = self.tokens


# The loss


def loss(tiny: bool) -> Iterator[Row]:
    """The chunked loss beside the bare matrix products, TRL's kernel and Liger's."""
    sizes = (64, 512, 32, 48) if tiny else (8192, 151_936, 1024, 2560)
    runs, place = (2 if tiny else 7), device()
    yield from loss_gpu.measure(*sizes, runs=runs, seconds=35.0, device=place.type)
    yield trl_loss(sizes, runs)


def trl_loss(sizes: tuple[int, int, int, int], runs: int) -> Row:
    """TRL's loss of the same tokens."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    case = loss_gpu.Case(*sizes, device())
    mask = torch.ones(1, sizes[0], device=device())

    def once() -> None:
        given = case.hidden[None], case.teacher_hidden[None], case.weight, case.teacher_weight
        case.step(lambda: _chunked_divergence_loss(*given, mask, 1.0, sizes[0])[0])

    spent = loss_gpu.Timer(device(), runs)(once)
    return {"part": "TRL", "ms": spent, "peak_gb_over_gradients": loss_gpu.peak_over(case, once)}


# Parts, each in a process


@dataclass(frozen=True)
class Part:
    """A benchmark, and the most seconds that it may take."""

    run: Callable[[bool], Iterator[Row]]
    limit: float
    title: str


PARTS = {
    "rollouts": Part(rollouts, 110, "Rollouts, prompts of 64 tokens, bfloat16"),
    "step-trl": Part(step_trl, 150, "A whole step, TRL's beside ours"),
    "step": Part(step, 110, "A whole step, bfloat16 over float32 weights"),
    "step-first-fork": Part(step_first_fork, 80, "The same, first_fork"),
    "loss": Part(loss, 60, "Reverse KL, forward and backward, 8,192 tokens"),
    "windows": Part(windows, 60, "Scoring, and windows of 50 tokens"),
    "sharing": Part(sharing, 60, "Several runs on one GPU, SmolLM2-135M's shape, 64 x 128 tokens"),
    "batching": Part(batching, 40, "Continuous batching of transformers"),
}
PIECES = {**PARTS, "small": Part(small, 60, "One run of sharing")}


def alone(name: str, tiny: bool) -> None:
    """Run a part here, a line for each figure."""
    try:
        for row in PIECES[name].run(tiny):
            print(ROW + json.dumps(row), flush=True)
    except Exception as fault:  # noqa: BLE001 - the report is where faults are read
        traceback.print_exc()
        print(ROW + json.dumps({"fault": short(fault)}), flush=True)


def short(fault: BaseException) -> str:
    """A fault in a line."""
    return f"{type(fault).__name__}: {fault}".replace("\n", " ")[:300]


def in_process(name: str, tiny: bool, limit: float) -> tuple[list[Row], float]:
    """A part's rows from a process of its own, killed after ``limit`` seconds; and its seconds."""
    command = [sys.executable, "-m", "bench.gpu", name, "--alone", *["--tiny"] * tiny]
    started, rows = time.perf_counter(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        timer = threading.Timer(limit, process.kill)
        timer.start()
        assert process.stdout
        for line in process.stdout:
            if line.startswith(ROW):
                rows.append(json.loads(line.removeprefix(ROW)))
                print(f"{name}: {json.dumps(rows[-1])}", flush=True)
    timer.cancel()
    spent = time.perf_counter() - started
    if process.returncode:
        why = f"not done after {limit:.0f} s" if spent >= limit else f"exit {process.returncode}"
        rows.append({"fault": why})
    return rows, spent


def main(
    parts: Annotated[
        list[str] | None, typer.Argument(help=f"Some of {', '.join(PARTS)}; none: all.")
    ] = None,
    tiny: Annotated[bool, typer.Option(help="Tiny shapes: the code, not the GPU.")] = False,
    alone_: Annotated[bool, typer.Option("--alone", hidden=True)] = False,
    results: Path = RESULTS,
) -> None:
    """Print figures as they come, then tables; write perf-gpu.json."""
    names = parts or list(PARTS)
    unknown = sorted(set(names) - set(PIECES if alone_ else PARTS))
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(PARTS)}")
    if alone_:
        alone(names[0], tiny)
        return
    started, began = here(), time.perf_counter()
    found: Found = {}
    for name in names:
        left = MOST - (time.perf_counter() - began)
        rows, spent = in_process(name, tiny, max(1.0, min(PARTS[name].limit, left)))
        found[name] = {"rows": rows, "seconds": round(spent, 1)}
    command = " ".join(["python -m bench.gpu", *(parts or []), *["--tiny"] * tiny])
    settings = {"precision": "bfloat16", "tiny": tiny}
    report = {"command": command, "environment": started, "settings": settings, "results": found}
    results.mkdir(parents=True, exist_ok=True)
    (results / "perf-gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    print(describe(report), *map(str, tables(report)), sep="\n\n")


def here() -> Found:
    """What the figures depend on, the card first."""
    found = environment()
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["cpu"] = f"{card.name}, {card.total_memory >> 30} GiB; {found['cpu']}"
        found["versions"]["cuda"] = torch.version.cuda
    return found


def tables(found: Found) -> Iterator[Table]:
    """What was measured: a table for each part, with the columns that its rows have."""
    for name, part in found["results"].items():
        rows = part["rows"]
        if not rows:
            continue
        if name == "loss":
            yield from loss_gpu.tables(rows)
            continue
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[cell(row.get(column, "")) for column in columns] for row in rows]
        yield Table(PARTS[name].title, columns, cells, f"This part took {part['seconds']:.0f} s.")


def cell(value: Any) -> str:
    """A figure as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    typer.run(main)
