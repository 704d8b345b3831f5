"""Stitching layers: learned linear maps from the front of one network to the back of another (Godfrey et al. 2022, section 4).

Each is a square matrix applied to channels, of maps (B, C, H, W), tokens (B, T, C) or features (B, C). A training step
(common/symmetry/train.py) calls, in this order:

    y = layer(x)        applies the matrix in training or, in evaluation mode, its rounding
    layer.penalty()     is added to the loss
    layer.project()     follows the optimiser: puts the parameters back into the constraint set. Birkhoff.project is the
                        projection onto the Birkhoff polytope
    layer.rounded()     is the matrix (C, C) in evaluation

Names and shapes of parameters are the original's, so its stitching layers load here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.symmetry.matrices import concave_penalty, projected_gradient, round_hungarian, round_scores, sinkhorn, softsort


def apply_matrix(W: Tensor, x: Tensor) -> Tensor:
    """W x at each position: W (D, C) with x (B, C, H, W) -> (B, D, H, W), or with x (..., C), not of 4 axes -> (..., D)."""
    return F.conv2d(x, W[:, :, None, None]) if x.ndim == 4 else F.linear(x, W)


class StitchingLayer(nn.Module, ABC):
    """A linear map of channels (C, C). The base class has no penalty, no constraint and no rounding."""

    has_scales = False  # then `scalars` switches them on and off

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    @abstractmethod
    def matrix(self) -> Tensor:
        """The matrix (C, C) in training."""

    def rounded(self) -> Tensor:
        """The matrix (C, C) in evaluation, without a gradient."""
        return self.matrix().detach()

    def forward(self, x: Tensor) -> Tensor:
        return apply_matrix(self.matrix() if self.training else self.rounded(), x)

    def penalty(self) -> Tensor:
        """A scalar that is added to the loss."""
        return next(self.parameters()).new_zeros(())

    def project(self) -> None:
        """Put the parameters back into the constraint set."""

    def learned(self) -> dict[str, Any]:
        """Plain values for a result: permutation and scales, or sparsity, where the layer has them."""
        return {}


class Birkhoff(StitchingLayer):
    """A doubly stochastic matrix times scales >= 0, W diag(s): C^2 + C parameters, trained by projected gradient descent.

    The penalty -alpha |W|_F drives W towards a permutation; evaluation rounds it to the best one. The projection, as
    published, sets negative entries to 0 and makes `iters` Sinkhorn sweeps. (It is not the nearest point of the polytope.)
    Without `scalars` all scales are 1 and get no gradient.

    >>> layer = Birkhoff(4)
    >>> with torch.no_grad():
    ...     _ = layer.weight_perms.add_(0.1 * torch.randn(4, 4))
    >>> layer.project()
    >>> bool((layer.weight_perms.sum(0) - 1).abs().max() < 1e-6)
    True
    >>> layer.eval()(torch.eye(4)).count_nonzero().item()  # a permutation
    4
    """

    has_scales = True

    def __init__(self, channels: int, alpha: float = 1e-3, *, scalars: bool = True, iters: int = 16):
        super().__init__(channels)
        self.alpha, self.scalars, self.iters = alpha, scalars, iters
        self.weight_perms = nn.Parameter(sinkhorn(torch.rand(channels, channels), 100))
        self.weight_scalars = nn.Parameter(torch.ones(channels))
        self._last_rounding: tuple[Tensor, Tensor] | None = None  # the weights that were rounded, their permutation

    def matrix(self) -> Tensor:
        return self.weight_perms * self.weight_scalars if self.scalars else self.weight_perms

    def permutation(self) -> Tensor:
        """The permutation matrix (C, C) in evaluation. Kept until the weights change."""
        W = self.weight_perms.detach()
        kept = self._last_rounding
        if kept is None or kept[0].device != W.device or not torch.equal(kept[0], W):
            self._last_rounding = kept = (W.clone(), round_hungarian(W).to(W.dtype))
        return kept[1]

    def rounded(self) -> Tensor:
        P = self.permutation()
        return P * self.weight_scalars.detach() if self.scalars else P.clone()

    def penalty(self) -> Tensor:
        return concave_penalty(self.weight_perms, self.alpha)

    @torch.no_grad()
    def project(self) -> None:
        self.weight_perms.copy_(self.project_onto_birkhoff(self.weight_perms))
        self.weight_scalars.clamp_(min=0)

    def project_onto_birkhoff(self, W: Tensor) -> Tensor:
        """Project a matrix onto the Birkhoff polytope: any (C, C) -> nearly doubly stochastic (C, C)."""
        return sinkhorn(W.clamp(min=0), self.iters)

    @torch.no_grad()
    def project_gradients(self, eps: float = 1e-3) -> None:
        """Replace the gradients, after a backward pass, by what the projection leaves of them (--pgd_hook)."""
        W, s = self.weight_perms, self.weight_scalars
        if W.grad is not None:
            W.grad = projected_gradient(W, W.grad, self.project_onto_birkhoff, eps)
        if s.grad is not None:
            s.grad = projected_gradient(s, s.grad, lambda s: s.clamp(min=0), eps)

    def learned(self) -> dict[str, Any]:
        permutation = self.permutation().argmax(1).tolist()
        return {"permutation": permutation, "scales": self.weight_scalars.tolist(), "alpha": self.alpha}


class Full(StitchingLayer):
    """Any matrix, as a 1x1 convolution: C^2 parameters. The best that any linear map can reach.

    >>> layer = Full(4)
    >>> layer(torch.zeros(2, 4, 8, 8)).shape, layer(torch.zeros(2, 5, 4)).shape
    (torch.Size([2, 4, 8, 8]), torch.Size([2, 5, 4]))
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.weight = nn.Conv2d(channels, channels, 1, bias=False).weight  # (C, C, 1, 1), in torch's initial state

    def matrix(self) -> Tensor:
        return self.weight[:, :, 0, 0]


class LowRank(StitchingLayer):
    """The product of a (C, r) and an (r, C) matrix: 2 r C parameters. Raises ValueError unless 1 <= rank <= C.

    >>> layer = LowRank(6, rank=2)
    >>> layer(torch.zeros(3, 6)).shape, int(torch.linalg.matrix_rank(layer.rounded()))
    (torch.Size([3, 6]), 2)
    """

    def __init__(self, channels: int, rank: int):
        super().__init__(channels)
        if not 1 <= rank <= channels:
            raise ValueError(f"a rank of {rank} is not possible between {channels} channels")
        self.l1 = nn.Conv2d(channels, rank, 1, bias=False)
        self.l2 = nn.Conv2d(rank, channels, 1, bias=False)

    def matrix(self) -> Tensor:
        return self.l2.weight[:, :, 0, 0] @ self.l1.weight[:, :, 0, 0]

    def forward(self, x: Tensor) -> Tensor:
        return apply_matrix(self.l2.weight[:, :, 0, 0], apply_matrix(self.l1.weight[:, :, 0, 0], x))


class Lasso(StitchingLayer):
    """Any matrix, with a penalty of `multiplier` sum |w|; in evaluation, entries below `threshold` are 0.

    >>> layer = Lasso(2, multiplier=0.5, threshold=0.1)
    >>> with torch.no_grad():
    ...     _ = layer.l.weight.copy_(torch.tensor([[1.0, 0.01], [-2.0, 0.0]]))
    >>> layer.rounded()
    tensor([[ 1.,  0.],
            [-2.,  0.]])
    >>> layer.sparsity(), round(layer.penalty().item(), 3)
    (0.5, 1.505)
    """

    def __init__(self, channels: int, multiplier: float = 0.1, threshold: float = 1e-4):
        super().__init__(channels)
        self.multiplier, self.threshold = multiplier, threshold
        self.l = nn.Linear(channels, channels, bias=False)

    def matrix(self) -> Tensor:
        return self.l.weight

    def rounded(self) -> Tensor:
        W = self.l.weight.detach()
        return torch.where(W.abs() < self.threshold, 0, W)

    def penalty(self) -> Tensor:
        return self.multiplier * self.l.weight.abs().sum()

    def sparsity(self) -> float:
        """Share of entries that are 0 in evaluation."""
        return (self.rounded() == 0).float().mean().item()

    def learned(self) -> dict[str, Any]:
        return {"sparsity": self.sparsity()}


class Wreath(StitchingLayer):
    """A softly sorting permutation times positive scales: 2C parameters, softsort(scores) diag(exp(log scales)).

    A smaller `tau` is nearer to a permutation. Without `scalars` all scales are 1.

    >>> layer = Wreath(3).eval()
    >>> layer(torch.eye(3)).count_nonzero().item()  # a permutation
    3
    """

    has_scales = True

    def __init__(self, channels: int, tau: float = 1.0, *, scalars: bool = True):
        super().__init__(channels)
        self.tau, self.scalars = tau, scalars
        self.weight_perms = nn.Parameter(2 * torch.rand(channels, 1) - 1)
        self.weight_scalars = nn.Parameter(torch.zeros(channels))

    def matrix(self) -> Tensor:
        P = softsort(self.weight_perms, self.tau)
        return P * self.weight_scalars.exp() if self.scalars else P

    def permutation(self) -> Tensor:
        """The permutation matrix (C, C) in evaluation."""
        return round_scores(self.weight_perms).to(self.weight_perms.dtype)

    def rounded(self) -> Tensor:
        P = self.permutation()
        return P * self.weight_scalars.detach().exp() if self.scalars else P

    def learned(self) -> dict[str, Any]:
        return {"permutation": self.permutation().argmax(1).tolist(), "scales": self.weight_scalars.exp().tolist()}
