"""TOPD: on-policy distillation that looks ahead (arXiv 2606.00305)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from topd.config import TOPDConfig
    from topd.training.trainer import TOPDTrainer

__all__ = ["TOPDConfig", "TOPDTrainer"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when a trainer is asked for."""
    if name == "TOPDTrainer":
        from topd.training.trainer import TOPDTrainer

        TOPDTrainer.at_end = staticmethod(_page_line)
        return TOPDTrainer
    if name == "TOPDConfig":
        from topd.config import TOPDConfig

        return TOPDConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _page_line(folder: Path) -> str:
    """Make the page of a run that was trained from Python, and say where it is."""
    from topd.report import page_line

    return page_line(folder)
