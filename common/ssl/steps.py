"""Parts of a training step that DUET, SimCLR and ESSL share: views of a batch, passes through the encoder, the linear head.

Each method is a module with the same five methods:

    batch = model.make_batch(images, labels, indices, generator, training=True)
    loss, metrics = model.loss(model(batch.views), batch, training=True)
    chance = model.baselines(len(indices))  # of the same metrics

(the fifth, `outputs`, is what `forward` does after the encoder). With several processes a batch holds the views of a process's
own rows, and the loss is that of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import parallel
from common.ssl.views import Draw, Stack, clean_view

HEAD_METRICS = ("loss_mean", "top_1_mean", "top_5_mean")
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Views of this process's rows, each (B, C, H, H) around 0, and the labels (n) of all rows."""

    views: Sequence[Tensor]
    labels: Tensor


def as_floats(images: Tensor) -> Tensor:
    """uint8 images as numbers in [0, 1]."""
    return images.float() / 255


def own_pixels(images: Tensor, indices: Tensor) -> Tensor:
    """This process's rows of a batch of uint8 images (N, C, H, H), as numbers in [0, 1]: (B, C, H, H)."""
    return as_floats(images[indices[parallel.shard(len(indices))]])


def make_view(stack: Stack, pixels: Tensor, n: int, generator: torch.Generator, *, clean: bool = False) -> tuple[Tensor, Draw]:
    """A view of this process's rows, and the values that were drawn for all n rows, whatever the number of processes.

    A `clean` view, for tests, is the centre as it is.
    """
    draw = stack.draw(n, pixels.shape[3], generator)
    if clean:
        return clean_view(pixels, stack.size), draw
    return stack(pixels, draw[parallel.shard(n)].to(pixels.device)), draw


def encode_views(encoder: nn.Module, views: Sequence[Tensor], *, jointly: bool = False) -> list[Tensor]:
    """Representations (B, F) of each view, in passes of their own, each with its own batch statistics, as published.

    `jointly` takes the first two views through the encoder in one pass, with common batch statistics.
    """
    if jointly:
        return [*encoder(torch.cat(list(views[:2]))).chunk(2), *(encoder(view) for view in views[2:])]
    return [encoder(view) for view in views]


def gather_outputs(out: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
    """Outputs for all n images of a batch, from those of each process's rows."""
    return {name: gather_rows(rows, n) for name, rows in out.items()}


def gather_rows(own: Tensor, n: int) -> Tensor:
    """All processes' rows of a batch of n images, where each image has one row or several."""
    shard = parallel.shard(n)
    return parallel.gather(own, n, len(own) // (shard.stop - shard.start))


# ---- the linear classifier that is trained at the same time, on representations without gradient --------------------------


def linear_head(features: int, n_classes: int) -> nn.ModuleDict:
    """The classifier, under its published name."""
    return nn.ModuleDict({"linear_classifier": nn.Linear(features, n_classes)})


def top_k(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Percent of rows whose label is among the k largest logits."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(1).float().mean()


def classification_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of a linear classifier (B, classes), and HEAD_METRICS: its top-1 and top-5 accuracy in percent."""
    loss = F.cross_entropy(logits, labels)
    return loss, dict(zip(HEAD_METRICS, (loss, top_k(logits, labels, 1), top_k(logits, labels, 5)), strict=True))


def add_linear_head(
    loss: Tensor, metrics: Mapping[str, Tensor], class_logits: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of a method's loss and the linear head's, and the metrics of both under their logged names."""
    head_loss, head_metrics = classification_loss(class_logits, labels)
    total = loss + head_loss
    return total, logged(total, metrics, head_metrics)


def logged_baselines(chance: Mapping[str, float | None], heads: nn.ModuleDict) -> dict[str, float | None]:
    """The metrics of `add_linear_head` at chance, for those of a method; None for what has no value at chance."""
    n_classes = heads["linear_classifier"].out_features
    head = (None, *(100 * min(1, k / n_classes) for k in (1, 5)))  # type: ignore[operator]
    return logged(None, chance, dict(zip(HEAD_METRICS, head, strict=True)))


def logged(total: T, metrics: Mapping[str, T], head_metrics: Mapping[str, T]) -> dict[str, T]:
    """Metrics of a method and of the linear head under their logged names."""
    named = {"total_loss": total} | {f"model_{name}": value for name, value in metrics.items()}
    return named | {f"track_head_{name}": value for name, value in head_metrics.items()}


def chance_of_nt_xent(n: int) -> float:
    """NT-Xent of equal similarities among n images (nats, both directions added)."""
    return 2 * math.log(2 * n - 1)
