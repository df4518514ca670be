"""TOPDTrainer: transformers' Trainer with an experience phase before each update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import datasets
import torch
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from topd.config import TOPDConfig
from topd.distributed import agreed, everywhere, on_first
from topd.engines.factory import open_engines
from topd.engines.server_checks import check_servers
from topd.engines.weight_sync import ServedStudent
from topd.errors import StoppedError, TOPDError
from topd.inputs.adapters import (
    check_apart,
    check_trainable,
    merged,
    try_adapter,
    with_adapter,
)
from topd.inputs.fingerprints import fingerprint, trained_digest
from topd.inputs.heads import check_head
from topd.inputs.models import (
    ModelSource,
    check_context,
    config_of,
    generation_config_of,
    load_pair,
    source_of,
    tokenizers_of,
    with_tokenizer_of,
)
from topd.inputs.prompts import PromptEncoder
from topd.losses import TokenTerms, importance
from topd.runs import checkpoints
from topd.runs.folder import (
    RunFolder,
    check_run_folder,
    guidance_record,
    manifest,
    rollout_record,
    weights_in,
)
from topd.runs.lock import one_writer
from topd.runs.model_card import write_model_card
from topd.runs.tokens import FILE as TOKENS
from topd.runs.tokens import TokenTexts, TokenWriter
from topd.seeds import Stream
from topd.training.experience import Experience, Observer
from topd.training.inherited import check_inherited
from topd.training.learning import (
    LearningBatch,
    LearningTerms,
    Totals,
    can_pack,
    collate,
    inside_forward,
    learning_terms,
    update_loss,
)
from topd.training.metrics import Means, mean_seconds, measure_experience
from topd.training.overlap import Overlap, check_overlap
from topd.training.preflight import (
    check_forward,
    check_router,
    check_saved,
    check_saving,
    check_settings,
    mend,
    without_dropout,
)
from topd.training.progress import Phases, silence_others
from topd.training.sharded import WholeCopy, check_launch, fsdp_plugin
from topd.training.stop_rules import Watch
from topd.types import Ids, Prompt

logger = logging.get_logger(__name__)

Rows: TypeAlias = datasets.Dataset | Sequence[dict[str, Any]]


class TOPDTrainer(Trainer):
    """On-policy distillation that looks ahead, on transformers' Trainer.

    An update is an *experience* (the student writes, the teacher scores and looks ahead, a method
    gives guidance) and a *learning* phase (one forward and backward of the student). Everything
    else, from optimisers to callbacks and checkpoints, is the Trainer's.

    Args:
        model: the student, or where to load it from (float32): a path or hub name, a
            :class:`~topd.inputs.models.ModelSpec`, or its fields as a mapping.
        teacher_model: the teacher, or where to load it from, e.g.
            ``{"path": ..., "dtype": "bfloat16"}``. It is frozen.
        args: a :class:`~topd.TOPDConfig`.
        train_dataset: rows with ``prompt`` (string or messages) or ``messages``; other columns
            are for ``args.teacher_prompt``.
        eval_dataset: the same; ``evaluate`` gives the mean token divergence of fresh rollouts.
        processing_class: the tokenizer; by default that of ``model``.
        callbacks: as in Trainer.
        optimizers: as in Trainer.
        peft_config: a LoRA configuration to wrap the student in.
        teacher_processing_class: the teacher's tokenizer, where its chat template differs.

    Raises:
        TOPDError: bad data, a pair that does not fit, or a run folder that cannot be written.

    Source: arXiv 2606.00305.
    """

    args: TOPDConfig
    train_dataset: list[Prompt]
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: ModelSource | Mapping[str, Any],
        teacher_model: ModelSource | Mapping[str, Any],
        args: TOPDConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: PeftConfig | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
    ) -> None:
        args = TOPDConfig() if args is None else args
        model, teacher_model = source_of("model", model), source_of("teacher_model", teacher_model)
        model = with_tokenizer_of(model, teacher_model)
        _check_arguments(args, train_dataset, eval_dataset, peft_config)
        check_run_folder(Path(args.output_dir), resume=True)
        tokenizer, teacher_tokenizer = tokenizers_of(
            model, teacher_model, processing_class, teacher_processing_class
        )
        if args.eval_strategy != "no" and eval_dataset is None:
            raise TOPDError("eval_strategy: needs data: give eval_dataset (eval_data in a recipe).")
        if args.overlap:
            check_overlap(model, teacher_model, args)
        self.encoder = PromptEncoder(
            tokenizer,
            teacher_tokenizer,
            args.teacher_prompt,
            args.max_prompt_length,
            args.drop_long_prompts,
            cast(dict[str, Any], args.chat_template_kwargs or {}),
        )
        train_dataset, eval_dataset = _rows_of(train_dataset), _rows_of(eval_dataset)
        train = None if train_dataset is None else self._encode_training(train_dataset, args)
        evaluation = None if eval_dataset is None else self.encoder.encode(eval_dataset)
        most = _check_contexts(model, teacher_model, [*(train or ()), *(evaluation or ())], args)
        check_servers("student", model, tokenizer, most[0])
        check_servers("teacher", teacher_model, teacher_tokenizer, most[1])
        check_launch()
        if train is not None:
            check_settings(args, optimizers)
            check_saving(model, tokenizer)
        if peft_config is not None:
            try_adapter(config_of(model), peft_config, model)
        student, teacher = load_pair(model, teacher_model)
        if peft_config is not None:
            set_seed(args.seed)  # of the adapter's first weights
            student = with_adapter(student, peft_config)
        check_apart(student, teacher)
        if train is not None:
            check_trainable(student)
            check_router(student)
            _warn_of_coarse_weights(student)
        if args.disable_dropout:
            without_dropout(student)
        self.recipe: dict[str, Any] = {}  # what the run was asked for, if there was a recipe
        self.record: dict[str, Any] = {}  # of manifest.json, from the first training on
        self.meter = Means(args.world_size)  # since the latest log
        self.totals = Means(args.world_size)  # since the beginning
        self.update_loss = torch.zeros(())  # of the update under way
        self.batches: list[LearningBatch] = []  # likewise
        self.examined: dict[Path, checkpoints.Seal] = {}  # before training: not hashed again
        self._apart: str | None = None  # where a checkpoint is being made
        self.run_folder = Path(args.output_dir)
        silence_others()
        self.phases = Phases()
        self.run = RunFolder(args.output_dir, active=False)
        self.token_writer = TokenWriter(tokenizer)
        super().__init__(
            model=student,
            args=args,
            data_collator=list,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.loss_is_scaled_for_ga = True  # over the whole update: no division by accumulation
        self.compute_loss_func = update_loss  # says the same to transformers before 5.19
        self.copy = self._prepare_sharding(student)
        self.teacher_model = teacher.requires_grad_(False).eval().to(args.device)
        check_head("student", student)
        check_head("teacher", teacher)
        if args.disable_dropout:
            check_forward(student)
        mend(generation_config_of(student))
        engines = open_engines(
            (model, teacher_model),
            (student, teacher),
            (tokenizer, teacher_tokenizer),
            args.temperature,
            self.accelerator.autocast,
        )
        if isinstance(engines[0], ServedStudent) and (self.copy or args.world_size > 1):
            raise TOPDError("student.served: goes with one process only. Leave it out, or run one.")
        if self.copy:
            engines[0].model = self.copy.model
        self.shares_rows = engines[0].shares
        self.observer = Observer(*engines, args, self.phases)
        self.evaluator = Observer(*engines, args, Phases())
        self.overlap = Overlap(self.observer) if args.overlap else None
        self.fetched: list[list[Prompt]] = []  # of the update ahead
        self.watch = Watch(self)
        self.add_callback(self.watch)

    def _encode_training(self, rows: Rows, args: TOPDConfig) -> list[Prompt]:
        return self.encoder.encode(rows)

    def _prepare_sharding(self, student: PreTrainedModel) -> WholeCopy | None:
        """What the engines write with where FSDP2 is going to shard the student; else None."""
        if fsdp_plugin() is None:
            return None
        if not self.accelerator.is_fsdp2:
            raise TOPDError(
                "accelerate: FSDP shards over several accelerators, and would run DDP here. Launch "
                "without it."
            )
        student.to(self.args.device)
        policy = self.accelerator.state.fsdp_plugin.mixed_precision_policy
        return WholeCopy(student, policy.param_dtype if policy else None)

    @contextmanager
    def whole_student(self, *, exact: bool = False) -> Iterator[PreTrainedModel]:
        """The student as a plain model with its current weights; a collective under FSDP2.

        Args:
            exact: in the dtype that it is trained in, where FSDP2 computes in another.
        """
        if self.copy is None:
            yield self.accelerator.unwrap_model(self.model)
        else:
            with self.copy.gathered(self.model, exact=exact) as student:
                yield student

    # The step

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Prompt]], num_batches: int, device: torch.device
    ) -> tuple[list[LearningBatch], None]:
        """The experience of one update: prompts in, micro-batches to learn from out."""
        if 0 < self.state.max_steps <= self.state.global_step:  # resumed where it had ended
            self.control.should_training_stop = True
            return [], None
        prompts, self.fetched = self.fetched, []
        if not prompts:
            prompts, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not prompts:
            return [], None
        flat = [prompt for batch in prompts for prompt in batch]
        numbers = self._numbers([len(batch) for batch in prompts])
        with self._saved_if_stopped():
            experience = self._experience(flat, numbers)
            if self.overlap and self.state.global_step + 1 < self.state.max_steps:
                self.fetched, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
                self._begin_next()
        self._record(experience, numbers)
        totals = self._totals(experience)
        rows = iter(range(len(flat)))
        parts = [[next(rows) for _ in batch] for batch in prompts]
        packed = self.shares_rows and can_pack(self.accelerator.unwrap_model(self.model))
        self.batches = [collate(experience, p, totals, device, packed=packed) for p in parts]
        self.update_loss = torch.zeros((), device=device)
        return self.batches, None

    def _numbers(self, sizes: Sequence[int]) -> list[int]:
        """The numbers of this rank's rollouts in the update: ranks take micro-batches in turn.

        So they are those that one process has with as many times the accumulation steps.
        """
        ranks, own = self.args.world_size, self.args.process_index
        return [
            (micro * ranks + own) * sizes[0] + i for micro, n in enumerate(sizes) for i in range(n)
        ]

    def _experience(self, prompts: Sequence[Prompt], numbers: Sequence[int]) -> Experience:
        """That of this update: gathered beside the one before, or now."""
        if self.overlap:
            with self.phases.phase("waiting"):
                ready = self.overlap.take()
            if ready is not None:
                return ready
        step = self.state.global_step
        looks = self.args.looks_ahead(step)
        with self._synced():
            return self.observer.observe(prompts, step=step, numbers=numbers, look_ahead=looks)

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

    def _begin_next(self) -> None:
        """Have the next update's experience gathered while this one is learned."""
        if self.overlap and self.fetched:  # an epoch's last update has no next one
            prompts = [prompt for batch in self.fetched for prompt in batch]
            self.overlap.begin(prompts, step=self.state.global_step + 1)

    @contextmanager
    def _saved_if_stopped(self) -> Iterator[None]:
        """Keep what was learned when an experience cannot be had, as when its servers are gone.

        All ranks stop then: see :func:`~topd.distributed.agreed`.
        """
        try:
            yield
        except StoppedError:
            if self.args.save_strategy != "no" and self.state.global_step > 0:
                self._save_checkpoint(self.model, None)
            raise

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
        self._measure(terms.tokens, trajectory, inputs)
        self.update_loss = self.update_loss + loss.detach()
        loss = loss * self.accelerator.num_processes  # DDP and FSDP average gradients over ranks
        return (loss, None) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's, timed."""
        with self.phases.phase("learning"):
            return super().training_step(*args, **kwargs)

    def _terms(self, model: nn.Module, batch: LearningBatch) -> LearningTerms:
        student = self.accelerator.unwrap_model(model)

        def forward() -> LearningTerms:
            with self.accelerator.autocast():
                return learning_terms(student, batch, self.observer.teacher.head, self.args)

        return inside_forward(model, student, forward)

    def _totals(self, experience: Experience) -> Totals:
        """One denominator for all micro-batches and ranks."""
        tokens = sum(len(rollout.response) for rollout in experience.rollouts)
        guided = sum(guidance.guided for guidance in experience.guidance)
        counts = torch.tensor([tokens, guided], device=self.accelerator.device)
        total = self.accelerator.reduce(counts, reduction="sum").tolist()
        return Totals(*total)

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

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Trainer's; the loss is the mean over all tokens, however they were batched.

        A prompt that fills up the last batch of a rank counts once.
        """
        self.evaluation: dict[int, tuple[float, int]] = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        by_prompt = {n: pair for found in everywhere(self.evaluation) for n, pair in found.items()}
        divergence, tokens = (sum(column) for column in zip(*by_prompt.values(), strict=True))
        output.metrics[f"{metric_key_prefix}_loss"] = divergence / tokens
        return output

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean token divergence on fresh rollouts of the prompts, nats; rows or encoded prompts."""
        if eval_dataset is None and self.eval_dataset is None:
            raise TOPDError("eval_dataset: none was given. Give evaluate() rows, or the trainer.")
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            rows = list(eval_dataset)
            eval_dataset = rows if isinstance(rows[0], Prompt) else self.encoder.encode(rows)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, *_: Any, **__: Any) -> Any:
        """Not here: a student's answers are what ``topd eval`` writes. Raises TOPDError."""
        raise TOPDError(
            "predict: is not supported. Use evaluate() for the divergence on fresh rollouts, or "
            "topd eval (topd.evaluate.Evaluator) for answers."
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload ``student/`` and nothing else of the run folder, to ``hub_model_id``.

        Args:
            *args: commit message, as in Trainer.
            **kwargs: ``token`` and others of huggingface_hub's upload_folder.

        Raises:
            TOPDError: there is no student/ yet, or no hub_model_id.
        """
        folder, name = self.run_folder / "student", self.args.hub_model_id
        if not (folder / "README.md").exists() or not name:
            raise TOPDError(
                "push_to_hub: uploads student/, which a run has at its end, to hub_model_id. Train "
                "first, and set hub_model_id."
            )
        if not self.is_world_process_zero():
            return None
        token, message = kwargs.pop("token", None), args[0] if args else "End of training"
        api = HfApi(token=token)
        private, revision = self.args.hub_private_repo, self.args.hub_revision
        api.create_repo(name, private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, revision=revision, **kwargs
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return GroupSampler(len(self.train_dataset), self.args.num_generations, self.args.seed)

    # What is measured and written

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, writing the run folder (see :mod:`topd.runs.folder`). As in transformers."""
        if self.train_dataset is None:
            raise TOPDError("train_dataset: none was given.")
        rollouts = len(self.train_dataset) * self.args.num_generations
        micro_batch = self.args.per_device_train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and rollouts < micro_batch:
            raise TOPDError(
                "dataloader_drop_last: leaves no batch, since there are fewer rollouts than "
                "per_device_train_batch_size. Lower it, or leave dataloader_drop_last out."
            )
        checkpoint = checkpoints.resolve(resume_from_checkpoint, self.run_folder)
        if bool(resume_from_checkpoint) != bool(checkpoints.last(self.run_folder)):
            found = "no checkpoint" if resume_from_checkpoint else "checkpoints of another run"
            raise TOPDError(
                f"resume_from_checkpoint: {self.run_folder} holds {found}. Choose another folder, "
                "or resume from a checkpoint of this one."
            )
        self.args.count_updates(self._updates())
        with one_writer(self.run_folder), checkpoints.writing(self.run_folder):
            self._open_folder(checkpoint)
            try:
                result = super().train(
                    resume_from_checkpoint=str(checkpoint) if checkpoint else None, **kwargs
                )
            finally:
                if self.overlap:
                    self.overlap.close()
            self._save_student(self.record)
        return result

    def _updates(self) -> int:
        """How many updates the run is going to have."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _open_folder(self, checkpoint: Path | None) -> None:
        """Begin the records of a run, or have them as they were at a checkpoint."""
        self.record = self.record or manifest(
            models={"student": self.model, "teacher": self.teacher_model},
            data=fingerprint(self.train_dataset),
            seed=self.args.seed,
            device=self.accelerator.device,
        )
        settings = {"recipe": self.recipe, "config": self.args.to_dict()}
        if checkpoint:
            settings["resumed"] = self._go_back(checkpoint, settings)
        self.run = RunFolder(
            self.args.output_dir,
            resume=bool(checkpoint),
            active=self.is_world_process_zero(),
            chained=True,
        )
        self.run.begin(int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
        self.run.write("run.json", settings)
        if not checkpoint:
            self.run.write("manifest.json", self.record)

    def _go_back(self, checkpoint: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Have run folder and means as they were at a checkpoint. Returns run.json's ``resumed``.

        Raises:
            TOPDError: the checkpoint is damaged or cannot be resumed from, or the run was begun
                with other data or another teacher.
        """
        seal = self.examined.pop(checkpoint, None) or checkpoints.check(checkpoint, resumable=True)
        history = checkpoints.check_same(
            self.run_folder,
            seal.step,
            settings,
            self.record,
            dated="strftime_now" in str(self.processing_class.chat_template),
        )
        if self.is_world_process_zero():
            checkpoints.cut_back(self.run_folder, seal)
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            checkpoints.prune(
                self.run_folder, self.args.save_total_limit, state.best_model_checkpoint
            )
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():  # the means are those over all ranks
            self.meter.load(seal.means["meter"])
            self.totals.load(seal.means["totals"])
        self.token_writer = TokenWriter(
            self.processing_class, TokenTexts.read(self.run_folder).pieces
        )
        return history

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's, atomically (see :mod:`topd.runs.checkpoints`)."""
        run, step = self.run_folder, self.state.global_step
        if everywhere((run / f"checkpoint-{step}").exists())[0]:
            return  # an epoch may end where a step was saved
        means = {"meter": self.meter.state(), "totals": self.totals.state()}
        note = partial(self.run.seal_as, f"checkpoint-{step}/{checkpoints.SEAL}")
        active = self.args.should_save
        with checkpoints.making(run, step, means, note, active=active) as place:
            self.accelerator.wait_for_everyone()
            self._apart = str(place.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._apart = None
            if self.state.best_model_checkpoint == str(place):
                self.state.best_model_checkpoint = str(run / place.name)
                self.state.save_to_json(str(place / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()  # it has its name
        if self.args.should_save:
            checkpoints.prune(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        """Trainer's; while a checkpoint is being made, the folder apart that it is made in."""
        return self._apart or super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Trainer's, without the pickled arguments: run.json has them as text."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink()

    def _save_student(self, record: dict[str, Any]) -> None:
        """The whole student into ``student/``, LoRA merged (and the adapter into ``adapter/``)."""
        folder = Path(self.args.output_dir) / "student"
        if isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            self.save_model(str(folder.with_name("adapter")))
            with self.whole_student(exact=True) as model:
                if self.args.should_save:
                    merged(model).save_pretrained(folder)
                    self.processing_class.save_pretrained(folder)
        else:
            self.save_model(str(folder))
        with self.whole_student(exact=True) as model:
            agreed(lambda: check_saved(folder, model) if self.args.should_save else None)
        trained = trained_digest(self.model)
        if self.args.should_save:
            self.run.seal(*weights_in(self.run.folder, "student"))
            self.run.note("end", step=self.state.global_step, student=trained)
            history, ledger = self.state.log_history, self.run.ledger
            write_model_card(folder, record, self.args, history, ledger)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with what the update measured; also a line of metrics.jsonl.

        Seconds are means over ranks.
        """
        if "train_loss" in logs:
            logs = {**logs, **self.totals.take()}
        if "loss" in logs:
            seconds = mean_seconds(everywhere(self.phases.take()))
            self.meter.add("tokens_per_second", 0, sum(seconds.values()) / self.args.world_size)
            logs = {**logs, **self.meter.take()}
            logs.update({f"seconds/{name}": spent for name, spent in seconds.items()})
        super().log(logs, start_time)
        self.run.append("metrics.jsonl", [self.state.log_history[-1]])

    def _measure(self, terms: TokenTerms, trajectory: Tensor, batch: LearningBatch) -> None:
        """Add a micro-batch to the means; all ranks stop if it is not what was sampled."""
        count, detached = len(batch["tokens"]), TokenTerms(*(term.detach() for term in terms))
        self.meter.add(self.args.divergence, detached.divergence.sum(), count)
        self.meter.add("entropy", detached.entropy.sum(), count)
        self.meter.add("topd/trajectory_loss", trajectory, batch["guided"])
        if self.args.learns_from_answers:
            return
        off = (detached.logprob - batch["sampled"]).abs().sum()
        apart = torch.stack([off, torch.full_like(off, count)])
        total, tokens = self.accelerator.reduce(apart, reduction="sum").tolist()
        gap = total / tokens if tokens else 0.0
        if not gap <= self.args.max_logprob_gap:  # a NaN is refused too
            raise TOPDError(
                f"step {self.state.global_step}: log-probs at sampling and in training differ by "
                f"{gap:.4f} nats a token, the limit max_logprob_gap is "
                f"{self.args.max_logprob_gap}. Sample and train in the same dtype, temperature and "
                "weights, without dropout, or raise the limit."
            )
        self.meter.add("logprob_gap", off, count)
        if self.args.overlap:
            ratio = importance(detached.logprob, batch["sampled"], self.args.max_importance)
            self.meter.add("importance_ratio", ratio.sum(), count)
            cut = (ratio >= self.args.max_importance).sum()
            self.meter.add("importance_cut_share", cut, count)

    def _record(self, experience: Experience, numbers: Sequence[int]) -> None:
        """Measure an experience; write it and those of the other ranks to the run folder."""
        measure_experience(self.meter, experience)
        if not self.args.log_rollouts:
            return
        step, trained = self.state.global_step, trained_digest(self.model)
        own = [self._records(step, i, n, experience) for i, n in enumerate(numbers)]
        pairs = [pair for found in on_first(own) for pair in found]
        if not pairs:
            return
        pairs.sort(key=lambda pair: pair[0]["rollout"])
        rollouts, guidance = (list(records) for records in zip(*pairs, strict=True))
        self.run.note("update", step=step, student=trained)
        self.run.append(TOKENS, self.token_writer.records(_all_ids(rollouts, guidance)))
        self.run.append("rollouts.jsonl", rollouts)
        self.run.append("guidance.jsonl", guidance)

    def _records(
        self, step: int, row: int, number: int, experience: Experience
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the run folder keeps of one rollout and its guidance."""
        rollout, guidance = experience.rollouts[row], experience.guidance[row]
        text = self.processing_class.decode(list(rollout.response))
        scores = experience.teacher_logprobs[row].tolist()
        return (
            rollout_record(step, number, rollout, scores, text),
            guidance_record(step, number, rollout, experience.forks[row], guidance),
        )


def _all_ids(
    rollouts: Sequence[Mapping[str, Any]], guidance: Sequence[Mapping[str, Any]]
) -> Iterator[Sequence[int]]:
    """Every sequence of tokens in an update: prompts, responses, the teacher's windows."""
    for rollout in rollouts:
        yield from (rollout[f"{key}_ids"] for key in ("prompt", "teacher_prompt", "response"))
    yield from (fork["teacher_tokens"] for row in guidance for fork in row["forks"])


class GroupSampler(Sampler[int]):
    """Every index ``group`` times in a row, in an order redrawn each epoch."""

    def __init__(self, size: int, group: int, seed: int) -> None:
        self.size, self.group, self.seed, self.epoch = size, group, seed, 0

    def __len__(self) -> int:
        return self.size * self.group

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for index in torch.randperm(self.size, generator=generator).tolist():
            yield from [index] * self.group

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch


def _check_arguments(args: Any, train: Any, evaluation: Any, peft_config: Any) -> None:
    """What can be said before anything is read."""
    if not isinstance(args, TOPDConfig):
        raise TOPDError(f"args: must be a TOPDConfig, not {type(args).__name__}.")
    for name, rows in (("train_dataset", train), ("eval_dataset", evaluation)):
        if isinstance(rows, datasets.IterableDataset):
            raise TOPDError(f"{name}: streaming is not supported. Load it, or take a part of it.")
        if isinstance(rows, dict):
            raise TOPDError(f"{name}: has splits {', '.join(map(str, rows))}. Choose one of them.")
        if isinstance(rows, str | Path):
            raise TOPDError(
                f"{name}: is a path. Load it: topd.inputs.rows.DataSpec(path={str(rows)!r}).load()."
            )
        if isinstance(rows, Sequence) and not all(isinstance(row, Mapping) for row in rows):
            raise TOPDError(
                f"{name}: its rows must be mappings such as {{'prompt': 'What is 1 + 2?'}}."
            )
    check_inherited(args)
    if args.n_gpu > 1:
        logger.warning(
            f"{args.n_gpu} GPUs are visible; a process uses one. For all: accelerate launch."
        )
        args._n_gpu = 1  # else Trainer would run DataParallel, over other rollouts than asked for


def _rows_of(data: Any) -> Any:
    """The rows of a pandas DataFrame; other data as it is."""
    return data.to_dict("records") if hasattr(data, "to_dict") and hasattr(data, "iloc") else data


def _check_contexts(
    student: ModelSource, teacher: ModelSource, prompts: Sequence[Prompt], args: TOPDConfig
) -> tuple[int, int]:
    """The most tokens that either is asked for at once. Raises TOPDError if they do not fit."""
    longest = [max((len(ids) for ids in side), default=0) for side in _prompt_ids(prompts)]
    windows = args.guidance_method().looks_ahead
    for name, model, length in zip(
        ("student", "teacher"), (student, teacher), longest, strict=True
    ):
        ahead = args.longest_window if name == "teacher" and windows else 0
        check_context(name, model, length + args.max_completion_length + ahead)
    student_most, teacher_most = (length + args.max_completion_length for length in longest)
    return student_most, teacher_most + args.longest_window


def _prompt_ids(prompts: Sequence[Prompt]) -> tuple[list[Ids], list[Ids]]:
    return [p.student for p in prompts], [p.teacher for p in prompts]


def _warn_of_coarse_weights(student: PreTrainedModel) -> None:
    dtypes = {p.dtype for p in student.parameters() if p.requires_grad}
    if dtypes - {torch.float32, torch.float64}:
        logger.warning(
            f"student: its trainable weights are {dtypes}; small updates are lost in rounding. "
            "Load it in float32 and set bf16: true for mixed precision."
        )
