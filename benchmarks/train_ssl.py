"""How long a step of DUET takes, what takes it, and how that compares with a plain loop.

    python -m benchmarks.train_ssl            # cifar10_resnet20, batch 64 on a CPU, 1024 on a GPU

"plain" is the step as one writes it first: fp32, contiguous memory, kornia's augmentations as they come (where kornia is
installed), metrics fetched in each step. All kinds are timed in turn, several times; medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from common.models.resnet import CifarResNet
from common.precision import autocast
from common.run.memory import tune_malloc
from common.ssl.duet import DUET, DUETBatch
from common.ssl.steps import encode_views

PARTS = ("views", "encoder, forward", "heads and losses, forward", "heads and losses, backward", "encoder, backward", "AdamW")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, help="[64 on a CPU, 1024 on a GPU]")
    parser.add_argument("--encoder-width", type=int, default=64, help="[%(default)s]")
    parser.add_argument("--repeats", type=int, help="[3 on a CPU, 20 on a GPU]")
    return parser


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Step:
    """A training step of one kind on random images of 36x36 pixels, as --center-crop makes them for views of 32x32."""

    def __init__(self, kind: str, batch_size: int, width: int, device: str):
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
            z = encode_views(model.base_network, batch.views, jointly="joint" in self.kind)
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


def kinds_for(device: str) -> list[str]:
    kinds = ["plain", "suite", "suite, joint pass", "suite, bf16"]
    if device == "cuda":
        kinds += ["suite, bf16, compile"]
    try:
        kornia_views(torch.device("cpu"))
    except ImportError:
        print("kornia is not installed: no plain loop to compare with")
        kinds.remove("plain")
    return kinds


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    tune_malloc()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size = args.batch_size or (1024 if device == "cuda" else 64)
    repeats = args.repeats or (20 if device == "cuda" else 3)
    steps = {kind: Step(kind, batch_size, args.encoder_width, device) for kind in kinds_for(device)}
    for step in steps.values():
        step()  # warm-up
    measured: dict[str, list[dict[str, float]]] = {kind: [] for kind in steps}
    for _ in range(repeats):
        for kind, step in steps.items():
            measured[kind].append(step())
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"cifar10_resnet20, width {args.encoder_width}, batch {batch_size}, {where}, torch {torch.__version__}, n = {repeats}"
    )
    report(measured, batch_size)
    return 0


def report(measured: dict[str, list[dict[str, float]]], batch_size: int) -> None:
    """Seconds and shares of each part, images a second, and the ratio to the plain loop."""
    medians = {kind: {part: statistics.median(t[part] for t in times) for part in PARTS} for kind, times in measured.items()}
    totals = {kind: statistics.median(sum(t.values()) for t in times) for kind, times in measured.items()}
    print(f"{'':>28}" + "".join(f"{kind:>24}" for kind in medians))
    for part in PARTS:
        print(f"{part:>28}" + "".join(f"{m[part]:>15.4f} {100 * m[part] / totals[k]:6.2f} %" for k, m in medians.items()))
    print(f"{'step (s)':>28}" + "".join(f"{totals[kind]:>24.4f}" for kind in medians))
    print(f"{'images per second':>28}" + "".join(f"{batch_size / totals[kind]:>24.1f}" for kind in medians))
    if "plain" in totals:
        print(f"{'times as fast as plain':>28}" + "".join(f"{totals['plain'] / totals[kind]:>24.2f}" for kind in medians))


if __name__ == "__main__":
    sys.exit(main())
