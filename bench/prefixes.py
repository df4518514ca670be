"""Does OPD need whole rollouts? Their beginnings alone, from students that have imitated.

::

    python -m bench.prefixes FAMILY [--folder F] [--jobs N]

As ``bench.imitated FAMILY few_ce`` (docs/analysis-plan.md, point 26): its start and OPD's rate are
read from its table. OPD on the first half and the first quarter of rollouts, as long as OPD's were
on average there, is tuned as all methods are, and runs with as many updates as OPD, and with as
many as cost what OPD costs at r = 5. ``docs/results/prefixes-FAMILY.json`` gets the comparison.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from bench.imitated import ROLLOUTS, Arms, Found, Setting

RESULTS = Path("docs/results")
HALF, QUARTER = "opd, first half of rollouts", "opd, first quarter of rollouts"
FAMILIES = ("arithmetic", "programs", "logic")


def main() -> None:
    """Tune, compare, and write the table of one family."""
    parser = argparse.ArgumentParser()
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--folder", type=Path, default=Path("runs/prefixes"))
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    known = json.loads((RESULTS / f"imitated-{asked.family}-few_ce.json").read_text())
    start, arms = known["start"], prefixes(known["spent"]["opd"])
    tuning = Setting(asked.family, "few_ce", asked.folder, asked.jobs, arms=arms, kd_ratio=0.0)
    rates = {"opd": known["rates"]["opd"], **tuning.tuned_rates(start["chosen"])}
    whole = {"opd": {"method": "opd"}}
    final = replace(tuning, arms=whole | arms, references=("opd",), at_cost=(HALF, QUARTER))
    path = RESULTS / f"prefixes-{asked.family}.json"
    path.write_text(json.dumps(final.finished(start, rates), indent=1) + "\n")


def prefixes(spent: Found) -> Arms:
    """OPD on the beginnings of rollouts, by what OPD spent on whole ones.

    >>> arms = prefixes({"student_written": 40 * 32 * 160, "updates": 160})
    >>> [keys["max_completion_length"] for keys in arms.values()]
    [20, 10]
    """
    length = spent["student_written"] / spent["updates"] / ROLLOUTS
    return {
        arm: {"method": "opd", "max_completion_length": round(share * length)}
        for arm, share in ((HALF, 1 / 2), (QUARTER, 1 / 4))
    }


if __name__ == "__main__":
    main()
