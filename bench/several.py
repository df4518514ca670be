"""Two teachers by column against one teacher for each half: is one student as good as two?

::

    python -m bench.several [--folder F]

Two families of the testbed get one vocabulary. A teacher of each and a student of both are made
(``F/models``), and the student is warm-started on solutions of both, once. Then there are:

- *both*: ``UPDATES`` updates on the prompts of both, each row's teacher named in its column;
- *arithmetic*, *programs*: one student each, half of the updates on its own prompts.

So an update has as many rollouts in all three, and *both* sees each family's prompts as often as
the student of that family does. Each of the three has its learning rate from ``RATES``, by
validation problems of its own families and ``TUNING_SEED``: as many updates for the one student as
for the two. A problem's score is the mean of a greedy and a sampled answer's.

Written down before the runs of ``SEEDS``: *at least as well* is that over all test problems of both
families the 95 % interval, over seeds and problems, of one student's score less that of the
problem's own student lies above ``-MARGIN``. ``docs/results/several.json`` gets everything,
``docs/how-to/several-teachers.md`` the table.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from topd import TOPDConfig, TOPDTrainer
from topd.engines.hf import HFEngine
from topd.inputs.models import ModelSpec
from topd.inputs.teachers import Teachers
from topd.statistics import seed_problem_interval
from topd.testbed import FAMILIES, Family, problems, write
from topd.testbed.models import make
from topd.testbed.world import REFERENCE, State, Step
from topd.training.warmstart import WarmstartConfig, WarmstartTrainer
from topd.types import Sampling

PAGE = Path("docs/how-to/several-teachers.md")
MARK = "## One student or two?"
NAMES = ("arithmetic", "programs")
WORDS = tuple(dict.fromkeys(word for name in NAMES for word in FAMILIES[name].vocabulary))
WHOSE = ("both", *NAMES)
WAYS = {"greedy": 0.0, "sampled": 1.0}
SEEDS, UPDATES, PROMPTS, TESTS, TOKENS = (0, 1, 2, 3, 4), 160, 4000, 500, 64
TUNING_SEED, RATES, TUNED_ON = 100, (5e-4, 1e-3), 300  # validation problems
MARGIN = 0.05
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "max_completion_length": TOKENS,
    "save_strategy": "no",
    "log_rollouts": False,
    "use_cpu": True,
    "disable_tqdm": True,
}


class Wider:
    """A family in a vocabulary that has more words than its own."""

    vocabulary = WORDS

    def __init__(self, family: Family) -> None:
        self.family, self.name = family, family.name
        self.result_is_proof = family.result_is_proof

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)


class Both:
    """The problems of all families in turn; a state says whose it is."""

    name, vocabulary, result_is_proof = NAMES[0], WORDS, False  # held-out problems: see prompts

    def prompts(self, rng: random.Random, count: int) -> list[str]:
        """Of every family as many, none of its held-out problems."""
        found = [
            [p for p in FAMILIES[name].prompts(rng, count // len(NAMES)) if p not in held_out]
            for name, held_out in ((name, {*problems(name, "test")}) for name in NAMES)
        ]
        return [prompt for prompts in zip(*found, strict=False) for prompt in prompts]

    def start(self, prompt: str) -> State:
        name = family_of(prompt)
        return name, FAMILIES[name].start(prompt)

    def steps(self, state: Any) -> Sequence[Step]:
        return _within(state[0], FAMILIES[state[0]].steps(state[1]))

    def mistakes(self, state: Any) -> Sequence[Step]:
        return _within(state[0], FAMILIES[state[0]].mistakes(state[1]))

    def check(self, prompt: str, response: str) -> bool:
        return FAMILIES[family_of(prompt)].check(prompt, response)


def _within(name: str, steps: Sequence[Step]) -> list[Step]:
    return [
        step if step.after is None else replace(step, after=(name, step.after)) for step in steps
    ]


def family_of(prompt: str) -> str:
    """Sums end with ``=``, programs with a colon."""
    return NAMES[0] if prompt.endswith("=") else NAMES[1]


def make_models(folder: Path) -> None:
    """Two teachers and the student, where they are not made yet."""
    wanted = {
        **{name: (Wider(FAMILIES[name]), "teacher") for name in NAMES},
        "student": (Both(), "student"),
    }
    for name, (family, role) in wanted.items():
        if not (folder / name / "model.safetensors").exists():
            make(family, role, folder / name)  # type: ignore[arg-type]


def rows_of(name: str, split: str, count: int) -> list[dict[str, str]]:
    """Problems of a family, each with its teacher's name and a solution in the student's habits."""
    return [
        {
            "prompt": prompt,
            "teacher": name,
            "solution": write(FAMILIES[name], prompt, REFERENCE, random.Random(prompt)),
        }
        for prompt in problems(name, split, count)
    ]


def mixed(count: int) -> list[dict[str, str]]:
    """As many rows of each family, in turn."""
    parts = [rows_of(name, "train", count) for name in NAMES]
    return [row for pair in zip(*parts, strict=True) for row in pair]


def warm_start(models: Path, folder: Path) -> Path:
    """The student after stage 1 on solutions of both families; made once."""
    if not (folder / "student" / "README.md").exists():
        shutil.rmtree(folder, ignore_errors=True)
        args = WarmstartConfig(
            answers="data",
            kd_ratio=0.0,
            max_steps=140,
            learning_rate=1e-3,
            output_dir=str(folder),
            **COMMON,
        )
        teacher = str(models / NAMES[0])
        rows = mixed(2240)
        WarmstartTrainer(str(models / "student"), teacher, args, train_dataset=rows).train()
    return folder / "student"


def learned(models: Path, start: Path, folder: Path, whose: str, *, seed: int, rate: float) -> Path:
    """A student of both teachers, or of one with half of the updates."""
    if not (folder / "student" / "README.md").exists():
        shutil.rmtree(folder, ignore_errors=True)
        both = whose == "both"
        places = {name: str(models / name) for name in NAMES}
        TOPDTrainer(
            str(start),
            Teachers(places) if both else places[whose],
            TOPDConfig(
                max_steps=UPDATES if both else UPDATES // 2,
                output_dir=str(folder),
                learning_rate=rate,
                seed=seed,
                **COMMON,
            ),
            train_dataset=mixed(PROMPTS) if both else rows_of(whose, "train", PROMPTS),
        ).train()
    return folder / "student"


def tuned(models: Path, start: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Of each student the rate that is best on validation problems, and the scores of all."""
    found: dict[str, dict[str, Any]] = {}
    for whose in WHOSE:
        scores = {}
        for rate in RATES:
            place = folder / f"{whose}-{rate:g}"
            student = learned(models, start, place, whose, seed=TUNING_SEED, rate=rate)
            known = scored(place, student, "validation", TUNED_ON)
            own = NAMES if whose == "both" else (whose,)
            scores[f"{rate:g}"] = fmean(x for name in own for x in score(known, name))
            print("tuning", whose, rate, scores[f"{rate:g}"], flush=True)
        best = max(scores, key=scores.__getitem__)
        found[whose] = {"chosen": float(best), "validation": scores}
    return found


def solved(student: Path, name: str, asked: Sequence[str], temperature: float) -> list[float]:
    """Of every problem of a family whether the student's answer is right."""
    spec = ModelSpec(path=str(student))
    tokenizer = spec.load_tokenizer()
    engine = HFEngine(spec.load_model(), eos_ids=(tokenizer.eos_token_id,))
    answers = engine.generate(
        [tuple(tokenizer(prompt)["input_ids"]) for prompt in asked],
        Sampling(temperature, max_new_tokens=TOKENS),
        range(len(asked)),
    )
    texts = [tokenizer.decode(a.tokens, skip_special_tokens=True) for a in answers]
    pairs = zip(asked, texts, strict=True)
    return [float(FAMILIES[name].check(prompt, text)) for prompt, text in pairs]


def scored(
    folder: Path, student: Path, split: str = "test", count: int = TESTS
) -> dict[str, list[float]]:
    """Family and way of writing to what was solved; kept in a file."""
    path = folder / f"solved-{split}.json"
    if not path.exists():
        found = {
            f"{name}, {way}": solved(student, name, problems(name, split, count), temperature)
            for name in NAMES
            for way, temperature in WAYS.items()
        }
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


def score(known: dict[str, list[float]], name: str) -> list[float]:
    """Of every problem of a family the mean of all ways of writing."""
    return [fmean(ways) for ways in zip(*(known[f"{name}, {way}"] for way in WAYS), strict=True)]


def summary(folder: Path, start: Path) -> dict[str, Any]:
    """Scores of all students, and the difference of both teachers and one, with intervals."""
    runs = {
        (whose, seed): scored(folder / f"{whose}-{seed}", folder / f"{whose}-{seed}" / "student")
        for whose in WHOSE
        for seed in SEEDS
    }
    before = scored(start.parent, start)

    def by_seed(whose: str, name: str) -> list[list[float]]:
        return [score(runs[whose, seed], name) for seed in SEEDS]

    parts = {
        name: _row(
            score(before, name),
            *(by_seed(whose, name) for whose in ("both", name, _other(name))),
        )
        for name in NAMES
    }
    each = [(name, way) for name in NAMES for way in WAYS]
    for name, way in each:
        key = f"{name}, {way}"
        students = ("both", name, _other(name))
        found = ([runs[whose, seed][key] for seed in SEEDS] for whose in students)
        parts[key] = _row(before[key], *found)
    together = (
        [[*a, *b] for a, b in zip(*(by_seed(w, name) for w, name in pairs), strict=True)]
        for pairs in zip(
            *([("both", name), (name, name), (_other(name), name)] for name in NAMES), strict=True
        )
    )
    whole = _row([x for name in NAMES for x in score(before, name)], *together)
    return {"scores": {"both families": whole, **parts}}


def _row(
    before: Sequence[float],
    both: list[list[float]],
    own: list[list[float]],
    other: list[list[float]],
) -> dict[str, Any]:
    """Scores [seeds, problems] of students with intervals; means of ``before`` and ``other``."""
    gap = [[x - y for x, y in zip(*pair, strict=True)] for pair in zip(both, own, strict=True)]
    return {
        "start": fmean(before),
        "both": asdict(seed_problem_interval(both, bounds=(0, 1))),
        "one": asdict(seed_problem_interval(own, bounds=(0, 1))),
        "difference": asdict(seed_problem_interval(gap)),
        "difference by seed": [fmean(row) for row in gap],
        "other": fmean(map(fmean, other)),
    }


def _other(name: str) -> str:
    return next(other for other in NAMES if other != name)


def table_of(found: dict[str, Any]) -> str:
    """The section of the page."""
    how = found["settings"]
    lines = [
        "| test problems | start | their own teacher's student | both teachers' student | "
        "difference, points | the other teacher's student |",
        "|---|---|---|---|---|---|",
    ]
    for key, row in found["scores"].items():
        cells = [f"{100 * row[arm]['mean']:.1f}" for arm in ("one", "both")]
        gap = row["difference"]
        points = [f"{100 * gap[end]:+.1f}" for end in ("mean", "low", "high")]
        lines.append(
            f"| {key} | {100 * row['start']:.1f} | {cells[0]} | {cells[1]} | "
            f"{points[0]} ({points[1]} to {points[2]}) | {100 * row['other']:.1f} |"
        )
    margin, low = 100 * how["margin"], 100 * found["scores"]["both families"]["difference"]["low"]
    answer = (
        "One student of both teachers is at least as good as two students that learn of one each"
        if low > -margin
        else "It is not shown that one student of both teachers is as good as two of one each"
    )
    edge = all(tuning["chosen"] == RATES[-1] for tuning in found["rates"].values())
    rates = ", ".join(f"{whose} {tuning['chosen']:g}" for whose, tuning in found["rates"].items())
    return "\n".join(
        [
            f"{MARK}\n",
            f"{answer}:",
            "over both families the 95 % interval of the difference begins at "
            f"{low:+.1f} points, and {-margin:+.0f} was the margin written down",
            "before. A student of the other teacher is where forgetting shows.\n",
            "Test problems solved, percent, the mean of a greedy and a sampled answer: one student "
            f"with both teachers after {how['updates']}",
            f"updates, against two students with one teacher each after {how['updates'] // 2}; "
            f"{how['rollouts']} rollouts an update, `opd`, {len(how['seeds'])} seeds,",
            f"{how['problems']} problems a family; 95 % intervals over seeds and problems. Rates "
            "by validation problems, two tried for",
            f"each student: {rates}{' (the higher one: all may want more)' * edge}.",
            "Tiny models of the testbed, in one vocabulary (`python -m bench.several`, "
            "`docs/results/several.json`).\n",
            *lines,
            "",
        ]
    )


def main() -> None:
    """Models, rates, runs, results, table; everything that is there already is kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/several"))
    folder = parser.parse_args().folder
    models = folder / "models"
    make_models(models)
    start = warm_start(models, folder / "start")
    rates = tuned(models, start, folder / "tuning")
    for seed in SEEDS:
        for whose in WHOSE:
            place, rate = folder / f"{whose}-{seed}", rates[whose]["chosen"]
            scored(place, learned(models, start, place, whose, seed=seed, rate=rate))
            print(whose, seed, flush=True)
    settings = {
        **{"updates": UPDATES, "rollouts": COMMON["per_device_train_batch_size"]},
        **{"seeds": SEEDS, "problems": TESTS, "margin": MARGIN},
    }
    found = {"settings": settings, "rates": rates, **summary(folder, start)}
    Path("docs/results/several.json").write_text(json.dumps(found, indent=1) + "\n")
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(head + table_of(found), encoding="utf-8")


if __name__ == "__main__":
    main()
