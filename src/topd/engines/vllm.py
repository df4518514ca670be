"""The served engines: models that vLLM servers read and write, token ids in and out.

A teacher needs two kinds of servers. *Completions* servers write windows, behind prefixes that
their prefix cache knows; *pooling* servers give the last hidden states of scored texts, D numbers
a token instead of V. The teacher's head and input embeddings are in this process, so that the
loss sees its whole distribution; its decoder is not. A student in training may have its rollouts
written by servers, which are given its weights after every update.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from topd.engines import Scores, Tick, no_tick
from topd.engines.hf import HFEngine, check_seeds, head_of
from topd.engines.servers import Request, ServedSpec, Servers
from topd.ledger import trained_digest
from topd.losses import linear_logprobs
from topd.models import PROBE, ModelSpec, eos_ids
from topd.types import Effort, Generation, Ids, Sampling, TOPDError

COMPLETIONS, POOLING = "/v1/completions", "/pooling"
WIRE = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
PROBED = Sampling(temperature=0.5, max_new_tokens=8)  # no log-prob may depend on its temperature


@dataclass(frozen=True)
class _Prefix:
    """What ``continue_from`` needs: the texts. The servers' prefix caches have the rest."""

    prompts: tuple[Ids, ...]
    responses: tuple[Ids, ...]


class TopScores(NamedTuple):
    """What a model says of a text's tokens but the first, in nats: L - 1 of them.

    ``logprobs`` [L-1] of the tokens that stand there; ``tokens`` and ``top`` [L-1 k] of the
    likeliest there.
    """

    logprobs: Float[Tensor, " L"]
    tokens: Int[Tensor, "L k"]
    top: Float[Tensor, "L k"]


class Completions:
    """Texts from completions servers.

    Log-probs are the model's own, those of temperature 1, whatever a text is sampled at.

    Args:
        servers: vLLM's OpenAI-compatible API.
        ends: tokens that end a text.
        vocab_size: tokens from this one on are an error.
    """

    def __init__(self, servers: Servers, ends: Iterable[int], vocab_size: int) -> None:
        self.servers, self.ends, self.vocab_size = servers, frozenset(ends), vocab_size

    def write(
        self, groups: Sequence[Sequence[Ids]], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Generation]]:
        """What comes behind every text; those of a group share a prefix and go to one server.

        Greedy texts of a group are one request, in the order of their length: what one has left in
        the prefix cache the next one finds there. Sampled ones are a request each, with their seed.
        """
        wanted, sizes = [], []
        for number, (texts, own) in enumerate(zip(groups, seeds, strict=True)):
            parts: list[tuple[Sequence[Ids], int]] = [(texts, own[0])]
            if sampling.temperature:
                parts = [([text], seed) for text, seed in zip(texts, own, strict=True)]
            wanted += [self._request(some, sampling, seed, number) for some, seed in parts]
            sizes.append(len(texts))
        written = iter([g for a in self.servers.ask(wanted) for g in self._generations(a)])
        return [[next(written) for _ in range(size)] for size in sizes]

    def write_each(
        self, texts: Sequence[Ids], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Generation]:
        """What comes behind texts that share nothing."""
        body = [self._request([t], sampling, s) for t, s in zip(texts, seeds, strict=True)]
        return [g for answer in self.servers.ask(body) for g in self._generations(answer)]

    def read(self, texts: Sequence[Ids], k: int) -> list[TopScores]:
        """The log-probs of given texts and of the ``k`` likeliest tokens at each place."""
        once = Sampling(temperature=0, max_new_tokens=1)
        wanted = [self._request([text], once, 0, prompt_logprobs=k) for text in texts]
        return [
            _top_scores(answer["choices"][0]["prompt_logprobs"], text, k)
            for answer, text in zip(self.servers.ask(wanted), texts, strict=True)
        ]

    def _request(
        self,
        texts: Sequence[Ids],
        sampling: Sampling,
        seed: int,
        group: int | None = None,
        **more: Any,
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
            "logprobs": 0,
            "return_token_ids": True,
            "ignore_eos": True,  # the server's idea of it
            "stop_token_ids": sorted(self.ends),
            **self.servers.model,
            **more,
        }
        return Request(COMPLETIONS, body, group)

    def _generations(self, answer: Any) -> Iterable[Generation]:
        for choice in answer["choices"]:
            tokens = choice.get("token_ids")
            if tokens is None or choice["finish_reason"] not in ("stop", "length"):
                raise TOPDError(
                    f"{self.servers.name}: no whole answer (token_ids {tokens}, finish_reason "
                    f"{choice['finish_reason']!r}). Use vLLM 0.11 or later, and nothing that "
                    "interrupts it."
                )
            if max(tokens) >= self.vocab_size:
                raise TOPDError(
                    f"{self.servers.name}: wrote token {max(tokens)} of a vocabulary of "
                    f"{self.vocab_size}. It serves another model."
                )
            logprobs, behind = choice["logprobs"]["token_logprobs"], len(tokens) - 1
            ended = tokens[-1] in self.ends
            yield Generation(tuple(tokens), tuple(logprobs), ended, effort=Effort(behind, behind))


def _top_scores(places: Sequence[Any], text: Ids, k: int) -> TopScores:
    """From vLLM's mapping of token to log-prob and rank at each place; the first has none."""
    logprobs, tokens, top = [], [], []
    for place, token in zip(places[1:], text[1:], strict=True):
        ranked = sorted(place.items(), key=lambda entry: entry[1]["rank"])[:k]
        logprobs.append(place[str(token)]["logprob"])
        tokens.append([int(t) for t, _ in ranked])
        top.append([entry["logprob"] for _, entry in ranked])
    count = len(logprobs)
    return TopScores(
        torch.tensor(logprobs),
        torch.tensor(tokens, dtype=torch.long).reshape(count, -1),
        torch.tensor(top).reshape(count, -1),
    )


class VLLMEngine(HFEngine):
    """A model on vLLM servers; of ``model`` only head and embeddings are used.

    Args:
        model: see :meth:`~topd.models.ModelSpec.load_frame`.
        path: what messages call its weights.
        served: where the servers are.
        eos_ids, vocab_size, name, autocast: as in HFEngine.
    """

    def __init__(
        self, model: PreTrainedModel, path: str, served: ServedSpec, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self.path = path
        self.completions = Completions(
            Servers(f"{self.name} (completions)", served.completions, served),
            self._ends,
            self.vocab_size,
        )
        self.pooling = Servers(f"{self.name} (pooling)", served.pooling, served)

    def generate(
        self,
        prompts: Sequence[Ids],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        tick: Tick = no_tick,
    ) -> list[Generation]:
        """Sample one response a prompt. See :class:`~topd.engines.Engine`."""
        check_seeds(seeds, prompts)
        return self.completions.write_each(prompts, sampling, seeds)

    @torch.no_grad()
    def score(
        self, prompts: Sequence[Ids], responses: Sequence[Ids], *, temperature: float = 1.0
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
        prefix = _Prefix(tuple(prompts), tuple(responses))
        with self._evaluating():
            return self._scores(hidden, responses, temperature, prefix)

    def score_top(
        self, prompts: Sequence[Ids], responses: Sequence[Ids], k: int
    ) -> list[TopScores]:
        """The responses' log-probs and the ``k`` likeliest tokens, as a completions server says.

        A part of the distribution, and more bytes than hidden states for a ``k`` that matters: the
        check at the door and the measurement of what is sent use it, no loss does.
        """
        read = self.completions.read([p + r for p, r in zip(prompts, responses, strict=True)], k)
        starts = [len(prompt) - 1 for prompt in prompts]
        return [TopScores(*(x[t:] for x in row)) for row, t in zip(read, starts, strict=True)]

    def states(self, texts: Sequence[Ids], servers: Servers) -> list[Float[Tensor, "L D"]]:
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
        starts: Sequence[tuple[int, int]],
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
        assert isinstance(prefix, _Prefix)
        check_seeds(seeds, starts)
        rows: dict[int, list[int]] = {}
        for k in sorted(range(len(starts)), key=starts.__getitem__):
            rows.setdefault(starts[k][0], []).append(k)
        written = self.completions.write(
            [
                [prefix.prompts[b] + prefix.responses[b][: starts[k][1]] for k in row]
                for b, row in rows.items()
            ],
            sampling,
            [[seeds[k] for k in row] for row in rows.values()],
        )
        found = {
            k: window
            for row, windows in zip(rows.values(), written, strict=True)
            for k, window in zip(row, windows, strict=True)
        }
        return [found[k] for k in range(len(starts))]


class ServedStudent(HFEngine):
    """A model in training, whose responses its vLLM servers write with the weights of now.

    The weights go into the folder ``served.weights`` whenever they have changed; the servers pause,
    load them, forget what they have cached, and are asked for the log-probs of a probe, which must
    be those of this process. All else is done here.

    Args:
        model: the student.
        served: where its servers are; started by ``topd serve-student``.
        probe: token ids of a text.
        eos_ids, vocab_size, name, autocast: as in HFEngine.
    """

    def __init__(
        self, model: PreTrainedModel, served: ServedSpec, probe: Ids, **options: Any
    ) -> None:
        super().__init__(model, **options)
        servers = Servers(f"{self.name} (rollouts)", served.completions, served)
        self.completions = Completions(servers, self._ends, self.vocab_size)
        self.probe, self._served_digest = probe, ""
        self.held = False  # write with the weights that the servers have

    def generate(
        self,
        prompts: Sequence[Ids],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        tick: Tick = no_tick,
    ) -> list[Generation]:
        """Sample one response a prompt. See :class:`~topd.engines.Engine`.

        Raises TOPDError if a server has not the weights of now, StoppedError if none is left.
        """
        check_seeds(seeds, prompts)
        if not self.held:
            self.bring_up_to_date()
        return self.completions.write_each(prompts, sampling, seeds)

    def bring_up_to_date(self) -> None:
        """Give the servers the weights of now, if they have others. Raises as ``generate``."""
        digest = trained_digest(self.model)
        if digest != self._served_digest:
            self._hand_over(digest)
            self._served_digest = digest

    def _hand_over(self, digest: str) -> None:
        """Give the servers the weights of now. On an error they stay paused: nobody is misled."""
        servers = self.completions.servers
        folder = Path(servers.served.weights or "").absolute()
        place = folder / digest[:16]
        _merged(self.model).save_pretrained(place)
        try:
            servers.post_to_each("/pause?mode=wait")
            servers.post_to_each(
                "/collective_rpc", {"method": "take_weights", "args": [str(place)]}
            )
            servers.post_to_each("/reset_prefix_cache")
            servers.post_to_each("/resume")
        finally:
            shutil.rmtree(place)
        self._check_weights()

    def _check_weights(self) -> None:
        ours = self.score([self.probe[:1]], [self.probe[1:]]).logprobs[0].cpu()
        for server in self.completions.servers.alone():
            (theirs,) = Completions(server, self._ends, self.vocab_size).read([self.probe], 0)
            _agree(
                server,
                f"{server.urls[0]} with the weights that it was given",
                theirs.logprobs,
                "the student in training",
                ours,
                "The servers must load what they are told: start them with topd serve-student, of "
                "this version, and share the folder student.served.weights.",
            )


def _merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model itself; of one with an adapter a copy that has it in its weights."""
    if isinstance(model, PeftModel):
        return copy.deepcopy(model).merge_and_unload()
    return model


def check_servers(
    name: str, model: object, tokenizer: PreTrainedTokenizerBase, longest: int
) -> None:
    """Make sure that the servers of a model, if it is served, are there and are of that model.

    Needs no weights. Names and tokenizers are compared; ``longest`` is the most tokens that will be
    asked for at once.

    Raises:
        TOPDError: a server has another model, another tokenizer or too little room.
        StoppedError: a server does not answer.
    """
    if not isinstance(model, ModelSpec) or model.served is None:
        return
    probe, served = _probe(tokenizer), model.served
    for server in Servers(name, [*served.completions, *served.pooling], served).alone():
        _check_model(server, model.path, longest)
        _check_tokenizer(server, probe)


def check_logprobs(engine: VLLMEngine, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that all servers of a model agree on the log-probs of a probe, at temperature 1.

    Compared are those of each completions server when it writes, when it reads and when it reads
    again, and those of each pooling server's states under the head that is here. Raises TOPDError
    with both numbers where they differ, StoppedError if a server does not answer.
    """
    probe = _probe(tokenizer)
    for server in engine.completions.servers.alone():
        text, told = _told(Completions(server, engine.completions.ends, engine.vocab_size), probe)
        for reader in engine.pooling.alone():
            _check_states(engine, server, reader, text, told)


def _probe(tokenizer: PreTrainedTokenizerBase) -> Ids:
    return tuple(tokenizer(PROBE, add_special_tokens=False)["input_ids"])


def _check_model(server: Servers, path: str, longest: int) -> None:
    """By the names that a server gives its models; a path and a hub name may end alike."""
    wanted, listed = server.served.model or path, server.get("/v1/models")["data"]
    for model in listed:
        names = (model["id"], model.get("root") or "")
        if wanted in names or (
            not server.served.model and PurePath(wanted).name in [PurePath(n).name for n in names]
        ):
            room = model.get("max_model_len") or longest
            break
    else:
        raise TOPDError(
            f"{server.name}: {server.urls[0]} serves {', '.join(m['id'] for m in listed)}, not "
            f"{wanted}. Serve that, or name the same model as the server does in served.model."
        )
    if room < longest:
        raise TOPDError(
            f"{server.name}: {server.urls[0]} has room for {room} tokens; the longest prompt, "
            f"max_completion_length and window_length make {longest}. Raise its --max-model-len, "
            "or lower these."
        )


def _check_tokenizer(server: Servers, probe: Ids) -> None:
    body = {"prompt": PROBE, "add_special_tokens": False, **server.model}
    theirs = tuple(server.post("/tokenize", body)["tokens"])
    if theirs != probe:
        raise TOPDError(
            f"{server.name}: the tokenizer of {server.urls[0]} splits {PROBE!r} into {theirs}, "
            f"that of the recipe's path into {probe}. Serve the model of the recipe."
        )


def _told(completions: Completions, probe: Ids) -> tuple[Ids, Tensor]:
    """The probe with what the server writes behind it, and its log-probs [L - 1] as it reads them.

    Raises TOPDError if the log-probs that it writes with, or those of a second reading, differ.
    """
    server = completions.servers
    (written,) = completions.write_each([probe], PROBED, [0])
    text = probe + written.tokens
    told, again = (scores.logprobs for scores in completions.read([text, text], 0))
    url = server.urls[0]
    _agree(server, f"{url} at first", told, "asked again", again, "It must answer alike twice.")
    _agree(
        server,
        f"{url} when it reads",
        told[len(probe) - 1 :],
        f"when it writes at temperature {PROBED.temperature}",
        torch.tensor(written.logprobs),
        "Both must be of temperature 1: start it with --logprobs-mode raw_logprobs.",
    )
    return text, told


def _check_states(
    engine: VLLMEngine, writer: Servers, reader: Servers, text: Ids, told: Tensor
) -> None:
    (states,) = engine.states([text[:-1]], reader)
    tokens = torch.tensor(text[1:], device=engine.model.device)
    ours, _ = linear_logprobs(states.to(tokens.device), engine.head, tokens)
    _agree(
        writer,
        writer.urls[0],
        told,
        f"the states of {reader.urls[0]} under the head of {engine.path}",
        ours.cpu(),
        f"Serve {engine.path} on both, and read it in their dtype.",
    )


def _agree(
    server: Servers, one: str, ours: Tensor, other: str, theirs: Tensor, remedy: str
) -> None:
    """Raise TOPDError unless the log-probs of the same tokens are alike."""
    gap, most = (ours.float() - theirs.float()).abs().mean().item(), server.served.tolerance
    if not gap <= most:  # a NaN is refused too
        raise TOPDError(
            f"{server.name}: {one}, {ours.mean():.4f} nats a token of a probe; {other}, "
            f"{theirs.mean():.4f}. They differ by {gap:.4f} in the mean, served.tolerance is "
            f"{most:g}. {remedy}"
        )


def open_engines(
    sources: tuple[object, object],
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    temperature: float,
    autocast: Callable[[], AbstractContextManager[None]],
) -> tuple[HFEngine, HFEngine]:
    """The engines of a student and a teacher, served where their ``sources`` say so, and checked.

    Raises:
        TOPDError: servers of the teacher disagree, or the student's cannot tell the log-probs of
            ``temperature``.
        StoppedError: a server does not answer.
    """
    options: dict[str, Any] = {
        "eos_ids": eos_ids(models[0], tokenizers[0]),
        "vocab_size": min(head_of(model).vocab_size for model in models),
        "autocast": autocast,
    }
    served = [(isinstance(source, ModelSpec) and source.served) or None for source in sources]
    student = teacher = None
    if served[0]:
        if temperature != 1:
            raise TOPDError(
                f"temperature: {temperature:g} does not go with student.served, whose log-probs "
                "are those of temperature 1. Set it to 1, or leave student.served out."
            )
        probe = _probe(tokenizers[0])
        student = ServedStudent(models[0], served[0], probe, name="student", **options)
    if served[1]:
        path = models[1].config._name_or_path
        teacher = VLLMEngine(models[1], path, served[1], name="teacher", **options)
        check_logprobs(teacher, tokenizers[1])
    return (
        student or HFEngine(models[0], name="student", **options),
        teacher or HFEngine(models[1], name="teacher", **options),
    )
