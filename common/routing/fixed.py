"""Decisions that nobody learns: they make no step in the trajectories and have no parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.routing.trajectories import Trajectories


class PerTaskAssignment(nn.Module):
    """The task of each sample as its action: as prior actions of a decision layer, it makes an agent a task."""

    def __init__(self, *ignored: Any, **also_ignored: Any):
        """Takes whatever a learned decision takes, to stand in its place."""
        super().__init__()

    def forward(
        self, xs: Tensor, records: Trajectories, prior_actions: Tensor | Sequence[int] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Trajectories, Tensor]:
        """Raises ValueError if the samples have no tasks."""
        if records.tasks is None:
            raise ValueError("tasks is (): PerTaskAssignment needs a task for each sample, see Initialization")
        return xs, records, records.tasks


class PassThrough(PerTaskAssignment):
    """Action 0 for every sample."""

    def forward(
        self, xs: Tensor, records: Trajectories, prior_actions: Tensor | Sequence[int] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Trajectories, Tensor]:
        return xs, records, torch.zeros(len(xs), dtype=torch.int64, device=xs.device)
