"""``topd probe``: is a teacher's token loss a good guide for a student? Before paying for training.

The line of training, stopped at transport: rollouts -> token losses -> positions -> windows ->
OT. Per rollout three groups of positions are looked at: *high* (the candidates, as in training),
*random* (any response token) and *low* (drawn from the rollout's quieter tokens).

::

    RUN/run.json         command, recipe and configuration
        manifest.json    versions, device, seed, fingerprints of models and data
        rollouts.jsonl   as in training, and reverse_kl and entropy of every token
        positions.jsonl  one line a position: losses, OT, verdict, windows, plan
        tokens.jsonl     the text of every token that occurs
        metrics.jsonl    one line a batch: tokens and seconds
        probe.json       the summary

Everything in probe.json but its seconds is a function of positions.jsonl and rollouts.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from topd.commands.probe.outcomes import Check, Verified, checker_of, verify_forks
from topd.commands.probe.statistics import METRICS, POSITIONS, rejoin, summarise
from topd.commands.session import (
    IDLE,
    LEARNING,
    ROLLOUTS,
    AnalysisConfig,
    Pair,
    batches,
    read_analysis,
    session,
)
from topd.config import _field
from topd.engines import Scores
from topd.errors import TOPDError
from topd.evaluate.evaluation import opened_thought, text_of
from topd.losses import TokenTerms, linear_token_terms
from topd.runs.files import trim
from topd.runs.folder import RunFolder, rollout_record
from topd.runs.tokens import FILE as TOKENS
from topd.seeds import Stream, sampling_seeds
from topd.training.experience.evidence import differing, padded, pair_windows
from topd.training.progress import Phases
from topd.transport import sparse_plans
from topd.types import Ids, Prompt, Rollout, Transport, Windows


@dataclass
class ProbeConfig(AnalysisConfig):
    """What a probe does: TOPDConfig's rollouts, candidates, windows and transport, and these."""

    idle = (
        *(*IDLE, *LEARNING, "beta", "kd_ratio", "token_loss", "trajectory_weight"),
        *("trajectory_reduction", "false_alarm_share", "ot_threshold"),
    )

    rollouts: int = _field(200, "Rollouts in all.")
    group_size: int | None = _field(
        None, "Random and low-loss positions a rollout; none: as many as it has candidates."
    )
    low_share: float = _field(
        0.5, "Low-loss positions are drawn from this share of a rollout's tokens: least |loss|."
    )
    verify: int = _field(
        0,
        "Continuations to the end that check a candidate: the teacher's from before and after its "
        "token, the student's from before. 1: greedy; more: sampled; 0: none.",
    )

    def _check(self) -> None:
        super()._check()
        self._at_least_1("rollouts", "group_size")
        if self.verify < 0:
            raise TOPDError(f"verify: {self.verify} must be at least 0.")
        if not 0 < self.low_share <= 1:
            raise TOPDError(f"low_share: {self.low_share} must be above 0 and at most 1.")


@dataclass(frozen=True)
class Batch:
    """One batch of rollouts as the probe sees it. Tensors are on the CPU.

    ``loss`` [B T] is the token loss that ranks candidates, ``terms`` [B T] the other quantities;
    ``groups`` has the group of each of the N windows; ``verified`` the outcomes of the high ones,
    which come first in their rollout, if they were asked for.
    """

    rollouts: tuple[Rollout, ...]
    teacher_logprobs: Tensor
    loss: Tensor
    terms: TokenTerms
    groups: tuple[str, ...]
    windows: Windows
    transport: Transport
    decoded: int
    verified: Verified | None = None

    @property
    def starts(self) -> list[tuple[int, int, str]]:
        """Row, token and group of every position."""
        row, start = self.windows.row.tolist(), self.windows.start.tolist()
        return list(zip(row, start, self.groups, strict=True))


def run_probe(path: Path, words: Sequence[str] = (), *, console: Console | None = None) -> Path:
    """Probe the pair of a recipe and return the run folder.

    ``words`` are ``--key value``, which replace the recipe's. Run again in the same folder it
    continues where it was stopped; the records are then the same as if it had not been, bit for bit
    on a CPU. Raises TOPDError: bad input, or another run in the folder.
    """
    recipe = read_analysis("probe", path, words, ProbeConfig)
    check = checker_of(recipe.data) if recipe.args.verify else None
    with session("probe", recipe, console) as (pair, run, phases):
        _probe(recipe.args, pair, run, phases, check)
        run.write("probe.json", summarise(run.folder, recipe.args, pair.tokenizer.decode))
    return run.folder


def _probe(
    args: ProbeConfig, pair: Pair, run: RunFolder, phases: Phases, check: Check | None
) -> None:
    """Probe batch after batch; what is done is on disk."""
    size = args.rollout_batch_size
    first = resume_at(run.folder, args.rollouts, size)
    texts = pair.token_writer(run.folder)
    phases.start(math.ceil(args.rollouts / size), "batches")
    questions = pair.questions(args.seed, args.num_generations)
    for number, prompts in batches(questions, first, size, args.rollouts):
        seeds = sampling_seeds(args.seed, 0, len(prompts), first=number)
        with torch.no_grad():
            batch = probe_batch(pair, pair.observer.roll_out(prompts, seeds), seeds, number)
            batch = _with_outcomes(batch, pair, check, number) if check else batch
        positions = list(position_records(batch, number))
        run.append(TOKENS, texts.records(_all_ids(batch, positions)))
        run.append(POSITIONS, positions)
        spent = {f"seconds/{name}": spent for name, spent in phases.take().items()}
        run.append(METRICS, [{"step": number // size, **_tokens(batch), **spent}])
        run.append(ROLLOUTS, _rollout_records(batch, number, size, pair))  # last: it is done
        phases.step_done(number // size + 1)


def _all_ids(batch: Batch, positions: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[int]]:
    """Every token of a batch: prompts, responses, windows."""
    for rollout in batch.rollouts:
        yield from (rollout.prompt.student, rollout.prompt.teacher, rollout.response)
    for position in positions:
        yield from (position["student_tokens"], position["teacher_tokens"])


def resume_at(folder: Path, rollouts: int, size: int) -> int:
    """The rollout to continue with: after the last whole batch. What is beyond it is cut off."""
    done = trim(folder / ROLLOUTS)
    if done != rollouts:  # else the last batch was a smaller one
        done = min(done, rollouts)
        done -= done % size
    trim(folder / ROLLOUTS, lambda record: record["rollout"] < done)
    trim(folder / POSITIONS, lambda record: record["rollout"] < done)
    trim(folder / METRICS, lambda record: record["step"] * size < done)
    return done


def probe_batch(
    pair: Pair, rollouts: Sequence[Rollout], seeds: Sequence[int], number: int
) -> Batch:
    """Score rollouts, choose positions, and compare what both models write from there.

    The teacher's windows draw from the rollouts' ``seeds`` where they are sampled. The
    ``number`` of the first rollout fixes the positions, with the configuration's seed.
    """
    observer = pair.observer
    args = observer.args
    assert isinstance(args, ProbeConfig)
    scores = observer.score(rollouts, number)
    terms = _token_terms(pair, rollouts, scores)
    losses = observer.token_losses(rollouts, scores)
    loss, _ = padded(losses)
    high: list[list[int]] = [[] for _ in rollouts]
    found = observer.candidates(losses, args.length)
    for row, t in differing(rollouts, scores.logprobs, found):
        high[row].append(t)
    chosen = [
        (group, (row, t))
        for row, some in enumerate(high)
        for group, places in choose(losses[row], some, args, number + row).items()
        for t in places
    ]
    starts = [start for _, start in chosen]
    written = observer.look_ahead(scores, starts, seeds, args.length)
    windows = pair_windows(rollouts, starts, written, args.length)
    return Batch(
        tuple(rollouts),
        scores.logprobs.cpu(),
        loss,
        terms,
        tuple(group for group, _ in chosen),
        windows,
        observer.compare(windows),
        sum(len(window.tokens) for window in written),
    )


def _with_outcomes(batch: Batch, pair: Pair, check: Check, number: int) -> Batch:
    """With the outcomes of its candidates."""
    args = pair.observer.args
    assert isinstance(args, ProbeConfig)
    high = [(row, t) for row, t, group in batch.starts if group == "high"]

    def decode(ids: Ids) -> str:
        return text_of(pair.tokenizer, ids)

    def right(prompt: Prompt, response: Ids) -> bool:
        return check(prompt.index, opened_thought(prompt.student, decode) + decode(response))

    found = verify_forks(
        pair.observer, batch.rollouts, high, right, samples=args.verify, number=number
    )
    return replace(batch, verified=found)


def choose(
    loss: Tensor, high: Sequence[int], args: ProbeConfig, number: int
) -> dict[str, list[int]]:
    """The positions of rollout ``number`` by group, in rising order; fewer where it is too short.

    high: the candidates, as given. random: drawn from all tokens without replacement, so that a
    candidate may be among them. low: drawn from the share of tokens with the least |loss|,
    candidates excepted, where ``loss`` [T] nats ranks candidates.
    """
    generator = np.random.default_rng((args.seed, Stream.PROBE_POSITIONS, number))
    count = args.group_size or len(high)
    quietest = loss.abs().argsort(stable=True)[: math.ceil(args.low_share * len(loss))].tolist()
    found = {"high": list(high)}
    quiet = sorted(set(quietest) - set(high))
    for name, pool in dict[str, Sequence[int]](random=range(len(loss)), low=quiet).items():
        size = min(count, len(pool))
        drawn: Any = generator.choice(len(pool), size, replace=False) if pool else []
        found[name] = sorted(pool[i] for i in drawn)
    return found


def position_records(batch: Batch, number: int) -> Iterator[dict[str, Any]]:
    """Lines of positions.jsonl; ``real`` is decided once all positions are known."""
    windows, transport = batch.windows, batch.transport
    plans = sparse_plans(transport.plan)
    outcomes = iter(batch.verified.outcomes if batch.verified else ())
    for k, (row, t, group) in enumerate(batch.starts):
        student = windows.student_tokens[k][windows.student_mask[k]].tolist()
        teacher = windows.teacher_tokens[k][windows.teacher_mask[k]].tolist()
        yield {
            "rollout": number + row,
            "prompt": batch.rollouts[row].prompt.index,
            "position": t,
            "group": group,
            "token_loss": float(batch.loss[row, t]),
            "reverse_kl": float(batch.terms.divergence[row, t]),
            "entropy": float(batch.terms.entropy[row, t]),
            "distance": float(transport.distance[k]),
            "real": None,
            "rejoin": rejoin(student, teacher),
            "student_tokens": student,
            "teacher_tokens": teacher,
            "plan": plans[k],
            **({"outcome": asdict(next(outcomes))} if group == "high" and batch.verified else {}),
        }


def _token_terms(pair: Pair, rollouts: Sequence[Rollout], scores: Scores) -> TokenTerms:
    """Reverse KL, entropy and log-prob of every response token, [B T] nats, on the CPU."""
    observer = pair.observer
    args, responses = observer.args, [r.response for r in rollouts]
    with observer.phases.phase("scoring"):
        student = observer.student.score([r.prompt.student for r in rollouts], responses)
        tokens, _ = padded([torch.tensor(response) for response in responses])
        terms = linear_token_terms(
            student.hidden.flatten(0, 1),
            observer.student.head,
            scores.hidden.flatten(0, 1),
            observer.teacher.head,
            tokens.flatten().to(scores.hidden.device),
            torch.zeros(tokens.numel(), 0, dtype=torch.long, device=scores.hidden.device),
            temperature=args.loss_temperature,
            chunk_tokens=args.chunk_tokens,
        )
    return TokenTerms(*(term.cpu().unflatten(0, tokens.shape) for term in terms))


def _tokens(batch: Batch) -> dict[str, int]:
    """What a batch cost in tokens; scoring reads prompt and response once a model."""
    responses = sum(len(r.response) for r in batch.rollouts)
    verifying = batch.verified.tokens if batch.verified else {}
    return {
        "student_sampled": responses,
        "student_scored": responses + sum(len(r.prompt.student) for r in batch.rollouts),
        "teacher_scored": responses + sum(len(r.prompt.teacher) for r in batch.rollouts),
        "teacher_decoded": batch.decoded,
        **{f"{model}_verifying": tokens for model, tokens in verifying.items()},
    }


def _rollout_records(batch: Batch, number: int, size: int, pair: Pair) -> Iterator[dict[str, Any]]:
    for i, rollout in enumerate(batch.rollouts):
        length, text = len(rollout.response), pair.tokenizer.decode(list(rollout.response))
        logprobs = batch.teacher_logprobs[i, :length].tolist()
        yield {
            **rollout_record(number // size, number + i, rollout, logprobs, text),
            "reverse_kl": batch.terms.divergence[i, :length].tolist(),
            "entropy": batch.terms.entropy[i, :length].tolist(),
        }
