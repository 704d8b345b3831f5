"""SWARM layers (Vollgraf 2019, Learning Set-equivariant Functions with SWARM Mappings, arXiv 1906.09400).

One LSTM-like cell, shared by all entities of a set, is run for a few iterations. Before each iteration the hidden states
are pooled over the set, so every entity hears what the others are doing:

    p = pool(h)                                         the only place where entities meet
    i, f, o, d = split(Wih x + b + Whh h + Whp p)       gates: input, forget, output; and the cell's input
    c = sigmoid(f) c + sigmoid(i) tanh(d)
    h = sigmoid(o) tanh(c)

and after the last one y = ffwd [h, c]. With MEAN or POMA pooling the layer is equivariant to permutations of the entities;
with CAUSAL pooling, entity e depends on entities up to and including e alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.pooling import POMA_SLICES, POOLINGS

CACHED_ROWS = 2400  # entities handled together on a CPU: few enough that the gates of an iteration stay in its cache


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


class SwarmLayer(nn.Module):
    """A SWARM layer: `n_iter` iterations of one cell over the entities of a set, then a linear map of [h, c].

    Entities lie on a line (n_dim 1) or a grid (n_dim 2, read row by row where the order matters). Input and output are
    channels last, (N, E, n_in) -> (N, E, n_out) and (N, rows, columns, n_in) -> ..., or channels first, (N, n_in, E) -> ...

    Valid entities do not depend on padding, where the mask is False, as long as it is finite. Dropout acts on h after every
    iteration, the last included, with one mask for each set, channel and iteration. Under autocast the matrix products and
    the stored gates have the lower precision; c stays in float32.

    `fuse` runs the pointwise part through torch.compile. The layer can be differentiated once.

    Raises ValueError for sizes out of range, an unknown pooling, or a mask that does not fit the input.
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
        n_pooled = n_hidden - 2 * POMA_SLICES if pooling == "POMA" else n_hidden
        self.cell = SwarmCell(n_in, n_hidden, n_pooled, n_dim)
        self.ffwd = {1: nn.Conv1d, 2: nn.Conv2d}[n_dim](2 * n_hidden, n_out, 1)
        self.n_iter, self.n_dim, self.pooling, self.dropout = n_iter, n_dim, pooling, dropout
        self.channel_first, self.fuse = channel_first, fuse

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
        grid = x.shape[:-1]
        if mask is not None and mask.shape != grid:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, the sets have {tuple(grid)}")
        x = x.flatten(1, -2)  # (N, E, n_in)
        valid = x.new_ones(x.shape[:2]) if mask is None else mask.flatten(1).to(x.dtype)

        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        scale = self.dropout_scale(x) if self.training and self.dropout else None
        Wih, Whh, Whp = (conv.weight.flatten(1) for conv in (self.cell.Wih, self.cell.Whh, self.cell.Whp))
        hc = _Recurrence.apply(
            x,
            valid,
            scale,
            Wih,
            self.cell.Wih.bias,
            Whh,
            Whp,
            self.pooling,
            self.n_iter,
            dtype,
            self.fuse,
            torch.is_grad_enabled(),
        )  # (N, E, 2H)
        y = F.linear(hc, self.ffwd.weight.flatten(1), self.ffwd.bias).view(*grid, self.ffwd.out_channels)
        return y.movedim(-1, 1) if self.channel_first else y

    def dropout_scale(self, x: Tensor) -> Tensor:
        """Factors of h (n_iter, N, 1, H): 0, or 1 / (1 - dropout); the same for all entities of a set."""
        ones = x.new_ones(self.n_iter, len(x), 1, self.cell.Whh.weight.shape[1])
        return F.dropout(ones, self.dropout)

    def extra_repr(self) -> str:
        return f"n_iter={self.n_iter}, pooling={self.pooling}, dropout={self.dropout}, channel_first={self.channel_first}"


class IncrementalSwarm:
    """A SWARM layer with CAUSAL pooling over N sequences whose entities come one at a time: n_iter cell steps for each.

    Of the entities before, the next one needs nothing but the sum of their h in each iteration. Calling it gives what the layer
    would for that entity, without gradients: (N, n_in) -> (N, n_out). The layer's weights must not change on the way.

    Raises ValueError for a layer with another pooling.
    """

    @torch.no_grad()
    def __init__(self, layer: SwarmLayer, n: int):
        if layer.pooling != "CAUSAL":
            raise ValueError(
                f"{layer.pooling} pooling looks at entities that are still to come: only CAUSAL can go step by step"
            )
        Whh, Whp = (conv.weight.flatten(1) for conv in (layer.cell.Whh, layer.cell.Whp))
        H, new = Whh.shape[1], Whh.new_zeros
        self.layer, self.Whhp = layer, torch.cat([Whh, Whp], 1).T.contiguous()  # (2H, 4H)
        self.sums, self.count = [new(n, H) for _ in range(layer.n_iter - 1)], 0
        self.hp, self.hc, self.gates = new(n, 2 * H), new(n, 2 * H), new(n, 4 * H)
        # views are made once: for a few sequences, making them takes as long as what is done with them
        self.h, self.p = self.hp.split(H, 1)
        self.last_h, self.c = self.hc.split(H, 1)
        self.gate_views = _gate_views(self.gates)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        Wih, ffwd = self.layer.cell.Wih, self.layer.ffwd
        h, c = self.h, self.c
        self.count += 1
        x_term = F.linear(x, Wih.weight.flatten(1), Wih.bias)
        self.gates.copy_(x_term)
        _cell_forward_views(self.gate_views, None, c, h)
        for sums in self.sums:
            sums += h
            torch.mul(sums, 1 / self.count, out=self.p)
            torch.addmm(x_term, self.hp, self.Whhp, out=self.gates)
            _cell_forward_views(self.gate_views, c, c, h)
        self.last_h.copy_(h)
        return F.linear(self.hc, ffwd.weight.flatten(1), ffwd.bias)


# ---- the cell ------------------------------------------------------------------------------------------------------------


def _gate_views(gates: Tensor) -> tuple[Tensor, ...]:
    """Parts of the gates (..., 4H): the three sigmoid ones together (..., 3H); then input, forget, output gate, cell input."""
    H = gates.shape[-1] // 4
    return (gates[..., : 3 * H], *gates.split(H, -1))


def _next_c(gates: Tensor, c_before: Tensor | None, c: Tensor) -> None:
    """c = f c_before + i d, from the gates (..., 4H) to c (..., H), which may be c_before itself; None stands for zero."""
    i, f, _, d = gates.split(c.shape[-1], -1)
    _mix_c(i, f, d, c_before, c)


def _mix_c(i: Tensor, f: Tensor, d: Tensor, c_before: Tensor | None, c: Tensor) -> None:
    if c_before is None:
        torch.mul(i, d, out=c)
    else:
        torch.mul(c_before, f, out=c)
        c.addcmul_(i, d)


def _cell_forward(gates: Tensor, c_before: Tensor | None, c: Tensor, h: Tensor) -> None:
    """Turn what enters the gates, (entities, 4H), into the gates, in place, and fill in c and h (entities, H)."""
    _cell_forward_views(_gate_views(gates), c_before, c, h)


def _cell_forward_views(gates: tuple[Tensor, ...], c_before: Tensor | None, c: Tensor, h: Tensor) -> None:
    sigmoids, i, f, o, d = gates
    sigmoids.sigmoid_()
    d.tanh_()
    _mix_c(i, f, d, c_before, c)
    torch.tanh(c, out=h)
    h *= o


def _cell_backward(
    gates: Tensor, c_before: Tensor | None, tanh_c: Tensor, dh: Tensor, dc: Tensor, dgates: Tensor, work: Tensor
) -> None:
    """From the gradients of h and c (entities, H) to those of what entered the gates (entities, 4H) and, in `dc`, c before."""
    H = dc.shape[-1]
    i, f, o, d = gates.split(H, -1)
    di, df, do, dd = dgates.split(H, -1)
    torch.mul(dh, o, out=work)
    torch.ops.aten.tanh_backward.grad_input(work, tanh_c, grad_input=work)
    dc += work
    torch.mul(dc, d, out=di)
    torch.mul(dc, i, out=dd)
    torch.mul(dh, tanh_c, out=do)
    if c_before is None:
        df.zero_()
    else:
        torch.mul(dc, c_before, out=df)
    sigmoids, dsigmoids = gates[..., : 3 * H], dgates[..., : 3 * H]
    torch.ops.aten.sigmoid_backward.grad_input(dsigmoids, sigmoids, grad_input=dsigmoids)
    torch.ops.aten.tanh_backward.grad_input(dd, d, grad_input=dd)
    dc *= f


# The same two as formulas, for torch.compile, which makes one kernel of each; as they stand they would be slower.


def _cell_forward_formula(gates: Tensor, c_before: Tensor | None, c: Tensor, h: Tensor) -> None:
    H = c.shape[-1]
    i, f, o = gates[..., : 3 * H].sigmoid().split(H, -1)
    d = gates[..., 3 * H :].tanh()
    c_new = i * d if c_before is None else f * c_before + i * d
    gates.copy_(torch.cat([i, f, o, d], -1))
    c.copy_(c_new)
    h.copy_(o * c_new.tanh())


def _cell_backward_formula(
    gates: Tensor, c_before: Tensor | None, tanh_c: Tensor, dh: Tensor, dc: Tensor, dgates: Tensor, work: Tensor
) -> None:
    i, f, o, d = gates.split(dc.shape[-1], -1)
    dc_new = dc + dh * o * (1 - tanh_c * tanh_c)
    df = torch.zeros_like(dc) if c_before is None else dc_new * c_before * f * (1 - f)
    do = dh * tanh_c * o * (1 - o)
    dgates.copy_(torch.cat([dc_new * d * i * (1 - i), df, do, dc_new * i * (1 - d * d)], -1))
    dc.copy_(dc_new * f)


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, dynamic=True)


# ---- the recurrence ------------------------------------------------------------------------------------------------------


def _blocks(n_sets: int, n_entities: int, device: torch.device) -> Iterator[slice]:
    """Cut a batch into runs of whole sets, which do not depend on each other, that fit a CPU's cache; one run on a GPU."""
    size = max(1, CACHED_ROWS // max(1, n_entities)) if device.type == "cpu" else max(1, n_sets)
    for start in range(0, n_sets, size):
        yield slice(start, min(start + size, n_sets))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a^T b over all sets and entities: a (n, E, A), b (n, E, B), total (A, B), which may be more precise."""
    a, b = a.flatten(0, 1), b.flatten(0, 1)
    if total.dtype == a.dtype:
        total.addmm_(a.T, b)
    else:
        total += a.T @ b


class _Recurrence(torch.autograd.Function):
    """All iterations of a SWARM cell: x (N, E, n_in) -> [h, c] (N, E, 2H), with a backward pass written by hand.

    Autograd keeps some 15 H numbers per entity and iteration, in buffers that are mapped afresh in every step. This keeps 4 H
    (the gates, from which c and h = o tanh(c) come back for a few products of numbers), computes Wih x once, and works through
    a batch in blocks that stay in the cache. A pooled value that is shared by a set is multiplied once per set; others lie
    beside h, in one buffer hp, so that Whh h + Whp p is one product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        valid: Tensor,
        scale: Tensor | None,
        Wih: Tensor,
        bias: Tensor,
        Whh: Tensor,
        Whp: Tensor,
        pooling: str,
        n_iter: int,
        dtype: torch.dtype,
        fuse: bool,
        keep: bool,
    ) -> Tensor:
        (N, E, _), (H, P) = x.shape, (Whh.shape[1], Whp.shape[1])
        blocks = list(_blocks(N, E, x.device))
        n_most = blocks[0].stop if blocks else 0
        gates = x.new_empty(*((n_iter, N) if keep else (1, n_most)), E, 4 * H, dtype=dtype)
        hc = x.new_empty(N, E, 2 * H)
        shared = POOLINGS[pooling].shared
        hp_space, x_space = (x.new_empty(n_most, E, width, dtype=dtype) for width in (H if shared else H + P, 4 * H))
        h_space = hp_space[..., :H]
        p_space = x.new_empty(n_most, 1, P, dtype=dtype) if shared else hp_space[..., H:]
        c_space = x.new_empty(n_most, E, H, dtype=torch.promote_types(dtype, torch.float32))
        cell_forward = _compiled(_cell_forward_formula) if fuse else _cell_forward

        with torch.autocast(x.device.type, enabled=False):
            Wih, bias, Whh, Whp = (w.to(dtype) for w in (Wih, bias, Whh, Whp))
            Whhp = torch.cat([Whh, Whp], 1)  # (4H, H + P)
            for sets in blocks:
                n = sets.stop - sets.start
                hp, h, p, c, x_term = (space[:n] for space in (hp_space, h_space, p_space, c_space, x_space))
                hp_rows, h_rows, c_rows, x_rows = (v.flatten(0, 1) for v in (hp, h, c, x_term))
                others = POOLINGS[pooling](valid[sets].to(dtype))
                torch.addmm(bias, x[sets].to(dtype).flatten(0, 1), Wih.T, out=x_rows)
                for t in range(n_iter):
                    g = gates[t, sets] if keep else gates[0, :n]
                    g_rows = g.view(n * E, 4 * H)
                    if t == 0:
                        g.copy_(x_term)
                    else:
                        others.pool(h, p)
                        if shared:
                            torch.add(x_term, p @ Whp.T, out=g)
                            g_rows.addmm_(h_rows, Whh.T)
                        else:
                            torch.addmm(x_rows, hp_rows, Whhp.T, out=g_rows)
                    cell_forward(g_rows, c_rows if t else None, c_rows, h_rows)
                    if scale is not None:
                        h *= scale[t, sets]
                hc[sets, :, :H] = h
                hc[sets, :, H:] = c
        if keep:
            ctx.save_for_backward(x, valid, scale, Wih, Whh, Whp, gates)
            ctx.pooling, ctx.fuse = pooling, fuse
        return hc

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dhc: Tensor) -> tuple[Tensor | None, ...]:
        x, valid, scale, Wih, Whh, Whp, gates = ctx.saved_tensors
        (N, E, _), (H, P), dtype = x.shape, (Whh.shape[1], Whp.shape[1]), gates.dtype
        n_iter = len(gates)
        blocks = list(_blocks(N, E, x.device))
        n_most = blocks[0].stop if blocks else 0
        dx, dbias = torch.empty_like(x), Wih.new_zeros(len(Wih))
        dWih, dWhhp = torch.zeros_like(Wih), Wih.new_zeros(len(Wih), H + P)
        shared = POOLINGS[ctx.pooling].shared
        hp_width = H if shared else H + P
        space = [x.new_empty(n_most, E, width, dtype=dtype) for width in (H, H, hp_width, hp_width, 4 * H, 4 * H)]
        p_space = x.new_empty(n_most, 1, P, dtype=dtype) if shared else space[2][..., H:]
        c_space = x.new_empty(n_iter + 1, n_most, E, H, dtype=torch.promote_types(dtype, torch.float32))
        cell_backward = _compiled(_cell_backward_formula) if ctx.fuse else _cell_backward

        with torch.autocast(x.device.type, enabled=False):
            Wih, Whh, Whp = (w.to(dtype) for w in (Wih, Whh, Whp))
            Whhp = torch.cat([Whh, Whp], 1)
            for sets in blocks:
                n = sets.stop - sets.start
                tanh_c, work, hp, dhp, dgates, dx_term = (buffer[:n] for buffer in space)
                *cells, dc = c_space[:, :n]
                h, p, dh, dp = hp[..., :H], p_space[:n], dhp[..., :H], dhp[..., H:]
                others = POOLINGS[ctx.pooling](valid[sets].to(dtype))
                dh.copy_(dhc[sets, :, :H])
                dc.copy_(dhc[sets, :, H:])
                for t in range(n_iter):
                    _next_c(gates[t, sets], cells[t - 1] if t else None, cells[t])
                torch.tanh(cells[-1], out=tanh_c)
                for t in reversed(range(n_iter)):
                    if scale is not None:
                        dh *= scale[t, sets]
                    c_before = cells[t - 1] if t else None
                    before = None if c_before is None else c_before.flatten(0, 1)
                    cell_backward(
                        gates[t, sets].flatten(0, 1), before, *(v.flatten(0, 1) for v in (tanh_c, dh, dc, dgates, work))
                    )
                    if t == n_iter - 1:
                        dx_term.copy_(dgates)
                    else:
                        dx_term += dgates
                    if c_before is None:
                        break
                    torch.tanh(c_before, out=tanh_c)
                    torch.mul(gates[t - 1, sets, :, 2 * H : 3 * H], tanh_c, out=h)  # h of the iteration before
                    if scale is not None:
                        h *= scale[t - 1, sets]
                    others.pool(h, p)
                    if shared:
                        dp_term = dgates.sum(1, keepdim=True)
                        _add_product(dWhhp[:, :H], dgates, h)
                        _add_product(dWhhp[:, H:], dp_term, p)
                        torch.mm(dgates.flatten(0, 1), Whh, out=dh.flatten(0, 1))
                        dp = dp_term @ Whp
                    else:
                        _add_product(dWhhp, dgates, hp)
                        torch.mm(dgates.flatten(0, 1), Whhp, out=dhp.flatten(0, 1))
                    others.add_grad(dh, dp, h)
                _add_product(dWih, dx_term, x[sets].to(dtype))
                dbias += dx_term.sum((0, 1))
                dx[sets] = dx_term @ Wih
        dWhh, dWhp = dWhhp.split([H, P], 1)
        return dx, None, None, dWih, dbias, dWhh, dWhp, None, None, None, None, None
