"""A Trainer whose student is observed: its engines, and evaluations on fresh rollouts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from topd.distributed import everywhere
from topd.engines.factory import open_engines
from topd.engines.servers.weight_sync import ServedStudent
from topd.engines.several import one_teacher
from topd.errors import TOPDError
from topd.inputs.models import generation_config_of
from topd.inputs.models.heads import check_head
from topd.inputs.prompts import PromptEncoder
from topd.inputs.self_teacher import Average, SelfTeacher
from topd.inputs.teachers import Routes
from topd.seeds import Stream
from topd.training.experience import Observer
from topd.training.experience.overlap import Overlap
from topd.training.experience.turns import Turns
from topd.training.learning import (
    LearningBatch,
    LearningTerms,
    Totals,
    collate,
    inside_forward,
    learning_terms,
)
from topd.training.progress import Phases
from topd.training.recorded import RecordedTrainer
from topd.training.startup import Sources, Tokenizers, check_no_columns, rows_of, sets_of
from topd.training.startup.preflight import check_forward, mend
from topd.training.startup.resumed import current_options
from topd.types import Prompt

logger = logging.get_logger(__name__)


class ObservedTrainer(RecordedTrainer):
    """A trainer with engines for its student and teacher.

    Attributes:
        own: how the student is its own teacher; None if it is not.
        encoder: makes prompts of rows.
        turns: an environment between turns of the student; None for rollouts of one turn.
        observer: gathers what an update learns from.
        evaluator: the same for an evaluation, whose seconds are not counted.
        overlap: gathers the next update's experience meanwhile; None if none is.
    """

    own: SelfTeacher | None
    encoder: PromptEncoder
    turns: Turns | None

    def _observe_with(
        self,
        sources: Sources,
        models: tuple[PreTrainedModel, ...],
        tokenizers: Tokenizers,
        routes: Routes,
    ) -> None:
        """Open the engines, and have the student observed with them. Raises TOPDError."""
        if self.own and self.copy:
            raise TOPDError("teacher: self does not go with FSDP. Run DDP, or one process.")
        if self.own and self.own.ema is not None:
            self.average = Average(models[1], models[0], self.own.ema)
            self.add_callback(self.average)
        check_head("student", models[0])
        for teacher in models[1:]:
            check_head("teacher", teacher)
        if self.args.disable_dropout:
            check_forward(models[0])
        mend(generation_config_of(models[0]))
        count = 1 if models[1] is models[0] else len(models)  # a student may be its own teacher
        known = sources[:count], models[:count], tokenizers[:count]
        autocast, spans = self.accelerator.autocast, self.args.token_loss == "spans"
        student, teachers = open_engines(*known, self.args.temperature, autocast, spans=spans)
        if isinstance(student, ServedStudent) and (self.copy or self.args.world_size > 1):
            raise TOPDError("student.served: goes with one process only. Leave it out, or run one.")
        if self.copy:
            student.model = self.copy.model
            if student.graphs is not None:  # of the sharded model's weights
                student.release()
                student.graphs = None
                logger.warning("student: writes without CUDA graphs under FSDP, which is slower.")
        self.shares_rows = student.shares
        pair = student, one_teacher(teachers or [student], routes)
        self.observer = Observer(*pair, self.args, self.phases, self.turns)
        self.evaluator = Observer(*pair, self.args, Phases(), self.turns)
        self.overlap = Overlap(self.observer) if self.args.overlap else None

    @contextmanager
    def _synced(self) -> Iterator[None]:
        """The student whole for the engines, where it is sharded; how long that takes is timed."""
        if self.copy is None:
            yield
            return
        with ExitStack() as stack:
            with self.phases.phase("gathering"):
                stack.enter_context(self.whole_student())
            yield

    def _terms(self, model: nn.Module, batch: LearningBatch) -> LearningTerms:
        student = self.accelerator.unwrap_model(model)

        def forward() -> LearningTerms:
            with self.accelerator.autocast():
                return learning_terms(student, batch, self.observer.teacher.head, self.args)

        return inside_forward(model, student, forward)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's, with the current options: a lowered learning rate counts."""
        with current_options(self.optimizer, self.lr_scheduler):
            super()._load_optimizer_and_scheduler(checkpoint)

    def prediction_step(
        self, model: nn.Module, inputs: list[Prompt], *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        """Mean token divergence of fresh rollouts: the same seeds at every evaluation."""
        numbers = [prompt.index for prompt in inputs]
        with self._synced():
            experience = self.evaluator.observe(
                inputs, step=Stream.EVALUATION_ROLLOUTS, numbers=numbers, look_ahead=False
            )
        rows, device = range(len(inputs)), self.accelerator.device
        batch = collate(experience, rows, Totals(1, 0), device)
        with torch.no_grad():
            divergence = self._terms(model, batch).tokens.divergence
        parts = divergence.split(batch["lengths"])
        sums = torch.stack([part.sum() for part in parts]).tolist()  # one wait for the device
        counted = zip(sums, map(len, parts), strict=True)
        self.evaluation.update(zip(numbers, counted, strict=True))
        return divergence.mean(), None, None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Prompt]:
        """Trainer's, with every prompt: dataloader_drop_last is for the training alone."""
        given, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = given

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Trainer's; the loss is the mean over all tokens, however they were batched.

        A prompt that fills up the last batch of a rank counts once.
        """
        self.evaluation: dict[int, tuple[float, int]] = {}
        with self._not_prepared():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        by_prompt = {n: pair for found in everywhere(self.evaluation) for n, pair in found.items()}
        divergence, tokens = (sum(column) for column in zip(*by_prompt.values(), strict=True))
        output.metrics[f"{metric_key_prefix}_loss"] = divergence / tokens
        return output

    @contextmanager
    def _not_prepared(self) -> Iterator[None]:
        """Keep Trainer from preparing the model for an evaluation before the training.

        accelerate would not wrap it for the training then: ranks would train apart, each on its own
        gradients. With FSDP2 it prepares no model without an optimiser.
        """
        models = self.accelerator._models
        if models:
            yield
            return
        models.append(self.model)
        try:
            yield
        finally:
            models.clear()

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, in training: after an update, before its checkpoint; or ``eval_on_start``."""
        if kwargs.get("skip_scheduler") and self.state.global_step > 0:
            return {}  # resumed: it was made when the run began
        with self.saved_if_stopped():
            return super()._evaluate(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean token divergence on fresh rollouts of the prompts, nats; recorded only in training.

        ``eval_dataset``: rows, encoded prompts, or sets of either by name.
        """
        if self.observer.teacher.gives != "distributions":
            raise TOPDError(
                "evaluate: measures a divergence, and the teacher gives only text. Evaluate "
                "answers: topd eval (topd.evaluate.Evaluator)."
            )
        if eval_dataset is None and self.eval_dataset is None:
            raise TOPDError("eval_dataset: none was given. Give evaluate() rows, or the trainer.")
        check_no_columns("eval_dataset", eval_dataset)
        if isinstance(eval_dataset, str) and eval_dataset not in sets_of(self.eval_dataset):
            raise TOPDError(
                f"eval_dataset: {eval_dataset!r} is not the name of a set that the trainer was "
                "given. Give rows, or sets of rows by name."
            )
        if eval_dataset is not None and not isinstance(eval_dataset, str | dict):
            rows = list(rows_of(eval_dataset))
            known = rows and isinstance(rows[0], Prompt)
            eval_dataset = rows if known else self.encoder.encode(rows)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, *_: Any, **__: Any) -> Any:
        """Not here: a student's answers are what ``topd eval`` writes. Raises TOPDError."""
        raise TOPDError(
            "predict: is not supported. Use evaluate() for the divergence on fresh rollouts, or "
            "topd eval (topd.evaluate.Evaluator) for answers."
        )
