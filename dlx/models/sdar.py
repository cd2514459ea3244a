"""SDAR: Qwen3's decoder, block-causal. Its tensors have Qwen3's names."""

from __future__ import annotations

from dlx.models import Family
from dlx.models.card import Card, Place
from dlx.models.decoder import Decoder


def places(card: Card) -> dict[str, Place]:
    """Checkpoint tensor → the rows of a parameter that it fills."""
    E, F, D = card.hidden, card.ffn, card.head_dim
    q, kv = card.heads * D, card.kv_heads * D
    out = {
        "model.embed_tokens.weight": Place("table", 0, (card.vocab, E)),
        "model.norm.weight": Place("norm.weight", 0, (E,)),
    }
    if not card.tied:
        out["lm_head.weight"] = Place("lm_head", 0, (card.vocab, E))
    for i in range(card.layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        rows = {
            "input_layernorm": Place("attn_norm", 0, (E,)),
            "self_attn.q_proj": Place("attn.qkv", 0, (q, E)),
            "self_attn.k_proj": Place("attn.qkv", q, (kv, E)),
            "self_attn.v_proj": Place("attn.qkv", q + kv, (kv, E)),
            "self_attn.q_norm": Place("attn.q_norm", 0, (D,)),
            "self_attn.k_norm": Place("attn.k_norm", 0, (D,)),
            "self_attn.o_proj": Place("attn.out", 0, (E, q)),
            "post_attention_layernorm": Place("mlp_norm", 0, (E,)),
            "mlp.gate_proj": Place("mlp.gate_up", 0, (F, E)),
            "mlp.up_proj": Place("mlp.gate_up", F, (F, E)),
            "mlp.down_proj": Place("mlp.down", 0, (E, F)),
        }
        for name, (param, row, shape) in rows.items():
            out[f"{theirs}{name}.weight"] = Place(f"{ours}{param}.weight", row, shape)
    return out


SDAR = Family(build=Decoder, places=places)
