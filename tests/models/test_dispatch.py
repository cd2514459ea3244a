"""architectures[0] decides the family, whatever model_type says; both dialects of a config give the same card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dlx.errors import ModelError
from dlx.models import MODELS
from dlx.models.card import Card, Mixture
from dlx.models.families import ALIASES, FAMILIES

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def published(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ModelError) as caught:
        Card.from_hf(config, {})
    return str(caught.value)


def test_every_family_has_a_network() -> None:
    assert FAMILIES.keys() <= MODELS.keys()
    assert set(ALIASES.values()) <= FAMILIES.keys()


@pytest.mark.parametrize(
    ("name", "family", "mask_id", "stop_ids", "blocks"),
    [
        ("dream_7b", "dream", 151666, (151645, 151643), (32,)),
        ("diffucoder_7b", "dream", 151666, (151645, 151643), (32,)),
        ("dream_reasoner_8b", "dream_reasoner", 151669, (151645, 151643), (32,)),
        ("stable_diffcoder_8b", "stable_diffcoder", 5, (2,), (4,)),
        ("llada_8b", "llada", 126336, (126081, 126348), (32,)),
        ("fast_dllm_v2_7b", "fast_dllm_v2", 151665, (151645, 151643), (32,)),
        ("sdar_8b", "sdar", 151669, (151645, 151643), (4,)),
        ("sdar_30b_a3b", "sdar_moe", 151669, (151645, 151643), (4,)),
        ("llada_moe_7b_a1b", "llada_moe", 156895, (156892,), (32,)),
        ("llada2_flash", "llada2", 156895, (156892,), (32,)),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", None])
def test_a_published_config_gives_its_family_and_what_it_leaves_out(
    name: str, family: str, mask_id: int, stop_ids: tuple[int, ...], blocks: tuple[int, ...], model_type: str | None
) -> None:
    card = Card.from_hf(published(name) | {"model_type": model_type}, {})
    assert (card.family, card.mask_id, card.stop_ids, card.blocks) == (family, mask_id, stop_ids, blocks)
    full = family in ("dream", "llada", "llada_moe")
    assert (card.full, card.policy) == (full, "fast_dllm_v1" if full else "single_bd")
    assert card.shift == (family in ("dream", "fast_dllm_v2"))
    assert card.qkv_bias == card.shift
    assert card.qk_norm == (family not in ("dream", "fast_dllm_v2", "stable_diffcoder", "llada"))


def test_the_experts_of_each_kind() -> None:
    mixtures = [Card.from_hf(published(n), {}).mixture for n in ("sdar_30b_a3b", "llada_moe_7b_a1b", "llada2_mini")]
    assert mixtures == [
        Mixture(128, 8, 768, shared=0, dense=0, renormalise=True),
        Mixture(64, 8, 1024, shared=0, dense=0, renormalise=False),
        Mixture(256, 8, 512, 512, 1, True, sigmoid=True, bias=True, groups=8, top_groups=4, factor=2.5),
    ]


def test_olmo_keys_are_read() -> None:
    card = Card.from_hf(published("llada_8b"), {})
    assert (card.layers, card.hidden, card.heads, card.kv_heads, card.head_dim) == (32, 4096, 32, 32, 128)
    assert (card.ffn, card.vocab, card.eps, card.theta, card.max_len) == (12288, 126464, 1e-5, 5e5, 4096)


def test_half_of_the_channels_turn_in_llada2_in_both_dialects() -> None:
    old = published("llada2_mini")
    rope = {"rope_type": "default", "rope_theta": 600000, "partial_rotary_factor": 0.5}
    gone = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_dim")
    new = {k: v for k, v in old.items() if k not in gone} | {"rope_parameters": rope}
    assert Card.from_hf(old, {}) == Card.from_hf(new, {})
    assert Card.from_hf(new, {}).rotary == 64


def test_local_experts_are_experts() -> None:
    old = published("sdar_30b_a3b")
    new = {k: v for k, v in old.items() if k != "num_experts"} | {"num_local_experts": old["num_experts"]}
    assert Card.from_hf(old, {}) == Card.from_hf(new, {})


@pytest.mark.parametrize("sliding", [4096, None])
def test_the_sliding_window_and_layer_types_of_llada2_are_ignored(sliding: int | None) -> None:
    config = published("llada2_mini")
    changed = config | {"sliding_window": sliding, "layer_types": ["sliding_attention"] * 20}
    assert Card.from_hf(changed, {}) == Card.from_hf(config, {})


def test_a_llama_is_a_stable_diffcoder_only_by_its_auto_map() -> None:
    config = published("stable_diffcoder_8b") | {"architectures": ["LlamaForCausalLM"]}
    assert Card.from_hf(config, {}).arch == "StableDiffcoderForCausalLM"
    for auto_map in ({}, None, {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}):
        assert "'LlamaForCausalLM' is unknown" in refusal(config | {"auto_map": auto_map})


@pytest.mark.parametrize("alias", ALIASES)
def test_older_names_are_known(alias: str) -> None:
    name = {"StableDiffcoderForCausalLM": "stable_diffcoder_8b", "LLaDAMoEModelLM": "llada_moe_7b_a1b"}[ALIASES[alias]]
    assert Card.from_hf(published(name) | {"architectures": [alias]}, {}) == Card.from_hf(published(name), {})


def test_one_stop_id_of_the_family_means_all_of_them_and_a_list_only_those() -> None:
    config = published("llada_8b")
    assert Card.from_hf(config, {"eos_token_id": 126081}).stop_ids == (126081, 126348)
    assert Card.from_hf(config, {"eos_token_id": [126081]}).stop_ids == (126081,)


@pytest.mark.parametrize(
    ("name", "key", "value", "allowed"),
    [
        ("llada_8b", "alibi", True, "false"),
        ("llada_8b", "include_qkv_bias", True, "false for llada"),
        ("llada_8b", "activation_type", "gelu", '"silu"'),
        ("llada_8b", "d_model", 0, "an integer from 1"),
        ("llada_moe_7b_a1b", "moe_router_enable_expert_bias", True, "false"),
        ("llada_moe_7b_a1b", "moe_layer_freq", [0, 1], "1 for every layer"),
        ("llada_moe_7b_a1b", "shared_expert_intermediate_size", 64, "null"),
        ("llada2_mini", "score_function", "softmax", '"sigmoid"'),
        ("llada2_mini", "n_group", 7, "a divisor of num_experts=256"),
        ("llada2_mini", "topk_group", 9, "an integer from 1 to 8"),
        ("llada2_mini", "num_experts_per_tok", 257, "an integer from 1 to 256"),
        ("llada2_mini", "rotary_dim", 32, "= 64"),
        ("sdar_30b_a3b", "mlp_only_layers", [0], "[]"),
        ("sdar_30b_a3b", "num_experts", 0, "an integer from 1"),
        ("dream_7b", "partial_rotary_factor", 0.5, "1, as all channels turn"),
        ("llada2_mini", "partial_rotary_factor", 0, "a share above 0, 1 at most"),
        ("llada2_mini", "partial_rotary_factor", True, "a share above 0, 1 at most"),
        ("dream_7b", "attention_bias", False, "true for dream"),
    ],
)
def test_what_no_family_computes_is_refused_by_its_own_name(name: str, key: str, value: object, allowed: str) -> None:
    message = refusal(published(name) | {key: value})
    assert message.startswith(f"config.json: {key}={value!r} is not allowed; expected ")
    assert allowed in message
