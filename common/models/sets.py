"""Set-equivariant models: (N, E, n_in) and a mask (N, E) -> (N, E, n_out). Finite padding never changes a valid output.

The SWARM paper compares them in its clustering experiment (arXiv 1906.09400, section 4.1): stacks of SWARM layers, of set
linear layers (Zaheer et al. 2017, Deep Sets), of induced set attention blocks (Lee et al. 2019, Set Transformer, arXiv
1810.00825), and bidirectional LSTMs, which read the set as a sequence. Names of parameters are those of the published
checkpoints.

In every layer the mask is optional, and has booleans, integers or 0/1 floats (`common/masks.py`).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.masks import as_mask
from common.models.swarm import SwarmLayer

NON_LINEARITIES = {"relu": nn.ReLU, "elu": nn.ELU, "lrelu": nn.LeakyReLU}
MODEL_TYPES = ("Swarm", "SetLinear", "SetLinearMax", "SetTransformer", "LSTM", "LSTMS")


class SetLinear(nn.Module):
    """y = ffwd1(x) + pool(ffwd2(x)), pooled by the mean, or the maximum, over the valid entities (Deep Sets, eq. 4)."""

    def __init__(self, n_in: int, n_out: int, *, maximum: bool = False):
        super().__init__()
        self.ffwd1 = nn.Linear(n_in, n_out)
        self.ffwd2 = nn.Linear(n_in, n_out)
        self.maximum = maximum

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = as_mask(x, mask)
        own, shared = self.ffwd1(x), self.ffwd2(x)
        if self.maximum:
            pooled = shared.masked_fill(~mask.unsqueeze(2), -torch.inf).amax(1, keepdim=True)
            pooled = torch.where(mask.any(1)[:, None, None], pooled, 0)  # a set without entities
        else:
            pooled = masked_mean(shared, mask)
        return own + pooled


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the valid entities: (N, E, D), (N, E) -> (N, 1, D); zero for a set without any."""
    mask = as_mask(x, mask)
    count = mask.sum(1).clamp(min=1)[:, None, None]
    return torch.where(mask.unsqueeze(2), x, 0).sum(1, keepdim=True) / count


class MultiheadAttention(nn.Module):
    """Scaled dot-product attention of `n_heads` heads from queries (N, Q, D) to keys and values (N, K, D)."""

    def __init__(self, d: int, n_heads: int):
        super().__init__()
        if d % n_heads:
            raise ValueError(f"{d} channels do not split into {n_heads} heads")
        self.n_heads = n_heads
        linears = [nn.Linear(d, d) for _ in range(4)]
        for linear in linears:
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.project_queries, self.project_keys, self.project_values, self.concatenation = linears

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from x (N, Q, D) to the valid entities of y (N, K, D), `mask` (N, K): -> (N, Q, D)."""
        valid = None if mask is None else as_mask(y, mask)[:, None]  # (N, 1, K)
        limit = x.shape[2] // self.n_heads  # with fewer queries, or keys, it takes less time not to project the others
        if x.shape[1] < limit:
            return self.concatenation(self.from_few(x, y, valid).transpose(1, 2).flatten(2))
        if y.shape[1] < limit:
            return self.to_few(x, y, valid)
        q, k, v = self.heads(self.project_queries(x)), self.heads(self.project_keys(y)), self.heads(self.project_values(y))
        attended = F.scaled_dot_product_attention(q, k, v, None if valid is None else valid.unsqueeze(2))
        return self.concatenation(attended.transpose(1, 2).flatten(2))

    def heads(self, z: Tensor) -> Tensor:
        """(N, E, D) -> (N, heads, E, D / heads)."""
        return z.unflatten(2, (self.n_heads, -1)).transpose(1, 2)

    def from_few(self, x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
        """Attend from few queries: the mean of values is the value of the mean. -> (N, heads, Q, D / heads)."""
        scores = self.scores(self.heads(self.project_queries(x)), y, self.project_keys)
        attention = masked_softmax(scores, None if valid is None else valid.unsqueeze(2), 3)
        means = (attention.flatten(1, 2) @ y).unflatten(1, (self.n_heads, -1))  # (N, heads, Q, D)
        weight, bias = (p.unflatten(0, (self.n_heads, -1)) for p in (self.project_values.weight, self.project_values.bias))
        bias = bias.unsqueeze(1) if valid is None else bias.unsqueeze(1) * valid.any(2)[:, None, None]
        return means @ weight.mT + bias

    def to_few(self, x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
        """Attend to few keys, whose values are concatenated before they are summed up. -> (N, Q, D)."""
        scores = self.scores(self.heads(self.project_keys(y)), x, self.project_queries)
        attention = masked_softmax(scores, None if valid is None else valid.unsqueeze(3), 2)
        weight = self.concatenation.weight.T.unflatten(0, (self.n_heads, -1))  # (heads, D / heads, D)
        values = self.heads(self.project_values(y)) @ weight
        return attention.flatten(1, 2).mT @ values.flatten(1, 2) + self.concatenation.bias

    def scores(self, few: Tensor, many: Tensor, linear: nn.Linear) -> Tensor:
        """Scaled products of few (N, heads, F, D / heads) and the heads of linear(many), many (N, M, D): (N, heads, F, M)."""
        few = few / few.shape[3] ** 0.5
        weight, bias = linear.weight.unflatten(0, (self.n_heads, -1)), linear.bias.unflatten(0, (self.n_heads, -1, 1))
        return ((few @ weight).flatten(1, 2) @ many.mT).unflatten(1, (self.n_heads, -1)) + few @ bias


def masked_softmax(scores: Tensor, valid: Tensor | None, dim: int) -> Tensor:
    """Softmax over the valid entries; zero at the others."""
    if valid is None:
        return scores.softmax(dim)
    return scores.masked_fill(~valid, torch.finfo(scores.dtype).min).softmax(dim) * valid


class FeedForward(nn.Module):
    """Four linear layers, each followed by a ReLU."""

    def __init__(self, d: int):
        super().__init__()
        linears = [nn.Linear(d, d) for _ in range(4)]
        for linear in linears:
            nn.init.kaiming_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.layers = nn.Sequential(*(module for linear in linears for module in (linear, nn.ReLU())))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class AttentionBlock(nn.Module):
    """MAB (Set Transformer, eq. 6): h = LayerNorm(x + attention(x, y)), then LayerNorm(h + feed-forward(h))."""

    def __init__(self, d: int, n_heads: int):
        super().__init__()
        self.multihead = MultiheadAttention(d, n_heads)
        self.layer_norm1 = nn.LayerNorm(d)
        self.layer_norm2 = nn.LayerNorm(d)
        self.rff: nn.Module = FeedForward(d)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from x (N, Q, D) to the valid entities of y (N, K, D), `mask` (N, K): -> (N, Q, D)."""
        h = self.layer_norm1(x + self.multihead(x, y, mask))
        return self.layer_norm2(h + self.rff(h))


class InducedSetAttentionBlock(nn.Module):
    """ISAB (Set Transformer, eq. 9): inducing points attend to the set, then the set attends to them. Linear in its size."""

    def __init__(self, d: int, n_heads: int, n_ind_points: int):
        super().__init__()
        self.inducing_points = nn.Parameter(torch.randn(n_ind_points, d))
        self.mab1 = AttentionBlock(d, n_heads)
        self.mab2 = AttentionBlock(d, n_heads)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        summary = self.mab1(self.inducing_points.expand(len(x), -1, -1), x, mask)  # (N, n_ind_points, D)
        return self.mab2(x, summary)


class SetStack(nn.Module):
    """Layers and non-linearities in turn. Set layers receive the mask; `dropout` follows each attention block."""

    def __init__(self, *mods: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.mods = nn.ModuleList(mods)
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = as_mask(x, mask)
        for module in self.mods:
            x = module(x, mask) if isinstance(module, SwarmLayer | SetLinear | InducedSetAttentionBlock) else module(x)
            if isinstance(module, InducedSetAttentionBlock) and self.dropout:
                # one mask for each set and channel: the same network for all entities of a set
                x = x * F.dropout(x.new_ones(len(x), 1, x.shape[2]), self.dropout, self.training)
        return x


class SetLSTM(nn.Module):
    """A bidirectional LSTM over the valid entities, in their order (not equivariant) or sorted by their first coordinate."""

    def __init__(self, n_in: int, n_out: int, n_hidden: int, n_layers: int, *, sort: bool = False, dropout: float = 0.0):
        super().__init__()
        self.lstm = nn.LSTM(n_in, n_hidden, n_layers, batch_first=True, bidirectional=True, dropout=dropout)
        self.lin = nn.Linear(2 * n_hidden, n_out)
        self.sort = sort

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n_in = self.lstm.input_size  # a packed sequence is not checked by torch
        if x.ndim != 3 or x.shape[2] != n_in or not x.is_floating_point():
            raise ValueError(f"input is {x.dtype} of shape {tuple(x.shape)}: the LSTM takes real numbers (N, E, {n_in})")
        mask = as_mask(x, mask)
        key = x[:, :, 0] if self.sort else torch.zeros_like(x[:, :, 0])
        order = torch.where(mask, key, torch.inf).argsort(dim=1, stable=True)  # padding last
        h = self.run(reordered(x, order), mask.sum(1, keepdim=True))
        return reordered(self.lin(h), order.argsort(1))

    def run(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Outputs of the LSTM (N, E, 2H) for sequences that begin with their valid entities, lengths (N, 1) in number.

        The second direction is a first one over the valid entities in reverse. (A packed sequence says the same, but it goes
        through Python's autograd step by step on a CPU, at a twentieth of the speed.)
        """
        position = torch.arange(x.shape[1], device=x.device)
        reverse = torch.where(position < lengths, lengths - 1 - position, position)  # (N, E), the inverse of itself
        for layer in range(self.lstm.num_layers):
            if layer:
                x = F.dropout(x, self.lstm.dropout, self.training)
            onward = self.run_direction(x, f"_l{layer}")
            x = torch.cat([onward, reordered(self.run_direction(reordered(x, reverse), f"_l{layer}_reverse"), reverse)], 2)
        return x

    def run_direction(self, x: Tensor, suffix: str) -> Tensor:
        weights = [getattr(self.lstm, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        start = x.new_zeros(1, len(x), self.lstm.hidden_size)
        return torch.lstm(x, (start, start), weights, True, 1, 0.0, self.training, False, True)[0]


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """Entities x (N, E, D) of each set in an order (N, E)."""
    return torch.gather(x, 1, order.unsqueeze(2).expand(-1, -1, x.shape[2]))


def make_set_model(
    kind: str,
    n_in: int,
    n_out: int,
    *,
    n_hidden: int = 128,
    n_layers: int = 1,
    n_iter: int = 5,
    non_lin: str = "relu",
    n_heads: int = 4,
    n_ind_points: int = 10,
    dropout: float = 0.0,
    pooling: str = "MEAN",
    fuse: bool = False,
) -> nn.Module:
    """Build a model of one of MODEL_TYPES, ignoring options that the type does not have.

    Raises ValueError for an unknown type or non-linearity, or sizes out of range.
    """
    if min(n_in, n_out, n_hidden, n_layers, n_iter, n_heads, n_ind_points) < 1 or not 0 <= dropout < 1:
        raise ValueError("sizes must be positive, and dropout in [0, 1)")
    if non_lin not in NON_LINEARITIES:
        raise ValueError(f"unknown non-linearity {non_lin!r}: choose from {', '.join(NON_LINEARITIES)}")
    widths = [n_in] + [n_hidden] * (n_layers - 1) + [n_out]
    layers: list[nn.Module]
    if kind == "Swarm":
        layers = [SwarmLayer(a, b, n_hidden, n_iter, pooling=pooling, dropout=dropout, fuse=fuse) for a, b in pairwise(widths)]
        return layers[0] if n_layers == 1 else SetStack(*_between(layers, non_lin))
    if kind in ("SetLinear", "SetLinearMax"):
        layers = [SetLinear(a, b, maximum=kind == "SetLinearMax") for a, b in pairwise(widths)]
        return SetStack(*_between(layers, non_lin))
    if kind == "SetTransformer":
        layers = [InducedSetAttentionBlock(n_hidden, n_heads, n_ind_points) for _ in range(n_layers)]
        return SetStack(nn.Linear(n_in, n_hidden), *layers, nn.Linear(n_hidden, n_out), dropout=dropout)
    if kind in ("LSTM", "LSTMS"):
        return SetLSTM(n_in, n_out, n_hidden, n_layers, sort=kind == "LSTMS", dropout=dropout)
    raise ValueError(f"unknown model type {kind!r}: choose from {', '.join(MODEL_TYPES)}")


def _between(layers: list[nn.Module], non_lin: str) -> list[nn.Module]:
    """layers[0], non-linearity, layers[1], non-linearity, ..."""
    modules = [module for layer in layers for module in (layer, NON_LINEARITIES[non_lin]())]
    return modules[:-1]
