"""docs/settings.md, and the table that ``topd settings`` and pages read, from the classes' fields.

python -m bench.settings
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from topd.commands.keys import SHARED
from topd.commands.settings import table
from topd.config import TOPDConfig, rules
from topd.methods import METHODS
from topd.runs.settings import TABLE
from topd.training import inherited
from topd.training.warmstart import WarmstartConfig

PAGE = Path("docs/settings.md")
HEAD = """# Settings

Generated from the configuration by `python -m bench.settings`.

Every setting is a field of `TOPDConfig`: a key of a recipe, `--key value` on the command line,
or an argument in Python. Besides these, the fields of transformers' `TrainingArguments` work as
they do there, or are refused ([table](#of-transformers)).
*Read by* says which methods a setting changes; all where it is empty. Methods that look ahead:
{ahead}. Methods that guide: the same without `downweight` and `downweight_matched`.
"""
LOOKING = "candidate_ window_ look_ahead_ embedding position_weight solver epsilon ot_ false_alarm_"
GUIDED = "trajectory_"


def page() -> str:
    """The whole page."""
    theirs = {f.name for f in fields(TrainingArguments)}
    own = [f for f in fields(TOPDConfig) if f.name not in theirs]
    changed = [f for f in fields(TOPDConfig) if f.name in theirs and "help" in f.metadata]
    changed = [f for f in changed if _differs(f)]
    known = {f.name: f for f in fields(TOPDConfig)}
    stage1 = [f for f in fields(WarmstartConfig) if known.get(f.name) is not f]
    stage1 = [f for f in stage1 if f.name not in known or _default(f) != _default(known[f.name])]
    return "\n".join(
        [
            HEAD.format(ahead=", ".join(f"`{n}`" for n, m in METHODS.items() if m.looks_ahead)),
            *("## Of TOPD", "", *_table(TOPDConfig, own), ""),
            *("## Defaults that differ from transformers", "", *_table(TOPDConfig, changed), ""),
            "## Of stage 1 (`topd warmstart`)",
            "",
            "In a recipe they stand under `warmstart:`. Of the rest of the recipe stage 1 takes "
            "what it has not itself of models, data, evaluation and adapter, "
            f"{', '.join(map(_names, SHARED))} (those side by side together, and no "
            "`teacher_prompt` where no teacher is asked). All settings of the above, and:",
            "",
            *_table(WarmstartConfig, stage1),
            "",
            *_inherited(),
        ]
    )


def _names(group: Sequence[str]) -> str:
    return " and ".join(f"`{key}`" for key in group if not key.startswith("gradient_check"))


def _inherited() -> list[str]:
    """Every argument of transformers' Trainer: it works, or it is refused with a reason."""
    refused = {**inherited.REFUSED, **rules.REFUSED}
    works = sorted(f.name for f in fields(TrainingArguments) if f.name in inherited.WORKS)
    rows = [f"| `{name}` | {reason} |" for name, reason in sorted(refused.items())]
    return [
        "## Of transformers",
        "",
        f"These {len(works)} arguments of `TrainingArguments` work as they do there "
        "(of `accelerator_config` only `sync_each_batch`; `dataloader_drop_last` in training alone)"
        ": " + ", ".join(f"`{name}`" for name in works) + ".",
        "",
        "Any other value than the default of these is refused, before a model is loaded:",
        "",
        "| setting | why |",
        "|---|---|",
        *rows,
        "",
    ]


def _differs(field: Field[Any]) -> bool:
    theirs = {f.name: f for f in fields(TrainingArguments)}[field.name]
    return _default(field) != _default(theirs)


def _table(config: type, chosen: list[Field[Any]]) -> list[str]:
    hints = get_type_hints(config)
    rows = ["| setting | type | default | meaning | read by |", "|---|---|---|---|---|"]
    for field in chosen:
        meaning = field.metadata.get("help", "").replace("|", "\\|").replace("\n", " ")
        kind = _kind(hints[field.name])
        cells = (f"`{field.name}`", kind, f"`{_default(field)!r}`", meaning, _read_by(field.name))
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _kind(hint: Any) -> str:
    """A type as it is written, alternatives joined by "or"."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_kind, get_args(hint)))
    if "[" not in str(hint) and hint is not NoneType:
        return str(getattr(hint, "__name__", hint))
    return "None" if hint is NoneType else str(hint).replace("typing.", "").replace("|", "or")


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return None if field.default_factory is MISSING else field.default_factory()


def _read_by(name: str) -> str:
    """Which methods a setting changes; empty for all."""
    if name.startswith(tuple(LOOKING.split())):
        return "methods that look ahead"
    return "methods that guide" if name.startswith(GUIDED) else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    TABLE.write_text(table(), encoding="utf-8")
    print(PAGE, TABLE)
