"""``topd repair``: does a method bring the student back to the teacher's path after a fork?

The local correction experiment of arXiv 2606.00305: prefixes with one real divergent point each; a
few updates on that one prefix, the loss masked to the window; then the student continues greedily
from the same prefix, and its window is compared with the teacher's. Every arm starts from the
same weights with a new optimiser.

::

    RUN/run.json         command, recipe and configuration
        manifest.json    versions, device, seed, fingerprints of models and data
        rollouts.jsonl   the rollout of every sample, as in training
        samples.jsonl    one line a sample and arm: OT distance to the teacher, both windows
        tokens.jsonl     the text of every token that occurs
        metrics.jsonl    one line a sample: seconds
        repair.json      the summary

Arms are in :mod:`topd.commands.arms`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn

from topd.commands.arms import ARMS, Arm, Lesson
from topd.commands.probe_statistics import METRICS, Array, intervals
from topd.commands.session import (
    ROLLOUTS,
    AnalysisConfig,
    Pair,
    batches,
    open_folder,
    open_pair,
    read_analysis,
)
from topd.config import _field
from topd.divergence import real_divergent_points
from topd.errors import TOPDError
from topd.runs.files import read_lines, trim
from topd.runs.folder import RunFolder, rollout_record
from topd.runs.lock import one_writer
from topd.runs.tokens import FILE as TOKENS
from topd.seeds import Stream, sampling_seeds
from topd.training.experience import pair_windows
from topd.training.progress import Phases
from topd.types import Generation, Head, Ids, Prompt, Rollout, Sampling

SAMPLES = "samples.jsonl"
ROLLOUTS_A_SAMPLE = 50  # give up when so many rollouts a sample have been looked at
PAPER = {"before": 0.538, "opd": 0.350, "topd": 0.204}


@dataclass
class RepairConfig(AnalysisConfig):
    """What a repair does: TOPDConfig's rollouts, windows, transport and optimiser, and these."""

    samples: int = _field(200, "Prefixes, each with one real divergent point.")
    updates: int = _field(5, "M, updates of each arm on a prefix.")
    arms: tuple[str, ...] | None = _field(None, "Names of the arms; none: all.")
    arm_position_weight: float = _field(2.0, "eta in the plan of the arm topd_position.")

    def _check(self) -> None:
        super()._check()
        for name in ("samples", "updates"):
            self._at_least_1(name)
        if not 0 <= self.arm_position_weight < math.inf:
            raise TOPDError(
                f"arm_position_weight: {self.arm_position_weight} must be finite and at least 0."
            )
        for name in self.arms or ():
            if name not in ARMS:
                raise TOPDError(f"arms: {name!r} is not one of {', '.join(ARMS)}.")

    @property
    def arm_names(self) -> tuple[str, ...]:
        """The arms to run, in order."""
        return tuple(self.arms or ARMS)


@dataclass(frozen=True)
class Sample:
    """A real divergent point: ``distance`` is the OT by which it was found at ``position``."""

    number: int
    rollout: Rollout
    teacher_logprobs: tuple[float, ...]
    position: int
    distance: float
    lesson: Lesson


def run_repair(path: Path, words: Sequence[str] = (), *, console: Console | None = None) -> Path:
    """Run the experiment for the pair of a recipe and return the run folder.

    Run again in the same folder it continues where it was stopped; the records are then the same as
    if it had not been, bit for bit on a CPU.

    Args:
        path: the recipe. ``lora`` is not used: all weights of the student learn.
        words: ``--key value``, which replace the recipe's.
        console: where to draw bars; None for none.

    Raises:
        TOPDError: bad input, another run in the folder, or too few real divergent points.
    """
    recipe = read_analysis("repair", path, words, RepairConfig)
    with one_writer(Path(recipe.args.output_dir)):
        phases = Phases()
        pair = open_pair(recipe, phases)
        run = open_folder("repair", recipe, pair)
        if console:
            phases.show(console)
        try:
            _repair(recipe.args, pair, run, phases)
        finally:
            phases.stop()
        run.write("repair.json", summarise(run.folder, recipe.args))
    return run.folder


def _repair(args: RepairConfig, pair: Pair, run: RunFolder, phases: Phases) -> None:
    """Treat sample after sample; what is done is on disk."""
    done, first = resume_at(run.folder, args.samples)
    if done == args.samples:
        return
    phases.start(args.samples, "samples")
    weights, texts = snapshot(pair.student), pair.token_writer(run.folder)
    for sample in find_samples(pair, args, first):
        records = list(treat(pair, args, sample, weights))
        run.append(TOKENS, texts.records(_all_ids(sample.rollout, records)))
        run.append(SAMPLES, ({"sample": done, **record} for record in records))
        spent = {f"seconds/{name}": spent for name, spent in phases.take().items()}
        run.append(METRICS, [{"sample": done, **spent}])
        text = pair.tokenizer.decode(list(sample.rollout.response))
        record = rollout_record(0, sample.number, sample.rollout, sample.teacher_logprobs, text)
        run.append(ROLLOUTS, [record])  # last: the sample is done
        done += 1
        phases.step_done(done)
        if done == args.samples:
            return
    raise TOPDError(
        f"repair: only {done} of {args.samples} real divergent points with a whole window in "
        f"{ROLLOUTS_A_SAMPLE * args.samples} rollouts. Lower samples or window_length, or raise "
        "candidate_fraction or max_completion_length."
    )


def _all_ids(rollout: Rollout, records: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[int]]:
    """Every token of a sample: prompts, response, and what was written from the fork on."""
    yield from (rollout.prompt.student, rollout.prompt.teacher, rollout.response)
    for record in records:
        yield from (record["student_tokens"], record.get("teacher_tokens", ()))


def resume_at(folder: Path, samples: int) -> tuple[int, int]:
    """Samples that are done, and the rollout to continue with. What is beyond them is cut off."""
    left = iter(range(samples))
    done = trim(folder / ROLLOUTS, lambda _: next(left, None) is not None)
    trim(folder / SAMPLES, lambda record: record["sample"] < done)
    trim(folder / METRICS, lambda record: record["sample"] < done)
    last = -1
    for record in read_lines(folder / ROLLOUTS) if done else ():
        last = record["rollout"]
    return done, last + 1


def find_samples(pair: Pair, args: RepairConfig, first: int) -> Iterator[Sample]:
    """Real divergent points with a whole window, one a rollout, from rollout ``first`` on.

    A verdict may depend on the batch (``false_alarm_share``), so batches always start at multiples
    of their size.
    """
    size = args.rollout_batch_size
    questions = pair.questions(args.seed, args.num_generations)
    for number, prompts in batches(
        questions, first // size * size, size, ROLLOUTS_A_SAMPLE * args.samples
    ):
        yield from (s for s in samples_of(pair, args, prompts, number) if s.number >= first)


@torch.no_grad()
def samples_of(
    pair: Pair, args: RepairConfig, prompts: Sequence[Prompt], number: int
) -> Iterator[Sample]:
    """The samples in one batch of rollouts, of which the first has the given number."""
    observer, length = pair.observer, args.length
    seeds = sampling_seeds(args.seed, 0, len(prompts), first=number)
    rollouts = observer.roll_out(prompts, seeds)
    scores = observer.score(rollouts, number)
    teacher = scores.logprobs.cpu()
    starts = observer.candidates(observer.token_losses(rollouts, scores), length)
    starts = [
        (b, t) for b, t in starts if rollouts[b].finished or t + length <= len(rollouts[b].response)
    ]
    if not starts:
        return
    written = observer.look_ahead(scores, starts, seeds, length)
    windows = pair_windows(rollouts, starts, written, length)
    found = observer.compare(windows)
    plans = observer.compare(windows, position_weight=args.arm_position_weight).plan
    real = real_divergent_points(
        found.distance, false_alarm_share=args.false_alarm_share, threshold=args.ot_threshold
    )
    for row, k in _one_a_rollout(starts, real.tolist(), args.seed, number):
        rollout, t = rollouts[row], starts[k][1]
        n, m = int(windows.student_mask[k].sum()), int(windows.teacher_mask[k].sum())
        hidden = written[k].hidden
        if hidden is None:  # a served teacher keeps none
            seen = rollout.prompt.teacher + rollout.response[:t]
            hidden = observer.teacher.score([seen], [written[k].tokens]).hidden[0]
        head, temperature = observer.teacher.head, args.loss_temperature
        lesson = Lesson(
            rollout.prompt.student + rollout.response[:t],
            rollout.response[t : t + n],
            written[k].tokens[:m],
            _logprobs(head, scores.hidden[row, t : t + n], temperature),
            _logprobs(head, hidden[:m], temperature),
            found.plan[k, :n, :m],
            plans[k, :n, :m],
            args.trajectory_weight,
        )
        logprobs = tuple(teacher[row, : len(rollout.response)].tolist())
        yield Sample(number + row, rollout, logprobs, t, float(found.distance[k]), lesson)


def treat(
    pair: Pair, args: RepairConfig, sample: Sample, weights: dict[str, Tensor]
) -> Iterator[dict[str, Any]]:
    """One record an arm, the first for the student as it was. Afterwards its weights are back."""
    place = {"rollout": sample.number, "prompt": sample.rollout.prompt.index}
    place["position"] = sample.position
    for name in ("before", *args.arm_names):
        if name != "before":
            with pair.observer.phases.phase(f"arm {name}"):
                correct(pair, args, sample.lesson, ARMS[name])
        distance, tokens = distance_to_teacher(pair, args, sample.lesson)
        restore(pair.student, weights)
        record = {"arm": name, "distance": distance, **place, "student_tokens": tokens}
        if name == "before":
            record["found"] = sample.distance
            record["teacher_tokens"] = sample.lesson.teacher_tokens
        yield record


def correct(pair: Pair, args: RepairConfig, lesson: Lesson, arm: Arm) -> None:
    """A few updates of the student on one prefix, with an optimiser of their own."""
    parameters = [p for p in pair.student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )
    for _ in range(args.updates):
        with pair.autocast():
            loss = arm(*student_logprobs(pair, args, lesson), lesson)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad()


def student_logprobs(
    pair: Pair, args: RepairConfig, lesson: Lesson
) -> tuple[Float[Tensor, "n V"], Float[Tensor, "m V"]]:
    """Log-probs along the student's window and along the teacher's, nats, from one forward."""
    rows = [lesson.prefix + lesson.student_tokens, lesson.prefix + lesson.teacher_tokens]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    ids = ids.to(pair.student.device)
    states = pair.student.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    first = len(lesson.prefix) - 1
    own = states[0, first : first + len(lesson.student_tokens)]
    along = states[1, first : first + len(lesson.teacher_tokens)]
    head, temperature = pair.observer.student.head, args.loss_temperature
    return _logprobs(head, own, temperature), _logprobs(head, along, temperature)


@torch.no_grad()
def distance_to_teacher(pair: Pair, args: RepairConfig, lesson: Lesson) -> tuple[float, Ids]:
    """OT distance from the student's greedy continuation of the prefix, and its tokens."""
    sampling = Sampling(temperature=0.0, max_new_tokens=args.length)
    with pair.observer.phases.phase("continuations"):
        (written,) = pair.observer.student.generate([lesson.prefix], sampling, [0])
    rollout = Rollout(Prompt(0, lesson.prefix, lesson.prefix), written.tokens, (), finished=True)
    teacher = Generation(lesson.teacher_tokens, (), finished=True)
    windows = pair_windows([rollout], [(0, 0)], [teacher], args.length)
    return float(pair.observer.compare(windows).distance[0]), written.tokens


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every weight, tied ones once."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def restore(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put the weights of a snapshot back, bit for bit."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def summarise(folder: Path, args: RepairConfig) -> dict[str, Any]:
    """The content of repair.json, from the records in the folder."""
    names = ("before", *args.arm_names)
    table = read_table(folder / SAMPLES, names)
    found = intervals(table, measure, repeats=args.bootstrap, seed=args.seed)
    return {
        "samples": len(table),
        "updates": args.updates,
        "learning_rate": args.learning_rate,
        "window_length": args.window_length,
        "trajectory_weight": args.trajectory_weight,
        "arm_position_weight": args.arm_position_weight,
        "interval": f"95 % percentile bootstrap over prompts, {args.bootstrap} resamples",
        "mean_distance_found": float(table["found"].mean()),
        "arms": {
            name: {
                "median": float(np.median(table[name])),
                **{kind: asdict(found[f"{kind}/{name}"]) for kind in _kinds(name, names)},
            }
            for name in names
        },
        "paper": PAPER,
        "cost": {"seconds": _seconds(folder)},
    }


def read_table(path: Path, names: Sequence[str]) -> Array:
    """samples.jsonl as a structured array: a row a sample, a column an arm."""
    kind = np.dtype([("prompt", "i8"), ("found", "f8"), *((name, "f8") for name in names)])
    rows: list[dict[str, float]] = []
    for record in read_lines(path):
        if record["arm"] == "before":
            rows.append({"prompt": record["prompt"], "found": record["found"]})
        rows[-1][record["arm"]] = record["distance"]
    return np.array([tuple(row[name] for name in kind.names or ()) for row in rows], kind)


def measure(table: Array) -> dict[str, float]:
    """Means and paired comparisons of all arms; a reduction is in per cent of the mean before."""
    names = [name for name in table.dtype.names or () if name not in ("prompt", "found")]
    before = float(table["before"].mean())
    found = {}
    for name in names:
        mean = float(table[name].mean())
        found[f"mean/{name}"] = mean
        found[f"reduction_percent/{name}"] = 100 * (1 - mean / before) if before else math.nan
        for other in ("before", "opd"):
            if other in names:
                difference = float((table[name] - table[other]).mean())
                found[f"difference_to_{other}/{name}"] = difference
    return found


def _kinds(name: str, names: Sequence[str]) -> list[str]:
    """The statistics that say something of an arm."""
    others = [other for other in ("before", "opd") if other in names and other != name]
    compared = [f"difference_to_{other}" for other in others if name != "before"]
    return ["mean", *(["reduction_percent", *compared] if name != "before" else [])]


def _logprobs(head: Head, hidden: Tensor, temperature: float) -> Tensor:
    return (head.logits(hidden) / temperature).log_softmax(-1)


def _one_a_rollout(
    starts: Sequence[tuple[int, int]], real: Sequence[bool], seed: int, number: int
) -> Iterator[tuple[int, int]]:
    """(row, window) of one real divergent point a rollout, drawn at random."""
    places: dict[int, list[int]] = {}
    for k, ((row, _), verdict) in enumerate(zip(starts, real, strict=True)):
        if verdict:
            places.setdefault(row, []).append(k)
    for row, some in places.items():
        generator = np.random.default_rng((seed, Stream.REPAIR_RESAMPLES, number + row))
        yield row, some[int(generator.integers(len(some)))]


def _seconds(folder: Path) -> dict[str, float]:
    total: Counter[str] = Counter()
    for record in read_lines(folder / METRICS):
        total.update({k.removeprefix("seconds/"): v for k, v in record.items() if k != "sample"})
    return {**total, "all": sum(total.values())}
