"""TOPDConfig: every number of a run, with its unit and its default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import Field
from transformers import TrainingArguments

from topd.config import rules
from topd.config.values import defaults_of, given_of, left_out_by, typed, worked_out
from topd.detectors import DETECTORS, Detector, detector_named
from topd.distributed import everywhere
from topd.errors import TOPDError
from topd.losses import Kind
from topd.methods import METHODS, Method, method_named
from topd.statistics import stopped_falling
from topd.types import Sampling

CHECKPOINTING = next(  # recomputation of activations, by its name in the installed transformers
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


OF_WINDOWS = (  # settings without effect where a method looks nowhere ahead
    *("candidate_fraction", "candidate_threshold", "window_length", "window_rejoin", "window_gap"),
    *("look_ahead_every", "look_ahead_until", "embedding", "position_weight", "solver", "epsilon"),
    *("false_alarm_share", "ot_threshold"),
)


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TOPDConfig(TrainingArguments):
    """Arguments of :class:`~topd.TOPDTrainer`: those of transformers' Trainer, and these.

    ``per_device_train_batch_size`` counts rollouts, as in TRL: an update sees
    ``per_device_train_batch_size x gradient_accumulation_steps`` rollouts a rank, of
    ``1 / num_generations`` as many prompts. ``method`` is plain on-policy distillation unless you
    name another: docs/which-method.md says when. Raises TOPDError for values out of range.

    What is given comes before a method's own settings; where every field is passed, as by
    HfArgumentParser, what differs from its default. ``dataclasses.replace`` keeps what was given;
    another method brings its own settings then, and the former's go.
    """

    left_out: InitVar[dict[str, Any] | None] = field(default=None, kw_only=True)  # see given_of

    # What is learned
    method: str = _field(
        "opd",
        f"What the student learns: {', '.join(METHODS)}, or my_module:function. Start with opd, "
        "after a warm start on the teacher's answers if it may write (docs/which-method.md).",
    )
    method_options: dict[str, Any] | str | None = _field(
        None, "Options of the method, e.g. {share: 0.1} for kl_top."
    )
    beta: float = _field(
        1.0, "Token divergence: 1 reverse KL, 0 forward KL, between: generalised JSD."
    )
    kd_ratio: float = _field(
        1.0, "Share of the divergence in the token loss; the rest is cross-entropy. In [0, 1]."
    )
    token_loss: Literal["full", "sampled", "spans", "none"] = _field(
        "full",
        "Over the whole distribution; sampled: log p_T(y) - log p_S(y) of the token as its "
        "advantage, for teachers that tell no more; spans: the same by the shortest spans of text "
        "that both tokenizers have, for teacher.as_text; none: the method's guidance alone.",
    )
    trajectory_weight: float = _field(0.1, "lambda, the weight of L_traj.")
    trajectory_reduction: Literal["mean", "sum"] = _field(
        "mean", "L_traj over guided positions: mean, or sum (as printed) over response tokens."
    )

    # Rollouts
    temperature: float = _field(1.0, "Of the sampling and of both distributions in the loss.")
    top_p: float = _field(1.0, "Nucleus sampling: smallest set with this mass. In (0, 1].")
    top_k: int = _field(0, "Sample from the k likeliest tokens only; 0 for all.")
    max_prompt_length: int = _field(800, "Longest prompt, in tokens; longer ones are an error.")
    drop_long_prompts: bool = _field(False, "Leave longer prompts out instead, and say how many.")
    max_completion_length: int = _field(1024, "Longest response, in tokens.")
    num_generations: int = _field(1, "Rollouts a prompt.")
    environment: str | None = _field(
        None,
        "Who replies to the student between its turns: calculator, testbed://FAMILY, or "
        "my_module:function; none: rollouts have one turn.",
    )
    max_turns: int = _field(4, "Turns of the student in a rollout, where there is an environment.")
    teacher_share: float = _field(
        0.0,
        "Share of the updates whose responses the teacher writes, for plain distillation on them: "
        "GKD's mix, 1 - lambda there.",
    )
    chat_template_kwargs: dict[str, Any] | str | None = _field(
        None, "Given to the chat template, e.g. {enable_thinking: false}."
    )
    teacher_prompt: str | None = _field(
        None, "Jinja template of the teacher's own user message; sees the columns of the data."
    )
    reference: Literal["given", "wrong", "none"] = _field(
        "given",
        "The solution or answer that teacher_prompt sees: the row's own, another row's, or none. "
        "wrong and none are controls.",
    )

    # Several teachers
    teacher_column: str = _field("teacher", "Column of the data with the name of a row's teacher.")
    teachers_mix: Literal["column", "mean"] = _field(
        "column", "Who reads a row: the teacher in its column, or all, by their mean distribution."
    )

    # Where to look: candidates and windows
    candidate_fraction: float = _field(0.0225, "Share of a rollout's tokens taken as candidates.")
    candidate_loss: str = _field(
        "sampled", f"The detector that ranks tokens: {', '.join(DETECTORS)}, or my_module:function."
    )
    candidate_threshold: float | None = _field(None, "Candidates need this token loss, in nats.")
    window_length: float = _field(
        50,
        "K, tokens a window; below 1: that share of the mean length of the update's rollouts, at "
        "least 4 tokens.",
    )
    window_rejoin: int = _field(
        0,
        "A teacher's window whose last so many tokens are the rollout's stops and takes its rest "
        "from there, which is cheaper and no longer exact; 0: never.",
    )
    window_gap: int | None = _field(
        None, "Fewest tokens between two windows' starts; none: K, so that windows are disjoint."
    )
    look_ahead_every: int = _field(
        1, "Updates from one that looks ahead to the next; those between are plain OPD."
    )
    look_ahead_until: Annotated[float | str | None, Field(union_mode="left_to_right")] = _field(
        None,
        "Updates from this one on are plain OPD; below 1: this share of all updates look ahead; "
        "auto: until the divergence, over 10 logs, stops falling (RetireOPD's rule); none: all do.",
    )
    window_temperature: float = _field(
        0.0, "Of what the teacher writes, windows and teacher_share; 0 is greedy."
    )
    window_replay: int = _field(
        0, "Windows of earlier updates that each update learns again, drawn from all of them."
    )

    # Transport and verdict
    embedding: Literal["teacher", "student"] = _field(
        "teacher", "Whose input embeddings give the ground cost."
    )
    position_weight: float = _field(0.0, "eta: adds eta |i - j| / K to the ground cost.")
    solver: Literal["exact", "sinkhorn"] = _field("exact", "Solver of the transport plan.")
    epsilon: float = _field(0.05, "Entropy of the sinkhorn solver, in the unit of the cost.")
    false_alarm_share: float = _field(
        0.3,
        "This share of a batch's candidates, those with the smallest OT, and equal windows are "
        "false alarms; 0: none are.",
    )
    ot_threshold: float | None = _field(None, "If set: real means an OT distance of at least this.")

    # Safety and memory
    chunk_tokens: int = _field(1024, "Tokens whose logits are alive at a time in the loss.")
    score_batch_size: int | None = _field(
        None,
        "Rollouts a scoring forward and whose windows are written together; none: a micro-batch.",
    )
    disable_dropout: bool = _field(True, "Set the student's dropout to 0.")
    max_logprob_gap: float = _field(
        0.1, "Nats: a larger mean gap between sampling and training log-probs stops the run."
    )
    nonfinite: Literal["stop", "skip"] = _field(
        "stop", "An update whose loss or gradient is not finite: stop the run, or leave it out."
    )
    log_rollouts: bool = _field(True, "Write every rollout and its guidance to the run folder.")
    log_completions: bool = _field(
        False, "Send the latest rollouts and forks as tables to the trackers of report_to."
    )

    # Served rollouts
    overlap: bool = _field(
        False,
        "Let the servers write and look ahead for the next update while this one is learned; its "
        "rollouts are then one update old, and token losses are multiplied by p_now / p_sampling.",
    )
    max_importance: float = _field(2.0, "Largest such factor; at least 1.")

    # Stop rules: limits as multiples of the best figure at the start of the run; none: no limit
    stop_length: float | None = _field(0.1, "Least mean response length.")
    stop_finished: float | None = _field(0.05, "Least share of responses that end by themselves.")
    stop_fresh: float | None = _field(0.25, "Least share of 4-grams that are new in a response.")
    stop_entropy: float | None = _field(0.02, "Least entropy of the student.")
    stop_divergence: float | None = _field(3.0, "Largest token divergence.")
    stop_patience: int | None = _field(
        10, "Logs that make the start, and logs in a row beyond a limit; none: no rules."
    )

    # Defaults of transformers that differ here
    output_dir: str = _field("", "The run folder; empty: runs/topd-DATE-TIME.")
    learning_rate: float = _field(2e-6, "Peak learning rate of AdamW.")
    warmup_steps: float = _field(0.05, "Steps of linear warm-up; below 1: a share of all steps.")
    num_train_epochs: float = _field(1.0, "Passes over the prompts.")
    per_device_train_batch_size: int = _field(4, "Rollouts a forward and backward pass.")
    per_device_eval_batch_size: int = _field(4, "Rollouts an evaluation step.")
    logging_steps: float = _field(1, "Log every so many updates.")
    report_to: list[str] | str | None = _field("none", "Loggers of transformers, e.g. tensorboard.")
    save_only_model: bool = _field(False, "Leave the optimiser out of checkpoints.")
    remove_unused_columns: bool = _field(False, "Prompts are encoded at the start; leave this off.")
    logging_nan_inf_filter: bool = _field(False, "A NaN loss is shown, not hidden.")

    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "chat_template_kwargs",
        "method_options",
    ]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Notes which fields are given: a method's settings do not replace those."""
        made = super().__new__(cls)
        made._given = given_of(cls, args, kwargs)
        return made

    def __post_init__(self, left_out: dict[str, Any] | None) -> None:
        for name in (left_out or {}).keys() - self._given:
            setattr(self, name, defaults_of(type(self))[name])  # a former method had brought it
        for name in self._given:
            setattr(self, name, typed(type(self), name, getattr(self, name)))
        named = bool(self.output_dir)
        if not named:
            self.output_dir = f"runs/topd-{datetime.now():%Y%m%d-%H%M%S}"
        self.brought = self._bring_settings()
        for name in ("window_length", "look_ahead_until"):
            value = getattr(self, name)
            if isinstance(value, float) and value >= 1 and value == int(value):
                setattr(self, name, int(value))
        self._check()
        try:
            super().__post_init__()
        except (ValueError, TypeError, LookupError, AttributeError, ImportError, OSError) as error:
            raise TOPDError(f"{str(error).rstrip('.')}. Correct it, or leave it out.") from error
        # again: they may have been JSON
        rules.check_options(self.method, self._method_options(), self.token_loss)
        rules.check_trackers(self)
        if not named:  # each rank looked at its own clock
            self.output_dir = everywhere(self.output_dir)[0]
        self._check_learns()  # by now it knows its ranks
        if self.world_size > 1:
            rules.check_ranks(self)
        self.left_out = left_out_by(self, self._given, self.brought)

    def _bring_settings(self) -> dict[str, Any]:
        """Take the method's settings where nothing was given. Returns those. Raises TOPDError."""
        settings = method_named(self.method).settings
        for name in settings:
            if name not in defaults_of(TOPDConfig):
                raise TOPDError(
                    f"method: {self.method} brings {name!r}, which is no setting. Take it out of "
                    "its settings."
                )
        brought = {name: value for name, value in settings.items() if name not in self._given}
        for name, value in brought.items():
            setattr(self, name, typed(type(self), name, value))
        return brought

    def settings_of_method(self) -> str:
        """The method, and where its own settings have been taken and where not, in a line."""
        method, line = method_named(self.method), f"method {self.method}"
        said = [
            f"{name} {getattr(self, name)}{'' if name in self.brought else ' (given)'}"
            for name in method.settings
        ]
        if said:
            line += f": {', '.join(said)}"
        unused = [] if method.looks_ahead else [*OF_WINDOWS]
        if unused and not self.teacher_share:
            unused.append("window_temperature")
        idle = [name for name in unused if name in self._given]
        if idle:
            line += f" (looks nowhere ahead: no effect of {', '.join(idle)})"
        return line

    def _check(self) -> None:
        rules.check_options(self.method, self._method_options(), self.token_loss)
        detector_named(self.candidate_loss)
        rules.check_values(self)

    def _check_learns(self) -> None:
        """Where updates follow ``method``."""
        rules.check_groups(self)
        rules.check_learns(self.method, self.token_loss, self.trajectory_weight)

    def _method_options(self) -> dict[str, Any]:
        """As a mapping; a string is read by transformers later."""
        return self.method_options if isinstance(self.method_options, dict) else {}

    def guidance_method(self, *, look_ahead: bool = True) -> Method:
        """The method with its options; plain ``opd`` without looking ahead."""
        if not look_ahead:
            return METHODS["opd"]
        method = method_named(self.method)
        return method._replace(guide=partial(method.guide, **self._method_options()))

    @property
    def detector(self) -> Detector:
        """What ranks the tokens: that of ``candidate_loss``."""
        return detector_named(self.candidate_loss)

    @property
    def all_candidates_are_real(self) -> bool:
        """Whether no candidate is taken for a false alarm, whatever its windows are."""
        return self.false_alarm_share == 0 and self.ot_threshold is None

    def count_updates(self, updates: int) -> None:
        """Make ``look_ahead_until`` a number, now that a run is known to have so many updates."""
        if isinstance(self.look_ahead_until, float) and self.look_ahead_until < 1:
            worked_out(self, "look_ahead_until", max(1, round(self.look_ahead_until * updates)))

    def window_tokens(self, lengths: Sequence[int]) -> int:
        """K for the windows of an update whose rollouts have these lengths."""
        if self.window_length >= 1:
            return int(self.window_length)
        return max(4, round(self.window_length * sum(lengths) / max(len(lengths), 1)))

    @property
    def longest_window(self) -> int:
        """The most that K can be."""
        return self.window_tokens([self.max_completion_length])

    def looks_ahead(self, step: int, divergences: Sequence[float] = ()) -> bool:
        """Whether update ``step`` is guided by the method; else it is plain OPD.

        ``divergences`` are those logged until then, which ``auto`` goes by.
        """
        if self.teacher_writes(step):
            return False
        if not method_named(self.method).looks_ahead:
            return True
        until = self.look_ahead_until
        if isinstance(until, str):  # auto
            until = step if stopped_falling(divergences) else None
        assert until is None or until >= 1 or step == 0  # count_updates was called
        return step % self.look_ahead_every == 0 and (until is None or step < until)

    def teacher_writes(self, step: int) -> bool:
        """Whether the responses of update ``step`` are the teacher's: so many in a row of any."""
        return int((step + 1) * self.teacher_share) > int(step * self.teacher_share)

    @property
    def divergence(self) -> Kind:
        """The kind of token divergence that ``beta`` stands for, as in TRL."""
        if self.beta == 1.0:
            return "reverse_kl"
        return "forward_kl" if self.beta == 0.0 else "jsd"

    @property
    def learns_from_answers(self) -> bool:
        """Whether responses are answers written beforehand, as in a warm start."""
        return False

    @property
    def asks_teacher(self) -> bool:
        """Whether the loss depends on the teacher's distributions."""
        if self.learns_from_answers:
            return self.kd_ratio > 0
        return self.token_loss == "full"

    @property
    def loss_temperature(self) -> float:
        """Divides both models' logits in the loss: that of the sampling."""
        return self.temperature

    @property
    def sampling(self) -> Sampling:
        """How the student samples."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.max_completion_length)

    def window_sampling(self, length: int) -> Sampling:
        """How the teacher writes windows of ``length`` tokens."""
        return Sampling(self.window_temperature, 1.0, 0, length)
