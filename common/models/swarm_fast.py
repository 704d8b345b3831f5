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
Whp p is computed once per set, if all entities of a set share p (MEAN), and together with Whh h otherwise.

Under autocast, the products and the stored gates have the lower precision. c, and sums over iterations and blocks (dWih, db,
dWhh, dWhp), are in float32: in bfloat16, a sum stands still once it is 256 times as large as what is added to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.models.pooling import FAST_POOLINGS, FastPooling

CACHED_ROWS = 2400  # entities in a block on a CPU: few enough that the gates of an iteration stay in its cache

Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # Wih (4H, n_in), bias (4H), Whh (4H, H), Whp (4H, P)


def fast_recurrence(
    x: Tensor, mask: Tensor, dropout_scale: Tensor | None, weights: Weights, pooling: str, n_iter: int, fuse: bool
) -> Tensor:
    """All iterations of a SWARM cell: x (N, E, n_in), mask (N, E), dropout_scale (n_iter, N, 1, H) -> [h, c] (N, E, 2H).

    Can be differentiated once, with respect to x and the weights. `fuse` compiles the pointwise part (torch.compile).
    """
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
        ctx.save_for_backward(x, Wih, bias, Whh, Whp, mask, dropout_scale, gates)
        ctx.make_pooling, ctx.fuse = make_pooling, fuse
        return hc

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dhc: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(dhc, ctx.saved_tensors, ctx.make_pooling, ctx.fuse), None, None, None, None, None


def _blocks(n_sets: int, n_entities: int, device: torch.device) -> Iterator[slice]:
    """Cut a batch into blocks of whole sets, which do not depend on each other; the batch is one block on a GPU."""
    size = max(1, CACHED_ROWS // max(1, n_entities)) if device.type == "cpu" else max(1, n_sets)
    for start in range(0, n_sets, size):
        yield slice(start, min(start + size, n_sets))


def _rows(a: Tensor) -> Tensor:
    """All entities of a block below each other, for a matrix product: (n, E, ...) -> (n E, ...), a view."""
    return a.flatten(0, 1)


class _RecurrentProduct:
    """Whh h + Whp p, and its gradients, over a block of sets.

    If all entities of a set share p (n, 1, P), its products are computed once per set. Otherwise, h (n, E, H) and p (n, E, P)
    lie side by side in hp (n, E, H + P), so that one product does for both. (With a shared p, hp is h alone.)
    """

    def __init__(self, Whh: Tensor, Whp: Tensor, shared: bool):
        self.Whh, self.Whp, self.shared = Whh, Whp, shared
        self.Whhp = torch.cat([Whh, Whp], 1)  # (4H, H + P)

    def buffers(self, n: int, E: int) -> tuple[Tensor, Tensor, Tensor]:
        """Uninitialised hp, h and p, or their gradients."""
        H, P = self.Whh.shape[1], self.Whp.shape[1]
        hp = self.Whh.new_empty(n, E, H if self.shared else H + P)
        return hp, hp[..., :H], self.Whh.new_empty(n, 1, P) if self.shared else hp[..., H:]

    def forward(self, x_term: Tensor, hp: Tensor, p: Tensor, gates: Tensor) -> None:
        """gates = x_term + Whh h + Whp p."""
        if self.shared:
            torch.add(x_term, p @ self.Whp.T, out=gates)
            _rows(gates).addmm_(_rows(hp), self.Whh.T)
        else:
            torch.addmm(_rows(x_term), _rows(hp), self.Whhp.T, out=_rows(gates))

    def backward(self, dgates: Tensor, hp: Tensor, p: Tensor, dWhhp: Tensor, dhp: Tensor, dp: Tensor) -> None:
        """dWhhp += dgates^T [h, p]; dh = Whh^T dgates, which is written into dhp; dp = Whp^T dgates."""
        if self.shared:
            dgates_of_set = dgates.sum(1, keepdim=True)  # (n, 1, 4H)
            dWhh, dWhp = dWhhp.split([self.Whh.shape[1], self.Whp.shape[1]], 1)
            _add_product(dWhh, dgates, hp)
            _add_product(dWhp, dgates_of_set, p)
            torch.mm(_rows(dgates), self.Whh, out=_rows(dhp))
            torch.mm(_rows(dgates_of_set), self.Whp, out=_rows(dp))
        else:
            _add_product(dWhhp, dgates, hp)
            torch.mm(_rows(dgates), self.Whhp, out=_rows(dhp))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a^T b over all sets and entities: a (n, E, A), b (n, E, B), total (A, B). The sum has the dtype of total."""
    if total.dtype == a.dtype:
        total.addmm_(_rows(a).T, _rows(b))
    else:
        total += _rows(a).T @ _rows(b)


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    mask: Tensor,
    dropout_scale: Tensor | None,
    make_pooling: type[FastPooling],
    n_iter: int,
    fuse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return [h, c] (N, E, 2H) and, if `keep`, the gates of all iterations (n_iter, N, E, 4H)."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    cell_forward = _compiled(_cell_forward_formula) if fuse else _cell_forward
    with torch.autocast(device, enabled=False):
        Wih, bias, Whh, Whp = (w.to(dtype) for w in weights)
        recurrent = _RecurrentProduct(Whh, Whp, make_pooling.shared)
        (N, E, _), H = x.shape, Whh.shape[1]
        hc = x.new_empty(N, E, 2 * H)
        kept_gates = x.new_empty(n_iter, N if keep else 0, E, 4 * H, dtype=dtype)
        for sets in _blocks(N, E, x.device):
            pooling = make_pooling(mask[sets], dtype)
            x_term = F.linear(x[sets].to(dtype), Wih, bias)  # (n, E, 4H)
            gates = torch.empty_like(x_term)
            hp, h, p = recurrent.buffers(len(x_term), E)
            c = torch.zeros_like(h, dtype=torch.promote_types(dtype, torch.float32))
            for t in range(n_iter):
                if keep:
                    gates = kept_gates[t, sets]
                if t == 0:
                    gates.copy_(x_term)  # h and p are 0
                else:
                    pooling.pool(h, p)
                    recurrent.forward(x_term, hp, p, gates)
                cell_forward(_rows(gates), _rows(c), _rows(h))
                if dropout_scale is not None:
                    h *= dropout_scale[t, sets]
            hc[sets, :, :H], hc[sets, :, H:] = h, c
    return hc, kept_gates


def _backward(
    dhc: Tensor, saved: tuple[Tensor, ...], make_pooling: type[FastPooling], fuse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, Wih, bias, Whh and Whp, from that of [h, c] (N, E, 2H)."""
    x, Wih, bias, Whh, Whp, mask, dropout_scale, kept_gates = saved
    (n_iter, N, E, _), (H, P), dtype = kept_gates.shape, (Whh.shape[1], Whp.shape[1]), kept_gates.dtype
    sum_dtype = torch.promote_types(dtype, torch.float32)
    dx = torch.empty_like(x)
    dWih, dbias = torch.zeros_like(Wih, dtype=sum_dtype), torch.zeros_like(bias, dtype=sum_dtype)
    dWhhp = dWih.new_zeros(4 * H, H + P)
    cell_backward = _compiled(_cell_backward_formula) if fuse else _cell_backward
    with torch.autocast(x.device.type, enabled=False):
        Wih, Whh, Whp = (w.to(dtype) for w in (Wih, Whh, Whp))
        recurrent = _RecurrentProduct(Whh, Whp, make_pooling.shared)
        for sets in _blocks(N, E, x.device):
            pooling, gates = make_pooling(mask[sets], dtype), kept_gates[:, sets]
            n = gates.shape[1]
            c = gates.new_empty(n_iter + 1, n, E, H, dtype=sum_dtype)  # c[t] goes into iteration t
            c[0] = 0
            for t in range(n_iter):
                _next_c(gates[t], c[t], out=c[t + 1])
            hp, h, p = recurrent.buffers(n, E)
            dhp, dh, dp = recurrent.buffers(n, E)
            dh.copy_(dhc[sets, :, :H])
            dc = dhc[sets, :, H:].to(sum_dtype, copy=True)
            dgates = torch.empty_like(gates[0])
            dx_term = torch.zeros_like(dgates, dtype=sum_dtype)  # gradient of Wih x + b: the sum of dgates over iterations
            tanh_c = torch.tanh(c[n_iter]).to(dtype)
            for t in reversed(range(n_iter)):
                if dropout_scale is not None:
                    dh *= dropout_scale[t, sets]
                cell_backward(*(_rows(a) for a in (gates[t], c[t], tanh_c, dh, dc, dgates)))
                dx_term += dgates
                if t == 0:
                    break  # h and p that go into the first iteration are 0
                torch.tanh(c[t], out=tanh_c)
                torch.mul(gates[t - 1, :, :, 2 * H : 3 * H], tanh_c, out=h)  # h = o tanh(c) of the iteration before
                if dropout_scale is not None:
                    h *= dropout_scale[t - 1, sets]
                pooling.pool(h, p)
                recurrent.backward(dgates, hp, p, dWhhp, dhp, dp)
                pooling.add_grad(dh, dp, h)
            dbias += dx_term.sum((0, 1))
            _add_product(dWih, dx_term, x[sets].to(dtype).to(sum_dtype))
            dx[sets] = dx_term.to(dtype) @ Wih
    dWhh, dWhp = dWhhp.split([H, P], 1)
    return dx, dWih, dbias, dWhh, dWhp


# ---- one iteration of the cell, pointwise: all tensors are (rows, ...) ---------------------------------------------------


def _next_c(gates: Tensor, c: Tensor, out: Tensor) -> None:
    """f c + i d. `out` may be c itself."""
    i, f, _, d = gates.chunk(4, -1)
    torch.mul(c, f, out=out)
    out.addcmul_(i, d)


def _cell_forward(gates: Tensor, c: Tensor, h: Tensor) -> None:
    """Turn Wih x + b + Whh h + Whp p into the gates and c into the next c, both in place; fill in h = o tanh(c)."""
    H = c.shape[-1]
    gates[:, : 3 * H].sigmoid_()
    gates[:, 3 * H :].tanh_()
    _next_c(gates, c, out=c)
    torch.tanh(c, out=h)
    h *= gates[:, 2 * H : 3 * H]


def _cell_backward(gates: Tensor, c_before: Tensor, tanh_c: Tensor, dh: Tensor, dc: Tensor, dgates: Tensor) -> None:
    """From the gradients of h and c to those of Wih x + b + Whh h + Whp p, in `dgates`, and of c_before, in `dc`."""
    H = dc.shape[-1]
    (i, f, o, d), (di, df, do, dd) = gates.chunk(4, -1), dgates.chunk(4, -1)
    torch.mul(dh, o, out=do)
    dc += torch.ops.aten.tanh_backward.grad_input(do, tanh_c, grad_input=do)
    torch.mul(dc, d, out=di)
    torch.mul(dc, c_before, out=df)
    torch.mul(dh, tanh_c, out=do)
    torch.mul(dc, i, out=dd)
    sigmoids, dsigmoids = gates[:, : 3 * H], dgates[:, : 3 * H]
    torch.ops.aten.sigmoid_backward.grad_input(dsigmoids, sigmoids, grad_input=dsigmoids)
    torch.ops.aten.tanh_backward.grad_input(dd, d, grad_input=dd)
    dc *= f


# The same two as formulas, for torch.compile, which makes one kernel of each; as they stand they would be slower.


def _cell_forward_formula(gates: Tensor, c: Tensor, h: Tensor) -> None:
    H = c.shape[-1]
    i, f, o = gates[:, : 3 * H].sigmoid().chunk(3, -1)
    d = gates[:, 3 * H :].tanh()
    c_new = f * c + i * d
    gates.copy_(torch.cat([i, f, o, d], -1))
    c.copy_(c_new)
    h.copy_(o * c_new.tanh())


def _cell_backward_formula(gates: Tensor, c_before: Tensor, tanh_c: Tensor, dh: Tensor, dc: Tensor, dgates: Tensor) -> None:
    i, f, o, d = gates.chunk(4, -1)
    dc_new = dc + dh * o * (1 - tanh_c * tanh_c)
    di, df, do, dd = dc_new * d, dc_new * c_before, dh * tanh_c, dc_new * i
    dgates.copy_(torch.cat([di * i * (1 - i), df * f * (1 - f), do * o * (1 - o), dd * (1 - d * d)], -1))
    dc.copy_(dc_new * f)


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, dynamic=True)
