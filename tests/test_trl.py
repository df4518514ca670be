"""With no guidance the loss, its gradient and the entropy are those of TRL's DistillationTrainer."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import rows, tiny_model, tiny_tokenizer
from datasets import Dataset
from torch import Tensor

from topd import TOPDConfig, TOPDTrainer

pytest.importorskip("trl")
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

COMMON = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}


def padded(sequences: list[tuple[int, ...]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and mask as TRL lays them out: prompts padded on the left, completions right."""
    width = max(map(len, sequences))
    ids, mask = [], []
    for tokens in sequences:
        gap = [0] * (width - len(tokens))
        ids.append([*gap, *tokens] if left else [*tokens, *gap])
        mask.append([0 if x is gap else 1 for x in ()] or [0] * 0)
        ones = [1] * len(tokens)
        mask[-1] = [*gap, *ones] if left else [*ones, *gap]
    return torch.tensor(ids), torch.tensor(mask)
