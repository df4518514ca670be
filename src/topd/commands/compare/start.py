"""What a comparison starts from: its recipes, all checked, and the stage 1 that its arms share.

Everything that can be known without weights is known before stage 1 or a run begins.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers.trainer_utils import SaveStrategy

from topd.commands.compare.budgets import SCORES
from topd.commands.compare.summary import Result
from topd.commands.early import check_one_process
from topd.commands.evaluate import writer_of
from topd.commands.keys import (
    apart,
    elsewhere,
    from_command_line,
    of_common_start,
    over,
    packaged,
    part_of,
    read_mapping,
)
from topd.commands.recipe import STARTS, CompareSpec, Recipe, in_files, read_recipe
from topd.commands.session import autocast_of, quieten
from topd.commands.train import check_recipe, make_evaluator, train_recipe
from topd.config import TOPDConfig
from topd.errors import TOPDError, placed, shown
from topd.runs.checkpoints import begin_anew
from topd.runs.files import as_json
from topd.training.warmstart import OF_ANSWERS, OF_ROLLOUTS

PLACES = ("output_dir", "logging_dir")
OF_ALL = {  # what the comparison sets for its arms
    "seed": "Give it seeds: [0, 1], or set compare.seeds.",
    "output_dir": "All runs are below the output_dir of the comparison.",
    "compare": "Set it in the recipe's compare part.",
    "resume_from_checkpoint": "A run that was stopped starts over.",
}
FIXED = {  # what it does with every run, whatever is asked
    **dict.fromkeys(
        ("logging_steps", "logging_strategy", "logging_first_step"),
        "Every update is logged: the log has what a run spent.",
    ),
    **dict.fromkeys(
        (name for name in TOPDConfig.__annotations__ if name.startswith("stop_")),
        "No rule stops a run: an arm that collapses is a result.",
    ),
}
OWN = {"every", "batch_size", "chat", "chat_template_kwargs"}  # of an arm's evaluation
SAVING = {"save_strategy", "save_steps", "load_best_model_at_end"}


@dataclass(frozen=True)
class Comparison:
    """A recipe that compares, and what was read of it.

    ``first`` is the stage 1 that the arms start from, if they do; ``arms`` has the recipe of every
    arm, which may be one of stage 1.
    """

    path: Path | None
    overrides: Mapping[str, Any]
    recipe: Recipe
    spec: CompareSpec
    first: Recipe | None
    arms: Mapping[str, Recipe]

    @property
    def folder(self) -> Path:
        """The folder of the comparison."""
        return Path(self.recipe.args.output_dir)

    def stages(self) -> dict[str, Any]:
        """What stage 1 is, of the common start and of the arms that are it, as plain values."""
        staged = {arm: resolved(r) for arm, r in self.arms.items() if r.args.learns_from_answers}
        for arm, stage in staged.items():
            if self.spec.all_arms()[arm].get("answers") == "start":
                stage["config"]["answers"] = "start"  # wherever the folder is
        return {"start": resolved(self.first) if self.first else None, "staged": staged}

    def keys_of(self, keys: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
        """What is changed in the recipe for an arm that has these keys and begins at ``start``."""
        shared = of_stage(self.overrides, first=keys.get("stage") == "warmstart")
        return {**begun_at(shared, start), **_from_start(keys, self.folder, self.first)}


def read_comparison(path: Path, words: Sequence[str]) -> Comparison:
    """Read a recipe, its arms and its stage 1.

    Raises TOPDError: several processes, a recipe without ``compare`` or ``evaluation`` part, or a
    wrong arm.
    """
    check_one_process("compare")
    named, overrides = from_command_line(path, words)
    rest, own = apart(overrides)
    if "seed" in rest:
        raise TOPDError(
            "seed: has no effect, as every arm is run with its seeds. Give --compare.seeds "
            f"'[{rest['seed']}]'."
        )
    recipe = read_recipe(named, rest)
    for key in rest.keys() & FIXED.keys():
        raise TOPDError(f"{key}: has no effect on a comparison. {FIXED[key]} Leave it out.")
    path = named or Path("topd")
    spec = _checked(path, recipe)
    first, folder = None, Path(recipe.args.output_dir)
    if spec.warmstart:
        _check_served(recipe)
        part = (read_mapping(packaged(named)).get("warmstart") or {}) if named else {}
        keys = {**of_common_start(part, overrides), "output_dir": str(_place(folder))}
        with placed("compare, stage 1"):
            first = read_recipe(named, keys, warmstart=True)
    arms = {}
    for arm, keys in spec.all_arms().items():
        with placed(f"compare, arm {arm!r}"):
            _check_keys(keys, first)
            of_arm, staged = apart_from_stage(_from_start(keys, folder, first))
            shared = of_stage(overrides, first=staged)
            keys_of_arm = {**shared, **of_arm, "output_dir": str(folder / "arms" / in_files(arm))}
            arms[arm] = read_recipe(named, keys_of_arm, warmstart=staged)
            _check_answers(keys, first, arms[arm])
            _check_evaluation(recipe, arms[arm])
    _check_servers_apart(spec, arms)
    if own and not first and not any(r.args.learns_from_answers for r in arms.values()):
        raise TOPDError(
            f"{path}: warmstart.{next(iter(own))}: has no effect without stage 1. Set "
            "compare.warmstart: true, or leave it out."
        )
    return Comparison(named, overrides, recipe, spec, first, arms)


def _checked(path: Path, recipe: Recipe) -> CompareSpec:
    if recipe.compare is None:
        raise TOPDError(f"{path}: compare is missing. Name the arms: compare: {{arms: {{...}}}}.")
    if recipe.compare.plan and not Path(recipe.compare.plan).is_file():
        raise TOPDError(
            f"{path}: compare.plan: no such file {recipe.compare.plan}. Write it first."
        )
    if recipe.evaluation is None:
        raise TOPDError(f"{path}: evaluation is missing. A comparison needs problems to solve.")
    return recipe.compare


def _check_served(recipe: Recipe) -> None:
    """Servers go by a model's path where they have no name for it. Raises TOPDError."""
    if recipe.student.served and not recipe.student.served.model:
        raise TOPDError(
            "student.served.model: is missing. After stage 1 the student has another path: name "
            "the model as its servers do."
        )


def _check_servers_apart(spec: CompareSpec, arms: Mapping[str, Recipe]) -> None:
    """A student's servers have the weights of one run at a time. Raises TOPDError."""
    served = [arms[arm].student.served for arm, *_ in spec.runs()]
    shared = Counter(url for one in served if one for url in one.completions)
    if spec.jobs > 1 and max(shared.values(), default=0) > 1:
        raise TOPDError(
            f"compare.jobs: {spec.jobs} runs at a time would give their weights to the same "
            "servers (student.served), and each get texts by those of another. Set compare.jobs: "
            "1, or leave student.served out."
        )


def _check_keys(keys: Mapping[str, Any], first: Recipe | None) -> None:
    """What would have no effect in an arm, or nothing to work on. Raises TOPDError."""
    for key in keys:
        if part_of(key) in OF_ALL:
            raise TOPDError(f"{key}: has no effect in an arm. {OF_ALL[part_of(key)]}")
        if key in FIXED:
            raise TOPDError(f"{key}: has no effect in an arm. {FIXED[key]} Leave it out.")
    if keys.get("answers") == "start" and not (first and keys.get("stage") == "warmstart"):
        raise TOPDError(
            "answers: start needs a common start. Set stage: warmstart on the arm and "
            "compare.warmstart: true."
        )


def _check_answers(keys: Mapping[str, Any], first: Recipe | None, recipe: Recipe) -> None:
    """Whether the answers of the common start are to the arm's prompts. Raises TOPDError."""
    if keys.get("answers") == "start" and first and recipe.data != first.data:
        raise TOPDError(
            "answers: start has answers to the data of the common start only. Leave data out of "
            "the arm, or have the teacher answer its own (answers: teacher)."
        )


def _check_evaluation(recipe: Recipe, of_arm: Recipe) -> None:
    """Whether an arm is evaluated as the rest: on the same problems, sampled alike.

    Raises TOPDError.
    """
    asked = [r.evaluation.model_dump(exclude=OWN) if r.evaluation else {} for r in (recipe, of_arm)]
    for key, value in asked[0].items():
        if asked[1].get(key) != value:
            own = shown(asked[1][key]) if asked[1] else "missing"
            raise TOPDError(
                f"evaluation.{key} is {own}, and {shown(value)} for the rest. All arms need the "
                f"same problems, sampled alike. Leave evaluation.{key} out of the arm (or of "
                "warmstart), or set it for all."
            )


def apart_from_stage(keys: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """An arm's keys without its stage and seeds, and whether that is stage 1. Raises TOPDError."""
    stage = keys.get("stage", "train")
    if stage not in ("train", "warmstart"):
        raise TOPDError(f"stage: {stage!r} is not one of train, warmstart.")
    own = {key: value for key, value in keys.items() if key not in ("stage", "seeds")}
    return own, stage == "warmstart"


def of_stage(overrides: Mapping[str, Any], *, first: bool) -> dict[str, Any]:
    """The overrides that arms of a stage share: all but those of stage 1, or with them.

    Stage 1 has no rollouts, so nothing is said to it of theirs; how the students sample is not how
    its answers are written.
    """
    rest, own = apart(overrides)
    if not first:
        return rest
    idle = (*OF_ROLLOUTS, *OF_ANSWERS)
    return over({key: value for key, value in rest.items() if key not in idle}, own)


def begun_at(overrides: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides with the student of ``start`` in place of theirs."""
    return {**{key: v for key, v in overrides.items() if part_of(key) not in start}, **start}


def _from_start(keys: Mapping[str, Any], folder: Path, first: Recipe | None) -> dict[str, Any]:
    """An arm's keys; ``answers: start`` is where the answers of the common start are."""
    if keys.get("answers") != "start" or first is None:
        return dict(keys)
    answers = getattr(first.args, "answers", "teacher")
    own = str(_place(folder) / "answers.jsonl") if answers == "teacher" else answers
    return {**keys, "answers": own}


def resolved(recipe: Recipe) -> dict[str, Any]:
    """A recipe as run.json has it, wherever it runs."""
    config = {key: value for key, value in recipe.args.to_dict().items() if key not in PLACES}
    return as_json({"recipe": recipe.sources(), "config": config})


def check_arms(comparison: Comparison, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Make the start-up checks of arms that read no weights, with the student before stage 1.

    Returns the rows that they learn from, by their ``data``. Raises TOPDError: one could not begin.
    """
    quieten()
    arms, rows, seen = comparison.spec.all_arms(), dict[str, list[dict[str, Any]]](), set()
    for arm in names:
        recipe = comparison.arms[arm]
        asks = comparison.first and getattr(comparison.first.args, "answers", "") == "teacher"
        if arms[arm].get("answers") == "start" and asks:  # not written yet
            asking = copy.copy(recipe.args)
            asking.answers = "teacher"
            recipe = replace(recipe, args=asking)
        key = json.dumps(resolved(recipe), sort_keys=True)
        data = recipe.data.model_dump_json()
        if key in seen:
            continue
        seen.add(key)
        with placed(f"compare, arm {arm!r}"):
            if data not in rows:
                rows[data] = recipe.data.load()
            check_recipe(recipe, rows[data])
    return rows


def without_checkpoints(recipe: Recipe) -> Recipe:
    """The recipe of a run that starts over if it is stopped: only checkpoints that it asks for."""
    if not SAVING & recipe.args._given:
        recipe.args.save_strategy = SaveStrategy.NO
    return recipe


# Stage 1


def _place(folder: Path) -> Path:
    return folder / "warmstart"


def is_begun(folder: Path) -> bool:
    """Whether the common start of the comparison in a folder is there."""
    return (_place(folder) / "student" / "README.md").exists()  # the model card is written last


def starting_point(comparison: Comparison, *, quiet: bool) -> dict[str, Any]:
    """What every arm starts from: nothing to change, or the student of stage 1, made if need be."""
    if comparison.first is None:
        return {}
    if not is_begun(comparison.folder):
        begin_anew(_place(comparison.folder))
        first = without_checkpoints(comparison.first)
        with placed("compare, stage 1"):
            train_recipe(first, quiet=quiet, alone=False)
    before = comparison.recipe.student.model_dump(exclude_defaults=True)
    return {"student": elsewhere(before, str(_place(comparison.folder) / "student"))}


def starts(comparison: Comparison, start: Mapping[str, Any]) -> dict[str, Result]:
    """The student before and after stage 1, evaluated as the arms are."""
    shared = of_stage(comparison.overrides, first=False)
    changes = zip(STARTS, (shared, begun_at(shared, start)), strict=True) if start else ()
    return {name: evaluated(read_recipe(comparison.path, changed)) for name, changed in changes}


def evaluated(recipe: Recipe) -> Result:
    """On the device of the runs, in their precision."""
    evaluator, device = make_evaluator(recipe), recipe.args.device
    assert evaluator is not None  # checked before
    model = recipe.student.load_model().eval().to(device)
    engine = writer_of(model, evaluator, autocast=partial(autocast_of, recipe.args, device))
    found = evaluator(engine)
    engine.release()
    return {score: asdict(found.intervals()[score]) for score in SCORES}
