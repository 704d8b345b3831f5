"""Masks of active samples, and checks of indices."""

from __future__ import annotations

import torch
from torch import Tensor


def check_index(argument: str, index: Tensor, mask: Tensor | None, batch_size: int, n: int, kind: str) -> None:
    """Raise ValueError unless `index` is (batch_size,) and holds 0 ... n - 1 for active samples.

    Values are checked on CPUs only: the host would wait for a GPU.
    """
    if index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"{argument} are {index.dtype}: integers are needed")
    if index.shape != (batch_size,):
        raise ValueError(f"{argument} has the shape {tuple(index.shape)}: the batch has {batch_size} samples")
    if index.device.type == "cpu":
        low, high = (int(bound) for bound in (index if mask is None else index[mask]).aminmax())
        if low < 0 or high >= n:
            raise ValueError(f"{argument} holds {low if low < 0 else high}: there are {n} {kind}, from 0")


def checked_mask(mask: Tensor | None, batch_size: int) -> Tensor | None:
    """The mask (B) as bool, or None if every sample is active.

    Raises ValueError for another shape, and for a mask without an active sample.
    """
    if mask is None:
        return None
    if mask.shape != (batch_size,):
        raise ValueError(f"mask has the shape {tuple(mask.shape)}: the batch has {batch_size} samples")
    if mask.dtype != torch.bool and mask.device.type == "cpu" and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask has values other than 0 and 1")
    mask = mask.bool()
    n_active = int(mask.sum())
    if n_active == 0:
        raise ValueError("mask leaves no sample active: skip the layer instead")
    return None if n_active == batch_size else mask


def spread(values: Tensor, mask: Tensor | None) -> Tensor:
    """Scatter values (N, ...) of the N active samples among zeros: (B, ...). Without a mask they are returned unchanged."""
    if mask is None:
        return values
    places = mask.nonzero()[:, 0]
    return values.new_zeros(len(mask), *values.shape[1:]).index_copy(0, places, values)
