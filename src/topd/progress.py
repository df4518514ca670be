"""The phases of a step: how long each took, and bars for whoever is watching."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from topd.engines import Tick, no_tick


class Phases:
    """Seconds by phase; with ``show``, a bar for the run and one for the phase under way."""

    def __init__(self, *, show: bool = False) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            disable=not show,
            transient=True,
        )
        self._run = self._bars.add_task("steps", total=None, visible=False)

    @contextmanager
    def running(self, steps: int) -> Iterator[None]:
        """Show the bars while a run of so many updates goes on."""
        self._bars.update(self._run, total=steps, completed=0, visible=True)
        with self._bars:
            yield

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Tick]:
        """Time a phase; the tick that it yields moves its bar by one."""
        started = time.perf_counter()
        if self._bars.disable:
            tick, task = no_tick, None
        else:
            task = self._bars.add_task(name, total=total)
            tick = lambda: self._bars.advance(task)  # noqa: E731
        try:
            yield tick
        finally:
            self._seconds[name] += time.perf_counter() - started
            if task is not None:
                self._bars.remove_task(task)

    def step_done(self, step: int) -> None:
        """Move the run's bar to ``step``."""
        self._bars.update(self._run, completed=step)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds
