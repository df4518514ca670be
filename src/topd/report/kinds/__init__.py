"""The kinds of run that have a page, in one table: what each is called, draws, says and lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class KindOfPage:
    """What the page of one kind of run holds. Charts, sentences and tables follow from its folder
    and, where there is one, its summary file."""

    title: str
    charts: Callable[[Path], list[Chart]]
    words: Callable[[Path, Summary], Iterable[str]]
    tables: Callable[[Path, Summary], list[SummaryTable]]
    facts: Callable[[Path], list[Fact]] = lambda _: []


PAGES: dict[Kind, KindOfPage] = {
    "training": KindOfPage(
        "Training run",
        training_charts,
        lambda folder, _: training_words(folder),
        lambda *_: [],
        training_facts,
    ),
    "probe": KindOfPage(
        "Probe",
        probe_charts,
        lambda _, summary: probe_words(summary),
        lambda _, summary: summary_tables(summary),
    ),
    "repair": KindOfPage(
        "Local repair",
        repair_charts,
        lambda _, summary: repair_words(summary),
        lambda _, summary: summary_tables(summary),
    ),
    "compare": KindOfPage(
        "Comparison",
        compare_charts,
        lambda _, summary: compare_words(summary),
        lambda _, summary: compare_tables(summary),
    ),
    "evaluation": KindOfPage(
        "Evaluation",
        evaluation_charts,
        lambda folder, _: evaluation_words(folder),
        lambda folder, _: evaluation_tables(folder),
    ),
    "gate": KindOfPage(
        "Release gate",
        gate_charts,
        lambda folder, _: gate_words(folder),
        lambda folder, _: gate_tables(folder),
    ),
}
