"""The docs site builds strictly, without a network; generated pages are up to date."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from dataclasses import fields
from inspect import signature
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from bench import evidence, settings
from pydantic import BaseModel
from transformers import TrainingArguments

import topd.config
from topd.commands.gate import Suite
from topd.commands.recipe import CompareSpec, read_recipe
from topd.evaluate.spec import TrainingEvaluation
from topd.inputs.models import ModelSpec
from topd.inputs.rows import DataSpec
from topd.methods import METHODS

ROOT = Path(__file__).parents[1]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (the docs extra)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    trainer = (tmp_path / "api" / "trainer" / "index.html").read_text(encoding="utf-8")
    assert "teacher_processing_class" in trainer  # docstrings are in it
    for name in ("train", "evaluate", "push_to_hub", "check"):  # inherited ones too
        assert f'id="topd.training.trainer.TOPDTrainer.{name}"' in trainer
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert 'src="http' not in text, page
        assert 'rel="stylesheet" href="http' not in text, page


def test_settings_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings.page()


def test_evidence_pages_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    docs = ROOT / "docs"
    pages = [docs / "evidence.md", *(docs / "evidence").iterdir()]
    there = {str(page.relative_to(docs)): page.read_text(encoding="utf-8") for page in pages}
    assert there == evidence.pages()
    assert max(map(len, there.values())) < 100_000  # readers and GitHub give up on longer ones


@pytest.mark.parametrize("page", ["README.md", "docs/which-method.md", "docs/evidence.md"])
def test_every_gain_is_one_of_a_table(page: str) -> None:
    """Points with their interval, as [evidence](evidence.md) or a logged command has them."""
    docs = ROOT / "docs"
    tables = (docs / "evidence.md").read_text(encoding="utf-8").partition("## In short")[2]
    for world in (docs / "evidence").iterdir():
        tables += world.read_text(encoding="utf-8")
    measured = f"{tables}{(docs / 'log.md').read_text(encoding='utf-8')}".replace("**", "")
    said = (ROOT / page).read_text(encoding="utf-8").replace("**", "")
    gains = re.findall(r"[+-]\d+\.\d \[-?\d+\.\d, -?\d+\.\d\]", said)
    assert gains
    assert [gain for gain in gains if gain not in measured] == []


@pytest.mark.parametrize("page", ["README.md", "docs/which-method.md"])
def test_a_dagger_is_where_holms_p_is_below_0_05(page: str) -> None:
    """Of every pair, greedy / sampled, as the tables at the ends have it."""

    def told(ends: dict[str, Any]) -> str:
        marked = (
            (evidence._gain(ends[score]), ends[score]["holm"] < 0.05)
            for score in ("greedy", "pass@1")
        )
        return " / ".join(gain.replace("**", "") + "†" * below for gain, below in marked)

    known, results = set(), ROOT / "docs" / "results"
    for path in (*results.glob("*-*-*.json"), results / "real-sums.json"):
        tables = json.loads(path.read_text(encoding="utf-8")).get("against", {})
        known |= {told(ends) for arms in tables.values() for ends in arms.values()}
    gain = r"[+-]\d+\.\d \[-?\d+\.\d, -?\d+\.\d\]†?"
    pairs = re.findall(f"{gain} / {gain}", (ROOT / page).read_text(encoding="utf-8"))
    assert pairs
    assert [pair for pair in pairs if pair not in known] == []


def test_every_setting_and_method_is_on_a_page() -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    inherited = TrainingArguments.__dataclass_fields__
    own = [f.name for f in fields(topd.config.TOPDConfig) if f.name not in inherited]
    assert all(f"`{name}`" in text for name in own)
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in methods for name in METHODS)


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        ("how-to/own-data.md", DataSpec),
        ("how-to/own-models.md", ModelSpec),
        ("how-to/own-models.md", CompareSpec),
        ("evaluation.md", TrainingEvaluation),
    ],
)
def test_every_key_of_a_part_is_on_a_page(page: str, kind: type[BaseModel]) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    missing = [n for n in kind.model_fields if f"`{n}`" not in text and f"  {n}: " not in text]
    assert missing == []


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PASTED = {"student": "path/to/student", "teacher": "path/to/teacher", "data": "train.jsonl"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_of_a_page_is_read(page: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Each alone if it is whole, else pasted under the one before it."""
    text, before = page.read_text(encoding="utf-8"), PASTED
    for name, module in re.findall(r"^`(\w+)\.py`:\n\n```python\n(.*?)```", text, re.S | re.M):
        (tmp_path / f"{name}.py").write_text(module, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for block in re.findall(r"```ya?ml\n(.*?)```", text, re.DOTALL):
        part = yaml.safe_load(block)
        if "problems" in part:
            Suite.model_validate(part)
            continue
        before = part if {"student", "data"} <= set(part) else {**before, **part}
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(before), encoding="utf-8")
        for stage in {False, "warmstart" in before}:
            read_recipe(recipe, {"use_cpu": True}, warmstart=stage)


def test_names_of_other_trainers_on_the_page_are_not_taken_and_ours_are() -> None:
    page = (ROOT / "docs" / "how-to" / "own-models.md").read_text(encoding="utf-8")
    table = page.partition("| there | here |\n|---|---|\n")[2].partition("\n\n")[0]
    taken = {f.name for f in fields(topd.config.TOPDConfig)}
    taken |= set(signature(topd.TOPDTrainer).parameters)
    there, here = zip(*(line.split(" | ") for line in table.splitlines()), strict=True)
    assert taken.isdisjoint(re.findall(r"`(\w+)`", " ".join(there)))
    named = set(re.findall(r"`([a-z_]+)`", " ".join(here)))
    assert named - {"prompt", "messages"} <= taken


def test_readme_is_short_and_versions_agree() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_notebook_runs_and_says_what_it_says() -> None:
    cells = json.loads((ROOT / "docs" / "one_fork.ipynb").read_text(encoding="utf-8"))["cells"]
    space: dict[str, object] = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        with redirect_stdout(StringIO()) as printed:
            exec("".join(cell["source"]), space)
        stored = "".join(line for output in cell["outputs"] for line in output["text"])
        assert printed.getvalue() == stored
    assert space["marks"][space["chosen"]][space["fork"]] == "fork"
