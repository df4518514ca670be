"""The run folder: everything that a page, a person or a replay needs to know of a run.

::

    RUN/run.json         the resolved recipe and configuration
        manifest.json    versions, device, seeds, fingerprints of models and data
        metrics.jsonl    one line a log
        rollouts.jsonl   one line a rollout: prompt, token ids, log-probs
        guidance.jsonl   one line a rollout: its forks, weights and soft targets
        tokens.jsonl     one line a token that occurs: its text (see :mod:`topd.tokentext`)
        checkpoint-*/    of transformers
        report.html      the page (topd.report)
        student/         the trained student, its tokenizer and model card

``step`` in rollouts and guidance is the number of the update, from 0; in metrics it counts the
updates that are done, from 1, as transformers does.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from topd.types import Fork, Guidance, Rollout, TOPDError

PACKAGES = ("topd", "torch", "transformers", "accelerate", "datasets", "peft", "POT", "numpy")
RECORDS = ("metrics.jsonl", "rollouts.jsonl", "guidance.jsonl")


class Ledger:
    """Writes a run folder.

    Args:
        folder: created if need be.
        resume: go on in a folder that already holds a run.
        active: False on ranks that do not write.

    Raises:
        TOPDError: the folder cannot be written, or holds a run and ``resume`` is off.
    """

    def __init__(self, folder: str | Path, *, resume: bool = False, active: bool = True) -> None:
        self.folder = Path(folder)
        self.active = active
        if active:
            check_run_folder(self.folder, resume=resume)

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Write one JSON file, whole or not at all."""
        if self.active:
            partial = self.folder / f"{name}.partial"
            partial.write_text(json.dumps(record, indent=2, default=str) + "\n")
            partial.replace(self.folder / name)

    def append(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Append lines to a JSONL file."""
        if self.active:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)


def check_run_folder(folder: Path, *, resume: bool = False) -> None:
    """Make sure that a run can be written there. Raises TOPDError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise TOPDError(
            f"output_dir: {folder} cannot be written ({error.strerror}). Choose another folder."
        ) from error
    if any((folder / name).exists() for name in RECORDS) and not resume:
        raise TOPDError(
            f"output_dir: {folder} already holds a run. Choose another folder, or go on from a "
            "checkpoint with resume_from_checkpoint."
        )


def manifest(
    *, models: Mapping[str, torch.nn.Module], data: str, seed: int, device: torch.device
) -> dict[str, Any]:
    """What a run was made of: versions, machine, seed, fingerprints."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {
            "platform": platform.platform(),
            "device": str(device),
            "threads": torch.get_num_threads(),
        },
        "seed": seed,
        "models": {name: model_fingerprint(model) for name, model in models.items()},
        "data": data,
    }


def model_fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """Name, size and a SHA-256 over every parameter's name, shape, type and 64 spaced values."""
    digest, count = hashlib.sha256(), 0
    for name, parameter in sorted(model.state_dict().items()):
        flat = parameter.detach().flatten()
        count += flat.numel()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        sample = flat[:: max(1, flat.numel() // 64)].double().cpu()
        digest.update(sample.numpy().tobytes())
    config = getattr(model, "config", None)
    return {
        "name": getattr(config, "_name_or_path", "") or type(model).__name__,
        "class": type(model).__name__,
        "values": count,
        "sha256": digest.hexdigest(),
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
        "forks": [asdict(fork) for fork in forks],
        "weights": weights,
        "capped": guidance.capped,
        "targets": [asdict(target) for target in guidance.targets],
        "branches": [asdict(branch) for branch in guidance.branches],
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
