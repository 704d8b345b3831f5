"""Residual networks of small images that can be stitched (He et al. 2016; Godfrey et al., NeurIPS 2022).

resnet20 and its deeper kin are those of He et al. for CIFAR: 16 to 64 channels, and shortcuts without parameters. resnet18 is
the ImageNet network with a 3x3 stem. (`resnet.py` has the wide encoders of DUET.) Every ReLU is a module of its own: r1 inside
a block, before the addition, and r2 at its end.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# channels and blocks of each stage
STAGES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "resnet20": ((16, 32, 64), (3, 3, 3)),
    "resnet32": ((16, 32, 64), (5, 5, 5)),
    "resnet44": ((16, 32, 64), (7, 7, 7)),
    "resnet56": ((16, 32, 64), (9, 9, 9)),
    "resnet18": ((64, 128, 256, 512), (2, 2, 2, 2)),
}


class PaddedShortcut(nn.Module):
    """Every second row and column, padded with channels of zeros (option A): (B, C, H, W) -> (B, planes, H / 2, W / 2)."""

    def __init__(self, planes: int):
        super().__init__()
        self.planes = planes

    def forward(self, x: Tensor) -> Tensor:
        missing = self.planes - x.shape[1]
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, missing // 2, missing - missing // 2))


class StitchableBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, in_planes, H, W) -> (B, planes, H / stride, W / stride)."""

    def __init__(self, in_planes: int, planes: int, stride: int, *, padded_shortcut: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.r1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.r2 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or in_planes != planes:
            convolution = nn.Conv2d(in_planes, planes, 1, stride, bias=False)  # option B
            self.shortcut = PaddedShortcut(planes) if padded_shortcut else nn.Sequential(convolution, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        y = self.r1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.r2(y + self.shortcut(x))


class StitchableResNet(nn.Module):
    """(B, 3, H, W) -> (B, n_classes), with channels and blocks of each stage as in STAGES.

    Shortcuts where shapes change are padded with zeros (CIFAR's networks), or convolutions (ImageNet's).
    """

    def __init__(
        self, channels: tuple[int, ...], blocks: tuple[int, ...], n_classes: int = 10, *, padded_shortcut: bool = True
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.r1 = nn.ReLU(inplace=True)
        stages = []
        planes = channels[0]
        for stage, n_blocks in enumerate(blocks):
            for i in range(n_blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                stages.append(StitchableBlock(planes, channels[stage], stride, padded_shortcut=padded_shortcut))
                planes = channels[stage]
        self.block_seq = nn.Sequential(*stages)
        self.linear = nn.Linear(planes, n_classes)
        if padded_shortcut:  # resnet18 keeps PyTorch's own initialisation, as in the original
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_seq(self.r1(self.bn1(self.conv1(x))))
        return self.linear(x.mean((2, 3)))
