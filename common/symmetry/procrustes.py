"""Procrustes: the distance between the channels of two layers after one is permuted and scaled, or rotated, to fit the other.

Only inner products of channels, (C1, C2) for a pair of layers, are kept, summed over batches of images in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from common.matching import best_matching
from common.processor import add_product
from common.symmetry.measures import GPU_BYTES, Similarities, check_finite, image_norms, maps_of

TERMS = 1024  # of a sum in single precision
Size = tuple[int, int]


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
        self.sizes: tuple[list[Size], list[Size]] = ([], [])  # of a layer's maps
        # at each size at which layers meet, inner products of all layers that meet others there, side by side
        self.products: dict[Size, Tensor] = {}
        self.squares: tuple[list[Tensor], list[Tensor]] = ([], [])  # (C) of a layer of network 1, of network 2

    @torch.no_grad()
    def add(self, features1: list[Tensor], features2: list[Tensor]) -> None:
        """Add a batch of images: all layers of network 1, and of network 2. For errors see layer_similarities."""
        networks = maps_of(features1, features2)
        squares = [[image_norms(x).square().sum(0) for x in maps] for maps in networks]
        check_finite(squares, networks)
        for sums, new in zip(self.squares, squares, strict=True):
            sums[:] = [a + b for a, b in zip(sums, new, strict=True)] if sums else new
        for sizes, maps in zip(self.sizes, networks, strict=True):
            sizes[:] = [(x.shape[2], x.shape[3]) for x in maps]
        for size in sorted({common_size(a, b) for a in self.sizes[0] for b in self.sizes[1]}):
            maps1, maps2 = ([maps[i] for i in layers] for maps, layers in zip(networks, self._layers_at(size), strict=True))
            products = _summed_products(maps1, maps2, size)
            self.products[size] = self.products[size] + products if size in self.products else products

    def _layers_at(self, size: Size) -> tuple[list[int], list[int]]:
        """The layers of network 1, and of network 2, that meet a layer of the other one at this size."""
        layers = [
            [i for i, a in enumerate(sizes) if any(common_size(a, b) == size for b in others)]
            for sizes, others in (self.sizes, self.sizes[::-1])
        ]
        return layers[0], layers[1]

    def similarities(self, measure: str) -> Similarities:
        """Of all pairs of layers, by wreath_procrustes or ortho_procrustes."""
        compare = {"wreath_procrustes": _wreath_procrustes, "ortho_procrustes": _ortho_procrustes}[measure]
        squares1, squares2 = ([square.cpu() for square in squares] for squares in self.squares)
        published, live = torch.full((2, len(squares1), len(squares2)), math.nan, dtype=torch.float64)
        for i, j, products in self._pairs():
            live1, live2 = squares1[i] > 0, squares2[j] > 0
            published[i, j] = compare(products, squares1[i], squares2[j])
            if live1.all() and live2.all():
                live[i, j] = published[i, j]
            elif live1.any() and live2.any():
                live[i, j] = compare(products[live1][:, live2], squares1[i][live1], squares2[j][live2])
        dead1, dead2 = (torch.tensor([int((square == 0).sum()) for square in squares]) for squares in (squares1, squares2))
        return Similarities(published, live, dead1, dead2)

    def _pairs(self) -> Iterator[tuple[int, int, Tensor]]:
        """Two layers' numbers, and the products of their channels (C1, C2) on the CPU: one transfer for each size."""
        for size, products in self.products.items():
            layers = self._layers_at(size)
            widths = [[len(squares[i]) for i in numbers] for squares, numbers in zip(self.squares, layers, strict=True)]
            for i, rows in zip(layers[0], products.cpu().split(widths[0]), strict=True):
                for j, block in zip(layers[1], rows.split(widths[1], 1), strict=True):
                    if common_size(self.sizes[0][i], self.sizes[1][j]) == size:  # two larger layers may be here, too
                        yield i, j, block


def common_size(a: Size, b: Size) -> Size:
    """The smaller height and width of two maps. Raises ValueError unless they divide the larger ones."""
    (h1, w1), (h2, w2) = a, b
    if max(h1, h2) % min(h1, h2) or max(w1, w2) % min(w1, w2):
        raise ValueError(f"maps of {h1}x{w1} and {h2}x{w2} cannot be compared: no whole factor enlarges one to the other")
    return min(h1, h2), min(w1, w2)


def _summed_products(maps1: list[Tensor], maps2: list[Tensor], size: Size) -> Tensor:
    """Inner products of all channels of maps (B, C, H, W) shrunk to one size: (sum of C1, sum of C2), float64.

    A matrix product is of `k` images with about TERMS positions. On a CPU, a few of these are added in single precision.
    """
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in maps1 + maps2])
    shrunk1, shrunk2 = ([_shrink(x, size).flatten(2).to(dtype) for x in maps] for maps in (maps1, maps2))  # (B, C, P)
    C1, C2 = (sum(x.shape[1] for x in maps) for maps in (maps1, maps2))
    total = torch.zeros(C1, C2, dtype=torch.float64, device=maps1[0].device)
    k = max(1, TERMS // math.prod(size))
    if total.device.type == "cpu":
        few = torch.zeros(C1, C2, dtype=dtype)
        for i, (a, b) in enumerate(zip(_rows(shrunk1, k), _rows(shrunk2, k), strict=True), start=1):
            add_product(few, a, b.T)
            if i % 8 == 0:
                total += few
                few.zero_()
        return total.add_(few)
    at_a_time = k * max(1, GPU_BYTES // (4 * max(C1 * C2, TERMS * (C1 + C2))))
    for part1, part2 in zip(_parts(shrunk1, at_a_time), _parts(shrunk2, at_a_time), strict=True):
        total += torch.bmm(_grouped(part1, k), _grouped(part2, k).mT).sum(0, dtype=torch.float64)
    return total


def _parts(maps: list[Tensor], n_images: int) -> Iterator[tuple[Tensor, ...]]:
    return zip(*[x.split(n_images) for x in maps], strict=True)


def _rows(maps: list[Tensor], k: int) -> Iterator[Tensor]:
    """All channels of maps (B, C, P), the positions of k images side by side: (sum of C, k P), one after the other."""
    for parts in zip(*[x.transpose(0, 1).split(k, 1) for x in maps], strict=True):
        yield (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)


def _grouped(maps: tuple[Tensor, ...], k: int) -> Tensor:
    """The same for all groups of k images: (G, sum of C, k P). Zeros fill the last one up."""
    x = torch.cat(maps, 1)
    k = min(k, len(x))
    return F.pad(x, (0, 0, 0, 0, 0, -len(x) % k)).unflatten(0, (-1, k)).transpose(1, 2).flatten(2)


def _shrink(x: Tensor, size: Size) -> Tensor:
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
