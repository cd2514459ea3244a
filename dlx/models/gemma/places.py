"""Where DiffusionGemma's tensors go, under the names that transformers 5 writes, and others that stand for them."""

from __future__ import annotations

from dlx.models import Family
from dlx.models.card import Card, Place
from dlx.models.gemma.network import DiffusionGemma

ENCODER, DECODER = "model.encoder.language_model.", "model.decoder."
SKIPPED = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")


def places(card: Card) -> dict[str, Place]:
    """Checkpoint tensor → the rows of a parameter that it fills; a layer has a scalar a role, all else is shared."""
    out = shared(card, DECODER)
    for i in range(card.layers):
        for row, role in enumerate((ENCODER, DECODER)):
            out[f"{role}layers.{i}.layer_scalar"] = Place(f"layers.{i}.scalars", row, (1,))
    return out


def stacked(card: Card) -> dict[str, Place]:
    """What may stand for all places of a parameter: the encoder's names, experts one by one under either's."""
    out = shared(card, ENCODER)
    m = card.mixture
    assert m is not None
    for role in (ENCODER, DECODER):
        for i in range(card.layers):
            for e in range(m.experts):
                name, row = f"{role}layers.{i}.experts.{e}.", 2 * m.ffn * e
                out[f"{name}gate_proj.weight"] = Place(f"layers.{i}.gate_up", row, (m.ffn, card.hidden))
                out[f"{name}up_proj.weight"] = Place(f"layers.{i}.gate_up", row + m.ffn, (m.ffn, card.hidden))
                out[f"{name}down_proj.weight"] = Place(f"layers.{i}.down", card.hidden * e, (card.hidden, m.ffn))
    return out


def shared(card: Card, role: str) -> dict[str, Place]:
    """The tensors that encoder and decoder have in common, under the name of either."""
    m = card.mixture
    assert card.gemma is not None and m is not None
    E, F, H, X, J = card.hidden, card.ffn, card.heads, m.experts, m.ffn
    out = {
        f"{role}embed_tokens.weight": Place("table", 0, (card.vocab, E)),
        f"{role}norm.weight": Place("norm.weight", 0, (E,)),
        f"{role}self_conditioning.pre_norm.weight": Place("condition_norm.weight", 0, (E,)),
        f"{role}self_conditioning.gate_proj.weight": Place("condition_mlp.gate_up.weight", 0, (F, E)),
        f"{role}self_conditioning.up_proj.weight": Place("condition_mlp.gate_up.weight", F, (F, E)),
        f"{role}self_conditioning.down_proj.weight": Place("condition_mlp.down.weight", 0, (E, F)),
    }
    for i, (G, D) in enumerate(card.kv):
        rows = {
            "self_attn.q_proj.weight": Place("attn.qkv.weight", 0, (H * D, E)),
            "self_attn.k_proj.weight": Place("attn.qkv.weight", H * D, (G * D, E)),
            "self_attn.q_norm.weight": Place("attn.q_norm.weight", 0, (D,)),
            "self_attn.k_norm.weight": Place("attn.k_norm.weight", 0, (D,)),
            "self_attn.o_proj.weight": Place("attn.out.weight", 0, (E, H * D)),
            "mlp.gate_proj.weight": Place("mlp.gate_up.weight", 0, (F, E)),
            "mlp.up_proj.weight": Place("mlp.gate_up.weight", F, (F, E)),
            "mlp.down_proj.weight": Place("mlp.down.weight", 0, (E, F)),
            "router.proj.weight": Place("router.weight", 0, (X, E)),
            "router.scale": Place("router.scale", 0, (E,)),
            "router.per_expert_scale": Place("router.factor", 0, (X,)),
            "experts.gate_up_proj": Place("gate_up", 0, (X, 2 * J, E)),
            "experts.down_proj": Place("down", 0, (X, E, J)),
            "input_layernorm.weight": Place("attn_in.weight", 0, (E,)),
            "post_attention_layernorm.weight": Place("attn_out.weight", 0, (E,)),
            "pre_feedforward_layernorm.weight": Place("mlp_in.weight", 0, (E,)),
            "post_feedforward_layernorm_1.weight": Place("dense_out.weight", 0, (E,)),
            "pre_feedforward_layernorm_2.weight": Place("moe_in.weight", 0, (E,)),
            "post_feedforward_layernorm_2.weight": Place("moe_out.weight", 0, (E,)),
            "post_feedforward_layernorm.weight": Place("mlp_out.weight", 0, (E,)),
        }
        if not card.gemma.everywhere[i]:
            rows["self_attn.v_proj.weight"] = Place("attn.qkv.weight", (H + G) * D, (G * D, E))
        for name, (param, row, shape) in rows.items():
            out[f"{role}layers.{i}.{name}"] = Place(f"layers.{i}.{param}", row, shape)
    return out


GEMMA = Family(DiffusionGemma, places, stacked, SKIPPED)
