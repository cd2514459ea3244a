"""What DiffusionGemma's config.json says beside the facts of every card: two kinds of layers, in a text_config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dlx.models.fields import Fields, wrong

SLIDING, GLOBAL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class Gemma:
    """Facts that only DiffusionGemma has; kv_heads, head_dim and theta of its card are those of sliding layers.

    everywhere    whether a layer sees the whole prefix; the others see the last `window` positions
    global_pairs  channels j that turn with j + D / 2 in layers that see everything; further pairs stay
    softcap       of the logits: softcap · tanh(logit / softcap)
    """

    everywhere: tuple[bool, ...]
    window: int
    global_kv_heads: int
    global_dim: int
    global_theta: float
    global_pairs: int
    softcap: float


def flat(config: Mapping[str, object]) -> tuple[dict[str, object], Gemma]:
    """config.json with the keys of text_config and sliding layers' rope on top, and the facts of its own.

    Read as published (`global_head_dim`) and as transformers 5 writes it (`per_layer_config`).
    Raises ModelError  a key is missing or its value not allowed
    """
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise wrong("text_config", text, "an object with the facts of the text network")
    read = Fields(text)
    layers, heads = read.integer("num_hidden_layers"), read.integer("num_attention_heads")
    kinds = text.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in (SLIDING, GLOBAL) for kind in kinds):
        raise wrong("layer_types", kinds, f'a list of num_hidden_layers={layers} of "{SLIDING}", "{GLOBAL}"')
    everywhere = tuple(kind == GLOBAL for kind in kinds)
    dim, kv_heads = _of_global_layers(read, {str(i) for i, wide in enumerate(everywhere) if wide})
    if heads % kv_heads:
        raise wrong("num_global_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    if dim % 2:
        raise wrong("global_head_dim", dim, "an even number, as rotary embeddings turn pairs")
    ropes = text.get("rope_parameters")
    sliding, wide = (_rope(ropes, kind, way) for kind, way in ((SLIDING, "default"), (GLOBAL, "proportional")))
    share = wide.get("partial_rotary_factor", 1.0)
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise wrong("partial_rotary_factor", share, "a number above 0, 1 at most")
    own = Gemma(
        everywhere=everywhere,
        window=read.integer("sliding_window"),
        global_kv_heads=kv_heads,
        global_dim=dim,
        global_theta=Fields(wide).number("rope_theta"),
        global_pairs=int(share * dim // 2),
        softcap=read.number("final_logit_softcapping"),
    )
    top = {key: value for key, value in config.items() if value is not None and key != "text_config"}
    return {"tie_word_embeddings": True, **text, **top, "rope_parameters": sliding}, own


def _of_global_layers(read: Fields, of_global: set[str]) -> tuple[int, int]:
    """(D, G) of the layers that see everything; `per_layer_config` must give each of them the same, and no other."""
    layered = read.get("per_layer_config")
    if layered is None:
        default = read.integer("num_key_value_heads")
        return read.integer("global_head_dim"), read.integer("num_global_key_value_heads", default=default)
    values = list(layered.values()) if isinstance(layered, dict) else []
    if not values or not isinstance(layered, dict) or set(layered) != of_global or any(v != values[0] for v in values):
        raise wrong(
            "per_layer_config", layered, f"the same object for each of the layers {', '.join(sorted(of_global))}"
        )
    every = Fields({**read.config, **values[0]})
    return every.integer("head_dim"), every.integer("num_key_value_heads")


def _rope(ropes: object, kind: str, way: str) -> dict[str, object]:
    """The rope of a kind of layers."""
    rope = ropes.get(kind) if isinstance(ropes, dict) else None
    if not isinstance(rope, dict) or rope.get("rope_type") != way:
        raise wrong("rope_parameters", ropes, f'an object whose "{kind}" has "rope_type": "{way}"')
    return rope
