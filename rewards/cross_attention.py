"""MPS's condition module: multi-query cross-attention with a gated feed-forward network in parallel."""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64  # of a head


def split_heads(x: Tensor) -> Tensor:
    """[B, n, heads * WIDTH] as [B, heads, n, WIDTH]."""
    return x.unflatten(-1, (-1, WIDTH)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None = None) -> Tensor:
    """Multi-query attention (Shazeer 2019).

    Args:
        q: queries [B, heads, n, WIDTH].
        k: one head of keys [B, 1, m, WIDTH].
        v: one head of values [B, 1, m, WIDTH].
        kept: true where a key is attended to, [B, 1, 1, m]; None for all.

    Returns:
        [B, n, heads * WIDTH].
    """
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kept).transpose(1, 2).flatten(2)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions 0..n-1 (Su et al. 2021, equation 34) on [B, heads, n, WIDTH], in pairs half a head
    apart.
    """
    half = WIDTH // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)[:, None] * frequencies
    first, second = x.split(half, -1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
    )


class SwiGLU(nn.Module):
    """x * silu(gate) of [.., 2 D] (Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, -1)
        return x * F.silu(gate)


class CrossAttention(nn.Module):
    """Cross-attention of image tokens [B, n, D] to prompt tokens [B, m, D] where `kept` [B, m] is true, plus
    a feed-forward network of the image tokens: [B, n, D].
    """

    def __init__(self, dim: int, heads: int, ff_mult: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * WIDTH, bias=False)
        self.to_kv = nn.Linear(dim, 2 * WIDTH, bias=False)
        self.to_out = nn.Linear(heads * WIDTH, dim, bias=False)
        widths = (dim, 2 * ff_mult * dim), (ff_mult * dim, dim)
        self.ff = nn.Sequential(
            nn.Linear(*widths[0], bias=False), SwiGLU(), nn.Linear(*widths[1], bias=False)
        )

    def forward(self, x: Tensor, context: Tensor, kept: Tensor) -> Tensor:
        x = self.norm(x)
        k, v = self.to_kv(context)[:, None].chunk(2, -1)
        return self.to_out(attend(split_heads(self.to_q(x)), k, v, kept[:, None, None])) + self.ff(x)


class ParallelBlock(nn.Module):
    """The parallel block of PaLM (Chowdhery et al. 2022) on [B, n, D]: self-attention with rotary positions
    plus a feed-forward network, both from one projection.
    """

    def __init__(self, dim: int, heads: int, ff_mult: int):
        super().__init__()
        self.widths = (heads * WIDTH, WIDTH, WIDTH, 2 * ff_mult * dim)
        self.norm = nn.LayerNorm(dim)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.attn_out = nn.Linear(heads * WIDTH, dim, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(ff_mult * dim, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.widths, -1)
        attended = attend(rotated(split_heads(q)), rotated(k[:, None]), v[:, None])
        return self.attn_out(attended) + self.ff_out(ff)


class CrossModel(nn.Module):
    """The condition module of MPS (Zhang et al. 2024, arXiv 2405.14705), image tokens [B, n, D] to
    [B, n, D].
    """

    def __init__(self, dim: int, layers: int = 4, heads: int = 16, ff_mult: int = 4):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([CrossAttention(dim, heads, ff_mult), ParallelBlock(dim, heads, ff_mult)])
            for _ in range(layers)
        )

    def forward(self, image: Tensor, prompt: Tensor, kept: Tensor) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)  # as __init__ made it
            cross, block = layer
            image = image + cross(image, prompt, kept)
            image = image + block(image)
        return image


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors under this module's names: residual wrappers and rotary constants left out."""
    rules = ((r"\.fn\.", "."), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))
    tensors = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if not name.endswith("inv_freq"):
            tensors[name] = tensor
    return tensors
