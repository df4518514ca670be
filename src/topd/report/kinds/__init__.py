"""The kinds of run that have a page, in one table: what each is called, draws, says and lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from topd.report.charts import Chart, Fact
from topd.report.folder import Kind
from topd.report.headline import (
    compare_tables,
    compare_words,
    probe_words,
    repair_words,
    training_words,
)
from topd.report.kinds.evaluated import (
    evaluation_charts,
    evaluation_tables,
    evaluation_words,
    gate_charts,
    gate_tables,
    gate_words,
)
from topd.report.kinds.experiments import compare_charts, repair_charts
from topd.report.kinds.probe import probe_charts
from topd.report.kinds.training import training_charts, training_facts
from topd.report.summary import SummaryTable, summary_tables
from topd.runs.files import read_whole

Told = TypeVar("Told")


@dataclass(frozen=True)
class KindOfPage:
    """What the page of one kind of run holds; all of it follows from the folder."""

    title: str
    charts: Callable[[Path], list[Chart]]
    words: Callable[[Path], Iterable[str]]
    tables: Callable[[Path], list[SummaryTable]] = lambda _: []
    facts: Callable[[Path], list[Fact]] = lambda _: []


def _of(name: str, told: Callable[[dict[str, Any]], Told]) -> Callable[[Path], Told]:
    """What follows from the summary file of that name, if there is one."""
    return lambda folder: told(read_whole(folder / name))


PAGES: dict[Kind, KindOfPage] = {
    "training": KindOfPage("Training run", training_charts, training_words, facts=training_facts),
    "probe": KindOfPage(
        "Probe",
        probe_charts,
        _of("probe.json", probe_words),
        _of("probe.json", summary_tables),
    ),
    "repair": KindOfPage(
        "Local repair",
        repair_charts,
        _of("repair.json", repair_words),
        _of("repair.json", summary_tables),
    ),
    "compare": KindOfPage(
        "Comparison",
        compare_charts,
        _of("compare.json", compare_words),
        _of("compare.json", compare_tables),
    ),
    "evaluation": KindOfPage("Evaluation", evaluation_charts, evaluation_words, evaluation_tables),
    "gate": KindOfPage("Release gate", gate_charts, gate_words, gate_tables),
}
