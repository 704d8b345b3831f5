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


def halving(epoch: int, total: int) -> float:
    """The share of the full rate in an epoch (from 0): halved after every quarter of `total`, rounded down to whole epochs."""
    return 0.5 ** (epoch // max(1, total // 4))


def one_cycle(progress: float, warmup: float) -> float:
    """The share of the highest rate at a share `progress` of all steps: up in a line until `warmup`, then down in a line to 0.

    One cycle of Smith & Topin 2017 (arXiv 1708.07120), without the last phase below the first rate.
    """
    return progress / warmup if progress < warmup else (1 - progress) / (1 - warmup)
