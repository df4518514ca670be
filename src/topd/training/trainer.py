"""TOPDTrainer: transformers' Trainer with an experience phase before each update."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, TrainerCallback

from topd.config import TOPDConfig
from topd.distributed import agreed
from topd.errors import TOPDError
from topd.inputs.models import ModelSource, eos_ids
from topd.inputs.self_teacher import check_own_prompts, self_teacher_of
from topd.inputs.teachers import Routes, Teachers, TeacherSet
from topd.inputs.text_models import is_by_text
from topd.losses import TokenTerms, importance
from topd.runs.folder import check_run_folder, check_trains_here
from topd.training import startup
from topd.training.experience.evidence import Experience
from topd.training.experience.turns import turns_of
from topd.training.inherited import check_as_read, read_once
from topd.training.learning import LearningBatch, LearningTerms, Totals, collate, update_loss
from topd.training.learning.layout import can_pack, dealt
from topd.training.metrics import warn_of_cuts
from topd.training.observed import ObservedTrainer
from topd.training.progress import silence_others
from topd.training.replay import EarlierWindows
from topd.training.sampler import EpochTold, GroupSampler
from topd.training.sharded import check_launch
from topd.training.startup import AnyTeacher, DataRows, Rows, Sources, Tokenizers, load_models
from topd.training.startup.preflight import check_kept, check_saving
from topd.training.startup.trials import check_settings
from topd.training.stop_rules import Watch
from topd.types import Prompt


class TOPDTrainer(ObservedTrainer):
    """On-policy distillation that looks ahead, on transformers' Trainer.

    An update is an *experience* (the student writes, the teacher scores and looks ahead, a method
    gives guidance) and a *learning* phase (one forward and backward of the student). Everything
    else, from optimisers to callbacks and checkpoints, is the Trainer's.

    Args:
        model: the student, or where to load it from (float32): a path or hub name, a
            :class:`~topd.inputs.models.ModelSpec`, or its fields as a mapping.
        teacher_model: the teacher, or where to load it from, e.g.
            ``{"path": ..., "dtype": "bfloat16"}``. It is frozen. Several:
            :class:`~topd.inputs.teachers.Teachers`; the student itself: ``"self"``, or
            ``{"self": {"ema": 0.99}}``.
        args: a :class:`~topd.TOPDConfig`.
        train_dataset: rows with ``prompt`` (string or messages) or ``messages``; other columns
            are for ``args.teacher_prompt``.
        eval_dataset: the same, or several sets by name; ``evaluate`` gives the mean token
            divergence of fresh rollouts, of each set as ``eval_NAME_loss``.
        processing_class: the tokenizer; by default that of ``model``.
        callbacks: as in Trainer.
        optimizers: as in Trainer; the optimiser has every weight that is to be trained.
        peft_config: a LoRA configuration to wrap the student in.
        teacher_processing_class: the teacher's tokenizer, where its chat template differs.

    Raises:
        TOPDError: bad data, a pair that does not fit, or a run folder that cannot be written.

    Source: arXiv 2606.00305.
    """

    kind_of_args: type[TOPDConfig] = TOPDConfig

    def __init__(
        self,
        model: ModelSource | Mapping[str, Any],
        teacher_model: AnyTeacher | None = None,
        args: TOPDConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: PeftConfig | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
    ) -> None:
        args = self.kind_of_args() if args is None else args
        if optimizers[0] is not None:
            args = copy(args)  # it is told the optimiser's rate
        processing = processing_class, teacher_processing_class
        sources, routes, tokenizers, train, evaluation = self._started(
            model, teacher_model, args, (train_dataset, eval_dataset), peft_config, processing,
            optimizers,
        )  # fmt: skip
        models = load_models(sources, args, peft_config, trained=train is not None, own=self.own)
        super().__init__(
            models[0],
            TeacherSet(teacher_model, models[1:])
            if isinstance(teacher_model, Teachers)
            else models[1],
            args,
            tokenizers[0],
            train_dataset=train,
            eval_dataset=evaluation,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.loss_is_scaled_for_ga = True  # over the whole update: no division by accumulation
        self.compute_loss_func = update_loss  # says the same to transformers before 5.19
        self._observe_with(sources, models, tokenizers, routes)
        self.fetched: list[list[Prompt]] = []  # of the update ahead
        self.update_loss = torch.zeros(())  # of the update under way
        self.batches: list[LearningBatch] = []  # likewise
        self.gaps: list[Tensor] = []  # likewise: of log-probs, a sum and its count a micro-batch
        self.windows = EarlierWindows(self.args.window_replay, self.args.seed)
        self.watch, self.told = Watch(self), EpochTold()
        self.as_made = read_once(self.args)
        self.add_callback(self.watch)
        self.add_callback(self.told)

    @classmethod
    def check(
        cls,
        model: ModelSource | Mapping[str, Any],
        teacher_model: AnyTeacher,
        args: TOPDConfig,
        train_dataset: Rows,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        """Make the start-up checks alone, which read no weights. Raises TOPDError as a run does."""
        data = train_dataset, eval_dataset
        cls.__new__(cls)._started(model, teacher_model, args, data, peft_config)

    def _started(
        self,
        model: ModelSource | Mapping[str, Any],
        teacher_model: AnyTeacher | None,
        args: TOPDConfig,
        data: tuple[Any, Any],
        lora: PeftConfig | None,
        processing: tuple[PreTrainedTokenizerBase | None, ...] = (None, None),
        optimizers: tuple[Any, Any] = (None, None),
    ) -> tuple[Sources, Routes, Tokenizers, list[Prompt] | None, Any]:
        """The start-up checks, and what they have made by the way. Raises TOPDError."""
        silence_others()
        self.own = self_teacher_of(teacher_model)
        sources = startup.sources_of(model, teacher_model)
        startup.check_arguments(args, self.kind_of_args, sources, *data)
        routes = startup.routes_of(teacher_model, args)
        agreed(lambda: check_run_folder(Path(args.output_dir), resume=True))
        if data[0] is not None:
            check_kept(sources, Path(args.output_dir))
        tokenizers = startup.tokenizers_of_all(sources, *processing)
        ends, by_text = eos_ids(sources[0], tokenizers[0]), any(map(is_by_text, sources))
        self.encoder = startup.encoder_of(tokenizers, args, routes, by_text=by_text, ends=ends)
        self.turns = turns_of(args, sources, tokenizers[0])
        train, evaluation, prompts = self._encoded(*data, args)
        startup.check_sources(sources, tokenizers, prompts, args)
        if self.turns:
            self.turns.check(prompts, tokenizers[1:])
        check_launch(args)
        if train is not None:
            startup.check_optimizer(sources[0], lora, optimizers)
            check_settings(args, optimizers)
            check_saving(sources[0], tokenizers[0])
        startup.check_student(sources, args, lora, self.own)
        return sources, routes, tokenizers, train, evaluation

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, writing the run folder (see :mod:`topd.runs.folder`). As in transformers."""
        self._check_training(resume_from_checkpoint)
        self.fetched, self.current_flos = [], 0  # of a training that was interrupted
        self.remove_callback(self.watch)
        self.add_callback(self.watch)  # after all others, and what they ask for
        with closing(self.overlap) if self.overlap else nullcontext(), _what_is_there_kept():
            return super().train(resume_from_checkpoint, **kwargs)

    def _check_training(self, resume: str | bool | None) -> None:
        """What may have changed since the trainer was made. Raises TOPDError."""
        check_as_read(self.args, self.as_made)
        if resume is None and self.args.resume_from_checkpoint:
            raise TOPDError(
                "resume_from_checkpoint: the trainer does not read it. Call train("
                "resume_from_checkpoint=args.resume_from_checkpoint)."
            )
        check_trains_here(self.run_folder)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise TOPDError(
                "student: all its weights are frozen since the trainer was made, as those of a "
                "teacher are. Give another trainer a copy of it: copy.deepcopy(model)."
            )

    def _encoded(
        self, rows: Any, evaluation: Any, args: TOPDConfig
    ) -> tuple[list[Prompt] | None, Any, list[Prompt]]:
        """The prompts of the training, those of the evaluation by set, and all together."""
        train = None if rows is None else self._encode_training(startup.rows_of(rows), args)
        given = startup.sets_of(evaluation).items()
        sets = {name: self.encoder.encode(startup.rows_of(rows)) for name, rows in given}
        prompts = [*(train or ()), *(prompt for held_out in sets.values() for prompt in held_out)]
        if self.own:
            check_own_prompts(prompts)
        return train, sets if isinstance(evaluation, dict) else sets.get(""), prompts

    def _encode_training(self, rows: DataRows, args: TOPDConfig) -> list[Prompt]:
        prompts = self.encoder.encode(rows)
        self.encoder.routes.check_named([prompt.teacher_name for prompt in prompts])
        return prompts

    # The step. Experience (see Observer.observe): prompts -> rollouts -> token losses -> candidates
    # -> windows -> transport -> guidance. Learning (see training.learning): -> loss -> step.

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Prompt]], num_batches: int, device: torch.device
    ) -> tuple[list[LearningBatch], None]:
        """An update begins: prompts in, micro-batches to learn from out."""
        self.batches.clear()  # Trainer has this list too: their memory is for the rollouts
        if 0 < self.state.max_steps <= self.state.global_step:  # resumed where it had ended
            self.control.should_training_stop = True
            return [], None
        prompts, self.fetched = self.fetched or self._fetch(epoch_iterator, num_batches, device), []
        if not prompts:
            return [], None
        numbers = self._numbers([len(batch) for batch in prompts])
        with self.saved_if_stopped():
            experience = self._experience([p for batch in prompts for p in batch], numbers)
            if self.overlap and self.state.global_step + 1 < self.state.max_steps:
                self.fetched = self._fetch(epoch_iterator, num_batches, device)
                if self.fetched:  # an epoch's last update has no next one
                    ahead = [prompt for batch in self.fetched for prompt in batch]
                    self.overlap.begin(ahead, step=self.state.global_step + 1)
        self._record(experience, numbers)
        if self.state.global_step == 0 and self.is_world_process_zero():
            warn_of_cuts(experience.rollouts, self.args.max_completion_length)
        experience = self.windows.with_earlier(experience, self.state.global_step, self.meter)
        self.batches = self._collated(experience, [len(batch) for batch in prompts])
        self.update_loss, self.gaps = torch.zeros((), device=device), []
        return self.batches, None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro-batch: Trainer's, timed."""
        with self.saved_if_stopped(), self.phases.phase("learning"):
            loss = super().training_step(*args, **kwargs)
            if len(self.gaps) == len(self.batches):
                self._check_gaps()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: LearningBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, as its share of the update's."""
        terms = self._terms(model, inputs)
        loss, trajectory = update_loss(terms, inputs, self.args)
        self._measure(terms, trajectory, inputs)
        self.update_loss = self.update_loss + loss.detach()
        loss = loss * self.accelerator.num_processes  # DDP and FSDP average gradients over ranks
        return (loss, None) if return_outputs else loss

    # Its parts

    def _fetch(
        self, epoch_iterator: Iterator[list[Prompt]], num_batches: int, device: torch.device
    ) -> list[list[Prompt]]:
        """The prompts of an update, a list a micro-batch; none where an epoch has ended."""
        return super().get_batch_samples(epoch_iterator, num_batches, device)[0]

    def _numbers(self, sizes: Sequence[int]) -> list[int]:
        """The numbers of this rank's rollouts in the update: ranks take micro-batches in turn.

        So they are those that one process has with as many times the accumulation steps.
        """
        ranks, own = self.args.world_size, self.args.process_index
        return [
            (micro * ranks + own) * sizes[0] + i for micro, n in enumerate(sizes) for i in range(n)
        ]

    def _experience(self, prompts: Sequence[Prompt], numbers: Sequence[int]) -> Experience:
        """That of this update: gathered during the one before, or now."""
        if self.overlap:
            with self.phases.phase("waiting"):
                ready = self.overlap.take()
            if ready is not None:
                return ready
        step, name = self.state.global_step, self.args.divergence
        logged = [log[name] for log in self.state.log_history if name in log]
        looks, writes = self.args.looks_ahead(step, logged), self.args.teacher_writes(step)
        with self._synced():
            return self.observer.observe(
                prompts, step=step, numbers=numbers, look_ahead=looks, teacher_writes=writes
            )

    def _collated(self, experience: Experience, sizes: Sequence[int]) -> list[LearningBatch]:
        """An experience as micro-batches of so many rollouts, on the device."""
        totals, device = self._totals(experience), self.accelerator.device
        packed = self.shares_rows and can_pack(self.accelerator.unwrap_model(self.model))
        parts = dealt(len(experience.rollouts), sizes)
        return [collate(experience, part, totals, device, packed=packed) for part in parts]

    def _totals(self, experience: Experience) -> Totals:
        """One denominator for all micro-batches and ranks."""
        tokens = sum(len(rollout.written) for rollout in experience.rollouts)
        guided = sum(guidance.guided for guidance in experience.guidance)
        own = [tokens, guided, len(experience.rollouts)]
        counts = torch.tensor(own, device=self.accelerator.device)
        total = self.accelerator.reduce(counts, reduction="sum").tolist()
        return Totals(*total)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        args, size = self.args, len(self.train_dataset)
        self.told.sampler = GroupSampler(size, args.num_generations, args.seed)
        return self.told.sampler

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Trainer's, of the students that are saved: at the end no other can be loaded.

        Whether it is the best so far decides whether ``save_strategy: best`` saves it; the last one
        of a run that is stopped is saved too.
        """
        args, control, watch = self.args, self.control, self.watch
        saves = control.should_save or watch.put_off or args.save_strategy == "best"
        if args.load_best_model_at_end and not saves:
            return False
        best = super()._determine_best_metric(metrics, trial)
        return best or watch.agreed is not None

    def _check_gaps(self) -> None:
        """All ranks stop if a micro-batch of the update is not what was sampled."""
        apart = self.accelerator.reduce(torch.stack(self.gaps), reduction="sum").tolist()
        limit, gaps = self.args.max_logprob_gap, [total / n for total, n in apart if n]
        for gap in (gap for gap in gaps if not gap <= limit):  # a NaN is refused too
            raise TOPDError(
                f"step {self.state.global_step}: log-probs at sampling and in training differ by "
                f"{gap:.4f} nats a token, the limit max_logprob_gap is {limit}. Sample and train "
                "in the same dtype, temperature and weights, without dropout, or raise the limit."
            )

    def _measure(self, learned: LearningTerms, trajectory: Tensor, batch: LearningBatch) -> None:
        """Add a micro-batch to the means, without waiting for the device."""
        count = len(batch["tokens"])
        detached = TokenTerms(*(term.detach() for term in learned.tokens))
        if self.args.asks_teacher:
            self.meter.add(self.args.divergence, detached.divergence.sum(), count)
        self.meter.add("entropy", detached.entropy.sum(), count)
        self.meter.add("topd/trajectory_loss", trajectory, batch["guided"])
        if learned.balance is not None:
            rollouts = len(batch["lengths"])
            self.meter.add("router_aux_loss", learned.balance.detach() * rollouts, rollouts)
        if self.args.learns_from_answers or self.args.teacher_writes(self.state.global_step):
            return
        off = (detached.logprob - batch["sampled"]).abs().sum()
        self.gaps.append(torch.stack([off, torch.full_like(off, count)]))
        self.meter.add("logprob_gap", off, count)
        if self.args.overlap:
            ratio = importance(detached.logprob, batch["sampled"], self.args.max_importance)
            self.meter.add("importance_ratio", ratio.sum(), count)
            cut = (ratio >= self.args.max_importance).sum()
            self.meter.add("importance_cut_share", cut, count)


@contextmanager
def _what_is_there_kept() -> Iterator[None]:
    """Inside, Python's garbage collector passes over all that was there before.

    Of libraries that is half a million objects, 0.3 s a full collection, now and then in an update.
    """
    if gc.get_freeze_count():  # by the application
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
