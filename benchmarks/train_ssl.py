"""How long a step of DUET takes, what takes it, and how that compares with a plain loop.

    python -m benchmarks.train_ssl            # cifar10_resnet20, batch 64, about 2 minutes

"plain" is the step as one writes it first: fp32, contiguous memory, kornia's augmentations as they come (where kornia is
installed), metrics fetched in each step.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.measure import Bench, Kind, run_benchmark
from common.models.resnet import CifarResNet
from common.precision import autocast
from common.ssl.duet import DUET, DUETBatch
from common.ssl.steps import encode_views

PARTS = ("views", "encoder, forward", "heads and losses, forward", "heads and losses, backward", "encoder, backward", "AdamW")


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Step:
    """A training step of one kind on random images of 36x36 pixels, as --center-crop makes them for views of 32x32."""

    def __init__(self, kind: str, batch_size: int, width: int, device: str = "cpu"):
        torch.manual_seed(0)
        self.kind, self.device = kind, torch.device(device)
        self.precision = "bf16" if "bf16" in kind else "fp32"
        layout = torch.contiguous_format if kind == "plain" else torch.channels_last
        model = DUET(
            CifarResNet((3, 3, 3), width=width), ("sca", "rot"), 32, n_classes=10, structure="rot", target="vm", weight=1000.0
        )
        self.model = model.to(self.device, memory_format=layout)
        if "compile" in kind:
            self.model.base_network.compile()
        self.layout = layout
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), 1e-4, (0.9, 0.95), weight_decay=1e-4, fused=None if kind == "plain" else True
        )
        self.images = torch.randint(0, 256, (4 * batch_size, 3, 36, 36), dtype=torch.uint8, device=self.device)
        self.labels = torch.randint(0, 10, (4 * batch_size,), device=self.device)
        self.batch_size, self.gen = batch_size, torch.Generator().manual_seed(0)
        self.augment = kornia_views(self.device) if kind == "plain" else None

    def batch(self) -> DUETBatch:
        indices = torch.randperm(len(self.images), generator=self.gen)[: self.batch_size].to(self.device)
        if self.augment is None:
            batch = self.model.make_batch(self.images, self.labels, indices, self.gen, training=True)
        else:
            pixels = self.images[indices].float() / 255
            (view1, parameter1), (view2, parameter2) = self.augment(pixels), self.augment(pixels)
            batch = DUETBatch((view1, view2), self.labels[indices], parameter1, parameter2)
        return replace(batch, views=[view.contiguous(memory_format=self.layout) for view in batch.views])

    def __call__(self) -> dict[str, float]:
        """One step; the seconds of its parts."""
        model, times = self.model, []

        def mark() -> None:
            synchronise()
            times.append(time.perf_counter())

        mark()
        batch = self.batch()
        mark()
        with autocast(batch.views[0], self.precision):
            z = encode_views(model.base_network, batch.views)
        mark()
        cut = [rows.detach().requires_grad_() for rows in z]
        with autocast(batch.views[0], self.precision):
            out = model.outputs(*cut)
        loss, metrics = model.loss({name: value.float() for name, value in out.items()}, batch, training=True)
        mark()
        self.optimizer.zero_grad()
        loss.backward()
        mark()
        torch.autograd.backward(z, [rows.grad for rows in cut])
        mark()
        self.optimizer.step()
        if self.kind == "plain":
            {name: value.item() for name, value in metrics.items()}
        mark()
        return dict(zip(PARTS, (end - begin for begin, end in pairwise(times)), strict=True))


def kornia_views(device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A view and its parameters by kornia's RandomResizedCrop and RandomRotation."""
    import kornia.augmentation as K

    crop = K.RandomResizedCrop((32, 32), scale=(0.2, 1.0)).to(device)
    rotation = K.RandomRotation(180.0, p=1.0, align_corners=True).to(device)

    def augment(pixels: Tensor) -> tuple[Tensor, Tensor]:
        view = rotation(crop(pixels)) - 0.5
        return view, (rotation._params["degrees"].to(device)[:, None] + 180) / 360

    return augment


def run(bench: Bench, batch_size: int = 64, width: int = 64) -> None:
    names = ["plain", "suite", "suite, bf16"]
    if importlib.util.find_spec("kornia") is None:
        print("kornia is not installed: no plain loop to compare with")
        names.remove("plain")
    kinds = {name: Kind(partial(Step, name, batch_size, width), tuned=name != "plain") for name in names}
    bench.compare("DUET step", kinds, 1 if bench.quick else 2, ("plain", "suite"), operations="suite, bf16")


if __name__ == "__main__":
    sys.exit(run_benchmark("train_ssl", run, __doc__))
