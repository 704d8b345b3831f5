"""How networks route: metrics of their decisions, and of routing maps.

A routing map (tasks, modules) is, for a layer, the share of a task's samples that go through a module.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.routing.trajectories import Trajectories


def policy_entropy(records: Trajectories, like: Tensor) -> Tensor:
    """Mean entropy (nats) of the softmax of what decisions are made by, logits of policies or values; 0 without decisions."""
    if not records.steps:
        return torch.zeros_like(like)
    policies = [step.states[:, :, 0].log_softmax(1) for step in records.steps]
    return torch.stack([-(log_p.exp() * log_p).sum(1).mean() for log_p in policies]).mean()


def modules_used(m: Tensor) -> float:
    """The effective number of modules of a layer: exp of the entropy of how often each is used."""
    share = m.mean(0)
    return math.exp(-torch.special.xlogy(share, share).sum().item())


def task_overlap(m: Tensor) -> float:
    """How likely samples of two different tasks go through the same module."""
    same, n = m @ m.T, len(m)
    return ((same.sum() - same.trace()) / (n * (n - 1))).item()
