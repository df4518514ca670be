"""``topd eval``: a model and a file of problems -> a table, evaluation.json and responses.jsonl."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import datasets
from accelerate import PartialState
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils import logging

from topd.commands.session import until_stopped
from topd.engines import Tick
from topd.engines.decode_check import check_decoding
from topd.engines.hf import HFEngine
from topd.errors import TOPDError
from topd.evaluate.evaluation import Evaluation, Evaluator, Keep, Response
from topd.evaluate.spec import EvaluationSpec
from topd.inputs.models import ModelSpec, eos_ids
from topd.inputs.models.adapters import student_of_run
from topd.inputs.models.fingerprints import fingerprint
from topd.inputs.models.heads import check_head
from topd.inputs.models.vocabulary import check_embedding_rows, shared_ids
from topd.inputs.rows import DataSpec
from topd.report import page_line
from topd.report.text import counted
from topd.runs.files import as_json, digest, kept_lines
from topd.runs.folder import BEGUN, RunFolder, manifest
from topd.runs.lock import one_writer
from topd.runs.records import read_run
from topd.runs.verified import not_of_the_end
from topd.statistics import Interval
from topd.training.progress import Phases, say

RESULT, RESPONSES = "evaluation.json", "responses.jsonl"
Spec = TypeVar("Spec", bound=EvaluationSpec)


def spec_of(path: str, columns: str, **options: Any) -> EvaluationSpec:
    """The words of the command line, checked. ``columns`` is ``prompt=NAME,answer=NAME`` or empty.

    Raises TOPDError: an option is out of range; the message names it.
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


def run_evaluation(model: ModelSpec, spec: EvaluationSpec, output: str, console: Console) -> Path:
    """Evaluate, print the table, and return the folder, by default one of its own below runs/.

    The folder holds evaluation.json (figures with intervals, settings, versions, fingerprints of
    model and data) and responses.jsonl (a line a response). An evaluation that was stopped
    continues in its folder.

    Raises:
        TOPDError: bad input, before any weight is read; or the folder holds another evaluation.
        StoppedError: it was stopped.
    """
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    model = of_run(model)
    spec, said = as_trained(spec.with_split(), [model])
    for line in said:
        say(console, line)
    folder = Path(output or _folder(model, spec)).expanduser()  # --output=~/x, of any shell
    with evaluation_folder("eval", folder, RESULT, [RESPONSES], console) as run:
        found = _evaluate_into(run, model, spec, console)
    show(found, spec, console)
    say(console, page_line(folder))
    return folder


def _evaluate_into(
    run: RunFolder, model: ModelSpec, spec: EvaluationSpec, console: Console
) -> Evaluation:
    rows = spec.load()
    tokenizer, config = model.load_tokenizer(), model.load_config()
    check_embedding_rows("model", config, tokenizer)
    evaluator = spec.evaluator(rows, tokenizer, config)
    # the answers, or where a family checks, its solutions
    known = [str(row["answer"] if "answer" in row else row["solution"]) for row in rows]
    settings = {"model": model.model_dump(), "data": spec.model_dump()}
    (found,), made_of = measure(model, {RESPONSES: (spec, evaluator)}, run, console)
    record = {**found.record(), "settings": settings, **made_of}
    record["references"] = digest(json.dumps(known).encode())
    finish(run, RESULT, record, {RESPONSES: found})
    return found


@contextmanager
def evaluation_folder(
    command: str, folder: Path, result: str, names: Collection[str], console: Console
) -> Iterator[RunFolder]:
    """The folder of an evaluation or a gate that is new, or that was stopped and continues.

    Nobody else writes in it; an end leaves ``result``. Of one that was stopped while it ended the
    files of responses, ``names``, are removed: what they hold is in those of :func:`begun` as well.

    Raises:
        TOPDError: the folder holds a result, or something else.
        StoppedError: it was stopped.
    """
    with one_writer(folder):
        if (folder / result).exists():
            raise TOPDError(f"--output: {folder} already holds {result}. Choose another folder.")
        for name in names:
            if (folder / begun(name)).exists():
                (folder / name).unlink(missing_ok=True)
        run = RunFolder(folder, begun=[*map(begun, names)])
        with until_stopped(command, folder, console):
            yield run


def finish(
    run: RunFolder, result: str, record: Mapping[str, Any], found: Mapping[str, Evaluation]
) -> None:
    """Write what an evaluation or a gate ends with: all responses in order by file, the result."""
    for name, evaluation in found.items():
        run.append(name, (response.record() for response in evaluation.responses))
    run.write(result, record)
    for name in found:
        (run.folder / begun(name)).unlink()


def measure(
    spec: ModelSpec,
    asked: Mapping[str, tuple[EvaluationSpec, Evaluator]],
    run: RunFolder,
    console: Console,
) -> tuple[list[Evaluation], dict[str, Any]]:
    """A model's evaluations, and what they were made of: model, data of the first, versions.

    ``asked`` are evaluations by the file of their responses. Until all are there they are kept in
    its :func:`begun` file, from which an evaluation that was stopped continues.
    """
    evaluators = [evaluator for _, evaluator in asked.values()]
    device = PartialState().device
    model = spec.load_model().eval().to(device)
    check_head("model", model)
    engine = writer_of(model, evaluators[0])
    made_of = manifest(
        models={"model": model},
        data=fingerprint(evaluators[0].prompts),
        seed=evaluators[0].seed,
        device=device,
    )
    made_of["versions"]["math-verify"] = version("math-verify")
    with _counted(console, sum(evaluator.count for evaluator in evaluators)) as tick:
        found = []
        for name, (settings, evaluator) in asked.items():
            about = _identity(settings, evaluator, made_of)
            done, keep = _kept(run, begun(name), about)
            found.append(evaluator(engine, tick=tick, done=done, keep=keep))
    return found, made_of


def writer_of(model: PreTrainedModel, evaluator: Evaluator, **options: Any) -> HFEngine:
    """What writes a model's responses, after a trial. Raises TOPDError as that does."""
    tokenizer = evaluator.tokenizer
    allowed = shared_ids(tokenizer, tokenizer)
    engine = HFEngine(model, eos_ids=eos_ids(model, tokenizer), allowed=allowed, **options)
    check_decoding(engine)
    return engine


def begun(name: str) -> str:
    """Of a file of responses, where they are until all are there."""
    return BEGUN.format(name.removesuffix(".jsonl"))


def _identity(
    spec: EvaluationSpec, evaluator: Evaluator, made_of: Mapping[str, Any]
) -> dict[str, Any]:
    """All that responses and their verdicts depend on; wherever model and data are now."""
    free = {"path", "name", "batch_size", "samples"}
    models: Mapping[str, Mapping[str, Any]] = made_of["models"]
    return {
        "settings": spec.model_dump(mode="json", exclude=free),
        "models": {n: {k: v for k, v in m.items() if k != "name"} for n, m in models.items()},
        "data": fingerprint(evaluator.prompts),
        "rows": digest(json.dumps([*evaluator.rows], default=str).encode()),
        "versions": {name: made_of["versions"][name] for name in ("topd", "math-verify")},
    }


def _kept(run: RunFolder, name: str, about: Mapping[str, Any]) -> tuple[list[Response], Keep]:
    """Responses that are there, and what adds to them. Raises TOPDError for those of another."""
    about, there = as_json(about), kept_lines(run.folder / name)
    if not there:
        run.append(name, [about])
    elif there[0] != about:
        parts = [part for part in about if there[0].get(part) != about[part]]
        raise TOPDError(
            f"--output: {run.folder} holds an evaluation that was stopped, with other "
            f"{', '.join(parts)}. Choose another folder, or continue with the same."
        )
    done = [Response(**{**record, "ids": tuple(record["ids"])}) for record in there[1:]]
    return done, lambda batch: run.append(name, map(asdict, batch))


def of_run(model: ModelSpec) -> ModelSpec:
    """The student of a run, if the path is a run folder."""
    student = student_of_run(Path(model.path).expanduser())
    return model.model_copy(update={"path": str(student)}) if student else model


def as_trained(spec: Spec, models: Sequence[ModelSpec]) -> tuple[Spec, list[str]]:
    """Prompts as a run wrote them whose student is evaluated, where the spec does not say how.

    Of several models that are students of runs the first one counts. Returns the spec, and lines
    that say what was taken from a run, and where a run had it otherwise.
    """
    known = {str(Path(m.path).parent): how for m in models if (how := _trained_with(m))}
    said = []
    if known:
        run, own = next(iter(known.items()))
        asked, spec = spec, spec.as_trained(**own)
        taken = {n: getattr(spec, n) for n in own if getattr(spec, n) != getattr(asked, n)}
        if "chat" in taken and all(_without_template(model) for model in models):
            del taken["chat"]  # they could not be written otherwise
        if any(value != {} for value in taken.values()):
            said.append(f"prompts are written as in the training of {run}: {_shown(taken)}")
    here = {"chat": spec.chat is not False, "chat_template_kwargs": spec.chat_template_kwargs or {}}
    for run, trained in known.items():
        other = {name: value for name, value in trained.items() if here[name] != value}
        if other:
            now = _shown({name: here[name] for name in other})
            said.append(f"warning: {run} was trained with {_shown(other)}, prompts here have {now}")
    for place in dict.fromkeys(Path(m.path).expanduser() for m in models):
        said += not_of_the_end(place)
    for run, stored in {str(Path(m.path).parent): _run_of(m) for m in models}.items():
        environment = (stored.get("config") or {}).get("environment")
        if environment is not None:
            said.append(
                f"warning: {run} was trained with environment: {environment}; here a student has "
                "one turn and gets no reply"
            )
    return spec, said


def _without_template(model: ModelSpec) -> bool:
    with suppress(TOPDError):
        return not model.load_tokenizer().chat_template
    return False


def _run_of(model: ModelSpec) -> dict[str, Any]:
    """run.json of the run that a student or a checkpoint is of; empty if it is of none."""
    place = Path(model.path).expanduser()
    of_training = place.name == "student" or place.name.startswith("checkpoint-")
    return read_run(place.parent) if of_training else {}


def _trained_with(model: ModelSpec) -> dict[str, Any]:
    """How the run that a student or a checkpoint is of wrote prompts; empty if it is of none."""
    place, stored = Path(model.path).expanduser(), _run_of(model)
    recorded = (stored.get("recipe") or {}).get("data")
    if not recorded:  # as of a trainer made in Python
        return {}
    try:
        data = DataSpec.recorded(recorded)
    except ValidationError as error:
        raise TOPDError(
            f"{place.parent / 'run.json'}: its data cannot be read ({error.errors()[0]['msg']}). "
            "Copy the model to another folder to evaluate it by itself."
        ) from error
    kwargs = (stored.get("config") or {}).get("chat_template_kwargs") or {}
    chat = data.makes_messages
    with suppress(TOPDError):  # data that is no longer there
        chat = data.has_messages()
    return {"chat": chat, "chat_template_kwargs": kwargs}


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {json.dumps(value)}" for name, value in values.items())


def _folder(model: ModelSpec, spec: EvaluationSpec) -> str:
    place = Path(model.path)
    own = place.parent.name if place.name == "student" and place.parent.name else place.name
    name = f"{own}-{Path(spec.path).stem}"
    return f"runs/eval-{name}-{datetime.now():%Y%m%d-%H%M%S}"


@contextmanager
def _counted(console: Console, total: int) -> Iterator[Tick]:
    """Show how many responses are there: a bar, or now and then a line."""
    phases, done = Phases(), itertools.count(1)
    phases.show(console)
    phases.start(total, "responses")
    try:
        yield lambda: phases.step_done(next(done))
    finally:
        phases.stop()


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
    rows = f" ({counted(found.rows, 'row')})" if found.rows > found.problems else ""
    drawn = counted(found.samples, "sample")
    console.print(
        f"{counted(found.problems, 'problem')}{rows}, {drawn} each at temperature "
        f"{spec.temperature:g}, top-p {spec.top_p:g}, seed {spec.seed}; intervals over problems",
        highlight=False,
    )
