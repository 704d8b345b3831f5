"""How similar layers of two networks are, up to symmetries of their channels (Godfrey et al. 2022, arXiv 2205.14258).

    wreath_procrustes, wreath_cka    up to permutations of channels and positive scales: the symmetries of ReLU
    ortho_procrustes, linear_cka     up to rotations of channels
    ortho_cka                        as published: linear CKA of channels that were scaled one by one, which rotations do change

    wreath_cka(features1, features2)                                          # of one layer each, with all their features
    layer_similarities("wreath_cka", network1, network2, n_images=10_000)     # of all pairs of layers, block by block

Features are (N, C, H, W), (N, C, P) or (N, C): N images, C channels. They are read, not changed. All values are 1 for a layer
with itself. A channel is dead if it is zero for all images and positions or, where channels are centred, constant. Dead ones
count in the published values; each comes with another one, of live channels alone. Sums over images are float64: the
original's, in float32, are off by 1e-3 for 1000 maps of 64 channels and 32x32 positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.matching import best_matching

MEASURES = ("wreath_procrustes", "wreath_cka", "ortho_procrustes", "ortho_cka", "linear_cka")
ESTIMATORS = ("max", "median")
TILE = 256  # images at a time, of one pair of layers: tiles of kernels stay in a CPU's cache
NOTHING = 1e-12  # variance of a constant, after rounding, relative to its square

# of a network: the features of each of its layers, (B, C, H, W), for the images of a slice
Features = Callable[[slice], list[Tensor]]


@dataclass(frozen=True)
class Similarities:
    """Between L1 layers of network 1 and L2 layers of network 2."""

    published: Tensor  # (L1, L2), float64; NaN where a layer has nothing to compare, all its channels being dead
    live: Tensor  # (L1, L2), float64: the same of live channels alone
    dead1: Tensor  # (L1), int64: how many channels are dead
    dead2: Tensor  # (L2)


# ---- all pairs of layers of two networks ---------------------------------------------------------------------------------


def layer_similarities(
    measure: str,
    features1: Features,
    features2: Features,
    n_images: int,
    *,
    estimator: str = "max",
    centered: bool = True,
    block: int = 400,
    progress: bool = False,
) -> Similarities:
    """Compare all layers of a network with all of another. `estimator` is wreath_cka's, `centered` all CKAs'.

    Features are asked for in blocks of images: by Procrustes once each, by CKA about n / 2 times, n being their number.
    Held are at most three blocks of features of all layers of both networks (Procrustes: one, and what it is shrunk to), and
    sums: for Procrustes (C1, C2) a pair of layers, for CKA (N) a layer. No kernel (N, N) is held.
    Raises ValueError for an unknown measure or estimator, features that are not finite, numbers of images that differ,
    maps that no whole factor enlarges to each other (Procrustes), and fewer than 4 images (CKA).
    """
    _check_names(measure, estimator)
    if n_images < 1:
        raise ValueError(f"there must be images to compare, not {n_images}")
    if block < 1:
        raise ValueError(f"block is {block}: at least 1 image")
    blocks = [slice(start, min(start + block, n_images)) for start in range(0, n_images, block)]
    disable = None if progress else True  # None: where there is no terminal
    if measure.endswith("procrustes"):
        products = ChannelProducts()
        for part in tqdm(blocks, desc=measure, disable=disable):
            products.add(features1(part), features2(part))
        return products.similarities(measure)

    kernels = Kernels(measure, n_images, estimator=estimator, centered=centered)
    for part in tqdm(blocks, desc=f"{measure}, means", disable=disable):
        kernels.add_moments(features1(part), features2(part))
    with tqdm(total=len(blocks) * (len(blocks) + 1) // 2, desc=measure, disable=disable) as bar:
        for i, rows in enumerate(blocks):
            of_rows = kernels.normalised(features1(rows), features2(rows))
            for columns in blocks[: i + 1]:
                of_columns = of_rows if columns == rows else kernels.normalised(features1(columns), features2(columns))
                kernels.add_tile(rows, columns, of_rows, of_columns)
                bar.update()
    return kernels.similarities()


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor, layers: list[str]) -> list[Tensor]:
    """What the modules of these names give for a batch of images, in the mode that the model is in.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten())
    >>> [tuple(x.shape) for x in features_of(net, torch.zeros(2, 3, 32, 32), ["1", "2"])]
    [(2, 8, 30, 30), (2, 7200)]
    """
    found: dict[str, Tensor] = {}
    hooks = []
    for name in layers:

        def keep(module: nn.Module, inputs: object, output: Tensor, name: str = name) -> None:
            found[name] = output

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[name] for name in layers]


def _check_names(measure: str, estimator: str) -> None:
    if measure not in MEASURES:
        raise ValueError(f"there is no measure {measure!r}: choose from {', '.join(MEASURES)}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"there is no estimator {estimator!r}: choose from {', '.join(ESTIMATORS)}")


def _check_n_images(n_images: int) -> None:
    if n_images < 4:
        raise ValueError(f"unbiased HSIC, and so CKA, needs 4 images or more, not {n_images}")


def _name(network: int, layer: int) -> str:
    return f"network {network}, layer {layer} (from 0)"


def _as_maps(features: Tensor, layer: str) -> Tensor:
    """(N, C, H, W) of at least single precision, from (N, C), (N, C, P) or (N, C, H, W)."""
    if not 2 <= features.ndim <= 4:
        raise ValueError(f"{layer}: features of shape {tuple(features.shape)} are not (N, C), (N, C, P) or (N, C, H, W)")
    maps = features[(...,) + (None,) * (4 - features.ndim)]
    return maps if maps.dtype == torch.float64 else maps.float()


def _maps_of(features1: list[Tensor], features2: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The layers of both networks as maps (N, C, H, W), all of the same images."""
    maps1, maps2 = (
        [_as_maps(x, _name(k, i)) for i, x in enumerate(features)] for k, features in ((1, features1), (2, features2))
    )
    numbers = {len(maps) for maps in maps1 + maps2}
    if len(numbers) > 1:
        raise ValueError(f"features are of different numbers of images: {', '.join(map(str, sorted(numbers)))}")
    return maps1, maps2


def _check_finite(sums: Tensor, features: Tensor, layer: str) -> None:
    """Raise ValueError unless sums of features are finite, which they are not if a feature is not."""
    if not sums.isfinite().all():
        wrong = features[~features.isfinite()]
        values = ", ".join(sorted({f"{value:g}" for value in wrong.tolist()}))
        which = (
            f"{len(wrong)} of {features.numel()} features are {values}" if values else "features are too large to be squared"
        )
        raise ValueError(f"{layer}: {which}")


# ---- one pair of layers --------------------------------------------------------------------------------------------------


def similarity(
    measure: str,
    features1: Tensor,
    features2: Tensor,
    *,
    channel_axis: int = 1,
    live_only: bool = False,
    estimator: str = "max",
    centered: bool = True,
) -> float:
    """Compare two layers' features of the same N images, (N, C, H, W), (N, C, P) or (N, C), by a measure of MEASURES.

    `live_only`: without dead channels. `estimator` is wreath_cka's, `centered` all CKAs'. Raises ValueError as
    layer_similarities does, and where all channels of a layer are dead.
    """
    if len(features1) != len(features2):
        raise ValueError(f"features are of different numbers of images: {len(features1)}, {len(features2)}")
    for features in (features1, features2):
        if channel_axis in (0, -features.ndim) or not -features.ndim <= channel_axis < features.ndim:
            raise ValueError(
                f"channel_axis is {channel_axis}: features of shape {tuple(features.shape)} have no channels there"
            )
    x, y = features1.movedim(channel_axis, 1), features2.movedim(channel_axis, 1)
    found = layer_similarities(
        measure, lambda part: [x[part]], lambda part: [y[part]], len(x), estimator=estimator, centered=centered, block=TILE
    )
    value = (found.live if live_only else found.published).item()
    if math.isnan(value):
        counts = f"{int(found.dead1)} of {x.shape[1]}, {int(found.dead2)} of {y.shape[1]}"
        raise ValueError(f"nothing to compare: features are constant over images, or dead ({counts} channels)")
    return value


def wreath_procrustes(features1: Tensor, features2: Tensor, *, channel_axis: int = 1, live_only: bool = False) -> float:
    """1 - Procrustes distance up to permutations and positive scales of channels. For shapes and errors see `similarity`.

    d^2 = (|H1|^2 + |H2|^2 - 2 sum C[matching]) / 4c with channels of unit norm, not centred, and C their inner products; the
    narrower layer is padded with zero channels to c. After a ReLU no value is below 1 - sqrt(1/2) = 0.293, and a pair of
    dead channels counts as a perfect match.
    """
    return similarity("wreath_procrustes", features1, features2, channel_axis=channel_axis, live_only=live_only)


def ortho_procrustes(features1: Tensor, features2: Tensor, *, channel_axis: int = 1, live_only: bool = False) -> float:
    """1 - Procrustes distance up to rotations of channels. For shapes and errors see `similarity`.

    d^2 = (2 - 2 |C|_nuclear) / 4 with the layer as a whole of unit norm, not centred. Dead channels change nothing.
    """
    return similarity("ortho_procrustes", features1, features2, channel_axis=channel_axis, live_only=live_only)


def wreath_cka(
    features1: Tensor,
    features2: Tensor,
    *,
    estimator: str = "max",
    centered: bool = True,
    channel_axis: int = 1,
    live_only: bool = False,
) -> float:
    """CKA up to permutations and positive scales of channels. For shapes and errors see `similarity`.

    Channels have unit norm; the kernel of two images is the maximum, or lower median, over channels of inner products over
    positions. Kernels are compared by unbiased HSIC.
    """
    return similarity(
        "wreath_cka",
        features1,
        features2,
        estimator=estimator,
        centered=centered,
        channel_axis=channel_axis,
        live_only=live_only,
    )


def ortho_cka(
    features1: Tensor, features2: Tensor, *, centered: bool = True, channel_axis: int = 1, live_only: bool = False
) -> float:
    """As published: CKA of the sum over channels of unit norm. Rotations of channels change it; linear_cka they do not."""
    return similarity("ortho_cka", features1, features2, centered=centered, channel_axis=channel_axis, live_only=live_only)


def linear_cka(features1: Tensor, features2: Tensor, *, channel_axis: int = 1) -> float:
    """CKA of inner products of images (Kornblith et al. 2019), by unbiased HSIC: rotations of channels do not change it."""
    return similarity("linear_cka", features1, features2, channel_axis=channel_axis)


# ---- Procrustes ----------------------------------------------------------------------------------------------------------


class ChannelProducts:
    """Inner products, over images and positions, of each channel of network 1 with each of network 2, summed up over batches.

    Of maps of different size the smaller is enlarged by repetition, as published. To sum up, within the larger one, what
    a value of the smaller one is repeated for comes to the same, with smaller products.
    """

    def __init__(self) -> None:
        self.products: dict[tuple[int, int], Tensor] = {}  # (C1, C2) of a pair of layers
        self.squares: tuple[list[Tensor], list[Tensor]] = ([], [])  # (C) of a layer of network 1, of network 2

    @torch.no_grad()
    def add(self, features1: list[Tensor], features2: list[Tensor]) -> None:
        """Take in a batch of images: all layers of network 1, and of network 2. For errors see layer_similarities."""
        maps1, maps2 = _maps_of(features1, features2)
        for k, (sums, maps) in enumerate(zip(self.squares, (maps1, maps2), strict=True), start=1):
            squares = [torch.linalg.vector_norm(x, dim=(2, 3)).double().square().sum(0) for x in maps]
            for i, (x, square) in enumerate(zip(maps, squares, strict=True)):
                _check_finite(square, x, _name(k, i))
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


# ---- CKA -----------------------------------------------------------------------------------------------------------------


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
        _check_finite(deviations, maps, layer)
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
    """

    def __init__(self, measure: str, n_images: int, *, estimator: str = "max", centered: bool = True):
        _check_names(measure, estimator)
        _check_n_images(n_images)
        self.over = estimator if measure == "wreath_cka" else "sum"
        self.one_by_one = measure != "linear_cka"
        self.n_images, self.centered = n_images, centered
        self.moments: tuple[list[Moments], list[Moments]] = ([], [])
        self.published, self.live = KernelSums(n_images), KernelSums(n_images)

    @torch.no_grad()
    def add_moments(self, features1: list[Tensor], features2: list[Tensor]) -> None:
        """First pass: a batch of images."""
        for k, (moments, maps) in enumerate(zip(self.moments, _maps_of(features1, features2), strict=True), start=1):
            if not moments:
                moments += [Moments(x.shape[1], x.device) for x in maps]
            for i, (of_layer, x) in enumerate(zip(moments, maps, strict=True)):
                of_layer.add(x, _name(k, i))

    @torch.no_grad()
    def normalised(self, features1: list[Tensor], features2: list[Tensor]) -> list[Tensor]:
        """A block of images as add_tile takes it: layers (B, C, P) of both networks, in one list, as copies."""
        layers = zip(self.moments[0] + self.moments[1], features1 + features2, strict=True)
        return [self._normalised(moments, x) for moments, x in layers]

    def _normalised(self, moments: Moments, features: Tensor) -> Tensor:
        squares = moments.squares(self.centered)
        scale = torch.where(squares > 0, (squares if self.one_by_one else squares.sum()).rsqrt(), 0)
        x = _as_maps(features, "features").flatten(2).contiguous()  # a product per channel needs its rows
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
