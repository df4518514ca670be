"""What fits on one GPU and what an update takes there: ``python -m bench.fits``.

Memory is :mod:`topd.training.footprint`; time is :mod:`bench.cost` with rates fitted to the figures
of ``bench.gpu`` on one card (docs/results/perf-gpu*.json), scaled to other cards by their makers'
bandwidth and bfloat16 products. Writes docs/hardware.md: the tables, and how far the models are
from what was measured.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from peft import LoraConfig, get_peft_model
from scipy.optimize import nnls

from bench import cost, gpu
from bench.gpu_models import GIB, make
from bench.measure import RESULTS, Table
from topd.config import TOPDConfig
from topd.training.footprint import ModelSize, Work, peaks, size_of, with_windows

PAGE = Path("docs/hardware.md")
ROLLOUTS, PROMPT, RESPONSE, WINDOW = 32, 128, 512, 50
PROMPTS = 26  # tokens of a prompt of bench.gpu's steps
WINDOWS = 10  # a rollout
METHODS = {"opd": 0, "topd": WINDOW}  # tokens of a window
FRACTION = TOPDConfig.candidate_fraction  # of tokens that begin a window
META = torch.device("meta")


@dataclass(frozen=True)
class Card:
    """A GPU: GiB that it has, and its maker's FLOP/s (dense bfloat16) and bytes/s."""

    gib: float
    flops: float
    bytes: float


CARDS = {
    "24 GB (RTX 4090)": Card(23.5, 165e12, 1.01e12),
    "48 GB (L40S)": Card(44.5, 362e12, 0.86e12),
    "80 GB (H100)": Card(79.1, 989e12, 3.35e12),
    "141 GB (H200)": Card(139.8, 989e12, 4.8e12),
}


@dataclass(frozen=True)
class Pair:
    """Models; a student with LoRA has its base in bfloat16, else it is trained in float32."""

    student: str
    teacher: str
    lora: bool = False


PAIRS = (
    Pair("SmolLM2-135M", "SmolLM2-1.7B"),
    Pair("Qwen3-0.6B", "Qwen3-1.7B"),
    Pair("Qwen3-0.6B", "Qwen3-4B"),
    Pair("Qwen3-1.7B", "Qwen3-4B"),
    Pair("Qwen3-1.7B", "Qwen3-8B"),
    Pair("Qwen3-4B", "Qwen3-8B"),
    Pair("Qwen3-4B", "Qwen3-14B"),
    Pair("Qwen3-1.7B", "Qwen3-4B", lora=True),
    Pair("Qwen3-4B", "Qwen3-8B", lora=True),
    Pair("Qwen3-8B", "Qwen3-14B", lora=True),
    Pair("Qwen3-8B", "Qwen3-32B", lora=True),
)
# from the fastest: rollouts a micro-batch, and whether activations are recomputed
SETTINGS = ((8, False), (4, False), (8, True), (4, True), (1, True))


@functools.cache
def sizes(name: str, *, trained: bool, lora: bool = False) -> ModelSize:
    """A model's sizes, without its weights."""
    dtype = torch.float32 if trained and not lora else torch.bfloat16
    model: Any = make(name, dtype=dtype, place=META)
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    return size_of(model, trained=trained)


def peak(pair: Pair, method: str, micro: int, recomputed: bool) -> float:
    """GiB at the highest of an update whose windows are written together."""
    work = Work(ROLLOUTS, micro, ROLLOUTS, PROMPT, RESPONSE, METHODS[method], True, recomputed)
    student = sizes(pair.student, trained=True, lora=pair.lora)
    return highest(student, sizes(pair.teacher, trained=False), work)


def highest(student: ModelSize, teacher: ModelSize, work: Work) -> float:
    """GiB at the highest."""
    return max(peaks(student, teacher, with_windows(work, FRACTION)).values()) / GIB


# Time


@dataclass(frozen=True)
class Speed:
    """Rates of writing (windows too), and of reading and learning, on the card measured."""

    write: cost.Rates
    read: cost.Rates
    card: Card

    def on(self, card: Card) -> Speed:
        """Those of another card: bandwidth and products scale, launches do not."""
        flops, bytes_ = card.flops / self.card.flops, card.bytes / self.card.bytes
        scaled = (
            cost.Rates(rates.flops * flops, rates.bytes * bytes_, rates.call)
            for rates in (self.write, self.read)
        )
        return Speed(*scaled, card)


def shape(name: str, byte: int = 2) -> cost.Shape:
    """A shape as the cost model counts it."""
    size = sizes(name, trained=False)
    ends = size.vocab * size.width
    tied = cost.shape_of(make(name, place=META)).tied
    rest = size.weights - ends * (1 if tied else 2)
    return cost.Shape(
        rest, rest, size.layers, size.width, size.queries, size.keys, size.vocab, tied, byte
    )


def fitted(rows: Sequence[cost.Cost], seconds: Sequence[float]) -> cost.Rates:
    """The rates that explain some seconds best, by relative error."""
    matrix = np.array([[c.flops, c.bytes, c.calls] for c in rows]) / np.array(seconds)[:, None]
    scale = np.maximum(matrix.max(axis=0), 1e-30)
    found, _ = nnls(matrix / scale, np.ones(len(rows)))
    flops, bytes_, call = found / scale
    most = float("inf")
    return cost.Rates(1 / flops if flops else most, 1 / bytes_ if bytes_ else most, float(call))


def speed(found: Mapping[str, Any]) -> Speed | None:
    """Fitted to the rollouts and the steps of bench.gpu; None where only one pair was measured."""
    if len({row["pair"] for row in steps(found)}) < 2:
        return None
    name = found["environment"]["cpu"]
    card = CARDS["141 GB (H200)" if "H200" in name else "80 GB (H100)"]
    wrote = [row for row in measured(found, "rollouts") if row["way"] == "ours"]
    writes = [cost.decode(shape(r["model"]), r["rows"], r["tokens"], gpu.PROMPT) for r in wrote]
    seconds = [r["rows"] * r["tokens"] / r["tokens/s"] for r in wrote]
    reads, spent = [], []
    for row in steps(found):
        for phase in ("scoring", "learning"):
            reads.append(update_costs(row)[phase])
            spent.append(row[f"{phase} s"])
    return Speed(fitted(writes, seconds), fitted(reads, spent), card)


def measured(found: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """The rows of a part that have figures."""
    rows = found["results"].get(part, {"rows": []})["rows"]
    return [row for row in rows if "fault" not in row]


def steps(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of ours whose memory is their own."""
    return [row for row in measured(found, "step") if "peak GiB" in row]


def update_costs(row: Mapping[str, Any]) -> dict[str, cost.Cost]:
    """What a measured step computed, by phase."""
    student, teacher = row["pair"].split(" <- ")
    rows, length = map(int, row["rollouts"].split(" x "))
    recomputed = row["activations"] == "recomputed"
    return costs(Pair(student, teacher), rows, PROMPTS, length, recomputed)


def costs(
    pair: Pair, rollouts: int, prompt: int, response: int, recomputed: bool
) -> dict[str, cost.Cost]:
    """The cost of an update by phase."""
    work = cost.Work(rollouts, prompt, prompt, response, WINDOWS, WINDOW, recomputed=recomputed)
    return cost.costs(shape(pair.student), shape(pair.teacher), work)


def seconds_of(parts: Mapping[str, cost.Cost], rates: Speed, method: str) -> float:
    """Seconds of all phases of a method."""
    writing = ("rollouts", "windows")
    return sum(
        part.seconds(rates.write if name in writing else rates.read)
        for name, part in parts.items()
        if METHODS[method] or name != "windows"
    )


# The page


def fitting(pair: Pair, method: str, rates: Speed | None) -> list[str]:
    """A row of the table: for each card the fastest settings that fit, with seconds if known."""
    cells = [pair.student, "LoRA" if pair.lora else "full", pair.teacher]
    shown = (SETTINGS[0], (4, True))
    cells.append(" / ".join(f"{peak(pair, method, *setting):.0f}" for setting in shown))
    for card in CARDS.values():
        cells.append(_cell(pair, method, card, rates and rates.on(card)))
    return cells


def _cell(pair: Pair, method: str, card: Card, rates: Speed | None) -> str:
    for micro, recomputed in SETTINGS:
        if peak(pair, method, micro, recomputed) <= card.gib:
            how = f"{micro}{', recomputed' if recomputed else ''}"
            if rates is None:
                return how
            parts = costs(pair, ROLLOUTS, PROMPT, RESPONSE, recomputed)
            return f"{seconds_of(parts, rates, method):.1f} s ({how})"
    return "no"


def tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """What fits; then predictions beside what was measured."""
    rates = speed(found)
    told = "" if rates is None else " Seconds are scaled to other cards by their makers' figures."
    for method in METHODS:
        yield Table(
            f"An update of {ROLLOUTS} rollouts of {RESPONSE} tokens with method {method}",
            ["student", "trained", "teacher", "GiB", *CARDS],
            [fitting(pair, method, rates) for pair in PAIRS],
            "Predicted. GiB: at the highest, 8 rollouts a micro-batch with activations kept / 4 "
            "with activations recomputed; all are scored together. Cells: rollouts a micro-batch "
            "with the fastest settings that fit. Teachers in bfloat16, students in float32 under "
            f"bf16, with LoRA in bfloat16.{told}",
        )
    if not steps(found):
        return
    columns = ["step", "activations", "GiB predicted", "GiB measured", "s measured"]
    yield Table(
        "Predicted and measured",
        columns + ["s predicted"] * (rates is not None),
        [list(compared(row, rates)) for row in steps(found)],
        "Measured GiB are those of tensors; predictions have 1 GiB for the context on top.",
    )


def compared(row: Mapping[str, Any], rates: Speed | None) -> Iterator[str]:
    """One measured step beside its prediction."""
    size = gpu.Update()
    student, teacher = row["pair"].split(" <- ")
    recomputed = row["activations"] == "recomputed"
    work = Work(
        size.batch,
        size.micro,
        size.batch,
        26,
        size.tokens,
        METHODS[row["trainer"]],
        True,
        recomputed,
    )
    pair = sizes(student, trained=True), sizes(teacher, trained=False)
    yield f"{row['trainer']}, {row['pair']}"
    yield row["activations"]
    yield f"{highest(*pair, work):.1f}"
    yield f"{row['peak GiB']:.1f}"
    yield f"{row['s a step']:.1f}"
    if rates is not None:
        yield f"{seconds_of(update_costs(row), rates, row['trainer']):.1f}"


def everything(results: Path) -> dict[str, Any]:
    """The parts of all files of one card."""
    files = [json.loads(path.read_text()) for path in sorted(results.glob("perf-gpu*.json"))]
    parts = {name: part for found in files for name, part in found["results"].items()}
    return {"environment": files[-1]["environment"], "results": parts}


def main(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write docs/hardware.md."""
    found = everything(results)
    head = (results / "hardware_head.md").read_text(encoding="utf-8").strip()
    page.write_text("\n\n".join([head, *map(str, tables(found))]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
