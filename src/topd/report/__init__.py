"""Run folder -> page, figures, terminal. Everything shown is a function of the folder's files."""

from topd.report.page import write_report

__all__ = ["write_report"]
