"""docs/evidence.md from the committed results: ``python -m bench.evidence``."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path("docs/results")
FAMILIES = ("arithmetic", "programs", "logic")
COMPARISONS = {family: family.capitalize() for family in FAMILIES} | {"sweeps": "Sweeps"}
Found = Mapping[str, Any]


def main() -> None:
    """Write the page."""
    text = (RESULTS / "evidence_head.md").read_text(encoding="utf-8")
    parts = [text.strip()]
    for name, title in COMPARISONS.items():
        path = RESULTS / f"compare-{name}.json"
        if path.exists():
            parts.append("\n".join(comparison(name, title, json.loads(path.read_text()))))
    for family in FAMILIES:
        path = RESULTS / f"detectors-{family}.json"
        if path.exists():
            parts.append("\n".join(detectors(family, json.loads(path.read_text()))))
    Path("docs/evidence.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def comparison(name: str, title: str, found: Found) -> Iterator[str]:
    """The arms of one comparison."""
    base, summary = found["baseline"], found["summary"]
    problems = summary[base]["greedy"]["problems"]
    yield f"## {title}: {len(found['seeds'])} seeds, {problems} test problems"
    yield ""
    yield f"`topd compare recipes/testbed/{name}.yaml`"
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
