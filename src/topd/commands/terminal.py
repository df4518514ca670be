"""What a command of ``topd`` prints, and how it ends. Imports nothing heavy."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from topd.errors import TOPDError

if TYPE_CHECKING:
    from topd.commands.audit import AuditResult

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
        fault: BaseException | None = error
        while fault:  # the traceback of a function of the user's
            for note in getattr(fault, "__notes__", ()):
                errors.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)
            fault = fault.__cause__
        raise typer.Exit(error.exit_code) from error


def say(line: object) -> None:
    """One line as it is, however long."""
    console.print(str(line), soft_wrap=True, markup=False, highlight=False)


def indented(words: str) -> None:
    """A paragraph below a heading; nothing, if there is none."""
    if words:
        console.print(Padding(Text(words), (0, 0, 0, 4), expand=False))


def summarise(folder: Path, name: str, show: Callable[[Console, Mapping[str, Any]], None]) -> None:
    """Say where a run is, print its summary and write its page."""
    say(f"run folder: {folder}")
    show(console, json.loads((folder / name).read_text(encoding="utf-8")))
    write_page(folder)


def write_page(folder: Path) -> None:
    """Write the page of a run that has ended and say where it is, or why there is none."""
    from topd.report import page_line

    say(page_line(folder))


def show_faults(found: AuditResult) -> None:
    """Print what an audit checked and its faults. Exit code 1 if there are any."""
    for line in found.checked:
        say(line)
    for fault in found.faults:
        errors.print(fault, style="bold red", soft_wrap=True, markup=False, highlight=False)
    if found.faults:
        raise typer.Exit(1)
    console.print("no fault found", style="green")
