"""Transport plans of all windows against loops over other solvers: ``python -m bench.transport``.

The student's windows are random tokens of a random embedding table; the teacher's are copies in
which half of the tokens are others. Float64, as the solver computes. In the second table one of the
teacher's windows in five was cut by the end of its text, so that the two lengths differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import ot
import ot.batch
import torch
import typer
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from bench.measure import RESULTS, Found, Table, environment, finish, paired, spread, summary
from topd.transport import ground_cost, solve

EPSILON = 0.05

Problem = tuple[Tensor, Tensor, Tensor]


def problem(windows: int, length: int, cut: float) -> Problem:
    """Costs [N K K] and the masks of student and teacher [N K]."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1000, 64, generator=generator, dtype=torch.float64)
    student, other = torch.randint(1000, (2, windows, length), generator=generator)
    kept = torch.rand(windows, length, generator=generator) < 0.5
    teacher = torch.where(kept, student, other)
    ends = torch.where(
        torch.rand(windows, generator=generator) < cut,
        torch.randint(1, length + 1, (windows,), generator=generator),
        length,
    )
    mask = torch.arange(length) < ends[:, None]
    return ground_cost(table[student], table[teacher]), torch.ones_like(mask), mask


def pot_loop(given: Problem) -> list[float]:
    """POT's exact solver, a window at a time."""
    cost, _, mask = given
    ends = mask.sum(-1).tolist()
    return [ot.emd2([], [], c[:, :m]) for c, m in zip(cost.numpy(), ends, strict=True)]


def scipy_loop(given: Problem) -> list[float]:
    """SciPy's assignment, a window at a time; for windows of equal lengths."""
    costs = given[0].numpy()
    return [float(c[linear_sum_assignment(c)].mean()) for c in costs]


def pot_sinkhorn(given: Problem) -> np.ndarray:
    """POT's batched Sinkhorn in the log domain."""
    found = ot.batch.solve_batch(given[0].numpy(), reg=EPSILON, method="log_sinkhorn")
    return found.value_linear


def groups(windows: int) -> tuple[tuple[str, int, float], ...]:
    """Name, number of windows, and share of cut ones, of every table."""
    return ("exact", windows, 0.0), ("cut", windows, 0.2), ("sinkhorn", max(1, windows // 20), 0.0)


def ways(group: str, given: Problem) -> dict[str, Callable[[], object]]:
    """What is compared in a table, ours first."""
    if group == "sinkhorn":
        return {
            "topd sinkhorn": lambda: solve(*given, method="sinkhorn", epsilon=EPSILON).distance,
            "POT batched Sinkhorn": lambda: pot_sinkhorn(given),
        }
    found: dict[str, Callable[[], object]] = {
        "topd exact": lambda: solve(*given).distance,
        "loop over POT's emd2": lambda: pot_loop(given),
    }
    if group == "exact":
        found["loop over SciPy"] = lambda: scipy_loop(given)
    return found


def main(
    windows: int = 1000,
    length: int = 50,
    runs: int = 6,
    results: Path = RESULTS,
) -> None:
    """Exact solvers on windows of equal and of different lengths, then Sinkhorn on fewer."""
    started, found = environment(), {}
    for name, count, cut in groups(windows):
        given = problem(count, length, cut)
        exact = torch.tensor(pot_loop(given), dtype=torch.float64)
        cases = ways(name, given)
        found[name] = summary(paired(cases, runs))
        for way, case in cases.items():
            gap = (torch.as_tensor(case()).double() - exact).abs().max()
            found[name][way]["gap"] = float(gap)
    settings = {
        "precision": "float64",
        "windows": windows,
        "length": length,
        "runs": runs,
    }
    finish("transport", settings, found, started, tables, results)


def tables(found: Found) -> Iterator[Table]:
    """What was measured, as tables."""
    settings = found["settings"]
    notes = {"exact": "", "cut": ", one in five cut", "sinkhorn": f", epsilon {EPSILON}"}
    for name, count, _ in groups(settings["windows"]):
        rows = [
            [way, f"{x['seconds']:.3f}", spread(x["ratio"]), f"{x['gap']:.0e}"]
            for way, x in found["results"][name].items()
        ]
        yield Table(
            f"Transport: {count:,} windows of {settings['length']} tokens{notes[name]}",
            ["solver", "seconds", "over topd", "largest gap to exact"],
            rows,
            f"Medians of {settings['runs']} paired runs. Gap: of distances, to POT's emd2.",
        )


if __name__ == "__main__":
    typer.run(main)
