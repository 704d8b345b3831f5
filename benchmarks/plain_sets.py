"""The plain formulations of the Set Transformer and the LSTM, as the original computes them: the measure for speed.

Parameters are those of `common.models.sets`, with the original's own operations and autograd for the rest. Attention projects
queries, keys and values of all entities, and copies them into one batch of (heads N) products; scores of padded queries are
multiplied by 0. The LSTM reads padding like entities: it is `SetLSTM` in batches without padding alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PlainAttention(nn.Module):
    """Queries x (N, Q, D), keys and values y (N, K, D), their masks (N, Q) and (N, K), 0 or 1 -> (N, Q, D)."""

    def __init__(self, d: int, n_heads: int):
        super().__init__()
        self.project_queries, self.project_keys, self.project_values = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.concatenation = nn.Linear(d, d)
        self.n_heads = n_heads

    def forward(self, x: Tensor, y: Tensor, mask_x: Tensor | None, mask_y: Tensor | None) -> Tensor:
        q = self.split(self.project_queries(x))
        k, v = self.split(self.project_keys(y)), self.split(self.project_values(y))
        scores = torch.bmm(q, k.mT) / q.shape[2] ** 0.5  # (heads N, Q, K)
        if mask_y is not None:
            scores = scores.masked_fill(mask_y.repeat(self.n_heads, 1).unsqueeze(1) == 0, torch.finfo(x.dtype).min)
        if mask_x is not None:
            scores = scores * mask_x.repeat(self.n_heads, 1).unsqueeze(2)
        attended = torch.bmm(scores.softmax(2), v)
        attended = attended.view(self.n_heads, *x.shape[:2], -1).permute(1, 2, 0, 3).contiguous()
        return self.concatenation(attended.view(x.shape))

    def split(self, z: Tensor) -> Tensor:
        """(N, E, D) -> (heads N, E, D / heads)."""
        n, e, _ = z.shape
        return z.view(n, e, self.n_heads, -1).permute(2, 0, 1, 3).contiguous().view(self.n_heads * n, e, -1)


class PlainAttentionBlock(nn.Module):
    """`AttentionBlock`, with masks of queries and of keys."""

    def __init__(self, d: int, n_heads: int):
        super().__init__()
        self.multihead = PlainAttention(d, n_heads)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.rff = nn.Module()
        self.rff.layers = nn.Sequential(*(module for _ in range(4) for module in (nn.Linear(d, d), nn.ReLU())))

    def forward(self, x: Tensor, y: Tensor, mask_x: Tensor | None, mask_y: Tensor | None) -> Tensor:
        h = self.layer_norm1(x + self.multihead(x, y, mask_x, mask_y))
        return self.layer_norm2(h + self.rff.layers(h))


class PlainInducedBlock(nn.Module):
    """`InducedSetAttentionBlock`: (N, E, D), (N, E) -> (N, E, D)."""

    def __init__(self, d: int, n_heads: int, n_ind_points: int):
        super().__init__()
        self.inducing_points = nn.Parameter(torch.randn(n_ind_points, d))
        self.mab1, self.mab2 = PlainAttentionBlock(d, n_heads), PlainAttentionBlock(d, n_heads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        points = self.inducing_points.unsqueeze(0).repeat(len(x), 1, 1)
        return self.mab2(x, self.mab1(points, x, None, mask), mask, None) * mask.unsqueeze(2)


class PlainSetTransformer(nn.Module):
    """One block between linear layers: (N, E, n_in), (N, E) -> (N, E, n_out)."""

    def __init__(self, n_in: int, n_out: int, n_hidden: int = 128, n_heads: int = 4, n_ind_points: int = 10):
        super().__init__()
        block = PlainInducedBlock(n_hidden, n_heads, n_ind_points)
        self.mods = nn.ModuleList([nn.Linear(n_in, n_hidden), block, nn.Linear(n_hidden, n_out)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        first, block, last = self.mods
        return last(block(first(x), mask.to(x.dtype)))


class PlainLSTM(nn.Module):
    """One bidirectional layer over entities and padding: (N, E, n_in) -> (N, E, n_out). The mask has no effect."""

    def __init__(self, n_in: int, n_out: int, n_hidden: int = 128):
        super().__init__()
        self.lstm = nn.LSTM(n_in, n_hidden, batch_first=True, bidirectional=True)
        self.lin = nn.Linear(2 * n_hidden, n_out)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.lin(self.lstm(x)[0])
