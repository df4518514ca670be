"""docs/evidence.md from the committed results: ``python -m bench.evidence``."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path("docs/results")
FAMILIES = ("arithmetic", "programs", "logic")
Found = Mapping[str, Any]


def main() -> None:
    """Write the page."""
    text = (RESULTS / "evidence_head.md").read_text(encoding="utf-8")
    parts = [text.strip()]
    for family in FAMILIES:
        path = RESULTS / f"compare-{family}.json"
        if path.exists():
            parts.append("\n".join(comparison(family, json.loads(path.read_text()))))
    for family in FAMILIES:
        path = RESULTS / f"detectors-{family}.json"
        if path.exists():
            parts.append("\n".join(detectors(family, json.loads(path.read_text()))))
    Path("docs/evidence.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def comparison(family: str, found: Found) -> Iterator[str]:
    """One family's arms."""
    base, summary = found["baseline"], found["summary"]
    problems = summary[base]["greedy"]["problems"]
    yield f"## {family.capitalize()}: {len(found['seeds'])} seeds, {problems} test problems"
    yield ""
    yield f"`topd compare recipes/testbed/{family}.yaml`"
    yield ""
    yield f"| arm | greedy | over {base} | pass@1 | over {base} | time | teacher tokens |"
    yield "|---|---|---|---|---|---|---|"
    for name, start in found["starts"].items():
        yield f"| {name} | {_percent(start['greedy'])} | | {_percent(start['pass@1'])} | | | |"
    for arm, figures in summary.items():
        versus = [_gain(figures[f"{s}_vs_{base}"]) for s in ("greedy", "pass@1")]
        first, second = ("", "") if arm == base else versus
        yield (
            f"| {arm} | {_percent(figures['greedy'])} | {first} | {_percent(figures['pass@1'])} "
            f"| {second} | {figures['seconds_ratio']:.2f} x | {figures['teacher_tokens']:,.0f} |"
        )


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
