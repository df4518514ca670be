"""Looking after a run: rules that stop it when it collapses, losses that are not finite, signals.

Every rule compares the last ``stop_patience`` logs, all of them, with the best of the first ones:
no single update stops a run, and no figure does that was as bad from the start.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from topd import distributed as ranks
from topd.config import TOPDConfig
from topd.distributed import whole
from topd.errors import COLLAPSED, NONFINITE, TERMINATED, StoppedError
from topd.runs.checkpoints import how_to_resume

if TYPE_CHECKING:
    from topd.training.learning import LearningBatch
    from topd.training.recorded import RecordedTrainer
    from topd.training.trainer import TOPDTrainer

logger = logging.get_logger(__name__)

SIGNALS: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ENDS = "should_training_stop", "should_epoch_stop"
PASSED_ON = 3.0  # seconds: a batch system signals all processes, and their launcher them again
UNDER_WAY = (
    "finishing the update under way, then saving a checkpoint. Once more, after "
    f"{PASSED_ON:g} seconds, ends at once."
)


@dataclass(frozen=True)
class Rule:
    """One figure of the log and how far it may go from where it started.

    Args:
        limit: the field of TOPDConfig that has the limit, as a multiple of the start.
        figure: its name in the log.
        what: it, in words.
        rest: look at 1 - figure.
        above: the rule is for a figure that grows.
        floor: least start that is reckoned with, so that nothing grows from next to nothing.
    """

    limit: str
    figure: str
    what: str
    rest: bool = False
    above: bool = False
    floor: float = 0.0

    def broken(self, logs: Sequence[Mapping[str, float]], args: TOPDConfig) -> str:
        """What was seen and what the limit is; empty if the rule holds.

        An update of which no token counts has no such figure, and is passed over.
        """
        share, count = getattr(args, self.limit), args.stop_patience
        seen = [log[self.figure] for log in logs if self.figure in log]
        values = [1 - value if self.rest else value for value in seen]
        if not share or not count or len(values) < 2 * count:
            return ""
        start = min(values[:count]) if self.above else max(values[:count])
        latest = values[-count:]
        limit = share * max(start, self.floor)
        if min(latest) <= limit if self.above else max(latest) >= limit:
            return ""
        return (
            f"{self.what} was {min(latest):.4g} to {max(latest):.4g} in the last {count} logs and "
            f"{start:.4g} at best in the first {count}; the limit is {limit:.4g} "
            f"({self.limit}: {share:g})"
        )


def rules(args: TOPDConfig) -> tuple[Rule, ...]:
    """The rules of a run. On answers written beforehand only the divergence says something.

    Where it is no part of the loss (``kd_ratio: 0``) the cross-entropy stands for it.
    """
    divergence = Rule("stop_divergence", args.divergence, "divergence", above=True, floor=0.5)
    if args.learns_from_answers:
        alone = replace(divergence, figure="loss", what="cross-entropy")
        return (divergence if args.kd_ratio else alone,)
    return (
        *([divergence] if args.asks_teacher else []),
        Rule("stop_length", "completions/mean_length", "mean response length"),
        Rule("stop_finished", "completions/clipped_ratio", "share of finished responses", True),
        Rule("stop_fresh", "completions/repeated_4gram_share", "share of new 4-grams", True),
        Rule("stop_entropy", "entropy", "entropy"),
    )


class Watch(TrainerCallback):
    """Ends a run that should not continue: it saves a checkpoint, then raises StoppedError."""

    def __init__(self, trainer: TOPDTrainer) -> None:
        self.trainer = trainer
        self.reason: StoppedError | None = None
        self.agreed: StoppedError | None = None  # what all ranks end for
        self.put_off = False  # the checkpoint of an epoch's last update
        self.over = False  # resumed where it had ended
        self.ends: set[str] = set()  # what was asked for within the update

    def on_train_begin(self, args: TOPDConfig, state: TrainerState, *_: Any, **__: Any) -> None:
        """Say it where a resumed run has nothing left to learn."""
        self.put_off, self.over = False, 0 < state.max_steps <= state.global_step
        self.ends.clear()
        if self.over and state.is_world_process_zero:
            logger.warning(
                f"{self.trainer.run_folder}: {state.global_step} updates are done, and the run is "
                f"to have {state.max_steps}, so nothing more is learned. For more raise max_steps "
                "or num_train_epochs."
            )

    def on_pre_optimizer_step(
        self, args: TOPDConfig, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Add up the update's loss. One that is not finite, or has such a gradient, is no update.

        Raises:
            StoppedError: so ``nonfinite: stop`` has it; the batch and the weights are on disk.
        """
        trainer, loss = self.trainer, self.trainer.update_loss
        trainer.meter.add("loss", loss)
        if self._finite(loss):
            trainer.totals.add("train_loss", loss)
            return
        fault = f"update {state.global_step + 1}: the loss ({float(loss)}) or a gradient is not "
        folder = trainer.run_folder / f"fault-{state.global_step}"
        save_batches(trainer.batches, folder, ranks.rank())
        if args.nonfinite == "skip":
            trainer.model.zero_grad(set_to_none=True)  # an optimiser passes over what has none
            logger.warning(f"{fault}finite. It is left out; {folder} has its batch.")
            return
        with trainer.saved_if_stopped():
            trainer.save_model(str(folder))
            raise StoppedError(
                f"{fault}finite. {folder} has its batch and the weights; topd replay "
                f"{trainer.run_folder} --step {state.global_step} makes it again. Lower "
                "learning_rate or max_grad_norm, or leave such updates out with nonfinite: skip; "
                "then continue with resume_from_checkpoint: last.",
                NONFINITE,
            )

    def _finite(self, loss: Tensor) -> bool:
        accelerator = self.trainer.accelerator
        values = [loss]
        if accelerator.scaler is None:  # fp16's scaler looks after overflows itself
            gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
            values.append(whole(nn.utils.get_total_norm(gradients)))
        finite = torch.stack([value.isfinite().all() for value in values]).all()
        return int(accelerator.reduce(finite.long(), "sum")) == accelerator.num_processes

    def on_log(
        self, args: TOPDConfig, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Apply the rules to the log of an update."""
        if "loss" not in state.log_history[-1]:  # a callback's own, which one rank may have alone
            return
        _agree(control)
        logs = [log for log in state.log_history if "loss" in log]
        found = [rule.broken(logs, args) for rule in rules(args)]
        if any(found):
            control.should_save = True
            self.reason = self.agreed = StoppedError(
                f"update {state.global_step}: the run collapsed. {'; '.join(filter(None, found))}. "
                "Look at its rollouts (topd report), then resume from an earlier checkpoint with a "
                "lower learning_rate, or change the limit (null: no limit).",
                COLLAPSED,
            )

    def on_evaluate(self, _: object, __: object, control: TrainerControl, **___: Any) -> None:
        """Have all ranks do what a callback of one asks for; likewise at other events."""
        _agree(control)

    def on_substep_end(self, _: object, __: object, control: TrainerControl, **___: Any) -> None:
        """Have an update that was begun done, on all ranks; then comes the end that is asked for.

        No collective: it would wait for the device at every micro-batch.
        """
        self.ends |= {name for name in ENDS if getattr(control, name)}
        vars(control).update(dict.fromkeys(ENDS, False))

    def on_step_end(
        self, args: TOPDConfig, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Have a checkpoint saved if the run is to end here, on all ranks.

        That of an epoch's last update waits for what is logged and evaluated at its end: a run
        that resumes from it begins with the next epoch.
        """
        vars(control).update(dict.fromkeys(self.ends, True))
        self.ends.clear()
        _agree(control)
        reasons = [reason for reason in ranks.everywhere(self.reason) if reason is not None]
        self.reason = self.agreed = reasons[0] if reasons else None
        control.should_save |= self.agreed is not None
        last = (state.epoch or 0) % 1 == 0 or control.should_training_stop
        if last and "epoch" in (args.logging_strategy, args.eval_strategy):
            self.put_off, control.should_save = control.should_save, False

    def on_epoch_end(
        self, args: TOPDConfig, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Have the checkpoint saved that was put off. Nothing is evaluated a second time."""
        _agree(control)
        control.should_save |= self.put_off
        control.should_evaluate &= not self.over
        self.put_off = False

    def on_save(
        self, args: TOPDConfig, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """End the run, now that it can be resumed. Raises StoppedError."""
        _agree(control)
        if self.agreed is None:
            return
        reason, self.reason, self.agreed = self.agreed, None, None  # the trainer may resume
        if reason.exit_code == TERMINATED:
            done, folder = state.global_step, self.trainer.run_folder
            raise StoppedError(
                f"{reason} The update under way is finished, and {folder}/checkpoint-{done} "
                f"is saved: {done} of {state.max_steps} updates. {how_to_resume(folder)}",
                TERMINATED,
            )
        raise reason

    def end_if_asked(self, saved: str) -> None:
        """Raise the StoppedError that is due, on all ranks: what is on disk by now is ``saved``."""
        for reason in ranks.everywhere(self.reason):
            if reason is not None:
                said = f"{reason} {saved} {how_to_resume(self.trainer.run_folder)}"
                raise StoppedError(said, reason.exit_code)

    @contextmanager
    def until_terminated(self) -> Iterator[None]:
        """Take SIGTERM, SIGHUP and Ctrl-C as the wish to end after the update under way.

        A second one ends at once, unless it comes within ``PASSED_ON``. Only the main thread is
        told of signals; in another one nothing changes, nor of a SIGHUP that ``nohup`` ignores.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {}
        asked: list[float] = []

        def end(number: int, _: Any) -> None:
            asked.append(time.monotonic())
            if len(asked) > 1:
                if asked[-1] - asked[0] >= PASSED_ON:
                    signal.signal(number, before[number])
                    signal.raise_signal(number)
                return
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            self.reason = StoppedError(f"{name}: the run was stopped.", TERMINATED)
            if number == signal.SIGHUP:
                _leave_terminal()
            if ranks.rank() == 0:
                os.write(2, f"\n{name}: {UNDER_WAY}\n".encode())  # print is not to be interrupted

        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            before[number] = signal.getsignal(number) or signal.SIG_DFL
            signal.signal(number, end)
        try:
            yield
        finally:
            self.reason = self.agreed = None
            for number, handler in before.items():
                signal.signal(number, handler)


def _leave_terminal() -> None:
    """Drop what is printed from now on, but to a file: no one reads it, and writing would fail."""
    with open(os.devnull, "wb") as nowhere, suppress(OSError):  # of a process without them
        for stream in (1, 2):
            if not stat.S_ISREG(os.fstat(stream).st_mode):
                os.dup2(nowhere.fileno(), stream)


def _agree(control: TrainerControl) -> None:
    """Have all ranks do what a callback of one asks for: else they would do different things, and
    each wait for the other. A collective.
    """
    asked = ranks.everywhere(control.state()["args"])  # without what a callback keeps in it
    vars(control).update({name: any(own[name] for own in asked) for name in asked[0]})


def save_done(trainer: RecordedTrainer) -> str:
    """Save a checkpoint of the updates that are done, if any are; what to say of it.

    A collective. No other checkpoint is removed for it. Where none is wanted, one is saved once all
    updates are done. Weights that are not finite are not saved: an earlier checkpoint is to be
    resumed from. Nor are those of the best student in place of the last one's.
    """
    done, run = trainer.state.global_step, trainer.run_folder
    if done == 0 or (trainer.args.save_strategy == "no" and done < trainer.state.max_steps):
        return ""
    if trainer.has_best and not (run / f"checkpoint-{done}").exists():
        return ""
    try:
        if not all(whole(p).isfinite().all() for p in trainer.model.parameters()):
            return "The student's weights are not finite, so no checkpoint of them is saved."
        trainer.make_checkpoint(trainer.model, None)
    except (RuntimeError, StoppedError) as error:
        return f"No checkpoint could be saved: {error}"
    updates = f"{done} of {trainer.state.max_steps} updates"
    return f"{run}/checkpoint-{done} is saved: {updates}. {how_to_resume(run)}"


@contextmanager
def saved_once_done(trainer: RecordedTrainer) -> Iterator[None]:
    """Save a checkpoint of a run whose updates are all done, where anything stops it inside."""
    before = trainer.state  # of an earlier training
    try:
        yield
    except StoppedError:
        raise
    except Exception:
        done, updates = trainer.state.global_step, trainer.state.max_steps
        saved = (trainer.run_folder / f"checkpoint-{done}").exists()
        if trainer.state is before or saved or not 0 < updates <= done:
            raise
        with trainer.saved_if_stopped():
            raise


def save_batches(batches: Sequence[LearningBatch], folder: Path, rank: int = 0) -> None:
    """Write the tensors of an update's micro-batches: ``MICRO-BATCH.NAME`` in batch.safetensors.

    Those of other ranks go into batch-RANK.safetensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{i}.{name}": value.contiguous()
        for i, batch in enumerate(batches)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    save_file(tensors, folder / (f"batch-{rank}.safetensors" if rank else "batch.safetensors"))
