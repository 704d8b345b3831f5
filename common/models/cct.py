"""Compact convolutional transformers of 32x32 images (Hassani et al. 2021, arXiv 2104.05704), in a form that can be stitched.

Convolutions turn an image into tokens, transformer blocks follow, and a learned weighting of the tokens is classified. The
blocks are a named Sequential, so that a block can be replaced by Sequential(block, stitching layer). As in the stitchable copy
of Godfrey et al. (NeurIPS 2022), whose keys these are, there is no stochastic depth.
"""

from __future__ import annotations

import re
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.deterministic import MaxPool2d

# blocks, heads, width of the MLP relative to that of the tokens, width of the tokens
SIZES = {2: (2, 1, 128), 4: (2, 1, 128), 6: (4, 2, 256), 7: (4, 2, 256)}
# cct_<blocks>_<kernel>x<convolutions>_<side of the images>: blocks, convolutions
ARCHITECTURES = {
    "cct_7_3x1_32": (7, 1),
    "cct_7_3x2_32": (7, 2),
    "cct_6_3x1_32": (6, 1),
    "cct_6_3x2_32": (6, 2),
    "cct_4_3x2_32": (4, 2),
    "cct_2_3x2_32": (2, 2),
}


class Tokenizer(nn.Module):
    """Convolutions, each with ReLU and pooling that halves the side: (B, 3, H, W) -> (B, tokens, embedding_dim)."""

    def __init__(self, embedding_dim: int, n_conv_layers: int):
        super().__init__()
        channels = [3, *[64] * (n_conv_layers - 1), embedding_dim]
        self.conv_layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.ReLU(), MaxPool2d(3, stride=2, padding=1))
                for n_in, n_out in pairwise(channels)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_layers(x).flatten(2).mT


class Attention(nn.Module):
    """Self-attention: (B, T, dim) -> (B, T, dim)."""

    def __init__(self, dim: int, n_heads: int, dropout: float):
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"{dim} features do not split into {n_heads} heads")
        self.n_heads, self.dropout = n_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, C // self.n_heads).permute(2, 0, 3, 1, 4)  # (B, heads, T, C / heads)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """Attention, then an MLP: (B, T, dim) -> (B, T, dim). `norm1` between the two is on the residual path itself."""

    def __init__(self, dim: int, n_heads: int, mlp_ratio: int, attention_dropout: float):
        super().__init__()
        self.pre_norm = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, n_heads, attention_dropout)
        self.linear1 = nn.Linear(dim, mlp_ratio * dim)
        self.norm1 = nn.LayerNorm(dim)
        self.linear2 = nn.Linear(mlp_ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(self.pre_norm(x)))
        return x + self.linear2(F.gelu(self.linear1(x)))


class Classifier(nn.Module):
    """Blocks, then a weighted mean of the tokens: (B, T, dim) -> (B, n_classes)."""

    def __init__(
        self, n_tokens: int, dim: int, n_layers: int, n_heads: int, mlp_ratio: int, n_classes: int, attention_dropout: float
    ):
        super().__init__()
        self.positional_emb = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, n_tokens, dim), std=0.2))
        self.attention_pool = nn.Linear(dim, 1)
        self.blocks = nn.Sequential()
        for i in range(n_layers):
            self.blocks.add_module(f"transformer_block_{i}", Block(dim, n_heads, mlp_ratio, attention_dropout))
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.blocks(x + self.positional_emb))
        weights = self.attention_pool(x).softmax(1)  # (B, T, 1)
        return self.fc((weights * x).sum(1))


class CCT(nn.Module):
    """Images (B, 3, img_size, img_size) -> logits (B, n_classes). Attention weights have dropout in training."""

    def __init__(
        self,
        *,
        n_layers: int,
        n_heads: int,
        mlp_ratio: int,
        embedding_dim: int,
        n_conv_layers: int = 1,
        img_size: int = 32,
        n_classes: int = 10,
        attention_dropout: float = 0.1,
    ):
        super().__init__()
        side = img_size
        for _ in range(n_conv_layers):
            side = (side + 1) // 2
        self.tokenizer = Tokenizer(embedding_dim, n_conv_layers)
        self.classifier = Classifier(side**2, embedding_dim, n_layers, n_heads, mlp_ratio, n_classes, attention_dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.tokenizer(x))


def cct(arch: str, n_classes: int = 10) -> CCT:
    """The transformer of one of ARCHITECTURES' names."""
    n_layers, n_conv_layers = ARCHITECTURES[arch]
    n_heads, mlp_ratio, dim = SIZES[n_layers]
    return CCT(
        n_layers=n_layers,
        n_heads=n_heads,
        mlp_ratio=mlp_ratio,
        embedding_dim=dim,
        n_conv_layers=n_conv_layers,
        n_classes=n_classes,
    )


def stitchable_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under this module's keys, from these or those of the plain transformer (classifier.blocks.<i>.)."""
    return {
        re.sub(r"^classifier\.blocks\.(\d+)\.", r"classifier.blocks.transformer_block_\1.", key): state[key] for key in state
    }
