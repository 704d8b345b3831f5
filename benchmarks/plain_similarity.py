"""Similarity measures as the original computes them (Godfrey et al. 2022), to compare with: all at once, in float32."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def plain_wreath_cka(features1: Tensor, features2: Tensor) -> float:
    """One image against all earlier ones at a time, the maximum over channels, whole kernels: (N, C, H, W) twice."""
    K, L = (
        _max_kernel(_unit_channels(features - features.mean((0, 2, 3), keepdim=True))) for features in (features1, features2)
    )
    return (_hsic(K, L) / (_hsic(K, K) * _hsic(L, L)).sqrt()).item()


def _unit_channels(features: Tensor) -> Tensor:
    """Channels of unit norm over images and positions, zero ones left alone: (N, C, H, W) -> the same."""
    norms = torch.linalg.vector_norm(features, dim=(0, 2, 3), keepdim=True)
    return features / torch.where(norms == 0, 1, norms)


def _max_kernel(features: Tensor) -> Tensor:
    K = torch.zeros(len(features), len(features))
    for j in range(1, len(features)):
        K[j, :j] = (features[:j] * features[j]).sum((2, 3)).amax(1)
    return K + K.T


def _hsic(K: Tensor, L: Tensor) -> Tensor:
    n = len(K)
    rows = 2 / (n - 2) * (K.sum(1) @ L.sum(1))
    return ((K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - rows) / (n * (n - 3))


def plain_wreath_procrustes(features1: Tensor, features2: Tensor) -> float:
    """On copies of the features, normalised, of one size and number of channels: (N, C1, H1, W1), (N, C2, H2, W2)."""
    x, y = _same_size(copy.deepcopy(features1), copy.deepcopy(features2))
    x, y = _unit_channels(x), _unit_channels(y)
    C = torch.einsum("nchw,ndhw->cd", x, y)
    matched = C[linear_sum_assignment(C.numpy(), maximize=True)].sum()
    d = (x.square().sum() + y.square().sum() - 2 * matched).clamp(min=0) / (4 * x.shape[1])
    return 1 - d.sqrt().item()


def plain_ortho_procrustes(features1: Tensor, features2: Tensor) -> float:
    """As plain_wreath_procrustes, the layer as a whole of unit norm."""
    x, y = _same_size(copy.deepcopy(features1), copy.deepcopy(features2))
    C = torch.einsum("nchw,ndhw->cd", x / x.norm(), y / y.norm())
    return 1 - (2 - 2 * torch.linalg.svdvals(C).sum()).clamp(min=0).sqrt().item() / 2


def _same_size(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller map enlarged by repetition, the narrower layer padded with channels of zeros."""
    size, channels = max(x.shape[3], y.shape[3]), max(x.shape[1], y.shape[1])
    x, y = (z.repeat_interleave(size // z.shape[3], 2).repeat_interleave(size // z.shape[3], 3) for z in (x, y))
    x, y = (F.pad(z, (0, 0, 0, 0, 0, channels - z.shape[1])) for z in (x, y))
    return x, y
