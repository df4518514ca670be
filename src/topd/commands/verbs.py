"""What each command of ``topd`` does: refuse early, import what is heavy, run, and show.

A fault ends with one message and its exit code. Nothing here imports torch before the checks of
:mod:`topd.commands.early` have passed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from topd.commands.early import check_data, check_early, check_model
from topd.errors import TOPDError
from topd.runs.files import check_is_folder
from topd.runs.settings import Setting, is_current, known, matching

if TYPE_CHECKING:
    from topd.commands.audit import AuditResult

Trusted: TypeAlias = tuple[bool, Sequence[str], Sequence[str], str | None]  # fields of Trust

RECOMMENDED = (
    "Start with opd, the default: after stage 1 (topd warmstart) if the teacher may write answers. "
    "Take first_fork where it may write some tokens and greedy accuracy counts: "
    "docs/which-method.md has the sizes."
)
console = Console()
errors = Console(stderr=True)


@contextmanager
def faults() -> Iterator[None]:
    """A fault ends with one message and its exit code: 2 for bad input, else see StoppedError."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # one set of bars, ours
    try:
        yield
    except TOPDError as error:
        errors.print(
            f"error: {error}", style="bold red", markup=False, highlight=False,
            overflow="ignore", crop=False,  # a long path stays in one piece
        )  # fmt: skip
        raise typer.Exit(error.exit_code) from error


def say(line: object) -> None:
    """One line as it is, however long."""
    console.print(str(line), soft_wrap=True, markup=False, highlight=False)


def methods() -> None:
    """Print every method, with what it needs."""
    with faults():
        console.print(RECOMMENDED, highlight=False)
        for name, needs, words in known().methods:
            console.print(f"[bold]{name}[/bold]", highlight=False)
            _indented(words)
            _indented(needs)


def settings(word: str) -> None:
    """Print our own settings, or all that have a word in them."""
    with faults():
        rows: Iterable[Setting] = known().settings
        if not is_current():  # of another transformers than the one that is installed
            from topd.commands.settings import settings

            rows = settings()
        for name, default, words, _ in matching(word, rows):
            line = f"[bold]{escape(name)}[/bold] = {escape(default)}"
            console.print(line, highlight=False, soft_wrap=True)
            _indented(words)


def _indented(words: str) -> None:
    """A paragraph below a heading; nothing, if there is none."""
    if words:
        console.print(Padding(Text(words), (0, 0, 0, 4), expand=False))


def import_config(config: Path, output: Path | None) -> None:
    """Print what becomes of every key, and the recipe; write it if it is wanted."""
    with faults():
        from topd.commands.importer import import_file
        from topd.commands.recipe import read_recipe

        found = import_file(config)
        for line in found.lines:
            names = f" -> {', '.join(line.names)}" if line.names else ""
            note = f": {line.note}" if line.note else ""
            say(f"{line.outcome:<10}  {line.key} = {line.value}{names}{note}")
        text = found.text()
        if output is None:
            say(f"\n{text}")
        elif output.exists():
            raise TOPDError(f"--output: {output} exists. Name another file.")
        try:  # what trains may have a GPU that this machine lacks
            read_recipe(None, {**found.recipe, "use_cpu": True, "tf32": None})
        except TOPDError as error:
            raise TOPDError(f"{config}: its recipe cannot be used: {error}") from error
        if output is None:
            return
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise TOPDError(f"--output: {output} cannot be written ({error.strerror}).") from error
        say(f"{output}: read it, then: topd train {output}")


def train(recipe: Path, words: list[str], quiet: bool, *, warmstart: bool = False) -> None:
    """Run a recipe; on the first rank print its updates and write its page."""
    with faults():
        check_early(recipe, words, warmstart=warmstart)
        from topd.commands.tables import show_run
        from topd.commands.train import run_recipe
        from topd.distributed import end_ranks, rank

        folder = run_recipe(recipe, words, quiet=quiet, warmstart=warmstart)
        number = rank()
        end_ranks()
    if number > 0:
        return
    show_run(console, folder)
    _page(folder)
    say(f"run folder: {folder}")


def probe(recipe: Path, words: list[str], quiet: bool) -> None:
    """Probe the pair of a recipe, print the summary and write the page."""
    with faults():
        check_early(recipe, words, config="ProbeConfig")
        from topd.commands.probe import run_probe
        from topd.commands.tables import show_probe

        folder = run_probe(recipe, words, console=_bars(quiet))
    _summarise(folder, "probe.json", show_probe)


def repair(recipe: Path, words: list[str], quiet: bool) -> None:
    """Repair the forks of a recipe's pair, print the summary and write the page."""
    with faults():
        check_early(recipe, words, config="RepairConfig")
        from topd.commands.repair import run_repair
        from topd.commands.tables import show_repair

        folder = run_repair(recipe, words, console=_bars(quiet))
    _summarise(folder, "repair.json", show_repair)


def compare(recipe: Path, words: list[str], quiet: bool) -> None:
    """Run every arm of a recipe with every seed, print the summary and write the page."""
    with faults():
        check_early(recipe, words, compare=True)
        from topd.commands.compare import run_compare
        from topd.commands.tables import show_compare

        folder = run_compare(recipe, words, console=_bars(quiet))
    _summarise(folder, "compare.json", show_compare)


def _bars(quiet: bool) -> Console | None:
    return None if quiet else console


def _summarise(folder: Path, name: str, show: Callable[[Console, Mapping[str, Any]], None]) -> None:
    say(f"run folder: {folder}")
    show(console, json.loads((folder / name).read_text(encoding="utf-8")))
    _page(folder)


def _page(folder: Path) -> None:
    """Write the page of a run that has ended and say where it is, or why there is none."""
    from topd.report import page_line

    say(page_line(folder))


def report(folder: Path, *, rollouts: int = 1000) -> None:
    """Write the page of a run and say where it is."""
    with faults():
        check_is_folder(folder)
        from topd.report import write_report

        page = write_report(folder, rollouts=rollouts)
    say(f"report: {page}")


def watch(folder: Path, *, rollouts: int = 1000) -> None:
    """Have the page of a run follow it until it ends, or until Ctrl-C."""
    with faults():
        check_is_folder(folder)
        from topd.report.follow import follow

        try:
            follow(folder, rollouts=rollouts, say=say)
        except KeyboardInterrupt:
            say("no longer watching; the run continues. The page stays as it is.")


def figures(folder: Path, output: Path | None, form: Literal["svg", "png", "pdf"]) -> None:
    """Write the figures of a run as files and say where they are."""
    with faults():
        from topd.report.paper import write_figures

        paths = write_figures(folder, output or folder / "figures", format=form)
    for path in paths:
        say(path)


def show(folder: Path, rollout: int) -> None:
    """Print a rollout and its forks."""
    with faults():
        from topd.report.terminal import show as show_rollout

        show_rollout(folder, rollout, console)


def evaluate(
    model: Mapping[str, Any],
    data: str,
    columns: str,
    output: str,
    **options: Any,
) -> None:
    """Evaluate a model, the fields of a ModelSpec, with the options of an EvaluationSpec."""
    with faults():
        check_model(model["path"])
        check_data(data)
        from topd.commands.evaluate import run_evaluation, spec_of
        from topd.commands.keys import parse_value
        from topd.inputs.models import ModelSpec

        kwargs = options["chat_template_kwargs"]
        if kwargs is not None:
            options["chat_template_kwargs"] = parse_value(kwargs)
        spec = spec_of(data, columns, **options)
        folder = run_evaluation(ModelSpec(**model), spec, output, console)
    say(f"results: {folder}")


def gate(base: Mapping[str, Any], candidate: Mapping[str, Any], suite: Path, output: str) -> None:
    """Compare two models, each the fields of a ModelSpec. Exit code 1 on a regression."""
    with faults():
        from topd.commands.keys import read_mapping

        read_mapping(suite, "problems: PATH")
        for model in (base, candidate):
            check_model(model["path"])
        from topd.commands.gate import run_gate
        from topd.inputs.models import ModelSpec

        specs = ModelSpec(**base), ModelSpec(**candidate)
        good = run_gate(*specs, suite, output=output, console=console)
    if not good:
        raise typer.Exit(1)


def audit(run: Path, trust: Trusted, *, updates: int, seed: int | None, tolerance: float) -> None:
    """Audit a run folder. Exit code 1 if it has faults."""
    with faults():
        check_is_folder(run)
        from topd.commands.audit import Trust, audit_run

        allowed = Trust(*trust)
        found = audit_run(run, updates=updates, seed=seed, tolerance=tolerance, trust=allowed)
    _show_faults(found)


def replay(run: Path, trust: Trusted, *, step: int, tolerance: float) -> None:
    """Repeat an update of a run. Exit code 1 if it differs."""
    with faults():
        check_is_folder(run)
        from topd.commands.audit import Trust, replay_step

        found = replay_step(run, step, tolerance=tolerance, trust=Trust(*trust))
    _show_faults(found)


def _show_faults(found: AuditResult) -> None:
    for line in found.checked:
        say(line)
    for fault in found.faults:
        errors.print(fault, style="bold red", soft_wrap=True, markup=False, highlight=False)
    if found.faults:
        raise typer.Exit(1)
    console.print("no fault found", style="green")


def serve(
    role: Literal["teacher", "student"],
    model: str,
    extra: Sequence[str],
    host: str,
    port: int,
    python: str,
    patience: float,
) -> None:
    """Run the servers of a role, and print the part of a recipe that uses them once they answer."""
    from topd.engines.servers.serve import run_servers

    with faults():
        run_servers(
            ("completions", "pooling") if role == "teacher" else ("rollouts",),
            model,
            extra,
            host=host,
            port=port,
            python=python or sys.executable,
            patience=patience,
            ready=lambda lines: print(f"{role}:\n  path: {model}\n{lines}", flush=True),
        )
