"""DUET: representations with a part for the content and one for the transformation (Suau et al., ICML 2023, arXiv 2306.16058).

A representation z (B, F) is read as a matrix (B, G, C). Its sum over G is the content, which NT-Xent makes alike for two views
of an image, as in SimCLR. Its mean over C, through a softmax, is the group marginal: a distribution over G bins of one
transformation's parameter, the angle of a rotation for example. It is fitted to a target, a density around the true parameter:

    loss = NT-Xent(content) + lambda * JSD(group marginal, target)    (equations 4 to 6)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.models.resnet import CifarResNet
from common.ssl import steps
from common.ssl.models import projection_head
from common.ssl.simclr import nt_xent
from common.ssl.steps import Batch
from common.ssl.views import PARAMETRISED, Stack

METRICS = ("loss_mean", "nce_loss_mean", "group_loss_mean", "group_0_loss_mean")
POINTS = 100  # of a target's density in a bin
SIGMA, CONCENTRATION = 0.2, 3.0  # published: sigma of the Gaussian, kappa of von Mises


def structured(z: Tensor, bins: int) -> Tensor:
    """Representations (B, F) as matrices (B, G, C), G = bins."""
    return z.unflatten(1, (bins, -1))


def content(z: Tensor, bins: int) -> Tensor:
    """The content, what an image shows: (B, F) -> (B, C)."""
    return structured(z, bins).sum(1)


def group_marginal(z: Tensor, bins: int) -> Tensor:
    """Group marginal of representations (B, F), a distribution over the bins: (B, G)."""
    return structured(z, bins).mean(-1).softmax(-1)


def gaussian(parameters: Tensor, bins: int, sigma: float = SIGMA) -> Tensor:
    """Target: Gaussian around parameters in [0, 1], cut off at the ends: (...) -> (..., bins), with sum 1."""
    points = torch.linspace(0, 1, POINTS * bins, device=parameters.device)
    return _sum_in_bins(-0.5 * ((points - parameters[..., None]) / sigma).square(), bins)


def von_mises(parameters: Tensor, bins: int, concentration: float = CONCENTRATION) -> Tensor:
    """Target: von Mises distribution around the angle 2 pi times parameters in [0, 1]: (...) -> (..., bins), with sum 1."""
    points = torch.linspace(0, 2 * math.pi, POINTS * bins, device=parameters.device)
    return _sum_in_bins(concentration * torch.cos(points - 2 * math.pi * parameters[..., None]), bins)


def _sum_in_bins(log_density: Tensor, bins: int) -> Tensor:
    """Each bin's sum over evenly spaced points, both ends included, divided by the sum of all: (..., 100 G) -> (..., G)."""
    return log_density.softmax(-1).unflatten(-1, (bins, POINTS)).sum(-1)


TARGETS = {"ga": gaussian, "vm": von_mises}


def jensen_shannon(logits: Tensor, targets: Tensor) -> Tensor:
    """Divergence (nats) between softmax(logits) and targets (..., G), mean over all rows.

    Everything stays in logarithms, so neither an empty bin nor a large gap of logits gives NaN.
    """
    log_p, log_q = logits.log_softmax(-1), targets.log()
    log_mean = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    kl_p = (log_p.exp() * (log_p - log_mean)).sum(-1)
    kl_q = (torch.xlogy(targets, targets) - targets * log_mean).sum(-1)
    return 0.5 * (kl_p + kl_q).mean()


def duet_loss(
    embedding1: Tensor,
    embedding2: Tensor,
    structured1: Tensor,
    structured2: Tensor,
    parameter1: Tensor,
    parameter2: Tensor,
    *,
    target: str,
    weight: float,
    training: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """NT-Xent of the content's embeddings (B, D), plus `weight` times the divergence of group marginals from their targets.

    Representations are given as matrices (B, G, C), the transformation's parameters as (B, 1). In training both views count,
    otherwise (when view 1 is not transformed) the second alone. Raises ValueError for other shapes.
    """
    shapes = [tuple(tensor.shape) for tensor in (structured1, structured2, parameter1, parameter2)]
    B, *matrix = shapes[0]
    if target not in TARGETS:
        raise ValueError(f"there is no target {target!r}: choose from {' '.join(TARGETS)}")
    n_embeddings = len(embedding1), len(embedding2)
    if len(matrix) != 2 or shapes != [(B, *matrix), (B, *matrix), (B, 1), (B, 1)] or n_embeddings != (B, B):
        raise ValueError(
            f"representations {shapes[0]}, {shapes[1]} and parameters {shapes[2]}, {shapes[3]} of {len(embedding1)} and "
            f"{len(embedding2)} images: they should be (B, G, C) and (B, 1)"
        )
    nce = nt_xent(embedding1, embedding2).mean()
    views = [(structured1, parameter1), (structured2, parameter2)] if training else [(structured2, parameter2)]
    logits = torch.cat([matrix for matrix, _ in views]).mean(-1)  # (2B, G), in tests (B, G)
    targets = TARGETS[target](torch.cat([parameter for _, parameter in views])[:, 0], logits.shape[1])
    divergence = jensen_shannon(logits, targets)
    loss = nce + weight * divergence
    return loss, dict(zip(METRICS, (loss, nce, weight * divergence, divergence), strict=True))


def check_structure(structure: str, codes: Sequence[str]) -> None:
    """Raises ValueError if `structure` has no parameter, or is not applied by `codes`."""
    if structure not in PARAMETRISED:
        raise ValueError(f"{structure} has no parameter to structure by: choose from {' '.join(PARAMETRISED)}")
    if not Stack(codes, size=1).applies(structure):
        raise ValueError(
            f"{structure} is not one of the transformations {' '.join(codes)}: DUET can only learn what is applied"
        )


@dataclass(frozen=True)
class DUETBatch(Batch):
    """Two views, and their parameters of the structure (n, 1). In tests view 1 is not transformed: its parameter is unused."""

    parameter1: Tensor
    parameter2: Tensor


class DUET(nn.Module):
    """An encoder, a projection head for the content, and a linear classifier trained at the same time (common/ssl/steps.py).

    `codes` are the transformations of both views in their order (common/ssl/views.py), `size` is a view's side in pixels,
    `structure` is the code whose parameter is learned, over `bins` bins. Raises ValueError if it has none, if the views are not
    transformed by it, or if the features do not divide into the bins.
    """

    def __init__(
        self,
        encoder: CifarResNet,
        codes: Sequence[str],
        size: int,
        *,
        n_classes: int,
        structure: str,
        bins: int = 8,
        target: str = "ga",
        weight: float = 10.0,
    ):
        super().__init__()
        features = encoder.n_features
        self.stack = Stack(codes, size)
        check_structure(structure, codes)
        if bins < 1 or features % bins:
            raise ValueError(f"{features} features do not divide into {bins} bins")
        if target not in TARGETS:
            raise ValueError(f"there is no target {target!r}: choose from {' '.join(TARGETS)}")
        self.structure, self.bins, self.target, self.weight = structure, bins, target, weight
        self.base_network = encoder
        self.head = projection_head(features // bins)
        self.heads = steps.linear_head(features, n_classes)

    def make_batch(
        self, images: Tensor, labels: Tensor, indices: Tensor, generator: torch.Generator, *, training: bool
    ) -> DUETBatch:
        """Two augmented views of the images (N, C, H, H) at `indices` (n), uint8; in a test, view 1 is the centre as it is."""
        pixels, n = steps.own_pixels(images, indices), len(indices)
        view1, draw1 = steps.make_view(self.stack, pixels, n, generator, clean=not training)
        view2, draw2 = steps.make_view(self.stack, pixels, n, generator)
        parameter1, parameter2 = (
            self.stack.parameter(self.structure, draw).to(images.device, non_blocking=True) for draw in (draw1, draw2)
        )
        return DUETBatch((view1, view2), labels[indices], parameter1, parameter2)

    def forward(self, views: Sequence[Tensor], *, jointly: bool = False) -> dict[str, Tensor]:
        """Representations (B, F) and embeddings (B, 128) of two views (B, C, H, H), class logits (B, classes) of the first."""
        return self.outputs(*steps.encode_views(self.base_network, views, jointly=jointly))

    def outputs(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """The same from representations (B, F)."""
        return {
            "z1": z1,
            "z2": z2,
            "embedding1": self.head(content(z1, self.bins)),
            "embedding2": self.head(content(z2, self.bins)),
            "class_logits": self.heads["linear_classifier"](z1.detach()),
        }

    def loss(self, out: dict[str, Tensor], batch: DUETBatch, *, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the whole batch, and its metrics under their logged names."""
        out = steps.gather_outputs(out, len(batch.labels))
        loss, metrics = duet_loss(
            out["embedding1"], out["embedding2"], structured(out["z1"], self.bins), structured(out["z2"], self.bins),
            batch.parameter1, batch.parameter2, target=self.target, weight=self.weight, training=training,
        )  # fmt: skip
        return steps.add_linear_head(loss, metrics, out["class_logits"], batch.labels)

    def baselines(self, n: int) -> dict[str, float | None]:
        """The metrics of `loss` in batches of n images, each with its value at chance, or None."""
        chance = dict(zip(METRICS, (None, steps.chance_of_nt_xent(n), None, None), strict=True))
        return steps.logged_baselines(chance, self.heads)
