"""The decoder that every family shares: embed, layers, head. Static shapes, no state of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlx.models.attention import Attention
from dlx.models.card import Card
from dlx.models.layers import MLP, MoE, RMSNorm, parameter
from dlx.ops.attention import View
from dlx.ops.linear import MOST_ROWS, squared


class Layer(nn.Module):
    """x += attention(norm x); x += mlp(norm x)."""

    def __init__(self, card: Card, at: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        mixture = None if card.mixture is None or at < card.mixture.dense else card.mixture
        self.attn_norm = RMSNorm(card.hidden, card.eps, device, dtype)
        self.attn = Attention(card, device, dtype)
        self.mlp_norm = RMSNorm(card.hidden, card.eps, device, dtype)
        self.mlp: MLP | MoE = (
            MLP(card.hidden, card.ffn, device, dtype, card.fp8)
            if mixture is None
            else MoE(card.hidden, mixture, device, dtype, card.fp8)
        )

    def bounds(self) -> Tensor:
        """[2, G] f32: what no number of a head's k and v passes, whatever the tokens."""
        return self.attn.bounds(self.attn_norm.weight)


class Decoder(nn.Module):
    """A network as the step sees it: `embed`, `forward`, `head`.

    Parameters are uninitialised; `dlx.weights` fills them by the names of `named_parameters()`.
    """

    frequencies: Tensor

    def __init__(self, card: Card, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = card.eps
        self.table = parameter(card.vocab, card.hidden, device=device, dtype=dtype)
        self.layers = cast("Sequence[Layer]", nn.ModuleList(Layer(card, i, device, dtype) for i in range(card.layers)))
        self.norm = RMSNorm(card.hidden, card.eps, device, dtype)
        self.lm_head = self.table if card.tied else parameter(card.vocab, card.hidden, device=device, dtype=dtype)
        half = torch.arange(0, card.rotary, 2, dtype=torch.float32) / card.rotary  # on meta it would import Dynamo
        self.register_buffer("frequencies", (card.theta**-half).to(device), persistent=False)

    def embed(self, tok: Tensor) -> Tensor:
        """Ids [B, C] int32 → [B, C, E]."""
        return F.embedding(tok, self.table)

    def forward(self, x: Tensor, view: View, kv: tuple[Tensor, ...]) -> Tensor:
        """[B, C, E] → [B, C, E] after the last norm; writes `kv[layer]` [2, P, S, G, D]."""
        B, C, _ = x.shape
        return (self._narrow if B * C <= MOST_ROWS else self._wide)(x, view, kv)

    def head(self) -> Tensor:
        """The LM head's weight [V, E]; `ops.candidates` takes it, logits stay inside the kernel."""
        return self.lm_head

    def _narrow(self, x: Tensor, view: View, kv: tuple[Tensor, ...]) -> Tensor:
        """Few rows: our matmuls, with norms, residual and SwiGLU fused into them. h is the stream, a = h · gain."""
        B, C, _ = x.shape
        h, squares = x.flatten(0, 1), squared(x.flatten(0, 1))
        gains = [gain for layer in self.layers for gain in (layer.attn_norm.weight, layer.mlp_norm.weight)]
        gain = iter([*gains[1:], self.norm.weight])
        slot = None if view.lora is None else view.lora[:, None].expand(B, C).flatten()
        a, seen = h * gains[0], view.seen.flatten()
        for layer, pages in zip(self.layers, kv, strict=True):
            attn = layer.attn
            qkv = attn.qkv.project(a, squares, self.eps, slot=slot)
            y = attn(qkv.unflatten(0, (B, C)), view, self.frequencies, pages).flatten(0, 1)
            h, a, squares = attn.out.accumulate(y, h, next(gain), slot)
            h, a, squares = layer.mlp.narrow(a, squares, h, next(gain), self.eps, seen, slot)
        scale = torch.rsqrt(squares.sum(1, keepdim=True) / x.shape[-1] + self.eps)
        return (a.float() * scale).to(x.dtype).unflatten(0, (B, C))

    def _wide(self, x: Tensor, view: View, kv: tuple[Tensor, ...]) -> Tensor:
        """Many rows: matmuls by cuBLAS, what is between them by Inductor."""
        slot = None if view.lora is None else view.lora[:, None]
        for layer, pages in zip(self.layers, kv, strict=True):
            y = layer.attn(layer.attn.qkv(layer.attn_norm(x), slot), view, self.frequencies, pages)
            x = x + layer.attn.out(y, slot)
            x = x + layer.mlp(layer.mlp_norm(x), slot)
        return self.norm(x)
