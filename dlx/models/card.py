"""The card of a network: its dimensions and ids as a config gives them, and where its tensors go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

from dlx.errors import ModelError

LARGEST = 2**31 - 1  # ids and positions are int32 on the device


class Place(NamedTuple):
    """Where a checkpoint tensor of this shape goes: rows [row, row + shape[0]) of parameter `param`."""

    param: str
    row: int
    shape: tuple[int, ...]


class Family(NamedTuple):
    """Facts of a family that its published config.json leaves out."""

    name: str
    mask_id: int
    block: int
    stop_ids: tuple[int, ...]
    qkv_bias: bool
    qk_norm: bool


FAMILIES = {
    "SDARForCausalLM": Family("sdar", mask_id=151669, block=4, stop_ids=(151645, 151643), qkv_bias=False, qk_norm=True),
}

# what the shared decoder does not compute: a key, the values that ask for nothing, and those in words
PLAIN: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("hidden_act", ("silu",), '"silu"'),
    ("rope_scaling", (None,), "null"),
    ("use_sliding_window", (None, False), "false"),
    ("quantization_config", (None,), "null (bfloat16, float16 or float32 weights)"),
)


@dataclass(frozen=True, slots=True)
class Card:
    """Facts of one network; the letters are the dims of the device code.

    blocks   block lengths the checkpoint was trained for; the first is the default
    max_len  positions, prompt and answer together
    """

    family: str
    arch: str
    layers: int
    hidden: int  # E
    heads: int  # H
    kv_heads: int  # G
    head_dim: int  # D
    ffn: int  # F
    vocab: int  # V
    eps: float
    theta: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    mask_id: int
    stop_ids: tuple[int, ...]
    pad_id: int
    blocks: tuple[int, ...]
    max_len: int

    @staticmethod
    def from_hf(config: Mapping[str, object], generation: Mapping[str, object]) -> Card:
        """Read config.json and generation_config.json (`{}` if there is none) of a checkpoint.

        Both dialects are read: a top-level `rope_theta`, and transformers 5's `rope_parameters`.
        Raises ModelError  a key is missing or its value not allowed; an unknown architecture
        """
        arch = _architecture(config)
        family = FAMILIES[arch]
        for key, plain, allowed in PLAIN:
            if config.get(key) not in plain:
                raise _wrong(key, config[key], f"{allowed}; {family.name} models of dlx have nothing else")
        bias = config.get("attention_bias") or False
        if bias is not family.qkv_bias:
            raise _wrong("attention_bias", bias, f"{str(family.qkv_bias).lower()} for {family.name}")
        heads, kv_heads = _integer(config, "num_attention_heads"), _integer(config, "num_key_value_heads")
        if heads % kv_heads:
            raise _wrong("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
        head_dim = _integer(config, "head_dim")
        if head_dim % 2:
            raise _wrong("head_dim", head_dim, "an even number, as rotary embeddings turn pairs")
        vocab = _integer(config, "vocab_size")
        max_len = _integer(config, "max_position_embeddings")
        stop_ids = _stop_ids(config, generation, family, vocab)
        mask_id = _integer(config, "mask_token_id", 0, vocab - 1, default=family.mask_id)
        if mask_id in stop_ids:
            raise _wrong("mask_token_id", mask_id, f"an id that is none of the stop ids {list(stop_ids)}")
        return Card(
            family=family.name,
            arch=arch,
            layers=_integer(config, "num_hidden_layers"),
            hidden=_integer(config, "hidden_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn=_integer(config, "intermediate_size"),
            vocab=vocab,
            eps=_number(config, "rms_norm_eps"),
            theta=_theta(config),
            tied=_boolean(config, "tie_word_embeddings", default=False),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            mask_id=mask_id,
            stop_ids=stop_ids,
            pad_id=_integer(config, "pad_token_id", 0, vocab - 1, default=stop_ids[-1]),
            blocks=_blocks(config, family, max_len),
            max_len=max_len,
        )


def _architecture(config: Mapping[str, object]) -> str:
    known = ", ".join(FAMILIES)
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise _wrong("architectures", named, f"a list that names the network; dlx knows {known}")
    if named[0] not in FAMILIES:
        raise ModelError(f"config.json: the architecture {named[0]!r} is unknown; dlx knows {known}")
    return named[0]


def _theta(config: Mapping[str, object]) -> float:
    rope = config.get("rope_parameters")
    if rope is None:
        return _number(config, "rope_theta")
    if not isinstance(rope, dict):
        raise _wrong("rope_parameters", rope, 'an object with "rope_theta"')
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise _wrong("rope_parameters", rope, 'unscaled rotary embeddings: "rope_type": "default"')
    return _number(rope, "rope_theta")


def _stop_ids(
    config: Mapping[str, object], generation: Mapping[str, object], family: Family, vocab: int
) -> tuple[int, ...]:
    """generation_config's; else the family's if config.json names one of them or none; else config.json's."""
    named, file = generation.get("eos_token_id"), "generation_config.json"
    if named is None:
        named, file = config.get("eos_token_id"), "config.json"
        if named is None or named in family.stop_ids:
            named = list(family.stop_ids)
    ids = named if isinstance(named, list) else [named]
    good = [i for i in ids if _is_integer(i, 0, vocab - 1)]
    if not good or good != ids:
        raise _wrong("eos_token_id", named, f"an id, or a list of ids, from 0 to vocab_size - 1 = {vocab - 1}", file)
    return tuple(dict.fromkeys(good))


def _blocks(config: Mapping[str, object], family: Family, max_len: int) -> tuple[int, ...]:
    """The default block length, then the others the checkpoint was trained for."""
    size = _integer(config, "block_size", 1, max_len, default=family.block)
    first = _integer(config, "block_length", 1, max_len, default=size)
    if config.get("block_size") is not None and first != size:
        raise _wrong("block_length", first, f"block_size={size}, as both name the trained block length")
    trained = config.get("trained_block_lengths")
    if trained is None:
        return (first,)
    if not isinstance(trained, list) or not all(_is_integer(n, 1, max_len) for n in trained):
        raise _wrong("trained_block_lengths", trained, f"a list of integers from 1 to {max_len}")
    return tuple(dict.fromkeys((first, *trained)))


def _integer(
    config: Mapping[str, object], key: str, low: int = 1, high: int = LARGEST, default: int | None = None
) -> int:
    value = default if config.get(key) is None else config[key]
    if not _is_integer(value, low, high):
        raise _wrong(key, config.get(key), f"an integer from {low} to {high}")
    return value


def _is_integer(value: object, low: int, high: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(config: Mapping[str, object], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGEST:
        raise _wrong(key, value, f"a number above 0 and below {LARGEST}")
    return float(value)


def _boolean(config: Mapping[str, object], key: str, default: bool) -> bool:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false")
    return value


def _wrong(key: str, value: object, allowed: str, file: str = "config.json") -> ModelError:
    what = f"{key} is missing" if value is None else f"{key}={value!r} is not allowed"
    return ModelError(f"{file}: {what}; expected {allowed}")
