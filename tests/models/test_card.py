"""A card holds what the configs say, and says what is wrong with a config it cannot hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dlx.config import bind
from dlx.errors import ModelError, PolicyError
from dlx.models.card import Card
from dlx.models.families import FAMILIES

# the published config of SDAR-1.7B-Chat: neither block_size nor mask_token_id
PUBLISHED: dict[str, object] = {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 32768,
    "model_type": "sdar",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def without(*keys: str) -> dict[str, object]:
    return {key: value for key, value in PUBLISHED.items() if key not in keys}


def refusal(config: dict[str, object], generation: dict[str, object] | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        Card.from_hf(config, generation or {})
    return str(caught.value)


def test_the_published_config_gives_every_fact() -> None:
    assert Card.from_hf(PUBLISHED, {"eos_token_id": [151645, 151643]}) == Card(
        family="sdar",
        arch="SDARForCausalLM",
        layers=28,
        hidden=2048,
        heads=16,
        kv_heads=8,
        head_dim=128,
        rotary=128,
        ffn=6144,
        vocab=151936,
        eps=1e-6,
        theta=1e6,
        tied=False,
        qkv_bias=False,
        qk_norm=True,
        full=False,
        shift=False,
        policy="single_bd",
        mask_id=151669,
        stop_ids=(151645, 151643),
        pad_id=151643,
        blocks=(4, 8, 16, 32, 64),  # SDAR-1.7B-Chat-b32 has the same config
        max_len=32768,
    )


def test_the_bundled_model_declares_the_lengths_it_was_trained_at(tiny: Path) -> None:
    read = [json.loads((tiny / name).read_text()) for name in ("config.json", "generation_config.json")]
    card = Card.from_hf(*read)
    assert (card.blocks, card.mask_id, card.stop_ids, card.pad_id) == ((16, 32), 3, (2,), 0)
    assert (card.layers, card.hidden, card.heads, card.kv_heads, card.head_dim) == (8, 384, 6, 2, 64)
    assert (card.ffn, card.vocab, card.theta, card.tied, card.max_len) == (1024, 4096, 1e4, True, 2048)


@pytest.mark.parametrize("key", ["block_size", "block_length"])
@pytest.mark.parametrize("length", [8, 16, 32, 64])
def test_a_declared_block_length_is_taken(key: str, length: int) -> None:
    assert Card.from_hf(PUBLISHED | {key: length}, {}).blocks == (length,)


def test_of_sdars_that_do_not_declare_theirs_the_published_block_lengths_are_taken_and_no_others() -> None:
    card, declared = (Card.from_hf(PUBLISHED | more, {}) for more in ({}, {"block_size": 4}))
    assert [bind(None, card, L).L for L in (None, 8, 16, 32, 64)] == [4, 8, 16, 32, 64]
    for undecodable, L in ((card, 5), (declared, 8)):
        with pytest.raises(PolicyError, match="do not suit this sdar checkpoint"):
            bind(None, undecodable, L)


def test_the_default_block_length_comes_first_and_once() -> None:
    card = Card.from_hf(PUBLISHED | {"block_size": 8, "trained_block_lengths": [16, 8, 4]}, {})
    assert card.blocks == (8, 16, 4)


def test_the_newer_dialect_of_rotary_embeddings_is_read() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert Card.from_hf(without("rope_theta", "rope_scaling") | {"rope_parameters": rope}, {}).theta == 5e5


def test_an_unset_tie_is_no_tie_and_a_set_one_is() -> None:
    assert not Card.from_hf(without("tie_word_embeddings"), {}).tied
    assert Card.from_hf(PUBLISHED | {"tie_word_embeddings": True}, {}).tied


@pytest.mark.parametrize(
    ("config", "generation", "stop_ids"),
    [
        (PUBLISHED, {}, (151645, 151643)),  # config.json alone names only one of the two
        (without("eos_token_id"), {}, (151645, 151643)),
        (PUBLISHED | {"eos_token_id": 7}, {}, (7,)),
        (PUBLISHED | {"eos_token_id": [7, 8, 7]}, {}, (7, 8)),
        (PUBLISHED, {"eos_token_id": 9}, (9,)),
        (PUBLISHED, {"eos_token_id": [9, 10]}, (9, 10)),
    ],
)
def test_stop_ids_come_from_the_generation_config_first(
    config: dict[str, object], generation: dict[str, object], stop_ids: tuple[int, ...]
) -> None:
    card = Card.from_hf(config, generation)
    assert card.stop_ids == stop_ids
    assert card.pad_id == stop_ids[-1]  # none is declared


@pytest.mark.parametrize("named", [None, [], "SDARForCausalLM", [3]])
def test_architectures_must_name_the_network(named: object) -> None:
    message = refusal(PUBLISHED | {"architectures": named})
    assert "architectures" in message
    assert "dlx knows SDARForCausalLM" in message


def test_an_unknown_architecture_is_told_the_known_ones() -> None:
    message = refusal(PUBLISHED | {"architectures": ["LlamaForCausalLM"]})
    known = ", ".join(FAMILIES)
    assert message == f"config.json: the architecture 'LlamaForCausalLM' is unknown; dlx knows {known}"


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("hidden_act", "gelu", '"silu"'),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "null"),
        ("attention_bias", True, "false"),
        ("use_sliding_window", True, "false"),
        ("quantization_config", {"quant_method": "fp8"}, "null"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}, '"rope_type": "default"'),
        ("rope_parameters", {"rope_theta": 1e6, "partial_rotary_factor": 0.5}, '"rope_type": "default"'),
        ("rope_parameters", 1e6, 'an object with "rope_theta"'),
        ("num_hidden_layers", 0, "an integer from 1 to 2147483647"),
        ("num_hidden_layers", -3, "an integer from 1 to 2147483647"),
        ("num_hidden_layers", "28", "an integer from 1 to 2147483647"),
        ("num_hidden_layers", 28.0, "an integer from 1 to 2147483647"),
        ("num_hidden_layers", True, "an integer from 1 to 2147483647"),
        ("hidden_size", -1, "an integer from 1"),
        ("intermediate_size", [1], "an integer from 1"),
        ("vocab_size", 2**31, "an integer from 1 to 2147483647"),
        ("max_position_embeddings", 0, "an integer from 1"),
        ("num_attention_heads", 0, "an integer from 1"),
        ("num_key_value_heads", 5, "a divisor of num_attention_heads=16"),
        ("head_dim", 65, "an even number"),
        ("rms_norm_eps", 0, "a number above 0"),
        ("rms_norm_eps", float("nan"), "a number above 0"),
        ("rms_norm_eps", "1e-6", "a number above 0"),
        ("rope_theta", float("inf"), "a number above 0"),
        ("rope_theta", -1.0, "a number above 0"),
        ("tie_word_embeddings", "no", "true or false"),
        ("mask_token_id", 151936, "an integer from 0 to 151935"),
        ("mask_token_id", -1, "an integer from 0 to 151935"),
        ("mask_token_id", 151643, "none of the stop ids [151645, 151643]"),
        ("pad_token_id", 151936, "an integer from 0 to 151935"),
        ("eos_token_id", 151936, "from 0 to vocab_size - 1 = 151935"),
        ("eos_token_id", [], "an id, or a list of ids"),
        ("eos_token_id", [1, "2"], "an id, or a list of ids"),
        ("eos_token_id", [[1]], "an id, or a list of ids"),
        ("eos_token_id", "</s>", "an id, or a list of ids"),
        ("block_size", 0, "an integer from 1 to 32768"),
        ("block_size", 32769, "an integer from 1 to 32768"),
        ("block_length", "4", "an integer from 1 to 32768"),
        ("trained_block_lengths", 16, "a list of integers from 1 to 32768"),
        ("trained_block_lengths", [16, 0], "a list of integers from 1 to 32768"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(key: str, value: object, allowed: str) -> None:
    message = refusal(PUBLISHED | {key: value})
    assert message.startswith(f"config.json: {key}={value!r} is not allowed; expected ")
    assert allowed in message


@pytest.mark.parametrize(
    "key",
    [
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
        "vocab_size",
    ],
)
def test_a_missing_key_is_named(key: str) -> None:
    assert refusal(without(key)).startswith(f"config.json: {key} is missing; expected ")


def test_a_small_vocabulary_must_declare_its_mask() -> None:
    message = refusal(PUBLISHED | {"vocab_size": 4096, "eos_token_id": 2})
    assert message == "config.json: mask_token_id is missing; expected an integer from 0 to 4095"


def test_two_names_for_the_block_length_must_agree() -> None:
    message = refusal(PUBLISHED | {"block_size": 8, "block_length": 16})
    assert message.startswith("config.json: block_length=16 is not allowed; expected block_size=8")


def test_a_wrong_stop_id_is_laid_to_the_file_that_names_it() -> None:
    assert refusal(PUBLISHED, {"eos_token_id": -1}).startswith("generation_config.json: eos_token_id=-1 is not allowed")
