"""A Trainer that has every weight of a checkpoint when it resumes from it, or says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState

from topd.errors import TOPDError
from topd.inputs.models.fingerprints import saved_digest
from topd.inputs.models.saved import load_saved
from topd.runs.checkpoints import SEAL, Seal


class AsNow(TrainerCallback):
    """A resumed run has its current settings, and its best checkpoint where the run is now."""

    def on_train_begin(self, args: Any, state: TrainerState, *_: object, **__: object) -> None:
        """Trainer has the steps and the path of before, and forgets a path that is not there."""
        state.compute_steps(args, state.max_steps)  # of logs, evaluations and checkpoints
        best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        if best.is_dir():
            state.best_model_checkpoint = str(best)


class LoadingTrainer(Trainer):
    """A Trainer whose student is that of the checkpoint once it is loaded.

    Trainer leaves a weight as it was where a checkpoint has none of its name, and only warns.
    """

    def __init__(self, *args: Any, **rest: Any) -> None:
        self.has_best = False  # the student's weights are of its best checkpoint
        super().__init__(*args, **rest)
        self.add_callback(AsNow())

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Raises TOPDError: the student has not the weights that it was saved with."""
        checkpoint = Path(resume_from_checkpoint)
        student = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_saved(student, checkpoint)
        seal = Seal(**json.loads((checkpoint / SEAL).read_text(encoding="utf-8")))
        if seal.student not in ("", saved_digest(self.model)):  # "": by earlier versions
            raise TOPDError(
                f"{checkpoint} is whole, but transformers and peft do not load it into the student "
                "as it was saved. Try the versions that manifest.json names, or begin a new run "
                "with this student."
            )

    def _load_best_model(self) -> None:
        """As at a resume: Trainer would look for an adapter of the name ``default`` alone."""
        self.has_best = True
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
