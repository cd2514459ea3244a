"""Rename tables: what the tensors of a checkpoint are called, and which rows of which parameter they fill.

A table maps a name after the layer's prefix to (parameter, part); parts of one parameter lie in their order.
"""

from __future__ import annotations

from typing import NamedTuple

from dlx.models import Family
from dlx.models.card import Card, Mixture, Place
from dlx.models.decoder import Decoder

MLP = ("gate_proj", "up_proj", "down_proj")
STACKED = (("experts.w13_weight", "experts.w2_weight"), ("w1", "w2"), ("experts.gate_up_proj", "experts.down_proj"))


class Names(NamedTuple):
    """A dialect of tensor names; a layer's tensors follow `layer` and its number."""

    table: str
    norm: str
    head: str
    layer: str
    attn_norm: str
    qkv: tuple[str, ...]  # one matrix each, or one for all of them
    q_norm: str
    k_norm: str
    out: str
    mlp_norm: str
    mlp: str = "mlp."
    dense: tuple[str, ...] = MLP
    bias: str = "mlp.gate.expert_bias"

    def places(self, card: Card) -> dict[str, Place]:
        """Checkpoint tensor → the rows of a parameter that it fills; linear in their number."""
        E, V = card.hidden, card.vocab
        out = {self.table: Place("table", 0, (V, E)), self.norm: Place("norm.weight", 0, (E,))}
        if not card.tied:
            out[self.head] = Place("lm_head", 0, (V, E))
        for i in range(card.layers):
            theirs, ours = f"{self.layer}{i}.", f"layers.{i}."
            out.update(self._attention(card, theirs, ours))
            if card.mixture is None or i < card.mixture.dense:
                out.update(_mlp(theirs + self.mlp, self.dense, f"{ours}mlp.", card.ffn, E))
            else:
                out.update(self._mixture(card.mixture, theirs + self.mlp, theirs + self.bias, f"{ours}mlp.", E))
        return out

    def stacked(self, card: Card) -> dict[str, Place]:
        """Tensors that may stand for all of a layer's experts at once: gate over up [X, 2F, E], and down [X, E, F]."""
        out: dict[str, Place] = {}
        m = card.mixture
        if m is None:
            return out
        for i in range(m.dense, card.layers):
            for up, down in STACKED:
                prefix, ours = f"{self.layer}{i}.{self.mlp}", f"layers.{i}.mlp."
                out[prefix + up] = Place(f"{ours}gate_up", 0, (m.experts, 2 * m.ffn, card.hidden))
                out[prefix + down] = Place(f"{ours}down", 0, (m.experts, card.hidden, m.ffn))
        return out

    def _attention(self, card: Card, theirs: str, ours: str) -> dict[str, Place]:
        E, D = card.hidden, card.head_dim
        q, kv = card.heads * D, card.kv_heads * D
        out = {
            f"{theirs}{self.attn_norm}.weight": Place(f"{ours}attn_norm.weight", 0, (E,)),
            f"{theirs}{self.mlp_norm}.weight": Place(f"{ours}mlp_norm.weight", 0, (E,)),
            f"{theirs}{self.out}.weight": Place(f"{ours}attn.out.weight", 0, (E, q)),
        }
        row = 0
        for name, rows in zip(self.qkv, (q, kv, kv) if len(self.qkv) == 3 else (q + 2 * kv,), strict=True):
            out[f"{theirs}{name}.weight"] = Place(f"{ours}attn.qkv.weight", row, (rows, E))
            if card.qkv_bias:
                out[f"{theirs}{name}.bias"] = Place(f"{ours}attn.qkv.bias", row, (rows,))
            row += rows
        if card.qk_norm:
            out[f"{theirs}{self.q_norm}.weight"] = Place(f"{ours}attn.q_norm.weight", 0, (D,))
            out[f"{theirs}{self.k_norm}.weight"] = Place(f"{ours}attn.k_norm.weight", 0, (D,))
        return out

    def _mixture(self, m: Mixture, theirs: str, bias: str, ours: str, E: int) -> dict[str, Place]:
        out = {f"{theirs}gate.weight": Place(f"{ours}router", 0, (m.experts, E))}
        if m.bias:
            out[bias] = Place(f"{ours}bias", 0, (m.experts,))
        gate, up, down = MLP
        names = [f"{theirs}experts.{e}." for e in range(m.experts)]
        names += [f"{theirs}shared_experts."] if m.joined else []
        for e, name in enumerate(names):
            row = 2 * m.ffn * e
            out[f"{name}{gate}.weight"] = Place(f"{ours}gate_up", row, (m.ffn, E))
            out[f"{name}{up}.weight"] = Place(f"{ours}gate_up", row + m.ffn, (m.ffn, E))
            out[f"{name}{down}.weight"] = Place(f"{ours}down", E * e, (E, m.ffn))
        if m.shared and not m.joined:
            out.update(_mlp(f"{theirs}shared_experts.", MLP, f"{ours}shared.", m.shared, E))
        return out


def _mlp(theirs: str, names: tuple[str, ...], ours: str, F: int, E: int) -> dict[str, Place]:
    gate, up, down = names
    return {
        f"{theirs}{gate}.weight": Place(f"{ours}gate_up.weight", 0, (F, E)),
        f"{theirs}{up}.weight": Place(f"{ours}gate_up.weight", F, (F, E)),
        f"{theirs}{down}.weight": Place(f"{ours}down.weight", 0, (E, F)),
    }


_LLAMA = Names(
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.", "input_layernorm",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.q_norm", "self_attn.k_norm",
    "self_attn.o_proj", "post_attention_layernorm",
)  # fmt: skip
_LLADA = Names(  # ff_out is the head at the top and `down` in a block; ff_proj is `gate`
    "model.transformer.wte.weight", "model.transformer.ln_f.weight", "model.transformer.ff_out.weight",
    "model.transformer.blocks.", "attn_norm", ("q_proj", "k_proj", "v_proj"), "", "", "attn_out", "ff_norm",
    "", ("ff_proj", "up_proj", "ff_out"),
)  # fmt: skip
_LLADA2 = _LLAMA._replace(
    table="model.word_embeddings.weight",
    qkv=("attention.query_key_value",),
    q_norm="attention.query_layernorm",
    k_norm="attention.key_layernorm",
    out="attention.dense",
)

LLAMA = Family(Decoder, _LLAMA.places, _LLAMA.stacked)
LLADA = Family(Decoder, _LLADA.places, _LLADA.stacked)
LLADA2 = Family(Decoder, _LLADA2.places, _LLADA2.stacked)
