"""A world whose forks are known: four families of problems, tiny models, a label a token.

Recipes name its parts as ``testbed://FAMILY`` (data, with the splits ``train``,
``validation`` and ``test``) and
``testbed://FAMILY/teacher`` or ``/student`` (models).
"""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from topd.errors import TOPDError
from topd.testbed.arithmetic import Arithmetic
from topd.testbed.guesses import Guesses
from topd.testbed.logic import Logic
from topd.testbed.programs import Programs
from topd.testbed.world import END, REFERENCE, Family, labels, write

__all__ = ["END", "FAMILIES", "SCHEME", "Family", "family_of", "labels", "problems", "write"]

SCHEME = "testbed://"
FAMILIES: dict[str, Family] = {f.name: f for f in (Arithmetic(), Programs(), Logic(), Guesses())}
SPLITS = {"test": 1000, "validation": 500, "train": 6000}
WEIGHTS = Path(__file__).parent / "weights"


def family_of(place: str) -> Family:
    """The family of ``testbed://FAMILY`` or ``testbed://FAMILY/ROLE``. Raises TOPDError if none."""
    name = place.removeprefix(SCHEME).split("/")[0]
    if name not in FAMILIES:
        raise TOPDError(f"{place}: the testbed has no family {name!r}, but {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def weights_of(place: str) -> Path:
    """The folder of ``testbed://FAMILY/ROLE``. Raises TOPDError if there is no such model."""
    family, role = family_of(place), place.rpartition("/")[2]
    if role not in ("teacher", "student"):
        raise TOPDError(f"{place}: name a model, testbed://{family.name}/teacher or /student.")
    return WEIGHTS / f"{family.name}-{role}"


@lru_cache(maxsize=16)
def problems(name: str, split: str, limit: int | None = None) -> tuple[str, ...]:
    """The prompts of a family's split: always the same ones, none in two splits."""
    if split not in SPLITS:
        raise TOPDError(f"{SCHEME}{name}: has no split {split!r}, but {', '.join(SPLITS)}.")
    family, count = FAMILIES[name], min(limit or SPLITS[split], SPLITS[split])
    before = [*SPLITS][: [*SPLITS].index(split)]
    held_out = {prompt for other in before for prompt in problems(name, other)}
    drawn = family.prompts(random.Random(split), count + len(held_out))
    return tuple(prompt for prompt in drawn if prompt not in held_out)[:count]


def rows_of(place: str, split: str, limit: int | None) -> list[dict[str, Any]]:
    """Rows of a split: ``prompt``, and a right ``solution`` with the student's surface habits."""
    family = family_of(place)
    return [
        {"prompt": prompt, "solution": write(family, prompt, REFERENCE, random.Random(prompt))}
        for prompt in problems(family.name, split, limit)
    ]


def verify(place: str) -> Any:
    """A verifier for the evaluation: whether a response solves its row's problem."""
    family = family_of(place)
    return lambda response, row: family.check(row["prompt"], response)
