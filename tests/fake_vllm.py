"""A server that answers as vLLM does, on a tiny model: for what must not take half a minute."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from topd.engines.hf import HFEngine
from topd.types import Sampling


@dataclass
class Fake:
    """What the server is and does; tests change it while it runs.

    ``statuses`` are answered first, one a request. ``sharpened`` log-probs are those of the
    temperature that a text is written at; ``noise`` is added to those that are read, another time
    with another sign. ``breaks`` answers break off. With ``loads`` off it only says that it has
    loaded weights, with ``heeds`` off it knows no logit_bias. To a prompt of text it answers with
    text, as its ``manner`` says: it continues it, starts ``over``, answers ``anew`` (chat), or
    ``strips`` white space. What it ``refuses`` it answers with a status, or ends with such a
    finish_reason. It reads the last ``context`` tokens of a text, and says how many.
    """

    engine: HFEngine
    tokenizer: PreTrainedTokenizerBase
    name: str = "teacher"
    room: int = 512
    context: int = 10**6
    delay: float = 0.0
    statuses: list[int] = field(default_factory=list)
    key: str | None = None
    sharpened: bool = False
    noise: float = 0.0
    finish: str = "stop"
    loads: bool = True
    breaks: int = 0
    manner: str = "continues"
    tells: bool = True
    heeds: bool = True
    refuses: Callable[[dict[str, Any]], int | str | None] = lambda body: None
    url: str = ""
    seen: Counter[str] = field(default_factory=Counter)
    order: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        """JSON, or bytes."""
        if path == "/v1/models":
            return {"data": [{"id": f"some/{self.name}", "root": "", "max_model_len": self.room}]}
        if path == "/tokenize":
            return {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path == "/pooling":
            return self.states(body)
        if path == "/collective_rpc" and self.loads:
            assert body["method"] == "take_weights"
            self.engine.model.load_state_dict(load_file(f"{body['args'][0]}/model.safetensors"))
        if path == "/v1/chat/completions":
            return {"choices": [self.said(body)], "usage": self.usage(str(body["messages"]))}
        if path != "/v1/completions":
            return {}
        if body.get("echo"):
            return {"choices": [self.echoed(body["prompt"])]}
        if isinstance(body["prompt"], str):
            usage = self.usage(body["prompt"])
            return {"choices": [self.continued(body["prompt"], body)], "usage": usage}
        return {"choices": [self.written(tuple(ids), body) for ids in body["prompt"]]}

    def usage(self, text: str) -> dict[str, int]:
        """The usage of a text."""
        return {"prompt_tokens": min(len(self.tokenizer(text)["input_ids"]), self.context)}

    def said(self, body: dict[str, Any]) -> dict[str, Any]:
        """To messages; a last one of the assistant's is continued where the server is told to."""
        messages = body["messages"]
        last = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        assert not last or body["continue_final_message"]
        if self.manner == "anew":  # a turn that is over, and a new one
            last = ""
        text = self.tokenizer.apply_chat_template(
            messages[:-1] if last else messages, tokenize=False, add_generation_prompt=True
        )
        choice = self.continued(text.rstrip() + last, body)
        return {"message": {"content": choice["text"]}, "finish_reason": choice["finish_reason"]}

    def continued(self, text: str, body: dict[str, Any]) -> dict[str, Any]:
        """Text after text, without special tokens, by incremental decoding as vLLM has it."""
        ids = tuple(self.tokenizer(text)["input_ids"])
        if self.manner == "over":
            ids = ids[:6]
        sampling = Sampling(body["temperature"], body["top_p"], 0, body["max_tokens"])
        with self.lock:
            (found,) = self.engine.generate([ids], sampling, [body["seed"]])
        known, whole = (
            self.tokenizer.decode(row, skip_special_tokens=True)
            for row in (ids, ids + found.tokens)
        )
        new = whole[len(known) :]
        return {
            "text": new.strip() if self.manner == "strips" else new,
            "finish_reason": self.finish if found.finished else "length",
        }

    def echoed(self, text: str) -> dict[str, Any]:
        """The text's own tokens and their log-probs; ``tells`` off: the text alone."""
        ids = tuple(self.tokenizer(text)["input_ids"])
        read = [self.tokenizer.decode(ids[: end + 1]) for end in range(len(ids))]
        pieces = [b[len(a) :] for a, b in zip(["", *read], read, strict=False)]
        with self.lock:
            scores = self.engine.score([ids[:1]], [ids[1:]])
        told = scores.logprobs[0].tolist()
        best, tokens = self.engine.head.logits(scores.hidden[0]).log_softmax(-1).topk(3)
        names = [map(str, row) for row in tokens.tolist()]
        tops = [dict(zip(*row, strict=True)) for row in zip(names, best.tolist(), strict=True)]
        known = {
            "tokens": pieces,
            "token_logprobs": [None, *told],
            "top_logprobs": [None, *tops],
        }
        return {"text": text, "finish_reason": "length", "logprobs": known if self.tells else None}

    def states(self, body: dict[str, Any]) -> bytes:
        assert (body["task"], body["use_activation"]) == ("token_embed", False)
        assert (body["encoding_format"], body["endianness"]) == ("bytes_only", "little")
        ids = torch.tensor([body["input"]])
        with torch.no_grad():
            states = self.engine.model.get_decoder()(input_ids=ids).last_hidden_state[0]
        return states.to(getattr(torch, body["embed_dtype"])).numpy().tobytes()

    def written(self, ids: tuple[int, ...], body: dict[str, Any]) -> dict[str, Any]:
        assert (body["ignore_eos"], body["return_token_ids"]) == (True, True)
        top_k = max(body["top_k"], 0)
        sampling = Sampling(body["temperature"], body["top_p"], top_k, body["max_tokens"])
        with self.lock:
            with self.barring(body.get("logit_bias", {})):
                (found,) = self.engine.generate([ids], sampling, [body["seed"]])
            scores = self.engine.score([ids], [found.tokens])
            told = scores.logprobs[0].tolist()
            choice = {
                "token_ids": list(found.tokens),
                "finish_reason": self.finish if found.finished else "length",
                "logprobs": {"token_logprobs": found.logprobs if self.sharpened else told},
            }
            if "logprob_token_ids" in body:
                assert body["return_tokens_as_token_ids"]
                logits = self.engine.head.logits(scores.hidden[0]).detach()
                choice["logprobs"]["top_logprobs"] = [
                    {f"token_id:{t}": float(row[t]) for t in {*body["logprob_token_ids"], token}}
                    for row, token in zip(logits.log_softmax(-1), found.tokens, strict=True)
                ]
            if "prompt_logprobs" in body:
                choice["prompt_logprobs"] = [None, *self.read(ids, body["prompt_logprobs"])]
        return choice

    @contextmanager
    def barring(self, bias: dict[str, float]) -> Iterator[None]:
        """Inside, ids of a bias of -100 are not written."""
        assert {*bias.values()} <= {-100}
        if bias and self.heeds:
            self.engine.barred = torch.zeros(self.engine.vocab_size, dtype=torch.bool)
            self.engine.barred[[*map(int, bias)]] = True
        yield
        self.engine.barred = None

    def read(self, ids: tuple[int, ...], k: int) -> Iterator[dict[str, Any]]:
        hidden = self.engine.score([ids[:1]], [ids[1:]]).hidden[0]
        self.noise = -self.noise
        logprobs = self.engine.head.logits(hidden).detach().log_softmax(-1) + self.noise
        for row, token in zip(logprobs, ids[1:], strict=True):
            ranks = row.argsort(descending=True).argsort() + 1
            kept = {token, *row.topk(k).indices.tolist()}
            yield {str(t): {"logprob": float(row[t]), "rank": int(ranks[t])} for t in kept}


@contextmanager
def running(fake: Fake) -> Iterator[Fake]:
    """The server on a port of its own, its URL in ``fake.url``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or "{}")
            fake.seen[self.path] += 1
            fake.order.append(self.path)
            fake.bodies.append(body)
            time.sleep(fake.delay)
            if fake.key and self.headers.get("Authorization") != f"Bearer {fake.key}":
                return self.reply(401, b"who are you?")
            status = fake.statuses.pop(0) if fake.statuses else fake.refuses(body) or 200
            if isinstance(status, str):
                refused = {"text": None, "message": {}, "finish_reason": status}
                return self.reply(200, json.dumps({"choices": [refused]}).encode())
            if status != 200:
                return self.reply(status, b"not now")
            answer = fake.answer(self.path, body)
            self.reply(200, answer if isinstance(answer, bytes) else json.dumps(answer).encode())

        def reply(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if status == 429:
                self.send_header("Retry-After", "1")
            if status == 307:
                self.send_header("Location", "http://elsewhere.invalid/")
            self.end_headers()
            if fake.breaks:
                fake.breaks -= 1
                content, self.close_connection = content[:-1], True
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (BrokenPipeError, ConnectionResetError):  # who asked has gone
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def another(fake: Fake, **changes: Any) -> Fake:
    """One more like it, with records of its own."""
    fresh = {"seen": Counter(), "bodies": [], "order": [], "lock": threading.Lock(), "statuses": []}
    return replace(fake, **{**fresh, **changes})
