"""Servers: load, failures, time limits and keys; and the served engine against the embedded one."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bench.served import top_scores
from transformers import TrainerCallback
from transformers.utils import logging
from typer.testing import CliRunner
from urllib3 import HTTPResponse
from urllib3.util import connection as urllib3_connection

from conftest import EOS, VOCAB, WORDS, read, tiny_model, tiny_tokenizer, write_pair
from fake_vllm import Fake, another, running
from topd import TOPDConfig
from topd.cli import app
from topd.commands.recipe import read_recipe
from topd.commands.train import make_trainer, run_recipe
from topd.engines.hf import HFEngine
from topd.engines.servers import Again, FailedError, Request, Servers, serve
from topd.engines.servers.checks import check_logprobs, check_servers
from topd.engines.servers.serve import command, run_servers, serving
from topd.engines.servers.vllm import VLLMEngine
from topd.errors import DISK, UNREACHABLE, StoppedError, TOPDError
from topd.inputs.models import ModelSpec
from topd.inputs.served import ServedSpec, TextSpec
from topd.losses import importance
from topd.training.experience import Observer
from topd.training.trainer import TOPDTrainer
from topd.types import Sampling

PROMPTS = [(1, 5, 9, 11), (1, 7), (3, 3, 8, 20, 21, 40)]
RESPONSES = [(4, 9, 30, 31, 7), (12,), (8, 8, 50, 2)]
STARTS = [(2, 1), (0, 3), (0, 0), (1, 0), (0, 4), (2, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A student, a teacher, prompts and a recipe."""
    root = tmp_path_factory.mktemp("pair")
    write_pair(root)
    return root


@pytest.fixture
def start() -> Iterator[Callable[..., Fake]]:
    """Run fakes like one another until the test ends."""
    with ExitStack() as stack:
        engine = HFEngine(tiny_model(seed=1), eos_ids=[EOS])
        one = Fake(engine, tiny_tokenizer())
        yield lambda **changes: stack.enter_context(running(another(one, **changes)))


def servers(*urls: str, **settings: Any) -> Servers:
    settings = {"timeout": 60, "retries": 0, **settings}
    return Servers("teacher", urls, ServedSpec(completions=urls, **settings))


def spec_of(folder: Path, completions: list[Fake], pooling: list[Fake], **more: Any) -> ModelSpec:
    served = {
        "completions": [fake.url for fake in completions],
        "pooling": [fake.url for fake in pooling],
        **{"timeout": 60, "retries": 0, "tolerance": 1e-3, **more},
    }
    return ModelSpec(path=str(folder / "teacher"), served=served)


def engine_of(spec: ModelSpec) -> VLLMEngine:
    assert spec.served
    return VLLMEngine(spec.load_frame(), spec.path, spec.served, eos_ids=[EOS], name="teacher")


LIST = Request("/tokenize", {"prompt": "1 + 2"})
ANSWER = {"tokens": tiny_tokenizer()("1 + 2", add_special_tokens=False)["input_ids"]}


# Requests


def test_requests_go_where_fewest_are_under_way(start):
    slow, fast = start(delay=1.0), start()
    found = servers(slow.url, fast.url, concurrency=2).ask([LIST] * 20)
    assert found == [ANSWER] * 20
    assert slow.seen["/tokenize"] < 5 < fast.seen["/tokenize"]


def test_requests_of_a_group_go_to_one_server(start):
    fakes = [start(), start()]
    bodies = [Request("/tokenize", {"prompt": f"{k}"}, group=k % 2) for k in range(8)]
    servers(*(fake.url for fake in fakes)).ask(bodies)
    assert [{int(body["prompt"]) % 2 for body in fake.bodies} for fake in fakes] == [{0}, {1}]


@pytest.mark.parametrize("statuses", [[503, 429], [500, 529], [408]])
def test_a_busy_server_is_asked_again_and_not_left_out(start, statuses):
    fake = start(statuses=list(statuses))
    assert servers(fake.url, retries=2).ask([LIST]) == [ANSWER]
    assert fake.seen["/tokenize"] == len(statuses) + 1


def test_an_error_of_a_server_of_text_may_be_due_to_one_text(start):
    """llama.cpp answers 500, each time, where its parser of chats cannot read what was written."""
    fake = start()
    ours = Servers("t", [fake.url], TextSpec(url=fake.url, retries=0, concurrency=1))
    for _ in range(2):  # an answer between them: the server is well
        fake.statuses[:] = [500] * 8
        *refused, answer = ours.ask_each([LIST] * 9)
        assert [type(error) for error in refused] == [FailedError] * 8
        assert answer == ANSWER
    fake.statuses[:] = [500] * 9
    with pytest.raises(StoppedError, match="answers 500: not now"):
        ours.ask_each([LIST] * 9)


def test_a_text_that_one_server_fails_at_is_asked_of_the_others(start):
    """One that is ill loses no texts until it is left out."""
    fakes = [start(statuses=[500] * 99), start()]
    spec = TextSpec(url=tuple(fake.url for fake in fakes), retries=0, concurrency=1)
    ours = Servers("t", [fake.url for fake in fakes], spec)
    assert ours.ask_each([LIST] * 12) == [ANSWER] * 12
    assert [fake.seen["/tokenize"] for fake in fakes] == [9, 12]
    ours, fakes[1].statuses[:] = Servers("t", [fake.url for fake in fakes], spec), [500]
    refused, *answers = ours.ask_each([LIST] * 2)
    assert isinstance(refused, FailedError)
    assert answers == [ANSWER]


def test_connections_are_probed_before_a_router_forgets_them(start, monkeypatch):
    """Those of clouds do after two minutes or six; a long answer has nothing to say for longer."""
    real, found = urllib3_connection.create_connection, []

    def create(*args: Any, **options: Any) -> socket.socket:
        made = real(*args, **options)
        found.append(
            [
                made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                made.getsockopt(socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPINTVL", 0)),
                made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
            ]
        )
        return made

    monkeypatch.setattr(urllib3_connection, "create_connection", create)
    servers(start().url).ask([LIST])
    alive, interval, direct = found[0]
    assert alive
    assert direct  # as without it
    assert interval == 60 or not hasattr(socket, "TCP_KEEPINTVL")


def test_an_answer_that_breaks_off_is_asked_for_once_more(start):
    fake = start(breaks=1)
    assert servers(fake.url, retries=1).ask([LIST]) == [ANSWER]
    fake.breaks = 9
    with pytest.raises(StoppedError, match="IncompleteRead"):
        servers(fake.url, retries=9).ask([LIST])
    assert fake.seen["/tokenize"] == 4


def test_pauses_that_a_server_asks_for_are_not_its_time(start):
    fake = start(statuses=[429])
    assert servers(fake.url, retries=1, timeout=0.5).ask([LIST]) == [ANSWER]


@pytest.mark.parametrize("status", [429, 500])
def test_tries_are_bounded_and_the_last_answer_says_why(start, status):
    fake = start(statuses=[status] * 9)
    with pytest.raises(StoppedError, match=f"answers {status}: not now"):
        servers(fake.url, retries=2).ask([LIST])
    assert fake.seen["/tokenize"] == 3


def test_no_server_makes_a_run_wait_for_longer_than_two_minutes():
    answers = [
        HTTPResponse(headers={"Retry-After": after}) for after in ("7", "86400", "0.5", "1s", "")
    ]
    asked = [Again().get_retry_after(answer) for answer in answers]
    assert asked == [7, 120, None, None, None]  # what is no header of HTTP's is no fault
    assert Again().get_retry_after(HTTPResponse()) is None


@pytest.fixture
def errors(monkeypatch) -> list[str]:
    said: list[str] = []
    logger = logging.get_logger("topd.engines.servers")
    monkeypatch.setattr(logger, "error", said.append)
    return said


def test_a_failing_server_is_left_out_and_said_once(start, errors):
    good, bad = start(), start(statuses=[500] * 9)
    both = servers(bad.url, good.url)
    assert both.ask([LIST] * 8) == [ANSWER] * 8
    assert both.ask([LIST] * 8) == [ANSWER] * 8
    (said,) = errors
    assert bad.url in said
    assert "left out" in said
    assert good.seen["/tokenize"] == 16


def test_when_none_is_left_the_error_names_all_and_how_to_go_on(start):
    bad = start(statuses=[500] * 9)
    gone = "http://127.0.0.1:9"  # nobody listens there
    with pytest.raises(StoppedError) as caught:
        servers(bad.url, gone).ask([LIST])
    assert caught.value.exit_code == UNREACHABLE
    for part in (bad.url, gone, "refused", "500", "resume_from_checkpoint: last"):
        assert part in str(caught.value)


def test_a_slow_server_hits_the_time_limit(start):
    fake, before = start(delay=3.0), time.monotonic()
    with pytest.raises(
        StoppedError, match=r"no answer within its time limit, served.timeout 0.2 s"
    ):
        servers(fake.url, timeout=0.2).ask([LIST])
    assert time.monotonic() - before < 3  # it did not wait for the answer


def test_the_key_comes_from_the_environment_and_is_nowhere_else(start, monkeypatch):
    monkeypatch.setenv("OUR_KEY", "s3cret")
    fake = start(key="s3cret")
    ours = servers(fake.url, api_key_env="OUR_KEY")
    assert ours.ask([LIST]) == [ANSWER]
    assert "s3cret" not in repr(ours.served) + json.dumps(ours.served.model_dump())
    with pytest.raises(TOPDError, match=r"401.*api_key_env") as caught:
        servers(fake.url).ask([LIST])
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r", " \r\n"])
def test_a_key_may_have_white_space_around_it(start, monkeypatch, end):
    monkeypatch.setenv("OUR_KEY", f"s3cret{end}")
    assert servers(start(key="s3cret").url, api_key_env="OUR_KEY").ask([LIST]) == [ANSWER]


@pytest.mark.parametrize("key", ["s3cret\nmore", "s3cret\x07", "s3cret-\u043a\u043b\u044e\u0447"])
def test_a_key_that_no_request_can_carry_is_not_shown(monkeypatch, key):
    monkeypatch.setenv("OUR_KEY", key)
    with pytest.raises(TOPDError, match=r"served\.api_key_env.* OUR_KEY holds char") as caught:
        servers("http://127.0.0.1:9", api_key_env="OUR_KEY")
    assert "s3cret" not in str(caught.value)


def test_a_redirect_is_not_followed(start):
    with pytest.raises(TOPDError, match="answers 307: http://elsewhere"):
        servers(start(statuses=[307]).url).ask([LIST])


def test_what_is_no_json_is_refused(start):
    fake = start()
    fake.answer = lambda *_: b"<html>"  # type: ignore[method-assign]
    with pytest.raises(TOPDError, match=r"not JSON. Give the URL of a vLLM server"):
        servers(fake.url).get("/v1/models")


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path):
    made = "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout key -out crt"
    subprocess.run(["openssl", *made.split()], cwd=tmp_path, check=True, capture_output=True)
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    with pytest.raises(StoppedError, match="CERTIFICATE_VERIFY_FAILED"):
        servers(f"https://127.0.0.1:{server.server_port}").get("/v1/models")
    server.shutdown()
    server.server_close()


# The engine: what the embedded one says


def test_scores_and_windows_are_those_of_the_embedded_engine(folder, start):
    local = HFEngine(tiny_model(seed=1), eos_ids=[EOS])
    served = engine_of(spec_of(folder, [start(), start()], [start(), start()]))
    for temperature in (1.0, 0.7):
        ours = local.score(PROMPTS, RESPONSES, temperature=temperature)
        theirs = served.score(PROMPTS, RESPONSES, temperature=temperature)
        torch.testing.assert_close(theirs.logprobs, ours.logprobs)
        for row, response in enumerate(RESPONSES):
            torch.testing.assert_close(
                theirs.hidden[row, : len(response)], ours.hidden[row, : len(response)]
            )
            assert theirs.likeliest[row, 0] == ours.likeliest[row, 0]
    for sampling in (Sampling(0.0, max_new_tokens=9), Sampling(1.0, max_new_tokens=9)):
        seeds = range(100, 100 + len(STARTS))
        windows = served.continue_from(theirs, STARTS, sampling, seeds)
        assert windows == approx(local.continue_from(ours, STARTS, sampling, seeds))
        assert served.generate(PROMPTS, sampling, [1, 2, 3]) == approx(
            local.generate(PROMPTS, sampling, [1, 2, 3])
        )


def approx(written: list[Any]) -> list[Any]:
    class Near:
        def __init__(self, one: Any) -> None:
            self.one = one

        def __eq__(self, other: Any) -> bool:
            return (self.one.tokens, self.one.finished) == (
                other.tokens,
                other.finished,
            ) and self.one.logprobs == pytest.approx(other.logprobs, abs=1e-4)

        def __repr__(self) -> str:
            return repr(self.one)

    return [Near(one) for one in written]


def test_windows_of_one_rollout_are_one_request_by_length(folder, start):
    fakes, pooling = [start(), start()], start()
    served = engine_of(spec_of(folder, fakes, [pooling]))
    scores = served.score(PROMPTS, RESPONSES)
    served.continue_from(scores, STARTS, Sampling(0.0, max_new_tokens=4), range(len(STARTS)))
    sent = sorted(body["prompt"] for fake in fakes for body in fake.bodies)
    expected = [[[*PROMPTS[b], *RESPONSES[b][:t]] for t in starts] for b, starts in WINDOWS.items()]
    assert sent == sorted(expected)


WINDOWS = {0: (0, 3, 4), 1: (0,), 2: (1, 3)}


def test_the_last_token_of_a_response_needs_no_state(folder, start):
    pooling = start()
    engine_of(spec_of(folder, [start()], [pooling])).score(PROMPTS, RESPONSES)
    sent = sorted(body["input"] for body in pooling.bodies)
    assert sent == sorted(
        [*prompt, *response][:-1] for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    )


def test_the_likeliest_tokens_are_those_of_the_whole_distribution(folder, start):
    local = HFEngine(tiny_model(seed=1), eos_ids=[EOS])
    served = engine_of(spec_of(folder, [start()], [start()]))
    scores = local.score(PROMPTS, RESPONSES)
    for row, found in enumerate(top_scores(served, PROMPTS, RESPONSES, 3)):
        length = len(RESPONSES[row])
        top = local.head.logits(scores.hidden[row, :length]).log_softmax(-1).topk(3)
        torch.testing.assert_close(found.top, top.values)
        assert found.tokens.tolist() == top.indices.tolist()
        torch.testing.assert_close(found.logprobs, scores.logprobs[row, :length])


def test_of_a_served_teacher_no_layer_is_read(folder):
    whole = tiny_model(seed=1)
    frame = ModelSpec(path=str(folder / "teacher")).load_frame()
    assert sorted(frame.state_dict()) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    for name, tensor in frame.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name])


def test_ids_that_not_all_models_have_are_written_by_no_server(folder, start):
    """The texts and log-probs are those of the engine here, in which such ids are barred."""
    spec = spec_of(folder, [start()], [start()])
    free = engine_of(spec).generate(PROMPTS, Sampling(1.0, max_new_tokens=16), range(3))
    unshared = sorted({token for text in free for token in text.tokens} - {EOS})[:12]
    options = {"eos_ids": [EOS], "allowed": [t for t in range(VOCAB) if t not in unshared]}
    local = HFEngine(tiny_model(seed=1), **options)
    served = VLLMEngine(spec.load_frame(), spec.path, spec.served, [*unshared, 999], **options)
    for temperature in (0.0, 0.7, 1.0):
        sampling = Sampling(temperature, max_new_tokens=16)
        found, known = (e.generate(PROMPTS, sampling, range(3)) for e in (served, local))
        assert found == approx(known) or temperature == 0.7  # its log-probs are of temperature 1
        assert [text.tokens for text in found] == [text.tokens for text in known]


@pytest.mark.parametrize(
    ("allowed", "unshared", "said"),
    [
        ([*range(30), 63], [*range(30, 63)], "which not all models of the run have, although"),
        ([*range(30), 63], [], "an id without a token. Leave served out"),
        ([*range(30)], [*range(30, 64)], "which not all models of the run have, although"),
    ],
)
def test_a_server_that_writes_a_barred_id_is_refused(folder, start, allowed, unshared, said):
    spec = spec_of(folder, [start(heeds=False)], [start()])
    options = {"eos_ids": [EOS], "allowed": allowed}
    served = VLLMEngine(spec.load_frame(), spec.path, spec.served, unshared, **options)
    with pytest.raises(TOPDError, match=rf"wrote token \d+, {said}"):
        served.generate(PROMPTS, Sampling(1.0, max_new_tokens=64), range(3))


@pytest.mark.parametrize("listed", [lambda top: {}, lambda top: {k[9:]: x for k, x in top.items()}])
def test_a_server_that_does_not_tell_barred_ids_log_probs_is_refused(folder, start, listed):
    """Those of the others would count as if the barred had none."""
    fake = start()
    spec = spec_of(folder, [fake], [start()])
    options = {"eos_ids": [EOS], "allowed": [*range(30), 63]}
    served = VLLMEngine(spec.load_frame(), spec.path, spec.served, [*range(30, 63)], **options)
    written = fake.written

    def other(*given: Any) -> dict[str, Any]:
        choice = written(*given)
        known = choice["logprobs"]
        known["top_logprobs"] = [listed(top) for top in known["top_logprobs"]]
        return choice

    fake.written = other  # type: ignore[method-assign]
    with pytest.raises(TOPDError, match="0 of 33 logprob_token_ids"):
        served.generate(PROMPTS, Sampling(1.0, max_new_tokens=4), range(3))


def test_an_answer_that_was_cut_off_is_refused(folder, start):
    served = engine_of(spec_of(folder, [start(finish="abort")], [start()]))
    with pytest.raises(TOPDError, match="finish_reason 'abort'"):
        served.generate(PROMPTS * 4, Sampling(1.0, max_new_tokens=64), range(12))


def test_texts_have_their_own_choices_in_whatever_order_they_come(folder, start):
    fake = start()
    engine = engine_of(spec_of(folder, [fake], [start()]))
    sampling = Sampling(0.0, max_new_tokens=4)
    known = engine.completions.write(PROMPTS, [0, 0, 0], sampling, range(3))
    answer, changes = fake.answer, [lambda found: found[::-1], lambda found: [*found, *found]]

    def shuffled(path: str, body: dict[str, Any]) -> Any:
        found = answer(path, body)["choices"]
        return {"choices": change([{**choice, "index": k} for k, choice in enumerate(found)])}

    fake.answer = shuffled  # type: ignore[method-assign]
    change = changes[0]
    assert engine.completions.write(PROMPTS, [0, 0, 0], sampling, range(3)) == known
    assert len({text.tokens for text in known}) == 3
    change = changes[1]
    for write in (engine.completions.write, lambda p, _, *how: engine.generate(p, *how)):
        with pytest.raises(TOPDError, match=r"choices .* to \d texts"):
            write(PROMPTS, [0, 0, 0], sampling, range(3))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda one: {"token_ids": one["token_ids"][:3]}, "'length' after 3 of 5 token_ids"),
        (lambda one: {"token_ids": None}, "after 0 of 5 token_ids"),
        (lambda one: {"logprobs": {"token_logprobs": [-1.0] * 4}}, "4 log-probs of 5 tokens"),
        (lambda one: {"logprobs": {"token_logprobs": [None] * 5}}, "TypeError"),
        (
            lambda one: {"logprobs": {"token_logprobs": [-1.0] * 4 + [0.37]}},
            "log-prob of 0.37, which",
        ),
        (lambda one: {"logprobs": {"token_logprobs": [math.nan] * 5}}, "log-prob of nan, which"),
        (lambda one: {"token_ids": [7, 998, 7, 7, 7]}, "5 token_ids, which go on after an end"),
        (lambda one: {"logprobs": None}, "TypeError"),
        (lambda one: {"prompt_logprobs": [None]}, "zip"),
        (lambda one: {"prompt_logprobs": None}, "TypeError"),
        (lambda one: {"prompt_logprobs": [None, *[{"-1": {}}] * 3]}, "KeyError"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(folder, start, changes, said):
    """As of a server whose generation_config.json has fewer max_new_tokens, which vLLM heeds."""
    fake = start(engine=HFEngine(tiny_model(seed=1), eos_ids=[999]))
    completions = engine_of(spec_of(folder, [fake], [start()])).completions
    completions.ends, answer = frozenset({998}), fake.answer

    def changed(path: str, body: dict[str, Any]) -> Any:
        (choice,) = answer(path, body)["choices"]
        return {"choices": [{**choice, **changes(choice)}]}

    fake.answer = changed  # type: ignore[method-assign]
    reads = "prompt_logprobs" in changes({"token_ids": []})
    how = () if reads else (Sampling(0.0, max_new_tokens=5), [0])
    ask = completions.read if reads else completions.write_each
    with pytest.raises(TOPDError, match=f"no whole answer .*{said}"):
        ask([PROMPTS[0]], *how)


@pytest.mark.parametrize("answer", [{"object": "list", "data": None}, {"detail": "?"}, ["what"]])
def test_what_lists_no_models_is_no_vllm_server(folder, start, answer):
    fake = start()
    fake.answer = lambda path, body: answer  # type: ignore[method-assign]
    with pytest.raises(TOPDError, match=r"without a list 'data'\. Give the URL of a vLLM server"):
        check(spec_of(folder, [fake], [start()]))


def test_states_of_another_width_are_refused(folder, start):
    other = HFEngine(tiny_model(seed=1, hidden_size=16), eos_ids=[EOS])
    served = engine_of(spec_of(folder, [start()], [start(engine=other)]))
    with pytest.raises(TOPDError, match=r"width 32.*another model"):
        served.score(PROMPTS, RESPONSES)


# Start-up checks


def check(spec: ModelSpec, longest: int = 100) -> None:
    check_servers("teacher", spec, tiny_tokenizer(), longest)
    check_logprobs(engine_of(spec), tiny_tokenizer())


def test_servers_of_the_model_pass(folder, start):
    check(spec_of(folder, [start(), start()], [start(), start()]))


def test_another_model_is_refused_by_its_name(folder, start):
    wrong = start(name="another")
    with pytest.raises(TOPDError, match=f"{wrong.url} serves some/another, not .*/teacher"):
        check(spec_of(folder, [start()], [wrong]))
    check(spec_of(folder, [wrong], [wrong], model="some/another"))
    assert all(body["model"] == "some/another" for body in wrong.bodies if body.get("prompt"))


def test_a_server_that_is_started_again_with_another_model_refuses_what_is_asked(folder, start):
    """Where no name was asked for it is the one that the server had at the start."""
    fakes = start(), start()
    engine = engine_of(spec_of(folder, [fakes[0]], [fakes[1]]))
    check_logprobs(engine, tiny_tokenizer())
    engine.score(PROMPTS, RESPONSES)
    for fake in fakes:  # as vLLM: it takes requests that name no model
        fake.refuses = lambda body: 404 if body.get("model", "some/other") != "some/other" else None
    with pytest.raises(TOPDError, match="/pooling answers 404"):
        engine.score(PROMPTS, RESPONSES)
    with pytest.raises(TOPDError, match="/v1/completions answers 404"):
        engine.generate(PROMPTS, Sampling(0.0, max_new_tokens=4), range(3))


def test_another_model_under_the_same_name_is_refused_with_both_numbers(folder, start):
    other = HFEngine(tiny_model(seed=2), eos_ids=[EOS])
    numbers = r"-\d+\.\d{4} nats a token of a probe; .*, -\d+\.\d{4}\. They differ by \d"
    for completions, pooling in ((other, None), (None, other), (other, other)):
        writer = start(engine=completions) if completions else start()
        reader = start(engine=pooling) if pooling else start()
        with pytest.raises(TOPDError, match=numbers) as caught:
            check(spec_of(folder, [writer], [reader]))
        assert writer.url in str(caught.value)
        assert reader.url in str(caught.value)


def test_another_decoder_under_the_same_head_is_found_with_check_whole(tmp_path, start):
    other = tiny_model(seed=1)
    other.model.layers[0].mlp.down_proj.weight.data.zero_()
    fake = start(engine=HFEngine(other, eos_ids=[EOS]))
    check(spec_of(write_pair(tmp_path).parent, [fake], [fake]))  # its head is the teacher's
    wrong = recipe_of(tmp_path, spec_of(tmp_path, [fake], [fake], check_whole=True), "wrong")
    with pytest.raises(TOPDError, match=r"the whole of .*, -\d+\.\d{4}\. They differ by \d"):
        run_recipe(wrong, quiet=True)
    right = spec_of(tmp_path, [start()], [start()], check_whole=True)
    run_recipe(recipe_of(tmp_path, right, "right"), quiet=True)


def test_every_server_is_checked(folder, start):
    other = start(engine=HFEngine(tiny_model(seed=2), eos_ids=[EOS]))
    with pytest.raises(TOPDError, match=other.url):
        check(spec_of(folder, [start(), other], [start()]))
    with pytest.raises(TOPDError, match=other.url):
        check(spec_of(folder, [start()], [start(), other]))


def test_another_tokenizer_is_refused(folder, start):
    wrong = start(tokenizer=tiny_tokenizer(["<pad>", "<s>", "</s>", "answer", "<unk>", "=", "is"]))
    with pytest.raises(TOPDError, match="the tokenizer of"):
        check(spec_of(folder, [wrong], [start()]))


def test_too_little_room_is_refused(folder, start):
    spec = spec_of(folder, [start(room=99)], [start()])
    with pytest.raises(TOPDError, match=r"has room for 99.* and max_c\w+ make 100.*--max-model"):
        check(spec)
    with pytest.raises(TOPDError, match=r"has room for 99 tokens.* and window_length make 105"):
        check_servers("teacher", spec, tiny_tokenizer(), 90, 15)
    check_servers("teacher", spec, tiny_tokenizer(), 90, 9)


@pytest.mark.parametrize(("method", "window"), [("opd", 0), ("topd", 8)])
def test_a_served_teacher_is_asked_for_room_for_windows_where_it_writes_them(
    folder, tmp_path, monkeypatch, method, window
):
    asked = []
    monkeypatch.setattr("topd.training.startup.check_servers", lambda *given: asked.append(given))
    options = {"window_length": 8, "max_steps": 1, "use_cpu": True, "max_completion_length": 12}
    args = TOPDConfig(output_dir=str(tmp_path / "run"), method=method, **options)
    TOPDTrainer.check(str(folder / "student"), str(folder / "teacher"), args, [{"prompt": "so so"}])
    assert [(name, *rest) for name, _, _, *rest in asked] == [
        ("student", 14, 0),
        ("teacher", 14, window),
    ]


def test_scoring_at_another_temperature_is_refused(folder, start):
    with pytest.raises(TOPDError, match=r"when it writes at temperature 0.5.*raw_logprobs"):
        check(spec_of(folder, [start(sharpened=True)], [start()]))


def test_a_server_that_does_not_answer_alike_twice_is_refused(folder, start):
    with pytest.raises(TOPDError, match=r"at first, .*asked again, .*alike twice"):
        check(spec_of(folder, [start(noise=0.01)], [start()]))


# Training


SHORT: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "max_completion_length": 16,
    "method": "topd",
    "window_length": 5,
    "candidate_fraction": 0.2,
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": 10,
    "seed": 3,
}


def recipe_of(root: Path, spec: ModelSpec | None, run: str, **changes: Any) -> Path:
    path = write_pair(root, **{**SHORT, **changes}, output_dir=str(root / run))
    content = yaml.safe_load(path.read_text())
    if spec:
        content["teacher"] = {"path": content["teacher"], "served": spec.served.model_dump()}
        content["teacher"]["served"] = json.loads(json.dumps(content["teacher"]["served"]))
    path.write_text(yaml.safe_dump(content))
    return path


def own_marks(root: Path) -> None:
    """Give each model marks of its own: at the end, and at an id where the other has another."""
    for name, marks in (("student", ("<a>",)), ("teacher", ("<b>", "<c>"))):
        words = [marks[0] if word == "w3" else word for word in WORDS[:-1]]
        tiny_tokenizer([*words, *marks[1:]]).save_pretrained(root / name)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("method", ["topd", "first_fork"])
def test_training_is_that_of_an_embedded_teacher(tmp_path, start, method, apart):
    fakes, found = [start(), start(), start()], []
    spec = spec_of(tmp_path, fakes[:2], fakes[2:])
    keys = {"method": method, "candidate_threshold": None, "look_ahead_until": None}
    for given, run in ((spec, "served"), (None, "plain")):
        path = recipe_of(tmp_path, given, run, **keys)
        if apart:
            own_marks(tmp_path)
        for fake in fakes:
            fake.tokenizer = ModelSpec(path=str(tmp_path / "teacher")).load_tokenizer()
        found.append(run_recipe(path, quiet=True))
    for ours, theirs in zip(*(read(run / "guidance.jsonl") for run in found), strict=True):
        assert [f["teacher_tokens"] for f in ours["forks"]] == [
            f["teacher_tokens"] for f in theirs["forks"]
        ]
    logs = zip(*(read(run / "metrics.jsonl") for run in found), strict=True)
    for ours, theirs in list(logs)[:-1]:  # the last line is the summary
        for name in ("loss", "reverse_kl", "topd/trajectory_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    barred = [[*body.get("logit_bias", {})] for fake in fakes[:2] for body in fake.bodies]
    unshared = [str(WORDS.index("w3")), str(VOCAB - 1)]
    assert {*map(tuple, barred)} == {(), tuple(unshared)} if apart else not any(barred)


def test_a_run_that_loses_its_servers_is_saved_and_goes_on(tmp_path, start, monkeypatch):
    monkeypatch.setenv("OUR_KEY", "s3cret")
    writer, reader = start(key="s3cret"), start(key="s3cret")
    spec = spec_of(tmp_path, [writer], [reader], api_key_env="OUR_KEY")
    path = recipe_of(tmp_path, spec, "run")
    scored = reader.states

    def failing(body: dict[str, Any]) -> bytes:
        if reader.seen["/pooling"] > 2 * 4 + 2:  # the check asked once or twice, an update 4 times
            reader.statuses = [500] * 99
        return scored(body)

    reader.states = failing  # type: ignore[method-assign]
    lost = CliRunner().invoke(app, ["train", str(path), "--quiet"])
    assert lost.exit_code == UNREACHABLE
    assert reader.url in lost.output.replace("\n", "")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    reader.states, reader.statuses = scored, []  # type: ignore[method-assign]
    words = ["train", str(path), "--quiet", "--resume_from_checkpoint", "last"]
    assert CliRunner().invoke(app, words).exit_code == 0
    run = tmp_path / "run"
    assert [log["step"] for log in read(run / "metrics.jsonl") if "loss" in log] == [1, 2, 3, 4]
    plain = run_recipe(recipe_of(tmp_path, spec, "whole"), quiet=True)
    ours, theirs = (read(r / "rollouts.jsonl") for r in (run, plain))
    assert [r["response_ids"] for r in ours] == [r["response_ids"] for r in theirs]
    assert not any("s3cret" in p.read_text() for p in run.glob("*.json*"))


@pytest.mark.parametrize(("command", "count"), [("probe", "--rollouts"), ("repair", "--samples")])
def test_an_analysis_with_a_served_teacher_is_that_with_an_embedded_one(
    tmp_path, start, command, count
):
    words, found = ["--quiet", count, "4", "--bootstrap", "40"], []
    for name, given in (("served", spec_of(tmp_path, [start()], [start()])), ("plain", None)):
        path, run = recipe_of(tmp_path, given, "unused"), tmp_path / name
        result = CliRunner().invoke(app, [command, str(path), *words, "--output_dir", str(run)])
        assert result.exit_code == 0, result.output
        found.append(json.loads((run / f"{command}.json").read_text()))
    ours, theirs = (numbers(one) for one in found)
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert len(ours) > 10


def numbers(found: Any) -> list[float]:
    """All numbers of a JSON document, in order, but for times."""
    if isinstance(found, dict):
        found = [value for key, value in found.items() if "seconds" not in key]
    if isinstance(found, list):
        return [number for one in found for number in numbers(one)]
    return [found] if isinstance(found, int | float) else []


def test_a_run_with_a_served_teacher_passes_its_audit(tmp_path, start):
    """At the auditor's servers: those that the folder names are not asked."""
    spec = spec_of(tmp_path, [start()], [start()])
    run = run_recipe(recipe_of(tmp_path, spec, "run"), quiet=True)
    refused = CliRunner().invoke(app, ["audit", str(run)])
    assert refused.exit_code == 2
    assert "--served-teacher" in refused.output
    words = ["--served-teacher", spec.served.completions[0]]
    words += ["--served-pooling", spec.served.pooling[0]]
    audited = CliRunner().invoke(app, ["audit", str(run), *words])
    assert audited.exit_code == 0, audited.output


# Rollouts from servers


@pytest.fixture
def rollouts(start) -> Callable[..., Fake]:
    """Start servers of a student that is not yet the recipe's."""
    return lambda **more: start(
        name="student", engine=HFEngine(tiny_model(seed=5), eos_ids=[EOS]), **more
    )


def student_recipe(root: Path, run: str, *fakes: Fake, **changes: Any) -> Path:
    path = write_pair(
        root, **{**SHORT, "save_strategy": "no", **changes}, output_dir=str(root / run)
    )
    content = yaml.safe_load(path.read_text())
    urls = [fake.url for fake in fakes]
    served = {"completions": urls, "weights": str(root / "weights"), "retries": 0}
    if fakes:
        content["student"] = {"path": content["student"], "served": {**served, "tolerance": 1e-3}}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("apart", [False, True])
def test_training_on_served_rollouts_is_that_on_embedded_ones(tmp_path, rollouts, apart):
    fakes, found = [rollouts(), rollouts()], []
    for run, some in (("served", fakes), ("plain", [])):
        path = student_recipe(tmp_path, run, *some, learning_rate=1e-2)
        if apart:
            own_marks(tmp_path)
        for fake in fakes:
            fake.tokenizer = ModelSpec(path=str(tmp_path / "student")).load_tokenizer()
        found.append(run_recipe(path, quiet=True))
    served = found[0]
    ours, theirs = (read(run / "rollouts.jsonl") for run in found)
    assert [r["response_ids"] for r in ours] == [r["response_ids"] for r in theirs]
    assert all(log["logprob_gap"] < 1e-4 for log in read(served / "metrics.jsonl")[:-1])
    assert not list((tmp_path / "weights").iterdir())  # nothing is left


def test_weights_go_over_when_they_have_changed_and_in_order(tmp_path, rollouts):
    fake = rollouts()
    run_recipe(student_recipe(tmp_path, "run", fake), quiet=True)
    handed = ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    others = [
        path for path in fake.order if path not in ("/v1/completions", "/v1/models", "/tokenize")
    ]
    assert others == handed * 3  # at first, and after two of three updates: the first has rate 0
    places = [body["args"][0] for body in fake.bodies if "args" in body]
    assert len(set(places)) == 3


def test_a_server_that_does_not_take_the_weights_stops_the_run_with_both_numbers(
    tmp_path, rollouts
):
    fakes = [rollouts(), rollouts(loads=False)]
    said = (
        rf"{fakes[1].url} with the weights that it was given, -\d.* in training, -\d.*differ by \d"
    )
    with pytest.raises(TOPDError, match=said):
        run_recipe(student_recipe(tmp_path, "run", *fakes), quiet=True)


def test_a_sync_that_is_lost_later_stops_the_run(tmp_path, rollouts, monkeypatch):
    fake = rollouts()
    path = student_recipe(tmp_path, "run", fake, learning_rate=0.1, warmup_steps=0)
    answer = fake.answer

    def once(path: str, body: dict[str, Any]) -> Any:
        fake.loads = fake.seen["/collective_rpc"] < 2
        return answer(path, body)

    fake.answer = once  # type: ignore[method-assign]
    with pytest.raises(TOPDError, match="weights that it was given"):
        run_recipe(path, quiet=True)
    assert len(read(tmp_path / "run" / "metrics.jsonl")) == 1


def test_an_adapter_goes_over_in_the_weights(tmp_path, rollouts):
    changes = {"lora": {"r": 4, "target_modules": ["q_proj", "o_proj"]}, "learning_rate": 1e-2}
    served = run_recipe(student_recipe(tmp_path, "served", rollouts(), **changes), quiet=True)
    logs = read(served / "metrics.jsonl")[:-1]
    assert all(log["logprob_gap"] < 1e-4 for log in logs)


@pytest.mark.parametrize("key", ["target_modules", "modules_to_save"])
def test_an_adapter_that_parts_tied_embeddings_is_refused(tmp_path, rollouts, key):
    """As real servers would tie them again, which nothing shows before an update."""
    path = student_recipe(tmp_path, "run", rollouts(), lora={"r": 4, key: ["embed_tokens"]})
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "student")
    with pytest.raises(TOPDError, match=r"student\.served: the adapter changes one of two tied"):
        run_recipe(path, quiet=True)


def test_a_server_that_cannot_load_says_why_and_the_others_write(tmp_path, rollouts, errors):
    good, bad = rollouts(), rollouts()
    whole = bad.answer

    def failing(path: str, body: dict[str, Any]) -> Any:
        if path == "/collective_rpc":
            bad.statuses.append(500)  # to what is asked next
        return whole(path, body)

    bad.answer = failing  # type: ignore[method-assign]
    run = run_recipe(student_recipe(tmp_path, "run", good, bad), quiet=True)
    assert len(read(run / "rollouts.jsonl")) == 16
    (said,) = errors
    assert bad.url in said
    assert "answers 500: not now" in said


def test_a_folder_that_cannot_be_written_is_named(tmp_path, rollouts):
    (tmp_path / "weights").write_text("a file")
    with pytest.raises(
        StoppedError, match=r"student\.served\.weights: .* cannot be written"
    ) as caught:
        run_recipe(student_recipe(tmp_path, "run", rollouts()), quiet=True)
    assert caught.value.exit_code == DISK


def test_another_temperature_is_refused_for_served_rollouts(tmp_path, rollouts):
    with pytest.raises(TOPDError, match=r"temperature: 0\.7 does not go with student\.served"):
        run_recipe(student_recipe(tmp_path, "run", rollouts(), temperature=0.7), quiet=True)


# Overlap


@pytest.fixture
def overlapping(tmp_path, start, rollouts) -> Callable[..., Path]:
    """A recipe whose student and teacher are both served; 2 updates an epoch."""

    def overlapping(run: str, **changes: Any) -> Path:
        teacher = spec_of(tmp_path, [start()], [start()])
        student = {"completions": rollouts().url, "weights": str(tmp_path / "weights")}
        path = recipe_of(tmp_path, teacher, run, **{"save_strategy": "no", **changes})
        content = yaml.safe_load(path.read_text())
        content["student"] = {"path": content["student"], "served": student}
        path.write_text(yaml.safe_dump(content))
        return path

    return overlapping


def made_of(path: Path) -> tuple[TOPDTrainer, list[dict[str, torch.Tensor]]]:
    """A finished training, and the student's weights before every update."""
    recipe, weights = read_recipe(path), []

    class Snapshots(TrainerCallback):
        def on_step_begin(self, *_: Any, model: Any, **__: Any) -> None:
            weights.append({k: v.clone() for k, v in model.state_dict().items()})

    trainer, _ = make_trainer(recipe, recipe.data.load())
    trainer.add_callback(Snapshots())
    trainer.train()
    return trainer, weights


def test_rollouts_are_one_update_old_and_no_more(overlapping, tmp_path):
    """Of 6 updates, 2 an epoch, those that begin an epoch have had nobody to gather for them."""
    changes = {"overlap": True, "max_steps": 6, "max_logprob_gap": 9.0, "warmup_steps": 0}
    constant = {"learning_rate": 0.02, "lr_scheduler_type": "constant"}
    trainer, weights = made_of(overlapping("run", **changes, **constant))
    written, student = read(tmp_path / "run" / "rollouts.jsonl"), tiny_model()
    engine = HFEngine(student, eos_ids=[EOS])
    for rollout in written:
        age = rollout["step"] % 2
        for steps in (age, 1 - age):
            student.load_state_dict(weights[max(rollout["step"] - steps, 0)])
            ids = tuple(rollout["prompt_ids"]), tuple(rollout["response_ids"])
            found = engine.score([ids[0]], [ids[1]]).logprobs[0].tolist()
            same = found == pytest.approx(rollout["logprobs"], abs=1e-3)
            assert same == (steps == age) or rollout["step"] == 0
    logs = [log for log in read(tmp_path / "run" / "metrics.jsonl") if "loss" in log]
    assert [log["logprob_gap"] < 1e-3 for log in logs] == [True, False] * 3
    assert [abs(log["importance_ratio"] - 1) < 1e-4 for log in logs] == [True, False] * 3
    assert all("seconds/waiting" in log for log in logs)
    assert trainer.state.global_step == 6


def test_a_trainer_with_overlap_that_was_interrupted_resumes(overlapping, tmp_path):
    """It had the next update's prompts of before, and a pool of threads that was closed."""
    changes = {"overlap": True, "max_steps": 4, "max_logprob_gap": 9.0, "learning_rate": 0.0}
    often = {"save_strategy": "steps", "save_steps": 1}
    run_recipe(overlapping("whole", **changes, **often), quiet=True)
    recipe = read_recipe(overlapping("run", **changes, **often))
    trainer, _ = make_trainer(recipe, recipe.data.load())
    right, calls = trainer.compute_loss, iter(range(99))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2 * recipe.args.gradient_accumulation_steps:
            raise KeyboardInterrupt
        return right(*args, **kwargs)

    trainer.compute_loss = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.fetched
    trainer.train(resume_from_checkpoint=True)
    ours, theirs = (read(tmp_path / r / "rollouts.jsonl") for r in ("run", "whole"))
    assert [r["prompt"] for r in ours] == [r["prompt"] for r in theirs]


def test_with_nothing_learned_overlap_changes_nothing(overlapping, tmp_path):
    for run, overlap in (("plain", False), ("overlapped", True)):
        run_recipe(overlapping(run, overlap=overlap, learning_rate=0.0), quiet=True)
    plain, ahead = (read(tmp_path / run / "metrics.jsonl")[:-1] for run in ("plain", "overlapped"))
    for ours, theirs in zip(ahead, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert "importance_ratio" not in theirs
    for name in ("rollouts.jsonl", "guidance.jsonl"):
        ours, theirs = (read(tmp_path / run / name) for run in ("overlapped", "plain"))
        assert [r.get("response_ids") for r in ours] == [r.get("response_ids") for r in theirs]


def test_a_stale_token_counts_by_its_importance():
    ratio = importance(torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -4.0, -2.0]), 2.0)
    torch.testing.assert_close(ratio, torch.tensor([1.0, 2.0, math.exp(-1)]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"candidate_loss": "reverse_kl"}, "overlap: candidate_loss: reverse_kl looks"),
        ({"embedding": "student"}, "overlap: embedding: student looks"),
        ({"method": "teachability"}, "overlap: method: teachability looks"),
    ],
)
def test_overlap_is_refused_where_something_looks_at_the_student(
    overlapping, changes, said, monkeypatch
):
    monkeypatch.delattr("topd.training.startup.load_pair")  # before a model is loaded
    with pytest.raises(TOPDError, match=said):
        run_recipe(overlapping("run", overlap=True, **changes), quiet=True)


def test_overlap_needs_servers_for_both(tmp_path, start):
    path = recipe_of(tmp_path, spec_of(tmp_path, [start()], [start()]), "run", overlap=True)
    with pytest.raises(TOPDError, match=r"overlap: needs student\.served and teacher\.served"):
        run_recipe(path, quiet=True)


def test_servers_that_go_while_the_next_update_is_gathered_leave_a_checkpoint(
    overlapping, tmp_path, monkeypatch
):
    path, observe = overlapping("run", overlap=True, save_strategy="steps", save_steps=10), []
    whole = Observer.observe

    def failing(observer: Observer, *args: Any, **kwargs: Any) -> Any:
        observe.append(kwargs["step"])
        if observe[-1] == 3:
            raise StoppedError("no server is left", UNREACHABLE)
        return whole(observer, *args, **kwargs)

    monkeypatch.setattr(Observer, "observe", failing)
    with pytest.raises(StoppedError):
        run_recipe(path, quiet=True)
    monkeypatch.setattr(Observer, "observe", whole)
    run_recipe(path, ["--resume_from_checkpoint", "last"], quiet=True)
    logs = [log for log in read(tmp_path / "run" / "metrics.jsonl") if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 3, 4]
    steps = [rollout["step"] for rollout in read(tmp_path / "run" / "rollouts.jsonl")]
    assert steps == sorted([0, 1, 2, 3] * 4)


# The commands


def test_help_of_serve_teacher_needs_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from topd.cli import app; "
        "r = CliRunner().invoke(app, ['serve-teacher', '--help']); "
        "assert r.exit_code == 0, r.output; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_server_that_does_not_answer_is_ended_with_its_children(tmp_path):
    """A script in vLLM's place has a child, as vLLM has."""
    note = tmp_path / "child"
    script = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '100']); "
        f"open({str(note)!r}, 'w').write(str(p.pid)); time.sleep(100)"
    )
    servers: Any = {"http://127.0.0.1:9": ("completions", [sys.executable, "-c", script])}
    with pytest.raises(TOPDError, match="does not answer after 2 s"), serving(servers, patience=2):
        pass
    child = Path(f"/proc/{note.read_text()}/stat")
    for _ in range(50):
        if not child.exists() or " Z " in child.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"{child} was left")


@pytest.mark.parametrize(
    ("kind", "cpu", "share"), [("pooling", False, "0.45"), ("pooling", True, None),
                               ("completions", False, "0.45"), ("rollouts", False, None)],
)  # fmt: skip
def test_two_servers_on_the_same_gpus_take_a_share_each(kind, cpu, share):
    words = command(kind, "m", "here", 1, ["--gpu-memory-utilization", "0.3"], python="p", cpu=cpu)
    found = [after for word, after in pairwise(words) if word == "--gpu-memory-utilization"]
    assert found == [*filter(None, [share]), "0.3"]  # the user's comes last, so it counts


def test_a_server_is_started_once_the_one_before_it_answers(tmp_path):
    """Scripts in vLLM's place note when they begin and when they answer."""
    note, found = tmp_path / "note", {}
    for k in range(2):
        port = free_port()
        script = (
            "import http.server as h, time; "
            f"say = lambda word: open({str(note)!r}, 'a').write(f'{k} {{word}} '); "
            "say('begins'); time.sleep(0.5); say('answers'); "
            f"h.test(h.SimpleHTTPRequestHandler, port={port}, bind='127.0.0.1')"
        )
        (tmp_path / "health").touch()
        words = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {script}"]
        found[f"http://127.0.0.1:{port}"] = ("completions", words)
    with serving(found, patience=30) as running:
        assert len(running) == 2
    assert note.read_text() == "0 begins 0 answers 1 begins 1 answers "


@pytest.mark.parametrize(("host", "place"), [("here", "here"), ("::1", "[::1]")])
def test_the_lines_of_a_recipe_have_the_host_as_a_url_has_it(monkeypatch, host, place):
    @contextmanager
    def served(servers: Any, *, patience: float) -> Iterator[list[Any]]:
        for url, (_, words) in servers.items():
            assert url.startswith(f"http://{place}:80")
            assert words[words.index("--host") + 1] == host
        yield []

    monkeypatch.setattr(serve, "serving", served)
    monkeypatch.setattr(serve, "has_accelerator", lambda _: False)
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    said: list[str] = []

    def ready(lines: str) -> None:
        said.append(lines)
        raise KeyboardInterrupt

    run_servers(
        ("completions",), "m", [], host=host, port=8000, python="p", patience=1.0, ready=ready
    )
    assert f'"http://{place}:8000"' in said[0]
    ServedSpec(completions=f"http://{place}:8000")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_a_python_without_vllm_is_named():
    result = CliRunner().invoke(app, ["serve-teacher", "MODEL", "--python", "no-such-python"])
    assert result.exit_code == 2
    assert "no-such-python cannot be run" in result.output


# Answers without bound


class Hostile(BaseHTTPRequestHandler):
    """Answers that are packed, drip or are nested."""

    def do_GET(self) -> None:
        bomb = gzip.compress(bytes(100 << 20)) if self.path == "/bomb" else b""
        self.send_response(200)
        if bomb:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        with contextlib.suppress(OSError):
            if self.path == "/drip":
                for _ in range(100):
                    self.wfile.write(b" ")
                    time.sleep(0.1)
            self.wfile.write(bomb or b"[" * 100_000)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/bomb", "of which 0 MiB were sent"),
        ("/deep", "which is not JSON"),
        ("/drip", r"no answer within its time limit, served\.timeout 1 s"),
    ],
)
def test_an_answer_without_bound_is_refused(path, said):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    served = ServedSpec(completions=(url,), timeout=1.0 if path == "/drip" else 60.0, retries=0)
    started = time.monotonic()
    with pytest.raises(TOPDError, match=said):
        Servers("teacher", [url], served).get(path)
    assert path != "/drip" or time.monotonic() - started < 8  # of ten
    server.shutdown()
