"""A Trainer with a run folder: what is written while it trains, and how it resumes from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME

from topd.config import TOPDConfig
from topd.distributed import agreed, everywhere, on_first, several
from topd.errors import StoppedError, TOPDError
from topd.inputs.models.adapters import merged
from topd.inputs.models.bare import named_faults
from topd.inputs.models.fingerprints import is_elsewhere, saved_digest, trained_digest
from topd.inputs.self_teacher import Average
from topd.runs import checkpoints
from topd.runs.folder import (
    RunFolder,
    files_in,
    guidance_record,
    holds_a_run,
    manifest,
    rollout_record,
)
from topd.runs.hub import check_upload, upload
from topd.runs.lock import one_writer
from topd.runs.model_card import write_model_card
from topd.runs.tokens import FILE as TOKENS
from topd.runs.tokens import TokenTexts, TokenWriter
from topd.training.experience.evidence import Experience
from topd.training.metrics import Means, mean_seconds, measure_experience
from topd.training.progress import Phases, say
from topd.training.sharded import WholeCopy, check_kind, whole_copy
from topd.training.startup.alike import check_ranks_agree, data_prints
from topd.training.startup.loaded import LoadingTrainer
from topd.training.startup.preflight import check_saved
from topd.training.startup.resumed import check_resumed
from topd.training.stop_rules import save_done, saved_once_done
from topd.training.trackers import Tables, log_tables, tables_of
from topd.types import Prompt


class Begun(NamedTuple):
    """How a run stood before the records of update ``step``: what a checkpoint has without it."""

    step: int
    meter: Means
    totals: Means
    records: dict[str, int]


class RecordedTrainer(LoadingTrainer):
    """transformers' Trainer for a student and a frozen teacher, which writes a run folder.

    Args:
        student: the model that is trained.
        teacher: the model that is not, or several as one module.
        args: a :class:`~topd.TOPDConfig`; its ``output_dir`` is the run folder.
        tokenizer: the student's.
        **rest: data, callbacks and optimizers, as in Trainer.

    What is written is in :mod:`topd.runs.folder`; a checkpoint has a seal, and a run that resumes
    from one has the records that it would have had without the stop.
    """

    # of a folder whose run has ended, a line to print; set by the top of the package: its page
    at_end: Callable[[Path], str] | None = None

    args: TOPDConfig
    train_dataset: list[Prompt]
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | nn.Module,
        args: TOPDConfig,
        tokenizer: PreTrainedTokenizerBase,
        **rest: Any,
    ) -> None:
        self.recipe: dict[str, Any] = {}  # what the run was asked for, if there was a recipe
        self.record: dict[str, Any] = {}  # of manifest.json, from the first training on
        self.meter = Means(args.world_size)  # since the latest log
        self.totals = Means(args.world_size)  # since the beginning
        self.examined: dict[Path, checkpoints.Seal] = {}  # before training: not hashed again
        self.average: Average | None = None  # of a teacher that is the student's average
        self.tables: Tables = {}  # of the latest update, for trackers
        self._begun: Begun | None = None  # the latest update
        self._apart: str | None = None  # where a checkpoint is being made
        self.run_folder = Path(args.output_dir)
        self.run = RunFolder(args.output_dir, active=False)
        self.token_writer = TokenWriter(tokenizer)
        self.phases = Phases()
        super().__init__(
            model=student, args=args, data_collator=list, processing_class=tokenizer, **rest
        )
        self.copy: WholeCopy | None = whole_copy(student, self.accelerator)
        frozen = teacher if teacher is student else teacher.requires_grad_(False).eval()
        self.teacher_model = frozen.to(args.device)

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
        checkpoint = everywhere(checkpoints.resolve(resume_from_checkpoint, self.run_folder))[0]
        found = checkpoints.last(self.run_folder)
        if found and not resume_from_checkpoint:
            raise TOPDError(holds_a_run(self.run_folder))
        if resume_from_checkpoint and not found:
            raise TOPDError(
                f"resume_from_checkpoint: {self.run_folder} holds no checkpoint. Leave it out; "
                "where the records of a run are, choose another output_dir too."
            )
        if checkpoint and self.args.window_replay:
            raise TOPDError(
                f"resume_from_checkpoint: {checkpoint} does not hold the windows of window_replay, "
                "so the run would be another. Start over in another folder."
            )
        self.args.count_updates(self._updates())
        with one_writer(self.run_folder), checkpoints.writing(self.run_folder):
            self._open_folder(checkpoint)
            if self.average and checkpoint:
                self.average.load(checkpoint)
            with closing(self.run), saved_once_done(self):
                result = super().train(str(checkpoint) if checkpoint else None, **kwargs)
                self._save_student(self.record)
        if self.at_end and self.is_world_process_zero():
            say(Console(), self.at_end(self.run_folder))
        return result

    def _updates(self) -> int:
        """How many updates the run is going to have."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _open_folder(self, checkpoint: Path | None) -> None:
        """Begin the records of a run, or have them as they were at a checkpoint."""
        data, teacher = data_prints(self.train_dataset, self.eval_dataset), self.teacher_model
        made = self.record or manifest(
            models={"student": self.model, "teacher": self.model if self.average else teacher},
            data=data["data"],
            seed=self.args.seed,
            device=self.accelerator.device,
            settings=vars(self.args),
        )
        self.record = {**made, **data}  # of the current data
        check_ranks_agree(self.args, self.train_dataset, self.eval_dataset, self.record)
        self._begun, self.has_best, args = None, False, self.args
        settings = {"recipe": self.recipe, "config": args.to_dict(), "ranks": args.world_size}
        if checkpoint:
            settings["resumed"] = self._go_back(checkpoint, settings)
        active = self.is_world_process_zero()
        self.run = RunFolder(args.output_dir, resume=bool(checkpoint), active=active, chained=True)
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
        check_kind(checkpoint, seal.files, self.copy)
        history = checkpoints.check_same(
            self.run_folder,
            seal.step,
            settings,
            self.record,
            named=is_elsewhere(self.teacher_model),
            dated="strftime_now" in str(self.processing_class.chat_template),
        )
        check_resumed(checkpoint, self.model, history[-1]["changed"], self.args)
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
        self.make_checkpoint(model, trial)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            checkpoints.prune(self.run_folder, self.args.save_total_limit, best)

    def make_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """One of the updates that are done: of one under way it has no record."""
        run, step = self.run_folder, self.state.global_step
        if everywhere((run / f"checkpoint-{step}").exists())[0]:
            return  # an epoch may end where a step was saved
        meter, totals, records = self.meter, self.totals, None
        if self._begun and self._begun.step == step:
            _, meter, totals, records = self._begun
        means = {"meter": meter.state(), "totals": totals.state()}
        note = partial(self.run.seal_as, f"checkpoint-{step}/{checkpoints.SEAL}")
        active = self.args.should_save
        making = partial(checkpoints.making, run, step, means, saved_digest(self.model), note)
        with making(active=active, records=records) as place:
            self.accelerator.wait_for_everyone()
            self._apart = str(place.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._apart = None
            if self.average and active:
                self.average.save(place)
            if self.state.best_model_checkpoint == str(place):
                self.state.best_model_checkpoint = str(run / place.name)
                if active:
                    self.state.save_to_json(str(place / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()  # it has its name

    def _get_output_dir(self, trial: Any) -> str:
        """Trainer's; while a checkpoint is being made, the folder apart that it is made in."""
        return self._apart or super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Trainer's, without the pickled arguments: run.json has them as text."""
        with named_faults():
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
                    with named_faults():
                        self.processing_class.save_pretrained(folder)
        else:
            self.save_model(str(folder))
        with self.whole_student(exact=True) as model:
            agreed(lambda: check_saved(folder, model) if self.args.should_save else None)
        trained = trained_digest(self.model)
        if self.args.should_save:
            self.run.seal(*files_in(self.run.folder, "student", "adapter"))
            self.run.note("end", step=self.state.global_step, student=trained)
            history, ledger = self.state.log_history, self.run.ledger
            best = self.state.best_global_step if self.args.load_best_model_at_end else None
            write_model_card(folder, record, self.args, history, ledger, best=best)

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
        if self.tables:
            report_to, callbacks = self.args.report_to or (), self.callback_handler.callbacks
            log_tables(self.tables, self.state.global_step, report_to, callbacks)
            self.tables = {}

    def _record(self, experience: Experience, numbers: Sequence[int]) -> None:
        """Measure an experience; write it and those of the other ranks to the run folder."""
        begun = self.meter.copy(), self.totals.copy(), checkpoints.sizes(self.run_folder)
        self._begun = Begun(self.state.global_step, *begun)
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
        if self.args.log_completions:
            self.tables = tables_of(rollouts, guidance, self.processing_class)

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

    # What is kept elsewhere

    @contextmanager
    def saved_if_stopped(self) -> Iterator[None]:
        """Keep the updates that are done where something stops the run and no weight has changed.

        So it is until the optimiser's step. Of several ranks all raise a TOPDError (see
        :func:`~topd.distributed.agreed`); what one of them alone raises lets none of them save.

        Raises:
            StoppedError: in place of a TOPDError, with where the checkpoint is and how to continue.
        """
        try:
            yield
        except TOPDError as fault:
            if saved := save_done(self):
                raise StoppedError(f"{fault} {saved}", fault.exit_code) from fault
            raise
        except Exception as fault:
            if not several() and (saved := save_done(self)):
                fault.add_note(saved)
            raise

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload ``student/`` and nothing else of the run folder, to ``hub_model_id``.

        Arguments as in Trainer, but ``kwargs``: others of huggingface_hub's upload_folder. Raises
        TOPDError if one is unknown, there is no student/ yet, or no hub_model_id.
        """
        folder, args = self.run_folder / "student", self.args
        check_upload(folder, args.hub_model_id, kwargs)
        if not self.is_world_process_zero():
            return None
        return upload(
            folder,
            args.hub_model_id,
            token=token,
            private=args.hub_private_repo if private is None else private,
            commit_message=commit_message,
            revision=revision or args.hub_revision,
            run_as_future=not blocking,
            **kwargs,
        )


def _all_ids(
    rollouts: Sequence[Mapping[str, Any]], guidance: Sequence[Mapping[str, Any]]
) -> Iterator[Sequence[int]]:
    """Every sequence of tokens in an update: prompts, responses, the teacher's windows."""
    for rollout in rollouts:
        yield from (rollout[f"{key}_ids"] for key in ("prompt", "teacher_prompt", "response"))
    yield from (fork["teacher_tokens"] for row in guidance for fork in row["forks"])
