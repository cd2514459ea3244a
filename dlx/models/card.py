"""The card of a network: its dimensions and ids as a config gives them, and where its tensors go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from dlx.errors import ModelError
from dlx.models.families import FAMILIES, PLAIN, Facts, known
from dlx.models.fields import Fields, is_integer, wrong
from dlx.models.gemma.card import Gemma, flat


class Place(NamedTuple):
    """Where a checkpoint tensor of this shape goes: rows [row, row + rows) of parameter `param`.

    A row is a vector along the last axis, so that of experts [X, 2F, E] there are X · 2F.
    """

    param: str
    row: int
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """How many rows the tensor fills; a vector's are its elements."""
        return prod(self.shape[:-1] or self.shape)


@dataclass(frozen=True, slots=True)
class Mixture:
    """The experts of a network, and how a token chooses among them; see `ops.moe.route`."""

    experts: int  # X
    active: int  # K, of a token
    ffn: int  # F of one expert
    shared: int  # F of the shared experts, which see every token, taken together; 0 is none
    dense: int  # leading layers that have a plain MLP
    renormalise: bool
    sigmoid: bool = False
    bias: bool = False  # a number an expert that counts in the choice alone
    groups: int = 1
    top_groups: int = 1
    factor: float = 1.0

    @property
    def joined(self) -> bool:
        """Whether the shared expert is as wide as the others, so that it is one of them: the last, for every token."""
        return self.shared == self.ffn


@dataclass(frozen=True, slots=True)
class Card:
    """Facts of one network; the letters are the dims of the device code.

    ffn      of the layers without experts
    rotary   channels of a head that turn
    full     trained all-to-all: a prompt sees all of itself, and any block length goes
    shift    the token at a position is read off the hidden state of the position before it
    policy   name of the strategy that is taken if none is asked for
    blocks   block lengths the checkpoint was trained for, as far as its config tells; the first is the default
    max_len  positions, prompt and answer together
    mixture  None for a dense network
    fp8      matmul weights are e4m3, with a scale a row
    mask_id  −1 where there is none
    """

    family: str
    arch: str
    layers: int
    hidden: int  # E
    heads: int  # H
    kv_heads: int  # G
    head_dim: int  # D
    rotary: int
    ffn: int  # F
    vocab: int  # V
    eps: float
    theta: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    full: bool
    shift: bool
    policy: str
    mask_id: int
    stop_ids: tuple[int, ...]
    pad_id: int
    blocks: tuple[int, ...]
    max_len: int
    mixture: Mixture | None = None
    fp8: bool = False
    gemma: Gemma | None = None

    @property
    def kv(self) -> tuple[tuple[int, int], ...]:
        """(G, D) of each layer."""
        of_all = (self.kv_heads, self.head_dim)
        if self.gemma is None:
            return (of_all,) * self.layers
        of_global = (self.gemma.global_kv_heads, self.gemma.global_dim)
        return tuple(of_global if wide else of_all for wide in self.gemma.everywhere)

    @staticmethod
    def from_hf(config: Mapping[str, object], generation: Mapping[str, object]) -> Card:
        """Read config.json and generation_config.json (`{}` if there is none) of a checkpoint.

        Both dialects are read: a top-level `rope_theta`, and transformers 5's `rope_parameters`.
        Raises ModelError  a key is missing or its value not allowed; an unknown architecture
        """
        arch = _architecture(config)
        facts = FAMILIES[arch]
        config, gemma = flat(config) if facts.name == "diffusion_gemma" else (config, None)
        read = Fields(config, facts.keys)
        for key, (plain, allowed) in {**PLAIN, **facts.plain}.items():
            if read.get(key) not in plain:
                raise read.wrong(key, read.get(key), f"{allowed}; {facts.name} models of dlx have nothing else")
        if read.boolean("attention_bias", default=facts.qkv_bias) is not facts.qkv_bias:
            raise read.wrong(
                "attention_bias", read.get("attention_bias"), f"{str(facts.qkv_bias).lower()} for {facts.name}"
            )
        hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
        kv_heads = read.integer("num_key_value_heads")
        if heads % kv_heads:
            raise read.wrong("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
        head_dim = read.integer("head_dim", default=None if facts.head_dim or hidden % heads else hidden // heads)
        if head_dim % 2:
            raise read.wrong("head_dim", head_dim, "an even number, as rotary embeddings turn pairs")
        vocab, max_len = read.integer("vocab_size"), read.integer("max_position_embeddings")
        stop_ids = _stop_ids(config, generation, facts, vocab)
        mask_id = read.integer("mask_token_id", min(0, facts.mask_id), vocab - 1, default=facts.mask_id)
        if mask_id in stop_ids:
            raise read.wrong("mask_token_id", mask_id, f"an id that is none of the stop ids {list(stop_ids)}")
        mixture = None if facts.mixture is None else _mixture(read, facts.mixture)
        theta, rotary = _rope(read, facts, head_dim)
        return Card(
            family=facts.name,
            arch=arch,
            layers=read.integer("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotary=rotary,
            ffn=read.integer("intermediate_size", default=mixture.ffn if mixture and not mixture.dense else None),
            vocab=vocab,
            eps=read.number("rms_norm_eps"),
            theta=theta,
            tied=read.boolean("tie_word_embeddings", default=False),
            qkv_bias=facts.qkv_bias,
            qk_norm=facts.qk_norm,
            full=facts.full,
            shift=facts.shift,
            policy=facts.policy,
            mask_id=mask_id,
            stop_ids=stop_ids,
            pad_id=read.integer("pad_token_id", 0, vocab - 1, default=stop_ids[-1]),
            blocks=_blocks(read, facts, max_len),
            max_len=max_len,
            fp8=config.get("quantization_config") is not None,
            mixture=mixture,
            gemma=gemma,
        )


def _architecture(config: Mapping[str, object]) -> str:
    names = ", ".join(FAMILIES)
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise wrong("architectures", named, f"a list that names the network; dlx knows {names}")
    found = known(named[0], config.get("auto_map"))
    if found is None:
        raise ModelError(f"config.json: the architecture {named[0]!r} is unknown; dlx knows {names}")
    return found


def _rope(read: Fields, facts: Facts, head_dim: int) -> tuple[float, int]:
    """(theta, channels of a head that turn)."""
    rope, inner = read.get("rope_parameters"), read
    if rope is not None:
        if not isinstance(rope, dict):
            raise wrong("rope_parameters", rope, 'an object with "rope_theta"')
        if rope.get("rope_type", "default") != "default":
            raise wrong("rope_parameters", rope, 'unscaled rotary embeddings: "rope_type": "default"')
        inner = Fields(rope)
    named = inner.get("partial_rotary_factor"), read.get("partial_rotary_factor")
    share = next((value for value in named if value is not None), 1)
    if (
        isinstance(share, bool)
        or not isinstance(share, int | float)
        or not 0 < share <= 1
        or (share != 1 and not facts.partial)
    ):
        where, value = ("rope_parameters", rope) if rope is not None else ("partial_rotary_factor", share)
        allowed = "a share above 0, 1 at most" if facts.partial else '1, as all channels turn: "rope_type": "default"'
        raise wrong(where, value, allowed)
    channels = int(head_dim * share)
    if channels % 2 or channels != read.integer("rotary_dim", default=channels):
        raise wrong("rotary_dim", read.get("rotary_dim"), f"head_dim · partial_rotary_factor = {channels}, even")
    return inner.number("rope_theta"), channels


def _mixture(read: Fields, kind: str) -> Mixture:
    experts = read.integer("num_experts")
    ffn = read.integer("moe_intermediate_size")
    active = read.integer("num_experts_per_tok", 1, experts)
    frequency = read.get("moe_layer_freq")
    if isinstance(frequency, list) and any(n != 1 for n in frequency):
        raise wrong("moe_layer_freq", frequency, "1 for every layer")
    if kind != "groups":
        renormalise = kind == "softmax" and read.boolean("norm_topk_prob", default=True)
        return Mixture(experts, active, ffn, shared=0, dense=0, renormalise=renormalise)
    groups = read.integer("n_group", 1, experts // 2, default=1)
    if experts % groups:
        raise wrong("n_group", groups, f"a divisor of num_experts={experts}")
    top_groups = read.integer("topk_group", 1, groups, default=groups)
    if active > experts // groups * top_groups:
        raise wrong("num_experts_per_tok", active, f"{experts // groups * top_groups} at most: {top_groups} groups")
    return Mixture(
        experts,
        active,
        ffn,
        shared=ffn * read.integer("num_shared_experts", 0, default=0),
        dense=read.integer("first_k_dense_replace", 0, default=0),
        renormalise=True,
        sigmoid=True,
        bias=True,
        groups=groups,
        top_groups=top_groups,
        factor=read.number("routed_scaling_factor"),
    )


def _stop_ids(
    config: Mapping[str, object], generation: Mapping[str, object], facts: Facts, vocab: int
) -> tuple[int, ...]:
    """generation_config's, else config.json's; one id of the family's, or none, means all of the family's."""
    named, file = generation.get("eos_token_id"), "generation_config.json"
    if named is None:
        named, file = config.get("eos_token_id"), "config.json"
    if named is None or named in facts.stop_ids:
        named = list(facts.stop_ids)
    ids = named if isinstance(named, list) else [named]
    good = [i for i in ids if is_integer(i, 0, vocab - 1)]
    if not good or good != ids:
        raise wrong("eos_token_id", named, f"an id, or a list of ids, from 0 to vocab_size - 1 = {vocab - 1}", file)
    return tuple(dict.fromkeys(good))


def _blocks(read: Fields, facts: Facts, max_len: int) -> tuple[int, ...]:
    """The default block length, then the others the checkpoint was trained for, or, undeclared, may have been."""
    size = read.integer("block_size", 1, max_len, default=facts.block)
    first = read.integer("block_length", 1, max_len, default=size)
    if read.get("block_size") is not None and first != size:
        raise wrong("block_length", first, f"block_size={size}, as both name the trained block length")
    trained = read.get("trained_block_lengths")
    if trained is None:
        declared = read.get("block_size") is not None or read.get("block_length") is not None
        return (first,) if declared else (first, *(n for n in facts.others if n <= max_len))
    if not isinstance(trained, list) or not all(is_integer(n, 1, max_len) for n in trained):
        raise wrong("trained_block_lengths", trained, f"a list of integers from 1 to {max_len}")
    return tuple(dict.fromkeys((first, *trained)))
