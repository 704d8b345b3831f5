"""Networks with the keys and module indices of the original's, to stitch in tests."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mcnn(width: int) -> nn.Sequential:
    """mCNN: four convolutions with batch norm; ReLUs at indices 3, 6, 10, 14."""

    def layer(n_in: int, n_out: int) -> list[nn.Module]:
        return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]

    c = width
    return nn.Sequential(
        *layer(3, c), *layer(c, 2 * c), nn.MaxPool2d(2), *layer(2 * c, 4 * c), nn.MaxPool2d(2), *layer(4 * c, 8 * c),
        nn.MaxPool2d(2), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(8 * c, 10),
    )  # fmt: skip


class Subsample(nn.Module):
    """The shortcut without weights: every second pixel, channels padded with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        extra = x.shape[1] // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))


class Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, *, weighted_shortcut: bool = False):
        super().__init__()
        stride = 1 if n_in == n_out else 2
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.r1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.r2 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Sequential() if stride == 1 else Subsample()
        if stride == 2 and weighted_shortcut:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.r1(self.bn1(self.conv1(x)))))
        return self.r2(y + self.shortcut(x))


class ResNet(nn.Module):
    """resnet20 with widths 16, 32, 64 and three blocks each; narrower and shallower ones, too."""

    def __init__(self, width: int = 16, blocks: int = 3, *, weighted_shortcut: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.r1 = nn.ReLU(inplace=True)
        widths = [width] * (blocks + 1) + [2 * width] * blocks + [4 * width] * blocks
        self.block_seq = nn.Sequential(*(Block(a, b, weighted_shortcut=weighted_shortcut) for a, b in pairwise(widths)))
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_seq(self.r1(self.bn1(self.conv1(x))))
        return self.linear(x.mean((2, 3)))


class TransformerBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.pre_norm = nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = x + x.mean(1, keepdim=True)
        return x + self.linear2(F.gelu(self.linear1(self.pre_norm(mixed))))


class Transformer(nn.Module):
    """Tokens of a convolution, blocks, and attention pooling, which is registered before the blocks and called after them."""

    def __init__(self, width: int = 8, blocks: int = 3):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, width, 4, stride=4), nn.ReLU())
        self.positional_emb = nn.Parameter(0.1 * torch.randn(1, 64, width))
        self.attention_pool = nn.Linear(width, 1)
        self.blocks = nn.ModuleList(TransformerBlock(width) for _ in range(blocks))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).mT + self.positional_emb  # (B, 64, width)
        for block in self.blocks:
            tokens = block(tokens)
        pooled = (self.attention_pool(tokens).softmax(1) * tokens).sum(1)
        return self.fc(pooled)
