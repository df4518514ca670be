"""A served teacher against an embedded one: ``python -m bench.served FOLDER COMPLETIONS POOLING``.

FOLDER is the teacher and student at once, the teacher told the solution; the servers are those of
``topd serve-teacher FOLDER --max-logprobs -1``. What goes over the wire is the bodies of requests
and answers. All is measured on this machine: servers and trainer share its cores.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import requests
import torch
import typer

from bench.measure import RESULTS, Found, Table, describe, environment, paired, spread, summary
from topd.engines import Scores
from topd.engines.hf import HFEngine
from topd.engines.servers.checks import check_logprobs, check_servers
from topd.engines.servers.vllm import ONCE, VLLMEngine
from topd.inputs.models import ModelSpec
from topd.inputs.prompts import PromptEncoder
from topd.inputs.rows import DataSpec
from topd.inputs.served import ServedSpec
from topd.losses import linear_token_divergence
from topd.types import Head, Ids, Prompt, Sampling

PROMPT = "{{ prompt }}\n\nA correct solution, for you to follow:\n{{ solution }}\n"
DATA = {"task": "gsm_symbolic", "seed": 1, "columns": {"prompt": "question"}}
SOLUTION = {"columns": {"prompt": "question", "solution": "metadata.answer_cot"}}
WAYS = {"states": "last hidden states", "top": "top k", "full": "all log-probs"}


class Wire:
    """Bytes that an engine sends and receives."""

    def __init__(self, engine: VLLMEngine) -> None:
        self.seen: list[tuple[int, int]] = []  # appended to by many threads
        for servers in (engine.completions.servers, engine.pooling):
            servers._content = partial(self._counted, servers._content)

    def _counted(
        self, read: Callable[..., bytes], answer: requests.Response, *limits: Any
    ) -> bytes:
        content = read(answer, *limits)  # answers are streamed: to read them twice is to lose them
        self.seen.append((len(answer.request.body or b""), len(content)))
        return content

    def of(self, case: Callable[[], object]) -> Found:
        """The bytes of one call."""
        self.seen.clear()
        case()
        sent, received = (sum(sizes) for sizes in zip(*self.seen, strict=True))
        return {"sent": sent, "received": received}


def main(
    folder: str,
    completions: str,
    pooling: str,
    batch: Annotated[int, typer.Option(help="Rollouts.")] = 8,
    tokens: Annotated[int, typer.Option(help="Longest rollout.")] = 128,
    window: int = 50,
    every: Annotated[int, typer.Option(help="Tokens from one window to the next.")] = 40,
    k: int = 20,
    full: Annotated[int, typer.Option(help="Tokens whose log-probs are all sent.")] = 8,
    runs: int = 6,
    results: Path = RESULTS,
) -> None:
    """Bytes, tokens a second, and what is lost, for each way to ask a teacher."""
    started = environment()
    served = ServedSpec(completions=(completions,), pooling=(pooling,))
    spec = ModelSpec(path=folder, dtype="bfloat16", served=served)
    tokenizer = spec.load_tokenizer()
    check_servers("teacher", spec, tokenizer, 1)
    options: Found = {"eos_ids": [tokenizer.eos_token_id], "name": "teacher"}
    embedded = HFEngine(spec.load_model(), **options)
    engine = VLLMEngine(spec.load_frame(), folder, served, **options)
    check_logprobs(engine, tokenizer)
    encoder = PromptEncoder(tokenizer, tokenizer, PROMPT, 640, False, {})
    data = DataSpec.model_validate({**DATA, **SOLUTION, "size": batch})
    prompts = encoder.encode(data.load())
    found = measure(prompts, embedded, engine, tokens, window, every, k, full, runs)
    settings = {"precision": "bfloat16", "model": Path(folder).name, "batch": batch, "runs": runs}
    settings |= {"tokens": tokens, "window": window, "every": every, "k": k}
    command = f"python -m bench.served {shlex.join(sys.argv[1:])}"
    record = {"command": command, "environment": started, "settings": settings, "results": found}
    (results / "served.json").write_text(json.dumps(record, indent=1) + "\n")
    print(describe(record), *map(str, tables(record)), sep="\n\n")


def measure(
    prompts: list[Prompt],
    embedded: HFEngine,
    engine: VLLMEngine,
    tokens: int,
    window: int,
    every: int,
    k: int,
    full: int,
    runs: int,
) -> Found:
    """All figures."""
    wire, seeds = Wire(engine), range(len(prompts))
    asked, told = [p.student for p in prompts], [p.teacher for p in prompts]
    sampling = Sampling(1.0, max_new_tokens=tokens)
    responses = [w.tokens for w in embedded.generate(asked, sampling, seeds)]
    ours, theirs = embedded.score(told, responses), engine.score(told, responses)
    starts = [(b, t) for b, r in enumerate(responses) for t in range(0, len(r), every)]
    greedy, some = Sampling(0.0, max_new_tokens=window), range(len(starts))
    short = [told[0][:1]], [told[0][1 : full + 1]]  # a whole prompt would fill the memory
    ways: dict[str, dict[str, Callable[[], Any]]] = {
        "rollouts": {
            "embedded": lambda: embedded.generate(asked, sampling, seeds),
            "served": lambda: engine.generate(asked, sampling, seeds),
        },
        "scoring": {
            "embedded": lambda: embedded.score(told, responses),
            "states": lambda: engine.score(told, responses),
            "top": lambda: top_scores(engine, told, responses, k),
        },
        "windows": {
            "embedded": lambda: embedded.continue_from(ours, starts, greedy, some),
            "served": lambda: engine.continue_from(theirs, starts, greedy, some),
        },
    }
    found = {phase: summary(paired(cases, runs)) for phase, cases in ways.items()}
    for phase, cases in ways.items():
        for name, case in cases.items():
            found[phase][name] |= {"tokens": _written(phase, case, responses)}
            if name != "embedded":
                found[phase][name] |= wire.of(case)
    vocabulary = engine.head.vocab_size
    everything = lambda: top_scores(engine, *short, vocabulary)  # noqa: E731
    found["scoring"]["full"] = wire.of(everything) | {"tokens": full}
    read = sum(map(len, told)) + sum(map(len, responses)) - len(told)  # the last needs no state
    found["read"] = {"states": read, "top": read, "full": full}
    found["reverse_kl"] = divergences(asked, responses, embedded, engine, ours, theirs, told, k)
    return found


def _written(phase: str, case: Callable[[], Any], responses: list[Ids]) -> int:
    """Tokens that a call yields."""
    if phase == "scoring":
        return sum(map(len, responses))
    return sum(len(one.tokens) for one in case())


def divergences(
    asked: list[Ids],
    responses: list[Ids],
    embedded: HFEngine,
    engine: VLLMEngine,
    ours: Scores,
    theirs: Scores,
    told: list[Ids],
    k: int,
) -> Found:
    """Mean reverse KL in nats a token by what is known of the teacher."""
    student = embedded.score(asked, responses)
    mask = student.logprobs != 0

    def full(scores: Scores, head: Head) -> float:
        return (
            linear_token_divergence(
                student.hidden[mask], embedded.head, scores.hidden[mask], head, kind="reverse_kl"
            )
            .mean()
            .item()
        )

    top = top_scores(engine, told, responses, k)
    cut = [
        truncated(embedded.head.logits(student.hidden[b, : len(r)]).log_softmax(-1), top[b])
        for b, r in enumerate(responses)
    ]
    return {
        "embedded": full(ours, embedded.head),
        "states": full(theirs, engine.head),
        "top": torch.cat(cut).mean().item(),
    }


class TopScores(NamedTuple):
    """Log-probs [L] of a response's tokens, nats, and the likeliest tokens there, [L k] each."""

    logprobs: torch.Tensor
    tokens: torch.Tensor
    top: torch.Tensor


def top_scores(
    engine: VLLMEngine, prompts: list[Ids], responses: list[Ids], k: int
) -> list[TopScores]:
    """The responses' log-probs and the ``k`` likeliest tokens, as a completions server says."""
    own, pairs = engine.completions, list(zip(prompts, responses, strict=True))
    asked = [own.request([p + r], ONCE, 0, prompt_logprobs=k) for p, r in pairs]
    found = []
    for answer, (prompt, response) in zip(own.servers.ask(asked), pairs, strict=True):
        places = answer["choices"][0]["prompt_logprobs"][len(prompt) :]
        ranked = [sorted(place.items(), key=lambda one: one[1]["rank"])[:k] for place in places]
        told = zip(places, response, strict=True)
        found.append(
            TopScores(
                torch.tensor([place[str(token)]["logprob"] for place, token in told]),
                torch.tensor([[int(token) for token, _ in row] for row in ranked]),
                torch.tensor([[entry["logprob"] for _, entry in row] for row in ranked]),
            )
        )
    return found


def truncated(student: torch.Tensor, top: TopScores) -> torch.Tensor:
    """Reverse KL [L] on the teacher's likeliest tokens and one bucket for the rest, nats."""
    own = student.gather(-1, top.tokens)
    p, q = (
        torch.cat([x.exp(), (1 - x.exp().sum(-1, keepdim=True)).clamp(min=1e-9)], -1)
        for x in (own, top.top)
    )
    return (p * (p / q).log()).sum(-1)


def tables(found: Found) -> list[Table]:
    """Speed, wire, and what is lost."""
    results = found["results"]
    speed = [
        [
            phase,
            name,
            f"{row['seconds']:.2f}",
            f"{row['tokens'] / row['seconds']:.0f}",
            spread(row["ratio"]),
        ]
        for phase in ("rollouts", "scoring", "windows")
        for name, row in results[phase].items()
        if "seconds" in row
    ]
    wire = [
        [
            WAYS[name],
            f"{row['received'] / row['tokens']:,.0f}",
            f"{row['received'] / results['read'][name]:,.0f}",
            f"{row['sent'] / row['tokens']:,.0f}",
        ]
        for name in WAYS
        for row in [results["scoring"][name]]
    ]
    windows = results["windows"]["served"]
    wire.append(
        [
            "windows",
            f"{windows['received'] / windows['tokens']:,.0f}",
            "",
            f"{windows['sent'] / windows['tokens']:,.0f}",
        ]
    )
    lost = [[name, f"{value:.5f}"] for name, value in results["reverse_kl"].items()]
    return [
        Table("Speed", ["phase", "way", "seconds", "tokens a second", "over embedded"], speed),
        Table(
            "Bytes on the wire",
            ["what", "received a response token", "received a token read", "sent a response token"],
            wire,
        ),
        Table("Reverse KL", ["teacher", "nats a token"], lost),
    ]


if __name__ == "__main__":
    typer.run(main)
