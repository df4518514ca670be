"""docs/evidence.md and docs/evidence/ from the committed results: ``python -m bench.evidence``."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.imitated import ANSWERS, AS_OPD, FORK_BY_CE, NEW, SAME, SAME_BY_CE
from bench.prefixes import HALF, QUARTER
from bench.real import ONCE
from bench.stage_one import CE
from topd.commands.compare.budgets import RATES, READ, cost
from topd.commands.recipe import in_files


def _alone(window: int, until: int, more: str = "") -> str:
    """The words of a comparison of OPD and first_fork alone, on more problems."""
    fork = "method: first_fork, candidate_loss: surprise, false_alarm_share: 0.0"
    size = f"window_length: {window}, look_ahead_until: {until}"
    arms = f"{{opd: {{method: opd}}, first_fork: &d {{{fork}, {size}}}{more}}}"
    return f'--evaluation.limit 400 --compare.sweeps "[]" --compare.arms "{arms}"'


DOCS = Path("docs")
RESULTS = DOCS / "results"
FEW = "topd compare recipes/testbed/imitated-few.yaml"
SCREENING = "python -m bench.screening"
JUDGED = {  # of larger models: title, command, whose perplexity tells what is forgotten
    "real-words": (
        "SmolLM2-135M, word problems, 768 answers",
        "python -m bench.real words",
        "English that was not taught here, the documentation strings of Python's library",
    ),
    "real-sums": (
        "SmolLM2-135M, one-step word problems, 64 answers by cross-entropy",
        "python -m bench.real sums",
        "English that was not taught here, the documentation strings of Python's library",
    ),
    "larger-arithmetic": (
        "30 M parameters, arithmetic, 320 answers",
        "python -m bench.larger",
        "texts of the kind that the base student was made from",
    ),
}
FAMILIES = ("arithmetic", "programs", "logic")
TUNED = tuple(f"{family}-{supply}" for family in (*FAMILIES, "guesses") for supply in ANSWERS)
SHOWN = ("topd", "window_sft", "first_fork", "first_fork, K 24", "first_fork, every update")
DEFAULT = {
    "arithmetic": _alone(12, 75, ", 'first_fork, every update': {<<: *d, look_ahead_until: 150}"),
    "programs": _alone(12, 50, ", 'first_fork, every update': {<<: *d, look_ahead_until: 140}"),
    "logic": _alone(24, 40),
}
# Measured when the recipe had fewer updates, of which OPD gained a little less than 10 points.
SHORTER = {"arithmetic": " --max_steps 120 --data.limit 3840 --evaluation.every 60"}
Found = Mapping[str, Any]
LABELS = {  # of arms, in text for readers
    "opd": "OPD",
    "opd, forward KL": "OPD, forward KL",
    "opd, three times the updates": "OPD, three times the updates",
    HALF: "OPD, first half of rollouts",
    QUARTER: "OPD, first quarter of rollouts",
    "first_fork": "first_fork, forward KL",
    "random handover": "random place, forward KL",
    "start handover": "from the start, forward KL",
    "oracle fork": "labelled fork, forward KL",
    SAME: "same answers, forward KL",
    SAME_BY_CE: "same answers, cross-entropy",
    NEW: "new answers, cross-entropy",
    "stage 1 continued, new answers, forward KL": "new answers, forward KL",
    ONCE: "640 new answers once, cross-entropy",
    "OLIVE": "olive",
    "OLIVE, no reference": "olive, told nothing",
    "OLIVE, a wrong reference": "olive, told a wrong answer",
    "random handover to the end": "random place, windows to the end",
    "true fork to the end": "labelled fork, windows to the end",
}
BY_CE = "_ce"  # stage 1 by cross-entropy; that of other tables is by forward KL
DRAWN = (NEW, FORK_BY_CE, FORK_BY_CE + AS_OPD, "first_fork", "topd", "OLIVE", SAME_BY_CE)
READ_PRICES = (READ, 0.1, 0.05, 0.02)
BEST = ": every method at its own best rate"
READ_FIRST = (
    "From one student after stage 1. [Evidence](../evidence.md) says what follows from it, and "
    "[how to read the tables](../evidence.md#how-to-read-the-tables)."
)
SHORT = {"NEW": NEW, "SAME": SAME, "SAME_BY_CE": SAME_BY_CE, "CE": FORK_BY_CE, "ONCE": ONCE}
SHORT |= {"HALF": HALF, "QUARTER": QUARTER}
# {arithmetic-few: first_fork over opd at r = 5}: what the introduction asks of the tables;
# without "over" the accuracy itself; "at 0.6": sampled as students are served
FIRST = "real-sums_first"  # by python -m bench.real sums of 2026-11-29, one rate for all
FIGURE = re.compile(r"\{(\w+-\w+): ([^{}]+?)(?: over ([^{}]+?))?(?: at (r = \d+|0\.6))?\}")


def main() -> None:
    """Write the pages."""
    DOCS.joinpath("evidence").mkdir(exist_ok=True)
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
    write_figure(_usual(_read("imitated", TUNED)))


def pages() -> dict[str, str]:
    """What is read first, with what is short; and the tables of each world. By file."""
    worlds = _read("imitated", TUNED)
    tables = {name: [*imitated(found, *_tuned_title(name))] for name, found in worlds.items()}
    larger = {name: _found(name) for name in JUDGED if _found(name)}
    for name, found in larger.items():
        title, command, texts = JUDGED[name]
        tables[name] = [*imitated(found, title, command)]
        tables[name] += judged(found, texts) if "judged" in found else []
    for family, found in _read("prefixes").items():
        title = f"{family}, 320 answers by cross-entropy: the beginnings of rollouts"
        name, command = f"prefixes-{family}", f"python -m bench.prefixes {family}"
        tables[name], larger[name] = [*imitated(found, title, command)], found
    screened = _found("screening-arithmetic-few")
    tables["screening"] = [*imitated(screened, "arithmetic, 320 answers: all methods", SCREENING)]
    for name, found in (worlds | larger | {"screening": screened}).items():
        tables[name] += tuned(found)
    tables["screening"] += missing(screened)
    one_rate = "arithmetic, 320 answers: one rate for all"
    tables["one-rate"] = [*imitated(_found("imitated-few"), one_rate, FEW)]
    tables["own-habits"] = [*own_habits()]
    tables["detectors"] = ["# Detectors: how well each finds the forks", ""]
    for family, found in _read("detectors", (*FAMILIES, "guesses")).items():
        tables["detectors"] += [*detectors(family, found), ""]
    links = {f"evidence/{name}.md": lines[0].removeprefix("# ") for name, lines in tables.items()}
    written = {page: "\n".join(lines) for page, lines in zip(links, tables.values(), strict=True)}
    written["evidence.md"] = introduction(worlds, larger, links)
    return {page: f"{text.strip()}\n" for page, text in written.items()}


def write_figure(worlds: Mapping[str, Found]) -> None:
    """Points over OPD of the methods that matter most: a row for few answers, one for many."""
    from matplotlib import pyplot, rcParams

    rcParams.update({"svg.hashsalt": "evidence", "font.size": 9})
    rows = [[name for name in worlds if name.endswith(supply)] for supply in ("few", "many")]
    figure, axes = pyplot.subplots(
        2, len(rows[1]), sharey=True, figsize=(8.5, 6), layout="constrained"
    )
    for name, axis in zip(rows[0] + rows[1], [*axes[0, : len(rows[0])], *axes[1]], strict=True):
        _draw(axis, worlds[name]["against"]["opd"])
        if not name.startswith("guesses"):
            axis.set_xlim(-26, 14)  # the same for all; in guesses olive is 80 points ahead
        axis.set_title(_world(name).replace(", ", "\n"), fontsize=9)
    axes[0, 0].set_yticks(range(len(DRAWN)), [named(arm) for arm in DRAWN])
    axes[0, 0].invert_yaxis()
    for axis in axes[0, len(rows[0]) :]:
        axis.axis("off")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[0, -1].legend(handles, labels, loc="center", frameon=False)
    figure.supxlabel("points over OPD, 95 % intervals", fontsize=9)
    figure.savefig(DOCS / "images" / "over_opd.svg", metadata={"Date": None})


def _draw(axis: Any, over: Mapping[str, Found]) -> None:
    """A panel: the gains of each method, greedy above sampled."""
    axis.axvline(0, color="0.6", linewidth=1)
    for score, label, shift, colour in (
        ("greedy", "greedy", -0.14, "#1f4e9c"),
        ("pass@1", "sampled at\ntemperature 1", 0.14, "#c05a00"),
    ):
        places = [i for i, arm in enumerate(DRAWN) if arm in over]
        gains = [over[DRAWN[i]][score] for i in places]
        mean, low, high = ([100 * gain[key] for gain in gains] for key in ("mean", "low", "high"))
        heights = [i + shift for i in places]
        axis.hlines(heights, low, high, color=colour, linewidth=1.5)
        axis.plot(mean, heights, "o", color=colour, markersize=4, label=label)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)


def introduction(
    worlds: Mapping[str, Found], larger: Mapping[str, Found], links: Mapping[str, str]
) -> str:
    """What is read first, the tables over all worlds, and where those of each are."""
    text = (RESULTS / "evidence_head.md").read_text(encoding="utf-8")
    first = _read("stage-one", [f"{family}-{n}" for n in ("few", "many") for family in FAMILIES])
    parts = [
        [filled(text.strip(), {**worlds, **larger, FIRST: _found(FIRST)})],
        ["## All tables", "", *(f"- [{title}]({page})" for page, title in links.items())],
        in_short(_usual(worlds)),
        served(_sharpness()),
        reading(worlds),
        stage_one(first),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def own_habits() -> Iterator[str]:
    """Students that were warmed up on their own habits: what it says, and every family."""
    compared, default = _read("compare"), _read("default")
    yield from (RESULTS / "evidence_older.md").read_text(encoding="utf-8").splitlines()
    yield ""
    yield from overview([*compared.items(), *default.items()])
    for family, found in compared.items():
        command = _command(family) + SHORTER.get(family, "")
        yield from ["", *comparison(family.capitalize(), command, found)]
    for family, found in default.items():
        title = f"first_fork as it comes, on {family}, and what fits into 1.2 times OPD's time"
        yield from ["", *comparison(title, f"{_command(family)} {DEFAULT[family]}", found)]


def _usual(worlds: Mapping[str, Found]) -> dict[str, Found]:
    """Worlds whose stage 1 is by forward KL, in which all methods ran."""
    return {name: found for name, found in worlds.items() if not name.endswith(BY_CE)}


def filled(text: str, worlds: Mapping[str, Found]) -> str:
    """The introduction with the figures that it asks for."""
    sharpness = _sharpness()

    def figure(asked: re.Match[str]) -> str:
        name, arm, reference, budget = asked.groups()
        found, arm, reference = worlds[name], long(arm), long(reference or "")
        known = _accuracy(found) | {"": None}
        if arm not in known or reference not in known:
            return "not run"
        if budget == "0.6":
            served = sharpness[name]
            shown = served["against"][reference][arm] if reference else served["accuracy"][arm]
            return _gain(shown).replace("**", "") if reference else _percent(shown)
        if not reference:
            return _pair(_accuracy(found)[arm], _percent)
        if not budget:
            return _pair(found["against"][reference][arm], _gain).replace("**", "")
        return _pair(found["equal"][reference][arm], _gain, f"cost at {budget}").replace("**", "")

    def long(arm: str) -> str:
        head, at, rest = arm.partition(", at ")
        return SHORT.get(head, head) + at + rest

    return FIGURE.sub(figure, text)


def _accuracy(found: Found) -> dict[str, Found]:
    """Of the arms at the end and of their start: where it was not evaluated apart, a curve's."""
    first = found["curves"][found["baseline"]][0]
    begun = {"warm start": {score: {"mean": first[score]} for score in ("greedy", "pass@1")}}
    return begun | found["starts"] | found["summary"]


def in_short(worlds: Mapping[str, Found]) -> Iterator[str]:
    """Every arm in every world: points over OPD at the ends, and at equal cost for r = 5."""
    names = [f"[{_world(name)}](evidence/{name}.md)" for name in worlds]
    yield "## In short: points over OPD after imitation, greedy / sampled"
    yield ""
    yield (
        "From one student after stage 1, every method at its own best rate, 5 seeds, 400 test "
        "problems; bold: interval above zero, before Holm's correction."
    )
    yield ""
    yield f"| | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    begun = [_pair(found["starts"]["warm start"], _percent) for found in worlds.values()]
    ended = [_pair(found["summary"]["opd"], _percent) for found in worlds.values()]
    yield f"| after stage 1, % | {' | '.join(begun)} |"
    yield f"| OPD, % | {' | '.join(ended)} |"
    yield from _over_opd(worlds, "against")
    yield ""
    yield (
        "At equal cost for a teacher five times as dear (r = 5); a dearer method is read off its "
        "curve, but for those *at OPD's cost*, which are annealed to it:"
    )
    yield ""
    yield f"| | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    yield from _over_opd(worlds, "equal", "cost at r = 5")


def reading(worlds: Mapping[str, Found]) -> Iterator[str]:
    """What methods cost beside OPD, by what a token costs that is read."""
    yield "## What it costs, by the price of reading"
    yield ""
    yield (
        "What a method cost in all over what OPD cost, for a teacher 1 / 5 / 25 times as dear as "
        "the student. Columns: what reading a token costs beside writing one. Services charge a "
        "fifth or so, which is what all other tables take; on a GPU of one's own it is often far "
        "less, and then what the teacher writes is dearer beside OPD."
    )
    yield ""
    yield f"| world | method | {' | '.join(f'{read:g}' for read in READ_PRICES)} |"
    yield f"|---|---|{'---|' * len(READ_PRICES)}"
    for name, found in worlds.items():
        for arm in filter(found["spent"].get, (NEW, "first_fork", FORK_BY_CE, "topd", "OLIVE")):
            own, opd = (found["spent"][key] for key in (arm, "opd"))
            cells = [
                " / ".join(f"{cost(own, r, read) / cost(opd, r, read):.2f}" for r in RATES)
                for read in READ_PRICES
            ]
            yield f"| {_world(name)} | {named(arm)} | {' | '.join(cells)} |"


def served(worlds: Mapping[str, Found]) -> Iterator[str]:
    """Accuracy where students are sampled less by chance, over OPD and over new answers."""
    yield "## Served at temperature 0.6"
    yield ""
    yield (
        "The same students, two answers of each of the 400 test problems at temperature 0.6 with "
        "top-p 0.95 (`python -m bench.sharpness`): described, not tested (plan, point 21)."
    )
    yield ""
    yield "| world | method | accuracy | over OPD | over new answers |"
    yield "|---|---|---|---|---|"
    for name, found in worlds.items():
        for arm, accuracy in found["accuracy"].items():
            over = [found["against"][reference].get(arm) for reference in ("opd", NEW)]
            gains = " | ".join(_gain(one) if one else "" for one in over)
            yield f"| {_world(name)} | {named(arm)} | {_percent(accuracy)} | {gains} |"


def stage_one(worlds: Mapping[str, Found]) -> Iterator[str]:
    """Stage 1 by its loss: accuracy, and over cross-entropy, as evaluated and as served."""
    yield "## By which loss to imitate"
    yield ""
    yield (
        "Stage 1 from the base student (`python -m bench.stage_one FAMILY few|many`): the same "
        "updates and answers, each loss at its own best rate, five seeds with answers of their "
        "own, 400 test problems (plan, point 23). Greedy / sampled at temperature 1 / sampled at "
        "0.6 with top-p 0.95. Rates are bracketed here; the starts of all other tables tried 0.001 "
        "and 0.002 alone, and would be higher, or there sooner, at higher ones."
    )
    yield ""
    yield (
        "**No loss is told apart greedily or served at 0.6.** At temperature 1, at which OPD's "
        "rollouts are drawn, the student of cross-entropy is ahead on arithmetic and programs: it "
        "is as sharp as the teacher's answers, which were drawn at 0.6. It is the default of "
        "`topd warmstart`, because it also needs no reading by the teacher; by the letter of the "
        "plan's rule, written before the runs, the default had to stay half of each."
    )
    yield ""
    yield "| world | loss | rate | updates | accuracy | over cross-entropy |"
    yield "|---|---|---|---|---|---|"
    for name, found in worlds.items():
        for arm, scores in found["summary"].items():
            own = found["served"]["accuracy"][arm]
            gains, over = (x["against"][CE].get(arm) for x in (found, found["served"]))
            cells = [
                *(_world(name), named(arm), f"{found['rates'][arm]['chosen']:g}"),
                f"{found['spent'][arm]['updates']:.0f}",
                f"{_pair(scores, _percent)} / {_percent(own)}",
                f"{_pair(gains, _gain)} / {_gain(over)}" if gains else "",
            ]
            yield f"| {' | '.join(cells)} |"


def named(arm: str) -> str:
    """An arm in words.

    >>> named("random handover, at opd's cost")
    "random place, forward KL, at OPD's cost"
    """
    head, cut, _ = arm.partition(AS_OPD)
    return LABELS.get(head, head) + (", at OPD's cost" if cut else "")


def _over_opd(worlds: Mapping[str, Found], kind: str, axis: str = "") -> Iterator[str]:
    arms = dict.fromkeys(arm for found in worlds.values() for arm in found["against"]["opd"])
    for arm in arms:
        cells = [_pair(found[kind]["opd"].get(arm, {}), _gain, axis) for found in worlds.values()]
        yield f"| {named(arm)} | {' | '.join(cells)} |"


def _pair(figures: Found, shown: Callable[[Found], str], axis: str = "") -> str:
    """Greedy and sampled; nothing where an arm has not run."""
    found = figures.get(axis) if axis else figures
    return " / ".join(shown(found[score]) for score in ("greedy", "pass@1")) if found else ""


def _command(family: str) -> str:
    return f"topd compare recipes/testbed/{family}.yaml"


def _read(kind: str, names: Iterable[str] = FAMILIES) -> dict[str, Found]:
    """What is measured of every family, of those where it is."""
    return {name: found for name in names if (found := _found(f"{kind}-{name}"))}


def _found(name: str) -> Found:
    """One file of results; empty where it is not measured."""
    path = RESULTS / f"{name}.json"
    found: Found = json.loads(path.read_text()) if path.exists() else {}
    return found


def _sharpness() -> dict[str, Found]:
    """What ``bench.sharpness`` found of every world."""
    return dict(_found("sharpness"))


def _tuned_title(name: str) -> tuple[str, str]:
    return f"{_world(name)}{BEST}", f"python -m bench.imitated {name.replace('-', ' ')}"


def _world(name: str) -> str:
    """In words.

    >>> _world("logic-many"), _world("logic-few_ce")
    ('logic, 4,800 answers', 'logic, 320 answers by cross-entropy')
    """
    family, supply = name.split("-")
    loss = " by cross-entropy" if supply.endswith(BY_CE) else ""
    return f"{family}, {ANSWERS[supply]:,} answers{loss}"


def tuned(found: Found) -> Iterator[str]:
    """What was tried to choose the start and the rates."""
    yield ""
    yield "## Tuning"
    yield ""
    yield (
        "On validation problems with seed 100, mean of greedy and pass@1; the best in "
        "bold. Start (updates at rate): "
        f"{_tried(found['start']['tried'], '{max_steps} at {learning_rate:g}', found)}."
    )
    yield ""
    for arm, rates in found["rates"].items():
        chosen = format(rates["chosen"], "g")
        ends = {min(map(float, rates["tried"])), max(map(float, rates["tried"]))}
        open_ = " (not bracketed)" if rates["chosen"] in ends else ""
        yield f"- {named(arm)}: {_tried(rates['tried'], chosen, found)}{open_}"


def judged(found: Found, texts: str) -> Iterator[str]:
    """Each arm's students by two ways of sampling, their length, and what they forgot."""
    ways = ("temperature 1", "temperature 0.6, top-p 0.95")
    teacher = found["judged"]["teacher"][ways[0]]
    problems = teacher["greedy"]["problems"]
    samples = max(int(name.removeprefix("pass@")) for name in teacher if name.startswith("pass@"))
    yield ""
    yield "## Sharpness is not skill"
    yield ""
    yield (
        f"The same students, {samples} samples of each of {problems} problems; means over seeds, "
        f"least to largest in brackets. Perplexity: of {texts}. Greedy figures are with weights in "
        "bfloat16."
    )
    yield ""
    each = " | ".join(f"sampled, {way} | pass@{samples}, {way}" for way in ways)
    yield f"| | greedy | {each} | tokens an answer | perplexity |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in ("teacher", "base", "stage 1", *found["summary"]):
        runs = [one for place, one in found["judged"].items() if _is_of(place, name)]
        cells = [_spread([100 * run[ways[0]]["greedy"]["mean"] for run in runs])]
        for way in ways:
            for score in ("pass@1", f"pass@{samples}"):
                cells.append(_spread([100 * run[way][score]["mean"] for run in runs]))
        cells.append(_spread([run[ways[0]]["mean_length"]["mean"] for run in runs]))
        cells.append(_spread([run["perplexity"] for run in runs]))
        yield f"| {named(name)} | {' | '.join(cells)} |"


def _is_of(place: str, name: str) -> bool:
    """Whether a run folder is an arm's, or a start's own."""
    return place == name or place.rpartition("-")[0] == in_files(name)


def _spread(values: Sequence[float]) -> str:
    """Mean, least and largest.

    >>> _spread([1.0, 2.0]), _spread([3.0])
    ('1.5 [1.0, 2.0]', '3.0')
    """
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.1f}, {max(values):.1f}]"


def missing(found: Found) -> Iterator[str]:
    """What a screening left out, and why."""
    yield ""
    yield "## Left out"
    yield ""
    for arm, why in found["left_out"].items():
        yield f"- {arm}: {why}"


def _tried(scores: Mapping[str, float], chosen: str, found: Found) -> str:
    chosen = chosen.format(**found["start"]["chosen"])
    marks = ((name, "**" if name == chosen else "") for name in scores)
    return ", ".join(f"{mark}{name}: {100 * scores[name]:.1f}{mark}" for name, mark in marks)


def imitated(found: Found, title: str, command: str) -> Iterator[str]:
    """Methods from a student that has already imitated, and what they spent."""
    references = list(found["against"])
    problems = found["summary"][found["baseline"]]["greedy"]["problems"]
    yield f"# {title[0].upper()}{title[1:]}"
    yield ""
    yield READ_FIRST
    yield ""
    yield f"`{command}`, {problems} test problems. {START if found['starts'] else SHARED}"
    yield ""
    yield from _ends(found)
    for reference in references:
        yield from _differences(found, reference)


START = (
    "The base student, and after stage 1, from where all methods start: the first two rows. CPU s "
    "and tokens are counted from that start on."
)
SHARED = (
    "Several runs shared a machine, so seconds are not compared; tokens are counted from the "
    "start on."
)


def _ends(found: Found) -> Iterator[str]:
    columns = "updates | CPU s | student wrote | teacher wrote | teacher read"
    yield f"| method | seeds | greedy | sampled | {columns} |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for start, figures in found["starts"].items():
        name = {"warm start": "stage 1 on the teacher's answers"}.get(start, start)
        yield f"| {name} | | {_percent(figures['greedy'])} | {_percent(figures['pass@1'])} ||||||"
    for arm, figures in found["summary"].items():
        spent = found["spent"][arm]
        cells = [
            named(arm),
            len(spent["seeds"]),
            _percent(figures["greedy"]),
            _percent(figures["pass@1"]),
        ]
        cells += [f"{spent['updates']:.0f}", f"{spent['cpu_seconds']:.0f}"]
        keys = ("student_written", "teacher_written", "teacher_read")
        cells += [f"{spent[key]:,.0f}" for key in keys]
        yield f"| {' | '.join(map(str, cells))} |"


def _differences(found: Found, reference: str) -> Iterator[str]:
    """The differences from one reference: at the ends, and where the arm has spent as much."""
    axes = ["teacher-written tokens", *(f"cost at r = {rate}" for rate in (1, 5, 25))]
    axes = ["seconds"] * bool(found["starts"]) + axes  # as in SHARED
    yield ""
    yield f"## Against {named(reference)}"
    yield ""
    yield f"| method | score | at the ends | Holm p | equal {' | equal '.join(axes)} |"
    yield f"|---|---|---|---|{'---|' * len(axes)}"
    for arm, ends in found["against"][reference].items():
        equal = found["equal"][reference][arm]
        for score in ("greedy", "pass@1"):
            seeds = f" ({len(ends['seeds'])} seeds)" if len(ends["seeds"]) > 1 else " (1 seed)"
            shown = {"greedy": named(arm) + seeds}.get(score, "")
            cells = [shown, score.replace("pass@1", "sampled"), _gain(ends[score])]
            cells.append(f"{ends[score]['holm']:.3f}")
            cells += [_gain(equal[axis][score]) if equal[axis] else "" for axis in axes]
            yield f"| {' | '.join(cells)} |"


def overview(compared: Iterable[tuple[str, Found]]) -> Iterator[str]:
    """The gains of the arms that matter most, in every family."""
    yield "## In short: gains over OPD, in points"
    yield ""
    yield "| family | warm start | opd | arm | greedy | pass@1 | time |"
    yield "|---|---|---|---|---|---|---|"
    for family, found in compared:
        base, summary = found["baseline"], found["summary"]
        levels = [
            " / ".join(_percent(scores[score]) for score in ("greedy", "pass@1"))
            for scores in (found["starts"]["warm start"], summary[base])
        ]
        for arm in filter(summary.get, SHOWN):
            gains = [_gain(summary[arm][f"{score}_vs_{base}"]) for score in ("greedy", "pass@1")]
            cells = [family, *levels, arm, *gains, f"{summary[arm]['seconds_ratio']:.2f} x"]
            yield f"| {' | '.join(cells)} |"


def comparison(title: str, command: str, found: Found) -> Iterator[str]:
    """One family's arms."""
    base, summary = found["baseline"], found["summary"]
    problems = summary[base]["greedy"]["problems"]
    yield f"## {title}: {len(found['seeds'])} seeds, {problems} test problems"
    yield ""
    yield f"`{command}`"
    yield ""
    over = f"over {base} | in its time"
    yield f"| arm | greedy | {over} | pass@1 | {over} | time | teacher tokens |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for start, figures in found["starts"].items():
        scores = [_percent(figures[score]) for score in ("greedy", "pass@1")]
        yield f"| {start} | {scores[0]} | | | {scores[1]} | | | | |"
    for arm, figures in summary.items():
        cells = [arm]
        for score in ("greedy", "pass@1"):
            versus = (f"{score}_vs_{base}", f"{score}_vs_{base} at equal time")
            cells.append(_percent(figures[score]))
            cells += ["", ""] if arm == base else [_gain(figures[key]) for key in versus]
        cells += [f"{figures['seconds_ratio']:.2f} x", f"{figures['teacher_tokens']:,.0f}"]
        yield f"| {' | '.join(cells)} |"


def detectors(family: str, found: Found) -> Iterator[str]:
    """One family's detectors."""
    settings = found["settings"]
    count, length = settings["rollouts"], settings["window_length"]
    yield f"## Detectors on {family}: {count} rollouts, K = {length}"
    yield ""
    folder = "imitated/guesses-many/final" if family == "guesses" else f"compare-{family}"
    yield f"`python -m bench.detectors {family} runs/{folder}/warmstart/student`"
    yield ""
    yield "| detector | AUC, all tokens | AUC, loud tokens | precision, all | precision, loud |"
    yield "|---|---|---|---|---|"
    whole, loud = found["all tokens"], found["loud tokens"]
    for name, figures in whole["detectors"].items():
        other = loud["detectors"][name]
        yield (
            f"| {name} | {_auc(figures['auc'])} | {_auc(other['auc'])} "
            f"| {figures['precision']:.2f} | {other['precision']:.2f} |"
        )
    yield ""
    yield (
        f"{whole['forks']} forks among {whole['tokens']:,} tokens, {loud['forks']} among the "
        f"{loud['tokens']} loud ones. As many tokens are chosen as there are forks, so precision "
        "is recall too."
    )


def _percent(found: Found) -> str:
    return f"{100 * found['mean']:.1f}"


def _gain(found: Found) -> str:
    mean, low, high = (100 * found[key] for key in ("mean", "low", "high"))
    bold = "**" if low > 0 else ""
    return f"{bold}{mean:+.1f}{bold} [{low:.1f}, {high:.1f}]"


def _auc(found: Found) -> str:
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


if __name__ == "__main__":
    main()
