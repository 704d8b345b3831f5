"""Centred kernel alignment (CKA): whether two layers find the same images alike, by unbiased HSIC of their kernels.

A kernel (N, N) is never held: HSIC needs sums of products and of rows, to which tiles of kernels are added.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from common.processor import cache_size, product
from common.symmetry.measures import GPU_BYTES, Similarities, as_maps, check_finite, check_names, image_norms, maps_of

NOTHING = 1e-12  # variance of a constant, after rounding, relative to its square
ROWS, COLUMNS = 1024, 256  # of a tile on a CPU: large enough for products at full speed, and 1 MiB


def _check_n_images(n_images: int) -> None:
    if n_images < 4:
        raise ValueError(f"unbiased HSIC, and so CKA, needs 4 images or more, not {n_images}")


class Moments:
    """A layer's channel means over images and positions, and sums of squared deviations, (C) each, over batches.

    Sums are of differences from the mean of the first images: exact also for large means.
    """

    def __init__(self, maps: Tensor):
        """Features of the layer (B, C, H, W) for the first images; they are not added yet."""
        self.shift = maps[:16].mean((0, 2, 3))
        self.count = 0
        self.sum, self.sum_of_squares = torch.zeros(2, maps.shape[1], dtype=torch.float64, device=maps.device)

    def add(self, maps: Tensor) -> None:
        """Add a batch of maps (B, C, H, W)."""
        at_a_time = len(maps)
        if maps.device.type == "cpu":  # differences stay in the cache
            at_a_time = max(1, cache_size() // (maps[:1].numel() * maps.element_size()))
        sums, norms = [], []  # (B, C) of all parts
        for part in maps.split(at_a_time):
            difference = part - self.shift.to(maps.dtype)[:, None, None]
            sums.append(difference.sum((2, 3)))
            norms.append(image_norms(difference))
        self.count += maps.shape[0] * maps.shape[2] * maps.shape[3]
        self.sum += torch.cat(sums).double().sum(0)
        self.sum_of_squares += torch.cat(norms).square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self.shift + self.sum / self.count

    @property
    def deviations(self) -> Tensor:
        return (self.sum_of_squares - self.sum.square() / self.count).clamp(min=0)

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
        """Add tiles (L, A, B). Entries below the diagonal count twice, for their mirror images; others are left out."""
        tiles = tiles.double()
        if columns.stop > rows.start:
            tiles.tril_(rows.start - columns.start - 1)
        flat = tiles.flatten(1)
        self.products += 2 * (flat @ flat.T)
        self.rows[:, rows] += tiles.sum(2)
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
    """Unbiased estimate of the Hilbert-Schmidt independence criterion of two symmetric kernels (N, N) without diagonals.

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


class Scaling(NamedTuple):
    """How the channels of a layer are compared: (x - mean) * scale of C' channels, dead ones left out if they are taken out."""

    mean: Tensor  # (C', 1, 1), 0 where features are not centred
    scale: Tensor  # (C', 1, 1)
    live: Tensor | None  # (C'), indices of the channels; None: all
    n_dead: int


class Kernels:
    """CKA between all layers of two networks, in two passes over N images.

    The first pass (add_moments, batch by batch) finds each channel's mean and norm. The second (add_tile) compares pairs of
    blocks of images, whose channels are centred and scaled to unit norm (linear_cka: all channels together). It goes through
    the lower triangle of pairs, including those on the diagonal.

    >>> kernels, x, everything = Kernels("ortho_cka", 6), [torch.rand(6, 4, 8, 8)], slice(0, 6)
    >>> kernels.add_moments(x, x)
    >>> kernels.add_tile(everything, everything, *[kernels.normalised(x, x)] * 2)
    >>> round(kernels.similarities().published.item(), 4)
    1.0
    """

    def __init__(self, measure: str, n_images: int, *, estimator: str = "max", centered: bool = True):
        check_names(measure, estimator)
        _check_n_images(n_images)
        self.measure, self.estimator = measure, estimator
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
                moments += [Moments(x) for x in maps]
        for moments, maps in zip(self.moments, networks, strict=True):
            for moment, x in zip(moments, maps, strict=True):
                moment.add(x)
        check_finite([[moment.sum_of_squares for moment in moments] for moments in self.moments], networks)

    @cached_property
    def scalings(self) -> list[Scaling]:
        """Of all layers of both networks, after the first pass."""
        return [self._scaling(moments) for moments in self.moments[0] + self.moments[1]]

    @property
    def with_dead(self) -> bool:
        """Whether published kernels differ from those of live channels: most often they are the same, and added once."""
        return any(scaling.n_dead for scaling in self.scalings)

    def _scaling(self, moments: Moments) -> Scaling:
        squares = moments.squares(self.centered)
        mean = moments.mean if self.centered else torch.zeros_like(moments.mean)
        scale = torch.where(squares > 0, (squares.sum() if self.measure == "linear_cka" else squares).rsqrt(), 0)
        live = squares.nonzero().flatten()
        if self.measure != "wreath_cka" or len(live) == len(squares):  # dead channels add nothing to a sum
            return Scaling(mean[:, None, None], scale[:, None, None], None, 0)
        return Scaling(mean[live, None, None], scale[live, None, None], live, len(squares) - len(live))

    @torch.no_grad()
    def normalised(self, features1: list[Tensor], features2: list[Tensor]) -> list[Tensor]:
        """The features of a block of images for add_tile, of all layers of both networks in one list: copies (C', B, P).

        wreath_cka compares the C' live channels one by one. For other measures, all channels are as one: (1, B, C P).
        """
        return [self._normalised(*pair) for pair in zip(self.scalings, features1 + features2, strict=True)]

    def _normalised(self, scaling: Scaling, features: Tensor) -> Tensor:
        x = as_maps(features, "features").flatten(2).transpose(0, 1)  # (C, B, P)
        if scaling.live is not None:
            x = x[scaling.live]
        C, B, P = x.shape
        one_by_one = self.measure == "wreath_cka"
        out = x.new_empty((C, B, P) if one_by_one else (B, C, P))  # dense, as fast products need it
        channels = out if one_by_one else out.transpose(0, 1)
        torch.sub(x, scaling.mean.to(x.dtype), out=channels)
        channels.mul_(scaling.scale.to(x.dtype))
        return out if one_by_one else out.view(1, B, C * P)

    @torch.no_grad()
    def add_tile(self, rows: slice, columns: slice, row_features: list[Tensor], column_features: list[Tensor]) -> None:
        """Second pass: kernels between two blocks of images, from their normalised features.

        `rows` are `columns`, or come after them. On a CPU, tiles are cut to what is fast there, and those above the diagonal
        are left out.
        """
        n_rows, n_columns = rows.stop - rows.start, columns.stop - columns.start
        height, width = n_rows, n_columns
        if row_features[0].device.type == "cpu":  # of few images, narrow tiles compute less above the diagonal
            height, width = ROWS, COLUMNS if self.n_images >= 1000 else COLUMNS // 2
        for left in range(0, n_columns, width):
            part = slice(columns.start + left, min(columns.start + left + width, columns.stop))
            y = [z[:, left : left + width] for z in column_features]
            for top in range(left if rows == columns else 0, n_rows, height):
                x = [z[:, top : top + height] for z in row_features]
                self._add_tile(slice(rows.start + top, min(rows.start + top + height, rows.stop)), part, x, y)

    def _add_tile(self, rows: slice, columns: slice, row_features: list[Tensor], column_features: list[Tensor]) -> None:
        layers = zip(row_features, column_features, self.scalings, strict=True)
        published, live = zip(*[kernels(x, y, self.estimator, scaling.n_dead) for x, y, scaling in layers], strict=True)
        self.live.add(rows, columns, torch.stack(live))
        if self.with_dead:
            self.published.add(rows, columns, torch.stack(published))

    def similarities(self) -> Similarities:
        """Of all pairs of layers; NaN for a layer whose kernel is constant."""
        n1 = len(self.moments[0])
        published, live = (sums.cka()[:n1, n1:].cpu() for sums in (self.published if self.with_dead else self.live, self.live))
        dead1, dead2 = (
            torch.tensor([int((moment.squares(self.centered) == 0).sum()) for moment in moments]) for moments in self.moments
        )
        return Similarities(published, live, dead1, dead2)


def kernels(x: Tensor, y: Tensor, over: str, n_dead: int = 0) -> tuple[Tensor, Tensor]:
    """The max or median over channels of inner products over positions: (C, A, P), (C, B, P) -> (A, B), twice.

    As published, where the products of `n_dead` channels more are 0, and of these C alone. The median of an even number is the
    lower one, as published.
    """
    (C, A, _), B = x.shape, y.shape[1]
    if C == 0:
        K = x.new_zeros(A, B)
    elif over == "median":
        return _medians(x, y, n_dead)
    elif x.device.type == "cpu":
        K = product(x[0], y[0].T)
        for a, b in zip(x[1:].unbind(), y[1:].mT.unbind(), strict=True):
            torch.maximum(K, product(a, b), out=K)
    else:
        at_a_time = max(1, GPU_BYTES // (4 * A * B))
        parts = zip(x.split(at_a_time), y.split(at_a_time), strict=True)
        K = torch.stack([torch.bmm(a, b.mT).amax(0) for a, b in parts]).amax(0)
    return K.clamp(min=0) if n_dead else K, K


def _medians(x: Tensor, y: Tensor, n_dead: int) -> tuple[Tensor, Tensor]:
    height = 32 if x.device.type == "cpu" else max(1, GPU_BYTES // (4 * (len(x) + n_dead) * y.shape[1]))
    published, live = [], []
    for rows in x.split(height, 1):
        products = torch.bmm(rows, y.mT)  # (C, height, B)
        live.append(products.median(0).values)
        if n_dead:
            published.append(torch.cat([products, products.new_zeros(n_dead, *products.shape[1:])]).median(0).values)
    return torch.cat(published if n_dead else live), torch.cat(live)
