"""Whatever is given to the readers, they read it or refuse it in words: nothing else comes out."""

from __future__ import annotations

import json
import string
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conftest import tiny_tokenizer
from topd import TOPDConfig
from topd.commands.gate import Suite, read_suite
from topd.commands.keys import PARTS, parse_overrides
from topd.commands.recipe import Recipe, read_recipe
from topd.errors import TOPDError
from topd.inputs.models import ModelSpec
from topd.inputs.prompts import PromptEncoder
from topd.inputs.rows import DataSpec
from topd.runs.ledger import check_chain
from topd.types import Prompt

RARE = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.sampled_from(
    sorted({f.name for f in fields(TOPDConfig) if f.init} | {*PARTS, "warmstart"} - {"report_to"})
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["1e-5", "runs/x", "testbed://logic", "topd", "no", "steps", "{{ prompt }}"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["path", "r", "a", "columns", "arms"]) | SCALARS, inner)
    ),
    max_leaves=6,
)
PARTS_THAT_ARE = {"student": "a", "teacher": "b", "data": "c.jsonl", "use_cpu": True}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "recipe.yaml"


def read(path: Path, **options: Any) -> Recipe | None:
    """The recipe, or None if it was refused in words that name something."""
    try:
        return read_recipe(path, **options)
    except TOPDError as error:
        assert str(error).strip()
        return None


@RARE
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_recipe_or_refused(path, content):
    path.write_bytes(content)
    assert read(path) is None  # too short for the three parts


@RARE
@given(text=st.text(alphabet=string.ascii_lowercase + "{}[]:,-&*!|>'\"\n #%@", max_size=80))
def test_any_text_like_yaml_is_refused(path, text):
    path.write_text(text)
    assert read(path) is None


@RARE
@given(changes=st.dictionaries(NAMES, VALUES, max_size=3), stage=st.booleans())
def test_any_values_of_known_keys_are_read_or_refused(path, changes, stage):
    changes.pop("output_dir", None)
    content = {**PARTS_THAT_ARE, "output_dir": str(path.parent / "run"), **changes}
    path.write_text(yaml.safe_dump(content))
    found = read(path, warmstart=stage)
    if found is not None:
        json.dumps({"recipe": found.sources(), "config": found.args.to_dict()}, default=str)


@RARE
@given(words=st.lists(st.text(max_size=20) | NAMES.map("--{}".format), max_size=5))
def test_any_words_of_a_command_line_are_read_or_refused(path, words):
    path.write_text(yaml.safe_dump(PARTS_THAT_ARE))
    try:
        overrides = parse_overrides(words)
    except TOPDError:
        return
    overrides.pop("output_dir", None)
    read(path, overrides=overrides)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False)
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", ""])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=9)}) | JSON, max_size=4
)
ROWS = st.lists(
    st.dictionaries(
        st.sampled_from(["prompt", "messages", "solution", "answer", "x"]), MESSAGES | JSON
    ),
    min_size=1,
    max_size=3,
)


@RARE
@example(content=b'{"":{"":[false,0],"\x01\\u0000":null}}')
@given(
    content=st.binary(max_size=120)
    | ROWS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
)
def test_any_file_of_data_gives_rows_or_is_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("data") / "x.jsonl"
    path.write_bytes(content)
    try:
        rows = DataSpec(path=str(path)).load()
    except TOPDError as error:
        assert str(path) in str(error)
    else:
        assert rows
        encode(rows)


TOKENIZER = tiny_tokenizer()


def encode(rows: list[dict[str, Any]], **options: Any) -> list[Prompt] | None:
    try:
        prompts = PromptEncoder(TOKENIZER, TOKENIZER, **options).encode(rows)
    except TOPDError as error:
        assert "row" in str(error) or "data" in str(error) or "template" in str(error)
        return None
    assert all(prompt.student and prompt.teacher for prompt in prompts)
    return prompts


@RARE
@given(rows=ROWS)
def test_any_rows_give_prompts_or_are_refused(rows):
    encode(rows)


@RARE
@given(template=st.text(alphabet="{}%|. abcprompt_'\"()[]+-*/0159if\n", max_size=40))
def test_any_template_of_a_teachers_prompt_is_filled_in_or_refused(template):
    encode([{"prompt": "what is 1 + 2 ?", "a": [1]}], teacher_prompt=template)


@RARE
@given(content=VALUES | st.fixed_dictionaries({"problems": VALUES}, optional={"limits": VALUES}))
def test_any_suite_is_read_or_refused(path, content):
    path.write_text(yaml.safe_dump(content))
    try:
        assert isinstance(read_suite(path), Suite)
    except TOPDError as error:
        assert "recipe.yaml" in str(error)


@RARE
@given(name=st.text(max_size=20))
def test_any_name_of_a_package_or_testbed_is_a_place_or_refused(name):
    for scheme in ("package://", "testbed://"):
        try:
            assert ModelSpec(path=f"{scheme}{name}").place
        except TOPDError as error:
            assert scheme in str(error)


ENTRIES = st.lists(
    st.fixed_dictionaries(
        {"n": st.integers(0, 4), "previous": st.text(max_size=3), "hash": st.text(max_size=3)}
    ),
    max_size=5,
)


@given(entries=ENTRIES, count=st.integers(0, 5))
def test_no_invented_chain_passes(entries, count):
    faults = list(check_chain(entries, {"entries": count, "hash": "x"}))
    assert bool(faults) == bool(entries or count)
