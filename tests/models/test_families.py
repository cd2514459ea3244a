"""The networks of all families equal transformers' own in fp32: every mask, one pass or block by block from pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dlx.models import decoder, family
from dlx.models.card import Card
from dlx.models.decoder import Decoder
from dlx.models.layers import MoE
from dlx.ops.attention import View
from dlx.weights import load, read_config
from tests.families import FAMILIES, STOP, VOCAB, logits, mask, network, write

T = 24


class Both(NamedTuple):
    """A checkpoint in dlx and in transformers, and random ids."""

    name: str
    card: Card
    net: Decoder
    theirs: Any
    ids: Tensor

    @property
    def L(self) -> int:
        return FAMILIES[self.name].L

    def kv(self) -> tuple[Tensor, ...]:
        c = self.card
        return tuple(torch.full((2, T // self.L, self.L, c.kv_heads, c.head_dim), torch.nan) for _ in range(c.layers))

    @torch.no_grad()
    def ours(self, first: int, last: int, seen: Tensor, kv: tuple[Tensor, ...]) -> Tensor:
        """Positions first to last, each of which sees so many leading keys → [·, V]."""
        pages = torch.arange(T // self.L, dtype=torch.int32)[None]
        pos = torch.arange(first, last, dtype=torch.int32)[None]
        h = self.net(self.net.embed(self.ids[None, first:last]), View(pos, pages, seen[None].int()), kv)
        return h[0] @ self.net.head().T


def opened(folder: Path) -> tuple[Card, Decoder]:
    card = Card.from_hf(*read_config(folder))
    kind = family(card.arch)
    net = kind.build(card, torch.device("cpu"), torch.float32)
    load(folder, kind.places(card), dict(net.named_parameters()), kind.stacked(card))
    return card, net


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    theirs = network(request.param)
    card, net = opened(write(tmp_path_factory.mktemp("family") / request.param, request.param, theirs))
    ids = torch.randint(4, VOCAB, (T,), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    return Both(request.param, card, net, theirs, ids)


@pytest.fixture(params=["narrow", "wide"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways through the decoder: of few rows, and of many."""
    if request.param == "wide":
        monkeypatch.setattr(decoder, "MOST_ROWS", 0)
    return request.param


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def ends(both: Both) -> Tensor:
    return (torch.arange(T) // both.L + 1) * both.L


def test_the_card_has_the_facts_of_the_family(both: Both) -> None:
    tiny = FAMILIES[both.name]
    assert (both.card.full, both.card.shift, both.card.policy) == (
        tiny.full,
        tiny.shift,
        "fast_dllm_v1" if tiny.full else "single_bd",
    )
    assert (both.card.mask_id, both.card.stop_ids, both.card.max_len) == (3, (STOP,), 256)
    assert both.card.blocks == ((32,) if tiny.full else (tiny.L,))


def test_logits_under_a_full_mask(both: Both, path: str) -> None:
    want = logits(both.theirs, both.ids, torch.ones(T, T, dtype=torch.bool))
    assert error(both.ours(0, T, torch.full((T,), T), both.kv()), want) < 1e-5


def test_logits_under_a_block_causal_mask(both: Both, path: str) -> None:
    want = logits(both.theirs, both.ids, mask(T, both.L, None))
    assert error(both.ours(0, T, ends(both), both.kv()), want) < 1e-5


def test_logits_block_by_block_from_pages(both: Both, path: str) -> None:
    want, kv = logits(both.theirs, both.ids, mask(T, both.L, None)), both.kv()
    parts = [both.ours(at, at + both.L, ends(both)[at : at + both.L], kv) for at in range(0, T, both.L)]
    assert error(torch.cat(parts), want) < 1e-5


@pytest.mark.parametrize("name", ["sdar_moe", "llada_moe", "llada2"])
def test_experts_that_are_already_stacked_load_to_the_same(name: str, tmp_path: Path) -> None:
    theirs = network(name)
    apart, together = (opened(write(tmp_path / str(s), name, theirs, stacked=s))[1] for s in (False, True))
    for (key, x), y in zip(apart.named_parameters(), together.parameters(), strict=True):
        assert torch.equal(x, y), key


def _swapped(net: Decoder) -> None:
    for layer in net.layers:
        layer.attn.q_norm, layer.attn.k_norm = layer.attn.k_norm, layer.attn.q_norm


def _unbiased(net: Decoder) -> None:
    for layer in net.layers:
        if layer.attn.qkv.bias is not None:
            layer.attn.qkv.bias.zero_()
        if isinstance(layer.mlp, MoE) and layer.mlp.bias is not None:
            layer.mlp.bias.zero_()


def _turned(net: Decoder) -> None:
    net.frequencies = net.frequencies.repeat_interleave(2)


def _renormalised(net: Decoder) -> None:
    for layer in net.layers:
        if isinstance(layer.mlp, MoE):
            layer.mlp.mixture = replace(layer.mlp.mixture, renormalise=not layer.mlp.mixture.renormalise)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("sdar", _swapped),
        ("dream_reasoner", _swapped),
        ("llada_moe", _swapped),
        ("llada2", _swapped),
        ("dream", _unbiased),
        ("fast_dllm_v2", _unbiased),
        ("llada2", _unbiased),
        ("llada2", _turned),
        ("sdar_moe", _renormalised),
        ("llada_moe", _renormalised),
    ],
)
@torch.no_grad()
def test_a_network_with_one_fact_wrong_does_not_equal_the_oracle(
    name: str, spoil: Callable[[Decoder], None], tmp_path: Path
) -> None:
    theirs = network(name)
    card, net = opened(write(tmp_path, name, theirs))
    both = Both(name, card, net, theirs, torch.arange(4, 4 + T, dtype=torch.int32))
    want = logits(theirs, both.ids, mask(T, both.L, None))
    assert error(both.ours(0, T, ends(both), both.kv()), want) < 1e-5
    spoil(net)
    assert error(both.ours(0, T, ends(both), both.kv()), want) > 1e-3
