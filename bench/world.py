"""Is imitation not enough in a family? Stage 1 on all answers, up to its plateau and beyond.

::

    python -m bench.world FAMILY [--folder F] [--jobs N] [--kd-ratio R] [--updates 600 1200 2400]

It is not where, at the plateau of stage 1 on the teacher's answers to every training problem, the
student is at least ``APART`` under its teacher in greedy accuracy and the next longer stage 1 adds
at most ``MORE``: only there can on-policy learning do what more of the same cannot. The plateau is
that of ``bench.imitated``, on validation problems with one seed; R is the share of forward KL, the
rest is cross-entropy. Writes ``docs/results/world-FAMILY.json``; a run that is stopped continues.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.imitated import TOKENS, Setting
from topd.commands.compare import RESULTS, evaluated
from topd.commands.recipe import read_recipe
from topd.runs.files import read_lines

APART, MORE = 0.15, 0.03


def main() -> None:
    """Find the plateau and say what it is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("family", choices=TOKENS)
    parser.add_argument("--folder", type=Path, default=Path("runs/world"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--kd-ratio", type=float, default=0.0)
    parser.add_argument("--updates", type=int, nargs="+", default=(600, 1200, 2400, 4800))
    asked = parser.parse_args()
    setting = Setting(
        *(asked.family, "all", asked.folder, asked.jobs),
        start_updates=asked.updates,
        kd_ratio=asked.kd_ratio,
    )
    start = setting.tuned_start()
    lines = list(read_lines(setting.folder / "starts" / RESULTS))
    greedy = {run["arm"]: run["greedy"] for run in lines}
    teacher = {"student": f"testbed://{asked.family}/teacher"}
    theirs = evaluated(read_recipe(setting.folder / "starts.yaml", teacher))
    found = verdict(greedy, asked.updates, start["chosen"], theirs["greedy"]["mean"])
    path = Path("docs/results") / f"world-{asked.family}.json"
    path.write_text(json.dumps({**found, **start, "kd_ratio": asked.kd_ratio}, indent=1) + "\n")
    print(found)


def verdict(
    greedy: Mapping[str, float], updates: Sequence[int], chosen: Mapping[str, Any], teacher: float
) -> dict[str, Any]:
    """How far the student is under its teacher at the plateau, and what a longer stage 1 adds.

    ``greedy`` has the accuracies by "UPDATES at RATE". Without a longer one, ``adds`` is None and
    nothing is said.
    """
    best = {n: max(x for name, x in greedy.items() if name.startswith(f"{n} at")) for n in updates}
    student = best[chosen["max_steps"]]
    longer = [best[n] for n in sorted(updates) if n > chosen["max_steps"]]
    adds = max(longer) - student if longer else None
    under = teacher - student
    enough = None if adds is None else not (under >= APART and adds <= MORE)
    return {
        **{"teacher": teacher, "student": student, "under": under, "adds": adds},
        "imitation_is_enough": enough,
    }


if __name__ == "__main__":
    main()
