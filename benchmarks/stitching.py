"""Speed and memory of a training step of a stitching layer between two mCNNs, against autograd through both halves.

    python -m benchmarks.stitching             # about a minute

A step (forward, loss, backward, optimiser, projection) with a Birkhoff layer, batch 32: "plain" is the same network with all
its weights trainable, of which only the layer is in the optimiser, as the original does; "stitched" is this suite's; "channels
last" that with maps in the layout (B, H, W, C). Behind layer 3 there is nearly the whole network, whose maps gradients need
whether or not weights learn.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from benchmarks.measure import Bench, Kind, Step, run_benchmark
from common.models import zoo
from common.symmetry.stitching import stitch
from common.symmetry.stitching_layers import Birkhoff
from common.symmetry.train import make_optimizers, training_step

KINDS = ("plain", "stitched", "channels last")
CHANNELS = {3: 1, 6: 2, 10: 4, 14: 8}  # of the layers, in widths
BATCH = 32


def make_step(kind: str, layer: int, width: int, device: str = "cpu") -> Step:
    """A training step of one kind at one layer."""
    torch.manual_seed(0)
    models = (zoo.make("mCNN", width=width) for _ in range(2))
    stitching_layer = Birkhoff(CHANNELS[layer] * width, alpha=0.1)
    stitched = stitch(*models, layer, stitching_layer).to(device).train()
    images, labels = torch.randn(BATCH, 3, 32, 32, device=device), torch.arange(BATCH, device=device) % 10
    if kind == "channels last":
        stitched.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    (optimizer,) = make_optimizers(stitching_layer, 0.01)
    if kind == "plain":
        stitched.requires_grad_(True)  # gradients of weights add up, as nobody sets them to zero

    def step() -> None:
        training_step(stitched, images, labels, optimizer).item()

    return step


def run(bench: Bench, width: int = 64) -> None:
    for layer in (3, 14):
        kinds = {kind: Kind(partial(make_step, kind, layer, width), tuned=kind != "plain") for kind in KINDS}
        bench.compare(f"stitching step, mCNN, layer {layer}", kinds, 2 if bench.quick else 7, operations="stitched")


if __name__ == "__main__":
    sys.exit(run_benchmark("stitching", run, __doc__))
