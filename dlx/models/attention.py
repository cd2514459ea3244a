"""The attention layer: project, normalise, rotate, store K/V into pages, attend to pages, project back."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from dlx.models.card import Card
from dlx.models.layers import Linear, RMSNorm, rotate
from dlx.ops import OPS
from dlx.ops.attention import View


class Attention(nn.Module):
    """x [B, C, E] → [B, C, E]; writes this layer's pages kv [2, P, S, G, D].

    q, k and v are one matrix [(H + 2G)·D, E]; q and k are normalised a head where the card says so.
    """

    def __init__(self, card: Card, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = card.heads, card.kv_heads, card.head_dim
        H, G, D = card.heads, card.kv_heads, card.head_dim
        self.qkv = Linear(card.hidden, (H + 2 * G) * D, device, dtype)
        self.q_norm = RMSNorm(D, card.eps, device, dtype)
        self.k_norm = RMSNorm(D, card.eps, device, dtype)
        self.out = Linear(H * D, card.hidden, device, dtype)

    def forward(self, x: Tensor, view: View, cos: Tensor, sin: Tensor, kv: Tensor) -> Tensor:
        H, G = self.heads, self.kv_heads
        q, k, v = rearrange(self.qkv(x), "b c (h d) -> b c h d", h=H + 2 * G).split((H, G, G), 2)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        OPS["kv_store"](k, v, kv, view.slots)
        out = OPS["attention"](q, kv, view.pages, view.seen, self.head_dim**-0.5)
        return self.out(rearrange(out, "b c h d -> b c (h d)"))
