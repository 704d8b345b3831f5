"""Random numbers that are a function of integers only, a seed and an epoch for example: a resumed run draws the same."""

from __future__ import annotations

import random

import numpy as np
import torch


def generator_of(*key: int) -> torch.Generator:
    """A generator on the CPU, the same for the same numbers."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def seed_of(*key: int) -> int:
    """A seed of 32 bits, the same for the same numbers."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed all global random generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of n batches, or samples: a function of seed and epoch, so that a resume in mid-epoch is exact."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
