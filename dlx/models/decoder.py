"""The decoder that every family shares: embed, layers, head. Static shapes, no state of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlx.models.attention import Attention
from dlx.models.card import Card
from dlx.models.layers import MLP, RMSNorm, parameter, rotation
from dlx.ops.attention import View


class Layer(nn.Module):
    """x += attention(norm x); x += mlp(norm x)."""

    def __init__(self, card: Card, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(card.hidden, card.eps, device, dtype)
        self.attn = Attention(card, device, dtype)
        self.mlp_norm = RMSNorm(card.hidden, card.eps, device, dtype)
        self.mlp = MLP(card.hidden, card.ffn, device, dtype)

    def forward(self, x: Tensor, view: View, cos: Tensor, sin: Tensor, kv: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), view, cos, sin, kv)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """A network as the step sees it: `embed`, `forward`, `head`.

    Parameters are uninitialised; `dlx.weights` fills them by the names of `named_parameters()`.
    """

    frequencies: Tensor

    def __init__(self, card: Card, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = parameter(card.vocab, card.hidden, device=device, dtype=dtype)
        self.layers = nn.ModuleList(Layer(card, device, dtype) for _ in range(card.layers))
        self.norm = RMSNorm(card.hidden, card.eps, device, dtype)
        self.lm_head = self.table if card.tied else parameter(card.vocab, card.hidden, device=device, dtype=dtype)
        half = torch.arange(0, card.head_dim, 2, dtype=torch.float32, device=device) / card.head_dim
        self.register_buffer("frequencies", card.theta**-half, persistent=False)

    def embed(self, tok: Tensor) -> Tensor:
        """Ids [B, C] int32 → [B, C, E]."""
        return F.embedding(tok, self.table)

    def forward(self, x: Tensor, view: View, kv: tuple[Tensor, ...]) -> Tensor:
        """[B, C, E] → [B, C, E] after the last norm; writes `kv[layer]` [2, P, S, G, D] at `view.slots`."""
        cos, sin = rotation(view.pos, self.frequencies, x.dtype)
        for layer, pages in zip(self.layers, kv, strict=True):
            x = layer(x, view, cos, sin, pages)
        return self.norm(x)

    def head(self) -> Tensor:
        """The LM head's weight [V, E]; `ops.candidates` takes it, logits stay inside the kernel."""
        return self.lm_head
