"""Run folder -> one HTML file that needs nothing else: no network, no server, no second file.

The page's policy allows only the scripts and styles written here, by their hashes. Data is in
JSON blocks that no browser executes, one block a rollout, read when the rollout is opened.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from topd.errors import TOPDError
from topd.report.charts import Chart, Fact, figure_of
from topd.report.charts.svg import to_svg
from topd.report.folder import Kind, is_stage1, kind_of, settings_of
from topd.report.guided import Verdict, rule_of
from topd.report.headline import model_names
from topd.report.kinds import PAGES
from topd.report.rollouts import Selection, select_rollouts
from topd.report.settings import changes_on_resuming, settings_files, settings_table
from topd.report.summary import SummaryTable, verdict_in
from topd.report.text import plain
from topd.report.viewer import entry, prompt_words, view
from topd.runs.files import read_whole
from topd.runs.tokens import TokenTexts

HERE = Path(__file__).parent
SCRIPTS = ("dom.js", "store.js", "rollout.js", "threads.js", "fork.js", "list.js", "main.js")


@dataclass(frozen=True)
class Page:
    """All that the template shows; every text in it is data and is escaped there.

    ``drawings`` are charts with their pictures.
    """

    kind: Kind
    title: str
    heading: str
    stage1: bool
    subtitle: str
    headline: tuple[str, ...]
    verdict: tuple[str, str]
    facts: tuple[Fact, ...]
    drawings: tuple[tuple[Chart, Markup], ...]
    tables: tuple[SummaryTable, ...]
    changed: SummaryTable | None
    settings: dict[str, str]
    notes: tuple[str, ...]
    selection: Selection
    rule: Verdict

    @property
    def forks(self) -> bool:
        """Whether any rollout has a candidate: a method that looks nowhere ahead has none."""
        return any(rollout.forks for rollout in self.selection.rollouts)

    @property
    def scored(self) -> bool:
        """Whether the teacher scored any rollout: a teacher that gives only text does not."""
        return any(rollout.teacher_logprobs for rollout in self.selection.rollouts)

    @property
    def pale(self) -> bool:
        """Whether a token of any rollout counts less than once."""
        return any(w < 1 for rollout in self.selection.rollouts for w in rollout.weights.values())

    @property
    def replies(self) -> bool:
        """Whether an environment wrote a part of any rollout."""
        return any(rollout.replies for rollout in self.selection.rollouts)


def write_report(folder: Path, *, rollouts: int | None = None, reload: int | None = None) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Args:
        folder: of any command of :data:`topd.report.kinds.PAGES`.
        rollouts: at most about so many are put into the page, evenly spaced over the prompts;
            None: as many as a browser shows at once, 1,000 or, of long ones, 500,000 tokens.
        reload: seconds after which a browser loads the page again; None: never.

    Raises:
        TOPDError: the folder holds no run, or one of its files is broken.
    """
    tokens = TokenTexts.read(folder)
    page = make_page(folder, tokens, rollouts=rollouts)
    path = folder / "report.html"
    partial_path = path.with_suffix(".partial")
    try:
        render(page, tokens, partial_path, reload)
        partial_path.replace(path)
    except OSError as error:
        raise TOPDError(f"{path}: cannot be written ({error.strerror}).") from error
    return path


def page_line(folder: Path) -> str:
    """Write the page of a run that has ended, and say where it is, or why there is none.

    What was computed is not lost for a page: this raises nothing of what a page may lack.
    """
    try:
        return f"report: {write_report(folder)}"
    except (TOPDError, OSError) as error:
        return f"no page was made: {error} Try again with: topd report {quote(str(folder))}"


def make_page(folder: Path, tokens: TokenTexts, *, rollouts: int | None) -> Page:
    """Read everything that the page of a run folder shows. Raises TOPDError."""
    kind = kind_of(folder)
    shown, settings = PAGES[kind], settings_of(folder) if kind == "training" else {}
    stage1 = is_stage1(settings)
    summary = {} if kind == "training" else read_whole(folder / f"{kind}.json")
    selection = select_rollouts(folder, limit=rollouts)
    return Page(
        kind=kind,
        title=plain(folder.resolve().name, limit=80),
        heading="Warm start" if stage1 else shown.title,
        stage1=stage1,
        subtitle=_subtitle(folder, None if stage1 else settings.get("method")),
        headline=tuple(shown.words(folder)),
        verdict=verdict_in(summary),
        facts=tuple(shown.facts(folder)),
        drawings=tuple((chart, _picture(chart)) for chart in shown.charts(folder)),
        tables=tuple(shown.tables(folder)),
        changed=settings_table(folder),
        settings=settings_files(folder),
        notes=tuple(_notes(folder, kind, summary, selection, tokens)),
        selection=selection,
        rule=rule_of(folder),
    )


def render(page: Page, tokens: TokenTexts, path: Path, reload: int | None = None) -> None:
    """Write the page, rollout by rollout."""
    environment = Environment(
        loader=PackageLoader("topd.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [_ours(name) for name in SCRIPTS]
    style = _ours("page.css")
    views = [view(rollout, tokens) for rollout in page.selection.rollouts]
    words = prompt_words([seen.prompt_text for seen in views])
    stream = environment.get_template("page.html.j2").stream(
        page=page,
        reload=reload,
        scripts=scripts,
        style=style,
        policy=policy(scripts, style),
        about=_json({**_about(page.rule), "trained": page.kind == "training"}),
        entries=_json([*map(entry, views, words)]),
        blocks=map(_json, views),
    )
    stream.enable_buffering(200)
    with open(path, "w", encoding="utf-8", errors="replace") as file:
        file.writelines(stream)


def _about(rule: Verdict) -> dict[str, Any]:
    """Names and reasons of the verdicts, for the fork viewer."""
    verdicts = ("real", "alarm", "quiet")
    return {"names": {v: rule.name(v) for v in verdicts}, "why": {v: rule.why(v) for v in verdicts}}


def policy(scripts: list[Markup], style: Markup) -> str:
    """A Content-Security-Policy under which only these scripts and this style count."""
    hashes = " ".join(map(_hash, scripts))
    return (
        f"default-src 'none'; script-src {hashes}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: Any) -> Markup:
    """JSON that is safe inside a script element: ASCII, and without <, > and &."""
    dumps = partial(
        json.dumps, ensure_ascii=True, allow_nan=False, separators=(",", ":"), default=vars
    )
    return htmlsafe_json_dumps(value, dumps=dumps)


def _ours(name: str) -> Markup:
    """A file of this package, to stand in the page as it is."""
    return Markup((HERE / name).read_text(encoding="utf-8"))  # noqa: S704 - nothing of a run in it


def _picture(chart: Chart) -> Markup:
    label = f"{chart.title}. {chart.caption}"
    drawn = to_svg(figure_of(chart), name=chart.name, label=label)
    return Markup(drawn)  # noqa: S704 - XML by matplotlib, which escapes texts


def _subtitle(folder: Path, method: Any) -> str:
    """Student, teacher and method, as far as they are known."""
    parts = [f"{side} {name}" for side, name in model_names(folder).items()]
    return plain(", ".join([*parts, *([f"method {method}"] if method else [])]), limit=200)


def _notes(
    folder: Path, kind: Kind, summary: dict[str, Any], selection: Selection, tokens: TokenTexts
) -> Iterator[str]:
    """What the folder lacks, what the page leaves out, or what it tells only the last of."""
    if changes := [*changes_on_resuming(folder)]:
        yield f"{' '.join(changes)} This page tells the last ones."
    shown = len(selection.rollouts)
    if shown < selection.total:
        yield (
            f"{shown:,} of {selection.total:,} rollouts are in this page, all those of evenly "
            "spaced prompts. More: topd report RUN --rollouts N."
        )
    if kind != "training" and not summary:
        yield f"There is no {kind}.json: the run has not finished, and this page shows a part."
    if shown and not tokens.pieces:
        yield "There is no tokens.jsonl, so that tokens are shown as their numbers."
    if kind == "training" and not selection.total and not settings_of(folder).get("log_rollouts"):
        yield "There is no rollouts.jsonl (log_rollouts was off), so that no fork can be shown."
