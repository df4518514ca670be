"""The settings and methods of the classes themselves: :mod:`topd.runs.settings` keeps them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any

import transformers
from transformers import TrainingArguments

from topd.commands.probe import ProbeConfig
from topd.commands.repair.config import RepairConfig
from topd.commands.session import AnalysisConfig
from topd.config import TOPDConfig
from topd.methods import METHODS, Method
from topd.runs.settings import NO_CHOICE, Setting
from topd.training.warmstart import WarmstartConfig

ANALYSES = (AnalysisConfig, "probe, repair"), (ProbeConfig, "probe"), (RepairConfig, "repair")


def table() -> str:
    """The file that :mod:`topd.runs.settings` reads."""
    plain = TOPDConfig(output_dir="unused", use_cpu=True).to_dict()
    content = {
        "transformers": transformers.__version__,
        "methods": list(methods()),
        "settings": list(settings()),
        "plain": {name: value for name, value in plain.items() if name not in NO_CHOICE},
    }
    return json.dumps(content, indent=1, default=str) + "\n"


def methods() -> Iterator[tuple[str, str, str]]:
    """Name, what it needs, and its first sentence, for every method."""
    for name, method in METHODS.items():
        first = (inspect.getdoc(method.guide) or "").split("\n\n")[0]
        yield name, _needs(method), " ".join(first.replace("``", "").split())


def settings() -> list[Setting]:
    """Every setting of stage 2, those of stage 1 that differ from it, and those of analyses."""
    theirs = {field.name: _default(field) for field in fields(TrainingArguments)}
    found: dict[str, Setting] = {}
    for kind, place in ((TOPDConfig, ""), (WarmstartConfig, "warmstart.")):
        for field in fields(kind):
            default, words = _default(field), _words(field)
            same = found.get(field.name)
            if not (place and same and same[1:3] == (default, words)):
                ours = theirs.get(field.name) != default
                found[place + field.name] = Setting(place + field.name, default, words, ours)
    for kind, commands in ANALYSES:
        for field in fields(kind):
            name = f"{field.name} (topd {commands})"
            found.setdefault(field.name, Setting(name, _default(field), _words(field), ours=True))
    return list(found.values())


def _needs(method: Method) -> str:
    needs = []
    if method.looks_ahead:
        needs.append("the teacher writes windows")
    if method.statistics:
        needs.append("one more student forward")
    options = [*inspect.signature(method.guide).parameters.values()][1:]
    if options:
        shown = ", ".join(f"{option.name}: {option.default}" for option in options)
        needs.append(f"method_options {{{shown}}}")
    if method.settings:
        shown = ", ".join(f"{name}: {value}" for name, value in method.settings.items())
        needs.append(f"brings {{{shown}}}")
    return "; ".join(needs)


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return "none" if field.default is None else str(field.default)
    return "none" if field.default_factory is MISSING else str(field.default_factory())


def _words(field: Field[Any]) -> str:
    return " ".join(str(field.metadata.get("help", "")).split())
