"""Residual networks for small images (He et al. 2016), in the wide form of DUET's experiments (Suau et al., ICML 2023).

A stem of `width` channels, then three stages of 2, 4 and 8 times as many; the second and third halve the resolution. At a
width of 64, as published, resnet20 has 17 million parameters; a width of 16 gives a narrow one that a CPU can train.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# blocks in each of the three stages
BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18, "resnet1202": 200}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, C, H, W) -> (B, planes, H / stride, W / stride).

    The shortcut is the identity, or a 1x1 convolution with batch norm where shapes differ (option B of the paper).
    """

    def __init__(self, in_planes: int, planes: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


def _stage(in_planes: int, planes: int, n_blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes) for _ in range(n_blocks - 1)))


class CifarResNet(nn.Module):
    """An encoder of small images: (B, in_channels, H, W) with values around 0 -> (B, 8 width).

    `blocks` are the blocks of each stage. There is no pooling before the mean over all positions, and a batch norm after it.
    """

    def __init__(self, blocks: tuple[int, int, int], *, in_channels: int = 3, width: int = 64):
        super().__init__()
        self.options: dict[str, Any] = {"blocks": list(blocks), "in_channels": in_channels, "width": width}
        self.n_features = 8 * width
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, 2 * width, blocks[0], stride=1)
        self.layer2 = _stage(2 * width, 4 * width, blocks[1], stride=2)
        self.layer3 = _stage(4 * width, 8 * width, blocks[2], stride=2)
        # at the place, and so under the name, that it has in published checkpoints
        self.final_bn = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(self.n_features))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # (B, width, H, W)
        x = self.layer3(self.layer2(self.layer1(x)))  # (B, 8 width, H / 4, W / 4)
        return self.final_bn(x.mean((2, 3)))
