"""The attention layer between its two projections: normalise and rotate, store K/V into pages, attend to pages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlx.models.card import Card
from dlx.models.layers import Linear, RMSNorm
from dlx.ops import OPS
from dlx.ops.attention import View


class Attention(nn.Module):
    """Holds qkv [(H + 2G)·D, E], one matrix (with a bias if the card says so), and out [E, H·D];
    q and k are normalised a head if the card says so."""

    def __init__(self, card: Card, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = card.eps
        H, G, D = card.heads, card.kv_heads, card.head_dim
        self.heads, self.head_dim = H + 2 * G, D
        self.qkv = Linear(card.hidden, self.heads * D, device, dtype, card.qkv_bias, card.fp8)
        self.q_norm = RMSNorm(D, card.eps, device, dtype) if card.qk_norm else None
        self.k_norm = RMSNorm(D, card.eps, device, dtype) if card.qk_norm else None
        self.out = Linear(H * D, card.hidden, device, dtype, fp8=card.fp8)

    def forward(self, qkv: Tensor, view: View, frequencies: Tensor, kv: Tensor) -> Tensor:
        """qkv [B, C, (H + 2G)·D] → [B, C, H·D]; writes this layer's pages kv [2, P, S, G, D]."""
        q_gain, k_gain = (None if norm is None else norm.weight for norm in (self.q_norm, self.k_norm))
        q = OPS["kv_store"](
            qkv.unflatten(-1, (self.heads, self.head_dim)), q_gain, k_gain, view.pos, frequencies, kv, view.pages,
            view.seen, self.eps,
        )  # fmt: skip
        return OPS["attention"](q, kv, view.pages, view.seen, self.head_dim**-0.5).flatten(2)
