"""Writers of text: OpenAI-style servers, or a model in this process whose vocabulary is another."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from topd.engines import Tick, no_tick
from topd.engines.decode_check import check_decoding
from topd.engines.hf import HFEngine
from topd.engines.servers import RefusedError, Request, Servers
from topd.engines.spans import SpanReader
from topd.engines.text import TextEngine, Writer, Written
from topd.engines.text_logprobs import Pieces
from topd.errors import TOPDError
from topd.inputs.border import Border
from topd.inputs.models import ModelSpec, eos_ids
from topd.inputs.text_models import stand_in
from topd.inputs.text_spec import TextSpec
from topd.inputs.vocabulary import shared_ids
from topd.types import Ids, Sampling

logger = logging.get_logger(__name__)
T = TypeVar("T")

IN_A_ROW = 16  # prompts that a server may refuse, one after another, before it is at fault
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ENDS = {"stop": True, "length": False}


class TextServers:
    """Servers that continue a text.

    Args:
        name: what messages call them.
        spec: where they are, and how to ask.
        tokenizer: of the prompts' ids, the teacher's if it is known.
        skips: a request that is refused for itself is left out: its answer is empty and has not
            ended, and none of its log-probs is told. Off: it raises RefusedError.

    With ``skips`` a refusal is said, and the 10th, the 100th, ...; TOPDError is raised where
    ``IN_A_ROW`` prompts are refused and none between them is answered.
    """

    def __init__(
        self, name: str, spec: TextSpec, tokenizer: PreTrainedTokenizerBase, *, skips: bool = False
    ) -> None:
        self.spec, self.tokenizer, self.skips = spec, tokenizer, skips
        self.servers = Servers(name, spec.url, spec)
        self._refused = 0  # requests
        self._in_a_row: list[Ids] = []  # prompts refused since the latest answer

    def write(
        self,
        prompts: Sequence[Ids],
        texts: Sequence[str],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        tick: Tick = no_tick,
    ) -> list[Written]:
        """What comes after prompts and texts. See :class:`~topd.engines.text.Writer`."""
        wanted = [
            Request(
                CHAT if self.spec.chat else COMPLETIONS,
                {
                    **self.servers.model,
                    **self._asked(self.prompt_text(prompt), text),
                    "max_tokens": sampling.max_new_tokens,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "seed": seed,
                    **self.spec.extra,
                },
            )
            for prompt, text, seed in zip(prompts, texts, seeds, strict=True)
        ]
        return self._answers(prompts, wanted, self._written, Written("", False))

    def read(self, prompts: Sequence[Ids], texts: Sequence[str]) -> list[Pieces]:
        """See :class:`~topd.engines.text.Writer`. Raises TOPDError where a server tells none."""
        asked = {"max_tokens": 0, "temperature": 1.0, "echo": True, "logprobs": 1}
        wanted = [
            Request(
                COMPLETIONS,
                {
                    **self.servers.model,
                    "prompt": self.prompt_text(prompt) + text,
                    **asked,
                    **self.spec.extra,
                },
            )
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        return self._answers(prompts, wanted, self._pieces, [])

    def _answers(
        self, prompts: Sequence[Ids], wanted: Sequence[Request], read: Callable[[Any], T], none: T
    ) -> list[T]:
        """The answers as they are ``read``; ``none`` for one that is refused and left out."""
        found = []
        for prompt, answer in zip(prompts, self.servers.ask_each(wanted), strict=True):
            try:
                if isinstance(answer, RefusedError):
                    raise answer
                found.append(read(answer))
                self._in_a_row.clear()
            except RefusedError as error:
                self._leave_out(prompt, error)
                found.append(none)
        return found

    def _leave_out(self, prompt: Ids, error: RefusedError) -> None:
        if not self.skips:
            raise error
        if self._in_a_row[-1:] != [prompt]:  # not the same one, at another token
            self._in_a_row.append(prompt)
        if len(self._in_a_row) >= IN_A_ROW:
            raise TOPDError(f"{error} It refused {IN_A_ROW} prompts in a row.") from error
        self._refused += 1
        if str(self._refused).strip("0") == "1":
            logger.error(
                f"{error} What it refuses is left out, {self._refused} requests so far; said again "
                "at ten times as many."
            )

    def _pieces(self, answer: Any) -> Pieces:
        try:
            told = answer["choices"][0]["logprobs"]
            return list(zip(told["tokens"], told["token_logprobs"], strict=True))
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise TOPDError(
                f"teacher.text.logprobs: {', '.join(self.spec.url)} does not tell those of a "
                f"prompt's tokens (echo with logprobs); it answers {str(answer)[:200]}. Leave "
                "text.logprobs out, and set token_loss: none."
            ) from error

    def prompt_text(self, prompt: Ids) -> str:
        """A prompt's text, without the token that the server's tokenizer puts before any text."""
        first = list(self.tokenizer("a")["input_ids"][:1])
        if first == [self.tokenizer.bos_token_id] == list(prompt[:1]):
            prompt = prompt[1:]
        return str(
            self.tokenizer.decode(
                list(prompt), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _asked(self, prompt: str, text: str) -> dict[str, Any]:
        if not self.spec.chat:
            return {"prompt": prompt + text}
        messages = messages_of(prompt, self.servers.name)
        if not text:
            return {"messages": messages}
        return {
            "messages": [*messages, {"role": "assistant", "content": text}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        }

    def _written(self, answer: Any) -> Written:
        said = (
            f"{self.servers.name}: {', '.join(self.spec.url)} answer {str(answer)[:200]}, which is "
            f"not a whole answer with text and a finish_reason of stop or length. {self.spec.other}"
        )
        try:
            choice = answer["choices"][0]
            if choice["finish_reason"] not in tuple(ENDS):  # as content_filter
                raise RefusedError(said)
            text = choice["message"]["content"] if self.spec.chat else choice["text"]
            return Written(text or "", ENDS[choice["finish_reason"]])
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise TOPDError(said) from error


def messages_of(prompt: str, name: str) -> list[dict[str, Any]]:
    """The messages of a prompt that CHAT_TEMPLATE has written; a plain text is the user's."""
    try:
        found = json.loads(prompt)
    except ValueError:
        return [{"role": "user", "content": prompt}]
    if isinstance(found, list) and all(isinstance(m, dict) for m in found):
        return found
    return [{"role": "user", "content": prompt}]


class EmbeddedWriter:
    """A model in this process that continues texts.

    Args:
        engine: the model.
        tokenizer: its own.
    """

    def __init__(self, engine: HFEngine, tokenizer: PreTrainedTokenizerBase) -> None:
        self.engine, self.tokenizer, self.border = engine, tokenizer, Border(tokenizer)

    def write(
        self,
        prompts: Sequence[Ids],
        texts: Sequence[str],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        tick: Tick = no_tick,
    ) -> list[Written]:
        """What comes after prompts and texts. See :class:`~topd.engines.text.Writer`."""
        before = [self._ids(text) for text in texts]
        whole = [p + ids for p, ids in zip(prompts, before, strict=True)]
        found = self.engine.generate(whole, sampling, seeds, tick=tick)
        return [
            self._text(ids, written.tokens, written.finished)
            for ids, written in zip(before, found, strict=True)
        ]

    def read(self, prompts: Sequence[Ids], texts: Sequence[str]) -> list[Pieces]:
        """Not asked of a model in this process."""
        raise NotImplementedError

    def _ids(self, text: str) -> Ids:
        found = self.border.ids((), text)
        if found is None:
            raise TOPDError(
                f"teacher.as_text: the teacher's tokenizer has no tokens that read as "
                f"{text[-40:]!r}. Choose a teacher whose tokenizer reads back what it is given."
            )
        return found

    def _text(self, before: Ids, tokens: Ids, finished: bool) -> Written:
        """The text of new tokens, up to the last whole character."""
        known = self.border.text(before) or ""
        tokens = tokens[:-1] if finished else tokens
        for end in range(len(tokens), -1, -1):
            text = self.border.text(before + tokens[:end])
            if text is not None:
                return Written(text[len(known) :], finished and end == len(tokens))
        return Written("", False)


def text_engine(
    spec: ModelSpec,
    models: Sequence[PreTrainedModel],
    tokenizers: Sequence[PreTrainedTokenizerBase],
    options: Mapping[str, Any],
    spans: bool = False,
) -> TextEngine:
    """The engine of a teacher by text: at a URL, or in this process (``as_text``).

    Args:
        spec: the teacher's.
        models: the student, and the teacher or what stands in its place.
        tokenizers: both.
        options: of HFEngine, the student's.
        spans: whether one in this process tells the log-probs of spans.
    """
    if spec.text is not None:
        writer: Writer = TextServers("teacher (text)", spec.text, tokenizers[1], skips=True)
        tells = spec.text.logprobs
        return TextEngine(models[1], writer, tokenizers[0], name="teacher", tells=tells, **options)
    own = HFEngine(
        models[1],
        name="teacher",
        eos_ids=eos_ids(models[1], tokenizers[1]),
        allowed=shared_ids(tokenizers[1], tokenizers[1]),
        autocast=options["autocast"],
    )
    check_decoding(own)
    rows = models[0].config.get_text_config().vocab_size
    place = stand_in(spec.path, rows).to(models[0].device)
    writer = EmbeddedWriter(own, tokenizers[1])
    ends = frozenset(options["eos_ids"])
    reader = SpanReader(own, tokenizers, ends) if spans else None
    return TextEngine(place, writer, tokenizers[0], spans=reader, name="teacher", **options)
