"""The phases of a step: how long each took, and bars for whoever is watching."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from topd.engines import Tick, no_tick


class Phases:
    """Seconds by phase; once shown, also a bar for the run and one for the phase under way."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._bars: Progress | None = None

    def show(self, console: Console) -> None:
        """Draw bars from now on."""
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
        if self._bars:
            self._run = self._bars.add_task(name, total=steps)

    def step_done(self, step: int) -> None:
        """Move the run's bar to ``step``."""
        if self._bars:
            self._bars.update(self._run, completed=step)

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
