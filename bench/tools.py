"""Does a student learn to use a calculator? ``python -m bench.tools [--folder F]``.

A made world. A problem says in words what to do with a number, in the order of doing or the other
way round; the teacher writes it as one expression, has it calculated, and reads the value off::

    60: double after less 9:   <calc>((60-9)*2)</calc> | 102 | so 102

The student has learned from an author who mostly reads "after" as "then", turns "from" round, and
often says some number without the calculator. Teacher and student are made (``F/models``), then for
every seed the student learns by ``opd`` with ``environment: calculator``. The learning rate is the
better of 1e-3 and 3e-3 after one run each, on other problems than those of the test.

All are asked the same test problems, greedily, with the calculator. ``docs/results/tools.json``
gets everything, ``docs/how-to/tools.md`` the table.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from topd import TOPDConfig, TOPDTrainer
from topd.engines import no_tick
from topd.engines.hf import HFEngine
from topd.inputs.models import ModelSpec
from topd.inputs.prompts import PromptEncoder, make_rollout
from topd.inputs.prompts.tools import Replies, calculated, calculator
from topd.statistics import bootstrap, seed_problem_interval
from topd.training.experience.turns import Turns

PAGE, MARK = Path("docs/how-to/tools.md"), "## What was measured"
RESULTS = Path("docs/results/tools.json")
SEEDS, UPDATES, PROMPTS, TESTS, TOKENS = (0, 1, 2), 200, 2000, 300, 72
VERBS, SAID = ("double", "add", "less", "from", "times"), ("so", "then", "thus")
WORDS = (
    "<pad>",
    "</s>",
    "<calc>",
    "</calc>",
    *VERBS,
    "after",
    *SAID,
    "error",
    *"0123456789-+*().: ",
)
SIZES = {"teacher": (96, 256, 1500), "student": (64, 160, 400)}
COMMON: dict[str, Any] = {
    "max_steps": UPDATES,
    "per_device_train_batch_size": 32,
    "max_completion_length": TOKENS,
    "learning_rate": 3e-3,
    "save_strategy": "no",
    "log_rollouts": False,
    "use_cpu": True,
    "disable_tqdm": True,
}
ARMS: dict[str, dict[str, Any]] = {
    "turns": {"environment": "calculator", "max_turns": 3},
}
NAMES = {
    "teacher": "teacher",
    "start": "student at the start",
    "turns": "student after its updates",
}


@dataclass(frozen=True)
class Author:
    """How often he misreads an order or an operand, and answers from the head; how he writes."""

    misled: float
    head: float
    turned: float  # writes the operands of a sum or a product the other way round
    said: tuple[float, float, float]


TEACHER = Author(misled=0.0, head=0.0, turned=0.05, said=(0.94, 0.04, 0.02))
STUDENT = Author(misled=0.8, head=0.4, turned=0.8, said=(0.1, 0.2, 0.7))


def problem(rng: random.Random) -> str:
    """A number and two or three operations, said in the order of doing or the other way round."""
    verbs = [rng.choice(VERBS) for _ in range(rng.choice((2, 3)))]
    parts = [v if v == "double" else f"{v} {rng.randrange(2, 60)}" for v in verbs]
    return f"{rng.randrange(2, 60)}: {rng.choice((' then ', ' after ')).join(parts)}:"


def expression(prompt: str, misled: bool = False, rng: random.Random | None = None) -> str:
    """The problem as an expression; as one who is misled reads it; with operands turned by ``rng``.

    >>> expression("7: add 3 after from 60:"), expression("7: add 3 after from 60:", misled=True)
    ('((60-7)+3)', '((7+3)-60)')
    """
    found, parts, _ = prompt.split(":")
    joint = " after " if " after " in parts else " then "
    order = parts.strip().split(joint)
    for part in order if misled or joint == " then " else order[::-1]:
        verb, _, k = part.partition(" ")
        left, sign, right = {
            "double": (found, "*", "2"),
            "times": (found, "*", k),
            "add": (found, "+", k),
            "less": (found, "-", k),
            "from": (found, "-", k) if misled else (k, "-", found),
        }[verb]
        if rng and sign != "-" and rng.random() < 0.5:
            left, right = right, left
        found = f"({left}{sign}{right})"
    return found


def conversation(prompt: str, author: Author, rng: random.Random) -> list[tuple[str, bool]]:
    """What an author writes, and the calculator: texts, and whether they are the author's."""
    (said,) = rng.choices(SAID, author.said)
    if rng.random() < author.head:
        return [(f"{said} {rng.randrange(-60, 900)}", True), ("</s>", True)]
    turned = rng if rng.random() < author.turned else None
    call = expression(prompt, rng.random() < author.misled, turned)
    return [
        (f"<calc>{call}</calc></s>", True),
        (calculated(call), False),
        (f"{said} {calculated(call)}</s>", True),
    ]


def is_right(prompt: str, text: str) -> bool:
    """Whether the last turn ends with the value."""
    return bool(re.fullmatch(r"(so|then|thus) " + re.escape(calculated(expression(prompt))), text))


def problems(split: str, count: int) -> list[str]:
    """Different ones; none of training is in the test."""
    rng, held = random.Random(split), set(problems("test", TESTS)) if split != "test" else set()
    found: dict[str, None] = {}
    while len(found) < count:
        if (prompt := problem(rng)) not in held:
            found[prompt] = None
    return list(found)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words, digits and signs; blanks are tokens, so that a text reads as it was written."""
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"</?calc>|</s>|[a-z]+|[^a-z]"), behavior="isolated"
    )
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def make(role: str, author: Author, folder: Path) -> None:
    """Train a model from scratch on its author's conversations, replies read and not learned."""
    hidden, inner, steps = SIZES[role]
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(WORDS), hidden_size=hidden, intermediate_size=inner,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=hidden // 4, max_position_embeddings=256, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            pad_token_id=0, bos_token_id=None, eos_token_id=1,
        )
    )  # fmt: skip
    own, rng, rows = tokenizer(), random.Random(0), []
    for prompt in problems("pretraining", 20_000):
        parts = [(prompt, False), *conversation(prompt, author, rng)]
        ids = [(own(text)["input_ids"], learned) for text, learned in parts]
        rows.append(
            {
                "input_ids": [i for some, _ in ids for i in some],
                "labels": [i if learned else -100 for some, learned in ids for i in some],
            }
        )
    args = TrainingArguments(
        output_dir=str(folder / "unused"), max_steps=steps, per_device_train_batch_size=64,
        learning_rate=3e-3, lr_scheduler_type="cosine", warmup_steps=50, weight_decay=0.01,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=300,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(own, label_pad_token_id=-100)
    Trainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), data_collator=collator
    ).train()
    model.save_pretrained(folder)
    own.save_pretrained(folder)


def learned(models: Path, folder: Path, arm: str, seed: int) -> Path:
    """The student after the updates of an arm; made once."""
    if not (folder / "student" / "README.md").exists():
        shutil.rmtree(folder, ignore_errors=True)
        args = TOPDConfig(output_dir=str(folder), seed=seed, **ARMS[arm], **COMMON)
        rows = [{"prompt": prompt} for prompt in problems("train", PROMPTS)]
        TOPDTrainer(str(models / "student"), str(models / "teacher"), args, rows).train()
    return folder / "student"


def solved(student: Path) -> dict[str, list[float]]:
    """Of every test problem, greedily and with the calculator: called, called rightly, right."""
    spec = ModelSpec(path=str(student))
    own, engine = spec.load_tokenizer(), HFEngine(spec.load_model(), eos_ids=[1])
    args = TOPDConfig(
        output_dir="unused", max_completion_length=TOKENS, use_cpu=True, **ARMS["turns"]
    )
    sampling = replace(args.sampling, temperature=0.0)
    turns = Turns(calculator, Replies(own, frozenset([1])), args.max_turns, TOKENS, sampling)
    asked = problems("test", TESTS)
    prompts = PromptEncoder(own, own, with_rows=True).encode({"prompt": text} for text in asked)
    written = engine.generate([p.student for p in prompts], sampling, range(TESTS))
    first = [make_rollout(p, w) for p, w in zip(prompts, written, strict=True)]
    rollouts = turns.resumed(first, engine, range(TESTS), no_tick)
    found: dict[str, list[float]] = {"called": [], "call right": [], "right": []}
    for prompt, rollout in zip(asked, rollouts, strict=True):
        texts = [own.decode(list(turn), skip_special_tokens=True) for turn in rollout.turns]
        value = calculator({}, texts[:1])
        found["called"].append(float(value is not None))
        found["call right"].append(float(value == calculated(expression(prompt))))
        found["right"].append(float(is_right(prompt, texts[-1])))
    return found


def summary(folder: Path) -> dict[str, Any]:
    """Scores of the start, the teacher and every arm, and its gain over the start."""
    before, teacher = (solved(folder / "models" / role) for role in ("student", "teacher"))
    scores: dict[str, Any] = {
        name: {key: asdict(bootstrap(values)) for key, values in found.items()}
        for name, found in (("teacher", teacher), ("start", before))
    }
    runs = {arm: [solved(folder / f"{arm}-{s}" / "student") for s in SEEDS] for arm in ARMS}
    for arm, found in runs.items():
        scores[arm] = {
            key: asdict(seed_problem_interval([run[key] for run in found], bounds=(0, 1)))
            for key in before
        }
        gaps = [
            [x - y for x, y in zip(run["right"], before["right"], strict=True)] for run in found
        ]
        scores[arm]["over start"] = asdict(seed_problem_interval(gaps))
    settings = {"updates": UPDATES, "rollouts": COMMON["per_device_train_batch_size"]}
    return {"settings": {**settings, "seeds": SEEDS, "problems": TESTS}, "scores": scores}


def table_of(found: dict[str, Any]) -> str:
    """The section of the page."""
    how, lines = found["settings"], []
    for name, row in found["scores"].items():
        cells = [_cell(row[key], "{:.0f}") for key in ("called", "call right", "right")]
        cells.append(_cell(row["over start"], "{:+.0f}") if "over start" in row else "")
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    gain = found["scores"]["turns"]["over start"]
    shown = (
        "The student learns to formulate the call."
        if gain["low"] > 0
        else "That a student gains by so few updates is not shown: the interval holds 0."
    )
    return "\n".join(
        [
            f"{MARK}\n",
            f"{shown}\n",
            "A made world: a problem says in words what to do with a number, in the order of",
            "doing or the other way round; the teacher writes it as one expression, has it",
            "calculated and reads the value off. The student begins as an author who mostly",
            'misreads the order and the word "from", and often says some number without the',
            "calculator.\n",
            "Test problems, percent, greedy and with the calculator; `opd`, "
            f"{how['updates']} updates of {how['rollouts']} rollouts,",
            f"{len(how['seeds'])} seeds, {how['problems']} problems; 95 % intervals over seeds and",
            "problems (`python -m bench.tools`, `docs/results/tools.json`).\n",
            "| | calls the calculator | the call is right | the answer is right | over the start |",
            "|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


def _cell(found: dict[str, float], form: str) -> str:
    mean, low, high = (form.format(100 * found[key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def main() -> None:
    """Models, runs, results, table; everything that is there already is kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/tools"))
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    for role, author in (("teacher", TEACHER), ("student", STUDENT)):
        if not (folder / "models" / role / "model.safetensors").exists():
            make(role, author, folder / "models" / role)
    for seed in SEEDS:
        for arm in ARMS:
            learned(folder / "models", folder / f"{arm}-{seed}", arm, seed)
            print(arm, seed, flush=True)
    found = summary(folder)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(head + table_of(found), encoding="utf-8")


if __name__ == "__main__":
    main()
