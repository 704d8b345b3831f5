"""The SWARM image transformer (Vollgraf 2019, arXiv 1906.09400, section 4.2): images as sequences of values.

The values of an image (8 bits, 0..255) are read row by row, pixel by pixel, channel by channel. The input at a position is

    embedding of the value before (nothing at the first) + location + channel + class

and SWARM layers with causal pooling map it to the 256 logits of the value there. Logits depend on earlier values alone, so the
product of their probabilities is the probability of the image. The loss is its negative logarithm in nats per value, which is
ln 2 times the bits per dimension.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import graphs
from common.models.sets import NON_LINEARITIES
from common.models.swarm import IncrementalSwarm, SwarmLayer

N_VALUES = 256
NOTHING = N_VALUES  # the "value" before the first position


class ImageTransformer(nn.Module):
    """Integer images (N, C, H, W) of values 0..255, and their classes (N) if `n_classes` is given, -> logits (N, H, W, C, 256).

    `learn_loc` learns the location features, which are sinusoids otherwise. `fuse` runs the pointwise part of the layers
    through torch.compile. State dicts are those of the original. Raises ValueError for sizes out of range, and for images or
    classes that do not fit.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        n_hidden: int,
        n_layers: int = 1,
        n_iter: int = 5,
        non_lin: str = "relu",
        n_classes: int | None = None,
        learn_loc: bool = False,
        fuse: bool = False,
    ):
        super().__init__()
        if min(*shape, n_layers) < 1:
            raise ValueError(f"sizes must be positive: (C, H, W) {shape}, n_layers {n_layers}")
        self.shape, D = shape, n_hidden
        C, H, W = shape
        if C > 1:
            self.channel_embedding = nn.Parameter(torch.zeros(D, C))
        locations = 0.001 * torch.randn(D, H, W) if learn_loc else location_features(H, W, D)
        self.location_features = nn.Parameter(locations, requires_grad=learn_loc)
        layers: list[nn.Module] = []
        for index in range(n_layers):
            n_out = N_VALUES if index == n_layers - 1 else D
            layers += [NON_LINEARITIES[non_lin]()] if index else []
            layers += [SwarmLayer(D, n_out, D, n_iter, n_dim=2, pooling="CAUSAL", fuse=fuse)]
        self.cells = nn.ModuleList(layers)
        self.input_embedding = nn.Embedding(N_VALUES, D)
        nn.init.uniform_(self.input_embedding.weight, -0.1, 0.1)
        if n_classes is not None:
            self.cond_embedding = nn.Embedding(n_classes, D)
            nn.init.uniform_(self.cond_embedding.weight, -0.1, 0.1)
        self.n_classes = n_classes

    def forward(self, images: Tensor, classes: Tensor | None = None) -> Tensor:
        (C, H, W), N = self.shape, len(images)
        if images.shape[1:] != self.shape:
            raise ValueError(f"images of shape {tuple(images.shape[1:])}: the model is for {self.shape}")
        check_values(images)
        values = images.permute(0, 2, 3, 1).flatten(1).int()  # (N, E), E = H W C
        before = F.pad(self.input_embedding(values[:, :-1]), (0, 0, 1, 0))  # (N, E, D), zero at the first position
        x = before + self.positions() + self.context(N, classes).unsqueeze(1)
        x = x.unflatten(1, (H, W * C))
        for module in self.cells:
            x = module(x)
        return x.view(N, H, W, C, N_VALUES)

    def positions(self) -> Tensor:
        """Features of the location and channel of each position: (E, D)."""
        C = self.shape[0]
        features = self.location_features.flatten(1).T.repeat_interleave(C, 0)
        return features + self.channel_embedding.T.repeat(len(features) // C, 1) if C > 1 else features

    def context(self, n: int, classes: Tensor | None) -> Tensor:
        """Features of the class of each image: (N, D), zero without classes."""
        if classes is not None and self.n_classes is None:
            raise ValueError("the model takes no classes")
        if self.n_classes is not None and (classes is None or classes.shape != (n,)):
            given = "none given" if classes is None else f"shape {tuple(classes.shape)}"
            raise ValueError(f"the model takes a class for each of {n} images, ({n},): classes: {given}")
        if classes is None:
            return self.input_embedding.weight.new_zeros(n, self.input_embedding.embedding_dim)
        return self.cond_embedding(classes)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        classes: Tensor | None = None,
        *,
        given: Tensor | None = None,
        n_rows: int = 0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw n images (n, C, H, W) uint8, value by value; the first `n_rows` rows are those of `given` (n, C, H, W).

        The cost is that of one forward pass of n images. Raises ValueError if `given` is missing or does not fit.
        """
        C, H, W = self.shape
        if not 0 <= n_rows <= H or (n_rows and given is None):
            raise ValueError(f"n_rows {n_rows}: images have {H} rows, and `given` has to hold those that are given")
        if given is not None and given.shape != (n, C, H, W):
            raise ValueError(f"given has shape {tuple(given.shape)}: {n} images of {self.shape} are drawn")
        if given is not None:
            check_values(given)
        device = self.input_embedding.weight.device
        values = torch.zeros(n, H * W * C, dtype=torch.uint8, device=device)
        n_given = n_rows * W * C
        if given is not None:
            values[:, :n_given] = given[:, :, :n_rows].permute(0, 2, 3, 1).flatten(1)
        with torch.autocast(device.type, enabled=False):  # it would cast the weights again for every value
            steps = IncrementalImages(self, n, classes)
            for e in range(H * W * C):
                logits = steps.logits(values[:, e - 1] if e else None)
                if e >= n_given:
                    # the largest of logits plus Gumbel noise is a draw from their softmax
                    uniform = torch.rand(logits.shape, generator=generator, device=device)
                    values[:, e] = (logits - (-uniform.clamp(min=1e-20).log()).log()).argmax(1)
        return values.view(n, H, W, C).permute(0, 3, 1, 2)


class IncrementalImages:
    """An ImageTransformer over n images that become known value by value: each costs n_iter cell steps per layer.

    All it keeps of the earlier values is a sum of h for each iteration and layer: n_layers n_iter n_hidden numbers an image.
    What the first layer makes of its input, Wih x + b, is a sum of three terms, all of which are computed at the start. On a
    GPU a step is a CUDA graph.
    """

    @torch.no_grad()
    def __init__(self, model: ImageTransformer, n: int, classes: Tensor | None = None):
        first, *others = model.cells
        assert isinstance(first, SwarmLayer)
        self.first = IncrementalSwarm(first, n)
        self.others = [IncrementalSwarm(cell, n) if isinstance(cell, SwarmLayer) else cell for cell in others]
        Wih, bias = self.first.Wih, self.first.bias
        values = F.linear(model.input_embedding.weight, Wih)
        self.values = F.pad(values, (0, 0, 0, 1))  # (257, 4H), zero for NOTHING
        self.positions = F.linear(model.positions(), Wih)  # (E, 4H)
        self.context = F.linear(model.context(n, classes), Wih, bias)  # (n, 4H)
        self.before = torch.full((n,), NOTHING, device=bias.device)
        self.position = torch.zeros(1, dtype=torch.long, device=bias.device)
        self.step = self._step
        if bias.is_cuda:
            self.step = graphs.record(self._step)
            for part in (self.first, *self.others):
                if isinstance(part, IncrementalSwarm):
                    part.reset()
            self.position.zero_()

    @torch.no_grad()
    def logits(self, before: Tensor | None) -> Tensor:
        """Logits (n, 256) at the next position, given the value (n) at the one before: None at the first position.

        On a GPU they are overwritten by the next call.
        """
        if before is not None:
            self.before.copy_(before)
        return self.step()

    def _step(self) -> Tensor:
        x_term = self.context + self.positions.index_select(0, self.position)
        x = self.first.step(x_term.add_(self.values.index_select(0, self.before)))
        for cell in self.others:
            x = cell(x)
        self.position += 1
        return x


def check_values(images: Tensor) -> None:
    """Raise ValueError unless images are integers in 0..255; values are looked at on a CPU only (on a GPU, the host waits)."""
    if images.is_floating_point() or images.dtype == torch.bool:
        raise ValueError(
            f"images are {images.dtype}: integers 0..{N_VALUES - 1} are needed, "
            f"(255 * images).round().to(torch.uint8) for images in 0..1"
        )
    if images.dtype != torch.uint8 and images.device.type == "cpu" and images.numel():
        low, high = images.aminmax()
        if low < 0 or high >= N_VALUES:
            raise ValueError(f"images have values {low.item()}..{high.item()}: 0..{N_VALUES - 1} are needed")


def cross_entropy(logits: Tensor, images: Tensor) -> Tensor:
    """Mean nats per value of each image: (N, H, W, C, 256), (N, C, H, W) -> (N). Raises ValueError as `check_values` does."""
    check_values(images)
    targets = images.permute(0, 2, 3, 1)
    nats = F.cross_entropy(logits.flatten(0, 3).float(), targets.flatten().long(), reduction="none")
    return nats.view(targets.shape).mean((1, 2, 3))


def location_features(height: int, width: int, n_features: int) -> Tensor:
    """Sinusoids of rows and columns, (n_features, height, width), in n_features / 4 frequencies.

    Frequencies range from one cycle over the longer side to half a cycle a pixel. (The original divides rows by the width,
    too, and so exceeds half a cycle a pixel in images that are higher than wide.) Raises ValueError if `n_features` is not a
    multiple of 4.
    """
    if n_features % 4 or n_features < 4:
        raise ValueError(f"{n_features} location features: a multiple of 4 is needed")
    size, columns, rows = max(height, width), torch.arange(width).double(), torch.arange(height).double()
    frequencies = torch.logspace(0, math.log10(max(size / 2, 1)), n_features // 4, dtype=torch.float64)[:, None, None]
    across = (2 * math.pi * frequencies * columns / size).expand(-1, height, -1)
    down = (2 * math.pi * frequencies * rows[:, None] / size).expand(-1, -1, width)
    return torch.stack([across.sin(), down.sin(), across.cos(), down.cos()], 1).flatten(0, 1).float()
