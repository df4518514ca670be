"""The phases of a step: how long each took, and bars, or short lines, for whoever is watching."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from topd.engines import Tick, no_tick

EVERY = 30.0  # seconds between two lines of a count, where there is no terminal
SHOWN = (  # of a log: its name in the line, key, and form
    ("loss", "loss", "{:.4g}"),
    ("reverse KL", "reverse_kl", "{:.3g}"),
    ("forward KL", "forward_kl", "{:.3g}"),
    ("JSD", "jsd", "{:.3g}"),
    ("forks", "topd/real_divergent_points", "{:.3g}"),
    ("", "completions/mean_length", "{:.0f} tokens"),
)


class Phases:
    """Seconds by phase; once shown, also a bar for the run and one for the phase under way.

    Where there is no terminal, counts are lines, at most one every ``EVERY`` seconds.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._bars: Progress | None = None
        self._run: TaskID | None = None
        self._lines: Console | None = None

    def show(self, console: Console, *, bars: bool = True) -> None:
        """Draw bars from now on; lines where no one could see a bar move, or without ``bars``."""
        if not (bars and moves(console)):
            self._lines = console
            return
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._bars.start()

    def start(self, steps: int, name: str = "updates") -> None:
        """Begin a run of so many updates, or of what ``name`` says."""
        self._name, self._total = name, steps
        self._begun = self._told = time.perf_counter()
        if self._bars:
            if self._run is not None:
                self._bars.remove_task(self._run)
            self._run = self._bars.add_task(name, total=steps)

    def step_done(self, step: int) -> None:
        """Move the run's bar to ``step``."""
        if self._bars and self._run is not None:
            self._bars.update(self._run, completed=step)
        now = time.perf_counter()
        if self._lines and (now - self._told >= EVERY or step == self._total):
            self._told = now
            words = f"{self._name} {step:,}/{self._total:,}  {span(now - self._begun)}"
            say(self._lines, words)

    def stop(self) -> None:
        """Take the bars away."""
        if self._bars:
            self._bars.stop()

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Tick]:
        """Time a phase; the tick that it yields moves its bar by one."""
        bars, started, tick = self._bars, time.perf_counter(), no_tick
        if bars:
            task = bars.add_task(name, total=total)
            tick = lambda: bars.advance(task)  # noqa: E731
        try:
            yield tick
        finally:
            self._seconds[name] += time.perf_counter() - started
            if bars:
                bars.remove_task(task)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


def moves(console: Console) -> bool:
    """Whether a bar can be seen to move. A notebook or a CI asks for colours where it cannot."""
    return console.is_terminal and console.file.isatty()


def say(console: Console, words: str) -> None:
    """One line, as it is."""
    console.print(words, markup=False, highlight=False, soft_wrap=True)


def log_line(log: Mapping[str, float], step: int, steps: int, seconds: float, left: float) -> str:
    """A log as one short line.

    Args:
        log: what the trainer logged.
        step: updates done, of ``steps``.
        seconds: an update took.
        left: seconds that the rest will take, at that pace.

    >>> log_line({"loss": 4.3215, "reverse_kl": 3.9}, 12, 400, 1.84, 713.9)
    'update 12/400  loss 4.322  reverse KL 3.9  1.8 s  eta 12 min'
    >>> log_line({"topd/candidates": 0, "topd/real_divergent_points": 0}, 2, 2, 1.84, 0)
    'update 2/2  1.8 s'
    """
    hidden = () if log.get("topd/candidates", 1) else ("forks",)  # nothing was looked at
    shown = [
        f"{name} {form.format(log[key])}".strip()
        for name, key, form in SHOWN
        if key in log and name not in hidden
    ]
    eta = [f"eta {span(left)}"] if step < steps else []
    return "  ".join([f"update {step:,}/{steps:,}", *shown, span(seconds), *eta])


def span(seconds: float) -> str:
    """Seconds, briefly.

    >>> span(1.84), span(89.6), span(714), span(9000)
    ('1.8 s', '90 s', '12 min', '2.5 h')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def silence_others() -> None:
    """Leave out two warnings of other libraries that say nothing about a run.

    That a CPU has no pinned memory, and that peft asks transformers for a name that will go.
    """
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accel")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
