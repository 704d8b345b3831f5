"""Random numbers that are a function of whole numbers alone: of a seed and an epoch, say, however a run came there."""

from __future__ import annotations

import numpy as np
import torch


def generator_of(*key: int) -> torch.Generator:
    """A generator on the CPU, the same for the same numbers."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def seed_of(*key: int) -> int:
    """A seed of 32 bits, the same for the same numbers."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])
