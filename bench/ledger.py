"""What the ledger's chain costs, in seconds and bytes: ``python -m bench.ledger``."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from bench.pairs import SMOLLM2
from topd.inputs.models.fingerprints import model_fingerprint, trained_digest
from topd.runs.folder import RunFolder, rollout_record
from topd.runs.ledger import LEDGER
from topd.types import Prompt, Rollout

LENGTH, ROLLOUTS, UPDATES = 300, 4, 300


def seconds(work: Callable[[], object], times: int) -> float:
    """The median of so many calls."""
    spent = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return median(spent)


def main() -> None:
    """Fingerprints of SmolLM2-135M in float32, and records of rollouts of 300 tokens."""
    model = SMOLLM2.load_model()
    print(
        f"fingerprint of a model, once a run: {seconds(lambda: model_fingerprint(model), 5):.3f} s"
    )
    print(
        f"digest of the student, once an update: {seconds(lambda: trained_digest(model), 20):.4f} s"
    )
    logprobs = (-0.123456789012345,) * LENGTH
    rollout = Rollout(Prompt(3, (5,) * 100, (5,) * 100), (12345,) * LENGTH, logprobs, True)
    record = rollout_record(0, 1, rollout, logprobs, "word " * LENGTH)
    for chained in (False, True):
        with tempfile.TemporaryDirectory() as place:
            run = RunFolder(place, chained=chained)
            write = partial(run.append, "rollouts.jsonl", [record] * ROLLOUTS)
            spent = seconds(write, UPDATES)
            bytes_ = {path.name: path.stat().st_size for path in Path(place).iterdir()}
        count = ROLLOUTS * UPDATES
        print(
            f"{'with' if chained else 'without'} a chain: {1e3 * spent:.2f} ms for {ROLLOUTS} "
            f"records of {bytes_['rollouts.jsonl'] // count} bytes"
            + (f", and {bytes_[LEDGER] // count} bytes an entry" if chained else "")
        )


if __name__ == "__main__":
    main()
