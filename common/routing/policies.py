"""Storage of policies and values: a network for each agent, or a table with a row for each agent."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.routing.grouped import apply_all, apply_grouped, can_apply_all


class MLP(nn.Module):
    """Linear layers with a ReLU between them: (N, in_dim) -> (N, out_dim).

    >>> MLP(6, 4, hidden=(8, 5))(torch.zeros(2, 6)).shape
    torch.Size([2, 4])
    """

    def __init__(self, in_dim: int, out_dim: int, hidden: Sequence[int] = ()):
        super().__init__()
        sizes = [in_dim, *hidden, out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Networks(nn.Module):
    """A network for each of A agents: inputs (N, ...), agents (N) -> (N, K).

    Copies of `net`, which get the inputs as they are; without it MLPs, which get them flattened. On a GPU, MLPs that get no
    sample have a gradient of 0, not None.
    """

    def __init__(self, num_agents: int, in_dim: int, out_dim: int, hidden: Sequence[int], net: nn.Module | None = None):
        super().__init__()
        nets = (MLP(in_dim, out_dim, hidden) if net is None else copy.deepcopy(net) for _ in range(num_agents))
        self.nets, self.flattens = nn.ModuleList(nets), net is None

    def forward(self, x: Tensor, agents: Tensor) -> Tensor:
        if not self.flattens:
            return apply_grouped(list(self.nets), x, agents)
        x, A = x.flatten(1), len(self.nets)
        layers = [list(same) for same in zip(*(net.layers for net in self.nets), strict=True)]  # by depth, of all agents
        if A == 1 or not all(can_apply_all(x, A, same[0].out_features) for same in layers):
            return apply_grouped(list(self.nets), x, agents)
        for i, same in enumerate(layers):
            weight, bias = (torch.stack([getattr(layer, name) for layer in same]) for name in ("weight", "bias"))
            x = apply_all(weight, bias, F.relu(x) if i else x, agents)
        return x


class Tables(nn.Module):
    """A row for each of A agents: inputs are ignored, agents (N) -> (N, K)."""

    def __init__(self, num_agents: int, out_dim: int, initial: float):
        super().__init__()
        self.table = nn.Parameter(torch.full((num_agents, out_dim), initial))

    def forward(self, x: Tensor, agents: Tensor) -> Tensor:
        return F.embedding(agents, self.table)
