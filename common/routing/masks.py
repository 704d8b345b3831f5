"""Masks of active samples, and checks of indices."""

from __future__ import annotations

import torch
from torch import Tensor


def check_index(argument: str, index: Tensor, active: Tensor | None, batch_size: int, n: int, kind: str) -> None:
    """Raise ValueError unless `index` is (batch_size,) and holds 0 ... n - 1 for active samples.

    Values are checked on CPUs only: the host would wait for a GPU at each layer.
    """
    if index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"{argument} are {index.dtype}: integers are needed")
    if index.shape != (batch_size,):
        raise ValueError(f"{argument} has the shape {tuple(index.shape)}: the batch has {batch_size} samples")
    if index.device.type == "cpu":
        low, high = (int(bound) for bound in (index if active is None else index[active]).aminmax())
        if low < 0 or high >= n:
            raise ValueError(f"{argument} holds {low if low < 0 else high}: there are {n} {kind}, from 0")


def active_samples(mask: Tensor | None, batch_size: int) -> Tensor | None:
    """Indices (N) of the active samples, or None if all are. With a mask the host waits for a GPU once, for N.

    Raises ValueError for another shape, and for a mask without an active sample.
    """
    if mask is None:
        return None
    if mask.shape != (batch_size,):
        raise ValueError(f"mask has the shape {tuple(mask.shape)}: the batch has {batch_size} samples")
    if mask.dtype != torch.bool and mask.device.type == "cpu" and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask has values other than 0 and 1")
    active = mask.nonzero()[:, 0]
    if len(active) == 0:
        raise ValueError("mask leaves no sample active: skip the layer instead")
    return None if len(active) == batch_size else active


def spread(values: Tensor, active: Tensor | None, batch_size: int) -> Tensor:
    """Scatter values (N, ...) of the active samples (N) among zeros: (B, ...). If all are, they are returned unchanged."""
    if active is None:
        return values
    return values.new_zeros(batch_size, *values.shape[1:]).index_copy(0, active, values)
