"""All methods from one student that has imitated: which are worth more seeds and more worlds?

::

    python -m bench.screening [--folder F] [--jobs N]

One world (arithmetic), one start (stage 1 on 320 of the teacher's answers, as ``bench.imitated
arithmetic few`` tunes it; a finished folder of that command may be copied to ``F``, and its runs
are kept). Every arm has as many updates, and its learning rate from validation problems with one
seed: four rates, and one more beyond while the best is the lowest or the highest tried. Then two
seeds on test problems. ``docs/results/screening-arithmetic-few.json`` gets the comparison after
every pass, so that what is there can be read while the rest is missing;
``python -m bench.evidence`` makes the table of it, and says what was left out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bench.imitated import ARMS, FORK, LONGEST, NEW, SAME, SAME_BY_CE, Setting, controls_of

FAMILY, SUPPLY = "arithmetic", "few"
RATES, SEEDS = (5e-4, 1e-3, 2e-3, 4e-3), (0, 1)
AT_A_TIME = 4
GROUP = {"num_generations": 4, "method": "bench.controls:rl"}
FIRST = {arm: keys for arm, keys in ARMS.items() if arm != SAME_BY_CE}
SCREENED: dict[str, dict[str, Any]] = {
    **FIRST,
    "stage 1 continued, new answers, forward KL": {
        **ARMS[NEW],
        "kd_ratio": 1.0,
    },
    **controls_of(FAMILY),
    "opd, forward KL": {"method": "opd", "beta": 0.0},
    "windows to the end": {**FORK, "window_length": LONGEST, "method_options": {"after": 0.0}},
    "first_fork, windows again": {**FORK, "window_replay": 16},
    "opd, JSD": {"method": "opd", "beta": 0.5},
    "EOPD": {"method": "eopd"},
    "DIAL-OPD": {"method": "dial_opd"},
    "opd on prefixes": {"method": "opd", "max_completion_length": 20},
    "first_fork, until auto": {**FORK, "look_ahead_until": "auto"},
    "RL": GROUP | {"method_options": {"family": FAMILY}},
    "RL and opd": GROUP | {"method_options": {"family": FAMILY, "distil": 1.0}},
    "IER-OPD": {"method": "ier_opd"},
}
REFERENCES = ("opd", SAME, NEW)
LEFT_OUT = {
    SAME_BY_CE: "came later, in the tables of single worlds",
    "self-teacher, with no and with a wrong reference": "a teacher of another kind, another start",
    "iw_opd, kl_top, entropy_top, teachability, downweight": "not above OPD in the older tables",
    "window_sft, window_kd, relay": "windows at every fork; first_fork stands for them",
}


def main() -> None:
    """A few arms at a time: rates, then both seeds; the results so far are written after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/screening"))
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    arms = list(SCREENED.items())
    tried = Setting(FAMILY, SUPPLY, asked.folder).tried
    begun = max((n for n, (arm, _) in enumerate(arms, 1) if tried(arm)), default=0)
    for count in [*range(len(FIRST) + AT_A_TIME, len(arms), AT_A_TIME), len(arms)]:
        if count >= begun:  # a pass with fewer arms is behind us
            screen(dict(arms[:count]), asked.folder, asked.jobs)


def screen(arms: dict[str, Any], folder: Path, jobs: int) -> None:
    """Tune and compare these arms, and write what was found and what is missing."""
    setting = Setting(
        FAMILY, SUPPLY, folder, jobs, arms=arms, rates=RATES, seeds=SEEDS, references=REFERENCES
    )
    start = setting.tuned_start()
    found = setting.finished(start, setting.tuned_rates(start["chosen"]))
    missing = {arm: "not run" for arm in SCREENED if arm not in arms}
    path = Path("docs/results") / f"screening-{FAMILY}-{SUPPLY}.json"
    path.write_text(json.dumps({**found, "left_out": {**LEFT_OUT, **missing}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
