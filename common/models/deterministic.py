"""Operations that PyTorch has no deterministic CUDA kernel for, written so that they have one where it is asked for.

`torch.use_deterministic_algorithms(True)` makes PyTorch refuse cumsum and the gradient of max-pooling on a GPU. Under it the
functions here compute the same in another way, on every device; without it they are PyTorch's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cumsum(x: Tensor, dim: int) -> Tensor:
    """Running sums along an axis, of the shape of x."""
    if not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(dim)
    n, reach = x.shape[dim], 1
    while reach < n:  # each element has the sum of itself and reach - 1 before it
        first, rest = x.narrow(dim, 0, reach), x.narrow(dim, reach, n - reach)
        x = torch.cat([first, rest + x.narrow(dim, 0, n - reach)], dim)
        reach *= 2
    return x


def max_pool2d(x: Tensor, kernel_size: int, stride: int | None = None, padding: int = 0) -> Tensor:
    """Maxima of square windows: (B, C, H, W) -> (B, C, H', W'). Of equal values the first gets the gradient."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.max_pool2d(x, kernel_size, stride, padding)
    _, index = F.max_pool2d(x.detach(), kernel_size, stride, padding, return_indices=True)
    return x.flatten(2).gather(2, index.flatten(2)).view(index.shape)  # the gradient of gather is added in a fixed order


class MaxPool2d(nn.MaxPool2d):
    """`max_pool2d` as a module."""

    def forward(self, input: Tensor) -> Tensor:
        return max_pool2d(input, self.kernel_size, self.stride, self.padding)  # type: ignore[arg-type]
