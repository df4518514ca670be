"""How often the gate fails what is not worse, and what is: ``python -m bench.gate``.

The base is a testbed teacher with noise on its weights, w (1 + s e), e standard normal, so that it
makes mistakes. Candidates have further noise: a little, which leaves them *alike*, or more, which
makes them *worse* by some points; each is redrawn, and so are problems and samples. What the
candidates' harms really are is measured on all problems of the family. And simulated answers whose
harm in both accuracies is *at the limit*, where false alarms are likeliest. And how often one
figure is called within its limit though the candidate is 5 points worse, or worse though it is at
the limit, with few problems and many. Writes docs/results/gate.json; ``--runs 0`` keeps what it has
of the testbed.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.stats import binomtest

from topd.commands.gate import Figure, Limits, Suite, compare_models, passed, verdict
from topd.engines.hf import HFEngine
from topd.evaluate import Evaluation, Evaluator, Response, summarise
from topd.evaluate.spec import EvaluationSpec
from topd.inputs.models import ModelSpec
from topd.statistics import paired_bootstrap
from topd.testbed import SCHEME

TOKENS = {"arithmetic": 64, "programs": 48, "logic": 112}
BASE = 0.25
SIZES = (10, 20, 50, 200)
LIMIT, HARM, ERROR = 0.02, 0.05, 0.05 / 7  # of a gate with all seven figures, at each end
GAINS = (0.0, 0.1)  # share of problems that only the candidate solves
RESULTS = Path("docs/results/gate.json")


@dataclass
class Testbed:
    """A family's noisy teacher and its problems."""

    family: str
    samples: int

    def __post_init__(self) -> None:
        source = ModelSpec(path=f"{SCHEME}{self.family}/teacher")
        self.model = source.load_model().eval()
        self.weights = dict(self.model.state_dict())
        self.weights = self.noisy(BASE, 0)
        self.suite = Suite(
            problems=EvaluationSpec(
                path=f"{SCHEME}{self.family}",
                samples=self.samples,
                max_tokens=TOKENS[self.family],
                temperature=1.0,
                top_p=1.0,
                batch_size=256,
            )
        )
        spec = self.suite.problems
        self.whole = spec.evaluator(spec.load(), source.load_tokenizer(), self.model.config)

    def noisy(self, noise: float, seed: int) -> dict[str, torch.Tensor]:
        """The weights with noise on them."""
        drawn = torch.Generator().manual_seed(seed)
        return {
            name: w * (1 + noise * torch.randn(w.shape, generator=drawn))
            for name, w in self.weights.items()
        }

    def answers(self, noise: float, seed: int, evaluator: Evaluator) -> Evaluation:
        """What the base answers with so much noise on it."""
        self.model.load_state_dict(self.noisy(noise, seed))
        return evaluator(HFEngine(self.model, eos_ids=[1]))

    def problems(self, count: int, seed: int) -> Evaluator:
        """So many problems, drawn by the seed, which is also that of the samples."""
        drawn = np.random.default_rng(seed).permutation(len(self.whole.prompts))[:count]
        return replace(self.whole, prompts=[self.whole.prompts[i] for i in drawn], seed=seed)

    def gate(self, noise: float, seed: int, count: int) -> list[Figure]:
        """One run of the gate on a candidate with so much noise."""
        asked = self.problems(count, seed)
        base, candidate = (self.answers(s, seed, asked) for s in (0.0, noise))
        return compare_models({"problems": base}, {"problems": candidate}, self.suite)


def at_the_limit(seed: int, count: int, samples: int) -> list[Figure]:
    """A run on simulated answers: base right in 70 % of cases, candidate in 68 %, paired."""
    drawn = np.random.default_rng(seed)
    hard, own = drawn.random((count, 1)), drawn.random((2, count, 1 + samples))
    both = [(hard + 0.5 * (x - 0.5)) % 1 < share for x, share in zip(own, (0.7, 0.68), strict=True)]
    base, candidate = (
        summarise(
            [
                Response(i, j - 1 if j else None, (1,), "", bool(right[i, j]), True)
                for i in range(count)
                for j in range(1 + samples)
            ]
        )
        for right in both
    )
    limits = Limits(length=None, truncated=None, repetition=None, calibration=None)
    suite = Suite(problems=EvaluationSpec(path="simulated"), limits=limits)
    return compare_models({"problems": base}, {"problems": candidate}, suite)


def few_problems(count: int, trials: int) -> dict[str, Any]:
    """How often a figure of so many problems is wrongly within or worse, with exact intervals."""
    found: dict[str, Any] = {}
    for gain in GAINS:
        for harm, wrong in ((HARM, "within"), (LIMIT, "within"), (LIMIT, "worse")):
            drawn = np.random.default_rng([count, round(1000 * harm), round(1000 * gain)])
            seen = 0
            for _ in range(trials):
                lot = drawn.random(count)
                lost, won = lot < harm + gain, lot > 1 - gain
                known = paired_bootstrap(
                    lost.astype(float).tolist(),
                    won.astype(float).tolist(),
                    level=1 - 2 * ERROR,
                    resamples=4000,
                )
                seen += verdict(known, LIMIT) == wrong
            exact = binomtest(seen, trials).proportion_ci()
            key = f"harm {harm:g}, gains {gain:g}: {wrong}"
            found[key] = [seen / trials, exact.low, exact.high]
    return found


def rate(runs: list[list[Figure]]) -> dict[str, Any]:
    """How often the gate failed, with its exact 95 % interval, why, and the mean harms."""
    failed = [not passed(figures, strict=False) for figures in runs]
    exact = binomtest(sum(failed), len(runs)).proportion_ci()
    return {
        "runs": len(runs),
        "failed": sum(failed),
        "share": [sum(failed) / len(runs), exact.low, exact.high],
        "passed_strict": sum(passed(figures, strict=True) for figures in runs),
        "worse_in": {
            name: sum(f.verdict == "worse" for run in runs for f in run if f.name == name)
            for name in (f.name for f in runs[0])
        },
        "mean_harm": {
            one[0].name: fmean(f.harm.mean for f in one) for one in zip(*runs, strict=True)
        },
    }


def main(
    family: str = "programs",
    runs: int = 60,
    problems: int = 200,
    samples: int = 2,
    alike: Annotated[float, typer.Option(help="Noise of candidates that are not worse.")] = 0.01,
    worse: Annotated[str, typer.Option(help="Noise of worse ones, by commas.")] = "0.1,0.15",
    simulated: int = 1000,
    trials: Annotated[int, typer.Option(help="Of each simulated figure.")] = 2000,
) -> None:
    """Run the gate on candidates that are alike, worse, and at the limit."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if runs:
        testbed = Testbed(family, samples)
        base = testbed.answers(0.0, 0, testbed.whole)
        found["settings"] = {
            "family": family, "problems": problems, "samples": samples, "base": BASE
        }  # fmt: skip
        found["base"] = {"greedy": base.greedy.mean, "pass@1": base.pass_at[1].mean}
        for noise in (alike, *map(float, worse.split(","))):
            gates = [testbed.gate(noise, seed, problems) for seed in range(1, runs + 1)]
            found[f"noise {noise:g}"] = rate(gates)
            print(noise, json.dumps(found[f"noise {noise:g}"]), flush=True)
    else:
        found = json.loads(RESULTS.read_text())
    found["few problems"] = {
        "settings": {"limit": LIMIT, "error": ERROR, "trials": trials},
        **{str(count): few_problems(count, trials) for count in SIZES},
    }
    print("few problems", json.dumps(found["few problems"], indent=1), flush=True)
    if simulated:
        limit = [at_the_limit(s, problems, samples) for s in range(simulated)]
        found["at the limit"] = rate(limit)
        print("at the limit", json.dumps(found["at the limit"]))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
