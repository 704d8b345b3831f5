"""ESSL: SimCLR, with a third input whose transformation is predicted (Dangovski et al., ICLR 2022, arXiv 2111.00899).

    loss = NT-Xent + lambda * (cross entropy of a class, or squared error of a value)    (equation 2)

The third input has half the side. For CLASSES it comes in all variants, for VALUE_CODES it is transformed by a random value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import parallel
from common.models.resnet import CifarResNet
from common.ssl import models, steps
from common.ssl import transformations as tf
from common.ssl.simclr import nt_xent
from common.ssl.steps import Batch
from common.ssl.views import COLOURS, STRENGTHS, UNCHANGED, Stack

CLASSES = {"ron": 4, "fli": 2, "flv": 2, "gra": 2}  # number of variants
VALUE_CODES = ("rot", *COLOURS)
ESSL_CODES = (*CLASSES, *VALUE_CODES)
MAX_DEGREES = 90.0
METRICS = ("loss_mean", "nce_loss_mean", "essl_loss_mean", "essl_top_1_mean", "essl_top_5_mean")  # the last two of classes


def check_code(code: str) -> None:
    """Raises ValueError for a code that ESSL does not predict."""
    if code not in ESSL_CODES:
        raise ValueError(f"{code} is nothing that ESSL can predict: choose from {' '.join(ESSL_CODES)}")


def draw_values(code: str, n: int, generator: torch.Generator) -> Tensor:
    """Degrees, or colour factors, for n images: (n). Zeros, undrawn, for codes with classes."""
    if code not in VALUE_CODES:
        return torch.zeros(n)
    signed = 2 * torch.rand(n, generator=generator) - 1
    if code == "rot":
        return MAX_DEGREES * signed
    colour = COLOURS.index(code)
    return UNCHANGED[colour] + STRENGTHS[colour] * signed


def make_task(code: str, images: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, H) in [0, 1], transformed, and what is to be predicted of them.

    Classes: all variants of every image, one after the other (4B for quarter turns, else 2B), and their labels. Values: each
    image once, and degrees / 180 or the colour factor (B, 1). Raises ValueError for a code that ESSL does not predict, and for
    another number of values than of images.
    """
    check_code(code)
    if len(values) != len(images):
        raise ValueError(f"{len(values)} values for {len(images)} images: each needs one")
    match code:
        case "rot":
            return tf.rotate(images, values), values[:, None] / 180
        case "bri" | "con" | "sat" | "hue":
            colour = COLOURS.index(code)
            factors = UNCHANGED.to(images.device, non_blocking=True).repeat(len(images), 1)
            factors[:, colour] = values
            return tf.jitter(images, factors, [colour]), values[:, None]
        case "ron":
            variants = [torch.rot90(images, turns, (2, 3)) for turns in range(4)]
        case "fli":
            variants = [images, images.flip(3)]
        case "flv":
            variants = [images, images.flip(2)]
        case _:  # "gra"
            variants = [images, tf.grey(images).expand_as(images)]
    labels = torch.arange(len(variants), device=images.device).repeat_interleave(len(images))
    return torch.cat(variants), labels


def essl_loss(
    embedding1: Tensor, embedding2: Tensor, logits: Tensor, labels: Tensor, *, code: str, weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """NT-Xent of embeddings (B, D), plus `weight` times the loss of predicting the transformation, and METRICS.

    Values (N, 1) are compared with labels (N, 1) by squared error, logits (N, classes) with labels (N) by cross entropy.
    Raises ValueError for other shapes or classes, and for a code that ESSL does not predict.
    """
    check_code(code)
    expected = (len(logits), 1) if code in VALUE_CODES else (len(logits),)
    columns = CLASSES.get(code, 1)
    if tuple(logits.shape) != (len(logits), columns) or tuple(labels.shape) != expected:
        raise ValueError(
            f"predictions {tuple(logits.shape)} and labels {tuple(labels.shape)} of {code!r}: they should be "
            f"(N, {columns}) and {'(N)' if code in CLASSES else '(N, 1)'}"
        )
    if code in CLASSES and labels.is_floating_point():
        raise ValueError(f"labels of {code!r} are {labels.dtype}: integers are needed")
    if code in CLASSES and labels.device.type == "cpu" and not 0 <= labels.min() <= labels.max() < columns:
        raise ValueError(f"labels of {code!r} are from {labels.min()} to {labels.max()}: they should be in [0, {columns})")
    nce = nt_xent(embedding1, embedding2).mean()
    prediction = F.cross_entropy(logits, labels) if code in CLASSES else F.mse_loss(logits, labels)
    loss = nce + weight * prediction
    accuracy = [steps.top_k(logits, labels, k) for k in (1, 5)] if code in CLASSES else []
    return loss, dict(zip(METRICS, (loss, nce, prediction, *accuracy), strict=False))


def essl_predictor(features: int, n_outputs: int) -> nn.Sequential:
    """ESSL's predictor of the transformation: two hidden layers with layer norm."""
    hidden = models.HIDDEN
    return nn.Sequential(
        nn.Linear(features, hidden), nn.LayerNorm(hidden), nn.ReLU(),
        nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU(),
        nn.Linear(hidden, n_outputs),
    )  # fmt: skip


@dataclass(frozen=True)
class ESSLBatch(Batch):
    """Two views, then the third input, and what is to be predicted of it."""

    task_labels: Tensor


class ESSL(nn.Module):
    """An encoder, a projection head, a predictor, and a linear classifier trained at the same time (common/ssl/steps.py).

    `codes` are the transformations of all views in their order (common/ssl/views.py), `size` is a view's side in pixels,
    `predicted` is the code of the transformation that is predicted. Raises ValueError if that is none of ESSL_CODES.
    """

    def __init__(
        self, encoder: CifarResNet, codes: Sequence[str], size: int, *, n_classes: int, predicted: str, weight: float = 0.4
    ):
        super().__init__()
        check_code(predicted)
        self.stack, self.half_stack = Stack(codes, size), Stack(codes, size // 2, resized=True)
        self.predicted, self.weight = predicted, weight
        self.base_network = encoder
        self.head = models.projection_head(encoder.n_features)
        self.heads = steps.linear_head(encoder.n_features, n_classes)
        self.predictor_essl = essl_predictor(encoder.n_features, CLASSES.get(predicted, 1))

    def make_batch(
        self, images: Tensor, labels: Tensor, indices: Tensor, generator: torch.Generator, *, training: bool
    ) -> ESSLBatch:
        """Two augmented views of the images (N, C, H, H) at `indices` (n), uint8, and the third input.

        In a test, view 1 is the centre as it is, and the third input is made of the central quarter.
        """
        pixels, n = steps.own_pixels(images, indices), len(indices)
        view1, _ = steps.make_view(self.stack, pixels, n, generator, clean=not training)
        view2, _ = steps.make_view(self.stack, pixels, n, generator)
        third, _ = steps.make_view(self.half_stack, pixels, n, generator, clean=not training)
        values = draw_values(self.predicted, n, generator)[parallel.shard(n)].to(images.device, non_blocking=True)
        # back to [0, 1], as published: dark pixels keep the rounding of views, without which the last bits would be others
        task, task_labels = make_task(self.predicted, third + 0.5, values)
        return ESSLBatch((view1, view2, task - 0.5), labels[indices], task_labels)

    def forward(self, views: Sequence[Tensor], *, jointly: bool = False) -> dict[str, Tensor]:
        """Embeddings (B, 128) of two views (B, C, H, H), class logits (B, classes) of the first, predictions of the third."""
        return self.outputs(*steps.encode_views(self.base_network, views, jointly=jointly))

    def outputs(self, z1: Tensor, z2: Tensor, z3: Tensor) -> dict[str, Tensor]:
        """The same from representations (B, F)."""
        return {
            "essl_logits": self.predictor_essl(z3),
            "embedding1": self.head(z1),
            "embedding2": self.head(z2),
            "class_logits": self.heads["linear_classifier"](z1.detach()),
        }

    def loss(self, out: dict[str, Tensor], batch: ESSLBatch, *, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the whole batch, and its metrics under their logged names."""
        n = len(batch.labels)
        out, task_labels = steps.gather_outputs(out, n), steps.gather_rows(batch.task_labels, n)
        loss, metrics = essl_loss(
            out["embedding1"], out["embedding2"], out["essl_logits"], task_labels, code=self.predicted, weight=self.weight
        )
        return steps.add_linear_head(loss, metrics, out["class_logits"], batch.labels)

    def baselines(self, n: int) -> dict[str, float | None]:
        """The metrics of `loss` in batches of n images, each with its value at chance, or None."""
        n_classes = CLASSES.get(self.predicted)
        accuracy = [100 * min(1, k / n_classes) for k in (1, 5)] if n_classes else []
        chance = dict(zip(METRICS, (None, steps.chance_of_nt_xent(n), None, *accuracy), strict=False))
        return steps.logged_baselines(chance, self.heads)
