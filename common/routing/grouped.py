"""Several modules, each applied to its own samples: one call for each module, or a single one for all.

The host would wait for a GPU to learn how many samples each module gets. So, on a GPU, all linear maps are applied to all
samples, and each sample keeps its own map's output: a product of fixed size. Modules of other kinds get exactly their own
samples (batch norm depends on all that it gets); this costs one wait for each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_PADDING = 4  # rows of padded groups for each sample
MAX_OUTPUTS = 2**24  # of all maps for all samples, on a GPU: the product takes no longer than to wait and sort


def group_sizes(index: Tensor, n: int) -> Tensor:
    """Number of samples of each of n groups: (N) -> (n) int64. Unlike torch.bincount, it does not wait for a GPU."""
    return index.new_zeros(n).scatter_add(0, index, torch.ones_like(index))


def apply_grouped(functions: Sequence[Callable[[Tensor], Tensor]], xs: Tensor, index: Tensor) -> Tensor:
    """functions[index[i]](xs[i]) for every sample i: (N, ...), (N) -> (N, ...).

    Samples are sorted by function, so that each is called once, with all of its samples, or not at all without any. With
    several functions the host waits for a GPU once.
    """
    if len(functions) == 1:
        return functions[0](xs)
    counts = group_sizes(index, len(functions)).tolist()
    if max(counts) == len(index):
        return functions[counts.index(len(index))](xs)
    order = index.argsort(stable=True)
    parts = xs[order].split(counts)
    sorted_out = torch.cat([function(part) for function, part in zip(functions, parts, strict=True) if len(part)])
    return sorted_out[order.argsort()]


def can_apply_all(xs: Tensor, M: int, E: int) -> bool:
    """True if M maps to E features are to be applied to all of xs (N, D): on a GPU, unless there are too many outputs."""
    return xs.device.type != "cpu" and len(xs) * M * E <= MAX_OUTPUTS


def apply_all(weight: Tensor, bias: Tensor, xs: Tensor, index: Tensor) -> Tensor:
    """Apply all maps to all samples and keep each sample's own: (M, E, D), (M, E), xs (N, D), index (N) -> (N, E).

    Gradients are deterministic on a GPU: that of `gather` adds one number at each place, those of products have a fixed order.
    (To gather the weights of each sample instead is not: the backward pass of `index_select` adds with atomics.)
    """
    outputs = F.linear(xs, weight.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape)  # (N, M, E)
    return outputs.gather(1, index[:, None, None].expand(-1, 1, bias.shape[1]))[:, 0]


class StackedLinear(nn.Module):
    """M linear maps with torch's initial weights, stored in two parameters: xs (N, D), index (N) -> (N, E).

    `Selection(StackedLinear(M, D, E))` is `Selection(*[nn.Linear(D, E) for _ in range(M)])`, faster: small groups of samples
    are padded to the largest and multiplied at once, and an optimiser has two tensors instead of 2 M. Maps without a sample
    get a gradient of 0, not None, so that momentum continues to move them.

    >>> StackedLinear(20, 128, 48)(torch.zeros(7, 128), torch.arange(7)).shape
    torch.Size([7, 48])
    """

    def __init__(self, num_modules: int, in_features: int, out_features: int):
        super().__init__()
        layers = [nn.Linear(in_features, out_features) for _ in range(num_modules)]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))  # (M, E, D)
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))  # (M, E)

    def __len__(self) -> int:
        return len(self.weight)

    def forward(self, xs: Tensor, index: Tensor) -> Tensor:
        M, N = len(self), len(xs)
        if can_apply_all(xs, *self.bias.shape):
            return apply_all(self.weight, self.bias, xs, index)
        counts = group_sizes(index, M)
        size = int(counts.max())
        if M * size > MAX_PADDING * N + M:  # few groups hold most samples
            maps = [lambda x, W=W, b=b: F.linear(x, W, b) for W, b in zip(self.weight, self.bias, strict=True)]
            return apply_grouped(maps, xs, index)
        order = index.argsort()
        group = index[order]
        place = torch.arange(N, device=xs.device) - (counts.cumsum(0) - counts)[group]  # within the group
        row = torch.empty_like(order).index_copy_(0, order, group * size + place)
        padded = xs.new_zeros(M * size, xs.shape[1]).index_copy(0, row, xs).view(M, size, -1)
        out = torch.baddbmm(self.bias[:, None], padded, self.weight.mT)  # (M, size, E)
        return out.flatten(0, 1).index_select(0, row)
