"""Sets of points from random mixtures of Gaussians, for the amortised mixture (Vollgraf's SWARM program, arXiv 1906.09400).

Per set: 100 to 499 points; means uniform in [-4, 4], deviation 0.3 in each direction, weights from a flat Dirichlet
distribution, all independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from common.graphs import padded_length

N_POINTS = (100, 500)  # the upper end is excluded
MEAN_RANGE = 4.0
DEVIATION = 0.3


@dataclass(frozen=True)
class MixtureSets:
    """N sets of up to E points in D dimensions, zero at padding, and the K clusters that they were drawn from."""

    points: Tensor  # (N, E, D) float32
    mask: Tensor  # (N, E) bool
    means: Tensor  # (N, K, D)
    weights: Tensor  # (N, K)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, sets: Tensor) -> MixtureSets:
        """Some of the sets, padded to the largest of them; sets that are on the CPU."""
        mask = self.mask[sets]
        E = int(mask.sum(1).max())
        return MixtureSets(self.points[sets, :E], mask[:, :E], self.means[sets], self.weights[sets])

    def to(self, device: torch.device) -> MixtureSets:
        tensors = (self.points, self.mask, self.means, self.weights)
        return MixtureSets(*(tensor.to(device, non_blocking=True) for tensor in tensors))

    def graphed(self, device: torch.device) -> MixtureSets:
        """On a device, padded for a model that runs as CUDA graphs there."""
        E = self.mask.shape[1]
        padding = padded_length(E, device) - E
        points, mask = F.pad(self.points, (0, 0, 0, padding)), F.pad(self.mask, (0, padding))
        return MixtureSets(points, mask, self.means, self.weights).to(device)


def describe(n_dim: int, n_clust: int) -> dict[str, Any]:
    """The distribution of sets, as plain values."""
    ranges = {"n_points": [N_POINTS[0], N_POINTS[1] - 1], "mean_range": MEAN_RANGE, "deviation": DEVIATION}
    return {"name": "mixtures", "n_dim": n_dim, "n_clust": n_clust, **ranges}


def typical_deviation(n_clust: int) -> float:
    """Root mean square, over sets, of the deviation of a coordinate within a set."""
    # weights w of a flat Dirichlet distribution have E[sum w^2] = 2 / (K + 1)
    of_means = (n_clust - 1) / (n_clust + 1) * MEAN_RANGE**2 / 3
    return math.sqrt(of_means + DEVIATION**2)


def draw_sets(n: int, n_dim: int, n_clust: int, gen: torch.Generator) -> MixtureSets:
    """Draw n sets on the CPU. Raises ValueError for sizes below 1."""
    if min(n, n_dim, n_clust) < 1:
        raise ValueError(f"sizes must be positive: {n} sets of {n_clust} clusters in {n_dim} dimensions")
    sizes = torch.randint(*N_POINTS, (n,), generator=gen)
    means = MEAN_RANGE * (2 * torch.rand(n, n_clust, n_dim, generator=gen) - 1)
    exponentials = -torch.rand(n, n_clust, generator=gen, dtype=torch.float64).clamp(min=1e-300).log()
    weights = exponentials / exponentials.sum(1, keepdim=True)  # flat Dirichlet
    mask = torch.arange(int(sizes.max())) < sizes[:, None]
    ranks = torch.rand(mask.shape, generator=gen, dtype=torch.float64)
    clusters = torch.searchsorted(weights.cumsum(1), ranks).clamp(max=n_clust - 1)  # (N, E)
    centres = means.gather(1, clusters.unsqueeze(2).expand(-1, -1, n_dim))
    points = centres + DEVIATION * torch.randn(*mask.shape, n_dim, generator=gen)
    return MixtureSets(points * mask.unsqueeze(2), mask, means, weights.float())


def training_sets(n: int, n_dim: int, n_clust: int) -> list[NDArray[np.float64]]:
    """The points of n sets, each (E, D), always the same ones: what a user's points are compared with."""
    sets = draw_sets(n, n_dim, n_clust, torch.Generator().manual_seed(0))
    return [points[mask].double().numpy() for points, mask in zip(sets.points, sets.mask, strict=True)]
