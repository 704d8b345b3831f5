"""Centred kernel alignment (CKA): how alike two layers find which images are alike, by unbiased HSIC of their kernels.

Kernels (N, N) are never held: HSIC needs sums of their products and of their rows, which tiles of them are added to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.symmetry.measures import Similarities, as_maps, check_finite, check_names, layer_name, maps_of

NOTHING = 1e-12  # variance of a constant, after rounding, relative to its square


def _check_n_images(n_images: int) -> None:
    if n_images < 4:
        raise ValueError(f"unbiased HSIC, and so CKA, needs 4 images or more, not {n_images}")


class Moments:
    """Mean of each channel of a layer over images and positions, and sum of squared deviations, (C) each, over batches."""

    def __init__(self, channels: int, device: torch.device | None = None):
        self.count = 0
        self.mean, self.deviations = torch.zeros(2, channels, dtype=torch.float64, device=device)

    def add(self, maps: Tensor, layer: str = "features") -> None:
        """Take in maps (B, C, H, W): batches are merged as by Chan, Golub and LeVeque 1979, so that large means do no harm."""
        count = maps.shape[0] * maps.shape[2] * maps.shape[3]
        mean = maps.mean((0, 2, 3))
        deviations = torch.linalg.vector_norm(maps - mean[:, None, None], dim=(2, 3)).double().square().sum(0)
        check_finite(deviations, maps, layer)
        step, total = mean.double() - self.mean, self.count + count
        self.mean = self.mean + step * (count / total)
        self.deviations = self.deviations + deviations + step.square() * (self.count * count / total)
        self.count = total

    def squares(self, centered: bool) -> Tensor:
        """Squared norm of each channel (C), 0 for a constant one where they are centred."""
        around_zero = self.count * self.mean.square() + self.deviations
        return torch.where(self.deviations > NOTHING * around_zero, self.deviations, 0) if centered else around_zero


class KernelSums:
    """What HSIC needs of kernels (N, N) of L layers, diagonals aside, from tiles of them: sums of products, and of rows."""

    def __init__(self, n_images: int):
        self.n_images = n_images
        self.products = self.rows = torch.zeros((), dtype=torch.float64)  # (L, L) and (L, N) with the first tile

    def add(self, rows: slice, columns: slice, tiles: Tensor) -> None:
        """Take in tiles (L, A, B) of the lower triangle: each also stands for its mirror image."""
        tiles = tiles.double()
        if rows == columns:
            tiles.diagonal(dim1=1, dim2=2).zero_()
        if self.rows.ndim == 0:
            self.rows = tiles.new_zeros(len(tiles), self.n_images)
        flat = tiles.flatten(1)
        self.products = self.products.to(flat.device) + flat @ flat.T * (1 if rows == columns else 2)
        self.rows[:, rows] += tiles.sum(2)
        if rows != columns:
            self.rows[:, columns] += tiles.sum(1)

    def cka(self) -> Tensor:
        """(L, L), NaN for layers with a constant kernel."""
        hsic = _unbiased_hsic(self.products, self.rows)
        with_itself = hsic.diagonal()
        constant = with_itself <= NOTHING * self.products.diagonal() / (self.n_images * (self.n_images - 3))
        root = torch.where(constant, math.nan, with_itself).sqrt()
        return hsic / root[:, None] / root


def _unbiased_hsic(products: Tensor, rows: Tensor) -> Tensor:
    """Of all pairs of L kernels, from sums of their products (L, L) and of rows (L, N), diagonals left out."""
    n, sums = rows.shape[1], rows.sum(1)
    return (products + torch.outer(sums, sums) / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


def unbiased_hsic(K: Tensor, L: Tensor) -> float:
    """Unbiased estimate of the Hilbert-Schmidt independence criterion of two kernels (N, N), whose diagonals do not matter.

    Song et al. 2012, Feature selection via dependence maximization. Raises ValueError for fewer than 4 images, and
    kernels of different shapes.

    >>> K = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    >>> round(unbiased_hsic(K, K), 4)
    0.6667
    """
    if K.shape != L.shape or K.ndim != 2 or K.shape[0] != K.shape[1]:
        raise ValueError(f"kernels must be square and of one shape, not {tuple(K.shape)} and {tuple(L.shape)}")
    n = len(K)
    _check_n_images(n)
    sums = KernelSums(n)
    sums.add(slice(0, n), slice(0, n), torch.stack([K, L]))
    return _unbiased_hsic(sums.products, sums.rows)[0, 1].item()


class Kernels:
    """What CKA needs of kernels (N, N) between images, a kernel for each layer of two networks, summed up tile by tile.

    Channels are centred and scaled to unit norm (linear_cka: all together), which takes a pass of its own: add_moments for
    all images, then add_tile for the lower triangle of tiles, those on the diagonal included.

    >>> kernels, x, everything = Kernels("ortho_cka", 6), [torch.rand(6, 4, 8, 8)], slice(0, 6)
    >>> kernels.add_moments(x, x)
    >>> kernels.add_tile(everything, everything, *[kernels.normalised(x, x)] * 2)
    >>> round(kernels.similarities().published.item(), 4)
    1.0
    """

    def __init__(self, measure: str, n_images: int, *, estimator: str = "max", centered: bool = True):
        check_names(measure, estimator)
        _check_n_images(n_images)
        self.over = estimator if measure == "wreath_cka" else "sum"
        self.one_by_one = measure != "linear_cka"
        self.n_images, self.centered = n_images, centered
        self.moments: tuple[list[Moments], list[Moments]] = ([], [])
        self.published, self.live = KernelSums(n_images), KernelSums(n_images)

    @torch.no_grad()
    def add_moments(self, features1: list[Tensor], features2: list[Tensor]) -> None:
        """First pass: a batch of images."""
        for k, (moments, maps) in enumerate(zip(self.moments, maps_of(features1, features2), strict=True), start=1):
            if not moments:
                moments += [Moments(x.shape[1], x.device) for x in maps]
            for i, (of_layer, x) in enumerate(zip(moments, maps, strict=True)):
                of_layer.add(x, layer_name(k, i))

    @torch.no_grad()
    def normalised(self, features1: list[Tensor], features2: list[Tensor]) -> list[Tensor]:
        """A block of images as add_tile takes it: layers (B, C, P) of both networks, in one list, as copies."""
        layers = zip(self.moments[0] + self.moments[1], features1 + features2, strict=True)
        return [self._normalised(moments, x) for moments, x in layers]

    def _normalised(self, moments: Moments, features: Tensor) -> Tensor:
        squares = moments.squares(self.centered)
        scale = torch.where(squares > 0, (squares if self.one_by_one else squares.sum()).rsqrt(), 0)
        x = as_maps(features, "features").flatten(2).contiguous()  # a product per channel needs its rows
        if self.centered:
            return (x - moments.mean.to(x.dtype)[:, None]).mul_(scale.to(x.dtype)[:, None])
        return x * scale.to(x.dtype)[:, None]

    @torch.no_grad()
    def add_tile(self, rows: slice, columns: slice, of_rows: list[Tensor], of_columns: list[Tensor]) -> None:
        """Second pass: kernels between two blocks of images, whose features are normalised."""
        live = [moments.squares(self.centered) > 0 for moments in self.moments[0] + self.moments[1]]
        pairs = [tile(x, y, alive, self.over) for x, y, alive in zip(of_rows, of_columns, live, strict=True)]
        for sums, tiles in zip((self.published, self.live), zip(*pairs, strict=True), strict=True):
            sums.add(rows, columns, torch.stack(tiles))

    def similarities(self) -> Similarities:
        """Of all pairs of layers; a layer whose kernel is constant has none (NaN)."""
        n1 = len(self.moments[0])
        published, live = (sums.cka()[:n1, n1:].cpu() for sums in (self.published, self.live))
        dead1, dead2 = (
            torch.tensor([int((moments.squares(self.centered) == 0).sum()) for moments in of_network])
            for of_network in self.moments
        )
        return Similarities(published, live, dead1, dead2)


def tile(x: Tensor, y: Tensor, live: Tensor, over: str) -> tuple[Tensor, Tensor]:
    """A tile (A, B) of a kernel as published, and of live channels (C) alone: (A, C, P), (B, C, P), zero where not live."""
    if live.all():
        K = channel_kernel(x, y, over)
        return K, K
    K = channel_kernel(x[:, live], y[:, live], over)
    if over == "median":
        return channel_kernel(x, y, over), K
    # dead channels add a zero to what the maximum is of, and nothing to a sum
    return (K.clamp(min=0) if over == "max" else K), K


def channel_kernel(x: Tensor, y: Tensor, over: str) -> Tensor:
    """Inner products over positions, reduced over channels by max, median or sum: (A, C, P), (B, C, P) -> (A, B).

    The maximum runs along with a matrix product per channel. Of an even number the median is the lower one, as published.
    """
    if x.shape[1] == 0:
        return x.new_zeros(len(x), len(y))
    if over == "sum":
        return x.flatten(1) @ y.flatten(1).T
    if over == "median":
        return torch.cat([torch.bmm(rows.transpose(0, 1), y.permute(1, 2, 0)).median(0).values for rows in x.split(32)])
    K = x[:, 0] @ y[:, 0].T
    product = torch.empty_like(K)
    for c in range(1, x.shape[1]):
        torch.mm(x[:, c], y[:, c].T, out=product)
        torch.maximum(K, product, out=K)
    return K
