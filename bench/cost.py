"""What an update costs, by phase: a model of tokens, FLOPs and bytes, checked against steps here.

``python -m bench.cost`` calibrates three rates of this machine on one step of SmolLM2, predicts
other steps from them, and applies the same counts to the paper's pair on GPUs that are assumed.
Seconds of a phase are FLOPs / rate + bytes / bandwidth + calls of a layer x overhead: nothing is
taken to overlap within a phase, nor do phases. A check counts CPU time of one thread, so that other
work on the machine does not show.
"""

from __future__ import annotations

import pickle
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import torch
import typer
from scipy.optimize import nnls
from transformers import PreTrainedModel

from bench.measure import RESULTS, Found, environment
from bench.pairs import QUIET, bar, load, ours
from topd import TOPDConfig, TOPDTrainer
from topd.inputs.models import ModelSpec, eos_ids
from topd.inputs.rows import DataSpec
from topd.runs.files import write_whole
from topd.runs.folder import rollout_record
from topd.types import Prompt, Rollout

PHASES = ("rollouts", "scoring", "windows", "learning")
BACKWARD = 2  # forwards that a backward costs; one more where activations are recomputed
WINDOW_BYTES = 105  # on the wire, a token of a served window (docs/results/served.json)


@dataclass(frozen=True)
class Shape:
    """A decoder. ``active`` and ``all`` count its weights without embeddings and head.

    ``queries`` and ``keys`` are widths: heads x width of a head; ``tied``: the head is the
    embedding; ``bytes``: of a weight where it computes.
    """

    active: float
    all: float
    layers: int
    width: int
    queries: int
    keys: int
    vocab: int
    tied: bool
    bytes: int

    @property
    def head(self) -> float:
        return self.width * self.vocab

    @property
    def weights(self) -> float:
        return self.all + self.head * (1 if self.tied else 2)

    @property
    def cache(self) -> float:
        """Bytes of keys and values, a token."""
        return 2 * self.layers * self.keys * self.bytes


STUDENT = Shape(3.63e9, 3.63e9, 36, 2560, 4096, 1024, 151_936, True, 2)  # Qwen3-4B-Instruct-2507
TEACHER = Shape(3.0e9, 29.9e9, 48, 2048, 4096, 512, 151_936, False, 2)  # Qwen3-30B-A3B-2507


@dataclass(frozen=True)
class Work:
    """An update of one rank. Lengths are in tokens; ``windows`` are those of one rollout."""

    rollouts: int
    prompt: float
    teacher_prompt: float
    response: float
    windows: float
    window: float
    recomputed: bool = False


@dataclass(frozen=True)
class Cost:
    """FLOPs, bytes read from memory, and calls of a layer, one after the other."""

    flops: float
    bytes: float
    calls: float

    def seconds(self, rates: Rates) -> float:
        return self.flops / rates.flops + self.bytes / rates.bytes + self.calls * rates.call


@dataclass(frozen=True)
class Rates:
    """FLOP/s, bytes/s and seconds that a call of a layer takes whatever it computes."""

    flops: float
    bytes: float
    call: float


def forward(shape: Shape, tokens: float, context: float) -> float:
    """FLOPs of so many tokens that see ``context`` others in the mean; without the head."""
    return tokens * (2 * shape.active + 4 * shape.layers * shape.queries * context)


def decode(shape: Shape, rows: float, steps: float, before: float) -> Cost:
    """``steps`` tokens, one after the other, behind ``before`` tokens in each row."""
    seen = before + steps / 2
    flops = forward(shape, rows * steps, seen) + 2 * shape.head * rows * steps
    weights = min(shape.all, shape.active * rows) + shape.head  # of experts, those in use
    read = steps * (weights * shape.bytes + rows * seen * shape.cache)
    return Cost(flops, read, steps * shape.layers)


def costs(student: Shape, teacher: Shape, work: Work) -> dict[str, Cost]:
    """The cost of every phase of an update."""
    n, t = work.rollouts, work.response
    prefill = forward(student, n * work.prompt, work.prompt / 2)
    rollouts = decode(student, n, t, work.prompt)
    read = n * (work.teacher_prompt + t)
    scoring = forward(teacher, read, (work.teacher_prompt + t) / 2) + 2 * teacher.head * n * t
    learned = n * (work.prompt + t)
    own = forward(student, learned, (work.prompt + t) / 2)
    passes = 1 + BACKWARD + work.recomputed
    heads = 2 * n * t * ((1 + BACKWARD) * student.head + teacher.head)
    size = student.weights * student.bytes
    return {
        "rollouts": replace(rollouts, flops=rollouts.flops + prefill),
        "scoring": Cost(scoring, teacher.weights * teacher.bytes, teacher.layers),
        "windows": decode(teacher, n * work.windows, work.window, work.teacher_prompt + t / 2),
        "learning": Cost(passes * own + heads, passes * size, passes * student.layers),
    }


# Many GPUs


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, and what is assumed of them; rates are sustained ones.

    Some of them train, the others serve the teacher, each replica with ``split`` GPUs.
    """

    trainers: int
    servers: int
    split: int
    train: Rates = Rates(0.4 * 989e12, 0.6 * 3.35e12, 100e-6)  # H100, transformers' eager forward
    serve: Rates = Rates(0.4 * 989e12, 0.6 * 3.35e12, 15e-6)  # vLLM with CUDA graphs
    link: float = 50e9  # bytes a second and GPU between ranks: the slowest link of the ring
    wire: float = 3e9  # bytes a second from the servers to a node of 8 ranks
    slowest: float = 1.3  # longest mean of a rank's rollouts over the mean of all: waiting


def predict(student: Shape, teacher: Shape, work: Work, cluster: Cluster) -> Found:
    """Seconds by phase, bytes and FLOPs of an update with FSDP2 and a served teacher."""
    ranks, replicas = cluster.trainers, cluster.servers / cluster.split
    share = ranks / replicas  # ranks that a replica serves
    own = costs(student, teacher, work)
    served = costs(student, teacher, replace(work, rollouts=work.rollouts * share))
    tp = Rates(
        cluster.serve.flops * cluster.split, cluster.serve.bytes * cluster.split, cluster.serve.call
    )
    moved = traffic(student, teacher, work, ranks)
    around = ("gathered for the engines", "gathered to learn", "gradients")
    seconds = {
        "rollouts": own["rollouts"].seconds(cluster.train),
        "scoring": served["scoring"].seconds(tp)
        + moved["states from the servers"] / (cluster.wire / min(ranks, 8)),
        "windows": served["windows"].seconds(tp) if work.windows else 0.0,
        "learning": own["learning"].seconds(cluster.train),
        "sync": sum(moved[name] for name in around) / cluster.link,
    }
    seconds["waiting"] = (cluster.slowest - 1) * (seconds["rollouts"] + seconds["windows"])
    if not work.windows:
        served.pop("windows")
    flops = {name: own[name].flops * ranks for name in own if name in served}
    return {
        "tokens": {
            "rollouts": ranks * work.rollouts * work.response,
            "windows": ranks * work.rollouts * work.windows * work.window,
        },
        "flops": flops,
        "bytes_a_rank": moved,
        "memory_a_rank": memory(student, work, ranks),
        "memory_a_server": 2 * teacher.weights * teacher.bytes / cluster.split,  # two kinds
        "seconds": seconds,
        "seconds_total": sum(seconds.values()),
    }


def traffic(student: Shape, teacher: Shape, work: Work, ranks: int) -> dict[str, float]:
    """Bytes that a rank sends or receives in an update, by what they are."""
    ring = (ranks - 1) / ranks
    read = work.rollouts * (work.teacher_prompt + work.response)
    return {
        "gathered for the engines": ring * student.weights * 4,
        "gathered to learn": ring * student.weights * 2 * 2,  # forward and backward
        "gradients": ring * student.weights * 2,
        "all gradients, with DDP instead": 2 * ring * student.weights * 4,
        "states from the servers": read * teacher.width * 2,
        "windows from the servers": work.rollouts * work.windows * work.window * WINDOW_BYTES,
        "records to rank 0": work.rollouts * work.response * record_bytes(),
    }


def memory(student: Shape, work: Work, ranks: int, chunk: int = 1024) -> dict[str, float]:
    """Bytes of a rank's memory, by what is in it."""
    read = work.rollouts * (work.prompt + work.response)
    kept = 2 * student.layers if work.recomputed else 34 * student.layers  # bytes x width a token
    return {
        "weights, gradients, AdamW (float32, sharded)": 16 * student.weights / ranks,
        "copy for the engines": student.weights * 2,
        "keys and values of the rollouts": read * student.cache,
        "activations": read * student.width * kept,
        "one tile of the loss": 4 * chunk * student.vocab * 4,
        "teacher's head": student.head * 2,
    }


def record_bytes(length: int = 1000) -> float:
    """Bytes of a rollout's record on its way to rank 0, a response token; without forks."""
    ids = tuple(range(1000, 1000 + length))
    rollout = Rollout(Prompt(0, (), ()), ids, tuple(-1 / i for i in ids), finished=True)
    record = rollout_record(0, 0, rollout, [-1.5 / i for i in ids], "word " * length)
    return len(pickle.dumps(record)) / length


PAPER = Work(2, 400, 400, 4000, 90, 50, recomputed=True)
CLUSTERS = {
    "4 GPUs": (PAPER, Cluster(2, 2, 2)),
    "64 GPUs": (replace(PAPER, rollouts=4), Cluster(48, 16, 2)),
}


def paper() -> Found:
    """The paper's pair on 4 and 64 GPUs, as TOPD and as OPD."""
    found = {}
    for name, (work, cluster) in CLUSTERS.items():
        topd = predict(STUDENT, TEACHER, work, cluster)
        opd = predict(STUDENT, TEACHER, replace(work, windows=0), cluster)
        found[name] = {
            "work": asdict(work),
            "cluster": asdict(cluster),
            "topd": topd,
            "opd_seconds_total": opd["seconds_total"],
            "topd_over_opd": topd["seconds_total"] / opd["seconds_total"],
        }
    return found


# The check


def shape_of(model: PreTrainedModel) -> Shape:
    """The counts of a dense model in memory."""
    config = model.config.get_text_config()
    linear, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = linear.weight is embedding.weight
    ends = {id(p) for module in (linear, embedding) for p in module.parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in ends)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        rest,
        rest,
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads * width,
        config.num_key_value_heads * width,
        config.vocab_size,
        tied,
        model.dtype.itemsize,
    )


def testbed(**changes: Any) -> TOPDTrainer:
    """A trainer of the testbed's arithmetic pair, whose rollouts do not end."""
    specs = [ModelSpec(path=f"testbed://arithmetic/{role}") for role in ("student", "teacher")]
    models, tokenizer = [spec.load_model() for spec in specs], specs[0].load_tokenizer()
    for model in models:
        bar(model, eos_ids(model, tokenizer))
    args = TOPDConfig(output_dir=tempfile.mkdtemp(), log_rollouts=False, **QUIET, **changes)
    rows = DataSpec(path="testbed://arithmetic", limit=64).load()
    return TOPDTrainer(*models, args, rows, processing_class=tokenizer)


STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2, 2 x 24": ("smollm2", {"batch": 2, "length": 24, "window": 8}),
    "SmolLM2, 4 x 48": ("smollm2", {"batch": 4, "length": 48, "window": 16}),
    "128 wide, 4 x 128": ("tiny", {"batch": 4, "length": 128, "window": 32}),
    "testbed, 32 x 64": ("testbed", {"batch": 32, "length": 64, "window": 24}),
}


def measured(models: str, size: Mapping[str, Any], runs: int) -> tuple[dict[str, float], Any]:
    """Median CPU seconds of every phase, and the costs of what was done in them."""
    options = {
        "method": "topd",
        "per_device_train_batch_size": size["batch"],
        "max_completion_length": size["length"],
        "window_length": size["window"],
        "candidate_fraction": 0.05,
    }
    trainer = testbed(**options) if models == "testbed" else ours(load(models), **options)
    prompts = trainer.train_dataset[: size["batch"]]
    spent: list[dict[str, float]] = []
    with patch("topd.training.progress.time.perf_counter", time.process_time):
        for run in range(runs + 1):
            experience = trainer.observer.observe(prompts, step=run)
            with patch.object(trainer, "_experience", lambda *_, found=experience: found):
                batches, _ = trainer.get_batch_samples(iter([prompts]), 1, trainer.args.device)
            trainer.training_step(trainer.model, batches[0])
            trainer.model.zero_grad()
            spent.append(trainer.phases.take())
    efforts = experience.efforts
    steps = max(effort.forwards for effort in efforts)  # windows decode together, in blocks
    work = Work(
        size["batch"],
        statistics.fmean(len(p.student) for p in prompts),
        statistics.fmean(len(p.teacher) for p in prompts),
        size["length"],
        sum(effort.positions for effort in efforts) / steps / size["batch"],
        steps,
    )
    shapes = shape_of(trainer.model), shape_of(trainer.teacher_model)
    medians = {p: statistics.median(s[p] for s in spent[1:]) for p in PHASES}
    return medians, costs(*shapes, work)


def calibrated(seconds: Mapping[str, float], cost: Mapping[str, Cost]) -> Rates:
    """The rates that fit the phases of one step best, by relative error."""
    names = list(PHASES)
    rows = [[cost[n].flops, cost[n].bytes, cost[n].calls] for n in names]
    matrix = np.array(rows) / np.array([[seconds[n]] for n in names])
    scale = matrix.max(axis=0)
    found, _ = nnls(matrix / scale, np.ones(len(names)))
    inverse = found / scale
    return Rates(
        *(1 / x if x else float("inf") for x in inverse[:2]),
        float(inverse[2]),
    )


def check(runs: int, names: Sequence[str] = tuple(STEPS)) -> Found:
    """Predicted and measured seconds of every step, with the rates of the first."""
    torch.set_num_threads(1)
    found: Found = {}
    rates = None
    for name in names:
        seconds, cost = measured(*STEPS[name], runs)
        rates = rates or calibrated(seconds, cost)
        predicted = {phase: cost[phase].seconds(rates) for phase in PHASES}
        found[name] = {
            "measured": seconds,
            "predicted": predicted,
            "ratio": {phase: predicted[phase] / seconds[phase] for phase in PHASES},
            "ratio_total": sum(predicted.values()) / sum(seconds.values()),
        }
    return {"rates": asdict(rates) if rates else {}, "steps": found}


def main(
    runs: Annotated[int, typer.Option(help="Steps that are timed, after one that is not.")] = 3,
    results: Path = RESULTS,
) -> None:
    """Write docs/results/cost.json, and print what it says."""
    started = environment()
    found = {"environment": started, "check": check(runs), "paper": paper()}
    results.mkdir(parents=True, exist_ok=True)
    write_whole(results / "cost.json", found)
    for name, step in found["check"]["steps"].items():
        parts = ", ".join(f"{p} {r:.2f}" for p, r in step["ratio"].items())
        typer.echo(f"{name}: predicted / measured {step['ratio_total']:.2f} ({parts})")
    for name, case in found["paper"].items():
        parts = ", ".join(f"{p} {s:.1f} s" for p, s in case["topd"]["seconds"].items())
        typer.echo(f"{name}: {case['topd']['seconds_total']:.0f} s an update ({parts})")
        typer.echo(f"  TOPD over OPD {case['topd_over_opd']:.2f}")


if __name__ == "__main__":
    typer.run(main)
