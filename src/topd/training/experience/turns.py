"""Rollouts of several turns: the student writes, an environment replies, the student resumes.

Only the student's tokens are learned. A reply is in the sequence, since both models read it, and
nowhere else: no loss, no candidate, no window, no figure counts its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from topd.config import TOPDConfig
from topd.engines import Engine, Tick
from topd.errors import TOPDError, shown
from topd.inputs.models import ModelSource, ModelSpec, eos_ids
from topd.inputs.prompt_rows import read_row
from topd.inputs.prompts.tools import Environment, Replies, environment_named
from topd.inputs.text_models import is_by_text
from topd.named import called
from topd.seeds import Stream, seed_of
from topd.types import Ids, Prompt, Rollout, Sampling, Spans

logger = logging.get_logger(__name__)

Asked: TypeAlias = list[tuple[int, Ids]]  # rows and the tokens of their replies


@dataclass(frozen=True)
class Turns:
    """Continues rollouts until the environment has no more to say.

    Args:
        environment: replies to the turns so far.
        replies: writes a reply as tokens.
        most: turns of the student in a rollout.
        limit: tokens of a rollout, replies among them.
        sampling: how the student writes.
    """

    environment: Environment
    replies: Replies
    most: int
    limit: int
    sampling: Sampling

    def check(
        self, prompts: Sequence[Prompt], teachers: Sequence[PreTrainedTokenizerBase] = ()
    ) -> None:
        """Whether the chat template can write replies, where it has to. Raises TOPDError.

        A warning says where a teacher's template would write them otherwise.
        """
        rows = [read_row(prompt.index, _columns(prompt)) for prompt in prompts]
        talks = [row for row in rows if not isinstance(row.prompt, str)]
        self.replies.check(talks)
        for teacher in teachers if talks else ():
            ours, theirs = (
                self.replies.sample(one, talks[0]) for one in (self.replies.tokenizer, teacher)
            )
            if theirs != ours:
                logger.warning(
                    f"environment: the teacher's chat template writes a reply as {theirs!r}, the "
                    f"student's as {ours!r}, and both read the latter: from the second turn on the "
                    "teacher reads another format than its own. Give both the same chat_template."
                )

    def resumed(
        self, rollouts: Sequence[Rollout], student: Engine, seeds: Sequence[int], tick: Tick
    ) -> list[Rollout]:
        """Rollouts of one turn with all that follows. A rollout depends on its own seed alone.

        A reply after which there is no room for a token is left out: a rollout ends with what the
        student wrote. Raises TOPDError for a reply that is no text.
        """
        found, going = list(rollouts), [*range(len(rollouts))]
        for turn in range(1, self.most):
            asked = [(row, ids) for row in going if (ids := self._reply(found[row])) is not None]
            for some in self._together(found, asked):
                self._take_turn(found, some, student, seeds, turn, tick)
            going = [row for row, _ in asked]
        return found

    def _together(self, rollouts: Sequence[Rollout], asked: Asked) -> Iterator[Asked]:
        """Groups that are written at once: none goes further than a whole rollout of one turn."""
        reach = self.limit + max((len(rollouts[row].prompt.student) for row, _ in asked), default=0)
        group: Asked = []
        longest = 0
        for row, ids in sorted(asked, key=lambda one: len(rollouts[one[0]].response) + len(one[1])):
            own = len(rollouts[row].response) + len(ids)
            longest = max(longest, len(rollouts[row].prompt.student) + own)
            if group and longest + self._room(rollouts, group[0]) > reach:
                yield group
                longest, group = len(rollouts[row].prompt.student) + own, []
            group.append((row, ids))
        if group:
            yield group

    def _room(self, rollouts: Sequence[Rollout], one: tuple[int, Ids]) -> int:
        """How many tokens the student may write after a reply."""
        return self.limit - len(rollouts[one[0]].response) - len(one[1])

    def _take_turn(
        self,
        rollouts: list[Rollout],
        asked: Asked,
        student: Engine,
        seeds: Sequence[int],
        turn: int,
        tick: Tick,
    ) -> None:
        """Have the student write after the replies, up to the limit of its rollout."""
        rooms = [self._room(rollouts, one) for one in asked]
        before = [rollouts[row] for row, _ in asked]
        written = student.generate(
            [
                r.prompt.student + r.response + ids
                for r, (_, ids) in zip(before, asked, strict=True)
            ],
            replace(self.sampling, max_new_tokens=max(rooms)),
            [seed_of(seeds[row], Stream.TURNS, turn) for row, _ in asked],
            tick=tick,
        )
        for (row, ids), room, old, new in zip(asked, rooms, before, written, strict=True):
            start = len(old.response) + len(ids)
            rollouts[row] = Rollout(
                old.prompt,
                old.response + ids + new.tokens[:room],
                old.logprobs + (0.0,) * len(ids) + new.logprobs[:room],
                student.ends(new.tokens[:room]),
                (*old.replies, (len(old.response), start)),
            )

    def spans(self, prompt: Prompt, response: Ids) -> Spans | None:
        """Where the replies are in a response, by the environment; None where it says otherwise."""
        rollout, ends = Rollout(prompt, (), (), finished=True), self.replies.ends
        spans: list[tuple[int, int]] = []
        for turn in range(1, self.most + 1):
            first = len(rollout.response)
            end = next((i for i in range(first, len(response)) if response[i] in ends), None)
            if end is None:
                return tuple(spans)
            rollout = replace(rollout, response=response[: end + 1], replies=tuple(spans))
            ids = self._reply(rollout) if turn < self.most else None
            if ids is None:
                return tuple(spans) if end + 1 == len(response) else None
            after = end + 1 + len(ids)
            if response[end + 1 : after] != ids:
                return None
            spans.append((end + 1, after))
            rollout = replace(rollout, response=response[:after])
        return None

    def _reply(self, rollout: Rollout) -> Ids | None:
        """The tokens of the next reply; None where there is none, or no room after it."""
        if not rollout.finished:
            return None
        row = _columns(rollout.prompt)
        turns = [self.replies.text(turn) for turn in rollout.turns]
        text = called("environment", self.environment, deepcopy(dict(row)), turns)  # its own
        if text is None:
            return None
        if not isinstance(text, str):
            raise TOPDError(
                f"environment: data row {rollout.prompt.index}: replied {text!r}. Return a text, "
                "which may be empty, or None where there is no more to say."
            )
        if text != text.encode(errors="replace").decode():
            raise TOPDError(
                f"environment: data row {rollout.prompt.index}: replied a text with half a "
                f"character: {shown(text)}. Decode what it reads with errors='replace'."
            )
        if found := self.replies.mark(text):
            logger.warning_once(
                f"environment: a reply has {found[0]!r} in it, which is read as that special "
                "token, here as where a model is served. Take such names out of replies."
            )
        ids = self.replies.ids(text, read_row(rollout.prompt.index, row), rollout.response[-1])
        if len(rollout.response) + len(ids) < self.limit:
            return ids
        logger.warning_once(
            "environment: a reply leaves the student no token of max_completion_length "
            f"({self.limit}), so it is left out and the rollout ends before it, as all such will. "
            "Raise max_completion_length, or shorten the replies."
        )
        return None


def _columns(prompt: Prompt) -> Mapping[str, Any]:
    """The row of a prompt, which the encoder keeps for an environment."""
    assert prompt.row is not None
    return prompt.row


def turns_of(
    args: TOPDConfig, sources: Sequence[ModelSource], tokenizer: PreTrainedTokenizerBase
) -> Turns | None:
    """The turns that are asked for, checked before weights are read; None where there is one.

    ``sources`` are the student's and the teachers'. Raises TOPDError.
    """
    if args.environment is None:
        return None
    for source in sources:
        if is_by_text(source) or (isinstance(source, ModelSpec) and source.served):
            raise TOPDError(
                f"environment: {args.environment} needs student and teacher in this process. "
                "Leave served and text out, or leave environment out."
            )
    ends = frozenset(eos_ids(sources[0], tokenizer))
    kwargs = args.chat_template_kwargs
    replies = Replies(tokenizer, ends, kwargs if isinstance(kwargs, dict) else {})
    environment = environment_named(args.environment)
    return Turns(environment, replies, args.max_turns, args.max_completion_length, args.sampling)
