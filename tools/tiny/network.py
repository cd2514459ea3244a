"""The trained network: Qwen3's layer under Hugging Face's tensor names, over [noisy | clean] rows.

Dims: T tokens of a packed row (both halves), others as in dlx.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

EPS = 1e-6
INIT_STD = 0.02

Mask = Tensor | BlockMask


@dataclass(frozen=True)
class Shape:
    """The dimensions of a network."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    theta: float = 10000.0


PRESETS = {
    "nano": Shape(hidden=96, layers=3, heads=3, kv_heads=1, head_dim=32, ffn=256, vocab=1024),  # 0.3 M
    "s": Shape(hidden=256, layers=8, heads=4, kv_heads=2, head_dim=64, ffn=704, vocab=4096),  # 7 M
    "m": Shape(hidden=384, layers=8, heads=6, kv_heads=2, head_dim=64, ffn=1024, vocab=4096),  # 14 M, bundled
}


@torch.compiler.disable(recursive=False)
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention where `mask` allows it: flex attention for a BlockMask, SDPA for a dense one.

    q  [B, H, T, D]    k, v  [B, G, T, D]    mask  [B, 1, T, T] bool, or a BlockMask
    →  [B, H, T, D]
    """
    if isinstance(mask, BlockMask):
        return _flex()(q, k, v, block_mask=mask, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@cache
def _flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, T, D] by angles [B, 1, T, D]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Norm(nn.Module):
    """Root mean square norm over the last axis."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), EPS)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden, bias=False)
        self.q_norm, self.k_norm = Norm(shape.head_dim), Norm(shape.head_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        q, k, v = (
            rearrange(project(x), "B T (H D) -> B T H D", D=self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = (rearrange(y, "B T H D -> B H T D") for y in (self.q_norm(q), self.k_norm(k), v))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        return self.o_proj(rearrange(attend(q, k, v, mask), "B H T D -> B T (H D)"))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), MLP(shape)
        self.input_layernorm, self.post_attention_layernorm = Norm(shape.hidden), Norm(shape.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Network(nn.Module):
    """A decoder with tied embeddings; its state names are the checkpoint's without the leading `model.`."""

    frequencies: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden)
        into_residual = ("o_proj.weight", "down_proj.weight")
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                depth = math.sqrt(2 * shape.layers) if name.endswith(into_residual) else 1.0
                nn.init.normal_(weight, 0, INIT_STD / depth)
        exponents = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
        self.register_buffer("frequencies", shape.theta**-exponents, persistent=False)

    def forward(
        self,
        ids: Tensor,
        pos: Tensor,
        mask: Mask,
        embedded: Tensor | None = None,
        layers: Iterable[Callable[..., Tensor]] | None = None,
    ) -> Tensor:
        """Hidden states of tokens.

        ids, pos  [B, T] int64        embedded  [B, T, E], in place of the ids' embeddings
        layers    the layers as they are to be run, compiled for instance; None runs the module's own
        →         [B, T, E]
        """
        half = pos[..., None].float() * self.frequencies
        angles = torch.cat((half, half), -1)[:, None]
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(ids) if embedded is None else embedded
        for layer in self.layers if layers is None else layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., E] → [..., V] fp32."""
        return F.linear(hidden, self.embed_tokens.weight.to(hidden.dtype)).float()
