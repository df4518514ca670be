"""``topd audit``: is a run folder what was run?"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import PeftModel

from topd.commands.audit.decisions import Rederived, check_decisions, chosen_updates
from topd.commands.audit.files import SAVED, check_end, check_records, of_comparison, read_chain
from topd.commands.audit.rebuilt import NO_TRUST, Trust, rebuilt, started_elsewhere
from topd.commands.audit.result import (
    AuditResult,
    is_close,
    is_suspect,
    not_under_way,
    place_of,
    shortened,
)
from topd.commands.audit.settings import as_stored, by_settings, ranks_at, read_from, was_changed
from topd.commands.repair import restore, snapshot
from topd.errors import TOPDError
from topd.inputs.models.adapters import begins_with_base
from topd.inputs.models.fingerprints import fingerprint, model_fingerprint, trained_digest
from topd.inputs.models.saved import load_saved
from topd.runs.ledger import LEDGER, Entry, ended
from topd.runs.verified import read_manifest, read_records
from topd.training.trainer import TOPDTrainer


def audit_run(
    folder: Path,
    *,
    updates: int = 3,
    seed: int | None = None,
    tolerance: float = 1e-4,
    trust: Trust = NO_TRUST,
) -> AuditResult:
    """Check a training run's folder.

    Args:
        updates: how many updates' decisions are re-derived; 0 loads no model.
        seed: which ones. By default one that nobody can know beforehand; it is among what was
            checked, so that the audit can be repeated.
        tolerance: by how much a number may differ, in its own unit.
        trust: what else than reading files is allowed; by default nothing. Without it an audit
            connects nowhere: models and data must be on this machine.

    Raises:
        TOPDError: the folder has no ledger, or is a comparison's, whose runs have the decisions, or
            models or data cannot be loaded (where there are faults already, that is one more), or
            there are faults and the run is under way.
    """
    found, seed = AuditResult(), secrets.randbits(32) if seed is None else seed
    compares = of_comparison(folder)
    if compares and updates:
        raise TOPDError(
            f"{folder}: is a comparison, which has no decisions of its own. Audit its runs, each "
            f"{folder}/arms/ARM-SEED, and its own ledger with --updates 0."
        )
    entries = read_chain(folder, found)
    check_records(folder, entries, found)
    if not compares:
        check_end(folder, entries, found)
    if not updates or not _readable(folder, found):
        return not_under_way(folder, found)
    try:
        stored, done = chosen_updates(folder, updates, seed), Rederived()
        for number, steps in enumerate(by_settings(folder, stored)):
            part = {step: stored[step] for step in steps}
            with rebuilt(folder, trust, at=steps[0] if number else None) as trainer:
                if number == 0:  # as the settings are now
                    _check_sources(folder, trainer, found)
                    _check_resumed(folder, entries, found)
                    _check_settings(folder, trainer, found)
                    _check_student(folder, entries, trainer, found)
                check_decisions(folder, trainer, part, tolerance, found, done)
            del trainer  # before the next one is loaded
        found.checked += done.in_words(seed)
    except TOPDError as error:
        if not found.faults:
            raise TOPDError(f"{error} Chain, files and records were checked: no fault.") from error
        found.faults.append(f"decisions: not re-derived: {error}")
    return not_under_way(folder, found)


def _readable(folder: Path, found: AuditResult) -> bool:
    """Whether the records can be read at all; else there is nothing to make again."""
    try:
        for name in ("rollouts.jsonl", "guidance.jsonl"):
            read_records(folder, name)
        read_manifest(folder)
    except TOPDError as error:
        found.faults.append(f"decisions: not re-derived: {error}")
        return False
    return True


def _check_sources(folder: Path, trainer: TOPDTrainer, found: AuditResult) -> None:
    """Models and data against their fingerprints in the manifest."""
    manifest, where = read_manifest(folder), started_elsewhere(folder)
    for role, model in (("student", trainer.model), ("teacher", trainer.teacher_model)):
        recorded, now = manifest["models"][role], model_fingerprint(model)
        if recorded["sha256"] != now["sha256"]:
            found.faults.append(
                f"{role}: {now['name']} has not the weights of the run: "
                f"{now['sha256'][:12]}, recorded {recorded['sha256'][:12]}{where}"
            )
    if manifest["data"] != fingerprint(trainer.train_dataset):
        found.faults.append(f"data: the prompts are not those of the run{where}")
    found.checked.append("models and data: student at the start, teacher, prompts")


def _check_settings(folder: Path, trainer: TOPDTrainer, found: AuditResult) -> None:
    """Seed and learning rate against what they led to: the order of the prompts, the schedule."""
    if was_changed(folder) or is_suspect(found, "data:", "rollouts.jsonl", "metrics.jsonl"):
        return
    records = read_records(folder, "rollouts.jsonl")
    records.sort(key=lambda record: (record["step"], record["rollout"]))
    order = [trainer.train_dataset[i].index for i in trainer._get_train_sampler()]
    if trainer.args.dataloader_drop_last:  # an epoch leaves out its last ones
        at_once = trainer.args.per_device_train_batch_size * ranks_at(folder, None)
        order = order[: len(order) // at_once * at_once]
    met = [record["prompt"] for record in records][: len(order)]
    if met != order[: len(met)]:
        first = next(i for i, pair in enumerate(zip(met, order, strict=False)) if len({*pair}) > 1)
        found.faults.append(
            f"{place_of(records[first])}: prompt {met[first]} where seed {trainer.args.seed} has "
            f"{order[first]}"
        )
    checked = ["order of the prompts"] if met else []
    if trainer.args.max_steps > 0:
        found.faults += _rate_faults(folder, trainer)
        checked.append("learning rate of each log")
    if checked:
        found.checked.append(f"settings: {', '.join(checked)}")


def _check_resumed(folder: Path, entries: Sequence[Entry], found: AuditResult) -> None:
    """Each resume that run.json has against the beginnings in the ledger, the first one aside.

    There may be more of those: a run may be killed before it writes run.json.
    """
    begun = (entry["step"] for entry in entries if entry.get("event") == "begin")
    next(begun, None)
    with read_from(folder, "run.json"):
        steps = [resumed["step"] for resumed in as_stored(folder).get("resumed", ())]
    missing = [step for step in steps if step not in begun]  # in order: what is passed is gone
    if missing:
        found.faults.append(
            f"run.json: resumed at update {missing[0]}, where the ledger has no beginning"
        )


def _rate_faults(folder: Path, trainer: TOPDTrainer) -> Iterator[str]:
    """Logs whose learning rate is not that of the schedule in run.json."""
    args = trainer.args
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    schedule = trainer.create_scheduler(args.max_steps, optimizer)
    rates = []
    for _ in range(args.max_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    for log in read_records(folder, "metrics.jsonl"):
        if "learning_rate" not in log or not 0 < log["step"] <= len(rates):
            continue
        expected = rates[log["step"] - 1]
        if not is_close(log["learning_rate"], expected, 1e-6 * args.learning_rate):
            yield (
                f"metrics.jsonl, step {log['step']}: learning_rate is "
                f"{shortened(log['learning_rate'])}, run.json's settings give {expected:g}"
            )


def _check_student(
    folder: Path, entries: Sequence[Entry], trainer: TOPDTrainer, found: AuditResult
) -> None:
    """The student of the last end against the digests that the ledger has of it."""
    begun = [e for e in entries if e.get("event") == "update" and e["step"] == 0]
    own = trainer.model.active_peft_config if isinstance(trainer.model, PeftModel) else None
    known = own is None or not begins_with_base(own)  # else another machine has other bits
    if known and begun and begun[0]["student"] != trained_digest(trainer.model):
        found.faults.append(f"{LEDGER}: the student before update 0 is not the one at the start")
    ends = [entry for entry in entries if entry.get("event") == "end"]
    if not ends:
        return
    adapted = isinstance(trainer.model, PeftModel)
    place = folder / ("adapter" if adapted else "student")
    if is_suspect(found, place.name):
        return
    with read_from(folder, place.name):
        before = snapshot(trainer.model)
        load_saved(trainer.model, place)
        if trained_digest(trainer.model) != ends[-1]["student"]:
            saved = "" if ended(entries) else SAVED
            found.faults.append(f"{place.name}: has not the weights that the run ended with{saved}")
        restore(trainer.model, before)
    when = "at the end of the run" if ended(entries) else "of the end before it was resumed"
    found.checked.append(f"{place.name}: against the weights {when}")
