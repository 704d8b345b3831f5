"""Pooling in SWARM layers: what one entity of a set hears of the others (Vollgraf 2019, arXiv 1906.09400).

Each is made for the mask of some sets, (n, E), and fills in `p`, of the shape of h, or (n, 1, H) where it is `shared` by all
entities of a set. Each has a backward pass of its own, since the recurrence of `common/models/swarm.py` is differentiated by
hand: `add_grad` adds to dh what reaches h through p. A set without entities pools to 0 (POMA: to a mean over its padding),
never to NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

POMA_SLICES = 4


class Mean:
    """The mean of h over the valid entities: (n, E, H) -> (n, 1, H)."""

    shared = True

    def __init__(self, valid: Tensor):
        self.weights = (valid / valid.sum(1, keepdim=True).clamp(min=1)).unsqueeze(1)  # (n, 1, E)

    def pool(self, h: Tensor, p: Tensor) -> None:
        torch.bmm(self.weights, h, out=p)

    def add_grad(self, dh: Tensor, dp: Tensor, h: Tensor) -> None:
        dh.baddbmm_(self.weights.mT, dp)


class Causal:
    """The running mean of h over the valid entities up to and including the own one: (n, E, H) -> (n, E, H).

    The running sum within a chunk of entities is a product with a triangle of ones, which costs next to nothing beside the
    cell's own products (a cumulative sum along E would cost eight times as much); the sums of whole chunks are added up.
    """

    shared = False
    CHUNK = 16

    def __init__(self, valid: Tensor):
        n, E = valid.shape
        # counted in float32 at least: bfloat16 has no odd numbers above 256
        real = torch.promote_types(valid.dtype, torch.float32)
        self.inverse = (1 / valid.cumsum(1, dtype=real).clamp(min=1)).unsqueeze(2)  # (n, E, 1)
        self.valid = valid.unsqueeze(2)
        rest = E % self.CHUNK
        self.stretches = []  # whole chunks, then what is left, as one more: (where, shape, triangles (n, chunks, size, size))
        for start, stop, size in ((0, E - rest, self.CHUNK), (E - rest, E, rest)):
            if start < stop:
                shape = (n, (stop - start) // size, size, -1)
                ones = valid.new_ones(size, size).tril()
                self.stretches.append((slice(start, stop), shape, ones * valid[:, start:stop].view(shape).mT))

    def pool(self, h: Tensor, p: Tensor) -> None:
        carried = self.inverse.new_zeros(len(h), 1, 1, 1)  # sums over all chunks before
        for entities, shape, triangles in self.stretches:
            sums = (triangles @ h[:, entities].view(shape)).to(self.inverse.dtype)  # (n, chunks, size, H)
            through = carried + sums[:, :, -1:].cumsum(1)
            sums[:, 1:] += through[:, :-1]
            sums[:, :1] += carried
            torch.mul(sums.flatten(1, 2), self.inverse[:, entities], out=p[:, entities])
            carried = through[:, -1:]

    def add_grad(self, dh: Tensor, dp: Tensor, h: Tensor) -> None:
        carried = self.inverse.new_zeros(len(h), 1, 1, 1)  # sums over all chunks after: entity e is in the means from e on
        for entities, shape, triangles in reversed(self.stretches):
            shares = (dp[:, entities] * self.inverse[:, entities]).view(shape)
            own = (triangles.mT @ shares.to(triangles.dtype)).to(shares.dtype)
            totals = shares.sum(2, keepdim=True)
            back = carried + totals.flip(1).cumsum(1).flip(1) - totals
            own.addcmul_(back, self.valid[:, entities].view(shape).to(own.dtype))
            dh[:, entities] += own.flatten(1, 2)
            carried = back[:, :1] + totals[:, :1]


class Poma:
    """Pooling by mixed attention, "poor man's attention": (n, E, H) -> (n, E, H - 8).

    h holds values (H - 8), scores (4) and weights (4). Each of the 4 slices takes a softmax mean of the values over the
    valid entities; each entity gets the sum of the 4 means in its own weights.
    """

    shared = False

    def __init__(self, valid: Tensor):
        lowest = torch.finfo(valid.dtype).min
        self.closed = ((1 - valid) * lowest).unsqueeze(2)  # (n, E, 1): added to the scores

    def mixed(self, h: Tensor) -> Tensor:
        values, scores, weights = h.split([h.shape[2] - 2 * POMA_SLICES, POMA_SLICES, POMA_SLICES], dim=2)
        means = torch.softmax(scores + self.closed, dim=1).mT @ values  # (n, 4, H - 8)
        return weights @ means

    def pool(self, h: Tensor, p: Tensor) -> None:
        p.copy_(self.mixed(h))

    def add_grad(self, dh: Tensor, dp: Tensor, h: Tensor) -> None:
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            dh += torch.autograd.grad(self.mixed(h), h, dp)[0]


POOLINGS: dict[str, type[Mean] | type[Causal] | type[Poma]] = {"MEAN": Mean, "CAUSAL": Causal, "POMA": Poma}
