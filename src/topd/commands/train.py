"""From a recipe to a finished run folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback, TrainerState

from topd.commands.keys import from_command_line
from topd.commands.recipe import Recipe, read_recipe
from topd.commands.session import quieten
from topd.distributed import agreed, everywhere, rank
from topd.errors import TOPDError
from topd.evaluate import EvaluationCallback, Evaluator
from topd.evaluate.callback import check_one_turn
from topd.inputs.models.adapters import adapted
from topd.runs import checkpoints
from topd.runs.folder import check_run_folder, check_trains_here
from topd.runs.lock import one_writer
from topd.runs.verified import not_of_the_end
from topd.training.footprint import memory_warning
from topd.training.progress import Phases, log_line, moves, say
from topd.training.trainer import TOPDTrainer
from topd.training.warmstart import WarmstartTrainer


def run_recipe(
    path: Path, words: Sequence[str] = (), *, quiet: bool = False, warmstart: bool = False
) -> Path:
    """Check a recipe, train, and return the run folder. Raises TOPDError for bad input."""
    recipe = read_recipe(*from_command_line(path, words), warmstart=warmstart)
    return train_recipe(recipe, quiet=quiet)


def train_recipe(recipe: Recipe, *, quiet: bool = False, alone: bool = True) -> Path:
    """Train as a checked recipe says, and return the run folder.

    A run that is not ``alone``, but a part of another command, ends at once when it is interrupted.
    Raises TOPDError for bad input.
    """
    args = recipe.args
    asked = args.eval_strategy != "no" or args.eval_on_start
    shared = args.learns_from_answers or not alone  # the recipe is another command's too
    if recipe.eval_data and not asked and not shared:
        raise TOPDError("eval_data: has no effect without eval_strategy. Set it, e.g. to steps.")
    args.output_dir = everywhere(args.output_dir)[0]  # it may have a rank's time
    folder = Path(recipe.args.output_dir)
    resume = bool(recipe.args.resume_from_checkpoint)
    agreed(lambda: check_run_folder(folder, resume=resume))  # none removes what others have made
    check_trains_here(folder)
    with one_writer(folder):
        _train(recipe, folder, quiet=quiet, alone=alone)
    return folder


def _train(recipe: Recipe, folder: Path, *, quiet: bool, alone: bool) -> None:
    """Everything after the folder is ours. Raises TOPDError for bad input."""
    wanted = recipe.args.resume_from_checkpoint
    checkpoint = everywhere(checkpoints.resolve(wanted, folder))[0]  # NFS shows it late elsewhere
    examined = {checkpoint: checkpoints.check(checkpoint, resumable=True)} if checkpoint else {}
    if wanted and not checkpoint:
        agreed(lambda: _begin_anew(folder) if rank() == 0 else None)
    quieten()
    recipe.args.disable_tqdm = True
    console = Console(quiet=rank() > 0)
    rows = recipe.data.load()
    say(console, f"loading {recipe.student.path} and {recipe.teacher.path}, encoding {len(rows):,} "
        "prompts")  # fmt: skip
    for line in not_of_the_end(Path(recipe.student.path).expanduser()):
        say(console, line)
    trainer, _ = make_trainer(recipe, rows)
    trainer.examined = examined
    left_out = len(rows) - len(trainer.train_dataset)
    if left_out:
        say(console, f"{left_out:,} of {len(rows):,} prompts are too long and left out")
    if checkpoint:
        say(console, f"resuming from {checkpoint.name}")
    say(console, trainer.args.settings_of_method())
    if isinstance(trainer.model, PeftModel):
        say(console, adapted(trainer.model))
    average = trainer.average.bytes if trainer.average else 0
    large = memory_warning(
        trainer.model, trainer.teacher_model, trainer.args, trainer.train_dataset, average
    )
    if large:
        say(console, f"warning: {large}")
    _watch(trainer, console, bars=moves(console) and not quiet)
    try:
        with trainer.watch.until_terminated() if alone else nullcontext():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else False)
    finally:
        trainer.phases.stop()


def _watch(trainer: TOPDTrainer, console: Console, *, bars: bool) -> None:
    """Show how a run continues: bars on a terminal, else a short line a log."""
    if console.quiet:
        return
    if bars:
        watch_steps(trainer, console)
    else:
        trainer.phases.show(console, bars=False)
        trainer.add_callback(_LogLines(console))


def watch_steps(trainer: TOPDTrainer, console: Console) -> None:
    """Show how many updates are done: as a bar, or now and then a line."""
    trainer.phases.show(console)
    trainer.add_callback(_StepBar(trainer.phases))


def _begin_anew(folder: Path) -> None:
    """Empty the folder of a run that was stopped before its first checkpoint, and of no other."""
    if (folder / "student" / "README.md").exists():  # the model card is written last
        raise TOPDError(
            f"resume_from_checkpoint: {folder} holds a run that has ended and no checkpoint. "
            "Choose another folder."
        )
    checkpoints.begin_anew(folder)


def make_trainer(
    recipe: Recipe, rows: list[dict[str, Any]]
) -> tuple[TOPDTrainer, EvaluationCallback | None]:
    """The trainer of a checked recipe, on its rows, and the evaluation that it asks for."""
    evaluator = make_evaluator(recipe)
    trainer = _kind(recipe)(**_parts(recipe, rows))
    trainer.recipe, trainer.at_end = recipe.sources(), None  # the command makes the page
    trainer.remove_callback(PrinterCallback)
    if recipe.evaluation is None or evaluator is None:
        return trainer, None
    callback = EvaluationCallback(trainer, evaluator, every=recipe.evaluation.every)
    trainer.add_callback(callback)
    return trainer, callback


def check_recipe(recipe: Recipe, rows: list[dict[str, Any]]) -> None:
    """Make the start-up checks of :func:`make_trainer` that read no weights. Raises TOPDError."""
    make_evaluator(recipe)
    _kind(recipe).check(**_parts(recipe, rows))


def _kind(recipe: Recipe) -> type[TOPDTrainer]:
    return WarmstartTrainer if recipe.args.learns_from_answers else TOPDTrainer


def _parts(recipe: Recipe, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A trainer's arguments."""
    return {
        "model": recipe.student,
        "teacher_model": recipe.teacher,
        "args": recipe.args,
        "train_dataset": rows,
        "eval_dataset": recipe.eval_data.load() if recipe.eval_data else None,
        "peft_config": recipe.lora,
    }


def make_evaluator(recipe: Recipe) -> Evaluator | None:
    """What a recipe asks to be evaluated on during training, ready before a model loads."""
    if recipe.evaluation is None:
        return None
    check_one_turn("evaluation", recipe.args)
    kwargs = recipe.args.chat_template_kwargs
    spec = recipe.evaluation.as_trained(
        chat=recipe.data.has_messages(),
        chat_template_kwargs=kwargs if isinstance(kwargs, dict) else {},
    )
    return spec.evaluator(
        spec.load(), recipe.student.load_tokenizer(), recipe.student.load_config()
    )


class _LogLines(TrainerCallback):
    """Prints a short line a log, with the time that an update took and what is left."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_train_begin(self, _: object, state: TrainerState, *__: object, **___: object) -> None:
        self.begun, self.first = time.perf_counter(), state.global_step
        self.last = self.begun, self.first

    def on_log(
        self, _: object, state: TrainerState, *__: object, logs: dict[str, float], **___: object
    ) -> None:
        now, step = time.perf_counter(), state.global_step
        if "loss" not in logs or step == self.last[1]:
            return
        pace = (now - self.begun) / (step - self.first)
        seconds = (now - self.last[0]) / (step - self.last[1])
        self.last = now, step
        left = pace * (state.max_steps - step)
        say(self.console, log_line(logs, step, state.max_steps, seconds, left))


class _StepBar(TrainerCallback):
    """Moves the bar of the run, and shows the latest loss on it."""

    def __init__(self, phases: Phases) -> None:
        self.phases = phases

    def on_train_begin(self, _: object, state: TrainerState, *__: object, **___: object) -> None:
        self.phases.start(state.max_steps)

    def on_step_end(self, _: object, state: TrainerState, *__: object, **___: object) -> None:
        self.phases.step_done(state.global_step)
