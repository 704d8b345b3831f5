"""Metrics of decisions and of routing maps.

A routing map (tasks, modules) of a layer holds the share of each task's samples that go through each module.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.routing.decision import Trajectories


def policy_entropy(records: Trajectories, like: Tensor) -> Tensor:
    """Mean entropy (nats) of the softmax of the decisions' logits or values, a scalar; 0 without decisions."""
    if not records.steps:
        return torch.zeros_like(like)
    policies = [step.states[:, :, 0].log_softmax(1) for step in records.steps]
    return torch.stack([-(log_p.exp() * log_p).sum(1).mean() for log_p in policies]).mean()


def modules_used(m: Tensor) -> float:
    """Effective number of modules of a layer: exp of the entropy of their frequencies."""
    share = m.mean(0)
    return math.exp(-torch.special.xlogy(share, share).sum().item())


def task_overlap(m: Tensor) -> float:
    """Probability that samples of two different tasks go through the same module."""
    same, n = m @ m.T, len(m)
    return ((same.sum() - same.trace()) / (n * (n - 1))).item()
