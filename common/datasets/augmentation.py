"""Preprocessing of small images for classifiers: three channels of 32x32, mirrored and shifted in training, normalised.

Whole batches of uint8 tensors at a time. Random draws are arguments, so that they can be a function of seed and epoch.
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
    """Images (N, 3, 32, 32): smaller ones get a black border, grey ones three equal channels."""
    border = (32 - data.images.shape[3]) // 2
    framed = F.pad(data.images, (border,) * 4)
    return ImageSet(framed.expand(-1, 3, -1, -1).contiguous(), data.labels, data.classes)


def flip_and_translate(images: Tensor, flip: Tensor, offset: Tensor, fill: Tensor) -> Tensor:
    """Mirror images (B, C, H, W) uint8 where `flip` (B) is true, then shift all up and left by `offset` - SHIFT pixels.

    `offset` (B, 2) is from 0 to 2 SHIFT; pixels from outside have the colour `fill` (C).
    """
    B, C, H, W = images.shape
    mirrored = torch.where(flip.view(B, 1, 1, 1), images.flip(3), images)
    framed = fill.view(1, C, 1, 1).repeat(B, 1, H + 2 * SHIFT, W + 2 * SHIFT)
    framed[:, :, SHIFT:-SHIFT, SHIFT:-SHIFT] = mirrored
    windows = framed.unfold(2, H, 1).unfold(3, W, 1)  # a view: (B, C, offsets, offsets, H, W)
    return windows[torch.arange(B, device=images.device), :, offset[:, 0], offset[:, 1]]


def draw_epoch(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random draws for an epoch of n images: order (n), mirrored (n) bool, offsets (n, 2)."""
    order = torch.randperm(n, generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5
    return order, flip, torch.randint(2 * SHIFT + 1, (n, 2), generator=generator)


class Preprocessing:
    """Preprocessing of uint8 images (B, 3, H, W) of one of the sets in MEAN, on one device."""

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        self.mean, self.std = (torch.tensor(values[name], device=device).view(3, 1, 1) for values in (MEAN, STD))
        # rounded down, as in the original
        self.fill = self.mean.flatten().to(torch.uint8)

    def normalise(self, images: Tensor) -> Tensor:
        """Float32 images minus the set's mean, divided by its deviation."""
        return (images.float() - self.mean) / self.std

    def augment(self, images: Tensor, flip: Tensor, offset: Tensor) -> Tensor:
        """Normalised images after flip_and_translate; pixels from outside have the mean colour."""
        return self.normalise(flip_and_translate(images, flip, offset, self.fill))
