"""Pooling in SWARM layers: how the entities of a set exchange information (Vollgraf 2019, arXiv 1906.09400).

First the formulas, `POOLINGS`: functions of the hidden states h (N, E, H) and the mask (N, E), for autograd. Then the same for
the recurrence in `common/models/swarm_fast.py`, which runs by default and is differentiated by hand, `FAST_POOLINGS`:
`FastMean` computes `mean_pool`.

A set without entities pools to 0 (POMA: to a mean over its padding), never to NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.models.deterministic import cumsum

POMA_SLICES = 4


def mean_pool(h: Tensor, mask: Tensor) -> Tensor:
    """Mean of h over the valid entities: (N, E, H) -> (N, 1, H)."""
    valid = mask.unsqueeze(2)
    return (h * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)


def causal_pool(h: Tensor, mask: Tensor) -> Tensor:
    """Mean of h over the valid entities up to and including each entity: (N, E, H) -> (N, E, H)."""
    valid = mask.unsqueeze(2)
    return cumsum(h * valid, 1) / valid.cumsum(1).clamp(min=1)


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


# ---- the same, channels first, in place and with a backward pass ---------------------------------------------------------
#
# Made for the mask of n sets. pool(h, p) fills in p from h (H, n, E); add_grad(dh, dp, h) adds to dh the gradient that reaches
# h through p. p has the shape (P, n, 1) if all entities of a set share it, (P, n, E) otherwise.


class FastMean:
    """`mean_pool` as a sum with weights (n, E). In bfloat16, sums are in float32."""

    shared = True

    def __init__(self, mask: Tensor, dtype: torch.dtype):
        valid = mask.to(torch.promote_types(dtype, torch.float32))
        self.weights = valid / valid.sum(1, keepdim=True).clamp(min=1)

    def pool(self, h: Tensor, p: Tensor) -> None:
        p.copy_((h * self.weights).sum(2, keepdim=True))

    def add_grad(self, dh: Tensor, dp: Tensor, h: Tensor) -> None:
        dh.addcmul_(dp, self.weights)


class FastCausal:
    """`causal_pool`. In bfloat16, counts and sums are in float32."""

    shared = False

    def __init__(self, mask: Tensor, dtype: torch.dtype):
        self.valid = mask.to(torch.promote_types(dtype, torch.float32))
        self.inverse_count = 1 / mask.cumsum(1).clamp(min=1).to(self.valid)

    def pool(self, h: Tensor, p: Tensor) -> None:
        torch.mul(cumsum(h * self.valid, 2), self.inverse_count, out=p)

    def add_grad(self, dh: Tensor, dp: Tensor, h: Tensor) -> None:
        """Entity e is in the means of e and all later ones: running sums of dp / count from the end of the set."""
        shares = dp * self.inverse_count
        dh += cumsum(shares.flip(2), 2).flip(2).mul_(self.valid)


class FastPoma:
    """`poma_pool`; its gradient by autograd."""

    shared = False

    def __init__(self, mask: Tensor, dtype: torch.dtype):
        self.mask = mask

    def pool(self, h: Tensor, p: Tensor) -> None:
        p.copy_(poma_pool(h.permute(1, 2, 0), self.mask).permute(2, 0, 1))

    def add_grad(self, dh: Tensor, dp: Tensor, h: Tensor) -> None:
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            p = poma_pool(h.permute(1, 2, 0), self.mask)
            dh += torch.autograd.grad(p, h, dp.permute(1, 2, 0))[0]


FastPooling = FastMean | FastCausal | FastPoma
FAST_POOLINGS: dict[str, type[FastPooling]] = {"MEAN": FastMean, "CAUSAL": FastCausal, "POMA": FastPoma}
