"""A step of DUET, SimCLR or ESSL: what views are made of a batch, and what is minimised (Suau et al. 2023, section 3).

batch = method.make_batch(images, labels, chosen, generator, training=True)
loss, figures = method.loss(model(batch.view1, batch.view2, batch.task), batch, training=True)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common import parallel
from common.models.resnet import CifarResNet
from common.ssl import losses
from common.ssl.essl import draw_task, make_task
from common.ssl.models import Outputs, SelfSupervised, joint
from common.ssl.views import Stack, clean_view


@dataclass(frozen=True)
class Batch:
    """This process's rows of two views and of ESSL's third input; parameters and labels of all n rows."""

    view1: Tensor
    view2: Tensor
    parameter1: Tensor | None  # (n, 1)
    parameter2: Tensor | None
    labels: Tensor  # (n)
    task: Tensor | None = None
    task_labels: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """One of the three: `bins` > 0 is DUET, `predicts` is ESSL, neither is SimCLR. `weight` is the lambda of the first two."""

    transformations: tuple[str, ...]  # codes, in their order
    size: int  # of a view, in pixels
    bins: int = 0
    structure: str | None = None  # DUET: the code whose parameter is the structure
    target: str = "ga"
    predicts: str | None = None  # ESSL: the code that is predicted
    weight: float = 0.0

    def make_model(self, encoder: CifarResNet, n_classes: int) -> SelfSupervised:
        return SelfSupervised(encoder, n_classes=n_classes, bins=self.bins, essl_code=self.predicts)

    def make_batch(
        self, images: Tensor, labels: Tensor, chosen: Tensor, generator: torch.Generator, *, training: bool
    ) -> Batch:
        """Views of the `chosen` of uint8 images (N, C, H, H): two augmented ones; in a test, view 1 is the centre as it is.

        What is drawn depends on the generator alone, not on the number of processes.
        """
        n, device, side = len(chosen), images.device, images.shape[3]
        rows = parallel.shard(n)
        pixels = images[chosen[rows]].float() / 255
        stack = Stack(self.transformations, self.size)
        drawn1, drawn2 = stack.draw(n, side, generator), stack.draw(n, side, generator)
        view1 = stack(pixels, drawn1[rows].to(device)) if training else clean_view(pixels, self.size)
        view2 = stack(pixels, drawn2[rows].to(device))
        parameter1 = parameter2 = task = task_labels = None
        if self.structure is not None:
            parameter1, parameter2 = (stack.parameter(self.structure, drawn).to(device) for drawn in (drawn1, drawn2))
        if self.predicts is not None:
            half = Stack(self.transformations, self.size // 2, resized=True)
            drawn, values = half.draw(n, side, generator), draw_task(self.predicts, n, generator)
            third = half(pixels, drawn[rows].to(device)) if training else clean_view(pixels, self.size // 2)
            task, task_labels = make_task(self.predicts, third + 0.5, values[rows].to(device))
            task = task - 0.5
        return Batch(view1, view2, parameter1, parameter2, labels[chosen], task, task_labels)

    def loss(self, out: Outputs, batch: Batch, *, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the whole batch, of all processes' rows, and its parts under their published names."""
        n = len(batch.labels)
        embeddings = parallel.gather(out.embedding1, n), parallel.gather(out.embedding2, n)
        if batch.parameter1 is not None and batch.parameter2 is not None:
            joint1, joint2 = (joint(parallel.gather(z, n), self.bins) for z in (out.representation1, out.representation2))
            parameters = batch.parameter1, batch.parameter2
            loss, figures = losses.duet_loss(
                *embeddings, joint1, joint2, *parameters, target=self.target, weight=self.weight, training=training
            )
        elif self.predicts is not None and out.essl_logits is not None and batch.task_labels is not None:
            variants = len(out.essl_logits) // len(out.embedding1)
            logits, wanted = (parallel.gather(rows, n, variants) for rows in (out.essl_logits, batch.task_labels))
            loss, figures = losses.essl_loss(*embeddings, logits, wanted, code=self.predicts, weight=self.weight)
        else:
            loss, figures = losses.simclr_loss(*embeddings)
        class_loss, class_figures = losses.classification_loss(parallel.gather(out.class_logits, n), batch.labels)
        total = loss + class_loss
        named = {"total_loss": total} | {f"model_{name}": value for name, value in figures.items()}
        return total, named | {f"track_head_{name}": value for name, value in class_figures.items()}

    def figure_names(self, batch_size: int) -> list[str]:
        """What `loss` names for batches of that size."""
        parts = ["loss_mean"]
        if self.structure is not None:
            parts += ["nce_loss_mean", "group_loss_mean", "group_0_loss_mean"]
        elif self.predicts is not None:
            parts += ["nce_loss_mean", "essl_loss_mean"]
            parts += [f"essl_top_{k}_mean" for k in (1, 5) if self.predicts not in losses.VALUE_CODES]
        else:
            ks = (1, 5) if batch_size > 5 else (1,)
            parts += [f"ntxent_{rows}_top{k}_mean" for k in ks for rows in ("ABAA", "BABB", "total")]
        heads = [f"track_head_{name}" for name in ("loss_mean", "top_1_mean", "top_5_mean")]
        return ["total_loss", *(f"model_{part}" for part in parts), *heads]
