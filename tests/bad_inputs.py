"""The matrix of bad input: what is given, and the fault, place and remedy that its message names.

``python tests/bad_inputs.py`` (with src and tests on the path) makes every case and writes
docs/errors.md; tests/test_bad_input.py makes them too and holds them to what stands here and there.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from shutil import copytree
from typing import Any
from unittest.mock import patch

import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import EOS, WORDS, rows, tiny_model, tiny_tokenizer
from topd.commands.train import run_recipe
from topd.errors import TOPDError

PAGE = Path(__file__).parent.parent / "docs" / "errors.md"
LITTLE: dict[str, Any] = {
    "student": "student",
    "teacher": "teacher",
    "data": "prompts.jsonl",
    "output_dir": "run",
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "max_completion_length": 8,
    "method": "topd",
    "window_length": 3,
    "candidate_fraction": 0.3,
    "save_strategy": "no",
    "use_cpu": True,
}
EMPTY = {"role": "user", "content": " "}
ASKED = {"role": "user", "content": "what is 1 + 2 ?"}
STAGE = {"max_steps": 1, "max_completion_length": 8, "use_cpu": True, "save_strategy": "no"}
HEAD = "student: student\nteacher: teacher\n"


@dataclass(frozen=True)
class Case:
    """An input and what its message says.

    ``changes`` are to the recipe, ``without`` leaves a key out; ``text`` replaces it whole.
    ``data`` are the rows of prompts.jsonl, ``files`` more files. ``stage`` 1 is the warm start.
    ``loads``: it can be seen only with a model in hand.
    """

    part: str
    given: str
    fault: str
    place: str
    remedy: str
    changes: dict[str, Any] = field(default_factory=dict)
    without: str = ""
    text: str | bytes | None = None
    data: list[dict[str, Any]] | None = None
    files: dict[str, str | bytes] = field(default_factory=dict)
    stage: int = 2
    loads: bool = False


def recipe(given: str, fault: str, place: str, remedy: str, **more: Any) -> Case:
    return Case("Recipes", given, fault, place, remedy, **more)


def setting(given: str, fault: str, remedy: str, **changes: Any) -> Case:
    """The key that is wrong is the place: the first of the changes."""
    return Case("Settings", given, fault, next(iter(changes)), remedy, changes)


def warm(given: str, fault: str, remedy: str, **changes: Any) -> Case:
    """The same of the warm start."""
    both = {"warmstart": {**STAGE, **changes}}
    return Case("Settings", given, fault, next(iter(changes)), remedy, both, stage=1)


def prompt(given: str, fault: str, place: str, remedy: str, *data: Any, **more: Any) -> Case:
    return Case("Prompts", given, fault, place, remedy, data=list(data) or None, **more)


def stored(given: str, fault: str, place: str, remedy: str, data: Any, **files: Any) -> Case:
    named = {name.replace("__", "."): content for name, content in files.items()}
    return Case("Files of data", given, fault, place, remedy, {"data": data}, files=named)


def template(given: str, fault: str, teacher_prompt: str, remedy: str = "teacher_prompt") -> Case:
    changes = {"teacher_prompt": teacher_prompt}
    return Case("The teacher's own prompt", given, fault, "row 0", remedy, changes)


def pair(given: str, fault: str, place: str, remedy: str, loads: bool = False, **both: Any) -> Case:
    return Case("Models and pairs", given, fault, place, remedy, both, loads=loads)


def several(given: str, fault: str, place: str, remedy: str, **more: Any) -> Case:
    """Two teachers of one folder, rows that name them in turn, unless ``more`` says otherwise."""
    teachers = {"math": "teacher", "code": {"path": "teacher"}}
    data = more.pop("data", [{"prompt": "what", "teacher": name} for name in ("math", "code")])
    without = "" if "teacher" in more else "teacher"
    changes = {"teachers": teachers, **more}
    return Case("Several teachers", given, fault, place, remedy, changes, without, data=data)


def own(given: str, fault: str, place: str, remedy: str, **more: Any) -> Case:
    changes = {"teacher": "self", **more}
    return Case("A teacher that is the student", given, fault, place, remedy, changes)


def turns(given: str, fault: str, place: str, remedy: str, **changes: Any) -> Case:
    return Case("Turns", given, fault, place, remedy, changes)


def folder(given: str, fault: str, place: str, remedy: str, **more: Any) -> Case:
    return Case("Run folders", given, fault, place, remedy, **more)


def served(given: str, fault: str, place: str, remedy: str, **servers: Any) -> Case:
    """A teacher's servers; those of the student where they have ``weights``."""
    role = servers.pop("role", "teacher")
    model = {"path": role, **servers.pop("model", {}), "served": servers}
    return Case("Servers", given, fault, place, remedy, changes={role: model})


def text(given: str, fault: str, place: str, remedy: str, teacher: Any, **changes: Any) -> Case:
    """A teacher that gives only text, with settings that go with it but for ``changes``."""
    both = {"teacher": teacher, **BY_TEXT, **changes}
    return Case("Teachers by text", given, fault, place, remedy, changes=both)


BY_TEXT = {"token_loss": "none", "embedding": "student", "candidate_loss": "entropy"}
HERE = "http://127.0.0.1:9"  # nobody listens there
NO_RECIPE, BEGIN = "must be a mapping of keys to values", "Begin with student: PATH"
FAMILY = "choose a teacher of the same family"
CASES: tuple[Case, ...] = (
    recipe("a list", NO_RECIPE, "recipe.yaml", BEGIN, text="[student, teacher]"),
    recipe("an empty file", NO_RECIPE, "recipe.yaml", BEGIN, text=""),
    recipe("text that is no YAML", "not valid YAML", "line 1, column", "expected", text="a: [b"),
    recipe("bytes that are not UTF-8", "cannot be read", "recipe.yaml", "utf-8", text=b"\xff\xfe"),
    recipe(
        "a key twice", "a key twice", "line 1", "not valid YAML", text=HEAD + "seed: 1\nseed: 2"
    ),
    recipe("no student", "student is missing", "recipe.yaml", "needs student", without="student"),
    recipe("no data", "data is missing", "recipe.yaml", "needs student, teacher", without="data"),
    recipe(
        "a key mistyped",
        "unknown key 'learning_rat'",
        "recipe.yaml",
        "Did you mean learning_rate?",
        changes={"learning_rat": 1},
    ),
    recipe(
        "a key like no other",
        "unknown key 'wombat_zzz'",
        "recipe.yaml",
        "topd settings WORD finds them",
        changes={"wombat_zzz": 1},
    ),
    recipe(
        "a key of a model mistyped",
        "unknown key 'dtyp'",
        "in teacher",
        "Did you mean dtype?",
        changes={"teacher": {"path": "teacher", "dtyp": "float32"}},
    ),
    recipe(
        "a key of stage 1 mistyped",
        "unknown key 'answer'",
        "in warmstart",
        "Did you mean answers?",
        changes={"warmstart": {"answer": "data"}},
    ),
    recipe(
        "a number for a model",
        "must be a mapping",
        "student",
        "(given: 3)",
        changes={"student": 3},
    ),
    recipe(
        "an unknown type of weights",
        "Input should be",
        "teacher.dtype",
        "'float32', 'bfloat16' or 'float16'",
        changes={"teacher": {"path": "teacher", "dtype": "int3"}},
    ),
    recipe(
        "Python in YAML",
        "could not determine a constructor for the tag",
        "line 3",
        "not valid YAML",
        text=HEAD + "data: !!python/object/apply:os.system ['true']",
    ),
    setting(
        "a word for a number", "unable to parse string as a number", "'fast'", learning_rate="fast"
    ),
    setting(
        "a negative learning rate", "-1.0", "must be finite and at least 0", learning_rate=-1.0
    ),
    setting("no candidates at all", "0.0", "must be above 0 and at most 1", candidate_fraction=0.0),
    setting("a share above 1", "1.5", "must be between 0 and 1", false_alarm_share=1.5),
    setting("a temperature of 0", "0.0", "must be finite and above 0", temperature=0.0),
    setting("float16 on a CPU", "has no effect on a CPU", "Set bf16", fp16=True),
    setting("an empty window", "0", "must be at least 1", window_length=0),
    setting("a method that does not exist", "topdd", "opd, first_fork", method="topdd"),
    setting("an option that the method has not", "share", "topd", method_options={"share": 0.1}),
    setting("options that are not a mapping", "'many'", "is not a mapping", method_options="many"),
    setting("epsilon of another solver", "has no effect", "Set solver: sinkhorn", epsilon=0.5),
    setting("cross-entropy on own samples", "no signal", "Leave it at 1", kd_ratio=0.5),
    setting(
        "generations that fill no update",
        "3 does not divide the 2",
        "per_device_train_batch_size x",
        num_generations=3,
    ),
    setting("sharded students", "is the launcher's to say", "fsdp", fsdp="full_shard"),
    setting(
        "publishing the run folder",
        "all prompts and rollouts",
        "student/ folder instead",
        push_to_hub=True,
    ),
    setting(
        "evaluation without data", "needs data", "eval_data in a recipe", eval_strategy="steps"
    ),
    setting(
        "data for no evaluation",
        "no effect without eval_strategy",
        "Set it",
        eval_data="prompts.jsonl",
    ),
    setting(
        "smoothed labels", "0.1 has no effect here", "Leave it out", label_smoothing_factor=0.1
    ),
    setting("a compiled student", "has no effect here", "Leave it out", torch_compile=True),
    setting("a seed below 0", "-1", "must be from 0 to", seed=-1),
    setting("no update at all", "would train nothing", "must be a number of updates", max_steps=0),
    setting("an optimiser that is not installed", "cannot be used", "install", optim="adamw_8bit"),
    setting("a logger that is unknown", "cannot be used", "Choose another", report_to="nonsense"),
    setting(
        "completions for no tracker",
        "report_to names none of tensorboard, trackio, wandb",
        "Set report_to, or leave it out",
        log_completions=True,
    ),
    setting(
        "a schedule without its numbers",
        "cannot be used",
        "Choose another",
        lr_scheduler_type="warmup_stable_decay",
    ),
    setting(
        "no token losses, and nothing else to learn",
        "leaves opd nothing to learn",
        "Choose a method with windows",
        token_loss="none",
        method="opd",
    ),
    setting(
        "a weight of 0 on all that is learned",
        "trajectory_weight: 0 leaves topd nothing to learn",
        "Raise it",
        token_loss="none",
        method="topd",
        trajectory_weight=0.0,
    ),
    setting(
        "no token losses, and updates that do not look ahead",
        "learns nothing in updates that do not look ahead",
        "Set look_ahead_every: 1",
        token_loss="none",
        look_ahead_every=2,
    ),
    setting(
        "sampled token losses of a kind",
        "has no effect with token_loss: sampled",
        "Leave it out",
        beta=0.5,
        token_loss="sampled",
    ),
    setting("LoRA of no rank", "lora.r", "must be a whole number above 0", lora={"r": 0}),
    setting(
        "a key that LoRA has not",
        "unknown key 'rank' in lora",
        "See peft.LoraConfig",
        lora={"rank": 2},
    ),
    warm("guidance in a warm start", "needs rollouts", "takes opd", method="topd"),
    warm(
        "windows in a warm start", "has no effect in a warm start", "Leave it out", window_length=9
    ),
    *(
        prompt(given, "the prompt is empty", "row 1", "Remove the row", {key: [ASKED]}, {key: bad})
        for given, key, bad in (
            ("an empty text", "prompt", ""),
            ("blanks only", "prompt", "  \n"),
            ("no messages", "prompt", []),
            ("an empty message", "prompt", [EMPTY]),
            (
                "an empty last question",
                "prompt",
                [ASKED, {"role": "assistant", "content": "so"}, EMPTY],
            ),
            ("a system message alone", "prompt", [{"role": "system", "content": "add"}]),
            ("an answer alone", "messages", [{"role": "assistant", "content": "so"}]),
        )
    ),
    prompt(
        "an empty text without a chat template",
        "the prompt is empty",
        "row 0",
        "Remove the row",
        {"prompt": ""},
        changes={"data": {"path": "prompts.jsonl", "chat": False}},
    ),
    *(
        prompt(
            given,
            "content of text, not",
            "row 0",
            "a string or a list of messages",
            {"prompt": bad},
        )
        for given, bad in (
            ("a number", 3),
            ("a list of texts", ["what", "is"]),
            ("a message without content", [{"role": "user", "content": None}]),
            ("a part that is an image", [{"role": "user", "content": [{"type": "image"}]}]),
        )
    ),
    prompt(
        "messages of another role",
        "has a message of the role 'human'",
        "row 0",
        "Write the roles as user",
        {"prompt": [{"role": "human", "content": "what"}]},
    ),
    prompt(
        "images", "which are not read", "row 0", "Remove the", {"prompt": "what", "images": [1]}
    ),
    prompt(
        "tools that are no list",
        "tools must be a list of tools",
        "row 0",
        "not {'name': 'sum'}",
        {"prompt": "what", "tools": {"name": "sum"}},
    ),
    prompt(
        "a row without a prompt",
        "has neither prompt nor messages, but answer, question",
        "row 0",
        "columns: {prompt: NAME}",
        {"question": "what", "answer": "3"},
    ),
    prompt(
        "a prompt of null",
        "the prompt is empty",
        "row 1",
        "Remove the row",
        {"prompt": "what"},
        {"prompt": None},
    ),
    prompt(
        "a prompt longer than the limit",
        "has 8 tokens, the limit is 5",
        "row 1",
        "Raise max_prompt_length, or set drop_long_prompts: true",
        {"prompt": "what"},
        {"prompt": "what is 1 + 2 ?"},
        changes={"max_prompt_length": 5},
    ),
    prompt(
        "only prompts that are too long, all dropped",
        "no prompt is left",
        "data",
        "Check the data and max_prompt_length",
        changes={"max_prompt_length": 1, "drop_long_prompts": True},
    ),
    prompt(
        "answers of the data, one missing",
        "no solution to learn from",
        "row 1",
        "Map a solution column",
        {"prompt": "what", "solution": "so"},
        {"prompt": "what", "solution": " "},
        changes={"warmstart": {**STAGE, "answers": "data"}},
        stage=1,
    ),
    prompt(
        "an answer of the data that continues after an end token",
        "the answer has '</s>' in it, the token that ends a response, and continues",
        "row 0",
        "Take it out of the text",
        {"prompt": "what", "solution": "so </s> so"},
        changes={"warmstart": {**STAGE, "answers": "data"}},
        stage=1,
    ),
    prompt(
        "an answer of the data whose end does not end the student",
        "the chat template ends the answer with '.', and the student's responses end at </s>",
        "row 0",
        "Set eos_token of the student",
        {"prompt": "what", "solution": "so"},
        changes={
            "student": {
                "path": "student",
                "chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}"
                "{% if not add_generation_prompt %}.{% endif %}",
            },
            "warmstart": {**STAGE, "answers": "data"},
        },
        stage=1,
    ),
    prompt(
        "an answer of the data that is too long",
        "the solution has 13 tokens, the limit max_completion_length is 8",
        "row 0",
        "Above it: 1 of 1 rows, the longest 13. Raise it, or drop them",
        {"prompt": "what", "solution": "so " * 12},
        changes={"warmstart": {**STAGE, "answers": "data"}},
        stage=1,
    ),
    prompt(
        "an argument that the chat template does not read",
        "tokenize is not read by the chat template",
        "row 0",
        "chat_template_kwargs",
        changes={"chat_template_kwargs": {"tokenize": False}},
    ),
    prompt(
        "more tokens than the student has positions",
        "make 513 tokens, the model has 512 positions",
        "student",
        "Lower max_completion_length or max_prompt_length.",
        *rows(1),
        changes={"max_completion_length": 505},
    ),
    prompt(
        "more tokens than the teacher has positions",
        "make 525 tokens, the model has 512 positions",
        "teacher",
        "Lower max_completion_length, max_prompt_length or window_length",
        *rows(1),
        changes={"max_completion_length": 500, "teacher_prompt": "{{ 'so ' * 20 }}"},
    ),
    stored(
        "a file that is not there", "no such file", "data no.jsonl", "Give a .jsonl", "no.jsonl"
    ),
    stored("a folder that is not there", "cannot be read", "data no/where", "a folder", "no/where"),
    stored("an empty file", "is empty", "data x.jsonl", "Give a .jsonl", "x.jsonl", x__jsonl=""),
    stored(
        "empty lines", "cannot be read", "data x.jsonl", "Give a .jsonl", "x.jsonl", x__jsonl="\n\n"
    ),
    Case(
        "Files of data",
        "evaluation data that is not there",
        "no such file",
        "data no.jsonl",
        "Give a .jsonl",
        {"eval_data": "no.jsonl", "eval_strategy": "steps"},
    ),
    Case(
        "Files of data",
        "a split that a folder has not",
        'Unknown split "test"',
        "data set",
        "Should be one of ['train']",
        {"data": {"path": "set", "split": "test"}},
        files={"set/train.jsonl": '{"prompt": "a"}\n'},
    ),
    stored(
        "a broken line",
        "JSON",
        "data x.jsonl",
        "Give a .jsonl",
        "x.jsonl",
        x__jsonl='{"prompt": "a"}\n{"pro',
    ),
    stored(
        "Latin-1",
        "is not UTF-8",
        "data x.jsonl",
        "Convert it",
        "x.jsonl",
        x__jsonl='{"prompt": "é"}\n'.encode("latin-1"),
    ),
    stored(
        "text that is no Parquet",
        "Parquet",
        "data x.parquet",
        "Give a .jsonl",
        "x.parquet",
        x__parquet="so",
    ),
    stored(
        "neither file nor task", "give either path or task", "data", "give either", {"limit": 3}
    ),
    stored(
        "file and task",
        "give either path or task",
        "data",
        "give either",
        {"path": "a", "task": "b"},
    ),
    stored(
        "a key of the other source",
        "size has no effect with path",
        "data",
        "has no effect",
        {"path": "x.jsonl", "size": 3},
    ),
    stored(
        "no rows wanted",
        "greater than or equal to 1",
        "data.limit",
        "(given: 0)",
        {"path": "x.jsonl", "limit": 0},
    ),
    stored(
        "a column that nothing reads",
        "Input should be",
        "data.columns",
        "'prompt'",
        {"path": "x.jsonl", "columns": {"question": "q"}},
    ),
    *(
        stored(
            f"a mapping to {given}",
            f"no column '{column}'",
            "row 0",
            "Correct data.columns",
            {"path": "x.jsonl", "columns": {"prompt": column}},
            x__jsonl='{"prompt": "a", "meta": {"answer": "3"}, "turns": []}\n',
        )
        for given, column in (
            ("a column that is not there", "question"),
            ("a nested one that is not there", "meta.question"),
            ("the inside of a text", "prompt.text"),
            ("the first of none", "turns.0"),
            ("a list by name", "turns.x"),
        )
    ),
    stored(
        "an unknown task",
        "not registered",
        "data.task 'gsm_symbolc'",
        "Name a generator",
        {"task": "gsm_symbolc"},
    ),
    stored(
        "a family that the testbed has not",
        "has no family 'sums'",
        "testbed://sums",
        "arithmetic, programs, logic, guesses",
        "testbed://sums",
    ),
    stored(
        "a split that the testbed has not",
        "has no split 'dev'",
        "testbed://logic",
        "test, validation, train",
        {"path": "testbed://logic", "split": "dev"},
    ),
    template(
        "an unknown column",
        "'hint' is undefined",
        "{{ prompt }} {{ hint }}",
        "The row has the columns prompt, solution",
    ),
    template("an error in it", "division by zero", "{{ 1 / 0 }}"),
    template("text plus a number", "str", "{{ prompt + 1 }}"),
    template("a list without end", "Range too big", "{{ range(10 ** 6) | list }}"),
    template("a file", "loader", "{% include 'x' %}"),
    template("nothing", "comes out empty", "", "Correct it"),
    template("the class of a text", "unsafe", "{{ ''.__class__.__mro__ }}"),
    template("the globals of a helper", "unsafe", "{{ cycler.__init__.__globals__.os.getcwd() }}"),
    template("the globals of format", "unsafe", "{{ prompt.format.__globals__ }}"),
    template("the template itself", "unsafe", "{{ self.__init__ }}"),
    Case(
        "The teacher's own prompt",
        "a brace that never closes",
        "not a Jinja template",
        "teacher_prompt",
        "end of",
        {"teacher_prompt": "{{ prompt"},
    ),
    pair(
        "a folder that is not there",
        "cannot be loaded",
        "model no/where",
        "Check the path",
        student="no/where",
    ),
    pair(
        "a file for a folder",
        "cannot be loaded",
        "model a_file",
        "Check the path",
        teacher="a_file",
    ),
    pair(
        "a folder without a tokenizer",
        "tokenizer cannot be loaded",
        "model no_tokenizer",
        "no files there",
        teacher="no_tokenizer",
    ),
    pair(
        "a package that is not installed",
        "no Python package 'no_such_model'",
        "model package://no_such_model",
        "pip install no-such-model",
        teacher="package://no_such_model",
    ),
    pair(
        "a GGUF file that is not there",
        "no.gguf",
        "model teacher",
        "Check the path",
        teacher={"path": "teacher", "gguf_file": "no.gguf"},
    ),
    pair(
        "a testbed model of no role",
        "name a model",
        "testbed://logic/judge",
        "/teacher or /student",
        teacher="testbed://logic/judge",
    ),
    pair(
        "two tokens swapped",
        "differ at 2 tokens, first '+': student id 16, teacher id 17",
        "tokenizers",
        FAMILY,
        teacher="swapped",
    ),
    pair(
        "a token more in the teacher",
        "differ at 1 tokens, first 'more'",
        "teacher id 64",
        FAMILY,
        teacher="extra",
    ),
    pair(
        "a token more in the student",
        "differ at 1 tokens, first 'more'",
        "student id 64",
        FAMILY,
        student="extra",
    ),
    pair(
        "other ends of a response",
        "end a response differently",
        "teacher '<|user|>'",
        "Set eos_token of one model",
        teacher="ends_with_user",
    ),
    pair(
        "an end that no vocabulary has",
        "eos_token '<end>' is not in its vocabulary",
        "model teacher",
        "eos_token",
        teacher={"path": "teacher", "eos_token": "<end>"},
    ),
    pair(
        "fewer embedding rows than tokens",
        "63 embedding rows for 64 tokens",
        "teacher",
        "tokenizer that belongs to the model",
        teacher="few_rows",
    ),
    pair(
        "the same in the student",
        "63 embedding rows for 64 tokens",
        "student",
        "tokenizer that belongs to the model",
        student="few_rows",
    ),
    pair(
        "the folder of an adapter",
        "is an adapter",
        "model an_adapter",
        "Merge it into its base",
        student="an_adapter",
    ),
    pair(
        "the folder of a run", "is a run folder", "model a_run", "Give its student", student="a_run"
    ),
    pair(
        "messages without a chat template",
        "has no chat template",
        "plain",
        "data.chat: false",
        student="plain",
    ),
    pair(
        "weights cut short",
        "weights cannot be loaded",
        "model cut",
        "Check the path",
        True,
        teacher="cut",
    ),
    pair(
        "weights of which some are not there",
        "its files lack weights (model.layers.1.",
        "model partial",
        "Are they whole",
        True,
        teacher="partial",
    ),
    pair(
        "a LoRA target that the model lacks",
        "no_such_proj",
        "lora in a recipe",
        "not found in the base model",
        lora={"r": 2, "target_modules": ["no_such_proj"]},
    ),
    pair(
        "a teacher that gives NaN",
        "NaN log-prob at rollout 0, response token 0",
        "teacher",
        "check its weights",
        True,
        teacher="nan",
    ),
    pair("a student that gives NaN", "NaN", "student", "weights", True, student="nan"),
    several(
        "a row of an unknown teacher",
        "is 'law'",
        "row 1: column 'teacher'",
        "one of the teachers code, math",
        data=[{"prompt": "what", "teacher": "math"}, {"prompt": "what", "teacher": "law"}],
    ),
    several(
        "a row without a teacher",
        "is missing",
        "row 0: column 'teacher'",
        "set teacher_column",
        data=[{"prompt": "what"}],
    ),
    several(
        "a teacher that no row names",
        "code is named by no row",
        "column 'teacher'",
        "Leave it out, or give it rows",
        data=[{"prompt": "what", "teacher": "math"}],
    ),
    several("one teacher by name", "2 to 256", "teachers", "give 2", teachers={"math": "teacher"}),
    several("both keys", "has teacher and teachers", "recipe.yaml", "Leave one", teacher="teacher"),
    Case(
        "Several teachers",
        "a mean of one teacher",
        "has no effect",
        "teachers_mix",
        "Leave it out",
        {"teachers_mix": "mean"},
    ),
    turns(
        "turns without an environment", "has no effect", "max_turns", "Leave it out", max_turns=2
    ),
    turns(
        "an unknown environment",
        "'abacus' is not one of calculator",
        "environment",
        "Choose one",
        environment="abacus",
    ),
    turns(
        "one turn with an environment",
        "nothing to reply to",
        "max_turns: 1",
        "Raise it",
        environment="calculator",
        max_turns=1,
    ),
    turns(
        "an environment and overlap",
        "does not go with environment",
        "overlap",
        "Leave one of them out",
        environment="calculator",
        overlap=True,
    ),
    turns(
        "a template that ends no message",
        "writes no message of a tool or a user",
        "chat template",
        "Choose another",
        environment="calculator",
    ),
    own("its student's prompt", "self reads the same prompts", "teacher", "teacher_prompt"),
    own(
        "an average of 1",
        "Input should be less than 1",
        "teacher.self",
        "{self: {ema: 0.99}}",
        teacher={"self": {"ema": 1}},
    ),
    own(
        "a wrong reference that its prompt does not name",
        "wrong has no effect",
        "reference",
        "Leave it out",
        teacher_prompt="think: {{ prompt }}",
        reference="wrong",
    ),
    served(
        "a URL without http",
        "'localhost:8000' is not the URL of a server",
        "teacher.served.completions",
        "Write http://HOST:PORT",
        completions="localhost:8000",
        pooling=HERE,
    ),
    served(
        "a port that is not a number",
        "is not the URL of a server",
        "teacher.served.pooling",
        "Write http://HOST:PORT",
        completions=HERE,
        pooling="http://localhost:port",
    ),
    served(
        "a password in a URL",
        "only http://HOST:PORT/PATH is wanted",
        "teacher.served.completions",
        "api_key_env names the variable with a key (given: not shown)",
        completions="http://me:secret@localhost:8000",
        pooling=HERE,
    ),
    served(
        "an API key in the recipe",
        "Extra inputs are not permitted",
        "teacher.served.api_key",
        "(given: not shown)",
        completions=HERE,
        pooling=HERE,
        api_key="secret",
    ),
    served(
        "an API key that is not in the environment",
        "NO_SUCH_KEY is not set",
        "served.api_key_env",
        "Put the servers' API key there",
        completions=HERE,
        pooling=HERE,
        api_key_env="NO_SUCH_KEY",
    ),
    served(
        "no server",
        "no server",
        "teacher.served.completions",
        "Give its URL",
        completions=[],
        pooling=HERE,
    ),
    served(
        "a teacher without a pooling server",
        "is missing",
        "teacher.served.pooling",
        "start both kinds with topd serve-teacher",
        completions=HERE,
    ),
    served(
        "a served teacher of GGUF",
        "not with gguf_file",
        "teacher.served",
        "Save the model with save_pretrained",
        completions=HERE,
        pooling=HERE,
        model={"gguf_file": "some.gguf"},
    ),
    served(
        "a served student without a folder for its weights",
        "is missing",
        "student.served.weights",
        "Name a folder that training and servers share",
        role="student",
        completions=HERE,
    ),
    served(
        "a time limit of 0",
        "greater than 0",
        "teacher.served.timeout",
        "given: 0",
        completions=HERE,
        pooling=HERE,
        timeout=0,
    ),
    served(
        "a server that is not there",
        "Connection refused",
        f"teacher: no server is left. {HERE}",
        "Start them again",
        completions=HERE,
        pooling=HERE,
        retries=0,
    ),
    text("a teacher of text without a URL", "is missing", "teacher.text.url", "url", {"text": {}}),
    text(
        "a server of text that is not there",
        "Connection refused",
        f"no server is left. {HERE}",
        "Start them again",
        {"text": {"url": HERE, "retries": 0}},
    ),
    text(
        "the key of a server of text that is not in the environment",
        "NO_SUCH_KEY is not set",
        "text.api_key_env",
        "Put the servers' API key there",
        {"text": {"url": HERE, "api_key_env": "NO_SUCH_KEY"}},
    ),
    text(
        "a password in the URL of a server of text",
        "only http://HOST:PORT/PATH is wanted",
        "teacher.text.url",
        "(given: not shown)",
        {"text": {"url": "http://me:secret@localhost:8000"}},
    ),
    text(
        "a dtype for a teacher at a URL",
        "dtype has no effect with text",
        "teacher",
        "Leave it out",
        {"text": {"url": HERE}, "dtype": "bfloat16"},
    ),
    text(
        "a served teacher as text",
        "as_text is for a model in this process",
        "teacher",
        "text: {url: ...}",
        {"path": "teacher", "as_text": True, "served": {"completions": HERE, "pooling": HERE}},
    ),
    text(
        "a prompt of one's own in extra",
        "prompt is set by TOPD",
        "teacher.text.extra",
        "Leave it out",
        {"text": {"url": HERE, "extra": {"prompt": "so"}}},
    ),
    text(
        "a student that gives only text",
        "a student is trained here",
        "student.text",
        "Give its path",
        "teacher",
        student={"text": {"url": HERE}},
    ),
    text(
        "settings that compare distributions",
        "gives only text, no distributions: token_loss full",
        "teacher",
        "Set token_loss: none, embedding: student, candidate_loss: entropy",
        {"text": {"url": HERE}},
        token_loss="full",
        embedding="teacher",
        candidate_loss="sampled",
    ),
    text(
        "a method that compares distributions",
        "method window_kd needs distributions",
        "teacher",
        "Set method: topd or window_sft or olive",
        {"text": {"url": HERE}},
        method="window_kd",
    ),
    text(
        "one with another tokenizer, and the default settings",
        "method opd needs logprobs",
        "teacher",
        "Set token_loss: spans (or a method by windows",
        {"path": "teacher", "as_text": True},
        method="opd",
        **{"token_loss": "full", "embedding": "teacher", "candidate_loss": "sampled"},
    ),
    text(
        "a server, and the default settings",
        "method opd needs logprobs",
        "teacher",
        "Set method: topd or window_sft or olive, token_loss: none, embedding: student",
        {"text": {"url": HERE}},
        method="opd",
        **{"token_loss": "full", "embedding": "teacher", "candidate_loss": "sampled"},
    ),
    text(
        "arguments of the chat template, and a chat server",
        "chat_template_kwargs do not reach a chat server's own template",
        "teacher",
        'Set teacher.text.extra: {chat_template_kwargs: {"loud": true}}',
        {"text": {"url": HERE, "chat": True}},
        chat_template_kwargs={"loud": True},
    ),
    Case(
        "Teachers by text",
        "token losses by spans, of a teacher that is not read by text",
        "token_loss: spans is for a teacher in this process",
        "teacher",
        "set token_loss: full, sampled or none",
        changes={"token_loss": "spans"},
    ),
    text(
        "token losses by spans, of a server",
        "token_loss: spans is for a teacher in this process",
        "as_text: true",
        "set token_loss: full, sampled or none",
        {"text": {"url": HERE, "logprobs": True}},
        token_loss="spans",
    ),
    folder(
        "below a file",
        "cannot be written",
        "output_dir: a_file/run",
        "Choose another folder",
        changes={"output_dir": "a_file/run"},
    ),
    folder(
        "a file",
        "cannot be written",
        "output_dir: a_file",
        "Choose another folder",
        changes={"output_dir": "a_file"},
    ),
    folder(
        "one that holds a run",
        "already holds a run",
        "output_dir: old",
        "Choose another folder, or resume from a checkpoint with resume_from_checkpoint",
        changes={"output_dir": "old"},
        files={"old/metrics.jsonl": ""},
    ),
    folder(
        "a checkpoint that is not there",
        "there is no checkpoint",
        "resume_from_checkpoint",
        "no/checkpoint-1",
        changes={"resume_from_checkpoint": "no/checkpoint-1"},
    ),
)


def make_models(root: Path) -> None:
    """Models, whole or as configuration and tokenizer only, as the cases name them."""
    broken = tiny_model(seed=1)
    broken.model.norm.weight.data[0] = float("nan")
    whole = {
        "student": tiny_model(),
        "teacher": tiny_model(seed=1),
        "nan": broken,
        "padded": tiny_model(seed=1, vocab=80),
        "more_padded": tiny_model(vocab=96),
        "endless": never_ending(),
    }
    for name, model in whole.items():
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    plain, other_end = tiny_tokenizer(), tiny_tokenizer()
    plain.chat_template, other_end.eos_token = None, "<|user|>"
    swapped = [{"+": "-", "-": "+"}.get(word, word) for word in WORDS]
    doors: dict[str, PreTrainedTokenizerFast | None] = {
        "swapped": tiny_tokenizer(swapped),
        "extra": tiny_tokenizer([*WORDS, "more"]),
        "ends_with_user": other_end,
        "few_rows": tiny_tokenizer(),
        "plain": plain,
        "no_tokenizer": None,
    }
    for name, tokenizer in doors.items():
        vocab = len(WORDS) - 1 if name == "few_rows" else 64
        tiny_model(vocab=vocab).config.save_pretrained(root / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(root / name)
    (root / "an_adapter").mkdir()
    (root / "an_adapter" / "adapter_config.json").write_text("{}")
    (root / "a_run").mkdir()
    (root / "a_run" / "student").symlink_to(root / "student")
    (root / "cut").mkdir()
    for file in (root / "teacher").iterdir():
        whole_file = file.read_bytes()
        cut = file.suffix == ".safetensors"
        (root / "cut" / file.name).write_bytes(whole_file[:1000] if cut else whole_file)
    copytree(root / "teacher", root / "partial")
    weights = load_file(root / "partial" / "model.safetensors")
    some = {name: weight for name, weight in weights.items() if "layers.1." not in name}
    save_file(some, root / "partial" / "model.safetensors", metadata={"format": "pt"})


def never_ending() -> Any:
    """A model whose end-of-sequence token has probability 0."""
    model = tiny_model()
    model.model.embed_tokens.weight.data[:, 0] = 1e4  # one large coordinate in every state
    model.lm_head.weight.data[EOS] = 0
    model.lm_head.weight.data[EOS, 0] = -1e3
    return model


def write_case(case: Case, place: Path, models: Path) -> Path:
    """The case's files in a folder of their own, beside links to the models."""
    for model in models.iterdir():
        (place / model.name).symlink_to(model)
    (place / "a_file").write_text("so")
    lines = "".join(json.dumps(line) + "\n" for line in case.data or rows(4))
    recipe = {k: v for k, v in {**LITTLE, **case.changes}.items() if k != case.without}
    content = yaml.safe_dump(recipe) if case.text is None else case.text
    for name, text in {"prompts.jsonl": lines, **case.files, "recipe.yaml": content}.items():
        path = place / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Path("recipe.yaml")


def message(case: Case, place: Path, models: Path) -> str:
    """What a run of the case says; a model may be loaded only where the case allows it."""
    loading = (
        contextlib.nullcontext()
        if case.loads
        else patch.object(
            AutoModelForCausalLM,
            "from_pretrained",
            side_effect=AssertionError("a model was loaded"),
        )
    )
    path = write_case(case, place, models)
    with contextlib.chdir(place), loading:
        try:
            run_recipe(path, quiet=True, warmstart=case.stage == 1)
        except TOPDError as error:
            return str(error)
    raise AssertionError(f"{case.given}: was not refused")


def row(case: Case, said: str) -> str:
    """A line of the page."""
    given = f"* {case.given}" if case.loads else case.given
    plain = " ".join(said.split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
    return f"| {given} | {plain} |"


def page(said: list[tuple[Case, str]]) -> Iterator[str]:
    """The lines of docs/errors.md."""
    yield "# Bad input and what is said to it\n"
    yield (
        "What is given, and the message: fault, place and remedy. All but those marked * are found "
        "before a\nmodel is loaded. A command ends with exit code 2, or 6 for a server that is not "
        "there ([all codes](trust.md#faults)).\nGenerated by `PYTHONPATH=src:tests python "
        "tests/bad_inputs.py`, which makes every case."
    )
    for part, cases in groupby(said, key=lambda pair: pair[0].part):
        yield f"\n## {part}\n\n| given | message |\n|---|---|"
        yield from (row(case, text) for case, text in cases)


def main() -> None:
    """Write the page."""
    with tempfile.TemporaryDirectory() as root:
        models = Path(root) / "models"
        models.mkdir()
        make_models(models)
        said = []
        for number, case in enumerate(CASES):
            place = Path(root) / str(number)
            place.mkdir()
            said.append((case, message(case, place, models)))
    for case, text in said:
        for part in (case.fault, case.place, case.remedy):
            if part not in text:
                print(f"{case.given}: {part!r} is not in: {text}", file=sys.stderr)
    PAGE.write_text("\n".join(page(said)) + "\n", encoding="utf-8")
    print(f"{PAGE}: {len(CASES)} cases")


if __name__ == "__main__":
    main()
