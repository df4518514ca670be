"""A rollout and its forks for a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from topd.errors import TOPDError
from topd.report.folder import kind_of
from topd.report.guided import Verdict, rule_of
from topd.report.rollouts import read_rollout
from topd.report.text import counted, visible
from topd.report.viewer import ForkView, RolloutView, view
from topd.runs.tokens import TokenTexts

SIGNS = {"real": "◆", "alarm": "○", "quiet": "·"}
STYLES = {"real": "bold red", "alarm": "bold blue", "quiet": "dim"}
PAIRS = 12  # rows of the plan that are shown


def show(folder: Path, index: int, console: Console) -> None:
    """Print one rollout with its forks: text, windows side by side, who is matched with whom.

    Raises TOPDError: no run, or no such rollout.
    """
    kind = kind_of(folder)
    if not (folder / "rollouts.jsonl").is_file():
        raise TOPDError(
            f"run folder {folder}: this {kind} has no rollouts.jsonl, so there is nothing to show. "
            "topd report draws its figures."
        )
    seen = view(read_rollout(folder, index), TokenTexts.read(folder))
    rule = rule_of(folder)
    console.print(rollout_text(seen, index, rule, trained=kind == "training"))
    for number, fork in enumerate(seen.forks, 1):
        console.print(fork_panel(fork, number, rule))
    if not seen.forks:
        console.print("No candidate in this rollout.", style="dim")


def rollout_text(seen: RolloutView, index: int, rule: Verdict, *, trained: bool) -> RenderableType:
    """Heading, what the method asks, legend, and the text with its candidates marked.

    Tokens of a high loss are underlined, those that count less than once are faint.
    """
    end = "ended by itself" if seen.finished else "cut by the length limit"
    update = f"update {seen.step}, " * trained  # of probes and repairs there is none
    heading = Text(f"rollout {index}: prompt {seen.prompt}, {update}", style="bold")
    own = len(seen.texts) - sum(last - first for first, last in seen.replies)
    turns = f" in {len(seen.replies) + 1} turns ({own} by the student)" if seen.replies else ""
    heading.append(f"{counted(len(seen.texts), 'token')}{turns}, {end}")
    signs = (
        (f"◆ {rule.real}", seen.forks),
        (f"○ {rule.alarm}", seen.forks and rule.why_alarm),
        ("underlined: token loss over 1 nat", seen.teacher),
        ("italic: the environment", seen.replies),
    )
    legend = Text("  ".join(words for words, there in signs if there), "dim")
    less = {t for t, weight in seen.weights if weight is not None and weight < 1}
    body, forks = Text(), {fork.position: (n, fork) for n, fork in enumerate(seen.forks, 1)}
    for position, text in enumerate(seen.texts):
        if any(first <= position < end for first, end in seen.replies):
            body.append(text, "italic cyan")
            continue
        number, fork = forks.get(position, (0, None))
        if fork:
            body.append(f"[{SIGNS[fork.verdict]}{number}]", STYLES[fork.verdict])
        faint = " dim" if position in less else ""
        body.append(text, STYLES[fork.verdict] if fork else _loudness(seen, position) + faint)
    return Group(heading, *map(Text, seen.asked), legend, Text(), body, Text())


def fork_panel(fork: ForkView, number: int, rule: Verdict) -> Panel:
    """One candidate: why its verdict, what is asked there, both windows, the heaviest threads."""
    title = f"{SIGNS[fork.verdict]} {number}. {rule.name(fork.verdict)}"
    facts = Text(
        f"token {fork.position}, "
        + (f"token loss {fork.loss:.2f} nats, " if fork.loss is not None else "")
        + f"OT distance {_number(fork.distance, 3)}, {fork.equal} tokens equal in place"
        + "".join(f", {name} {value}" for name, value, _ in fork.facts)
    )
    windows = Table(expand=True, box=None, padding=(0, 1), header_style="dim")
    windows.add_column("student wrote", ratio=1)
    windows.add_column("teacher would write", ratio=1)
    windows.add_row(Text("".join(fork.student.texts)), Text("".join(fork.teacher.texts)))
    said = [Text(words) for words in (rule.why(fork.verdict), fork.asked) if words]
    parts: list[RenderableType] = [facts, *said, Text(), windows]
    if fork.branch and fork.branch.ids != fork.teacher.ids:
        parts.append(Text("\nlearned in the rollout's place", "bold"))
        parts.append(Text("".join(fork.branch.texts)))
    for after in fork.after:
        parts.append(Text(f"\n{after.arm}, OT distance {_number(after.distance, 3)}", "bold"))
        parts.append(Text("".join(after.window.texts)))
    if fork.threads:
        parts += [Text(), _matches(fork)]
    return Panel(
        Group(*parts), title=Text(title), title_align="left", border_style=STYLES[fork.verdict]
    )


def _matches(fork: ForkView) -> Table:
    """The first rows of the plan: a student token, its mass, the teacher token it goes to."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name in ("", "student", "mass", "teacher", ""):
        table.add_column(name, justify="right" if name in ("", "student", "mass") else "left")
    for i, j, mass in fork.threads[:PAIRS]:
        same = fork.student.ids[i] == fork.teacher.ids[j]
        table.add_row(
            str(i),
            _word(fork.student.texts[i]),
            f"{'not finite' if mass is None else f'{mass:.1%}'} {'=' if same else '~'}>",
            _word(fork.teacher.texts[j]),
            str(j),
            style="dim" if same else "",
        )
    if len(fork.threads) > PAIRS:
        table.add_row("", Text(f"{len(fork.threads) - PAIRS} more"), "", "", "", style="dim")
    return table


def _word(text: str) -> Text:
    return Text(repr(visible(text.replace("\n", ""), limit=24))[1:-1])


def _loudness(seen: RolloutView, position: int) -> str:
    own = seen.student[position] if position < len(seen.student) else None
    teachers = seen.teacher[position] if position < len(seen.teacher) else None
    loud = own is not None and teachers is not None and own - teachers > 1
    return "underline" if loud else ""


def _number(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
