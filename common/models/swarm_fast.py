"""The iterations of a SWARM layer with a backward pass written by hand; the formula is in `common/models/swarm.py`.

Forward, for t = 0, ..., n_iter - 1, from h = c = 0, with s the dropout scale of iteration t:

    p = pool(h)
    gates = Wih x + b + Whh h + Whp p           rows i, f, o, d: sigmoid of i, f, o; tanh of d
    c = f c + i d
    h = s o tanh(c)

Backward, for t = n_iter - 1, ..., 0, from the gradients dh and dc of the last h and c; primes are derivatives of the
activations, (1 - i) i for i = sigmoid and 1 - d^2 for d = tanh:

    dh = s dh
    dc = dc + dh o tanh'(c)
    dgates = [dc d i', dc c_before f', dh tanh(c) o', dc i d']
    dWih += dgates^T x,   db += dgates,   dWhh += dgates^T h_before,   dWhp += dgates^T p,   dx += Wih^T dgates
    dp = Whp^T dgates
    dh = Whh^T dgates + pool'(h_before) dp
    dc = f dc

What makes it fast. Autograd keeps some 15 H numbers per entity and iteration; this keeps the gates (4 H), and computes c, h
and p again. Wih x is computed once. On a CPU, a batch is worked through in blocks of sets whose gates stay in the cache.
Whp p is computed once per set, if all entities of a set share p (MEAN), and together with Whh h otherwise. Channels come
first, (4H, n, E), so that each gate lies in one piece of memory, and a sum over entities runs along it.

Under autocast, the products and the stored gates have the lower precision. c, and sums over iterations and blocks (dWih, db,
dWhh, dWhp), are in float32: in bfloat16, a sum stands still once it is 256 times as large as what is added to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from common.models.pooling import FAST_POOLINGS, FastPooling
from common.processor import add_product, cache_size, product

Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # Wih (4H, n_in), bias (4H), Whh (4H, H), Whp (4H, P)


def fast_recurrence(
    x: Tensor, mask: Tensor, dropout_scale: Tensor | None, weights: Weights, pooling: str, n_iter: int, fuse: bool
) -> Tensor:
    """All iterations of a SWARM cell: x (N, E, n_in), mask (N, E), dropout_scale (n_iter, N, 1, H) -> [h, c] (N, E, 2H).

    Can be differentiated once, with respect to x and the weights. `fuse` compiles the pointwise part (torch.compile).
    """
    if dropout_scale is not None:
        dropout_scale = dropout_scale.permute(0, 3, 1, 2)  # channels first: (n_iter, H, N, 1)
    if torch.is_grad_enabled():
        return _Recurrence.apply(x, *weights, mask, dropout_scale, FAST_POOLINGS[pooling], n_iter, fuse)
    return _forward(x, weights, mask, dropout_scale, FAST_POOLINGS[pooling], n_iter, fuse, keep=False)[0]


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        Wih: Tensor,
        bias: Tensor,
        Whh: Tensor,
        Whp: Tensor,
        mask: Tensor,
        dropout_scale: Tensor | None,
        make_pooling: type[FastPooling],
        n_iter: int,
        fuse: bool,
    ) -> Tensor:
        hc, gates = _forward(x, (Wih, bias, Whh, Whp), mask, dropout_scale, make_pooling, n_iter, fuse, keep=True)
        ctx.save_for_backward(x, Wih, bias, Whh, Whp, mask, dropout_scale, *gates)
        ctx.make_pooling, ctx.fuse = make_pooling, fuse
        return hc

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dhc: Tensor) -> tuple[Tensor | None, ...]:
        saved, kept_gates = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
        return *_backward(dhc, saved, kept_gates, ctx.make_pooling, ctx.fuse), None, None, None, None, None


def _blocks(n_sets: int, gates_of_set: int, device: torch.device) -> Iterator[slice]:
    """Cut a batch into blocks of whole sets, which do not depend on each other; the batch is one block on a GPU.

    On a CPU the gates of a block, `gates_of_set` bytes a set, fill twice a core's cache: what is calculated at a time, half of
    them, stays there. Smaller blocks mean more calls. A set that is larger is a block of its own.
    """
    size = max(1, 2 * cache_size() // max(1, gates_of_set)) if device.type == "cpu" else max(1, n_sets)
    for start in range(0, n_sets, size):
        yield slice(start, min(start + size, n_sets))


def _columns(a: Tensor) -> Tensor:
    """All entities of a block side by side, for a matrix product: (C, n, E) -> (C, n E), a view."""
    return a.flatten(1)


class _RecurrentProduct:
    """Whh h + Whp p, and its gradients, over a block of sets.

    If all entities of a set share p (P, n, 1), its products are computed once per set. Otherwise, h (H, n, E) and p (P, n, E)
    lie one after the other in hp (H + P, n, E), so that one product does for both. (With a shared p, hp is h alone.)
    """

    def __init__(self, Whh: Tensor, Whp: Tensor, shared: bool):
        self.Whh, self.Whp, self.shared = Whh, Whp, shared
        self.Whhp = Whh if shared else torch.cat([Whh, Whp], 1)  # what hp is multiplied with

    def buffers(self, n: int, E: int) -> tuple[Tensor, Tensor, Tensor]:
        """Uninitialised hp, h and p."""
        H, P = self.Whh.shape[1], self.Whp.shape[1]
        hp = self.Whh.new_empty(self.Whhp.shape[1], n, E)
        return hp, hp[:H], self.Whh.new_empty(P, n, 1) if self.shared else hp[H:]

    def forward(self, x_term: Tensor, hp: Tensor, p: Tensor, gates: Tensor) -> None:
        """gates = x_term + Whh h + Whp p, (4H, n, E)."""
        if self.shared:
            torch.add(x_term, product(self.Whp, _columns(p)).unsqueeze(2), out=gates)
        else:
            gates.copy_(x_term)
        add_product(_columns(gates), self.Whhp, _columns(hp))

    def backward(self, dgates: Tensor, hp: Tensor, p: Tensor, dWhhp: Tensor) -> tuple[Tensor, Tensor]:
        """dWhhp += dgates [h, p]^T. Return dh = Whh^T dgates and dp = Whp^T dgates."""
        H = self.Whh.shape[1]
        dhp = product(self.Whhp.T, _columns(dgates)).view_as(hp)
        add_product(dWhhp[:, : len(hp)], _columns(dgates), _columns(hp).T)
        if not self.shared:
            return dhp[:H], dhp[H:]
        dgates_of_set = dgates.sum(2)  # (4H, n)
        add_product(dWhhp[:, H:], dgates_of_set, _columns(p).T)
        return dhp, product(self.Whp.T, dgates_of_set).unsqueeze(2)


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    mask: Tensor,
    dropout_scale: Tensor | None,
    make_pooling: type[FastPooling],
    n_iter: int,
    fuse: bool,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return [h, c] (N, E, 2H) and, if `keep`, the gates (n_iter, 4H, n, E) of each block."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    sum_dtype, work_dtype = _pointwise_dtypes(dtype, device)
    cell_forward = _compiled(_cell_forward_formula) if fuse else _cell_forward
    kept_gates = []
    with torch.autocast(device, enabled=False):
        Wih, bias, Whh, Whp = (w.to(dtype) for w in weights)
        recurrent = _RecurrentProduct(Whh, Whp, make_pooling.shared)
        (N, E, _), H = x.shape, Whh.shape[1]
        hc = x.new_empty(N, E, 2 * H)
        for sets in _blocks(N, 4 * H * E * sum_dtype.itemsize, x.device):
            pooling = make_pooling(mask[sets], dtype)
            x_block = x[sets].to(dtype)
            x_term = product(Wih, x_block.flatten(0, 1).T).add_(bias[:, None]).view(4 * H, len(x_block), E)
            hp, h, p = recurrent.buffers(len(x_block), E)
            c = torch.zeros_like(h, dtype=sum_dtype)
            gates = x_term.new_empty(n_iter if keep else 1, *x_term.shape)
            for t in range(n_iter):
                gates_now = gates[t if keep else 0]
                if t == 0:
                    gates_now.copy_(x_term)  # h and p are 0
                else:
                    pooling.pool(h, p)
                    recurrent.forward(x_term, hp, p, gates_now)
                work = gates_now.to(work_dtype)
                cell_forward(work, c, h)
                gates_now.copy_(work)  # nothing, where they are the same
                if dropout_scale is not None:
                    h *= dropout_scale[t, :, sets]
            if keep:
                kept_gates.append(gates)
            hc[sets, :, :H], hc[sets, :, H:] = h.permute(1, 2, 0), c.permute(1, 2, 0)
    return hc, kept_gates


def _backward(
    dhc: Tensor,
    saved: tuple[Tensor, ...],
    kept_gates: tuple[Tensor, ...],
    make_pooling: type[FastPooling],
    fuse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, Wih, bias, Whh and Whp, from that of [h, c] (N, E, 2H)."""
    x, Wih, bias, Whh, Whp, mask, dropout_scale = saved
    (N, E, _), H, P = x.shape, Whh.shape[1], Whp.shape[1]
    dtype, n_iter = (kept_gates[0].dtype, len(kept_gates[0])) if kept_gates else (x.dtype, 0)  # none of no sets
    sum_dtype, work_dtype = _pointwise_dtypes(dtype, x.device.type)
    dx = torch.empty_like(x)
    dWih, dbias = torch.zeros_like(Wih, dtype=sum_dtype), torch.zeros_like(bias, dtype=sum_dtype)
    dWhhp = dWih.new_zeros(4 * H, H + P)
    cell_backward = _compiled(_cell_backward_formula) if fuse else _cell_backward
    with torch.autocast(x.device.type, enabled=False):
        Wih, Whh, Whp = (w.to(dtype) for w in (Wih, Whh, Whp))
        recurrent = _RecurrentProduct(Whh, Whp, make_pooling.shared)
        for sets, kept in zip(_blocks(N, 4 * H * E * sum_dtype.itemsize, x.device), kept_gates, strict=True):
            pooling, n = make_pooling(mask[sets], dtype), kept.shape[2]
            c = kept.new_zeros(n_iter + 1, H, n, E, dtype=sum_dtype)  # c[t] goes into iteration t
            for t in range(n_iter):
                _next_c(kept[t].to(work_dtype), c[t], out=c[t + 1])
            hp, h, p = recurrent.buffers(n, E)
            dh, dc = torch.empty_like(c[0], dtype=work_dtype), torch.empty_like(c[0])
            dh.copy_(dhc[sets, :, :H].permute(2, 0, 1))
            dc.copy_(dhc[sets, :, H:].permute(2, 0, 1))
            gates, tanh_c = kept[-1].to(work_dtype), _tanh(c[-1], out=torch.empty_like(dc))
            dgates = torch.empty_like(gates)
            dx_term = torch.zeros_like(gates, dtype=sum_dtype)  # gradient of Wih x + b: the sum of dgates over iterations
            for t in reversed(range(n_iter)):
                if dropout_scale is not None:
                    dh *= dropout_scale[t, :, sets]
                cell_backward(gates, c[t], tanh_c, dh, dc, dgates)
                dx_term += dgates
                if t == 0:
                    break  # h and p that go into the first iteration are 0
                gates = kept[t - 1].to(work_dtype)
                _tanh(c[t], out=tanh_c)
                torch.mul(gates[2 * H : 3 * H], tanh_c, out=h)  # h = o tanh(c) of the iteration before
                if dropout_scale is not None:
                    h *= dropout_scale[t - 1, :, sets]
                pooling.pool(h, p)
                dh, dp = recurrent.backward(dgates.to(dtype), hp, p, dWhhp)
                dh = dh.to(work_dtype)
                pooling.add_grad(dh, dp, h)
            dbias += dx_term.sum((1, 2))
            add_product(dWih, _columns(dx_term), x[sets].flatten(0, 1).to(dtype).to(sum_dtype))
            dx[sets] = product(_columns(dx_term).to(dtype).T, Wih).view_as(x[sets])
    dWhh, dWhp = dWhhp.split([H, P], 1)
    return dx, dWih, dbias, dWhh, dWhp


# ---- one iteration of the cell, pointwise: all tensors are (channels, n, E) ----------------------------------------------


def _pointwise_dtypes(dtype: torch.dtype, device: str) -> tuple[torch.dtype, torch.dtype]:
    """Of c and sums, and of the gates: for operands of mixed dtypes, a CPU would make a copy of one of them every time."""
    sum_dtype = torch.promote_types(dtype, torch.float32)
    return sum_dtype, sum_dtype if device == "cpu" else dtype


def _tanh(x: Tensor, out: Tensor) -> Tensor:
    """tanh(x), which may be written into x; on a CPU as 2 sigmoid(2 x) - 1, several times as fast, to 1e-7 in float32."""
    if x.device.type == "cpu":
        return torch.mul(x, 2, out=out).sigmoid_().mul_(2).sub_(1)
    return torch.tanh(x, out=out)


def _next_c(gates: Tensor, c: Tensor, out: Tensor) -> None:
    """f c + i d. `out` may be c itself."""
    i, f, _, d = gates.chunk(4)
    torch.mul(c, f, out=out)
    out.addcmul_(i, d)


def _cell_forward(gates: Tensor, c: Tensor, h: Tensor) -> None:
    """Turn Wih x + b + Whh h + Whp p into the gates and c into the next c, both in place; fill in h = o tanh(c)."""
    H = len(c)
    gates[: 3 * H].sigmoid_()
    _tanh(gates[3 * H :], out=gates[3 * H :])
    _next_c(gates, c, out=c)
    torch.mul(gates[2 * H : 3 * H], _tanh(c, out=torch.empty_like(c)), out=h)


def _cell_backward(gates: Tensor, c_before: Tensor, tanh_c: Tensor, dh: Tensor, dc: Tensor, dgates: Tensor) -> None:
    """From the gradients of h and c to those of Wih x + b + Whh h + Whp p, in `dgates`, and of c_before, in `dc`."""
    H = len(dc)
    (i, f, o, d), (di, df, do, dd) = gates.chunk(4), dgates.chunk(4)
    torch.mul(dh, o, out=do)
    dc += torch.ops.aten.tanh_backward.grad_input(do, tanh_c, grad_input=do)
    torch.mul(dc, d, out=di)
    torch.mul(dc, c_before, out=df)
    torch.mul(dh, tanh_c, out=do)
    torch.mul(dc, i, out=dd)
    torch.ops.aten.sigmoid_backward.grad_input(dgates[: 3 * H], gates[: 3 * H], grad_input=dgates[: 3 * H])
    torch.ops.aten.tanh_backward.grad_input(dd, d, grad_input=dd)
    dc *= f


# The same two as formulas, for torch.compile, which makes one kernel of each; as they stand they would be slower.


def _cell_forward_formula(gates: Tensor, c: Tensor, h: Tensor) -> None:
    H = len(c)
    i, f, o = gates[: 3 * H].sigmoid().chunk(3)
    d = gates[3 * H :].tanh()
    c_new = f * c + i * d
    gates.copy_(torch.cat([i, f, o, d]))
    c.copy_(c_new)
    h.copy_(o * c_new.tanh())


def _cell_backward_formula(gates: Tensor, c_before: Tensor, tanh_c: Tensor, dh: Tensor, dc: Tensor, dgates: Tensor) -> None:
    i, f, o, d = gates.chunk(4)
    dc_new = dc + dh * o * (1 - tanh_c * tanh_c)
    di, df, do, dd = dc_new * d, dc_new * c_before, dh * tanh_c, dc_new * i
    dgates.copy_(torch.cat([di * i * (1 - i), df * f * (1 - f), do * o * (1 - o), dd * (1 - d * d)]))
    dc.copy_(dc_new * f)


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, dynamic=True)
