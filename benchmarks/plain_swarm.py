"""The plain formulation of a SWARM layer, as the original computes it: the measure for speed, and an independent check.

One 1x1 convolution per weight matrix in every iteration, the pooled vector expanded to every entity before it is multiplied,
and autograd for the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.swarm import SwarmCell


class PlainSwarmLayer(nn.Module):
    """(N, E, n_in), (N, E) -> (N, E, n_out); parameters as those of common.models.swarm.SwarmLayer."""

    def __init__(self, n_in: int, n_out: int, n_hidden: int, n_iter: int, pooling: str = "MEAN"):
        super().__init__()
        self.cell = SwarmCell(n_in, n_hidden, n_hidden - 8 if pooling == "POMA" else n_hidden)
        self.ffwd = nn.Conv1d(2 * n_hidden, n_out, 1)
        self.n_iter, self.pooling = n_iter, pooling

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x.mT  # (N, n_in, E)
        valid = torch.ones_like(x[:, :1]) if mask is None else mask.unsqueeze(1).to(x.dtype)
        h = c = None
        for _ in range(self.n_iter):
            gates = self.cell.Wih(x)
            if h is not None:
                gates = gates + self.cell.Whh(h) + self.cell.Whp(self.pool(h, valid))
            i, f, o, d = gates.chunk(4, dim=1)
            c = torch.tanh(d) * torch.sigmoid(i) + (0 if c is None else c * torch.sigmoid(f))
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.ffwd(torch.cat([h, c], dim=1)).mT

    def pool(self, h: Tensor, valid: Tensor) -> Tensor:
        if self.pooling == "MEAN":
            return ((h * valid).sum(2, keepdim=True) / valid.sum(2, keepdim=True).clamp(min=1)).expand_as(h)
        if self.pooling == "CAUSAL":
            return (h * valid).cumsum(2) / valid.cumsum(2).clamp(min=1)
        values, scores, weights = h[:, :-8], h[:, -8:-4], h[:, -4:]
        attention = F.softmax(scores.masked_fill(valid == 0, torch.finfo(h.dtype).min), dim=2)
        return torch.einsum("nke,npf,nkf->npe", weights, values, attention)
