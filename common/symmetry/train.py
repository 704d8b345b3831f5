"""One step of training a stitching layer, and the published optimisers (Godfrey et al. 2022; the authors' code).

    stitched = stitch(model1, model2, index, layer).train()
    optimizers = make_optimizers(layer, published_lr(layer))
    for images, labels in batches:
        training_step(stitched, images, labels, optimizers[0])

The script has the epochs, the two halves of a warm-up (the first with `layer.scalars = False`, the second with new
optimisers), and the draw of a step's optimiser when matrix and scales alternate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from common.precision import autocast
from common.symmetry.stitching import StitchedModel
from common.symmetry.stitching_layers import Birkhoff, StitchingLayer, Wreath

WEIGHT_DECAY = 1e-4


def published_lr(layer: StitchingLayer) -> float:
    """The learning rate of the published results: 0.01 for permutations with scales, else 0.001.

    >>> published_lr(Birkhoff(4))
    0.01
    """
    return 0.01 if isinstance(layer, Birkhoff | Wreath) else 0.001


def make_optimizers(layer: StitchingLayer, lr: float, *, alternating: bool = False) -> list[Optimizer]:
    """SGD without momentum; for Wreath, Adam. With `alternating` (Birkhoff alone) one for the matrix and one for the scales.

    Weight decay (L2 in the gradient) is 1e-4, but 0 on Birkhoff's matrix. Raises ValueError if another layer is to alternate.

    >>> [type(optimizer).__name__ for optimizer in make_optimizers(Birkhoff(4), 0.01, alternating=True)]
    ['SGD', 'SGD']
    """
    if alternating and not isinstance(layer, Birkhoff):
        raise ValueError(f"{type(layer).__name__} has no matrix and scales to alternate between")
    if isinstance(layer, Wreath):
        return [torch.optim.Adam(layer.parameters(), lr, weight_decay=WEIGHT_DECAY)]
    if not isinstance(layer, Birkhoff):
        return [torch.optim.SGD(layer.parameters(), lr, weight_decay=WEIGHT_DECAY)]
    groups = [
        {"params": [layer.weight_perms], "weight_decay": 0.0},
        {"params": [layer.weight_scalars], "weight_decay": WEIGHT_DECAY},
    ]
    if alternating:
        return [torch.optim.SGD([group], lr) for group in groups]
    return [torch.optim.SGD(groups, lr)]


def training_step(
    model: StitchedModel,
    images: Tensor,
    labels: Tensor,
    optimizer: Optimizer,
    *,
    hook_eps: float | None = None,
    precision: str = "fp32",
) -> Tensor:
    """One step of the stitching layer: images (B, C, H, W), labels (B) -> the loss before it, with the penalty, a scalar.

    `hook_eps` replaces Birkhoff's gradients by what its projection leaves of them (--pgd_hook; published 0.001). `precision`
    is that of the forward pass.

    >>> from torch import nn
    >>> from common.symmetry.stitching import stitch
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    >>> layer = Birkhoff(4, alpha=0.1)
    >>> stitched = stitch(net, net, 2, layer).train()
    >>> loss = training_step(stitched, torch.zeros(5, 3, 32, 32), torch.arange(5), make_optimizers(layer, 0.01)[0])
    >>> loss.shape
    torch.Size([])
    """
    layer = model.stitching_layer
    if hook_eps is not None and not isinstance(layer, Birkhoff):
        raise ValueError(f"{type(layer).__name__} has no projection that a gradient could be fitted to")
    with autocast(images, precision):
        logits = model(images)
    loss = F.cross_entropy(logits.float(), labels) + layer.penalty()
    layer.zero_grad()
    loss.backward()
    if hook_eps is not None and isinstance(layer, Birkhoff):
        layer.project_gradients(hook_eps)
    optimizer.step()
    layer.project()
    return loss.detach()
