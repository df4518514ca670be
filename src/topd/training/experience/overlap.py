"""The experience of the next update, gathered by the servers while this update is learned."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from topd.config import TOPDConfig
from topd.engines.servers.weight_sync import ServedStudent
from topd.errors import TOPDError
from topd.inputs.models import ModelSource, ModelSpec
from topd.training.experience import Observer
from topd.training.experience.evidence import Experience
from topd.training.progress import Phases
from topd.types import Prompt


class Overlap:
    """Observes one update ahead, in a thread that touches no weight of the student.

    Its rollouts are written with the weights before the update under way: they are one update old
    when they are learned from.

    Args:
        observer: whose student and teacher are both served, as ``check_overlap`` makes sure.
    """

    def __init__(self, observer: Observer) -> None:
        assert isinstance(observer.student, ServedStudent)
        self._student = observer.student
        self._observer = Observer(  # not on the main thread's clock
            observer.student, observer.teacher, observer.args, Phases()
        )
        self._pool = ThreadPoolExecutor(1)
        self._found: Future[Experience] | None = None

    def begin(self, prompts: Sequence[Prompt], *, step: int) -> None:
        """Sync the current weights, and observe update ``step`` with them from now on."""
        self._student.sync()
        self._student.held = True
        looks = self._observer.args.looks_ahead(step)
        self._found = self._pool.submit(
            self._observer.observe, prompts, step=step, look_ahead=looks
        )

    def take(self) -> Experience | None:
        """What was begun, once it is there; None if nothing was. Raises what observing raised."""
        if self._found is None:
            return None
        found, self._found = self._found, None
        try:
            return found.result()
        finally:
            self._student.held = False

    def close(self) -> None:
        """Drop what is under way. A later training begins with nothing."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool, self._found, self._student.held = ThreadPoolExecutor(1), None, False


def check_overlap(student: ModelSource, teacher: ModelSource, args: TOPDConfig) -> None:
    """Make sure that nothing would read the student while it is trained. Raises TOPDError."""
    if not all(isinstance(model, ModelSpec) and model.served for model in (student, teacher)):
        raise TOPDError("overlap: needs student.served and teacher.served, both in a recipe.")
    if args.teacher_share:
        raise TOPDError(
            "overlap: the teacher's own responses (teacher_share) have no log-probs to weigh them "
            "by. Set overlap: false, or teacher_share: 0."
        )
    if args.learns_from_answers:
        raise TOPDError("overlap: a warm start has no rollouts to gather. Set overlap: false.")
    method = args.guidance_method()
    for holds, key in (
        (method.statistics, f"method: {args.method} looks"),
        (args.detector.statistics, f"candidate_loss: {args.candidate_loss} looks"),
        (args.embedding == "student", "embedding: student looks"),
        (args.eval_strategy != "no", "eval_strategy: an evaluation looks"),
        (args.look_ahead_until == "auto", "look_ahead_until: auto looks"),
    ):
        if holds:
            raise TOPDError(
                f"overlap: {key} at the student while it is trained. Set overlap: false, or leave "
                "that out."
            )
