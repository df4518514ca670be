"""The order of the prompts: every prompt as often in a row as it is to be answered."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


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
