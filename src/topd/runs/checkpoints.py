"""Checkpoints that are written atomically, and the way back to one.

::

    RUN/checkpoint-40/   files of transformers: weights (safetensors), optimiser, schedule, RNG
        seal.json        written last: size and SHA-256 of every file, where each record file of
                         the run ended, and the running means of the updates not logged yet

A checkpoint is made under ``RUN/.partial``, synced to disk, sealed, read back and renamed; only
then are older ones removed. To resume from it, the run's record files are cut where they ended
then. Files that a run does not write are not touched, whatever their names end in.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging

from topd.errors import DISK, StoppedError, TOPDError
from topd.runs.files import as_json, file_digest, ranks_of, read_whole, sync
from topd.runs.folder import LINES
from topd.runs.ledger import HEAD, LEDGER
from topd.runs.records import FORMAT, read_run

logger = logging.get_logger(__name__)

SEAL = "seal.json"
PARTIAL = ".partial"
NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
SHARDED = {"optimizer.pt": "optimizer.bin"}  # what FSDP2 calls it
FREE = ("output_dir", "logging_dir", "run_name", "resume_from_checkpoint")  # may always change
SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")
OTHER_RANKS = (
    "resume_from_checkpoint: an update of {run} has {before} rollouts, of {then} rank(s); of {now} "
    "it would have {here}. Launch as many, or set gradient_accumulation_steps to keep {before}."
)
LOST = "resume_from_checkpoint: {path} is missing. Bring it back, or start over in another folder."
OTHER = (
    "resume_from_checkpoint: {run} was begun with {what} (manifest.json). Go on with the same, or "
    "start over in another folder."
)
DATED = (
    "resume_from_checkpoint: {run} was begun with other prompts, and the chat template writes "
    "today's date into them (strftime_now). Give it the date of the first day (its prompts in "
    "rollouts.jsonl and tokens.jsonl have it): chat_template_kwargs: {{date_string: ...}} where "
    "the template knows that name, else a copy of the template with a fixed date as "
    "student.chat_template. With "
    "the same date the run is resumed; for a new run set it from the start."
)
DISK_FAULTS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.EIO),
)
WRITING_FAULTS = (OSError, RuntimeError, SafetensorError)  # how Python, torch and Rust say "full"


@dataclass(frozen=True)
class Seal:
    """What a checkpoint consists of and where its run stood.

    ``files`` has size and SHA-256 of each file, ``records`` the length in bytes of each record file
    of the run folder (earlier versions: of every JSONL file that was there), ``means`` the sums and
    counts of the metrics by name, ``student`` a digest of the weights (earlier versions: none).
    """

    step: int
    files: dict[str, tuple[int, str]]
    records: dict[str, int]
    means: dict[str, dict[str, list[float]]]
    student: str = ""


@contextmanager
def making(
    run: Path,
    step: int,
    means: Any,
    student: str,
    note: Callable[[Path], None],
    *,
    active: bool = True,
    records: Mapping[str, int] | None = None,
) -> Iterator[Path]:
    """Yield a folder to write ``checkpoint-STEP`` in; then seal it, read it back and name it.

    Args:
        run: the run folder.
        step: updates done.
        means: running means, for the seal.
        student: a digest of its weights, for the seal.
        note: told where the seal is, just before the checkpoint has its name.
        active: False on ranks that only write into the folder.
        records: where the record files ended after ``step`` updates; none: where they end now.

    Raises:
        StoppedError: it could not be written (the disk is full, for instance). Nothing of it stays.
    """
    partial = run / PARTIAL / f"checkpoint-{step}"
    try:
        if active:
            _discard(run, [])
            partial.mkdir(parents=True)
        yield partial
        if active:
            ends = positions(run) if records is None else dict(records)
            _seal(partial, Seal(step, {}, ends, means, student))
            if isinstance(fault := examined(partial), str):
                raise OSError(f"read back, {fault}")
            note(partial / SEAL)
            partial.rename(run / partial.name)
            sync(run)
            partial.parent.rmdir()
    except WRITING_FAULTS as error:
        _discard(run, [])
        said = f"{run / partial.name} could not be written: {error}. {_once_there_is_space(run)}"
        raise StoppedError(said, DISK) from error


@contextmanager
def writing(run: Path) -> Iterator[None]:
    """Say what can be done where the disk takes no more records.

    Raises:
        StoppedError: a file of the run could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_FAULTS:
            raise
        raise StoppedError(f"{run}: {error}. {_once_there_is_space(run)}", DISK) from error


def _once_there_is_space(run: Path) -> str:
    free = "Free some space, or check its permissions, then"
    if found := last(run):
        return f"{found.name} is whole. {free} continue with resume_from_checkpoint: last."
    return f"There is no checkpoint. {free} start over, in Python in another folder."


def _discard(run: Path, checkpoints: Iterable[Path]) -> None:
    """Remove checkpoints and what is left of others. None keeps its name and loses its files."""
    shutil.rmtree(run / PARTIAL, ignore_errors=True)
    for path in checkpoints:
        (run / PARTIAL).mkdir(exist_ok=True)
        path.rename(run / PARTIAL / f"old-{path.name}")
    shutil.rmtree(run / PARTIAL, ignore_errors=True)


def _seal(folder: Path, record: Seal) -> None:
    """Sync every file of a new checkpoint to disk and write its seal."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync(path)
        record.files[str(path.relative_to(folder))] = path.stat().st_size, file_digest(path)
    text = json.dumps(asdict(record), indent=1)
    (folder / SEAL).write_text(text + "\n", encoding="utf-8")
    sync(folder / SEAL)
    sync(folder)


def prune(run: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond ``limit``; the best and the newest are kept."""
    found = _numbered(run)
    kept = {found[-1].name, Path(best or "").name}
    spare = [path for path in found if path.name not in kept]
    _discard(run, spare[: max(0, len(found) - limit)] if limit else [])


def check(checkpoint: Path, *, resumable: bool = False) -> Seal:
    """The seal of a checkpoint, once every file agrees with it.

    Args:
        checkpoint: its folder.
        resumable: also have what a resume needs: optimiser, schedule, weights as safetensors.

    Raises:
        TOPDError: there is no checkpoint, or a file is missing, changed or cut off. The message
            names it, and the newest whole checkpoint before it.
    """
    found = examined(checkpoint)
    if isinstance(found, Seal):
        missing = [n for n in NEEDED if {n, SHARDED.get(n, n)}.isdisjoint(found.files)]
        if not any(name.endswith(".safetensors") for name in found.files):
            missing.append("weights as safetensors")
        if not (resumable and missing):
            return found
        raise TOPDError(
            f"resume_from_checkpoint: {checkpoint} has no {', no '.join(missing)}. Was it saved "
            "with save_only_model? Begin a new run with this student."
        )
    earlier = [path for path in _numbered(checkpoint.parent) if _step(path) < _step(checkpoint)]
    whole = [path for path in earlier if isinstance(examined(path), Seal)]
    remedy = (
        f"The one before is whole: resume_from_checkpoint: {whole[-1]}."
        if whole
        else "There is no whole one before it; start over in another folder."
    )
    raise TOPDError(f"resume_from_checkpoint: {checkpoint}: {found}. {remedy}")


def last(run: Path, step: int | None = None) -> Path | None:
    """The newest checkpoint of a run folder (of at most ``step`` updates), complete or not."""
    found = [path for path in _numbered(run) if step is None or _step(path) <= step]
    return found[-1] if found else None


def resolve(given: str | bool | None, run: Path) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means: ``True`` and ``last`` are the newest.

    None where there is nothing to resume from. Raises TOPDError if ``run`` has no such checkpoint.
    """
    if given is True or given == "last":
        return last(run)
    if not given:
        return None
    found = [path for path in _numbered(run) if path.resolve() == Path(str(given)).resolve()]
    if not found:
        there = ", ".join(path.name for path in _numbered(run)) or "none"
        raise TOPDError(
            f"resume_from_checkpoint: there is no checkpoint {given} in {run} (output_dir). It "
            f"holds: {there}. Name one of them, or say last."
        )
    return found[0]


def positions(run: Path) -> dict[str, int]:
    """Length in bytes of every record file of a run folder; all synced, and so is the ledger."""
    for name in (*LINES, LEDGER):
        if (run / name).is_file():
            sync(run / name)
    return sizes(run)


def sizes(run: Path) -> dict[str, int]:
    """Length in bytes of every record file of a run folder.

    The ledger is none: it is only ever added to, and a resume is an entry of it.
    """
    return {name: (run / name).stat().st_size for name in LINES if (run / name).is_file()}


def how_to_resume(run: Path) -> str:
    """What to type, in words."""
    return (
        f"Resume with the same command and --output_dir {quote(str(run))} --resume_from_checkpoint "
        "last (in Python: trainer.train(resume_from_checkpoint=True))."
    )


def cut_back(run: Path, found: Seal) -> None:
    """Drop what was recorded and saved after a checkpoint: the resumed run makes it again.

    Raises:
        TOPDError: a file holds less than it did at the checkpoint.
    """
    there, then = sizes(run), {name: found.records.get(name, 0) for name in LINES}
    for name, length in then.items():
        if there.get(name, 0) < length:
            raise TOPDError(
                f"{run / name}: has {there.get(name, 0)} bytes, but had {length} at "
                f"checkpoint-{found.step}. Bring the records back, or start over in another folder."
            )
    for name in there:
        os.truncate(run / name, then[name])
    later = [path for path in _numbered(run) if _step(path) > found.step]
    if later:
        logger.warning(f"{run}: dropped {', '.join(p.name for p in later)}, later than the resume")
    _discard(run, later)


def check_same(
    run: Path,
    step: int,
    settings: Mapping[str, Any],
    record: Mapping[str, Any],
    *,
    named: bool = False,
    dated: bool = False,
) -> list[dict[str, Any]]:
    """Make sure that a run continues with the data and the models that it was begun with.

    Args:
        run: the run folder.
        step: updates done.
        settings: what run.json would hold now.
        record: what manifest.json would hold now.
        named: the teacher's name counts too: a server's weights are not here to tell.
        dated: the chat template writes today's date, so prompts differ from day to day.

    Returns:
        ``resumed`` of run.json: at which updates the run went on, and what was changed there.

    Raises:
        TOPDError: other data or models, by their fingerprints, or no record of what they were; or
            other ranks, with more or fewer rollouts an update.
    """
    before, stored = read_whole(run / "manifest.json"), read_run(run)
    for name, content in (("manifest.json", before), ("run.json", stored)):
        if not content:
            raise TOPDError(LOST.format(path=run / name))
    for part in ("data", "models"):
        if without_names(before.get(part)) != without_names(record[part]):
            if part == "data" and dated:
                raise TOPDError(DATED.format(run=run))
            raise TOPDError(OTHER.format(run=run, what=f"other {part}"))
    teachers = [content["models"]["teacher"]["name"] for content in (before, record)]
    if named and teachers[0] != teachers[1]:
        what = "a teacher at a server called {}, not {}".format(*teachers)
        raise TOPDError(OTHER.format(run=run, what=what))
    asked = as_json(settings)
    pairs = [(part, stored.get(part) or {}, asked[part]) for part in ("recipe", "config")]
    pairs.append(("versions", before.get("versions", {}), record["versions"]))
    changed = {
        f"{part}.{key}": [then.get(key), value]
        for part, then, new in pairs
        for key, value in new.items()
        if key not in FREE and then.get(key) != value
    }
    held_out = record["eval_data"]
    if before.get("eval_data", held_out) != held_out:  # earlier versions did not say
        changed["eval_data"] = [before["eval_data"], held_out]
    ranks = [stored.get("ranks") or ranks_of(run / f"checkpoint-{step}"), asked["ranks"]]
    if ranks[0] != ranks[1]:
        changed["ranks"] = ranks
        sizes = [math.prod(part[n] for n in SIZES) for part in (stored["config"], asked["config"])]
        before, here = (n * size for n, size in zip(ranks, sizes, strict=True))
        if before != here:
            said = OTHER_RANKS.format(
                run=run, then=ranks[0], now=ranks[1], before=before, here=here
            )
            raise TOPDError(said)
    if stored.get("format", 1) != FORMAT:
        changed["format"] = [stored.get("format", 1), FORMAT]
    if changed:
        logger.warning(f"{run}: from update {step} on with other settings: {changed}")
    return [*stored.get("resumed", ()), {"step": step, "changed": changed}]


def without_names(fingerprints: Any) -> Any:
    """What models are, not where they were loaded from."""
    if not isinstance(fingerprints, dict):
        return fingerprints
    return {key: without_names(own) for key, own in fingerprints.items() if key != "name"}


def begin_anew(run: Path) -> None:
    """Remove the records and checkpoints of a run that did not finish; nothing if there is none.

    A run has a ``run.json``. Other files stay, and so do a teacher's answers: they are used again.

    Raises:
        TOPDError: ``run.json`` is not valid JSON.
    """
    if not {"recipe", "config"} <= read_run(run).keys():
        return
    for name in (*LINES, LEDGER, HEAD):
        (run / name).unlink(missing_ok=True)
    _discard(run, _numbered(run))


def examined(checkpoint: Path) -> Seal | str:
    """The seal of a checkpoint, or what is wrong with it."""
    try:
        found = Seal(**json.loads((checkpoint / SEAL).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return f"has no {SEAL}, so it was not written whole by this program"
    except (OSError, ValueError, TypeError) as error:
        return f"{SEAL} cannot be read ({error})"
    for name, (size, digest) in found.files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if file_digest(path) != digest:
            return f"{name} was changed after it was written"
    return found


def _numbered(run: Path) -> list[Path]:
    """The checkpoints of a run folder by rising update."""
    found = (path for path in run.glob("checkpoint-*") if path.name[11:].isdigit())
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name[11:])
