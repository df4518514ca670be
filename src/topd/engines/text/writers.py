"""Writers of text: OpenAI-style servers, or a model in this process whose vocabulary is another."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from topd.engines.base import Wanted
from topd.engines.decode_check import check_decoding
from topd.engines.hf import HFEngine
from topd.engines.servers import BUSY, OF_ONE, RefusedError, Request, Servers
from topd.engines.servers.vllm import ROUNDED
from topd.engines.text import IN_A_ROW, TextEngine, Written, say_left_out
from topd.engines.text.logprobs import Pieces
from topd.engines.text.spans import SpanReader
from topd.errors import TOPDError
from topd.inputs.border import Border, decoded
from topd.inputs.models import ModelSpec, eos_ids
from topd.inputs.models.vocabulary import shared_ids
from topd.inputs.served import TextSpec
from topd.inputs.text_models import reach_of, stand_in
from topd.inputs.tool_calls import with_texts
from topd.types import Ids, Texts

logger = logging.get_logger(__name__)
T = TypeVar("T")

COMPLETIONS, CHAT = "/completions", "/chat/completions"
ENDS = {"stop": True, "eos": True, "eos_token": True, "length": False}  # Together, TGI: eos
OVERLOADED = "insufficient_system_resource"  # DeepSeek: the answer was interrupted
ELSEWHERE = ("refusal", "tool_calls", "function_call")  # what a message says in the place of text
THOUGHT = ("reasoning", "reasoning_content")  # and before it
IMPOSSIBLE = -9999.0  # vLLM's word for minus infinity
Place = tuple[str, float | None, list[float]]  # a token of Pieces, and the likeliest's log-probs
NOTHING = Written("", False)
PAUSE, LONGEST = 0.5, 120.0  # seconds before an error that came as an answer is asked again


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
        self._names, self._known = set[str](), spec.model  # of models that have answered; the first
        self._in_a_row: list[Ids] = []  # prompts refused since the latest answer

    def write(self, prompts: Texts, texts: Sequence[str], wanted: Wanted) -> list[Written]:
        """What comes after prompts and texts. See :class:`~topd.engines.text.Writer`.

        White space at the end of a text is not sent to a chat server, whose template may trim it:
        its answer has to begin with it, or none is had.
        """
        sent = [text.rstrip() if self.spec.chat else text for text in texts]
        how = {"temperature": wanted.sampling.temperature, "top_p": wanted.sampling.top_p}
        pairs = zip(prompts, sent, strict=True)
        asked = [self._asked(self.prompt_text(prompt), text) for prompt, text in pairs]
        rows = zip(asked, wanted.seeds, strict=True)
        requests = [self._request(one, wanted.steps, **how, seed=seed) for one, seed in rows]
        reads = [partial(self._written, continues=bool(text)) for text in sent]
        found = self._answers(prompts, requests, reads, NOTHING)
        answers = zip(found, texts, sent, strict=True)
        return [_after(answer, text[len(known) :]) for answer, text, known in answers]

    def read(self, prompts: Texts, texts: Sequence[str]) -> list[Pieces]:
        """Of every prompt and text the servers' own tokens, and their log-probs.

        Raises TOPDError where a server tells none.
        """
        told = self.read_places(prompts, texts)
        return [[(piece, logprob) for piece, logprob, _ in one] for one in told]

    def read_places(self, prompts: Texts, texts: Sequence[str]) -> list[list[Place]]:
        """As :meth:`read`, each token with the log-probs of the likeliest in its place."""
        how = {"temperature": 1.0, "echo": True, "logprobs": 1}
        pairs = zip(prompts, texts, strict=True)
        asked = [{"prompt": self.prompt_text(prompt) + text} for prompt, text in pairs]
        wanted = [self._request(one, 0, **how) for one in asked]
        return self._answers(prompts, wanted, [self._places] * len(wanted), [])

    def tokens_read(self, text: str, wanted: Wanted) -> int:
        """How many tokens of a text a server says that it has read; 0 where it does not."""
        how = {"temperature": wanted.sampling.temperature, "top_p": wanted.sampling.top_p}
        request = self._request(self._asked(text, ""), wanted.steps, **how, seed=wanted.seeds[0])
        (answer,) = self._told([request])
        usage = answer.get("usage") if isinstance(answer, dict) else None
        told = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        return told if isinstance(told, int) else 0

    def _request(self, asked: Mapping[str, Any], most: int, **how: Any) -> Request:
        """A request for ``most`` tokens after a text."""
        # stream is said: some proxies stream where it is not
        ours = {self.spec.limit: most, "stream": False}
        body = {**self.servers.model, **asked, **ours, **how, **self.spec.extra}
        sent = {key: value for key, value in body.items() if value is not None}
        return Request(CHAT if self.spec.chat else COMPLETIONS, sent)

    def _answers(
        self,
        prompts: Texts,
        wanted: Sequence[Request],
        reads: Sequence[Callable[[Any], T]],
        none: T,
    ) -> list[T]:
        """The answers as they are read; ``none`` for one that is refused and left out."""
        found = []
        for prompt, answer, read in zip(prompts, self._told(wanted), reads, strict=True):
            try:
                if isinstance(answer, RefusedError):
                    raise answer
                if _error_code(answer) in OF_ONE:
                    raise RefusedError(self._no_answer(answer))
                found.append(read(answer))
                self._in_a_row.clear()
            except RefusedError as error:
                self._leave_out(prompt, error)
                found.append(none)
        return found

    def _told(self, wanted: Sequence[Request]) -> list[Any]:
        """The answers of the servers; what says "busy" with status 200 is asked again."""
        answers = self.servers.ask_each(wanted)
        for tries in range(self.spec.retries):
            busy = [k for k, answer in enumerate(answers) if _error_code(answer) in BUSY]
            if not busy:
                break
            time.sleep(min(PAUSE * 2**tries, LONGEST))
            again = self.servers.ask_each([wanted[k] for k in busy])
            for k, answer in zip(busy, again, strict=True):
                answers[k] = answer
        for answer in answers:
            self._say_name(answer.get("model") if isinstance(answer, dict) else None)
        return answers

    def _say_name(self, name: object) -> None:
        """Say once that another model answers than was asked for or before, as far as names tell.

        Else one that a server was started again with would go unseen.
        """
        if not isinstance(name, str) or name in self._names:
            return
        self._names.add(name)
        known = self._known = self._known or name
        if known.lower() not in name.lower() and name.lower() not in known.lower():
            due = "asked for the model" if self.spec.model else "and at first as"
            logger.warning(
                f"{self.servers.name}: {', '.join(self.spec.url)} answers as {name}, {due} {known}."
                " Is that the same? Some servers (LM Studio) answer with whatever model they have."
            )

    def _leave_out(self, prompt: Ids, error: RefusedError) -> None:
        if not self.skips:
            raise error
        if self._in_a_row[-1:] != [prompt]:  # not the same one, at another token
            self._in_a_row.append(prompt)
        if len(self._in_a_row) >= IN_A_ROW:
            raise TOPDError(f"{error} It refused {IN_A_ROW} prompts in a row.") from error
        self._refused += 1
        say_left_out(f"{error} What it refuses is left out", self._refused, "requests")

    def _places(self, answer: Any) -> list[Place]:
        try:
            told = answer["choices"][0]["logprobs"]
            tokens, tops = told["tokens"], told.get("top_logprobs") or ()
            if len(tops) != len(tokens):  # only the check at the start reads them
                tops = [None] * len(tokens)
            read = zip(tokens, told["token_logprobs"], tops, strict=True)
            return [
                (_text_of(token), _told_logprob(logprob), _likeliest(top))
                for token, logprob, top in read
            ]
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
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
        return decoded(self.tokenizer, prompt)

    def _asked(self, prompt: str, text: str) -> dict[str, Any]:
        if not self.spec.chat:
            return {"prompt": prompt + text}
        messages = messages_of(prompt)
        if not text:
            return {"messages": messages}
        return {
            "messages": [*messages, {"role": "assistant", "content": text}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        }

    def _no_answer(self, answer: Any) -> str:
        return (
            f"{self.servers.name}: {', '.join(self.spec.url)} answer {str(answer)[:200]}, which is "
            f"not a whole answer with text and a finish_reason of stop or length. {self.spec.other}"
        )

    def _written(self, answer: Any, continues: bool) -> Written:
        """The text of an answer; ``continues``: of a text, after which there may be nothing more.

        Raises RefusedError for one that says something else than text, or that ends without any.
        """
        try:
            choice = answer["choices"][0]
            if choice["finish_reason"] not in tuple(ENDS):  # as content_filter
                raise RefusedError(self._no_answer(answer))
            ended = ENDS[choice["finish_reason"]]
            message = choice["message"] if self.spec.chat else {}
            text = _text_of(message.get("content") if self.spec.chat else choice["text"])
            if ended and _says_no_text(message, text, continues):
                raise RefusedError(self._no_answer(answer))
            return Written(text, ended)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise TOPDError(self._no_answer(answer)) from error


def _error_code(answer: Any) -> object:
    """The status in an answer that is an error in all but its own status, or in its only choice.

    So OpenRouter has it; DeepSeek says by a finish_reason that it was too busy.
    """
    error = answer.get("error") if isinstance(answer, dict) else None
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not error and isinstance(choices, list) and choices and isinstance(choices[0], dict):
        if choices[0].get("finish_reason") == OVERLOADED:
            return BUSY[-1]
        error = choices[0].get("error")
    return error.get("code") if isinstance(error, dict) else None


def _text_of(content: Any) -> str:
    """The text of a message, which may come in parts. Raises TypeError for what is not text."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    if not isinstance(content, str | None):
        raise TypeError(content)
    # half of an emoji that a limit has cut in two: no tokenizer takes it
    return (content or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _told_logprob(told: Any) -> float | None:
    """A log-prob; None for what is none: no number, one above 0, or that of an impossible token."""
    good = isinstance(told, int | float) and IMPOSSIBLE < told <= ROUNDED
    return float(told) if good else None


def _likeliest(top: Any) -> list[float]:
    """The log-probs of the likeliest tokens at a place, as far as they are told."""
    told = map(_told_logprob, top.values()) if isinstance(top, dict) else ()
    return [logprob for logprob in told if logprob is not None]


def _says_no_text(message: Mapping[str, Any], text: str, continues: bool) -> bool:
    """Whether a message that has ended is no answer: a refusal, a call, or thoughts alone."""
    if any(message.get(key) for key in ELSEWHERE):
        return True
    return not text and (not continues or any(message.get(key) for key in THOUGHT))


def _after(written: Written, blank: str) -> Written:
    """What was written after the white space ``blank``; nothing where it begins otherwise."""
    if not written.text.startswith(blank):
        return NOTHING
    return Written(written.text[len(blank) :], written.ended)


def messages_of(prompt: str) -> list[dict[str, Any]]:
    """The messages of a prompt that CHAT_TEMPLATE has written; a plain text is the user's."""
    with suppress(ValueError):
        found = json.loads(prompt)
        if isinstance(found, list) and all(isinstance(message, dict) for message in found):
            return [with_texts(message) for message in found]
    return [{"role": "user", "content": prompt}]


class EmbeddedWriter:
    """A model in this process that continues texts.

    Args:
        engine: the model.
        tokenizer: its own.
    """

    def __init__(self, engine: HFEngine, tokenizer: PreTrainedTokenizerBase) -> None:
        self.engine, self.tokenizer, self.border = engine, tokenizer, Border(tokenizer)
        self.reach = reach_of(engine.model.config)
        self._left = 0  # texts that it could not continue

    def write(self, prompts: Texts, texts: Sequence[str], wanted: Wanted) -> list[Written]:
        """What comes after prompts and texts. See :class:`~topd.engines.text.Writer`.

        Nothing after a text that the tokenizer does not read back, or for which there is no room.
        """
        pairs = zip(prompts, texts, strict=True)
        before = [self._ids(prompt, text, wanted.steps) for prompt, text in pairs]
        asked = {k: ids for k, ids in enumerate(before) if ids is not None}
        whole = [prompts[k] + ids for k, ids in asked.items()]
        seeds = [wanted.seeds[k] for k in asked]
        found = self.engine.generate(whole, wanted.sampling, seeds, tick=wanted.tick)
        written = [NOTHING] * len(before)
        for (k, ids), one in zip(asked.items(), found, strict=True):
            written[k] = self._text(ids, one.tokens, one.finished)
        return written

    def _ids(self, prompt: Ids, text: str, more: int) -> Ids | None:
        """A text's ids, with room for ``more`` after them; None, said and counted, without."""
        found = self.border.ids((), text)
        length = len(prompt) + len(found or ()) + more
        if found is not None and (self.reach is None or length <= self.reach):
            return found
        why = f"no tokens of its read as {text[-40:]!r}"
        if found is not None:
            why = f"prompt, text and window are {length} tokens, it has {self.reach} positions"
        self._left += 1
        say_left_out(f"teacher.as_text: {why}. Such a text is left out", self._left, "times")
        return None

    def _text(self, before: Ids, tokens: Ids, finished: bool) -> Written:
        """The text of new tokens, up to the last whole character."""
        known = self.border.text(before) or ""
        tokens = tokens[:-1] if finished else tokens
        for end in range(len(tokens), -1, -1):
            text = self.border.text(before + tokens[:end])
            if text is not None:
                return Written(text[len(known) :], finished and end == len(tokens))
        return NOTHING


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
        servers = TextServers("teacher (text)", spec.text, tokenizers[1], skips=True)
        read = servers.read if spec.text.logprobs else None
        return TextEngine(models[1], servers, tokenizers[0], name="teacher", read=read, **options)
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
