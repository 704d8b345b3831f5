"""SWARM layers (Vollgraf 2019, Learning Set-equivariant Functions with SWARM Mappings, arXiv 1906.09400).

One LSTM-like cell, shared by all entities of a set, is run for a few iterations. Before each iteration the hidden states
are pooled over the set, so that each entity depends on all others:

    p = pool(h)                                         where entities exchange information (common/models/pooling.py)
    i, f, o, d = split(Wih x + b + Whh h + Whp p)       gates: input, forget, output; and the cell's input
    c = sigmoid(f) c + sigmoid(i) tanh(d)
    h = sigmoid(o) tanh(c)

and after the last one y = ffwd [h, c]. With MEAN or POMA pooling the layer is equivariant to permutations of the entities;
with CAUSAL pooling, entity e depends on entities up to and including e alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.masks import as_mask
from common.models.pooling import POMA_SLICES, POOLINGS
from common.models.swarm_fast import Weights, fast_recurrence
from common.processor import product


class SwarmCell(nn.Module):
    """The weights of the cell: gates from the input, the hidden state and the pooled hidden states.

    They are kernels of 1x1 convolutions, as published: Wih (4H, n_in, 1), Whh (4H, H, 1), Whp (4H, P, 1), for grids of two
    dimensions with one more axis of length 1. Rows in the order input, forget, output gate, cell input.
    """

    def __init__(self, n_in: int, n_hidden: int, n_pooled: int, n_dim: int = 1):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d}[n_dim]
        self.Wih = conv(n_in, 4 * n_hidden, 1)
        self.Whh = conv(n_hidden, 4 * n_hidden, 1, bias=False)
        self.Whp = conv(n_pooled, 4 * n_hidden, 1, bias=False)

    def matrices(self) -> Weights:
        """Wih (4H, n_in), its bias (4H), Whh (4H, H) and Whp (4H, P)."""
        assert self.Wih.bias is not None
        return self.Wih.weight.flatten(1), self.Wih.bias, self.Whh.weight.flatten(1), self.Whp.weight.flatten(1)


class SwarmLayer(nn.Module):
    """A SWARM layer: `n_iter` iterations of one cell over the entities of a set, then a linear map of [h, c].

    Entities lie on a line (n_dim 1) or a grid (n_dim 2, read row by row where the order matters). Input and output are
    channels last, (N, E, n_in) -> (N, E, n_out) and (N, rows, columns, n_in) -> ..., or channels first, (N, n_in, E) -> ...

    Valid entities do not depend on padding, where the mask is False, as long as it is finite. Dropout acts on h after every
    iteration, the last included, with one mask for each set, channel and iteration. Under autocast the matrix products have
    the lower precision; c stays in float32.

    `fast` runs the iterations with a backward pass written by hand (common/models/swarm_fast.py), which can be differentiated
    once; without it they are `iterate`, the formula under autograd. `fuse` runs the pointwise part of the fast iterations
    through torch.compile.

    Raises ValueError for sizes out of range, an unknown pooling, or an input or a mask that does not fit.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        n_hidden: int,
        n_iter: int,
        *,
        n_dim: int = 1,
        pooling: str = "MEAN",
        dropout: float = 0.0,
        channel_first: bool = False,
        fast: bool = True,
        fuse: bool = False,
    ):
        super().__init__()
        if min(n_in, n_out, n_hidden, n_iter) < 1:
            raise ValueError(f"sizes must be positive: n_in {n_in}, n_out {n_out}, n_hidden {n_hidden}, n_iter {n_iter}")
        if n_dim not in (1, 2):
            raise ValueError(f"n_dim {n_dim}: entities lie on a line (1) or a grid (2)")
        if pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {pooling!r}: choose from {', '.join(POOLINGS)}")
        if pooling == "POMA" and n_hidden <= 2 * POMA_SLICES:
            raise ValueError(f"POMA pooling takes {2 * POMA_SLICES} hidden units for itself: n_hidden {n_hidden} is too small")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout} is not in [0, 1)")
        if fuse and not fast:
            raise ValueError("fuse=True compiles the fast iterations: it needs fast=True")
        n_pooled = n_hidden - 2 * POMA_SLICES if pooling == "POMA" else n_hidden
        self.cell = SwarmCell(n_in, n_hidden, n_pooled, n_dim)
        self.ffwd = {1: nn.Conv1d, 2: nn.Conv2d}[n_dim](2 * n_hidden, n_out, 1)
        self.n_iter, self.n_dim, self.pooling, self.dropout = n_iter, n_dim, pooling, dropout
        self.channel_first, self.fast, self.fuse = channel_first, fast, fuse

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map a batch of sets; `mask` (N, E) or (N, rows, columns) is True, or 1, where an entity is valid."""
        if x.ndim != self.n_dim + 2:
            raise ValueError(f"input has shape {tuple(x.shape)}: a layer with n_dim {self.n_dim} takes {self.n_dim + 2} axes")
        if self.channel_first:
            x = x.movedim(1, -1)
        if x.shape[-1] != self.cell.Wih.in_channels or not x.is_floating_point():
            raise ValueError(
                f"input has {x.shape[-1]} channels of {x.dtype}, the layer takes {self.cell.Wih.in_channels} real ones"
            )
        grid, mask = x.shape[:-1], as_mask(x, mask).flatten(1)
        x = x.flatten(1, -2)  # (N, E, n_in)
        scale = self.dropout_scale(x) if self.training and self.dropout else None
        if self.fast:
            hc = fast_recurrence(x, mask, scale, self.cell.matrices(), self.pooling, self.n_iter, self.fuse)
        else:
            hc = self.iterate(x, mask, scale)
        y = F.linear(hc, self.ffwd.weight.flatten(1), self.ffwd.bias).view(*grid, self.ffwd.out_channels)
        return y.movedim(-1, 1) if self.channel_first else y

    def iterate(self, x: Tensor, mask: Tensor, dropout_scale: Tensor | None) -> Tensor:
        """The paper's iterations: x (N, E, n_in), mask (N, E), dropout_scale (n_iter, N, 1, H) -> [h, c] (N, E, 2H)."""
        Wih, bias, Whh, Whp = self.cell.matrices()
        pool = POOLINGS[self.pooling]
        h = x.new_zeros(*x.shape[:2], Whh.shape[1])
        c = h.to(torch.promote_types(h.dtype, torch.float32))
        for t in range(self.n_iter):
            p = pool(h, mask)  # (N, E, P), or (N, 1, P) if all entities of a set share it
            gates = F.linear(x, Wih, bias) + F.linear(h, Whh) + F.linear(p, Whp)  # (N, E, 4H)
            i, f, o, d = gates.chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * d.tanh()
            h = (o.sigmoid() * c.tanh()).to(x.dtype)
            if dropout_scale is not None:
                h = h * dropout_scale[t]
        return torch.cat([h, c.to(x.dtype)], dim=-1)

    def dropout_scale(self, x: Tensor) -> Tensor:
        """Factors of h (n_iter, N, 1, H): 0, or 1 / (1 - dropout); the same for all entities of a set."""
        ones = x.new_ones(self.n_iter, len(x), 1, self.cell.Whh.weight.shape[1])
        return F.dropout(ones, self.dropout)

    def extra_repr(self) -> str:
        return f"n_iter={self.n_iter}, pooling={self.pooling}, dropout={self.dropout}, channel_first={self.channel_first}"


class IncrementalSwarm:
    """A SWARM layer with CAUSAL pooling over N sequences whose entities come one at a time: n_iter cell steps for each.

    All it keeps of the earlier entities is the sum of their h in each iteration. A call takes the next entity (N, n_in) and
    returns the output of the layer for it (N, n_out), without gradients. The layer's weights must not change in between.

    With k entities so far, the last included, p = (sum + h) / k, sum over the earlier ones: Whp sum / k is computed for all
    iterations at once, and what is left to the iterations is one product, (Whh + Whp / k) h.

    Raises ValueError for a layer with another pooling.
    """

    @torch.no_grad()
    def __init__(self, layer: SwarmLayer, n: int):
        if layer.pooling != "CAUSAL":
            raise ValueError(
                f"{layer.pooling} pooling looks at entities that are still to come: only CAUSAL can go step by step"
            )
        self.Wih, self.bias, self.Whh, self.Whp = (weight.detach() for weight in layer.cell.matrices())
        self.ffwd, H = layer.ffwd, self.Whh.shape[1]
        self.W = torch.empty_like(self.Whh)  # Whh + Whp / k
        self.h = self.Whh.new_empty(layer.n_iter, n, H)  # after each iteration
        self.c = self.Whh.new_empty(n, H)
        self.gates = self.Whh.new_empty(layer.n_iter, n, 4 * H)
        self.parts = [(gates[:, : 3 * H], *gates.chunk(4, 1)) for gates in self.gates]  # of each iteration: ifo, i, f, o, d
        self.sums = torch.zeros_like(self.h[1:])
        self.count = self.Whh.new_zeros(())  # a tensor: steps may be replayed as a CUDA graph

    def __call__(self, x: Tensor) -> Tensor:
        return self.step(F.linear(x, self.Wih, self.bias))

    def reset(self) -> None:
        """Forget all entities."""
        self.sums.zero_()
        self.count.zero_()

    @torch.no_grad()
    def step(self, x_term: Tensor) -> Tensor:
        """The same, given Wih x + b of the next entity (N, 4H)."""
        self.count += 1
        torch.addcdiv(self.Whh, self.Whp, self.count, out=self.W)
        self.gates[:] = x_term
        self.gates[1:] += product((self.sums / self.count).flatten(0, 1), self.Whp.T).view_as(self.gates[1:])
        self.c.zero_()
        for t, (ifo, i, f, o, d) in enumerate(self.parts):
            if t > 0:
                self.gates[t].addmm_(self.h[t - 1], self.W.T)
            ifo.sigmoid_()
            self.c.mul_(f).addcmul_(i, d.tanh_())
            torch.tanh(self.c, out=self.h[t]).mul_(o)
        self.sums += self.h[:-1]
        return F.linear(torch.cat([self.h[-1], self.c], 1), self.ffwd.weight.flatten(1), self.ffwd.bias)
