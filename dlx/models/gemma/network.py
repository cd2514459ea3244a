"""DiffusionGemma: a row is encoded (causal, a part of the prefix) or decoded (a canvas that sees itself whole).

    x += attn_out(attention(attn_in x))
    x += mlp_out(dense_out(mlp(mlp_in x)) + moe_out(experts(moe_in x)));  x *= scalar

The roles share all weights but a scalar a layer. Norms stand on both sides of every part and multiply in fp32, which
the fused matmuls do not express: they are plain torch, for Inductor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlx.models.card import Card
from dlx.models.layers import MLP, Linear, parameter
from dlx.ops import OPS
from dlx.ops.attention import View

CHUNK = 32768  # ids whose probabilities stand in memory at once


class Norm(nn.Module):
    """x / rms(x) · weight over the last axis, in fp32; cast to x's dtype at last."""

    def __init__(self, n: int, eps: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(n, device=device, dtype=dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return normal(x, self.eps, self.weight)


def normal(x: Tensor, eps: float, gain: Tensor | None = None) -> Tensor:
    """x / rms(x), times gain if there is one; in x's dtype."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if gain is None else wide * gain.float()).to(x.dtype)


def gated(mlp: MLP, x: Tensor) -> Tensor:
    """down(gelu(gate x) · up x) with an MLP's matrices."""
    gate, up = mlp.gate_up(x).chunk(2, -1)
    return mlp.down(F.gelu(gate, approximate="tanh") * up)


class Attention(nn.Module):
    """qkv [(H + 2G)·D, E], or q and k only where the layer sees everywhere: there v is the raw k. v is normalised.
    `scales` [2, P, G] are those of fp8 pages."""

    scales: Tensor | None

    def __init__(self, card: Card, layer: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        assert card.gemma is not None
        self.everywhere = card.gemma.everywhere[layer]
        self.kv_heads, D = card.kv[layer]
        self.heads, self.head_dim, self.eps = card.heads, D, card.eps
        stored = self.kv_heads if self.everywhere else 2 * self.kv_heads
        self.qkv = Linear(card.hidden, (card.heads + stored) * D, device, dtype)
        self.q_norm, self.k_norm = (Norm(D, card.eps, device, dtype) for _ in range(2))
        self.out = Linear(card.heads * D, card.hidden, device, dtype)
        self.register_buffer("scales", None, persistent=False)

    def forward(self, x: Tensor, view: View, first: Tensor | None, frequencies: Tensor, kv: Tensor) -> Tensor:
        """x [B, C, E] → [B, C, E]; writes this layer's pages kv [2, P, S, G, D]; first as of ops.attention."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        if self.everywhere:
            qkv = torch.cat((qkv, qkv[:, :, self.heads :]), 2)
        q = OPS["kv_store"](
            qkv, self.q_norm.weight, self.k_norm.weight, view.pos, frequencies, kv, view.pages, view.seen, self.eps,
            self.scales, True,
        )  # fmt: skip
        first = None if self.everywhere else first
        y = OPS["attention"](q, kv, view.pages, view.seen, 1.0, first, None, self.scales)
        return self.out(y.flatten(2))


class Router(nn.Module):
    """Weights of the K experts of a token, from the stream itself: of its norm · scale / √E, renormalised, factored."""

    def __init__(self, card: Card, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        assert card.mixture is not None
        self.top_k, self.eps = card.mixture.active, card.eps
        self.weight = parameter(card.mixture.experts, card.hidden, device=device, dtype=torch.float32)
        self.scale = parameter(card.hidden, device=device, dtype=dtype)
        self.factor = parameter(card.mixture.experts, device=device, dtype=torch.float32)

    def forward(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, E] → ids [T, K] int32, weights [T, K] f32; a row that sees nothing (seen [T]) chooses none."""
        x = normal(x, self.eps, self.scale.float() * x.shape[-1] ** -0.5)
        return OPS["route"](
            x, self.weight, None, None, self.factor, self.eps, self.top_k, 1, 1, False, True, 1.0, 0, seen
        )  # fmt: skip


class Layer(nn.Module):
    """Attention, then an MLP and experts side by side, each between two norms."""

    def __init__(self, card: Card, layer: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        assert card.mixture is not None
        E, X, J = card.hidden, card.mixture.experts, card.mixture.ffn
        self.attn = Attention(card, layer, device, dtype)
        self.mlp = MLP(E, card.ffn, device, dtype)
        self.router = Router(card, device, dtype)
        self.gate_up = parameter(X, 2 * J, E, device=device, dtype=dtype)
        self.down = parameter(X, E, J, device=device, dtype=dtype)
        norms = (Norm(E, card.eps, device, dtype) for _ in range(7))
        self.attn_in, self.attn_out, self.mlp_in, self.dense_out, self.moe_in, self.moe_out, self.mlp_out = norms
        self.scalars = parameter(2, device=device, dtype=dtype)  # of the encoder, of the decoder

    def bounds(self) -> Tensor:
        """[2, G] f32: what no number of a head's k and v passes, whatever the tokens; both are normalised."""
        gain = self.attn.k_norm.weight.float()
        both = self.attn.head_dim**0.5 * torch.stack((gain.abs().max(), torch.ones_like(gain[0])))
        return both[:, None].expand(2, self.attn.kv_heads).contiguous()

    def experts(self, x: Tensor, seen: Tensor) -> Tensor:
        """The experts' part for the stream x [B, C, E]; they see it normalised, their router does not."""
        ids, weights = self.router(x.flatten(0, 1), seen.flatten())
        y, _ = OPS["experts"](
            self.moe_in(x).flatten(0, 1), ids, weights, self.gate_up, self.down, None, self.router.eps, True
        )
        return y.view_as(x)

    def forward(self, x: Tensor, view: View, first: Tensor, frequencies: Tensor, kv: Tensor) -> Tensor:
        x = x + self.attn_out(self.attn(self.attn_in(x), view, first, frequencies, kv))
        y = self.dense_out(gated(self.mlp, self.mlp_in(x))) + self.moe_out(self.experts(x, view.seen))
        x = x + self.mlp_out(y)
        encoder, decoder = self.scalars
        scalar = encoder if view.encode is None else torch.where(view.encode, encoder, decoder)[:, None, None]
        return x * scalar


class DiffusionGemma(nn.Module):
    """A network as the canvas step sees it (see graphs/canvas.py); parameters are uninitialised."""

    frequencies: Tensor
    global_frequencies: Tensor

    def __init__(self, card: Card, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        assert card.gemma is not None
        facts = card.gemma
        self.eps, self.window, self.softcap = card.eps, facts.window, facts.softcap
        self.scale = float(torch.tensor(card.hidden**0.5, dtype=dtype))  # rounded as the published model rounds it
        self.table = parameter(card.vocab, card.hidden, device=device, dtype=dtype)
        layers = (Layer(card, i, device, dtype) for i in range(card.layers))
        self.layers = cast("Sequence[Layer]", nn.ModuleList(layers))
        self.norm = Norm(card.hidden, card.eps, device, dtype)
        self.condition_norm = Norm(card.hidden, card.eps, device, dtype)
        self.condition_mlp = MLP(card.hidden, card.ffn, device, dtype)
        half = torch.arange(0, card.head_dim, 2, dtype=torch.float32) / card.head_dim  # on meta it would import Dynamo
        self.register_buffer("frequencies", (card.theta**-half).to(device), persistent=False)
        half = torch.arange(0, facts.global_dim, 2, dtype=torch.float32)
        turning = half < 2 * facts.global_pairs
        turns = torch.where(turning, facts.global_theta ** -(half / facts.global_dim), 0.0)
        self.register_buffer("global_frequencies", turns.to(device), persistent=False)

    def embed(self, tok: Tensor) -> Tensor:
        """Ids [B, C] int32 → [B, C, E]."""
        return F.embedding(tok, self.table) * self.scale

    def condition(self, x: Tensor, soft: Tensor) -> Tensor:
        """A canvas' input: its embeddings x [B, C, E] and what the forward before expected, zeros at first."""
        return normal(x + gated(self.condition_mlp, self.condition_norm(soft)), self.eps)

    def forward(self, x: Tensor, view: View, kv: tuple[Tensor, ...]) -> Tensor:
        """[B, C, E] → [B, C, E] after the last norm; writes `kv[layer]` [2, P, S, G, D].

        A sliding layer shows a position that is encoded itself and the window − 1 before it; a canvas all of itself
        and the window − 1 before its first position.
        """
        origin = view.pos if view.encode is None else torch.where(view.encode[:, None], view.pos, view.pos[:, :1])
        first = (origin - (self.window - 1)).contiguous()
        for layer, pages in zip(self.layers, kv, strict=True):
            turns = self.global_frequencies if layer.attn.everywhere else self.frequencies
            x = layer(x, view, first, turns, pages)
        return self.norm(x)

    def head(self) -> Tensor:
        """The LM head's weight [V, E]: the embedding."""
        return self.table

    def expected(self, h: Tensor, temp: Tensor, best: Tensor, p: Tensor, vocab: int) -> Tensor:
        """Σ softmax(z) · embedding over the first `vocab` ids, [T, E]; z = softcap · tanh(h · headᵀ / softcap) / temp.

        h [T, E]; best [T] the likeliest ids, p [T] f32 their probabilities, which give the sum of the softmax: so the
        vocabulary is walked in chunks, and z is never whole.
        """

        def z(logits: Tensor) -> Tensor:
            return self.softcap * torch.tanh(logits.float() / self.softcap) / temp[:, None]

        most = z((h.float() * self.table[best].float()).sum(-1, keepdim=True))
        total = torch.zeros_like(h, dtype=torch.float32)
        for part in self.table[:vocab].split(CHUNK):
            share = (z(F.linear(h, part)) - most).exp() * p[:, None]
            total = total + share.to(h.dtype) @ part
        return total.to(h.dtype) * self.scale
