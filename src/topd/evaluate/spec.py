"""What to evaluate on, as a command line or a recipe says it: problems, and how to sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self, cast

import datasets
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from topd.errors import TOPDError
from topd.evaluate.answers import AnswerVerifier, reference_answer, reference_text
from topd.evaluate.evaluation import Evaluator, first_rows
from topd.inputs.prompt_rows import UNREAD, prompt_of
from topd.inputs.prompts import PromptEncoder
from topd.inputs.rows import TEXTS, DataSpec
from topd.testbed import SCHEME, verify
from topd.types import Prompt, Sampling

logger = logging.get_logger(__name__)

FORMATS = (
    ("prompt", "answer"),
    ("question", "answer"),  # GSM8K
    ("problem", "answer"),  # MATH-500, AIME, HMMT
    ("prompt", "solution"),
    ("problem", "solution"),  # MATH
)
NO_LIMIT = 1 << 40
PROSE = 200  # characters; no answer of GSM8K, MATH-500, AIME or HMMT has as many


class EvaluationSpec(BaseModel):
    """Problems and sampling.

    ``path`` is data as :class:`~topd.inputs.rows.DataSpec` reads them, whose columns are known or
    named in ``columns`` (``prompt``, and ``answer`` or ``solution``); or ``testbed://FAMILY``,
    checked by the family. ``split`` is ``test`` there unless given; choose settings on
    ``validation``. Other data with several splits needs it too: the one to evaluate on; with
    several configurations, ``name``.
    ``chat`` None uses the chat template if the tokenizer has one; ``chat_template_kwargs`` are
    given to it. Where they are not set, a recipe's evaluation writes prompts as its training does,
    and a run's student is evaluated as it was trained. ``max_tokens`` is the longest response;
    ``temperature`` and ``top_p`` are those of the samples, beside which every problem is answered
    greedily.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    name: str | None = None
    split: str | None = None
    columns: dict[Literal["prompt", "answer", "solution"], str] = {}
    limit: int | None = Field(default=None, ge=1)
    chat: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    samples: int = Field(default=4, ge=1)
    temperature: float = Field(default=0.6, gt=0, allow_inf_nan=False)
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_tokens: int = Field(default=1024, ge=1)
    batch_size: int = Field(default=16, ge=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("name", "columns")
    @classmethod
    def _is_of_stored_data(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("path", "").startswith(SCHEME):
            raise ValueError(f"has no effect with {SCHEME}")
        return value

    def load(self) -> list[dict[str, Any]]:
        """The rows, with ``prompt`` (text) and ``answer`` columns, both filled.

        Raises:
            TOPDError: no such data, several splits and none chosen, unknown columns, or a row
                without a reference answer.
        """
        if self.path.startswith(SCHEME):
            return self._data().load()
        data = self._data(limit=1, chat=False)
        chosen = cast(dict[Any, str], self._chosen(list(data.load()[0])))
        rows = data.model_copy(update={"limit": self.limit, "columns": chosen}).load()
        AnswerVerifier().check(rows)
        self._warn_of_prose(rows)
        return rows

    def with_split(self) -> Self:
        """The same, naming the split that is read where data has any: a file of rows has none.

        Raises:
            TOPDError: the data has several, and none is chosen.
        """
        if self.split is not None:
            return self
        known = ["test"] if self.path.startswith(SCHEME) else _splits(self.path, self.name)
        if len(known) > 1:
            raise TOPDError(
                f"data {self.path}: has the splits {', '.join(known)}. Say which one to evaluate "
                "on with split (topd eval: --split NAME): one that was not trained on."
            )
        return self.model_copy(update={"split": known[0]}) if known else self

    def _data(self, **more: Any) -> DataSpec:
        """Where the rows are."""
        split = self.with_split().split or "train"
        own = {"name": self.name, "split": split, "limit": self.limit}
        return DataSpec(path=self.path, **{**own, **more})

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
            TOPDError: an empty prompt, one that leaves no room for ``max_tokens``, or messages that
                are to be text.
        """
        chat = bool(tokenizer.chat_template) if self.chat is None else self.chat
        if self.chat is False and not all(isinstance(prompt_of(row), str | None) for row in rows):
            raise TOPDError(
                f"data {self.path}: its prompts are messages, which only a chat template writes, "
                "and they are to be text (--no-chat, chat: false, or as the run was trained). Set "
                "chat: true (topd eval: --chat)."
            )
        encoder = PromptEncoder(
            tokenizer,
            tokenizer,
            max_length=NO_LIMIT,
            template_kwargs=self.chat_template_kwargs or {},
        )
        prompts = encoder.encode(_messages(row) if chat else row for row in rows)
        self._check_room(prompts, config)
        self._warn_of_repeats(prompts)
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
        if len(self.columns) != 2 or "prompt" not in self.columns:
            raise TOPDError(
                f"columns of {self.path}: name two, prompt and answer (or solution). It has "
                f"{', '.join(names)}."
            )
        return {"prompt" if k == "prompt" else "answer": v for k, v in self.columns.items()}

    def _warn_of_prose(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Of references that are whole solutions, which no final answer equals."""
        found = [reference_answer(reference_text(row["answer"])) for row in rows]
        long = [i for i, answer in enumerate(found) if len(answer) > PROSE]
        if long:
            logger.warning_once(
                f"data {self.path}, {len(long)} of {len(rows)} rows, first row {long[0]}: the "
                f"reference is a text of more than {PROSE} characters without #### or \\boxed{{}}. "
                "A response is right only if its final answer is all of it. Name the column of the "
                "bare answer (columns)."
            )

    def _warn_of_repeats(self, prompts: Sequence[Prompt]) -> None:
        repeats = len(first_rows(prompts))
        if repeats:
            logger.warning_once(
                f"data {self.path}: {len(prompts)} rows, {len(prompts) - repeats} different "
                "prompts. Rows with the same prompt count as one problem; for several answers to "
                "a problem, use samples."
            )

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


def _splits(place: str, name: str | None) -> list[str]:
    """The splits of a folder or of a hub's data; none of a file, or where they cannot be read.

    Reading the rows says why then.
    """
    path = Path(place).expanduser()
    named_as_file = {suffix.lower() for suffix in path.suffixes} & {*TEXTS, ".parquet"}
    if path.is_file() or (named_as_file and not path.is_dir()) or (path / "state.json").exists():
        return []
    with suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):
        if (path / "dataset_dict.json").exists():
            return [*map(str, json.loads((path / "dataset_dict.json").read_text())["splits"])]
        return datasets.get_dataset_split_names(str(path) if path.exists() else place, name)
    return []


def _messages(row: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt as messages, and what the row itself gives to the chat template."""
    prompt = prompt_of(row)
    if prompt is None:
        return dict(row)  # to be refused
    read = ("tools", "chat_template_kwargs", *UNREAD)  # UNREAD to be refused
    given = {name: row[name] for name in read if name in row}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {**given, "prompt": messages}
