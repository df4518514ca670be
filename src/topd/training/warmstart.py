"""Stage 1, off-policy distillation: the student learns from answers it did not write.

    L = kd_ratio KL(p_T || p_S) + (1 - kd_ratio) (-log p_S(y)),  mean over the answers' tokens

The teacher writes the answers, once, or the data has them (its ``solution`` column). The learning
phase is that of :class:`~topd.TOPDTrainer`. Source: arXiv 2606.00305, stage 1; GKD's off-policy
limit. Answers are padded, not packed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from topd import distributed as ranks
from topd.config import OF_WINDOWS, TOPDConfig, _field
from topd.engines.several import reader_of
from topd.errors import TOPDError
from topd.inputs.models.fingerprints import fingerprint, model_fingerprint
from topd.runs.files import raw_lines, read_lines, trim
from topd.runs.folder import check_run_folder
from topd.runs.lock import one_writer
from topd.seeds import Stream, sampling_seeds
from topd.training.metrics import SHORTER
from topd.training.startup import DataRows
from topd.training.startup.alike import check_ranks_agree
from topd.training.trainer import TOPDTrainer
from topd.types import Prompt

logger = logging.getLogger(__name__)

ENOUGH = 64  # answers after which it is known whether answers end
OF_ROLLOUTS = (  # settings of what the student writes
    *(*OF_WINDOWS, "candidate_loss", "window_temperature", "trajectory_weight"),
    *("trajectory_reduction", "max_logprob_gap", "overlap", "max_importance"),
    *("stop_length", "stop_finished", "stop_fresh", "stop_entropy"),
)
OF_ANSWERS = ("temperature", "top_p", "top_k", "answer_batch_size")  # of what the teacher writes


@dataclass
class WarmstartConfig(TOPDConfig):
    """Arguments of the warm start: TOPDConfig with the paper's stage-1 defaults, but for the loss.

    The paper has ``kd_ratio`` 0.5; cross-entropy alone is the default (docs/evidence.md, "By which
    loss to imitate"). It asks the teacher for no distributions.
    ``temperature`` and ``top_p`` are those of the teacher's answers; the loss is at temperature 1.
    """

    answers: str = _field(
        "teacher",
        "Who wrote the answers: teacher (it does now), data (it has a solution), or the "
        "answers.jsonl of another warm start on the same prompts, to be learned again.",
    )
    answer_batch_size: int = _field(
        16,
        "Answers that the teacher writes at a time; of a server no more are asked for at once, "
        "whatever its concurrency.",
    )
    method: str = _field("opd", "A warm start has no forks to guide: only opd.")
    beta: float = _field(0.0, "Forward KL, where kd_ratio is above 0.")
    kd_ratio: float = _field(0.0, "Share of the divergence; the rest is cross-entropy.")
    temperature: float = _field(0.6, "Of the teacher's answers.")
    top_p: float = _field(0.95, "Of the teacher's answers.")
    learning_rate: float = _field(2e-5, "Peak learning rate of AdamW.")

    def settings_of_method(self) -> str:
        """What is learned, how long and how fast, in a line."""
        answers = {"teacher": "the teacher's answers", "data": "the data's solutions"}
        loss, divergence = "cross-entropy", self.divergence.replace("_kl", " KL")
        if self.kd_ratio > 0:
            mixed = f"{self.kd_ratio:g} {divergence}, the rest {loss},"
            loss = divergence if self.kd_ratio == 1 else mixed
        length = (
            ("update", self.max_steps) if self.max_steps > 0 else ("epoch", self.num_train_epochs)
        )
        long = f"{length[1]:g} {length[0]}{'s' * (length[1] != 1)}"
        return (
            f"stage 1: {loss} on {answers.get(self.answers, self.answers)}, "
            f"{self.answers_an_update} an update, {long} at {self.learning_rate:g}"
        )

    @property
    def answers_an_update(self) -> int:
        """How many answers an update learns, over all ranks."""
        own = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return own * self.world_size

    def _check(self) -> None:
        super()._check()
        if self.method != "opd":
            raise TOPDError(f"method: {self.method!r} needs rollouts; a warm start takes opd.")
        if self.teacher_share:
            raise TOPDError("teacher_share: the student writes no responses here. Leave it out.")
        if self.num_generations != 1:
            raise TOPDError("num_generations: a warm start has one answer a prompt. Leave it at 1.")
        for name in OF_ROLLOUTS:
            if getattr(self, name) != getattr(type(self), name):
                raise TOPDError(
                    f"{name}: has no effect in a warm start: the student writes nothing here. "
                    "Leave it out."
                )
        for name in OF_ANSWERS if self.answers == "data" else ():
            if getattr(self, name) != getattr(type(self), name):
                raise TOPDError(
                    f"{name}: has no effect with answers: data: the teacher writes nothing here. "
                    "Leave it out, or set answers: teacher."
                )
        if self.beta != type(self).beta and not self.kd_ratio:
            raise TOPDError("beta: has no effect with kd_ratio: 0. Set kd_ratio, or leave it out.")
        if self.answer_batch_size < 1:
            raise TOPDError(f"answer_batch_size: {self.answer_batch_size} must be at least 1.")
        if self.answers not in ("teacher", "data") and not self.answers.endswith(".jsonl"):
            raise TOPDError(
                f"answers: {self.answers!r} is not one of teacher, data, or an answers.jsonl."
            )

    def _check_learns(self) -> None:
        """Nothing: it learns the answers."""

    @property
    def learns_from_answers(self) -> bool:
        """True: the student's own samples are not used."""
        return True

    @property
    def loss_temperature(self) -> float:
        """1: the teacher's own distribution, whatever its answers were sampled at."""
        return 1.0


@dataclass(frozen=True)
class Answered:
    """What the teacher's answers cost in this process: tokens, unfinished ones too, and seconds."""

    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class WarmstartTrainer(TOPDTrainer):
    """Off-policy distillation. Arguments as for :class:`~topd.TOPDTrainer`, with a WarmstartConfig.

    The teacher's answers, which several ranks share among them, are kept in ``answers.jsonl`` of
    the run folder and used again if the run continues there. Answers that did not end within
    ``max_completion_length`` are left out, and it is said how many.
    """

    kind_of_args = WarmstartConfig
    args: WarmstartConfig

    def _encode_training(self, rows: DataRows, args: TOPDConfig) -> list[Prompt]:
        assert isinstance(args, WarmstartConfig)
        self.answered = Answered()
        if args.answers == "teacher":
            self.questions = super()._encode_training(rows, args)
            return self.questions
        if args.answers != "data":
            return _learned_again(super()._encode_training(rows, args), Path(args.answers))
        prompts = self.encoder.encode(rows, with_response=True)
        limit = args.max_completion_length
        long = {p.index: len(p.response or ()) for p in prompts if len(p.response or ()) > limit}
        if long:
            first = next(iter(long))
            raise TOPDError(
                f"data row {first}: the solution has {long[first]} tokens, the limit "
                f"max_completion_length is {limit}. Above it: {len(long):,} of {len(prompts):,} "
                f"rows, the longest {max(long.values())}. Raise it, or drop them."
            )
        return prompts

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Have the answers written if need be, then train."""
        self._check_training(resume_from_checkpoint)
        folder = Path(self.args.output_dir)
        with one_writer(folder):
            if self.args.answers == "teacher" and self.train_dataset is not None:
                check_run_folder(folder, resume=bool(resume_from_checkpoint))
                check_ranks_agree(self.args, self.questions)
                self.train_dataset = self._answered(self.questions, folder / "answers.jsonl")
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _answered(self, prompts: Sequence[Prompt], path: Path) -> list[Prompt]:
        """The prompts with the teacher's answers; those that did not end are left out."""
        header = {
            "prompts": fingerprint(prompts),
            "teacher": model_fingerprint(self.teacher_model)["sha256"],
            "sampling": repr(self.args.sampling),
            "seed": self.args.seed,
        }
        first = ranks.rank() == 0
        found = ranks.agreed(lambda: _answers_in(path, header) if first else [])
        done, began = ranks.everywhere(found)[0], _clocks()
        if len(done) < len(prompts):
            self._write(prompts, done, path)
        self._check_ends(done)
        self.totals.add("answers/unfinished", done.count([]), len(done))
        seconds, cpu_seconds = (_clocks() - began).tolist()
        self.answered = replace(self.answered, seconds=seconds, cpu_seconds=cpu_seconds)
        return _with_answers(prompts, done)

    def _write(self, prompts: Sequence[Prompt], done: list[list[int]], path: Path) -> None:
        """Have the answers written that are not in ``done`` yet, by all ranks; keep them there."""
        learned = self.args.max_steps * self.args.answers_an_update
        if 0 < learned < len(prompts) and ranks.rank() == 0:
            logger.warning(
                f"the teacher writes {len(prompts):,} answers, and max_steps: {self.args.max_steps}"
                f" learns {learned:,} at most. With data.limit: {learned} it writes no more."
            )
        self.phases.start(len(prompts), "answers")
        size, own = self.args.answer_batch_size, ranks.rank()
        while len(done) < len(prompts):
            self.watch.end_if_asked(f"{path} has {len(done)} answers.")
            begin = len(done) + own * size
            mine = ranks.agreed(partial(self._answer, prompts[begin : begin + size], begin))
            new = [answer for answers in ranks.everywhere(mine) for answer in answers]
            if own == 0:
                with open(path, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(answer) + "\n" for answer in new)
            early = len(done) < ENOUGH <= len(done) + len(new)
            done += new
            self.phases.step_done(len(done))
            if early and len(done) < len(prompts):
                self._check_ends(done, "first ")
        tokens = sum(ranks.everywhere(self.answered.tokens))
        self.answered = replace(self.answered, tokens=tokens)

    def _check_ends(self, answers: Sequence[Sequence[int]], which: str = "") -> None:
        """Say how many answers did not end; of the ``which`` ones only if they are most.

        Raises TOPDError if none did.
        """
        cut, count = sum(not answer for answer in answers), len(answers)
        within = f"within {self.args.max_completion_length} tokens"
        if cut == count:
            none = f"none of the teacher's {which}{count} answers ended {within}"
            raise TOPDError(f"warm start: {none}. {SHORTER}")
        most = 2 * cut > count
        if ranks.rank() == 0 and (most or (cut and not which)):
            logger.warning(
                f"{cut:,} of the teacher's {which}{count:,} answers did not end {within} and are "
                f"left out.{f' {SHORTER}' if most else ''}"
            )

    def _answer(self, prompts: Sequence[Prompt], first: int) -> list[list[int]]:
        """Token ids of the teacher's answers; empty for one that did not end."""
        if not prompts:
            return []
        seeds = sampling_seeds(self.args.seed, Stream.ANSWERS, len(prompts), first=first)
        with self.phases.phase("answers", self.args.max_completion_length) as tick:
            written = reader_of(self.observer.teacher, prompts).generate(
                [prompt.teacher for prompt in prompts], self.args.sampling, seeds, tick=tick
            )
        tokens = self.answered.tokens + sum(len(answer.tokens) for answer in written)
        self.answered = replace(self.answered, tokens=tokens)
        return [list(answer.tokens) if answer.finished else [] for answer in written]


def _clocks() -> np.ndarray:
    """Wall-clock and CPU time of this process, seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def _with_answers(prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[Prompt]:
    """The prompts with their answers, without those that have none."""
    return [
        replace(prompt, response=tuple(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer
    ]


def _learned_again(prompts: Sequence[Prompt], path: Path) -> list[Prompt]:
    """The prompts with an earlier warm start's answers. Raises TOPDError if they are others'."""
    if not path.is_file():
        raise TOPDError(f"answers: no such file {path}. Give the one of another warm start.")
    header, *answers = [*read_lines(path, object)] or [None]
    made_of = header.get("prompts") if isinstance(header, dict) else None
    if made_of != fingerprint(prompts) or len(answers) != len(prompts):
        raise TOPDError(
            f"answers: {path} does not answer these {len(prompts)} prompts, or was cut off. Train "
            "on the prompts that it was made with."
        )
    return _with_answers(prompts, answers)


def _answers_in(path: Path, header: dict[str, Any]) -> list[list[int]]:
    """Answers that an earlier run in this folder has to the same prompts, sampled the same way.

    Starts the file if there is none; a last line that was cut off is dropped, in a file of ours.
    """
    begin = json.dumps(header) + "\n"
    if not begin.encode().startswith(next(raw_lines(path), b"")):  # whole, or cut off
        raise TOPDError(
            f"{path}: holds answers to other prompts, of another teacher or of other sampling. "
            "Choose another folder, or remove the file."
        )
    if not trim(path):
        path.write_text(begin, encoding="utf-8")
    _, *answers = read_lines(path, object)
    return answers
