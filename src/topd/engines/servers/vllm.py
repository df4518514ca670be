"""The served engine: a teacher that vLLM servers read and write, token ids in and out.

A teacher needs two kinds of servers. *Completions* servers write windows, after prefixes that
their prefix cache knows; *pooling* servers give the last hidden states of scored texts, D numbers
a token instead of V. The teacher's head and input embeddings are in this process, so that the
loss sees its whole distribution; its decoder is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import groupby
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from topd.engines import Scores, Tick, no_tick
from topd.engines.base import BaseEngine, Options, Prefix, check_seeds, scores_of
from topd.engines.servers import Request, Servers
from topd.errors import TOPDError
from topd.inputs.models.heads import head_of
from topd.inputs.served import ServedSpec
from topd.types import Effort, Generation, Ids, Sampling, Starts, Texts

COMPLETIONS, POOLING = "/v1/completions", "/pooling"
ONCE = Sampling(temperature=0, max_new_tokens=1)
ROUNDED = 1e-3  # what a log-prob of 0 may be
LISTED, LIKELIEST = 128, 20  # log-probs a token that vLLM tells: of ids, of the likeliest
WIRE = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


class Completions:
    """Texts from completions servers.

    Log-probs are the model's own, those of temperature 1, whatever a text is sampled at.

    Args:
        servers: vLLM's OpenAI-compatible API.
        engine: of the same model here; says what ends a text, and which ids it may have.
        unshared: ids of tokens that not all models have. They are not sampled, and the log-probs
            are those of the others alone, as in this process.
    """

    def __init__(self, servers: Servers, engine: BaseEngine, unshared: Sequence[int] = ()) -> None:
        self.servers, self.ends = servers, engine.end_ids
        self.rows = head_of(engine.model).vocab_size
        self.unshared = tuple(token for token in unshared if token < self.rows)
        barred = [] if engine.barred is None else engine.barred.nonzero()[:, 0].tolist()
        self.barred = frozenset([*barred, *range(engine.vocab_size, self.rows)])

    def alone(self, *, bars: bool = False) -> Iterator[Completions]:
        """Those of each server that has not failed, by itself, for probes: with bars or without."""
        for servers in self.servers.alone():
            one = copy(self)
            one.servers = servers
            if not bars:
                one.unshared, one.barred = (), frozenset()
            yield one

    def write(
        self, texts: Texts, groups: Sequence[int], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Generation]:
        """What comes after every text; those of a group share a prefix and go to one server.

        Greedy texts of a group are one request, in the order of their length: what one has left in
        the prefix cache the next one finds there. Sampled ones are a request each, with their seed.
        """
        order = sorted(range(len(texts)), key=lambda k: (groups[k], len(texts[k])))
        greedy = sampling.temperature == 0
        wanted: list[tuple[list[int], Request]] = []
        for number, (_, group) in enumerate(groupby(order, key=lambda k: groups[k])):
            for own in [[*group]] if greedy else [[k] for k in group]:
                some, to = [texts[k] for k in own], None if greedy else number
                wanted.append((own, self.request(some, sampling, seeds[own[0]], to)))
        answers = self.servers.ask([request for _, request in wanted])
        found: dict[int, Generation] = {}
        for (own, _), answer in zip(wanted, answers, strict=True):
            written = self._generations(answer, len(own), sampling.max_new_tokens)
            found.update(zip(own, written, strict=True))
        return [found[k] for k in range(len(texts))]

    def write_each(
        self, texts: Texts, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Generation]:
        """What comes after texts that share nothing."""
        body = [self.request([t], sampling, s) for t, s in zip(texts, seeds, strict=True)]
        answers = self.servers.ask(body)
        return [self._generations(a, 1, sampling.max_new_tokens)[0] for a in answers]

    def read(self, texts: Texts) -> list[Float[Tensor, " L"]]:
        """The log-probs of given texts' tokens but the first, nats."""
        wanted = [self.request([text], ONCE, 0, prompt_logprobs=0) for text in texts]
        found = []
        for text, answer in zip(texts, self.servers.ask(wanted), strict=True):
            with self._expecting(answer):
                found.append(_told(answer["choices"][0]["prompt_logprobs"], text))
        return found

    def request(
        self, texts: Texts, sampling: Sampling, seed: int, group: int | None = None, **more: Any
    ) -> Request:
        """Everything is said: no default of a server or of its model counts."""
        body = {
            "prompt": [list(text) for text in texts],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0,
            "repetition_penalty": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "seed": seed,
            **self._bias(),
            "return_token_ids": True,
            "ignore_eos": True,  # the server's idea of it
            "stop_token_ids": sorted(self.ends),
            **self.servers.model,
            **more,
        }
        return Request(COMPLETIONS, body, group)

    def _bias(self) -> dict[str, Any]:
        """Bars the unshared ids, and asks for the log-probs that they have without the bar."""
        if not self.unshared:
            return {"logprobs": 0}
        listed = self.unshared[:LISTED]
        return {
            "logit_bias": {str(token): -100 for token in self.unshared},  # vLLM's least
            "logprobs": LIKELIEST,  # where it knows no lists
            "logprob_token_ids": list(listed),
            "return_tokens_as_token_ids": True,
        }

    def _generations(self, answer: Any, count: int, limit: int) -> list[Generation]:
        """What was written after ``count`` texts, at most ``limit`` tokens each, in their order."""
        with self._expecting(answer):
            found = [self._whole(choice, limit) for choice in _in_order(answer["choices"], count)]
        for one in found:
            self._check(one.tokens)
        return found

    @contextmanager
    def _expecting(self, answer: Any) -> Iterator[None]:
        """Inside, an answer that is of another form is refused. Raises TOPDError."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise TOPDError(
                f"{self.servers.name}: no whole answer ({error!r}): {str(answer)[:200]}. Use vLLM "
                "0.11 or later, started as topd serve-teacher does, and nothing that interrupts it."
            ) from error

    def _whole(self, choice: dict[str, Any], limit: int) -> Generation:
        """One of an answer's texts. Raises ValueError where something other cut it short."""
        tokens, why = tuple(choice.get("token_ids") or ()), choice["finish_reason"]
        ended, read = not self.ends.isdisjoint(tokens[-1:]), len(tokens) - 1
        if why not in ("stop", "length") or not (ended or len(tokens) == limit):
            raise ValueError(f"finish_reason {why!r} after {len(tokens)} of {limit} token_ids")
        logprobs = self._logprobs(choice["logprobs"])
        if len(logprobs) != len(tokens):
            raise ValueError(f"{len(logprobs)} log-probs of {len(tokens)} tokens")
        wrong = [logprob for logprob in logprobs if not logprob <= ROUNDED]  # NaN too
        if wrong:
            raise ValueError(f"a log-prob of {wrong[0]:g}, which is not at most 0")
        if not self.ends.isdisjoint(tokens[:-1]):
            raise ValueError(f"{len(tokens)} token_ids, which go on after an end")
        return Generation(tokens, logprobs, ended, effort=Effort(read, read))

    def _check(self, tokens: Sequence[int]) -> None:
        """Refuse ids that may not be written. Raises TOPDError."""
        strange = next(
            (token for token in tokens if token in self.barred or token >= self.rows), None
        )
        if strange is None:
            return
        if strange >= self.rows:
            why = f" of a vocabulary of {self.rows}. It serves another model."
        elif strange in self.unshared:
            why = (
                ", which not all models of the run have, although logit_bias forbids it. Serve it "
                "with vLLM 0.11 or later, which heeds logit_bias."
            )
        else:
            why = ", an id without a token. Leave served out: in this process such ids are barred."
        raise TOPDError(f"{self.servers.name}: wrote token {strange}{why}")

    def _logprobs(self, told: Any) -> tuple[float, ...]:
        """Of a text's tokens, among the ids that all models have; at most 0 where rounding is.

        Raises ValueError where the others' are not told: neither theirs nor those of the likeliest.
        """
        if not self.unshared:
            return tuple(map(float, told["token_logprobs"]))
        names, found = [f"token_id:{token}" for token in self.unshared], []
        for own, listed in zip(told["token_logprobs"], told["top_logprobs"], strict=True):
            known = sum(name.startswith("token_id:") for name in listed)
            if known < min(LIKELIEST, self.rows) and not {*names[:LISTED]} <= {*listed}:
                raise ValueError(f"{known} of {len(names[:LISTED])} logprob_token_ids")
            others = sum(math.exp(listed[name]) for name in names if name in listed)
            found.append(own - math.log(max(1 - others, math.exp(own), 1e-300)))
        return tuple(found)


def _in_order(choices: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """One choice a text, in the texts' order. Raises ValueError where they are others."""
    known = {choice.get("index", k): choice for k, choice in enumerate(choices)}
    if len(choices) != count or {*known} != {*range(count)}:
        raise ValueError(f"choices {[*known]} to {count} texts")
    return [known[k] for k in range(count)]


def _told(places: Sequence[Any], text: Ids) -> Float[Tensor, " L"]:
    """From vLLM's mapping of token to log-prob at each place; the first has none."""
    read = zip(places[1:], text[1:], strict=True)
    return torch.tensor([place[str(token)]["logprob"] for place, token in read])


class VLLMEngine(BaseEngine):
    """A model on vLLM servers; of ``model`` only head and embeddings are used.

    Args:
        model: see :meth:`~topd.inputs.models.ModelSpec.load_frame`.
        path: what messages call its weights.
        served: where the servers are.
        unshared: ids of tokens that not all models have; see :class:`Completions`.
        eos_ids, vocab_size, allowed, name, autocast: as in BaseEngine.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        path: str,
        served: ServedSpec,
        unshared: Sequence[int] = (),
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, **options)
        self.path = path
        servers = Servers(f"{self.name} (completions)", served.completions, served)
        self.completions = Completions(servers, self, unshared)
        self.pooling = Servers(f"{self.name} (pooling)", served.pooling, served)

    def generate(
        self, prompts: Texts, sampling: Sampling, seeds: Sequence[int], *, tick: Tick = no_tick
    ) -> list[Generation]:
        """Sample one response a prompt. See :class:`~topd.engines.Engine`."""
        check_seeds(seeds, prompts)
        return self.completions.write_each(prompts, sampling, seeds)

    @torch.no_grad()
    def score(
        self, prompts: Texts, responses: Texts, *, temperature: float = 1.0, keep: bool = True
    ) -> Scores:
        """Log-probs and last hidden states of responses. See :class:`~topd.engines.Engine`.

        The hidden states come over the wire in the head's own dtype.
        """
        states = self.states(
            [(p + r)[:-1] for p, r in zip(prompts, responses, strict=True)], self.pooling
        )
        hidden = torch.nn.utils.rnn.pad_sequence(
            [h[len(p) - 1 :] for h, p in zip(states, prompts, strict=True)], batch_first=True
        ).to(self.model.device)
        with self.evaluating():
            prefix = Prefix(tuple(prompts), tuple(responses))
            return scores_of(hidden, self.head, prefix, temperature)

    def states(self, texts: Texts, servers: Servers) -> list[Float[Tensor, "L D"]]:
        """Last hidden states of whole texts. Raises TOPDError if they do not fit the head."""
        dtype, width = self.head.weight.dtype, self.head.weight.shape[1]
        body = {
            "task": "token_embed",
            "use_activation": False,
            "encoding_format": "bytes_only",
            "embed_dtype": WIRE[dtype],
            "endianness": "little",
            **servers.model,
        }
        answers = servers.fetch([Request(POOLING, {"input": list(t), **body}) for t in texts])
        for answer, text in zip(answers, texts, strict=True):
            if len(answer) != len(text) * width * dtype.itemsize:
                raise TOPDError(
                    f"{servers.name}: {len(answer)} bytes for {len(text)} tokens, where states of "
                    f"width {width} have {len(text) * width * dtype.itemsize}. It serves another "
                    "model, or was not started for token_embed."
                )
        return [torch.frombuffer(bytearray(a), dtype=dtype).view(-1, width) for a in answers]

    def continue_from(
        self,
        scores: Scores,
        starts: Starts,
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        rejoin: int = 0,
        tick: Tick = no_tick,
    ) -> list[Generation]:
        """Continue scored responses from (row, token) pairs. See :class:`~topd.engines.Engine`.

        Windows are written to their end: ``rejoin`` changes nothing. Hidden states are not kept.
        """
        prefix = scores.prefix
        assert isinstance(prefix, Prefix)
        check_seeds(seeds, starts)
        return self.completions.write(
            prefix.before(starts), [b for b, _ in starts], sampling, seeds
        )
