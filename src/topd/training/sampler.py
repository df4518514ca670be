"""The order of the prompts: every prompt as often in a row as it is to be answered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerState


class GroupSampler(Sampler[int]):
    """Every index ``group`` times in a row, in an order redrawn each epoch."""

    def __init__(self, size: int, group: int, seed: int) -> None:
        self.size, self.group, self.seed, self.epoch = size, group, seed, 0

    def __len__(self) -> int:
        return self.size * self.group

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for index in torch.randperm(self.size, generator=generator).tolist():
            yield from [index] * self.group

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch


class EpochTold(TrainerCallback):
    """Tells a sampler which epoch begins.

    Trainer and accelerate do not reach it through the batches that ranks of a resumed run skip.
    """

    def __init__(self) -> None:
        self.sampler: GroupSampler | None = None

    def on_epoch_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        """An epoch begins, or what is left of it."""
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))
