"""``topd audit`` and ``topd replay``: is a run folder what was run, and does the run repeat?

An audit checks the chain of the ledger, the files and records against it, and models and data
against their fingerprints. Then it takes updates at random and makes their decisions again from the
stored rollouts: the teacher scores them, writes its windows, and the method decides. The student of
a later update is gone, so what needs its weights is not re-derived there (its log-probs at
sampling, detectors and methods with statistics, ``embedding: student``, what
``relay`` lets it write); a replay does that, from the checkpoint before.
"""

from __future__ import annotations

import json
import random
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from topd.commands.recipe import Recipe
from topd.commands.train import make_trainer
from topd.config import TOPDConfig
from topd.errors import COLLAPSED, NONFINITE, StoppedError, TOPDError
from topd.inputs.fingerprints import fingerprint, model_fingerprint, trained_digest
from topd.inputs.models import ModelSpec, eos_ids
from topd.inputs.rows import DataSpec
from topd.named import is_outside
from topd.runs import checkpoints
from topd.runs.files import digest, file_digest
from topd.runs.folder import RECORDS, files_in, guidance_record, rollout_record
from topd.runs.ledger import HEAD, LEDGER, Entry, check_chain, surviving
from topd.runs.records import DRAWN, as_before, check_format
from topd.runs.verified import read_entries, read_head, read_lines, read_manifest, read_records
from topd.seeds import sampling_seeds
from topd.training.metrics import Means, measure_experience
from topd.training.trainer import TOPDTrainer
from topd.training.warmstart import WarmstartConfig, WarmstartTrainer
from topd.types import Prompt, Rollout

TIMES = ("seconds/", "tokens_per_second", "train_", "total_flos", "eval/", "eval_", "epoch")
ALONE: dict[str, Any] = {  # a repetition writes nothing but records
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "resume_from_checkpoint": None,
    "hub_token": None,  # transformers writes a placeholder
    "report_to": "none",
    "disable_tqdm": True,
    # nor does it tell anybody, or read files that a folder names
    "push_to_hub": False,
    "hub_model_id": None,
    "deepspeed": None,
    "accelerator_config": None,
    "trackio_space_id": None,
    "trackio_bucket_id": None,
    "trackio_static_space_id": None,
}


@dataclass(frozen=True)
class Trust:
    """What the auditor allows. A run folder may be another's, so nothing of this is read there.

    Args:
        remote_code: run code of the models' repositories where the run did.
        completions: URLs of the auditor's servers of the teacher, where the run's was served.
        pooling: likewise, those that give last hidden states.
        api_key_env: the environment variable with their API key.
    """

    remote_code: bool = False
    completions: Sequence[str] = ()
    pooling: Sequence[str] = ()
    api_key_env: str | None = None


@dataclass
class AuditResult:
    """What was checked, and the faults; both in words."""

    checked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


NO_TRUST = Trust()
OTHERWISE = (
    "{folder}: a version before 0.2.0 sampled its texts, with random numbers that this version "
    "does not make. Replay it with the version that manifest.json names, or audit it: "
    "topd audit {folder}."
)


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
        folder: the run.
        updates: how many updates' decisions are re-derived; 0 loads no model.
        seed: which ones. By default one that nobody can know beforehand; it is among what was
            checked, so that the audit can be repeated.
        tolerance: by how much a number may differ, in its own unit.
        trust: what else than reading files is allowed; by default nothing. Without it an audit
            connects nowhere: models and data must be on this machine.

    Raises:
        TOPDError: the folder has no ledger, or models or data cannot be loaded (where there are
            faults already, that is one more).
    """
    found, seed = AuditResult(), secrets.randbits(32) if seed is None else seed
    entries = _entries(folder, found)
    _check_records(folder, surviving(entries), found)
    if not updates or not _readable(folder, found):
        return found
    try:
        with _Rebuilt(folder, trust) as trainer:
            _check_sources(folder, trainer, found)
            _check_settings(folder, trainer, found)
            _check_student(folder, entries, trainer, found)
            _check_decisions(folder, trainer, updates, seed, tolerance, found)
    except TOPDError as error:
        if not found.faults:
            raise
        found.faults.append(f"decisions: not re-derived: {error}")
    return found


def replay_step(
    folder: Path, step: int, *, tolerance: float = 0.0, trust: Trust = NO_TRUST
) -> AuditResult:
    """Repeat an update from the checkpoint before it, or from the start, and compare.

    Compared are every record from there on and, where the ledger has them, the weights. A loss that
    is not finite is re-derived too. See :func:`audit_run` for the arguments.

    Raises:
        TOPDError: there is no such update, its checkpoint is damaged, or models or data cannot be
            loaded or are others, or its texts were sampled by a version with other random numbers.
    """
    recorded = read_records(folder, "rollouts.jsonl")
    if not recorded:
        raise TOPDError(f"{folder}: has no rollouts to compare with (log_rollouts was off?).")
    if not any(record["step"] == step for record in recorded):
        last = max((record["step"] for record in recorded), default=-1)
        raise TOPDError(f"--step {step}: {folder} has the updates 0 to {last}. Choose one.")
    found, start = AuditResult(), checkpoints.last(folder, step)
    seal = checkpoints.check(start, resumable=True) if start else None
    first = seal.step if seal else 0
    with _Rebuilt(folder, trust) as trainer:
        if _drawn_otherwise(folder) and _samples(trainer.args):
            raise TOPDError(OTHERWISE.format(folder=folder))
        scratch = trainer.run_folder
        if start and seal:
            _as_at(start, scratch)
            trainer.examined = {scratch / start.name: seal}
        trainer.add_callback(_StopAfter(step + 1))
        try:
            trainer.train(resume_from_checkpoint=bool(start))
        except StoppedError as error:  # as the run may have been
            if error.exit_code not in (NONFINITE, COLLAPSED):
                raise
            found.checked.append(f"stopped: {str(error).partition('. ')[0]}")
        for name in RECORDS:
            _compare_records(folder, scratch, name, (first, step), tolerance, found)
        _compare_weights(folder, scratch, trainer, step, found)
    begun = start.name if start else "the beginning"
    found.checked.insert(0, f"replay: update {step}, from {begun}")
    return found


# The chain, the files and the records


def _entries(folder: Path, found: AuditResult) -> list[Entry]:
    """The ledger's entries; what is wrong with their chain is found here."""
    entries, faults = read_entries(folder)
    found.faults += faults
    head = read_head(folder)
    if head is None:
        found.faults.append(f"{HEAD}: is missing or no head")
    found.faults += check_chain(entries, head or {"entries": 0, "hash": ""})
    found.checked.append(f"chain: {len(entries)} entries")
    if not any(entry.get("event") == "end" for entry in entries):
        found.checked.append("the run has not ended, or was stopped")
    return entries


def _check_records(folder: Path, entries: Sequence[Entry], found: AuditResult) -> None:
    whole = [entry for entry in entries if "step" not in entry]
    for entry in whole:
        found.faults += _file_faults(folder, entry["file"], entry["record"])
    known = {entry["file"] for entry in whole}
    if "student/config.json" in known:  # earlier versions sealed weights only
        found.faults += (
            f"{name}: is not in the ledger"
            for name in files_in(folder, "student", "adapter")
            if name not in known
        )
    records = 0
    for name in RECORDS:
        expected = [entry for entry in entries if entry["file"] == name and "step" in entry]
        lines, ends = read_lines(folder / name)
        found.faults += _line_faults(name, expected, [digest(line) for line in lines])
        if not ends:
            found.faults.append(f"{name}: line {len(lines)} is cut off")
        records += len(expected)
    found.checked.append(f"files: {len(whole)}, records: {records}")


def _file_faults(folder: Path, name: str, recorded: str) -> Iterator[str]:
    """A file that is missing or was changed; of a checkpoint, any of its files."""
    path = folder / name
    try:
        if path.name == checkpoints.SEAL and not path.parent.exists():
            return  # pruned
        if not path.is_file():
            yield f"{name}: is missing"
        elif file_digest(path) != recorded:
            yield f"{name}: was changed"
        elif path.name == checkpoints.SEAL and isinstance(
            fault := checkpoints.examined(path.parent), str
        ):
            yield f"{path.parent.name}: {fault}"
    except OSError as error:
        yield f"{name}: cannot be read ({error.strerror})"


def _line_faults(name: str, expected: Sequence[Entry], lines: Sequence[str]) -> Iterator[str]:
    """Records that were changed, are missing, were added, or are in another place."""
    known = {entry["record"]: entry for entry in expected}
    there = set(lines)
    missing = [entry for entry in expected if entry["record"] not in there]
    strange = [n for n, line in enumerate(lines, 1) if line not in known]
    for entry in missing:
        changed = strange.pop(0) if strange else None
        how = "is missing" if changed is None else f"was changed (line {changed})"
        yield f"{name}, {_place(entry)}: {how}"
    for number in strange:
        yield f"{name}, line {number}: is not in the ledger"
    if missing or strange:
        return
    for number, (line, entry) in enumerate(zip(lines, expected, strict=False), 1):
        if line != entry["record"]:
            yield f"{name}, line {number}: {_place(known[line])} stands where {_place(entry)} did"
    if len(lines) != len(expected):
        yield f"{name}: has {len(lines)} lines, the ledger {len(expected)}"


def _place(record: Mapping[str, Any]) -> str:
    if "rollout" in record:
        return f"update {record['step']}, rollout {record['rollout']}"
    return f"step {record['step']}"


# The run again: models, data, decisions


class _Rebuilt:
    """The trainer of a run folder, in a folder of its own that is removed at the end."""

    def __init__(self, folder: Path, trust: Trust) -> None:
        self.folder, self.trust = folder, trust
        self.scratch = tempfile.TemporaryDirectory(prefix="topd-")

    def __enter__(self) -> TOPDTrainer:
        logging.set_verbosity_error()
        recipe = stored_recipe(self.folder, Path(self.scratch.name), self.trust)
        with _read_from(self.folder, "run.json"), _offline():
            trainer, _ = make_trainer(
                recipe, recipe.data.load(), warmstart=isinstance(recipe.args, WarmstartConfig)
            )
        trainer.remove_callback(PrinterCallback)
        if isinstance(trainer, WarmstartTrainer) and trainer.args.answers == "teacher":
            answers = Path(self.scratch.name) / "answers.jsonl"
            with _read_from(self.folder, answers.name):
                shutil.copy(self.folder / answers.name, answers)
                trainer.train_dataset = trainer._answered(trainer.questions, answers)
        return trainer

    def __exit__(self, *_: object) -> None:
        self.scratch.cleanup()


def stored_recipe(folder: Path, output: Path, trust: Trust = NO_TRUST) -> Recipe:
    """The recipe of a run as ``run.json`` has it, without evaluation, writing into ``output``.

    Raises:
        TOPDError: there is none, it cannot be read, or it needs what the auditor does not allow.
    """
    with _read_from(folder, "run.json"):
        stored = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        sources, config = stored["recipe"], stored["config"]
        check_format(folder)
        if sources:
            sources = {**sources, **_allowed(folder, sources, config, trust)}
        return _recipe(folder, sources, config, output)


def _allowed(
    folder: Path, sources: Mapping[str, Any], config: Mapping[str, Any], trust: Trust
) -> dict[str, Any]:
    """Student and teacher with the auditor's servers in the place of those that the folder names.

    Raises:
        TOPDError: models or a method that run code, or a served teacher, without leave.
    """
    student, teacher = dict(sources["student"]), dict(sources["teacher"])
    if (student.get("trust_remote_code") or teacher.get("trust_remote_code")) and (
        not trust.remote_code
    ):
        raise TOPDError(
            f"{folder}: its models ran code of their repositories. To run it again, say "
            "--trust-remote-code."
        )
    own = [key for key in ("method", "candidate_loss") if is_outside(str(config.get(key)))]
    if own and not trust.remote_code:
        raise TOPDError(
            f"{folder}: its {own[0]} {config[own[0]]!r} is code of its own. To run it, say "
            "--trust-remote-code."
        )
    student["served"] = None  # its weights are here
    served = teacher.get("served")
    if served is None:
        return {"student": student, "teacher": teacher}
    if not trust.completions or (served.get("pooling") and not trust.pooling):
        raise TOPDError(
            f"{folder}: its teacher was served. An audit does not connect to servers that a folder "
            "names. Start your own with topd serve-teacher and give them with --served-teacher URL "
            "and --served-pooling URL (their API key with --api-key-env), or audit it with "
            "--updates 0."
        )
    teacher["served"] = {
        **served,
        "completions": list(trust.completions),
        "pooling": list(trust.pooling),
        "api_key_env": trust.api_key_env,
        "weights": None,
    }
    return {"student": student, "teacher": teacher}


@contextmanager
def _offline() -> Iterator[None]:
    """Have models and data from this machine only, whatever a folder names."""
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def _read_from(folder: Path, name: str) -> Iterator[None]:
    """Say which file it was where what is in it cannot be used, whatever that leads to."""
    try:
        yield
    except TOPDError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        said = " ".join(repr(error).split())
        raise TOPDError(f"{folder / name}: cannot be used: {said}.") from error


def _recipe(
    folder: Path, sources: Mapping[str, Any], config: Mapping[str, Any], output: Path
) -> Recipe:
    if not sources:
        raise TOPDError(
            f"{folder}: its models and data came from Python, not from a recipe: they cannot be "
            "loaded again. Audit it with --updates 0."
        )
    kind = WarmstartConfig if "answers" in config else TOPDConfig
    known = {f.name for f in fields(kind) if f.init}
    settings = {key: value for key, value in config.items() if key in known} | ALONE
    return Recipe(
        student=ModelSpec(**sources["student"]),
        teacher=ModelSpec(**sources["teacher"]),
        data=_data_of(sources["data"]),
        eval_data=None,
        evaluation=None,
        compare=None,
        lora=LoraConfig(**sources["lora"]) if sources["lora"] else None,
        args=kind(**{**settings, "output_dir": str(output)}),
    )


def _data_of(stored: Mapping[str, Any]) -> DataSpec:
    """Without the defaults: some keys exclude others."""
    usual = {name: known.default for name, known in DataSpec.model_fields.items()}
    return DataSpec(**{key: value for key, value in stored.items() if value != usual[key]})


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
    manifest = read_manifest(folder)
    for role, model in (("student", trainer.model), ("teacher", trainer.teacher_model)):
        recorded, now = manifest["models"][role], model_fingerprint(model)
        if recorded["sha256"] != now["sha256"]:
            found.faults.append(
                f"{role}: {now['name']} has not the weights of the run: "
                f"{now['sha256'][:12]}, recorded {recorded['sha256'][:12]}"
            )
    if manifest["data"] != fingerprint(trainer.train_dataset):
        found.faults.append("data: the prompts are not those of the run")
    found.checked.append("models and data: student at the start, teacher, prompts")


def _check_settings(folder: Path, trainer: TOPDTrainer, found: AuditResult) -> None:
    """Seed and learning rate against what they led to: the order of the prompts, the schedule."""
    if _was_changed(folder) or _suspect(found, "data:", "rollouts.jsonl", "metrics.jsonl"):
        return
    records = read_records(folder, "rollouts.jsonl")
    records.sort(key=lambda record: (record["step"], record["rollout"]))
    order = [trainer.train_dataset[i].index for i in trainer._get_train_sampler()]
    met = [record["prompt"] for record in records][: len(order)]
    if met != order[: len(met)]:
        first = next(i for i, pair in enumerate(zip(met, order, strict=False)) if len({*pair}) > 1)
        found.faults.append(
            f"{_place(records[first])}: prompt {met[first]} where seed {trainer.args.seed} has "
            f"{order[first]}"
        )
    checked = "order of the prompts"
    if trainer.args.max_steps > 0:
        found.faults += _rate_faults(folder, trainer)
        checked += ", learning rate of each log"
    found.checked.append(f"settings: {checked}")


def _suspect(found: AuditResult, *beginnings: str) -> bool:
    """Whether a fault was found already in what a further check relies on."""
    return any(fault.startswith(beginnings) for fault in found.faults)


def _was_changed(folder: Path) -> bool:
    """Whether settings were changed where the run was resumed."""
    with _read_from(folder, "run.json"):
        stored = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return any(resumed["changed"] for resumed in stored.get("resumed", ()))


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
        if not _close(log["learning_rate"], expected, 1e-6 * args.learning_rate):
            yield (
                f"metrics.jsonl, step {log['step']}: learning_rate is "
                f"{_short(log['learning_rate'])}, run.json's settings give {expected:g}"
            )


def _check_student(
    folder: Path, entries: Sequence[Entry], trainer: TOPDTrainer, found: AuditResult
) -> None:
    """The finished student against the digests that the ledger has of it."""
    begun = [e for e in entries if e.get("event") == "update" and e["step"] == 0]
    if begun and begun[0]["student"] != trained_digest(trainer.model):
        found.faults.append(f"{LEDGER}: the student before update 0 is not the one at the start")
    ends = [entry for entry in entries if entry.get("event") == "end"]
    if not ends:
        return
    adapted = isinstance(trainer.model, PeftModel)
    place = folder / ("adapter" if adapted else "student")
    if _suspect(found, place.name):
        return
    with _read_from(folder, place.name):
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        weights = {k: v for file in place.glob("*.safetensors") for k, v in load_file(file).items()}
        if adapted:
            set_peft_model_state_dict(trainer.model, weights)
        else:
            trainer.model.load_state_dict(weights, strict=False)
        if trained_digest(trainer.model) != ends[-1]["student"]:
            found.faults.append(f"{place.name}: has not the weights that the run ended with")
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                parameter.copy_(before[name])
    found.checked.append(f"{place.name}: against the weights at the end of the run")


def _check_decisions(
    folder: Path,
    trainer: TOPDTrainer,
    updates: int,
    seed: int,
    tolerance: float,
    found: AuditResult,
) -> None:
    stored: dict[int, tuple[list[Any], list[Any]]] = {}
    for i, name in enumerate(("rollouts.jsonl", "guidance.jsonl")):
        for record in read_records(folder, name):
            stored.setdefault(record["step"], ([], []))[i].append(record)
    whole = [n for n, (rollouts, guidance) in stored.items() if len(rollouts) == len(guidance)]
    steps = sorted(random.Random(seed).sample(sorted(whole), min(updates, len(whole))))
    forks = count = 0
    otherwise = _drawn_otherwise(folder)
    if otherwise and trainer.args.window_temperature > 0:
        found.checked.append("windows: not re-derived, drawn with the numbers of before 0.2.0")
    for step in steps:
        rollouts, guidance = stored[step]
        if not _suspect(found, "data:"):
            found.faults += _door_faults(trainer, rollouts)
        again, means = _decided(trainer, step, rollouts)
        found.faults += _mean_faults(folder, step, means, trainer.args, tolerance)
        known = _known(trainer, guidance, step, otherwise=otherwise)
        for pair, (theirs, ours) in zip(zip(rollouts, guidance, strict=True), again, strict=True):
            for recorded, now in zip(pair, (theirs, ours), strict=True):
                found.faults += _disagreements(recorded, now, known, tolerance)
            forks += len(pair[1]["forks"])
        count += len(rollouts)
    if steps:
        found.checked.append(
            f"decisions: {count} rollouts and {forks} candidates of the updates "
            f"{', '.join(map(str, steps))} re-derived (--seed {seed})"
        )


def _door_faults(trainer: TOPDTrainer, records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a rollout says of itself against its prompt and its tokens."""
    args = trainer.args
    prompts = {prompt.index: prompt for prompt in trainer.train_dataset}
    ends = set(eos_ids(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class))
    for record in records:
        place, response = _place(record), record["response_ids"]
        prompt = prompts.get(record["prompt"])
        if prompt is None or [list(prompt.student), list(prompt.teacher)] != [
            record["prompt_ids"],
            record["teacher_prompt_ids"],
        ]:
            yield f"{place}: its tokens are not those of prompt {record['prompt']}"
        if args.learns_from_answers:
            continue
        if record["finished"] != (bool(response) and response[-1] in ends):
            yield f"{place}: finished is {record['finished']}, its last token says otherwise"
        if len(response) > args.max_completion_length or (
            not record["finished"] and len(response) < args.max_completion_length
        ):
            yield f"{place}: has {len(response)} tokens, the limit is {args.max_completion_length}"
        if len(record["logprobs"]) != len(response):
            yield f"{place}: logprobs are missing"


def _decided(
    trainer: TOPDTrainer, step: int, records: Sequence[Mapping[str, Any]]
) -> tuple[list[tuple[dict[str, Any], dict[str, Any]]], dict[str, float]]:
    """The records that the teacher and the method make of stored rollouts, and their means."""
    rollouts = [_rollout(record, trainer.observer.teacher.head.vocab_size) for record in records]
    seeds = sampling_seeds(trainer.args.seed, step, len(rollouts))
    look = trainer.args.looks_ahead(step) and (step == 0 or not _needs_student(trainer.args))
    made = trainer.observer.inspect(rollouts, seeds, trainer.args.guidance_method(look_ahead=look))
    decode, means = trainer.processing_class.decode, Means()
    measure_experience(means, made)
    pairs = [
        (
            rollout_record(step, i, r, made.teacher_logprobs[i].tolist(), decode(list(r.response))),
            guidance_record(step, i, r, made.forks[i], made.guidance[i]),
        )
        for i, r in enumerate(made.rollouts)
    ]
    return pairs, means.take()


def _mean_faults(
    folder: Path, step: int, means: Mapping[str, float], args: TOPDConfig, tolerance: float
) -> Iterator[str]:
    """Logged means that follow from rollouts and the teacher alone, where each update is logged."""
    logs = {log["step"]: log for log in read_records(folder, "metrics.jsonl") if "loss" in log}
    if args.logging_steps != 1 or args.logging_strategy != "steps":
        return
    if step + 1 not in logs:
        return
    for name, value in means.items():
        logged = logs[step + 1].get(name)
        follows = name.startswith("completions/") or name.endswith("_sampled")
        if follows and not _close(logged, value, tolerance):
            yield (
                f"metrics.jsonl, step {step + 1}: {name} is {_short(logged)}, its rollouts give "
                f"{_short(value)}"
            )


def _close(logged: Any, value: float, tolerance: float) -> bool:
    """Whether a figure of a log, which may be anything, is this one."""
    return isinstance(logged, (int, float)) and abs(logged - value) <= tolerance


def _rollout(record: Mapping[str, Any], vocab_size: int) -> Rollout:
    for key in ("prompt_ids", "teacher_prompt_ids", "response_ids"):
        if max(record[key], default=0) >= vocab_size:
            raise TOPDError(
                f"rollouts.jsonl, {_place(record)}: {key} has the token {max(record[key])}, the "
                f"models know {vocab_size}."
            )
    prompt = Prompt(
        record["prompt"], tuple(record["prompt_ids"]), tuple(record["teacher_prompt_ids"])
    )
    return Rollout(
        prompt, tuple(record["response_ids"]), tuple(record["logprobs"]), record["finished"]
    )


def _needs_student(args: TOPDConfig) -> bool:
    """Whether decisions depend on weights of the student that are not stored."""
    return (
        args.guidance_method().statistics or args.detector.statistics or args.embedding == "student"
    )


def _drawn_otherwise(folder: Path) -> bool:
    """Whether a run's tokens were drawn with random numbers that this version does not make."""
    return check_format(folder) < DRAWN


def _samples(args: TOPDConfig) -> bool:
    """Whether a run's texts depend on random numbers."""
    own = not args.learns_from_answers and args.temperature > 0
    return own or args.window_temperature > 0


def _known(
    trainer: TOPDTrainer, guidance: Sequence[Mapping[str, Any]], step: int, *, otherwise: bool
) -> set[str]:
    """The keys of a record that can be re-derived without the student of that update.

    ``otherwise``: windows and what follows them were drawn with other random numbers, where they
    were not greedy.
    """
    keys = {"prompt", "prompt_ids", "teacher_prompt_ids", "teacher_logprobs", "text", "finished"}
    if (step and _needs_student(trainer.args)) or (
        otherwise and trainer.args.window_temperature > 0
    ):
        return keys
    keys |= {"forks", "weights", "capped", "targets", "advantages"}
    goes_on = any(branch["go_on"] for row in guidance for branch in row["branches"])
    return keys if (step or otherwise) and goes_on else {*keys, "branches"}


def _disagreements(
    recorded: Mapping[str, Any], now: Mapping[str, Any], known: set[str], tolerance: float
) -> Iterator[str]:
    plain = as_before(json.loads(json.dumps(now)), recorded)
    for key in sorted(known & plain.keys()):
        if key not in recorded:
            yield f"{_place(recorded)}: {key} is missing"
            continue
        where = _difference(recorded[key], plain.get(key), tolerance)
        if where is not None:
            yield f"{_place(recorded)}: {key}{where}"


def _difference(recorded: Any, now: Any, tolerance: float) -> str | None:
    """Where two values of JSON differ first, and how; None if they agree."""
    if isinstance(recorded, dict) and isinstance(now, dict) and recorded.keys() == now.keys():
        pairs = [(f".{key}", recorded[key], now[key]) for key in recorded]
    elif isinstance(recorded, list) and isinstance(now, list) and len(recorded) == len(now):
        pairs = [(f"[{i}]", *pair) for i, pair in enumerate(zip(recorded, now, strict=True))]
    elif recorded == now or _near(recorded, now, tolerance):
        return None
    else:
        return f": recorded {_short(recorded)}, re-derived {_short(now)}"
    for where, one, other in pairs:
        inner = _difference(one, other, tolerance)
        if inner is not None:
            return where + inner
    return None


def _near(recorded: Any, now: Any, tolerance: float) -> bool:
    numbers = all(isinstance(x, float) for x in (recorded, now))
    return numbers and (abs(recorded - now) <= tolerance or (recorded != recorded and now != now))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Replay


class _StopAfter(TrainerCallback):
    """Ends a run after so many updates, whatever its schedule says."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self, args: TOPDConfig, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        control.should_training_stop |= state.global_step >= self.step


def _as_at(checkpoint: Path, scratch: Path) -> None:
    """Have what a run needs to resume from a checkpoint in another folder; training cuts it."""
    run = checkpoint.parent
    for path in [*run.glob("*.jsonl"), run / "run.json", run / "manifest.json"]:
        if path.name != LEDGER:
            shutil.copy(path, scratch)
    (scratch / checkpoint.name).symlink_to(checkpoint.resolve())


def _compare_records(
    folder: Path,
    scratch: Path,
    name: str,
    steps: tuple[int, int],
    tolerance: float,
    found: AuditResult,
) -> None:
    """Records of the replayed updates, key by key; times and evaluations aside."""
    first, last = (step + (name == "metrics.jsonl") for step in steps)
    ours, theirs = (
        [r for r in read_records(place, name) if first <= r["step"] <= last and _of_an_update(r)]
        for place in (folder, scratch)
    )
    if len(ours) != len(theirs):
        found.faults.append(f"{name}: {len(ours)} records of these updates, {len(theirs)} again")
        return
    for recorded, now in zip(ours, theirs, strict=True):
        keys = {key for key in recorded if not key.startswith(TIMES)}
        found.faults += (
            f"{name}, {said}" for said in _disagreements(recorded, now, keys, tolerance)
        )
    found.checked.append(f"{name}: {len(ours)} records")


def _of_an_update(record: Mapping[str, Any]) -> bool:
    return "rollout" in record or "loss" in record


def _compare_weights(
    folder: Path, scratch: Path, trainer: TOPDTrainer, step: int, found: AuditResult
) -> None:
    """The student before every replayed update and after the last, as far as it is recorded."""
    recorded, again = _weights(folder), _weights(scratch)
    again[step + 1] = trained_digest(trainer.model)
    both = sorted(recorded.keys() & again.keys())
    found.faults += (
        f"weights before update {n}: not those of the run" for n in both if recorded[n] != again[n]
    )
    found.checked.append(f"weights: before the updates {', '.join(map(str, both))}")


def _weights(folder: Path) -> dict[int, str]:
    entries = read_entries(folder)[0] if (folder / LEDGER).exists() else []
    return {
        entry["step"]: entry["student"]
        for entry in entries
        if entry.get("event") in ("update", "end")
    }
