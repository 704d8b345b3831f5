"""Precision of products and convolutions: the meaning of --precision, in one place."""

from __future__ import annotations

import torch
from torch import Tensor

PRECISIONS = ("fp32", "bf16")


def autocast(x: Tensor, precision: str) -> torch.autocast:
    """A context for a model's forward pass on x: bf16 computes products and convolutions in bfloat16, fp32 changes nothing."""
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
