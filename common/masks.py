"""Masks of padded batches: True, or 1, where an entity is valid."""

from __future__ import annotations

import torch
from torch import Tensor


def as_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mask of a batch as booleans, all True without one: x (N, E, D), mask (N, E) of any type -> (N, E).

    Grids likewise: x (N, rows, columns, D), mask (N, rows, columns). Raises ValueError if the shapes differ, or if a mask on
    the CPU has values other than 0 and 1 (looking at values on a GPU would make the host wait).
    """
    if mask is None:
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, the sets have {tuple(x.shape[:-1])}")
    if mask.dtype == torch.bool:
        return mask
    if mask.device.type == "cpu":
        wrong = mask[(mask != 0) & (mask != 1)]
        if len(wrong):
            raise ValueError(f"mask has value {wrong[0].item()}: it takes 1 (or True) at valid entities, 0 at padding")
    return mask.bool()
