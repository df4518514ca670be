"""An honest comparison of methods: arms x seeds of one recipe, on the same prompts and seeds.

::

    RUN/run.json        the resolved recipe and its arms
        warmstart/      stage 1, if it was asked for
        results.jsonl   one line a run: figures, right answers by problem, curve, cost
        compare.json    means, what was spent, and paired intervals against the references
        arms/ARM-SEED/  the run folders

An arm with ``stage: warmstart`` is stage 1, off-policy distillation: its keys are those of the
recipe's ``warmstart`` part, from the same student as the other arms; the teacher's time for its
answers counts. ``answers: start`` learns the answers of the common start again.

An arm's own ``seeds`` replace ``compare.seeds``: screen many arms with one seed, run few with more.

A plan of the analysis (``compare.plan``) is hashed into the folder's ledger whenever the comparison
begins or continues, with the number of results that were there by then.

A comparison that was stopped continues in its folder: finished runs are kept, others start over.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from topd.commands.budgets import TOKENS
from topd.commands.compare_summary import SCORES, SECONDS, Result, summarise
from topd.commands.keys import packaged, read_mapping, shared_beside
from topd.commands.recipe import CompareSpec, Recipe, parse_overrides, read_recipe
from topd.commands.session import autocast_of
from topd.commands.train import make_evaluator, make_trainer, run_recipe, watch_steps
from topd.commands.workers import in_workers
from topd.config import TOPDConfig
from topd.engines.decode_check import check_decoding
from topd.engines.hf import HFEngine
from topd.errors import TOPDError
from topd.evaluate import Evaluation, EvaluationCallback
from topd.inputs.models import ModelSpec, eos_ids
from topd.inputs.vocabulary import shared_ids
from topd.runs.checkpoints import begin_anew
from topd.runs.files import as_json, file_digest, read_lines, read_whole, trim
from topd.runs.folder import RunFolder, check_run_folder
from topd.runs.lock import one_writer
from topd.training.progress import say
from topd.training.warmstart import Answered, WarmstartTrainer

RESULTS, SUMMARY = "results.jsonl", "compare.json"
# settings of ours, which an older version may lack, at their defaults
OWN = {k: getattr(TOPDConfig, k) for k in TOPDConfig.__annotations__ if hasattr(TOPDConfig, k)}

Task: TypeAlias = tuple[str, dict[str, Any]]  # the recipe and what is changed in it


def run_compare(path: Path, words: Sequence[str] = (), *, console: Console | None = None) -> Path:
    """Run every arm with every seed and summarise. Returns the run folder.

    Raises:
        TOPDError: the recipe has no ``compare`` or ``evaluation`` part, an arm is wrong, or the
            folder holds another comparison.
    """
    overrides = parse_overrides(words)
    recipe = read_recipe(path, overrides)
    spec = _checked(path, recipe, overrides)
    folder = Path(recipe.args.output_dir)
    with one_writer(folder):
        _compare(path, overrides, recipe, spec, console)
    return folder


def _compare(
    path: Path,
    overrides: dict[str, Any],
    recipe: Recipe,
    spec: CompareSpec,
    console: Console | None,
) -> None:
    folder = Path(recipe.args.output_dir)
    run = _open(folder, recipe, spec)
    start = _starting_point(path, spec, overrides, folder, quiet=console is None)
    results = _stored(folder)
    if spec.plan:
        run.note("plan", sha256=file_digest(Path(spec.plan)), path=spec.plan, results=len(results))
    tasks = {
        (arm, seed): (
            str(path),
            {
                **overrides,
                **start,
                **_from_start(keys, folder),
                "seed": seed,
                "output_dir": _place(folder, arm, seed),
            },
        )
        for arm, seed, keys in spec.runs()
        if not any((r["arm"], r["seed"]) == (arm, seed) for r in results)
    }
    for result in _run_all(tasks, spec.jobs, console):
        run.append(RESULTS, [result])
        results.append(result)
        if console:
            console.print(
                f"{result['arm']}, seed {result['seed']}: greedy {result['greedy']:.1%}, "
                f"pass@1 {result['pass@1']:.1%}, {result['seconds']:.0f} s"
            )
    starts = _starts(path, overrides, start)
    references = spec.references or [spec.baseline]
    run.write(
        SUMMARY, summarise(results, spec.baseline, starts, clock=spec.clock, references=references)
    )


def run_arm(task: Task, console: Console | None = None) -> Result:
    """One run: an arm of the recipe with a seed, in a process of its own or watched."""
    path, overrides = task
    gc.collect()  # the models of the run before
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    keys, warmstart = _staged(overrides)
    recipe = read_recipe(path, keys, warmstart=warmstart)
    recipe.args.disable_tqdm = True
    recipe.args.stop_patience = None  # an arm that collapses is a result
    trainer, evaluation = make_trainer(recipe, recipe.data.load(), warmstart=warmstart)
    trainer.remove_callback(PrinterCallback)
    if console:
        watch_steps(trainer, console)
    assert evaluation is not None  # checked before the first run
    kept = _Kept(evaluation)
    trainer.add_callback(kept)
    try:
        trainer.train()
    finally:
        trainer.phases.stop()
    assert evaluation.latest is not None
    answered = trainer.answered if isinstance(trainer, WarmstartTrainer) else Answered()
    curve = _curve(trainer.state.log_history, kept.solved, answered)
    return {
        **_figures(evaluation.latest),
        **{time: curve[-1][time] for time in SECONDS.values()},
        "teacher_tokens": curve[-1]["teacher_written"],
        "curve": curve,
    }


class _Kept(TrainerCallback):
    """Keeps which problems were solved at every evaluation, by score."""

    def __init__(self, evaluation: EvaluationCallback) -> None:
        self.evaluation, self.solved = evaluation, list[dict[str, list[float]]]()

    def on_log(
        self,
        args: TOPDConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float],
        **_: object,
    ) -> None:
        if "eval/greedy" in logs and self.evaluation.latest is not None:
            self.solved.append(_solved(self.evaluation.latest))


def _staged(keys: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """An arm's keys without its stage and seeds, and whether that is stage 1. Raises TOPDError."""
    stage = keys.get("stage", "train")
    if stage not in ("train", "warmstart"):
        raise TOPDError(f"stage: {stage!r} is not one of train, warmstart.")
    own = {key: value for key, value in keys.items() if key not in ("stage", "seeds")}
    return own, stage == "warmstart"


def _from_start(keys: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """An arm's keys; ``answers: start`` is the file of the common start's answers."""
    if keys.get("answers") == "start":
        return {**keys, "answers": str(folder / "warmstart" / "answers.jsonl")}
    return dict(keys)


def _figures(evaluation: Evaluation) -> Result:
    return {
        "greedy": evaluation.greedy.mean,
        "pass@1": evaluation.pass_at[1].mean,
        "mean_length": evaluation.mean_length.mean,
        "truncated": evaluation.truncated.mean,
        "solved": _solved(evaluation),
    }


def _solved(evaluation: Evaluation) -> dict[str, list[float]]:
    """Right answers by problem, in [0, 1]."""
    return {"greedy": evaluation.solved(greedy=True), "pass@1": evaluation.solved()}


def _curve(
    logs: Sequence[Mapping[str, float]], solved: Sequence[Result], answered: Answered
) -> list[Result]:
    """A point an evaluation: scores, right answers by problem, and what was spent until then."""
    evaluations = [log for log in logs if "eval/greedy" in log]
    points = []
    for log, right in zip(evaluations, solved, strict=True):
        tokens = _tokens_until(logs, log["step"])
        tokens["teacher_written"] += answered.tokens
        points.append(
            {
                "step": log["step"],
                "seconds": log["eval/training_seconds"] + answered.seconds,
                "cpu_seconds": log["eval/training_cpu_seconds"] + answered.cpu_seconds,
                **tokens,
                **{score: log[f"eval/{score}"] for score in SCORES},
                "solved": right,
            }
        )
    return points


def _tokens_until(logs: Sequence[Mapping[str, float]], step: float) -> dict[str, float]:
    """Tokens of all updates up to ``step``; a log has means over the updates since the last."""
    tokens, before = dict.fromkeys(TOKENS, 0.0), 0.0
    for log in logs:
        if "loss" in log and log["step"] <= step:
            for key in TOKENS:
                tokens[key] += log[f"tokens/{key}"] * (log["step"] - before)
            before = log["step"]
    return tokens


def _run_all(
    tasks: Mapping[tuple[str, int], Task], jobs: int, console: Console | None
) -> Iterator[Result]:
    """The results as they come; in this process, and watched, if one runs at a time."""
    if jobs == 1:
        for number, ((arm, seed), task) in enumerate(tasks.items(), 1):
            if console:
                say(console, f"run {number} of {len(tasks)}: {arm}, seed {seed}")
            yield {"arm": arm, "seed": seed, **run_arm(task, console)}
        return
    for (arm, seed), result in in_workers(run_arm, tasks, jobs):
        yield {"arm": arm, "seed": seed, **result}


def _checked(path: Path, recipe: Recipe, overrides: Mapping[str, Any]) -> CompareSpec:
    if recipe.compare is None:
        raise TOPDError(f"{path}: compare is missing. Name the arms: compare: {{arms: {{...}}}}.")
    if recipe.compare.plan and not Path(recipe.compare.plan).is_file():
        raise TOPDError(
            f"{path}: compare.plan: no such file {recipe.compare.plan}. Write it first."
        )
    if recipe.evaluation is None:
        raise TOPDError(f"{path}: evaluation is missing. A comparison needs problems to solve.")
    for arm, keys in recipe.compare.all_arms().items():
        try:
            own, warmstart = _staged(_from_start(keys, Path(recipe.args.output_dir)))
            read_recipe(path, {**overrides, **own}, warmstart=warmstart)
            _check_start(recipe.compare, keys, warmstart=warmstart)
        except TOPDError as error:
            raise TOPDError(f"compare, arm {arm!r}: {error}") from error
    return recipe.compare


def _check_start(spec: CompareSpec, keys: Mapping[str, Any], *, warmstart: bool) -> None:
    """What would have no effect, or nothing to work on. Raises TOPDError."""
    if keys.get("answers") == "start" and not (warmstart and spec.warmstart):
        raise TOPDError(
            "answers: start needs a common start with answers of the teacher. Set stage: warmstart "
            "on the arm and compare.warmstart: true."
        )


def _open(folder: Path, recipe: Recipe, spec: CompareSpec) -> RunFolder:
    """The folder, new or of the same comparison; that may have got other arms and seeds since."""
    check_run_folder(folder, resume=True)
    settings = {"recipe": recipe.sources(), "config": recipe.args.to_dict()}
    content = as_json({**settings, "compare": spec.model_dump()})
    for changing in ("output_dir", "logging_dir"):
        content["config"].pop(changing, None)
    for changing in ("jobs", "clock", "plan"):
        content["compare"].pop(changing)
    stored = folder / "run.json"
    done = {result["arm"] for result in _stored(folder)}
    if stored.exists() and _fixed(read_whole(stored), done) != _fixed(content, done):
        raise TOPDError(
            f"output_dir: {folder} holds another comparison: arms that have run, or what all arms "
            "share, were different. Choose another folder."
        )
    run = RunFolder(folder, resume=True, chained=bool(spec.plan))
    run.write("run.json", content)
    return run


def _fixed(content: Mapping[str, Any], done: Collection[str]) -> Any:
    """Of run.json what finished runs depend on: all but the other arms, seeds and references.

    A folder of a version that had fewer settings has the others at their defaults.
    """
    try:
        spec = CompareSpec.model_validate(content.get("compare"))
    except ValidationError:
        return content
    arms = spec.all_arms()
    own = {arm: {k: v for k, v in arms.get(arm, {}).items() if k != "seeds"} for arm in done}
    config = {**as_json(OWN), **content.get("config", {})}
    config.pop("disable_tqdm", None)
    content = {k: v for k, v in content.items() if k != "format"}  # of the records
    same = {"config": config, "compare": {"arms": own, "warmstart": spec.warmstart}}
    return {**content, "recipe": _given(content.get("recipe")), **same}


def _given(value: Any) -> Any:
    """A part of a recipe without keys at their default, which an older version may lack."""
    if not isinstance(value, dict):
        return value
    with suppress(ValidationError):  # another part than a model
        value = ModelSpec.model_validate(value).model_dump(exclude_defaults=True)
    return {key: _given(own) for key, own in value.items() if own is not None}


def _starting_point(
    path: Path, spec: CompareSpec, overrides: Mapping[str, Any], folder: Path, *, quiet: bool
) -> dict[str, Any]:
    """What every arm starts from: nothing to change, or the student of the warm start."""
    if not spec.warmstart:
        return {}
    place = folder / "warmstart"
    student = place / "student"
    if not (student / "README.md").exists():  # the model card is written last
        own = read_mapping(packaged(path)).get("warmstart") or {}
        shared = {*STAGE_1, *shared_beside(own)}
        words = [f"--{key}={json.dumps(v)}" for key, v in overrides.items() if key in shared]
        begin_anew(place)
        run_recipe(path, [*words, f"--output_dir={place}"], quiet=quiet, warmstart=True)
    return {"student": str(student)}


STAGE_1 = ("student", "teacher", "data")


def _starts(
    path: Path, overrides: Mapping[str, Any], start: Mapping[str, Any]
) -> dict[str, Result]:
    """The student before and after the warm start, evaluated as the arms are."""
    changes = {"base": {}, "warm start": start} if start else {}
    return {
        name: evaluated(read_recipe(path, {**overrides, **change}))
        for name, change in changes.items()
    }


def evaluated(recipe: Recipe) -> Result:
    """On the device of the runs, in their precision."""
    evaluator, device = make_evaluator(recipe), recipe.args.device
    assert evaluator is not None  # checked before
    model = recipe.student.load_model().eval().to(device)
    tokenizer = evaluator.tokenizer
    allowed = shared_ids(tokenizer, tokenizer)
    engine = HFEngine(
        model,
        eos_ids=eos_ids(model, tokenizer),
        allowed=allowed,
        autocast=partial(autocast_of, recipe.args, device),
    )
    check_decoding(engine)
    found = evaluator(engine)
    engine.release()
    return {score: asdict(found.intervals()[score]) for score in SCORES}


def _stored(folder: Path) -> list[Result]:
    """Finished runs; a last line that was cut off is dropped."""
    path = folder / RESULTS
    return list(read_lines(path)) if trim(path) else []


def in_files(arm: str) -> str:
    """An arm's name in those of files.

    >>> in_files("first_fork, K 24")
    'first_fork--K-24'
    """
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in arm)


def _place(folder: Path, arm: str, seed: int) -> str:
    """The run folder of an arm, emptied if a run there did not finish."""
    place = folder / "arms" / f"{in_files(arm)}-{seed}"
    begin_anew(place)
    (place / "answers.jsonl").unlink(missing_ok=True)  # what they cost is the arm's
    return str(place)
