"""The attention layer between its two projections: normalise and rotate, store K/V into pages, attend to pages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlx.models.card import Card
from dlx.models.layers import Linear, RMSNorm
from dlx.ops import OPS
from dlx.ops.attention import View


def attend(
    qkv: Tensor, q_gain: Tensor | None, k_gain: Tensor | None, scales: Tensor | None, view: View, frequencies: Tensor,
    kv: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """qkv [B, C, (H + 2G)·D] → [B, C, H·D]; writes this layer's pages kv [2, P, S, G, D]; see Attention."""
    D = kv.shape[-1]
    q = OPS["kv_store"](
        qkv.unflatten(-1, (-1, D)), q_gain, k_gain, view.pos, frequencies, kv, view.pages, view.seen, eps, scales
    )
    return OPS["attention"](q, kv, view.pages, view.seen, D**-0.5, None, None, scales).flatten(2)


class Attention(nn.Module):
    """Holds qkv [(H + 2G)·D, E], one matrix (with a bias if the card says so), and out [E, H·D];
    q and k are normalised a head if the card says so. `scales` [2, P, G] are those of fp8 pages."""

    scales: Tensor | None

    def __init__(self, card: Card, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = card.eps
        H, G, D = card.heads, card.kv_heads, card.head_dim
        self.heads, self.head_dim = H + 2 * G, D
        self.qkv = Linear(card.hidden, self.heads * D, device, dtype, card.qkv_bias, card.fp8)
        self.q_norm = RMSNorm(D, card.eps, device, dtype) if card.qk_norm else None
        self.k_norm = RMSNorm(D, card.eps, device, dtype) if card.qk_norm else None
        self.out = Linear(H * D, card.hidden, device, dtype, fp8=card.fp8)
        self.register_buffer("scales", None, persistent=False)

    def forward(self, qkv: Tensor, view: View, frequencies: Tensor, kv: Tensor) -> Tensor:
        """qkv [B, C, (H + 2G)·D] → [B, C, H·D]; writes this layer's pages kv [2, P, S, G, D]."""
        q_gain, k_gain = (None if norm is None else norm.weight for norm in (self.q_norm, self.k_norm))
        return attend(qkv, q_gain, k_gain, self.scales, view, frequencies, kv, self.eps)

    def bounds(self, gain: Tensor) -> Tensor:
        """[2, G] f32: what no number of a head's k and v passes, whatever the tokens; gain [E] of the norm before.

        |v| ≤ √E · ‖row of W · gain‖ + |bias|, as x / rms(x) has a norm of √E. k is the same and turns with another
        channel, so √2 more; normalised it is √D · max |its gain|, turned or not.
        """
        D = self.head_dim
        G = (self.heads - self.out.weight.shape[1] // D) // 2
        k, v = self.qkv.bounds(gain).unflatten(0, (self.heads, D))[-2 * G :].amax(1).split(G)
        if self.k_norm is None:
            return torch.stack((k * 2**0.5, v))
        return torch.stack((torch.full_like(k, D**0.5) * self.k_norm.weight.float().abs().max(), v))
