"""The run folder: everything that a page, a person or a replay needs to know of a run.

::

    RUN/run.json         the format of the records, the resolved recipe and configuration
        manifest.json    versions, device, seeds, fingerprints of models and data
        metrics.jsonl    one line a log
        rollouts.jsonl   one line a rollout: prompt, token ids, log-probs
        guidance.jsonl   one line a rollout: its forks, weights and soft targets
        tokens.jsonl     one line a token that occurs: its text (see :mod:`topd.runs.tokens`)
        ledger.jsonl     a chain of hashes over these but the tokens (:mod:`topd.runs.ledger`)
        head.json        where the chain ends
        .lock            who writes here, while somebody does (:mod:`topd.runs.lock`)
        checkpoint-*/    of transformers, with a seal (:mod:`topd.runs.checkpoints`)
        report.html      the page (topd.report)
        student/         the trained student, its tokenizer and model card

``step`` in rollouts and guidance is the number of the update, from 0; in metrics it counts the
updates that are done, from 1, as transformers does.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from topd.errors import TOPDError
from topd.inputs.models.fingerprints import model_fingerprint
from topd.named import code_of
from topd.runs.files import digest, file_digest, raw_lines, write_whole
from topd.runs.ledger import Ledger
from topd.runs.lock import refuse_if_busy
from topd.runs.records import FORMAT, Fork, read_run
from topd.runs.tokens import FILE as TOKENS
from topd.types import Guidance, Rollout

PACKAGES = ("topd", "torch", "transformers", "accelerate", "datasets", "peft", "POT", "numpy")
RESULTS = ("evaluation.json", "gate.json", "responses.jsonl", "base_problems.jsonl")
BEGUN = "{}.begun.jsonl"  # responses of an evaluation until all are there
RECORDS = ("metrics.jsonl", "rollouts.jsonl", "guidance.jsonl")
LINES = (*RECORDS, TOKENS)  # what a training run adds to; whatever else is there is not its own


class RunFolder:
    """Writes a run folder.

    Args:
        folder: created at the first record.
        resume: continue in a folder that already holds a run.
        begun: files of an evaluation that was stopped and continues here.
        active: False on ranks that do not write.
        chained: keep a chain of hashes over what is written.

    Raises:
        TOPDError: the folder cannot be written, or holds a run and ``resume`` is off.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resume: bool = False,
        begun: Collection[str] = (),
        active: bool = True,
        chained: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.active = active
        if active:
            check_run_folder(self.folder, resume=resume, begun=begun)
        self.ledger = Ledger(self.folder) if active and chained else None

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Write one JSON file, atomically."""
        if self.active:
            self.folder.mkdir(parents=True, exist_ok=True)
            record = {"format": FORMAT, **record} if name == "run.json" else record
            write_whole(self.folder / name, record)
            self.seal(name)

    def close(self) -> None:
        """From now on nothing is written: another process may by now."""
        self.active, self.ledger = False, None

    def begin(self, step: int) -> None:
        """Note that a run begins at update ``step``, on top of the records that are there.

        The working directory is noted too: paths of a recipe may be relative to it.
        """
        records = {name: sum(1 for _ in raw_lines(self.folder / name)) for name in RECORDS}
        self.note("begin", step=step, records=records, directory=os.getcwd())

    def append(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Append lines to a JSONL file."""
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        written = [(record, json.dumps(record)) for record in records]
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for _, line in written)
        if self.ledger and name in RECORDS:
            self.ledger.add(
                {
                    "file": name,
                    **{key: record[key] for key in ("step", "rollout", "prompt") if key in record},
                    "record": digest(line.encode()),
                }
                for record, line in written
            )

    def note(self, event: str, **details: Any) -> None:
        """Add an event to the chain, if one is kept."""
        if self.ledger:
            self.ledger.add([{"event": event, **details}])

    def seal(self, *names: str) -> None:
        """Add files as they are now to the chain, if one is kept."""
        for name in names:
            self.seal_as(name, self.folder / name)

    def seal_as(self, name: str, path: Path) -> None:
        """Add a file that is to be called ``name`` to the chain, if one is kept."""
        if self.ledger:
            self.ledger.add([{"file": name, "record": file_digest(path)}])


def files_in(folder: Path, *places: str) -> list[str]:
    """The files of folders of the run folder, relative to it; without model cards, which grow."""
    found = (path for place in places for path in (folder / place).rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in found)
    return sorted(name for name in names if not name.endswith("/README.md"))


def check_run_folder(folder: Path, *, resume: bool = False, begun: Collection[str] = ()) -> None:
    """Make sure that a run can be written there; a folder that is new is not left behind.

    Raises:
        TOPDError: it cannot be written, another process writes there, it holds an evaluation or a
            gate (but for the files ``begun``), or it holds a run and ``resume`` is off.
    """
    try:
        _try_to_write(folder)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        why = getattr(error, "strerror", None) or error
        raise TOPDError(
            f"output_dir: {folder} cannot be written ({why}). Choose another folder."
        ) from error
    refuse_if_busy(folder)
    stopped = {path.name for path in folder.glob(BEGUN.format("*"))} - {*begun}
    if stopped or any((folder / name).exists() for name in RESULTS):
        raise TOPDError(
            f"output_dir: {folder} holds an evaluation or a gate, whole or stopped. Choose another "
            "folder."
        )
    if any((folder / name).exists() for name in LINES) and not resume:
        raise TOPDError(holds_a_run(folder))


def check_trains_here(folder: Path) -> None:
    """Refuse to train where another command has its ``run.json``. Raises TOPDError."""
    if {"command", "compare"} & read_run(folder).keys():
        raise TOPDError(f"output_dir: {folder} holds another command's run. Choose another folder.")


def holds_a_run(folder: Path) -> str:
    """What is said where a second run would begin in a folder."""
    return (
        f"output_dir: {folder} already holds a run. Choose another folder, or resume from a "
        "checkpoint with resume_from_checkpoint."
    )


def _try_to_write(folder: Path) -> None:
    """Make the folder and a file in it, and remove both again. Raises OSError, ValueError."""
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    for attempt in range(9, -1, -1):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                break
        except (FileNotFoundError, FileExistsError):  # another rank, which tries it too, removed it
            if not attempt:
                raise
    for path in made:
        with suppress(OSError):  # not empty: another rank was faster
            path.rmdir()


def manifest(
    *,
    models: Mapping[str, torch.nn.Module],
    data: str,
    seed: int,
    device: torch.device,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a run was made of: versions, machine, seed, fingerprints.

    Code outside this package that the ``settings`` name counts among the versions.
    """
    return {
        "versions": {"python": platform.python_version(), **_versions(), **code_of(settings or {})},
        "machine": {
            "platform": platform.platform(),
            "device": str(device),
            "threads": torch.get_num_threads(),
        },
        "seed": seed,
        "models": {name: model_fingerprint(model) for name, model in models.items()},
        "data": data,
    }


def rollout_record(
    step: int, number: int, rollout: Rollout, teacher_logprobs: Sequence[float], text: str
) -> dict[str, Any]:
    """One line of rollouts.jsonl; ``text`` is for reading, the ids are the truth."""
    return {
        "step": step,
        "rollout": number,
        "prompt": rollout.prompt.index,
        "prompt_ids": rollout.prompt.student,
        "teacher_prompt_ids": rollout.prompt.teacher,
        "response_ids": rollout.response,
        "logprobs": rollout.logprobs,
        "teacher_logprobs": teacher_logprobs,
        "finished": rollout.finished,
        **({"teacher": rollout.prompt.teacher_name} if rollout.prompt.teacher_name else {}),
        **({"replies": rollout.replies} if rollout.replies else {}),
        "text": text,
    }


def guidance_record(
    step: int, number: int, rollout: Rollout, forks: Sequence[Fork], guidance: Guidance
) -> dict[str, Any]:
    """One line of guidance.jsonl. Weights of 1 are left out."""
    weights = {t: weight for t, weight in enumerate(guidance.weights) if weight != 1.0}
    return {
        "step": step,
        "rollout": number,
        "prompt": rollout.prompt.index,
        "forks": [fork.model_dump() for fork in forks],
        "weights": weights,
        "capped": guidance.capped,
        "targets": [{**vars(target)} for target in guidance.targets],  # asdict copies each number
        "branches": [{**vars(branch)} for branch in guidance.branches],
        "advantages": guidance.advantages,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
