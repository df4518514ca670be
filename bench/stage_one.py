"""By which loss to imitate: stage 1 by cross-entropy, by forward KL, and by half of each.

::

    python -m bench.stage_one FAMILY SUPPLY [--folder F] [--jobs N]

From the base student, the same number of updates on ``SUPPLY`` answers of the teacher; each loss
at its own best rate, tuned on validation problems as in :mod:`bench.imitated`, then five other
seeds, each with answers of its own, on test problems: greedy, sampled at temperature 1, and twice
at temperature 0.6 with top-p 0.95. ``docs/results/stage-one-FAMILY-SUPPLY.json`` gets it.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.imitated import ANSWERS, HIGHER, TOKENS, Setting
from bench.sharpness import served

UPDATES = 300
CE = "cross-entropy"
LOSSES = {CE: 0.0, "half of each": 0.5, "forward KL": 1.0}  # kd_ratio
RESULTS = Path("docs/results")


def main() -> None:
    """Tune, run, and sample once more as students are served."""
    parser = argparse.ArgumentParser()
    parser.add_argument("family", choices=TOKENS)
    parser.add_argument("supply", choices=("few", "many"))
    parser.add_argument("--folder", type=Path, default=Path("runs/stage-one"))
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    setting = Setting(asked.family, asked.supply, asked.folder, asked.jobs, updates=UPDATES)
    setting = replace(setting, arms=losses(ANSWERS[asked.supply]), rates=HIGHER)
    rates = setting.tuned_rates(None)
    arms = {arm: {**setting.arms[arm], "learning_rate": rates[arm]["chosen"]} for arm in LOSSES}
    found = setting.compared("final", arms, None)
    found |= {"rates": rates}
    found |= {"served": served(setting.folder / "final" / "arms", asked.family, LOSSES, (CE,))}
    path = RESULTS / f"stage-one-{asked.family}-{asked.supply}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")


def losses(answers: int) -> dict[str, dict[str, Any]]:
    """The three arms."""
    shared = {"stage": "warmstart", "answers": "teacher", "data.limit": answers}
    return {
        arm: {**shared, "max_steps": UPDATES, "kd_ratio": kd_ratio}
        for arm, kd_ratio in LOSSES.items()
    }


if __name__ == "__main__":
    main()
