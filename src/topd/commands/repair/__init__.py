"""``topd repair``: does a method bring the student back to the teacher's path after a fork?

The local correction experiment of arXiv 2606.00305: prefixes with one real divergent point each; a
few updates on that one prefix, the loss masked to the window; then the student continues greedily
from the same prefix, and its window is compared with the teacher's. Every method starts from the
same weights with a new optimiser.

A fork is a rollout of its own here: all that came before is its prompt, the student's window its
response, and its first token is a real divergent point. A method guides it, and it is learned from,
as in training, by the same functions with the same loss.

::

    RUN/run.json         command, recipe and configuration
        manifest.json    versions, device, seed, fingerprints of models and data
        rollouts.jsonl   the rollout of every sample, as in training
        samples.jsonl    one line a sample and method: OT distance to the teacher, both windows
        tokens.jsonl     the text of every token that occurs
        metrics.jsonl    one line a sample: seconds
        repair.json      the summary
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from topd.commands.probe.statistics import METRICS
from topd.commands.repair.config import RepairConfig
from topd.commands.repair.statistics import SAMPLES, summarise
from topd.commands.session import ROLLOUTS, Pair, batches, read_analysis, session
from topd.divergence import real_divergent_points
from topd.errors import TOPDError
from topd.runs.files import read_lines, trim
from topd.runs.folder import RunFolder, rollout_record
from topd.runs.tokens import FILE as TOKENS
from topd.seeds import Stream, sampling_seeds
from topd.training.experience.evidence import Seen, differing, pair_windows, statistics_of
from topd.training.learning import LearningBatch, Totals, collate, learning_terms, update_loss
from topd.training.learning.layout import can_pack
from topd.training.progress import Phases
from topd.types import Generation, Ids, Prompt, Rollout, Sampling

ROLLOUTS_A_SAMPLE = 50  # give up when so many rollouts a sample have been looked at


@dataclass(frozen=True)
class Sample:
    """A real divergent point, at ``position`` of a rollout, and what a method gets to see of it.

    ``distance`` is the OT by which it was found. ``fork`` is the rollout from there on, cut to a
    window, its prompt all that came before; ``seen`` the teacher's view of it.
    """

    number: int
    rollout: Rollout
    teacher_logprobs: tuple[float, ...]
    position: int
    distance: float
    fork: Rollout
    seen: Seen

    @property
    def teacher_tokens(self) -> Ids:
        """The teacher's window."""
        windows = self.seen.evidence.windows
        return tuple(windows.teacher_tokens[0][windows.teacher_mask[0]].tolist())


def run_repair(path: Path, words: Sequence[str] = (), *, console: Console | None = None) -> Path:
    """Run the experiment for the pair of a recipe and return the run folder.

    ``words`` are ``--key value``, which replace the recipe's, whose ``lora`` is not used: all
    weights of the student learn. Run again in the same folder it continues where it was stopped;
    the records are then the same as if it had not been, bit for bit on a CPU.

    Raises TOPDError: bad input, another run in the folder, or too few real divergent points.
    """
    recipe = read_analysis("repair", path, words, RepairConfig)
    with session("repair", recipe, console) as (pair, run, phases):
        _repair(recipe.args, pair, run, phases)
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
        "candidate_fraction or max_completion_length. Rollouts on which both models agree have "
        "none."
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
    losses, teacher = observer.token_losses(rollouts, scores), scores.logprobs.cpu()
    found = observer.candidates(losses, length)
    starts = [
        (row, t)
        for row, t in differing(rollouts, scores.logprobs, found)
        if rollouts[row].finished or t + length <= len(rollouts[row].response)
    ]
    if not starts:
        return
    written = observer.look_ahead(scores, starts, seeds, length)
    distance = observer.compare(pair_windows(rollouts, starts, written, length)).distance
    real = real_divergent_points(
        distance, false_alarm_share=args.false_alarm_share, threshold=args.ot_threshold
    )
    for row, k in _one_a_rollout(starts, real.tolist(), args.seed, number):
        rollout, t = rollouts[row], starts[k][1]
        fork = fork_at(rollout, t, length)
        loss = losses[row][t : t + length]
        end = t + len(fork.response)
        own = scores.hidden[row, t:end], scores.logprobs[row, t:end]
        seen = see(pair, args, fork, own, loss, written[k], seeds[row])
        logprobs = tuple(teacher[row, : len(rollout.response)].tolist())
        yield Sample(number + row, rollout, logprobs, t, float(distance[k]), fork, seen)


def fork_at(rollout: Rollout, t: int, length: int) -> Rollout:
    """The window of a rollout from token ``t`` on as a response to all that came before."""
    prompt, before, window = rollout.prompt, rollout.response[:t], slice(t, t + length)
    own = Prompt(prompt.index, prompt.student + before, prompt.teacher + before)
    tokens, logprobs = rollout.response[window], rollout.logprobs[window]
    return replace(rollout, prompt=own, response=tokens, logprobs=logprobs)


def see(
    pair: Pair,
    args: RepairConfig,
    fork: Rollout,
    teacher: tuple[Tensor, Tensor],
    loss: Tensor,
    written: Generation,
    seed: int,
) -> Seen:
    """The teacher's view of a fork of T tokens whose first one is a real divergent point.

    ``teacher`` has its last hidden states [T D] and log-probs [T] nats, ``loss`` [T] nats ranks
    candidates, ``written`` is the teacher's window; methods draw from ``seed``.
    """
    observer = pair.observer
    evidence = observer.evidence([fork], [loss], [(0, 0)], [written], args.length, [teacher[1]])
    evidence = replace(evidence, real=torch.tensor([True]), seed=seed)
    if any(args.method_of(name).statistics for name in args.method_names):
        known = observer.statistics([fork], observer.score([fork], keep=False))
        evidence = replace(evidence, statistics=statistics_of(known))
    hidden, logprobs = teacher
    return Seen([hidden], [logprobs], [(0, 0)], [written], evidence)


def treat(
    pair: Pair, args: RepairConfig, sample: Sample, weights: dict[str, Tensor]
) -> Iterator[dict[str, Any]]:
    """One record a method, the first for the student as it was, whose weights are then back."""
    place = {"rollout": sample.number, "prompt": sample.rollout.prompt.index}
    place["position"] = sample.position
    for name in ("before", *args.method_names):
        if name != "before":
            with pair.observer.phases.phase(f"method {name}"):
                correct(pair, args, sample, name)
        distance, tokens = distance_to_teacher(pair, args, sample)
        restore(pair.student, weights)
        record = {"arm": name, "distance": distance, **place, "student_tokens": tokens}
        if name == "before":
            record["found"] = sample.distance
            record["teacher_tokens"] = sample.teacher_tokens
        yield record


def correct(pair: Pair, args: RepairConfig, sample: Sample, name: str) -> None:
    """A few updates of the student on one fork, with an optimiser of their own."""
    batch, loss_of = to_learn(pair, args, sample, name), args.loss_of(name)
    parameters = [p for p in pair.student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )
    for _ in range(args.updates):
        loss_on(pair, loss_of, batch).backward()
        if args.max_grad_norm:  # 0: no clipping, as in training
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad()


@torch.no_grad()
def to_learn(pair: Pair, args: RepairConfig, sample: Sample, name: str) -> LearningBatch:
    """A method's guidance of a fork, laid out for the student."""
    observer, seen = pair.observer, sample.seen
    method, seed = args.method_of(name), seen.evidence.seed
    experience = observer.guided([sample.fork], [seed], method, seen)
    totals = Totals(len(sample.fork.response), experience.guidance[0].guided)
    packed = pair.shares_rows and can_pack(pair.student)
    return collate(experience, [0], totals, pair.student.device, packed=packed)


def loss_on(pair: Pair, args: RepairConfig, batch: LearningBatch) -> Tensor:
    """The loss of training on a batch that is a whole update, nats."""
    with pair.autocast():
        terms = learning_terms(pair.student, batch, pair.observer.teacher.head, args)
    return update_loss(terms, batch, args)[0]


@torch.no_grad()
def distance_to_teacher(pair: Pair, args: RepairConfig, sample: Sample) -> tuple[float, Ids]:
    """OT distance from the student's greedy continuation of the prefix, and its tokens."""
    sampling = Sampling(temperature=0.0, max_new_tokens=args.length)
    prefix = sample.fork.prompt.student
    with pair.observer.phases.phase("continuations"):
        (written,) = pair.observer.student.generate([prefix], sampling, [0])
    rollout = Rollout(Prompt(0, prefix, prefix), written.tokens, (), finished=True)
    teacher = Generation(sample.teacher_tokens, (), finished=True)
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
