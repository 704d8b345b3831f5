"""A mixture of Gaussians from a set of points in one forward pass, the third experiment of SWARM (arXiv 1906.09400).

SWARM layers map the points to features, pooling makes one vector for each set of it, and that vector holds the parameters of
the mixture. Trained by the likelihood of the points alone, without labels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.masks import as_mask
from common.models.sets import NON_LINEARITIES, AttentionBlock, masked_mean
from common.models.swarm import SwarmLayer

MIN_DEVIATION = 1e-3
N_HEADS = 4  # of the pooling by attention


class Mixture(NamedTuple):
    """N mixtures of K Gaussians with diagonal covariances in D dimensions."""

    means: Tensor  # (N, K, D)
    deviations: Tensor  # (N, K, D)
    log_weights: Tensor  # (N, K)


def log_likelihood(points: Tensor, mixture: Mixture, mask: Tensor | None = None) -> Tensor:
    """Mean log-density of the valid points of each set, in nats per point: (N, E, D), mask (N, E) -> (N); 0 without any.

    In float64, and densities are added by their logarithms: for points far from all means these are large numbers, whose
    differences are the responsibilities of the Gaussians.
    """
    mask = as_mask(points, mask)
    if points.shape[2] != mixture.means.shape[2]:
        raise ValueError(f"points {tuple(points.shape)} do not fit a mixture of means {tuple(mixture.means.shape)}")
    points, (means, deviations, log_weights) = points.double(), (part.double() for part in mixture)
    standardised = (points.unsqueeze(2) - means.unsqueeze(1)) / deviations.unsqueeze(1)  # (N, E, K, D)
    log_scale = log_weights - deviations.log().sum(2) - 0.5 * points.shape[2] * math.log(2 * math.pi)  # (N, K)
    log_density = (log_scale.unsqueeze(1) - 0.5 * standardised.square().sum(3)).logsumexp(2)  # (N, E)
    return torch.where(mask, log_density, 0).sum(1) / mask.sum(1).clamp(min=1)


def single_gaussian_log_likelihood(points: Tensor, mask: Tensor) -> Tensor:
    """The same under the best single Gaussian of each set, whose mean and covariance are those of its points: (N), float64.

    Then it depends on the covariance alone: -(log det(2 pi covariance) + D) / 2.
    """
    D, valid = points.shape[2], mask.unsqueeze(2)
    x = points.double()
    centred = torch.where(valid, x - masked_mean(x, mask), 0)
    covariance = centred.mT @ centred / mask.sum(1)[:, None, None]
    return -0.5 * (torch.linalg.slogdet(2 * math.pi * covariance)[1] + D)


class PoolingByAttention(nn.Module):
    """PMA (Set Transformer, Lee et al. 2019, eq. 11): learned seeds attend to the set: (N, E, d) -> (N, n_seeds, d).

    As in the original, the feed-forward part of its attention block is one linear layer.
    """

    def __init__(self, d: int, n_heads: int, n_seeds: int):
        super().__init__()
        self.seed_vectors = nn.Parameter(torch.randn(n_seeds, d))
        self.mab = AttentionBlock(d, n_heads)
        self.mab.rff = nn.Linear(d, d)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.mab(self.seed_vectors.expand(len(x), -1, -1), x, mask)


class MixtureNetwork(nn.Module):
    """Points (N, E, n_dim) and a mask (N, E) -> `Mixture` of n_clust Gaussians.

    Pooled by the mean over the valid points, or with `attention` by one learned seed for each Gaussian. Without it, parameters
    have the names of published checkpoints. Raises ValueError for sizes out of range or an unknown non-linearity.
    """

    def __init__(
        self,
        n_dim: int,
        n_clust: int,
        *,
        n_hidden: int = 128,
        n_layers: int = 1,
        n_iter: int = 5,
        non_lin: str = "relu",
        pooling: str = "MEAN",
        attention: bool = False,
        dropout: float = 0.0,
        fuse: bool = False,
    ):
        super().__init__()
        if min(n_dim, n_clust, n_layers) < 1:
            raise ValueError(f"sizes must be positive: n_dim {n_dim}, n_clust {n_clust}, n_layers {n_layers}")
        if non_lin not in NON_LINEARITIES:
            raise ValueError(f"unknown non-linearity {non_lin!r}: choose from {', '.join(NON_LINEARITIES)}")
        self.n_dim, self.n_clust, n_numbers = n_dim, n_clust, 2 * n_dim + 1
        n_out = n_hidden if attention else n_clust * n_numbers
        layers: list[nn.Module] = []
        for index in range(n_layers):
            layers += [NON_LINEARITIES[non_lin]()] if index else []
            a, b = n_hidden if index else n_dim, n_out if index == n_layers - 1 else n_hidden
            layers += [SwarmLayer(a, b, n_hidden, n_iter, pooling=pooling, dropout=dropout, fuse=fuse)]
        self.swarm = nn.ModuleList(layers)
        for layer in layers:
            if isinstance(layer, SwarmLayer):  # as in the original
                for module in (layer.cell.Wih, layer.ffwd):
                    assert module.bias is not None
                    nn.init.zeros_(module.bias)
        self.pma = PoolingByAttention(n_hidden, N_HEADS, n_clust) if attention else None
        self.lin = nn.Linear(n_hidden, n_numbers) if attention else None

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Mixture:
        x = points
        for module in self.swarm:
            x = module(x, mask) if isinstance(module, SwarmLayer) else module(x)
        if self.pma is not None and self.lin is not None:
            numbers = self.lin(self.pma(x, mask))
        else:
            numbers = masked_mean(x, mask).unflatten(2, (self.n_clust, -1)).squeeze(1)
        means, raw_deviations, raw_weights = numbers.float().split([self.n_dim, self.n_dim, 1], 2)  # (N, n_clust, ...)
        deviations = F.softplus(raw_deviations)
        deviations = (
            deviations + (deviations.clamp(min=MIN_DEVIATION) - deviations).detach()
        )  # a floor that lets gradients through
        return Mixture(means, deviations, raw_weights.squeeze(2).log_softmax(1))
