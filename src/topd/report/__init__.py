"""Run folder -> page, figures, terminal. Everything shown is a function of the folder's files."""

from topd.report.page import page_line, write_report

__all__ = ["page_line", "write_report"]
