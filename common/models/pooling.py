"""Pooling in SWARM layers: how an entity hears of the others in its set (Vollgraf 2019, arXiv 1906.09400).

First the formulas, `POOLINGS`: functions of the hidden states h (N, E, H) and the mask (N, E), for autograd. Then the same for
the recurrence in `common/models/swarm_fast.py`, which runs by default and is differentiated by hand, `FAST_POOLINGS`:
`FastMean` computes `mean_pool`.

A set without entities pools to 0 (POMA: to a mean over its padding), never to NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

POMA_SLICES = 4


def mean_pool(h: Tensor, mask: Tensor) -> Tensor:
    """Mean of h over the valid entities: (N, E, H) -> (N, 1, H)."""
    valid = mask.unsqueeze(2)
    return (h * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)


def causal_pool(h: Tensor, mask: Tensor) -> Tensor:
    """Mean of h over the valid entities up to and including each entity: (N, E, H) -> (N, E, H)."""
    valid = mask.unsqueeze(2)
    return (h * valid).cumsum(1) / valid.cumsum(1).clamp(min=1)


def poma_pool(h: Tensor, mask: Tensor) -> Tensor:
    """Pooling by mixed attention, "poor man's attention": (N, E, H) -> (N, E, H - 8).

    h holds values (H - 8), scores (4) and weights (4). Each of the 4 slices takes a softmax mean of the values over the
    valid entities; each entity receives the sum of the 4 means under its own weights.
    """
    values, scores, weights = h.split([h.shape[2] - 2 * POMA_SLICES, POMA_SLICES, POMA_SLICES], dim=2)
    scores = scores.masked_fill(~mask.unsqueeze(2), torch.finfo(scores.dtype).min)
    means = torch.softmax(scores, dim=1).mT @ values  # (N, 4, H - 8)
    return weights @ means


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"MEAN": mean_pool, "CAUSAL": causal_pool, "POMA": poma_pool}


# ---- the same, in place and with a backward pass -------------------------------------------------------------------------
#
# Made for the mask of n sets. pool(h, p) fills in p; add_grad(dh, dp, h) adds to dh the gradient that reaches h through p.
# p has the shape (n, 1, P) if all entities of a set share it, (n, E, P) otherwise.


class FastMean:
    """`mean_pool` as a product with weights (n, 1, E)."""

    shared = True

    def __init__(self, mask: Tensor, dtype: torch.dtype):
        valid = mask.to(dtype)
        self.weights = (valid / valid.sum(1, keepdim=True).clamp(min=1)).unsqueeze(1)

    def pool(self, h: Tensor, p: Tensor) -> None:
        torch.bmm(self.weights, h, out=p)

    def add_grad(self, dh: Tensor, dp: Tensor, h: Tensor) -> None:
        dh.baddbmm_(self.weights.mT, dp)


class FastCausal:
    """`causal_pool` in chunks of 16 entities.

    The running sum within a chunk is a product with a triangle of ones, which costs little beside the products of the cell
    (a cumulative sum along E takes eight times as long). The sums of the chunks before are added to it. Entities that fill
    no chunk, at the end of a set, are a smaller one. In bfloat16, counts and sums over chunks are in float32.
    """

    shared = False
    CHUNK = 16

    def __init__(self, mask: Tensor, dtype: torch.dtype):
        n, E = mask.shape
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        self.valid = mask.unsqueeze(2)  # (n, E, 1)
        self.inverse_count = 1 / self.valid.cumsum(1, dtype=self.sum_dtype).clamp(min=1)  # (n, E, 1)
        self.chunks = []  # (entities, (n, chunks, size, -1), triangles (n, chunks, size, size)): full chunks, then the rest
        full = E - E % self.CHUNK
        for start, stop, size in ((0, full, self.CHUNK), (full, E, E - full)):
            if start < stop:
                shape = (n, (stop - start) // size, size, -1)
                triangles = torch.ones(size, size, dtype=dtype, device=mask.device).tril() * mask[:, start:stop].view(shape).mT
                self.chunks.append((slice(start, stop), shape, triangles))

    def pool(self, h: Tensor, p: Tensor) -> None:
        sum_before = torch.zeros((), dtype=self.sum_dtype, device=h.device)  # over all chunks before
        for entities, shape, triangles in self.chunks:
            sums = (triangles @ h[:, entities].view(shape)).to(self.sum_dtype)  # (n, chunks, size, H)
            sum_at_end = sum_before + sums[:, :, -1:].cumsum(1)  # (n, chunks, 1, H): including the chunk itself
            sums[:, :1] += sum_before
            sums[:, 1:] += sum_at_end[:, :-1]
            torch.mul(sums.flatten(1, 2), self.inverse_count[:, entities], out=p[:, entities])
            sum_before = sum_at_end[:, -1:]

    def add_grad(self, dh: Tensor, dp: Tensor, h: Tensor) -> None:
        """Entity e is in the means of e and all later ones: running sums of dp / count from the end of the set."""
        sum_after = torch.zeros((), dtype=self.sum_dtype, device=h.device)  # over all chunks after
        for entities, shape, triangles in reversed(self.chunks):
            shares = (dp[:, entities] * self.inverse_count[:, entities]).view(shape)  # (n, chunks, size, H)
            sums = (triangles.mT @ shares.to(triangles.dtype)).to(self.sum_dtype)
            chunk_sums = shares.sum(2, keepdim=True)
            sums_after = sum_after + chunk_sums.flip(1).cumsum(1).flip(1) - chunk_sums  # (n, chunks, 1, H)
            sums.addcmul_(sums_after, self.valid[:, entities].view(shape).to(self.sum_dtype))
            dh[:, entities] += sums.flatten(1, 2)
            sum_after = sums_after[:, :1] + chunk_sums[:, :1]


class FastPoma:
    """`poma_pool`; its gradient by autograd."""

    shared = False

    def __init__(self, mask: Tensor, dtype: torch.dtype):
        self.mask = mask

    def pool(self, h: Tensor, p: Tensor) -> None:
        p.copy_(poma_pool(h, self.mask))

    def add_grad(self, dh: Tensor, dp: Tensor, h: Tensor) -> None:
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            dh += torch.autograd.grad(poma_pool(h, self.mask), h, dp)[0]


FastPooling = FastMean | FastCausal | FastPoma
FAST_POOLINGS: dict[str, type[FastPooling]] = {"MEAN": FastMean, "CAUSAL": FastCausal, "POMA": FastPoma}
