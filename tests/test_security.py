"""What a recipe, a model, a template or a secret must not be able to do."""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file
from typer.testing import CliRunner

from conftest import tiny_model, tiny_tokenizer, write_pair
from topd.cli import app
from topd.commands.recipe import read_recipe
from topd.commands.train import run_recipe
from topd.commands.yaml_text import parse_yaml
from topd.errors import TOPDError
from topd.inputs.models import ModelSpec, config_of
from topd.inputs.models.adapters import try_adapter
from topd.inputs.prompts import PromptEncoder

SECRET = "hf_ThisMustNotBeWrittenAnywhere"
SMALL = {"max_steps": 1, "per_device_train_batch_size": 2, "max_completion_length": 8}
ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


class Touch:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def run(root: Path, **changes: Any) -> Path:
    path = write_pair(root, output_dir=str(root / "run"), **SMALL, **changes)
    return run_recipe(path, quiet=True)


def foreign(root: Path) -> Path:
    """A model folder whose code leaves a mark beside it when it runs."""
    tiny_tokenizer().save_pretrained(root)
    mark = root.parent / "code_ran"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nraise ImportError('no model')\n"
    (root / "configuration_foreign.py").write_text(code)
    auto = {"AutoConfig": "configuration_foreign.ForeignConfig"}
    (root / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": auto}))
    return mark


# Code of others


def test_code_of_a_model_does_not_run_unless_the_recipe_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark = foreign(tmp_path / "foreign")
    with pytest.raises(TOPDError, match="trust_remote_code"):
        ModelSpec(path=str(tmp_path / "foreign")).load_config()
    assert not mark.exists()
    with pytest.raises(TOPDError, match="no model"):
        ModelSpec(path=str(tmp_path / "foreign"), trust_remote_code=True).load_config()
    assert mark.exists()  # so the mark would have told


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A model with code of its own that can be used."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    place = tmp_path / "own"
    tiny_model("llama").save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    code = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
    (place / "code.py").write_text(code)
    auto = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(
        json.dumps({**config, "model_type": "own", "auto_map": auto})
    )
    return place


@pytest.mark.parametrize("loaded", [False, True])
def test_a_student_with_code_of_its_own_gets_an_adapter(own, loaded):
    spec = ModelSpec(path=str(own), trust_remote_code=True)
    student = spec.load_model() if loaded else spec
    try_adapter(config_of(student), LoraConfig(r=2, target_modules=["q_proj"]), student)
    with pytest.raises(TOPDError, match="nowhere"):  # so its modules were looked at
        try_adapter(config_of(student), LoraConfig(r=2, target_modules=["nowhere"]), student)


def test_a_model_with_code_of_its_own_is_evaluated_if_the_user_trusts_it(own, tmp_path):
    """What a recipe with trust_remote_code has trained, eval and gate can read."""
    row = {"prompt": "what is 1 + 2 ?", "answer": "3"}
    (tmp_path / "problems.jsonl").write_text(json.dumps(row))
    problems = {"path": str(tmp_path / "problems.jsonl"), "max_tokens": 4, "samples": 1}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"problems": problems}))
    few = ["--max-tokens", "4", "--samples", "1"]
    for words in (
        ["eval", str(own), problems["path"], *few],
        ["gate", str(own), str(own), "--suite", str(tmp_path / "suite.yaml")],
    ):
        words += ["--output", str(tmp_path / words[0])]
        refused = CliRunner().invoke(app, words)
        assert refused.exit_code == 2
        assert "trust_remote_code" in refused.stderr
        done = CliRunner().invoke(app, [*words, "--trust-remote-code"])
        assert done.exit_code == 0, done.output


def test_trust_in_code_of_others_is_recorded(tmp_path):
    teacher = {"path": str(tmp_path / "teacher"), "trust_remote_code": True}
    recorded = json.loads((run(tmp_path, teacher=teacher) / "run.json").read_text())["recipe"]
    assert recorded["teacher"]["trust_remote_code"]
    assert not recorded["student"]["trust_remote_code"]


def test_pickled_weights_are_not_loaded(tmp_path):
    """Neither such a file alone, nor one beside safetensors."""
    place, mark = tmp_path / "model", tmp_path / "pickle_ran"
    tiny_model().save_pretrained(place)
    weights = load_file(place / "model.safetensors")
    torch.save({**weights, "lm_head.weight": Touch(mark)}, place / "pytorch_model.bin")
    ModelSpec(path=str(place)).load_model()
    (place / "model.safetensors").unlink()
    torch.save(weights, place / "pytorch_model.bin")
    with pytest.raises(TOPDError, match=r"weights cannot be loaded.*safetensors"):
        ModelSpec(path=str(place)).load_model()
    assert not mark.exists()


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.jsonl"])
def test_pickled_data_is_not_loaded(tmp_path, name):
    mark = tmp_path / "pickle_ran"
    (tmp_path / name).write_bytes(pickle.dumps(Touch(mark)))
    with pytest.raises(TOPDError, match="data"):
        run(tmp_path, data=str(tmp_path / name))
    assert not mark.exists()


@pytest.mark.parametrize("tag", ["object/apply:pathlib.Path.touch", "name:os.system", "module:os"])
def test_a_recipe_cannot_run_code(tmp_path, tag):
    mark = tmp_path / "yaml_ran"
    path = tmp_path / "recipe.yaml"
    path.write_text(f"student: a\nteacher: b\ndata: !!python/{tag} [{mark}]\n")
    with pytest.raises(TOPDError, match="not valid YAML"):
        read_recipe(path)
    assert not mark.exists()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_chat_template_cannot_leave_its_sandbox(tmp_path, side):
    path = write_pair(tmp_path, output_dir=str(tmp_path / "run"), **SMALL)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ESCAPE
    tokenizer.save_pretrained(tmp_path / side)
    with pytest.raises(
        TOPDError, match=rf"{side}: its chat template fails at data row 0: .* is unsafe"
    ):
        run_recipe(path, quiet=True)


# Secrets


def test_a_secret_of_the_environment_is_in_no_file_of_a_run(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    folder = run(tmp_path, save_steps=1)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"run.json", "manifest.json", "rollouts.jsonl", "README.md"} <= {f.name for f in files}
    assert [str(file) for file in files if SECRET.encode() in file.read_bytes()] == []


@pytest.mark.parametrize("key", ["hub_token", "push_to_hub_token"])
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(tmp_path, key):
    path = write_pair(tmp_path, **{key: SECRET})
    with pytest.raises(TOPDError, match=r"(hub_token: .*HF_TOKEN|unknown key)") as caught:
        read_recipe(path)
    assert SECRET not in str(caught.value)


def test_a_recipe_file_with_a_secret_where_a_number_stands_does_not_repeat_it(tmp_path):
    text = yaml.safe_dump({"student": "a", "teacher": "b", "data": "c", "hub_token": [SECRET]})
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(TOPDError) as caught:
        read_recipe(tmp_path / "r.yaml")
    assert SECRET not in str(caught.value)


# Hostile text

BASE = "student: a\nteacher: b\ndata: c\n"
BOMB = "&b0 [y, y, y, y, y, y, y, y, y]" + "".join(
    f", b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 10)
)
HOSTILE = {
    "aliases": (f"method_options: {{share: {BOMB}}}\n", "more than 20000 values"),
    "merges": (
        "m0: &m0 {a: 1}\n"
        + "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 9)),
        "more than 20000 values",
    ),
    "contains itself": ("report_to: &r [*r]\n", "'r' contains itself"),
    "merges itself": ("lora: &r {<<: *r}\n", "'r' contains itself"),
    "unknown alias": ("lora: *r\n", "undefined alias"),
    "deep": ("report_to: " + "[" * 5000 + "]" * 5000 + "\n", "more than 50 deep"),
    "long": ("seed: 1" + " " * 1_000_000 + "\n", "more than 1000000 characters"),
    "decimal digits": ("seed: " + "9" * 5000 + "\n", "a number beyond 64 bits"),
    "hexadecimal digits": ("seed: 0x" + "f" * 9000 + "\n", "a number beyond 64 bits"),
    "date": ("seed: 2024-99-99\n", "seed: Input should be a valid integer"),
    "time": ("seed: 1:30\n", "seed: Input should be a valid integer"),
    "nan": ("learning_rate: .nan\n", "learning_rate: nan must be a finite number"),
    "nan norm": ("max_grad_norm: .nan\n", "max_grad_norm: nan must be a finite number"),
    "number as a key": ("1: 2\n", "unknown key 1"),
    "list as a key": ("? [a]\n: 2\n", "not valid YAML"),
    "long key": ("k" * 900 + ": 1\n", r"unknown key 'k{150,250}\.\.\."),
    "set": ("seed: !!set {a, b}\n", "could not determine a constructor"),
    "bytes": ("seed: !!binary '####'\n", "could not determine a constructor"),
    "null byte": ('report_to: "\\0"\n', "a null byte"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_yaml_ends_in_a_short_message_at_once(tmp_path, kind):
    text, said = HOSTILE[kind]
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE + text)
    started = time.monotonic()
    with pytest.raises(TOPDError, match=said) as caught:
        read_recipe(path)
    assert time.monotonic() - started < 20
    assert len(str(caught.value)) < 1000


def test_aliases_and_merges_of_a_usual_size_are_read():
    text = "a: &x {b: 1, c: [2, 3]}\nd: {<<: *x, b: 4}\ne: [*x, *x]\nf: 2024-02-29\n"
    x = {"b": 1, "c": [2, 3]}
    assert parse_yaml("here", text) == {
        "a": x, "d": {**x, "b": 4}, "e": [x, x], "f": "2024-02-29"
    }  # fmt: skip


def test_numbers_are_those_of_yaml_1_2():
    read = {
        "1e-5": 1e-5, "-1.5E3": -1500.0, ".5": 0.5, "1_000": 1000, "0x1F": 31, "+3": 3, "0": 0,
        "1:30": "1:30", "1:30.5": "1:30.5", "12:30:45": "12:30:45", "010": "010", "08": "08",
        "1.2.3": "1.2.3", "1,000": "1,000", "2024-02-30": "2024-02-30", "=": "=", "e5": "e5",
    }  # fmt: skip
    for text, value in read.items():
        found = parse_yaml("here", text)
        assert (type(found), found) == (type(value), value), text


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "too big"),
        ("{{ 'a' * (10**11) }}", "a product is too long"),
        ("{{ [1] * (10**11) }}", "a product is too long"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "second",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ 9**(9**9) }}", "exponent is too large"),
        ("{{ 'a'.ljust(10**11) }}", "too large"),
        ("{{ '%1000000000d' % 1 }}", "% on text"),
        ("{% for i in range(99999) %}{{ prompt * 99 }}{% endfor %}", "more than 1000000 char"),
    ],
)
def test_a_hostile_teacher_prompt_ends_in_words(template, said):
    tokenizer = tiny_tokenizer()
    encoder = PromptEncoder(tokenizer, tokenizer, template)
    before = sys.gettrace()
    with pytest.raises(TOPDError, match=rf"data row 0: teacher_prompt cannot be .*{said}"):
        encoder.encode([{"prompt": "1 + 2 ="}])
    assert sys.gettrace() is before
