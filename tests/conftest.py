"""Tiny real models and a tiny real tokenizer, shared by all tests. Nothing here needs a network."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
import transformers
import yaml
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

from topd.types import Ids

# A second of a busy machine is no fault of the code.
settings.register_profile("topd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("topd")

VOCAB = 64
EOS = 2

# The device of the suite: TOPD_TEST_DEVICE=cuda for `make test-gpu`, which runs the files that take
# `torch`, `tiny_model` and `USE_CPU` from here.
WANTED = torch.device(os.environ.get("TOPD_TEST_DEVICE", "cpu"))
DEVICE = WANTED if WANTED.type == "cpu" or torch.cuda.is_available() else torch.device("cpu")
USE_CPU = DEVICE.type == "cpu"
cpu_only = pytest.mark.skipif(not USE_CPU, reason="of what happens on a CPU only")
gpu_only = pytest.mark.skipif(USE_CPU, reason="of what happens on a GPU only: make test-gpu")
if not USE_CPU:  # "bit for bit" is a promise of deterministic kernels
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # In float32 memory-efficient attention is 5e-5 nats from the plain one (docs/method.md).
    torch.backends.cuda.enable_mem_efficient_sdp(False)


class OnDevice(ModuleType):
    """``torch`` as tests see it on a GPU: what they make without naming a device is made there.

    The product gets torch itself, so a tensor that it makes on the wrong device is found.
    """

    MAKERS = frozenset(
        ("arange", "as_tensor", "empty", "eye", "from_numpy", "full", "linspace", "ones", "rand")
        + ("randint", "randn", "randperm", "tensor", "zeros")
    )

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in self.MAKERS:
            return found

        def make(*args: Any, requires_grad: bool = False, **options: Any) -> torch.Tensor:
            made = found(*args, **options)
            made = made if "device" in options else made.to(DEVICE)
            return made.requires_grad_() if requires_grad else made

        return make


torch_on_device = torch if USE_CPU else OnDevice("torch")


def pytest_collection_finish() -> None:
    """What is imported is no work for the garbage collector, which a training calls: 0.4 s each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def short_trainings() -> Iterator[None]:
    """Of every test."""
    with pytest.MonkeyPatch.context() as patch:
        if "topd.training.trainer" in sys.modules:
            shorten(patch)
        yield


def shorten(patch: pytest.MonkeyPatch) -> None:
    """No page at the end of a training from Python, no count of what is frozen: a second each."""
    patch.setattr("topd.training.trainer.TOPDTrainer.at_end", None)
    patch.setattr("topd.training.trainer._what_is_there_kept", nullcontext)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if WANTED != DEVICE:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"no {WANTED.type} device on this machine"))


TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "initializer_range": 0.6,  # sharp distributions: greedy paths without ties
}


def tiny_model(
    kind: str = "qwen3", *, seed: int = 0, vocab: int = VOCAB, **changes
) -> PreTrainedModel:
    """A randomly initialised Llama or Qwen3 with some 30 k parameters, float32, in eval mode.

    On the device of the suite.
    """
    sizes = {**TINY, "vocab_size": vocab, **changes}
    torch.manual_seed(seed)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval().to(DEVICE)
    return Qwen3ForCausalLM(Qwen3Config(**sizes)).eval().to(DEVICE)


RENAMED = {  # what is one tensor in memory is several on disk, or has another name there
    "Mixtral": {**TINY, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GPTNeoX": {**TINY, "num_key_value_heads": None},
}


def renamed_model(kind: str, *, seed: int = 0) -> PreTrainedModel:
    """A model whose weights have other names on disk than in memory."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**RENAMED[kind])
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval().to(DEVICE)


@pytest.fixture(params=["llama", "qwen3"])
def model_kind(request) -> str:
    return request.param


WORDS = (  # noqa: SIM905 - words in a string
    "<pad> <s> </s> <unk> <|user|> <|assistant|> 0 1 2 3 4 5 6 7 8 9 + - * = ( ) . , ? what is the "
    "sum of so and then thus we have answer add take two first"
).split()
WORDS += [f"w{i}" for i in range(VOCAB - len(WORDS))]  # every row of tiny models is a token's
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template."""
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


QUESTIONS = [f"what is {a} + {b} ?" for a in range(4) for b in range(4)]


def rows(count: int = 8) -> list[dict[str, str]]:
    """Little sums, with their solutions."""
    return [
        {"prompt": q, "solution": f"so the answer is {int(q[8]) + int(q[12])} ."}
        for q in QUESTIONS[:count]
    ]


def write_pair(root: Path, **recipe: Any) -> Path:
    """Folders of a student and a teacher, prompts and a recipe; returns the recipe."""
    for seed, name in enumerate(("student", "teacher")):
        tiny_model(seed=seed).save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    content = {
        "student": str(root / "student"),
        "teacher": str(root / "teacher"),
        "data": str(root / "prompts.jsonl"),
        "use_cpu": USE_CPU,
        **recipe,
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(content))
    return root / "recipe.yaml"


@torch.no_grad()
def greedy_by_transformers(model: PreTrainedModel, ids: Sequence[int], steps: int) -> Ids:
    """What transformers' own greedy decoding writes next."""
    given = torch.tensor([ids], device=model.device)
    found = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=steps,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return tuple(found[0, len(ids) :].tolist())


def losses(*rows: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token losses, padded with the loudest loss there is, and their mask."""
    width = max(len(row) for row in rows)
    padded = torch.tensor([row + [1e9] * (width - len(row)) for row in rows])
    return padded, torch.arange(width) < torch.tensor([[len(row)] for row in rows])


class Gradients(TrainerCallback):
    """Keeps those of every update."""

    def __init__(self) -> None:
        self.kept: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        named = model.named_parameters()
        self.kept.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def load(path: Path) -> dict[str, Any]:
    """A JSON file."""
    return json.loads(path.read_text())


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def kill_at_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Interrupt whoever appends to a run folder at that write, half of its last line written."""
    from topd.runs.folder import RunFolder

    append, left = RunFolder.append, iter(range(number))

    def killed(self: RunFolder, name: str, lines: Any) -> None:
        lines = list(lines)
        if not lines:  # no new token
            return
        if next(left, None) is not None:
            append(self, name, lines)
            return
        append(self, name, lines[:-1])
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(lines[-1])[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "append", killed)
