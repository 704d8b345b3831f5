"""Similarity of the layers of two networks, up to symmetries of their channels (Godfrey et al. 2022, arXiv 2205.14258).

    wreath_procrustes, wreath_cka    up to permutations of channels and positive scales: the symmetries of ReLU
    ortho_procrustes, linear_cka     up to rotations of channels
    ortho_cka                        as published: linear CKA of channels that were scaled one by one, which rotations do change

    wreath_cka(x, y)                                                  # one layer each, features of all images
    layer_similarities("wreath_cka", features1, features2, 10_000)    # all pairs of layers, from functions of slices of images

Features are (N, C, H, W), (N, C, P) or (N, C): N images, C channels. They are read, not changed. Every measure is 1 for a layer
with itself. A channel is dead if it is zero for all images and positions or, where channels are centred, constant. Published
values include dead channels; each comes with a second one, of live channels alone. Sums over images are float64: the
original's, in float32, are off by 1e-3 for 1000 maps of 64 channels and 32x32 positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from tqdm import tqdm

from common.precision import strict_fp32
from common.symmetry.cka import Kernels
from common.symmetry.measures import GPU_BYTES, Similarities, check_names
from common.symmetry.procrustes import ChannelProducts

IMAGES, MAX_BYTES = 512, 2**23  # of a layer at a time on a CPU: so many images, or more of small ones, for large products

# of a network: the features of each of its layers, (B, C, H, W), for the images of a slice
Features = Callable[[slice], list[Tensor]]


# ---- all pairs of layers of two networks ---------------------------------------------------------------------------------


@strict_fp32()
def layer_similarities(
    measure: str,
    features1: Features,
    features2: Features,
    n_images: int,
    *,
    estimator: str = "max",
    centered: bool = True,
    block: int = 400,
    column_block: int | None = None,
    progress: bool | None = False,
) -> Similarities:
    """Compare all layers of a network with all of another.

    `estimator` is for wreath_cka, `centered` for all CKAs. `progress` shows bars, None only on a terminal.
    `features1` and `features2` are called with slices of images: by Procrustes once for each of n blocks, by CKA about n / 2
    times, which compares each block with all earlier images, `column_block` (as `block`) at a time. At most three blocks of
    features of all layers are in memory (Procrustes: one, and its shrunk copies), with sums:
    (C1, C2) for each pair of layers in Procrustes, (N) for each layer in CKA. No kernel (N, N) is held.
    Raises ValueError for an unknown measure or estimator, features that are not finite, numbers of images that differ,
    maps that no whole factor enlarges to each other (Procrustes), and fewer than 4 images (CKA).

    >>> import torch
    >>> x, y = torch.rand(50, 4, 8, 8), torch.rand(50, 6, 4, 4)
    >>> features = lambda part: [x[part], y[part]]
    >>> similarities = layer_similarities("wreath_cka", features, features, 50, block=20)
    >>> similarities.published.shape, [round(value, 6) for value in similarities.published.diagonal().tolist()]
    (torch.Size([2, 2]), [1.0, 1.0])
    """
    check_names(measure, estimator)
    if n_images < 1:
        raise ValueError(f"there must be images to compare, not {n_images}")
    if block < 1:
        raise ValueError(f"block is {block}: at least 1 image")
    blocks = [slice(start, min(start + block, n_images)) for start in range(0, n_images, block)]
    disable = None if progress is None else not progress
    if measure.endswith("procrustes"):
        products = ChannelProducts()
        for part in tqdm(blocks, measure, disable=disable, leave=False):
            products.add(features1(part), features2(part))
        return products.similarities(measure)

    kernels = Kernels(measure, n_images, estimator=estimator, centered=centered)
    for part in tqdm(blocks, f"{measure}, means", disable=disable, leave=False):
        kernels.add_moments(features1(part), features2(part))
    step = column_block or block
    n_tiles = sum(1 + math.ceil(rows.start / step) for rows in blocks)
    with tqdm(None, measure, n_tiles, disable=disable, leave=False) as bar:
        for rows in blocks:
            row_features = kernels.normalised(features1(rows), features2(rows))
            kernels.add_tile(rows, rows, row_features, row_features)
            bar.update()
            for start in range(0, rows.start, step):
                columns = slice(start, min(start + step, rows.start))
                kernels.add_tile(rows, columns, row_features, kernels.normalised(features1(columns), features2(columns)))
                bar.update()
    return kernels.similarities()


# ---- one pair of layers --------------------------------------------------------------------------------------------------


@strict_fp32()
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
    """Compare the features of two layers for the same N images, (N, C, H, W), (N, C, P) or (N, C), by one of MEASURES.

    `live_only`: without dead channels. `estimator` is wreath_cka's, `centered` all CKAs'. Raises ValueError as
    layer_similarities does, and where all channels of a layer are dead.

    >>> import torch
    >>> x = torch.rand(20, 4, 6, 6)
    >>> round(similarity("linear_cka", x, -2 * x), 6)
    1.0
    """
    if len(features1) != len(features2):
        raise ValueError(f"features are of different numbers of images: {len(features1)}, {len(features2)}")
    for features in (features1, features2):
        if channel_axis in (0, -features.ndim) or not -features.ndim <= channel_axis < features.ndim:
            raise ValueError(
                f"channel_axis is {channel_axis}: features of shape {tuple(features.shape)} have no channels there"
            )
    x, y = features1.movedim(channel_axis, 1), features2.movedim(channel_axis, 1)
    n_bytes = MAX_BYTES if x.device.type == "cpu" else GPU_BYTES
    block = max(IMAGES, n_bytes // max(1, 4 * x[:1].numel(), 4 * y[:1].numel()))
    similarities = layer_similarities(
        measure,
        lambda part: [x[part]],
        lambda part: [y[part]],
        len(x),
        estimator=estimator,
        centered=centered,
        block=block,
        column_block=IMAGES // 2 if x.device.type == "cpu" else None,
    )
    value = (similarities.live if live_only else similarities.published).item()
    if math.isnan(value):
        counts = f"{int(similarities.dead1)} of {x.shape[1]}, {int(similarities.dead2)} of {y.shape[1]}"
        raise ValueError(f"nothing to compare: features are constant over images, or dead ({counts} channels)")
    return value


def wreath_procrustes(features1: Tensor, features2: Tensor, *, channel_axis: int = 1, live_only: bool = False) -> float:
    """1 - Procrustes distance up to permutations and positive scales of channels. For shapes and errors see `similarity`.

    d^2 = (|H1|^2 + |H2|^2 - 2 sum C[matching]) / 4c with channels of unit norm, not centred, and C their inner products; the
    narrower layer is padded with zero channels to c. After a ReLU no value is below 1 - sqrt(1/2) = 0.293, and a pair of
    dead channels counts as a perfect match.

    >>> import torch
    >>> x = torch.rand(20, 4, 6, 6)
    >>> round(wreath_procrustes(x, x[:, [2, 0, 3, 1]] * torch.tensor([1, 2, 3, 4])[:, None, None]), 3)
    1.0
    """
    return similarity("wreath_procrustes", features1, features2, channel_axis=channel_axis, live_only=live_only)


def ortho_procrustes(features1: Tensor, features2: Tensor, *, channel_axis: int = 1, live_only: bool = False) -> float:
    """1 - Procrustes distance up to rotations of channels. For shapes and errors see `similarity`.

    d^2 = (2 - 2 |C|_nuclear) / 4 with the layer as a whole of unit norm, not centred. Dead channels change nothing.

    >>> import torch
    >>> x, rotation = torch.rand(20, 4, 6, 6), torch.linalg.qr(torch.randn(4, 4)).Q
    >>> round(ortho_procrustes(x, torch.einsum("dc,nchw->ndhw", rotation, x)), 3)
    1.0
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

    >>> import torch
    >>> x = torch.rand(20, 4, 6, 6)
    >>> round(wreath_cka(x, x[:, [2, 0, 3, 1]] * torch.tensor([1, 2, 3, 4])[:, None, None]), 4)
    1.0
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
    """As published: CKA of the sum over channels of unit norm. Rotations of channels change it (linear_cka they leave alone).

    >>> import torch
    >>> x = torch.rand(20, 4, 6, 6)
    >>> round(ortho_cka(x, x[:, [2, 0, 3, 1]] * torch.tensor([1, 2, 3, 4])[:, None, None]), 4)
    1.0
    """
    return similarity("ortho_cka", features1, features2, centered=centered, channel_axis=channel_axis, live_only=live_only)


def linear_cka(features1: Tensor, features2: Tensor, *, channel_axis: int = 1) -> float:
    """CKA of inner products of images (Kornblith et al. 2019), by unbiased HSIC. Rotations of channels do not change it.

    >>> import torch
    >>> x, rotation = torch.rand(20, 4, 6, 6), torch.linalg.qr(torch.randn(4, 4)).Q
    >>> round(linear_cka(x, torch.einsum("dc,nchw->ndhw", rotation, x)), 4)
    1.0
    """
    return similarity("linear_cka", features1, features2, channel_axis=channel_axis)
