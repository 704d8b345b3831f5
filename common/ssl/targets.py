"""Target distributions of a transformation's parameter over the bins of DUET's structure axis (Suau et al. 2023, section 3.2).

Both evaluate a density at 100 evenly spaced points a bin, ends included, and divide each bin's sum by that of all bins; so the
Gaussian is cut off at the borders, and the von Mises distribution goes around.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

POINTS = 100  # in a bin
SIGMA, CONCENTRATION = 0.2, 3.0  # as published: a standard deviation, and what a von Mises distribution has instead


def gaussian(parameters: Tensor, bins: int, sigma: float = SIGMA) -> Tensor:
    """Gaussian around parameters in [0, 1]: (...) -> (..., bins), with sum 1."""
    points = torch.linspace(0, 1, POINTS * bins, device=parameters.device)
    return _binned(-0.5 * ((points - parameters[..., None]) / sigma).square(), bins)


def von_mises(parameters: Tensor, bins: int, concentration: float = CONCENTRATION) -> Tensor:
    """Von Mises distribution around the angle 2 pi times parameters in [0, 1]: (...) -> (..., bins), with sum 1."""
    points = torch.linspace(0, 2 * math.pi, POINTS * bins, device=parameters.device)
    return _binned(concentration * torch.cos(points - 2 * math.pi * parameters[..., None]), bins)


def _binned(log_density: Tensor, bins: int) -> Tensor:
    return log_density.softmax(-1).unflatten(-1, (bins, POINTS)).sum(-1)


TARGETS = {"ga": gaussian, "vm": von_mises}


def circular_mean(distributions: Tensor) -> Tensor:
    """The parameter in [0, 1) at which a distribution over the circle has its mean: (..., bins) -> (...)."""
    bins = distributions.shape[-1]
    angles = 2 * math.pi * (torch.arange(bins, device=distributions.device) + 0.5) / bins
    mean = torch.atan2((distributions * angles.sin()).sum(-1), (distributions * angles.cos()).sum(-1))
    return (mean / (2 * math.pi)) % 1.0
