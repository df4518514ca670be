"""The summary of a probe, a repair or a comparison as tables, whatever figures it holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from topd.report.charts import number
from topd.report.text import plain

CENTRES = ("mean", "value", "estimate", "median", "share")
LINES = 40
SHOWN_ELSEWHERE = ("verdict", "rule", "histogram", "edges")  # above, or as a figure


@dataclass(frozen=True)
class SummaryTable:
    """A table of text; ``prose`` if its cells are to be read, not compared."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    prose: bool = False


def loss_name(loss: Any) -> str:
    """What ranks candidates, in words: the token loss, or another ``candidate_loss`` by name."""
    if loss is None or loss == "sampled":
        return "token loss"
    return f"candidate_loss {plain(str(loss), limit=60)}"


def verdict_in(content: Mapping[str, Any]) -> tuple[str, str]:
    """The plain verdict of a summary, and the rule after it; empty where there is none."""
    inner = content.get("summary")
    for place in (content, inner if isinstance(inner, dict) else {}):
        verdict, rule = place.get("verdict"), place.get("rule")
        if isinstance(verdict, str):
            name = loss_name(place.get("token_loss"))
            words = verdict if " " in verdict else f"{name} as a guide: {verdict}"
            said = plain(rule).replace("token loss", name) if isinstance(rule, str) else ""
            return plain(words[:1].upper() + words[1:]), said
    return "", ""


def summary_tables(content: Mapping[str, Any]) -> list[SummaryTable]:
    """Figures with their intervals in one table, every list of records in one of its own."""
    figures = tuple(_figures(content, ()))
    tables = [SummaryTable("Figures", ("", "value", "95 % interval"), figures)] if figures else []
    return [*tables, *_record_tables(content, ())]


def _figures(content: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for key, value in content.items():
        here = (*path, plain(str(key).replace("_", " "), limit=60))
        if key in SHOWN_ELSEWHERE:
            continue
        if isinstance(value, dict):
            centre = next((name for name in CENTRES if name in value), None)
            if centre and {"low", "high"} <= value.keys():
                ends = [_text(value[end]) for end in ("low", "high") if value[end] is not None]
                yield _label(here), _text(value[centre]), " to ".join(ends) or "-"
            else:
                yield from _figures(value, here)
        elif not _records(value):
            yield _label(here), _text(value), ""


def _record_tables(content: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[SummaryTable]:
    for key, value in content.items():
        here = (*path, plain(str(key).replace("_", " "), limit=60))
        if isinstance(value, dict):
            yield from _record_tables(value, here)
        elif _records(value):
            names = dict.fromkeys(name for record in value for name in record)
            columns = [name for name in names if f"{name}_text" not in names]  # an id and its text
            rows = tuple(
                tuple(_text(record.get(name)) for name in columns) for record in value[:LINES]
            )
            titles = tuple(
                plain(str(name).removesuffix("_text").replace("_", " "), limit=60)
                for name in columns
            )
            yield SummaryTable(_label(here), titles, rows)


def _records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _label(path: tuple[str, ...]) -> str:
    label = " · ".join(part for part in path if part != "summary")
    return label[:1].upper() + label[1:]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, int | float):
        return number(value)
    if isinstance(value, str):
        return plain(value, limit=400) or repr(value)  # a token that is only space
    return plain(json.dumps(value), limit=400)
