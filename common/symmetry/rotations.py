"""The rotation test: a fixed random matrix on a layer's channels, behind which the rest is trained (Godfrey et al. 2022).

    modified = transform_layer(network, 2, random_element("orthogonal", 128, generator))

Before a ReLU, a permutation with positive scales is a symmetry: the following layers can undo it. A rotation is not, so the
accuracy that the retrained rest loses to it shows how much the basis of channels matters.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from common.symmetry.matrices import permutation_matrix

GROUPS = ("orthogonal", "Grelu", "identity")


def random_element(group: str, n: int, generator: torch.Generator | None = None) -> Tensor:
    """A random matrix (n, n) of a group, in float32.

    orthogonal: by Haar's measure (Mezzadri 2007). Grelu: a permutation times positive scales exp(N(0, 1) - 1/2), whose mean
    is 1. identity: a control. Raises ValueError for another group.

    >>> R = random_element("orthogonal", 3)
    >>> torch.allclose(R @ R.T, torch.eye(3), atol=1e-6)
    True
    """
    if group == "identity":
        return torch.eye(n)
    if group == "Grelu":
        scales = (torch.randn(n, generator=generator) - 0.5).exp()
        return permutation_matrix(torch.randperm(n, generator=generator)) * scales
    if group != "orthogonal":
        raise ValueError(f"there is no group {group!r}: choose from {', '.join(GROUPS)}")
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (Q * R.diagonal().sign()).float()  # without the signs it would not be uniform


class TransformedLayer(nn.Module):
    """A convolution or linear layer, then a fixed matrix (C, C) on its C output channels.

    >>> TransformedLayer(nn.Linear(3, 4), torch.eye(4))(torch.zeros(2, 3)).shape
    torch.Size([2, 4])
    """

    def __init__(self, original_op: nn.Conv2d | nn.Linear, matrix: Tensor):
        super().__init__()
        self.original_op = original_op
        n = len(matrix)
        convolution = isinstance(original_op, nn.Conv2d)
        self.transform = nn.Conv2d(n, n, 1, bias=False) if convolution else nn.Linear(n, n, bias=False)
        with torch.no_grad():
            self.transform.weight.copy_(matrix.reshape(self.transform.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(self.original_op(x))


def transform_layer(model: nn.Sequential, index: int, matrix: Tensor) -> nn.Sequential:
    """A copy of a model with a matrix behind module `index`; everything up to and including the matrix is frozen.

    Raises ValueError if that module is neither a convolution nor linear, or the matrix does not fit.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> [name for name, p in transform_layer(net, 0, torch.eye(4)).named_parameters() if p.requires_grad]
    ['2.weight', '2.bias']
    """
    layer = model[index] if index < len(model) else None
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        kind = "not there" if layer is None else f"a {type(layer).__name__}"
        raise ValueError(f"layer {index} is {kind}: take a convolution or a linear layer")
    if matrix.shape != (layer.weight.shape[0],) * 2:
        raise ValueError(
            f"a matrix of {tuple(matrix.shape)} does not fit the {layer.weight.shape[0]} channels of layer {index}"
        )
    transformed = copy.deepcopy(model).requires_grad_(True)
    transformed[index] = TransformedLayer(copy.deepcopy(layer), matrix).to(layer.weight.device)
    for i in range(index + 1):
        transformed[i].requires_grad_(False)
    return transformed
