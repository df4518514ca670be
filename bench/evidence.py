"""docs/evidence.md from the committed results: ``python -m bench.evidence``."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def _alone(window: int, until: int, more: str = "") -> str:
    """The words of a comparison of OPD and the default alone, on more problems."""
    fork = "method: first_fork, candidate_loss: surprise, false_alarm_share: 0.0"
    size = f"window_length: {window}, look_ahead_until: {until}"
    arms = f"{{opd: {{method: opd}}, first_fork: &d {{{fork}, {size}}}{more}}}"
    return f'--evaluation.limit 400 --compare.sweeps "[]" --compare.arms "{arms}"'


RESULTS = Path("docs/results")
FAMILIES = ("arithmetic", "programs", "logic")
SHOWN = ("topd", "window_sft", "first_fork", "first_fork, K 24", "first_fork, every update")
DEFAULT = {
    "arithmetic": _alone(12, 75, ", 'first_fork, every update': {<<: *d, look_ahead_until: 150}"),
    "programs": _alone(12, 50, ", 'first_fork, every update': {<<: *d, look_ahead_until: 140}"),
    "logic": _alone(24, 40),
}
# Measured when the recipe had fewer updates, of which OPD gained a little less than 10 points.
SHORTER = {"arithmetic": " --max_steps 120 --data.limit 3840 --evaluation.every 60"}
Found = Mapping[str, Any]


def main() -> None:
    """Write the page."""
    text = (RESULTS / "evidence_head.md").read_text(encoding="utf-8")
    parts = [text.strip()]
    compared, detected = _read("compare"), _read("detectors")
    parts.append("\n".join(overview([*compared.items(), *_read("default").items()])))
    for family, found in compared.items():
        parts.append(
            "\n".join(
                comparison(family.capitalize(), _command(family) + SHORTER.get(family, ""), found)
            )
        )
    for family, found in _read("default").items():
        title = f"The default on {family}, and what fits into 1.2 times OPD's time"
        command = f"{_command(family)} {DEFAULT[family]}"
        parts.append("\n".join(comparison(title, command, found)))
    parts += ["\n".join(detectors(*found)) for found in detected.items()]
    Path("docs/evidence.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _command(family: str) -> str:
    return f"topd compare recipes/testbed/{family}.yaml"


def _read(kind: str) -> dict[str, Found]:
    """What is measured of every family, of those where it is."""
    paths = {family: RESULTS / f"{kind}-{family}.json" for family in FAMILIES}
    return {f: json.loads(path.read_text()) for f, path in paths.items() if path.exists()}


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
    yield f"`python -m bench.detectors {family} runs/compare-{family}/warmstart/student`"
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
