"""Two teachers by column against one teacher for each half: is one student as good as two?

::

    python -m bench.several [--folder F]

Two families of the testbed get one vocabulary. A teacher of each and a student of both are made
(``F/models``), and the student is warm-started on solutions of both, once. Then, for every seed:

- *both*: ``UPDATES`` updates on the prompts of both, each row's teacher named in its column;
- *arithmetic*, *programs*: one student each, half of the updates on its own prompts.

So an update has as many rollouts in all three, and *both* sees each family's prompts as often as
the student of that family does. Scores are greedy and sampled accuracy on test problems.
``docs/results/several.json`` gets everything, ``docs/how-to/several-teachers.md`` the table.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from topd.testbed import FAMILIES, Family, problems
from topd.testbed.models import make
from topd.testbed.world import State, Step

NAMES = ("arithmetic", "programs")
WORDS = tuple(dict.fromkeys(word for name in NAMES for word in FAMILIES[name].vocabulary))


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


def main() -> None:
    """Models, runs, results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/several"))
    asked = parser.parse_args()
    make_models(asked.folder / "models")


if __name__ == "__main__":
    main()
