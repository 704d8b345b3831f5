"""One step of training a joint, and the published optimisers (Godfrey et al. 2022; the authors' code).

    stitched = stitch(model1, model2, layer, joint).train()
    optimizers = make_optimizers(joint, published_lr(joint))
    for images, labels in batches:
        training_step(stitched, images, labels, optimizers[0])

Epochs, halves of a warm-up (its first with `joint.scalars = False`, its second with new optimisers), and the choice of a
step's optimiser when matrix and scales alternate, are the script's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from common.symmetry.joints import Birkhoff, Joint, Wreath
from common.symmetry.stitching import StitchedModel

WEIGHT_DECAY = 1e-4


def published_lr(joint: Joint) -> float:
    """The learning rate with which the published figures were made: 0.01 for permutations with scales, else 0.001.

    >>> published_lr(Birkhoff(4))
    0.01
    """
    return 0.01 if isinstance(joint, Birkhoff | Wreath) else 0.001


def make_optimizers(joint: Joint, lr: float, *, alternating: bool = False) -> list[Optimizer]:
    """SGD without momentum; for Wreath, Adam. With `alternating`, which is Birkhoff's, one for the matrix, one for the scales.

    Weight decay (L2 in the gradient) is 1e-4, but none on Birkhoff's matrix. Raises ValueError for another joint's alternation.

    >>> [type(optimizer).__name__ for optimizer in make_optimizers(Birkhoff(4), 0.01, alternating=True)]
    ['SGD', 'SGD']
    """
    if alternating and not isinstance(joint, Birkhoff):
        raise ValueError(f"{type(joint).__name__} has no matrix and scales to alternate between")
    if isinstance(joint, Wreath):
        return [torch.optim.Adam(joint.parameters(), lr, weight_decay=WEIGHT_DECAY)]
    if not isinstance(joint, Birkhoff):
        return [torch.optim.SGD(joint.parameters(), lr, weight_decay=WEIGHT_DECAY)]
    groups = [
        {"params": [joint.weight_perms], "weight_decay": 0.0},
        {"params": [joint.weight_scalars], "weight_decay": WEIGHT_DECAY},
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
    amp: torch.dtype | None = None,
) -> Tensor:
    """One step of the joint: images (B, C, H, W), labels (B) -> the loss before it, with the penalty, a scalar.

    `hook_eps` turns Birkhoff's gradients into what its projection leaves of them (--pgd_hook; published 0.001). `amp` is the
    precision of the forward pass if not float32; losses are not scaled, so not float16.

    >>> from torch import nn
    >>> from common.symmetry.stitching import stitch
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    >>> joint = Birkhoff(4, alpha=0.1)
    >>> stitched = stitch(net, net, 2, joint).train()
    >>> loss = training_step(stitched, torch.zeros(5, 3, 32, 32), torch.arange(5), make_optimizers(joint, 0.01)[0])
    >>> loss.shape
    torch.Size([])
    """
    joint = model.joint
    if hook_eps is not None and not isinstance(joint, Birkhoff):
        raise ValueError(f"{type(joint).__name__} has no projection that a gradient could be fitted to")
    with torch.autocast(images.device.type, amp, enabled=amp is not None):
        logits = model(images)
    loss = F.cross_entropy(logits.float(), labels) + joint.penalty()
    joint.zero_grad()
    loss.backward()
    if hook_eps is not None and isinstance(joint, Birkhoff):
        joint.project_gradients(hook_eps)
    optimizer.step()
    joint.project()
    return loss.detach()
