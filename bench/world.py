"""Is imitation not enough in a family? Stage 1 on all answers, up to its plateau and beyond.

::

    python -m bench.world FAMILY [--folder F] [--jobs N] [--kd-ratio R] [--updates 600 1200 2400]

It is not where, at the plateau of stage 1 on the teacher's answers to every training problem, the
student's greedy accuracy is at least ``APART`` under that of these answers and a longer stage 1
adds at most ``MORE``: only there can on-policy learning do what more of the same cannot. The
plateau is that of ``bench.imitated``, on validation problems with one seed; R is the share of
forward KL, the rest is cross-entropy. Writes ``docs/results/world-FAMILY.json``; a run that is
stopped continues.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.imitated import ANSWERS, TOKENS, Setting
from topd.commands.compare import RESULTS
from topd.runs.files import read_lines
from topd.testbed import FAMILIES, problems
from topd.testbed.models import tokenizer_of

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
    starts = setting.folder / "starts"
    greedy = {run["arm"]: run["greedy"] for run in read_lines(starts / RESULTS)}
    answers = next((starts / "arms").glob("*/answers.jsonl"))
    found = verdict(greedy, asked.updates, start["chosen"], right(asked.family, answers))
    path = Path("docs/results") / f"world-{asked.family}.json"
    path.write_text(json.dumps({**found, **start, "kd_ratio": asked.kd_ratio}, indent=1) + "\n")
    print(found)


def right(family: str, answers: Path) -> float:
    """The share of the teacher's answers that are right, of all training problems."""
    tokenizer = tokenizer_of(FAMILIES[family])
    written = [json.loads(line) for line in answers.read_text().splitlines()[1:]]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    prompts = problems(family, "train", ANSWERS["all"])
    check = FAMILIES[family].check
    return fmean(check(*pair) for pair in zip(prompts, texts, strict=True))


def verdict(
    greedy: Mapping[str, float], updates: Sequence[int], chosen: Mapping[str, Any], teacher: float
) -> dict[str, Any]:
    """How far the student is under the teacher's answers at the plateau, and what more adds.

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
