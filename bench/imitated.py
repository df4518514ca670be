"""From students that have imitated the teacher: which method then? Rates are tuned, for all alike.

::

    python -m bench.imitated FAMILY SUPPLY [--folder F] [--jobs N] [--tune-only]

SUPPLY is ``few`` (320 of the teacher's answers) or ``many`` (4,800), learned by forward KL, or
``few_ce`` or ``many_ce``, by cross-entropy. In five steps, each continued where it was stopped:

1. stage 1 with every number of updates and rate of ``START_*``, on validation problems, seed 100;
   the start is the shortest one whose next longer one is not ``PLATEAU`` better, at its best rate;
2. every arm from that start with the rates of ``RATES``, on validation problems, seed 100;
3. while an arm's best rate is the lowest or the highest tried, one more beyond it;
4. every arm with its own best rate and five other seeds, on test problems: ``F/final``;
5. those that look ahead (``AT_COST``) once more, with as many updates as cost no more than OPD's
   at r = 5, the learning rate annealed to that.

A score is the mean of greedy and sampled accuracy. ``docs/results/imitated-FAMILY-SUPPLY.json``
gets the comparison and what was tuned; ``python -m bench.evidence`` makes the page of it.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from topd.commands.compare import RESULTS, SUMMARY, run_compare
from topd.runs.files import read_lines
from topd.testbed.models import TOLD

ANSWERS = {  # all: of each training problem
    **{"few": 320, "few_ce": 320, "many": 4800, "many_ce": 4800, "all": 6000},
}
TOKENS = {"arithmetic": 64, "programs": 48, "logic": 64, "guesses": 48}
ANSWER = "{{ solution.split()[-1] }}"
READ = {"guesses": TOLD.format(prompt="{{ prompt }}", answer=ANSWER)}  # by the teacher
ANY = TOLD.format(prompt="{{ prompt }}", answer="{{ (solution.split() or [''])[-1] }}")  # or none
START_UPDATES, START_RATES = (150, 300, 600, 1200), (1e-3, 2e-3)
RATES, HIGHER = (2.5e-4, 5e-4, 1e-3), (1e-3, 2e-3, 4e-3)  # the latter: guesses
LEAST, MOST = 3e-5, 4e-2  # no rate is tried beyond them
PLATEAU = 0.02
UPDATES, ROLLOUTS, NEW_ANSWERS = 160, 32, 800
TUNING_SEED, SEEDS = 100, (0, 1, 2, 3, 4)
LONGEST = 64  # tokens of a response
PLAN = "docs/analysis-plan.md"
FORK = {"method": "first_fork"}
SAME = "stage 1 continued, same answers"
FORK_BY_CE = "first_fork, cross-entropy"
SAME_BY_CE = "stage 1 continued, same answers, cross-entropy"
NEW = "stage 1 continued, new answers, cross-entropy"
Arms = dict[str, dict[str, Any]]


def arms_of(updates: int = UPDATES, rollouts: int = ROLLOUTS) -> Arms:
    """The arms of every table; new answers have about as many tokens as first_fork's windows."""
    stage_1 = {"stage": "warmstart", "max_steps": updates}
    new = NEW_ANSWERS * updates * rollouts // (UPDATES * ROLLOUTS)
    return {
        "opd": {"method": "opd"},
        "first_fork": FORK,
        "random handover": {**FORK, "candidate_loss": "random"},
        "topd": {"method": "topd", "trajectory_weight": 0.1, "window_length": 24},
        SAME: {**stage_1, "answers": "start"},
        SAME_BY_CE: {**stage_1, "answers": "start", "kd_ratio": 0.0},
        NEW: {
            **{**stage_1, "answers": "teacher", "data.limit": new},
            **{"kd_ratio": 0.0, "max_steps": 2 * updates},
        },
        FORK_BY_CE: {**FORK, "method_options": {"loss": "cross_entropy"}},
    }


ARMS = arms_of()
OLIVE: dict[str, Any] = {
    **{"method": "olive", "candidate_loss": "random", "candidate_threshold": None},
    **{"candidate_fraction": 1e-6, "false_alarm_share": 0.0, "window_length": LONGEST},
    "trajectory_weight": 1.0,
}
TO_END = {
    **{**FORK, "window_length": LONGEST, "method_options": {"after": 0.0}},
    "look_ahead_until": None,
}
GUESSES = {
    **{arm: keys for arm, keys in ARMS.items() if arm != FORK_BY_CE},
    NEW: {**ARMS[NEW], "data.limit": ANSWERS["many"]},  # as many tokens as windows to the end have
    # about what windows to the end cost at r = 5
    "opd, three times the updates": {"method": "opd", "max_steps": 3 * UPDATES},
    "opd, forward KL": {"method": "opd", "beta": 0.0},
    "first_fork, by token loss and OT": {
        **{**FORK, "candidate_loss": "sampled"},
        "false_alarm_share": 0.5,
    },
    "OLIVE": OLIVE,
    "OLIVE, no reference": {**OLIVE, "reference": "none", "teacher_prompt": ANY},
    "OLIVE, a wrong reference": {**OLIVE, "reference": "wrong"},
    "random handover to the end": {**TO_END, "candidate_loss": "random"},
    "true fork to the end": {**TO_END, "candidate_loss": "bench.controls:oracle_guesses"},
}
AS_OPD = ", at opd's cost"
AT_COST = {
    "few": ("first_fork", FORK_BY_CE, "random handover"),
    "few_ce": (FORK_BY_CE,),
    "many": (FORK_BY_CE,),
    "many_ce": (FORK_BY_CE,),
    "all": (),
}
AFTER_CE = ("opd", SAME_BY_CE, NEW, FORK_BY_CE)  # arms after stage 1 by cross-entropy
GUESSES_AT_COST = ("OLIVE", "random handover to the end", "first_fork, by token loss and OT")
Found = dict[str, Any]


def controls_of(family: str) -> Arms:
    """Where to hand over: at the start, at the labelled fork; and whole answers from anywhere."""
    return {
        "start handover": {**FORK, "candidate_loss": "start"},
        "oracle fork": {**FORK, "candidate_loss": f"bench.controls:oracle_{family}"},
        "OLIVE": OLIVE,
        "GKD's mix": {"method": "opd", "teacher_share": 0.5, "window_temperature": 0.6},
    }


def main() -> None:
    """All five steps for one family and one supply."""
    parser = argparse.ArgumentParser()
    parser.add_argument("family", choices=TOKENS)
    parser.add_argument("supply", choices=ANSWERS)
    parser.add_argument("--folder", type=Path, default=Path("runs/imitated"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--tune-only", action="store_true")
    asked = parser.parse_args()
    setting = Setting(asked.family, asked.supply, asked.folder, asked.jobs)
    if asked.family == "guesses":
        references = ("opd", "opd, three times the updates", NEW, "OLIVE")
        setting = replace(setting, arms=GUESSES, rates=HIGHER, references=references, evaluations=4)
        setting = replace(setting, at_cost=GUESSES_AT_COST)
    elif asked.supply in ("few_ce", "many_ce"):
        arms = {arm: ARMS[arm] for arm in AFTER_CE}
        setting = replace(setting, arms=arms, at_cost=AT_COST[asked.supply], kd_ratio=0.0)
    else:
        arms = {**ARMS, **controls_of(asked.family)}
        setting = replace(setting, arms=arms, at_cost=AT_COST[asked.supply])
    start = setting.tuned_start()
    rates = setting.tuned_rates(start["chosen"])
    if asked.tune_only:
        return
    path = Path("docs/results") / f"imitated-{asked.family}-{asked.supply}.json"
    path.write_text(json.dumps(setting.finished(start, rates), indent=1) + "\n")


@dataclass
class Setting:
    """One family and one supply of answers; arms, their first rates and the seeds of the end.

    All arms are compared with ``references``; none: with every other. ``plan`` is the file that
    says how, written before.
    """

    family: str
    supply: str
    root: Path
    jobs: int = 1
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: ARMS)
    rates: Sequence[float] = RATES
    seeds: Sequence[int] = SEEDS
    references: Sequence[str] = ()
    plan: str = PLAN
    start_updates: Sequence[int] = START_UPDATES
    start_rates: Sequence[float] = START_RATES
    kd_ratio: float = 1.0  # of stage 1
    models: str = ""  # where student and teacher are; none: the family's own
    updates: int = UPDATES
    more: Mapping[str, Any] = field(default_factory=dict)  # settings of every run
    evaluations: int = 2  # along a run of the end
    at_cost: Sequence[str] = ()  # arms that run once more, at what OPD costs

    @property
    def answers(self) -> int:
        """How many of the teacher's answers stage 1 has."""
        return ANSWERS[self.supply]

    @property
    def tokens(self) -> int:
        """Of a response, at most."""
        return TOKENS[self.family]

    @property
    def folder(self) -> Path:
        """Where its steps are run."""
        return self.root / f"{self.family}-{self.supply}"

    def finished(self, start: Found, rates: Mapping[str, Found]) -> Found:
        """The comparison on test problems, every arm at its own best rate."""
        arms = {
            arm: {**keys, "learning_rate": rates[arm]["chosen"]} for arm, keys in self.arms.items()
        }
        if self.at_cost:
            arms |= self.shortened() or self.shorter(arms, start["chosen"])
        found = self.compared("final", arms, start["chosen"])
        return {**found, "start": start, "rates": rates}

    def shortened(self) -> Arms:
        """The arms at OPD's cost of a comparison that has begun with them."""
        path = self.folder / "final.yaml"
        known = yaml.safe_load(path.read_text())["compare"]["arms"] if path.exists() else {}
        return {arm: keys for arm, keys in known.items() if arm.endswith(AS_OPD)}

    def shorter(self, arms: Arms, start: Mapping[str, Any]) -> Arms:
        """Those arms, from what the others cost."""
        first = replace(self, references=("opd",)).compared("final", arms, start)
        return shorter({arm: arms[arm] for arm in self.at_cost}, first["spent"], self.updates)

    def tuned_start(self) -> Found:
        """How long stage 1 is, at which rate, and the scores of all that was tried."""
        arms = {
            f"{updates} at {rate:g}": {
                **{"stage": "warmstart", "answers": "teacher", "data.limit": self.answers},
                **{"max_steps": updates, "learning_rate": rate},
            }
            for updates in self.start_updates
            for rate in self.start_rates
        }
        self.compared("starts", arms, None)
        scores = self.scores("starts")
        tried = {
            (updates, rate): scores[f"{updates} at {rate:g}"]
            for updates in self.start_updates
            for rate in self.start_rates
        }
        return {"tried": scores, "chosen": plateau(tried)}

    def tuned_rates(self, start: Mapping[str, Any] | None) -> dict[str, Found]:
        """Of every arm the scores by rate, and the best rate."""
        wanted = {arm: sorted({*self.rates, *self.tried(arm)}) for arm in self.arms}
        while True:
            tried = self.tried_at(wanted, start)
            more = {arm: beyond(found) for arm, found in tried.items()}
            if not any(more.values()):
                return chosen(tried)
            for arm, rate in more.items():
                wanted[arm] += [rate] if rate else []

    def few_rates(self, start: Mapping[str, Any]) -> dict[str, Found]:
        """As tuned_rates, but in half of the updates, and no rate is tried beyond ``rates``."""
        arms = {
            arm: {**keys, "max_steps": keys.get("max_steps", self.updates) // 2}
            for arm, keys in self.arms.items()
        }
        wanted = dict.fromkeys(arms, self.rates)
        return chosen(replace(self, arms=arms).tried_at(wanted, start))

    def tried_at(
        self, wanted: Mapping[str, Sequence[float]], start: Mapping[str, Any] | None
    ) -> dict[str, dict[float, float]]:
        """The score of every arm with every rate that is wanted of it."""
        arms = {
            f"{arm} at {rate:g}": {**self.arms[arm], "learning_rate": rate}
            for arm, rates in wanted.items()
            for rate in rates
        }
        self.compared("rates", arms, start)
        scores = self.scores("rates")
        return {
            arm: {rate: scores[f"{arm} at {rate:g}"] for rate in rates}
            for arm, rates in wanted.items()
        }

    def tried(self, arm: str) -> list[float]:
        """The rates that an arm has been run with in this folder."""
        path = self.folder / "rates" / RESULTS
        names = [line["arm"] for line in read_lines(path)] if path.exists() else []
        return [
            float(name.rpartition(" at ")[2]) for name in names if name.startswith(f"{arm} at ")
        ]

    def scores(self, step: str) -> dict[str, float]:
        """The score of every run of a tuning step."""
        lines = read_lines(self.folder / step / RESULTS)
        return {run["arm"]: (run["greedy"] + run["pass@1"]) / 2 for run in lines}

    def compared(
        self, step: str, arms: Mapping[str, Any], start: Mapping[str, Any] | None
    ) -> Found:
        """compare.json of a step's arms, run by ``topd compare`` from the recipe kept beside it."""
        path = self.folder / f"{step}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(self.recipe(step, arms, start), sort_keys=False))
        run_compare(path)
        found: Found = json.loads((self.folder / step / SUMMARY).read_text())
        return found

    def recipe(
        self, step: str, arms: Mapping[str, Any], start: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """The recipe of one step: tuning is on validation problems, with a seed of its own."""
        world, final = f"testbed://{self.family}", step == "final"
        models = self.models or world
        every = self.updates // self.evaluations if final else 10_000
        common = {
            **{"max_completion_length": self.tokens, "per_device_train_batch_size": ROLLOUTS},
            **{"save_strategy": "no", "log_rollouts": False, "use_cpu": True},
            **({"teacher_prompt": READ[self.family]} if self.family in READ else {}),
            **self.more,
        }
        limit, split = (400, "test") if final else (300, "validation")
        sampling = {"samples": 1, "temperature": 1.0, "top_p": 1.0, "batch_size": 512}
        references = list(self.references or arms) if final else []
        return {
            "student": f"{models}/student",
            "teacher": f"{models}/teacher",
            "data": {"path": world, "limit": ROLLOUTS * self.updates},
            "evaluation": {
                **{"path": world, "split": split, "limit": limit, **sampling},
                **{"max_tokens": self.tokens, "every": every},
            },
            "output_dir": str(self.folder / step),
            "max_steps": self.updates,
            "learning_rate": 5e-4,
            **common,
            "warmstart": {
                "data": {"path": world, "limit": self.answers},
                **{"answers": "teacher", "answer_batch_size": 32, "kd_ratio": self.kd_ratio},
                **{"num_train_epochs": 1000, "max_steps": 150, "learning_rate": 1e-3},
                **(start or {}),
                **common,
            },
            "compare": {
                **{"warmstart": start is not None, "jobs": self.jobs, "clock": "cpu"},
                "seeds": list(self.seeds) if final else [TUNING_SEED],
                **{"baseline": next(iter(arms)), "references": references, "arms": dict(arms)},
                "plan": self.plan if final else None,
            },
        }


def shorter(arms: Mapping[str, Mapping[str, Any]], spent: Found, updates: int) -> Arms:
    """Arms of as many updates as cost no more than OPD's at r = 5, by what they cost before.

    >>> spent = {"opd": {"cost": {"5": 300.0}}, "olive": {"cost": {"5": 900.0}}}
    >>> shorter({"olive": {}}, spent, 160)
    {"olive, at opd's cost": {'max_steps': 53}}
    """
    budget = spent["opd"]["cost"]["5"]
    steps = {arm: int(updates * budget / spent[arm]["cost"]["5"]) for arm in arms}
    return {f"{arm}{AS_OPD}": {**keys, "max_steps": steps[arm]} for arm, keys in arms.items()}


def plateau(tried: Mapping[tuple[int, float], float]) -> Found:
    """Of starts by (updates, rate): the shortest whose next longer one gains less than PLATEAU."""
    best: dict[int, tuple[float, float]] = {}
    for (updates, rate), score in tried.items():
        best[updates] = max(best.get(updates, (0.0, 0.0)), (score, rate))
    steps = sorted(best)
    for shorter, longer in zip(steps, [*steps[1:], None], strict=True):
        if longer is None or best[longer][0] - best[shorter][0] < PLATEAU:
            return {"max_steps": shorter, "learning_rate": best[shorter][1]}
    raise AssertionError("there is always a longest one")


def chosen(tried: Mapping[str, Mapping[float, float]]) -> dict[str, Found]:
    """Of every arm the scores by rate, and the best rate."""
    return {
        arm: {
            "tried": {f"{rate:g}": score for rate, score in found.items()},
            "chosen": max(found, key=lambda rate: found[rate]),
        }
        for arm, found in tried.items()
    }


def beyond(tried: Mapping[float, float]) -> float | None:
    """The rate to try next: twice the highest or half the lowest, if that one is the best."""
    best = max(tried, key=lambda rate: tried[rate])
    if best == max(tried) and 2 * best <= MOST:
        return 2 * best
    if best == min(tried) and best / 2 >= LEAST:
        return best / 2
    return None


if __name__ == "__main__":
    main()
