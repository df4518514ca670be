"""A Trainer that has every weight of a checkpoint when it resumes from it, or says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import Trainer

from topd.errors import TOPDError
from topd.inputs.models.fingerprints import saved_digest
from topd.inputs.models.saved import load_saved
from topd.runs.checkpoints import SEAL, Seal


class LoadingTrainer(Trainer):
    """A Trainer whose student is that of the checkpoint once it is loaded.

    Trainer leaves a weight as it was where a checkpoint has none of its name, and only warns.
    """

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load = super()._load_from_checkpoint
        self._load(Path(resume_from_checkpoint), lambda: load(resume_from_checkpoint, model))

    def _load_best_model(self) -> None:
        self._load(Path(str(self.state.best_model_checkpoint)), super()._load_best_model)

    def _load(self, checkpoint: Path, as_trainer: Callable[[], Any]) -> None:
        """Raises TOPDError: the student has not the weights that it was saved with."""
        model = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled or isinstance(model, PeftModel):
            as_trainer()
        else:
            load_saved(model, checkpoint)
        seal = Seal(**json.loads((checkpoint / SEAL).read_text(encoding="utf-8")))
        if seal.student not in ("", saved_digest(self.model)):  # "": by earlier versions
            raise TOPDError(
                f"resume_from_checkpoint: {checkpoint} is whole, but transformers and peft do not "
                "load it into the student as it was saved. Try the versions that manifest.json "
                "names, or begin a new run with this student."
            )
