"""Whether all runs of a comparison have the same problems, and models that stayed as they were."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from topd.commands.compare.start import Comparison
from topd.commands.compare.summary import Result
from topd.commands.recipe import in_files
from topd.commands.train import make_evaluator
from topd.errors import TOPDError
from topd.evaluate import Evaluator
from topd.evaluate.evaluation import first_rows
from topd.inputs.rows import DataSpec
from topd.named import code_of
from topd.runs.files import digest, read_whole
from topd.runs.records import read_run


def rows_digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of rows of data, in order."""

    def said(value: Any) -> str:  # where in memory a picture is changes with each reading
        return re.sub(" at 0x[0-9A-Fa-f]+", "", str(value))

    return digest(json.dumps([dict(row) for row in rows], default=said, sort_keys=True).encode())


def check_problems(comparison: Comparison, arms: Sequence[str], results: Sequence[Result]) -> None:
    """Hold the problems of the runs to come, and of those that are done, against each other.

    ``arms`` are those with runs to come. Raises TOPDError where problems differ.
    """
    kinds = dict[str, Evaluator]()
    done = {f"{r['arm']}, seed {r['seed']}": r for r in results}
    sizes = [(run, len(r["solved"]["greedy"])) for run, r in done.items()]
    rows = [(run, r["problems"]) for run, r in done.items() if "problems" in r]
    repeats = []
    for arm in arms:
        recipe = comparison.arms[arm]
        kind = json.dumps([recipe.sources(), recipe.args.chat_template_kwargs], default=str)
        if kind not in kinds:
            evaluator = make_evaluator(recipe)
            assert evaluator is not None  # checked before
            kinds[kind] = evaluator
        prompts = kinds[kind].prompts
        repeats.append((arm, first_rows(prompts)))
        sizes.append((arm, len(prompts) - len(repeats[-1][1])))
        rows.append((arm, rows_digest(kinds[kind].rows)))
    for found in (sizes, repeats, rows):
        for run, problems in found:
            if problems != found[0][1]:
                raise TOPDError(
                    f"compare: {found[0][0]} and {run} have different problems, and runs are "
                    "compared problem by problem. The data of the evaluation may have changed. "
                    "Rows with one prompt are one problem, which older versions did not know and a "
                    "chat template may change. Give all arms one evaluation, leave out rows that "
                    "repeat a prompt, and choose another folder."
                )


def check_data(
    comparison: Comparison,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    results: Sequence[Result],
) -> None:
    """Hold what the runs to come learn from (``rows``, by their ``data``) against what runs had.

    Data that only finished runs had are read too, if they are still there. Raises TOPDError where
    they have changed.
    """
    now: dict[str, str | None] = {data: rows_digest(found) for data, found in rows.items()}
    for result in results:
        recipe = comparison.arms.get(result["arm"])
        if recipe is None or "data" not in result:  # left out, or of an older version
            continue
        data = recipe.data.model_dump_json()
        if data not in now:
            now[data] = _known(recipe.data)
        if now[data] not in (None, result["data"]):
            raise TOPDError(
                f"compare: {recipe.data.path or recipe.data.task} has other rows than when "
                f"{result['arm']}, seed {result['seed']} learned from it. Bring those back, or "
                "choose another folder."
            )


def check_code(folder: Path, arms: Collection[str], results: Sequence[Result]) -> None:
    """Hold code outside this package against what it was when an arm's finished runs had it.

    ``arms`` are those with runs to come. Raises TOPDError where its file has changed.
    """
    for result in results:
        place = place_of(folder, result["arm"], result["seed"])
        now = code_of(read_run(place).get("config") or {}) if result["arm"] in arms else {}
        before = read_whole(place / "manifest.json").get("versions", {})
        for name, found in now.items():
            if before.get(name, found) != found:  # none: of an older version
                raise TOPDError(
                    f"compare: the file of {name} has changed since {result['arm']}, seed "
                    f"{result['seed']} was run with it, and the arm's other seeds are still to be "
                    "run. Bring it back, or give the arm another name."
                )


def check_start(data: DataSpec, stored: Mapping[str, Any]) -> str | None:
    """Hold what stage 1 has learned from against what ``stored`` of run.json says of it.

    Returns the digest of its rows; None if they are gone and an older version did not keep it.
    Raises TOPDError where they have changed.
    """
    before, now = (stored.get("start") or {}).get("data"), _known(data)
    if None not in (before, now) and before != now:
        raise TOPDError(
            f"compare: {data.path or data.task} has other rows than when stage 1 learned from it. "
            "Bring those back, or choose another folder."
        )
    return now or before


def _known(data: DataSpec) -> str | None:
    """The digest of data that nothing is to learn from any more; None if they are gone."""
    try:
        return rows_digest(data.load())
    except TOPDError:
        return None


def place_of(folder: Path, arm: str, seed: int) -> Path:
    """The run folder of an arm with a seed."""
    return folder / "arms" / f"{in_files(arm)}-{seed}"


def check_models(folder: Path, result: Result, results: Sequence[Result]) -> None:
    """Hold the models of a run against those of the runs before, where they are of one name.

    Raises TOPDError where weights have changed: the runs would have begun from different students.
    """
    own = dict(_models(folder, result))
    for before in results:
        for model, sha256 in _models(folder, before):
            if own.get(model, sha256) != sha256:
                raise TOPDError(
                    f"compare: the {' at '.join(model[:2])} has other weights with "
                    f"{result['arm']}, seed {result['seed']} than it had with {before['arm']}, "
                    f"seed {before['seed']}. Bring those back, or choose another folder."
                )


def _models(folder: Path, result: Result) -> Iterator[tuple[tuple[str, ...], str]]:
    """Role, path and version of a run's models, with the hash of their weights.

    What an adapter trains whole is in a student's hash, so the adapter is told too. A teacher of
    text has no weights here.
    """
    place = place_of(folder, result["arm"], result["seed"])
    recipe: dict[str, Any] = read_run(place).get("recipe") or {}
    manifest = read_whole(place / "manifest.json")
    version = manifest.get("versions", {}).get("topd", "")  # which may hash otherwise
    for role, found in manifest.get("models", {}).items():
        spec = recipe.get(role)
        if not isinstance(spec, dict) or not spec.get("path") or spec.get("text") is not None:
            continue
        if "sha256" in found:
            made_of = [spec, recipe.get("lora") if role == "student" else None, version]
            yield (role, spec["path"], json.dumps(made_of)), found["sha256"]
