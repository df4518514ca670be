"""What to evaluate on, as a command line or a recipe says it: problems, and how to sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from topd.errors import TOPDError
from topd.evaluate.answers import AnswerVerifier
from topd.evaluate.evaluation import Evaluator
from topd.inputs.prompt_rows import UNREAD
from topd.inputs.prompts import PromptEncoder
from topd.inputs.rows import DataSpec
from topd.testbed import SCHEME, verify
from topd.types import Prompt, Sampling

FORMATS = (
    ("prompt", "answer"),
    ("question", "answer"),  # GSM8K
    ("problem", "answer"),  # MATH-500, AIME, HMMT
    ("prompt", "solution"),
    ("problem", "solution"),  # MATH
)
NO_LIMIT = 1 << 40


class EvaluationSpec(BaseModel):
    """Problems and sampling.

    ``path`` is a JSONL or Parquet file whose columns are recognised, or named in ``columns``; or
    ``testbed://FAMILY``, checked by the family. ``split`` is ``test`` there unless given; choose
    settings on ``validation``.
    ``chat`` None uses the chat template if the tokenizer has one; ``chat_template_kwargs`` are
    given to it. Where they are not set, a recipe's evaluation writes prompts as its training does,
    and a run's student is evaluated as it was trained. ``max_tokens`` is the longest response;
    ``temperature`` and ``top_p`` are those of the samples, beside which every problem is answered
    greedily.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    split: str | None = None
    columns: dict[Literal["prompt", "answer"], str] = {}
    limit: int | None = Field(default=None, ge=1)
    chat: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    samples: int = Field(default=4, ge=1)
    temperature: float = Field(default=0.6, gt=0, allow_inf_nan=False)
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_tokens: int = Field(default=1024, ge=1)
    batch_size: int = Field(default=16, ge=1)
    seed: int = Field(default=0, ge=0)

    def load(self) -> list[dict[str, Any]]:
        """The rows, with ``prompt`` (text) and ``answer`` columns, both filled.

        Raises:
            TOPDError: no such data, unknown columns, or a row without a reference answer.
        """
        if self.path.startswith(SCHEME):
            return DataSpec(path=self.path, split=self.split or "test", limit=self.limit).load()
        data = DataSpec(path=self.path, split=self.split or "train", limit=1, chat=False)
        chosen = cast(dict[Any, str], self._chosen(list(data.load()[0])))
        rows = data.model_copy(update={"limit": self.limit, "columns": chosen}).load()
        AnswerVerifier().check(rows)
        return rows

    def as_trained(self, *, chat: bool, chat_template_kwargs: Mapping[str, Any]) -> Self:
        """The same, with prompts written as those of a training where nothing else is said.

        Args:
            chat: whether the training's prompts are messages; else they are text.
            chat_template_kwargs: given to the chat template there.
        """
        changes: dict[str, Any] = {}
        if self.chat is None and not chat:
            changes["chat"] = False
        if self.chat_template_kwargs is None and chat and self.chat is not False:
            changes["chat_template_kwargs"] = dict(chat_template_kwargs)
        return self.model_copy(update=changes)

    def evaluator(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
    ) -> Evaluator:
        """An evaluator on loaded rows, with math answers verified.

        Args:
            rows: from :meth:`load`.
            tokenizer: the model's.
            config: the model's, for its positions.

        Raises:
            TOPDError: an empty prompt, or one that leaves no room for ``max_tokens``.
        """
        chat = bool(tokenizer.chat_template) if self.chat is None else self.chat
        encoder = PromptEncoder(
            tokenizer,
            tokenizer,
            max_length=NO_LIMIT,
            template_kwargs=self.chat_template_kwargs or {},
        )
        prompts = encoder.encode(_messages(row) if chat else row for row in rows)
        self._check_room(prompts, config)
        return Evaluator(
            prompts,
            rows,
            verify(self.path) if self.path.startswith(SCHEME) else AnswerVerifier(),
            tokenizer,
            samples=self.samples,
            sampling=Sampling(self.temperature, self.top_p, 0, self.max_tokens),
            seed=self.seed,
            batch_size=self.batch_size,
        )

    def _chosen(self, names: Sequence[str]) -> dict[str, str]:
        if not self.columns:
            return _recognised(self.path, names)
        if len(self.columns) < 2:
            raise TOPDError(
                f"columns of {self.path}: name both, prompt and answer. It has {', '.join(names)}."
            )
        return {str(ours): theirs for ours, theirs in self.columns.items()}

    def _check_room(self, prompts: Sequence[Prompt], config: PretrainedConfig) -> None:
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        longest = max(len(prompt.student) for prompt in prompts)
        if positions is not None and longest + self.max_tokens > positions:
            raise TOPDError(
                f"max_tokens: the longest prompt of {self.path} has {longest} tokens; "
                f"{self.max_tokens} more exceed the model's {positions} positions. Lower it."
            )


class TrainingEvaluation(EvaluationSpec):
    """The same during training: at the start, every ``every`` updates, and at the end."""

    every: int = Field(default=50, ge=1)


def _recognised(path: str, names: Sequence[str]) -> dict[str, str]:
    """Columns of a known format, upper case or lower."""
    known = {name.lower(): name for name in names}
    for prompt, answer in FORMATS:
        if prompt in known and answer in known:
            return {"prompt": known[prompt], "answer": known[answer]}
    raise TOPDError(
        f"data {path}: no known format; it has the columns {', '.join(names)}. Name the two that "
        "count: columns prompt=NAME,answer=NAME."
    )


def _messages(row: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt as messages, and what the row itself gives to the chat template."""
    prompt = row["prompt"]
    read = ("tools", "chat_template_kwargs", *UNREAD)  # UNREAD to be refused
    given = {name: row[name] for name in read if name in row}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {**given, "prompt": messages}
