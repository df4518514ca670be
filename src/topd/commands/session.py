"""What ``topd probe`` and ``topd repair`` share: a loaded pair, and a folder that continues.

An analysis is repeatable: run again with the same settings in the same folder it continues where
it was stopped, and ends with the same records as if it had not been. It may also be asked for more
rollouts or samples than before.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from datetime import datetime
from functools import partial
from itertools import count, islice
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar, TypeVar

import datasets
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from topd.commands.early import check_one_process
from topd.commands.keys import from_command_line, part_of
from topd.commands.recipe import Recipe, one_teacher, read_recipe
from topd.config import TOPDConfig, _field
from topd.engines.factory import open_engines
from topd.engines.servers.checks import check_servers
from topd.errors import TERMINATED, StoppedError, TOPDError
from topd.inputs.models import check_context
from topd.inputs.models.fingerprints import fingerprint
from topd.inputs.models.heads import check_head
from topd.inputs.models.pairs import load_pair, tokenizers_of
from topd.runs.files import as_json, kept_lines, read_whole
from topd.runs.folder import RunFolder, check_run_folder, manifest
from topd.runs.lock import one_writer
from topd.runs.records import read_run
from topd.runs.tokens import FILE as TOKENS
from topd.runs.tokens import TokenWriter
from topd.runs.verified import not_of_the_end
from topd.training.experience import Observer
from topd.training.progress import Phases, say
from topd.training.sampler import GroupSampler
from topd.training.startup import encoder_of
from topd.types import Prompt

ROLLOUTS = "rollouts.jsonl"
LEARNING = (  # of transformers' arguments, those of a repair's updates
    *("learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2"),
    "adam_epsilon",
)
SHARED = ("seed", "bf16", "fp16", "use_cpu", *LEARNING)  # those that an analysis depends on
IDLE = (  # of a recipe, what no analysis reads, besides the rest of transformers' arguments
    *("eval_data", "evaluation", "compare", "lora", "teacher_share", "max_turns"),
    *("teacher_column", "teachers_mix", "look_ahead_every", "look_ahead_until", "window_replay"),
    *("score_batch_size", "disable_dropout", "max_logprob_gap", "nonfinite", "log_rollouts"),
    *("log_completions", "overlap", "max_importance", "stop_length", "stop_finished"),
    *("stop_fresh", "stop_entropy", "stop_divergence", "stop_patience"),
)
LEAST_RESAMPLES = 40  # the least and the largest of 39 hold another one in 95 % of cases
FREE = {"rollouts", "samples", "bootstrap"}  # what may change when an analysis continues
Config = TypeVar("Config", bound="AnalysisConfig")


@dataclass
class AnalysisConfig(TOPDConfig):
    """TOPDConfig with what every analysis needs besides. Raises TOPDError, as TOPDConfig does."""

    idle: ClassVar[tuple[str, ...]] = IDLE  # what it has no use for

    rollout_batch_size: int = _field(16, "Rollouts at a time.")
    bootstrap: int = _field(1000, "Resamples behind every 95 % interval.")

    def _check(self) -> None:
        super()._check()
        self._at_least_1("rollout_batch_size")
        if self.bootstrap < LEAST_RESAMPLES:
            raise TOPDError(
                f"bootstrap: {self.bootstrap} must be at least {LEAST_RESAMPLES}: fewer resamples "
                "do not have a 95 % interval in them."
            )
        if self.environment is not None:
            raise TOPDError(
                "environment: an analysis looks at rollouts of one turn. Leave it out "
                "(--environment null)."
            )
        if self.window_length < 1:
            raise TOPDError(
                f"window_length: {self.window_length} of a rollout: an analysis compares windows "
                "of one length. Give a number of tokens, e.g. --window_length 24."
            )

    def _check_learns(self) -> None:
        """Nothing: it has no updates of ``method``."""

    @property
    def length(self) -> int:
        """K, tokens a window."""
        return int(self.window_length)

    @property
    def ahead(self) -> int:
        """How many tokens after a rollout a text may end that is read for it."""
        return self.length

    def _at_least_1(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TOPDError(f"{name}: {value!r} must be at least 1.")


@dataclass(frozen=True)
class Pair:
    """A student and a teacher, loaded and checked, and the prompts in the order of training."""

    observer: Observer
    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: tuple[Prompt, ...]
    autocast: Callable[[], AbstractContextManager[None]]
    shares_rows: bool  # whether the student's attention reads several texts in a row

    def token_writer(self, folder: Path) -> TokenWriter:
        """Writes what a run folder does not have yet; a line that was cut off is dropped."""
        return TokenWriter(self.tokenizer, [line["id"] for line in kept_lines(folder / TOKENS)])

    def questions(self, seed: int, group: int) -> Iterator[Prompt]:
        """Prompts without end, ``group`` times each, in the order of a training with this seed."""
        sampler = GroupSampler(len(self.prompts), group, seed)
        for epoch in count():
            sampler.set_epoch(epoch)
            yield from (self.prompts[i] for i in sampler)


def read_analysis(command: str, path: Path, words: Sequence[str], config: type[Config]) -> Recipe:
    """A recipe read for an analysis, its folder checked; ``output_dir`` is the command line's.

    A recipe's own ``output_dir`` is its training run's, so it is not used.
    Raises TOPDError: bad recipe or options, the folder holds a run that is not this one, or there
    are several processes.
    """
    check_one_process(command)
    named, overrides = from_command_line(path, words)
    now = f"{datetime.now():%Y%m%d-%H%M%S}"
    overrides.setdefault("output_dir", f"runs/{named.stem if named else 'topd'}-{command}-{now}")
    recipe = read_recipe(named, overrides, config=config)
    _check_used(command, overrides, config)
    one_teacher(recipe)
    folder = Path(recipe.args.output_dir)
    check_run_folder(folder, resume=True)
    _check_same(folder, command, recipe)
    return recipe


def _check_used(command: str, given: Mapping[str, Any], config: type[AnalysisConfig]) -> None:
    """Refuse on the command line what has no effect. A recipe is a training run's too."""
    theirs = {f.name for f in fields(TrainingArguments)} - {*SHARED, "output_dir", "tf32"}
    for key, value in given.items():
        name = part_of(key)
        if value is None or (name in theirs and value in (False, "no")):  # 0 is False, too
            continue  # says what holds: an analysis has none of it
        if name in {*theirs, *config.idle} and value != getattr(config, name, None):
            raise TOPDError(f"{key}: has no effect on topd {command}. Leave it out.")


@contextmanager
def session(
    command: str, recipe: Recipe, console: Console | None
) -> Iterator[tuple[Pair, RunFolder, Phases]]:
    """The pair of an analysis, its folder, which nobody else writes in, and bars on ``console``.

    Raises TOPDError as :func:`open_pair` and :func:`open_folder` do.
    """
    folder = Path(recipe.args.output_dir)
    with one_writer(folder), until_stopped(command, folder, console):
        phases = Phases()
        if console:
            say(console, f"loading {recipe.student.path} and {one_teacher(recipe).path}")
            for line in not_of_the_end(Path(recipe.student.path).expanduser()):
                say(console, line)
        pair = open_pair(recipe, phases)
        run = open_folder(command, recipe, pair)
        if console:
            phases.show(console)
        try:
            yield pair, run, phases
        finally:
            phases.stop()


@contextmanager
def until_stopped(command: str, folder: Path, console: Console | None) -> Iterator[None]:
    """Say where a command's run is and, if SIGTERM or Ctrl-C stops it, how it continues.

    Raises StoppedError then.
    """
    again = f"the same command with --output_dir {quote(str(folder))} continues it"
    if console:
        say(console, f"run folder: {folder}; if it is stopped, {again}")
    try:
        with _interrupted_by_sigterm():
            yield
    except KeyboardInterrupt as error:
        raise StoppedError(
            f"{error.args[0] if error.args else 'Ctrl-C'}: topd {command} was stopped. What is "
            f"done is in {folder}: {again}.",
            TERMINATED,
        ) from error


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C. Only the main thread is told of signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def open_pair(recipe: Recipe, phases: Phases) -> Pair:
    """Check and load models, tokenizers and prompts. Raises TOPDError as training does."""
    quieten()
    source = one_teacher(recipe)
    if source.by_text:
        raise TOPDError(
            "teacher: gives only text, and this analysis compares distributions. Name a teacher "
            "with path, in this process or served."
        )
    args, device = recipe.args, recipe.args.device
    rows, specs = recipe.data.load(), (recipe.student, source)
    tokenizers = tokenizers_of(*specs)
    prompts = encoder_of(tokenizers, args).encode(rows)
    for name, spec, lengths in (
        ("student", recipe.student, [len(p.student) for p in prompts]),
        ("teacher", source, [len(p.teacher) for p in prompts]),
    ):
        most = max(lengths) + args.max_completion_length
        check_context(name, spec, most, args.ahead)
        check_servers(name, spec, tokenizers[0], most, args.ahead)
    student, teacher = (model.eval().to(device) for model in load_pair(*specs))
    check_head("student", student)
    check_head("teacher", teacher.requires_grad_(False))
    autocast = partial(autocast_of, args, device)
    own, (other,) = open_engines(specs, (student, teacher), tokenizers, args.temperature, autocast)
    observer = Observer(own, other, args, phases)
    return Pair(observer, student, teacher, tokenizers[0], tuple(prompts), autocast, own.shares)


def open_folder(command: str, recipe: Recipe, pair: Pair) -> RunFolder:
    """The analysis's folder with its run.json and manifest.json, new or one to continue with.

    Raises TOPDError: it was begun with other models or prompts.
    """
    args = recipe.args
    run = RunFolder(args.output_dir, resume=True)
    record = manifest(
        models={"student": pair.student, "teacher": pair.teacher},
        data=fingerprint(pair.prompts),
        seed=args.seed,
        device=args.device,
        settings=vars(args),
    )
    stored = read_whole(run.folder / "manifest.json")
    for key in ("models", "data"):
        if stored and stored[key] != record[key]:
            raise TOPDError(
                f"output_dir: {run.folder} holds a {command} with other {key}. Choose another "
                "folder."
            )
    run.write("run.json", _run_record(command, recipe))
    if not stored:
        run.write("manifest.json", record)
    return run


def batches(
    prompts: Iterator[Prompt], first: int, size: int, most: int
) -> Iterator[tuple[int, list[Prompt]]]:
    """(number of the first, prompts) of every batch from rollout ``first`` up to ``most``."""
    prompts = islice(prompts, first, most)
    while batch := list(islice(prompts, size)):
        yield first, batch
        first += len(batch)


def _run_record(command: str, recipe: Recipe) -> dict[str, Any]:
    return as_json(
        {"command": command, "recipe": recipe.sources(), "config": recipe.args.to_dict()}
    )


def _check_same(folder: Path, command: str, recipe: Recipe) -> None:
    """Refuse to continue with what was begun otherwise."""
    stored, ours = read_run(folder), _run_record(command, recipe)
    if not stored:
        check_run_folder(folder)
        return
    if stored.get("command") != command:
        raise TOPDError(
            f"output_dir: {folder} holds a run of another kind "
            f"({stored.get('command', 'training')}). Choose another folder."
        )
    own = {f.name for f in fields(recipe.args)} - {f.name for f in fields(TrainingArguments)} - FREE
    for part, keys in (("recipe", set(ours["recipe"])), ("config", {*own, *SHARED})):
        for key in sorted(keys):
            before, now = (stored.get(part) or {}).get(key), ours[part][key]
            if before != now:
                raise TOPDError(
                    f"output_dir: {folder} holds a {command} with {key} = {before!r}, now it is "
                    f"{now!r}. Choose another folder, or continue with the same."
                )


def autocast_of(args: TOPDConfig, device: torch.device) -> AbstractContextManager[None]:
    """The precision that training with these arguments computes in."""
    if not (args.bf16 or args.fp16):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if args.bf16 else torch.float16)


def quieten() -> None:
    """No bars and warnings of the libraries: the bars of a command are ours."""
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
