"""Procrustes: the distance between the channels of two layers after one is permuted and scaled, or rotated, to fit the other.

Only inner products of channels, (C1, C2) for a pair of layers, are kept, summed over batches of images in float64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common.matching import best_matching
from common.symmetry.measures import Similarities, check_finite, layer_name, maps_of


class ChannelProducts:
    """Inner products, over images and positions, of each channel of network 1 with each of network 2, summed over batches.

    As published, the smaller of two maps is enlarged by repetition. The equivalent here, with smaller products, is to sum the
    larger map over the positions that share a value of the smaller one.

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
        """Add a batch of images: all layers of network 1, and of network 2. For errors see layer_similarities."""
        maps1, maps2 = maps_of(features1, features2)
        for k, (sums, maps) in enumerate(zip(self.squares, (maps1, maps2), strict=True), start=1):
            squares = [torch.linalg.vector_norm(x, dim=(2, 3)).double().square().sum(0) for x in maps]
            for i, (x, square) in enumerate(zip(maps, squares, strict=True)):
                check_finite(square, x, layer_name(k, i))
            sums[:] = [a + b for a, b in zip(sums, squares, strict=True)] if sums else squares
        shrunk1, shrunk2 = _at_common_sizes(maps1, maps2), _at_common_sizes(maps2, maps1)
        for i, x in enumerate(maps1):
            for j, y in enumerate(maps2):
                size = _common_size(x, y)
                product = _summed_products(shrunk1[i][size].flatten(2), shrunk2[j][size].flatten(2))
                self.products[i, j] = self.products[i, j] + product if (i, j) in self.products else product

    def similarities(self, measure: str) -> Similarities:
        """Of all pairs of layers, by wreath_procrustes or ortho_procrustes."""
        compare = {"wreath_procrustes": _wreath_procrustes, "ortho_procrustes": _ortho_procrustes}[measure]
        squares1, squares2 = self.squares
        published, live = torch.full((2, len(squares1), len(squares2)), math.nan, dtype=torch.float64)
        for (i, j), products in self.products.items():
            live1, live2 = squares1[i] > 0, squares2[j] > 0
            published[i, j] = compare(products, squares1[i], squares2[j])
            if live1.all() and live2.all():
                live[i, j] = published[i, j]
            elif live1.any() and live2.any():
                live[i, j] = compare(products[live1][:, live2], squares1[i][live1], squares2[j][live2])
        dead1, dead2 = (torch.tensor([int((square == 0).sum()) for square in squares]) for squares in self.squares)
        return Similarities(published, live, dead1, dead2)


def _summed_products(a: Tensor, b: Tensor) -> Tensor:
    """Sum over images of a @ b.T: (B, C1, P), (B, C2, P) -> (C1, C2), float64. A single precision sum has about 1,000 terms."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    P = a.shape[2]
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for x, y in zip(a.to(dtype).split(max(1, 1024 // P)), b.to(dtype).split(max(1, 1024 // P)), strict=True):
        # one matrix product: a single image as it lies in memory, several small ones side by side, as a copy
        total += x.transpose(0, 1).flatten(1) @ y.transpose(0, 1).flatten(1).T
    return total


def _common_size(x: Tensor, y: Tensor) -> tuple[int, int]:
    """The smaller height and width of two maps. Raises ValueError unless they divide the larger ones."""
    (h1, w1), (h2, w2) = x.shape[2:], y.shape[2:]
    if max(h1, h2) % min(h1, h2) or max(w1, w2) % min(w1, w2):
        raise ValueError(f"maps of {h1}x{w1} and {h2}x{w2} cannot be compared: no whole factor enlarges one to the other")
    return min(h1, h2), min(w1, w2)


def _at_common_sizes(maps: list[Tensor], others: list[Tensor]) -> list[dict[tuple[int, int], Tensor]]:
    """Each map, shrunk to every size at which it is compared with one of the others."""
    shrunk = []
    for x in maps:
        sizes = {_common_size(x, y) for y in others}
        shrunk.append({size: _shrink(x, size) for size in sizes})
    return shrunk


def _shrink(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Sums over windows, (B, C, H, W) -> (B, C, *size), divided by the root of their area: the norm of an enlarged map."""
    windows = (x.shape[2] // size[0], x.shape[3] // size[1])
    return x if windows == (1, 1) else F.avg_pool2d(x, windows) * math.sqrt(math.prod(windows))


def _wreath_procrustes(products: Tensor, squares1: Tensor, squares2: Tensor) -> float:
    """1 - d, d^2 = (|H1|^2 + |H2|^2 - 2 sum C[matching]) / 4c: channels of unit norm, matched for the largest sum.

    products (C1, C2), squared norms (C1) and (C2); c is the larger number of channels. Dead channels stay zero.
    """
    c = max(products.shape)
    scale1, scale2 = (torch.where(squares > 0, squares.rsqrt(), 0) for squares in (squares1, squares2))
    C = F.pad(scale1[:, None] * products * scale2, (0, c - products.shape[1], 0, c - products.shape[0]))
    matched = C.gather(1, best_matching(C[None])[0][:, None]).sum()
    n_live = (squares1 > 0).sum() + (squares2 > 0).sum()  # |H1|^2 + |H2|^2
    return 1 - ((n_live - 2 * matched).clamp(min=0) / (4 * c)).sqrt().item()


def _ortho_procrustes(products: Tensor, squares1: Tensor, squares2: Tensor) -> float:
    """1 - d, d^2 = (2 - 2 |C|_nuclear) / 4, with each layer as a whole of unit norm; NaN if a layer is all zero."""
    C = products / (squares1.sum() * squares2.sum()).sqrt()
    return 1 - ((1 - torch.linalg.svdvals(C).sum()).clamp(min=0) / 2).sqrt().item() if C.isfinite().all() else math.nan
