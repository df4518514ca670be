"""Checks of servers at the start: they serve the model that is meant, and say the same of it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import PurePath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from topd.engines.base import BaseEngine
from topd.engines.hf import HFEngine
from topd.engines.servers import Servers
from topd.engines.servers.vllm import Completions, VLLMEngine
from topd.errors import TOPDError
from topd.inputs.models import ModelSpec, counted
from topd.inputs.models.heads import head_of
from topd.inputs.models.vocabulary import PROBE
from topd.inputs.served import ServedSpec
from topd.losses import linear_logprobs
from topd.types import Ids, Sampling

PROBED = Sampling(temperature=0.5, max_new_tokens=8)  # no log-prob may depend on its temperature


def check_servers(
    name: str, model: object, tokenizer: PreTrainedTokenizerBase, longest: int, window: int = 0
) -> None:
    """Make sure that the servers of a model, if it is served, are there and are of that model.

    Needs no weights. Names and tokenizers are compared; ``longest`` is the most tokens of a
    prompt and its response, ``window`` of what will be asked for after them.

    Raises:
        TOPDError: a server has another model, another tokenizer or too little room.
        StoppedError: a server does not answer.
    """
    if not isinstance(model, ModelSpec) or model.served is None:
        return
    probe, served = probe_of(tokenizer), model.served
    for server in Servers(name, [*served.completions, *served.pooling], served).alone():
        _check_model(server, model.path, longest, window)
        _check_tokenizer(server, probe)


def check_logprobs(engine: VLLMEngine, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that all servers of a model agree on the log-probs of a probe, at temperature 1.

    Compared are those of each completions server when it writes, when it reads and when it reads
    again, and those of each pooling server's states under the head that is here. Raises TOPDError
    with both numbers where they differ, or if ids cannot be barred; StoppedError if a server does
    not answer. From now on requests say each server's name of the model, so that one that is
    started again with another refuses them.
    """
    for servers in (engine.completions.servers, engine.pooling):
        for one in servers.alone():
            with suppress(TOPDError):  # an auditor's own may have another name
                servers.names[one.urls[0]] = str(_model_of(one, engine.path)["id"])
    probe = probe_of(tokenizer)
    for completions in engine.completions.alone(bars=True) if engine.completions.unshared else ():
        completions.write_each([probe], PROBED, [0])  # as windows are
    for completions in engine.completions.alone():
        server = completions.servers
        text, told = _told(completions, probe)
        for reader in engine.pooling.alone():
            ours = _under_head(engine, reader, text)
            agree(
                server,
                server.urls[0],
                told,
                f"the states of {reader.urls[0]} under the head of {engine.path}",
                ours,
                f"Serve {engine.path} on both, and read it in their dtype.",
            )


def check_whole(engine: VLLMEngine, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that the states are those of the whole model, which is read once and dropped.

    What :func:`check_logprobs` cannot see is a model with the same head and another decoder. Raises
    TOPDError with both numbers.
    """
    probe = probe_of(tokenizer)
    whole = HFEngine(
        spec.load_model().to(engine.model.device), eos_ids=sorted(engine.completions.ends)
    )
    known = whole.score([probe[:1]], [probe[1:]]).logprobs[0].cpu()
    for reader in engine.pooling.alone():
        agree(
            reader,
            f"the states of {reader.urls[0]} under the head of {engine.path}",
            _under_head(engine, reader, probe),
            f"the whole of {engine.path}",
            known,
            f"Serve {engine.path}, and read it in the server's dtype.",
        )


def probe_of(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The ids of a text with digits, commands, accents and signs."""
    return tuple(tokenizer(PROBE, add_special_tokens=False)["input_ids"])


def _check_model(server: Servers, path: str, longest: int, window: int) -> None:
    room = _model_of(server, path).get("max_model_len")
    if room and room < longest + window:
        raise TOPDError(
            f"{server.name}: {server.urls[0]} has room for {room} tokens; {counted(window)} make "
            f"{longest + window}. Raise its --max-model-len, or lower these."
        )


def _model_of(server: Servers, path: str) -> dict[str, Any]:
    """What a server lists of a model, found by its names; a path and a hub name may end alike.

    Raises TOPDError if it lists only others.
    """
    wanted = server.served.model or path
    listed = _part(server, server.get("/v1/models"), "data")
    for model in listed:
        names = (model["id"], model.get("root") or "")
        if wanted in names or (
            not server.served.model and PurePath(wanted).name in [PurePath(n).name for n in names]
        ):
            return dict(model)
    raise TOPDError(
        f"{server.name}: {server.urls[0]} serves {', '.join(m['id'] for m in listed)}, not "
        f"{wanted}. Serve that, or name the same model as the server does in served.model."
    )


def _check_tokenizer(server: Servers, probe: Ids) -> None:
    body = {"prompt": PROBE, "add_special_tokens": False, **server.model}
    theirs = tuple(_part(server, server.post("/tokenize", body), "tokens"))
    if theirs != probe:
        raise TOPDError(
            f"{server.name}: the tokenizer of {server.urls[0]} splits {PROBE!r} into {theirs}, "
            f"that of the recipe's path into {probe}. Serve the model of the recipe."
        )


def _part(server: Servers, answer: Any, key: str) -> list[Any]:
    """The list of an answer under a key. Raises TOPDError if there is none."""
    found = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise TOPDError(
            f"{server.name}: {server.urls[0]} answers {str(answer)[:200]}, without a list {key!r}. "
            f"{server.served.other}"
        )
    return found


def _told(completions: Completions, probe: Ids) -> tuple[Ids, Tensor]:
    """The probe with what the server writes after it, and its log-probs [L - 1] as it reads them.

    Raises TOPDError if the log-probs that it writes with, or those of a second reading, differ.
    """
    server = completions.servers
    (written,) = completions.write_each([probe], PROBED, [0])
    text = probe + written.tokens
    told, again = completions.read([text, text])
    url = server.urls[0]
    agree(server, f"{url} at first", told, "asked again", again, "It must answer alike twice.")
    agree(
        server,
        f"{url} when it reads",
        told[len(probe) - 1 :],
        f"when it writes at temperature {PROBED.temperature}",
        torch.tensor(written.logprobs),
        "Both must be of temperature 1: start it with --logprobs-mode raw_logprobs.",
    )
    return text, told


def _under_head(engine: VLLMEngine, reader: Servers, text: Ids) -> Tensor:
    """Log-probs [L - 1] of a text but its first token, from a server's states, on the CPU."""
    (states,) = engine.states([text[:-1]], reader)
    return whole_logprobs(engine, states, text[1:])


@torch.no_grad()
def whole_logprobs(engine: BaseEngine, states: Float[Tensor, "L D"], tokens: Ids) -> Tensor:
    """Log-probs [L] of tokens among all rows of the head, as a server has them, on the CPU."""
    wanted = torch.tensor(tokens, device=engine.device)
    return linear_logprobs(states.to(engine.device), head_of(engine.model), wanted)[0].cpu()


def agree(server: Servers, one: str, ours: Tensor, other: str, theirs: Tensor, remedy: str) -> None:
    """Raise TOPDError unless the log-probs of the same tokens are alike."""
    assert isinstance(server.served, ServedSpec)
    gap, most = (ours.float() - theirs.float()).abs().mean().item(), server.served.tolerance
    if not gap <= most:  # a NaN is refused too
        raise TOPDError(
            f"{server.name}: {one}, {ours.mean():.4f} nats a token of a probe; {other}, "
            f"{theirs.mean():.4f}. They differ by {gap:.4f} in the mean, served.tolerance is "
            f"{most:g}. {remedy}"
        )
