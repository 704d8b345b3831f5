"""Decisions without parameters: they make no step in the trajectories."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.routing.decision import Trajectories


class PerTaskAssignment(nn.Module):
    """The task of each sample as its action: as prior actions of a decision layer, it gives each task an agent of its own."""

    def forward(
        self, xs: Tensor, records: Trajectories, prior_actions: Tensor | Sequence[int] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Trajectories, Tensor]:
        """Raises ValueError if the samples have no tasks."""
        if records.tasks is None:
            raise ValueError("tasks is (): PerTaskAssignment needs a task for each sample, see Initialization")
        return xs, records, records.tasks


class PassThrough(nn.Module):
    """Action 0 for every sample."""

    def forward(
        self, xs: Tensor, records: Trajectories, prior_actions: Tensor | Sequence[int] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Trajectories, Tensor]:
        return xs, records, torch.zeros(len(xs), dtype=torch.int64, device=xs.device)
