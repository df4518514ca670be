"""``topd replay``: does an update repeat, from the checkpoint before it?"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from topd.commands.audit.decisions import is_sampled
from topd.commands.audit.rebuilt import NO_TRUST, Trust, rebuilt
from topd.commands.audit.result import AuditResult, disagreements, not_under_way
from topd.commands.audit.settings import (
    as_stored,
    by_settings,
    format_at,
    ranks_at,
    read_from,
    settings_at,
)
from topd.errors import COLLAPSED, NONFINITE, StoppedError, TOPDError
from topd.inputs.models.fingerprints import trained_digest
from topd.inputs.models.saved import tensors_in
from topd.runs import checkpoints
from topd.runs.folder import LINES, RECORDS
from topd.runs.ledger import ended
from topd.runs.records import DRAWN, JUDGED
from topd.runs.verified import entries_in, read_entries, read_records
from topd.training.inherited import FOLLOWING
from topd.training.sharded import is_sharded
from topd.training.trainer import TOPDTrainer

TIMES = ("seconds/", "tokens_per_second", "train_", "total_flos", "eval/", "eval_", "epoch")
OTHERWISE = (
    "{folder}: a version before 0.2.0 sampled its texts, with random numbers that this version "
    "does not make. Replay it with the version that manifest.json names, or audit it: "
    "topd audit {folder}."
)
SEVERAL = (
    "--step {step}: {ranks} ranks made it, which add gradients up in another order than one "
    "process does, so it repeats up to rounding. Give a --tolerance, e.g. 1e-3; weights are not "
    "compared then."
)
BY_FSDP2 = (
    "--step {step}: {start} was saved by FSDP2, from which one process does not resume. Choose an "
    "update before the first checkpoint, or audit it: topd audit {folder}."
)
JUDGED_OTHERWISE = (
    "{folder}: update {step} repeats otherwise, as a version before format {judged} wrote it "
    "(run.json): equal windows were not at distance 0 there. Replay it with the version that wrote "
    "it, or audit it: topd audit {folder}."
)


def replay_step(
    folder: Path, step: int, *, tolerance: float = 0.0, trust: Trust = NO_TRUST
) -> AuditResult:
    """Repeat an update from the checkpoint before it, or from the start, and compare.

    Compared are every record from there on and, where the ledger has them, the weights; after the
    run's last update every value of ``student/`` and ``adapter/``. Of several ranks' run, which one
    process repeats up to rounding, the records alone. A loss that is not finite is re-derived too.
    See :func:`audit_run` for the arguments.

    Raises:
        TOPDError: the folder has no ledger or no such update, its checkpoint is damaged, or models
            or data cannot be loaded or are others, its texts were sampled by a version with other
            random numbers, several ranks made it and there is no tolerance, or its checkpoint is
            one of FSDP2.
    """
    read_entries(folder)  # a probe has rollouts as well, and no updates
    recorded = read_records(folder, "rollouts.jsonl")
    if not recorded:
        raise TOPDError(f"{folder}: has no rollouts to compare with (log_rollouts was off?).")
    if not any(record["step"] == step for record in recorded):
        last = max((record["step"] for record in recorded), default=-1)
        raise TOPDError(f"--step {step}: {folder} has the updates 0 to {last}. Choose one.")
    found, start = AuditResult(), checkpoints.last(folder, step)
    seal = checkpoints.check(start, resumable=True) if start else None
    if seal and is_sharded(seal.files):
        raise TOPDError(BY_FSDP2.format(step=step, start=start, folder=folder))
    first = seal.step if seal else 0
    _check_settings(folder, first, step)
    ranks = ranks_at(folder, step)
    if ranks > 1 and not tolerance:
        raise TOPDError(SEVERAL.format(step=step, ranks=ranks))
    written = format_at(folder, first)
    with rebuilt(folder, trust, at=step) as trainer:
        if written < DRAWN and is_sampled(trainer.args):
            raise TOPDError(OTHERWISE.format(folder=folder))
        if ranks > 1:
            _check_filled(trainer, (first, step), ranks)
        scratch = trainer.run_folder
        if start and seal:
            _as_at(start, scratch)
            trainer.examined = {scratch / start.name: seal}
        trainer.add_callback(_StopAfter(step + 1))
        try:
            with _unsaid(checkpoints.logger):
                trainer.train(resume_from_checkpoint=bool(start))
        except StoppedError as error:  # as the run may have been
            if error.exit_code not in (NONFINITE, COLLAPSED):
                raise
            found.checked.append(f"stopped: {str(error).partition('. ')[0]}")
        for name in RECORDS:
            _compare_records(folder, scratch, name, (first, step), tolerance, found, written)
        if ranks == 1:
            _compare_weights(folder, scratch, trainer, step, found)
        else:
            found.checked.append(f"weights: not compared, {ranks} ranks made them")
        if written < JUDGED and found.faults:
            _check_judged(folder, scratch, (first, step))
    begun = start.name if start else "the beginning"
    found.checked.insert(0, f"replay: update {step}, from {begun}")
    return not_under_way(folder, found)


def _check_settings(folder: Path, first: int, step: int) -> None:
    """Raises TOPDError if a resume changed settings between the two updates, or if the learning
    rate followed evaluations, which a replay does not make.
    """
    with read_from(folder, "run.json"):
        schedule = settings_at(as_stored(folder), step)[1].get("lr_scheduler_type")
    if schedule in FOLLOWING:
        raise TOPDError(
            f"--step {step}: the learning rate followed the run's evaluations (lr_scheduler_type "
            f"{schedule}), which a replay does not make. Audit it: topd audit {folder}."
        )
    parts = [part for part in by_settings(folder, range(first, step + 1)) if part]
    if len(parts) > 1:
        changed = max(part[0] for part in parts)
        raise TOPDError(
            f"--step {step}: the run was resumed with other settings at update {changed}, and "
            f"there is no checkpoint of it from then on: a replay from update {first} would need "
            f"both. Choose an update before {changed}, or audit it: topd audit {folder}."
        )


def _check_filled(trainer: TOPDTrainer, steps: tuple[int, int], ranks: int) -> None:
    """Raises TOPDError if the updates are at or after the end of an epoch that ranks end otherwise.

    With dataloader_drop_last what comes after it differs too: one process leaves out fewer.
    """
    args = trainer.args
    rollouts = len(trainer.train_dataset) * args.num_generations
    micro = args.per_device_train_batch_size
    at_once = micro * ranks
    rounds = rollouts // at_once if args.dataloader_drop_last else math.ceil(rollouts / at_once)
    updates = math.ceil(rounds * ranks / args.gradient_accumulation_steps) or 1
    ends = [n for n in range(steps[1] + 1) if (n + 1) % updates == 0]
    met = ends if args.dataloader_drop_last else [n for n in ends if n >= steps[0]]
    if met and rollouts % at_once:
        raise TOPDError(
            f"--step {steps[1]}: update {met[0]} is the last of an epoch, whose rollouts do not "
            f"fill up the micro-batches of {ranks} ranks: they met others there than one process "
            "does. Choose an update before it, or audit the run."
        )


class _StopAfter(TrainerCallback):
    """Ends a run after so many updates, whatever its schedule says."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, _: Any, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


@contextmanager
def _unsaid(logger: logging.Logger) -> Iterator[None]:
    """Without its warnings: of the folder of a repetition nobody needs to know the settings."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _as_at(checkpoint: Path, scratch: Path) -> None:
    """Have what a run needs to resume from a checkpoint in another folder; training cuts it."""
    run = checkpoint.parent
    for path in [*(run / name for name in LINES), run / "run.json", run / "manifest.json"]:
        if path.is_file():
            shutil.copy(path, scratch)
    (scratch / checkpoint.name).symlink_to(checkpoint.resolve())


def _compare_records(
    folder: Path,
    scratch: Path,
    name: str,
    steps: tuple[int, int],
    tolerance: float,
    found: AuditResult,
    written: int,
) -> None:
    """Records of the replayed updates, key by key; times, evaluations and others aside.

    A record has the keys that another of its file has, where its version has them again.
    """
    first, last = (step + (name == "metrics.jsonl") for step in steps)
    ours, theirs = (_of_updates(place, name, first, last) for place in (folder, scratch))
    if len(ours) != len(theirs):
        found.faults.append(f"{name}: {len(ours)} records of these updates, {len(theirs)} again")
        return
    whole = read_records(folder, name) if written >= JUDGED else ()  # others may lack new keys
    everywhere = {key for record in whole for key in record}
    for recorded, now in zip(ours, theirs, strict=True):
        keys = {key for key in {*recorded, *everywhere} if not key.startswith(TIMES)}
        found.faults += (
            f"{name}, {said}" for said in disagreements(recorded, now, keys, tolerance)
        )
    found.checked.append(f"{name}: {len(ours)} records")


def _of_updates(place: Path, name: str, first: int, last: int) -> list[dict[str, Any]]:
    """The records of updates from the first to the last; a summary is none."""
    records = read_records(place, name)
    return [r for r in records if first <= r["step"] <= last and ("rollout" in r or "loss" in r)]


def _check_judged(folder: Path, scratch: Path, steps: tuple[int, int]) -> None:
    """Refuse updates in which equal windows differ from what they were then. Raises TOPDError."""
    both = [_of_updates(place, "guidance.jsonl", *steps) for place in (folder, scratch)]
    for recorded, now in zip(*both, strict=False):
        if _judged(recorded, now):
            step = recorded["step"]
            raise TOPDError(JUDGED_OTHERWISE.format(folder=folder, step=step, judged=JUDGED))


def _judged(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether equal windows were at another distance."""
    pairs = zip(recorded["forks"], now["forks"], strict=False)
    return any(
        new["distance"] == 0 and any(old.get(key) != new[key] for key in ("distance", "real"))
        for old, new in pairs
    )


def _compare_weights(
    folder: Path, scratch: Path, trainer: TOPDTrainer, step: int, found: AuditResult
) -> None:
    """The student before every replayed update and after the last, as far as it is recorded."""
    recorded, again = _weights(folder), _weights(scratch)
    again[step + 1] = trained_digest(trainer.model)
    best = _ended_with_best(folder, step, recorded)
    if best:
        del again[step + 1]
    both = sorted(recorded.keys() & again.keys())
    found.faults += (
        f"weights before update {n}: not those of the run" for n in both if recorded[n] != again[n]
    )
    found.checked.append(f"weights: before the updates {', '.join(map(str, both))}")
    if best:
        found.checked.append("student: not compared, it is the run's best, of an earlier update")
    else:
        _compare_student(folder, scratch, step, found)


def _ended_with_best(folder: Path, step: int, recorded: Mapping[int, str]) -> bool:
    """Whether the run ended with the student of an earlier update, which it was told to load."""
    with read_from(folder, "run.json"):
        asked = settings_at(as_stored(folder), step)[1].get("load_best_model_at_end")
    before = [student for n, student in recorded.items() if n <= step]
    return bool(asked) and recorded.get(step + 1) in before


def _compare_student(folder: Path, scratch: Path, step: int, found: AuditResult) -> None:
    """What the run ended with, value by value: the ledger's digest has 64 values of a tensor."""
    end = ended(entries_in(folder))
    if end is None or end["step"] != step + 1:
        return
    for name in ("student", "adapter"):
        again = tensors_in(scratch / name)
        with read_from(folder, name):
            ours = tensors_in(folder / name)
        found.faults += (
            f"{name}: {key} is not as the run ended with it"
            for key in sorted(ours | again)
            if not _are_equal(ours.get(key), again.get(key))
        )
        if again:
            found.checked.append(f"{name}: every value of {len(again)} tensors")


def _are_equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None or one.dtype != other.dtype:
        return False
    return torch.equal(one, other)


def _weights(folder: Path) -> dict[int, str]:
    found: dict[int, str] = {}
    for entry in entries_in(folder):
        if entry.get("event") == "begin":  # what came after it was dropped
            found = {step: student for step, student in found.items() if step <= entry["step"]}
        elif entry.get("event") in ("update", "end"):
            found[entry["step"]] = entry["student"]
    return found
