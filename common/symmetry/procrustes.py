"""Procrustes: how far channels of two layers are apart when those of one are permuted and scaled, or rotated, to fit.

Held are inner products of channels, (C1, C2) a pair of layers, summed up in float64 over batches of images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common.matching import best_matching
from common.symmetry.measures import Similarities, check_finite, layer_name, maps_of


class ChannelProducts:
    """Inner products, over images and positions, of each channel of network 1 with each of network 2, summed up over batches.

    Of maps of different size the smaller is enlarged by repetition, as published. To sum up, within the larger one, what
    a value of the smaller one is repeated for comes to the same, with smaller products.

    >>> sums, x, y = ChannelProducts(), torch.rand(6, 4, 8, 8), torch.rand(6, 3, 4, 4)
    >>> for part in (slice(0, 4), slice(4, 6)):
    ...     sums.add([x[part]], [x[part], y[part]])
    >>> [round(value, 3) for value in sums.similarities("ortho_procrustes").published[0].tolist()][0]
    1.0
    """

    def __init__(self) -> None:
        self.products: dict[tuple[int, int], Tensor] = {}  # (C1, C2) of a pair of layers
        self.squares: tuple[list[Tensor], list[Tensor]] = ([], [])  # (C) of a layer of network 1, of network 2

    @torch.no_grad()
    def add(self, features1: list[Tensor], features2: list[Tensor]) -> None:
        """Take in a batch of images: all layers of network 1, and of network 2. For errors see layer_similarities."""
        maps1, maps2 = maps_of(features1, features2)
        for k, (sums, maps) in enumerate(zip(self.squares, (maps1, maps2), strict=True), start=1):
            squares = [torch.linalg.vector_norm(x, dim=(2, 3)).double().square().sum(0) for x in maps]
            for i, (x, square) in enumerate(zip(maps, squares, strict=True)):
                check_finite(square, x, layer_name(k, i))
            sums[:] = [a + b for a, b in zip(sums, squares, strict=True)] if sums else squares
        smaller1 = [{size: _shrink(x, size) for size in {_common_size(x, y) for y in maps2}} for x in maps1]
        smaller2 = [{size: _shrink(y, size) for size in {_common_size(x, y) for x in maps1}} for y in maps2]
        for i, x in enumerate(maps1):
            for j, y in enumerate(maps2):
                size = _common_size(x, y)
                a, b = smaller1[i][size].flatten(2), smaller2[j][size].flatten(2)
                product = _summed_products(a, b)
                self.products[i, j] = self.products[i, j] + product if (i, j) in self.products else product

    def similarities(self, measure: str) -> Similarities:
        """Of all pairs of layers, by wreath_procrustes or ortho_procrustes."""
        of = {"wreath_procrustes": _wreath_procrustes, "ortho_procrustes": _ortho_procrustes}[measure]
        squares1, squares2 = self.squares
        published, live = torch.full((2, len(squares1), len(squares2)), math.nan, dtype=torch.float64)
        for (i, j), products in self.products.items():
            live1, live2 = squares1[i] > 0, squares2[j] > 0
            published[i, j] = of(products, squares1[i], squares2[j])
            if live1.all() and live2.all():
                live[i, j] = published[i, j]
            elif live1.any() and live2.any():
                live[i, j] = of(products[live1][:, live2], squares1[i][live1], squares2[j][live2])
        dead1, dead2 = (torch.tensor([int((square == 0).sum()) for square in squares]) for squares in self.squares)
        return Similarities(published, live, dead1, dead2)


def _summed_products(a: Tensor, b: Tensor) -> Tensor:
    """Sum over images of a @ b.T: (B, C1, P), (B, C2, P) -> (C1, C2), float64. A single precision sum has about 1,000 terms."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    P = a.shape[2]
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for x, y in zip(a.to(dtype).split(max(1, 1024 // P)), b.to(dtype).split(max(1, 1024 // P)), strict=True):
        # one product: of a single image as it lies, of several small ones side by side, which is a copy of these alone
        total += x.transpose(0, 1).flatten(1) @ y.transpose(0, 1).flatten(1).T
    return total


def _common_size(x: Tensor, y: Tensor) -> tuple[int, int]:
    """The smaller height and width of two maps. Raises ValueError unless they are the larger ones' divisors."""
    (h1, w1), (h2, w2) = x.shape[2:], y.shape[2:]
    if max(h1, h2) % min(h1, h2) or max(w1, w2) % min(w1, w2):
        raise ValueError(f"maps of {h1}x{w1} and {h2}x{w2} cannot be compared: no whole factor enlarges one to the other")
    return min(h1, h2), min(w1, w2)


def _shrink(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Sums over windows, (B, C, H, W) -> (B, C, *size), over the root of their area, by which enlarging makes the norm grow."""
    windows = (x.shape[2] // size[0], x.shape[3] // size[1])
    return x if windows == (1, 1) else F.avg_pool2d(x, windows) * math.sqrt(math.prod(windows))


def _wreath_procrustes(products: Tensor, squares1: Tensor, squares2: Tensor) -> float:
    """1 - d, d^2 = (|H1|^2 + |H2|^2 - 2 sum C[matching]) / 4c: channels of unit norm, matched for the largest sum.

    products (C1, C2), squared norms (C1) and (C2); c is the larger number of channels. Dead ones stay zero.
    """
    c = max(products.shape)
    scale1, scale2 = (torch.where(squares > 0, squares.rsqrt(), 0) for squares in (squares1, squares2))
    C = F.pad(scale1[:, None] * products * scale2, (0, c - products.shape[1], 0, c - products.shape[0]))
    matched = C.gather(1, best_matching(C[None])[0][:, None]).sum()
    n_live = (squares1 > 0).sum() + (squares2 > 0).sum()  # |H1|^2 + |H2|^2
    return 1 - ((n_live - 2 * matched).clamp(min=0) / (4 * c)).sqrt().item()


def _ortho_procrustes(products: Tensor, squares1: Tensor, squares2: Tensor) -> float:
    """1 - d, d^2 = (2 - 2 |C|_nuclear) / 4, a layer as a whole having unit norm; NaN if all of one is zero."""
    C = products / (squares1.sum() * squares2.sum()).sqrt()
    return 1 - ((1 - torch.linalg.svdvals(C).sum()).clamp(min=0) / 2).sqrt().item() if C.isfinite().all() else math.nan
