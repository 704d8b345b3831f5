"""Joints: what is learned between the front of one network and the back of another (Godfrey et al. 2022, section 4).

Each is a square linear map of channels, on maps (B, C, H, W) and on features or tokens (B, C) and (B, T, C). What is special to
a joint is in four methods, and a training step calls them in this order (common/symmetry/train.py):

    y = joint(x)        the matrix that is trained or, in evaluation mode, the one it is rounded to
    joint.penalty()     is added to the loss
    joint.project()     puts the parameters back where they are allowed, after the optimiser
    joint.rounded()     the matrix (C, C) in evaluation

Names and shapes of parameters are the original's, so that its joints load here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.symmetry.matrices import concave_penalty, projected_gradient, round_hungarian, round_scores, sinkhorn, softsort


def apply_matrix(W: Tensor, x: Tensor) -> Tensor:
    """W x at each position: W (D, C) with x (B, C, H, W) -> (B, D, H, W), or with x (..., C), not of 4 axes -> (..., D)."""
    return F.conv2d(x, W[:, :, None, None]) if x.ndim == 4 else F.linear(x, W)


class Joint(nn.Module, ABC):
    """A linear map of channels; by itself without penalty, constraint and rounding."""

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
        """What is added to the loss: a scalar."""
        return next(self.parameters()).new_zeros(())

    def project(self) -> None:
        """Put the parameters back into the set that they are constrained to."""


class Full(Joint):
    """Any matrix, as a 1x1 convolution: C^2 parameters. What any linear joint can reach at best.

    >>> joint = Full(4)
    >>> joint(torch.zeros(2, 4, 8, 8)).shape, joint(torch.zeros(2, 5, 4)).shape
    (torch.Size([2, 4, 8, 8]), torch.Size([2, 5, 4]))
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.weight = nn.Conv2d(channels, channels, 1, bias=False).weight  # (C, C, 1, 1), in torch's initial state

    def matrix(self) -> Tensor:
        return self.weight[:, :, 0, 0]


class LowRank(Joint):
    """The product of a (C, r) and an (r, C) matrix: 2 r C parameters. Raises ValueError for a rank not in 1 ... C.

    >>> joint = LowRank(6, rank=2)
    >>> joint(torch.zeros(3, 6)).shape, int(torch.linalg.matrix_rank(joint.rounded()))
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


class Lasso(Joint):
    """Any matrix, with a penalty of `multiplier` sum |w|; in evaluation, entries below `threshold` are 0.

    >>> joint = Lasso(2, multiplier=0.5, threshold=0.1)
    >>> with torch.no_grad():
    ...     _ = joint.l.weight.copy_(torch.tensor([[1.0, 0.01], [-2.0, 0.0]]))
    >>> joint.rounded()
    tensor([[ 1.,  0.],
            [-2.,  0.]])
    >>> joint.sparsity(), round(joint.penalty().item(), 3)
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


class Wreath(Joint):
    """A softly sorting permutation times positive scales: 2C parameters, softsort(scores) diag(exp(log scales)).

    A smaller `tau` is nearer to a permutation. `scalars` may be switched off and on: off, all scales are 1.

    >>> joint = Wreath(3).eval()
    >>> joint(torch.eye(3)).count_nonzero().item()  # a permutation
    3
    """

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


class Birkhoff(Joint):
    """A doubly stochastic matrix times scales >= 0: C^2 + C parameters, W diag(s), by projected gradient descent.

    The penalty -alpha |W|_F drives W towards a permutation; evaluation rounds it to the best one. Projection: negative entries
    become 0, then `iters` Sinkhorn sweeps (which is not the nearest point of the polytope); with `revive`, rows of zeros become
    uniform. `scalars` may be switched off and on: off, all scales are 1 and get no gradient.

    >>> joint = Birkhoff(4)
    >>> with torch.no_grad():
    ...     _ = joint.weight_perms.add_(0.1 * torch.randn(4, 4))
    >>> joint.project()
    >>> bool((joint.weight_perms.sum(0) - 1).abs().max() < 1e-6)
    True
    >>> joint.eval()(torch.eye(4)).count_nonzero().item()  # a permutation
    4
    """

    def __init__(self, channels: int, alpha: float = 1e-3, *, scalars: bool = True, iters: int = 16, revive: bool = False):
        super().__init__(channels)
        self.alpha, self.scalars, self.iters, self.revive = alpha, scalars, iters, revive
        self.weight_perms = nn.Parameter(sinkhorn(torch.rand(channels, channels), 100))
        self.weight_scalars = nn.Parameter(torch.ones(channels))
        self._last_rounding: tuple[Tensor, Tensor] | None = None  # the weights that were rounded, their permutation

    def matrix(self) -> Tensor:
        return self.weight_perms * self.weight_scalars if self.scalars else self.weight_perms

    def permutation(self) -> Tensor:
        """The permutation matrix (C, C) in evaluation. It is kept for as long as the weights are what it was made of."""
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

    def _project_matrix(self, W: Tensor) -> Tensor:
        return sinkhorn(W.clamp(min=0), self.iters, revive=self.revive)

    @torch.no_grad()
    def project(self) -> None:
        self.weight_perms.copy_(self._project_matrix(self.weight_perms))
        self.weight_scalars.clamp_(min=0)

    @torch.no_grad()
    def project_gradients(self, eps: float = 1e-3) -> None:
        """Turn the gradients, after a backward pass, into what the projection will leave of them (--pgd_hook)."""
        for parameter, project in (
            (self.weight_perms, self._project_matrix),
            (self.weight_scalars, lambda s: s.clamp(min=0)),
        ):
            if parameter.grad is not None:
                parameter.grad = projected_gradient(parameter, parameter.grad, project, eps)
