"""``topd eval``: a model and a JSONL file -> a table, evaluation.json and responses.jsonl."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import datasets
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from topd.data import DataSpec
from topd.engines import Tick
from topd.engines.hf import HFEngine, check_head
from topd.evaluate.answers import AnswerVerifier
from topd.evaluate.evaluation import Evaluation, Evaluator
from topd.evaluate.intervals import Interval
from topd.ledger import Ledger, manifest
from topd.models import ModelSpec, check_embedding_rows, eos_ids
from topd.rollouts import PromptEncoder, fingerprint
from topd.types import Prompt, Sampling, TOPDError

FORMATS = (
    ("prompt", "answer"),
    ("question", "answer"),  # GSM8K
    ("problem", "answer"),  # MATH-500, AIME, HMMT
    ("prompt", "solution"),
    ("problem", "solution"),  # MATH
)
RESULT, RESPONSES = "evaluation.json", "responses.jsonl"
NO_LIMIT = 1 << 40


@dataclass(frozen=True)
class Request:
    """What ``topd eval`` was asked for. ``columns`` is ``prompt=NAME,answer=NAME``, or None.

    ``chat`` None uses the chat template if the tokenizer has one. An empty ``output`` makes a
    folder of its own below runs/. Raises TOPDError for values out of range.
    """

    model: ModelSpec
    data: str
    columns: str | None = None
    samples: int = 4
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 1024
    limit: int | None = None
    batch_size: int = 16
    seed: int = 0
    chat: bool | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    output: str = ""

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TOPDError(f"{_option(name)}: {value} must be at least 1.")
        if not 0 < self.temperature < float("inf"):
            raise TOPDError(
                f"--temperature: {self.temperature} must be above 0. It is that of the samples; "
                "greedy responses are always written too."
            )
        if not 0 < self.top_p <= 1:
            raise TOPDError(f"--top-p: {self.top_p} must be above 0 and at most 1.")
        if self.seed < 0:
            raise TOPDError(f"--seed: {self.seed} must be at least 0.")
        if not isinstance(self.template_kwargs, Mapping):
            raise TOPDError(
                f"--template-kwargs: {self.template_kwargs!r} is no mapping, e.g. {{a: 1}}."
            )

    @property
    def sampling(self) -> Sampling:
        """How the samples are drawn."""
        return Sampling(self.temperature, self.top_p, 0, self.max_tokens)

    @property
    def folder(self) -> Path:
        """Where the results go."""
        name = f"{Path(self.model.path).name}-{Path(self.data).stem}"
        return Path(self.output or f"runs/eval-{name}-{datetime.now():%Y%m%d-%H%M%S}")


def run_evaluation(request: Request, console: Console) -> Path:
    """Evaluate, print the table, and return the folder. Raises TOPDError before weights are read.

    The folder holds evaluation.json (figures with intervals, settings, versions, fingerprints of
    model and data) and responses.jsonl (a line a response).
    """
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    ledger = _open(request.folder)
    rows = read_problems(request.data, request.columns, request.limit)
    tokenizer = request.model.load_tokenizer()
    check_embedding_rows("model", request.model.load_config(), tokenizer)
    chat = bool(tokenizer.chat_template) if request.chat is None else request.chat
    prompts = _encode(request, tokenizer, rows, chat)
    verifier = AnswerVerifier()
    verifier.check(rows)
    evaluator = Evaluator(
        prompts,
        rows,
        verifier,
        tokenizer,
        samples=request.samples,
        sampling=request.sampling,
        seed=request.seed,
        batch_size=request.batch_size,
    )
    found, made_of = _measure(request, evaluator, console)
    verifier.judge.close()
    settings = {**asdict(request), "model": request.model.model_dump(), "chat": chat}
    ledger.append(RESPONSES, map(asdict, found.responses))
    ledger.write(RESULT, {**found.record(), "settings": settings, **made_of})
    show(found, request, console)
    return ledger.folder


def read_problems(path: str, columns: str | None, limit: int | None) -> list[dict[str, Any]]:
    """The rows of a data set, with ``prompt`` (text) and ``answer`` columns.

    Known formats are recognised by their columns, upper case or lower.

    Raises:
        TOPDError: no such data, unknown columns, or a row without a prompt.
    """
    names = list(DataSpec(path=path, limit=1, chat=False).load()[0])
    chosen = _chosen(path, columns, names) if columns else _recognised(path, names)
    mapping = cast(dict[Any, str], chosen)
    return DataSpec(path=path, limit=limit, chat=False, columns=mapping).load()


def _recognised(path: str, names: Sequence[str]) -> dict[str, str]:
    known = {name.lower(): name for name in names}
    for prompt, answer in FORMATS:
        if prompt in known and answer in known:
            return {"prompt": known[prompt], "answer": known[answer]}
    raise TOPDError(
        f"data {path}: no known format; it has the columns {', '.join(names)}. Name the two that "
        "count: --columns prompt=NAME,answer=NAME."
    )


def _chosen(path: str, columns: str, names: Sequence[str]) -> dict[str, str]:
    pairs = [part.partition("=") for part in columns.split(",")]
    chosen = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    if chosen.keys() != {"prompt", "answer"}:
        raise TOPDError(f"--columns: {columns!r} is not of the form prompt=NAME,answer=NAME.")
    missing = [name for name in chosen.values() if name.partition(".")[0] not in names]
    if missing:
        raise TOPDError(
            f"--columns: {path} has no column {missing[0]!r}. It has {', '.join(names)}."
        )
    return chosen


def _encode(
    request: Request,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    chat: bool,
) -> list[Prompt]:
    """Prompts that leave the model room for ``max_tokens``."""
    kwargs = dict(request.template_kwargs)
    encoder = PromptEncoder(tokenizer, tokenizer, max_length=NO_LIMIT, template_kwargs=kwargs)
    prompts = encoder.encode(_messages(row) if chat else row for row in rows)
    config = request.model.load_config().get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(len(prompt.student) for prompt in prompts)
    if positions is not None and longest + request.max_tokens > positions:
        raise TOPDError(
            f"--max-tokens: the longest prompt has {longest} tokens, with {request.max_tokens} "
            f"more that exceeds the model's {positions} positions. Lower it."
        )
    return prompts


def _messages(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt = row["prompt"]
    return {"prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}


def _measure(
    request: Request, evaluator: Evaluator, console: Console
) -> tuple[Evaluation, dict[str, Any]]:
    """The evaluation, and what it was made of: model, data, versions."""
    device = PartialState().device
    model = request.model.load_model().eval().to(device)
    check_head("model", model)
    engine = HFEngine(model, eos_ids=eos_ids(model, evaluator.tokenizer))
    made_of = manifest(
        models={"model": model},
        data=fingerprint(evaluator.prompts),
        seed=request.seed,
        device=device,
    )
    made_of["versions"]["math-verify"] = version("math-verify")
    made_of["references"] = _references(evaluator.rows)
    with _bar(console, evaluator.count) as tick:
        return evaluator(engine, tick=tick), made_of


def _references(rows: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of the reference answers, in order."""
    return hashlib.sha256(json.dumps([str(row["answer"]) for row in rows]).encode()).hexdigest()


def _open(folder: Path) -> Ledger:
    if any((folder / name).exists() for name in (RESULT, RESPONSES)):
        raise TOPDError(f"--output: {folder} already holds an evaluation. Choose another folder.")
    return Ledger(folder)


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Tick]:
    columns = (TextColumn("responses"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("responses", total=total)
        yield lambda: progress.advance(task)


def show(found: Evaluation, request: Request, console: Console) -> None:
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
        f"{request.temperature:g}, top-p {request.top_p:g}, seed {request.seed}; intervals over "
        "problems",
        highlight=False,
    )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
