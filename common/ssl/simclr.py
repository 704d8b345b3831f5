"""SimCLR: views of an image get similar embeddings, views of different images do not (Chen et al. 2020, arXiv 2002.05709)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.resnet import CifarResNet
from common.ssl import steps
from common.ssl.models import projection_head
from common.ssl.steps import Batch
from common.ssl.views import Stack

TEMPERATURE = 0.1
MASKED = 1e9  # taken off the similarity of a view with itself
METRICS = ("loss_mean", *(f"ntxent_{rows}_top{k}_mean" for k in (1, 5) for rows in ("ABAA", "BABB", "total")))


def contrastive_logits(embedding1: Tensor, embedding2: Tensor, temperature: float = TEMPERATURE) -> tuple[Tensor, Tensor]:
    """Cosine similarities of each view with all others over the temperature: (B, D) twice -> (B, 2B) twice.

    Row i is about image i; its other view is in column i.
    """
    a, b = (e * e.square().sum(1, keepdim=True).clamp(min=1e-12).rsqrt() for e in (embedding1, embedding2))
    itself = MASKED * torch.eye(len(a), device=a.device)
    across = a @ b.T / temperature
    logits1 = torch.cat([across, a @ a.T / temperature - itself], 1)
    logits2 = torch.cat([across.T, b @ b.T / temperature - itself], 1)
    return logits1, logits2


def nt_xent(embedding1: Tensor, embedding2: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Cross entropy of finding an image's other view among all others, both directions added: (B, D) twice -> (B)."""
    return _cross_entropy(*contrastive_logits(embedding1, embedding2, temperature))


def _cross_entropy(logits1: Tensor, logits2: Tensor) -> Tensor:
    other_view = torch.arange(len(logits1), device=logits1.device)
    return F.cross_entropy(logits1, other_view, reduction="none") + F.cross_entropy(logits2, other_view, reduction="none")


def simclr_loss(embedding1: Tensor, embedding2: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """NT-Xent of two views' embeddings (B, D), and METRICS: percent of views found again, in top 5 if there are more than 5."""
    logits1, logits2 = contrastive_logits(embedding1, embedding2)
    loss = _cross_entropy(logits1, logits2).mean()
    metrics = [loss]
    other_view = torch.arange(len(embedding1), device=embedding1.device)
    for k in (1, 5) if len(embedding1) > 5 else (1,):
        accuracy1, accuracy2 = steps.top_k(logits1, other_view, k), steps.top_k(logits2, other_view, k)
        metrics += [accuracy1, accuracy2, (accuracy1 + accuracy2) / 2]
    return loss, dict(zip(METRICS, metrics, strict=False))


class SimCLR(nn.Module):
    """An encoder, a projection head, and a linear classifier trained at the same time (common/ssl/steps.py).

    `codes` are the transformations of both views in their order (common/ssl/views.py), `size` is a view's side in pixels.
    """

    def __init__(self, encoder: CifarResNet, codes: Sequence[str], size: int, *, n_classes: int):
        super().__init__()
        self.stack = Stack(codes, size)
        self.base_network = encoder
        self.head = projection_head(encoder.n_features)
        self.heads = steps.linear_head(encoder.n_features, n_classes)

    def make_batch(
        self, images: Tensor, labels: Tensor, indices: Tensor, generator: torch.Generator, *, training: bool
    ) -> Batch:
        """Two augmented views of the images (N, C, H, H) at `indices` (n), uint8; in a test, view 1 is the centre as it is."""
        pixels, n = steps.own_pixels(images, indices), len(indices)
        view1, _ = steps.make_view(self.stack, pixels, n, generator, clean=not training)
        view2, _ = steps.make_view(self.stack, pixels, n, generator)
        return Batch((view1, view2), labels[indices])

    def forward(self, views: Sequence[Tensor], *, jointly: bool = False) -> dict[str, Tensor]:
        """Embeddings (B, 128) of two views (B, C, H, H), and class logits (B, classes) of the first."""
        return self.outputs(*steps.encode_views(self.base_network, views, jointly=jointly))

    def outputs(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """The same from representations (B, F)."""
        class_logits = self.heads["linear_classifier"]
        return {"embedding1": self.head(z1), "embedding2": self.head(z2), "class_logits": class_logits(z1.detach())}

    def loss(self, out: dict[str, Tensor], batch: Batch, *, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the whole batch, and its metrics under their logged names."""
        out = steps.gather_outputs(out, len(batch.labels))
        loss, metrics = simclr_loss(out["embedding1"], out["embedding2"])
        return steps.add_linear_head(loss, metrics, out["class_logits"], batch.labels)

    def baselines(self, n: int) -> dict[str, float | None]:
        """The metrics of `loss` in batches of n images, each with its value at chance, or None."""
        found_again = [100 * min(1, k / (2 * n - 1)) for k in (1, 5) for _ in range(3)]
        chance = dict(zip(METRICS, [steps.chance_of_nt_xent(n), *found_again][: 7 if n > 5 else 4], strict=False))
        return steps.logged_baselines(chance, self.heads)
