"""Whether all runs of a comparison answer the same problems, which is known before one runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from topd.commands.compare.start import Comparison
from topd.commands.compare.summary import Result
from topd.commands.train import make_evaluator
from topd.errors import TOPDError
from topd.evaluate import Evaluator
from topd.evaluate.evaluation import first_rows
from topd.runs.files import digest


def problems_digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of the rows that are asked, with their references, in order."""
    return digest(json.dumps([dict(row) for row in rows], default=str, sort_keys=True).encode())


def check_problems(comparison: Comparison, arms: Sequence[str], results: Sequence[Result]) -> None:
    """Hold the problems of the runs to come, and of those that are done, against each other.

    Args:
        comparison: its arms, all of them.
        arms: which of them have runs to come.
        results: the runs that are done.

    Raises:
        TOPDError: they differ.
    """
    kinds = dict[str, Evaluator]()
    done = {f"{r['arm']}, seed {r['seed']}": r for r in results}
    sizes = [(run, len(r["solved"]["greedy"])) for run, r in done.items()]
    rows = [(run, r["problems"]) for run, r in done.items() if "problems" in r]
    repeats = []
    for arm in arms:
        recipe, _ = comparison.arms[arm]
        kind = json.dumps([recipe.sources(), recipe.args.chat_template_kwargs], default=str)
        if kind not in kinds:
            evaluator = make_evaluator(recipe)
            assert evaluator is not None  # checked before
            kinds[kind] = evaluator
        prompts = kinds[kind].prompts
        repeats.append((arm, first_rows(prompts)))
        sizes.append((arm, len(prompts) - len(repeats[-1][1])))
        rows.append((arm, problems_digest(kinds[kind].rows)))
    for found in (sizes, repeats, rows):
        for run, problems in found:
            if problems != found[0][1]:
                raise TOPDError(
                    f"compare: {found[0][0]} and {run} have different problems, and runs are "
                    "compared problem by problem. The data of the evaluation may have changed. "
                    "Rows with one prompt are one problem, which older versions did not know and a "
                    "chat template may change. Give all arms one evaluation, leave out rows that "
                    "repeat a prompt, and choose another folder."
                )
