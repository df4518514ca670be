"""Evaluation during training, in the trainer's own log."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from topd.distributed import agreed
from topd.engines.decode_check import check_decoding
from topd.engines.hf import HFEngine
from topd.errors import TOPDError
from topd.evaluate.evaluation import Evaluation, Evaluator
from topd.inputs.models import eos_ids
from topd.inputs.models.fingerprints import fingerprint
from topd.inputs.models.vocabulary import shared_ids
from topd.statistics import Interval, paired_bootstrap

GREEDY, PASS = "greedy", "pass@1"
FIRST = "eval/first"  # of a log in the trainer's state: what was solved at first
Solved = Mapping[str, Sequence[float]]  # by name, of every problem

TIMES = ("eval/training_seconds", "eval/training_cpu_seconds")


def check_one_turn(name: str, args: TrainingArguments) -> None:
    """Refuse an evaluation in a training whose students have turns. Raises TOPDError."""
    if getattr(args, "environment", None) is not None:
        raise TOPDError(
            f"{name}: asks for one turn, without the environment. Leave it out, or leave "
            "environment out."
        )


class EvaluationCallback(TrainerCallback):
    """Evaluates before the first update, every ``every`` updates, and after the last.

    The figures go through ``trainer.log`` under ``eval/``: to metrics.jsonl of the run folder and
    to every logger. Training is the same with it and without: engines draw from seeds of their own.
    Every rank evaluates all problems, the first one logs. ``eval/training_seconds`` and
    ``eval/training_cpu_seconds`` are the wall-clock and this process's CPU time since the beginning
    without the evaluations; a resumed run counts on from its last evaluation. From the second
    evaluation on ``eval/greedy_change`` and ``eval/pass@1_change`` are the gains since the first,
    with their ends, paired by problem; a resumed run has the first one from its checkpoint.
    ``latest`` is the latest evaluation.

    >>> trainer.add_callback(EvaluationCallback(trainer, evaluator, every=50))  # doctest: +SKIP

    Args:
        trainer: any Trainer of a causal language model; its model is evaluated.
        evaluator: what to evaluate on. One that has held-out problems.
        every: updates between two evaluations.

    Raises:
        TOPDError: ``every`` is below 1, or the trainer has an environment.
    """

    def __init__(self, trainer: Trainer, evaluator: Evaluator, *, every: int) -> None:
        if every < 1:
            raise TOPDError(f"every: {every} must be at least 1.")
        check_one_turn("EvaluationCallback", trainer.args)
        self.trainer, self.evaluator, self.every = trainer, evaluator, every
        self.allowed = shared_ids(evaluator.tokenizer, evaluator.tokenizer)
        self.latest: Evaluation | None = None
        self._first: Solved = {}  # before the first update
        self._latest_step = -1
        self._began = self._spent = np.zeros(2)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Evaluate the student as it comes; in a run that resumes, only if that was not done.

        Raises TOPDError: the trainer has another of these, whose figures would have the same names.
        """
        callbacks = self.trainer.callback_handler.callbacks
        if sum(isinstance(callback, EvaluationCallback) for callback in callbacks) > 1:
            raise TOPDError(
                "EvaluationCallback: the trainer has two, and their figures would have the same "
                "names. Keep one; evaluate the student on other problems with topd eval."
            )
        self._began = _clocks()
        for log in state.log_history:
            if TIMES[0] in log:  # a resumed run: what was evaluated before
                self._latest_step = log["step"]
                self._spent = -np.array([log[time] for time in TIMES])
            if FIRST in log and log[FIRST]["of"] == self._problems():
                self._first = log[FIRST]["solved"]
        if state.global_step != self._latest_step:
            self.on_step_end(args, state, control)  # at 0, or where a fault ended the run before

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Evaluate at every so many updates."""
        if state.global_step % self.every == 0:
            self._evaluate(state.global_step, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Evaluate the student as it is in the end; that may be the best one, loaded again."""
        best = args.load_best_model_at_end and state.best_global_step not in (
            None,
            self._latest_step,
        )
        if best or state.global_step != self._latest_step:
            self._evaluate(state.global_step, control)

    def _evaluate(self, step: int, control: TrainerControl) -> None:
        log_wanted, began = control.should_log, _clocks()
        accelerator = self.trainer.accelerator
        with self._saved(), self._whole() as model:
            engine = HFEngine(
                model,
                eos_ids=eos_ids(model, self.evaluator.tokenizer),
                name="student",
                allowed=self.allowed,
                autocast=accelerator.autocast,
            )
            try:
                self.latest = agreed(lambda: self._evaluated(engine))
            finally:
                engine.release()
        times = (began - self._began - self._spent).tolist()
        found = {**logged(self.latest), **changes(self._first, self.latest)}
        self.trainer.log({**found, **dict(zip(TIMES, times, strict=True))})
        if step == 0:  # in the state, which checkpoints have; no logger is given it
            self._first = {key: self.latest.solved(greedy=key == GREEDY) for key in (GREEDY, PASS)}
            first = {"of": self._problems(), "solved": self._first}
            self.trainer.state.log_history[-1][FIRST] = first
        control.should_log = log_wanted  # a log of ours must not stand for that of the update
        self._latest_step = step
        self._spent = self._spent + _clocks() - began

    def _evaluated(self, engine: HFEngine) -> Evaluation:
        check_decoding(engine)
        return self.evaluator(engine)

    def _problems(self) -> str:
        """SHA-256 of what is evaluated on, and how: values are paired only where it is the same."""
        asked = self.evaluator
        rows = [asked.rows[prompt.index] for prompt in asked.prompts]
        how = [fingerprint(asked.prompts), rows, asked.samples, asdict(asked.sampling), asked.seed]
        return hashlib.sha256(json.dumps(how, default=str).encode()).hexdigest()

    def _whole(self) -> AbstractContextManager[PreTrainedModel]:
        """The model, with its weights whole where a TOPDTrainer has them sharded."""
        whole = getattr(self.trainer, "whole_student", None)
        if whole is not None:
            return whole()
        return nullcontext(self.trainer.accelerator.unwrap_model(self.trainer.model))

    def _saved(self) -> AbstractContextManager[None]:
        """What keeps the updates that are done if the evaluation fails, in a TOPDTrainer."""
        return getattr(self.trainer, "saved_if_stopped", nullcontext)()


def _clocks() -> np.ndarray:
    """Wall-clock and CPU time of this process, seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def logged(evaluation: Evaluation) -> dict[str, float]:
    """The figures of an evaluation as a log has them: means, ends of the accuracies' intervals.

    The names are ``eval/greedy``, ``eval/greedy_low``, ``eval/greedy_high``, ``eval/pass@1``, ...
    """
    logs: dict[str, float] = {}
    for name, interval in evaluation.intervals().items():
        solved = name == "greedy" or name.startswith("pass@")
        key = f"eval/{name}"
        logs |= _with_ends(key, interval) if solved else {key: interval.mean}
    logs["eval/problems"] = evaluation.problems
    logs["eval/samples"] = evaluation.samples
    return logs


def changes(first: Solved, last: Evaluation) -> dict[str, float]:
    """How much more is solved than at first, with the ends of the paired interval over problems.

    The names are ``eval/greedy_change``, ``eval/greedy_change_low``, ...; likewise ``pass@1``.
    """
    logs: dict[str, float] = {}
    for name, before in first.items():
        gain = paired_bootstrap(last.solved(greedy=name == GREEDY), before)
        logs |= _with_ends(f"eval/{name}_change", gain)
    return logs


def _with_ends(key: str, found: Interval) -> dict[str, float]:
    return {key: found.mean, f"{key}_low": found.low, f"{key}_high": found.high}
