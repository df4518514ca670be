"""Figures of a run folder as files for a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl

from topd.errors import TOPDError
from topd.report.charts import figure_of
from topd.report.folder import kind_of
from topd.report.kinds import PAGES

Format = Literal["svg", "png", "pdf"]
FONTS: dict[Any, Any] = {
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "savefig.dpi": 300,
}  # as journals ask for
# the same figure is the same file, whenever it is made
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}


def write_figures(folder: Path, output: Path, *, format: Format = "pdf") -> list[Path]:
    """Write every figure of a run folder to ``output``, and return the paths.

    Each has the name that it has on the page. 5.6 x 2.9 inches, or higher; PNG at 300 dots an
    inch; fonts embedded. Raises TOPDError: no run, nothing to draw, or a folder that cannot be
    written.
    """
    charts = PAGES[kind_of(folder)].charts(folder)
    if not charts:
        raise TOPDError(f"run folder {folder}: has no numbers to draw yet.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        paths = [output / f"{chart.name}.{format}" for chart in charts]
        for chart, path in zip(charts, paths, strict=True):
            figure = figure_of(chart)
            with mpl.rc_context({**FONTS, "svg.hashsalt": chart.name}):
                figure.savefig(path, format=format, metadata=UNDATED[format])
    except OSError as error:
        raise TOPDError(f"--output: {output} cannot be written ({error.strerror}).") from error
    return paths
