"""Detectors against the labelled forks: ``python -m bench.detectors FAMILY STUDENT``.

STUDENT is a warm-started student, e.g. runs/compare-programs/warmstart/student or, of guesses,
runs/imitated/guesses-many/final/warmstart/student. Writes
docs/results/detectors-FAMILY.json. With ``--samples N`` both models also continue every prefix to
the end, N times, to see what comes of it (:mod:`topd.commands.probe.outcomes`): that writes
docs/results/outcomes-FAMILY-N.json and the table in docs/probe.md.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from bench.labelled import Labelled, label_rollouts, observer_of, table
from topd.engines.hf import HFEngine
from topd.inputs.models import ModelSpec
from topd.statistics import Interval
from topd.testbed import FAMILIES, SCHEME, problems
from topd.testbed.guesses import answer
from topd.testbed.models import TOLD, tokenizer_of
from topd.types import Prompt

LENGTHS = {"arithmetic": 64, "programs": 48, "logic": 112, "guesses": 48}
RESULTS, PAGE = Path("docs/results"), Path("docs/probe.md")
MARKS = ("<!-- outcomes -->\n", "<!-- end of outcomes -->\n")
RESAMPLES = 1000


def main(
    family: str,
    student: str,
    rollouts: int = 200,
    window_length: int = 24,
    seed: Annotated[int, typer.Option(help="Of the student's rollouts.")] = 0,
    samples: Annotated[int, typer.Option(help="Continuations to the end; 1: greedy.")] = 0,
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
    read = ids
    if family == "guesses":  # whose teacher is told
        told = [TOLD.format(prompt=text, answer=answer(text)) for text in texts]
        read = [tuple(tokenizer(text)["input_ids"]) for text in told]
    prompts = [Prompt(i, *rows) for i, rows in enumerate(zip(ids, read, strict=True))]
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    labelled = label_rollouts(FAMILIES[family], observer, prompts, texts, words, samples=samples)
    found = {"rollouts": rollouts, "window_length": window_length, "seed": seed}
    found = {"settings": found, **table(labelled)}
    if not samples:
        _write(RESULTS / f"detectors-{family}.json", found)
        return
    found["settings"]["samples"] = samples
    _write(RESULTS / f"outcomes-{family}-{samples}.json", {**found, "outcomes": outcomes(labelled)})
    write_page()


def outcomes(found: Labelled) -> dict[str, Any]:
    """How verified forks and labels agree, with intervals over rollouts, and what it cost."""
    assert found.verified is not None
    each = found.verified.outcomes
    verified = np.array([outcome.verified for outcome in each])
    right = {k: np.array([getattr(o, k) for o in each]) for k in ("before", "after", "alone")}
    return {
        "precision": _share(found.fork, verified, found.rollout),
        "recall": _share(verified, found.fork, found.rollout),
        **{f"{k} at forks": _share(v, found.fork, found.rollout) for k, v in right.items()},
        "verified": int(verified.sum()),
        "tokens": {**found.verified.tokens, "places": len(each)},
    }


def _share(values: np.ndarray, inside: np.ndarray, rollout: np.ndarray) -> dict[str, Any]:
    """The mean over some tokens; 95 % percentile bootstrap over rollouts."""
    names, place = np.unique(rollout, return_inverse=True)
    sums = np.bincount(place, values * inside), np.bincount(place, inside)
    weights = np.random.default_rng(0).multinomial(
        len(names), np.full(len(names), 1 / len(names)), RESAMPLES
    )
    top, bottom = (weights @ part for part in sums)
    low, high = np.quantile(top / bottom, [0.025, 0.975])
    return vars(Interval(float(sums[0].sum() / sums[1].sum()), low, high, len(names)))


def write_page() -> None:
    """Put the table into docs/probe.md."""
    before, after = MARKS
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(before)
    tail = rest.partition(after)[2]
    PAGE.write_text(f"{head}{before}{outcome_table()}{after}{tail}", encoding="utf-8")


def outcome_table() -> str:
    """The table of docs/probe.md, from docs/results."""
    return "".join(f"{line}\n" for line in _lines())


def _lines() -> Iterator[str]:
    yield (
        "| family | answers | forks, tokens | verified that are forks | forks that are verified "
        "| AUC of the drop | AUC of the gain | AUC of `surprise` "
        "| right before a fork, after it "
        "| tokens a place |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for path in sorted(RESULTS.glob("outcomes-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        whole, seen = found["all tokens"], found["outcomes"]
        areas = [
            _interval(whole["detectors"][name]["auc"], "{:.2f}")
            for name in ("outcome, drop", "outcome, gain", "surprise")
        ]
        count, spent = found["settings"]["samples"], seen["tokens"]
        cells = [
            path.stem.split("-")[1],
            "greedy" if count == 1 else f"{count} sampled",
            f"{whole['forks']}, {whole['tokens']:,}",
            *(_interval(seen[name], "{:.0%}") for name in ("precision", "recall")),
            *areas,
            f"{seen['before at forks']['mean']:.0%}, {seen['after at forks']['mean']:.0%}",
            f"{(spent['teacher'] + spent['student']) / spent['places']:.0f}",
        ]
        yield f"| {' | '.join(cells)} |"


def _interval(found: dict[str, Any], form: str) -> str:
    mean, low, high = (form.format(found[key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    typer.run(main)
