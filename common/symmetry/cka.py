"""Centred kernel alignment (CKA): whether two layers find the same images alike, by unbiased HSIC of their kernels.

A kernel (N, N) is never held: HSIC needs sums of products and of rows, to which tiles of kernels are added.
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
    """A layer's channel means over images and positions, and sums of squared deviations, (C) each, over batches."""

    def __init__(self, channels: int, device: torch.device | None = None):
        self.count = 0
        self.mean, self.deviations = torch.zeros(2, channels, dtype=torch.float64, device=device)

    def add(self, maps: Tensor, layer: str = "features") -> None:
        """Add maps (B, C, H, W). Batches are merged as by Chan, Golub and LeVeque (1979): exact also for large means."""
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
    """Sums over the kernels (N, N) of L layers, diagonals left out: of products of kernels (L, L), and of rows (L, N)."""

    def __init__(self, n_layers: int, n_images: int, device: torch.device | None = None):
        self.n_images = n_images
        self.products = torch.zeros(n_layers, n_layers, dtype=torch.float64, device=device)
        self.rows = torch.zeros(n_layers, n_images, dtype=torch.float64, device=device)

    def add(self, rows: slice, columns: slice, tiles: Tensor) -> None:
        """Add tiles (L, A, B) of the lower triangle; one off the diagonal counts twice, for its mirror image."""
        tiles = tiles.double()
        on_diagonal = rows == columns
        if on_diagonal:
            tiles.diagonal(dim1=1, dim2=2).zero_()
        flat = tiles.flatten(1)
        self.products += flat @ flat.T * (1 if on_diagonal else 2)
        self.rows[:, rows] += tiles.sum(2)
        if not on_diagonal:
            self.rows[:, columns] += tiles.sum(1)

    def cka(self) -> Tensor:
        """(L, L), NaN for layers with a constant kernel."""
        hsic = _unbiased_hsic(self.products, self.rows)
        with_itself = hsic.diagonal()
        constant = with_itself <= NOTHING * self.products.diagonal() / (self.n_images * (self.n_images - 3))
        root = torch.where(constant, math.nan, with_itself).sqrt()
        return hsic / root[:, None] / root


def _unbiased_hsic(products: Tensor, rows: Tensor) -> Tensor:
    """Unbiased HSIC of all pairs of L kernels, (L, L), from the sums of their products (L, L) and of their rows (L, N)."""
    n, sums = rows.shape[1], rows.sum(1)
    return (products + torch.outer(sums, sums) / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


def unbiased_hsic(K: Tensor, L: Tensor) -> float:
    """Unbiased estimate of the Hilbert-Schmidt independence criterion of two kernels (N, N); diagonals do not matter.

    Song et al. 2012, Feature selection via dependence maximization. Raises ValueError for fewer than 4 images, and for
    kernels of different shapes.

    >>> K = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    >>> round(unbiased_hsic(K, K), 4)
    0.6667
    """
    if K.shape != L.shape or K.ndim != 2 or K.shape[0] != K.shape[1]:
        raise ValueError(f"kernels must be square and of one shape, not {tuple(K.shape)} and {tuple(L.shape)}")
    n = len(K)
    _check_n_images(n)
    sums = KernelSums(2, n, K.device)
    sums.add(slice(0, n), slice(0, n), torch.stack([K, L]))
    return _unbiased_hsic(sums.products, sums.rows)[0, 1].item()


class Kernels:
    """CKA between all layers of two networks, in two passes over N images.

    The first pass (add_moments, batch by batch) finds each channel's mean and norm. The second (add_tile) compares pairs of
    blocks of images, whose channels are centred and scaled to unit norm (linear_cka: all channels together). It goes through
    the lower triangle of tiles, including those on the diagonal.

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
        self.published: KernelSums  # both are made with the first batch, which says how many layers there are
        self.live: KernelSums

    @torch.no_grad()
    def add_moments(self, features1: list[Tensor], features2: list[Tensor]) -> None:
        """First pass: a batch of images."""
        networks = maps_of(features1, features2)
        if not self.moments[0]:
            n_layers, device = len(features1) + len(features2), networks[0][0].device
            self.published, self.live = (KernelSums(n_layers, self.n_images, device) for _ in range(2))
            for moments, maps in zip(self.moments, networks, strict=True):
                moments += [Moments(x.shape[1], x.device) for x in maps]
        for k in range(2):
            for i, (moment, x) in enumerate(zip(self.moments[k], networks[k], strict=True)):
                moment.add(x, layer_name(k + 1, i))

    @torch.no_grad()
    def normalised(self, features1: list[Tensor], features2: list[Tensor]) -> list[Tensor]:
        """The features of a block of images for add_tile: copies (B, C, P), of all layers of both networks in one list."""
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
    def add_tile(self, rows: slice, columns: slice, row_features: list[Tensor], column_features: list[Tensor]) -> None:
        """Second pass: kernels between two blocks of images, from their normalised features."""
        published, live = [], []
        for moments, x, y in zip(self.moments[0] + self.moments[1], row_features, column_features, strict=True):
            both = tile(x, y, moments.squares(self.centered) > 0, self.over)
            published.append(both[0])
            live.append(both[1])
        self.published.add(rows, columns, torch.stack(published))
        self.live.add(rows, columns, torch.stack(live))

    def similarities(self) -> Similarities:
        """Of all pairs of layers; NaN for a layer whose kernel is constant."""
        n1 = len(self.moments[0])
        published, live = (sums.cka()[:n1, n1:].cpu() for sums in (self.published, self.live))
        dead1, dead2 = (
            torch.tensor([int((moment.squares(self.centered) == 0).sum()) for moment in moments]) for moments in self.moments
        )
        return Similarities(published, live, dead1, dead2)


def tile(x: Tensor, y: Tensor, live: Tensor, over: str) -> tuple[Tensor, Tensor]:
    """A tile (A, B) of a kernel as published, and of `live` (C) channels alone: (A, C, P), (B, C, P), 0 where not live."""
    if live.all():
        K = channel_kernel(x, y, over)
        return K, K
    K = channel_kernel(x[:, live], y[:, live], over)
    if over == "median":
        return channel_kernel(x, y, over), K
    # dead channels add a zero to the candidates of a maximum, and nothing to a sum
    return (K.clamp(min=0) if over == "max" else K), K


def channel_kernel(x: Tensor, y: Tensor, over: str) -> Tensor:
    """Inner products over positions, reduced over channels by max, median or sum: (A, C, P), (B, C, P) -> (A, B).

    The running maximum needs one matrix product per channel. The median of an even number is the lower one, as published.
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
