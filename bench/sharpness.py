"""What is left of a gain when students are sampled as they are served: less by chance.

::

    python -m bench.sharpness [--folder F]

The students of ``bench.imitated`` (``F/FAMILY-SUPPLY/final/arms``) answer its test problems twice
more, at temperature 0.6 with top-p 0.95. Answers that the teacher drew so teach a sharper student,
which is right more often at temperature 1 without knowing more. ``docs/results/sharpness.json``
gets every world's accuracies and differences from OPD and from new answers; worlds that it has
are left as they are.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.imitated import ANSWERS, AS_OPD, FORK_BY_CE, NEW, SAME, SAME_BY_CE, SEEDS, TOKENS
from topd.commands.recipe import in_files
from topd.engines.hf import HFEngine
from topd.evaluate.spec import EvaluationSpec
from topd.inputs.models import ModelSpec, eos_ids
from topd.statistics import SHARES, seed_problem_interval

ARMS = ("opd", NEW, SAME_BY_CE, SAME, "first_fork", FORK_BY_CE, "topd", "OLIVE")
AT_COST = tuple(f"{arm}{AS_OPD}" for arm in ("first_fork", FORK_BY_CE, "OLIVE"))
PROBLEMS, SAMPLES = 400, 2
RESULT = Path("docs/results/sharpness.json")


def main() -> None:
    """All worlds whose students are there and that are not in the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/imitated"))
    folder = parser.parse_args().folder
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for world in (f"{family}-{supply}" for family in TOKENS for supply in ANSWERS):
        if world not in found and (folder / world / "final" / "compare.json").exists():
            found[world] = served(folder / world / "final" / "arms", world.partition("-")[0])
            RESULT.write_text(json.dumps(found, indent=1) + "\n")


def served(
    arms: Path,
    family: str,
    names: Iterable[str] = (*ARMS, *AT_COST),
    references: Iterable[str] = ("opd", NEW),
) -> dict[str, Any]:
    """Of arms with all seeds: accuracy, and over each reference, with its interval."""
    solved = {arm: list(of_seeds(arms, arm, family)) for arm in names}
    solved = {arm: runs for arm, runs in solved.items() if len(runs) == len(SEEDS)}
    return {
        "accuracy": {
            arm: asdict(seed_problem_interval(runs, bounds=SHARES)) for arm, runs in solved.items()
        },
        "against": {
            reference: {
                arm: asdict(seed_problem_interval(np.subtract(runs, solved[reference])))
                for arm, runs in solved.items()
                if arm != reference
            }
            for reference in references
        },
    }


def of_seeds(arms: Path, arm: str, family: str) -> Iterator[list[float]]:
    """[problems] shares of right answers, of every seed of an arm that has run."""
    for seed in SEEDS:
        if (place := arms / f"{in_files(arm)}-{seed}" / "student").exists():
            yield solved_by(place, family)


def solved_by(student: Path, family: str) -> list[float]:
    """The share of right answers, by problem."""
    spec = ModelSpec(path=str(student))
    model, tokenizer = spec.load_model().eval(), spec.load_tokenizer()
    asked = EvaluationSpec(
        path=f"testbed://{family}",
        split="test",
        limit=PROBLEMS,
        samples=SAMPLES,
        temperature=0.6,
        top_p=0.95,
        max_tokens=TOKENS[family],
        batch_size=512,
    )
    engine = HFEngine(model, eos_ids=eos_ids(model, tokenizer))
    evaluator = asked.evaluator(asked.load(), tokenizer, model.config)
    return evaluator(engine).solved()


if __name__ == "__main__":
    main()
