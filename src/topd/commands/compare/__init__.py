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
So a run writes no checkpoints, unless it is told to.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import ValidationError
from rich.console import Console
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from topd.commands.compare.budgets import SCORES, TOKENS
from topd.commands.compare.problems import (
    check_code,
    check_data,
    check_models,
    check_problems,
    check_start,
    place_of,
    rows_digest,
)
from topd.commands.compare.start import (
    FIXED,
    Comparison,
    apart_from_stage,
    check_arms,
    is_begun,
    read_comparison,
    resolved,
    starting_point,
    starts,
    without_checkpoints,
)
from topd.commands.compare.summary import SECONDS, Result, summarise
from topd.commands.recipe import CompareSpec, read_recipe
from topd.commands.session import quieten, until_stopped
from topd.commands.train import make_trainer, watch_steps
from topd.commands.workers import in_workers
from topd.config import TOPDConfig
from topd.config.values import defaults_of
from topd.errors import StoppedError, TOPDError, first_line
from topd.evaluate import Evaluation, EvaluationCallback
from topd.inputs.models import ModelSpec
from topd.runs.checkpoints import begin_anew
from topd.runs.files import as_json, file_digest, kept_lines
from topd.runs.folder import RunFolder, check_run_folder
from topd.runs.lock import one_writer
from topd.runs.records import read_run
from topd.training.progress import say
from topd.training.warmstart import OF_ROLLOUTS, Answered, WarmstartConfig, WarmstartTrainer

RESULTS, SUMMARY = "results.jsonl", "compare.json"
# settings of ours, which an older version may lack, at their defaults
OWN = {k: v for k, v in defaults_of(TOPDConfig).items() if k in TOPDConfig.__annotations__}
OWN_1 = {k: defaults_of(WarmstartConfig)[k] for k in (*OWN, *WarmstartConfig.__annotations__)}
IDLE_1 = (*FIXED, *OF_ROLLOUTS)  # without effect in an arm of stage 1

Task: TypeAlias = tuple[Path | None, dict[str, Any]]  # the recipe and what is changed in it


def run_compare(path: Path, words: Sequence[str] = (), *, console: Console | None = None) -> Path:
    """Run every arm with every seed and summarise. Returns the run folder.

    Raises:
        TOPDError: the recipe has no ``compare`` or ``evaluation`` part, an arm is wrong, or the
            folder holds another comparison.
        StoppedError: it was stopped; in its folder it continues.
    """
    comparison = read_comparison(path, words)
    folder = comparison.folder
    with one_writer(folder), until_stopped("compare", folder, console):
        _compare(comparison, console)
    return folder


def _compare(comparison: Comparison, console: Console | None) -> None:
    folder, spec = comparison.folder, comparison.spec
    content = _content(comparison)
    results = kept_lines(folder / RESULTS)
    done = {(result["arm"], result["seed"]) for result in results}
    todo = [run for run in spec.runs() if run[:2] not in done]
    waiting = [*dict.fromkeys(arm for arm, *_ in todo)]
    check_data(comparison, check_arms(comparison, waiting), results)
    check_code(folder, waiting, results)
    check_problems(comparison, waiting or [spec.baseline], results)
    run = RunFolder(folder, resume=True, chained=bool(spec.plan))
    run.write("run.json", content)
    start = starting_point(comparison, quiet=console is None)
    if spec.plan:
        run.note("plan", sha256=file_digest(Path(spec.plan)), path=spec.plan, results=len(results))
    tasks = {}
    for arm, seed, keys in todo:
        own = {"seed": seed, "output_dir": _place(folder, arm, seed)}
        tasks[arm, seed] = comparison.path, {**comparison.keys_of(keys, start), **own}
    with closing(_run_all(tasks, spec.jobs, console)) as found:
        for result in found:
            check_models(folder, result, results)
            run.append(RESULTS, [result])
            results.append(result)
            if console:
                say(
                    console,
                    f"{result['arm']}, seed {result['seed']}: greedy {result['greedy']:.1%}, "
                    f"pass@1 {result['pass@1']:.1%}, {result['seconds']:.0f} s",
                )
    before, references = starts(comparison, start), spec.references or [spec.baseline]
    ended = {(result["arm"], result["seed"]): result for result in results}
    asked = [(arm, seed) for arm in spec.all_arms() for of, seed, _ in spec.runs() if of == arm]
    shown = [ended[run] for run in asked]  # in the recipe's order; others may have ended before
    run.write(
        SUMMARY, summarise(shown, spec.baseline, before, clock=spec.clock, references=references)
    )


def run_arm(task: Task, console: Console | None = None) -> Result:
    """One run: an arm of the recipe with a seed, in a process of its own or watched."""
    path, overrides = task
    gc.collect()  # the models of the run before
    quieten()
    keys, warmstart = apart_from_stage(overrides)
    recipe = without_checkpoints(read_recipe(path, keys, warmstart=warmstart))
    recipe.args.disable_tqdm = True
    recipe.args.stop_patience = None  # an arm that collapses is a result
    recipe.args.logging_strategy, recipe.args.logging_steps = IntervalStrategy.STEPS, 1  # the costs
    rows = recipe.data.load()
    learned = rows_digest(rows)
    trainer, evaluation = make_trainer(recipe, rows)
    if console:
        watch_steps(trainer, console)
    assert evaluation is not None  # checked before the first run
    kept = _Kept(evaluation)
    trainer.add_callback(kept)
    try:
        trainer.train(resume_from_checkpoint=False)  # one that was stopped starts over
    finally:
        trainer.phases.stop()
    assert evaluation.latest is not None
    answered = trainer.answered if isinstance(trainer, WarmstartTrainer) else Answered()
    curve = _curve(trainer.state.log_history, kept.solved, answered)
    return {
        **_figures(evaluation.latest),
        "problems": rows_digest(evaluation.evaluator.rows),
        "data": learned,
        **{time: curve[-1][time] for time in SECONDS.values()},
        "teacher_tokens": curve[-1]["teacher_written"],
        "curve": curve,
    }


class _Kept(TrainerCallback):
    """Keeps which problems were solved at every evaluation, by score."""

    def __init__(self, evaluation: EvaluationCallback) -> None:
        self.evaluation, self.solved = evaluation, list[dict[str, list[float]]]()

    def on_log(self, *_: object, logs: Mapping[str, float], **__: object) -> None:
        if "eval/greedy" in logs and self.evaluation.latest is not None:
            self.solved.append(_solved(self.evaluation.latest))


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
    """A point an evaluation: scores, right answers by problem, and what was spent until then.

    The best model is evaluated after the last update's own (``load_best_model_at_end``): of the two
    the point is that of the student which the run ends with.
    """
    evaluations = [log for log in logs if "eval/greedy" in log]
    points = dict[float, Result]()
    for log, right in zip(evaluations, solved, strict=True):
        tokens = _tokens_until(logs, log["step"])
        tokens["teacher_written"] += answered.tokens
        points[log["step"]] = {
            "step": log["step"],
            "seconds": log["eval/training_seconds"] + answered.seconds,
            "cpu_seconds": log["eval/training_cpu_seconds"] + answered.cpu_seconds,
            **tokens,
            **{score: log[f"eval/{score}"] for score in SCORES},
            "solved": right,
        }
    return [*points.values()]


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
) -> Generator[Result, None, None]:
    """The results as they come; in this process, and watched, if one runs at a time.

    A run that fails leaves the others be. Raises TOPDError when they have ended.
    """
    faults = {}
    ended = _one_by_one(tasks, console) if jobs == 1 else in_workers(try_arm, tasks, jobs)
    for (arm, seed), result in ended:
        if not isinstance(result, TOPDError):
            yield {"arm": arm, "seed": seed, **result}
            continue
        faults[arm, seed] = result
        if console:
            say(console, f"{arm}, seed {seed} failed: {result}")
    if faults:
        raise _failed(faults) from next(iter(faults.values()))  # with its notes


def _one_by_one(
    tasks: Mapping[tuple[str, int], Task], console: Console | None
) -> Iterator[tuple[tuple[str, int], Result | TOPDError]]:
    for number, ((arm, seed), task) in enumerate(tasks.items(), 1):
        if console:
            say(console, f"run {number} of {len(tasks)}: {arm}, seed {seed}")
        yield (arm, seed), try_arm(task, console)


def try_arm(task: Task, console: Console | None = None) -> Result | TOPDError:
    """One run, or why it could not end."""
    try:
        return run_arm(task, console)
    except TOPDError as fault:
        return copy.copy(fault)  # without its traceback, which has the models of the run
    except torch.OutOfMemoryError as fault:
        return TOPDError(
            f"{first_line(fault)} Lower per_device_train_batch_size (with more "
            "gradient_accumulation_steps), or compare.jobs."
        )


def _failed(faults: Mapping[tuple[str, int], TOPDError]) -> TOPDError:
    """What is said at the end where runs have failed; with the exit code of the first."""
    runs = [f"{arm!r}, seed {seed}" for (arm, seed) in faults]
    first, *_ = faults.values()
    more = f" {len(runs) - 1} more failed: {'; '.join(runs[1:])}." if runs[1:] else ""
    said = (
        f"compare, arm {runs[0]}: {first}{more} Checkpoints are for a run of its own: here the "
        "same command continues, all other runs are kept, and one that failed starts over. For a "
        "table without it leave out its arm or, where other seeds of that arm have ended, give the "
        "arm those as seeds of its own."
    )
    if isinstance(first, StoppedError):
        return StoppedError(said, first.exit_code)
    return TOPDError(said)


def _content(comparison: Comparison) -> dict[str, Any]:
    """What run.json is to hold, in a folder that is new or of the same comparison.

    That may have got other arms and seeds since. Where an older version did not say what stage 1
    was, it is not said now: it may have been another. Raises TOPDError for another comparison.
    """
    folder, spec = comparison.folder, comparison.spec
    check_run_folder(folder, resume=True)
    stages, begun = comparison.stages(), is_begun(folder)
    if comparison.first and not begun:
        stages["start"]["data"] = rows_digest(comparison.first.data.load())
    asked = as_json(spec.model_dump(exclude={"jobs", "clock", "plan"}))  # those may change
    content = {**resolved(comparison.recipe), "compare": asked, **stages}
    own = ("run.json", RESULTS, *(["warmstart"] if comparison.first else []))
    if not any((folder / name).exists() for name in own):
        return content
    stored = read_run(folder)
    if "compare" not in stored:  # what is there is not ours to mend
        raise TOPDError(
            f"output_dir: {folder} holds another run, or a {RESULTS} or a warmstart/ that is not "
            "of this comparison. Choose another folder."
        )
    results = kept_lines(folder / RESULTS)
    if not all(key in point for result in results for point in result["curve"] for key in TOKENS):
        raise TOPDError(
            f"output_dir: {folder} was begun by a version that did not count tokens (0.1.0), so it "
            "cannot continue. topd report shows it; choose another folder."
        )
    done = {result["arm"] for result in results}
    if begun or done:
        content = {key: v for key, v in content.items() if key in stored or key not in stages}
    if _fixed(stored, done, begun=begun) != _fixed(content, done, begun=begun):
        raise TOPDError(
            f"output_dir: {folder} holds another comparison: arms that have run, stage 1, or what "
            "all arms share, were different. Choose another folder."
        )
    if comparison.first and begun and "start" in content:
        content["start"]["data"] = check_start(comparison.first.data, stored)
    return content


def _fixed(content: Mapping[str, Any], done: Collection[str], *, begun: bool) -> Any:
    """Of run.json what finished runs depend on: all but the other arms, seeds and references.

    On what stage 1 is they depend if they are stage 1, or have ``begun`` from it.
    """
    try:
        spec = CompareSpec.model_validate(content.get("compare"))
    except ValidationError:
        return content
    arms = spec.all_arms()
    own = {arm: _with_effect(arms.get(arm, {})) for arm in done}
    stages = {arm: part for arm, part in content.get("staged", {}).items() if arm in done}
    start = content.get("start") if begun else None
    of_records = ("format", "start", "staged")
    return {
        **{key: part for key, part in content.items() if key not in of_records},
        **_filled(content, OWN, FIXED),
        "compare": {"arms": own, "warmstart": spec.warmstart},
        "stages": {arm: _filled(part, OWN_1, IDLE_1) for arm, part in stages.items()},
        "start": start and _filled(start, OWN_1, OF_ROLLOUTS),
    }


def _with_effect(keys: Mapping[str, Any]) -> dict[str, Any]:
    """An arm's keys without its seeds, and without what an older version did not refuse."""
    idle = IDLE_1 if keys.get("stage") == "warmstart" else FIXED
    return {key: value for key, value in keys.items() if key not in ("seeds", *idle)}


def _filled(
    stage: Mapping[str, Any], own: Mapping[str, Any], idle: Collection[str]
) -> dict[str, Any]:
    """Recipe and config of a stage; what a version had no setting for is at its default.

    A comparison continues anyway, whether or not it is told to. ``idle`` has no effect.
    """
    config = {**as_json(own), **stage.get("config", {})}
    for changing in ("disable_tqdm", "resume_from_checkpoint", *idle):
        config.pop(changing, None)
    return {"recipe": _given(stage.get("recipe")), "config": config}


def _given(value: Any) -> Any:
    """A part of a recipe without keys at their default, which an older version may lack."""
    if not isinstance(value, dict):
        return value
    with suppress(ValidationError):  # another part than a model
        value = ModelSpec.model_validate(value).model_dump(exclude_defaults=True)
    return {key: _given(own) for key, own in value.items() if own is not None}


def _place(folder: Path, arm: str, seed: int) -> str:
    """The run folder of an arm, emptied if a run there did not finish."""
    place = place_of(folder, arm, seed)
    begin_anew(place)
    (place / "answers.jsonl").unlink(missing_ok=True)  # what they cost is the arm's
    return str(place)
