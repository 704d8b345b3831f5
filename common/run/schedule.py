"""Learning rates by epoch."""

from __future__ import annotations

import math


def warmup_cosine(epoch: int, warmup: int, total: int) -> float:
    """The share of the full rate in an epoch (from 0): rising in a line until `warmup`, then half a cosine, 0 at `total`.

    Epoch 0 of a warm-up runs at a thousandth. Without a warm-up the rate is full at once.
    """
    if epoch <= warmup:
        return max(epoch / warmup, 0.001) if warmup else 1.0
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (total - warmup)))
