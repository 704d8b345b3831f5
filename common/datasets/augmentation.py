"""Small images as classifiers are given them: three channels of 32x32, flipped and moved about in training, normalised.

On uint8 tensors, a whole batch at a time; the draws are arguments, so that they can be a function of seed and epoch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.datasets.images import ImageSet

SHIFT = 2  # pixels, each way

# Mean and standard deviation of each channel, from 0 to 255. CIFAR-10: those that Godfrey et al. (NeurIPS 2022) used; the
# deviation is the small one that is copied from project to project (of all training pixels it is 62.99, 62.09, 66.70). The
# others are of all training pixels; MNIST and Fashion-MNIST with the black border that makes them 32x32.
MEAN = {
    "CIFAR10": (125.307, 122.961, 113.8575),
    "CIFAR100": (129.30, 124.06, 112.43),
    "MNIST": (25.509,) * 3,
    "FashionMNIST": (55.845,) * 3,
}
STD = {
    "CIFAR10": (51.5865, 50.847, 51.255),
    "CIFAR100": (68.17, 65.39, 70.42),
    "MNIST": (70.180,) * 3,
    "FashionMNIST": (84.612,) * 3,
}


def as_rgb_32(data: ImageSet) -> ImageSet:
    """Images of 32x32 in three channels: smaller ones get a black border, grey ones three equal channels."""
    border = (32 - data.images.shape[3]) // 2
    framed = F.pad(data.images, (border,) * 4)
    return ImageSet(framed.expand(-1, 3, -1, -1).contiguous(), data.labels, data.classes)


def flip_and_translate(images: Tensor, flip: Tensor, offset: Tensor, fill: Tensor) -> Tensor:
    """Mirror the images of `flip` (B) bool, then move all by `offset` - SHIFT pixels up and left: (B, C, H, W) uint8.

    `offset` (B, 2) goes from 0 to 2 SHIFT; what comes in from outside has the colour `fill` (C).
    """
    B, C, H, W = images.shape
    mirrored = torch.where(flip.view(B, 1, 1, 1), images.flip(3), images)
    framed = fill.view(1, C, 1, 1).repeat(B, 1, H + 2 * SHIFT, W + 2 * SHIFT)
    framed[:, :, SHIFT:-SHIFT, SHIFT:-SHIFT] = mirrored
    windows = framed.unfold(2, H, 1).unfold(3, W, 1)  # a view: (B, C, offsets, offsets, H, W)
    return windows[torch.arange(B, device=images.device), :, offset[:, 0], offset[:, 1]]


def draw_epoch(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What chance decides for an epoch of n images: their order (n), which are mirrored (n) bool, their offsets (n, 2)."""
    order = torch.randperm(n, generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    return order, flip, torch.randint(2 * SHIFT + 1, (n, 2), generator=generator)


class Preprocessing:
    """What is done to uint8 images (B, 3, H, W) of one of the sets in MEAN before a classifier sees them, on one device."""

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        self.mean, self.std = (torch.tensor(of[name], device=device).view(3, 1, 1) for of in (MEAN, STD))
        # rounded down, as in the original
        self.fill = self.mean.flatten().to(torch.uint8)

    def normalise(self, images: Tensor) -> Tensor:
        """Float32 images with the mean and the deviation of the set taken out."""
        return (images.float() - self.mean) / self.std

    def augment(self, images: Tensor, flip: Tensor, offset: Tensor) -> Tensor:
        """The same of mirrored and moved ones; what comes in from outside has the mean colour."""
        return self.normalise(flip_and_translate(images, flip, offset, self.fill))
