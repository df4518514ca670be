"""``topd eval``: a model and a file of problems -> a table, evaluation.json and responses.jsonl."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging

from topd.engines import Tick
from topd.engines.decode_check import check_decoding
from topd.engines.hf import HFEngine
from topd.errors import TOPDError
from topd.evaluate.evaluation import Evaluation, Evaluator
from topd.evaluate.spec import EvaluationSpec
from topd.inputs.fingerprints import fingerprint
from topd.inputs.heads import check_head
from topd.inputs.models import ModelSpec, check_embedding_rows, eos_ids
from topd.inputs.vocabulary import shared_ids
from topd.report import page_line
from topd.runs.folder import RunFolder, manifest
from topd.runs.lock import one_writer
from topd.statistics import Interval

RESULT, RESPONSES = "evaluation.json", "responses.jsonl"


def spec_of(path: str, columns: str, **options: Any) -> EvaluationSpec:
    """The words of the command line, checked. ``columns`` is ``prompt=NAME,answer=NAME`` or empty.

    Raises:
        TOPDError: an option is out of range; the message names it.
    """
    pairs = [part.partition("=") for part in columns.split(",") if columns]
    chosen = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    try:
        return EvaluationSpec.model_validate({"path": path, "columns": chosen, **options})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        given = columns if name == "columns" else first["input"]
        raise TOPDError(f"--{name}: {first['msg']} (given: {given!r}).") from error


def run_evaluation(
    model: ModelSpec, spec: EvaluationSpec, template_kwargs: Any, output: str, console: Console
) -> Path:
    """Evaluate, print the table, and return the folder.

    The folder holds evaluation.json (figures with intervals, settings, versions, fingerprints of
    model and data) and responses.jsonl (a line a response).

    Args:
        model: what to evaluate.
        spec: on what.
        template_kwargs: given to the chat template.
        output: the folder; empty: one of its own below runs/.
        console: where table and progress go.

    Raises:
        TOPDError: bad input, before any weight is read.
    """
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not isinstance(template_kwargs, Mapping):
        raise TOPDError(f"--template-kwargs: {template_kwargs!r} is not a mapping, e.g. {{a: 1}}.")
    model = of_run(model)
    folder = Path(output or _folder(model, spec))
    with one_writer(folder):
        found = _evaluate_into(_open(folder), model, spec, template_kwargs, console)
    show(found, spec, console)
    console.print(page_line(folder), soft_wrap=True, markup=False, highlight=False)
    return folder


def _evaluate_into(
    run: RunFolder, model: ModelSpec, spec: EvaluationSpec, template_kwargs: Any, console: Console
) -> Evaluation:
    rows = spec.load()
    tokenizer, config = model.load_tokenizer(), model.load_config()
    check_embedding_rows("model", config, tokenizer)
    evaluator = spec.evaluator(rows, tokenizer, config, template_kwargs=template_kwargs)
    references = _references(rows)
    (found,), made_of = measure(model, [evaluator], console)
    settings = {
        "model": model.model_dump(),
        "data": spec.model_dump(),
        "template_kwargs": dict(template_kwargs),
    }
    run.append(RESPONSES, (response.record() for response in found.responses))
    run.write(RESULT, {**found.record(), "settings": settings, **made_of, "references": references})
    return found


def measure(
    spec: ModelSpec, evaluators: Sequence[Evaluator], console: Console
) -> tuple[list[Evaluation], dict[str, Any]]:
    """A model's evaluations, and what they were made of: model, data of the first, versions."""
    device = PartialState().device
    model = spec.load_model().eval().to(device)
    check_head("model", model)
    tokenizer = evaluators[0].tokenizer
    allowed = shared_ids(tokenizer, tokenizer)
    engine = HFEngine(model, eos_ids=eos_ids(model, tokenizer), allowed=allowed)
    check_decoding(engine)
    made_of = manifest(
        models={"model": model},
        data=fingerprint(evaluators[0].prompts),
        seed=evaluators[0].seed,
        device=device,
    )
    made_of["versions"]["math-verify"] = version("math-verify")
    with _bar(console, sum(evaluator.count for evaluator in evaluators)) as tick:
        return [evaluator(engine, tick=tick) for evaluator in evaluators], made_of


def of_run(model: ModelSpec) -> ModelSpec:
    """The student of a run, if the path is a run folder."""
    folder = Path(model.path).expanduser()
    if (folder / "config.json").exists() or not (folder / "student" / "config.json").exists():
        return model
    return model.model_copy(update={"path": str(folder / "student")})


def _references(rows: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of the references in order: the answers, or where a family checks, its solutions."""
    known = [str(row["answer"] if "answer" in row else row["solution"]) for row in rows]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _folder(model: ModelSpec, spec: EvaluationSpec) -> str:
    place = Path(model.path)
    own = place.parent.name if place.name == "student" and place.parent.name else place.name
    name = f"{own}-{Path(spec.path).stem}"
    return f"runs/eval-{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _open(folder: Path) -> RunFolder:
    if any((folder / name).exists() for name in (RESULT, RESPONSES)):
        raise TOPDError(f"--output: {folder} already holds an evaluation. Choose another folder.")
    return RunFolder(folder)


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Tick]:
    columns = (TextColumn("responses"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("responses", total=total)
        yield lambda: progress.advance(task)


def show(found: Evaluation, spec: EvaluationSpec, console: Console) -> None:
    """Print the figures with their intervals, and what they are of. Fits 80 columns."""
    table = Table()
    for title in ("", "mean", "95 % interval"):
        table.add_column(title, justify="right" if title else "left")
    percent, tokens = "{:.1%}".format, "{:.1f}".format
    lines: list[tuple[str, Interval, Callable[[float], str]]] = [
        ("greedy accuracy", found.greedy, percent),
        *((f"pass@{k}", interval, percent) for k, interval in found.pass_at.items()),
        ("greedy length, tokens", found.greedy_length, tokens),
        ("sampled length, tokens", found.mean_length, tokens),
        ("greedy cut off", found.greedy_truncated, percent),
        ("sampled cut off", found.truncated, percent),
    ]
    for name, interval, write in lines:
        table.add_row(name, write(interval.mean), f"{write(interval.low)} - {write(interval.high)}")
    console.print(table)
    console.print(
        f"{found.problems} problems, {found.samples} samples each at temperature "
        f"{spec.temperature:g}, top-p {spec.top_p:g}, seed {spec.seed}; intervals over problems",
        highlight=False,
    )
