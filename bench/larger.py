"""The table of ``bench.imitated`` for models of 30 M parameters, judged in more ways.

::

    python -m bench.larger [--folder F] [--jobs N] [--make-only]

Arithmetic of the testbed. Teacher and base student (``F/models``) have 200 times the weights of
the package's own student and are made from scratch as those are; then everything is as in
``bench.imitated arithmetic few``, in bfloat16, with fewer updates and half as many rollouts in
each: stage 1 on 320 of the teacher's answers; of ``RATES`` the one that is best on validation
problems with one seed and half of the updates, none beyond them; three other seeds at the end.

Every student of the end answers 400 test problems as in the other tables, and 200 of them eight
times, at temperature 1 and at 0.6 with top-p 0.95 (sharpness is not skill): pass@1, pass@8, length.
What is forgotten: the perplexity of texts of the kind that the base student was made from. It is
for a CPU; nothing of it was learned from human language. ``docs/results/larger-arithmetic.json``
gets everything; a run that is stopped continues.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.imitated import FORK_BY_CE, NEW, OLIVE, SAME, Setting, arms_of
from topd.commands.workers import in_workers
from topd.engines.decode_check import check_decoding
from topd.engines.hf import HFEngine
from topd.evaluate.spec import EvaluationSpec
from topd.inputs.models import ModelSpec, eos_ids
from topd.testbed import END, FAMILIES, problems, write
from topd.testbed.models import Making, Role, make
from topd.testbed.world import STUDENT

FAMILY, UPDATES, ROLLOUTS, SEEDS = "arithmetic", 40, 16, (0, 1, 2)
TESTS, SAMPLED = 400, 200  # problems; the latter are answered eight times
MAKING: dict[Role, Making] = {
    "teacher": Making(512, 1408, steps=400, layers=10, learning_rate=1e-3),
    "student": Making(512, 1408, steps=200, layers=10, learning_rate=1e-3),
}
START_UPDATES, START_RATES = (60, 120, 240), (5e-4,)
RATES = (6e-5, 2e-4, 6e-4)
BF16 = {"bf16": True}
WAYS = {"temperature 1": (1.0, 1.0), "temperature 0.6, top-p 0.95": (0.6, 0.95)}


def main() -> None:
    """Make the models, tune, compare, and judge every student of the end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/larger"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--make-only", action="store_true")
    asked = parser.parse_args()
    models = asked.folder / "models"
    make_models(models)
    if asked.make_only:
        return
    arms = arms_of(UPDATES, ROLLOUTS) | {"OLIVE": OLIVE}
    setting = Setting(
        *(FAMILY, "few", asked.folder, asked.jobs),
        arms={arm: keys for arm, keys in arms.items() if arm != FORK_BY_CE},
        rates=RATES,
        seeds=SEEDS,
        references=("opd", SAME, NEW),
        start_updates=START_UPDATES,
        start_rates=START_RATES,
        models=str(models),
        updates=UPDATES,
        more={**BF16, "per_device_train_batch_size": ROLLOUTS},
    )
    start = setting.tuned_start()
    found = setting.finished(start, setting.few_rates(start["chosen"]))
    final = setting.folder / "final"
    students = {"stage 1": final / "warmstart" / "student", "base": models / "student"}
    students["teacher"] = models / "teacher"
    students |= {place.name: place / "student" for place in sorted((final / "arms").iterdir())}
    tasks = {name: (final / f"judged-{name}.json", place) for name, place in students.items()}
    judged = dict(sorted(in_workers(judge, tasks, asked.jobs)))
    path = Path("docs/results/larger-arithmetic.json")
    path.write_text(json.dumps({**found, "judged": judged}, indent=1) + "\n")


def make_models(folder: Path) -> None:
    """Both, where they are not made yet."""
    for role, making in MAKING.items():
        if not (folder / role / "model.safetensors").exists():
            more: dict[str, Any] = {"making": making, "batch_size": 32, "use_cpu": True, **BF16}
            make(FAMILIES[FAMILY], role, folder / role, **more)


def kept(path: Path, made: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is found of a student; from its file if it was judged before."""
    if not path.exists():
        path.write_text(json.dumps(made()) + "\n")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def judge(task: tuple[Path, Path]) -> dict[str, Any]:
    """Figures of a student by way of sampling, and its perplexity; kept in a file."""
    path, student = task

    def made() -> dict[str, Any]:
        model, tokenizer = loaded(student)
        asked = {"path": f"testbed://{FAMILY}", "split": "test", "max_tokens": 64}
        found = by_way(model, tokenizer, {**asked, "batch_size": 512})
        return {**found, "perplexity": perplexity(model, tokenizer)}

    return kept(path, made)


def loaded(student: Path) -> tuple[Any, Any]:
    """Model in bfloat16, on the GPU if there is one, and tokenizer."""
    spec = ModelSpec(path=str(student), dtype="bfloat16")
    place = "cuda" if torch.cuda.is_available() else "cpu"
    return spec.load_model().eval().to(place), spec.load_tokenizer()


def by_way(model: Any, tokenizer: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy, pass@8 and length by way of sampling, 8 samples of each of ``SAMPLED`` problems."""
    engine, found = HFEngine(model, eos_ids=eos_ids(model, tokenizer)), dict[str, Any]()
    check_decoding(engine)
    more = {"limit": SAMPLED, "samples": 8, **asked}
    for way, (temperature, top_p) in WAYS.items():
        spec = EvaluationSpec(temperature=temperature, top_p=top_p, **more)
        evaluator = spec.evaluator(spec.load(), tokenizer, model.config)
        found[way] = evaluator(engine).record()["figures"]
    return found


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any) -> float:
    """Of the base student's kind of texts on test problems, a token of the response."""
    rng, nll, count = random.Random(0), 0.0, 0
    for prompt in problems(FAMILY, "test", TESTS):
        head = tokenizer(prompt)["input_ids"]
        text = write(FAMILIES[FAMILY], prompt, STUDENT, rng)
        ids = torch.tensor([head + tokenizer(f"{text} {END}")["input_ids"]])
        nll -= float(logprobs_of(model, ids)[len(head) - 1 :].sum())
        count += ids.shape[1] - len(head)
    return math.exp(nll / count)


@torch.no_grad()
def logprobs_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs [L - 1] of the tokens [1 L] of a text, but its first."""
    ids = ids.to(model.device)
    logprobs = model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1]
    return logprobs.gather(-1, ids[0, 1:, None])[:, 0]


if __name__ == "__main__":
    main()
