"""Plain convolutional networks of 32x32 images that stitching takes apart (Godfrey et al., NeurIPS 2022, arXiv 2205.14258).

"Myrtle" nets: four 3x3 convolutions, each with batch norm and ReLU; the resolution halves after the second, third and fourth.
mCNN doubles its channels with every convolution, cwCNN keeps them (constant width). `_k` has biases instead of batch norm. Each
network is a flat nn.Sequential with activations as modules, so it can be cut, and stitched, at any index.
"""

from __future__ import annotations

from torch import nn

from common.models.deterministic import MaxPool2d

# channels of the first convolution, as published
WIDTHS = {"mCNN": 64, "mCNN_k": 64, "mCNN_k_sigmoid": 64, "cwCNN": 512, "cwCNN_k": 512}


def _cnn(channels: tuple[int, int, int, int], n_classes: int, *, batch_norm: bool, sigmoid: bool = False) -> nn.Sequential:
    """(B, 3, 32, 32) -> (B, n_classes); `channels` are those of the four convolutions."""
    layers: list[nn.Module] = []
    n_in = 3
    for i, n_out in enumerate(channels):
        layers.append(nn.Conv2d(n_in, n_out, 3, padding=1, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(n_out))
        layers.append(nn.Sigmoid() if sigmoid else nn.ReLU(inplace=True))
        if i > 0:
            layers.append(MaxPool2d(2))
        n_in = n_out
    return nn.Sequential(*layers, MaxPool2d(4), nn.Flatten(), nn.Linear(n_in, n_classes))


def mCNN(n_classes: int = 10, width: int = WIDTHS["mCNN"]) -> nn.Sequential:
    """With batch norm; `width`, 2, 4 and 8 times `width` channels."""
    return _cnn((width, 2 * width, 4 * width, 8 * width), n_classes, batch_norm=True)


def mCNN_k(n_classes: int = 10, width: int = WIDTHS["mCNN_k"]) -> nn.Sequential:
    """mCNN with biases instead of batch norm."""
    return _cnn((width, 2 * width, 4 * width, 8 * width), n_classes, batch_norm=False)


def mCNN_k_sigmoid(n_classes: int = 10, width: int = WIDTHS["mCNN_k_sigmoid"]) -> nn.Sequential:
    """mCNN_k with sigmoids, which do not commute with scaling: a control."""
    return _cnn((width, 2 * width, 4 * width, 8 * width), n_classes, batch_norm=False, sigmoid=True)


def cwCNN(n_classes: int = 10, width: int = WIDTHS["cwCNN"]) -> nn.Sequential:
    """With batch norm; `width` channels throughout."""
    return _cnn((width, width, width, width), n_classes, batch_norm=True)


def cwCNN_k(n_classes: int = 10, width: int = WIDTHS["cwCNN_k"]) -> nn.Sequential:
    """cwCNN with biases instead of batch norm."""
    return _cnn((width, width, width, width), n_classes, batch_norm=False)
