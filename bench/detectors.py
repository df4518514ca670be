"""Detectors against the labelled forks: ``python -m bench.detectors FAMILY STUDENT``.

STUDENT is a warm-started student, e.g. runs/compare-programs/warmstart/student. Writes
docs/results/detectors-FAMILY.json.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from topd.commands.detectors import label_rollouts, observer_of, table
from topd.engines.hf import HFEngine
from topd.inputs.models import ModelSpec
from topd.testbed import FAMILIES, SCHEME, problems
from topd.testbed.models import tokenizer_of
from topd.types import Prompt

LENGTHS = {"arithmetic": 64, "programs": 48, "logic": 112}


def main(
    family: str,
    student: str,
    rollouts: int = 200,
    window_length: int = 24,
    seed: Annotated[int, typer.Option(help="Of the student's rollouts.")] = 0,
) -> None:
    """Score every token up to the first fork with every detector."""
    torch.set_num_threads(1)
    tokenizer, texts = tokenizer_of(FAMILIES[family]), problems(family, "test", rollouts)
    ids = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    engines = [
        HFEngine(ModelSpec(path=path).load_model(), eos_ids=[1])
        for path in (student, f"{SCHEME}{family}/teacher")
    ]
    observer = observer_of(
        *engines, window_length=window_length, max_tokens=LENGTHS[family], seed=seed
    )
    prompts = [Prompt(i, row, row) for i, row in enumerate(ids)]
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    found = table(label_rollouts(FAMILIES[family], observer, prompts, texts, words))
    settings = {"rollouts": rollouts, "window_length": window_length, "seed": seed}
    path = Path("docs/results") / f"detectors-{family}.json"
    path.write_text(json.dumps({"settings": settings, **found}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    typer.run(main)
