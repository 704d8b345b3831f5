"""The common part of all measures of similarity: names, features of layers as maps of channels, the result.

Features are (N, C, H, W), (N, C, P) or (N, C): N images, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GPU_BYTES = 2**28  # of products at a time on a GPU: few large steps
MEASURES = ("wreath_procrustes", "wreath_cka", "ortho_procrustes", "ortho_cka", "linear_cka")
ESTIMATORS = ("max", "median")


@dataclass(frozen=True)
class Similarities:
    """Similarities between L1 layers of network 1 and L2 layers of network 2."""

    published: Tensor  # (L1, L2), float64; NaN for a layer whose channels are all dead
    live: Tensor  # (L1, L2), float64: without dead channels
    dead1: Tensor  # (L1), int64: the number of dead channels
    dead2: Tensor  # (L2)


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor, layers: list[str]) -> list[Tensor]:
    """Outputs of the modules with these names for a batch of images (B, C, H, W), in the model's current mode.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten())
    >>> [tuple(x.shape) for x in features_of(net, torch.zeros(2, 3, 32, 32), ["1", "2"])]
    [(2, 8, 30, 30), (2, 7200)]
    """
    outputs: dict[str, Tensor] = {}
    hooks = []
    for name in layers:

        def keep(module: nn.Module, inputs: object, output: Tensor, name: str = name) -> None:
            outputs[name] = output

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [outputs[name] for name in layers]


def check_names(measure: str, estimator: str) -> None:
    """Raises ValueError for a name that is not in MEASURES or ESTIMATORS."""
    if measure not in MEASURES:
        raise ValueError(f"there is no measure {measure!r}: choose from {', '.join(MEASURES)}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"there is no estimator {estimator!r}: choose from {', '.join(ESTIMATORS)}")


def layer_name(network: int, layer: int) -> str:
    """The name of a layer in errors; both numbers as users count."""
    return f"network {network}, layer {layer} (from 0)"


def as_maps(features: Tensor, layer: str) -> Tensor:
    """(N, C, H, W) of at least single precision, from (N, C), (N, C, P) or (N, C, H, W)."""
    if not 2 <= features.ndim <= 4:
        raise ValueError(f"{layer}: features of shape {tuple(features.shape)} are not (N, C), (N, C, P) or (N, C, H, W)")
    maps = features[(...,) + (None,) * (4 - features.ndim)]
    return maps if maps.dtype == torch.float64 else maps.float()


def maps_of(features1: list[Tensor], features2: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The layers of both networks as maps (N, C, H, W), all of the same images."""
    maps1, maps2 = (
        [as_maps(x, layer_name(k, i)) for i, x in enumerate(features)] for k, features in ((1, features1), (2, features2))
    )
    numbers = {len(maps) for maps in maps1 + maps2}
    if len(numbers) > 1:
        raise ValueError(f"features are of different numbers of images: {', '.join(map(str, sorted(numbers)))}")
    return maps1, maps2


def image_norms(maps: Tensor) -> Tensor:
    """The norm over positions of each image and channel: (B, C, H, W) -> (B, C), float64."""
    return torch.linalg.vector_norm(maps, dim=(2, 3)).double()


def check_finite(sums: Sequence[list[Tensor]], networks: Sequence[list[Tensor]]) -> None:
    """Raises ValueError unless sums (C) over the features of all layers are finite: a feature that is not shows in them.

    Both are of network 1, then of network 2.
    """
    if torch.cat([sum for layers in sums for sum in layers]).isfinite().all():  # a single look: a GPU's host waits for it
        return
    for network, (layers, features) in enumerate(zip(sums, networks, strict=True), start=1):
        for i, (sum, x) in enumerate(zip(layers, features, strict=True)):
            if not sum.isfinite().all():
                wrong = x[~x.isfinite()]
                values = ", ".join(sorted({f"{value:g}" for value in wrong.tolist()}))
                what = (
                    f"{len(wrong)} of {x.numel()} features are {values}" if values else "features are too large to be squared"
                )
                raise ValueError(f"{layer_name(network, i)}: {what}")
