"""The decoder that every family shares: embed, layers, head. Static shapes, no state of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlx.models.attention import Attention
from dlx.models.card import Card
from dlx.models.dense import Dense, narrow_stack, numbered, wide, wide_stack
from dlx.models.layers import MLP, MoE, RMSNorm, parameter
from dlx.ops.attention import View
from dlx.ops.linear import MOST_ROWS, squared

# Positions of a forward up to which our matmuls are faster than cuBLAS': they read a weight once for each 64.
# SDAR-8B on an H200: 80 positions took 8.95 ms and 256 took 15.6 ms, by cuBLAS 8.17 ms.
FEW = 64


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

    def dense(self) -> Dense:
        """Its tensors, where there is nothing else: no experts, no adapters."""
        attn, mlp = self.attn, cast("MLP", self.mlp)
        q_gain, k_gain = (None if norm is None else norm.weight for norm in (attn.q_norm, attn.k_norm))
        return Dense(
            self.attn_norm.weight, attn.qkv.weight, attn.qkv.scale, attn.qkv.bias, q_gain, k_gain, attn.scales,
            attn.out.weight, attn.out.scale, self.mlp_norm.weight, mlp.gate_up.weight, mlp.gate_up.scale,
            mlp.down.weight, mlp.down.scale,
        )  # fmt: skip


class Decoder(nn.Module):
    """A network as the step sees it: `embed`, `forward`, `head`.

    Parameters are uninitialised; `dlx.weights` fills them by the names of `named_parameters()`.
    """

    frequencies: Tensor

    def __init__(self, card: Card, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = card.eps
        self.plain = card.mixture is None  # layers without experts and adapters
        self.fp8 = card.fp8
        self.table = parameter(card.vocab, card.hidden, device=device, dtype=dtype)
        self.layers = cast("Sequence[Layer]", nn.ModuleList(Layer(card, i, device, dtype) for i in range(card.layers)))
        self.norm = RMSNorm(card.hidden, card.eps, device, dtype)
        self.lm_head = self.table if card.tied else parameter(card.vocab, card.hidden, device=device, dtype=dtype)
        half = torch.arange(0, card.rotary, 2, dtype=torch.float32) / card.rotary  # on meta it would import Dynamo
        self.register_buffer("frequencies", (card.theta**-half).to(device), persistent=False)
        self.number = numbered(self)
        self.layer: Callable[..., tuple[Tensor, ...]] | None = None

    def embed(self, tok: Tensor) -> Tensor:
        """Ids [B, C] int32 → [B, C, E]."""
        return F.embedding(tok, self.table)

    def forward(self, x: Tensor, view: View, kv: tuple[Tensor, ...]) -> Tensor:
        """[B, C, E] → [B, C, E] after the last norm; writes `kv[layer]` [2, P, S, G, D]."""
        B, C, _ = x.shape
        few = MOST_ROWS if self.fp8 else min(FEW, MOST_ROWS)  # for cuBLAS fp8 weights are turned into bf16 first
        if few < B * C:
            return self.norm(self._wide(x, view, kv))
        h, squares = x.flatten(0, 1), squared(x.flatten(0, 1))
        a = h * self.layers[0].attn_norm.weight
        if self.plain:
            a, squares = narrow_stack(self, h, a, squares, view, kv)
        else:
            a, squares = self._narrow(h, a, squares, view, kv)
        scale = torch.rsqrt(squares.sum(1, keepdim=True) / x.shape[-1] + self.eps)
        return (a.float() * scale).to(x.dtype).unflatten(0, (B, C))

    def dense(self) -> list[Dense]:
        """The layers of a plain network."""
        return [layer.dense() for layer in self.layers]

    def head(self) -> Tensor:
        """The LM head's weight [V, E]; `ops.candidates` takes it, logits stay inside the kernel."""
        return self.lm_head

    def _narrow(
        self, h: Tensor, a: Tensor, squares: Tensor, view: View, kv: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """`dense.narrow` with experts or adapters, between whose ops Inductor has work."""
        B, C = view.seen.shape
        gains = [gain for layer in self.layers for gain in (layer.attn_norm.weight, layer.mlp_norm.weight)]
        gain = iter([*gains[1:], self.norm.weight])
        slot = None if view.lora is None else view.lora[:, None].expand(B, C).flatten()
        seen = view.seen.flatten()
        for layer, pages in zip(self.layers, kv, strict=True):
            attn = layer.attn
            qkv = attn.qkv.project(a, squares, self.eps, slot=slot)
            y = attn(qkv.unflatten(0, (B, C)), view, self.frequencies, pages).flatten(0, 1)
            h, a, squares = attn.out.accumulate(y, h, next(gain), slot)
            h, a, squares = layer.mlp.narrow(a, squares, h, next(gain), self.eps, seen, slot)
        return a, squares

    def _wide(self, x: Tensor, view: View, kv: tuple[Tensor, ...]) -> Tensor:
        """Many rows: matmuls by cuBLAS, what is between them by Inductor."""
        if self.plain:
            x, more = wide_stack(self, x, view, kv[:-1])
            x, more = wide(self.layers[-1].dense(), x, more, view, self.frequencies, kv[-1], self.eps)
            return x + more
        slot = None if view.lora is None else view.lora[:, None]
        for layer, pages in zip(self.layers, kv, strict=True):
            y = layer.attn(layer.attn.qkv(layer.attn_norm(x), slot), view, self.frequencies, pages)
            x = x + layer.attn.out(y, slot)
            x = x + layer.mlp(layer.mlp_norm(x), slot)
        return x
